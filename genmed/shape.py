"""`Shape`: one structure as a truncated signed distance in a cube of its own, with its place and size in mm.

The cube's axes are R, A and S of the source's world. It is centred on the middle of the structure's bounding box
and `MARGIN` times as wide as the longest extent, so that a model can be trained with jitter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int8

from genmed.errors import GenMedError
from genmed.mesh import Mesh, one_structure, signed_distance, surface, winding_on
from genmed.volume import Grid

TRUNCATION = 4.0  # voxels
STEPS = 127  # of the stored integers from 0 to the truncation
MARGIN = 1.25  # side of the cube over the longest extent
SIZES = (32, 64, 128)
FEWEST_VOXELS = 64
MOST_STEPS = 100  # to neighbours: with more of them a distance transform is faster
THICK = 3  # times the finest spacing: a stack of slices, which often ends where the structure does


@dataclass(frozen=True, eq=False)
class Shape:
    """A structure in its cube.

    `sdf` holds multiples of `TRUNCATION` / `STEPS` voxels, negative inside; `origin_mm` is voxel (0, 0, 0)'s
    centre in the source's RAS mm. A shape that is not `scaled` has no known size: mm are then arbitrary units.
    """

    sdf: Int8[np.ndarray, "n n n"]
    voxel_mm: float
    origin_mm: tuple[float, float, float]
    scaled: bool = True

    @property
    def distance(self) -> Float[np.ndarray, "n n n"]:
        """Truncated signed distance in voxels."""
        return decode(self.sdf)

    @property
    def grid(self) -> Grid:
        """The cube in RAS mm."""
        affine = np.diag([self.voxel_mm] * 3 + [1.0])
        affine[:3, 3] = self.origin_mm
        x, y, z = self.sdf.shape
        return Grid((x, y, z), affine)

    @property
    def volume_ml(self) -> float:
        """Voxels inside, in ml."""
        return float((self.sdf < 0).sum() * self.voxel_mm**3 / 1000)

    def to_mesh(self) -> Mesh:
        """The surface in the source's mm."""
        return surface(self.distance, self.grid.affine)


def encode(distance: Float[np.ndarray, "*n"]) -> Int8[np.ndarray, "*n"]:
    """Signed distance in voxels as integers, clamped to ±`TRUNCATION`; the sign always survives.

    A voxel that is inside by less than half a step becomes -1, not 0: 0 counts as outside.
    """
    steps = np.rint(np.clip(distance, -TRUNCATION, TRUNCATION) * (STEPS / TRUNCATION))
    return np.where(distance < 0, np.minimum(steps, -1), steps).astype(np.int8)


def decode(sdf: Int8[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Integers as signed distance in voxels, float32."""
    return sdf.astype(np.float32) * np.float32(TRUNCATION / STEPS)


def cube(mesh: Mesh, size: int = 64) -> Grid:
    """The grid of size³ voxels that a surface is looked at in."""
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    voxel_mm = MARGIN * float((high - low).max()) / size
    affine = np.diag([voxel_mm] * 3 + [1.0])
    affine[:3, 3] = (low + high) / 2 - voxel_mm * (size - 1) / 2
    return Grid((size, size, size), affine)


def shape_of(mesh: Mesh, size: int = 64) -> Shape:
    """The shape of a closed surface (`genmed.mesh.repair`)."""
    grid = cube(mesh, size)
    voxel_mm = grid.spacing_mm[0]
    distance = signed_distance(mesh, grid, TRUNCATION * voxel_mm) / voxel_mm
    if not (distance < 0).any():
        raise GenMedError(f"the structure is thinner than a voxel of {size}³; use a larger size.")
    x, y, z = grid.affine[:3, 3]
    return Shape(encode(distance), voxel_mm, (float(x), float(y), float(z)))


def surface_of(mask: Bool[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> Mesh:
    """The surface of a binary map, in world mm, half-way between voxels that differ.

    Between slices it runs on the signed distances of both (shape-based interpolation, Raya and Udupa, IEEE TMI 1990),
    so coarse slices do not become steps. At voxel centres nothing changes. Raises `GenMedError` for a structure
    that is empty, tiny or cut off by the border of the array; a stack of thick slices may end with the structure.
    """
    if (count := int(mask.sum())) == 0:
        raise GenMedError("empty: no voxel is labelled.")
    if count < FEWEST_VOXELS:
        raise GenMedError(f"only {count} voxels; at least {FEWEST_VOXELS} make a shape.")
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    finest_mm, coarsest_mm = float(spacing_mm.min()), float(spacing_mm.max())
    box = _bounding_box(mask)
    for side, n, step_mm in zip(box, mask.shape, spacing_mm, strict=True):
        if (side.start == 0 or side.stop == n) and step_mm <= THICK * finest_mm:
            raise GenMedError("cut off: it touches the border of its volume.")
    inside = np.pad(mask[box], 1)
    deep_mm = max(2 * finest_mm, coarsest_mm / 2)  # at most: or the end of a stack would close within its last slice
    outer, inner = (_to_mask(part, spacing_mm, deep_mm) for part in (inside, ~inside))
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [side.start - 1 for side in box]
    return one_structure(surface(outer - inner, moved))[0]


def _to_mask(mask: np.ndarray, spacing_mm: np.ndarray, limit_mm: float) -> np.ndarray:
    """Distance from every voxel to the closest one of the mask, clamped; the few steps below the limit are tried."""
    from scipy.ndimage import distance_transform_edt

    reach = np.ceil(limit_mm / spacing_mm).astype(int)
    steps = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    lengths_mm = np.linalg.norm(steps * spacing_mm, axis=1)
    if (below := lengths_mm < limit_mm).sum() > MOST_STEPS:
        return np.minimum(distance_transform_edt(~mask, sampling=spacing_mm), limit_mm)
    padded = np.pad(mask, [(r, r) for r in reach])
    distance = np.full(mask.shape, limit_mm)
    for number in np.argsort(-lengths_mm, kind="stable"):
        if below[number]:
            place = tuple(slice(r + k, r + k + n) for r, k, n in zip(reach, steps[number], mask.shape, strict=True))
            distance[padded[place]] = lengths_mm[number]
    return distance


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    others = ((1, 2), (0, 2), (0, 1))
    hits = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return tuple(slice(int(hit[0]), int(hit[-1]) + 1) for hit in hits)


@dataclass(frozen=True)
class Measures:
    """What captions speak of. `elongation` and `flatness` are 1 for a ball and grow."""

    volume_ml: float
    extent_mm: float
    elongation: float
    flatness: float


def measure(shape: Shape, mesh: Mesh) -> Measures:
    """Volume and longest extent of the surface; ratios of the standard deviations of the inside along its main axes.

    Where bodies overlap or walls are double, the voxels that lie in several count once.

    With eigenvalues λ₁ ≥ λ₂ ≥ λ₃ of the covariance, elongation is √(λ₁/λ₂) and flatness √(λ₂/λ₃): the
    reciprocals of pyradiomics' elongation, and of its flatness over its elongation.
    """
    points = np.argwhere(shape.sdf < 0).astype(np.float64)
    covariance = np.cov(points, rowvar=False) if len(points) > 1 else np.zeros((3, 3))
    third, second, first = np.sqrt(np.linalg.eigvalsh(covariance + np.eye(3) / 12))  # 1/12: a voxel's own
    depth = np.rint(winding_on(mesh, shape.grid, shape.distance * shape.voxel_mm, shape.sdf < 0))
    again_ml = float(np.maximum(depth - 1, 0).sum()) * shape.voxel_mm**3 / 1000
    return Measures(mesh.volume_ml - again_ml, mesh.extent_mm, float(first / second), float(second / third))
