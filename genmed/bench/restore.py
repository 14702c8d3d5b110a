"""Restored images beside interpolated ones on a fixed split: PSNR and SSIM against the scan before it was degraded.

    python -m genmed.bench.restore --model hippocampus-mr --data DIR --part tune --cases 8

Compared on the model's working grid over the whole field of view, slices that were kept included; the range of PSNR
and SSIM is that of the true scan. A translated image has no units of its own, so the row of the inverted contrast is
scored after the affine intensity map that fits the truth best; plain interpolation has nothing to do there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options
from genmed.data.dataset import read_dataset
from genmed.data.split import person
from genmed.degrade import Degraded, coarser, inverted, keep_slices
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, psnr, ssim
from genmed.plan import Plan
from genmed.space import Space
from genmed.tasks.restore import line, restore, translate
from genmed.tasks.view import between_slices
from genmed.volume import Volume, read

ROWS: dict[str, Callable[[Volume], Degraded]] = {
    "4 mm voxels": lambda scan: coarser(scan, 4),
    "8 mm voxels": lambda scan: coarser(scan, 8),
    "8 slices": lambda scan: keep_slices(scan, 8, axis=1),
    "4 slices": lambda scan: keep_slices(scan, 4, axis=1),
}
TRANSLATED = {"inverted contrast, affine map to the truth": inverted}
ORDERS = {"linear": 1, "cubic": 3}
METHODS = (*ORDERS, "GenMed")


class Fidelity(NamedTuple):
    """PSNR in dB and SSIM of one image, averaged over its channels."""

    psnr: float
    ssim: float


def fidelity(found: np.ndarray, truth: np.ndarray) -> Fidelity:
    """Compare images (c, x, y, z)."""
    ranges = [float(np.ptp(channel)) for channel in truth]
    pairs = list(zip(found, truth, ranges, strict=True))
    return Fidelity(float(np.mean([psnr(*pair) for pair in pairs])), float(np.mean([ssim(*pair) for pair in pairs])))


def interpolated(worse: Degraded, plan: Plan, order: int) -> np.ndarray:
    """(c, X, Y, Z) on the working grid by splines of `order`, through voxel centres or through the kept slices."""
    space = Space.fit(worse.scan.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices)
    if worse.observed is not None:
        return space.to_model(between_slices(worse.scan.data, worse.seen, order))
    from scipy.ndimage import zoom

    factors = [m / n for m, n in zip(space.model.shape, space.oriented, strict=True)]
    channels = space.orient(worse.scan.data).astype(np.float32)
    return np.stack([zoom(channel, factors, order=order, mode="nearest", grid_mode=True) for channel in channels])


def scores(
    model: Model, scan: Volume, degrade: Callable[[Volume], Degraded], samples: int | None, is_translation: bool
) -> tuple[dict[str, Fidelity], float]:
    """Fidelity by method, and the seconds that GenMed took."""
    plan, worse = model.plan, degrade(scan)
    truth = Space.fit(scan.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices).to_model(scan.data)
    result = (translate if is_translation else restore)(model, worse.scan, samples=samples, **worse.options)
    image, found = result.image.data, {}
    if is_translation:
        lines = [line(x, y) for x, y in zip(image, truth, strict=True)]
        image = np.stack([slope * x + shift for (slope, shift), x in zip(lines, image, strict=True)])
    else:
        found = {name: fidelity(interpolated(worse, plan, order), truth) for name, order in ORDERS.items()}
    return found | {"GenMed": fidelity(image, truth)}, result.seconds


def run(model: Model, data: Path, part: str, cases: int | None, samples: int | None) -> None:
    """Print the table row by row."""
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, HIPPOCAMPUS, part, cases)
    people = [person(dataset.name, id) for id in chosen]
    print(f"PSNR in dB and SSIM on {len(chosen)} {part} cases, mean and 95 % interval (bootstrap by person)\n")
    titles = [f"{method} {metric}" for method in METHODS for metric in ("PSNR", "SSIM")]
    print(f"| input | {' | '.join(titles)} | s per case |\n|{'---|' * (len(titles) + 2)}", flush=True)
    for name, degrade in (ROWS | TRANSLATED).items():
        rows = [
            scores(model, read(dataset.case(id).images), degrade, samples, name in TRANSLATED) for id in chosen
        ]
        cells = [_cells([row[method] for row, _ in rows if method in row], people) for method in METHODS]
        seconds = float(np.mean([seconds for _, seconds in rows]))
        print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def _cells(found: list[Fidelity], people: list[str]) -> str:
    """Cells of PSNR and SSIM; dashes where a method has nothing to do."""
    if not found:
        return "– | –"
    means, digits = np.mean(found, axis=0), (2, 3)
    intervals = [bootstrap_interval(values, groups=people) for values in zip(*found, strict=True)]
    return " | ".join(
        f"{mean:.{n}f} ({low:.{n}f} to {high:.{n}f})"
        for mean, (low, high), n in zip(means, intervals, digits, strict=True)
    )


def main() -> None:
    """Parse the command line."""
    parser = hippocampus_options("Restored hippocampus scans.")
    parser.add_argument("--samples", type=int, help="guided samples per case; default that of restore")
    a = parser.parse_args()
    run(load(a.model), a.data, a.part, a.cases, a.samples)


if __name__ == "__main__":
    main()
