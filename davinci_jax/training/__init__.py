"""The run: state, step, loop, checkpoints, metrics and plan."""
