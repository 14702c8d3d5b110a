import errno
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import tiny

from genmed import volume
from genmed.errors import GenMedError
from genmed.hub import Model
from genmed.space import on_grid
from genmed.tasks import run
from genmed.tasks.inputs import find_cases
from genmed.tasks.run import Options, Outcome, segment_files
from genmed.tasks.segment import Segmentation
from genmed.volume import Volume

PLAN = replace(tiny.PLAN, label_values=(0, 1, 5), patch=(8, 8, 8))
MODEL = Model(plan=PLAN, denoiser=None, folder=None, sha256="a" * 64)  # type: ignore[arg-type]
AFFINE = np.diag([-1.0, 2.0, 0.5, 1.0])
SHAPE = (4, 5, 6)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


class FakeSegment:
    """Calls every voxel above 10 'front' and above 20 'back', and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.refuse: str | None = None
        self.error: BaseException | None = None

    def __call__(self, model: Model, scan: Volume, **asked: Any) -> Segmentation:
        self.calls.append(asked | {"scan": scan})
        if self.error is not None and (self.refuse is None or self.refuse in str(scan.path)):
            raise self.error
        data = scan.data[:1]
        if asked["observed"] is not None:
            data = np.where(asked["observed"].data != 0, data, 0)
        labels = np.where(data > 20, 5, np.where(data > 10, 1, 0)).astype(np.uint8)
        hot = np.stack([labels[0] == value for value in (0, 1, 5)]).astype(np.float32)
        names = dict(zip(PLAN.label_values, PLAN.labels, strict=True))
        return Segmentation(
            labels=scan.like(labels, names),
            soft=scan.like(hot),
            volume_ml={"front": Interval(0.5, 0.25, 0.75)},  # type: ignore[dict-item]
            residual=1.5,
            mode="conditional",
            match="none",
            seconds=0.125,
            seed=asked["seed"],
            image=None,
            observed=asked["observed"],
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSegment:
    fake = FakeSegment()
    monkeypatch.setattr(run, "segment", fake)
    return fake


def scan(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 30, SHAPE).astype(np.float32)


def write(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(data[None], AFFINE).save(path)
    return path


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    for number in range(10):
        write(tmp_path / "scans" / f"case_{number:02d}_0000.nii.gz", scan(number))
    return tmp_path / "scans"


def table(folder: Path, name: str = "statistics.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_single_file_is_written_with_its_tables_beside_it(fake: FakeSegment, tmp_path: Path) -> None:
    source = write(tmp_path / "head_0000.nii.gz", scan())
    out = tmp_path / "new"
    outcome = segment_files(MODEL, source, out / "seg.nii.gz", Options(seed=3), command="genmed …")
    assert names(out) == {"seg.nii.gz", "seg.nii.gz.statistics.json", "seg.nii.gz.manifest.json"}
    assert outcome.done == ["head"]
    voxels = int(((scan() > 10) & (scan() <= 20)).sum())
    front = table(out, "seg.nii.gz.statistics.json")["head"]["front"]
    assert front["voxels"] == voxels and front["ml"] == pytest.approx(voxels * 1.0 * 2.0 * 0.5 / 1000)
    assert front["mean_intensity"] == pytest.approx(scan()[(scan() > 10) & (scan() <= 20)].mean(), rel=1e-6)
    assert front["ml_expected"] == 0.5 and front["ml_interval"] == [0.25, 0.75]
    manifest = table(out, "seg.nii.gz.manifest.json")
    assert manifest["weights_sha256"] == "a" * 64
    assert manifest["seed"] == 3 and manifest["command"] == "genmed …"
    assert {"genmed", "torch", "python"} <= set(manifest["versions"])
    facts = manifest["cases"]["head"]
    assert facts["mode"] == "conditional" and facts["match"] == "none"
    assert facts["residual"] == 1.5 and facts["seconds"] == 0.12


def test_folder_gets_one_label_map_a_case_named_without_its_channel(fake: FakeSegment, ten: Path) -> None:
    out = ten.parent / "out"
    segment_files(MODEL, ten, out)
    cases = [f"case_{number:02d}" for number in range(10)]
    assert names(out) == {*(f"{case}.nii.gz" for case in cases), "statistics.json", "manifest.json"}
    assert sorted(table(out)) == cases == sorted(table(out, "manifest.json")["cases"])
    image, labels = nib.load(ten / "case_03_0000.nii.gz"), nib.load(out / "case_03.nii.gz")
    assert np.array_equal(image.affine, labels.affine)


def test_restart_skips_finished_cases_and_only_those(fake: FakeSegment, ten: Path) -> None:
    out = ten.parent / "out"
    segment_files(MODEL, ten, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    (out / "case_04.nii.gz").unlink()
    statistics = table(out)
    del statistics["case_07"]  # as a kill between the label map and the table leaves it
    (out / "statistics.json").write_text(json.dumps(statistics))
    fake.calls.clear()
    outcome = segment_files(MODEL, ten, out)
    assert outcome.done == ["case_04", "case_07"] and len(outcome.skipped) == 8 and len(fake.calls) == 2
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == before
    assert len(table(out)) == 10


def test_kill_in_the_middle_keeps_what_was_finished(fake: FakeSegment, ten: Path) -> None:
    out = ten.parent / "out"
    fake.error, fake.refuse = KeyboardInterrupt(), "case_06"
    with pytest.raises(KeyboardInterrupt):
        segment_files(MODEL, ten, out)
    assert sorted(table(out)) == [f"case_{number:02d}" for number in range(6)]
    assert not [name for name in names(out) if name.startswith(".")]
    fake.error = None
    fake.calls.clear()
    assert len(segment_files(MODEL, ten, out).skipped) == 6 and len(fake.calls) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"options": Options(seed=1)},
        {"options": Options(mode="joint")},
        {"options": Options(preview=True)},
        {"model": Model(PLAN, None, None, "b" * 64)},  # type: ignore[arg-type]
        {"source": scan(seed=99)},
    ],
    ids=["seed", "mode", "preview", "weights", "input"],
)
def test_case_is_done_again_when_anything_that_matters_changed(
    fake: FakeSegment, tmp_path: Path, change: dict[str, Any]
) -> None:
    source, out = write(tmp_path / "in" / "head.nii.gz", scan()), tmp_path / "out"
    assert segment_files(MODEL, source, out).done == ["head"]
    assert segment_files(MODEL, source, out).skipped == ["head"]
    if "source" in change:
        write(source, change["source"])
    again = segment_files(change.get("model", MODEL), source, out, change.get("options"))
    assert again.done == ["head"]


def test_another_persons_scan_of_the_same_name_is_not_skipped(fake: FakeSegment, tmp_path: Path) -> None:
    for person in range(2):
        source = write(tmp_path / f"person{person}" / "scan.nii.gz", scan(person))
        assert segment_files(MODEL, source, tmp_path / "out").done == ["scan"]


def test_tables_of_several_runs_are_merged(fake: FakeSegment, tmp_path: Path) -> None:
    for name in ("one", "two"):
        segment_files(MODEL, write(tmp_path / f"{name}.nii.gz", scan()), tmp_path / "out")
    assert sorted(table(tmp_path / "out")) == ["one", "two"]
    assert sorted(table(tmp_path / "out", "manifest.json")["cases"]) == ["one", "two"]


def test_one_broken_case_of_ten_leaves_nine_finished(fake: FakeSegment, ten: Path) -> None:
    whole = (ten / "case_05_0000.nii.gz").read_bytes()
    (ten / "case_05_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    out = ten.parent / "out"
    outcome = segment_files(MODEL, ten, out)
    assert len(outcome.done) == 9 and list(outcome.failed) == ["case_05"]
    assert "case_05_0000.nii.gz" in outcome.failed["case_05"]
    assert len(list(out.glob("*.nii.gz"))) == len(table(out)) == 9
    assert list(table(out, "manifest.json")["failed"]) == ["case_05"]
    (ten / "case_05_0000.nii.gz").write_bytes(whole)
    assert segment_files(MODEL, ten, out).done == ["case_05"]
    assert table(out, "manifest.json")["failed"] == {}


def test_unexpected_error_in_one_case_does_not_stop_the_others(fake: FakeSegment, ten: Path) -> None:
    fake.error, fake.refuse = RuntimeError("odd"), "case_02"
    outcome = segment_files(MODEL, ten, ten.parent / "out")
    assert len(outcome.done) == 9 and "odd" in outcome.failed["case_02"]


def test_full_disk_stops_the_run(fake: FakeSegment, ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(volume, "_write_nifti", full)
    with pytest.raises(GenMedError, match="No space left"):
        segment_files(MODEL, ten, ten.parent / "out")
    assert len(fake.calls) == 1
    assert not (ten.parent / "out").exists() or names(ten.parent / "out") == set()


def test_broken_single_scan_raises_and_leaves_nothing(fake: FakeSegment, tmp_path: Path) -> None:
    source = write(tmp_path / "head.nii.gz", scan())
    source.write_bytes(source.read_bytes()[:60])
    for out in (tmp_path / "seg.nii.gz", tmp_path / "out"):
        with pytest.raises(GenMedError, match=r"head\.nii\.gz"):
            segment_files(MODEL, source, out)
        assert not out.exists()
    assert names(tmp_path) == {"head.nii.gz"}


def test_outputs_never_overwrite_inputs(fake: FakeSegment, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "head.nii.gz", scan())
    content = source.read_bytes()
    for given, out in ((source, source), (source, tmp_path / "in"), (tmp_path / "in", tmp_path / "in")):
        with pytest.raises(GenMedError, match="overwrite"):
            segment_files(MODEL, given, out)
    assert source.read_bytes() == content and names(tmp_path / "in") == {"head.nii.gz"}


def test_outputs_never_overwrite_masks(fake: FakeSegment, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "head.nii.gz", scan())
    mask = write(tmp_path / "masks" / "head.nii.gz", np.ones(SHAPE, dtype=np.uint8))
    content = mask.read_bytes()
    for given, observed, out in ((source, mask, mask), (source.parent, mask.parent, mask.parent)):
        with pytest.raises(GenMedError, match="overwrite"):
            segment_files(MODEL, given, out, Options(observed=observed))
    assert mask.read_bytes() == content and not fake.calls


def test_a_plan_that_changed_makes_results_anew(fake: FakeSegment, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "head.nii.gz", scan()).parent
    for temperature, calls in ((1.0, 1), (1.0, 1), (2.0, 2)):
        segment_files(replace(MODEL, plan=replace(MODEL.plan, temperature=temperature)), source, tmp_path / "out")
        assert len(fake.calls) == calls


def test_outputs_that_cannot_be_are_refused_before_any_work(fake: FakeSegment, ten: Path) -> None:
    (ten.parent / "file").write_text("")
    refused = {"seg.nii.gz": "one file for 10 cases", "seg.nrrd": r"seg\.nii\.gz", "file": "is a file"}
    (ten.parent / "head.nii.gz").mkdir()
    one = next(ten.iterdir())
    for out, reason in refused.items():
        with pytest.raises(GenMedError, match=reason):
            segment_files(MODEL, ten, ten.parent / out)
    for out, reason in {"file/seg.nii.gz": "no folder that may be written to", "head.nii.gz": "is a folder"}.items():
        with pytest.raises(GenMedError, match=reason):
            segment_files(MODEL, one, ten.parent / out)
    assert not fake.calls


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_foreign_statistics_file_is_not_overwritten(fake: FakeSegment, tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "statistics.json").write_text(content)
    with pytest.raises(GenMedError, match=r"statistics\.json"):
        segment_files(MODEL, write(tmp_path / "head.nii.gz", scan()), tmp_path / "out")
    assert (tmp_path / "out" / "statistics.json").read_text() == content


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"grid": "other"},
        {"match": "perfect"},
        {"samples": 0},
        {"seed": -1},
        {"slice_thickness_mm": 0.0},
        {"match": "affine", "mode": "conditional"},
        {"observed": Path("no-such-mask.nii.gz")},
    ],
)
def test_wrong_option_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(GenMedError) as error:
        Options(**wrong)
    assert str(next(iter(wrong.values()))) in str(error.value)


def test_every_option_reaches_segment(fake: FakeSegment, tmp_path: Path) -> None:
    box = ((-3.0, 0.0), (0.0, 8.0), (0.0, 2.0))
    options = Options("joint", "affine", 4, 7, "model", box, slice_thickness_mm=3.0)
    segment_files(MODEL, write(tmp_path / "head.nii.gz", scan()), tmp_path / "out", options)
    asked = fake.calls[0]
    expected = dict(mode="joint", match="affine", samples=4, seed=7, grid="model", roi_mm=box)
    expected["slice_thickness_mm"] = 3.0
    assert {key: asked[key] for key in expected} == expected


def run_masked(data: np.ndarray, tmp_path: Path) -> dict[str, bytes]:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:, :3] = 1
    source, observed = write(tmp_path / "in" / "head.nii.gz", data), write(tmp_path / "mask.nii.gz", mask)
    out = tmp_path / "out"
    segment_files(MODEL, source, out, Options(observed=observed, preview=True, probabilities=True))
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}


def test_unobserved_voxels_change_no_output_byte(fake: FakeSegment, tmp_path: Path) -> None:
    first = run_masked(scan(), tmp_path / "one")
    for number, value in enumerate((1e6, -5.0, np.nan, np.inf)):
        changed = scan()
        changed[:, 3:] = value
        assert run_masked(changed, tmp_path / str(number)) == first
    assert {"head.nii.gz", "head.preview.png", "head.probabilities.nii.gz", "statistics.json"} == set(first)


def test_masks_of_a_folder_belong_to_cases(fake: FakeSegment, ten: Path) -> None:
    for number in range(9):
        write(ten.parent / "masks" / f"case_{number:02d}.nii.gz", np.full(SHAPE, 1, dtype=np.uint8))
    outcome = segment_files(MODEL, ten, ten.parent / "out", Options(observed=ten.parent / "masks"))
    assert len(outcome.done) == 9 and "case_09.nii.gz" in outcome.failed["case_09"]


def test_channels_of_a_case_are_read_together(fake: FakeSegment, tmp_path: Path) -> None:
    model = Model(replace(PLAN, channels=("T1", "T2")), None, None, "a" * 64)  # type: ignore[arg-type]
    for case in ("a", "b"):
        for channel in range(2):
            write(tmp_path / "in" / f"{case}_{channel:04d}.nii.gz", scan(channel))
    assert segment_files(model, tmp_path / "in", tmp_path / "out").done == ["a", "b"]
    segment_files(model, tmp_path / "in" / "a_0000.nii.gz", tmp_path / "seg.nii.gz")
    for call in fake.calls:
        assert np.array_equal(call["scan"].data, np.stack([scan(0), scan(1)]))
    assert isinstance(table(tmp_path / "out")["a"]["front"]["mean_intensity"], list)


def test_numbers_that_are_not_channels_stay_in_the_name(tmp_path: Path) -> None:
    for year in (2019, 2020):
        write(tmp_path / f"scan_{year}.nii.gz", scan())
    cases, several = find_cases(tmp_path, channels=1)
    assert [case.id for case in cases] == ["scan_2019", "scan_2020"] and several


def test_two_scans_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.nii.gz", scan())
    write(tmp_path / "a.nrrd", scan())
    with pytest.raises(GenMedError, match=r"a\.nrrd|a\.nii\.gz"):
        find_cases(tmp_path, channels=1)


def test_folder_without_scans_is_explained(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    (tmp_path / ".hidden.nii.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(GenMedError, match="holds no scans"):
        find_cases(tmp_path, channels=1)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(GenMedError, match="imagesTr"):
        find_cases(tmp_path, channels=1)
    with pytest.raises(GenMedError, match="no such file"):
        find_cases(tmp_path / "absent", channels=1)


def dicom(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + bytes(20))


def test_dicom_folder_is_one_case_and_folder_of_those_several(tmp_path: Path) -> None:
    for person in ("anna", "bert"):
        dicom(tmp_path / person / "IM0001")
        dicom(tmp_path / person / "IM0002")
    (tmp_path / "notes").mkdir()
    cases, several = find_cases(tmp_path / "anna", channels=1)
    assert [case.id for case in cases] == ["anna"] and not several
    cases, several = find_cases(tmp_path, channels=1)
    assert [case.id for case in cases] == ["anna", "bert"] and several
    assert len(cases[0].files) == 2


def test_mean_intensity_on_a_coarser_grid_is_that_of_the_voxels_there(tmp_path: Path) -> None:
    image = Volume(np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1), np.eye(4))
    coarse = Volume(np.array([1, 1, 0, 0], dtype=np.uint8).reshape(1, 4, 1, 1), np.diag([2.0, 1, 1, 1]))
    values = on_grid(image, coarse.grid, order=0)
    assert values[0, :, 0, 0].tolist() == [0, 2, 4, 6]
    result = Segmentation(coarse, None, {}, 0.0, "conditional", "none", 0.0, 0, None)
    row = run.measure(result, values, PLAN)["front"]
    assert row == {"ml": pytest.approx(0.004), "voxels": 2, "mean_intensity": 1.0}
    assert run.measure(result, values, PLAN)["back"] == {"ml": 0.0, "voxels": 0, "mean_intensity": None}


def test_preview_is_a_picture_with_contours(fake: FakeSegment, tmp_path: Path) -> None:
    from PIL import Image

    source = write(tmp_path / "head.nii.gz", scan())
    outcome: Outcome = segment_files(MODEL, source, tmp_path / "seg.nii.gz", Options(preview=True))
    assert outcome.outputs == {"head": tmp_path / "seg.nii.gz"}
    picture = np.asarray(Image.open(tmp_path / "seg.preview.png").convert("RGB")).astype(int)
    coloured = (picture.max(axis=2) - picture.min(axis=2)) > 60
    assert picture.shape[0] > 200 and coloured.sum() > 50
