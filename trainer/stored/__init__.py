"""Models on disk: checkpoints, weights, exports to Hugging Face layouts, and conversions of them."""
