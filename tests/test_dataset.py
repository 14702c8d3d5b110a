import json
from pathlib import Path

import pytest
from real import real_set

from genmed.data.dataset import read_dataset
from genmed.errors import GenMedError

NNUNET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
MSD = {
    "name": "Heart",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "atrium"},
    "licence": "CC-BY-SA 4.0",
    "reference": " King's College ",
    "training": [
        {"image": "./imagesTr/la_010.nii.gz", "label": "./labelsTr/la_010.nii.gz"},
        {"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"},
    ],
    "test": ["./imagesTs/la_001.nii.gz"],
}


def folder_with(folder: Path, entries: object, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(entries))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    return folder


def test_msd_folders_are_read_as_they_are(tmp_path: Path) -> None:
    data = read_dataset(folder_with(tmp_path, MSD))
    assert (data.name, data.ids, data.channels) == ("Heart", ("la_003", "la_010"), ("MRI",))
    assert data.labels == {0: "background", 1: "atrium"}
    assert (data.licence, data.reference) == ("CC-BY-SA 4.0", "King's College")
    assert data.case("la_010").images == (tmp_path / "imagesTr/la_010.nii.gz",)
    assert data.case("la_010").label == tmp_path / "labelsTr/la_010.nii.gz"


def test_msd_test_cases_have_no_label_and_are_optional(tmp_path: Path) -> None:
    data = read_dataset(folder_with(tmp_path, MSD))
    assert [case.id for case in data.test] == ["la_001"] and data.case("la_001").label is None
    without = {key: value for key, value in MSD.items() if key != "test"}
    assert read_dataset(folder_with(tmp_path, without)).test == ()


def test_nnunet_channels_of_a_case_are_grouped_in_order(tmp_path: Path) -> None:
    files = [f"imagesTr/case_1_{k}_000{channel}.nii.gz" for k in (2, 1) for channel in (1, 0)]
    entries = NNUNET | {"channel_names": {"1": "T1c", "0": "FLAIR"}}
    folder = folder_with(tmp_path / "Dataset042_Brain", entries, *files, "labelsTr/case_1_1.nii.gz")
    data = read_dataset(folder)
    assert (data.name, data.channels) == ("Dataset042_Brain", ("FLAIR", "T1c"))
    assert data.ids == ("case_1_1", "case_1_2")
    assert [path.name for path in data.case("case_1_1").images] == [
        "case_1_1_0000.nii.gz",
        "case_1_1_0001.nii.gz",
    ]
    assert data.case("case_1_1").label == data.folder / "labelsTr/case_1_1.nii.gz"


def test_two_dimensional_png_sets_are_the_same(tmp_path: Path) -> None:
    entries = NNUNET | {"file_ending": ".png"}
    files = ("imagesTr/a_0000.png", "labelsTr/a.png", "imagesTr/b.txt")
    data = read_dataset(folder_with(tmp_path, entries, *files))
    assert data.ids == ("a",) and data.cases[0].images[0].name == "a_0000.png"


def test_a_missing_file_is_left_to_check(tmp_path: Path) -> None:
    data = read_dataset(folder_with(tmp_path, NNUNET, "imagesTr/a_0000.nii.gz", "labelsTr/b.nii.gz"))
    assert data.ids == ("a", "b")
    assert data.case("a").label is not None and len(data.case("b").images) == 1


def test_sets_without_labels_folder_have_unlabelled_cases(tmp_path: Path) -> None:
    data = read_dataset(folder_with(tmp_path, NNUNET, "imagesTr/a_0000.nii.gz", "imagesTs/z_0000.nii.gz"))
    assert data.case("a").label is None and [case.id for case in data.test] == ["z"]


def test_hidden_files_are_no_cases(tmp_path: Path) -> None:
    data = read_dataset(folder_with(tmp_path, NNUNET, "imagesTr/a_0000.nii.gz", "imagesTr/._a_0000.nii.gz"))
    assert data.ids == ("a",)


def test_nnunet_file_lists_are_followed(tmp_path: Path) -> None:
    entries = NNUNET | {"dataset": {"x": {"images": ["raw/x1.nii.gz"], "label": "raw/x2.nii.gz"}}}
    case = read_dataset(folder_with(tmp_path, entries)).case("x")
    assert (case.images, case.label) == ((tmp_path / "raw/x1.nii.gz",), tmp_path / "raw/x2.nii.gz")


def test_labels_are_sorted_by_value(tmp_path: Path) -> None:
    entries = NNUNET | {"labels": {"spleen": 7, "liver": 3, "background": 0}}
    data = read_dataset(folder_with(tmp_path, entries, "imagesTr/a_0000.nii.gz"))
    assert list(data.labels.items()) == [(0, "background"), (3, "liver"), (7, "spleen")]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"channel_names": None}, "channel_names"),
        ({"channel_names": {"1": "MRI"}}, "channel_names"),
        ({"channel_names": ["MRI"]}, "channel_names"),
        ({"labels": None}, "labels"),
        ({"labels": {"liver": 1}}, "labels"),
        ({"labels": {"background": 0, "liver": "one"}}, "labels"),
        ({"labels": {"background": 0, "liver": True}}, "labels"),
        ({"labels": {"background": 0, "liver": 0}}, "labels"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "labels"),
        ({"labels": {"background": 0, "ignore": 1}}, "labels"),
        ({"file_ending": None}, "file_ending"),
        ({"training": [{"label": "x"}]}, "training"),
        ({"training": [3]}, "training"),
        ({"training": "all"}, "training"),
        ({"training": [{"image": "x", "label": 4}]}, "training"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, object], key: str) -> None:
    folder = folder_with(tmp_path, NNUNET | changes, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(GenMedError, match=rf"dataset\.json: key '{key}'") as error:
        read_dataset(folder)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="not found"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(GenMedError, match="imagesTr"):
        read_dataset(folder_with(tmp_path, NNUNET))
    with pytest.raises(GenMedError, match="no training cases"):
        read_dataset(folder_with(tmp_path, NNUNET, "imagesTr/notes.txt"))
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(GenMedError, match="JSON"):
        read_dataset(tmp_path)


def test_an_unknown_case_is_refused_with_examples(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match=r"no case 'x'.*la_003"):
        read_dataset(folder_with(tmp_path, MSD)).case("x")


@pytest.mark.parametrize(("name", "count"), [("Task04_Hippocampus", 215), ("acdc", 160), ("brats_mini", 4)])
def test_real_sets_are_read(name: str, count: int) -> None:
    data = read_dataset(real_set(name))
    assert len(data.cases) >= count
    assert all(path.is_file() for case in data.cases for path in (*case.images, case.label) if path)
