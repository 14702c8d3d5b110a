import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_run import MODEL, FakeSegment, scan, write
from typer.testing import CliRunner, Result

from genmed import cli, hub, volume
from genmed.cli import app
from genmed.tasks import run

COMMANDS = (
    "demo", "info", "check", "prepare", "train", "segment", "complete", "generate", "view", "eval", "bench", "models",
    "data",
)  # fmt: skip


def genmed(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSegment:
    fake = FakeSegment()
    monkeypatch.setattr(run, "segment", fake)
    monkeypatch.setattr(hub, "load", lambda name: MODEL)
    return fake


def failed_in_one_line(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("genmed: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_help_names_every_command() -> None:
    result = genmed("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
        assert genmed(command, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, genmed.cli; print(sorted({'torch', 'numpy', 'nibabel', 'monai'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_segment_writes_a_file_and_prints_its_volumes(
    fake: FakeSegment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/genmed", "segment", "my head.nii.gz"])
    source, out = write(tmp_path / "head.nii.gz", scan()), tmp_path / "seg.nii.gz"
    result = genmed("segment", source, "--model", "tiny", "--out", out)
    assert result.exit_code == 0 and str(out) in result.stdout and "front" in result.stdout
    assert set(np.unique(nib.load(out).dataobj)) == {0, 1, 5}
    facts = json.loads(genmed("segment", source, "--model", "tiny", "--out", out, "--json").stdout)
    assert facts["cases"]["head"]["structures"]["front"]["voxels"] == int(
        ((scan() > 10) & (scan() <= 20)).sum()
    )
    manifest = json.loads((tmp_path / "seg.nii.gz.manifest.json").read_text())
    assert manifest["command"] == "genmed segment 'my head.nii.gz'"


def test_segment_options_reach_the_task(fake: FakeSegment, tmp_path: Path) -> None:
    source, mask = (
        write(tmp_path / "head.nii.gz", scan()),
        write(tmp_path / "mask.nii.gz", np.ones((4, 5, 6))),
    )
    options = "--mode joint-base --match none --samples 4 --seed 7 --grid model --slice-thickness 3 --preview"
    box = ["--roi", "-3,0,0,8,0,2.5"]
    more = ["--observed", mask, "--probabilities", *options.split(), *box]
    result = genmed("segment", source, "--model", "tiny", "--out", tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    asked = fake.calls[0]
    assert (asked["mode"], asked["match"], asked["samples"], asked["seed"]) == ("joint-base", "none", 4, 7)
    assert asked["grid"] == "model" and asked["slice_thickness_mm"] == 3.0
    assert asked["roi_mm"] == ((-3, 0), (0, 8), (0, 2.5)) and asked["observed"].data.all()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"head.nii.gz", "head.probabilities.nii.gz", "head.preview.png"} < files


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_why_a_result_is_doubtful_is_told_on_stderr_and_in_the_manifest(
    fake: FakeSegment, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "segment", lambda *given, **asked: replace(fake(*given, **asked), observed_share=0.004))
    source, out = write(tmp_path / "head.nii.gz", scan()), tmp_path / "out"
    result = genmed("segment", source, "--model", "tiny", "--out", out, *more)
    why = "0.4% of what was found was observed, the rest is the model's guess"
    assert result.exit_code == 0 and result.stderr == f"genmed: head is doubtful: {why}\n"
    written = json.loads((out / "manifest.json").read_text())["cases"]["head"]
    told = json.loads(result.stdout)["cases"]["head"] if more else written
    for facts in (written, told):
        assert (facts["doubtful"], facts["doubts"], facts["observed_share"]) == (True, [why], 0.004)
    assert more or "DOUBTFUL, look at it" in result.stdout


def test_broken_case_of_ten_is_listed_and_exits_1(fake: FakeSegment, tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / "in" / f"case_{number}_0000.nii.gz", scan(number))
    (tmp_path / "in" / "case_3_0000.nii.gz").write_bytes(b"not gzip")
    result = genmed("segment", tmp_path / "in", "--model", "tiny", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 of 10 cases failed" in result.stderr and "case_3_0000.nii.gz" in result.stderr
    assert len(list((tmp_path / "out").glob("case_*.nii.gz"))) == 9 == len(result.stdout.splitlines())
    again = genmed("segment", tmp_path / "in", "--model", "tiny", "--out", tmp_path / "out", "--json")
    assert again.exit_code == 1 and len(fake.calls) == 9
    assert all(case["skipped"] for case in json.loads(again.stdout)["cases"].values())


def truncated(path: Path) -> Path:
    whole = write(path, np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def nan(path: Path) -> Path:
    data = scan()
    data[1, 1, 1] = np.nan
    return write(path, data)


def series(path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 3), dtype=np.float32), np.eye(4)), path)
    return path


def text(path: Path) -> Path:
    path.write_text("not an image")
    return path


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda path: path, "absent.nii.gz", "no such file"),
        (truncated, "cut.nii.gz", "truncated"),
        (nan, "nan.nii.gz", "NaN"),
        (series, "time.nii.gz", "4D"),
        (text, "notes.txt", "not a medical image"),
        (text, "fake.nii.gz", "not"),
    ],
)
def test_bad_scan_gives_one_line_and_no_output(
    fake: FakeSegment, tmp_path: Path, make: Any, name: str, words: str
) -> None:
    source = make(tmp_path / name)
    for out in (tmp_path / "seg.nii.gz", tmp_path / "out"):
        result = genmed("segment", source, "--model", "tiny", "--out", out)
        failed_in_one_line(result, name, words)
        assert not out.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--mode", "magic"], "magic"),
        (["--grid", "other"], "other"),
        (["--roi", "1,2,3"], "--roi"),
        (["--roi", "a,b,c,d,e,f"], "--roi"),
        (["--observed", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["--samples", "0"], "--samples"),
        (["--mode", "conditional", "--match", "affine"], "--mode conditional takes auto, none, rising, falling"),
    ],
)
def test_bad_option_gives_one_line(fake: FakeSegment, tmp_path: Path, options: list[str], word: str) -> None:
    source = write(tmp_path / "head.nii.gz", scan())
    failed_in_one_line(
        genmed("segment", source, "--model", "tiny", "--out", tmp_path / "out", *options), word
    )


def test_unknown_model_gives_one_line(tmp_path: Path) -> None:
    source = write(tmp_path / "head.nii.gz", scan())
    result = genmed("segment", source, "--model", "no-such-model", "--out", tmp_path / "out")
    failed_in_one_line(result, "no-such-model", "known models")


def test_full_disk_gives_one_line(fake: FakeSegment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write(tmp_path / "head.nii.gz", scan())
    monkeypatch.setattr(volume, "_write_nifti", full)
    failed_in_one_line(
        genmed("segment", source, "--model", "tiny", "--out", tmp_path / "out"), "No space left"
    )
    assert not list((tmp_path / "out").glob("*"))
    monkeypatch.undo()
    fake.error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    monkeypatch.setattr(run, "segment", fake)
    monkeypatch.setattr(hub, "load", lambda name: MODEL)
    failed_in_one_line(
        genmed("segment", source, "--model", "tiny", "--out", tmp_path / "out"), "free some space"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["segment"], ("INPUT", "genmed segment --help")),
        (["segment", "head.nii.gz"], ("--model", "genmed segment --help")),
        (["train", "here", "--stps", "3"], ("--stps", "--steps", "genmed train --help")),
        (["train", "here", "--steps", "x"], ("--steps", "integer", "genmed train --help")),
        (["models", "lst"], ("lst", "genmed models --help")),
        (["segmnt"], ("segmnt", "genmed --help")),
        (["--odd"], ("--odd", "genmed --help")),
    ],
)
def test_wrong_command_line_is_told_in_one_line(arguments: list[str], words: tuple[str, ...]) -> None:
    failed_in_one_line(CliRunner().invoke(app, arguments, prog_name="genmed"), *words)


def test_a_group_of_commands_alone_shows_its_help() -> None:
    for group in ("models", "bench", "data"):
        result = genmed(group)
        assert result.exit_code == 2 and "Usage" in result.output and "Error" not in result.output


def test_debug_adds_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (["--debug", "info", "nowhere"], ["info", "nowhere", "--debug"]):
        result = genmed(*arguments)
        assert result.exit_code == 2 and "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("genmed: nowhere")


def test_bug_is_told_from_bad_input(fake: FakeSegment, tmp_path: Path) -> None:
    fake.error = RuntimeError("odd")
    source = write(tmp_path / "head.nii.gz", scan())
    result = genmed("segment", source, "--model", "tiny", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "unexpected RuntimeError: odd" in result.stderr


@pytest.mark.parametrize(
    ("command", "hint"),
    [("segment", "run the same command again"), ("train", "--resume"), ("models", "interrupted")],
)
def test_interrupt_exits_130_and_tells_how_to_resume(
    fake: FakeSegment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, hint: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    training = ModuleType("genmed.train")
    training.leave_group = lambda: None  # type: ignore[attr-defined]
    training.train = interrupted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "genmed.train", training)
    monkeypatch.setattr(hub, "list_models", interrupted)
    fake.error = KeyboardInterrupt()
    source = write(tmp_path / "in" / "head.nii.gz", scan())
    arguments = {
        "segment": [source, "--model", "tiny", "--out", tmp_path / "out"],
        "train": [tmp_path, "--out", tmp_path / "model"],
        "models": ["list"],
    }
    result = genmed(command, *arguments[command])
    assert result.exit_code == 130
    assert len(result.stderr.splitlines()) == 1 and hint in result.stderr


def test_train_options_reach_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    training = ModuleType("genmed.train")
    training.leave_group = lambda: None  # type: ignore[attr-defined]
    training.train = lambda *given, **named: asked.update(named, given=given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "genmed.train", training)
    options = (
        "--split s.json --max-minutes 2.5 --resume --preset large --spacing 2 --init m --steps 9 --seed 4 "
        "--augmentation degraded --cases 2 --draw 5"
    )
    result = genmed("train", tmp_path, "--out", tmp_path / "model", *options.split())
    assert result.exit_code == 0, result.output
    assert asked == {
        "given": (tmp_path, tmp_path / "model"),
        "split": Path("s.json"),
        "max_minutes": 2.5,
        "resume": True,
        "preset": "large",
        "spacing": 2.0,
        "init": "m",
        "steps": 9,
        "seed": 4,
        "augmentation": "degraded",
        "cases": 2,
        "draw": 5,
    }


@pytest.mark.parametrize(
    "option",
    ["--preset large", "--augmentation none", "--draw 1", "--cases 2", "--spacing 2", "--split s.json", "--init m"],
)
def test_training_on_shapes_refuses_options_of_images(tmp_path: Path, option: str) -> None:
    (tmp_path / "index.parquet").touch()
    result = genmed("train", tmp_path, "--out", tmp_path / "model", *option.split())
    failed_in_one_line(result, option.split()[0], "not for shapes")
    assert not (tmp_path / "model").exists()


def labelled(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume.Volume(data[None].astype(np.uint8), np.eye(4), {0: "background", 1: "front"}).save(path)
    return path


def test_info_tells_geometry_and_label_volumes(tmp_path: Path) -> None:
    data = np.zeros((4, 5, 6))
    data[:2] = 1
    path = labelled(tmp_path / "labels.nii.gz", data)
    facts = json.loads(genmed("info", path, "--json").stdout)
    assert facts["size"] == [4, 5, 6] and facts["spacing_mm"] == [1, 1, 1] and facts["axes"] == "RAS"
    assert "60 voxels" in facts["labels"]["front"]
    assert "RAS" in genmed("info", path).stdout


def test_info_of_a_plan_prints_it(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(MODEL.plan.to_json())
    facts = json.loads(genmed("info", tmp_path / "plan.json", "--json").stdout)
    assert facts["plan"]["widths"] == [8, 16]


def test_eval_prints_means_and_writes_one_row_a_case_and_label(tmp_path: Path) -> None:
    truth = np.zeros((8, 8, 8))
    truth[2:6, 2:6, 2:6] = 1
    half = np.zeros((8, 8, 8))
    half[2:4, 2:6, 2:6] = 1
    for case, prediction in (("a", truth), ("b", half)):
        labelled(tmp_path / "truth" / f"{case}.nii.gz", truth)
        labelled(tmp_path / "seg" / f"{case}.nii.gz", prediction)
    arguments = ("eval", tmp_path / "seg", tmp_path / "truth", "--out", tmp_path / "metrics.csv")
    row = json.loads(genmed(*arguments, "--json").stdout)["front"]
    assert row["cases"] == 2 and row["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert row["hd95_mm"] == pytest.approx(1.0)
    assert row["dice_interval"][0] == pytest.approx(2 / 3) and row["dice_interval"][1] == pytest.approx(1)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert "0.833" in genmed(*arguments).stdout
    split = {"dataset": "toy", "train": ["c"], "tune": [], "report": ["b"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    row = json.loads(genmed(*arguments, "--split", tmp_path / "split.json", "--json").stdout)["front"]
    assert row["cases"] == 1 and row["dice"] == pytest.approx(2 / 3)


def dataset(folder: Path) -> Path:
    for case in range(3):
        data = np.zeros((12, 12, 12))
        data[3 : 6 + case, 3:8, 3:8] = 1
        write(
            folder / "imagesTr" / f"c{case}_0000.nii.gz",
            np.random.default_rng(case).normal(size=(12, 12, 12)) + data,
        )
        labelled(folder / "labelsTr" / f"c{case}.nii.gz", data)
        image = nib.load(folder / "imagesTr" / f"c{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(image.get_fdata(), np.eye(4)), folder / "imagesTr" / f"c{case}_0000.nii.gz")
    entries = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "front": 1},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(entries | {"numTraining": 3}))
    return folder


def test_check_exits_0_for_a_sound_set_and_1_for_a_broken_one(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set")
    sound = genmed("check", folder)
    assert sound.exit_code == 0, sound.output
    labelled(folder / "labelsTr" / "c1.nii.gz", np.full((12, 12, 12), 7))
    broken = genmed("check", folder)
    assert broken.exit_code == 1 and "c1.nii.gz" in broken.stdout and "7" in broken.stdout


def test_prepare_prints_and_stores_the_plan(tmp_path: Path) -> None:
    result = genmed("prepare", dataset(tmp_path / "set"), "--out", tmp_path / "plan")
    assert result.exit_code == 0, result.output
    assert "front" in result.stdout and result.stdout.splitlines()[-1] == str(tmp_path / "plan" / "plan.json")
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["labels"] == ["background", "front"]


def test_models_go_round_by_push_and_pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_hub import CARD, PLAN, some_weights

    monkeypatch.setenv("GENMED_HOME", str(tmp_path / "home"))
    folder = hub.save_model(tmp_path / "tiny", PLAN, some_weights(), CARD)
    pushed = genmed("models", "push-dir", folder, tmp_path / "share")
    assert pushed.stdout.strip() == str(tmp_path / "share" / "tiny")
    assert genmed("models", "pull", tmp_path / "share", "tiny").exit_code == 0
    listed = genmed("models", "list").stdout
    header, *rows = listed.splitlines()
    row = next(row for row in rows if row.startswith("tiny"))
    assert "weights licence" in header and "code licence" in header
    assert "CC-BY-SA-4.0" in row and "Apache-2.0" in row and "0.500" in row and "front, back" in row
    assert {entry["name"] for entry in json.loads(genmed("models", "list", "--json").stdout)} >= {"tiny"}
    for command in (("models", "info"), ("info",)):
        assert json.loads(genmed(*command, "tiny", "--json").stdout)["card"]["minutes"] == 1.5
    assert "CC-BY-SA-4.0" in genmed("info", folder).stdout
    failed_in_one_line(genmed("models", "info", "other"), "other", "tiny")


def test_data_fetch_refuses_an_unknown_set(tmp_path: Path) -> None:
    failed_in_one_line(genmed("data", "fetch", "nonsense", "--out", tmp_path), "nonsense", "hippocampus")


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A model folder with a small untrained network."""
    from test_hub import CARD, PLAN, some_weights

    weights = {name: 0.1 * tensor for name, tensor in some_weights().items()}
    return hub.save_model(tmp_path / "tiny", PLAN, weights, CARD)


def real_scan(path: Path) -> np.ndarray:
    """An oblique scan with odd codes, 2 mm thick along one axis."""
    data = np.random.default_rng(0).normal(100, 20, (8, 10, 6)).astype(np.float32)
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -2.0]])
    affine = np.block([[turn, np.array([[3.1], [-7.3], [11.7]])], [np.zeros((1, 3)), np.ones((1, 1))]])
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=2)
    nib.save(image, path)
    return data


@pytest.mark.parametrize("mode", ["conditional", "joint", "restore-then-condition"])
def test_command_line_gives_the_scans_grid_and_equal_bytes_for_equal_seeds(
    real: Path, tmp_path: Path, mode: str
) -> None:
    real_scan(tmp_path / "head.nii.gz")
    outputs = []
    for out in (tmp_path / "a", tmp_path / "b"):
        options = ["--mode", mode, "--samples", "2", "--seed", "5", "--probabilities"]
        result = genmed("segment", tmp_path / "head.nii.gz", "--model", real, "--out", out, *options)
        assert result.exit_code == 0, result.output
        outputs.append(
            {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}
        )
    assert outputs[0] == outputs[1]
    image, labels = nib.load(tmp_path / "head.nii.gz"), nib.load(tmp_path / "a" / "head.nii.gz")
    assert labels.shape == image.shape and labels.affine.tobytes() == image.affine.tobytes()
    for form in ("sform_code", "qform_code"):
        assert labels.header[form] == image.header[form]
    chances = nib.load(tmp_path / "a" / "head.probabilities.nii.gz").get_fdata()
    assert chances.shape == (*image.shape, 3) and np.allclose(chances.sum(axis=-1), 1, atol=1e-4)


@pytest.mark.parametrize("options", [[], ["--mode", "conditional"], ["--grid", "model", "--samples", "2"]])
def test_hidden_voxels_change_no_output_byte_of_the_command(
    real: Path, tmp_path: Path, options: list[str]
) -> None:
    data = real_scan(tmp_path / "head.nii.gz")
    image = nib.load(tmp_path / "head.nii.gz")
    hidden = np.zeros(data.shape, dtype=bool)
    hidden[:, :, 2:4] = hidden[6:] = True
    nib.save(
        nib.Nifti1Image((~hidden).astype(np.uint8), image.affine, image.header), tmp_path / "mask.nii.gz"
    )
    outputs = []
    for number, value in enumerate((0.0, 3e7, np.nan)):
        nib.save(
            nib.Nifti1Image(np.where(hidden, value, data), image.affine, image.header),
            tmp_path / "head.nii.gz",
        )
        more = ["--observed", tmp_path / "mask.nii.gz", "--probabilities", "--preview", *options]
        out = tmp_path / str(number)
        result = genmed("segment", tmp_path / "head.nii.gz", "--model", real, "--out", out, *more)
        assert result.exit_code == 0, result.output
        outputs.append(
            {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}
        )
    assert len(outputs[0]) == 4 and all(output == outputs[0] for output in outputs)


def test_ctrl_c_ends_a_real_process_with_130(tmp_path: Path) -> None:
    code = (
        "import sys, time, genmed.data.fetch\n"
        "def slow(name, out):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "genmed.data.fetch.fetch = slow\n"
        "sys.argv = ['genmed', 'data', 'fetch', 'hippocampus', '--out', 'data']\n"
        "from genmed.cli import main\nmain()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(stderr.splitlines()) == 1 and "where the download stopped" in stderr


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_do_not_wait_at_full_speed_unless_told_to(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")  # so that the variable is put back
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr("sys.argv", ["genmed", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["GOMP_SPINCOUNT"] == (own or "2000")
