import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_report import Outline, require_self_contained

from genmed import demo, hub, report
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import Card, Model
from genmed.plan import Plan
from genmed.tasks.segment import Interval, Segmentation
from genmed.volume import Volume, read

PLAN = replace(
    tiny.PLAN, label_values=(0, 1, 5), spacing_mm=(4.0, 4.0, 4.0), patch=(8, 8, 8), extent_mm=(40.0, 50.0, 40.0)
)
MODEL = Model(plan=PLAN, denoiser=None, folder=None, sha256="a" * 64)  # type: ignore[arg-type]
FILES = {"index.html", "picture.png", "statistics.json", "template.nii.gz"} | {
    f"labels-{key}.nii.gz" for key in ("clean", "8mm", "half-slices")
}


def some_template(seed: int = 0) -> Volume:
    """Noise on an asymmetric 1 mm grid that covers both boxes."""
    affine = np.eye(4)
    affine[:3, 3] = (-50, -60, -40)
    values = np.random.default_rng(seed).integers(0, 255, (1, 97, 75, 60), dtype=np.uint8)
    return Volume(values, affine)


def world(volume: Volume) -> np.ndarray:
    """World position (x, y, z, 3) of every voxel."""
    index = np.stack(np.indices(volume.grid.shape), axis=-1)
    return index @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def inside(volume: Volume, side: str) -> np.ndarray:
    """Voxels of the box of one side."""
    position = world(volume) * ((-1 if side == "right" else 1), 1, 1)
    low, high = np.array(demo.BOX_MM).T
    return np.asarray(((position > low) & (position < high)).all(axis=-1))


class FakeSegment:
    """Calls voxels above 100 'front' and above 200 'back'; remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def __call__(self, model: Model, scan: Volume, **asked: Any) -> Segmentation:
        self.given.append(asked | {"scan": scan})
        if asked["grid"] == "model":
            shape = tuple(round(n * s / 4) for n, s in zip(scan.grid.shape, scan.spacing_mm, strict=True))
            scan = Volume(np.full((1, *shape), 150.0), np.diag([4.0, 4.0, 4.0, 1.0]))
        if asked["progress"]:
            asked["progress"](0.5)
        labels = np.where(scan.data > 200, 5, np.where(scan.data > 100, 1, 0)).astype(np.uint8)
        hot = np.stack([labels[0] == value for value in (0, 1, 5)]).astype(np.float32)
        several = asked["samples"] is not None
        coarse = Volume(np.full((1, 8, 12, 10), 7, np.float32), np.eye(4)) if several else None
        volumes = {"front": Interval(0.5, 0.25, 0.75)} if several else {}
        names = dict(zip(PLAN.label_values, PLAN.labels, strict=True))
        return Segmentation(
            scan.like(labels, names), scan.like(hot), volumes, 1.0, "fake", "none", 0.1, asked["seed"], coarse
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSegment:
    fake = FakeSegment()
    monkeypatch.setattr(demo, "segment", fake)
    monkeypatch.setattr(demo, "load", lambda name: MODEL)
    monkeypatch.setattr(demo, "load_template", some_template)
    return fake


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A model folder with random weights."""
    generator = torch.Generator().manual_seed(0)
    state = build(PLAN).state_dict()
    weights = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    card = Card("tiny", "CC0-1.0", "none: random weights")
    return hub.save_model(tmp_path / "tiny", PLAN, weights, card)


def test_mirroring_exchanges_left_and_right_in_the_world_and_undoes_itself() -> None:
    template = some_template()
    mirror = demo.mirrored(template)
    opposite = world(mirror) * (-1, 1, 1)
    index = np.rint(opposite - template.affine[:3, 3]).astype(int)
    assert np.array_equal(mirror.data[0], template.data[0][tuple(np.moveaxis(index, -1, 0))])
    assert not np.array_equal(mirror.affine, template.affine)
    again = demo.mirrored(mirror)
    assert np.array_equal(again.data, template.data) and np.array_equal(again.affine, template.affine)


@pytest.mark.parametrize("side", demo.SIDES)
def test_crop_is_the_box_of_its_side_with_the_medial_side_at_high_x(side: str) -> None:
    template = some_template()
    crop, _ = demo.cut(template, side)
    kept = template.data[0][inside(template, side)].reshape(crop.grid.shape)
    assert crop.grid.shape == (32, 48, 40)
    assert np.array_equal(crop.data[0], kept[::-1] if side == "right" else kept)
    assert np.allclose(crop.grid.corners_mm()[[0, -1]].T, demo.BOX_MM)  # as a left one


def test_labels_of_both_sides_land_where_they_were_found(fake: FakeSegment, tmp_path: Path) -> None:
    template = some_template()
    demo.run(tmp_path)
    labels = read(tmp_path / "labels-clean.nii.gz")
    assert np.array_equal(labels.affine, template.affine) and labels.grid.shape == template.grid.shape
    expected = np.zeros(template.grid.shape, dtype=int)
    for side, front, back in (("left", 1, 5), ("right", 6, 10)):
        values = template.data[0]
        expected[inside(template, side) & (values > 100)] = front
        expected[inside(template, side) & (values > 200)] = back
    assert np.array_equal(labels.data[0], expected)
    assert labels.label_names == {
        0: "background", 1: "left front", 5: "left back", 6: "right front", 10: "right back",
    }  # fmt: skip
    assert (world(labels)[labels.data[0] >= 6][:, 0] > 0).all()


def test_8_mm_voxels_are_averages_over_the_same_field_of_view() -> None:
    crop, _ = demo.cut(some_template(), "left")
    _, coarse, _ = demo.degrade(crop, PLAN)
    blocks = crop.data[0].reshape(4, 8, 6, 8, 5, 8).mean(axis=(1, 3, 5))
    assert np.allclose(coarse.scan.data[0], blocks, atol=1e-3)
    assert coarse.scan.spacing_mm == (8.0, 8.0, 8.0)
    assert np.allclose(coarse.scan.grid.corners_mm(), crop.grid.corners_mm())
    assert np.array_equal(coarse.shown, np.kron(coarse.scan.data[0], np.ones((8, 8, 8))))


@pytest.mark.parametrize(("spacing", "slab"), [(1.0, 1), (4.0, 4)])
def test_half_of_the_slices_are_hidden_one_model_voxel_at_a_time(spacing: float, slab: int) -> None:
    crop, _ = demo.cut(some_template(), "left")
    plan = Plan.from_json(PLAN.to_json().replace("[4.0, 4.0, 4.0]", str([spacing] * 3)))
    *_, half = demo.degrade(crop, plan)
    assert half.observed is not None
    hidden = np.arange(48) // slab % 2 == 1
    assert not half.seen[:, hidden].any() and half.seen[:, ~hidden].all()
    assert np.array_equal(half.observed.data[0] != 0, half.seen)


def test_hidden_slices_reach_neither_the_model_nor_the_page(fake: FakeSegment, tmp_path: Path) -> None:
    crop, _ = demo.cut(some_template(), "left")
    *_, half = demo.degrade(crop, PLAN)
    other = np.where(half.seen, crop.data, 255 - crop.data)
    *_, changed = demo.degrade(crop.like(other), PLAN)
    assert changed.observed is not None and half.observed is not None
    assert changed.scan.data.tobytes() == half.scan.data.tobytes()
    assert changed.observed.data.tobytes() == half.observed.data.tobytes()
    assert changed.shown.tobytes() == half.shown.tobytes()
    outcome = demo.examine(MODEL, crop, half)
    picture = demo.panel("left", (outcome,), PLAN).rows[0][1][0].picture
    assert picture is not None
    hidden = ~half.seen[0].any(axis=1).repeat(demo.ZOOM)
    colours = {tuple(colour) for colour in picture[:, hidden].reshape(-1, 3)}
    assert colours == set(report.HATCH)
    assert (picture[:, ~hidden] == picture[:, ~hidden][..., :1]).all()  # seen voxels are grey


def test_each_side_has_its_own_seed_and_only_degraded_inputs_are_sampled(
    fake: FakeSegment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "index.html"
    assert [call["seed"] for call in fake.given] == [0, 0, 0, 1, 1, 1]
    assert [call["samples"] for call in fake.given] == [None, demo.SAMPLES, demo.SAMPLES] * 2
    assert [call["grid"] for call in fake.given] == ["input", "model", "input"] * 2
    assert capsys.readouterr().out == ""  # the command prints the page's path, and nothing else


def test_numbers_are_those_of_the_label_maps(fake: FakeSegment, tmp_path: Path) -> None:
    demo.run(tmp_path)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    clean, coarse = (read(tmp_path / f"labels-{key}.nii.gz").data[0] for key in ("clean", "8mm"))
    for side, front, back in (("left", 1, 5), ("right", 6, 10)):
        rows = statistics["sides"][side]
        before, after = clean == front, coarse == front
        structure = rows["8mm"]["structures"]["front"]
        assert structure["voxels"] == after.sum() and structure["ml"] == after.sum() / 1000
        assert structure["ml_change"] == pytest.approx((after.sum() - before.sum()) / 1000)
        overlap = 2 * (before & after).sum() / (before.sum() + after.sum())
        assert structure["dice_with_clean"] == pytest.approx(overlap)
        assert structure["ml_interval"] == [0.25, 0.75]
        assert rows["clean"]["dice_with_clean"] == 1 and rows["clean"]["ml_change"] == 0
        assert "ml_interval" not in rows["clean"]["structures"]["front"]
        assert rows["clean"]["structures"]["back"]["voxels"] == (clean == back).sum()
        voxels = [rows[key]["input_voxels"] for key in ("clean", "8mm", "half-slices")]
        assert voxels == [61440, 120, 30720]


def test_demo_runs_end_to_end_with_an_untrained_model(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genmed.tasks.segment.STEPS", 3)
    page = demo.run(tmp_path / "demo", str(tiny_folder))
    assert {path.name for path in page.parent.iterdir()} == FILES
    html = page.read_text(encoding="utf-8")
    require_self_contained(html)
    pictures = Outline(html).pictures()
    assert len(pictures) == 2 * (4 * 3 - 1)
    assert {picture.shape for picture in pictures} == {(40 * demo.ZOOM, 48 * demo.ZOOM, 3)}
    template = demo.load_template()
    assert template.data.dtype == np.uint8 and template.data.max() == 255
    assert np.array_equal(read(page.parent / "template.nii.gz").data, template.data)
    for key in ("clean", "8mm", "half-slices"):
        labels = read(page.parent / f"labels-{key}.nii.gz")
        assert np.array_equal(labels.affine, template.affine) and labels.grid.shape == template.grid.shape
        outside = ~(inside(template, "left") | inside(template, "right"))
        assert not labels.data[0][outside].any()
    rows = json.loads((page.parent / "statistics.json").read_text())["sides"]["right"]
    assert rows["clean"]["mode"] == "conditional"
    assert rows["8mm"]["mode"] == rows["half-slices"]["mode"] == "restore-then-condition"


def test_missing_nilearn_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn.datasets", None)
    with pytest.raises(GenMedError, match=r"pip install -c constraints.txt '\.\[demo\]'") as error:
        demo.load_template()
    assert "\n" not in str(error.value)


def test_file_in_place_of_the_folder_is_refused(fake: FakeSegment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GenMedError, match="give a folder"):
        demo.run(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and fake.given == []


@pytest.mark.parametrize(("labels", "slice_"), [({3: 2, 1: 5}, 1), ({}, 4)])
def test_slice_shown_holds_most_of_the_structures(labels: dict[int, int], slice_: int) -> None:
    volume = np.zeros((8, 6, 6), dtype=int)
    for x, count in labels.items():
        volume[x].flat[:count] = 1
    assert demo.best_slice(volume) == slice_
