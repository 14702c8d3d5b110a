import base64
import hashlib
import json
import re
import shutil
import subprocess
import zlib
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.color import xyz2lab
from skimage.color.colorconv import xyz_from_rgb
from test_report import Outline

from genmed.comparison import (
    COLOURS,
    MATTER,
    MAX_COLUMNS,
    MAX_FACES,
    OBSERVED,
    PLAIN,
    REDUNDANT,
    UNOBSERVED,
    Column,
    comparison_page,
    matter,
    slice_corners,
)
from genmed.errors import GenMedError
from genmed.mesh import decimated
from genmed.tasks.compare import surface
from genmed.volume import Volume

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "genmed" / "viewer"
NASTY = "</script><img src=x onerror=alert(1)>\"'&.stl"


def ball(radius: float = 10.0, centre: tuple[float, float, float] = (0, 0, 0), detail: int = 2) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(detail, radius)
    mesh.apply_translation(centre)
    return mesh


def scene_of(page: str) -> Any:
    found = re.search(r"<script type=\"application/json\" id=scene>(.*?)</script>", page, re.DOTALL)
    assert found
    return json.loads(found[1])


def undone(content: bytes, width: int) -> np.ndarray:
    """(n, 3) numbers from byte planes of differences: what viewer/src/geometry.ts does."""
    planes = np.frombuffer(content, np.uint8).reshape(width, 3, -1).astype(np.uint64)
    differences = sum(plane << np.uint64(8 * k) for k, plane in enumerate(planes))
    return (np.cumsum(differences, axis=1) % (1 << (8 * width))).T.astype(np.int64)  # type: ignore[arg-type]


def unpacked(packed: dict[str, Any], scene: Any) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Vertices in mm, faces, and the classes."""
    content = zlib.decompress(base64.b64decode(packed["data"]))
    cut = 6 * packed["vertices"]
    end = cut + 12 * packed["triangles"]
    vertices = undone(content[:cut], 2) * scene["step"] + np.array(scene["origin"])
    return vertices, undone(content[cut:end], 4), content[end:]


# What the page says


def test_page_tells_titles_figures_notes_and_classes_in_words() -> None:
    classes = np.full(len(ball().vertices), OBSERVED, np.uint8)
    classes[:3] = REDUNDANT
    columns = [
        Column("First", ball(), classes, {"Dice": "0.913", "UHD ×100": "4.3"}),
        Column("Second", ball(8), note="Small print."),
    ]
    page = comparison_page(columns, title="Two balls", truth=ball(9), notes=["What Dice is."])
    text = Outline(page.replace("{", "").replace("}", "")).text
    for word in ("Two balls", "First", "Second", "Dice", "0.913", "4.3", "Small print.", "What Dice is."):
        assert word in text
    assert MATTER[OBSERVED] in text and MATTER[REDUNDANT] in text and MATTER[UNOBSERVED] not in text
    assert page.count("<canvas ") == 2 and page.count(COLOURS[OBSERVED]) == 2  # legend and scene


def test_switches_are_there_for_what_is_there() -> None:
    classes = np.zeros(len(ball().vertices), np.uint8)
    plane = np.zeros((4, 3))
    everything = comparison_page([Column("a", ball(), classes)], truth=ball(), planes=[plane])
    for id, bare in {
        "ghost": comparison_page([Column("a", ball(), classes)], planes=[plane]),
        "planes": comparison_page([Column("a", ball(), classes)], truth=ball()),
        "colours": comparison_page([Column("a", ball())], truth=ball(), planes=[plane]),
    }.items():
        assert f"id={id} " in everything and f"id={id} " not in bare


def test_text_of_the_caller_is_escaped_wherever_it_stands() -> None:
    classes = np.zeros(len(ball().vertices), np.uint8)
    column = Column(NASTY, ball(), classes, {NASTY: NASTY}, NASTY)
    page = comparison_page([column], title=NASTY, classes=[NASTY], notes=[NASTY])
    assert "<img" not in page and "onerror=alert(1)>" not in page
    assert page.count("</script>") == 2
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags if tag == "script"] == ["script"] * 2
    labels = [attributes["aria-label"] for tag, attributes in outline.tags if tag == "canvas"]
    assert labels == [NASTY]
    assert unescape(re.findall(r"<title>(.*?)</title>", page)[0]) == NASTY


def test_policy_allows_the_shipped_script_and_style_and_nothing_else() -> None:
    page = comparison_page([Column("a", ball())])
    policy = dict(part.strip().split(" ", 1) for part in re.findall(r'Policy" content="([^"]*)"', page)[0].split(";"))
    script, style = (
        re.findall(r"<script>(.*?)</script>", page, re.DOTALL),
        re.findall(r"<style>(.*?)</style>", page, re.S),
    )
    hashed = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (*script, *style)]
    assert policy == {
        "default-src": "'none'",
        "script-src": f"'sha256-{hashed[0]}'",
        "style-src": f"'sha256-{hashed[1]}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_page_needs_no_other_file() -> None:
    page = comparison_page([Column("a", ball())], truth=ball())
    assert not re.search(r"\b(?:src|href)=|url\(|@import|\bimport\(|https?:|eval\(|new Function", page)


def test_same_columns_give_the_same_bytes() -> None:
    assert comparison_page([Column("a", ball())]) == comparison_page([Column("a", ball())])


# Geometry


@given(st.integers(0, 99), st.floats(1e-2, 1e4), st.floats(-1e3, 1e3))
def test_geometry_comes_back_to_a_step_of_the_box(seed: int, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 400))
    vertices = scale * rng.normal(size=(count, 3)) + offset
    faces = rng.integers(0, count, (int(rng.integers(1, 500)), 3))
    classes = rng.choice([0, 1, 2, PLAIN], count).astype(np.uint8)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    scene = scene_of(comparison_page([Column("a", mesh, classes), Column("b", mesh)], truth=mesh))
    low, side = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    np.testing.assert_allclose(scene["origin"], low)
    for packed in (*scene["columns"], scene["ghost"]):
        found, triangles, kinds = unpacked(packed, scene)
        assert np.abs(found - vertices).max() <= 0.51 * side / 65535
        assert np.array_equal(triangles, faces)
        assert kinds == (classes.tobytes() if packed["classes"] else b"")
    assert [packed["classes"] for packed in scene["columns"]] == [True, False]


def test_many_vertices_and_one_flat_mesh_survive() -> None:
    vertices = np.zeros((70_000, 3))
    vertices[:, 0] = np.arange(70_000) % 7  # beyond 16 bits of indices, flat along two axes
    faces = np.array([[69_999, 0, 1], [2, 69_998, 65_536]])
    scene = scene_of(comparison_page([Column("a", trimesh.Trimesh(vertices, faces, process=False))]))
    found, triangles, _ = unpacked(scene["columns"][0], scene)
    np.testing.assert_allclose(found, vertices, atol=1e-4)
    assert np.array_equal(triangles, faces)


def test_meshes_beyond_the_limit_are_decimated_and_say_so() -> None:
    mesh = ball(50, detail=6)
    classes = (mesh.vertices[:, 2] > 0).astype(np.uint8)
    assert len(mesh.faces) == 81_920 > MAX_FACES
    page = comparison_page([Column("a", mesh, classes), Column("b", ball(50))])
    scene = scene_of(page)
    vertices, faces, kinds = unpacked(scene["columns"][0], scene)
    assert 0.9 * MAX_FACES < len(faces) <= MAX_FACES
    assert np.abs(np.linalg.norm(vertices, axis=1) - 50).max() < 0.1
    expected = vertices[:, 2] > 0
    clear = np.abs(vertices[:, 2]) > 1
    assert np.array_equal(np.frombuffer(kinds, np.uint8)[clear], expected[clear])
    assert f"{len(faces):,} of its 81,920 triangles".replace(",", "\u202f") in page and page.count("triangles.") == 1


def test_four_columns_of_64_voxels_make_less_than_three_megabytes() -> None:
    noise = np.random.default_rng(0).normal(size=(64, 64, 64))
    mesh = surface(gaussian_filter(noise, 3) > 0.01, np.eye(4))
    assert len(mesh.faces) > MAX_FACES  # harder than anatomy
    light = decimated(mesh, MAX_FACES)  # once, not for every column
    assert len(light.faces) > 0.9 * MAX_FACES
    page = comparison_page([Column("", light)] * 4, truth=light)
    assert len(page.encode()) < 3e6


def test_slice_corners_lie_in_the_slice_round_the_shape() -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * (1.0, 2.0, 3.0), (5, -6, 7)
    index = rng.uniform(0, 20, (50, 3))
    vertices = index @ affine[:3, :3].T + affine[:3, 3]
    for axis in range(3):
        corners = slice_corners(affine, axis, 4, vertices)
        back = (corners - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        np.testing.assert_allclose(back[:, axis], 4)
        others = [k for k in range(3) if k != axis]
        assert (back[:, others].min(0) < index[:, others].min(0)).all()
        assert (back[:, others].max(0) > index[:, others].max(0)).all()
        sides = np.roll(corners, -1, axis=0) - corners  # going round: a rectangle
        np.testing.assert_allclose(sides[0] + sides[2], 0, atol=1e-9)
        np.testing.assert_allclose((sides * np.roll(sides, 1, axis=0)).sum(axis=1), 0, atol=1e-9)


def test_matter_is_told_by_the_closest_voxel() -> None:
    affine = np.diag([-2.0, 1.0, 1.0, 1.0])
    observed, redundant = np.zeros((1, 4, 1, 1), np.uint8), np.zeros((1, 4, 1, 1), np.uint8)
    observed[0, 1:3], redundant[0, 2] = 1, 1
    points = np.array([[0.0, 0, 0], [-1.8, 0.4, 0], [-4.2, 0, 0], [-6, 0, 0], [-2, 5, 0], [99, 0, 0]])
    found = matter(points, Volume(observed, affine), Volume(redundant, affine))
    assert found.tolist() == [UNOBSERVED, OBSERVED, REDUNDANT, UNOBSERVED, UNOBSERVED, UNOBSERVED]
    assert matter(points, Volume(observed, affine)).tolist()[2] == OBSERVED


# Refusals


def bad(vertices: Any = ((0, 0, 0), (1, 0, 0), (0, 1, 0)), faces: Any = ((0, 1, 2),)) -> trimesh.Trimesh:
    return trimesh.Trimesh(np.array(vertices, float), np.array(faces, int).reshape(-1, 3), process=False)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([], {}, "1 to 12 shapes, not 0"),
        ([Column("a", bad())] * (MAX_COLUMNS + 1), {}, "not 13; make several pages"),
        ([Column("a", bad(faces=[]))], {}, "a: has no triangles"),
        ([Column("a", bad([[0, 0, np.nan], [1, 0, 0], [0, 1, 0]]))], {}, "a: has vertices that are NaN"),
        ([Column("a", bad(), np.zeros(2, np.uint8))], {}, "a: 2 classes for 3 vertices"),
        ([Column("a", bad(), np.full(3, 3, np.uint8))], {}, "beyond the 3 that are named"),
        ([Column("a", bad())], {"classes": "abcdefgh"}, "7 colours, too few for 8"),
        ([Column("a", bad())], {"truth": bad(faces=[])}, "the truth: has no triangles"),
        ([Column("a", bad())], {"planes": [np.zeros((3, 3))]}, "4 corners"),
        ([Column("a", bad())], {"planes": [np.full((4, 3), np.inf)]}, "finite"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(columns: list[Column], options: Any, message: str) -> None:
    with pytest.raises(GenMedError, match=message) as caught:
        comparison_page(columns, **options)
    assert "\n" not in str(caught.value)


# The bundle


def test_bundle_is_that_of_the_sources() -> None:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "viewer" / "src").iterdir(), key=lambda path: path.name):
        digest.update(path.read_bytes())
    first = (BUNDLE / "page.js").read_text("utf-8").splitlines()[0]
    assert digest.hexdigest() in first, "run npm run build in viewer/"
    assert "Apache-2.0" in first


def test_bundle_can_be_inlined_and_is_small() -> None:
    script, style = (BUNDLE / "page.js").read_text("utf-8"), (BUNDLE / "page.css").read_text("utf-8")
    assert not re.search(r"</script|<!--", script, re.IGNORECASE) and "</style" not in style
    assert "\r" not in script + style  # browsers normalise it, and the hashes of the policy would not fit
    assert len(script) < 20_000 and len(style) < 6_000


@pytest.mark.skipif(
    not shutil.which("node") or not (ROOT / "viewer" / "node_modules").is_dir(),
    reason="needs Node and `npm ci` in viewer/",
)
def test_sources_build_the_committed_bundle_byte_for_byte(tmp_path: Path) -> None:
    vite = ["node", "node_modules/vite/bin/vite.js", "build", "--outDir", str(tmp_path), "--logLevel", "error"]
    subprocess.run(vite, cwd=ROOT / "viewer", check=True)
    subprocess.run(["node", "node_modules/typescript/bin/tsc", "--noEmit"], cwd=ROOT / "viewer", check=True)
    for name in ("page.js", "page.css"):
        assert (tmp_path / name).read_bytes() == (BUNDLE / name).read_bytes()


# Colours


def test_three_kinds_of_matter_differ_for_every_kind_of_eye() -> None:
    """In CIELAB (1976), with the matrices of Machado et al. 2009 for full protanopia, deuteranopia and tritanopia."""
    eyes = {
        "full": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    codes = np.array([[int(text[k : k + 2], 16) / 255 for k in (1, 3, 5)] for text in COLOURS[: len(MATTER)]])
    linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)
    for name, matrix in eyes.items():
        seen = xyz2lab((linear @ np.array(matrix).T).clip(0, 1) @ xyz_from_rgb.T)
        gaps = [np.linalg.norm(seen[a] - seen[b]) for a, b in combinations((OBSERVED, UNOBSERVED, REDUNDANT), 2)]
        assert min(gaps) > 30, (name, gaps)
