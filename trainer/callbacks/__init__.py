"""Callbacks of the training loop: everything except the step itself."""
