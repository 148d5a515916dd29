"""One run: mesh, optimiser, step, checkpoints, loop."""
