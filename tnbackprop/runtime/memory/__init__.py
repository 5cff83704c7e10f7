"""The memory of results: their own, and on a CPU kept from one call to the next."""
