"""Graders: hold a student's answer against properties and closed forms, and say which idea is missing.

A grader is a function of the lesson's test_exercises.py: it takes one exercise under its name, and its assertions speak
to the student. The same functions run on the command line (`make grade LESSON=8`), in a notebook (`Lesson.check`) and
under pytest.
"""

import importlib
import inspect
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

LESSONS = Path(__file__).parent


class NotDone(NotImplementedError):
    """Raised by an exercise that nobody has filled in yet."""


def todo(task: str):
    """The body of every stub."""
    raise NotDone(f"Not done yet: {task}")


@dataclass(frozen=True)
class Verdict:
    """What one grader says of an answer; message is None where it is content."""

    grader: str
    message: str | None = None

    @property
    def passed(self) -> bool:
        return self.message is None


def lesson_names() -> dict[int, str]:
    """Number -> folder name, such as 8: "lesson_08_dmd", of all lessons."""
    return {int(path.name.split("_")[1]): path.name for path in sorted(LESSONS.glob("lesson_[0-9][0-9]_*"))}


def lesson_name(number: int) -> str:
    """Raises ValueError for a lesson that does not exist."""
    names = lesson_names()
    if number not in names:
        raise ValueError(f"There is no lesson {number}; there are {', '.join(map(str, names))}.")
    return names[number]


def answers(lesson: str) -> ModuleType:
    """The lesson's exercises.py as it is on disk now; with SF_SOLUTIONS=1 its solutions.py."""
    which = "solutions" if os.environ.get("SF_SOLUTIONS") == "1" else "exercises"
    return importlib.reload(importlib.import_module(f"tutorial.{lesson}.{which}"))


def graders(lesson: str) -> dict[str, list[Callable]]:
    """Exercise -> its graders, both in the order of test_exercises.py."""
    found: dict[str, list[Callable]] = {}
    for name, function in vars(importlib.import_module(f"tutorial.{lesson}.test_exercises")).items():
        if name.startswith("test_"):
            (exercise,) = inspect.signature(function).parameters
            found.setdefault(exercise, []).append(function)
    return found


def grade(lesson: str, exercise: str, answer: Callable) -> list[Verdict]:
    """What every grader of an exercise says of an answer. Raises ValueError for an exercise that is none."""
    known = graders(lesson)
    if exercise not in known:
        raise ValueError(f"{lesson} has no exercise {exercise}; it has {', '.join(known)}.")
    return [judge(grader, answer) for grader in known[exercise]]


def judge(grader: Callable, answer: Callable) -> Verdict:
    """One grader's verdict. Whatever the answer raises is a message too: a student's code may fail in any way."""
    name = grader.__name__.removeprefix("test_").replace("_", " ")
    try:
        grader(answer)
    except NotDone as stub:
        return Verdict(name, str(stub))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, AssertionError) and place.filename == grader.__code__.co_filename:
            return Verdict(name, str(error).split("\nassert ")[0] or "This does not hold.")
        where = f"{Path(place.filename).name}, line {place.lineno}"
        return Verdict(name, f"Your code stopped with {type(error).__name__}: {error} ({where}).")
    return Verdict(name)


def report(exercise: str, verdicts: list[Verdict]) -> str:
    """The verdicts for a terminal or a notebook; a stub says once that it is one."""
    messages = {verdict.message for verdict in verdicts}
    passed = sum(verdict.passed for verdict in verdicts)
    if len(messages) == 1 and not passed:
        return f"{exercise}: {messages.pop()}"
    lines = [f"{exercise}: {'done' if passed == len(verdicts) else f'{passed} of {len(verdicts)}'}"]
    for verdict in verdicts:
        lines.append(f"  [{'x' if verdict.passed else ' '}] {verdict.grader}")
        lines += [] if verdict.passed else [f"      {verdict.message}"]
    return "\n".join(lines)
