import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import failed_in_one_line, genmed
from test_comparison import NASTY, ball, scene_of, unpacked

from genmed import mesh as meshes
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.mesh import Mesh, save_mesh
from genmed.tasks import compare
from genmed.tasks.compare import Surfaces, _titles, compare_files, inside, overlap, read_shape, shapes_page, surface
from genmed.volume import Volume, read_labels

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1, 0, -7], [0, 0, 2.0, 3], [0, 0, 0, 1]])


def voxel_ball(radius_mm: float = 12, centre: tuple[float, float, float] = (14, 20, 12)) -> np.ndarray:
    offset = (np.indices((28, 40, 24)).T - centre) * (1.5, 1, 2)
    return np.less_equal(np.linalg.norm(offset, axis=-1).T, radius_mm).astype(np.uint8)


def plain(mesh: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(mesh.vertices), np.asarray(mesh.faces))


def box(low: tuple[float, float, float], high: tuple[float, float, float]) -> Mesh:
    return plain(trimesh.creation.box(bounds=[low, high]))


def label_file(path: Path, data: np.ndarray, names: dict[int, str] | None = None) -> Path:
    Volume(data[None], AFFINE, names or {}).save(path)
    return path


def figures(page: Path) -> list[dict[str, str]]:
    columns = re.findall(r"<figcaption>(.*?)</figcaption>", page.read_text("utf-8"))
    return [dict(re.findall(r"<dt>(.*?)</dt> <dd>(.*?)</dd>", column)) for column in columns]


# Surfaces


@pytest.mark.parametrize("affine", [np.eye(4), AFFINE, np.diag([1.0, -1, -1, 1])])
def test_surface_of_a_mask_lies_on_the_shape_with_normals_outward(affine: np.ndarray) -> None:
    centre = (np.array([14, 20, 12]) @ affine[:3, :3].T) + affine[:3, 3]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    offset = (np.indices((28, 40, 24)).T - (14, 20, 12)) * spacing
    mesh = surface(np.linalg.norm(offset, axis=-1).T <= 9, affine)
    assert mesh.is_closed and 1000 * mesh.volume_ml == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.03)
    distance = np.linalg.norm(mesh.vertices - centre, axis=1)
    assert np.abs(distance - 9).max() < 0.75 * spacing.max() and np.abs(distance - 9).mean() < 0.25 * spacing.max()


@settings(max_examples=15)
@given(st.integers(0, 999))
def test_smoothing_moves_no_vertex_by_more_than_a_quarter_of_a_voxel(seed: int) -> None:
    mask = np.random.default_rng(seed).random((6, 7, 5)) < 0.2
    mask[0, 0, 0] = True
    vertices = surface(mask, np.eye(4)).vertices
    gap = np.abs(vertices[:, None] - np.argwhere(mask)).max(axis=2).min(axis=1)
    assert gap.min() > 0.249 and gap.max() < 0.751  # marching cubes: half a voxel


def test_single_voxels_do_not_vanish() -> None:
    mask = np.zeros((7, 7, 4), bool)
    mask[::3, ::3, ::3] = True
    mesh = surface(mask, np.eye(4))
    pieces = trimesh.Trimesh(mesh.vertices, mesh.faces).split()
    assert len(pieces) == 18
    for piece in pieces:
        assert 0.02 < piece.volume < 1 / 6  # 1/6 before smoothing


def test_one_voxel_and_a_mask_that_fills_its_grid_have_closed_surfaces() -> None:
    for mask in (np.ones((1, 1, 1), bool), np.ones((4, 1, 3), bool)):
        mesh = surface(mask, np.eye(4))
        assert mesh.is_closed and 1000 * mesh.volume_ml > 0.01 * mask.size


# Figures


def test_inside_of_a_box_is_exact() -> None:
    brick = box((0.9, 1.9, 2.9), (3.1, 4.1, 6.1))
    expected = np.zeros((6, 7, 8), bool)
    expected[1:4, 2:5, 3:7] = True
    assert np.array_equal(inside(brick, np.zeros(3), 1.0, expected.shape), expected)
    assert np.array_equal(inside(brick, np.array([2.0, 0, 0]), 0.5, (3, 9, 3)).any(axis=(0, 2)), np.zeros(9, bool))


@settings(max_examples=10)
@given(st.integers(0, 999))
def test_inside_agrees_with_signed_distance_of_balls_wherever_they_lie(seed: int) -> None:
    rng = np.random.default_rng(seed)
    centre, radius = rng.uniform(4, 8, 3), rng.uniform(1, 5)
    found = inside(plain(ball(radius, tuple(centre), detail=4)), np.zeros(3), 0.5, (24, 26, 25))
    distance = np.linalg.norm(0.5 * np.indices((24, 26, 25)).T - centre, axis=-1).T
    clear = np.abs(distance - radius) > 0.02
    assert np.array_equal(found[clear], (distance < radius)[clear])


def test_inside_unites_overlapping_pieces_and_forgives_a_hole_and_turned_faces() -> None:
    pieces = plain(trimesh.util.concatenate([ball(3, (5, 5, 5)), ball(3, (7, 5, 5))]))
    whole = inside(pieces, np.zeros(3), 0.5, (24, 24, 24))
    single = [inside(plain(ball(3, (x, 5, 5))), np.zeros(3), 0.5, (24, 24, 24)) for x in (5, 7)]
    assert np.array_equal(whole, single[0] | single[1])
    closed = plain(ball(3, (5, 5, 5), detail=4))
    holed = Mesh(closed.vertices, closed.faces[6:])
    assert closed.is_closed and not holed.is_closed
    assert (
        np.mean(inside(holed, np.zeros(3), 0.5, (24, 24, 24)) != inside(closed, np.zeros(3), 0.5, (24, 24, 24))) < 2e-4
    )
    turned = Mesh(closed.vertices, closed.faces[:, ::-1])
    assert np.array_equal(inside(turned, np.zeros(3), 0.5, (24,) * 3), inside(closed, np.zeros(3), 0.5, (24,) * 3))


def test_overlap_of_shifted_boxes_is_that_of_their_volumes() -> None:
    brick, moved, far = (box((x, 0, 0), (x + 10, 8, 6)) for x in (0, 4, 30))
    assert overlap(brick, moved) == pytest.approx(0.6, abs=0.01)
    assert overlap(brick, brick) == 1.0
    assert overlap(brick, far) == 0.0
    assert overlap(box((-3, -2, 1), (7, 6, 7)), box((0, 0, 0), (10, 8, 6))) == pytest.approx(2 * 210 / 960, abs=0.01)
    assert np.isnan(overlap(*[box((0.11, 0.11, 0.011), (9, 9, 0.012))] * 2))


def test_shapes_far_apart_need_no_lattice_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noted(*given: Any) -> np.ndarray:
        sizes.append(np.prod(given[3]))
        return inside(*given)

    monkeypatch.setattr(compare, "inside", noted)
    assert overlap(box((300, 400, 900), (320, 410, 910)), box((0, 0, 0), (20, 10, 10))) == 0.0
    assert len(sizes) == 2 and max(sizes) < 2 * 96**3


# Files


def test_figures_of_label_maps_are_those_of_their_voxels(tmp_path: Path) -> None:
    truth, other = voxel_ball(12), voxel_ball(12, (16, 20, 12))
    files = [label_file(tmp_path / f"{k}.nii.gz", data) for k, data in enumerate((truth, other))]
    found = figures(compare_files(files, tmp_path / "page.html", files[0]))
    expected = 2 * (truth & other).sum() / (truth.sum() + other.sum())
    assert [each["Dice"] for each in found] == ["1.000", f"{expected:.3f}"]
    assert float(found[0]["Chamfer ×100"]) == float(found[0]["UHD ×100, whole truth"]) == 0
    assert found[0]["Volume"] == f"{truth.sum() * 3 / 1000:.3g} ml"
    assert 7 < float(found[1]["UHD ×100, whole truth"]) < 14  # moved by 3 mm of 24 mm


def test_uhd_asks_for_what_was_seen_where_that_is_known(tmp_path: Path) -> None:
    truth, half = voxel_ball(12), voxel_ball(12)
    half[:, :, 12:] = 0  # z of 27 mm and more
    shapes = [Surfaces(name, Volume(data[None], AFFINE)) for name, data in (("truth", truth), ("half", half))]

    def uhd_of(seen: Any, name: str) -> float:
        page = shapes_page([("half", shapes[1])], shapes[0], title="half", seen=seen)
        write_bytes(tmp_path / "page.html", page.encode())
        return float(figures(tmp_path / "page.html")[0][name])

    assert uhd_of(lambda points: points[:, 2] < 22, "UHD ×100") < 7
    whole = uhd_of(None, "UHD ×100, whole truth")
    assert 45 < whole == uhd_of(lambda points: points[:, 2] > 100, "UHD ×100")  # none was seen


def test_figures_do_not_depend_on_the_unit_length_or_the_kind_of_file(tmp_path: Path) -> None:
    for scale in (1, 10):
        ball(10 * scale, detail=3).export(tmp_path / f"truth{scale}.stl")
        ball(10 * scale, (scale, 0, 0), detail=3).export(tmp_path / f"moved{scale}.ply")
    small, large = (
        figures(compare_files([tmp_path / f"moved{k}.ply"], tmp_path / "page.html", tmp_path / f"truth{k}.stl"))[0]
        for k in (1, 10)
    )
    assert small.pop("Volume") != large.pop("Volume") and small == large
    assert float(small["Dice"]) == pytest.approx(1 - 0.75 * 0.1 + 0.1**3 / 16, abs=0.01)  # two balls, 0.1 radii apart
    mask = label_file(tmp_path / "ball.nii.gz", voxel_ball(12))
    voxels = read_labels(mask)
    save_mesh(surface(voxels.data[0] > 0, voxels.affine), tmp_path / "ball.obj")
    mixed = figures(compare_files([tmp_path / "ball.obj"], tmp_path / "page.html", mask))[0]
    assert float(mixed["Dice"]) > 0.999


def test_labels_of_one_name_have_one_colour_in_all_columns(tmp_path: Path) -> None:
    two = voxel_ball(12)
    two[:14] *= 2
    files = [
        label_file(tmp_path / "both.nii.gz", two, {1: "left", 2: "right"}),
        label_file(tmp_path / "swapped.nii.gz", two, {1: "right", 2: "left"}),
    ]
    ball(9).export(tmp_path / "mesh.ply")
    page = compare_files([*files, tmp_path / "mesh.ply"], tmp_path / "page.html").read_text("utf-8")
    assert "left" in page and "right" in page and "id=colours" in page
    scene = scene_of(page)
    low, high = (classes_by_side(*unpacked(packed, scene)[::2]) for packed in scene["columns"][:2])
    assert low == high[::-1] == ({0}, {1})
    assert set(unpacked(scene["columns"][2], scene)[2]) == {255}


def classes_by_side(vertices: np.ndarray, kinds: bytes) -> tuple[set[int], set[int]]:
    """Classes at array indices well above and well below 14 along the first axis, whose world axis is turned."""
    index = (vertices[:, 0] - 40) / -1.5
    classes = np.frombuffer(kinds, np.uint8)
    return set(classes[index > 15].tolist()), set(classes[index < 12].tolist())


def test_labels_of_one_name_in_one_file_are_one_part(tmp_path: Path) -> None:
    two = voxel_ball(12)
    two[:14] *= 2
    two[:, :, :12] *= 3
    page = compare_files([label_file(tmp_path / "a.nii.gz", two, {1: "kidney", 2: "kidney"})], tmp_path / "page.html")
    assert read_shape(tmp_path / "a.nii.gz").values["kidney"] == [1, 2]
    scene = scene_of(page.read_text("utf-8"))
    kinds = np.frombuffer(unpacked(scene["columns"][0], scene)[2], np.uint8)
    high = unpacked(scene["columns"][0], scene)[0][:, 2] > 3 + 2 * 13
    assert set(kinds[high].tolist()) == {0}
    same = label_file(tmp_path / "b.nii.gz", (voxel_ball() * (1 + np.arange(28) % 2)[:, None, None]).astype(np.uint8),
                      {1: "kidney", 2: "kidney"})  # fmt: skip
    whole = read_labels(label_file(tmp_path / "c.nii.gz", voxel_ball()))
    assert read_shape(same).mesh.volume_ml == surface(whole.data[0] > 0, AFFINE).volume_ml


def test_an_open_surface_is_said_to_be_open(tmp_path: Path) -> None:
    closed = ball(10, detail=3)
    closed.export(tmp_path / "closed.ply")
    trimesh.Trimesh(closed.vertices, closed.faces[6:], process=False).export(tmp_path / "open.ply")
    files = [tmp_path / "closed.ply", tmp_path / "open.ply"]
    columns = compare_files(files, tmp_path / "page.html", files[0]).read_text("utf-8").split("<figcaption>")[1:]
    assert ["An open surface" in column for column in columns] == [False, True]


def test_more_labels_than_colours_are_shown_as_one(tmp_path: Path) -> None:
    many = voxel_ball(12) * (1 + np.arange(28)[:, None, None] // 2 % 10).astype(np.uint8)
    page = compare_files([label_file(tmp_path / "many.nii.gz", many)], tmp_path / "page.html").read_text("utf-8")
    assert len(np.unique(many)) - 1 == 9
    assert "9 labels, shown as one." in page and "id=colours" not in page


def test_files_of_one_name_are_told_by_their_folders(tmp_path: Path) -> None:
    files = []
    for folder in ("ours", "peer"):
        (tmp_path / folder).mkdir()
        files.append(label_file(tmp_path / folder / "seg.nii.gz", voxel_ball()))
    page = compare_files(files, tmp_path / "page.html").read_text("utf-8")
    assert "<h2>ours/seg.nii.gz</h2>" in page and "<h2>peer/seg.nii.gz</h2>" in page
    assert _titles([Path("/a/out/x.stl"), Path("/b/out/x.stl"), Path("/b/y.stl"), Path("/b/y.stl")]) == [
        "a/out/x.stl", "b/out/x.stl", "y.stl", "y.stl",
    ]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="such file names exist on POSIX systems alone")
def test_a_file_name_that_is_no_text_is_shown_all_the_same(tmp_path: Path) -> None:
    good = label_file(tmp_path / "good.nii.gz", voxel_ball())
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.nii.gz"))
    odd.write_bytes(good.read_bytes())
    assert "<h2>odd?.nii.gz</h2>" in compare_files([odd], tmp_path / "page.html").read_text("utf-8")


@pytest.mark.skipif(os.name != "posix", reason="such file names exist on POSIX systems alone")
def test_nasty_file_names_are_only_text(tmp_path: Path) -> None:
    path = tmp_path / NASTY.replace("/", "")
    ball().export(path)
    page = compare_files([path, path], tmp_path / "page.html", path).read_text("utf-8")
    assert "<img" not in page and page.count("<script") == 2


# The command


def test_view_writes_the_page_and_prints_its_path(tmp_path: Path) -> None:
    first, second = label_file(tmp_path / "a.nii.gz", voxel_ball()), tmp_path / "b.stl"
    ball(10).export(second)
    result = genmed("view", first, second, "--out", tmp_path / "new" / "page.html", "--truth", first)
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text("utf-8")
    assert len(scene_of(page)["columns"]) == 2 and scene_of(page)["ghost"] and "UHD" in page
    assert json.dumps(scene_of(page)).isascii()


def scan(path: Path) -> Path:
    data = np.random.default_rng(0).integers(-1000, 1000, (8, 8, 8)).astype(np.int16)
    Volume(data[None], np.eye(4)).save(path)
    return path


def sized(path: Path, radius_mm: float) -> Path:
    ball(radius_mm).export(path)
    return path


def points(path: Path) -> Path:
    trimesh.PointCloud(np.eye(3)).export(path)
    return path


def text(path: Path) -> Path:
    path.write_text("no mesh")
    return path


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda path: path, "absent.stl", "not found"),
        (lambda path: path, "absent.nii.gz", "no such file"),
        (text, "text.stl", "no triangles"),
        (text, "text.obj", "no triangles"),
        (text, "notes.txt", "not a medical image"),
        (points, "points.ply", "no triangles"),
        (scan, "scan.nii.gz", "a scan; segment it"),
        (lambda path: label_file(path, np.zeros((3, 3, 3), np.uint8)), "empty.nii.gz", "every voxel is 0"),
        (lambda path: sized(path, 0.01), "metres.stl", "probably in metres; scale it to mm"),
        (lambda path: sized(path, 600), "large.stl", "times as large as the truth"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(tmp_path: Path, make: Any, name: str, words: str) -> None:
    good = label_file(tmp_path / "good.nii.gz", voxel_ball())
    result = genmed("view", good, make(tmp_path / name), "--out", tmp_path / "page.html", "--truth", good)
    failed_in_one_line(result, name, words)
    assert not (tmp_path / "page.html").exists()


def test_wrong_names_and_numbers_are_refused(tmp_path: Path) -> None:
    good = label_file(tmp_path / "good.nii.gz", voxel_ball())
    failed_in_one_line(genmed("view", good, "--out", tmp_path / "page.stl"), "name it page.html")
    failed_in_one_line(genmed("view", good, "--out", good / "page.html"), "--out", "no folder that may be written to")
    failed_in_one_line(genmed("view", *[good] * 13, "--out", tmp_path / "page.html"), "13 files", "several pages")
    with pytest.raises(GenMedError, match="empty"):
        read_shape(label_file(tmp_path / "none.nii.gz", np.zeros((2, 2, 2), np.uint8)))


def test_missing_libraries_are_named_with_their_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = meshes.find_spec
    monkeypatch.setattr(meshes, "find_spec", lambda name: None if name == "skimage" else there(name))
    good = label_file(tmp_path / "good.nii.gz", voxel_ball())
    failed_in_one_line(genmed("view", good, "--out", tmp_path / "page.html"), "shapes need skimage", "'.[shapes]'")
