"""Restore a scan, or translate it to the model's modality: the image that agrees with what was observed."""

from __future__ import annotations

import gzip
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from jaxtyping import Bool, Float

from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.hub import Model
from genmed.match import lookup
from genmed.space import Intensity, Space
from genmed.tasks.segment import MONOTONE, RIGID, Progress, Segmentation, segment
from genmed.volume import Volume

SAMPLES = 4  # guided trajectories that are averaged
SEED_STEP = 1_000_003  # between the seeds of an image's samples
DESCRIP_BYTES = 79  # of the NIfTI header's field `descrip`, without the closing zero

Units = Callable[[np.ndarray, Volume, Bool[np.ndarray, "x y z"], Space, str], np.ndarray]  # the last: match


@dataclass
class Restoration:
    """What `restore` or `translate` made. The image is synthetic: no voxel of it was measured as it stands.

    `image` is the mean over the samples, (c, x, y, z) on the model's working grid; `deviation` is their voxel-wise
    standard deviation in the same units, None for a single sample. `residual` is that of `segment`, averaged; the
    others are as there, of the first sample.
    """

    image: Volume
    residual: float
    match: str
    seconds: float
    seed: int
    deviation: Volume | None = None
    surprise: float | None = None
    observed_share: float = 1.0
    slice_thickness_mm: float | None = None
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def doubtful(self) -> bool:
        """There are `doubts`."""
        return bool(self.doubts)


def restore(
    model: Model,
    scan: Volume,
    *,
    match: str = "auto",
    samples: int | None = None,
    seed: int = 0,
    observed: Volume | None = None,
    slice_thickness_mm: float | None = None,
    roi_mm: Sequence[tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Restoration:
    """The scan at the model's full resolution, complete, in the contrast and units of the scan itself.

    Each sample is brought to the scan's units by the line that fits the observed voxels best, which also turns it
    back where the match turned the contrast round; after a match that bends contrasts, by a curve.

    Args:
        match: how the observed appearance relates to the model's, as in `segment`.
        samples: how many to draw and average; default 4.
        observed: mask on the scan's grid; voxels where it is 0 are never looked at.
        slice_thickness_mm: thickness of what a coarse voxel averages along the slice axis; default as in `segment`.
        roi_mm: world box ((x0, x1), (y0, y1), (z0, z1)) to which the work is confined.
        progress: called with the finished share.

    Raises:
        GenMedError: for input that the model cannot take.
    """
    return _average(
        model, scan, _units_of_scan, match, samples, seed, observed, slice_thickness_mm, roi_mm, progress
    )  # fmt: skip


def translate(
    model: Model,
    scan: Volume,
    *,
    match: str = "auto",
    samples: int | None = None,
    seed: int = 0,
    observed: Volume | None = None,
    slice_thickness_mm: float | None = None,
    roi_mm: Sequence[tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Restoration:
    """`restore` of a scan of another modality, but in the contrast of the model.

    The model knows its modality up to brightness and contrast only: each sample gets the mean and the standard
    deviation of the scan's observed voxels, both as `Intensity` measures them. Without a measure of surprise, `match`
    "auto" is affine, which can turn the contrast round; the other arguments and errors are those of `restore`.
    """
    match = "affine" if match == "auto" and not model.plan.typical else match
    return _average(
        model, scan, _scale_of_scan, match, samples, seed, observed, slice_thickness_mm, roi_mm, progress
    )  # fmt: skip


def save_synthetic(image: Volume, path: Path, description: str) -> None:
    """Write a .nii.gz file whose header says in `descrip` (cut at 79 bytes) what it is; whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part.nii.gz")
    try:
        image.save(part)
        written = nib.Nifti1Image.from_bytes(gzip.decompress(part.read_bytes()))
    finally:
        part.unlink(missing_ok=True)
    text = description.encode("utf-8")[:DESCRIP_BYTES].decode("utf-8", "ignore")  # no half letter at the cut
    written.header["descrip"] = text.encode("utf-8")
    write_bytes(path, gzip.compress(written.to_bytes(), mtime=0))


def _average(
    model: Model,
    scan: Volume,
    units: Units,
    match: str,
    samples: int | None,
    seed: int,
    observed: Volume | None,
    slice_thickness_mm: float | None,
    roi_mm: Sequence[tuple[float, float]] | None,
    progress: Progress | None,
) -> Restoration:
    """Mean and spread of samples, each drawn alone and brought to its `units` before they are averaged."""
    started = time.monotonic()
    count = SAMPLES if samples is None else samples
    if count < 1:
        raise GenMedError(f"samples must be at least 1, not {count}.")
    drawn: list[Volume] = []
    residuals: list[float] = []
    first: Segmentation | None = None
    for number in range(count):
        if number and match not in MONOTONE:  # nothing is left for which clean cases must be known
            model = replace(model, plan=replace(model.plan, typical=()))
        found = segment(
            model, scan, mode="restore-then-condition", match=match, samples=1, seed=seed + number * SEED_STEP,
            grid="model", observed=observed, slice_thickness_mm=slice_thickness_mm, roi_mm=roi_mm,
            progress=_share(progress, number, count),
        )  # fmt: skip
        assert found.image is not None
        first = first or found
        match, observed = found.match, found.observed  # what was chosen for the first sample holds for all
        slice_thickness_mm = found.slice_thickness_mm or math.inf  # infinite: all of the slice spacing
        drawn.append(found.image)
        residuals.append(found.residual)
    assert first is not None
    space = Space.fit(scan.grid, model.plan.spacing_mm, slice_axis_last=model.plan.thick_slices, roi_mm=roi_mm)
    seen = _seen(scan, observed, space)
    drawn = [image.like(units(image.data, scan, seen, space, match)) for image in drawn]
    images = np.stack([image.data for image in drawn]).astype(np.float64)
    mean, spread = images.mean(axis=0), images.std(axis=0, ddof=1) if count > 1 else None
    whole = replace(first, residual=float(np.mean(residuals)))
    return Restoration(
        image=drawn[0].like(mean.astype(np.float32)), residual=whole.residual, match=match,
        seconds=time.monotonic() - started, seed=seed,
        deviation=None if spread is None else drawn[0].like(spread.astype(np.float32)),
        surprise=whole.surprise, observed_share=whole.observed_share, slice_thickness_mm=whole.slice_thickness_mm,
        doubts=whole.doubts, notes=whole.notes,
    )  # fmt: skip


def _share(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one sample as progress of all."""
    if progress is None:
        return None
    return lambda share: progress((number + share) / count)


def _seen(scan: Volume, observed: Volume | None, space: Space) -> Bool[np.ndarray, "x y z"]:
    """Voxels of the scan's grid that were observed and lie in the region of work."""
    inside = space.unorient(np.ones(space.oriented, dtype=bool))
    return inside if observed is None else inside & (observed.data[0] != 0)


def _units_of_scan(
    image: Float[np.ndarray, "c X Y Z"], scan: Volume, seen: Bool[np.ndarray, "x y z"], space: Space, match: str
) -> Float[np.ndarray, "c X Y Z"]:
    """Brightness and contrast, channel by channel, that explain the observed voxels best (least squares).

    A contrast that a match has bent is bent back by a curve of the same kind.
    """
    measured = space.to_input(image)
    if match in RIGID:
        lines = [line(x[seen], y[seen]) for x, y in zip(measured, scan.data, strict=True)]
        return np.stack([slope * channel + shift for (slope, shift), channel in zip(lines, image, strict=True)])
    scale = Intensity.fit(scan.data, seen)
    target = np.where(seen, scale.normalise(scan.data), 0)
    x, y, where = (torch.from_numpy(array).float()[None] for array in (measured, target, seen[None]))
    return scale.restore(lookup(x, y, where)(torch.from_numpy(image).float()[None])[0].numpy())


def _scale_of_scan(
    image: Float[np.ndarray, "c X Y Z"], scan: Volume, seen: Bool[np.ndarray, "x y z"], space: Space, match: str
) -> Float[np.ndarray, "c X Y Z"]:
    """Mean and standard deviation of the observed voxels, channel by channel."""
    return Intensity.fit(scan.data, seen).restore(Intensity.fit(image).normalise(image))


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the line y ≈ slope · x + shift with the least squares; slope 0 for a constant x."""
    x, y = np.asarray(x, dtype=np.float64).ravel(), np.asarray(y, dtype=np.float64).ravel()
    variance = float(np.square(x - x.mean()).mean())
    slope = float(np.mean((x - x.mean()) * (y - y.mean()))) / variance if variance > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())
