"""Shapes of balls, ellipsoids and label maps with known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.ndimage import distance_transform_edt
from test_mesh import ball, together

from genmed.errors import GenMedError
from genmed.mesh import Mesh
from genmed.shape import (
    MARGIN,
    STEPS,
    TRUNCATION,
    _to_mask,
    cube,
    decode,
    encode,
    measure,
    shape_of,
    surface_of,
)


def ellipsoid_mask(radii: tuple[float, float, float], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    half = [int(r / s) + 3 for r, s in zip(radii, spacing_mm, strict=True)]
    axes = [np.arange(-h, h + 1) * s / r for h, s, r in zip(half, spacing_mm, radii, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 < 1


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@given(npst.arrays(np.float64, 50, elements=st.floats(-9, 9)))
def test_stored_distances_keep_sign_and_value(distance: np.ndarray) -> None:
    back = decode(encode(distance))
    np.testing.assert_array_equal(back < 0, distance < 0)
    np.testing.assert_allclose(back, np.clip(distance, -TRUNCATION, TRUNCATION), atol=TRUNCATION / STEPS + 1e-6)


def test_a_ball_has_the_distances_of_a_ball() -> None:
    shape = shape_of(ball(30.0, at=(120.0, -80.0, 5.0)), 32)
    grid = shape.grid
    index = np.stack(np.meshgrid(*[np.arange(32)] * 3, indexing="ij"), axis=-1)
    points = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    exact = (np.linalg.norm(points - [120, -80, 5], axis=-1) - 30) / shape.voxel_mm
    np.testing.assert_allclose(shape.distance, np.clip(exact, -4, 4), atol=0.06)
    assert shape.voxel_mm == pytest.approx(MARGIN * 60 / 32, rel=1e-3)


@settings(max_examples=10)
@given(shift=st.tuples(*[st.floats(-500, 500)] * 3), scale=st.floats(0.2, 4))
def test_place_and_scale_change_the_frame_and_nothing_else(shift: tuple[float, float, float], scale: float) -> None:
    mesh = ball(20.0, detail=2)
    first = shape_of(Mesh(mesh.vertices * [1, 0.6, 0.8], mesh.faces), 32)
    moved = shape_of(Mesh(mesh.vertices * [1, 0.6, 0.8] * scale + shift, mesh.faces), 32)
    assert np.abs(first.sdf.astype(int) - moved.sdf.astype(int)).max() <= 1  # the last bit of a rounded distance
    assert moved.voxel_mm == pytest.approx(first.voxel_mm * scale)
    np.testing.assert_allclose(moved.origin_mm, np.array(first.origin_mm) * scale + shift, atol=1e-6)


def test_the_cube_is_centred_on_the_bounding_box() -> None:
    mesh = ball(10.0, at=(3.0, 4.0, 5.0))
    corners = cube(mesh, 64).corners_mm()
    np.testing.assert_allclose(corners.mean(axis=0), [3, 4, 5], atol=1e-6)
    np.testing.assert_allclose(np.ptp(corners, axis=0), MARGIN * mesh.extent_mm, rtol=1e-6)


def test_meshes_come_back_in_the_sources_millimetres() -> None:
    mesh = ball(30.0, at=(120.0, -80.0, 5.0))
    back = shape_of(mesh, 64).to_mesh()
    np.testing.assert_allclose(np.linalg.norm(back.vertices - [120, -80, 5], axis=1), 30, atol=0.1)


AFFINES = {
    "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "permuted": np.array([[0.0, 0, 1, 5], [1, 0, 0, -7], [0, 1, 0, 9], [0, 0, 0, 1]]),
    "oblique": np.array([[0.8, -0.6, 0, 1], [0.6, 0.8, 0, 2], [0, 0, 1.0, 3], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 0.9, 2.0)])
def test_label_maps_survive_the_round_trip(affine: np.ndarray, spacing_mm: tuple[float, float, float]) -> None:
    from scipy.ndimage import map_coordinates

    mask = ellipsoid_mask((9.0, 7.0, 12.0), spacing_mm)
    affine = affine @ np.diag([*spacing_mm, 1.0])
    mesh = surface_of(mask, affine)
    shape = shape_of(mesh, 64)
    points = np.argwhere(np.ones_like(mask)) @ affine[:3, :3].T + affine[:3, 3]
    index = (points - shape.origin_mm) / shape.voxel_mm
    back = map_coordinates(shape.distance, index.T, order=1, mode="nearest").reshape(mask.shape) < 0
    assert dice(mask, back) > 0.995
    assert mesh.volume_ml == pytest.approx(mask.sum() * np.prod(spacing_mm) / 1000, rel=0.02)


def test_thick_slices_do_not_become_steps() -> None:
    spacing_mm = (1.0, 1.0, 8.0)
    mesh = surface_of(ellipsoid_mask((20.0, 20.0, 40.0), spacing_mm), np.diag([*spacing_mm, 1.0]))
    middle = mesh.vertices[np.abs(mesh.vertices[:, 2] - mesh.vertices[:, 2].mean()) < 24]
    radii = np.linalg.norm(middle[:, :2] - mesh.vertices[:, :2].mean(axis=0), axis=1)
    exact = 20 * np.sqrt(1 - ((middle[:, 2] - mesh.vertices[:, 2].mean()) / 40) ** 2)
    assert np.abs(radii - exact).max() < 1.2  # steps would be off by 3


@settings(max_examples=25)
@given(
    mask=npst.arrays(bool, (6, 7, 5)),
    spacing_mm=st.tuples(*[st.floats(0.4, 6)] * 3),
    limit_mm=st.floats(0.5, 9),
)
def test_clamped_distances_to_a_mask_are_those_of_the_transform(
    mask: np.ndarray, spacing_mm: tuple[float, float, float], limit_mm: float
) -> None:
    mask[0, 0, 0] = True
    exact = np.minimum(distance_transform_edt(~mask, sampling=spacing_mm), limit_mm)
    np.testing.assert_allclose(_to_mask(mask, np.array(spacing_mm), limit_mm), exact, atol=1e-9)


def test_what_is_empty_tiny_or_cut_off_is_refused() -> None:
    mask = np.zeros((12, 12, 12), dtype=bool)
    with pytest.raises(GenMedError, match="empty"):
        surface_of(mask, np.eye(4))
    mask[5:8, 5:8, 5:8] = True
    with pytest.raises(GenMedError, match="only 27 voxels"):
        surface_of(mask, np.eye(4))
    mask[:, 3:9, 3:9] = True
    with pytest.raises(GenMedError, match="cut off"):
        surface_of(mask, np.eye(4))
    assert surface_of(mask, np.diag([5.0, 1, 1, 1])).volume_ml == pytest.approx(12 * 36 * 5 / 1000, rel=0.1)


def test_a_thread_is_too_thin_for_the_grid() -> None:
    mesh = ball(10.0, detail=3)
    with pytest.raises(GenMedError, match="thinner than a voxel"):
        shape_of(Mesh(mesh.vertices * [1e-3, 1e-3, 30], mesh.faces), 32)


def test_measures_of_an_ellipsoid_are_its_ratios() -> None:
    mesh = ball(10.0)
    mesh = Mesh(mesh.vertices * [4.0, 2.0, 1.0], mesh.faces)
    measures = measure(shape_of(mesh, 64), mesh)
    assert measures.volume_ml == pytest.approx(4 / 3 * np.pi * 8, rel=5e-3)
    assert measures.extent_mm == pytest.approx(80, rel=1e-3)
    assert (measures.elongation, measures.flatness) == (pytest.approx(2, rel=0.02), pytest.approx(2, rel=0.02))
    assert measure(shape_of(ball(), 32), ball()).elongation == pytest.approx(1, abs=0.01)


def test_what_lies_in_two_bodies_counts_once() -> None:
    lens_ml = np.pi * (4 * 10 + 8) * (2 * 10 - 8) ** 2 / 12 / 1000  # of balls of 10 mm, 8 mm apart
    two = together(ball(at=(-4, 0, 0)), ball(at=(4, 0, 0)))
    assert measure(shape_of(two, 64), two).volume_ml == pytest.approx(2 * ball().volume_ml - lens_ml, rel=0.01)
    walls = together(ball(), ball(9.8))
    assert measure(shape_of(walls, 64), walls).volume_ml == pytest.approx(ball().volume_ml, rel=0.02)
