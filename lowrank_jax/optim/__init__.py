"""What projection optimizers and optimizers of pairs share: inner transformations, moments, rate and decay, guard."""
