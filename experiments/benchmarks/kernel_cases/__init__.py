"""What each kernel is compared on: a module for a kernel, whose `cases(kind, chip)` yields
`base.Case`."""
