"""What generated files are made of: text, names, functions, Kronecker factors, and between which numbers is drawn."""
