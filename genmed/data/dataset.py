"""`read_dataset`: MSD and nnU-Net v2 folders, as they are, through their dataset.json.

Nothing but dataset.json and folder listings is read here; whether the files are sound is `check`'s business.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genmed.errors import GenMedError

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".png", ".tiff", ".tif", ".bmp", ".jpg")


@dataclass(frozen=True)
class Case:
    """One case: a file per channel (or one file that holds all channels) and its label map."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Dataset:
    """A data set on disk.

    `cases` are the training cases, sorted by id; `test` those of imagesTs, without labels.
    Listed files need not exist: `check` tells which do not.
    """

    folder: Path
    name: str
    cases: tuple[Case, ...]
    channels: tuple[str, ...]
    labels: dict[int, str]            # value in the files -> class name, sorted by value, 0 included
    licence: str = ""
    reference: str = ""
    test: tuple[Case, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the training cases, sorted."""
        return tuple(case.id for case in self.cases)

    def case(self, id: str) -> Case:
        """The training or test case with this id. Raises `GenMedError` when there is none."""
        for case in (*self.cases, *self.test):
            if case.id == id:
                return case
        some = ", ".join(self.ids[:3])
        raise GenMedError(f"{self.folder}: has no case '{id}'; its ids look like {some}.")


def read_dataset(folder: str | Path) -> Dataset:
    """Read a data set folder with a dataset.json in MSD or nnU-Net v2 style. 2D sets (.png) are the same.

    Raises `GenMedError` that names the file and the key.
    """
    folder = Path(folder)
    entries = _read_json(folder / "dataset.json")
    channels = _channels(folder, entries)
    cases, test = _listed_cases(folder, entries) or _found_cases(folder, entries, len(channels))
    if not cases:
        raise GenMedError(f"{folder}: holds no training cases; fill imagesTr and labelsTr.")
    return Dataset(
        folder=folder,
        name=str(entries.get("name") or folder.resolve().name),
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        channels=channels,
        labels=_labels(folder, entries),
        licence=str(entries.get("licence") or entries.get("license") or "").strip(),
        reference=str(entries.get("reference") or "").strip(),
        test=tuple(sorted(test, key=lambda case: case.id)),
    )


def _fail(folder: Path, key: str, message: str) -> GenMedError:
    return GenMedError(f"{folder / 'dataset.json'}: key '{key}' {message}.")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GenMedError(f"{path}: not found; give a folder in MSD or nnU-Net v2 layout.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenMedError(f"{path}: cannot be read as JSON ({error}); repair the file.") from error
    if not isinstance(entries, dict):
        raise GenMedError(f"{path}: must be a JSON object with keys such as 'labels'; repair the file.")
    return entries


def _channels(folder: Path, entries: dict[str, Any]) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in entries else "modality"
    names = entries.get(key)
    if names is None:
        raise _fail(folder, "channel_names", '(or "modality") is missing; add it, like {"0": "MRI"}')
    if not isinstance(names, dict) or sorted(names) != sorted(str(k) for k in range(len(names))) or not names:
        raise _fail(folder, key, f'must number the channels like {{"0": "MRI"}}, but is {names!r}')
    return tuple(str(names[str(k)]) for k in range(len(names)))


def _labels(folder: Path, entries: dict[str, Any]) -> dict[int, str]:
    """MSD maps value to name, nnU-Net v2 name to value."""
    stated = entries.get("labels")
    if not isinstance(stated, dict) or not stated:
        raise _fail(folder, "labels", 'must be an object like {"background": 0, "liver": 1}')
    by_value = all(re.fullmatch(r"\d+", key) for key in stated)
    labels: dict[int, str] = {}
    for key, entry in stated.items():
        name, value = (str(entry), key) if by_value else (key, entry)
        if name == "ignore" or isinstance(value, list):
            raise _fail(folder, "labels", f"has a region or ignore label '{name}'; use plain classes")
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
            raise _fail(folder, "labels", f"gives '{name}' the value {value!r}; use an integer from 0 on")
        if int(value) in labels or name in labels.values():
            raise _fail(folder, "labels", f"has the value {value} or the name '{name}' twice")
        labels[int(value)] = name
    if 0 not in labels:
        raise _fail(folder, "labels", "has no entry for the value 0; add the background")
    return dict(sorted(labels.items()))


def _listed_cases(folder: Path, entries: dict[str, Any]) -> tuple[list[Case], list[Case]] | None:
    """Cases that dataset.json lists: MSD's "training" and "test", or nnU-Net's "dataset"."""
    if isinstance(entries.get("dataset"), dict):
        listed = entries["dataset"].items()
        return [_listed_case(folder, "dataset", row, id=id) for id, row in listed], []
    if "training" not in entries:
        return None
    for key in ("training", "test"):
        if not isinstance(entries.get(key, []), list):
            raise _fail(folder, key, "must be a list of cases")
    training = [_listed_case(folder, "training", row) for row in entries["training"]]
    return training, [_listed_case(folder, "test", row) for row in entries.get("test", [])]


def _listed_case(folder: Path, key: str, row: Any, id: str | None = None) -> Case:
    row = {"image": row} if isinstance(row, str) else row
    images = (row.get("images") or row.get("image")) if isinstance(row, dict) else None
    images = [images] if isinstance(images, str) else images
    label = row.get("label") if isinstance(row, dict) else None
    named = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
    if not isinstance(images, list) or not named or not isinstance(label, str | None):
        raise _fail(folder, key, f'has an entry {row!r}; write {{"image": "...", "label": "..."}}')
    paths = tuple(folder / image for image in images)
    return Case(id or _stem(paths[0].name), paths, folder / label if label else None)


def _stem(name: str) -> str:
    ending = next((e for e in ENDINGS if name.lower().endswith(e)), Path(name).suffix)
    return name[: len(name) - len(ending)]


def _found_cases(folder: Path, entries: dict[str, Any], channels: int) -> tuple[list[Case], list[Case]]:
    """Cases in nnU-Net's folders: imagesTr/ID_0000.nii.gz, labelsTr/ID.nii.gz."""
    ending = entries.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise _fail(folder, "file_ending", 'must name the ending of all files, such as ".nii.gz"')
    if not (folder / "imagesTr").is_dir():
        raise GenMedError(f"{folder}: has no folder imagesTr, and dataset.json lists no cases.")
    training = _image_ids(folder / "imagesTr", ending) | _names(folder / "labelsTr", ending)
    labelled = (folder / "labelsTr").is_dir()

    def case(id: str, images: str, labelled: bool) -> Case:
        paths = tuple(folder / images / f"{id}_{channel:04d}{ending}" for channel in range(channels))
        return Case(id, paths, folder / "labelsTr" / f"{id}{ending}" if labelled else None)

    test = _image_ids(folder / "imagesTs", ending)
    return [case(id, "imagesTr", labelled) for id in training], [case(id, "imagesTs", False) for id in test]


def _names(folder: Path, ending: str) -> set[str]:
    """File names of a folder without the ending; hidden files are skipped, a missing folder is empty."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
    return {name[: -len(ending)] for name in names if name.endswith(ending) and not name.startswith(".")}


def _image_ids(folder: Path, ending: str) -> set[str]:
    numbered = (re.fullmatch(r"(.+)_\d{4}", name) for name in _names(folder, ending))
    return {match[1] for match in numbered if match}
