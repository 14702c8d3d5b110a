"""Model folders: load, save, list, pull and push models without ever executing code from them.

A model folder holds `weights.safetensors` (half precision; or shards of it), `plan.json`, `card.md` and `SHA256SUMS`
over them. Bundled models are folders of this package; pulled ones lie in `$GENMED_HOME/models`, by default
`~/.cache/genmed/models`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from genmed.errors import GenMedError
from genmed.files import sha256_of, write_bytes
from genmed.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from genmed.denoiser import Denoiser
    from genmed.shape_model import ShapeModel

WEIGHTS, PLAN, CARD, SUMS = "weights.safetensors", "plan.json", "card.md", "SHA256SUMS"
CODE_LICENCE = "Apache-2.0"
BUNDLED = Path(__file__).parent / "models"


@dataclass
class Model:
    """A trained model: its plan, its denoiser (evaluation mode, frozen weights) and where it came from."""

    plan: Plan
    denoiser: Denoiser
    folder: Path | None
    sha256: str  # of weights.safetensors


@dataclass(frozen=True)
class Card:
    """What a user must know before trusting a model; the front matter of `card.md` and the text below it."""

    name: str
    licence: str  # of the weights
    training_data: str
    minutes: float | None = None  # of training
    hardware: str = ""
    command: str = ""  # that gives the scores
    scores: Mapping[str, float] = field(default_factory=dict)
    text: str = ""

    def to_markdown(self) -> str:
        """Front matter between `---` lines, then the text."""
        entries = {key: getattr(self, key) for key in _CARD_LINES}
        lines = [f"{key}: {_quoted(value)}" for key, value in entries.items() if value]
        if self.minutes is not None:
            lines.append(f"minutes: {self.minutes:g}")
        if self.scores:
            lines += ["scores:", *(f"  {name}: {value:g}" for name, value in self.scores.items())]
        return "\n".join(["---", *lines, "---", "", self.text.strip(), ""])

    @classmethod
    def from_markdown(cls, source: str) -> Card:
        """Read back `to_markdown`. Unknown keys are ignored. Raises `GenMedError` naming the line."""
        parts = re.fullmatch(r"---\r?\n(.*?)\r?\n---\r?\n?(.*)", source, re.DOTALL)
        if not parts:
            raise GenMedError("the card must start with front matter between two lines of '---'.")
        entries: dict[str, str] = {}
        scores: dict[str, float] = {}
        for line in parts[1].splitlines():
            key, colon, value = line.rpartition(": ") if line.startswith(" ") else line.partition(":")
            if not colon:
                raise GenMedError(f"the front matter has a line that is not 'key: value': {line!r}.")
            if line.startswith(" "):
                scores[key.strip()] = _number(key.strip(), value)
            else:
                entries[key.strip()] = _unquoted(value.strip())
        missing = [key for key in ("name", "licence", "training_data") if not entries.get(key)]
        if missing:
            raise GenMedError(f"the card's front matter lacks '{missing[0]}'; add it.")
        return cls(
            **{key: entries[key] for key in _CARD_LINES if key in entries},
            minutes=_number("minutes", entries["minutes"]) if "minutes" in entries else None,
            scores=scores,
            text=parts[2].strip(),
        )


_CARD_LINES = ("name", "licence", "training_data", "hardware", "command")


def _quoted(value: str) -> str:
    value = " ".join(value.split())
    return json.dumps(value, ensure_ascii=False) if re.search(r": | #|^[^\w./(]|:$", value) else value


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError as error:
        raise GenMedError(f"the card's front matter has an open quote: {value}.") from error


def _number(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise GenMedError(f"the card's '{key}' must be a number, but is {value!r}.") from None


# Where models are -----------------------------------------------------------------------------------------


def home() -> Path:
    """Folder of pulled models: `$GENMED_HOME/models`, by default `~/.cache/genmed/models`."""
    chosen = os.environ.get("GENMED_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache" / "genmed") / "models"


def bundled() -> dict[str, Path]:
    """Models that ship with the package, name -> folder."""
    return _model_folders(BUNDLED)


def known() -> dict[str, Path]:
    """All models that `load` finds by name, bundled and pulled. A pulled one never hides a bundled one."""
    return _model_folders(home()) | bundled()


def _model_folders(parent: Path) -> dict[str, Path]:
    if not parent.is_dir():
        return {}
    return {path.name: path for path in sorted(parent.iterdir()) if (path / SUMS).is_file()}


def find(name_or_dir: str | Path) -> Path:
    """Folder of a model given by name or by path. A name wins; write `./NAME` for a folder of that name."""
    names = known()
    if isinstance(name_or_dir, str) and name_or_dir in names:
        return names[name_or_dir]
    folder = Path(name_or_dir)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise GenMedError(f"{folder}: is a file; give the model's folder or its name.")
    choice = ", ".join(sorted(names)) or "none"
    raise GenMedError(f"{name_or_dir}: no such model or folder; known models: {choice}.")


# Load and save --------------------------------------------------------------------------------------------


def load(name_or_dir: str | Path) -> Model:
    """Load a model by name (bundled or pulled) or from a folder, on the CPU, ready for inference.

    Hashes are verified before anything is parsed, and only safetensors and JSON are parsed.
    Raises `GenMedError` for an unknown name, missing files, altered or corrupt files, and weights that do not
    fit the plan.
    """
    folder = find(name_or_dir)
    return _model(read_folder(folder), str(folder), folder)


def parsed(files: Mapping[str, bytes], where: str, folder: Path | None) -> Model | ShapeModel:
    """The model in the files of a folder that were verified, of whatever kind."""
    from genmed.shape_model import parse_shapes

    return parse_shapes(files, where, folder) if is_shapes(files) else _model(files, where, folder)


def save_model(
    folder: str | Path, plan: Plan, state_dict: Mapping[str, Tensor], card: Card, half: bool = True
) -> Path:
    """Write a model folder: weights (half precision unless `half=False`), plan, card and checksums.

    Other files in the folder stay. A tensor that half precision cannot hold keeps its precision.
    """
    import torch
    from safetensors.torch import save

    tensors = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        if not torch.isfinite(tensor).all():
            raise GenMedError(f"{folder}: not saved, since weight '{name}' is not finite; train again.")
        if half and tensor.is_floating_point():
            halved = tensor.half()
            tensor = halved if torch.isfinite(halved).all() else tensor
        tensors[name] = tensor
    files = {WEIGHTS: save(tensors), PLAN: plan.to_json().encode(), CARD: card.to_markdown().encode()}
    return write_folder(Path(folder), files)


def replace_card(folder: str | Path, card: Card) -> Path:
    """Give a model folder another card, for instance one with scores, and renew its checksums."""
    folder = Path(folder)
    return write_folder(folder, read_folder(folder) | {CARD: card.to_markdown().encode()})


def read_card(folder: str | Path) -> Card:
    """The card of a model folder, verified first."""
    folder = Path(folder)
    return _card(read_folder(folder), str(folder))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write weights, plan and card and, last, their checksums."""
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in files)
    for name in files:
        write_bytes(folder / name, files[name])
    write_bytes(folder / SUMS, sums.encode())
    return folder


def shard(number: int, count: int) -> str:
    """Name of one of several files of weights."""
    return f"weights-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else WEIGHTS


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, verified."""
    return _verified(_files_in(folder), str(folder))


def _is_weights(name: str) -> bool:
    return bool(re.fullmatch(r"weights(-\d{5}-of-\d{5})?\.safetensors", name))


def _is_ours(name: str) -> bool:
    return name in (PLAN, CARD, SUMS) or _is_weights(name)


def _files_in(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if _is_ours(path.name) and path.is_file()}


def _verified(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """Weights, plan and card, if their SHA-256 is the one stated. `where` names the folder or archive in errors."""
    lines = files.get(SUMS, b"").decode("utf-8", "replace").splitlines()
    stated = {name.strip().lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    names = (*(sorted(filter(_is_weights, stated)) or [WEIGHTS]), PLAN, CARD)
    absent = [name for name in (*names, SUMS) if name not in files]
    if absent:
        raise GenMedError(f"{where}: lacks {', '.join(absent)}; give a complete model folder.")
    for name in names:
        if stated.get(name) != hashlib.sha256(files[name]).hexdigest():
            raise GenMedError(
                f"{where}/{name}: corrupt or altered (not what {SUMS} says); get the model again."
            )
    return {name: files[name] for name in names}


def is_shapes(files: Mapping[str, bytes]) -> bool:
    """Whether the plan is one of `genmed.shape_model`."""
    try:
        plan = json.loads(files[PLAN])
    except ValueError:
        return False
    return isinstance(plan, dict) and plan.get("kind") == "shapes"


def _card(files: Mapping[str, bytes], where: str) -> Card:
    try:
        return Card.from_markdown(files[CARD].decode("utf-8", "replace"))
    except GenMedError as error:
        raise GenMedError(f"{where}/{CARD}: {error}") from error


def _plan(files: Mapping[str, bytes], where: str) -> Plan:
    text = files[PLAN].decode("utf-8", "replace").strip()
    if not text.startswith("{"):
        raise GenMedError(f"{where}/{PLAN}: is not a JSON object; get the model again.")
    try:
        return Plan.from_json(text)
    except GenMedError as error:
        raise GenMedError(f"{where}/{PLAN}: {error}") from error


def _model(files: Mapping[str, bytes], where: str, folder: Path | None) -> Model:
    from genmed.denoiser import build

    if is_shapes(files):
        raise GenMedError(f"{where}: is a model of shapes; use it with `genmed complete` or `genmed generate`.")
    plan = _plan(files, where)
    try:
        denoiser = build(plan)
    except ValueError as error:
        raise GenMedError(f"{where}/{PLAN}: describes no network that can be built ({error}).") from error
    _fill(denoiser, files[WEIGHTS], f"{where}/{WEIGHTS}")
    digest = hashlib.sha256(files[WEIGHTS]).hexdigest()
    return Model(plan, denoiser.eval().requires_grad_(False), folder, digest)


def _fill(denoiser: Denoiser, weights: bytes, where: str) -> None:
    fill(denoiser, parse_weights(weights, where), where)


def parse_weights(weights: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of safetensors bytes. Raises `GenMedError` for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        return parse(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise GenMedError(f"{where}: is not a safetensors file ({error}); get the model again.") from error


def fill(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors into a network. Raises `GenMedError` unless names and shapes agree exactly."""
    import torch

    expected = network.state_dict()
    differ = sorted(set(expected) ^ set(tensors))
    if differ:
        state = "lacks" if differ[0] in expected else "has an unknown"
        raise GenMedError(f"{where}: {state} tensor '{differ[0]}', unlike {PLAN}; get the model again.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise GenMedError(
                f"{where}: tensor '{name}' has shape {list(tensor.shape)}, but plan.json asks for "
                f"{list(expected[name].shape)}; get the model again."
            )
        if not torch.isfinite(tensor).all():
            raise GenMedError(f"{where}: tensor '{name}' is not finite; get the model again.")
    network.load_state_dict(dict(tensors))  # into float32 parameters


# List, pull, push -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of `genmed models list`."""

    name: str
    origin: str  # "bundled" or "pulled"
    labels: tuple[str, ...]
    weights_licence: str
    code_licence: str
    megabytes: float
    dice: float | None
    problem: str = ""  # why the model cannot be used


def list_models() -> list[Row]:
    """All known models. A damaged one is listed with its problem."""
    ours = bundled()
    return [
        _row(name, folder, "bundled" if name in ours else "pulled")
        for name, folder in sorted(known().items())
    ]


def _row(name: str, folder: Path, origin: str) -> Row:
    try:
        files = read_folder(folder)
        card = _card(files, str(folder))
        shapes = is_shapes(files)
        names = tuple(json.loads(files[PLAN]).get("categories", ())) if shapes else _plan(files, str(folder)).labels[1:]
    except GenMedError as error:
        return Row(name, origin, (), "", CODE_LICENCE, 0.0, None, str(error))
    size = sum(len(content) for content in files.values()) / 1e6
    return Row(name, origin, names, card.licence, CODE_LICENCE, size, card.scores.get("dice"))


def weights_sha256(files: Mapping[str, bytes]) -> str:
    """What names the weights in the files of a folder: the hash of their only file, or of all shards in a row."""
    digest = hashlib.sha256()
    for name in sorted(filter(_is_weights, files)):
        digest.update(files[name])
    return digest.hexdigest()


def info(name_or_dir: str | Path) -> dict[str, Any]:
    """What a model folder says of itself, ready for JSON: folder, size, weights hash, card and plan."""
    folder = find(name_or_dir)
    files = read_folder(folder)
    card = _card(files, str(folder))
    return {
        "folder": str(folder),
        "megabytes": round(sum(len(content) for content in files.values()) / 1e6, 2),
        "weights_sha256": weights_sha256(files),
        "code_licence": CODE_LICENCE,
        "card": asdict(card),
        "plan": json.loads(files[PLAN] if is_shapes(files) else _plan(files, str(folder)).to_json()),
    }


def push_dir(model: str | Path, folder: str | Path) -> Path:
    """Copy a model, verified, into `folder/NAME`, for instance on a shared disk, where `pull` finds it."""
    source = find(model)
    files = read_folder(source)
    parsed(files, str(source), source)
    name = source.name if source.name in known() else _checked_name(_card(files, str(source)).name)
    return write_folder(Path(folder) / name, files)


def pull(source: str | Path, name: str, sha256: str | None = None) -> Path:
    """Copy a model to `home()`, so that `load(name)` finds it. Nothing is kept unless it loads.

    Args:
        source: a model folder, a folder of model folders, a .zip/.tar(.gz) file, or the address
            (https, http or file) of such a file.
        name: what the model is to be called here.
        sha256: of the archive; needed for an address. It may also end the address as `#sha256=…`.
    """
    target = home() / _checked_name(name)
    if name in bundled():
        raise GenMedError(f"{name}: is the name of a bundled model; choose another name.")
    files, where = _gather(str(source), name, sha256)
    files = _verified(files, where)
    parsed(files, where, None)
    _card(files, where)
    return _place(target, files)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise GenMedError(f"{name!r}: is no model name; use letters, digits, '-', '_' and '.'.")
    return name


def _place(target: Path, files: Mapping[str, bytes]) -> Path:
    """Put a whole model folder in place by renaming; an older one of the same name is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
        write_folder(Path(scratch) / "new", files)
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(Path(scratch) / "new", target)
    return target


def _gather(source: str, name: str, sha256: str | None) -> tuple[dict[str, bytes], str]:
    """The bytes of a model's four files at a source, and the words that name the source in errors."""
    if urlsplit(source).scheme in ("http", "https", "file"):
        return _download(source, sha256)
    path = Path(source)
    if path.is_file():
        return _unpacked(path, source, sha256), source
    folder = path / name if (path / name / SUMS).is_file() else path
    if not folder.is_dir():
        raise GenMedError(
            f"{source}: no such folder or file; give a model folder, an archive or its address."
        )
    return _files_in(folder), str(folder)


def _download(address: str, sha256: str | None) -> tuple[dict[str, bytes], str]:
    from genmed.data.fetch import download

    address, _, pinned = address.partition("#sha256=")
    sha256 = sha256 or pinned
    if not sha256:
        raise GenMedError(
            f"{address}: give the archive's SHA-256 too (--sha256); unverified models are refused."
        )
    with tempfile.TemporaryDirectory(prefix="genmed-pull-") as scratch:
        archive = Path(scratch) / "model"
        download(address, archive)
        return _unpacked(archive, address, sha256), address


def _unpacked(archive: Path, where: str, sha256: str | None) -> dict[str, bytes]:
    """The model files inside a zip or tar archive, read into memory: no path in it is ever written to."""
    if sha256 and sha256_of(archive) != sha256.lower():
        raise GenMedError(f"{where}: does not have the SHA-256 given; check the source and the hash.")
    files: dict[str, bytes] = {}
    try:
        for path, content in _members(archive):
            if files.setdefault(Path(path).name, content) is not content:
                raise GenMedError(f"{where}: holds several models; give an archive of one.")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise GenMedError(f"{where}: is not a whole .zip or .tar archive; get it again.") from error
    return files


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for path in zipped.namelist():
                if _is_ours(Path(path).name):
                    yield path, zipped.read(path)
        return
    with tarfile.open(archive) as tarred:
        for member in tarred:
            stream = tarred.extractfile(member) if _is_ours(Path(member.name).name) else None
            if stream:
                yield member.name, stream.read()
