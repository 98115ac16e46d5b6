"""What was recorded: experiments' indices, traces, labels, and signals on a common axis."""
