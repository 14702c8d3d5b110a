"""How surprised the model is by a pair of image and label: the check behind every automatic choice.

A pair that the model has learnt is denoised well from much noise, whatever texture it has; an image of another
contrast, or the label that a network makes of it, is not. An empty label is denoised well, too, so the volumes of
the structures are looked at besides, and so is the histogram of the image, where contrasts differ even if the layout
is familiar. No other modality is needed to set the threshold: it comes from clean tuning cases alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from genmed.fields import Fields, one_hot, probabilities
from genmed.samplers import Denoise, noise, seeded

SIGMA = 5.0  # noise in which only the layout of the scan is left
DRAWS = 4  # noise draws that are averaged
LIMIT = 4.0  # surprise above which a scan is taken for another kind: 2 % of clean ones, if ten persons were measured
LEAST_DEVIATION = 0.03  # of a feature over clean cases: few cases can agree by chance
QUANTILES = torch.linspace(0.05, 0.95, 9)  # of the intensities, that stand for their histogram
ENOUGH = 1_000_000  # voxels to take them from
HISTOGRAM = 4 / 3  # weight of their mean deviation: 3 is as rare there as 4 is for the worst of the other features


@torch.no_grad()
def features(
    denoise: Denoise,
    fields: Fields,
    image: Float[Tensor, "b c x y z"],
    soft: Float[Tensor, "b k x y z"],
    draws: int = DRAWS,
    inside: Callable[[Tensor], Tensor] = lambda values: values,
) -> Float[Tensor, "b n"]:
    """Logarithms of the denoising errors at `SIGMA` of image and label, of the structures' volumes, and the histogram.

    The errors, squared for the image and cross-entropy for the label, are the terms of the diffusion model's
    likelihood bound (Kingma et al., arXiv 2107.00630) at one noise level, with the same noise for every pair. That of
    the image is a mean over voxels. That of the label arises along borders: it is a sum, over the volume of all
    structures to the power of 2/3, or large structures and small fields of view would surprise. Volumes are those of
    the most probable class, in voxels of the working grid plus one, background left out.

    Args:
        denoise: (z, sigma) -> z0_hat of all fields.
        image: normalised images.
        soft: label probabilities; the most probable class is judged.
        inside: takes what is judged out of what is denoised, for a network that needs surroundings which nobody saw.

    Returns:
        Two errors, k − 1 volumes, the `histogram` of every channel.
    """
    classes, count = soft.argmax(dim=1), soft.shape[1]
    label = one_hot(classes, count).to(image)
    z0 = fields.join({"image": image, "label": label})
    errors = torch.zeros(len(image), 2)
    for number in range(draws):
        n = noise(z0[:1], seeded([number])).expand_as(z0)
        parts = fields.split(denoise(z0 + SIGMA * n, SIGMA).float())
        chance = probabilities(parts["label"]).gather(1, classes[:, None]).clamp(min=1e-6)
        errors[:, 0] += inside((parts["image"] - image).square()).mean(dim=(1, 2, 3, 4)) / draws
        errors[:, 1] -= inside(chance.log()).sum(dim=(1, 2, 3, 4)) / draws
    voxels = (inside(label)[:, 1:] > 0).sum(dim=(2, 3, 4))
    errors[:, 1] /= (voxels.sum(dim=1) + 1) ** (2 / 3)
    logarithms = torch.cat([errors.clamp(min=1e-9), voxels + 1], dim=1).log()
    return torch.cat([logarithms, histogram(inside(image)).flatten(1)], dim=1)


def histogram(image: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c 9"]:
    """`QUANTILES` of every channel."""
    values = image.flatten(2).float()
    values = values[..., :: max(1, values.shape[2] // ENOUGH)]
    return torch.quantile(values, QUANTILES, dim=2).permute(1, 2, 0)


def typical_histogram(typical: Sequence[float], channels: int) -> Float[Tensor, "c 9"]:
    """Mean `histogram` of clean cases."""
    mean, _ = torch.tensor(typical).reshape(2, -1)
    return mean[len(mean) - channels * len(QUANTILES) :].reshape(channels, -1)


def typical(rows: Iterable[Float[Tensor, "1 n"]]) -> tuple[float, ...]:
    """Means, then standard deviations, of `features` over clean cases that were not trained on."""
    values = torch.cat(list(rows)).double()
    deviation = values.std(dim=0) if len(values) > 1 else torch.zeros(values.shape[1])
    numbers = torch.cat([values.mean(dim=0), deviation.clamp(min=LEAST_DEVIATION)])
    return tuple(round(number, 4) for number in numbers.tolist())


class Surprise(NamedTuple):
    """How far pairs are off clean cases, in standard deviations over these.

    `most`: in what is most off, the histogram's root mean square times `HISTOGRAM` included, which is the `contrast`.
    `layout`: root of the sum of squares of the errors above the mean and of the volumes. It is what explanations of one
    scan are compared by: a scan whose histogram was mapped to the usual one has the usual contrast, right or wrong.
    """

    most: Float[Tensor, " b"]
    layout: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]


def surprise(features: Float[Tensor, "b n"], typical: Sequence[float], structures: int) -> Surprise:
    """What is off in pairs with so many structures; errors count above the mean, their volumes either way."""
    mean, deviation = torch.tensor(typical).reshape(2, -1)
    errors, volumes, quantiles = ((features - mean) / deviation).split([2, structures, len(mean) - 2 - structures], 1)
    contrast = HISTOGRAM * quantiles.square().mean(dim=1).sqrt()
    off = torch.cat([errors.clamp(min=0), volumes.abs()], dim=1)
    return Surprise(torch.maximum(off.amax(dim=1), contrast), off.norm(dim=1), contrast)
