"""Performance profiles: in how many runs a detector has at least so much of the possible lead."""

from __future__ import annotations

import pandas as pd

from foreshock.analysis.scores.contest import Contest
from foreshock.analysis.scores.inference import performance_profile

PROFILE_SHARES = tuple(i / 20 for i in range(21))


def profiles(contest: Contest, scores: pd.DataFrame) -> pd.DataFrame:
    """Performance profiles: the share of diverging runs with at least so much of onset to divergence as lead."""
    parts = []
    for name, mine in scores[scores["share_of_possible_lead"].notna()].groupby("detector", sort=False):
        share = performance_profile(mine["share_of_possible_lead"], PROFILE_SHARES)
        parts.append(pd.DataFrame({"detector": name, "share_of_possible_lead": PROFILE_SHARES, "share_of_runs": share}))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return table.assign(**contest.keys) if parts else table
