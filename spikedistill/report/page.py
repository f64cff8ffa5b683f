"""A run, a comparison or a recipe as one HTML file: nothing else is needed to read it, on a screen or on paper."""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill import data as data_sets
from spikedistill import models, own, runs
from spikedistill.core.taps import TapError, infer
from spikedistill.data.splits import SomeFrames
from spikedistill.inference import takes_steps
from spikedistill.origin import changed, fingerprint, teacher_print
from spikedistill.report import comparison, energy, figures, streams
from spikedistill.report.activity import activity, spread
from spikedistill.report.tables import Table
from spikedistill.spec import SpecError
from spikedistill.transforms.tt_snn import needs_all_steps

SHOWN = 3  # samples in a raster, and of each kind of disagreement
RIGHT = ("teacher", "student", "neither")  # who may be, where teacher and student differ
PATIENCE = 10  # seconds between two words on how far it is


@dataclass
class Section:
    """A part of the page. figures: name -> (matplotlib Figure or a file of SVG, caption)."""

    title: str
    figures: dict[str, tuple[Any, str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def drawn(self) -> list[tuple[str, str, str]]:
        return [
            (name, figures.embedded(figure) if isinstance(figure, Path) else figures.inline(figure, name), caption)
            for name, (figure, caption) in self.figures.items()
        ]


def write(
    path: str | Path, out: str | Path | None = None, figures_to: str | Path | None = None, trust_code: bool = False
) -> Path:
    """Write the report of a folder of a run, comparison or recipe, as `report.html` in it or `out`; returns its path.

    figures_to: a folder for each figure as SVG and PDF, and pictures that a recipe drew as the SVG they are.
    trust_code: as for `load`.
    Raises SpecError for a folder that holds none of these, a run that is not finished, or a file in the way that is not
    a report.
    """
    path = Path(path)
    if (path / "compare.json").exists():
        page = of_compare(path)
    elif not (path / "config.json").exists() and (recipe := recipe_of(path)):
        page = of_recipe(path, recipe)
    else:
        page = of_run(path, trust_code)
    out = Path(out) if out else path / "report.html"
    if out.is_dir():
        out = out / "report.html"
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise SpecError([f"'{out}' is not a report of ours and is not overwritten: choose another --out"])
    if figures_to:
        folder = Path(figures_to)
        folder.mkdir(parents=True, exist_ok=True)
        for section in page["sections"]:
            for name, (figure, _) in section.figures.items():
                if isinstance(figure, Path):
                    shutil.copyfile(figure, folder / f"{name}.svg")
                else:
                    figures.save(figure, folder, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(page), encoding="utf-8", errors="replace")  # names of folders may be no text
    return out


MARK = "Made by spikedistill"


def render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("page.html").render(**page)


# A run


def of_run(folder: Path, trust_code: bool = False) -> dict[str, Any]:
    """What the page of a run shows."""
    if not (folder / "config.json").exists():
        started = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = "it holds no config.json, no compare.json and no table of a recipe"
        if started:
            hint = f"where it is of a recipe, that has not ended; it holds the runs {', '.join(started)}"
        raise SpecError([f"'{folder}' is no run folder, no comparison and no recipe: {hint}"])
    if not (folder / "result.json").exists():
        raise SpecError([f"'{folder}': the run is not finished, so there is nothing to report yet"])
    config, result, machine = (runs.read_json(folder / f"{n}.json") for n in ("config", "result", "machine"))
    name, test = ("test", result["test"]) if "test" in result else ("validation", result.get("valid"))
    by_step, act = test["by_step"] if test else [], result.get("activity") or {}
    learned = figures.curves(history(folder / "metrics.jsonl"), result["best_epoch"])
    sections, missing, seen, teacher_accuracy = [Section("Training", {"curves": (learned, "")})], [], None, None
    try:
        seen = look(folder, config, result, trust_code)
        teacher_accuracy = seen["teacher_accuracy"]
    except (SpecError, data_sets.DataError, OSError) as error:
        missing.append(f"Without rasters, confusion and disagreements: {' '.join(str(error).split())}")
    if len(by_step) > 1:
        caption = f"Mean output of the first t of {len(by_step)} steps, on {test['samples']:,} samples of {name}."
        if seen and seen["frames"]:
            caption += f" The student sees frames {said(seen['frames'])} of a recording, counted from 0."
        at = {"accuracy_by_step": (figures.steps({"student": by_step}, teacher_accuracy, name), caption)}
        sections.append(Section("Accuracy at every time step", at))
    if seen:
        sections += sections_of(seen)
        missing += seen["without"]
    sections += [Section("Settings", facts=[(k, said(v)) for k, v in config.items()]), origin(machine, result)]
    tiles = [(f"{test['accuracy']:.2%}", f"{name} accuracy, {test['samples']:,} samples")] if test else []
    if teacher_accuracy is not None:
        tiles.append((f"{teacher_accuracy:.2%}", "teacher, the same samples"))
    elif result.get("teacher_accuracy") is not None:
        of = f"teacher, {seen['teacher_sees'] if seen else ''}validation"
        tiles.append((f"{result['teacher_accuracy']:.2%}", of))
    if act.get("rate") is not None:
        tiles.append((f"{act['rate']:.3f}", "spikes per neuron and step"))
    if act:
        additions = act["operations"]["ac"]
        value, what = (additions, "synaptic additions") if additions else (act["operations"]["dense"], "multiply-adds")
        tiles.append((f"{value / 1e6:.2f} M", f"{what} a sample"))
    tiles.append((f"{result['parameters']['student']:,}", "parameters"))
    tiles.append((f"{result['train_seconds']:,.0f} s", f"training, {result['precision']} on {result['device']}"))
    steps = len(by_step) if len(by_step) > 1 else config["steps"]
    timed = len(by_step) > 1 or act.get("rate") is not None or act.get("frames", 1) > 1  # an ANN on images is not
    about = [f"{config['student']} on {config['data']}", *([f"T = {steps}"] if timed else [])]
    return {
        "title": f"{folder.name}: {' + '.join(config['method'])}",
        "subtitle": ", ".join([*about, f"{result['epochs']} epochs", f"seed {result['seed']}"]),
        "tiles": tiles,
        "sections": [*sections, *([Section("Not shown", says=missing)] if missing else [])],
        "footer": footer(machine),
    }


def history(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SpecError([f"'{file}' cannot be read: {error}"]) from None


def said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(said, value))
    return json.dumps(value) if isinstance(value, dict | bool) or value is None else str(value)


def made_on(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions, hardware and command."""
    facts = [("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items()))]
    facts += [(k, str(machine[k])) for k in ("processor", "gpu", "system", "threads") if k in machine]
    return [*facts, ("command", " ".join(machine.get("command", [])))]


def origin(machine: Mapping[str, Any], result: Mapping[str, Any]) -> Section:
    facts = made_on(machine)
    if "loss" in result:
        loss = {name: w if isinstance(w, str) else f"{w:.4g}" for name, w in result["loss"].items()}
        facts += [("loss", " + ".join(f"{weight} {name}" for name, weight in loss.items()))]
    facts += [
        (k.replace("_", " "), f"{result[k]:,}" if isinstance(result[k], int) else str(result[k]))
        for k in ("seed", "best_epoch", "processes", "peak_memory_bytes", "teacher_calls")
        if result.get(k) is not None
    ]
    return Section("Where the numbers come from", facts=facts)


def footer(machine: Mapping[str, Any]) -> str:
    return (
        f"{MARK} {machine['versions'].get('spikedistill', '')}. Energy is an estimate for 45 nm, see report/energy.py."
    )


def look(
    folder: Path, config: Mapping[str, Any], result: Mapping[str, Any], trust_code: bool = False
) -> dict[str, Any]:
    """Run the student, and the teacher where it can be found, over the data of the result, as the page shows them.

    These are the test data, or with --no-test, which leaves them alone, those of validation. Raises SpecError where
    data or teacher are no longer those of the run.
    """
    part = "test" if "test" in result else "valid"
    if part not in result:
        raise SpecError(["the run left its test data alone, and has no others to be measured on"])
    without: list[str] = []
    student = runs.load(folder, fast=False, trust_code=trust_code)
    data_sets.refuse_code(config, trust_code)
    how = data_sets.settings_of(config) | {"download": False}
    data = data_sets.load(config["data"], batch_size=config["batch"], augment="none", valid=config["valid"], **how)
    about = runs.about(folder)
    for what, now in (("classes", [*data.classes]), ("shape", [*data.shape])):
        if about.get(what, now) != now:
            raise SpecError([f"data: {what} of '{config['data']}' are {now} now, the student knows {about[what]}"])
    if changed(folder, {"data": fingerprint(data)}):
        raise SpecError([f"data: '{config['data']}' are others than the run was made with"])
    teacher, images, by = None, data_sets.images_of(data), config.get("teacher")
    if by:
        if changed(folder, {"teacher": teacher_print(by)} if Path(by).exists() else {"code": own.prints([by])}):
            raise SpecError([f"teacher: '{by}' is another one than the run was made with"])
        try:
            teacher = teacher_of(config, data, trust_code)
        except SpecError as error:
            without.append(f"Without the teacher: {' '.join(str(error).split())}")
    shown = images if images is not None and teacher is not None and of_images(config, data) else data
    frames = about.get("frames")  # of a recording, that the student sees; the teacher sees all
    ours = data_sets.at_frames(data, frames)
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    counts = dict.fromkeys(RIGHT, 0)
    differ: dict[str, list[tuple[Tensor, int, Tensor, Tensor]]] = {who: [] for who in RIGHT}
    right, split, said_at = 0, getattr(data, part), time.monotonic()
    for batch in split:
        x = batch["x"][frames] if ours is not data else batch["x"]
        mine = infer(student, x).logits.mean(0)
        y = batch["y"]
        matrix.index_put_((y, mine.argmax(1)), torch.ones_like(y), accumulate=True)
        if teacher is not None and shown is data:
            theirs = infer(teacher, batch["x"]).logits.mean(0)
            right += int((theirs.argmax(1) == y).sum())
            for b in (theirs.argmax(1) != mine.argmax(1)).nonzero()[:, 0].tolist():
                true = int(y[b])
                who = "teacher" if theirs[b].argmax() == true else "student" if mine[b].argmax() == true else "neither"
                counts[who] += 1
                if counts[who] <= SHOWN:  # copies: a view would keep its batch
                    image = frame(batch["x"], b).clone()
                    differ[who].append((image, true, mine[b].softmax(0), theirs[b].softmax(0)))
        if time.monotonic() - said_at > PATIENCE:
            said_at = time.monotonic()
            print(f"report: {int(matrix.sum()):,} of {split.samples:,} samples", file=sys.stderr, flush=True)
    held_out, where = (ours.test, "test") if ours.valid is None else (ours.valid, "validation")
    measured = activity(student, held_out, neurons=True)  # on the samples of the result
    prefix, why = at_every_step(student, held_out, measured)
    if why:
        without.append(f"Accuracy and cost of the first t steps: {why}.")
    taught = activity(teacher, shown.test if shown.valid is None else shown.valid) if teacher is not None else None
    for who, of in (("student", measured), ("teacher", taught)):
        if of is not None and not energy.counted(of):
            without.append(f"Energy of the {who}: its neurons are another library's, whose spikes are not counted.")
        if of is not None and of.get("uncounted"):
            without.append(f"Operations of the {who} in {', '.join(of['uncounted'])}: there is no count for them.")
    return {
        "student": student,
        "without": without,
        "classes": [name.encode(errors="replace").decode() for name in data.classes],  # a folder's may be no text
        "frames": frames if ours is not data else None,
        "batch": next(iter(spread(getattr(ours, part), SHOWN))),
        "confusion": matrix,
        "differ": differ,
        "counts": counts,
        "teacher_accuracy": right / int(matrix.sum()) if teacher is not None and shown is data else None,
        "teacher_sees": "on its images, " if shown is not data else "",
        "activity": measured,
        "measured_on": f"{measured['samples']:,} samples of {where}",
        "part": "test" if part == "test" else "validation",
        "precision": result["precision"],
        "teacher_activity": taught,
        "pairs_of_streams": next(iter(data.train)) if images is not None else None,
        "prefix": prefix,
        "by_step": result[part]["by_step"],
    }


def teacher_of(config: Mapping[str, Any], data: Any, trust_code: bool) -> nn.Module:
    """The teacher of a run, built as `distill` builds it. Raises SpecError that says what is missing."""
    by = config["teacher"]
    if Path(by).exists():
        return runs.load(by, fast=False, trust_code=trust_code)
    if own.is_own(by):
        if not trust_code:
            raise SpecError([f"it is made by the code '{by}': if you trust it, give --trust-code"])
    elif by.partition(":")[0] not in models.LIBRARIES:
        raise SpecError([f"'{by}' is no run folder that is found from here"])
    elif models.weightless(by):
        raise SpecError([f"'{by}' names no trained weights"])
    if data_sets.images_of(data) is not None:
        raise SpecError([f"'{by}' is no run folder, which would say whether it was trained on images or events"])
    given = {"classes": len(data.classes), "channels": data.shape[0], "mean": data.mean, "std": data.std}
    try:
        return models.build(by, **({} if models.keeps_classes(by) else given | {"steps": config["steps"]}))
    except SpecError:
        raise
    except Exception as error:  # anything may go wrong in code of others, such as weights that are no longer there
        raise SpecError([f"'{by}' cannot be built: {type(error).__name__}: {error}"]) from error


def of_images(config: Mapping[str, Any], data: Any) -> bool:
    """Whether a teacher was trained on other inputs than the events, that is on the images they are paired with."""
    by = Path(config["teacher"])
    if runs.about(by).get("shape", [*data.shape]) != [*data.shape]:
        return True
    return (by / "config.json").exists() and runs.read_json(by / "config.json")["data"] == config["pair"]


def frame(x: Tensor, b: int) -> Tensor:
    """One sample as an image [C,H,W]; of frames over time their mean, which is in [0,1] where they are."""
    return x[:, b].mean(0) if x.ndim == 5 else x[b]


def at_every_step(student: nn.Module, split: Any, measured: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Million operations and nJ of a sample that is stopped after 1 .. T steps; or none, and why.

    measured: the `activity` of all T.
    """
    last, frames = measured["steps"], measured.get("frames", 1) > 1
    if not measured["layers"]:
        return [], "no spikes of the student were counted" if last > 1 else ""
    if last == 1:
        return [], "the student takes one"
    if needs_all_steps(student):
        return [], "layers of the student change after half of its steps"
    if not frames and not takes_steps(student):
        return [], "forward of the student takes no `steps`"
    points = []
    for t in range(1, last + 1):
        first: dict[str, Any] = {"data": SomeFrames(split, tuple(range(t)))} if frames else {"data": split, "steps": t}
        try:
            of = measured if t == last else activity(student, **first)
        except Exception as error:  # a student of yours may want all of its frames
            return [], f"the student does not run for {t}: {error}"
        if of["steps"] != t:
            return [], f"the student takes {of['steps']} where it is asked for {t}"
        row = energy.table(of)[0]  # the student, in float32
        points.append({"name": f"t = {t}", "operations": row["operations"], "total": row["total"]})
    return points, ""


def spikes_of(student: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Spikes [T, B, ...] of those layers that fire once, each by itself, so that another one takes none away."""
    spikes = {}
    for name in layers:
        with suppress(TapError):
            spikes |= infer(student, x, taps=[name]).taps
    return spikes


def sections_of(seen: Mapping[str, Any]) -> list[Section]:
    """The sections that need the model and the data."""
    sections, measured, classes = [], seen["activity"], seen["classes"]
    if measured["layers"]:
        drawn = {
            "firing_rates": (
                figures.rates(measured["layers"]),
                f"On {seen['measured_on']}. Right: the median (dot), the middle half (thick) and "
                "90 % (thin) of the layer's neurons; silent neurons never fired.",
            )
        }
        x, labels = seen["batch"]["x"], [classes[int(y)] for y in seen["batch"]["y"]]
        spikes = spikes_of(seen["student"], x, list(measured["layers"]))
        if left := [name for name in measured["layers"] if name not in spikes and "#" not in name]:
            seen["without"].append(f"Spikes of {', '.join(left)}: called more than once, they are several layers.")
        if spikes:
            images = torch.stack([frame(x, b) for b in range(len(labels))])
            caption = "Spikes of up to 40 neurons of every layer, evenly spaced; a row is a neuron."
            drawn["raster"] = (figures.raster(images, spikes, labels), caption)
        sections.append(Section("Spikes", drawn))
    if (batch := seen["pairs_of_streams"]) is not None:
        caption = (
            "What the networks read in training: the image, drawn anew for every sample of events from those of its "
            "class, and over time the stream of images, before any is replaced, above that of events."
        )
        try:
            drawn = {"streams": (streams.draw(batch, classes=classes), caption)}
            sections.append(Section("Images and events", drawn))
        except ValueError as error:
            seen["without"].append(f"Images and events: {error}.")
    energies = energy.table(measured, seen["teacher_activity"])
    points = [p | {"accuracy": a} for p, a in zip(seen["prefix"], seen["by_step"])]
    drawn = {}
    if points:
        if seen["teacher_accuracy"] is not None:
            about = {"name": "teacher", "accuracy": seen["teacher_accuracy"], "reference": True}
            of_teacher = [row for row in energies if row["name"] == "teacher"]
            points += [about | {k: row[k] for k in ("operations", "total")} for row in of_teacher]
        panels = [
            ("operations", "operations of a sample [millions]"),
            ("total", "energy of a sample, memory included [nJ]"),
        ]
        caption = "The student stopped after 1 .. T steps. Operations: additions of spikes, and dense multiply-adds of "
        caption += "other inputs. A ring: nothing else here is better in both."
        drawn["accuracy_cost"] = (figures.pareto(points, panels, joined=True, part=seen["part"]), caption)
    if energy.counted(measured):
        drawn["energy"] = (
            figures.energies(energies),
            "Arithmetic alone flatters a spiking network; beside it memory traffic and neurons, the teacher, and the "
            "ANN of the student's shape, also quantised. See report/energy.py (45 nm; Horowitz, ISSCC 2014).",
        )
    layers = [
        [
            name,
            "additions" if s["kind"] == "ac" else "multiply-adds",
            f"{s['operations'] / 1e3:,.1f}",
            f"{s['dense'] / 1e3:,.1f}",
            f"{s['weights']:,}",
        ]
        for name, s in measured["synapses"].items()
    ]
    heads = ["layer", "its input asks for", "operations [thousands]", "dense [thousands]", "parameters"]
    notes = [f"Operations and energy: on {seen['measured_on']}."]
    notes += [
        f"{name}: its input is the mean of {s['averaged']} values, of which every spike is counted"
        for name, s in measured["synapses"].items()
        if s["averaged"] > 1
    ]
    sections.append(Section("Operations and energy", drawn, [Table(heads, layers)], notes=notes))
    matrix = seen["confusion"].numpy()
    caption = f"{int(matrix.sum()):,} {seen['part']} samples."
    if "bf16" in seen["precision"]:
        caption += f" Here and for the teacher in float32; the student's accuracy above is in {seen['precision']}."
    if seen["teacher_sees"]:
        caption += " The teacher sees images, the student events: on which samples they differ is not asked."
    sections.append(Section("Confusion", {"confusion": (figures.confusion(matrix, classes), caption)}))
    if any(seen["counts"].values()):
        sections.append(disagreement(seen["counts"], seen["differ"], classes, int(matrix.sum()), seen["part"]))
    return sections


def disagreement(
    counts: Mapping[str, int], differ: Mapping[str, Sequence], classes: Sequence[str], samples: int, part: str
) -> Section:
    """Where teacher and student differ: how often who is right, and samples where one of them is."""
    shown, total = [], sum(counts.values())
    for image, y, ours, theirs in [*differ["teacher"], *differ["student"]]:
        order = dict.fromkeys([y, *ours.topk(2).indices.tolist(), *theirs.topk(2).indices.tolist()])
        top = list(order)[:4]
        shown.append(
            {"image": image, "label": classes[y]}
            | {who: {classes[k]: float(p[k]) for k in top} for who, p in (("student", ours), ("teacher", theirs))}
        )
    words = ", ".join(f"{who} right {counts[who]:,}" for who in ("teacher", "student"))
    share = f"{total:,} of {samples:,} {part} samples ({total / samples:.1%})"
    section = Section("Teacher and student", says=[f"They differ on {share}: {words}, neither {counts['neither']:,}."])
    if shown:
        caption = "First samples where the teacher is right, then some where the student is. *: the true class."
        section.figures["disagreements"] = figures.disagreements(shown), caption
    return section


# A recipe


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """What a recipe wrote into its folder at its end, if one did."""
    for file in sorted(folder.glob("*.json")):
        made = runs.read_json(file)
        if isinstance(made, dict) and made.keys() >= {"recipe", "table", "rows"}:
            return made
    return None


def of_recipe(folder: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """What the page of a recipe shows, from its table and the run folders beside it."""
    rows, machine = made["rows"], made["machine"]
    table, notes = Table(made["table"]["heads"], made["table"]["rows"]), made.get("legend", "").splitlines()
    sections = [Section("Accuracy", {"accuracies": (figures.dots(rows), "")}, [table], notes=[" ".join(notes)])]
    for name, (title, caption) in made.get("pictures", {}).items():
        if (picture := folder / Path(name).name).exists():
            sections.append(Section(title, {picture.stem: (picture, caption)}))
    of = {row["name"]: [folder / name for name in row["runs"]] for row in rows}
    lines = by_steps(of)
    if (most := max(map(len, lines.values()), default=1)) > 1:
        lines = {name: line if len(line) > 1 else line * most for name, line in lines.items()}
        drawn = figures.steps(lines), "Mean output of the first t steps on test, mean over seeds. ANNs answer at once."
        sections.append(Section("Accuracy at every time step", {"accuracy_by_step": drawn}))
    if lines := histories(of):
        sections.append(Section("Training", {"learning": (figures.learning(lines), "Mean over seeds.")}))
    sections.append(Section("Settings", facts=[(k, said(v)) for k, v in made["config"].items()]))
    facts = [*made_on(machine), ("training, all runs", f"{made['seconds']:,.0f} s")]
    facts += [(row["name"], ", ".join(row["runs"])) for row in rows]
    notes = ["Each of these runs has a report of its own: spikedistill report FOLDER/RUN."]
    sections.append(Section("Where the numbers come from", facts=facts, notes=notes))
    return {
        "title": made["recipe"],
        "subtitle": made["title"],
        "tiles": [(f"{r['accuracy']:.2%}", r["name"] + plus_minus(r)) for r in rows[:6]],
        "sections": sections,
        "footer": footer(machine),
    }


def by_steps(of: Mapping[str, Sequence[Path]]) -> dict[str, list[float]]:
    """Mean test accuracy after every time step of the runs of each row, where their folders are there."""
    lines = {}
    for name, folders in of.items():
        if all((folder / "result.json").exists() for folder in folders):
            found = [runs.read_json(folder / "result.json")["test"]["by_step"] for folder in folders]
            lines[name] = [sum(at) / len(at) for at in zip(*found)]
    return lines


# A comparison


def of_compare(folder: Path) -> dict[str, Any]:
    """What the page of a comparison shows, from compare.json and the run folders beside it."""
    c = runs.read_json(folder / "compare.json")
    rows, baseline = c["rows"], c["baseline"]
    if not rows:
        raise SpecError([f"'{folder}': no run of this comparison is finished, so there is nothing to report yet"])
    accuracy, *cost = comparison.tables(rows, "", baseline, c["confidence"])
    legend = comparison.legend(rows, c["confidence"], c.get("jobs", 1), c.get("cache_left_out", False))
    drawn = {"accuracies": (figures.dots(rows), "")}
    if any("difference" in row for row in rows):
        caption = "Blue: better, orange: worse, grey: not shown to differ."
        drawn["paired_differences"] = (figures.differences(rows, baseline), caption)
    sections = [Section("Accuracy", drawn, [accuracy], says=c["conclusions"], notes=legend[:2])]
    teacher = c.get("teacher") or {}
    points = [
        {
            "name": r["name"],
            "accuracy": r["accuracy"],
            "spread": r["spread"],
            "energy": r.get("energy_nj"),
            "seconds": r["cpu_seconds"] if comparison.timed(rows) else r["seconds"],
            "operations": (r["ac"] + r["mac"]) / 1e6,
        }
        for r in rows
    ]
    panels = [
        ("operations", "operations of a sample [millions]"),
        ("energy", "energy of a sample [nJ]"),
        ("seconds", f"training [{'CPU s' if comparison.timed(rows) else 's'}]"),
    ]
    panels = [p for p in panels if all(point[p[0]] is not None for point in points)]
    caption = "Mean and standard deviation over seeds. A ring: nothing else here is better in both."
    caption += " Only those are named; the table has all." if len(rows) > figures.NAMED else ""
    sections.append(Section("Cost", {"pareto": (figures.pareto(points, panels), caption)}, cost, notes=legend[2:]))
    by_step = {r["name"]: r["by_step"] for r in rows}
    if all(len(v) > 1 for v in by_step.values()):
        drawn = {
            "accuracy_by_step": (
                figures.steps(by_step, teacher.get("accuracy")),
                "Mean output of the first t steps, mean over seeds.",
            )
        }
        sections.append(Section("Accuracy at every time step", drawn))
    of = {row["name"]: [folder / "runs" / f"{row['name']}-{seed}" for seed in row["seeds"]] for row in rows}
    if lines := histories(of):
        sections.append(Section("Training", {"learning": (figures.learning(lines), "Mean over seeds.")}))
    if references := c.get("references"):
        caption = (
            f"The student as trained by {baseline}, the teacher, and the ANN of the student's shape, also quantised."
        )
        sections.append(Section("Energy", {"energy": (figures.energies(references), caption)}))
    settings = [
        (r["name"], "; ".join(f"{k} = {said(v)}" for k, v in r["settings"].items() if k != "name")) for r in rows
    ]
    settings += [
        (f"{r['name']}, tuned", f"{len(r['tuned']['trials'])} trials on validation: {said(r['tuned']['values'])}")
        for r in rows
        if "tuned" in r
    ]
    sections.append(Section("What differs between rows", facts=settings))
    sections.append(Section("The same for all", facts=[(k, said(v)) for k, v in c["settings"].items()]))
    machine = c["machine"]
    facts = [*made_on(machine)]
    facts += [("seeds", said(c["seeds"])), ("data, teacher", f"{c['origin']['data']}, {c['origin']['teacher']}")]
    facts += [("training, all runs", f"{c['seconds']:,.0f} s")]
    sections.append(Section("Where the numbers come from", facts=facts, notes=[f"{n}." for n in c["notes"]]))
    tiles = []
    if teacher.get("accuracy") is not None:
        tiles.append((f"{teacher['accuracy']:.2%}", f"teacher, {teacher['parameters']:,} parameters"))
    best = sorted(rows, key=lambda r: (r["name"] == c["baseline"], r["valid"]), reverse=True)[:5]  # by validation
    tiles += [(f"{r['accuracy']:.2%}", r["name"] + plus_minus(r)) for r in rows if r in best]
    if c.get("not_shown"):
        sections.append(Section("Not shown", says=c["not_shown"]))
    return {
        "title": "Methods compared",
        "subtitle": c["title"],
        "tiles": tiles,
        "sections": sections,
        "footer": footer(machine),
    }


def plus_minus(row: Mapping[str, Any]) -> str:
    return f" ± {100 * row['spread']:.2f}" if row["spread"] is not None else ""


def histories(of: Mapping[str, Sequence[Path]]) -> dict[str, list[float]]:
    """Mean validation accuracy over the epochs of the runs of each row; empty where a run's folder is not there."""
    lines = {}
    for name, folders in of.items():
        files = [folder / "metrics.jsonl" for folder in folders]
        if not all(file.exists() for file in files):
            return {}
        found = [[line.get("valid_accuracy") for line in history(file)] for file in files]
        means = [sum(at) / len(at) for at in zip(*found) if None not in at]
        if len(means) < 2:
            return {}
        lines[name] = means
    return lines
