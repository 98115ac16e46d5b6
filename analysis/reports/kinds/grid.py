"""Two faults on a grid, a heat map a panel."""

from foreshock.analysis.figures.routers import grid_figure
from foreshock.analysis.reports.kinds.base import Kind


class Grid(Kind):
    name = "grid"
    pictures = (("figure", lambda contest, path: grid_figure(contest.experiment, path)),)
    needs = ("healthy_cell",)
