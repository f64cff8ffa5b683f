"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import bench, compare, distill, quickstart

RECIPES = {"bench": bench, "compare": compare, "distill": distill, "quickstart": quickstart}
