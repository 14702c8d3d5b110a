"""Segmentation and completion in a chain: what is sure stays, what is not is completed."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from test_cli import failed_in_one_line
from test_comparison import scene_of
from test_complete import figures_of, genmed, kidney
from test_hub import CARD
from test_shape import dice
from tiny import PLAN as BASE

from genmed import hub, text
from genmed.bench import chain as bench
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import Model
from genmed.shape_model import ShapeModel, load_shapes
from genmed.tasks import chain as task
from genmed.tasks import view
from genmed.tasks.chain import Structure, completed, divided, joined, seen_slices, structures_of
from genmed.tasks.segment import Interval, Segmentation
from genmed.volume import Grid, Volume, read_labels

AFFINE = np.diag([4.0, 4, 4, 1])
PLAN = replace(
    BASE, labels=("background", "kidney", "stone"), label_values=(0, 1, 5), spacing_mm=(4.0, 4.0, 4.0),
    extent_mm=(200.0, 200.0, 200.0),
)  # fmt: skip
SEGMENTER = Model(plan=PLAN, denoiser=None, folder=None, sha256="a" * 64)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shapes(tiny_shapes_model: Path) -> ShapeModel:
    return load_shapes(tiny_shapes_model)


def few_slices(count: int = 4) -> np.ndarray:
    seen = np.zeros((36, 36, 36), bool)
    seen[:, :, np.linspace(6, 24, count).round().astype(int)] = True
    return seen


def linear(truth: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Linear interpolation of slices above one half: inside where the closest is, halfway where both are."""
    kept = np.flatnonzero(seen.any(axis=(0, 1)))
    away = np.abs(np.arange(36)[:, None] - kept)
    closest = away == away.min(axis=1, keepdims=True)
    return np.stack([truth[:, :, kept[chosen]].all(axis=2) for chosen in closest], axis=2)


def scan() -> Volume:
    return Volume(np.random.default_rng(0).normal(size=(1, 36, 36, 36)).astype(np.float32), AFFINE)


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A segmentation that knows the kidney where it was seen and nothing elsewhere; a stone lies apart."""
    chosen: dict[str, Any] = {"mode": "conditional"}

    def segment(model: Model, scan: Volume, *, observed: Volume | None, seed: int, **asked: Any) -> Segmentation:
        chosen["asked"] = asked
        observed = view.seen_slices(scan)[0] if observed is None else observed
        inside = kidney() if observed is None else kidney() & (observed.data[0] != 0)
        stone = np.zeros_like(inside)
        stone[30:33, 30:33, 30:33] = True
        soft = np.stack([~(inside | stone), inside, stone]).astype(np.float32)
        return Segmentation(
            labels=scan, soft=Volume(soft, AFFINE), residual=0.0, mode=chosen["mode"], match="none",
            volume_ml={"kidney": Interval(1, 1, 1), "stone": Interval(2, 2, 2)}, seconds=0.1, seed=seed, image=None,
            observed=observed,
        )  # fmt: skip

    monkeypatch.setattr(task, "segment", segment)
    return chosen


def test_slices_that_were_not_seen_are_completed_and_sure_voxels_stay(shapes: ShapeModel) -> None:
    truth, seen = kidney(), few_slices()
    chance = np.where(seen, truth, 0).astype(float)
    found, whole = completed(shapes, chance, seen, AFFINE, "kidney", samples=4)
    assert dice(whole > 0.5, truth) > 0.85 > 0.82 > dice(linear(truth, seen), truth) > 0.5 > dice(truth & seen, truth)
    np.testing.assert_array_equal(whole[seen], chance[seen])
    assert len(found.shapes) == 4


def test_what_was_not_seen_cannot_change_the_completion(shapes: ShapeModel) -> None:
    seen = few_slices()
    garbage = np.where(seen, kidney(), np.random.default_rng(1).random(seen.shape))
    plain = np.where(seen, kidney(), 0.0)
    results = [completed(shapes, chance, seen, AFFINE, "kidney", samples=1)[1] for chance in (garbage, plain)]
    np.testing.assert_array_equal(*results)


def test_unsure_voxels_give_no_cue_and_are_settled_between_both(shapes: ShapeModel) -> None:
    truth, seen = kidney(), np.ones((36, 36, 36), bool)
    chance = np.where(np.indices(seen.shape)[2] % 5 == 0, truth, 0.25 + 0.4 * truth)
    sure = np.abs(chance - 0.5) >= 0.4
    found, whole = completed(shapes, chance, seen, AFFINE, "kidney", samples=1)
    drawn = found.probability(Grid((36, 36, 36), AFFINE))
    np.testing.assert_array_equal(whole[sure], chance[sure])
    np.testing.assert_allclose(whole[~sure], ((chance + drawn) / 2)[~sure], atol=1e-6)
    _, alone = completed(shapes, chance, sure, AFFINE, "kidney", samples=1)
    np.testing.assert_allclose(alone[~sure], drawn[~sure], atol=1e-6)


def test_the_chain_completes_known_labels_and_leaves_others(shapes: ShapeModel, segmented: dict[str, Any]) -> None:
    seen = few_slices()
    observed = Volume(seen[None].astype(np.uint8), AFFINE)
    made = task.chain(SEGMENTER, shapes, scan(), observed=observed, match="none")
    labels = made.segmentation.labels.data[0]
    assert dice(labels == 1, kidney()) > 0.85
    assert (labels[30:33, 30:33, 30:33] == 5).all() and (labels == 5).sum() == 27
    np.testing.assert_array_equal((labels == 1)[seen], kidney()[seen])
    assert list(made.completed) == ["kidney"] and made.completed["kidney"]["text"] == "kidney"
    assert len(made.notes) == 1 and 'stone: not completed, since "stone" names no structure' in made.notes[0]
    volumes = made.segmentation.volume_ml
    assert volumes["kidney"]._asdict() == made.completed["kidney"]["volume_ml"]
    assert volumes["stone"] == Interval(2, 2, 2)
    chances = made.segmentation.probabilities
    assert chances is not None
    np.testing.assert_allclose(chances.data.sum(axis=0), 1, atol=1e-5)
    assert segmented["asked"] == {"grid": "model", "match": "none", "progress": None}


def test_guided_segmentations_have_a_say_where_nothing_was_seen(shapes: ShapeModel, segmented: dict[str, Any]) -> None:
    observed = Volume(few_slices()[None].astype(np.uint8), AFFINE)
    found = []
    for mode in ("conditional", "restore-then-condition"):
        segmented["mode"] = mode
        made = task.chain(SEGMENTER, shapes, scan(), observed=observed, shapes=1)
        assert made.segmentation.probabilities is not None
        assert "kidney" not in made.segmentation.volume_ml  # one shape has no interval
        found.append(made.segmentation.probabilities.data[1])
    hidden = ~few_slices()
    np.testing.assert_allclose(found[1][hidden], found[0][hidden] / 2, atol=1e-5)  # this one says: nothing is there


def test_a_structure_of_which_nothing_is_sure_is_kept(shapes: ShapeModel, segmented: dict[str, Any]) -> None:
    observed = np.zeros((1, 36, 36, 36), np.uint8)
    observed[..., 34] = 1
    made = task.chain(SEGMENTER, shapes, scan(), observed=Volume(observed, AFFINE), label="kidney")
    assert not made.completed and "kidney: not completed, its segmentation is kept (the cue is empty" in made.notes[0]
    assert not (made.segmentation.labels.data == 1).any()
    assert "kidney" in made.segmentation.volume_ml


def test_a_missing_package_ends_the_chain_before_anything_is_segmented(
    shapes: ShapeModel, segmented: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    scan().save(tmp_path / "scan.nii.gz")
    with pytest.raises(GenMedError, match=r"'\.\[text\]'"):
        task.chain_files(SEGMENTER, shapes, tmp_path / "scan.nii.gz", tmp_path / "out")
    assert "asked" not in segmented and not (tmp_path / "out").exists()


@given(
    npst.arrays(np.float64, (4, 2, 2, 2), elements=st.floats(0.01, 1)),
    npst.arrays(np.float64, (2, 2, 2, 2), elements=st.floats(0, 1)),
)
def test_joined_probabilities_sum_to_one_and_keep_completed_ones(soft: np.ndarray, chance: np.ndarray) -> None:
    soft = soft / soft.sum(axis=0)
    whole = joined(soft, {(1, 2): chance[0], (3,): chance[1]})
    np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-5)
    fits = chance.sum(axis=0) <= 1
    np.testing.assert_allclose((whole[1] + whole[2])[fits], chance[0][fits], atol=1e-5)
    np.testing.assert_allclose(whole[3][fits], chance[1][fits], atol=1e-5)
    np.testing.assert_array_equal(joined(soft, {}), soft.astype(np.float32))


def test_labels_of_one_structure_share_it_as_they_did() -> None:
    soft = np.zeros((3, 6, 1, 1))
    soft[1, 0], soft[2, 1:3], soft[0, 3:] = 1, 1, 1
    whole = joined(soft, {(1, 2): np.array([1.0, 1, 1, 1, 0, 0]).reshape(6, 1, 1)})
    assert whole.argmax(axis=0).ravel().tolist() == [1, 2, 2, 2, 0, 0]


def test_thick_slices_are_divided_and_their_middles_stay_centres() -> None:
    affine = np.diag([2.0, -2.0, 10.0, 1.0])
    affine[:3, 3] = [5, 6, 7]
    fine = divided(Grid((4, 5, 3), affine))
    assert fine.shape == (4, 5, 15) and fine.spacing_mm == pytest.approx((2, 2, 2))
    np.testing.assert_allclose((fine.affine @ [1, 2, 7, 1])[:3], (affine @ [1, 2, 1, 1])[:3])
    np.testing.assert_allclose(fine.corners_mm().min(axis=0), Grid((4, 5, 3), affine).corners_mm().min(axis=0))
    assert divided(fine).shape == fine.shape


@pytest.mark.parametrize(
    "labels, categories, label, text, answer",
    [
        (("Anterior", "Posterior"), ("hippocampus",), None, None, [("Anterior+Posterior", "hippocampus")]),
        (("Anterior", "Posterior"), ("hippocampus", "anterior hippocampus"), "Anterior", None,
         [("Anterior", "anterior hippocampus")]),
        (("RV", "MYO", "LV"), ("left ventricle", "right ventricle"), None, None,
         [("RV", "right ventricle"), ("LV", "left ventricle")]),
        (("RV", "MYO", "LV"), ("heart",), "RV+LV+MYO", "whole heart", [("RV+LV+MYO", "whole heart")]),
        (("kidney_left",), ("kidney",), None, None, [("kidney_left", "left kidney")]),
        (("lump",), ("kidney",), None, None, []),
    ],
)  # fmt: skip
def test_names_of_labels_lead_to_structures(
    labels: tuple, categories: tuple, label: str | None, text: str | None, answer: list, shapes: ShapeModel
) -> None:
    plan = replace(PLAN, labels=("background", *labels), label_values=tuple(range(len(labels) + 1)))
    model = replace(shapes, plan=replace(shapes.plan, categories=dict.fromkeys(categories, ("left", "right"))))
    found, notes = structures_of(plan, model, label, text)
    assert found == [Structure(tuple(name.split("+")), words) for name, words in answer]
    covered = {name for structure in found for name in structure.labels}
    assert len(notes) == (0 if label else len(set(labels) - covered))


def test_sides_that_the_shapes_do_not_have_are_taken_of_labels_but_not_of_words(shapes: ShapeModel) -> None:
    plan = replace(PLAN, labels=("background", "adrenal_gland_left"), label_values=(0, 1))
    model = replace(shapes, plan=replace(shapes.plan, categories={"adrenal gland": ()}))
    assert structures_of(plan, model) == ([Structure(("adrenal_gland_left",), "adrenal gland")], [])
    found, notes = structures_of(plan, model, "adrenal_gland_left", "left adrenal gland")
    assert not found and "says 'left', but this model knows no left adrenal gland" in notes[0]


@pytest.mark.parametrize(
    "options, words",
    [({"label": "liver"}, "--label liver"), ({"label": "kidney,kidney"}, "twice"), ({"text": "kidney"}, "--text")],
)
def test_wrong_names_are_refused(shapes: ShapeModel, options: dict[str, str], words: str) -> None:
    with pytest.raises(GenMedError, match=words):
        structures_of(PLAN, shapes, **options)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    torch.manual_seed(0)
    model = hub.save_model(tmp_path / "tiny", PLAN, build(PLAN).state_dict(), CARD)
    scan().save(tmp_path / "scan.nii.gz")
    Volume(few_slices()[None].astype(np.uint8), AFFINE).save(tmp_path / "seen.nii.gz")
    return tmp_path / "scan.nii.gz", tmp_path / "seen.nii.gz", model


def test_the_command_writes_what_segment_does_and_says_what_was_kept(
    files: tuple[Path, Path, Path], tiny_shapes_model: Path, segmented: dict[str, Any], tmp_path: Path
) -> None:
    path, seen, model = files
    options = ("--segment", model, "--complete", tiny_shapes_model, "--observed", seen)
    result = genmed("chain", path, *options, "--out", tmp_path / "out", "--probabilities", "--json")
    assert result.exit_code == 0, result.output
    case = json.loads(result.stdout)["cases"]["scan"]
    assert list(case["completed"]) == ["kidney"] and case["structures"]["kidney"]["ml"] > 0
    assert 'genmed: stone: not completed, since "stone" names no structure' in result.stderr
    given, made = nib.load(path), nib.load(tmp_path / "out" / "scan.nii.gz")
    assert np.array_equal(given.affine, made.affine) and given.shape == made.shape
    assert dice(np.asarray(made.dataobj) == 1, kidney()) > 0.85
    assert read_labels(tmp_path / "out" / "scan.nii.gz").label_names[5] == "stone"
    assert (tmp_path / "out" / "scan.probabilities.nii.gz").is_file()
    again = genmed("chain", path, *options, "--out", tmp_path / "out", "--probabilities")
    assert again.exit_code == 0 and "finished before" in again.stdout
    other = genmed("chain", path, *options, "--out", tmp_path / "out", "--probabilities", "--label", "kidney")
    assert other.exit_code == 0 and "finished before" not in other.stdout
    fine = genmed("chain", path, *options, "--shapes", 1, "--out", tmp_path / "fine.nii.gz", "--grid", "model")
    assert fine.exit_code == 0 and (tmp_path / "fine.nii.gz.manifest.json").is_file()


@pytest.mark.parametrize("given", [True, False])
def test_a_page_shows_the_segmentation_alone_beside_its_completion(
    files: tuple[Path, Path, Path], tiny_shapes_model: Path, segmented: dict[str, Any], tmp_path: Path, given: bool
) -> None:
    path, seen, model = files
    if not given:  # slices that were found empty by themselves
        Volume(scan().data * few_slices(), AFFINE).save(path)
    truth = np.where(kidney(), 1, 0).astype(np.uint8)
    truth[30:33, 30:33, 30:33] = 5
    Volume(truth[None], AFFINE).save(tmp_path / "truth.nii.gz")
    page, out = tmp_path / "page.html", tmp_path / "out.nii.gz"
    result = genmed("chain", path, "--segment", model, "--complete", tiny_shapes_model, "--shapes", 1,
                    "--out", out, "--page", page, "--truth", tmp_path / "truth.nii.gz",
                    *(("--observed", seen) if given else ()))  # fmt: skip
    assert result.exit_code == 0, result.output
    scene = scene_of(page.read_text("utf-8"))
    alone, completed = figures_of(page.read_text("utf-8"))
    found = truth * few_slices()
    found[30:33, 30:33, 30:33] = 5
    assert alone["Dice"] == f"{dice(found != 0, truth != 0):.3f}"
    assert completed["Dice"] == f"{dice(read_labels(out).data[0] != 0, truth != 0):.3f}" > "0.8" > alone["Dice"]
    assert 0 < float(alone["UHD ×100"]) < 5  # of the truth's points in seen slices
    assert [np.unique(np.array(plane)[:, 2]).tolist() for plane in scene["planes"]] == [[24], [48], [72], [96]]
    assert scene["ghost"] and "stone" in page.read_text("utf-8")


def test_seen_slices_are_drawn_where_they_lie_whatever_the_grid_of_the_labels() -> None:
    fine = np.diag([2.0, 2, 2, 1])
    fine[:3, 3] = -1
    labels = Volume(kidney().repeat(2, 0).repeat(2, 1).repeat(2, 2)[None].astype(np.uint8), fine)
    page = task.chain_page(labels, labels, Volume(few_slices()[None].astype(np.uint8), AFFINE), title="fine")
    planes = scene_of(page)["planes"]
    assert [np.unique(np.array(plane)[:, 2]).tolist() for plane in planes] == [[24], [48], [72], [96]]


def test_of_neighbouring_slices_the_first_and_the_last_are_drawn() -> None:
    seen = np.zeros((4, 5, 9), bool)
    seen[:, :, [0, 3, 4, 5, 6, 8]] = True
    seen[1, 2] = True
    assert seen_slices(seen) == [(2, 0), (2, 3), (2, 6), (2, 8)]
    assert seen_slices(np.ones((3, 3, 3), bool)) == seen_slices(np.eye(3, dtype=bool)[None]) == []


def test_bad_input_ends_in_one_line(files: tuple[Path, Path, Path], tiny_shapes_model: Path, tmp_path: Path) -> None:
    path, _, model = files
    both = ("--segment", model, "--complete", tiny_shapes_model)
    for arguments, words in (
        (("--segment", model, "--complete", model), "is a model of images, not of shapes"),
        (("--segment", model, "--complete", tiny_shapes_model, "--label", "liver"), "--label liver"),
        (("--segment", model, "--complete", tiny_shapes_model, "--shapes", 0), "--shapes 0"),
        (("--segment", model, "--complete", tmp_path / "absent"), "absent"),
        ((*both, "--truth", path), "--page"),
        ((*both, "--page", tmp_path / "page.png"), "page.html"),
        ((*both, "--page", tmp_path / "page.html", "--truth", tmp_path / "none.stl"), "none.stl"),
        ((*both, "--page", tmp_path / "page.html", "--truth", path), "are not labels"),
    ):
        failed_in_one_line(genmed("chain", path, *arguments, "--out", tmp_path / "o.nii.gz"), words)
        assert not (tmp_path / "o.nii.gz").exists()
    page = tmp_path / "page.html"
    failed_in_one_line(genmed("chain", path, *both, "--page", page, "--out", tmp_path / "o"), "--page", "one scan")
    assert not page.exists() and not (tmp_path / "o").exists()


def test_a_page_of_nothing_is_refused_and_nothing_is_written(
    files: tuple[Path, Path, Path], tiny_shapes_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, _, model = files

    def segment(model: Model, scan: Volume, **asked: Any) -> Segmentation:
        soft = np.stack([np.ones((36, 36, 36)), *np.zeros((2, 36, 36, 36))]).astype(np.float32)
        return Segmentation(
            labels=scan, soft=Volume(soft, AFFINE), residual=0.0, mode="conditional", match="none",
            volume_ml={}, seconds=0.1, seed=0, image=None,
        )  # fmt: skip

    monkeypatch.setattr(task, "segment", segment)
    out, page = tmp_path / "o.nii.gz", tmp_path / "page.html"
    options = ("--segment", model, "--complete", tiny_shapes_model, "--out", out, "--page", page)
    failed_in_one_line(genmed("chain", path, *options), "no structure was found")
    assert not out.exists() and not page.exists()


def test_the_bench_goes_on_where_it_was_and_compares_pairs(
    shapes: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench.Arena("kidneys", {"a": "p1", "b": "p2"}, shapes, None, None, {})
    asked = []

    def scores(self: bench.Arena, row: Any, case: str) -> dict[str, float]:
        asked.append(case)
        return {bench.OBSERVED: 0.2, bench.LINEAR: 0.5, bench.CHAIN: 0.6 if case == "a" else 0.8}

    monkeypatch.setattr(bench.Arena, "scores", scores)
    first = bench.evaluate(replace(made, cases={"a": "p1"}), tmp_path)
    rows = bench.evaluate(made, tmp_path)
    assert asked == ["a", "b"] and rows[: len(first)] == first and len(rows) == 6
    bench.evaluate(replace(made, completer=replace(shapes, sha256="0" * 64)), tmp_path)
    assert asked == ["a", "b", "a", "b"]
    text = bench.report("kidneys", rows, "tiny")
    assert "| 70.0 [60.0, 80.0] |" in text and "| +20.0 [+10.0, +30.0] |" in text and "emulated" in text


def test_emulated_kidneys_are_scored_against_the_whole_mask(
    shapes: ShapeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "completed", partial(completed, samples=1))
    path = tmp_path / "case.nii.gz"
    Volume(kidney().astype(np.uint8)[None], AFFINE).save(path)
    item = bench.Item("made", path, "kidney", "left", "p")
    made = bench.Arena("kidneys", {"a": "p"}, shapes, None, None, {"a": item})
    found = made.scores(bench.INPUTS["kidneys"][0], "a")
    seen = bench.INPUTS["kidneys"][0].degrade(Volume(kidney()[None].astype(np.uint8), AFFINE), "a").seen
    _, whole = completed(shapes, kidney().astype(np.float32), seen, AFFINE, "left kidney", samples=1)
    results = {bench.OBSERVED: kidney() & seen, bench.LINEAR: linear(kidney(), seen), bench.CHAIN: whole > 0.5}
    assert found == {method: pytest.approx(dice(result, kidney())) for method, result in results.items()}
    assert min(found[bench.CHAIN], found[bench.LINEAR]) > 0.75 > found[bench.OBSERVED]
