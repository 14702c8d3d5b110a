"""Cues drawn by seed from whole shapes, for tables and for peers: planes, missing parts, matter in excess, noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from genmed.cue import Cue, cue_of_labels, cue_of_surface_points
from genmed.errors import GenMedError
from genmed.shape import TRUNCATION, Shape, decode

KINDS = (
    "one plane", "three planes", "five planes", "parallel planes", "free planes", "box missing", "half missing",
    "blobs missing", "redundant", "noisy sdf", "noisy points", "mixture",
)  # fmt: skip
TITLES = {"noisy sdf": "noisy border"}  # of kinds whose name says too much: their distances become a binary map
EDGE = 0.15     # share of the extent at either end of the structure that planes keep away from
BLOB = 0.2      # radius of blobs, over the longest extent
NOISE = 1.5     # voxels: standard deviation of noisy distances and points
SMOOTH = 2.0    # voxels: how smooth the noise of distances is
POINTS = 400    # noisy points
ROOM = (2, 18)  # voxels of emptiness around a shape's cube, on every side as many as are drawn
CUT = (0.35, 0.65)  # of the extent: where a missing half begins


class Drawn(NamedTuple):
    """What a peer is shown: a map, of which only `seen` voxels count, and whether they may be wrong.

    The map is larger than the shape's cube, whose first voxel is at index `first`.
    """

    inside: Bool[np.ndarray, "x y z"]
    seen: Bool[np.ndarray, "x y z"]
    doubtful: bool
    first: tuple[int, int, int]


def draw(distance: Float[np.ndarray, "n n n"], kind: str, seed: int) -> Drawn:
    """One of `KINDS` but noisy points, from a shape's distances in voxels. Raises `GenMedError` for another one.

    The field of view is not the shape's cube, the middle of which would tell where the shape's is.
    """
    room = np.random.default_rng([seed, len(KINDS)]).integers(*ROOM, size=(3, 2))
    x, y, z = room[:, 0].tolist()
    return Drawn(*_draw(np.pad(distance, room, constant_values=TRUNCATION), kind, seed), (x, y, z))


def _draw(distance: Float[np.ndarray, "x y z"], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray, bool]:
    rng = np.random.default_rng([seed, KINDS.index(kind) if kind in KINDS else 0])
    inside = distance < 0
    everything = np.ones_like(inside)
    if kind in ("one plane", "three planes", "five planes", "parallel planes", "free planes"):
        return inside, _planes(inside, kind, rng), False
    if kind in ("box missing", "half missing", "blobs missing"):
        return inside, ~_missing(inside, kind, rng), False
    if kind == "redundant":
        return inside | _blobs(inside, 1, rng), everything, True
    if kind == "noisy sdf":
        return distance + _smooth_noise(inside.shape, rng) < 0, everything, True
    if kind == "mixture":
        noisy = (distance + _smooth_noise(inside.shape, rng) < 0) | _blobs(inside, 1, rng)
        return noisy, ~_missing(inside, "half missing", rng), True
    raise GenMedError(f"cue '{kind}' is unknown; choose one of {', '.join(KINDS)}.")


def draw_cue(shape: Shape, kind: str, seed: int) -> Cue:
    """The cue of a shape in world mm."""
    distance = decode(shape.sdf)
    if kind == "noisy points":
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        vertices = shape.to_mesh().vertices
        points = vertices[rng.integers(len(vertices), size=POINTS)]
        sigma_mm = NOISE * shape.voxel_mm
        return cue_of_surface_points(points + rng.normal(0, sigma_mm, points.shape), sigma_mm)
    inside, seen, doubtful, first = draw(distance, kind, seed)
    affine = shape.grid.affine.copy()
    affine[:3, 3] -= shape.voxel_mm * np.array(first)
    return cue_of_labels(inside, affine, seen, doubtful=doubtful, seed=seed)


def _planes(inside: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Planes that cut the structure, at positions drawn between its ends, not through its middle."""
    seen = np.zeros_like(inside)
    if kind == "free planes":
        place = np.moveaxis(np.indices(inside.shape), 0, -1)
        voxels = np.argwhere(inside)
        for _ in range(3):
            normal = rng.normal(size=3)
            normal /= np.linalg.norm(normal)
            seen |= np.abs((place - voxels[rng.integers(len(voxels))]) @ normal) < 0.5
        return seen
    first = int(rng.integers(3))
    counts = {
        "one plane": {first: 1},
        "three planes": {0: 1, 1: 1, 2: 1},
        "five planes": {0: 1, 1: 1, 2: 1} | {first: 3},
        "parallel planes": {first: 4},
    }[kind]
    for axis, count in counts.items():
        hits = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = int(EDGE * len(hits))
        places = hits[margin : len(hits) - margin]
        for index in rng.choice(places, min(count, len(places)), replace=False).tolist():
            seen[(slice(None),) * axis + (index,)] = True
    return seen


def _missing(inside: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Voxels that are not seen; something of the structure always is."""
    if kind == "blobs missing":
        return _blobs(inside, 3, rng)
    voxels = np.argwhere(inside)
    low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
    if kind == "half missing":
        axis = int(rng.integers(3))
        place = np.indices(inside.shape)[axis]
        middle = low[axis] + rng.uniform(*CUT) * (high[axis] - low[axis])
        return np.asarray(place >= middle if rng.random() < 0.5 else place < middle)
    corner = low + rng.random(3) * (high - low) * 0.4
    end = corner + 0.6 * (high - low)
    place = np.moveaxis(np.indices(inside.shape), 0, -1)
    return np.asarray(((place >= corner) & (place < end)).all(axis=-1))


def _blobs(inside: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Balls around voxels of the structure's surface."""
    from scipy.ndimage import binary_erosion

    rim = np.argwhere(inside & ~binary_erosion(inside))
    voxels = np.argwhere(inside)
    radius = BLOB * float((voxels.max(axis=0) - voxels.min(axis=0) + 1).max())
    place = np.moveaxis(np.indices(inside.shape), 0, -1)
    found = np.zeros_like(inside)
    for _ in range(count):
        found |= np.linalg.norm(place - rim[rng.integers(len(rim))], axis=-1) < radius
    return found


def _smooth_noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.normal(size=shape), SMOOTH)
    return np.asarray(NOISE * noise / noise.std())
