"""Draws the four methods in one notation: what each network is given, what is compared with what, and where the gradient stops.

    python figures/methods.py               # writes methods.png beside this file
"""
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 18, 22.3                                # in units of 100 pixels
TOKEN, CELL, PAD, PITCH = 0.2, 0.44, 0.1, 0.88          # side of a token and of a vector; margin of an input's frame, from one to the next
VIDEO, AUDIO = 0.35, 1.85                               # columns, the same in all panels: left edges of what goes in, ...
ENCODER, HEAD = (4.0, 6.1), (8.1, 10.1)                 # ... boxes, ...
OUT, LOSS, LOSS2 = 11.15, 13.1, 15.5                    # ... centres of what comes out and of the losses
GREY = {"audio": "0.88", "video": "0.62"}
FILL = {"encoder": "0.86", "teacher": "0.86", "predictor": "white", "projector": "0.7"}

# Tokens of an input: "." visible, "#" hidden, "0" zeroed. A video is drawn as two of its frames: what is hidden is hidden in all.
SOUND, PICTURES, NO_SOUND, NO_PICTURES = 3 * ["......."], 3 * ["..."], 3 * ["0000000"], 3 * ["000"]
BLOCKS, OTHER_BLOCKS = ("###..##", "###..##", "..####."), ("..###..", "#####..", "###.###")
RECTANGLES, TUBES, OTHER_TUBES = ("###....", "######.", "...###."), ("##.", "###", ".##"), (".##", ".##", "##.")
BOTH = ["video", "video", "audio", "audio"]

fig = Figure(figsize=(WIDTH, HEIGHT), dpi=100)
ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
ax.axis("off")


def say(x, y, text, size=18, ha="center", **style):
    several = "\n" in text                              # single lines of one height share a baseline, with descenders or without
    ax.text(x, y - (not several) * 0.0045 * size, text, fontsize=size, ha=ha, va="center" if several else "baseline",
            linespacing=1.25, **style)


def token(x, y, kind, state):
    """(x, y) is its lower left. States as above, and "!": represented or predicted at a hidden place."""
    fill = GREY[kind] if state in ".!" else "white"
    ax.add_patch(Rectangle((x, y), TOKEN, TOKEN, fc=fill, ec="0.25" if state in ".!" else "0.55", lw=1.1,
                           ls=(0, (2.2, 1.6)) if state in "#!" else "-"))
    if state in ".!" and kind == "audio":
        ax.plot([x + 0.035, x + TOKEN - 0.035], [y + 0.035, y + TOKEN - 0.035], color="0.1", lw=1.6)
    elif state in ".!":
        ax.add_patch(Circle((x + TOKEN / 2, y + TOKEN / 2), 0.035, fc="0.05"))


def tokens(x, y, kind, rows):
    """Rows of tokens, centred at the height y; gives the right edge."""
    for r, row in enumerate(rows):
        for c, state in enumerate(row):
            token(x + c * TOKEN, y + (len(rows) / 2 - 1 - r) * TOKEN, kind, state)
    return x + len(rows[0]) * TOKEN


def frame(x, y, wide, high):
    ax.add_patch(FancyBboxPatch((x, y - high / 2), wide, high, "round,pad=0,rounding_size=0.08", fc="none", ec="0.35", lw=1.3))


def given(y, text, *inputs):
    """(pictures, sound) of each input, one below the other in frames of their own, and their arrows into the encoder."""
    say(min(VIDEO if pictures else AUDIO for pictures, _ in inputs) - PAD, y + 0.58, text, ha="left")
    for i, (pictures, sound) in enumerate(inputs):
        left, right, at = VIDEO if pictures else AUDIO, VIDEO, y - PITCH * i
        if pictures:
            right = tokens(tokens(VIDEO, at, "video", pictures) + TOKEN / 2, at, "video", pictures)
        if sound:
            right = tokens(AUDIO, at, "audio", sound)
        frame(left - PAD, at, right - left + 2 * PAD, 3 * TOKEN + 2 * PAD)
        arrow((right + PAD, at), (ENCODER[0], at))


def box(span, y, high, text, role):
    for inset in (0, 0.07)[:1 + (role == "teacher")]:
        ax.add_patch(FancyBboxPatch((span[0] + inset, y - high / 2 + inset), span[1] - span[0] - 2 * inset, high - 2 * inset,
                                    f"round,pad=0,rounding_size={0.16 - inset}", fc=FILL[role], ec="0.1", lw=1.6,
                                    ls=(0, (4, 2)) if role == "teacher" else "-"))
    say(sum(span) / 2, y, text, 19)


def arrow(*points, dashed=False):
    ax.add_patch(FancyArrowPatch(path=Line(points), arrowstyle="-|>", mutation_scale=19, lw=1.7, fc="0.1", ec="0.1",
                                 ls=(0, (4, 2.5)) if dashed else "-", joinstyle="miter"))


def stop(x, y):
    ax.plot([x, x], [y - 0.2, y + 0.2], color="0.1", lw=5, solid_capstyle="butt")


def loss(x, y, text):
    ax.add_patch(Ellipse((x, y), 0.8 + 0.1 * (len(text) - 2), 0.8, fc="0.15", ec="0.1"))
    say(x, y, text, 17, color="white", weight="bold")


def vectors(x, y, *names, down=False):
    """Side by side, or one below the other, centred at (x, y); gives the right edge."""
    for i, name in enumerate(names):
        step = (i - (len(names) - 1) / 2) * CELL
        at = (x, y - step) if down else (x + step, y)
        ax.add_patch(Rectangle((at[0] - CELL / 2, at[1] - CELL / 2), CELL, CELL, fc="white", ec="0.1", lw=1.4))
        say(*at, name, 16)
    return x + CELL / 2 * (1 if down else len(names))


def hidden(x, y, kinds, state="!"):
    """Four tokens of hidden places, centred at (x, y); gives the right edge."""
    for i, kind in enumerate(kinds):
        token(x + (1.3 * (i - 1.5) - 0.5) * TOKEN, y - TOKEN / 2, kind, state)
    return x + 2.5 * TOKEN


def title(y, name, idea):
    ax.plot([0.25, WIDTH - 0.25], [y + 0.4, y + 0.4], color="0.6", lw=1)
    say(0.25, y, name, 23, "left", weight="bold")
    say(ENCODER[0], y, idea, 19, "left")


def teacher(top, bottom, high):
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
    """Target from above and prediction from below, both from the x `left`, into a loss between them, whose height it gives."""
    middle = (top + bottom) / 2
    arrow((left, top), (x, top), (x, middle + 0.4))
    arrow((left, bottom), (x, bottom), (x, middle - 0.4))
    loss(x, middle, text)
    return middle


def within(top, bottom, kinds, text, said, levels=""):
    """At the hidden tokens: target, predictor and loss."""
    x, edge = sum(HEAD) / 2 - 0.3, OUT - 2.5 * TOKEN
    target(top, f"{levels}, layer norm".strip(", "), edge)
    arrow((ENCODER[1], bottom), (HEAD[0], bottom))
    say((ENCODER[1] + HEAD[0]) / 2 - 0.05, bottom + 0.22, levels)
    box(HEAD, bottom, 0.8, "predictor", "predictor")
    arrow((HEAD[1], bottom), (edge, bottom))
    hidden(x, bottom + 0.82, kinds, "#")
    arrow((x, bottom + 0.68), (x, bottom + 0.4))
    say(x + 0.6, bottom + 0.84, "mask tokens\n+ positions", ha="left")
    right = [hidden(OUT, y, kinds) for y in (top, bottom)][0]
    say(LOSS + 0.52 + 0.05 * (len(text) - 2), compare(LOSS, top, bottom, right, text), said, ha="left")


def one_input(y, name, idea, pictures, sound, kinds, text, said):
    """A-JEPA and AVJEPA: what is visible of the pictures and the sound, the kinds of hidden tokens, the loss and what it is taken of."""
    title(y, name, idea)
    top, bottom = y - 1.1, y - 2.75
    given(top, "everything", (pictures and PICTURES, SOUND))
    given(bottom, "what is visible" + (", 2 mask sets" if pictures else ""), (pictures, sound))
    teacher(top, bottom, 0.9)
    within(top, bottom, kinds, text, said)


def views(y):
    title(y, "AV-JEPA", "no teacher, no predictor: all views of a clip are pulled to the mean of its two global views")
    given(y - 1.1, "2 global views: video + audio", (PICTURES, SOUND), (PICTURES, SOUND))
    given(y - 3.26, "2 local views: one modality", (NO_PICTURES, SOUND), (PICTURES, NO_SOUND))
    middle, x, pull, spread = y - 2.62, HEAD[1] + 0.75, LOSS + 0.3, LOSS2 + 0.5
    up, low = middle + CELL, middle - 1.35              # the heights of the mean and of all four
    box(ENCODER, middle, 3.84, "encoder", "encoder")
    arrow((ENCODER[1], middle), (HEAD[0], middle))
    say((ENCODER[1] + HEAD[0]) / 2 - 0.05, middle + 0.22, "CLS of each")
    box(HEAD, middle, 0.8, "projector", "projector")
    arrow((HEAD[1], middle), (x - CELL / 2, middle))
    right = vectors(x, middle, "$z_1$", "$z_2$", "$z_3$", "$z_4$", down=True) + 0.14
    ax.plot([right - 0.08, right, right, right - 0.08], [up + 0.38, up + 0.38, up - 0.38, up - 0.38], color="0.1", lw=1.7)
    arrow((right, up), (right + 0.3, up))
    say(right + 0.3 + CELL / 2, up + 0.42, "mean")
    arrow((vectors(right + 0.3 + CELL / 2, up, "µ"), up), (pull - 0.8, up))
    arrow((x, middle - 2 * CELL), (x, low), (spread, low), (spread, up - 0.4))
    arrow((pull, low), (pull, up - 0.4))
    say((x + pull) / 2, low + 0.22, "all four")
    for at, text, said in ((pull, "invariance", "mean of ($z$ – µ)²,\ngradient to both"),
                           (spread, "SIGReg", "each $z$ Gaussian\nover the batch")):
        loss(at, up, text)
        say(at, up + 0.88, said)
    say((pull + spread) / 2, low - 0.3, "(1 – λ) invariance + λ SIGReg")


def three_inputs(y):
    title(y, "MJEPA", "nine terms: the hidden rest of each input (within), and each other input as a whole (across)")
    top, bottom = y - 1.98, y - 5.2
    given(top + PITCH, "everything: three inputs", (None, SOUND), (PICTURES, None), (PICTURES, SOUND))
    given(bottom + PITCH, "what is visible, 2 mask sets", (None, BLOCKS), (TUBES, None), (OTHER_TUBES, OTHER_BLOCKS))
    teacher(top, bottom, 2.56)
    within(top - 0.65, bottom + 0.65, BOTH, "L1", "within:\na, v, av", "several levels")
    above, below, x, names = top + 0.7, bottom - 0.7, (ENCODER[1] + HEAD[0]) / 2, ("a", "v", "av")
    target(above, "last level: mean, layer norm", OUT - 1.5 * CELL)
    arrow((ENCODER[1], below), (x - 1.5 * CELL, below))
    say(x, below + 0.42, "mean")
    arrow((vectors(x, below, *names), below), (HEAD[0], below))
    box(HEAD, below, 0.8, "six MLPs", "predictor")
    arrow((HEAD[1], below), (OUT - 1.5 * CELL, below))
    right = [vectors(OUT, height, *names) for height in (above, below)][0]
    say(LOSS2 + 0.52, compare(LOSS2, above, below, right, "L1"), "across:\na→v, v→a,\na→av, v→av,\nav→a, av→v", ha="left")


def legend(y):
    ax.plot([0.25, WIDTH - 0.25], [y + 0.45, y + 0.45], color="0.6", lw=1)
    rows = [y, y - 0.6, y - 1.2]
    for x, y, kind, state in zip((0.3, 0.3, 0.3, 3, 3), rows + rows, ("audio", "video", "video", "video", "video"), "..#0!"):
        token(x, y - TOKEN / 2, kind, state)
    vectors(3.1, rows[2], "z")
    frame(6.5, rows[0], 0.6, 0.4)
    tokens(tokens(6.6, rows[0], "video", "."), rows[0], "audio", ".")
    for x, row, role in (6.5, 1, "encoder"), (6.5, 2, "teacher"), (10.2, 0, "predictor"), (10.2, 1, "projector"):
        box((x, x + 0.6), rows[row], 0.42, "", role)
    ax.add_patch(Ellipse((10.5, rows[2]), 0.42, 0.42, fc="0.15"))
    for y in rows:
        arrow((12.8, y), (13.5, y), dashed=y == rows[2])
    stop(13.05, rows[1])
    for x, column in ((0.65, ("audio token", "video token", "hidden")),
                      (3.45, ("given as zeros", "predicted, or target", "vector of an input")),
                      (7.25, ("one input, one pass", "encoder", "EMA of encoder")), (10.95, ("predictor", "projector", "loss")),
                      (13.65, ("data, and the gradient back", "data, no gradient back", "weights, moving average"))):
        for y, text in zip(rows, column):
            say(x, y, text, ha="left")


if __name__ == "__main__":
    one_input(HEIGHT - 0.5, "A-JEPA", "sound alone: blocks of the mel are hidden; predict what the teacher represents there",
              None, BLOCKS, 4 * ["audio"], "smooth L1", "at every hidden token")
    views(HEIGHT - 4.4)
    three_inputs(HEIGHT - 9.64)
    one_input(HEIGHT - 16.82, "AVJEPA (NC State)", "pictures and their sound are one input: one predictor for the hidden tokens of both",
              TUBES, RECTANGLES, BOTH, "L1", "at every hidden token\nof video and audio")
    legend(HEIGHT - 20.77)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("L").quantize(16)      # 16 greys: a third of the file
    picture.save(Path(__file__).with_name("methods.png"), optimize=True)
