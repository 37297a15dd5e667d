"""Self-Forcing in one picture: the rollout above, distribution matching below."""

from visualization.style import (
    BLUE,
    BODY,
    FAINT,
    GREEN,
    HEADING,
    INK,
    PALE,
    PURPLE,
    SKY,
    SMALL,
    SOFT,
    TITLE,
    VERMILLION,
    draw_arrow,
    draw_block,
    draw_box,
    draw_path,
    finish,
    page,
    styled,
    write,
)

# Inches from the top left corner of the page.
STEPS, STEP_Y, STEP_WIDTH, STEP_HEIGHT = (2.95, 4.95, 6.95, 8.95), 2.4, 1.45, 0.8
FLOW = STEP_Y + STEP_HEIGHT / 2
FRAME, CLEAN, CACHE = 0.5, 11.4, 4.6
VIDEO, JUDGES = 2.17, 8.4


@styled
def create_algorithm_diagram(save_path=None):
    """Figure of Self-Forcing: roll out block by block with a cache, then match distributions with two scores.

    Algorithm 1 of Self-Forcing (Huang et al., 2025) with the DMD objective (Yin et al., 2024). The example
    has three frames per block, a sink of three frames and a window of six.
    """
    fig, ax = page(14.6, 10.75)
    write(ax, 0.4, 0.42, "Self-Forcing: train as you infer", size=TITLE + 4, ha="left", weight="bold")
    words = "The student learns on videos that it generated itself, by the same rollout that inference uses."
    write(ax, 0.4, 0.8, words, size=HEADING, color=SOFT, ha="left")
    for y, height, heading in (
        (1.1, 5.1, "1   Roll out one block"),
        (6.4, 4.1, "2   Match distributions (DMD)"),
    ):
        draw_box(ax, 0.3, y, 14.0, height, face=PALE, edge=PALE, zorder=0)
        write(ax, 0.55, y + 0.32, heading, size=TITLE - 1, ha="left", weight="bold")
    draw_denoising(ax)
    draw_cache(ax)
    draw_next_block(ax)
    draw_judges(ax)
    draw_critic_training(ax)
    return finish(fig, save_path)


def draw_denoising(ax):
    """Noise, the few steps with the exit step, and the clean block."""
    right = draw_block(ax, 0.75, FLOW - FRAME / 2, "noise", width=FRAME)
    write(ax, 1.54, FLOW + 0.45, "block i: noise")
    draw_arrow(ax, (right + 0.1, FLOW), (STEPS[0] - 0.08, FLOW))
    step = {"y": STEP_Y, "width": STEP_WIDTH, "height": STEP_HEIGHT}
    draw_labelled_box(ax, STEPS[0], **step, head="generator, $t_4$", words="no_grad")
    draw_labelled_box(ax, STEPS[1], **step, head="generator, $t_3$", words="no_grad")
    draw_labelled_box(ax, STEPS[2], **step, head="generator, $t_2$", words="exit step: gradient", edge=VERMILLION)
    draw_labelled_box(ax, STEPS[3], **step, head="generator, $t_1$", words="not run", edge=FAINT, color=SOFT, line="--")
    for x in STEPS[:2]:
        draw_arrow(ax, (x + STEP_WIDTH + 0.06, FLOW), (x + 1.93, FLOW))
        write(ax, x + STEP_WIDTH + 0.27, FLOW - 0.15, "re-noise", size=SMALL, color=SOFT)
    start, end = (STEPS[2] + STEP_WIDTH / 2, STEP_Y - 0.06), (CLEAN + 0.79, FLOW - 0.35)
    draw_arrow(ax, start, end, color=VERMILLION, width=2.4, bend=-0.14)
    write(ax, 9.95, 1.72, "its guess of $x_0$ is the block", color=VERMILLION)
    draw_block(ax, CLEAN, FLOW - FRAME / 2, "clean", width=FRAME, texts=("12", "13", "14"))
    write(ax, CLEAN + 0.79, FLOW + 0.45, "block i: clean")


def draw_cache(ax):
    """Sink, evicted frames and window, and the steps that read them."""
    write(ax, 0.75, CACHE + 0.12, "KV cache", size=HEADING, ha="left", weight="bold")
    write(ax, 0.75, CACHE + 0.4, "keys and values,\nalways detached", ha="left", color=SOFT)
    draw_box(ax, 2.95, CACHE - 0.2, 7.45, 1.15, edge=SKY, linewidth=2)
    groups = (("sink", 0, 3.2), ("evicted", 3, 5.0), ("cached", 6, 6.8), ("cached", 9, 8.5))
    for kind, first, x in groups:
        texts = None if kind == "evicted" else range(first, first + 3)
        draw_block(ax, x, CACHE, kind, width=FRAME, texts=texts)
    for x, words in (
        (3.99, "sink: kept for ever"),
        (5.79, "evicted"),
        (8.44, "window: the most recent frames"),
    ):
        write(ax, x, CACHE + 0.74, words, size=SMALL)
    for x in STEPS[:3]:
        middle = x + STEP_WIDTH / 2
        draw_arrow(ax, (middle, CACHE - 0.24), (middle, STEP_Y + STEP_HEIGHT + 0.06), color=SKY)
    write(ax, 6.68, 3.8, "every step reads the cache", color=BLUE)


def draw_next_block(ax):
    """The clean block is remembered, and the next block starts from the new cache."""
    middle = CLEAN + 0.79
    draw_path(ax, [(middle, FLOW + 0.65), (middle, CACHE + 0.05), (10.48, CACHE + 0.05)], color=BLUE)
    words = "remember: one more\npass, no_grad, over what\nwas generated"
    write(ax, middle + 0.15, 4.05, words, ha="left", color=BLUE)
    draw_arrow(ax, (10.48, CACHE + 0.72), (CLEAN - 0.1, CACHE + 0.72), color=SKY)
    draw_block(ax, CLEAN, CACHE + 0.47, "noise", width=FRAME)
    write(ax, CLEAN + 1.7, CACHE + 0.72, "block i + 1:\nthe same again", ha="left")
    words = "In training the exit step is drawn (or the last); inference runs all, without gradient. All else is equal."
    write(ax, 0.75, 5.88, words, ha="left", style="italic")


def draw_judges(ax):
    """The noised video goes to teacher and critic; their difference is the gradient."""
    for block in range(3):
        draw_block(ax, 0.75 + 0.98 * block, JUDGES - 0.13, "clean", width=0.27)
    write(ax, VIDEO, JUDGES + 0.34, "the generated video $x$")
    draw_arrow(ax, (3.75, JUDGES), (4.2, JUDGES))
    box = {"height": 0.8, "linewidth": 2.2}
    y, upper, lower = JUDGES - 0.4, JUDGES - 1.0, JUDGES + 0.2
    draw_labelled_box(ax, 4.3, y, 1.5, **box, head="add noise", words="$x_t$ at a random $t$")
    words = "frozen; uncond + w (cond - uncond)"
    draw_labelled_box(ax, 6.5, upper, 3.0, **box, head="teacher: real score", words=words, edge=GREEN)
    words = "learns online; no guidance"
    draw_labelled_box(ax, 6.5, lower, 3.0, **box, head="critic: fake score", words=words, edge=PURPLE, line="--")
    words = r"$(x_0^{fake} - x_0^{real})\;/\;\mathrm{mean}\,|x - x_0^{real}|$"
    draw_labelled_box(ax, 10.6, y, 3.4, **box, head="gradient on $x$", words=words, edge=VERMILLION)
    for side, name in ((-1, "$x_0^{real}$"), (1, "$x_0^{fake}$")):
        draw_arrow(ax, (5.88, JUDGES + 0.15 * side), (6.42, JUDGES + 0.6 * side))
        draw_arrow(ax, (9.58, JUDGES + 0.6 * side), (10.52, JUDGES + 0.15 * side))
        write(ax, 10.1, JUDGES + 0.72 * side, name, size=HEADING)
    corners = [(12.3, y - 0.06), (12.3, 7.15), (VIDEO, 7.15), (VIDEO, JUDGES - 0.22)]
    draw_path(ax, corners, color=VERMILLION, line="--", width=2)
    write(ax, 8.0, 6.98, "back-propagates into every block, through its exit step only", color=VERMILLION)


def draw_critic_training(ax):
    """The critic is a diffusion model of the student's own videos."""
    corners = [(VIDEO, JUDGES + 0.55), (VIDEO, 9.85), (8.0, 9.85), (8.0, JUDGES + 1.06)]
    draw_path(ax, corners, color=PURPLE, width=2)
    write(ax, 8.2, 9.7, r"min  $\Vert v(x_t, t) - (\mathrm{noise} - x)\Vert^2$", ha="left", size=HEADING)
    words = (
        "The critic learns by flow matching on the student's videos (detached), several critic steps per student step."
    )
    write(ax, VIDEO, 10.12, words, ha="left")


def draw_labelled_box(ax, x, y, width, height, *, head, words, edge=SOFT, color=INK, line="-", linewidth=1.6):
    """A box with a heading and a line of text."""
    draw_box(ax, x, y, width, height, edge=edge, line=line, linewidth=2.8 if edge == VERMILLION else linewidth)
    write(ax, x + width / 2, y + 0.35 * height, head, size=HEADING, weight="bold", color=color)
    write(ax, x + width / 2, y + 0.7 * height, words, size=BODY if width > 1.45 else SMALL, color=color)
