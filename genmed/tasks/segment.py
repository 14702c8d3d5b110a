"""Segment a scan by observing it: the label that agrees with the image, however little of it was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from genmed import match as matches
from genmed.calibration import tempered, volume_interval
from genmed.denoiser import Denoiser, fast_arithmetic
from genmed.errors import GenMedError
from genmed.fields import Fields, probabilities
from genmed.guide import Diverged, consistent, guided, misfit, retry
from genmed.hub import Model
from genmed.observe import Observation
from genmed.plan import Plan
from genmed.samplers import Denoise, euler, heun, noise, schedule, seeded, time_travel
from genmed.space import Intensity
from genmed.surprise import DRAWS, LIMIT, features, surprise, typical_histogram
from genmed.tasks.view import SMALLEST_EXTENT, View, seen_slices
from genmed.tiles import tiled, tiled_logits
from genmed.volume import Volume

MODES = ("auto", "conditional", "joint", "joint-base", "restore-then-condition")
MATCHES: dict[str, matches.Match] = {
    "none": matches.none,
    "affine": matches.affine,
    "poly": matches.poly(3),
    "curve": matches.curve(),
    "labels": matches.labels(),
    "bias": matches.bias(),
    "lncc": matches.lncc(),
    "mind": matches.mind(),
    "mi": matches.mutual_information(),
    "rising": matches.none,  # the scan's histogram is brought to that of clean cases first, by a rising map
    "falling": matches.none,
}
CONVINCING = LIMIT / 2  # surprise up to which what is not the usual explanation of a scan ends the search
MONOTONE = ("rising", "falling")
ANY_CONTRAST = ("randomised", "mixed")  # trainings on random contrasts
AVERAGED = "averaged"  # over `none` and `MONOTONE`; see `explain_contrast`
UNGUIDED = ("auto", "none", *MONOTONE)  # matches of the conditional mode, in which nothing is fitted
RIGID = ("none", "affine", *MONOTONE)
STEPS = 8  # noise levels of a guided trajectory
TRAVELS = 2  # times each level of it between TRAVELLED is repeated with a flexible match, which can settle wrongly
TRAVELLED = (0.1, 3.0)
START_SIGMA = 1.0  # noise level at which trajectories of thick slices begin, around their interpolation
SAMPLES = 4  # guided trajectories that are averaged
FLEXIBLE_SAMPLES = 2  # of those that travel, each of which takes nearly twice as long
FEWEST_SAMPLES = 3  # that volumes get an interval from: two can agree by chance
RESIDUAL_LIMIT = 5.0  # of a result that explains its scan: 1 for coarse voxels, 2 to 4.3 for slices at full resolution
NOT_OF_VOXELS = ("lncc", "mind", "mi")  # matches whose residual is not in units of the voxels' noise
LEAST_OBSERVED = 0.01  # share of the found structures; of a hippocampus two slices show 0.05
CONDITIONAL_STEPS = 4  # noise levels of a label drawn given a complete image
TILED_ABOVE = 2_000_000  # voxels of the working grid above which the network goes patch by patch

Progress = Callable[[float], None]


class Interval(NamedTuple):
    """Mean over samples and 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass
class Segmentation:
    """What `segment` found.

    `soft` are the class probabilities as the network gave them, of which `labels` are made. `volume_ml` holds an
    interval for every structure if there were `FEWEST_SAMPLES`, or one evaluation of a complete scan by a model whose
    plan has a `volume_error`. `residual` is the root mean square of what the guided samples do not explain of the
    observation, in units of its noise; it is 0 in conditional mode, which takes the image as exact. `surprise` says
    how far the pair of image and label is from clean cases, in standard deviations over these (None for a model that
    has not measured them). `observed_share` is the share of the found structures that was observed, on the working
    grid (of the field of view, where nothing was found). `extent_share` is the share of the field of view seen in
    training that the scan covers along the axis with the least of it. `doubts` judges all four. `slice_thickness_mm`
    is what slices were taken to average, `widened` tells that unseen tissue was restored round a small field of view.
    `observed` is the mask of what was looked at, on the scan's grid (None: everything), `notes` says what was assumed
    of the scan. `convincing` is the surprise up to which the result stands: half of the usual if another explanation
    than the usual one was kept.
    """

    labels: Volume
    soft: Volume | None
    volume_ml: dict[str, Interval]
    residual: float
    mode: str
    match: str
    seconds: float
    seed: int
    image: Volume | None
    surprise: float | None = None
    slice_thickness_mm: float | None = None
    widened: bool = False
    observed_share: float = 1.0
    extent_share: float = 1.0
    observed: Volume | None = None
    notes: tuple[str, ...] = ()
    convincing: float = LIMIT
    temperature: float = 1.0

    @property
    def probabilities(self) -> Volume | None:
        """Class probabilities, calibrated on tuning cases (`genmed.calibration.tempered`); None for a large scan."""
        return self.soft and self.soft.like(tempered(self.soft.data, self.temperature), {})

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the result must be looked at before it is used, a line each; nothing if there is no reason."""
        lines = []
        if self.surprise is not None and not self.surprise <= self.convincing:
            first = self.convincing == LIMIT
            what = "unlike what the model knows" if first else "no explanation that was tried convinces"
            lines.append(f"{what} (surprise {self.surprise:.1f}, above {self.convincing:g})")
        if self.match not in NOT_OF_VOXELS and not self.residual <= RESIDUAL_LIMIT:
            lines.append(f"what was observed is not explained (residual {self.residual:.1f}, above {RESIDUAL_LIMIT:g})")
        if self.observed_share < LEAST_OBSERVED:
            lines.append(f"{self.observed_share:.1%} of what was found was observed, the rest is the model's guess")
        if self.extent_share < SMALLEST_EXTENT:
            lines.append(
                f"along an axis it covers {self.extent_share:.1%} of the field of view that the model was trained on: "
                "check the voxel spacing in its header"
            )
        return tuple(lines)

    @property
    def doubtful(self) -> bool:
        """There are `doubts`."""
        return bool(self.doubts)


class Attempt(NamedTuple):
    """A way to explain a scan: mode, match, and whether there is unseen tissue round the field of view.

    It ends the search if it surprises by no more than `limit`.
    """

    mode: str
    match: str
    limit: float = LIMIT
    widened: bool = False


class Sampling(NamedTuple):
    """How guided trajectories are walked; `genmed.bench.efficiency` compares others with the defaults.

    `steps` levels of noise, those between `TRAVELLED` repeated `travels` times (`genmed.samplers.time_travel`), which
    `heun` does not do. `method` and `relax` are those of `genmed.guide.guided`. `last_step`: the final image is made
    consistent with the observation. `start`: the level at which trajectories begin around the plain interpolation of
    the scan and its label, instead of noise alone (SDEdit, Meng et al., arXiv 2108.01073).
    """

    steps: int = STEPS
    travels: int = 0
    sampler: Literal["ancestral", "euler", "heun"] = "ancestral"
    method: Literal["linesearch", "variance"] = "linesearch"
    relax: float = 2.0
    last_step: bool = True
    start: float | None = None

    def evaluations(self, sigmas: Float[Tensor, " n"]) -> int:
        """Network evaluations, each with a backward call, of one trajectory down these levels."""
        repeated = sum(TRAVELLED[0] <= sigma <= TRAVELLED[1] for sigma in sigmas.tolist())
        levels = len(sigmas) - 1
        return 2 * levels - 1 if self.sampler == "heun" else levels + self.travels * repeated


class Found(NamedTuple):
    """One way to explain a scan: probabilities and image of every sample, and how well it went.

    `view` is what was explained, with its margins if it was `widened`; `soft` and `image` lie within them. `surprise`,
    `layout` and `contrast` are those of `genmed.surprise.Surprise`; up to `convincing` the result stands.
    """

    view: View
    soft: Float[Tensor, "s k x y z"]
    image: Float[Tensor, "s c x y z"]
    residual: float
    surprise: float | None
    layout: float
    contrast: float
    mode: str
    match: str
    convincing: float = LIMIT


def segment(
    model: Model,
    scan: Volume,
    *,
    mode: str = "auto",
    match: str = "auto",
    samples: int | None = None,
    seed: int = 0,
    grid: str = "input",
    observed: Volume | None = None,
    slice_thickness_mm: float | None = None,
    roi_mm: Sequence[tuple[float, float]] | None = None,
    progress: Progress | None = None,
) -> Segmentation:
    """Segment one scan.

    Args:
        mode: `conditional` (clean image, one evaluation, or a few per sample), `joint` (guided sampling of the
            pair; the paper's GenMed-Full), `joint-base` (only the image is steered), `restore-then-condition`
            (guided restoration of the image, then its label), or `auto`: conditional for a complete image at
            about the working spacing, and for one that is twice as coarse if its interpolation does not surprise the
            model, else restore-then-condition.
        match: how the observed appearance relates to the model's, one of `MATCHES`, or `auto`: none, and affine for
            restored coarse voxels, whose averaging takes contrast away, unless what is found surprises the model;
            then others are tried (`attempts_at`, `explain_contrast`). `rising` and `falling`
            bring the histogram of the scan to that of clean cases, and leave a complete image complete; of all
            these, `conditional` takes those of `UNGUIDED`.
        samples: how many to draw and average; default 1 (conditional), 4, or 2 (matches that are not `RIGID`). If it
            is given, coarse or incomplete scans are always restored: samples of one interpolation agree about it.
        grid: result on the scan's own grid (`input`) or the working grid (`model`).
        observed: mask on the scan's grid; voxels where it is 0 are never looked at. By default all are, but for slices
            of a single value in between others (`seen_slices`).
        slice_thickness_mm: thickness of what a coarse voxel averages along its longest side. By default that of a
            DICOM header; else the spacing or, where the slices of one axis are the coarsest and a gap between them
            explains the scan better, one voxel.
        roi_mm: world box ((x0, x1), (y0, y1), (z0, z1)) to which the work is confined.
        progress: called with the finished share.

    Raises:
        GenMedError: for input that the model cannot take.
    """
    started = time.monotonic()
    if not isinstance(model, Model):
        raise GenMedError("the model is one of shapes, not of images; use `genmed.complete`.")
    _check_options(mode, match, samples, grid)
    observed, notes = (observed, ()) if observed is not None else seen_slices(scan)
    view = View.of(model.plan, scan, observed, slice_thickness_mm, roi_mm)
    if mode == match == "auto" and view.complete and not view.cramped and model.plan.augmentation in ANY_CONTRAST:
        best = explain_contrast(model, view, samples=samples, seed=seed)
    else:
        attempts = attempts_at(view, mode, match, interpolated=samples is None and bool(model.plan.typical))
        best = explain(model, view, attempts, samples=samples, seed=seed, progress=progress)
    if progress:
        progress(1.0)
    seconds = time.monotonic() - started
    found = _result(model.plan, scan, best, grid=grid, seed=seed, seconds=seconds, drawn=samples is not None)
    return replace(found, observed=observed, notes=notes)


def explain(
    model: Model,
    view: View,
    attempts: Sequence[Attempt],
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """The least surprising explanation once one surprises by no more than its limit, else that of the best layout.

    Unseen surroundings are not asked for where it is the contrast that surprises: most of what they show is the model's
    own guess, which never does.
    """
    tried: list[Found] = []
    probed = False
    for number, attempt in enumerate(attempts):
        if attempt.widened and tried and not tried[0].view.widened and tried[0].contrast > LIMIT:
            continue
        share = _share(progress, number, len(attempts))
        try:
            if attempt.mode != "conditional" and not probed:
                view, probed = likely_slices(model, view, attempt, seed), True
            seen = view.with_margins() if attempt.widened else view
            found = infer(model, seen, attempt.mode, attempt.match, samples=samples, seed=seed, progress=share)
        except GenMedError as error:
            if not (tried and isinstance(error.__cause__, Diverged)):
                raise
            continue  # what was found before stands
        tried.append(found._replace(convincing=attempt.limit))
        if found.surprise is None or found.surprise <= attempt.limit:
            return min(tried, key=lambda found: found.surprise or 0.0)._replace(convincing=attempt.limit)
    return min(tried, key=lambda found: found.layout)


def explain_contrast(model: Model, view: View, *, samples: int | None = None, seed: int = 0) -> Found:
    """What a network that was trained on random contrasts makes of a complete scan, of whatever contrast it is.

    An unfamiliar contrast surprises, and is labelled a little worse than the usual one. A rising or falling map of the
    intensities may undo it, but a wrong one often looks as familiar as the right one. So the answers are averaged,
    sample by sample, weighted by the inverse of how far their layouts are off; no doubt is left if a map convinces.
    Where something else surprises there is nothing to undo.
    """
    first = infer(model, view, "conditional", "none", samples=samples, seed=seed)
    if first.surprise is None or first.surprise <= LIMIT or first.contrast <= CONVINCING:
        return first
    maps = [infer(model, view, "conditional", way, samples=samples, seed=seed) for way in MONOTONE]
    answers = (first, *maps)
    weights = torch.tensor([1 / max(answer.layout, 1.0) for answer in answers])
    soft = torch.stack([answer.soft for answer in answers])
    mean = torch.einsum("a, a... -> ...", weights / weights.sum(), soft)
    best = min(maps, key=lambda found: found.surprise or 0.0)
    return best._replace(view=view, soft=mean, match=AVERAGED, convincing=CONVINCING)


def attempts_at(view: View, mode: str, match: str, interpolated: bool = True) -> list[Attempt]:
    """What to try in turn until one does not surprise the model, the most likely first.

    Args:
        interpolated: whether one evaluation of the interpolation may explain a coarse or incomplete scan, too.
    """
    steered = "restore-then-condition" if mode in ("auto", "conditional") else mode
    usual = "affine" if view.coarse and not view.interpolable else "none"
    if mode == match == "auto" and view.cramped:
        flexible = (Attempt(steered, way, CONVINCING, widened=True) for way in ("affine", "curve") if way != usual)
        return [Attempt(steered, usual, widened=True), *flexible]
    guided = Attempt(steered, usual if match == "auto" else match)
    at_once = Attempt("conditional", match if match in MONOTONE else "none")
    if mode == "conditional" or (mode == "auto" and view.complete and match in UNGUIDED):
        attempts = [at_once]
    elif mode == match == "auto" and interpolated:
        quick = at_once._replace(limit=CONVINCING)
        attempts = [quick, guided] if view.nearly_complete else [guided, quick]
    else:
        attempts = [guided]
    if mode == "conditional" or match != "auto":
        return attempts
    widened = [Attempt(steered, usual, CONVINCING, widened=True)] if mode == "auto" and any(view.room) else []
    if attempts != [at_once]:
        others = MONOTONE if view.interpolable else ("affine", "curve")
        return [*attempts, *(Attempt(steered, other, CONVINCING) for other in others if other != usual), *widened]
    maps = (Attempt("conditional", other, CONVINCING) for other in MONOTONE)
    return [at_once, *maps, Attempt(steered, "curve", CONVINCING), *widened]


def _share(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one attempt as a share of all."""
    return (lambda done: progress((number + done) / count)) if progress else None


def _check_options(mode: str, match: str, samples: int | None, grid: str) -> None:
    for value, known, name in (
        (mode, MODES, "mode"),
        (match, ("auto", *MATCHES), "match"),
        (grid, ("input", "model"), "grid"),
    ):
        if value not in known:
            raise GenMedError(f"{name} '{value}' is unknown; choose one of {', '.join(known)}.")
    if mode == "conditional" and match not in UNGUIDED:
        raise GenMedError(f"match '{match}': mode conditional takes {', '.join(UNGUIDED)}; choose a guided mode.")
    if samples is not None and samples < 1:
        raise GenMedError(f"samples must be at least 1, not {samples}.")


# Inference ------------------------------------------------------------------------------------------------


def infer(
    model: Model,
    view: View,
    mode: str,
    match: str,
    *,
    samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Explain a scan in one way: `mode` and `match` are none of `auto` here."""
    if match in MONOTONE:
        if not model.plan.typical:
            raise GenMedError(f"match {match}: model '{model.plan.name}' has not measured clean cases; train it again.")
        target = typical_histogram(model.plan.typical, len(model.plan.channels))
        view = view.equalised(target, falling=match == "falling")
    count = samples or (1 if mode == "conditional" else SAMPLES if match in RIGID else FLEXIBLE_SAMPLES)
    seeds = [seed * 10_007 + number for number in range(count)]
    with torch.no_grad():
        if mode == "conditional":
            soft = conditional(model.denoiser, view.image, seeds if samples else None, model.plan.patch)
            image, residual = view.image.expand(len(soft), *view.image.shape[1:]), 0.0
        else:
            start = START_SIGMA if view.interpolable and match in UNGUIDED else None
            how = Sampling(travels=0 if match in RIGID else TRAVELS, start=start)
            soft, image, residual = guided_pair(model, view, mode, MATCHES[match], seeds, how, progress)
        off = surprise_of(model, view, image, soft)
        return Found(view, view.inside(soft), view.inside(image), residual, *off, mode, match)


def surprise_of(
    model: Model, view: View, image: Float[Tensor, "s c X Y Z"], soft: Float[Tensor, "s k X Y Z"]
) -> tuple[float | None, float, float]:
    """Means of `Surprise` over samples, within the field of view; nothing if clean cases were not measured."""
    if not model.plan.typical:
        return None, 0.0, 0.0
    draws = 1 if image[0, 0].numel() > TILED_ABOVE else max(1, DRAWS // len(image))
    denoise = denoise_with(model, image[0, 0].numel())
    values = features(denoise, model.denoiser.fields, image, soft, draws, view.inside)
    off = surprise(values, model.plan.typical, len(model.plan.labels) - 1)
    return float(off.most.mean()), float(off.layout.mean()), float(off.contrast.mean())


def denoise_with(model: Model, voxels: int) -> Denoise:
    """(z, sigma) -> z0_hat with one noise level for all fields, patch by patch for large scans."""
    denoiser = model.denoiser

    def denoise(z: Tensor, sigma: float) -> Tensor:
        with fast_arithmetic(z.device.type):
            return denoiser(z, z.new_full((len(z), len(denoiser.fields)), float(sigma)))  # type: ignore[no-any-return]

    return tiled(denoise, model.plan.patch) if voxels > TILED_ABOVE else denoise


def likely_slices(model: Model, view: View, attempt: Attempt, seed: int) -> View:
    """The scan with slices that average their spacing, or with gaps between them if those explain it better."""
    if view.slice_axis is None or view.slice_thickness_mm is not None:
        return view
    return min(view, view.with_thin_slices(), key=lambda view: probe(model, view, attempt, seed))


def probe(model: Model, view: View, attempt: Attempt, seed: int) -> float:
    """Residual of one guided sample: what the observation's geometry, as assumed by `view`, leaves unexplained."""
    with torch.no_grad():
        return guided_pair(model, view, attempt.mode, MATCHES[attempt.match], [seed * 10_007], Sampling())[2]


def conditional(
    denoiser: Denoiser,
    image: Float[Tensor, "b c x y z"],
    seeds: Sequence[int] | None = None,
    patch: tuple[int, int, int] | None = None,
) -> Float[Tensor, "s k x y z"]:
    """Label probabilities given a complete image: one evaluation, or one drawn label per seed.

    Without `seeds`, one evaluation per image (patch by patch for large scans) and b results. With them, b is
    1 and every seed draws a label in a few evaluations; the result is the last denoised estimate of each.
    """
    fields = denoiser.fields
    classes = len(fields["label"].channels)
    if seeds is None:

        def hidden_label(part: Tensor) -> Tensor:
            z = torch.cat([part, part.new_zeros(len(part), classes, *part.shape[2:])], dim=1)
            sigma = part.new_tensor([[0.0, denoiser.sigma_max]]).expand(len(part), -1)
            return denoiser.outputs(z, sigma)["label"].softmax(dim=1)

        return _whole_or_tiled(hidden_label, image, classes, patch)
    image = image.expand(len(seeds), *image.shape[1:])
    sigmas = schedule(denoiser.sigma_max, 0.5, CONDITIONAL_STEPS)

    def label_given_image(z_label: Tensor, sigma: float) -> Tensor:
        def network(z: Tensor) -> Tensor:
            return fields.split(denoiser(z, z.new_tensor([[0.0, sigma]]).expand(len(z), -1)))["label"]

        return _whole_or_tiled(network, torch.cat([image, z_label], dim=1), classes, patch)

    z = denoiser.sigma_max * noise(image.new_zeros(len(seeds), classes, *image.shape[2:]), seeded(seeds))
    return probabilities(euler(label_given_image, z, sigmas))


def _whole_or_tiled(
    network: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b c x y z"],
    channels: int,
    patch: tuple[int, int, int] | None,
) -> Float[Tensor, "b k x y z"]:
    is_large = patch is not None and x[0, 0].numel() > TILED_ABOVE
    return tiled_logits(network, x, channels, patch) if is_large and patch else network(x)


def guided_pair(
    model: Model,
    view: View,
    mode: str,
    match: matches.Match,
    seeds: Sequence[int],
    how: Sampling,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "s k x y z"], Float[Tensor, "s c x y z"], float]:
    """Sample (image, label) pairs that agree with the observation.

    Returns:
        Label probabilities and image of every sample, and the residual in units of the noise.
    """
    plan, fields, observation = model.plan, model.denoiser.fields, view.observation
    size = tuple(m.shape[1] for m in view.matrices)
    top = how.start or plan.sigma_max
    sigmas = schedule(top, plan.sigma_min, how.steps)
    total = how.evaluations(sigmas)
    denoise = denoise_with(model, math.prod(size))
    calls = 0

    def counted(z: Tensor, sigma: float) -> Tensor:
        nonlocal calls
        calls += 1
        if progress:
            progress(min(1.0, calls / total))
        return denoise(z, sigma)

    middle = torch.zeros(1, fields.channels, *size)
    if how.start is not None:
        label = conditional(model.denoiser, view.image, patch=plan.patch)
        middle = fields.join({"image": view.image, "label": 2 * label - 1})

    def sample(scale: float) -> Tensor:
        steered = guided(
            counted, fields, [observation], match=match, scale=scale, method=how.method, relax=how.relax,
            steer="observed" if mode == "joint-base" else "all",
        )  # fmt: skip
        generators = seeded(seeds)
        z = middle + top * noise(torch.zeros(len(seeds), fields.channels, *size), generators)
        if how.sampler == "heun":
            return heun(steered, z, sigmas)
        eta = 0.0 if how.sampler == "euler" else 1.0
        return time_travel(steered, z, sigmas, how.travels, generators, eta=eta, between=TRAVELLED)

    try:
        z0 = retry(sample)
    except Diverged as error:
        raise GenMedError(
            "the guided sampling diverged at every step size; the scan is too far from what the model has seen. "
            "Try --match affine or --mode conditional."
        ) from error
    residual = _residual(z0, fields, observation, match)
    parts = fields.split(consistent(z0, fields, [observation], match=match) if how.last_step else z0)
    image = parts["image"] if match is matches.none else _standardised(parts["image"], view)
    if mode == "restore-then-condition":
        soft = torch.cat([conditional(model.denoiser, one[None], patch=plan.patch) for one in image])
    else:
        soft = probabilities(parts["label"]).clamp(0, 1)
    return soft, image, residual


def _standardised(image: Float[Tensor, "s c X Y Z"], view: View) -> Float[Tensor, "s c X Y Z"]:
    """Normalised by the field of view, as every scan is: a match leaves the contrast of its own side open."""
    fits = (Intensity.fit(one.numpy()) for one in view.inside(image))
    return torch.stack([fit.normalise(one) for fit, one in zip(fits, image, strict=True)])


def _residual(z0: Tensor, fields: Fields, observation: Observation, match: matches.Match) -> float:
    r = misfit(z0, fields, [observation], match)(z0)
    return float((r.square().sum(1) / observation.seen.sum()).sqrt().mean())


# The result -----------------------------------------------------------------------------------------------


def _result(
    plan: Plan, scan: Volume, found: Found, *, grid: str, seed: int, seconds: float, drawn: bool
) -> Segmentation:
    soft, view = found.soft, found.view
    mean = soft.mean(dim=0).numpy() if len(soft) > 1 else soft[0].numpy()
    names = dict(zip(plan.label_values, plan.labels, strict=True))
    values = np.asarray(plan.label_values, dtype=np.uint8 if max(plan.label_values) < 256 else np.int32)
    space = view.space
    if grid == "input":
        classes = space.labels_to_input(mean)
        labels = scan.like(values[classes][None], names)
        chances = scan.like(space.to_input(mean), {}) if mean[0].size <= TILED_ABOVE else None
    else:
        working = Volume(data=np.zeros((1, *space.model.shape), np.uint8), affine=space.model.affine)
        labels = working.like(values[mean.argmax(axis=0)][None], names)
        chances = working.like(mean, {})
    restored = None
    if found.mode != "conditional":
        image = view.intensity.restore(found.image.mean(dim=0).numpy())
        restored = Volume(data=image.astype(np.float32), affine=space.model.affine)
    return Segmentation(
        labels=labels, soft=chances, volume_ml=_volumes(plan, found, drawn), residual=found.residual,
        surprise=found.surprise, mode=found.mode, match=found.match, slice_thickness_mm=view.slice_thickness_mm,
        widened=view.widened, observed_share=observed_share(view, mean), extent_share=view.extent_share,
        seconds=seconds, seed=seed, image=restored, convincing=found.convincing, temperature=plan.temperature,
    )  # fmt: skip


def observed_share(view: View, soft: Float[np.ndarray, "k x y z"]) -> float:
    """Share of the structures, or where there are none of the field of view, of which an observed voxel tells."""
    if view.complete:
        return 1.0
    inside = soft.argmax(axis=0) != 0
    covered = view.covered.numpy()
    return float(covered[inside].mean() if inside.any() else covered.mean())


def _volumes(plan: Plan, found: Found, drawn: bool) -> dict[str, Interval]:
    """Volume of every structure on the working grid, each sample counted in its own label map.

    Fewer than `FEWEST_SAMPLES` say nothing of what a scan leaves open; little, where one evaluation saw all of it.
    """
    voxel_ml = float(np.prod(found.view.space.model.spacing_mm)) / 1000
    classes = found.soft.argmax(dim=1)
    at_once = found.mode == "conditional" and found.view.complete and not drawn
    result = {}
    for number, name in enumerate(plan.labels[1:], start=1):
        error = plan.volume_error[number - 1] if plan.volume_error else 0.0
        if len(classes) >= FEWEST_SAMPLES or (at_once and error):
            voxels = (classes == number).sum(dim=(1, 2, 3)).double().numpy()
            low, high = volume_interval(voxels, error)
            result[name] = Interval(*(float(count) * voxel_ml for count in (voxels.mean(), low, high)))
    return result
