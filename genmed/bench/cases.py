"""The cases that a bench looks at: where sets lie, who is in which part, and the options for the hippocampus set."""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np

from genmed.bench.tables import PREPARED, SETS, SPLITS
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.shapes import ShapeDataset
from genmed.data.split import SPLIT, Split, person, read_split, three_way, write_split
from genmed.errors import GenMedError

HIPPOCAMPUS = SPLITS / "hippocampus.json"


def prepared(data: Path, folder: str) -> Dataset:
    """A set of the tables. Raises `GenMedError` that says how to make it where it is not there, or not finished."""
    if not (data / folder / "dataset.json").is_file():
        how = PREPARED[folder].replace("DATA", str(data))
        raise GenMedError(f"{data / folder}: holds no dataset.json; download the set to SRC, then: genmed data {how}")
    return read_dataset(data / folder)


def split_of(data: Path, runs: Path, set_name: str) -> Path:
    """The split file of a set: the repository's, or RUNS/SET/split.json, made once and never again.

    It is a copy of the data set's own split.json where there is one, else drawn by person. Cases that come later are
    in no part, so that nothing trained before has seen what is reported.
    """
    if (fixed := SETS[set_name].split) is not None:
        return fixed
    path = runs / set_name / SPLIT
    if not path.exists():
        dataset = prepared(data, SETS[set_name].folder)
        people = persons(dataset, dataset.ids)
        own = dataset.folder / SPLIT
        write_split(path, read_split(own, dataset.ids) if own.exists() else drawn(dataset, people), people)
    return path


def drawn(dataset: Dataset, people: Mapping[str, str]) -> Split:
    """The labelled cases in three parts by person, the same whenever it is drawn."""
    parts = three_way({case.id: people[case.id] for case in dataset.cases if case.label is not None})
    return Split(dataset.name, parts["train"], parts["tune"], parts["report"], "drawn by genmed bench segmentation")


def persons(dataset: Dataset, ids: Iterable[str]) -> dict[str, str]:
    """Whom each case belongs to: by the set's groups.csv (columns id, group) where it has one, else by its ids."""
    path, groups = dataset.folder / "groups.csv", None
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            groups = {row["id"]: f"group {row['group']}" for row in csv.DictReader(file)}
    return {id: person(dataset.name, id, groups) for id in ids}


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends a command with one line and exit code 2, as those of `genmed` do."""
    try:
        yield
    except GenMedError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
