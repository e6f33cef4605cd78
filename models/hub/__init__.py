"""Hugging Face layouts: mappings of configurations and parameter names, one file per architecture."""
