"""A data set of ellipsoids in three categories, and a model of them, small enough for tests."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from genmed.data.shapes import ShapeRow
from genmed.shape import MARGIN, encode

SIZE = 16
RADII = {"kidney": (0.5, 0.6, 1.0), "femur": (0.25, 0.25, 1.0), "spleen": (1.0, 0.8, 0.4)}
EXTENT_MM = {"kidney": 110.0, "femur": 420.0, "spleen": 120.0}


def ellipsoid_distance(radii: np.ndarray, points: np.ndarray) -> np.ndarray:
    """About the signed distance: exact where it is zero, of slope 1 there."""
    k0, k1 = np.linalg.norm(points / radii, axis=-1), np.linalg.norm(points / radii**2, axis=-1)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-9) - (k0 < 1e-9) * radii.min()


def ellipsoid(radii_mm: np.ndarray, size: int = SIZE) -> tuple[np.ndarray, float]:
    """Stored distances in the cube of an ellipsoid, and the cube's voxel."""
    voxel_mm = MARGIN * 2 * float(radii_mm.max()) / size
    axis = np.arange(size) - (size - 1) / 2
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1) * voxel_mm
    return encode(ellipsoid_distance(radii_mm, points) / voxel_mm), voxel_mm


def write_shapes(folder: Path, count: int = 10) -> Path:
    """`count` training shapes and one tuning shape of every category, one of each without a scale."""
    rng = np.random.default_rng(0)
    rows, stored = [], []
    for category, radii in RADII.items():
        for number in range(count + 1):
            radii_mm = np.array(radii) * np.exp(rng.normal(0, 0.12, 3)) * EXTENT_MM[category] / 2
            sdf, voxel_mm = ellipsoid(radii_mm)
            extent = 2 * float(radii_mm.max())
            scaled = number > 0
            size = "large" if extent > EXTENT_MM[category] else "small"
            row = ShapeRow(
                id=f"{category}-{number}", category=category, side="left", subject=f"s{number}", source="made",
                licence="CC0", path="", part="train" if number < count else "tune",
                captions=(f"left {category}", f"{size} {category}"), held_out_captions=(f"somebody's {category}",),
                volume_ml=1.0, extent_mm=extent if scaled else None, elongation=1.0, flatness=1.0,
                voxel_mm=voxel_mm if scaled else 1.0, origin_mm=(0.0, 0.0, 0.0), flag="", facts={},
                shard="0000.npy", row=len(rows),
            )  # fmt: skip
            rows.append(row)
            stored.append(sdf)
    (folder / "shards").mkdir(parents=True)
    np.save(folder / "shards" / "0000.npy", np.stack(stored))
    lines = [{**asdict(row), "facts": json.dumps(row.facts)} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "index.parquet")
    return folder
