"""kill -9 in the middle of a recipe, and the same command again: what is finished is kept, the table is the same."""

import json
import os
import signal
import sys

import pytest
import torch

from spikedistill import cli
from tests.recipes.test_ckd_events import MODELS as CKD
from tests.recipes.test_ckd_events import QUICK as CKD_QUICK
from tests.recipes.test_distilling_spikes import MODELS as SPIKES
from tests.recipes.test_distilling_spikes import QUICK as SPIKES_QUICK
from tests.recipes.test_distilling_spikes import pictures as pictures
from tests.recipes.test_paired import small_sets as small_sets


def start(recipe, words, out):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", recipe, *words, "--out", str(out)])
    assert not stop.value.code


def killed(recipe, words, out, run):
    """The command in a process of its own, which gets SIGKILL as soon as `run` has written its first checkpoint."""
    sys.stdout.flush()
    if not (child := os.fork()):
        replace = os.replace

        def replace_and_die(source, target):
            replace(source, target)
            if str(target).endswith(os.path.join(run, "checkpoint.pt")):
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_and_die
        try:
            start(recipe, words, out)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def weights(out):
    """run -> bytes of its student, and when they were written."""
    files = {p.parent.name: p for p in out.glob("*/student.safetensors")}
    return {name: (p.read_bytes(), p.stat().st_mtime_ns) for name, p in files.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("recipe", "run", "before", "words"),
    [
        ("ckd_events", "static2dvs-0", {"teacher", "alone-0"}, [*CKD, *CKD_QUICK, "--no-control"]),
        (
            "distilling_spikes",
            "assistant-0",
            {"teacher", "stages0-0"},
            [*SPIKES, *SPIKES_QUICK, "--stages", "0,2", "--encode", "bernoulli"],
        ),
    ],
)
def test_kill_9_and_the_same_command_again(small_sets, pictures, tmp_path, recipe, run, before, words, capsys):
    words = ["2" if word == "1" else word for word in words] + ["--seeds", "0"]  # two epochs
    if recipe == "distilling_spikes":
        words += ["--data", pictures]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed(recipe, words, cut, run)
    finished = weights(cut)
    assert set(finished) == before and not (cut / f"{recipe}.json").exists()
    assert (cut / run / "checkpoint.pt").exists() and not (cut / run / "result.json").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(cut)])
    assert stop.value.code == 2 and f"it holds the runs {', '.join(sorted({*before, run}))}" in capsys.readouterr().err
    left = torch.load(cut / run / "checkpoint.pt", weights_only=True)["now"]
    assert left["epoch"] == 1

    start(recipe, words, cut)
    start(recipe, words, whole)
    a, b = weights(cut), weights(whole)
    assert {name: a[name] for name in before} == finished, "a finished run was repeated"
    epochs = [json.loads(line) for line in (cut / run / "metrics.jsonl").read_text().splitlines()]
    assert len(epochs) == 2 and epochs[:1] == left["history"], "the first epoch, which has its times, was repeated"
    assert a.keys() == b.keys() and all(a[name][0] == b[name][0] for name in a)
    rows = [json.loads((out / f"{recipe}.json").read_text())["rows"] for out in (cut, whole)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds"), row.pop("cpu_seconds")
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert (cut / "report.html").exists()
