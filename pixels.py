"""What a predictor imagines of the patches that it does not see, as a picture.

    python pixels.py --ckpt RUN --data toy
    python pixels.py --ckpt RUN --data toy --decode apart
    python pixels.py --ckpt RUN --data toy --baseline untrained
    python pixels.py --ckpt RUN --data SET --data-dir FOLDER --modality video

Trains a decoder from what the context encoder says of the visible patches, and the predictor of the hidden
ones, to the patches themselves: RUN/pixels-DATA.png draws held-out clips, and a row in RUN/probe.jsonl has
the squared error beside that of the mean image and of a copy of the nearest visible patch. With --decode
apart a hidden patch is decoded from predictions alone: else the decoder fills it in by itself. RUN is of a
method that predicts hidden patches. RUN/pixels-DATA/log.jsonl has the decoder's losses, which `visualize.py
curves RUN/pixels-DATA` draws.
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import collections
import functools
import importlib.util
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import common
import data
import features
import probe
import retrieval
import run
from common import UserError, main_guard
from features import MODALITIES


# ----------------------------------------------------------------------------------------------------------
# Patches and their pixels
# ----------------------------------------------------------------------------------------------------------

def patchify(x, patch):
    """(B, C, *shape) -> (B, N, C prod(patch)): patches in the order of the encoder's tokens, the pixels of
    each in the order of its convolution's weights; what is left over at the end is cut off."""
    for axis, side in enumerate(patch):
        x = x.unfold(2 + axis, side, side)
    x = x.movedim(1, 1 + len(patch))                                                # (B, *grid, C, *patch)
    return x.flatten(1, len(patch)).flatten(2)


def unpatchify(x, grid, patch):
    """The inverse: (B, N, C prod(patch)) -> (B, C, *shape), without what was cut off."""
    axes = len(grid)
    x = x.unflatten(1, grid).unflatten(-1, (-1, *patch))                            # (B, *grid, C, *patch)
    x = x.movedim(1 + axes, 1)                                                      # (B, C, *grid, *patch)
    for axis in range(2, 2 + axes):                     # each side of a patch behind the axis that it cuts
        x = x.movedim(2 + axes, axis + 1).flatten(axis, axis + 1)
    return x


# ----------------------------------------------------------------------------------------------------------
# What the model says of each patch
# ----------------------------------------------------------------------------------------------------------

def choose_inputs(model, modalities):
    """The names of the model's inputs that some modalities are: the one that has just these, or those that
    have them together. UserError where the model was not trained on such an input."""
    asked = set(modalities)
    names = []
    covered = set()
    for name, keys in model.inputs.items():
        if set(keys) == asked:
            return [name]
        if set(keys) <= asked:
            names.append(name)
            covered.update(keys)
    if covered != asked:
        raise UserError(f"--modality: this run's predictor was not trained on {' and '.join(modalities)}, "
                        f"only on the inputs {', '.join(model.inputs)}; give another --modality")
    return names


def assemble(h, context, prediction, target):
    """Tokens in the order of their grid, h (B, C, D) at context (B, C) and prediction (B, M, D) at target (B,
    M), which together are all of them -> (B, C + M, D), and which are of target, (B, C + M) bool."""
    order = torch.cat([context, target], 1).argsort(1)  # where each token of the grid stands
    tokens = torch.cat([h.float(), prediction.float()], 1)
    return common.gather(tokens, order), order >= context.shape[1]


@torch.no_grad()
def imagine(model, masks, clips, number):
    """What is decoded. clips: {"video": (B, 3, T, H, W), "audio": (B, 1, F, T)}, normalised, or one of them;
    masks: of the method's draw_masks, of which the mask set number `number` is taken, round and round ->
    tokens (B, N, D), the context encoder's where a patch is visible and the predictor's where it is hidden,
    and which are hidden, (B, N) bool; video's first. Hidden is all that the context lacks, which may be more
    than a method's targets."""
    s = number % len(masks)
    vit = model.context_encoder
    device = next(iter(clips.values())).device
    mask_set = {}
    for name in choose_inputs(model, tuple(clips)):
        context = masks[s][name][0]                                                 # (B, C)
        total = sum(vit.num(m) for m in model.inputs[name])
        lacks = torch.ones(len(context), total, dtype=torch.bool).scatter(1, context, False)
        target = lacks.nonzero()[:, 1].view(len(context), -1)                       # (B, M), in order
        mask_set[name] = (context.to(device), target.to(device))
    h = model.see(vit.embed(**clips), mask_set)                                     # (B, C, D)
    predictions = model.predictor(h, mask_set, s)
    parts = h.split([context.shape[1] for context, _ in mask_set.values()], 1)
    tokens = []
    hidden = []
    for (name, (context, target)), part in zip(mask_set.items(), parts):
        x, which = assemble(part, context, predictions[name], target)
        tokens.append(x)
        hidden.append(which)
    return torch.cat(tokens, 1), torch.cat(hidden, 1)


def restore(content, untrained=False):
    """(the model of a checkpoint's content, frozen, its script's draw_masks). untrained: as the run began."""
    name = content["method"]["name"]
    script = importlib.import_module(name) if importlib.util.find_spec(name) else None
    if not hasattr(script, "draw_masks"):
        raise UserError(f"{name} has no predictor of hidden patches, or {name}.py is not here; pixels.py "
                        "takes a checkpoint of a method that has one")
    common.seed_step(content["args"]["seed"], 0)
    model = script.make_model(content["recipe"], data.Inputs(**content["inputs"]))
    if not untrained:
        common.load_weights(model, content["model"], f"the checkpoint of {name}")
    return model.eval().requires_grad_(False), script.draw_masks


# ----------------------------------------------------------------------------------------------------------
# The decoder
# ----------------------------------------------------------------------------------------------------------

class PixelDecoder(nn.Module):
    """Tokens to pixels by linear projection, multi-head attention and query pooling, as in AVJEPA (Ge and
    Zhu, Sec. 5.6.3). (tokens (B, N, D), which are predicted (B, N) bool) -> {modality: (B, N of it, pixels of
    a patch)}. grids, patch: of each modality, as the tokens stand. apart: predicted tokens attend to
    predicted alone, visible to visible: else the decoder itself fills in what is hidden, and does so nearly
    as well from an untrained encoder."""
    def __init__(self, dim, grids, patch, width, apart=False):
        super().__init__()
        # unspecified: all but those three words. Here one layer, heads of 64 dimensions, pre-norm; a token
        # says whether it was predicted; one query for each patch, its place, which at the start looks at its
        # own token
        heads = max(1, width // 64)
        self.grids = grids
        self.patch = patch
        self.sizes = [math.prod(grid) for grid in grids.values()]
        self.apart = apart
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, width)
        self.state = nn.Parameter(torch.randn(2, width) * 0.02)
        places = []
        for grid in grids.values():
            e = common.Positions(grid, width, "sincos")()                           # (N of it, W)
            # each channel with mean 0 and std 1 over the grid: else most of them hardly tell one place from
            # the next
            places.append((e - e.mean(0)) / (e.std(0, correction=0) + 1e-4))
        self.register_buffer("place", torch.cat(places))
        self.modality = nn.Parameter(torch.randn(len(grids), width) * 0.02)
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.query = nn.Linear(width, width)
        to_query, to_key, _ = self.pool.in_proj_weight.data.chunk(3)
        for weight in (self.query.weight.data, to_query, to_key):
            nn.init.eye_(weight)
        self.pixels = nn.ModuleDict()
        for m, sides in patch.items():
            self.pixels[m] = nn.Linear(width, common.CHANNELS[m] * math.prod(sides))

    def bar(self, hidden):
        """What is added to the scores of the attention, (B heads, N, N): minus infinity between visible and
        hidden."""
        differ = hidden[:, :, None] != hidden[:, None]                              # (B, N, N)
        differ = differ.repeat_interleave(self.attend.num_heads, 0)
        # float: MultiheadAttention would make that of a bool, for each of the two
        return torch.zeros(differ.shape, device=hidden.device).masked_fill_(differ, -math.inf)

    def forward(self, tokens, hidden):
        modality = torch.cat([e.expand(size, -1) for e, size in zip(self.modality, self.sizes)])
        place = self.place + modality                                               # (N, W)
        x = self.project(self.norm(tokens)) + self.state[hidden.long()] + place     # (B, N, W)
        barred = self.bar(hidden) if self.apart else None
        y = self.norm1(x)
        x = x + self.attend(y, y, y, attn_mask=barred, need_weights=False)[0]
        x = self.norm2(x)
        query = self.query(place).expand(len(x), -1, -1)
        x = self.pool(query, x, x, attn_mask=barred, need_weights=False)[0]         # (B, N, W)
        parts = x.split(self.sizes, 1)
        return {m: self.pixels[m](part) for m, part in zip(self.pixels, parts)}


class Decoded(NamedTuple):
    """Of a modality of a batch of clips, as patches."""
    pixels: torch.Tensor                # (B, N, P) of the decoder
    truth: torch.Tensor                 # (B, N, P)
    hidden: torch.Tensor                # (B, N) bool
    has: torch.Tensor                   # (B,) bool: which clips have it


def decode_batch(model, draw_masks, recipe, decoder, seed, process, batch, number):
    """{modality: Decoded} of a batch of a loader, under the masks of (seed, number)."""
    batch = data.to_device(batch, process.device)
    clips = {m: batch[m] for m in decoder.grids}
    masks = draw_masks(seed, number, range(len(batch["index"])), model.context_encoder.grids, recipe)
    with process.autocast():
        tokens, hidden = imagine(model, masks, clips, number)
    retrieval.check_finite(tokens, [f"clip {i} of the set" for i in batch["index"].tolist()])
    pixels = decoder(tokens.float(), hidden)
    decoded = {}
    for m, part in zip(decoder.grids, hidden.split(decoder.sizes, 1)):
        truth = patchify(batch[m], decoder.patch[m])
        has = batch[f"has_{m}"].to(process.device)
        decoded[m] = Decoded(pixels[m], truth, part, has)
    return decoded


def random_view(rng, duration, inputs, keys):
    """A view at a random place, with the test's centre crop."""
    return data.place_views([rng.uniform()], inputs, duration, "video" in keys, "audio" in keys)


def train_decoder(decode, parameters, batches, steps, lr, troubles, log=None):
    """Train on the squared error of all patches, visible and hidden alike. decode(batch, step): {modality:
    Decoded}; log: a run.Log. Returns the mean image of the clips, {modality: (N, P)}."""
    # unspecified: loss and schedule; AdamW without weight decay, cosine to 0, the mean over the modalities
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    total = collections.Counter()
    count = collections.Counter()
    for step, batch in enumerate(tqdm(batches, desc="pixels", unit="step", total=steps)):
        troubles.add(batch)
        losses = []
        shown = {}                                      # of what the batch has
        for m, (pixels, truth, _, has) in decode(batch, step).items():
            # on the CPU: MPS has no float64
            total[m] = total[m] + truth[has].sum(0).cpu().double()                  # (N, P)
            count[m] += int(has.sum())
            error = (pixels - truth).square().mean((1, 2))                          # (B,)
            losses.append((error * has).sum() / has.sum().clamp_min(1))
            if has.any():
                shown[f"loss/{m}"] = losses[-1].item()
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        optimizer.param_groups[0]["lr"] = common.cosine(step, steps, lr, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if log:
            log.add(step, {"loss": loss.item(), **shown}, step + 1 == steps)
    check_all_seen(count, "training")
    return {m: (total[m] / count[m]).float() for m in total}


def check_all_seen(count, split):
    absent = [m for m, number in count.items() if not number]
    if absent:
        raise UserError(f"no {split} clip has {' or '.join(absent)}; give another --modality")


# ----------------------------------------------------------------------------------------------------------
# How far it is off, and two baselines
# ----------------------------------------------------------------------------------------------------------

def nearest_visible(x, hidden, grid):
    """Patches x (B, N, P) of a grid, each replaced by the visible one that is nearest, by the distance in
    patches; of several the first. hidden (B, N) bool."""
    place = torch.tensor(list(np.ndindex(*grid)), device=x.device)                  # (N, axes)
    distance = (place[:, None] - place).square().sum(2).float()                     # (N, N)
    copies = []
    for patches, barred in zip(x, hidden):
        nearest = distance.masked_fill(barred, math.inf).argmin(1)                  # (N,)
        copies.append(patches[nearest])
    return torch.stack(copies)


GUESSES = {"hidden": ("decoder", "mean", "nearest"), "visible": ("decoder", "mean")}


def guesses_of(clips, mean, grid):
    """What may stand in the place of each patch of a Decoded: {name: (B, N, P), or (N, P) for all clips}."""
    nearest = nearest_visible(clips.truth, clips.hidden, grid)
    return {"decoder": clips.pixels, "mean": mean.to(clips.truth), "nearest": nearest}


@torch.no_grad()
def pixel_errors(decode, batches, mean, grids, step):
    """Mean squared errors {"hidden" or "visible": {modality: {"decoder", "mean", "nearest": value}}},
    {modality: number of clips that have it}, and the indices of those that have all. Each batch comes under
    two masks, those of an even and of an odd step from `step` on: a method's mask sets, which hide different
    shares, then count alike."""
    total = collections.Counter()
    patches = collections.Counter()
    count = collections.Counter()
    whole = []
    for number, batch in enumerate(batches):
        has_all = torch.stack([batch[f"has_{m}"] for m in grids]).all(0)            # (B,)
        whole += batch["index"][has_all].tolist()
        for m in grids:
            count[m] += int(batch[f"has_{m}"].sum())
        for drawn in (step + 2 * number, step + 2 * number + 1):
            for m, clips in decode(batch, drawn).items():
                here = clips.has[:, None]
                where = {"hidden": clips.hidden & here, "visible": ~clips.hidden & here}        # (B, N)
                for name, guess in guesses_of(clips, mean[m], grids[m]).items():
                    error = (guess - clips.truth).square().mean(2)                  # (B, N)
                    for part, chosen in where.items():
                        total[part, m, name] += error[chosen].sum().item()
                        patches[part, m, name] += int(chosen.sum())
    check_all_seen(count, "test")
    errors = {}
    for part, names in GUESSES.items():
        errors[part] = {}
        for m in grids:
            errors[part][m] = {name: total[part, m, name] / max(1, patches[part, m, name]) for name in names}
            if not math.isfinite(sum(errors[part][m].values())):
                raise UserError(f"the errors of the {part} patches of {m} are not finite; lower --lr")
    return errors, count, whole


# ----------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------

def draw_pixels(clips, inputs, decoder, title):
    """A figure: of each of the clips, (path, {modality: Decoded} of it alone), what is given, what is
    decoded, and the truth, in frames over time (at most 8) and as a spectrogram. What is hidden is
    striped."""
    from matplotlib.figure import Figure
    widths = []
    for m in decoder.grids:
        widths.append(8.4 if m == "video" or len(decoder.grids) == 1 else 5.6)
    size = (0.7 + sum(widths), 0.5 + 0.2 * title.count("\n") + 3.7 * len(clips))
    fig = Figure(figsize=size, layout="constrained")
    fig.suptitle(title, fontsize=10)
    blocks = np.atleast_1d(fig.subfigures(len(clips), 1))
    for block, (path, decoded) in zip(blocks, clips):
        block.suptitle(path.encode(errors="replace").decode(), fontsize=9, parse_math=False)
        axes = block.subplots(3, len(widths), squeeze=False, width_ratios=widths)
        for place, (m, clip) in enumerate(decoded.items()):
            draw_column(axes[:, place], m, clip, inputs, decoder)
            if place == 0:
                for ax, name in zip(axes[:, 0], ("given", "decoded", "truth")):
                    ax.set_ylabel("\n".join([name, ax.get_ylabel()]).strip(), fontsize=8)
    return fig


def draw_column(axes, m, clip, inputs, decoder):
    """Three axes of one modality of a clip: given, decoded, truth."""
    def to_array(x):
        """(1, N, P) -> ([T,] H, W, C)"""
        image = unpatchify(x.float().cpu(), decoder.grids[m], decoder.patch[m])[0]
        return image.movedim(0, -1).numpy()

    truth = to_array(clip.truth)
    hidden = to_array(clip.hidden[..., None].expand_as(clip.truth))[..., :1] > 0
    low, high = np.percentile(truth, (1, 99))
    decoded = to_image(to_array(clip.pixels), m, low, high)                         # ([T,] H, W, 3)
    truth = to_image(truth, m, low, high)
    height, width = truth.shape[-3:-1]
    diagonal = np.add.outer(np.arange(height), np.arange(width)) // max(1, height // 16)
    stripes = np.where(diagonal % 2, 0.55, 0.85)[..., None]                         # (H, W, 1)
    given = np.where(hidden, stripes, truth)
    for ax, image in zip(axes, (given, decoded, truth)):
        if m == "video":
            draw_frames(ax, image, inputs)
        else:
            draw_mel(ax, image, inputs)
        ax.tick_params(labelsize=8, labelbottom=ax is axes[-1])
    clock = ""
    if inputs.frame_rate:                               # the clip's own may be another
        clock = f", at {inputs.frame_rate:g} frames a second"
    stream = "pictures" if m == "video" else "sound"
    axes[-1].set_xlabel(f"seconds of the {stream}{clock}", fontsize=8)


def to_image(x, m, low, high):
    """Normalised pixels (..., C) as colours (..., 3) in 0..1; of a mel those between low and high."""
    if m == "video":
        return (x * data.IMAGENET_STD + data.IMAGENET_MEAN).clip(0, 1)
    from matplotlib import colormaps, colors
    scale = colors.Normalize(low, high)
    return colormaps["magma"](scale(x[..., 0]))[..., :3].clip(0, 1)


def draw_frames(ax, video, inputs):
    """At most 8 frames of a video (T, H, W, 3), side by side over their time."""
    width = video.shape[2]
    gap = max(1, width // 16)
    shown = np.unique(np.linspace(0, len(video) - 1, 8).round().astype(int))
    frames = np.pad(video[shown], ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1)
    ax.imshow(np.concatenate(frames, 1))
    times = (shown + 0.5) * (inputs.video_seconds or inputs.seconds) / inputs.frames
    middles = np.arange(len(shown)) * (width + gap) + width / 2
    ax.set_xticks(middles, [f"{time:.2f}" for time in times])
    ax.set(yticks=[], frame_on=False)


def draw_mel(ax, mel, inputs):
    """A spectrogram (F, T, 3) over its time."""
    height, width = mel.shape[:2]
    columns = inputs.sample_rate / inputs.hop           # a second
    if inputs.interpolate:
        columns = inputs.mel_frames / inputs.seconds
    extent = (0, width / columns, 0, height)
    ax.imshow(mel, origin="lower", aspect="auto", interpolation="nearest", extent=extent)
    ax.set_ylabel("mel bin", fontsize=8)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=run.Help)
    add_data, add_run, add_method, _ = run.flag_groups(parser)
    add_data("--data", required=True, help=", ".join(data.SETS))
    add_data("--data-dir", help="folder with the clips and the csv files (default: none; toys: in cache/)")
    add_run("--ckpt", required=True, help="folder of a run, or its latest.pt")
    add_run("--seed", type=int, default=0, help="of the decoder's start, views, masks and the clips drawn")
    add_method("--decode", choices=("together", "apart"), default="together",
        help="each patch from all tokens (as in the paper), or the hidden ones from predicted tokens alone, "
        "so that the decoder cannot fill them in by itself")
    add_method("--modality", choices=tuple(MODALITIES),
        help="default: all that the encoder takes and the set has")
    add_method("--baseline", choices=("untrained",),
        help="instead of the trained model: as it was initialised; default: none")
    add_method("--epochs", type=int, help="default: 1,000 steps, whatever the set")
    add_method("--batch-size", type=int, help="default: 16, or all clips of a smaller set")
    add_method("--lr", type=float, default=1e-3, help="of the decoder")
    args = parser.parse_args(argv)
    ranges = ("epochs", "batch_size", "lr", "workers", "seed")
    probe.check_ranges(args, {name: probe.RANGES[name] for name in ranges})
    return args


def list_splits(args):
    """The training and the test clips; of a set with folds the first one is the test."""
    train = data.list_clips(args.data, args.data_dir, "train")
    test = data.list_clips(args.data, args.data_dir, "test")
    if train.fold is not None:                          # unspecified: which fold
        inner, outer = probe.rounds(train.fold)[0]
        test = train.subset(outer)
        train = train.subset(inner)
    elif np.array_equal(train.files, test.files):
        raise UserError(f"--data {args.data}: no clip is held out, all are for training; put them into two "
                        "sub-folders, train and test")
    return train, test


def fit_decoder(decoder, decode, train, inputs, steps, batch_size, args, process, workers, log):
    """Train a decoder on the clips of a listing; returns their mean image."""
    plan = functools.partial(random_view, inputs=inputs, keys=tuple(decoder.grids))
    clips = data.Clips(train, inputs, plan, args.seed)
    order = data.Batches(len(train), batch_size, args.seed, 0, steps)
    loader = data.train_loader(clips, order, workers, process.device.type == "cuda")
    troubles = data.Troubles(len(train), 1.0)
    return train_decoder(decode, decoder.parameters(), loader, steps, args.lr, troubles, log)


def read_middles(listing, inputs, keys, batch, workers, label):
    """The batches of a listing's clips, one view in the middle of each."""
    plan = features.even_plan(1, inputs, keys)
    return data.eval_batches(listing, inputs, plan, batch, workers, data.Troubles(len(listing)), label)


@torch.no_grad()
def save_picture(file, listing, decode, decoder, inputs, workers, title):
    """Draw the clips of a listing into a file."""
    shown = []
    batches = read_middles(listing, inputs, tuple(decoder.grids), 1, workers, "picture")
    for number, batch in enumerate(batches):
        shown.append((listing.file(number), decode(batch, number)))
    fig = draw_pixels(shown, inputs, decoder, title)
    advice = "the row of probe.jsonl is whole"
    features.write_file(file, lambda f: fig.savefig(f, format="png", dpi=100), advice)


def main(argv=None):
    args = get_args(argv)
    began = time.time()
    process, workers = run.one_process(args, "pixels.py")
    content = common.load_checkpoint(args.ckpt)
    model, draw_masks = restore(content, args.baseline == "untrained")
    vit = model.to(process.device).context_encoder
    inputs = data.Inputs(**content["inputs"])
    modality, inputs = features.choose_modality(args.modality, vit, inputs, content["method"], args.data)
    keys = MODALITIES[modality]
    choose_inputs(model, keys)
    train, test = list_splits(args)
    print(f"{data.describe(train)} (train)\n{data.describe(test)} (test)")

    # differs: the authors take one clip and two masks at a time; here 16 clips, for 1,000 steps
    batch_size = args.batch_size or min(16, len(train))
    steps = args.epochs * max(1, len(train) // batch_size) if args.epochs else 1000
    torch.manual_seed(args.seed)
    grids = {m: vit.grids[m] for m in keys}
    patch = {m: vit.patch[m] for m in keys}
    decoder = PixelDecoder(model.predictor.head.out_features, grids, patch, 256, args.decode == "apart")
    decoder = decoder.to(process.device)
    recipe = content["recipe"]
    decode = functools.partial(decode_batch, model, draw_masks, recipe, decoder, args.seed, process)
    file = name_picture(args, modality if len(keys) < len(vit.grids) else None)
    log = run.Log(file.with_suffix(""))
    mean = fit_decoder(decoder, decode, train, inputs, steps, batch_size, args, process, workers, log)
    batches = read_middles(test, inputs, keys, batch_size, workers, "test")
    errors, count, whole = pixel_errors(decode, batches, mean, grids, steps)
    print_errors(errors, count)

    chosen = sorted(np.random.default_rng(args.seed).permutation(whole)[:4].tolist())
    run.add_row(args.ckpt, "probe.jsonl", {
        "data": args.data,
        "probe": "pixels",
        "modality": modality,
        "baseline": args.baseline,
        "decode": args.decode,
        **errors,
        "N": count,
        "left_out": len(test) - max(count.values()),
        "picture": file.name if chosen else None,
        "view_seconds": inputs.seconds,
        "steps": steps,
        "batch_size": batch_size,
        "lrs": [args.lr],
        "version": run.code_version(),
        "seed": args.seed,
        "ckpt": str(args.ckpt),
        "step": content["step"],
        "seconds": round(time.time() - began, 1)})
    if chosen:
        title = make_title(args, content, errors)
        save_picture(file, test.subset(chosen), decode, decoder, inputs, workers, title)
    print(f"{file if chosen else 'no picture, since no clip has all'} ({time.time() - began:.0f} s)")


def name_picture(args, alone):
    """The picture's path beside the checkpoint. alone: the modality, if not all that the encoder takes."""
    folder = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    parts = ["pixels", args.data]
    if alone:
        parts.append(alone)
    if args.decode == "apart":
        parts.append("apart")
    if args.baseline:
        parts.append("untrained")
    return folder / f"{'-'.join(parts)}.png"


def print_errors(errors, count):
    """A row for each modality on the screen."""
    heading = " " * 10
    for part, names in GUESSES.items():
        for name in names:
            column = f"{part}: {name}"
            heading += f"{column:>18s}"
    print(heading)
    for m, clips in count.items():
        line = f"{m:10s}"
        for part in errors.values():
            line += "".join(f"{value:18.4f}" for value in part[m].values())
        print(f"{line}    (N = {clips:,})")


def make_title(args, content, errors):
    state = "untrained" if args.baseline else f"step {content['step']:,}"
    title = f"{content['method']['name']}, {args.data}, {state}"
    if args.decode == "apart":
        title += ", hidden patches decoded from predictions alone"
    for m, e in errors["hidden"].items():
        title += (f"\n{m}, squared error where hidden: decoder {e['decoder']:.3f}, mean image "
                  f"{e['mean']:.3f}, nearest visible patch {e['nearest']:.3f}")
    return title


if __name__ == "__main__":
    main_guard(main)
