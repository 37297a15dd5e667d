"""Speed and memory of the course's code, as ratios to what this machine can do: `python -m benchmarks`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its own start on the terminal
