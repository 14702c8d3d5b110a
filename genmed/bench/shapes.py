"""`genmed bench shapes`: completion by ours and by its peers from the same cues of the same shapes.

What is missing is trained or chosen first (`genmed.bench.shape_solvers`). Then each method completes each shape from
each cue of `genmed.bench.cues`. The rows of OUT/shapes.csv are written after every cue of every shape, and a run that
starts again goes on after the last one. The other table, generation, is `genmed.bench.generation`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Float

from genmed.bench.cases import stratified
from genmed.bench.cues import KINDS, TITLES, draw, draw_cue
from genmed.bench.hippocampus import save_figure
from genmed.bench.kept import read_rows, write_rows
from genmed.bench.segmentation import signed_rank_p
from genmed.bench.shape_solvers import METHODS, OURS, Lab, Solver, solvers
from genmed.cue import Cue
from genmed.data.shapes import ShapeDataset, ShapeRow, read_shapes
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.guide import Diverged
from genmed.mesh import surface
from genmed.metrics import bootstrap_interval, dice, nsd
from genmed.progress import track
from genmed.shape import Shape, decode
from genmed.shape_metrics import DENSE_POINTS, POINTS, chamfer, sample_surface, to_unit_box, uhd
from genmed.shape_model import load_shapes
from genmed.tasks.complete import Completion
from genmed.volume import Grid

COUNT = 100            # shapes of the part
UNSEEN = 5             # one shape of an unseen structure for so many of them
METRICS = {  # title, digits, whether less is better
    "dice": ("Dice", 3, False),
    "cd": ("Chamfer distance × 100", 3, True),
    "uhd": ("UHD × 100", 2, True),
    "nsd": ("NSD at one voxel of the truth", 3, False),
}
RIVALS = ("pca", "conditioned")  # that ours is compared with besides the best peer
TABLES = ("completion", "generation")
CASES, TABLE, PICTURE = "shapes.csv", "table.md", "table"


class Scores(NamedTuple):
    """One completion; `METRICS` says in which units."""

    dice: float
    cd: float
    uhd: float
    nsd: float


# Of a method that ended without an answer: nothing overlaps, and every point is the unit box's diagonal √3 away.
FAILED = Scores(0.0, 100 * 2 * 3.0, 100 * math.sqrt(3), 0.0)


class Row(NamedTuple):
    """One shape completed from one kind of cue by one method. `key` names weights and settings."""

    part: str
    shape: str
    kind: str
    method: str
    key: str
    source: str
    category: str
    subject: str
    dice: float
    cd: float
    uhd: float
    nsd: float
    seconds: float

    @property
    def place(self) -> tuple[str, str, str]:
        return self.shape, self.kind, self.method

    @property
    def failed(self) -> bool:
        return (self.dice, self.cd, self.uhd, self.nsd) == FAILED


Rows = dict[tuple[str, str, str], Row]


def run(
    shapes: str | Path,
    model: str | Path,
    runs: str | Path,
    out: str | Path,
    *,
    part: str = "report",
    kinds: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    count: int = COUNT,
    minutes: float | None = None,
    tumours: bool = False,
) -> str:
    """Complete what is not finished, print the report and write it to `out`.

    Args:
        shapes: folder of `genmed data build-shapes`; `runs`: what peers were trained to or chosen for.
        kinds: rows, of `KINDS`; methods: columns, of `METHODS`; default all.
        count: shapes of the part. On the report part, a fifth as many of unseen structures come on top.
        minutes: of the conditioned peer's training, where that is missing; default: those of the model.
        tumours: only shapes with a tumour.

    Returns:
        The report in Markdown. `out` gets table.md, shapes.csv and the picture table.svg and .png.
    """
    rows_wanted, columns = wanted(kinds, KINDS, "--kinds"), wanted(methods, METHODS, "--methods")
    data, out = read_shapes(shapes), Path(out)
    chosen = chosen_shapes(data, part, count, tumours)
    rows = finished(out)
    solving = solvers(Lab(data, load_shapes(model), Path(runs), minutes), columns)
    rows = evaluate(data, chosen, rows_wanted, solving, rows, out)
    ill = {row.id for row in data.rows if with_tumour(row)}
    notes = {name: solver.note for name, solver in solving.items()}
    text = report(rows, rows_wanted, columns, part, notes, ill)
    write_bytes(out / TABLE, text.encode("utf-8"))
    draw_table(out, [row for row in rows.values() if row.part == part], rows_wanted, columns)
    print(text)
    return text


def wanted(names: Sequence[str] | None, known: Iterable[str], option: str) -> list[str]:
    """Those of the known names that were asked for, in their order."""
    known = list(known)
    if unknown := [name for name in names or () if name not in known]:
        raise GenMedError(f"{option} {unknown[0]}: not in this table; choose from {','.join(known)}.")
    return [name for name in known if names is None or name in names]


def with_tumour(row: ShapeRow) -> bool:
    """Whether a shape's facts say that it has a tumour."""
    return row.facts.get("tumour") == "yes"


def chosen_shapes(data: ShapeDataset, part: str, count: int, tumours: bool = False) -> list[int]:
    """Numbers of the shapes of a part, and on the report part a fifth as many of the part unseen.

    A fixed list for an index (`genmed.bench.cases.stratified`). `tumours`: only shapes with a tumour.
    """
    if part not in ("tune", "report"):
        raise GenMedError(f"--part {part}: no part to evaluate on; choose tune or report.")
    if count < 1:
        raise GenMedError(f"--cases {count}: nothing to evaluate; give 1 or more.")
    chosen = stratified(data, part, len(data.rows) if tumours else count)
    if tumours:
        chosen = [i for i in chosen if with_tumour(data.rows[i])][:count]
    if not chosen:
        raise GenMedError(f"{data.folder}: part '{part}' holds no shape{' with a tumour' * tumours}; choose another.")
    if tumours:
        return chosen
    return chosen + (stratified(data, "unseen", -(-count // UNSEEN)) if part == "report" else [])


def finished(out: Path) -> Rows:
    """Rows of earlier runs. Raises `GenMedError` where the file holds another table."""
    return {row.place: row for row in read_rows(out / CASES, Row)}


# One shape ------------------------------------------------------------------------------------------------


def evaluate(
    data: ShapeDataset,
    chosen: Sequence[int],
    kinds: Sequence[str],
    solving: Mapping[str, Solver],
    rows: Rows,
    out: Path,
) -> Rows:
    """Rows of all shapes, kinds and methods. What there is under the same key is not done again.

    A method whose trajectories leave the range of the data (`genmed.guide.Diverged`) has the scores `FAILED`.
    """
    done: Rows = {}
    for i in track(chosen, "Completing"):
        about = data.rows[i]
        methods = {n: s for n, s in solving.items() if about.part != "unseen" or not METHODS[n].told}
        truth: Truth | None = None
        for kind in kinds:
            places = {name: (about.id, kind, name) for name in methods}
            missing = [n for n, p in places.items() if p not in rows or rows[p].key != solving[n].key]
            if missing:
                truth, seed = truth or truth_of(data.shape(i)), crc32(about.id.encode())
                cue, seen = draw_cue(truth.shape, kind, seed), seen_of(truth.shape, kind, seed)
                for name in missing:
                    started = time.monotonic()
                    try:
                        found = solving[name].complete(cue, about)
                    except Diverged:
                        found = ()
                    seconds = time.monotonic() - started
                    scores = score(found, truth, seen, cue) if found else FAILED
                    rows[places[name]] = Row(
                        about.part, about.id, kind, name, solving[name].key, about.source, about.category,
                        f"{about.source} {about.subject}", *scores, seconds,
                    )  # fmt: skip
                write_rows(out / CASES, Row, rows.values())
            done |= {place: rows[place] for place in places.values()}
    return done


def seen_of(truth: Shape, kind: str, seed: int) -> Bool[np.ndarray, "n n n"]:
    """Voxels that the cue of this kind and seed shows; all where it is points."""
    if kind == "noisy points":
        return np.ones(truth.sdf.shape, bool)
    drawn = draw(decode(truth.sdf), kind, seed)
    x, y, z = (slice(first, first + len(truth.sdf)) for first in drawn.first)
    return drawn.seen[x, y, z]


@dataclass(frozen=True, eq=False)
class Truth:
    """A shape, its surface's vertices, and two samples of that surface, all in voxels."""

    shape: Shape
    vertices: Float[np.ndarray, "v 3"]
    points: Float[np.ndarray, "n 3"]
    densely: Float[np.ndarray, "m 3"]


def truth_of(shape: Shape) -> Truth:
    """What every completion of a shape is compared with."""
    whole = surface(shape.distance, np.eye(4))
    return Truth(
        shape, whole.vertices, sample_surface(whole, POINTS, seed=3), sample_surface(whole, DENSE_POINTS, seed=2)
    )


def score(found: Sequence[Shape], truth: Truth, seen: Bool[np.ndarray, "n n n"], cue: Cue) -> Scores:
    """The mean of the shapes found, on the voxels of the truth's own cube and as much around it as it takes.

    Points of the truth are drawn with other seeds than those of the prediction. UHD is from those points of the true
    surface that lie in seen voxels (all, if none does), to the mean of the shapes found, where Wu et al. (arXiv
    2003.07717) take the mean of the UHD of each. A prediction that encloses nothing is a point in the middle of the
    cue.
    """
    distance, margin = on_cube(found, truth.shape)
    affine = np.eye(4)
    affine[:3, 3] = -margin
    inside, true = distance < 0, np.pad(truth.shape.sdf < 0, margin)
    if inside.any():
        points = sample_surface(surface(distance, affine), POINTS, seed=1)
        densely = sample_surface(surface(distance, affine), DENSE_POINTS, seed=1)
    else:
        middle = (cue.box_mm.mean(axis=0) - truth.shape.origin_mm) / truth.shape.voxel_mm
        points = densely = np.tile(middle, (2, 1))
    voxel = np.rint(truth.densely).astype(int).clip(0, len(seen) - 1)
    part = truth.densely[seen[tuple(voxel.T)]]
    boxed = [to_unit_box(p, truth.vertices) for p in
             (points, truth.points, part if len(part) else truth.densely, densely)]  # fmt: skip
    return Scores(
        dice(inside, true), 100 * chamfer(boxed[0], boxed[1]), 100 * uhd(boxed[2], boxed[3]),
        nsd(inside, true, (1.0, 1.0, 1.0)),
    )  # fmt: skip


def on_cube(found: Sequence[Shape], truth: Shape) -> tuple[Float[np.ndarray, "m m m"], int]:
    """Mean distance in mm on the truth's grid, and by how many voxels that was widened to hold the prediction.

    Where the mean is inside, some shape found is, so that the grid holds all of them, with a voxel of theirs around.
    What is further away than the truth's cube is wide is left out.
    """
    n, reach = len(truth.sdf), [0.0]
    for shape in found:
        inside = np.argwhere(shape.sdf < 0)
        ends = (inside.min(axis=0) - 1, inside.max(axis=0) + 1) if len(inside) else ()
        for end in ends:
            voxel = (end * shape.voxel_mm + np.array(shape.origin_mm) - truth.origin_mm) / truth.voxel_mm
            reach += [float(-voxel.min()), float(voxel.max()) - (n - 1)]
    margin = min(math.ceil(max(reach)), n)
    affine = truth.grid.affine.copy()
    affine[:3, 3] -= margin * truth.voxel_mm
    n += 2 * margin
    return Completion(tuple(found), 0.0, None, 0.0, 0).distance_mm(Grid((n, n, n), affine)), margin


# The report -----------------------------------------------------------------------------------------------


def report(
    rows: Rows,
    kinds: Sequence[str],
    columns: Sequence[str],
    part: str,
    notes: Mapping[str, str],
    tumours: Collection[str] = (),
) -> str:
    """All tables with their captions, in Markdown; `tumours` are the shapes with tables of their own."""
    mine = [row for row in rows.values() if row.part == part]
    unseen = [row for row in rows.values() if row.part == "unseen"]
    parts = [f"# Completion of shapes, {part} part\n\n{_caption(mine, unseen)}\n"]
    parts.append(_section("All data sets: mean over categories", mine, kinds, columns))
    if set(columns) & set(OURS):
        parts.append(f"### Paired differences of Dice\n\n{difference_table(mine, kinds, columns)}")
    sources = sorted({row.source for row in mine})
    for source in sources if len(sources) > 1 else []:
        parts.append(_section(f"{source}: mean over its categories", [r for r in mine if r.source == source],
                              kinds, columns))  # fmt: skip
    if ill := [row for row in mine if row.shape in tumours]:
        parts.append(_section(f"With a tumour: {len({row.shape for row in ill})} shapes", ill, kinds, columns))
        if set(columns) & set(OURS):
            parts.append(f"### Paired differences of Dice, with a tumour\n\n{difference_table(ill, kinds, columns)}")
    if unseen:
        names = ", ".join(sorted({row.category for row in unseen}))
        can = [name for name in columns if not METHODS[name].told]
        parts.append(_section(f"Unseen structure: {names}", unseen, kinds, can))
        if set(can) & set(OURS):
            parts.append(f"### Paired differences of Dice, unseen\n\n{difference_table(unseen, kinds, can)}")
    lines = [f"- {METHODS[name].title}: {note}" for name, note in notes.items() if note]
    parts.append("## Methods\n\n" + "\n".join([*lines, f"- {_times(mine, columns)}", ""]))
    return "\n".join(parts)


def _caption(rows: Sequence[Row], unseen: Sequence[Row]) -> str:
    shapes = {row.shape: row for row in rows}
    categories = {(row.source, row.category) for row in shapes.values()}
    return (
        f"{len(shapes)} shapes of {len(categories)} categories, {len({r.subject for r in shapes.values()})} persons, "
        "none seen in training. Means of the categories' means [95 % bootstrap interval, whole persons resampled; none "
        "of a single person]; the best of a row in bold. Every method gets the same cue, whose box is not that of the "
        "shape. Dice and NSD on the voxels of the truth's cube (one voxel is about 2 % of the longest extent at 64³). "
        f"Chamfer of {POINTS:,} points of either surface and UHD from the seen part of the true surface in units of "
        "its longest side (`genmed.shape_metrics`). All are those of the mean of a method's completions; Wu et al. "
        f"(arXiv 2003.07717) take the mean of the UHD of each. {_failures([*rows, *unseen])}"
    )


def _failures(rows: Sequence[Row]) -> str:
    """Who ended without an answer how often, and what that counts."""
    counts = Counter(METHODS[row.method].title for row in rows if row.failed)
    if not counts:
        return "Every method gave an answer every time."
    named = ", ".join(f"{title} {count}" for title, count in counts.items())
    return (
        f"Without an answer (sampling diverged): {named} of {len(rows)} rows; each counts as an empty completion with "
        f"Dice and NSD 0 and every point the unit box's diagonal away (Chamfer {FAILED.cd:.0f}, UHD {FAILED.uhd:.0f})."
    )


def _section(title: str, rows: Sequence[Row], kinds: Sequence[str], columns: Sequence[str]) -> str:
    tables = [f"### {name}\n\n{score_table(rows, kinds, columns, key)}" for key, (name, _, _) in METRICS.items()]
    return "\n".join([f"## {title}\n", *tables])


def score_table(rows: Sequence[Row], kinds: Sequence[str], columns: Sequence[str], metric: str) -> str:
    """Kinds of cues by methods: means with intervals, the best in bold, and the mean over all kinds.

    Of several sources, a last line has the mean over sources instead of that over categories.
    """
    _, digits, less = METRICS[metric]
    lines = ["| cue | " + " | ".join(METHODS[name].title for name in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    every = list(kinds)
    wanted_lines = [(TITLES.get(kind, kind), [kind], macro_weights) for kind in kinds]
    wanted_lines += [("mean of all", every, macro_weights)] * (len(kinds) > 1)
    wanted_lines += [("mean over data sets", every, source_weights)] * (len({row.source for row in rows}) > 1)
    for title, chosen, weigh in wanted_lines:
        found = {name: [row for row in rows if row.kind in chosen and row.method == name] for name in columns}
        values = {name: [getattr(row, metric) for row in mine] for name, mine in found.items()}
        means = {name: float(np.average(values[name], weights=weigh(mine))) for name, mine in found.items()}
        best = (min if less else max)(means.values())
        cells = [_cell(mine, values[name], digits, weigh=weigh) for name, mine in found.items()]
        cells = [f"**{c}**" if mean == best else c for c, mean in zip(cells, means.values(), strict=True)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference_table(rows: Sequence[Row], kinds: Sequence[str], columns: Sequence[str]) -> str:
    """Ours against the best peer of every row, which is chosen on that row, and against `RIVALS`."""
    peers = [name for name in columns if name not in OURS]
    lines = ["| cue | ours | against | difference | p |", "|---|---|---|---|---|"]
    for kind in kinds:
        by = {name: {row.shape: row for row in rows if row.kind == kind and row.method == name} for name in columns}
        means = {name: macro_mean(list(d.values()), [row.dice for row in d.values()]) for name, d in by.items()}
        best = [max(peers, key=lambda name: means[name])] if peers else []
        title = TITLES.get(kind, kind)
        for ours in [name for name in columns if name in OURS]:
            for other in dict.fromkeys([*best, *(name for name in RIVALS if name in peers)]):
                mine = list(by[ours].values())
                change = np.array([row.dice - by[other][row.shape].dice for row in mine])
                p = signed_rank_p(change, [row.subject for row in mine])
                name = METHODS[other].title + (" (best)" if other in best else "")
                lines.append(f"| {title} | {METHODS[ours].title} | {name} | {_cell(mine, change, 3, '+')} | {p:.2g} |")
    lines += ["", "p: Wilcoxon signed-rank test of the means of persons, two-sided, not corrected."]
    return "\n".join(lines) + "\n"


def macro_weights(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    """1 / (rows of the same category and source): every category counts the same."""
    counts = Counter((row.source, row.category) for row in rows)
    return np.array([1 / counts[row.source, row.category] for row in rows])


def source_weights(rows: Sequence[Row]) -> Float[np.ndarray, " n"]:
    """Every source counts the same, and within it every category."""
    categories = {(row.source, row.category) for row in rows}
    counts = Counter(source for source, _ in categories)
    return macro_weights(rows) / np.array([counts[row.source] for row in rows])


def macro_mean(rows: Sequence[Row], values: Sequence[float] | np.ndarray) -> float:
    """Mean of the categories' means."""
    return float(np.average(values, weights=macro_weights(rows)))


def _cell(
    rows: Sequence[Row], values: Sequence[float] | np.ndarray, digits: int, sign: str = "",
    weigh: Callable[[Sequence[Row]], np.ndarray] = macro_weights,
) -> str:  # fmt: skip
    groups, weights = [row.subject for row in rows], weigh(rows)
    middle = float(np.average(values, weights=weights))
    if len(set(groups)) < 2:
        return f"{middle:{sign}.{digits}f}"  # one person says nothing of others
    low, high = bootstrap_interval(values, groups=groups, weights=weights)
    mean, low_text, high_text = (f"{x:{sign}.{digits}f}" for x in (middle, low, high))
    return f"{mean} [{low_text}, {high_text}]"


def _times(rows: Sequence[Row], columns: Sequence[str]) -> str:
    medians = {name: np.median([row.seconds for row in rows if row.method == name]) for name in columns}
    return "Seconds a shape, median: " + ", ".join(f"{METHODS[n].title} {s:.1f}" for n, s in medians.items()) + "."


def draw_table(out: Path, rows: Sequence[Row], kinds: Sequence[str], columns: Sequence[str]) -> None:
    """Dice with intervals as table.svg and table.png: a line per kind of cue, a dot per method, open for peers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + (0.2 + 0.11 * len(columns)) * len(kinds)), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(columns):
        height = np.arange(len(kinds)) + 0.7 * ((number + 0.5) / len(columns) - 0.5)
        for at, kind in zip(height, kinds, strict=True):
            mine = [row for row in rows if row.kind == kind and row.method == method]
            values = [row.dice for row in mine]
            mean = macro_mean(mine, values)
            limits = bootstrap_interval(values, groups=[r.subject for r in mine], weights=macro_weights(mine))
            axes.errorbar(
                mean, at, xerr=np.abs(np.array(limits)[:, None] - mean), fmt="o", markersize=4, linewidth=1.2,
                color=f"C{number}", markerfacecolor=f"C{number}" if method in OURS else "white",
                label=METHODS[method].title if kind == kinds[0] else None,
            )  # fmt: skip
    axes.hlines(np.arange(len(kinds) - 1) + 0.5, 0, 1, color="0.9", linewidth=0.8, transform=axes.get_yaxis_transform())
    axes.set_yticks(np.arange(len(kinds)), [TITLES.get(kind, kind) for kind in kinds])
    axes.set(ylim=(len(kinds) - 0.5, -0.5), xlabel="Dice, mean of categories [95 % interval]")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, out, PICTURE)
