"""The program as data: values, the expressions that make them, and the table of what torch can do."""
