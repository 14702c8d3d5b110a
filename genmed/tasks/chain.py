"""Segment, then complete: each structure of a degraded scan, completed from what its segmentation is sure of.

    found = gm.chain(gm.load("heart-mr"), gm.load("shapes"), scan, observed=mask)
    found.segmentation.labels.save("labels.nii.gz")

Voxels that were seen and are surely inside or outside of a structure are its cue, and stay as they are. Elsewhere the
completion has a say: alone where the segmentation knows nothing, slices that were neither seen nor restored, and else
as much as the segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from genmed.comparison import slice_corners
from genmed.cue import cue_of_labels
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.guide import Diverged
from genmed.hub import Model
from genmed.plan import Plan
from genmed.shape_model import ShapeModel
from genmed.space import Space, on_grid
from genmed.tasks.compare import Surfaces, read_truth, shapes_page, surfaces_of
from genmed.tasks.complete import Completion, complete
from genmed.tasks.region import seen_at
from genmed.tasks.run import Made, Options, Outcome, Task, made_of, run_cases
from genmed.tasks.segment import Progress, Segmentation, segment
from genmed.volume import Grid, Volume

TRUST = 0.9      # probability of a structure, or of its absence, from which a seen voxel counts as known
SEEN = 0.99      # share of a working voxel that was observed
THICK = 1.5      # times the finest spacing: slices of a working grid that are divided


@dataclass(frozen=True)
class Structure:
    """What is completed as one shape: labels of the segmentation, and words for what they are together."""

    labels: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return "+".join(self.labels)


@dataclass(frozen=True)
class Chained:
    """What `chain` found.

    `segmentation` is that of `segment` with labels and probabilities after completion, and volumes of single labels
    over completed shapes. `before` is what `segment` found on the working grid. `completed` holds facts by name of the
    structure. `notes` say which structures were left as segmented, and why, and of which the completion model knows no
    size.
    """

    segmentation: Segmentation
    before: Segmentation
    completed: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def chain(
    segmenter: Model,
    completer: ShapeModel,
    scan: Volume,
    *,
    label: str | None = None,
    text: str | None = None,
    shapes: int = 4,
    grid: str = "input",
    observed: Volume | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Chained:
    """Segment a scan and complete its structures.

    Args:
        label: structures to complete as `structures_of` reads them; default: all that the completion model knows.
        text: words for the structure, where `label` is one.
        shapes: samples of each completion.
        grid: result on the scan's own grid (`input`) or the segmenter's working grid, its thick slices divided
            (`model`).
        observed: mask on the scan's grid; voxels where it is 0 are never looked at.
        options: the other arguments of `genmed.segment`.

    Raises:
        GenMedError: as `genmed.segment` does, and for labels that the segmenter does not have.
    """
    structures, notes = structures_of(segmenter.plan, completer, label, text)
    half = (lambda done: progress(done / 2)) if progress else None
    found = segment(segmenter, scan, grid="model", observed=observed, seed=seed, progress=half, **options)
    done = complete_all(
        completer, segmenter.plan, scan, found, structures,
        shapes=shapes, grid=grid, observed=found.observed, roi_mm=options.get("roi_mm"), seed=seed, progress=progress,
    )  # fmt: skip
    return replace(done, notes=(*found.notes, *notes, *done.notes))


def complete_all(
    completer: ShapeModel,
    plan: Plan,
    scan: Volume,
    found: Segmentation,
    structures: Sequence[Structure],
    *,
    shapes: int = 4,
    grid: str = "input",
    observed: Volume | None = None,
    roi_mm: Sequence[tuple[float, float]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Chained:
    """The second half of `chain`, of a segmentation on the working grid; `progress` goes on from 0.5."""
    soft = found.soft
    assert soft is not None
    space = Space.fit(scan.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices, roi_mm=roi_mm)
    seen = np.ones(space.model.shape, bool)
    if observed is not None:
        seen = space.to_model((observed.data != 0).astype(np.float32))[0] > SEEN
    informed = seen | (found.mode != "conditional")  # guided segmentations restore what was not seen
    target = space.model if grid == "input" else divided(space.model)
    chances: dict[tuple[int, ...], np.ndarray] = {}
    facts: dict[str, dict[str, Any]] = {}
    volumes, notes = dict(found.volume_ml), []
    for number, structure in enumerate(structures):
        channels = tuple(plan.labels.index(name) for name in structure.labels)
        try:
            made, chances[channels] = completed(
                completer, soft.data[list(channels)].sum(axis=0), seen, soft.affine, structure.text,
                informed=informed, target=target, samples=shapes, seed=seed,
            )  # fmt: skip
        except (GenMedError, Diverged) as error:
            notes.append(f"{structure.name}: not completed, its segmentation is kept ({error})")
            continue
        facts[structure.name] = facts_of(made, structure)
        if not made.shapes[0].scaled:
            notes.append(f"{structure.name}: the completion model knows no size in mm of this structure")
        for name in structure.labels:
            volumes.pop(name, None)
        if len(channels) == 1 and made.volume_ml is not None:
            volumes[structure.name] = made.volume_ml
        if progress:
            progress(0.5 + (number + 1) / (2 * len(structures)))
    whole = joined(on_grid(soft, target, order=1), chances)
    names = dict(zip(plan.label_values, plan.labels, strict=True))
    values = np.asarray(plan.label_values, dtype=np.uint8 if max(plan.label_values) < 256 else np.int32)
    if grid == "input":
        like, classes, whole = scan, space.labels_to_input(whole), space.to_input(whole)
    else:
        like, classes = Volume(np.zeros((1, *target.shape), np.uint8), target.affine), whole.argmax(axis=0)
    labels = like.like(values[classes][None], names)
    result = replace(found, labels=labels, soft=like.like(whole, {}), temperature=1.0, volume_ml=volumes)
    return Chained(result, found, facts, tuple(notes))


def completed(
    model: ShapeModel,
    chance: Float[np.ndarray, "x y z"],
    seen: Bool[np.ndarray, "x y z"],
    affine: Float[np.ndarray, "4 4"],
    text: str,
    *,
    informed: Bool[np.ndarray, "x y z"] | None = None,
    target: Grid | None = None,
    samples: int = 4,
    seed: int = 0,
) -> tuple[Completion, Float[np.ndarray, "X Y Z"]]:
    """Complete one structure from the probability of its voxels, and its probability on the target grid.

    Where `chance` was seen and is sure, it stays. Elsewhere it is the share of completed shapes that a voxel lies in
    or, where the segmentation is `informed` (default: where it was seen), the mean of both. Raises `GenMedError` where
    nothing is surely inside.
    """
    from genmed.text import embed

    informed = seen if informed is None else informed
    sure = seen & (np.abs(chance - 0.5) >= TRUST - 0.5)
    cue = cue_of_labels(chance > 0.5, affine, sure, seed=seed)
    found = complete(model, cue, text=embed([text])[0], samples=samples, seed=seed)
    x, y, z = chance.shape
    target = target or Grid((x, y, z), affine)
    layers = Volume(np.stack([chance, sure, informed]).astype(np.float32), affine)
    before, kept, has_a_say = on_grid(layers, target, order=1)
    drawn = found.probability(target)
    return found, np.where(kept > 1 - 1e-6, before, drawn + has_a_say / 2 * (before - drawn))


def joined(
    soft: Float[np.ndarray, "k x y z"], chances: dict[tuple[int, ...], Float[np.ndarray, "x y z"]]
) -> Float[np.ndarray, "k x y z"]:
    """Class probabilities in which those of completed structures, channels of `soft`, are theirs.

    Labels of one structure share its probability as they did before, where they had any; everything else shares what
    is left.
    """
    whole = np.array(soft, dtype=np.float32)
    total = sum(chances.values())
    for channels, chance in chances.items():
        whole[list(channels)] = shares(soft[list(channels)]) * (chance / np.maximum(total, 1))
    rest = [k for k in range(len(soft)) if all(k not in channels for channels in chances)]
    if chances:
        whole[rest] = shares(soft[rest]) * np.clip(1 - total, 0, None)
    return whole


def shares(parts: Float[np.ndarray, "k x y z"]) -> Float[np.ndarray, "k x y z"]:
    """What each part has of their sum; where the sum is nearly nothing, as at the closest voxel where it is not."""
    from scipy.ndimage import distance_transform_edt

    total = parts.sum(axis=0)
    if len(parts) == 1 or not (known := total > 1 - TRUST).any():
        return np.ones_like(parts) / len(parts)
    place = distance_transform_edt(~known, return_distances=False, return_indices=True)
    nearest = parts[:, *place]
    return np.asarray(nearest / nearest.sum(axis=0))


def divided(grid: Grid) -> Grid:
    """The same field of view with thick slices divided into an odd number, so that their middles stay voxel centres."""
    finest = min(grid.spacing_mm)
    counts = [1 if mm <= THICK * finest else 2 * round((mm / finest - 1) / 2) + 1 for mm in grid.spacing_mm]
    step = np.diag([*(1 / n for n in counts), 1.0])
    step[:3, 3] = [(1 / n - 1) / 2 for n in counts]
    x, y, z = (n * count for n, count in zip(grid.shape, counts, strict=True))
    return Grid((x, y, z), grid.affine @ step)


def facts_of(found: Completion, structure: Structure) -> dict[str, Any]:
    """What the manifest says of a completion."""
    return {
        "text": structure.text,
        "scale_known": found.shapes[0].scaled,
        "residual_mm": round(found.residual, 4),
        "volume_ml": None if found.volume_ml is None else found.volume_ml._asdict(),
        "seconds": round(found.seconds, 2),
    }


# Names ----------------------------------------------------------------------------------------------------


def structures_of(
    plan: Plan, completer: ShapeModel, label: str | None = None, text: str | None = None
) -> tuple[list[Structure], list[str]]:
    """The structures to complete, and a note on each that the completion model does not know.

    `label` lists structures by their labels, `RV,LV`; labels joined by + are one, `Anterior+Posterior`. Without it:
    unions of labels and labels that data sets are known to have, and labels whose names say what they are. `text`
    names the one structure in the words of the completion model. Raises `GenMedError` for labels that are not there,
    and where the package that reads the words is missing.
    """
    from genmed.text import require_encoder, understand

    require_encoder()  # else every structure would stay as segmented

    names, known = plan.labels[1:], completer.plan.categories
    wanted = [tuple(map(str.strip, entry.split("+"))) for entry in label.split(",")] if label else []
    if missing := [name for part in wanted for name in part if name not in names]:
        raise GenMedError(f"--label {missing[0]}: model '{plan.name}' has {', '.join(names)}; choose from them.")
    if len({name for part in wanted for name in part}) < sum(map(len, wanted)):
        raise GenMedError(f"--label {label}: names a label twice; give each once.")
    if text is not None:
        if len(wanted or names) != 1:
            raise GenMedError("--text: describes one structure; say which with --label.")
        wanted = wanted or [names]
    texts = {} if text is not None else _usual_texts(names, known)
    if not wanted:
        unions = [part for part in texts if len(part) > 1]
        inside = {name for part in unions for name in part}
        wanted = [*unions, *((name,) for name in names if name not in inside)]
    structures, notes = [], []
    for part in wanted:
        words = text or texts.get(part) or " ".join(map(_in_words, part))
        if text is None and isinstance(understand(words, known), str):
            unsided = " ".join(word for word in words.split() if word not in ("left", "right"))
            words = words if isinstance(understand(unsided, known), str) else unsided  # sides were not noted
        if isinstance(why := understand(words, known), str):
            notes.append(
                f'{"+".join(part)}: not completed, since "{words}" {why}; its segmentation is kept, or name it with '
                "--label and --text"
            )
        else:
            structures.append(Structure(part, words))
    return structures, notes


def _in_words(label: str) -> str:
    """kidney_left as left kidney."""
    from genmed.data.shapes.sources import plain, sided

    category, side = sided(label)
    return f"{side} {plain(category)}".strip()


def _usual_texts(names: Sequence[str], known: dict[str, tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Labels of known data sets, single or joined, and what they are, where the completion model knows that."""
    from genmed.data.shapes.sources import STRUCTURES

    found: dict[tuple[str, ...], str] = {}
    for structures in STRUCTURES.values():
        for structure in structures:
            if structure.category in known and set(structure.classes) <= set(names):
                found.setdefault(structure.classes, f"{structure.side} {structure.category}".strip())
    return found


# Files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainOptions(Options):
    """How to segment and complete, in the words of the command line. Raises like `Options`."""

    label: str | None = None
    text: str | None = None
    shapes: int = 4
    complete_sha256: str = ""  # weights of the completion model: a case made with others is not finished

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shapes < 1:
            raise GenMedError(f"--shapes {self.shapes}: must be 1 or more.")


def chain_files(
    segmenter: Model,
    completer: ShapeModel,
    source: str | Path,
    out: str | Path,
    options: ChainOptions | None = None,
    *,
    page: Path | None = None,
    truth: Path | None = None,
    command: str = "",
) -> Outcome:
    """Segment and complete everything at `source`; files as of `genmed.tasks.run.segment_files`.

    Of one scan, and with a file `out`, `page` is an HTML page of the segmentation beside its completion, and how far
    both are from the `truth`, if there is one.
    """
    options = replace(options or ChainOptions(), complete_sha256=completer.sha256)
    whole = read_truth(page, truth, Path(out))
    if page is not None and not Path(out).name.lower().endswith(".nii.gz"):
        raise GenMedError(f"--page {page}: shows one scan; give one, and a file name.nii.gz as --out.")
    structures_of(segmenter.plan, completer, options.label, options.text)  # what is wrong ends here, not in every case
    make = partial(_chained, segmenter, completer, options, page, whole)
    return run_cases(Task("chain", make, options.endings, measures=True), segmenter, source, out, options, command)


def _chained(
    segmenter: Model,
    completer: ShapeModel,
    options: ChainOptions,
    page: Path | None,
    truth: Surfaces | None,
    id: str,
    scan: Volume,
    observed: Volume | None,
    progress: Progress,
) -> Made:
    found = chain(
        segmenter, completer, scan, label=options.label, text=options.text, shapes=options.shapes,
        observed=observed, progress=progress, **options.of_segment,
    )  # fmt: skip
    made = made_of(found.segmentation, segmenter.plan, options, id, scan)
    facts = {"completion_model": completer.plan.name, "completed": found.completed, "notes": list(found.notes)}
    files = dict(made.files)
    if page is not None:
        alone = complete_all(
            completer, segmenter.plan, scan, found.before, (),
            grid=options.grid, observed=found.before.observed, roi_mm=options.roi_mm,
        )  # fmt: skip
        labels, title = found.segmentation.labels, f"{id}, segmented and completed"
        html = chain_page(alone.segmentation.labels, labels, found.before.observed, truth, title=title)
        files["nii.gz"] = partial(_save_both, page, html, labels)
    return replace(made, files=files, facts=made.facts | facts)


def _save_both(page: Path, html: str, labels: Volume, path: Path) -> None:
    write_bytes(page, html.encode("utf-8", "replace"))
    labels.save(path)


# The page -------------------------------------------------------------------------------------------------


def chain_page(
    alone: Volume, completed: Volume, observed: Volume | None, truth: Surfaces | None = None, *, title: str
) -> str:
    """The segmentation alone beside its completion, with the slices that were seen, against a truth.

    `observed` is a mask on any grid; without it, all was seen. Raises `GenMedError` where nothing was found.
    """
    if not (alone.data.any() and completed.data.any()):
        raise GenMedError("no structure was found, so there is nothing to show; leave out --page.")
    shapes = [surfaces_of(name, labels) for name, labels in (("Segmentation alone", alone), ("Completed", completed))]
    planes = []
    if observed is not None:
        vertices = np.concatenate([shape.mesh.vertices for shape in shapes])
        planes = [slice_corners(observed.affine, axis, at, vertices) for axis, at in seen_slices(observed.data[0] != 0)]

    def seen(points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        if observed is None:
            return np.ones(len(points), bool)
        return seen_at(points, observed.data[0] != 0, observed.affine)[0]

    return shapes_page([(shape.name, shape) for shape in shapes], truth, title=title, planes=planes, seen=seen)


def seen_slices(seen: Bool[np.ndarray, "x y z"]) -> list[tuple[int, int]]:
    """Array axes and indices of slices that were seen as a whole; of neighbouring ones the first and the last."""
    found = []
    for axis in range(3):
        whole = seen.all(axis=tuple(other for other in range(3) if other != axis))
        inner = np.convolve(whole, [1, 1, 1])[1:-1] == 3
        found += [(axis, int(at)) for at in np.flatnonzero(whole & ~inner) if not whole.all()]
    return found
