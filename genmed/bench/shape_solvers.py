"""The columns of `genmed bench shapes`: ours and its peers, loaded, trained, or with settings chosen on tune shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from genmed import hub
from genmed.bench import cues
from genmed.bench.cases import stratified
from genmed.bench.shape_conditioned import DRAWN, Conditioned, conditioned
from genmed.bench.shape_peers import Interpolation, Nearest, PcaSettings, Statistical, nearest, statistical
from genmed.cue import Cue
from genmed.data.shapes import INDEX, ShapeDataset, ShapeRow
from genmed.errors import GenMedError
from genmed.files import sha256_of, write_json
from genmed.metrics import dice
from genmed.shape import Shape
from genmed.shape_model import ShapeModel
from genmed.tasks.complete import START_SIGMA, STEPS, Completion, complete

VERSION = 5  # raise it whenever cues, peers or scores change: nothing of an older one is used again
SAMPLES = 12  # of ours and of the conditioned peer, averaged
TUNE_SHAPES = 12
TUNE_KINDS = ("one plane", "three planes", "half missing", "redundant", "noisy points")
PCA_CHOICES: dict[str, tuple[Any, ...]] = {  # chosen one after the other, the first values to start with
    "sided": (False, True),
    "modes": (60, 30, 120, 200),
    "prior": (1.0, 3.0, 0.3),
    "kept": (1, 4),
}
PCA = "pca.json"

Find = Callable[[Cue, ShapeRow], Sequence[Shape]]


@dataclass(frozen=True)
class Method:
    """A column. `told`: it is told which structure this is, so that it cannot complete one it was not trained on."""

    title: str
    told: bool = False


METHODS = {
    "genmed": Method("GenMed"),
    "genmed-text": Method("GenMed, category and side as text", told=True),
    "pca": Method("PCA + GP, category told", told=True),
    "pca-unknown": Method("PCA + GP, category not told"),
    "pca-likely": Method("PCA + GP with our bounds and last step, category told", told=True),
    "pca-likely-unknown": Method("PCA + GP with our bounds and last step, category not told"),
    "conditioned": Method("input-conditioned diffusion"),
    "conditioned-gp": Method("input-conditioned diffusion + GP"),
    "interpolation": Method("shape-based interpolation"),
    "nearest": Method("nearest training shape"),
}
OURS = ("genmed", "genmed-text")


@dataclass(frozen=True)
class Solver:
    """A method with its weights: `complete` gives shapes that are averaged. `key` names weights and settings."""

    key: str
    complete: Find
    note: str = ""


@dataclass(frozen=True)
class Lab:
    """The shapes, our model, the folder of the peers, and the minutes of the conditioned one's training."""

    data: ShapeDataset
    model: ShapeModel
    runs: Path
    minutes: float | None = None

    @cached_property
    def index(self) -> str:
        """What names the training shapes."""
        return sha256_of(self.data.folder / INDEX)

    @property
    def training_minutes(self) -> float:
        """Those that were asked for, else those of our model."""
        own = hub.read_card(self.model.folder).minutes if self.model.folder else None
        if (minutes := self.minutes or own) is None:
            raise GenMedError("the model does not tell the minutes of its training; give --minutes.")
        return minutes

    @cached_property
    def statistical(self) -> Callable[[bool], Statistical]:
        """The statistical models with left and right apart, or together; each is fitted once."""
        return cache(partial(statistical, self.data))

    @cached_property
    def tune(self) -> list[TuneCue]:
        """The cues on which settings are chosen."""
        return tune_cues(self.data)


def solvers(lab: Lab, columns: Sequence[str]) -> dict[str, Solver]:
    """The methods of these names, ready; trains and chooses what is missing in the folder of the peers."""
    found: dict[str, Solver] = {}
    if {name for name in columns if name.startswith("pca")}:
        found |= _pca(lab)
    if {"conditioned", "conditioned-gp"} & set(columns):
        found |= _conditioned(lab)
    if set(OURS) & set(columns):
        found |= _ours(lab)
    if "interpolation" in columns:
        found["interpolation"] = Solver(key_of("interpolation", lab), _untold(Interpolation(lab.data.size)))
    if "nearest" in columns:
        found["nearest"] = Solver(key_of("nearest", lab), _untold(nearest(lab.data)))
    return {name: found[name] for name in columns}


def key_of(name: str, lab: Lab, *settings: Any) -> str:
    """What decides a row besides the shape and the kind of its cue."""
    drawn = [cues.EDGE, cues.BLOB, cues.NOISE, cues.SMOOTH, cues.POINTS, cues.ROOM, cues.CUT]
    parts = json.dumps([VERSION, name, lab.index, drawn, *settings], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _ours(lab: Lab) -> dict[str, Solver]:
    settings = lab.model.sha256, STEPS, START_SIGMA, SAMPLES

    def alone(cue: Cue, row: ShapeRow) -> Sequence[Shape]:
        return complete(lab.model, cue, samples=SAMPLES).shapes

    def worded(cue: Cue, row: ShapeRow) -> Sequence[Shape]:
        from genmed.text import embed

        return complete(lab.model, cue, text=embed([name_of(row)])[0], samples=SAMPLES).shapes

    return {
        "genmed": Solver(key_of("genmed", lab, *settings), alone, f"`complete`, {SAMPLES} samples"),
        "genmed-text": Solver(key_of("genmed-text", lab, *settings), worded, 'told "left kidney", say'),
    }


def name_of(row: ShapeRow) -> str:
    """Side and category, as the first template of captions has them."""
    return f"{row.side} {row.category}" if row.side in ("left", "right") else row.category


def _untold(peer: Interpolation | Nearest | Statistical) -> Find:
    return lambda cue, row: peer.complete(cue, None)


def _conditioned(lab: Lab) -> dict[str, Solver]:
    def score(peer: Conditioned) -> float:
        return mean_dice(lab.tune, lambda cue, row: peer.complete(cue, SAMPLES))

    peer = conditioned(
        lab.data, lab.model, lab.runs / "conditioned", lab.training_minutes, score, version=VERSION
    )  # fmt: skip
    settings = peer.sha256, peer.guidance, SAMPLES, DRAWN
    note = f"{peer.minutes:.1f} minutes, {peer.steps:,} steps, guidance {peer.guidance:g}, {SAMPLES} samples"

    def solver(name: str, gp: bool, note: str) -> Solver:
        return Solver(key_of(name, lab, *settings), lambda cue, row: peer.complete(cue, SAMPLES, gp=gp), note)

    return {
        "conditioned": solver("conditioned", False, note),
        "conditioned-gp": solver("conditioned-gp", True, f"{note} of {DRAWN * SAMPLES} that miss the cue least"),
    }


# Settings of the statistical model ------------------------------------------------------------------------


def _pca(lab: Lab) -> dict[str, Solver]:
    settings, note = chosen_pca(lab)
    looked = "one model of all shapes" if settings.pooled else "every category tried, the most evident kept"
    found = {}
    for name, ours in (("pca", False), ("pca-likely", True)):
        peer = lab.statistical(settings.sided).under(replace(settings, likely=ours))
        key = asdict(peer.settings)
        found[name] = Solver(key_of(name, lab, key), _told(peer), note)
        found[f"{name}-unknown"] = Solver(key_of(f"{name}-unknown", lab, key), _untold(peer), looked)
    return found


def _told(peer: Statistical) -> Find:
    return lambda cue, row: peer.complete(cue, (row.category, row.side))


def chosen_pca(lab: Lab) -> tuple[PcaSettings, str]:
    """Settings with the highest mean Dice on a few tune shapes, kept in the folder of the peers, and a note on them."""
    path = lab.runs / PCA
    choices = {name: list(values) for name, values in PCA_CHOICES.items()}
    wanted = [VERSION, lab.index, choices, TUNE_SHAPES, list(TUNE_KINDS)]
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] == wanted:
            return PcaSettings(**kept["settings"]), kept["note"]
    tune = lab.tune
    settings = PcaSettings(**{name: values[0] for name, values in PCA_CHOICES.items()})

    def told(settings: PcaSettings) -> float:
        peer = lab.statistical(settings.sided).under(settings)
        return mean_dice(tune, lambda cue, row: peer.complete(cue, (row.category, row.side)))

    def untold(settings: PcaSettings) -> float:
        return mean_dice(tune, _untold(lab.statistical(settings.sided).under(settings)))

    best = told(settings)
    for name, values in PCA_CHOICES.items():
        for value in values[1:]:
            other = replace(settings, **{name: value})
            if (score := told(other)) > best:
                settings, best = other, score
    scores = {pooled: untold(replace(settings, pooled=pooled)) for pooled in (False, True)}
    settings = replace(settings, pooled=scores[True] > scores[False])
    apart = "sides apart, " * settings.sided
    note = (f"{settings.modes} modes, prior {settings.prior:g}, {apart}{settings.kept} starts kept; chosen on "
            f"{len(tune)} cues of the tune part (Dice {best:.3f})")  # fmt: skip
    write_json(path, {"of": wanted, "settings": asdict(settings), "note": note})
    return settings, note


TuneCue = tuple[Cue, Shape, ShapeRow]


def tune_cues(data: ShapeDataset) -> list[TuneCue]:
    """Cues of a few tune shapes."""
    if not (numbers := stratified(data, "tune", TUNE_SHAPES)):
        raise GenMedError(f"{data.folder}: its tune part, which settings are chosen on, is empty; build it again.")
    return [
        (cues.draw_cue(data.shape(i), kind, crc32(data.ids[i].encode())), data.shape(i), data.rows[i])
        for i in numbers
        for kind in TUNE_KINDS
    ]


def mean_dice(tune: Iterable[TuneCue], find: Find) -> float:
    """Mean Dice of a method, on the truths' cubes."""
    scores = []
    for cue, truth, row in tune:
        found = Completion(tuple(find(cue, row)), 0.0, None, 0.0, 0)
        scores.append(dice(found.distance_mm(truth.grid) < 0, truth.sdf < 0))
    return float(np.mean(scores))
