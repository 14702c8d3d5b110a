"""Complete a structure from what was seen of it: `complete(model, cue) -> Completion`; and `generate` from words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from genmed.cue import Cue, likely, spline, with_sides
from genmed.errors import GenMedError
from genmed.fields import Field, Fields
from genmed.guide import consistent, guided, retry
from genmed.laplace import Supposition, suppositions
from genmed.mesh import Mesh, surface
from genmed.pose import Posed, sample
from genmed.samplers import euler, heun, noise, schedule, seeded
from genmed.shape import MARGIN, TRUNCATION, Shape, encode
from genmed.shape_model import ShapeModel
from genmed.tasks.segment import Interval
from genmed.volume import Grid

STEPS = 8       # noise levels of a trajectory
START_SIGMA = 3.0  # of them the first: large enough that samples differ, small enough that poses hold
GENERATED_STEPS = 16
POSED_BELOW = 1.0  # noise level from which poses are fitted: louder estimates are blurred, and seem too small
BLUR = 0.3      # noise level at which trajectories are compared
RELAX = 1.0     # of the guide's line search
LENGTH = 4.0    # voxels: how far what a sample missed of the cue is believed to reach
AMPLITUDE = 1.0
GP_SIGMA = 0.1  # voxels
GP_ITERATIONS = 12
VOLUME_SIGMA = 0.02  # of ln volume: how closely a trajectory is steered to a stated one
BELIEVED = 2.0  # voxels of the cube: a smooth border that lies no further from the completed one is taken as it is
SPLINE_SIDE = 48  # points of a spline along the sides of its cube
AGREED = 0.4    # overlap of a doubtful cue with its completion, below which the model knows nothing like it

Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Completion:
    """What `complete` found: `shapes` of all kept samples, of least energy first, in world mm.

    `residual` is the root mean square of what the first sample misses of the cue, in mm. `volume_ml` is an interval
    over samples if there are at least two. `unlike`: nothing that the model knows agrees with a doubtful cue, which was
    then taken as it is: there is one shape, and no model in it.
    """

    shapes: tuple[Shape, ...]
    residual: float
    volume_ml: Interval | None
    seconds: float
    seed: int
    unlike: bool = False

    def probability(self, grid: Grid) -> Float[np.ndarray, "x y z"]:
        """Share of every voxel of a grid that is inside, averaged over samples."""
        return self._mean(np.clip(0.5 - _on(shape, grid) / shape.voxel_mm, 0, 1) for shape in self.shapes)

    def distance_mm(self, grid: Grid) -> Float[np.ndarray, "x y z"]:
        """Mean truncated signed distance on a grid."""
        return self._mean(_on(shape, grid) for shape in self.shapes)

    def _mean(self, each: Iterable[Float[np.ndarray, "x y z"]]) -> Float[np.ndarray, "x y z"]:
        """One after the other: a grid may have a hundred million voxels."""
        return np.asarray(reduce(np.add, each) / np.float32(len(self.shapes)))

    def mesh(self) -> Mesh:
        """The surface of the mean distance, in world mm."""
        first = self.shapes[0].grid
        low, high = (np.stack([f(s.grid.corners_mm(), axis=0) for s in self.shapes]) for f in (np.min, np.max))
        step = self.shapes[0].voxel_mm
        shape = np.ceil((high.max(axis=0) - low.min(axis=0)) / step).astype(int)
        affine = first.affine.copy()
        affine[:3, 3] = low.min(axis=0) + step / 2
        x, y, z = (int(n) for n in shape)
        return surface(self.distance_mm(Grid((x, y, z), affine)), affine)


def complete(
    model: ShapeModel,
    cue: Cue,
    *,
    text: Float[Tensor, " d"] | None = None,
    samples: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> Completion:
    """Draw shapes that agree with a cue; box, scale and pose come from the cue alone.

    What the cue may be of, and where, is settled first, in closed form (`genmed.laplace.suppositions`). Trajectories
    start from the likeliest suppositions, as often as the evidence says, and are guided by the cue. What they still
    miss of it is added as a Gaussian process. A doubtful map that hardly overlaps with its completion, and not because
    of noise, is interpolated instead: what the model does not know, it shall not rub out.

    Args:
        text: sentence embedding of a caption (`genmed.text.embed`). None: samples need not be of the same structure.
        samples: how many are drawn; those of least energy come first.
        progress: called with the finished share.

    Raises:
        GenMedError: for fewer samples than 1.
        Diverged: where trajectories leave the range of the data even with small steps.
    """
    started = time.monotonic()
    if samples < 1:
        raise GenMedError(f"samples {samples}: must be 1 or more.")
    cue = with_sides(cue, seed)
    expected = likely(cue)
    spoken = None if text is None else model.text_of(text[None])[0]
    found = suppositions(model, expected, spoken, seed)
    z0, poses, words = starts(model, found, spoken, samples)
    z0, posed = draw(model, expected, z0, poses, words, seed, progress=progress)
    order = energy(z0, posed).argsort()
    codes = z0[order][:, model.fields.slice("shape")].flatten(1)
    volume = model.decode(codes, words[order])
    posed = Posed(model, cue, posed.pose[order])
    volume = believed(honoured(volume, posed), posed)
    unlike = cue.doubtful and cue.border is not None and agreement(volume[:1], posed) < AGREED
    if unlike:
        volume, pose = interpolated(cue, model.plan.size, seed)
        posed = Posed(model, replace(cue, doubtful=False), pose)
        volume = believed(honoured(volume, posed), posed)
        shapes = shapes_at(volume, pose, [True])
    else:
        shapes = shapes_at(volume, posed.pose, model.scaled(codes, words[order], BLUR))
    if progress:
        progress(1.0)
    missed = float((posed.misses(volume[:1], posed.pose[:1]) ** 2).mean().sqrt() * posed.pose[0, 3].exp())
    return Completion(shapes, missed, _interval(shapes), time.monotonic() - started, seed, unlike)


def starts(
    model: ShapeModel, found: Sequence[Supposition], text: Float[Tensor, " d"] | None, count: int
) -> tuple[Float[Tensor, "n c 1 1 1"], Float[Tensor, "n 4"], Float[Tensor, "n d"]]:
    """Fields, poses and words (NaN: none) of so many trajectories: suppositions by their share of the evidence."""
    evidence = torch.tensor([supposition.evidence for supposition in found])
    share = (-(evidence - evidence.min()) / 2).softmax(dim=0).cumsum(0)
    places = (torch.arange(count) + 0.5) / count
    chosen = [found[min(i, len(found) - 1)] for i in torch.searchsorted(share, places).tolist()]
    words = model.words.clone()
    words[-1] = torch.nan
    spoken = torch.stack([words[s.number] if text is None else text for s in chosen])
    poses, shapes = torch.stack([s.pose for s in chosen]), torch.stack([s.shape for s in chosen])
    parts = {"shape": shapes, "size": model.size_of(poses[:, 3:]), "text": spoken.nan_to_num(0.0)}
    return model.fields.join({name: x[..., None, None, None] for name, x in parts.items()}), poses, spoken


def draw(
    model: ShapeModel,
    cue: Cue,
    start: Float[Tensor, "n c 1 1 1"],
    poses: Float[Tensor, "n 4"],
    words: Float[Tensor, "n d"],
    seed: int,
    *,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "n c 1 1 1"], Posed]:
    """Guided trajectories from noisy fields and poses, given words (none where they are NaN): where they ended."""
    fields, plan = model.fields, model.plan
    count = len(poses)
    silent = words.isnan().any(dim=1)
    spoken = words.nan_to_num(0.0)[..., None, None, None]
    last: list[Posed] = []

    def trajectory(scale: float) -> Tensor:
        posed = Posed(model, cue, poses)
        last[:] = [posed]

        def denoise(z: Tensor, sigma: float) -> Tensor:
            posed.fixed = sigma > POSED_BELOW
            levels = torch.full((count, len(fields)), sigma)
            levels[:, fields.index("size")] = torch.where(posed.knows_size > 0, sigma, plan.sigma_max)
            levels[:, fields.index("text")] = torch.where(silent, plan.sigma_max, 0.0)
            return model.denoiser(fields.join(fields.split(z) | {"text": spoken}), levels)

        generators = seeded([seed * 1_000_003 + i for i in range(count)])
        z = start + START_SIGMA * noise(torch.zeros_like(start), generators)
        steered = guided(denoise, fields, posed, relax=RELAX, scale=scale)

        def report(step: int, sigma: float, z: Tensor, z0_hat: Tensor) -> None:
            if progress:
                progress((step + 1) / (STEPS + 2))

        return euler(steered, z, schedule(START_SIGMA, plan.sigma_min, STEPS), callback=report)

    z0 = retry(trajectory)
    last[0](z0)  # once more: the pose of the final estimate
    return z0, last[0]


@torch.no_grad()
def generate(
    model: ShapeModel,
    count: int,
    *,
    text: Float[Tensor, " e"] | None = None,
    volume_ml: float | None = None,
    seed: int = 0,
) -> tuple[Shape, ...]:
    """Draw complete shapes around the world's origin, of a caption's sentence embedding or of whatever is known.

    A volume is one more observation: trajectories are steered to it, and what is left of the difference is a matter of
    the size. Without one, shapes of a structure whose training shapes had no size in mm are not `scaled`. Raises
    `GenMedError` for fewer shapes than 1 and volumes that are not above 0.
    """
    if count < 1:
        raise GenMedError(f"count {count}: must be 1 or more.")
    if volume_ml is not None and not 0 < volume_ml < float("inf"):
        raise GenMedError(f"volume {volume_ml:g} ml: must be above 0.")
    fields, plan = model.fields, model.plan
    words = torch.zeros(1, plan.text_channels) if text is None else model.text_of(text[None])
    level = torch.tensor([0.0, 0.0, plan.sigma_max if text is None else 0.0])

    def denoise(z: Tensor, sigma: float) -> Tensor:
        parts = fields.split(z) | {"text": words[..., None, None, None].expand(len(z), -1, -1, -1, -1)}
        levels = (level + torch.tensor([sigma, sigma, 0.0])).expand(len(z), -1)
        return model.denoiser(fields.join(parts), levels)

    def trajectory(scale: float) -> Tensor:
        generators = seeded([seed * 1_000_003 + i for i in range(count)])
        z = plan.sigma_max * noise(torch.zeros(count, fields.channels, 1, 1, 1), generators)
        steps = denoise if volume_ml is None else guided(denoise, fields, _held(model, volume_ml), scale=scale)
        return heun(steps, z, schedule(plan.sigma_max, plan.sigma_min, GENERATED_STEPS))

    drawn = fields.split(retry(trajectory))
    codes = drawn["shape"].flatten(1)
    volume = model.decode(codes, None if text is None else words.expand(count, -1))
    log_mm = model.log_voxel_mm(drawn["size"].flatten(1))
    poses = torch.cat([torch.zeros(count, 3), log_mm], dim=1)
    spoken = (words if text is not None else torch.full_like(words, torch.nan)).expand(count, -1)
    shapes = shapes_at(volume, poses, model.scaled(codes, spoken, BLUR))
    return shapes if volume_ml is None else tuple(resized(shape, volume_ml) for shape in shapes)


def _held(model: ShapeModel, volume_ml: float) -> Callable[[Tensor], Callable[[Tensor], Float[Tensor, "b 1"]]]:
    """The residual of a stated volume, as `genmed.guide.guided` takes it: ln of what a draw holds over ln of it."""
    step = model.plan.size / model.autoencoder.side  # voxels of the cube in one of the autoencoder's

    def residual(z0: Tensor) -> Tensor:
        parts = model.fields.split(z0)
        inside = (0.5 - model.autoencoder.decode(parts["shape"].flatten(1)) / step).clamp(0, 1)
        held = inside.flatten(1).sum(1, keepdim=True).clamp(min=1.0).log() + 3 * float(np.log(step))
        log_ml = held + 3 * model.log_voxel_mm(parts["size"].flatten(1)) - float(np.log(1000))
        return (float(np.log(volume_ml)) - log_ml) / VOLUME_SIGMA

    return lambda z0: residual


def resized(shape: Shape, volume_ml: float) -> Shape:
    """A shape around the origin at the size at which its surface holds this volume."""
    try:
        larger = (volume_ml / shape.to_mesh().volume_ml) ** (1 / 3)
    except GenMedError:  # a rare draw that encloses nothing
        return shape
    x, y, z = shape.origin_mm
    return replace(
        shape, voxel_mm=larger * shape.voxel_mm, origin_mm=(larger * x, larger * y, larger * z), scaled=True
    )


def energy(z0: Float[Tensor, "b c 1 1 1"], posed: Posed) -> Float[Tensor, " b"]:
    """By how much a trajectory misses the cue (`Posed.cost`), and how unusual its shape and size are, words aside.

    Minus twice the logarithm of the posterior, up to a constant, under the whole mixture that the denoiser starts from,
    blurred by `BLUR`. Where the cue leaves much open, all trajectories meet it, and the second part decides.
    """
    hidden = torch.zeros(z0.shape[:2])
    hidden[:, posed.model.fields.slice("text")] = 1
    return posed.cost(z0) - 2 * posed.model.mixture.log_density(z0.flatten(1), torch.full_like(hidden, BLUR), hidden)


def honoured(volume: Float[Tensor, "b 1 n n n"], posed: Posed) -> Float[Tensor, "b 1 n n n"]:
    """Distances with what is still missed of the cue added as a Gaussian process (`genmed.guide.consistent`).

    A doubtful cue is taken as exact to its own fineness only.
    """
    sdf = Fields(Field("sdf", "continuous", ("sdf",)))
    own = (posed.cue.voxel_mm / posed.pose[:, 3:].exp()).clamp(min=1.0)
    sigma = own if posed.cue.doubtful else torch.full_like(own, GP_SIGMA)

    def fit(at: Tensor) -> Callable[[Tensor], Tensor]:
        residual = posed.of_volume(at)
        return lambda volume: residual(volume) / sigma

    for _ in range(2):  # bounds that were kept before may be left by the first correction
        volume = consistent(volume, sdf, fit, length=LENGTH, amplitude=AMPLITUDE, iterations=GP_ITERATIONS)
    return volume


def agreement(volume: Float[Tensor, "1 1 n n n"], posed: Posed) -> float:
    """Dice coefficient of what the cue says is inside and what the first completion has inside, at the cue's points."""
    q = (posed.points - posed.pose[0, :3]) / posed.pose[0, 3].exp()
    found = sample(volume, q[None], posed.model.plan.size)[0] < 0
    inside, outside = (posed.upper <= 0) & (posed.lower < 0), (posed.lower >= 0) & (posed.upper > 0)
    both, either = (found & inside).sum(), inside.sum() + (found & (inside | outside)).sum()
    return float(2 * both / either.clamp(min=1))


def interpolated(
    cue: Cue, size: int, seed: int = 0, reach: float = MARGIN
) -> tuple[Float[Tensor, "1 1 n n n"], Float[Tensor, "1 4"]]:
    """A spline through a cue (`genmed.cue.spline`) in a cube of `reach` times the longest extent seen, and its pose."""
    middle, longest = cue.box_mm.mean(axis=0), float(np.ptp(cue.box_mm, axis=0).max())
    axis = (np.arange(SPLINE_SIDE) - (SPLINE_SIDE - 1) / 2) * (reach * longest / SPLINE_SIDE)
    grid = np.stack(np.meshgrid(*[axis] * 3, indexing="ij"), axis=-1).reshape(-1, 3) + middle
    voxel_mm = reach * longest / size
    found = torch.from_numpy(spline(cue, seed)(grid)).float().reshape((1, 1) + (SPLINE_SIDE,) * 3) / voxel_mm
    volume = F.interpolate(found, size=(size,) * 3, mode="trilinear", align_corners=False)
    return volume.clamp(-TRUNCATION, TRUNCATION), torch.from_numpy(np.append(middle, np.log(voxel_mm))[None]).float()


def believed(volume: Float[Tensor, "b 1 n n n"], posed: Posed) -> Float[Tensor, "b 1 n n n"]:
    """Distances to the border of a label map, as it was seen, near the completed surface.

    Where a doubtful map and the completed surface are `BELIEVED` apart or more, it does not belong, or is missing. Cues
    without a border change nothing.
    """
    from scipy.spatial import cKDTree

    if (border := posed.cue.border) is None:
        return volume
    tree, reach = cKDTree(border.points_mm), posed.cue.voxel_mm
    found = volume.clone()
    for sdf, pose in zip(found[:, 0].numpy(), posed.pose.double().numpy(), strict=True):
        near = np.abs(sdf) < BELIEVED
        voxel_mm = float(np.exp(pose[3]))
        places = (np.argwhere(near) - (len(sdf) - 1) / 2) * voxel_mm + pose[:3]
        away, which = tree.query(places, k=8, distance_upper_bound=reach)
        weight = np.where(np.isfinite(away), reach - away, 0.0)
        distance = np.append(border.distance_mm, 0.0)[which] / voxel_mm
        shown = (weight * distance).sum(axis=1) / weight.sum(axis=1).clip(min=1e-9)
        own = sdf[near]
        kept = (weight.sum(axis=1) > 0) & ((np.abs(shown - own) < BELIEVED) | (not posed.cue.doubtful))
        sdf[near] = np.where(kept, shown, own)
    return found


def shapes_at(
    volumes: Float[Tensor, "b 1 n n n"], poses: Float[Tensor, "b 4"], scaled: Sequence[bool]
) -> tuple[Shape, ...]:
    """`shape_at` of every row, with whether its size is known in mm."""
    rows = zip(volumes[:, 0].numpy(), poses.numpy(), scaled, strict=True)
    return tuple(replace(shape_at(volume, pose), scaled=known) for volume, pose, known in rows)


def shape_at(volume: Float[np.ndarray, "n n n"], pose: Float[np.ndarray, 4]) -> Shape:
    """Distances in voxels of a cube, at a pose (centre_mm, ln voxel_mm)."""
    voxel_mm = float(np.exp(pose[3]))
    x, y, z = (float(v) for v in pose[:3] - voxel_mm * (len(volume) - 1) / 2)
    return Shape(encode(volume), voxel_mm, (x, y, z))


def _on(shape: Shape, grid: Grid) -> Float[np.ndarray, "x y z"]:
    """Distances in mm on another grid; beyond the cube, far outside."""
    from scipy.ndimage import affine_transform

    to_cube = np.linalg.inv(shape.grid.affine) @ grid.affine
    corners = np.linalg.inv(grid.affine) @ np.c_[shape.grid.corners_mm(), np.ones(8)].T
    first = np.clip(np.floor(corners[:3].min(axis=1)).astype(int) - 1, 0, grid.shape)
    last = np.clip(np.ceil(corners[:3].max(axis=1)).astype(int) + 2, first, grid.shape)
    found = np.full(grid.shape, TRUNCATION * shape.voxel_mm, np.float32)
    if (last > first).all():
        x, y, z = map(slice, first, last)
        start = to_cube[:3, :3] @ first + to_cube[:3, 3]
        found[x, y, z] = shape.voxel_mm * affine_transform(
            shape.distance, to_cube[:3, :3], start, tuple(last - first), order=1, mode="constant", cval=TRUNCATION
        )
    return found


def _interval(shapes: Sequence[Shape]) -> Interval | None:
    if len(shapes) < 2:
        return None
    volumes = [shape.volume_ml for shape in shapes]
    low, high = np.quantile(volumes, [0.025, 0.975])
    return Interval(float(np.mean(volumes)), float(low), float(high))
