import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from genmed.cli import app
from genmed.degrade import slice_profile
from genmed.denoiser import Denoiser, build
from genmed.errors import GenMedError
from genmed.guide import Diverged
from genmed.hub import Card, Model, save_model
from genmed.space import Space, apply_matrices, overlap_matrix
from genmed.surprise import LIMIT, histogram
from genmed.tasks.segment import (
    MATCHES,
    UNGUIDED,
    Found,
    Segmentation,
    attempts_at,
    conditional,
    explain_contrast,
    observed_share,
    segment,
)
from genmed.tasks.view import SIGMA_Y, View, _fill_hidden, noise_level, seen_slices
from genmed.volume import Volume

PLAN = replace(tiny.PLAN, label_values=(0, 1, 5))
OBLIQUE = np.array([[0.0, -0.98, 0.199, 10], [-1.0, 0, 0, 20], [0, 0.199, 0.98, -5], [0, 0, 0, 1]])
GUIDED = ("joint", "joint-base", "restore-then-condition")


def random_denoiser() -> Denoiser:
    torch.manual_seed(0)
    denoiser = build(PLAN)
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return denoiser.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(plan=PLAN, denoiser=random_denoiser(), folder=None, sha256="0" * 64)


@pytest.fixture(scope="module")
def measured(model: Model) -> Model:
    """It knows the histogram of clean cases."""
    typical = (0.0,) * 4 + tuple(np.linspace(-1.5, 1.5, 9).tolist()) + (1.0,) * 13
    return replace(model, plan=replace(PLAN, typical=typical))


def scan(shape: tuple[int, int, int] = (11, 12, 13), affine: np.ndarray = OBLIQUE, seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).normal(100, 20, (1, *shape)).astype(np.float32)
    return Volume(data=data, affine=affine)


def slices_seen(of: Volume, every: int = 3) -> Volume:
    mask = np.zeros((1, *of.grid.shape), np.uint8)
    mask[..., ::every] = 1
    return of.like(mask)


@pytest.mark.parametrize("mode", ["conditional", *GUIDED])
def test_output_grid_is_bit_equal_to_input(model: Model, mode: str) -> None:
    image = scan()
    result = segment(model, image, mode=mode, samples=1)
    assert result.mode == mode
    assert result.labels.data.shape == image.data.shape
    assert np.array_equal(result.labels.affine, image.affine)
    assert set(np.unique(result.labels.data)) <= {0, 1, 5}
    assert result.labels.label_names == {0: "background", 1: "front", 5: "back"}


def test_model_grid_covers_the_same_field_of_view(model: Model) -> None:
    coarse = scan((5, 6, 3), OBLIQUE @ np.diag([2, 2, 4, 1]))
    result = segment(model, coarse, grid="model", samples=1)
    assert result.labels.grid.shape == (12, 10, 12)
    for a, b in zip(*(sorted(v.grid.corners_mm().tolist()) for v in (coarse, result.labels)), strict=True):
        assert a == pytest.approx(b)
    assert result.image is not None and result.image.grid.shape == (12, 10, 12)


@pytest.mark.parametrize("mode", ["conditional", *GUIDED])
def test_same_seed_gives_the_same_bytes(model: Model, mode: str) -> None:
    first, again = (segment(model, scan(), mode=mode, samples=2, seed=3) for _ in range(2))
    assert first.labels.data.tobytes() == again.labels.data.tobytes()
    assert first.probabilities is not None and again.probabilities is not None
    assert first.probabilities.data.tobytes() == again.probabilities.data.tobytes()
    assert first.volume_ml == again.volume_ml


def test_a_batch_of_two_images_equals_two_single_runs(model: Model) -> None:
    images = torch.randn(2, 1, 9, 10, 11, generator=torch.Generator().manual_seed(0))
    both = conditional(model.denoiser, images)
    for i in range(2):
        torch.testing.assert_close(conditional(model.denoiser, images[i : i + 1]), both[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["auto", "conditional", *GUIDED])
@pytest.mark.parametrize("match", ["auto", *MATCHES])
def test_values_that_were_not_observed_cannot_change_a_byte(measured: Model, mode: str, match: str) -> None:
    if mode == "conditional" and match not in UNGUIDED:
        match = "falling"
    if mode in ("joint", "joint-base") and match != "auto":
        match = "affine"
    image = scan()
    observed = slices_seen(image)
    hidden = np.where(observed.data > 0, image.data, np.float32(np.nan))
    wild = np.where(observed.data > 0, image.data, 1e6 * image.data[:, ::-1]).astype(np.float32)
    results = [
        segment(measured, image.like(data), mode=mode, match=match, observed=observed, samples=1)
        for data in (image.data, hidden, wild)
    ]
    for other in results[1:]:
        assert other.labels.data.tobytes() == results[0].labels.data.tobytes()
        assert other.probabilities is not None and results[0].probabilities is not None
        assert other.probabilities.data.tobytes() == results[0].probabilities.data.tobytes()
        assert (other.mode, other.match, other.residual) == (results[0].mode, results[0].match, results[0].residual)
        if other.image is not None and results[0].image is not None:
            assert other.image.data.tobytes() == results[0].image.data.tobytes()


def test_the_command_line_does_not_leak_either(tmp_path: Path) -> None:
    save_model(tmp_path / "model", PLAN, random_denoiser().state_dict(), Card("tiny", "none", "none"))
    image = scan()
    observed = slices_seen(image)
    observed.save(tmp_path / "mask.nii.gz")
    written = []
    for name, factor in (("a", 1.0), ("b", -50.0)):
        data = np.where(observed.data > 0, image.data, factor * image.data).astype(np.float32)
        (tmp_path / name).mkdir()
        image.like(data).save(tmp_path / name / "scan.nii.gz")
        command = ["segment", str(tmp_path / name / "scan.nii.gz"), "--model", str(tmp_path / "model")]
        options = ["--observed", str(tmp_path / "mask.nii.gz"), "--samples", "1", "--probabilities", "--preview"]
        out = ["--out", str(tmp_path / name / "out")]
        subprocess.run([sys.executable, "-m", "genmed", *command, *options, *out], check=True, capture_output=True)
        files = sorted(p for p in (tmp_path / name / "out").iterdir() if p.name != "manifest.json")
        written.append({p.name: _content(p) for p in files})
    assert len(written[0]) >= 4
    assert written[0] == written[1]


def _content(path: Path) -> bytes:
    import gzip

    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def test_a_channel_that_is_constant_where_it_was_observed_is_refused() -> None:
    plan = replace(PLAN, channels=("T1", "T2"))
    two = several_channels(scan().data[0], np.ones((11, 12, 13)))
    two.data[1, 0] = 9.0
    mask = np.ones((1, 11, 12, 13), np.uint8)
    View.of(plan, two, two.like(mask))
    mask[:, 0] = 0
    with pytest.raises(GenMedError, match="observed voxels of channel 1 are constant; check --observed"):
        View.of(plan, two, two.like(mask))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fill", [0.0, -1024.0])
def test_empty_slices_between_others_are_unseen(axis: int, fill: float) -> None:
    mask = np.zeros((12, 12, 12), np.uint8)
    mask.swapaxes(0, axis)[[2, 5, 9]] = 1
    whole = scan((12, 12, 12))
    observed, notes = seen_slices(whole.like(np.where(mask, whole.data, np.float32(fill))))
    assert observed is not None and np.array_equal(observed.data[0], mask)
    assert len(notes) == 1 and f"9 of 12 slices along array axis {axis}" in notes[0]


def several_channels(*channels: np.ndarray) -> Volume:
    return Volume(np.stack(channels).astype(np.float32), np.eye(4))


def test_slices_are_hidden_only_where_nothing_else_explains_them() -> None:
    noise, places = scan((12, 12, 12)).data[0], np.arange(12)
    two_empty = np.where(np.isin(places, (4, 7)), 0, noise)
    outer_empty = np.where((places > 2) & (places < 7), noise, 0)
    almost = np.where(places % 4 == 1, noise, 0)
    almost[0, 0, places % 4 != 1] = 1e-3
    cut_out = np.zeros((12, 12, 12))
    cut_out[3:8, 3:8, 1:4] = cut_out[3:8, 3:8, 8:11] = noise[:5, :5, :3]  # two organs on a background of zeros
    striped = np.where(places % 4 == 1, noise, 0) * (places % 4 == 1)[:, None]
    for data in (noise, two_empty, outer_empty, almost, cut_out, striped, 0 * noise):
        assert seen_slices(several_channels(data)) == (None, ())
    empty = np.where(places % 4 == 1, noise, 0)
    assert seen_slices(several_channels(empty, noise)) == (None, ())
    left, above = ~np.isin(places, (3, 5, 7)), ~np.isin(places, (4, 6, 8))
    observed, notes = seen_slices(several_channels(noise * left[:, None, None] * above))
    assert observed is not None and len(notes) == 2
    assert np.array_equal(observed.data[0, :, 0], np.outer(left, above))
    observed, _ = seen_slices(several_channels(empty, 2 * empty + 7))
    assert observed is not None and observed.data.shape == (1, 12, 12, 12)
    assert np.array_equal(observed.data[0, 0, 0], places % 4 == 1)


@pytest.mark.parametrize("fill", [0.0, 500.0])
def test_a_stack_of_four_slices_needs_no_mask_on_the_command_line(tmp_path: Path, fill: float) -> None:
    save_model(tmp_path / "model", PLAN, random_denoiser().state_dict(), Card("tiny", "none", "none"))
    image = scan((12, 12, 12))
    mask = slices_seen(image)
    assert int(mask.data[0, 0, 0].sum()) == 4
    image.like(np.where(mask.data > 0, image.data, np.float32(fill))).save(tmp_path / "stack.nii.gz")
    mask.save(tmp_path / "mask.nii.gz")
    written, told = [], []
    for out, options in (("told", ["--observed", str(tmp_path / "mask.nii.gz")]), ("found", [])):
        arguments = ["segment", str(tmp_path / "stack.nii.gz"), "--model", str(tmp_path / "model"), "--json"]
        more = ["--samples", "1", "--probabilities", "--preview", "--out", str(tmp_path / out), *options]
        result = CliRunner().invoke(app, arguments + more)
        assert result.exit_code == 0, result.output
        files = sorted(p for p in (tmp_path / out).iterdir() if p.name != "manifest.json")
        written.append({p.name: _content(p) for p in files})
        told.append((json.loads(result.stdout)["cases"]["stack"], result.stderr))
    assert len(written[0]) == 4 and written[0] == written[1]
    (by_mask, _), (alone, stderr) = told
    assert alone["mode"] == by_mask["mode"] == "restore-then-condition"
    assert alone["observed_share"] == by_mask["observed_share"] < 1
    note = f"{tmp_path / 'stack.nii.gz'}: 8 of 12 slices along array axis 2 hold a single value"
    assert by_mask["notes"] == [] and alone["notes"][0].startswith(note) and f"genmed: {note}" in stderr
    manifest = json.loads((tmp_path / "found" / "manifest.json").read_text())
    assert manifest["cases"]["stack"]["notes"] == alone["notes"]


def test_automatic_mode_restores_coarse_and_incomplete_scans_only(model: Model) -> None:
    image = scan()
    assert segment(model, image).mode == "conditional"
    assert segment(model, image, observed=slices_seen(image), samples=1).mode == "restore-then-condition"
    assert segment(model, scan((3, 3, 3), np.diag([4.0, 4, 4, 1])), samples=1).mode == "restore-then-condition"
    assert segment(model, image, match="affine", samples=1).mode == "restore-then-condition"


def test_restored_image_agrees_with_what_was_observed(model: Model) -> None:
    coarse = scan((4, 4, 4), np.diag([3.0, 3, 3, 1]))
    result = segment(model, coarse, match="none", samples=1)
    assert result.image is not None
    measured = apply_matrices(result.image.data, [overlap_matrix(12, 4)] * 3)
    assert np.abs(measured - coarse.data).max() < 0.25 * coarse.data.std()
    assert result.residual < 3


def test_samples_give_volume_intervals_and_probabilities(model: Model) -> None:
    result = segment(model, scan(), mode="joint", samples=4)
    assert set(result.volume_ml) == {"front", "back"}
    for interval in result.volume_ml.values():
        assert interval.low <= interval.mean <= interval.high
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities.data.sum(axis=0), 1, atol=1e-4)
    assert segment(model, scan(), mode="joint", samples=2).volume_ml == {}


def test_one_evaluation_of_a_complete_scan_has_the_intervals_that_tuning_cases_gave(model: Model) -> None:
    image = scan((12, 12, 12), np.eye(4))
    known = replace(model, plan=replace(PLAN, volume_error=(0.2, 0.0)))
    result = segment(known, image, mode="conditional", match="none")
    assert set(result.volume_ml) == {"front"}  # no case had the other
    ml = int((result.labels.data == 1).sum()) / 1000
    assert result.volume_ml["front"].mean == pytest.approx(ml)
    assert result.volume_ml["front"].high == pytest.approx(ml * math.exp(1.96 * 0.2), rel=0.02)
    assert segment(model, image, mode="conditional", match="none").volume_ml == {}
    assert segment(known, image, mode="conditional", match="none", samples=1).volume_ml == {}  # one that was drawn
    assert segment(known, image, mode="joint", match="none", samples=1).volume_ml == {}
    coarse = scan((6, 6, 6), np.diag([2.0, 2, 2, 1]))
    assert segment(known, coarse, mode="conditional", match="none").volume_ml == {}


@pytest.mark.parametrize("grid", ["input", "model"])
def test_a_temperature_changes_probabilities_but_no_label(model: Model, grid: str) -> None:
    softer = replace(model, plan=replace(PLAN, temperature=2.0))
    plain, soft = (segment(one, scan(), mode="conditional", match="none", grid=grid) for one in (model, softer))
    np.testing.assert_array_equal(plain.labels.data, soft.labels.data)
    assert plain.probabilities is not None and soft.probabilities is not None
    roots = np.sqrt(plain.probabilities.data)
    np.testing.assert_allclose(soft.probabilities.data, roots / roots.sum(axis=0), atol=1e-5)


def test_steering_the_image_alone_gives_another_pair(model: Model) -> None:
    both, base = (segment(model, scan(), mode=mode, samples=1) for mode in ("joint", "joint-base"))
    assert both.probabilities is not None and base.probabilities is not None
    assert not np.array_equal(both.probabilities.data, base.probabilities.data)


def test_a_region_of_interest_leaves_the_rest_background(model: Model) -> None:
    image = scan((20, 20, 20), np.eye(4))
    result = segment(model, image, roi_mm=((3.5, 10.5), (2.5, 12.5), (4.5, 11.5)))
    outside = np.ones((20, 20, 20), bool)
    outside[4:11, 3:13, 5:12] = False
    assert result.labels.grid.shape == (20, 20, 20)
    assert not result.labels.data[0][outside].any()


def test_a_scan_larger_than_the_training_crops_is_refused_with_advice(model: Model) -> None:
    with pytest.raises(GenMedError, match="--roi"):
        segment(model, scan((80, 20, 20), np.eye(4)))


@pytest.mark.parametrize(
    ("voxel_mm", "problem"),
    [
        (0.1, r"covers 4 × 4 × 4 mm.* at most 40 × 40 × 40 mm.*repair the header if its voxels of 0.1 × 0.1 × 0.1 mm"),
        (10, r"covers 400 × 400 × 400 mm.*repair the header if its voxels of 10 × 10 × 10 mm are wrong"),
        (1, None),
    ],
)
def test_a_spacing_that_is_ten_times_wrong_is_refused(voxel_mm: float, problem: str | None) -> None:
    image = scan((40, 40, 40), np.diag([voxel_mm] * 3 + [1]))
    if problem is None:
        assert View.of(PLAN, image).extent_share == 1
    else:
        with pytest.raises(GenMedError, match=problem):
            View.of(PLAN, image)


@pytest.mark.parametrize("mode", ["conditional", "restore-then-condition"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_spacing_that_is_ten_times_too_small_along_one_axis_makes_the_result_doubtful(
    model: Model, mode: str, axis: int
) -> None:
    spacing = np.ones(4)
    spacing[axis] = 0.1
    found = segment(model, scan((16, 16, 16), np.diag(spacing)), mode=mode, match="none", samples=1)
    assert found.doubtful and "along an axis it covers 4.0%" in found.doubts[-1]
    assert not any("along an axis" in line for line in segment(model, scan(), mode="conditional").doubts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "magic"}, "mode 'magic' is unknown; choose one of auto"),
        ({"match": "magic"}, "match 'magic' is unknown"),
        ({"grid": "other"}, "grid 'other' is unknown"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"mode": "conditional", "match": "affine"}, "mode conditional takes auto, none, rising, falling"),
        ({"slice_thickness_mm": 1.2}, "a slice thickness of 1.2 mm is more than the 1 mm"),
    ],
)
def test_unknown_options_are_refused(model: Model, change: dict, message: str) -> None:
    with pytest.raises(GenMedError, match=message):
        segment(model, scan(), **change)


def test_a_wrong_number_of_channels_is_refused(model: Model) -> None:
    image = scan()
    with pytest.raises(GenMedError, match="has 2 channel"):
        segment(model, image.like(np.concatenate([image.data, image.data])))


def test_a_mask_that_observes_nothing_is_refused(model: Model) -> None:
    image = scan()
    with pytest.raises(GenMedError, match="observes nothing"):
        segment(model, image, observed=image.like(np.zeros_like(image.data, dtype=np.uint8)))


def test_a_thickness_that_a_header_rounds_and_the_whole_spacing_are_taken(model: Model) -> None:
    coarse = scan((6, 6, 3), np.diag([1, 1, 5, 1]))
    for thickness in (0.5, 4.9, 5.0, 5.01, np.inf):
        assert View.of(PLAN, coarse, slice_thickness_mm=thickness).slice_thickness_mm == thickness
    with pytest.raises(GenMedError, match="more than the 5 mm"):
        View.of(PLAN, coarse, slice_thickness_mm=40)


def found_with(**facts: Any) -> Segmentation:
    """A guided segmentation that gives no reason for doubt but these."""
    usual = dict(surprise=1.0, residual=3.0, match="affine", observed_share=0.5)
    return Segmentation(
        scan(), None, {}, mode="restore-then-condition", seconds=1.0, seed=0, image=None, **(usual | facts)
    )


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, []),
        ({"surprise": None}, []),
        ({"surprise": 4.1}, ["unlike what the model knows (surprise 4.1, above 4)"]),
        ({"surprise": 2.1, "convincing": 2.0}, ["no explanation that was tried convinces (surprise 2.1, above 2)"]),
        ({"surprise": 1.9, "convincing": 2.0}, []),
        ({"surprise": float("nan")}, ["surprise nan"]),
        ({"residual": 5.1}, ["residual 5.1, above 5"]),
        ({"residual": float("nan")}, ["residual nan"]),
        ({"residual": 15.0, "match": "lncc"}, []),
        ({"observed_share": 0.009}, ["0.9% of what was found was observed"]),
        ({"extent_share": 0.19}, ["covers 19.0% of the field of view"]),
        ({"extent_share": 0.2}, []),
        (
            {"surprise": 9.0, "residual": 9.0, "observed_share": 0.0, "extent_share": 0.1},
            ["surprise", "residual", "0.0%", "10.0%"],
        ),
    ],
)
def test_every_reason_for_doubt_is_told(facts: dict[str, Any], why: list[str]) -> None:
    found = found_with(**facts)
    assert found.doubtful == bool(why) and len(found.doubts) == len(why)
    for line, words in zip(found.doubts, why, strict=True):
        assert words in line


def test_the_observed_share_is_that_of_what_was_found() -> None:
    image = scan((10, 12, 9), np.eye(4))
    mask = np.zeros((1, 10, 12, 9), np.uint8)
    mask[:, :2] = 1
    view = View.of(PLAN, image, image.like(mask))
    soft = np.zeros((3, 10, 12, 9), np.float32)
    soft[0] = 0.5
    assert observed_share(view, soft) == pytest.approx(0.2)  # nothing was found: of the field of view
    soft[2, 1:5] = 1
    assert observed_share(view, soft) == pytest.approx(0.25)
    soft[2, :2] = 0
    assert observed_share(view, soft) == 0
    assert observed_share(View.of(PLAN, image), soft) == 1


def test_coarse_voxels_cover_the_working_grid_and_thin_slices_leave_gaps() -> None:
    view = View.of(PLAN, scan((10, 12, 3), np.diag([1, 1, 5, 1])))
    assert view.covered.shape == view.image.shape[2:] and bool(view.covered.all())
    thin = view.with_thin_slices().covered
    assert torch.where(thin.all(dim=0).all(dim=0))[0].tolist() == [2, 7, 12] and int(thin.sum()) == thin.numel() // 5


@pytest.mark.parametrize("mode", ["conditional", *GUIDED])
def test_a_result_of_a_corner_of_the_scan_is_doubtful_in_every_mode(model: Model, mode: str) -> None:
    image, mask = scan((14, 15, 16)), np.zeros((1, 14, 15, 16), np.uint8)
    mask[0, :2, :2, :2] = 1
    found = segment(model, image, mode=mode, observed=image.like(mask), samples=1)
    assert found.doubtful and any("was observed, the rest is the model's guess" in line for line in found.doubts)


@given(st.integers(1, 12), st.integers(1, 6), st.floats(0.1, 1.0))
@settings(max_examples=50, deadline=None)
def test_slice_profiles_are_averages_and_full_slices_are_overlaps(n_y: int, ratio: int, share: float) -> None:
    n_model = n_y * ratio
    thin = slice_profile(n_model, n_y, share)
    np.testing.assert_allclose(thin.sum(axis=1), 1, rtol=1e-5)
    assert (thin >= 0).all()
    np.testing.assert_allclose(slice_profile(n_model, n_y, 1.0), overlap_matrix(n_model, n_y), atol=1e-6)


def test_thin_slices_see_only_their_middle() -> None:
    profile = slice_profile(8, 2, 0.5)
    assert profile.tolist() == [[0, 0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.5, 0.5, 0]]


def test_the_view_of_a_complete_scan_is_the_scan_on_the_working_grid(model: Model) -> None:
    image = scan()
    view = View.of(PLAN, image)
    assert view.complete
    expected = Space.fit(image.grid, PLAN.spacing_mm).to_model(view.intensity.normalise(image.data))
    np.testing.assert_allclose(view.image[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["conditional", "restore-then-condition"])
def test_a_scan_too_large_for_one_evaluation_goes_patch_by_patch(
    model: Model, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    monkeypatch.setattr("genmed.tasks.segment.TILED_ABOVE", 1000)
    handle = model.denoiser.net.register_forward_pre_hook(lambda _, x: largest.append(x[0][0, 0].numel()))
    result = segment(model, scan((20, 18, 33), np.eye(4)), mode=mode, samples=1)
    handle.remove()
    assert max(largest) <= 16**3 and len(largest) > 4
    assert result.labels.grid.shape == (20, 18, 33)


def test_slice_thickness_is_that_of_the_longest_side_alone() -> None:
    coarse = scan((6, 6, 3), np.diag([2, 2, 6, 1]))
    view = View.of(PLAN, coarse, slice_thickness_mm=1.0)
    assert [int((m[1] > 0).sum()) for m in view.matrices] == [2, 2, 2]  # the middle 1 mm of 6 touches two voxels
    assert np.allclose(view.matrices[2][1].sum(), 1)


@pytest.mark.parametrize(
    ("spacing_mm", "axis"),
    [
        ((1, 1, 1), None), ((1, 1, 5), 2), ((2, 6, 2), 1), ((2, 2, 2), None), ((5, 5.5, 6), None), ((2, 1, 1), 0),
        ((5, 5, 1), None),
    ],
)  # fmt: skip
def test_both_profiles_are_tried_along_the_clearly_coarsest_axis(
    spacing_mm: tuple[float, float, float], axis: int | None
) -> None:
    view = View.of(PLAN, scan((10, 9, 10), np.diag([*spacing_mm, 1])))
    assert view.slice_axis == axis
    if axis is not None:
        thin = view.with_thin_slices()
        assert thin.slice_thickness_mm == pytest.approx(1) and int((thin.matrices[axis][1] > 0).sum()) <= 2
        others = [k for k in range(3) if k != axis]
        assert all(torch.equal(thin.matrices[k], view.matrices[k]) for k in others)


def test_the_slice_thickness_of_a_header_is_that_of_the_third_axis_alone() -> None:
    def told(spacing_mm: tuple[float, float, float], by_hand_mm: float | None = None) -> float | None:
        image = replace(scan((6, 6, 6), np.diag([*spacing_mm, 1])), slice_thickness_mm=3.0)
        return View.of(PLAN, image, slice_thickness_mm=by_hand_mm).slice_thickness_mm

    assert told((2, 2, 6)) == told((1, 1, 6)) == 3
    assert told((1, 1, 6), 2.0) == 2
    assert told((6, 1, 1)) is None and told((6, 6, 6)) is None and told((2, 2, 2)) is None
    image = scan((6, 6, 6), np.diag([1, 1, 6, 1]))
    by_header = View.of(PLAN, replace(image, slice_thickness_mm=3.0))
    by_hand = View.of(PLAN, image, slice_thickness_mm=3.0)
    assert all(torch.equal(a, b) for a, b in zip(by_header.matrices, by_hand.matrices, strict=True))


def test_nothing_is_probed_where_the_header_tells_the_thickness(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from genmed.tasks import segment as module

    probed: list[float | None] = []

    def probe(model: Model, view: View, *_: object) -> float:
        probed.append(view.slice_thickness_mm)
        return 1.0 if view.slice_thickness_mm else 2.0

    monkeypatch.setattr(module, "probe", probe)
    image = scan((6, 6, 3), np.diag([2, 2, 6, 1]))
    found = segment(model, image, match="none", samples=1)
    assert probed == [None, found.slice_thickness_mm] and found.slice_thickness_mm == pytest.approx(1)
    told = segment(model, replace(image, slice_thickness_mm=4.5), match="none", samples=1)
    assert len(probed) == 2 and told.slice_thickness_mm == 4.5


def test_thin_slices_have_gaps_between_them() -> None:
    view = View.of(PLAN, scan((10, 12, 3), np.diag([1, 1, 5, 1])))
    assert view.slice_axis == 2 and view.slice_thickness_mm is None
    thin = view.with_thin_slices()
    assert thin.slice_thickness_mm == pytest.approx(1.0)
    assert thin.matrices[2].argmax(dim=1).tolist() == [2, 7, 12]
    assert torch.allclose(thin.matrices[2].sum(dim=1), torch.ones(3))
    assert torch.equal(thin.matrices[0], view.matrices[0])


@pytest.mark.parametrize(
    ("mode", "match", "seen", "attempts"),
    [
        (
            "auto", "auto", "complete",
            ["conditional/none", "conditional/rising at 2", "conditional/falling at 2",
             "restore-then-condition/curve at 2", "restore-then-condition/none at 2, widened"],
        ),
        (
            "auto", "auto", "cramped",
            ["restore-then-condition/none, widened", "restore-then-condition/affine at 2, widened",
             "restore-then-condition/curve at 2, widened"],
        ),
        (
            "auto", "auto", "cramped, in part",
            ["restore-then-condition/none, widened", "restore-then-condition/affine at 2, widened",
             "restore-then-condition/curve at 2, widened"],
        ),
        ("auto", "none", "cramped", ["conditional/none"]),
        ("joint", "auto", "cramped", ["joint/none", "joint/affine at 2", "joint/curve at 2"]),
        ("auto", "none", "complete", ["conditional/none"]),
        ("auto", "curve", "complete", ["restore-then-condition/curve"]),
        ("auto", "rising", "complete", ["conditional/rising"]),
        ("auto", "falling", "coarse", ["restore-then-condition/falling"]),
        ("conditional", "falling", "coarse", ["conditional/falling"]),
        ("conditional", "auto", "complete", ["conditional/none"]),
        ("conditional", "auto", "coarse", ["conditional/none"]),
        ("joint", "auto", "complete", ["joint/none", "joint/affine at 2", "joint/curve at 2"]),
        ("joint", "auto", "coarse", ["joint/affine", "joint/curve at 2"]),
        (
            "auto", "auto", "twice as coarse",
            ["conditional/none at 2", "restore-then-condition/affine", "restore-then-condition/curve at 2",
             "restore-then-condition/affine at 2, widened"],
        ),
        (
            "auto", "auto", "coarse",
            ["restore-then-condition/affine", "conditional/none at 2", "restore-then-condition/curve at 2",
             "restore-then-condition/affine at 2, widened"],
        ),
        (
            "auto", "auto", "in part",
            ["restore-then-condition/none", "conditional/none at 2", "restore-then-condition/affine at 2",
             "restore-then-condition/curve at 2", "restore-then-condition/none at 2, widened"],
        ),
        ("auto", "none", "coarse", ["restore-then-condition/none"]),
        ("auto", "none", "twice as coarse", ["restore-then-condition/none"]),
    ],
)  # fmt: skip
def test_what_is_tried_in_which_order(mode: str, match: str, seen: str, attempts: list[str]) -> None:
    spacing_mm = {"twice as coarse": 2.0, "coarse": 2.5}.get(seen, 1.0)
    shape = (6, 6, 6) if spacing_mm > 1 else (10, 9 if "cramped" in seen else 13, 12)
    image = scan(shape, np.diag([spacing_mm] * 3 + [1]))
    view = View.of(PLAN, image, slices_seen(image) if "in part" in seen else None)
    complete = seen in ("complete", "cramped")
    assert (view.complete, view.nearly_complete) == (complete, complete or seen == "twice as coarse")
    assert view.cramped == ("cramped" in seen)

    def described(interpolated: bool) -> list[str]:
        return [
            f"{way}/{other}{f' at {limit:g}' * (limit < LIMIT)}{', widened' * widened}"
            for way, other, limit, widened in attempts_at(view, mode, match, interpolated)
        ]

    assert described(True) == attempts
    quick = mode == match == "auto" and not complete
    assert described(False) == [one for one in attempts if not (quick and one.startswith("conditional"))]


def test_a_scan_as_large_as_the_patches_has_no_surroundings_to_restore() -> None:
    view = View.of(PLAN, scan((16, 17, 18)))
    assert view.room == (0, 0, 0) and not view.with_margins().widened
    assert not any(attempt.widened for attempt in attempts_at(view, "auto", "auto"))
    thick = replace(PLAN, spacing_mm=(1.0, 1.0, 5.0), thick_slices=True)
    assert View.of(thick, scan((10, 12, 4), np.diag([1, 1, 5, 1]))).room == (6, 4, 0)


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([1.0, 1, 2, 1])])
def test_margins_are_never_compared_with_the_scan(affine: np.ndarray) -> None:
    view = View.of(PLAN, scan((11, 12, 9), affine))
    wide = view.with_margins()
    size = tuple(m.shape[1] for m in wide.matrices)
    assert wide.widened and size == (16, 16, max(16, view.image.shape[4]))
    x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    inner = wide.inside(x)
    assert inner.shape[2:] == view.image.shape[2:]
    assert torch.allclose(wide.observation.operator(x), view.observation.operator(inner), atol=1e-6)
    y = torch.randn(wide.observation.y.shape, generator=torch.Generator().manual_seed(1))
    back = wide.observation.operator.adjoint(y)
    assert torch.allclose(wide.inside(back), view.observation.operator.adjoint(y), atol=1e-6)
    assert back.abs().sum() == pytest.approx(float(wide.inside(back).abs().sum()))


@pytest.mark.parametrize("falling", [False, True])
def test_a_monotone_map_of_the_intensities_is_undone(falling: bool) -> None:
    plain = View.of(PLAN, scan())
    target = histogram(plain.image)[0]
    map = (lambda v: 300 - 0.01 * v**2) if falling else (lambda v: 0.01 * v**2)
    changed = View.of(PLAN, scan().like(map(scan().data)))
    found = changed.equalised(target, falling=falling).image
    core = (plain.image > target[0, 0]) & (plain.image < target[0, -1])
    assert float((found - plain.image)[core].abs().max()) < 0.05
    assert float((changed.image - plain.image)[core].abs().max()) > 0.1
    assert torch.allclose(histogram(found)[0], target, atol=0.02)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hidden_slices_are_interpolated_linearly_and_held_beyond_the_last(axis: int) -> None:
    shape, size = (10, 11, 12), 10 + axis
    places = np.arange(size).reshape([size if k == axis else 1 for k in range(3)])
    ramp = Volume(np.broadcast_to(places, (1, *shape)).astype(np.float32).copy(), np.diag([*PLAN.spacing_mm, 1.0]))
    mask = np.zeros(ramp.data.shape, np.uint8)
    mask.swapaxes(0, axis + 1)[[2, 5, 9]] = 1
    view = View.of(PLAN, ramp, ramp.like(mask))
    image = view.image[0, 0].movedim(axis, 0).flatten(1).numpy()
    expected = view.intensity.normalise(np.clip(np.arange(size), 2, 9).astype(np.float32).reshape(1, -1, 1, 1)).ravel()
    np.testing.assert_allclose(image, np.repeat(expected[:, None], image.shape[1], axis=1), atol=1e-4)


def test_the_only_slice_that_was_seen_stands_for_all() -> None:
    y, seen = torch.rand(1, 1, 4, 5, 6), torch.zeros(4, 5, 6, dtype=torch.bool)
    seen[:, 3] = True
    assert torch.equal(_fill_hidden(y, seen, (1.0, 1.0, 1.0)), y[:, :, :, 3:4].expand(1, 1, 4, 5, 6))


def test_hidden_blocks_come_from_the_nearest_voxel_in_mm() -> None:
    y, seen = torch.arange(7.0 * 7 * 7).reshape(1, 1, 7, 7, 7), torch.ones(7, 7, 7, dtype=torch.bool)
    seen[2:5, 2:5, 2:5] = False
    for spacing_mm, place in (((1.0, 5.0, 5.0), (1, 3, 3)), ((5.0, 5.0, 1.0), (3, 3, 1))):
        filled = _fill_hidden(y, seen, spacing_mm)
        near = [place, tuple(6 - p if p == 1 else p for p in place)]
        assert filled[0, 0, 3, 3, 3] in [y[(0, 0, *p)] for p in near]
        assert torch.equal(filled[0, 0][seen], y[0, 0][seen])


def test_only_seen_voxels_are_equalised() -> None:
    whole, mask = scan(), slices_seen(scan())
    other = whole.like(np.where(mask.data > 0, whole.data, 1e6).astype(np.float32))
    target = torch.linspace(-1, 1, 9)[None]
    one, two = (View.of(PLAN, of, mask).equalised(target, falling=False) for of in (whole, other))
    assert torch.equal(one.y, two.y) and float(one.y[0, 0][~one.seen].abs().max()) == 0


def test_a_background_of_one_value_bends_no_map_beyond_it() -> None:
    image = scan((20, 20, 20), np.eye(4))
    image.data[:, :8] = 0
    image.data[:, 0, 0, :3] = -1  # ringing
    for falling in (False, True):
        found = View.of(PLAN, image).equalised(torch.linspace(-1.7, 1.4, 9)[None], falling=falling).image
        assert float(found.abs().max()) < 20


def test_a_flat_channel_is_equalised_to_something_finite() -> None:
    view = View.of(PLAN, scan())
    view.y[:] = 1.0
    assert bool(view.equalised(torch.linspace(-1, 1, 9)[None], falling=False).y.isfinite().all())


def test_a_model_without_measured_cases_cannot_equalise(model: Model) -> None:
    with pytest.raises(GenMedError, match="has not measured clean cases"):
        segment(replace(model, plan=replace(PLAN, typical=())), scan(), match="rising")


@pytest.mark.parametrize(
    ("surprise", "samples", "known", "mode"),
    [
        (1.0, None, True, "conditional"),
        (9.0, None, True, "restore-then-condition"),
        (1.0, 2, True, "restore-then-condition"),  # which differ where the scan does not tell
        (1.0, None, False, "restore-then-condition"),  # nobody knows what surprises
    ],
)
def test_a_coarse_scan_is_restored_if_its_interpolation_surprises(
    measured: Model, monkeypatch: pytest.MonkeyPatch, surprise: float, samples: int | None, known: bool, mode: str
) -> None:
    from genmed.tasks import segment as module

    coarse = scan((5, 6, 6), np.diag([2, 2, 2, 1]))
    interpolation = View.of(PLAN, coarse).image

    def surprise_of(
        model: Model, view: View, image: torch.Tensor, soft: torch.Tensor
    ) -> tuple[float, float, float]:
        return surprise if torch.equal(image, interpolation) else 1.5, 0.0, 0.0

    if known:
        monkeypatch.setattr(module, "surprise_of", surprise_of)
    else:
        measured = replace(measured, plan=replace(measured.plan, typical=()))
    found = segment(measured, coarse, samples=samples)
    assert found.mode == mode and (found.image is None) == (mode == "conditional") and not found.doubtful


def test_a_widened_result_lies_on_the_grid_of_the_scan(measured: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from genmed.tasks import segment as module

    asked: list[tuple[torch.Size, torch.Size]] = []

    def surprise_of(
        model: Model, view: View, image: torch.Tensor, soft: torch.Tensor
    ) -> tuple[float, float, float]:
        asked.append((image.shape[2:], view.inside(soft).shape[2:]))
        return 99.0 if len(asked) < 5 else 0.0, 9.0, 0.0

    monkeypatch.setattr(module, "surprise_of", surprise_of)
    found = segment(measured, scan(), samples=2)
    assert found.widened and found.surprise == 0 and found.labels.grid.shape == scan().grid.shape
    size = View.of(PLAN, scan()).image.shape[2:]
    assert asked == [(size, size)] * 4 + [((16, 16, 16), size)]  # denoised with its surroundings, judged without them
    assert found.image is not None and found.image.grid.shape == View.of(PLAN, scan()).space.model.shape
    assert np.array_equal(found.labels.affine, scan().affine)


@pytest.mark.parametrize("thick", [True, False])
def test_slices_missing_from_thick_ones_are_tried_with_monotone_maps(thick: bool) -> None:
    plan = replace(PLAN, spacing_mm=(1.0, 1.0, 5.0), thick_slices=thick)
    full = scan((16, 16, 8), np.diag([1, 1, 5, 1]))
    mask = np.zeros((1, 16, 16, 8), np.uint8)
    mask[..., ::2] = 1
    view = View.of(plan, full, full.like(mask))
    assert view.interpolable == thick and not View.of(plan, full).interpolable
    others = ["rising", "falling"] if thick else ["affine", "curve"]
    for mode, way in (("auto", "restore-then-condition"), ("joint", "joint")):
        tried = [a[:2] for a in attempts_at(view, mode, "auto", interpolated=False) if not a.widened]
        assert tried == [(way, "none"), *((way, other) for other in others)]


def test_trajectories_of_missing_thick_slices_begin_at_the_interpolation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genmed.tasks import segment as task

    begun: list[float | None] = []
    usual = task.guided_pair

    def watched(model: Model, view: View, mode: str, match: Any, seeds: Any, how: Any, *rest: Any) -> Any:
        begun.append(how.start)
        return usual(model, view, mode, match, seeds, how, *rest)

    monkeypatch.setattr(task, "guided_pair", watched)
    scan = Volume(tiny.blocks(np.random.default_rng(0), (16, 16, 16), 1)[0], np.eye(4))
    missing = np.ones((1, 16, 16, 16), np.uint8)
    missing[..., 5:9] = 0
    for thick in (True, False):
        thicker = replace(model, plan=replace(model.plan, thick_slices=thick))
        for hidden in (scan.like(missing), None):
            for match in ("none", "affine"):
                view = View.of(thicker.plan, scan, hidden)
                task.infer(thicker, view, "restore-then-condition", match, samples=1)
    assert begun == [task.START_SIGMA, *[None] * 7]


@pytest.mark.parametrize(
    ("coarse", "values", "tried", "kept", "doubtful"),
    [  # (surprise, layout, contrast) of every attempt
        (False, [(3.9, 5, 0)], 1, "none", False),
        (False, [(9, 9, 1), (1.0, 9, 0)], 2, "rising", False),
        (False, [(9, 9, 1), (9, 9, 0), (1.0, 9, 0)], 3, "falling", False),
        (False, [(9, 9, 1), (3.5, 4, 0), (9, 9, 0), (1.5, 5, 1)], 4, "curve", False),
        (False, [(9, 9, 1), (3.5, 4, 0), (9, 9, 0), (6, 3, 6), (7, 8, 0)], 5, "curve", True),
        (False, [(9, 9, 1), (3.5, 4, 0), (9, 9, 0), (3.0, 3, 0), (7, 8, 0)], 5, "curve", True),
        (False, [(9, 9, 1), (8, 9, 0), (9, 9, 0), (8, 9, 0), (5, 3, 3)], 5, "widened", True),
        (False, [(9, 9, 5), (8, 9, 0), (9, 9, 0), (7, 8, 0), (5, 3, 3)], 4, "curve", True),
        (True, [(1.9, 9, 0)], 1, "none", False),
        (True, [(3.0, 9, 0), (3.5, 9, 0)], 2, "none", False),
        (True, [(3.5, 9, 0), (3.0, 9, 0)], 2, "affine", False),
        (True, [(3.0, 2, 0), (6.0, 9, 0), (1.0, 9, 0)], 3, "curve", False),
        (True, [(5.0, 9, 0), (6.0, 2, 0), (3.0, 3, 0), (7, 8, 0)], 4, "affine", True),
        (True, [(3.0, 2, 0), (6.0, 9, 0), (3.0, 3, 0), (7, 8, 0)], 4, "none", True),
        (True, [(9.0, 5, 5), (8.0, 2, 5), (3.0, 3, 0)], 3, "affine", True),
    ],
)
def test_auto_stops_at_what_convinces_and_else_keeps_the_best_layout(
    measured: Model, monkeypatch: pytest.MonkeyPatch, coarse: bool, values: list[tuple[float, ...]], tried: int,
    kept: str, doubtful: bool,
) -> None:  # fmt: skip
    from genmed.tasks import segment as module

    matches: list[str] = []

    def attempt(_: Model, view: View, mode: str, match: str, **options: object) -> Found:
        surprise, layout, contrast = values[len(matches)]
        matches.append("widened" if view.widened else match)
        image = view.inside(view.image)
        soft = torch.full((1, 3, *image.shape[2:]), 1 / 3)
        return Found(view, soft, image, 0.0, surprise, layout, contrast, mode, match)

    monkeypatch.setattr(module, "infer", attempt)
    result = segment(measured, scan((5, 6, 6), np.diag([2, 2, 2, 1])) if coarse else scan())
    order = ["none", "affine", "curve"] if coarse else ["none", "rising", "falling", "curve"]
    assert matches == [*order, "widened"][:tried]
    assert ("widened" if result.widened else result.match, result.doubtful) == (kept, doubtful)


def test_an_explanation_that_diverges_leaves_the_others(measured: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from genmed.tasks import segment as module

    infer = module.infer

    def attempt(model: Model, view: View, mode: str, match: str, **options: Any) -> Found:
        if mode != "conditional":
            monkeypatch.setattr(module, "retry", diverge)
        return infer(model, view, mode, match, **options)._replace(surprise=9.0)

    def diverge(sample: object) -> None:
        raise Diverged("at every step size")

    monkeypatch.setattr(module, "infer", attempt)
    result = segment(measured, scan())
    assert result.mode == "conditional" and result.doubtful
    with pytest.raises(GenMedError, match="diverged"):
        segment(measured, scan(), mode="joint")


@pytest.mark.parametrize("augmentation", ["randomised", "mixed"])
@pytest.mark.parametrize(
    ("surprises", "contrast", "kept", "doubtful"),
    [([3.0], 2.1, "none", False), ([9.0], 2.0, "none", True), ([9.0, 1.9, 4.2], 2.1, "averaged", False),
     ([9.0, 4.2, 1.9], 9.0, "averaged", False), ([9.0, 2.1, 3.0], 9.0, "averaged", True)],
)  # fmt: skip
def test_a_model_of_random_contrasts_is_asked_at_once(
    measured: Model, monkeypatch: pytest.MonkeyPatch,
    augmentation: str, surprises: list[float], contrast: float, kept: str, doubtful: bool,
) -> None:  # fmt: skip
    from genmed.tasks import segment as module

    tried: list[str] = []

    def attempt(model: Model, view: View, mode: str, match: str, **options: Any) -> Found:
        tried.append(match)
        found = infer(model, view, mode, match, **options)
        return found._replace(surprise=surprises[len(tried) - 1], contrast=contrast)

    infer = module.infer
    monkeypatch.setattr(module, "infer", attempt)
    plan = replace(measured.plan, augmentation=augmentation)
    result = segment(replace(measured, plan=plan), scan())
    assert tried == ["none", "rising", "falling"][: len(surprises)]
    assert (result.mode, result.match, result.doubtful) == ("conditional", kept, doubtful)
    assert result.surprise == min(surprises[1:] or surprises)


@pytest.mark.parametrize("samples", [None, 3])
def test_answers_to_an_unfamiliar_contrast_are_averaged_by_how_familiar_they_look(
    measured: Model, monkeypatch: pytest.MonkeyPatch, samples: int | None
) -> None:
    """Layouts 10, 5 and 0.2, which counts as 1, have weights of 1, 2 and 10 parts in 13."""
    from genmed.tasks import segment as module

    layouts, softs = iter([10.0, 5.0, 0.2]), []

    def attempt(model: Model, view: View, mode: str, match: str, **options: Any) -> Found:
        found = infer(model, view, mode, match, **options)._replace(surprise=9.0, layout=next(layouts), contrast=9.0)
        softs.append(found.soft)
        return found

    infer = module.infer
    monkeypatch.setattr(module, "infer", attempt)
    view = View.of(measured.plan, scan())
    found = explain_contrast(measured, view, samples=samples)
    none, rising, falling = softs
    assert len(found.soft) == (samples or 1)
    assert torch.allclose(found.soft, (none + 2 * rising + 10 * falling) / 13, atol=1e-6)
    assert not torch.allclose(found.soft, falling, atol=1e-3)


def test_a_model_of_random_contrasts_still_restores_and_translates(measured: Model) -> None:
    strange = scan().like(scan().data ** 4)
    plan = replace(measured.plan, augmentation="randomised")
    models = replace(measured, plan=plan), measured
    found, usual = (segment(model, strange, mode="restore-then-condition", samples=1) for model in models)
    assert (found.mode, found.match) == (usual.mode, usual.match) != ("restore-then-condition", "none")


@pytest.mark.parametrize("hidden", ["nothing", "slices", "a block"])
def test_noise_is_estimated_through_smooth_structure(hidden: str) -> None:
    x, y, z = torch.meshgrid(*[torch.linspace(-2, 2, n) for n in (30, 32, 28)], indexing="ij")
    smooth = torch.sin(2 * x) + y * z + (x + y > 0.5)
    noisy = (smooth + 0.4 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0)))[None, None]
    seen = torch.ones(30, 32, 28, dtype=torch.bool)
    if hidden == "slices":
        seen[:] = False
        seen[:, 2::5] = True
    elif hidden == "a block":
        seen[:, 8:20] = False
    estimate = noise_level(torch.where(seen, noisy, torch.full_like(noisy, 1e6)), seen, (0, 1, 2))
    assert estimate == pytest.approx(0.4, rel=0.1)
    assert noise_level(smooth[None, None], seen, (0, 1, 2)) < 0.1


def test_noise_of_thick_slices_is_that_of_their_own_voxels() -> None:
    x, y, z = np.meshgrid(*[np.linspace(-2, 2, n) for n in (30, 32, 40)], indexing="ij")
    smooth = np.sin(2 * x) + y * z + (x + y > 0.5)
    slices = smooth.reshape(30, 32, 8, 5).mean(axis=3)
    noisy = slices + np.random.default_rng(0).normal(0, 0.5, slices.shape)
    for data, sd in ((slices, 0.0), (noisy, 0.5)):
        view = View.of(PLAN, Volume(data[None].astype(np.float32), np.diag([1, 1, 5, 1])))
        estimate = noise_level(view.y, view.seen, (0, 1)) * view.intensity.scale[0]
        assert estimate == pytest.approx(sd, rel=0.1, abs=0.1)
        expected = pytest.approx(sd / view.intensity.scale[0], rel=0.1) if sd else SIGMA_Y
        assert view.observation.sigma_y == expected


def test_little_noise_is_taken_for_texture_and_few_voxels_tell_nothing() -> None:
    smooth = np.add.outer(np.add.outer(np.arange(20.0), np.arange(20.0)), np.arange(20.0))[None]
    rng = np.random.default_rng(0)
    noise = rng.normal(0, smooth.std(), smooth.shape)
    clean, noisy = (Volume((smooth + n).astype(np.float32), np.eye(4)) for n in (0 * noise, noise))
    assert View.of(PLAN, clean).observation.sigma_y == SIGMA_Y
    assert View.of(PLAN, noisy).observation.sigma_y == pytest.approx(2**-0.5, rel=0.1)
    coarse, few = np.diag([2.0, 2, 2, 1]), Volume(noisy.data[:, :8, :8, :8], np.diag([2.0, 2, 2, 1]))
    assert View.of(PLAN, Volume(clean.data, coarse)).observation.sigma_y == SIGMA_Y
    assert View.of(PLAN, Volume(noisy.data, coarse)).observation.sigma_y == pytest.approx(2**-0.5, rel=0.1)
    assert View.of(PLAN, few).observation.sigma_y == SIGMA_Y
