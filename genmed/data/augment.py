"""Random patches with nnU-Net's augmentation (arXiv 1809.10486, appendix D) and stronger ones, in plain torch.

Every function draws from the generator it is given, so that a training step is a function of its number.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

ROTATION = 30 * math.pi / 180
SCALE = (0.7, 1.4)
USUAL, STRONG = 0.2, 0.6  # probability of each spatial change; STRONG where few cases must do
UNFOLDED = 0.4  # B-spline grids whose knots move by less than 0.403 of their distance do not fold
KNOTS = 5  # per axis, of smooth fields: knots are half a patch apart
CURVE_KNOTS = 8  # of random intensity curves
RANDOMISED = 0.5  # share of `mixed` patches that are `randomised`
COARSEST = 8.0  # voxels of simulated coarse scans, in working voxels; also the widest gap between slices


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
    spatial: float = USUAL,
    elastic: float = 0.0,
) -> tuple[Float[Tensor, "c px py pz"], Int[Tensor, "px py pz"], Float[Tensor, "1 px py pz"]]:
    """Cut one randomly placed patch, rotated, scaled and bent in some of the draws.

    Rotation (±30°, about the slice axis alone for thick slices) and scaling (0.7 to 1.4) each happen with
    probability `spatial`, a smooth deformation (`bending`, in the plane alone for thick slices) with probability
    `elastic`. Thick-slice stacks have their slice order reversed half of the time. With `spatial` and `elastic`
    both 0 the patch is only placed at random.

    Returns:
        The image, the label, and 1 inside the scan and 0 where the patch reaches beyond it.
    """
    if thick_slices and spatial and chance(0.5, generator):
        image, label = image.flip(-1), label.flip(-1)
    start = [_random_start(n, p, generator) for n, p in zip(label.shape, patch, strict=True)]
    rotate, scale = chance(spatial, generator), chance(spatial, generator)
    bend = elastic > 0 and chance(elastic, generator)
    inside = torch.ones_like(label)[None]
    if not rotate and not scale and not bend:
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
    shift = bending(patch, thick_slices, generator) if bend else torch.zeros(3)
    grid = _sampling_grid(label.shape, start, patch, matrix, shift)
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
    size: tuple[int, ...],
    start: list[int],
    patch: tuple[int, int, int],
    matrix: Float[Tensor, "3 3"],
    shift: Float[Tensor, "px py pz 3"] | Float[Tensor, "3"],
) -> Float[Tensor, "1 px py pz 3"]:
    """Where in the scan (in grid_sample's units, last axis first) each voxel of the patch comes from."""
    axes = [torch.arange(p) - (p - 1) / 2 for p in patch]
    offsets = (torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) + shift) @ matrix.T
    centre = torch.tensor([s + (p - 1) / 2 for s, p in zip(start, patch, strict=True)])
    unit = (2 * (offsets + centre) + 1) / torch.tensor(size) - 1
    return unit.flip(-1)[None]


def bending(
    patch: tuple[int, int, int], thick_slices: bool, generator: Generator
) -> Float[Tensor, "px py pz 3"]:
    """Smooth random displacement in voxels that never folds the patch over.

    A cubic B-spline grid whose knots all move by up to `UNFOLDED` of their distance along each axis (Choi and
    Lee, Graphical Models 62, 2000: below 0.403 such a deformation is one-to-one).
    """
    ways = 2.0 * torch.randint(2, (3, KNOTS, KNOTS, KNOTS), generator=generator) - 1
    distance = torch.tensor([(side - 1) / (KNOTS - 3) for side in patch])
    amplitude = uniform(0, UNFOLDED, generator) * distance
    if thick_slices:
        amplitude[2] = 0
    return smooth_field(ways, patch).movedim(0, -1) * amplitude


def smooth_field(
    knots: Float[Tensor, "c k k k"], size: tuple[int, int, int]
) -> Float[Tensor, "c x y z"]:
    """Tensor-product cubic B-spline through a box of voxels; values stay within those of the knots."""
    x, y, z = (bspline(torch.linspace(0, 1, n), k) for n, k in zip(size, knots.shape[1:], strict=True))
    return torch.einsum("cijk,xi,yj,zk->cxyz", knots, x, y, z)


def bspline(t: Float[Tensor, "*n"], knots: int) -> Float[Tensor, "*n k"]:
    """Weights of the knots of a uniform cubic B-spline at t in [0, 1]; they add up to 1.

    The first and the last knot lie one knot distance outside, so evenly rising knots give a straight line.
    """
    distance = (1 + t[..., None] * (knots - 3) - torch.arange(knots)).abs()
    near = (4 - 6 * distance**2 + 3 * distance**3) / 6
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)


def _sample(array: Float[Tensor, "c x y z"], grid: Float[Tensor, "1 px py pz 3"]) -> Float[Tensor, "c px py pz"]:
    return F.grid_sample(array[None].float(), grid, mode="bilinear", align_corners=False)[0]


def sample_labels(label: Int[Tensor, "x y z"], grid: Float[Tensor, "1 px py pz 3"]) -> Int[Tensor, "px py pz"]:
    """Interpolate each class by itself and keep the strongest."""
    values = label.unique()
    soft = torch.stack([_sample((label == value)[None].float(), grid)[0] for value in values])
    winner = values[soft.argmax(dim=0)]
    return torch.where(soft.amax(dim=0) > 0, winner, 0)


def augment(
    image: Float[Tensor, "c x y z"], inside: Float[Tensor, "1 x y z"], kind: str, generator: Generator
) -> Float[Tensor, "c x y z"]:
    """Change the intensities of one patch; `inside` is 0 where it reaches beyond its scan.

    Args:
        kind: `none`, `nnunet` (`augment_intensity`), `degraded` (the same, then `worsen`: for coarse input),
            `randomised` (`augment_randomised`: for unknown contrasts, too) or `mixed` (every patch one of `nnunet`
            and `randomised`: for scans as they usually are and for others, by one network).
    """
    if kind == "mixed":
        kind = "randomised" if chance(RANDOMISED, generator) else "nnunet"
    if kind == "none":
        return image
    if kind == "nnunet":
        return augment_intensity(image, generator)
    if kind == "degraded":
        return worsen(augment_intensity(image, generator), inside, generator)
    if kind == "randomised":
        return augment_randomised(image, generator, inside)
    raise ValueError(kind)


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


# Contrasts and acquisitions that the training data do not hold ----------------------------------------------


def augment_randomised(
    image: Float[Tensor, "c x y z"], generator: Generator, inside: Float[Tensor, "1 x y z"] | None = None
) -> Float[Tensor, "c x y z"]:
    """Random contrast, bias field, blur, noise and resolution, after SynthSeg (arXiv 2107.09559).

    As there, the network never meets the same contrast or acquisition twice. Unlike there, nothing is synthesised
    from label maps: the scan's own intensities go through a random curve (`remap`), so tissues that look alike
    in the scan stay alike, and its own noise and texture remain. Probabilities: curve 0.9, a new one for each
    channel; bias field 0.5; blur 0.3; noise 0.5; coarse voxels or missing slices 0.5 (`worsen`). The result has
    zero mean and unit variance in the scan, as a whole scan has after normalisation, and is 0 beyond it.
    """
    inside = torch.ones_like(image[:1]) if inside is None else inside
    if chance(0.9, generator):
        image = torch.stack([remap(channel, inside[0] > 0, generator) for channel in image])
    if chance(0.5, generator):
        field = smooth_field(_signed((1, KNOTS, KNOTS, KNOTS), generator), _size(image))
        low = _lowest(image, inside)
        image = low + (image - low) * torch.exp(uniform(0, 0.7, generator) * field)
    image = standardised(image, inside)
    if chance(0.3, generator):
        image = blur(image, uniform(0.5, 1.5, generator))
    if chance(0.5, generator):
        image = image + uniform(0, 0.3, generator) * torch.randn(image.shape, generator=generator)
    return standardised(worsen(image, inside, generator), inside)


def remap(
    channel: Float[Tensor, "x y z"], inside: Bool[Tensor, "x y z"], generator: Generator
) -> Float[Tensor, "x y z"]:
    """Intensities through a random smooth curve: rising or falling, bent by any amount, so not always monotone.

    A cubic B-spline over the range of the scan (0.5 to 99.5 percent of its voxels, constant beyond), whose
    knots lie anywhere between a straight line, which falls half of the time (inversion), and random values.
    """
    seen = channel[inside]
    low, high = torch.quantile(seen, torch.tensor([0.005, 0.995])) if len(seen) else channel.aminmax()
    bent = uniform(0, 1, generator)
    line = torch.linspace(0, 1, CURVE_KNOTS)
    line = line.flip(0) if chance(0.5, generator) else line
    knots = (1 - bent) * line + bent * torch.rand(CURVE_KNOTS, generator=generator)
    place = ((channel - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return bspline(place, CURVE_KNOTS) @ knots


def worsen(
    image: Float[Tensor, "c x y z"], inside: Float[Tensor, "1 x y z"], generator: Generator
) -> Float[Tensor, "c x y z"]:
    """Take resolution away: coarse voxels (probability 0.35) or missing slices (0.15), up to a factor of 8.

    What is left is interpolated on the patch's grid and brought back to the mean and standard deviation that
    it had, as a coarse scan is normalised by its own intensities.
    """
    drawn = uniform(0, 1, generator)
    if drawn < 0.5:
        return image
    mean, deviation = _moments(image, inside)
    axis = int(torch.randint(3, (), generator=generator))
    if drawn < 0.85:
        factor = COARSEST ** uniform(0, 1, generator)
        axes = (0, 1, 2) if chance(0.5, generator) else (axis,)
        image = coarsen(image, inside, factor, axes)
    else:
        every = int(torch.randint(2, int(COARSEST) + 1, (), generator=generator))
        first = int(torch.randint(every, (), generator=generator))
        image = drop_slices(image, axis, every, first, nearest=chance(0.5, generator))
    return (standardised(image, inside) * deviation + mean) * inside


def coarsen(
    image: Float[Tensor, "c x y z"], inside: Float[Tensor, "1 x y z"], factor: float, axes: tuple[int, ...]
) -> Float[Tensor, "c x y z"]:
    """Averages over voxels `factor` times as long along `axes`, interpolated; what is beyond the scan is left out."""
    x, y, z = (max(1, round(n / factor)) if axis in axes else n for axis, n in enumerate(image.shape[1:]))
    weight = F.adaptive_avg_pool3d(inside[None], (x, y, z))
    small = F.adaptive_avg_pool3d((image * inside)[None], (x, y, z)) / weight.clamp(min=1e-6)
    return F.interpolate(small, size=_size(image), mode="trilinear", align_corners=False)[0]


def drop_slices(
    image: Float[Tensor, "c x y z"], axis: int, every: int, first: int, nearest: bool
) -> Float[Tensor, "c x y z"]:
    """Keep slice `first` and each `every`-th after it; the others are the nearest kept one, or interpolated."""
    n = image.shape[1 + axis]
    kept = torch.arange(min(first, n - 1), n, every)
    place = torch.arange(n).clamp(int(kept[0]), int(kept[-1]))
    weights = (1 - (place[:, None] - kept).abs() / every).clamp(min=0)
    if nearest:
        weights = F.one_hot(weights.argmax(dim=1), len(kept)).float()
    return (image.index_select(1 + axis, kept).movedim(1 + axis, -1) @ weights.T).movedim(-1, 1 + axis)


def standardised(
    image: Float[Tensor, "c x y z"], inside: Float[Tensor, "1 x y z"]
) -> Float[Tensor, "c x y z"]:
    """Zero mean and unit variance of each channel in the scan, 0 beyond it."""
    mean, deviation = _moments(image, inside)
    return (image - mean) / deviation * inside


def _moments(image: Tensor, inside: Tensor) -> tuple[Float[Tensor, "c 1 1 1"], Float[Tensor, "c 1 1 1"]]:
    count = inside.sum().clamp(min=1)
    mean = (image * inside).sum(dim=(1, 2, 3), keepdim=True) / count
    variance = ((image - mean) ** 2 * inside).sum(dim=(1, 2, 3), keepdim=True) / count
    return mean, variance.sqrt().clamp(min=1e-6)


def _lowest(image: Tensor, inside: Tensor) -> Float[Tensor, "c 1 1 1"]:
    return torch.where(inside > 0, image, torch.inf).amin(dim=(1, 2, 3), keepdim=True).nan_to_num(posinf=0.0)


def _signed(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform random numbers in [-1, 1]."""
    return 2 * torch.rand(shape, generator=generator) - 1


def _size(image: Tensor) -> tuple[int, int, int]:
    x, y, z = image.shape[1:]
    return x, y, z
