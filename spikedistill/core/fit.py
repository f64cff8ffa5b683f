"""The loop, once: a Stage is one phase of training as data, and `fit` runs it."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spikedistill.core.evaluate import evaluate
from spikedistill.core.output import Output, rate
from spikedistill.core.plan import Prepare, unchanged
from spikedistill.core.progress import Progress
from spikedistill.core.schedule import Schedule, at, cosine, warmup
from spikedistill.core.step import Batch, Objective, Pass, Step, samples
from spikedistill.core.taps import call, check_taps, infer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Stage:
    """One phase of training.

    data: batches, see `batches_of`.  passes, loss, prepare, after_step: as in Plan; `Stage(data, **vars(plan))`.
    optim: parameter groups -> optimiser.  lr: progress -> factor on the optimiser's own learning rate.
    valid: data to evaluate on after every epoch; the epoch with the best accuracy there is kept (`select="best"`),
    or the last (`select="last"`).
    clip: largest norm of the gradient.  accumulate: batches per update.  ema: decay of the moving average of the
    trained models that is evaluated and kept in place of the last weights.
    seed: every random draw of a step is a function of it and the number of the step.
    """

    data: Iterable[Batch]
    passes: Mapping[str, Pass]
    loss: Mapping[str, tuple[float | Schedule, Objective]]
    prepare: Prepare = unchanged
    after_step: Sequence[Callable[[float], None]] = ()
    epochs: int = 10
    optim: Callable[[list[dict[str, Any]]], Optimizer] = field(default_factory=lambda: partial(AdamW, lr=1e-3))
    lr: Schedule = field(default_factory=lambda: warmup(0.05, cosine()))
    valid: Iterable[Batch] | None = None
    select: str = "best"
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    seed: int = 0


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or a folder holds the work of another stage."""


class Trainee(nn.Module):
    """What is trained: the models with a grad pass and the objectives that own weights. Frozen models stay outside."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.passes, self.loss, self.prepare = dict(stage.passes), dict(stage.loss), stage.prepare
        trained = {id(p.model): (name, p.model) for name, p in reversed(self.passes.items()) if p.grad}
        if not trained:
            raise ValueError("no pass has grad=True: nothing would be trained")
        self.models = nn.ModuleDict(dict(reversed(trained.values())))
        self.objectives = nn.ModuleDict({k: o for k, (_, o) in self.loss.items() if isinstance(o, nn.Module)})
        if kept := [name for name, p in self.passes.items() if p.cache and id(p.model) in trained]:
            raise ValueError(f"pass '{kept[0]}' has a cache, but its model is trained")
        frozen = {id(p.model): p.model for p in self.passes.values() if id(p.model) not in trained}
        self.frozen = [*frozen.values()]
        self.taps: dict[str, list[str]] = {name: [] for name in self.passes}
        for term, (_, objective) in self.loss.items():
            for name, taps in getattr(objective, "taps", {}).items():
                if name not in self.passes:
                    raise ValueError(f"term '{term}' taps pass '{name}': there are {', '.join(self.passes)}")
                check_taps(self.passes[name].model, taps, f"pass '{name}', asked by term '{term}',")
                self.taps[name] += [t for t in taps if t not in self.taps[name]]
        if self.loss and not any(callable(weight) or weight for weight, _ in self.loss.values()):
            raise ValueError(f"the weight of every term is 0 ({', '.join(self.loss)}): nothing would be trained")

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """One batch -> total loss and its parts, weighted; "accuracy" is that of the first trained pass."""
        batch = self.prepare(batch, progress)
        outputs = Passes(self, batch)
        step = Step(batch, outputs, progress)
        parts, total = {}, torch.zeros((), device=batch["x"].device)
        for name, (weight, objective) in self.loss.items():
            weight = at(weight, progress)
            if weight == 0:
                continue
            term = weight * objective(step)
            if term.ndim:
                raise ValueError(f"term '{name}' must be a scalar, it has shape {list(term.shape)}")
            parts[name] = term.detach()
            total = total + term
        if "y" in batch:
            y = batch["y"] if batch["y"].ndim == 1 else batch["y"].argmax(-1)
            first = next(name for name, p in self.passes.items() if p.grad)
            parts["accuracy"] = (rate(step[first].logits.detach()).argmax(-1) == y).float().mean()
        return total, parts


class Passes(Mapping[str, Output]):
    """The outputs of one step. Trained passes run at once and in order, the others when first looked at.

    Those of other streams than "x" come first: running statistics of norms lean to what came last.
    """

    def __init__(self, trainee: Trainee, batch: Batch):
        self.trainee, self.batch, self.done = trainee, batch, {}
        for name, p in sorted(trainee.passes.items(), key=lambda item: item[1].x == "x"):
            if p.grad:
                self[name]

    def __getitem__(self, name: str) -> Output:
        if name not in self.done:
            p = self.trainee.passes[name]
            if p.x not in self.batch:
                raise ValueError(f"pass '{name}' reads stream '{p.x}': the batch has {', '.join(self.batch)}")
            run = call if p.grad else p.cache.infer if p.cache else infer
            self.done[name] = run(p.model, self.batch[p.x], p.steps, self.trainee.taps[name])
        return self.done[name]

    def __contains__(self, name: object) -> bool:  # without running it
        return name in self.trainee.passes

    def __iter__(self) -> Iterator[str]:
        return iter(self.trainee.passes)

    def __len__(self) -> int:
        return len(self.trainee.passes)


def batches_of(data: Iterable[Batch], epoch: int, start: int, rank: int, world: int) -> Iterator[Batch]:
    """The batches of an epoch from number `start`.

    Data with a method `epoch(epoch, start, rank, world)` give exactly these. Any other iterable is iterated, after
    `set_epoch(epoch)` if it has one, and the first batches are skipped; it must then give the same batches again.
    """
    if hasattr(data, "epoch"):
        return data.epoch(epoch, start=start, rank=rank, world=world)
    if hasattr(data, "set_epoch"):
        data.set_epoch(epoch)
    return islice(iter(data), start, None)


def _batches(data: Iterable[Batch], world: int) -> int:
    if isinstance(data, Iterator):
        raise TrainingError("the training data can be read once only: give a list, or an object with __iter__")
    if hasattr(data, "batches"):
        return data.batches(world)
    return len(data) if isinstance(data, Sized) else sum(1 for _ in data)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weights, and (without weight decay) what has at most one axis: biases, norms, leaks."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("there is nothing to train, every parameter is frozen: load a run with fast=False to go on")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1]},
    ]
    groups[1]["weight_decay"] = 0.0
    return [g for g in groups if g["params"]]


def fit(
    stage: Stage,
    out: str | Path | None = None,
    *,
    fabric: "Fabric | None" = None,
    save_every: float = 30.0,
    progress: bool = True,
    title: str = "",
) -> dict[str, Any]:
    """Train what the stage says, in place: {"epochs": [metrics, ...], "best": epoch, "seconds": s, "cpu_seconds": s}.

    cpu_seconds: of user and system, of all processes and their workers; other programs do not lengthen it.

    out: folder for `metrics.jsonl` (one line an epoch) and `checkpoint.pt`. Where it holds the checkpoint of an
    interrupted run of this stage, training goes on from there, in mid-epoch, to the same weights to the bit; where it
    holds a finished one, its weights are loaded and its result returned.
    fabric: devices and precision (lightning_fabric.Fabric, launched); None is one process in float32.
    save_every: seconds between checkpoints within an epoch.  progress: show a bar.
    Raises TrainingError where a loss or a weight is not finite (the last good checkpoint stays), where the data can be
    read once only, or where the folder is another stage's.
    """
    from lightning_fabric import Fabric

    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    raw = Trainee(stage)
    for module in (*raw.models.values(), *raw.objectives.values(), *raw.frozen):
        for tensor in (*module.to(fabric.device).parameters(), *module.buffers()):
            if tensor.ndim == 4:  # `module.to(memory_format=...)` refuses five axes, `contiguous` skips one channel
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    base = stage.optim(parameter_groups(raw))
    for group in base.param_groups:
        group["initial_lr"] = group["lr"]
    trainee, optim = fabric.setup(raw, base)
    ema = _ema(raw.models, stage.ema) if stage.ema else None
    student = "student" if "student" in raw.models else next(iter(raw.models))
    out, rank, world = Path(out) if out else None, fabric.global_rank, fabric.world_size

    per_epoch = _batches(stage.data, world)
    if not per_epoch:
        raise TrainingError("the training data are empty")
    updates = -(-per_epoch // stage.accumulate)
    identity = {
        "epochs": stage.epochs,
        "batches": per_epoch,
        "accumulate": stage.accumulate,
        "seed": stage.seed,
        "terms": [*stage.loss],
        "parameters": {name: list(p.shape) for name, p in raw.named_parameters()},
    }
    now: dict[str, Any] = {
        "epoch": 0,
        "batch": 0,
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "sums": {},
        "history": [],
        "best": None,
        "done": False,
    }
    best: dict[str, Tensor] = {}
    caches: list[Any] = [*dict.fromkeys(p.cache for p in raw.passes.values() if p.cache)]

    def save() -> None:
        if out and rank == 0:
            state = {"identity": identity, "now": now, "trainee": raw.state_dict(), "optim": base.state_dict()}
            state |= {"best": best, "caches": [cache.counters for cache in caches]}
            state |= {"ema": ema.state_dict()} if ema else {}
            torch.save(state, out / "checkpoint.tmp")
            os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")

    if out:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", map_location=fabric.device, weights_only=True)
            if wrong := [k for k, v in identity.items() if state["identity"].get(k) != v]:
                raise TrainingError(f"{out / 'checkpoint.pt'} is of another stage: it differs in {', '.join(wrong)}")
            raw.load_state_dict(state["trainee"])
            base.load_state_dict(state["optim"])
            now, best = {"cpu_seconds": None} | state["now"], state["best"]
            for cache, counted in zip(caches, state.get("caches", ())):
                cache.counters = counted
            if ema:
                ema.load_state_dict(state["ema"])
        if rank == 0:
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in now["history"]))

    bar = Progress(title, stage.epochs, per_epoch, enabled=progress and rank == 0 and not now["done"])
    clock, saved = time.perf_counter() - now["seconds"], time.perf_counter()
    before, used = now["cpu_seconds"], _cpu_seconds()

    def spent() -> dict[str, Any]:
        cpu = None if before is None else before + _cpu_seconds() - used  # None: from a checkpoint that did not count
        return {"seconds": time.perf_counter() - clock, "cpu_seconds": cpu}

    with bar:
        for epoch in range(now["epoch"], stage.epochs):
            raw.train()
            pending, began, seen, waited = None, time.perf_counter(), 0, 0.0
            stream = batches_of(stage.data, epoch, now["batch"], rank, world)
            for number in range(now["batch"], per_epoch):
                asked = time.perf_counter()
                batch = next(stream, None)
                if batch is None:
                    break
                batch = {k: v.to(fabric.device, non_blocking=True) for k, v in batch.items()}
                waited += time.perf_counter() - asked
                update, last = number // stage.accumulate, number == per_epoch - 1
                whole = last or (number + 1) % stage.accumulate == 0
                share = per_epoch - update * stage.accumulate if update == updates - 1 else stage.accumulate
                done = (epoch * updates + update) / (stage.epochs * updates)
                torch.manual_seed(_mix(stage.seed, epoch * per_epoch + number, rank))
                with fabric.no_backward_sync(trainee, enabled=not whole):
                    total, parts = trainee(batch, done)
                    # one step late, when the GPU has the next one to work on
                    _account(now["sums"], pending, epoch, out)
                    pending = number, _read_later(parts | {"loss": total.detach()})
                    fabric.backward(total / share)
                if whole:
                    for group in base.param_groups:
                        group["lr"] = group["initial_lr"] * stage.lr(done)
                    if stage.clip:
                        fabric.clip_gradients(trainee, optim, max_norm=stage.clip, error_if_nonfinite=False)
                    optim.step()
                    optim.zero_grad()
                    for hook in stage.after_step:
                        hook(done)
                    if ema:
                        ema.update_parameters(raw.models)
                size = samples(batch) * world
                seen += size
                bar.update(epoch, number + 1, now["sums"], seen, size)
                if whole and not last and time.perf_counter() - saved > save_every:
                    _account(now["sums"], pending, epoch, out)
                    _finite(raw, epoch, out)
                    pending = None
                    now |= {"batch": number + 1} | spent()
                    save()
                    saved = time.perf_counter()
            _account(now["sums"], pending, epoch, out)
            _agree(raw, fabric)
            _finite(raw, epoch, out)
            count = now["sums"].pop("steps")
            line = {"epoch": epoch} | {k: v / count for k, v in now["sums"].items()}
            line |= {"lr": base.param_groups[0]["lr"], "images_per_second": seen / (time.perf_counter() - began)}
            line |= {"waited_for_data": waited / (time.perf_counter() - began)}
            kept = ema.module if ema else raw.models
            if stage.valid is not None:
                if ema:
                    for model, average in zip(raw.models.values(), kept.values()):
                        _copy_buffers(model, average)
                p = raw.passes[student]
                measured = evaluate(kept[student], stage.valid, p.steps, stream=p.x, fabric=fabric)
                line |= {"valid_accuracy": measured["accuracy"], "valid_loss": measured["loss"]}
                _refuse({"valid_loss": measured["loss"]}, f"epoch {epoch + 1}", out)
            score = line.get("valid_accuracy") if stage.select == "best" else None
            previous = now["history"][now["best"]].get("valid_accuracy") if now["best"] is not None else None
            if score is None or previous is None or score > previous:
                best = {k: v.detach().clone() for k, v in kept.state_dict().items()}
                now["best"] = epoch
            now["history"].append(line)
            now |= {"epoch": epoch + 1, "batch": 0, "sums": {}} | spent()
            line["seconds"] = now["seconds"]
            now["done"] = epoch + 1 == stage.epochs
            save()
            saved = time.perf_counter()
            if out and rank == 0:
                with open(out / "metrics.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            bar.epoch(line)
    raw.models.load_state_dict(best)
    fabric.barrier()
    cpu = now["cpu_seconds"]
    if world > 1 and cpu is not None:
        cpu = float(cast(Tensor, fabric.all_reduce(torch.tensor(cpu, dtype=torch.float64), reduce_op="sum")))
    return {"epochs": now["history"], "best": now["best"], "seconds": now["seconds"], "cpu_seconds": cpu}


def _cpu_seconds() -> float:
    """User and system seconds of this process, and of its workers that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed of three numbers, far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63


Parts = tuple[int, Callable[[], dict[str, float]]]


def _read_later(parts: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Numbers of a step. A GPU sends them when it has them, so that reading waits for nothing queued after them."""
    if not next(iter(parts.values())).is_cuda:
        return lambda: {k: v.item() for k, v in parts.items()}
    sent = torch.empty(len(parts), dtype=torch.float64, pin_memory=True)
    sent.copy_(torch.stack([v.double() for v in parts.values()]), non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> dict[str, float]:
        event.synchronize()
        return dict(zip(parts, sent.tolist()))

    return read


def _account(sums: dict[str, float], pending: Parts | None, epoch: int, out: Path | None) -> None:
    """Add the parts of one step to the sums of its epoch. Raises TrainingError where one is not finite."""
    if pending is None:
        return
    number, read = pending
    values = read()
    _refuse(values, f"epoch {epoch + 1}, step {number + 1}", out)
    for k, v in values.items():
        sums[k] = sums.get(k, 0.0) + v
    sums["steps"] = sums.get("steps", 0) + 1


def _refuse(values: Mapping[str, float], where: str, out: Path | None) -> None:
    """Raise TrainingError where one is not finite."""
    if bad := [f"{k} = {v}" for k, v in values.items() if not abs(v) < float("inf")]:
        kept = out and (out / "checkpoint.pt").exists() and f"; the last good checkpoint is {out / 'checkpoint.pt'}"
        cause = "The usual cause is a learning rate or weight that is too high"
        raise TrainingError(f"{where}: {', '.join(bad[:3])}. {cause}{kept or ''}")


def _finite(module: nn.Module, epoch: int, out: Path | None) -> None:
    """The same for the weights, before they are kept: a finite loss may have a gradient that is not."""
    largest = {name: float(p.detach().abs().amax()) for name, p in module.named_parameters() if p.numel()}
    _refuse(largest, f"after an update in epoch {epoch + 1}", out)


def _ema(models: nn.ModuleDict, decay: float) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(decay))


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for a, b in zip(source.buffers(), target.buffers()):
        b.copy_(a)


def _agree(module: nn.Module, fabric: "Fabric") -> None:
    """Average the float buffers (running statistics) over processes, so that all hold the same models."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(cast(Tensor, fabric.all_reduce(buffer, reduce_op="mean")))
