"""MJEPA: A Simple and Scalable Joint-Embedding Predictive Architecture for Audio-Visual Learning (arXiv
2606.25225).

One ViT takes the tokens of a sound, of a video, or of both. From what is visible of each input, it is
predicted what an EMA teacher represents of the hidden rest (within: audio, video, both) and of the clip as
another input shows it (across: six directions). One objective, nine terms, no weights, no negatives, no
reconstruction.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python mjepa.py                                                          # toy clips, a laptop, minutes
    python mjepa.py --data folder --data-dir clips/ --recipe toy             # your own clips, the small model
    python mjepa.py --data audioset-20k --data-dir audioset/ --accumulate 16 \\
        --checkpoint-activations                                             # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 mjepa.py --data audioset --data-dir audioset/ --checkpoint-activations
    torchrun --nproc_per_node=8 mjepa.py --data audioset --data-dir audioset/ --cooldown \\
        --init runs/mjepa-audioset-seed0 --accumulate 8 --checkpoint-activations
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        mjepa.py --data audioset --data-dir audioset/ --size giant --checkpoint-activations     # on each node
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import common
import data
import probe
from common import Block, Positions, RunningMean, UserError, ViT, gather
from run import Run, load_optimizer, make_parser, read_recipe, set_lr

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METHOD = dict(
    name="mjepa",
    title="MJEPA",
    weights="context_encoder",     # unspecified: which are evaluated (V-JEPA 2's code: the teacher's)
    protocol={
        # of probe.py; unspecified: all the rest of it, for which probe.PROTOCOL stands, and fine-tuning
        # name          frozen                      fine-tuned  source
        "attentive":    ("blocks",                  "blocks",   "digest: cross-attention, 4 blocks, linear"),
        # unspecified: larger ones tear the blocks apart
        "attentive_lr": ((1e-4, 3e-4, 1e-3, 3e-3), (1e-3,),     ""),
    },
)

# Sources. abstract: the paper's; digest: second-hand, a published digest of the paper; tracker: the
# authors' issue tracker; V-JEPA 2: its code, on which the authors build, where nothing says more; A-JEPA:
# as ajepa.py.
RECIPE = {
    # name            paper          toy           source of the paper's value
    "size":          ("large",      "toy",        "digest: ViT-L (abstract: ViT-g, --size giant)"),
    "seconds":       (10.0,         1.92,         "tracker: of sound, the full clip (toy: half of it)"),
    "video_seconds": (4.0,          1.28,         "tracker: of pictures, a random stretch of what is heard"),
    "frames":        (16,           8,            "tracker: 4 a second"),
    "image":         (224,          48,           "tracker"),
    "crop_scale":    ((0.3, 1.0),   (0.7, 1.0),
                      "V-JEPA 2: random resized crop, flip (toy: size is a cause)"),
    "tubelet":       ((2, 16, 16),  (4, 12, 12),  "V-JEPA 2: 8 x 14 x 14 = 1,568 tokens (toy: 2 x 4 x 4)"),
    # unspecified: the sound
    "n_fft":         (512,          512,          "A-JEPA's front end, for want of one"),
    "hop":           (160,          160,          "A-JEPA: samples between two mel frames, at 16 kHz"),
    "n_mels":        (128,          64,           "A-JEPA"),
    "columns":       (1024,         192,          "A-JEPA: 10 s are 1,001 frames, padded to 1,024"),
    "std_floor":     (0.1,          0.1,          "A-JEPA"),
    "stats_clips":   (10000,        512,          "A-JEPA: clips for mean and std of the mel"),
    "mel_patch":     ((16, 16),     (32, 16),     "A-JEPA: 8 x 64 = 512 tokens (toy: 2 x 12 = 24)"),
    "positions":     ("factorised", "factorised", ""),    # unspecified: learned; V-JEPA 2 has rotary ones
    "video_blocks":  (((8, 0.15), (2, 0.7)), ((8, 0.15), (2, 0.7)),
                      "V-JEPA 2: a mask set each: how many, of which area"),
    # differs: theirs draws height over width evenly, which makes flatter blocks; here width over height
    "video_aspect":  ((1 / 1.5, 1 / 0.75), (0.75, 1.5),
                      "V-JEPA 2: .75 to 1.5, of height over width"),
    "audio_scale":   ((0.15, 0.2),  (0.15, 0.2),  "A-JEPA: 4 blocks, their area of the mel"),
    "audio_aspect":  ((0.75, 1.5),  (0.75, 1.5),  "A-JEPA: time over frequency, relative to the grid"),
    "audio_hidden":  ((0.6, 0.75),  (0.6, 0.75),  "A-JEPA: share that the union of the blocks hides"),
    "levels":        (4,            2,            "V-JEPA 2.1: of 24 layers 5, 11, 17, 23"),
    "pred_depth":    (12,           2,            "V-JEPA 2"),
    "pred_dim":      (384,          64,           "V-JEPA 2: 12 heads of 32 dimensions"),
    # toy: mostly still the start
    "tau":           ((0.99925, 0.99925), (0.9995, 0.9995), "V-JEPA 2: EMA momentum, constant"),
    "batch_size":    (512,          24,           "tracker"),
    "epochs":        (None,         None,         "by the steps"),
    "steps":         (150_000,      550,          "tracker: 500 epochs of 300 steps"),
    "lr_start":      (1e-4,         1e-4,         "V-JEPA 2"),
    "lr":            (5.25e-4,      2e-3,         "V-JEPA 2: constant after the warm-up"),
    "warmup":        (12_000,       100,          "V-JEPA 2: steps"),
    "weight_decay":  (0.04,         0.04,         "V-JEPA 2"),    # unspecified: betas, torch's own
}
COOLDOWN = {                                          # --cooldown puts these in the place of the values above
    "frames":        (64,     32,   "digest"),
    "video_seconds": (10.0,   1.92, ""),    # unspecified: at 4 a second, 64 frames outlast a clip
    "steps":         (12_000, 60,   "digest"),
    "warmup":        (0,      0,    "V-JEPA 2: none, the rate falls"),
    "lr_end":        (1e-6,   1e-6, "V-JEPA 2: aimed at 15,000 steps, so that it ends at 1.06e-4"),
}
INPUTS = {"a": ("audio",), "v": ("video",), "av": ("video", "audio")}    # the modalities, as the tokens stand
WITHIN = ("a", "v", "av")
ACROSS = ("a->v", "v->a", "a->av", "av->a", "v->av", "av->v")
TERMS = {
    "separate-audio": ("a",),
    "separate-video": ("v",),
    "intra": WITHIN,
    "intra+av": (*WITHIN, "a->v", "v->a"),
    "all": (*WITHIN, *ACROSS),
}


def get_args(argv=None):
    parser, add = make_parser(__doc__, METHOD["name"])
    add("--terms", choices=tuple(TERMS), default="all", help="rows of the paper's ablation: an encoder for "
        "one modality alone, the three terms within, those and audio<->video, or all nine")
    add("--aligned", action="store_true",
        help="sound of the pictures' span alone (default: sound of the full clip, pictures of a part)")
    add("--cooldown", action="store_true",
        help="the last phase: four times the frames, a learning rate that falls from --lr; needs --init")
    add("--init", metavar="FILE",
        help="checkpoint of this method, or its folder, whose weights a new run starts from")
    add("--tau", type=float, nargs=2, metavar=("START", "END"),
        help="momentum of the teacher at the start and the end of the run (default: the recipe's)")
    args = parser.parse_args(argv)
    if args.cooldown and not args.init:
        raise UserError("--cooldown needs --init, the checkpoint that it starts from")
    if args.cooldown and not args.out:                 # not the folder of the run that it goes on from
        args.out = f"runs/{METHOD['name']}-cooldown-{args.data}-seed{args.seed}"
    table = {**RECIPE, **COOLDOWN} if args.cooldown else dict(RECIPE)
    if args.aligned:
        table["video_seconds"] = RECIPE["video_seconds"]
    takes = {"separate-audio": ("audio",), "separate-video": ("video",)}.get(args.terms, INPUTS["av"])
    recipe = read_recipe(args, METHOD["name"], table, ("tau",), takes)
    recipe["video_seconds"] = min(recipe["video_seconds"], recipe["seconds"])
    if args.aligned:
        recipe["seconds"] = recipe["video_seconds"]
    lengths = list(zip(RECIPE["seconds"][:2], RECIPE["columns"][:2]))
    if (recipe["seconds"], recipe["columns"]) not in lengths:                   # of another length
        recipe["columns"] = None                       # as many as it gives, filled up to whole patches
    recipe["terms"] = args.terms
    recipe["aligned"] = args.aligned
    recipe["cooldown"] = args.cooldown
    if args.init and Path(args.out).resolve() == folder_of(args.init):
        raise UserError(f"--init {args.init} lies in --out {args.out}, where it would be written over; give "
                        "another --out")
    if args.terms != "separate-audio":
        data.require(args.data, ("video",), "give --terms separate-audio, or use ajepa.py")
    if args.terms != "separate-video":
        data.require(args.data, ("audio",), "give --terms separate-video")
    return args, recipe


def folder_of(checkpoint):
    path = Path(checkpoint)
    return (path if path.is_dir() else path.parent).resolve()


# ----------------------------------------------------------------------------------------------------------
# Views and masks
# ----------------------------------------------------------------------------------------------------------

def inputs_of(terms):
    """{input: its modalities} of those inputs that some terms need."""
    needed = "->".join(terms).split("->")
    return {name: modalities for name, modalities in INPUTS.items() if name in needed}


def plan_views(rng, duration, seconds, video_seconds, modalities):
    """One view: the sound of the clip, and pictures of a random part of what is heard (the authors' issue
    tracker)."""
    # unspecified: what is cut off a long clip (here random), and what fills up a short one (silence, its
    # last frame)
    start = rng.uniform(0, max(0.0, duration - seconds))
    place = rng.random()
    spare = max(0.0, min(seconds, duration) - video_seconds)
    crop = "random" if "video" in modalities else None
    return [data.View(start, seconds, crop, "audio" in modalities, (start + place * spare, video_seconds))]


def hide_tubes(rng, grid, number, size):
    """`number` blocks of `size` (height, width) at random places, for all frames alike: (rows, columns)
    bool."""
    mask = np.zeros(grid, bool)
    for _ in range(number):
        mask |= common.random_block(rng, grid, size)
    return mask


def hide_blocks(rng, grid, scale, aspect, hidden):
    """Time-frequency blocks of a mel, as A-JEPA's: (rows, columns) bool. Four blocks, each where it
    overlaps the earlier ones least, drawn until their union hides a share from hidden[0] to hidden[1].
    aspect: relative to the grid."""
    low, high = (share * math.prod(grid) for share in hidden)
    aspect = [a * grid[1] / grid[0] for a in aspect]
    best = None
    best_distance = math.inf
    for _ in range(50):
        mask = np.zeros(grid, bool)
        for _ in range(4):
            size = common.block_size(rng, grid, scale, aspect)
            mask |= common.block_apart(rng, mask, size)
        distance = max(low - mask.sum(), mask.sum() - high, 0)
        if distance < best_distance:
            best = mask
            best_distance = distance
        if distance == 0:
            break
    return best


def draw_set(key, places, grid, recipe, blocks=None):
    """What one mask set hides of one modality: (B, rows x columns) bool, each row the same number, never
    all and never nothing. blocks: (number, area) of a video's; None: those of a sound. A pure function of
    (key, place). How much is hidden, and the size of a video's blocks, is drawn for the step (V-JEPA 2),
    the same for all clips; each meets the number by single patches."""
    # unspecified: how (V-JEPA 2: by cutting the longer lists, which loses the last rows)
    own = np.random.default_rng((*key, 0, 0))          # the step's own; the clips count from 1
    if blocks:
        number, area = blocks
        size = common.block_size(own, grid, (area, area), recipe["video_aspect"])
        hide = functools.partial(hide_tubes, grid=grid, number=number, size=size)
    else:
        hide = functools.partial(hide_blocks, grid=grid, scale=recipe["audio_scale"],
                                 aspect=recipe["audio_aspect"], hidden=recipe["audio_hidden"])
    total = math.prod(grid)
    count = min(max(1, int(hide(own).sum())), total - 1)
    masks = []
    for place in places:
        rng = np.random.default_rng((*key, 0, 1 + place))
        best = None
        best_distance = math.inf
        for _ in range(5):                       # one of five that comes near, so that single patches are few
            mask = hide(rng)
            distance = abs(int(mask.sum()) - count)
            if distance < best_distance:
                best = mask
                best_distance = distance
            if distance <= round(0.02 * total):
                break
        masks.append(common.meet_count(rng, best, count).flatten())
    return np.stack(masks)


def draw_masks(seed, step, places, grids, recipe):
    """What is visible and what is to be predicted: for each mask set {input: (context (B, C), target (B,
    M))}, indices of the input's tokens. A pure function of (seed, step, place, input, modality, set).
    places: of the clips in the step's batch over all processes; grids: {"video": (T, H, W), "audio": (F,
    T)}."""
    # unspecified: the sound has as many mask sets as the video, and the joint input has masks of its own
    masks = []
    for s, blocks in enumerate(recipe["video_blocks"]):
        masks.append({})
        for name, modalities in inputs_of(TERMS[recipe["terms"]]).items():
            hidden = []
            for m in modalities:
                key = (seed, step, 1 + WITHIN.index(name) + 3 * (m == "video") + 6 * s)
                mask = draw_set(key, places, grids[m][-2:], recipe, blocks if m == "video" else None)
                if m == "video":                       # tubes: over the full time
                    mask = np.tile(mask, grids[m][0])
                hidden.append(mask)
            masks[s][name] = common.split_mask(np.concatenate(hidden, 1))
    return masks


def make_inputs(recipe):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin are measured later
    (Run.normalise)."""
    frames = 0 if recipe["terms"] == "separate-audio" else recipe["frames"]
    n_mels = 0 if recipe["terms"] == "separate-video" else recipe["n_mels"]
    inputs = data.Inputs(
        seconds=recipe["seconds"], video_seconds=recipe["video_seconds"], frames=frames, size=recipe["image"],
        resize=recipe["image"], crop_scale=recipe["crop_scale"], sample_rate=16000, n_fft=recipe["n_fft"],
        win_length=400, hop=recipe["hop"], n_mels=n_mels, window="hann", log="ln", mel_mean=0.0, mel_std=1.0,
        columns=recipe["columns"])
    if inputs.columns is None:
        patch = recipe["mel_patch"][1]
        inputs = replace(inputs, columns=math.ceil(inputs.mel_frames / patch) * patch)
    return inputs


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same. What only a
    dropped term needs is not built."""
    depth = common.SIZES[recipe["size"]][1]
    levels = {max(1, depth * (level + 1) // recipe["levels"]) - 1 for level in range(recipe["levels"])}
    config = dict(size=recipe["size"], positions=recipe["positions"], levels=sorted(levels)[:-1],
                  checkpoint=checkpoint)
    if inputs.frames:
        config["video"] = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"])
    if inputs.n_mels:
        config["audio"] = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return config


def make_model(recipe, inputs, checkpoint=False):
    config = encoder_config(recipe, inputs, checkpoint)
    return MJEPA(config, TERMS[recipe["terms"]], recipe["pred_dim"], recipe["pred_depth"])


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each hidden one, shared by the
    three inputs; heads of 32 dimensions. It reads and predicts all levels (V-JEPA 2.1)."""
    def __init__(self, dim, levels, grids, width, depth, positions, checkpoint=False):
        super().__init__()
        # unspecified: one mask token for all, and an embedding of the modality on every token
        self.embed = nn.Linear(levels * dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.ModuleDict({m: Positions(grid, width, positions) for m, grid in grids.items()})
        self.modality = nn.ParameterDict({m: torch.randn(width) * 0.02 for m in grids})
        blocks = [Block(width, width // 32, 4 * width, checkpoint=checkpoint) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, levels * dim)
        self.apply(ViT.init_weights)

    def forward(self, h, masks, number=0):
        """h (B, C, L D) at what is visible of one input -> {input: predictions (B, M, L D)} at what is
        hidden. masks: {input: (context, target)} of that one; number: of the mask set, to which this
        predictor pays no heed."""
        (name, (context, target)), = masks.items()
        e = torch.cat([self.positions[m]() + self.modality[m] for m in INPUTS[name]])   # (N, P)
        e = e.expand(len(h), -1, -1)                                            # (B, N, P)
        m = self.mask_token + gather(e, target)                                 # (B, M, P)
        x = torch.cat([self.embed(h) + gather(e, context), m], 1)               # (B, C + M, P)
        x = self.norm(self.blocks(x))[:, context.shape[1]:]                     # (B, M, P)
        return {name: self.head(x)}                                             # (B, M, L D)


class MJEPA(nn.Module):
    """The context encoder, its EMA, the predictor within and those across, and the loss of a batch."""
    def __init__(self, config, terms, pred_dim, pred_depth):
        super().__init__()
        self.inputs = inputs_of(terms)
        self.across = [term for term in terms if term in ACROSS]
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim = self.context_encoder.dim
        self.layers = [*config["levels"], len(self.context_encoder.blocks) - 1]
        self.grids = self.context_encoder.grids
        levels = len(self.layers)
        self.predictor = Predictor(dim, levels, self.grids, pred_dim, pred_depth, config["positions"],
                                   config["checkpoint"])
        # unspecified: their width (the encoder's) and activation (GELU)
        widths = [dim, dim, dim]
        self.cross = nn.ModuleDict({term: common.mlp(dim, widths, norm=False) for term in self.across})
        # what load_encoder builds again
        self.parts = dict(encoder=config, cross={term: widths for term in self.across})
        # what one knows without any context
        self.means = nn.ModuleDict({name: RunningMean(levels * dim) for name in self.inputs})
        pooled = dict.fromkeys(term.split("->")[1] for term in self.across)
        self.pooled_means = nn.ModuleDict({name: RunningMean(dim) for name in pooled})

    def embed(self, encoder, batch):
        """The tokens (B, N, D) of each input; patches once for each modality."""
        tokens = {m: encoder.embed(**{m: batch[m]}) for m in self.grids}
        joined = {}
        for name, modalities in self.inputs.items():
            joined[name] = torch.cat([tokens[m] for m in modalities], 1)
        return joined

    def see(self, tokens, masks):
        """The context encoder on what the mask of one input leaves visible of its tokens (B, N, D) -> (B,
        C, L D)."""
        (context, _), = masks.values()
        return self.context_encoder(tokens=tokens, visible=context, layers=self.layers)

    def pool(self, h):
        """Tokens of all levels (B, N, L D) -> the mean of the last level (B, D)"""
        return h[..., -self.context_encoder.dim:].mean(1)

    def norm_levels(self, x):
        """Layer norm without affine of each level for itself. (..., L D) -> the same"""
        dim = self.context_encoder.dim
        return F.layer_norm(x.unflatten(-1, (-1, dim)), (dim,)).flatten(-2)

    def forward(self, batch, masks, weight, tick):
        """A batch of data.collate; masks of draw_masks; weight: {input: (B,)}, of each clip in the mean
        over the clips that have it -> (loss, what the log shows)."""
        # 1 context: the visible tokens alone, a pass for each input and mask set
        h = {}                                         # {input: [(B, C, L D) for each mask set]}
        for name, tokens in self.embed(self.context_encoder, batch).items():
            h[name] = [self.see(tokens, {name: mask_set[name]}) for mask_set in masks]
        # 2 target: the teacher is given everything, a pass for each input; each level of each token is
        # layer-normed
        y = {}
        pooled = {}
        with torch.no_grad():
            for name, tokens in self.embed(self.target_encoder, batch).items():
                z = self.target_encoder(tokens=tokens, layers=self.layers).float()      # (B, N, L D)
                y[name] = self.norm_levels(z)
                # unspecified: pooled over all tokens alike, then layer-normed
                pooled[name] = self.norm_levels(self.pool(z))                   # (B, D)
            for name, mean in self.means.items():
                mean.update(y[name].mean(1), tick, weight[name])
            for name, mean in self.pooled_means.items():
                mean.update(pooled[name], tick, weight[name])
        # 3 predict and 4 loss: each term the mean over the mask sets, their sum unweighted
        losses = {}
        nothing = {}
        for name in self.inputs:                # within: the hidden tokens of an input, from its visible ones
            pairs = []
            for s, mask_set in enumerate(masks):
                prediction = self.predictor(h[name][s], {name: mask_set[name]}, s)[name]
                pairs.append((prediction.float(), gather(y[name], mask_set[name][1])))  # both (B, M, L D)
            losses[name] = mean_loss(pairs, weight[name])
            nothing[name] = mean_loss([(self.means[name].mean, target) for _, target in pairs], weight[name])
        for term in self.across:          # across: another input as a whole, from what is visible of this one
            source, target = term.split("->")
            predictions = [self.cross[term](self.pool(x)).float() for x in h[source]]       # each (B, D)
            pairs = [(prediction, pooled[target]) for prediction in predictions]
            losses[term] = mean_loss(pairs, weight["av"])
            nothing[term] = mean_loss([(self.pooled_means[target].mean, pooled[target])], weight["av"])
        shown = {f"loss/{term}": loss.detach() for term, loss in losses.items()}
        shown.update({f"know_nothing/{term}": loss for term, loss in nothing.items()})
        for name, modalities in self.inputs.items():
            embedding = self.pool(h[name][0].detach().float())                  # (B, D)
            shown[f"embedding/{name}"] = embedding
            # the online probe's: of what is visible, so lower than the probe at the end
            shown[f"clip/{name if len(modalities) == 2 else modalities[0]}"] = embedding
        return sum(losses.values()), shown


# ----------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, weight):
    """L1, the mean over tokens and dimensions, the weighted sum over clips: prediction and target (B, [M,]
    D), weight (B,) -> scalar."""
    return (weight * (prediction - target).abs().flatten(1).mean(1)).sum()


def mean_loss(pairs, weight):
    """The mean over the mask sets' pairs (prediction, target)."""
    return sum(prediction_loss(prediction, target, weight) for prediction, target in pairs) / len(pairs)


def learning_rate(step, recipe):
    """Linear from lr_start to lr, then constant; in the cooldown linear from lr towards lr_end (V-JEPA 2)."""
    if recipe["cooldown"]:
        span = 1.25 * recipe["steps"]                  # of 15,000 steps, 12,000
        return recipe["lr"] + (recipe["lr_end"] - recipe["lr"]) * step / span
    progress = min(1.0, (step + 1) / recipe["warmup"])
    return recipe["lr_start"] + (recipe["lr"] - recipe["lr_start"]) * progress


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

def stretch_positions(weights, module):
    """A state dict whose learned positions of video time are interpolated to the number of frames that
    `module` takes."""
    # unspecified (cooldown): how; the longer span is stretched over the positions of the shorter one
    weights = dict(weights)
    for name, now in module.state_dict().items():
        of_video = name.endswith("video.positions.first") or name.endswith("positions.video.first")
        before = weights.get(name) if of_video else None                        # (T, 1, D)
        if before is not None and before.shape[1:] == now.shape[1:] and len(before) != len(now):
            x = F.interpolate(before.permute(1, 2, 0), len(now), mode="linear")      # (1, D, T of the module)
            weights[name] = x.permute(2, 0, 1)
    return weights


def start_from(run, model, optimizer, inputs):
    """--init: the weights of another run, unless this one has begun from it already. Returns the inputs,
    with the mel's statistics that the weights know."""
    args = run.args
    if run.found:
        before = run.found["args"].get("init")
        if before != args.init:
            raise UserError(f"{args.out}: the run there began from {before}; give another --out, or --fresh "
                            "to start over")
        return run.normalise(inputs)
    begun = common.load_checkpoint(args.init, METHOD["name"])
    common.load_weights(model, stretch_positions(begun["model"], model), args.init)
    if args.cooldown:              # V-JEPA 2: with the optimiser's state, but for positions of another length
        load_optimizer(optimizer, begun["optimizer"], args.init)
        other = [p for p, state in optimizer.state.items() if state["exp_avg"].shape != p.shape]
        for p in other:
            del optimizer.state[p]
    return replace(inputs, mel_mean=begun["inputs"]["mel_mean"], mel_std=begun["inputs"]["mel_std"])


def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe)
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs, args.checkpoint_activations)
    groups = common.weight_decay_groups(model, recipe["weight_decay"])
    optimizer = torch.optim.AdamW(groups)
    run.resume(model, optimizer)
    inputs = start_from(run, model, optimizer, inputs) if args.init else run.normalise(inputs)
    plan = functools.partial(plan_views, seconds=recipe["seconds"], video_seconds=recipe["video_seconds"],
                             modalities=tuple(model.grids))
    draw = functools.partial(draw_masks, args.seed, places=run.places, grids=model.grids, recipe=recipe)
    run.begin(model, optimizer, inputs, plan, draw, weigh=model.inputs)
    for step in run.steps():
        lr = learning_rate(step, recipe)
        set_lr(optimizer, lr)
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip()                         # no clipping: V-JEPA 2
        optimizer.step()
        optimizer.zero_grad()
        tau = common.cosine(step, run.total, *recipe["tau"])
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        run.log(step, grad_norm=grad_norm, tau=tau, lr=lr)
        run.save(step)
    run.finish(probe.toy_report)


if __name__ == "__main__":
    common.main_guard(main)
