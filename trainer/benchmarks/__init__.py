"""Benchmarks for `spiketrain bench NAME`, one module each, and what they share.

Absolute times differ from machine to machine and from minute to minute. So both sides run in one process and by turns,
and what counts is the ratio of their medians.
"""
