"""Slow references of the methods, from the formulas: one clip, one token, one number after the other."""
import itertools
import math

import heads
import probe
import run

import numpy as np
import torch


def random(*shape, seed=0):
    """Gaussian numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def shake(model):
    """Move all parameters a little: the teacher is then another than the student, and no bias is zero."""
    for number, p in enumerate(model.parameters()):
        p.add_(0.1 * random(*p.shape, seed=number))
    return model


# ---- a transformer ---------------------------------------------------------------------------------------

def layer_norm(x, norm=None, eps=1e-6):
    variance = x.var(-1, keepdim=True, unbiased=False)
    x = (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt()
    return x if norm is None else x * norm.weight + norm.bias


def linear(layer, x):
    """A linear map or a convolution of one patch."""
    return layer.weight.flatten(1) @ x.flatten() + layer.bias


def slow_mlp(module, x):
    """Linear maps with GELU between them."""
    first, *rest = [layer for layer in module if isinstance(layer, torch.nn.Linear)]
    x = linear(first, x)
    for layer in rest:
        x = linear(layer, 0.5 * x * (1 + torch.erf(x / math.sqrt(2))))
    return x


def slow_sincos(grid, dim):
    """(N, dim): of each axis the sines, then the cosines of index / 10000^(k / pairs); zeros at the end."""
    pairs = dim // (2 * len(grid))
    rows = []
    for place in itertools.product(*map(range, grid)):
        row = []
        for index in place:
            angles = [index / 10000 ** (k / pairs) for k in range(pairs)]
            row += [math.sin(a) for a in angles]
            row += [math.cos(a) for a in angles]
        rows.append(row + [0.0] * (dim - len(row)))
    return torch.tensor(rows)


def slow_positions(positions):
    """(N, D): learned, that of the first axis plus that of the others; or fixed."""
    first, *rest = positions.grid
    if positions.kind == "sincos":
        return slow_sincos(positions.grid, positions.fixed.shape[1])
    places = itertools.product(range(first), range(math.prod(rest)))
    return torch.stack([positions.first[i, 0] + positions.rest[0, j] for i, j in places])


def cut(x, place, sides):
    """The patch at a place of the grid: (C, *sides)"""
    window = [slice(p * side, (p + 1) * side) for p, side in zip(place, sides)]
    return x[(slice(None), *window)]


def patch_tokens(vit, clip):
    """The tokens (N, D) before the first block of one clip {modality: (C, ...)}, patch by patch: linear map,
    position, modality; those of the video first."""
    tokens = []
    for number, m in enumerate(("video", "audio")):
        if m not in clip:
            continue
        modality = 0 if vit.modality is None else vit.modality[number, 0]
        places = itertools.product(*map(range, vit.grids[m]))
        stem = vit.stems[m]
        for place, position in zip(places, slow_positions(stem["positions"])):
            tokens.append(linear(stem["patches"], cut(clip[m], place, vit.patch[m])) + position + modality)
    return torch.stack(tokens)


def slow_levels(vit, tokens, layers=None):
    """One clip's tokens (N, D) through the blocks: what each of `layers` says through its own norm (None: the
    last)."""
    last = len(vit.blocks) - 1
    levels = []
    for number, block in enumerate(vit.blocks):
        tokens = block(tokens[None])[0]
        if number in (layers or [last]):
            levels.append(layer_norm(tokens, vit.norm_out if number == last else vit.norms[str(number)]))
    return levels


def narrow(predictor, visible, hidden):
    """The transformer of a predictor on rows of width P: predictions (M, D) at the hidden ones."""
    x = torch.stack([*visible, *hidden])
    for block in predictor.blocks:
        x = block(x[None])[0]
    x = layer_norm(x[len(visible):], predictor.norm)
    return torch.stack([linear(predictor.head, row) for row in x])


def count_parameters(model):
    """{name of a part: how many numbers it has}"""
    counts = {}
    for name, part in model.named_children():
        counts[name] = sum(p.numel() for p in part.parameters())
    return counts


def block_parameters(dim, mlp):
    """How many numbers a block has: two norms, queries, keys and values, projection, MLP."""
    return 4 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * mlp + (mlp + 1) * dim


# ---- losses and masks ------------------------------------------------------------------------------------

def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def slow_distance(prediction, target, kind="l1"):
    """The mean of the distances of (M, D), one number after the other; cosine: one row after the other."""
    total = []
    for p, t in zip(prediction.tolist(), target.tolist()):
        if kind == "cosine":
            length = math.sqrt(dot(p, p) * dot(t, t))
            total.append(1 - dot(p, t) / length)
            continue
        for a, b in zip(p, t):
            d = abs(a - b)
            smooth = d * d / 2 if d < 1 else d - 0.5
            total.append({"l1": d, "l2": d * d, "smooth_l1": smooth}[kind])
    return math.fsum(total) / len(total)


def maps(index, grids):
    """Indices (B, K) of tokens, those of the first grid first -> {name of the grid: (B, *grid) bool}."""
    sizes = [math.prod(grid) for grid in grids.values()]
    flat = np.zeros((len(index), sum(sizes)), bool)
    np.put_along_axis(flat, index.numpy(), True, 1)
    parts = np.split(flat, np.cumsum(sizes)[:-1], 1)
    return {name: part.reshape(-1, *grid) for (name, grid), part in zip(grids.items(), parts)}


def placements(grid, size):
    """Each place of a block: (places, rows, columns) bool."""
    out = np.zeros((grid[0] - size[0] + 1, grid[1] - size[1] + 1, *grid), bool)
    for top, left in np.ndindex(out.shape[:2]):
        out[top, left, top:top + size[0], left:left + size[1]] = True
    return out.reshape(-1, *grid)


def is_uniform(x, low, high):
    """Kolmogorov and Smirnov: the distance from U[low, high] is one that 999 of 1,000 samples stay under."""
    x = (np.sort(np.ravel(x)) - low) / (high - low)
    return np.abs(x - (np.arange(len(x)) + 0.5) / len(x)).max() < 2 / math.sqrt(len(x))


# ---- the mel ---------------------------------------------------------------------------------------------

def mel_filters(inputs):
    """(F, n_fft / 2 + 1): triangles of height 1, their corners evenly spread on 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + inputs.sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, inputs.n_mels + 2) / 2595) - 1)
    low = corners[:-2, None]
    centre = corners[1:-1, None]
    high = corners[2:, None]
    f = np.arange(inputs.n_fft // 2 + 1) * inputs.sample_rate / inputs.n_fft
    return np.clip(np.minimum((f - low) / (centre - low), (high - f) / (high - centre)), 0, None)


def mel_power(wave, inputs):
    """(F, T) float64: frames centred on multiples of the hop, a window in the middle, |DFT| squared."""
    mean = {"hann": 0.5, "hamming": 0.54}[inputs.window]
    window = mean - (1 - mean) * np.cos(2 * np.pi * np.arange(inputs.win_length) / inputs.win_length)
    window = np.pad(window, (inputs.n_fft - inputs.win_length) // 2)
    padded = np.pad(np.asarray(wave, np.float64), inputs.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, inputs.n_fft)[::inputs.hop]
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2                   # (T, n_fft / 2 + 1)
    return mel_filters(inputs) @ power.T


# ---- small models, runs and calls ------------------------------------------------------------------------

SMALL = dict(                                          # grids of (2, 4, 4) and (3, 5)
    size="nano", seconds=0.8, video_seconds=0.8, frames=4, stride=2, image=16, tubelet=(2, 4, 4),
    n_mels=12, columns=20, mel_patch=(4, 4), audio_block=(2, 3), levels=3, pred_dim=32, pred_depth=2)


def recipe_of(script, *flags):
    """The paper's recipe with some flags."""
    return script.get_args(["--data", "audioset", "--data-dir", "x", *map(str, flags)])[1]


def small_model(script, *flags):
    """(a small model whose teacher has other weights than its student, its recipe)"""
    recipe = recipe_of(script, *flags)
    recipe |= {name: value for name, value in SMALL.items() if name in recipe}
    torch.manual_seed(0)
    return shake(script.make_model(recipe, script.make_inputs(recipe))), recipe


def small_batch(count):
    return {"video": random(count, 3, 4, 16, 16), "audio": random(count, 1, 12, 20, seed=100)}


def record(patch, owner, name):
    """[(arguments, result)] of all calls of a function from now on."""
    calls = []
    real = getattr(owner, name)

    def spy(*args, **more):
        calls.append((args, real(*args, **more)))
        return calls[-1][1]

    patch.setattr(owner, name, spy)
    return calls


def train(script, toy, out, *flags):
    """A small run on the training clips of the toy world as a folder: without the table at the end."""
    where = f"--data folder --data-dir {toy}/train --out {out} --device cpu --workers 0 --log-every 1"
    script.main([*where.split(), *"--recipe toy --size nano --batch-size 4".split(), *map(str, flags)])


def quicken(patch, script):
    """The statistics of the mel over four clips, and no curves."""
    patch.setitem(script.RECIPE, "stats_clips", (4, 4, ""))
    patch.setattr(run, "draw_curves", lambda *args: None)


def quicken_table(patch, draws=1):
    """The table at the end of a toy run: so many draws of few labels, and regressions of two strengths."""
    patch.setattr(probe, "DRAWS", draws)
    patch.setattr(heads, "STRENGTHS", (1.0, 100.0))


def single_steps(patch, script, loss, steps, toy, out, *flags):
    """These steps alone of a run, with large gradients: for each its row of the log, (rate, decay) of the
    matrices and of the rest, and the norm of the gradient that the optimiser is given."""
    found = []
    real = torch.optim.AdamW.step
    plain = getattr(script, loss)

    def spy(optimizer):
        groups = optimizer.param_groups
        grads = []
        for group in groups:
            grads += [p.grad.norm() for p in group["params"]]
        rates = [(group["lr"], group["weight_decay"]) for group in groups]
        found.append((*rates, torch.stack(grads).norm().item()))
        return real(optimizer)

    patch.setattr(torch.optim.AdamW, "step", spy)
    patch.setattr(run.Run, "steps", lambda self: (self.fetch() or step for step in steps))
    patch.setattr(script, loss, lambda *args: 1e4 * plain(*args))
    train(script, toy, out, *flags)
    rows = run.read_log(out)
    assert [row["step"] for row in rows] == list(steps)
    return [(row, *step) for row, step in zip(rows, found, strict=True)]
