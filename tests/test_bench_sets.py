"""The full public sets in the bench: from their authors' folders to a table, and who is in which part."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from genmed import plan
from genmed.bench import tables
from genmed.bench.cases import prepared, split_of
from genmed.bench.segmentation import Trained, run, truth_of
from genmed.bench.tables import CHAMBERS, FULL, METHODS, PREPARED, SETS, TABLES, Input
from genmed.data.convert import MMWHS_VALUES, convert
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.errors import GenMedError
from genmed.volume import Volume, read_labels

IDS = [f"case_{number:05d}" for number in range(12)]
CHAMBER_VALUES = (500, 600, 420, 550, 205)  # LV, RV, LA, RA and MYO, as the tables ask for them
TWO_MM = np.diag([2.0, 2.0, 2.0, 1.0])


def kits(data: Path, count: int = len(IDS)) -> Path:
    """A converted set of empty scans: who is in which part does not depend on voxels."""
    blank = np.zeros((1, 2, 2, 2), np.uint8)
    cases = dict.fromkeys(IDS[:count], (blank, blank))
    return tiny.write_msd(data / "kits23", "kits23", ("background", "kidney"), cases)


def parts(path: Path) -> tuple[tuple[str, ...], ...]:
    split = read_split(path)
    return split.train, split.tune, split.report


# Splits ---------------------------------------------------------------------------------------------------


def test_a_split_is_drawn_once_and_is_the_same_wherever_it_is_drawn(tmp_path: Path) -> None:
    data = kits(tmp_path / "data").parent
    path = split_of(data, tmp_path / "runs", "kits23")
    assert path == tmp_path / "runs" / "kits23" / "split.json"
    before = path.read_bytes()
    assert sorted(read_split(path, IDS).ids) == IDS and [len(part) for part in parts(path)] == [8, 1, 3]
    assert split_of(data, tmp_path / "other", "kits23").read_bytes() == before


def test_a_split_is_never_redrawn(tmp_path: Path) -> None:
    folder, runs = kits(tmp_path / "data", 10), tmp_path / "runs"
    path = split_of(folder.parent, runs, "kits23")
    before = path.read_bytes()
    kits(tmp_path / "data")  # more cases are converted,
    (folder / "split.json").write_text(json.dumps({"dataset": "kits23", "train": IDS[:4], "tune": [], "report": []}))
    assert split_of(folder.parent, runs, "kits23") == path and path.read_bytes() == before  # or a split appears


def test_the_split_of_the_data_goes_before_a_drawn_one_and_stays(tmp_path: Path) -> None:
    folder, runs = kits(tmp_path / "data"), tmp_path / "runs"
    own = {"dataset": "kits23", "train": IDS[6:], "tune": IDS[3:5], "report": IDS[:2]}
    (folder / "split.json").write_text(json.dumps(own))
    path = split_of(folder.parent, runs, "kits23")
    assert parts(path) == (tuple(IDS[6:]), tuple(IDS[3:5]), tuple(IDS[:2]))
    (folder / "split.json").write_text(json.dumps(own | {"train": IDS[:2], "report": IDS[6:]}))
    assert parts(split_of(folder.parent, runs, "kits23"))[2] == tuple(IDS[:2])


def test_drawn_splits_keep_persons_together(tmp_path: Path) -> None:
    folder = kits(tmp_path / "data")
    who = {id: str(number // 2) for number, id in enumerate(IDS)}
    with (folder / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "group"), *who.items()])
    drawn = parts(split_of(folder.parent, tmp_path / "runs", "kits23"))
    people = [{who[id] for id in part} for part in drawn]
    assert all(people) and sum(map(len, people)) == len(set(who.values())) == len(set.union(*people))


def test_a_split_of_other_cases_is_refused_and_none_is_written(tmp_path: Path) -> None:
    folder = kits(tmp_path / "data", 10)
    (folder / "split.json").write_text(
        json.dumps({"dataset": "kits23", "train": IDS[:8], "tune": IDS[8:9], "report": IDS[9:]})
    )
    with pytest.raises(GenMedError, match=r"split\.json: 2 ids such as 'case_00010' are not in the data set"):
        split_of(folder.parent, tmp_path / "runs", "kits23")
    assert not (tmp_path / "runs").exists()


def test_splits_of_the_repository_are_used_as_they_are(tmp_path: Path) -> None:
    assert split_of(tmp_path, tmp_path / "runs", "acdc") == tables.SPLITS / "acdc.json"
    assert not (tmp_path / "runs").exists()


# Folders and tables ---------------------------------------------------------------------------------------


def test_every_folder_of_the_tables_has_its_command(tmp_path: Path) -> None:
    rows = [input for table in TABLES.values() for inputs in table.inputs.values() for input in inputs]
    assert {training.folder for training in SETS.values()} | {row.folder for row in rows if row.folder} == set(PREPARED)
    with pytest.raises(GenMedError) as refused:
        prepared(tmp_path, "mmwhs_mr")
    assert str(refused.value) == (
        f"{tmp_path / 'mmwhs_mr'}: holds no dataset.json; download the set to SRC, then: genmed data convert mmwhs "
        f"SRC {tmp_path / 'mmwhs_mr'} --modality mr --structures LV,RV,LA,RA,MYO"
    )


def test_full_sets_are_in_the_published_tables() -> None:
    assert all(set(FULL) <= set(TABLES[name].inputs) for name in ("standard", "degraded", "fewshot"))
    beyond = {name: [row.folder for row in TABLES["zeroshot"].inputs.get(name, ()) if row.folder] for name in FULL}
    assert beyond == {
        "totalsegmentator": ["totalsegmentator_mr"], "totalsegmentator_v1": ["mmwhs_ct", "mmwhs_mr"],
        "mmwhs_ct": ["mmwhs_mr"], "kits23": [],
    }  # fmt: skip
    compared = [name for name in TABLES["fewshot"].methods if "kits23" in (METHODS[name].sets or SETS)]
    assert compared == ["genmed", "dynunet", "dynunet-none", "diffusion"]


@pytest.mark.parametrize("axis", [0, 2])
def test_rows_of_ct_degrade_along_the_body_however_the_array_lies(axis: int) -> None:
    """KiTS stores slices along the first axis, feet first; both scans are 180 slices of 2 mm across the body."""
    shape, affine = [4, 4, 4], np.zeros((4, 4))
    shape[axis] = 180
    affine[[2, 1, 0] if axis == 0 else [0, 1, 2], range(3)] = -2.0 if axis == 0 else 2.0
    affine[3, 3] = 1
    scan = Volume(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32), affine)
    across = tuple({0, 1, 2} - {axis})
    seen = np.flatnonzero(tables.slice_every(scan, 30).seen.any(axis=across))
    assert len(seen) == 12 and set(np.diff(seen)) == {15}
    gaps = tables.missing_every(scan, 40, 120)
    hidden = np.flatnonzero(~gaps.seen.any(axis=across))
    assert hidden.tolist() == [*range(20, 40), *range(80, 100), *range(140, 160)]
    assert (gaps.scan.data[0][~gaps.seen] == 0).all()
    assert tables.axial_slices(scan, 10).scan.grid.shape[axis] == 36


def test_short_scans_keep_something_to_look_at() -> None:
    scan = Volume(np.ones((1, 4, 4, 10), np.float32), TWO_MM)  # 20 mm
    assert np.flatnonzero(tables.missing_every(scan, 40, 120).seen[0, 0]).tolist() == [0, 9]
    assert tables.slice_every(scan, 30).seen[0, 0].sum() == 1


def test_structures_are_the_same_by_name_or_as_the_row_says(tmp_path: Path) -> None:
    drawn = np.array([0, 1, 2, 3, 4, 5], np.uint8).reshape(1, 6, 1, 1)
    folder = tiny.write_msd(tmp_path, "mmwhs", ("background", "LV", "RV", "LA", "RA", "MYO"), {"a": (drawn, drawn)})
    dataset = read_dataset(folder)
    names = dict(enumerate(("background", *CHAMBERS)))  # MYO, LA, LV, RA, RV
    trained = Trained(tmp_path, "0", {}, names, 1, 0.5, lambda worse: None)  # type: ignore[arg-type, return-value]
    row = Input("", folder="mmwhs", labels=CHAMBERS)
    assert truth_of(trained, dataset, dataset.case("a"), row).data.ravel().tolist() == [0, 3, 5, 2, 4, 1]
    few = replace(trained, names={0: "background", 4: "MYO"})
    assert truth_of(few, dataset, dataset.case("a"), Input("")).data.ravel().tolist() == [0, 0, 0, 0, 0, 4]
    with pytest.raises(GenMedError, match="but not heart_myocardium that"):
        truth_of(trained, dataset, dataset.case("a"), Input(""))


# From the authors' folders to a table ---------------------------------------------------------------------


def mmwhs(src: Path, modality: str, count: int) -> Path:
    """Five touching blocks in noise, in the layout of MM-WHS; in MR dark is bright."""
    rng = np.random.default_rng(0)
    folder = src / f"{modality}_train"
    folder.mkdir(parents=True)
    for number in range(1001, 1001 + count):
        image, label = tiny.blocks(rng, (48, 16, 16), 5)
        drawn = np.array([0, *CHAMBER_VALUES], np.int16)[label]
        drawn[0, 0, 0, 0] = 820  # the pulmonary artery, which no table asks for
        Volume(-image if modality == "mr" else image, TWO_MM).save(folder / f"{modality}_train_{number}_image.nii.gz")
        Volume(drawn, TWO_MM).save(folder / f"{modality}_train_{number}_label.nii.gz")
    return src


def test_mmwhs_goes_from_its_download_to_the_zero_shot_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, runs = tmp_path / "data", tmp_path / "runs"
    for modality, count in (("ct", 10), ("mr", 2)):
        src, chosen = mmwhs(tmp_path / modality, modality, count), [MMWHS_VALUES[value] for value in CHAMBER_VALUES]
        outcome = convert("mmwhs", src, data / f"mmwhs_{modality}", modality=modality, structures=chosen)
        assert not outcome.failed
        label = read_dataset(outcome.folder).cases[0].label
        assert label is not None and set(np.unique(read_labels(label).data)) == set(range(6))
    monkeypatch.setitem(plan.PRESETS, "base", plan.Preset(widths=(8, 16, 16), steps=2, batch=1, learning_rate=1e-3))
    options: dict[str, Any] = {"table": "zeroshot", "set_name": "mmwhs_ct", "methods": ["genmed-interpolated"]}
    text = run(data, runs, tmp_path / "out", minutes=0.0005, **options)
    train, _, report = parts(runs / "mmwhs_ct" / "split.json")
    assert json.loads((runs / "mmwhs_ct" / "genmed" / "plan.json").read_text())["spacing_mm"] == [2, 2, 2]
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mr = ["mr_train_1001", "mr_train_1002"]
    assert [(row["input"], row["case"]) for row in rows] == [
        *(("clean", id) for id in report), *(("MR scans (mmwhs_mr)", id) for id in mr)
    ]  # fmt: skip
    assert len(train) == 7 and not set(train) & set(report) and "dice MYO" in rows[0] and "dice PA" not in rows[0]
    assert "| MR scans (mmwhs_mr) | 2 | " in text
    (data / "mmwhs_mr" / "split.json").write_text(
        json.dumps({"dataset": "mmwhs", "train": mr[:1], "tune": [], "report": mr[1:]})
    )
    assert "| MR scans (mmwhs_mr) | 1 | " in run(data, runs, tmp_path / "out", may_train=False, **options)
