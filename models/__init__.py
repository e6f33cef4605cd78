"""Modules: pure maths, plain PyTorch. Importing the package imports nothing."""
