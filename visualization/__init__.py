"""Tensors -> Figures, GIFs and MP4s. A leaf: it knows no model, no training, no dataset and no metric.

Every video is [F, C, H, W] or [B, F, C, H, W] in [-1, 1] with C = 1 or 3. Every picture is a matplotlib
Figure that pyplot does not know: a notebook shows it by itself, a script saves it with `save_path`, and
nothing is left open.
"""

from visualization.animation import Moment, animate, draw_moments
from visualization.attention import plot_last_block, plot_sink_scores, show_frame_attention
from visualization.curves import plot_lines, plot_metric_curves
from visualization.diagram import create_algorithm_diagram
from visualization.film import film_strip, visualize_autoregressive_generation, visualize_denoising_process
from visualization.gallery import plot_sick_runs
from visualization.memory import show_cache, show_mask, visualize_kv_cache_growth
from visualization.video_files import create_video_gif, save_video, save_video_grid

__all__ = [
    "Moment",
    "animate",
    "create_algorithm_diagram",
    "create_video_gif",
    "draw_moments",
    "film_strip",
    "plot_last_block",
    "plot_lines",
    "plot_metric_curves",
    "plot_sick_runs",
    "plot_sink_scores",
    "save_video",
    "save_video_grid",
    "show_cache",
    "show_frame_attention",
    "show_mask",
    "visualize_autoregressive_generation",
    "visualize_denoising_process",
    "visualize_kv_cache_growth",
]
