"""One run a dose: losses, gradient norm, spectra of increments and conservation laws against the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from foreshock.analysis.figures.drawing import HEALTHY, THOUSANDS, save, style
from foreshock.analysis.scores.doses import Dose

PANELS: tuple[tuple[str, Callable[[Dose], pd.Series], bool], ...] = (
    ("held-out loss\n(nats/token)", lambda dose: dose.held_out, False),
    ("gradient norm\n(median of 50)", lambda dose: dose.gradient_norm, True),
    ("ΔW entropy, worst\nhead of W_Q (nats)", lambda dose: dose.delta_w, False),
    ("Δ₂ entropy\nworst head (nats)", lambda dose: dose.delta_2, False),
    ("worst attention law\n(ratio to rounding)", lambda dose: dose.worst_law, True),
)
"""What each panel shows, and whether its axis is logarithmic."""

GRADIENT_NORM_SHOWN = 1e6
"""Diverged runs pass it by many powers of ten, which would flatten everything before."""


def dose_readings_figure(doses: Sequence[Dose], table: pd.DataFrame, path: Path, title: str = "") -> None:
    """Draw the runs into a file. table: of ``dose_table``, the same runs in the same order."""
    style()
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 12), sharex=True)
    colours = [HEALTHY, *sns.color_palette("YlOrBr", len(doses) + 2)[2:-1]]
    for axis, (label, signal, logarithmic) in zip(axes, PANELS, strict=True):
        for dose, colour in zip(doses, colours, strict=True):
            axis.plot(signal(dose), color=colour, lw=1.4, label=f"{dose.bits} bits" if dose.bits else "healthy")
        axis.set_yscale("log" if logarithmic else "linear")
        axis.set_ylabel(label)
        for step, colour in zip(table["diverges"], colours, strict=True):
            if pd.notna(step):
                axis.axvline(step, color=colour, ls="--", lw=1)
    axes[1].set_ylim(top=GRADIENT_NORM_SHOWN)
    limit = table["threshold"].iloc[0]
    axes[-1].axhline(limit, color="black", ls=":", lw=1.3)
    last = max(dose.steps for dose in doses)
    axes[-1].text(last, limit * 1.25, f"universal threshold {limit:.2f}", ha="right", va="bottom", fontsize=11)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, last)
    axes[-1].xaxis.set_major_formatter(THOUSANDS)
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="0.35", ls="--", lw=1))
    figure.legend(
        handles, [*labels, "loss diverges"], ncols=len(handles), loc="lower center", bbox_to_anchor=(0.53, 0.972),
        frameon=False, fontsize=11, columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip
    figure.suptitle(title, x=0.53, y=1.012, fontsize=13, weight="bold")
    figure.align_ylabels()
    figure.tight_layout()
    save(figure, path)
