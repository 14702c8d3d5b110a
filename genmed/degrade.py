"""Make scans worse on purpose, for demonstrations and tables: what is taken away is really gone.

Every generator takes a scan, or what another generator made of one, and returns a `Degraded`; combinations are
compositions, `gaussian_noise(keep_slices(scan, 8, axis=1), 0.2)`. Axes are array axes 0, 1, 2. Ranges, minima and
standard deviations are those of the observed voxels, channel by channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from genmed.errors import GenMedError
from genmed.space import Space, apply_matrices, overlap_matrix
from genmed.volume import Volume, require_same_grid

RANGE = (0.5, 99.5)  # percentiles between which intensities are remapped: one bright vessel must not set the middle
BIAS_ORDER = 3  # total degree of the bias field's polynomial
CURVE_WAVES = 4  # cosines in a random curve; the fastest has two full periods over the intensity range


@dataclass(frozen=True, eq=False)
class Degraded:
    """A degraded scan and what `segment` has to be told of it: `segment(model, d.scan, **d.options)`.

    Voxels where the mask `observed` (1, x, y, z) is 0 are overwritten with zeros here, whatever they held.
    `slice_thickness_mm` is set where slices have gaps between them. Raises `GenMedError` if nothing is left.
    """

    scan: Volume
    observed: Volume | None = None
    slice_thickness_mm: float | None = None

    def __post_init__(self) -> None:
        if self.observed is None:
            return
        require_same_grid(self.scan, self.observed)
        if not self.seen.any():
            raise GenMedError(f"{self.scan.name}: no observed voxel would be left; take less of it away.")
        kept = np.where(self.seen, self.scan.data, np.zeros((), self.scan.data.dtype))
        object.__setattr__(self, "scan", self.scan.like(kept))

    @property
    def seen(self) -> np.ndarray:
        """Which voxels were observed, bool (x, y, z)."""
        if self.observed is None:
            return np.ones(self.scan.grid.shape, dtype=bool)
        return np.asarray(self.observed.data[0] != 0)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `genmed.tasks.segment.segment`."""
        return {"observed": self.observed, "slice_thickness_mm": self.slice_thickness_mm}


Scan = Volume | Degraded


# Resolution -----------------------------------------------------------------------------------------------


def coarser(scan: Scan, mm: float) -> Degraded:
    """Voxels of about `mm` along every axis, averages over the same field of view; axes turned to RAS.

    Axes whose voxels are larger already stay as they are. A voxel is observed if all that it averages was. Raises
    `GenMedError` for voxels larger than the scan, finer than its own, or slices with gaps, whose average has no
    thickness.
    """
    worse = _gapless(scan)
    grid = worse.scan.grid
    _check_positive(mm, "voxels", "mm")
    if any(mm > n * s for n, s in zip(grid.shape, grid.spacing_mm, strict=True)):
        raise GenMedError(f"voxels of {mm:g} mm are larger than the scan; choose smaller ones.")
    if all(round(n * s / mm) > n for n, s in zip(grid.shape, grid.spacing_mm, strict=True)):
        finest_mm = min(grid.spacing_mm)
        raise GenMedError(f"voxels of {mm:g} mm are finer than the scan's; choose at least {finest_mm:g} mm.")
    axes = Space.fit(grid, grid.spacing_mm).axes
    space = Space.fit(grid, [max(mm, grid.spacing_mm[axis]) for axis in axes])
    return _averaged(worse, space.to_model, space.model.affine)


def thicker(scan: Scan, mm: float, axis: int, gap: float = 0.0) -> Degraded:
    """Slices of about `mm` along one axis over the same field of view; each averages the voxels in it.

    `gap` is the share of the new spacing that lies between slices and is not looked at: the header's spacing stays,
    the slice averages the middle of it, and `slice_thickness_mm` says how much. A slice is observed if all that it
    averages was. Raises `GenMedError` for slices thicker than the scan or thinner than its own, or gaps twice.
    """
    worse = _gapless(scan)
    grid = worse.scan.grid
    _check_axis(axis)
    _check_positive(mm, "slices", "mm")
    size, spacing_mm = grid.shape[axis], grid.spacing_mm[axis]
    if mm > size * spacing_mm:
        raise GenMedError(f"slices of {mm:g} mm are thicker than the scan, {size * spacing_mm:g} mm; choose less.")
    count = max(1, round(size * spacing_mm / mm))
    if count > size:
        raise GenMedError(f"slices of {mm:g} mm are thinner than the scan's; choose at least {spacing_mm:g} mm.")
    if not 0 <= gap < 1:
        raise GenMedError(f"gap {gap:g} is no share of the slice spacing; choose 0 to less than 1.")
    ratio = size / count
    if gap and (1 - gap) * ratio < 1 - 1e-9:
        raise GenMedError(
            f"a gap of {gap:g} leaves {(1 - gap) * ratio * spacing_mm:.3g} mm of a slice, less than the scan's own "
            f"{spacing_mm:g} mm; choose at most {1 - 1 / ratio:.3g}."
        )
    matrices = [np.eye(n, dtype=np.float32) for n in grid.shape]
    matrices[axis] = slice_profile(size, count, 1 - gap) if gap else overlap_matrix(size, count)
    step = np.eye(4)
    step[axis, axis], step[axis, 3] = ratio, (ratio - 1) / 2
    averages = _averaged(worse, lambda array: apply_matrices(array, matrices), grid.affine @ step)
    return replace(averages, slice_thickness_mm=(1 - gap) * ratio * spacing_mm if gap else None)


def _gapless(scan: Scan) -> Degraded:
    worse = _degraded(scan)
    if worse.slice_thickness_mm is not None:
        raise GenMedError("slices with gaps between them cannot be averaged again; leave the gaps for the last step.")
    return worse


def _averaged(worse: Degraded, average: Callable[[np.ndarray], np.ndarray], affine: np.ndarray) -> Degraded:
    """Apply averages to the scan and hide every average that looked at something hidden."""
    data = average(worse.scan.data.astype(np.float32))
    observed = None
    if worse.observed is not None:
        hidden = average((~worse.seen[None]).astype(np.float32))
        observed = _moved(worse.observed, (hidden < 1e-6).astype(np.uint8), affine)
    return Degraded(_moved(worse.scan, data, affine), observed)


def slice_profile(size: int, count: int, share: float) -> Float[np.ndarray, "count size"]:
    """Averages of `size` voxels over the middle `share` (more than 0, at most 1) of each of `count` equal lengths."""
    ratio = size / count
    centres = (np.arange(count)[:, None] + 0.5) * ratio
    low, high = centres - ratio * share / 2, centres + ratio * share / 2
    edges = np.arange(size)
    overlap = np.maximum(np.minimum(high, edges + 1) - np.maximum(low, edges), 0)
    overlap[overlap < 1e-6 * share] = 0  # rounding: a slice must not look at a voxel that it only touches
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)


# Missing voxels -------------------------------------------------------------------------------------------


def keep_slices(scan: Scan, count: int, axis: int) -> Degraded:
    """Keep `count` evenly spread slices of an axis; the others are hidden."""
    worse = _degraded(scan)
    _check_axis(axis)
    size = worse.scan.grid.shape[axis]
    if not 1 <= count <= size:
        raise GenMedError(f"cannot keep {count} of {size} slices; choose 1 to {size}.")
    kept = np.zeros(size, dtype=bool)
    kept[np.floor((np.arange(count) + 0.5) * size / count).astype(int)] = True
    return _only(worse, kept, axis)


def missing_block(scan: Scan, share: float, axis: int) -> Degraded:
    """Hide the middle `share` of an axis' slices, at least one; the outermost slices always remain."""
    worse = _degraded(scan)
    _check_axis(axis)
    _check_share(share, "missing block")
    size = worse.scan.grid.shape[axis]
    if size < 3:
        raise GenMedError(f"a scan of {size} slice(s) along axis {axis} has no middle to hide; choose another axis.")
    count = min(max(1, round(share * size)), size - 2)
    start = (size - count) // 2
    kept = np.ones(size, dtype=bool)
    kept[start : start + count] = False
    return _only(worse, kept, axis)


def crop(scan: Scan, share: float, shift: float | tuple[float, float, float] = 0.0) -> Degraded:
    """Cut the field of view to a box of `share` of every axis; its voxels keep their place in the world.

    `shift`, one number or one per axis, moves the box from the centre, 0, as far as the low (-1) or high (1) end.
    """
    worse = _degraded(scan)
    _check_share(share, "cropped field of view")
    grid = worse.scan.grid
    shifts = np.broadcast_to(np.asarray(shift, dtype=float), 3)
    if not (np.abs(shifts) <= 1).all():
        raise GenMedError(f"crop shifted by {shift}: leaves the scan; choose -1 to 1.")
    counts = [max(1, round(share * n)) for n in grid.shape]
    starts = [round((n - c) * (1 + float(s)) / 2) for n, c, s in zip(grid.shape, counts, shifts, strict=True)]
    box = tuple(slice(start, start + count) for start, count in zip(starts, counts, strict=True))
    step = np.eye(4)
    step[:3, 3] = starts

    def cut(volume: Volume) -> Volume:
        return _moved(volume, volume.data[(slice(None), *box)].copy(), grid.affine @ step)

    return Degraded(cut(worse.scan), worse.observed and cut(worse.observed), worse.slice_thickness_mm)


def _only(worse: Degraded, kept: np.ndarray, axis: int) -> Degraded:
    """Hide the slices of an axis where `kept`, bool (n,), is false."""
    shape = [1, 1, 1]
    shape[axis] = len(kept)
    seen = worse.seen & kept.reshape(shape)
    return replace(worse, observed=worse.scan.like(seen.astype(np.uint8)))


# Noise and bias -------------------------------------------------------------------------------------------


def gaussian_noise(scan: Scan, sd: float, seed: int = 0) -> Degraded:
    """Add normal noise; `sd` is a share of the scan's standard deviation of intensity."""
    _check_positive(sd, "noise", "standard deviations")
    generator = _generator(seed, 1)

    def noisy(channel: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.asarray(channel + sd * values.std() * generator.standard_normal(channel.shape))

    return _changed(scan, noisy)


def rician_noise(scan: Scan, sd: float, seed: int = 0) -> Degraded:
    """Magnitude of the signal with complex normal noise, as in magnetic resonance images (Gudbjartsson & Patz 1995).

    `sd`, of the real and of the imaginary part, is a share of the scan's standard deviation of intensity. Signal is
    what lies above the scan's minimum: magnitudes have no sign. Where there is none, noise has the mean
    sd · √(π/2), in bright tissue it is nearly normal (Magnetic Resonance in Medicine 34:910).
    """
    _check_positive(sd, "noise", "standard deviations")
    generator = _generator(seed, 2)

    def noisy(channel: np.ndarray, values: np.ndarray) -> np.ndarray:
        real, imaginary = sd * values.std() * generator.standard_normal((2, *channel.shape))
        floor = values.min()
        return np.asarray(floor + np.hypot(channel - floor + real, imaginary))

    return _changed(scan, noisy)


def bias_field(scan: Scan, strength: float, seed: int = 0) -> Degraded:
    """Multiply what lies above the scan's minimum by a smooth field between exp(-strength) and exp(strength).

    The field is the exponential of a random polynomial over the field of view, the same for all channels: positive,
    and as slow as coils' sensitivities are (Van Leemput et al. 1999, IEEE Transactions on Medical Imaging 18:885).
    Its logarithm is brought to exactly ± `strength`: random coefficients alone would give every seed a different
    strength.
    """
    _check_positive(strength, "bias field", "(logarithm of the largest factor)")
    worse = _degraded(scan)
    field = np.exp(strength * _polynomial(worse.scan.grid.shape, _generator(seed, 3)))

    def shaded(channel: np.ndarray, values: np.ndarray) -> np.ndarray:
        floor = values.min()
        return np.asarray(floor + (channel - floor) * field)

    return _changed(worse, shaded)


def _polynomial(shape: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """(x, y, z) polynomial of degree `BIAS_ORDER` with normal coefficients, brought to the range -1 to 1."""
    powers = [np.linspace(-1, 1, n)[None] ** np.arange(BIAS_ORDER + 1)[:, None] for n in shape]
    coefficients = np.zeros((BIAS_ORDER + 1,) * 3)
    for index in product(range(BIAS_ORDER + 1), repeat=3):
        if 1 <= sum(index) <= BIAS_ORDER:
            coefficients[index] = generator.standard_normal()
    values = np.einsum("abc,ax,by,cz->xyz", coefficients, *powers, optimize=True)
    low, high = values.min(), values.max()
    return np.asarray((2 * values - low - high) / max(high - low, np.finfo(float).tiny))


# Appearance -----------------------------------------------------------------------------------------------


def inverted(scan: Scan) -> Degraded:
    """Bright becomes dark: maximum and minimum change places. Twice changes nothing."""
    return _changed(scan, lambda channel, values: values.max() + values.min() - channel)


def gamma(scan: Scan, exponent: float) -> Degraded:
    """Power law on the intensity range: above 1 darkens, below 1 brightens the middle."""
    _check_positive(exponent, "gamma", "(exponent)")
    return _remapped(scan, lambda share: share**exponent)


def tent(scan: Scan) -> Degraded:
    """The middle of the intensity range becomes brightest, both ends darkest: no map back exists."""
    return _remapped(scan, lambda share: 1 - np.abs(2 * share - 1))


def curve(scan: Scan, seed: int = 0) -> Degraded:
    """A random smooth lookup of intensities, as a rule not monotone, over the whole range; one per channel.

    A few cosines with normal coefficients, the k-th divided by k so that most are gently bent.
    """
    generator, waves = _generator(seed, 4), np.arange(1, CURVE_WAVES + 1)
    places = np.linspace(0, 1, 1025)

    def looked_up(share: np.ndarray) -> np.ndarray:
        heights = np.cos(np.pi * places[:, None] * waves) @ (generator.standard_normal(CURVE_WAVES) / waves)
        return np.asarray(np.interp(share, places, (heights - heights.min()) / np.ptp(heights)))

    return _remapped(scan, looked_up)


def _remapped(scan: Scan, change: Callable[[np.ndarray], np.ndarray]) -> Degraded:
    """Map the share of the intensity range, 0 to 1, and spread it over the same range; outliers are clipped."""

    def remapped(channel: np.ndarray, values: np.ndarray) -> np.ndarray:
        low, high = np.percentile(values, RANGE)
        if low == high:
            raise GenMedError(f"nearly all observed voxels are {low:g}: there is no intensity range to remap.")
        return np.asarray(low + (high - low) * change(np.clip((channel - low) / (high - low), 0, 1)))

    return _changed(scan, remapped)


# Wrong headers --------------------------------------------------------------------------------------------


def lying_header(scan: Scan, factor: float, axis: int | None = None) -> Degraded:
    """The same voxels under a header that claims `factor` times their spacing, along one axis or all of them.

    The centre of the field of view stays where it is; a slice thickness stays what it was.
    """
    worse = _degraded(scan)
    _check_positive(factor, "spacing", "times the true one")
    scale = np.ones(3)
    if axis is None:
        scale[:] = factor
    else:
        _check_axis(axis)
        scale[axis] = factor
    step = np.diag([*scale, 1.0])
    step[:3, 3] = (1 - scale) * (np.array(worse.scan.grid.shape) - 1) / 2

    def claim(volume: Volume) -> Volume:
        return _moved(volume, volume.data, volume.affine @ step)

    return Degraded(claim(worse.scan), worse.observed and claim(worse.observed), worse.slice_thickness_mm)


# Common parts ---------------------------------------------------------------------------------------------


def _degraded(scan: Scan) -> Degraded:
    return scan if isinstance(scan, Degraded) else Degraded(scan)


def _moved(volume: Volume, data: np.ndarray, affine: np.ndarray) -> Volume:
    """New voxels on a new grid, with the codes and units of the old header."""
    return Volume(data, affine, header=volume.header)


def _changed(scan: Scan, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Degraded:
    """Change intensities channel by channel; `change` gets (x, y, z) and the observed values, both float64."""
    worse = _degraded(scan)
    data = np.empty(worse.scan.data.shape, dtype=np.float32)
    for number, channel in enumerate(worse.scan.data.astype(np.float64)):
        values = channel[worse.seen]
        if values.min() == values.max():
            where = f"{worse.scan.name}: channel {number}"
            raise GenMedError(f"{where} is {values[0]:g} wherever it was observed; give a scan with contrast.")
        data[number] = change(channel, values)
    return replace(worse, scan=worse.scan.like(data))


def _generator(seed: int, kind: int) -> np.random.Generator:
    """Random numbers of one kind of degradation: kinds with equal seeds are independent."""
    if seed < 0:
        raise GenMedError(f"seed {seed} is negative; choose 0 or more.")
    return np.random.default_rng((seed, kind))


def _check_axis(axis: int) -> None:
    if axis not in (0, 1, 2):
        raise GenMedError(f"axis {axis} does not exist; choose 0, 1 or 2.")


def _check_share(share: float, what: str) -> None:
    if not 0 < share < 1:
        raise GenMedError(f"{what} of {share:g} is no share; choose more than 0 and less than 1.")


def _check_positive(value: float, what: str, unit: str) -> None:
    if not 0 < value < np.inf:
        raise GenMedError(f"{what} of {value:g} {unit} makes no sense; choose a positive number.")
