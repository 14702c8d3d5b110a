"""`read_shapes`: a folder that `genmed data build-shapes` made, as shapes with captions and facts.

    shapes = read_shapes("shapes-64")
    for i in shapes.part("train"):
        shapes.sdf(i), shapes.rows[i].captions
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int8

from genmed.errors import GenMedError
from genmed.mesh import Mesh, require_libraries
from genmed.shape import Shape, decode

INDEX, SHARDS = "index.parquet", "shards"


@dataclass(frozen=True)
class ShapeRow:
    """One line of the index.

    `path` is that of the file below its source folder. `part` is train, tune, report or unseen. `volume_ml` and
    `extent_mm` are None where the source has no scale, and `voxel_mm` and `origin_mm` are then in its voxels.
    `flag` says what is odd about a shape that was kept. `facts` are what was found: name -> "yes", "no" or a
    number. `shard` and `row` say where the distances are.
    """

    id: str
    category: str
    side: str
    subject: str
    source: str
    licence: str
    path: str
    part: str
    captions: tuple[str, ...]
    held_out_captions: tuple[str, ...]
    volume_ml: float | None
    extent_mm: float | None
    elongation: float
    flatness: float
    voxel_mm: float
    origin_mm: tuple[float, float, float]
    flag: str
    facts: dict[str, str]
    shard: str
    row: int


@dataclass(frozen=True, eq=False)
class ShapeDataset:
    """Shapes on disk; distances are mapped into memory, not read."""

    folder: Path
    size: int
    rows: tuple[ShapeRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids, in the order of the rows."""
        return tuple(row.id for row in self.rows)

    def part(self, name: str) -> tuple[int, ...]:
        """Numbers of the shapes in a part: train, tune, report or unseen."""
        return tuple(number for number, row in enumerate(self.rows) if row.part == name)

    def stored(self, i: int) -> Int8[np.ndarray, "n n n"]:
        """Truncated distance as stored: multiples of 4/127 voxels, negative inside; a view of the file."""
        row = self.rows[i]
        return _shard(self.folder / SHARDS / row.shard)[row.row]

    def sdf(self, i: int) -> Float[np.ndarray, "n n n"]:
        """Truncated signed distance in voxels, float32, negative inside."""
        return decode(self.stored(i))

    def shape(self, i: int) -> Shape:
        """The shape with its place and scale."""
        row = self.rows[i]
        return Shape(self.stored(i), row.voxel_mm, row.origin_mm)

    def to_mesh(self, i: int) -> Mesh:
        """Its surface in the mm of its source."""
        return self.shape(i).to_mesh()


@lru_cache(maxsize=64)
def _shard(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GenMedError(f"{path}: cannot be read ({error}); build the shapes again.") from error


def read_shapes(folder: str | Path) -> ShapeDataset:
    """Open a data set of shapes. Raises `GenMedError` for a folder that holds none, or an unfinished one."""
    require_libraries()
    import pyarrow
    import pyarrow.parquet

    folder = Path(folder).expanduser()
    path = folder / INDEX
    if not path.is_file():
        raise GenMedError(f"{folder}: holds no {INDEX}; build it with `genmed data build-shapes`.")
    try:
        lines = pyarrow.parquet.read_table(path).to_pylist()
        rows = tuple(_row(line) for line in lines)
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise GenMedError(f"{path}: not an index of shapes ({why}); build the shapes again.") from error
    if not rows:
        raise GenMedError(f"{path}: lists no shapes; build the shapes again.")
    return ShapeDataset(folder, len(_shard(folder / SHARDS / rows[0].shard)[0]), rows)


def _row(line: dict[str, Any]) -> ShapeRow:
    listed = {name: tuple(line[name]) for name in ("captions", "held_out_captions", "origin_mm")}
    plain = {field.name: line[field.name] for field in fields(ShapeRow)}
    return ShapeRow(**{**plain, **listed, "facts": json.loads(line["facts"])})
