"""Metrics of shapes as points on their surfaces: fidelity of completions, quality and variety of generated sets.

Distances are in whatever units the points have. Tables bring both shapes to the unit box of the true one first
(`to_unit_box`) and show Chamfer distance × 100, in hundredths of its longest side squared, and UHD × 100, in per cent
of that side. Papers normalise in their own ways, so figures of different tables compare only if this is the same.

Points are samples, and samples of one and the same surface differ: with n points on a surface of area A the Chamfer
distance of two samples is about 2 A / (π n), not 0. State n beside the figures (2,048 here, as PointFlow has it).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

from genmed.errors import GenMedError
from genmed.mesh import Triangles

POINTS = 2048  # of a surface, as in PointFlow (Yang et al., arXiv 1906.12320)
DENSE_POINTS = 8192  # of either surface for UHD, which the gaps between points add to
LEAF = 32  # points in a leaf of the search tree; the fastest for 2,048 points

Points = Float[np.ndarray, "n 3"]


def sample_surface(surface: Triangles, n: int = POINTS, seed: int = 0) -> Points:
    """Points drawn evenly by area from a mesh, in its units. Raises `GenMedError` for a mesh without area."""
    if n < 1:
        raise GenMedError(f"{n} points cannot be sampled; ask for at least 1.")
    corners = np.asarray(surface.vertices, dtype=np.float64)[np.asarray(surface.faces, dtype=np.int64).reshape(-1, 3)]
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = np.linalg.norm(np.cross(ab, ac), axis=1)
    if not 0 < area.sum() < np.inf:
        raise GenMedError("the mesh has no finite area, so no points can be sampled; give one with proper triangles.")
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(area), size=n, p=area / area.sum())
    u, v = generator.random((2, n, 1))
    outside = u + v > 1  # the half of the parallelogram that is not the triangle: turn it over
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    return np.asarray(a[drawn] + u * ab[drawn] + v * ac[drawn])


def to_unit_box(points: Points, reference: Float[np.ndarray, "m 3"]) -> Points:
    """`points` in coordinates in which the bounding box of `reference` has its centre at 0 and its longest side is 1.

    For a completion, the reference of all points is the true shape (its vertices, say), so that errors of size and
    position count. Raises `GenMedError` for a reference without extent.
    """
    low, high = _cloud(reference).min(axis=0), _cloud(reference).max(axis=0)
    side = float((high - low).max())
    if side == 0:
        raise GenMedError("the reference shape is a single point and has no unit box; give one with an extent.")
    return (_cloud(points) - (low + high) / 2) / side


def chamfer(a: Float[np.ndarray, "n 3"], b: Float[np.ndarray, "m 3"]) -> float:
    """Chamfer distance: mean squared distance from `a` to the nearest point of `b`, plus that from `b` to `a`.

    In squared units of the points. Achlioptas et al. (arXiv 1707.02392) sum over the points; the mean, which does not
    grow with their number, is what the code of PointFlow (arXiv 1906.12320) and its successors report.
    """
    return float(pairwise_chamfer([a], [b])[0, 0])


def uhd(part: Float[np.ndarray, "n 3"], whole: Float[np.ndarray, "m 3"]) -> float:
    """Unidirectional Hausdorff distance: the largest distance from a point of `part` to its nearest of `whole`.

    How far a completion leaves what was observed, in units of the points and not squared (Wu et al., Multimodal Shape
    Completion, arXiv 2003.07717; of several completions they report the mean). The gaps between the points of `whole`
    are part of it: 0.06 for two samples of 2,048 points of a sphere in the unit box, 0.03 for 8,192 points of the
    whole. State their number beside the figures, too.
    """
    return float(_tree(whole).query(_cloud(part))[0].max())


def pairwise_chamfer(a: Sequence[Points], b: Sequence[Points] | None = None) -> Float[np.ndarray, "a b"]:
    """Chamfer distances between all shapes of two sets, or, without `b`, within one set.

    A few milliseconds a pair of 2,048 points on one core, so minutes for 200 × 200.
    """
    there = _directed(a, a if b is None else b)
    return there + (there if b is None else _directed(b, a)).T


def mmd(distances: Float[np.ndarray, "generated reference"]) -> float:
    """Minimum matching distance: mean over the reference shapes of the distance to the nearest generated shape.

    Fidelity; less is better (Achlioptas et al., arXiv 1707.02392).
    """
    return float(_distances(distances).min(axis=0).mean())


def cov(distances: Float[np.ndarray, "generated reference"]) -> float:
    """Coverage: the share of reference shapes that are the nearest one of some generated shape.

    Variety; more is better (Achlioptas et al., arXiv 1707.02392). At most generated / reference, so both
    sets should be of one size. A set drawn from the same distribution reaches far less than 1, a replay of the
    reference reaches 1.
    """
    distances = _distances(distances)
    return len(np.unique(distances.argmin(axis=1))) / distances.shape[1]


def one_nna(
    generated: Float[np.ndarray, "n n"], between: Float[np.ndarray, "n n"], reference: Float[np.ndarray, "n n"]
) -> float:
    """1-nearest-neighbour accuracy: how well each shape's nearest neighbour tells generated and reference shapes apart.

    Leave-one-out over the union of both sets (Lopez-Paz and Oquab, arXiv 1610.06545; for shapes PointFlow, arXiv
    1906.12320). 0.5 for sets of one distribution, 1 for sets that never mix, less than 0.5 where generated shapes
    copy reference shapes, 0 for a replay. A neighbour as near in one set as in the other counts half.

    Args:
        generated: distances within the generated set; the diagonal is not used.
        between: distances from generated (rows) to reference shapes.
        reference: distances within the reference set; the diagonal is not used.

    Raises:
        GenMedError: for sets of different size, for which chance is not 0.5, and for sets of one shape.
    """
    if not generated.shape == between.shape == reference.shape == (len(between),) * 2 or len(between) < 2:
        raise GenMedError(
            f"1-NNA needs two sets of one size, at least 2, but the distances are {generated.shape} within the "
            f"generated, {between.shape} between both, {reference.shape} within the reference set."
        )
    between, alone = _distances(between), np.diag(np.full(len(between), np.inf))
    own = np.concatenate([(_distances(within) + alone).min(axis=1) for within in (generated, reference)])
    other = np.concatenate([between.min(axis=1), between.min(axis=0)])
    return float(np.mean(own < other) + np.mean(own == other) / 2)


def _directed(a: Sequence[Points], b: Sequence[Points]) -> Float[np.ndarray, "a b"]:
    """Mean squared distances from the points of each cloud of `a` to the nearest ones of each of `b`."""
    if not len(a) or not len(b):
        raise GenMedError("a set without shapes has no distances; give at least one shape on either side.")
    clouds, trees = [_cloud(points) for points in a], [_tree(points) for points in b]
    return np.array([[np.square(tree.query(cloud)[0]).mean() for tree in trees] for cloud in clouds])


def _tree(points: np.ndarray) -> cKDTree:
    return cKDTree(_cloud(points), leafsize=LEAF)


def _cloud(points: np.ndarray) -> Points:
    """As float64. Raises `GenMedError` for anything but finite points in three dimensions."""
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise GenMedError(f"points of a shape are an array (n, 3), but this one is {points.shape}.")
    if not np.isfinite(points).all():
        raise GenMedError("points with NaN or infinite coordinates have no distance; drop them first.")
    return points


def _distances(distances: np.ndarray) -> np.ndarray:
    distances = np.asarray(distances, dtype=np.float64)
    if distances.ndim != 2 or not distances.size or np.isnan(distances).any():
        raise GenMedError(f"distances are a matrix without NaN, but this one is {distances.shape} or holds NaN.")
    return distances
