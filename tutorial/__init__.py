"""The lessons: a folder each, with exercises, solutions and graders. The notebooks that tell them are in notebooks/."""
