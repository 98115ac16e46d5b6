"""Pages, sentences and terminal tables of scored runs."""
