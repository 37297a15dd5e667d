"""Lesson 0: the first video."""
