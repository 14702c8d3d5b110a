"""Three-way splits (train, tune, report) by subject, so that no person is in two parts."""

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genmed.errors import GenMedError
from genmed.files import write_json

PARTS = ("train", "tune", "report")
SPLIT = "split.json"  # in the folder of a set or of a training

SUBJECT_RULES: dict[str, tuple[str, Callable[[re.Match[str]], str]]] = {
    # data set name -> pattern of an id, the subject it belongs to. In MSD's hippocampus the files 2k-1 and 2k
    # are the two sides of one person; ACDC has two frames and MS-CMRSeg three sequences of each patient.
    "hippocampus": (r"hippocampus_(\d+)", lambda match: f"person_{(int(match[1]) + 1) // 2:03d}"),
    "acdc": (r"(patient\d+)_.*", lambda match: match[1]),
    "mscmrseg": (r"((?:subject|patient)\d+)_.*", lambda match: match[1]),
}


@dataclass(frozen=True)
class Split:
    """Sorted case ids of the three parts; `subjects` says in words how ids were joined into persons."""

    dataset: str
    train: tuple[str, ...]
    tune: tuple[str, ...]
    report: tuple[str, ...]
    subjects: str = "one per case"

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all parts."""
        return self.train + self.tune + self.report


def person(dataset_name: str, case_id: str, subject: Mapping[str, str] | str | None = None) -> str:
    """The subject a case belongs to.

    `subject` overrides the rule: a mapping id -> subject, or a regular expression whose first group is the
    subject. Without it, the rule of a known data set applies ("hippocampus": (id + 1) // 2; "acdc":
    patientNNN; "mscmrseg": subjectN or patientN), and otherwise every case is its own subject.
    """
    if isinstance(subject, Mapping):
        if case_id not in subject:
            raise GenMedError(f"the subject mapping has no entry for case '{case_id}'; add it.")
        return subject[case_id]
    if subject is not None:
        return _first_group(subject, case_id)
    pattern, name = SUBJECT_RULES.get(_plain(dataset_name), ("", str))
    match = re.fullmatch(pattern, case_id)
    return name(match) if match else case_id


def three_way(
    subjects: Mapping[str, str], seed: int = 0, fractions: Sequence[float] = (0.68, 0.10, 0.22)
) -> dict[str, tuple[str, ...]]:
    """Split case ids (keys) so that every subject (values) falls into one part.

    `fractions` are shares of the subjects for train, tune and report; they add up to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise GenMedError(f"split fractions {tuple(fractions)} must be three shares that add up to 1.")
    people = sorted(set(subjects.values()))
    random.Random(seed).shuffle(people)
    first = round(fractions[0] * len(people))
    second = first + round(fractions[1] * len(people))
    chosen = dict(zip(PARTS, (people[:first], people[first:second], people[second:]), strict=True))
    if empty := [part for part, share in zip(PARTS, fractions, strict=True) if share and not chosen[part]]:
        raise GenMedError(f"{len(people)} subjects are too few: part '{empty[0]}' would be empty; add cases.")
    part_of = {who: part for part in PARTS for who in chosen[part]}
    return {part: tuple(sorted(id for id, who in subjects.items() if part_of[who] == part)) for part in PARTS}


def read_split(path: str | Path, known_ids: Iterable[str] | None = None) -> Split:
    """Read and validate a split file; with `known_ids`, every id of the file must be among them."""
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenMedError(f"{path}: cannot read the split ({error}); give a split JSON file.") from error
    for key in ("dataset", *PARTS):
        if not isinstance(entries, dict) or key not in entries:
            raise GenMedError(f"{path}: key '{key}' is missing; add it.")
    for part in PARTS:
        if not isinstance(entries[part], list) or not all(isinstance(id, str) for id in entries[part]):
            raise GenMedError(f"{path}: key '{part}' must be a list of case ids.")
    train, tune, report = (tuple(entries[part]) for part in PARTS)
    subjects = str(entries.get("subjects", "one per case"))
    split = Split(str(entries["dataset"]), train, tune, report, subjects)
    try:
        validate(split, known_ids=known_ids)
    except GenMedError as error:
        raise GenMedError(f"{path}: {error}") from error
    return split


def write_split(path: str | Path, split: Split, subjects: Mapping[str, str] | None = None) -> None:
    """Validate a split and write it as JSON (temp file + rename)."""
    validate(split, subjects)
    parts = {part: sorted(getattr(split, part)) for part in PARTS}
    write_json(path, {"dataset": split.dataset, "subjects": split.subjects, **parts})


def validate(
    split: Split, subjects: Mapping[str, str] | None = None, known_ids: Iterable[str] | None = None
) -> None:
    """Raise `GenMedError` unless parts are disjoint, by subject, and (when given) all ids are known.

    Subjects come from `subjects` (id -> subject) or from the rule of the data set (`person`).
    """
    part_of: dict[str, str] = {}
    for part in PARTS:
        for id in getattr(split, part):
            who = person(split.dataset, id, subjects)
            if part_of.setdefault(who, part) != part:
                raise GenMedError(f"subject '{who}' (case '{id}') is in {part_of[who]} and {part}; keep one.")
    if len(set(split.ids)) < len(split.ids):
        twice = next(id for id in split.ids if split.ids.count(id) > 1)
        raise GenMedError(f"case '{twice}' is listed twice; keep one entry.")
    if known_ids is not None and (strangers := sorted(set(split.ids) - set(known_ids))):
        raise GenMedError(
            f"{len(strangers)} ids such as '{strangers[0]}' are not in the data set; use the matching folder."
        )


def _plain(dataset_name: str) -> str:
    """'Task04_Hippocampus', 'Dataset004_Hippocampus' and 'Hippocampus' are one data set."""
    return re.sub(r"^(task|dataset)\d+_", "", dataset_name.lower())


def _first_group(pattern: str, case_id: str) -> str:
    try:
        match = re.search(pattern, case_id)
    except re.error as error:
        raise GenMedError(f"subject pattern '{pattern}' is not a regular expression ({error}).") from error
    if match is None or not match.groups() or match[1] is None:
        raise GenMedError(f"subject pattern '{pattern}' finds no first group in case '{case_id}'.")
    return match[1]
