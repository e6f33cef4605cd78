"""Tasks of recall, generated at any length: what a model still knows of what it has read. Imports no torch."""
