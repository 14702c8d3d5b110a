"""The cases that a bench looks at, and the options that choose among those of the hippocampus set."""

import argparse
from itertools import zip_longest
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
    """Up to so many shapes of a part: sources in turn, of each the category that has the fewest, in a shuffled order.

    One shape of every category of every source comes before any second one. For an index it is always the same list,
    and a shorter one is its beginning.
    """
    rng = np.random.default_rng(0)
    numbers = sorted(data.part(part), key=lambda i: data.ids[i])
    groups: dict[str, dict[str, list[int]]] = {}
    for k in rng.permutation(len(numbers)):
        row = data.rows[numbers[k]]
        groups.setdefault(row.source, {}).setdefault(row.category, []).append(numbers[k])
    first, others = [], []
    for _, categories in sorted(groups.items()):
        shuffled = [categories[name] for name in rng.permutation(sorted(categories)).tolist()]
        rounds = [[i for i in one if i is not None] for one in zip_longest(*shuffled)]
        first.append(rounds[0])
        others.append([i for one in rounds[1:] for i in one])
    turns = [*zip_longest(*first), *zip_longest(*others)]
    return [i for turn in turns for i in turn if i is not None][:count]


def hippocampus_options(description: str) -> argparse.ArgumentParser:
    """A parser of --model, --data, --part and --cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="hippocampus-mr")
    parser.add_argument("--data", type=Path, required=True, help="the MSD hippocampus set")
    parser.add_argument("--part", choices=("tune", "report"), default="tune")
    parser.add_argument("--cases", type=int, help="so many evenly spread cases; default all")
    return parser
