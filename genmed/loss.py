"""The training objective of the joint model: one mixture of noise levels gives every mode of inference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from genmed.data.augment import augment
from genmed.denoiser import Denoiser
from genmed.fields import one_hot

MIXTURE = {"conditional": 0.85, "equal": 0.1, "independent": 0.025, "partial": 0.025}
HIDDEN = 0.9  # share of the conditional samples that sees nothing of the label
LOG_SIGMA = (0.0, 1.2)  # mean and standard deviation of ln σ: about the level at which most is decided


class Batch(NamedTuple):
    """What one training step sees; `seed` decides every random number drawn from it."""

    image: Float[Tensor, "b c x y z"]
    label: Int[Tensor, "b x y z"]
    inside: Float[Tensor, "b 1 x y z"]
    seed: int


class JointLoss(nn.Module):
    """Denoising loss of P(image, label) under the mixture of noise levels.

    Per sample one of: *conditional* (clean image, hidden label; the image is augmented as a segmentation
    network's would be; `genmed.data.augment.augment` says how), *equal* (one level for all fields: the
    paper's joint), *independent* (a level per field, UniDiffuser arXiv 2303.06555) or *partial* (some voxels
    of one field clean, the others noisy, after Diffusion Forcing arXiv 2407.01392).
    """

    def __init__(self, model: Denoiser, augmentation: str = "nnunet") -> None:
        super().__init__()
        self.model = model
        self.augmentation = augmentation

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        generator = Generator().manual_seed(batch.seed)
        modes = draw_modes(len(batch.image), generator)
        image = torch.stack(
            [
                augment(x, inside, self.augmentation, generator) if mode == "conditional" else x
                for x, inside, mode in zip(batch.image.cpu(), batch.inside.cpu(), modes, strict=True)
            ]
        ).to(batch.image)
        z0 = torch.cat([image, one_hot(batch.label, len(self.model.fields["label"].channels))], dim=1)
        sigma = torch.stack(
            [draw_sigma(mode, batch.label.shape[1:], self.model.sigma_max, generator) for mode in modes]
        ).to(z0)
        noise = torch.randn(z0.shape, generator=generator).to(z0)
        outputs = self.model.outputs(z0 + self.model.fields.spread(sigma) * noise, sigma, batch.inside)
        image_loss = continuous_loss(outputs["image"], image, sigma[:, :1], batch.inside)
        label_loss = categorical_loss(outputs["label"], batch.label, batch.inside)
        return {"loss": image_loss + label_loss, "image": image_loss, "label": label_loss}


def draw_modes(count: int, generator: Generator) -> list[str]:
    """Modes in the proportions of `MIXTURE`, stratified over the batch so that each batch is balanced."""
    edges = torch.tensor(list(MIXTURE.values())).cumsum(0)
    places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return [list(MIXTURE)[int(torch.searchsorted(edges, place).clamp(max=len(edges) - 1))] for place in places]


def draw_sigma(
    mode: str, size: torch.Size, sigma_max: float, generator: Generator
) -> Float[Tensor, "2 x y z"]:
    """Noise levels of (image, label) at every voxel; levels are log-normal (EDM, arXiv 2206.00364, Table 1)."""

    def level() -> Tensor:
        mean, deviation = LOG_SIGMA
        return torch.exp(mean + deviation * torch.randn((), generator=generator)).clamp(max=sigma_max)

    sigma = torch.empty(2, *size)
    if mode == "conditional":
        hidden = torch.rand((), generator=generator) < HIDDEN
        sigma[0], sigma[1] = 0.0, sigma_max if hidden else level()
    elif mode == "equal":
        sigma[:] = level()
    elif mode == "independent":
        sigma[0], sigma[1] = level(), level()
    elif mode == "partial":
        missing = torch.rand((), generator=generator)
        sigma[:] = sigma_max if missing < 0.4 else level()
        seen_field = 0 if torch.rand((), generator=generator) < 0.7 else 1
        sigma[seen_field][random_region(size, generator)] = 0.0
    else:
        raise ValueError(mode)
    return sigma


def random_region(size: torch.Size, generator: Generator) -> Tensor:
    """Observed voxels: every k-th slice, all but a block of slices, or a box."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), (), generator=generator))

    region = torch.zeros(tuple(size), dtype=torch.bool)
    kind, axis = integer(0, 3), integer(0, 3)
    if kind == 0:
        every = integer(2, min(13, size[axis]))
        region.transpose(0, axis)[integer(0, every) :: every] = True
    elif kind == 1:
        n = size[axis]
        start = integer(0, n)
        region[:] = True
        region.transpose(0, axis)[start : start + integer(2, n // 2 + 1)] = False
    else:
        box = [sorted((integer(0, n), integer(0, n))) for n in size]
        region[tuple(slice(low, high + 1) for low, high in box)] = True
    return region


def continuous_loss(
    estimate: Float[Tensor, "b c x y z"],
    target: Float[Tensor, "b c x y z"],
    sigma: Float[Tensor, "b 1 x y z"],
    inside: Float[Tensor, "b 1 x y z"],
) -> Float[Tensor, ""]:
    """Squared error weighted by 1 / c_out² (EDM, Table 1 with σ_data = 1), over noisy voxels in the scan."""
    weight = inside * (sigma > 0)
    error = (estimate - target) ** 2 * (1 + sigma**2) / sigma.clamp(min=1e-3) ** 2
    per_sample = (weight * error).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4)).clamp(min=1)
    return per_sample.mean() / target.shape[1]


def categorical_loss(
    logits: Float[Tensor, "b c x y z"], label: Int[Tensor, "b x y z"], inside: Float[Tensor, "b 1 x y z"]
) -> Float[Tensor, ""]:
    """Cross-entropy plus soft Dice (arXiv 1606.04797) of the foreground classes, per sample, in the scan."""
    weight = inside[:, 0]
    entropy = F.cross_entropy(logits, label.long(), reduction="none")
    cross_entropy = (weight * entropy).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1)
    soft = logits.softmax(dim=1)[:, 1:] * inside
    hard = torch.stack([label == c for c in range(1, logits.shape[1])], dim=1) * inside
    overlap, total = (soft * hard).sum(dim=(2, 3, 4)), (soft + hard).sum(dim=(2, 3, 4))
    dice_loss = 1 - ((2 * overlap + 1) / (total + 1)).mean(dim=1)
    return (cross_entropy + dice_loss).mean()
