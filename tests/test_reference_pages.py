"""The reference pages say what is there: links and anchors, functions, options and columns, and numbers of papers."""

import inspect
import json
import re
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pkgutil import resolve_name

import pytest
from omegaconf import OmegaConf
from tiny_runs import REPOSITORY

import metrics
from experiments.run import experiments, load_plan
from full_scale.parallelize import FullySharded
from run_folder import COLUMNS
from settings import GROUPS, TrainingConfig, check_options, load_config

PAGES = ["glossary", "paper_to_code", "faq", "troubleshooting", "field_map", "teaching"]
SKIPPED = {"logs", "outputs", "site", "build", "wan_models", "node_modules"}
WRITTEN_BY_RUNS = {"config.yaml", "metrics.csv", "samples/"}
FILE = r"\.(py|md|csv|yaml|json|txt|ipynb)$"


@cache
def markdown_files():
    tops = (top for top in REPOSITORY.iterdir() if top.name not in SKIPPED and not top.name.startswith("."))
    found = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*.md"))]
    return sorted(path for path in found if path.suffix == ".md")


def page(name):
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def headings(text):
    return re.findall(r"^#{1,6} +(.+?) *$", without_fences(text), re.M)


def github_anchor(heading):
    """GitHub's rule: links become their text, punctuation goes, each space becomes a hyphen."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@cache
def anchors(path):
    seen, found = defaultdict(int), set()
    for anchor in map(github_anchor, headings(path.read_text())):
        found.add(anchor if not seen[anchor] else f"{anchor}-{seen[anchor]}")
        seen[anchor] += 1
    return found


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_fences(text)))


def codes(text):
    """Inline code, across line breaks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_fences(text))]


def is_dotted(code):
    """Whether inline code names something in a module of this repository: dynamic_video_sf.dmd_loss."""
    first = code.split(".")[0]
    looks = re.fullmatch(r"[a-z_0-9]+(\.[A-Za-z_0-9]+)+", code) and not re.search(FILE, code)
    return bool(looks) and ((REPOSITORY / f"{first}.py").exists() or (REPOSITORY / first / "__init__.py").exists())


def module_of(code):
    """The file of a dotted name: tiny_causal_wan.py of tiny_causal_wan.WanLayer.forward."""
    parts = code.split(".")
    places = ["/".join(parts[:end]) + ".py" for end in range(len(parts) - 1, 0, -1)]
    return next((place for place in places if (REPOSITORY / place).exists()), f"{parts[0]}/__init__.py")


@pytest.mark.parametrize("path", [str(path.relative_to(REPOSITORY)) for path in markdown_files()])
def test_links_and_anchors_resolve(path):
    """Every link inside the repository leads to a file, and to a heading if it has an anchor."""
    here = REPOSITORY / path
    for link in links(here.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (here.parent / name).resolve() if name else here
        assert target.exists(), f"{path} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{path} links to {link}: no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_anchors_are_the_same_on_the_site(name):
    """No heading twice, and none whose anchor MkDocs would spell differently from GitHub."""
    own = [github_anchor(heading) for heading in headings(page(name))]
    assert len(own) == len({*own})
    assert all(anchor.isascii() and "--" not in anchor for anchor in own), own


@pytest.mark.parametrize("name", PAGES)
def test_what_is_named_exists(name):
    """Functions and classes of this repository, settings by their group, files and folders."""
    known = {*load_config([]), "blocks", "torch"}
    for code in codes(page(name)):
        if is_dotted(code):
            resolve_name(code)  # AttributeError or ImportError where it does not exist
            wrong = re.findall(rf"\[`{code}`\]\((?!\.\./{module_of(code)}\))", page(name))
            assert not wrong, f"{code} is linked to another file"
        elif re.fullmatch(r"[a-z]\w*(\.[A-Za-z_]\w*)+", code) and not re.search(FILE, code):
            assert code.split(".")[0] in known, code
        if re.fullmatch(rf"[\w./]+({FILE}|/)", code) and code not in WRITTEN_BY_RUNS:
            assert (REPOSITORY / code).exists(), code


def test_papers_are_mapped_to_functions():
    """The table of papers names enough of them, and each of its rows a function or says that there is none."""
    rows = [line.strip("|").split("|") for line in page("paper_to_code").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows if not re.match(r"\s*(-|paper|what)", row[0])]
    assert len(rows) > 60
    for first, *rest in rows:
        named = codes(" ".join(rest))
        assert named or any(word in " ".join(rest) for word in ("not here", "any")), first


def test_glossary_is_alphabetical():
    """By letters and digits alone, each word under its letter, with a sentence to it."""
    order, letter, entries = [], "", re.split(r"^(##+) (.+)$", page("glossary"), flags=re.M)[1:]
    for level, heading, text in zip(entries[::3], entries[1::3], entries[2::3], strict=True):
        if level == "##":
            letter = heading
        else:
            assert heading.upper().startswith(letter) and text.strip().endswith("."), heading
            order.append(re.sub(r"\W", "", heading.lower()))
    assert order == sorted(order) and len(order) >= 60
    wanted = "block frame chunk layer token rollout exitstep sink window critic dmd sid exposurebias teacherforcing"
    wanted += " diffusionforcing cfg shift consistency odepair ema kvcache rope modulation patch latent codec fsdp mesh"
    wanted += " init judge guidance uncond kldivergence modecollapse modeseeking fisherdivergence crossattention"
    wanted += " exitrule freshrollouts microbatch gradientaccumulation tfanddf"
    assert {*wanted.split()} <= {*order}


def test_faq_has_questions_and_short_answers():
    """At least twenty of them, no two alike, each with an answer that points somewhere and fits on a screen."""
    _, *parts = re.split(r"^## (.+)$", page("faq"), flags=re.M)
    questions, answers = parts[::2], parts[1::2]
    assert len(questions) >= 20
    for question, answer in zip(questions, answers, strict=True):
        assert question.endswith("?") or question.startswith("I only want"), question
        assert 20 < len(answer.split()) < 160, question
        assert "`" in answer or "](" in answer, question


def logged(row, sign):
    """A column of the log of all five seeds of a row of the two-by-two."""
    paths = sorted((REPOSITORY / "experiments/records/two_by_two").glob(f"{row}_[0-9].json"))
    assert len(paths) == 5
    return [json.loads(path.read_text())["log"][sign] for path in paths]


def test_pages_quote_the_logs_of_healthy_runs():
    """What they say of score_distance and of the gradient's norm lies around what the records have."""
    healthy, lost = (logged(row, "score_distance") for row in ("own_last", "data_random"))
    assert all(abs(log[0] - 0.03) < 0.006 and abs(log[4] - 0.1) < 0.06 for log in healthy)
    assert all(0.03 < value < 0.11 for log in healthy for value in log[50:])
    assert all(0.05 <= value < 0.15 for log in lost for value in log[50:])
    assert all(value < 1 for log in logged("own_last", "generator_grad_norm") for value in log[50:])


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name):
    """training.X is a field of TrainingConfig, GROUP=NAME a file of configs/, a command's --option one of its own."""
    for code in codes(page(name)):
        for group, option in re.findall(r"\b(training|model|world)\.(\w+)", code):
            assert option in {f.name for f in fields(GROUPS[group])}, code
        for group, value in re.findall(r"(?<![\w.])(stage|objective|init|experiment|scale)=(\w+)", code):
            assert (REPOSITORY / "configs" / group / f"{value}.yaml").exists(), code
        if run := re.match(r"python (-m )?([\w.]+)( .*)?$", code):
            file = REPOSITORY / (f"{run[2].replace('.', '/')}.py" if run[1] else run[2])
            source = (file if file.exists() else file.with_suffix("") / "__main__.py").read_text()
            for option in re.findall(r"--\w+", run[3] or ""):
                assert f'"{option}"' in source, code


def test_overrides_have_values_that_are_allowed():
    """Every override that a page shows with a value is one that train.py takes."""
    shown = {word for name in PAGES for code in codes(page(name)) for word in code.split()}
    taken = sorted(word for word in shown if re.match(r"training\.\w+=", word))
    assert len(taken) > 15
    for word in taken:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([word]).training)
        check_options("training", TrainingConfig, values)
        TrainingConfig(**{"max_num_frames": 21, **values})
    options = inspect.signature(FullySharded).parameters
    assert {word[10:].partition("=")[0] for word in shown if re.match(r"processes\.\w+=", word)} <= {*options}


def test_columns_and_signs_of_troubleshooting_exist():
    """A word in code with an underscore is a column of the log, a metric, an option, or a row of an experiment."""
    rows = {row for name in experiments() for row in OmegaConf.to_container(load_plan(name))["rows"]}
    known = {*COLUMNS, *dir(metrics), *rows, *(f.name for f in fields(TrainingConfig))}
    known |= {"frames_per_block", "critic_state_dict"}
    used = [code for code in codes(page("troubleshooting")) if re.fullmatch(r"[a-z0-9.]+_[a-z0-9_.*]+", code)]
    used = [code for code in used if not is_dotted(code) and not re.search(r"^(training|objective)\.|\.py$", code)]
    assert len({*used}) > 20
    for code in used:
        assert code in known or any(column.startswith(code.rstrip("*")) for column in COLUMNS if "*" in code), code


def test_sick_runs_are_named_and_shown():
    """Every fault that is trained on purpose is told among the symptoms, with what its run looks like."""
    rows = OmegaConf.to_container(load_plan("sick_runs"))["rows"]
    assert all(f"`{row}`" in page("troubleshooting") for row in rows), [*rows]
    shown = {path: words for words, path in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", page("troubleshooting"))}
    drawn = [row for row in rows if (REPOSITORY / f"docs/results/{row}.png").exists()]
    assert len(drawn) >= 4 and all(f"results/{row}.png" in shown for row in drawn), drawn
    assert len(shown) >= 10 and all(len(words) > 60 for words in shown.values())


NAME = r"([A-Z][\w+.-]*(?: [A-Z0-9][\w+.-]*)*)"
NUMBER = r"(\d{4}\.\d{5})"
CITED = [
    rf"{NAME} \((?:arXiv )?{NUMBER}\)",
    rf"{NAME}, arXiv {NUMBER}",
    rf"\[{NAME}\]\(https://arxiv\.org/abs/{NUMBER}\)",
]
CITED += [rf"{NAME} \(\[{NUMBER}\]\(https://arxiv\.org/abs/{NUMBER}\)\)"]


def test_papers_have_one_number_and_one_title():
    """Every arXiv number is well formed, links where it says, and always stands with the same name; and the reverse."""
    names, numbers = defaultdict(set), defaultdict(set)
    for path in markdown_files():
        text = " ".join(re.sub(r"^#.*$", "", path.read_text(), flags=re.M).split())
        for number in re.findall(r"(?:arXiv[ :]+|arxiv\.org/(?:abs|pdf)/)([\w./-]*\d[\w./-]*)", text):
            digits = 5 if number >= "1501" else 4
            assert re.fullmatch(rf"\d{{4}}\.\d{{{digits}}}", number.rstrip(".")), f"{path.name}: {number}"
        for name, number, *again in (found for form in CITED for found in re.findall(form, text)):
            assert not again or again == [number], f"{path.name}: {number} links to {again}"
            names[number].add(name)
            numbers[name].add(number)
    assert len(names) > 40
    assert all(len(found) == 1 for found in names.values()), {n: f for n, f in names.items() if len(f) > 1}
    assert all(len(found) == 1 for found in numbers.values()), {n: f for n, f in numbers.items() if len(f) > 1}
