"""The builder end to end, on surfaces and label maps made here."""

import csv
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from real import real_set
from test_mesh import ball, together
from test_shape import dice, ellipsoid_mask
from typer.testing import CliRunner

from genmed.cli import app
from genmed.cue import cue_of_labels
from genmed.data.shapes import build as building
from genmed.data.shapes import read_shapes
from genmed.data.shapes.build import build_shapes
from genmed.data.shapes.collect import correlation, divide, duplicates, from_front, implausible, write_set
from genmed.data.shapes.items import Record, build, read_record, record_path, write_record
from genmed.data.shapes.sources import Item, find_items
from genmed.data.split import PARTS
from genmed.errors import GenMedError
from genmed.mesh import Mesh, save_mesh
from genmed.shape import shape_of
from genmed.shape_model import load_shapes
from genmed.tasks.complete import complete
from genmed.train_shapes import train_shapes


def stretched(x: float, y: float, z: float, radius_mm: float = 30.0) -> Mesh:
    mesh = ball(radius_mm, detail=2)
    return Mesh(mesh.vertices * [x, y, z], mesh.faces)


def livers(folder: Path, count: int = 12) -> Path:
    """MedShapeNet-like: differently stretched balls of growing volume."""
    for k in range(count):
        save_mesh(stretched(1 + 0.05 * k, 1, 0.7), folder / f"{k:06d}_liver.stl")
    return folder


def reasons(folder: Path) -> list[dict[str, str]]:
    with (folder / "reasons.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    source = livers(root / "set")
    save_mesh(stretched(1, 1, 2), source / "000003_spleen.stl")
    save_mesh(stretched(1, 1, 0.7), source / "000050_liver.stl")  # the first one again
    (source / "000051_liver.stl").write_bytes(b"not a surface")
    save_mesh(together(*(ball(at=(30 * k, 0, 0)) for k in range(4))), source / "000052_liver.stl")
    save_mesh(ball(0.05), source / "000053_liver.stl")
    save_mesh(stretched(4, 4, 4), source / "000054_liver.stl")
    build_shapes([source], root / "out", size=32, workers=2, unseen=["Spleen"])
    return root / "out"


def test_every_good_shape_is_there_and_every_other_has_a_reason(built: Path) -> None:
    shapes = read_shapes(built)
    assert len(shapes) == 14 and shapes.size == 32 and len(set(shapes.ids)) == 14
    why = {Path(row["path"]).name: row["reason"] for row in reasons(built) if row["kept"] == "no"}
    assert sorted(why) == ["000050_liver.stl", "000051_liver.stl", "000052_liver.stl", "000053_liver.stl"]
    assert why["000050_liver.stl"] == "the same shape as MedShapeNet-000000_liver-liver"
    assert "no triangles" in why["000051_liver.stl"] and "4 pieces" in why["000052_liver.stl"]
    assert "metres" in why["000053_liver.stl"]
    flagged = [row.id for row in shapes.rows if row.flag]
    assert flagged == ["MedShapeNet-000054_liver-liver"]


def test_distances_and_meshes_are_those_of_the_source(built: Path) -> None:
    shapes = read_shapes(built)
    for k in (0, 11):
        mesh = stretched(1 + 0.05 * k, 1, 0.7)
        i = shapes.ids.index(f"MedShapeNet-{k:06d}_liver-liver")
        np.testing.assert_allclose(shapes.sdf(i), shape_of(mesh, 32).distance, atol=0.04)
        assert shapes.rows[i].volume_ml == pytest.approx(mesh.volume_ml, rel=1e-4)
        low = shapes.to_mesh(i).vertices.min(axis=0)
        np.testing.assert_allclose(low, mesh.vertices.min(axis=0), atol=1.0)
        assert shapes.sdf(i).dtype == np.float32 and isinstance(shapes.stored(i).base, np.memmap)


def test_parts_hold_persons_apart_and_unseen_categories_out(built: Path) -> None:
    shapes = read_shapes(built)
    parts = Counter(row.part for row in shapes.rows)
    assert parts.keys() == {"train", "tune", "report", "unseen"} and parts["unseen"] == 1
    assert [shapes.rows[i].category for i in shapes.part("unseen")] == ["spleen"]
    part_of = {row.subject: row.part for row in shapes.rows if row.part != "unseen"}
    assert all(part_of[row.subject] == row.part for row in shapes.rows if row.part != "unseen")


def test_words_compare_with_training_shapes_alone(built: Path) -> None:
    shapes = read_shapes(built)
    volumes = [row.volume_ml for row in shapes.rows if row.part == "train"]
    low, high = np.quantile(volumes, [1 / 3, 2 / 3])
    for row in shapes.rows:
        if row.category == "liver":
            word = "small" if row.volume_ml < low else "medium-sized" if row.volume_ml < high else "large"
            assert f"{word} liver" in row.captions[2]
        else:
            assert not any(word in " ".join(row.captions) for word in ("small", "large", "medium"))


def test_the_card_counts_what_the_index_holds(built: Path) -> None:
    text = (built / "card.md").read_text()
    rows = read_shapes(built).rows
    parts = [row.part for row in rows if row.category == "liver"]
    counts = [parts.count(part) for part in ("train", "tune", "report", "unseen")]
    assert f"| liver | MedShapeNet | {' | '.join(map(str, counts))} |" in text
    assert "14 shapes of 2 categories" in text and "see MedShapeNet" in text
    assert (built / "thumbnails.png").read_bytes().startswith(b"\x89PNG")
    assert not (built / ".work").exists() and not list(built.rglob("*.part"))


def test_a_finished_folder_is_left_alone_and_another_request_refused(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    source = [built.parent / "set"]
    again = build_shapes(source, built, size=32, unseen=["spleen"])
    assert again.finished_before and (again.shapes, again.left_out) == (14, 4)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    with pytest.raises(GenMedError, match="holds something else"):
        build_shapes(source, built, size=64)


def test_the_same_input_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    source = [built.parent / "set"]
    build_shapes(source, tmp_path / "again", size=32, workers=1, unseen=["spleen"])
    for name in ("index.parquet", "shards/0000.npy", "reasons.csv", "thumbnails.png", "card.md"):
        assert (built / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_glb_becomes_the_shape_that_a_ply_does(tmp_path: Path) -> None:
    paths = [save_mesh(stretched(1, 1, 0.7), tmp_path / kind / f"a.{kind}") for kind in ("ply", "glb")]
    ply, glb = (build(find_items(path.parent).items[0], 32).shape for path in paths)
    assert ply is not None and glb is not None
    np.testing.assert_array_equal(glb.sdf, ply.sdf)
    np.testing.assert_allclose(glb.origin_mm, ply.origin_mm, atol=1e-4)


def test_shapes_of_128_voxels_are_built_trained_on_and_completed(tmp_path: Path) -> None:
    source, out = livers(tmp_path / "set", 3), tmp_path / "out"
    result = CliRunner().invoke(app, ["data", "build-shapes", str(source), "--out", str(out), "--size", "128"])
    assert result.exit_code == 0, result.output
    shapes = read_shapes(out)
    assert shapes.size == 128 and shapes.part("train") == (0, 1, 2)
    assert shapes.to_mesh(0).volume_ml == pytest.approx(stretched(1, 1, 0.7).volume_ml, rel=5e-3)
    tiny = {"modes": 2, "width": 16, "blocks": 1, "refiner": 4, "batch": 2}
    model = load_shapes(train_shapes(out, tmp_path / "model", steps=3, **tiny))
    truth, grid = shapes.sdf(1) < 0, shapes.shape(1).grid
    seen = (np.indices(truth.shape) == 64).any(axis=0)
    cue = cue_of_labels(truth, grid.affine, seen)
    found = complete(model, cue, samples=1)
    assert found.shapes[0].sdf.shape == (128, 128, 128)
    assert dice(found.probability(grid) > 0.5, truth) > 0.95


def test_nothing_of_this_machine_is_written(built: Path) -> None:
    here = str(built.parent)
    texts = [path.read_text() for path in (built / "build.json", built / "card.md", built / "reasons.csv")]
    assert not any(here in text for text in [*texts, *map(repr, read_shapes(built).rows)])
    row = next(row for row in read_shapes(built).rows if row.subject == "000007")
    assert (row.source, row.path) == ("MedShapeNet", "000007_liver.stl")
    assert "Made by `genmed data build-shapes set --size 32 " in texts[1] and "--unseen spleen`" in texts[1]
    assert {row["source"] for row in reasons(built)} == {"MedShapeNet"}


def test_paths_start_in_the_source_folder(tmp_path: Path) -> None:
    save_mesh(ball(), tmp_path / "set/liver/a.stl")
    (found,) = find_items(tmp_path / "set").items
    assert found.place == "liver/a.stl"
    assert replace(found, array="maps", index=3).place == "liver/a.stl#maps[3]"
    assert replace(found, folder=tmp_path / "other").place == "a.stl"
    reason = build(replace(found, path=tmp_path / "set/liver/b.nii.gz"), 32).reason
    assert reason and str(tmp_path) not in reason


# Restart, crashes, Ctrl-C


def test_killed_builds_go_on_and_lose_at_most_what_was_in_progress(tmp_path: Path) -> None:
    source = livers(tmp_path / "set", 20)
    command = [sys.executable, "-m", "genmed", "data", "build-shapes", str(source), "--out", str(tmp_path / "out"),
               "--size", "32"]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        done = _wait_for_records(tmp_path / "out", run)
    finally:
        run.kill()
        run.wait()
    assert not (tmp_path / "out" / "index.parquet").exists()
    dates = {path: path.stat().st_mtime_ns for path in done}
    seen: dict[Path, int] = {}
    real = building.read_record

    def noted(path: Path) -> Record:
        seen[path] = path.stat().st_mtime_ns
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "read_record", noted)
        outcome = build_shapes([source], tmp_path / "out", size=32)
    assert outcome.shapes == 20
    assert dates.items() <= seen.items()  # none of them was built again


def test_ctrl_c_ends_cleanly(tmp_path: Path) -> None:
    source = livers(tmp_path / "set", 100)
    command = [sys.executable, "-m", "genmed", "data", "build-shapes", str(source), "--out", str(tmp_path / "out")]
    run = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    try:
        _wait_for_records(tmp_path / "out", run)
        os.killpg(run.pid, signal.SIGINT)
        message = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 130 and message.splitlines()[-1].startswith("genmed: interrupted; run the same command")
    assert "Traceback" not in message


def _wait_for_records(out: Path, run: subprocess.Popen[str] | subprocess.Popen[bytes]) -> list[Path]:
    for _ in range(6000):
        done = list((out / ".work").rglob("[0-9a-f]*.npz"))
        if len(done) >= 3 or run.poll() is not None:
            break
        time.sleep(0.02)
    assert len(done) >= 3 and run.poll() is None
    return done


def tasks_of(folder: Path, count: int) -> list[building.Task]:
    items = find_items(livers(folder / "set", count)).items
    return [building.Task(item, record_path(folder / "work", item, 32, "mm"), 32, "mm") for item in items]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find this file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.usefixtures("importable")
def test_an_item_that_ends_its_process_is_left_out(tmp_path: Path) -> None:
    """A worker that dies takes neither the build nor its neighbours with it."""
    tasks = tasks_of(tmp_path, 4)
    deadly = replace(tasks[1], size=-1)
    mortal = [Mortal(**task.__dict__) for task in [tasks[0], deadly, *tasks[2:]]]
    assert sum(building._with_processes(mortal, 1)) == 4
    told = [read_record(task.record).reason for task in tasks]
    assert told.pop(1) == building.CRASHED and told == [""] * 3


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_never_ends_is_left_out(tmp_path: Path, workers: int) -> None:
    tasks = tasks_of(tmp_path, 4)
    tasks[1] = Endless(**{**tasks[1].__dict__, "deadline_s": 0.5})
    assert sum(building._with_processes(tasks, workers)) == 4
    told = [read_record(task.record).reason for task in tasks]
    assert told == ["", "took longer than 0.5 s", "", ""]
    assert not list((tmp_path / "work").rglob("*.started"))


class Endless(building.Task):
    """Never comes back from compiled code, in which no other thread of Python can run."""

    def run(self) -> None:
        building.build = lambda *given: re.match("(a+)+b", 50 * "a")
        super().run()


def test_what_took_too_long_stands_among_the_reasons(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, 3)
    request = {"size": 32, "unit": "mm", "seed": 0, "unseen": [], "sources": ["set"]}
    for task in tasks[:2]:
        task.run()
    tasks[2].mark.parent.mkdir(exist_ok=True)
    tasks[2].mark.write_text("Timeout (0:05:00)!")
    tasks[2].give_up()
    finished = [(str(k), task.item, read_record(task.record)) for k, task in enumerate(tasks)]
    assert write_set(tmp_path / "out", finished, [], [], 0, building._command(request)) == (2, 1)
    assert [(row["path"], row["reason"]) for row in reasons(tmp_path / "out") if row["kept"] == "no"] == [
        ("000002_liver.stl", f"took longer than {building.DEADLINE_S} s")
    ]


class Mortal(building.Task):
    """Size -1 ends the process, as broken compiled code would."""

    def run(self) -> None:
        if self.size < 0:
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()
            os._exit(11)
        super().run()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray; to run it: pip install '.[cluster]'")
def test_ray_builds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine it would take minutes
    build_shapes([livers(tmp_path / "set", 3)], tmp_path / "out", size=32, ray=True, workers=1)
    shapes = read_shapes(tmp_path / "out")
    assert len(shapes) == 3
    for i, item in enumerate(find_items(tmp_path / "set").items):
        made = build(item, 32).shape
        assert made is not None
        np.testing.assert_array_equal(shapes.stored(i), made.sdf)


def test_ray_tries_an_item_twice_unless_it_took_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(Exception): ...

    runs: Counter[str] = Counter()

    def get(batch: list[building.Task]) -> None:
        for task in batch:
            runs[task.item.subject] += 1
            if task.item.subject == "000003":
                task.mark.parent.mkdir(parents=True, exist_ok=True)
                task.mark.write_text("Timeout (0:05:00)!")
            if task.item.subject in ("000001", "000003") or runs["000002"] == 1:
                raise OutOfMemoryError
            task.run()

    others = {name: type(name, (Exception,), {}) for name in ("WorkerCrashedError", "NodeDiedError")}
    exceptions = SimpleNamespace(OutOfMemoryError=OutOfMemoryError, **others)
    remote = SimpleNamespace(remote=lambda batch: tuple(batch))
    ray = SimpleNamespace(exceptions=exceptions, get=get, remote=lambda **options: lambda run: remote,
                          is_initialized=lambda: True, cluster_resources=dict,
                          wait=lambda running: (running[:1], running[1:]))  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    tasks = tasks_of(tmp_path, 4)
    assert sum(building._with_ray(tasks, 1)) == 4
    late = f"took longer than {building.DEADLINE_S} s"
    assert [read_record(task.record).reason for task in tasks] == ["", building.CRASHED, "", late]
    assert runs == {"000000": 1, "000001": 2, "000002": 2, "000003": 1}


# Label maps


def item(path: Path, side: str = "", both: bool = False, parts: tuple[tuple[str, int], ...] = ()) -> Item:
    return Item("s", path, "kidney", side, "p", both=both, parts=parts)


def kidneys(path: Path, affine: np.ndarray, missing: str = "") -> Path:
    """A small right and a large left kidney with a tumour, in an array whose axes the affine names."""
    labels = np.zeros((60, 40, 40), np.uint8)
    organ = ellipsoid_mask((8, 6, 10), (1, 1, 1)).astype(np.uint8)
    x, y, z = organ.shape
    flipped = affine[0, 0] < 0
    for side, start, grown in (("left", 2, True), ("right", 60 - 2 - x, False)):
        if side != missing:
            region = labels[start : start + x, 5 : 5 + y, 5 : 5 + z]
            region[:] = np.where(organ, 1, 0)
            if grown:
                region[8:12, 6:12, 6:14][organ[8:12, 6:12, 6:14] > 0] = 2
    nib.Nifti1Image(labels[::-1] if flipped else labels, affine).to_filename(path)
    return path


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, 1, 1, 1])], ids=["ras", "las"])
def test_a_pair_of_organs_is_told_apart_whatever_the_axes(tmp_path: Path, affine: np.ndarray) -> None:
    path = kidneys(tmp_path / "k.nii.gz", affine)
    left, right = (build(item(path, side, True, (("tumour", 2),)), 32) for side in ("left", "right"))
    assert left.shape is not None and right.shape is not None
    assert left.shape.to_mesh().vertices[:, 0].max() < right.shape.to_mesh().vertices[:, 0].min()
    assert (dict(left.facts)["tumour"], dict(right.facts)["tumour"]) == ("yes", "no")
    labels = np.asarray(nib.load(path).dataobj)
    assert float(dict(left.facts)["tumour_ml"]) == pytest.approx((labels == 2).sum() / 1000, abs=1e-3)


def test_a_single_organ_is_on_the_side_where_it_is(tmp_path: Path) -> None:
    path = kidneys(tmp_path / "k.nii.gz", np.eye(4), missing="left")
    assert build(item(path, "left", True), 32).reason == "there is no left kidney."
    assert build(item(path, "right", True), 32).reason == ""


def test_reasons_of_bad_label_maps_are_one_line(tmp_path: Path) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:12, 5:12, :9] = 1
    nib.Nifti1Image(labels, np.eye(4)).to_filename(tmp_path / "cut.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"gzip?")
    assert "cut off" in build(item(tmp_path / "cut.nii.gz"), 32).reason
    assert "empty" in build(replace(item(tmp_path / "cut.nii.gz"), values=(7,)), 32).reason
    for name in ("broken.nii.gz", "missing.nii.gz"):
        reason = build(item(tmp_path / name), 32).reason
        assert reason and "\n" not in reason


def test_records_come_back(tmp_path: Path) -> None:
    save_mesh(ball(), tmp_path / "a.stl")
    made = build(item(tmp_path / "a.stl"), 32)
    write_record(tmp_path / "r.npz", made)
    record = read_record(tmp_path / "r.npz")
    assert made.shape is not None and record.measures == made.measures
    np.testing.assert_array_equal(record.sdf(), made.shape.sdf)
    assert (record.voxel_mm, record.origin_mm, record.reason) == (made.shape.voxel_mm, made.shape.origin_mm, "")


def test_a_changed_file_is_built_again(tmp_path: Path) -> None:
    path = save_mesh(ball(), tmp_path / "a.stl")
    first = record_path(tmp_path, item(path), 32, "mm")
    assert first == record_path(tmp_path, item(path), 32, "mm") != record_path(tmp_path, item(path), 64, "mm")
    save_mesh(ball(12.0), path)
    assert record_path(tmp_path, item(path), 32, "mm") != first


# Quality


def records(tmp_path: Path, *meshes: Mesh) -> list[tuple[Item, Record]]:
    made = []
    for k, mesh in enumerate(meshes):
        path = save_mesh(mesh, tmp_path / f"{k}.ply")
        write_record(tmp_path / f"{k}.npz", build(item(path), 32))
        made.append((item(path), read_record(tmp_path / f"{k}.npz")))
    return made


def test_duplicates_are_equal_shapes_of_equal_size_and_nothing_else(tmp_path: Path) -> None:
    mesh = stretched(1, 0.8, 0.6)
    noise = np.random.default_rng(0).normal(0, 0.02, mesh.vertices.shape)
    moved = Mesh(mesh.vertices + np.array([300, 20, -7]), mesh.faces)
    shaken = Mesh(mesh.vertices + noise, mesh.faces)
    larger = Mesh(mesh.vertices * 1.05, mesh.faces)
    mirrored = Mesh(mesh.vertices[:, [1, 0, 2]], mesh.faces[:, ::-1])
    same = duplicates(records(tmp_path, mesh, moved, shaken, larger, mirrored))
    assert same == {1: 0, 2: 0}


def test_the_empty_space_around_shapes_does_not_make_them_alike(tmp_path: Path) -> None:
    (_, thin), (_, other) = records(tmp_path, stretched(0.3, 0.3, 2), stretched(0.4, 0.3, 2))
    whole = np.corrcoef(thin.sdf().ravel(), other.sdf().ravel())[0, 1]
    assert correlation(thin.sdf(), other.sdf()) < whole and correlation(thin.sdf(), thin.sdf()) == pytest.approx(1)


def test_far_volumes_are_flagged(tmp_path: Path) -> None:
    meshes = [stretched(1, 1, 1 + 0.02 * k) for k in range(7)]
    flags = implausible(records(tmp_path, *meshes, stretched(2, 2, 2)))
    assert list(flags) == [7] and "far from the median" in flags[7]


def test_own_splits_are_kept_and_small_sources_are_not_divided() -> None:
    given = ("train", "report", "tune")
    own = [Item("own", Path(f"{k}"), "liver", "", f"p{k}", part=part) for k, part in enumerate(given)]
    few = [Item("few", Path(f"{k}"), "liver", "", f"p{k}") for k in range(2)]
    many = [Item("many", Path(f"{k}"), "liver", "", f"p{k // 2}") for k in range(100)]
    parts, notes = divide([*own, *few, *many], [], 0)
    assert parts[:5] == ["train", "report", "tune", "train", "train"] and notes[0].startswith("few has 2 subjects")
    assert Counter(parts[5:]) == {"train": 68, "tune": 10, "report": 22}
    assert all(parts[5 + k] == parts[6 + k] for k in range(0, 100, 2))


def test_who_shares_a_shape_is_one_person_in_all_sources() -> None:
    a = [Item("a", Path(f"a{k}"), "kidney", "", f"p{k}") for k in range(40)]
    b = [Item("b", Path(f"b{k}"), "kidney", "", f"q{-k}") for k in range(40)]
    there = [*a[1:], *b]  # the first one is a duplicate, and gone
    alone = divide(there, [], 0)[0]
    parts, notes = divide(there, [], 0, [*zip(a[:20], b[:20], strict=True), (a[0], a[1])])
    later = [max(pair, key=PARTS.index) for pair in zip(alone[1:19], alone[41:59], strict=True)]
    assert parts[1:19] == parts[41:59] == later and alone[1:19] != alone[41:59]
    assert parts[0] == parts[39] == parts[40] == max((alone[k] for k in (0, 39, 40)), key=PARTS.index)
    assert parts[19:39] == alone[19:39] and parts[59:] == alone[59:]
    assert notes == ["40 subjects share shapes with others: as 19 persons."]


def test_thumbnails_look_at_the_front_with_the_right_on_the_left() -> None:
    distance = np.full((16, 16, 16), 4.0)
    distance[11:14, 4:8, 12:15] = -1  # to the right and up
    picture = from_front(distance)
    rows, columns = np.nonzero(picture < 1)
    assert rows.max() < 4 and columns.max() < 5


# Command line


def test_the_command_passes_its_options_and_says_where_reasons_are(built: Path) -> None:
    """The folder is finished, and any other request would be refused."""
    options = ["--out", str(built), "--size", "32", "--unseen", "spleen"]
    result = CliRunner().invoke(app, ["data", "build-shapes", str(built.parent / "set"), *options])
    assert result.exit_code == 0, result.output
    first = f"14 shapes, built before; 4 left out, {built / 'reasons.csv'} says why"
    assert result.output.splitlines() == [first, str(built)]


@pytest.mark.parametrize(
    ("options", "line"),
    [(["--size", "50"], "--size 50"), (["--workers", "0"], "--workers 0"), (["--unit", "inch"], "--unit inch"),
     (["--unseen", "liverr"], "no shape is a 'liverr'; there are liver")],
)  # fmt: skip
def test_bad_options_end_with_2_and_leave_nothing(tmp_path: Path, options: list[str], line: str) -> None:
    source = livers(tmp_path / "set", 1)
    result = CliRunner().invoke(app, ["data", "build-shapes", str(source), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2 and line in result.output and not (tmp_path / "out").exists()


def test_a_source_of_bad_files_only_says_so(tmp_path: Path) -> None:
    bad = item(tmp_path / "000001_liver.stl")
    with pytest.raises(GenMedError, match=r"reasons\.csv: no shape is left"):
        write_set(tmp_path / "out", [("id", bad, Record(tmp_path / "r.npz", "empty"))], [], [], 0, "")
    assert [row["reason"] for row in reasons(tmp_path / "out")] == ["empty"]


def test_folders_without_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenMedError, match="holds no index"):
        read_shapes(tmp_path)
    (tmp_path / "index.parquet").write_bytes(b"no")
    with pytest.raises(GenMedError, match="not an index of shapes"):
        read_shapes(tmp_path)


def test_known_organs_have_their_known_sizes() -> None:
    chosen = {item.name: item for name in ("kits23_kidney", "femur") for item in find_items(real_set(name)).items}
    left = build(chosen["kits23_kidney-case_00000-kidney-left"], 64)
    right = build(chosen["kits23_kidney-case_00000-kidney-right"], 64)
    femur = build(chosen["femur-femur_00-femur-right"], 64)
    assert left.measures and right.measures and femur.measures
    assert left.measures.volume_ml == pytest.approx(172.21, rel=0.01)   # columns of the sets' own index.csv
    assert right.measures.volume_ml == pytest.approx(198.98, rel=0.01)
    assert (dict(left.facts)["tumour"], dict(right.facts)["tumour"]) == ("no", "yes")
    assert femur.measures.volume_ml == pytest.approx(596.41, rel=1e-3)
    assert femur.measures.extent_mm == pytest.approx(485.5, rel=1e-3)


def test_workers_that_cannot_start_end_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, workers: int) -> None: ...

        def submit(self, *given: object) -> Future[None]:
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool())
            return future

        def shutdown(self, **options: object) -> None: ...

    monkeypatch.setattr(building, "_pool", Broken)
    (tmp_path / "source").mkdir()
    save_mesh(ball(), tmp_path / "source" / "liver.stl")
    with pytest.raises(GenMedError, match="end before they begin"):
        build_shapes([tmp_path / "source"], tmp_path / "out", workers=2)
    assert not (tmp_path / "out" / "index.parquet").exists()
