"""Peers of `complete` in the tables of shapes, each with one call: `peer.complete(cue, told, seed) -> shapes`.

`told` is the (category, side) of the structure for peers that need to know it, or None. The shapes are averaged by
`genmed.tasks.complete.Completion`, as ours are.

- `Statistical`: PCA shape models with a Gaussian-process residual, fitted by Gauss-Newton steps;
- `Nearest`: the training shape that misses the cue least;
- `Interpolation`: biharmonic interpolation of what was seen, without any training.

The input-conditioned diffusion stands in `genmed.bench.shape_conditioned`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from genmed.cue import Cue, likely, thinned, with_sides
from genmed.data.shapes import ShapeDataset
from genmed.laplace import Fit, gauss_newton
from genmed.nets.autoencoder import LinearAutoencoder, principal_components
from genmed.pose import Posed, first_poses
from genmed.shape import Shape
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model
from genmed.tasks.complete import believed, honoured, interpolated, shape_at
from genmed.train_shapes import SIDE, lowered, training_shapes

MODES = 200          # at most, of every statistical model
STARTS = 12          # poses that a statistical model is fitted from
FIT_POINTS = 1500    # of the cue while poses and codes are looked for; all count in the end
ITERATIONS = 12      # Gauss-Newton steps from every start
FINAL_ITERATIONS = 4  # of the best starts, with all points
TRIAL = (3, 5, 400)  # starts, steps and points by which categories are compared before the best are fitted
CANDIDATES = 3       # of all categories that are fitted in the end
COARSE = 16          # voxels a side by which training shapes are compared first
COARSE_POINTS, COARSE_POSES = 200, 4
SHORTLIST = 24       # training shapes whose pose is fitted
POSE_CALLS = 8
REACH = 2.2          # side of the interpolation's cube over the longest extent seen

Told = tuple[str, str] | None


# Statistical shape models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PcaSettings:
    """What is chosen on the tune part: `genmed.bench.shape_solvers.chosen_pca`.

    `prior` weighs the codes against the cue, `sided` fits left and right apart, `kept` starts are averaged, and
    `pooled` is how a structure that is not told is looked for: in one model of all shapes, or in every model. `likely`
    lends it the bounds that ours believes in (`genmed.cue.likely`), and what ours believes of doubtful maps.
    """

    modes: int = MODES
    prior: float = 1.0
    sided: bool = False
    kept: int = 1
    pooled: bool = False
    likely: bool = False


@dataclass(frozen=True, eq=False)
class Statistical:
    """PCA shape models by (category, side) and one of all shapes, under ("", "")."""

    models: Mapping[tuple[str, str], ShapeModel]
    settings: PcaSettings

    def complete(self, cue: Cue, told: Told, seed: int = 0) -> tuple[Shape, ...]:
        """The shapes of highest evidence, with what they still miss of the cue added by a Gaussian process."""
        cue = with_sides(cue, seed)
        bounds = likely(cue) if self.settings.likely else cue
        best = sorted((fitted(model, bounds, self.settings, seed) for model in self._candidates(bounds, told, seed)),
                      key=lambda fit: float(fit.evidence[0]))[0]  # fmt: skip
        volume = best.model.autoencoder.decode(best.codes, best.model.plan.size)
        posed = Posed(best.model, cue, best.poses)
        volume = honoured(volume, posed)
        if self.settings.likely:
            volume = believed(volume, posed)
        return tuple(shape_at(v, p) for v, p in zip(volume[:, 0].numpy(), best.poses.numpy(), strict=True))

    def under(self, settings: PcaSettings) -> Statistical:
        """The same models with other settings, of which `sided` must be the same, and modes no more."""
        models = {key: truncated(model, settings.modes) for key, model in self.models.items()}
        return Statistical(models, settings)

    def _candidates(self, cue: Cue, told: Told, seed: int) -> list[ShapeModel]:
        if told is not None:
            key = told if self.settings.sided else (told[0], "")
            return [self.models[key if key in self.models else ("", "")]]
        if self.settings.pooled or len(self.models) == 1:
            return [self.models["", ""]]
        starts, iterations, points = TRIAL
        rough = thinned(cue, points, seed)
        tried = []
        for key, model in self.models.items():
            if key != ("", ""):
                fit = gauss_newton(model, rough, first_poses(cue, model.plan.size, starts, seed),
                                   torch.zeros(starts, model.plan.modes), iterations, self.settings.prior)  # fmt: skip
                tried.append((float(fit.evidence.min()), key))
        return [self.models[key] for _, key in sorted(tried)[:CANDIDATES]]


def statistical(data: ShapeDataset, sided: bool) -> Statistical:
    """Models of the training part, mirror images included, with as many modes as there are.

    Categories of one shape have none.
    """
    rows, x, weights = training_shapes(data, min(SIDE, data.size))
    log_mm = np.array([np.log(row.voxel_mm) for row in rows])
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.category, row.side if sided else ""), []).append(place)
    models = {
        key: gaussian_model(x[group], log_mm[group], torch.ones(len(group)), data.size)
        for key, group in groups.items()
        if len(group) > 1
    }
    models["", ""] = gaussian_model(x, log_mm, weights, data.size)
    return Statistical(models, PcaSettings(sided=sided))


def gaussian_model(
    x: Float[Tensor, "n 1 m m m"], log_mm: np.ndarray, weights: Float[Tensor, " n"], size: int
) -> ShapeModel:
    """A Gaussian of shapes and sizes as a `ShapeModel`, so that poses are fitted as ours are; its network is unused."""
    autoencoder = principal_components(x.flatten(1).clone(), weights, MODES)
    plan = ShapePlan(
        "pca", {"any": ()}, size, autoencoder.side, len(autoencoder.modes), 1, 8, 1,
        float(log_mm.mean()), max(float(log_mm.std()), 0.05),
    )  # fmt: skip
    model = dataclasses.replace(build_shapes_model(plan), autoencoder=autoencoder)
    model.modules.eval().requires_grad_(False)
    return model


def truncated(model: ShapeModel, modes: int) -> ShapeModel:
    """The same Gaussian in its first principal components."""
    whole = model.autoencoder
    if len(whole.modes) <= modes:
        return model
    autoencoder = LinearAutoencoder(whole.side, modes)
    first = {"modes": whole.modes[:modes], "deviation": whole.deviation[:modes]}
    autoencoder.load_state_dict({"mean": whole.mean, **first})
    plan = dataclasses.replace(model.plan, modes=modes)
    return dataclasses.replace(build_shapes_model(plan), autoencoder=autoencoder)


@torch.no_grad()
def fitted(model: ShapeModel, cue: Cue, settings: PcaSettings, seed: int = 0) -> Fit:
    """Fit from several starts to a part of the points, then the best of them to all."""
    starts = first_poses(cue, model.plan.size, STARTS, seed)
    zero = torch.zeros(STARTS, model.plan.modes)
    rough = gauss_newton(model, thinned(cue, FIT_POINTS, seed), starts, zero, ITERATIONS, settings.prior)
    codes, poses = rough.best(settings.kept)
    return gauss_newton(model, cue, poses, codes, FINAL_ITERATIONS, settings.prior)


def missed_by(posed: Posed, volumes: Float[Tensor, "b 1 n n n"], poses: Float[Tensor, "b 4"]) -> Float[Tensor, " b"]:
    """By how much every shape at its pose misses the cue, squared, in units that are the same for all.

    In voxels of their own, larger cubes would miss less. Where the cue is doubtful, no point counts for much.
    """
    square = (posed.misses(volumes, poses) * poses[:, 3:].exp() / posed.unit_mm) ** 2
    return (torch.log1p(square) if posed.cue.doubtful else square).sum(dim=1)


# The nearest training shape -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Nearest:
    """Training shapes and mirror images of left and right ones, and averages over 16³ voxels to compare quickly."""

    data: ShapeDataset
    numbers: tuple[int, ...]
    mirrored: tuple[bool, ...]
    coarse: Float[Tensor, "n 1 c c c"]
    size_mean: float
    size_deviation: float

    @torch.no_grad()
    def complete(self, cue: Cue, told: Told, seed: int = 0) -> tuple[Shape, ...]:
        """The training shape, of the category if it is told, that misses the cue least after its pose was fitted."""
        places = [k for k, i in enumerate(self.numbers) if told is None or self.data.rows[i].category == told[0]]
        first, poses = self._shortlist(cue, self.coarse[places], seed)
        places = [places[k] for k in first.tolist()]
        shortlist = [self.numbers[k] for k in places]
        x = lowered(self.data, shortlist, min(SIDE, self.data.size))
        turned = torch.tensor([self.mirrored[k] for k in places])[:, None, None, None, None]
        model = self._model(torch.where(turned, x.flip(2), x))
        log_mm = torch.tensor([np.log(self.data.rows[i].voxel_mm) for i in shortlist]).float()
        one_hot = torch.cat([torch.eye(len(shortlist)), model.size_of(log_mm)[:, None]], dim=1)
        z0 = F.pad(one_hot, (0, model.plan.text_channels))[..., None, None, None]
        posed = Posed(model, thinned(cue, FIT_POINTS, seed), poses)
        for _ in range(POSE_CALLS):
            posed(z0)
        best = int(posed.cost(z0).argmin())
        sdf = self.data.sdf(shortlist[best])
        return (shape_at(sdf[::-1] if self.mirrored[places[best]] else sdf, posed.pose[best].numpy()),)

    def _shortlist(self, cue: Cue, coarse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Places of the shapes that miss the cue least at one of the first poses, and that pose."""
        poses = first_poses(cue, self.data.size, COARSE_POSES, seed)
        posed = Posed(self._model(coarse[:1]), thinned(cue, COARSE_POINTS, seed), poses)
        costs = [missed_by(posed, coarse, pose.expand(len(coarse), -1)) for pose in poses]
        cost, which = torch.stack(costs, dim=1).min(dim=1)
        order = cost.argsort()[:SHORTLIST]
        return order, poses[which[order]]

    def _model(self, volumes: Float[Tensor, "n 1 m m m"]) -> ShapeModel:
        """Shapes as a model: the code of each is 1 where the others' are 0."""
        n, side = len(volumes), volumes.shape[-1]
        plan = ShapePlan("nearest", {"any": ()}, self.data.size, side, n, 1, 8, 1, self.size_mean, self.size_deviation)
        model = build_shapes_model(plan)
        model.autoencoder.modes.copy_(volumes.flatten(1))
        return model


def nearest(data: ShapeDataset) -> Nearest:
    """The training part, mirror images included."""
    numbers = data.part("train")
    rows, coarse, _ = training_shapes(data, COARSE)
    place = {data.ids[i]: i for i in numbers}
    log_mm = np.array([np.log(row.voxel_mm) for row in rows])
    mirrored = tuple(k >= len(numbers) for k in range(len(rows)))
    return Nearest(
        data, tuple(place[row.id] for row in rows), mirrored, coarse,
        float(log_mm.mean()), max(float(log_mm.std()), 0.05),
    )  # fmt: skip


# Interpolation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interpolation:
    """Signed distances between what was seen, by biharmonic splines (Carr et al., SIGGRAPH 2001)."""

    size: int = 64

    def complete(self, cue: Cue, told: Told, seed: int = 0) -> tuple[Shape, ...]:
        """The zero level of the spline, in a cube of `REACH` times the longest extent seen."""
        volume, poses = interpolated(cue, self.size, seed, REACH)
        return (shape_at(volume[0, 0].numpy(), poses[0].numpy()),)
