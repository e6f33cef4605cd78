"""Verifiable rewards: what an answer is worth, computed in processes that may hang, crash or be attacked."""
