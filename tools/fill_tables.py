"""Fill the tables of README.md and docs/results.md from results/: python tools/fill_tables.py

A table stands between `<!-- results/NAME/FILE -->` and `<!-- end -->`: of compare.json a short form, the baseline first
and the others by validation, which decides; of an .md file its first table as it is. tests/test_results.py checks them.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
PLACE = re.compile(r"(<!-- (results/\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def filled(page: str) -> str:
    """The text of a page with every table made anew."""
    return PLACE.sub(lambda place: f"{place[1]}\n{table(ROOT / place[2])}\n{place[3]}", page)


def table(file: Path) -> str:
    if file.suffix == ".md":
        lines = file.read_text().split("\n\n")
        return next(block.strip() for block in lines if block.startswith("| ")) + "\n"
    compared = json.loads(file.read_text())
    first, *others = compared["rows"]
    rows = [first, *sorted(others, key=lambda row: -row["valid"])]
    columns = columns_of(rows, compared["baseline"])
    head = "| " + " | ".join(columns) + " |\n|---|" + "---:|" * (len(columns) - 1) + "\n"
    return head + "".join("| " + " | ".join(cell(row) for cell in columns.values()) + " |\n" for row in rows)


def columns_of(rows: list[Row], baseline: str) -> dict[str, Any]:
    """Head -> cell of a row; what is the same in every row is left out."""
    columns = {
        "row": lambda r: r["name"],
        "validation %": lambda r: f"{100 * r['valid']:.2f}",
        "test %": lambda r: f"{100 * r['accuracy']:.2f}" + (f"±{100 * r['spread']:.2f}" if len(r["seeds"]) > 1 else ""),
        f"over {baseline}": over,
        "tuned to": lambda r: tuned(r["tuned"]["values"]),
        "weights": lambda r: f"{r['nonzero']:,.0f}",
        "rate": lambda r: f"{r['rate']:.3f}",
        "M adds": lambda r: f"{r['ac'] / 1e6:.2f}",
        "CPU s": lambda r: f"{r['cpu_seconds']:.0f}",
    }
    if not all("tuned" in row for row in rows):
        del columns["tuned to"]
    if len({row["nonzero"] for row in rows}) == 1:
        del columns["weights"]
    return columns


def over(row: Row) -> str:
    """Points over the baseline, ± half the interval."""
    if (d := row.get("difference")) is None:
        return ""
    half = "" if d["low"] is None else f"±{50 * (d['high'] - d['low']):.2f}"
    return f"{100 * d['mean']:+.2f}{half}"


def tuned(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
