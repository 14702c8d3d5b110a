"""The cue of a surface of which a mask says where it was seen, and that of points on a surface.

Nothing of a surface outside the mask is looked at. A seen place is inside or outside as the closest seen piece of the
surface says, where all places on the way to it were seen, too.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from genmed.cue import POINTS, ROOM, Cue, cue_of_distances, cue_of_surface_points
from genmed.errors import GenMedError
from genmed.mesh import Mesh, merged, one_way_round, winding
from genmed.volume import Volume

LOOKED = 40_000     # seen places at most of which distances are measured
ON_THE_WAY = 48     # places between one and the surface that must have been seen
FINEST = 256        # of the longest side of the mask: pieces of the surface are not cut smaller
FEWEST_POINTS = 30
PATCH, SPARSE = 20, 400  # points of a patch of surface, and of a cloud: denser patches would be as thick as wide
SHOWN_POINTS = 2000  # on a page


# Masks ----------------------------------------------------------------------------------------------------


def cue_of_region(mesh: Mesh, mask: Volume, *, doubtful: bool = False, seed: int = 0) -> tuple[Cue, Mesh]:
    """The cue of what a mask in world mm (not 0: seen) shows of a surface, and the pieces of the surface in it.

    Emptiness in the mask is a part of it. A part of the mask that the surface does not run through is inside or outside
    as the whole surface says. Raises `GenMedError` where mask and surface do not meet.
    """
    from scipy.ndimage import distance_transform_edt, label

    affine, spacing = mask.affine, np.array(mask.grid.spacing_mm)
    seen = mask.data[0] != 0
    if not seen.any():
        raise GenMedError("the mask is empty: no voxel of it was seen; mark those that were with 1.")
    shown = _shown(mesh, seen, affine, float(spacing.min()))
    low, high = shown.vertices.min(axis=0), shown.vertices.max(axis=0)
    room = ROOM * (high - low).max()
    sides = np.stack([low - room, high + room])
    corners = _index(np.stack(np.meshgrid(*sides.T, indexing="ij"), axis=-1).reshape(-1, 3), affine)
    first = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, seen.shape)
    last = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, seen.shape)
    box = tuple(map(slice, first, last))
    places = np.argwhere(seen[box])
    if len(places) > LOOKED:
        places = places[np.sort(np.random.default_rng(seed).choice(len(places), LOOKED, replace=False))]
    points = (places + first) @ affine[:3, :3].T + affine[:3, 3]
    away, closest, outward = _closest(points, shown)
    inside = ((points - closest) * outward).sum(axis=1) < 0
    known = _in_sight(points, closest, away, seen, affine)
    parts = label(seen[box])[0]
    own = parts[tuple(places.T)]
    middles = seen_at(shown.vertices[shown.faces].mean(axis=1), seen, affine)[1] - first
    apart = ~np.isin(own, parts[tuple(middles.T)])
    names, one, which = np.unique(own[apart], return_index=True, return_inverse=True)
    if len(names):
        inside[apart] = (np.abs(winding(mesh, points[apart][one])) > 0.5)[which.ravel()]
    known |= apart
    unseen = np.asarray(distance_transform_edt(np.pad(seen[box], 1), sampling=spacing))[1:-1, 1:-1, 1:-1]
    least = np.clip(np.minimum(away, unseen[tuple(places.T)] - spacing.min() / 2), 0, None)
    if not (known & inside).any():
        raise GenMedError("the cue is empty: no voxel of the mask lies inside the surface; show a region through it.")
    within = points[known & inside]
    half = np.abs(affine[:3, :3]).sum(axis=1) / 2
    box_mm = np.stack([np.minimum(low, within.min(axis=0) - half), np.maximum(high, within.max(axis=0) + half)])
    cue = cue_of_distances(
        points[known], inside[known], least[known], away[known], box_mm, float(spacing.min()),
        doubtful=doubtful, seed=seed,
    )  # fmt: skip
    return cue, shown


def _shown(mesh: Mesh, seen: Bool[np.ndarray, "x y z"], affine: np.ndarray, finest_mm: float) -> Mesh:
    """The pieces of a surface whose middles lie in seen voxels; faces are cut to about the size of a voxel."""
    mesh = merged(mesh)
    index = np.argwhere(seen)
    low, high = index.min(axis=0), index.max(axis=0)
    step = max(finest_mm, float(np.linalg.norm(affine[:3, :3] @ (high - low))) / FINEST)
    pieces, origin = mesh.vertices[mesh.faces], np.arange(len(mesh.faces))
    small: list[tuple[np.ndarray, np.ndarray]] = []
    while len(pieces):
        at = _index(pieces.reshape(-1, 3), affine).reshape(-1, 3, 3)
        near = ((at.max(axis=1) >= low - 1) & (at.min(axis=1) <= high + 1)).all(axis=1)
        pieces, origin = pieces[near], origin[near]
        fine = (np.linalg.norm(pieces - np.roll(pieces, 1, axis=1), axis=2) <= step).all(axis=1)
        small.append((pieces[fine], origin[fine]))
        pieces, origin = _quartered(pieces[~fine]), np.repeat(origin[~fine], 4)
    pieces, origin = (np.concatenate(part) for part in zip(*small, strict=True))
    kept = seen_at(pieces.mean(axis=1), seen, affine)[0] if len(pieces) else np.zeros(0, bool)
    if not kept.any():
        raise GenMedError("mask and surface do not meet: none of it lies in a seen voxel; give both in the same mm.")
    met, which = np.unique(origin[kept], return_inverse=True)
    turned = (one_way_round(mesh.vertices, mesh.faces[met]) != mesh.faces[met]).any(axis=1)
    if mesh.is_closed and mesh.volume_ml < 0:
        turned = ~turned
    pieces = np.where(turned[which.ravel(), None, None], pieces[kept][:, ::-1], pieces[kept])
    return merged(Mesh(pieces.reshape(-1, 3), np.arange(3 * len(pieces)).reshape(-1, 3)))


def _quartered(pieces: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "4n 3 3"]:
    """Triangles cut at the middles of their sides."""
    a, b, c = pieces.swapaxes(0, 1)
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    corners = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.stack([np.stack(corner, axis=1) for corner in corners], axis=1).reshape(-1, 3, 3)


def _closest(points: np.ndarray, shown: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to a surface, the closest point on it, and the direction that is outward there.

    Directions at corners are means of faces by their angle, whose sign is that of the distance (Bærentzen and Aanæs,
    IEEE TVCG 2005); within faces they are interpolated.
    """
    import point_cloud_utils
    import trimesh

    surface = trimesh.Trimesh(shown.vertices, shown.faces, process=False)
    vertices, faces = np.ascontiguousarray(shown.vertices), np.ascontiguousarray(shown.faces)
    away, face, weights = point_cloud_utils.closest_points_on_mesh(np.ascontiguousarray(points), vertices, faces)
    corners = shown.faces[face]
    closest = (shown.vertices[corners] * weights[..., None]).sum(axis=1)
    return away, closest, (np.asarray(surface.vertex_normals)[corners] * weights[..., None]).sum(axis=1)


def _in_sight(
    points: np.ndarray, closest: np.ndarray, away: np.ndarray, seen: np.ndarray, affine: np.ndarray
) -> Bool[np.ndarray, " n"]:
    """Whether all places between points and the closest ones of the surface were seen, but for the last voxel."""
    voxel = float(np.linalg.norm(affine[:3, :3], axis=0).max())
    share = np.clip(1 - voxel / np.maximum(away, 1e-9), 0, None)
    found = np.ones(len(points), bool)
    for part in np.linspace(0, 1, ON_THE_WAY):
        found &= seen_at(points + (part * share)[:, None] * (closest - points), seen, affine)[0]
    return found


def _index(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


def seen_at(points: np.ndarray, seen: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether points in mm (n, 3) lie in seen voxels (x, y, z), and the numbers of these, of others the closest."""
    index = np.rint(_index(points, affine)).astype(int)
    held = np.clip(index, 0, np.array(seen.shape) - 1)
    return (index == held).all(axis=1) & seen[tuple(held.T)], held


# Points ---------------------------------------------------------------------------------------------------


def cue_of_cloud(points_mm: Float[np.ndarray, "n 3"], *, seed: int = 0) -> tuple[Cue, Mesh]:
    """The cue of noisy points on a surface, of which at most `POINTS` count, and marks to show them by.

    Raises `GenMedError` where there are too few.
    """
    points_mm = np.unique(points_mm, axis=0)
    if len(points_mm) < FEWEST_POINTS:
        raise GenMedError(
            f"holds {len(points_mm)} different points and no triangles; give at least {FEWEST_POINTS} on the surface."
        )
    sigma_mm = noise_mm(points_mm, seed)
    if len(points_mm) > POINTS:
        points_mm = points_mm[np.sort(np.random.default_rng(seed).choice(len(points_mm), POINTS, replace=False))]
    return cue_of_surface_points(points_mm, sigma_mm), _marks(points_mm, seed)


def noise_mm(points_mm: Float[np.ndarray, "n 3"], seed: int = 0) -> float:
    """Standard deviation across the surface: the median of what quadrics through small patches leave."""
    from scipy.spatial import cKDTree

    sparse = points_mm[np.random.default_rng(seed).permutation(len(points_mm))[:SPARSE]]
    patches = sparse[cKDTree(sparse).query(sparse, PATCH)[1]]
    patches = patches - patches.mean(axis=1, keepdims=True)
    local = patches @ np.linalg.svd(patches, full_matrices=False)[2].swapaxes(1, 2)  # the last axis is across
    u, v, w = np.moveaxis(local, 2, 0)
    u, v = (x / np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-9) for x in (u, v))
    quadric = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], axis=2)
    left = w[..., None] - quadric @ (np.linalg.pinv(quadric) @ w[..., None])
    return float(np.sqrt(np.median((left**2).sum(axis=(1, 2)) / (PATCH - quadric.shape[2]))))


def _marks(points_mm: Float[np.ndarray, "n 3"], seed: int) -> Mesh:
    """Small octahedra."""
    points = points_mm[np.random.default_rng(seed).permutation(len(points_mm))[:SHOWN_POINTS]]
    size = 0.008 * float(np.ptp(points_mm, axis=0).max())
    corners = size * np.concatenate([np.eye(3), -np.eye(3)])
    faces = np.array([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]])
    numbers = 6 * np.arange(len(points))[:, None, None] + faces
    return Mesh((points[:, None] + corners).reshape(-1, 3), numbers.reshape(-1, 3))
