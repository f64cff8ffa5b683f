"""How the quickstart's settings were chosen: every run of a grid, ranked by accuracy on the validation split.

Run:    python tools/tune_quickstart.py --out runs/tune
The same learning rates for every network and method; distillation weights at the best of them. The test split is not
looked at. About an hour on 2 cores; finished runs are not repeated.
"""

import argparse
from pathlib import Path

from spikedistill.recipes.distill import distill

STUDENT = "small(widths=(16, 64, 128), neuron={neuron})"
SPIKING = STUDENT.format(neuron="lif(decay_input=False)")
RATES = (0.01, 0.02, 0.04, 0.08)
GRID: dict[str, dict] = {
    "twin": dict(student=STUDENT.format(neuron="relu"), methods="ce"),
    "ce": dict(student=SPIKING, methods="ce"),
    "ce, input decayed": dict(student=STUDENT.format(neuron="lif"), methods="ce"),
    "ce, soft reset": dict(student=SPIKING.replace("False", "False, v_reset=None"), methods="ce"),
    "ce, shifted too": dict(student=SPIKING, methods="ce", augment="flip|shift(2)"),
    "kd, tau 4, weight 1": dict(methods="kd"),
    "kd, tau 2, 0.3 + 0.7": dict(methods="kd(tau=2.0, weight=0.7, ce=0.3)"),
    "bkd, weight 7e-5": dict(methods="bkd"),
    "bkd, weight 5e-4": dict(methods="bkd(weight=5e-4)"),
    "bkd, weight 1e-3": dict(methods="bkd(weight=1e-3)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--epochs", type=int, default=8)
    out, epochs = (args := parser.parse_args()).out, args.epochs
    common = dict(data="fashion-mini", augment="flip", batch=64, epochs=epochs, seed=0)
    teacher = "small(widths=(32, 64, 128), depth=2, neuron=relu)"
    distill(**common, student=teacher, methods="ce", lr=0.005, out=str(out / "teacher"))
    rows = []
    for i, (name, how) in enumerate(GRID.items()):
        how = dict(student=SPIKING) | how
        if how["methods"] != "ce":
            how["teacher"] = str(out / "teacher")
        for lr in RATES:
            result = distill(**common | how, lr=lr, out=str(out / f"{i:02d}-{lr:g}"))
            rows.append((result["valid"]["accuracy"], lr, name))
    for accuracy, lr, name in sorted(rows, reverse=True):
        print(f"{accuracy:.2%}  lr {lr:<6g} {name}")


if __name__ == "__main__":
    main()
