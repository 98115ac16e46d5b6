"""The leaderboard of the experiment: mean leads, alarms and false alarms of every detector."""

from foreshock.analysis.figures.leaderboard import leads_figure
from foreshock.analysis.reports.kinds.base import Kind


class Leads(Kind):
    pictures = (("figure", leads_figure),)
