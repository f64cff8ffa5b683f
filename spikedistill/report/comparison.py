"""From the results of runs to rows that can be compared: means, paired differences, costs, what may be concluded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from spikedistill.report import energy
from spikedistill.report.paired import Difference, difference
from spikedistill.report.tables import Table
from spikedistill.report.tables import csv as as_csv

Result = dict[str, Any]
Row = dict[str, Any]


def rows_of(results: Mapping[str, Mapping[int, Result]], baseline: str, confidence: float = 0.95) -> list[Row]:
    """A row for each method that has results. results: method -> seed -> content of result.json.

    "difference" is to the baseline over the seeds that both have. "verdict": better or worse where the interval,
    widened for the number of comparisons, leaves zero out; else unclear.
    """
    results = {name: seeds for name, seeds in results.items() if seeds}
    against = [n for n, s in results.items() if n != baseline and len(_shared(s, results.get(baseline, {}))) > 1]
    rows = []
    for name, of in results.items():
        row = measures(name, of)
        if name != baseline and (seeds := _shared(of, results.get(baseline, {}))):
            plain = paired(of, results[baseline], seeds, confidence)
            strict = paired(of, results[baseline], seeds, 1 - (1 - confidence) / max(len(against), 1))
            row["difference"] = asdict(plain) | {"seeds": seeds}
            row["verdict"] = verdict(strict)
            row["verdict_confidence"] = strict.confidence
        rows.append(row)
    return rows


def paired(a: Mapping[int, Result], b: Mapping[int, Result], seeds: Sequence[int], confidence: float) -> Difference:
    """Differences of test accuracy over seeds; one image is the least that accuracy can differ by."""
    one = 1 / min(r[s]["test"]["samples"] for r in (a, b) for s in seeds)
    return difference([accuracy(a[s]) for s in seeds], [accuracy(b[s]) for s in seeds], confidence, one)


def _shared(a: Mapping[int, Any], b: Mapping[int, Any]) -> list[int]:
    return [seed for seed in a if seed in b]


def accuracy(result: Result) -> float:
    return result["test"]["accuracy"]


def verdict(d: Difference) -> str:
    if d.low is None:
        return "one seed"
    return "unclear" if d.covers_zero else "better" if d.mean > 0 else "worse"


def measures(name: str, of: Mapping[int, Result]) -> Row:
    """Accuracy and cost of one method: means over its seeds."""
    results = list(of.values())
    accuracies = [accuracy(r) for r in results]

    def average(get: Callable[[Result], Any]) -> float | None:
        values = [get(r) for r in results]
        return mean(values) if values and all(v is not None for v in values) else None

    joules = [energy.per_sample(r["activity"]) for r in results]
    known = [e for e in joules if e is not None]
    spent = {k: mean(e[k] for e in known) if len(known) == len(joules) else None for k in ("compute", "total")}
    return {
        "name": name,
        "seeds": list(of),
        "accuracies": accuracies,
        "accuracy": mean(accuracies),
        "spread": stdev(accuracies) if len(accuracies) > 1 else None,
        "valid": average(lambda r: r["valid"]["accuracy"] if "valid" in r else None),
        "by_step": [mean(at) for at in zip(*(r["test"]["by_step"] for r in results), strict=True)],
        "best_epochs": [r["best_epoch"] for r in results],
        "rate": average(lambda r: r["activity"]["rate"]),
        "ac": average(lambda r: r["activity"]["operations"]["ac"]),
        "mac": average(lambda r: r["activity"]["operations"]["mac"]),
        "energy_compute_nj": spent["compute"],
        "energy_nj": spent["total"],
        "seconds": average(lambda r: r["train_seconds"] - for_cache(r, "seconds")),
        "cpu_seconds": average(_cpu_seconds),
        "peak_memory_bytes": average(lambda r: r["peak_memory_bytes"]),
        "parameters": results[0]["parameters"]["student"],
        "nonzero": average(lambda r: r["parameters"].get("nonzero")),
        "trained": results[0]["parameters"].get("student_in_training"),
        "training_only": results[0]["parameters"]["training_only"],
        "teacher_calls": average(lambda r: r.get("teacher_calls")),
    }


def _cpu_seconds(result: Result) -> float | None:
    used = result.get("train_cpu_seconds") if result.get("device") == "cpu" else None
    return None if used is None else used - for_cache(result, "cpu_seconds")


def for_cache(result: Result, clock: str) -> float:
    """Seconds of training that went into outputs of the teacher for all runs: the first to ask would pay them alone."""
    spent = result.get("teacher_cache", {})
    return spent.get(clock, spent.get("seconds", 0.0))  # earlier versions had one clock


def conclusions(
    results: Mapping[str, Mapping[int, Result]], rows: Sequence[Row], baseline: str, confidence: float = 0.95
) -> list[str]:
    """What the numbers allow to say, in sentences. The best is named only where it beats every other row."""
    said = []
    compared = [row for row in rows if "difference" in row]
    for row in compared:
        d = row["difference"]
        if row["verdict"] in ("better", "worse"):
            interval = f"{100 * d['confidence']:g}% interval {points(d['low'])} to {points(d['high'])}"
            said.append(
                f"{row['name']} is {row['verdict']} than {baseline}: {points(d['mean'])} points, {interval}, "
                f"{len(d['seeds'])} seeds."
            )
    open_ = [row["name"] for row in compared if row["verdict"] == "unclear"]
    if open_:
        said.append(f"Not shown to differ from {baseline}: {', '.join(open_)}.")
    if single := [row["name"] for row in compared if row["verdict"] == "one seed"]:
        said.append(f"A single seed says nothing about the spread, so nothing is said of {', '.join(single)}.")
    if len(rows) > 1:
        top = max(rows, key=lambda row: row["accuracy"])["name"]
        others = [row["name"] for row in rows if row["name"] != top]
        strict = 1 - (1 - confidence) / len(others)
        beaten = []
        for name in others:
            seeds = _shared(results[top], results[name])
            if seeds and verdict(paired(results[top], results[name], seeds, strict)) == "better":
                beaten.append(name)
        if len(beaten) == len(others):
            said.append(f"{top} is the best of the {len(rows)}.")
        else:
            close = ", ".join(name for name in others if name not in beaten)
            said.append(f"No winner: {top} has the highest mean, and the seeds do not tell it from {close}.")
    return said


def points(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return "" if share is None else f"{100 * share:+.2f}".replace("-", "−")


def _accuracy(row: Row) -> str:
    return f"{row['accuracy']:.2%}" + (f" ± {100 * row['spread']:.2f}" if row["spread"] is not None else "")


def _interval(row: Row) -> str:
    d = row.get("difference")
    if d is None or d["low"] is None:
        return ""
    return f"[{points(d['low'])}, {points(d['high'])}]"


def number(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


ACCURACY: list[tuple[str, Callable[[Row], str]]] = [
    ("method", lambda r: r["name"]),
    ("valid", lambda r: number(r["valid"], "{:.2%}")),
    ("test", _accuracy),
    ("Δ", lambda r: points(r["difference"]["mean"]) if "difference" in r else ""),
    ("interval", _interval),
    ("verdict", lambda r: r.get("verdict", "baseline" if r.get("baseline") else "")),
    ("seeds", lambda r: str(len(r["seeds"]))),
]
DEPLOYED: list[tuple[str, Callable[[Row], str]]] = [
    ("method", lambda r: r["name"]),
    ("test", _accuracy),
    ("params", lambda r: f"{r['parameters']:,}"),
    ("not 0", lambda r: number(r.get("nonzero"), "{:,.0f}")),
    ("rate", lambda r: number(r["rate"], "{:.3f}")),
    ("M adds", lambda r: number(r["ac"] and r["ac"] / 1e6, "{:.2f}")),
    ("M mults", lambda r: number(r["mac"] and r["mac"] / 1e6, "{:.2f}")),
    ("nJ", lambda r: number(r["energy_nj"], "{:,.0f}")),
]
TRAINING: list[tuple[str, Callable[[Row], str]]] = [
    ("method", lambda r: r["name"]),
    ("CPU s", lambda r: number(r.get("cpu_seconds"), "{:.0f}")),
    ("train s", lambda r: number(r["seconds"], "{:.0f}")),
    ("peak MB", lambda r: number(r["peak_memory_bytes"] and r["peak_memory_bytes"] / 1e6, "{:.0f}")),
    ("trained", lambda r: number(r.get("trained"), "{:,}")),
    ("extra", lambda r: f"{r['training_only']:,}"),
    ("teacher", lambda r: number(r["teacher_calls"], "{:.3g}")),
]


def csv(rows: Sequence[Row]) -> str:
    """Every number of the rows, not rounded: shares, not percent. "accuracies" are in the order of "seeds"."""
    heads = ["valid", "accuracy", "spread", "rate", "ac", "mac", "energy_compute_nj", "energy_nj", "seconds"]
    heads += ["cpu_seconds", "peak_memory_bytes", "parameters", "nonzero", "trained", "training_only", "teacher_calls"]
    lines = []
    for row in rows:
        d = row.get("difference", {})
        cells = [row[h] for h in heads] + [d.get(k) for k in ("mean", "low", "high", "confidence")]
        listed = [" ".join(map(str, row[k])) for k in ("seeds", "accuracies")]
        lines.append([row["name"], *("" if v is None else str(v) for v in cells), row.get("verdict", ""), *listed])
    heads = ["method", *heads, "difference", "low", "high", "confidence", "verdict", "seeds", "accuracies"]
    return as_csv(Table(heads, lines))


def tables(rows: Sequence[Row], title: str, baseline: str, confidence: float) -> list[Table]:
    """Three tables: how good; how large and busy the student is that is deployed; what training it took."""
    rows = [row | {"baseline": row["name"] == baseline} for row in rows]
    clock = "train s" if timed(rows) else "CPU s"
    costs = [("The student as deployed", DEPLOYED), ("Its training", [of for of in TRAINING if of[0] != clock])]
    heads = [
        f"Δ to {baseline}" if h == "Δ" else f"{100 * confidence:g}% interval" if h == "interval" else h
        for h, _ in ACCURACY
    ]
    return [
        Table(heads, [[text(row) for _, text in ACCURACY] for row in rows], title),
        *(Table([h for h, _ in of], [[text(row) for _, text in of] for row in rows], name) for name, of in costs),
    ]


def timed(rows: Sequence[Row]) -> bool:
    """Whether processor time is known of every row: other programs do not lengthen it, as they do seconds."""
    return all(row.get("cpu_seconds") is not None for row in rows)


def legend(rows: Sequence[Row], confidence: float, together: int, cached: bool = False) -> list[str]:
    """What the columns mean. cached: outputs of the teacher were kept for all runs, and seconds are without them."""
    count = sum(row.get("verdict") in ("better", "worse", "unclear") for row in rows)
    clock = f"train s: seconds of training{f' with {together} runs side by side' if together > 1 else ''}"
    if timed(rows):
        clock = "CPU s: seconds of training, of processor time, whatever else ran on the machine"
    if cached:
        clock += ", without the teacher's for what the cache did not have"
    rewritten: dict[str, list[str]] = {}
    for row in rows:
        if row.get("rewritten"):
            rewritten.setdefault(row["rewritten"], []).append(row["name"])
    by = "; ".join(f"{', '.join(names)} by {how}" for how, names in rewritten.items())
    return [
        "valid, test: accuracy, mean (± standard deviation) over seeds; every choice was made on valid, test was read "
        "once a run.",
        "Δ: points of test accuracy, seed by seed; interval: Student's t over seeds, for this split of these data."
        + (
            f" A verdict asks for {1 - (1 - confidence) / count:.2%} confidence, because {count} rows are compared."
            if count > 1
            else ""
        ),
        "params: of the student as it is saved, rewrites folded back; not 0: those that pruning left; rate: spikes per "
        "neuron and step. M adds, M mults: million operations an image, none for a weight of 0; nJ: energy of an image "
        "at 45 nm in float32 with memory traffic, an estimate (report/energy.py).",
        f"{clock}; peak MB: most memory of the process, with what it has mapped of a cache (of tensors on a GPU); "
        "trained: parameters of the student while it is trained; extra: parameters that only training has; teacher: "
        "how often a batch asks it.",
        *([f"Rewritten before training, so not from the same initialisation as the others: {by}."] if by else []),
    ]
