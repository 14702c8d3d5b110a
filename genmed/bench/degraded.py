"""Degraded inputs on a fixed split: the automatic path beside interpolation and one conditional evaluation.

    python -m genmed.bench.degraded --model hippocampus-mr --data DIR --part tune --cases 8

Both columns use the same weights, which never saw such inputs in training; the difference is inference.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from genmed.data.dataset import read_dataset
from genmed.data.split import person, read_split
from genmed.degrade import Degraded, coarser, inverted, keep_slices
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, dice
from genmed.space import Space
from genmed.tasks.segment import segment
from genmed.volume import Volume, read, read_labels

SPLIT = Path(__file__).parent / "splits" / "hippocampus.json"

ROWS: dict[str, Callable[[Volume], Degraded]] = {
    "clean": Degraded,
    "8 mm voxels": lambda scan: coarser(scan, 8),
    "4 slices": lambda scan: keep_slices(scan, 4, axis=1),
    "inverted contrast": inverted,
}


def mean_dice(model: Model, scan: Volume, truth: Volume, options: dict[str, Any]) -> float:
    """Mean Dice over the structures, on the working grid of the degraded scan (1 mm, the scan's field of view)."""
    found = segment(model, scan, grid="model", **options).labels
    space = Space.fit(truth.grid, model.plan.spacing_mm)
    true = space.labels_to_model(truth.data[0], model.plan.label_values)
    values = list(enumerate(model.plan.label_values))[1:]
    return float(np.mean([dice(found.data[0] == value, true == number) for number, value in values]))


def run(model: Model, data: Path, part: str, cases: int | None, samples: int | None) -> None:
    """Print the table row by row."""
    dataset = read_dataset(data)
    ids = getattr(read_split(SPLIT, dataset.ids), part)
    chosen = ids if cases is None else ids[:: max(1, len(ids) // cases)][:cases]
    people = [person(dataset.name, id) for id in chosen]
    print(f"Dice on {len(chosen)} {part} cases, mean and 95 % interval (bootstrap by person)\n")
    print("| input | interpolated, one evaluation | automatic | s per case |\n|---|---|---|---|", flush=True)
    for name, degrade in ROWS.items():
        plain, steered, seconds = [], [], 0.0
        for id in chosen:
            case = dataset.case(id)
            assert case.label is not None
            truth, worse = read_labels(case.label), degrade(read(case.images))
            scan, options = worse.scan, worse.options
            plain.append(mean_dice(model, scan, truth, options | {"mode": "conditional"}))
            started = time.monotonic()
            steered.append(mean_dice(model, scan, truth, options | ({"samples": samples} if name != "clean" else {})))
            seconds += time.monotonic() - started
        cells = " | ".join(_cell(scores, people) for scores in (plain, steered))
        print(f"| {name} | {cells} | {seconds / len(chosen):.1f} |", flush=True)


def _cell(scores: list[float], people: list[str]) -> str:
    low, high = bootstrap_interval(scores, groups=people)
    return f"{np.mean(scores):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Degraded hippocampus scans.")
    parser.add_argument("--model", default="hippocampus-mr")
    parser.add_argument("--data", type=Path, required=True, help="the MSD hippocampus set")
    parser.add_argument("--part", choices=("tune", "report"), default="tune")
    parser.add_argument("--cases", type=int, help="so many evenly spread cases; default all")
    parser.add_argument("--samples", type=int, help="guided samples per case; default that of segment")
    a = parser.parse_args()
    run(load(a.model), a.data, a.part, a.cases, a.samples)


if __name__ == "__main__":
    main()
