"""Restored images beside interpolated, denoised and histogram-matched ones: PSNR and SSIM against the true scan.

    python -m genmed.bench.restore --model hippocampus-mr --data DIR --part tune --cases 8 --out OUT

Compared on the model's working grid over the whole field of view, slices that were kept included; the range of PSNR
and SSIM is that of the true scan. Peers are helped: total variation has the strength, of several, that the truth
likes best, and histogram matching the histogram of the truth. A translated image has no units of its own, so all of
that table are scored after the affine intensity map that fits the truth best. The rows of OUT/restored.csv are written
as soon as their case is finished, and a run that starts again goes on after the last one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options, one_line_errors
from genmed.bench.kept import key_of, read_rows, write_rows
from genmed.bench.tables import HIPPOCAMPUS_INPUTS
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.split import person
from genmed.degrade import Degraded
from genmed.files import write_bytes
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, psnr, ssim
from genmed.plan import Plan
from genmed.progress import track
from genmed.space import Space
from genmed.tasks.restore import SAMPLES, line, restore, translate
from genmed.tasks.segment import STEPS, TRAVELS
from genmed.tasks.view import between_slices
from genmed.volume import Volume, read

OURS = "GenMed"
CASES, TABLE = "restored.csv", "table.md"
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


class Row(NamedTuple):
    """One case of one input by one method. `key` names weights and settings; only ours is timed, NaN otherwise."""

    input: str
    case: str
    method: str
    key: str
    psnr: float
    ssim: float
    seconds: float


Rows = dict[tuple[str, str], list[Row]]  # by input and case


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
    model: Model, scan: Volume, worse: Degraded, table: Table, samples: int
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
    model: Model, data: Path, out: Path, *,
    part: str = "tune", cases: int | None = None, samples: int = SAMPLES, split: Path = HIPPOCAMPUS,
) -> str:  # fmt: skip
    """Restore what is not finished, print the tables and write them to `out`, with a row per case and method.

    Args:
        cases: so many evenly spread cases of the part; default all.
        samples: drawn per case and averaged.

    Returns:
        The tables in Markdown.
    """
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, split, part, cases)
    rows = evaluate(model, dataset, chosen, samples, out)
    text = report(rows, {id: person(dataset.name, id) for id in chosen}, part)
    write_bytes(out / TABLE, text.encode("utf-8"))
    print(text)
    return text


def evaluate(model: Model, dataset: Dataset, chosen: Sequence[str], samples: int, out: Path) -> Rows:
    """Rows of all inputs and cases; those that are there for the same weights and settings are kept."""
    wanted = {(name, id): table for table in TABLES for name in table.inputs for id in chosen}
    keys = {place: settings_key(model, place[0], table, samples) for place, table in wanted.items()}
    rows: Rows = {}
    for row in read_rows(out / CASES, Row):
        place = row.input, row.case
        if keys.get(place, row.key) == row.key:
            rows.setdefault(place, []).append(row)
    for place in track([place for place in wanted if place not in rows], "Restoring"):
        name, id = place
        scan = read(dataset.case(id).images)
        found, seconds = scores(model, scan, HIPPOCAMPUS_INPUTS[name].degrade(scan, id), wanted[place], samples)
        rows[place] = [
            Row(name, id, method, keys[place], *each, seconds if method == OURS else math.nan)
            for method, each in found.items()
        ]
        write_rows(out / CASES, Row, chain.from_iterable(rows.values()))
    return {place: rows[place] for place in wanted}


def settings_key(model: Model, name: str, table: Table, samples: int) -> str:
    """`key_of` what decides the rows of an input besides the case."""
    changes = [str(change) for change in HIPPOCAMPUS_INPUTS[name].changes]
    ours = model.sha256, list(model.plan.typical), samples, STEPS, TRAVELS
    return key_of(ours, changes, table.is_translation, list(table.peers), STRENGTHS)


def report(rows: Rows, people: Mapping[str, str], part: str) -> str:
    """The tables in Markdown; `people`: whom each case belongs to."""
    lines = [f"PSNR in dB and SSIM on {len(people)} {part} cases, mean and 95 % interval (bootstrap by person)"]
    for table in TABLES:
        methods = (*table.peers, OURS)
        titles = [f"{method} {metric}" for method in methods for metric in ("PSNR", "SSIM")]
        lines += ["", f"{table.title}:", "", f"| input | {' | '.join(titles)} | s per case |"]
        lines.append("|---" * (len(titles) + 2) + "|")
        for name in table.inputs:
            mine = {method: [row for id in people for row in rows[name, id] if row.method == method]
                    for method in methods}  # fmt: skip
            cells = [_cells(of, list(people.values())) for of in mine.values()]
            seconds = np.mean([row.seconds for row in mine[OURS]])
            lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def _cells(rows: Sequence[Row], people: Sequence[str]) -> str:
    """Cells of PSNR and SSIM."""
    cells = []
    for values, n in (([row.psnr for row in rows], 2), ([row.ssim for row in rows], 3)):
        low, high = bootstrap_interval(values, groups=people)
        cells.append(f"{np.mean(values):.{n}f} ({low:.{n}f} to {high:.{n}f})")
    return " | ".join(cells)


def main() -> None:
    """Parse the command line."""
    parser = hippocampus_options("Restored hippocampus scans.")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="guided samples per case (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables; run again to go on")
    a = parser.parse_args()
    with one_line_errors():
        run(load(a.model), a.data, a.out, part=a.part, cases=a.cases, samples=a.samples)


if __name__ == "__main__":
    main()
