"""Finished runs and results for readers: the page, its figures, and README's tables."""
