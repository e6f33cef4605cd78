"""Layouts of Hugging Face: configurations and parameters' names there, and ours. One file per architecture."""
