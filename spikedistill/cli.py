"""The command line. Top-level help imports no torch; a command imports what it needs."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args

from cyclopts import App, Parameter

from spikedistill.own import is_own
from spikedistill.spec import SpecError, near

app = App(
    name="spikedistill",
    help="Train spiking neural networks by knowledge distillation.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `guarded` says how to go on
)
Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Word = Annotated[str, Parameter(allow_leading_hyphen=True)]  # so that `spikedistill export --help` is a word of ours

Kind = Literal["methods", "models", "data", "recipes", "transforms", "optimizers"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@app.command(name="list")
def list_(kind: Kind | None = None, *, markdown: bool = False) -> None:
    """List methods, models, data, recipes, transforms or optimizers, a line each; all of them where none is named.

    Parameters
    ----------
    kind
        Which of them.
    markdown
        Methods as the table of docs/methods.md: what each needs, and what it goes with.
    """
    if markdown:
        if kind != "methods":
            raise SpecError(["--markdown is for methods: spikedistill list methods --markdown"])
        from spikedistill.catalogue import page

        return print(page(), end="")
    for name in [kind] if kind else KINDS:
        heads = ["name", "paper", "evidence", "what it is"] if name == "methods" else ["name", "what it is"]
        entries = catalogue(name).items()
        show_table(name, heads, [(n, *(_paper(n) if name == "methods" else ()), text) for n, text in entries])


def _paper(method: str) -> tuple[str, str]:
    """Authors, year and the paper's address as short as the field writes it; evidence level."""
    from spikedistill.catalogue import card

    about = card(things("methods")[method])
    paper = about.paper.replace("https://arxiv.org/abs/", "arXiv:")
    paper = paper.replace("https://openreview.net/forum?id=", "openreview:")
    return paper.replace(",", f" {about.year},", 1), about.evidence


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: only words of the last column are ever cut, and a file or pipe gets a line a row."""
    from rich.markup import escape
    from rich.table import Table

    from spikedistill.report.tables import console

    table = Table(title=escape(title), box=None, padding=(0, 2, 0, 0), title_justify="left")
    for column in list(zip(heads, *rows))[:-1]:
        table.add_column(escape(column[0]), min_width=max(len(word) for cell in column for word in cell.split()))
    table.add_column(heads[-1], overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def catalogue(kind: str) -> dict[str, str]:
    """Name -> one line."""
    if kind == "data":
        from spikedistill import data

        return data.names()
    return {name: first_line(kind, function) for name, function in things(kind).items()}


def things(kind: str) -> dict[str, Callable]:
    """Name -> builder, of methods, models, recipes, transforms or optimizers."""
    if kind == "methods":
        from spikedistill.methods import METHODS

        return METHODS
    if kind == "models":
        from spikedistill.models import MODELS

        return MODELS
    if kind == "transforms":
        from spikedistill.transforms import TRANSFORMS

        return {name: function for name, function in TRANSFORMS.items() if name != "merge"}  # which comes by itself
    if kind == "optimizers":
        from spikedistill.optim import OPTIMIZERS

        return OPTIMIZERS
    from spikedistill.recipes import RECIPES

    return {name: module.run for name, module in RECIPES.items()}


def first_line(kind: str, function: Callable) -> str:
    """The title of the file for methods and recipes, of the function for the others."""
    of_file = kind in ("methods", "recipes")
    text = sys.modules[function.__module__].__doc__ if of_file else function.__doc__
    return (text or "").strip().splitlines()[0].partition(".  ")[0]  # of a function, what follows are its settings


@app.command
def show(name: str) -> None:
    """Show what something that `spikedistill list` has is, its paper, and its settings with defaults and meaning."""
    kind = next((kind for kind in KINDS if name in catalogue(kind)), None)
    if kind is None:
        every = [entry for kind in KINDS for entry in catalogue(kind)]
        raise SpecError([f"'{name}' is none of {', '.join(KINDS)}; {near(name, every)}"])
    if kind == "data":
        return print(f"{name}: {catalogue(kind)[name]}")
    function = things(kind)[name]
    module: Any = sys.modules[function.__module__]
    print(f"{name} ({kind[:-1]})\n")
    if kind in ("models", "transforms", "optimizers"):
        print(first_line(kind, function), "\n")
    about = sys.modules["spikedistill.optim.stds"] if "stds" in name else None if kind == "optimizers" else module
    if about is not None and about.__doc__:
        print(about.__doc__.strip(), "\n")
    if kind == "recipes":
        table_of(*config_rows(module.Config))
    else:
        table_of(*setting_rows(function, skip=FILLED_IN.get(kind, 0)))
    if kind in FLAGS:
        print(f'\n--{FLAGS[kind]} "{name}(SETTING=VALUE, ...)"')
    if kind == "methods":
        from spikedistill.catalogue import ours

        for line in ours(name):
            print(f"\nours, {line}")


FILLED_IN = {"methods": 2, "transforms": 1, "optimizers": 4}  # parameters of a builder that the caller knows
FLAGS = {"methods": "method", "models": "student", "transforms": "transform", "optimizers": "optimizer"}


def setting_rows(function: Callable, skip: int) -> tuple[str, list[tuple[str, str, str, str]]]:
    """Title and rows (name, type, default, meaning) of a builder's settings, the meaning from its docstring."""
    import re
    from inspect import Parameter as P
    from typing import get_type_hints

    from spikedistill.spec import settings, type_name

    text = re.sub(r"\s+", " ", function.__doc__ or "")
    names = settings(function, skip)
    other = rf"(?:(?:{'|'.join(settings(function))})(?:, )?)+: "
    hints = get_type_hints(function, include_extras=True)
    rows = []
    for name, p in names.items():
        # "name: meaning." up to the next "other: ", also where several share one meaning, "a, b: meaning."
        found = re.search(rf"(?:^|[\s,]){name}(?:, \w+)*: (.*?)(?= {other}| Raises |$)", text)
        meaning = found.group(1).strip() if found else ""
        default = "required" if p.default is P.empty else repr(p.default)
        rows.append((name, type_name(hints.get(name, Any)), default, meaning))
    return "settings", rows


def config_rows(config: Any) -> tuple[str, list[tuple[str, str, str]]]:
    """Title and rows (flag, default, meaning with what is allowed) of a recipe's flags."""
    import re

    rows = []
    for name, f in config.model_fields.items():
        if f.exclude:
            continue
        signs = re.findall(r"(Gt|Ge|Lt|Le)\(\w+=([\d.]+)\)", f"{f.metadata} {f.annotation}")
        limits = [f"{dict(Gt='>', Ge='>=', Lt='<', Le='<=')[sign]} {value}" for sign, value in signs]
        if words := re.search(r"Literal\[([^]]*)\]", str(f.annotation)):
            limits = [words.group(1).replace("'", "")]
        allowed = f" ({', '.join(limits)})" if limits else ""
        rows.append((f"--{name.replace('_', '-')}", _shown(f.default), (f.description or "") + allowed))
    return "flags", rows


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, list):
        return ",".join(map(str, default)) or "none"
    words = {"None": "none", "True": "yes", "False": "no", "PydanticUndefined": "required", "{}": "none"}
    return words.get(str(default), str(default))


def table_of(title: str, rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        print("It has no settings.")
        return
    heads = ("default", "meaning") if len(rows[0]) == 3 else ("type", "default", "meaning")
    show_table("", [title[:-1], *heads], rows)


@app.command(help_flags=[])
def distill(*tokens: Tokens) -> None:
    """Train a student on your data, from your teacher, by one or more methods (`spikedistill distill --help`)."""
    start("distill", tokens)


@app.command(help_flags=[])
def bench(*tokens: Tokens) -> None:
    """Time training and inference here and in other libraries (`spikedistill bench --help`)."""
    start("bench", tokens)


@app.command(help_flags=[])
def compare(*tokens: Tokens) -> None:
    """Compare methods: same student, teacher, data and budget, paired seeds (`spikedistill compare --help`)."""
    start("compare", tokens)


@app.command(help_flags=[])
def run(recipe: Word = "", *tokens: Tokens) -> None:
    """Run a recipe: `spikedistill run quickstart`; its flags: `spikedistill run quickstart --help`."""
    from spikedistill.recipes import RECIPES

    if recipe in ("", "--help", "-h"):
        print("usage: spikedistill run RECIPE [--FLAG VALUE ...]\n")
        return list_("recipes")
    if recipe not in RECIPES:
        raise SpecError([f"recipe '{recipe}' is unknown; {near(recipe, RECIPES)}"])
    start(recipe, tokens)


@app.command(help_flags=[])
def export(run: Word = "", *tokens: Tokens) -> None:
    """Write a trained student as NIR, ONNX or torch.export and check the file (`spikedistill export --help`)."""
    on_run("export", run, tokens)


@app.command(help_flags=[])
def predict(run: Word = "", *tokens: Tokens) -> None:
    """Classify images or a test set with a trained student (`spikedistill predict --help`)."""
    on_run("predict", run, tokens)


def on_run(recipe: str | ModuleType, run: str, tokens: Sequence[str]) -> None:
    """Start a recipe whose first word is a run folder: `spikedistill export RUN --to nir`."""
    if run in ("", "--help", "-h"):
        program = f"spikedistill {recipe}" if isinstance(recipe, str) else sys.argv[0]
        print(f"usage: {program} RUN [--FLAG VALUE ...]\n")
        return start(recipe, ["--help"])
    words: list[Any] = [*tokens]
    if "--files" in words:  # takes as many as follow
        first = words.index("--files") + 1
        last = next((i for i in range(first, len(words)) if _is_flag(words[i])), len(words))
        words[first - 1 : last] = [] if first == last else ["--files", words[first:last]]
    start(recipe, [run, *words] if run.startswith("-") else ["--run", run, *words])


def start(recipe: str | ModuleType, tokens: Sequence[Any]) -> None:
    """Parse flags into the config of a recipe, a name or a module, report every mistake at once, and run it."""
    from spikedistill.recipes import RECIPES
    from spikedistill.recipes.distill import read

    module: Any = RECIPES[recipe] if isinstance(recipe, str) else recipe
    if "--help" in tokens or "-h" in tokens:
        print((module.__doc__ or "").strip(), "\n")
        print("  --config FILE takes the same settings from TOML, YAML or JSON; flags win over it.")
        print("  What a text such as bkd(blur=0.4) sets is changed in that text.\n")
        return table_of(*config_rows(module.Config))
    settings, mistakes = flags(tokens)
    if "config" in settings:
        from_file, wrong = config_file(settings.pop("config"))
        settings, mistakes = over(from_file, settings), mistakes + wrong
    c, wrong = read(settings, module.Config)
    mistakes += wrong
    if c is not None and hasattr(module, "check"):
        mistakes += module.check(c)[1]
    if mistakes:
        raise SpecError(mistakes)
    reuse_memory()
    result = module.run(c)
    if isinstance(result, dict) and "train_seconds" in result:  # of one training
        report(result)


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins, key by key in sections, too."""
    inner = {k: over(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return below | above | inner


def reuse_memory() -> None:
    """Have glibc keep large blocks that are freed, which it else gives back, so that the next comes in new pages.

    For the process of a command alone; MALLOC_... and GLIBC_TUNABLES in the environment win.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays


def flags(tokens: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """--a 1 --b.c=2 --on --no-off -> {"a": "1", "b": {"c": "2"}, "on": True, "off": False}, and mistakes."""
    settings: dict[str, Any] = {}
    mistakes, rest = [], list(tokens)
    while rest:
        token = str(rest.pop(0))
        if not token.startswith("--"):
            mistakes.append(f"'{token}': expected a flag such as --{token.lstrip('-') or 'data'} VALUE")
            continue
        name, equals, value = token[2:].partition("=")
        if not equals and rest and not _is_flag(rest[0]):
            value, equals = rest.pop(0), "="
        key = name.replace("-", "_")
        setting: Any = value
        if not equals:
            key, setting = (key[3:], False) if key.startswith("no_") else (key, True)
        *path, last = key.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                mistakes.append(f"--{name}: '{part}' has a value already")
                place = {}
        if last in place:
            mistakes.append(f"--{name} is given twice")
        place[last] = setting
    return settings, mistakes


def _is_flag(token: Any) -> bool:
    return isinstance(token, str) and token.startswith("--") and len(token) > 2


def config_file(name: Any) -> tuple[dict[str, Any], list[str]]:
    """The settings in a TOML, YAML or JSON file, or a run folder's, and mistakes."""
    path = Path(str(name))
    of_run = path.is_dir()
    path = path / "config.json" if of_run else path
    try:
        text = path.read_text()
        if path.suffix == ".toml":
            import tomllib

            content = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            return {}, [f"config: '{path}' should end in .toml, .yaml or .json"]
    except OSError as error:
        return {}, [f"config: cannot read '{path}': {error.strerror}"]
    except Exception as error:
        return {}, [f"config: '{path}' is not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return {}, [f"config: '{path}' should hold settings by name, it holds a {type(content).__name__}"]
    settings = {k if is_own(k) else k.replace("-", "_"): v for k, v in zip(map(str, content), content.values())}
    if of_run:
        settings.pop("overwrite", None)  # it was for the command that made the run, and earlier versions kept it
    return settings, []


def report(result: dict[str, Any]) -> None:
    """The result of one run, in a few lines."""
    valid, (name, test) = result.get("valid"), next((k, result[k]) for k in ("test", "valid") if k in result)
    held_out = f"  (valid {valid['accuracy']:.2%})" if valid and name == "test" else ""
    print(f"{name + ' accuracy':<20}{test['accuracy']:.2%} of {test['samples']:,}{held_out}")
    if len(test["by_step"]) > 1:
        print("at each time step   " + "  ".join(f"{a:.2%}" for a in test["by_step"]))
    if act := result.get("activity"):
        if act["rate"] is not None:
            print(f"firing rate         {act['rate']:.4f} spikes per neuron and step")
        ops = act["operations"]
        ac, mac = ops["ac"] / 1e6, ops["mac"] / 1e6
        print(f"operations          {ac:.2f} M additions, {mac:.2f} M multiplications an image")
    print(f"parameters          {result['parameters']['student']:,}")
    print(f"training            {result['train_seconds']:.0f} s, {result['precision']} on {result['device']}")
    print(f"student             {Path(result['out']) / 'student.safetensors'}")


@app.command(name="report")
def report_(path: Path, *, out: Path | None = None, figures: Path | None = None, trust_code: bool = False) -> None:
    """Write one HTML file about a run, a comparison or a recipe.

    Parameters
    ----------
    path
        A run folder, or the folder of a comparison or of a recipe.
    out
        The file to write, by default report.html in that folder.
    figures
        A folder for each figure as SVG and PDF; pictures that a recipe drew are SVG alone.
    trust_code
        Import the file.py that built the student, teacher or data.
    """
    from spikedistill.report import page

    print(page.write(path, out, figures, trust_code))


@app.command
def cp(recipe: str, target: Path | None = None) -> None:
    """Copy a recipe's file into your folder, to change it and run it with python.

    Parameters
    ----------
    recipe
        One of `spikedistill list recipes`.
    target
        The folder, or the name of the file; by default this folder.
    """
    from spikedistill.recipes import RECIPES

    if recipe not in RECIPES:
        raise SpecError([f"recipe '{recipe}' is unknown; {near(recipe, RECIPES)}"])
    source = Path(str(RECIPES[recipe].__file__))
    target = target or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SpecError([f"'{target}' exists and is not overwritten"])
    try:
        target.write_text(source.read_text())
    except OSError as error:
        raise SpecError([f"cannot write '{target}': {error.strerror}"]) from None
    print(f"{target}: run it with  python {target} --help")


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 2 and a sentence a mistake for what the user can mend."""
    guarded(partial(app, tokens), sys.argv if tokens is None else tokens)


def script(name: str) -> None:
    """Run a file of recipes/, or somebody's copy of one, as a program: `script(__name__)` at its end."""
    recipe, words = sys.modules[name], sys.argv[1:]
    if "run" in recipe.Config.model_fields:
        return guarded(partial(on_run, recipe, "".join(words[:1]), words[1:]), words)
    guarded(partial(start, recipe, words), words)


def guarded(work: Callable[[], object], words: Sequence[str]) -> None:
    """Do the work that these words ask for, and say what went wrong as a sentence."""
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough, as `| head` has; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except SpecError as error:
        fail(error.mistakes)
    except KeyboardInterrupt:
        again = "without --overwrite the" if "--overwrite" in words else "the"
        print(f"\nstopped; {again} same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "Mismatch":
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        # errors of ours that a user can act on, looked up by name so that nothing heavy is imported for this
        if type(error).__name__ in ("TrainingError", "DataError", "MissingData", "TapError"):
            fail([str(error)])
        if isinstance(error, OSError) and error.filename is not None:  # a folder that is read-only, a disk that is full
            fail([f"'{error.filename}': {error.strerror}"])
        raise


def fail(mistakes: Sequence[str]) -> None:
    many = f"{len(mistakes)} mistakes:\n" if len(mistakes) > 1 else ""
    print(f"error: {many}" + "\n".join(f"  {m}" if many else m for m in mistakes), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
