"""`genmed demo`: both hippocampi of a template brain, clean and degraded, and a page about what changes.

The brain is the MNI152 T1 template that nilearn ships, at 1 mm; nothing is downloaded. The bundled model
knows crops with the medial side at high x (left hippocampi in RAS+): the right one is mirrored before, and
its labels are mirrored back. The template is symmetric, so both sides are one image; each has its own seed,
and what differs between them is chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from genmed import report
from genmed.degrade import coarser
from genmed.errors import GenMedError
from genmed.files import write_bytes, write_json
from genmed.hub import Model, load
from genmed.metrics import dice
from genmed.plan import Plan
from genmed.report import Cell, Fact, Key, Page, Panel, Table
from genmed.space import Space
from genmed.tasks.segment import Segmentation, segment
from genmed.volume import Volume

SIDES = ("left", "right")
BOX_MM = ((-42.5, -10.5), (-46.5, 1.5), (-32.5, 7.5))  # round the left hippocampus, RAS+: 32 × 48 × 40 mm
COARSE_MM = 8
SAMPLES = 4
DOUBT = (0.1, 0.9)  # probabilities of being hippocampus that count as doubtful
WINDOW = (75.0, 225.0)  # template values shown as black and white; fixed, so that nothing hidden decides it
ZOOM = 8  # pixels per voxel
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Input:
    """One version of a crop that the model is given. What it must not know is not in it.

    `scan` goes to the model, with the mask `observed` on the same grid if voxels are missing. `shown` and
    `seen`, (x, y, z) on the crop's grid, are the same for the eye.
    """

    key: str
    title: str
    scan: Volume
    observed: Volume | None
    shown: np.ndarray
    seen: np.ndarray

    @property
    def degraded(self) -> bool:
        return self.key != "clean"


@dataclass(frozen=True)
class Outcome:
    """What the model made of one input, on the crop's grid.

    `labels` (x, y, z) holds label values, `probabilities` is (C, x, y, z), `image` is the restored image
    (x, y, z), or None where nothing had to be restored.
    """

    input: Input
    result: Segmentation
    labels: np.ndarray
    probabilities: np.ndarray
    image: np.ndarray | None

    @property
    def hippocampus(self) -> np.ndarray:
        """Probability (x, y, z) of belonging to any of the structures."""
        return np.asarray(1 - self.probabilities[0])


Outcomes = dict[str, tuple[Outcome, ...]]  # per side, the clean one first


def run(out: Path, model: str = "hippocampus-mr") -> Path:
    """Segment the template's hippocampi from clean and degraded images; write a page, and return its path.

    Args:
        out: folder that gets index.html, picture.png, statistics.json, template.nii.gz and one label map
            for each input on the template's grid.
        model: name or folder of a model with one image channel.

    Raises:
        GenMedError: if nilearn is missing, `out` is a file, or the model cannot take the crops.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise GenMedError(f"{out}: is a file; give a folder for the demo.")
    template = load_template()
    loaded = load(model)
    outcomes: Outcomes = {}
    spaces: dict[str, Space] = {}
    with _progress(total=len(SIDES) * (1 + 2 * SAMPLES)) as start:
        for seed, side in enumerate(SIDES):
            crop, spaces[side] = cut(template, side)
            outcomes[side] = tuple(
                examine(loaded, crop, item, seed, start(f"{side} hippocampus, {item.title.lower()}", item))
                for item in degrade(crop, loaded.plan)
            )
    statistics = summarise(outcomes, loaded)
    template.save(out / "template.nii.gz")
    for number, item in enumerate(o.input for o in outcomes[SIDES[0]]):
        labels = {side: outcomes[side][number].labels for side in SIDES}
        label_map(template, spaces, labels, loaded.plan).save(out / f"labels-{item.key}.nii.gz")
    write_json(out / "statistics.json", statistics)
    panels = tuple(panel(side, outcomes[side], loaded.plan) for side in SIDES)
    picture = report.contact_sheet(panels[0], (0, 1, 2), legend(loaded.plan)[:-1])
    write_bytes(out / "picture.png", picture)
    return write_bytes(out / "index.html", report.render(page(panels, statistics, loaded)).encode("utf-8"))


# Crops and their degraded versions ------------------------------------------------------------------------


def load_template() -> Volume:
    """The MNI152 T1 template at 1 mm, 8 bit, brain only. Raises `GenMedError` without nilearn."""
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError as error:
        raise GenMedError(
            "genmed demo needs the template brain in nilearn; in the repository, run: pip install -c constraints.txt "
            "'.[demo]'"
        ) from error
    image = load_mni152_template(resolution=1)
    values = np.rint(255 * image.get_fdata(dtype=np.float32)).astype(np.uint8)  # nilearn divides by 255
    return Volume(values[None], image.affine, header=image.header)


def mirrored(volume: Volume) -> Volume:
    """Left and right exchanged, in the world and along the first voxel axis; twice changes nothing."""
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = volume.grid.shape[0] - 1
    return replace(volume, data=volume.data[:, ::-1], affine=MIRROR @ volume.affine @ flip)


def cut(template: Volume, side: str) -> tuple[Volume, Space]:
    """The crop round one hippocampus, as a left one, and the way back to the (mirrored) template."""
    brain = mirrored(template) if side == "right" else template
    space = Space.fit(brain.grid, brain.spacing_mm, roi_mm=BOX_MM)
    return Volume(space.orient(brain.data).astype(np.float32), space.model.affine), space


def degrade(crop: Volume, plan: Plan) -> tuple[Input, Input, Input]:
    """The clean crop, its averages over 8 mm voxels, and the crop without every second coronal slice.

    A missing slice is as thick as the model's voxel, 1 mm for the bundled model; its values are erased here.
    """
    everywhere = np.ones(crop.grid.shape, dtype=bool)
    averages = coarser(crop, COARSE_MM).scan
    slab = max(1, round(plan.spacing_mm[1] / crop.spacing_mm[1]))
    seen = everywhere & (np.arange(crop.grid.shape[1]) // slab % 2 == 0)[:, None]
    kept = np.where(seen, crop.data, 0)
    return (
        Input("clean", "Clean", crop, None, crop.data[0], everywhere),
        Input("8mm", f"{COARSE_MM} mm voxels", averages, None, _blocks(averages, crop), everywhere),
        Input("half-slices", "Half the slices", crop.like(kept), crop.like(seen.astype(np.uint8)), kept[0], seen),
    )


def _blocks(coarse: Volume, crop: Volume) -> np.ndarray:
    """(x, y, z) on the crop's grid: the value of the coarse voxel that each voxel lies in."""
    index = (np.arange(n) * m // n for n, m in zip(crop.grid.shape, coarse.grid.shape, strict=True))
    return np.asarray(coarse.data[0][np.ix_(*index)])


def examine(model: Model, crop: Volume, item: Input, seed: int = 0, progress: Progress | None = None) -> Outcome:
    """Segment one input and bring the result to the crop's grid, whatever the model's spacing."""
    coarse = item.scan.grid.shape != crop.grid.shape
    result = segment(
        model,
        item.scan,
        observed=item.observed,
        samples=SAMPLES if item.degraded else None,
        seed=seed,
        grid="model" if coarse else "input",
        progress=progress,
    )
    assert result.probabilities is not None
    labels, chances = result.labels.data[0], result.probabilities.data
    space = Space.fit(crop.grid, model.plan.spacing_mm)
    if coarse:
        labels = np.asarray(model.plan.label_values)[space.labels_to_input(chances)]
        chances = space.to_input(chances)
    image = None if result.image is None else space.to_input(result.image.data)[0]
    return Outcome(item, result, labels, chances, image)


def label_map(template: Volume, spaces: dict[str, Space], labels: dict[str, np.ndarray], plan: Plan) -> Volume:
    """Both sides on the template's grid, with a value and a name of their own for each side's structures."""
    whole = np.zeros(template.data.shape, dtype=np.int32)
    names = {0: plan.labels[0]}
    for number, side in enumerate(SIDES):
        offset = number * max(plan.label_values)
        names |= {offset + value: f"{side} {name}" for value, name in _structures(plan)}
        found = spaces[side].unorient(np.where(labels[side] > 0, labels[side].astype(np.int32) + offset, 0))
        whole = np.maximum(whole, found[::-1] if side == "right" else found)
    return template.like(whole, names)


def _structures(plan: Plan) -> list[tuple[int, str]]:
    """Label value and name of everything but the background."""
    return list(zip(plan.label_values, plan.labels, strict=True))[1:]


# Numbers --------------------------------------------------------------------------------------------------


def summarise(outcomes: Outcomes, model: Model) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "template": f"MNI152 T1, 1 mm, of nilearn {version('nilearn')}",
        "model": model.plan.name,
        "weights_sha256": model.sha256,
        "genmed": version("genmed"),
        "samples": SAMPLES,
        "box_mm": {"left": BOX_MM, "right": ((-BOX_MM[0][1], -BOX_MM[0][0]), *BOX_MM[1:])},
        "sides": {
            side: {o.input.key: _measured(o, outcomes[side][0], model.plan) for o in outcomes[side]} for side in SIDES
        },
    }


def _measured(outcome: Outcome, clean: Outcome, plan: Plan) -> dict[str, Any]:
    result, item = outcome.result, outcome.input
    doubtful = (outcome.hippocampus > DOUBT[0]) & (outcome.hippocampus < DOUBT[1])
    structures = {name: _structure(outcome, clean, value, name) for value, name in _structures(plan)}
    return {
        "input_voxels": int(item.seen.sum()) if item.observed else item.scan.data.size,
        "mode": result.mode,
        "match": result.match,
        "seed": result.seed,
        "seconds": round(result.seconds, 2),
        "residual": float(result.residual) if np.isfinite(result.residual) else None,
        "ml": sum(row["ml"] for row in structures.values()),
        "ml_change": sum(row["ml_change"] for row in structures.values()),
        "dice_with_clean": dice(outcome.labels > 0, clean.labels > 0),
        "doubtful_ml": _ml(doubtful, outcome),
        "structures": structures,
    }


def _structure(outcome: Outcome, clean: Outcome, value: int, name: str) -> dict[str, Any]:
    mask, before = outcome.labels == value, clean.labels == value
    row: dict[str, Any] = {
        "ml": _ml(mask, outcome),
        "voxels": int(mask.sum()),
        "ml_change": _ml(mask, outcome) - _ml(before, clean),
        "dice_with_clean": dice(mask, before),
    }
    if name in outcome.result.volume_ml:
        interval = outcome.result.volume_ml[name]
        row |= {"ml_expected": interval.mean, "ml_interval": [interval.low, interval.high]}
    return row


def _ml(mask: np.ndarray, outcome: Outcome) -> float:
    """Volume of a mask on the crop's grid, whose voxels measure 1 mm."""
    return int(mask.sum()) / 1000


# Pictures and words ---------------------------------------------------------------------------------------


def panel(side: str, outcomes: tuple[Outcome, ...], plan: Plan) -> Panel:
    """One sagittal slice of every outcome: what the model saw, restored, its labels and probabilities."""
    clean = outcomes[0]
    x = best_slice(clean.labels)
    return Panel(
        f"{side.capitalize()} hippocampus",
        tuple(o.input.title for o in outcomes),
        (
            ("What the model saw", tuple(_saw(o, x) for o in outcomes)),
            (f"Restored image (mean of {SAMPLES})", tuple(_restored(o, x) for o in outcomes)),
            ("Labels", tuple(_labelled(o, clean, x, plan) for o in outcomes)),
            ("Probability of hippocampus", tuple(_probable(o, x) for o in outcomes)),
        ),
    )


def best_slice(labels: np.ndarray) -> int:
    """The sagittal slice (index along x) with most of the structures, the middle one if there are none."""
    area = (labels > 0).sum(axis=(1, 2))
    return int(area.argmax()) if area.any() else len(area) // 2


def _saw(outcome: Outcome, x: int) -> Cell:
    item = outcome.input
    picture = report.hide(report.grey(item.shown[x], WINDOW, ZOOM), item.seen[x], ZOOM)
    return Cell(f"Sagittal slice as given to the model: {item.title.lower()}", picture)


def _restored(outcome: Outcome, x: int) -> Cell:
    if outcome.image is None:
        return Cell("Seen whole: nothing to restore")
    words = f"Restored from: {outcome.input.title.lower()} (mean of {SAMPLES} samples)"
    return Cell(words, report.grey(outcome.image[x], WINDOW, ZOOM))


def _labelled(outcome: Outcome, clean: Outcome, x: int, plan: Plan) -> Cell:
    under = outcome.input.shown if outcome.image is None else outcome.image
    picture = report.overlay(report.grey(under[x], WINDOW, ZOOM), outcome.labels[x], _colours(plan), ZOOM)
    if outcome is not clean:
        picture = report.outline(picture, clean.labels[x] > 0, zoom=ZOOM)
    return Cell(f"{', '.join(plan.labels[1:])} found in: {outcome.input.title.lower()}", picture)


def _probable(outcome: Outcome, x: int) -> Cell:
    words = f"Probability of hippocampus: {outcome.input.title.lower()}"
    return Cell(words, report.probability(outcome.hippocampus[x], ZOOM))


def _colours(plan: Plan) -> dict[int, report.Colour]:
    known = report.LABEL_COLOURS
    return {value: known[k % len(known)] for k, (value, _) in enumerate(_structures(plan))}


def legend(plan: Plan) -> tuple[Key, ...]:
    """What the colours mean: structures, the clean result's outline, hidden voxels, probabilities."""
    return (
        *(Key(name, (_colours(plan)[value],)) for value, name in _structures(plan)),
        Key("outline of the clean result", (report.WHITE,)),
        Key("hidden from the model", (report.HATCH[1],)),
        Key("probability from 0 to 1", report.PROBABILITY_COLOURS),
    )


def page(panels: tuple[Panel, ...], statistics: dict[str, Any], model: Model) -> Page:
    """The report in words and pictures."""
    plan = model.plan
    return Page(
        title="Two hippocampi, seen well and seen badly",
        eyebrow="GenMed demo",
        lead=_LEAD,
        facts=tuple(_fact(statistics, *entry) for entry in _DEGRADED.items()),
        legend=legend(plan),
        panels=panels,
        table=_table(statistics, plan),
        notes_heading="What this is, and what it is not",
        notes=_NOTES,
        footer=f"GenMed {statistics['genmed']} · model {plan.name}, weights SHA-256 {model.sha256} · "
        f"{statistics['template']}",
    )


_DEGRADED = {"8mm": f"{COARSE_MM} mm voxels", "half-slices": "Half the slices"}
_LEAD = (
    "One model has learned image and label together. Here it segments the hippocampi of a template brain "
    "three times: from the whole image, from averages over voxels of 8 mm, and from every second slice. "
    "Where the image is poor, the model first restores, several times, what agrees with it, then labels each "
    "restoration."
)
_NOTES = (
    "This is a demonstration that the program works on your machine. It is not evidence that it is accurate: "
    "there is one subject, and it is no person but the average of 152 brains, smoother than any scan and "
    "larger than most people's. It is also symmetric: left and right are one image and its mirror image, and "
    "what differs between them comes from different random numbers.",
    "There is no outline by hand to compare with. The numbers tell how far the result moves when the image "
    "gets worse, not how right it is. Scores on real scans are in the model's card: genmed models info.",
    "The poor images are made from the good one exactly as the model assumes: plain averages, no noise, no "
    f"motion. Intervals and probabilities come from {SAMPLES} samples and are calibrated on scans of people, "
    "which this average is not. Restored images are plausible, not true: what was not seen may be different in "
    "reality.",
    "Not a medical device; not for diagnosis.",
)


def _fact(statistics: dict[str, Any], key: str, title: str) -> Fact:
    rows = [statistics["sides"][side][key] for side in SIDES]
    clean = [statistics["sides"][side]["clean"] for side in SIDES]
    values = " left, ".join(f"{row['dice_with_clean']:.2f}" for row in rows) + " right"
    changes = ", ".join(
        f"{_percent(row['ml_change'], c['ml'])} {s}" for s, row, c in zip(SIDES, rows, clean, strict=True)
    )
    share = clean[0]["input_voxels"] / rows[0]["input_voxels"]
    text = f"Dice with the clean result (1 is no change) from 1/{share:.0f} of the voxels. Volume: {changes}."
    return Fact(title, values, text)


def _percent(change: float, whole: float) -> str:
    return f"{_signed(100 * change / whole, 0)} %" if whole else "–"


def _signed(value: float, digits: int = 2) -> str:
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def _table(statistics: dict[str, Any], plan: Plan) -> Table:
    structures = plan.labels[1:]
    titles = {"clean": "clean"} | {key: title.lower() for key, title in _DEGRADED.items()}
    volumes = [f"{name}, ml" for name in structures]
    overlaps = [f"Dice, {name}" for name in structures]
    header = ("Side and input", *volumes, "Change of the whole, ml", *overlaps, "In doubt, ml", "Seconds")
    rows = tuple(
        _row(f"{side.capitalize()}, {titles[key]}", row, key == "clean")
        for side, table in statistics["sides"].items()
        for key, row in table.items()
    )
    notes = (
        f"Small print under a volume: central 95 % interval over the {SAMPLES} samples. "
        "Change and Dice: against the clean result of the same side. "
        f"In doubt: voxels with a probability of hippocampus between {DOUBT[0]} and {DOUBT[1]}.",
    )
    return Table("Numbers", header, rows, notes)


def _row(title: str, row: dict[str, Any], is_clean: bool) -> tuple[str, ...]:
    structures = row["structures"].values()
    return (
        title,
        *(_volume(structure) for structure in structures),
        "–" if is_clean else _signed(row["ml_change"]),
        *("–" if is_clean else f"{structure['dice_with_clean']:.2f}" for structure in structures),
        f"{row['doubtful_ml']:.2f}",
        f"{row['seconds']:.1f}",
    )


def _volume(structure: dict[str, Any]) -> str:
    text = f"{structure['ml']:.2f}"
    if "ml_interval" in structure:
        low, high = structure["ml_interval"]
        text += f"\n{low:.2f} to {high:.2f}"
    return text


# Progress -------------------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, Input], Progress]]:
    """A bar on stderr with the time left. `start(words, input)` begins a step and returns its progress."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<36}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading", total=total)
        done = 0.0

        def start(words: str, item: Input) -> Callable[[float], None]:
            nonlocal done
            begun, cost = done, SAMPLES if item.degraded else 1
            done += cost
            bar.update(task, description=words, completed=begun)
            return lambda share: bar.update(task, completed=begun + share * cost)

        yield start
        bar.update(task, description="writing the page", completed=total)
