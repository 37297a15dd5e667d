"""Lesson 11: sick runs."""
