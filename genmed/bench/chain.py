"""Segmentation alone beside segmentation and completion: Dice of degraded scans, and of kidneys in four slices.

    python -m genmed.bench.chain --set hippocampus --data DIR --shapes DIR --complete MODEL --out OUT [--cases N]

Sets: hippocampus and acdc are real images, segmented by `--segment`. kidneys have no images: four slices of the true
mask stand for a perfect segmentation of them (emulated). `--shapes` is the data set that the completion model was
trained on: nobody in its training or tuning part is looked at. A row of OUT/cases.csv is written as soon as its case
is finished, and a run that starts again goes on after the last one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genmed import hub
from genmed.bench.cases import cases_of_part, spread
from genmed.bench.hippocampus import mean_interval
from genmed.bench.kept import key_of, read_rows, write_rows
from genmed.bench.tables import HIPPOCAMPUS_DEGRADED, SPLITS, Input, change
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.shapes import ShapeDataset, read_shapes
from genmed.data.shapes.items import mask_of
from genmed.data.shapes.sources import Item, find_items
from genmed.data.split import person
from genmed.degrade import coarser, keep_slices
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.metrics import dice
from genmed.progress import track
from genmed.shape_model import ShapeModel, load_shapes
from genmed.space import on_grid
from genmed.tasks.chain import TRUST, complete_all, completed, structures_of
from genmed.tasks.segment import START_SIGMA, segment
from genmed.tasks.view import between_slices
from genmed.volume import Volume, read, read_labels

CASES, TABLE = "cases.csv", "table.md"
SLICES = 4
INTERPOLATED, GUIDED, CHAIN = "interpolation + one evaluation", "guided", "chain"
OBSERVED, LINEAR = "observed slices only", "linear interpolation of the slices"
METHODS = {"kidneys": (OBSERVED, LINEAR, CHAIN)} | dict.fromkeys(("hippocampus", "acdc"), (INTERPOLATED, GUIDED, CHAIN))
SEGMENTERS = {"hippocampus": "hippocampus-mr", "acdc": "heart-mr"}
INPUTS = {
    "hippocampus": tuple(row for row in HIPPOCAMPUS_DEGRADED if row.name in ("4 slices", "8 mm voxels")),
    "acdc": (
        Input("4 slices", (change(keep_slices, count=SLICES, axis=2),)),
        Input("8 mm voxels", (change(coarser, mm=8),)),
    ),
    "kidneys": (Input("4 slices of the true mask (emulated)", (change(keep_slices, count=SLICES, axis=2),)),),
}


class Row(NamedTuple):
    """The Dice of one method on one case, the mean over structures. `key` names weights and settings."""

    input: str
    case: str
    person: str
    method: str
    key: str
    dice: float


@dataclass(frozen=True)
class Arena:
    """A set with the models that meet on it. `cases`: id -> person."""

    name: str
    cases: Mapping[str, str]
    completer: ShapeModel
    segmenter: hub.Model | None
    dataset: Dataset | None
    kidneys: Mapping[str, Item]

    def key(self, row: Input) -> str:
        """What decides the scores of a case besides its voxels."""
        weights = [self.completer.sha256, self.segmenter.sha256 if self.segmenter else ""]
        settings = [str(entry) for entry in row.changes]
        if self.segmenter and self.segmenter.plan.thick_slices:
            settings.append(f"from {START_SIGMA}")
        return key_of(weights, settings, TRUST)

    def scores(self, row: Input, case: str) -> dict[str, float]:
        """Dice by method."""
        return self._of_mask(row, case) if self.segmenter is None else self._of_scan(row, case)

    def _of_scan(self, row: Input, case: str) -> dict[str, float]:
        assert self.dataset is not None and self.segmenter is not None
        files, plan = self.dataset.case(case), self.segmenter.plan
        assert files.label is not None
        truth, worse = read_labels(files.label), row.degrade(read(files.images), case)

        def score(soft: Volume | None) -> float:
            assert soft is not None
            found = np.asarray(plan.label_values)[on_grid(soft, truth.grid, order=1).argmax(axis=0)]
            values = plan.label_values[1:]
            return float(np.mean([dice(found == value, truth.data[0] == value) for value in values]))

        plain = segment(self.segmenter, worse.scan, mode="conditional", grid="model", **worse.options)
        guided = segment(self.segmenter, worse.scan, grid="model", **worse.options)
        structures, _ = structures_of(plan, self.completer)
        chained = complete_all(
            self.completer, plan, worse.scan, guided, structures, grid="model", observed=worse.observed
        )
        found = {INTERPOLATED: plain, GUIDED: guided, CHAIN: chained.segmentation}
        return {method: score(result.soft) for method, result in found.items()}

    def _of_mask(self, row: Input, case: str) -> dict[str, float]:
        item = self.kidneys[case]
        mask, _, affine = mask_of(item)
        volume = Volume(mask[None].astype(np.uint8), affine)
        seen = row.degrade(volume, case).seen
        linear = between_slices(volume.data.astype(np.float32), seen, 1)[0] > 0.5
        text = f"{item.side} {item.category}"
        _, whole = completed(self.completer, mask.astype(np.float32), seen, affine, text)
        found = {OBSERVED: mask & seen, LINEAR: linear, CHAIN: whole > 0.5}
        return {method: float(dice(result, mask)) for method, result in found.items()}


def arena(
    name: str,
    data: Path,
    shapes: ShapeDataset,
    completer: ShapeModel,
    segmenter: str | None = None,
    part: str = "report",
    count: int | None = None,
) -> Arena:
    """Cases of a set whose persons are in neither the training nor the tuning part of the shapes."""
    met = {(row.source, row.subject) for row in shapes.rows if row.part in ("train", "tune")}
    if name == "kidneys":
        reported = {row.id for row in shapes.rows if row.part == "report" and row.category == "kidney"}
        items = {item.name: item for item in find_items(data).items if item.name in reported}
        chosen = spread(tuple(sorted(items)), count)
        cases = {id: items[id].subject for id in chosen}
        return _filled(Arena(name, cases, completer, None, None, items), data)
    dataset = read_dataset(data)
    people = {id: person(dataset.name, id) for id in cases_of_part(dataset, SPLITS / f"{name}.json", part)}
    ids = tuple(id for id, who in people.items() if (dataset.name, who) not in met)
    cases = {id: people[id] for id in spread(ids, count)}
    model = hub.load(segmenter or SEGMENTERS[name])
    return _filled(Arena(name, cases, completer, model, dataset, {}), data)


def _filled(made: Arena, data: Path) -> Arena:
    if not made.cases:
        raise GenMedError(f"{data}: the shapes were trained on every case of '{made.name}'; choose other --shapes.")
    if made.segmenter is not None and not structures_of(made.segmenter.plan, made.completer)[0]:
        raise GenMedError(f"the completion model knows no structure of '{made.name}'; choose another --complete.")
    return made


def evaluate(made: Arena, out: Path) -> list[Row]:
    """Rows of all cases; those that are there for the same weights and settings are kept."""
    wanted = {(row.name, case): (row, made.key(row)) for row in INPUTS[made.name] for case in made.cases}
    rows = [row for row in read_rows(out / CASES, Row) if (row.input, row.case) in wanted]
    rows = [row for row in rows if row.key == wanted[row.input, row.case][1]]
    finished = {(row.input, row.case) for row in rows}
    left = [place for place in wanted if place not in finished]
    for name, case in track(left, "Chaining"):
        row, key = wanted[name, case]
        scores = made.scores(row, case)
        rows += [Row(name, case, made.cases[case], method, key, value) for method, value in scores.items()]
        write_rows(out / CASES, Row, rows)
    return rows


def report(name: str, rows: Sequence[Row], completer: str) -> str:
    """The table in Markdown: Dice × 100, and by how much the chain is ahead of each segmentation alone."""
    methods = METHODS[name]
    lines = [
        f"# Chain: {name}, completed by {completer}",
        "",
        "Dice × 100, mean over structures [95 % bootstrap interval, whole persons resampled]; below, chain minus the "
        "column, pairwise.",
        "",
        f"| input | cases | {' | '.join(methods)} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for row in INPUTS[name]:
        chosen = [entry for entry in rows if entry.input == row.name]
        people = [entry.person for entry in chosen if entry.method == CHAIN]
        values = {m: 100 * np.array([entry.dice for entry in chosen if entry.method == m]) for m in methods}
        if people:
            cells = [mean_interval(values[method], people, 1) for method in methods]
            lines.append(f"| {row.name} | {len(people)} | {' | '.join(cells)} |")
            ahead = [mean_interval(values[CHAIN] - values[m], people, 1, "+") if m != CHAIN else "" for m in methods]
            lines.append(f"| chain ahead by | | {' | '.join(ahead)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table and write it to OUT/table.md."""
    parser = argparse.ArgumentParser(description="Segmentation alone beside segmentation and completion.")
    parser.add_argument("--set", choices=tuple(INPUTS), required=True, dest="name")
    parser.add_argument("--data", type=Path, required=True, help="folder of the set")
    parser.add_argument("--shapes", type=Path, required=True, help="data set that the completion model was trained on")
    parser.add_argument("--complete", required=True, help="model of shapes")
    parser.add_argument("--segment", help="model of images; default: the one shipped for the set")
    parser.add_argument("--part", choices=("tune", "report"), default="report", help="of the images' split")
    parser.add_argument("--cases", type=int, help="so many evenly spread cases; default all")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    try:
        completer = load_shapes(a.complete)
        made = arena(a.name, a.data, read_shapes(a.shapes), completer, a.segment, a.part, a.cases)
        text = report(a.name, evaluate(made, a.out), completer.plan.name)
    except GenMedError as error:
        print(error, file=sys.stderr)
        return 2
    write_bytes(a.out / TABLE, text.encode("utf-8"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
