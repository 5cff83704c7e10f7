"""Running what is the user's: what is said and printed meanwhile, where it fails, what its torch does otherwise."""
