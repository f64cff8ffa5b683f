"""The parts of `distill` that know nothing of its settings: what fits together, and the teacher."""
