"""What the `--check` of a generated file compares, and the texts of it."""
