import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from real import real_set
from typer.testing import CliRunner

from genmed import hub, plan
from genmed.bench import segmentation, tables
from genmed.bench.cases import persons
from genmed.bench.segmentation import (
    Lab,
    Prediction,
    Row,
    Rows,
    Scores,
    Trained,
    draw,
    examine,
    read_rows,
    report,
    rows_shown,
    run,
    score,
    signed_rank_p,
    values_of,
    within,
    write_rows,
)
from genmed.bench.tables import METHODS, OURS, PLAIN, SETS, TABLES, Input, TrainingSet, change
from genmed.cli import app
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split, validate
from genmed.degrade import Degraded, coarser, crop, gaussian_noise
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.train import _start_from
from genmed.volume import Grid, Volume

SHAPE = (24, 16, 16)
IDS = [f"hippocampus_{number:03d}" for number in range(1, 11)]  # files 2k - 1 and 2k are one person
SPLIT = {"dataset": "Hippocampus", "train": IDS[:4], "tune": IDS[4:6], "report": IDS[6:9]}
NAMES = {0: "background", 1: "front", 4: "back"}
PRESET = plan.Preset(widths=(8, 16, 16), steps=2, batch=1, learning_rate=1e-3)
QUICK = 0.0005  # minutes


# A small world --------------------------------------------------------------------------------------------


def boxes(folder: Path, *structures: str) -> None:
    """Bright blocks in noise, in MSD layout."""
    rng = np.random.default_rng(0)
    cases = {id: tiny.blocks(rng, SHAPE, len(structures)) for id in IDS}
    tiny.write_msd(folder, "Hippocampus", ("background", *structures), cases)


def small_sets(data: Path) -> dict[str, TrainingSet]:
    return {
        "hippocampus": TrainingSet("Task04_Hippocampus", data / "split.json", 1.0, "small", 40),
        "left_atrium": TrainingSet("left_atrium", data / "split.json", 1.0, "small", 40),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two made-up sets under the names that the tables know, and a network small enough to train in a test."""
    data = tmp_path_factory.mktemp("data")
    boxes(data / "Task04_Hippocampus", "front", "back")
    boxes(data / "left_atrium", "left_atrium")
    (data / "split.json").write_text(json.dumps(SPLIT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.PRESETS, "small", PRESET)
        for name, small in small_sets(data).items():
            patch.setitem(SETS, name, small)
        yield Lab(data, tmp_path_factory.mktemp("runs"), QUICK)


@pytest.fixture(scope="module")
def trained(world: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Path, str]:
    """A whole run of the standard table with training; the lab, its output and its report."""
    out = tmp_path_factory.mktemp("out")
    methods = ["genmed", "genmed-interpolated", "dynunet-none"]
    return world, out, run(world.data, world.runs, out, table="standard", minutes=QUICK, methods=methods)


def entries(out: Path) -> list[dict[str, str]]:
    with (out / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Scores on the truth's grid -------------------------------------------------------------------------------


def block(x: int = 4) -> np.ndarray:
    """Label map of two blocks of 6 x 8 x 4 and 4 x 8 x 4 voxels."""
    label = np.zeros((20, 16, 12), np.uint8)
    label[x : x + 6, 4:12, 4:8] = 1
    label[x + 6 : x + 10, 4:12, 4:8] = 4
    return label


def certain(label: np.ndarray) -> np.ndarray:
    return np.stack([label == value for value in NAMES]).astype(np.float32)


TURN = np.array([[0, -1.5, 0, 7], [0, 0, 2, -3], [-1, 0, 0, 5], [0, 0, 0, 1.0]])  # axes exchanged and flipped


def test_scores_are_exact_on_a_turned_and_flipped_grid() -> None:
    truth = Volume(block()[None], TURN)
    turned = certain(block())[:, ::-1].transpose(0, 3, 1, 2)
    back = np.array([[0, -1, 0, 19], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # turned index -> truth index
    soft = Volume(np.ascontiguousarray(turned), TURN @ back)
    assert score(soft, soft.grid, truth, NAMES) == {"front": (1.0, 0.0, 1.0), "back": (1.0, 0.0, 1.0)}


def test_a_shift_of_the_header_costs_exactly_its_overlap() -> None:
    truth = Volume(block()[None], np.eye(4))
    shifted = np.eye(4)
    shifted[0, 3] = 2
    found = score(Volume(certain(block()), shifted), truth.grid, truth, NAMES)
    assert (found["front"].dice, found["back"].dice) == pytest.approx((4 / 6, 2 / 4))
    assert found["front"].hd95_mm == pytest.approx(2.0)


def test_probabilities_and_not_labels_are_interpolated() -> None:
    """Half a voxel off, a boundary between 0.9 and 0.2 falls at their mean, 0.55."""
    soft = np.zeros((2, 4, 2, 2), np.float32)
    soft[1, :, 0, 0] = soft[1, :, 1, 1] = soft[1, :, 0, 1] = soft[1, :, 1, 0] = (0.9, 0.9, 0.2, 0.2)
    soft[0] = 1 - soft[1]
    half = np.eye(4)
    half[0, 3] = 0.5
    truth = np.zeros((1, 3, 2, 2), np.uint8)
    truth[0, :2] = 1
    found = score(Volume(soft, np.eye(4)), Grid((4, 2, 2), np.eye(4)), Volume(truth, half), {0: "a", 1: "b"})
    assert found["b"].dice == 1


def test_truth_beyond_the_field_of_view_is_not_asked_for() -> None:
    truth = Volume(block()[None], TURN)
    step = np.eye(4)
    step[0, 3] = 7
    seen = Grid((13, 16, 12), TURN @ step)  # x from 7: half of the first block is cut off
    assert np.array_equal(within(seen, truth.grid), np.indices((20, 16, 12))[0] >= 7)
    cut = Volume(certain(block())[:, 7:], seen.affine)
    assert score(cut, seen, truth, NAMES)["front"] == (1.0, 0.0, 1.0)
    assert score(cut, truth.grid, truth, NAMES)["front"].dice < 1  # 6 voxels wide again: the last slice goes on


def test_coarse_voxels_reach_to_their_outer_edges() -> None:
    fine, coarse = Grid((8, 8, 8), np.eye(4)), Grid((2, 2, 2), np.diag([4, 4, 4, 1.0]))
    coarse.affine[:3, 3] = 1.5
    assert within(coarse, fine).all() and within(fine, coarse).all()


def test_scan_and_truth_that_share_nothing_are_refused() -> None:
    away = np.eye(4)
    away[0, 3] = 1000
    with pytest.raises(GenMedError, match="lies outside of the scan"):
        score(Volume(certain(block()), away), Grid((20, 16, 12), away), Volume(block()[None], np.eye(4)), NAMES)


# Inputs and tables ----------------------------------------------------------------------------------------


def test_tables_name_known_methods_and_each_row_once() -> None:
    for table in TABLES.values():
        assert set(table.methods) <= set(METHODS)
        for set_name, inputs in table.inputs.items():
            assert set_name in SETS
            names = [input.name for input in inputs]
            assert len({*names, *(i.group for i in inputs)}) == len(names) + len({i.group for i in inputs})
    assert len({(m.run, m.mode) for m in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("inputs", "shape", "affine"),
    [
        (tables.HIPPOCAMPUS_DEGRADED, (31, 40, 24), np.eye(4)),
        (tables.ACDC_DEGRADED, (60, 60, 6), np.diag([-1.5, -1.5, 10, 1])),
        (tables.LEFT_ATRIUM_DEGRADED, (80, 70, 44), np.diag([-1.25, -1.25, 1.25, 1])),
        (tables.OTHER_CONTRASTS, (31, 40, 24), np.eye(4)),
    ],
)
def test_every_row_but_the_clean_one_changes_the_scan(
    inputs: tuple[Input, ...], shape: Any, affine: np.ndarray
) -> None:
    scan = Volume(np.random.default_rng(0).normal(100, 20, (1, *shape)).astype(np.float32), affine)
    made = [input.degrade(scan, "a") for input in inputs]
    assert np.array_equal(made[0].scan.data, scan.data)
    for k, one in enumerate(made):
        assert one.slice_thickness_mm is None and np.isfinite(one.scan.data).all()
        assert not any(np.array_equal(one.scan.data, other.scan.data) for other in made[:k])


def test_noise_is_another_for_every_case_but_the_same_in_every_run() -> None:
    scan = Volume(np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32), np.eye(4))
    noisy = Input("noisy", (change(gaussian_noise, by_case=True, sd=0.5),))
    first, again, other = (noisy.degrade(scan, case).scan.data for case in "aab")
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_unknown_slice_thickness_is_really_not_told() -> None:
    row = next(i for i in tables.HIPPOCAMPUS_DEGRADED if "not told" in i.name)
    scan = Volume(np.random.default_rng(0).normal(size=(1, 31, 40, 24)).astype(np.float32), np.eye(4))
    with_gaps = row.changes[0](scan, "a")
    assert with_gaps.slice_thickness_mm == 4 and row.degrade(scan, "a").slice_thickness_mm is None
    assert np.array_equal(with_gaps.scan.data, row.degrade(scan, "a").scan.data)


def test_every_second_slice_keeps_neighbours_apart() -> None:
    for slices in (6, 7, 18):
        scan = Volume(np.ones((1, 4, 4, slices), np.float32), np.eye(4))
        kept = np.flatnonzero(tables.every_second(scan, 2).seen[0, 0])
        assert (np.diff(kept) == 2).all() and len(kept) == (slices + 1) // 2


@pytest.mark.parametrize("table", ["standard", "degraded"])
def test_left_atrium_is_compared_with_one_peer(table: str) -> None:
    assert segmentation._columns(TABLES[table], "left_atrium", None) == [OURS, PLAIN, "dynunet"]


def test_sets_never_trained_on_are_kept_for_the_report() -> None:
    assert [i.name for i in segmentation._table("zeroshot", "acdc", "tune", None)[1] if i.folder] == []
    assert [i.folder for i in segmentation._table("zeroshot", "acdc", "report", None)[1] if i.folder] == ["mscmr_lge"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"table": "nonsense"}, "--table nonsense: unknown"),
        ({"table": "confirmed", "set_name": "acdc"}, "--set acdc: not in table confirmed; choose one of hippocampus-1"),
        ({"table": "standard", "methods": []}, "--methods: names none; choose from genmed,"),
        ({"table": "standard", "methods": ["magic"]}, "--methods magic: not in this table"),
        ({"table": "confirmed"}, "no --data"),  # its only set need not be named
    ],
)
def test_a_table_that_cannot_be_is_refused(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match=re.escape(words)):
        run(None, tmp_path, tmp_path, **asked)


def test_split_of_the_left_atrium_keeps_groups_apart() -> None:
    dataset = read_dataset(real_set("left_atrium"))
    split = read_split(tables.SPLITS / "left_atrium.json", dataset.ids)
    assert sorted(split.ids) == sorted(dataset.ids)
    groups = persons(dataset, dataset.ids)
    assert len(set(groups.values())) == 56
    validate(split, groups)


def test_groups_file_says_who_is_whom(world: Lab, tmp_path: Path) -> None:
    dataset = read_dataset(world.data / "left_atrium")
    assert persons(dataset, IDS[:3]) == {IDS[0]: "person_001", IDS[1]: "person_001", IDS[2]: "person_002"}
    (tmp_path / "groups.csv").write_text(f"id,group\n{IDS[0]},7\n{IDS[2]},7\n")
    assert set(persons(replace(dataset, folder=tmp_path), [IDS[0], IDS[2]]).values()) == {"group 7"}
    with pytest.raises(GenMedError, match="no entry"):
        persons(replace(dataset, folder=tmp_path), [IDS[1]])


# Rows -----------------------------------------------------------------------------------------------------


def row(input: str, method: str, case: str, dice: float, key: str = "k", hd95_mm: float = 1.0, **how: Any) -> Row:
    scores = {"front": Scores(dice, hd95_mm, 0.9), "back": Scores(dice - 0.2, 2.0, 0.7)}
    usual: dict[str, Any] = {
        "mode": "conditional", "match": "none", "residual": None, "surprise": None, "slice_thickness_mm": None,
        "doubtful": None,
    }  # fmt: skip
    return Row("report", input, method, case, key, scores, 1 / 3, **(usual | how))


def test_the_table_counts_what_segment_warned_of() -> None:
    warned = (True, False, True, None, None)
    rows = [row("clean", "genmed", f"c{k}", 0.5, doubtful=each) for k, each in enumerate(warned)]
    text = segmentation.choice_table({r.place: r for r in rows}, [Input("clean")], ["genmed"])
    assert "| 2 of 5 |" in text


def test_rows_survive_the_disk_to_the_last_digit(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    rows = [
        row("clean", "genmed", "a", 1 / 3, residual=0.1, surprise=-2 / 7, slice_thickness_mm=2.0, doubtful=True),
        row("clean", "genmed", "b", 1 / 3, doubtful=False),
        row('4 mm slices, "gaps"', "dynunet", "b", 0.9, hd95_mm=float("inf"), mode="", match=""),
    ]
    assert read_rows(path, ["front", "back"]) == {}
    write_rows(path, ["front", "back"], rows)
    assert list(read_rows(path, ["front", "back"]).values()) == rows
    assert float(entries(tmp_path)[0]["dice"]) == pytest.approx(1 / 3 - 0.1)
    with pytest.raises(GenMedError, match="no table of this benchmark"):
        read_rows(path, ["front"])


def test_a_method_that_refuses_a_scan_has_found_nothing(world: Lab) -> None:
    def refuse(worse: Degraded) -> Prediction:
        raise GenMedError("diverged")

    names = {0: "background", 1: "front", 2: "back"}
    method = Trained(world.runs, "0", {}, names, 1, 0.5, refuse)
    found, scores, _ = examine(method, read_dataset(world.data / "Task04_Hippocampus"), IDS[6], Input("clean"))
    assert found.mode == "failed" and scores["front"] == (0.0, float("inf"), 0.0)
    other = replace(method, names={0: "background", 1: "front", 2: "middle"})
    with pytest.raises(GenMedError, match="has the labels background, front, back, but not middle"):
        examine(other, read_dataset(world.data / "Task04_Hippocampus"), IDS[6], Input("clean"))


# The report -----------------------------------------------------------------------------------------------


PEOPLE = dict(zip("abcdef", "ppqrst", strict=True))
INPUTS = (Input("clean"), Input("curve 0", group="curves"), Input("curve 1", group="curves"))


def some_rows(dices: dict[str, float]) -> Rows:
    """Every case of every input; the second case is 0.1 better, curves are 0.1 and 0.3 worse."""
    found = [
        row(input.name, method, case, dice + 0.1 * (case == "b") - (0, 0.1, 0.3)[k])
        for k, input in enumerate(INPUTS)
        for method, dice in dices.items()
        for case in PEOPLE
    ]
    return {one.place: one for one in found}


def test_groups_are_averaged_after_their_last_row() -> None:
    assert rows_shown(INPUTS) == {
        "clean": ["clean"], "curve 0": ["curve 0"], "curve 1": ["curve 1"], "curves": ["curve 0", "curve 1"]
    }  # fmt: skip
    values = values_of(some_rows({"genmed": 0.9}), ["curve 0", "curve 1"], "genmed")
    assert values == pytest.approx({"a": 0.6, "b": 0.7, "c": 0.6, "d": 0.6, "e": 0.6, "f": 0.6})
    missed = {("clean", "genmed", "a"): row("clean", "genmed", "a", 0.5, hd95_mm=float("inf"))}
    assert values_of(missed, ["clean"], "genmed", "hd95_mm") == {"a": 51.0}


def test_report_gives_exact_means_differences_and_p() -> None:
    columns = ["genmed", "genmed-interpolated", "dynunet", "diffusion", "genmed-degraded"]
    rows = some_rows(dict(zip(columns, (0.9, 0.85, 0.7, 0.8, 0.95), strict=True)))
    text = report(rows, INPUTS, columns, PEOPLE, "", "title")
    lines = text.splitlines()
    dice = lines[lines.index("## Dice") :]
    mean = 0.8 + 0.1 / 6
    assert dice[4].startswith(f"| clean | 6 | **{mean:.3f} [0.800, ")
    assert dice[4].count("**") == 2 and dice[4].count(" | ") == 5  # the training on coarse voxels stands elsewhere
    assert dice[7].startswith(f"| curves | 6 | **{mean - 0.2:.3f} ")
    assert "| 0.867 [0.850, " in text[text.index("trained on degraded patches") :]
    start = lines.index("## Paired differences of Dice")
    # 5 persons, all better by the same: the smallest two-sided p is 2 / 2^5
    ours = "GenMed, automatic"
    assert lines[start + 4] == f"| clean | {ours} | conditional diffusion | +0.100 [+0.100, +0.100] | 0.062 |"
    assert lines[start + 5] == (
        f"| clean | {ours} | GenMed, interpolation + one evaluation | +0.050 [+0.050, +0.050] | 0.062 |"
    )
    hd95 = lines[lines.index("## HD95 (mm)") :]
    assert hd95[4].count("**") == 8  # a tie: all are best


def test_trainings_are_compared_with_peers_of_the_same_patches() -> None:
    scores = {"genmed": 0.9, "dynunet": 0.8, "genmed-mixed": 0.85, "dynunet-mixed": 0.82, "genmed-degraded": 0.5}
    lines = report(some_rows(scores), INPUTS, list(scores), PEOPLE, "", "title").splitlines()
    start = lines.index("## Paired differences of Dice")
    assert [line.rsplit(" [", 1)[0] for line in lines[start + 4 : start + 6]] == [
        "| clean | GenMed, automatic | DynUNet | +0.100",
        "| clean | GenMed, automatic, usual and random contrasts | DynUNet, usual and random contrasts | +0.030",
    ]
    alone = report(some_rows({"genmed-mixed": 0.85}), INPUTS, ["genmed-mixed"], PEOPLE, "", "title")
    assert "Paired differences" not in alone


def test_missed_and_refused_structures_are_told() -> None:
    rows = some_rows({"genmed": 0.9})
    place = ("clean", "genmed", "a")
    rows[place] = row(*place, 0.2, hd95_mm=float("inf"), mode="failed")
    text = report(rows, INPUTS, ["genmed"], PEOPLE, "", "title")
    assert "missed (1 in all) counts 100 mm" in text and "1 scans were refused" in text
    assert "| clean | GenMed, automatic | conditional, match none: 5; failed, match none: 1 |" in text


def test_p_counts_persons_and_not_cases() -> None:
    assert signed_rank_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), list("abcdef")) == pytest.approx(2 / 2**6)
    assert signed_rank_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), list("aabbcc")) == pytest.approx(2 / 2**3)
    assert signed_rank_p(np.zeros(4), list("abcd")) == 1


def test_picture_names_every_row_and_method(tmp_path: Path) -> None:
    draw(tmp_path, some_rows({"genmed": 0.9, "genmed-degraded": 0.8}), INPUTS, ["genmed", "genmed-degraded"], PEOPLE)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    words = (tmp_path / "table.svg").read_text()
    for name in (*rows_shown(INPUTS), METHODS["genmed"].title, METHODS["genmed-degraded"].title):
        assert f"<!-- {name} -->" in words


# Whole runs -----------------------------------------------------------------------------------------------


def test_run_trains_what_is_missing_and_writes_everything(trained: tuple[Lab, Path, str]) -> None:
    lab, out, text = trained
    assert {path.name for path in (lab.runs / "hippocampus").iterdir()} == {"genmed", "dynunet-none"}
    assert {path.name for path in out.iterdir()} == {"cases.csv", "table.md", "table.png", "table.svg"}
    methods = ("genmed", "genmed-interpolated", "dynunet-none")
    assert [(e["input"], e["method"], e["case"]) for e in entries(out)] == [
        ("clean", method, case) for method in methods for case in IDS[6:9]
    ]
    assert text == (out / "table.md").read_text() and "| clean | 3 | " in text
    budget = text[text.index("## How the budget was spent") :]
    assert budget.count("| genmed |") == 1 and "| dynunet-none | 0.0 | " in budget
    first = entries(out)[0]
    assert 0 <= float(first["dice front"]) <= 1 and first["mode"] and float(first["seconds"]) > 0


def test_missing_trainings_are_named_in_one_line(world: Lab, tmp_path: Path) -> None:
    options: dict[str, Any] = {"table": "degraded", "may_train": False, "methods": ["dynunet", "swinunetr"]}
    with pytest.raises(GenMedError, match=r"^not trained: .*hippocampus/dynunet, .*swinunetr; run without --no-train"):
        run(world.data, tmp_path / "none", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "none").exists()


def test_finished_rows_are_kept_and_those_of_other_weights_redone(
    trained: tuple[Lab, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, finished, text = trained
    out, runs = tmp_path / "out", tmp_path / "runs"
    shutil.copytree(finished, out)
    shutil.copytree(lab.runs, runs)
    examined: list[str] = []

    def counted(trained: Trained, dataset: Any, id: str, input: Input) -> Any:
        examined.append(f"{trained.folder.name} {id}")
        return examine(trained, dataset, id, input)

    monkeypatch.setattr(segmentation, "examine", counted)
    options: dict[str, Any] = {"table": "standard", "methods": ["genmed", "genmed-interpolated", "dynunet-none"]}
    lines = (out / "cases.csv").read_text().splitlines(keepends=True)
    (out / "cases.csv").write_text("".join(lines[:-1]))
    assert run(lab.data, runs, out, may_train=False, **options).splitlines()[:12] == text.splitlines()[:12]
    assert examined == [f"dynunet-none {IDS[8]}"]
    folder = runs / "hippocampus" / "genmed" / "best"
    model = hub.load(folder)
    weights = {name: value + 0.01 for name, value in model.denoiser.state_dict().items()}
    hub.save_model(folder, model.plan, weights, hub.read_card(folder))
    examined.clear()
    run(lab.data, runs, out, may_train=False, **options)
    assert examined == [f"genmed {id}" for id in (*IDS[6:9], *IDS[6:9])]
    assert len(entries(out)) == 9


def test_other_cases_add_rows_and_are_reported_alone(trained: tuple[Lab, Path, str], tmp_path: Path) -> None:
    lab, finished, _ = trained
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    options: dict[str, Any] = {"table": "standard", "may_train": False, "methods": ["genmed-interpolated"]}
    text = run(lab.data, lab.runs, out, part="tune", cases=1, **options)
    assert "| clean | 1 | " in text and len(entries(out)) == 10 and entries(out)[-1]["case"] == IDS[4]
    assert entries(out)[-1]["part"] == "tune"


def test_bundled_model_stands_for_a_training_without_any_run(
    trained: tuple[Lab, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, _, _ = trained
    bundled = tmp_path / "models" / "hippocampus-mr"
    shutil.copytree(lab.runs / "hippocampus" / "genmed" / "best", bundled)
    monkeypatch.setattr(hub, "BUNDLED", bundled.parent)
    monkeypatch.setitem(SETS, "hippocampus-1mm", replace(SETS["hippocampus"], model="hippocampus-mr"))
    runs, options = tmp_path / "runs", {"table": "confirmed", "cases": 1}
    text = run(lab.data, runs, tmp_path / "out", methods=[OURS, PLAIN], may_train=False, **options)
    assert [(e["input"], e["method"]) for e in entries(tmp_path / "out")] == [
        (row.name, method) for row in TABLES["confirmed"].inputs["hippocampus-1mm"] for method in (OURS, PLAIN)
    ]
    assert text.count("| hippocampus-mr (bundled) |") == 1 and not runs.exists()
    with pytest.raises(GenMedError, match=f"^not trained: {runs}/hippocampus-1mm/dynunet; run without"):
        run(lab.data, runs, tmp_path / "out", may_train=False, **options)
    run(lab.data, runs, tmp_path / "out", methods=[OURS], **options)  # allowed to train, it still does not
    assert not runs.exists()


def test_bundled_models_stand_for_trainings_on_the_same_patches() -> None:
    for training in SETS.values():
        if training.model:
            assert METHODS[training.run].augmentation == hub.load(training.model).plan.augmentation


def test_few_shot_draws_train_apart_and_may_start_from_another_structure(
    world: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"hippocampus": tables.FEW_SHOT[:2]}
    monkeypatch.setitem(TABLES, "fewshot", replace(TABLES["fewshot"], inputs=few))
    methods = ["genmed", "genmed-from-left_atrium"]
    runs = tmp_path / "runs"
    text = run(world.data, runs, tmp_path / "out", table="fewshot", minutes=QUICK, methods=methods, cases=1)
    assert sorted(str(path.relative_to(runs)) for path in runs.glob("*/*")) == [
        "hippocampus/genmed-cases2-draw0", "hippocampus/genmed-cases2-draw1",
        "hippocampus/genmed-from-left_atrium-cases2-draw0", "hippocampus/genmed-from-left_atrium-cases2-draw1",
        "left_atrium/genmed",
    ]  # fmt: skip
    plans = [hub.load(runs / "hippocampus" / f"genmed-cases2-draw{draw}").plan for draw in (0, 1)]
    assert [(plan.cases, plan.draw) for plan in plans] == [(2, 0), (2, 1)]
    assert "| 2 training cases, mean of draws | 1 | " in text
    assert "tensors taken whole" in capsys.readouterr().out


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_bench_segmentation import PRESET, SETS, plan, run, small_sets
data = Path({data!r})
SETS |= small_sets(data)
plan.PRESETS["small"] = PRESET
run(data, {runs!r}, {out!r}, table="degraded", methods=["genmed-interpolated"], may_train=False)
"""


def test_a_kill_loses_at_most_the_case_in_progress(
    trained: tuple[Lab, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, _, _ = trained
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), data=str(lab.data), runs=str(lab.runs), out=str(tmp_path / "out")
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    path, ends = tmp_path / "out" / "cases.csv", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < ends and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_rows(path, ["front", "back"])
    assert path.read_bytes().endswith(b"\n") and 3 <= len(before) < 48
    examined: list[str] = []
    monkeypatch.setattr(
        segmentation, "examine", lambda *given: examined.append(given[2]) or examine(*given)
    )
    run(lab.data, lab.runs, tmp_path / "out", table="degraded", methods=["genmed-interpolated"], may_train=False)
    after = read_rows(path, ["front", "back"])
    assert len(after) == 16 * 3 and len(examined) == 16 * 3 - len(before)
    assert all(after[place] == row for place, row in before.items())


def test_peers_see_what_one_evaluation_of_ours_sees(
    trained: tuple[Lab, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from genmed.tasks import segment as ours

    lab, _, _ = trained
    scan = Volume(np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32), np.eye(4))
    worse = crop(coarser(scan, 3), 0.8)
    seen: list[torch.Tensor] = []
    plain = ours.conditional
    monkeypatch.setattr(ours, "conditional", lambda net, image, *more: seen.append(image) or plain(net, image, *more))
    first = segmentation.load_ours(lab.runs / "hippocampus" / "genmed", "conditional").predict(worse)
    peer = segmentation.load_theirs(lab.runs / "hippocampus" / "dynunet-none")
    answer = torch.zeros(1, 3, *seen[0].shape[2:])
    monkeypatch.setattr(segmentation.peers.TrainedPeer, "__call__", lambda self, image: seen.append(image) or answer)
    second = peer.predict(worse)
    assert torch.equal(seen[0], seen[1])
    assert first.soft.grid.shape == second.soft.grid.shape and np.array_equal(first.soft.affine, second.soft.affine)


# Starting from another structure --------------------------------------------------------------------------


def joint(labels: tuple[str, ...], seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    made = plan.Plan(
        name="joint", channels=("MRI",), labels=("background", *labels), label_values=tuple(range(1 + len(labels))),
        spacing_mm=(1, 1, 1), patch=(16, 16, 16), widths=(8, 16), batch=1, steps=1, learning_rate=1e-3,
        thick_slices=False, extent_mm=(40, 40, 40),
    )  # fmt: skip
    denoiser = build(replace(made, **changes))
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight)
    return denoiser, replace(made, **changes)


def test_weights_of_another_structure_are_taken_but_for_its_labels(tmp_path: Path) -> None:
    source, source_plan = joint(("atrium",), 0)
    hub.save_model(tmp_path, source_plan, source.state_dict(), hub.Card("a", "b", "c"), half=False)
    target, _ = joint(("front", "back"), 1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    _start_from(target, tmp_path)
    theirs = source.state_dict()
    conv = "net.down.0.conv1.weight"
    for name, value in target.state_dict().items():
        if name == conv:
            assert torch.equal(value[:, :1], theirs[name][:, :1]) and torch.equal(value[:, 1:], before[name][:, 1:])
        elif name in ("net.head.weight", "net.head.bias"):
            assert torch.equal(value[:1], theirs[name][:1]) and torch.equal(value[1:], before[name][1:])
        else:
            assert torch.equal(value, theirs[name])


@pytest.mark.parametrize("changes", [{"widths": (8, 24)}, {"channels": ("MRI", "CT")}, {"widths": (8, 16, 16)}])
def test_weights_of_another_architecture_are_refused_untouched(changes: dict[str, Any], tmp_path: Path) -> None:
    source, source_plan = joint(("atrium",), 0)
    hub.save_model(tmp_path, source_plan, source.state_dict(), hub.Card("a", "b", "c"), half=False)
    target, _ = joint(("front", "back"), 1, **changes)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(GenMedError, match="does not fit this plan"):
        _start_from(target, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


# The command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--table nonsense", "--table nonsense: unknown"),
        ("--table fewshot --set acdc", "--set acdc: not in table fewshot"),
        ("--table standard --part train", "--part train"),
        ("--table standard --cases 0", "--cases 0"),
        ("--table standard --minutes 0", "--minutes 0: must be above 0"),
        ("--table standard --set acdc --methods swinunetr", "--methods swinunetr: not in this table"),
        ("--table standard", "GENMED_DATA"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GENMED_DATA", raising=False)
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["bench", "segmentation", *folders, *options.split()])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert not (tmp_path / "out").exists()


def test_options_reach_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(segmentation, "run", lambda *given, **named: asked.update(named, given=given))
    options = "--table fewshot --runs r --out o --set acdc --part tune --cases 3 --minutes 2.5 --methods a,b --no-train"
    result = CliRunner().invoke(app, ["bench", "segmentation", *options.split()], env={"GENMED_DATA": "d"})
    assert result.exit_code == 0, result.output
    assert asked == {
        "given": (Path("d"), Path("r"), Path("o")), "table": "fewshot", "set_name": "acdc", "part": "tune",
        "cases": 3, "minutes": 2.5, "methods": ["a", "b"], "may_train": False,
    }  # fmt: skip
    assert OURS in METHODS and PLAIN in METHODS
