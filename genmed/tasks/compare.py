"""`genmed view`: meshes and label maps as the columns of a comparison page, with their figures against a truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from genmed.comparison import COLOURS, MAX_COLUMNS, OBSERVED, PLAIN, REDUNDANT, UNOBSERVED, Column, comparison_page
from genmed.errors import GenMedError
from genmed.files import require_room, write_bytes
from genmed.mesh import MESH_SUFFIXES, Mesh, merged, read_mesh, require_libraries, winding
from genmed.mesh import surface as zero_level
from genmed.metrics import dice
from genmed.shape_metrics import DENSE_POINTS, POINTS, chamfer, sample_surface, to_unit_box, uhd
from genmed.volume import PathLike, Volume, read_labels, require_same_grid

STEPS = 96  # along the longest side of the truth's box, for Dice
LARGEST = 5  # times the truth: beyond, something is wrong, and the voxels would fill the memory
MAX_LABELS = 256  # a file with more values is no label map

NOTES = (
    f"Chamfer compares {POINTS} points on each surface, UHD {DENSE_POINTS}, in coordinates in which the longest side "
    "of the truth's box is 1; both are times 100. Chamfer: the mean squared distance to the closest point of the other "
    "surface, both ways added up.",
    "Dice: the overlap 2|A∩B| / (|A| + |B|) of the volumes, on the voxels of the files where shape and truth share a "
    f"grid, else on a lattice of {STEPS} points along the longest side of the truth.",
)
UHD_NOTES = {
    True: "UHD (unidirectional Hausdorff): the largest distance to the shape from a point of the truth that lies in "
    "what was seen, as in published tables; from any point of it where none does.",
    False: "UHD (unidirectional Hausdorff): the largest distance from any point of the truth to the shape. Published "
    "tables take the points that were seen; these files do not tell which.",
}
Seen = Callable[[Float[np.ndarray, "n 3"]], Bool[np.ndarray, " n"]]  # which points in mm lie in what was seen


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Something as surfaces in mm: a mesh, or a label map with the values of each name ("" for a mesh)."""

    name: str
    content: Mesh | Volume
    values: dict[str, list[int]] = field(default_factory=lambda: {"": []})

    @cached_property
    def mesh(self) -> Mesh:
        """The surface of everything that is not background."""
        if isinstance(self.content, Mesh):
            return self.content
        return surface(self.content.data[0] != 0, self.content.affine)

    def part(self, name: str) -> Mesh:
        """The surface of one name."""
        if isinstance(self.content, Mesh) or len(self.values) == 1:
            return self.mesh
        return surface(np.isin(self.content.data[0], self.values[name]), self.content.affine)


def compare_files(paths: Sequence[PathLike], out: PathLike, truth: PathLike | None = None) -> Path:
    """Write the page that compares meshes (STL, PLY, OBJ, VTP, GLB; in mm) and label maps, one column each.

    With a `truth`, it is the ghost in every column, and Dice, Chamfer ×100 and UHD ×100 stand below the columns.
    Label maps get a colour for each label where there are 2 to 7 of them in all files. Raises `GenMedError` for files
    that are neither, that are empty, or more than five times as large as the truth.
    """
    out, sources = Path(out), [Path(path).expanduser() for path in paths]
    require_page("--out", out)
    if not 1 <= len(sources) <= MAX_COLUMNS:
        raise GenMedError(f"{len(sources)} files were given, a page shows 1 to {MAX_COLUMNS}; make several pages.")
    require_libraries()
    shapes = [read_shape(path) for path in sources]
    whole = read_shape(Path(truth).expanduser()) if truth is not None else None
    page = shapes_page(list(zip(_titles(sources), shapes, strict=True)), whole, title=_heading(shapes, whole))
    return write_bytes(out, page.encode("utf-8", "replace"))  # of a file name that is no text


def shapes_page(
    shapes: Sequence[tuple[str, Surfaces]],
    truth: Surfaces | None,
    *,
    title: str,
    planes: Sequence[Float[np.ndarray, "4 3"]] = (),
    seen: Seen | None = None,
) -> str:
    """The page of shapes with their titles, coloured by label where there are 2 to 7 names, against a truth.

    UHD is that of the truth's points in what was `seen` or, where that is not known, of all.
    """
    names = list(dict.fromkeys(name for _, shape in shapes for name in shape.values if name))
    coloured = 2 <= len(names) <= len(COLOURS)
    return comparison_page(
        [_column(heading, shape, truth, names if coloured else [], seen) for heading, shape in shapes],
        title=title,
        truth=truth.mesh if truth else None,
        planes=planes,
        classes=names if coloured else (),
        notes=_notes(seen) if truth else (),
    )


def completion_page(
    part: Surfaces,
    whole: Surfaces,
    planes: Sequence[Float[np.ndarray, "4 3"]],
    fine_mm: float,
    *,
    doubtful: bool,
    title: str,
    residual_mm: float,
    truth: Surfaces | None = None,
    seen: Seen | None = None,
) -> str:
    """The page of a completion: what was seen of PART beside `whole`, with cutting planes, against a truth.

    The completion is `OBSERVED` within `fine_mm` of what was seen. Of a doubtful part, what lies further outside of the
    completion than that is `REDUNDANT`. UHD is that of the truth's points in what was `seen`.
    """
    kinds = np.full(len(part.mesh.vertices), OBSERVED, np.uint8)
    if doubtful:
        outside = winding(whole.mesh, part.mesh.vertices) < 0.5
        kinds[outside & (_apart(part.mesh.vertices, whole.mesh) > fine_mm)] = REDUNDANT
    completed = np.where(_apart(whole.mesh.vertices, part.mesh) <= fine_mm, OBSERVED, UNOBSERVED).astype(np.uint8)
    first, second = (_column(shape.name, shape, truth, (), seen) for shape in (part, whole))
    figures = {**second.figures, "Residual": f"{residual_mm:.2f} mm"}
    return comparison_page(
        [replace(first, classes=kinds), replace(second, classes=completed, figures=figures)],
        title=title,
        truth=truth.mesh if truth else None,
        planes=planes,
        notes=_notes(seen) if truth else (),
    )


def _notes(seen: Seen | None) -> tuple[str, ...]:
    return (*NOTES, UHD_NOTES[seen is not None])


def _apart(points: Float[np.ndarray, "n 3"], mesh: Mesh) -> Float[np.ndarray, " n"]:
    """Distance of points to a surface, mm."""
    import point_cloud_utils

    vertices, faces = np.ascontiguousarray(mesh.vertices), np.ascontiguousarray(mesh.faces)
    found = point_cloud_utils.closest_points_on_mesh(np.ascontiguousarray(points), vertices, faces)
    return np.asarray(found[0])


def require_page(option: str, path: Path) -> None:
    """Raise `GenMedError` unless a file is named like a web page and can be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise GenMedError(f"{option} {path}: the result is a web page; name it {path.stem or 'page'}.html.")
    require_room(option, path)


def read_truth(page: Path | None, truth: PathLike | None, out: Path) -> Surfaces | None:
    """What `--page` compares with, if anything. Raises `GenMedError` for pages that cannot be made, before any work."""
    if page is not None:
        require_page("--page", page)
        require_libraries()
    if truth is None:
        return None
    path = Path(truth).expanduser()
    if page is None:
        raise GenMedError(f"--truth {path}: is shown on a page; say which with --page FILE.html.")
    if out.resolve() == path.resolve():
        raise GenMedError(f"--out {out}: would overwrite the truth; choose another.")
    return read_shape(path)


def _column(
    title: str, shape: Surfaces, truth: Surfaces | None, names: Sequence[str], seen: Seen | None
) -> Column:
    figures = {**_volume(shape), **(_figures(shape, truth, seen) if truth else {})}
    is_open = truth is not None and not (shape.mesh.is_closed and truth.mesh.is_closed)
    note = "An open surface: Dice is that of what its faces go round, and is approximate." if is_open else ""
    if not names:
        labels = len(shape.values)
        return Column(title, shape.mesh, None, figures, f"{labels} labels, shown as one." if labels > 1 else note)
    parts = [shape.part(name) for name in shape.values]
    classes = np.array([names.index(name) if name else PLAIN for name in shape.values], dtype=np.uint8)
    return Column(title, together(parts), np.repeat(classes, [len(part.vertices) for part in parts]), figures, note)


def together(parts: Sequence[Mesh]) -> Mesh:
    """Several meshes as one."""
    first = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, first, strict=False)])
    return Mesh(np.concatenate([part.vertices for part in parts]), faces)


def _titles(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders as tell the files apart."""
    whole = [path.absolute() for path in paths]

    def title(path: Path) -> str:
        others = [other.parts for other in whole if other != path]
        ends = (path.parts[-count:] for count in range(1, len(path.parts) + 1))
        return "/".join(next(end for end in ends if all(parts[-len(end) :] != end for parts in others)))

    return [title(path) for path in whole]


def _heading(shapes: Sequence[Surfaces], truth: Surfaces | None) -> str:
    first = shapes[0].name if len(shapes) == 1 else f"{len(shapes)} shapes"
    return f"{first}, compared with {truth.name}" if truth else first


# Files to surfaces ----------------------------------------------------------------------------------------


def read_shape(path: Path) -> Surfaces:
    """A mesh by its suffix, else a label map with a surface for each label. Raises `GenMedError` for other files."""
    if path.suffix.lower() in MESH_SUFFIXES:
        return Surfaces(path.name, merged(read_mesh(path)))
    labels = read_labels(path)
    values = np.unique(labels.data)
    if values[0] < 0 or len(values) > MAX_LABELS:
        raise GenMedError(f"{path}: {len(values)} values from {values[0]}: a scan; segment it and give the label map.")
    if not values.any():
        raise GenMedError(f"{path}: an empty label map, every voxel is 0; leave it out.")
    return surfaces_of(path.name, labels)


def surfaces_of(name: str, labels: Volume) -> Surfaces:
    """A label map that is not empty, with a surface for each label."""
    by_name: dict[str, list[int]] = {}
    for value in np.unique(labels.data[labels.data != 0]).tolist():
        by_name.setdefault(labels.label_names.get(value) or f"label {value}", []).append(value)
    return Surfaces(name, labels, by_name)


def surface(mask: Bool[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> Mesh:
    """The surface of a mask that is not empty, in mm, normals outward.

    Marching cubes between the voxel centres, its terraces smoothed without shrinking (Taubin 1995). No vertex moves by
    more than a quarter of a voxel along any axis, so that nothing thin vanishes, unlike in `genmed.shape.surface_of`,
    which is for whole structures alone.
    """
    import trimesh
    from scipy.ndimage import find_objects

    box = find_objects(mask.astype(np.uint8))[0]
    rough = zero_level(0.5 - mask[box], np.eye(4))
    terraced = trimesh.Trimesh(rough.vertices, rough.faces, process=False)
    smooth = trimesh.smoothing.filter_taubin(terraced, lamb=0.5, nu=0.53, iterations=10).vertices
    vertices = rough.vertices + np.clip(smooth - rough.vertices, -0.25, 0.25) + [edge.start for edge in box]
    mirrored = np.linalg.det(affine[:3, :3]) < 0
    return Mesh(vertices @ affine[:3, :3].T + affine[:3, 3], rough.faces[:, ::-1] if mirrored else rough.faces)


# Figures --------------------------------------------------------------------------------------------------


def _volume(shape: Surfaces) -> dict[str, str]:
    """In ml; nothing for open meshes, which have none."""
    if isinstance(shape.content, Volume):
        voxel = abs(float(np.linalg.det(shape.content.affine[:3, :3])))
        return {"Volume": f"{np.count_nonzero(shape.content.data) * voxel / 1000:.3g} ml"}
    return {"Volume": f"{abs(shape.mesh.volume_ml):.3g} ml"} if shape.mesh.is_closed else {}


def _figures(shape: Surfaces, truth: Surfaces, seen: Seen | None) -> dict[str, str]:
    mesh, whole = shape.mesh, truth.mesh
    ratio = mesh.extent_mm / whole.extent_mm
    if ratio > LARGEST:
        raise GenMedError(f"{shape.name}: {ratio:.3g} times as large as the truth {truth.name}; give both in mm.")
    a, b = (to_unit_box(sample_surface(each), whole.vertices) for each in (mesh, whole))
    dense = sample_surface(whole, DENSE_POINTS)
    part = dense if seen is None or not (kept := seen(dense)).any() else dense[kept]
    c, d = (to_unit_box(points, whole.vertices) for points in (part, sample_surface(mesh, DENSE_POINTS)))
    return {
        "Dice": f"{_dice(shape, truth):.3f}",
        "Chamfer ×100": f"{100 * chamfer(a, b):.3g}",
        "UHD ×100" + (", whole truth" if seen is None else ""): f"{100 * uhd(part=c, whole=d):.3g}",
    }


def _dice(shape: Surfaces, truth: Surfaces) -> float:
    if isinstance(shape.content, Volume) and isinstance(truth.content, Volume):
        try:
            require_same_grid(truth.content, shape.content)
            return dice(shape.content.data[0] != 0, truth.content.data[0] != 0)
        except GenMedError:
            pass  # grids differ: compare the surfaces
    return overlap(shape.mesh, truth.mesh)


def overlap(mesh: Mesh, truth: Mesh, steps: int = STEPS) -> float:
    """Dice of two meshes' volumes on points of one lattice, `steps` along the longest side of the truth.

    NaN where neither mesh holds a point: sheets have no volume to compare.
    """
    step = truth.extent_mm / steps
    both = (mesh, truth)  # a lattice round each alone: they may lie metres apart
    lows = [np.floor(each.vertices.min(axis=0) / step).astype(int) for each in both]
    highs = [np.ceil(each.vertices.max(axis=0) / step).astype(int) + 1 for each in both]
    masks = [inside(each, a * step, step, b - a) for each, a, b in zip(both, lows, highs, strict=True)]
    low, high = np.max(lows, axis=0), np.min(highs, axis=0)
    common = 0
    if (low < high).all():
        first, second = (mask[tuple(map(slice, low - a, high - a))] for mask, a in zip(masks, lows, strict=True))
        common = int(np.count_nonzero(first & second))
    size = sum(map(np.count_nonzero, masks))
    return 2 * common / size if size else float("nan")


def inside(
    mesh: Mesh, origin: Float[np.ndarray, " 3"], step: float, shape: Sequence[int]
) -> Bool[np.ndarray, "x y z"]:
    """Which points origin + step * (i, j, k) lie inside of a mesh.

    A point is inside if rays along two of the three axes say so by their winding number: the triangles they cross
    from inside less those from outside. So overlapping pieces are united, and small holes do no harm.
    """
    nudge = 1e-5 * np.array([0.618, 0.414, 0.732])  # a ray along an edge would meet both triangles, or none
    triangles = (mesh.vertices[mesh.faces] - origin) / step + nudge
    votes = np.zeros(tuple(shape), dtype=np.uint8)
    for axis in range(3):
        order = ((axis + 1) % 3, (axis + 2) % 3, axis)
        votes += _inside_along_z(triangles[..., order], [shape[k] for k in order]).transpose(np.argsort(order))
    return votes >= 2


def _inside_along_z(triangles: Float[np.ndarray, "m 3 3"], shape: Sequence[int]) -> Bool[np.ndarray, "x y z"]:
    """Lattice points whose winding number, counted along z from below, is not 0."""
    flat = triangles[..., :2]
    low = np.ceil(flat.min(axis=1)).clip(0).astype(np.int64)
    high = np.floor(flat.max(axis=1)).clip(max=np.array(shape[:2]) - 1).astype(np.int64)
    size = (high - low + 1).clip(0)
    count = size.prod(axis=1)  # of rays through each triangle's box
    of = np.repeat(np.arange(len(triangles)), count)
    number = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    ray = low[of] + np.stack([number // size[of, 1], number % size[of, 1]], axis=1)
    a, b, c = (flat[of, corner] for corner in range(3))
    weights = np.stack([_cross(c - b, ray - b), _cross(a - c, ray - c), _cross(b - a, ray - a)], axis=1)
    area = weights.sum(axis=1)
    hit = (weights * np.sign(area)[:, None] >= 0).all(axis=1) & (area != 0)
    height = (weights[hit] * triangles[of[hit], :, 2]).sum(axis=1) / area[hit]
    above = np.ceil(height).clip(0, shape[2]).astype(np.int64)
    steps = np.array([shape[0], shape[1], shape[2] + 1])
    where = np.ravel_multi_index((ray[hit, 0], ray[hit, 1], above), steps)
    crossings = np.bincount(where, weights=np.sign(area[hit]), minlength=int(steps.prod())).reshape(steps)
    return np.cumsum(crossings, axis=2)[..., :-1] != 0


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
