"""Data of post-training: rows of the public formats, their tokens and loss masks, packing, and samplers.

`rows` reads files of any of the formats in `formats` into one row type, `encode` turns rows into token sequences,
`packing` puts sequences into micro-batches, and `sampler` chooses those of a step as a function of (seed, step).
"""
