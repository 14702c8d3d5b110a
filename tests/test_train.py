import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from genmed import train as training
from genmed.calibration import volume_error
from genmed.data.dataset import read_dataset
from genmed.data.split import Split
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import load
from genmed.train import CHECKPOINT, draw_batch, load_scans, make_plan, rate_at, train

TINY = "from genmed import plan; plan.PRESETS['small'] = plan.Preset((8, 16), 6, 2, 1e-3)\n"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten scans of a bright box on noise, in MSD layout, and a network small enough to train in a test."""
    from genmed import plan

    monkeypatch.setitem(plan.PRESETS, "small", plan.Preset(widths=(8, 16), steps=6, batch=2, learning_rate=1e-3))
    folder = tmp_path / "boxes"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"box_{i:03d}.nii.gz" for i in range(1, 11)]
    for name in names:
        label = np.zeros((14, 16, 12), np.uint8)
        x, y, z = rng.integers(2, 6, 3)
        label[x : x + 6, y : y + 6, z : z + 4] = 1
        image = 100 * label + rng.normal(0, 20, label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), folder / "imagesTr" / name)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / name)
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "name": "boxes",
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "box"},
                "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
            }
        )
    )
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / CHECKPOINT)


def assert_same_state(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_writes_a_model_that_loads(dataset: Path, tmp_path: Path) -> None:
    out = train(dataset, tmp_path / "model", preset="small", steps=3)
    model = load(out)
    assert model.plan.labels == ("background", "box")
    assert json.loads((out / "split.json").read_text())["report"]
    assert "tune dice" in (out / "card.md").read_text()


def test_a_resumed_training_equals_an_uninterrupted_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(dataset, tmp_path / "whole", preset="small")

    def stop_at_step_three(scans, plan, step, process=0):  # type: ignore[no-untyped-def]
        if step == 3:
            raise KeyboardInterrupt
        return draw_batch(scans, plan, step, process)

    monkeypatch.setattr(training, "draw_batch", stop_at_step_three)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "parts", preset="small")
    monkeypatch.undo()
    from genmed import plan

    monkeypatch.setitem(plan.PRESETS, "small", plan.Preset(widths=(8, 16), steps=6, batch=2, learning_rate=1e-3))
    train(dataset, tmp_path / "parts", preset="small", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_training_that_is_resumed_stays_as_it_is(dataset: Path, tmp_path: Path) -> None:
    """No step is left, so there is no loss to print where stderr is no terminal."""
    out = train(dataset, tmp_path / "model", preset="small", steps=3)
    before = (out / "weights.safetensors").read_bytes()
    train(dataset, out, preset="small", steps=3, resume=True)
    assert (out / "weights.safetensors").read_bytes() == before


def test_a_killed_training_resumes_to_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    train(dataset, tmp_path / "whole", preset="small")
    out = tmp_path / "killed"
    script = TINY + (
        "import time\n"
        "from genmed import train as t\n"
        "t.SAVE_EVERY_MINUTES = 0\n"
        "draw = t.draw_batch\n"
        "def slow(scans, plan, step, process=0):\n"
        "    if step == 4: time.sleep(600)\n"
        "    return draw(scans, plan, step, process)\n"
        "t.draw_batch = slow\n"
        f"t.train({str(dataset)!r}, {str(out)!r}, preset='small')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while _step(out) < 4 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _step(out) == 4
    train(dataset, out, preset="small", resume=True)
    assert_same_state(tmp_path / "whole", out)


def _step(folder: Path) -> int:
    from safetensors import safe_open

    if not (folder / CHECKPOINT).exists():
        return 0
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return int(file.metadata()["step"])


def test_two_processes_train_one_model(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "both"
    script = tmp_path / "launch.py"
    script.write_text(
        TINY
        + "import torch, torch.distributed as dist\n"
        + "from genmed import train as t\n"
        + "final = {}\n"
        + "fit = t.fit\n"
        + "def watched(objective, *a, **k):\n"
        + "    final['model'] = objective.model\n"
        + "    return fit(objective, *a, **k)\n"
        + "t.fit = watched\n"
        + f"t.train({str(dataset)!r}, {str(out)!r}, preset='small', steps=3)\n"
        + "flat = torch.cat([p.detach().flatten() for p in final['model'].parameters()])\n"
        + "copies = [torch.empty_like(flat) for _ in range(2)]\n"
        + "dist.all_gather(copies, flat)\n"
        + "assert dist.get_world_size() == 2\n"
        + "assert torch.equal(*copies), 'processes drifted apart'\n"
        + "print('same weights', dist.get_rank())\n"
        + "t.leave_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.count("same weights") == 2
    assert load(out).plan.name == "both"


def test_batches_are_a_function_of_seed_step_and_process(dataset: Path) -> None:
    data = read_dataset(dataset)
    parts = Split("boxes", data.ids[:6], data.ids[6:8], data.ids[8:])
    plan = make_plan(data, parts, "boxes", "small")
    scans = load_scans(data, plan, parts.train)
    first, again = (draw_batch(scans, plan, step=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert first.image.shape == (plan.batch, 1, *plan.patch)
    for other in (draw_batch(scans, plan, step=6), draw_batch(scans, plan, step=5, process=1)):
        assert not torch.equal(first.image, other.image)


def test_a_coarser_grid_keeps_the_field_of_view(dataset: Path) -> None:
    data = read_dataset(dataset)
    parts = Split("boxes", data.ids[:6], data.ids[6:8], data.ids[8:])
    fine, coarse = (make_plan(data, parts, "boxes", "small", spacing) for spacing in (None, 2.0))
    assert coarse.spacing_mm == (2.0, 2.0, 2.0)
    for old, new, multiple in zip(fine.patch, coarse.patch, coarse.patch_multiple, strict=True):
        assert old <= 2 * new < old + 2 * multiple


def test_temperature_and_volume_errors_are_those_of_the_tuning_cases() -> None:
    plan, generator = tiny.PLAN, torch.Generator().manual_seed(0)
    model = build(plan).eval()
    image = torch.randn(1, *plan.patch, generator=generator)
    model.outputs = lambda z, sigma: {  # type: ignore[method-assign]
        "image": z[:, :1], "label": 6 * torch.cat([z[:, :1], -z[:, :1], 0 * z[:, :1]], dim=1)
    }  # fmt: skip
    soft = (model.outputs(image[None], None)["label"] / 2).softmax(dim=1)[0]  # half as sure as it says
    label = torch.multinomial(soft.flatten(1).T, 1, generator=generator).reshape(plan.patch)
    found = training.measured(plan, model, [(image, label)])
    assert found.temperature == pytest.approx(2, rel=0.1)
    counts = torch.stack([(image[0] < 0).sum(), torch.tensor(0)]), torch.bincount(label.flatten())[1:]
    assert found.volume_error == pytest.approx(volume_error(*(count[None].numpy() for count in counts)))
    assert len(found.typical) == 2 * (1 + len(plan.labels) + 9)


def test_a_resumed_training_keeps_its_parts_when_cases_are_added(dataset: Path, tmp_path: Path) -> None:
    out = train(dataset, tmp_path / "model", preset="small", steps=1)
    before = (out / "split.json").read_bytes()
    entries = json.loads((dataset / "dataset.json").read_text())
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(dataset / part / "box_001.nii.gz", dataset / part / "box_000.nii.gz")
    entries["training"].insert(0, {"image": "./imagesTr/box_000.nii.gz", "label": "./labelsTr/box_000.nii.gz"})
    (dataset / "dataset.json").write_text(json.dumps(entries))
    train(dataset, out, preset="small", steps=2, resume=True)
    assert (out / "split.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"augmentation": "none"}, "augmentation: nnunet before, none now"), ({"seed": 4}, "seed"), ({"draw": 1}, "draw")],
)
def test_a_training_is_not_resumed_with_other_options(
    dataset: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    options = {"preset": "small", "cases": 1, "draw": 0}
    out = train(dataset, tmp_path / "model", steps=1, **options)
    plan = (out / "plan.json").read_bytes()
    with pytest.raises(GenMedError, match=f"cannot resume.*{told}"):
        train(dataset, out, steps=2, resume=True, **(options | changes))
    assert (out / "plan.json").read_bytes() == plan
    train(dataset, out, steps=2, resume=True, **options)  # longer is all right


def test_a_new_training_in_an_old_folder_has_a_curve_of_its_own(dataset: Path, tmp_path: Path) -> None:
    for _ in range(2):
        train(dataset, tmp_path / "model", preset="small", steps=1)
    assert len((tmp_path / "model" / "curve.jsonl").read_text().splitlines()) == 1


def test_a_class_that_no_tuning_case_has_leaves_a_score_of_the_others() -> None:
    label = torch.zeros(tiny.PLAN.patch, dtype=torch.uint8)
    label[4:8] = 1
    logits = torch.stack([label == 0, label == 1, label == 9]).float()[None]
    scores = training.tune_dice(lambda image: logits, [(label[None].float(), label)], tiny.PLAN)
    assert scores["dice"] == scores["front"] == 1


def test_options_that_cannot_be_are_refused_before_any_work(dataset: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"dataset": "boxes", "train": ["box_001"], "tune": [], "report": []}))
    wrong = {"--max-minutes -1": {"max_minutes": -1.0}, "--spacing 0": {"spacing": 0.0}, "tune on": {"split": split}}
    for reason, options in wrong.items():
        with pytest.raises(GenMedError, match=reason):
            train(dataset, tmp_path / "model", preset="small", **options)  # type: ignore[arg-type]
    for few in ({"cases": 0}, {"draw": 3}):
        with pytest.raises(GenMedError, match="cases"):
            train(dataset, tmp_path / "model", preset="small", **few)  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


def test_one_file_of_several_channels_is_trained_on(dataset: Path, tmp_path: Path) -> None:
    entries = json.loads((dataset / "dataset.json").read_text())
    entries["modality"] = {"0": "T1", "1": "T2"}
    (dataset / "dataset.json").write_text(json.dumps(entries))
    for path in (dataset / "imagesTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.stack([image.get_fdata()] * 2, axis=3).astype(np.float32), image.affine), path)
    out = train(dataset, tmp_path / "model", preset="small", steps=1)
    assert load(out).plan.channels == ("T1", "T2")


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    assert rate_at(0, 0.0) == pytest.approx(1 / training.WARM_UP_STEPS)
    assert rate_at(10_000, 0.0) == 1.0
    assert rate_at(10_000, 0.5) == pytest.approx(0.5)
    assert rate_at(10_000, 1.0) == pytest.approx(0.0)


def test_a_foreign_checkpoint_is_refused(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(GenMedError, match=r"checkpoint\.safetensors: cannot resume"):
        train(dataset, out, preset="small", resume=True)


def test_starting_from_another_network_is_refused(dataset: Path, tmp_path: Path) -> None:
    from genmed import plan

    small = train(dataset, tmp_path / "small", preset="small", steps=1)
    plan.PRESETS["small"] = plan.Preset(widths=(16, 32), steps=1, batch=2, learning_rate=1e-3)
    with pytest.raises(GenMedError, match="does not fit this plan"):
        train(dataset, tmp_path / "other", preset="small", init=small)
