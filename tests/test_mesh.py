"""Exact answers on balls and boxes, broken on purpose."""

import base64
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from genmed.errors import GenMedError
from genmed.mesh import MESH_SUFFIXES, Mesh, _distance, read_mesh, repair, save_mesh, signed_distance, surface, winding
from genmed.volume import Grid


def ball(radius_mm: float = 10.0, at: tuple[float, float, float] = (0, 0, 0), detail: int = 4) -> Mesh:
    sphere = trimesh.creation.icosphere(detail, radius_mm)
    return Mesh(np.asarray(sphere.vertices) + at, np.asarray(sphere.faces))


def box(sides: tuple[float, float, float] = (20.0, 10.0, 6.0)) -> Mesh:
    cuboid = trimesh.creation.box(sides)
    return Mesh(np.asarray(cuboid.vertices), np.asarray(cuboid.faces))


def together(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))


def moved(mesh: Mesh, by_mm: float) -> Mesh:
    return Mesh(mesh.vertices + np.array([by_mm, 0, 0]), mesh.faces)


def flipped(mesh: Mesh) -> Mesh:
    return Mesh(mesh.vertices, mesh.faces[:, ::-1])


def grid(n: int = 24, voxel_mm: float = 1.2, start_mm: float = -14.0) -> Grid:
    affine = np.diag([voxel_mm] * 3 + [1.0])
    affine[:3, 3] = start_mm
    return Grid((n, n, n), affine)


def centres(grid: Grid) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    return index @ grid.affine[:3, :3].T + grid.affine[:3, 3]


# Files


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_surfaces_come_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    mesh = ball(at=(100.0, -40.0, 12.5), detail=2)
    back, _ = repair(read_mesh(save_mesh(mesh, tmp_path / f"ball{suffix}")))
    assert len(back.faces) == len(mesh.faces)
    assert back.volume_ml == pytest.approx(mesh.volume_ml, rel=1e-5)
    np.testing.assert_allclose(back.vertices.min(axis=0), mesh.vertices.min(axis=0), atol=1e-4)


@pytest.mark.parametrize("suffix", [s for s in MESH_SUFFIXES if s != ".glb"])
def test_files_that_say_lps_are_turned_and_ours_say_ras(tmp_path: Path, suffix: str) -> None:
    """As 3D Slicer writes them, and reads them: without a word it takes LPS."""
    mesh = ball(at=(100.0, -40.0, 12.5), detail=2)
    path = save_mesh(mesh, tmp_path / f"ours{suffix}")
    content = path.read_bytes()
    space, other = (b"82 65 83 0", b"76 80 83 0") if suffix == ".vtp" else (b"SPACE=RAS", b"SPACE=LPS")
    assert content.count(space) == 1
    path.write_bytes(content.replace(space, other))
    turned = read_mesh(path)
    np.testing.assert_allclose(turned.vertices.mean(axis=0), [-100, 40, 12.5], atol=1e-3)
    assert turned.volume_ml == pytest.approx(mesh.volume_ml, rel=1e-5)


@pytest.mark.parametrize("space", ["SPACE=LPS", "SPACE=RAS", "no word of it"])
@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("segment.stl", "solid 3D Slicer output. {}"),
        ("segment.ply", "ply\nformat ascii 1.0\ncomment VTK generated PLY File\ncomment {}"),
        ("segment.obj", "# 3D Slicer output. {}\n\nmtllib segment.mtl"),
    ],
)
def test_text_files_of_slicer_lie_where_they_say(tmp_path: Path, name: str, header: str, space: str) -> None:
    """Headers as vtkMRMLModelStorageNode has VTK's writers put them; a file that says nothing is RAS."""
    mesh = _as_trimesh(ball(at=(100.0, -40.0, 12.5), detail=1))
    content, start = {
        ".stl": (mesh.export(file_type="stl_ascii"), "\n"),
        ".ply": (mesh.export(file_type="ply", encoding="ascii").decode(), "\nelement"),
        ".obj": (mesh.export(file_type="obj"), "\nv "),
    }[name[-4:]]
    (tmp_path / name).write_text(header.format(space) + content[content.index(start) :])
    x, y, z = mesh.center_mass * ([-1, -1, 1] if space == "SPACE=LPS" else [1, 1, 1])
    back = _as_trimesh(read_mesh(tmp_path / name))
    np.testing.assert_allclose(back.center_mass, [x, y, z], atol=1e-3)
    assert back.volume == pytest.approx(mesh.volume, rel=1e-4)


def test_vertices_of_no_face_do_not_count(tmp_path: Path) -> None:
    mesh = ball(detail=1)
    lines = [*(f"v {x} {y} {z}" for x, y, z in [(5e5, 0, 0), ("nan", 0, 0), *mesh.vertices])]
    path = tmp_path / "a.obj"
    path.write_text("\n".join([*lines, *(f"f {a + 3} {b + 3} {c + 3}" for a, b, c in mesh.faces)]))
    assert read_mesh(path).extent_mm == pytest.approx(mesh.extent_mm)


def test_glb_holds_the_same_millimetres_and_triangles(tmp_path: Path) -> None:
    mesh = ball(at=(100.0, -40.0, 12.5), detail=2)
    back = read_mesh(save_mesh(mesh, tmp_path / "ball.glb"))
    np.testing.assert_array_equal(back.vertices, mesh.vertices.astype(np.float32))
    np.testing.assert_array_equal(back.faces, mesh.faces)
    again = read_mesh(save_mesh(back, tmp_path / "again.glb"))
    np.testing.assert_array_equal(again.vertices, back.vertices)


def test_parts_of_a_glb_are_joined_where_its_scene_puts_them(tmp_path: Path) -> None:
    moved_by = trimesh.transformations.translation_matrix((100, -40, 12.5))
    scene = trimesh.Scene(_as_trimesh(box()))
    scene.add_geometry(_as_trimesh(ball(5.0)), transform=moved_by)
    (tmp_path / "two.glb").write_bytes(scene.export(file_type="glb"))
    back = read_mesh(tmp_path / "two.glb")
    np.testing.assert_allclose(back.vertices.min(axis=0), [-10, -45, -3], atol=1e-4)
    np.testing.assert_allclose(back.vertices.max(axis=0), [105, 5, 17.5], atol=1e-4)


def vtk_file(mesh: Mesh, appended: str | None, compressed: bool, order: str = "<") -> bytes:
    """As VTK writes it: binary arrays inline or appended, plain or in zlib blocks, 64 bit headers, big endian too."""
    arrays = [mesh.vertices.astype(f"{order}f4"), mesh.faces.astype(f"{order}i8")]
    arrays += [(3 * np.arange(1, len(mesh.faces) + 1)).astype(f"{order}i8"), np.frombuffer(b"LPS\0", np.uint8)]
    streams = []
    for array in arrays:
        data = array.tobytes()
        if compressed:
            blocks = [zlib.compress(data[k : k + 1000]) for k in range(0, len(data), 1000)]
            head = struct.pack(f"{order}{3 + len(blocks)}Q", len(blocks), 1000, len(data) % 1000, *map(len, blocks))
            parts = [head, b"".join(blocks)]
        else:
            parts = [struct.pack(f"{order}Q", len(data)) + data]
        streams.append(b"".join(parts) if appended == "raw" else b"".join(map(base64.b64encode, parts)))
    offsets = np.cumsum([0, *map(len, streams)])
    names = [("Points", "Float32"), ("connectivity", "Int64"), ("offsets", "Int64"), ("SPACE", "String")]
    elements = []
    for (name, kind), stream, offset in zip(names, streams, offsets, strict=False):
        start = f'<DataArray type="{kind}" Name="{name}"'
        inline = f'{start} format="binary">{stream.decode("latin-1")}</DataArray>'
        elements.append(f'{start} format="appended" offset="{offset}"/>' if appended else inline)
    compressor = ' compressor="vtkZLibDataCompressor"' if compressed else ""
    byte_order = "LittleEndian" if order == "<" else "BigEndian"
    text = (
        f'<VTKFile type="PolyData" byte_order="{byte_order}" header_type="UInt64"{compressor}><PolyData>'
        f"<FieldData>{elements[3].replace('DataArray', 'Array')}</FieldData>"
        f'<Piece NumberOfPoints="{len(mesh.vertices)}" NumberOfPolys="{len(mesh.faces)}"><Points>{elements[0]}</Points>'
        f"<Polys>{elements[1]}{elements[2]}</Polys></Piece></PolyData>"
    ).encode()
    if appended:
        text += f'<AppendedData encoding="{appended}">_'.encode() + b"".join(streams) + b"</AppendedData>"
    return text + b"</VTKFile>"


@pytest.mark.parametrize("appended", [None, "base64", "raw"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_vtp_is_read_however_vtk_stored_it(tmp_path: Path, appended: str | None, compressed: bool, order: str) -> None:
    mesh = ball(detail=3)
    path = tmp_path / "ball.vtp"
    path.write_bytes(vtk_file(mesh, appended, compressed, order))
    back = read_mesh(path)
    np.testing.assert_array_equal(back.faces, mesh.faces)
    np.testing.assert_allclose(back.vertices, mesh.vertices * [-1, -1, 1], atol=1e-5)  # it says LPS


def test_polygons_of_a_vtp_become_triangles(tmp_path: Path) -> None:
    path = tmp_path / "cube.vtp"
    corners = " ".join(f"{x} {y} {z}" for z in (0, 10) for y in (0, 10) for x in (0, 10))
    squares = "0 2 3 1  4 5 7 6  0 1 5 4  2 6 7 3  0 4 6 2  1 3 7 5"
    path.write_text(
        '<VTKFile type="PolyData"><PolyData><Piece><Points><DataArray type="Float64" Name="Points">'
        f'{corners}</DataArray></Points><Polys><DataArray type="Int32" Name="connectivity">{squares}</DataArray>'
        '<DataArray type="Int32" Name="offsets">4 8 12 16 20 24</DataArray></Polys></Piece></PolyData></VTKFile>'
    )
    assert read_mesh(path).volume_ml == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.stl", b"", "cannot be read|no triangles"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
                  b"end_header\n0 0 0\n", "no triangles"),
        ("a.obj", b"v 0 0 0\nv 9 0 0\nv 0 9 0\nf 1 2 7\n", "cannot be read|do not exist"),
        ("a.glb", b"glTF", "cannot be read"),
        ("a.glb", trimesh.Scene(trimesh.PointCloud(np.eye(3))).export(file_type="glb"), "no triangles"),
        ("a.vtp", b"<VTKFile type='ImageData'/>", "ImageData"),
        ("a.vtp", b"<VTKFile", "cannot be read as VTP"),
        ("a.obj", b"v 0 0 0\nv nan 0 0\nv 0 9 0\nf 1 2 3\n", "not finite"),
        ("a.txt", b"", "not a surface file"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(GenMedError, match=line) as error:
        read_mesh(path)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_metres_are_refused_until_they_are_named(tmp_path: Path) -> None:
    path = save_mesh(ball(radius_mm=0.06), tmp_path / "liver.stl")
    with pytest.raises(GenMedError, match="metres; scale it to mm"):
        read_mesh(path)
    assert read_mesh(path, unit="m").extent_mm == pytest.approx(120, rel=1e-3)
    with pytest.raises(GenMedError, match="another unit"):
        read_mesh(save_mesh(ball(60), tmp_path / "mm.stl"), unit="m")
    with pytest.raises(GenMedError, match="unit 'inch'"):
        read_mesh(path, unit="inch")


# Repair


def test_a_sound_surface_is_left_alone() -> None:
    mesh, notes = repair(ball())
    assert notes == () and mesh.volume_ml == pytest.approx(ball().volume_ml, rel=1e-12)


def test_separate_triangles_are_joined_and_closed() -> None:
    mesh = ball(detail=3)
    soup = Mesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))
    fixed, _ = repair(soup)
    assert len(fixed.vertices) == len(mesh.vertices)


def test_degenerate_and_repeated_faces_go() -> None:
    mesh = ball(detail=2)
    faces = np.concatenate([mesh.faces, mesh.faces[:5], [[0, 0, 1], [2, 2, 2]]])
    fixed, notes = repair(Mesh(mesh.vertices, faces))
    assert len(fixed.faces) == len(mesh.faces) and notes == ("7 degenerate or repeated faces dropped",)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0))
def test_whatever_faces_are_turned_round_the_volume_is_right(seed: int, share: float) -> None:
    mesh = ball(detail=2)
    turned = np.random.default_rng(seed).random(len(mesh.faces)) < share
    faces = np.where(turned[:, None], mesh.faces[:, ::-1], mesh.faces)
    assert repair(Mesh(mesh.vertices, faces))[0].volume_ml == pytest.approx(mesh.volume_ml)


def test_a_hole_is_closed_and_reported() -> None:
    mesh = ball()
    cut = Mesh(mesh.vertices, mesh.faces[(mesh.vertices[mesh.faces][:, :, 2] < 9).all(axis=1)])
    fixed, notes = repair(cut)
    assert _as_trimesh(fixed).is_watertight
    assert fixed.volume_ml == pytest.approx(mesh.volume_ml, rel=0.02)
    assert len(notes) == 1 and notes[0].startswith("1 holes closed")


def test_half_a_ball_cannot_be_closed_honestly() -> None:
    mesh = ball()
    with pytest.raises(GenMedError, match=r"open: .*% of it is missing"):
        repair(Mesh(mesh.vertices, mesh.faces[(mesh.vertices[mesh.faces][:, :, 2] < 0.1).all(axis=1)]))


def test_a_flat_surface_encloses_nothing() -> None:
    plate = Mesh(np.array([[0, 0, 0], [30, 0, 0], [30, 30, 0], [0, 30, 0]], float), np.array([[0, 1, 2], [0, 2, 3]]))
    with pytest.raises(GenMedError, match=r"open|encloses no volume"):
        repair(plate)
    flat = ball(detail=2)
    with pytest.raises(GenMedError, match="encloses no volume"):
        repair(Mesh(flat.vertices * [1, 1, 1e-6], flat.faces))


def test_specks_go_and_pieces_are_counted() -> None:
    mesh, notes = repair(together(ball(), *(ball(0.8, (20 + 3 * k, 0, 0), 1) for k in range(6))))
    assert notes == ("6 specks dropped",) and mesh.volume_ml == pytest.approx(ball().volume_ml)
    pair, notes = repair(together(ball(), ball(9, (30, 0, 0))))
    assert notes == () and pair.volume_ml == pytest.approx(ball().volume_ml + ball(9).volume_ml)
    with pytest.raises(GenMedError, match="4 pieces, the largest with 25%"):
        repair(together(*(ball(10, (30 * k, 0, 0)) for k in range(4))))


@pytest.mark.parametrize("inverted", [False, True])
def test_a_cavity_stays_hollow(inverted: bool) -> None:
    mesh = together(ball(), flipped(ball(5, detail=3)))
    fixed, _ = repair(flipped(mesh) if inverted else mesh)
    assert fixed.volume_ml == pytest.approx(ball().volume_ml - ball(5, detail=3).volume_ml)
    assert signed_distance(fixed, grid(3, 1.0, -1.0))[1, 1, 1] == pytest.approx(5, abs=0.05)


def test_too_many_faces_are_decimated() -> None:
    mesh = ball(50, detail=6)
    fixed, notes = repair(mesh, max_faces=5_000)
    assert len(fixed.faces) <= 5_050 and "decimated" in notes[0]
    assert fixed.volume_ml == pytest.approx(mesh.volume_ml, rel=2e-3)


# Distance


def test_distances_to_a_box_are_exact() -> None:
    sides = np.array([20.0, 10.0, 6.0])
    where = grid()
    over = np.abs(centres(where)) - sides / 2
    outside = np.linalg.norm(np.maximum(over, 0), axis=-1)
    exact = outside + np.minimum(over.max(axis=-1), 0)
    np.testing.assert_allclose(signed_distance(box(), where), exact, atol=1e-5)
    np.testing.assert_allclose(signed_distance(box(), where, 3.0), np.clip(exact, -3, 3), atol=1e-5)


@settings(max_examples=30)
@given(limit_mm=st.floats(0.3, 8), angle=st.floats(0, 3.1), voxel_mm=st.floats(0.6, 3))
def test_a_limit_changes_nothing_below_it(limit_mm: float, angle: float, voxel_mm: float) -> None:
    affine = grid(11, voxel_mm, -8.0).affine
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3] * [1, 1, -1.7]
    where = Grid((11, 10, 9), affine)
    whole = signed_distance(box(), where)
    np.testing.assert_allclose(signed_distance(box(), where, limit_mm), np.clip(whole, -limit_mm, limit_mm), atol=1e-5)


def test_overlapping_bodies_count_as_one() -> None:
    two = together(ball(at=(-4, 0, 0)), ball(at=(4, 0, 0)))
    where = grid()
    inside = np.linalg.norm(np.abs(centres(where)) - [4, 0, 0], axis=-1) < 9.9
    assert (signed_distance(two, where)[inside] < 0).all()
    assert abs(signed_distance(two, where)).max() < 25  # not scaled by how often a point is inside


@pytest.mark.parametrize("name", ["ball", "overlapping", "cavity", "open", "long faces", "nearly touching"])
def test_distances_are_those_of_asking_at_every_voxel(name: str) -> None:
    whole = ball(detail=3)
    mesh = {
        "ball": whole,
        "overlapping": together(ball(at=(-4, 0, 0), detail=3), ball(at=(4, 0, 0), detail=3)),
        "cavity": together(whole, flipped(ball(6.0, detail=2))),
        "open": Mesh(whole.vertices, whole.faces[whole.vertices[whole.faces[:, 0], 2] < 8]),
        "long faces": box((25.0, 3.0, 0.4)),
        "nearly touching": together(box((8.0, 8.0, 20.0)), moved(box((8.0, 8.0, 20.0)), 8.05)),
    }[name]
    where = grid(22, 1.3, -14.1)
    points = centres(where).reshape(-1, 3)
    slow = np.where(winding(mesh, points) > 0.5, -1, 1) * np.minimum(_distance(mesh, points), 4.0)
    np.testing.assert_allclose(signed_distance(mesh, where, 4.0).ravel(), slow, atol=1e-6)


def test_the_surface_of_a_distance_field_is_back_where_it_was() -> None:
    mesh = ball(at=(2.0, -1.0, 0.5))
    where = grid(48, 0.6, -13.0)
    back = surface(signed_distance(mesh, where), where.affine)
    np.testing.assert_allclose(np.linalg.norm(back.vertices - [2, -1, 0.5], axis=1), 10, atol=0.06)
    assert back.volume_ml == pytest.approx(mesh.volume_ml, rel=5e-3)


def test_a_surface_is_closed_at_the_edge_and_outward_on_flipped_axes() -> None:
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    mesh = surface(np.full((4, 4, 4), -1.0), affine)
    assert _as_trimesh(mesh).is_watertight and mesh.volume_ml > 0
    with pytest.raises(GenMedError, match="nothing is inside"):
        surface(np.ones((4, 4, 4)), affine)


def _as_trimesh(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
