"""`python -m genmed.bench.shape_fields`: the explicit field's training and completion, resuming, the table."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_shapes import SIZE
from torch import Tensor, nn

from genmed.bench import shape_fields
from genmed.bench.cues import draw_cue
from genmed.bench.shape_fields import (
    FIELDS,
    SIGMA_MAX,
    Column,
    Scale,
    VoxelBatch,
    VoxelLoss,
    Voxels,
    draw_batch,
    trained,
)
from genmed.bench.shape_solvers import Solver, mean_dice
from genmed.bench.shapes import Row, finished
from genmed.data.shapes import ShapeDataset, read_shapes
from genmed.denoiser import Denoiser
from genmed.nets.unet import UNet
from genmed.shape_model import load_shapes
from genmed.text import embed
from genmed.train_shapes import lowered


@pytest.fixture(scope="module")
def data(tiny_shapes_model: Path) -> ShapeDataset:
    return read_shapes(tiny_shapes_model.parent / "set")


@pytest.fixture
def x(data: ShapeDataset) -> Tensor:
    return lowered(data, [i for i in data.part("train") if data.rows[i].category == "kidney"], SIZE)


@pytest.fixture
def scale(x: Tensor, tiny_shapes_model: Path) -> Scale:
    return Scale.of(x, load_shapes(tiny_shapes_model))


class Known(nn.Module):
    """The exact denoiser of a prior that knows a single shape."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        return self.x + 0 * z


@pytest.mark.parametrize("kind", shape_fields.KINDS)
def test_a_field_that_knows_a_single_shape_finds_it_and_its_place(
    data: ShapeDataset, tiny_shapes_model: Path, kind: str
) -> None:
    model = load_shapes(tiny_shapes_model)
    i = next(i for i in data.part("tune") if data.rows[i].category == "kidney")
    known, scale = Known(torch.zeros(1, SIZE, SIZE, SIZE)), Scale(torch.from_numpy(data.sdf(i))[None], 0.5, 20.0)
    spoken = model.text_of(embed(["kidney"]))[0]
    voxels = Voxels(known, scale, model, spoken)  # type: ignore[arg-type]
    tune = [(draw_cue(data.shape(i), kind, 0), data.shape(i), data.rows[i])]
    assert mean_dice(tune, lambda cue, row: voxels.complete(cue)) > 0.9


def test_the_loss_of_a_wiener_filter_is_one_where_its_assumption_holds() -> None:
    net, unit = UNet(2, 1, (8,), (), 1, 8), 2.5
    x = torch.randn(4, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).sign()
    loss = VoxelLoss(Denoiser(FIELDS, net, unit * SIGMA_MAX), unit)(VoxelBatch(x, 5))["loss"]
    assert float(loss.detach()) == pytest.approx(1.0, abs=0.03)


def test_a_step_is_a_function_of_its_number(x: Tensor, scale: Scale, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.equal(draw_batch(x, scale, 4).z, draw_batch(x, scale, 4).z)
    assert not torch.equal(draw_batch(x, scale, 4).z, draw_batch(x, scale, 5).z)
    monkeypatch.setattr(shape_fields, "VERSIONS", 1)  # no copies
    for shape in scale.decode(draw_batch(x, scale, 7).z):
        assert any(torch.allclose(shape, each, atol=1e-5) for each in x)


def test_noise_of_one_unit_is_noise_of_one_in_the_codes(x: Tensor, scale: Scale, tiny_shapes_model: Path) -> None:
    autoencoder = load_shapes(tiny_shapes_model).autoencoder
    noise = torch.randn(200, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    apart = autoencoder.encode(scale.decode(scale.encode(x[:1]) + scale.unit * noise)) - autoencoder.encode(x[:1])
    assert float(apart.std()) == pytest.approx(1.0, rel=0.05)
    assert float(scale.encode(x).square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_an_interrupted_training_ends_as_one_that_was_not(
    x: Tensor, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape_fields, "TRAINING_STEPS", 3)
    whole = trained(x, scale, tmp_path / "a", 60)

    def killed(x: Tensor, scale: Scale, step: int, process: int) -> VoxelBatch:
        if step == 2:
            raise KeyboardInterrupt
        return draw_batch(x, scale, step, process)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shape_fields, "draw_batch", killed)
        trained(x, scale, tmp_path / "b", 60)
    for name, tensor in trained(x, scale, tmp_path / "b", 60).state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=0)


def test_a_run_goes_on_where_it_was_killed(
    data: ShapeDataset, tiny_shapes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"category": "kidney", "minutes": 60.0, "count": 1, "part": "tune"}
    calls: list[str] = []

    def counted(name: str, complete):  # type: ignore[no-untyped-def]
        def wrapped(*args, **settings):  # type: ignore[no-untyped-def]
            calls.append(name)
            if len(calls) == 4:  # the second kind of cue, the second field
                raise KeyboardInterrupt
            return complete(*args, **settings)

        return wrapped

    monkeypatch.setattr(shape_fields, "TRAINING_STEPS", 2)
    monkeypatch.setattr(shape_fields, "SAMPLES", 1)
    monkeypatch.setattr(Voxels, "complete", counted("voxels", Voxels.complete))
    monkeypatch.setattr(shape_fields, "complete", counted("codes", shape_fields.complete))
    with pytest.raises(KeyboardInterrupt):
        shape_fields.run(data.folder, tiny_shapes_model, tmp_path, **options)
    first = finished(tmp_path)
    assert len(first) == 2 and not (tmp_path / "table.md").exists()
    monkeypatch.setattr(shape_fields, "draw_batch", lambda *_: 1 / 0)  # the training is finished
    text = shape_fields.run(data.folder, tiny_shapes_model, tmp_path, **options)
    rows = finished(tmp_path)
    assert calls == ["voxels", "codes"] * 3 and {p: rows[p] for p in first} == first and len(rows) == 4
    assert {row.category for row in rows.values()} == {"kidney"} and (tmp_path / "table.md").read_text() == text
    assert "16³; 60 minutes, 2 steps on 10 shapes of the category" in text
    assert shape_fields.run(data.folder, tiny_shapes_model, tmp_path, **options) == text and len(calls) == 6


def rows_of(field: str, scores: Sequence[float], seconds: float) -> dict[tuple[str, str, str], Row]:
    rows = [
        Row("tune", f"s{i}", kind, field, "k", "made", "kidney", f"made {i}", score, 0.0, 0.0, 0.0, seconds)
        for kind in shape_fields.KINDS
        for i, score in enumerate(scores)
    ]
    return {row.place: row for row in rows}


def test_the_table_holds_means_pairs_and_seconds_of_one_sample() -> None:
    rows = rows_of("voxels", [0.5, 0.7], 8.0) | rows_of("codes", [0.8, 0.8], 2.0)
    columns = {
        name: Column(Solver("k", lambda cue, row: [], f"about {name}"), lambda x: x, 1234, number)
        for name, number in (("voxels", 1234), ("codes", 56789))
    }
    text = shape_fields.report("kidney, tune part", columns, rows, {"voxels": 0.9876, "codes": 1.0})
    voxels, codes = "0.600 [0.500, 0.700]", "0.800 [0.800, 0.800]"
    assert f"| voxels | {voxels} | {voxels} | 0.988 | 2.0 | 1,234 | 1,234 |" in text
    assert f"| codes | {codes} | {codes} | 1.000 | 0.5 | 1,234 | 56,789 |" in text
    assert "| codes ahead by | +0.200 [+0.100, +0.300] | +0.200" in text and "- codes: about codes" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--category", "unicorn"], "--category unicorn"),
        (["--cases", "0"], "--cases 0"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--part", "report"], "part 'report'"),
        (["--shapes", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_give_one_line_and_no_file(
    data: ShapeDataset, tiny_shapes_model: Path, tmp_path: Path, options: list[str], words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = {"--shapes": str(data.folder), "--model": str(tiny_shapes_model), "--category": "kidney"}
    chosen |= {"--out": str(tmp_path / "out")} | dict(zip(options[::2], options[1::2], strict=True))
    monkeypatch.setattr(sys, "argv", ["shape_fields", *(word for pair in chosen.items() for word in pair)])
    assert shape_fields.main() == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()
