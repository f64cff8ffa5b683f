"""Runs as processes: one job a folder, several side by side, on one machine or many that share the folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from spikedistill import runs
from spikedistill.recipes import distill
from spikedistill.spec import SpecError


@dataclass(frozen=True)
class Job:
    """One run: a folder and the settings of `distill` that make it."""

    name: str
    folder: Path
    settings: dict[str, Any]

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def other(self) -> str:
        """What is wrong where the folder holds a run with other settings; else empty."""
        if not (self.folder / "config.json").exists():
            return ""
        before = distill.Config().model_dump() | runs.read_json(self.folder / "config.json")
        changes = runs.differences(before, json.loads(json.dumps(self.settings)), self.folder)
        hint = "choose another --out, or delete it"
        return f"'{self.folder}' holds a run with other settings ({changes}): {hint}" if changes else ""

    @property
    def epochs_done(self) -> int:
        try:
            return len((self.folder / "metrics.jsonl").read_text().splitlines())
        except OSError:
            return 0


@contextmanager
def claim(path: Path) -> Iterator[int | None]:
    """A lock between processes and machines that share the folder: an open file, or None where another has it.

    A process started with the file as one of its own holds the lock too, so that a run whose parent was killed is not
    started a second time while it still goes on.
    """
    import fcntl  # not on Windows, where comparisons do not run but everything else does

    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError as error:
            why = f"its file system locks no files ({error.strerror})"
            raise SpecError([f"out: '{path.parent}' cannot be shared: {why}: choose another --out"]) from None
        yield file if held else None
    finally:
        os.close(file)


class Crew:
    """Runs jobs, `c.jobs` side by side (0: in this thread, which is the one that Ctrl-C reaches), and shows how far.

    c: jobs, out, progress, accelerator, devices.
    """

    def __init__(self, c: Any):
        self.c, self.locks = c, Path(c.out) / "locks"
        self.pool = ThreadPoolExecutor(max(1, c.jobs))
        self.children: set[subprocess.Popen] = set()
        self.gpus = gpus(c)
        self.slots: SimpleQueue[int] = SimpleQueue()  # of the processes that run side by side
        for slot in range(c.jobs):
            self.slots.put(slot)
        self.stopped = False

    def __enter__(self) -> "Crew":
        self.before = None
        if threading.current_thread() is threading.main_thread():  # so that `kill` ends the runs too
            self.before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
        self.stopped = True
        for child in [*self.children]:
            child.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def map(self, work: Callable[[Any], dict[str, Any]], rows: Sequence[Any]) -> dict[str, dict[str, Any]]:
        if not self.c.jobs:
            return {row.name: work(row) for row in rows}
        futures = {row.name: self.pool.submit(work, row) for row in rows}
        return {name: future.result() for name, future in futures.items()}

    def done(self, jobs: Sequence[Job], must: bool) -> Iterator[tuple[Job, str | None]]:
        """Each job and what `one` says of it, as they end."""
        if not self.c.jobs:
            yield from ((job, self.one(job, must)) for job in jobs)
            return
        futures = {self.pool.submit(self.one, job, must): job for job in jobs}
        yield from ((futures[future], future.result()) for future in as_completed(futures))

    def all(self, jobs: Sequence[Job], must: bool = False) -> list[tuple[str, str]]:
        """Run those that are not finished. Returns (name, why) of those that failed; `must` raises for them instead,
        and waits for what another process is working on, where otherwise it is left to it.
        """
        if others := [f"out: {other}" for job in jobs if (other := job.other)]:
            raise SpecError(others)
        todo = [job for job in jobs if not job.finished]
        if self.c.progress and len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already", file=sys.stderr)
        failed = []
        with Board(todo, self.c.progress) as board:
            for job, why in self.done(todo, must):
                board.finished(job, why)
                if why and why != ELSEWHERE:
                    failed.append((job.name, why))
        if must and failed:
            raise SpecError([f"{name} failed: {why}" for name, why in failed])
        return failed

    def one(self, job: Job, must: bool = False) -> str | None:
        """Run one job; None where it is finished, else why it is not."""
        if other := job.other:
            return other
        while not job.finished and not self.stopped:
            with claim(self.locks / "-".join(job.folder.relative_to(self.c.out).parts)) as lock:
                if lock is not None:
                    return None if job.finished else self.start(job, lock)
            if not must:
                return ELSEWHERE
            time.sleep(2)
        return None

    def start(self, job: Job, lock: int) -> str | None:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        file = job.folder.parent / f"{job.name}.json"
        runs.write_json(file, job.settings)
        if not self.c.jobs:
            try:
                distill.run(distill.Config.model_validate(job.settings))
            except Exception as error:
                return str(error) or type(error).__name__
            result = runs.read_json(job.folder / "result.json")
            if result["device"] == "cpu":  # this process has held the runs before it, too
                runs.write_json(job.folder / "result.json", result | {"peak_memory_bytes": None})
            return None
        command = [sys.executable, "-m", "spikedistill.cli", "distill", "--config", str(file)]
        environment = {"OMP_NUM_THREADS": str(threads(self.c))} | os.environ
        slot = self.slots.get()
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        try:
            with (job.folder.parent / f"{job.name}.log").open("w") as log:
                child = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(lock,), env=environment)
                self.children.add(child)
                if self.stopped:  # since the last look
                    child.terminate()
                code = child.wait()
                self.children.discard(child)
        finally:
            self.slots.put(slot)
        if not code and job.finished:
            return None
        lines = Path(log.name).read_text().strip().splitlines()
        return f"{ended(code, self.stopped) or [f'it ended with code {code}', *lines][-1]} (see '{log.name}')"


ELSEWHERE = "another process is working on it"
STOPPED = "it was stopped before its end"


def ended(code: int, stopped: bool = False) -> str:
    """What the exit code of a run says of how it ended; empty where its log says more. stopped: all were asked to."""
    if stopped or code in (130, -signal.SIGINT, -signal.SIGTERM):
        return STOPPED
    name = {-s: s.name for s in signal.Signals}.get(code, f"signal {-code}")
    return f"killed by {name}{', often for lack of memory' * (name == 'SIGKILL')}" if code < 0 else ""


def mistakes_of(c: Any) -> list[str]:
    """Settings of which no run would come."""
    why = "0 runs in this process, which devices > 1 starts again: give --jobs 1"
    return [f"jobs: {why}"] if c.jobs == 0 and c.devices > 1 else []


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(c: Any) -> int:
    """How many a run has: its share of the processors, unless OMP_NUM_THREADS says otherwise."""
    shares = c.jobs and "OMP_NUM_THREADS" not in os.environ
    return max(1, processors() // c.jobs) if shares else torch.get_num_threads()


def gpus(c: Any) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be of a run, one for each GPU; none where there is nothing to share out."""
    count = torch.cuda.device_count() if c.accelerator in ("auto", "cuda") and c.devices == 1 else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return (named if len(named) >= count else [*map(str, range(count))])[:count] if count > 1 else []


class Board:
    """Progress over all runs: a bar on a terminal, else a line a run."""

    def __init__(self, jobs: Sequence[Job], enabled: bool):
        self.jobs, self.enabled = jobs, enabled and bool(jobs)
        self.bar: Any = None
        self.total = sum(job.settings["epochs"] for job in jobs)
        self.before, self.began, self.count = self.epochs(), time.perf_counter(), 0
        self.over = threading.Event()

    def epochs(self) -> int:
        return sum(job.settings["epochs"] if job.finished else job.epochs_done for job in self.jobs)

    def __enter__(self) -> "Board":
        if self.enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(None),
                progress.TextColumn("{task.fields[state]}"),
            )
            self.bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task("all runs", total=self.total, completed=self.before, state="")
            self.bar.start()
            threading.Thread(target=self.follow, daemon=True).start()  # runs may have the thread that shows them
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.bar:
            self.bar.stop()

    def follow(self) -> None:
        while not self.over.wait(1.0):
            self.update()

    def update(self) -> None:
        self.bar.update(self.task, completed=self.epochs(), state=f"{self.count}/{len(self.jobs)} runs")

    def finished(self, job: Job, why: str | None) -> None:
        self.count += 1
        if self.bar:
            return self.update()
        if not self.enabled:
            return
        done, spent = self.epochs() - self.before, time.perf_counter() - self.began
        left = f"{spent / done * (self.total - self.before - done):.0f} s left" if done else ""
        words = why
        if why is None:
            result = runs.read_json(job.folder / "result.json")
            words = f"valid {result['valid']['accuracy']:.2%}  {result['train_seconds']:.0f} s"
        print(f"[{self.count}/{len(self.jobs)}] {job.name}  {words}  {left}".rstrip(), file=sys.stderr, flush=True)
