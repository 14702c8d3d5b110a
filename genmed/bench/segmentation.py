"""`genmed bench segmentation`: ours and its peers on the same cases, inputs and minutes; `tables` says which.

What is missing is trained first, every method by the same loop. Then each segments each case of each input. A row
of OUT/cases.csv is written as soon as its case is finished, and a run that starts again goes on after the last one.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from genmed import hub
from genmed.bench import peers
from genmed.bench.cases import cases_of_part, persons, prepared, split_of, spread
from genmed.bench.hippocampus import (
    MISSED_MM,
    PLATEAU,
    mean_interval,
    plateau,
    read_curve,
    save_figure,
    steps_of,
)
from genmed.bench.kept import key_of, read_table, write_table
from genmed.bench.tables import (
    FEW_SHOT_SHARE,
    METHODS,
    OURS,
    PLAIN,
    RIVALS,
    SETS,
    TABLES,
    Input,
    Method,
    Table,
)
from genmed.data.dataset import Case, Dataset
from genmed.data.split import PARTS, SPLIT
from genmed.degrade import Degraded
from genmed.errors import GenMedError
from genmed.files import sha256_of, write_bytes
from genmed.metrics import bootstrap_interval, dice, hd95, nsd
from genmed.progress import track
from genmed.space import on_grid
from genmed.surprise import LIMIT
from genmed.tasks.segment import (
    ANY_CONTRAST,
    CONVINCING,
    FLEXIBLE_SAMPLES,
    SAMPLES,
    START_SIGMA,
    STEPS,
    TRAVELS,
    segment,
)
from genmed.tasks.view import CRAMPED, TWICE, View
from genmed.train import BEST, CHECKPOINT, Spent, fair_minutes, time_spent, train
from genmed.volume import Grid, Volume, read, read_labels

CASES, TABLE, PICTURE = "cases.csv", "table.md", "table"
METRICS = {"dice": ("Dice", 3), "hd95_mm": ("HD95 (mm)", 2), "nsd": ("NSD at 1 mm", 3)}  # title, digits
FAILED = "failed"  # mode of a case that a method refused: it counts as an empty label map


class Scores(NamedTuple):
    """One structure of one case."""

    dice: float
    hd95_mm: float
    nsd: float


class Prediction(NamedTuple):
    """Class probabilities (k, X, Y, Z) on the working grid, and for ours how they were found."""

    soft: Volume
    mode: str = ""
    match: str = ""
    residual: float | None = None
    surprise: float | None = None
    slice_thickness_mm: float | None = None
    doubtful: bool | None = None


class Row(NamedTuple):
    """One case of one input by one method. `key` names weights and settings; seconds are of the prediction."""

    part: str
    input: str
    method: str
    case: str
    key: str
    scores: dict[str, Scores]
    seconds: float
    mode: str
    match: str
    residual: float | None
    surprise: float | None
    slice_thickness_mm: float | None
    doubtful: bool | None

    @property
    def place(self) -> tuple[str, str, str]:
        return self.input, self.method, self.case


@dataclass(frozen=True)
class Trained:
    """A method with its weights. `names`: value -> name of every class, background first."""

    folder: Path
    weights_sha256: str
    settings: dict[str, Any]
    names: dict[int, str]
    parameters: int
    best: float  # highest Dice on the tune part
    predict: Callable[[Degraded], Prediction]


@dataclass(frozen=True)
class Lab:
    """Where data and trainings are, and the minutes of new ones (None: those of the tables)."""

    data: Path
    runs: Path
    minutes: float | None = None


Rows = dict[tuple[str, str, str], Row]  # by input, method and case
Networks = dict[tuple[str, str], Trained]  # by method and input


def run(
    data: str | Path | None,
    runs: str | Path,
    out: str | Path,
    *,
    table: str,
    set_name: str | None = None,
    part: str = "report",
    cases: int | None = None,
    minutes: float | None = None,
    methods: Sequence[str] | None = None,
    may_train: bool = True,
) -> str:
    """Train what is missing, segment what is not finished, print the report and write it to `out`.

    Args:
        data: folder of the prepared sets; `runs`: trainings, RUNS/SET/RUN.
        set_name: one of `tables.SETS`; default: the first of the table.
        cases: so many evenly spread cases of the part; default all.
        minutes: of each training that is missing, instead of the set's.
        methods: columns, names of `METHODS`; default all of the table.
        may_train: without it, missing trainings are an error.

    Returns:
        The report in Markdown. `out` gets table.md, cases.csv and the picture table.svg and .png.
    """
    if set_name is None:
        set_name = next(iter(TABLES[table].inputs)) if table in TABLES else ""
    chosen, inputs = _table(table, set_name, part, cases)
    columns = _columns(chosen, set_name, methods)
    if minutes is not None and not minutes > 0:
        raise GenMedError(f"--minutes {minutes:g}: must be above 0.")
    if data is None:
        raise GenMedError("no --data and no variable GENMED_DATA; give the folder that holds the prepared sets.")
    lab, out = Lab(Path(data), Path(runs), minutes), Path(out)
    wanted = {input.name: cases_of(lab, set_name, input, part, cases) for input in inputs}
    networks = trained_networks(lab, set_name, columns, inputs, may_train)
    rows = evaluate(networks, inputs, wanted, out, part)
    people = {id: who for dataset, ids in wanted.values() for id, who in persons(dataset, ids).items()}
    text = report(rows, inputs, columns, people, budget(networks), f"{set_name}, {part} part")
    write_bytes(out / TABLE, text.encode("utf-8"))
    draw(out, rows, inputs, columns, people)
    print(text)
    return text


def _table(table: str, set_name: str, part: str, cases: int | None) -> tuple[Table, list[Input]]:
    """The table and its inputs of one set and part. Other data sets are only for the report."""
    if table not in TABLES:
        raise GenMedError(f"--table {table}: unknown; choose one of {', '.join(TABLES)}.")
    if set_name not in TABLES[table].inputs:
        raise GenMedError(f"--set {set_name}: not in table {table}; choose one of {', '.join(TABLES[table].inputs)}.")
    if part not in PARTS[1:]:
        raise GenMedError(f"--part {part}: no part to evaluate on; choose one of {', '.join(PARTS[1:])}.")
    if cases is not None and cases < 1:
        raise GenMedError(f"--cases {cases}: nothing to evaluate; give 1 or more.")
    return TABLES[table], [i for i in TABLES[table].inputs[set_name] if part == "report" or not i.folder]


def _columns(table: Table, set_name: str, methods: Sequence[str] | None) -> list[str]:
    possible = [name for name in table.methods if set_name in (METHODS[name].sets or SETS)]
    if unknown := [name for name in methods or () if name not in possible]:
        raise GenMedError(f"--methods {unknown[0]}: not in this table; choose from {','.join(possible)}.")
    if methods is not None and not methods:
        raise GenMedError(f"--methods: names none; choose from {','.join(possible)}.")
    return [name for name in possible if methods is None or name in methods]


def cases_of(lab: Lab, set_name: str, input: Input, part: str, count: int | None) -> tuple[Dataset, tuple[str, ...]]:
    """The data set of an input and its cases: of one part, evenly spread; of a set never trained on as `Input` says."""
    dataset = prepared(lab.data, input.folder or SETS[set_name].folder)
    if not input.folder:
        return dataset, cases_of_part(dataset, split_of(lab.data, lab.runs, set_name), part, count)
    own = dataset.folder / SPLIT
    return dataset, cases_of_part(dataset, own, part, count) if own.exists() else spread(dataset.ids, count)


# Training -------------------------------------------------------------------------------------------------


def trained_networks(
    lab: Lab, set_name: str, columns: Sequence[str], inputs: Sequence[Input], may_train: bool
) -> Networks:
    """Every method of every input with its best weights; trains what is missing."""
    needed = {
        (name, input.name): run_folder(lab, set_name, METHODS[name], input) for name in columns for input in inputs
    }
    missing = dict.fromkeys(folder for (name, _), folder in needed.items() if not is_trained(folder, METHODS[name]))
    if missing and not may_train:
        raise GenMedError(
            f"not trained: {', '.join(map(str, missing))}; run without --no-train, or choose other --methods."
        )
    by_name = {input.name: input for input in inputs}
    loaded: dict[tuple[Path, str], Trained] = {}
    result: Networks = {}
    for (name, row), folder in needed.items():
        if may_train and not is_finished(folder, METHODS[name]):
            train_run(lab, set_name, METHODS[name], by_name[row])
        key = folder, METHODS[name].mode
        if key not in loaded:
            loaded[key] = load_ours(folder, METHODS[name].mode) if METHODS[name].ours else load_theirs(folder)
        result[name, row] = loaded[key]
    return result


def run_folder(lab: Lab, set_name: str, method: Method, input: Input) -> Path:
    """Where a training lies: RUNS/SET/RUN, for a few-shot draw with -casesN-drawK; or the set's bundled model."""
    if method.run == SETS[set_name].run and SETS[set_name].model:
        return hub.find(SETS[set_name].model)
    few = f"-cases{input.cases}-draw{input.draw}" if input.cases else ""
    return lab.runs / set_name / (method.run + few)


def is_finished(folder: Path, method: Method) -> bool:
    """The training has spent its minutes."""
    return (folder / (hub.SUMS if method.ours else peers.TRAINING)).exists()


def is_trained(folder: Path, method: Method) -> bool:
    """There are weights to evaluate: ours from the first validation on, a peer's when its training is finished."""
    best = best_of(folder) / hub.SUMS if method.ours else folder / peers.BEST
    return best.exists() and (method.ours or is_finished(folder, method))


def best_of(folder: Path) -> Path:
    """Folder of our best weights: that of a training beside its last ones, or a bundled model, which has one set."""
    return folder if folder.parent == hub.BUNDLED else folder / BEST


def train_run(lab: Lab, set_name: str, method: Method, input: Input) -> Path:
    """Train one method, or go on with its training; first the run that it starts from."""
    training, folder = SETS[set_name], run_folder(lab, set_name, method, input)
    split = split_of(lab.data, lab.runs, set_name)
    usual = training.minutes * (FEW_SHOT_SHARE if input.cases else 1)
    minutes = usual if lab.minutes is None else lab.minutes
    init = start_of(lab, method) if method.init else None
    print(f"training {folder} for {minutes:g} minutes", flush=True)
    resume = (folder / CHECKPOINT).exists()
    if method.ours:
        return train(
            lab.data / training.folder, folder, split=split, max_minutes=minutes, resume=resume,
            preset=training.preset, spacing=training.spacing_mm, init=init, augmentation=method.augmentation,
            cases=input.cases, draw=input.draw, clock=fair_minutes,
        )  # fmt: skip
    return peers.train_peer(
        lab.data / training.folder, folder, split, minutes, training.preset,
        spacing=training.spacing_mm, resume=resume, network=method.network, augmentation=method.augmentation,
        cases=input.cases, draw=input.draw,
    )  # fmt: skip


def start_of(lab: Lab, method: Method) -> Path:
    """Best weights of the run that a training starts from; it is trained if need be."""
    set_name, run_name = method.init.split("/")
    source = METHODS[run_name]
    folder = run_folder(lab, set_name, source, Input(""))
    if not is_finished(folder, source):
        train_run(lab, set_name, source, Input(""))
    return folder / BEST


def load_ours(folder: Path, mode: str) -> Trained:
    """Our model: `segment` without any flag but the mode."""
    model = hub.load(best_of(folder))
    plan = model.plan

    def predict(worse: Degraded) -> Prediction:
        found = segment(model, worse.scan, mode=mode, grid="model", **worse.options)
        assert found.soft is not None
        how = found.mode, found.match, found.residual, found.surprise, found.slice_thickness_mm, found.doubtful
        return Prediction(found.soft, *how)

    limits = {"limit": LIMIT, "convincing": CONVINCING}
    samples = {"samples": SAMPLES, "flexible samples": FLEXIBLE_SAMPLES}
    settings = {"mode": mode, "steps": STEPS, "travels": TRAVELS, **samples, **limits, "typical": plan.typical}
    if plan.thick_slices:
        settings["start"] = START_SIGMA
    if mode == "auto":
        settings |= {"interpolated up to": TWICE, "widened below": CRAMPED}
        if plan.augmentation in ANY_CONTRAST:
            settings["contrasts"] = "averaged if unusual"
    best = hub.read_card(best_of(folder)).scores.get("tune dice", float("nan"))
    return Trained(
        folder, model.sha256, settings, dict(zip(plan.label_values, plan.labels, strict=True)),
        peers.parameters(model.denoiser), best, predict,
    )  # fmt: skip


def load_theirs(folder: Path) -> Trained:
    """A peer: the best plain interpolation of the scan, which our conditional path sees as well."""
    peer = peers.load_peer(folder, best=True)
    plan = peer.plan

    def predict(worse: Degraded) -> Prediction:
        view = View.of(plan, worse.scan, **worse.options)
        return Prediction(Volume(peer(view.image)[0].numpy(), view.space.model.affine))

    scores = peers.scores_of(folder / peers.BEST) or {}
    return Trained(
        folder, sha256_of(folder / peers.BEST), {"steps": peers.STEPS, "draws": peers.DRAWS},
        dict(zip(plan.label_values, plan.labels, strict=True)), peers.parameters(peer.model),
        scores.get("dice", float("nan")), predict,
    )  # fmt: skip


# One case -------------------------------------------------------------------------------------------------


def score(soft: Volume, seen: Grid, truth: Volume, names: Mapping[int, str]) -> dict[str, Scores]:
    """Compare class probabilities on any grid with the true label map, on the grid of the truth.

    Args:
        soft: (k, X, Y, Z) probabilities of the classes.
        seen: grid of the scan that was segmented: truth beyond its field of view is not asked for.
        truth: label map (1, x, y, z).
        names: value -> name of the classes, background, which is not scored, first.

    Raises:
        GenMedError: if scan and truth share no voxel.
    """
    inside = within(seen, truth.grid)
    if not inside.any():
        raise GenMedError(f"{truth.name}: lies outside of the scan; check both headers.")
    found = np.asarray(list(names))[on_grid(soft, truth.grid, order=1).argmax(axis=0)]
    scores = {}
    for value, name in list(names.items())[1:]:
        masks = (found == value) & inside, (truth.data[0] == value) & inside
        overlap, spacing_mm = float(dice(*masks)), truth.spacing_mm
        scores[name] = Scores(overlap, hd95(*masks, spacing_mm), nsd(*masks, spacing_mm))
    return scores


def within(seen: Grid, grid: Grid) -> np.ndarray:
    """Which voxel centres of `grid`, bool (x, y, z), lie in the field of view of `seen`."""
    step = np.linalg.inv(seen.affine) @ grid.affine
    inside = np.ones(grid.shape, dtype=bool)
    for axis, size in enumerate(seen.shape):  # one after the other: scans of whole bodies are large
        x, y, z = (step[axis, k] * np.arange(n) for k, n in enumerate(grid.shape))
        place = x[:, None, None] + y[:, None] + z + step[axis, 3]
        inside &= (place >= -0.5 - 1e-6) & (place <= size - 0.5 + 1e-6)
    return inside


def examine(trained: Trained, dataset: Dataset, id: str, input: Input) -> tuple[Prediction, dict[str, Scores], float]:
    """Make a case worse, segment it and score it; returns also the seconds of the prediction.

    Where a method refuses a scan it has found nothing, and that is scored.
    """
    case = dataset.case(id)
    truth = truth_of(trained, dataset, case, input)
    worse = input.degrade(read(case.images, fourth_axis="channels"), id)
    started = time.monotonic()
    try:
        found = trained.predict(worse)
    except GenMedError:
        nothing = np.zeros((len(trained.names), *truth.grid.shape), np.float32)
        found = Prediction(Volume(nothing, truth.affine), FAILED)
    seconds = time.monotonic() - started
    return found, score(found.soft, worse.scan.grid, truth, trained.names), seconds


def truth_of(trained: Trained, dataset: Dataset, case: Case, input: Input) -> Volume:
    """The label map of a case in the values of the training: structures are the same by name, or as the row says."""
    if case.label is None:
        raise GenMedError(f"{dataset.folder}: case '{case.id}' has no label to compare with; choose a labelled part.")
    names = {value: input.labels.get(name, name) for value, name in list(trained.names.items())[1:]}
    value_of = {name: value for value, name in dataset.labels.items()}
    if missing := [name for name in names.values() if name not in value_of]:
        has = ", ".join(value_of)
        raise GenMedError(f"{dataset.folder}: has the labels {has}, but not {missing[0]} that {trained.folder} finds.")
    truth = read_labels(case.label)
    data = np.zeros_like(truth.data)
    for value, name in names.items():
        data[truth.data == value_of[name]] = value
    return truth.like(data)


def evaluate(
    networks: Networks,
    inputs: Sequence[Input],
    wanted: Mapping[str, tuple[Dataset, Sequence[str]]],
    out: Path,
    part: str,
) -> Rows:
    """The rows of all wanted cases; those that are there already for the same weights and settings are kept."""
    by_name = {input.name: input for input in inputs}
    structures = list(next(iter(networks.values())).names.values())[1:]
    keys = {
        (input.name, name, id): settings_key(trained, input)
        for input in inputs
        for (name, row), trained in networks.items()
        if row == input.name
        for id in wanted[row][1]
    }
    before = read_rows(out / CASES, structures)
    rows = {place: row for place, row in before.items() if keys.get(place, row.key) == row.key}
    write_rows(out / CASES, structures, rows.values())
    for place in track([place for place in keys if place not in rows], "Segmenting"):
        row, name, id = place
        found, scores, seconds = examine(networks[name, row], wanted[row][0], id, by_name[row])
        rows[place] = Row(
            part, *place, keys[place], scores, seconds, found.mode, found.match,
            found.residual, found.surprise, found.slice_thickness_mm, found.doubtful,
        )  # fmt: skip
        write_rows(out / CASES, structures, rows.values())
    return {place: rows[place] for place in keys}


def settings_key(trained: Trained, input: Input) -> str:
    """`key_of` weights, settings and how the scan was made worse."""
    parts = [trained.weights_sha256, trained.settings, [str(change) for change in input.changes], input.folder]
    parts += [dict(input.labels)] if input.labels else []
    return key_of(*parts)


# Kept from run to run -------------------------------------------------------------------------------------


def columns_of(structures: Sequence[str]) -> list[str]:
    """Names of the columns of cases.csv; the first scores are means over the structures."""
    each = [f"{metric} {name}" for name in structures for metric in Scores._fields]
    return [*Row._fields[:5], *Scores._fields, *each, *Row._fields[6:]]


def write_rows(path: Path, structures: Sequence[str], rows: Iterable[Row]) -> None:
    """The whole file."""
    write_table(path, columns_of(structures), map(_cells, rows))


def read_rows(path: Path, structures: Sequence[str]) -> Rows:
    """What was written, to the last digit; nothing without a file. Raises `GenMedError` for another table."""
    rows = read_table(path, columns_of(structures), lambda entries: _row(entries, structures))
    return {row.place: row for row in rows}


def _cells(row: Row) -> list[Any]:
    means = [float(np.mean(values)) for values in zip(*row.scores.values(), strict=True)]
    each = [value for scores in row.scores.values() for value in scores]
    return [*row[:5], *means, *each, *("" if value is None else value for value in row[6:-1]), _flag(row)]


def _flag(row: Row) -> str:
    return "" if row.doubtful is None else str(int(row.doubtful))


def _row(entries: Mapping[str, str], structures: Sequence[str]) -> Row:
    scores = {name: Scores(*(float(entries[f"{metric} {name}"]) for metric in Scores._fields)) for name in structures}
    part, input, method, case, key, mode, match = (entries[name] for name in (*Row._fields[:5], "mode", "match"))
    residual, surprise, thickness = (float(entries[name]) if entries[name] else None for name in Row._fields[9:12])
    seconds, doubtful = float(entries["seconds"]), entries["doubtful"] == "1" if entries["doubtful"] else None
    return Row(part, input, method, case, key, scores, seconds, mode, match, residual, surprise, thickness, doubtful)


# The report -----------------------------------------------------------------------------------------------


def report(
    rows: Rows, inputs: Sequence[Input], columns: Sequence[str], people: Mapping[str, str], spent: str, title: str
) -> str:
    """All tables with their captions, in Markdown."""
    main = [name for name in columns if METHODS[name].main]
    others = [name for name in columns if not METHODS[name].main]
    parts = [f"# {title}\n\n{_caption(rows)}\n"]
    for metric, (name, _) in METRICS.items():
        if main:
            parts.append(f"## {name}\n\n{score_table(rows, inputs, main, people, metric)}")
        if others:
            heading = f"## {name}, trainings on changed contrasts or coarse voxels (not comparable with the above)"
            parts.append(f"{heading}\n\n{score_table(rows, inputs, others, people, metric)}")
    if any(rivals_of(name, columns) for name in columns):
        parts.append(f"## Paired differences of Dice\n\n{difference_table(rows, inputs, columns, people)}")
    parts.append(f"## How the budget was spent\n\n{spent}")
    if automatic := [name for name in columns if METHODS[name].ours and METHODS[name].mode == "auto"]:
        parts.append(f"## What the automatic path chose\n\n{choice_table(rows, inputs, automatic)}")
    return "\n".join(parts)


def _caption(rows: Rows) -> str:
    failed = sum(row.mode == FAILED for row in rows.values())
    missed = sum(not np.isfinite(s.hd95_mm) for row in rows.values() for s in row.scores.values())
    return (
        "Means over structures [95 % bootstrap interval, whole persons resampled], on the scans' own grids and within "
        "their fields of view; best mean of a row in bold. Every training is compared by the weights that scored "
        "highest on the tune part. Peers see the best plain interpolation of the scan, the same that "
        f"'{METHODS[PLAIN].title}' sees."
        + (f" HD95 of a structure that was missed ({missed} in all) counts {MISSED_MM:g} mm." if missed else "")
        + (f" {failed} scans were refused by a method and count as empty label maps." if failed else "")
    )


def rows_shown(inputs: Sequence[Input]) -> dict[str, list[str]]:
    """Rows of a table: every input, and after the inputs of a group their mean."""
    shown: dict[str, list[str]] = {}
    for number, input in enumerate(inputs):
        shown[input.name] = [input.name]
        if input.group and (number + 1 == len(inputs) or inputs[number + 1].group != input.group):
            shown[input.group] = [other.name for other in inputs if other.group == input.group]
    return shown


def values_of(rows: Rows, names: Sequence[str], method: str, metric: str = "dice") -> dict[str, float]:
    """One number a case: the mean over structures and over the inputs of a shown row."""
    found: dict[str, list[float]] = {}
    for (input, by, case), row in rows.items():
        if input in names and by == method:
            values = [float(getattr(scores, metric)) for scores in row.scores.values()]
            found.setdefault(case, []).append(float(np.mean([v if np.isfinite(v) else MISSED_MM for v in values])))
    return {case: float(np.mean(values)) for case, values in found.items()}


def score_table(
    rows: Rows, inputs: Sequence[Input], columns: Sequence[str], people: Mapping[str, str], metric: str
) -> str:
    """Inputs by methods: means with intervals, the best in bold."""
    digits = METRICS[metric][1]
    titles = " | ".join(METHODS[name].title for name in columns)
    lines = [f"| input | cases | {titles} |", "|---" * (2 + len(columns)) + "|"]
    for shown, names in rows_shown(inputs).items():
        values = [values_of(rows, names, method, metric) for method in columns]
        means = [float(np.mean(list(each.values()))) for each in values]
        best = (min if metric == "hd95_mm" else max)(means)
        cells = [mean_interval(np.array(list(v.values())), [people[id] for id in v], digits) for v in values]
        if len(columns) > 1:
            cells = [f"**{cell}**" if mean == best else cell for cell, mean in zip(cells, means, strict=True)]
        lines.append(f"| {shown} | {len(values[0])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rivals_of(ours: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Of the columns: peers that were trained on the same patches as `ours`, and one evaluation of the same weights."""
    peers = tuple(name for name in RIVALS.get(ours, ()) if name in columns)
    plain = (PLAIN,) if ours == OURS and PLAIN in columns else ()
    return [rivals for rivals in (peers, plain) if rivals]


def difference_table(rows: Rows, inputs: Sequence[Input], columns: Sequence[str], people: Mapping[str, str]) -> str:
    """Ours, automatic, against the best peer of every row and against one evaluation of the interpolated scan."""
    lines = ["| input | ours | against | difference | p |", "|---|---|---|---|---|"]
    for shown, names in rows_shown(inputs).items():
        values = {method: values_of(rows, names, method) for method in columns}
        means = {method: float(np.mean(list(each.values()))) for method, each in values.items()}
        for ours in columns:
            for rivals in rivals_of(ours, columns):
                other = max(rivals, key=lambda name: means[name])
                difference = np.array([values[ours][id] - values[other][id] for id in values[ours]])
                groups = [people[id] for id in values[ours]]
                interval, p = mean_interval(difference, groups, 3, sign="+"), signed_rank_p(difference, groups)
                titles = f"{METHODS[ours].title} | {METHODS[other].title}"
                lines.append(f"| {shown} | {titles} | {interval} | {p:.2g} |")
    lines += [
        "",
        "Ours minus the best peer that was trained on the same patches, which is chosen on the very row that it is "
        "compared on, in its favour, and minus one evaluation of the interpolated scan. p: Wilcoxon signed-rank test "
        "of the means of persons, two-sided, not corrected for the number of rows.",
    ]
    return "\n".join(lines) + "\n"


def signed_rank_p(difference: np.ndarray, groups: Sequence[str]) -> float:
    """Two-sided Wilcoxon signed-rank p of the persons' mean differences; 1 where there are none."""
    from scipy.stats import wilcoxon

    who = np.array(groups)
    means = np.array([difference[who == one].mean() for one in dict.fromkeys(groups)])
    return float(wilcoxon(means).pvalue) if means.any() else 1.0


def budget(networks: Networks) -> str:
    """A line a training: time, steps, parameters, and whether its score was still rising."""
    shares = ", ".join(f"{share:.0%}".rstrip("%") for share in PLATEAU)
    lines = [
        f"| training | minutes | CPU minutes | steps | parameters | best tune Dice | tune Dice after {shares} % |",
        "|---|---|---|---|---|---|---|",
    ]
    trainings = {trained.folder: (METHODS[name], trained) for (name, _), trained in networks.items()}
    for folder, (method, trained) in trainings.items():
        curve, spent = read_curve(folder), spent_on(folder, method)
        cells = (
            folder.name + _remark(folder, method),
            f"{spent.minutes:.1f}",
            "–" if np.isnan(spent.cpu_minutes) else f"{spent.cpu_minutes:.1f}",
            steps_of(curve),
            f"{trained.parameters / 1e6:.2f} M",
            "–" if np.isnan(trained.best) else f"{trained.best:.3f}",
            plateau(curve),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Minutes: without CUDA, CPU time divided by threads, so that other work on the machine does not count.",
    ]
    return "\n".join(lines) + "\n"


def _remark(folder: Path, method: Method) -> str:
    if folder.parent == hub.BUNDLED:
        return " (bundled)"
    return "" if is_finished(folder, method) else " (unfinished)"


def spent_on(folder: Path, method: Method) -> Spent:
    """From the checkpoint, or what the folder says of itself where that was deleted."""
    if (folder / CHECKPOINT).exists():
        return time_spent(folder)
    if method.ours:
        minutes = hub.read_card(folder if is_finished(folder, method) else best_of(folder)).minutes
        return Spent(minutes or float("nan"), float("nan"), float("nan"))
    training = peers.read_training(folder)
    return Spent(*(float(training.get(name, "nan")) for name in Spent._fields))


def choice_table(rows: Rows, inputs: Sequence[Input], columns: Sequence[str]) -> str:
    """How often `segment` chose which mode and match, how well that explains the scans, and how long it took."""
    lines = ["| input | method | chosen | residual | doubtful | s per case |", "|---|---|---|---|---|---|"]
    for input in inputs:
        for method in columns:
            mine = [row for place, row in rows.items() if place[:2] == (input.name, method)]
            chosen = Counter(f"{row.mode}, match {row.match}" if row.match else row.mode for row in mine)
            how = "; ".join(f"{name}: {count}" for name, count in chosen.most_common())
            residual = np.median([row.residual or 0.0 for row in mine])
            doubtful = sum(bool(row.doubtful) for row in mine)
            seconds = np.mean([row.seconds for row in mine])
            cells = f"{residual:.3g} | {doubtful} of {len(mine)} | {seconds:.1f}"
            lines.append(f"| {input.name} | {METHODS[method].title} | {how} | {cells} |")
    lines += ["", "Residual: median. Doubtful: of these `segment` warns."]
    return "\n".join(lines) + "\n"


def draw(
    out: Path, rows: Rows, inputs: Sequence[Input], columns: Sequence[str], people: Mapping[str, str]
) -> None:
    """Dice with intervals as table.svg and table.png: a line per row, a dot per method, open where not `main`."""
    from matplotlib.figure import Figure

    shown = rows_shown(inputs)
    figure = Figure(figsize=(8, 1.6 + (0.2 + 0.11 * len(columns)) * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(columns):
        values = [values_of(rows, names, method) for names in shown.values()]
        means = np.array([np.mean(list(each.values())) for each in values])
        limits = np.array([bootstrap_interval(list(v.values()), groups=[people[id] for id in v]) for v in values])
        height = np.arange(len(shown)) + 0.7 * ((number + 0.5) / len(columns) - 0.5)
        axes.errorbar(
            means, height, xerr=np.abs(limits.T - means), fmt="o", markersize=4, linewidth=1.2,
            color=f"C{number}", markerfacecolor=f"C{number}" if METHODS[method].main else "white",
            label=METHODS[method].title,
        )  # fmt: skip
    axes.hlines(np.arange(len(shown) - 1) + 0.5, 0, 1, color="0.9", linewidth=0.8, transform=axes.get_yaxis_transform())
    axes.set_yticks(np.arange(len(shown)), list(shown))
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel="Dice, mean of structures [95 % interval]")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, out, PICTURE)
