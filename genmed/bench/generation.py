"""`genmed bench shapes --table generation`: shapes drawn from captions, compared with shapes that nobody was shown.

One shape is drawn for the caption of each reference shape. Sets are compared by MMD, COV and 1-NNA of points on the
surfaces, every shape in its own unit box, so that size does not count: that is what the rank correlation of captioned
and generated volumes is for. Rows: captions in phrasings of the training and in phrasings that it never saw
(`genmed.data.shapes.captions.HELD_OUT_TEMPLATES`), the latter also steered to the volume that they state, a Gaussian of
principal components that is told category and side, training shapes replayed, and the reference itself. A row of
OUT/generation.csv is written as soon as it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree

from genmed.bench.cases import stratified
from genmed.bench.kept import key_of, read_rows, write_rows
from genmed.bench.shape_peers import statistical
from genmed.bench.shape_solvers import VERSION, name_of
from genmed.bench.shapes import TABLE, wanted
from genmed.data.shapes import INDEX, ShapeDataset, ShapeRow, read_shapes
from genmed.errors import GenMedError
from genmed.files import sha256_of, write_bytes
from genmed.mesh import surface
from genmed.metrics import dice
from genmed.samplers import seeded
from genmed.shape import Shape
from genmed.shape_metrics import (
    LEAF,
    POINTS,
    chamfer,
    cov,
    mmd,
    one_nna,
    pairwise_chamfer,
    sample_surface,
    to_unit_box,
)
from genmed.shape_model import ShapeModel, load_shapes
from genmed.tasks.complete import generate, shape_at
from genmed.train_shapes import OTHER_SIDE

COUNT = 200        # reference shapes, and shapes of every row
TRAINING = 1000    # training shapes of a category and side at most, among which the nearest is looked for
METHODS = {
    "genmed": "GenMed, phrasings of the training",
    "genmed-held-out": "GenMed, held-out phrasings",
    "genmed-steered": "GenMed, held-out phrasings, steered to the volumes that they state",
    "gaussian": "Gaussian of principal components, category and side told",
    "replay": "training shapes replayed",
    "reference": "the reference shapes themselves",
}
ROWS = "generation.csv"


class Row(NamedTuple):
    """One generated set. Chamfer distances × 100, shares in per cent; NaN where there is none.

    `nearest` is the mean distance to the nearest training shape of the same category and side, mirror images of the
    other side included, which ours is trained on, too. `rank` is Spearman's correlation of the volumes that captions
    state with those generated, `rank_within` that of their ratios to the means of the categories. `empty` draws
    enclosed nothing.
    """

    method: str
    key: str
    shapes: int
    mmd: float
    cov: float
    one_nna: float
    nearest: float
    rank: float
    rank_within: float
    empty: int
    seconds: float


class Drawn(NamedTuple):
    """A generated set: a shape for every reference shape, and the volume in ml that its caption states, or NaN."""

    shapes: list[Shape]
    stated_ml: Float[np.ndarray, " n"]


def run(
    shapes: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    part: str = "report",
    methods: Sequence[str] | None = None,
    count: int = COUNT,
) -> str:
    """Draw and compare what is not finished, print the report and write it to `out`."""
    if part not in ("tune", "report") or count < 2:
        raise GenMedError(f"--part {part} --cases {count}: choose tune or report, and 2 shapes or more.")
    columns = wanted(methods, METHODS, "--methods")
    data, ours, out = read_shapes(shapes), load_shapes(model), Path(out)
    reference = stratified(data, part, count)
    if len(reference) < 2:
        raise GenMedError(f"{data.folder}: part '{part}' holds fewer than 2 shapes; choose another.")
    key = key_of(VERSION, sha256_of(data.folder / INDEX), ours.sha256, part, len(reference), TRAINING)
    done = {row.method: row for row in read_rows(out / ROWS, Row) if row.key == key}
    if set(columns) - set(done):
        yardstick = Yardstick(data, reference)
        for name in columns:
            if name not in done:
                started = time.monotonic()
                drawn = makers(data, ours)[name](reference)
                done[name] = yardstick.row(name, key, drawn, started)
                write_rows(out / ROWS, Row, done.values())
    text = report(data, ours, reference, part, [done[name] for name in columns])
    write_bytes(out / TABLE, text.encode("utf-8"))
    print(text)
    return text


# Sets of shapes -------------------------------------------------------------------------------------------


def makers(data: ShapeDataset, model: ShapeModel) -> Mapping[str, Callable[[Sequence[int]], Drawn]]:
    """By name, functions that make a set for reference shapes."""
    return {
        "genmed": partial(from_captions, data, model, False),
        "genmed-held-out": partial(from_captions, data, model, True),
        "genmed-steered": partial(from_captions, data, model, True, steered=True),
        "gaussian": partial(from_gaussians, data),
        "replay": partial(replayed, data),
        "reference": lambda numbers: Drawn([data.shape(i) for i in numbers], np.full(len(numbers), np.nan)),
    }


def from_captions(
    data: ShapeDataset, model: ShapeModel, held_out: bool, reference: Sequence[int], steered: bool = False
) -> Drawn:
    """A shape for one of the captions of every reference shape; if `steered`, as `genmed generate` draws it."""
    from genmed.text import embed, stated_ml

    rng = np.random.default_rng(0)
    captions, stated = [], []
    for i in reference:
        row = data.rows[i]
        known = (row.held_out_captions if held_out else row.captions) or (name_of(row),)
        captions.append(known[rng.integers(len(known))])
        stated.append(row.volume_ml if row.volume_ml is not None and " ml" in captions[-1] else np.nan)
    volumes = [stated_ml(caption) if steered else None for caption in captions]
    asked = enumerate(zip(embed(captions), volumes, strict=True))
    shapes = [generate(model, 1, text=text, volume_ml=ml, seed=number)[0] for number, (text, ml) in asked]
    return Drawn(shapes, np.array(stated, float))


def from_gaussians(data: ShapeDataset, reference: Sequence[int]) -> Drawn:
    """A draw of the principal components and of the size of every reference shape's category and side."""
    models = statistical(data, sided=True).models
    shapes = []
    for number, i in enumerate(reference):
        row = data.rows[i]
        model = models.get((row.category, row.side), models["", ""])
        normal = torch.randn(model.plan.modes + 1, generator=seeded([number])[0])
        volume = model.autoencoder.decode(normal[None, :-1], data.size)
        pose = np.array([0.0, 0.0, 0.0, float(model.log_voxel_mm(normal[-1]))])
        shapes.append(shape_at(volume[0, 0].numpy(), pose))
    return Drawn(shapes, np.full(len(reference), np.nan))


def replayed(data: ShapeDataset, reference: Sequence[int]) -> Drawn:
    """A training shape of every reference shape's category and side, none twice while there are others."""
    rng = np.random.default_rng(0)
    decks: dict[tuple[str, str], list[int]] = {}
    shapes = []
    for i in reference:
        row = data.rows[i]
        deck = decks.setdefault((row.category, row.side), [])
        if not deck:
            deck += rng.permutation(alike(data, row)).tolist()
        shapes.append(data.shape(deck.pop()))
    return Drawn(shapes, np.full(len(reference), np.nan))


def alike(data: ShapeDataset, row: ShapeRow) -> list[int]:
    """Training shapes of the same category and side; of the same category, or all, where there are none."""
    category = of_category(data, row)
    return [i for i in category if data.rows[i].side == row.side] or category or list(data.part("train"))


def of_category(data: ShapeDataset, row: ShapeRow) -> list[int]:
    """Training shapes of the same category."""
    return [i for i in data.part("train") if data.rows[i].category == row.category]


def cloud(shape: Shape, seed: int) -> Float[np.ndarray, "n 3"]:
    """Points on the surface in the shape's own unit box; a single point, many times, where it encloses nothing."""
    if not (shape.sdf < 0).any():
        return np.zeros((POINTS, 3))
    mesh = surface(shape.distance, np.eye(4))
    return to_unit_box(sample_surface(mesh, POINTS, seed), mesh.vertices)


# Comparisons ----------------------------------------------------------------------------------------------


class Yardstick:
    """The reference shapes, their distances among each other, and training shapes to look for copies of.

    Of training shapes, points on the surface stand beside their search tree.
    """

    def __init__(self, data: ShapeDataset, reference: Sequence[int]) -> None:
        self.data, self.reference = data, reference
        self.clouds = [cloud(data.shape(i), seed) for seed, i in enumerate(reference)]
        self.within = pairwise_chamfer(self.clouds)
        self.training: dict[tuple[str, str], list[tuple[np.ndarray, cKDTree]]] = {}

    def row(self, name: str, key: str, drawn: Drawn, started: float) -> Row:
        """All figures of a generated set."""
        clouds = [cloud(shape, 10_000 + seed) for seed, shape in enumerate(drawn.shapes)]
        between = pairwise_chamfer(clouds, self.clouds)
        accuracy = one_nna(pairwise_chamfer(clouds), between, self.within)
        rank, within = rank_correlations(drawn, [self.data.rows[i].category for i in self.reference])
        return Row(
            name, key, len(clouds), 100 * mmd(between), 100 * cov(between), 100 * accuracy, self.nearest(clouds),
            rank, within, sum(not (shape.sdf < 0).any() for shape in drawn.shapes), time.monotonic() - started,
        )  # fmt: skip

    def nearest(self, clouds: Sequence[np.ndarray]) -> float:
        """Mean distance × 100 to the nearest training shape of the reference shape's category and side."""
        distances = []
        for points, i in zip(clouds, self.reference, strict=True):
            row = self.data.rows[i]
            place = row.category, row.side
            if place not in self.training:
                clouds_alike = training_clouds(self.data, row)
                self.training[place] = [(each, cKDTree(each, leafsize=LEAF)) for each in clouds_alike]
            distances.append(100 * nearest_of(points, self.training[place]))
        return float(np.mean(distances))


def training_clouds(data: ShapeDataset, row: ShapeRow) -> list[np.ndarray]:
    """Points of training shapes of the same category and side, mirror images of the other side included."""
    other = {i for i in of_category(data, row) if data.rows[i].side == OTHER_SIDE.get(row.side)}
    same, mirror = [i for i in alike(data, row) if i not in other], np.array([-1.0, 1.0, 1.0])
    found = [(i, np.ones(3)) for i in same] + [(i, mirror) for i in sorted(other)]
    return [cloud(data.shape(i), 20_000 + i) * signs for i, signs in found[:: -(-len(found) // TRAINING)]]


def nearest_of(points: Float[np.ndarray, "n 3"], training: Iterable[tuple[np.ndarray, cKDTree]]) -> float:
    """Smallest `genmed.shape_metrics.chamfer` to clouds beside their trees; the way back only where it can matter."""
    own, best = cKDTree(points, leafsize=LEAF), np.inf
    for each, tree in training:
        there = np.square(tree.query(points)[0]).mean()
        if there < best:
            best = min(best, there + np.square(own.query(each)[0]).mean())
    return float(best)


def rank_correlations(drawn: Drawn, categories: Sequence[str]) -> tuple[float, float]:
    """Spearman's correlation of stated and generated volumes, of all and within categories; NaN for fewer than 3."""
    from scipy.stats import spearmanr

    made = np.array([shape.volume_ml for shape in drawn.shapes])
    usable = np.isfinite(drawn.stated_ml) & (made > 0)
    if usable.sum() < 3:
        return float("nan"), float("nan")
    logs = np.log(np.stack([drawn.stated_ml[usable], made[usable]]))
    names = np.array(categories)[usable]
    centred = logs.copy()
    for name in set(names.tolist()):
        centred[:, names == name] -= centred[:, names == name].mean(axis=1, keepdims=True)
    return float(spearmanr(*logs).statistic), float(spearmanr(*centred).statistic)


@torch.no_grad()
def retrieval(model: ShapeModel, data: ShapeDataset, numbers: Sequence[int]) -> tuple[float, float, int]:
    """Shape → text: share of shapes whose own name ranks first, mean reciprocal rank, and number of names.

    The text is denoised from nothing, given shape and size; names (side and category) rank by the cosine of their
    place in the field `text` with that estimate.
    """
    from genmed.text import embed

    rows = [data.rows[i] for i in numbers]
    names = sorted({name_of(row) for row in rows})
    places = model.text_of(embed(names))
    x = torch.stack([torch.from_numpy(data.sdf(i)) for i in numbers])[:, None]
    sizes = model.size_of(torch.tensor([np.log(row.voxel_mm) for row in rows]).float())
    known = torch.tensor([row.extent_mm is not None for row in rows])
    parts = {
        "shape": model.autoencoder.encode(x), "size": sizes[:, None], "text": torch.zeros(len(rows), places.shape[1]),
    }  # fmt: skip
    z = model.fields.join({name: part[..., None, None, None] for name, part in parts.items()})
    hidden = model.plan.sigma_max
    levels = torch.stack(
        [torch.zeros(len(rows)), torch.where(known, 0.0, hidden), torch.full((len(rows),), hidden)], dim=1
    )
    text = model.fields.split(model.denoiser(z, levels))["text"].flatten(1)
    cosine = torch.nn.functional.cosine_similarity(text[:, None], places[None], dim=2)
    own = cosine.gather(1, torch.tensor([names.index(name_of(row)) for row in rows])[:, None])
    rank = (cosine > own).sum(1) + 1
    return float((rank == 1).float().mean()), float((1 / rank).mean()), len(names)


@torch.no_grad()
def reconstructions(
    model: ShapeModel, data: ShapeDataset, numbers: Sequence[int]
) -> dict[tuple[str, str], tuple[float, float]]:
    """By source and category, mean Dice and Chamfer distance × 100 of shapes after the autoencoder."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for i in numbers:
        truth, row = data.sdf(i), data.rows[i]
        made = model.decode(model.autoencoder.encode(torch.from_numpy(truth)[None, None]))
        volume = made[0, 0].numpy()
        whole = surface(truth, np.eye(4))
        middle = np.full((1, 3), (len(truth) - 1) / 2)  # where nothing is left
        points = sample_surface(surface(volume, np.eye(4)), POINTS, seed=1) if (volume < 0).any() else middle
        a, b = (to_unit_box(each, whole.vertices) for each in (points, sample_surface(whole, POINTS, seed=2)))
        found.setdefault((row.source, row.category), []).append((dice(volume < 0, truth < 0), 100 * chamfer(a, b)))
    return {place: (float(np.mean([v[0] for v in values])), float(np.mean([v[1] for v in values])))
            for place, values in sorted(found.items())}  # fmt: skip


# The report -----------------------------------------------------------------------------------------------


def report(
    data: ShapeDataset, model: ShapeModel, reference: Sequence[int], part: str, rows: Sequence[Row]
) -> str:
    """All tables with their captions, in Markdown."""
    sources = len({(data.rows[i].source, data.rows[i].category) for i in reference})
    lines = [
        f"# Generation of shapes, {part} part", "",
        f"{len(reference)} reference shapes of {sources} categories, none seen in training, and as many generated, "
        "one for the caption of each. The Gaussian is told category and side only, GenMed the whole caption. "
        f"Chamfer distances × 100 of {POINTS:,} points, every shape in its own unit box. "
        "1-NNA: 50 is chance, less than that means copies, as does a distance to the nearest training shape (of the "
        "same category and side, mirror images of the other side included) that is far below that of the reference "
        "shapes. Volumes: Spearman's correlation of the volumes that captions state and those generated, of all and "
        "within categories.", "",
        "| shapes | MMD | COV % | 1-NNA % | nearest training shape | volumes | within categories | empty |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        ranks = " | ".join("–" if np.isnan(value) else f"{value:.2f}" for value in (row.rank, row.rank_within))
        figures = f"{row.mmd:.3f} | {row.cov:.1f} | {row.one_nna:.1f} | {row.nearest:.3f}"
        lines.append(f"| {METHODS[row.method]} | {figures} | {ranks} | {row.empty} |")
    first, reciprocal, names = retrieval(model, data, reference)
    lines += [
        "", "## Shape to text", "",
        f"Of {names} names, a shape's own ranks first for {first:.1%} of the shapes (chance {1 / names:.1%}); mean "
        f"reciprocal rank {reciprocal:.3f}.",
        "", "## The autoencoder alone", "",
        "| data set | category | Dice | Chamfer distance × 100 |", "|---|---|---|---|",
    ]  # fmt: skip
    scores = reconstructions(model, data, reference)
    for (source, category), (overlap, distance) in scores.items():
        lines.append(f"| {source} | {category} | {overlap:.3f} | {distance:.3f} |")
    means = np.mean(list(scores.values()), axis=0)
    lines.append(f"| mean | | {means[0]:.3f} | {means[1]:.3f} |")
    return "\n".join(lines) + "\n"
