"""Configurations: sections whose fields check themselves, and the command line that sets them."""
