"""Data: preparing token files, and reading them as batches that depend on nothing but (seed, step).

`layout` (file names, prefixes) and `prepare_config` need only the standard library, so that a wrong setting is
reported before anything heavy is imported. `prepare` writes, `dataset` reads, `batch` holds what a training step
receives.
"""
