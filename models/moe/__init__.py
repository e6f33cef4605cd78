"""Mixture of experts: routers, the layer, and what is counted of them."""
