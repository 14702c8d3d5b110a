"""`segment_files` and others: run a task on a file, a DICOM folder or a folder of cases, and write the results.

A case counts as finished once its files are on disk and in the tables (manifest.json, statistics.json). A run that
starts again skips cases that were finished with the same weights, settings and input. Every file appears whole or
not at all. A new task is a function from a scan to `Made`, and a `Task` that names its files.
"""

from __future__ import annotations

import errno
import hashlib
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
from genmed.files import require_room, sha256_of, write_json
from genmed.hub import Model
from genmed.plan import Plan
from genmed.space import on_grid
from genmed.tasks.inputs import ScanCase, find_cases, stem
from genmed.tasks.preview import save_preview
from genmed.tasks.restore import Restoration, restore, save_synthetic, translate
from genmed.tasks.segment import MATCHES, MODES, UNGUIDED, Progress, Segmentation, segment
from genmed.volume import Volume, read

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
        _check(self)

    @property
    def endings(self) -> tuple[str, ...]:
        """Of a case's files, the label map first."""
        asked = {"probabilities.nii.gz": self.probabilities, "preview.png": self.preview}
        return ("nii.gz", *(ending for ending, wanted in asked.items() if wanted))

    @property
    def of_segment(self) -> dict[str, Any]:
        """Keyword arguments of `segment`."""
        names = ("mode", "match", "samples", "seed", "grid", "slice_thickness_mm", "roi_mm")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore or translate, in the words of the command line. Raises like `Options`."""

    match: str = "auto"
    samples: int | None = None
    seed: int = 0
    roi_mm: Box | None = None
    observed: Path | None = None  # a mask, or a folder of masks <case>.nii.gz
    slice_thickness_mm: float | None = None
    series: str | None = None
    uncertainty: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.uncertainty and self.samples == 1:
            raise GenMedError("--uncertainty: one sample has no spread; give --samples 2 or more.")


def _check(options: Options | RestoreOptions) -> None:
    for key, choices in CHOICES.items():
        if key in vars(options) and getattr(options, key) not in choices:
            raise GenMedError(f"--{key} {getattr(options, key)}: unknown; choose one of {', '.join(choices)}.")
    if isinstance(options, Options) and options.mode == "conditional" and options.match not in UNGUIDED:
        raise GenMedError(f"--match {options.match}: --mode conditional takes {', '.join(UNGUIDED)}; leave one out.")
    if options.samples is not None and options.samples < 1:
        raise GenMedError(f"--samples {options.samples}: must be 1 or more.")
    if options.seed < 0:
        raise GenMedError(f"--seed {options.seed}: must be 0 or more.")
    if options.slice_thickness_mm is not None and not 0 < options.slice_thickness_mm < float("inf"):
        raise GenMedError(f"--slice-thickness {options.slice_thickness_mm}: must be above 0 mm.")
    if options.observed is not None and not options.observed.exists():
        raise GenMedError(f"{options.observed}: no such mask or folder; check --observed.")


@dataclass(frozen=True)
class Made:
    """What a task made of one scan.

    `files` maps the ending behind the case's name to what writes that file. `facts` go to manifest.json, `statistics`
    to statistics.json.
    """

    files: dict[str, Callable[[Path], None]]
    facts: dict[str, Any]
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is done to every case: `make(id, scan, observed, progress)`, and the files that come of it."""

    name: str  # the sub-command; a folder's tables belong to one
    make: Callable[[str, Volume, Volume | None, Progress], Made]
    endings: tuple[str, ...]  # of a case's files; the first is that of the result itself
    measures: bool = False  # whether there is a statistics.json


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
    """Segment everything at `source` and write to `out`, a .nii.gz file or a folder; see `run_cases`."""
    options = options or Options()
    task = Task("segment", partial(_segmented, model, options), options.endings, measures=True)
    return run_cases(task, model, source, out, options, command)


def restore_files(
    model: Model, source: str | Path, out: str | Path, options: RestoreOptions | None = None, *, command: str = ""
) -> Outcome:
    """Restore everything at `source` and write to `out`, a .synthetic.nii.gz file or a folder; see `run_cases`."""
    return _synthetic_files("restore", model, source, out, options or RestoreOptions(), command)


def translate_files(
    model: Model, source: str | Path, out: str | Path, options: RestoreOptions | None = None, *, command: str = ""
) -> Outcome:
    """`restore_files`, but into the model's own modality."""
    return _synthetic_files("translate", model, source, out, options or RestoreOptions(), command)


def _synthetic_files(
    name: str, model: Model, source: str | Path, out: str | Path, options: RestoreOptions, command: str
) -> Outcome:
    endings = ("synthetic.nii.gz", *(["uncertainty.nii.gz"] if options.uncertainty else []))
    return run_cases(
        Task(name, partial(_synthesised, name, model, options), endings), model, source, out, options, command
    )


def run_cases(
    task: Task, model: Model, source: str | Path, out: str | Path, options: Options | RestoreOptions, command: str
) -> Outcome:
    """Run a task on everything at `source` and write to `out`, a file of the task's ending or a folder.

    In a folder of cases a broken case is noted in `Outcome.failed` and the others go on; one scan alone
    raises, and so does a full disk.
    """
    source, out = Path(source), Path(out)
    cases, several = find_cases(source, len(model.plan.channels), options.series)
    target = _Target.of(out, cases, source, several, task.endings[0], options.observed)
    record = _Record(target, task, model, options, command)
    outcome = Outcome(record.statistics, record.manifest, {case.id: target.result(case.id) for case in cases})
    with _bar(task.name, len(cases)) as advance:
        for number, case in enumerate(cases):
            try:
                finished = _run_case(task, model, case, target, record, options, partial(advance, number))
            except Exception as error:
                if not several or _is_disk_full(error):
                    raise
                outcome.failed[case.id] = _reason(error)
                record.fail(case.id, outcome.failed[case.id])
            else:
                (outcome.done if finished else outcome.skipped).append(case.id)
            advance(number + 1)
    return outcome


def _run_case(
    task: Task,
    model: Model,
    case: ScanCase,
    target: _Target,
    record: _Record,
    options: Options | RestoreOptions,
    progress: Progress,
) -> bool:
    """Run the task on one case and write its files, the result itself last; False if it was finished before."""
    mask = _mask_of(options.observed, case.id)
    digest = sha256_of(*case.files, *([mask] if mask else []))
    if target.folder is not None and record.is_finished(case.id, digest):
        return False
    scan = case.read(len(model.plan.channels), finite=mask is None, series=options.series)
    made = task.make(case.id, scan, read(mask) if mask else None, progress)
    record.forget(case.id)
    for ending in reversed(task.endings):
        made.files[ending](target.path(case.id, ending))
    record.add(case, digest, made)
    return True


def _segmented(
    model: Model, options: Options, id: str, scan: Volume, observed: Volume | None, progress: Progress
) -> Made:
    """Label map, and what else was asked for."""
    result = segment(model, scan, observed=observed, progress=progress, **options.of_segment)
    return made_of(result, model.plan, options, id, scan)


def made_of(result: Segmentation, plan: Plan, options: Options, id: str, scan: Volume) -> Made:
    """The files of a segmentation, its facts and its statistics."""
    shown = on_grid(_only_observed(scan, result.observed), result.labels.grid, order=0)
    files: dict[str, Callable[[Path], None]] = {"nii.gz": result.labels.save}
    if options.probabilities:
        files["probabilities.nii.gz"] = _probabilities(result, id).save
    if options.preview:
        files["preview.png"] = partial(save_preview, shown, result.labels)
    facts = {"mode": result.mode, "widened": result.widened}
    return Made(files, facts | _facts(result), measure(result, shown, plan))


def _synthesised(
    name: str,
    model: Model,
    options: RestoreOptions,
    id: str,
    scan: Volume,
    observed: Volume | None,
    progress: Progress,
) -> Made:
    """Restored or translated image, and its standard deviation where that was asked for."""
    plan = model.plan
    result = (restore if name == "restore" else translate)(
        model,
        scan,
        match=options.match,
        samples=options.samples,
        seed=options.seed,
        observed=observed,
        slice_thickness_mm=options.slice_thickness_mm,
        roi_mm=options.roi_mm,
        progress=progress,
    )
    what = {
        "restore": f"synthetic: restored by GenMed, model {plan.name}",
        "translate": f"synthetic: translated by GenMed to {', '.join(plan.channels)}",
    }[name]
    files: dict[str, Callable[[Path], None]] = {
        "synthetic.nii.gz": partial(save_synthetic, result.image, description=what)
    }
    if options.uncertainty:
        assert result.deviation is not None
        what = "synthetic: standard deviation over samples by GenMed"
        files["uncertainty.nii.gz"] = partial(save_synthetic, result.deviation, description=what)
    return Made(files, _facts(result))


def _facts(result: Segmentation | Restoration) -> dict[str, Any]:
    return {
        "match": result.match,
        "residual": _finite(result.residual),
        "surprise": None if result.surprise is None else _finite(result.surprise),
        "doubtful": result.doubtful,
        "doubts": list(result.doubts),
        "observed_share": round(result.observed_share, 4),
        "slice_thickness_mm": result.slice_thickness_mm,
        "notes": list(result.notes),
        "seconds": round(result.seconds, 2),
        "seed": result.seed,
    }


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
def _bar(task_name: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal; yields a function of the cases done and the share of the next one."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(task_name, total=total)
        yield lambda done, share=0.0: bar.update(task, completed=done + share)


# Where outputs go -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Output paths: below a folder, or all beside one file."""

    folder: Path | None
    file: Path | None
    ending: str  # of the result itself

    @classmethod
    def of(
        cls, out: Path, cases: list[ScanCase], source: Path, several: bool, ending: str, observed: Path | None = None
    ) -> _Target:
        name, suffix = stem(out)
        if suffix.lower() == ".nii.gz":
            if several:
                raise GenMedError(f"{out}: is one file for {len(cases)} cases; give a folder as --out.")
            if not out.name.lower().endswith(f".{ending}"):
                raise GenMedError(f"{out}: must be told from a measured scan by its name; call it {name}.{ending}.")
            target = cls(None, out, ending)
        elif suffix:
            raise GenMedError(f"{out}: results are written as .nii.gz; name it {name}.{ending} or give a folder.")
        elif out.is_file():
            raise GenMedError(f"{out}: is a file; give a folder or a name ending in .{ending} as --out.")
        else:
            target = cls(out, None, ending)
        inputs = {path.resolve() for case in cases for path in case.paths}
        if observed is not None:
            inputs |= {mask.resolve() for mask in (observed.iterdir() if observed.is_dir() else [observed])}
        require_room("--out", target.result(cases[0].id))
        if target.file is not None and target.file.is_dir():
            raise GenMedError(f"{out}: is a folder; give another name as --out.")
        clash = next((case.id for case in cases if target.result(case.id).resolve() in inputs), None)
        if clash or (several and out.resolve() == source.resolve()):
            raise GenMedError(f"{out}: would overwrite the input or mix with it; choose another --out.")
        return target

    def result(self, id: str) -> Path:
        return self.path(id, self.ending)

    def path(self, id: str, ending: str) -> Path:
        """`<case>.<ending>` in a folder; of one file its own name, with another ending beside it."""
        if self.file is None:
            return self._below(f"{id}.{ending}")
        return self.file if ending == self.ending else self.file.with_name(f"{self._name}.{ending}")

    @property
    def _name(self) -> str:
        assert self.file is not None
        return self.file.name[: -len(f".{self.ending}")]

    def table(self, name: str) -> Path:
        """statistics.json and manifest.json of a folder; of one file OUT, OUT.statistics.json and so on."""
        return self.file.with_name(f"{self.file.name}.{name}") if self.file is not None else self._below(name)

    def _below(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name


class _Record:
    """statistics.json and manifest.json, brought up to date after every case."""

    def __init__(
        self, target: _Target, task: Task, model: Model, options: Options | RestoreOptions, command: str
    ) -> None:
        self.target, self.task = target, task
        self.settings = _settings(model, options)
        self.statistics: dict[str, Any] = self._earlier("statistics.json") if task.measures else {}
        earlier = self._earlier("manifest.json")
        if (before := earlier.get("task", "segment")) != task.name and earlier:
            path = target.table("manifest.json")
            raise GenMedError(f"{path}: belongs to results of `genmed {before}`; choose another --out.")
        self.manifest: dict[str, Any] = {
            "task": task.name,
            "versions": _versions(),
            "command": command,
            "model": model.plan.name,
            "weights_sha256": model.sha256,
            "seed": options.seed,
            "cases": earlier.get("cases", {}),
            "failed": {},
        }

    def is_finished(self, id: str, digest: str) -> bool:
        """The same input with the same weights and settings is in the tables, and its files are on disk."""
        entry = self.manifest["cases"].get(id, {})
        same = entry.get("input_sha256") == digest and entry.get("settings") == self.settings
        measured = id in self.statistics or not self.task.measures
        return same and measured and all(self.target.path(id, e).is_file() for e in self.task.endings)

    def forget(self, id: str) -> None:
        """Before its files are replaced: a case that is interrupted now must not pass for the earlier one."""
        if self.manifest["cases"].pop(id, None) is not None:
            self._write()

    def add(self, case: ScanCase, digest: str, made: Made) -> None:
        if self.task.measures:
            self.statistics[case.id] = made.statistics
        self.manifest["cases"][case.id] = {
            "input": [str(path) for path in case.paths],
            "input_sha256": digest,  # of its files, and of its mask if there is one
            **made.facts,
            "settings": self.settings,
        }
        self._write()

    def fail(self, id: str, reason: str) -> None:
        self.manifest["failed"][id] = reason
        self._write()

    def _write(self) -> None:
        """The manifest first: a case is finished only once the statistics name it."""
        write_json(self.target.table("manifest.json"), self.manifest)
        if self.task.measures:
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


def _settings(model: Model, options: Options | RestoreOptions) -> dict[str, Any]:
    """Everything besides the input that decides what a case's files look like, as JSON gives it back."""
    observed = options.observed is not None
    plan = hashlib.sha256(model.plan.to_json().encode()).hexdigest()
    settings = asdict(options) | {"observed": observed, "weights_sha256": model.sha256, "plan_sha256": plan}
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _versions() -> dict[str, str]:
    packages = ("genmed", "torch", "numpy", "nibabel", "SimpleITK")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
