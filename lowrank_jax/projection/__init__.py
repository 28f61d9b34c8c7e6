"""Projection optimizers as optax transformations: one transformation with slots, and named
recipes."""
