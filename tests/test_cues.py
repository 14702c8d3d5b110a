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
    inside, seen, _, _ = draw(distance, kind, 3)
    again, others = draw(distance, kind, 3), [draw(distance, kind, seed) for seed in range(4, 12)]
    assert np.array_equal(inside, again.inside) and np.array_equal(seen, again.seen)
    assert any(inside.shape != o.inside.shape or (inside != o.inside).any() or (seen != o.seen).any() for o in others)
    assert (inside & seen).any()


COUNTS = [("one plane", 1), ("three planes", 3), ("five planes", 5), ("parallel planes", 4)]


@pytest.mark.parametrize(("kind", "count"), COUNTS)
def test_planes_are_as_many_as_they_are_called(kind: str, count: int) -> None:
    for seed in range(5):
        seen = draw(decode(SDF), kind, seed).seen
        whole = sum(seen.all(axis=tuple(a for a in range(3) if a != axis)).sum() for axis in range(3))
        assert whole == count


@pytest.mark.parametrize("kind", DRAWN)
def test_the_field_of_view_does_not_tell_the_middle(kind: str) -> None:
    firsts = np.array([draw(decode(SDF), kind, seed).first for seed in range(20)])
    lasts = np.array([draw(decode(SDF), kind, seed).inside.shape for seed in range(20)]) - firsts - len(SDF)
    assert (firsts - lasts).std(axis=0).min() > 3


def test_a_cue_lies_where_the_shape_does() -> None:
    for kind in ("three planes", "half missing"):
        cue = draw_cue(SHAPE, kind, 1)
        index = np.rint((cue.points_mm - SHAPE.origin_mm) / VOXEL_MM).astype(int)
        held = ((index >= 0) & (index < len(SDF))).all(axis=1)
        distance = decode(SDF)[tuple(index[held].T)]
        assert (distance[cue.upper_mm[held] <= 0] < 0).all() and (distance[cue.lower_mm[held] > 0] > 0).all()


def test_less_or_more_than_half_is_missing() -> None:
    inside = decode(SDF) < 0
    shares = []
    for seed in range(20):
        found = draw(decode(SDF), "half missing", seed)
        shares.append((found.inside & found.seen).sum() / inside.sum())
    assert 0.2 < min(shares) < 0.4 and 0.6 < max(shares) < 0.8


def test_only_what_may_be_wrong_is_doubtful() -> None:
    for kind in DRAWN:
        inside, seen, doubtful, first = draw(decode(SDF), kind, 0)
        after = np.subtract(inside.shape, first) - len(SDF)
        true = np.pad(decode(SDF) < 0, list(zip(first, after, strict=True)))
        assert doubtful == (not np.array_equal(inside[seen], true[seen])), kind


def test_noisy_points_lie_about_the_surface() -> None:
    cue = draw_cue(SHAPE, "noisy points", 0)
    assert cue.doubtful and cue.voxel_mm == pytest.approx(NOISE * VOXEL_MM)
    centre = np.array(SHAPE.origin_mm) + VOXEL_MM * 15.5
    assert np.linalg.norm(cue.points_mm.mean(axis=0) - centre) < 8


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(GenMedError, match="unknown"):
        draw(decode(SDF), "seven planes", 0)
