"""The paper's figure: signals against step, with alarms and divergence."""

from foreshock.analysis.figures.central import central_figure
from foreshock.analysis.reports.kinds.base import Kind


class Central(Kind):
    pictures = (("figure", central_figure),)
