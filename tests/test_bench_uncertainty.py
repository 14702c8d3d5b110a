import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from genmed.bench import uncertainty
from genmed.bench.uncertainty import (
    ALL,
    EVERYWHERE,
    INPUTS,
    NEAR,
    Finding,
    Findings,
    judge,
    read_findings,
    report,
    run,
    write_findings,
)
from genmed.calibration import ece, reliability
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import Model
from genmed.tasks.segment import Interval, Segmentation, segment
from genmed.volume import Volume

SHAPE = (24, 16, 16)
IDS = [f"hippocampus_{number:03d}" for number in range(1, 7)]  # files 2k - 1 and 2k are one person
PLAN = replace(tiny.PLAN, labels=("background", "Anterior", "Posterior"))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(plan=PLAN, denoiser=build(PLAN).eval().requires_grad_(False), folder=None, sha256="0" * 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bright blocks in noise, in MSD layout, with a split beside them."""
    rng = np.random.default_rng(0)
    noisy = {id: (100 * truth().data + rng.normal(0, 10, (1, *SHAPE))).astype(np.float32) for id in IDS}
    cases = {id: (image, truth().data) for id, image in noisy.items()}
    folder = tiny.write_msd(tmp_path_factory.mktemp("Hippocampus"), "Hippocampus", PLAN.labels, cases)
    split = {"dataset": "Hippocampus", "train": IDS[:2], "tune": IDS[2:], "report": []}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def truth() -> Volume:
    label = np.zeros((1, *SHAPE), np.uint8)
    label[0, 4:10, 4:12, 4:12] = 1
    label[0, 10:18, 4:12, 4:12] = 2
    return Volume(label, np.eye(4), {1: "Anterior", 2: "Posterior"})


def found(soft: np.ndarray, surprise: float = 1.0, residual: float = 0.0) -> Segmentation:
    """A segmentation with given probabilities whose volume intervals are 0.3 to 0.5 ml."""
    working = Volume(np.zeros((1, *SHAPE), np.uint8), np.eye(4))
    intervals = {name: Interval(0.4, 0.3, 0.5) for name in PLAN.labels[1:]}
    labels = working.like(soft.argmax(axis=0).astype(np.uint8))
    return Segmentation(labels, working.like(soft), intervals, residual, "conditional", "none", 0.1, 0, None, surprise)


def sure(confidence: float, right: bool = True) -> np.ndarray:
    """Probabilities that give the true class (or the one after it) `confidence`, and the others the rest."""
    classes = truth().data[0].astype(int)
    chosen = classes if right else (classes + 1) % 3
    return np.where(np.arange(3)[:, None, None, None] == chosen, confidence, (1 - confidence) / 2)


def finding(name: str, case: str, soft: np.ndarray, plain: float = 1.0, residual: float = 0.0) -> Finding:
    return judge(PLAN, found(soft, 0.25, residual), truth(), name, case, 2.0, plain)


def test_judging_compares_with_the_truth_on_the_working_grid() -> None:
    one = finding("clean", IDS[0], sure(0.8))
    assert one.true_ml == pytest.approx({"Anterior": 6 * 64 / 1000, "Posterior": 8 * 64 / 1000})
    assert ece(one.claims[EVERYWHERE, ALL]) == pytest.approx(0.2)
    assert ece(finding("clean", IDS[0], sure(0.8, right=False)).claims[NEAR, ALL]) == pytest.approx(0.8)
    assert one.claims[EVERYWHERE, ALL].count.sum() == np.prod(SHAPE)
    block = np.zeros((24, 16, 16), bool)
    block[4:18, 4:12, 4:12] = True
    assert 64 * 14 - 64 < one.claims[NEAR, "Anterior"].count.sum() < np.prod(SHAPE) / 2
    calibrated = np.full((3, *SHAPE), (~block).mean())
    calibrated[1:] = np.array([6 * 64, 8 * 64])[:, None, None, None] / np.prod(SHAPE)
    even = finding("clean", IDS[0], calibrated)
    assert [ece(even.claims[EVERYWHERE, s]) for s in (ALL, "Anterior", "Posterior")] == pytest.approx([0, 0, 0])
    assert ece(even.claims[NEAR, ALL]) > 0.2


def test_coarse_working_grid_has_neighbours_near_its_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for near_mm in (0.5, 1.0):  # the voxels are 1 mm
        monkeypatch.setattr(uncertainty, "NEAR_MM", near_mm)
        counts.append(finding("clean", IDS[0], sure(0.8)).claims[NEAR, ALL].count.sum())
    assert counts[0] == counts[1] > 0


def test_truth_on_another_grid_is_refused() -> None:
    shifted = np.eye(4)
    shifted[0, 3] = 3
    with pytest.raises(GenMedError, match="resample one onto"):
        judge(PLAN, found(sure(0.8)), replace(truth(), affine=shifted), "clean", IDS[0], 1.0)


def test_findings_survive_the_disk_to_the_last_digit(tmp_path: Path) -> None:
    before = {
        ("clean", IDS[0]): finding("clean", IDS[0], sure(1 / 3 + 0.1), math.pi),
        ("4 slices", IDS[1]): finding("4 slices", IDS[1], sure(0.9), 2 / 3, residual=16 / 3),
    }
    assert read_findings(tmp_path) == {}
    write_findings(tmp_path, before)
    after = read_findings(tmp_path)
    people = {id: id for id in IDS[:2]}
    assert list(after) == list(before)
    for key, a in before.items():
        b = after[key]
        assert replace(a, claims={}) == replace(b, claims={})
        assert list(a.claims) == list(b.claims)
        for claim in a.claims:
            for name in ("edges", "confidence", "accuracy", "count"):
                np.testing.assert_array_equal(getattr(a.claims[claim], name), getattr(b.claims[claim], name))
    assert report(before, people, 4) == report(after, people, 4)


def test_bins_of_an_unfinished_case_are_not_counted(tmp_path: Path) -> None:
    both = {("clean", id): finding("clean", id, sure(0.9)) for id in IDS[:2]}
    write_findings(tmp_path, {("clean", IDS[0]): both["clean", IDS[0]]})
    finished = (tmp_path / "cases.csv").read_bytes()
    write_findings(tmp_path, both)
    (tmp_path / "cases.csv").write_bytes(finished)  # as a kill between the two files leaves them
    assert list(read_findings(tmp_path)) == [("clean", IDS[0])]


def test_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("case,dice\na,0.9\n")
    with pytest.raises(GenMedError, match="no table of this benchmark"):
        read_findings(tmp_path)


def test_table_gives_exact_numbers() -> None:
    """Person 1 has two cases, person 2 one; clean claims are 0.8 sure and right, degraded ones 0.7 and wrong."""
    findings: Findings = {}
    for k, id in enumerate(IDS[:3]):
        findings["clean", id] = finding("clean", id, sure(0.8), plain=1 + k)
        findings["4 slices", id] = finding("4 slices", id, sure(0.7, right=False), plain=2.5 + k)
    text = report(findings, dict(zip(IDS[:3], "aab", strict=True)), samples=4)
    clean, slices = (next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
                     for name in ("clean", "4 slices"))  # fmt: skip
    # true volumes 0.384 (inside 0.3 to 0.5) and 0.512 ml (0.012 above): score 0.2 + 40 × 0.012 for one of two
    shared = r"\| 50% \[19%, 81%\] \| 0\.200 \| 0\.440 \|"
    errors = r"0\.200 \[0\.200, 0\.200\] \| 0\.200 \[0\.200, 0\.200\]"
    assert re.search(rf"{errors} {shared} 2\.0 \|$", clean)
    assert re.search(rf"0\.700 .* {shared} 2\.0 \|$", slices)
    assert "3 cases of 2 persons, 4 samples each" in text
    assert re.search(r"\| 4 slices \| Anterior \| .* \| 100% \[44%, 100%\] \| 0\.200 \| 0\.200 \|", text)


def test_warnings_are_told_from_clean_ones_by_input_and_pooled() -> None:
    findings: Findings = {}
    for k, id in enumerate(IDS[:3]):
        findings["clean", id] = finding("clean", id, sure(0.8), plain=1 + k)
        findings["4 slices", id] = finding("4 slices", id, sure(0.8), plain=2.5 + k, residual=6.0 * (k > 0))
        findings["inverted", id] = finding("inverted", id, sure(0.8), plain=0)
        findings[uncertainty.TOLD, id] = finding(uncertainty.TOLD, id, sure(0.8), plain=9, residual=9)
    lines = uncertainty.warning_table(findings, dict(zip(IDS[:3], "aab", strict=True)))
    rows = {line.split(" | ")[0][2:]: re.sub(r" \[.*?\]", "", line).split(" | ")[1:] for line in lines[2:]}
    # plain surprise 2.5, 3.5, 4.5 against 1, 2, 3: 8 of 9 pairs; of residuals and flags 6 of 9, and 3 ties
    assert rows["clean"] == ["2.0", "–", "0.2", "–", "0.0", "–", "0 of 3", "– |"]
    assert rows["4 slices"] == ["3.5", "0.89", "0.2", "0.50", "6.0", "0.83", "2 of 3", "0.83 |"]
    assert rows["inverted"] == ["0.0", "0.00", "0.2", "0.50", "0.0", "0.50", "0 of 3", "0.50 |"]
    assert rows[uncertainty.TOLD][-2:] == ["3 of 3", "1.00 |"]
    assert rows["all but clean and told"] == ["1.2", "0.44", "0.2", "0.50", "0.0", "0.67", "2 of 6", "0.67 |"]


def test_run_segments_every_input_once_and_resumes(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def counted(model: Model, scan: Volume, **options: Any) -> Segmentation:
        if len(calls) == 3 and not (tmp_path / "interrupted").exists():
            (tmp_path / "interrupted").touch()
            raise KeyboardInterrupt
        calls.append(options | {"spacing_mm": scan.spacing_mm})
        return segment(model, scan, **(options | {"mode": "conditional", "match": "auto"}))

    monkeypatch.setattr(uncertainty, "segment", counted)
    monkeypatch.setattr(uncertainty, "draw", lambda out, findings: None)  # slow; has a test of its own
    options: dict[str, Any] = {"cases": 2, "samples": 3, "split": data / "split.json"}
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path, **options)
    text = run(model, data, tmp_path, **options)
    assert len(calls) == 2 * len(INPUTS)
    assert all(call["samples"] == 3 and call["grid"] == "model" for call in calls)
    assert [call["match"] for call in calls[::2]] == 7 * ["auto"] + ["affine"]
    assert [call["observed"] is not None for call in calls[::2]] == [name == "4 slices" for name in INPUTS]
    assert calls[2]["spacing_mm"] == (8.0, 8.0, 8.0)
    assert run(model, data, tmp_path, **options) == text == (tmp_path / "table.md").read_text()
    assert len(calls) == 2 * len(INPUTS)
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["input"], row["case"], row["structure"]) for row in rows] == [
        (name, id, structure) for name in INPUTS for id in (IDS[2], IDS[4]) for structure in PLAN.labels[1:]
    ]
    true_ml = {row["input"]: float(row["volume_ml_true"]) for row in rows if row["structure"] == "Anterior"}
    assert true_ml[uncertainty.LIE] == pytest.approx(true_ml["clean"] / 2) == 0.192  # as the header claims
    run(model, data, tmp_path, **(options | {"cases": 1}))
    assert len(calls) == 2 * len(INPUTS) and "1 cases of 1 persons" in (tmp_path / "table.md").read_text()


def test_other_weights_or_settings_are_not_mixed_in_one_folder(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncertainty, "INPUTS", {"clean": INPUTS["clean"]})
    monkeypatch.setattr(uncertainty, "draw", lambda out, findings: None)
    options: dict[str, Any] = {"cases": 1, "split": data / "split.json"}
    run(model, data, tmp_path, samples=3, **options)
    with pytest.raises(GenMedError, match="started with samples 3"):
        run(model, data, tmp_path, samples=4, **options)
    with pytest.raises(GenMedError, match="started with weights_sha256 000"):
        run(replace(model, sha256="1" * 64), data, tmp_path, samples=3, **options)
    with pytest.raises(GenMedError, match="at least 3 samples"):
        run(model, data, tmp_path / "other", samples=2, **options)
    with pytest.raises(GenMedError, match="part 'report' holds no case"):
        run(model, data, tmp_path / "other", part="report", split=data / "split.json")
    assert not (tmp_path / "other").exists()


def test_picture_has_a_panel_per_input_with_its_own_error(tmp_path: Path) -> None:
    findings = {
        ("clean", IDS[0]): finding("clean", IDS[0], sure(0.8)),
        ("8 mm voxels", IDS[0]): finding("8 mm voxels", IDS[0], sure(0.9, right=False)),
    }
    uncertainty.draw(tmp_path, findings)
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    words = re.findall(r"<!-- (.+?) -->", (tmp_path / "reliability.svg").read_text())
    assert [word for word in words if word.startswith("error")] == [
        "error 0.200 near boundaries",
        "error 0.900 near boundaries",
    ]
    assert {"Anterior", "Posterior", ALL, "claimed probability"} <= set(words)


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["uncertainty", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        uncertainty.main()
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_table_without_voxels_near_a_boundary_has_a_dash() -> None:
    one = finding("clean", IDS[0], sure(0.8))
    nowhere = np.zeros(SHAPE, bool)
    empty = reliability(sure(0.8), truth().data[0], where=nowhere)
    bare = replace(one, claims={key: empty if key[0] == NEAR else r for key, r in one.claims.items()})
    assert "| clean | – | 0.200 [" in report({("clean", IDS[0]): bare}, {IDS[0]: "a"}, 2)
