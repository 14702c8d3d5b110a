import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from real import real_set
from typer.testing import CliRunner

from genmed.cli import app
from genmed.data.check import check
from genmed.data.convert import HEART_V1, HEART_V2, SETS, Outcome, combined, convert, recoded
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.split import person, read_split
from genmed.errors import GenMedError
from genmed.volume import Volume, read

SHAPE = (5, 4, 6)
OBLIQUE = np.array([[-0.6, 0.1, 0.0, 12.5], [0.1, 0.6, 0.2, -30.25], [0.0, -0.2, 2.5, 7.75], [0, 0, 0, 1]])


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 900, SHAPE, dtype=np.int16)


def classes(values: list[int], seed: int = 0) -> np.ndarray:
    """A label map in which each of the values occurs."""
    chosen = np.random.default_rng(seed).choice(values, SHAPE)
    chosen.flat[: len(values)] = values
    return chosen.astype(np.int16)


def nifti(path: Path, data: np.ndarray, affine: np.ndarray = OBLIQUE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = nib.Nifti1Image(data, affine)
    picture.header["descrip"] = b"as published"  # lost if the file is written anew
    nib.save(picture, path)


def nrrd(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    picture.SetSpacing((0.625, 0.625, 1.25))
    picture.SetOrigin((-10.0, 20.0, 30.0))
    sitk.WriteImage(picture, str(path))


def voxels(path: Path | None) -> np.ndarray:
    assert path is not None
    return np.asarray(nib.load(path).dataobj)


def hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def totalsegmentator(src: Path, structures: tuple[str, ...] = HEART_V2, scan: str = "ct", cases: int = 3) -> Path:
    for number in range(cases):
        folder = src / f"s{number:04d}"
        nifti(folder / f"{scan}.nii.gz", image(number))
        for value, structure in enumerate(structures):
            mask = (classes([*range(len(structures) + 1)], number) == value + 1).astype(np.uint8)
            nifti(folder / "segmentations" / f"{structure}.nii.gz", mask)
    return src


def kits23(src: Path, cases: int = 3) -> Path:
    for number in range(cases):
        folder = src / "dataset" / f"case_{number:05d}"
        nifti(folder / "imaging.nii.gz", image(number))
        nifti(folder / "segmentation.nii.gz", classes([0, 1, 2, 3], number).astype(np.uint8))
        nifti(folder / "instances" / "kidney_instance-1_annotation-1.nii.gz", classes([0, 1]))
    return src


def acdc(src: Path) -> Path:
    for part, patient, frames in (("training", 1, (1, 12)), ("training", 2, (1, 9)), ("testing", 101, (1, 14))):
        name = f"patient{patient:03d}"
        for frame in frames:
            nifti(src / part / name / f"{name}_frame{frame:02d}.nii.gz", image(patient + frame))
            nifti(src / part / name / f"{name}_frame{frame:02d}_gt.nii.gz", classes([0, 1, 2, 3], frame))
        nifti(src / part / name / f"{name}_4d.nii.gz", np.zeros((*SHAPE, 3), np.int16))
        info = f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (src / part / name / "Info.cfg").write_text(info)
    return src


def read_back(outcome: Outcome) -> Dataset:
    """The converted set, sound in the eyes of `check`, with nothing but whole cases in it."""
    assert outcome.failed == {}
    assert [problem for problem in check(outcome.folder) if problem.severity == "error"] == []
    assert not list(outcome.folder.glob(".*"))
    data = read_dataset(outcome.folder)
    entries = json.loads((outcome.folder / "dataset.json").read_text())
    assert entries["numTraining"] == len(data.cases) and entries["file_ending"] == ".nii.gz"
    assert data.reference.count("http") and data.licence
    return data


def test_totalsegmentator_masks_become_one_label_map_in_the_order_given(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src", ("heart", "aorta", "liver"))
    before = hashes(src)
    data = read_back(convert("totalsegmentator", src, tmp_path / "out", structures=["liver", "heart"]))
    assert data.labels == {0: "background", 1: "liver", 2: "heart"} and data.channels == ("CT",)
    assert data.ids == ("s0000", "s0001", "s0002")
    for number, case in enumerate(data.cases):
        drawn = classes([0, 1, 2, 3], number)
        assert np.array_equal(voxels(case.label), np.select([drawn == 3, drawn == 1], [1, 2]))
        assert case.images[0].read_bytes() == (src / case.id / "ct.nii.gz").read_bytes()
        assert np.array_equal(nib.load(case.label).affine, nib.load(case.images[0]).affine)
    assert hashes(src) == before


@pytest.mark.parametrize(("published", "chosen"), [((*HEART_V1, "liver"), HEART_V1), ((*HEART_V2, "liver"), HEART_V2)])
def test_totalsegmentator_defaults_to_the_heart_of_either_version(
    tmp_path: Path, published: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    src = totalsegmentator(tmp_path / "src", published)
    data = read_back(convert("totalsegmentator", src, tmp_path / "out"))
    assert tuple(data.labels.values()) == ("background", *chosen)


def test_totalsegmentator_mr_is_the_other_modality(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src", scan="mri")
    data = read_back(convert("totalsegmentator", src, tmp_path / "out", modality="mr"))
    assert data.channels == ("MRI",) and np.array_equal(voxels(data.cases[1].images[0]), image(1))
    with pytest.raises(GenMedError, match=r"src: holds no sNNNN/ct\.nii\.gz .*--modality mr"):
        convert("totalsegmentator", src, tmp_path / "other")


def test_the_parts_of_meta_csv_become_a_split_of_the_converted_cases(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src", cases=4)
    parts = ("train", "val", "test", "train", "test")  # the fifth case is not there
    rows = [f"s{number:04d};60;m;{part};" for number, part in enumerate(parts)]
    (src / "meta.csv").write_text("\n".join(["image_id;age;gender;split;pathology", *rows]) + "\n")
    data = read_back(convert("totalsegmentator", src, tmp_path / "out"))
    split = read_split(tmp_path / "out" / "split.json", data.ids)
    assert (split.train, split.tune, split.report) == (("s0000", "s0003"), ("s0001",), ("s0002",))
    assert split.dataset == data.name == "totalsegmentator"
    (src / "meta.csv").write_text("\n".join(["image_id;split", *(f"s{number:04d};train" for number in range(4))]))
    convert("totalsegmentator", src, tmp_path / "other")
    assert not (tmp_path / "other" / "split.json").exists()


def test_cases_that_show_nothing_are_in_no_part_of_the_split(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src", cases=5)
    for structure in HEART_V2:
        nifti(src / "s0001" / "segmentations" / f"{structure}.nii.gz", np.zeros(SHAPE, np.uint8))
    parts = ("train", "train", "val", "test", "")  # the last one is in no part
    rows = [f"s{number:04d};{part}" for number, part in enumerate(parts)]
    (src / "meta.csv").write_text("\n".join(["image_id;split", *rows]))
    data = read_back(convert("totalsegmentator", src, tmp_path / "out"))
    split = read_split(tmp_path / "out" / "split.json", data.ids)
    assert len(data.ids) == 5
    assert (split.train, split.tune, split.report) == (("s0000",), ("s0002",), ("s0003",))


def test_every_tenth_training_case_tunes_where_meta_csv_has_none_for_it(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src", scan="mri", cases=13)
    rows = [f"s{number:04d};{'test' if number == 5 else 'train'}" for number in range(13)]
    (src / "meta.csv").write_text("\n".join(["image_id;split", *rows]), encoding="utf-8-sig")
    data = read_back(convert("totalsegmentator", src, tmp_path / "out", modality="mr"))
    split = read_split(tmp_path / "out" / "split.json", data.ids)
    assert split.tune == ("s0000", "s0011") and split.report == ("s0005",)
    assert sorted(split.ids) == list(data.ids)


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_mmwhs_values_become_1_to_7(tmp_path: Path, modality: str) -> None:
    values = [0, 500, 600, 420, 550, 205, 820, 850]
    for part in ("ct_train", "mr_train"):
        for number in (1001, 1002):
            nifti(tmp_path / "src" / part / f"{part}_{number}_image.nii.gz", image(number))
            nifti(tmp_path / "src" / part / f"{part}_{number}_label.nii.gz", classes(values, number))
    nifti(tmp_path / "src" / "ct_test" / "ct_test_2001_image.nii.gz", image())
    data = read_back(convert("mmwhs", tmp_path / "src", tmp_path / "out", modality=modality))
    assert list(data.labels.values()) == ["background", "LV", "RV", "LA", "RA", "MYO", "AO", "PA"]
    assert data.ids == (f"{modality}_train_1001", f"{modality}_train_1002")
    drawn = classes(values, 1002)
    assert np.array_equal(voxels(data.cases[1].label), sum((drawn == v) * k for k, v in enumerate(values)))
    assert nib.load(data.cases[1].label).get_data_dtype() == np.uint8


def test_chosen_labels_are_numbered_in_their_order_and_others_become_background(tmp_path: Path) -> None:
    values = [0, 500, 600, 420, 550, 205, 820, 850, 421]
    chosen = {"MYO": (205,), "LA": (420, 421), "LV": (500,)}
    nifti(tmp_path / "ct_train" / "ct_train_1001_image.nii.gz", image())
    nifti(tmp_path / "ct_train" / "ct_train_1001_label.nii.gz", classes(values))
    data = read_back(convert("mmwhs", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", structures=list(chosen)))
    assert list(data.labels.values()) == ["background", *chosen]
    expected = sum(k * np.isin(classes(values), old) for k, old in enumerate(chosen.values(), start=1))
    assert np.array_equal(voxels(data.cases[0].label), expected)


def test_mmwhs_is_read_from_several_folders_and_no_case_from_two(tmp_path: Path) -> None:
    for part, number in ((1, 1001), (2, 1011)):
        nifti(tmp_path / f"ct_train{part}" / f"ct_train_{number}_image.nii.gz", image(number))
        nifti(tmp_path / f"ct_train{part}" / f"ct_train_{number}_label.nii.gz", classes([0, 500], number))
    out = tmp_path.parent / f"{tmp_path.name}-out"
    assert read_back(convert("mmwhs", tmp_path, out)).ids == ("ct_train_1001", "ct_train_1011")
    nifti(tmp_path / "ct_train" / "ct_train_1001_image.nii.gz", image())
    with pytest.raises(GenMedError, match="has the case ct_train_1001 twice"):
        convert("mmwhs", tmp_path, out)


def test_the_stray_421_of_mmwhs_is_left_atrium(tmp_path: Path) -> None:
    drawn = classes([0, 420, 421])
    nifti(tmp_path / "mr_train" / "mr_train_1002_image.nii.gz", image())
    nifti(tmp_path / "mr_train" / "mr_train_1002_label.nii.gz", drawn)
    data = read_back(convert("mmwhs", tmp_path / "mr_train", tmp_path / "out", modality="mr"))
    assert np.array_equal(voxels(data.cases[0].label), 3 * (drawn > 0))


def test_kits23_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    src = kits23(tmp_path / "src")
    data = read_back(convert("kits23", src, tmp_path / "out"))
    assert data.labels == {0: "background", 1: "kidney", 2: "tumor", 3: "cyst"}
    assert data.ids == ("case_00000", "case_00001", "case_00002")
    for case in data.cases:
        assert case.images[0].read_bytes() == (src / "dataset" / case.id / "imaging.nii.gz").read_bytes()
        assert case.label is not None
        assert case.label.read_bytes() == (src / "dataset" / case.id / "segmentation.nii.gz").read_bytes()
    assert convert("kits23", src / "dataset", tmp_path / "other").converted == data.ids


def test_unpacked_nifti_files_are_packed_and_keep_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "case_00007"
    nifti(folder / "imaging.nii", image())
    nifti(folder / "segmentation.nii", classes([0, 1, 3]).astype(np.uint8))
    case = read_back(convert("kits23", tmp_path / "src", tmp_path / "out")).cases[0]
    assert gzip.decompress(case.images[0].read_bytes()) == (folder / "imaging.nii").read_bytes()
    assert case.label is not None
    assert gzip.decompress(case.label.read_bytes()) == (folder / "segmentation.nii").read_bytes()


def test_acdc_frames_are_cases_of_one_patient_and_the_series_is_left_out(tmp_path: Path) -> None:
    src = acdc(tmp_path / "src")
    data = read_back(convert("acdc", src, tmp_path / "out"))
    frames = {"patient001": (1, 12), "patient002": (1, 9), "patient101": (1, 14)}
    ids = [f"{who}_frame{frame:02d}" for who, pair in frames.items() for frame in pair]
    assert list(data.ids) == ids and data.labels == {0: "background", 1: "RV", 2: "MYO", 3: "LV"}
    assert [person(data.name, id) for id in data.ids] == [who for who in frames for _ in range(2)]
    assert np.array_equal(voxels(data.case("patient101_frame14").label), classes([0, 1, 2, 3], 14))
    assert convert("acdc", src / "training", tmp_path / "training").converted == tuple(ids[:4])


def test_acdc_frames_that_info_cfg_names_must_be_there(tmp_path: Path) -> None:
    src = acdc(tmp_path / "src")
    for path in (src / "training" / "patient002").glob("patient002_frame09*"):
        path.unlink()
    outcome = convert("acdc", src, tmp_path / "out")
    assert list(outcome.failed) == ["patient002_frame09"] and len(outcome.converted) == 5
    assert "patient002_frame09.nii.gz: is missing" in outcome.failed["patient002_frame09"]


@pytest.mark.parametrize(
    ("modality", "name", "channel"), [("lge", "DE", "LGE MRI"), ("c0", "C0", "bSSFP MRI"), ("t2", "T2", "T2 MRI")]
)
def test_mscmrseg_sequences_of_a_subject_belong_to_one_person(
    tmp_path: Path, modality: str, name: str, channel: str
) -> None:
    values = [0, 600, 200, 500]
    for subject in (2, 10):
        for seed, suffix in enumerate(("DE", "C0", "T2")):
            nifti(tmp_path / "src" / "images" / f"subject{subject}_{suffix}.nii.gz", image(subject + seed))
            nifti(tmp_path / "src" / "manual" / f"subject{subject}_{suffix}_manual.nii.gz", classes(values, seed))
    nifti(tmp_path / "src" / "images" / f"subject11_{name}.nii.gz", image())  # published without labels
    data = read_back(convert("mscmrseg", tmp_path / "src", tmp_path / "out", modality=modality))
    assert data.ids == (f"subject10_{name}", f"subject2_{name}") and data.channels == (channel,)
    assert [person(data.name, id) for id in data.ids] == ["subject10", "subject2"]
    drawn = classes(values, ["DE", "C0", "T2"].index(name))
    expected = np.select([drawn == 600, drawn == 200, drawn == 500], [1, 2, 3])
    assert np.array_equal(voxels(data.cases[0].label), expected)
    assert data.labels == {0: "background", 1: "RV", 2: "MYO", 3: "LV"}


def test_the_archive_of_the_mscmrseg_challenge_is_read_too(tmp_path: Path) -> None:
    root = tmp_path / "C0LET2_nii45_for_challenge19"
    nifti(root / "c0t2lge" / "patient3_LGE.nii.gz", image(3))
    nifti(root / "lgegt" / "patient3_LGE_manual.nii.gz", classes([0, 200, 500, 600]))
    data = read_back(convert("mscmrseg", tmp_path, tmp_path.parent / f"{tmp_path.name}-out"))
    assert data.ids == ("patient3_LGE",) and person(data.name, "patient3_LGE") == "patient3"
    nifti(root / "copy" / "patient3_LGE.nii.gz", image(4))
    with pytest.raises(GenMedError, match=r"patient3_LGE\.nii\.gz: is also .*patient3_LGE\.nii\.gz"):
        convert("mscmrseg", tmp_path, tmp_path.parent / f"{tmp_path.name}-other")


def test_la2018_nrrd_files_keep_their_geometry(tmp_path: Path) -> None:
    src = tmp_path / "src" / "Training Set"
    drawn = (255 * classes([0, 1])).astype(np.uint8)
    for seed, id in enumerate(("0RZDK210BSMWAA6467LU", "4498FMWC3T30WWXTIQCA")):
        nrrd(src / id / "lgemri.nrrd", (image(seed) + 900).astype(np.uint16))
        nrrd(src / id / "laendo.nrrd", drawn)
    data = read_back(convert("la2018", src.parent, tmp_path / "out"))
    assert data.labels == {0: "background", 1: "left atrium"} and len(data.ids) == 2
    original, case = read(src / data.ids[0] / "lgemri.nrrd"), data.cases[0]
    assert np.array_equal(voxels(case.images[0]), original.data[0])
    assert np.array_equal(voxels(case.label), drawn // 255)
    assert original.affine[0, 0] == -0.625 and original.affine[2, 2] == 1.25
    for path in (case.images[0], case.label):
        assert np.array_equal(nib.load(path).affine, original.affine)
    assert convert("la2018", src, tmp_path / "other").converted == data.ids


@given(
    values=st.permutations([0, 7, 200, 421, 30000]).map(lambda order: dict(zip(order, range(5), strict=True))),
    seed=st.integers(0, 100),
)
def test_recoding_is_a_table_lookup(
    tmp_path_factory: pytest.TempPathFactory, values: dict[int, int], seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "recoded.nii.gz"
    drawn = classes(list(values), seed)
    nifti(path, drawn)
    made = recoded(path, {old: new for old, new in values.items() if old})(Volume(image()[None], OBLIQUE)).data[0]
    assert all(new == (values[int(old)] if old else 0) for old, new in zip(drawn.flat, made.flat, strict=True))


def test_the_later_of_overlapping_masks_wins(tmp_path: Path) -> None:
    first, second = classes([0, 1], 1).astype(np.uint8), classes([0, 1], 2).astype(np.uint8)
    nifti(tmp_path / "a.nii.gz", first)
    nifti(tmp_path / "b.nii.gz", second)
    made = combined([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])(Volume(image()[None], OBLIQUE)).data[0]
    assert (first & second).any() and np.array_equal(made, np.where(second, 2, first))


def test_a_half_done_run_goes_on_and_ends_like_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each of the moves that put a case in its place; what is there is whole, and is not touched again."""
    src, whole = kits23(tmp_path / "src", cases=2), tmp_path / "whole"
    assert len(convert("kits23", src, whole).converted) == 2
    move, out = os.replace, tmp_path / "out"

    def stop_at(suffix: str) -> Callable[[Path, Path], None]:
        def replace(source: Path, target: Path) -> None:
            if str(target).endswith(suffix):
                raise KeyboardInterrupt
            move(source, target)

        return replace

    for suffix, finished in [
        ("case_00000_0000.nii.gz", []),
        ("labelsTr/case_00000.nii.gz", []),
        ("labelsTr/case_00001.nii.gz", ["case_00000"]),
        ("dataset.json", ["case_00000", "case_00001"]),
    ]:
        monkeypatch.setattr(os, "replace", stop_at(suffix))
        with pytest.raises(KeyboardInterrupt):
            convert("kits23", src, out)
        monkeypatch.setattr(os, "replace", move)
        assert [path.name for path in sorted(out.glob("imagesTr/*"))] == [f"{id}_0000.nii.gz" for id in finished]
        assert [path.name for path in sorted(out.glob("labelsTr/*"))] == [f"{id}.nii.gz" for id in finished]
        assert not (out / "dataset.json").exists() and not list(out.glob(".*"))
    (out / ".converting-left" / "x").mkdir(parents=True)  # what a power failure leaves
    before = (out / "imagesTr" / "case_00000_0000.nii.gz").stat().st_mtime_ns
    outcome = convert("kits23", src, out)
    assert (outcome.converted, outcome.skipped) == ((), ("case_00000", "case_00001"))
    assert (out / "imagesTr" / "case_00000_0000.nii.gz").stat().st_mtime_ns == before
    assert hashes(out) == hashes(whole) and not list(out.glob(".*"))


def test_an_image_without_its_label_is_converted_again(tmp_path: Path) -> None:
    src, out = kits23(tmp_path / "src"), tmp_path / "out"
    convert("kits23", src, out)
    (out / "labelsTr" / "case_00001.nii.gz").unlink()
    (out / "imagesTr" / "case_00001_0000.nii.gz").write_bytes(b"half")
    outcome = convert("kits23", src, out)
    assert (outcome.converted, outcome.skipped) == (("case_00001",), ("case_00000", "case_00002"))
    assert len(read_back(outcome).cases) == 3


def test_more_cases_can_come_later(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert("kits23", kits23(tmp_path / "src", cases=2), out)
    outcome = convert("kits23", kits23(tmp_path / "src", cases=3), out)
    assert outcome.converted == ("case_00002",) and len(read_back(outcome).cases) == 3


def shifted(src: Path) -> None:
    moved = OBLIQUE.copy()
    moved[1, 3] += 200
    nifti(src / "dataset" / "case_00001" / "segmentation.nii.gz", classes([0, 1]), moved)


def cropped(src: Path) -> None:
    nifti(src / "dataset" / "case_00001" / "segmentation.nii.gz", classes([0, 1])[1:])


def strange(src: Path) -> None:
    nifti(src / "dataset" / "case_00001" / "segmentation.nii.gz", classes([0, 1, 2, 9]))


def fractional(src: Path) -> None:
    nifti(src / "dataset" / "case_00001" / "segmentation.nii.gz", classes([0, 1]).astype(np.float32) / 2)


def unlabelled(src: Path) -> None:
    (src / "dataset" / "case_00001" / "segmentation.nii.gz").unlink()


def imageless(src: Path) -> None:
    (src / "dataset" / "case_00001" / "imaging.nii.gz").unlink()


def truncated(src: Path) -> None:
    path = src / "dataset" / "case_00001" / "imaging.nii.gz"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shifted, ("segmentation.nii.gz", "200 mm off", "imaging.nii.gz", "voxels agree", "header")),
        (cropped, ("segmentation.nii.gz", "4 × 4 × 6", "5 × 4 × 6")),
        (strange, ("segmentation.nii.gz", "unknown label values 9", "0, 1, 2, 3")),
        (fractional, ("segmentation.nii.gz", "0.5", "not labels")),
        (unlabelled, ("segmentation.nii.gz", "missing")),
        (imageless, ("imaging.nii.gz", "missing")),
        (truncated, ("imaging.nii.gz", "not a readable NIfTI file")),
    ],
)
def test_a_bad_case_is_one_line_and_does_not_stop_the_others(
    tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    src = kits23(tmp_path / "src")
    damage(src)
    result = CliRunner().invoke(app, ["data", "convert", "kits23", str(src), str(tmp_path / "out")])
    assert result.exit_code == 1
    told = [line for line in result.stderr.splitlines() if "case_00001: " in line]
    assert len(told) == 1 and all(word in told[0] for word in words), result.stderr
    assert "1 of 3 cases failed" in result.stderr
    data = read_dataset(tmp_path / "out")
    assert data.ids == ("case_00000", "case_00002") and not list((tmp_path / "out").glob(".*"))
    assert check(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["numTraining"] == 2


def test_a_mask_that_one_case_lacks_fails_that_case_only(tmp_path: Path) -> None:
    src = totalsegmentator(tmp_path / "src")
    (src / "s0001" / "segmentations" / "aorta.nii.gz").unlink()
    outcome = convert("totalsegmentator", src, tmp_path / "out")
    assert list(outcome.failed) == ["s0001"] and outcome.converted == ("s0000", "s0002")
    assert "aorta.nii.gz: is missing" in outcome.failed["s0001"]


def test_the_command_prints_what_it_did_and_takes_the_options(tmp_path: Path) -> None:
    src, out = totalsegmentator(tmp_path / "src", ("heart", "liver"), scan="mri"), tmp_path / "out"
    options = ["--modality", "mr", "--structures", "liver, heart"]
    line = ["data", "convert", "totalsegmentator", str(src), str(out), *options]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["3 cases converted, 0 were converted before", str(out)]
    assert list(read_dataset(out).labels.values()) == ["background", "liver", "heart"]
    assert "0 cases converted, 3 were" in CliRunner().invoke(app, line).stdout


def refused(words: str, *line: object) -> None:
    result = CliRunner().invoke(app, ["data", "convert", *(str(word) for word in line)])
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr, result.stderr


@pytest.mark.parametrize("name", SETS)
def test_a_wrong_folder_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "src" / "notes").mkdir(parents=True)
    refused(f"src: holds no {SETS[name].files}", name, tmp_path / "src", tmp_path / "out")
    refused(f"absent: no such folder; give the folder of the data set {name}", name, tmp_path / "absent", "out")
    assert not (tmp_path / "out").exists()


def test_wrong_names_and_options_are_answered_with_the_right_ones(tmp_path: Path) -> None:
    src, kits, out = totalsegmentator(tmp_path / "src"), kits23(tmp_path / "kits"), tmp_path / "out"
    refused("choose one of: totalsegmentator, mmwhs, kits23, acdc, mscmrseg, la2018", "acdc17", src, out)
    refused("no case has a mask 'hart'; there are heart", "totalsegmentator", src, out, "--structures", "aorta,hart")
    refused("'heart' is named twice", "totalsegmentator", src, out, "--structures", "heart,aorta,heart")
    refused("the set has no label 'tumour'; there are tumor", "kits23", kits, out, "--structures", "kidney,tumour")
    refused("mscmrseg has lge and c0 and t2", "mscmrseg", src, out, "--modality", "ct")
    assert not out.exists()


def test_the_output_is_never_mixed_with_something_else(tmp_path: Path) -> None:
    src, out = totalsegmentator(tmp_path / "src"), tmp_path / "out"
    convert("totalsegmentator", src, out)
    before = hashes(out)
    refused("holds something else", "totalsegmentator", src, out, "--structures", "heart")
    refused("holds something else", "kits23", kits23(tmp_path / "kits"), out)
    assert hashes(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset.json").write_text("{}")
    refused("holds something else", "totalsegmentator", src, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["dataset.json"]
    before = hashes(src)
    refused("never changed", "totalsegmentator", src, src)
    refused("never changed", "totalsegmentator", src, src / "new")
    assert hashes(src) == before


def test_a_case_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    src = acdc(tmp_path / "src")
    (src / "testing" / "patient101").rename(src / "testing" / "patient001")
    nifti(src / "testing" / "patient001" / "patient001_frame01.nii.gz", image())
    refused("patient001_frame01 twice", "acdc", src, tmp_path / "out")


def test_real_labels_survive_the_detour_over_the_public_layout(tmp_path: Path) -> None:
    real = real_set("acdc")
    for case in read_dataset(real).cases[:4]:
        folder = tmp_path / "src" / case.id.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        assert case.label is not None
        (folder / f"{case.id}.nii.gz").write_bytes(case.images[0].read_bytes())
        (folder / f"{case.id}_gt.nii.gz").write_bytes(case.label.read_bytes())
    for case in read_back(convert("acdc", tmp_path / "src", tmp_path / "out")).cases:
        original = read_dataset(real).case(case.id)
        assert case.images[0].read_bytes() == original.images[0].read_bytes()
        assert np.array_equal(voxels(case.label), voxels(original.label))
