"""Where a shape lies and how large it is: profiled out at every estimate, as appearance is in `genmed.match`.

A pose is (centre_mm, ln voxel_mm) of the cube. The signed distance that an estimate predicts at the world point p is
voxel_mm · S(q), q = (p − centre) / voxel_mm, with S the decoded distances in voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from genmed.cue import Cue
from genmed.shape import MARGIN, TRUNCATION
from genmed.shape_model import KNOWN_SIZE, ShapeModel

SIGMA = 0.7       # voxels of the shape's cube: how far a single bound may be missed
WORTH = 600       # points at most that count as independent of one another
DOUBT = 1.0       # voxels beyond which a bound of a doubtful cue counts less and less
SIZE_SIGMA = 0.3  # by how many standard deviations size and pose may disagree
OPEN = 1.2        # of its extent that a structure may go on beyond an open face
ITERATIONS = 2    # Levenberg-Marquardt steps a call
FARTHEST = 0.9    # of the truncation: bounds beyond it say no more than that the surface is far


def sample(volume: Float[Tensor, "b 1 n n n"], q: Float[Tensor, "b m 3"], size: int) -> Float[Tensor, "b m"]:
    """Trilinear values at q, in voxels of a cube of size³ from its middle; linear in the volume.

    Beyond the cube, the distance to the cube is added to the closest value.
    """
    n = volume.shape[-1]
    index = q * (n / size) + (n - 1) / 2
    held = index.clamp(0, n - 1)
    beyond = (index - held).norm(dim=2) * (size / n)
    low = held.floor().clamp(max=n - 2)
    part, low = held - low, low.long()
    flat, values = volume.flatten(1), beyond
    x, y, z = low.unbind(dim=2)
    base = (x * n + y) * n + z
    sides = [((1 - t), t) for t in part.unbind(dim=2)]
    for i, j, k in product((0, 1), repeat=3):
        weight = sides[0][i] * sides[1][j] * sides[2][k]
        values = values + weight * flat.gather(1, base + ((i * n + j) * n + k))
    return values


def sample_slope(
    volume: Float[Tensor, "b 1 n n n"], q: Float[Tensor, "b m 3"], size: int
) -> Float[Tensor, "b m 3"]:
    """Derivatives of `sample` by q."""
    n = volume.shape[-1]
    index = q * (n / size) + (n - 1) / 2
    held = index.clamp(0, n - 1)
    beyond = index - held
    low = held.floor().clamp(max=n - 2)
    part, low = held - low, low.long()
    x, y, z = low.unbind(dim=2)
    base, flat = (x * n + y) * n + z, volume.flatten(1)
    corners = [flat.gather(1, base + ((i * n + j) * n + k)) for i, j, k in product((0, 1), repeat=3)]
    cell = torch.stack(corners, dim=-1).unflatten(2, (2, 2, 2))  # (b, m, x, y, z)
    slopes = []
    for axis in range(3):
        weights = [torch.stack([1 - t, t], dim=-1) for t in part.unbind(dim=2)]
        weights[axis] = weights[axis].new_tensor([-1.0, 1.0]).expand_as(weights[axis])
        slopes.append(torch.einsum("bmxyz,bmx,bmy,bmz->bm", cell, *weights))
    within = torch.stack(slopes, dim=2) * (n / size) * (beyond == 0)
    return within + beyond / beyond.norm(dim=2, keepdim=True).clamp(min=1e-9)


def first_poses(cue: Cue, size: int, count: int, seed: int = 0) -> Float[Tensor, "count 4"]:
    """Poses that a cue allows, by its own bounding box alone; the first takes the box as that of the whole structure.

    Others are larger, most of them slightly (a fifth at most, or 2.2 times where an axis was not seen: a section across
    a long structure), and moved within the room that this leaves. Where all axes were seen, they may go on beyond a
    face behind which nothing was seen, by `OPEN` times the box. Matter in excess makes the box of a doubtful cue too
    large, so that they may be smaller by a quarter there.
    """
    low, high = cue.box_mm
    extent = high - low
    generator = Generator().manual_seed(seed)
    spread = torch.rand(count, 4, generator=generator, dtype=torch.float64).numpy()
    spread[0] = [0.5, 0.5, 0.5, 0.0]
    flat = 0.3 * extent.max() > extent  # a plane: nothing is known of this axis
    grown = torch.rand(count, 2, 3, generator=generator, dtype=torch.float64).numpy()
    grown[0] = 0
    if not flat.any():
        grown = OPEN * grown * open_faces(cue) * extent
        low, high = low - grown[:, 0], high + grown[:, 1]
        extent = high - low
    middle = (low + high) / 2
    most = extent.max(axis=-1, keepdims=True)
    longest = most * (2.2 ** spread[:, 3:] if flat.any() else 1.2 ** spread[:, 3:] ** 2)
    if cue.doubtful:
        longest = longest * 0.75 ** spread[:, 3:]
    room = np.abs(longest - extent) * np.where(flat, 0.6, 0.5)
    centre = middle + (spread[:, :3] - 0.5) * room
    return torch.from_numpy(np.concatenate([centre, np.log(MARGIN * longest / size)], axis=1)).float()


def open_faces(cue: Cue) -> Bool[np.ndarray, "2 3"]:
    """Beyond which faces (low, high) of the box of what was seen inside nothing was seen: it may go on there."""
    low, high = cue.box_mm
    reach = 0.1 * (high - low).max()
    points = cue.points_mm
    held = (points >= low) & (points <= high)
    found = np.zeros((2, 3), bool)
    for axis in range(3):
        place = points[held[:, [a for a in range(3) if a != axis]].all(axis=1), axis]
        found[0, axis] = not ((place < low[axis]) & (place > low[axis] - reach)).any()
        found[1, axis] = not ((place > high[axis]) & (place < high[axis] + reach)).any()
    return found


class Posed:
    """The residual of a cue as `genmed.guide.guided` takes it: poses are fitted at an estimate, then frozen.

    Keeps the pose of every sample between calls, so that each starts where the last one ended. The residual holds
    d̂ − clip(d̂, lower, upper) at every point over `sigma`, in voxels of the mean first pose, and, where the model has an
    opinion about such sizes, the disagreement of the field `size` with the pose. What the pose will follow is projected
    out of it (variable projection, Golub and Pereyra 1973). While `fixed`, poses are not fitted, nothing is projected.
    """

    def __init__(self, model: ShapeModel, cue: Cue, poses: Float[Tensor, "b 4"], fixed: bool = False) -> None:
        self.model, self.cue, self.fixed = model, cue, fixed
        self.pose = poses.clone()
        self.points = torch.from_numpy(cue.points_mm).float()
        self.sigma = SIGMA * max(1.0, len(self.points) / WORTH) ** 0.5
        self.lower, self.upper = (torch.from_numpy(b).float() for b in (cue.lower_mm, cue.upper_mm))
        self.unit_mm = poses[:, 3].exp().mean()

    @property
    def knows_size(self) -> Float[Tensor, " b"]:
        """1 where the pose's size is one that the model has an opinion about."""
        return (self.model.size_of(self.pose[:, 3]).abs() < KNOWN_SIZE).float()

    def __call__(self, z0: Float[Tensor, "b c 1 1 1"]) -> Callable[[Tensor], Float[Tensor, "b n"]]:
        volume, size = self._parts(z0)
        if not self.fixed:
            for _ in range(ITERATIONS):
                self._improve(volume, size)
        units = self._units(self.pose)
        weight = self._weights(self.misses(volume) * units) * units / self.sigma
        q, low, high = self._placed(self.pose)
        known = self.knows_size[:, None] / SIZE_SIGMA
        target = self.model.size_of(self.pose[:, 3:])

        def residual(z0: Tensor) -> Tensor:
            volume, size = self._parts(z0)
            missed = _missed(sample(volume, q, self.model.plan.size), low, high)
            r = torch.cat([-weight * missed, known * (target - size)], dim=1)
            return r if self.fixed else r - (follows @ (onto @ r[..., None]))[..., 0]

        if not self.fixed:  # what the pose will follow needs no change of shape: variable projection
            with torch.no_grad():
                by_size = torch.zeros(len(known), 1, 4)
                by_size[:, 0, 3] = known[:, 0] / self.model.plan.size_deviation
                follows = torch.cat([-weight[..., None] * self._slopes(volume)[1], by_size], dim=1)
                onto = torch.linalg.solve(_damped(follows.transpose(1, 2) @ follows), follows.transpose(1, 2))
        return residual

    def of_volume(self, volume: Float[Tensor, "b 1 n n n"]) -> Callable[[Tensor], Float[Tensor, "b n"]]:
        """What is missed as a function of distances instead of codes, in voxels of each cube, the pose as it is."""
        weight = self._weights(self.misses(volume))
        q, low, high = self._placed(self.pose)
        return lambda volume: -weight * _missed(sample(volume, q, self.model.plan.size), low, high)

    def misses(self, volume: Float[Tensor, "b 1 n n n"], pose: Tensor | None = None) -> Float[Tensor, "b n"]:
        """By how many voxels the prediction leaves its bounds at every point."""
        q, low, high = self._placed(self.pose if pose is None else pose)
        return _missed(sample(volume, q, self.model.plan.size), low, high)

    def cost(self, z0: Float[Tensor, "b c 1 1 1"]) -> Float[Tensor, " b"]:
        """What the poses minimise: squared misses (a doubtful cue: saturating), whitened, and the size's share."""
        return self._cost(*self._parts(z0), self.pose)

    def _parts(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """Distances on the autoencoder's grid, and the field `size`."""
        parts = self.model.fields.split(z0)
        return self.model.autoencoder.decode(parts["shape"].flatten(1)), parts["size"].flatten(1)

    def _placed(self, pose: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points in the cube's voxels from its middle, and bounds in its voxels."""
        voxel = pose[:, 3:].exp()
        q = (self.points - pose[:, None, :3]) / voxel[..., None]
        far = FARTHEST * TRUNCATION
        return q, (self.lower / voxel).clamp(max=far), (self.upper / voxel).clamp(min=-far)

    def _weights(self, missed: Tensor) -> Tensor:
        """Square roots of the weights of a Geman-McClure likelihood where the cue is doubtful, else 1."""
        return (1 + (missed / DOUBT) ** 2).reciprocal() if self.cue.doubtful else torch.ones_like(missed)

    def _units(self, pose: Tensor) -> Float[Tensor, "b 1"]:
        """A pose's voxel in units that are the same for all poses, so that no large cube is favoured."""
        return pose[:, 3:].exp() / self.unit_mm

    def _cost(self, volume: Tensor, size: Tensor, pose: Tensor) -> Float[Tensor, " b"]:
        missed = self.misses(volume, pose) * self._units(pose)
        square = missed**2 / (1 + (missed / DOUBT) ** 2) if self.cue.doubtful else missed**2
        apart = (self.model.size_of(pose[:, 3:]) - size) / SIZE_SIGMA
        return square.sum(1) / self.sigma**2 + self.knows_size * (apart**2).sum(1)

    def _slopes(self, volume: Tensor) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n 4"]]:
        """Misses in voxels of the cube, and their derivatives by the pose in units of its voxel."""
        n = self.model.plan.size
        q, low, high = self._placed(self.pose)
        step = torch.eye(3)
        slope = torch.stack(
            [(sample(volume, q + step[a], n) - sample(volume, q - step[a], n)) / 2 for a in range(3)], dim=2
        )
        value = sample(volume, q, n)
        missed = _missed(value, low, high)
        active = (missed != 0).float()[..., None]
        return missed, active * torch.cat([-slope, value[..., None] - (slope * q).sum(2, keepdim=True)], dim=2)

    @torch.no_grad()
    def _improve(self, volume: Tensor, size: Tensor) -> None:
        """One Levenberg-Marquardt step of every sample's four numbers, taken where it helps, halved once if not."""
        missed, jacobian = self._slopes(volume)
        units = self._units(self.pose)
        weight = (self._weights(missed * units) * units / self.sigma)[..., None]
        a, r = weight * jacobian, weight[..., 0] * missed
        normal, right = a.transpose(1, 2) @ a, (a.transpose(1, 2) @ r[..., None])[..., 0]
        share = self.knows_size / (self.model.plan.size_deviation * SIZE_SIGMA) ** 2
        normal[:, 3, 3] += share
        right[:, 3] += share * (self.pose[:, 3] - self.model.log_voxel_mm(size[:, 0]))
        move = -torch.linalg.solve(_damped(normal), right)
        move = move * (torch.tensor([4.0, 4.0, 4.0, 0.15]) / move.abs().clamp(min=1e-9)).clamp(max=1).amin(1, True)
        before = self._cost(volume, size, self.pose)
        for share_of_move in (1.0, 0.4):
            moved = self.pose + share_of_move * move * torch.cat(
                [self.pose[:, 3:].exp().expand(-1, 3), torch.ones_like(before)[:, None]], dim=1
            )
            after = self._cost(volume, size, moved)
            better = after < before
            self.pose = torch.where(better[:, None], moved, self.pose)
            before = torch.where(better, after, before)
            move = torch.where(better[:, None], torch.zeros_like(move), move)


def _damped(normal: Float[Tensor, "b 4 4"]) -> Float[Tensor, "b 4 4"]:
    """Levenberg-Marquardt."""
    return normal + torch.diag_embed(0.1 * normal.diagonal(dim1=1, dim2=2) + 1e-3)


def _missed(d: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """d − clip(d, low, high)."""
    return d - torch.minimum(torch.maximum(d, low), high)
