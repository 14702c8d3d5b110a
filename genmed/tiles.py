"""Large scans patch by patch: at every step the patches' estimates are fused into one, so no seam is left."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genmed.samplers import Denoise

EDGE = 1e-3  # weight of a patch at its rim, relative to its middle


def tiled(denoise: Denoise, patch: Sequence[int], overlap: float = 0.5) -> Denoise:
    """A denoiser of large z that evaluates `denoise` on overlapping patches and averages their estimates.

    The patches share one noisy z, so that fusing the estimates at every step fuses the samples
    (MultiDiffusion, Bar-Tal et al., arXiv 2302.08113, eq. 5). Memory: z, one estimate of it and one patch,
    also with gradients (patches are then evaluated once more in the backward pass).

    Args:
        denoise: (z, sigma) -> z0_hat for patches of z.
        patch: size of a patch in voxels; axes of z that are smaller are not cut.
        overlap: share of a patch that neighbours cover too, 0 ≤ overlap < 1.
    """

    def denoise_large(z: Float[Tensor, "b c x y z"], sigma: float) -> Float[Tensor, "b c x y z"]:
        return tiled_logits(lambda part: denoise(part, sigma), z, z.shape[1], patch, overlap)

    return denoise_large


def tiled_logits(
    network: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c x y z"],
    channels: int,
    patch: Sequence[int],
    overlap: float = 0.5,
) -> Float[Tensor, "b k x y z"]:
    """The smoothly weighted mean of `network(part)`, with `channels` outputs, over overlapping patches of x.

    A pointwise network gives what it gives for the whole x.
    """
    size = tuple(min(p, n) for p, n in zip(patch, x.shape[2:], strict=True))
    starts = [tile_starts(n, p, overlap) for n, p in zip(x.shape[2:], size, strict=True)]
    windows = [_window(n, p, s).to(x) for n, p, s in zip(x.shape[2:], size, starts, strict=True)]
    fused = x.new_zeros(len(x), channels, *x.shape[2:])
    for i, j, k in product(*(range(len(s)) for s in starts)):
        x0, y0, z0 = starts[0][i], starts[1][j], starts[2][k]
        inside = (..., slice(x0, x0 + size[0]), slice(y0, y0 + size[1]), slice(z0, z0 + size[2]))
        weight = windows[0][i, :, None, None] * windows[1][j, :, None] * windows[2][k]
        fused[inside] += weight * _recomputed(network, x[inside])
    return fused


def tile_starts(size: int, patch: int, overlap: float) -> list[int]:
    """First voxels of the fewest evenly spread patches that cover an axis and overlap at least so much."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; give a share of the patch from 0 up to, not including, 1")
    if patch >= size:
        return [0]
    stride = max(1, int(patch * (1 - overlap)))
    count = -(-(size - patch) // stride) + 1
    return [round(number * (size - patch) / (count - 1)) for number in range(count)]


def _window(size: int, patch: int, starts: Sequence[int]) -> Float[Tensor, "n patch"]:
    """Weights of every patch along one axis: a sin² bump, normalised so that they add to 1 at every voxel."""
    bump = torch.sin(torch.pi * (torch.arange(patch, dtype=torch.float64) + 0.5) / patch) ** 2 + EDGE
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + patch] += bump
    return torch.stack([bump / total[start : start + patch] for start in starts])


def _recomputed(network: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """network(part), whose activations are not kept but recomputed where a gradient needs them."""
    if part.requires_grad and torch.is_grad_enabled():
        return checkpoint(network, part, use_reentrant=False)
    return network(part)
