"""Lesson 10: the family of objectives."""
