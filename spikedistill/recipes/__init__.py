"""Jobs, one file each: a docstring with the command, a Config, and run(config). `spikedistill cp` copies one out."""

from spikedistill.recipes import bench, ckd_events, compare, distill, distilling_spikes, export, predict, quickstart

RECIPES = {
    "bench": bench,
    "ckd_events": ckd_events,
    "compare": compare,
    "distill": distill,
    "distilling_spikes": distilling_spikes,
    "export": export,
    "predict": predict,
    "quickstart": quickstart,
}
