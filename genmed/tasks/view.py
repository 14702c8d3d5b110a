"""What was seen of a scan, on the model's working grid: the observation that every mode explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from genmed.degrade import slice_profile
from genmed.errors import GenMedError
from genmed.observe import Identity, Observation, Resample, masked, voxels
from genmed.plan import Plan
from genmed.space import SLICE_RATIO, Intensity, Space, apply_matrices, resample_matrix
from genmed.surprise import histogram
from genmed.volume import Volume, check_image, require_3d, require_same_grid

COARSE = 1.5  # voxels this much larger than the working spacing are an observation, not something to interpolate
TWICE = 2.1  # times the working spacing up to which interpolation leaves little to guess; 2 and rounding
ROUNDING = 1.01  # of a slice thickness in a header
CRAMPED = 0.35  # share of what networks saw at once in training below which a scan's surroundings are missed
LARGEST_EXTENT = 1.6  # field of view that is believed, in units of the largest one seen in training
SMALLEST_EXTENT = 0.2  # along an axis, in the same units: below it, the header or the result is doubtful
SIGMA_Y = 0.05  # noise of an observed voxel, in standard deviations of the image
FEWEST_VOXELS = 500  # that an estimate of the noise needs
LEAST_STEP = 1e-4  # between quantiles of a normalised scan, below which they agree
FEWEST_EMPTY = 3  # slices of one value between others that count as missing
NATURAL = 0.5  # share of that value in the other slices from which on it is taken for the scan's own background
NOISY = 0.25  # estimate from which on it is taken for noise, above the texture of clean scans; else it is SIGMA_Y


@dataclass
class View:
    """A scan as the model sees it.

    `y` holds its normalised voxels on the observation grid: oriented, the scan's own voxels along coarse
    axes, the working grid's along the others. `image` is their interpolation on the working grid.
    """

    space: Space
    intensity: Intensity
    y: Float[Tensor, "1 c u v w"]
    seen: Bool[Tensor, "u v w"]
    matrices: tuple[Tensor, Tensor, Tensor]  # working grid -> observation grid
    coarse_axes: tuple[bool, bool, bool]
    slice_thickness_mm: float | None = None
    room: tuple[int, int, int] = (0, 0, 0)  # working voxels by which the training patches are larger
    margins: tuple[tuple[int, int], ...] = ((0, 0), (0, 0), (0, 0))  # unseen voxels round the working grid
    extent_share: float = 1.0  # of the field of view seen in training, along the axis with the least of it
    patch_share: float = 1.0  # of what was seen at once in training; see `_patch_share`
    thick_slices: bool = False  # the model's own are; see `genmed.plan.Plan`

    @property
    def coarse(self) -> bool:
        """Some axis has voxels well above the working spacing."""
        return any(self.coarse_axes)

    @property
    def spacing_y_mm(self) -> tuple[float, float, float]:
        """Distances between neighbours on the observation grid."""
        model = self.space.model
        x, y, z = (mm * m / n for mm, m, n in zip(model.spacing_mm, model.shape, self.seen.shape, strict=True))
        return x, y, z

    @property
    def slice_axis(self) -> int | None:
        """The only coarse axis, or the clearly coarsest: its slices may average their spacing, or have gaps between."""
        return _slice_axis(self.coarse_axes, self.spacing_y_mm)

    def with_thin_slices(self) -> View:
        """The same scan if its slices were as thin as the working voxels, with gaps between."""
        axis = self.slice_axis
        assert axis is not None
        thin_mm = self.space.model.spacing_mm[axis]
        n_y, n_model = self.matrices[axis].shape
        thin = torch.from_numpy(slice_profile(n_model, n_y, n_y / n_model)).float()
        x, y, z = (thin if number == axis else m for number, m in enumerate(self.matrices))
        return replace(self, matrices=(x, y, z), slice_thickness_mm=thin_mm)

    def equalised(self, target: Float[Tensor, "c 9"], falling: bool) -> View:
        """The same scan if its intensities are a rising (or falling) map of those that the model knows.

        The map between two histograms is unique among monotone ones: it takes quantiles to quantiles (`target`:
        `genmed.surprise.histogram` of clean cases), linear between and beyond them.
        """
        y = self.y.clone()
        for channel, goal in zip(y[0], target.flip(1) if falling else target, strict=True):
            values = channel[self.seen]
            place = histogram(values.reshape(1, 1, -1, 1, 1))[0, 0]
            channel[self.seen] = _piecewise(values, place, goal)
        return replace(self, y=y)

    def with_margins(self) -> View:
        """The same scan in the middle of a working grid as large as the training patches, its margins unseen.

        A network that has always met a structure in its surroundings is lost in a field of view without them.
        """
        margins = tuple((free // 2, free - free // 2) for free in self.room)
        x, y, z = (torch.nn.functional.pad(m, pair) for m, pair in zip(self.matrices, margins, strict=True))
        return replace(self, matrices=(x, y, z), margins=margins)

    @property
    def widened(self) -> bool:
        """There are margins."""
        return any(map(sum, self.margins))

    @property
    def cramped(self) -> bool:
        """The scan shows so little that a network misses its surroundings."""
        return any(self.room) and self.patch_share < CRAMPED

    def inside(self, values: Float[Tensor, "b c X Y Z"]) -> Float[Tensor, "b c x y z"]:
        """What lies within the scan's field of view of values on the working grid and its margins."""
        x, y, z = (slice(low, n - high) for n, (low, high) in zip(values.shape[2:], self.margins, strict=True))
        return values[:, :, x, y, z]

    @property
    def complete(self) -> bool:
        """Every voxel of the working grid was observed, at about its spacing."""
        return not self.coarse and bool(self.seen.all())

    @property
    def nearly_complete(self) -> bool:
        """Interpolation leaves little to guess: voxels are at most twice as large as the model's, none is hidden."""
        pairs = zip(self.spacing_y_mm, self.space.model.spacing_mm, strict=True)
        return all(mm <= TWICE * working_mm for mm, working_mm in pairs) and bool(self.seen.all())

    @property
    def interpolable(self) -> bool:
        """Only slices of a model of thick slices are missing: those beside them tell more than its guess from noise."""
        return self.thick_slices and not bool(self.seen.all()) and not self.widened

    @property
    def covered(self) -> Bool[Tensor, "x y z"]:
        """Working voxels in the field of view that some observed voxel averages, with others or alone."""
        return self.inside(apply_matrices(self.seen[None, None].float(), [m.T for m in self.matrices]))[0, 0] > 0

    @property
    def image(self) -> Float[Tensor, "1 c x y z"]:
        """The best plain interpolation on the working grid.

        Hidden slices come linearly from the seen ones around them, other hidden voxels from the nearest seen one.
        """
        filled = _fill_hidden(self.y, self.seen, self.spacing_y_mm)
        return apply_matrices(filled, [_interpolation(m) for m in self.matrices])

    @property
    def sigma_y(self) -> float:
        """Noise of an observed voxel: estimated where there is much of it; along coarse axes if there are no others."""
        fine = [axis for axis in range(3) if not self.coarse_axes[axis]]
        estimate = noise_level(self.y, self.seen, fine if len(fine) > 1 else range(3))
        return estimate if estimate > NOISY else SIGMA_Y

    @property
    def observation(self) -> Observation:
        """What the guide compares with, in units of the noise."""
        sigma_y = self.sigma_y
        if not self.coarse and not self.widened:
            return Observation("image", self.y, Identity() if self.complete else voxels(self.seen), sigma_y)
        operator = Resample(self.matrices)
        return Observation("image", self.y, masked(operator, self.seen), sigma_y)

    @classmethod
    def of(
        cls,
        plan: Plan,
        scan: Volume,
        observed: Volume | None = None,
        slice_thickness_mm: float | None = None,
        roi_mm: Sequence[tuple[float, float]] | None = None,
    ) -> View:
        """Orient, crop and normalise what was observed; everything else is overwritten first."""
        data, mask = _observed_only(scan, observed)
        require_3d(scan)
        if len(data) != len(plan.channels):
            raise GenMedError(
                f"{scan.path or 'scan'}: has {len(data)} channel(s), but model '{plan.name}' needs "
                f"{len(plan.channels)} ({', '.join(plan.channels)}); give one file per channel."
            )
        _check_thickness(scan, slice_thickness_mm)
        space = Space.fit(scan.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices, roi_mm=roi_mm)
        extent_share = _checked_extent(plan, space, scan)
        fine, seen = space.orient(data), space.orient(mask[None].astype(np.float32))
        if not seen.any():
            raise GenMedError(f"{scan.path or 'scan'}: nothing was observed in the region; check --observed and --roi.")
        intensity = Intensity.fit(fine, seen[0] > 0)
        fine = intensity.normalise(fine) * seen
        scale = [m / o for m, o in zip(space.model.shape, space.oriented, strict=True)]
        coarse_axes = [ratio > COARSE for ratio in scale]
        shape = [o if c else m for o, m, c in zip(space.oriented, space.model.shape, coarse_axes, strict=True)]
        to_y = [resample_matrix(o, n) for o, n in zip(space.oriented, shape, strict=True)]
        weight = apply_matrices(seen, to_y)
        y = apply_matrices(fine, to_y) / np.maximum(weight, 1e-6)
        spacing_y = [mm * m / n for mm, m, n in zip(space.model.spacing_mm, space.model.shape, shape, strict=True)]
        axis = _slice_axis(coarse_axes, spacing_y)
        if slice_thickness_mm is None and axis is not None and space.axes[axis] == 2:  # DICOM stacks along the third
            slice_thickness_mm = scan.slice_thickness_mm
        longest = max(spacing_y)
        share = 1.0 if slice_thickness_mm is None else min(1.0, slice_thickness_mm / longest)
        matrices = [
            slice_profile(m, n, share if mm == longest else 1.0)
            for m, n, mm in zip(space.model.shape, shape, spacing_y, strict=True)
        ]
        visible = torch.from_numpy(weight[0] > 0.01)
        return cls(
            space, intensity, torch.from_numpy(y).float()[None] * visible, visible,
            tuple(torch.from_numpy(m).float() for m in matrices),  # type: ignore[arg-type]
            tuple(coarse_axes), slice_thickness_mm, _room(plan, space), extent_share=extent_share,  # type: ignore[arg-type]
            patch_share=_patch_share(plan, space), thick_slices=plan.thick_slices,
        )  # fmt: skip


def seen_slices(scan: Volume) -> tuple[Volume | None, tuple[str, ...]]:
    """Mask that hides slices without content, as exports put them where slices are missing, and a note that says so.

    Such slices hold one value each, at least `FEWEST_EMPTY` of them along an axis between slices that hold more. A
    value that fills most of those, too, is the scan's own background: nothing is hidden then (None).
    """
    found = []
    for axis in range(3):
        others = tuple({1, 2, 3} - {axis + 1})
        lowest = scan.data.min(axis=others)
        empty = (lowest == scan.data.max(axis=others)).all(axis=0)
        full = np.flatnonzero(~empty)
        between = np.flatnonzero(empty & (np.arange(len(empty)) < full.max(initial=0)))
        between = between[between > full.min(initial=len(empty))]
        if len(between) >= FEWEST_EMPTY:
            value = lowest[:, between[0]].reshape(-1, 1, 1, 1)
            if (scan.data.take(full, axis=axis + 1) == value).all(axis=0).mean() < NATURAL:
                found.append((axis, empty))
    if not found:
        return None, ()
    mask = np.ones(scan.grid.shape, dtype=np.uint8)
    for axis, empty in found:
        mask.swapaxes(0, axis)[empty] = 0
    notes = (
        f"{scan.path or 'scan'}: {empty.sum()} of {len(empty)} slices along array axis {axis} hold a single value and "
        "were taken as unseen; give --observed to decide otherwise"
        for axis, empty in found
    )
    return scan.like(mask), tuple(notes)


def _observed_only(scan: Volume, observed: Volume | None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels with zeros for everything unseen, and the mask."""
    if observed is None:
        check_image(scan)
        return scan.data, np.ones(scan.grid.shape, dtype=bool)
    require_same_grid(scan, observed)
    mask = observed.data[0] != 0
    if not mask.any():
        raise GenMedError(f"{observed.path or 'observed mask'}: observes nothing; mark seen voxels with 1.")
    data = np.where(mask, scan.data, np.zeros((), dtype=scan.data.dtype))
    if not np.isfinite(data).all():
        raise GenMedError(f"{scan.path or 'scan'}: observed voxels are NaN or infinite; mask them out.")
    if constant := [number for number, channel in enumerate(data) if np.ptp(channel[mask]) == 0]:
        where = f" of channel {constant[0]}" if len(data) > 1 else ""
        raise GenMedError(f"{scan.path or 'scan'}: the observed voxels{where} are constant; check --observed.")
    return data, mask


def _check_thickness(scan: Volume, slice_thickness_mm: float | None) -> None:
    """Slices that overlap are no averages of voxels of their own: the operator could not honour them."""
    longest = max(scan.spacing_mm)
    if slice_thickness_mm is not None and ROUNDING * longest < slice_thickness_mm < math.inf:
        raise GenMedError(
            f"{scan.path or 'scan'}: a slice thickness of {slice_thickness_mm:g} mm is more than the {longest:g} mm of "
            "the longest voxel side; --slice-thickness is for slices with gaps between them, leave it out."
        )


def _checked_extent(plan: Plan, space: Space, scan: Volume) -> float:
    """Least share of the training's field of view that an axis covers; an error where no axis can be believed."""
    size = [n * s for n, s in zip(space.model.shape, space.model.spacing_mm, strict=True)]
    shares = [mm / seen for mm, seen in zip(size, plan.extent_mm, strict=True)]
    if max(shares) <= LARGEST_EXTENT and max(shares) >= SMALLEST_EXTENT:
        return min(shares)
    covered, trained = (" × ".join(f"{round(mm, 1):g}" for mm in box) for box in (size, plan.extent_mm))
    spacing = " × ".join(f"{mm:.3g}" for mm in scan.spacing_mm)
    advice = "give --roi with a box of that size around the structure" if max(shares) > 1 else "give more of the scan"
    raise GenMedError(
        f"{scan.path or 'scan'}: covers {covered} mm, but model '{plan.name}' was trained on crops of at most "
        f"{trained} mm; {advice}, or repair the header if its voxels of {spacing} mm are wrong."
    )


def _piecewise(
    x: Float[Tensor, " n"], knots: Float[Tensor, " k"], values: Float[Tensor, " k"]
) -> Float[Tensor, " n"]:
    """Linear interpolation between knots, in increasing order, with the slopes of the ends beyond them.

    An end whose knots agree (a background of one value) has the slope of the whole instead, not that of a step.
    """
    knots = knots + 1e-6 * torch.arange(len(knots))  # of a flat histogram, too
    left = torch.searchsorted(knots, x).clamp(1, len(knots) - 1) - 1
    slope = values.diff() / knots.diff()
    whole = (values[-1] - values[0]) / (knots[-1] - knots[0])
    first, last = torch.where(knots.diff() > LEAST_STEP, slope, whole)[[0, -1]]
    beyond = torch.where(x < knots[0], first * (x - knots[0]), last * (x - knots[-1]).clamp(min=0))
    return values[left] + slope[left] * (x.clamp(knots[0], knots[-1]) - knots[left]) + beyond


def _room(plan: Plan, space: Space) -> tuple[int, int, int]:
    """Working voxels that a training patch has more than the scan; none along thick slices, whose number varies."""
    x, y, z = (max(0, patch - n) for patch, n in zip(plan.patch, space.model.shape, strict=True))
    return x, y, 0 if plan.thick_slices else z


def _patch_share(plan: Plan, space: Space) -> float:
    """Share that the scan covers of a training patch or, along axes where that is smaller, of the field of view."""
    trained = zip(plan.patch, plan.spacing_mm, plan.extent_mm, strict=True)
    usual = [min(n, extent / mm) for n, mm, extent in trained]
    x, y, z = (min(1.0, n / most) for n, most in zip(space.model.shape, usual, strict=True))
    return x * y * (1.0 if plan.thick_slices else z)


def _slice_axis(coarse_axes: Sequence[bool], spacing_mm: Sequence[float]) -> int | None:
    *_, second, first = sorted(range(3), key=lambda axis: (coarse_axes[axis], spacing_mm[axis]))
    alone = not coarse_axes[second] or spacing_mm[first] >= SLICE_RATIO * spacing_mm[second]
    return first if coarse_axes[first] and alone else None


def _interpolation(matrix: Tensor) -> Tensor:
    n_y, n_model = matrix.shape
    return torch.from_numpy(resample_matrix(n_y, n_model)).float()


def _fill_hidden(
    y: Float[Tensor, "1 c u v w"], seen: Bool[Tensor, "u v w"], spacing_mm: Sequence[float]
) -> Float[Tensor, "1 c u v w"]:
    if bool(seen.all()):
        return y
    for axis in range(3):
        rows = seen.movedim(axis, 0).flatten(1)
        if bool((rows.all(dim=1) == rows.any(dim=1)).all()):  # whole slices are hidden
            return torch.from_numpy(between_slices(y[0].numpy(), seen.numpy(), 1))[None]
    from scipy.ndimage import distance_transform_edt

    nearest = distance_transform_edt(~seen.numpy(), spacing_mm, return_distances=False, return_indices=True)
    u, v, w = (torch.from_numpy(index).long() for index in nearest)
    return y[:, :, u, v, w]


def between_slices(
    data: Float[np.ndarray, "c x y z"], seen: Bool[np.ndarray, "x y z"], order: int
) -> Float[np.ndarray, "c x y z"]:
    """Fill hidden slices by splines through those in `seen`; constant beyond them."""
    from scipy.interpolate import make_interp_spline

    axis = next(a for a in range(3) if not seen.any(axis=tuple({0, 1, 2} - {a})).all())
    kept = np.flatnonzero(seen.any(axis=tuple({0, 1, 2} - {axis})))
    shown = np.take(data, kept, axis=axis + 1)
    if len(kept) == 1:
        return np.repeat(shown, seen.shape[axis], axis=axis + 1)
    spline = make_interp_spline(kept, shown, k=order, axis=axis + 1)
    return np.asarray(spline(np.clip(np.arange(seen.shape[axis]), kept[0], kept[-1])), dtype=np.float32)


def noise_level(y: Float[Tensor, "1 c u v w"], seen: Bool[Tensor, "u v w"], axes: Sequence[int]) -> float:
    """Standard deviation of the noise of the noisiest channel: what second differences along several axes leave.

    The three-dimensional form of Immerkær (1996), with the median that ignores edges. Differences are taken along
    all `axes` or, where hidden voxels leave too few, along two of them; 0 where that is not possible either.
    """
    for chosen in (axes, *combinations(axes, 2)):
        inner = tuple(slice(1, -1) if axis in chosen else slice(None) for axis in range(3))
        known, differences = seen.clone(), y[0]
        for axis in chosen:
            known = known & known.roll(1, axis) & known.roll(-1, axis)
            differences = 2 * differences - differences.roll(1, axis + 1) - differences.roll(-1, axis + 1)
        known = known[inner]
        if len(chosen) > 1 and int(known.sum()) >= FEWEST_VOXELS:
            size = differences[:, *inner][:, known].abs().median(dim=1).values / 0.6745
            return float(size.amax()) / 6 ** (len(chosen) / 2)
    return 0.0
