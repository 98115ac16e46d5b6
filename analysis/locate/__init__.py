"""What an alarm speaks for: the fault, and the kernel in which it sits."""
