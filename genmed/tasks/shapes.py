"""`complete_file` and `generate_files`: shapes from files to files, in the words of the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from genmed.comparison import slice_corners
from genmed.cue import AXES, ROOM, Cue, cue_of_distance_map, cue_of_labels, cue_of_points, planes_of, united
from genmed.errors import GenMedError
from genmed.files import require_room, sha256_of, write_bytes, write_json
from genmed.guide import Diverged
from genmed.mesh import (
    PART_SUFFIXES,
    Mesh,
    merged,
    one_way_round,
    read_mesh,
    repair,
    save_mesh,
    signed_distance,
)  # fmt: skip
from genmed.shape import cube
from genmed.shape_model import ShapeModel
from genmed.tasks.compare import Seen, Surfaces, completion_page, read_truth, together
from genmed.tasks.complete import Completion, Progress, complete, generate
from genmed.tasks.region import cue_of_cloud, cue_of_region, seen_at
from genmed.text import embed, stated_ml, understand
from genmed.volume import Volume, read, read_labels, require_same_grid

NIFTI = (".nii.gz", ".nii")
FORMATS = ("stl", "ply", "glb")  # of surfaces that are written
OUT_SUFFIXES = (*NIFTI, *(f".{name}" for name in FORMATS))
MOST = 1000  # shapes that one command generates
USUAL, FAR = 16, 3.0  # shapes drawn to see what volumes are usual; times these, others are believed
ACROSS = 80  # points across a section of a mesh


def complete_file(
    model: ShapeModel,
    part: str | Path,
    out: str | Path,
    *,
    planes: str | None = None,
    observed: str | Path | None = None,
    text: str | None = None,
    doubtful: bool = False,
    distances: bool = False,
    samples: int = 12,
    seed: int = 0,
    probabilities: bool = False,
    page: str | Path | None = None,
    truth: str | Path | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Complete a binary label map, a surface or points on one; write a label map or a surface, and a manifest.

    With planes or a mask, everything else of PART is unseen, and seen voxels come back as they were, unless the cue is
    `doubtful`. Without both, all of PART is seen and none of it is trusted to the voxel; a surface is repaired, of
    which a fifth may be missing. With `distances`, the voxels of PART are signed distances in mm instead of labels,
    negative inside. `probabilities` writes the share of samples in every voxel, too. `page` is an HTML page of what was
    seen beside its completion, and how far both are from the `truth`, if there is one. Returns what the manifest says.
    Raises `GenMedError`.
    """
    part, out = Path(part).expanduser(), Path(out).expanduser()
    suffix = next((s for s in OUT_SUFFIXES if out.name.lower().endswith(s)), None)
    if suffix is None:
        raise GenMedError(f"--out {out}: cannot write this; name it {', '.join(OUT_SUFFIXES)}.")
    if probabilities and suffix not in NIFTI:
        raise GenMedError(f"--probabilities: have no place beside a surface; name --out {out.stem}.nii.gz.")
    chances = out.with_name(out.name[: -len(suffix)] + ".probabilities.nii.gz") if probabilities else None
    for given in (part, None if observed is None else Path(observed).expanduser()):
        if given is not None and given.resolve() in (out.resolve(), chances and chances.resolve()):
            raise GenMedError(f"--out {out}: would overwrite the input; choose another.")
    if samples < 1 or seed < 0:
        raise GenMedError(f"--samples {samples} --seed {seed}: samples must be 1 or more, the seed 0 or more.")
    require_room("--out", out)
    page = None if page is None else Path(page).expanduser()
    whole = read_truth(page, truth, out)
    warning, embedding = words(model, text)
    wanted = parse_planes(planes)
    label, seen, surface = None, None, None
    repairs: tuple[str, ...] = ()
    if part.suffix.lower() in PART_SUFFIXES:
        if distances:
            raise GenMedError(f"{part}: holds a surface or points; --distances is for a NIfTI file, leave it out.")
        cue, surface, repairs = _mesh_cue(part, wanted, observed, doubtful, seed)
    else:
        label, seen, cue = _map_cue(part, wanted, observed, doubtful, distances, seed)
    try:
        found = complete(model, cue, text=embedding, samples=samples, seed=seed, progress=progress)
    except GenMedError as error:
        raise GenMedError(f"{part}: {error}") from error
    except Diverged as error:
        raise GenMedError(f"{part}: the completion diverged ({error}); show more of it, or another --seed.") from error
    if found.unlike:
        cue = replace(cue, doubtful=False)
        unlike = "nothing that this model knows is like it: what was seen is kept, matter in excess, too"
        warning = "; ".join(filter(None, (warning, unlike)))
    facts = {
        "command": command,
        "genmed": version("genmed"),
        "part": str(part),
        "part_sha256": sha256_of(part) if part.is_file() else "",
        "model": model.plan.name,
        "weights_sha256": model.sha256,
        "repairs": list(repairs),
        "planes": {name: list(values) for name, values in wanted.items()},
        "doubtful": cue.doubtful,
        "unlike": found.unlike,
        "distances": distances,
        "text": text if embedding is not None else None,
        "warning": warning,
        "scale_known": found.shapes[0].scaled,
        "samples": samples,
        "seed": seed,
        "residual_mm": round(found.residual, 4),
        "volume_ml": None if found.volume_ml is None else found.volume_ml._asdict(),
        "seconds": round(found.seconds, 2),
        "out": str(out),
        "probabilities": None if chances is None else str(chances),
        "page": None if page is None else str(page),
        "truth": None if truth is None else str(truth),
    }
    made, chance = _made(found, label, seen, cue, suffix)
    looked = _looked_at(label, seen, cue, wanted, observed)
    html = "" if page is None else _page(made, label, seen, surface, cue, wanted, whole, looked, part.name, facts)
    if chances is not None and chance is not None:
        chance.save(chances)
    if isinstance(made, Volume):
        made.save(out)
    else:
        save_mesh(made, out)
    if page is not None:
        write_bytes(page, html.encode("utf-8", "replace"))
    write_json(out.with_name(out.name[: -len(suffix)] + ".manifest.json"), facts)
    return facts


def generate_files(
    model: ShapeModel,
    out: str | Path,
    count: int,
    *,
    text: str | None = None,
    volume_ml: float | None = None,
    seed: int = 0,
    format: str = "stl",
    command: str = "",
) -> dict[str, Any]:
    """Draw shapes and write them as surfaces around the origin, with generated.json; returns what that says.

    Without a `volume_ml`, it is that which the text states, if it states one. Coordinates are mm; `format` is one of
    `FORMATS`. Shapes that an earlier generated.json lists are replaced, and
    deleted where fewer, or others, are drawn now. Raises `GenMedError`.
    """
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise GenMedError(f"--out {out}: is a file; give a folder.")
    if not 1 <= count <= MOST or seed < 0:
        raise GenMedError(f"-n {count} --seed {seed}: give 1 to {MOST} shapes and a seed of 0 or more.")
    if format not in FORMATS:
        raise GenMedError(f"--format {format}: unknown; choose {', '.join(FORMATS)}.")
    if volume_ml is not None and not 0 < volume_ml < float("inf"):
        raise GenMedError(f"--volume {volume_ml:g}: must be above 0, in ml.")
    require_room("--out", out / "generated.json")
    warning, embedding = words(model, text)
    if volume_ml is None and text is not None and embedding is not None:
        volume_ml = stated_ml(text)
    rows: list[dict[str, Any]] = []
    before = _generated(out)
    try:
        shapes = generate(model, count, text=embedding, volume_ml=volume_ml, seed=seed)
    except Diverged as error:
        raise GenMedError(f"no shapes of {volume_ml:g} ml were found ({error}); choose another volume.") from error
    if volume_ml is not None and (far := far_from_usual(model, embedding, volume_ml, seed)):
        warning = "; ".join(filter(None, (warning, far)))
    for number, shape in enumerate(shapes):
        try:
            mesh = shape.to_mesh()
        except GenMedError:
            rows.append({"file": None, "volume_ml": 0.0, "extent_mm": 0.0})  # a rare draw that encloses nothing
            continue
        path = save_mesh(mesh, out / f"shape-{number:04d}.{format}")
        sizes = (round(mesh.volume_ml, 3), round(mesh.extent_mm, 2)) if shape.scaled else (None, None)
        rows.append({"file": path.name, "volume_ml": sizes[0], "extent_mm": sizes[1]})
    facts = {
        "command": command,
        "genmed": version("genmed"),
        "model": model.plan.name,
        "weights_sha256": model.sha256,
        "text": text if embedding is not None else None,
        "warning": warning,
        "asked_ml": volume_ml,
        "scale_known": all(row["volume_ml"] is not None for row in rows),
        "seed": seed,
        "shapes": rows,
    }
    write_json(out / "generated.json", facts)
    for name in before - {row["file"] for row in rows}:
        (out / name).unlink(missing_ok=True)
    return facts


def far_from_usual(model: ShapeModel, text: Float[Tensor, " e"] | None, volume_ml: float, seed: int = 0) -> str:
    """What to say of a volume unlike those of shapes that are drawn without one; nothing where it is like them."""
    volumes = [shape.volume_ml for shape in generate(model, USUAL, text=text, seed=seed)]
    low, high = (float(f"{x:.2g}") for x in np.quantile(volumes, [0.1, 0.9]))
    if low / FAR <= volume_ml <= high * FAR:
        return ""
    return f"shapes of {volume_ml:g} ml are not known, usual ones hold {low:g} to {high:g} ml: these are stretched"


def _generated(folder: Path) -> set[str]:
    """Files that the generated.json of a folder lists."""
    try:
        rows = json.loads((folder / "generated.json").read_text("utf-8"))["shapes"]
        ours = re.compile(rf"shape-\d{{4}}\.({'|'.join(FORMATS)})")
        return {row["file"] for row in rows if ours.fullmatch(row["file"] or "")}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def words(model: ShapeModel, text: str | None) -> tuple[str, Any]:
    """A warning, or nothing, and the sentence embedding of a text that names one known structure, or None.

    Of a text whose side is all that is wrong, the structure's name is taken.
    """
    if text is None:
        return "", None
    named = understand(text, model.plan.categories)
    if isinstance(named, str):
        other = understand(re.sub(r"(?i)\b(left|right)\b", "", text), model.plan.categories)
        if isinstance(other, str):
            return f'"{text}" {named}; going on without text', None
        return f'"{text}" {named}; going on with "{other.category}"', embed([other.category])[0]
    return "", embed([text])[0]


def parse_planes(text: str | None) -> dict[str, list[float]]:
    """`axial=30,axial=40,coronal=52` as numbers by orientation. Raises `GenMedError` for anything else."""
    found: dict[str, list[float]] = {}
    for entry in [] if text is None else text.split(","):
        match = re.fullmatch(r"\s*(axial|coronal|sagittal)\s*=\s*(-?\d+(?:\.\d+)?)\s*", entry)
        if match is None:
            raise GenMedError(f"--planes {text!r}: {entry!r} is no plane; write axial=40,coronal=52,sagittal=48.")
        found.setdefault(match[1], []).append(float(match[2]))
    return found


def _mesh_cue(
    part: Path, planes: Mapping[str, Sequence[float]], observed: str | Path | None, doubtful: bool, seed: int
) -> tuple[Cue, Mesh, tuple[str, ...]]:
    """The cue, the surface that was seen, and what had to be repaired."""
    mesh = read_mesh(part, points=True)
    if not len(mesh.faces) and (planes or observed is not None):
        raise GenMedError(f"{part}: holds points, all of which count; leave out --planes and --observed.")
    mask = None if observed is None else read_labels(observed)
    try:
        if not len(mesh.faces):
            return *cue_of_cloud(mesh.vertices, seed=seed), ()
        if planes or mask is not None:
            seen = [cue_of_sections(mesh, planes, doubtful=doubtful, seed=seed)] if planes else []
            seen += [cue_of_region(mesh, mask, doubtful=doubtful, seed=seed)] if mask is not None else []
            cues, shown = zip(*seen, strict=True)
            return reduce(united, cues), together(shown), ()
        mesh, repairs = repair(mesh)
        grid = cube(mesh, 64)
        cue = cue_of_labels(signed_distance(mesh, grid) < 0, grid.affine, doubtful=True, seed=seed)
        return cue, mesh, repairs
    except GenMedError as error:
        raise GenMedError(f"{part}: {error}") from error


def cue_of_sections(
    mesh: Mesh, planes_mm: Mapping[str, Sequence[float]], *, doubtful: bool = False, seed: int = 0
) -> tuple[Cue, Mesh]:
    """The cue of a surface that was cut by planes at world positions in mm, and ribbons along the sections.

    Nothing outside the planes is looked at. Inside is, within each plane, where the generalised winding number
    (Jacobson et al., SIGGRAPH 2013) of the outline exceeds one half either way round, so that gaps and surfaces that
    look inward do no harm. A plane that misses the surface, but not by much, shows emptiness. Raises `GenMedError`
    where no plane meets the surface.
    """
    mesh = merged(mesh)
    cuts = [(AXES[name], at, section(mesh, AXES[name], at)) for name, places in planes_mm.items() for at in places]
    met = [lines for _, _, lines in cuts if len(lines)]
    if not met:
        raise GenMedError("the cue is empty: no plane meets the surface; give positions in mm between its ends.")
    extent = max(float(np.ptp(lines, axis=(0, 1)).max()) for lines in met)
    step, room = extent / ACROSS, extent * ROOM
    ends = np.concatenate(met).reshape(-1, 3)
    points, inside = [], []
    for axis, at, lines in cuts:
        low, high = (f(lines if len(lines) else ends[None], axis=(0, 1)) for f in (np.min, np.max))
        if not len(lines) and not low[axis] - room <= at <= high[axis] + room:
            continue
        sides = [np.arange(low[k] - room, high[k] + room, step) if k != axis else np.array([at]) for k in range(3)]
        points.append(np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 3))
        near = ((points[-1] >= low) & (points[-1] <= high))[:, np.arange(3) != axis].all(axis=1) & (len(lines) > 0)
        inside.append(near)
        inside[-1][near] = np.abs(_turns(np.delete(lines, axis, 2), np.delete(points[-1][near], axis, 1))) > 0.5
    cue = cue_of_points(np.concatenate(points), np.concatenate(inside), step, doubtful=doubtful, seed=seed)
    return cue, _ribbons([(axis, lines) for axis, _, lines in cuts if len(lines)], step)


def section(mesh: Mesh, axis: int, at: float) -> Float[np.ndarray, "n 2 3"]:
    """Line segments in which triangles meet the plane where a world axis is `at` mm, all turning the same way round."""
    above = mesh.vertices[:, axis] > at
    met = above[mesh.faces].any(axis=1) & ~above[mesh.faces].all(axis=1)
    first = one_way_round(mesh.vertices, mesh.faces[met])
    second = np.roll(first, -1, axis=1)
    ends = []
    for side in (False, True):  # every triangle goes up through the plane along one edge, and down along another
        crossing = (above[first] == side) & (above[second] != side)
        a, b = mesh.vertices[first[crossing]], mesh.vertices[second[crossing]]
        ends.append(a + (b - a) * ((at - a[:, axis]) / (b - a)[:, axis])[:, None])
    return np.stack(ends, axis=1)


def _turns(lines: Float[np.ndarray, "n 2 2"], points: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, " m"]:
    """How often line segments go round points of their plane."""
    angles = np.empty(len(points))
    for number, point in enumerate(points):
        a, b = (lines[:, end] - point for end in (0, 1))
        angles[number] = np.arctan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(axis=1)).sum()
    return angles / (2 * np.pi)


def _ribbons(sections: Sequence[tuple[int, np.ndarray]], height_mm: float) -> Mesh:
    """A strip across its plane for every line segment."""
    corners = []
    for axis, lines in sections:
        across = height_mm / 2 * np.eye(3)[axis]
        corners.append(np.stack([lines - across, lines[:, ::-1] + across], axis=1).reshape(-1, 4, 3))
    vertices = np.concatenate(corners).reshape(-1, 3)
    quads = np.arange(len(vertices)).reshape(-1, 4)
    return Mesh(vertices, quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3))


def _map_cue(
    part: Path,
    planes: Mapping[str, Sequence[float]],
    observed: str | Path | None,
    doubtful: bool,
    distances: bool,
    seed: int,
) -> tuple[Volume, Bool[np.ndarray, "x y z"] | None, Cue]:
    """The label map, which voxels of it were seen (None: all), and the cue of it or of the distances in PART."""
    given = read(part, finite=False)  # what was not seen may be anything
    if given.data.shape[0] != 1:
        raise GenMedError(f"{part}: {given.data.shape[0]} channels; a label map or distances have one.")
    seen: Bool[np.ndarray, "x y z"] | None = None
    if planes:
        if any(value != int(value) for values in planes.values() for value in values):
            raise GenMedError(f"{part}: planes of voxels are whole numbers, the indices of slices.")
        seen = planes_of(given, {name: [int(v) for v in values] for name, values in planes.items()})
    if observed is not None:
        mask = read_labels(observed)
        require_same_grid(given, mask)
        seen = (mask.data[0] != 0) if seen is None else seen | (mask.data[0] != 0)
    (_require_distances if distances else _require_one_structure)(part, given.data[0], seen)
    doubtful |= seen is None
    label = given.like((given.data < 0 if distances else given.data != 0).astype(np.uint8))
    try:
        if distances:
            return label, seen, cue_of_distance_map(given.data[0], given.affine, seen, doubtful=doubtful, seed=seed)
        return label, seen, cue_of_labels(label.data[0] != 0, label.affine, seen, doubtful=doubtful, seed=seed)
    except GenMedError as error:
        raise GenMedError(f"{part}: {error}") from error


def _require_finite(part: Path, values: np.ndarray) -> None:
    if missing := np.count_nonzero(~np.isfinite(values)):
        raise GenMedError(f"{part}: {missing} of {values.size} seen voxels are NaN or infinite; leave them unseen.")


def _require_one_structure(part: Path, data: np.ndarray, seen: np.ndarray | None) -> None:
    """Raise `GenMedError` unless the voxels that were seen are 0 and one label."""
    shown = data if seen is None else data[seen]
    _require_finite(part, shown)
    values = np.unique(shown)
    if (fractions := values[values != np.rint(values)]).size:
        raise GenMedError(
            f"{part}: values such as {fractions[0]:g} are not labels; save whole numbers, or give --distances if they "
            "are signed distances in mm."
        )
    if len(labels := values[values != 0].astype(int).tolist()) > 1:
        raise GenMedError(f"{part}: holds several labels ({labels[:5]}); give one structure.")


def _require_distances(part: Path, data: np.ndarray, seen: np.ndarray | None) -> None:
    """Raise `GenMedError` unless the voxels that were seen may be distances, negative inside.

    A map that is negative on all of its faces and not in between has the other sign.
    """
    shown = data if seen is None else data[seen]
    _require_finite(part, shown)
    core = np.zeros(data.shape, bool)
    core[1:-1, 1:-1, 1:-1] = True
    turned = seen is None and (data[~core] < 0).all() and (data[core] > 0).any()
    if turned or not (shown < 0).any():
        raise GenMedError(f"{part}: no signed distances; they are negative inside and positive outside, turn the sign.")


def _made(
    found: Completion, label: Volume | None, seen: Bool[np.ndarray, "x y z"] | None, cue: Cue, suffix: str
) -> tuple[Volume | Mesh, Volume | None]:
    """The result as it is written, and of a label map the probabilities that it is made of."""
    if suffix not in NIFTI:
        return found.mesh(), None
    if label is None:  # of a surface, no voxel was seen
        grid = found.shapes[0].grid
        chance, label = found.probability(grid), Volume(np.zeros((1, *grid.shape), np.uint8), grid.affine)
    else:
        chance = found.probability(label.grid)
        if not cue.doubtful:
            chance = np.where(True if seen is None else seen, label.data[0] != 0, chance)
    return label.like((chance > 0.5).astype(np.uint8)), label.like(chance.astype(np.float32))


def _page(
    made: Volume | Mesh,
    label: Volume | None,
    seen: Bool[np.ndarray, "x y z"] | None,
    surface: Mesh | None,
    cue: Cue,
    planes: Mapping[str, Sequence[float]],
    truth: Surfaces | None,
    looked: Seen,
    name: str,
    facts: Mapping[str, Any],
) -> str:
    """What was seen, of a label map or a surface, beside the result."""
    from nibabel.orientations import io_orientation

    if isinstance(made, Volume) and not made.data.any():
        raise GenMedError(f"{name}: the completion holds no voxel, so there is nothing to show; leave out --page.")
    shown: Volume | Mesh | None = surface
    affine, axes = np.eye(4), AXES
    if label is not None:
        inside = label.data[0] != 0
        shown = label.like((inside if seen is None else inside & seen).astype(np.uint8))
        affine, world = label.affine, io_orientation(label.affine)[:, 0].astype(int).tolist()
        axes = {plane: world.index(axis) for plane, axis in AXES.items()}
    assert shown is not None
    part, whole = Surfaces("What was seen", shown), Surfaces("Completed", made)
    places = [(axes[plane], at) for plane, several in planes.items() for at in several]
    corners = [slice_corners(affine, axis, at, whole.mesh.vertices) for axis, at in places]
    return completion_page(
        part, whole, corners, cue.voxel_mm,
        doubtful=cue.doubtful, title=f"{name}, completed", residual_mm=facts["residual_mm"], truth=truth,
        seen=looked,
    )  # fmt: skip


def _looked_at(
    label: Volume | None,
    seen: Bool[np.ndarray, "x y z"] | None,
    cue: Cue,
    planes: Mapping[str, Sequence[float]],
    observed: str | Path | None,
) -> Seen:
    """Which points lie in seen voxels or, of a surface, in the mask or within half a step of a plane; else all do."""

    def looked(points: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        if label is not None:
            return np.ones(len(points), bool) if seen is None else seen_at(points, seen, label.affine)[0]
        cuts = [(AXES[name], at) for name, several in planes.items() for at in several]
        found = [np.abs(points[:, axis] - at) <= cue.voxel_mm / 2 for axis, at in cuts]
        if observed is not None:
            mask = read_labels(observed)
            found.append(seen_at(points, mask.data[0] != 0, mask.affine)[0])
        return np.any(found, axis=0) if found else np.ones(len(points), bool)

    return looked
