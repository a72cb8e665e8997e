"""The layouts of rows, one file for each family; formats.py lists them."""
