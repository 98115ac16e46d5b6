"""Transformers whose attention exposes every tensor that a numeric fault can touch."""

import foreshock  # noqa: F401  (which gives this folder's modules one name)
