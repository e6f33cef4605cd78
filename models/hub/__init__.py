"""Hugging Face layouts: one adapter an architecture, configuration and parameter names both ways. Imports no torch.

    registry.py       from_hub, to_hub: the adapter of a config.json, the adapter that computes a model
    adapter.py        what an adapter says, and the checks of config.json that all share
    tensors.py        which block of which stored tensor holds which block of a parameter
    rope.py           rotary embeddings; values.py numbers and flags; experts.py mixtures of experts
    llama_family.py   transformers' decoders: llama, qwen2, qwen3, mistral, mixtral, qwen3_moe, qwen3_next
    fla_family.py     flash-linear-attention's models and hybrids: gla, retnet, hgrn, hgrn2, delta_net, gated_deltanet,
                      kda; and SpikingBrain-7B, gla_swa

To add one: a subclass in a file of its own, and a line in registry.py.
"""
