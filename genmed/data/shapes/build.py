"""`build_shapes`: from folders of surfaces and label maps to a data set of shapes with captions.

The list of items is fixed before anything is read. Each finished item is a small file in OUT/.work, so a run that is
killed loses at most the items in progress, and the same command goes on. Items run in processes, since compiled mesh
code may end one or never come back; an item that ends its process twice, or takes too long, is left out like any other
bad one.
"""

from __future__ import annotations

import csv
import faulthandler
import hashlib
import json
import logging
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

from genmed.data.shapes import INDEX
from genmed.data.shapes.collect import REASONS, Reason, categories_of, write_set
from genmed.data.shapes.items import Built, build, read_record, record_path, write_record
from genmed.data.shapes.sources import Item, find_items, within
from genmed.errors import GenMedError
from genmed.files import write_json
from genmed.mesh import UNITS_MM, require_libraries
from genmed.shape import SIZES

REQUEST, WORK = "build.json", ".work"
BATCH = 8           # items of one file that a process takes at a time
POOLS = 3           # in a row that may break before any of their items begins
DEADLINE_S = 300    # of one item: hundreds of times what most of them take
CRASHED = "reading it ends the process: too large, or broken in a way that the mesh library does not survive"


@dataclass(frozen=True)
class Outcome:
    """The folder, how many shapes are in it and how many were left out, and whether it was finished before."""

    folder: Path
    shapes: int
    left_out: int
    finished_before: bool = False


@dataclass(frozen=True)
class Task:
    """One item and where its record goes."""

    item: Item
    record: Path
    size: int
    unit: str
    deadline_s: float = DEADLINE_S

    @property
    def mark(self) -> Path:
        """There while the item is in progress; where it was when its time was up, if it took too long."""
        return self.record.with_suffix(".started")

    @property
    def is_late(self) -> bool:
        """Whether the item took too long and its process was ended."""
        return self.mark.is_file() and self.mark.stat().st_size > 0

    def run(self) -> None:
        """Build the item and write its record. Ends the process if that takes too long, even within compiled code."""
        self.mark.parent.mkdir(parents=True, exist_ok=True)
        with self.mark.open("w") as mark:
            faulthandler.dump_traceback_later(self.deadline_s, exit=True, file=mark)
            try:
                built = build(self.item, self.size, self.unit)
            finally:
                faulthandler.cancel_dump_traceback_later()
        write_record(self.record, built)
        self.mark.unlink(missing_ok=True)

    def give_up(self) -> None:
        """Record that the item ends its process, or why its process was ended."""
        reason = f"took longer than {self.deadline_s:g} s" if self.is_late else CRASHED
        write_record(self.record, Built(reason=reason))
        self.mark.unlink(missing_ok=True)


def build_shapes(
    sources: Sequence[str | Path],
    out: str | Path,
    size: int = 64,
    workers: int = 1,
    ray: bool = False,
    unseen: Sequence[str] = (),
    unit: str = "mm",
    seed: int = 0,
) -> Outcome:
    """Build a data set of shapes of size³ voxels from source folders (`genmed.data.shapes.sources`) in `out`.

    `workers` processes, or a Ray cluster with `ray`, whose machines see the same folders. Categories in `unseen` stay
    out of training. `unit` is that of surface files. Called again with the same arguments it goes on, and does
    nothing once it is finished. Raises `GenMedError` for bad arguments, folders without shapes, and an `out` that
    holds something else.
    """
    out = Path(out).expanduser()
    require_libraries()
    _check(sources, size, workers, unit)
    folders = [Path(source).expanduser().resolve() for source in sources]
    listings = {folder: find_items(folder) for folder in folders}
    items = [item for listing in listings.values() for item in listing.items]
    apart = sorted(categories_of(items, unseen).values())
    request = {
        "sources": [folder.name for folder in folders],
        "folders_sha256": hashlib.sha256("\n".join(map(str, folders)).encode()).hexdigest(),
        "size": size,
        "unit": unit,
        "unseen": apart,
        "seed": seed,
    }
    if _claim(out, request):
        import pyarrow.parquet

        shapes = pyarrow.parquet.read_metadata(out / INDEX).num_rows
        return Outcome(out, shapes, _left_out(out), finished_before=True)
    tasks = [Task(item, record_path(out / WORK, item, size, unit), size, unit) for item in items]
    todo = [task for task in tasks if not task.record.is_file()]
    with _progress(len(tasks), len(tasks) - len(todo)) as advance:
        for done in (_with_ray if ray else _with_processes)(todo, workers):
            advance(done)
    finished = [(id, task.item, read_record(task.record)) for id, task in zip(_ids(items), tasks, strict=True)]
    reasons = [
        Reason(folder.name, within(path, folder), "", False, why)
        for folder, listing in listings.items()
        for path, why in listing.left_out
    ]
    shapes, left_out = write_set(out, finished, reasons, apart, seed, _command(request))
    shutil.rmtree(out / WORK, ignore_errors=True)
    return Outcome(out, shapes, left_out)


def _check(sources: Sequence[str | Path], size: int, workers: int, unit: str) -> None:
    if not sources:
        raise GenMedError("no source given; name at least one folder.")
    if size not in SIZES:
        raise GenMedError(f"--size {size}: choose {', '.join(map(str, SIZES))} voxels.")
    if workers < 1:
        raise GenMedError(f"--workers {workers}: at least one process is needed.")
    if unit not in UNITS_MM:
        raise GenMedError(f"--unit {unit}: choose {', '.join(UNITS_MM)}.")


def _command(request: Mapping[str, Any]) -> str:
    """The command for the card, without the paths of this machine."""
    options = [f"--size {request['size']}", f"--unit {request['unit']}", f"--seed {request['seed']}"]
    options += [f"--unseen {shlex.quote(category)}" for category in request["unseen"]]
    return " ".join(["genmed data build-shapes", shlex.join(request["sources"]), *options])


def _claim(out: Path, request: dict[str, Any]) -> bool:
    """Note what the folder is for, and whether it is finished. Raises for one that holds something else."""
    try:
        recorded = json.loads((out / REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = None
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and recorded != request)):
        raise GenMedError(f"{out}: holds something else than these shapes; choose another folder.")
    if recorded != request:
        write_json(out / REQUEST, request)
    return (out / INDEX).is_file()


def _left_out(out: Path) -> int:
    with (out / REASONS).open(newline="", encoding="utf-8") as stream:
        return sum(row["kept"] == "no" for row in csv.DictReader(stream))


def _ids(items: Sequence[Item]) -> list[str]:
    """A name for each item; repeated ones are numbered."""
    met: Counter[str] = Counter()
    ids = []
    for item in items:
        met[item.name] += 1
        ids.append(item.name if met[item.name] == 1 else f"{item.name}-{met[item.name]}")
    return ids


# Processes ------------------------------------------------------------------------------------------------


def _batches(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """A few tasks of the same file each, so that a label map is read about once."""
    for _, group in groupby(tasks, key=lambda task: task.item.path):
        same = list(group)
        yield from (same[start : start + BATCH] for start in range(0, len(same), BATCH))


def _unfinished(batch: Sequence[Task]) -> list[Task]:
    return [task for task in batch if not task.record.is_file()]


def _with_processes(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """Run all tasks; yields how many more are finished.

    A pool that breaks is replaced. If an item took too long, that is why; else those in progress run alone.
    """
    waiting = deque(_batches(tasks))
    fruitless = 0  # pools in a row that broke before any of their items began
    while waiting:
        running: dict[Future[None], list[Task]] = {}
        pool = _pool(workers)
        try:
            while waiting or running:
                while waiting and len(running) < 2 * workers:
                    batch = waiting.popleft()
                    running[pool.submit(_run, batch)] = batch
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    batch = running.pop(future)
                    left = _unfinished(batch)
                    waiting += [left] if left else []
                    yield len(batch) - len(left)
        except BrokenProcessPool as error:
            pool.shutdown(wait=True, cancel_futures=True)
            begun = any(task.mark.exists() or len(_unfinished(b)) < len(b) for b in running.values() for task in b)
            fruitless = 0 if begun else fruitless + 1
            if fruitless == POOLS:
                raise GenMedError(
                    "worker processes end before they begin an item; free some memory, or choose fewer --workers."
                ) from error
            suspects = [task for batch in running.values() for task in _unfinished(batch) if task.mark.exists()]
            late = [task for task in suspects if task.is_late]
            for task in late:
                task.give_up()
            for task in [] if late else suspects:
                _alone(task)
            for batch in running.values():
                left = _unfinished(batch)
                waiting += [left] if left else []
                yield len(batch) - len(left)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _alone(task: Task) -> None:
    with _pool(1) as pool:
        try:
            pool.submit(_run, [task]).result()
        except BrokenProcessPool:
            task.give_up()


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),))


_interrupted = threading.Event()


def _start_worker(parent: int) -> None:
    """Ctrl-C lets a worker finish its item; it leaves by itself when the command was killed."""

    def note(number: int, frame: FrameType | None) -> None:
        _interrupted.set()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, note)
    threading.Thread(target=watch, daemon=True).start()


def _run(batch: Sequence[Task]) -> None:
    for task in batch:
        if not _interrupted.is_set():
            task.run()


def _with_ray(tasks: Sequence[Task], workers: int) -> Iterator[int]:
    """The same on a Ray cluster (RAY_ADDRESS), or on this machine with `workers` where there is none."""
    try:
        import ray
    except ImportError as error:
        raise GenMedError(
            "--ray needs Ray; in the repository, run: pip install -c constraints.txt '.[cluster]'"
        ) from error
    started_here = not ray.is_initialized()
    if started_here:
        cpus = None if "RAY_ADDRESS" in os.environ else workers
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    remote = ray.remote(num_cpus=1, max_retries=0)(_run)
    room = 2 * max(1, int(ray.cluster_resources().get("CPU", workers)))
    waiting = deque(_batches(tasks))
    running: dict[Any, list[Task]] = {}
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
    tried: set[Path] = set()
    try:
        while waiting or running:
            while waiting and len(running) < room:
                batch = waiting.popleft()
                running[remote.remote(batch)] = batch
            for reference in ray.wait(list(running))[0]:
                batch = running.pop(reference)
                try:
                    ray.get(reference)
                except lost:
                    late = [task for task in _unfinished(batch) if task.is_late]
                    for task in late or [task for task in _unfinished(batch) if task.record in tried]:
                        task.give_up()
                    if not late:
                        tried |= {task.record for task in batch}  # each goes once more, by itself
                left = _unfinished(batch)
                waiting += [[task] for task in left]
                yield len(batch) - len(left)
    finally:
        if started_here:
            ray.shutdown()


# Progress -------------------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int, before: int) -> Iterator[Callable[[int], None]]:
    """Yields a function of how many more are finished; says so on a terminal all the time, else every minute."""
    is_terminal = sys.stderr.isatty()
    started = said = time.monotonic()
    done = before

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if now - said < (0.5 if is_terminal else 60):
            return
        said, rate = now, (done - before) / (now - started)
        left = f"{_clock((total - done) / rate)} left" if rate else "no end in sight"
        line = f"{done} of {total} shapes, {rate:.2g} a second, {left}"
        print(f"\r{line:<78}" if is_terminal else line, end="" if is_terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if is_terminal:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
