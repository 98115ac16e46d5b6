"""Monitors: read-only observers of a training run. One mechanism a file."""

import foreshock  # noqa: F401  (which gives this folder's modules one name)
