"""Lesson 13: reading attention."""
