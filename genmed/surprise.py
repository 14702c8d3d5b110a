"""How surprised the model is by a pair of image and label: the check behind every automatic choice.

A pair that the model has learnt is denoised well from much noise, whatever texture it has; an image of another
contrast, or the label that a network makes of it, is not. No other modality is needed to set the threshold: it
comes from clean tuning cases alone.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from genmed.fields import Fields, one_hot, probabilities
from genmed.samplers import Denoise, noise, seeded

SIGMA = 10.0  # noise in which only the layout of the scan is left
DRAWS = 4  # noise draws that are averaged
LIMIT = 3.0  # surprise, in standard deviations over clean cases, that is taken for another kind of scan

Typical = tuple[float, float, float, float]  # mean and standard deviation of ln error: of the image, of the label


@torch.no_grad()
def errors(
    denoise: Denoise,
    fields: Fields,
    image: Float[Tensor, "b c x y z"],
    soft: Float[Tensor, "b k x y z"],
    draws: int = DRAWS,
) -> Float[Tensor, "b 2"]:
    """ln of the denoising errors at `SIGMA`: squared error of the image, cross-entropy of the label.

    These are the terms of the diffusion model's likelihood bound (Kingma et al., arXiv 2107.00630) at one noise
    level. The same noise is drawn for every pair.

    Args:
        denoise: (z, sigma) -> z0_hat of all fields.
        image: normalised images.
        soft: label probabilities; the most probable class is judged.
    """
    classes = soft.argmax(dim=1)
    z0 = fields.join({"image": image, "label": one_hot(classes, soft.shape[1]).to(image)})
    total = torch.zeros(len(image), 2)
    for number in range(draws):
        n = noise(z0[:1], seeded([number])).expand_as(z0)
        parts = fields.split(denoise(z0 + SIGMA * n, SIGMA).float())
        chance = probabilities(parts["label"]).gather(1, classes[:, None]).clamp(min=1e-6)
        total[:, 0] += (parts["image"] - image).square().mean(dim=(1, 2, 3, 4)) / draws
        total[:, 1] -= chance.log().mean(dim=(1, 2, 3, 4)) / draws
    return total.clamp(min=1e-9).log()


def typical(errors: Iterable[Float[Tensor, "1 2"]]) -> Typical:
    """Mean and standard deviation of `errors` over clean cases that were not trained on."""
    rows = torch.cat(list(errors)).double()
    deviation = (rows.std(dim=0) if len(rows) > 1 else torch.zeros(2)).clamp(min=0.05)
    (image, label), (image_sd, label_sd) = rows.mean(dim=0).tolist(), deviation.tolist()
    return tuple(round(value, 4) for value in (image, image_sd, label, label_sd))  # type: ignore[return-value]


def surprise(errors: Float[Tensor, "b 2"], typical: Sequence[float]) -> Float[Tensor, " b"]:
    """Standard deviations by which a pair is more surprising than clean cases: the larger of image and label."""
    mean, deviation = torch.tensor([typical[0], typical[2]]), torch.tensor([typical[1], typical[3]])
    return ((errors - mean) / deviation).amax(dim=1)
