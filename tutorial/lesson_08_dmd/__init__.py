"""Lesson 8: distribution matching."""
