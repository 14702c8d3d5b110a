"""`Cue`: what was seen of a structure, as points in world mm with bounds of the signed distance there.

A label map that was seen in part says, without a model: inside, the surface is no further than the closest voxel that
was seen outside, and no nearer than the closest voxel that is outside or was not seen. Emptiness counts the same way.
Nothing of what was not seen is looked at, its extent and its middle neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from genmed.errors import GenMedError
from genmed.volume import Volume

POINTS = 6000
ROOM = 0.75          # of the longest extent seen: how far around it emptiness is looked at
AXES = {"coronal": 1, "sagittal": 0, "axial": 2}  # world axis that a plane is perpendicular to
RBF_POINTS, SHELL_POINTS = 1500, 150  # of a cue that a spline goes through, and far around them
SIDE_POINTS, AROUND = 800, 0.3  # beside points on a surface; how far around their box, over its sides
LIKELY = 0.4         # of the distance to the other side that was seen: the surface is seldom closer
FLAT = 0.3           # of the longest extent: below it, an axis was not seen
SMOOTH = 0.22        # voxels: smoothing by one moves a border no further in the median, unless noise made it rough
SPECKS = 0.02        # of a map may lie beside its largest piece
NEAR = 4.0           # voxels of a map's border whose distances are kept
SLOPES = (0.5, 2.0)  # mm per mm near the surface: beyond them, distances are in other units, or too noisy
UNEVEN = 0.15        # slopes of given distances are no further from 1 in the median, unless they are noisy
FEWEST_SLOPES = 50   # that this needs


class Border(NamedTuple):
    """Signed distances in mm to the border of a label map, at all voxels near it that were seen, as was all between."""

    points_mm: Float[np.ndarray, "n 3"]
    distance_mm: Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Cue:
    """Bounds lower ≤ d ≤ upper of the signed distance in mm, negative inside, at world points.

    `box_mm` (low, high) holds what was seen inside. `voxel_mm` is how fine the cue is. `doubtful`: some of it may be
    wrong (matter that does not belong, noise), so that no single point is trusted. `border` is that of a map; of
    a doubtful one only where it is smooth, so that noise is no reason to doubt it.
    """

    points_mm: Float[np.ndarray, "n 3"]
    lower_mm: Float[np.ndarray, " n"]
    upper_mm: Float[np.ndarray, " n"]
    box_mm: Float[np.ndarray, "2 3"]
    voxel_mm: float
    doubtful: bool = False
    border: Border | None = None


# Label maps -----------------------------------------------------------------------------------------------


def planes_of(volume: Volume, planes: Mapping[str, Sequence[int]]) -> Bool[np.ndarray, "x y z"]:
    """Voxels of whole planes: axial, coronal and sagittal indices along the array axes nearest S, A and R.

    Raises `GenMedError` for planes outside the array.
    """
    from nibabel.orientations import io_orientation

    world = io_orientation(volume.affine)[:, 0].astype(int).tolist()  # of every array axis
    seen = np.zeros(volume.grid.shape, bool)
    for name, indices in planes.items():
        axis = world.index(AXES[name])
        for index in indices:
            if not 0 <= index < seen.shape[axis]:
                raise GenMedError(
                    f"{volume.name}: {name}={index} is outside; its planes are 0 to {seen.shape[axis] - 1}."
                )
            seen[(slice(None),) * axis + (index,)] = True
    return seen


def cue_of_labels(
    inside: Bool[np.ndarray, "x y z"],
    affine: Float[np.ndarray, "4 4"],
    seen: Bool[np.ndarray, "x y z"] | None = None,
    *,
    doubtful: bool = False,
    points: int = POINTS,
    seed: int = 0,
) -> Cue:
    """The cue of a binary map, of which only `seen` voxels are looked at (None: all).

    Raises `GenMedError` where nothing seen is inside.
    """
    seen = np.ones(inside.shape, bool) if seen is None else seen
    inside = inside & seen
    box_mm, box = _looked_at(inside, affine)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    near, signs, low, high = _bounds(inside[box], seen[box], spacing_mm)
    chosen = _chosen(high, points, np.random.default_rng(seed))
    origin = affine[:3, :3] @ [side.start for side in box] + affine[:3, 3]
    places = near[chosen] @ affine[:3, :3].T + origin
    low, high, signs = low[chosen], high[chosen], signs[chosen]
    lower, upper = np.where(signs < 0, -high, low), np.where(signs < 0, -low, high)
    noisy = doubtful and _noisy(inside[box], seen[box], spacing_mm)
    border = None if noisy else _border(inside[box], seen[box], spacing_mm, affine[:3, :3], origin)
    return Cue(places, lower, upper, box_mm, float(spacing_mm.min()), doubtful, border)


def cue_of_distance_map(
    distance_mm: Float[np.ndarray, "x y z"],
    affine: Float[np.ndarray, "4 4"],
    seen: Bool[np.ndarray, "x y z"] | None = None,
    *,
    doubtful: bool = False,
    points: int = POINTS,
    seed: int = 0,
) -> Cue:
    """The cue of signed distances in mm, negative inside, of which only `seen` voxels are looked at (None: all).

    The largest and the least distance may be where the map was cut off: there, the surface is as far or further. Those
    of a `doubtful` map are noisy where their slopes are not 1; its border is not trusted then. Raises `GenMedError`
    where nothing seen is inside, and where slopes say that the distances are not in mm.
    """
    seen = np.ones(distance_mm.shape, bool) if seen is None else seen
    inside = seen & (distance_mm < 0)
    box_mm, box = _looked_at(inside, affine)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    distance, seen = np.where(seen, distance_mm, np.nan)[box].astype(np.float64), seen[box]
    values = distance[seen]
    cut = (distance <= values.min()) | (distance >= values.max())
    near = seen & ~cut & (np.abs(distance) < NEAR * spacing_mm.min())
    slope = _slopes(distance, spacing_mm)[near]
    slope = slope[np.isfinite(slope)]
    told = len(slope) >= FEWEST_SLOPES
    if told and not SLOPES[0] < np.median(slope) < SLOPES[1]:
        raise GenMedError(
            f"the distances change by {np.median(slope):.2g} per mm near the surface, those in mm by 1: they are in "
            "other units, or too noisy; give signed distances in mm."
        )
    lower = np.where(values > values.min(), values, -1e6)
    upper = np.where(values < values.max(), values, 1e6)
    chosen = _chosen(np.abs(values), points, np.random.default_rng(seed))
    origin = affine[:3, :3] @ [side.start for side in box] + affine[:3, 3]
    noisy = doubtful and not (told and np.median(np.abs(slope - 1)) < UNEVEN)
    border = None if noisy else Border(np.argwhere(near) @ affine[:3, :3].T + origin, distance[near])
    places = np.argwhere(seen)[chosen] @ affine[:3, :3].T + origin
    return Cue(places, lower[chosen], upper[chosen], box_mm, float(spacing_mm.min()), doubtful, border)


def _slopes(distance_mm: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """How fast distances change, in mm per mm: 1, were they exact. NaN where not all neighbours were seen."""
    if min(distance_mm.shape) < 2:
        return np.full(distance_mm.shape, np.nan)
    along = (np.gradient(distance_mm, mm, axis=axis) for axis, mm in enumerate(spacing_mm))
    return np.asarray(np.sqrt(sum(change**2 for change in along)))


def _looked_at(inside: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """The box in world mm of what was seen inside, and the voxels in which a cue looks. Raises where there is none."""
    if not inside.any():
        raise GenMedError("the cue is empty: nothing inside the structure was seen; show a plane or region through it.")
    index = np.argwhere(inside)
    half_mm = np.abs(affine[:3, :3]).sum(axis=1) / 2
    world = index @ affine[:3, :3].T + affine[:3, 3]
    box_mm = np.stack([world.min(axis=0) - half_mm, world.max(axis=0) + half_mm])
    return box_mm, _region(index, np.linalg.norm(affine[:3, :3], axis=0), inside.shape)


def _signed(inside: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Distances to the border of a map in its smallest voxels, at most `NEAR`."""
    from scipy.ndimage import distance_transform_edt

    step = spacing_mm / spacing_mm.min()
    within, beyond = (distance_transform_edt(mask, sampling=step) for mask in (inside, ~inside))
    return np.where(inside, 0.5 - within, beyond - 0.5).clip(-NEAR, NEAR)


def _noisy(inside: np.ndarray, seen: np.ndarray, spacing_mm: np.ndarray) -> bool:
    """Whether a map is in specks, or smoothing by a voxel moves its border far.

    Matter that does not belong leaves the rest of a border as smooth as it was.
    """
    from scipy.ndimage import gaussian_filter, label

    pieces = np.bincount(label(inside)[0].ravel())[1:]
    signed = _signed(inside, spacing_mm)
    moved = np.abs(signed - gaussian_filter(signed, spacing_mm.min() / spacing_mm))
    specks = 1 - pieces.max() / pieces.sum()
    return bool(specks > SPECKS or np.median(moved[seen & (np.abs(signed) < 1)]) > SMOOTH)


def _border(
    inside: np.ndarray, seen: np.ndarray, spacing_mm: np.ndarray, axes_mm: np.ndarray, origin_mm: np.ndarray
) -> Border:
    """The border of a map, as far as nothing unseen is closer."""
    from scipy.ndimage import distance_transform_edt

    signed = _signed(inside, spacing_mm)
    unseen = distance_transform_edt(np.pad(seen, 1), sampling=spacing_mm / spacing_mm.min())[1:-1, 1:-1, 1:-1]
    near = seen & (np.abs(signed) < NEAR) & (np.abs(signed) + 0.5 < unseen)
    return Border(np.argwhere(near) @ axes_mm.T + origin_mm, spacing_mm.min() * signed[near])


def _region(index: np.ndarray, spacing_mm: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """The voxels around what was seen inside, as far as emptiness matters."""
    first, last = index.min(axis=0), index.max(axis=0) + 1
    room = np.ceil(ROOM * ((last - first) * spacing_mm).max() / spacing_mm).astype(int)
    x, y, z = (slice(max(0, int(a - r)), int(min(n, b + r)))
               for a, b, r, n in zip(first, last, room, shape, strict=True))  # fmt: skip
    return x, y, z


def _bounds(
    inside: np.ndarray, seen: np.ndarray, spacing_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices of seen voxels, the side they are on, and between what |d| must lie in mm.

    Where the structure reaches the end of the array it may go on, and what is beyond was not seen.
    """
    from scipy.ndimage import distance_transform_edt

    def distance(mask: np.ndarray) -> np.ndarray:
        """From every voxel to the closest one of the mask."""
        if not mask.any():
            return np.full(mask.shape, 1e6)
        return np.asarray(distance_transform_edt(~mask, sampling=spacing_mm))

    half = spacing_mm.min() / 2
    to_inside, to_outside = distance(inside), distance(seen & ~inside)
    opposite = np.where(inside, to_outside, to_inside)[seen] - half
    unseen = np.pad(~seen, 1)
    for axis, end in product(range(3), (0, -1)):
        unseen.swapaxes(0, axis)[end, 1:-1, 1:-1] = inside.swapaxes(0, axis)[end]
    unseen = distance(unseen)[1:-1, 1:-1, 1:-1][seen] - half
    low = np.clip(np.minimum(opposite, unseen) - half, 0, None)
    return np.argwhere(seen), np.where(inside, -1, 1)[seen], low, np.maximum(opposite, low)


def _chosen(high: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of at most `count` points, denser where the surface is near."""
    if len(high) <= count:
        return np.arange(len(high))
    scale = np.quantile(high, 0.1) + 1e-6
    weights = 1 / (1 + (high / scale) ** 2)
    return np.sort(rng.choice(len(high), count, replace=False, p=weights / weights.sum()))


# Points ---------------------------------------------------------------------------------------------------


def cue_of_points(
    points_mm: Float[np.ndarray, "n 3"],
    inside: Bool[np.ndarray, " n"],
    step_mm: float,
    *,
    doubtful: bool = False,
    count: int = POINTS,
    seed: int = 0,
) -> Cue:
    """The cue of points that are known to be inside or outside, `step_mm` apart where they are dense."""
    from scipy.spatial import cKDTree

    if not inside.any():
        raise GenMedError("the cue is empty: nothing inside the structure was seen; show a plane or region through it.")
    high = np.full(len(points_mm), 1e6)
    if not inside.all():
        high[inside] = cKDTree(points_mm[~inside]).query(points_mm[inside])[0]
        high[~inside] = cKDTree(points_mm[inside]).query(points_mm[~inside])[0]
    high = np.maximum(high - step_mm / 2, 0)
    box_mm = np.stack([points_mm[inside].min(axis=0) - step_mm / 2, points_mm[inside].max(axis=0) + step_mm / 2])
    low = np.zeros_like(high)
    return cue_of_distances(points_mm, inside, low, high, box_mm, step_mm, doubtful=doubtful, count=count, seed=seed)


def cue_of_distances(
    points_mm: Float[np.ndarray, "n 3"],
    inside: Bool[np.ndarray, " n"],
    low_mm: Float[np.ndarray, " n"],
    high_mm: Float[np.ndarray, " n"],
    box_mm: Float[np.ndarray, "2 3"],
    voxel_mm: float,
    *,
    doubtful: bool = False,
    count: int = POINTS,
    seed: int = 0,
) -> Cue:
    """The cue of points that are known to be inside or outside, `low_mm` to `high_mm` from the surface."""
    chosen = _chosen(high_mm, count, np.random.default_rng(seed))
    low, high, inside = low_mm[chosen], high_mm[chosen], inside[chosen]
    lower, upper = np.where(inside, -high, low), np.where(inside, -low, high)
    return Cue(points_mm[chosen], lower, upper, box_mm, voxel_mm, doubtful)


def united(first: Cue, second: Cue) -> Cue:
    """What either of two cues of a structure says."""
    low, high = np.minimum(first.box_mm[0], second.box_mm[0]), np.maximum(first.box_mm[1], second.box_mm[1])
    return Cue(
        np.concatenate([first.points_mm, second.points_mm]),
        np.concatenate([first.lower_mm, second.lower_mm]),
        np.concatenate([first.upper_mm, second.upper_mm]),
        np.stack([low, high]),
        min(first.voxel_mm, second.voxel_mm),
        first.doubtful or second.doubtful,
    )


def cue_of_surface_points(points_mm: Float[np.ndarray, "n 3"], sigma_mm: float) -> Cue:
    """The cue of noisy points on the surface, of this standard deviation: d = 0, and no point is trusted.

    Noise widens the box of the points, by about its deviation on either side.
    """
    if not len(points_mm) or not np.isfinite(points_mm).all():
        raise GenMedError("the cue is empty: there are no finite points; give points on the surface.")
    zero = np.zeros(len(points_mm))
    middle = (points_mm.min(axis=0) + points_mm.max(axis=0)) / 2
    half = np.maximum(np.ptp(points_mm, axis=0) / 2 - sigma_mm, sigma_mm)
    box_mm = np.stack([middle - half, middle + half])
    return Cue(np.asarray(points_mm, float), zero, zero, box_mm, max(sigma_mm, 1e-3), doubtful=True)


# Splines --------------------------------------------------------------------------------------------------


def spline(cue: Cue, seed: int = 0) -> Callable[[Float[np.ndarray, "n 3"]], Float[np.ndarray, " n"]]:
    """Distances in mm at any points.

    As in shape-based interpolation (Raya and Udupa, IEEE TMI 1990), a seen voxel has the signed distance to the
    border that is seen around it. Around the cue lies a shell of emptiness, so that surfaces close. Where all that is
    seen are points of the surface, which do not say where the inside is, it is in the middle.
    """
    from scipy.interpolate import RBFInterpolator

    low, high = cue.box_mm
    middle, half, longest = (low + high) / 2, (high - low) / 2, float((high - low).max())
    flat = half < FLAT * longest / 2  # nothing is known of this axis
    half = np.where(flat, half[~flat].min(), half)
    seen = thinned(cue, RBF_POINTS, seed)
    values = np.where(seen.upper_mm <= 0, seen.lower_mm, seen.upper_mm).clip(-longest, longest)
    anchors, far = _shell(half)
    if not (values < 0).any():
        anchors, far = np.concatenate([anchors, np.zeros((1, 3))]), np.append(far, -half.min())
    places = np.concatenate([seen.points_mm, middle + anchors]) / longest
    doubt = 0.5 * cue.voxel_mm / longest if cue.doubtful else 1e-6
    smoothing = np.append(np.full(len(values), doubt), np.full(len(far), 1e-6))
    fit = RBFInterpolator(places, np.append(values, far) / longest, smoothing=smoothing, kernel="linear")
    return lambda points: np.asarray(fit(points / longest) * longest)


def with_sides(cue: Cue, seed: int = 0) -> Cue:
    """A cue of surface points with bounds around them, on the side that the spline says; any other as it is.

    Of noisy points, the closest one has come nearer by about one standard deviation, at most two. Principal components
    alone have no reason to leave zero anywhere.
    """
    if (cue.lower_mm != 0).any() or (cue.upper_mm != 0).any():
        return cue
    from scipy.spatial import cKDTree

    low, high = cue.box_mm
    drawn = np.random.default_rng(seed).random((SIDE_POINTS, 3))
    points = low + (drawn * (1 + 2 * AROUND) - AROUND) * (high - low)
    away = cKDTree(cue.points_mm).query(points)[0]
    inside = spline(cue, seed)(points) < 0
    clear = away > cue.voxel_mm
    points, away, inside = points[clear], away[clear], inside[clear]
    far = away + 2 * cue.voxel_mm
    return replace(
        cue,
        points_mm=np.concatenate([cue.points_mm, points]),
        lower_mm=np.append(cue.lower_mm, np.where(inside, -far, away)),
        upper_mm=np.append(cue.upper_mm, np.where(inside, -away, far)),
    )


def likely(cue: Cue) -> Cue:
    """Bounds that a structure keeps but for a few points in a hundred, from those that it must keep.

    The surface may come between the planes that were seen as close as it likes to what is inside in all of them, but
    seldom does. Sections through a structure would otherwise be met best by one that hardly encloses anything there.
    """
    longest = float(np.ptp(cue.box_mm, axis=0).max())
    far, near = LIKELY * cue.upper_mm.clip(max=longest), LIKELY * cue.lower_mm.clip(min=-longest)
    inside, outside = (cue.upper_mm <= 0) & (near < 0), (cue.lower_mm >= 0) & (far > 0)
    return replace(
        cue,
        lower_mm=np.where(outside, np.maximum(cue.lower_mm, far), cue.lower_mm),
        upper_mm=np.where(inside, np.minimum(cue.upper_mm, near), cue.upper_mm),
    )


def thinned(cue: Cue, points: int, seed: int) -> Cue:
    """The cue with so many of its points."""
    if len(cue.points_mm) <= points:
        return cue
    chosen = np.sort(np.random.default_rng(seed).choice(len(cue.points_mm), points, replace=False))
    return replace(
        cue, points_mm=cue.points_mm[chosen], lower_mm=cue.lower_mm[chosen], upper_mm=cue.upper_mm[chosen]
    )


def _shell(half: Float[np.ndarray, 3]) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Points evenly on an ellipsoid twice as large as the box, and about their distance to one of its size."""
    number = np.arange(SHELL_POINTS) + 0.5
    height, turn = 1 - 2 * number / SHELL_POINTS, np.pi * (1 + 5**0.5) * number
    flat = np.sqrt(1 - height**2)
    directions = np.stack([flat * np.cos(turn), flat * np.sin(turn), height], axis=1)
    return 2 * half * directions, np.linalg.norm(half * directions, axis=1)
