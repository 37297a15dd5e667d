"""The exercises of every lesson: stubs that say so, graders that turn down what students typically get wrong."""

import importlib
import inspect

import pytest

from tutorial.grading import LESSONS, NotDone, grade, graders, judge, lesson_name, lesson_names
from tutorial.lesson import exercise_text

ALL = [(lesson, exercise) for lesson in lesson_names().values() for exercise in graders(lesson)]
IDS = [f"{lesson.split('_')[1]}-{exercise}" for lesson, exercise in ALL]
exercises = pytest.mark.parametrize(("lesson", "exercise"), ALL, ids=IDS)


def part(lesson, name):
    return importlib.import_module(f"tutorial.{lesson}.{name}")


def typical(lesson):
    return importlib.import_module(f"tests.wrong_answers.{lesson}")


def messages(lesson, exercise, answer):
    return [verdict.message for verdict in grade(lesson, exercise, answer) if not verdict.passed]


@pytest.mark.parametrize("lesson", lesson_names().values())
def test_a_lesson_has_three_exercises_or_more(lesson):
    """And exercises.py, solutions.py and the graders name the same ones."""
    named = set(graders(lesson))
    assert len(named) >= 3
    assert named == set(part(lesson, "solutions").__all__)
    assert named <= set(vars(part(lesson, "exercises")))


@exercises
def test_the_stub_has_the_solutions_signature(lesson, exercise):
    """So that what a student writes can take the place of the real function."""
    stub, solution = (getattr(part(lesson, name), exercise) for name in ("exercises", "solutions"))
    assert list(inspect.signature(stub).parameters) == list(inspect.signature(solution).parameters)
    assert stub.__doc__


@exercises
def test_a_stub_fails_with_its_own_message(lesson, exercise):
    """Every grader reaches the stub before anything else can go wrong."""
    stub = getattr(part(lesson, "exercises"), exercise)
    verdicts = grade(lesson, exercise, stub)
    assert all((verdict.message or "").startswith("Not done yet: ") for verdict in verdicts), verdicts
    assert len({verdict.message for verdict in verdicts}) == 1
    with pytest.raises(NotDone):
        raise NotDone(verdicts[0].message)


@exercises
def test_the_solution_passes(lesson, exercise):
    """The core itself, where it has the function, is a right answer."""
    assert messages(lesson, exercise, getattr(part(lesson, "solutions"), exercise)) == []


@exercises
def test_an_independent_right_answer_passes(lesson, exercise):
    """Written without the solution: graders test properties, not equality of code."""
    answer = typical(lesson).RIGHT[exercise]
    assert answer is not getattr(part(lesson, "solutions"), exercise)
    assert messages(lesson, exercise, answer) == []


@pytest.mark.parametrize(
    ("lesson", "exercise", "answer"),
    [(lesson, exercise, answer) for lesson, exercise in ALL for answer in typical(lesson).WRONG[exercise]],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_typical_wrong_answer_is_turned_down(lesson, exercise, answer):
    """With a sentence that speaks of the idea, not with a crash."""
    found = messages(lesson, exercise, answer)
    assert found
    assert any(not message.startswith("Your code stopped") for message in found), found
    assert all(message != "This does not hold." for message in found), "an assertion of a grader has no message"


@exercises
def test_three_wrong_answers_are_kept(lesson, exercise):
    """All different."""
    assert len(set(typical(lesson).WRONG[exercise])) >= 3


@exercises
def test_the_readme_has_the_exercise_with_hints(lesson, exercise):
    """What to do, how long it may take, and at least two hints that open one by one."""
    text = exercise_text(LESSONS / lesson / "README.md", exercise)
    heading = text.splitlines()[0]
    assert "minutes)" in heading or "an evening)" in heading, heading
    assert text.count("<details>") == text.count("</details>") >= 2
    assert len(text) > 200


def test_a_students_own_assertion_is_not_the_graders():
    """It is told as what it is, with its place; a grader's complaint is told by itself."""

    def kind_grader(exercise):
        assert exercise() == 3, "Three is the idea."

    def wrong():
        return 2

    assert judge(kind_grader, wrong).message == "Three is the idea."
    namespace = {}
    exec(compile("def careful():\n    assert 1 > 2, 'my own check'\n", "exercises.py", "exec"), namespace)
    said = judge(kind_grader, namespace["careful"]).message
    assert said == "Your code stopped with AssertionError: my own check (exercises.py, line 2)."


def test_an_unknown_lesson_is_one_sentence():
    """It names those that exist."""
    with pytest.raises(ValueError, match="There is no lesson 99; there are"):
        lesson_name(99)
