"""Monitors on a training loop that is not ours: ``foreshock.attach``."""
