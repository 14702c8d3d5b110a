"""Which shapes a source folder holds: a list of `Item`s, in a fixed order, before any surface or voxel is read.

Five layouts are understood: `index.csv` with files beside it, MSD / nnU-Net folders with a dataset.json, label maps
with a labels.json or names in their headers, MedShapeNet downloads, and plain folders of surface files.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genmed.data.dataset import read_dataset
from genmed.data.split import person
from genmed.errors import GenMedError
from genmed.mesh import MESH_SUFFIXES
from genmed.volume import read_label_names

Facts = tuple[tuple[str, str], ...]

SIDES = ("left", "right", "midline")
INDEX_COLUMNS = ("path", "category", "side", "subject")
NAMES_FILE = "labels.json"
PARTS = {"train": "train", "val": "tune", "tune": "tune", "test": "report", "report": "report"}


@dataclass(frozen=True)
class Structure:
    """A shape made of classes of a label map. With `both`, it is a pair of organs to be told apart by place."""

    category: str
    classes: tuple[str, ...]
    side: str = ""
    both: bool = False


STRUCTURES: dict[str, tuple[Structure, ...]] = {
    # Data sets whose class names do not say what the shapes are. Everywhere else each class is a shape.
    "hippocampus": (
        Structure("hippocampus", ("Anterior", "Posterior")),
        Structure("anterior hippocampus", ("Anterior",)),
        Structure("posterior hippocampus", ("Posterior",)),
    ),
    "acdc": (
        Structure("right ventricle", ("RV",)),
        Structure("left ventricular myocardium", ("MYO",)),
        Structure("left ventricle", ("LV",)),
    ),
    "mmwhs": (
        Structure("left ventricle", ("LV",)),
        Structure("right ventricle", ("RV",)),
        Structure("left atrium", ("LA",)),
        Structure("right atrium", ("RA",)),
        Structure("left ventricular myocardium", ("MYO",)),
        Structure("ascending aorta", ("AO",)),
        Structure("pulmonary artery", ("PA",)),
    ),
    "left_atrium": (Structure("left atrium", ("left_atrium",)),),
    "la2018": (Structure("left atrium", ("left atrium",)),),
    "kits23": (Structure("kidney", ("kidney", "tumor", "cyst"), both=True),),
}
STRUCTURES["mscmrseg"] = STRUCTURES["mscmr_lge"] = STRUCTURES["acdc"]

FINDINGS: dict[str, dict[str, Facts]] = {
    # source -> value of the column "label" of its index.csv -> what it says
    "adrenal": {"0": (("mass or hyperplasia", "no"),), "1": (("mass or hyperplasia", "yes"),)},
}
NAMES = {
    "adrenal": "adrenal gland",
    "csf": "cerebrospinal fluid",
    "vdc anterior": "anterior ventral diencephalon",
    "vdc posterior": "posterior ventral diencephalon",
    "5th ventricle": "fifth ventricle",
    "tumor": "tumour",
}


@dataclass(frozen=True)
class Item:
    """One shape to be built.

    A label map's shape is the union of `values`, or everything but 0 where there are none; `parts` are values whose
    presence is a fact, by name. `side` is also a choice where the map shows `both`. `array` and `index` choose a map
    in an .npz file, which has no scale. `part` is the source's own split. `folder` is the source folder.
    """

    source: str
    path: Path
    category: str
    side: str
    subject: str
    licence: str = ""
    values: tuple[int, ...] = ()
    parts: tuple[tuple[str, int], ...] = ()
    both: bool = False
    array: str = ""
    index: int = 0
    part: str = ""
    facts: Facts = ()
    folder: Path = Path()

    @property
    def place(self) -> str:
        """The file below its source folder, and the map inside of an .npz file."""
        return within(self.path, self.folder) + (f"#{self.array}[{self.index}]" if self.array else "")

    @property
    def name(self) -> str:
        """Readable, and almost always unique: source, file or subject, structure, side."""
        case = self.subject if self.array else self.path.name.split(".")[0]
        words = "-".join(word for word in (self.source, case, self.category, self.side) if word)
        return re.sub(r"[^A-Za-z0-9.-]+", "_", words)


@dataclass(frozen=True)
class Listing:
    """Items of one source, and what was left out before anything was read: path -> reason."""

    items: tuple[Item, ...]
    left_out: tuple[tuple[Path, str], ...] = ()


def within(path: Path, folder: Path) -> str:
    """A path below a folder, from that folder on; of any other path the name alone, so that no machine shows."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def find_items(folder: str | Path) -> Listing:
    """List the shapes of a source folder. Raises `GenMedError` where nothing is recognised."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise GenMedError(f"{folder}: not a folder; give a data set folder, or a folder of surface files.")
    listing = _reader(folder)(folder)
    if not listing.items:
        needed = "an index.csv, a dataset.json, label maps with names (labels.json or header), or surface files"
        raise GenMedError(f"{folder}: holds no shapes; it needs {needed}.")
    readable = [item for item in listing.items if _is_text(item.path)]
    unreadable = dict.fromkeys(item.path for item in listing.items if not _is_text(item.path))
    left_out = [(_as_text(path), why) for path, why in listing.left_out]
    left_out += [(_as_text(path), "its name is not UTF-8: rename it") for path in unreadable]
    ordered = sorted(readable, key=lambda item: (item.path, item.array, item.index, item.category, item.side))
    return Listing(tuple(replace(item, folder=folder) for item in _with_report(ordered)), tuple(left_out))


def _is_text(path: Path) -> bool:
    return path == _as_text(path)


def _as_text(path: Path) -> Path:
    """The path with question marks for bytes that are no UTF-8, which neither tables nor mesh libraries take."""
    return Path(str(path).encode("utf-8", "replace").decode("utf-8"))


def _reader(folder: Path) -> Callable[[Path], Listing]:
    if (folder / "index.csv").is_file():
        return from_index
    if (folder / "dataset.json").is_file():
        return from_dataset
    meshes = _meshes(folder)
    if (folder / NAMES_FILE).is_file() or not meshes:
        return from_label_maps
    named = [path for path in meshes if MEDSHAPENET.fullmatch(path.name)]
    return from_medshapenet if 2 * len(named) > len(meshes) else from_meshes


def _with_report(items: Sequence[Item]) -> list[Item]:
    """A source that keeps its test part elsewhere: what it validates on is reported, a tenth of its training tunes."""
    parts = {item.part for item in items}
    if parts != {"train", "tune"}:
        return list(items)
    subjects = sorted({item.subject for item in items if item.part == "train"})
    tune = set(subjects[::10])
    renamed = {True: "tune", False: "train"}
    return [_in_part(i, "report" if i.part == "tune" else renamed[i.subject in tune]) for i in items]


def _in_part(item: Item, part: str) -> Item:
    return replace(item, part=part)


# index.csv ------------------------------------------------------------------------------------------------


def from_index(folder: Path) -> Listing:
    """A table of files: columns path, category, side, subject, and in `extra` KEY=VALUE pairs joined by ";".

    Label maps: `label=K` chooses a value; else all values count, and the classes of dataset.json other than the
    category become facts. .npz: `array=NAME` and a column index. A column split is kept; a side "both" becomes two.
    """
    path = folder / "index.csv"
    rows = _rows(path)
    if not rows or not set(INDEX_COLUMNS) <= rows[0].keys():
        raise GenMedError(f"{path}: needs the columns {', '.join(INDEX_COLUMNS)}; add them.")
    described = _json(folder / "dataset.json")
    labels = described.get("labels", {})
    if not isinstance(labels, dict):
        raise GenMedError(f"{folder / 'dataset.json'}: labels must be names with their values; correct them.")
    values = {name: value for name, value in labels.items() if isinstance(value, int) and value}
    source = str(described.get("name") or folder.resolve().name)
    items: list[Item] = []
    left_out: list[tuple[Path, str]] = []
    for number, row in enumerate(rows, 2):
        if not (row["path"] and row["category"] and row["subject"]):
            raise GenMedError(f"{path}: line {number} has no path, category or subject; add it.")
        file = folder / row["path"]
        if row["side"] not in (*SIDES, "both", "unknown", ""):
            left_out.append((file, f"side '{row['side']}': not one structure"))
            continue
        try:
            items += _row_items(row, file, source, str(described.get("licence") or ""), values)
        except ValueError as error:
            raise GenMedError(f"{path}: line {number}: {error}; correct it.") from error
    return Listing(tuple(items), tuple(left_out))


def _row_items(row: Mapping[str, str], file: Path, source: str, licence: str, values: Mapping[str, int]) -> list[Item]:
    extra = dict(pair.split("=", 1) for pair in (row.get("extra") or "").split(";") if "=" in pair)
    chosen = (_number(extra["label"], "label", 1),) if "label" in extra else ()
    is_map = file.suffix.lower() not in MESH_SUFFIXES and not chosen and "array" not in extra
    parts = tuple((plain(name), value) for name, value in values.items() if name != row["category"]) if is_map else ()
    both = row["side"] == "both"
    sides = ("left", "right") if both else (row["side"] if row["side"] in SIDES else "",)
    return [
        Item(
            source=source,
            path=file,
            category=plain(row["category"]),
            side=side,
            subject=row["subject"],
            licence=licence,
            values=chosen,
            parts=parts,
            both=both,
            array=extra.get("array", ""),
            index=_number(row.get("index") or "0", "index", 0),
            part=PARTS.get(row.get("split") or "", ""),
            facts=FINDINGS.get(source, {}).get(row.get("label") or "", ()),
        )
        for side in sides
    ]


def _number(text: str, what: str, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise ValueError(f"{what} '{text}' is not a whole number from {least} on")
    return int(text)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise GenMedError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8.") from error


# dataset.json ---------------------------------------------------------------------------------------------


def from_dataset(folder: Path) -> Listing:
    """Label maps of an MSD or nnU-Net folder: a shape per class, or per structure of `STRUCTURES`.

    Subjects follow `genmed.data.split.person`, or a groups.csv (id, group) beside the dataset.json.
    """
    dataset = read_dataset(folder)
    known = re.sub(r"^(task|dataset)\d+_", "", dataset.name.lower())
    classes = {name: value for value, name in dataset.labels.items() if value}
    structures = STRUCTURES.get(known, ())
    if not all(name in classes for structure in structures for name in structure.classes):
        structures = ()
    structures = structures or tuple(_alone(name) for name in classes)
    groups = _groups(folder / "groups.csv")
    items = []
    for case in dataset.cases:
        if case.label is None:
            continue
        subject = groups.get(case.id) or person(dataset.name, case.id)
        for structure in structures:
            parts = tuple((plain(name), classes[name]) for name in structure.classes if name != structure.category)
            for which in ("left", "right") if structure.both else (structure.side,):
                items.append(
                    Item(
                        source=dataset.name,
                        path=case.label,
                        category=plain(structure.category),
                        side=which,
                        subject=subject,
                        licence=dataset.licence,
                        values=tuple(classes[name] for name in structure.classes),
                        parts=parts if structure.both else (),
                        both=structure.both,
                    )
                )
    return Listing(tuple(items))


def from_label_maps(folder: Path) -> Listing:
    """NIfTI label maps beside a labels.json, {"1": "liver"} or {"liver": 1}: a shape per class, a subject per file.

    Without a labels.json, each file's header names its labels, as in what `genmed segment` and TotalSegmentator write.
    """
    given = _named(folder / NAMES_FILE) if (folder / NAMES_FILE).is_file() else None
    source, licence = folder.resolve().name, _licence(folder)
    items: list[Item] = []
    left_out: list[tuple[Path, str]] = []
    for file in sorted(path for ending in ("*.nii.gz", "*.nii") for path in folder.glob(ending)):
        classes = read_label_names(file) if given is None else given
        if not classes:
            left_out.append((file, f"its header names no labels, and there is no {NAMES_FILE}"))
        for value, name in classes.items():
            if value and name:
                category, side = sided(name)
                subject = file.name.split(".nii")[0]
                items.append(Item(source, file, plain(category), side, subject, licence, values=(value,)))
    return Listing(tuple(items), tuple(left_out))


def _named(path: Path) -> dict[int, str]:
    """Values and names of a labels.json."""
    classes: dict[int, str] = {}
    for key, entry in _json(path).items():
        name, value = (entry, key) if key.isdecimal() else (key, entry)
        if not isinstance(name, str) or isinstance(value, bool) or not str(value).isdecimal() or int(value) in classes:
            raise GenMedError(f'{path}: must name each value once, like {{"1": "liver"}}, but has {key!r}: {entry!r}.')
        classes[int(value)] = name
    return classes


def _alone(name: str) -> Structure:
    category, side = sided(name)
    return Structure(category, (name,), side)


def _groups(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = _rows(path)
    if not rows or not {"id", "group"} <= rows[0].keys():
        raise GenMedError(f"{path}: needs the columns id, group; add them.")
    return {row["id"]: f"group_{row['group']}" for row in rows}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise GenMedError(f"{path}: cannot be read as JSON ({error}); repair the file.") from error
    return content if isinstance(content, dict) else {}


# Surface files --------------------------------------------------------------------------------------------

MEDSHAPENET = re.compile(
    r"(?P<subject>s\d{4}|\d{4,6})_(?P<name>[a-z].*?)(\.nii(\.gz?)?(_\d+)?)?\.stl", re.IGNORECASE
)
MEDSHAPENET_LICENCES = {  # the table "Datasets contributed to MedShapeNet 1.0" of its public README
    "abdomenct-1k": "CC BY 4.0", "amos": "CC BY 4.0", "autopet": "CC BY 4.0", "crossmoda": "CC BY 4.0",
    "ct-org": "CC0 1.0", "emidec": "CC BY-NC-SA 4.0", "facialmodels": "CC BY 4.0", "glisrt": "TCIA Restricted",
    "hcp": "Data Use Terms", "isles22": "CC BY 4.0", "kits21": "MIT", "lndb": "CC BY-NC-ND 4.0",
    "lumiere": "CC BY-NC", "mug500+": "CC BY 4.0", "mrigbm": "CC BY 4.0", "pulmonarytree": "CC BY 4.0",
    "skullbreak": "CC BY 4.0", "skullfix": "CC BY 4.0", "sudmexconn": "CC0", "3d-cosi": "CC BY 4.0",
    "3dteethseg": "CC BY-NC-ND 4.0", "toothfairy": "CC BY-SA", "totalsegmentator": "CC BY 4.0", "verse": "CC BY 4.0",
}  # fmt: skip


def from_medshapenet(folder: Path) -> Listing:
    """MedShapeNet (Li et al., arXiv 2308.16139), as its link list and its Python API leave it on disk.

    Files are NUMBER_STRUCTURE.stl, such as 000001_liver.stl; those from TotalSegmentator are
    sNNNN_STRUCTURE.nii.g_1.stl (s0238_femur_right.nii.g_1.stl). The API (PyPI MedShapeNet; repository
    GLARKI/MedShapeNet2.0) makes a folder per data set, medshapenetcore/FLARE, with text files on citation and
    licence; the link list MedShapeNetDataset.txt gives one flat folder. One number is taken as one person within a
    data set: the lists do not say so, and a person must not be in two parts. Names of another form are left out.
    """
    items: list[Item] = []
    left_out: list[tuple[Path, str]] = []
    meshes = _meshes(folder)
    licences = {parent: _licence(parent) for parent in {path.parent for path in meshes}}
    for path in meshes:
        match = MEDSHAPENET.fullmatch(path.name)
        if match is None:
            left_out.append((path, "not named NUMBER_STRUCTURE.stl as in MedShapeNet"))
            continue
        source = _medshapenet_source(path, folder, match["subject"])
        category, side = sided(match["name"])
        licence = licences[path.parent] or MEDSHAPENET_LICENCES.get(source.removeprefix("MedShapeNet ").lower(), "")
        items.append(Item(source, path, plain(category), side, match["subject"], licence or "see MedShapeNet"))
    return Listing(tuple(items), tuple(left_out))


def _medshapenet_source(path: Path, folder: Path, subject: str) -> str:
    if subject.lower().startswith("s"):
        return "MedShapeNet TotalSegmentator"
    return "MedShapeNet" if path.parent == folder else f"MedShapeNet {path.parent.name}"


def _licence(folder: Path) -> str:
    """The Creative Commons name, or the first line, in a text file on the licence."""
    for path in sorted(folder.glob("*.txt")):
        if re.search(r"licen[cs]e", path.name, re.IGNORECASE):
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.search(r"CC[ -]?(?:BY(?:-\w\w)*|0)(?: \d\.\d)?", text)
            return found[0] if found else text.strip().partition("\n")[0][:80]
    return ""


def from_meshes(folder: Path) -> Listing:
    """STL, PLY, OBJ, VTP and GLB files: CATEGORY/SUBJECT.stl in subfolders, or one category named like the folder."""
    source, licence = folder.resolve().name, _licence(folder)
    items = []
    for path in _meshes(folder):
        above = path.parent.relative_to(folder).parts
        category, side = sided(above[0] if above else source)
        subject, side_of_file = sided(path.stem)
        items.append(Item(source, path, plain(category), side or side_of_file, subject, licence))
    return Listing(tuple(items))


def _meshes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES and path.is_file())


# Names ----------------------------------------------------------------------------------------------------


def sided(name: str) -> tuple[str, str]:
    """("femur", "right") of "femur_right", "Right Femur" or "right-femur"; the side is "" where none is named."""
    words = re.split(r"[\s_-]+", name.strip("_- "))
    sides = [word.lower() for word in words if word.lower() in ("left", "right")]
    rest = " ".join(word for word in words if word.lower() not in ("left", "right"))
    return (rest, sides[0]) if len(sides) == 1 and rest else (" ".join(words), "")


def plain(category: str) -> str:
    """A category in words: lower case unless it is an abbreviation or a number of a vertebra, singular vertebra."""
    words = re.split(r"[\s_]+", category.strip())
    cased = [word if re.fullmatch(r"[A-Z]{2,}\d*|[A-Z]\d+", word) else word.lower() for word in words if word]
    name = re.sub(r"\bvertebrae (?=[CTLS]\d)", "vertebra ", " ".join(cased))
    return NAMES.get(name.lower(), name)
