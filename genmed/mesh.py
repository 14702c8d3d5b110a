"""Surfaces as triangle meshes in mm: read, repair, signed distance to a grid and back, write.

Coordinates are RAS+ throughout: as they stand in the file, but for files that say SPACE=LPS, as 3D Slicer writes them.
Faces turn counter-clockwise when seen from outside.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.volume import Grid

if TYPE_CHECKING:
    import trimesh

LIBRARIES = ("trimesh", "point_cloud_utils", "skimage", "fast_simplification", "pyarrow")
MESH_SUFFIXES = (".stl", ".ply", ".obj", ".vtp", ".glb")
PART_SUFFIXES = (*MESH_SUFFIXES, ".xyz")  # surfaces, or points on one
UNITS_MM = {"mm": 1.0, "cm": 10.0, "m": 1000.0}
SMALLEST_MM, LARGEST_MM = 2.0, 3000.0  # longest extent of an anatomical surface; beyond it the unit must be wrong
MAX_FACES = 50_000  # more changes distances by hundredths of a voxel of 64³ at most, and costs time
MAX_OPEN = 0.2  # share of the surface that may be missing and is closed with flat caps
MIN_FILLED = 1e-5  # share of the bounding cube below which a surface encloses nothing
MAX_SPECKS = 0.05  # share of the volume that may lie in small pieces, which are then dropped
MAX_PIECES = 3  # pieces that may be kept where none of them holds nearly everything
SPACE = re.compile(rb"SPACE=(RAS|LPS)")
HEADER = 4096  # bytes at the start of a file in which its space may be named
BLOCKS = (8, 4, 2, 1)  # voxels along the sides of blocks that are looked at in turn
CLEAR = 0.55  # voxels from the surface: beyond it two neighbours are on the same side


class Triangles(Protocol):
    """Whatever has vertices (v, 3) and triangles (f, 3) of their numbers: a `Mesh`, a `trimesh.Trimesh`."""

    @property
    def vertices(self) -> np.ndarray: ...

    @property
    def faces(self) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Mesh:
    """A triangle surface: `vertices` in mm, `faces` as rows of three vertex numbers."""

    vertices: Float[np.ndarray, "v 3"]
    faces: Int[np.ndarray, "f 3"]

    @property
    def extent_mm(self) -> float:
        """The longest side of the bounding box."""
        return float(np.ptp(self.vertices, axis=0).max())

    @property
    def volume_ml(self) -> float:
        """Enclosed volume by the divergence theorem; negative where faces look inward."""
        return float(_volumes(self.vertices, self.faces).sum() / 1000)

    @cached_property
    def is_closed(self) -> bool:
        """Whether neighbouring faces turn the same way round and leave no hole."""
        return not len(_boundary(self.faces))


def require_libraries() -> None:
    """Raise `GenMedError` where a library of the extra "shapes" is missing."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise GenMedError(
            f"shapes need {', '.join(missing)}; in the repository, run: pip install -c constraints.txt '.[shapes]'"
        )


# Files ----------------------------------------------------------------------------------------------------


def read_mesh(path: str | os.PathLike[str], unit: str = "mm", *, points: bool = False) -> Mesh:
    """Read a surface from STL, PLY, OBJ, VTP or GLB, unrepaired, in mm and RAS+.

    `unit` is that of the file: mm, cm or m. Where the header says SPACE=LPS, as 3D Slicer's does
    (https://discourse.slicer.org/t/10446), x and y are turned; vertices of no face are dropped. Parts of a GLB are
    joined, each in its place. With `points`, a file (also XYZ) may hold vertices alone. Raises `GenMedError` for files
    that hold no triangles, numbers that are not finite, and extents that no anatomical structure has in this unit.
    """
    path = Path(path).expanduser()
    if unit not in UNITS_MM:
        raise GenMedError(f"unit '{unit}' is not known; use {', '.join(UNITS_MM)}.")
    if path.suffix.lower() not in (PART_SUFFIXES if points else MESH_SUFFIXES):
        raise GenMedError(f"{path}: not a surface file; name it {', '.join(MESH_SUFFIXES)}.")
    if not path.is_file():
        raise GenMedError(f"{path}: not found; check the path.")
    vertices, faces, space = _read_vtp(path) if path.suffix.lower() == ".vtp" else _read_trimesh(path)
    if points and not len(vertices):
        raise GenMedError(f"{path}: holds no triangles and no points; export the surface again.")
    if not points and (not len(faces) or not len(vertices)):
        raise GenMedError(f"{path}: holds no triangles; export the surface, not points or lines.")
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise GenMedError(f"{path}: faces name vertices that do not exist; export the surface again.")
    to_mm = UNITS_MM[unit] * np.array([-1.0, -1.0, 1.0] if space == "LPS" else [1.0, 1.0, 1.0])
    mesh = Mesh(np.asarray(vertices, np.float64) * to_mm, np.asarray(faces, np.int64))
    mesh = _subset(mesh, np.ones(len(faces), dtype=bool)) if len(faces) else mesh
    if not np.isfinite(mesh.vertices).all():
        raise GenMedError(f"{path}: coordinates are not finite; export the surface again.")
    extent = mesh.extent_mm
    if not extent:
        raise GenMedError(f"{path}: all of its {len(mesh.vertices)} points lie in one place; export it again.")
    if not SMALLEST_MM <= extent <= LARGEST_MM:
        hint = "metres" if SMALLEST_MM <= extent * 1000 <= LARGEST_MM else "another unit"
        raise GenMedError(
            f"{path}: the longest extent is {extent:.3g} mm, so the file is probably in {hint}; "
            "scale it to mm."
        )
    return mesh


def save_mesh(mesh: Mesh, path: str | os.PathLike[str]) -> Path:
    """Write STL, PLY, OBJ, VTP or GLB, coordinates in mm as they are; the file appears whole or never.

    All but GLB, which has no place for it, say SPACE=RAS, without which 3D Slicer would take them as LPS.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise GenMedError(f"{path}: cannot write this surface file; name it {', '.join(MESH_SUFFIXES)}.")
    if suffix == ".vtp":
        from genmed.vtp import encode

        return write_bytes(path, encode(mesh.vertices, mesh.faces))
    exported: Any = _as_trimesh(mesh).export(file_type=suffix[1:])
    content: bytes = exported if isinstance(exported, bytes) else exported.encode("utf-8")
    if suffix == ".stl":
        content = b"genmed SPACE=RAS".ljust(80) + content[80:]
    elif suffix == ".ply":
        content = content.replace(b"\nelement", b"\ncomment SPACE=RAS\nelement", 1)
    elif suffix == ".obj":
        content = b"# SPACE=RAS\n" + content
    return write_bytes(path, content)


def _read_vtp(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    from genmed.vtp import decode

    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise GenMedError(f"{path}: cannot be read as VTP ({error}); export the surface again.") from error


def _read_trimesh(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    import trimesh

    try:
        with path.open("rb") as stream:
            space = SPACE.search(stream.read(HEADER))
        loaded: Any = trimesh.load_mesh(path, process=False)
        if not len(getattr(loaded, "faces", ())):
            loaded = trimesh.load(path, process=False)  # points, which `load_mesh` leaves out
    except Exception as error:  # trimesh raises whatever its parsers meet in a broken file
        why = " ".join(str(error).split()) or type(error).__name__
        raise GenMedError(f"{path}: cannot be read as a surface ({why}); export it again.") from error
    faces = np.asarray(getattr(loaded, "faces", np.zeros((0, 3), np.int64)))
    return np.asarray(getattr(loaded, "vertices", np.zeros((0, 3)))), faces, space[1].decode() if space else ""


def _as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    import trimesh

    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


# Repair ---------------------------------------------------------------------------------------------------


def repair(mesh: Mesh, max_faces: int = MAX_FACES) -> tuple[Mesh, tuple[str, ...]]:
    """Make a surface closed and outward, and say what was done.

    Merges equal vertices, drops degenerate and repeated faces, decimates above `max_faces`, makes winding
    consistent, closes holes, turns bodies inside out and drops specks. Self-intersections stay: `signed_distance`
    counts everything inside any part. Raises `GenMedError` where more than a fifth of the surface is missing,
    nothing is enclosed, or it falls into many pieces.
    """
    notes: list[str] = []
    mesh = _cleaned(mesh, notes)
    if len(mesh.faces) > max_faces:
        notes.append(f"{len(mesh.faces)} faces decimated to {max_faces}")
        mesh = decimated(mesh, max_faces)
    mesh = _wound(mesh, notes)
    mesh = _closed(mesh, notes)
    mesh, specks = one_structure(mesh)
    notes += specks
    mesh = _outward(mesh, notes)
    if mesh.volume_ml * 1000 < MIN_FILLED * mesh.extent_mm**3:
        raise GenMedError("the surface encloses no volume; give a closed surface of a solid structure.")
    return mesh, tuple(notes)


def merged(mesh: Mesh) -> Mesh:
    """The same surface with equal vertices as one; STL files repeat them for every triangle."""
    surface = _as_trimesh(mesh)
    surface.merge_vertices(merge_tex=True, merge_norm=True)
    return Mesh(np.asarray(surface.vertices, np.float64), np.asarray(surface.faces, np.int64))


def _cleaned(mesh: Mesh, notes: list[str]) -> Mesh:
    surface = _as_trimesh(merged(mesh))
    surface.update_faces(surface.nondegenerate_faces() & surface.unique_faces())
    surface.remove_unreferenced_vertices()
    dropped = len(mesh.faces) - len(surface.faces)
    if not len(surface.faces):
        raise GenMedError("every face is degenerate; give a surface with triangles of some area.")
    if dropped:
        notes.append(f"{dropped} degenerate or repeated faces dropped")
    return Mesh(np.asarray(surface.vertices, np.float64), np.asarray(surface.faces, np.int64))


def decimated(mesh: Triangles, faces: int) -> Mesh:
    """About this many faces by quadric edge collapse (Garland and Heckbert, SIGGRAPH 1997)."""
    import fast_simplification

    vertices = np.asarray(mesh.vertices, np.float64)
    simple = fast_simplification.simplify(vertices, np.asarray(mesh.faces), target_count=faces)
    return Mesh(np.asarray(simple[0], np.float64), np.asarray(simple[1], np.int64))


def _wound(mesh: Mesh, notes: list[str]) -> Mesh:
    """Neighbouring faces turn the same way round."""
    import trimesh

    surface = _as_trimesh(mesh)
    if surface.is_winding_consistent or not len(_boundary(mesh.faces)):
        return mesh
    trimesh.repair.fix_winding(surface)
    faces = np.asarray(surface.faces, np.int64)
    if (turned := int((faces != mesh.faces).any(axis=1).sum())) == 0:
        return mesh
    notes.append(f"{turned} faces turned round")
    return Mesh(mesh.vertices, faces)


def _boundary(faces: np.ndarray) -> np.ndarray:
    """Directed edges (n, 2) that faces run along more often than back: the boundary of the chain of triangles."""
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64)
    low_first = edges[:, 0] < edges[:, 1]
    size = int(edges.max()) + 1
    keys, which = np.unique(edges.min(axis=1) * size + edges.max(axis=1), return_inverse=True)
    pairs = np.column_stack([keys // size, keys % size])
    net = np.bincount(which.ravel(), np.where(low_first, 1, -1), minlength=len(pairs)).astype(int)
    open_ones = np.where((net > 0)[:, None], pairs, pairs[:, ::-1])
    return np.repeat(open_ones, np.abs(net), axis=0)


def _closed(mesh: Mesh, notes: list[str]) -> Mesh:
    """A cap on every hole: triangles from its rim to the middle of the rim, which close the chain exactly."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rim = _boundary(mesh.faces)
    if not len(rim):
        return mesh
    names, local = np.unique(rim, return_inverse=True)
    local = local.reshape(rim.shape)
    graph = coo_array((np.ones(len(rim)), (local[:, 0], local[:, 1])), shape=(len(names), len(names)))
    holes, hole_of = connected_components(graph, directed=False)
    counts = np.bincount(hole_of, minlength=holes)[:, None]
    corners = mesh.vertices[names]
    middles = np.stack([np.bincount(hole_of, corners[:, k], holes) for k in range(3)], axis=1) / counts
    apex = len(mesh.vertices) + hole_of[local[:, 0]]
    caps = np.column_stack([rim[:, ::-1], apex])
    whole = Mesh(np.concatenate([mesh.vertices, middles]), np.concatenate([mesh.faces, caps]))
    areas = _areas(whole)
    share = float(areas[len(mesh.faces) :].sum() / max(areas.sum(), 1e-300))
    if share > MAX_OPEN:
        raise GenMedError(f"the surface is open: {share:.0%} of it is missing, more than {MAX_OPEN:.0%}; close it.")
    notes.append(f"{holes} holes closed ({share:.1%} of the surface)")
    return whole


def one_structure(mesh: Mesh) -> tuple[Mesh, tuple[str, ...]]:
    """The largest body where it holds nearly all of the volume, else up to three; with what lies inside it.

    Raises `GenMedError` where more bodies matter.
    """
    count, piece_of = _pieces(mesh)
    if count == 1:
        return mesh, ()
    sizes = np.abs(np.bincount(piece_of, _volumes(mesh.vertices, mesh.faces), count))
    largest = int(sizes.argmax())
    cavities = _inside(mesh, piece_of, largest)
    bodies = sizes * ~cavities / sizes[~cavities].sum()
    kept = bodies >= MAX_SPECKS / count  # what is smaller cannot add up to more than the specks that may go
    if bodies[largest] >= 1 - MAX_SPECKS:
        kept = np.arange(count) == largest
    if kept.sum() > MAX_PIECES:
        raise GenMedError(
            f"the surface falls into {kept.sum()} pieces, the largest with {bodies[largest]:.0%} of the volume; "
            "give one structure."
        )
    specks = int((~kept & ~cavities).sum())
    notes = (f"{specks} specks dropped",) if specks else ()
    return _subset(mesh, (kept | cavities)[piece_of]), notes


def _outward(mesh: Mesh, notes: list[str]) -> Mesh:
    """Bodies have positive volume; a piece inside the largest one keeps its sense relative to it, as a cavity."""
    count, piece_of = _pieces(mesh)
    volumes = np.bincount(piece_of, _volumes(mesh.vertices, mesh.faces), count)
    largest = int(np.abs(volumes).argmax())
    inward = np.where(_inside(mesh, piece_of, largest), volumes[largest] < 0, volumes < 0)
    if not inward.any():
        return mesh
    notes.append("turned inside out")
    return Mesh(mesh.vertices, np.where(inward[piece_of][:, None], mesh.faces[:, ::-1], mesh.faces))


def _inside(mesh: Mesh, piece_of: np.ndarray, largest: int) -> np.ndarray:
    """Which pieces lie inside the largest one: by a corner of each."""
    corners = mesh.vertices[mesh.faces[np.unique(piece_of, return_index=True)[1], 0]]
    inside = np.abs(winding(_subset(mesh, piece_of == largest), corners)) > 0.5
    inside[largest] = False
    return inside


def _pieces(mesh: Mesh) -> tuple[int, np.ndarray]:
    """How many connected pieces there are, and which one every face belongs to."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = mesh.faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    size = len(mesh.vertices)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(size, size))
    pieces = connected_components(graph, directed=False)[1][mesh.faces[:, 0]]
    names, numbers = np.unique(pieces, return_inverse=True)
    return len(names), numbers.ravel()


def _subset(mesh: Mesh, kept: np.ndarray) -> Mesh:
    names, faces = np.unique(mesh.faces[kept], return_inverse=True)
    return Mesh(mesh.vertices[names], faces.reshape(-1, 3))


def _volumes(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Signed volume of the tetrahedron from the middle of the surface to every face, mm³."""
    a, b, c = (vertices[faces[:, k]] - vertices.mean(axis=0) for k in range(3))
    return np.einsum("ij,ij->i", a, np.cross(b, c)) / 6


def _areas(mesh: Mesh) -> np.ndarray:
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def one_way_round(vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"]) -> Int[np.ndarray, "f 3"]:
    """Faces turned so that neighbours agree, as most of those that are connected did."""
    import trimesh

    surface = trimesh.Trimesh(vertices, faces, process=False)
    if not len(faces) or surface.is_winding_consistent:
        return faces
    trimesh.repair.fix_winding(surface)
    turned = (surface.faces != faces).any(axis=1)
    piece = trimesh.graph.connected_component_labels(surface.face_adjacency, node_count=len(faces))
    mostly = np.bincount(piece, turned) > np.bincount(piece) / 2
    return np.where((turned != mostly[piece])[:, None], faces[:, ::-1], faces)


# Distance -------------------------------------------------------------------------------------------------


def signed_distance(mesh: Mesh, grid: Grid, limit_mm: float = np.inf) -> Float[np.ndarray, "x y z"]:
    """Distance in mm of every voxel centre to the surface, negative inside, clamped to ±`limit_mm`.

    Inside is where the generalised winding number (Jacobson et al., SIGGRAPH 2013; fast form of Barill et al.,
    SIGGRAPH 2018) exceeds one half, so bodies may overlap. Distances are exact; with a limit only voxels that can be
    nearer than it are measured.
    """
    near = _near(mesh, grid, limit_mm) if np.isfinite(limit_mm) else np.ones(grid.shape, dtype=bool)
    distance = np.full(grid.shape, limit_mm, dtype=np.float64)
    distance[near] = np.minimum(_distance(mesh, _centres(np.argwhere(near), grid)), limit_mm)
    inside = winding_on(mesh, grid, distance) > 0.5
    return np.where(inside, -distance, distance).astype(np.float32)


def winding_on(
    mesh: Mesh,
    grid: Grid,
    distance: Float[np.ndarray, "x y z"],
    wanted: Bool[np.ndarray, "x y z"] | None = None,
) -> Float[np.ndarray, "x y z"]:
    """The winding number at voxel centres (0 where not `wanted`), given their distance to the surface in mm.

    The line between neighbours that are both further than half their spacing from a closed surface does not meet it,
    so that a connected set of such voxels shares one number. `distance` may err by a twentieth of a voxel.
    """
    from scipy.ndimage import label

    wanted = np.ones(grid.shape, dtype=bool) if wanted is None else wanted
    clear = wanted & (np.abs(distance) > CLEAR * max(grid.spacing_mm)) & mesh.is_closed
    pieces, count = label(clear)
    alone = np.flatnonzero(wanted & ~clear)
    first = np.zeros(count + 1, dtype=np.intp)
    first[pieces.ravel()[::-1]] = np.arange(pieces.size)[::-1]  # the last one written stays: each piece's first voxel
    asked = np.concatenate([first[1:], alone])
    index = np.stack(np.unravel_index(asked, grid.shape), axis=1)
    numbers = winding(mesh, _centres(index, grid))
    result = np.concatenate([[0.0], numbers[:count]])[pieces]
    result.ravel()[alone] = numbers[count:]
    return np.asarray(result)


def _centres(index: np.ndarray, grid: Grid) -> np.ndarray:
    """World mm of voxel indices (n, 3)."""
    return np.ascontiguousarray(index @ grid.affine[:3, :3].T + grid.affine[:3, 3])


def _near(mesh: Mesh, grid: Grid, limit_mm: float) -> np.ndarray:
    """Which voxels may be nearer than the limit, by the triangle inequality from the middles of ever smaller blocks.

    Only vertices are looked at, which takes a fraction of the time: a point's closest one on a triangle lies at a right
    angle to a corner that is at most L/√3 from it, where L is the longest edge. With the distance s to the closest
    vertex, d² ≥ s² − L²/3.
    """
    import point_cloud_utils

    vertices = np.ascontiguousarray(mesh.vertices, np.float64)
    edges = (vertices[mesh.faces] - vertices[np.roll(mesh.faces, 1, axis=1)]).reshape(-1, 3)
    allowance = float((edges**2).sum(axis=1).max()) / 3
    near = np.ones([-(-n // BLOCKS[0]) for n in grid.shape], dtype=bool)
    for block in BLOCKS:
        radius_mm = np.linalg.norm(np.abs(grid.affine[:3, :3]).sum(axis=1)) * (block - 1) / 2
        centres = _centres(np.argwhere(near) * block + (block - 1) / 2, grid)
        to_vertex = np.ravel(point_cloud_utils.k_nearest_neighbors(centres, vertices, 1)[0]) if len(centres) else 0
        near[near] = to_vertex <= np.sqrt((limit_mm + radius_mm) ** 2 + allowance)
        if block > 1:
            near = near.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return near[tuple(slice(n) for n in grid.shape)]


def _distance(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """Unsigned. point-cloud-utils' own signed distance is not used: it scales by the winding number, wrong in overlaps,
    and its bounds end the process."""
    import point_cloud_utils

    if not len(points):
        return np.zeros(0)
    return np.asarray(point_cloud_utils.closest_points_on_mesh(*_plain(points, mesh.vertices, mesh.faces))[0])


def winding(mesh: Mesh, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
    """The generalised winding number of points in mm: how many bodies each lies in (see `signed_distance`)."""
    import point_cloud_utils

    points, vertices, faces = _plain(points, mesh.vertices, mesh.faces)
    return np.asarray(point_cloud_utils.triangle_soup_fast_winding_number(vertices, faces, points)).ravel()


def _plain(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays as the compiled code wants them: contiguous, of one kind."""
    return (*(np.ascontiguousarray(a, np.float64) for a in (points, vertices)), np.ascontiguousarray(faces, np.int64))


def surface(distance: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> Mesh:
    """The zero level of a distance field (negative inside) by marching cubes (Lewiner et al., 2003), in world mm.

    Closed at the edge of the array too. Raises `GenMedError` where nothing is inside.
    """
    from skimage.measure import marching_cubes

    inside = distance < 0
    if not inside.any():
        raise GenMedError("there is no surface: nothing is inside.")
    outside = float(np.abs(distance).max())
    padded = np.pad(np.asarray(distance, np.float32), 1, constant_values=outside)
    vertices, faces, *_ = marching_cubes(padded, 0.0, gradient_direction="ascent")
    vertices = (vertices.astype(np.float64) - 1) @ affine[:3, :3].T + affine[:3, 3]
    mesh = Mesh(vertices, faces.astype(np.int64))
    return mesh if mesh.volume_ml >= 0 else Mesh(vertices, mesh.faces[:, ::-1])
