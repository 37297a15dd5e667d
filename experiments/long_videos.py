"""Ten videos of the shipped student, eight times as long as its teacher's clips: python -m experiments.long_videos

Writes docs/long_videos.png: one prompt per digit, every sixth frame.
"""

from pathlib import Path

from generate import load_model, sample_videos
from moving_mnist import DIRECTIONS, Digit, format_prompt
from visualization import film_strip

PICTURE, SEED, LENGTHS, EVERY = Path("docs/long_videos.png"), 21, 8, 6


def main() -> None:
    student, directions = load_model("checkpoints/student.safetensors"), list(DIRECTIONS)
    prompts = [format_prompt([Digit(label, directions[3 * label % 8])]) for label in range(10)]
    videos = sample_videos(student, prompts, LENGTHS * student.num_frames, seed=SEED)
    film_strip(videos, PICTURE, EVERY, prompts, student.num_frames, student.sampling.rollout.frames_per_block)


if __name__ == "__main__":
    main()
