"""Named variables of the joint distribution, and where each lives among the channels of z."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """One variable of the joint: `continuous` (an image) or `categorical` (a label map, one channel a class)."""

    name: str
    kind: Literal["continuous", "categorical"]
    channels: tuple[str, ...]


class Fields:
    """The ordered fields of a model: z = [z_image | z_label | …] along the channel axis."""

    def __init__(self, *fields: Field) -> None:
        self._fields = {field.name: field for field in fields}
        if len(self._fields) != len(fields):
            raise ValueError("field names must differ")

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields.values())

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, name: str) -> Field:
        return self._fields[name]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._fields)

    @property
    def channels(self) -> int:
        """Number of channels of z."""
        return sum(len(field.channels) for field in self)

    def index(self, name: str) -> int:
        """Position of the field: its column in a tensor of noise levels."""
        return self.names.index(name)

    def slice(self, name: str) -> slice:
        """Channels of z that hold the field."""
        start = 0
        for field in self:
            if field.name == name:
                return slice(start, start + len(field.channels))
            start += len(field.channels)
        raise KeyError(name)

    def join(self, values: dict[str, Float[Tensor, "b _ x y z"]]) -> Float[Tensor, "b c x y z"]:
        """Stack the fields' channels into z."""
        return torch.cat([values[name] for name in self.names], dim=1)

    def split(self, z: Float[Tensor, "b c x y z"]) -> dict[str, Float[Tensor, "b _ x y z"]]:
        """Inverse of `join`, without copying."""
        return {name: z[:, self.slice(name)] for name in self.names}

    def spread(self, sigma: Float[Tensor, "b f *xyz"]) -> Float[Tensor, "b c *xyz"]:
        """Repeat each field's noise level for each of its channels."""
        counts = torch.tensor([len(field.channels) for field in self], device=sigma.device)
        return sigma.repeat_interleave(counts, dim=1)


def image_and_label(channels: tuple[str, ...], labels: tuple[str, ...]) -> Fields:
    """The joint of one scan (its channels) and its label map (its classes, background first)."""
    return Fields(Field("image", "continuous", channels), Field("label", "categorical", labels))


def one_hot(labels: Int[Tensor, "b x y z"], classes: int) -> Float[Tensor, "b c x y z"]:
    """Class indices as ±1 channels, the values that a categorical field takes in z."""
    hot = torch.nn.functional.one_hot(labels.long(), classes)
    return 2 * hot.movedim(-1, 1).float() - 1


def probabilities(z_label: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
    """Class probabilities of a denoised categorical field (the posterior mean of ±1 channels)."""
    return (z_label + 1) / 2
