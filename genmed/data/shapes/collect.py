"""From finished items to a data set: drop duplicates, divide by subject, write captions, shards, index and card."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genmed.data.shapes import INDEX, SHARDS, ShapeRow
from genmed.data.shapes.captions import Facts, Terciles, captions
from genmed.data.shapes.items import Record
from genmed.data.shapes.sources import Item
from genmed.data.split import PARTS, three_way
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.shape import MARGIN, STEPS, TRUNCATION, decode

SHARD = 256            # shapes in a file
SAME_VOLUME = 0.005    # relative difference
SAME_SHAPE = 0.995     # correlation of the distances near a surface: far from it all shapes are alike
SAME_COARSE = 0.98     # the same, of the small copies, to look for pairs quickly
IMPLAUSIBLE = 5        # median absolute deviations of the logarithm of the volume
REASONS = "reasons.csv"


@dataclass(frozen=True)
class Reason:
    """Why a shape is missing, or what was done to one that is there. `path` starts in the source's folder."""

    source: str
    path: str
    structure: str
    kept: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Kept:
    """A shape that goes into the data set."""

    id: str
    item: Item
    record: Record
    part: str
    flag: str

    @property
    def facts(self) -> Facts:
        """What its captions may say."""
        measures, has_scale = self.record.measures, not self.item.array
        assert measures is not None
        findings = {name: value == "yes" for name, value in self.record.facts if value in ("yes", "no")}
        volume_ml, extent_mm = (measures.volume_ml, measures.extent_mm) if has_scale else (None, None)
        item = self.item
        return Facts(item.category, item.side, item.source, volume_ml, extent_mm, measures.elongation, findings)


def write_set(
    out: Path,
    finished: Sequence[tuple[str, Item, Record]],
    left_out: Iterable[Reason],
    unseen: Sequence[str],
    seed: int,
    command: str,
) -> tuple[int, int]:
    """Write the data set of finished items (id, item, record), index.parquet last; how many shapes, how many reasons.

    Raises `GenMedError` if no shape is left; reasons.csv then says why.
    """
    reasons = list(left_out)
    good = []
    for id, item, record in finished:
        if record.reason:
            reasons.append(_reason(item, False, record.reason))
            continue
        good.append((id, item, record))
        reasons += [_reason(item, True, note) for note in record.notes]
    same = duplicates([(item, record) for _, item, record in good])
    reasons += [_reason(good[k][1], False, f"the same shape as {good[first][0]}") for k, first in same.items()]
    known = [(good[k][1], good[first][1]) for k, first in same.items()]
    good = [entry for k, entry in enumerate(good) if k not in same]
    flags = implausible([(item, record) for _, item, record in good])
    reasons += [_reason(good[k][1], True, flag) for k, flag in flags.items()]
    _write_csv(out / REASONS, reasons)
    if not good:
        raise GenMedError(f"{out / REASONS}: no shape is left; it says why.")
    parts, notes = divide([item for _, item, _ in good], unseen, seed, known)
    kept = [Kept(*entry, part, flags.get(k, "")) for k, (entry, part) in enumerate(zip(good, parts, strict=True))]
    _write_shards(out / SHARDS, kept)
    rows = index(kept)
    write_bytes(out / "thumbnails.png", thumbnails(kept))
    write_bytes(out / "card.md", card(rows, reasons, notes, command).encode("utf-8"))
    write_bytes(out / INDEX, _parquet(rows))
    return len(rows), sum(not reason.kept for reason in reasons)


def _reason(item: Item, kept: bool, reason: str) -> Reason:
    return Reason(item.source, item.place, f"{item.side} {item.category}".strip(), kept, reason)


def _write_csv(path: Path, reasons: Sequence[Reason]) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["source", "path", "structure", "kept", "reason"])
    for reason in reasons:
        row = asdict(reason)
        writer.writerow([*list(row.values())[:3], "yes" if reason.kept else "no", reason.reason])
    write_bytes(path, stream.getvalue().encode("utf-8"))


# Quality --------------------------------------------------------------------------------------------------


def duplicates(shapes: Sequence[tuple[Item, Record]]) -> dict[int, int]:
    """Numbers of shapes that are there before, with the number of the first.

    Equal are: the same stored distances at the same scale; or, in one category and side, volumes that differ by at
    most 0.5 % and distances that correlate above 0.995 (`correlation`).
    """
    same: dict[int, int] = {}
    first_of: dict[tuple[str, str], int] = {}
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, (item, record) in enumerate(shapes):
        first = first_of.setdefault((record.digest, f"{record.voxel_mm:.4g}"), number)
        if first != number:
            same[number] = first
        else:
            groups[item.category, item.side].append(number)
    for group in groups.values():
        for first, second in _alike([(number, shapes[number][1]) for number in group]):
            if first not in same and second not in same:
                same[second] = first
    return dict(sorted(same.items()))


def _alike(group: Sequence[tuple[int, Record]]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of near duplicates."""
    ordered = sorted(group, key=lambda entry: (_volume(entry[1]), entry[0]))
    volumes = np.array([_volume(record) for _, record in ordered])
    ends = np.searchsorted(volumes, volumes * (1 + SAME_VOLUME), side="right")
    coarse = np.stack([_centred(record.coarse) for _, record in ordered if record.coarse is not None])
    pairs = []
    for k, end in enumerate(ends):
        close = k + 1 + np.flatnonzero(coarse[k + 1 : end] @ coarse[k] > SAME_COARSE)
        for other in close:
            if correlation(ordered[k][1].sdf(), ordered[other][1].sdf()) > SAME_SHAPE:
                low, high = sorted((ordered[k][0], ordered[other][0]))
                pairs.append((low, high))
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of two stored distances, where at least one of them is not truncated."""
    near = (np.abs(first) < STEPS) | (np.abs(second) < STEPS)
    return float(_centred(first[near]) @ _centred(second[near]))


def _centred(values: Any) -> np.ndarray:
    """As a vector of mean 0 and length 1, so that products are correlations."""
    vector = np.asarray(values, dtype=np.float32).ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _volume(record: Record) -> float:
    assert record.measures is not None
    return record.measures.volume_ml


def implausible(shapes: Sequence[tuple[Item, Record]]) -> dict[int, str]:
    """Numbers of shapes whose volume is far from the others of their category, with a line that says so."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, (item, _) in enumerate(shapes):
        groups[item.category].append(number)
    flags = {}
    for category, numbers in groups.items():
        logs = np.log([_volume(shapes[number][1]) for number in numbers])
        middle = float(np.median(logs))
        deviations = np.abs(logs - middle)
        spread = float(np.median(deviations))
        for number, deviation in zip(numbers, deviations, strict=True):
            if deviation > IMPLAUSIBLE * spread > 0:
                volume = f"{_volume(shapes[number][1]):.3g} ml"
                flags[number] = f"volume {volume} is far from the median {np.exp(middle):.3g} ml of {category}"
    return dict(sorted(flags.items()))


# Parts ----------------------------------------------------------------------------------------------------


def divide(
    items: Sequence[Item], unseen: Sequence[str], seed: int, same: Iterable[tuple[Item, Item]] = ()
) -> tuple[list[str], list[str]]:
    """The part of every item, and notes on sources that could not be divided.

    Sources are divided one by one: by their own split where every item has one, else by subject. Subjects that share
    a shape, as pairs of items in `same` say, are one person whatever they are called: all go to the last of their
    parts in the order train, tune, report. Categories in `unseen` are a part of their own, whatever their subject.
    """
    notes: list[str] = []
    part_of: dict[tuple[str, str], str] = {}
    sources: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        sources[item.source].append(item)
    for source, group in sorted(sources.items()):
        if all(item.part for item in group):
            part_of |= {(source, item.subject): item.part for item in group}
            continue
        subjects = {item.subject: item.subject for item in group}
        try:
            chosen = three_way(subjects, seed)
        except GenMedError:
            chosen = {"train": tuple(subjects)}
            notes.append(f"{source} has {len(subjects)} subjects, too few to divide: all of them are in train.")
        part_of |= {(source, subject): part for part, chosen_ones in chosen.items() for subject in chosen_ones}
    groups = _joined(same)
    for persons in groups:
        part = max((part_of[who] for who in persons if who in part_of), key=PARTS.index)
        part_of |= dict.fromkeys(persons, part)
    if groups:
        notes.append(f"{sum(map(len, groups))} subjects share shapes with others: as {len(groups)} persons.")
    parts = ["unseen" if item.category in unseen else part_of[item.source, item.subject] for item in items]
    return parts, notes


def _joined(same: Iterable[tuple[Item, Item]]) -> list[set[tuple[str, str]]]:
    """Sets of (source, subject) that are one person."""
    group_of: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for pair in same:
        persons = {(item.source, item.subject) for item in pair}
        persons = persons.union(*(group_of[who] for who in persons if who in group_of))
        group_of |= dict.fromkeys(persons, persons)
    return [set(persons) for persons in dict.fromkeys(map(frozenset, group_of.values())) if len(persons) > 1]


# Files ----------------------------------------------------------------------------------------------------


def index(kept: Sequence[Kept]) -> list[ShapeRow]:
    """Lines of the index, with captions; terciles come from the training part alone."""
    training: dict[str, list[Facts]] = defaultdict(list)
    for shape in kept:
        if shape.part == "train":
            training[shape.item.category].append(shape.facts)
    terciles = {category: Terciles.of(facts) for category, facts in training.items()}
    rows = []
    for number, shape in enumerate(kept):
        item, record, facts = shape.item, shape.record, shape.facts
        assert record.measures is not None
        seen, held_out = captions(facts, terciles.get(item.category, Terciles(None, None)))
        rows.append(
            ShapeRow(
                id=shape.id,
                category=item.category,
                side=item.side,
                subject=item.subject,
                source=item.source,
                licence=item.licence,
                path=item.place,
                part=shape.part,
                captions=seen,
                held_out_captions=held_out,
                volume_ml=facts.volume_ml,
                extent_mm=facts.extent_mm,
                elongation=record.measures.elongation,
                flatness=record.measures.flatness,
                voxel_mm=record.voxel_mm,
                origin_mm=record.origin_mm,
                flag=shape.flag,
                facts=dict(record.facts),
                shard=f"{number // SHARD:04d}.npy",
                row=number % SHARD,
            )
        )
    return rows


def _write_shards(folder: Path, kept: Sequence[Kept]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(kept), SHARD)):
        shapes = kept[start : start + SHARD]
        size = len(shapes[0].record.sdf())
        path = folder / f"{number:04d}.npy"
        part = folder / f".{path.name}.part"
        shard = np.lib.format.open_memmap(part, mode="w+", dtype=np.int8, shape=(len(shapes), size, size, size))
        for row, shape in enumerate(shapes):
            shard[row] = shape.record.sdf()
        shard.flush()
        os.replace(part, path)


def _parquet(rows: Sequence[ShapeRow]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    text, number, texts = pyarrow.string(), pyarrow.float64(), pyarrow.list_(pyarrow.string())
    types = {
        "captions": texts, "held_out_captions": texts, "origin_mm": pyarrow.list_(number), "row": pyarrow.int32(),
    } | dict.fromkeys(("volume_ml", "extent_mm", "elongation", "flatness", "voxel_mm"), number)  # fmt: skip
    lines = [{**asdict(row), "facts": json.dumps(row.facts, ensure_ascii=False)} for row in rows]
    schema = pyarrow.schema([(name, types.get(name, text)) for name in lines[0]])
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines, schema=schema), stream)
    return stream.getvalue()


def card(rows: Sequence[ShapeRow], reasons: Sequence[Reason], notes: Sequence[str], command: str) -> str:
    """The data card: what is in it, from where, under which licence, and what was left out."""
    parts = [part for part in (*PARTS, "unseen") if any(row.part == part for row in rows)]
    counts = Counter((row.category, row.source, row.part) for row in rows)
    groups = sorted({(category, source) for category, source, _ in counts})
    lines = ["# Shapes", "", f"{len(rows)} shapes of {len({row.category for row in rows})} categories.", ""]
    lines += [f"Made by `{command}`.", ""]
    lines += [
        f"Each is a truncated signed distance (±{TRUNCATION:g} voxels, negative inside, int8 multiples of "
        f"{TRUNCATION:g}/{STEPS}) in a cube of its own: axes R, A, S, {MARGIN:g} times as wide as the longest extent. "
        "`voxel_mm` and `origin_mm` lead back to the source's millimetres.",
        "",
        "```python",
        "from genmed.data.shapes import read_shapes",
        'shapes = read_shapes("this folder")',
        "```",
        "",
        "## Counts",
        "",
        f"| category | source | {' | '.join(parts)} |",
        f"|---|---|{'---|' * len(parts)}",
    ]
    for group in groups:
        lines.append(f"| {' | '.join(group)} | {' | '.join(str(counts[*group, part]) for part in parts)} |")
    total = (str(sum(row.part == part for row in rows)) for part in parts)
    lines += [f"| all | | {' | '.join(total)} |", "", "![one shape of each category](thumbnails.png)", ""]
    lines += ["Parts are divided by subject: nobody is in two of them, but for categories that are `unseen`.", *notes]
    lines += ["", "## Licences", "", "| source | licence |", "|---|---|"]
    licences = sorted({(row.source, row.licence or "not stated") for row in rows})
    lines += [f"| {source} | {licence} |" for source, licence in licences]
    why = Counter(_kind(reason.reason) for reason in reasons if not reason.kept)
    lines += ["", "## Left out", "", f"`{REASONS}` lists every case, and repairs of shapes that were kept.", ""]
    lines += [f"- {count}: {kind}" for kind, count in why.most_common()] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _kind(reason: str) -> str:
    """A reason without the numbers and names that make it a single case's."""
    if reason.startswith("the same shape as"):
        return "the same shape as another one"
    return " ".join("N" if word.rstrip("%").isdigit() else word for word in reason.partition(";")[0].split())[:100]


def thumbnails(kept: Sequence[Kept]) -> bytes:
    """PNG: the shape of middle volume of each category, seen from the front, the patient's right on the left."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Kept]] = defaultdict(list)
    for shape in kept:
        groups[shape.item.category].append(shape)
    chosen = {name: sorted(group, key=lambda s: _volume(s.record))[len(group) // 2] for name, group in groups.items()}
    columns = min(8, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * lines), dpi=100)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (name, shape) in zip(axes, sorted(chosen.items()), strict=False):
        axis.imshow(from_front(decode(shape.record.sdf())), cmap="gray", vmin=0, vmax=1)
        axis.set_title(name if len(name) <= 26 else f"{name[:24]}…", fontsize=6)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def from_front(distance: np.ndarray) -> np.ndarray:
    """A shaded picture (rows from S to I, columns from R to L) of a distance field; the background is white."""
    seen = distance[::-1, ::-1, ::-1].transpose(2, 0, 1)  # rows, columns, depth from A to P
    inside = seen < 0
    hit, depth = inside.any(axis=2), inside.argmax(axis=2)
    normals = np.stack(np.gradient(seen), axis=-1)
    rows, columns = np.indices(hit.shape)
    normal = normals[rows, columns, depth]
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    light = np.array([-0.5, -0.5, -0.7])  # from above, the left and the front
    shade = 0.25 + 0.7 * np.clip(normal @ light, 0, 1)
    return np.where(hit, shade, 1.0)


def categories_of(items: Sequence[Item], wanted: Sequence[str]) -> Mapping[str, str]:
    """Names given by the user -> categories. Raises `GenMedError` for one that no item has."""
    known = sorted({item.category for item in items})
    found = {name: name.strip().lower() for name in wanted}
    for name, plain_name in found.items():
        match = next((category for category in known if category.lower() == plain_name), None)
        if match is None:
            raise GenMedError(f"--unseen: no shape is a '{name}'; there are {', '.join(known[:8])}, ...")
        found[name] = match
    return found
