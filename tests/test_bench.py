import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from genmed.bench import hippocampus, memory, peers
from genmed.bench.cases import HIPPOCAMPUS
from genmed.bench.hippocampus import Method, mean_interval, per_case, read_curve, report
from genmed.data.dataset import read_dataset
from genmed.data.split import read_split
from genmed.errors import GenMedError
from genmed.loss import Batch, categorical_loss
from genmed.metrics import Score
from genmed.volume import Volume, read

SHAPE = (24, 16, 16)
IDS = [f"case_{number}" for number in range(1, 7)]
SPLIT = {"dataset": "Tiny", "train": IDS[:3], "tune": IDS[3:4], "report": IDS[4:]}
PLAN = replace(tiny.PLAN, widths=(8, 16, 24, 32))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bright blocks in noise, in MSD layout."""
    rng = np.random.default_rng(0)
    cases = {id: tiny.blocks(rng, SHAPE) for id in IDS}
    return tiny.write_msd(tmp_path_factory.mktemp("Tiny"), "Tiny", PLAN.labels, cases)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps(SPLIT))
    return path


@pytest.fixture(scope="module")
def finished(data: Path, split: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run: every stage of both, two steps each."""
    out = tmp_path_factory.mktemp("bench")
    hippocampus.run(data, out, minutes=5, preset="small", split=split, steps=2)
    return out


# The peer -------------------------------------------------------------------------------------------------


def test_group_norms_are_the_instance_norms_they_replace() -> None:
    torch.manual_seed(0)
    before = peers.dynunet(PLAN).eval()
    for module in before.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 1, 16, 24, 16)
    with torch.no_grad():
        expected = before(x)
        after = peers.group_norms(peers.without_aliases(before))
        assert not any(isinstance(module, nn.InstanceNorm3d) for module in after.modules())
        torch.testing.assert_close(after(x), expected, atol=1e-4, rtol=1e-4)


def test_peer_takes_any_size_and_names_each_weight_once() -> None:
    peer = peers.Peer(PLAN)
    image = torch.randn(1, 1, 19, 16, 13)
    with torch.no_grad():
        assert peer.train()(image).shape == (1, 1 + peers.HEADS, 3, 19, 16, 13)
        assert peer.eval()(image).shape == (1, 3, 19, 16, 13)
    places = [weight.data_ptr() for weight in peer.state_dict().values()]
    assert len(set(places)) == len(places)
    assert sum(weight.numel() for weight in peer.state_dict().values()) == sum(
        weight.numel() for weight in peers.dynunet(PLAN).parameters()
    )


def test_deep_supervision_weighs_heads_as_nnunet_does() -> None:
    torch.manual_seed(0)
    heads = torch.randn(2, 3, 3, 8, 8, 8)
    label = torch.randint(3, (2, 8, 8, 8))
    inside = torch.ones(2, 1, 8, 8, 8)

    class Fixed(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return heads

    loss = peers.SegmentationLoss(Fixed(), "none")(Batch(torch.randn(2, 1, 8, 8, 8), label, inside, 0))["loss"]
    parts = [categorical_loss(heads[:, k], label, inside) for k in range(3)]
    torch.testing.assert_close(loss, (4 * parts[0] + 2 * parts[1] + parts[2]) / 7)


def test_peer_does_not_see_beyond_the_scan() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(image)
            return torch.zeros(1, 1, 3, 8, 8, 8)

    inside = torch.ones(1, 1, 8, 8, 8)
    inside[..., 5:] = 0
    batch = Batch(torch.randn(1, 1, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long), inside, 3)
    peers.SegmentationLoss(Spy())(batch)
    assert not seen[0][..., 5:].any() and seen[0][..., :5].all()


def test_peer_trains_starts_from_another_and_comes_back_as_saved(
    data: Path, split: Path, tmp_path: Path
) -> None:
    coarse = peers.train_peer(data, tmp_path / "coarse", split, None, "small", spacing=2.0, steps=2)
    fine = peers.train_peer(data, tmp_path / "fine", split, None, "small", init=coarse, steps=2)
    plan, model = peers.load_peer(fine)
    assert plan.spacing_mm == (1.0, 1.0, 1.0) and not model.training
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert set(json.loads((fine / peers.TRAINING).read_text())["tune"]) == {"dice", "front", "back"}
    _, first = peers.load_peer(coarse)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True))


def test_folder_that_is_no_peer_is_refused_in_one_line(tmp_path: Path) -> None:
    peers.save_peer(tmp_path, PLAN, nn.Linear(1, 1), {"minutes": 1.0})
    with pytest.raises(GenMedError, match="does not fit"):
        peers.load_peer(tmp_path)
    (tmp_path / peers.WEIGHTS).unlink()
    with pytest.raises(GenMedError, match="folder of a trained peer"):
        peers.load_peer(tmp_path)


def test_peer_answers_on_the_scans_own_grid() -> None:
    affine = np.array([[0, 0, 1.5, 3], [-1.0, 0, 0, 4], [0, 0.7, 0, 5], [0, 0, 0, 1]])
    scan = Volume(np.random.default_rng(0).normal(size=(1, 20, 24, 14)).astype(np.float32), affine)
    labels = hippocampus.peer_labels(PLAN, peers.Peer(PLAN).eval(), scan)
    assert labels.data.shape == scan.data.shape and np.array_equal(labels.affine, affine)
    assert set(np.unique(labels.data)) <= {0, 1, 2}


# The run --------------------------------------------------------------------------------------------------


def test_run_writes_table_rows_of_every_case_and_curves(finished: Path) -> None:
    assert {"table.md", "cases.csv", "curve.svg", "curve.png"} <= {path.name for path in finished.iterdir()}
    with (finished / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["case"], row["name"]) for row in rows] == [
        (method, case, name)
        for method in ("GenMed", "DynUNet")
        for case in IDS[4:]
        for name in ("front", "back")
    ]
    assert "2 cases of 2 persons" in (finished / "table.md").read_text()


def test_run_resumes_without_redoing_finished_work(
    finished: Path, data: Path, split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*args: Any, **options: Any) -> None:
        raise AssertionError("trained again")

    segmented: list[str] = []

    def counted(model: Any, scan: Volume, **options: Any) -> Any:
        segmented.append(Path(str(scan.path)).name)
        return original(model, scan, **options)

    original = hippocampus.segment
    monkeypatch.setattr(hippocampus, "train", no_training)
    monkeypatch.setattr(peers, "train_peer", no_training)
    monkeypatch.setattr(hippocampus, "segment", counted)
    before = (finished / "table.md").read_bytes()
    next((finished / "predictions").glob(f"genmed-*/{IDS[4]}.nii.gz")).unlink()
    hippocampus.run(data, finished, minutes=5, preset="small", split=split, steps=2)
    assert segmented == [f"{IDS[4]}.nii.gz"]
    assert (finished / "table.md").read_bytes() == before


def test_interrupted_evaluation_keeps_its_finished_cases(data: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def label(scan: Volume) -> Volume:
        asked.append(Path(str(scan.path)).name.removesuffix(".nii.gz"))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return scan.like(np.ones(SHAPE, np.uint8), {1: "front"})

    method, dataset = Method("A", "a", label, 1, None, []), read_dataset(data)
    with pytest.raises(KeyboardInterrupt):
        hippocampus.evaluated(method, dataset, IDS[4:], tmp_path)
    scores = hippocampus.evaluated(method, dataset, IDS[4:], tmp_path)
    assert asked == [IDS[4], IDS[5], IDS[5]]
    assert [score.case for score in scores] == [IDS[4], IDS[4], IDS[5], IDS[5]]


def test_other_recipe_in_the_same_folder_is_refused(finished: Path, data: Path, split: Path) -> None:
    with pytest.raises(GenMedError, match="was started with"):
        hippocampus.run(data, finished, minutes=6, preset="small", split=split, steps=2)


def test_given_models_are_compared_without_training(
    finished: Path, data: Path, split: Path, tmp_path: Path
) -> None:
    text = hippocampus.run(
        data, tmp_path, minutes=5, model=finished / "genmed", peer=finished / "dynunet", split=split
    )
    assert text == (finished / "table.md").read_text()
    assert not (tmp_path / "genmed").exists()


def test_coarse_and_fine_stage_make_one_curve(tmp_path: Path) -> None:
    for name, rows in (("a-coarse", [(10, 2.0, 0.5)]), ("a", [(5, 1.0, 0.6), (20, 4.0, 0.7)])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": s, "minutes": m, "dice": d}) for s, m, d in rows]
        (tmp_path / name / "curve.jsonl").write_text("\n".join(lines) + "\n")
    curve = read_curve(tmp_path / "a")
    assert [(row["step"], row["minutes"]) for row in curve] == [(10, 2), (15, 3), (30, 6)]


def test_published_split_keeps_persons_apart_and_reports_on_44_cases() -> None:
    split = read_split(HIPPOCAMPUS)
    assert len(split.report) == 44


# The table ------------------------------------------------------------------------------------------------


def scores(dice: dict[str, tuple[float, float]], hd95_mm: float = 1.0) -> list[Score]:
    return [
        Score(case, value, name, number, hd95_mm, 0.9, 1.0, 1.0)
        for case, pair in dice.items()
        for value, (name, number) in enumerate(zip(("front", "back"), pair, strict=True), start=1)
    ]


def test_table_gives_exact_means_and_paired_differences() -> None:
    ours = scores({"a": (0.9, 0.8), "b": (0.7, 0.6), "c": (0.8, 0.8)})
    peer = scores({"c": (0.7, 0.7), "b": (0.6, 0.5), "a": (0.8, 0.7)}, hd95_mm=1.5)
    people = {"a": "p", "b": "p", "c": "q"}
    curve = [{"step": k, "minutes": float(k), "dice": k / 20} for k in range(1, 11)]
    methods = [
        Method("GenMed", "x", lambda scan: scan, 2_340_000, 60.4, curve),
        Method("DynUNet", "y", lambda scan: scan, 2_000_000, None, []),
    ]
    text = report(methods, {"GenMed": ours, "DynUNet": peer}, people)
    # persons p (mean 0.75 of two cases) and q (0.8): resampling gives 0.75 to 0.8, weighted by cases
    assert "| Dice, mean of labels | 0.7667 [0.7500, 0.8000] | 0.6667 [0.6500, 0.7000] | " in text
    assert "| +0.1000 [+0.1000, +0.1000] |" in text
    assert re.search(r"\| Dice, front \| 0\.8000 .*\| Dice, back \| 0\.7333 ", text, re.DOTALL)
    assert "| HD95 (mm), back | 1.000 [1.000, 1.000] | 1.500 [1.500, 1.500] | -0.500 [-0.500, " in text
    assert "| parameters | 2.34 M | 2.00 M | |" in text
    assert "| training minutes | 60 | – | |\n| training steps | 10 | – | |" in text
    assert "| tune Dice after 50, 75, 90, 100 % of the minutes | 0.250, 0.350, 0.450, 0.500 | – | |" in text
    assert "3 cases of 2 persons" in text and "missed" not in text


def test_missed_structure_counts_as_far_away_and_is_told() -> None:
    found = scores({"a": (0.0, 0.5)}, hd95_mm=float("inf"))
    assert per_case(found, "hd95_mm") == {"a": hippocampus.MISSED_MM}
    method = Method("GenMed", "x", lambda scan: scan, 1, None, [])
    other = Method("DynUNet", "y", lambda scan: scan, 1, None, [])
    text = report([method, other], {"GenMed": found, "DynUNet": scores({"a": (1.0, 1.0)})}, {"a": "p"})
    assert "a missed structure (2 in all) counts 100 mm" in text


def test_interval_resamples_whole_persons() -> None:
    values = np.array([0.0, 1.0, 0.0, 1.0])
    assert mean_interval(values, ["p", "p", "q", "q"], 2) == "0.50 [0.50, 0.50]"
    assert mean_interval(values, ["p", "q", "r", "s"], 2) != "0.50 [0.50, 0.50]"


# Memory ---------------------------------------------------------------------------------------------------


def test_memory_is_measured_on_the_whole_command(capfd: pytest.CaptureFixture[str]) -> None:
    peak_gb, minutes = memory.run((32, 24, 16))
    assert 0.1 < peak_gb < memory.LIMIT_GB and minutes > 0


def test_synthetic_scan_is_a_16_bit_scan_at_1_mm(tmp_path: Path) -> None:
    memory.synthetic_scan((6, 5, 4)).save(tmp_path / "scan.nii.gz")
    scan = read(tmp_path / "scan.nii.gz")
    assert scan.data.dtype == np.int16 and scan.spacing_mm == (1.0, 1.0, 1.0) and np.ptp(scan.data) > 0
