"""The training of runs: engines that take steps, the loop around them, and what it leaves in a run's folder."""
