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
from full_scale.wan import WAN_CONFIGS
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


def planned(*options):
    return plan.setup_of(plan.parse_arguments(options))


def gigabytes(value):
    return f"{float(value) / 1e9:.0f}"


def test_the_command_for_one_gpu_is_what_is_planned_for_one():
    """The row of one GPU has the options of the command for one GPU: offload."""
    command = next(x for x in CODE if "train.py experiment=wan_1_3b_dmd" in x and "torchrun" not in x)
    processes = load_config([word for word in shlex.split(command) if re.match(r"[a-z_.]+=", word)]).processes
    (options,) = [gpus for _, gpus, *_ in rows("| | GPUs | GB per GPU") if re.match(r"1\b", gpus)]
    assert planned("--gpus", *re.sub("[`,]", " ", options).split()).offload is processes.offload is True


def test_the_hardware_is_what_is_planned_downloaded_and_saved():
    """GPU and host by the planner, disk by the sizes of the downloads and of two checkpoints."""
    small, large, image = models = ("t2v-1.3b", "t2v-14b", "i2v-14b")
    disk = {name: download.gigabytes for name, download in DOWNLOADS.items()}
    few = disk[small] + disk[large] + disk["ode init"] + disk["prompts"]

    def training(model, *options):
        return gigabytes(plan.training_memory(planned("--model", model, *options)))

    def inference(*options):
        found = [plan.inference_memory(planned("--model", model, *options)) for model in models]
        return list(map(gigabytes, found))

    def waiting(model):  # the layers in bf16, the VAE in fp32
        return gigabytes(2 * plan.parameters(WAN_CONFIGS[model])["layers"] + plan.vae())

    def checkpoints(model):  # two, each with weights and two moments of student and critic, and the average
        return f"{2 * 4 * 7 * plan.num_parameters(WAN_CONFIGS[model]) / 1e9:.0f}"

    held = sum(plan.states(planned("--model", small, "--gpus", "1")).values())
    assert [row[1:] for row in rows("| what | a GPU |")] == [
        [inference()[0], "", f"{disk[small] + disk['self-forcing']:.0f}"],
        [", ".join(inference()[1:]), "", f"{disk[large]:.0f}, {disk[image]:.0f}"],
        [", ".join(inference("--offload", "on")), ", ".join(map(waiting, models)), ""],
        [training(small, "--gpus", "1", "--offload", "on"), gigabytes(held), f"{few:.0f} + {checkpoints(small)}"],
        [training(small, "--gpus", "8"), "", f"{few:.0f} + {checkpoints(small)}"],
        [training(large, "--gpus", "64"), "", f"{disk[large] + disk['prompts']:.0f} + {checkpoints(large)}"],
        [training(image, "--gpus", "64"), "", f"{disk[image]:.0f} + {checkpoints(image)}"],
    ]


def test_the_planner_says_what_the_table_says():
    for who, gpus, gigabytes, seconds, hours in rows("| | GPUs | GB per GPU"):
        setup = planned("--model", re.match(r"`([^`]*)`", who)[1], "--gpus", *re.sub("[`,]", " ", gpus).split())
        assert round(float(plan.training_memory(setup)) / 1e9) == float(gigabytes)
        record = plan.text(setup)
        time = re.search(r"time of a step .*= ([\d,.]+) s", record)[1]
        assert f"{float(time.replace(',', '')):,.0f}" == seconds
        assert re.search(r"cost of the training .*= ([\d,.]+) GPU", record)[1].split(".")[0] == hours
