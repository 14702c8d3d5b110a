"""Exact-answer toy: guides and samplers against the known posterior of a Gaussian mixture.

    python -m genmed.bench.mixture

Two fields of 16 coordinates, jointly a mixture of 8 Gaussians with full covariances: the denoiser and the
posterior under any linear observation are closed formulas, so the error of a guided sampler is its own.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from genmed.fields import Field, Fields
from genmed.guide import guided
from genmed.observe import Identity, Mask, Observation, Operator, downsample, voxels
from genmed.samplers import Denoise, euler, heun, noise, schedule, seeded, time_travel

SIZE = 16
STEPS, TRAVELS = 16, 3  # noise levels, and travels, of the default here; docs/experiments.md says why
FIELDS = Fields(Field("image", "continuous", ("image",)), Field("shape", "continuous", ("shape",)))


@dataclass(frozen=True)
class Mixture:
    """Σ_k π_k N(m_k, C_k) over d = 32 coordinates, the two fields one after the other."""

    weights: Float[Tensor, " k"]
    means: Float[Tensor, "k d"]
    covariances: Float[Tensor, "k d d"]

    def posterior(self, matrix: Float[Tensor, "m d"], y: Float[Tensor, " m"], sigma_y: float) -> "Mixture":
        """The exact distribution given y = matrix · x + sigma_y n."""
        cross = self.covariances @ matrix.T
        inner = matrix @ cross + sigma_y**2 * torch.eye(len(y), dtype=y.dtype)
        gain = torch.linalg.solve(inner, cross.mT).mT
        surprise = y - self.means @ matrix.T
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), inner).log_prob(surprise)
        return Mixture(
            (self.weights.log() + evidence).softmax(0),
            self.means + (gain @ surprise[..., None]).squeeze(-1),
            self.covariances - gain @ cross.mT,
        )

    def mean(self) -> Float[Tensor, " d"]:
        return self.weights @ self.means

    def covariance(self) -> Float[Tensor, "d d"]:
        centred = self.means - self.mean()
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + torch.einsum("k,kd,ke->de", self.weights, centred, centred)

    def sample(self, generator: torch.Generator) -> Float[Tensor, " d"]:
        k = int(torch.multinomial(self.weights, 1, generator=generator))
        white = torch.randn(self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + torch.linalg.cholesky(self.covariances[k]) @ white

    def denoiser(self) -> Denoise:
        """E[x | x + σ n = z] with z of shape (b, 2, 16, 1, 1)."""
        lengths, directions = torch.linalg.eigh(self.covariances)

        def denoise(z: Float[Tensor, "b 2 16 1 1"], sigma: float) -> Float[Tensor, "b 2 16 1 1"]:
            total = lengths + sigma**2
            rotated = torch.einsum("kde,bkd->bke", directions, z.flatten(1)[:, None] - self.means)
            log_weights = self.weights.log() - total.log().sum(1) / 2 - (rotated**2 / total).sum(2) / 2
            shrunk = torch.einsum("kde,bke->bkd", directions, rotated * lengths / total)
            return torch.einsum("bk,bkd->bd", log_weights.softmax(1), self.means + shrunk).view_as(z)

        return denoise


def toy(seed: int = 0, components: int = 8) -> Mixture:
    """Random means of unit variance; Wishart covariances, half of it within the components."""
    generator = torch.Generator().manual_seed(seed)
    d = 2 * SIZE
    means = torch.randn(components, d, generator=generator, dtype=torch.float64)
    roots = torch.randn(components, d, d, generator=generator, dtype=torch.float64)
    weights = torch.full((components,), 1 / components, dtype=torch.float64)
    covariances = 0.5 * roots @ roots.mT / d + 1e-3 * torch.eye(d, dtype=torch.float64)
    return Mixture(weights, means, covariances)


# Scenes ---------------------------------------------------------------------------------------------------

SCENES = ("first field", "quarter", "4× averages")


def scene(kind: str, generator: torch.Generator) -> dict[str, Operator]:
    """What is observed of each field; which coordinates is drawn anew every time."""
    if kind == "first field":
        return {"image": Identity()}
    if kind == "4× averages":
        return {name: downsample((SIZE, 1, 1), (4, 1, 1)) for name in FIELDS.names}
    seen = torch.zeros(2, SIZE, dtype=torch.bool)
    seen.view(-1)[torch.randperm(2 * SIZE, generator=generator)[: SIZE // 2]] = True
    return {name: voxels(seen[i, :, None, None]) for i, name in enumerate(FIELDS.names)}


def as_matrix(operators: dict[str, Operator]) -> Float[Tensor, "m d"]:
    """The observed rows of all operators, acting on both fields in one vector."""
    basis = torch.eye(2 * SIZE, dtype=torch.float64).view(-1, 2, SIZE, 1, 1)
    rows = torch.cat([A(basis[:, FIELDS.slice(name)]).flatten(1) for name, A in operators.items()], dim=1).T
    return rows[(rows != 0).any(1)]


@dataclass(frozen=True)
class Draw:
    """One truth, what was observed of it, and the exact posterior."""

    observations: list[Observation]
    posterior: Mixture
    unobserved: Bool[Tensor, " d"]  # coordinates that no observation gives away alone


def draw(mixture: Mixture, kind: str, sigma_y: float, seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    truth = mixture.sample(generator).view(1, 2, SIZE, 1, 1)
    observations = []
    for name, operator in scene(kind, generator).items():
        clean = operator(truth[:, FIELDS.slice(name)])
        error = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        observations.append(Observation(name, clean + sigma_y * error, operator, sigma_y))
    matrix = as_matrix({o.field: o.operator for o in observations})
    y = torch.cat([o.y[o.seen > 0] for o in observations])
    return Draw(observations, mixture.posterior(matrix, y, sigma_y), ~(matrix == 1).any(0))


def together(draws: Sequence[Draw], samples: int) -> list[Observation]:
    """The observations of several draws as one batch, each repeated for its samples."""

    def repeat(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).repeat_interleave(samples, dim=0)

    batch = []
    for same in zip(*(d.observations for d in draws), strict=True):
        masks = [o.operator.seen for o in same if isinstance(o.operator, Mask)]
        operator = Mask(repeat(masks)) if masks else same[0].operator
        batch.append(Observation(same[0].field, repeat([o.y for o in same]), operator, same[0].sigma_y))
    return batch


# Scores ---------------------------------------------------------------------------------------------------

Guide = Callable[[Denoise, Fields, Sequence[Observation]], Denoise]
Sampler = Callable[[Denoise, Tensor, Sequence[torch.Generator]], Tensor]


@dataclass(frozen=True)
class Score:
    """Over unobserved coordinates and draws: RMS error of the mean, in posterior standard deviations, and
    the sample's spread divided by the posterior's. `evaluations` of the denoiser for one sample."""

    error: float
    spread: float
    evaluations: int


def evaluate(
    guide: Guide, sampler: Sampler, kind: str, *, sigma_y: float = 0.05, draws: int = 8, samples: int = 256,
    mixtures: int = 2,
) -> Score:  # fmt: skip
    """Sample every posterior and compare with the exact one."""
    errors, spreads, evaluations = [], [], 0
    for mixture in map(toy, range(mixtures)):
        denoise = mixture.denoiser()
        cases = [draw(mixture, kind, sigma_y, seed) for seed in range(draws)]

        def counted(z: Tensor, sigma: float, denoise: Denoise = denoise) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return denoise(z, sigma)

        generators = seeded(range(draws * samples))
        white = noise(torch.zeros(draws * samples, 2, SIZE, 1, 1, dtype=torch.float64), generators)
        z0 = sampler(guide(counted, FIELDS, together(cases, samples)), white, generators)
        for case, found in zip(cases, z0.view(draws, samples, -1), strict=True):
            deviation = case.posterior.covariance().diagonal().sqrt()
            error = (found.mean(0) - case.posterior.mean()) / deviation
            errors.append(error[case.unobserved].square().mean())
            spreads.append((found.std(0) / deviation)[case.unobserved].square().mean())
    error, spread = (float(torch.stack(squares).mean().sqrt()) for squares in (errors, spreads))
    return Score(error, spread, evaluations // mixtures)


# The table ------------------------------------------------------------------------------------------------

LIMITS = {"first field": 0.15, "quarter": 0.6, "4× averages": 0.6}  # what the default must reach


def travelling(steps: int, travels: int, eta: float = 1.0) -> Sampler:
    """Time travel from unit white noise."""

    def sample(denoise: Denoise, white: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        return time_travel(denoise, 20 * white, schedule(20, 0.02, steps), travels, generators, eta=eta)

    return sample


def chosen(denoise: Denoise, white: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """The default: within `LIMITS` with some margin, at few evaluations."""
    return travelling(STEPS, TRAVELS)(denoise, white, generators)


def unrolled(sampler: Callable[..., Tensor], steps: int) -> Sampler:
    """`euler` or `heun` from unit white noise."""
    return lambda denoise, white, generators: sampler(denoise, 20 * white, schedule(20, 0.02, steps))


def rows() -> list[tuple[str, str, Guide, Sampler]]:
    """Guides with the default sampler, then samplers with the default guide."""
    relaxed = partial(guided, relax=2.0)
    guides: list[tuple[str, Guide]] = [
        ("line search", partial(guided, relax=1.0)),
        ("line search × 1.5", partial(guided, relax=1.5)),
        ("**line search × 2**", relaxed),
        ("line search × 4", partial(guided, relax=4.0)),
        ("line search × 2, observed field only", partial(guided, relax=2.0, steer="observed")),
        *((f"variance γ = {g}", partial(guided, method="variance", gamma=g)) for g in (0.1, 0.3, 1.0)),
    ]
    samplers: list[tuple[str, Sampler]] = [
        (f"Euler {2 * STEPS}", unrolled(euler, 2 * STEPS)),
        (f"Heun {STEPS}", unrolled(heun, STEPS)),
        (f"Euler {STEPS}, {TRAVELS} travels", travelling(STEPS, TRAVELS, eta=0.0)),
        *((f"ancestral {n}", travelling(n, 0)) for n in (STEPS, 2 * STEPS)),
        *((f"ancestral {STEPS}, {n} travels", travelling(STEPS, n)) for n in (1, 2, 3, 4) if n != TRAVELS),
    ]
    default = f"ancestral {STEPS}, {TRAVELS} travels"
    return [(name, default, guide, chosen) for name, guide in guides] + [
        ("line search × 2", name, relaxed, sampler) for name, sampler in samplers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, help="samples of every posterior (%(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="observations of every mixture (%(default)s)")
    parser.add_argument("--mixtures", type=int, default=2, help="random mixtures (%(default)s)")
    parser.add_argument("--sigma-y", type=float, default=0.05, help="noise of the observation (%(default)s)")
    options = vars(parser.parse_args())
    print("| guide | sampler | evaluations | " + " | ".join(SCENES) + " |")
    print("|---|---|---|" + "---|" * len(SCENES))
    for name, how, guide, sampler in rows():
        scores = [evaluate(guide, sampler, kind, **options) for kind in SCENES]
        cells = " | ".join(f"{score.error:.2f} ({score.spread:.2f})" for score in scores)
        print(f"| {name} | {how} | {scores[0].evaluations} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
