"""One shape from one `Item`: read, check, make a signed distance, and store it as a small file of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int8

from genmed.data.shapes.sources import Item
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.mesh import MESH_SUFFIXES, read_mesh, repair
from genmed.shape import Measures, Shape, measure, shape_of, surface_of
from genmed.volume import read_labels

COARSE = 8  # side of the small copy of a shape by which near duplicates are looked for
SMALL_ORGAN = 0.05  # of the larger one: below this the second piece of a pair is no organ
FINDING_ML = 0.05  # less of a tumour or cyst is an artefact of resampling


@dataclass(frozen=True, eq=False)
class Built:
    """What became of an item: a shape with its measures and facts, or the reason why there is none."""

    reason: str = ""
    shape: Shape | None = None
    measures: Measures | None = None
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def build(item: Item, size: int, unit: str = "mm") -> Built:
    """Make the shape of an item. Whatever is wrong with it becomes its reason; nothing is raised."""
    try:
        if item.path.suffix.lower() in MESH_SUFFIXES:
            mesh, notes = repair(read_mesh(item.path, unit))
            facts = item.facts
        else:
            mask, labels, affine = mask_of(item)
            mesh, notes = surface_of(mask, affine), ()
            facts = item.facts + _findings(item, labels[mask], abs(float(np.linalg.det(affine[:3, :3]))))
        shape = shape_of(mesh, size)
        return Built(shape=shape, measures=measure(shape, mesh), facts=facts, notes=notes)
    except GenMedError as error:
        return Built(reason=str(error).removeprefix(f"{item.path}: ").replace(str(item.path), item.place))
    except Exception as error:  # one bad file must not stop a hundred thousand
        what = " ".join(str(error).split()).replace(str(item.path), item.place)
        return Built(reason=f"{type(error).__name__}: {what}")


# Label maps -----------------------------------------------------------------------------------------------


def mask_of(item: Item) -> tuple[Bool[np.ndarray, "x y z"], np.ndarray, np.ndarray]:
    """The voxels of the shape, the label map and its affine. Without a scale, voxels are 1."""
    if item.array:
        labels, affine = _arrays(item.path, item.array)[item.index], np.eye(4)
    else:
        labels, affine = _labels(item.path)
    mask = reduce(np.logical_or, [labels == value for value in item.values]) if item.values else labels != 0
    return _one_of_two(mask, affine, item) if item.both else mask, labels, affine


@lru_cache(maxsize=1)
def _labels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    volume = read_labels(path)
    return volume.data[0], volume.affine


@lru_cache(maxsize=1)
def _arrays(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        if name not in arrays:
            raise GenMedError(f"{path}: has no array '{name}'; correct index.csv.")
        return np.asarray(arrays[name])


def _one_of_two(mask: np.ndarray, affine: np.ndarray, item: Item) -> np.ndarray:
    """The left or right organ of a pair: its two largest pieces, or the one there is by the middle of the volume.

    Smaller pieces go to the nearer of the two.
    """
    from scipy.ndimage import label

    pieces, count = label(mask, np.ones((3, 3, 3)))
    if count == 0:
        return mask
    places, piece_of = np.argwhere(mask), pieces[mask] - 1
    sizes = np.bincount(piece_of)
    centres = np.stack([np.bincount(piece_of, places[:, k]) for k in range(3)], axis=1) / sizes[:, None]
    right_mm = centres @ affine[0, :3] + affine[0, 3]  # RAS+: x grows to the right
    first, *others = np.argsort(sizes)[::-1]
    if others and sizes[others[0]] >= SMALL_ORGAN * sizes[first]:
        middle_mm = (right_mm[first] + right_mm[others[0]]) / 2
    else:
        middle_mm = affine[0, :3] @ (np.array(mask.shape) - 1) / 2 + affine[0, 3]
        if (right_mm[first] > middle_mm) != (item.side == "right"):
            raise GenMedError(f"there is no {item.side} {item.category}.")
        return mask
    chosen = np.flatnonzero((right_mm > middle_mm) == (item.side == "right")) + 1
    return np.isin(pieces, chosen)


def _findings(item: Item, labels: np.ndarray, voxel_mm3: float) -> tuple[tuple[str, str], ...]:
    """For each part that may be there: yes or no, and its volume."""
    facts = []
    for name, value in item.parts:
        volume_ml = int((labels == value).sum()) * voxel_mm3 / 1000
        facts += [(name, "yes" if volume_ml >= FINDING_ML else "no"), (f"{name}_ml", f"{volume_ml:.3f}")]
    return tuple(facts)


# Records --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Record:
    """A finished item on disk. `digest` is of the stored distances; `coarse` is a small copy of them."""

    path: Path
    reason: str
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    measures: Measures | None = None
    voxel_mm: float = 0.0
    origin_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    digest: str = ""
    coarse: Int8[np.ndarray, " m"] | None = None

    def sdf(self) -> Int8[np.ndarray, "n n n"]:
        """The stored distances."""
        with np.load(self.path, allow_pickle=False) as content:
            return np.asarray(content["sdf"])


def record_path(work: Path, item: Item, size: int, unit: str) -> Path:
    """Where an item's record lies: named after everything that its content depends on, the file's date included."""
    try:
        status = os.stat(item.path)
        version = (status.st_size, status.st_mtime_ns)
    except OSError:
        version = (0, 0)
    key = hashlib.sha256(repr((astuple(item), size, unit, version)).encode()).hexdigest()[:24]
    return work / key[:2] / f"{key}.npz"


def write_record(path: Path, built: Built) -> None:
    """Store the outcome of an item, whole or not at all."""
    content: dict[str, Any] = {"reason": built.reason, "notes": built.notes, "facts": built.facts}
    arrays: dict[str, Any] = {}
    if built.shape is not None and built.measures is not None:
        sdf = built.shape.sdf
        content |= {
            "measures": asdict(built.measures),
            "voxel_mm": built.shape.voxel_mm,
            "origin_mm": built.shape.origin_mm,
            "digest": hashlib.sha256(sdf.tobytes()).hexdigest(),
        }
        block = len(sdf) // COARSE
        coarse = sdf.reshape(COARSE, block, COARSE, block, COARSE, block).mean(axis=(1, 3, 5))
        arrays = {"sdf": sdf, "coarse": np.rint(coarse).astype(np.int8).ravel()}
    stream = io.BytesIO()
    np.savez_compressed(stream, facts=np.array(json.dumps(content)), **arrays)
    write_bytes(path, stream.getvalue())


def read_record(path: Path) -> Record:
    """Read a record, all but the distances themselves."""
    with np.load(path, allow_pickle=False) as content:
        facts = json.loads(str(content["facts"]))
        coarse = np.asarray(content["coarse"]) if "coarse" in content else None
    measures = Measures(**facts["measures"]) if "measures" in facts else None
    return Record(
        path=path,
        reason=facts["reason"],
        notes=tuple(facts["notes"]),
        facts=tuple((name, value) for name, value in facts["facts"]),
        measures=measures,
        voxel_mm=facts.get("voxel_mm", 0.0),
        origin_mm=tuple(facts.get("origin_mm", (0.0, 0.0, 0.0))),
        digest=facts.get("digest", ""),
        coarse=coarse,
    )
