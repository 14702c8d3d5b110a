"""The cue of a surface that was seen in a mask, and that of points on a surface."""

import numpy as np
import pytest
from test_mesh import ball, together

from genmed.cue import united
from genmed.errors import GenMedError
from genmed.mesh import Mesh
from genmed.tasks.region import cue_of_cloud, cue_of_region, noise_mm
from genmed.volume import Volume

STRAIGHT = np.eye(3)
TURN = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
HOLLOW = together(ball(30.0, detail=4), Mesh(ball(15.0).vertices, ball(15.0).faces[:, ::-1]))


def mask(seen: str, turn: np.ndarray = STRAIGHT, step: float = 2.0, n: int = 50) -> Volume:
    """What of a cube of voxels around the origin is seen, by its world coordinates in mm."""
    affine = np.eye(4)
    affine[:3, :3] = turn * step
    affine[:3, 3] = -affine[:3, :3] @ np.full(3, (n - 1) / 2)
    x, y, z = np.moveaxis(np.moveaxis(np.indices((n, n, n)), 0, -1) @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    return Volume(eval(seen, {"x": x, "y": y, "z": z}).astype(np.uint8)[None], affine)


def true(points: np.ndarray) -> np.ndarray:
    radius = np.linalg.norm(points, axis=1)
    return np.maximum(radius - 30, 15 - radius)


@pytest.mark.parametrize("seen", ["z > 1", "abs(z - 8) < 2.5", "x + y < 5", "(x > 5) | (z > 12)", "x > -99"])
@pytest.mark.parametrize("turn", [STRAIGHT, TURN])
def test_bounds_of_a_region_hold_of_the_whole_surface(seen: str, turn: np.ndarray) -> None:
    given = mask(seen, turn)
    cue, shown = cue_of_region(HOLLOW, given)
    distance = true(cue.points_mm)
    assert (cue.lower_mm - 0.8 <= distance).all() and (distance <= cue.upper_mm + 0.8).all()  # of a polyhedron
    assert (cue.upper_mm <= 0).sum() > 200 and (cue.lower_mm >= 0).sum() > 200
    middles = shown.vertices[shown.faces].mean(axis=1) - given.affine[:3, 3]
    index = np.rint(middles @ np.linalg.inv(given.affine[:3, :3]).T)
    assert given.data[0][tuple(index.astype(int).T)].all()
    assert (cue.box_mm[0] <= shown.vertices.min(axis=0)).all() and (cue.box_mm[1] >= shown.vertices.max(axis=0)).all()


@pytest.mark.parametrize("unseen", ["missing", "a larger body", "turned faces"])
def test_nothing_of_a_surface_outside_its_mask_is_looked_at(unseen: str) -> None:
    given = mask("z > 1")
    heights, draws = HOLLOW.vertices[HOLLOW.faces][:, :, 2], np.random.default_rng(0).random(len(HOLLOW.faces))
    below = (heights < -8).all(axis=1)
    mesh = {
        "missing": Mesh(HOLLOW.vertices, HOLLOW.faces[~below]),
        "a larger body": together(HOLLOW, ball(100.0, (0, 0, -200))),
        "turned faces": Mesh(
            HOLLOW.vertices, np.where((below & (draws < 0.3))[:, None], HOLLOW.faces[:, ::-1], HOLLOW.faces)
        ),
    }[unseen]
    found, expected = cue_of_region(mesh, given)[0], cue_of_region(HOLLOW, given)[0]
    np.testing.assert_allclose(found.points_mm, expected.points_mm)
    np.testing.assert_allclose(found.lower_mm, expected.lower_mm, atol=1e-6)
    np.testing.assert_allclose(found.upper_mm, expected.upper_mm, atol=1e-6)


def test_what_two_cues_say_is_united() -> None:
    cues = cue_of_region(HOLLOW, mask("z > 1"))[0], cue_of_region(HOLLOW, mask("z < -20"))[0]
    both, distance = united(*cues), true(united(*cues).points_mm)
    assert len(both.points_mm) == sum(len(cue.points_mm) for cue in cues)
    assert (both.lower_mm - 0.8 <= distance).all() and (distance <= both.upper_mm + 0.8).all()
    np.testing.assert_allclose(both.box_mm[:, 2], [-30, 30], atol=0.5)


def test_parts_of_a_mask_that_the_surface_does_not_meet_are_empty_or_full() -> None:
    given = mask("(abs(z) < 2) | (abs(z - 36) < 2) | ((abs(z - 22) < 2) & (x**2 + y**2 < 50))")
    cue, _ = cue_of_region(HOLLOW, given)
    empty, full = cue.points_mm[:, 2] > 30, np.abs(cue.points_mm[:, 2] - 22) < 4
    assert empty.any() and (cue.lower_mm[empty] >= 0).all()
    assert full.any() and (cue.upper_mm[full] <= 0).all()
    distance = true(cue.points_mm)
    assert (cue.lower_mm - 0.8 <= distance).all() and (distance <= cue.upper_mm + 0.8).all()


def test_faces_larger_than_voxels_are_cut_and_a_surface_that_looks_inward_is_turned() -> None:
    corners = 20.0 * (np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(-1, 3) * 2 - 1)
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6],
                      [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])  # fmt: skip
    for turned in (faces, faces[:, ::-1]):
        cue, shown = cue_of_region(Mesh(corners, turned), mask("(x > 3) & (abs(y - 5) < 9)"))
        assert shown.vertices[:, 0].min() > 0
        inside = (np.abs(cue.points_mm) < 20).all(axis=1)
        np.testing.assert_array_equal(cue.upper_mm <= 0, inside)


@pytest.mark.parametrize(("seen", "words"), [("x > 999", "mask is empty"), ("z > 40", "do not meet")])
def test_a_mask_that_does_not_meet_the_surface_is_refused(seen: str, words: str) -> None:
    with pytest.raises(GenMedError, match=words) as error:
        cue_of_region(HOLLOW, mask(seen))
    assert "\n" not in str(error.value)


def cloud(count: int, sigma_mm: float, seed: int = 0) -> np.ndarray:
    """Noisy points on an ellipsoid of 60 x 66 x 110 mm."""
    rng = np.random.default_rng(seed)
    way = rng.normal(size=(count, 3))
    return way / np.linalg.norm(way, axis=1, keepdims=True) * [30, 33, 55] + rng.normal(0, sigma_mm, (count, 3))


@pytest.mark.parametrize(("count", "sigma_mm"), [(400, 2.6), (400, 1.0), (5000, 2.6), (5000, 0.5)])
def test_the_noise_of_points_is_told_from_them(count: int, sigma_mm: float) -> None:
    assert noise_mm(cloud(count, sigma_mm)) == pytest.approx(sigma_mm, rel=0.3)


def test_points_become_a_doubtful_cue_on_the_surface() -> None:
    cue, marks = cue_of_cloud(np.repeat(cloud(8000, 2.0), 2, axis=0))
    assert cue.doubtful and len(cue.points_mm) == 6000 and not cue.lower_mm.any() and not cue.upper_mm.any()
    assert marks.is_closed and marks.volume_ml > 0
    with pytest.raises(GenMedError, match="holds 29 different points"):
        cue_of_cloud(np.repeat(cloud(29, 1.0), 3, axis=0))
