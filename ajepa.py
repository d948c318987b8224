"""A-JEPA: Joint-Embedding Predictive Architecture Can Listen (arXiv 2311.15830).

Blocks of time and frequency of a mel spectrogram are hidden. From the patches that stay visible, a
predictor says what an EMA teacher, which hears everything, represents at the hidden ones. Nothing is
reconstructed and there are no negatives.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python ajepa.py                                            # the sound of the toy clips, a laptop, minutes
    python ajepa.py --data folder --data-dir clips/ --recipe toy            # your own sounds, the small model
    python ajepa.py --data audioset-20k --data-dir audioset/ --accumulate 8  # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 ajepa.py --data audioset --data-dir audioset/
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        ajepa.py --data audioset --data-dir audioset/                        # the same line on each node
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import copy
import functools
import math
from dataclasses import replace

import common
import data
import probe
from common import Block, Positions, RunningMean, UserError, ViT, gather
from run import Run, make_parser, read_recipe, set_lr

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METHOD = dict(
    name="ajepa",
    title="A-JEPA",
    weights="context_encoder",     # evaluated; Sec. 8: or the teacher (probe.py --encoder target)
    protocol={
        # of probe.py; unspecified: all the rest of it, for which probe.PROTOCOL stands
        # name        frozen                     fine-tuned  source
        "linear_lr":  ((1e-3, 1e-2, 1e-1, 1.0), (1e-3,),    "Sec. 8: fine-tuning, of the head"),
        "encoder_lr": (0.0,                      1e-5,       "Sec. 8"),
    },
)

# Sources. Sec.: that section of the published description of A-JEPA that we follow, for want of code;
# digest: second-hand, a published digest of the paper itself, where it says something else.
RECIPE = {
    # name           paper             toy             source of the paper's value
    "size":         ("base",          "toy",          "Sec. 4.1: ViT-B, 12 x 768, 12 heads, MLP 3072"),
    "seconds":      (10.0,            3.84,           "Sec. 4.6: length of a clip, padded or cropped"),
    "n_fft":        (512,             512,            "Sec. 4.6: 16 kHz, window of 400; log(mel + 1e-6)"),
    "hop":          (160,             160,            "Sec. 4.6: samples from one mel frame to the next"),
    "n_mels":       (128,             64,             "Sec. 4.6"),
    "columns":      (1024,            384,            "Sec. 7: 10 s are 1,001 frames, padded to 1,024"),
    # unspecified: the lowest filter is empty, its std is 0
    "std_floor":    (0.1,             0.1,            ""),
    # differs: a sample of the training set, drawn with seed 0
    "stats_clips":  (10000,           512,            ""),
    "mel_patch":    ((16, 16),        (32, 16),       "Sec. 4.1: 8 x 64 = 512 tokens (toy: 2 x 24 = 48)"),
    # unspecified: frequency + time
    "pos":          ("learned",       "learned",      "Sec. 4.1 (digest: sincos)"),
    "masking":      ("multiblock",    "multiblock",   "Sec. 4.4: 4 blocks a clip"),
    "block_scale":  ((0.15, 0.2),     (0.15, 0.2),    "Sec. 4.4: area of a block, of the grid"),
    # unspecified: see aspect_range
    "block_aspect": ((0.75, 1.5),     (0.75, 1.5),    "Sec. 4.4: time over frequency"),
    "hidden":       ((0.6, 0.75),     (0.6, 0.75),    "Sec. 4.4: share that the union of the blocks hides"),
    "pred_depth":   (6,               3,              "Sec. 4.3 (digest: 16); 11 M, not its ~22 M weights"),
    "pred_dim":     (384,             64,             "Sec. 4.3: 12 heads of 32 dimensions (digest: 512)"),
    "loss":         ("smooth_l1",     "smooth_l1",    "Sec. 4.5: beta 1 (digest: l2)"),
    "tau":          ((0.996, 0.9999), (0.996, 0.999), "Sec. 4.2: EMA momentum, on a cosine"),
    "batch_size":   (256,             64,             "Sec. 5: effective, across GPUs"),
    "epochs":       (400,             None,           "Sec. 5: 300 to 400"),
    "steps":        (None,            900,            "by the epochs"),
    # unspecified: to 0, not scaled by the batch
    "lr":           (1.5e-4,          1e-3,           "Sec. 5: peak; cosine"),
    "warmup":       (0.1,             0.2,            "Sec. 5: 40 epochs of 400, as a share of the steps"),
    "betas":        ((0.9, 0.95),     (0.9, 0.95),    "Sec. 5: AdamW"),
    "weight_decay": (0.05,            0.05,           "Sec. 5"),    # unspecified: on matrices only
}
MASKINGS = ("multiblock", "block", "random", "time", "freq", "curriculum")


def get_args(argv=None):
    parser, add = make_parser(__doc__, METHOD["name"])
    add("--masking", choices=MASKINGS, help="4 blocks, a single one, random patches, strips of time or of "
        "frequency, or the paper's curriculum from random to time-frequency masks (default: the recipe's)")
    add("--mask-ratio", type=float,
        help="share of the patches that is hidden (default: drawn from .6 to .75 for each step)")
    add("--block-aspect", choices=("grid", "patch"),
        help="aspect of a block relative to the grid (default), or counted in patches")
    add("--tf-removes", choices=("time", "freq", "both"),
        help="curriculum: what the context loses beside the targets (default: both)")
    add("--pred-depth", type=int, help="layers of the predictor (default: the recipe's)")
    add("--pred-dim", type=int, help="width of the predictor, in heads of 32 (default: the recipe's)")
    add("--loss", choices=("smooth_l1", "l2", "l1", "cosine"),
        help="distance of prediction and target (default: the recipe's)")
    add("--tau", type=float, nargs=2, metavar=("START", "END"),
        help="momentum of the teacher at the start and the end of the run (default: the recipe's)")
    add("--pos", choices=("learned", "sincos"),
        help="positions of the encoder and the predictor (default: the recipe's)")
    args = parser.parse_args(argv)
    data.require(args.data, ("audio",), "mjepa.py --terms separate-video trains on pictures alone")
    flags = ("masking", "pred_depth", "pred_dim", "loss", "tau", "pos")
    recipe = read_recipe(args, METHOD["name"], RECIPE, flags, ("audio",))
    common.check_range("--pred-depth", recipe["pred_depth"], 1, 1000)
    common.check_range("--pred-dim", recipe["pred_dim"], 32, 10 ** 5)
    if recipe["pred_dim"] % 32:
        raise UserError(f"--pred-dim {recipe['pred_dim']}: not a multiple of 32, the width of a head")
    if args.mask_ratio is not None:
        common.check_range("--mask-ratio", args.mask_ratio, 0.01, 0.99)
        if recipe["masking"] == "curriculum":
            raise UserError("--mask-ratio: the curriculum has ratios of its own; give another --masking")
        recipe["hidden"] = (args.mask_ratio, args.mask_ratio)
    lengths = list(zip(RECIPE["seconds"][:2], RECIPE["columns"][:2]))
    if (recipe["seconds"], recipe["columns"]) not in lengths:              # --seconds, of another length
        recipe["columns"] = None                       # as many as it gives, filled up to whole patches
    if args.tf_removes and recipe["masking"] != "curriculum":
        raise UserError("--tf-removes has no effect without --masking curriculum")
    if args.block_aspect and recipe["masking"] in ("random", "time", "freq"):
        raise UserError(f"--block-aspect has no effect on --masking {recipe['masking']}, which has no blocks")
    recipe["aspect_of"] = args.block_aspect or "grid"
    recipe["tf_removes"] = args.tf_removes or "both"
    return args, recipe


# ----------------------------------------------------------------------------------------------------------
# Views and masks
# ----------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds):
    """One view: the sound of the clip, a random stretch if it is longer. No augmentation (Sec. 7), but
    for --recipe toy (datasets/augment.py)."""
    # unspecified: what is cut off a long clip (here random), and what fills up a short one (digital
    # silence, before the log); a clip without sound is silence, and counted in the log
    start = rng.uniform(0, max(0.0, duration - seconds))
    return [data.View(start, seconds, None, True)]


def aspect_range(grid, aspect, relative=True):
    """The range of a block's width over its height, in patches, of that of time over frequency."""
    # unspecified: an aspect counted in patches asks a grid of 8 rows for blocks 8 to 12 rows high: clamped,
    # they lose a third of their area; with the excess handed over to the width (--block-aspect patch), the
    # four become strips of time. Relative to the grid, rows = 8 sqrt(s / a) and columns = 64 sqrt(s a),
    # areas and aspects stay as drawn: blocks of about 3 x 28.
    rows, cols = grid
    return [a * (cols / rows if relative else 1) for a in aspect]


def block_sizes(rng, grid, masking, scale, aspect):
    """(height, width) of each block of one clip; height is frequency, width is time."""
    rows, cols = grid
    if masking == "block":
        return [common.block_size(rng, grid, scale, aspect)]
    if masking == "multiblock":
        return [common.block_size(rng, grid, scale, aspect) for _ in range(4)]
    if masking == "time":
        widths = [round(rng.uniform(*scale) * cols) for _ in range(4)]
        return [(rows, min(cols, max(1, width))) for width in widths]
    heights = [round(rng.uniform(*scale) * rows) for _ in range(4)]
    return [(min(rows, max(1, height)), cols) for height in heights]


def hide_blocks(rng, grid, masking, scale, aspect, low, high):
    """A mask whose blocks together hide `low` to `high` patches: (rows, columns) bool."""
    if masking == "random":
        return common.meet_count(rng, np.zeros(grid, bool), int(rng.integers(low, high + 1)))
    # unspecified: four blocks of .15 to .2 that overlap freely hide only 40 to 52 %. Here a block goes
    # where it overlaps the earlier ones least, and all are drawn anew until their union is in range; where
    # none of 50 draws is (one clip in 200, or an extreme --mask-ratio), the nearest. The middle is hidden
    # most (up to 99 %, free overlap: 94 %), the corners least (22 %, free: 4 %).
    best = None
    best_distance = math.inf
    for _ in range(50):
        mask = np.zeros(grid, bool)
        for size in block_sizes(rng, grid, masking, scale, aspect):
            # unspecified: how many strips; of the blocks' areas, at most four, as many as it takes
            if masking in ("time", "freq") and mask.sum() >= low:
                break
            mask |= common.block_apart(rng, mask, size)
        distance = max(low - mask.sum(), mask.sum() - high, 0)
        if distance < best_distance:
            best = mask
            best_distance = distance
        if distance == 0:
            break
    return best


def hide_curriculum(rng, grid, scale, aspect, time_frequency, tf_removes):
    """(targets, what the context lacks), each (rows, columns) bool: the paper's random block mask, or its
    time-frequency aware one."""
    number = 4
    if time_frequency:
        number = 3
        scale = (0.05, 0.075)
    for _ in range(1000):
        targets = np.zeros(grid, bool)
        for _ in range(number):
            targets |= common.random_block(rng, grid, common.block_size(rng, grid, scale, aspect))
        hidden = targets.copy()
        if time_frequency and tf_removes in ("time", "both"):
            hidden |= targets.any(0, keepdims=True)
        if time_frequency and tf_removes in ("freq", "both"):
            hidden |= targets.any(1, keepdims=True)
        if not hidden.all():
            return targets, hidden
    raise UserError(f"--masking curriculum: its masks leave no context on a grid of {grid[0]} x {grid[1]} "
                    "patches; raise --seconds, or give another --tf-removes")


def hide_curriculum_near(rng, count, near, *law):
    """The first of 50 draws of hide_curriculum(rng, *law) that hides `count` patches, `near` more or less;
    or the nearest."""
    best = None
    best_distance = math.inf
    for _ in range(50):
        targets, hidden = hide_curriculum(rng, *law)
        distance = abs(int(hidden.sum()) - count)
        if distance < best_distance:
            best = (targets, hidden)
            best_distance = distance
        if distance <= near:
            break
    return best


def count_range(total, hidden):
    """The fewest and the most patches of `total` that a share from hidden[0] to hidden[1] hides."""
    return math.ceil(hidden[0] * total - 1e-6), math.floor(hidden[1] * total + 1e-6)


def draw_masks(seed, step, places, grids, recipe, steps=None):
    """Which patches are visible and which are targets: [{"a": (context (B, C), target (B, M))}], indices. A
    pure function of (seed, step, place). places: of the clips in the step's batch over all processes. How
    many are hidden is drawn from (seed, step), the same for all clips; each meets it by single random
    patches. steps: of the run, which say where the curriculum stands; None: at its end."""
    grid = grids["audio"]
    masking = recipe["masking"]
    total = math.prod(grid)
    aspect = aspect_range(grid, recipe["block_aspect"], recipe["aspect_of"] == "grid")
    own = np.random.default_rng((seed, step, 0, 0))    # the step's own stream; the clips count from 1
    # unspecified: a clip's own blocks come within 2 % of the grid of the step's number, the single patches
    # do the rest
    near = 0 if masking == "random" else round(0.02 * total)
    if masking == "curriculum":
        # p = min(1, sqrt(s (1 - c0^2) / S) + c0^2), c0 = .01 (digest): one draw for all clips of a step
        progress = step / steps if steps else 1.0
        p = min(1.0, math.sqrt(progress * (1 - 0.01 ** 2)) + 0.01 ** 2)
        law = (grid, recipe["block_scale"], aspect, own.random() < p, recipe["tf_removes"])
        targets, hidden = hide_curriculum(own, *law)
        num_targets = int(targets.sum())
        num_hidden = int(hidden.sum())
    else:
        # unspecified: with another share of hidden patches the blocks grow or shrink with it
        growth = sum(recipe["hidden"]) / sum(RECIPE["hidden"][0])
        scale = recipe["hidden"] if masking == "block" else [s * growth for s in recipe["block_scale"]]
        law = (grid, masking, scale, aspect)
        low, high = count_range(total, recipe["hidden"])
        if recipe["hidden"][0] == recipe["hidden"][1]:                     # --mask-ratio
            num_hidden = round(recipe["hidden"][0] * total)
            low = 0
            high = total
        else:
            num_hidden = int(hide_blocks(own, *law, low, high).sum())
            num_hidden = min(max(low, num_hidden), max(low, high))
        num_hidden = num_targets = min(max(1, num_hidden), total - 1)
    contexts = []
    targets = []
    for place in places:
        rng = np.random.default_rng((seed, step, 0, 1 + place))
        if masking == "curriculum":
            drawn, lacks = hide_curriculum_near(rng, num_hidden, near, *law)
        else:
            drawn = lacks = hide_blocks(rng, *law, max(low, num_hidden - near), min(high, num_hidden + near))
        target = common.meet_count(rng, drawn, num_targets)
        hidden = common.meet_count(rng, lacks | target, num_hidden, keep=target)
        contexts.append(np.flatnonzero(~hidden))
        targets.append(np.flatnonzero(target))
    return [{"a": (torch.from_numpy(np.stack(contexts)), torch.from_numpy(np.stack(targets)))}]


def make_inputs(recipe):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin are measured later
    (Run.normalise)."""
    # unspecified: the window (Hann), the mel scale (HTK)
    inputs = data.Inputs(
        frames=0, seconds=recipe["seconds"], sample_rate=16000, n_fft=recipe["n_fft"], win_length=400,
        hop=recipe["hop"], n_mels=recipe["n_mels"], window="hann", log="ln", mel_mean=0.0, mel_std=1.0,
        columns=recipe["columns"])
    if inputs.columns is None:
        patch = recipe["mel_patch"][1]
        inputs = replace(inputs, columns=math.ceil(inputs.mel_frames / patch) * patch)
    return inputs


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same."""
    positions = {"learned": "factorised", "sincos": "sincos"}[recipe["pos"]]
    audio = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return dict(size=recipe["size"], audio=audio, positions=positions, checkpoint=checkpoint)


def make_model(recipe, inputs, checkpoint=False):
    config = encoder_config(recipe, inputs, checkpoint)
    return AJEPA(config, recipe["pred_dim"], recipe["pred_depth"], recipe["loss"])


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each target; heads of 32
    dimensions."""
    def __init__(self, dim, grid, width, depth, positions, checkpoint=False):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = Positions(grid, width, positions)
        blocks = [Block(width, width // 32, 4 * width, checkpoint=checkpoint) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, dim)
        self.apply(ViT.init_weights)

    def forward(self, h, masks, number=0):
        """h (B, C, D) at the patches that are visible -> {"a": predictions (B, M, D)} at the targets.
        masks: a mask set; number: which, there is but one."""
        context, target = masks["a"]
        e = self.positions().expand(len(h), -1, -1)                             # (B, N, P)
        m = self.mask_token + gather(e, target)                                 # (B, M, P)
        x = torch.cat([self.embed(h) + gather(e, context), m], 1)               # (B, C + M, P)
        x = self.norm(self.blocks(x))[:, context.shape[1]:]                     # (B, M, P)
        return {"a": self.head(x)}                                              # (B, M, D)


class AJEPA(nn.Module):
    """The context encoder, its EMA, the predictor, and the loss of a batch."""
    inputs = {"a": ("audio",)}

    def __init__(self, config, pred_dim, pred_depth, loss):
        super().__init__()
        self.parts = dict(encoder=config)              # what load_encoder builds again
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim = self.context_encoder.dim
        self.grids = self.context_encoder.grids
        self.predictor = Predictor(dim, self.grids["audio"], pred_dim, pred_depth, config["positions"],
                                   config["checkpoint"])
        self.loss = loss
        self.mean = RunningMean(dim)                   # what one knows without any context

    def see(self, tokens, masks):
        """The context encoder on what a mask set leaves visible of tokens (B, N, D) -> (B, C, D)."""
        return self.context_encoder(tokens=tokens, visible=masks["a"][0])

    def forward(self, batch, masks, weight, tick):
        """A batch of data.collate, its masks of draw_masks, its weight in the mean over the step -> (loss,
        what the log shows)."""
        mel = batch["audio"]                                                    # (B, 1, F, T)
        context, target = masks[0]["a"]                                         # (B, C), (B, M)
        # 1 context: the visible patches alone
        h = self.see(self.context_encoder.embed(audio=mel), masks[0])           # (B, C, D)
        # 2 target: the teacher hears everything; each target is layer-normed
        with torch.no_grad():
            z = self.target_encoder(audio=mel).float()                          # (B, N, D)
            y = F.layer_norm(gather(z, target), z.shape[-1:])                   # (B, M, D)
            self.mean.update(y.flatten(0, 1), tick)
        # 3 predict: at the hidden patches, from the context
        prediction = self.predictor(h, masks[0])["a"].float()                   # (B, M, D)
        # 4 loss
        loss = weight * prediction_loss(prediction, y, self.loss)
        nothing = weight * prediction_loss(self.mean.mean.expand_as(y), y, self.loss)
        kept = loss.new_tensor(weight * context.shape[1] / z.shape[1])
        shown = {"loss/a": loss.detach(), "know_nothing/a": nothing, "kept/a": kept, "embedding/a": z.mean(1)}
        # the online probe's: of what is visible, so lower than the probe at the end
        shown["clip/audio"] = h.detach().float().mean(1)                        # (B, D)
        return loss, shown


# ----------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, kind="smooth_l1"):
    """Mean over clips, patches and dimensions of the distance of prediction and target (B, M, D): smooth L1
    with beta 1 (Sec. 4.5), or what its table of losses compares with."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    distance = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss, "l1": F.l1_loss}[kind]
    return distance(prediction, target)


def learning_rate(step, recipe):
    """Linear warm-up, then a cosine to 0."""
    warmup = max(1, round(recipe["warmup"] * recipe["steps"]))
    return common.warmup_cosine(step, recipe["steps"], warmup, recipe["lr"])


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe)
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs, args.checkpoint_activations)
    groups = common.weight_decay_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=recipe["betas"])
    run.resume(model, optimizer)
    inputs = run.normalise(inputs)
    plan = functools.partial(plan_views, seconds=recipe["seconds"])
    draw = functools.partial(draw_masks, args.seed, places=run.places, grids=model.grids, recipe=recipe,
                             steps=run.total)
    run.begin(model, optimizer, inputs, plan, draw)
    for step in run.steps():
        lr = learning_rate(step, recipe)
        set_lr(optimizer, lr)
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip()                         # no clipping: not in the description
        optimizer.step()
        optimizer.zero_grad()
        tau = common.cosine(step, run.total, *recipe["tau"])
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        run.log(step, grad_norm=grad_norm, tau=tau, lr=lr)
        run.save(step)
    run.finish(probe.toy_report)


if __name__ == "__main__":
    common.main_guard(main)
