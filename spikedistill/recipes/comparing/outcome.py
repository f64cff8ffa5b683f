"""What comes out of a comparison: means and differences of the runs that are finished, in files and on the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikedistill import runs
from spikedistill.recipes import distill
from spikedistill.recipes.comparing.folder import strange
from spikedistill.recipes.comparing.rows import COMMON, Row, jobs_of
from spikedistill.recipes.distilling.teacher import told
from spikedistill.report import comparison, energy, tables
from spikedistill.report.activity import activity
from spikedistill.report.summary import many


def summary(c: Any, rows: Sequence[Row], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Write and print the comparison of what is finished."""
    out, missing, kinds, where = Path(c.out), [], set(), set()
    results: dict[str, dict[int, Any]] = {row.name: {} for row in rows}
    for row in rows:
        for job, seed in zip(jobs_of(c, row), c.seeds):
            if job.finished:
                results[row.name][seed] = runs.read_json(job.folder / "result.json")
                if "precision" not in row.own:
                    of = results[row.name][seed]
                    where.add(f"{of['precision']} on {of['device'].partition(':')[0]}")
                kinds.add(json.dumps(runs.read_json(job.folder / "machine.json")["versions"], sort_keys=True))
            else:
                missing.append(job.name)
    results = {name: of for name, of in results.items() if of}
    baseline = c.baseline or rows[0].name
    compared, named = comparison.rows_of(results, baseline, c.confidence), {row.name: row for row in rows}
    for line in compared:
        row = named[line["name"]]
        line |= {"settings": settings_of(c, row), "rewritten": row.rewritten}
        line |= {"tuned": tuned[row.name]} if row.name in tuned else {}
    notes = [f"not finished: {', '.join(missing)}"] if missing else []
    notes += [f"made by {len(kinds)} sets of versions: " + "; ".join(sorted(kinds))] if len(kinds) > 1 else []
    if len(where) > 1:
        notes.append(f"runs were made in {' and in '.join(sorted(where))}: rows may differ by more than the method")
    notes += [f"{row.name} {row.note}" for row in rows if row.note]
    if strangers := strange(c, rows):
        notes.append(f"not in this comparison, left alone: {', '.join(strangers)}")
    if c.tune:
        of = "; ".join(f"{row.name}: {', '.join(tuned[row.name]['ranges'])}" for row in rows)
        notes.append(
            f"{many(c.tune, 'trial')} a row of {many(c.tune_epochs or c.epochs, 'epoch')} chose on validation ({of})"
        )
        lost = {row.name: sum("failed" in trial for trial in tuned[row.name]["trials"]) for row in rows}
        if any(lost.values()):
            counts = ", ".join(f"{count} of {name}" for name, count in lost.items() if count)
            notes.append(f"trials that failed and count as accuracy 0: {counts}; why is in '{out / 'tune'}'")
    cache = cached(results) if c.cache_teacher else None
    if cache:
        saved = cache["saved_seconds"]
        worth = "time saved unknown: none was computed here" if saved is None else f"about {saved:.0f} s saved"
        worth += "; it was full, and the rest was computed each time" if cache["full"] else ""
        notes.append(f"teacher outputs: {cache['computed']:,} computed, {cache['read']:,} read from the cache, {worth}")
    made_of = runs.read_json(out / "origin.json")
    if known := known_of_teacher(c, rows, results):
        notes.append(known)
    teacher, (energies, without) = teacher_row(c, made_of["data"]), references(c, rows, results, baseline)
    title = f"{c.data}, {c.student}, T = {c.steps}, {many(c.epochs, 'epoch')}, {many(len(c.seeds), 'seed')}"
    result = {
        "title": title,
        "baseline": baseline,
        "confidence": c.confidence,
        "seeds": c.seeds,
        "conclusions": comparison.conclusions(results, compared, baseline, c.confidence),
        "notes": notes,
        "not_shown": not_shown(c, teacher, results, without),
        "rows": compared,
        "teacher": teacher,
        "teacher_cache": cache,
        "cache_left_out": any(comparison.for_cache(r, "seconds") for of in results.values() for r in of.values()),
        "references": energies,
        "jobs": c.jobs,
        "settings": c.model_dump(include={*COMMON}),
        "origin": made_of,
        "machine": runs.machine(),
        "seconds": sum(r["train_seconds"] for of in results.values() for r in of.values()),
        "missing": missing,
    }
    write(result, c)
    return result


def cached(results: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """What the cache of teacher outputs was worth to all runs, from the time that the computed ones took."""
    kept = [r["teacher_cache"] for of in results.values() for r in of.values() if r.get("teacher_cache")]
    computed = sum(k.get("computed", 0) for k in kept)
    seconds = sum(k.get("computed_seconds", k.get("seconds", 0.0)) for k in kept)  # earlier versions had one
    read, full = max(0, sum(k["asked"] for k in kept) - computed), any(k.get("full") for k in kept)
    saved = read * seconds / computed if computed else None
    return {"computed": computed, "read": read, "saved_seconds": saved, "full": full}


def known_of_teacher(c: Any, rows: Sequence[Row], results: Mapping[str, Mapping[int, Any]]) -> str | None:
    """What the first run that has a teacher has found of it, before training; None where none has."""
    for row in rows:
        for job, seed in zip(jobs_of(c, row), c.seeds):
            share = results.get(row.name, {}).get(seed, {}).get("teacher_accuracy")
            if share is not None:
                classes = runs.about(job.folder).get("classes") or []
                return told(share, len(classes) or 1000).rstrip("?")
    return None


def settings_of(c: Any, row: Row) -> dict[str, Any]:
    own = {k: v for k, v in row.own.items() if k != "teacher"}
    return (
        {"name": row.name, "methods": list(row.methods), "lr": c.lr}
        | own
        | {k: v for k, v in row.settings.items() if v}
    )


def teacher_row(c: Any, data: str) -> dict[str, Any] | None:
    """What is known of the teacher: size, and accuracy if of these data (their print), where it is a run folder."""
    if c.teacher is None:
        return None
    file, origin, config = (Path(c.teacher) / f"{name}.json" for name in ("result", "origin", "config"))
    if not file.exists():
        return {"name": c.teacher}
    result = runs.read_json(file)
    if origin.exists():
        same = runs.read_json(origin)["data"] == data
    else:  # of an earlier version
        same = config.exists() and runs.read_json(config)["data"] == c.data and c.pair is None
    return {
        "name": c.teacher,
        "accuracy": result.get("test", {}).get("accuracy") if same else None,
        "parameters": result.get("parameters", {}).get("student"),
        "seconds": result.get("train_seconds"),
    }


def not_shown(
    c: Any, teacher: Mapping[str, Any] | None, results: Mapping[str, Mapping[int, Any]], without: str
) -> list[str]:
    """What tables and figures leave out, and why. without: why there is no energy of the teacher."""
    of = [n for n, by in results.items() if not all(energy.counted(r["activity"]) for r in by.values())]
    said = []
    if of:
        said.append(f"Energy of {', '.join(of)}: {FOREIGN}.")
    if without:
        said.append(f"Energy of the teacher: {without}.")
    if teacher and teacher.get("accuracy") is None:
        why = "was not tested on these data with this split" if Path(c.teacher).exists() else "is no run folder"
        said.append(f"Test accuracy of the teacher: '{c.teacher}' {why}.")
    return said


FOREIGN = "the neurons are another library's, whose spikes are not counted"


def references(
    c: Any, rows: Sequence[Row], results: Mapping[str, Mapping[int, Any]], baseline: str
) -> tuple[list[dict[str, Any]] | None, str]:
    """Energy of the baseline's student, the teacher and the ANN of the student's shape, as `energy.table` has it, and
    why the teacher is not among them, "" where it is or there is none.
    """
    known = (r["activity"] for r in results.get(baseline, {}).values())
    measured = next((a for a in known if "synapses" in a and energy.counted(a)), None)
    if measured is None:
        return None, ""
    teacher, why = None, ""
    if c.teacher:
        try:
            data = distill.load_data(c)
            shown = distill.seen_by_teacher(data, [name for row in rows for name in row.methods])
            network: Any = distill.networks(c, data, shown=shown)[1]
            teacher = activity(network, shown.test if shown.valid is None else shown.valid, samples=50)
            why = "" if energy.counted(teacher) else FOREIGN
        except Exception as error:  # all runs are finished: nothing of them is lost for want of a reference
            why = " ".join(str(error).split()) or type(error).__name__
    return energy.table(measured, teacher), why


def write(result: dict[str, Any], c: Any) -> None:
    """compare.json, .csv, .md and .tex, and the same on the terminal."""
    out = Path(c.out)
    runs.write_json(out / "compare.json", result)
    drawn = comparison.tables(result["rows"], result["title"], result["baseline"], c.confidence)
    words = [*result["conclusions"], *(f"Note: {note}." for note in result["notes"])]
    words += [f"Not shown: {what}" for what in result["not_shown"]]
    legend = comparison.legend(result["rows"], c.confidence, c.jobs, result["cache_left_out"])
    (out / "compare.md").write_text(
        "\n".join([*map(tables.markdown, drawn), *(f"- {w}" for w in words), "", *legend]) + "\n"
    )
    (out / "compare.tex").write_text("\n".join(map(tables.latex, drawn)))
    (out / "compare.csv").write_text(comparison.csv(result["rows"]))
    for table in drawn:
        tables.show(table)
    print("\n".join([*words, "", *legend, f"{result['seconds']:.0f} s of training. Everything is in {out}"]))
