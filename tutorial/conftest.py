"""pytest tutorial/lesson_08_dmd: every grader gets the exercise that it names."""

from pathlib import Path

from tutorial.grading import answers


def pytest_generate_tests(metafunc):
    given = answers(Path(metafunc.module.__file__).parent.name)
    for exercise in metafunc.fixturenames:
        metafunc.parametrize(exercise, [getattr(given, exercise)], ids=[given.__name__.rpartition(".")[2]])
