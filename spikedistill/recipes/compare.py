"""Methods side by side: same student, teacher, split, augmentation, epochs and budget, paired seeds.

Run:    spikedistill compare --method "ce; kd; bkd+activity; soft = kd(tau=8)" --teacher runs/teacher --seeds 0,1,2
A row is one method or several that compose. Each run is a process and a folder: the same command goes on where a killed
one was, repeats nothing that is finished, and makes the tables anew. --teacher may be a model of `spikedistill list
models`; it is then trained first. --row.kd.lr 0.02 gives a row its own learning rate; --tune N finds one for every row.
Rewrites and pruning are rows too: --method "ce; tt = ce; tt_bkd = bkd" --row.tt.transform "tt_snn(rank=8)" and
--row.NAME.optimizer "stds(threshold=1)"; results/combinations/settings.toml has them all.

OUT/compare.json, .csv, .md, .tex   the comparison
OUT/runs/ROW-SEED/                  run folders, with ROW-SEED.json, the settings, and ROW-SEED.log beside
OUT/teacher/, OUT/tune/             the teacher and the trials, where they are made here
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from spikedistill import runs
from spikedistill.origin import origin, teacher_print
from spikedistill.own import prints
from spikedistill.recipes import distill
from spikedistill.recipes.comparing import tuning
from spikedistill.recipes.comparing.crew import STOPPED, Crew, Job, claim
from spikedistill.recipes.comparing.estimate import dry_run
from spikedistill.recipes.comparing.folder import folder_mistakes
from spikedistill.recipes.comparing.outcome import summary
from spikedistill.recipes.comparing.rows import (
    Row,
    check,
    config_of,
    is_trained_here,
    jobs_of,
    plans,
    shard_of,
    teacher_job,
)
from spikedistill.spec import SpecError


class Config(distill.Config):
    """Settings of `compare`: those of `distill`, the same for every row, and these."""

    method: list[str] = ["ce", "kd", "bkd"]
    """The rows, separated by semicolons; + or a comma composes, NAME = gives a row a name."""
    seeds: list[Annotated[int, Field(ge=0)]] = [0, 1, 2]
    """A run of every row for each; runs of one seed share initialisation, order and augmentation."""
    baseline: str | None = None
    """The row that the others are compared with; the first, where none is named."""
    row: dict[str, dict[str, Any]] = {}
    """Own settings: --row.NAME.lr 0.02; weight_decay, optimizer, schedule, warmup, clip, ema, precision, transform."""
    tune: Annotated[int, Field(ge=0)] = 0
    """Trials for each row, judged on validation, of its learning rate and weights; 0 takes the settings as given."""
    tune_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of a trial, where not those of the runs."""
    teacher_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epochs of a teacher that is trained here, where not those of the runs."""
    teacher_lr: Annotated[float, Field(gt=0)] = 5e-3
    """Learning rate of a teacher that is trained here."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals."""
    jobs: Annotated[int, Field(ge=0)] = 1
    """Runs side by side, each a process; 0 runs one after the other in this process."""
    shard: str | None = None
    """i/n: only this share of the runs, to use several machines on one folder."""
    dry_run: bool = False
    """Show the runs and an estimate of the time, and run nothing."""
    mixed: bool = False
    """Accept finished runs that another version of spikedistill or torch has made."""
    out: Annotated[str, Field(min_length=1)] = "runs/compare"
    """Folder of the comparison."""
    seed: Literal[0] = Field(0, exclude=True)  # pyrefly: ignore
    overwrite: Literal[False] = Field(False, exclude=True)  # pyrefly: ignore
    test: Literal[True] = Field(True, exclude=True)  # pyrefly: ignore

    @field_validator("method", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        return distill.split(value, ";") if isinstance(value, str) else value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value

    @field_validator("seed", "overwrite", "test", mode="before")
    @classmethod
    def _not_here(cls, value: Any, info: ValidationInfo) -> Any:
        if value != cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"it is not a setting of compare; {NOT_HERE[str(info.field_name)]}")
        return value


NOT_HERE = {
    "seed": "seeds are given as --seeds 0,1,2",
    "overwrite": "no finished run is repeated: choose another --out, or delete the folder",
    "test": "every choice is made on validation, and a run is tested once, at its end",
}
TUNE_SEED = 1_000_003  # of the trials; no run has it


def compare(
    methods: str | Sequence[str] = ("ce", "kd", "bkd"),
    student: str = "small",
    teacher: str | None = None,
    data: str = "fashion-mini",
    **settings: Any,
) -> dict[str, Any]:
    """Compare methods and return the content of compare.json.

    methods: the rows, as in Config.  student, teacher, data: names, because each run is a process of its own; your own
    module is named "file.py:function".  settings: the flags of `spikedistill compare`.
    Raises SpecError listing every mistake before work starts, and where runs have failed.
    """
    given = distill.named(student=student, teacher=teacher, data=data)
    if wrong := [k for k, v in given.items() if v is not None and not isinstance(v, str)]:
        raise SpecError(
            [f"{k}: each run is a process of its own, so it takes a name, or file.py:function" for k in wrong]
        )
    c, mistakes = distill.read(given | {"method": methods} | settings, Config)
    if c is not None:
        mistakes += check(c)[1]
    if mistakes:
        raise SpecError(mistakes)
    return run(c)


def run(c: Config) -> dict[str, Any]:
    """Run what is missing, then write and print the comparison."""
    rows, mistakes = check(c)
    if mistakes:
        raise SpecError(mistakes)
    out, shard, given = Path(c.out), shard_of(c) or (1, 1), c.teacher
    rows, parts, mistakes = plans(c, rows)
    if mistakes:
        raise SpecError(mistakes)
    teacher = teacher_job(c, rows)
    if teacher or is_trained_here(c.teacher):  # which no row may ask
        c = c.model_copy(update={"teacher": str(teacher.folder) if teacher else None})
    texts = [c.data, c.student, c.teacher, *(name for row in rows for name in row.methods)]
    made_of = origin(parts["data"], None if teacher and not teacher.finished else c.teacher, texts)
    tuned = {row.name: _tuned(c, row) for row in rows} if c.tune else {}
    settled = [row.of(found["set"]) if (found := tuned.get(row.name)) else row for row in rows]
    jobs = [job for row in settled for job in jobs_of(c, row) if not c.tune or tuned[row.name]]
    if mistakes := folder_mistakes(c, [*([teacher] if teacher else []), *jobs], made_of):
        raise SpecError(mistakes)
    if c.dry_run:
        return dry_run(c, settled, teacher, parts, tuned)

    out.mkdir(parents=True, exist_ok=True)
    runs.write_json(out / "config.json", c.model_dump(exclude={"dry_run", "shard"}) | {"teacher": given})
    crew, failed = Crew(c), []
    with crew:
        if teacher:
            crew.all([teacher], must=True)
            made_of |= {"teacher": teacher_print(c.teacher)}
            if mistakes := folder_mistakes(c, jobs, made_of):
                raise SpecError(mistakes)
        before = runs.read_json(out / "origin.json") if (out / "origin.json").exists() else {}
        made_of = {key: before.get(key) if value is None else value for key, value in made_of.items()}
        runs.write_json(out / "origin.json", made_of)
        if c.tune:
            first = (shard[0] - 1) * len(rows) // shard[1]  # so that shards do not wait for each other's rows
            tuned = crew.map(lambda row: tune(c, row, crew, made_of), [*rows[first:], *rows[:first]])
            rows = [row.of(tuned[row.name]["set"]) for row in rows]
        jobs = [job for row in rows for job in jobs_of(c, row)]
        failed = crew.all(jobs[shard[0] - 1 :: shard[1]])
    result = alone(crew.locks / "summary", lambda: summary(c, rows, tuned))
    if failed:
        raise SpecError([f"{name} failed: {why}" for name, why in failed] + [f"the rest is in '{out}'; run it again"])
    return result


def alone(lock: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work when no other process that shares the folder does: of two tables the later one has more runs."""
    while True:
        with claim(lock) as held:
            if held is not None:
                return work()
        time.sleep(1)


def _asked(c: Config, row: Row) -> dict[str, Any]:
    start = tuning.defaults(row.chosen, row.own.get("lr", c.lr))
    ranges = {k: list(v) for k, v in tuning.space(start, c.lr).items()}
    of_row = {"methods": row.methods, "settings": row.settings, "own": row.own, "code": prints(row.methods)}
    of_row["versions"] = {name: runs.machine()["versions"][name] for name in ("spikedistill", "torch")}
    return of_row | {"trials": c.tune, "epochs": c.tune_epochs or c.epochs, "start": start, "ranges": ranges}


def _tuned(c: Config, row: Row) -> dict[str, Any] | None:
    """What an earlier tuning of just this found."""
    file = Path(c.out) / "tune" / f"{row.name}.json"
    if not file.exists():
        return None
    found, asked = runs.read_json(file), json.loads(json.dumps(_asked(c, row)))
    before = found.get("asked", {})
    if c.mixed:
        asked["versions"] = before.get("versions")
    return found if before == asked else None


def tune(c: Config, row: Row, crew: Crew, made_of: dict[str, Any]) -> dict[str, Any]:
    """Find the settings of a row on validation, once among all processes that share the folder."""
    folder, asked = Path(c.out) / "tune", _asked(c, row)
    folder.mkdir(parents=True, exist_ok=True)

    def measure(number: int, values: dict[str, float]) -> dict[str, Any]:
        name = f"{row.name}-{number}"
        more = {"epochs": asked["epochs"], "test": False}
        config = config_of(c, row.of(tuning.applied(values)), TUNE_SEED, folder / name, **more)
        job = Job(name, folder / name, config.model_dump())
        if mistakes := folder_mistakes(c, [job], made_of):
            raise SpecError(mistakes)
        why = crew.one(job, must=True)
        if crew.stopped or (why or "").startswith(STOPPED):  # which says nothing of these settings
            raise SpecError([f"trial {name}: {why or STOPPED}"])
        valid = 0.0 if why else runs.read_json(job.folder / "result.json")["valid"]["accuracy"]
        if c.progress:
            words = f"failed: {why}" if why else f"valid {valid:.2%}"
            print(f"tune {row.name} {number + 1}/{c.tune}  {words}", file=sys.stderr, flush=True)
        return {"valid": valid} | ({"failed": why} if why else {})

    while (found := _tuned(c, row)) is None:
        if crew.stopped:
            raise SpecError([f"tuning of {row.name}: {STOPPED}"])
        with claim(crew.locks / f"tune-{row.name}-all") as lock:
            if lock is not None:
                ranges = {k: tuple(v) for k, v in asked["ranges"].items()}
                found = tuning.search(asked["start"], ranges, c.tune, measure)
                if all("failed" in trial for trial in found["trials"]):
                    reasons = [trial["failed"] for trial in found["trials"]]
                    raise SpecError([f"trial {row.name}-{number} failed: {why}" for number, why in enumerate(reasons)])
                found |= {"asked": asked, "set": tuning.applied(found["values"])}
                runs.write_json(folder / f"{row.name}.json", found)
        time.sleep(0 if found else 2)
    return found


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
