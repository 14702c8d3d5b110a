"""Completion and generation by a tiny trained model, from Python and from the command line."""

import base64
import json
import re
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_cli import failed_in_one_line
from test_comparison import scene_of
from test_mesh import ball, together
from test_shape import AFFINES, dice
from tiny_shapes import EXTENT_MM, RADII, ellipsoid_distance
from typer.testing import CliRunner, Result

import genmed as gm
from genmed.cli import _warn, app
from genmed.comparison import OBSERVED, REDUNDANT, UNOBSERVED
from genmed.cue import cue_of_labels, planes_of
from genmed.errors import GenMedError
from genmed.guide import Diverged
from genmed.mesh import Mesh, read_mesh, save_mesh
from genmed.pose import Posed
from genmed.shape import TRUNCATION
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model, load_shapes
from genmed.tasks import shapes
from genmed.tasks.complete import Completion, agreement, believed, shape_at
from genmed.tasks.shapes import complete_file, cue_of_sections, generate_files, parse_planes
from genmed.text import embed
from genmed.volume import Grid, Volume, read_labels

TRIPLE = "axial=14,coronal=18,sagittal=17"


def genmed(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tiny_shapes_model: Path) -> Path:
    return tiny_shapes_model


@pytest.fixture(scope="module")
def model(folder: Path) -> ShapeModel:
    return load_shapes(folder)


def kidney(shape: tuple[int, int, int] = (36, 36, 36), step_mm: float = 4.0) -> np.ndarray:
    """A kidney of the tiny set on voxels of 4 mm, off the middle."""
    points = (np.moveaxis(np.indices(shape), 0, -1) - [17, 18, 15]) * step_mm
    return ellipsoid_distance(np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2, points) < 0


@pytest.fixture
def part(tmp_path: Path) -> Path:
    path = tmp_path / "part.nii.gz"
    Volume(kidney().astype(np.uint8)[None], np.diag([4.0, 4, 4, 1])).save(path)
    return path


def test_three_planes_of_an_ellipsoid_are_completed(model: ShapeModel) -> None:
    truth, affine = kidney(), np.diag([4.0, 4, 4, 1])
    volume = Volume(truth.astype(np.uint8)[None], affine)
    seen = planes_of(volume, {"axial": [14], "coronal": [18], "sagittal": [17]})
    found = gm.complete(model, cue_of_labels(truth, affine, seen), samples=2)
    whole = found.probability(volume.grid) > 0.5
    assert dice(whole, truth) > 0.85
    assert len(found.shapes) == 2 and found.volume_ml is not None
    assert found.volume_ml.low <= found.volume_ml.mean <= found.volume_ml.high
    assert found.residual < 4.0  # a voxel
    assert abs(found.mesh().volume_ml / (truth.sum() * 64 / 1000) - 1) < 0.25


def test_the_same_seed_gives_the_same_shapes(model: ShapeModel) -> None:
    cue = cue_of_labels(kidney(), np.diag([4.0, 4, 4, 1]), np.indices((36, 36, 36))[2] == 14)
    first, again, other = (gm.complete(model, cue, samples=1, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.shapes[0].sdf, again.shapes[0].sdf)
    assert (first.shapes[0].sdf != other.shapes[0].sdf).any()


def test_generated_sizes_follow_the_caption(model: ShapeModel) -> None:
    voxels = {
        name: np.median([shape.voxel_mm for shape in gm.generate(model, 6, text=embed([f"left {name}"])[0])])
        for name in ("kidney", "femur")
    }
    assert voxels["femur"] > 2 * voxels["kidney"]
    assert len(gm.generate(model, 2)) == 2


def test_a_stated_volume_is_kept(model: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kidneys = gm.generate(model, 3, text=embed(["left kidney"])[0], volume_ml=150, seed=1)
    assert [shape.to_mesh().volume_ml for shape in kidneys] == pytest.approx([150] * 3, rel=1e-3)
    for text, volume_ml, asked in (("left kidney, 150 ml", None, 150), ("left kidney, 150 ml", 90, 90)):
        facts = generate_files(model, tmp_path, 2, text=text, volume_ml=volume_ml)
        assert facts["asked_ml"] == asked
        assert [row["volume_ml"] for row in facts["shapes"]] == pytest.approx([asked] * 2, rel=1e-3)
    assert generate_files(model, tmp_path, 1, text="left kidney")["asked_ml"] is None
    strange = generate_files(model, tmp_path, 1, text="left kidney", volume_ml=1e6)
    assert "not known" in strange["warning"] and not facts["warning"]
    monkeypatch.setattr(gm.tasks.complete, "resized", lambda shape, volume_ml: shape)  # what steering alone does
    usual = [shape.to_mesh().volume_ml for shape in gm.generate(model, 4, seed=1)]
    for wanted in (0.7 * np.median(usual), 1.4 * np.median(usual)):
        steered = gm.generate(model, 4, volume_ml=wanted, seed=1)
        assert [shape.to_mesh().volume_ml for shape in steered] == pytest.approx([wanted] * 4, rel=0.3)
    with pytest.raises(gm.GenMedError, match="above 0"):
        gm.generate(model, 1, volume_ml=0)


def test_shapes_without_a_scale_have_no_size(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As training leaves a structure whose shapes had none."""
    model, size = load_shapes(folder), 24  # after the codes
    kidney_words = model.text_of(embed(["left kidney"]))
    kidneys = int(((kidney_words - model.words[:-1]) ** 2).sum(dim=1).argmin())
    facts = [generate_files(model, tmp_path, 2, text="left kidney")]
    assert facts[0]["scale_known"] and all(row["volume_ml"] > 0 and row["extent_mm"] > 0 for row in facts[0]["shapes"])
    model.mixture.mean[kidneys, size], model.mixture.variance[kidneys, 0] = 0.0, 2.02
    facts.append(generate_files(model, tmp_path, 2, text="left kidney"))
    assert not facts[1]["scale_known"] and json.loads((tmp_path / "generated.json").read_text()) == facts[1]
    assert [(row["volume_ml"], row["extent_mm"]) for row in facts[1]["shapes"]] == [(None, None)] * 2
    assert generate_files(model, tmp_path, 2, text="left femur")["scale_known"]
    for entry in facts:
        _warn(entry, "no size")
    assert capsys.readouterr().err == "genmed: no size\n"
    cue = cue_of_labels(kidney(), np.diag([4.0, 4, 4, 1]))
    assert not gm.complete(model, cue, text=embed(["left kidney"])[0], samples=1).shapes[0].scaled


@pytest.mark.parametrize("affine", [np.diag([4.0, 4, 4, 1]), *(a @ np.diag([4.0, 4, 4, 1]) for a in AFFINES.values())])
def test_the_result_lies_on_the_grid_and_keeps_what_was_seen(
    affine: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "part.nii.gz", tmp_path / "out.nii.gz"
    volume = Volume(kidney().astype(np.uint8)[None], affine)
    volume.save(path)
    result = genmed("complete", path, "--model", folder, "--out", out, "--planes", TRIPLE, "--samples", 1)
    assert result.exit_code == 0, result.output
    given, made = nib.load(path), nib.load(out)
    assert np.array_equal(given.affine, made.affine) and given.shape == made.shape
    seen = planes_of(gm.read_labels(path), {"axial": [14], "coronal": [18], "sagittal": [17]})
    whole = np.asarray(made.dataobj) != 0
    assert np.array_equal(whole[seen], kidney()[seen])
    assert set(np.unique(whole)) == {False, True} and whole[~seen].any()
    facts = json.loads((tmp_path / "out.manifest.json").read_text())
    assert facts["planes"] == {"axial": [14], "coronal": [18], "sagittal": [17]} and facts["seed"] == 0


def test_unseen_voxels_change_no_voxel_of_the_result(part: Path, folder: Path, tmp_path: Path) -> None:
    """Other labels, fractions, NaN and infinity neither."""
    label = gm.read_labels(part)
    seen = planes_of(label, {"axial": [14], "coronal": [18]})
    garbage = np.random.default_rng(0).choice([0, 1, 3, -2, 0.5, np.nan, np.inf], seen.shape)
    garbage = np.where(seen, label.data[0], garbage)[None].astype(np.float32)
    Volume(garbage, label.affine).save(tmp_path / "garbage.nii.gz")
    results = []
    for name in ("part", "garbage"):
        out = tmp_path / f"{name}-out.nii.gz"
        result = genmed("complete", tmp_path / f"{name}.nii.gz", "--model", folder, "--out", out,
                        "--planes", "axial=14,coronal=18", "--samples", 1)  # fmt: skip
        assert result.exit_code == 0, result.output
        results.append(gm.read_labels(out).data)
    np.testing.assert_array_equal(*results)
    for planes, words in (("axial=14,sagittal=17", "NaN or infinite"), (None, "NaN or infinite")):
        options = [] if planes is None else ["--planes", planes]
        failed_in_one_line(genmed("complete", tmp_path / "garbage.nii.gz", "--model", folder, "--out",
                                  tmp_path / "none.nii.gz", *options), words)  # fmt: skip


def test_noisy_distances_are_completed(folder: Path, tmp_path: Path) -> None:
    points = (np.moveaxis(np.indices((36, 36, 36)), 0, -1) - [17, 18, 15]) * 4.0
    distance = ellipsoid_distance(np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2, points)
    noisy = distance + 5 * np.random.default_rng(0).normal(size=distance.shape)
    given, out = tmp_path / "sdf.nii.gz", tmp_path / "out.nii.gz"
    Volume(noisy[None].astype(np.float32), np.diag([4.0, 4, 4, 1])).save(given)
    result = genmed("complete", given, "--model", folder, "--out", out, "--samples", 1, "--distances")
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out.manifest.json").read_text())
    assert facts["distances"] and facts["doubtful"]
    assert dice(gm.read_labels(out).data[0] != 0, kidney()) > max(0.9, dice(noisy < 0, kidney()) + 0.03)


def test_seen_distances_decide_their_voxels_and_no_others_count(folder: Path, tmp_path: Path) -> None:
    points = (np.moveaxis(np.indices((36, 36, 36)), 0, -1) - [17, 18, 15]) * 4.0
    distance = ellipsoid_distance(np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2, points).astype(np.float32)
    seen = planes_of(Volume(distance[None], np.diag([4.0, 4, 4, 1])), {"axial": [14], "coronal": [18]})
    made = []
    for number, unseen in enumerate((distance, np.nan)):
        given, out = tmp_path / f"{number}.nii.gz", tmp_path / f"out-{number}.nii.gz"
        Volume(np.where(seen, distance, unseen)[None].astype(np.float32), np.diag([4.0, 4, 4, 1])).save(given)
        facts = complete_file(
            load_shapes(folder), given, out, planes="axial=14,coronal=18", distances=True, samples=1
        )
        assert not facts["doubtful"]
        made.append(gm.read_labels(out).data[0])
    assert np.array_equal(*made) and np.array_equal(made[0][seen] != 0, distance[seen] < 0)
    assert dice(made[0] != 0, distance < 0) > 0.85


def test_a_mask_text_and_a_mesh_out(part: Path, folder: Path, tmp_path: Path) -> None:
    mask = np.zeros((36, 36, 36), np.uint8)
    mask[:, :, :16] = 1
    Volume(mask[None], np.diag([4.0, 4, 4, 1])).save(tmp_path / "mask.nii.gz")
    out = tmp_path / "out.stl"
    result = genmed("complete", part, "--model", folder, "--out", out, "--observed", tmp_path / "mask.nii.gz",
                    "--text", "left kidney", "--samples", 1, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == "left kidney"
    assert read_mesh(out).volume_ml == pytest.approx(kidney().sum() * 64 / 1000, rel=0.4)


def test_a_surface_is_seen_where_a_mask_in_mm_says(folder: Path, tmp_path: Path) -> None:
    radii = np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2
    middle = np.array([200.0, -30, 70])
    whole = Mesh(ball(1.0).vertices * radii + middle, ball(1.0).faces)
    below = whole.vertices[whole.faces][:, :, 2].min(axis=1) < middle[2] - 4
    save_mesh(Mesh(whole.vertices, whole.faces[~below]), tmp_path / "part.stl")  # much more open than can be repaired
    affine = np.diag([-4.0, 4, 4, 1])
    affine[:3, 3] = middle + np.array([100, -100, 2])
    Volume(np.ones((1, 50, 50, 30), np.uint8), affine).save(tmp_path / "mask.nii.gz")
    out = tmp_path / "out.ply"
    result = genmed("complete", tmp_path / "part.stl", "--model", folder, "--out", out, "--samples", 1,
                    "--observed", tmp_path / "mask.nii.gz", "--page", tmp_path / "page.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    made = read_mesh(out)
    np.testing.assert_allclose((made.vertices.min(axis=0) + made.vertices.max(axis=0)) / 2, middle, atol=12)
    seen, completed = matter_of((tmp_path / "page.html").read_text("utf-8"))
    assert set(seen) == {OBSERVED} and set(completed) == {OBSERVED, UNOBSERVED}


@pytest.mark.parametrize("suffix", [".ply", ".vtp", ".xyz"])
def test_points_on_a_surface_are_completed(suffix: str, folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    way = rng.normal(size=(400, 3))
    radii = np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2
    points = way / np.linalg.norm(way, axis=1, keepdims=True) * radii + rng.normal(0, 2, way.shape) + [200, -30, 70]
    out = tmp_path / "out.stl"
    result = genmed("complete", cloud(tmp_path / f"part{suffix}", points), "--model", folder, "--out", out,
                    "--samples", 1, "--page", tmp_path / "page.html")  # fmt: skip
    assert result.exit_code == 0, result.output
    made = read_mesh(out)
    np.testing.assert_allclose((made.vertices.min(axis=0) + made.vertices.max(axis=0)) / 2, [200, -30, 70], atol=6)
    assert made.volume_ml == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.2)
    assert json.loads((tmp_path / "out.manifest.json").read_text())["doubtful"]


def cloud(path: Path, points: np.ndarray) -> Path:
    """A file of points without triangles."""
    lines = "\n".join(" ".join(map(str, point)) for point in points.tolist())
    properties = "property float x\nproperty float y\nproperty float z\nend_header\n"
    heads = {".xyz": "", ".ply": f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n{properties}"}
    vtp = (
        "<VTKFile type='PolyData'><PolyData><Piece><Points><DataArray type='Float64' NumberOfComponents='3' "
        f"format='ascii'>{lines}</DataArray></Points></Piece></PolyData></VTKFile>"
    )
    path.write_text(vtp if path.suffix == ".vtp" else heads[path.suffix] + lines)
    return path


def test_bad_points_give_one_line(part: Path, folder: Path, tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(0, 20, (50, 3))
    sound = cloud(tmp_path / "sound.ply", points)
    for path, options, words in (
        (cloud(tmp_path / "few.ply", points[:9]), [], "9 different points"),
        (cloud(tmp_path / "none.ply", points[:0]), [], "no points"),
        (cloud(tmp_path / "one.xyz", np.ones((60, 3))), [], "lie in one place"),
        (cloud(tmp_path / "nan.ply", np.where(np.arange(150).reshape(50, 3) == 7, np.nan, points)), [], "not finite"),
        (cloud(tmp_path / "metres.vtp", points / 1000), [], "metres"),
        (sound, ["--planes", "axial=1"], "all of which count"),
        (sound, ["--observed", part], "all of which count"),
    ):
        result = genmed("complete", path, "--model", folder, "--out", tmp_path / "out.stl", *options)
        failed_in_one_line(result, path.name, words)


def test_probabilities_lie_beside_the_label_map_and_agree_with_it(part: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.nii.gz"
    options = ("--planes", TRIPLE, "--samples", 3, "--probabilities")
    assert genmed("complete", part, "--model", folder, "--out", out, *options).exit_code == 0
    chance, given = nib.load(tmp_path / "out.probabilities.nii.gz"), nib.load(part)
    assert np.array_equal(chance.affine, given.affine) and chance.get_data_dtype() == np.float32
    values = np.asarray(chance.dataobj)
    assert values.min() == 0 and values.max() == 1 and ((values > 0) & (values < 1)).any()
    np.testing.assert_array_equal(values > 0.5, np.asarray(nib.load(out).dataobj) != 0)
    np.testing.assert_array_equal(values[:, :, 14], kidney()[:, :, 14])
    facts = json.loads((tmp_path / "out.manifest.json").read_text())
    assert facts["probabilities"] == str(tmp_path / "out.probabilities.nii.gz") and not facts["doubtful"]
    same = tmp_path / "x.probabilities.nii.gz"
    same.write_bytes(part.read_bytes())
    failed_in_one_line(genmed("complete", same, "--model", folder, "--out", tmp_path / "x.nii.gz", "--probabilities"),
                       "would overwrite")  # fmt: skip
    failed_in_one_line(genmed("complete", part, "--model", folder, "--out", tmp_path / "x.stl", "--probabilities"),
                       "--probabilities", "x.nii.gz")  # fmt: skip


def test_seen_voxels_of_a_doubtful_part_may_change(part: Path, folder: Path, tmp_path: Path) -> None:
    label = gm.read_labels(part)
    data = label.data.copy()
    excess = np.zeros(kidney().shape, bool)
    excess[24:29, 16:20, 13:16] = True
    excess &= ~kidney()
    data[0, excess] = 1
    Volume(data, label.affine).save(tmp_path / "wrong.nii.gz")
    seen = np.s_[:, :, 14]
    found = {}
    for flags in ((), ("--doubtful",)):
        out = tmp_path / "out.nii.gz"
        result = genmed("complete", tmp_path / "wrong.nii.gz", "--model", folder, "--out", out, "--samples", 1,
                        "--planes", TRIPLE, *flags)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out.manifest.json").read_text())["doubtful"] == bool(flags)
        found[flags] = gm.read_labels(out).data[0]
    np.testing.assert_array_equal(found[()][seen], data[0][seen])
    assert found[()][excess & (np.indices(excess.shape)[2] == 14)].all()
    assert not found[("--doubtful",)][seen][excess[seen]].all()


def test_a_surface_is_cut_by_planes_in_mm(folder: Path, tmp_path: Path) -> None:
    radii = np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2
    mesh = ball(1.0)
    save_mesh(Mesh(mesh.vertices * radii + [200.0, -30, 70], mesh.faces), tmp_path / "part.stl")
    out = tmp_path / "out.ply"
    result = genmed("complete", tmp_path / "part.stl", "--model", folder, "--out", out, "--samples", 1,
                    "--planes", "axial=75,coronal=-32.5,sagittal=198")  # fmt: skip
    assert result.exit_code == 0, result.output
    middle = (read_mesh(out).vertices.min(axis=0) + read_mesh(out).vertices.max(axis=0)) / 2
    np.testing.assert_allclose(middle, [200, -30, 70], atol=12)


def test_a_surface_becomes_a_label_map_that_holds_it(folder: Path, tmp_path: Path) -> None:
    radii = np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2
    mesh = ball(1.0)
    save_mesh(Mesh(mesh.vertices * radii, mesh.faces), tmp_path / "part.stl")
    for planes in (("--planes", "axial=5,coronal=-2.5"), ()):
        out = tmp_path / f"out{len(planes)}.nii.gz"
        result = genmed("complete", tmp_path / "part.stl", "--model", folder, "--out", out, "--samples", 1, *planes)
        assert result.exit_code == 0, result.output
        whole = read_labels(out)
        ml = np.count_nonzero(whole.data) * np.prod(whole.spacing_mm) / 1000
        assert ml == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.4)


def test_a_completion_lies_rightly_on_any_grid() -> None:
    n, voxel_mm, origin = 24, 2.0, np.array([10.0, -40.0, 5.0])
    middle = origin + voxel_mm * (n - 1) / 2
    cube = np.linalg.norm(np.indices((n, n, n)) - (n - 1) / 2, axis=0) - 7
    shape = shape_at(cube, np.append(middle, np.log(voxel_mm)))
    found = Completion((shape, shape), 0.0, None, 0.0, 0)
    grids = (AFFINES["oblique"], (40, 50, 60)), (np.diag([3.0, 3, 3, 1]), (60, 20, 30)), (np.eye(4), (9, 9, 9))
    for affine, size in grids:
        moved = affine.copy()
        moved[:3, 3] += middle - moved[:3, :3] @ (np.array(size) / 2) - moved[:3, 3] + 5
        world = np.moveaxis(np.indices(size), 0, -1) @ moved[:3, :3].T + moved[:3, 3]
        true = voxel_mm * np.clip(np.linalg.norm(world - middle, axis=-1) / voxel_mm - 7, -TRUNCATION, TRUNCATION)
        np.testing.assert_allclose(found.distance_mm(Grid(size, moved)), true, atol=0.6)  # of kinks, too
        inside = found.probability(Grid(size, moved)) > 0.5
        np.testing.assert_array_equal(inside[np.abs(true) > 0.3], (true < 0)[np.abs(true) > 0.3])


def test_what_the_model_does_not_know_is_not_rubbed_out(folder: Path, model: ShapeModel, tmp_path: Path) -> None:
    affine, angle = np.diag([4.0, 4, 4, 1]), np.zeros((48, 48, 48), bool)
    angle[3:9, 21:27, 3:45] = angle[3:45, 21:27, 3:9] = True
    for inside, unlike in ((angle, True), (kidney(), False)):
        found = gm.complete(model, cue_of_labels(inside, affine, doubtful=True), samples=1)
        assert found.unlike is unlike
        assert dice(found.probability(Grid(inside.shape, affine)) > 0.5, inside) > 0.85
        Volume(inside.astype(np.uint8)[None], affine).save(tmp_path / "part.nii.gz")
        result = genmed("complete", tmp_path / "part.nii.gz", "--model", folder, "--out", tmp_path / "whole.nii.gz",
                        "--samples", 1, "--page", tmp_path / "page.html")  # fmt: skip
        assert result.exit_code == 0 and ("nothing that this model knows is like it" in result.output) is unlike
        whole = read_labels(tmp_path / "whole.nii.gz").data[0] != 0
        assert (whole == inside).all() or not unlike
        assert json.loads((tmp_path / "whole.manifest.json").read_text())["unlike"] is unlike


def test_agreement_counts_what_was_seen(model: ShapeModel) -> None:
    affine = np.diag([4.0, 4, 4, 1])
    whole = cue_of_labels(kidney(), affine, doubtful=True)
    low, high = whole.box_mm
    voxel_mm = 1.25 * float((high - low).max()) / model.plan.size
    posed = Posed(model, whole, torch.from_numpy(np.append((low + high) / 2, np.log(voxel_mm))[None]).float())
    places = (np.moveaxis(np.indices((model.plan.size,) * 3), 0, -1) - (model.plan.size - 1) / 2) * voxel_mm
    exact = ellipsoid_distance(np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2, places) / voxel_mm
    volume = torch.from_numpy(exact.clip(-TRUNCATION, TRUNCATION)).float()[None, None]
    assert agreement(volume, posed) > 0.95
    assert agreement(volume.abs() + 1, posed) == 0
    half = volume.clone()
    half[:, :, : model.plan.size // 2] = TRUNCATION
    assert 0.5 < agreement(half, posed) < 0.85


HOLLOW = together(ball(30.0), Mesh(ball(15.0).vertices, ball(15.0).faces[:, ::-1]))


@pytest.mark.parametrize("planes", [{"axial": [0.5]}, {"axial": [0.0, 12.0], "coronal": [-20.0], "sagittal": [7.0]}])
def test_sections_of_a_surface_say_what_is_inside(planes: dict[str, list[float]]) -> None:
    for faces in (HOLLOW.faces, HOLLOW.faces[:, ::-1]):
        cue, ribbons = cue_of_sections(Mesh(HOLLOW.vertices, faces), planes)
        radius = np.linalg.norm(cue.points_mm, axis=1)
        inside, clear = (radius > 15) & (radius < 30), (np.abs(radius[:, None] - [15, 30]) > 0.1).all(axis=1)
        clear &= (cue.lower_mm != 0) | (cue.upper_mm != 0)
        np.testing.assert_array_equal((cue.upper_mm <= 0)[clear], inside[clear])
        assert inside.any() and not inside.all()
        off = np.abs(np.linalg.norm(ribbons.vertices, axis=1)[:, None] - [15, 30]).min(axis=1)
        assert off.max() < 1.0  # as wide as the cue is fine


@pytest.mark.parametrize("unseen", ["a larger body", "holes", "turned faces", "a hole met"])
def test_nothing_of_a_surface_outside_its_planes_is_looked_at(unseen: str) -> None:
    vertices, faces = HOLLOW.vertices, HOLLOW.faces
    heights, draws = vertices[faces][:, :, 2], np.random.default_rng(0).random(len(faces))
    mesh = {
        "a larger body": together(HOLLOW, ball(100.0, (0, 0, 300))),
        "holes": Mesh(vertices, faces[(np.abs(heights) < 6).any(axis=1)]),
        "turned faces": Mesh(vertices, np.where(draws[:, None] < 0.3, faces[:, ::-1], faces)),
        "a hole met": Mesh(vertices, np.delete(faces, np.abs(heights - 0.5).max(axis=1).argmin(), axis=0)),
    }[unseen]
    apart = Mesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))
    found, expected = (cue_of_sections(m, {"axial": [0.5]})[0] for m in (apart, HOLLOW))  # apart: as in STL files
    np.testing.assert_allclose(found.points_mm, expected.points_mm)
    np.testing.assert_allclose(found.lower_mm, expected.lower_mm)
    np.testing.assert_allclose(found.upper_mm, expected.upper_mm)


def test_what_was_repaired_is_told(folder: Path, tmp_path: Path) -> None:
    whole = ball(50.0)
    save_mesh(Mesh(whole.vertices, whole.faces[20:]), tmp_path / "part.stl")
    result = genmed("complete", tmp_path / "part.stl", "--model", folder, "--out", tmp_path / "out.stl", "--samples", 1)
    assert result.exit_code == 0, result.output
    repairs = json.loads((tmp_path / "out.manifest.json").read_text())["repairs"]
    assert len(repairs) == 1 and "closed" in repairs[0]


def matter_of(page: str) -> list[dict[int, int]]:
    """How many vertices of each class every column has."""
    scene = json.loads(page.split("id=scene>")[1].split("</script>")[0])
    found = []
    for column in scene["columns"]:
        content = zlib.decompress(base64.b64decode(column["data"]))[-column["vertices"] :]
        found.append(dict(zip(*(a.tolist() for a in np.unique(list(content), return_counts=True)), strict=True)))
    return found


def test_a_page_shows_what_was_seen_beside_the_completion(part: Path, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    pages = []
    for whole in (part, tmp_path / "other.nii.gz"):
        if whole != part:  # what is not seen is not in the page
            data = gm.read_labels(part).data.copy()
            data[..., :14] = 1
            Volume(data, np.diag([4.0, 4, 4, 1])).save(whole)
        result = genmed("complete", whole, "--model", folder, "--out", tmp_path / "out.nii.gz", "--samples", 1,
                        "--planes", "axial=14,axial=17", "--page", page)  # fmt: skip
        assert result.exit_code == 0, result.output
        pages.append(page.read_text("utf-8"))
    seen, completed = matter_of(pages[0])
    assert set(seen) == {OBSERVED} and set(completed) == {OBSERVED, UNOBSERVED}
    assert matter_of(pages[1]) == [seen, completed]
    scene = json.loads(pages[0].split("id=scene>")[1].split("</script>")[0])
    assert [np.unique(np.array(plane)[:, 2]).tolist() for plane in scene["planes"]] == [[56.0], [68.0]]
    assert json.loads((tmp_path / "out.manifest.json").read_text())["page"] == str(page)


def figures_of(page: str) -> list[dict[str, str]]:
    columns = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    return [dict(re.findall(r"<dt>(.*?)</dt> <dd>(.*?)</dd>", column)) for column in columns]


def test_a_truth_is_a_ghost_and_measures_both_columns(part: Path, folder: Path, tmp_path: Path) -> None:
    pages, out = [], tmp_path / "out.nii.gz"
    for truth in ([], ["--truth", part]):
        result = genmed("complete", part, "--model", folder, "--out", out, "--samples", 1, "--planes", TRIPLE,
                        "--page", tmp_path / "page.html", *truth)  # fmt: skip
        assert result.exit_code == 0, result.output
        pages.append(((tmp_path / "page.html").read_text("utf-8"), out.read_bytes()))
    (plain, before), (page, after) = pages
    assert before == after  # nothing but the page looks at the truth
    assert scene_of(plain)["ghost"] is None and scene_of(page)["ghost"]
    seen, completed = figures_of(page)
    slabs = planes_of(gm.read_labels(part), {"axial": [14], "coronal": [18], "sagittal": [17]}) & kidney()
    assert seen["Dice"] == f"{dice(slabs, kidney()):.3f}"
    assert completed["Dice"] == f"{dice(gm.read_labels(out).data[0] != 0, kidney()):.3f}" > "0.85"
    assert float(completed["Chamfer ×100"]) < float(seen["Chamfer ×100"])
    assert 0 < float(seen["UHD ×100"]) < 4  # of the truth's points in the planes
    assert not any("Dice" in column for column in figures_of(plain))
    assert json.loads((tmp_path / "out.manifest.json").read_text())["truth"] == str(part)


@pytest.mark.parametrize("planes", [[], ["--planes", "axial=75,sagittal=198"]])
def test_a_page_of_a_surface_shows_matter_that_does_not_belong(planes: list[str], folder: Path, tmp_path: Path) -> None:
    radii = np.array(RADII["kidney"]) * EXTENT_MM["kidney"] / 2
    kidney = Mesh(ball(1.0).vertices * radii + [200.0, -30, 70], ball(1.0).faces)
    save_mesh(together(kidney, ball(16.0, (255, -30, 70))), tmp_path / "part.stl")
    page = tmp_path / "page.html"
    part = tmp_path / "part.stl"
    result = genmed("complete", part, "--model", folder, "--out", tmp_path / "out.stl", "--samples", 1,
                    "--page", page, "--truth", part, *planes)  # fmt: skip
    assert result.exit_code == 0, result.output
    seen, completed = matter_of(page.read_text("utf-8"))
    assert (REDUNDANT in seen) == (not planes) and OBSERVED in seen and REDUNDANT not in completed
    assert float(figures_of(page.read_text("utf-8"))[0]["UHD ×100"]) < 1  # of the truth's points in what was seen


def test_what_was_seen_of_a_surface_lies_in_its_mask_or_near_its_planes(tmp_path: Path) -> None:
    mask = np.zeros((1, 4, 4, 4), np.uint8)
    mask[..., 0] = 1
    Volume(mask, np.eye(4)).save(tmp_path / "mask.nii.gz")
    cue = cue_of_labels(kidney(), np.eye(4))
    looked = shapes._looked_at(None, None, cue, {"axial": [10.0]}, tmp_path / "mask.nii.gz")
    points = np.array([[0, 0, 0.4], [0, 0, 0.6], [-1, 0, 0], [9, 9, 10.4], [9, 9, 10.6]])
    assert looked(points).tolist() == [True, False, False, True, False]
    assert shapes._looked_at(None, None, cue, {}, None)(points).all()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("spleen of a cat's left liver and kidney", "names several structures (kidney, spleen)"),
        ("linke Niere", "names no structure that this model knows (femur, kidney, spleen)"),
        ("renal artery", "also says 'artery', so that kidney may not be meant"),
        ("linke kidney", "has words of another language ('linke'), so that kidney may not be meant"),
    ],
)
def test_a_text_that_is_not_of_one_known_structure_is_said_and_not_used(
    words: str, why: str, part: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.nii.gz"
    options = ("--planes", TRIPLE, "--samples", 1, "--text", words)
    result = genmed("complete", part, "--model", folder, "--out", out, *options)
    assert result.exit_code == 0 and result.stderr.count("\n") == 1 and f'"{words}" {why}' in result.stderr
    assert json.loads((tmp_path / "out.manifest.json").read_text())["text"] is None
    made = genmed("generate", "--model", folder, "--out", tmp_path, "-n", 1, "--text", words)
    assert made.exit_code == 0 and f'"{words}" {why}; going on without text' in made.stderr


def test_a_side_that_a_structure_has_not_is_left_out(blank: ShapeModel) -> None:
    warning, found = shapes.words(blank, "left kidney")
    assert 'going on with "kidney"' in warning
    assert torch.equal(found, embed(["kidney"])[0])


@pytest.mark.parametrize("chosen", [[], ["--format", "ply"], ["--format", "glb"]])
def test_generate_writes_surfaces_and_what_they_are(folder: Path, tmp_path: Path, chosen: list[str]) -> None:
    options = ["--model", folder, "--text", "left kidney", "-n", 3, "--out", tmp_path / "made", *chosen]
    result = genmed("generate", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "made" / "generated.json").read_text())["shapes"]
    assert [Path(row["file"]).suffix for row in rows] == [f".{chosen[-1] if chosen else 'stl'}"] * 3
    for row in rows:
        assert read_mesh(tmp_path / "made" / row["file"]).volume_ml == pytest.approx(row["volume_ml"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--planes", "axial=99"], ["axial=99", "outside"]),
        (["--planes", "axial=1"], ["cue is empty"]),
        (["--planes", "axial=1.5"], ["whole numbers"]),
        (["--planes", "oblique=3"], ["no plane"]),
        (["--planes", ""], ["no plane"]),
        (["--samples", 0], ["samples"]),
        (["--seed", -1], ["seed"]),
        (["--out", "out.txt"], ["out.txt", ".stl"]),
        (["--page", "page.txt"], ["--page page.txt", "page.html"]),
        (["--truth", "part.nii.gz"], ["--truth part.nii.gz", "--page"]),
        (["--page", "page.html", "--truth", "nowhere.stl"], ["nowhere.stl", "not found"]),
        (["--page", "page.html", "--truth", "out.nii.gz"], ["out.nii.gz", "overwrite the truth"]),
        (["--model", "hippocampus-mr"], ["model of images"]),
        (["--observed", "nowhere.nii.gz"], ["nowhere.nii.gz"]),
    ],
)
def test_bad_options_give_one_line_and_no_file(
    options: list[object], words: list[str], part: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen: dict[object, object] = {"--model": folder, "--out": "out.nii.gz"}
    chosen |= dict(zip(options[::2], options[1::2], strict=True))
    result = genmed("complete", part, *(word for pair in chosen.items() for word in pair))
    failed_in_one_line(result, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["part.nii.gz"]


def test_fewer_shapes_leave_none_of_an_earlier_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shape-0002.stl.txt").write_text("mine")
    (tmp_path / "shape-0009.stl").write_text("mine, too")
    for count, *chosen in ((3,), (2, "--format", "glb"), (1, "--format", "ply")):
        assert genmed("generate", "--model", folder, "-n", count, "--out", tmp_path, *chosen).exit_code == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["generated.json", "shape-0000.ply", "shape-0002.stl.txt", "shape-0009.stl"]


def test_the_input_is_never_overwritten(part: Path, folder: Path, tmp_path: Path) -> None:
    surface, mask = tmp_path / "part.stl", tmp_path / "mask.nii.gz"
    save_mesh(ball(30.0), surface)
    mask.write_bytes(part.read_bytes())
    (tmp_path / "link.nii.gz").symlink_to(part)
    before = {path: path.read_bytes() for path in (part, surface, mask)}
    for given, out, options in (
        (part, part, ["--planes", TRIPLE]),
        (part, tmp_path / "link.nii.gz", ["--planes", TRIPLE]),
        (part, mask, ["--observed", mask]),
        (surface, surface, []),
    ):
        result = genmed("complete", given, "--model", folder, "--out", out, *options)
        failed_in_one_line(result, out.name, "would overwrite the input")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def blank() -> ShapeModel:
    """Untrained, for what ends before it is asked."""
    return build_shapes_model(ShapePlan("blank", {"kidney": ()}, 16, 8, 4, 2, 8, 1, 0.0, 1.0))


@pytest.mark.parametrize("doubtful", [True, False])
def test_a_border_is_believed_where_it_is_near(doubtful: bool) -> None:
    n, step_mm = 48, 2.0
    blank = build_shapes_model(ShapePlan("blank", {"kidney": ()}, n, 8, 4, 2, 8, 1, 0.0, 1.0))
    place = step_mm * (np.moveaxis(np.indices((n, n, n)), 0, -1) - (n - 1) / 2)

    def away(middle: list[float], radius: float) -> np.ndarray:
        return (np.linalg.norm(place - middle, axis=-1) - radius) / step_mm

    radius = 0.25 * n * step_mm
    seen, beside = away([0, 0, 0], radius) < 0, away([radius, radius, 0], 0.5 * radius) < 0
    affine = np.diag([step_mm, step_mm, step_mm, 1])
    affine[:3, 3] = place[0, 0, 0]
    cue = cue_of_labels(seen | beside, affine, doubtful=doubtful)
    posed = Posed(blank, cue, torch.tensor([[0.0, 0.0, 0.0, np.log(step_mm)]]))
    made = torch.from_numpy(away([0, 0, 0], radius - 1.4 * step_mm)[None, None]).float().clamp(-TRUNCATION, TRUNCATION)
    found = believed(made, posed)[0, 0].numpy() < 0
    assert (found ^ seen)[~beside].sum() < 0.003 * seen.sum()  # but where both bodies meet
    inner = away([radius, radius, 0], 0.5 * radius - 4 * step_mm) < 0
    assert not found[inner & ~seen].any()


@pytest.mark.parametrize("place", ["out", "page"])
def test_a_place_where_nothing_can_be_written_is_told_before_any_work(
    place: str, part: Path, blank: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "complete", None)
    (tmp_path / "file").touch()
    places = {"out": tmp_path / "out.stl", "page": tmp_path / "page.html"}
    places[place] = tmp_path / "file" / "deep" / places[place].name
    with pytest.raises(GenMedError, match=f"--{place} .*file is no folder that may be written to"):
        complete_file(blank, part, **places)
    with pytest.raises(GenMedError, match="file is no folder"):
        generate_files(blank, tmp_path / "file" / "deep", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "part.nii.gz"]


def test_a_completion_that_diverges_is_told_in_one_line(
    part: Path, blank: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*given: object, **asked: object) -> None:
        raise Diverged("left the range of the data")

    monkeypatch.setattr(shapes, "complete", diverging)
    with pytest.raises(GenMedError, match=r"part\.nii\.gz: the completion diverged .*--seed"):
        complete_file(blank, part, tmp_path / "out.nii.gz", planes=TRIPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["part.nii.gz"]


def test_bad_parts_give_one_line(folder: Path, tmp_path: Path) -> None:
    several = tmp_path / "several.nii.gz"
    Volume(np.pad(np.array([[[[1, 2]]]], np.uint8), ((0, 0), *[(4, 4)] * 3)), np.eye(4)).save(several)
    half = tmp_path / "half.nii.gz"
    Volume(np.full((1, 8, 8, 8), 0.5, np.float32), np.eye(4)).save(half)
    empty = tmp_path / "empty.nii.gz"
    Volume(np.zeros((1, 8, 8, 8), np.uint8), np.eye(4)).save(empty)
    away = tmp_path / "away.nii.gz"
    Volume(np.ones((1, 8, 8, 8), np.uint8), np.diag([1.0, 1, 1, 1])).save(away)  # inside of all surfaces below
    metres = tmp_path / "metres.stl"
    save_mesh(ball(0.05), metres)
    opened = tmp_path / "open.stl"
    whole = ball(30.0)
    save_mesh(Mesh(whole.vertices, whole.faces[whole.vertices[whole.faces[:, 0], 2] > -5]), opened)
    flat = tmp_path / "flat.stl"
    save_mesh(Mesh(whole.vertices * [1, 1, 0], whole.faces), flat)
    sound = tmp_path / "sound.stl"
    save_mesh(whole, sound)
    turned = tmp_path / "turned.nii.gz"
    Volume(3 - np.linalg.norm(np.indices((9, 9, 9)) - 4, axis=0)[None], np.eye(4)).save(turned)
    for path, options, words in (
        (several, [], "several labels"),
        (half, [], "not labels"),
        (half, ["--distances"], "half.nii.gz: no signed distances"),
        (turned, ["--distances"], "turn the sign"),
        (sound, ["--distances"], "sound.stl: holds a surface or points; --distances"),
        (empty, [], "cue is empty"),
        (metres, [], "metres"),
        (opened, [], "open"),
        (flat, [], "flat.stl"),
        (sound, ["--planes", "axial=400"], "no plane meets"),
        (sound, ["--observed", str(empty)], "sound.stl: the mask is empty"),
        (sound, ["--observed", str(away)], "sound.stl: mask and surface do not meet"),
        (tmp_path / "absent.nii.gz", [], "absent.nii.gz"),
    ):
        failed_in_one_line(genmed("complete", path, "--model", folder, "--out", tmp_path / "out.stl", *options), words)
    failed_in_one_line(genmed("generate", "--model", folder, "--out", empty), "give a folder")
    failed_in_one_line(genmed("generate", "--model", folder, "--out", tmp_path / "x", "-n", 0), "-n 0")
    failed_in_one_line(genmed("generate", "--model", folder, "--out", tmp_path / "x", "--format", "obj"), "stl, ply")
    failed_in_one_line(genmed("generate", "--model", folder, "--out", tmp_path / "x", "--volume", -1), "above 0, in ml")
    assert not (tmp_path / "x").exists()


def test_planes_are_read_as_they_are_written() -> None:
    assert parse_planes("axial=30, axial=40,coronal=-5.5") == {"axial": [30, 40], "coronal": [-5.5]}
    assert parse_planes(None) == {}
    with pytest.raises(GenMedError, match="no plane"):
        parse_planes("axial=30,")
