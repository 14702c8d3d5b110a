import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real import real_set

from genmed.data.dataset import Dataset, read_dataset
from genmed.data.fingerprint import PATCH_VOXELS, _patch, fingerprint, plan, prepare
from genmed.errors import GenMedError
from genmed.plan import NORM_GROUPS, PRESETS, Plan

Case = tuple[tuple[int, int, int], np.ndarray]


def make_set(folder: Path, cases: list[Case], channels: int = 1) -> Dataset:
    """Cases of a given shape and affine: image 100 + channel in a foreground of 2 x 3 x 4 voxels, else 10."""
    names = {str(k): f"c{k}" for k in range(channels)}
    entries = {"channel_names": names, "labels": {"background": 0, "organ": 5}, "file_ending": ".nii.gz"}
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(entries | {"name": "toy", "licence": "CC0"}))
    for number, (shape, affine) in enumerate(cases):
        label = np.zeros(shape, np.uint8)
        label[:2, :3, :4] = 5
        nib.save(nib.Nifti1Image(label, affine), folder / f"labelsTr/{number}.nii.gz")
        for channel in range(channels):
            image = np.where(label > 0, 100 + channel, 10).astype(np.float32)
            nib.save(nib.Nifti1Image(image, affine), folder / f"imagesTr/{number}_{channel:04d}.nii.gz")
    return read_dataset(folder)


def test_spacing_size_and_extent_are_medians_and_maxima(tmp_path: Path) -> None:
    shapes = [(30, 40, 20), (32, 44, 24), (40, 41, 28)]
    data = make_set(tmp_path, [(shape, np.diag([1, 1, 2, 1])) for shape in shapes])
    measured = fingerprint(data)
    assert (measured.cases, measured.labelled, measured.thick_slices) == (3, 3, False)
    assert measured.spacing_mm.median == (1.0, 1.0, 2.0)
    assert measured.shape.median == (32.0, 41.0, 24.0)
    assert measured.extent_mm.largest == (40.0, 44.0, 56.0)


def test_volumes_are_in_ml_and_intensities_per_region_and_channel(tmp_path: Path) -> None:
    measured = fingerprint(make_set(tmp_path, [((10, 12, 8), np.diag([2, 2, 5, 1]))] * 2, channels=2))
    assert measured.volume_ml["organ"].median == pytest.approx(24 * 20 / 1000)
    assert measured.volume_ml["organ"].cases == 2
    assert measured.foreground["c1"].mean == measured.foreground["c1"].p99_5 == 101
    assert (measured.whole["c0"].median, measured.whole["c0"].p99_5) == (10, 100)


def test_axes_are_counted_in_the_body_not_in_the_file(tmp_path: Path) -> None:
    sagittal = np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1.0]])
    measured = fingerprint(make_set(tmp_path, [((40, 30, 20), sagittal)]))
    assert measured.spacing_mm.median == (3.0, 1.0, 2.0)
    assert measured.shape.median == (20.0, 40.0, 30.0)


def test_thick_slices_keep_their_spacing_on_the_last_axis(tmp_path: Path) -> None:
    coronal = np.array([[1.5, 0, 0, 0], [0, 0, 8.0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])
    axial = np.diag([1.5, 1.5, 8, 1])
    data = make_set(tmp_path, [((64, 60, 10), coronal), ((64, 60, 10), axial), ((64, 60, 12), axial)])
    planned = plan(fingerprint(data), data)
    assert planned.thick_slices
    assert planned.spacing_mm == (1.5, 1.5, 8.0)
    assert planned.patch == (64, 64, 10)
    assert planned.extent_mm == (96.0, 90.0, 96.0)


def test_a_plan_carries_the_words_of_the_data_set(tmp_path: Path) -> None:
    data = make_set(tmp_path, [((35, 51, 36), np.eye(4))])
    planned = plan(fingerprint(data), data, "base")
    assert planned.labels == ("background", "organ") and planned.label_values == (0, 5)
    assert (planned.name, planned.channels, planned.licence) == ("toy", ("c0",), "CC0")
    assert planned.patch == (40, 56, 40) and planned.widths == PRESETS["base"].widths


def test_channels_have_norms_of_their_own_where_the_coarsest_level_is_large_enough(tmp_path: Path) -> None:
    large = make_set(tmp_path / "large", [((40, 40, 40), np.eye(4))])
    small = make_set(tmp_path / "small", [((16, 16, 8), np.eye(4))])  # 2 × 2 × 1 voxels at the coarsest level
    assert plan(fingerprint(large), large).norm_groups == 0
    assert plan(fingerprint(small), small).norm_groups == NORM_GROUPS


@given(sides=st.tuples(*[st.floats(1, 600)] * 3), multiple=st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3))
def test_patches_fit_the_network_and_the_memory(
    sides: tuple[float, float, float], multiple: tuple[int, int, int]
) -> None:
    patch = _patch(sides, multiple)
    assert all(p % m == 0 and 0 < p < side + m for p, m, side in zip(patch, multiple, sides, strict=True))
    assert np.prod(patch) <= PATCH_VOXELS


def test_prepare_writes_both_files_and_tells_about_them(tmp_path: Path) -> None:
    make_set(tmp_path / "set", [((20, 20, 20), np.eye(4)), ((24, 20, 20), np.eye(4))])
    text = prepare(tmp_path / "set", tmp_path / "out", cases=["0"])
    planned = Plan.from_json(tmp_path / "out" / "plan.json")
    assert planned.extent_mm == (20.0, 20.0, 20.0)
    assert json.loads((tmp_path / "out" / "fingerprint.json").read_text())["cases"] == 1
    assert "24 × 24 × 24" in text and "1 × 1 × 1 mm" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fingerprint.json", "plan.json"]


def test_single_slices_wrong_presets_and_unknown_cases_are_refused(tmp_path: Path) -> None:
    flat = make_set(tmp_path / "flat", [((20, 20, 1), np.eye(4))])
    with pytest.raises(GenMedError, match="single slices"):
        plan(fingerprint(flat), flat)
    with pytest.raises(GenMedError, match="preset 'huge'"):
        plan(fingerprint(flat), flat, "huge")
    with pytest.raises(GenMedError, match="no case 'z'"):
        fingerprint(flat, ["z"])
    with pytest.raises(GenMedError, match="no cases"):
        fingerprint(flat, [])


def test_unlabelled_cases_are_measured_without_volumes(tmp_path: Path) -> None:
    data = make_set(tmp_path, [((20, 20, 20), np.eye(4))])
    for path in (tmp_path / "labelsTr").iterdir():
        path.unlink()
    (tmp_path / "labelsTr").rmdir()
    measured = fingerprint(read_dataset(data.folder))
    assert (measured.labelled, measured.volume_ml, measured.foreground) == (0, {}, {})


def test_hippocampus_is_planned_at_1_mm(tmp_path: Path) -> None:
    prepare(real_set("Task04_Hippocampus"), tmp_path)
    planned = Plan.from_json(tmp_path / "plan.json")
    assert (planned.spacing_mm, planned.patch) == ((1.0, 1.0, 1.0), (40, 56, 40))
