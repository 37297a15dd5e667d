"""Lesson 14: full scale."""
