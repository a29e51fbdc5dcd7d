"""What is drawn in axes: the numbers behind seaborn's points and bars."""

import numpy as np
from matplotlib.collections import PathCollection


def drawn_points(ax):
    """Positions (x, y) of all points of scatter and strip plots, in the order of drawing."""
    drawn = [points for points in ax.collections if isinstance(points, PathCollection)]
    offsets = [points.get_offsets() for points in drawn if len(points.get_offsets())]
    return np.ma.concatenate(offsets).filled(np.nan) if offsets else np.empty((0, 2))


def drawn_bars(ax, *, rows):
    """Place and value of every short bar of a strip; ``rows`` if categories are rows."""
    lines = [line for line in ax.get_lines() if line.get_marker() == ("|" if rows else "_")]
    ends = [tuple(point) for line in lines for point in line.get_xydata()]
    ends = [point[::-1] if rows else point for point in ends]
    return [(int(place), float(value)) for place, value in ends if not np.isnan(value)]
