"""Cues that tables are made with."""

import numpy as np
import pytest
from tiny_shapes import RADII, ellipsoid

from genmed.bench.cues import KINDS, NOISE, draw, draw_cue
from genmed.errors import GenMedError
from genmed.shape import Shape, decode

SDF, VOXEL_MM = ellipsoid(np.array(RADII["kidney"]) * 60, 32)
SHAPE = Shape(SDF, VOXEL_MM, (-50.0, 20.0, 5.0))
DRAWN = tuple(kind for kind in KINDS if kind != "noisy points")


@pytest.mark.parametrize("kind", DRAWN)
def test_a_cue_is_a_function_of_its_seed_and_shows_something(kind: str) -> None:
    distance = decode(SDF)
    inside, seen, _ = draw(distance, kind, 3)
    again, others = draw(distance, kind, 3), [draw(distance, kind, seed) for seed in range(4, 12)]
    assert np.array_equal(inside, again.inside) and np.array_equal(seen, again.seen)
    assert any((inside != other.inside).any() or (seen != other.seen).any() for other in others)
    assert (inside & seen).any()


@pytest.mark.parametrize(("kind", "count"), [("one plane", 1), ("three planes", 3), ("parallel planes", 4)])
def test_planes_are_as_many_as_they_are_called_at_most(kind: str, count: int) -> None:
    n = len(SDF)
    for seed in range(5):
        seen = draw(decode(SDF), kind, seed).seen
        whole = sum(seen.all(axis=tuple(a for a in range(3) if a != axis)).sum() for axis in range(3))
        assert 1 <= whole <= count and seen.sum() <= whole * n * n


def test_only_what_may_be_wrong_is_doubtful() -> None:
    for kind in DRAWN:
        inside, seen, doubtful = draw(decode(SDF), kind, 0)
        assert doubtful == (not np.array_equal(inside[seen], (decode(SDF) < 0)[seen])), kind


def test_noisy_points_lie_about_the_surface() -> None:
    cue = draw_cue(SHAPE, "noisy points", 0)
    assert cue.doubtful and cue.voxel_mm == pytest.approx(NOISE * VOXEL_MM)
    centre = np.array(SHAPE.origin_mm) + VOXEL_MM * 15.5
    assert np.linalg.norm(cue.points_mm.mean(axis=0) - centre) < 8


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(GenMedError, match="unknown"):
        draw(decode(SDF), "seven planes", 0)
