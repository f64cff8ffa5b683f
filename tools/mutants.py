"""Small faults put into a method's formula, and whether its tests notice:

    python tools/mutants.py bkd tks transforms/tt_snn objectives

A mutant is one change of text, such as a sum for a mean or a detach left out. Each is made alone in a temporary copy of
the package, and `tests/methods/test_NAME.py` runs against it, `tests/FOLDER/test_NAME.py` for FOLDER/NAME, or, for
`functional` and `objectives`, the tests of all methods. A mutant that survives means the same as the original, or shows
what no test looks at.
"""

import ast
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

import lightning_fabric  # noqa: F401, what the tests import, so that a fork has it
import pytest
import torch

ROOT = Path(__file__).parent.parent
SECONDS = 120  # a test file that takes longer has noticed
QUICK = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception")  # the last collects garbage for a second
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # of no use here, and slow to import

RULES = (  # name, pattern, what takes its place
    ("mean -> sum", r"\.mean\(", ".sum("),
    ("sum -> mean", r"\.sum\(", ".mean("),
    ("batchmean -> mean", r'"batchmean"', '"mean"'),
    ("rate -> sum over time", r"\brate\(", "(lambda x: x.sum(0))("),
    ("tau^2 lost", r"\b(self\.)?(tau|temperature)\*\*2", "1.0"),
    ("tau lost", r" / (self\.)?(tau|temperature|tau_student|tau_teacher)\b", ""),
    ("detach lost", r"\.detach\(\)", ""),
    ("KL swapped", r"\bkl_div\((\w+), (\w+)", r"kl_div(\2, \1"),
    ("arguments swapped", r"(?<!def )\b(\w+_loss|kd_per_step|similarity)\((\w+), (\w+)([,)])", r"\1(\3, \2\4"),
    ("axis -1 -> 0", r"\.(mean|sum|amax|argmax|softmax|log_softmax)\(-1", r".\1(0"),
    ("axis -1 -> 0", r"softmax\((.+?), -1\)", r"softmax(\1, 0)"),
    ("axis 0 -> 1", r"\.(mean|sum|any|argmax|argmin)\(0", r".\1(1"),
    ("axis 1 -> 0", r"\.(mean|sum|softmax|log_softmax)\(1\)", r".\1(0)"),
    ("step too late", r"\[1:\]", "[2:]"),
    ("step too early", r"\[:-1\]", "[:-2]"),
    ("step too early", r"range\((\w+)\)", r"range(\1 - 1)"),
    ("minus -> plus", r"(?<=[\w\])]) - (?=[\w(])", " + "),
    ("plus -> minus", r"(?<=[\w\])]) \+ (?=[\w(])", " - "),
    ("product -> sum", r"(?<=[\w\])]) \* (?=[\w(])", " + "),
    ("sign", r"(?<=[ (])-(?=\(|F\.|torch|log)", ""),
    ("square -> abs", r"\.square\(\)", ".abs()"),
    ("clamp lost", r"\.clamp_min\([^()]*\)", ""),
    ("< -> >=", r" < ", " >= "),
    ("> -> <=", r" > ", " <= "),
    ("== -> !=", r" == ", " != "),
    ("min -> max", r"\bminimum\(", "maximum("),
    ("max -> min", r"\b(argmax|amax)\(", lambda found: {"argmax": "argmin(", "amax": "amin("}[found[1]]),
)


def prose(source: str) -> list[tuple[int, int]]:
    """Where strings and comments are: first and last position of each."""
    starts = [0, *(m.end() for m in re.finditer("\n", source))]
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.JoinedStr | ast.Constant)]
    texts = [n for n in nodes if isinstance(n, ast.JoinedStr) or isinstance(n.value, str)]
    spans = [(n.lineno, n.col_offset, n.end_lineno or 0, n.end_col_offset or 0) for n in texts]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    spans += [(*token.start, *token.end) for token in tokens if token.type == tokenize.COMMENT]
    return [(starts[a - 1] + b, starts[c - 1] + d) for a, b, c, d in spans]


def mutants(source: str) -> Iterator[tuple[str, int, str]]:
    """Name, line number and text of every mutant that is still Python."""
    kept = prose(source)
    for name, pattern, new in RULES:
        for found in re.finditer(pattern, source):
            text = source[: found.start()] + found.expand(new) + source[found.end() :] if isinstance(new, str) else None
            text = text or source[: found.start()] + new(found) + source[found.end() :]
            if text == source or any(first < found.start() < last for first, last in kept):
                continue
            try:
                compile(text, name, "exec")
            except SyntaxError:
                continue
            yield name, source.count("\n", 0, found.start()) + 1, text


def places(name: str) -> tuple[str, list[str]]:
    """The file of a name in the package, and its tests."""
    if name in ("functional", "objectives"):
        return f"{name}.py", ["tests/test_functional.py", "tests/methods"]
    folder, stem = name.split("/") if "/" in name else ("methods", name)
    return f"{folder}/{stem}.py", [f"tests/{folder}/test_{stem}.py"]


def passes(folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass on the copy of the package in `folder`; in a process of its own."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            sys.dont_write_bytecode = True
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
                code = int(pytest.main([*QUICK, *tests]))
        finally:
            os._exit(code)
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def survivors(method: str) -> int:
    """Try every mutant of a method, print what became of each, and return how many survived."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("spikedistill", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        path, tests = places(method)
        file = folder / "spikedistill" / path
        source = file.read_text()
        if not passes(folder, tests):
            sys.exit(f"{method}: its tests fail without any change")
        lines, tried, left = source.splitlines(), 0, 0
        for rule, line, text in mutants(source):
            file.write_text(text)
            caught = not passes(folder, tests)
            tried, left = tried + 1, left + (not caught)
            what = "caught  " if caught else "SURVIVED"
            print(f"{what}  {rule:22} {line:4}  {lines[line - 1].strip()[:90]}", flush=True)
    print(f"{method}: {tried} mutants, {tried - left} caught, {left} survived", flush=True)
    return left


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not sys.argv[1:]:
        sys.exit(__doc__)
    sys.exit(1 if sum(survivors(method) for method in sys.argv[1:]) else 0)
