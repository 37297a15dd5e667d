"""Models with one fault each, for the gallery of sick runs: generator._target_=experiments.sick.RoundedWeights"""

from tiny_causal_wan import TinyCausalWanModel


class RoundedWeights(TinyCausalWanModel):
    """Has bfloat16 parameters in all but name: they are rounded whenever they are used, and small updates are lost."""

    def embed(self, *args):
        for p in self.parameters():
            p.data.copy_(p.data.bfloat16())  # idempotent, so that between two updates nothing changes under autograd
        return super().embed(*args)


class StaleCache(TinyCausalWanModel):
    """Saves the memory pass: remembers the keys of a block's last denoising call, which saw the block still noisy."""

    def forward(self, x_t, t, cond, cache=None, **options):
        self.last_call = x_t.detach(), t
        return super().forward(x_t, t, cond, cache, **options)

    def remember(self, x, t, cond, cache):
        return super().remember(*self.last_call, cond, cache)
