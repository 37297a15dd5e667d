"""Lesson 6: exposure bias, measured."""
