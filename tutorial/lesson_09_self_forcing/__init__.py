"""Lesson 9: Self-Forcing itself."""
