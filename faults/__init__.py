"""Faults: pure functions from (step, healthy sites) to the sites of a faulty step."""
