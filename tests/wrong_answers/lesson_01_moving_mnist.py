"""Lesson 1: wrong and right answers."""

import numpy as np
import scipy.linalg
import torch


def axis(num_frames, like):
    return torch.arange(num_frames).reshape(-1, *[1] * like.dim())


def stops_at_the_wall(start, velocity, num_frames, reach):
    positions = (start + velocity * axis(num_frames, start)).clamp(0, reach)
    return positions, velocity.expand_as(positions)


def comes_in_at_the_other_side(start, velocity, num_frames, reach):
    positions = (start + velocity * axis(num_frames, start)) % reach
    return positions, velocity.expand_as(positions)


def turns_a_frame_late(start, velocity, num_frames, reach):
    positions, velocities = [], []
    for _ in range(num_frames):
        velocity = torch.where((start + velocity > reach) | (start + velocity < 0), -velocity, velocity)
        positions.append(start)
        velocities.append(velocity)
        start = start + velocity
    return torch.stack(positions), torch.stack(velocities)


def forgets_which_way(start, velocity, num_frames, reach):
    phase = (start + velocity.abs() * axis(num_frames, start)) % (2 * reach)
    return reach - (phase - reach).abs(), torch.where(phase < reach, 1, -1) * velocity.abs()


def points_outwards_at_the_wall(start, velocity, num_frames, reach):
    positions, velocities = folded(start, velocity, num_frames, reach)
    wall = (positions == 0) | (positions == reach)
    return positions, torch.where(wall, -velocities, velocities)


def walks(start, velocity, num_frames, reach):
    """Right, and frame after frame."""
    position, positions, velocities = start, [], []
    for _ in range(num_frames):
        velocity = torch.where(position >= reach, -velocity.abs(), velocity)
        velocity = torch.where(position <= 0, velocity.abs(), velocity)
        positions.append(position)
        velocities.append(velocity)
        position = (position + velocity).abs()
        position = reach - (reach - position).abs()
    return torch.stack(positions), torch.stack(velocities)


def folded(start, velocity, num_frames, reach):
    """Unfold the mirrors: a straight road whose every second stretch runs backwards."""
    road = start + velocity * axis(num_frames, start)
    stretch, along = torch.div(road, reach, rounding_mode="floor"), road % reach
    back = stretch % 2 == 1
    positions = torch.where(back, reach - along, along)
    velocities = torch.where(back, -velocity, velocity)
    inwards = torch.where(positions == 0, velocity.abs(), -velocity.abs())
    return positions, torch.where((positions == 0) | (positions == reach), inwards, velocities)


def places(ink):
    """In float64: an answer need not be in the dtype of the ink."""
    return torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in ink.shape[-2:]), indexing="ij"), dim=-1)


def x_first(ink):
    return with_meshgrid(ink).flip(-1)


def brightest_pixel(ink):
    at = ink.flatten(-2).argmax(-1)
    return torch.stack([at // ink.shape[-1], at % ink.shape[-1]], dim=-1).float()


def divides_by_the_pixels(ink):
    return (ink[..., None] * places(ink)).mean((-3, -2))


def nothing_by_nothing(ink):
    return (ink[..., None] * places(ink)).sum((-3, -2)) / ink.sum((-2, -1))[..., None]


def counts_pixels_as_equal(ink):
    return with_meshgrid((ink > 0).float())


def with_meshgrid(ink):
    mass = ink.sum((-2, -1))[..., None]
    middle = (torch.tensor(ink.shape[-2:]) - 1) / 2
    return torch.where(mass > 0, (ink[..., None] * places(ink)).sum((-3, -2)) / mass.clamp(min=1e-12), middle)


def root(matrix, clamp=True):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * (values.clamp(min=0) if clamp else values).sqrt() @ vectors.T


def apart(mean, other_mean):
    return (mean - other_mean).square().sum()


def root_of_entries(mean, covariance, other_mean, other_covariance):
    overlap = (covariance.abs().sqrt() * other_covariance.abs().sqrt()).trace()
    return apart(mean, other_mean) + covariance.trace() + other_covariance.trace() - 2 * overlap


def as_if_they_commuted(mean, covariance, other_mean, other_covariance):
    return apart(mean, other_mean) + (root(covariance) - root(other_covariance)).square().sum()


def not_squared(mean, covariance, other_mean, other_covariance):
    return by_scipy(mean, covariance, other_mean, other_covariance).clamp(min=0).sqrt()


def forgets_the_two(mean, covariance, other_mean, other_covariance):
    overlap = root(root(covariance) @ other_covariance @ root(covariance)).trace()
    return apart(mean, other_mean) + covariance.trace() + other_covariance.trace() - overlap


def roots_of_negative_numbers(mean, covariance, other_mean, other_covariance):
    overlap = root(root(covariance) @ other_covariance @ root(covariance), clamp=False).trace()
    return apart(mean, other_mean) + covariance.trace() + other_covariance.trace() - 2 * overlap


def by_scipy(mean, covariance, other_mean, other_covariance):
    """The eigenvalues of S1 S2 are those of the symmetric product."""
    values = scipy.linalg.eigvals((covariance @ other_covariance).numpy()).real
    spread = covariance.trace() + other_covariance.trace() - 2 * float(np.sqrt(np.maximum(values, 0)).sum())
    return apart(mean, other_mean) + spread


def light(videos):
    return (videos.clamp(-1, 1) + 1).sum((2, 3, 4)) / 2


def how_dark_on_average(videos):
    return (light(videos).mean(1) / 40 - 1).abs()


def change_of_pixels(videos):
    return videos.diff(dim=1).abs().mean((1, 2, 3, 4))


def first_difference(videos):
    return light(videos).diff(dim=1).abs().mean(1) / light(videos).mean(1).clamp(min=1e-3)


def spread_over_time(videos):
    return light(videos).std(1) / light(videos).mean(1).clamp(min=1e-3)


def in_white_pixels(videos):
    return light(videos).diff(n=2, dim=1).abs().mean(1)


def without_a_guard(videos):
    return light(videos).diff(n=2, dim=1).abs().mean(1) / light(videos).mean(1)


def against_the_neighbours(videos):
    """The ratio of a frame's light to the geometric mean of those before and after it."""
    log = light(videos).clamp(min=1e-3).log()
    return (log[:, 1:-1] - (log[:, :-2] + log[:, 2:]) / 2).abs().mean(1)


WRONG = {
    "bounce": [
        stops_at_the_wall,
        comes_in_at_the_other_side,
        turns_a_frame_late,
        forgets_which_way,
        points_outwards_at_the_wall,
        walks,
    ],
    "centre_of_mass": [x_first, brightest_pixel, divides_by_the_pixels, nothing_by_nothing, counts_pixels_as_equal],
    "frechet_between": [
        root_of_entries,
        as_if_they_commuted,
        not_squared,
        forgets_the_two,
        roots_of_negative_numbers,
    ],
    "flicker": [
        how_dark_on_average,
        change_of_pixels,
        first_difference,
        spread_over_time,
        in_white_pixels,
        without_a_guard,
    ],
}
RIGHT = {
    "bounce": folded,
    "centre_of_mass": with_meshgrid,
    "frechet_between": by_scipy,
    "flicker": against_the_neighbours,
}
