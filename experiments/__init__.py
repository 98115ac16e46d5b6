"""Build a run from its configuration, train it, and record what every monitor saw."""
