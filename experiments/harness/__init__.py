"""The training loop and everything around it: tasks, optimizers, updates, checkpoints, run folders."""
