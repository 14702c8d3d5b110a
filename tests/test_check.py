import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from real import real_set

from genmed.data.check import Problem, check, format_problems

LABELS = {"background": 0, "liver": 1}


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, 7, 8)).astype(np.float32)


def label() -> np.ndarray:
    data = np.zeros((6, 7, 8), np.uint8)
    data[2:4, 2:4, 2:4] = 1
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound set of three cases."""
    entries = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    for k in range(3):
        save(tmp_path / f"imagesTr/case{k}_0000.nii.gz", image(k))
        save(tmp_path / f"labelsTr/case{k}.nii.gz", label())
    return tmp_path


def the_only_problem(folder: Path) -> Problem:
    problems = check(folder)
    assert len(problems) == 1, problems
    assert "\n" not in problems[0].message
    return problems[0]


def test_a_sound_set_has_no_problems(folder: Path) -> None:
    assert check(folder) == []
    assert format_problems([]) == "No problems found."


def test_missing_files_are_named(folder: Path) -> None:
    (folder / "labelsTr/case1.nii.gz").unlink()
    problem = the_only_problem(folder)
    assert (problem.case, problem.severity) == ("case1", "error")
    assert "labelsTr/case1.nii.gz: is missing" in problem.message
    (folder / "imagesTr/case0_0000.nii.gz").unlink()
    assert [p.case for p in check(folder)] == ["case0", "case1"]


def test_unreadable_files_are_named(folder: Path) -> None:
    path = folder / "imagesTr/case1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    problem = the_only_problem(folder)
    assert problem.severity == "error" and "case1_0000.nii.gz" in problem.message


def test_undeclared_label_values_are_listed(folder: Path) -> None:
    data = label()
    data[0, 0, 0], data[0, 0, 1] = 7, 9
    save(folder / "labelsTr/case2.nii.gz", data)
    problem = the_only_problem(folder)
    assert problem.case == "case2" and "values 7, 9" in problem.message


def test_fractional_labels_are_errors(folder: Path) -> None:
    save(folder / "labelsTr/case2.nii.gz", label() * np.float32(0.5))
    assert the_only_problem(folder).severity == "error"


def test_empty_labels_are_warnings(folder: Path) -> None:
    save(folder / "labelsTr/case2.nii.gz", label() * 0)
    problem = the_only_problem(folder)
    assert problem.severity == "warning" and "empty" in problem.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_counted(folder: Path, value: float) -> None:
    data = image(1)
    data[0, 0, :3] = value
    save(folder / "imagesTr/case1_0000.nii.gz", data)
    problem = the_only_problem(folder)
    assert problem.severity == "error" and "3 NaN or infinite" in problem.message


def test_constant_images_are_warnings(folder: Path) -> None:
    save(folder / "imagesTr/case1_0000.nii.gz", image(1) * 0)
    assert the_only_problem(folder).severity == "warning"


def test_label_of_another_shape_is_an_error(folder: Path) -> None:
    save(folder / "labelsTr/case1.nii.gz", label()[:5])
    problem = the_only_problem(folder)
    assert problem.severity == "error" and "labelsTr/case1.nii.gz" in problem.message


@pytest.mark.parametrize("where", [(0, 3), (0, 0), (0, 1)])
def test_label_off_the_image_grid_is_an_error(folder: Path, where: tuple[int, int]) -> None:
    affine = np.eye(4)
    affine[where] += 0.2
    save(folder / "labelsTr/case1.nii.gz", label(), affine)
    problem = the_only_problem(folder)
    assert problem.severity == "error" and "mm off" in problem.message


def test_channels_must_share_a_grid(folder: Path) -> None:
    entries = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(entries))
    for k in range(3):
        save(folder / f"imagesTr/case{k}_0001.nii.gz", image(k + 10), np.diag([1, 1, 1 + (k == 2), 1]))
    problem = the_only_problem(folder)
    assert problem.case == "case2" and "case2_0001.nii.gz" in problem.message


def test_a_file_with_the_wrong_number_of_channels_is_an_error(folder: Path) -> None:
    save(folder / "imagesTr/case1_0000.nii.gz", np.stack([image(1), image(5)], axis=-1))
    assert "2 channels" in the_only_problem(folder).message


def test_the_same_image_twice_is_an_error(folder: Path) -> None:
    shutil.copy(folder / "imagesTr/case0_0000.nii.gz", folder / "imagesTr/case2_0000.nii.gz")
    problem = the_only_problem(folder)
    assert problem.case == "case2" and "case 'case0'" in problem.message


def test_a_case_listed_twice_is_an_error(folder: Path) -> None:
    files = [(f"imagesTr/case{k}_0000.nii.gz", f"labelsTr/case{k}.nii.gz") for k in (0, 1, 2, 1)]
    rows = [{"image": image, "label": label} for image, label in files]
    entries = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": rows}
    (folder / "dataset.json").write_text(json.dumps(entries))
    assert "listed twice" in the_only_problem(folder).message


def test_labels_that_never_occur_and_stray_files_are_warnings(folder: Path) -> None:
    entries = {"channel_names": {"0": "CT"}, "labels": LABELS | {"spleen": 2}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(entries))
    save(folder / "imagesTr/case0_0001.nii.gz", image(9))
    first, second = check(folder)
    assert first.severity == second.severity == "warning"
    assert "'spleen' occurs in no case" in first.message
    assert "case0_0001.nii.gz: belongs to no case" in second.message


def test_check_goes_on_after_a_problem_and_counts_them(folder: Path) -> None:
    save(folder / "labelsTr/case0.nii.gz", label()[:5])
    (folder / "imagesTr/case1_0000.nii.gz").write_bytes(b"not an image")
    save(folder / "labelsTr/case2.nii.gz", label() * 0)
    problems = check(folder)
    assert [problem.case for problem in problems] == ["case0", "case1", "case2"]
    assert format_problems(problems).splitlines()[-1] == "2 errors, 1 warnings."


def test_a_broken_dataset_json_is_a_problem_too(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")
    assert the_only_problem(folder).severity == "error"


def test_four_dimensional_msd_images_hold_the_channels(folder: Path) -> None:
    rows = []
    for k in range(2):
        save(folder / f"imagesTr/case{k}_0000.nii.gz", np.stack([image(k), image(k + 5)], axis=-1))
        rows.append({"image": f"imagesTr/case{k}_0000.nii.gz", "label": f"labelsTr/case{k}.nii.gz"})
    labels = {"0": "background", "1": "liver"}
    entries = {"modality": {"0": "T1", "1": "T2"}, "labels": labels, "training": rows}
    (folder / "dataset.json").write_text(json.dumps(entries))
    assert {problem.severity for problem in check(folder)} == {"warning"}  # the files of case2 are not listed


@pytest.mark.parametrize("name", ["Task04_Hippocampus", "brats_mini", "cvc_polyp"])
def test_real_sets_are_sound(name: str) -> None:
    assert [problem for problem in check(real_set(name)) if problem.severity == "error"] == []
