"""How long users wait, measured on a small untrained model."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_segment import PLAN, random_denoiser

from genmed.bench import efficiency
from genmed.bench.efficiency import INPUTS, Wait, wait, wait_table
from genmed.hub import Model
from genmed.volume import Volume


def test_every_input_is_segmented_without_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["hippocampus_001", "hippocampus_003"]
    cases = {id: tiny.blocks(np.random.default_rng(0), (16, 16, 16), 1) for id in ids}
    folder = tiny.write_msd(tmp_path, "Hippocampus", ("background", "front"), cases)
    split = folder / "split.json"
    split.write_text(json.dumps({"dataset": "Hippocampus", "train": [], "tune": ids, "report": []}))
    asked: list[set[str]] = []
    plain = efficiency.segment

    def counted(model: Model, scan: Volume, **options: object) -> object:
        asked.append({name for name, value in options.items() if value is not None})
        return plain(model, scan, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(efficiency, "segment", counted)
    model = Model(plan=PLAN, denoiser=random_denoiser(), folder=None, sha256="0" * 64)
    waits = wait(model, folder, "tune", 1, split)
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


@pytest.mark.parametrize("options", [[], ["--defaults", "--out", "out"], ["--defaults"]])
def test_bad_input_ends_with_exit_code_2_and_writes_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["efficiency", "--data", "none", *options])
    with pytest.raises(SystemExit) as stop:
        efficiency.main()
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
