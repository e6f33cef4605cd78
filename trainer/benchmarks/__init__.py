"""Benchmarks for `spiketrain bench NAME`, one module each, and their shared code.

Absolute times vary between machines and over minutes. Both sides of a comparison therefore alternate in one process,
and the result is the ratio of their medians.
"""
