"""The product's processes with a fault agent inside: what `tests.faults.processes.launcher` starts instead of them."""
