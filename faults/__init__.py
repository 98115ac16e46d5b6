"""Faults: pure functions from (step, healthy sites) to the sites of a faulty step."""

import foreshock  # noqa: F401  (which gives this folder's modules one name)
