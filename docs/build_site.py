"""The course as a site, for any browser, without a network: make site, then open build/site/index.html.

    python docs/build_site.py            # MkDocs checks every link and anchor inside of the course
    python docs/build_site.py --links    # list the links that lead outside, for a machine with a network

MkDocs wants all pages in one folder, so this writes them to build/site_pages/, at the places that they have in the
repository, with what GitHub and Jupyter do for a reader done beforehand: notebooks become pages (with the outputs of
`make notebooks`, where there are any), formulas become MathML, and a link to a source file leads to a page of it.
"""

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
PAGES, EXECUTED = ROOT / "build/site_pages", ROOT / "outputs/notebooks"
PICTURES = (".png", ".gif", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".sbatch": "bash"}
CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", re.S)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--links", action="store_true", help="list the links that lead outside instead")
    links = parser.parse_args().links
    write_pages()
    if links:
        print("\n".join(outside_links()))
        return
    # not --quiet: it would keep warnings from being counted as errors
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=ROOT,
        check=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


def outside_links() -> list[str]:
    """Every address that a page leads to, with one page that does."""
    found = {}
    for page in sorted(PAGES.rglob("*.md")):
        for address in re.findall(r"(?<=\]\()https?://[^)\s]+", page.read_text()):
            found.setdefault(address, page.relative_to(PAGES))
    return [f"{address}  ({page})" for address, page in sorted(found.items())]


def write_pages() -> None:
    """Everything that git knows and a reader may open."""
    shutil.rmtree(PAGES, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = Path(name)
        if path.suffix == ".md":
            write_page(path, (ROOT / path).read_text())
        elif path.suffix == ".ipynb":
            write_notebook(path)
        elif path.suffix in (*PICTURES, ".css"):
            (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, PAGES / path)


def write_notebook(path: Path) -> None:
    """The notebook as a page, with its outputs if it was executed as it is now."""
    book = nbformat.read(ROOT / path, 4)
    if (EXECUTED / path.name).exists():
        executed = nbformat.read(EXECUTED / path.name, 4)
        if [cell.source for cell in executed.cells] == [cell.source for cell in book.cells]:
            book = executed
    for cell in book.cells:
        if "outputs" in cell:  # progress bars are for those who wait
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    pictures_to_files(book, path)
    text, _ = MarkdownExporter().from_notebook_node(book)
    where = f"*This page is [`{path}`]({path.name}) as it stands; open it with `make lab` to change things.*"
    title, _, rest = text.strip().partition("\n")
    write_page(path.with_suffix(".md"), f"{title}\n\n{where}\n{rest}\n")


def pictures_to_files(book, page: Path) -> None:
    """Every picture of an output becomes a file beside the page, and the output a link to it, with the words for those
    who cannot see it."""
    for i, cell in enumerate(book.cells):
        for j, output in enumerate(cell.get("outputs", ())):
            for kind in ("image/gif", "image/png"):
                if kind not in output.get("data", {}):
                    continue
                name = f"{page.stem}_files/picture_{i}_{j}.{kind.removeprefix('image/')}"
                target = PAGES / page.parent / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(output.data[kind]))
                words = output.metadata.get(kind, {}).get("alt") or "an output of the cell above"
                output.data = {"text/markdown": f"![{re.sub(r'[][]', '', words)}]({name})"}


def write_page(path: Path, text: str) -> None:
    """A page with formulas, links and folded parts as MkDocs needs them; code stays as it is."""
    parts = CODE.split(text)
    parts[::2] = [for_mkdocs(part, path) for part in parts[::2]]
    target = PAGES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(parts))


def for_mkdocs(text: str, page: Path) -> str:
    text = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1].strip(), display="block"), text, flags=re.S)
    text = re.sub(r"(?<![\\$\w])\$([^$\n]+?)\$(?!\d)", lambda found: convert(found[1]), text)
    text = text.replace("<details>", '<details markdown="1">')
    return LINK.sub(partial(link, page=page), text)


def link(found: re.Match, page: Path) -> str:
    """The target of a link as it is called on the site; a linked source file gets a page."""
    target, anchor = found[1], found[2] or ""
    file = (ROOT / page.parent / target).resolve()
    if ":" in target or not file.is_file() or file.suffix in (".md", *PICTURES):
        return target + anchor
    if file.suffix == ".ipynb" and page.with_suffix(".ipynb") != file.relative_to(ROOT):
        return target.removesuffix(".ipynb") + ".md" + anchor
    source_page(file.relative_to(ROOT))
    return target + ".md"


def source_page(path: Path) -> None:
    """A page that shows a file."""
    target = PAGES / f"{path}.md"
    if path.suffix == ".ipynb":
        text = json.dumps(json.loads((ROOT / path).read_text()), indent=1)
    else:
        text = (ROOT / path).read_text()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"# {path}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text.rstrip()}\n````\n")


if __name__ == "__main__":
    main()
