"""Restored images beside interpolated, denoised and histogram-matched ones: PSNR and SSIM against the true scan.

    python -m genmed.bench.restore --model hippocampus-mr --data DIR --part tune --cases 8

Compared on the model's working grid over the whole field of view, slices that were kept included; the range of PSNR
and SSIM is that of the true scan. Peers are helped: total variation has the strength, of several, that the truth
likes best, and histogram matching the histogram of the truth. A translated image has no units of its own, so all of
that table are scored after the affine intensity map that fits the truth best.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options, one_line_errors
from genmed.bench.tables import HIPPOCAMPUS_INPUTS
from genmed.data.dataset import read_dataset
from genmed.data.split import person
from genmed.degrade import Degraded
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, psnr, ssim
from genmed.plan import Plan
from genmed.space import Space
from genmed.tasks.restore import line, restore, translate
from genmed.tasks.view import between_slices
from genmed.volume import Volume, read

OURS = "GenMed"
STRENGTHS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # of total variation, in standard deviations of the noisy image

Peer = Callable[[Degraded, Plan, np.ndarray], np.ndarray]  # degraded scan, plan, truth -> image; both (c, X, Y, Z)


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


def total_variation(worse: Degraded, plan: Plan, truth: np.ndarray) -> np.ndarray:
    """The image (c, X, Y, Z) of least total variation near the noisy one (Chambolle 2004), at its best strength."""
    from skimage.restoration import denoise_tv_chambolle

    noisy = interpolated(worse, plan, 1)
    size = noisy.std(axis=(1, 2, 3), keepdims=True)
    tried = [denoise_tv_chambolle(noisy / size, weight=weight, channel_axis=0) * size for weight in STRENGTHS]
    return max(tried, key=lambda image: fidelity(image, truth).psnr)


def matched(worse: Degraded, plan: Plan, truth: np.ndarray) -> np.ndarray:
    """The image (c, X, Y, Z) under the rising map of intensities that gives it the histogram of the truth."""
    from skimage.exposure import match_histograms

    return np.asarray(match_histograms(interpolated(worse, plan, 1), truth, channel_axis=0))


def interpolation(order: int) -> Peer:
    """`interpolated`, without a look at the truth."""
    return lambda worse, plan, truth: interpolated(worse, plan, order)


class Table(NamedTuple):
    """Inputs, names of `HIPPOCAMPUS_INPUTS`, and peers of one task."""

    title: str
    inputs: tuple[str, ...]
    peers: Mapping[str, Peer]
    is_translation: bool = False


TABLES = (
    Table(
        "Restored",
        ("4 mm voxels", "8 mm voxels", "8 slices", "4 slices"),
        {"linear": interpolation(1), "cubic": interpolation(3)},
    ),
    Table(
        "Denoised",
        ("Gaussian noise 0.5",),
        {"noisy": interpolation(1), "total variation": total_variation},
    ),
    Table(
        "Translated, all after the affine map to the truth",
        ("inverted", "tent"),
        {"histogram matching": matched},
        is_translation=True,
    ),
)


def scores(
    model: Model, scan: Volume, worse: Degraded, table: Table, samples: int | None
) -> tuple[dict[str, Fidelity], float]:
    """Fidelity by method, and the seconds that GenMed took."""
    plan = model.plan
    truth = Space.fit(scan.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices).to_model(scan.data)
    task = translate if table.is_translation else restore
    result = task(model, worse.scan, samples=samples, **worse.options)
    images = {name: peer(worse, plan, truth) for name, peer in table.peers.items()} | {OURS: result.image.data}
    if table.is_translation:
        images = {name: on_scale(image, truth) for name, image in images.items()}
    return {name: fidelity(image, truth) for name, image in images.items()}, result.seconds


def on_scale(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The image (c, X, Y, Z) under the affine map of every channel that fits the truth best."""
    lines = [line(x, y) for x, y in zip(image, truth, strict=True)]
    return np.stack([slope * x + shift for (slope, shift), x in zip(lines, image, strict=True)])


def run(
    model: Model, data: Path, part: str, cases: int | None, samples: int | None, split: Path = HIPPOCAMPUS
) -> None:
    """Print the tables row by row."""
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, split, part, cases)
    people = [person(dataset.name, id) for id in chosen]
    print(f"PSNR in dB and SSIM on {len(chosen)} {part} cases, mean and 95 % interval (bootstrap by person)")
    for table in TABLES:
        titles = [f"{method} {metric}" for method in (*table.peers, OURS) for metric in ("PSNR", "SSIM")]
        print(f"\n{table.title}:\n\n| input | {' | '.join(titles)} | s per case |\n|{'---|' * (len(titles) + 2)}")
        for name in table.inputs:
            rows = []
            for id in chosen:
                scan = read(dataset.case(id).images)
                rows.append(scores(model, scan, HIPPOCAMPUS_INPUTS[name].degrade(scan, id), table, samples))
            cells = [_cells([row[method] for row, _ in rows], people) for method in (*table.peers, OURS)]
            seconds = float(np.mean([seconds for _, seconds in rows]))
            print(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def _cells(found: list[Fidelity], people: list[str]) -> str:
    """Cells of PSNR and SSIM."""
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
    with one_line_errors():
        run(load(a.model), a.data, a.part, a.cases, a.samples)


if __name__ == "__main__":
    main()
