"""A peer of `complete`: input-conditioned diffusion, which denoises a shape's codes given an encoding of the cue.

It has our autoencoder and our network's size, and is trained for the same minutes on the cues that it is tested on;
the weights that complete tune shapes best are kept.
The cue is all that it knows of place and size: it sees the cue on a cube laid around the cue's own box, and denoises
the place and size of the shape in that box along with the codes. The condition is dropped from a share of the training,
so that samples can be steered away from what any shape looks like (classifier-free, arXiv 2207.12598).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int8
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn

from genmed.bench.cues import KINDS, draw_cue
from genmed.bench.shape_peers import missed_by
from genmed.cue import Cue, with_sides
from genmed.data.shapes import INDEX, ShapeDataset
from genmed.errors import GenMedError
from genmed.files import sha256_of, write_bytes, write_json
from genmed.loss import LOG_SIGMA
from genmed.nets.mlp import MLP
from genmed.pose import Posed
from genmed.samplers import euler, noise, schedule, seeded
from genmed.shape import MARGIN, Shape, encode
from genmed.shape_model import ShapeModel
from genmed.tasks.complete import honoured, shape_at
from genmed.train import CHECKPOINT, fair_minutes, fit, time_spent
from genmed.train_shapes import OTHER_SIDE, deformed, training_shapes

SIDE = 24           # voxels along the cue's cube
REACH = 2.2         # side of that cube over the longest extent seen
UNSEEN = -128       # stored value of voxels in which nothing was seen; the others hold distances in 1/64 voxels
CUES = 12_000       # drawn for the training, every kind as often, a tenth of a second each; mirror images come on top
VERSIONS = 12       # of every shape: itself and deformed copies, as in our training
DROPPED = 0.1       # share of the training that is not shown the cue
POSE = 4            # centre in the box, ln of the size over that of the box
ENCODED = 256       # numbers that the encoder makes of a cue
STEPS = 16
DRAWN = 6           # samples for each that is kept, with a Gaussian process
TRAINING_STEPS = 1_000_000
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
CACHE, WEIGHTS, TRAINING = "cues.safetensors", "weights.safetensors", "training.json"


class CueBatch(NamedTuple):
    """Drawn cues with the codes and poses of their shapes; `seed` decides every random number."""

    codes: Float[Tensor, "b k"]
    pose: Float[Tensor, "b 4"]
    picture: Int8[Tensor, "b s s s"]
    facts: Float[Tensor, "b 2"]
    seed: int


class Network(nn.Module):
    """D(z, σ | cue) of codes and pose, with EDM's preconditioning (arXiv 2206.00364) and our multilayer perceptron.

    `deviations` are those of the codes: each is scaled by its own, as in our denoiser. Poses are standardised.
    """

    scale: Tensor
    pose_mean: Tensor
    pose_deviation: Tensor

    def __init__(self, deviations: Float[Tensor, " k"], width: int, blocks: int) -> None:
        super().__init__()
        channels = len(deviations) + POSE
        self.register_buffer("scale", torch.cat([deviations, torch.ones(POSE)]))
        self.encoder = nn.Sequential(
            nn.Conv3d(2, 16, 3, 2, 1), nn.SiLU(), nn.Conv3d(16, 32, 3, 2, 1), nn.SiLU(),
            nn.Conv3d(32, 64, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 3, ENCODED), nn.SiLU(),
        )  # fmt: skip
        self.net = MLP(channels + ENCODED + 3, channels, width, blocks, conditions=1)
        self.register_buffer("pose_mean", torch.zeros(POSE))
        self.register_buffer("pose_deviation", torch.ones(POSE))
        nn.init.zeros_(self.net.head.weight)
        nn.init.zeros_(self.net.head.bias)

    def encoded(
        self, picture: Int8[Tensor, "b s s s"], facts: Float[Tensor, "b 2"], shown: Float[Tensor, " b"]
    ) -> Float[Tensor, "b e"]:
        """What the network is told: of a cue that is not shown, nothing."""
        seen = picture != UNSEEN
        channels = torch.stack([torch.where(seen, picture.float() / 64, 0.0), seen.float()], dim=1)
        features = torch.cat([self.encoder(channels), facts], dim=1)
        return torch.cat([features * shown[:, None], shown[:, None]], dim=1)

    def forward(
        self, z: Float[Tensor, "b c"], sigma: Float[Tensor, " b"], encoded: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c"]:
        """Estimate of clean codes and standardised pose."""
        level = sigma[:, None]
        total = level**2 + self.scale**2
        seen = torch.cat([z * total.rsqrt(), encoded], dim=1)
        raw = self.net(seen[..., None, None, None], level.log() / 4).flatten(1)
        return self.scale**2 / total * z + level * self.scale * total.rsqrt() * raw


class ConditionedLoss(nn.Module):
    """Denoising loss of codes and pose given a cue, that is dropped from a share of the batch.

    Squared errors, of codes those of their distances, are relative to what the best estimate would leave if codes and
    pose were Gaussian, as in ours.
    """

    def __init__(self, model: Network, sigma_max: float) -> None:
        super().__init__()
        self.model = model
        self.sigma_max = sigma_max

    def forward(self, batch: CueBatch) -> dict[str, Tensor]:
        generator, count = Generator().manual_seed(batch.seed), len(batch.codes)
        mean, deviation = LOG_SIGMA
        sigma = torch.exp(mean + deviation * torch.randn(count, generator=generator)).clamp(max=self.sigma_max)
        shown = (torch.rand(count, generator=generator) >= DROPPED).to(batch.codes)
        pose = (batch.pose - self.model.pose_mean) / self.model.pose_deviation
        z0 = torch.cat([batch.codes, pose], dim=1)
        z = z0 + (sigma[:, None] * torch.randn(z0.shape, generator=generator)).to(z0)
        sigma = sigma.to(z0)
        with torch.autocast(z0.device.type, enabled=False):
            found = self.model(z, sigma, self.model.encoded(batch.picture, batch.facts, shown))
        error, left = (found - z0) ** 2, (sigma[:, None] ** -2 + self.model.scale**-2) ** -1
        shape, place = (
            (error[:, part].mean(1) / left[:, part].mean(1)).mean() for part in (slice(-POSE), slice(-POSE, None))
        )
        return {"loss": shape + 0.2 * place, "shape": shape, "pose": place}


@dataclass(frozen=True, eq=False)
class Conditioned:
    """The trained peer."""

    model: ShapeModel  # its autoencoder and noise levels
    network: Network
    guidance: float
    minutes: float
    steps: int
    sha256: str

    @torch.no_grad()
    def complete(self, cue: Cue, samples: int, *, gp: bool = False, seed: int = 0) -> tuple[Shape, ...]:
        """Shapes drawn from noise.

        With `gp` `DRAWN` times as many are drawn, those are kept that miss the cue least, best first, and
        what they miss of it is added, as to ours.
        """
        plan, count = self.model.plan, DRAWN * samples if gp else samples
        picture, facts = (x.expand(count, *x.shape[1:]) for x in _shown(cue, self.model))
        told, blank = (self.network.encoded(picture, facts, torch.full((count,), on)) for on in (1.0, 0.0))

        def denoise(z: Tensor, sigma: float) -> Tensor:
            level = torch.full((count,), sigma)
            found = self.network(z.flatten(1), level, told)
            if self.guidance != 1:
                plain = self.network(z.flatten(1), level, blank)
                found = plain + self.guidance * (found - plain)
            return found[..., None, None, None]

        like = torch.zeros(count, plan.modes + POSE, 1, 1, 1)
        start = plan.sigma_max * noise(like, seeded([seed * 1_000_003 + i for i in range(count)]))
        z = euler(denoise, start, schedule(plan.sigma_max, plan.sigma_min, STEPS)).flatten(1)
        pose = z[:, -POSE:] * self.network.pose_deviation + self.network.pose_mean
        poses = in_world(pose, cue, plan.size)
        volume = self.model.decode(z[:, :-POSE])
        if gp:
            posed = Posed(self.model, with_sides(cue, seed), poses)
            order = missed_by(posed, volume, poses).argsort()[:samples]
            volume, poses = volume[order], poses[order]
            posed.pose = poses
            volume = honoured(volume, posed)
        return tuple(shape_at(v, p) for v, p in zip(volume[:, 0].numpy(), poses.numpy(), strict=True))


# What is shown of a cue -----------------------------------------------------------------------------------


def picture_of(cue: Cue) -> Int8[np.ndarray, "s s s"]:
    """Mean signed distances in the voxels of a cube around the cue's box, in 1/64 voxels up to one; else `UNSEEN`."""
    middle, longest = cue.box_mm.mean(axis=0), float(np.ptp(cue.box_mm, axis=0).max())
    voxel_mm = REACH * longest / SIDE
    index = np.floor((cue.points_mm - middle) / voxel_mm + SIDE / 2).astype(int)
    held = ((index >= 0) & (index < SIDE)).all(axis=1)
    flat = np.ravel_multi_index(tuple(index[held].T), (SIDE,) * 3)
    value = np.where(cue.upper_mm <= 0, cue.lower_mm, cue.upper_mm)[held]
    count = np.bincount(flat, minlength=SIDE**3)
    total = np.bincount(flat, weights=(value / voxel_mm).clip(-1, 1), minlength=SIDE**3)
    stored = np.where(count > 0, np.rint(64 * total / np.maximum(count, 1)), UNSEEN)
    return stored.reshape((SIDE,) * 3).astype(np.int8)


def facts_of(cue: Cue, model: ShapeModel) -> tuple[float, float]:
    """Standardised size of the box, and whether the cue is doubtful."""
    longest = float(np.ptp(cue.box_mm, axis=0).max())
    size = (np.log(MARGIN * longest / model.plan.size) - model.plan.size_mean) / model.plan.size_deviation
    return float(np.clip(size, -5, 5)), float(cue.doubtful)


def _shown(cue: Cue, model: ShapeModel) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(picture_of(cue))[None], torch.tensor([facts_of(cue, model)])


def in_box(cue: Cue, shape: Shape) -> Float[np.ndarray, 4]:
    """Centre of the shape's cube in longest extents of the box from its middle, and ln of its size over the box's."""
    longest = float(np.ptp(cue.box_mm, axis=0).max())
    n = len(shape.sdf)
    centre = np.array(shape.origin_mm) + shape.voxel_mm * (n - 1) / 2
    return np.append((centre - cue.box_mm.mean(axis=0)) / longest, np.log(shape.voxel_mm * n / (MARGIN * longest)))


def in_world(pose: Float[Tensor, "b 4"], cue: Cue, size: int) -> Float[Tensor, "b 4"]:
    """Inverse of `in_box`: centre in mm and ln voxel_mm."""
    longest = float(np.ptp(cue.box_mm, axis=0).max())
    middle = torch.from_numpy(cue.box_mm.mean(axis=0)).float()
    return torch.cat([pose[:, :3] * longest + middle, pose[:, 3:] + float(np.log(MARGIN * longest / size))], dim=1)


# Training -------------------------------------------------------------------------------------------------


def drawn_cues(data: ShapeDataset, model: ShapeModel, path: Path, count: int = CUES) -> dict[str, Tensor]:
    """Codes, poses and pictures of cues of training shapes and their deformed copies, kept in a file.

    Every version of a shape is decoded from the side of the autoencoder to the full size before a cue is drawn of it,
    so that noise and planes are as fine as in the tables. The deformed copies are those of our own training. `mirrored`
    are the codes of the mirror image about the middle of the cube, NaN for what is neither left nor right.
    """
    if path.exists():
        return load_file(path)
    rows, x, weights = training_shapes(data, model.autoencoder.side)
    generator = Generator().manual_seed(model.plan.seed)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    version = torch.randint(VERSIONS, (count,), generator=generator)
    codes, pose = torch.zeros(count, model.plan.modes), torch.zeros(count, POSE)
    mirrored = torch.full_like(codes, torch.nan)
    picture, facts = torch.full((count, SIDE, SIDE, SIDE), UNSEEN, dtype=torch.int8), torch.zeros(count, 2)
    kept = torch.ones(count, dtype=torch.bool)
    for k, (i, number) in enumerate(zip(chosen.tolist(), version.tolist(), strict=True)):
        bent = version_of(x[i], i, number, model.plan.seed)[None]
        volume = nn.functional.interpolate(bent, size=(data.size,) * 3, mode="trilinear")
        shape = Shape(encode(volume[0, 0].numpy()), rows[i].voxel_mm, rows[i].origin_mm)
        try:
            cue = draw_cue(shape, KINDS[k % len(KINDS)], k)
        except GenMedError:  # a copy that was bent until nothing is left of it
            kept[k] = False
            continue
        codes[k] = model.autoencoder.encode(bent)[0]
        if rows[i].side in OTHER_SIDE:
            mirrored[k] = model.autoencoder.encode(bent.flip(2))[0]
        pose[k] = torch.from_numpy(in_box(cue, shape))
        picture[k] = torch.from_numpy(picture_of(cue))
        facts[k] = torch.tensor(facts_of(cue, model))
    tensors = {"codes": codes, "mirrored": mirrored, "pose": pose, "picture": picture, "facts": facts}
    tensors = {name: tensor[kept].contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(tensors))
    return tensors


def version_of(x: Float[Tensor, "1 m m m"], i: int, number: int, seed: int) -> Float[Tensor, "1 m m m"]:
    """What `genmed.train_shapes.versions` gives shape `i` under this number, without all the others."""
    return deformed(x, Generator().manual_seed((seed * 1009 + number) * 1_000_003 + i)) if number else x


def draw_batch(cues: dict[str, Tensor], size: int, step: int, seed: int, process: int = 0) -> CueBatch:
    """The cues of one training step, of left and right shapes every other one mirrored."""
    seed = ((seed * 1_000_003 + step) * 1_009 + process) % 2**62
    generator = Generator().manual_seed(seed)
    chosen = torch.randint(len(cues["codes"]), (size,), generator=generator)
    codes, other, pose, picture, facts = (
        cues[name][chosen] for name in ("codes", "mirrored", "pose", "picture", "facts")
    )
    turned = (torch.rand(size, generator=generator) < 0.5) & ~other.isnan().any(dim=1)
    codes = torch.where(turned[:, None], other, codes)
    pose = torch.where(turned[:, None], pose * torch.tensor([-1.0, 1.0, 1.0, 1.0]), pose)
    picture = torch.where(turned[:, None, None, None], picture.flip(1), picture)
    return CueBatch(codes, pose, picture, facts, seed)


def conditioned(
    data: ShapeDataset,
    model: ShapeModel,
    folder: Path,
    minutes: float,
    score: Callable[[Conditioned], float],
    *,
    version: int,
    count: int = CUES,
    clock: Callable[[], float] = fair_minutes,
) -> Conditioned:
    """The peer in a folder; trains it, or goes on with its training.

    `score` (higher is better) is asked of the averaged network every few minutes, which do not count as training: the
    best weights are kept, and curve.jsonl holds all scores as "dice". Then it chooses the guidance. Raises
    `GenMedError` for a folder of other shapes, another model, other minutes, or an older `version` of the benchmark.
    """
    of = {
        "index": sha256_of(data.folder / INDEX), "model": model.sha256, "version": version, "minutes": minutes,
        "count": count,
    }  # fmt: skip
    training = _training(folder, of)
    plan = model.plan
    torch.manual_seed(plan.seed)
    deviations = model.denoiser.sigma_data[model.fields.slice("shape")].flatten()
    network = Network(deviations, plan.width, plan.blocks)
    judging = 0.0

    def judged(average: nn.Module) -> dict[str, float]:
        nonlocal judging
        started = clock()
        peer = Conditioned(model, copy.deepcopy(average).cpu(), GUIDANCE[0], 0.0, 0, "")  # type: ignore[arg-type]
        dice = score(peer)
        judging += clock() - started
        return {"dice": dice}

    def keep(average: nn.Module, minutes: float, scores: dict[str, float]) -> None:
        write_weights(average, folder / WEIGHTS)

    if not training:
        write_json(folder / TRAINING, {"of": of})
        cues = drawn_cues(data, model, folder / CACHE, count)
        network.pose_mean.copy_(cues["pose"].mean(dim=0))
        network.pose_deviation.copy_(cues["pose"].std(dim=0).clamp(min=0.01))
        if not _finished(folder, minutes):
            print(f"training {folder} for {minutes:g} minutes", flush=True)
            fit(
                ConditionedLoss(network, plan.sigma_max),
                lambda step, process: draw_batch(cues, plan.batch, step, plan.seed, process),
                folder, steps=TRAINING_STEPS, learning_rate=plan.learning_rate, max_minutes=minutes,
                resume=(folder / CHECKPOINT).exists(), validate=judged, keep_best=keep,
                clock=lambda: clock() - judging,
            )  # fmt: skip
        training = {"of": of, "minutes": time_spent(folder).minutes, "steps": steps_taken(folder)}
    network.load_state_dict(load_file(folder / WEIGHTS))
    network.eval().requires_grad_(False)
    sha256 = sha256_of(folder / WEIGHTS)

    def under(guidance: float) -> Conditioned:
        return Conditioned(model, network, guidance, training["minutes"], training["steps"], sha256)

    if "guidance" not in training:
        training["guidance"] = max(GUIDANCE, key=lambda guidance: score(under(guidance)))
        write_json(folder / TRAINING, training)
    return under(training["guidance"])


def write_weights(network: nn.Module, path: Path) -> None:
    """The whole file, replaced at once."""
    write_bytes(path, save({name: value.cpu().contiguous() for name, value in network.state_dict().items()}))


def _finished(folder: Path, minutes: float) -> bool:
    """Whether nothing is left to train: only the choice of the guidance may be missing."""
    if not ((folder / CHECKPOINT).exists() and (folder / WEIGHTS).exists()):
        return False
    return time_spent(folder).minutes >= minutes or steps_taken(folder) >= TRAINING_STEPS


def _training(folder: Path, of: dict[str, Any]) -> dict[str, Any]:
    """What a folder says of a training that is finished; empty where it is not."""
    path = folder / TRAINING
    if not path.exists():
        return {}
    training = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = training["of"]
    if (trained := found.get("minutes", of["minutes"])) != of["minutes"]:
        raise GenMedError(f"{folder}: was trained for {trained:g} minutes, not {of['minutes']:g}; use another --runs.")
    if {name: found.get(name) for name in ("index", "model")} != {name: of[name] for name in ("index", "model")}:
        raise GenMedError(f"{folder}: was trained for other shapes or another model; use another --runs.")
    if found != of:
        raise GenMedError(f"{folder}: was trained by another version of this benchmark; use another --runs.")
    return training if "guidance" in training else {}


def steps_taken(folder: Path) -> int:
    """Training steps in a folder's checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return int(file.metadata()["step"])
