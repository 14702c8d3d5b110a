"""From the scan's grid to the model's working grid and back, each step with its exact undo.

`Space` orients to the closest canonical axes (RAS), crops and resamples; `Intensity` normalises. Resampling
is three small matrices, one per axis, that act on numpy arrays and torch tensors alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from nibabel.orientations import io_orientation

from .errors import GenMedError
from .volume import Grid, Volume

Array = TypeVar("Array")  # numpy array or torch tensor
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]
BoxMm = Sequence[tuple[float, float]]

SLICE_RATIO = 1.5  # an axis this much coarser than the others is the slice axis
TIE = 1e-6  # scores this close are equal: float32 rounding must not decide between classes
SLAB = 32  # oriented voxels along the first axis that labels_to_input scores at a time


@dataclass(frozen=True, eq=False)
class Space:
    """The way between a scan's grid (`input`) and the working grid (`model`).

    Both cover the same field of view, outer voxel edge to outer voxel edge (with a region of interest, the
    kept part of it). `axes` is the input axis behind every oriented axis, `flips` says which of them run
    backwards, `crop` is the kept range of oriented voxels per axis.
    """

    input: Grid
    model: Grid
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    crop: tuple[tuple[int, int], ...]

    @classmethod
    def fit(
        cls,
        grid: Grid,
        spacing_mm: Sequence[float],
        *,
        slice_axis_last: bool = False,
        roi_mm: BoxMm | None = None,
    ) -> Space:
        """Choose the working grid of about `spacing_mm`, given in the order of the oriented axes.

        With `slice_axis_last` a clearly coarser axis goes last. `roi_mm` is a world box
        ((x0, x1), (y0, y1), (z0, z1)) in RAS millimetres; `GenMedError` if it misses the scan.
        """
        if len(spacing_mm) != 3 or not all(0 < s < np.inf for s in spacing_mm):
            raise GenMedError(f"working spacing {tuple(spacing_mm)} mm; give three positive numbers")
        axes, flips = _canonical(grid, slice_axis_last)
        to_input = _oriented_to_input(grid, axes, flips)
        shape = tuple(grid.shape[a] for a in axes)
        crop = _crop(shape, grid.affine @ to_input, roi_mm)
        kept = tuple(stop - start for start, stop in crop)
        extent_mm = np.array(kept) * np.array(grid.spacing_mm)[list(axes)]
        x, y, z = (max(1, round(e / s)) for e, s in zip(extent_mm, spacing_mm, strict=True))
        start = np.array([start for start, _ in crop], dtype=np.float64)
        affine = grid.affine @ to_input @ _rescale(kept, (x, y, z), start)
        return cls(grid, Grid((x, y, z), affine), axes, flips, crop)

    @property
    def oriented(self) -> tuple[int, int, int]:
        """Shape of the input's voxels after orienting and cropping."""
        x, y, z = (stop - start for start, stop in self.crop)
        return x, y, z

    def orient(self, array: np.ndarray) -> np.ndarray:
        """(..., x, y, z) on the input grid -> oriented, cropped, contiguous; may share its memory."""
        return np.ascontiguousarray(self._view(array))

    def unorient(self, array: np.ndarray, fill: float = 0) -> np.ndarray:
        """Exact inverse of `orient`; voxels outside the crop are `fill`."""
        if tuple(array.shape[-3:]) != self.oriented:
            raise ValueError(f"array of shape {array.shape} is not on the oriented grid {self.oriented}")
        whole = np.empty(array.shape[:-3] + self.input.shape, dtype=array.dtype)
        if self.oriented != tuple(self.input.shape[a] for a in self.axes):
            whole.fill(fill)
        self._view(whole)[...] = array
        return whole

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """Image (c, x, y, z) -> (c, X, Y, Z) float32; may share memory with `array` where nothing changes."""
        return self._resampled(self._view(array), self._to_model_matrices())

    def to_input(self, array: np.ndarray, fill: float = 0) -> np.ndarray:
        """Image (c, X, Y, Z) -> (c, x, y, z) float32 on the scan's grid, `fill` outside a crop."""
        return self.unorient(self._resampled(array, self._to_input_matrices()), fill)

    def labels_to_model(self, labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
        """Label map (x, y, z) -> class index (X, Y, Z): the class that fills most of every voxel.

        `values` are the file's values of class 0, 1, …; a value that is not listed is class 0. Ties go to the
        lower class. Works on one class at a time, within its bounding box.
        """
        from scipy.ndimage import find_objects

        matrices = self._to_model_matrices()
        classes = _class_index(self.orient(labels), values)
        if all(_is_identity(m) for m in matrices):
            return classes
        best = apply_matrices((classes == 0).astype(np.float32), matrices)
        winner = np.zeros(self.model.shape, dtype=classes.dtype)
        for number, box in enumerate(find_objects(classes), start=1):
            if box is not None:
                parts, target = _restrict(matrices, box)
                score = apply_matrices((classes[box] == number).astype(np.float32), parts)
                _keep_better(score, number, best[target], winner[target])
        return winner

    def labels_to_input(self, probabilities: np.ndarray) -> np.ndarray:
        """Class probabilities (C, X, Y, Z) -> most probable class (x, y, z), 0 outside a crop.

        Ties go to the lower class. Holds the scores of one class in one slab at a time, never C volumes.
        """
        first, *others = self._to_input_matrices()
        winner = np.zeros(self.oriented, dtype=np.min_scalar_type(len(probabilities) - 1))
        for start in range(0, len(first), SLAB):
            rows = first[start : start + SLAB]
            used = _nonzero_range(rows, axis=0)
            best = np.full((len(rows), *winner.shape[1:]), -np.inf, dtype=np.float32)
            for number in range(len(probabilities)):
                part = np.asarray(probabilities[number][used], dtype=np.float32)
                score = apply_matrices(part, (rows[:, used], *others))
                _keep_better(score, number, best, winner[start : start + SLAB])
        return self.unorient(winner)

    def _view(self, array: np.ndarray) -> np.ndarray:
        """Oriented and cropped view of the last three axes."""
        if tuple(array.shape[-3:]) != self.input.shape:
            raise ValueError(f"array of shape {array.shape} is not on the input grid {self.input.shape}")
        leading = array.ndim - 3
        turned = array.transpose(*range(leading), *(leading + a for a in self.axes))
        turned = np.flip(turned, tuple(leading + k for k, flip in enumerate(self.flips) if flip))
        x, y, z = (slice(start, stop) for start, stop in self.crop)
        return turned[..., x, y, z]

    def _resampled(self, array: np.ndarray, matrices: Matrices) -> np.ndarray:
        """Channel by channel, so that only one channel is copied at a time."""
        if all(_is_identity(m) for m in matrices):
            return np.ascontiguousarray(array, dtype=np.float32)
        out = np.empty((len(array), *(len(m) for m in matrices)), dtype=np.float32)
        for channel, result in zip(array, out, strict=True):
            result[...] = apply_matrices(np.ascontiguousarray(channel, dtype=np.float32), matrices)
        return out

    def _to_model_matrices(self) -> Matrices:
        x, y, z = (resample_matrix(n, m) for n, m in zip(self.oriented, self.model.shape, strict=True))
        return x, y, z

    def _to_input_matrices(self) -> Matrices:
        x, y, z = (resample_matrix(m, n) for n, m in zip(self.oriented, self.model.shape, strict=True))
        return x, y, z


def overlap_matrix(n_from: int, n_to: int) -> np.ndarray:
    """(n_to, n_from) box average over one extent: weights are overlapped lengths; rows sum to 1."""
    source = np.arange(n_from + 1) * n_to  # voxel edges in units of extent / (n_from * n_to): exact integers
    target = np.arange(n_to + 1)[:, None] * n_from
    overlap = np.minimum(target[1:], source[1:]) - np.maximum(target[:-1], source[:-1])
    return (np.maximum(overlap, 0) / n_from).astype(np.float32)


def linear_matrix(n_from: int, n_to: int) -> np.ndarray:
    """(n_to, n_from) linear interpolation between voxel centres over one extent, constant outside them."""
    position = np.clip((np.arange(n_to) + 0.5) * n_from / n_to - 0.5, 0, n_from - 1)
    below = np.minimum(np.floor(position).astype(int), max(n_from - 2, 0))
    weight = position - below
    matrix = np.zeros((n_to, n_from))
    rows = np.arange(n_to)
    matrix[rows, np.minimum(below + 1, n_from - 1)] = weight
    matrix[rows, below] = 1 - weight
    return matrix.astype(np.float32)


def resample_matrix(n_from: int, n_to: int) -> np.ndarray:
    """(n_to, n_from): linear when finer, overlap when coarser, identity when equal."""
    if n_to == n_from:
        return np.eye(n_from, dtype=np.float32)
    return linear_matrix(n_from, n_to) if n_to > n_from else overlap_matrix(n_from, n_to)


def apply_matrices(array: Array, matrices: Sequence[Any]) -> Array:
    """Apply one matrix (n_to, n_from) to each of the last three axes; numpy or torch (differentiable).

    The axis that shrinks most goes first; identity matrices are skipped.
    """
    axes = sorted(range(3), key=lambda a: len(matrices[a]) / matrices[a].shape[1])
    for axis in axes:
        if not _is_identity(matrices[axis]):
            array = _apply_one(array, matrices[axis], axis)
    return array


def on_grid(volume: Volume, grid: Grid, *, order: int) -> np.ndarray:
    """Values (c, x, y, z) of a volume at the voxel centres of another grid, constant beyond its outermost voxels.

    `order` 0 takes the nearest voxel, in the volume's own type; 1 is linear between voxels, in float32.
    """
    if volume.grid.shape == grid.shape and np.array_equal(volume.affine, grid.affine):
        return volume.data
    from scipy.ndimage import affine_transform

    step = np.linalg.inv(volume.affine) @ grid.affine
    data = volume.data if order == 0 else volume.data.astype(np.float32)
    return np.stack(
        [affine_transform(c, step, output_shape=grid.shape, order=order, mode="nearest") for c in data]
    )


def _apply_one(array: Any, matrix: Any, axis: int) -> Any:
    """Multiply one of the last three axes by `matrix`, as a matrix product without transposed copies."""
    if not isinstance(array, np.ndarray):
        import torch

        matrix = torch.as_tensor(matrix, dtype=array.dtype, device=array.device)
    else:
        array = array if array.dtype.kind == "f" else array.astype(np.float32)
        matrix = np.asarray(matrix, dtype=array.dtype)
    if axis == 2:
        return array @ matrix.T
    if axis == 1:
        return matrix @ array
    *leading, x, y, z = array.shape
    return (matrix @ array.reshape(*leading, x, y * z)).reshape(*leading, len(matrix), y, z)


def _is_identity(matrix: Any) -> bool:
    rows, columns = matrix.shape
    if rows != columns or not bool((matrix.diagonal() == 1).all()):
        return False
    return int((matrix != 0).sum()) == rows


def _canonical(grid: Grid, slice_axis_last: bool) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Input axis and direction behind every oriented axis: closest to R, A, S, optionally slices last."""
    orientation = io_orientation(grid.affine)
    order = [int(np.flatnonzero(orientation[:, 0] == k)[0]) for k in range(3)]
    if slice_axis_last:
        *_, second, first = sorted(range(3), key=lambda a: grid.spacing_mm[a])
        if grid.spacing_mm[first] >= SLICE_RATIO * grid.spacing_mm[second]:
            order.remove(first)
            order.append(first)
    x, y, z = order
    backwards = orientation[:, 1] < 0
    return (x, y, z), (bool(backwards[x]), bool(backwards[y]), bool(backwards[z]))


def _oriented_to_input(grid: Grid, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """(4, 4) matrix from oriented voxel indices to the input's."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for oriented, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        matrix[axis, oriented] = -1 if flip else 1
        matrix[axis, 3] = grid.shape[axis] - 1 if flip else 0
    return matrix


def _rescale(n_from: Sequence[int], n_to: Sequence[int], start: np.ndarray) -> np.ndarray:
    """(4, 4) matrix from model to oriented voxel indices: outer edges coincide, outer centres do not."""
    ratio = np.array(n_from) / np.array(n_to)
    matrix = np.diag([*ratio, 1.0])
    matrix[:3, 3] = start + (ratio - 1) / 2
    return matrix


def _crop(shape: Sequence[int], affine: np.ndarray, roi_mm: BoxMm | None) -> tuple[tuple[int, int], ...]:
    """Oriented voxel ranges that cover a world box, or the whole range."""
    if roi_mm is None:
        return tuple((0, int(n)) for n in shape)
    box = np.array(roi_mm, dtype=np.float64)
    if box.shape != (3, 2) or not np.isfinite(box).all() or not (box[:, 0] < box[:, 1]).all():
        raise GenMedError(f"region of interest {roi_mm}: give (low, high) in mm, low < high, for x, y and z")
    corners = np.stack(np.meshgrid(*box, indexing="ij"), axis=-1).reshape(-1, 3)
    inverse = np.linalg.inv(affine)
    index = corners @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.maximum(np.floor(index.min(axis=0) + 0.5 + 1e-6), 0).astype(int)
    high = np.minimum(np.ceil(index.max(axis=0) + 0.5 - 1e-6), shape).astype(int)
    if (low >= high).any():
        edges = Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine).corners_mm().T
        covered = ", ".join(f"{axis.min():.1f} to {axis.max():.1f}" for axis in edges)
        raise GenMedError(
            f"region of interest {roi_mm} misses the scan; choose within {covered} mm (x, y, z RAS)"
        )
    return tuple((int(a), int(b)) for a, b in zip(low, high, strict=True))


def _class_index(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """File values -> class indices, in the smallest unsigned type; slab by slab to spare memory."""
    order = np.argsort(values)
    known = np.asarray(values)[order]
    classes = np.empty(labels.shape, dtype=np.min_scalar_type(len(values) - 1))
    for source, target in zip(labels, classes, strict=True):
        place = np.minimum(np.searchsorted(known, source), len(known) - 1)
        target[...] = np.where(known[place] == source, order[place], 0)
    return classes


def _nonzero_range(matrix: np.ndarray, axis: int) -> slice:
    """Range of rows or columns that are not all zero."""
    used = np.flatnonzero(matrix.any(axis=axis))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


def _restrict(matrices: Matrices, box: Sequence[slice]) -> tuple[list[np.ndarray], tuple[slice, ...]]:
    """The blocks of `matrices` that a box of source voxels touches, and where they land."""
    columns = [m[:, s] for m, s in zip(matrices, box, strict=True)]
    target = tuple(_nonzero_range(c, axis=1) for c in columns)
    return [c[t] for c, t in zip(columns, target, strict=True)], target


def _keep_better(score: np.ndarray, number: int, best: np.ndarray, winner: np.ndarray) -> None:
    """Where `score` beats `best`, write it and the class number, in place."""
    better = score > best + TIE
    np.copyto(best, score, where=better)
    winner[better] = number


@dataclass(frozen=True)
class Intensity:
    """Per channel: normalised = (value - center) / scale."""

    center: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def fit(cls, data: np.ndarray, observed: np.ndarray | None = None) -> Intensity:
        """Robust z-score of an image (c, x, y, z), its values clipped to the 0.5 and 99.5 percentiles.

        Only finite voxels count, and only those where `observed`, (x, y, z) or (c, x, y, z), is true.
        """
        mask = None if observed is None else np.broadcast_to(np.asarray(observed, dtype=bool), data.shape)
        moments = [_robust_moments(c, None if mask is None else mask[i]) for i, c in enumerate(data)]
        return cls(tuple(m for m, _ in moments), tuple(s for _, s in moments))

    def normalise(self, data: Array) -> Array:
        """(..., c, x, y, z) image values -> zero mean, unit variance; float32, or the torch tensor's type."""
        center, scale = self._columns(data)
        normalised = _floating(data) - center
        normalised /= scale
        return normalised

    def restore(self, data: Array) -> Array:
        """Inverse of `normalise`."""
        center, scale = self._columns(data)
        restored = _floating(data) * scale
        restored += center
        return restored

    def _columns(self, data: Any) -> tuple[Any, Any]:
        """Center and scale as (c, 1, 1, 1) of the data's own kind."""
        if data.shape[-4] != len(self.center):
            raise ValueError(f"{data.shape[-4]} channels, but intensities were fitted to {len(self.center)}")
        columns = np.array([self.center, self.scale], dtype=np.float32)[..., None, None, None]
        if isinstance(data, np.ndarray):
            return columns[0], columns[1]
        center, scale = data.new_tensor(columns)
        return center, scale


def _floating(data: Any) -> Any:
    return data.astype(np.float32, copy=False) if isinstance(data, np.ndarray) else data


def _robust_moments(channel: np.ndarray, observed: np.ndarray | None) -> tuple[float, float]:
    """Mean and standard deviation after clipping; deviation 1 for a constant channel."""
    values = (channel.ravel() if observed is None else channel[observed]).astype(np.float32)
    values = values[np.isfinite(values)]
    if not len(values):
        raise GenMedError("no observed, finite voxels to normalise; check the image and the observed mask")
    low, high = np.percentile(values, (0.5, 99.5))
    np.clip(values, low, high, out=values)
    center = float(values.mean(dtype=np.float64))
    values -= np.float32(center)
    deviation = float(np.sqrt(np.square(values, out=values).mean(dtype=np.float64)))
    return center, deviation if deviation > 1e-6 * abs(center) else 1.0
