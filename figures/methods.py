"""Draws the four methods in one notation: what each network is given, what is compared with what, and where
the gradient stops.

    python figures/methods.py               # writes a picture of each method, and the legend, beside itself
"""
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line
from PIL import Image

# all lengths are in units of 100 pixels
WIDTH = 18
HEIGHT = 22.3
TOKEN = 0.2                                             # side of a token
CELL = 0.44                                             # side of a vector
PAD = 0.1                                               # margin in an input's frame
PITCH = 0.88                                            # from one input to the next below it
# columns, the same in all panels
VIDEO = 0.35                                            # left edges of what goes in, ...
AUDIO = 1.85
ENCODER = (4.0, 6.1)                                    # ... left and right edges of the boxes, ...
HEAD = (8.1, 10.1)
OUT = 11.15                                             # ... centres of what comes out ...
LOSS = 13.1                                             # ... and of the losses
LOSS2 = 15.5
BETWEEN = (ENCODER[1] + HEAD[0]) / 2
GREY = {"audio": "0.88", "video": "0.62"}
FILL = {"encoder": "0.86", "teacher": "0.86", "predictor": "white", "projector": "0.7"}

# Tokens of an input: "." visible, "#" hidden, "0" zeroed. A video is drawn as two of its frames: what is
# hidden is hidden in all.
SOUND = 3 * ["......."]
PICTURES = 3 * ["..."]
NO_SOUND = 3 * ["0000000"]
NO_PICTURES = 3 * ["000"]
BLOCKS = ("###..##", "###..##", "..####.")
OTHER_BLOCKS = ("..###..", "#####..", "###.###")
RECTANGLES = ("###....", "######.", "...###.")
TUBES = ("##.", "###", ".##")
OTHER_TUBES = (".##", ".##", "##.")
BOTH = ["video", "video", "audio", "audio"]

fig = Figure(figsize=(WIDTH, HEIGHT), dpi=100)
ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
ax.axis("off")


def say(x, y, text, size=18, ha="center", **style):
    if "\n" in text:
        ax.text(x, y, text, fontsize=size, ha=ha, va="center", linespacing=1.25, **style)
    else:                                               # share a baseline, with descenders or without
        ax.text(x, y - 0.0045 * size, text, fontsize=size, ha=ha, va="baseline", linespacing=1.25, **style)


def rule(y):
    """A line across the page."""
    ax.plot([0.25, WIDTH - 0.25], [y, y], color="0.6", lw=1)


def token(x, y, kind, state):
    """(x, y) is its lower left. States as above, and "!": represented or predicted at a hidden place."""
    known = state in ".!"
    dashes = (0, (2.2, 1.6)) if state in "#!" else "-"
    fill = GREY[kind] if known else "white"
    edge = "0.25" if known else "0.55"
    ax.add_patch(Rectangle((x, y), TOKEN, TOKEN, fc=fill, ec=edge, lw=1.1, ls=dashes))
    if known and kind == "audio":
        ax.plot([x + 0.035, x + TOKEN - 0.035], [y + 0.035, y + TOKEN - 0.035], color="0.1", lw=1.6)
    elif known:
        ax.add_patch(Circle((x + TOKEN / 2, y + TOKEN / 2), 0.035, fc="0.05"))


def tokens(x, y, kind, rows):
    """Rows of tokens, centred at the height y; gives the right edge."""
    for r, row in enumerate(rows):
        bottom = y + (len(rows) / 2 - 1 - r) * TOKEN
        for c, state in enumerate(row):
            token(x + c * TOKEN, bottom, kind, state)
    return x + len(rows[0]) * TOKEN


def frame(x, y, wide, high):
    corner = (x, y - high / 2)
    shape = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, wide, high, shape, fc="none", ec="0.35", lw=1.3))


def given(y, text, *inputs):
    """(pictures, sound) of each input, one below the other in frames of their own, and their arrows into the
    encoder."""
    lefts = [VIDEO if pictures else AUDIO for pictures, _ in inputs]
    say(min(lefts) - PAD, y + 0.58, text, ha="left")
    for left, (pictures, sound) in zip(lefts, inputs):
        if pictures:
            right = tokens(VIDEO, y, "video", pictures)
            right = tokens(right + TOKEN / 2, y, "video", pictures)
        if sound:
            right = tokens(AUDIO, y, "audio", sound)
        frame(left - PAD, y, right - left + 2 * PAD, 3 * TOKEN + 2 * PAD)
        arrow((right + PAD, y), (ENCODER[0], y))
        y = y - PITCH


def box(span, y, high, text, role):
    """A network, from left to right, centred at the height y; the teacher's edge is double and dashed."""
    dashes = (0, (4, 2)) if role == "teacher" else "-"
    left, right = span
    for inset in (0, 0.07) if role == "teacher" else (0,):
        corner = (left + inset, y - high / 2 + inset)
        shape = f"round,pad=0,rounding_size={0.16 - inset}"
        ax.add_patch(FancyBboxPatch(corner, right - left - 2 * inset, high - 2 * inset, shape,
                                    fc=FILL[role], ec="0.1", lw=1.6, ls=dashes))
    say((left + right) / 2, y, text, 19)


def arrow(*points, dashed=False):
    dashes = (0, (4, 2.5)) if dashed else "-"
    ax.add_patch(FancyArrowPatch(path=Line(points), arrowstyle="-|>", mutation_scale=19, lw=1.7,
                                 fc="0.1", ec="0.1", ls=dashes, joinstyle="miter"))


def stop(x, y):
    """The bar across an arrow that no gradient passes."""
    ax.plot([x, x], [y - 0.2, y + 0.2], color="0.1", lw=5, solid_capstyle="butt")


def loss(x, y, text):
    ax.add_patch(Ellipse((x, y), 0.8 + 0.1 * (len(text) - 2), 0.8, fc="0.15", ec="0.1"))
    say(x, y, text, 17, color="white", weight="bold")


def vector(x, y, name):
    ax.add_patch(Rectangle((x - CELL / 2, y - CELL / 2), CELL, CELL, fc="white", ec="0.1", lw=1.4))
    say(x, y, name, 16)


def vectors(x, y, *names):
    """Side by side, centred at (x, y); gives the right edge."""
    for i, name in enumerate(names):
        vector(x + (i - (len(names) - 1) / 2) * CELL, y, name)
    return x + CELL / 2 * len(names)


def hidden(x, y, kinds, state="!"):
    """Four tokens of hidden places, centred at (x, y); gives the right edge."""
    for i, kind in enumerate(kinds):
        token(x + (1.3 * (i - 1.5) - 0.5) * TOKEN, y - TOKEN / 2, kind, state)
    return x + 2.5 * TOKEN


def title(y, name, idea):
    rule(y + 0.4)
    say(0.25, y, name, 23, "left", weight="bold")
    say(ENCODER[0], y, idea, 19, "left")


def teacher(top, bottom, high):
    """The target encoder above, the context encoder below, and the moving average from this to that."""
    x = sum(ENCODER) / 2
    box(ENCODER, top, high, "target\nencoder", "teacher")
    box(ENCODER, bottom, high, "context\nencoder", "encoder")
    arrow((x, bottom + high / 2), (x, top - high / 2), dashed=True)
    say(x + 0.15, (top + bottom) / 2, "EMA", ha="left")


def target(y, text, to):
    """What the teacher says, on its way without a gradient to the x where it is compared."""
    arrow((ENCODER[1], y), (to, y))
    stop(ENCODER[1] + 0.3, y)
    say((ENCODER[1] + to) / 2 + 0.15, y + 0.22, text)


def compare(x, top, bottom, left, text):
    """Target from above and prediction from below, both from the x `left`, into a loss between them, whose
    height it gives."""
    middle = (top + bottom) / 2
    arrow((left, top), (x, top), (x, middle + 0.4))
    arrow((left, bottom), (x, bottom), (x, middle - 0.4))
    loss(x, middle, text)
    return middle


def within(top, bottom, kinds, text, said, levels=""):
    """At the hidden tokens: target, predictor and loss."""
    x = sum(HEAD) / 2 - 0.3
    edge = OUT - 2.5 * TOKEN
    target(top, f"{levels}, layer norm" if levels else "layer norm", edge)
    arrow((ENCODER[1], bottom), (HEAD[0], bottom))
    say(BETWEEN - 0.05, bottom + 0.22, levels)
    box(HEAD, bottom, 0.8, "predictor", "predictor")
    arrow((HEAD[1], bottom), (edge, bottom))
    hidden(x, bottom + 0.82, kinds, "#")
    arrow((x, bottom + 0.68), (x, bottom + 0.4))
    say(x + 0.6, bottom + 0.84, "mask tokens\n+ positions", ha="left")
    hidden(OUT, top, kinds)
    right = hidden(OUT, bottom, kinds)
    middle = compare(LOSS, top, bottom, right, text)
    say(LOSS + 0.52 + 0.05 * (len(text) - 2), middle, said, ha="left")


def one_input(y, name, idea, pictures, sound, kinds, text, said):
    """A-JEPA and AVJEPA: what is visible of the pictures and the sound, the kinds of hidden tokens, the
    loss and what it is taken of."""
    title(y, name, idea)
    top = y - 1.1
    bottom = y - 2.75
    given(top, "everything", (pictures and PICTURES, SOUND))
    given(bottom, "what is visible, 2 mask sets" if pictures else "what is visible", (pictures, sound))
    teacher(top, bottom, 0.9)
    within(top, bottom, kinds, text, said)


def views(y):
    title(y, "AV-JEPA",
          "no teacher, no predictor: all views of a clip are pulled to the mean of its two global views")
    given(y - 1.1, "2 global views: video + audio", (PICTURES, SOUND), (PICTURES, SOUND))
    given(y - 3.26, "2 local views: one modality", (NO_PICTURES, SOUND), (PICTURES, NO_SOUND))
    middle = y - 2.62
    box(ENCODER, middle, 3.84, "encoder", "encoder")
    arrow((ENCODER[1], middle), (HEAD[0], middle))
    say(BETWEEN - 0.05, middle + 0.22, "CLS of each")
    box(HEAD, middle, 0.8, "projector", "projector")
    x = HEAD[1] + 0.75
    arrow((HEAD[1], middle), (x - CELL / 2, middle))
    for i in range(4):
        vector(x, middle - (i - 1.5) * CELL, f"$z_{i + 1}$")

    # the mean of the first two
    high = middle + CELL
    right = x + CELL / 2 + 0.14
    ax.plot([right - 0.08, right, right, right - 0.08], [high + 0.38, high + 0.38, high - 0.38, high - 0.38],
            color="0.1", lw=1.7)
    arrow((right, high), (right + 0.3, high))
    mean = right + 0.3 + CELL / 2
    say(mean, high + 0.42, "mean")
    pull = LOSS + 0.3
    arrow((vectors(mean, high, "µ"), high), (pull - 0.8, high))
    loss(pull, high, "invariance")
    say(pull, high + 0.88, "mean of ($z$ – µ)²,\ngradient to both")

    # all four
    low = middle - 1.35
    spread = LOSS2 + 0.5
    arrow((x, middle - 2 * CELL), (x, low), (spread, low), (spread, high - 0.4))
    arrow((pull, low), (pull, high - 0.4))
    say((x + pull) / 2, low + 0.22, "all four")
    loss(spread, high, "SIGReg")
    say(spread, high + 0.88, "each $z$ Gaussian\nover the batch")
    say((pull + spread) / 2, low - 0.3, "(1 – λ) invariance + λ SIGReg")


def three_inputs(y):
    title(y, "MJEPA",
          "nine terms: the hidden rest of each input (within), and each other input as a whole (across)")
    top = y - 1.98
    bottom = y - 5.2
    given(top + PITCH, "everything: three inputs", (None, SOUND), (PICTURES, None), (PICTURES, SOUND))
    given(bottom + PITCH, "what is visible, 2 mask sets",
          (None, BLOCKS), (TUBES, None), (OTHER_TUBES, OTHER_BLOCKS))
    teacher(top, bottom, 2.56)
    within(top - 0.65, bottom + 0.65, BOTH, "L1", "within:\na, v, av", "several levels")

    names = ("a", "v", "av")
    above = top + 0.7
    below = bottom - 0.7
    target(above, "last level: mean, layer norm", OUT - 1.5 * CELL)
    arrow((ENCODER[1], below), (BETWEEN - 1.5 * CELL, below))
    say(BETWEEN, below + 0.42, "mean")
    arrow((vectors(BETWEEN, below, *names), below), (HEAD[0], below))
    box(HEAD, below, 0.8, "six MLPs", "predictor")
    arrow((HEAD[1], below), (OUT - 1.5 * CELL, below))
    vectors(OUT, above, *names)
    right = vectors(OUT, below, *names)
    middle = compare(LOSS2, above, below, right, "L1")
    say(LOSS2 + 0.52, middle, "across:\na→v, v→a,\na→av, v→av,\nav→a, av→v", ha="left")


def legend(top):
    rule(top + 0.45)
    middle = top - 0.6
    bottom = top - 1.2

    token(0.3, top - TOKEN / 2, "audio", ".")
    say(0.65, top, "audio token", ha="left")
    token(0.3, middle - TOKEN / 2, "video", ".")
    say(0.65, middle, "video token", ha="left")
    token(0.3, bottom - TOKEN / 2, "video", "#")
    say(0.65, bottom, "hidden", ha="left")

    token(3, top - TOKEN / 2, "video", "0")
    say(3.45, top, "given as zeros", ha="left")
    token(3, middle - TOKEN / 2, "video", "!")
    say(3.45, middle, "predicted, or target", ha="left")
    vector(3.1, bottom, "z")
    say(3.45, bottom, "vector of an input", ha="left")

    frame(6.5, top, 0.6, 0.4)
    tokens(tokens(6.6, top, "video", "."), top, "audio", ".")
    say(7.25, top, "one input, one pass", ha="left")
    box((6.5, 7.1), middle, 0.42, "", "encoder")
    say(7.25, middle, "encoder", ha="left")
    box((6.5, 7.1), bottom, 0.42, "", "teacher")
    say(7.25, bottom, "EMA of encoder", ha="left")

    box((10.2, 10.8), top, 0.42, "", "predictor")
    say(10.95, top, "predictor", ha="left")
    box((10.2, 10.8), middle, 0.42, "", "projector")
    say(10.95, middle, "projector", ha="left")
    ax.add_patch(Ellipse((10.5, bottom), 0.42, 0.42, fc="0.15"))
    say(10.95, bottom, "loss", ha="left")

    arrow((12.8, top), (13.5, top))
    say(13.65, top, "data, and the gradient back", ha="left")
    arrow((12.8, middle), (13.5, middle))
    stop(13.05, middle)
    say(13.65, middle, "data, no gradient back", ha="left")
    arrow((12.8, bottom), (13.5, bottom), dashed=True)
    say(13.65, bottom, "weights, moving average", ha="left")


def main():
    one_input(HEIGHT - 0.5, "A-JEPA",
              "sound alone: blocks of the mel are hidden; predict what the teacher represents there",
              None, BLOCKS, 4 * ["audio"], "smooth L1", "at every hidden token")
    views(HEIGHT - 4.4)
    three_inputs(HEIGHT - 9.64)
    one_input(HEIGHT - 16.82, "AVJEPA (NC State)",
              "pictures and their sound are one input: one predictor for the hidden tokens of both",
              TUBES, RECTANGLES, BOTH, "L1", "at every hidden token\nof video and audio")
    legend(HEIGHT - 20.77)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    picture = picture.convert("L").quantize(16)         # 16 greys: a third of the file
    tops = (0, 3.9, 9.14, 16.32, 20.22)                 # above the rules
    bottoms = (*tops[1:], HEIGHT)
    for name, top, bottom in zip(("ajepa", "avjepa_lejepa", "mjepa", "avjepa_ncsu", "legend"), tops, bottoms):
        part = picture.crop((0, round(100 * top), picture.width, round(100 * bottom)))
        part.save(Path(__file__).with_name(f"{name}.png"), optimize=True)


if __name__ == "__main__":
    main()
