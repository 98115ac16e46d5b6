"""Kinds of reports, one a file; ``by_name`` lists them."""
