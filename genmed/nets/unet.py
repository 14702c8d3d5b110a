"""A 3D U-Net conditioned on noise levels. It knows nothing of tasks, fields or geometry."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Triple = tuple[int, int, int]


class UNet(nn.Module):
    """Two convolutions a level, strided down, transposed up, skip connections at each level.

    The widths, depth and convolutions are those of nnU-Net's plain network (arXiv 1809.10486), with norms
    (statistics per sample) that a vector of conditions scales and shifts (FiLM, arXiv 1709.07871). Each norm has
    `groups` groups of channels; 0 makes every channel a group, as nnU-Net's instance norms do.
    An axis that the next level does not halve (thick slices) is not convolved either, as in nnU-Net.
    Inputs of any size are padded with zeros to a multiple of the product of the strides and cropped back.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        strides: Sequence[Triple],
        conditions: int,
        groups: int = 0,
    ) -> None:
        super().__init__()
        self.multiple = [math.prod(axis) for axis in zip(*strides, strict=True)] or [1, 1, 1]
        self.groups = groups
        kernels = kernel_sizes(strides)
        embed = 4 * widths[0]
        self.embed = nn.Sequential(nn.Linear(conditions, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.down = nn.ModuleList(
            DoubleConv(narrow, wide, embed, kernel, stride, groups)
            for narrow, wide, kernel, stride in zip(
                (in_channels, *widths[:-1]), widths, kernels, ((1, 1, 1), *strides), strict=True
            )
        )
        self.rise = nn.ModuleList(
            nn.ConvTranspose3d(wide, narrow, kernel_size=stride, stride=stride)
            for (narrow, wide), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.up = nn.ModuleList(
            DoubleConv(2 * width, width, embed, kernel, (1, 1, 1), groups)
            for width, kernel in zip(widths[:-1], kernels[:-1], strict=True)
        )
        self.head = nn.Conv3d(widths[0], out_channels, kernel_size=1)
        nn.init.kaiming_normal_(self.head.weight, a=0.01)  # a head of zeros, usual in diffusion models, learns slowly
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "b i x y z"], conditions: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b o x y z"]:
        size = x.shape[2:]
        x = pad_to_multiple(x, self.multiple)
        if not self.groups and list(x.shape[2:]) == self.multiple:  # one voxel at the coarsest level has no variance
            x = pad_to_multiple(x, [2 * m for m in self.multiple])
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
    """(convolution, norm, SiLU) twice; the embedding scales and shifts the first norm."""

    def __init__(
        self, in_channels: int, out_channels: int, embed: int, kernel: Triple, stride: Triple, groups: int
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.norm1 = nn.GroupNorm(groups or out_channels, out_channels)
        self.film = nn.Linear(embed, 2 * out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel, padding=padding, bias=False)
        self.norm2 = nn.GroupNorm(groups or out_channels, out_channels)
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
    return F.conv3d(F.pad(x, channels), F.pad(conv.weight, channels), stride=conv.stride, padding=conv.padding)


def kernel_sizes(strides: Sequence[Triple]) -> list[Triple]:
    """Kernel of each level: 3, and 1 along axes that a later level halves for the first time only after a wait.

    Once an axis is halved, or when no level is left, its voxels are about as long as the others'.
    """
    kernels = []
    for level in range(len(strides) + 1):
        below = strides[level] if level < len(strides) else (2, 2, 2)
        x, y, z = (3 if step == 2 else 1 for step in below)
        kernels.append((x, y, z))
    return kernels


def pad_to_multiple(x: Float[Tensor, "b c x y z"], multiple: Sequence[int]) -> Float[Tensor, "b c X Y Z"]:
    """Append zeros at the far end of every spatial axis."""
    x_pad, y_pad, z_pad = (-n % m for n, m in zip(x.shape[2:], multiple, strict=True))
    return F.pad(x, (0, z_pad, 0, y_pad, 0, x_pad)) if x_pad or y_pad or z_pad else x
