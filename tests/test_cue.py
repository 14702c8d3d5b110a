"""Bounds of the signed distance that follow from what was seen."""

import numpy as np
import pytest
from test_mesh import ball
from test_shape import AFFINES

from genmed.cue import cue_of_distance_map, cue_of_labels, cue_of_surface_points, planes_of
from genmed.errors import GenMedError
from genmed.tasks.shapes import cue_of_sections
from genmed.volume import Volume

RADIUS, MIDDLE = 11.0, np.array([16.0, 15.0, 17.0])


def ball_mask(shape: tuple[int, int, int] = (32, 32, 32)) -> np.ndarray:
    return np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - MIDDLE, axis=-1) < RADIUS


def seen_of(kind: str) -> np.ndarray:
    seen = np.zeros((32, 32, 32), bool)
    if kind == "planes":
        seen[14], seen[:, 9], seen[:, :, 20] = True, True, True
    elif kind == "half":
        seen[:, :, :17] = True
    elif kind == "box":
        seen[4:20, 8:30, 2:22] = True
    else:
        seen[:] = True
    return seen


@pytest.mark.parametrize("affine", [np.eye(4), *AFFINES.values()])
@pytest.mark.parametrize("kind", ["planes", "half", "box", "all"])
def test_bounds_hold_the_true_distance(kind: str, affine: np.ndarray) -> None:
    cue = cue_of_labels(ball_mask(), affine, seen_of(kind), points=3000)
    middle = affine[:3, :3] @ MIDDLE + affine[:3, 3]
    distance = np.linalg.norm(cue.points_mm - middle, axis=1) - RADIUS
    assert (cue.lower_mm <= cue.upper_mm).all()
    assert (distance >= cue.lower_mm - 0.9).all() and (distance <= cue.upper_mm + 0.9).all()  # of a voxelised ball
    assert ((cue.lower_mm > -1) & (cue.upper_mm < 1)).sum() > 50  # and it says where the contour is


def test_a_region_seen_in_depth_bounds_from_both_sides() -> None:
    cue = cue_of_labels(ball_mask(), np.eye(4), np.ones((32, 32, 32), bool))
    deep = cue.lower_mm < -5
    assert deep.any() and (cue.upper_mm[deep] < -3).all()


@pytest.mark.parametrize("affine", [np.eye(4), *AFFINES.values()])
@pytest.mark.parametrize("kind", ["half", "all"])
def test_the_border_of_a_map_has_the_true_distances(kind: str, affine: np.ndarray) -> None:
    seen = seen_of(kind)
    border = cue_of_labels(ball_mask(), affine, seen).border
    assert border is not None and len(border.points_mm) > 1000
    middle = affine[:3, :3] @ MIDDLE + affine[:3, 3]
    distance = np.linalg.norm(border.points_mm - middle, axis=1) - RADIUS
    np.testing.assert_allclose(border.distance_mm, distance, atol=0.9)  # of a voxelised ball
    voxel = np.rint((border.points_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    np.testing.assert_array_equal(ball_mask()[tuple(voxel.T)], border.distance_mm < 0)
    assert seen[tuple(voxel.T)].all()


def test_doubt_leaves_a_smooth_border_and_takes_a_rough_one() -> None:
    smooth, rough = ball_mask(), ball_mask() ^ (np.random.default_rng(0).random((32, 32, 32)) < 0.1)
    assert cue_of_labels(smooth, np.eye(4), doubtful=True).border is not None
    assert cue_of_labels(rough, np.eye(4), doubtful=True).border is None
    assert cue_of_labels(rough, np.eye(4)).border is not None


def ball_distance(affine: np.ndarray) -> np.ndarray:
    """Signed distances in mm to a sphere round the world position of `MIDDLE`."""
    index = np.moveaxis(np.indices((32, 32, 32)), 0, -1)
    radius_mm = RADIUS * np.cbrt(abs(np.linalg.det(affine[:3, :3])))
    return np.linalg.norm((index - MIDDLE) @ affine[:3, :3].T, axis=-1) - radius_mm


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([0.5, 0.5, 0.5, 1]), *AFFINES.values()])
@pytest.mark.parametrize("kind", ["planes", "half", "all"])
@pytest.mark.parametrize("cut_mm", [np.inf, 3.0])
def test_given_distances_are_taken_as_they_are_and_as_bounds_where_they_were_cut_off(
    affine: np.ndarray, kind: str, cut_mm: float
) -> None:
    true, seen = ball_distance(affine), seen_of(kind)
    cue = cue_of_distance_map(np.where(seen, true.clip(-cut_mm, cut_mm), np.nan), affine, seen)
    index = np.rint((cue.points_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    distance = true[tuple(index.T)]
    assert seen[tuple(index.T)].all() and len(index) > 1000
    assert (cue.lower_mm <= distance + 1e-4).all() and (distance <= cue.upper_mm + 1e-4).all()
    exact = np.abs(distance) < min(cut_mm, 4.0) - 1e-4
    np.testing.assert_allclose(cue.lower_mm[exact], distance[exact], atol=1e-4)
    np.testing.assert_allclose(cue.upper_mm[exact], distance[exact], atol=1e-4)
    assert cue.border is not None and (np.abs(cue.border.distance_mm) < cut_mm).all()
    box = cue_of_labels(true < 0, affine, seen).box_mm
    np.testing.assert_allclose(cue.box_mm, box)


def test_noise_of_distances_is_told_by_their_slopes() -> None:
    from scipy.ndimage import gaussian_filter

    true, noise = ball_distance(np.eye(4)), np.random.default_rng(0).normal(size=(32, 32, 32))
    smooth = gaussian_filter(noise, 2)
    for noisy in (true + noise, true + 1.5 * smooth / smooth.std()):
        assert cue_of_distance_map(noisy, np.eye(4), doubtful=True).border is None
        assert cue_of_distance_map(noisy, np.eye(4)).border is not None
    assert cue_of_distance_map(true, np.eye(4), doubtful=True).border is not None
    plane = np.zeros((32, 32, 32), bool)
    plane[14] = True
    assert cue_of_distance_map(true, np.eye(4), plane, doubtful=True).border is None  # nothing tells


@pytest.mark.parametrize("scale", [0.1, 0.4, 2.5])
def test_distances_that_are_not_in_mm_are_refused(scale: float) -> None:
    with pytest.raises(GenMedError, match=rf"change by {scale:.2g}.* per mm .* give signed distances in mm"):
        cue_of_distance_map(scale * ball_distance(np.eye(4)), np.eye(4))


def test_distances_of_a_single_slice_are_a_cue() -> None:
    flat = ball_distance(np.eye(4))[:, :, 17:18]
    assert (cue_of_distance_map(flat, np.eye(4)).lower_mm < 0).any()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("end", ["first", "last"])
def test_the_end_of_the_array_is_no_end_of_the_structure(axis: int, end: str) -> None:
    kept = slice(12, None) if end == "first" else slice(None, 20)
    shown = np.ones((32, 32, 32), bool)
    shown.swapaxes(0, axis)[slice(None, 12) if end == "first" else slice(20, None)] = False
    cut = cue_of_labels(ball_mask().swapaxes(0, axis)[kept].swapaxes(0, axis), np.eye(4), points=10**6)
    masked = cue_of_labels(ball_mask(), np.eye(4), shown, points=10**6)
    shift = np.where(np.arange(3) == axis, 12 * (end == "first"), 0)
    of_cut = {tuple(p): bounds for p, *bounds in zip(cut.points_mm + shift, cut.lower_mm, cut.upper_mm, strict=True)}
    both = [(of_cut[tuple(p)], [low, high]) for p, low, high in
            zip(masked.points_mm, masked.lower_mm, masked.upper_mm, strict=True) if low < 0]  # fmt: skip
    assert len(both) > 1000
    np.testing.assert_allclose(*zip(*both, strict=True))


def test_emptiness_up_to_the_end_of_the_array_stays_as_far_as_it_was_seen() -> None:
    around = cue_of_labels(ball_mask(), np.eye(4), points=10**6)
    outside = around.lower_mm > 0
    middle = np.linalg.norm(around.points_mm - MIDDLE, axis=1) - RADIUS
    assert (middle[outside] - around.lower_mm[outside]).max() < 1.5


def test_what_was_not_seen_changes_nothing() -> None:
    seen = seen_of("planes")
    garbage = np.where(seen, ball_mask(), np.random.default_rng(0).random(seen.shape) < 0.5)
    first, second = (cue_of_labels(mask, np.eye(4), seen) for mask in (ball_mask(), garbage))
    for name in set(vars(first)) - {"border"}:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.border is not None and second.border is not None
    np.testing.assert_array_equal(first.border.points_mm, second.border.points_mm)
    np.testing.assert_array_equal(first.border.distance_mm, second.border.distance_mm)


@pytest.mark.parametrize(
    ("affine", "axes"),
    [
        (np.eye(4), (2, 1, 0)),
        (AFFINES["las"], (2, 1, 0)),
        (AFFINES["permuted"], (1, 0, 2)),
        (AFFINES["oblique"], (2, 1, 0)),
    ],
)
def test_planes_lie_along_the_nearest_array_axes(affine: np.ndarray, axes: tuple[int, int, int]) -> None:
    volume = Volume(np.zeros((1, 5, 6, 7), np.uint8), affine)
    for name, axis in zip(("axial", "coronal", "sagittal"), axes, strict=True):
        seen = planes_of(volume, {name: [1, 3]})
        others = tuple(a for a in range(3) if a != axis)
        assert np.flatnonzero(seen.any(axis=others)).tolist() == [1, 3]
        assert seen.sum() == 2 * np.prod([seen.shape[a] for a in others])
        with pytest.raises(GenMedError, match=f"{name}={seen.shape[axis]} is outside"):
            planes_of(volume, {name: [seen.shape[axis]]})


def test_a_plane_that_misses_the_surface_shows_emptiness() -> None:
    mesh = ball(30.0)
    plain, ribbons = cue_of_sections(mesh, {"axial": [0.3]})
    cue, same = cue_of_sections(mesh, {"axial": [0.3, 32.0]})
    above = np.isclose(cue.points_mm[:, 2], 32.0)
    assert above.sum() > 100 and (cue.lower_mm[above] >= 0).all() and not (plain.points_mm[:, 2] > 1).any()
    distance = np.linalg.norm(cue.points_mm, axis=1) - 30
    assert (distance >= cue.lower_mm - 0.8).all() and (distance <= cue.upper_mm + 0.8).all()
    np.testing.assert_allclose(cue.box_mm, plain.box_mm)
    np.testing.assert_array_equal(same.vertices, ribbons.vertices)
    far, _ = cue_of_sections(mesh, {"axial": [0.3, 500.0]})
    np.testing.assert_array_equal(far.points_mm, plain.points_mm)


def test_a_mesh_cut_by_planes_gives_bounds_of_its_distance() -> None:
    mesh = ball(30.0, at=(120.0, -80.0, 5.0))
    cue, _ = cue_of_sections(mesh, {"axial": [10.0], "sagittal": [110.0]})
    distance = np.linalg.norm(cue.points_mm - [120, -80, 5], axis=1) - 30
    assert (distance >= cue.lower_mm - 0.8).all() and (distance <= cue.upper_mm + 0.8).all()
    on_planes = np.isclose(cue.points_mm[:, 2], 10) | np.isclose(cue.points_mm[:, 0], 110)
    assert on_planes.all()


def test_noisy_points_lie_on_the_surface_and_are_not_trusted() -> None:
    rng = np.random.default_rng(0)
    points = ball(30.0).vertices + rng.normal(0, 2.0, ball(30.0).vertices.shape)
    cue = cue_of_surface_points(points, 2.0)
    assert cue.doubtful and not cue.upper_mm.any() and not cue.lower_mm.any()
    np.testing.assert_allclose(cue.box_mm, [[-30] * 3, [30] * 3], atol=4)


def test_cues_without_anything_inside_are_refused() -> None:
    for seen in (np.zeros((32, 32, 32), bool), seen_of("box") & False):
        with pytest.raises(GenMedError, match="cue is empty"):
            cue_of_labels(ball_mask(), np.eye(4), seen)
    with pytest.raises(GenMedError, match="no plane meets"):
        cue_of_sections(ball(30.0), {"axial": [100.0]})
    with pytest.raises(GenMedError, match="no finite points"):
        cue_of_surface_points(np.zeros((0, 3)), 1.0)
