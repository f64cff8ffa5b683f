"""The parts of `compare`: rows, the folder, what comes out, what it would cost, tuning, and processes."""
