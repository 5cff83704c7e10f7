"""Lower: a product of operands becomes candidates in torch calls."""
