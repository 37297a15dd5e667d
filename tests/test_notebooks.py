"""The notebooks as files: clean, in the form of the course, defining nothing that the code defines."""

import ast
import json
import re
from pathlib import Path

import pytest
from test_imports import SOURCES

from tutorial import lesson as tutorial_lesson
from tutorial.grading import lesson_names
from visualization import plot_lines

REPOSITORY = Path(__file__).parent.parent
LESSONS = [REPOSITORY / "notebooks" / f"{name.removeprefix('lesson_')}.ipynb" for name in lesson_names().values()]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
CORE = {
    node.name
    for name, tree in SOURCES.items()
    if name.partition(".")[0] not in ("tutorial", "tests", "conftest")
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
} - {"main"}
NAMES_WITH_A_POINT = (
    r"Wan ?2\.\d|\d+\.\d+B|arXiv \d{4}\.\d{5}|abs/\d{4}\.\d{5}|\d{4}\.\d{5}|(?:Python|section|eq\.|sec\.) \d[\d.]*"
)

lessons = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    book = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def definitions(path):
    """Functions and classes that the code cells define, also inside of functions; a method belongs to its class."""
    trees = [ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)) for source in cells(path, "code")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    methods = {id(method) for node in nodes if isinstance(node, ast.ClassDef) for method in node.body}
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in nodes if isinstance(node, kinds) and id(node) not in methods}


def prose(source):
    """Markdown without code, formulas, links' targets and names that have a point in them."""
    source = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]*>", " ", source, flags=re.S)
    return re.sub(NAMES_WITH_A_POINT, " ", source)


@notebooks
def test_a_notebook_is_kept_without_outputs(path):
    """So that a change is a change of the text, and no number is older than the code."""
    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])


@notebooks
def test_a_notebook_defines_nothing_that_the_code_defines(path):
    """It imports, shows, perturbs and plots."""
    assert not definitions(path) & CORE


def test_the_search_for_definitions_can_fail():
    """The core's names are known, methods inside of a class are not among them."""
    assert {"rollout", "dmd_loss", "KVCache", "load_transformer"} <= CORE and "extend" not in CORE


@pytest.mark.parametrize("lesson", lesson_names().values())
def test_an_exercise_is_a_stub_and_solutions_import_the_core(lesson):
    """exercises.py computes nothing; what the core has, solutions.py does not write again."""
    stubs = ast.parse((REPOSITORY / "tutorial" / lesson / "exercises.py").read_text())
    for node in ast.walk(stubs):
        if isinstance(node, ast.FunctionDef):
            statements = [one for one in node.body if not isinstance(getattr(one, "value", None), ast.Constant)]
            assert len(statements) == 1 and ast.unparse(statements[0]).startswith("todo("), node.name
    solutions = ast.parse((REPOSITORY / "tutorial" / lesson / "solutions.py").read_text())
    own = {node.name for node in solutions.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not own & CORE


@lessons
def test_a_lesson_says_what_it_wants_first(path):
    """Title, what one will be able to do, how long it takes, what one needs."""
    first = cells(path, "markdown")[0]
    number = int(path.stem[:2])
    assert first.startswith(f"# Lesson {number}: ")
    for what in ("**You will be able to**", "**Time**:", "**You need**"):
        assert what in first, what
    assert re.search(r"\*\*Time\*\*: \d+ minutes? on two CPU cores", first)


@lessons
def test_a_lesson_quotes_no_number_of_its_own(path):
    """A measured number is printed by `lesson.expect` with its range; no text stays true by itself."""
    for source in cells(path, "markdown"):
        assert not re.findall(r"\d+\.\d+|\d+ ?%", prose(source)), source


@lessons
def test_a_lesson_has_all_its_parts(path):
    """Code by inclusion, an experiment with an expected picture, every exercise, the full scale, the way on."""
    code, text = "\n".join(cells(path, "code")), "\n".join(cells(path, "markdown"))
    assert f"lesson = Lesson({int(path.stem[:2])})" in code
    for call in ("lesson.source(", "lesson.show(", "lesson.expect(", "lesson.exercise(", "lesson.check("):
        assert call in code, call
    assert "full scale" in text.lower() and f"../tutorial/lesson_{path.stem}/README.md" in text
    exercised = set(re.findall(r'lesson\.check\("(\w+)"', code))
    assert exercised == set(re.findall(r'lesson\.exercise\("(\w+)"', code))


@lessons
def test_every_expected_picture_is_there_and_described(path):
    """Each image of the text is a file, has an alternative text, and is shown again by the code below it."""
    code = "\n".join(cells(path, "code"))
    for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", "\n".join(cells(path, "markdown"))):
        assert len(alt) > 20, target
        picture = (path.parent / target).resolve()
        assert picture.is_file(), target
        if "expected" in picture.parts:
            assert f'"{picture.stem}"' in code, f"nothing shows {picture.stem}"


@lessons
def test_no_picture_is_kept_that_nobody_expects(path):
    """What lies in expected/ is in the text of the notebook."""
    text = path.read_text()
    kept = (REPOSITORY / "tutorial" / f"lesson_{path.stem}" / "expected").glob("*.png")
    assert not [picture.name for picture in kept if f"expected/{picture.name}" not in text]


@pytest.fixture
def shown(monkeypatch):
    """A lesson outside of a notebook, and what it displays."""
    monkeypatch.chdir(REPOSITORY)  # where a lesson goes
    monkeypatch.delenv("SF_FAST", raising=False)
    seen = []
    monkeypatch.setattr(tutorial_lesson, "display", lambda thing, metadata=None: seen.append((thing, metadata)))
    return tutorial_lesson.Lesson(5), seen


def test_a_picture_is_shown_with_its_words(shown, tmp_path, monkeypatch):
    """For who cannot see it; SF_KEEP writes it where the notebook expects one of that name, and nowhere else."""
    lesson, seen = shown
    monkeypatch.setattr(lesson, "folder", tmp_path)
    monkeypatch.setenv("SF_KEEP", "1")
    figure = plot_lines({"kept": [1, 2]}, "frame", "pixels", "Two caches")
    for name in ("cost", "nobody_expects_this"):
        lesson.show(figure, name)
    assert set(seen[0][1]["image/png"]["alt"].split("; ")) == {"Two caches", "frame", "pixels", "kept"}
    assert [path.name for path in tmp_path.rglob("*.png")] == ["cost.png"]
    monkeypatch.setattr(lesson, "outputs", tmp_path)
    lesson.animate(iter([figure, figure]), "moves")
    assert seen[-1][0].alt.startswith("In motion: ") and (tmp_path / "moves.gif").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_sliders_begin_at_the_defaults_of_what_they_draw(shown, monkeypatch, fast):
    """Without a default, at the middle of a range and at the first of several options."""
    lesson, seen = shown
    monkeypatch.setattr(lesson, "fast", fast)
    lesson.turn(
        lambda size, digit=8, way="right": f"{digit} {way} {size}", digit=range(10), way=["up", "right"], size=(0, 4)
    )
    if fast:
        assert seen[-1][0] == "8 right 2"
    else:
        values = {slider.description: slider.value for slider in seen[-1][0].kwargs_widgets}
        assert values == {"digit": 8, "way": "right", "size": 2}


def test_a_slider_that_shows_by_itself_shows_once(shown, monkeypatch):
    """Without anybody to move it: what draw returns is displayed, a figure with its words, and nothing for a draw that
    displays by itself."""
    lesson, seen = shown
    monkeypatch.setattr(lesson, "fast", True)
    lesson.turn(lambda t: f"at {t}", t=(0, 4))
    lesson.turn(lambda t: None, t=(0, 4))
    lesson.turn(lambda t: plot_lines({"kept": [t, 2]}, "frame", "pixels"), t=(0, 4))
    assert [thing for thing, _ in seen[:-1]] == ["at 2"]
    assert set(seen[-1][1]["image/png"]["alt"].split("; ")) == {"frame", "pixels", "kept"}
