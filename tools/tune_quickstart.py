"""How the quickstart's settings were chosen: a grid of runs, ranked by mean accuracy on the validation split.

Run:    python tools/tune_quickstart.py --out runs/tune
Three learning rates and three seeds for the twin, ce, kd and bkd; two more settings of bkd have one learning rate. The
test split is not looked at. About an hour on 2 cores; finished runs are not repeated.
Writes results/quickstart/tuning.md.
"""

import argparse
from pathlib import Path
from statistics import mean

from spikedistill.recipes.distill import distill
from spikedistill.report import tables

WIDTHS = "(16, 64, 128)"
SEEDS = (0, 1, 2)
GRID: dict[str, tuple[dict, tuple[float, ...]]] = {
    "twin": (dict(methods="ce", student=f"small(widths={WIDTHS}, neuron=relu)"), (0.01, 0.02, 0.04)),
    "ce": (dict(methods="ce"), (0.02, 0.04, 0.06)),
    "kd-2-.7-.3": (dict(methods="kd(tau=2.0, weight=0.7, ce=0.3)"), (0.02, 0.04, 0.06)),
    "bkd-m5-w0": (dict(methods="bkd(weight=5.0, reduction=mean, hidden=32, wsld=0)"), (0.02, 0.04, 0.06)),
    "bkd-m2-w0": (dict(methods="bkd(weight=2.0, reduction=mean, hidden=32, wsld=0)"), (0.04,)),
    "bkd-m2-w.3": (dict(methods="bkd(weight=2.0, reduction=mean, hidden=32, wsld=0.3)"), (0.04,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    out = parser.parse_args().out
    common = dict(data="fashion-mini", augment="flip", batch=64, epochs=8, test=False)
    teacher = str(out / "teacher")
    big = "small(widths=(32, 64, 128), depth=2, neuron=relu)"
    distill(**common, seed=0, student=big, methods="ce", lr=0.005, out=teacher)
    rows = []
    for name, (how, rates) in GRID.items():
        how = dict(student=f"small(widths={WIDTHS})", teacher=teacher if how["methods"] != "ce" else None) | how
        for lr in rates:
            runs = [distill(**common | how, lr=lr, seed=s, out=str(out / f"{name}-lr{lr:g}-s{s}")) for s in SEEDS]
            rows.append((mean(found := [r["valid"]["accuracy"] for r in runs]), name, how["methods"], lr, found))
    rows.sort(reverse=True)
    text = [
        [name, method, f"{lr:g}", f"{a:.2%}", ", ".join(f"{v:.2%}" for v in each)] for a, name, method, lr, each in rows
    ]
    table = tables.Table(["runs", "method", "lr", "validation", "seeds 0, 1, 2"], text, "Tuning of the quickstart")
    tables.show(table)
    Path("results/quickstart/tuning.md").write_text(tables.markdown(table))


if __name__ == "__main__":
    main()
