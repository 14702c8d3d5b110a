"""`segment_files`: segment a file, a DICOM folder or a folder of cases, and write the results.

A case counts as finished once its label map is on disk and in statistics.json. A run that starts again skips
cases that were finished with the same weights, settings and input. Every file appears whole or not at all.
"""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from genmed.errors import GenMedError
from genmed.files import sha256_of, write_json
from genmed.hub import Model
from genmed.plan import Plan
from genmed.tasks.inputs import ScanCase, find_cases, stem
from genmed.tasks.preview import save_preview
from genmed.tasks.segment import MATCHES, MODES, Progress, Segmentation, segment
from genmed.volume import Grid, Volume, read

CHOICES = {"mode": MODES, "match": ("auto", *MATCHES), "grid": ("input", "model")}
Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Options:
    """How to segment, in the words of the command line. Raises `GenMedError` for values that cannot be."""

    mode: str = "auto"
    match: str = "auto"
    samples: int | None = None
    seed: int = 0
    grid: str = "input"
    roi_mm: Box | None = None
    observed: Path | None = None  # a mask, or a folder of masks <case>.nii.gz
    slice_thickness_mm: float | None = None
    series: str | None = None
    probabilities: bool = False
    preview: bool = False

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise GenMedError(
                    f"--{key} {getattr(self, key)}: unknown; choose one of {', '.join(choices)}."
                )
        if self.samples is not None and self.samples < 1:
            raise GenMedError(f"--samples {self.samples}: must be 1 or more.")
        if self.seed < 0:
            raise GenMedError(f"--seed {self.seed}: must be 0 or more.")
        if self.slice_thickness_mm is not None and not 0 < self.slice_thickness_mm < float("inf"):
            raise GenMedError(f"--slice-thickness {self.slice_thickness_mm}: must be above 0 mm.")
        if self.observed is not None and not self.observed.exists():
            raise GenMedError(f"{self.observed}: no such mask or folder; check --observed.")


@dataclass
class Outcome:
    """What a run did: case ids, and reasons for those that failed."""

    statistics: dict[str, Any]
    manifest: dict[str, Any]
    outputs: dict[str, Path]
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def segment_files(
    model: Model, source: str | Path, out: str | Path, options: Options | None = None, *, command: str = ""
) -> Outcome:
    """Segment everything at `source` and write to `out`, a .nii.gz file or a folder.

    In a folder of cases a broken case is noted in `Outcome.failed` and the others go on; one scan alone
    raises, and so does a full disk.
    """
    options = options or Options()
    source, out = Path(source), Path(out)
    cases, several = find_cases(source, len(model.plan.channels), options.series)
    target = _Target.of(out, cases, source, several)
    record = _Record(target, model, options, command)
    outcome = Outcome(record.statistics, record.manifest, {case.id: target.labels(case.id) for case in cases})
    with _bar(len(cases)) as advance:
        for number, case in enumerate(cases):
            try:
                finished = _segment_case(model, case, target, record, options, partial(advance, number))
            except Exception as error:
                if not several or _is_disk_full(error):
                    raise
                outcome.failed[case.id] = _reason(error)
                record.fail(case.id, outcome.failed[case.id])
            else:
                (outcome.done if finished else outcome.skipped).append(case.id)
            advance(number + 1)
    return outcome


def _segment_case(
    model: Model, case: ScanCase, target: _Target, record: _Record, options: Options, progress: Progress
) -> bool:
    """Segment and write one case; False if it was finished before."""
    mask = _mask_of(options.observed, case.id)
    digest = sha256_of(*case.files, *([mask] if mask else []))
    if target.folder is not None and record.is_finished(case.id, digest):
        return False
    scan = case.read(len(model.plan.channels), finite=mask is None, series=options.series)
    observed = read(mask) if mask else None
    result = segment(
        model,
        scan,
        mode=options.mode,
        match=options.match,
        samples=options.samples,
        seed=options.seed,
        grid=options.grid,
        observed=observed,
        slice_thickness_mm=options.slice_thickness_mm,
        roi_mm=options.roi_mm,
        progress=progress,
    )
    shown = _on_grid(_only_observed(scan, observed), result.labels.grid)
    if options.probabilities:
        _probabilities(result, case.id).save(target.beside(case.id, "probabilities.nii.gz"))
    if options.preview:
        save_preview(shown, result.labels, target.beside(case.id, "preview.png"))
    result.labels.save(target.labels(case.id))
    record.add(case, digest, result, measure(result, shown, model.plan))
    return True


def measure(result: Segmentation, image: np.ndarray, plan: Plan) -> dict[str, Any]:
    """Per structure: ml and voxels of the label map, mean intensity (per channel) of its observed voxels.

    `image` is (c, x, y, z) on the label map's grid, NaN where nothing was observed. With several samples,
    `ml_expected` and `ml_interval` tell how sure the volume is.
    """
    labels = result.labels.data[0]
    voxel_ml = abs(float(np.linalg.det(result.labels.affine[:3, :3]))) / 1000
    size = max(int(labels.max(initial=0)), *plan.label_values) + 1
    voxels = np.zeros(size, dtype=np.int64)
    sums, seen = np.zeros((len(image), size)), np.zeros((len(image), size), dtype=np.int64)
    for x, slab in enumerate(labels):  # slab by slab: no second copy of a large scan
        flat = slab.ravel()
        voxels += np.bincount(flat, minlength=size)
        for channel, values in enumerate(image[:, x].reshape(len(image), -1)):
            known = np.isfinite(values)
            sums[channel] += np.bincount(flat[known], weights=values[known], minlength=size)
            seen[channel] += np.bincount(flat[known], minlength=size)
    table = {}
    for value, name in list(zip(plan.label_values, plan.labels, strict=True))[1:]:
        means = [float(s[value] / n[value]) if n[value] else None for s, n in zip(sums, seen, strict=True)]
        row: dict[str, Any] = {"ml": float(voxels[value] * voxel_ml), "voxels": int(voxels[value])}
        row["mean_intensity"] = means[0] if len(means) == 1 else means
        if name in result.volume_ml:
            interval = result.volume_ml[name]
            row |= {
                "ml_expected": float(interval.mean),
                "ml_interval": [float(interval.low), float(interval.high)],
            }
        table[name] = row
    return table


def _mask_of(observed: Path | None, id: str) -> Path | None:
    """The mask file of a case."""
    mask = observed / f"{id}.nii.gz" if observed is not None and observed.is_dir() else observed
    if mask is not None and not mask.is_file():
        raise GenMedError(f"{mask}: no such mask of observed voxels; add it or check --observed.")
    return mask


def _only_observed(scan: Volume, observed: Volume | None) -> Volume:
    """The scan with NaN where it was not observed: what was not seen must not leak into any output."""
    if observed is None:
        return scan
    return scan.like(np.where(observed.data.astype(bool), scan.data, np.float32(np.nan)))


def _on_grid(image: Volume, grid: Grid) -> np.ndarray:
    """Image values (c, x, y, z) at the voxel centres of another grid, nearest voxel."""
    if image.grid.shape == grid.shape and np.array_equal(image.affine, grid.affine):
        return image.data
    from scipy.ndimage import affine_transform

    step = np.linalg.inv(image.affine) @ grid.affine
    return np.stack(
        [affine_transform(c, step, output_shape=grid.shape, order=0, mode="nearest") for c in image.data]
    )


def _probabilities(result: Segmentation, id: str) -> Volume:
    if result.probabilities is None:
        raise GenMedError(f"{id}: is too large for --probabilities; leave it out, or give --roi.")
    return result.probabilities


def _reason(error: Exception) -> str:
    known = isinstance(error, GenMedError)
    return (
        str(error)
        if known
        else f"unexpected {type(error).__name__}: {error}; run this case alone with --debug."
    )


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


@contextmanager
def _bar(total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal; yields a function of the cases done and the share of the next one."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Segmenting", total=total)
        yield lambda done, share=0.0: bar.update(task, completed=done + share)


# Where outputs go -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Output paths: below a folder, or all beside one file."""

    folder: Path | None
    file: Path | None

    @classmethod
    def of(cls, out: Path, cases: list[ScanCase], source: Path, several: bool) -> _Target:
        name, suffix = stem(out)
        if suffix.lower() == ".nii.gz":
            if several:
                raise GenMedError(f"{out}: is one file for {len(cases)} cases; give a folder as --out.")
            target = cls(None, out)
        elif suffix:
            raise GenMedError(
                f"{out}: label maps are written as .nii.gz; name it {name}.nii.gz or give a folder."
            )
        elif out.is_file():
            raise GenMedError(f"{out}: is a file; give a folder or a name ending in .nii.gz as --out.")
        else:
            target = cls(out, None)
        inputs = {path.resolve() for case in cases for path in case.paths}
        clash = next((case.id for case in cases if target.labels(case.id).resolve() in inputs), None)
        if clash or (several and out.resolve() == source.resolve()):
            raise GenMedError(f"{out}: would overwrite the input or mix with it; choose another --out.")
        return target

    def labels(self, id: str) -> Path:
        return self.file if self.file is not None else self._below(f"{id}.nii.gz")

    def beside(self, id: str, ending: str) -> Path:
        """`<case>.<ending>` in a folder, or the output file's name with another ending."""
        if self.file is not None:
            return self.file.with_name(f"{stem(self.file)[0]}.{ending}")
        return self._below(f"{id}.{ending}")

    def table(self, name: str) -> Path:
        """statistics.json and manifest.json of a folder; of one file OUT, OUT.statistics.json and so on."""
        return self.file.with_name(f"{self.file.name}.{name}") if self.file is not None else self._below(name)

    def _below(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name


class _Record:
    """statistics.json and manifest.json, brought up to date after every case."""

    def __init__(self, target: _Target, model: Model, options: Options, command: str) -> None:
        self.target = target
        self.settings = _settings(model, options)
        self.statistics: dict[str, Any] = self._earlier("statistics.json")
        earlier = self._earlier("manifest.json")
        self.manifest: dict[str, Any] = {
            "versions": _versions(),
            "command": command,
            "model": model.plan.name,
            "weights_sha256": model.sha256,
            "seed": options.seed,
            "cases": earlier.get("cases", {}),
            "failed": {},
        }

    def is_finished(self, id: str, digest: str) -> bool:
        """The same input with the same weights and settings is in both tables, and its files are on disk."""
        entry = self.manifest["cases"].get(id, {})
        same = entry.get("input_sha256") == digest and entry.get("settings") == self.settings
        files = [self.target.labels(id)]
        files += [self.target.beside(id, "probabilities.nii.gz")] if self.settings["probabilities"] else []
        files += [self.target.beside(id, "preview.png")] if self.settings["preview"] else []
        return same and id in self.statistics and all(file.is_file() for file in files)

    def add(self, case: ScanCase, digest: str, result: Segmentation, table: dict[str, Any]) -> None:
        self.statistics[case.id] = table
        self.manifest["cases"][case.id] = {
            "input": [str(path) for path in case.paths],
            "input_sha256": digest,  # of its files, and of its mask if there is one
            "mode": result.mode,
            "match": result.match,
            "residual": _finite(result.residual),
            "seconds": round(result.seconds, 2),
            "seed": result.seed,
            "settings": self.settings,
        }
        self._write()

    def fail(self, id: str, reason: str) -> None:
        self.manifest["failed"][id] = reason
        self._write()

    def _write(self) -> None:
        """The manifest first: a case is finished only once the statistics name it."""
        write_json(self.target.table("manifest.json"), self.manifest)
        write_json(self.target.table("statistics.json"), self.statistics)

    def _earlier(self, name: str) -> dict[str, Any]:
        path = self.target.table(name)
        if self.target.folder is None or not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GenMedError(
                f"{path}: cannot be read ({error}); remove it or choose another --out."
            ) from error
        if not isinstance(content, dict):
            raise GenMedError(f"{path}: is not of GenMed; remove it or choose another --out.")
        return content


def _settings(model: Model, options: Options) -> dict[str, Any]:
    """Everything besides the input that decides what a case's files look like, as JSON gives it back."""
    observed = options.observed is not None
    settings = asdict(options) | {"observed": observed, "weights_sha256": model.sha256}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _versions() -> dict[str, str]:
    packages = ("genmed", "torch", "numpy", "nibabel", "SimpleITK")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
