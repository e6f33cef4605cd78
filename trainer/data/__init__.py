"""Data: preparation of token files, and batches that are a pure function of (seed, step).

`layout` (file names, prefixes) and `prepare_config` need only the standard library, so that invalid settings are
reported before any slow import. `prepare` writes, `dataset` reads, and `batch` defines the input of a training step.
"""
