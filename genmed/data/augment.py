"""Random patches with nnU-Net's augmentation (arXiv 1809.10486, appendix D), in plain torch.

Every function draws from the generator it is given, so that a training step is a function of its number.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

ROTATION = 30 * math.pi / 180
SCALE = (0.7, 1.4)


def uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def chance(probability: float, generator: Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def random_patch(
    image: Float[Tensor, "c x y z"],
    label: Int[Tensor, "x y z"],
    patch: tuple[int, int, int],
    generator: Generator,
    thick_slices: bool = False,
) -> tuple[Float[Tensor, "c px py pz"], Int[Tensor, "px py pz"], Float[Tensor, "1 px py pz"]]:
    """Cut one randomly placed patch, rotated and scaled in some of the draws.

    Rotation (±30°, about the slice axis alone for thick slices) and scaling (0.7 to 1.4) each happen with
    probability 0.2. Thick-slice stacks have their slice order reversed half of the time.

    Returns:
        The image, the label, and 1 inside the scan and 0 where the patch reaches beyond it.
    """
    if thick_slices and chance(0.5, generator):
        image, label = image.flip(-1), label.flip(-1)
    start = [_random_start(n, p, generator) for n, p in zip(label.shape, patch, strict=True)]
    rotate, scale = chance(0.2, generator), chance(0.2, generator)
    inside = torch.ones_like(label)[None]
    if not rotate and not scale:
        return (
            crop_or_pad(image, start, patch),
            crop_or_pad(label[None], start, patch)[0],
            crop_or_pad(inside, start, patch).float(),
        )
    matrix = torch.eye(3)
    if rotate:
        axes = (2,) if thick_slices else (0, 1, 2)
        matrix = rotation({axis: uniform(-ROTATION, ROTATION, generator) for axis in axes})
    if scale:
        matrix = matrix / uniform(*SCALE, generator)
    grid = _sampling_grid(label.shape, start, patch, matrix)
    return (
        _sample(image, grid),
        sample_labels(label, grid),
        (_sample(inside.float(), grid) > 0.5).float(),
    )


def _random_start(size: int, patch: int, generator: Generator) -> int:
    low, high = min(0, size - patch), max(0, size - patch)
    return int(torch.randint(low, high + 1, (), generator=generator))


def crop_or_pad(array: Tensor, start: list[int], patch: tuple[int, int, int]) -> Tensor:
    """Cut the box that begins at `start` (which may be negative) from the last three axes; zeros outside."""
    pads: list[tuple[int, int]] = []
    slices: list[slice] = []
    for n, s, p in zip(array.shape[-3:], start, patch, strict=True):
        slices.append(slice(max(s, 0), min(s + p, n)))
        pads.append((max(-s, 0), max(s + p - n, 0)))
    return F.pad(array[..., slices[0], slices[1], slices[2]], [amount for pair in reversed(pads) for amount in pair])


def rotation(angles: dict[int, float]) -> Float[Tensor, "3 3"]:
    """Rotation matrix: about each axis in turn, by its angle in radians."""
    matrix = torch.eye(3)
    for axis, angle in angles.items():
        i, j = (a for a in range(3) if a != axis)
        turn = torch.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    return matrix


def _sampling_grid(
    size: tuple[int, ...], start: list[int], patch: tuple[int, int, int], matrix: Float[Tensor, "3 3"]
) -> Float[Tensor, "1 px py pz 3"]:
    """Where in the scan (in grid_sample's units, last axis first) each voxel of the patch comes from."""
    axes = [torch.arange(p) - (p - 1) / 2 for p in patch]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ matrix.T
    centre = torch.tensor([s + (p - 1) / 2 for s, p in zip(start, patch, strict=True)])
    unit = (2 * (offsets + centre) + 1) / torch.tensor(size) - 1
    return unit.flip(-1)[None]


def _sample(array: Float[Tensor, "c x y z"], grid: Float[Tensor, "1 px py pz 3"]) -> Float[Tensor, "c px py pz"]:
    return F.grid_sample(array[None].float(), grid, mode="bilinear", align_corners=False)[0]


def sample_labels(label: Int[Tensor, "x y z"], grid: Float[Tensor, "1 px py pz 3"]) -> Int[Tensor, "px py pz"]:
    """Interpolate each class by itself and keep the strongest."""
    values = label.unique()
    soft = torch.stack([_sample((label == value)[None].float(), grid)[0] for value in values])
    winner = values[soft.argmax(dim=0)]
    return torch.where(soft.amax(dim=0) > 0, winner, 0)


def augment_intensity(image: Float[Tensor, "c x y z"], generator: Generator) -> Float[Tensor, "c x y z"]:
    """nnU-Net's intensity transforms with its probabilities: noise, blur, brightness, contrast, resolution, gamma."""
    if chance(0.1, generator):
        image = image + uniform(0, 0.1, generator) ** 0.5 * torch.randn(image.shape, generator=generator)
    if chance(0.2, generator):
        image = blur(image, uniform(0.5, 1.0, generator))
    if chance(0.15, generator):
        image = image * uniform(0.75, 1.25, generator)
    if chance(0.15, generator):
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        low, high = image.amin(), image.amax()
        image = ((image - mean) * uniform(0.75, 1.25, generator) + mean).clamp(low, high)
    if chance(0.25, generator):
        image = lower_resolution(image, uniform(0.5, 1.0, generator))
    if chance(0.1, generator):
        image = -gamma(-image, uniform(0.7, 1.5, generator))
    if chance(0.3, generator):
        image = gamma(image, uniform(0.7, 1.5, generator))
    return image


def blur(image: Float[Tensor, "c x y z"], sigma: float) -> Float[Tensor, "c x y z"]:
    """Gaussian blur; sigma in voxels."""
    radius = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = image[:, None]
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + axis], pad[axis] = len(kernel), radius
        x = F.conv3d(x, kernel.reshape(shape), padding=pad) / F.conv3d(
            torch.ones_like(x[:1]), kernel.reshape(shape), padding=pad
        )
    return x[:, 0]


def lower_resolution(image: Float[Tensor, "c x y z"], zoom: float) -> Float[Tensor, "c x y z"]:
    """Nearest-neighbour down, cubic-like (trilinear) up, as nnU-Net simulates low resolution."""
    size = [max(1, round(n * zoom)) for n in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="nearest-exact")
    return F.interpolate(small, size=image.shape[1:], mode="trilinear", align_corners=False)[0]


def gamma(image: Float[Tensor, "c x y z"], exponent: float) -> Float[Tensor, "c x y z"]:
    """Power law on the range of the image; mean and standard deviation are kept."""
    low, high = image.amin(), image.amax()
    mean, std = image.mean(), image.std()
    bent = ((image - low) / (high - low).clamp(min=1e-6)) ** exponent
    return (bent - bent.mean()) / bent.std().clamp(min=1e-6) * std + mean
