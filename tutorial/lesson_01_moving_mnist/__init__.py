"""Lesson 1: Moving MNIST and its exact metrics."""
