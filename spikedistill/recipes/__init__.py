"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import compare, distill, quickstart

RECIPES = {"compare": compare, "distill": distill, "quickstart": quickstart}
