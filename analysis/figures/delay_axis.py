"""The axis of delays: steps from onset to first alarm, with a line for no alarm."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

NEVER = "none by\nthe end"


def delay_axis(axis: plt.Axes, horizon: int, soonest: float) -> float:
    """A logarithmic axis of delays with a marked line for none; returns where that line stands.

    soonest: the smallest delay on it, NaN for none; from 1 on the axis needs no 0.
    """
    axis.set_yscale("symlog", linthresh=1)
    decades = [0.0, *(10.0**i for i in range(int(np.log10(horizon)) + 1))]
    never = 10 ** (np.log10(horizon) + 0.45)
    axis.set_ylim(0.8 if soonest >= 1 else -0.3, never * 4.5)
    axis.yaxis.set_major_locator(FixedLocator([*decades, never]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: NEVER if value == never else f"{value:,.0f}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(never, color="0.8", linewidth=1.2, zorder=0)
    return never
