"""Runs as processes: where they run, how they are stopped, what their end says, and what an estimate takes them for."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spikedistill.data import from_tensors
from spikedistill.recipes import compare
from spikedistill.recipes.comparing import crew, estimate
from spikedistill.recipes.comparing.rows import Row
from spikedistill.spec import SpecError


def config(out, **more):
    return compare.Config(**{"out": str(out), "progress": False, "jobs": 1, "teacher": None} | more)


def job(out, name="ce-0", of="runs"):
    return crew.Job(name, Path(out) / of / name, {"epochs": 1})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", ["all", "map"])
def test_a_run_in_this_process_stops_at_once(tmp_path, monkeypatch, number, way):
    done = []

    def run(c):
        os.kill(os.getpid(), number)
        time.sleep(3)
        done.append(c)

    monkeypatch.setattr(crew.distill, "run", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it puts behind ignore it
    try:
        with pytest.raises(KeyboardInterrupt), crew.Crew(config(tmp_path, jobs=0)) as team:
            if way == "all":
                team.all([job(tmp_path)])
            else:
                team.map(lambda row: team.one(job(tmp_path, row.name)), [Row("ce", ("ce",))])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not done


def test_the_bar_moves_while_this_thread_runs_a_job(tmp_path):
    class Bar:
        seen: list = []

        def update(self, task, completed, state):
            self.seen.append(completed)

        def stop(self):
            pass

    one = job(tmp_path)
    board = crew.Board([one], True)
    board.bar, board.task = Bar(), 0
    threading.Thread(target=board.follow, daemon=True).start()
    one.folder.mkdir(parents=True)
    (one.folder / "metrics.jsonl").write_text("{}\n")
    deadline = time.perf_counter() + 20
    while 1 not in Bar.seen and time.perf_counter() < deadline:
        time.sleep(0.1)
    board.__exit__()
    assert 1 in Bar.seen


def test_locks_have_one_name_however_out_is_written(tmp_path, monkeypatch):
    (tmp_path / "cmp").mkdir()
    monkeypatch.chdir(tmp_path / "cmp")
    monkeypatch.setattr(crew.Crew, "start", lambda self, job, lock: "tried")
    for out in (".", "../cmp", str(tmp_path / "cmp")):
        team = crew.Crew(config(out))
        for one in (crew.Job("teacher", Path(out) / "teacher", {"epochs": 1}), job(out), job(out, of="tune")):
            assert team.one(one) == "tried"
    assert sorted(os.listdir("locks")) == ["runs-ce-0", "teacher", "tune-ce-0"]


def ends_with(monkeypatch, code, said=""):
    """The processes of runs end so."""

    class Child:
        def __init__(self, command, stdout, **_):
            stdout.write(said)
            self.wait, self.terminate = lambda: code, lambda: None

    monkeypatch.setattr(crew, "subprocess", SimpleNamespace(Popen=Child))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (-signal.SIGKILL, "killed by SIGKILL, often for lack of memory"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-signal.SIGINT, crew.STOPPED),
        (-signal.SIGTERM, crew.STOPPED),
        (130, crew.STOPPED),
        (2, "loss = nan"),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, monkeypatch, code, why):
    ends_with(monkeypatch, code, "epoch 1\nloss = nan\n")
    with crew.Crew(config(tmp_path)) as team:
        assert team.all([job(tmp_path)]) == [("ce-0", f"{why} (see '{tmp_path}/runs/ce-0.log')")]
        team.stopped = True  # then whatever it ended with
        assert team.start(job(tmp_path), 0).startswith(crew.STOPPED)


def test_a_run_that_says_nothing_is_told_by_its_code(tmp_path, monkeypatch):
    ends_with(monkeypatch, 3)
    with crew.Crew(config(tmp_path)) as team:
        assert team.all([job(tmp_path)])[0][1].startswith("it ended with code 3 (see ")


def test_a_trial_killed_for_memory_has_failed_and_one_that_is_stopped_has_not(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'spikedistill[tune]'")
    c, origin = config(tmp_path, tune=2, data="digits"), {"data": None, "teacher": None, "code": {}}
    for code, why in (
        (-signal.SIGKILL, "trial ce-1 failed: killed by SIGKILL"),
        (-signal.SIGTERM, "trial ce-0: it was"),
    ):
        ends_with(monkeypatch, code)
        with crew.Crew(c) as team, pytest.raises(SpecError, match=why):
            compare.tune(c, Row("ce", ("ce",)), team, origin)


def test_many_processes_in_one_that_takes_none_are_refused(tmp_path):
    assert crew.mistakes_of(config(tmp_path, jobs=0, devices=2)) == [
        "jobs: 0 runs in this process, which devices > 1 starts again: give --jobs 1"
    ]
    assert not crew.mistakes_of(config(tmp_path, devices=2)) and not crew.mistakes_of(config(tmp_path, jobs=0))


@pytest.mark.parametrize(
    ("jobs", "given", "threads"), [(0, None, 1), (1, None, 6), (4, None, 1), (2, None, 3), (2, "5", 1)]
)
def test_a_step_is_timed_with_the_threads_that_a_run_will_have(tmp_path, monkeypatch, jobs, given, threads):
    seen, images = [], (torch.rand(12, 1, 8, 8), torch.arange(12) % 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)  # this process was started with it, too
    monkeypatch.setattr(crew, "processors", lambda: 6)
    monkeypatch.setattr(estimate, "fit", lambda *_, **__: seen.append(torch.get_num_threads()))
    parts = {"data": from_tensors(*images, *images, batch_size=4), "student": None, "teacher": None}
    estimate.estimate(config(tmp_path, jobs=jobs), parts, Row("ce", ("ce",)), None)
    assert seen == [threads] * 2 and torch.get_num_threads() == 1
