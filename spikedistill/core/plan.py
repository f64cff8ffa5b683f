"""What a method adds to a stage of training, and how two methods become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isclose, nan

from torch import nn

from spikedistill.core.schedule import Schedule, scaled
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

    A pass or term that two plans share by name must mean the same in both. Only the size of a loss is free: where the
    terms they share (labels, mostly) have other weights in the later plan, all of it is scaled until these agree, so
    each method keeps its own balance: kd(ce=0.1, weight=0.9) beside labels of weight 1 adds 9 x KD. A term of weight 0
    is taken from the other plan. Terms of other names are other terms, labels too: those of kd ("ce") and of tet
    ("ce_per_step") add up. Raises MergeError naming the pass or term otherwise.
    """
    first, *rest = plans
    for plan in rest:
        passes, factor = dict(first.passes), _factor(first.loss, plan.loss)
        for name, new in plan.passes.items():
            old = passes.setdefault(name, new)
            if old is not new and (old.model is not new.model or replace(old, model=new.model) != new):
                raise MergeError(f"pass '{name}' means two things: {_pass(old)} and {_pass(new)}")
        loss = dict(first.loss)
        for name, (weight, objective) in plan.loss.items():
            if name not in loss or not loss[name][0]:
                loss[name] = (scaled(weight, factor), objective)
        first = Plan(passes, loss, _then(first.prepare, plan.prepare), [*first.after_step, *plan.after_step])
    return first


def _factor(old: Terms, new: Terms) -> float:
    """What the weights of `new` are multiplied by for the terms that both have to weigh what they do in `old`."""
    factors: dict[str, float] = {}
    for name in [name for name in new if name in old]:
        (a, ours), (b, theirs) = old[name], new[name]
        if not a or not b:
            continue
        factors[name] = 1.0 if a == b else nan if callable(a) or callable(b) else a / b
        if not same(ours, theirs) or not all(isclose(factors[name], f) for f in factors.values()):
            raise MergeError(
                f"term '{name}' means two things: {_at(a)} x {_short(ours)} and {_at(b)} x {_short(theirs)}; "
                "give both methods the same settings"
            )
    return next(iter(factors.values()), 1.0)


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
