"""Pictures of scored runs; each is written to a file and returns its caption."""
