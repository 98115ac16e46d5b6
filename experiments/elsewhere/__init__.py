"""Runs that were trained elsewhere: their exports read, checked and written as traces. No torch."""
