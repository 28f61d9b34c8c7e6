"""Finished runs and results for readers: the page, its figures, and the tables of the documents."""
