"""The families of adapters, one a file."""
