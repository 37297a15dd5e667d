"""Prompts that once kill their process, or keep it waiting."""

import os
import signal
import time
from pathlib import Path

from checkpoint import atomic
from full_scale.data import Prompts


class DyingPrompts(Prompts):
    """The first time that sample `at` or a later one is asked for, the process that asks dies and leaves `flag`."""

    def __init__(self, flag, at, **options):
        super().__init__(**options)
        self.flag, self.at = Path(flag), at

    def batch(self, samples):
        if min(samples) >= self.at and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(samples)


class SlowPrompts(Prompts):
    """The first time that sample `at` or a later one is asked for, the process that asks writes its number into `flag`
    and waits so many seconds."""

    def __init__(self, flag, at, seconds, **options):
        super().__init__(**options)
        self.flag, self.at, self.seconds = Path(flag), at, seconds

    def batch(self, samples):
        if min(samples) >= self.at and not self.flag.exists():
            with atomic(self.flag) as temporary:
                temporary.write_text(str(os.getpid()))
            time.sleep(self.seconds)
        return super().batch(samples)
