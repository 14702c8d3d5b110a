"""The cases that a bench looks at, and the options that choose among those of the hippocampus set."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from genmed.bench.tables import SETS
from genmed.data.dataset import Dataset
from genmed.data.shapes import ShapeDataset
from genmed.data.split import read_split
from genmed.errors import GenMedError

HIPPOCAMPUS = SETS["hippocampus"].split


def cases_of_part(dataset: Dataset, split: Path, part: str, count: int | None = None) -> tuple[str, ...]:
    """Ids of one part of a split, `count` of them evenly spread. Raises `GenMedError` for a part without cases."""
    ids = getattr(read_split(split, dataset.ids), part)
    if not ids:
        raise GenMedError(f"{split}: part '{part}' holds no case; choose another.")
    return spread(ids, count)


def spread(ids: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """So many of the ids, evenly spread; without a number all."""
    return ids if count is None else ids[:: max(1, len(ids) // count)][:count]


def stratified(data: ShapeDataset, part: str, count: int) -> list[int]:
    """Up to so many shapes of a part, evenly over sources and over their categories."""
    numbers = sorted(data.part(part), key=lambda i: data.ids[i])
    order = np.random.default_rng(0).permutation(len(numbers))
    left: dict[str, dict[str, list[int]]] = {}
    for i in (numbers[k] for k in order):
        left.setdefault(data.rows[i].source, {}).setdefault(data.rows[i].category, []).append(i)
    sources = {name: left[name] for name in sorted(left)}
    chosen = [group.pop(0) for groups in sources.values() for _, group in sorted(groups.items())]
    while len(chosen) < min(count, len(numbers)):
        for source, groups in sources.items():
            taken = Counter(data.rows[i].category for i in chosen if data.rows[i].source == source)
            rest = sorted((name for name in groups if groups[name]), key=lambda name: (taken[name], name))
            if rest:
                chosen.append(groups[rest[0]].pop(0))
    return chosen[:count]


def hippocampus_options(description: str) -> argparse.ArgumentParser:
    """A parser of --model, --data, --part and --cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="hippocampus-mr")
    parser.add_argument("--data", type=Path, required=True, help="the MSD hippocampus set")
    parser.add_argument("--part", choices=("tune", "report"), default="tune")
    parser.add_argument("--cases", type=int, help="so many evenly spread cases; default all")
    return parser
