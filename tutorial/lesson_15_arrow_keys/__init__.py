"""Lesson 15: arrow keys, the capstone."""
