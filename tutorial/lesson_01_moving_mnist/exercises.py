"""Exercises of lesson 1. README.md says what each wants; `make grade LESSON=1` says how far you are."""

from tutorial.grading import todo


def bounce(start, velocity, num_frames, reach):
    """Exact motion with mirror reflection at 0 and `reach`.

    start, velocity: tensors of one shape [...], each coordinate its own motion. Returns positions and velocities,
    [num_frames, ...]; velocities[f] is the velocity on leaving frame f: at a wall it already points inwards.
    """
    todo("say where a bouncing digit is at frame f, without walking there.")


def centre_of_mass(ink):
    """Ink [..., H, W], not negative -> (y, x) [..., 2] in pixels; the middle of the canvas where there is no ink."""
    todo("find the middle of the ink.")


def frechet_between(mean, covariance, other_mean, other_covariance):
    """Squared Frechet distance of two Gaussians: means [D], covariances [D, D] -> a number (tensor, no axes)."""
    todo("measure how far two Gaussians are from each other.")


def flicker(videos):
    """How much the brightness of videos [B, F, C, H, W] in [-1, 1] jumps up and down from frame to frame: [B].

    Zero or nearly so for real clips, whatever they show and however they move; a slow change is no flicker.
    """
    todo("measure a fault that none of the metrics is meant to see.")
