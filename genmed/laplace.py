"""Where trajectories start: the likeliest shape, size and pose under every Gaussian of a model, and its evidence.

Nobody says what a cue is of, or where in it the structure lies. Each Gaussian of the mixture that the denoiser starts
from answers both in closed form, up to the pose: damped Gauss-Newton steps find the mode of its posterior, and
Laplace's approximation (MacKay, Neural Computation 1992) integrates around it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from genmed.cue import Cue, thinned
from genmed.nets.autoencoder import LinearAutoencoder
from genmed.pose import FARTHEST, SIGMA, SIZE_SIGMA, WORTH, first_poses, sample, sample_slope
from genmed.shape import MARGIN, TRUNCATION
from genmed.shape_model import ShapeModel, ShapePlan, build_shapes_model

POSE_STEPS = 4       # Gauss-Newton steps of poses alone, before all others
STRIDE = torch.tensor([4.0, 4.0, 4.0, 0.15])  # largest step of a pose: units of the box, ln voxel_mm
KNOWN = 8.0          # standard deviations of ln voxel_mm beyond which a size is as unlikely as any other
TRIAL_RANK, TRIAL_POINTS, TRIAL_STEPS = 24, 300, 4  # of every structure that a cue might be of
BOX_POSES, PLACED_POSES = 2, 3  # first poses: by the cue's box, and by the size that is usual for the structure
PLACES, PLACE_POINTS = 5, 150   # places along every axis where the usual shape is held against a cue
KEPT = 5             # suppositions that are gone on with
FIT_POINTS, FIT_STEPS, FINAL_STEPS = 1500, 8, 3
STRANGE = 30.0       # logarithm of how seldom a cue is of nothing that the model knows
WEAK = 1e-3          # precision of centres and sizes that nothing is known of: a pose that misses no bound is free
UNLIKELY = 30.0      # by how much the logarithm of a weight may be below the best, words included, to be tried


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


@dataclass(frozen=True, eq=False)
class Supposition:
    """What a cue is of, by the number of the Gaussian; its likeliest field `shape` and pose; −2 ln of its evidence."""

    number: int
    shape: Float[Tensor, " c"]
    pose: Float[Tensor, " 4"]
    evidence: float


@torch.no_grad()
def suppositions(model: ShapeModel, cue: Cue, text: Float[Tensor, " d"] | None, seed: int = 0) -> list[Supposition]:
    """The likeliest structures and poses of a cue, best first.

    Every Gaussian is tried with few points and principal axes, but for those that the text (a value of that field)
    rules out. The best are fitted to the whole cue.
    """
    mixture, weight = model.mixture, model.mixture.log_weight
    if text is not None:
        variance = mixture.variance[:, 1:]
        weight = weight - ((text - model.words) ** 2 / variance + variance.log()).sum(1) / 2
    weight = weight - weight.max()
    worth = (weight > -UNLIKELY).nonzero()[:, 0].tolist()
    weight[-1] -= STRANGE
    rough, tried = thinned(cue, TRIAL_POINTS, seed), []
    for number in worth:
        gaussian = _rough(model, number)
        starts = torch.cat([first_poses(cue, model.plan.size, BOX_POSES, seed), placed(gaussian, cue, seed)])
        fit = gauss_newton(gaussian, rough, starts, torch.zeros(len(starts), gaussian.plan.modes), TRIAL_STEPS)
        tried.append((float(fit.evidence.min() - 2 * weight[number]), number, fit))
    found = []
    for _, number, trial in sorted(tried, key=lambda entry: entry[0])[:KEPT]:
        gaussian = component(model, number)
        codes, poses = trial.best(3)
        codes = F.pad(codes, (0, gaussian.plan.modes - codes.shape[1]))
        fit = gauss_newton(gaussian, thinned(cue, FIT_POINTS, seed), poses, codes, FIT_STEPS)
        codes, poses = fit.best(1)
        fit = gauss_newton(gaussian, cue, poses, codes, FINAL_STEPS)
        shape = mixture.mean[number, : model.plan.modes] + spread(model, number) @ fit.codes[0]
        found.append(Supposition(number, shape, fit.poses[0], float(fit.evidence[0] - 2 * weight[number])))
    return sorted(found, key=lambda supposition: supposition.evidence)


def component(model: ShapeModel, number: int, rank: int | None = None) -> ShapeModel:
    """One Gaussian of the mixture, in its first principal axes, as a model with an autoencoder of its own.

    Its codes have unit variance; its network is unused.
    """
    whole, mixture, modes = model.autoencoder, model.mixture, model.plan.modes
    axes = spread(model, number)[:, :rank]
    autoencoder = LinearAutoencoder(whole.side, axes.shape[1])
    autoencoder.mean.copy_(whole.mean + (mixture.mean[number, :modes] * whole.deviation) @ whole.modes)
    autoencoder.modes.copy_((axes * whole.deviation[:, None]).T @ whole.modes)
    deviation = model.plan.size_deviation * float(mixture.variance[number, 0].sqrt())
    usual = float(model.log_voxel_mm(mixture.mean[number, modes]))
    plan = ShapePlan(
        "gaussian", {"any": ()}, model.plan.size, whole.side, axes.shape[1], 1, 8, 1, usual, deviation
    )  # fmt: skip
    return dataclasses.replace(build_shapes_model(plan), autoencoder=autoencoder)


@lru_cache(maxsize=64)
def _rough(model: ShapeModel, number: int) -> ShapeModel:
    """A component for trials, kept for the next cue."""
    return component(model, number, TRIAL_RANK)


def spread(model: ShapeModel, number: int) -> Float[Tensor, "c r"]:
    """Principal axes of one Gaussian in the field `shape`, each as long as its standard deviation."""
    mixture = model.mixture
    return (mixture.modes[number] * (mixture.values[number] + mixture.floor[number]).sqrt()[:, None]).T


def placed(gaussian: ShapeModel, cue: Cue, seed: int) -> Float[Tensor, "n 4"]:
    """Poses at which the usual shape, at its usual size, misses a cue least.

    Needed where the structure goes on beyond what was seen of it.
    """
    size, usual = gaussian.plan.size, gaussian.plan.size_mean
    steps = np.linspace(-0.35, 0.35, PLACES) * size * np.exp(usual)
    centres = cue.box_mm.mean(axis=0) + np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    poses = torch.from_numpy(np.pad(centres, ((0, 0), (0, 1)), constant_values=usual)).float()
    objective = Objective(gaussian, thinned(cue, PLACE_POINTS, seed), 1.0)
    cost = objective.cost(torch.zeros(1, gaussian.plan.modes).expand(len(poses), -1), poses)
    return poses[cost.argsort()[:PLACED_POSES]]


class Objective:
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
        square = missed**2 / (1 + (missed / self.own) ** 2) if self.cue.doubtful else missed**2
        size = self.model.size_of(poses[:, 3]).clamp(-KNOWN, KNOWN)
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
        known = (self.model.size_of(poses[:, 3]).abs() < KNOWN).float()
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
        d, slope = sample(volume, q, model.plan.size), sample_slope(volume, q, model.plan.size)
        scale = poses[:, 3:].exp() / self.unit_mm
        by_size = (d - clamped - (slope * q).sum(2)) * scale
        trusted = (1 + (missed / self.own) ** 2).reciprocal() if self.cue.doubtful else torch.ones_like(missed)
        weight = trusted / self.sigma
        hessians, slopes = [], []
        share = self.share(poses)
        for b, pose in enumerate(poses):
            active = missed[b] != 0
            w = weight[b, active, None]
            columns = [-slope[b, active], by_size[b, active, None]]
            if not posing:
                columns.insert(0, _rows(self.basis, q[b, active], model) * scale[b])
            a = w * torch.cat(columns, dim=1)
            inner = torch.cat([torch.full((k,), self.prior), torch.full((3,), WEAK), share[b, None].clamp(min=WEAK)])
            pull = torch.cat([self.prior * codes[b, :k], torch.zeros(3), share[b] * (pose[3:] - model.plan.size_mean)])
            hessians.append(a.T @ a + torch.diag(inner))
            slopes.append(a.T @ (w[:, 0] * missed[b, active]) + pull)
        return torch.stack(hessians), torch.stack(slopes)


@torch.no_grad()
def gauss_newton(
    model: ShapeModel, cue: Cue, poses: Tensor, codes: Float[Tensor, "b k"], iterations: int, prior: float = 1.0
) -> Fit:
    """Damped Gauss-Newton steps of codes and poses together; the first ones are of the poses alone.

    The evidence is Laplace's approximation: the objective, the logarithm of the determinant of its Hessian, and minus
    those of the precisions of codes and size before the cue was seen (one of 0 says nothing). The middle of the cue is
    anywhere in the cube of the shape, whose volume counts therefore.
    """
    objective, k = Objective(model, cue, prior), codes.shape[1]
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
    logarithm = logarithm - torch.where(share > 0, share, 1.0).log() + 6 * poses[:, 3]
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
