"""Lessons about Self-Forcing. They point at the code of the repository root and redefine none of it."""
