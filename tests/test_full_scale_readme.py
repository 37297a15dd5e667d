"""What full_scale/README.md promises is there: downloads, recipes, options, and the planner's figures."""

import inspect
import re
import shlex

import pytest
from tiny_runs import REPOSITORY

import attention_maps
from full_scale import build_data, convert, generate, plan
from full_scale.parallelize import FullySharded
from full_scale.pretrained import DOWNLOADS
from settings import load_config

README = (REPOSITORY / "full_scale" / "README.md").read_text()
CODE = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
# Inline code that ends in an ellipsis is an abbreviation.
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```bash\n.*?```", "", README, flags=re.S))
PARSERS = {
    "full_scale.plan": plan.parse_arguments, "full_scale.generate": generate.parse_arguments,
    "full_scale.convert": convert.parse_arguments, "full_scale.data": build_data.parse_arguments,
    "attention_maps.py": attention_maps.parse_arguments,
}  # fmt: skip
COMMANDS = [*CODE, *(text for text in INLINE if any(f" {module} " in text for module in PARSERS) and "..." not in text)]


def rows(head):
    """The cells of the table whose first row begins like that."""
    lines = README[README.index(head) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_downloads_are_those_of_the_errors():
    known = {download.command: download.gigabytes for download in DOWNLOADS.values()}
    table = rows("| | GB | |")
    assert len(table) == 7
    assert all(known[command.strip("`")] == float(gigabytes) for _, gigabytes, command in table)


def test_recipes_compose():
    recipes = [row[0].strip("`") for row in rows("| recipe |")]
    assert sorted(recipes) == sorted(path.stem for path in (REPOSITORY / "configs/experiment").glob("wan*.yaml"))
    for command in COMMANDS:
        if "train.py" in command or "train.sbatch" in command:
            words = shlex.split(command)
            load_config([word for word in words if re.match(r"[a-z_.]+=", word)])


@pytest.mark.parametrize("module", PARSERS)
def test_options_exist(module):
    """Every command with that module parses, those of the table of older documents included."""
    found = [shlex.split(command) for command in COMMANDS if f" {module} " in command]
    for words in found:
        PARSERS[module](words[words.index(module) + 1 :])
    assert found


def test_settings_of_processes_exist():
    named = re.search(r"`processes\.\*`: (.*?)\. `encoder", README, re.S)[1]
    known = inspect.signature(FullySharded).parameters
    assert set(re.findall(r"`([a-z_]+)`", named)) <= set(known)


def test_the_planner_says_what_the_table_says():
    for who, gpus, gigabytes, seconds, hours in rows("| | GPUs | GB per GPU"):
        model = re.match(r"`([^`]*)`", who)[1]
        setup = plan.setup_of(plan.parse_arguments(["--model", model, "--gpus", gpus.split(",")[0]]))
        assert round(float(plan.training_memory(setup)) / 1e9) == float(gigabytes)
        record = plan.text(setup)
        time = re.search(r"time of a step .*= ([\d,.]+) s", record)[1]
        assert f"{float(time.replace(',', '')):,.0f}" == seconds
        assert re.search(r"cost of the training .*= ([\d,.]+) GPU", record)[1].split(".")[0] == hours
