"""Experiments that hold papers' claims against our own runs (`spiketrain bench NAME`); figures in docs/results.md."""
