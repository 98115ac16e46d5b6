"""Monitors: read-only observers of a training run. One mechanism a file."""
