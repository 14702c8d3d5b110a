"""Peak memory of `genmed segment` on a large scan, with a small untrained model, in a process of its own.

    python -m genmed.bench.memory [--shape 512 512 400]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genmed.hub import Card, save_model
from genmed.plan import PRESETS, Plan
from genmed.volume import Volume

LIMIT_GB = 6.0
SEGMENT = "from genmed.cli import main; main()"


def run(shape: Sequence[int] = (512, 512, 400), labels: int = 3) -> tuple[float, float]:
    """Segment a synthetic int16 scan in conditional mode; returns peak resident GB and minutes, reading and
    writing included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan, model, out = folder / "scan.nii.gz", folder / "model", folder / "out.nii.gz"
        synthetic_scan(shape).save(scan)
        write_model(model, shape, labels)
        started = time.monotonic()
        command = [sys.executable, "-c", SEGMENT, "segment", str(scan), "--model", str(model)]
        subprocess.run([*command, "--out", str(out), "--mode", "conditional"], check=True)
        minutes = (time.monotonic() - started) / 60
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, minutes


def synthetic_scan(shape: Sequence[int]) -> Volume:
    """Noise in CT numbers, 1 mm voxels; made slice by slice, since a child's peak is counted from ours."""
    rng = np.random.default_rng(0)
    data = np.empty((1, *shape), dtype=np.int16)
    for part in data[0]:
        part[...] = rng.integers(-1000, 1000, part.shape, dtype=np.int16)
    return Volume(data, np.eye(4))


def write_model(folder: Path, shape: Sequence[int], labels: int) -> None:
    """An untrained model of the small preset that believes to have seen scans of this size."""
    from genmed.denoiser import build

    names = ("background", *(f"structure {number}" for number in range(1, labels)))
    x, y, z = (float(n) for n in shape)
    small = PRESETS["small"]
    plan = Plan(
        name="memory", channels=("CT",), labels=names, label_values=tuple(range(labels)),
        spacing_mm=(1.0, 1.0, 1.0), patch=(48, 48, 48), widths=small.widths, batch=small.batch,
        steps=small.steps, learning_rate=small.learning_rate, thick_slices=False, extent_mm=(x, y, z),
    )  # fmt: skip
    card = Card(name="memory", licence="Apache-2.0", training_data="none")
    save_model(folder, plan, build(plan).state_dict(), card)


def main() -> int:
    """Print peak and minutes; exit code 1 above the limit."""
    parser = argparse.ArgumentParser(description="Measure the peak memory of segmenting a large scan.")
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 400), metavar=("X", "Y", "Z"))
    parser.add_argument("--labels", type=int, default=3, help="classes, background included")
    a = parser.parse_args()
    peak_gb, minutes = run(a.shape, a.labels)
    size = " × ".join(map(str, a.shape))
    print(f"{size} voxels, {a.labels} classes: peak {peak_gb:.2f} GB (limit {LIMIT_GB:g}), {minutes:.1f} min")
    return int(peak_gb > LIMIT_GB)


if __name__ == "__main__":
    sys.exit(main())
