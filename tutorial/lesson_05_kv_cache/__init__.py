"""Lesson 5: the KV cache."""
