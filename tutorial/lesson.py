"""What a notebook of the course needs besides the code that it is about.

A notebook begins with `lesson = Lesson(8)`. Then it has:

    lesson.source(dmd_loss)                          # the code itself, by inclusion, and where it stands
    lesson.exercise("dmd_loss")                      # what to do, with hints that open one by one
    lesson.check("dmd_loss")                         # grade exercises.py as it is on disk now
    lesson.show(figure, "two_worlds")                # a picture; SF_KEEP=1 keeps one to expect
    lesson.turn(draw, t=(0.0, 1.0))                  # what draw(t=...) returns, with a slider
    lesson.play(videos, "name")                      # clips in motion
    lesson.animate(figures, "name")                  # figures one after the other, in motion
    lesson.expect("accuracy lost", value, 0.2, 0.6)  # say a number and hold it against its range
    lesson.budget(full=200, fast=5)                  # SF_FAST=1 makes every notebook finish in about a minute
"""

import inspect
import os
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from textwrap import dedent

import torch
from IPython.display import Image, Markdown, display
from ipywidgets import interactive
from matplotlib.figure import Figure
from torch import Tensor

from tutorial.grading import LESSONS, answers, grade, lesson_name, report
from visualization import animate, save_video_grid
from visualization.style import reduce_colours, words_in

REPOSITORY = LESSONS.parent


class Lesson:
    """One lesson as its notebook sees it. From now on paths are relative to the repository, as in the README."""

    def __init__(self, number: int):
        self.name = lesson_name(number)
        self.folder = LESSONS / self.name
        self.fast = os.environ.get("SF_FAST") == "1"
        os.chdir(REPOSITORY)  # Jupyter starts a notebook in its own folder
        self.outputs = Path("outputs/lessons") / self.name.removeprefix("lesson_")
        self.outputs.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        if self.fast:
            print("SF_FAST=1: everything is cut short, and numbers are not held against their ranges.")

    @property
    def exercises(self):
        """exercises.py as it is on disk now; with SF_SOLUTIONS=1, solutions.py."""
        return answers(self.name)

    def budget(self, full, fast):
        """One of the two: how much work a cell may do."""
        return fast if self.fast else full

    def source(self, thing, start: str | None = None, stop: str | None = None) -> None:
        """Show the source of a function, class or method, or its lines from the first that holds `start` to the next
        that holds `stop`. Raises ValueError where there is no such line."""
        thing = inspect.unwrap(thing)
        lines, first = inspect.getsourcelines(thing)
        begin = find(lines, start, 0) if start else 0
        end = find(lines, stop, begin) if stop else len(lines) - 1
        path = Path(inspect.getsourcefile(thing)).relative_to(REPOSITORY)
        place = f"[`{path}`](../{path}), lines {first + begin} to {first + end}"
        display(Markdown(f"{place}\n```python\n{dedent(''.join(lines[begin : end + 1])).rstrip()}\n```"))

    def exercise(self, name: str) -> None:
        """Show an exercise of the lesson's README, hints folded. Raises ValueError for one that is none."""
        display(Markdown(exercise_text(self.folder / "README.md", name)))

    def check(self, name: str, answer: Callable | None = None) -> None:
        """Print what the graders say of an answer, by default the one in exercises.py."""
        print(report(name, grade(self.name, name, answer or getattr(self.exercises, name))))

    def show(self, figure, name: str) -> None:
        """Show a figure. With SF_KEEP=1 it becomes the picture that the notebook says to expect, if it does."""
        if os.environ.get("SF_KEEP") == "1" and not self.fast:
            kept = self.folder / "expected" / f"{name}.png"
            notebook = REPOSITORY / "notebooks" / f"{self.name.removeprefix('lesson_')}.ipynb"
            if f"expected/{kept.name}" in notebook.read_text():
                kept.parent.mkdir(exist_ok=True)
                figure.savefig(kept, dpi=100)
                reduce_colours(kept)
        display(figure, metadata=alt(figure))

    def turn(self, draw: Callable, **sliders) -> None:
        """Show what draw(**values) returns, anew whenever somebody moves one of its sliders, which are those of
        `ipywidgets.interact` and begin at draw's defaults. SF_FAST shows it once: nobody is there to move anything."""

        @wraps(draw)
        def look(**values):
            if (shown := draw(**values)) is not None:  # a draw that shows by itself returns nothing
                display(shown, metadata=alt(shown))

        if self.fast:
            look(**interactive(wraps(draw)(lambda **values: None), **sliders).kwargs)
        else:
            display(interactive(look, **sliders))

    def play(self, videos: Tensor, name: str, labels: Sequence[str] | None = None, columns=None, **options) -> None:
        """Show clips [B, F, C, H, W] as a looping GIF, side by side."""
        path = save_video_grid(videos, self.outputs / f"{name}.gif", columns=columns, labels=labels, **options)
        shown = [labels] if isinstance(labels, str) else labels or [name]
        display(Image(filename=str(path), alt=f"Videos in motion: {', '.join(shown)}"))

    def animate(self, figures, name: str, **options) -> None:
        """Show figures one after the other, as a looping GIF."""
        figures = list(figures)
        path = animate(figures, self.outputs / f"{name}.gif", **options)
        display(Image(filename=str(path), alt=f"In motion: {words_in(figures[0])}"))

    def expect(self, what: str, value: float, low: float, high: float) -> None:
        """Print a number next to the range in which it was seen to lie. Outside of SF_FAST, raises ValueError where it
        does not: then something is broken, or the lesson's text is no longer true."""
        print(f"{what}: {value:.3g} (expected {low:g} to {high:g})")
        if not self.fast and not low <= value <= high:
            raise ValueError(f"{what} is {value:.3g}, outside of {low:g} to {high:g}.")


def alt(shown) -> dict | None:
    """What a screen reader says of a figure: the words that are in it."""
    return {"image/png": {"alt": words_in(shown)}} if isinstance(shown, Figure) else None


def find(lines: Sequence[str], text: str, begin: int) -> int:
    """The first line from `begin` on that holds the text."""
    for number, line in enumerate(lines[begin:], begin):
        if text in line:
            return number
    raise ValueError(f"No line of that source holds {text!r}.")


def exercise_text(readme: Path, name: str) -> str:
    """The section "### `name` ..." of a lesson's README."""
    sections = re.split(r"^(?=#{2,3} )", readme.read_text(), flags=re.M)
    for section in sections:
        if section.startswith(f"### `{name}`"):
            return section
    raise ValueError(f"{readme.parent.name} has no exercise {name}.")
