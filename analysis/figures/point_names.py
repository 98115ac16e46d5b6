"""Names beside points, placed so that none covers another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
from matplotlib.transforms import Bbox

POINT = 6.0
"""Half the side of the square that a marker keeps free, in pixels."""


def label_points(
    axis: plt.Axes, points: Sequence[tuple[float, float]], names: Sequence[str], *, lines: Sequence[float] = (), **text
) -> None:
    """Write each name at the nearest place to its point where it covers no point, no line and no other name.

    points, and lines, heights of horizontal ones: in data coordinates, limits and scales being final. A name that had
    to move away has a line to its point.
    """
    figure = axis.figure
    figure.canvas.draw()
    to_typographic = 72 / figure.dpi
    pixels = axis.transData.transform(points)
    taken = [Bbox.from_extents(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in pixels]
    inside = axis.get_window_extent()
    for height in lines:
        y = axis.transData.transform((points[0][0], height))[1]
        taken.append(Bbox.from_extents(inside.x0, y - 1, inside.x1, y + 1))
    for (x, y), point, name in sorted(
        zip(pixels, points, names, strict=True), key=lambda item: (-item[0][1], item[0][0])
    ):
        label = axis.annotate(name, point, (0, 0), textcoords="offset points", **text)
        extent = label.get_window_extent()
        for dx, dy in _places(extent.width, extent.height):
            box = Bbox.from_bounds(x + dx, y + dy, extent.width, extent.height)
            free = not any(box.overlaps(other) for other in taken)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                break
        taken.append(box)
        label.set_position((dx * to_typographic, dy * to_typographic))
        nearest = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        if (nearest[0] - x) ** 2 + (nearest[1] - y) ** 2 > (3 * POINT) ** 2:
            ends = axis.transData.inverted().transform([(x, y), nearest])
            axis.plot(*zip(*ends, strict=True), color="0.6", linewidth=0.7, zorder=0.5)


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners relative to the point, in pixels: right, left, above, below, then ever farther up and down."""
    for step in range(40):
        away = POINT + 2 + 3 * step
        for shift in (away, -away) if step else (0.0,):
            yield (POINT + 2, shift - height / 2)
            yield (-POINT - 2 - width, shift - height / 2)
        for y in (away, -away - height):
            yield from ((x, y) for x in (-width / 2, -POINT, POINT - width))
