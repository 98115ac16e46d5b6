"""Tracks: what a signal is held against, in ways that are never mixed in one table. One a file; ``by_name`` finds them.

``reference``: the per-sample median of healthy reference runs (the paper's own setting, not deployable).
``self``: the run's own lagged window (deployable; it cannot see a fault that is there from step 0).
``floor``: nothing; the signal is already a ratio to what noise alone would give.
``published``: the number that the source of the signal gives.
``universal``: the number that a prediction gives by itself: no ratio to predicted noise should ever pass it.
The first three give z-scores, (T samples, layers, heads), which charts and a conformal threshold follow; the last two
judge raw readings at a number that no run sets.
"""
