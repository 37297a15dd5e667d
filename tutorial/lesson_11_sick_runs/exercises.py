"""Exercises of lesson 11. README.md says what each wants; `make grade LESSON=11` says how far you are."""

from tutorial.grading import todo


def smallest_update(weight, dtype):
    """The border below which an update always vanishes: for 0 < u < border, weight + u, rounded to dtype, is the weight
    again. (At the border itself it depends on the weight's last bit.) A float."""
    todo("say how small an update may be before it vanishes.")


def differ(a, b):
    """Whether two settings differ: a and b are arrays of one metric, one number per seed. bool."""
    todo("say whether a difference is more than noise.")


def remembers_what_it_is_given(model, cond, frame_shape):
    """Whether model.remember(x, t, cond, cache) depends on x and on nothing that the model saw in calls before: bool.
    frame_shape: (C, H, W). cond is of one sample. kv_cache.KVCache() is an empty cache; .layers are its (keys, values).
    A denoising call, model(x_t, t, cond, cache), comes before each remember."""
    todo("find out whether a model's cache is refreshed.")


def diagnose(log, real_ink):
    """What a run suffers from: "healthy", "nothing moves", "learning rate too high", "critic lags", "strokes swell" or
    "motion dies". log: column of metrics.csv -> list of numbers, one per step, None where there is none. real_ink: the
    sample_ink that real videos have."""
    todo("read a log.")
