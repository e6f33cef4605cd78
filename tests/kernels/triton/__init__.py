"""Triton's kernels against float64 references: in the interpreter, or on a GPU where there is one."""
