"""Wan 2.1 at full scale: the tiny model's own class, with real weights, kernels and many processes."""
