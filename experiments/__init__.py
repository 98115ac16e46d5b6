"""Build a run from its configuration, train it, and record what every monitor saw."""

import foreshock  # noqa: F401  (which gives this folder's modules one name)
