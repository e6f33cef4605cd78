"""Mixture of experts: routers, the layer, and routing statistics."""
