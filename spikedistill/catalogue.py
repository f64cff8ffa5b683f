"""What the methods are, read from their files and from the plans they make: for `list`, `show` and docs/methods.md."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path

import torch

from spikedistill.core.fit import Passes, Stage, Trainee
from spikedistill.core.output import Output
from spikedistill.core.plan import Plan, merge
from spikedistill.core.schedule import at
from spikedistill.core.step import Step
from spikedistill.methods import METHODS
from spikedistill.models.small import small
from spikedistill.neurons import Neuron
from spikedistill.objectives import CE
from spikedistill.report.comparison import points

RESULTS = Path(__file__).parent.parent / "results"  # of a checkout; an installed package has none
SETTINGS = {"hsd": {"init": "none"}}  # the teacher here is not the quantised ANN that its default needs
PAGE = """# Methods

Made by `spikedistill list methods --markdown > docs/methods.md`; do not edit it. `spikedistill show METHOD` has the
formula, the reference and the settings.

Every plan is built with default settings for `small(classes=10)` as student and its ANN twin as teacher.

- **evidence** code: read in the authors' code. partly: structure known, some constants ours. paper text: no code was
  published. reconstruction: in the style of the paper, of which only an abstract or notes could be read.
- **teacher** needed, used if there is one, or none. **further passes** other forward passes in a step of training.
- **taps** what is read beside the logits. **time** "per step" where a term sees more of the student than
  means over time.
- **extra** parameters that exist in training only. **merges with** other methods by default settings, each with the
  balance of labels to its own terms that it has alone. Left out are those that show teacher or student other data
  (`ckd`, `hsd`, `static2dvs` beside `ckd`), and labels that fade (`tks`; with `static=yes` it merges).
- **cost** of a step of training against `ce`, in brackets with a cached teacher, as `spikedistill bench` measured it
  (results/speed/speed.md); empty where it did not.

"""


@dataclass(frozen=True)
class Card:
    """title: the first line.  year and paper: "" where there is none.  evidence: code, partly, reconstruction, ..."""

    title: str
    year: str
    paper: str
    evidence: str


def card(build: Callable) -> Card:
    """What the docstring of a method's file says."""
    text = sys.modules[build.__module__].__doc__ or ""
    reference = " ".join("".join(re.findall(r"^Reference: (.*?)^Evidence:", text, re.M | re.S)).split())
    evidence = re.findall(r"^Evidence: (code|partly|paper text|reconstruction)", text, re.M)
    found = re.match(r"(.*?)(https?://\S+?)[.,;]?(\s|$)", reference)
    authors, address = found.group(1, 2) if found else ("", "")
    year = "".join(re.findall(r"\b(?:19|20)\d\d\b", authors)[:1])
    first = re.split(r",| et al| \d", authors)[0]
    paper = f"{first} et al., {address}" if address else ""
    return Card(text.strip().splitlines()[0], year, paper, "".join(evidence[:1]))


def tables() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Title and rows of every Markdown table in our results."""
    for file in sorted(RESULTS.rglob("*.md")):
        for block in re.split(r"\n\s*\n", file.read_text()):
            lines = [line.strip(" |").split("|") for line in block.splitlines() if line.startswith("|")]
            heads, *rows = [[cell.strip() for cell in line] for line in lines] or [[]]
            if len(rows) > 1:
                yield file.parent.name, [dict(zip(heads, row)) for row in rows[1:]]


def ours(name: str) -> Iterator[str]:
    """What our comparisons say of a method alone, with the settings that it had, a sentence each."""
    for file in sorted(RESULTS.glob("*/compare.json")):
        made = json.loads(file.read_text())
        for row in made["rows"]:
            own = row["settings"]
            if own["methods"] != [name] or own.keys() - {"name", "methods", "lr", name}:
                continue
            given = ", ".join(f"{k}={v}" for k, v in own.get(name, {}).items())
            text = f"{file.parent.name}: {name}({given}), lr {own['lr']:g}, {row['accuracy']:.2%} on test"
            if "difference" in row:
                d = row["difference"]
                text += f", {points(d['mean'])} over {made['baseline']}"
                text += f" [{points(d['low'])}, {points(d['high'])}]" if d["low"] is not None else ""
            yield f"{text}; {made['title']}"


def cost(name: str) -> str:
    """Of a training step against that of ce, in brackets with the teacher cached; empty where it was not measured."""
    for _, rows in tables():
        for row in rows:
            if row.get("cost") and next(iter(row.values())).strip("`* ") == name:
                return row["cost"] + (f" ({cached})" if (cached := row.get("cost, cached")) else "")
    return ""


def plans() -> dict[str, Plan]:
    """The plan of every method, for one student and one teacher."""
    torch.manual_seed(0)
    student, teacher = small(classes=10), small(classes=10, neuron="relu")
    order = sorted(METHODS, key=lambda name: name == "joint_a_snn")  # last, it rewrites the student
    made = {name: METHODS[name](student, teacher, **SETTINGS.get(name, {})) for name in order}
    return {name: made[name] for name in METHODS}


def sees_steps(plan: Plan) -> bool:
    """Whether a term beside the labels changes where the entries of outputs and taps change places in time."""
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    trainee = Trainee(Stage([], **vars(plan)))
    batch = plan.prepare({"x": x, "y": y, "source": x, "rgb": x}, 0.25)
    passes = dict(Passes(trainee, batch))

    def drawn(z: torch.Tensor) -> torch.Tensor:
        return 3 * torch.randn_like(z) if len(z) > 1 else z

    def moved(z: torch.Tensor) -> torch.Tensor:
        return z.gather(0, torch.rand(z.shape).argsort(0))

    def changed(by: Callable, out: Output) -> Output:
        return Output(by(out.logits), {tap: by(z) for tap, z in out.taps.items()})

    def value(passes: dict[str, Output]) -> torch.Tensor:
        torch.manual_seed(0)
        terms = [(at(w, 0.25), o) for w, o in plan.loss.values() if not isinstance(o, CE)]
        return torch.stack([torch.zeros(()), *(w * o(Step(batch, passes, 0.25)) for w, o in terms if w)])

    with torch.no_grad():
        passes = {name: changed(drawn, out) for name, out in passes.items()}
        other = {name: changed(moved, out) for name, out in passes.items()}
        return not torch.allclose(value(passes), value(other), rtol=1e-4, atol=1e-5)


def merges_with(name: str, made: dict[str, Plan]) -> str:
    """The other methods that a plan merges with, in either order."""
    good, bad, x = [], [], torch.rand(4, 1, 28, 28)
    batch = {"x": x, "y": torch.arange(4), "source": x, "rgb": x}
    for other in made.keys() - {name}:
        try:
            for pair in ((name, other), (other, name)):
                merge(*(made[each] for each in pair)).prepare(batch, 0.25)
            good.append(other)
        except ValueError:  # MergeError, or streams that both would replace
            bad.append(other)
    if len(good) < len(bad):
        return ", ".join(sorted(good)) or "none"
    return f"all but {', '.join(sorted(bad))}" if bad else "all"


def row(name: str, made: dict[str, Plan]) -> list[str]:
    """The cells of one method."""
    plan, about = made[name], card(METHODS[name])
    student = plan.passes["student"].model
    trainee = Trainee(Stage([], **vars(plan)))
    needed = [*signature(METHODS[name]).parameters.values()][1].default is Parameter.empty
    teacher = "needed" if needed else "used" if "teacher" in plan.passes else "none"
    neurons = {n for n, m in student.named_modules() if isinstance(m, Neuron)}
    taps = [
        f"{who}: {'every neuron' if len(t) > 1 and {*t} == neurons else ', '.join(t)}"
        for who, t in trainee.taps.items()
        if t
    ]
    extra = sum(p.numel() for p in trainee.objectives.parameters())
    further = ", ".join(p for p in plan.passes if p not in ("student", "teacher"))
    time = "per step" if sees_steps(plan) else "mean"
    cells = [about.year, about.paper, about.evidence, teacher, further, "; ".join(taps), time]
    return [f"`{name}`", *cells, f"{extra:,}" if extra else "", merges_with(name, made), cost(name)]


def page() -> str:
    """docs/methods.md."""
    heads = ["method", "year", "paper", "evidence", "teacher", "further passes"]
    heads += ["taps", "time", "extra", "merges with", "cost"]
    made = plans()
    lines = [heads, ["---"] * len(heads), *(row(name, made) for name in made)]
    return PAGE + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
