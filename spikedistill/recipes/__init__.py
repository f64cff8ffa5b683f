"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import bench, distill, quickstart

RECIPES = {"bench": bench, "distill": distill, "quickstart": quickstart}
