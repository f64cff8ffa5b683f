"""The process of a command: its output and its memory."""

import os
import platform
import subprocess
import sys

import pytest

from spikedistill import cli


def test_a_reader_that_has_enough_is_no_error():
    command = [sys.executable, "-m", "spikedistill.cli", "show", "sakd"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 141


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_is_reused():
    program = """
import resource, sys, torch
from spikedistill.cli import reuse_memory
if sys.argv[1] == "yes":
    reuse_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24), torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(how, **more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | more
        done = subprocess.run([sys.executable, "-c", program, how], env=environment, capture_output=True, check=True)
        return int(done.stdout)

    assert faults("yes") < 50 < faults("no")
    assert faults("yes", MALLOC_ARENA_MAX="1") > 50  # the user's own settings win


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "start", stop)
    with pytest.raises(SystemExit) as error:
        cli.main(["distill", "--method", "ce"])
    assert (
        error.value.code == 130
        and "stopped; the same command goes on from the last checkpoint" in capsys.readouterr().err
    )


COMMANDS = ("list", "show", "distill", "compare", "run", "report", "predict", "export", "bench", "cp")


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("command", [*COMMANDS, "run quickstart"])
def test_every_command_helps(command, word, capsys):
    try:
        cli.main([*command.split(), word])
    except SystemExit as done:
        assert not done.code
    shown = capsys.readouterr()
    assert not shown.err and len(shown.out.splitlines()) > 3
    if command in ("distill", "compare", "predict", "export", "bench", "run quickstart"):
        assert "--out" in shown.out


@pytest.mark.parametrize("kind", cli.KINDS)
def test_whatever_is_listed_can_be_shown(kind, capsys):
    cli.list_(kind)
    listed = capsys.readouterr().out
    for name in cli.catalogue(kind):
        assert name in listed
        cli.show(name)
        shown = capsys.readouterr().out
        assert shown.startswith(name)
        for setting in (
            cli.setting_rows(cli.things(kind)[name], cli.FILLED_IN.get(kind, 0))[1] if kind in cli.FLAGS else ()
        ):
            assert setting[0] in shown


def test_a_name_that_nothing_has(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["show", "unstructured_prunning"])
    assert done.value.code == 2 and "did you mean 'unstructured_pruning'?" in capsys.readouterr().err
