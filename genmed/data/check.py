"""`check`: everything that is wrong with a data set folder, in plain words, before training on it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from genmed.data.dataset import Case, Dataset, read_dataset
from genmed.errors import GenMedError
from genmed.progress import track
from genmed.volume import Volume, read, read_labels, require_same_grid


@dataclass(frozen=True)
class Problem:
    """Something wrong with a case ("" for the whole data set).

    Errors must be repaired before training; a warning deserves a look.
    """

    case: str
    severity: Literal["error", "warning"]
    message: str


def check(folder: str | Path) -> list[Problem]:
    """Read every file of a data set and list all problems; an empty list means it is sound.

    Finds missing, unreadable, unlisted and duplicated files, NaN and infinite values, constant images, grids
    of image, label and channels that differ, undeclared label values and empty labels.
    """
    try:
        dataset = read_dataset(folder)
    except GenMedError as error:
        return [Problem("", "error", str(error))]
    problems: list[Problem] = []
    seen = _Seen()
    for case in track([*dataset.cases, *dataset.test], "Checking"):
        problems += _check_case(dataset, case, seen)
    return [*problems, *_check_whole(dataset, seen)]


def format_problems(problems: Sequence[Problem]) -> str:
    """Problems as text, one a line, with a line of totals at the end."""
    errors = sum(problem.severity == "error" for problem in problems)
    lines = [f"{p.severity:7}  {p.case + ': ' if p.case else ''}{p.message}" for p in problems]
    if not problems:
        return "No problems found."
    return "\n".join([*lines, f"{errors} errors, {len(problems) - errors} warnings."])


class _Seen:
    """What earlier cases held."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.images: dict[bytes, str] = {}  # hash of the voxels -> case
        self.values: set[int] = set()       # label values that occur


def _check_case(dataset: Dataset, case: Case, seen: _Seen) -> Iterator[Problem]:
    if case.id in seen.ids:
        yield Problem(case.id, "error", "is listed twice in dataset.json; remove one entry.")
        return
    seen.ids.add(case.id)
    images, problems = _read_all(case.id, case.images, read_image)
    labels, label_problems = _read_all(case.id, [case.label] if case.label else [], read_labels)
    yield from chain(problems, label_problems)
    for image in images:
        yield from _check_values(case.id, image)
    if len(images) == len(case.images):
        yield from _check_channels(dataset, case.id, images)
        yield from _check_repeated(case.id, images, seen)
    for label in labels:
        yield from _check_label(dataset, case.id, label, seen)
    for other in [*images[1:], *labels]:
        if images:
            yield from _check_grid(case.id, other, images[0])


def read_image(path: Path) -> Volume:
    """Read one image file as it is: NaN kept, a fourth axis as channels (MSD)."""
    return read(path, finite=False, fourth_axis="channels")


def _read_all(
    id: str, paths: Iterable[Path], reader: Callable[[Path], Volume]
) -> tuple[list[Volume], list[Problem]]:
    volumes, problems = [], []
    for path in paths:
        if not path.is_file():
            problems.append(Problem(id, "error", f"{path}: is missing; add the file or remove the case."))
            continue
        try:
            volumes.append(reader(path))
        except GenMedError as error:
            problems.append(Problem(id, "error", str(error)))
    return volumes, problems


def _check_values(id: str, image: Volume) -> Iterator[Problem]:
    wrong = image.data.size - np.count_nonzero(np.isfinite(image.data))
    if wrong:
        yield Problem(id, "error", f"{image.path}: has {wrong} NaN or infinite voxels; replace them.")
    elif image.data.min() == image.data.max():
        yield Problem(id, "warning", f"{image.path}: has the same value everywhere; look at the image.")


def _check_channels(dataset: Dataset, id: str, images: Sequence[Volume]) -> Iterator[Problem]:
    found, expected = sum(image.data.shape[0] for image in images), len(dataset.channels)
    if found != expected:
        message = f"{found} channels, but dataset.json names {expected}; make them agree."
        yield Problem(id, "error", f"{images[0].path}: {message}")


def _check_repeated(id: str, images: Sequence[Volume], seen: _Seen) -> Iterator[Problem]:
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.data.shape).encode())
        digest.update(np.ascontiguousarray(image.data).data)
    first = seen.images.setdefault(digest.digest(), id)
    if first != id:
        yield Problem(id, "error", f"{images[0].path}: is the same image as case '{first}'; remove one.")


def _check_label(dataset: Dataset, id: str, label: Volume, seen: _Seen) -> Iterator[Problem]:
    values = np.unique(label.data)
    if strange := [f"{value:g}" for value in values if value not in dataset.labels]:
        some = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        message = f"has the values {some}, which dataset.json does not name; add them there or relabel."
        yield Problem(id, "error", f"{label.path}: {message}")
    seen.values.update(int(value) for value in values if value in dataset.labels)
    if not values.any():
        yield Problem(id, "warning", f"{label.path}: is empty, background only; look at the case.")


def _check_grid(id: str, other: Volume, image: Volume) -> Iterator[Problem]:
    try:
        require_same_grid(image, other)
    except GenMedError as error:
        yield Problem(id, "error", str(error))


def _check_whole(dataset: Dataset, seen: _Seen) -> Iterator[Problem]:
    json_path = dataset.folder / "dataset.json"
    if all(case.label is None for case in dataset.cases):
        yield Problem("", "warning", f"{dataset.folder}: no case has a label map; put them into labelsTr.")
    else:
        for value, name in dataset.labels.items():
            if value and value not in seen.values:
                yield Problem("", "warning", f"{json_path}: label {value} '{name}' occurs in no case.")
    cases = (*dataset.cases, *dataset.test)
    listed = {path.resolve() for case in cases for path in (*case.images, case.label) if path}
    for path in _files(dataset.folder):
        if path.resolve() not in listed:
            yield Problem("", "warning", f"{path}: belongs to no case; list it, rename it or remove it.")


def _files(folder: Path) -> Iterator[Path]:
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        if (folder / name).is_dir():
            yield from (path for path in sorted((folder / name).iterdir()) if not path.name.startswith("."))
