"""A shape as voxels or as codes: the same denoiser with an explicit field beside the latent one of our models.

    python -m genmed.bench.shape_fields --shapes DIR --category hippocampus --minutes 15 --cases 20 --out DIR

The explicit field is the truncated distance itself, averaged to 32³ voxels and standardised about the mean shape: one
channel, denoised by the U-Net of images and trained by their loop, on the training shapes of one category and their
deformed copies. The latent one is that of a model of shapes, told the category. Both start from the same poses
(`genmed.laplace.suppositions`), are guided alike with the poses fitted at every step, and get the same Gaussian process
of what they still miss. The training is kept in OUT, and every case in OUT/shapes.csv: a run that starts again goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from genmed.bench.cases import stratified
from genmed.bench.hippocampus import mean_interval
from genmed.bench.shape_conditioned import TRAINING_STEPS, steps_taken, version_of
from genmed.bench.shape_solvers import Lab, Solver, key_of
from genmed.bench.shapes import TABLE, Rows, evaluate, finished
from genmed.cue import Cue, likely, with_sides
from genmed.data.shapes import ShapeDataset, read_shapes
from genmed.denoiser import Denoiser
from genmed.errors import GenMedError
from genmed.fields import Field, Fields
from genmed.files import write_bytes
from genmed.guide import guided, retry
from genmed.laplace import suppositions
from genmed.loss import continuous_loss, draw_sigma
from genmed.metrics import dice
from genmed.nets.autoencoder import lower
from genmed.nets.unet import UNet
from genmed.plan import NORM_GROUPS, PRESETS, strides
from genmed.pose import Posed
from genmed.samplers import euler, noise, schedule, seeded
from genmed.shape import Shape
from genmed.shape_model import ShapeModel, load_shapes
from genmed.tasks.complete import POSED_BELOW, RELAX, believed, complete, honoured, shapes_at, starts
from genmed.train import CHECKPOINT, fair_minutes, fit
from genmed.train_shapes import SIDE, VERSIONS, lowered

VERSION = 1     # raise it whenever the explicit field changes: nothing of an older one is used again
KINDS = ("three planes", "half missing")
SAMPLES = 4     # of either field, averaged
STEPS = 16      # noise levels of a trajectory of the explicit field
PRESET = PRESETS["small"]
SIGMA_MAX, START_SIGMA, SIGMA_MIN = 40.0, 10.0, 0.02  # in the units of codes, see `Scale`
FIELDS = Fields(Field("shape", "continuous", ("distance",)))


# The explicit field ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scale:
    """z = (distance − mean) / deviation. Noise of `unit` drowns as much of z as noise of 1 does of a model's codes."""

    mean: Float[Tensor, "1 m m m"]
    deviation: float
    unit: float

    @classmethod
    def of(cls, x: Float[Tensor, "n 1 m m m"], model: ShapeModel) -> Scale:
        """That of training shapes, which have unit variance then."""
        mean = x.mean(dim=0)
        deviation = float((x - mean).square().mean().sqrt())
        return cls(mean, deviation, float(model.autoencoder.deviation[0]) / deviation)

    def encode(self, distance: Float[Tensor, "b 1 m m m"]) -> Float[Tensor, "b 1 m m m"]:
        return (distance - self.mean) / self.deviation

    def decode(self, z: Float[Tensor, "b 1 m m m"]) -> Float[Tensor, "b 1 m m m"]:
        return self.mean + self.deviation * z


class VoxelBatch(NamedTuple):
    """Fields z; `seed` decides every random number."""

    z: Float[Tensor, "b 1 m m m"]
    seed: int


class VoxelLoss(nn.Module):
    """The denoising loss of a continuous field of images, at one level for all voxels of a sample."""

    def __init__(self, model: Denoiser, unit: float) -> None:
        super().__init__()
        self.model, self.unit = model, unit

    def forward(self, batch: VoxelBatch) -> dict[str, Tensor]:
        generator, x = Generator().manual_seed(batch.seed), batch.z
        levels = [draw_sigma("equal", torch.Size((1, 1, 1)), SIGMA_MAX, generator)[0] for _ in x]
        sigma = self.unit * torch.stack(levels)[:, None].to(x)
        z = x + sigma * torch.randn(x.shape, generator=generator).to(x)
        found = self.model.outputs(z, sigma.flatten(1))["shape"]
        return {"loss": continuous_loss(found, x, sigma.expand_as(x), torch.ones_like(x))}


def draw_batch(x: Float[Tensor, "n 1 m m m"], scale: Scale, step: int, process: int = 0) -> VoxelBatch:
    """The shapes of one training step, as they are or as one of the copies that ours is trained on."""
    seed = step * 1_009 + process
    generator = Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (PRESET.batch,), generator=generator).tolist()
    numbers = torch.randint(VERSIONS, (PRESET.batch,), generator=generator).tolist()
    copies = [version_of(x[i], i, number, 0) for i, number in zip(chosen, numbers, strict=True)]
    return VoxelBatch(scale.encode(torch.stack(copies)), seed)


def trained(x: Float[Tensor, "n 1 m m m"], scale: Scale, folder: Path, minutes: float) -> Denoiser:
    """The denoiser of training shapes, in a folder; trains it, or goes on with its training."""
    torch.manual_seed(0)
    steps = strides((1.0, 1.0, 1.0), len(PRESET.widths))
    net = UNet(FIELDS.channels + len(FIELDS), FIELDS.channels, PRESET.widths, steps, len(FIELDS), NORM_GROUPS)
    average, _ = fit(
        VoxelLoss(Denoiser(FIELDS, net, scale.unit * SIGMA_MAX), scale.unit), partial(draw_batch, x, scale), folder,
        steps=TRAINING_STEPS, learning_rate=PRESET.learning_rate, max_minutes=minutes,
        resume=(folder / CHECKPOINT).exists(), clock=fair_minutes,
    )  # fmt: skip
    return average.cpu()  # type: ignore[return-value]


class VoxelPosed(Posed):
    """The residual of a cue where z holds distances: poses are fitted as ever, of sizes nothing is known."""

    def __init__(self, scale: Scale, model: ShapeModel, cue: Cue, poses: Float[Tensor, "b 4"]) -> None:
        super().__init__(model, cue, poses)
        self.scale = scale

    @property
    def knows_size(self) -> Float[Tensor, " b"]:
        return torch.zeros(len(self.pose))

    def _parts(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale.decode(z0), torch.zeros(len(z0), 1)


@dataclass(frozen=True, eq=False)
class Voxels:
    """The trained denoiser of distances; `model`, told the words `spoken`, lends it first poses."""

    denoiser: Denoiser
    scale: Scale
    model: ShapeModel
    spoken: Float[Tensor, " d"]

    def complete(self, cue: Cue, seed: int = 0) -> tuple[Shape, ...]:
        """As `genmed.tasks.complete.complete` does it, but that shapes start from noise alone."""
        cue = with_sides(cue, seed)
        expected = likely(cue)
        poses = starts(self.model, suppositions(self.model, expected, self.spoken, seed), self.spoken, SAMPLES)[1]
        white = noise(self.scale.mean.expand(SAMPLES, -1, -1, -1, -1), seeded([seed + i for i in range(SAMPLES)]))
        sigmas = schedule(self.scale.unit * START_SIGMA, self.scale.unit * SIGMA_MIN, STEPS)
        last: list[Posed] = []

        def trajectory(shorter: float) -> Tensor:
            posed = VoxelPosed(self.scale, self.model, expected, poses)
            last[:] = [posed]

            def denoise(z: Tensor, sigma: float) -> Tensor:
                posed.fixed = sigma > self.scale.unit * POSED_BELOW
                return self.denoiser(z, torch.full((len(z), 1), sigma))

            return euler(guided(denoise, FIELDS, posed, relax=RELAX, scale=shorter), sigmas[0] * white, sigmas)

        z0 = retry(trajectory)
        last[0](z0)  # once more: the pose of the final estimate
        posed = Posed(self.model, cue, last[0].pose)
        volume = believed(honoured(self.decode(z0), posed), posed)
        return shapes_at(volume, posed.pose, [True] * SAMPLES)

    def decode(self, z0: Float[Tensor, "b 1 m m m"]) -> Float[Tensor, "b 1 n n n"]:
        """Distances in the whole cube."""
        size = (self.model.plan.size,) * 3
        return F.interpolate(self.scale.decode(z0), size=size, mode="trilinear", align_corners=False)


# The comparison -------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A field with its weights. `through`: a shape after the field alone; `stored` counts what is fixed, too."""

    solver: Solver
    through: Callable[[Float[Tensor, "1 1 n n n"]], Float[Tensor, "1 1 n n n"]]
    trained: int
    stored: int


def columns(data: ShapeDataset, model: ShapeModel, category: str, minutes: float, out: Path) -> dict[str, Column]:
    """Both fields, ready; trains the explicit one where that is not finished."""
    from genmed.text import embed

    numbers = [i for i in data.part("train") if data.rows[i].category == category]
    if len(numbers) < 2 or category not in model.plan.categories or data.size != model.plan.size:
        raise GenMedError(f"--category {category}: model and shapes must both have it, at one size; choose another.")
    embedding, lab, side = embed([category])[0], Lab(data, model, out), min(SIDE, data.size)
    x = lowered(data, numbers, side)
    scale = Scale.of(x, model)
    key = key_of("voxels", lab, VERSION, category, minutes, PRESET, scale.unit)
    denoiser = trained(x, scale, out / f"voxels-{key}", minutes)
    voxels = Voxels(denoiser, scale, model, model.text_of(embedding[None])[0])
    explicit = Solver(
        key_of("voxels", lab, key, model.sha256, SAMPLES), lambda cue, row: voxels.complete(cue),
        f"{side}³; {minutes:g} minutes, {steps_taken(out / f'voxels-{key}'):,} steps on {len(numbers)} shapes of the "
        "category",
    )  # fmt: skip
    latent = Solver(
        key_of("codes", lab, category, model.sha256, SAMPLES),
        lambda cue, row: complete(model, cue, text=embedding, samples=SAMPLES).shapes,
        f"{model.plan.modes}; `{model.plan.name}`, trained on {len(model.plan.categories)} structures, told which",
    )  # fmt: skip
    return {
        "voxels": Column(
            explicit, lambda x: voxels.decode(scale.encode(lower(x, side))), _numbers(denoiser), _numbers(denoiser)
        ),
        "codes": Column(
            latent, lambda x: model.decode(model.autoencoder.encode(x), voxels.spoken[None]),
            _numbers(model.denoiser.net, model.refiner), _numbers(model.modules),
        ),
    }  # fmt: skip


def _numbers(*modules: nn.Module) -> int:
    return sum(tensor.numel() for module in modules for tensor in module.state_dict().values())


@torch.no_grad()
def kept(data: ShapeDataset, chosen: Sequence[int], column: Column) -> float:
    """Mean Dice between shapes and what is left of them after the field alone."""
    shapes = [torch.from_numpy(data.sdf(i))[None, None] for i in chosen]
    return float(np.mean([dice((column.through(x) < 0).numpy(), (x < 0).numpy()) for x in shapes]))


def report(title: str, fields: Mapping[str, Column], rows: Rows, alone: Mapping[str, float]) -> str:
    """The table in Markdown; `alone`: what each field keeps of the cases."""
    of = {name: {kind: [r for r in rows.values() if (r.method, r.kind) == (name, kind)] for kind in KINDS}
          for name in fields}  # fmt: skip
    people = [row.subject for row in of["codes"][KINDS[0]]]
    lines = [
        f"# A shape as voxels or as codes: {title}", "",
        f"Dice of {len(people)} shapes [95 % bootstrap interval, whole persons resampled], of the mean of {SAMPLES} "
        "completions; below, codes minus voxels, pairwise. *Alone*: nothing is hidden, the shape goes through the "
        "field and back. Seconds of the wall clock for one completion, median. Numbers that are trained, and all that "
        "are stored.", "",
        f"| field | {' | '.join(KINDS)} | alone | seconds | trained | stored |", "|---" * (len(KINDS) + 5) + "|",
    ]  # fmt: skip
    for name, column in fields.items():
        cells = [mean_interval(np.array([row.dice for row in of[name][kind]]), people, 3) for kind in KINDS]
        seconds = np.median([row.seconds for kind in KINDS for row in of[name][kind]]) / SAMPLES
        cells += [f"{alone[name]:.3f}", f"{seconds:.1f}", f"{column.trained:,}", f"{column.stored:,}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    pairs = [zip(of["codes"][kind], of["voxels"][kind], strict=True) for kind in KINDS]
    ahead = [mean_interval(np.array([a.dice - b.dice for a, b in pair]), people, 3, "+") for pair in pairs]
    lines += [f"| codes ahead by | {' | '.join(ahead)} | | | | |", ""]
    return "\n".join([*lines, *(f"- {name}: {column.solver.note}" for name, column in fields.items())]) + "\n"


def run(
    shapes: str | Path, model: str | Path, out: str | Path, *, category: str, minutes: float, count: int, part: str
) -> str:
    """Train and complete what is not finished; returns the report and writes it to `out`."""
    if count < 1 or not minutes > 0:
        raise GenMedError(f"--cases {count} --minutes {minutes:g}: choose 1 case or more, and more than 0 minutes.")
    data, out = read_shapes(shapes), Path(out)
    chosen = [i for i in stratified(data, part, len(data)) if data.rows[i].category == category][:count]
    if not chosen:
        raise GenMedError(f"--category {category}: part '{part}' of {data.folder} has no such shape; choose another.")
    rows = finished(out)
    fields = columns(data, load_shapes(model), category, minutes, out)
    rows = evaluate(data, chosen, KINDS, {name: column.solver for name, column in fields.items()}, rows, out)
    alone = {name: kept(data, chosen, column) for name, column in fields.items()}
    text = report(f"{category}, {part} part", fields, rows, alone)
    write_bytes(out / TABLE, text.encode("utf-8"))
    return text


def main() -> int:
    """Print the table and write it to OUT/table.md."""
    parser = argparse.ArgumentParser(description="Shapes as voxels and as codes, completed from the same cues.")
    parser.add_argument("--shapes", type=Path, required=True, help="folder of genmed data build-shapes")
    parser.add_argument("--model", default="shapes", help="model of shapes, trained on that folder")
    parser.add_argument("--category", default="hippocampus")
    parser.add_argument("--minutes", type=float, default=15, help="of training voxels, on one core (%(default)g)")
    parser.add_argument("--cases", type=int, default=20, help="shapes of the part (%(default)s)")
    parser.add_argument("--part", choices=("tune", "report"), default="tune")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    try:
        print(run(a.shapes, a.model, a.out, category=a.category, minutes=a.minutes, count=a.cases, part=a.part))
    except GenMedError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
