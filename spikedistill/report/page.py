"""A run, a comparison or a recipe as one HTML file: nothing else is needed to read it, on a screen or on paper."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikedistill import data as data_sets
from spikedistill import runs
from spikedistill.core.taps import infer
from spikedistill.origin import changed, fingerprint, teacher_print
from spikedistill.report import comparison, energy, figures, streams
from spikedistill.report.activity import activity
from spikedistill.report.tables import Table
from spikedistill.spec import SpecError
from spikedistill.transforms.tt_snn import needs_all_steps

SHOWN = 3  # samples in a raster, and of each kind of disagreement
RIGHT = ("teacher", "student", "neither")  # who may be, where teacher and student differ
MEASURED = 500  # samples for rates and operations


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

    figures_to: a folder for each figure as SVG and PDF.  trust_code: as for `load`.
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
    if out.exists() and MARK not in out.read_text(errors="replace"):
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
    out.write_text(render(page))
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
    name, test = ("test", result["test"]) if "test" in result else ("validation", result["valid"])
    learned = figures.curves(history(folder / "metrics.jsonl"), result["best_epoch"])
    sections, missing = [Section("Training", {"curves": (learned, "")})], []
    try:
        seen = look(folder, config, result, trust_code)
    except (SpecError, data_sets.DataError, OSError) as error:
        seen = None
        missing = [f"Without rasters, confusion and disagreements: {' '.join(str(error).split())}"]
    missing += seen["without"] if seen else []
    teacher_accuracy = seen["teacher_accuracy"] if seen else None
    if len(test["by_step"]) > 1:
        caption = (
            f"Mean output of the first t of {len(test['by_step'])} steps, on {test['samples']:,} samples of {name}."
        )
        if seen and seen["frames"]:
            caption += f" The student sees frames {said(seen['frames'])} of a recording, counted from 0."
        at = {"accuracy_by_step": (figures.steps({"student": test["by_step"]}, teacher_accuracy, name), caption)}
        sections.append(Section("Accuracy at every time step", at))
    if seen:
        sections += sections_of(seen)
    sections += [Section("Settings", facts=[(k, said(v)) for k, v in config.items()]), origin(machine, result)]
    act = result.get("activity") or {}
    tiles = [(f"{test['accuracy']:.2%}", f"{name} accuracy, {test['samples']:,} samples")]
    if teacher_accuracy is not None:
        tiles.append((f"{teacher_accuracy:.2%}", "teacher, the same samples"))
    if act.get("rate") is not None:
        tiles.append((f"{act['rate']:.3f}", "spikes per neuron and step"))
    if act:
        tiles.append((f"{act['operations']['ac'] / 1e6:.2f} M", "synaptic additions a sample"))
    tiles.append((f"{result['parameters']['student']:,}", "parameters"))
    tiles.append((f"{result['train_seconds']:,.0f} s", f"training, {result['precision']} on {result['device']}"))
    methods = " + ".join(config["method"])
    return {
        "title": f"{folder.name}: {methods}",
        "subtitle": f"{config['student']} on {config['data']}, T = {config['steps']}, "
        f"{result['epochs']} epochs, seed {result['seed']}",
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


def origin(machine: Mapping[str, Any], result: Mapping[str, Any]) -> Section:
    facts = [("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items()))]
    facts += [(k, str(machine[k])) for k in ("processor", "gpu", "system", "threads") if k in machine]
    facts += [("command", " ".join(machine.get("command", [])))]
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
    teacher, images = None, data_sets.images_of(data)
    if config.get("teacher") and Path(config["teacher"]).exists():
        if changed(folder, {"teacher": teacher_print(config["teacher"])}):
            raise SpecError([f"teacher: '{config['teacher']}' is another one than the run was made with"])
        try:
            teacher = runs.load(config["teacher"], fast=False, trust_code=trust_code)
        except SpecError as error:
            without.append(f"Without the teacher: {error}")
    elif config.get("teacher"):
        without.append(f"Without the teacher: '{config['teacher']}' is no run folder that is found from here.")
    shown = images if images is not None and teacher is not None and of_images(config["teacher"], data) else data
    frames = about.get("frames")  # of a recording, that the student sees; the teacher sees all
    ours = data_sets.at_frames(data, frames)
    matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.int64)
    counts = dict.fromkeys(RIGHT, 0)
    differ: dict[str, list[tuple[Tensor, int, Tensor, Tensor]]] = {who: [] for who in RIGHT}
    right = seen = 0
    part = "test" if "test" in result else "valid"
    for batch in getattr(data, part):
        x = batch["x"][frames] if ours is not data else batch["x"]
        own = infer(student, x).logits.float().mean(0)
        y = batch["y"]
        matrix.index_put_((y, own.argmax(1)), torch.ones_like(y), accumulate=True)
        if teacher is not None and shown is data:
            theirs = infer(teacher, batch["x"]).logits.float().mean(0)
            right, seen = right + int((theirs.argmax(1) == y).sum()), seen + len(y)
            for b in (theirs.argmax(1) != own.argmax(1)).nonzero()[:, 0].tolist():
                who = "teacher" if theirs[b].argmax() == y[b] else "student" if own[b].argmax() == y[b] else "neither"
                counts[who] += 1
                if counts[who] <= SHOWN:  # copies: a view would keep its batch
                    image = frame(batch["x"], b).clone()
                    differ[who].append((image, int(y[b]), own[b].softmax(0), theirs[b].softmax(0)))
    held_out = ours.valid or ours.test  # where there is no validation, the result has test data
    measured = activity(student, held_out, samples=MEASURED, neurons=True)
    by_step = result[part]["by_step"]
    first = next(iter(getattr(ours, part)))
    prefix = []
    if measured["layers"] and first["x"].ndim == 4 and len(by_step) > 1 and not needs_all_steps(student):
        if "steps" in signature(student.forward).parameters:
            prefix = [operations_at(student, held_out, t) for t in range(1, len(by_step) + 1)]
        else:
            without.append("Accuracy and cost of the first t steps: forward of the student takes no `steps`.")
    taught = activity(teacher, shown.valid or shown.test, samples=100) if teacher is not None else None
    for who, of in (("student", measured), ("teacher", taught)):
        if of is not None and not energy.counted(of):
            without.append(f"Energy of the {who}: its neurons are another library's, whose spikes are not counted.")
    return {
        "student": student,
        "without": without,
        "classes": data.classes,
        "frames": frames if ours is not data else None,
        "batch": first,
        "confusion": matrix,
        "differ": differ,
        "counts": counts,
        "teacher_accuracy": right / seen if seen else None,
        "activity": measured,
        "part": "test" if part == "test" else "validation",
        "teacher_activity": taught,
        "pairs_of_streams": next(iter(data.train)) if images is not None else None,
        "prefix": prefix,
        "by_step": by_step,
        "licence": data.licence,
    }


def of_images(teacher: str, data: Any) -> bool:
    """Whether a teacher was trained on other inputs than the events, that is on the images they are paired with."""
    return runs.about(teacher).get("shape", list(data.shape)) != list(data.shape)


def frame(x: Tensor, b: int) -> Tensor:
    """One sample as an image [C,H,W]; frames over time are summed."""
    return x[:, b].sum(0) if x.ndim == 5 else x[b]


def operations_at(student: nn.Module, data: Any, steps: int) -> dict[str, Any]:
    """Million operations and nJ of a sample that is stopped after `steps`."""
    measured = activity(student, data, steps=steps, samples=200)
    ops = measured["operations"]
    joules = energy.per_sample(measured) or {"total": None, "compute": None}
    return {"name": f"t = {steps}", "operations": (ops["ac"] + ops["mac"]) / 1e6, "total": joules["total"]}


def sections_of(seen: Mapping[str, Any]) -> list[Section]:
    """The sections that need the model and the data."""
    sections, measured, classes = [], seen["activity"], seen["classes"]
    if measured["layers"]:
        drawn = {
            "firing_rates": (
                figures.rates(measured["layers"]),
                f"On {measured['samples']} samples of validation. Right: the median (dot), the middle half (thick) and "
                "90 % (thin) of the layer's neurons; silent neurons never fired.",
            )
        }
        batch = seen["batch"]
        x = batch["x"][:, :SHOWN] if batch["x"].ndim == 5 else batch["x"][:SHOWN]
        spikes = infer(seen["student"], x, taps=list(measured["layers"])).taps
        labels = [classes[int(y)] for y in batch["y"][:SHOWN]]
        images = torch.stack([frame(x, b) for b in range(len(labels))])
        drawn["raster"] = (
            figures.raster(images, spikes, labels),
            "Spikes of up to 40 neurons of every layer, evenly spaced; a row is a neuron.",
        )
        sections.append(Section("Spikes", drawn))
    if (batch := seen["pairs_of_streams"]) is not None:
        caption = (
            "What the networks read in training: the image, drawn anew for every sample of events from those of its "
            "class, and over time the stream of images, before any is replaced, above that of events."
        )
        drawn = {"streams": (streams.draw(batch, classes=classes), caption)}
        sections.append(Section("Images and events", drawn))
    energies = energy.table(measured, seen["teacher_activity"])
    points = [p | {"accuracy": a} for p, a in zip(seen["prefix"], seen["by_step"])]
    drawn = {}
    if len(points) > 1:
        if seen["teacher_accuracy"] is not None:
            about = {"name": "teacher", "accuracy": seen["teacher_accuracy"], "reference": True}
            of_teacher = [row for row in energies if row["name"] == "teacher"]
            points += [about | {k: row[k] for k in ("operations", "total")} for row in of_teacher]
        panels = [
            ("operations", "operations of an image [millions]"),
            ("total", "energy of an image, memory included [nJ]"),
        ]
        caption = "The student stopped after 1 .. T steps. A ring: nothing else here is better in both."
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
    notes = [
        f"{name}: its input is the mean of {s['averaged']} values, of which every spike is counted"
        for name, s in measured["synapses"].items()
        if s["averaged"] > 1
    ]
    sections.append(Section("Operations and energy", drawn, [Table(heads, layers)], notes=notes))
    matrix = seen["confusion"].numpy()
    sections.append(
        Section(
            "Confusion",
            {"confusion": (figures.confusion(matrix, classes), f"{int(matrix.sum()):,} {seen['part']} samples.")},
        )
    )
    if any(seen["counts"].values()):
        sections.append(disagreement(seen["counts"], seen["differ"], classes, int(matrix.sum()), seen["part"]))
    return sections


def disagreement(
    counts: Mapping[str, int], differ: Mapping[str, Sequence], classes: Sequence[str], samples: int, part: str
) -> Section:
    """Where teacher and student differ: how often who is right, and samples where one of them is."""
    shown, total = [], sum(counts.values())
    for image, y, own, theirs in [*differ["teacher"], *differ["student"]]:
        order = dict.fromkeys([y, *own.topk(2).indices.tolist(), *theirs.topk(2).indices.tolist()])
        top = list(order)[:4]
        shown.append(
            {"image": image, "label": classes[y]}
            | {who: {classes[k]: float(p[k]) for k in top} for who, p in (("student", own), ("teacher", theirs))}
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
    facts = [("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items()))]
    facts += [(k, str(machine[k])) for k in ("processor", "gpu", "system", "threads") if k in machine]
    facts += [("command", " ".join(machine["command"])), ("training, all runs", f"{made['seconds']:,.0f} s")]
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
        ("operations", "operations of an image [millions]"),
        ("energy", "energy of an image [nJ]"),
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
    facts = [
        ("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        ("processor", machine["processor"]),
    ]
    facts += [("seeds", said(c["seeds"])), ("data, teacher", ", ".join(str(v) for v in c["origin"].values()))]
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
