import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save

from genmed import hub
from genmed.denoiser import build
from genmed.errors import GenMedError
from genmed.hub import Card
from genmed.shape_model import load

PLAN = replace(tiny.PLAN, patch=(8, 8, 8))
CARD = Card(
    name="tiny",
    licence="CC-BY-SA-4.0",
    training_data="Phantoms: made by the tests",
    minutes=1.5,
    hardware="2 CPU cores",
    command="pytest",
    scores={"dice": 0.5, "tune L/R: side": 3.25},
    text="# tiny\n\nOnly for tests.",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENMED_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator) for k, v in build(PLAN).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hub.save_model(tmp_path / "tiny", PLAN, some_weights(), CARD)


def seal(folder: Path) -> None:
    """What a forger does: new checksums over whatever is there."""
    names = ("weights.safetensors", "plan.json", "card.md")
    sums = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "SHA256SUMS").write_text("".join(sums))


def one_line(error: pytest.ExceptionInfo[GenMedError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_saved_model_loads_with_its_weights_in_half_precision(folder: Path) -> None:
    model = hub.load(folder)
    assert model.plan == PLAN and model.folder == folder
    for name, tensor in model.denoiser.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, some_weights()[name].half().float())
    assert model.sha256 == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    floats = 4 * sum(tensor.numel() for tensor in some_weights().values())
    assert (folder / "weights.safetensors").stat().st_size < 0.55 * floats + 10_000


def test_full_precision_is_kept_on_request_and_where_half_would_overflow(tmp_path: Path) -> None:
    weights = some_weights()
    folder = hub.save_model(tmp_path / "exact", PLAN, weights, CARD, half=False)
    exact = hub.load(folder).denoiser.state_dict()
    assert all(torch.equal(exact[name], weights[name]) for name in weights)
    name = next(iter(weights))
    weights[name] = weights[name] * 1e6
    large = hub.load(hub.save_model(tmp_path / "large", PLAN, weights, CARD)).denoiser.state_dict()
    assert torch.equal(large[name], weights[name])


def test_loaded_model_runs_and_is_frozen(folder: Path) -> None:
    denoiser = hub.load(folder).denoiser
    z = torch.zeros(1, 4, 8, 8, 8, requires_grad=True)
    denoiser(z, torch.ones(1, 2)).sum().backward()
    assert z.grad is not None and not denoiser.training
    assert all(not parameter.requires_grad for parameter in denoiser.parameters())


def test_saving_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    weights = some_weights()
    next(iter(weights.values())).view(-1)[0] = float("nan")
    with pytest.raises(GenMedError, match="not finite"):
        hub.save_model(tmp_path / "nan", PLAN, weights, CARD)
    assert not (tmp_path / "nan").exists()


def test_saving_again_keeps_other_files_and_leaves_no_temporary_ones(folder: Path) -> None:
    (folder / "last.ckpt").write_text("of the training")
    hub.save_model(folder, PLAN, some_weights(seed=1), CARD)
    files = {"weights.safetensors", "plan.json", "card.md", "SHA256SUMS", "last.ckpt"}
    assert {path.name for path in folder.iterdir()} == files
    hub.load(folder)


def test_checksums_are_those_that_sha256sum_checks(folder: Path) -> None:
    before = (folder / "SHA256SUMS").read_text()
    seal(folder)
    assert (folder / "SHA256SUMS").read_text() == before


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json", "card.md"])
def test_one_flipped_bit_is_refused(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(GenMedError, match="corrupt or altered") as error:
        hub.load(folder)
    assert name in one_line(error)


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json", "card.md", "SHA256SUMS"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(GenMedError, match=f"lacks {name}") as error:
        hub.load(folder)
    assert str(folder) in one_line(error)


def test_unlisted_file_is_refused(folder: Path) -> None:
    sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in sums if "card.md" not in line))
    with pytest.raises(GenMedError, match=r"card\.md"):
        hub.load(folder)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_pickle_in_place_of_weights_is_refused_and_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "code-was-run"
    (folder / "weights.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    seal(folder)
    with pytest.raises(GenMedError, match="not a safetensors file") as error:
        hub.load(folder)
    assert one_line(error) and not mark.exists()
    torch.save({"weights": Bomb(mark)}, folder / "weights.safetensors")
    seal(folder)
    with pytest.raises(GenMedError, match="not a safetensors file"):
        hub.load(folder)
    assert not mark.exists()


def forged(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    (folder / "weights.safetensors").write_bytes(save(weights))
    seal(folder)
    return folder


def test_weights_that_do_not_fit_the_plan_are_refused(folder: Path) -> None:
    weights = some_weights()
    name = max(weights, key=lambda key: weights[key].ndim)
    with pytest.raises(GenMedError, match="shape") as error:
        hub.load(forged(weights | {name: torch.zeros(3)}, folder))
    assert name in one_line(error)
    with pytest.raises(GenMedError, match=f"lacks tensor '{name}'"):
        hub.load(forged({key: value for key, value in weights.items() if key != name}, folder))
    with pytest.raises(GenMedError, match="unknown tensor 'extra'"):
        hub.load(forged(weights | {"extra": torch.zeros(3)}, folder))
    with pytest.raises(GenMedError, match="not finite"):
        hub.load(forged(weights | {name: torch.full_like(weights[name], torch.inf)}, folder))


@pytest.mark.parametrize(
    "plan", ["", "plan.json", "[]", "{", '{"name": 1}', PLAN.to_json().replace("[8, 16]", "[9, 17]"), "\xff\xfe"]
)
def test_unusable_plan_is_named(folder: Path, plan: str) -> None:
    (folder / "plan.json").write_text(plan, encoding="latin-1")
    seal(folder)
    with pytest.raises(GenMedError, match=r"tiny/plan\.json") as error:
        hub.load(folder)
    assert one_line(error)


def test_unknown_model_lists_the_known_ones(folder: Path) -> None:
    hub.pull(folder, "my-model")
    with pytest.raises(GenMedError, match="my-model") as error:
        hub.load("hippocampus-xr")
    assert "hippocampus-xr" in one_line(error)
    with pytest.raises(GenMedError, match="is a file"):
        hub.load(folder / "plan.json")


def test_card_survives_a_round_trip() -> None:
    assert Card.from_markdown(CARD.to_markdown()) == CARD
    bare = Card(name="bare", licence="MIT", training_data="[none] # at all: 'quoted' \"twice\"")
    assert Card.from_markdown(bare.to_markdown()) == bare


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("no front matter", "front matter"),
        ("---\nname: a\nlicence: b\n---\n", "training_data"),
        ("---\nname: a\nlicence: b\ntraining_data: c\nminutes: long\n---\n", "minutes"),
        ("---\nname: a\nnonsense\n---\n", "nonsense"),
        ('---\nname: "a\n---\n', "quote"),
    ],
)
def test_malformed_card_is_explained(card: str, message: str) -> None:
    with pytest.raises(GenMedError, match=message):
        Card.from_markdown(card)


def test_new_card_renews_the_checksums_and_keeps_the_weights(folder: Path) -> None:
    digest = hub.load(folder).sha256
    hub.replace_card(folder, replace(CARD, scores={"dice": 0.75}))
    assert hub.load(folder).sha256 == digest
    assert hub.read_card(folder).scores == {"dice": 0.75}


def test_list_shows_both_licences_and_survives_a_damaged_model(folder: Path, home: Path) -> None:
    hub.pull(folder, "good")
    hub.pull(folder, "bad")
    (home / "bad" / "card.md").write_text("altered")
    rows = {row.name: row for row in hub.list_models()}
    good = rows["good"]
    assert (good.weights_licence, good.code_licence) == ("CC-BY-SA-4.0", "Apache-2.0")
    assert good.labels == ("front", "back") and good.dice == 0.5 and good.origin == "pulled"
    size = sum((folder / name).stat().st_size for name in ("weights.safetensors", "plan.json", "card.md"))
    assert good.megabytes == pytest.approx(size / 1e6)
    assert "card.md" in rows["bad"].problem
    assert set(hub.bundled()) <= set(rows)


def test_every_bundled_model_loads() -> None:
    for name in hub.bundled():
        assert load(name).plan.name == name
        assert hub.info(name)["megabytes"] < (24 if name == "shapes" else 12)
        assert all(path.stat().st_size < 12e6 for path in hub.find(name).iterdir())


def test_info_names_licence_scores_plan_and_hash(folder: Path) -> None:
    facts = hub.info(folder)
    assert facts["card"]["licence"] == "CC-BY-SA-4.0" and facts["card"]["scores"]["dice"] == 0.5
    assert facts["plan"]["spacing_mm"] == [1.0, 1.0, 1.0]
    assert facts["weights_sha256"] == hub.load(folder).sha256


def test_pushed_model_is_pulled_and_loads_by_name(folder: Path, tmp_path: Path, home: Path) -> None:
    pushed = hub.push_dir(folder, tmp_path / "share")
    assert pushed == tmp_path / "share" / "tiny"
    assert hub.pull(tmp_path / "share", "tiny") == home / "tiny"
    assert hub.load("tiny").sha256 == hub.load(folder).sha256
    hub.save_model(folder, PLAN, some_weights(seed=2), CARD)
    hub.pull(folder, "tiny")
    assert hub.load("tiny").sha256 == hub.load(folder).sha256
    assert [path.name for path in home.iterdir()] == ["tiny"]


def test_damaged_model_is_neither_pushed_nor_pulled(folder: Path, tmp_path: Path, home: Path) -> None:
    (folder / "plan.json").write_text("{}")
    with pytest.raises(GenMedError):
        hub.push_dir(folder, tmp_path / "share")
    with pytest.raises(GenMedError):
        hub.pull(folder, "tiny")
    seal(folder)
    with pytest.raises(GenMedError):
        hub.pull(folder, "tiny")
    assert not (tmp_path / "share").exists() and not home.exists()


@pytest.mark.parametrize("name", ["../evil", "", ".hidden", "a/b", "/abs"])
def test_pull_refuses_names_that_are_paths(folder: Path, name: str) -> None:
    with pytest.raises(GenMedError, match="no model name"):
        hub.pull(folder, name)


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"some/where/{file.name}")
        archive.writestr("../../escaped.txt", "a path out of the archive")
    return path


def tarred(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname="tiny")
        escape = tarfile.TarInfo("../../escaped.txt")
        archive.addfile(escape, io.BytesIO())
    return path


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_archives_are_pulled_without_writing_their_paths(
    folder: Path, tmp_path: Path, home: Path, pack: Callable[[Path, Path], Path]
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    archive = pack(folder, tmp_path / "a" / "b" / "model.bin")
    hub.pull(archive, "tiny")
    assert hub.load("tiny").sha256 == hub.load(folder).sha256
    assert not list(tmp_path.rglob("escaped.txt"))
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(GenMedError) as error:
        hub.pull(archive, "cut")
    assert one_line(error) and not (home / "cut").exists()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_address_needs_the_right_hash(folder: Path, tmp_path: Path, home: Path, server: str) -> None:
    archive = zipped(folder, tmp_path / "model.zip")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    for address in (f"{server}/model.zip", archive.as_uri()):
        with pytest.raises(GenMedError, match="SHA-256"):
            hub.pull(address, "tiny")
        with pytest.raises(GenMedError, match="SHA-256"):
            hub.pull(address, "tiny", sha256="0" * 64)
        assert not home.exists() or not list(home.iterdir())
        hub.pull(address, "tiny", sha256=digest)
        hub.pull(f"{address}#sha256={digest}", "again")
        assert hub.load("tiny").sha256 == hub.load("again").sha256 == hub.load(folder).sha256
        for name in ("tiny", "again"):
            for file in (home / name).iterdir():
                file.unlink()
            (home / name).rmdir()
    with pytest.raises(GenMedError, match="404"):
        hub.pull(f"{server}/absent.zip", "tiny", sha256=digest)
