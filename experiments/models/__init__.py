"""Models the experiments train."""
