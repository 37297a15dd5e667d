"""Grade the exercises of a lesson: python -m tutorial 8, or make grade LESSON=8

It grades what is in tutorial/lesson_08_dmd/exercises.py; with SF_SOLUTIONS=1, what is in solutions.py.
"""

import argparse
import sys

from tutorial.grading import answers, grade, graders, lesson_name, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("lesson", type=int, help="its number")
    name = lesson_name(parser.parse_args().lesson)
    given, complete = answers(name), True
    for exercise in graders(name):
        verdicts = grade(name, exercise, getattr(given, exercise))
        complete &= all(verdict.passed for verdict in verdicts)
        print(report(exercise, verdicts), flush=True)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"tutorial: {error}")
