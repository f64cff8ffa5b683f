"""What recipes share: a row of means over seeds, and the table of rows, on the terminal, in files and as a report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spikedistill import runs
from spikedistill.report import figures, page, tables
from spikedistill.report.paired import difference

Columns = Sequence[tuple[str, Callable[[dict[str, Any]], str]]]
"""Head of a column, and the text of a row in it."""


def row(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: means over seeds."""
    accuracies = [r["test"]["accuracy"] for r in results]
    operations = [r["activity"]["operations"] for r in results]
    rates = [r["activity"]["rate"] for r in results]
    clock = [r["train_cpu_seconds"] for r in results]
    return {
        "name": name,
        "accuracies": accuracies,
        "accuracy": mean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "rate": mean(rates) if rates[0] is not None else None,
        "ac": mean(o["ac"] for o in operations),
        "mac": mean(o["mac"] for o in operations),
        "samples": results[0]["test"]["samples"],
        "parameters": results[0]["parameters"]["student"],
        "seconds": mean(r["train_seconds"] for r in results),
        "cpu_seconds": None if None in clock else mean(clock),
        "runs": [Path(r["out"]).name for r in results],
    }


def over(r: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The paired difference of two rows; seeds that happen to agree to a sample are no certainty."""
    return vars(difference(r["accuracies"], base["accuracies"], resolution=1 / r["samples"]))


def accuracy(r: dict[str, Any]) -> str:
    return f"{100 * r['accuracy']:.2f}" + (f"±{100 * r['spread']:.2f}" if r["spread"] is not None else "")


def points(d: dict[str, Any] | None) -> str:
    """A paired difference in points, mean ± half the interval; empty where there is none."""
    if d is None:
        return ""
    half = f"±{100 * (d['high'] - d['mean']):.2f}" if d["high"] is not None else ""
    return f"{100 * d['mean']:+.2f}{half}"


def cost(r: dict[str, Any]) -> str:
    """Processor seconds of training, which other programs do not lengthen; empty where they were not counted."""
    return "" if r["cpu_seconds"] is None else f"{r['cpu_seconds']:.0f}"


def many(count: int, what: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{count} {what}" + "s" * (count != 1)


def publish(
    out: Path, name: str, about: Mapping[str, Any], rows: list[dict[str, Any]], columns: Columns, *base: str
) -> Path:
    """Write NAME.json, .svg, .md and report.html into a folder and show the table. Returns the path of the report.

    about: what goes into the JSON file before the machine and the rows. Its "title" heads table and figure; the report
    also shows its "config", "seconds", "legend", and its "pictures": file in the folder -> title and caption.
    base: the row that the figure sets apart, where it is not the third.
    """
    title = about["title"]
    table = tables.Table([head for head, _ in columns], [[text(r) for _, text in columns] for r in rows], title)
    cells = {"heads": table.heads, "rows": table.rows}
    made = {"recipe": name, **about, "machine": runs.machine(), "rows": rows, "table": cells}
    runs.write_json(out / f"{name}.json", made)
    figures.accuracies(rows, out / f"{name}.svg", title, *base)
    (out / f"{name}.md").write_text(tables.markdown(table))
    tables.show(table)
    return page.write(out)
