"""The shape model: its training, its loss and its folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cli import failed_in_one_line
from tiny_shapes import write_shapes
from typer.testing import CliRunner

import genmed as gm
from genmed import hub, shape_model
from genmed.cli import app
from genmed.data.shapes import read_shapes
from genmed.errors import GenMedError
from genmed.nets.refiner import Refiner
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model, load_shapes, save_shapes
from genmed.train_shapes import (
    MIXTURE,
    STEPS,
    WHOLE,
    ShapeBatch,
    ShapeLoss,
    category_weights,
    deformed,
    draw_batch,
    draw_sigma,
    prepare,
    reconstruction,
    train_shapes,
    training_shapes,
    whitening,
)

SMALL = {"modes": 24, "width": 64, "blocks": 2, "refiner": 4, "batch": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_shapes(folder).modules.state_dict())


def plan(**changes: object) -> ShapePlan:
    values = {"name": "toy", "categories": {"kidney": ("left",)}, "size": 8, "side": 8, "modes": 4, "text_channels": 3,
              "width": 8, "blocks": 1, "size_mean": 0.5, "size_deviation": 0.2}  # fmt: skip
    return ShapePlan(**{**values, **changes})  # type: ignore[arg-type]


def saved(folder: Path, **changes: object) -> tuple[ShapeModel, Path]:
    torch.manual_seed(0)
    model = build_shapes_model(plan(**changes))
    return model, save_shapes(model, folder, hub.Card("toy", "CC0", "nothing"))


def test_training_that_is_resumed_gives_the_weights_of_one_that_was_not(data: Path, tmp_path: Path) -> None:
    whole = train_shapes(data, tmp_path / "a", steps=8, **SMALL)

    class Stop(Exception):
        pass

    def stops(*arguments: object) -> ShapeBatch:
        if arguments[2] == 4:
            raise Stop
        return draw_batch(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr("genmed.train_shapes.draw_batch", stops)
        train_shapes(data, tmp_path / "b", steps=8, **SMALL)
    train_shapes(data, tmp_path / "b", steps=8, resume=True, **SMALL)
    first, second = tensors(whole), tensors(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_bank_holds_standardised_numbers_and_hides_unknown_sizes(data: Path, tmp_path: Path) -> None:
    shapes = read_shapes(data)
    model, bank = prepare(shapes, tmp_path, steps=1, seed=0, **SMALL)
    assert bank.size.isnan().sum() == 6  # one of every category and its mirror image
    known = bank.size[~bank.size.isnan()]
    assert float(known.mean()) == pytest.approx(0, abs=1e-3) and float(known.std()) == pytest.approx(1, rel=0.01)
    assert model.plan.categories == dict.fromkeys(("femur", "kidney", "spleen"), ("left", "right"))
    assert min(reconstruction(model, shapes, shapes.part("tune")).values()) > 0.85
    loss = ShapeLoss(model.denoiser, model.autoencoder, model.refiner)(draw_batch(bank, 16, 0, 0))
    assert all(torch.isfinite(value) for value in loss.values())


def test_mirror_images_are_shapes_of_the_other_side(data: Path) -> None:
    shapes = read_shapes(data)
    rows, x, weights = training_shapes(shapes, 16)
    count = len(shapes.part("train"))
    assert len(rows) == len(x) == len(weights) == 2 * count and float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(x[count:].flip(2), x[:count], atol=0, rtol=0)
    assert {row.side for row in rows[count:]} == {"right"}
    assert not any("left" in caption for row in rows[count:] for caption in row.captions)
    assert all("right" in row.captions[0] for row in rows[count:])


def test_whole_shapes_are_those_whose_codes_go_with_them(data: Path, tmp_path: Path) -> None:
    shapes = read_shapes(data)
    model, bank = prepare(shapes, tmp_path, steps=1, seed=0, **SMALL)
    rows, x, _ = training_shapes(shapes, 16)
    for i in range(len(rows)):  # mirror images, too
        torch.testing.assert_close(bank.whole(i), x[i])
    batch = draw_batch(bank, 8, 0, 0)
    torch.testing.assert_close(model.autoencoder.encode(batch.whole), batch.whole_codes, atol=1e-3, rtol=1e-3)
    assert batch.whole.shape == (WHOLE, 1, 16, 16, 16)


def test_a_refiner_starts_as_linear_interpolation_and_keeps_its_unit() -> None:
    refiner, x = Refiner(4, 3), torch.randn(2, 1, 8, 8, 8)
    linear = F.interpolate(x, size=(16,) * 3, mode="trilinear", align_corners=False)
    torch.testing.assert_close(refiner(x, torch.zeros(2, 3), 16), linear)
    assert refiner(x, torch.zeros(2, 3), 24).shape == (2, 1, 24, 24, 24)


def test_a_refiner_puts_every_part_of_a_voxel_where_it_belongs() -> None:
    refiner = Refiner(4, 1)
    torch.nn.init.zeros_(refiner.net.head.weight)
    with torch.no_grad():
        refiner.net.head.bias.copy_(torch.arange(8.0))
    fine = refiner(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1), 16)[0, 0]
    index = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"))
    torch.testing.assert_close(fine, (4 * (index[0] % 2) + 2 * (index[1] % 2) + index[2] % 2).float())


def test_a_trained_refiner_sharpens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns what a grid of half the fineness leaves out."""
    monkeypatch.setattr("genmed.train_shapes.SIDE", 8)
    monkeypatch.setattr("genmed.train_shapes.WHOLE_SIGMA", (0.01, 0.02))
    shapes = read_shapes(data)
    model, bank = prepare(shapes, tmp_path, steps=1, seed=0, **SMALL)
    numbers = shapes.part("tune")
    before = reconstruction(model, shapes, numbers)["femur"]
    loss = ShapeLoss(model.denoiser, model.autoencoder, model.refiner)
    optimiser = torch.optim.Adam(model.refiner.parameters(), 3e-3)
    for step in range(100):
        loss(draw_batch(bank, 1, step, 0))["whole"].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert reconstruction(model, shapes, numbers)["femur"] > before + 0.02


def test_a_batch_is_a_function_of_its_step(data: Path, tmp_path: Path) -> None:
    _, bank = prepare(read_shapes(data), tmp_path, steps=1, seed=0, **SMALL)
    first, again, other = draw_batch(bank, 8, 3, 0), draw_batch(bank, 8, 3, 0), draw_batch(bank, 8, 4, 0)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.text, again.text)
    assert torch.equal(first.whole, again.whole) and torch.equal(first.whole_text, again.whole_text)
    assert not torch.equal(first.codes, other.codes)


def test_small_categories_are_not_drowned() -> None:
    weights = category_weights(["a"] * 100 + ["b"] * 4)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[:100].sum() / weights[100:].sum()) == pytest.approx(5)


def test_levels_give_every_mode_of_the_mixture() -> None:
    sigma = draw_sigma(4000, 40.0, torch.Generator().manual_seed(0))
    text_clean, text_hidden, shape_clean = sigma[:, 2] == 0, sigma[:, 2] == 40, sigma[:, 0] == 0
    assert float(text_clean.float().mean()) == pytest.approx(MIXTURE["text"], abs=0.03)
    assert float((text_hidden & ~shape_clean).float().mean()) == pytest.approx(MIXTURE["no text"], abs=0.03)
    assert float(shape_clean.float().mean()) == pytest.approx(MIXTURE["retrieval"], abs=0.03)
    assert (sigma <= 40).all() and not (text_clean & shape_clean).any()


def test_a_deformed_copy_is_near_and_not_the_same() -> None:
    axis = torch.arange(16.0) - 7.5
    x = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()[None] - 5
    copy = deformed(x, torch.Generator().manual_seed(0))
    overlap = 2 * ((x < 0) & (copy < 0)).sum() / ((x < 0).sum() + (copy < 0).sum())
    assert 0.6 < float(overlap) < 0.999
    assert torch.equal(copy, deformed(x, torch.Generator().manual_seed(0)))


def test_whitened_captions_have_unit_variance() -> None:
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 20) + 1
    text = whitening(x, torch.ones(500), 6)(x)
    torch.testing.assert_close(text.T @ text / 500, torch.eye(6), atol=1e-3, rtol=0)
    flat = whitening(x[:1].expand(5, -1), torch.ones(5), 6)(x[:1])
    torch.testing.assert_close(flat, torch.zeros(1, 6), atol=1e-4, rtol=0)


def test_a_folder_gives_back_plan_and_weights(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "toy")
    back = load_shapes(folder)
    assert back.plan == model.plan and back.folder == folder
    for name, value in back.modules.state_dict().items():
        torch.testing.assert_close(value, model.modules.state_dict()[name], atol=1e-3, rtol=1e-3)
    assert isinstance(gm.load(str(folder)), ShapeModel)
    assert hub.info(folder)["plan"]["kind"] == "shapes"


def test_large_weights_are_kept_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_model, "SHARD_BYTES", 3000)
    model, folder = saved(tmp_path / "toy")
    shards = sorted(path.name for path in folder.glob("weights*"))
    assert len(shards) > 2 and shards[0] == f"weights-00001-of-{len(shards):05d}.safetensors"
    assert max(path.stat().st_size for path in folder.glob("weights*")) < 6000
    back = load_shapes(folder)
    torch.testing.assert_close(back.projection.weight, model.projection.weight, atol=1e-3, rtol=1e-3)
    copy = hub.push_dir(folder, tmp_path / "elsewhere")
    assert load_shapes(copy).sha256 == back.sha256
    files = hub.read_folder(folder)
    other = hub.weights_sha256({**files, shards[-1]: files[shards[-1]] + b"x"})
    assert hub.weights_sha256(files) == back.sha256 != other  # the last shard counts, too
    (folder / shards[1]).write_bytes(b"altered")
    with pytest.raises(GenMedError, match=rf"{shards[1]}: corrupt or altered"):
        load_shapes(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(GenMedError, match=f"lacks {shards[1]}"):
        load_shapes(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "toy")
    files = hub.read_folder(folder)
    torch.save({"x": torch.zeros(1)}, tmp_path / "pickle")
    hub.write_folder(folder, files | {hub.WEIGHTS: (tmp_path / "pickle").read_bytes()})
    with pytest.raises(GenMedError, match="not a safetensors file"):
        load_shapes(folder)


def test_models_of_images_and_of_shapes_are_told_apart(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "toy")
    with pytest.raises(GenMedError, match="model of shapes"):
        hub.load(folder)
    with pytest.raises(GenMedError, match=r"genmed\.complete"):
        gm.segment(gm.load(folder), gm.Volume(np.zeros((1, 4, 4, 4)), np.eye(4)))
    with pytest.raises(GenMedError, match="model of images"):
        load_shapes("hippocampus-mr")


@pytest.mark.parametrize(
    "changes", [{"modes": 0}, {"size_deviation": 0.0}, {"sigma_min": 50.0}, {"categories": {}}, {"format_version": 2}]
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(GenMedError):
        plan(**changes)


def test_plans_survive_json_and_name_what_is_wrong() -> None:
    assert ShapePlan.from_json(plan().to_json()) == plan()
    with pytest.raises(GenMedError, match="'colour' is unknown"):
        ShapePlan.from_json(plan().to_json().replace('"name"', '"colour": 1, "name"'))
    with pytest.raises(GenMedError, match="not valid"):
        ShapePlan.from_json("[]")


def test_too_few_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match=r"holds no index\.parquet"):
        train_shapes(tmp_path, tmp_path / "out")


def test_the_train_command_knows_a_folder_of_shapes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught = {}
    monkeypatch.setattr("genmed.train_shapes.train_shapes", lambda folder, out, **options: caught.update(options))
    options = ["--out", str(tmp_path / "out"), "--max-minutes", "3", "--resume", "--seed", "2"]
    result = CliRunner().invoke(app, ["train", str(data), *options])
    assert result.exit_code == 0, result.output
    assert caught == {"max_minutes": 3.0, "resume": True, "steps": STEPS, "seed": 2}
    refused = CliRunner().invoke(app, ["train", str(data), *options, "--init", "x"])
    failed_in_one_line(refused, "--init", "not for shapes")
