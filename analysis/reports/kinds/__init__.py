"""Kinds of reports, one a file; ``by_name`` finds them."""
