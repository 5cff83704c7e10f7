"""More operators made of others: norms of matrices, finite differences."""
