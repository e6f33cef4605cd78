"""Engines: what drives a training step. Importing the package imports none of them."""
