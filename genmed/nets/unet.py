"""A 3D U-Net conditioned on noise levels. It knows nothing of tasks, fields or geometry."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class UNet(nn.Module):
    """Two convolutions a level, strided down, transposed up, skip connections at each level.

    The widths, depth and convolutions are those of nnU-Net's plain network (arXiv 1809.10486), with group
    norms (statistics per sample) that a vector of conditions scales and shifts (FiLM, arXiv 1709.07871).
    Inputs of any size are padded with zeros to a multiple of `2 ** (len(widths) - 1)` and cropped back.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...], conditions: int) -> None:
        super().__init__()
        embed = 4 * widths[0]
        self.embed = nn.Sequential(nn.Linear(conditions, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.down = nn.ModuleList(
            DoubleConv(narrow, wide, embed, stride=1 if level == 0 else 2)
            for level, (narrow, wide) in enumerate(zip((in_channels, *widths), widths, strict=False))
        )
        self.rise = nn.ModuleList(
            nn.ConvTranspose3d(wide, narrow, kernel_size=2, stride=2)
            for narrow, wide in pairwise(widths)
        )
        self.up = nn.ModuleList(DoubleConv(2 * width, width, embed, stride=1) for width in widths[:-1])
        self.head = nn.Conv3d(widths[0], out_channels, kernel_size=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "b i x y z"], conditions: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b o x y z"]:
        size = x.shape[2:]
        x = pad_to_multiple(x, 2 ** (len(self.down) - 1))
        embedding = self.embed(conditions)
        skips = []
        for block in self.down:
            x = block(x, embedding)
            skips.append(x)
        skips.pop()
        for rise, block in zip(reversed(self.rise), reversed(self.up), strict=True):
            x = block(torch.cat([rise(x), skips.pop()], dim=1), embedding)
        return self.head(x)[..., : size[0], : size[1], : size[2]]


class DoubleConv(nn.Module):
    """(convolution, group norm, SiLU) twice; the embedding scales and shifts the first norm."""

    def __init__(self, in_channels: int, out_channels: int, embed: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.film = nn.Linear(embed, 2 * out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, out_channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Float[Tensor, "b i x y z"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b o ..."]:
        x = self.norm1(convolve(self.conv1, x))
        scale, shift = self.film(embedding).to(x.dtype)[..., None, None, None].chunk(2, dim=1)
        x = F.silu(torch.addcmul(shift, x, 1 + scale))
        return F.silu(self.norm2(self.conv2(x)))


def convolve(conv: nn.Conv3d, x: Float[Tensor, "b i x y z"]) -> Float[Tensor, "b o ..."]:
    """`conv(x)`, with zero channels added to an odd number of them: torch is slow for few channels on a CPU."""
    missing = -x.shape[1] % 16
    if not missing or x.device.type != "cpu":
        return conv(x)
    channels = (0, 0, 0, 0, 0, 0, 0, missing)
    return F.conv3d(F.pad(x, channels), F.pad(conv.weight, channels), stride=conv.stride, padding=1)


def pad_to_multiple(x: Float[Tensor, "b c x y z"], multiple: int) -> Float[Tensor, "b c X Y Z"]:
    """Append zeros at the far end of every spatial axis."""
    x_pad, y_pad, z_pad = (-n % multiple for n in x.shape[2:])
    return F.pad(x, (0, z_pad, 0, y_pad, 0, x_pad)) if x_pad or y_pad or z_pad else x
