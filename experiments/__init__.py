"""Runnable programs around lowrank_jax: pre-training, reports, the study behind README,
benchmarks."""
