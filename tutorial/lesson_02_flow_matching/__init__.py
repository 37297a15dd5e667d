"""Lesson 2: flow matching."""
