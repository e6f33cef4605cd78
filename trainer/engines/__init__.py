"""The engines that run training steps. Importing this package imports none of them."""
