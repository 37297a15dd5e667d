"""Wan's own many-step sampler for `rollout`, out of diffusers. (`euler`, `renoise` and what lies between them need no
library: dynamic_video_sf.py.)"""

from collections.abc import Sequence

from torch import Tensor

from flow_match import FlowMatchScheduler, Time, check_denoising_steps


class UniPC:
    """UniPC (arXiv 2302.04867) as a sampler of `rollout`: the solver of diffusers, begun anew with every block.

    denoising_steps: those of the rollout, 0..1000. A solver remembers the steps before, so an instance serves one
    rollout at a time.
    """

    def __init__(self, scheduler: FlowMatchScheduler, denoising_steps: Sequence[float], order: int = 2):
        self.shift, self.order = scheduler.shift, order
        self.levels = [step / 1000 for step in check_denoising_steps(denoising_steps)]
        self.solver, self.step = None, 0

    def __call__(self, scheduler, x0: Tensor, x_t: Tensor, t: Time, t_next: Time, noise: Tensor) -> Tensor:
        if t == 1:
            self.begin(x_t.device)
        flow = scheduler.to_flow(x0, x_t, t)
        x_next = self.solver.step(flow, self.solver.timesteps[self.step], x_t, return_dict=False)[0]
        self.step += 1
        return x_next

    def begin(self, device) -> None:
        import numpy as np  # diffusers takes seconds to import, and only who asks for UniPC needs it
        from diffusers import UniPCMultistepScheduler

        self.solver = UniPCMultistepScheduler(
            solver_order=self.order,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=self.shift,
        )
        self.solver.set_timesteps(sigmas=np.array(self.levels), device=device)
        self.solver.set_begin_index(0)
        self.step = 0
