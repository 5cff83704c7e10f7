"""Plan: what is built once, and in which order everything is contracted."""
