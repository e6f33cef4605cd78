"""Post-training: supervised fine-tuning, preferences, and reinforcement learning with verifiable rewards."""
