"""Lesson 3: Wan from the inside."""
