"""Training of the shape model: the autoencoder, a bank of codes with deformed copies, and the joint's loss.

A step is a function of its number, as in `genmed.train`, whose loop this uses.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from genmed.data.augment import bending, rotation, uniform
from genmed.data.shapes import ShapeDataset, ShapeRow, read_shapes
from genmed.denoiser import Denoiser
from genmed.errors import GenMedError
from genmed.hub import Card
from genmed.loss import LOG_SIGMA
from genmed.nets.autoencoder import LinearAutoencoder, lower, principal_components
from genmed.nets.mixture import Mixture
from genmed.nets.refiner import Refiner
from genmed.shape import decode
from genmed.shape_model import FIRST, ShapeModel, ShapePlan, build_shapes_model, save_shapes
from genmed.train import fit, wall_minutes

MIXTURE = {"equal": 0.25, "independent": 0.15, "text": 0.3, "no text": 0.2, "retrieval": 0.1}
VERSIONS = 12       # codes of every shape: itself and deformed copies
COPIES = 2          # of them that the autoencoder is fitted to
MIXED = 0.2         # probability that two shapes of a category are mixed
BEND = 0.6          # of the largest deformation that does not fold
TURN = 0.15         # radians, about every axis
STEPS = 20_000
RANK = 72           # of the covariance of a category
ANYTHING = 0.02     # weight of the Gaussian of all shapes
SIZE_FLOOR, TEXT_FLOOR = 0.02, 0.05  # added to variances, for shapes and words that training did not see
SIDE, MODES, TEXT_CHANNELS, WIDTH, BLOCKS, REFINER = 32, 440, 64, 320, 4, 16
WHOLE = 4           # shapes a step that the refiner learns from
WHOLE_SIGMA = (0.02, 2.0)  # noise in their codes, which the mixture takes away as well as it can
NEAR = 4.0          # voxels from either surface in which their distances count
SILENT = 0.3        # probability that the refiner is not told what a shape is
OTHER_SIDE = {"left": "right", "right": "left"}


class ShapeBatch(NamedTuple):
    """What one training step sees. A size of NaN is not known; `seed` decides every random number.

    `whole` are distances of some other shapes, with their codes and text.
    """

    codes: Float[Tensor, "b k"]
    size: Float[Tensor, " b"]
    text: Float[Tensor, "b d"]
    whole: Float[Tensor, "w 1 n n n"]
    whole_codes: Float[Tensor, "w k"]
    whole_text: Float[Tensor, "w d"]
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Bank:
    """Training shapes as numbers: codes of every version, sizes, captions, and how often each shape is drawn."""

    codes: Float[Tensor, "n v k"]
    size: Float[Tensor, " n"]
    text: Float[Tensor, "t d"]
    captions: tuple[tuple[int, ...], ...]  # rows of `text` by shape
    group: tuple[tuple[int, ...], ...]     # shapes of the same category and side, by shape
    weights: Float[Tensor, " n"]
    whole: Callable[[int], Float[Tensor, "1 n n n"]]  # distances of a shape, all voxels of the cube


# Data -----------------------------------------------------------------------------------------------------


def category_weights(categories: Sequence[str]) -> Float[Tensor, " n"]:
    """1 / √(shapes of the category): large data sets do not drown small ones. They sum to 1."""
    counts = Counter(categories)
    weights = torch.tensor([counts[category] ** -0.5 for category in categories])
    return weights / weights.sum()


class Training(NamedTuple):
    """Shapes of the training part and, of every left or right one, its mirror image, which is one of the other side."""

    rows: list[ShapeRow]
    x: Float[Tensor, "n 1 m m m"]
    weights: Float[Tensor, " n"]


def training_shapes(data: ShapeDataset, side: int) -> Training:
    """The training part, averaged to `side` voxels a side; mirror images share the weight of their shapes."""
    numbers = data.part("train")
    rows = [data.rows[i] for i in numbers]
    x, weights = lowered(data, numbers, side), category_weights([row.category for row in rows])
    pairs = [k for k, row in enumerate(rows) if row.side in OTHER_SIDE]
    weights[pairs] /= 2
    return Training(
        rows + [_mirrored(rows[k]) for k in pairs],
        torch.cat([x, x[pairs].flip(2)]),
        torch.cat([weights, weights[pairs]]),
    )


def _mirrored(row: ShapeRow) -> ShapeRow:
    """The facts of a mirror image, about the middle of its cube."""
    side = OTHER_SIDE[row.side]
    captions = tuple(c.replace(f"{row.side} {row.category}", f"{side} {row.category}") for c in row.captions)
    return dataclasses.replace(row, side=side, captions=captions)


def lowered(data: ShapeDataset, numbers: Sequence[int], side: int) -> Float[Tensor, "n 1 m m m"]:
    """Distances of shapes, averaged to `side` voxels a side."""
    return torch.cat([lower(torch.from_numpy(decode(np.array(data.stored(i))))[None, None], side) for i in numbers])


def deformed(x: Float[Tensor, "1 n n n"], generator: Generator) -> Float[Tensor, "1 n n n"]:
    """A smoothly bent and slightly turned copy of a shape's distances."""
    n = x.shape[-1]
    axis = torch.arange(n) - (n - 1) / 2
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    turn = rotation({a: uniform(-TURN, TURN, generator) for a in range(3)})
    shift = BEND * bending((n, n, n), False, generator)
    grid = ((place + shift) @ turn.T * 2 / n).flip(-1)
    return F.grid_sample(x[None], grid[None], padding_mode="border", align_corners=False)[0]


def versions(x: Float[Tensor, "n 1 m m m"], number: int, seed: int) -> Float[Tensor, "n 1 m m m"]:
    """The shapes themselves (number 0) or their deformed copies of this number."""
    if number == 0:
        return x
    generators = (Generator().manual_seed((seed * 1009 + number) * 1_000_003 + i) for i in range(len(x)))
    return torch.stack([deformed(shape, generator) for shape, generator in zip(x, generators, strict=True)])


def fit_autoencoder(x: Float[Tensor, "n 1 m m m"], weights: Tensor, modes: int, seed: int) -> LinearAutoencoder:
    """Principal components of the shapes and some deformed copies, which count for half."""
    rows = torch.cat([versions(x, number, seed).flatten(1) for number in range(COPIES + 1)])
    halves = torch.cat([weights, *[weights / (2 * COPIES)] * COPIES])
    return principal_components(rows, halves, modes, seed)


def whitening(embeddings: Float[Tensor, "t e"], weights: Tensor, channels: int) -> nn.Linear:
    """Projection to principal components of unit variance, those that hardly vary left as zero."""
    weights = weights / weights.sum()
    mean = weights @ embeddings
    centred = (embeddings - mean).double()
    values, axes = torch.linalg.eigh(centred.T @ (weights.double()[:, None] * centred))
    values, axes = values.flip(0)[:channels], axes.flip(1)[:, :channels]
    scale = torch.where(values > (1e-4 * values[0]).clamp(min=1e-8), values.clamp(min=1e-12).rsqrt(), 0.0)
    linear = nn.Linear(embeddings.shape[1], channels).requires_grad_(False)
    linear.weight.copy_((axes * scale).T)
    linear.bias.copy_(-linear.weight @ mean)
    return linear


def _embedded(captions: Sequence[str], folder: Path) -> Float[Tensor, "t e"]:
    """Embeddings of captions, kept in the folder for the next run."""
    import hashlib

    from safetensors.torch import load_file, save_file

    from genmed.text import embed

    key = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16]
    path = folder / f"captions-{key}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"embeddings": embed(captions)}, part)
        part.replace(path)
    return load_file(path)["embeddings"]


# Loss -----------------------------------------------------------------------------------------------------


def draw_batch(bank: Bank, size: int, step: int, seed: int, process: int = 0) -> ShapeBatch:
    """The shapes, copies, mixtures and captions of one training step."""
    seed = ((seed * 1_000_003 + step) * 1_009 + process) % 2**62
    generator = Generator().manual_seed(seed)
    chosen = torch.multinomial(bank.weights, size, replacement=True, generator=generator).tolist()
    rows = [_mixed(bank, i, generator) for i in chosen]
    captions = [bank.captions[i][_integer(len(bank.captions[i]), generator)] for i in chosen]
    codes, sizes = (torch.stack(part) for part in zip(*rows, strict=True))
    whole = torch.multinomial(bank.weights, WHOLE, replacement=True, generator=generator).tolist()
    named = [bank.captions[i][_integer(len(bank.captions[i]), generator)] for i in whole]
    told = torch.rand(WHOLE, 1, generator=generator) >= SILENT
    return ShapeBatch(
        codes, sizes, bank.text[captions],
        torch.stack([bank.whole(i) for i in whole]), bank.codes[whole, 0], bank.text[named] * told, seed,
    )  # fmt: skip


def _mixed(bank: Bank, i: int, generator: Generator) -> tuple[Tensor, Tensor]:
    version = _integer(bank.codes.shape[1], generator)
    code, size = bank.codes[i, version], bank.size[i]
    if torch.rand((), generator=generator) < MIXED:
        other = bank.group[i][_integer(len(bank.group[i]), generator)]
        share = uniform(0.6, 1.0, generator)
        code = share * code + (1 - share) * bank.codes[other, version]
    return code, size


def _integer(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


class ShapeLoss(nn.Module):
    """Denoising loss of P(shape, size, text) under `MIXTURE`.

    *equal* levels; *independent* levels; *text* clean and shape and size noisy; *no text*: hidden, so that the model
    also knows shapes alone (classifier-free, arXiv 2207.12598); *retrieval*: shape clean and text noisy. A size that
    is not known is hidden and does not count. Squared errors, of shapes those of their distances, are relative to what
    the best estimate would leave if fields were Gaussian. The refiner learns beside it, from what the mixture of
    Gaussians makes of noisy codes.
    """

    def __init__(self, model: Denoiser, autoencoder: LinearAutoencoder, refiner: Refiner) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"denoiser": model, "refiner": refiner})
        self.decode = autoencoder.decode

    def forward(self, batch: ShapeBatch) -> dict[str, Tensor]:
        generator = Generator().manual_seed(batch.seed)
        losses = self.denoising(batch, generator) | {"whole": self.refining(batch, generator)}
        return {"loss": sum(losses.values(), torch.zeros(())), **losses}  # type: ignore[dict-item]

    def refining(self, batch: ShapeBatch, generator: Generator) -> Tensor:
        """Cross-entropy of being inside, and absolute error, of distances near either surface."""
        denoiser: Denoiser = self.model["denoiser"]  # type: ignore[assignment]
        codes, fields = batch.whole_codes, denoiser.fields
        low, high = (math.log(sigma) for sigma in WHOLE_SIGMA)
        sigma = torch.exp(low + (high - low) * torch.rand(len(codes), 1, generator=generator)).to(codes)
        hidden = torch.ones(len(codes), fields.channels).to(codes)
        hidden[:, fields.slice("shape")] = 0
        z = codes + sigma * torch.randn(codes.shape, generator=generator).to(codes)
        with torch.no_grad():
            assert denoiser.prior is not None
            z = F.pad(z, (0, fields.channels - codes.shape[1]))
            estimate = denoiser.prior(z, sigma.expand(-1, fields.channels), hidden)
            blurred = self.decode(estimate[:, fields.slice("shape")])
        truth = batch.whole
        found = self.model["refiner"](blurred, batch.whole_text, truth.shape[-1]).float()
        near = ((truth.abs() < NEAR) | (found.detach().abs() < NEAR)).float()
        inside = (0.5 - truth).clamp(0, 1)
        wrong = F.binary_cross_entropy_with_logits(-2 * found, inside, reduction="none")
        apart = (found.clamp(-NEAR, NEAR) - truth.clamp(-NEAR, NEAR)).abs()
        return ((wrong + 0.1 * apart) * near).sum() / near.sum()

    def denoising(self, batch: ShapeBatch, generator: Generator) -> dict[str, Tensor]:
        """Losses by field."""
        model: Denoiser = self.model["denoiser"]  # type: ignore[assignment]
        fields = model.fields
        unknown = batch.size.isnan()
        sigma = draw_sigma(len(batch.codes), model.sigma_max, generator).to(batch.codes)
        sigma[unknown, fields.index("size")] = model.sigma_max
        size = batch.size.nan_to_num(0.0)[:, None]
        z0 = torch.cat([batch.codes, size, batch.text], dim=1)[..., None, None, None]
        noise = torch.randn(z0.shape, generator=generator).to(z0)
        spread = fields.spread(sigma)[..., None, None, None]
        with torch.autocast(z0.device.type, enabled=False):  # a small network: nothing is gained by coarse numbers
            outputs = model.outputs(z0 + spread * noise, sigma)
        truth = fields.split(z0)
        losses = {}
        for name, weight in (("shape", 1.0), ("size", 0.2), ("text", 0.2)):
            level = sigma[:, fields.index(name), None].clamp(min=1e-3)
            scale = model.sigma_data[fields.slice(name)].flatten()
            counts = (sigma[:, fields.index(name)] > 0) & ~(unknown & (name == "size"))
            error = ((outputs[name] - truth[name]).flatten(1) ** 2).mean(1)
            of_gaussian = (level**2 * scale**2 / (level**2 + scale**2)).mean(1)
            losses[name] = weight * (error / of_gaussian * counts).mean()
        return losses


def draw_sigma(count: int, sigma_max: float, generator: Generator) -> Float[Tensor, "b 3"]:
    """Levels of shape, size and text of every sample."""
    edges = torch.tensor(list(MIXTURE.values())).cumsum(0)
    kinds = torch.searchsorted(edges, torch.rand(count, generator=generator)).clamp(max=len(edges) - 1)
    mean, deviation = LOG_SIGMA
    levels = torch.exp(mean + deviation * torch.randn(count, 3, generator=generator)).clamp(max=sigma_max)
    same = torch.rand(count, generator=generator) < 0.5
    sigma = levels.clone()
    for row, kind in enumerate(kinds.tolist()):
        name = list(MIXTURE)[kind]
        if name == "equal":
            sigma[row] = levels[row, 0]
        elif name in ("text", "no text"):
            sigma[row, 1] = levels[row, 0 if same[row] else 1]
            sigma[row, 2] = 0.0 if name == "text" else sigma_max
        elif name == "retrieval":
            sigma[row, 0], sigma[row, 1] = 0.0, 0.0 if same[row] else sigma_max
    return sigma


# The command ----------------------------------------------------------------------------------------------


def train_shapes(
    folder: str | Path,
    out: str | Path,
    *,
    max_minutes: float | None = None,
    resume: bool = False,
    steps: int = STEPS,
    seed: int = 0,
    modes: int = MODES,
    width: int = WIDTH,
    blocks: int = BLOCKS,
    refiner: int = REFINER,
    batch: int = 128,
    clock: Callable[[], float] = wall_minutes,
) -> Path:
    """Train the joint of shape, size and text on a folder of `genmed data build-shapes`; write a model folder.

    The minutes are those of the denoiser; autoencoder, deformed copies and captions come before. Raises
    `GenMedError` for folders that hold no shapes in their training part.
    """
    data, out = read_shapes(folder), Path(out)
    numbers = data.part("train")
    if len(numbers) < 2:
        raise GenMedError(f"{folder}: has {len(numbers)} shapes in its training part; at least 2 are needed.")
    torch.manual_seed(seed)
    sizes = {"modes": modes, "width": width, "blocks": blocks, "refiner": refiner, "batch": batch}
    model, bank = prepare(data, out, steps=steps, seed=seed, **sizes)
    average, minutes = fit(
        ShapeLoss(model.denoiser, model.autoencoder, model.refiner),
        lambda step, process: draw_batch(bank, model.plan.batch, step, seed, process),
        out,
        steps=steps,
        learning_rate=model.plan.learning_rate,
        max_minutes=max_minutes,
        resume=resume,
        clock=clock,
    )
    networks: nn.ModuleDict = average.cpu()  # type: ignore[assignment]
    trained = dataclasses.replace(model, denoiser=networks["denoiser"], refiner=networks["refiner"])  # type: ignore[arg-type]
    save_shapes(trained, out, _card(trained, data, len(numbers), minutes))
    return out


def prepare(
    data: ShapeDataset, out: Path, *,
    steps: int, seed: int, modes: int, width: int, blocks: int, refiner: int, batch: int,
) -> tuple[ShapeModel, Bank]:
    """The untrained model with its autoencoder and text projection, and the bank of training shapes."""
    rows, x, weights = training_shapes(data, min(SIDE, data.size))
    autoencoder = fit_autoencoder(x, weights, modes, seed)
    spectrum = FIRST * autoencoder.deviation / autoencoder.deviation[0]
    autoencoder.deviation.copy_(autoencoder.deviation[0] / FIRST)  # codes keep their spectrum
    codes = torch.stack([autoencoder.encode(versions(x, v, seed)) for v in range(VERSIONS)], dim=1)
    log_mm = torch.tensor([np.log(row.voxel_mm) if row.extent_mm is not None else np.nan for row in rows]).float()
    known = log_mm[~log_mm.isnan()]
    mean, deviation = (float(known.mean()), max(float(known.std()), 0.05)) if len(known) > 1 else (0.0, 1.0)
    texts = tuple(dict.fromkeys(caption for row in rows for caption in row.captions))
    place = {text: number for number, text in enumerate(texts)}
    captions = tuple(tuple(place[caption] for caption in row.captions) for row in rows)
    shares = torch.zeros(len(texts))
    for weight, own in zip(weights.tolist(), captions, strict=True):
        shares[list(own)] += weight / len(own)
    embeddings = _embedded(texts, out)
    projection = whitening(embeddings, shares, TEXT_CHANNELS)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.category, row.side), []).append(i)
    categories = {
        name: tuple(sorted({row.side for row in rows if row.category == name and row.side in ("left", "right")}))
        for name in sorted({row.category for row in rows})
    }
    rank = min(RANK, len(autoencoder.modes))
    plan = ShapePlan(
        out.name, categories, data.size, autoencoder.side, len(autoencoder.modes), TEXT_CHANNELS, width, blocks,
        mean, deviation, len(groups) + 1, rank, refiner, batch, steps,
        licence="; ".join(sorted({row.licence for row in rows})),
        source=", ".join(sorted({row.source for row in rows})), seed=seed,
    )  # fmt: skip
    model = dataclasses.replace(build_shapes_model(plan), autoencoder=autoencoder, projection=projection)
    model.denoiser.sigma_data[model.fields.slice("shape")] = spectrum[:, None, None, None]
    group = tuple(tuple(groups[row.category, row.side]) for row in rows)
    numbers = data.part("train")
    mirrored = [k for k, row in enumerate(rows[: len(numbers)]) if row.side in OTHER_SIDE]  # as in `training_shapes`

    def whole(i: int) -> Tensor:
        if i < len(numbers):
            return torch.from_numpy(data.sdf(numbers[i]))[None]
        return torch.from_numpy(data.sdf(numbers[mirrored[i - len(numbers)]]))[None].flip(1)

    bank = Bank(codes, model.size_of(log_mm), projection(embeddings), captions, group, weights, whole)
    fit_mixture(model.denoiser.prior, bank)  # type: ignore[arg-type]
    return model, bank


def fit_mixture(mixture: Mixture, bank: Bank) -> None:
    """A Gaussian of every category and side, and one of all shapes; deformed copies count for half."""
    groups = sorted(set(bank.group))
    everything = tuple(range(len(bank.codes)))
    shares = [(1 - ANYTHING) * float(bank.weights[list(group)].sum()) for group in groups]
    for number, (group, share) in enumerate(zip([*groups, everything], [*shares, ANYTHING], strict=True)):
        rows = list(group)
        codes = bank.codes[rows]
        weights = bank.weights[rows, None].repeat(1, codes.shape[1])
        weights[:, 1:] /= 2 * (codes.shape[1] - 1)
        size = bank.size[rows]
        size = size[~size.isnan()] if len(size[~size.isnan()]) > 1 else torch.tensor([-1.0, 1.0])  # ShapeModel.scaled
        text = torch.cat([bank.text[list(bank.captions[i])] for i in rows])
        mean = torch.cat([size.mean()[None], text.mean(0)])
        variance = torch.cat([size.var()[None] + SIZE_FLOOR, text.var(0, correction=0) + TEXT_FLOOR])
        mixture.fit(number, codes.flatten(0, 1), weights.flatten(), mean, variance, share)


@torch.no_grad()
def reconstruction(model: ShapeModel, data: ShapeDataset, numbers: Sequence[int]) -> dict[str, float]:
    """Mean Dice by category between shapes and what is left of them after encoding and decoding."""
    scores: dict[str, list[float]] = {}
    for i in numbers:
        x = torch.from_numpy(data.sdf(i))[None, None]
        found = model.decode(model.autoencoder.encode(x)) < 0
        dice = 2 * float((found & (x < 0)).sum()) / float(found.sum() + (x < 0).sum())
        scores.setdefault(data.rows[i].category, []).append(dice)
    return {category: float(np.mean(values)) for category, values in scores.items()}


def _card(model: ShapeModel, data: ShapeDataset, count: int, minutes: float) -> Card:
    plan = model.plan
    scores = {f"tune {name} reconstruction dice": round(value, 4)
              for name, value in reconstruction(model, data, data.part("tune")).items()}  # fmt: skip
    return Card(
        name=plan.name,
        licence=plan.licence or "not stated by the training data",
        training_data=f"{count} shapes of {len(plan.categories)} categories ({plan.source})",
        minutes=round(minutes, 1),
        hardware=torch.cuda.get_device_name() if torch.cuda.is_available()
        else f"{torch.get_num_threads()} threads of {platform.machine()}",
        command="genmed train (reconstruction: encoded, decoded and sharpened)",
        scores=scores,
        text=f"# {plan.name}\n\nJoint model of shape, size and text: {', '.join(plan.categories)}.",
    )  # fmt: skip
