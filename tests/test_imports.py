"""Imports point one way, and the algorithm files are pure: read off the real files with ast."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ENTRY = ("train", "generate", "attention_maps", "settings", "run_folder")  # the command lines and what is theirs alone
ALGORITHM = ("randomness", "flow_match", "kv_cache", "parametrisation", "tiny_causal_wan", "dynamic_video_sf")
LEAVES = {"randomness": set(), "kv_cache": set(), "parametrisation": set(), "flow_match": {"randomness"}}
COMMAND_LINES = {"main", "_self_check"}  # functions that may look up and print


def sources():
    """Module name -> syntax tree, of every Python file of the root, visualization/ and full_scale/."""
    paths = [*REPOSITORY.glob("*.py")]
    paths += [path for folder in ("visualization", "full_scale") for path in (REPOSITORY / folder).rglob("*.py")]
    names = {path: path.relative_to(REPOSITORY).with_suffix("") for path in sorted(paths)}
    return {".".join(name.parts): ast.parse(path.read_text()) for path, name in names.items()}


def library(tree):
    """Nodes of a module outside its command line: neither main(), the self-check nor what __main__ runs."""
    for node in ast.iter_child_nodes(tree):
        is_command = isinstance(node, ast.FunctionDef) and node.name in COMMAND_LINES
        is_main = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        if not is_command and not is_main:
            yield node
            yield from library(node)


def at_import(tree):
    """Nodes that run when the module is imported: everything outside functions, if-branches and classes included."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def imported(nodes):
    """Dotted names that the import statements among nodes bring in."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by full name, not relative"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(nodes):
    """First parts of the imported names."""
    return {name.partition(".")[0] for name in imported(nodes)}


def impurities(tree):
    """What an algorithm file must not hold: one line of text for each find."""
    finds = []
    for node in library(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr | ast.Import | ast.ImportFrom) else ""
        if isinstance(node, ast.Try | ast.TryStar):
            finds.append(f"line {node.lineno}: try")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write"):
            finds.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "distributed", "get_default_device"):
            finds.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Constant) and str(node.value).split(":")[0] in ("cuda", "mps"):
            finds.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Import | ast.ImportFrom) and imported([node]) & {"torch.distributed", "torch.cuda"}:
            finds.append(f"line {node.lineno}: {text}")
    return finds


SOURCES = sources()
PROJECT = {name.partition(".")[0] for name in SOURCES}


def upward(name):
    return packages(at_import(SOURCES[name]))


def test_the_files_are_there():
    """The tests below look at something: every module that they name exists."""
    named = {*ALGORITHM, "moving_mnist", "metrics", "checkpoint", "visualization.__init__", "train", "generate"}
    assert named | {"full_scale.wan"} <= set(SOURCES)


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_torch_and_the_standard_library_only(name):
    """randomness, flow_match and kv_cache stand at the bottom, functions and self-checks included."""
    used = packages(ast.walk(SOURCES[name]))
    assert used - set(sys.stdlib_module_names) - {"torch"} <= LEAVES[name]


def test_model_and_algorithm_never_import_each_other():
    """tiny_causal_wan.py and dynamic_video_sf.py meet nowhere, not even in a self-check."""
    assert "dynamic_video_sf" not in packages(ast.walk(SOURCES["tiny_causal_wan"]))
    assert "tiny_causal_wan" not in packages(ast.walk(SOURCES["dynamic_video_sf"]))


@pytest.mark.parametrize("name", ALGORITHM)
def test_algorithm_files_import_algorithm_files_only(name):
    """No world, metric, picture, checkpoint or command line below the line."""
    assert packages(ast.walk(SOURCES[name])) & PROJECT <= set(ALGORITHM)


@pytest.mark.parametrize(
    "name",
    [name for name in SOURCES if name.partition(".")[0] in ("moving_mnist", "metrics", "checkpoint", "visualization")],
)
def test_the_middle_never_imports_the_entry_points(name):
    """World, metrics, checkpoints and pictures know neither train.py nor generate.py at module level."""
    assert not upward(name) & {*ENTRY, "simplified"}


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ENTRY])
def test_only_the_entry_points_see_hydra_and_wandb(name):
    """Everywhere else settings are plain dataclasses, in functions and command lines too."""
    assert not packages(ast.walk(SOURCES[name])) & {"hydra", "omegaconf", "wandb"}


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("full_scale")])
def test_nothing_below_imports_full_scale_or_the_lessons(name):
    """The algorithm knows nothing of full_scale, tutorial, experiments, benchmarks or tests: YAML names them."""
    assert not packages(library(SOURCES[name])) & {"full_scale", "tutorial", "experiments", "benchmarks", "tests"}


def test_the_import_graph_has_no_cycle():
    """Module-level imports between the project's own packages can be put in one order."""
    graph = {}
    for name in SOURCES:
        package = name.partition(".")[0]
        graph.setdefault(package, set()).update(upward(name) & PROJECT - {package})
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert order.index("kv_cache") < order.index("tiny_causal_wan") < order.index("train")


@pytest.mark.parametrize("name", ALGORITHM)
def test_algorithm_files_are_pure(name):
    """No print outside the self-check, no device, no torch.distributed, no try."""
    assert impurities(SOURCES[name]) == []


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    print(1)",
        "x = y.cuda()",
        "x = y.to('cuda')",
        "x = torch.device('cuda:0')",
        "if torch.cuda.is_available():\n    pass",
        "import torch.distributed as dist",
        "from torch import distributed",
        "def f():\n    torch.distributed.barrier()",
        "class A:\n    def f(self):\n        try:\n            pass\n        finally:\n            pass",
    ],
)
def test_impurities_are_found(code):
    """The search above can fail: each of these is one find or more."""
    assert impurities(ast.parse(code))


def test_a_self_check_may_print():
    """main(), _self_check() and the __main__ block are not searched."""
    code = "def main():\n    print(1)\ndef _self_check():\n    print(2)\nif __name__ == '__main__':\n    print(3)"
    assert impurities(ast.parse(code)) == []


def test_module_level_is_what_runs_on_import():
    """Imports under `if` or `try` at the top count, imports inside a function do not."""
    tree = ast.parse("if a:\n    import b\nclass C:\n    import d.e\ndef f():\n    import g\nfrom h import i")
    assert packages(at_import(tree)) == {"b", "d", "h"}


ALGORITHM_CALLS = {"add_noise", "to_x0", "to_flow", "denoising_times", "warp", "backward", "sample_times"}


def defined(tree):
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)} - COMMAND_LINES


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("full_scale")])
def test_full_scale_has_no_algorithm_of_its_own(name):
    """No schedule, no denoising loop, no loss: it imports those of the small world, and redefines none of them."""
    called = {
        node.func.attr for node in ast.walk(SOURCES[name]) if isinstance(node, ast.Call) and hasattr(node.func, "attr")
    }
    assert not called & ALGORITHM_CALLS
    ours = {one for module in ("dynamic_video_sf", "flow_match", "samplers") for one in defined(SOURCES[module])}
    own = defined(SOURCES[name])
    assert not own & ours and not any("loss" in one.lower() for one in own)
