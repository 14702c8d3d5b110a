"""`save_preview`: a picture of a segmentation, three slices with contours."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from genmed.files import write_bytes
from genmed.space import Space
from genmed.volume import Volume

PLANES = ("sagittal", "coronal", "axial")


def save_preview(image: np.ndarray, labels: Volume, path: Path) -> None:
    """Write a .png: slices through the middle of what is labelled, contours in one colour per label.

    Args:
        image: (c, x, y, z) on the label map's grid; the first channel is shown, NaN stays empty.
        labels: (1, x, y, z) label map.
        path: of the .png file.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    space = Space.fit(labels.grid, (1.0, 1.0, 1.0))
    shown = space.orient(image[0]).astype(np.float32)
    marked = space.orient(labels.data[0])
    names = {value: labels.label_names.get(int(value), str(value)) for value in np.unique(marked) if value}
    colours = {value: f"C{number}" for number, value in enumerate(names)}
    spacing = [labels.spacing_mm[axis] for axis in space.axes]
    inside = np.argwhere(marked)
    centre = np.round(inside.mean(axis=0)).astype(int) if len(inside) else np.array(marked.shape) // 2
    known = shown[np.isfinite(shown)]
    low, high = np.percentile(known, (1, 99)) if known.size else (0.0, 1.0)
    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="black")
    for plane, title in enumerate(PLANES):
        axes = figure.add_subplot(1, 3, plane + 1)
        across, up = (axis for axis in range(3) if axis != plane)
        aspect = spacing[up] / spacing[across]
        axes.imshow(
            shown.take(centre[plane], axis=plane).T,
            cmap="gray",
            vmin=low,
            vmax=high,
            origin="lower",
            aspect=aspect,
        )
        _contours(axes, marked.take(centre[plane], axis=plane).T, colours)
        axes.set_title(title, color="white", fontsize=9)
        axes.set_axis_off()
    lines = [Line2D([], [], color=colours[value], label=name) for value, name in names.items()]
    if lines and len(lines) <= 12:
        figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False, labelcolor="white")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())


def _contours(axes: Any, marked: np.ndarray, colours: Mapping[int, str]) -> None:
    """Outline every label of a slice; a slice one voxel wide has no outline."""
    if min(marked.shape) < 2:
        return
    for value, colour in colours.items():
        mask = marked == value
        if mask.any() and not mask.all():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
