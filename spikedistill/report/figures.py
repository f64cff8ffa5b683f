"""Figures from tables of results, in colours that colour-blind readers tell apart.

Those of a report return a matplotlib Figure; `inline` makes an SVG of one whose colours follow the page, light or dark.
"""

import html
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f7f"  # of the Okabe-Ito palette
GREEN, PURPLE, YELLOW, SKY = "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, GREY)
MARKERS = "osD^vP*"  # a second way to tell rows apart
DASHES = ("-", "--", ":")  # and a third, where there are more rows than colours
INK, GRID = "#1f2328", "#d6d9dd"
VARIABLES = {"ink": INK, "grid": GRID, "blue": BLUE, "orange": ORANGE, "green": GREEN, "purple": PURPLE}
VARIABLES |= {"yellow": YELLOW, "sky": SKY, "grey": GREY}
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.labelcolor": INK, "text.color": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 8.5, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "svg.hashsalt": "spikedistill", "lines.linewidth": 1.6, "lines.markersize": 5,
    "text.parse_math": False,  # a class may be called $a$
    "svg.fonttype": "none",  # text: matplotlib's own font has no Chinese, the reader's has
}  # fmt: skip


def drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that draws in the style of the reports."""

    @wraps(function)
    def styled(*args: Any, **how: Any) -> Any:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return function(*args, **how)

    return styled


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **how: Any) -> tuple[Any, Any]:
    """A figure in inches and its axes, a list of rows of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **how)


def style(i: int) -> dict[str, Any]:
    """Colour, mark and dashes of row i."""
    return {"color": CYCLE[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i // 7 % 3]}


def room(lines: int) -> float:
    """Inches that a legend of so many lines takes."""
    return 0.5 + 0.19 * lines


def short(name: str, most: int = 15) -> str:
    """A name that finds room beside an axis."""
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def words(name: str) -> str:
    """The name of a figure or of its file as words, safe within an attribute of HTML."""
    return html.escape(name.replace("_", " "), quote=True)


def embedded(path: Path) -> str:
    """A file of SVG to be put into a page as it is: nothing in it can act on the page, or run."""
    data = b64encode(path.read_bytes()).decode()
    return f'<img class="figure" alt="{words(path.stem)}" src="data:image/svg+xml;base64,{data}">'


def inline(figure: Any, name: str) -> str:
    """SVG to be put into a page: ids are of this figure alone, text is text.

    Colours are the page's variables, but those of a figure that brings its own background stay what they are.
    """
    from matplotlib.colors import to_rgba

    text, own = StringIO(), to_rgba(figure.get_facecolor())[3] > 0
    written(figure, text, "svg", figure.get_facecolor())
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for variable, colour in () if own else VARIABLES.items():
        svg = re.sub(colour, f"var(--{variable})", svg, flags=re.I)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size
    width = float(size.group(1)) / 72 * 96
    head = f'<svg class="figure" viewBox="{size.group(0)[9:-1]}" style="max-width: {width:.0f}px" role="img"'
    head += f' aria-label="{words(name)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :]


def save(figure: Any, folder: Path, name: str) -> None:
    """SVG and PDF of a figure on white."""
    for form in ("svg", "pdf"):
        written(figure, folder / f"{name}.{form}", form, "white")


def written(figure: Any, out: Any, form: str, facecolor: Any) -> None:
    """A figure into a file, without the date, so that equal figures are equal files."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # from a font that only measures the text
        date = {"Date" if form == "svg" else "CreationDate": None}
        figure.savefig(out, format=form, facecolor=facecolor, metadata=date)


def accuracies(rows: list[dict[str, Any]], path: Path, title: str, baseline: str = "SNN, ce") -> None:
    """A dot per seed and a bar at the mean of each row's "accuracies" (shares). Networks without spikes are grey, the
    row called `baseline` is blue.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.1), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        values = [100 * a for a in row["accuracies"]]
        colour = GREY if row["rate"] is None else BLUE if row["name"] == baseline else ORANGE
        mean = sum(values) / len(values)
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.55, markersize=6, markeredgewidth=0)
        axes.plot([mean, mean], [i - 0.28, i + 0.28], color=colour, linewidth=2.5)
        axes.annotate(f"{mean:.2f}", (max(values), i), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy [%]; a dot is a seed, a bar the mean")
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.margins(x=0.12, y=0.1)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)


def speed(networks: list[dict[str, Any]], steps: list[dict[str, Any]], path: Path) -> None:
    """Left: a training step of each library, "train" {"ms", "low", "high"}. Right: time and saved memory by T."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.36 * len(networks) + 1.3), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, row in enumerate(networks):
        t = row["train"]
        colour = (
            ORANGE if row["name"].startswith("ours") else GREY if row["name"].startswith(("ReLU", "conv")) else BLUE
        )
        left.barh(i, t["ms"], color=colour, xerr=[[t["ms"] - t["low"]], [t["high"] - t["ms"]]], height=0.7)
        left.annotate(f"{t['ms']:.0f}", (t["high"], i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    left.set_yticks(range(len(networks)), [row["name"] for row in networks], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("training step [ms], median and quartiles")
    left.margins(x=0.1)
    at = [row["steps"] for row in steps]
    right.plot(at, [row["train"]["ms"] for row in steps], "o-", color=ORANGE)
    right.set_xlabel("time steps T")
    right.set_ylabel("training step [ms]", color=ORANGE)
    memory = right.twinx()
    memory.plot(at, [row["saved_mib"] for row in steps], "s--", color=BLUE)
    memory.set_ylabel("kept for backward [MiB]", color=BLUE)
    for axes in (right, memory):
        axes.set_ylim(bottom=0)
    for axes in (left, right, memory):
        axes.spines[["top"]].set_visible(False)
    figure.savefig(path)


def whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def ticks(steps: int) -> range:
    """At most eight of the time steps 1 .. T."""
    return range(1, steps + 1, -(-steps // 8))


def labelled(values: Sequence[float]) -> set[int]:
    """Which points of a line find room for a label: of few all, else the first, the best and the last."""
    count = len(values)
    return {*range(count)} if count <= 10 else {0, values.index(max(values)), count - 1}


@drawn
def curves(history: Sequence[Mapping[str, float]], best: int) -> Any:
    """Loss and accuracy over the epochs; `best`, from 1, is the epoch that was kept."""
    figure, ((loss, right),) = canvas(7.6, 2.6, 1, 2)
    epochs = [line["epoch"] + 1 for line in history]
    for axes, keys, scale in ((loss, ("loss", "valid_loss"), 1), (right, ("accuracy", "valid_accuracy"), 100)):
        for key, colour, marker, label in zip(keys, (BLUE, ORANGE), "os", ("training", "validation")):
            if all(key in line for line in history):
                values = [scale * line[key] for line in history]
                axes.plot(epochs, values, marker + "-", color=colour, label=label, markersize=3.5)
        axes.axvline(best, color=GREY, linestyle=":", linewidth=1)
        axes.set_xlabel("epoch")
        whole_ticks(axes.xaxis)
    loss.set(ylabel="loss (training: all terms, weighted)", title="Loss")
    right.set(ylabel="accuracy [%]", title="Accuracy (dotted: epoch kept)")
    right.legend()
    return figure


@drawn
def steps(lines: Mapping[str, Sequence[float]], teacher: float | None = None, part: str = "test") -> Any:
    """Accuracy (shares) of the mean output of the first t steps, a line for each name. part: of the data."""
    figure, ((axes,),) = canvas(4.4 if len(lines) == 1 else 6.2, max(2.7, room(len(lines) + 1)))
    for i, (name, values) in enumerate(lines.items()):
        times, shown = range(1, len(values) + 1), [100 * v for v in values]
        axes.plot(times, shown, label=name, **style(i))
        if len(lines) == 1:
            for i in labelled(shown):
                at = times[i], shown[i]
                axes.annotate(f"{at[1]:.2f}", at, (0, -13), textcoords="offset points", ha="center", fontsize=8)
    if teacher is not None:
        axes.axhline(100 * teacher, color=GREY, linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="time steps t", ylabel=f"{part} accuracy [%]", xticks=ticks(max(map(len, lines.values()))))
    axes.margins(x=0.1, y=0.2)
    if len(lines) > 1 or teacher is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@drawn
def rates(layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Mean firing rate of every layer, and how it is spread over the neurons."""
    import numpy as np

    names = list(layers)
    figure, ((mean, spread),) = canvas(7.6, 0.9 + 0.34 * len(names), 1, 2, sharey=True)
    values = [layers[name]["rate"] for name in names]
    mean.barh(names, values, color=BLUE, height=0.62)
    for i, v in enumerate(values):
        mean.annotate(f"{v:.3f}", (v, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
    for i, name in enumerate(names):
        each = np.asarray(layers[name]["rates"])
        low, quarter, half, three, high = np.percentile(each, (5, 25, 50, 75, 95))
        spread.plot((low, high), (i, i), color=ORANGE, linewidth=1)
        spread.plot((quarter, three), (i, i), color=ORANGE, linewidth=5, solid_capstyle="butt")
        spread.plot(half, i, "o", color=INK, markersize=4)
        silent = f"{np.mean(each == 0):.0%} silent"
        spread.annotate(
            silent,
            (1, i),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    mean.set(
        xlabel="spikes per neuron and step", title="Mean firing rate", xlim=(0, 1.18 * max(values, default=1) or 1)
    )
    spread.set(xlabel="spikes per neuron and step", title="Over neurons: 5, 25, 50, 75, 95 %", xlim=(-0.02, 1.02))
    mean.invert_yaxis()
    return figure


@drawn
def raster(images: Any, spikes: Mapping[str, Any], labels: Sequence[str], most: int = 40) -> Any:
    """Spikes of a few samples. images: [B,C,H,W]; spikes: layer -> [T,B,...] in {0, 1}; at most `most` neurons a layer,
    evenly spaced.
    """
    count, names = len(labels), list(spikes)
    sizes = [min(most, s[0, 0].numel()) for s in spikes.values()]
    figure, axes = canvas(
        7.6,
        1.25 + 0.016 * sum(sizes) + 0.2 * len(names),
        1 + len(names),
        count,
        height_ratios=[max(sizes) * 0.7, *sizes],
    )
    for b in range(count):
        picture(axes[0][b], images[b], labels[b])
        for row, (name, s) in enumerate(spikes.items(), 1):
            panel, flat, size = axes[row][b], s[:, b].flatten(1), sizes[row - 1]
            times, neurons = flat[:, [i * flat.shape[1] // size for i in range(size)]].nonzero().T.tolist()
            panel.scatter([t + 1 for t in times], neurons, s=26, marker="|", color=CYCLE[(row - 1) % 2], linewidths=1.4)
            panel.set(xlim=(0.5, len(s) + 0.5), ylim=(-1, size), yticks=[])
            panel.grid(False)
            panel.set_xticks(ticks(len(s)), [str(t) if row == len(names) else "" for t in ticks(len(s))])
            if not b:
                panel.set_ylabel(name.removesuffix(".neuron"), rotation=0, ha="right", va="center", fontsize=8)
            if row == len(names):
                panel.set_xlabel("time step")
    return figure


def picture(axes: Any, image: Any, title: str) -> None:
    """An image [C,H,W] in [0,1]; the sum of its channels where these are not RGB. The title is cut to its width."""
    shown = image.permute(1, 2, 0) if len(image) == 3 else image.sum(0)
    axes.imshow(shown.clamp(0, 1).numpy() if len(image) == 3 else shown.numpy(), cmap="gray", interpolation="nearest")
    axes.set_title(short(title, 22), fontsize=8.5, loc="center")
    axes.axis("off")


SHADE = 0.45  # opacity of a full cell: numbers on it keep a contrast of 4.5 : 1, on a light page and on a dark one


@drawn
def confusion(matrix: Any, classes: Sequence[str]) -> Any:
    """matrix: [C,C] counts, a row for each true class. Drawn as shares of the row: right in blue, wrong in orange."""
    n = len(classes)
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    figure, ((axes,),) = canvas(min(7.6, 2.6 + 0.42 * n), min(6.8, 1.6 + 0.36 * n))
    if n <= 25:
        from matplotlib.patches import Rectangle

        for i in range(n):
            for j in range(n):
                if share[i, j]:
                    colour = BLUE if i == j else ORANGE
                    strength = float(share[i, j]) ** (1 if i == j else 0.6)
                    axes.add_patch(
                        Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, alpha=SHADE * strength, linewidth=0)
                    )
                    if share[i, j] >= 0.005:
                        axes.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
        axes.set_xticks(range(n), map(short, classes), rotation=40, ha="right")
        axes.set_yticks(range(n), map(short, classes))
    else:
        drawn = axes.imshow(100 * share, cmap="cividis", interpolation="nearest", vmin=0, vmax=100)
        figure.colorbar(drawn, ax=axes, label="[%]")
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class", title="Share of each true class [%]")
    return figure


@drawn
def disagreements(samples: Sequence[Mapping[str, Any]]) -> Any:
    """Samples on which student and teacher differ: {"image", "label", "student": {class: p}, "teacher": {class: p}}."""
    columns = 3
    rows = -(-len(samples) // columns)
    figure, axes = canvas(7.6, 1.55 * rows + 0.3, rows, 2 * columns, width_ratios=[1, 1.25] * columns)
    for i in range(rows * columns):
        image, bars = axes[i // columns][2 * (i % columns) : 2 * (i % columns) + 2]
        if i >= len(samples):
            image.axis("off")
            bars.axis("off")
            continue
        sample = samples[i]
        picture(image, sample["image"], sample["label"])
        names = list(sample["student"])
        for k, (who, colour) in enumerate((("teacher", GREY), ("student", BLUE))):
            at = [j + 0.2 - 0.4 * (k == 0) for j in range(len(names))]
            bars.barh(at, [100 * p for p in sample[who].values()], height=0.38, color=colour, label=who)
        labels = [short(n) + " *" if n == sample["label"] else short(n) for n in names]
        bars.set_yticks(range(len(names)), labels, fontsize=7.5)
        bars.set(xlim=(0, 100))
        bars.set_xticks((0, 50, 100))
        bars.tick_params(axis="x", labelsize=7.5)
        bars.invert_yaxis()
        if i // columns == rows - 1 or i + columns >= len(samples):
            bars.set_xlabel("p [%]", fontsize=8)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


NAMED = 9  # points whose names still find room


@drawn
def pareto(
    points: Sequence[Mapping[str, Any]], panels: Sequence[tuple[str, str]], joined: bool = False, part: str = "test"
) -> Any:
    """Accuracy against costs. points: {"name", "accuracy", "spread", key of each panel}; panels: (key, axis label).

    joined: the points are one network after 1 .. T steps, of which those `labelled` have their names.  A ring marks
    what no other point beats in both; of more than NAMED networks only those have their names, and one that lies far
    below is told and not drawn. part: of the data.
    """
    many = len(points) > NAMED and not joined
    low = floor([p["accuracy"] for p in points]) if many else 0.0
    line = [p for p in points if joined and not p.get("reference")]
    unnamed = [p["name"] for i, p in enumerate(line) if i not in labelled([p["accuracy"] for p in line])]
    figure, (axes,) = canvas(7.6, 4.2 if many else 3.0, 1, len(panels), sharey=True)
    for panel, (key, label) in zip(axes, panels):
        shown = [p for p in points if p.get(key) is not None and p["accuracy"] >= low]
        panel.plot([p[key] for p in line], [100 * p["accuracy"] for p in line], color=BLUE, zorder=1)
        for i, p in enumerate(points):  # so that a row has its colour of the other figures
            if p not in shown:
                continue
            reference = bool(p.get("reference"))
            colour = GREY if reference else BLUE if joined else CYCLE[i % 7]
            marker = "s" if reference else "o" if joined else MARKERS[i % 7]
            spread = 100 * p["spread"] if p.get("spread") else None
            panel.errorbar(p[key], 100 * p["accuracy"], spread, fmt=marker, color=colour, elinewidth=1, capsize=2)
            others = [q for q in shown if (q[key], q["accuracy"]) != (p[key], p["accuracy"])]
            beaten = any(q[key] <= p[key] and q["accuracy"] >= p["accuracy"] for q in others)
            if not beaten:
                panel.plot(
                    p[key], 100 * p["accuracy"], "o", markersize=11, fillstyle="none", color=colour, markeredgewidth=1
                )
            if p["name"] not in unnamed and not (many and beaten and not reference):
                panel.annotate(p["name"], (p[key], 100 * p["accuracy"]), (7, 5), textcoords="offset points", fontsize=8)
        panel.set_xlabel(label)
        panel.margins(x=0.22, y=0.18)
        panel.locator_params(axis="x", nbins=4)
        if shown and max(p[key] for p in shown) > 30 * max(min(p[key] for p in shown), 1e-9):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")  # the default writes powers as formulas
            panel.xaxis.set_minor_formatter("")
    axes[0].set_ylabel(f"{part} accuracy [%]")
    if below := [f"{p['name']} {100 * p['accuracy']:.2f}" for p in points if p["accuracy"] < low]:
        axes[0].annotate(f"below: {', '.join(below)}", (0, 0), (4, 5), "axes fraction", "offset points", fontsize=8)
    return figure


def floor(accuracies: Sequence[float]) -> float:
    """Three times the middle half below that half: what is lower lies far from the others."""
    import numpy as np

    first, third = np.percentile(accuracies, (25, 75))
    return first - 3 * (third - first)


@drawn
def energies(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The table of `energy.table`: arithmetic, and neurons and memory on top of it."""
    figure, ((axes,),) = canvas(7.6, 0.9 + 0.34 * len(rows))
    names = [f"{row['name']}, {row['precision']}" for row in rows]
    compute = [row["compute"] for row in rows]
    rest = [row["total"] - row["compute"] for row in rows]
    axes.barh(names, compute, color=ORANGE, height=0.62, label="arithmetic of synapses")
    axes.barh(names, rest, left=compute, color=SKY, height=0.62, label="memory and neurons")
    for i, row in enumerate(rows):
        axes.annotate(
            f"{row['compute']:,.0f} + {row['total'] - row['compute']:,.0f}",
            (row["total"], i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xlabel("energy of a sample, estimated for 45 nm [nJ]")
    axes.set_xlim(0, 1.22 * max(row["total"] for row in rows))
    axes.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@drawn
def dots(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A dot a seed and a bar at the mean of every method's accuracies."""
    figure, ((axes,),) = canvas(7.6, 0.8 + 0.38 * len(rows))
    for i, row in enumerate(rows):
        values, colour = [100 * a for a in row["accuracies"]], CYCLE[i % 7]
        axes.plot(values, [i] * len(values), MARKERS[i % 7], color=colour, alpha=0.65)
        axes.plot([100 * row["accuracy"]] * 2, [i - 0.3, i + 0.3], color=colour, linewidth=2.5)
        axes.annotate(
            f"{100 * row['accuracy']:.2f}",
            (max(values), i),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("test accuracy [%]; a mark is a seed, a bar the mean")
    axes.margins(x=0.1)
    axes.set_ylim(len(rows) - 0.3, -0.7)
    return figure


@drawn
def differences(rows: Sequence[Mapping[str, Any]], baseline: str) -> Any:
    """Paired differences to the baseline with their intervals: a mark a seed."""
    shown = [row for row in rows if "difference" in row]
    figure, ((axes,),) = canvas(7.6, 0.8 + 0.42 * len(shown))
    axes.axvline(0, color=INK, linewidth=1)
    for i, row in enumerate(shown):
        d = row["difference"]
        colour = GREY if row["verdict"] not in ("better", "worse") else BLUE if d["mean"] > 0 else ORANGE
        if d["low"] is not None:
            axes.plot([100 * d["low"], 100 * d["high"]], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([100 * v for v in d["values"]], [i + 0.22] * len(d["values"]), "|", color=colour, markersize=7)
        axes.plot(100 * d["mean"], i, "o", color=colour, markersize=6)
        axes.annotate(
            row["verdict"],
            (1, i),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(range(len(shown)), [row["name"] for row in shown])
    confidence = shown[0]["difference"]["confidence"]
    axes.set_xlabel(
        f"test accuracy minus that of {baseline}, same seed [points]; {100 * confidence:g}% interval, ticks: seeds"
    )
    axes.margins(x=0.08)
    axes.set_ylim(len(shown) - 0.3, -0.7)
    return figure


@drawn
def learning(lines: Mapping[str, Sequence[float]]) -> Any:
    """Mean validation accuracy (shares) of every method over the epochs."""
    figure, ((axes,),) = canvas(6.2, max(2.8, room(len(lines))))
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(range(1, len(values) + 1), [100 * v for v in values], label=name, markersize=4, **style(i))
    axes.set(xlabel="epoch", ylabel="validation accuracy [%]")
    whole_ticks(axes.xaxis)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
