"""Benchmarks: each is a program that prints a table and writes the JSON that the tables of docs/results
are made from."""
