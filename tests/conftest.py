"""What all tests share: one thread per worker, and the switches for slow and GPU tests."""

import os
import sys

import pytest

# Workers must not fight over the cores. torch reads this when it is first imported, and processes that a test
# starts inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --run-slow"))
        if "gpu" in item.keywords and not cuda_available():
            item.add_marker(pytest.mark.skip(reason="gpu: needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A group of processes that a test leaves behind would be the next test's fault."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("this test leaves a process group behind: call full_scale.parallelize.leave()")


def cuda_available():
    import torch  # only now: torch fixes its thread count when imported

    return torch.cuda.is_available()
