"""Training: configuration, data, engines, the loop and its callbacks. Importing the package imports nothing."""
