"""What each kernel is compared on: one module a kernel, whose `cases` yields `base.Case`."""
