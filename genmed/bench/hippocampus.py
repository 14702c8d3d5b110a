"""`genmed bench hippocampus`: GenMed and MONAI's DynUNet on the same cases with the same recipe and minutes.

Both are trained by one loop on the training part, unless trained folders are given, and then segment every
report case in full, on its own grid. No choice ever looks at the report part. Every stage leaves its result
in the output folder and is not redone after a kill; cases are kept one by one.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genmed.bench import peers
from genmed.bench.cases import HIPPOCAMPUS
from genmed.bench.kept import write_table
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.split import person, read_split
from genmed.errors import GenMedError
from genmed.files import sha256_of, write_bytes, write_json
from genmed.hub import SUMS, load, read_card
from genmed.metrics import Score, bootstrap_interval, evaluate
from genmed.plan import PRESETS, Plan
from genmed.progress import track
from genmed.tasks.segment import segment
from genmed.tasks.view import View
from genmed.train import CHECKPOINT, fair_minutes, train
from genmed.volume import Volume, read

COARSE_MM, COARSE_SHARE = 2.0, 0.2  # both are pre-trained on a coarser grid for this share of the minutes
MISSED_MM = 100.0  # HD95 of a structure that was missed altogether
PLATEAU = (0.5, 0.75, 0.9, 1.0)  # shares of the minutes at which the table tells the tune Dice
METRICS = {"dice": ("Dice", 4), "hd95_mm": ("HD95 (mm)", 3), "nsd": ("NSD at 1 mm", 4)}


@dataclass(frozen=True)
class Method:
    """One trained competitor."""

    name: str
    key: str  # folder of its predictions: changes with its weights
    label: Callable[[Volume], Volume]
    parameters: int
    minutes: float | None
    curve: list[dict[str, float]]  # Dice on the tune part while training


def run(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float,
    model: str | Path | None = None,
    peer: str | Path | None = None,
    preset: str = "base",
    split: str | Path = HIPPOCAMPUS,
    steps: int | None = None,
) -> str:
    """Train what is not given, evaluate both on the report part, print the table and write it to `out`.

    Args:
        minutes: training time of each, split alike between the coarse and the working grid.
        model: a trained model (name or folder) to compare, such as the shipped hippocampus-mr.
        peer: folder of a trained peer (`python -m genmed.bench.peers`).
        steps: training steps of a stage at most.

    Returns:
        The table in Markdown. `out` gets table.md, cases.csv, curve.svg, curve.png and all predictions.
    """
    out = Path(out)
    dataset = read_dataset(data)
    parts = read_split(split, dataset.ids)
    if model is not None:
        preset = preset_of(load(model).plan, preset)
    recipe = Recipe(Path(data), out, Path(split), minutes, preset, steps)
    methods = [
        genmed_method(model if model is not None else recipe.train_ours()),
        dynunet_method(peer if peer is not None else recipe.train_peer()),
    ]
    scores = {method.name: evaluated(method, dataset, parts.report, out) for method in methods}
    people = {id: person(parts.dataset, id) for id in parts.report}
    text = report(methods, scores, people)
    write_csv(out / "cases.csv", scores)
    write_bytes(out / "table.md", text.encode("utf-8"))
    draw_curves(out, methods)
    print(text)
    return text


# Training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What both competitors are trained with: a stage on a coarse grid, then one on the working grid."""

    data: Path
    out: Path
    split: Path
    minutes: float
    preset: str
    steps: int | None = None

    def train_ours(self) -> Path:
        """The joint model, by the project's own command."""

        def stage(folder: Path, minutes: float, spacing: float | None, init: Path | None) -> None:
            if not (folder / SUMS).exists():
                train(
                    self.data, folder, split=self.split, max_minutes=minutes, preset=self.preset,
                    spacing=spacing, init=init, steps=self.steps, resume=(folder / CHECKPOINT).exists(),
                    clock=fair_minutes,
                )  # fmt: skip

        return self._stages("genmed", stage)

    def train_peer(self) -> Path:
        """MONAI's DynUNet."""

        def stage(folder: Path, minutes: float, spacing: float | None, init: Path | None) -> None:
            if not (folder / peers.TRAINING).exists():
                peers.train_peer(
                    self.data, folder, self.split, minutes, self.preset,
                    spacing=spacing, init=init, steps=self.steps, resume=(folder / CHECKPOINT).exists(),
                )  # fmt: skip

        return self._stages("dynunet", stage)

    def _stages(self, name: str, stage: Callable[[Path, float, float | None, Path | None], None]) -> Path:
        fine, coarse = self.out / name, _coarse(self.out / name)
        self._same_as_before()
        stage(coarse, COARSE_SHARE * self.minutes, COARSE_MM, None)
        stage(fine, (1 - COARSE_SHARE) * self.minutes, None, coarse)
        return fine

    def _same_as_before(self) -> None:
        """Finished stages are only reused for the same recipe."""
        path = self.out / "recipe.json"
        mine = {key: getattr(self, key) for key in ("minutes", "preset", "steps")}
        if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != mine:
            raise GenMedError(f"{self.out}: was started with {before}; use that, or another --out.")
        write_json(path, mine)


def _coarse(folder: Path) -> Path:
    """Where the coarse stage of a training lies."""
    return folder.with_name(f"{folder.name}-coarse")


def preset_of(plan: Plan, otherwise: str) -> str:
    """The preset of a trained plan, so that the peer is as wide and as deep."""
    return next((name for name, preset in PRESETS.items() if preset.widths == plan.widths), otherwise)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Validation scores of a training, after those of the coarse stage if that lies beside it."""
    before = read_curve(_coarse(folder)) if _coarse(folder).is_dir() else []
    path = folder / "curve.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    start = {key: before[-1][key] if before else 0 for key in ("minutes", "step")}
    rows = [json.loads(line) for line in lines]
    return before + [row | {key: row[key] + shift for key, shift in start.items()} for row in rows]


# Competitors ----------------------------------------------------------------------------------------------


def genmed_method(name_or_dir: str | Path) -> Method:
    """Ours, as a user runs it: `segment` in conditional mode."""
    model = load(name_or_dir)
    assert model.folder is not None
    stages = [folder for folder in (_coarse(model.folder), model.folder) if folder.is_dir()]
    return Method(
        name="GenMed",
        key=f"genmed-{model.sha256[:12]}",
        label=lambda scan: segment(model, scan, mode="conditional").labels,
        parameters=_count(model.denoiser),
        minutes=sum(read_card(folder).minutes or 0 for folder in stages) or None,
        curve=read_curve(model.folder),
    )


def dynunet_method(folder: str | Path) -> Method:
    """The peer, on the same preprocessed scan and mapped back by the same code."""
    folder = Path(folder)
    plan, model = peers.load_peer(folder)
    return Method(
        name="DynUNet",
        key=f"dynunet-{sha256_of(folder / peers.WEIGHTS)[:12]}",
        label=lambda scan: peer_labels(plan, model, scan),
        parameters=_count(model),
        minutes=peers.minutes_of(folder),
        curve=read_curve(folder),
    )


@torch.no_grad()
def peer_labels(plan: Plan, model: nn.Module, scan: Volume) -> Volume:
    """Label map of a scan, on its own grid, by a network that maps images to logits."""
    view = View.of(plan, scan)
    soft = model(view.image).softmax(dim=1)[0].numpy()
    values = np.asarray(plan.label_values, dtype=np.min_scalar_type(max(plan.label_values)))
    names = dict(zip(plan.label_values, plan.labels, strict=True))
    return scan.like(values[view.space.labels_to_input(soft)], names)


def _count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def evaluated(method: Method, dataset: Dataset, ids: Sequence[str], out: Path) -> list[Score]:
    """Scores of every case; label maps that are there already are not computed again."""
    folder = out / "predictions" / method.key
    for id in track(ids, f"{method.name} segments"):
        if not (target := folder / f"{id}.nii.gz").exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            method.label(read(dataset.case(id).images)).save(target)
    truth = dataset.case(ids[0]).label
    assert truth is not None
    names = {value: name for value, name in dataset.labels.items() if value}
    return evaluate(folder, truth.parent, cases=ids, labels=names)


# The table ------------------------------------------------------------------------------------------------


def report(
    methods: Sequence[Method], scores: Mapping[str, Sequence[Score]], people: Mapping[str, str]
) -> str:
    """The table with its caption, in Markdown."""
    ours, peer = methods
    shares = ", ".join(f"{share:.0%}".rstrip("%") for share in PLATEAU)
    lines = [
        f"| | {ours.name} | {peer.name} | paired difference |",
        "|---|---|---|---|",
        *score_rows(scores[ours.name], scores[peer.name], people),
        f"| parameters | {ours.parameters / 1e6:.2f} M | {peer.parameters / 1e6:.2f} M | |",
        f"| training minutes | {_minutes(ours)} | {_minutes(peer)} | |",
        f"| training steps | {steps_of(ours.curve)} | {steps_of(peer.curve)} | |",
        f"| tune Dice after {shares} % of the minutes | {plateau(ours.curve)} | {plateau(peer.curve)} | |",
        "",
        f"{len(people)} cases of {len(set(people.values()))} persons, none seen in training or tuning, on "
        "the scans' own grids. Mean [95 % bootstrap interval, whole persons resampled]. HD95 and NSD as the "
        f"package surface-distance defines them{_missed([*scores[ours.name], *scores[peer.name]])}.",
    ]
    return "\n".join(lines) + "\n"


def score_rows(ours: Sequence[Score], peer: Sequence[Score], people: Mapping[str, str]) -> list[str]:
    """Rows of means with intervals: each metric over all labels, then for each label."""
    names = list(dict.fromkeys(score.name for score in ours))
    rows = []
    for metric, (title, digits) in METRICS.items():
        for name in (None, *names):
            a, b = (per_case(scores, metric, name) for scores in (ours, peer))
            groups = [people[id] for id in a]
            left, right = np.array([a[id] for id in a]), np.array([b[id] for id in a])
            cells = [mean_interval(left, groups, digits), mean_interval(right, groups, digits)]
            cells.append(mean_interval(left - right, groups, digits, sign="+"))
            rows.append(f"| {title}, {name or 'mean of labels'} | " + " | ".join(cells) + " |")
    return rows


def per_case(scores: Sequence[Score], metric: str, name: str | None = None) -> dict[str, float]:
    """One number a case: the metric of one label, or its mean over the labels."""
    found: dict[str, list[float]] = {}
    for score in scores:
        if name in (None, score.name):
            value = float(getattr(score, metric))
            found.setdefault(score.case, []).append(value if np.isfinite(value) else MISSED_MM)
    return {case: float(np.mean(values)) for case, values in found.items()}


def mean_interval(values: np.ndarray, groups: Sequence[str], digits: int, sign: str = "") -> str:
    """'mean [low, high]', the interval by resampling whole groups."""
    low, high = bootstrap_interval(values, groups=groups)
    mean, low_text, high_text = (f"{x:{sign}.{digits}f}" for x in (values.mean(), low, high))
    return f"{mean} [{low_text}, {high_text}]"


def _missed(scores: Sequence[Score]) -> str:
    count = sum(not np.isfinite(score.hd95_mm) for score in scores)
    return f"; a missed structure ({count} in all) counts {MISSED_MM:g} mm" if count else ""


def _minutes(method: Method) -> str:
    return "–" if method.minutes is None else f"{method.minutes:.0f}"


def steps_of(curve: Sequence[Mapping[str, float]]) -> str:
    """Training steps at the end of a curve."""
    return f"{curve[-1]['step']:,.0f}" if curve else "–"


def plateau(curve: Sequence[Mapping[str, float]]) -> str:
    """Dice on the tune part late in the training: is it still rising?"""
    if not curve:
        return "–"
    end = curve[-1]["minutes"]
    cells = []
    for share in PLATEAU:
        reached = [row["dice"] for row in curve if row["minutes"] <= share * end]
        cells.append(f"{reached[-1]:.3f}" if reached else "–")
    return ", ".join(cells)


def write_csv(path: Path, scores: Mapping[str, Sequence[Score]]) -> None:
    """One row per method, case and label."""
    columns = ["method", *(field.name for field in fields(Score))]
    scored = [(method, *astuple(score)) for method, rows in scores.items() for score in rows]
    write_table(path, columns, [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in scored])


def draw_curves(out: Path, methods: Sequence[Method]) -> None:
    """Dice on the tune part over the training minutes, as curve.svg and curve.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        minutes, dice = ([row[key] for row in method.curve] for key in ("minutes", "dice"))
        axes.plot(minutes, dice, marker=".", label=method.name)
    axes.set(xlabel="training minutes", ylabel="Dice on the tune part")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, out, "curve")


def save_figure(figure: Any, out: Path, name: str) -> None:
    """A matplotlib figure as `name`.svg and `name`.png, without a date: the same numbers give the same files."""
    for kind in ("svg", "png"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        write_bytes(out / f"{name}.{kind}", picture.getvalue())
