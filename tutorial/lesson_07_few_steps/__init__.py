"""Lesson 7: few steps."""
