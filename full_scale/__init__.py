"""Wan 2.1 at full scale: the tiny model's own class, in the sizes of its published weights."""
