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
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from genmed.cue import Cue, spline, thinned, with_sides
from genmed.data.shapes import ShapeDataset
from genmed.nets.autoencoder import LinearAutoencoder, principal_components
from genmed.pose import FARTHEST, SIGMA, SIZE_SIGMA, WORTH, Posed, first_poses, sample
from genmed.shape import MARGIN, TRUNCATION, Shape
from genmed.shape_model import KNOWN_SIZE, ShapeModel, ShapePlan, build_shapes_model
from genmed.tasks.complete import honoured, shape_at
from genmed.train_shapes import SIDE, lowered, training_shapes

MODES = 200          # at most, of every statistical model
STARTS = 12          # poses that a statistical model is fitted from
FIT_POINTS = 1500    # of the cue while poses and codes are looked for; all count in the end
ITERATIONS = 12      # Gauss-Newton steps from every start
POSE_STEPS = 4       # of which the first are of poses alone
STRIDE = torch.tensor([4.0, 4.0, 4.0, 0.15])  # largest step of a pose: units of the box, ln voxel_mm
FINAL_ITERATIONS = 4  # of the best starts, with all points
TRIAL = (3, 5, 400)  # starts, steps and points by which categories are compared before the best are fitted
CANDIDATES = 3       # of all categories that are fitted in the end
COARSE = 16          # voxels a side by which training shapes are compared first
COARSE_POINTS, COARSE_POSES = 200, 4
SHORTLIST = 24       # training shapes whose pose is fitted
POSE_CALLS = 8
RBF_SIDE = 48        # voxels a side of the interpolation's cube
REACH = 2.2          # side of the interpolation's cube over the longest extent seen

Told = tuple[str, str] | None


# Statistical shape models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class PcaSettings:
    """What is chosen on the tune part: `genmed.bench.shape_solvers.chosen_pca`.

    `prior` weighs the codes against the cue, `sided` fits left and right apart, `kept` starts are averaged, and
    `pooled` is how a structure that is not told is looked for: in one model of all shapes, or in every model.
    """

    modes: int = MODES
    prior: float = 1.0
    sided: bool = False
    kept: int = 1
    pooled: bool = False


@dataclass(frozen=True, eq=False)
class Statistical:
    """PCA shape models by (category, side) and one of all shapes, under ("", "")."""

    models: Mapping[tuple[str, str], ShapeModel]
    settings: PcaSettings

    def complete(self, cue: Cue, told: Told, seed: int = 0) -> tuple[Shape, ...]:
        """The shapes of highest evidence, with what they still miss of the cue added by a Gaussian process."""
        cue = with_sides(cue, seed)
        best = sorted((fitted(model, cue, self.settings, seed) for model in self._candidates(cue, told, seed)),
                      key=lambda fit: float(fit.evidence[0]))[0]  # fmt: skip
        volume = best.model.autoencoder.decode(best.codes, best.model.plan.size)
        volume = honoured(volume, Posed(best.model, cue, best.poses))
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
                fit = gauss_newton(model, rough, self.settings.prior, first_poses(cue, model.plan.size, starts, seed),
                                   torch.zeros(starts, model.plan.modes), iterations)  # fmt: skip
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


@dataclass(frozen=True, eq=False)
class Fit:
    """Codes and poses of several starts; minus twice the logarithms of posterior and evidence, up to constants."""

    model: ShapeModel
    codes: Float[Tensor, "b k"]
    poses: Float[Tensor, "b 4"]
    cost: Float[Tensor, " b"]
    evidence: Float[Tensor, " b"]

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """Codes and poses of the starts of highest evidence."""
        order = self.evidence.argsort()[:count]
        return self.codes[order], self.poses[order]


@torch.no_grad()
def fitted(model: ShapeModel, cue: Cue, settings: PcaSettings, seed: int = 0) -> Fit:
    """Fit from several starts to a part of the points, then the best of them to all."""
    starts = first_poses(cue, model.plan.size, STARTS, seed)
    zero = torch.zeros(STARTS, model.plan.modes)
    rough = gauss_newton(model, thinned(cue, FIT_POINTS, seed), settings.prior, starts, zero, ITERATIONS)
    codes, poses = rough.best(settings.kept)
    return gauss_newton(model, cue, settings.prior, poses, codes, FINAL_ITERATIONS)


class _Objective:
    """Minus twice the logarithm of the posterior of codes and poses.

    The likelihood is that of `genmed.pose.Posed`, but for two things. A miss is measured in voxels of the cue's box,
    not of the shape's cube: without a network that knows better, larger cubes would make all misses smaller. And a
    doubtful cue is taken as exact to its own fineness only, as `honoured` takes it.
    """

    def __init__(self, model: ShapeModel, cue: Cue, prior: float) -> None:
        self.model, self.cue, self.prior = model, cue, prior
        self.points, self.lower, self.upper = (
            torch.from_numpy(x).float() for x in (cue.points_mm, cue.lower_mm, cue.upper_mm)
        )
        self.unit_mm = MARGIN * float(np.ptp(cue.box_mm, axis=0).max()) / model.plan.size
        self.own = max(1.0, cue.voxel_mm / self.unit_mm) if cue.doubtful else 1.0
        self.sigma = self.own * SIGMA * max(1.0, len(self.points) / WORTH) ** 0.5
        self.basis = (model.autoencoder.modes * model.autoencoder.deviation[:, None]).float().T.contiguous()

    def cost(self, codes: Tensor, poses: Tensor) -> Float[Tensor, " b"]:
        missed = self.missed(self.model.autoencoder.decode(codes), poses)[0]
        square = self.own**2 * torch.log1p((missed / self.own) ** 2) if self.cue.doubtful else missed**2
        size = self.model.size_of(poses[:, 3]).clamp(-KNOWN_SIZE, KNOWN_SIZE)  # beyond, there is no opinion
        return square.sum(1) / self.sigma**2 + self.prior * (codes**2).sum(1) + size**2 / (1 + SIZE_SIGMA**2)

    def missed(self, volume: Tensor, poses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By how many units every bound is missed, the points in the cubes' voxels, and bounds that were clamped."""
        voxel, far = poses[:, 3:].exp(), FARTHEST * TRUNCATION
        q = (self.points - poses[:, None, :3]) / voxel[..., None]
        low, high = (self.lower / voxel).clamp(max=far), (self.upper / voxel).clamp(min=-far)
        d = sample(volume, q, self.model.plan.size)
        bound = torch.minimum(torch.maximum(d, low), high)
        return (d - bound) * voxel / self.unit_mm, q, (bound.abs() >= far) * bound

    def share(self, poses: Float[Tensor, "b 4"]) -> Float[Tensor, " b"]:
        """Precision of ln voxel_mm before the cue is seen; 0 where there is no opinion."""
        known = (self.model.size_of(poses[:, 3]).abs() < KNOWN_SIZE).float()
        return known / (self.model.plan.size_deviation**2 * (1 + SIZE_SIGMA**2))

    def system(
        self, codes: Tensor, poses: Tensor, posing: bool = False
    ) -> tuple[Float[Tensor, "b p p"], Float[Tensor, "b p"]]:
        """Gauss-Newton Hessians and slopes by codes (unless only `posing`), centre in units and ln voxel_mm.

        A miss in units is (voxel S(q) − bound) / unit, but for bounds that were clamped: they grow with the voxel.
        """
        model, k = self.model, 0 if posing else codes.shape[1]
        volume = model.autoencoder.decode(codes)
        missed, q, clamped = self.missed(volume, poses)
        step = torch.eye(3)
        ahead, behind = (
            torch.stack([sample(volume, q + sign * step[a], model.plan.size) for a in range(3)], dim=2)
            for sign in (1, -1)
        )
        d, slope = sample(volume, q, model.plan.size), (ahead - behind) / 2
        scale = poses[:, 3:].exp() / self.unit_mm
        by_size = (d - clamped - (slope * q).sum(2)) * scale
        weight = ((1 + (missed / self.own) ** 2).rsqrt() if self.cue.doubtful else torch.ones_like(missed)) / self.sigma
        hessians, slopes = [], []
        share = self.share(poses)
        for b, pose in enumerate(poses):
            active = missed[b] != 0
            w = weight[b, active, None]
            columns = [-slope[b, active], by_size[b, active, None]]
            if not posing:
                columns.insert(0, _rows(self.basis, q[b, active], model) * scale[b])
            a = w * torch.cat(columns, dim=1)
            inner = torch.cat([torch.full((k,), self.prior), torch.full((3,), 1e-3), share[b, None]])
            pull = torch.cat([self.prior * codes[b, :k], torch.zeros(3), share[b] * (pose[3:] - model.plan.size_mean)])
            hessians.append(a.T @ a + torch.diag(inner))
            slopes.append(a.T @ (w[:, 0] * missed[b, active]) + pull)
        return torch.stack(hessians), torch.stack(slopes)


@torch.no_grad()
def gauss_newton(
    model: ShapeModel, cue: Cue, prior: float, poses: Tensor, codes: Float[Tensor, "b k"], iterations: int
) -> Fit:
    """Damped Gauss-Newton steps of codes and poses together; the first ones are of the poses alone.

    The evidence is Laplace's approximation: the objective, the logarithm of the determinant of its Hessian, and minus
    those of the precisions of codes and size before the cue was seen (one of 0 says nothing).
    """
    objective, k = _Objective(model, cue, prior), codes.shape[1]
    damping = torch.full((len(codes),), 1e-2)
    cost = objective.cost(codes, poses)
    for iteration in range(iterations + POSE_STEPS):
        alone = iteration < POSE_STEPS
        hessian, slope = objective.system(codes, poses, posing=alone)
        ridge = torch.diag_embed(damping[:, None] * hessian.diagonal(dim1=1, dim2=2))
        move = -torch.linalg.solve(hessian + ridge, slope)
        move = move * (STRIDE / move[:, -4:].abs().clamp(min=1e-9)).clamp(max=1).amin(1, True)
        if alone:
            move = F.pad(move, (k, 0))
        place = torch.cat([move[:, k : k + 3] * objective.unit_mm, move[:, k + 3 :]], dim=1)
        after = objective.cost(codes + move[:, :k], poses + place)
        better = after < cost
        codes = torch.where(better[:, None], codes + move[:, :k], codes)
        poses = torch.where(better[:, None], poses + place, poses)
        cost = torch.where(better, after, cost)
        damping = torch.where(better, damping / 4, damping * 8).clamp(1e-4, 1e3)
    share = objective.share(poses)
    logarithm = torch.logdet(objective.system(codes, poses)[0]) - k * float(np.log(prior))
    logarithm = logarithm - torch.where(share > 0, share, 1.0).log()
    return Fit(model, codes, poses, cost, cost + logarithm)


def _rows(basis: Float[Tensor, "n3 k"], q: Float[Tensor, "m 3"], model: ShapeModel) -> Float[Tensor, "m k"]:
    """Derivatives of the distances at points by the codes: trilinear samples of every mode (`genmed.pose.sample`)."""
    n = model.autoencoder.side
    held = (q * (n / model.plan.size) + (n - 1) / 2).clamp(0, n - 1)
    low = held.floor().clamp(max=n - 2)
    part, first = held - low, low.long()
    corners = torch.tensor(list(product((0, 1), repeat=3)))
    index = first[:, None] + corners
    weights = torch.where(corners.bool(), part[:, None], 1 - part[:, None]).prod(dim=2)
    flat = (index[..., 0] * n + index[..., 1]) * n + index[..., 2]
    return F.embedding_bag(flat, basis, per_sample_weights=weights, mode="sum")


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
        middle, longest = cue.box_mm.mean(axis=0), float(np.ptp(cue.box_mm, axis=0).max())
        axis = (np.arange(RBF_SIDE) - (RBF_SIDE - 1) / 2) * (REACH * longest / RBF_SIDE)
        grid = np.stack(np.meshgrid(*[axis] * 3, indexing="ij"), axis=-1).reshape(-1, 3) + middle
        found = torch.from_numpy(spline(cue, seed)(grid)).reshape((1, 1) + (RBF_SIDE,) * 3)
        voxel_mm = REACH * longest / self.size
        volume = F.interpolate(found, size=(self.size,) * 3, mode="trilinear", align_corners=False)
        pose = np.append(middle, np.log(voxel_mm))
        return (shape_at((volume[0, 0].numpy() / voxel_mm).clip(-TRUNCATION, TRUNCATION), pose),)
