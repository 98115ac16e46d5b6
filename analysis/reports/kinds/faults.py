"""Several faults on one step axis: first alarms and divergence of each."""

from foreshock.analysis.figures.faults import fault_figure
from foreshock.analysis.reports.kinds.base import Kind


class Faults(Kind):
    pictures = (("figure", fault_figure),)
