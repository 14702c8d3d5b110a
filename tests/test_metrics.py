import csv
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genmed.errors import GenMedError
from genmed.metrics import bootstrap_interval, dice, evaluate, hd95, nsd, psnr, ssim

MM = (1.0, 1.0, 1.0)
MASKS = arrays(bool, (5, 6, 4))


def cube(shift: tuple[int, int, int] = (0, 0, 0), side: int = 20) -> np.ndarray:
    mask = np.zeros((40, 40, 40), bool)
    x, y, z = (10 + s for s in shift)
    mask[x : x + side, y : y + side, z : z + side] = True
    return mask


def save(folder: Path, name: str, data: np.ndarray, affine: np.ndarray | None = None) -> None:
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), folder / name)


def test_dice_of_shifted_cubes_is_exact() -> None:
    assert dice(cube(), cube()) == 1.0
    assert dice(cube(), cube((5, 0, 0))) == 0.75
    assert dice(cube(), cube((10, 10, 0))) == 0.25
    assert dice(cube(side=4), cube((10, 0, 0), side=4)) == 0.0


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_hd95_of_a_shifted_cube_is_the_shift_in_mm(shift: int) -> None:
    assert hd95(cube(), cube((shift, 0, 0)), MM) == shift
    assert hd95(cube(), cube((0, 0, shift)), (1.0, 1.0, 2.5)) == pytest.approx(2.5 * shift)


def test_hd95_ignores_a_small_far_speck_where_the_maximum_would_not() -> None:
    speckled = cube()
    speckled[0, 0, 0] = True
    assert hd95(speckled, cube(), MM) == 0.0


def test_nsd_counts_the_surface_within_the_tolerance() -> None:
    shifted = cube((2, 0, 0))
    assert nsd(cube(), shifted, MM, tolerance_mm=2.0) == 1.0
    faces_off = 2 / 6  # two of six faces are 2 mm off
    assert nsd(cube(), shifted, MM, tolerance_mm=1.0) == pytest.approx(1 - faces_off, abs=0.06)
    assert nsd(cube(), cube((12, 0, 0), side=8), MM) < 0.3


def test_a_single_slice_is_compared_by_its_contour() -> None:
    a, b = cube()[:, :, 15:16], cube((3, 0, 0))[:, :, 15:16]
    assert hd95(a, b, (1.0, 1.0, 7.0)) == hd95(a[..., 0], b[..., 0], (1.0, 1.0)) == 3.0


def test_empty_masks_have_the_documented_scores() -> None:
    none = np.zeros_like(cube())
    assert (dice(none, none), hd95(none, none, MM), nsd(none, none, MM)) == (1.0, 0.0, 1.0)
    for prediction, truth in ((none, cube()), (cube(), none)):
        assert dice(prediction, truth) == nsd(prediction, truth, MM) == 0.0
        assert hd95(prediction, truth, MM) == math.inf


def test_masks_of_different_shape_are_refused() -> None:
    with pytest.raises(GenMedError, match="different shapes"):
        dice(cube(), cube()[:-1])


@settings(deadline=None, max_examples=40)
@given(a=MASKS, b=MASKS)
def test_metrics_are_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    spacing = (1.0, 2.0, 3.0)
    assert dice(a, b) == dice(b, a) and 0 <= dice(a, b) <= 1
    assert hd95(a, b, spacing) == hd95(b, a, spacing) >= 0
    assert nsd(a, b, spacing) == pytest.approx(nsd(b, a, spacing)) and 0 <= nsd(a, b, spacing) <= 1


@settings(deadline=None, max_examples=40)
@given(a=MASKS, b=MASKS)
def test_metrics_do_not_depend_on_where_the_masks_lie(a: np.ndarray, b: np.ndarray) -> None:
    far_a, far_b = (np.pad(mask, ((3, 2), (1, 4), (5, 2))) for mask in (a, b))
    assert dice(a, b) == dice(far_a, far_b)
    assert hd95(a, b, MM) == pytest.approx(hd95(far_a, far_b, MM))
    assert nsd(a, b, MM) == pytest.approx(nsd(far_a, far_b, MM))


@settings(deadline=None, max_examples=20)
@given(mask=MASKS, scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_a_mask_agrees_with_itself_and_distances_scale_with_spacing(mask: np.ndarray, scale: float) -> None:
    assert (dice(mask, mask), hd95(mask, mask, MM), nsd(mask, mask, MM)) == (1.0, 0.0, 1.0)
    other = np.roll(mask, 1, axis=0)
    scaled_mm = (scale,) * 3
    assert hd95(mask, other, scaled_mm) == pytest.approx(scale * hd95(mask, other, MM))


def test_evaluate_writes_a_row_per_case_and_label(tmp_path: Path) -> None:
    affine = np.diag([1, 1, 2, 1])
    truth = cube().astype(np.uint8)
    truth[25:30] *= 3
    for case, shift in (("b", 2), ("a", 0)):
        save(tmp_path / "true", f"{case}.nii.gz", truth, affine)
        save(tmp_path / "predicted", f"{case}.nii.gz", np.roll(truth, shift, axis=2), affine)
    scores = evaluate(tmp_path / "predicted", tmp_path / "true", tmp_path / "out" / "metrics.csv")
    assert [(s.case, s.label) for s in scores] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    assert scores[0].dice == 1.0 and scores[2].dice == 0.9
    assert (scores[2].hd95_mm, scores[3].volume_ml_true) == (4.0, pytest.approx(5 * 20 * 20 * 2 / 1000))
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "case", "label", "name", "dice", "hd95_mm", "nsd", "volume_ml_predicted", "volume_ml_true"
    ]  # fmt: skip
    assert len(rows) == 4 and float(rows[3]["dice"]) == 0.9
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.csv"]


def test_a_label_that_only_one_side_has_is_scored_zero(tmp_path: Path) -> None:
    save(tmp_path / "true", "a.nii.gz", cube().astype(np.uint8))
    save(tmp_path / "predicted", "a.nii.gz", cube().astype(np.uint8) * 2)
    scores = evaluate(tmp_path / "predicted", tmp_path / "true")
    assert [(s.label, s.dice, s.hd95_mm) for s in scores] == [(1, 0.0, math.inf), (2, 0.0, math.inf)]


def test_given_labels_are_used_with_their_names(tmp_path: Path) -> None:
    save(tmp_path / "true", "a.nii.gz", cube().astype(np.uint8))
    scores = evaluate(tmp_path / "true", tmp_path / "true", labels={1: "liver", 4: "spleen"})
    assert [(s.name, s.dice) for s in scores] == [("liver", 1.0), ("spleen", 1.0)]


def test_a_missing_case_is_never_left_out_unseen(tmp_path: Path) -> None:
    for case in "ab":
        save(tmp_path / "true", f"{case}.nii.gz", cube().astype(np.uint8))
    save(tmp_path / "predicted", "a.nii.gz", cube().astype(np.uint8))
    with pytest.raises(GenMedError, match=r"predicted: lacks 1 of 2 cases, such as 'b'"):
        evaluate(tmp_path / "predicted", tmp_path / "true")
    with pytest.raises(GenMedError, match=r"true: lacks 1 of 1 cases, such as 'c'"):
        save(tmp_path / "predicted", "c.nii.gz", cube().astype(np.uint8))
        evaluate(tmp_path / "predicted", tmp_path / "true", cases=["c"])
    assert len(evaluate(tmp_path / "predicted", tmp_path / "true", cases=["a"])) == 1


@pytest.mark.parametrize("affine", [np.diag([1, 1, 1.1, 1]), np.eye(4) + np.eye(4, k=3)])
def test_other_grids_are_refused(tmp_path: Path, affine: np.ndarray) -> None:
    save(tmp_path / "true", "a.nii.gz", cube().astype(np.uint8))
    save(tmp_path / "predicted", "a.nii.gz", cube().astype(np.uint8), affine)
    with pytest.raises(GenMedError, match=r"predicted/a\.nii\.gz"):
        evaluate(tmp_path / "predicted", tmp_path / "true")


def test_folders_without_label_maps_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "true", "a.nii.gz", cube().astype(np.uint8))
    with pytest.raises(GenMedError, match="not a folder"):
        evaluate(tmp_path / "absent", tmp_path / "true")
    with pytest.raises(GenMedError, match="no label maps"):
        evaluate(tmp_path, tmp_path / "true")
    save(tmp_path / "predicted", "a.nii.gz", cube() * np.float32(0.5))
    with pytest.raises(GenMedError, match=r"a\.nii\.gz"):
        evaluate(tmp_path / "predicted", tmp_path / "true")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.integers(0, 100))
def test_bootstrap_interval_lies_within_the_values_and_repeats(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed, n=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(values, seed, n=200)


def test_bootstrap_interval_matches_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_bootstrap_by_subject_is_wider_than_by_case() -> None:
    subjects = np.repeat(np.arange(20), 10)
    values = np.random.default_rng(2).normal(size=20)[subjects]
    low, high = bootstrap_interval(values)
    wide_low, wide_high = bootstrap_interval(values, groups=list(subjects))
    assert wide_high - wide_low > 2 * (high - low)


def test_bootstrap_of_groups_of_one_is_the_plain_one() -> None:
    values = [0.1, 0.7, 0.4, 0.9]
    assert bootstrap_interval(values, 5, groups=list("abcd")) == bootstrap_interval(values, 5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(GenMedError, match="finite"):
        bootstrap_interval(values)
    with pytest.raises(GenMedError, match="groups"):
        bootstrap_interval([1.0], groups=["a", "b"])


def images(shape: tuple[int, ...] = (13, 12, 14)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    truth = generator.normal(100, 20, shape)
    return truth + generator.normal(0, 5, shape), truth


def test_psnr_of_a_constant_error_is_exact() -> None:
    truth = images()[1]
    assert psnr(truth + 2, truth, 200) == pytest.approx(40)
    assert psnr(truth - 20, truth, 200) == pytest.approx(20)
    assert psnr(truth, truth, 200) == math.inf
    assert psnr(np.uint8([[0, 255]]), np.uint8([[255, 0]]), 255) == 0  # no wrapping round


def test_ssim_of_one_window_is_the_formula_with_gaussian_weights() -> None:
    found, truth = images((11, 11, 11))
    offsets = np.arange(-5, 6) ** 2
    weights = np.exp(-(offsets[:, None, None] + offsets[:, None] + offsets) / (2 * 1.5**2))
    weights /= weights.sum()
    a, b = (weights * found).sum(), (weights * truth).sum()
    covariance = (weights * (found - a) * (truth - b)).sum()
    variances = [(weights * (x - m) ** 2).sum() for x, m in ((found, a), (truth, b))]
    c1, c2 = (0.01 * 150) ** 2, (0.03 * 150) ** 2
    expected = (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (sum(variances) + c2))
    assert ssim(found, truth, 150) == pytest.approx(expected, rel=1e-9)
    assert 0.5 < expected < 0.99


def test_ssim_averages_the_windows_that_fit_in() -> None:
    found, truth = images((13, 11, 12))
    boxes = [np.s_[x : x + 11, :, z : z + 11] for x in range(3) for z in range(2)]
    windows = [ssim(found[box], truth[box], 150) for box in boxes]
    assert ssim(found, truth, 150) == pytest.approx(np.mean(windows))


def test_ssim_of_equal_flat_and_negative_images_is_exact() -> None:
    found, truth = images()
    assert ssim(truth, truth, 150) == pytest.approx(1)
    assert ssim(found, truth, 150) == pytest.approx(ssim(truth, found, 150))
    flat = np.ones((11, 11))
    c1 = (0.01 * 255) ** 2
    assert ssim(60 * flat, 120 * flat, 255) == pytest.approx((2 * 60 * 120 + c1) / (60**2 + 120**2 + c1))
    assert ssim(truth.mean() - (truth - truth.mean()), truth, 150) < 0


def test_images_that_cannot_be_compared_are_refused() -> None:
    found, truth = images()
    for metric in (psnr, ssim):
        with pytest.raises(GenMedError, match="different shapes"):
            metric(found[1:], truth, 1)
        with pytest.raises(GenMedError, match="range of 0"):
            metric(found, truth, 0)
        with pytest.raises(GenMedError, match="NaN"):
            metric(found + np.nan, truth, 1)
    with pytest.raises(GenMedError, match="11 voxels"):
        ssim(found[:10], truth[:10], 1)
