"""A U-Net that gives back the details which principal components leave out of a shape."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from genmed.nets.unet import UNet

STRIDES = ((2, 2, 2),) * 3
REACH = 4.0  # voxels: beyond this distance the surface is far


class Refiner(nn.Module):
    """Distances on the autoencoder's grid -> distances on one twice as fine, in the same unit, given words or zeros.

    Every voxel's eight parts come from its channels (sub-voxel convolution, Shi et al., CVPR 2016). It starts as
    linear interpolation.
    """

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.net = UNet(2, 8, (width, 2 * width, 4 * width, 8 * width), STRIDES, words, groups=4)
        nn.init.zeros_(self.net.head.weight)

    def forward(
        self, x: Float[Tensor, "b 1 n n n"], words: Float[Tensor, "b d"], size: int
    ) -> Float[Tensor, "b 1 m m m"]:
        """Distances on size³ voxels."""
        n = x.shape[-1]
        parts = self.net(torch.cat([x / REACH, x.tanh()], dim=1), words).float()
        fine = parts.view(-1, 2, 2, 2, n, n, n).permute(0, 4, 1, 5, 2, 6, 3).reshape(-1, 1, 2 * n, 2 * n, 2 * n)
        return resized(x, size) + resized(fine, size)


def resized(x: Float[Tensor, "b 1 n n n"], size: int) -> Float[Tensor, "b 1 m m m"]:
    """Linear interpolation to size³ voxels."""
    return x if x.shape[-1] == size else F.interpolate(x, size=(size,) * 3, mode="trilinear", align_corners=False)
