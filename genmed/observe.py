"""What was observed: `y = A(field) + sigma_y · noise`, with linear operators A and their adjoints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from genmed.errors import GenMedError
from genmed.space import apply_matrices, overlap_matrix


class Operator(Protocol):
    """A linear map of one field, (b, c, x, y, z) to (b, c, x', y', z')."""

    @property
    def seen(self) -> Bool[Tensor, "#b #c #x #y #z"]:
        """Where the output is an observation; elsewhere it is zero."""

    def __call__(self, x: Float[Tensor, "b c x y z"]) -> Tensor: ...

    def adjoint(self, y: Float[Tensor, "b c x y z"]) -> Tensor:
        """Aᵀ y, so that <A x, y> = <x, Aᵀ y>."""


@dataclass(frozen=True)
class Identity:
    """The whole field is observed."""

    @property
    def seen(self) -> Bool[Tensor, "1 1 1 1 1"]:
        return torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)

    def __call__(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return x

    def adjoint(self, y: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return y


@dataclass(frozen=True, eq=False)
class Mask:
    """Only some voxels are observed; the others become zero."""

    seen: Bool[Tensor, "#b #c #x #y #z"]

    def __call__(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return x * self.seen.to(x)

    def adjoint(self, y: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return self(y)


@dataclass(frozen=True, eq=False)
class Resample:
    """One matrix (n_out, n_in) per axis, such as `Space.scanner()`: coarser voxels, thick slices, crops."""

    matrices: tuple[Tensor, Tensor, Tensor]

    @property
    def seen(self) -> Bool[Tensor, "1 1 1 1 1"]:
        return torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)

    def __call__(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return apply_matrices(x, [matrix.to(x) for matrix in self.matrices])

    def adjoint(self, y: Float[Tensor, "b c x2 y2 z2"]) -> Float[Tensor, "b c x y z"]:
        return apply_matrices(y, [matrix.to(y).T for matrix in self.matrices])


@dataclass(frozen=True)
class Compose:
    """`then` after `first`; only `first` may change the grid (mask after resample)."""

    first: Operator
    then: Mask

    @property
    def seen(self) -> Bool[Tensor, "#b #c #x #y #z"]:
        return self.then.seen

    def __call__(self, x: Float[Tensor, "b c x y z"]) -> Tensor:
        return self.then(self.first(x))

    def adjoint(self, y: Float[Tensor, "b c x y z"]) -> Tensor:
        return self.first.adjoint(self.then.adjoint(y))


@dataclass(frozen=True, eq=False)
class Observation:
    """A field, seen through an operator, gave the values y with noise of standard deviation sigma_y.

    What was not observed does not exist here: values of y outside `operator.seen` are replaced by zero,
    whatever they were, so nothing later can look at them.

    Noise is taken as Gaussian. That of magnitude images, Rician, nearly is where the signal x is well above its s, but
    for a mean that is s²/2x too high; where there is no signal, the mean is s · √(π/2) instead of 0, which is not
    modelled (Gudbjartsson & Patz, Magnetic Resonance in Medicine 34:910, 1995).

    Args:
        field: name of the observed field.
        y: (1 or b, c, x', y', z') values in the field's own units of z (normalised image, ±1 label).
        operator: maps the field to the grid of y.
        sigma_y: standard deviation of the noise of y, above 0.
    """

    field: str
    y: Float[Tensor, "b c x y z"]
    operator: Operator
    sigma_y: float = 0.05

    def __post_init__(self) -> None:
        seen = self.operator.seen.to(self.y.device)
        y = torch.where(seen, self.y, torch.zeros_like(self.y))
        if not self.sigma_y > 0:
            raise GenMedError(f"sigma_y of the observed {self.field} is {self.sigma_y}; it must be above 0")
        if not bool(seen.any()):
            raise GenMedError(f"no voxel of the {self.field} is observed; observe at least one")
        if not bool(torch.isfinite(y).all()):
            raise GenMedError(f"the observed {self.field} has values that are not finite; mask them out")
        object.__setattr__(self, "y", y)

    @property
    def seen(self) -> Float[Tensor, "b c x y z"]:
        """1 where y is an observation, 0 elsewhere; same shape as y."""
        return self.operator.seen.to(self.y).expand_as(self.y)


def voxels(seen: Bool[Tensor, "x y z"]) -> Mask:
    """Observe the voxels where `seen` is true, in every channel."""
    return Mask(seen.bool()[None, None])


def planes(shape: Sequence[int], x: Iterable[int] = (), y: Iterable[int] = (), z: Iterable[int] = ()) -> Mask:
    """Observe whole planes at these voxel indices of each axis."""
    seen = torch.zeros(tuple(shape), dtype=torch.bool)
    for axis, indices in enumerate((x, y, z)):
        seen.index_fill_(axis, torch.tensor(list(indices), dtype=torch.long), True)
    return voxels(seen)


def box(shape: Sequence[int], start: Sequence[int], stop: Sequence[int], inside: bool = True) -> Mask:
    """Observe the voxels of a box, start included and stop excluded; or with `inside=False` all others."""
    seen = torch.zeros(tuple(shape), dtype=torch.bool)
    seen[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))] = True
    return voxels(seen == inside)


def drop_slices(shape: Sequence[int], axis: int, dropped: Iterable[int]) -> Mask:
    """Observe everything but these slices of one axis."""
    seen = torch.ones(tuple(shape), dtype=torch.bool)
    seen.index_fill_(axis, torch.tensor(list(dropped), dtype=torch.long), False)
    return voxels(seen)


def downsample(shape: Sequence[int], factors: Sequence[float]) -> Resample:
    """Observe averages: voxels `factors` times as large per axis, over the same field of view."""
    coarse = [max(1, round(size / factor)) for size, factor in zip(shape, factors, strict=True)]
    x, y, z = (torch.as_tensor(overlap_matrix(fine, few)) for fine, few in zip(shape, coarse, strict=True))
    return Resample((x, y, z))


def masked(first: Operator, seen: Bool[Tensor, "x y z"]) -> Compose:
    """Observe only some voxels of another operator's output, such as the slices of a stack that exist."""
    return Compose(first, voxels(seen))
