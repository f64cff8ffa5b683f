"""The same number of trials for every method, judged on validation: learning rate and the weights of a method's terms.

The space of a row: its learning rate, from an eighth to four times the given one, and of each of its methods the
weights that are not zero (settings of type `float >= 0`, save `ce`, whose scale the learning rate has), from a tenth to
ten times; both on a logarithmic scale. A weight that may be None (`float >= 0 or None`: sakd, lasnn, kdsnn, tser) is
searched where a number is given for it; None leaves it to the method. Nothing else is searched: not the mixes in
[0, 1], such as `alpha`, no temperature and no other setting.

The first trial is the given settings. Optuna's TPE sampler chooses the others, with a fixed seed, so an interrupted
tuning asks for the same trials again and finds those that are finished. A trial that fails, such as one whose loss is
no longer a number, counts as accuracy 0, and why is kept in its "failed".
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from inspect import Parameter
from typing import Any, get_type_hints

from spikedistill.methods import builder
from spikedistill.spec import NonNegative, SpecError, settings

Ranges = dict[str, tuple[float, float]]
Chosen = Sequence[tuple[str, dict[str, Any]]]


def defaults(chosen: Chosen, lr: float) -> dict[str, float]:
    """Where the search starts: "lr", and "METHOD.SETTING" of each weight, at the given value or the default."""
    start = {"lr": lr}
    for name, given in chosen:
        hints = get_type_hints(builder(name), include_extras=True)
        for key, p in settings(builder(name), 2).items():
            value = given.get(key, p.default)
            weight = hints.get(key) in (NonNegative, NonNegative | None) and key != "ce"
            if weight and value not in (None, Parameter.empty) and value > 0:
                start[f"{name}.{key}"] = float(value)
    return start


def space(start: Mapping[str, float], lr: float) -> Ranges:
    """The range of each setting of `defaults`, around the values in it."""
    return {k: (v / 8, v * 4) if k == "lr" else (v / 10, v * 10) for k, v in start.items()}


def applied(values: Mapping[str, float]) -> dict[str, Any]:
    """{"lr": 0.02, "bkd.weight": 1e-3} -> {"lr": 0.02, "bkd": {"weight": 1e-3}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        method, dot, name = key.rpartition(".")
        (nested.setdefault(method, {}) if dot else nested)[name] = value
    return nested


def need_optuna() -> list[str]:
    """What stands in the way of tuning."""
    return [] if find_spec("optuna") else ["tune: it needs Optuna: pip install 'spikedistill[tune]'"]


def search(
    start: Mapping[str, float], ranges: Ranges, trials: int, measure: Callable[[int, dict[str, float]], dict[str, Any]]
) -> dict[str, Any]:
    """{"values": the best, "valid": its accuracy, "trial": its number, "trials": [...]}.

    measure: number of a trial and its values -> {"valid": accuracy on validation} and, of one that failed, "failed":
    why. The first of equals wins.
    """
    if missing := need_optuna():
        raise SpecError(missing)
    import optuna  # pyrefly: ignore

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=4))
    study.enqueue_trial(dict(start))
    scale: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*span, log=True) for name, span in ranges.items()
    }
    done: list[dict[str, Any]] = []
    for number in range(trials):
        trial = study.ask(scale)
        values = {k: v if number == 0 else float(f"{v:.3g}") for k, v in trial.params.items()}
        done.append({"values": values} | measure(number, values))
        study.tell(trial, done[-1]["valid"])
    best = max(range(trials), key=lambda k: ("failed" not in done[k], done[k]["valid"]))
    return done[best] | {"trial": best, "trials": done, "ranges": {k: list(v) for k, v in ranges.items()}}
