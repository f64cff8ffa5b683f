"""The rules of the house: who imports whom, how large core is, what is never used."""

import ast
from pathlib import Path

import pytest

import spikedistill

ROOT = Path(spikedistill.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
METHOD_MAY = {
    "functional", "objectives", "spec", "neurons", "core.output", "core.step", "core.plan", "core.schedule",
    "core.taps",
}  # fmt: skip


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            name = (
                node.module
                if not node.level
                else ".".join(("spikedistill", *file.parent.relative_to(ROOT).parts, node.module))
            )
            found |= {f"{name}.{a.name}" for a in node.names} if name == "spikedistill" else {name}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {n.removeprefix("spikedistill.") for n in found if n.startswith("spikedistill.")}


def test_core_imports_nothing_of_ours():
    for file in (ROOT / "core").glob("*.py"):
        assert all(name.startswith("core.") for name in imports(file)), file.name


def test_methods_import_no_other_method():
    for file in (ROOT / "methods").glob("*.py"):
        if file.name != "__init__.py":
            wrong = {n for n in imports(file) if n not in METHOD_MAY and not n.startswith("neurons.")}
            assert not wrong, f"{file.name} imports {wrong}"


def test_nothing_imports_recipes():
    for file in FILES:
        if "recipes" not in file.parts and file.name not in ("cli.py", "__init__.py"):
            assert not {n for n in imports(file) if n.startswith("recipes")}, file.name


def test_core_stays_small_and_methods_stay_readable():
    lines = sum(len(f.read_text().splitlines()) for f in (ROOT / "core").glob("*.py"))
    assert lines <= 950
    for file in (ROOT / "methods").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 185, file.name


@pytest.mark.parametrize("word", ["import pickle", "pickle.load", "weights_only=False", "import tonic", "eval("])
def test_nothing_unpickles_or_runs_what_a_file_holds(word):
    for file in FILES:
        text = file.read_text().replace(".eval(", "").replace("literal_eval(", "")
        assert word not in text, file.name
