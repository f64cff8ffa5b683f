"""Optimisers that are methods: their own update rule, for `Stage.optim` and any loop of yours."""

from spikedistill.optim.stds import SGDSTDS, STDS, sparsity  # 2022 Chen et al., ICML, STDS

__all__ = ["SGDSTDS", "STDS", "sparsity"]
