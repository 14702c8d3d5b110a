"""`prepare`: measure a data set (`fingerprint`) and derive the `Plan` for training from the measurements."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from genmed.data.dataset import Case, Dataset, read_dataset
from genmed.errors import GenMedError
from genmed.files import write_bytes, write_json
from genmed.plan import NORM_GROUPS, PRESETS, Plan, patch_multiple, strides
from genmed.progress import track
from genmed.space import Space
from genmed.volume import Grid, Volume, read, read_labels, require_same_grid

THICK_RATIO = 3.0           # anisotropy above which a stack counts as thick slices
PATCH_VOXELS = 110_000      # largest patch that trains in reasonable time on a CPU
STEP_VOXELS = 180_000       # a training step takes so many, in more patches if they are small,
LARGEST_BATCH = 8           # up to this number of patches
FEWEST_VOXELS = 100         # of a patch at the coarsest level for norms of single channels, as nnU-Net has them
SAMPLES_PER_CASE = 20_000   # voxels per case and region that the intensity statistics look at

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Axes:
    """Statistics over the cases of something per axis: spacing (mm), size (voxels) or extent (mm)."""

    p10: Triple
    median: Triple
    p90: Triple
    largest: Triple


@dataclass(frozen=True)
class Intensity:
    """Statistics over sampled voxels, in the units of the files."""

    mean: float
    std: float
    p0_5: float
    median: float
    p99_5: float


@dataclass(frozen=True)
class ClassVolume:
    """Volume of one class in ml over the cases that show it."""

    cases: int
    p10: float
    median: float
    p90: float


@dataclass(frozen=True)
class Fingerprint:
    """What a data set looks like. Axes are the working grid's: RAS, for thick slices the slice axis last."""

    dataset: str
    cases: int
    labelled: int
    thick_slices: bool
    spacing_mm: Axes
    shape: Axes
    extent_mm: Axes
    whole: dict[str, Intensity]            # per channel, all voxels
    foreground: dict[str, Intensity]       # per channel, labelled voxels
    volume_ml: dict[str, ClassVolume]      # per class that occurs


def fingerprint(dataset: Dataset, cases: Sequence[str] | None = None) -> Fingerprint:
    """Read the cases with these ids (default: all training cases) and measure them."""
    chosen = list(dataset.cases) if cases is None else [dataset.case(id) for id in cases]
    if not chosen:
        raise GenMedError(f"{dataset.folder}: no cases to measure; name at least one.")
    grids: list[Grid] = []
    samples = _Samples(dataset.channels)
    volumes_ml: dict[int, list[float]] = {}
    for number, case in enumerate(track(chosen, "Measuring")):
        image, label = _read_case(case, len(dataset.channels))
        grids.append(image.grid)
        samples.add(image, label, np.random.default_rng(number))
        for value, volume_ml in _volumes_ml(label).items():
            volumes_ml.setdefault(value, []).append(volume_ml)
    thick = bool(np.median([max(g.spacing_mm) / min(g.spacing_mm) for g in grids]) > THICK_RATIO)
    spacing, shape = _working_axes(grids, thick)
    return Fingerprint(
        dataset=dataset.name,
        cases=len(chosen),
        labelled=sum(case.label is not None for case in chosen),
        thick_slices=thick,
        spacing_mm=_axes(spacing),
        shape=_axes(shape),
        extent_mm=_axes(spacing * shape),
        whole=samples.statistics("whole"),
        foreground=samples.statistics("foreground"),
        volume_ml={
            name: _class_volume(volumes_ml[value])
            for value, name in dataset.labels.items()
            if value and value in volumes_ml
        },
    )


def plan(measured: Fingerprint, dataset: Dataset, preset: str = "small", spacing: float | None = None) -> Plan:
    """The plan that follows from a fingerprint: median spacing and a patch of about the median size.

    A `spacing` in mm replaces the median, for thick slices in the plane alone. Small patches come in larger
    batches. The patch is rounded up to what the U-Net halves evenly and shortened along its longest axis until it
    holds at most `PATCH_VOXELS` voxels. Raises `GenMedError` for an unknown preset and for 2D sets.
    """
    if preset not in PRESETS:
        raise GenMedError(f"preset '{preset}' is unknown; choose one of: {', '.join(PRESETS)}.")
    if min(measured.shape.median) < 2:
        raise GenMedError(f"{dataset.folder}: holds single slices; plans need 3D scans.")
    if spacing is not None and not 0 < spacing < math.inf:
        raise GenMedError(f"--spacing {spacing:g}: must be above 0, in mm.")
    size = PRESETS[preset]
    median = measured.spacing_mm.median
    spacing_mm = median if spacing is None else (spacing, spacing, median[2] if measured.thick_slices else spacing)
    multiple = patch_multiple(strides(spacing_mm, len(size.widths)))
    patch = _patch([extent / s for extent, s in zip(measured.extent_mm.median, spacing_mm, strict=True)], multiple)
    return Plan(
        name=dataset.name,
        channels=dataset.channels,
        labels=("background", *(name for value, name in dataset.labels.items() if value)),
        label_values=tuple(dataset.labels),
        spacing_mm=spacing_mm,
        patch=patch,
        widths=size.widths,
        norm_groups=0 if math.prod(patch) >= FEWEST_VOXELS * math.prod(multiple) else NORM_GROUPS,
        batch=max(size.batch, min(LARGEST_BATCH, STEP_VOXELS // math.prod(patch))),
        steps=size.steps,
        learning_rate=size.learning_rate,
        thick_slices=measured.thick_slices,
        extent_mm=measured.extent_mm.largest,
        licence=dataset.licence,
        source=dataset.reference,
    )


def prepare(
    folder: str | Path, out: str | Path, *, preset: str = "small", cases: Sequence[str] | None = None
) -> str:
    """Measure the data set in `folder`, write `out`/fingerprint.json and `out`/plan.json, return a summary.

    Give `cases` (the ids of the training part) to keep the other parts of a split out of the plan.
    """
    dataset = read_dataset(folder)
    measured = fingerprint(dataset, cases)
    planned = plan(measured, dataset, preset)
    write_json(Path(out) / "fingerprint.json", asdict(measured))
    write_bytes(Path(out) / "plan.json", planned.to_json().encode("utf-8"))
    return summary(measured, planned)


def summary(measured: Fingerprint, planned: Plan) -> str:
    """Fingerprint and plan in a few aligned lines."""
    rows = [
        ("cases", f"{measured.cases}, {measured.labelled} with labels"),
        ("spacing", f"{_by_axis(measured.spacing_mm.median)} mm (median)"),
        ("size", f"{_by_axis(measured.shape.median)} voxels (median)"),
        ("field of view", f"{_by_axis(measured.extent_mm.largest)} mm (largest)"),
        ("thick slices", "yes, the last axis" if measured.thick_slices else "no"),
        *((f"volume {name}", f"{v.median:.3g} ml (median)") for name, v in measured.volume_ml.items()),
        ("working grid", f"{_by_axis(planned.spacing_mm)} mm"),
        ("patch", f"{_by_axis(planned.patch)} voxels, batch {planned.batch}"),
        ("network", f"widths {', '.join(map(str, planned.widths))}, {planned.steps} steps"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([planned.name, *(f"  {name:{width}}  {text}" for name, text in rows)])


class _Samples:
    """Voxels drawn from every case, per channel, from the whole image and from the labelled part."""

    def __init__(self, channels: Sequence[str]) -> None:
        self.channels = channels
        self.drawn: dict[str, list[np.ndarray]] = {"whole": [], "foreground": []}

    def add(self, image: Volume, label: Volume | None, generator: np.random.Generator) -> None:
        voxels = image.data.reshape(len(self.channels), -1)
        self.drawn["whole"].append(_draw(voxels, generator))
        if label is not None:
            self.drawn["foreground"].append(_draw(voxels[:, label.data.reshape(-1) != 0], generator))

    def statistics(self, region: str) -> dict[str, Intensity]:
        voxels = np.concatenate([np.zeros((len(self.channels), 0)), *self.drawn[region]], axis=1)
        if voxels.shape[1] == 0:
            return {}
        return {name: _intensity(values) for name, values in zip(self.channels, voxels, strict=True)}


def _draw(voxels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """At most `SAMPLES_PER_CASE` columns of (channels, voxels)."""
    if voxels.shape[1] <= SAMPLES_PER_CASE:
        return voxels
    return voxels[:, generator.integers(voxels.shape[1], size=SAMPLES_PER_CASE)]


def _intensity(values: np.ndarray) -> Intensity:
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    numbers = (values.mean(dtype=np.float64), values.std(dtype=np.float64), low, median, high)
    return Intensity(*(_rounded(number) for number in numbers))


def _read_case(case: Case, channels: int) -> tuple[Volume, Volume | None]:
    image = read(case.images, fourth_axis="channels")
    if image.data.shape[0] != channels:
        raise GenMedError(f"{case.images[0]}: {image.data.shape[0]} channels, dataset.json names {channels}.")
    if case.label is None:
        return image, None
    label = read_labels(case.label)
    require_same_grid(image, label)
    return image, label


def _volumes_ml(label: Volume | None) -> dict[int, float]:
    if label is None:
        return {}
    voxel_ml = abs(float(np.linalg.det(label.affine[:3, :3]))) / 1000
    values, counts = np.unique(label.data, return_counts=True)
    return {int(value): float(count) * voxel_ml for value, count in zip(values, counts, strict=True)}


def _class_volume(volumes_ml: list[float]) -> ClassVolume:
    p10, median, p90 = (_rounded(v) for v in np.percentile(volumes_ml, (10, 50, 90)))
    return ClassVolume(len(volumes_ml), p10, median, p90)


def _working_axes(grids: Sequence[Grid], thick: bool) -> tuple[np.ndarray, np.ndarray]:
    """Spacing in mm and shape of every case (cases, 3), in the axis order of the working grid."""
    order = [list(Space.fit(grid, grid.spacing_mm, slice_axis_last=thick).axes) for grid in grids]
    spacing = [np.array(grid.spacing_mm)[axes] for grid, axes in zip(grids, order, strict=True)]
    shape = [np.array(grid.shape)[axes] for grid, axes in zip(grids, order, strict=True)]
    return np.array(spacing, dtype=np.float64), np.array(shape, dtype=np.float64)


def _axes(values: np.ndarray) -> Axes:
    p10, median, p90 = np.percentile(values, (10, 50, 90), axis=0)
    return Axes(*(_triple(row) for row in (p10, median, p90, values.max(axis=0))))


def _triple(row: np.ndarray) -> Triple:
    x, y, z = (_rounded(value) for value in row)
    return x, y, z


def _rounded(value: float) -> float:
    """Six significant digits: float32 noise of file headers is not a measurement."""
    return float(f"{float(value):.6g}")


def _patch(sides: Sequence[float], multiple: Sequence[int]) -> tuple[int, int, int]:
    patch = [max(1, math.ceil(round(side, 3) / m)) * m for side, m in zip(sides, multiple, strict=True)]
    while math.prod(patch) > PATCH_VOXELS and any(p > m for p, m in zip(patch, multiple, strict=True)):
        _, longest = max((p, axis) for axis, p in enumerate(patch) if p > multiple[axis])
        patch[longest] -= multiple[longest]
    return patch[0], patch[1], patch[2]


def _by_axis(numbers: Sequence[float]) -> str:
    return " × ".join(f"{number:.4g}" for number in numbers)
