"""Misfits between what the model expects to be observed, x = A(ẑ₀), and the observation y.

A match is fitted first and differentiated afterwards: `fit(x, y, seen, labels)` settles, without gradient
and for each sample alone, whatever is unknown about the appearance (y ≈ g(x)) and returns the residual
`r(x, labels)` with that frozen. Every misfit is ½ Σ r² / σ_y². Only voxels with `seen` = 1 count.
r has the shape of x, but for `mind`, which has more channels.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from genmed.errors import GenMedError
from genmed.space import apply_matrices

Residual = Callable[[Tensor, Tensor | None], Tensor]
Match = Callable[[Tensor, Tensor, Tensor, Tensor | None], Residual]

AXES = (2, 3, 4)  # of space, in (b, c, x, y, z)


def none(
    x: Float[Tensor, "b c x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "#b c x y z"],
    labels: Float[Tensor, "b l x y z"] | None = None,
) -> Residual:
    """Same modality: r = y − x."""
    return lambda x, labels: seen * (y - x)


def poly(order: int = 3, ridge: float = 1e-3) -> Match:
    """Another modality: y ≈ g(x), g a polynomial per channel in the Legendre basis on the range of x.

    It need not be monotone. `order=1` is an affine change of intensity.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        seen = seen.expand_as(x)
        low, high = _range(x, seen)
        half = (high - low) / 2

        def basis(x: Tensor) -> Tensor:
            return _legendre((x - low) / half - 1, order)

        weights = _least_squares(basis(x), y, seen, ridge)
        return lambda x, labels: seen * (y - torch.einsum("bck,bckxyz->bcxyz", weights, basis(x)))

    return fit


affine: Match = poly(order=1, ridge=0.0)


def curve(knots: int = 12, smooth: float = 1e-4, trim: float = 0.005) -> Match:
    """Another modality: y ≈ g(x), g a smooth lookup table: a penalised cubic spline (Eilers & Marx 1996).

    It need not be monotone, and follows bends that a polynomial of low order cannot. Beyond the range of x it
    is constant, so such voxels are not pulled.

    Args:
        knots: control points, equally spaced; the range of x has three intervals fewer.
        smooth: weight of their squared second differences against the mean squared residual. An affine map
            costs nothing.
        trim: fraction of the voxels at either end that may lie beyond the range.

    Raises:
        GenMedError: with fewer than 4 knots.
    """
    _at_least_four("knots", knots)

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        g = lookup(x, y, seen, knots, smooth, trim)
        return lambda x, labels: seen * (y - g(x))

    return fit


def lookup(
    x: Float[Tensor, "b c x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Tensor,
    knots: int = 12,
    smooth: float = 1e-4,
    trim: float = 0.005,
) -> Callable[[Tensor], Tensor]:
    """The map g of `curve` that takes x to y where it was seen; for images of any size."""
    x_range = _range(x, seen.expand_as(x), trim)
    control = _fit_spline(_position(x, x_range, knots), y, seen.expand_as(x), knots, smooth)[:, :, None]
    return lambda x: _spline(control, _position(x, x_range, knots))


def labels(ridge: float = 1e-3, slope: bool = True) -> Match:
    """Another modality: y ≈ Σ_l p_l (a_l x + b_l), affine within every label, p the current soft labels.

    The intensity model of SAMSEG (Puonti et al. 2016) with a slope added; `slope=False` is SAMSEG's, one
    intensity a label, whatever x is. The labels stay differentiable, so the guide can also move a boundary to
    explain y.
    """

    def basis(x: Tensor, soft: Tensor) -> Tensor:
        parts = [part.expand_as(x) for part in soft.split(1, dim=1)]
        return torch.stack([*(part * x for part in parts if slope), *parts], 2)

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        if labels is None:
            raise ValueError("match.labels needs a categorical field in the model")
        weights = _least_squares(basis(x, labels), y, seen.expand_as(x), ridge)

        def residual(x: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            return seen * (y - torch.einsum("bck,bckxyz->bcxyz", weights, basis(x, labels)))

        return residual

    return fit


def bias(order: int = 2, match: Match = none, ridge: float = 1e-3) -> Match:
    """Uneven brightness and contrast: y ≈ b(position) g(x) + c(position), g the map that `match` finds first.

    b and c are sums of products of Legendre polynomials along the axes, of total degree `order` at most. Use
    with `none` or matches that map intensities: affine, poly, curve, labels.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        residual = match(x, y, seen, labels)
        with torch.no_grad():
            gain, offset = _fit_bias(y - residual(x, labels), y, seen.expand_as(x), order, ridge)
        return lambda x, labels: seen * (y - gain * (y - residual(x, labels)) - offset)

    return fit


def lncc(radius: int = 2, floor: float = 0.1) -> Match:
    """Another modality, local: r² = 1 − ρ², ρ the correlation of x and y in the window round each voxel.

    Blind to every slow change of brightness and contrast, inversion included. `floor` (in units of x and y)
    is the contrast below which a window counts as flat.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        mass = _window(seen, radius).clamp(min=1e-6)

        def mean(values: Tensor) -> Tensor:
            return _window(seen * values, radius) / mass

        y_mean = mean(y)
        y_variance = (mean(y * y) - y_mean**2).clamp(min=0) + floor**2

        def residual(x: Tensor, labels: Tensor | None) -> Tensor:
            x_mean = mean(x)
            x_variance = (mean(x * x) - x_mean**2).clamp(min=0) + floor**2
            covariance = mean(x * y) - x_mean * y_mean
            return seen * (1 - covariance**2 / (x_variance * y_variance)).clamp(min=1e-6).sqrt()

        return residual

    return fit


def mind(radius: int = 1, floor: float = 0.1) -> Match:
    """Another modality, local: r is the difference of the self-similarities of x and of y.

    The modality independent neighbourhood descriptor (MIND, Heinrich et al. 2012, eq. 4) of the six face
    neighbours: m_k = exp(−D_k / V), D_k the mean squared difference between the patches of `radius` round a
    voxel and round its neighbour k, V the mean of D_k. It is left as it is, not divided by its maximum, to
    stay smooth, and 1 where no pair is seen. Blind to inversion and to slow changes of brightness and contrast.

    r has six channels for every channel of y. A constant descriptor would miss as much as a constant
    intensity: r is scaled by the ratio of the standard deviations of y and of its descriptor. `floor` (in
    units of x and y) is the contrast below which a neighbourhood counts as flat.
    """

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        pairs = [_margin(seen, axis).unfold(axis, 2, 1).prod(-1) for axis in AXES]
        masses = [_window(pair, radius).clamp(min=1e-6) for pair in pairs]
        valid = _both_sides([(mass > 1e-6).to(y) for mass in masses])
        share = valid / valid.sum(2, keepdim=True).clamp(min=1)

        def descriptor(values: Tensor) -> Float[Tensor, "b c 6 x y z"]:
            squares = [pair * _margin(values, a).diff(dim=a) ** 2 for a, pair in zip(AXES, pairs, strict=True)]
            means = [_window(square, radius) / mass for square, mass in zip(squares, masses, strict=True)]
            distance = _both_sides(means)
            return torch.exp(distance * (-1 / ((share * distance).sum(2, keepdim=True) + floor**2)))

        target = descriptor(y)
        spread = _variance(target, seen[:, :, None]).sum(2).clamp(min=0.01)
        scale = seen * (_variance(y, seen) / spread).sqrt()
        return lambda x, labels: (scale[:, :, None] * (descriptor(x) - target)).flatten(1, 2)

    return fit


def _margin(values: Tensor, axis: int) -> Tensor:
    """A plane of zeros before the first and after the last of an axis: n voxels then have n + 1 pairs of neighbours."""
    return pad(values, (0, 0) * (4 - axis) + (1, 1))


def _both_sides(pairs: list[Tensor]) -> Float[Tensor, "b c 6 x y z"]:
    """Values of the pairs of neighbours along x, y and z, as seen from every voxel: before and after it."""
    sides = [
        values.narrow(axis, start, values.shape[axis] - 1)
        for axis, values in zip(AXES, pairs, strict=True)
        for start in (0, 1)
    ]
    return torch.stack(sides, 2)


def mutual_information(bins: int = 24, trim: float = 0.005) -> Match:
    """Another modality: r = s √(2 (max log p(y | ·) − log p(y | x))), p from the joint histogram at the fit.

    Σ log p(y | x) is, but for a constant, N times the mutual information of x and y (Viola & Wells 1997). With
    the histogram frozen it is the joint likelihood of Leventon & Grimson (1998), whose gradient is that of the
    mutual information to first order. Any relation of intensities will do, one with several values of y for
    the same x too. p is smoothed by a cubic B-spline (Parzen window) along both intensities, one voxel's worth
    of the uniform distribution is added for every x, and log p is a cubic spline in x.

    s, in units of y, is the root mean square spread of y given x: if p is a Gaussian round a map g, then
    |r| = |y − g(x)|. `trim` is the fraction of the voxels that may lie beyond the first and the last bin.

    Raises:
        GenMedError: with fewer than 4 bins.
    """
    _at_least_four("bins", bins)

    def fit(x: Tensor, y: Tensor, seen: Tensor, labels: Tensor | None = None) -> Residual:
        every, y_all = seen.expand_as(x), y.expand_as(x)
        x_range, (low, high) = _range(x, every, trim), _range(y_all, every, trim)
        row = _position(y_all, (low, high), bins).round().long()
        joint = _histogram(row, _position(x.detach(), x_range, bins).round().long(), every, bins)
        likelihood = (joint + 1 / bins) / (joint.sum(2, keepdim=True) + 1)
        spread = (high - low) / (bins - 3) * _conditional_deviation(joint, likelihood)
        control = likelihood.log()
        fine = torch.linspace(1, bins - 2, 8 * (bins - 3) + 1).to(x).expand(*joint.shape[:3], -1)
        best = _spline(control, fine, torch.arange(bins, device=x.device)[:, None]).amax(-1)
        best = best.gather(2, row.flatten(2)).view_as(row)

        def residual(x: Tensor, labels: Tensor | None) -> Tensor:
            missed = best - _spline(control, _position(x, x_range, bins), row)
            return seen * spread * (2 * missed).clamp(min=1e-6).sqrt()

        return residual

    return fit


def _histogram(
    row: Int[Tensor, "b c x y z"], column: Int[Tensor, "b c x y z"], seen: Float[Tensor, "b c x y z"], bins: int
) -> Float[Tensor, "b c n n"]:
    """How many seen voxels fall into row and column, smoothed along both by a cubic B-spline."""
    counts = seen.new_zeros(*seen.shape[:2], bins * bins)
    counts = counts.scatter_add(2, (row * bins + column).flatten(2), seen.flatten(2)).unflatten(2, (bins, bins))
    ones = torch.ones(bins - 1, dtype=seen.dtype, device=seen.device)
    window = (4 * torch.eye(bins).to(seen) + ones.diag(1) + ones.diag(-1)) / 6
    return window @ counts @ window


def _conditional_deviation(
    joint: Float[Tensor, "b c n n"], likelihood: Float[Tensor, "b c n n"]
) -> Float[Tensor, "b c 1 1 1"]:
    """Root mean square spread of the row given the column, in rows."""
    rows = torch.arange(joint.shape[2]).to(joint)[:, None]
    mean = (likelihood * rows).sum(2, keepdim=True)
    variance = (likelihood * (rows - mean) ** 2).sum(2)
    mass = joint.sum(2)
    return ((mass * variance).sum(2) / mass.sum(2).clamp(min=1e-6)).sqrt()[..., None, None, None]


# Statistics of the seen voxels, per sample and channel ----------------------------------------------------


def _window(values: Tensor, radius: int) -> Tensor:
    """Mean of the cube round each voxel, beyond the border zeros. Band matrices are the fastest way on a CPU."""
    positions = [torch.arange(n, device=values.device) for n in values.shape[2:]]
    bands = [(at[:, None] - at).abs() <= radius for at in positions]
    return apply_matrices(values, [band.to(values) / (2 * radius + 1) for band in bands])


def _variance(values: Tensor, seen: Tensor) -> Tensor:
    """Variance along the last three axes, which are kept with size 1."""
    space = (-3, -2, -1)
    mass = seen.sum(space, keepdim=True).clamp(min=1e-6)
    mean = (seen * values).sum(space, keepdim=True) / mass
    return (seen * (values - mean) ** 2).sum(space, keepdim=True) / mass


@torch.no_grad()
def _range(
    x: Float[Tensor, "b c x y z"], seen: Float[Tensor, "b c x y z"], trim: float = 0.0
) -> tuple[Float[Tensor, "b c 1 1 1"], Float[Tensor, "b c 1 1 1"]]:
    """Smallest and largest value but for the fraction `trim` at either end; never equal."""
    x, seen = x.flatten(2), seen.flatten(2)
    size = int(trim * x.shape[2]) + 1
    count = seen.sum(2, keepdim=True)
    last = (trim * count).long().clamp(max=size - 1)
    high, low = (
        sign * (sign * x).masked_fill(seen == 0, -torch.inf).topk(size).values.gather(2, last) for sign in (1, -1)
    )
    low, high = (end.masked_fill(count == 0, 0.0)[..., None, None] for end in (low, high))
    return low, high.maximum(low + 2e-6 * (1 + low.abs()))


def _at_least_four(name: str, value: int) -> None:
    if value < 4:
        raise GenMedError(f"{name} of the match is {value}; a cubic spline needs 4 or more")


# Cubic splines with equally spaced control points ---------------------------------------------------------

# Row p: what the four control points round an interval contribute to the p-th power of the way through it.
CUBIC = torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]], dtype=torch.float64) / 6


def _position(x: Tensor, x_range: tuple[Tensor, Tensor], size: int) -> Tensor:
    """Where x lies among `size` control points: the range is [1, size − 2], beyond it positions stop."""
    low, high = x_range
    return (1 + (size - 3) * (x - low) / (high - low)).clamp(1, size - 2)


def _spline(
    control: Float[Tensor, "b c r n"], position: Float[Tensor, "b c ..."], row: Tensor | int = 0
) -> Float[Tensor, "b c ..."]:
    """Values of the splines with the control points in `row`, at positions within [1, n − 2]."""
    pieces = (control.unfold(3, 4, 1) @ CUBIC.to(control).T).flatten(2, 3)
    intervals = control.shape[3] - 3
    start = position.detach().long().clamp(max=intervals)
    index = (row * intervals + start - 1).flatten(2)
    way = position - start
    value = torch.zeros_like(position)
    for power in (3, 2, 1, 0):
        value = value * way + pieces[..., power].gather(2, index).view_as(position)
    return value


@torch.no_grad()
def _fit_spline(
    position: Float[Tensor, "b c x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "b c x y z"],
    size: int,
    smooth: float,
) -> Float[Tensor, "b c n"]:
    """Control points w of min mean_seen (y − g)² + smooth |second differences of w|².

    Within an interval the sums of the basis' products follow from those of the powers of the way through it.
    """
    intervals = size - 3
    start = position.long().clamp(max=intervals)
    way, index = (position - start).flatten(2).double(), (start - 1).flatten(2)
    weight, target = seen.flatten(2).double(), (seen * y).flatten(2).double()

    def sums(values: Tensor, count: int) -> Float[Tensor, "b c i p"]:
        powers = []
        for _ in range(count):
            powers.append(values.new_zeros(*values.shape[:2], intervals).scatter_add(2, index, values))
            values = values * way
        return torch.stack(powers, 3)

    cubic = CUBIC.to(way.device)
    grams = cubic.T @ sums(weight, 7).unfold(3, 4, 1) @ cubic
    moments = sums(target, 4) @ cubic
    gram, moment = way.new_zeros(*way.shape[:2], size, size), way.new_zeros(*way.shape[:2], size)
    for i in range(intervals):
        gram[..., i : i + 4, i : i + 4] += grams[:, :, i]
        moment[..., i : i + 4] += moments[:, :, i]
    bend = torch.eye(size, dtype=way.dtype, device=way.device).diff(n=2, dim=0)
    count = weight.sum(2).clamp(min=1)[..., None]
    return _solve(gram / count[..., None] + smooth * bend.T @ bend, moment / count, 0.0).to(position.dtype)


# Least squares --------------------------------------------------------------------------------------------


def _legendre(t: Float[Tensor, "b c x y z"], order: int) -> Float[Tensor, "b c k x y z"]:
    """Legendre polynomials P_0 … P_order by Bonnet's recursion."""
    terms = [torch.ones_like(t), t]
    for n in range(1, order):
        terms.append(((2 * n + 1) * t * terms[n] - n * terms[n - 1]) / (n + 1))
    return torch.stack(terms[: order + 1], dim=2)


@torch.no_grad()
def _least_squares(
    basis: Float[Tensor, "b c k x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "b c x y z"],
    ridge: float,
) -> Float[Tensor, "b c k"]:
    """Weights w of min mean_seen (y − w·basis)² + ridge |w|², for every sample and channel alone."""
    columns = (basis * seen[:, :, None]).flatten(3).double()
    target = (y * seen).flatten(2).double()
    count = seen.flatten(2).sum(-1).clamp(min=1)[..., None]
    moment = (columns @ target[..., None]).squeeze(-1) / count
    return _solve(columns @ columns.mT / count[..., None], moment, ridge).to(basis.dtype)


def _solve(gram: Float[Tensor, "b c k k"], moment: Float[Tensor, "b c k"], ridge: float) -> Float[Tensor, "b c k"]:
    gram = gram + (ridge + 1e-8) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, moment)


@torch.no_grad()
def _fit_bias(
    x: Float[Tensor, "b c x y z"],
    y: Float[Tensor, "#b c x y z"],
    seen: Float[Tensor, "b c x y z"],
    order: int,
    ridge: float,
) -> tuple[Float[Tensor, "b c x y z"], Float[Tensor, "b c x y z"]]:
    """Least-squares b and c of y ≈ b x + c, polynomials of the position. The sums go one axis at a time."""
    positions = [torch.linspace(-1, 1, n, dtype=torch.float64, device=x.device) for n in x.shape[2:]]
    axes = [_legendre(position[None, None], order)[0, 0] for position in positions]
    products = [(axis[:, None] * axis).flatten(0, 1) for axis in axes]
    degree = torch.arange(order + 1, device=x.device)
    kept = (degree[:, None, None] + degree[:, None] + degree).flatten() <= order
    terms, size = len(kept), order + 1

    def moment(weight: Tensor) -> Float[Tensor, "b c k"]:
        return apply_matrices(weight, axes).flatten(2)[..., kept]

    def gram(weight: Tensor) -> Float[Tensor, "b c k k"]:
        sums = apply_matrices(weight, products).reshape(*weight.shape[:2], *[size] * 6)
        return sums.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*weight.shape[:2], terms, terms)[..., kept, :][..., kept]

    weight, count = seen.double(), seen.double().flatten(2).sum(2).clamp(min=1)[..., None]
    weighted = weight * x
    mixed = gram(weighted)
    grams = torch.cat([torch.cat([gram(weighted * x), mixed], 3), torch.cat([mixed, gram(weight)], 3)], 2)
    moments = torch.cat([moment(weighted * y), moment(weight * y)], 2)
    weights = _solve(grams / count[..., None], moments / count, ridge)

    def polynomial(weights: Float[Tensor, "b c k"]) -> Float[Tensor, "b c x y z"]:
        full = weights.new_zeros(*weights.shape[:2], terms)
        full[..., kept] = weights
        return apply_matrices(full.unflatten(2, (size, size, size)), [axis.T for axis in axes]).to(x.dtype)

    gain, offset = weights.chunk(2, dim=2)
    return polynomial(gain), polynomial(offset)
