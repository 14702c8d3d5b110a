"""Strong peers, few-shot training, the best weights and the clock of comparisons."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import nn

from genmed import train as training
from genmed.bench import peers
from genmed.data.split import Split, person
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import load as load_model
from genmed.hub import read_card
from genmed.loss import Batch, JointLoss
from genmed.plan import PRESETS, Plan
from genmed.train import BEST, CHECKPOINT, Spent, draw_batch, fair_minutes, few_shot, fit, time_spent, train

IDS = [f"case_{number}" for number in range(1, 7)]
SPLIT = {"dataset": "Tiny", "train": IDS[:4], "tune": IDS[4:5], "report": IDS[5:]}
PLAN = replace(tiny.PLAN, batch=2)
HIPPOCAMPI = Split("hippocampus", tuple(f"hippocampus_{n:03d}" for n in range(1, 41)), (), ())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bright blocks in noise, in MSD layout; the scans have different sizes."""
    rng = np.random.default_rng(0)
    cases = {id: tiny.blocks(rng, (20 + number, 16, 16)) for number, id in enumerate(IDS)}
    return tiny.write_msd(tmp_path_factory.mktemp("Tiny"), "Tiny", PLAN.labels, cases)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps(SPLIT))
    return path


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    from genmed.data import fingerprint

    monkeypatch.setitem(PRESETS, "small", PRESETS["small"]._replace(widths=(8, 16, 24), batch=1))
    monkeypatch.setattr(fingerprint, "LARGEST_BATCH", 1)


# Networks -------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """SwinUNETR gathers its position biases; with several threads their gradients add up in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("network", peers.NETWORKS)
def test_networks_are_about_as_large_as_ours(network: str) -> None:
    plan = replace(PLAN, widths=PRESETS["base"].widths)
    ours, theirs = (peers.parameters(model) for model in (build(plan), peers.untrained(plan, network)))
    assert abs(theirs / ours - 1) < 0.18


@pytest.mark.parametrize("network", peers.NETWORKS)
def test_every_network_resumes_exactly_and_comes_back_as_probabilities(
    network: str, data: Path, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    options = {"network": network, "augmentation": "randomised", "cases": 2, "draw": 3, "steps": 2}

    def stop_at_step_one(scans, plan, step, process=0):  # type: ignore[no-untyped-def]
        if step == 1:
            raise KeyboardInterrupt
        return draw_batch(scans, plan, step, process)

    whole = peers.train_peer(data, tmp_path / "whole", split, None, "small", **options)  # type: ignore[arg-type]
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(peers, "draw_batch", stop_at_step_one)
        peers.train_peer(data, tmp_path / "parts", split, None, "small", **options)  # type: ignore[arg-type]
    parts = peers.train_peer(data, tmp_path / "parts", split, None, "small", resume=True, **options)  # type: ignore[arg-type]
    a, b = (load_file(folder / CHECKPOINT) for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    about = json.loads((whole / peers.TRAINING).read_text())
    drawn = few_shot(Split("Tiny", *(tuple(SPLIT[part]) for part in ("train", "tune", "report"))), 2, 3).train
    assert (about["network"], about["augmentation"], about["cases"], about["draw"]) == (network, "randomised", 2, 3)
    assert about["few_shot"] == list(drawn) and set(about["tune"]) == {"dice", "front", "back"}
    assert {"minutes", "wall_minutes", "cpu_minutes", "parameters"} <= about.keys() and "dice" in about["best"]

    peer = peers.load_peer(whole)
    assert peer.plan.augmentation == "randomised" and (peer.plan.cases, peer.plan.draw) == (2, 3)
    image = torch.randn(2, 1, 17, 12, 9, generator=torch.Generator().manual_seed(0))
    found = peer(image)
    assert found.shape == (2, 3, 17, 12, 9) and found.min() >= 0
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 17, 12, 9))
    assert torch.equal(found, peer(image))
    assert torch.equal(peers.load_peer(whole, best=True)(image), found)  # one validation: the last is the best


def test_swin_takes_patches_that_leave_one_voxel_in_its_bottleneck() -> None:
    model = peers.untrained(replace(PLAN, patch=(24, 32, 24)), "swinunetr").train()
    image = torch.randn(1, 1, 24, 32, 24, requires_grad=True)
    logits = model(image)
    assert logits.shape == (1, 1, 3, 24, 32, 24)
    logits.square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.net.encoder10.parameters())  # type: ignore
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 1, 33, 8, 31)).shape == (1, 3, 33, 8, 31)


def test_weights_keep_integers_as_they_are() -> None:
    model = peers.untrained(PLAN, "swinunetr")
    before = model.state_dict()
    integers = [name for name, value in before.items() if not value.is_floating_point()]
    before[integers[0]].fill_(2049)  # half precision ends at 2048
    saved = load(peers.packed(model))
    assert all(torch.equal(saved[name], before[name]) for name in integers)
    assert all(saved[name].dtype == torch.float16 for name in before if name not in integers)


def test_folders_of_version_0_1_are_dynunets(tmp_path: Path) -> None:
    plan = replace(PLAN, widths=(8, 16, 24))
    model = peers.Peer(plan).half().float().eval()
    peers.save_peer(tmp_path, plan, model, {"minutes": 3.0, "tune": {"dice": 0.5}})
    entries = json.loads((tmp_path / peers.PLAN).read_text())
    old = {key: value for key, value in entries.items() if key not in ("augmentation", "cases", "draw")}
    (tmp_path / peers.PLAN).write_text(json.dumps(old))
    found, loaded = peers.load_peer(tmp_path)
    assert found == plan and peers.minutes_of(tmp_path) == 3.0
    image = torch.randn(1, 1, 12, 16, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model(image))
    with pytest.raises(GenMedError, match="best"):
        peers.load_peer(tmp_path, best=True)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"minutes": 1, "network": "mystery"}'])
def test_a_folder_that_does_not_tell_its_training_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / peers.TRAINING).write_text(text)
    with pytest.raises(GenMedError, match=peers.TRAINING) as refused:
        peers.load_peer(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_unknown_network_is_refused(data: Path, split: Path, tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="network 'vit' is unknown; choose one of: dynunet, swinunetr, diffusion"):
        peers.train_peer(data, tmp_path, split, None, "small", network="vit")


# The input-conditioned diffusion peer ---------------------------------------------------------------------


def watched(model: peers.Diffusion) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the network inside is shown from now on: its input, and the label part of it."""
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.denoiser.net.register_forward_pre_hook(
        lambda module, given: shown.append((given[0].detach(), given[0][:, 1:4].detach()))
    )
    return shown


def test_a_drawn_label_starts_from_noise_and_sees_a_clean_image() -> None:
    torch.manual_seed(0)
    model = peers.Diffusion(PLAN, draws=2)
    nn.init.normal_(model.denoiser.net.head.weight)
    shown = watched(model)
    image = torch.randn(1, 1, 16, 9, 12)
    first = model(image)
    assert len(shown) == 2 * peers.STEPS
    assert all(torch.equal(seen[:, :1, :16, :9, :12], image) for seen, _ in shown)
    for start in (0, peers.STEPS):
        assert not shown[start][1].any() and shown[start + 1][1].any()  # nothing, then its own estimate
    assert not torch.equal(shown[1][1], shown[peers.STEPS + 1][1])  # another draw
    assert torch.equal(model(image), first)
    torch.testing.assert_close(first.exp().sum(dim=1), torch.ones(1, 16, 9, 12), atol=1e-4, rtol=0)


def test_segmenting_never_looks_at_the_label() -> None:
    torch.manual_seed(0)
    model = peers.Diffusion(PLAN)
    nn.init.normal_(model.denoiser.net.head.weight)
    shown = watched(model)
    image = torch.randn(1, 16, 16, 16)
    for label in (torch.zeros(16, 16, 16, dtype=torch.uint8), torch.ones(16, 16, 16, dtype=torch.uint8)):
        training.tune_dice(peers.logits(model), [(image, label)], PLAN)
    half = len(shown) // 2
    assert half == peers.STEPS
    assert all(torch.equal(a[0], b[0]) for a, b in zip(shown[:half], shown[half:], strict=True))


def test_training_hides_the_label_where_samples_start(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = peers.Diffusion(PLAN)
    shown = watched(model)
    image, inside = torch.randn(2, 1, 16, 16, 16), torch.ones(2, 1, 16, 16, 16)
    labels = torch.zeros(2, 16, 16, 16, dtype=torch.long), torch.full((2, 16, 16, 16), 2)
    for hidden in (1.0, 0.0):
        monkeypatch.setattr(peers, "HIDDEN", hidden)
        for label in labels:
            peers.DiffusionLoss(model, "none")(Batch(image, label, inside, 5))
    assert all(torch.equal(seen[:, :1], image) for seen, _ in shown)
    assert torch.equal(shown[0][0], shown[1][0]) and not shown[0][1].any()
    assert not torch.equal(shown[2][1], shown[3][1])


def test_the_diffusion_loss_is_a_function_of_the_batch_and_its_seed() -> None:
    torch.manual_seed(0)
    loss = peers.DiffusionLoss(peers.Diffusion(PLAN), "randomised")
    inside = torch.ones(2, 1, 16, 16, 16)
    inside[..., 12:] = 0
    image, label = torch.randn(2, 1, 16, 16, 16), torch.randint(3, (2, 16, 16, 16))
    first, again, other = (loss(Batch(image, label, inside, seed))["loss"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    beyond = Batch(torch.where(inside > 0, image, 9.0), torch.where(inside[:, 0] > 0, label, 0), inside, 1)
    torch.testing.assert_close(loss(beyond)["loss"], first)


# Augmentation ---------------------------------------------------------------------------------------------


def test_only_the_conditional_share_of_ours_changes_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    from genmed import loss

    kinds: list[str] = []
    monkeypatch.setattr(loss, "augment", lambda x, inside, kind, generator: kinds.append(kind) or x)
    objective = JointLoss(build(PLAN), "randomised")
    image, label = torch.randn(2, 1, 16, 16, 16), torch.zeros(2, 16, 16, 16, dtype=torch.long)
    batch = Batch(image, label, torch.ones(2, 1, 16, 16, 16), 0)
    for mode in loss.MIXTURE:
        monkeypatch.setattr(loss, "draw_modes", lambda count, generator, mode=mode: [mode] * count)
        objective(batch)
    assert kinds == ["randomised", "randomised"]


def test_patches_are_moved_as_much_as_the_plan_says() -> None:
    assert training.spatial_changes(PLAN) == (0.2, 0.0)
    assert training.spatial_changes(replace(PLAN, cases=4)) == (0.6, 0.6)
    for cases in (0, 4):
        assert training.spatial_changes(replace(PLAN, augmentation="none", cases=cases)) == (0.0, 0.0)
    scan = torch.randn(1, 20, 20, 20), torch.randint(3, (20, 20, 20), dtype=torch.uint8)
    values = set(scan[0].flatten().tolist())
    plain = [draw_batch([scan], replace(PLAN, augmentation="none"), step) for step in range(10)]
    assert all(set(batch.image.flatten().tolist()) <= values for batch in plain)


# Few cases ------------------------------------------------------------------------------------------------


@given(few=st.integers(1, 40), more=st.integers(1, 40), draw=st.integers(0, 1000))
def test_few_shot_draws_are_nested_and_by_person(few: int, more: int, draw: int) -> None:
    few, more = sorted((few, more))
    small, large = (few_shot(HIPPOCAMPI, cases, draw) for cases in (few, more))
    assert len(small.train) == few and set(small.train) <= set(large.train) <= set(HIPPOCAMPI.train)
    assert len({person("hippocampus", id) for id in large.train}) == min(more, 20)
    assert small == few_shot(HIPPOCAMPI, few, draw) and list(small.train) == sorted(small.train)


def test_few_shot_draws_differ_and_take_either_side() -> None:
    draws = [few_shot(HIPPOCAMPI, 4, draw).train for draw in range(30)]
    assert len(set(draws)) == 30
    odd = sum(int(id[-3:]) % 2 for train_ids in draws for id in train_ids)
    assert 36 < odd < 84
    assert few_shot(HIPPOCAMPI, None) is HIPPOCAMPI


@pytest.mark.parametrize(("cases", "draw"), [(0, 0), (41, 0), (-1, 0), (None, 2)])
def test_an_impossible_draw_is_refused(cases: int | None, draw: int) -> None:
    with pytest.raises(GenMedError, match=r"choose 1 to|--cases"):
        few_shot(HIPPOCAMPI, cases, draw)


def test_our_few_shot_model_knows_its_cases_and_its_plan_comes_from_them(
    data: Path, split: Path, tmp_path: Path
) -> None:
    out = train(data, tmp_path / "few", split=split, preset="small", steps=1, augmentation="degraded", cases=1, draw=2)
    plan = load_model(out).plan
    assert (plan.augmentation, plan.cases, plan.draw) == ("degraded", 1, 2)
    (chosen,) = few_shot(Split("Tiny", *(tuple(SPLIT[part]) for part in ("train", "tune", "report"))), 1, 2).train
    assert plan.extent_mm[0] == 20 + IDS.index(chosen)
    card = (out / "card.md").read_text()
    assert chosen in card and not any(id in card for id in IDS if id != chosen)
    assert "1 cases" in read_card(out).training_data


def test_an_unknown_augmentation_is_refused(data: Path, split: Path, tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="augmentation 'mixup' is unknown; choose one of: none, nnunet"):
        train(data, tmp_path / "model", split=split, preset="small", steps=1, augmentation="mixup")
    with pytest.raises(GenMedError, match="plan key 'augmentation' must be one of none, nnunet"):
        replace(PLAN, augmentation="mixup")


# The loop: best weights and clocks ------------------------------------------------------------------------


class Slope(nn.Module):
    """An objective with one weight, which every step lowers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self.model.weight.sum()}


EMPTY = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), 0)


def ticks(step: float = 1.0):  # type: ignore[no-untyped-def]
    """A clock that moves on by `step` minutes at each look."""
    minute = iter(np.arange(0, 1e6, step))
    return lambda: float(next(minute))


@pytest.fixture
def each_step_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "VALIDATE_EVERY_MINUTES", 0)


def run(folder: Path, dice: list[float], steps: int, resume: bool = False) -> list[tuple[float, float]]:
    """Train with a validation a step whose Dice is given; the kept (weight, Dice)."""
    kept: list[tuple[float, float]] = []
    scores = iter(dice)
    fit(
        Slope(), lambda step, process: EMPTY, folder, steps=steps, learning_rate=0.1, resume=resume,
        validate=lambda model: {"dice": next(scores)},
        keep_best=lambda model, minutes, found: kept.append((model.weight.item(), found["dice"])),
    )  # fmt: skip
    return kept


@pytest.mark.usefixtures("each_step_judged")
def test_the_best_weights_are_kept_also_across_a_resume(tmp_path: Path) -> None:
    first = run(tmp_path, [0.5, 0.3, math.nan, 0.7, 0.7], steps=4)
    assert [dice for _, dice in first] == [0.5, 0.7]
    assert first[0][0] > first[1][0]  # later weights
    assert run(tmp_path, [0.6, 0.7, 0.8, 0.8], steps=7, resume=True)[0][1] == 0.8


def _unmeasured(plan: Plan) -> Plan:
    return replace(plan, typical=(), temperature=1.0, volume_error=())


@pytest.mark.usefixtures("each_step_judged")
def test_our_folder_keeps_the_best_weights_as_a_model(
    data: Path, split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.4, 0.1, 0.2])
    monkeypatch.setattr(training, "tune_dice", lambda segment, scans, plan: {"dice": next(scores)})
    out = train(data, tmp_path / "model", split=split, preset="small", steps=2)
    final, best = load_model(out), load_model(out / BEST)
    assert read_card(out / BEST).scores == {"tune dice": 0.9} and read_card(out).scores == {"tune dice": 0.2}
    assert _unmeasured(best.plan) == _unmeasured(final.plan)
    pairs = zip(best.denoiser.parameters(), final.denoiser.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)  # of the first step and of the second


@pytest.mark.parametrize(("budget", "validations"), [(40, 8), (10, 4), (None, 10)])
def test_validations_are_five_minutes_apart_and_a_quarter_of_a_short_budget(
    tmp_path: Path, budget: float | None, validations: int
) -> None:
    seen: list[float] = []
    fit(
        Slope(), lambda step, process: EMPTY, tmp_path, steps=1000, learning_rate=0.1, max_minutes=budget,
        clock=ticks(0.05), validate=lambda model: {"dice": seen.append(1.0) or 0.0},
    )  # fmt: skip
    assert abs(len(seen) - validations) <= 1


def test_minutes_are_counted_by_the_given_clock(tmp_path: Path) -> None:
    _, minutes = fit(
        Slope(), lambda step, process: EMPTY, tmp_path, steps=1000, learning_rate=0.1, max_minutes=30, clock=ticks()
    )
    assert 30 <= minutes <= 40
    spent = time_spent(tmp_path)
    assert spent.minutes == minutes and 0 < spent.wall_minutes < 5 and 0 < spent.cpu_minutes < 5
    _, more = fit(
        Slope(), lambda step, process: EMPTY, tmp_path, steps=1000, learning_rate=0.1, max_minutes=60, clock=ticks(),
        resume=True,
    )  # fmt: skip
    assert 60 <= more <= 70 and time_spent(tmp_path).wall_minutes > spent.wall_minutes


def test_the_fair_clock_counts_work_and_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    start = fair_minutes()
    time.sleep(0.3)
    asleep = fair_minutes() - start
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    busy = fair_minutes() - start - asleep
    assert asleep < 0.1 / 60 <= 0.3 / 60 <= busy
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert fair_minutes() * 4 == pytest.approx(time.process_time() / 60, rel=1e-2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fair_minutes() == pytest.approx(time.monotonic() / 60, rel=1e-4)


def test_checkpoints_of_version_0_1_resume(tmp_path: Path) -> None:
    run(tmp_path, [0.5, 0.5, 0.5], steps=2)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert {"step", "best", "settings", *Spent._fields} == set(file.metadata())
    save_file(load_file(tmp_path / CHECKPOINT), tmp_path / CHECKPOINT, {"step": "2", "minutes": "7.5"})
    assert time_spent(tmp_path) == Spent(7.5, 7.5, 7.5)
    assert run(tmp_path, [0.1, 0.2, 0.2], steps=4, resume=True) and time_spent(tmp_path).minutes > 7.5
