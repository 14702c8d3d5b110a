import gzip
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run import MODEL, SHAPE, names, scan, table, write
from test_segment import PLAN, random_denoiser
from torch import Tensor
from typer.testing import CliRunner

import genmed
from genmed import hub
from genmed.bench import restore as bench
from genmed.bench.kept import read_rows
from genmed.bench.restore import fidelity, interpolated, matched, on_scale, total_variation
from genmed.cli import app
from genmed.degrade import coarser, gamma, gaussian_noise, inverted, keep_slices
from genmed.errors import GenMedError
from genmed.hub import Model
from genmed.space import Space
from genmed.surprise import Surprise
from genmed.tasks import restore as task
from genmed.tasks import run
from genmed.tasks.restore import Restoration, line, restore, save_synthetic, translate
from genmed.tasks.run import RestoreOptions, restore_files, segment_files, translate_files
from genmed.tasks.segment import Segmentation, segment
from genmed.tasks.view import View, between_slices
from genmed.volume import Volume

Call = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(plan=PLAN, denoiser=random_denoiser(), folder=None, sha256="0" * 64)


def picture(shape: tuple[int, int, int] = (10, 12, 9), seed: int = 0) -> Volume:
    data = np.random.default_rng(seed).normal(100, 20, (1, *shape)).astype(np.float32)
    return Volume(data, np.diag([-1.0, 1.0, 1.0, 1.0]))


class Guess:
    """Stands in for `segment`: finds the given images of the working grid, one a call, and remembers the questions."""

    def __init__(self, *images: np.ndarray) -> None:
        self.images, self.calls = list(images), []  # type: ignore[var-annotated]
        self.thin_mm: float | None = None
        self.facts: dict[str, Any] = {}

    def __call__(self, model: Model, scan: Volume, **asked: Any) -> Segmentation:
        self.calls.append(asked)
        data = self.images[min(len(self.calls), len(self.images)) - 1]
        image = Volume(data, Space.fit(scan.grid, PLAN.spacing_mm, roi_mm=asked["roi_mm"]).model.affine)
        if asked["progress"]:
            asked["progress"](0.5)
        match = "affine" if asked["match"] == "auto" else asked["match"]
        thin_mm = asked["slice_thickness_mm"] if self.thin_mm is None else self.thin_mm
        return Segmentation(
            image, None, {}, float(len(self.calls)), "restore-then-condition", match, 0.1, asked["seed"], image,
            slice_thickness_mm=thin_mm, observed=asked["observed"], **self.facts,
        )  # fmt: skip


def guess(monkeypatch: pytest.MonkeyPatch, *images: np.ndarray) -> Guess:
    fake = Guess(*images)
    monkeypatch.setattr(task, "segment", fake)
    return fake


# Images ---------------------------------------------------------------------------------------------------


def test_restored_image_lies_on_the_working_grid_over_the_whole_field_of_view(model: Model) -> None:
    coarse = Volume(picture((3, 4, 3)).data, np.diag([4.0, 3.0, 4.0, 1.0]))
    result = restore(model, coarse, samples=2)
    assert result.image.grid.shape == (12, 12, 12) and result.image.data.dtype == np.float32
    assert result.image.spacing_mm == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(result.image.grid.corners_mm()[[0, -1]], coarse.grid.corners_mm()[[0, -1]])
    assert result.deviation is not None and result.deviation.grid.shape == (12, 12, 12)
    assert (result.deviation.data >= 0).all() and result.deviation.data.any()


def test_one_sample_is_the_image_that_segment_restores(model: Model) -> None:
    result = restore(model, picture(), match="none", samples=1, seed=5)
    found = segment(model, picture(), mode="restore-then-condition", match="none", samples=1, seed=5, grid="model")
    assert found.image is not None
    slope, shift = line(Space.fit(picture().grid, PLAN.spacing_mm).to_input(found.image.data), picture().data)
    np.testing.assert_allclose(result.image.data, slope * found.image.data + shift, rtol=1e-4)
    assert result.residual == pytest.approx(found.residual) and result.deviation is None
    assert (result.match, result.seed) == ("none", 5)


@pytest.mark.parametrize(("match", "measured"), [("auto", 1), ("affine", 1), ("falling", 3)])
def test_surprise_is_measured_once_unless_every_sample_needs_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, match: str, measured: int
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr("genmed.tasks.segment.features", lambda *given: calls.append(given[2]) or torch.zeros(1, 3))
    unsurprising = Surprise(*torch.zeros(3, 1))
    monkeypatch.setattr("genmed.tasks.segment.surprise", lambda *given: unsurprising)
    known = replace(model, plan=replace(PLAN, typical=(1.0,) * 26))
    found = restore(known, picture(), match=match, samples=3)
    assert len(calls) == measured and known.plan.typical == (1.0,) * 26
    if match == "falling":  # needs the histogram of clean cases each time
        return
    assert found.surprise == 0
    plain = restore(model, picture(), match="none" if match == "auto" else match, samples=3)
    assert found.match == plain.match and found.image.data.tobytes() == plain.image.data.tobytes()


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(model: Model) -> None:
    first, again, other = (restore(model, picture(), samples=2, seed=seed) for seed in (1, 1, 2))
    assert first.image.data.tobytes() == again.image.data.tobytes() != other.image.data.tobytes()


@pytest.mark.parametrize("make", [restore, translate])
def test_values_that_were_not_observed_cannot_change_a_byte(model: Model, make: Any) -> None:
    image = picture()
    mask = np.zeros_like(image.data, dtype=np.uint8)
    mask[..., ::3] = 1
    seen = mask > 0
    scans = [
        image.like(np.where(seen, image.data, hidden).astype(np.float32))
        for hidden in (image.data, np.nan, 1e6 * image.data[:, ::-1])
    ]
    found = [make(model, scan, observed=image.like(mask), samples=2) for scan in scans]
    assert np.isfinite(found[0].image.data).all()
    for other in found[1:]:
        assert other.image.data.tobytes() == found[0].image.data.tobytes()
        assert other.deviation.data.tobytes() == found[0].deviation.data.tobytes()
        assert other.residual == found[0].residual


def test_restored_image_comes_back_in_the_scans_own_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = picture((12, 12, 12)).data
    coarse = coarser(Volume(truth, np.eye(4)), 4).scan
    guess(monkeypatch, 300 - 2 * truth)  # what an affine match may settle on: turned round, another scale
    np.testing.assert_allclose(restore(MODEL, coarse, samples=3).image.data, truth, rtol=1e-4)


def test_a_contrast_that_was_bent_is_bent_back(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Volume(picture((12, 12, 12)).data, np.eye(4))
    scan = known.like(np.abs(known.data - 100) * 7)  # a tent: no line leads from the one to the other
    guess(monkeypatch, known.data)
    bent = restore(MODEL, scan, match="curve", samples=1).image.data
    assert np.corrcoef(bent.ravel(), scan.data.ravel())[0, 1] > 0.98
    assert bent.std() == pytest.approx(scan.data.std(), rel=0.1)
    straight = restore(MODEL, scan, match="affine", samples=1).image.data
    assert abs(np.corrcoef(straight.ravel(), scan.data.ravel())[0, 1]) < 0.5


def test_units_are_fitted_to_observed_voxels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = picture((12, 12, 12))
    worse = keep_slices(truth, 4, axis=1)
    spoilt = worse.scan.like(np.where(worse.seen, worse.scan.data, np.float32(np.nan)))
    guess(monkeypatch, np.flip(truth.data, 1) / 5)
    found = restore(MODEL, spoilt, observed=worse.observed).image
    np.testing.assert_allclose(found.data, np.flip(truth.data, 1), rtol=1e-4)


def test_units_of_a_region_are_those_of_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = Volume(picture((12, 12, 12)).data, np.eye(4))
    box = ((-0.5, 5.5), (-0.5, 11.5), (-0.5, 11.5))
    guess(monkeypatch, truth.data[:, :6] * 3)
    wild = truth.data.copy()
    wild[:, 6:] *= -40
    for make, rtol in ((restore, 1e-4), (translate, 1e-4)):
        found = make(MODEL, truth.like(wild), roi_mm=box).image
        assert found.grid.shape == (6, 12, 12)
        np.testing.assert_allclose(found.data, truth.data[:, :6], rtol=rtol)


def test_translation_keeps_the_models_contrast_with_mean_and_deviation_of_the_scan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = picture((12, 12, 12))
    image = image.like(1000 - 3 * image.data)
    guess(monkeypatch, image.data[:, ::-1] / 70)
    found = translate(MODEL, image, samples=1).image
    np.testing.assert_allclose(found.data, image.data[:, ::-1], rtol=1e-4)
    guess(monkeypatch, -image.data[:, ::-1])
    found = translate(MODEL, image, samples=1).image
    assert np.corrcoef(found.data.ravel(), image.data[:, ::-1].ravel())[0, 1] == pytest.approx(-1)
    assert found.data.mean() == pytest.approx(image.data.mean(), rel=0.01)
    assert found.data.std() == pytest.approx(image.data.std(), rel=0.02)


def test_mean_deviation_and_residual_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [picture((12, 12, 12), seed).data for seed in range(4)]
    guess(monkeypatch, *drawn)
    monkeypatch.setattr(task, "line", lambda x, y: (2.0, 7.0))
    found = restore(MODEL, picture((12, 12, 12), 9), samples=4)
    expected = 2 * np.stack(drawn).astype(np.float64) + 7
    np.testing.assert_allclose(found.image.data, expected.mean(axis=0), rtol=1e-5)
    assert found.deviation is not None
    np.testing.assert_allclose(found.deviation.data, expected.std(axis=0, ddof=1), rtol=1e-4)
    assert found.residual == 2.5  # of 1, 2, 3 and 4


@pytest.mark.parametrize("make", [restore, translate])
def test_doubts_are_those_of_the_segmentation_with_the_mean_residual(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    fake = guess(monkeypatch, picture((12, 12, 12)).data)
    fake.facts = {"surprise": 4.5, "observed_share": 0.002, "notes": ("seen in part",)}
    found = make(MODEL, picture((12, 12, 12)), samples=4)
    assert found.doubts == Segmentation(
        found.image, None, {}, 2.5, "joint", "affine", 0.0, 0, None, 4.5, observed_share=0.002
    ).doubts
    assert found.doubtful and len(found.doubts) == 2
    assert (found.surprise, found.observed_share, found.notes) == (4.5, 0.002, ("seen in part",))
    fake.facts, fake.calls = {"surprise": 3.5}, []
    assert not make(MODEL, picture((12, 12, 12)), samples=9).doubtful  # mean residual 5
    fake.calls = []
    assert "residual 5.5" in make(MODEL, picture((12, 12, 12)), samples=10).doubts[0]


def test_every_argument_reaches_segment_and_samples_differ_in_their_seeds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    image, done = picture((12, 12, 12)), []
    fake = guess(monkeypatch, image.data)
    mask = image.like(np.ones_like(image.data, dtype=np.uint8))
    arguments: Call = dict(observed=mask, slice_thickness_mm=2.0, roi_mm=((-20, 20),) * 3)
    found = restore(MODEL, image, samples=4, seed=7, progress=done.append, **arguments)
    assert found.match == "affine" and [call["match"] for call in fake.calls] == ["auto", "affine", "affine", "affine"]
    assert len({call["seed"] for call in fake.calls}) == 4 and fake.calls[0]["seed"] == 7
    for call in fake.calls:
        assert {key: call[key] for key in arguments} == arguments
        assert (call["mode"], call["samples"], call["grid"]) == ("restore-then-condition", 1, "model")
    assert done == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize("found", [None, 1.0])
def test_slices_are_taken_to_be_as_thick_in_all_samples_as_in_the_first(
    monkeypatch: pytest.MonkeyPatch, found: float | None
) -> None:
    fake = guess(monkeypatch, picture((12, 12, 12)).data)
    fake.thin_mm = found
    restore(MODEL, picture((12, 12, 12)), samples=3)
    later = math.inf if found is None else found
    assert [call["slice_thickness_mm"] for call in fake.calls] == [None, later, later]
    thick = Volume(picture((12, 12, 3)).data, np.diag([1.0, 1, 4, 1]))
    whole, infinite = (View.of(MODEL.plan, thick, slice_thickness_mm=mm).matrices for mm in (None, math.inf))
    assert all(map(torch.equal, whole, infinite)) and whole[2].shape == (3, 12)


def test_automatic_match_of_a_translation_can_turn_the_contrast_round(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = guess(monkeypatch, picture((12, 12, 12)).data)
    assert translate(MODEL, picture((12, 12, 12))).match == "affine"
    assert translate(MODEL, picture((12, 12, 12)), match="lncc").match == "lncc"
    assert len(fake.calls) == 8 and fake.calls[0]["match"] == "affine"


def test_bad_arguments_are_refused(model: Model) -> None:
    for make in (restore, translate):
        with pytest.raises(GenMedError, match="samples must be at least 1"):
            make(model, picture(), samples=0)
        with pytest.raises(GenMedError, match="match 'magic' is unknown"):
            make(model, picture(), match="magic")


@given(st.integers(2, 40), st.floats(-5, 5), st.floats(-100, 100), st.integers(0, 9))
def test_line_recovers_its_slope_and_shift(count: int, slope: float, shift: float, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=count)
    assert line(x, slope * x + shift) == (pytest.approx(slope, abs=1e-6), pytest.approx(shift, abs=1e-6))
    assert line(np.full(count, 3.0), x) == (0.0, pytest.approx(x.mean()))


def test_names_of_the_package_are_these_functions() -> None:
    assert genmed.restore is restore and genmed.translate is translate and genmed.Restoration is Restoration


# Files ----------------------------------------------------------------------------------------------------


class FakeRestore:
    """Doubles the scan, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.error: BaseException | None = None
        self.refuse = ""
        self.facts: dict[str, Any] = {}

    def __call__(self, model: Model, scan: Volume, *, name: str, **asked: Any) -> Restoration:
        asked["name"] = name
        self.calls.append(asked | {"scan": scan})
        if self.error is not None and self.refuse in str(scan.path):
            raise self.error
        seen = scan.data if asked["observed"] is None else np.where(asked["observed"].data != 0, scan.data, 0)
        image = Volume(2 * seen.astype(np.float32), scan.affine)
        spread = None if asked["samples"] == 1 else image.like(np.ones_like(image.data))
        return Restoration(image, 1.5, "affine", 0.125, asked["seed"], spread, **self.facts)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRestore:
    fake = FakeRestore()
    for name in ("restore", "translate"):
        monkeypatch.setattr(run, name, partial(fake, name=name))
    monkeypatch.setattr(hub, "load", lambda name: MODEL)
    return fake


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / "scans" / f"case_{number}_0000.nii.gz", scan(number))
    return tmp_path / "scans"


def described(path: Path) -> str:
    return bytes(nib.load(path).header["descrip"].tobytes()).rstrip(b"\0").decode()


def test_single_file_says_in_name_and_header_that_it_is_synthetic(fake: FakeRestore, tmp_path: Path) -> None:
    source, out = write(tmp_path / "head_0000.nii.gz", scan()), tmp_path / "new"
    options = RestoreOptions(uncertainty=True)
    done = restore_files(MODEL, source, out / "a.synthetic.nii.gz", options, command="genmed …")
    assert done.outputs == {"head": out / "a.synthetic.nii.gz"}
    tables = {"a.synthetic.nii.gz.manifest.json"}
    assert names(out) == {"a.synthetic.nii.gz", "a.uncertainty.nii.gz", *tables}
    written = nib.load(out / "a.synthetic.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), 2 * scan()) and written.get_data_dtype() == np.float32
    assert np.array_equal(written.affine, nib.load(source).affine)
    assert described(out / "a.synthetic.nii.gz") == "synthetic: restored by GenMed, model tiny"
    assert described(out / "a.uncertainty.nii.gz").startswith("synthetic: standard deviation")
    manifest = table(out, "a.synthetic.nii.gz.manifest.json")
    assert (manifest["task"], manifest["command"], manifest["weights_sha256"]) == ("restore", "genmed …", "a" * 64)
    facts = manifest["cases"]["head"]
    assert (facts["match"], facts["residual"], facts["seconds"], facts["seed"]) == ("affine", 1.5, 0.12, 0)


def test_translation_names_the_channel_it_became(fake: FakeRestore, tmp_path: Path) -> None:
    translate_files(MODEL, write(tmp_path / "head.nii.gz", scan()), tmp_path / "out")
    assert names(tmp_path / "out") == {"head.synthetic.nii.gz", "manifest.json"}
    assert described(tmp_path / "out" / "head.synthetic.nii.gz") == "synthetic: translated by GenMed to T1"
    assert fake.calls[0]["name"] == "translate"
    assert table(tmp_path / "out", "manifest.json")["task"] == "translate"


def test_description_is_cut_at_79_bytes_between_letters(tmp_path: Path) -> None:
    image = picture()
    for text in ("a" * 100, "a" + "ä" * 60):
        save_synthetic(image, tmp_path / "x.nii.gz", text)
        kept = described(tmp_path / "x.nii.gz")
        assert text.startswith(kept) and len(kept.encode()) == 79
    assert names(tmp_path) == {"x.nii.gz"}
    assert np.array_equal(genmed.read(tmp_path / "x.nii.gz").data, image.data)


def test_same_image_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        save_synthetic(picture(), tmp_path / name, "synthetic")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("name", ["a.nii.gz", "synthetic.nii.gz", "a.nrrd"])
def test_name_that_hides_what_the_file_is_is_refused_with_the_right_one(
    fake: FakeRestore, tmp_path: Path, name: str
) -> None:
    source = write(tmp_path / "head.nii.gz", scan())
    right = f"{name.partition('.')[0]}.synthetic.nii.gz"
    with pytest.raises(GenMedError, match=right):
        restore_files(MODEL, source, tmp_path / name)
    assert not fake.calls and names(tmp_path) == {"head.nii.gz"}


def test_inputs_are_never_overwritten(fake: FakeRestore, tmp_path: Path) -> None:
    source = write(tmp_path / "head.synthetic.nii.gz", scan())
    content = source.read_bytes()
    with pytest.raises(GenMedError, match="overwrite"):
        restore_files(MODEL, source, source)
    assert source.read_bytes() == content and names(tmp_path) == {"head.synthetic.nii.gz"}


def test_folder_skips_finished_cases_and_only_those(fake: FakeRestore, three: Path) -> None:
    out = three.parent / "out"
    assert len(restore_files(MODEL, three, out).done) == 3
    assert names(out) == {*(f"case_{n}.synthetic.nii.gz" for n in range(3)), "manifest.json"}
    (out / "case_1.synthetic.nii.gz").unlink()
    again = restore_files(MODEL, three, out)
    assert again.done == ["case_1"] and again.skipped == ["case_0", "case_2"] and len(fake.calls) == 4
    assert len(restore_files(MODEL, three, out, RestoreOptions(uncertainty=True)).done) == 3
    assert len(restore_files(MODEL, three, out, RestoreOptions(uncertainty=True)).skipped) == 3
    assert len(restore_files(MODEL, three, out, RestoreOptions(seed=1)).done) == 3


def test_broken_case_does_not_stop_the_others(fake: FakeRestore, three: Path) -> None:
    (three / "case_1_0000.nii.gz").write_bytes(b"not gzip")
    outcome = restore_files(MODEL, three, three.parent / "out")
    assert outcome.done == ["case_0", "case_2"] and "case_1_0000.nii.gz" in outcome.failed["case_1"]
    assert list(table(three.parent / "out", "manifest.json")["failed"]) == ["case_1"]


def test_kill_while_a_case_is_replaced_does_not_let_it_pass_for_the_earlier_one(
    fake: FakeRestore, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = three.parent / "out"
    restore_files(MODEL, three, out)
    earlier = (out / "case_0.synthetic.nii.gz").read_bytes()

    def killed(self: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run._Record, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            restore_files(MODEL, three, out, RestoreOptions(seed=1))
    assert (out / "case_0.synthetic.nii.gz").read_bytes() == earlier  # the fake does not look at the seed
    assert restore_files(MODEL, three, out).done == ["case_0"]


def test_interrupted_writing_leaves_no_part_behind(
    fake: FakeRestore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        restore_files(MODEL, write(tmp_path / "in" / "head.nii.gz", scan()), tmp_path / "out")
    assert names(tmp_path / "out") == set()


def test_folder_of_another_task_is_refused(fake: FakeRestore, three: Path) -> None:
    out = three.parent / "out"
    restore_files(MODEL, three, out)
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    for other, name in ((translate_files, "restore"), (segment_files, "restore")):
        with pytest.raises(GenMedError, match=f"results of `genmed {name}`; choose another --out"):
            other(MODEL, three, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content


def test_unobserved_voxels_change_no_output_byte(fake: FakeRestore, tmp_path: Path) -> None:
    written = []
    for name, value in (("a", 1e6), ("b", np.nan)):
        data, mask = scan(), np.zeros(SHAPE, dtype=np.uint8)
        mask[:, :3], data[:, 3:] = 1, value
        source, observed = write(tmp_path / name / "head.nii.gz", data), write(tmp_path / "mask.nii.gz", mask)
        restore_files(MODEL, source, tmp_path / name / "out", RestoreOptions(observed=observed, uncertainty=True))
        files = sorted((tmp_path / name / "out").glob("*.nii.gz"))
        written.append([(path.name, gzip.decompress(path.read_bytes())) for path in files])
    assert len(written[0]) == 2 and written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--match", "magic"], "magic"),
        (["--samples", "0"], "--samples"),
        (["--seed", "-1"], "--seed"),
        (["--roi", "1,2,3"], "--roi"),
        (["--observed", "nowhere.nii.gz"], "nowhere.nii.gz"),
        (["--slice-thickness", "0"], "--slice-thickness"),
        (["--uncertainty", "--samples", "1"], "--samples 2"),
    ],
)
@pytest.mark.parametrize("command", ["restore", "translate"])
def test_bad_option_gives_one_line(
    fake: FakeRestore, tmp_path: Path, command: str, options: list[str], word: str
) -> None:
    source = write(tmp_path / "head.nii.gz", scan())
    arguments = [command, str(source), "--model", "tiny", "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and result.stdout == "" and not fake.calls
    assert len(result.stderr.splitlines()) == 1 and word in result.stderr and result.stderr.startswith("genmed: ")


@pytest.mark.parametrize("command", ["restore", "translate"])
def test_command_line_reaches_the_task_and_prints_json(fake: FakeRestore, tmp_path: Path, command: str) -> None:
    source, mask = write(tmp_path / "head.nii.gz", scan()), write(tmp_path / "mask.nii.gz", np.ones(SHAPE))
    options = "--match poly --samples 3 --seed 7 --slice-thickness 3 --uncertainty --roi=-3,0,0,8,0,2.5 --json"
    arguments = [command, source, "--model", "tiny", "--out", tmp_path / "out", "--observed", mask, *options.split()]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    asked = fake.calls[0]
    assert asked["name"] == command
    assert (asked["match"], asked["samples"], asked["seed"], asked["slice_thickness_mm"]) == ("poly", 3, 7, 3.0)
    assert asked["roi_mm"] == ((-3, 0), (0, 8), (0, 2.5)) and asked["observed"].data.all()
    out = tmp_path / "out" / "head.synthetic.nii.gz"
    facts = {
        "out": str(out), "skipped": False, "match": "affine", "residual": 1.5, "surprise": None, "observed_share": 1.0,
        "doubtful": False, "doubts": [], "slice_thickness_mm": None, "seconds": 0.12, "notes": [],
    }  # fmt: skip
    assert json.loads(result.stdout) == {"cases": {"head": facts}, "failed": {}}
    assert names(tmp_path / "out") == {"head.synthetic.nii.gz", "head.uncertainty.nii.gz", "manifest.json"}


def test_command_line_lists_cases_and_failures(fake: FakeRestore, three: Path) -> None:
    (three / "case_1_0000.nii.gz").write_bytes(b"not gzip")
    arguments = ["restore", str(three), "--model", "tiny", "--out", str(three.parent / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "1 of 3 cases failed" in result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith("case_0: match affine, residual 1.50, 0.1 s -> ") and second.startswith("case_2")
    assert "finished before" in CliRunner().invoke(app, arguments).stdout


@pytest.mark.parametrize("command", ["restore", "translate"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_why_a_result_is_doubtful_is_told_on_stderr_and_in_the_manifest(
    fake: FakeRestore, tmp_path: Path, command: str, more: list[str]
) -> None:
    fake.facts = {"surprise": 6.0, "doubts": ("unlike",), "notes": ("3 of 9 slices",), "slice_thickness_mm": 2.0}
    source, out = write(tmp_path / "head.nii.gz", scan()), tmp_path / "out"
    result = CliRunner().invoke(app, [command, str(source), "--model", "tiny", "--out", str(out), *more])
    assert result.exit_code == 0
    assert result.stderr == "genmed: 3 of 9 slices\ngenmed: head is doubtful: unlike\n"
    facts = table(out, "manifest.json")["cases"]["head"]
    told = json.loads(result.stdout)["cases"]["head"] if more else facts
    for one in (facts, told):
        assert (one["doubtful"], one["doubts"], one["surprise"], one["notes"], one["slice_thickness_mm"]) == (
            True, ["unlike"], 6.0, ["3 of 9 slices"], 2.0,
        )  # fmt: skip
    assert more or result.stdout.startswith("head: match affine, residual 1.50, 0.1 s; DOUBTFUL, look at it -> ")


def test_restoration_of_an_untrained_model_is_doubtful_and_hides_empty_slices(model: Model) -> None:
    known, whole = replace(model, plan=replace(PLAN, typical=(0.01,) * 26)), picture((12, 12, 12))
    empty = whole.like(np.where(np.arange(12) % 4 == 1, whole.data, np.float32(0)))
    found = restore(known, empty, match="affine", samples=2)
    assert found.surprise is not None and found.doubtful and found.observed_share < 1 and "9 of 12" in found.notes[0]
    mask = whole.like(np.where(np.arange(12) % 4 == 1, np.ones_like(whole.data), 0).astype(np.uint8))
    told = restore(known, empty, match="affine", samples=2, observed=mask)
    assert told.image.data.tobytes() == found.image.data.tobytes() and not told.notes


def test_untrained_model_restores_a_coarse_file_end_to_end(tmp_path: Path, model: Model) -> None:
    Volume(picture((3, 4, 3)).data, np.diag([4.0, 3.0, 4.0, 1.0])).save(tmp_path / "thick.nii.gz")
    options = RestoreOptions(samples=1)
    outcome = restore_files(model, tmp_path / "thick.nii.gz", tmp_path / "out", options)
    found = genmed.read(tmp_path / "out" / "thick.synthetic.nii.gz")
    assert found.grid.shape == (12, 12, 12) and np.isfinite(found.data).all()
    assert outcome.manifest["cases"]["thick"]["match"] != "auto"


# Benchmark ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 3])
def test_interpolations_reproduce_a_ramp_between_what_was_seen(order: int) -> None:
    ramp = Volume(np.broadcast_to(np.arange(16.0, dtype=np.float32), (1, 16, 16, 16)).copy(), np.eye(4))
    ramp = ramp.like(np.swapaxes(ramp.data, 2, 3))  # along axis 1
    worse = keep_slices(ramp, 4, axis=1)
    filled = between_slices(worse.scan.data, worse.seen, order)
    low, high = np.flatnonzero(worse.seen[0, :, 0])[[0, -1]]
    np.testing.assert_allclose(filled[0, 3, :, 5], np.clip(np.arange(16), low, high), atol=1e-4)
    assert np.array_equal(filled, interpolated(worse, PLAN, order))
    fine = interpolated(coarser(ramp, 2), PLAN, order)
    assert fine.shape == ramp.data.shape
    inner = fine[0, 3, 6:10, 5] if order == 3 else fine[0, 3, 1:-1, 5]
    np.testing.assert_allclose(inner, np.arange(6, 10) if order == 3 else np.arange(1, 15), atol=0.02)


def test_fidelity_is_that_of_the_channels_on_their_own_ranges() -> None:
    truth = np.random.default_rng(0).uniform(0, 1, (2, 12, 12, 12))
    truth[1] *= 1000
    off = truth + np.array([0.1, 100.0])[:, None, None, None]
    assert fidelity(off, truth).psnr == pytest.approx(20, abs=0.05)
    assert fidelity(truth, truth).ssim == pytest.approx(1)
    assert fidelity(inverted(Volume(truth, np.eye(4))).scan.data, truth).ssim < 0.2


def halves() -> np.ndarray:
    """A bright and a dark half, (1, 16, 16, 16)."""
    return np.where(np.indices((16, 16, 16))[:1] < 8, 0.0, 100.0).astype(np.float32)


def test_total_variation_takes_noise_from_flat_regions_at_the_strength_that_the_truth_likes_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = halves()
    noisy = gaussian_noise(Volume(truth, np.eye(4)), 0.5)
    quiet = total_variation(noisy, PLAN, truth)
    assert fidelity(quiet, truth).psnr > fidelity(noisy.scan.data, truth).psnr + 6
    each = []
    for strength in bench.STRENGTHS:
        monkeypatch.setattr(bench, "STRENGTHS", (strength,))
        each.append(fidelity(total_variation(noisy, PLAN, truth), truth).psnr)
    assert fidelity(quiet, truth).psnr == max(each) > min(each)


def test_histogram_matching_undoes_rising_maps_and_no_others() -> None:
    scan = Volume(picture((16, 16, 16)).data, np.eye(4))
    rising, falling = gamma(scan, 2), inverted(scan)
    assert fidelity(matched(rising, PLAN, scan.data), scan.data).psnr > 30
    assert fidelity(matched(falling, PLAN, scan.data), scan.data).psnr < 20
    np.testing.assert_allclose(on_scale(falling.scan.data, scan.data), scan.data, atol=1e-3)


def write_two_cases(folder: Path) -> tuple[Path, np.ndarray]:
    """A data set of two persons in the part tune, whose split lies beside it, and the image (1, x, y, z) of both."""
    image = picture((24, 16, 16)).data
    ids = ["hippocampus_001", "hippocampus_003"]
    tiny.write_msd(folder, "Hippocampus", PLAN.labels, {id: (image, np.zeros_like(image)) for id in ids})
    (folder / "split.json").write_text(json.dumps({"dataset": "Hippocampus", "train": [], "tune": ids, "report": []}))
    return folder, image


def test_bench_has_every_row_of_every_table_beside_its_peers(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def nearly(task: str) -> Any:
        def found(model: Model, scan: Volume, **options: Any) -> Restoration:
            asked.append(task)
            truth = Volume(picture((24, 16, 16)).data, np.eye(4))
            return Restoration(gaussian_noise(truth, 0.1).scan, 0.0, "none", 2.0, 0)

        return found

    monkeypatch.setattr(bench, "restore", nearly("restore"))
    monkeypatch.setattr(bench, "translate", nearly("translate"))
    folder, image = write_two_cases(tmp_path)
    text = bench.run(model, folder, tmp_path / "out", samples=1, split=folder / "split.json")
    assert text == (tmp_path / "out" / "table.md").read_text() and text in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in lines}
    assert list(rows) == [
        "input", "4 mm voxels", "8 mm voxels", "8 slices", "4 slices", "Gaussian noise 0.5", "inverted", "tent"
    ]  # fmt: skip
    assert asked == 2 * 5 * ["restore"] + 2 * 2 * ["translate"]
    assert [len(rows[name]) for name in ("4 slices", "Gaussian noise 0.5", "tent")] == [8, 8, 6]
    ours = fidelity(gaussian_noise(Volume(image, np.eye(4)), 0.1).scan.data, image)
    assert rows["8 slices"][-3:-1] == [f"{x:.{n}f} ({x:.{n}f} to {x:.{n}f})" for x, n in zip(ours, (2, 3), strict=True)]
    titles = [line for line in lines if line.startswith("| input")]
    for peer, title in zip(("cubic", "total variation", "histogram matching"), titles, strict=True):
        assert f"| {peer} PSNR | {peer} SSIM | GenMed PSNR |" in title


def test_bad_input_of_the_bench_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["restore", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_bench_loses_no_finished_case_and_redoes_those_of_other_settings(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def scores(model: Model, scan: Volume, worse: Any, table: bench.Table, samples: int) -> Any:
        calls.append(table.title)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {name: bench.Fidelity(20 + len(calls), 1 / 3) for name in (*table.peers, bench.OURS)}, 2.0

    monkeypatch.setattr(bench, "scores", scores)
    folder, _ = write_two_cases(tmp_path)
    out, split = tmp_path / "out", folder / "split.json"
    with pytest.raises(KeyboardInterrupt):
        bench.run(model, folder, out, samples=1, split=split)
    first = read_rows(out / "restored.csv", bench.Row)
    methods = "linear", "cubic", "GenMed"
    assert [row[:3] for row in first] == [("4 mm voxels", "hippocampus_001", method) for method in methods]
    assert not (out / "table.md").exists()
    text = bench.run(model, folder, out, samples=1, split=split)
    rows = read_rows(out / "restored.csv", bench.Row)
    assert [row[:6] for row in rows[:3]] == [row[:6] for row in first] and rows[0].psnr == 21 and rows[3].psnr == 23
    assert len(calls) == 1 + 1 + 13  # of seven inputs and two cases
    assert bench.run(model, folder, out, samples=1, split=split) == text and len(calls) == 15
    bench.run(model, folder, out, samples=1, cases=1, split=split)
    assert len(calls) == 15 and len(read_rows(out / "restored.csv", bench.Row)) == len(rows)
    bench.run(model, folder, out, samples=2, split=split)
    assert len(calls) == 15 + 14 and len(read_rows(out / "restored.csv", bench.Row)) == len(rows)
