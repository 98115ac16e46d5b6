"""Short checks of a training that somebody has reason to doubt."""
