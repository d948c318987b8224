"""The still world: the toy made hard, so that a single picture's colours and a sound's timbre tell nothing.

The class is seen as shape and motion: an upright or a lying ellipse that bounces, swings, circles or pulses.
It is heard as what pitch and loudness do in each period of the motion: of upright ones the pitch falls, of
lying ones it rises; a bounce is struck, a swing swells as it passes the middle, a circle trembles, a pulse
sounds while it is large. Size is pitch (small is high). The colours, the background, which stays for the
whole clip, timbre, place, reach, brightness, gain and noise mean nothing."""
import numpy as np
import torch
import torch.nn.functional as F

from datasets.made import World
from datasets.toy import TOY, add_hiss, dim, distances, paint, timbre, to_rgb

STILL = dict(TOY, version=1, name="toy-still")          # the name tells its world.json from a toy's
SHAPES = ("upright", "lying")
MOTIONS = ("bounces", "swings", "circles", "pulses")
STILL_CLASSES = tuple(f"{shape} {motion}" for shape in SHAPES for motion in MOTIONS)
STREAM = 7                              # of random numbers; the toy has another
PERIOD = (0.9, 1.8)                     # seconds
LARGEST = 0.3                           # half the long axis of the largest object, in widths of the picture
ASPECT = 2.2                            # long axis / short axis
PLACE = (0.35, 0.65)                    # of a coordinate that does not move
REACH = (0.2, 0.3)                      # how far a motion goes to either side, in widths of the picture
CIRCLE = 0.8                            # radius of a circle / reach
PULSE = 0.6                             # small / large
BACKGROUND = (10, 160)                  # gray levels; a field of 3 x 3 colours
SATURATION = (0.3, 0.9)
VALUE = (0.85, 1.0)
TIMBRES = (0, 1, 2, 4, 5)               # of the toy's: odd, saw, octaves, few partials, hollow
BENDS = {"upright": -1.0, "lying": 1.0}         # octaves a period
TREMBLE = (0.2, 6.0)                    # octaves, Hz
DECAY = (0.15, 0.35)                    # seconds until a struck tone is down to 1 / e


def still_clip(seed, split, index):
    """One clip of the world: (frames (T, H, W, 3) uint8, wave (samples,) float32, truth dict with label,
    octave (of pitch and of 1/area), period (s) and place (T, 2), the object's x and y in [0, 1] at the middle
    of each frame). A pure function."""
    rng = np.random.default_rng((seed, STREAM, ("train", "test").index(split), index))
    label = index % len(STILL_CLASSES)
    shape, motion = STILL_CLASSES[label].split()
    octave = rng.uniform(0, 2)                                  # the cause that size and pitch share
    radius = STILL["side"] * LARGEST * 2 ** (-octave / 2)
    pitch = 220 * 2 ** octave
    period = rng.uniform(*PERIOD)
    phase = rng.uniform(0, 1)
    t = (np.arange(int(STILL["seconds"] * STILL["fps"])) + 0.5) / STILL["fps"]
    u = (t / period - phase) % 1.0                              # 0 where a period begins
    x, y, size = move(rng, motion, u)
    background = draw_background(rng)
    frames = draw_ellipse(background, x, y, radius * size, draw_color(rng), shape)
    frames = dim(rng, frames)
    wave = play(rng, shape, motion, pitch, period, phase)
    return frames, wave, {"label": label, "octave": octave, "period": period, "place": np.stack([x, y], 1)}


def move(rng, motion, u):
    """x, y and size / full size, each (T,), at u, the share of a period that has passed."""
    x = np.full(len(u), rng.uniform(*PLACE))
    y = np.full(len(u), rng.uniform(*PLACE))
    size = np.ones(len(u))
    reach = rng.uniform(*REACH)
    turn = 2 * np.pi * u
    if motion == "bounces":
        y = 0.5 + reach - 2 * reach * 4 * u * (1 - u)           # parabolas: on the floor where u is 0
    elif motion == "swings":
        x = 0.5 + reach * np.cos(turn)
    elif motion == "circles":
        x = 0.5 + CIRCLE * reach * np.cos(turn)
        y = 0.5 + CIRCLE * reach * np.sin(turn)
    else:
        size = np.where(u < 0.5, 1.0, PULSE)
    return x, y, size


def draw_background(rng):
    """A smooth field of colours: (H, W, 3) float32."""
    coarse = rng.uniform(*BACKGROUND, (1, 3, 3, 3)).astype(np.float32)
    size = (STILL["side"], STILL["side"])
    smooth = F.interpolate(torch.from_numpy(coarse), size=size, mode="bilinear", align_corners=True)
    return smooth[0].permute(1, 2, 0).numpy()


def draw_color(rng):
    """RGB of any hue, bright."""
    return to_rgb(rng.uniform(0, 1), rng.uniform(*SATURATION), rng.uniform(*VALUE))


def draw_ellipse(background, x, y, radius, color, shape):
    """Frames (T, H, W, 3) with an ellipse at x, y in [0, 1] of half the long axis `radius` (pixels), each
    (T,)."""
    dx, dy = distances(len(background), x, y)
    if shape == "upright":
        dx = dx * ASPECT
    else:
        dy = dy * ASPECT
    mask = np.clip(radius[:, None, None] - np.hypot(dx, dy) + 0.5, 0, 1)        # (T, H, W)
    return paint(background, mask, color)


def play(rng, shape, motion, pitch, period, phase):
    """One tone of any timbre: the shape is how its pitch moves over a period, the motion how its loudness
    does."""
    rate = STILL["sample_rate"]
    t = np.arange(int(STILL["seconds"] * rate)) / rate
    u = (t / period - phase) % 1.0
    ratios, gains = timbre(TIMBRES[rng.integers(len(TIMBRES))], pitch)
    gains = gains / np.sqrt((gains ** 2).sum())
    loud = loudness(rng, motion, u, period)
    octaves = BENDS[shape] * (u - 0.5)
    if motion == "circles":
        depth, speed = TREMBLE
        octaves = octaves + depth * np.sin(2 * np.pi * speed * t)
    frequency = pitch * 2 ** octaves                                            # (samples,)
    turns = np.cumsum(frequency) / rate
    wave = np.zeros(len(t), np.float32)
    for ratio, gain in zip(ratios, gains):
        angle = (ratio * turns + rng.uniform()) % 1.0                           # float32 is enough for a turn
        audible = ratio * frequency < 0.45 * rate
        wave += gain * audible * np.sin(2 * np.pi * angle.astype(np.float32))
    return add_hiss(rng, wave * loud)


def loudness(rng, motion, u, period):
    """(samples,) in [0, 1] at u, the share of a period that has passed."""
    s = u * period                                              # seconds since the period began
    if motion == "bounces":                                     # struck on the floor
        return np.exp(-s / rng.uniform(*DECAY)) * np.clip(s / 0.005, 0, 1)
    if motion == "swings":                                      # loudest in the middle, where it is fastest
        return np.sin(2 * np.pi * u) ** 2
    if motion == "circles":                                     # as fast all the time
        return np.ones(len(u))
    return np.clip(s / 0.02, 0, 1) * np.clip((0.5 * period - s) / 0.02, 0, 1)   # while it is large


STILL_WORLD = World(STILL["name"], STILL, STILL_CLASSES, still_clip)
