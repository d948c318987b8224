"""The toy world: sound and sight with common causes, as real H.264 + AAC files.

The class is heard as timbre and seen as hue. Size is pitch (small is high). Each bounce is an onset. The
shape, the background, brightness, place, drift, gain and noise mean nothing; in half of the clips a second
object of another hue glides by without bouncing or sounding."""
import numpy as np
import torch
import torch.nn.functional as F

from datasets.made import World

TOY = dict(train=1536, test=256, seconds=4.0, fps=10, side=64, sample_rate=16000, seed=0, version=2)
TOY_CLASSES = ("red odd", "orange saw", "green octaves", "teal bell",
               "blue tremolo", "violet hollow", "pink breath", "lime formant")
TOY_HUES = (0.0, 0.09, 0.36, 0.48, 0.62, 0.74, 0.87, 0.22)
TREMOLO = 4                                                     # the class whose notes tremble ...
BREATH = 6                                                      # ... and the one whose notes hiss


def toy_clip(seed, split, index):
    """One clip of the world: (frames (T, H, W, 3) uint8, wave (samples,) float32, truth dict). A pure
    function. The truth: label, octave (of pitch and of 1/size), period (s between bounces), silent (is there
    a silent object), place (T, 2), the sounding object's x and y in [0, 1] at the middle of each frame, and
    silent_place, the silent one's (NaN without)."""
    rng = np.random.default_rng((seed, ("train", "test").index(split), index))
    label = index % len(TOY_CLASSES)
    octave = rng.uniform(0, 2)                                  # the cause that size and pitch share
    radius = TOY["side"] * 0.27 * 3 ** (-octave / 2)
    pitch = 220 * 2 ** octave
    period = rng.uniform(0.5, 1.2)                              # seconds from bounce to bounce
    phase = rng.uniform(0, 1)
    onsets = (np.arange(-1, 10) + phase) * period
    t = (np.arange(int(TOY["seconds"] * TOY["fps"])) + 0.5) / TOY["fps"]
    u = (t / period - phase) % 1.0                              # 0 at each onset
    x = glide(rng, t)
    floor = rng.uniform(0.75, 0.88)
    height = rng.uniform(0.3, 0.5)
    y = floor - height * 4 * u * (1 - u)                        # parabolas: on the floor at each onset
    silent = bool(rng.integers(2))
    frames = draw_background(rng, t)
    silent_place = np.full((len(t), 2), np.nan)
    if silent:
        other = (label + rng.integers(1, len(TOY_CLASSES))) % len(TOY_CLASSES)
        silent_x = glide(rng, t)
        silent_y = glide(rng, t)
        size = TOY["side"] * 0.27 * 3 ** (-rng.uniform(0, 1))
        frames = draw_object(frames, silent_x, silent_y, size, draw_color(rng, other), rng.integers(4))
        silent_place = np.stack([silent_x, silent_y], 1)
    frames = draw_object(frames, x, y, radius, draw_color(rng, label), rng.integers(4))
    frames = dim(rng, frames)
    wave = play(rng, label, pitch, onsets)
    truth = {
        "label": label,
        "octave": octave,
        "period": period,
        "silent": silent,
        "place": np.stack([x, y], 1),
        "silent_place": silent_place}
    return frames, wave, truth


def glide(rng, t):
    """A coordinate that drifts and bounces off the side walls."""
    x = rng.uniform(0.2, 0.8) + rng.uniform(-0.12, 0.12) * t
    return 0.15 + 0.7 * np.abs((x - 0.15) / 0.7 % 2 - 1)


def draw_color(rng, label):
    """RGB of a hue near the label's, strong and bright."""
    h = (TOY_HUES[label] + rng.normal(0, 0.012)) % 1
    s = rng.uniform(0.7, 1.0)
    v = rng.uniform(0.7, 1.0)
    return to_rgb(h, s, v)


def to_rgb(h, s, v):
    """RGB (3,) in [0, 255] of hue, saturation and value in [0, 1]."""
    k = (np.array([5, 3, 1]) + h * 6) % 6
    return 255 * (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw_background(rng, t):
    """A smooth field of dull colours that becomes another one every second: (T, H, W, 3) float32."""
    coarse = rng.uniform(35, 170, (1, 3, int(TOY["seconds"]) + 1, 3, 3)).astype(np.float32)
    size = (len(t), TOY["side"], TOY["side"])
    smooth = F.interpolate(torch.from_numpy(coarse), size=size, mode="trilinear", align_corners=True)
    return smooth[0].permute(1, 2, 3, 0).numpy()


def draw_object(frames, x, y, radius, color, shape):
    """Paint a disc, square, diamond or ring at (x, y) of each frame, (0, 0) the top left corner and (1, 1)
    the other."""
    dx, dy = distances(frames.shape[1], x, y)
    if shape == 1:
        distance = 1.13 * np.maximum(dx, dy)
    elif shape == 2:
        distance = 0.8 * (dx + dy)
    else:
        distance = np.hypot(dx, dy)                             # (T, H, W)
    mask = np.clip(radius - distance + 0.5, 0, 1)
    if shape == 3:
        mask *= np.clip(distance - radius * 0.45 + 0.5, 0, 1)
    return paint(frames, mask, color)


def distances(side, x, y):
    """How far each column and row of pixels lies from (x, y) of each frame: (T, 1, W) and (T, H, 1),
    pixels."""
    grid = ((np.arange(side) + 0.5) / side).astype(np.float32)
    dx = np.abs(grid[None, None, :] - x.astype(np.float32)[:, None, None]) * side
    dy = np.abs(grid[None, :, None] - y.astype(np.float32)[:, None, None]) * side
    return dx, dy


def paint(frames, mask, color):
    """The color over the frames where mask (T, H, W) is 1."""
    return frames + mask[..., None] * (color.astype(np.float32) - frames)


def dim(rng, frames):
    """Brightness and noise of a clip: (T, H, W, 3) uint8."""
    frames = frames * np.float32(rng.uniform(0.6, 1.0)) + 6 * rng.standard_normal(frames.shape, np.float32)
    return frames.clip(0, 255).astype(np.uint8)


def timbre(label, pitch):
    """(frequencies of the partials as multiples of the pitch, their gains)"""
    n = np.arange(1, 13)
    formant = np.exp(-0.5 * ((n * pitch - 1800) / 500) ** 2)
    return (
        (2 * n - 1, 1.0 / (2 * n - 1)),                                         # odd partials: a square wave
        (n, 1.0 / n),                                                           # saw
        (2.0 ** np.arange(5), np.ones(5)),                                      # octaves, equally loud
        (np.array([1, 2.76, 5.40, 8.93]), np.array([1, 0.8, 0.7, 0.5])),        # a bell: partials out of tune
        (n[:4], 1.0 / n[:4]),                                                   # few partials, with tremolo
        (np.array([1, 5, 6, 7]), np.array([1, 0.6, 0.8, 0.6])),             # hollow: nothing between 1 and 5
        (n[:3], np.array([0.6, 0.3, 0.2])),                                     # breath: tone in noise
        (n, formant + 0.02),                                                # a formant that stays at 1,800 Hz
    )[label]


def play(rng, label, pitch, onsets):
    """A note at each onset; the class is the timbre: which partials, how loud, and how they move."""
    rate = TOY["sample_rate"]
    t = np.arange(int(TOY["seconds"] * rate)) / rate
    ratios, gains = timbre(label, pitch)
    gains = gains / np.sqrt((gains ** 2).sum())
    decay = rng.uniform(0.12, 0.3)
    wave = np.zeros_like(t)
    for onset in onsets:
        begin = max(0, int(round(onset * rate)))
        if begin >= len(t) or onset < -0.5:
            continue
        s = t[begin:begin + rate] - onset                       # after a second nothing is left of a note
        frequencies = pitch * ratios * 2 ** rng.normal(0, 0.01)
        audible = frequencies < 0.45 * rate
        phases = rng.uniform(0, 2 * np.pi, (audible.sum(), 1))
        angles = 2 * np.pi * frequencies[audible, None] * s + phases                     # (partials, samples)
        partials = np.sin(angles.astype(np.float32))        # twice as fast
        note = (gains[audible, None] * partials).sum(0)
        if label == TREMOLO:
            note = note * (1 + 0.9 * np.sin(2 * np.pi * 14 * s))
        if label == BREATH:
            note = note + 0.7 * rng.normal(size=len(s))
        wave[begin:begin + rate] += note * np.exp(-s / decay) * np.clip(s / 0.005, 0, 1)
    return add_hiss(rng, wave)


def add_hiss(rng, wave):
    """White or brown noise below the wave, and a gain: (samples,) float32 in [-1, 1]."""
    brown = rng.integers(2)
    hiss = rng.normal(size=len(wave))
    if brown:
        hiss = np.cumsum(hiss)
    hiss = (hiss - hiss.mean()) / hiss.std()
    wave = wave / wave.std() + hiss * 10 ** (-rng.uniform(5, 20) / 20)
    gain = 0.1 * 10 ** (-rng.uniform(0, 12) / 20)
    return (gain * wave).clip(-1, 1).astype(np.float32)


TOY_WORLD = World("toy", TOY, TOY_CLASSES, toy_clip)
