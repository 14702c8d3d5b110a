"""Training: one loop, for the joint model and for the peers that it is compared with.

A step is a function of its number: its patches and its noise are drawn from a generator seeded with
(seed, step, process). A resumed run therefore repeats exactly what an uninterrupted one does.
"""

import dataclasses
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from jaxtyping import Float, Int
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from genmed.calibration import volume_error
from genmed.data.augment import STRONG, USUAL, random_patch
from genmed.data.dataset import Dataset, read_dataset
from genmed.data.fingerprint import fingerprint
from genmed.data.fingerprint import plan as plan_from
from genmed.data.split import SPLIT, Split, person, read_split, three_way, write_split
from genmed.denoiser import Denoiser, build, fast_arithmetic, fastest_precision
from genmed.errors import GenMedError
from genmed.hub import Card, load, save_model
from genmed.loss import Batch, JointLoss
from genmed.plan import AUGMENTATIONS, Plan
from genmed.space import Intensity, Space
from genmed.surprise import features, typical
from genmed.volume import check_image, read, read_labels, require_same_grid

Scan = tuple[Float[Tensor, "c x y z"], Int[Tensor, "x y z"]]

CHECKPOINT = "checkpoint.safetensors"
BEST = "best"  # folder of the weights that scored highest on the tune part
SAVE_EVERY_MINUTES = 3.0
VALIDATE_EVERY_MINUTES = 5.0
WARM_UP_STEPS = 200
EMA_DECAY = 0.999
LARGEST_GRADIENT = 1.0
TEMPERATURES = torch.logspace(-0.3, 0.6, 46)  # 0.5 to 4, of probabilities


# Data -----------------------------------------------------------------------------------------------------


def load_scans(dataset: Dataset, plan: Plan, ids: Sequence[str]) -> list[Scan]:
    """Read cases on the plan's working grid: normalised images and class indices."""
    return [load_scan(dataset, plan, id) for id in ids]


def load_scan(dataset: Dataset, plan: Plan, id: str) -> Scan:
    """One case on the working grid. Raises `GenMedError` if it has no label or the grids differ."""
    case = dataset.case(id)
    if case.label is None:
        raise GenMedError(f"{dataset.folder}: case '{id}' has no label; leave it out of the training split.")
    volume, label = read(case.images, fourth_axis="channels"), read_labels(case.label)
    check_image(volume)
    require_same_grid(volume, label)
    space = Space.fit(volume.grid, plan.spacing_mm, slice_axis_last=plan.thick_slices)
    image = Intensity.fit(volume.data).normalise(space.to_model(volume.data))
    classes = space.labels_to_model(label.data[0], plan.label_values)
    return torch.from_numpy(image).float(), torch.from_numpy(classes).to(torch.uint8)


def draw_batch(scans: Sequence[Scan], plan: Plan, step: int, process: int = 0) -> Batch:
    """The patches of one training step, moved, turned and bent as much as the plan says (`spatial_changes`)."""
    spatial, elastic = spatial_changes(plan)
    seed = ((plan.seed * 1_000_003 + step) * 1_009 + process) % 2**62
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(scans), (plan.batch,), generator=generator).tolist()
    pairs = [scans[i] for i in chosen]
    patches = [random_patch(x, y, plan.patch, generator, plan.thick_slices, spatial, elastic) for x, y in pairs]
    image, label, inside = (torch.stack(parts) for parts in zip(*patches, strict=True))
    return Batch(image, label.long(), inside, seed)


def spatial_changes(plan: Plan) -> tuple[float, float]:
    """Probabilities of rotation and scaling, and of a deformation: none, nnU-Net's, or strong for few cases."""
    if plan.augmentation == "none":
        return 0.0, 0.0
    return (STRONG, STRONG) if plan.cases else (USUAL, 0.0)


# Clocks ---------------------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """What a training took: minutes by the clock of its budget, wall-clock minutes, CPU minutes of all threads."""

    minutes: float
    wall_minutes: float
    cpu_minutes: float


def wall_minutes() -> float:
    """The clock of a user's budget."""
    return time.monotonic() / 60


def fair_minutes() -> float:
    """The clock of comparisons: what else runs on the machine should not decide how far a network gets.

    Without CUDA this is the CPU time of this process divided by torch's threads: the wall-clock minutes that it
    would have taken on an idle machine with all its threads at work. Threads that wait while spinning count as
    working, so on a busy machine it is exact for one thread only. With CUDA it is the wall clock.
    """
    if torch.cuda.is_available():
        return wall_minutes()
    return time.process_time() / 60 / torch.get_num_threads()


def _clocks(clock: Callable[[], float]) -> Spent:
    return Spent(clock(), wall_minutes(), time.process_time() / 60)


# The loop -------------------------------------------------------------------------------------------------


def fit(
    objective: nn.Module,
    batch_at: Callable[[int, int], Any],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    max_minutes: float | None = None,
    resume: bool = False,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    picture: Callable[[nn.Module], Tensor] | None = None,
    mixed_precision: str | None = None,
    clock: Callable[[], float] = wall_minutes,
    keep_best: Callable[[nn.Module, float, dict[str, float]], object] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, float]:
    """Minimise `objective(batch)["loss"]` over the weights of `objective.model`.

    AdamW, warm-up, cosine decay over the steps or the minutes (whichever is further on), clipped gradients,
    an exponential moving average of the weights (EDM2, arXiv 2312.02696, section 3.1, is the reason why).
    The state is saved in `folder` every few minutes and when the run is interrupted.

    Args:
        batch_at: step and process -> named tuple that the objective takes.
        clock: gives the present minute; all minutes here are counted by it (`wall_minutes`, `fair_minutes`).
        keep_best: called with the averaged network, the minutes and the scores at each validation whose "dice"
            is higher than all before, those before a resume included. Validations are 5 minutes apart, in short
            trainings a quarter of `max_minutes`.
        settings: what a run that is resumed must have in common with the one before (`settings_of`).

    Returns:
        The network with averaged weights and the minutes that the training took in all; `time_spent` knows more.
    """
    fastest = fastest_precision("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(mixed_precision=mixed_precision or fastest)
    average = _Average(objective.model)  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW(objective.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    for network in (objective, average.model):
        network.to(accelerator.device)
    first, before, best = 0, Spent(0.0, 0.0, 0.0), -math.inf
    if resume and (folder / CHECKPOINT).exists():
        first, before, best = load_state(folder / CHECKPOINT, objective, average.model, optimiser, settings)
    wrapped, optimiser = accelerator.prepare(objective, optimiser)
    chief = accelerator.is_main_process
    validate_every = min(VALIDATE_EVERY_MINUTES, max_minutes / 4 if max_minutes else math.inf)
    log = _Log(folder, resume) if chief else None
    started = _clocks(clock)
    saved = validated = minutes = before.minutes
    step = first

    def save() -> None:
        if chief:
            spent = Spent(*(b + now - then for b, now, then in zip(before, _clocks(clock), started, strict=True)))
            spent = spent._replace(minutes=minutes)
            save_state(folder / CHECKPOINT, objective, average.model, optimiser, step, spent, best, settings)

    def judge(log: _Log, validate: Callable[[nn.Module], dict[str, float]]) -> None:
        nonlocal best
        scores = validate(average.model)
        log.scores(scores, step, minutes)
        if keep_best and scores["dice"] > best:
            best = scores["dice"]
            keep_best(average.model, minutes, scores)
            save()

    with _progress(steps, first, disable=not chief) as (bar, task):
        try:
            while step < steps and (max_minutes is None or minutes < max_minutes):
                progress = max(step / steps, minutes / max_minutes if max_minutes else 0.0)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * rate_at(step, progress)
                batch = _to(batch_at(step, accelerator.process_index), accelerator.device)
                with accelerator.autocast():
                    losses = wrapped(batch)
                accelerator.backward(losses["loss"])
                accelerator.clip_grad_norm_(objective.parameters(), LARGEST_GRADIENT)
                optimiser.step()
                optimiser.zero_grad()
                average.update(objective.model, step)  # type: ignore[arg-type]
                step += 1
                minutes = before.minutes + clock() - started.minutes
                if max_minutes is not None and accelerator.num_processes > 1:
                    minutes = _agreed(minutes, accelerator)
                if log:
                    log.losses(losses, step)
                    bar.update(task, completed=step, note=_note(log, minutes, max_minutes))
                if log and validate and minutes - validated >= validate_every:
                    judge(log, validate)
                    if picture:
                        log.picture(picture(average.model), step)
                    validated = minutes
                if minutes - saved >= SAVE_EVERY_MINUTES:
                    save()
                    saved = minutes
        finally:
            save()
    if log and validate:
        judge(log, validate)
    if log:
        log.writer.close()
    return average.model, minutes


def rate_at(step: int, progress: float) -> float:
    """Learning rate as a share of the highest: linear warm-up, then a cosine down to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class _Average:
    """Exponential moving average of a network's weights, with a short memory at the start."""

    def __init__(self, model: nn.Module) -> None:
        import copy

        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for mean, new in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(new, 1 - decay)


def _to(batch: Any, device: torch.device) -> Any:
    """A named tuple of tensors and other things, its tensors on the device."""
    return type(batch)(*(value.to(device) if isinstance(value, Tensor) else value for value in batch))


def _agreed(minutes: float, accelerator: Accelerator) -> float:
    """Every process must stop at the same step: take the slowest clock."""
    return float(accelerator.gather(torch.tensor([minutes], device=accelerator.device)).max())


def leave_group() -> None:
    """End a process of a training in several processes, together with the others; do nothing in a single one.

    The interpreter is not closed down: torch 2.13 sometimes aborts there, after everything is saved, and the launcher
    then reports a failed training.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# State ----------------------------------------------------------------------------------------------------


def save_state(
    path: Path,
    objective: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    spent: Spent,
    best: float,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Everything a run needs to go on, in one safetensors file that is replaced as a whole."""
    tensors = {f"model.{name}": value for name, value in objective.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{key}": value for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    metadata = {"step": str(step), "best": repr(best), "settings": json.dumps(settings or {})}
    metadata |= {name: repr(value) for name, value in spent._asdict().items()}
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, part, metadata)
    os.replace(part, path)


def load_state(
    path: Path,
    objective: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any] | None = None,
) -> tuple[int, Spent, float]:
    """Inverse of `save_state`; returns step, time and highest Dice.

    Raises `GenMedError` for a foreign file, and for that of a run with other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            _require_same(json.loads(metadata.get("settings", "{}")), json.loads(json.dumps(settings or {})))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        objective.load_state_dict(_under("model.", tensors))
        average.load_state_dict(_under("average.", tensors))
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("adam.", tensors).items():
            number, key = name.split(".")
            states.setdefault(int(number), {})[key] = value
        optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
        return int(metadata["step"]), _spent(metadata), float(metadata.get("best", "-inf"))
    except Exception as error:
        raise GenMedError(
            f"{path}: cannot resume from this checkpoint ({' '.join(str(error).split())[:120]}); "
            "train with the same options as before, or without --resume."
        ) from error


def settings_of(plan: Plan, cases: Sequence[str], **others: Any) -> dict[str, Any]:
    """What decides a training besides its length: the plan but for names and what is measured at the end, and data."""
    free = {"name", "licence", "source", "steps", "typical", "temperature", "volume_error", "format_version"}
    decisive = {key: value for key, value in dataclasses.asdict(plan).items() if key not in free}
    return decisive | {"training cases": list(cases)} | others


def _require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checkpoints of version 0.1 know no settings."""
    for key, value in before.items():
        if value != now.get(key, value):
            raise ValueError(f"{key}: {value} before, {now[key]} now")


def time_spent(folder: Path) -> Spent:
    """Time that the training in a folder took so far, by all clocks, resumed parts included."""
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return _spent(file.metadata())


def _spent(metadata: dict[str, str]) -> Spent:
    """Checkpoints of version 0.1 know the wall clock only."""
    return Spent(*(float(metadata.get(name, metadata["minutes"])) for name in Spent._fields))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# What a person sees ---------------------------------------------------------------------------------------


class _Log:
    """Scalars and pictures for tensorboard, and the validation curve as JSON lines."""

    def __init__(self, folder: Path, resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "log"))
        self.curve = folder / "curve.jsonl"
        if not resume:
            self.curve.unlink(missing_ok=True)
        self.smooth: dict[str, float] = {}
        self.latest = ""

    def losses(self, losses: dict[str, Tensor], step: int) -> None:
        for name, value in losses.items():
            number = float(value.detach())
            self.smooth[name] = 0.98 * self.smooth.get(name, number) + 0.02 * number
            if step % 50 == 0:
                self.writer.add_scalar(f"train/{name}", self.smooth[name], step)

    def scores(self, scores: dict[str, float], step: int, minutes: float) -> None:
        for name, value in scores.items():
            self.writer.add_scalar(f"tune/{name}", value, step)
        with self.curve.open("a") as file:
            file.write(json.dumps({"step": step, "minutes": round(minutes, 2), **scores}) + "\n")
        self.latest = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
        if not sys.stderr.isatty():  # a log file shows no bar
            loss = f"loss {self.smooth['loss']:.3f} " if self.smooth else ""  # none where no step was left
            print(f"step {step}, {minutes:.1f} min: {loss}{self.latest}", flush=True)
        self.writer.flush()

    def picture(self, picture: Float[Tensor, "1 h w"], step: int) -> None:
        self.writer.add_image("samples", picture, step)


class _progress:
    """A progress bar: `with _progress(...) as (bar, task)`."""

    def __init__(self, steps: int, first: int, disable: bool) -> None:
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), disable=disable)
        self.task = self.bar.add_task("training", total=steps, completed=first, note="")

    def __enter__(self) -> tuple[Progress, Any]:
        self.bar.start()
        return self.bar, self.task

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _note(log: _Log, minutes: float, max_minutes: float | None) -> str:
    left = f"{max_minutes - minutes:.0f} min left, " if max_minutes else ""
    return f"{left}loss {log.smooth['loss']:.3f} {log.latest}"


# The command ----------------------------------------------------------------------------------------------


def train(
    folder: str | Path,
    out: str | Path,
    *,
    split: str | Path | None = None,
    max_minutes: float | None = None,
    resume: bool = False,
    preset: str = "base",
    spacing: float | None = None,
    init: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    augmentation: str = "nnunet",
    cases: int | None = None,
    draw: int = 0,
    clock: Callable[[], float] = wall_minutes,
) -> Path:
    """Train a joint model on a dataset.json folder and write a model folder.

    The folder `best` in it is a model folder, too, with the weights of the validation with the highest Dice.

    Args:
        split: JSON file with train / tune / report ids; without it one is drawn by person and written to OUT.
        max_minutes: stop after so many minutes; the learning rate comes down in time for it.
        spacing: working spacing in mm instead of the data set's median; for thick slices in the plane alone.
        init: a model (name or folder) whose weights to start from, for instance one of a coarser grid.
        augmentation: of the conditional share of the mixture, `genmed.data.augment.augment` says which there are.
        cases: train on so many cases of the training part, with stronger spatial augmentation (`few_shot`).
        draw: seed of the choice of these cases.
        clock: that `max_minutes` is counted by; `fair_minutes` for comparisons on a busy machine.
    """
    out = Path(out)
    if max_minutes is not None and not max_minutes > 0:
        raise GenMedError(f"--max-minutes {max_minutes:g}: must be above 0.")
    dataset = read_dataset(folder)
    state = PartialState()
    if split is None and resume and (out / SPLIT).exists():
        split = out / SPLIT  # who is in which part stays, whatever was added to the data since
    whole = read_split(split, dataset.ids) if split else _drawn_split(dataset, seed)
    if not (whole.train and whole.tune):
        raise GenMedError(f"{split or folder}: has no case to train or none to tune on; give a split with both.")
    parts = few_shot(whole, cases, draw)
    plan = make_plan(dataset, parts, out.name, preset, spacing, steps, seed, augmentation, cases or 0, draw)
    if not split and state.is_main_process:
        write_split(out / SPLIT, whole, _subjects(dataset))
    scans, tune = load_scans(dataset, plan, parts.train), load_scans(dataset, plan, parts.tune)
    torch.manual_seed(seed)
    denoiser = build(plan)
    if init is not None:
        _start_from(denoiser, init)

    def save(folder: Path, model: nn.Module, minutes: float, scores: dict[str, float]) -> None:
        card = first_card(dataset, plan, parts, minutes, scores)
        save_model(folder, measured(plan, model, tune), model.state_dict(), card)

    average, minutes = fit(
        JointLoss(denoiser, plan.augmentation),
        lambda step, process: draw_batch(scans, plan, step, process),
        out,
        steps=plan.steps,
        learning_rate=plan.learning_rate,
        max_minutes=max_minutes,
        resume=resume,
        validate=lambda model: tune_dice(conditional(model), tune, plan),
        picture=lambda model: sample_picture(model, plan),
        clock=clock,
        keep_best=lambda model, minutes, scores: save(out / BEST, model, minutes, scores),
        settings=settings_of(plan, parts.train),
    )
    if state.is_main_process:
        save(out, average, minutes, tune_dice(conditional(average), tune, plan))
    return out


def make_plan(
    dataset: Dataset,
    parts: Split,
    name: str,
    preset: str,
    spacing: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    augmentation: str = "nnunet",
    cases: int = 0,
    draw: int = 0,
) -> Plan:
    """The plan of the training cases, with the changes that the command line asks for."""
    if augmentation not in AUGMENTATIONS:
        raise GenMedError(f"augmentation '{augmentation}' is unknown; choose one of: {', '.join(AUGMENTATIONS)}.")
    plan = plan_from(fingerprint(dataset, parts.train), dataset, preset, spacing)
    changes: dict[str, Any] = {
        "name": name, "seed": seed, "source": dataset.name, "augmentation": augmentation, "cases": cases, "draw": draw,
    }  # fmt: skip
    if steps is not None:
        changes["steps"] = steps
    return dataclasses.replace(plan, **changes)


def few_shot(parts: Split, cases: int | None, draw: int = 0) -> Split:
    """The split with `cases` of its training cases (None: all of them); the other parts stay.

    The seed `draw` puts the training cases into one random order, first a case of each person, then the others,
    and the first `cases` of it are taken: draws of one seed are nested, and no person comes twice while another
    is missing.
    """
    if cases is None and draw:
        raise GenMedError(f"draw {draw} chooses among the training cases; say how many with --cases.")
    if cases is None:
        return parts
    if not 1 <= cases <= len(parts.train):
        raise GenMedError(f"cases {cases}: the training part of the split has {len(parts.train)}; choose 1 to that.")
    order = sorted(parts.train)
    random.Random(draw).shuffle(order)
    met: set[str] = set()
    firsts = []
    for id in order:
        who = person(parts.dataset, id)
        if who not in met:
            firsts.append(id)
        met.add(who)
    order = firsts + [id for id in order if id not in firsts]
    return dataclasses.replace(parts, train=tuple(sorted(order[:cases])))


def _drawn_split(dataset: Dataset, seed: int) -> Split:
    parts = three_way(_subjects(dataset), seed)
    return Split(dataset.name, parts["train"], parts["tune"], parts["report"])


def _subjects(dataset: Dataset) -> dict[str, str]:
    """Case -> person of all labelled cases."""
    return {case.id: person(dataset.name, case.id) for case in dataset.cases if case.label is not None}


def _start_from(denoiser: Denoiser, init: str | Path) -> None:
    """Take the weights of another model; with other classes, only the image part of the first and the last layer.

    Raises `GenMedError` if anything else differs.
    """
    other = load(init).denoiser
    mine, theirs = denoiser.state_dict(), other.state_dict()  # `mine` shares the memory of the weights
    image = denoiser.fields.slice("image")
    outer: dict[str, Any] = {
        "net.down.0.conv1.weight": (slice(None), image), "net.head.weight": image, "net.head.bias": image,
    }  # fmt: skip
    whole = {name for name in mine.keys() & theirs.keys() if mine[name].shape == theirs[name].shape}
    parts = {name: outer[name] for name in outer.keys() - whole}
    if (
        not mine.keys() == theirs.keys() == whole | parts.keys()
        or other.fields.slice("image") != image
        or any(mine[name][part].shape != theirs[name][part].shape for name, part in parts.items())
    ):
        raise GenMedError(
            f"{init}: its network does not fit this plan (other widths or channels); choose the same preset."
        )
    for name in mine:
        part = parts.get(name, ...)
        mine[name][part] = theirs[name][part]
    if parts:
        print(f"{init}: {len(whole)} of {len(mine)} tensors taken whole, the others' image part", flush=True)


def conditional(model: nn.Module) -> Callable[[Float[Tensor, "b c x y z"]], Float[Tensor, "b k x y z"]]:
    """Label logits of a clean image in one evaluation."""

    def logits(image: Tensor) -> Tensor:
        image = image.to(next(model.parameters()).device)
        hidden = image.new_zeros(len(image), len(model.fields["label"].channels), *image.shape[2:])  # type: ignore
        sigma = image.new_tensor([[0.0, model.sigma_max]]).expand(len(image), -1)
        return model.outputs(torch.cat([image, hidden], dim=1), sigma)["label"].cpu()  # type: ignore[operator]

    return logits


@torch.no_grad()
def tune_dice(segment: Callable[[Tensor], Tensor], scans: Sequence[Scan], plan: Plan) -> dict[str, float]:
    """Mean Dice of each class over whole scans on the working grid. `segment` maps images to logits."""
    rows = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for image, label in scans:
        with fast_arithmetic(device):
            found = segment(image[None])[0].argmax(dim=0)
        rows.append([_dice(found == c, label == c) for c in range(1, len(plan.labels))])
    means = torch.tensor(rows).nanmean(dim=0)
    scores = {name: round(float(mean), 4) for name, mean in zip(plan.labels[1:], means, strict=True)}
    return {"dice": round(float(means.nanmean()), 4), **scores}


@torch.no_grad()
def measured(plan: Plan, model: nn.Module, scans: Sequence[Scan]) -> Plan:
    """The plan with what scans that were not trained on say of one evaluation of the model.

    `typical`, how well pairs of image and label are denoised, is what `genmed.surprise` compares with. `temperature` is
    that of `TEMPERATURES` with the least cross-entropy, `volume_error` how far the volumes are off.
    """
    device = next(model.parameters()).device

    def denoise(z: Tensor, sigma: float) -> Tensor:
        with fast_arithmetic(device.type):
            return model(z.to(device), torch.full((len(z), len(model.fields)), sigma, device=device)).cpu()  # type: ignore

    rows, losses, volumes = [], torch.zeros(len(TEMPERATURES)), []
    for image, label in scans:
        with fast_arithmetic(device.type):
            logits = conditional(model)(image[None]).float()
        rows.append(features(denoise, model.fields, image[None], logits.softmax(dim=1)))  # type: ignore[arg-type]
        losses += torch.stack([cross_entropy(logits / t, label[None].long(), reduction="sum") for t in TEMPERATURES])
        volumes.append([torch.bincount(c.flatten(), minlength=len(plan.labels)) for c in (logits.argmax(dim=1), label)])
    found, true = (torch.stack(side)[:, 1:].numpy() for side in zip(*volumes, strict=True))
    return dataclasses.replace(
        plan, typical=typical(rows), temperature=round(float(TEMPERATURES[losses.argmin()]), 3),
        volume_error=volume_error(found, true),
    )  # fmt: skip


def _dice(found: Tensor, truth: Tensor) -> float:
    total = int(found.sum() + truth.sum())
    return 2 * int((found & truth).sum()) / total if total else math.nan


@torch.no_grad()
def sample_picture(model: nn.Module, plan: Plan) -> Float[Tensor, "1 h w"]:
    """Middle slices of a pair drawn from the joint, side by side, as grey values in [0, 1]."""
    from genmed.samplers import euler, schedule

    sigmas = schedule(plan.sigma_max, plan.sigma_min, 16)
    z = plan.sigma_max * torch.randn(1, model.fields.channels, *plan.patch)  # type: ignore
    z = z.to(next(model.parameters()).device)
    z0 = euler(lambda z, sigma: model(z, z.new_full((1, len(model.fields)), float(sigma))), z, sigmas)  # type: ignore
    parts = model.fields.split(z0[..., plan.patch[2] // 2])  # type: ignore
    image = ((parts["image"][0, :1] + 2.5) / 5).clamp(0, 1)
    label = parts["label"][0].argmax(dim=0, keepdim=True) / max(1, len(plan.labels) - 1)
    return torch.cat([image, label], dim=1).cpu()


def first_card(dataset: Dataset, plan: Plan, parts: Split, minutes: float, scores: dict[str, float]) -> Card:
    """What is known right after training; with a few-shot draw, the names of its cases."""
    spacing = " × ".join(f"{s:g}" for s in plan.spacing_mm)
    few = f"\n\nFew-shot draw {plan.draw} of {plan.cases} training cases: {', '.join(parts.train)}."
    return Card(
        name=plan.name,
        licence=dataset.licence or "not stated by the training data",
        training_data=f"{dataset.name}: {len(parts.train)} cases ({dataset.reference or 'no reference given'})",
        minutes=round(minutes, 1),
        hardware=f"{torch.get_num_threads()} threads of {platform.machine()}"
        if not torch.cuda.is_available()
        else torch.cuda.get_device_name(),
        command="genmed train (Dice on the tune part, working grid, one conditional evaluation)",
        scores={f"tune {name}": value for name, value in scores.items()},
        text=f"# {plan.name}\n\nJoint model of {', '.join(plan.channels)} and {', '.join(plan.labels[1:])} "
        f"at {spacing} mm. Augmentation: {plan.augmentation}." + (few if plan.cases else ""),
    )
