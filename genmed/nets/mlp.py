"""A residual multilayer perceptron conditioned on noise levels, for fields without space."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Pre-norm residual blocks (norm, linear, SiLU, linear) that conditions scale and shift (FiLM, arXiv 1709.07871).

    Takes and gives (b, c, 1, 1, 1), as `UNet` does of larger ones.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int, conditions: int) -> None:
        super().__init__()
        embed = 128
        self.embed = nn.Sequential(nn.Linear(conditions, embed), nn.SiLU(), nn.Linear(embed, embed), nn.SiLU())
        self.first = nn.Linear(in_channels, width)
        self.blocks = nn.ModuleList(Block(width, embed) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out_channels)

    def forward(self, x: Float[Tensor, "b i 1 1 1"], conditions: Float[Tensor, "b k"]) -> Float[Tensor, "b o 1 1 1"]:
        embedding = self.embed(conditions)
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = block(x, embedding)
        return self.head(self.norm(x))[..., None, None, None]


class Block(nn.Module):
    """One residual block; it starts as the identity."""

    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(embed, 2 * width)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear2.weight)
        nn.init.zeros_(self.linear2.bias)

    def forward(self, x: Float[Tensor, "b w"], embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b w"]:
        scale, shift = self.film(embedding).chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm(x), 1 + scale)
        hidden = nn.functional.silu(self.linear1(hidden))
        return x + self.linear2(hidden)
