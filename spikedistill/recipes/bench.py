"""How fast: a training step and inference here and in other libraries, the neuron alone, and what each method costs.

Run:    spikedistill bench --out results/speed         pip install 'spikedistill[bench]' brings the others but sinabs
Everything that is compared is timed in turns on this machine, medians and quartiles. Libraries that are not installed
are left out by name. Give it the machine for itself: another program on the same cores spoils the figures.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from spikedistill import data, models, runs
from spikedistill.bench import networks
from spikedistill.bench.measure import in_turns, resident_growth, saved_bytes, spread
from spikedistill.cache import Cache
from spikedistill.core.fit import Stage, Trainee, fit
from spikedistill.core.step import Batch
from spikedistill.core.taps import infer
from spikedistill.inference import prepare
from spikedistill.methods import METHODS
from spikedistill.neurons import kernels
from spikedistill.neurons.kernels import sparse
from spikedistill.recipes.distill import Config as DistillConfig
from spikedistill.recipes.distill import cached, precision
from spikedistill.recipes.quickstart import METHODS as QUICKSTART
from spikedistill.report import figures, tables
from spikedistill.spec import SpecError, parse

Part = Literal["vgg", "sew_resnet18", "spikformer", "neuron", "convolution", "steps", "methods", "data"]
PARTS = ("vgg", "sew_resnet18", "spikformer", "neuron", "convolution", "steps", "methods", "data")


class Config(BaseModel):
    """Settings of the benchmark."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    parts: list[Part] = list(PARTS)
    """Which tables to make, separated by commas."""
    rounds: Annotated[int, Field(ge=1)] = 15
    """Turns; the median is printed."""
    batch: Annotated[int, Field(ge=2)] = 32
    """Images in a step of the large networks."""
    steps: Annotated[int, Field(ge=1)] = 4
    """Time steps T."""
    compiled: bool = True
    """Also time what torch.compile makes of the others; costs a minute of compilation."""
    memory: bool = True
    """Also measure the resident memory of each, in a process of its own."""
    out: str = "runs/speed"
    """Folder for speed.json, speed.md and the figure; an earlier measurement in it is replaced part by part."""

    @field_validator("parts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


@dataclass(frozen=True)
class Entry:
    """One line of a table: a network, and how its library runs it."""

    build: Callable[[int], nn.Module]
    package: str | None = None
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False


ALONE = "convolutions of ours alone"
DENSE = "ours, convolutions dense"


def entries(part: str) -> dict[str, Entry]:
    """The lines of a table. `ours, auto` is what `--precision auto` takes on this machine."""
    fast = precision(DistillConfig()) == "bf16-mixed"
    sj = "spikingjelly"
    if part == "sew_resnet18":
        return {
            "ours, auto": Entry(networks.sew_resnet18, bf16=fast, channels_last=True),
            "ours, fp32": Entry(networks.sew_resnet18, channels_last=True),
            DENSE: Entry(lambda steps: networks.Dense(networks.sew_resnet18(steps)), bf16=fast, channels_last=True),
            "spikingjelly, fp32": Entry(networks.SpikingJellySEW, sj),
            "spikingjelly, bf16": Entry(networks.SpikingJellySEW, sj, bf16=True),
            ALONE: Entry(lambda steps: networks.Alone(networks.sew_resnet18(steps)), bf16=fast, channels_last=True),
        }
    if part == "spikformer":
        return {
            "ours, auto": Entry(networks.spikformer, bf16=fast, channels_last=True),
            "ours, fp32": Entry(networks.spikformer, channels_last=True),
        }
    once = partial(networks.SpikingJelly, once=True)
    return {
        "ours, auto": Entry(networks.Ours, bf16=fast, channels_last=True),
        "ours, fp32": Entry(networks.Ours, channels_last=True),
        DENSE: Entry(lambda steps: networks.Dense(networks.Ours(steps)), bf16=fast, channels_last=True),
        f"{DENSE}, fp32": Entry(lambda steps: networks.Dense(networks.Ours(steps)), channels_last=True),
        "spikingjelly, fp32": Entry(networks.SpikingJelly, sj),
        "spikingjelly, bf16": Entry(networks.SpikingJelly, sj, bf16=True),
        "spikingjelly, bf16, compiled": Entry(once, sj, bf16=True, channels_last=True, compile=True),
        "snnTorch, fp32": Entry(networks.SnnTorch, "snntorch"),
        "norse, fp32": Entry(networks.Norse, "norse"),
        "sinabs, fp32": Entry(networks.Sinabs, "sinabs"),
        "ReLU net, T x B images, bf16": Entry(networks.Relu, bf16=True, channels_last=True),
        "ReLU net, bf16, compiled": Entry(networks.Relu, bf16=True, channels_last=True, compile=True),
        ALONE: Entry(lambda steps: networks.Alone(networks.Ours(steps)), bf16=fast, channels_last=True),
    }


def prepared(
    entry: Entry, batch: int, steps: int
) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], None], Callable[[], None]]:
    """The network, a forward pass to its loss, a whole training step, and inference in between."""
    torch.manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    net = entry.build(steps)
    if entry.channels_last:
        net, x = channels_last(net), x.to(memory_format=torch.channels_last)
    run = torch.compile(net) if entry.compile else net
    optim = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=entry.bf16):
            return F.cross_entropy(run(x).float(), y)

    def train() -> None:
        optim.zero_grad()
        loss().backward()
        optim.step()

    @cache
    def answer() -> Callable[[Tensor], Any]:
        if entry.package or entry.compile or isinstance(net, networks.Alone):
            return run
        settle(net, x)
        return prepare(net, x.shape[1:], bf16=entry.bf16)  # as `spikedistill.load` gives it

    @torch.no_grad()
    def infer() -> None:
        net.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=entry.bf16):
            answer()(x)
        net.train()

    return net, loss, train, infer


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    """Statistics of the norms as they are on x: with those of a network's first steps, its deep layers are silent."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    net.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    net.eval()


def shares(net: nn.Module, run: Callable[[], Any]) -> list[float]:
    """Of what each convolution reads, the share that is not 0; without the first, which reads images."""
    return networks.reads(net, run, lambda _, x: float((x != 0).float().mean()))[1:]


def network_table(part: str, c: Config) -> list[dict[str, Any]]:
    """Rows of one network: training step, inference, bytes saved for backward, growth of the process."""
    rows: dict[str, dict[str, Any]] = {}
    train, infer = dict[str, Callable[[], None]](), dict[str, Callable[[], None]]()
    for name, entry in entries(part).items():
        if (entry.package and networks.missing(entry.package)) or (entry.compile and not c.compiled):
            say(f"{part}: without '{name}' ({f'{entry.package} is not installed' if not entry.compile else 'off'})")
            continue
        try:
            began = time.perf_counter()
            net, loss, train[name], infer[name] = prepared(entry, c.batch, c.steps)
            train[name]()
            rows[name] = {"name": name, "first_step_s": time.perf_counter() - began}
            if name == "ours, auto":
                rows[name]["shares"] = shares(net, loss)
            if not entry.compile:  # a compiled graph keeps its own buffers, which hooks do not see
                rows[name]["saved_mib"] = saved_bytes(loss, net) / 2**20
        except Exception as error:  # another library's failure is a line of the table, not the end of it
            for found in (rows, train, infer):
                found.pop(name, None)
            say(f"{part}: '{name}' failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    say(f"{part}: {len(rows)} networks, training")
    for name, seconds in in_turns(train, c.rounds).items():
        rows[name]["train"] = spread(seconds)
    say(f"{part}: inference")
    for name, seconds in in_turns(infer, c.rounds).items():
        rows[name]["infer"] = spread(seconds)
    if c.memory:
        for name in rows:
            say(f"{part}: memory of '{name}'")
            rows[name]["resident_mib"] = elsewhere(growth, part, name, c.batch, c.steps) / 2**20
    return [*rows.values()]


def elsewhere(function: Callable[..., int], *given: Any) -> int:
    """function(*given) in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


def growth(part: str, name: str, batch: int, steps: int) -> int:
    """Bytes by which a process grows over three training steps."""
    return resident_growth(prepared(entries(part)[name], batch, steps)[2])


def neuron_table(c: Config) -> list[dict[str, Any]]:
    """LIF alone, forward and backward on [T, 64, 64, 16, 16], against a copy of as many bytes."""
    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(c.steps, 64, 64, 16, 16).to(dtype).requires_grad_()
        grad = torch.rand_like(x).detach()
        source, target = torch.empty(5 * x.numel() // 2, dtype=dtype), torch.empty(5 * x.numel() // 2, dtype=dtype)

        def lif(x: Tensor = x, grad: Tensor = grad) -> None:
            x.grad = None
            kernels.neuron(x, 0.5, 0.5).backward(grad)

        # forward reads x and writes spikes; backward reads x and a gradient and writes one: five passes, a copy is two
        seconds = in_turns({"LIF": lif, "copy": partial(target.copy_, source)}, 3 * c.rounds)
        lif_ms, copy_ms = spread(seconds["LIF"]), spread(seconds["copy"])
        rows.append({"name": name, "lif": lif_ms, "copy": copy_ms, "ratio": lif_ms["ms"] / copy_ms["ms"]})
    return rows


SHAPES = ((64, 64, 32), (128, 128, 16), (256, 256, 8))
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def convolution_table(c: Config) -> list[dict[str, Any]]:
    """3x3 convolutions of the VGG, forward and both gradients, by the share of spikes: dense, and by spikes alone."""
    rows = []
    for (channels, out, size), dtype in product(SHAPES, (torch.float32, torch.bfloat16)):
        weight = torch.randn(out, channels, 3, 3).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
        work, chances = dict[str, Callable[[], None]](), torch.rand(c.steps * c.batch, size, size, channels)
        grad = torch.randn(len(chances), size, size, out).to(dtype).movedim(-1, 1)
        for share, limit in [(SHARES[0], -1), *((s, 1) for s in SHARES)]:
            x = (chances < share).to(dtype).movedim(-1, 1).requires_grad_()

            def step(x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad, limit: float = limit) -> None:
                x.grad = weight.grad = None
                with sparse.limited(limit):
                    kernels.convolution(x, weight, None).backward(grad)

            work["dense" if limit < 0 else f"{share:g}"] = step
        times = {name: spread(seconds) for name, seconds in in_turns(work, c.rounds).items()}
        name = f"{channels} to {out}, {size}x{size}, {str(dtype).removeprefix('torch.')}"
        rows.append({"name": name, "limit": sparse.LIMITS[dtype], **times})
    return rows


def steps_table(c: Config) -> list[dict[str, Any]]:
    """Cost of the VGG by T, eight images; for large T also with stages that are computed again."""
    rows, work = [], dict[str, Callable[[], None]]()
    for steps, again in [*((t, False) for t in (1, 2, 4, 8, 16, 32)), (16, True), (32, True)]:
        net, loss, train = by_steps(steps, again)
        name = f"T = {steps}{', recomputed' if again else ''}"
        rows.append({"name": name, "steps": steps, "recompute": again, "saved_mib": saved_bytes(loss, net) / 2**20})
        work[name] = train
    for row, seconds in zip(rows, in_turns(work, max(3, c.rounds // 3), 1).values()):
        row["train"] = spread(seconds)
    if c.memory:
        for row in rows:
            row["resident_mib"] = elsewhere(growth_by_steps, row["steps"], row["recompute"]) / 2**20
    return rows


def by_steps(steps: int, again: bool) -> tuple[nn.Module, Callable[[], Tensor], Callable[[], None]]:
    net, loss, train, _ = prepared(entries("vgg")["ours, auto"], 8, steps)
    return models.recompute(net) if again else net, loss, train


def growth_by_steps(steps: int, again: bool) -> int:
    return resident_growth(by_steps(steps, again)[2])


STUDENT, TEACHER = "small(widths=(16, 64, 128))", "small(widths=(32, 64, 128), depth=2, neuron=relu)"


def methods_table(c: Config) -> list[dict[str, Any]]:
    """A step of each method on the quickstart's student and teacher, as a multiple of cross-entropy's.

    With the teacher run in every step, and with its outputs from a cache. First the teacher's forward pass alone.
    """
    sets = data.load("fashion-mini", batch_size=64)
    batch = next(iter(sets.train))
    image = dict(classes=len(sets.classes), channels=sets.shape[0], mean=sets.mean, std=sets.std)
    bf16 = precision(DistillConfig()) == "bf16-mixed"
    teacher = channels_last(models.build(TEACHER, **image))

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            infer(teacher, batch["x"])

    work: dict[tuple[str, str], Callable[[], None]] = {("the teacher's forward pass", "train"): forward}
    rows: dict[str, dict[str, Any]] = {"the teacher's forward pass": {"name": "the teacher's forward pass"}}
    for text in (*METHODS, QUICKSTART["bkd"]["methods"]):
        name, _, how = parse(text)
        for kind, kept in (("train", None), ("cached", Cache())):
            torch.manual_seed(0)
            student, teacher = models.build(STUDENT, steps=c.steps, **image), models.build(TEACHER, **image)
            try:
                plan = METHODS[name](student, teacher, **how)
                passes = cached(plan.passes, teacher, kept)
                trainee = Trainee(Stage([batch], **vars(plan) | {"passes": passes}))
                step = method_step(trainee, plan.after_step, batch, bf16)
                step()
                if kept and not kept.asked:
                    continue  # it keeps nothing
            except (KeyError, ValueError, TypeError, RuntimeError) as error:
                say(f"methods: without {text}, which needs more than images and an ANN: {str(error).splitlines()[0]}")
                break
            own = {id(p) for p in student.parameters()}
            extra = sum(p.numel() for p in trainee.parameters() if id(p) not in own)
            work[text, kind], rows[text] = step, {"name": text, "extra": extra}
    for (text, kind), seconds in in_turns(work, c.rounds).items():
        rows[text][kind] = spread(seconds)
    for row in rows.values():
        for kind, ratio in (("train", "ratio"), ("cached", "cached_ratio")):
            if kind in row:
                row[ratio] = row[kind]["ms"] / rows["ce"]["train"]["ms"]
    return [*rows.values()]


def channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]


def method_step(trainee: Trainee, after: Any, batch: Batch, bf16: bool) -> Callable[[], None]:
    for module in (*trainee.models.values(), *trainee.objectives.values(), *trainee.frozen):
        channels_last(module)
    optim = torch.optim.AdamW([p for p in trainee.parameters() if p.requires_grad], lr=1e-3, fused=True)
    trainee.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = trainee(batch, 0.5)
        loss.backward()
        optim.step()
        optim.zero_grad()
        for hook in after:
            hook(0.5)

    return step


def data_table(c: Config) -> list[dict[str, Any]]:
    """Share of the training time spent waiting for batches."""
    from spikedistill.methods import ce

    rows = []
    for name, student in (("fashion-mini, small student", STUDENT), ("fashion-mini, ReLU twin", TEACHER)):
        sets = data.load("fashion-mini", batch_size=64, augment="flip|shift(2)")
        image = dict(classes=len(sets.classes), channels=sets.shape[0], mean=sets.mean, std=sets.std)
        model = models.build(student, steps=c.steps, **image)
        plan: Any = ce(model)
        line = fit(Stage(sets.train, **vars(plan), epochs=1), progress=False)["epochs"][0]
        rows.append({"name": name, "waited": line["waited_for_data"], "images_per_second": line["images_per_second"]})
    return rows


TABLES: dict[str, Callable[[Config], list[dict[str, Any]]]] = {
    **{part: partial(network_table, part) for part in ("vgg", "sew_resnet18", "spikformer")},
    "neuron": neuron_table,
    "convolution": convolution_table,
    "steps": steps_table,
    "methods": methods_table,
    "data": data_table,
}


def run(c: Config) -> list[dict[str, Any]]:
    """Measure, write and print. Returns what was measured, a part each."""
    out = Path(c.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError([f"out: cannot write to '{out}': {error.strerror}"]) from None
    file = out / "speed.json"
    found: dict[str, Any] = runs.read_json(file)["parts"] if file.exists() else {}
    for part in c.parts:
        rows = TABLES[part](c)
        found[part] = {"rows": rows, "config": c.model_dump(), "machine": runs.machine(), "load": load()}
        runs.write_json(file, {"parts": {p: found[p] for p in PARTS if p in found}})
        for table in drawn(part, rows, c):
            tables.show(table)
    (out / "speed.md").write_text(page({p: found[p] for p in PARTS if p in found}))
    if {"vgg", "steps"} <= found.keys():
        by_t = [row for row in found["steps"]["rows"] if not row.get("recompute")]
        figures.speed(found["vgg"]["rows"], by_t, out / "speed.svg")
    print(f"Tables: {out}")
    return [found[part] for part in c.parts]


def page(found: Mapping[str, Any]) -> str:
    """speed.md: every part under the settings and machine that it was measured with, said once while they are equal."""
    text, last = "", ""
    for part, of in found.items():
        about, c = of["machine"], Config.model_validate(of["config"])
        head = f"{about['processor']}, {about['threads']} threads, torch {about['versions']['torch']}; "
        head += f"medians of {c.rounds} rounds (quartiles), made by `spikedistill bench`\n\n"
        text += (head if head != last else "") + "\n".join(map(tables.markdown, drawn(part, of["rows"], c))) + "\n"
        last = head
    return text.rstrip("\n") + "\n"


def drawn(part: str, rows: list[dict[str, Any]], c: Config) -> list[tables.Table]:
    """A part as tables of text."""
    if part in ("vgg", "sew_resnet18", "spikformer"):
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "library": lambda r: r["name"],
            "train ms": lambda r: ms(r["train"]),
            "x ours": lambda r: f"{r['train']['ms'] / rows[0]['train']['ms']:.2f}",
            "infer ms": lambda r: ms(r["infer"]),
            "x ours ": lambda r: f"{r['infer']['ms'] / rows[0]['infer']['ms']:.2f}",
            "saved MiB": lambda r: number(r.get("saved_mib")),
            "process grows MiB": lambda r: number(r.get("resident_mib")),
            "first step s": lambda r: f"{r['first_step_s']:.1f}",
        }
        heads, cells = [*columns], [[text(r) for text in columns.values()] for r in rows]
        title = f"{part}, 32x32x3, B = {c.batch}, T = {c.steps}; inference of ours as `spikedistill.load` gives it"
        if found := rows[0].get("shares"):
            title += f"; {min(found):.0%} to {max(found):.0%} of what its convolutions read is not 0"
        return [tables.Table(heads, cells, title)]
    if part == "neuron":
        cells = [[r["name"], ms(r["lif"]), ms(r["copy"]), f"{r['ratio']:.2f}"] for r in rows]
        title = f"LIF alone, forward and backward, [{c.steps}, 64, 64, 16, 16], against a copy of as many bytes"
        return [tables.Table(["type", "LIF ms", "copy ms", "ratio"], cells, title)]
    if part == "convolution":
        cells = [[r["name"], ms(r["dense"]), *(f"{r[f'{s:g}']['ms']:.1f}" for s in SHARES)] for r in rows]
        limits = " and ".join(f"{v:g} in {k}" for k, v in {r["name"].split()[-1]: r["limit"] for r in rows}.items())
        title = (
            f"Convolutions forward and backward, ms: dense, and by spikes with so many of them; taken up to {limits}"
        )
        return [tables.Table(["channels, size, type", "dense", *(f"{s:.0%}" for s in SHARES)], cells, title)]
    if part == "steps":
        cells = [[r["name"], ms(r["train"]), number(r["saved_mib"]), number(r.get("resident_mib"))] for r in rows]
        title = "Cost by time steps, VGG, B = 8; recomputed: each stage runs again in the backward pass (--recompute)"
        return [tables.Table(["", "train ms", "saved MiB", "process grows MiB"], cells, title)]
    if part == "methods":
        cells = [
            [r["name"], ms(r["train"]), f"{r['ratio']:.2f}"]
            + ([ms(r["cached"]), f"{r['cached_ratio']:.2f}"] if "cached" in r else ["", ""])
            + [f"{r['extra']:,}" if "extra" in r else ""]
            for r in rows
        ]
        heads = ["method", "step ms", "cost", "step ms, teacher cached", "cost, cached", "training-only parameters"]
        title = f"Methods at their defaults, cost over ce: {STUDENT}, teacher {TEACHER}, B = 64"
        return [tables.Table(heads, cells, title)]
    cells = [[r["name"], f"{r['waited']:.1%}", f"{r['images_per_second']:,.0f}"] for r in rows]
    return [tables.Table(["", "waits for data", "images/s"], cells, "Share of training spent waiting for data")]


def ms(value: dict[str, float]) -> str:
    return f"{value['ms']:.1f} ({value['low']:.1f}-{value['high']:.1f})"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def load() -> list[float] | None:
    """Processes that wanted to run, averaged over 1, 5 and 15 minutes: above the threads, somebody disturbed."""
    import os

    return [*os.getloadavg()] if hasattr(os, "getloadavg") else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from spikedistill.cli import script

    script(__name__)
