"""Functions of your own files, named in text as `path/to/file.py:function`: models, data and methods."""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from spikedistill.spec import SpecError


def is_own(name: str) -> bool:
    """Whether a name is that of a function in a file, or of a file whose function is missing."""
    return ".py:" in name or name.endswith(".py")


def check(name: str, asked: Mapping[str, Any], skip: int = 0) -> list[str]:
    """What is wrong with the name and settings of a function, found without importing its file.

    skip: how many of its first parameters the caller fills in.
    """
    path, _, function = name.partition(".py:")
    path = path if name.endswith(".py") else f"{path}.py"
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except OSError as error:
        return [f"'{path}' cannot be read: {error.strerror or error}"]
    except (SyntaxError, ValueError) as error:
        return [f"'{path}' is not Python: {error}"]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    defined = {node.name: node for node in tree.body if isinstance(node, kinds)}
    has = f"it has {', '.join(defined)}" if defined else "it has none"
    if not function:
        return [f"'{path}' needs the name of a function, {path}:NAME; {has}"]
    bound = {a.asname or a.name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    bound |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    if function not in defined.keys() | bound:
        close = get_close_matches(function, defined, 1, 0.5)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return [f"'{path}' has no function '{function}': {hint}{has}"]
    node = defined.get(function)
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
        return []
    takes = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)][skip:]
    hint = f"it takes {', '.join(takes)}" if takes else "it takes none"
    return [f"{path}:{function}.{key}: no such setting; {hint}" for key in asked if key not in takes]


def imported(name: str) -> Callable[..., Any]:
    """The function that 'file.py:function' names. Its folder is put on the path, for what the file imports."""
    path, _, function = name.partition(".py:")
    file = Path(f"{path}.py").resolve()
    try:
        return getattr(_module(file, file.stat().st_mtime_ns), function)
    except Exception as error:
        raise SpecError([f"'{path}.py' cannot be imported: {type(error).__name__}: {error}"]) from error


@cache
def _module(file: Path, changed: int) -> ModuleType:
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(f"{file.stem}@{file.parent}", file)
    assert spec and spec.loader
    code = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


def line(name: str, error: Exception) -> str:
    """' (line 12)', where in the file of 'file.py:function' an error came from; empty where it did not."""
    file = str(Path(name.partition(".py:")[0] + ".py").resolve())
    lines = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f" (line {lines[-1]})" if lines else ""


def taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given settings that a function takes."""
    known = inspect.signature(function).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {k: v for k, v in given.items() if every or k in known}


def prints(names: Iterable[str | None]) -> dict[str, str]:
    """The files that texts name, each in 16 letters. What they import is not seen."""
    files = sorted({name.partition(".py:")[0] + ".py" for name in names if name and ".py:" in name})
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files if Path(file).is_file()}
