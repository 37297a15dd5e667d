"""The site, and the ways to the course that are not run here."""

import base64
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "docs"))  # a script, no part of the package

import build_site  # noqa: E402

PIXEL = base64.b64encode(b"not looked at").decode()


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.setattr(build_site, "PAGES", tmp_path)
    return tmp_path


def test_formulas_become_mathml_and_code_stays(pages):
    """Dollar signs in code and prices are no formulas; details are read as Markdown."""
    text = "So $x_t$ and\n\n$$\\frac{a}{b}$$\n\n`$HOME` costs $73.\n\n```bash\necho $A $B\n```\n<details>\n"
    build_site.write_page(Path("page.md"), text)
    page = (pages / "page.md").read_text()
    assert page.count("<math") == 2 and "<mfrac>" in page
    assert "`$HOME` costs $73." in page and "echo $A $B" in page and '<details markdown="1">' in page


def test_links_lead_to_pages(pages):
    """A source file gets a page that shows it, a notebook is one, Markdown, pictures and addresses stay."""
    text = "[a](../kv_cache.py) [b](../notebooks/05_kv_cache.ipynb) [c](faq.md#x) ![d](long_videos.png) [e](https://a.org/b.py)"
    build_site.write_page(Path("docs/page.md"), text)
    page = (pages / "docs/page.md").read_text()
    assert "[a](../kv_cache.py.md) [b](../notebooks/05_kv_cache.md)" in page
    assert "[c](faq.md#x) ![d](long_videos.png) [e](https://a.org/b.py)" in page
    assert (pages / "kv_cache.py.md").read_text().startswith("# kv_cache.py\n\n````python\n")
    assert build_site.outside_links() == ["https://a.org/b.py  (docs/page.md)"]


def test_a_notebook_shows_the_outputs_of_its_last_run(pages, tmp_path, monkeypatch):
    """If that run was of the same cells; else none."""
    monkeypatch.setattr(build_site, "EXECUTED", tmp_path / "executed")
    path = Path("notebooks/05_kv_cache.ipynb")
    book = json.loads((REPOSITORY / path).read_text())
    code = next(cell for cell in book["cells"] if cell["cell_type"] == "code")
    code["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["seen in the last run"]}]
    code["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["of a progress bar: 12%"]})
    (tmp_path / "executed").mkdir()
    for change, shown in (([], True), (["# another"], False)):
        code["source"] += change
        (tmp_path / "executed" / path.name).write_text(json.dumps(book))
        build_site.write_notebook(path)
        page = (pages / "notebooks/05_kv_cache.md").read_text()
        assert ("seen in the last run" in page) == shown and "progress bar" not in page
        assert page.startswith("# Lesson 5: the KV cache\n") and "05_kv_cache.ipynb.md" in page


def test_pictures_of_a_notebook_have_words(pages):
    """PNG and GIF become files, shown with the description that they came with."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    words = {"image/png": {"alt": "Drift; frame; [left]"}}
    book.cells[0].outputs = [
        nbformat.v4.new_output("display_data", {"image/png": PIXEL, "text/plain": "Figure"}, metadata=words),
        nbformat.v4.new_output("display_data", {"image/gif": PIXEL, "text/plain": "Image"}),
    ]
    build_site.pictures_to_files(book, Path("notebooks/05_kv_cache.ipynb"))
    shown = [output.data["text/markdown"] for output in book.cells[0].outputs]
    assert shown == [
        "![Drift; frame; left](05_kv_cache_files/picture_0_0.png)",
        "![an output of the cell above](05_kv_cache_files/picture_0_1.gif)",
    ]
    assert (pages / "notebooks/05_kv_cache_files/picture_0_1.gif").read_bytes() == base64.b64decode(PIXEL)


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    """Every link, anchor and page of the navigation is there: MkDocs is strict."""
    built = subprocess.run([sys.executable, "docs/build_site.py"], cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    index = (REPOSITORY / "build/site/index.html").read_text()
    assert "Self-Forcing" in index and not re.search(r'(?:src|href)="https?://[^"]*\.(?:js|css)"', index)


def test_every_way_to_the_course_uses_the_pinned_versions():
    """Container and Colab install what a laptop does, with a Python that the project takes."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    docker = (REPOSITORY / "Dockerfile").read_text()
    container = json.loads((REPOSITORY / ".devcontainer/devcontainer.json").read_text())
    colab = (REPOSITORY / "docs/elsewhere.md").read_text()
    for image in (re.search(r"FROM python:(\d+)\.(\d+)", docker), re.search(r":(\d+)\.(\d+)$", container["image"])):
        assert tuple(map(int, image.groups())) >= least
    assert "RUN make setup" in docker and container["postCreateCommand"] == "make setup"
    assert "--constraint constraints.txt" in colab and "==" not in docker + colab, "a pin beside constraints.txt"
    pinned = {line.partition("==")[0] for line in (REPOSITORY / "constraints.txt").read_text().splitlines()}
    for extra in ("notebooks", "site", "demo"):
        names = {re.split(r"[ \[<>=]", need)[0].lower() for need in project["optional-dependencies"][extra]}
        assert names <= pinned, names - pinned
