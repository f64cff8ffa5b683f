"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import distill, export, predict, quickstart

RECIPES = {"distill": distill, "export": export, "predict": predict, "quickstart": quickstart}
