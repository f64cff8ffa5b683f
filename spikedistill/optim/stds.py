"""STDS, state transition of dendritic spines: weights are what is left of a spine size above a growing threshold.

    w = sign(theta) max( |theta| - d, 0 )       d = 0: w = theta
    theta <- optimiser step with dL/dtheta = dL/dw      silent synapses go on learning and can come back
    d_n = D f(n / N)        f: sine (1 + sin(pi (p - 1/2))) / 2, linear p, or constant 1;  n = 1 .. N updates

The model holds w at all times, so evaluation, checkpoints and the saved student have the zeros; theta is state of the
optimiser. With f constant, theta starts at sign(w)(|w| + D), so that w starts as it was.

    updates = epochs * batches                  of the whole stage
    Stage(..., optim=partial(STDS, lr=1e-4, threshold=1.0, updates=updates), select="last")

Reference: Chen, Yu, Fang, Ma, Huang, Tian, ICML 2022, PMLR 162:3701, https://proceedings.mlr.press/v162/chen22ac.html.
Evidence: code
D is on the scale of theta, which grows in training: it has to be found anew for each optimiser and learning rate. The
sparsity is that of the last threshold, so keep the last epoch; an average of weights (ema) is not sparse.
Differs from the authors' code: the gradient passes at theta = 0 too; n / N stops at 1. Their baseline "Grad R" is not
here.
"""

from collections.abc import Callable, Iterable
from math import pi, sin
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Curve = Literal["sine", "linear", "constant"]
CURVES: dict[str, Callable[[float], float]] = {
    "sine": lambda p: (1 + sin(pi * (p - 0.5))) / 2,
    "linear": lambda p: p,
    "constant": lambda p: 1.0,
}


def soft_threshold(theta: Tensor, d: float) -> Tensor:  # any shape
    """sign(theta) max(|theta| - d, 0)."""
    return theta.sign() * (theta.abs() - d).clamp_min(0)


def sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights of a model (parameters with more than one axis)."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum((p == 0).sum().item() for p in weights) / max(1, sum(p.numel() for p in weights))


class Spines(Optimizer):
    """What STDS puts around the step of another optimiser, the next class of the inheritance."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        updates: int,
        threshold: float = 1.0,
        curve: Curve = "sine",
        prune: Iterable[Tensor] | None = None,
        straight_through: bool = True,
        **how: Any,
    ):
        if curve not in CURVES:
            raise ValueError(f"curve='{curve}' is unknown; valid: {', '.join(CURVES)}")
        if updates < 1 or threshold < 0:
            raise ValueError(f"updates={updates} and threshold={threshold}: at least 1, and not negative")
        self.spines = dict(updates=updates, threshold=threshold, curve=curve, straight_through=straight_through, done=0)
        self.prune = None if prune is None else {id(p) for p in prune}
        super().__init__(params, **how)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        chosen = [p.ndim > 1 if self.prune is None else id(p) in self.prune for p in group["params"]]
        group.update(self.spines, pruned=chosen)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of theta by the gradients at w, then the threshold of this update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        spines = [(p, group) for group in self.param_groups for p, yes in zip(group["params"], group["pruned"]) if yes]
        # one that has had no gradient yet has no theta: the optimiser makes its state when there is none
        spines = [(p, group) for p, group in spines if p.grad is not None or "theta" in self.state[p]]
        for p, group in spines:
            d = threshold(group)
            p.copy_(self.state[p].get("theta", p + d * p.sign()))
            if not group["straight_through"] and p.grad is not None:
                p.grad.mul_(p.abs() > d)
        super().step()
        for group in self.param_groups:
            group["done"] += 1
        for p, group in spines:
            self.state[p]["theta"] = p.clone()
            p.copy_(soft_threshold(p, threshold(group)))
        return loss


def threshold(group: dict[str, Any]) -> float:
    """d after the updates that were made."""
    return group["threshold"] * CURVES[group["curve"]](min(1.0, group["done"] / group["updates"]))


class STDS(Spines, Adam):
    """State transition of dendritic spines on Adam, as on CIFAR-10.

    updates: N, of the whole training.  threshold: D, 1 to 5 in the paper.  curve: sine, linear or constant.
    prune: the parameters with a threshold; None for all with more than one axis. Where a method has layers of its own
    (an adapter, say), name those of the student: prune=[p for p in student.parameters() if p.ndim > 1].
    straight_through: False stops the gradient of silent synapses, the plain soft threshold.
    how: settings of Adam, lr=1e-4 and no weight decay in the paper.
    """


class SGDSTDS(Spines, SGD):
    """The same on SGD: lr=0.1, momentum=0.9 and a threshold of 0.1 to 5 on ImageNet."""
