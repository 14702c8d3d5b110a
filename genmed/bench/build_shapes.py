"""How many shapes a core builds in a second, and what that means for a large collection.

    python -m genmed.bench.build_shapes [--size 64] [SOURCE …]

Without sources: surfaces and a label map made here. One process, files read and records written included; seconds
are those of the processor, so that other work on the machine does not count, beside those of the clock.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from genmed.data.shapes.items import build, write_record
from genmed.data.shapes.sources import Item, find_items
from genmed.mesh import MESH_SUFFIXES, Mesh, save_mesh

LIMIT = 1.0             # shapes a second on a core
COLLECTION = 68_700     # text–shape pairs of the GenMed paper (arXiv 2605.10645)
FACES = (5_000, 20_000, 80_000, 1_300_000)
STRUCTURES = 12         # in the label map of 160³ voxels
PER_KIND = 12           # items timed of each source


def timed(items: Sequence[Item], size: int, work: Path) -> tuple[float, float, int]:
    """Seconds of processor and clock for one shape, after a warm-up on the first, and how many were left out."""
    build(items[0], size)
    failed, started = 0, (time.process_time(), time.perf_counter())
    for number, item in enumerate(items):
        made = build(item, size)
        failed += bool(made.reason)
        write_record(work / f"{number}.npz", made)
    cpu, clock = time.process_time() - started[0], time.perf_counter() - started[1]
    return cpu / len(items), clock / len(items), failed


def made_here(folder: Path) -> dict[str, list[Item]]:
    """Bumpy balls of several numbers of faces, and the same as structures of a label map."""
    kinds: dict[str, list[Item]] = {}
    for faces in FACES:
        count = PER_KIND if faces < 1_000_000 else 2
        paths = [save_mesh(bumpy(faces, seed), folder / f"{faces}" / f"{seed:06d}_organ.stl") for seed in range(count)]
        kinds[f"surfaces of {faces:,} faces"] = [Item("made here", path, "organ", "", path.stem) for path in paths]
    path = folder / "labels.nii.gz"
    nib.Nifti1Image(label_map(), np.diag([0.8, 0.8, 1.2, 1.0])).to_filename(path)
    kinds["classes of a 160³ label map"] = [
        Item("made here", path, f"organ {value}", "", "p", values=(value,)) for value in range(1, STRUCTURES + 1)
    ]
    return kinds


def bumpy(faces: int, seed: int) -> Mesh:
    """A ball of 60 mm with a few smooth bumps, at about this many faces."""
    import trimesh

    detail = round(np.log(faces / 20) / np.log(4))
    ball = trimesh.creation.icosphere(detail)
    directions = np.asarray(ball.vertices)
    return Mesh(60 * relief(directions, seed)[:, None] * directions, np.asarray(ball.faces))


def relief(directions: np.ndarray, seed: int) -> np.ndarray:
    """Relative radius by direction."""
    waves = np.random.default_rng(seed).normal(0, 2.5, (6, 3))
    return 1 + 0.08 * np.cos(directions @ waves.T).sum(axis=1) / 2


def label_map() -> np.ndarray:
    """Bumpy balls of 22 voxels in a lattice of 3 × 2 × 2."""
    labels = np.zeros((160, 160, 160), np.uint8)
    index = np.stack(np.meshgrid(*[np.arange(-26, 26)] * 3, indexing="ij"), axis=-1)
    distance = np.linalg.norm(index, axis=-1)
    directions = index / np.maximum(distance, 1)[..., None]
    for value in range(1, STRUCTURES + 1):
        x, y, z = (value - 1) % 3, (value - 1) // 3 % 2, (value - 1) // 6
        radius = 22 * relief(directions.reshape(-1, 3), value).reshape(distance.shape)
        corner = (2 + 52 * x, 2 + 52 * y, 2 + 52 * z)
        labels[tuple(slice(c, c + 52) for c in corner)][distance < radius] = value
    return labels


def from_sources(sources: Sequence[str]) -> dict[str, list[Item]]:
    """A few items of each source and kind of file, spread over it."""
    kinds: dict[str, list[Item]] = defaultdict(list)
    for source in sources:
        for item in find_items(source).items:
            what = "surfaces" if item.path.suffix.lower() in MESH_SUFFIXES else "label maps"
            kinds[f"{item.source}, {what}"].append(item)
    return {name: items[:: max(1, len(items) // PER_KIND)][:PER_KIND] for name, items in kinds.items()}


def main() -> int:
    """Print the table; exit code 1 where a kind of ordinary size is slower than one shape a second."""
    parser = argparse.ArgumentParser(description="Measure the building of shapes.")
    parser.add_argument("sources", nargs="*", help="data set folders; default: surfaces and a label map made here")
    parser.add_argument("--size", type=int, default=64)
    a = parser.parse_args()
    slow = False
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {a.size}³ voxels")
    print(f"{'':36}  cpu s  clock s  shapes/s/core  hours for {COLLECTION:,} on 1 / 16 cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, items in (from_sources(a.sources) if a.sources else made_here(folder)).items():
            cpu, clock, failed = timed(items, a.size, folder / "work")
            hours = COLLECTION * cpu / 3600
            note = f"  ({failed} of {len(items)} left out)" if failed else ""
            print(f"{kind:36}  {cpu:5.2f}  {clock:7.2f}  {1 / cpu:13.1f}  {hours:10.1f} / {hours / 16:.1f}{note}")
            slow |= 1 / cpu < LIMIT and "1,300,000" not in kind
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
