import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genmed.errors import GenMedError
from genmed.mesh import Mesh, surface
from genmed.shape_metrics import (
    chamfer,
    cov,
    mmd,
    one_nna,
    pairwise_chamfer,
    sample_surface,
    to_unit_box,
    uhd,
)

COORDINATES = st.floats(-10, 10).map(lambda x: round(x, 3))
CLOUDS = st.integers(1, 6).flatmap(lambda n: arrays(float, (n, 3), elements=COORDINATES))
SEEDS = st.integers(0, 1000)


def triangles(vertices: list[list[float]], faces: list[list[int]]) -> SimpleNamespace:
    return SimpleNamespace(vertices=np.array(vertices, dtype=float), faces=np.array(faces))


def distance_of_ball(radius: float, size: int = 32) -> np.ndarray:
    """Exact, signed, in voxels: of a ball in the middle of a cube."""
    return np.linalg.norm(np.indices((size,) * 3) - (size - 1) / 2, axis=0) - radius


def ball(radius: float) -> Mesh:
    return surface(distance_of_ball(radius), np.eye(4))


def sphere(n: int, seed: int, radius: float = 0.5) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(n, 3))
    return radius * points / np.linalg.norm(points, axis=1, keepdims=True)


def ellipsoids(count: int, seed: int, shift: float = 0.0) -> list[np.ndarray]:
    """A set of shapes of one distribution, 100 points each."""
    generator = np.random.default_rng(seed)
    return [
        sphere(100, int(s)) * generator.uniform(0.5, 1.5, 3) + shift for s in generator.integers(1 << 30, size=count)
    ]


# The definitions of the papers, one loop for every sum and minimum


def slow_squared(p: np.ndarray, q: np.ndarray) -> float:
    return sum((float(a) - float(b)) ** 2 for a, b in zip(p, q, strict=True))


def slow_chamfer(a: np.ndarray, b: np.ndarray) -> float:
    there = sum(min(slow_squared(p, q) for q in b) for p in a) / len(a)
    return there + sum(min(slow_squared(p, q) for p in a) for q in b) / len(b)


def slow_uhd(part: np.ndarray, whole: np.ndarray) -> float:
    return max(min(math.sqrt(slow_squared(p, q)) for q in whole) for p in part)


def slow_mmd(generated: list[np.ndarray], reference: list[np.ndarray]) -> float:
    return sum(min(slow_chamfer(g, r) for g in generated) for r in reference) / len(reference)


def slow_cov(generated: list[np.ndarray], reference: list[np.ndarray]) -> float:
    matched = set()
    for g in generated:
        distances = [slow_chamfer(g, r) for r in reference]
        matched.add(distances.index(min(distances)))
    return len(matched) / len(reference)


def slow_one_nna(generated: list[np.ndarray], reference: list[np.ndarray]) -> float:
    union = [(shape, True) for shape in generated] + [(shape, False) for shape in reference]
    correct = 0
    for number, (shape, is_generated) in enumerate(union):
        rest = union[:number] + union[number + 1 :]
        nearest = min(rest, key=lambda other: slow_chamfer(shape, other[0]))
        correct += nearest[1] == is_generated
    return correct / len(union)


def accuracy(generated: list[np.ndarray], reference: list[np.ndarray]) -> float:
    between = pairwise_chamfer(generated, reference)
    return one_nna(pairwise_chamfer(generated), between, pairwise_chamfer(reference))


# Points of a surface


def test_points_of_a_ball_lie_on_its_sphere_and_all_round_it() -> None:
    points = sample_surface(ball(10.0), n=4000) - 15.5
    assert points.shape == (4000, 3)
    assert np.abs(np.linalg.norm(points, axis=1) - 10).max() < 0.05
    assert np.abs(points.mean(axis=0)).max() < 4 * 10 / math.sqrt(3 * 4000)
    assert np.square(points).mean(axis=0) == pytest.approx(100 / 3, rel=0.06)


def test_clamped_and_quantised_distances_have_the_same_surface() -> None:
    exact = distance_of_ball(10.0)
    stored = np.round(np.clip(exact, -4, 4) * 127 / 4).astype(np.int8)
    points = sample_surface(surface(stored.astype(np.float32) * 4 / 127, np.eye(4)), n=2000) - 15.5
    assert np.abs(np.linalg.norm(points, axis=1) - 10).max() < 0.1


def test_points_are_in_proportion_to_area_and_inside_their_triangles() -> None:
    mesh = triangles([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [3, 0, 5], [0, 3, 5]], [[0, 1, 2], [3, 4, 5]])
    points = sample_surface(mesh, n=5000)
    small, large = points[points[:, 2] == 0], points[points[:, 2] == 5]
    assert len(small) + len(large) == 5000
    assert len(large) / 5000 == pytest.approx(0.9, abs=0.02)
    for part, side in ((small, 1.0), (large, 3.0)):
        assert part[:, :2].min() >= 0 and part[:, :2].sum(axis=1).max() <= side
        assert part[:, :2].mean(axis=0) == pytest.approx(side / 3, rel=0.1)  # the centroid: even within a triangle


def test_points_repeat_with_the_seed_and_change_with_it() -> None:
    a, b, c = (sample_surface(ball(8.0), 50, seed) for seed in (3, 3, 4))
    assert (a == b).all() and not (a == c).any()
    assert sample_surface(ball(8.0)).shape == (2048, 3)


def test_shapes_without_a_surface_are_refused() -> None:
    line = triangles([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]])
    unknown = triangles([[0, 0, np.nan], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    for mesh in (line, unknown, triangles([[0, 0, 0]], [])):
        with pytest.raises(GenMedError, match="no finite area"):
            sample_surface(mesh)
    with pytest.raises(GenMedError, match="at least 1"):
        sample_surface(ball(8.0), n=0)


def test_the_unit_box_is_that_of_the_reference() -> None:
    reference = np.array([[0, 0, 0], [10, 4, 20]], dtype=float)
    assert to_unit_box(reference, reference).tolist() == [[-0.25, -0.1, -0.5], [0.25, 0.1, 0.5]]
    assert to_unit_box(np.array([[5.0, 2.0, 30.0]]), reference).tolist() == [[0, 0, 1]]
    with pytest.raises(GenMedError, match="single point"):
        to_unit_box(reference, reference[:1])


# Distances of two shapes


def test_chamfer_and_uhd_by_hand() -> None:
    a = np.array([[0, 0, 0], [1, 0, 0]], dtype=float)
    b = np.array([[0, 0, 2], [1, 0, 0], [4, 4, 0]], dtype=float)
    assert chamfer(a, b) == pytest.approx((1 + 0) / 2 + (4 + 0 + 25) / 3)
    assert (uhd(a, b), uhd(b, a)) == (1.0, 5.0)
    assert chamfer(a, a) == uhd(a, a) == 0


@settings(max_examples=60)
@given(a=CLOUDS, b=CLOUDS)
def test_distances_are_the_definitions(a: np.ndarray, b: np.ndarray) -> None:
    assert chamfer(a, b) == pytest.approx(slow_chamfer(a, b), abs=1e-9)
    assert uhd(a, b) == pytest.approx(slow_uhd(a, b), abs=1e-9)


@settings(max_examples=40)
@given(a=CLOUDS, b=CLOUDS, seed=SEEDS)
def test_distances_ignore_order_and_place_and_scale_with_the_units(a: np.ndarray, b: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    turn, shift = np.linalg.qr(generator.normal(size=(3, 3)))[0], generator.normal(size=3)
    moved = [2 * generator.permutation(points) @ turn + shift for points in (a, b)]
    assert chamfer(*moved) == pytest.approx(4 * chamfer(a, b), abs=1e-9)
    assert uhd(*moved) == pytest.approx(2 * uhd(a, b), abs=1e-9)
    assert chamfer(a, b) == pytest.approx(chamfer(b, a))


@given(whole=CLOUDS, count=st.integers(1, 6))
def test_uhd_of_a_part_that_the_whole_contains_is_zero(whole: np.ndarray, count: int) -> None:
    assert uhd(whole[:count], whole) == 0


def test_two_samples_of_a_surface_differ_as_the_theory_says() -> None:
    n = 2048  # nearest of random points of density n / A in the plane: mean squared distance A / (π n)
    assert chamfer(sphere(n, 0), sphere(n, 1)) == pytest.approx(2 * math.pi * 0.5**2 * 4 / (math.pi * n), rel=0.1)


def test_uhd_of_two_samples_of_a_surface_falls_with_the_points_of_the_whole() -> None:
    part = sphere(2048, 0)
    sparse, dense = uhd(part, sphere(2048, 1)), uhd(part, sphere(8192, 1))
    assert sparse == pytest.approx(0.06, abs=0.015) and dense == pytest.approx(0.03, abs=0.01)  # as the docstring says


def test_points_without_a_distance_are_refused() -> None:
    good = np.zeros((2, 3))
    for bad in (np.zeros((0, 3)), np.zeros((4, 2)), np.zeros(3)):
        with pytest.raises(GenMedError, match=r"array \(n, 3\)"):
            chamfer(good, bad)
        with pytest.raises(GenMedError, match=r"array \(n, 3\)"):
            uhd(bad, good)
    with pytest.raises(GenMedError, match="NaN"):
        uhd(good, good * np.nan)


# Sets of shapes


def test_the_matrix_holds_the_distance_of_every_pair() -> None:
    a = [*ellipsoids(3, 0), sphere(40, 0)]  # not all of one size
    b = ellipsoids(2, 1)
    matrix, within = pairwise_chamfer(a, b), pairwise_chamfer(a)
    assert matrix.shape == (4, 2) and within.shape == (4, 4)
    assert matrix == pytest.approx(np.array([[chamfer(p, q) for q in b] for p in a]))
    assert within == pytest.approx(pairwise_chamfer(a, a)) and (np.diag(within) == 0).all()
    assert (within == within.T).all()


def test_scores_of_sets_by_hand() -> None:
    distances = np.array([[1.0, 5.0, 9.0], [2.0, 4.0, 7.0], [8.0, 6.0, 3.0]])
    assert mmd(distances) == pytest.approx((1 + 4 + 3) / 3)
    assert cov(distances) == pytest.approx(2 / 3)  # the second reference shape is nobody's nearest
    own = np.array([[0.0, 1.5, 9.0], [1.5, 0.0, 9.0], [9.0, 9.0, 0.0]])
    # wrong: generated 0 (1.0 < 1.5), generated 2 (3 < 9), all references (1 and 4 and 3 < 9); right: generated 1
    assert one_nna(own, distances, np.full((3, 3), 9.0)) == pytest.approx(1 / 6)
    assert one_nna(own, np.full((3, 3), 9.0), own) == pytest.approx((4 + 2 / 2) / 6)  # ties count half


@settings(max_examples=25)
@given(data=st.data(), n=st.integers(2, 4))
def test_scores_of_sets_are_the_definitions(data: st.DataObject, n: int) -> None:
    def draw() -> list[np.ndarray]:
        generator = np.random.default_rng(data.draw(SEEDS))
        return [generator.normal(size=(generator.integers(1, 5), 3)) for _ in range(n)]

    generated, reference = draw(), draw()
    if generated[0].tolist() == reference[0].tolist():
        return  # one seed for both: nothing but ties
    distances = pairwise_chamfer(generated, reference)
    assert mmd(distances) == pytest.approx(slow_mmd(generated, reference))
    assert cov(distances) == pytest.approx(slow_cov(generated, reference))
    assert accuracy(generated, reference) == pytest.approx(slow_one_nna(generated, reference))


@settings(max_examples=20)
@given(seed=SEEDS)
def test_scores_ignore_the_order_of_shapes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = ellipsoids(6, seed), ellipsoids(6, seed + 5000)
    own, between, other = pairwise_chamfer(a), pairwise_chamfer(a, b), pairwise_chamfer(b)
    p, q = generator.permutation(6), generator.permutation(6)
    shuffled = between[np.ix_(p, q)]
    assert mmd(shuffled) == pytest.approx(mmd(between)) and cov(shuffled) == cov(between)
    assert one_nna(own[np.ix_(p, p)], shuffled, other[np.ix_(q, q)]) == one_nna(own, between, other)
    assert one_nna(own, between, other) == one_nna(other, between.T, own)


def test_sets_of_one_distribution_cannot_be_told_apart_and_far_ones_can() -> None:
    a, b = ellipsoids(60, 0), ellipsoids(60, 1)
    assert accuracy(a, b) == pytest.approx(0.5, abs=0.12)  # 120 shapes: a standard deviation of about 0.05
    assert accuracy(a[:12], ellipsoids(12, 1, shift=5.0)) == 1.0


def test_a_replay_of_the_reference_covers_all_and_is_seen() -> None:
    reference = ellipsoids(12, 0)
    replay = reference[::-1]
    between = pairwise_chamfer(replay, reference)
    assert (mmd(between), cov(between)) == (0.0, 1.0)
    assert accuracy(replay, reference) == 0.0


def test_a_single_shape_over_and_over_covers_one() -> None:
    reference = ellipsoids(10, 0)
    assert cov(pairwise_chamfer([reference[3]] * 10, reference)) == 0.1


def test_sets_without_a_score_are_refused() -> None:
    with pytest.raises(GenMedError, match="without shapes"):
        pairwise_chamfer([], ellipsoids(1, 0))
    with pytest.raises(GenMedError, match="without shapes"):
        pairwise_chamfer(ellipsoids(1, 0), [])
    for bad in (np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.nan)):
        for score in (mmd, cov):
            with pytest.raises(GenMedError, match="matrix without NaN"):
                score(bad)
    two, three = np.ones((2, 2)), np.ones((3, 3))
    for matrices in ((two, np.ones((2, 3)), three), (two, two, three), (np.ones((1, 1)),) * 3):
        with pytest.raises(GenMedError, match="two sets of one size"):
            one_nna(*matrices)
    with pytest.raises(GenMedError, match="matrix without NaN"):
        one_nna(two, two * np.nan, two)
