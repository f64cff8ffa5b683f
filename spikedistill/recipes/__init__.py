"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import bench, compare, distill, export, predict, quickstart

RECIPES = {
    "bench": bench,
    "compare": compare,
    "distill": distill,
    "export": export,
    "predict": predict,
    "quickstart": quickstart,
}
