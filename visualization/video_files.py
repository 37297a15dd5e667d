"""Videos as files: GIF, MP4 and PNG with exact, enlarged pixels."""

import math
import textwrap
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.GifImagePlugin import getdata, getheader

from visualization.frames import matching_labels, to_bytes, to_clips

PAPER = 255  # margins and captions are dark on white, as in the figures
INK = 34
MARGIN = 4
CAPTION_SIZE = 12


def create_video_gif(video, path, fps=8, scale=8):
    """Write a looping GIF; B clips play side by side. Every pixel becomes scale x scale; returns the path.

    Grey frames, and frames of at most 256 colours, keep their exact values.
    """
    return write_frames(side_by_side(video, scale), path, fps, writers={".gif": write_gif})


def save_video(video, path, fps=8, scale=8):
    """Write a GIF or an MP4, chosen by the ending of `path`; B clips play side by side; returns the path."""
    return write_frames(side_by_side(video, scale), path, fps, writers={".gif": write_gif, ".mp4": write_mp4})


def save_video_grid(videos, path, fps=8, columns=None, scale=4, labels=None):
    """Write many clips into one file, chosen by the ending of `path`; returns the path.

    .gif, .mp4: all clips play at once, `columns` beside each other (None: nearly square). .png: a row per
    clip, time to the right. `videos`: [F, C, H, W], [B, F, C, H, W] or a list of such tensors. `labels`: one
    text per clip, written above it.
    """
    clips = enlarge(videos, scale)
    labels = matching_labels(labels, len(clips), "clips")
    if Path(path).suffix.lower() == ".png":
        rows = [captioned(beside(clip), label) for clip, label in zip(clips, labels, strict=True)]
        return write_frames([stack(rows)], path, fps, writers={".png": write_png})
    same_length(clips)
    columns = columns or math.ceil(math.sqrt(len(clips)))
    moments = [grid(tiles, labels, columns) for tiles in zip(*clips, strict=True)]
    return write_frames(moments, path, fps, writers={".gif": write_gif, ".mp4": write_mp4, ".png": write_png})


def side_by_side(video, scale):
    """[B, F, C, H, W] -> one uint8 image [h, w, 3] per moment, the B clips in a row."""
    clips = enlarge(video, scale)
    same_length(clips)
    return [beside(tiles) for tiles in zip(*clips, strict=True)]


def enlarge(videos, scale):
    """Clips as uint8 RGB [F, scale H, scale W, 3]."""
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number of 1 or more, got {scale}")
    clips = [to_bytes(clip).repeat(scale, axis=1).repeat(scale, axis=2) for clip in to_clips(videos)]
    return [np.broadcast_to(clip, (*clip.shape[:3], 3)) for clip in clips]


def same_length(clips):
    if len({len(clip) for clip in clips}) > 1:
        lengths = ", ".join(str(len(clip)) for clip in clips)
        raise ValueError(f"clips that play together need one length, got {lengths}: cut the longer ones")


def pad(image, height, width):
    """A white image of at least height x width with `image` in its top-left corner."""
    missing = max(0, height - image.shape[0]), max(0, width - image.shape[1])
    return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=PAPER)


def beside(images):
    """Images in a row, a white margin between them."""
    height = max(image.shape[0] for image in images)
    padded = [pad(image, height, image.shape[1] + MARGIN) for image in images]
    return np.concatenate(padded, axis=1)[:, :-MARGIN]


def stack(images):
    """Images in a column, a white margin between them."""
    width = max(image.shape[1] for image in images)
    padded = [pad(image, image.shape[0] + MARGIN, width) for image in images]
    return np.concatenate(padded, axis=0)[:-MARGIN]


def grid(tiles, labels, columns):
    tiles = same_height([captioned(tile, label) for tile, label in zip(tiles, labels, strict=True)])
    return stack([beside(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def captioned(image, label):
    """The image with its label above it, wrapped to the image's width."""
    if not label:
        return image
    font = ImageFont.load_default(CAPTION_SIZE)
    letters = max(1, int(image.shape[1] / font.getlength("n")))
    text = "\n".join(textwrap.wrap(label, letters))
    height = (text.count("\n") + 1) * (CAPTION_SIZE + 4) + 4
    caption = Image.new("RGB", (image.shape[1], height), (PAPER,) * 3)
    ImageDraw.Draw(caption).multiline_text((0, 0), text, fill=(INK,) * 3, font=font, spacing=4)
    return np.concatenate([np.asarray(caption), image], axis=0)


def same_height(tiles):
    """Tiles padded above, so that captions of one and of two lines leave the pictures on one line."""
    height = max(tile.shape[0] for tile in tiles)
    return [np.pad(t, ((height - t.shape[0], 0), (0, 0), (0, 0)), constant_values=PAPER) for t in tiles]


def write_frames(frames, path, fps, writers):
    path = Path(path)
    if path.suffix.lower() not in writers:
        raise ValueError(f"cannot write a video as '{path.name}': end its name in {' or '.join(writers)}")
    if fps <= 0:
        raise ValueError(f"fps must be above 0, got {fps}: 8 is usual here")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix.lower()](path, frames, fps)
    return path


def write_gif(path, frames, fps):
    # Pillow's save_all merges equal neighbours: a frozen video would come back as a single frame.
    images = [to_palette(frame) for frame in frames]
    header, _ = getheader(images[0], info={"loop": 0})
    with open(path, "wb") as file:
        file.writelines(header)
        for image in images:
            file.writelines(getdata(image, duration=round(1000 / fps), include_color_table=True))
        file.write(b";")


def to_palette(frame):
    if (frame == frame[..., :1]).all():
        return Image.fromarray(frame[..., 0]).convert("P")  # a palette of all 256 greys: exact
    return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)


def write_mp4(path, frames, fps):
    height, width, _ = frames[0].shape
    even = height + height % 2, width + width % 2  # H.264 stores colour at half the resolution
    with imageio.get_writer(path, fps=fps, codec="libx264", quality=9, macro_block_size=1) as writer:
        for frame in frames:
            writer.append_data(pad(frame, *even))


def write_png(path, frames, fps):
    Image.fromarray(frames[0]).save(path)
