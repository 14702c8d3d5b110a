"""Schedules, and how long users wait, measured on a small untrained model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_segment import PLAN, random_denoiser

from genmed.bench import efficiency
from genmed.bench.efficiency import INPUTS, SCHEDULES, Row, Schedule, Wait, examine, measure, save, wait, wait_table
from genmed.bench.kept import read_rows
from genmed.bench.tables import HIPPOCAMPUS_INPUTS
from genmed.errors import GenMedError
from genmed.hub import Model
from genmed.tasks import segment as task
from genmed.tasks.segment import Sampling
from genmed.volume import Volume

IDS = ["hippocampus_001", "hippocampus_003"]


@pytest.fixture
def model() -> Model:
    return Model(plan=PLAN, denoiser=random_denoiser(), folder=None, sha256="0" * 64)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two persons in the part tune, whose split lies beside them."""
    cases = {id: tiny.blocks(np.random.default_rng(0), (16, 16, 16), 1) for id in IDS}
    folder = tiny.write_msd(tmp_path / "data", "Hippocampus", ("background", "front"), cases)
    split = {"dataset": "Hippocampus", "train": [], "tune": IDS, "report": []}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


# Schedules ------------------------------------------------------------------------------------------------

VARIANTS = [of for of in SCHEDULES if of.otherwise or of == Schedule(Sampling(8, 2))]


@pytest.mark.parametrize("of", VARIANTS, ids=str)
def test_every_kind_of_schedule_runs_and_its_evaluations_are_counted(
    of: Schedule, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = (Volume(array, np.eye(4)) for array in tiny.blocks(np.random.default_rng(0), (16, 16, 16), 1))
    scales: list[float] = []
    levels: list[float] = []
    plain, guided = task.denoise_with, task.guided

    def counted(model: Model, voxels: int):  # type: ignore[no-untyped-def]
        return lambda z, sigma: levels.append(sigma) or plain(model, voxels)(z, sigma)

    monkeypatch.setattr(task, "denoise_with", counted)
    monkeypatch.setattr(task, "guided", lambda *given, scale, **how: scales.append(scale) or guided(
        *given, scale=scale, **how))  # fmt: skip
    worse = HIPPOCAMPUS_INPUTS["4 slices"].degrade(image, IDS[0])
    calls, score, seconds = examine(model, worse, label, "none", of)
    assert scales == [1.0] and len(levels) == calls  # nothing diverged
    assert len(set(levels)) == 8 and calls == (15 if of.how.sampler == "heun" else 14 if of.how.travels else 8)
    assert 0 <= score <= 1 and seconds > 0


def test_settings_of_a_schedule_reach_sampler_guide_and_last_step(model: Model) -> None:
    image = Volume(tiny.blocks(np.random.default_rng(0), (16, 16, 16), 1)[0], np.eye(4))
    worse = HIPPOCAMPUS_INPUTS["4 slices"].degrade(image, IDS[0])
    view = efficiency.View.of(PLAN, worse.scan, worse.observed)

    def pair(mode: str = "joint", **how: object):  # type: ignore[no-untyped-def]
        return task.guided_pair(model, view, mode, task.MATCHES["none"], [0], Sampling(4, **how))  # type: ignore[arg-type]

    usual = pair()
    assert pair(sampler="ancestral", method="linesearch", relax=2.0)[1].equal(usual[1])
    changes = {"sampler": ("euler", "heun"), "method": ("variance",), "relax": (1.0,), "travels": (1,)}
    for name, values in changes.items():
        for value in values:
            assert not pair(**{name: value})[1].allclose(usual[1]), (name, value)
    near, far = ((pair(start=start, last_step=False)[1] - view.image).abs().mean() for start in (0.02, 3.0))
    assert near < 0.1 < far  # around the interpolation
    soft, restored, residual = pair(last_step=False)
    assert soft.equal(usual[0]) and residual == usual[2] and not restored.allclose(usual[1])
    assert not pair("joint-base")[0].allclose(usual[0])


def test_a_schedule_that_diverges_has_found_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*given: object) -> None:
        raise GenMedError("the guided sampling diverged")

    monkeypatch.setattr(efficiency, "guided_pair", diverged)
    image, label = (Volume(array, np.eye(4)) for array in tiny.blocks(np.random.default_rng(0), (16, 16, 16), 2))
    label = label.like(np.where(label.data == 2, 5, label.data))
    worse = HIPPOCAMPUS_INPUTS["inverted"].degrade(image, IDS[0])
    assert examine(model, worse, label, "affine", Schedule(Sampling(4, 1)))[:2] == (5, 0.0)


def test_a_kill_loses_at_most_the_case_in_progress(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Schedule] = []

    def killed(model: Model, worse: object, truth: Volume, match: str, of: Schedule) -> tuple[int, float, float]:
        asked.append(of)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return 8, 1 / len(asked), 2.0

    monkeypatch.setattr(efficiency, "examine", killed)
    monkeypatch.setattr(efficiency, "SCHEDULES", SCHEDULES[:2])
    out, split = tmp_path / "out", data / "split.json"
    with pytest.raises(KeyboardInterrupt):
        measure(model, data, out, "tune", None, split)
    (first,) = read_rows(out / "efficiency.csv", Row)
    assert first[:3] == ("8 mm voxels", "levels 1, travels 0, samples 1", IDS[0]) and first.dice == 1
    rows = measure(model, data, out, "tune", None, split)
    assert rows[0] == first and len(asked) == 2 + 15 and rows[1].dice == 1 / 3  # four inputs, two schedules and cases
    assert measure(model, data, out, "tune", 1, split) == rows[::2] and len(asked) == 17
    assert read_rows(out / "efficiency.csv", Row) == rows
    measure(replace(model, sha256="1" * 64), data, out, "tune", None, split)
    assert len(asked) == 17 + 16 and len(read_rows(out / "efficiency.csv", Row)) == 16


def test_table_and_plot_have_every_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len({str(of) for of in SCHEDULES}) == len(SCHEDULES)
    rows = [
        Row(name, str(of), id, "key", of.how.steps, 0.25 if of.otherwise else 0.5, 2.0)
        for name in INPUTS for of in SCHEDULES for id in IDS
    ]  # fmt: skip
    save(rows, tmp_path / "out")
    text = (tmp_path / "out" / "efficiency.md").read_text()
    lines = text.splitlines()
    assert text in capsys.readouterr().out and len(lines) == 2 + len(SCHEDULES)
    cell = "0.500 [0.500, 0.500]"
    usual = lines[2 + SCHEDULES.index(Schedule(Sampling(8, 2), 4))]
    assert usual == f"| 8 | 2 | 4 |  | 32 | {' | '.join([cell] * 4)} | 2.0 |"
    others = [line.split(" | ")[3] for line in lines if "0.250" in line]
    assert others == [
        "sampler euler", "sampler heun", "relax 1.0", "method variance", "last_step False", "joint", "joint-base"
    ]  # fmt: skip
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".png", ".svg"}


# Without flags --------------------------------------------------------------------------------------------


def test_every_input_is_segmented_without_flags(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[set[str]] = []
    plain = efficiency.segment

    def counted(model: Model, scan: Volume, **options: object) -> object:
        asked.append({name for name, value in options.items() if value is not None})
        return plain(model, scan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(efficiency, "segment", counted)
    waits = wait(model, data, "tune", 1, data / "split.json")
    assert [one.input for one in waits] == list(INPUTS)
    assert asked == [{"observed"} if name == "4 slices" else set() for name in INPUTS]
    assert all(one.seconds > 0 and one.cpu_seconds > 0 for one in waits)
    assert waits[0].how == "restore-then-condition, match affine"
    assert len(capsys.readouterr().out.splitlines()) == len(INPUTS)


def test_table_tells_mean_longest_threads_and_peak() -> None:
    waits = [Wait("4 slices", 1, 2, "a"), Wait("4 slices", 4, 4, "a"), Wait("tent", 10, 9, "b")]
    lines = wait_table(waits).splitlines()
    assert lines[2:5] == [
        "| 4 slices | 2 | 2.5 | 4.0 | 3.0 | a: 2 |", "| tent | 1 | 10.0 | 10.0 | 9.0 | b: 1 |",
        "| all | 3 | 5.0 | 10.0 | 5.0 | a: 2; b: 1 |",
    ]  # fmt: skip
    threads, peak_gb = lines[-1].split(". Peak memory: ")
    assert int(threads.removeprefix("Threads: ")) >= 1 and 0.05 < float(peak_gb.split()[0]) < 100


@pytest.mark.parametrize("options", [[], ["--defaults", "--out", "out"], ["--defaults"], ["--out", "out"]])
def test_bad_input_ends_with_exit_code_2_and_writes_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["efficiency", "--data", "none", *options])
    with pytest.raises(SystemExit) as stop:
        efficiency.main()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
