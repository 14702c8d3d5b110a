"""What `Space` and `Intensity` promise: same place, same field of view, exact undo."""

import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from genmed.errors import GenMedError
from genmed.space import (
    Intensity,
    Space,
    apply_matrices,
    linear_matrix,
    on_grid,
    overlap_matrix,
    resample_matrix,
)
from genmed.volume import Grid, Volume

quick = settings(max_examples=60, deadline=None)
sizes = st.integers(1, 40)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
spacings = st.tuples(*[st.floats(0.3, 8.0)] * 3)
ALL_48 = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]

TURN = np.array([[0, -1.5, 0, 7], [0, 0, 2, -3], [-1, 0, 0, 5], [0, 0, 0, 1.0]])  # axes exchanged and flipped


def turned_affine(
    axes: tuple[int, ...], signs: tuple[int, ...], spacing: tuple[float, ...] = (1.0, 2.0, 3.0)
):
    """Voxel axis k runs along world axis axes[k], in direction signs[k]."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for k in range(3):
        affine[axes[k], k] = signs[k] * spacing[k]
    affine[:3, 3] = (-20.0, 15.0, 40.0)
    return affine


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any rotation or mirroring, spacing and origin; a little shear now and then (tilted gantry)."""
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * draw(spacings)
    if draw(st.booleans()):
        affine[:3, 2] += 0.1 * affine[:3, 1]
    affine[:3, 3] = rng.normal(size=3) * 50
    return affine


def world_mm(grid: Grid) -> np.ndarray:
    """World position (3, x, y, z) of every voxel centre."""
    index = np.indices(grid.shape).reshape(3, -1)
    return (grid.affine[:3, :3] @ index + grid.affine[:3, 3:]).reshape(3, *grid.shape)


def sorted_rows(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(np.round(points, 5).T)]


# --- orientation ---


@pytest.mark.parametrize(("axes", "signs"), ALL_48)
def test_all_48_orientations_come_out_canonical_and_go_back_exactly(
    axes: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    data = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    affine = turned_affine(axes, signs)
    grid = Grid(data.shape[1:], affine)
    spacing = tuple((1.0, 2.0, 3.0)[axes.index(k)] for k in range(3))
    space = Space.fit(grid, spacing)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data[0], affine))
    oriented = space.orient(data)
    assert oriented.flags.c_contiguous
    assert np.array_equal(oriented[0], canonical.get_fdata(dtype=np.float32))
    assert np.array_equal(space.model.affine, canonical.affine)
    assert np.array_equal(space.unorient(oriented), data)
    assert np.array_equal(space.to_input(space.to_model(data)), data)


@quick
@given(affine=affines(), shape=shapes, spacing=spacings, slices_last=st.booleans())
def test_orienting_any_oblique_scan_is_undone_exactly(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...], slices_last: bool
) -> None:
    space = Space.fit(Grid(shape, affine), spacing, slice_axis_last=slices_last)
    data = np.random.default_rng(1).integers(-1000, 1000, size=(2, *shape)).astype(np.int16)
    assert np.array_equal(space.unorient(space.orient(data)), data)
    assert space.unorient(space.orient(data)).dtype == np.int16


@quick
@given(affine=affines(), shape=shapes)
def test_oblique_scans_are_turned_as_nibabel_turns_them(
    affine: np.ndarray, shape: tuple[int, int, int]
) -> None:
    data = np.random.default_rng(1).normal(size=shape)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    grid = Grid(canonical.shape, canonical.affine)
    space = Space.fit(Grid(shape, affine), grid.spacing_mm)
    assert np.array_equal(space.orient(data), canonical.get_fdata())
    assert np.allclose(space.model.affine, canonical.affine)


def test_thick_slices_stay_last_and_the_others_in_canonical_order() -> None:
    coronal = Grid((8, 9, 4), turned_affine((0, 2, 1), (1, -1, 1), (0.8, 0.8, 4.0)))
    space = Space.fit(coronal, (0.8, 0.8, 4.0), slice_axis_last=True)
    assert space.axes == (0, 1, 2) and space.flips == (False, True, False)
    assert np.allclose(space.model.spacing_mm, (0.8, 0.8, 4.0))
    assert Space.fit(coronal, (0.8, 4.0, 0.8)).axes == (0, 2, 1)
    sagittal = Grid((4, 8, 9), turned_affine((0, 1, 2), (1, 1, 1), (5.0, 1.0, 1.0)))
    assert Space.fit(sagittal, (1.0, 1.0, 5.0), slice_axis_last=True).axes == (1, 2, 0)


def test_nearly_cubic_voxels_have_no_slice_axis() -> None:
    grid = Grid((4, 8, 9), np.diag([1.2, 1.0, 1.0, 1.0]))
    assert Space.fit(grid, (1.2, 1.0, 1.0), slice_axis_last=True).axes == (0, 1, 2)


# --- field of view ---


@quick
@given(affine=affines(), shape=shapes, spacing=spacings)
def test_working_grid_covers_the_same_field_of_view_edge_to_edge(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...]
) -> None:
    grid = Grid(shape, affine)
    space = Space.fit(grid, spacing)
    assert np.allclose(sorted_rows(space.model.corners_mm()), sorted_rows(grid.corners_mm()), atol=1e-4)


@quick
@given(affine=affines(), shape=shapes, spacing=spacings)
def test_working_spacing_is_the_nearest_that_fits_the_extent(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...]
) -> None:
    space = Space.fit(Grid(shape, affine), spacing)
    extent = np.array(space.oriented) * np.array(Grid(shape, affine).spacing_mm)[list(space.axes)]
    assert space.model.shape == tuple(max(1, round(e / s)) for e, s in zip(extent, spacing, strict=True))
    assert np.allclose(space.model.spacing_mm, extent / space.model.shape)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, 1), (1, float("nan"), 1), (1, 1, -2)])
def test_impossible_spacing_is_an_error(spacing: tuple[float, ...]) -> None:
    with pytest.raises(GenMedError, match="three positive numbers"):
        Space.fit(Grid((3, 3, 3), np.eye(4)), spacing)


# --- region of interest ---


@quick
@given(affine=affines(), shape=st.tuples(*[st.integers(4, 12)] * 3), seed=st.integers(0, 1000))
def test_region_of_interest_covers_its_box_and_is_undone_exactly(
    affine: np.ndarray, shape: tuple[int, int, int], seed: int
) -> None:
    grid, rng = Grid(shape, affine), np.random.default_rng(seed)
    centre = affine[:3, :3] @ (rng.random(3) * (np.array(shape) - 1)) + affine[:3, 3]
    half = rng.random(3) * 10 + 0.1
    roi = tuple(zip(centre - half, centre + half, strict=True))
    space = Space.fit(grid, [grid.spacing_mm[a] for a in Space.fit(grid, (1, 1, 1)).axes], roi_mm=roi)
    assert np.allclose(space.orient(world_mm(grid)), world_mm(space.model), atol=1e-6)
    inside = np.all(
        [(low <= w) & (w <= high) for w, (low, high) in zip(world_mm(grid), roi, strict=True)], axis=0
    )
    data = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    back = space.unorient(space.orient(data), fill=np.nan)
    kept = np.isfinite(back)
    assert kept[0][inside].all()
    assert np.array_equal(back[kept], data[kept])
    assert kept.sum() == np.prod(space.oriented)


def test_region_of_interest_is_cropped_to_whole_voxels() -> None:
    grid = Grid((10, 10, 10), np.diag([-2.0, 2.0, 2.0, 1.0]))  # x runs from +1 down to -19 mm
    space = Space.fit(grid, (2.0, 2.0, 2.0), roi_mm=((-7.0, -1.0), (3.5, 4.5), (-50.0, 50.0)))
    assert space.crop == ((6, 9), (2, 3), (0, 10))
    assert np.allclose(space.model.corners_mm().min(axis=0), (-7.0, 3.0, -1.0))
    assert np.allclose(space.model.corners_mm().max(axis=0), (-1.0, 5.0, 19.0))


def test_labels_outside_the_region_of_interest_are_background() -> None:
    grid = Grid((10, 10, 10), np.eye(4))
    space = Space.fit(grid, (1.0, 1.0, 1.0), roi_mm=((1.6, 4.4), (1.6, 4.4), (1.6, 4.4)))
    probabilities = np.stack([np.zeros(space.model.shape), np.ones(space.model.shape)])
    labels = space.labels_to_input(probabilities)
    expected = np.zeros((10, 10, 10), np.uint8)
    expected[2:5, 2:5, 2:5] = 1
    assert np.array_equal(labels, expected)


def test_region_of_interest_beside_the_scan_is_an_error() -> None:
    with pytest.raises(
        GenMedError, match=r"misses the scan; choose within -0.5 to 9.5, -0.5 to 9.5, -0.5 to 9.5 mm"
    ):
        Space.fit(Grid((10, 10, 10), np.eye(4)), (1, 1, 1), roi_mm=((20, 30), (0, 5), (0, 5)))


@pytest.mark.parametrize("roi", [((1, 0), (0, 1), (0, 1)), ((0, 1), (0, 1)), ((0, np.inf), (0, 1), (0, 1))])
def test_impossible_regions_of_interest_are_an_error(roi: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(GenMedError, match="low < high"):
        Space.fit(Grid((10, 10, 10), np.eye(4)), (1, 1, 1), roi_mm=roi)


# --- resampling matrices ---


@quick
@given(n_from=sizes, n_to=sizes)
def test_rows_sum_to_one(n_from: int, n_to: int) -> None:
    for matrix in (overlap_matrix(n_from, n_to), linear_matrix(n_from, n_to), resample_matrix(n_from, n_to)):
        assert matrix.shape == (n_to, n_from) and matrix.dtype == np.float32
        assert (matrix >= 0).all()
        assert np.allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_overlap_matrix_weighs_overlapped_lengths() -> None:
    assert np.array_equal(overlap_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    expected = np.array([[2, 1, 0], [0, 1, 2]], dtype=np.float32) / 3
    assert np.array_equal(overlap_matrix(3, 2), expected)
    assert np.array_equal(overlap_matrix(2, 4), [[1, 0], [1, 0], [0, 1], [0, 1]])


def test_linear_matrix_interpolates_between_centres() -> None:
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    assert np.array_equal(linear_matrix(2, 4), expected)
    assert np.array_equal(linear_matrix(1, 3), np.ones((3, 1)))


@quick
@given(n=sizes)
def test_equal_sizes_give_the_identity(n: int) -> None:
    for matrix in (overlap_matrix(n, n), linear_matrix(n, n), resample_matrix(n, n)):
        assert np.array_equal(matrix, np.eye(n))


@quick
@given(n_from=sizes, n_to=sizes)
def test_averaging_keeps_the_total(n_from: int, n_to: int) -> None:
    assert np.allclose(overlap_matrix(n_from, n_to).sum(axis=0), n_to / n_from, atol=1e-5)


@quick
@given(n_from=st.tuples(*[st.integers(1, 7)] * 3), n_to=st.tuples(*[st.integers(1, 7)] * 3))
def test_numpy_and_torch_agree_with_einsum(n_from: tuple[int, ...], n_to: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=(2, 3, *n_from)).astype(np.float32)
    matrices = [resample_matrix(a, b) for a, b in zip(n_from, n_to, strict=True)]
    expected = np.einsum("bcxyz,Xx,Yy,Zz->bcXYZ", array, *matrices)
    assert np.allclose(apply_matrices(array, matrices), expected, atol=1e-5)
    assert np.allclose(apply_matrices(torch.from_numpy(array), matrices), expected, atol=1e-5)
    tensors = [torch.from_numpy(m) for m in matrices]
    assert np.allclose(apply_matrices(torch.from_numpy(array), tensors), expected, atol=1e-5)


def test_resampling_is_differentiable_and_keeps_the_tensors_type() -> None:
    matrices = [resample_matrix(a, b) for a, b in ((4, 3), (3, 5), (2, 2))]
    array = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: apply_matrices(a, matrices), array)


def test_identity_matrices_are_skipped() -> None:
    array = np.full((2, 2, 2), np.inf)
    assert apply_matrices(array, [np.eye(2)] * 3) is array


# --- images ---


@quick
@given(affine=affines(), shape=st.tuples(*[st.integers(6, 12)] * 3), factor=st.floats(0.3, 1.0))
def test_a_value_stays_at_its_world_position_when_resampled_finer(
    affine: np.ndarray, shape: tuple[int, int, int], factor: float
) -> None:
    grid = Grid(shape, affine)
    ramp = np.stack([w for w in world_mm(grid)]).astype(np.float32)  # three images: world x, y and z
    oriented = Space.fit(grid, (1, 1, 1)).axes
    space = Space.fit(grid, [grid.spacing_mm[a] * factor for a in oriented])
    error = np.abs(space.to_model(ramp) - world_mm(space.model))
    margin = [int(np.ceil(m / n)) for m, n in zip(space.model.shape, space.oriented, strict=True)]
    inner = error[(slice(None), *(slice(k, -k) for k in margin))]
    assert inner.size and inner.max() < 1e-3


@quick
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 5)] * 3), times=st.tuples(*[st.integers(1, 3)] * 3))
def test_a_value_stays_at_its_world_position_when_voxels_are_averaged(
    affine: np.ndarray, shape: tuple[int, int, int], times: tuple[int, ...]
) -> None:
    axes = Space.fit(Grid((1, 1, 1), affine), (1, 1, 1)).axes
    fine = [0, 0, 0]
    for oriented, axis in enumerate(axes):
        fine[axis] = shape[oriented] * times[oriented]
    grid = Grid(tuple(fine), affine)
    space = Space.fit(grid, [grid.spacing_mm[a] * t for a, t in zip(axes, times, strict=True)])
    assert space.model.shape == shape
    assert np.allclose(space.to_model(world_mm(grid)), world_mm(space.model), atol=1e-3)


@quick
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 12)] * 3), spacing=spacings)
def test_averaging_moves_no_value_by_more_than_an_eighth_of_a_voxel_per_axis(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...]
) -> None:
    grid = Grid(shape, affine)
    coarse = np.maximum(spacing, np.array(grid.spacing_mm)[list(Space.fit(grid, spacing).axes)])
    space = Space.fit(grid, coarse)
    moved = np.linalg.norm(space.to_model(world_mm(grid)) - world_mm(space.model), axis=0)
    assert moved.max() <= sum(grid.spacing_mm) / 8 + 1e-3


@quick
@given(affine=affines(), shape=shapes, spacing=spacings)
def test_resampling_there_and_back_keeps_the_grid_and_constant_images(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...]
) -> None:
    space = Space.fit(Grid(shape, affine), spacing)
    model = space.to_model(np.full((2, *shape), 7, dtype=np.int16))
    assert model.shape == (2, *space.model.shape) and model.dtype == np.float32
    back = space.to_input(model)
    assert back.shape == (2, *shape) and np.allclose(back, 7, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 0.77])
def test_finer_resampling_agrees_with_itk(scale: float) -> None:
    """SimpleITK's linear interpolation at the working grid's world positions gives the same image."""
    rng = np.random.default_rng(3)
    data = rng.normal(size=(7, 8, 6)).astype(np.float32)
    affine = turned_affine((1, 0, 2), (-1, 1, -1)) @ np.diag([0.9, 1.0, 1.1, 1])
    angle = 0.3
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = turn @ affine
    grid = Grid(data.shape, affine)
    space = Space.fit(grid, [grid.spacing_mm[a] * scale for a in Space.fit(grid, (1, 1, 1)).axes])
    resampled = sitk.Resample(
        itk_image(data, affine), itk_image(np.zeros(space.model.shape), space.model.affine), sitk.Transform(),
        sitk.sitkLinear, -999.0, sitk.sitkFloat32,
    )  # fmt: skip
    theirs = sitk.GetArrayFromImage(resampled).transpose(2, 1, 0)
    known = theirs != -999
    assert known.mean() > 0.5
    inner = (slice(2, -2),) * 3
    assert np.allclose(space.to_model(data[None])[0][inner], theirs[inner], atol=1e-4)


def itk_image(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T).astype(np.float32))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def test_finer_resampling_agrees_with_scipy_up_to_the_edge() -> None:
    data = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    grid = Grid(data.shape, np.diag([2.0, 3.0, 1.5, 1.0]))
    space = Space.fit(grid, (1.0, 1.3, 0.7))
    index = np.linalg.inv(grid.affine) @ space.model.affine
    theirs = affine_transform(data, index, output_shape=space.model.shape, order=1, mode="nearest")
    assert np.allclose(space.to_model(data[None])[0], theirs, atol=1e-5)


def test_arrays_on_the_wrong_grid_are_refused() -> None:
    space = Space.fit(Grid((3, 4, 5), np.eye(4)), (1, 1, 1))
    with pytest.raises(ValueError, match="input grid"):
        space.to_model(np.zeros((1, 4, 3, 5)))
    with pytest.raises(ValueError, match="oriented grid"):
        space.unorient(np.zeros((1, 4, 3, 5)))


# --- labels ---


@pytest.mark.parametrize(("axes", "signs"), ALL_48[::5])
def test_labels_without_resampling_are_exact(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    values = [0, 5, -3, 1000]
    classes = np.random.default_rng(0).integers(0, 4, size=(4, 5, 6))
    grid = Grid(classes.shape, turned_affine(axes, signs))
    space = Space.fit(grid, [grid.spacing_mm[a] for a in Space.fit(grid, (1, 1, 1)).axes])
    model = space.labels_to_model(np.array(values)[classes], values)
    assert np.array_equal(space.unorient(model), classes)
    one_hot = np.stack([model == c for c in range(4)]).astype(np.float32)
    assert np.array_equal(space.labels_to_input(one_hot), classes)


def test_unlisted_label_values_are_background() -> None:
    space = Space.fit(Grid((1, 1, 4), np.eye(4)), (1, 1, 1))
    labels = np.array([0, 1, 2, 77]).reshape(1, 1, 4)
    assert space.labels_to_model(labels, [0, 2]).ravel().tolist() == [0, 0, 1, 0]


def test_every_voxel_takes_the_class_that_fills_most_of_it() -> None:
    space = Space.fit(Grid((9, 1, 1), np.eye(4)), (3, 1, 1))
    labels = np.array([0, 1, 1, 2, 2, 1, 0, 0, 2]).reshape(9, 1, 1)
    assert space.labels_to_model(labels, [0, 1, 2]).ravel().tolist() == [1, 2, 0]


def test_ties_go_to_the_lower_class() -> None:
    space = Space.fit(Grid((6, 1, 1), np.eye(4)), (2, 1, 1))
    labels = np.array([0, 1, 2, 1, 3, 2]).reshape(6, 1, 1)
    assert space.labels_to_model(labels, [0, 1, 2, 3]).ravel().tolist() == [0, 1, 2]
    thirds = np.full((3, 3, 1, 1), 1 / 3, np.float32)
    assert space.labels_to_input(thirds).ravel().tolist() == [0] * 6


@quick
@given(affine=affines(), shape=shapes, spacing=spacings, seed=st.integers(0, 1000))
def test_class_by_class_equals_the_whole_one_hot(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    space = Space.fit(Grid(shape, affine), spacing)
    labels = rng.integers(0, 4, size=shape)
    scores = space.to_model(np.stack([labels == c for c in range(4)]))
    ours = space.labels_to_model(labels, range(4))
    best = scores.max(axis=0)
    assert (np.take_along_axis(scores, ours[None].astype(int), 0)[0] >= best - 1e-5).all()
    clear = np.sort(scores, axis=0)[-2] < best - 1e-4
    assert np.array_equal(ours[clear], scores.argmax(axis=0)[clear])

    probabilities = rng.dirichlet(np.ones(5), size=space.model.shape).transpose(3, 0, 1, 2)
    scores = space.to_input(probabilities)
    back = space.labels_to_input(probabilities.astype(np.float32))
    clear = np.sort(scores, axis=0)[-2] < scores.max(axis=0) - 1e-4
    assert np.array_equal(back[clear], scores.argmax(axis=0)[clear])


def test_labels_to_input_works_slab_by_slab_beyond_one_slab() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=(50, 4, 5)).transpose(3, 0, 1, 2)
    space = Space.fit(Grid((100, 4, 5), np.eye(4)), (2, 1, 1))
    assert np.array_equal(space.labels_to_input(probabilities), space.to_input(probabilities).argmax(axis=0))


def test_labels_to_input_takes_torch_tensors_too() -> None:
    space = Space.fit(Grid((6, 5, 4), np.eye(4)), (2, 1, 1))
    probabilities = torch.rand(3, 3, 5, 4)
    assert np.array_equal(space.labels_to_input(probabilities), space.labels_to_input(probabilities.numpy()))


def test_many_classes_fit_the_index_type() -> None:
    values = list(range(300))
    labels = np.arange(300).reshape(300, 1, 1)
    space = Space.fit(Grid(labels.shape, np.eye(4)), (1, 1, 1))
    assert np.array_equal(space.labels_to_model(labels, values), labels)


def test_labels_to_input_never_holds_all_classes_at_full_size() -> None:
    space = Space.fit(Grid((128, 128, 64), np.eye(4)), (4, 4, 4))
    probabilities = np.random.default_rng(0).random((20, *space.model.shape), dtype=np.float32)
    tracemalloc.start()
    space.labels_to_input(probabilities)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 128 * 128 * 64 * 4  # three float volumes, where a full one-hot would be twenty


# --- intensities ---


def test_intensities_become_robust_z_scores() -> None:
    rng = np.random.default_rng(0)
    data = np.stack([rng.normal(100, 20, size=(20, 20, 20)), rng.normal(-5, 0.1, size=(20, 20, 20))])
    data[0, 0, 0, :5] = 1e6  # metal
    normalised = Intensity.fit(data).normalise(data)
    assert normalised.dtype == np.float32
    assert np.allclose(np.median(normalised, axis=(1, 2, 3)), 0, atol=0.05)
    assert np.allclose(normalised[0].ravel()[5:].std(), 1, atol=0.05)


def test_intensity_is_mean_and_deviation_of_clipped_values() -> None:
    data = np.random.default_rng(0).exponential(size=(1, 12, 13, 14))
    low, high = np.percentile(data, (0.5, 99.5))
    clipped = np.clip(data, low, high)
    intensity = Intensity.fit(data)
    assert np.allclose(intensity.center, clipped.mean(), rtol=1e-5)
    assert np.allclose(intensity.scale, clipped.std(), rtol=1e-5)


@quick
@given(center=st.floats(-2000, 2000), scale=st.floats(0.01, 1000), seed=st.integers(0, 1000))
def test_restoring_undoes_normalising(center: float, scale: float, seed: int) -> None:
    data = (np.random.default_rng(seed).normal(center, scale, size=(2, 5, 6, 7))).astype(np.float32)
    intensity = Intensity.fit(data)
    back = intensity.restore(intensity.normalise(data))
    assert np.allclose(back, data, atol=1e-5 * (abs(center) + scale))
    tensor = intensity.restore(intensity.normalise(torch.from_numpy(data)[None]))
    assert np.allclose(tensor[0], back, atol=1e-5 * (abs(center) + scale))


@pytest.mark.parametrize("rubbish", [0.0, 1e9, np.nan, np.inf])
def test_unobserved_voxels_influence_nothing(rubbish: float) -> None:
    data = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    observed = np.ones((8, 8, 8), dtype=bool)
    observed[5:] = False
    spoilt = np.where(observed, data, np.float32(rubbish))
    expected = Intensity.fit(data[:, :5])
    assert Intensity.fit(spoilt, observed) == expected
    assert Intensity.fit(spoilt, np.stack([observed, observed])) == expected


def test_voxels_that_are_not_finite_do_not_count() -> None:
    data = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    spoilt = data.copy()
    spoilt[:, 5:] = np.nan
    assert Intensity.fit(spoilt) == Intensity.fit(data[:, :5])


@pytest.mark.parametrize("value", [0.0, 5.0, -1024.0, 1e6])
def test_a_constant_channel_becomes_zero(value: float) -> None:
    data = np.full((1, 4, 4, 4), value, np.float32)
    intensity = Intensity.fit(data)
    assert np.array_equal(intensity.normalise(data), np.zeros_like(data))
    assert np.array_equal(intensity.restore(np.zeros_like(data)), data)


def test_integer_images_normalise_to_float32_and_stay_unchanged() -> None:
    data = np.random.default_rng(0).integers(-1000, 1000, size=(1, 6, 6, 6)).astype(np.int16)
    before = data.copy()
    assert Intensity.fit(data).normalise(data).dtype == np.float32
    assert np.array_equal(data, before)


def test_nothing_observed_is_an_error() -> None:
    with pytest.raises(GenMedError, match="no observed"):
        Intensity.fit(np.ones((1, 2, 2, 2)), np.zeros((2, 2, 2), dtype=bool))


def test_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="2 channels"):
        Intensity((0.0,), (1.0,)).normalise(np.zeros((2, 3, 3, 3)))


def test_inputs_are_never_changed() -> None:
    data = np.random.default_rng(0).normal(size=(1, 6, 7, 8)).astype(np.float32)
    before = data.copy()
    intensity = Intensity.fit(data)
    intensity.restore(intensity.normalise(data))
    for spacing in ((1, 1, 1), (2, 0.5, 1)):
        space = Space.fit(Grid((6, 7, 8), np.eye(4)), spacing)
        space.to_input(space.to_model(data))
    assert np.array_equal(data, before)


# Other grids


@given(
    st.permutations((0, 1, 2)),
    st.tuples(*[st.sampled_from((1, -1))] * 3),
    st.tuples(*[st.integers(-3, 3)] * 3),
    st.sampled_from((0, 1)),
)
def test_values_on_a_turned_grid_are_the_voxels_themselves(
    axes: list[int], flips: tuple[int, ...], shift: tuple[int, ...], order: int
) -> None:
    data = np.random.default_rng(0).normal(size=(1, 5, 6, 7)).astype(np.float32)
    step = np.zeros((4, 4))  # new index -> old index
    step[3, 3] = 1
    for new, old in enumerate(axes):
        step[old, new] = flips[new]
        step[old, 3] = (data.shape[1 + old] - 1 if flips[new] < 0 else 0) + shift[new]
    shape = tuple(data.shape[1 + old] for old in axes)
    found = on_grid(Volume(data, TURN), Grid(shape, TURN @ step), order=order)
    index = np.einsum("ij,jxyz->ixyz", step[:3, :3], np.indices(shape)) + step[:3, 3, None, None, None]
    x, y, z = (np.clip(index[k], 0, data.shape[1 + k] - 1).astype(int) for k in range(3))
    np.testing.assert_allclose(found, data[:, x, y, z], atol=1e-5)


def test_linear_fields_are_exact_on_a_rotated_grid() -> None:
    c, s = np.cos(0.4), np.sin(0.4)
    rotated = np.array([[c, -s, 0, 6], [s, c, 0, 3], [0, 0, 0.7, 2], [0, 0, 0, 1]])
    coarse = Grid((10, 10, 10), np.diag([2, 2, 2, 1.0]))

    def field(grid: Grid) -> np.ndarray:
        world = np.einsum("ij,jxyz->ixyz", grid.affine[:3, :3], np.indices(grid.shape))
        return np.einsum("i,ixyz->xyz", [0.3, -0.2, 0.5], world + grid.affine[:3, 3, None, None, None])[None]

    fine = Grid((6, 8, 9), rotated)
    np.testing.assert_allclose(on_grid(Volume(field(coarse), coarse.affine), fine, order=1), field(fine), atol=1e-5)


def test_nearest_voxels_keep_their_type_and_linear_ones_do_not() -> None:
    labels = Volume(np.arange(8, dtype=np.int16).reshape(1, 8, 1, 1), np.eye(4))
    coarse = Grid((4, 1, 1), np.diag([2.0, 1, 1, 1]))
    assert on_grid(labels, coarse, order=0).dtype == np.int16
    assert on_grid(labels, coarse, order=0)[0, :, 0, 0].tolist() == [0, 2, 4, 6]
    between = Grid((4, 1, 1), np.array([[2, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    assert on_grid(labels, between, order=1)[0, :, 0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
