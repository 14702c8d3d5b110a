"""What the joint model costs beside a plain network of the same size, and `genmed --help` beside its libraries.

Not part of the test suite:

    pytest genmed/bench/speed.py

Each ratio is the median over interleaved repetitions of both, so that a busy machine slows both alike.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from genmed.bench.peers import dynunet
from genmed.denoiser import Denoiser, build
from genmed.guide import guided
from genmed.observe import Identity, Observation
from genmed.plan import PRESETS, Plan
from genmed.tasks.segment import conditional

ROUNDS = 15
CONDITIONAL_LIMIT = 1.15  # × one forward of DynUNet
GUIDED_LIMIT = 1.10  # × forward and backward of the bare network
HELP_LIMIT = 2.5  # × importing what prints it

PLAN = Plan(
    name="speed",
    channels=("MRI",),
    labels=("background", "Anterior", "Posterior"),
    label_values=(0, 1, 2),
    spacing_mm=(1.0, 1.0, 1.0),
    patch=(40, 56, 40),
    widths=PRESETS["base"].widths,
    batch=1,
    steps=1,
    learning_rate=1e-3,
    thick_slices=False,
    extent_mm=(60.0, 60.0, 60.0),
)


def test_conditional_costs_about_one_forward_of_dynunet(benchmark: Any) -> None:
    denoiser, image = untrained(), torch.randn(1, 1, *PLAN.patch)
    peer = dynunet(PLAN).eval().requires_grad_(False)
    with torch.no_grad():
        check(benchmark, lambda: conditional(denoiser, image), lambda: peer(image), CONDITIONAL_LIMIT)


def test_guided_step_costs_about_forward_and_backward(benchmark: Any) -> None:
    denoiser = untrained()
    z, image = torch.randn(1, denoiser.fields.channels, *PLAN.patch), torch.randn(1, 1, *PLAN.patch)
    seen = torch.randn(1, denoiser.fields.channels + len(denoiser.fields), *PLAN.patch)
    levels, upstream = torch.zeros(1, len(denoiser.fields)), torch.randn_like(z)
    step = guided(
        lambda z, sigma: denoiser(z, z.new_full((len(z), len(denoiser.fields)), sigma)),
        denoiser.fields,
        [Observation("image", image, Identity(), 0.05)],
    )

    def bare() -> Tensor:
        x = seen.detach().requires_grad_()
        return torch.autograd.grad(denoiser.net(x, levels), x, upstream)[0]

    check(benchmark, lambda: step(z, 1.0), bare, GUIDED_LIMIT)


def test_help_costs_about_what_its_libraries_cost(benchmark: Any) -> None:
    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    check(
        benchmark,
        lambda: python("-m", "genmed", "--help"),
        lambda: python("-c", "import rich.console, typer.rich_utils"),
        HELP_LIMIT,
    )


def untrained() -> Denoiser:
    """Frozen as a loaded model is; a random head, since a zero one would make the gradients zero."""
    torch.manual_seed(0)
    denoiser = build(PLAN).eval().requires_grad_(False)
    torch.nn.init.normal_(denoiser.net.head.weight, std=0.1)  # type: ignore
    return denoiser


def check(
    benchmark: Any, ours: Callable[[], object], reference: Callable[[], object], limit: float
) -> None:
    """Print and record the ratio of costs, and fail above the limit."""
    ratio = cost_ratio(ours, reference)
    benchmark.extra_info["ratio"] = round(ratio, 3)
    benchmark.pedantic(ours, rounds=3)
    print(f"\n{benchmark.name}: ratio {ratio:.3f} (at most {limit})")
    assert ratio <= limit


def cost_ratio(ours: Callable[[], object], reference: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of `ours` in units of `reference`: the median ratio of neighbouring runs, after a warm-up."""
    ours(), reference()
    ratios = []
    for number in range(rounds):
        pair = (ours, reference) if number % 2 else (reference, ours)
        seconds = {which: _seconds(which) for which in pair}
        ratios.append(seconds[ours] / seconds[reference])
    return median(ratios)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-s"]))
