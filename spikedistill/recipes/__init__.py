"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import distill, quickstart

RECIPES = {"distill": distill, "quickstart": quickstart}
