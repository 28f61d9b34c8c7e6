"""Products that understand what may stand in a kernel's place."""
