"""Benchmarks: each is a program that prints a table and writes the JSON that the README's tables
are made from."""
