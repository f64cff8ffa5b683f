"""How many directions of a matrix are more than noise: empirical variational Bayes matrix factorisation.

    x_h = s_h^2 / (M sigma^2)      s_h: singular values of an [L, M] matrix, L <= M;  alpha = L / M
    t_h = ( x_h - (1 + alpha) + sqrt( (x_h - (1 + alpha))^2 - 4 alpha ) ) / 2
    F   = sum_{x_h <= x_ub} ( x_h - ln x_h )
        + sum_{x_h > x_ub} ( x_h - t_h + ln( (t_h + 1) / x_h ) + alpha ln( t_h / alpha + 1 ) )
    x_ub = (1 + tau) (1 + alpha / tau), tau = 2.5129 sqrt(alpha);  sigma^2 minimises F;  rank = #{ x_h > x_ub }

Nakajima, Sugiyama, Babacan, Tomioka, JMLR 14 (2013), https://jmlr.org/papers/v14/nakajima13a.html.
"""

from math import ceil, sqrt

import torch
from torch import Tensor


def evb_rank(matrix: Tensor) -> int:
    """How many singular values of a matrix are above its noise (empirical variational Bayes, noise estimated)."""
    small, large = sorted(matrix.shape)
    s2 = torch.linalg.svdvals(matrix.detach().double().cpu()).square()
    alpha = small / large
    tau = 2.5129 * sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    cut = ceil(small / (1 + alpha)) - 1
    upper = s2.sum() / (small * large)
    lower = torch.maximum(s2[cut] / (large * edge), s2[cut:].mean() / large)
    if upper <= 0:
        return 0
    lower = lower.clamp(min=1e-12 * upper, max=upper)
    for _ in range(2):  # a grid, and a finer one around its best point: the objective has several minima
        sigma2 = torch.exp(torch.linspace(float(lower.log()), float(upper.log()), 2000, dtype=s2.dtype))
        x = (s2 / (large * sigma2[:, None])).clamp_min(1e-30)
        t = (x - (1 + alpha) + ((x - (1 + alpha)).square() - 4 * alpha).clamp_min(0).sqrt()) / 2
        t = t.clamp_min(1e-30)
        signal = x - t + torch.log((t + 1) / x) + alpha * torch.log(t / alpha + 1)
        best = torch.where(x > edge, signal, x - x.log()).sum(1).argmin()
        lower, upper = sigma2[max(best - 1, 0)], sigma2[min(best + 1, 1999)]
    return int((s2 > large * sigma2[best] * edge).sum())


def estimated_rank(weight: Tensor) -> int:  # [O, I, 3, 3] -> rank
    """`evb_rank` of the kernel by outputs, or by inputs where that is 0; 0 where both see noise alone."""
    return evb_rank(weight.flatten(1)) or evb_rank(weight.transpose(0, 1).flatten(1))
