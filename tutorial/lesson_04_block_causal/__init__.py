"""Lesson 4: block-causal attention."""
