"""`ShapeModel`: the joint of shape, size and text, and its model folder.

    model = load_shapes("shapes")
    z = model.fields.join({"shape": codes, "size": size, "text": text})

`shape` are the codes of the linear autoencoder, `size` the standardised logarithm of the cube's voxel in mm, `text`
a whitened projection of the sentence embedding. All lie along the channels of (b, c, 1, 1, 1). Size and text have unit
variance. Codes keep the spectrum of shapes, so that noise hides details before it hides what the shape is; their
deviations are the denoiser's `sigma_data`, that of the first is `FIRST`. The denoiser starts from a mixture of one
Gaussian for every category and side, and one of all shapes. `decode` turns codes into distances, at the end of a
trajectory: the autoencoder's, sharpened by the `refiner`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from genmed import hub
from genmed.denoiser import Denoiser
from genmed.errors import GenMedError
from genmed.fields import Field, Fields
from genmed.nets.autoencoder import LinearAutoencoder, from_bytes, to_bytes
from genmed.nets.mixture import Mixture
from genmed.nets.mlp import MLP
from genmed.nets.refiner import Refiner

EMBEDDING = 384  # numbers of a sentence embedding
SHARD_BYTES = 11_500_000
MODES, MODES_SCALE = "autoencoder.modes", "autoencoder.modes_scale"  # tensors of the model folder
FIRST = 10.0  # standard deviation of the first code
KNOWN_SIZE = 4.0  # standard deviations of log voxel_mm within which the model has an opinion


@dataclass(frozen=True)
class ShapePlan:
    """Everything besides the weights that a shape model needs; raises `GenMedError` naming the key.

    `categories` are what it was trained on, with the sides there were; sizes are of ln(voxel_mm).
    """

    name: str
    categories: dict[str, tuple[str, ...]]
    size: int                # voxels along the cubes' sides, of which distances are multiples
    side: int                # of the autoencoder's modes
    modes: int
    text_channels: int
    width: int
    blocks: int
    size_mean: float
    size_deviation: float
    components: int = 1      # of the mixture of Gaussians that the denoiser starts from
    rank: int = 1            # of their covariances
    refiner: int = 4         # width of the network that sharpens decoded shapes
    batch: int = 128
    steps: int = 20_000
    learning_rate: float = 1e-3
    sigma_min: float = 0.02
    sigma_max: float = 40.0
    licence: str = ""
    source: str = ""
    seed: int = 0
    kind: str = "shapes"
    format_version: int = 1

    def __post_init__(self) -> None:
        counts = (
            "size", "side", "modes", "text_channels", "width", "blocks", "components", "rank", "refiner", "batch",
            "steps",
        )  # fmt: skip
        for key in counts:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GenMedError(f"plan key '{key}' must be a positive integer, but is {value!r}.")
        if self.refiner % 4:
            raise GenMedError(f"plan key 'refiner' must be a multiple of 4, but is {self.refiner}.")
        for key in ("size_mean", "size_deviation", "learning_rate", "sigma_min", "sigma_max"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise GenMedError(f"plan key '{key}' must be a number, but is {value!r}.")
        if not 0 < self.sigma_min < self.sigma_max or self.size_deviation <= 0:
            raise GenMedError("plan keys 'sigma_min', 'sigma_max', 'size_deviation': must be above 0, and in order.")
        if not self.name or not self.categories or self.kind != "shapes" or self.format_version != 1:
            raise GenMedError("the plan is not one of shapes for this GenMed; get the model again.")

    def to_json(self) -> str:
        """JSON text, readable back by `from_json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ShapePlan:
        """Read JSON text. Raises `GenMedError` for what is no plan of shapes."""
        try:
            entries = json.loads(text)
            known = {field.name: field for field in fields(cls)}
            wrong = sorted(set(entries) - set(known))
            missing = sorted(n for n, f in known.items() if f.default is MISSING and n not in entries)
            if wrong or missing:
                raise ValueError(f"'{(wrong or missing)[0]}' is {'unknown' if wrong else 'missing'}")
            entries["categories"] = {name: tuple(sides) for name, sides in entries["categories"].items()}
            return cls(**entries)
        except (ValueError, TypeError, AttributeError) as error:
            raise GenMedError(f"the plan of shapes is not valid ({error}); get the model again.") from error


@dataclass(frozen=True, eq=False)
class ShapeModel:
    """A trained model of shapes, frozen, in evaluation mode."""

    plan: ShapePlan
    denoiser: Denoiser
    autoencoder: LinearAutoencoder
    projection: nn.Linear  # sentence embedding -> text channels
    refiner: Refiner
    folder: Path | None = None
    sha256: str = ""  # of all weights

    @property
    def fields(self) -> Fields:
        return self.denoiser.fields

    @property
    def mixture(self) -> Mixture:
        """What the denoiser starts from."""
        assert self.denoiser.prior is not None
        return self.denoiser.prior

    @property
    def words(self) -> Float[Tensor, "m d"]:
        """Values of the field `text` in the middle of every Gaussian's captions; the last is that of all shapes."""
        return self.mixture.mean[:, -self.plan.text_channels :]

    def decode(
        self, codes: Float[Tensor, "b k"], words: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b 1 n n n"]:
        """Sharp distances in the whole cube from the field `shape`, and from `text` where it is known (NaN: not)."""
        words = torch.zeros(len(codes), self.plan.text_channels) if words is None else words.nan_to_num(0.0)
        return self.refiner(self.autoencoder.decode(codes), words, self.plan.size)

    def scaled(self, codes: Float[Tensor, "b k"], words: Float[Tensor, "b d"], sigma: float) -> list[bool]:
        """Whether shapes have a size in mm: those of the Gaussian that they are likeliest of had one in training.

        `words` are values of the field `text` (NaN: none), `sigma` is the noise level of the comparison. Gaussians of
        shapes without a scale have size 0 with variance 2 (`genmed.train_shapes.fit_mixture`).
        """
        z = torch.cat([codes, torch.zeros(len(codes), 1), words.nan_to_num(0.0)], dim=1)
        hidden = torch.cat([torch.zeros_like(codes), torch.ones(len(codes), 1), words.isnan().float()], dim=1)
        number = self.mixture.likeliest(z, torch.full_like(z, sigma), hidden)
        known = (self.mixture.mean[:, self.plan.modes] != 0) | (self.mixture.variance[:, 0] < 2)
        return [bool(known[i]) for i in number]

    def size_of(self, log_voxel_mm: Tensor) -> Tensor:
        """Values of the field `size`."""
        return (log_voxel_mm - self.plan.size_mean) / self.plan.size_deviation

    def log_voxel_mm(self, size: Tensor) -> Tensor:
        """Inverse of `size_of`."""
        return size * self.plan.size_deviation + self.plan.size_mean

    def text_of(self, embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b d"]:
        """Values of the field `text`."""
        return self.projection(embedding)

    @property
    def modules(self) -> nn.ModuleDict:
        """All that is stored."""
        return nn.ModuleDict(
            {
                "denoiser": self.denoiser, "autoencoder": self.autoencoder, "projection": self.projection,
                "refiner": self.refiner,
            }
        )  # fmt: skip


def shape_fields(modes: int, text_channels: int) -> Fields:
    """The joint of a shape's codes, its size and its caption."""

    def channels(name: str, count: int) -> tuple[str, ...]:
        return tuple(f"{name}{i}" for i in range(count))

    return Fields(
        Field("shape", "continuous", channels("code", modes)),
        Field("size", "continuous", ("log voxel_mm",)),
        Field("text", "continuous", channels("text", text_channels)),
    )


def build_shapes_model(plan: ShapePlan) -> ShapeModel:
    """The untrained model that a plan describes."""
    joint = shape_fields(plan.modes, plan.text_channels)
    net = MLP(2 * joint.channels + len(joint), joint.channels, plan.width, plan.blocks, conditions=len(joint))
    prior = Mixture(plan.components, plan.rank, plan.modes, 1 + plan.text_channels)
    autoencoder = LinearAutoencoder(plan.side, plan.modes)
    denoiser = Denoiser(joint, net, plan.sigma_max, torch.ones(joint.channels), prior)
    projection, refiner = nn.Linear(EMBEDDING, plan.text_channels), Refiner(plan.refiner, plan.text_channels)
    return ShapeModel(plan, denoiser, autoencoder, projection, refiner)


# Folders --------------------------------------------------------------------------------------------------


def save_shapes(model: ShapeModel, folder: str | Path, card: hub.Card) -> Path:
    """Write a model folder: weights in shards of at most 12 MB, plan, card and checksums.

    Weights are stored in half precision, the autoencoder's modes in bytes, to which `principal_components` rounds them.
    """
    from safetensors.torch import save

    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    tensors = model.modules.state_dict()
    tensors[MODES], tensors[MODES_SCALE] = to_bytes(tensors[MODES])
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise GenMedError(f"{folder}: not saved, since weight '{name}' is not finite; train again.")
        for number, piece in enumerate(_pieces(tensor.detach().cpu())):
            size = piece.numel() * piece.element_size()
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1][f"{name}/{number}"] = piece.contiguous()
            room -= size
    files = {hub.shard(i, len(shards)): save(tensors) for i, tensors in enumerate(shards)}
    return hub.write_folder(
        Path(folder), files | {hub.PLAN: model.plan.to_json().encode(), hub.CARD: card.to_markdown().encode()}
    )


def _pieces(tensor: Tensor) -> list[Tensor]:
    """Rows of large tensors apart, matrices in half precision where it holds the values."""
    if tensor.ndim < 2:
        return [tensor]
    halved = tensor.half()
    tensor = halved if tensor.is_floating_point() and torch.isfinite(halved).all() else tensor
    rows = max(1, SHARD_BYTES // 4 // (tensor[0].numel() * tensor.element_size()))
    return list(tensor.split(rows))


def load(name_or_dir: str | Path) -> hub.Model | ShapeModel:
    """Load any model by name or from a folder; `genmed.hub.load` says what is checked."""
    folder = hub.find(name_or_dir)
    return hub.parsed(hub.read_folder(folder), str(folder), folder)


def load_shapes(name_or_dir: str | Path) -> ShapeModel:
    """Load a model of shapes by name or from a folder, on the CPU, ready for inference.

    Raises `GenMedError` as `genmed.hub.load` does, and for a model of images.
    """
    folder = hub.find(name_or_dir)
    return parse_shapes(hub.read_folder(folder), str(folder), folder)


def parse_shapes(files: Mapping[str, bytes], where: str, folder: Path | None) -> ShapeModel:
    """The model in the files of a folder that were verified."""
    if not hub.is_shapes(files):
        raise GenMedError(f"{where}: is a model of images, not of shapes; use it with `genmed segment`.")
    try:
        plan = ShapePlan.from_json(files[hub.PLAN].decode("utf-8", "replace"))
    except GenMedError as error:
        raise GenMedError(f"{where}/{hub.PLAN}: {error}") from error
    model = build_shapes_model(plan)
    _fill(model.modules, files, where)
    model.modules.eval().requires_grad_(False)
    sha256 = hub.weights_sha256(files)
    return dataclasses.replace(model, folder=folder, sha256=sha256)


def _fill(modules: nn.Module, files: Mapping[str, bytes], where: str) -> None:
    pieces: dict[str, dict[int, Tensor]] = {}
    for name in sorted(files):
        if name.endswith(".safetensors"):
            for key, tensor in hub.parse_weights(files[name], f"{where}/{name}").items():
                whole, _, number = key.rpartition("/")
                pieces.setdefault(whole, {})[int(number) if number.isdigit() else 0] = tensor
    tensors = {}
    for name, parts in pieces.items():
        ordered = [parts[i] for i in sorted(parts)]
        tensors[name] = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
    if MODES_SCALE in tensors and len(tensors[MODES_SCALE]) == len(tensors.get(MODES, ())):
        tensors[MODES] = from_bytes(tensors[MODES], tensors.pop(MODES_SCALE))
    hub.fill(modules, tensors, where)

