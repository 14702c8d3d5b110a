"""Quality of robust results against their cost: network evaluations, samples, sampler and guide.

    python -m genmed.bench.efficiency --model DIR --data DIR --part tune --cases 8 --out DIR

Each row is one schedule of `genmed.tasks.segment.guided_pair`; the defaults there were chosen from this table. A
row of OUT/efficiency.csv is written as soon as its case is finished, and a run that starts again goes on after it.
With --defaults the same inputs are segmented as users do it, without any flag but the mask of the slices that were
observed, and what is told is how long that takes, and the peak memory:

    python -m genmed.bench.efficiency --defaults --data DIR --cases 8
"""

import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from genmed.bench.cases import HIPPOCAMPUS, cases_of_part, hippocampus_options, one_line_errors
from genmed.bench.hippocampus import save_figure
from genmed.bench.kept import key_of, read_rows, write_rows
from genmed.bench.tables import HIPPOCAMPUS_INPUTS
from genmed.data.dataset import read_dataset
from genmed.data.split import person
from genmed.degrade import Degraded
from genmed.errors import GenMedError
from genmed.files import write_bytes
from genmed.hub import Model, load
from genmed.metrics import bootstrap_interval, dice
from genmed.progress import track
from genmed.samplers import schedule
from genmed.space import on_grid
from genmed.tasks.segment import MATCHES, Sampling, guided_pair, segment
from genmed.tasks.view import View
from genmed.volume import Volume, read, read_labels

MODE, ROWS = "restore-then-condition", "efficiency.csv"


class Schedule(NamedTuple):
    """How samples are drawn, how many are averaged, and the mode of `segment`; as text its name."""

    how: Sampling
    samples: int = 1
    mode: str = MODE

    @property
    def otherwise(self) -> str:
        """What besides levels, travels and samples is not as usual."""
        usual = Sampling(self.how.steps, self.how.travels)
        changed = {name: value for name, value in self.how._asdict().items() if value != getattr(usual, name)}
        return ", ".join([f"{name} {value}" for name, value in changed.items()] + [self.mode] * (self.mode != MODE))

    def __str__(self) -> str:
        numbers = f"levels {self.how.steps}, travels {self.how.travels}, samples {self.samples}"
        return f"{numbers}, {self.otherwise}" if self.otherwise else numbers


SCHEDULES = (
    *(Schedule(Sampling(steps)) for steps in (1, 2, 4, 8, 16, 32, 64)),
    *(Schedule(Sampling(steps, travels)) for steps, travels in ((4, 2), (8, 2), (16, 3))),
    *(Schedule(Sampling(steps), 4) for steps in (2, 4, 8)),
    *(Schedule(Sampling(steps, travels), 4) for steps, travels in ((4, 1), (8, 2))),
    *(Schedule(Sampling(steps), 16) for steps in (2, 4)),
    *(Schedule(Sampling(8, sampler=sampler)) for sampler in ("euler", "heun")),
    Schedule(Sampling(8, relax=1.0)), Schedule(Sampling(8, method="variance")), Schedule(Sampling(8, last_step=False)),
    *(Schedule(Sampling(8), mode=mode) for mode in ("joint", "joint-base")),
)  # fmt: skip
INPUTS = {"8 mm voxels": "affine", "4 slices": "none", "inverted": "affine", "tent": "curve"}  # and their match


class Row(NamedTuple):
    """One case of one schedule. `key` names weights and settings, `evaluations` counts those of one sample."""

    input: str
    schedule: str
    case: str
    key: str
    evaluations: int
    dice: float
    seconds: float

    @property
    def place(self) -> tuple[str, str, str]:
        return self.input, self.schedule, self.case


class Wait(NamedTuple):
    """Seconds of `segment` for one case, on the clock and of all threads together, and how it explained the scan."""

    input: str
    seconds: float
    cpu_seconds: float
    how: str


def wait(model: Model, data: Path, part: str, cases: int | None, split: Path = HIPPOCAMPUS) -> list[Wait]:
    """All inputs by `segment` with its defaults, result on the scan's own grid; reading and writing left out."""
    dataset, waits = read_dataset(data), []
    for name in INPUTS:
        for id in cases_of_part(dataset, split, part, cases):
            worse = HIPPOCAMPUS_INPUTS[name].degrade(read(dataset.case(id).images), id)
            started = time.process_time()
            found = segment(model, worse.scan, **worse.options)
            cpu_seconds = time.process_time() - started
            waits.append(Wait(name, found.seconds, cpu_seconds, f"{found.mode}, match {found.match}"))
            print(f"{name}: {id}, {found.seconds:.1f} s, CPU {cpu_seconds:.1f} s", flush=True)
    return waits


def wait_table(waits: Sequence[Wait]) -> str:
    """Markdown: a line per input and one for all; below, threads and the peak memory of this process."""
    lines = ["| input | cases | mean (s) | longest (s) | mean CPU (s) | chosen |", "|---|---|---|---|---|---|"]
    for name in (*dict.fromkeys(one.input for one in waits), "all"):
        mine = [one for one in waits if name in (one.input, "all")]
        seconds = [one.seconds for one in mine]
        chosen = "; ".join(f"{how}: {count}" for how, count in Counter(one.how for one in mine).most_common())
        cpu = np.mean([one.cpu_seconds for one in mine])
        lines.append(f"| {name} | {len(mine)} | {np.mean(seconds):.1f} | {max(seconds):.1f} | {cpu:.1f} | {chosen} |")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    lines += ["", f"Threads: {torch.get_num_threads()}. Peak memory: {peak_gb:.2f} GB, Python itself included."]
    return "\n".join(lines) + "\n"


def measure(
    model: Model, data: Path, out: Path, part: str, cases: int | None, split: Path = HIPPOCAMPUS
) -> list[Row]:
    """All schedules on all inputs; Dice on the working grid. Rows that are there for the same weights are kept."""
    dataset = read_dataset(data)
    chosen = cases_of_part(dataset, split, part, cases)
    wanted = {(name, str(of), id): of for name in INPUTS for of in SCHEDULES for id in chosen}
    keys = {place: key_of(model.sha256, _changes(place[0]), INPUTS[place[0]], of) for place, of in wanted.items()}
    before = read_rows(out / ROWS, Row)
    rows = {row.place: row for row in before if keys.get(row.place, row.key) == row.key}
    for place in track([place for place in wanted if place not in rows], "Sampling"):
        name, _, id = place
        case = dataset.case(id)
        if case.label is None:
            raise GenMedError(f"case '{id}': has no label map to compare with; choose a labelled part.")
        worse = HIPPOCAMPUS_INPUTS[name].degrade(read(case.images, fourth_axis="channels"), id)
        calls, score, seconds = examine(model, worse, read_labels(case.label), INPUTS[name], wanted[place])
        rows[place] = Row(*place, keys[place], calls, score, seconds)
        write_rows(out / ROWS, Row, rows.values())
    return [rows[place] for place in wanted]


def _changes(name: str) -> list[str]:
    return [str(change) for change in HIPPOCAMPUS_INPUTS[name].changes]


def examine(model: Model, worse: Degraded, truth: Volume, match: str, of: Schedule) -> tuple[int, float, float]:
    """Network evaluations of a sample, Dice (mean over structures; 0 where sampling diverged) and seconds of a scan."""
    plan = model.plan
    view = View.of(plan, worse.scan, worse.observed, worse.slice_thickness_mm)
    true = np.searchsorted(plan.label_values, on_grid(truth, view.space.model, order=0)[0])
    started = time.monotonic()
    try:
        with torch.no_grad():
            soft = guided_pair(model, view, of.mode, MATCHES[match], list(range(of.samples)), of.how)[0]
        found = soft.mean(dim=0).argmax(dim=0).numpy()
    except GenMedError:
        found = np.zeros_like(true)
    seconds = time.monotonic() - started
    score = np.mean([dice(found == c, true == c) for c in range(1, len(plan.labels))])
    return of.how.evaluations(schedule(plan.sigma_max, plan.sigma_min, of.how.steps)), float(score), seconds


def table(rows: Sequence[Row], people: Mapping[str, str]) -> str:
    """Markdown: one line per schedule, one column per input."""
    names = list(dict.fromkeys(row.input for row in rows))
    lines = [f"| levels | travels | samples | otherwise | evaluations | {' | '.join(names)} | s per case |"]
    lines.append("|---" * (len(names) + 6) + "|")
    for of in SCHEDULES:
        mine = [row for row in rows if row.schedule == str(of)]
        cells = []
        for name in names:
            scores = [row.dice for row in mine if row.input == name]
            groups = [people[row.case] for row in mine if row.input == name]
            low, high = bootstrap_interval(scores, groups=groups)
            cells.append(f"{np.mean(scores):.3f} [{low:.3f}, {high:.3f}]")
        seconds, calls = np.mean([row.seconds for row in mine]), mine[0].evaluations * of.samples
        settings = f"{of.how.steps} | {of.how.travels} | {of.samples} | {of.otherwise}"
        lines.append(f"| {settings} | {calls} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Dice against network evaluations as efficiency.svg and .png: a panel per input, a mark per schedule."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.input for row in rows))
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, squeeze=False)[0]
    kinds = {f"{travels} travels": [of for of in SCHEDULES if of.how.travels == travels and not of.otherwise]
             for travels in range(4)} | {"otherwise": [of for of in SCHEDULES if of.otherwise]}  # fmt: skip
    for axes, name in zip(panels, names, strict=True):
        for (label, schedules), mark in zip(kinds.items(), "osD^x", strict=True):
            points = [[row for row in rows if (row.input, row.schedule) == (name, str(of))] for of in schedules]
            calls = [part[0].evaluations * of.samples for part, of in zip(points, schedules, strict=True)]
            axes.plot(calls, [np.mean([row.dice for row in part]) for part in points], mark, label=label, alpha=0.8)
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="network evaluations")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Dice")
    panels[-1].legend()
    save_figure(figure, out, "efficiency")


def save(rows: Sequence[Row], out: Path) -> None:
    """Print the table and write it to a folder, with the plot."""
    text = table(rows, {row.case: person("hippocampus", row.case) for row in rows})
    write_bytes(out / "efficiency.md", text.encode())
    plot(rows, out)
    print(text)


def main() -> None:
    """Parse the command line."""
    parser = hippocampus_options("Quality against network evaluations, or the time that a user waits.")
    parser.add_argument("--out", type=Path, help="folder for table, CSV and plot of the schedules; run again to go on")
    parser.add_argument("--defaults", action="store_true", help="time `segment` as it is, instead of schedules")
    a = parser.parse_args()
    if a.defaults == (a.out is not None):
        parser.error("give --out for the schedules, or --defaults, which only prints")
    with one_line_errors():
        model = load(a.model)
        if a.defaults:
            print("\n" + wait_table(wait(model, a.data, a.part, a.cases)))
        else:
            save(measure(model, a.data, a.out, a.part, a.cases), a.out)


if __name__ == "__main__":
    main()
