"""What a method adds to a stage of training, and how two methods become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from spikedistill.core.schedule import Schedule
from spikedistill.core.step import Batch, Objective, Pass

Terms = dict[str, tuple[float | Schedule, Objective]]
Prepare = Callable[[Batch, float], Batch]


def unchanged(batch: Batch, progress: float) -> Batch:
    return batch


@dataclass(frozen=True)
class Plan:
    """The part of a Stage that a method owns.

    passes: name -> Pass.  loss: name -> (weight, objective); the name is the one in logs and reports.
    prepare: batch, progress -> batch, before the passes.  after_step: called with progress after each update.
    """

    passes: dict[str, Pass]
    loss: Terms
    prepare: Prepare = unchanged
    after_step: Sequence[Callable[[float], None]] = ()


class MergeError(ValueError):
    """Two plans that give one name two meanings."""


def merge(*plans: Plan) -> Plan:
    """The union of plans, in the order written: all their passes, terms, `prepare` and `after_step`.

    A pass or term that two plans share by name must mean the same in both. Raises MergeError naming it otherwise.
    """
    first, *rest = plans
    for plan in rest:
        passes, loss = dict(first.passes), dict(first.loss)
        for name, new in plan.passes.items():
            old = passes.setdefault(name, new)
            if old is not new and (old.model is not new.model or replace(old, model=new.model) != new):
                raise MergeError(f"pass '{name}' means two things: {_pass(old)} and {_pass(new)}")
        for name, (weight, objective) in plan.loss.items():
            old_weight, old = loss.setdefault(name, (weight, objective))
            if old_weight != weight or not same(old, objective):
                raise MergeError(
                    f"term '{name}' means two things: {_at(old_weight)} x {_short(old)} "
                    f"and {_at(weight)} x {_short(objective)}; give both methods the same settings"
                )
        first = Plan(passes, loss, _then(first.prepare, plan.prepare), [*first.after_step, *plan.after_step])
    return first


def same(a: object, b: object) -> bool:
    """Whether two objectives compute the same: one object, equal objects, or weightless modules of equal settings."""
    if a is b or not (isinstance(a, nn.Module) and isinstance(b, nn.Module)):
        return a is b or bool(a == b)
    if type(a) is not type(b) or [*a.parameters(), *b.parameters()]:
        return False
    inner_a, inner_b = dict(a.named_children()), dict(b.named_children())
    ours = [{k: v for k, v in vars(m).items() if k[0] != "_" and k != "training"} for m in (a, b)]
    return (
        ours[0] == ours[1] and inner_a.keys() == inner_b.keys() and all(same(inner_a[k], inner_b[k]) for k in inner_a)
    )


def _then(f: Prepare, g: Prepare) -> Prepare:
    if f is unchanged or g is unchanged or f is g:
        return g if f is unchanged else f
    return lambda batch, progress: g(f(batch, progress), progress)


def _pass(p: Pass) -> str:
    return f"{type(p.model).__name__} on '{p.x}' (steps={p.steps}, grad={p.grad})"


def _at(weight: float | Schedule) -> str:
    return "a schedule" if callable(weight) else f"{weight:g}"


def _short(objective: Objective) -> str:
    return (
        " ".join(repr(objective).split()) if isinstance(objective, nn.Module) else getattr(objective, "__name__", "?")
    )
