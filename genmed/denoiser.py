"""The joint model: a denoiser of all fields at once, each (or each voxel) at its own noise level."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from genmed.fields import Fields, image_and_label
from genmed.nets.mixture import Mixture
from genmed.nets.unet import UNet
from genmed.plan import Plan

SMALLEST_SIGMA = 0.01  # what the network is told of a clean voxel: ln σ must stay finite
SHARPEST_LABEL_SIGMA = 0.2  # caps the label logits that the noisy voxel itself gives


class Denoiser(nn.Module):
    """D(z, σ) = E[z₀ | z₀ + σ n = z], the minimum mean-squared-error estimate of every field.

    Continuous fields use the EDM preconditioning (Karras et al., arXiv 2206.00364, eq. 7) with σ_data = 1, or with one
    of every channel if `sigma_data` is given, which is then stored with the weights. A `prior` takes the place of the
    Gaussian in the latter case: the network sees what it estimates, and learns what it does not know.
    Categorical fields are ±1 channels. Their posterior mean is a softmax whose logits add what the noisy
    voxel says by itself, log N(z; e_c, σ²) = 2 z_c / σ² + constant, and what the network reads in its
    surroundings; trained with cross-entropy, the softmax is the exact denoiser.

    Noise at `sigma_max` drowns everything: the network is shown zeros there, so that a hidden field costs
    no random numbers and one conditional evaluation is deterministic.

    `net` maps (b, c + f, x, y, z), the scaled fields and ln σ / 4, with conditions (b, f) to (b, c, x, y, z). Its last
    layer is `net.head`, one row of weights a channel.
    """

    sigma_data: Tensor

    def __init__(
        self,
        fields: Fields,
        net: nn.Module,
        sigma_max: float,
        sigma_data: Float[Tensor, " c"] | None = None,
        prior: Mixture | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        scales = torch.ones(fields.channels) if sigma_data is None else sigma_data
        self.register_buffer("sigma_data", scales[:, None, None, None], persistent=sigma_data is not None)
        self.fields = fields
        self.sigma_max = sigma_max
        self.net = net
        for field in fields:
            if field.kind == "continuous":  # start as the Wiener filter
                nn.init.zeros_(net.head.weight.data[fields.slice(field.name)])  # type: ignore

    def forward(
        self, z: Float[Tensor, "b c x y z"], sigma: Float[Tensor, "b f"] | Float[Tensor, "b f x y z"]
    ) -> Float[Tensor, "b c x y z"]:
        """Estimate the clean fields.

        Args:
            z: noisy fields, stacked as `self.fields` says.
            sigma: standard deviation of the noise, per field, or per field and voxel; 0 means clean.
        """
        outputs = self.outputs(z, sigma)
        for field in self.fields:
            if field.kind == "categorical":
                outputs[field.name] = 2 * outputs[field.name].softmax(dim=1) - 1
        return self.fields.join(outputs)

    def outputs(
        self,
        z: Float[Tensor, "b c x y z"],
        sigma: Float[Tensor, "b f"] | Float[Tensor, "b f x y z"],
        inside: Float[Tensor, "b 1 x y z"] | None = None,
    ) -> dict[str, Tensor]:
        """Estimates of continuous fields and logits of categorical ones, by field name.

        `inside` is 0 where a training patch reaches beyond its scan: the network sees zeros there, as it
        does in the padding of a whole scan.
        """
        sigma_map = sigma if sigma.ndim == 5 else sigma[..., None, None, None]
        spread = self.fields.spread
        c_in = (spread(sigma_map) ** 2 + self.sigma_data**2).rsqrt() * spread(sigma_map < self.sigma_max)
        log_sigma = sigma_map.clamp(min=SMALLEST_SIGMA).log() / 4
        views, known = [z * c_in], None
        if self.prior is not None:
            level = spread(sigma_map).flatten(1)
            known = self.prior(z.flatten(1), level, (level >= self.sigma_max).float())[..., None, None, None]
            views.append(known / self.sigma_data)
        seen = torch.cat([*views, log_sigma.expand(-1, -1, *z.shape[2:])], dim=1)
        raw = self.net(seen if inside is None else seen * inside, log_sigma.amax(dim=(2, 3, 4))).float()
        result = {}
        for field in self.fields:
            channels, index = self.fields.slice(field.name), self.fields.index(field.name)
            level = sigma_map[:, index : index + 1]
            if field.kind == "continuous":
                scale = self.sigma_data[channels]
                c_skip, c_out = scale**2 / (level**2 + scale**2), level * scale * (level**2 + scale**2).rsqrt()
                skipped = c_skip * z[:, channels] if known is None else known[:, channels]
                result[field.name] = skipped + c_out * raw[:, channels]
            else:
                own_voxel = 2 * z[:, channels] / level.clamp(min=SHARPEST_LABEL_SIGMA) ** 2
                result[field.name] = raw[:, channels] + own_voxel
        return result


def fastest_precision(device: str) -> str:
    """bf16 where the hardware multiplies it fast (recent GPUs, CPUs with AMX), else "no" mixed precision."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bf16" if amx() else "no"


def fast_arithmetic(device: str) -> torch.autocast:
    """Context in which networks compute in `fastest_precision`."""
    return torch.autocast(device, torch.bfloat16, enabled=fastest_precision(device) == "bf16")


def build(plan: Plan) -> Denoiser:
    """The untrained denoiser that a plan describes."""
    fields = image_and_label(plan.channels, plan.labels)
    levels = len(fields)
    net = UNet(fields.channels + levels, fields.channels, plan.widths, plan.strides, levels, plan.norm_groups)
    return Denoiser(fields, net, plan.sigma_max)
