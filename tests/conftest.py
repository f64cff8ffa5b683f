"""One thread a process: the tests run side by side, and results must not depend on how many cores there are."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
