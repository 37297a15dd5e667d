"""Lesson 12: longer than training."""
