"""The threshold of a monitor of one's own: the public name of what ``analysis.detect.alarms`` computes."""

from foreshock.analysis.detect.alarms import conformal_threshold

__all__ = ["conformal_threshold"]
