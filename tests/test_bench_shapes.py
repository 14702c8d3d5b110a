"""`genmed bench shapes`: choice of shapes, scores, resuming, tables; and the generation table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.spatial import cKDTree
from test_cli import failed_in_one_line
from tiny_shapes import write_shapes
from typer.testing import CliRunner

from genmed.bench import generation, shape_solvers, shapes
from genmed.bench.cases import stratified
from genmed.bench.cues import KINDS, draw_cue
from genmed.bench.generation import (
    Drawn,
    Yardstick,
    cloud,
    nearest_of,
    rank_correlations,
    reconstructions,
    retrieval,
    training_clouds,
)
from genmed.bench.kept import read_rows
from genmed.bench.shape_peers import statistical
from genmed.bench.shape_solvers import METHODS, PCA_CHOICES, Lab, Solver, chosen_pca, solvers
from genmed.bench.shapes import (
    FAILED,
    Row,
    chosen_shapes,
    evaluate,
    finished,
    macro_mean,
    on_cube,
    run,
    score,
    truth_of,
)
from genmed.cli import app
from genmed.data.shapes import ShapeDataset, ShapeRow, read_shapes
from genmed.errors import GenMedError
from genmed.guide import Diverged
from genmed.metrics import bootstrap_interval
from genmed.shape import Shape
from genmed.shape_metrics import pairwise_chamfer
from genmed.shape_model import load_shapes
from genmed.train_shapes import train_shapes

QUICK = {"sided": (False,), "modes": (8, 4), "prior": (1.0,), "kept": (1,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set: spleens from another source, three of each category for the report, femurs unseen."""
    folder = write_shapes(tmp_path_factory.mktemp("shapes") / "set", 12)
    path = folder / "index.parquet"
    lines = pyarrow.parquet.read_table(path).to_pylist()
    for line in lines:
        number = int(line["id"].split("-")[1])
        line["part"] = "report" if 9 <= number < 12 else line["part"]
        line["part"] = "unseen" if line["category"] == "femur" else line["part"]
        line["source"] = "other" if line["category"] == "spleen" else "made"
        line["captions"] = [f"left {line['category']}", f"left {line['category']}, {line['extent_mm'] or 0:.0f} ml"]
        line["volume_ml"] = line["extent_mm"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> ShapeDataset:
    return read_shapes(folder)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny"
    return train_shapes(folder, out, steps=160, modes=12, width=64, blocks=2, refiner=4, batch=48)


# Which shapes ---------------------------------------------------------------------------------------------


def test_every_category_of_every_source_comes_before_any_comes_twice(data: ShapeDataset) -> None:
    for count in (1, 2, 3, 6, 99):
        chosen = stratified(data, "report", count)
        assert chosen == stratified(data, "report", count) and len(set(chosen)) == len(chosen) == min(count, 6)
    names = [data.rows[i].category for i in stratified(data, "report", 6)]
    assert set(names[:2]) == {"kidney", "spleen"} and names.count("kidney") == 3
    with_unseen = chosen_shapes(data, "report", 6)
    assert [data.rows[i].category for i in with_unseen[6:]] == ["femur", "femur"]
    assert all(data.rows[i].part == "tune" for i in chosen_shapes(data, "tune", 9))


def test_shapes_with_a_tumour_can_be_completed_alone(data: ShapeDataset) -> None:
    kidneys = [i for i in data.part("report") if data.rows[i].category == "kidney"]
    rows = tuple(replace(row, facts={"tumour": "yes"} if i in kidneys[:2] else {}) for i, row in enumerate(data.rows))
    ill = replace(data, rows=rows)
    assert sorted(chosen_shapes(ill, "report", 9, tumours=True)) == kidneys[:2]  # and no femurs
    assert len(chosen_shapes(ill, "report", 1, tumours=True)) == 1
    with pytest.raises(GenMedError, match="no shape with a tumour"):
        chosen_shapes(ill, "tune", 9, tumours=True)


def test_categories_come_in_turns_over_sources_and_not_by_the_alphabet(data: ShapeDataset) -> None:
    names = {"brain": [chr(97 + k) for k in range(15)], "heart": ["p", "q"], "atrium": ["z"]}
    kinds = [(source, category) for source, every in names.items() for category in every for _ in range(2)]
    rows = tuple(
        replace(data.rows[0], id=f"s{k}", source=source, category=category, part="tune")
        for k, (source, category) in enumerate(kinds)
    )
    many = replace(data, rows=rows)
    chosen = [(rows[i].source, rows[i].category) for i in stratified(many, "tune", 36)]
    assert [source for source, _ in chosen[:6]] == ["atrium", "brain", "heart", "brain", "heart", "brain"]
    assert len(set(chosen[:18])) == 18 and len(chosen) == 36  # every category once, then twice
    brain = [category for source, category in chosen[:8] if source == "brain"]
    assert brain != sorted(names["brain"])[: len(brain)]
    assert stratified(many, "tune", 7) == stratified(many, "tune", 36)[:7]


def test_settings_are_chosen_on_a_doubtful_map_too(folder: Path, model: Path, tmp_path: Path) -> None:
    cues = [cue for cue, _, _ in Lab(read_shapes(folder), load_shapes(model), tmp_path).tune]
    assert any(cue.doubtful and (cue.lower_mm != 0).any() for cue in cues)
    assert any(cue.doubtful and (cue.lower_mm == 0).all() for cue in cues) and not all(cue.doubtful for cue in cues)


def test_statistical_models_are_fitted_once(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[bool] = []
    monkeypatch.setattr(
        shape_solvers, "statistical", lambda data, sided: fitted.append(sided) or statistical(data, sided)
    )
    monkeypatch.setattr(shape_solvers, "TUNE_SHAPES", 2)
    monkeypatch.setattr(shape_solvers, "PCA_CHOICES", {**QUICK, "sided": (False, True), "modes": (4,)})
    monkeypatch.setattr(shape_solvers, "TUNE_KINDS", ("three planes",))
    solvers(Lab(read_shapes(folder), load_shapes(model), tmp_path), ["pca", "pca-unknown"])
    assert sorted(fitted) == [False, True]


@pytest.mark.parametrize(("part", "count"), [("train", 5), ("report", 0)])
def test_other_parts_and_no_shapes_are_refused(data: ShapeDataset, part: str, count: int) -> None:
    with pytest.raises(GenMedError, match=r"choose tune or report|1 or more"):
        chosen_shapes(data, part, count)


# Scores ---------------------------------------------------------------------------------------------------


def test_scores_of_the_truth_and_of_worse_ones_are_in_order(data: ShapeDataset) -> None:
    truth = data.shape(0)
    cue, seen = draw_cue(truth, "three planes", 0), np.ones(truth.sdf.shape, bool)
    exact = score([truth], truth_of(truth), seen, cue)
    moved = replace(truth, origin_mm=tuple(o + 2 * truth.voxel_mm for o in truth.origin_mm))
    worse = score([moved], truth_of(truth), seen, cue)
    assert exact.dice == exact.nsd == 1.0 and 0 < exact.cd < 1 and exact.uhd < 12  # samples of one surface differ
    assert worse.dice < 0.8 and worse.cd > 3 * exact.cd and worse.uhd > exact.uhd and worse.nsd < 0.9


def test_what_lies_beyond_the_truths_cube_counts(data: ShapeDataset) -> None:
    truth = data.shape(0)
    cue = draw_cue(truth, "three planes", 0)
    seen = np.ones(truth.sdf.shape, bool)
    centre = np.array(truth.origin_mm) + truth.voxel_mm * 7.5
    scores = []
    for factor in (1.5, 2.0):
        voxel_mm = factor * truth.voxel_mm
        grown = Shape(truth.sdf, voxel_mm, tuple((centre - voxel_mm * 7.5).tolist()))
        scores.append(score([grown], truth_of(truth), seen, cue))
    exact = [2 / (1 + factor**3) for factor in (1.5, 2.0)]
    np.testing.assert_allclose([s.dice for s in scores], exact, atol=0.02)
    assert scores[1].cd > scores[0].cd > 0


def test_a_piece_apart_counts_that_touches_no_side_of_the_truths_cube(data: ShapeDataset) -> None:
    truth = data.shape(0)
    away = replace(truth, origin_mm=(truth.origin_mm[0] + 21 * truth.voxel_mm, *truth.origin_mm[1:]))
    distance, margin = on_cube([away], truth)
    assert 8 < margin <= 16
    assert (distance < 0).sum() == (truth.sdf < 0).sum() > 0
    cue, seen = draw_cue(truth, "three planes", 0), np.ones(truth.sdf.shape, bool)
    found = score([away], truth_of(truth), seen, cue)
    assert found.dice == 0 and found.cd > 100 * (21 / 13) ** 2 / 2
    assert on_cube([truth], truth)[1] == 0


def test_both_pieces_of_a_prediction_count(data: ShapeDataset) -> None:
    truth = data.shape(0)
    n = data.size
    wide = np.full((3 * n, n, n), 127, np.int8)
    wide[:n], wide[n : 2 * n] = truth.sdf, truth.sdf
    sdf = np.full((3 * n,) * 3, 127, np.int8)
    sdf[:, n : 2 * n, n : 2 * n] = wide
    origin = (truth.origin_mm[0], *(o - n * truth.voxel_mm for o in truth.origin_mm[1:]))
    twice = Shape(sdf, truth.voxel_mm, origin)
    found = score([twice], truth_of(truth), np.ones((n,) * 3, bool), draw_cue(truth, "three planes", 0))
    assert found.dice == pytest.approx(2 / 3, abs=0.01)


def test_a_prediction_of_nothing_has_scores(data: ShapeDataset) -> None:
    truth = data.shape(0)
    nothing = replace(truth, sdf=np.full_like(truth.sdf, 127))
    found = score([nothing], truth_of(truth), np.ones(truth.sdf.shape, bool), draw_cue(truth, "one plane", 0))
    assert found.dice == found.nsd == 0.0 and found.cd > 1 and found.uhd > 20


def test_uhd_asks_only_for_what_was_seen(data: ShapeDataset) -> None:
    truth, n = data.shape(0), data.size
    half = np.indices((n,) * 3)[2] < n // 2
    cut = replace(truth, sdf=np.where(half, truth.sdf, 127).astype(np.int8))
    cue = draw_cue(truth, "half missing", 0)
    below = np.indices(half.shape)[2] < 6
    far, near = (score([cut], truth_of(truth), seen, cue).uhd for seen in (np.ones_like(half), below))
    assert near < 12 < far


# Means ----------------------------------------------------------------------------------------------------


def rows_of(values: dict[str, list[float]], method: str = "genmed") -> list[Row]:
    return [
        Row("report", f"{category}-{k}", "one plane", method, "k", "made", category, f"s{k}", value, 1, 2, 0.5, 0.1)
        for category, each in values.items()
        for k, value in enumerate(each)
    ]


def test_categories_count_the_same_however_many_shapes_they_have() -> None:
    rows = rows_of({"a": [1.0] * 9, "b": [0.0]})
    assert macro_mean(rows, [row.dice for row in rows]) == pytest.approx(0.5)


def test_data_sets_count_the_same_in_a_line_of_their_own() -> None:
    rows = rows_of({"a": [1.0] * 9, "b": [0.4], "c": [0.3, 0.5]})
    rows = [row._replace(source="other" if row.category == "a" else "made") for row in rows]
    table = shapes.score_table(rows, ["one plane"], ["genmed"], "dice")
    assert "| one plane | **0.600" in table and "| mean over data sets | **0.700" in table
    same = shapes.score_table([row._replace(source="made") for row in rows], ["one plane"], ["genmed"], "dice")
    assert "mean over data sets" not in same
    text = shapes.report({row.place: row for row in rows}, ["one plane"], ["genmed"], "report", {})
    headline = text.split("## made")[0]
    assert headline.count("mean over data sets") == len(shapes.METRICS) == text.count("mean over data sets")
    assert "mean of the UHD of each" in headline and "tumour" not in text
    ill = shapes.report({row.place: row for row in rows}, ["one plane"], ["genmed"], "report", {}, {"a-0", "c-1"})
    assert "## With a tumour: 2 shapes" in ill and "Paired differences of Dice, with a tumour" in ill


def test_weights_of_a_bootstrap_are_those_of_repeated_values() -> None:
    values, weights = [0.1, 0.5, 0.9, 0.4], [1, 2, 1, 3]
    groups = ["a", "b", "c", "d"]
    repeated = [v for v, w in zip(values, weights, strict=True) for _ in range(w)]
    same = [g for g, w in zip(groups, weights, strict=True) for _ in range(w)]
    assert bootstrap_interval(values, groups=groups, weights=weights) == pytest.approx(
        bootstrap_interval(repeated, groups=same)
    )


def test_the_best_peer_is_told_apart_from_the_others() -> None:
    rows = rows_of({"a": [0.8, 0.9]}) + rows_of({"a": [0.7, 0.8]}, "pca") + rows_of({"a": [0.3, 0.2]}, "nearest")
    table = shapes.difference_table(rows, ["one plane"], ["genmed", "pca", "nearest"])
    assert "PCA + GP, category told (best) | +0.100 [+0.100, +0.100]" in table and "nearest" not in table
    scores = shapes.score_table(rows, ["one plane"], ["genmed", "pca", "nearest"], "dice")
    assert "| one plane | **0.850 [0.800, 0.900]** |" in scores


def test_a_single_person_has_no_interval() -> None:
    scores = shapes.score_table(rows_of({"a": [0.8]}), ["one plane"], ["genmed"], "dice")
    assert "| one plane | **0.800** |" in scores


def test_a_kind_keeps_its_name_in_rows_and_is_called_what_it_is_in_tables() -> None:
    rows = [row._replace(kind="noisy sdf") for row in rows_of({"a": [0.8, 0.9]}) + rows_of({"a": [0.7, 0.8]}, "pca")]
    scores = shapes.score_table(rows, ["noisy sdf"], ["genmed", "pca"], "dice")
    for table in (scores, shapes.difference_table(rows, ["noisy sdf"], ["genmed", "pca"])):
        assert "| noisy border | " in table and "sdf" not in table


# The command ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_killed(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kinds": ["three planes", "noisy points"], "methods": ["genmed", "interpolation", "nearest"], "count": 2}
    calls: list[str] = []

    def counted(lab: Lab, columns: list[str]) -> dict[str, Solver]:
        def solver(name: str, solver: Solver) -> Solver:
            def complete(cue, row):  # type: ignore[no-untyped-def]
                calls.append(name)
                if len(calls) == 5:  # the second shape and cue, its second method
                    raise KeyboardInterrupt
                return solver.complete(cue, row)

            return replace(solver, complete=complete)

        return {name: solver(name, each) for name, each in solvers(lab, columns).items()}

    monkeypatch.setattr(shapes, "solvers", counted)
    monkeypatch.setattr(shape_solvers, "SAMPLES", 1)
    with pytest.raises(KeyboardInterrupt):
        run(folder, model, tmp_path / "runs", tmp_path / "out", **options)
    first = read_rows(tmp_path / "out" / "shapes.csv", Row)
    assert len(first) == 3 and not (tmp_path / "out" / "table.md").exists()
    text = run(folder, model, tmp_path / "runs", tmp_path / "out", **options)
    again = finished(tmp_path / "out")
    assert len(calls) == 2 + 18 and len(again) == 18  # two shapes and an unseen one
    assert [again[row.place] for row in first] == first
    for words in ("# Completion of shapes, report part", "## made: mean", "## other: mean", "Unseen structure: femur"):
        assert words in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"shapes.csv", "table.md", "table.svg", "table.png"}
    assert run(folder, model, tmp_path / "runs", tmp_path / "out", **options) == text and len(calls) == 20


def test_a_method_that_diverges_is_scored_and_the_others_go_on(data: ShapeDataset, tmp_path: Path) -> None:
    def diverging(cue, row):  # type: ignore[no-untyped-def]
        raise Diverged("left the range of the data")

    solving = {"genmed": Solver("a", diverging), "nearest": Solver("b", lambda cue, row: [data.shape(0)])}
    rows = evaluate(data, data.part("report")[:2], ["one plane"], solving, {}, tmp_path)
    assert rows == finished(tmp_path) and len(rows) == 4
    lost = [row for row in rows.values() if row.failed]
    assert {row.method for row in lost} == {"genmed"} and len(lost) == 2
    assert (lost[0].dice, lost[0].cd, lost[0].uhd, lost[0].nsd) == FAILED == (0.0, 600.0, 100 * 3**0.5, 0.0)
    text = shapes.report(rows, ["one plane"], list(solving), "report", {})
    assert "Without an answer (sampling diverged): GenMed 2 of 4 rows" in text
    sound = {place: row for place, row in rows.items() if row.method == "nearest"}
    assert "Every method gave an answer" in shapes.report(sound, ["one plane"], ["nearest"], "report", {})


def test_what_is_known_of_the_truth_is_made_once_for_a_shape(
    data: ShapeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths: list[Shape] = []
    written: list[int] = []
    write = shapes.write_rows
    monkeypatch.setattr(shapes, "truth_of", lambda shape: truths.append(shape) or truth_of(shape))
    monkeypatch.setattr(shapes, "write_rows", lambda *given: written.append(len(given[2])) or write(*given))
    solving = {name: Solver(name, lambda cue, row: [data.shape(0)]) for name in ("genmed", "nearest", "interpolation")}
    rows = evaluate(data, data.part("report")[:2], ["one plane", "redundant"], solving, {}, tmp_path)
    assert len(truths) == 2 and written == [3, 6, 9, 12]
    evaluate(data, data.part("report")[:2], ["one plane", "redundant"], solving, dict(rows), tmp_path)
    assert len(truths) == 2 and len(written) == 4


def test_settings_of_the_statistical_model_are_chosen_once(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape_solvers, "PCA_CHOICES", QUICK)
    monkeypatch.setattr(shape_solvers, "TUNE_SHAPES", 2)
    monkeypatch.setattr(shape_solvers, "TUNE_KINDS", ("three planes",))
    lab = Lab(read_shapes(folder), load_shapes(model), tmp_path)
    settings, note = chosen_pca(lab)
    assert settings.modes in QUICK["modes"] and "tune part" in note
    kept = json.loads((tmp_path / "pca.json").read_text())
    kept["settings"]["modes"] = 3
    (tmp_path / "pca.json").write_text(json.dumps(kept))
    assert chosen_pca(lab)[0].modes == 3
    monkeypatch.setattr(shape_solvers, "TUNE_KINDS", ("one plane",))
    assert chosen_pca(lab)[0].modes != 3
    kept = json.loads((tmp_path / "pca.json").read_text())
    kept["settings"]["modes"] = 3
    (tmp_path / "pca.json").write_text(json.dumps(kept))
    monkeypatch.setattr(shape_solvers, "VERSION", shape_solvers.VERSION + 1)
    assert chosen_pca(lab)[0].modes != 3
    assert set(PCA_CHOICES) == set(QUICK)


def test_rows_of_an_older_version_are_not_used(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(read_shapes(folder), load_shapes(model), tmp_path)
    before = {name: solver.key for name, solver in solvers(lab, ["genmed", "interpolation", "nearest"]).items()}
    monkeypatch.setattr(shape_solvers, "VERSION", shape_solvers.VERSION + 1)
    after = solvers(lab, list(before))
    assert all(after[name].key != key for name, key in before.items())


def test_the_conditioned_peer_is_told_version_and_minutes_and_gets_as_many_samples(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    drawn: list[tuple[int, bool]] = []

    class Peer:
        sha256, guidance, minutes, steps = "weights", 1.5, 7.0, 10

        def complete(self, cue, samples, *, gp=False):  # type: ignore[no-untyped-def]
            drawn.append((samples, gp))
            return [lab.data.shape(0)]

    def fake(data, model, folder, minutes, score, *, version):  # type: ignore[no-untyped-def]
        asked.update(minutes=minutes, version=version, score=score(Peer()))
        return Peer()

    monkeypatch.setattr(shape_solvers, "conditioned", fake)
    lab = Lab(read_shapes(folder), load_shapes(model), tmp_path, minutes=7.0)
    found = solvers(lab, ["conditioned", "conditioned-gp"])
    assert asked["minutes"] == 7.0 and asked["version"] == shape_solvers.VERSION and 0 <= asked["score"] < 1
    assert set(drawn) == {(shape_solvers.SAMPLES, False)} and len(drawn) == len(lab.tune)
    drawn.clear()
    for solver in found.values():
        solver.complete(lab.tune[0][0], lab.tune[0][2])
    assert drawn == [(shape_solvers.SAMPLES, False), (shape_solvers.SAMPLES, True)]


def test_what_is_told_is_left_out_where_it_is_unknown(data: ShapeDataset) -> None:
    assert {name for name, method in METHODS.items() if method.told} == {"genmed-text", "pca", "pca-likely"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--part", "train"], ["--part train", "tune or report"]),
        (["--kinds", "seven planes"], ["--kinds seven planes", KINDS[0]]),
        (["--methods", "genmed,magic"], ["--methods magic", "pca"]),
        (["--cases", "0"], ["--cases 0"]),
        (["--table", "chairs"], ["--table chairs", "generation"]),
        (["--table", "generation", "--runs", "", "--cases", "1"], ["--cases 1", "2 shapes"]),
        (["--table", "generation", "--runs", "", "--methods", "pca"], ["--methods pca", "replay"]),
        (["--table", "generation"], ["--runs: not for --table generation"]),
        (["--table", "generation", "--runs", "", "--kinds", "one plane"], ["--kinds: not for --table generation"]),
        (["--table", "generation", "--runs", "", "--minutes", "0"], ["--minutes: not for --table generation"]),
        (["--table", "generation", "--runs", "", "--tumours", True], ["--tumours: not for --table generation"]),
        (["--shapes", "nowhere"], ["nowhere"]),
        (["--runs", ""], ["--runs", "completion"]),
    ],
)
def test_bad_options_give_one_line_and_no_file(
    folder: Path, model: Path, tmp_path: Path, options: list[Any], words: list[str]
) -> None:
    runs, out = str(tmp_path / "r"), str(tmp_path / "o")
    chosen: dict[str, Any] = {"--shapes": str(folder), "--model": str(model), "--runs": runs, "--out": out}
    chosen |= dict(zip(options[::2], options[1::2], strict=True))
    chosen = {name: value for name, value in chosen.items() if value}
    given = [word for pair in chosen.items() for word in pair if word is not True]  # flags
    failed_in_one_line(CliRunner().invoke(app, ["bench", "shapes", *given]), *words)
    assert not list(tmp_path.iterdir())


# Generation -----------------------------------------------------------------------------------------------


def test_volumes_rank_with_what_captions_state(data: ShapeDataset) -> None:
    shape = data.shape(0)
    sizes = [1.0, 2.0, 3.0, 10.0, 11.0, 12.0]
    made = [replace(shape, voxel_mm=size) for size in sizes]
    names = ["a"] * 3 + ["b"] * 3
    same = Drawn(made, np.array(sizes) ** 3)
    assert rank_correlations(same, names) == pytest.approx((1.0, 1.0))
    swapped = Drawn(made, np.array([3.0, 2, 1, 30, 20, 10]))  # between categories right, within them wrong
    every, within = rank_correlations(swapped, names)
    assert every > 0.4 and within < -0.8
    assert np.isnan(rank_correlations(Drawn(made, np.full(6, np.nan)), names)).all()


def test_the_generation_table_tells_copies(folder: Path, model: Path, tmp_path: Path) -> None:
    options = {"count": 4, "methods": ["genmed-held-out", "replay", "reference"]}
    text = generation.run(folder, model, tmp_path, **options)
    rows = {row.method: row for row in read_rows(tmp_path / "generation.csv", generation.Row)}
    itself, copies = rows["reference"], rows["replay"]
    assert itself.cov == 100 and itself.one_nna == 0 and itself.mmd < rows["genmed-held-out"].mmd
    assert copies.nearest < itself.nearest and np.isnan(copies.rank)
    assert "The Gaussian is told category and side only, GenMed the whole caption." in text
    assert "Shape to text" in text and "| mean | |" in text
    before = (tmp_path / "generation.csv").read_bytes()
    assert generation.run(folder, model, tmp_path, **options) == text
    assert (tmp_path / "generation.csv").read_bytes() == before


def test_the_nearest_training_shape_may_be_a_mirror_image_of_the_other_side(data: ShapeDataset) -> None:
    train = [i for i in data.part("train") if data.rows[i].category == "kidney"]
    sides = {i: "right" if i in train[1:] else "left" for i in range(len(data))}
    mixed = replace(data, rows=tuple(replace(row, side=sides[i]) for i, row in enumerate(data.rows)))
    row = mixed.rows[train[0]]
    clouds = training_clouds(mixed, row)
    assert len(clouds) == len(train)
    flipped = [cloud(data.shape(i), 20_000 + i) * [-1, 1, 1] for i in train[1:]]
    np.testing.assert_array_equal(clouds, [cloud(data.shape(train[0]), 20_000 + train[0]), *flipped])
    for side in ("left", ""):  # no training shape of the other side, or no side: nothing is mirrored
        same = replace(data, rows=tuple(replace(row, side=side) for row in data.rows))
        plain = [cloud(data.shape(i), 20_000 + i) for i in train]
        np.testing.assert_array_equal(training_clouds(same, same.rows[train[0]]), plain)


def test_the_quick_search_finds_the_same_distance_as_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(50, 3)) * scale for scale in (1.0, 0.2, 1.3, 0.9, 1.1, 4.0)]
    for points in (rng.normal(size=(50, 3)), 0.3 * rng.normal(size=(50, 3))):
        trees = [(each, cKDTree(each)) for each in clouds]
        assert nearest_of(points, trees) == pytest.approx(pairwise_chamfer([points], clouds).min(), rel=1e-12)


def test_trees_of_training_shapes_are_built_once(data: ShapeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = Yardstick(data, data.part("report"))
    calls: list[ShapeRow] = []
    monkeypatch.setattr(generation, "training_clouds", lambda d, row: calls.append(row) or training_clouds(d, row))
    first = yardstick.nearest(yardstick.clouds)
    assert yardstick.nearest(yardstick.clouds) == first > 0
    assert sorted(row.category for row in calls) == ["kidney", "spleen"]


def test_names_are_found_from_shapes_better_than_by_chance(data: ShapeDataset, model: Path) -> None:
    first, reciprocal, names = retrieval(load_shapes(model), data, range(len(data)))
    assert names == 3 and 1 / 3 < first <= 1 and first <= reciprocal <= 1


def test_reconstruction_is_told_by_category(data: ShapeDataset, model: Path) -> None:
    found = reconstructions(load_shapes(model), data, data.part("report"))
    assert set(found) == {("made", "kidney"), ("other", "spleen")}
    assert all(dice > 0.8 and 0 < distance < 1 for dice, distance in found.values())
    blind = load_shapes(model)
    blind.autoencoder.mean.fill_(1.0)
    blind.autoencoder.modes.fill_(0.0)
    nothing = reconstructions(blind, data, data.part("report"))
    assert all(dice == 0 and distance > 1 for dice, distance in nothing.values())
