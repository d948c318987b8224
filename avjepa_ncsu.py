"""AVJEPA: Exploring Multimodal Representations using Joint Embedding Predictive Architecture (Ge and Zhu,
NC State, 2024).

V-JEPA with sound: blocks of the pictures and of the mel spectrogram of the same seconds are hidden. From
the tokens of both that stay visible, one predictor says what an EMA teacher, which is given everything,
represents at the hidden ones.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python avjepa_ncsu.py                                                    # toy clips, a laptop, minutes
    python avjepa_ncsu.py --modalities video             # the JEPA without sound that the paper compares with
    python avjepa_ncsu.py --data folder --data-dir clips/ --recipe toy --seconds 1.6        # your own clips
    python avjepa_ncsu.py --data kinetics400 --data-dir k400/ --size small --accumulate 2     # one GPU
    torchrun --nproc_per_node=8 avjepa_ncsu.py --data kinetics400 --data-dir k400/
    torchrun --nnodes=4 --nproc_per_node=6 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        avjepa_ncsu.py --data kinetics400 --data-dir k400/                   # the same line on each node
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import copy
import functools
import math

import common
import data
import probe
from common import Block, Positions, RunningMean, UserError, ViT, gather
from run import COLUMNS, Run, make_parser, read_recipe, recipe_column, set_lr

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METHOD = dict(
    name="avjepa_ncsu",
    title="AVJEPA (NC State)",
    weights="context_encoder",  # evaluated; differs: the code's are the teacher's (probe.py --encoder target)
    protocol={
        # of probe.py; unspecified: all the rest of it, for which probe.PROTOCOL stands, and fine-tuning
        # name          frozen                      fine-tuned  source
        "attentive":    ("cross",                   "cross",    "code: V-JEPA's, with residual and MLP"),
        # unspecified: larger ones may tear the MLP apart
        "attentive_lr": ((1e-4, 3e-4, 1e-3, 3e-3),  (1e-3,),    ""),
        "clips":        (3_500,                     None,       "paper: to train the head"),
        "test_clips":   (3_500,                     None,       "paper: to test it"),
        "steps":        (6_020,                     None,       "paper: iterations"),
        # unspecified: here that of pre-training
        "batch_size":   (24,                        64,         ""),
        "views":        (8,                         1,          "code: segments of a clip"),
        "together":     (True,                      False,      "code: the head reads them all at once"),
        "train_views":  (None,                      None,       "V-JEPA: anew in each epoch"),
        "train_starts": ("random",                  "random",   "V-JEPA: in each eighth of the clip"),
        "train_crop":   ("random",                  "random",   "V-JEPA: random resized crop, flip"),
    },
)

# Sources. Sec.: that section of the paper; code: the authors'; V-JEPA: its code, of which theirs is a fork,
# where nothing says more.
RECIPE = {
    # name           paper          toy           source of the paper's value
    "size":         ("base",       "toy",        "Sec. 5.2: ViT-Tiny, Small and Base"),
    "frames":       (16,           8,            "Sec. 5.5"),
    "stride":       (4,            2,            "code: 16 of 64 frames; here the third of each four"),
    "seconds":      (64 / 30,      1.6,          "at 30 frames a second (toy: 10); --seconds: by the clock"),
    "image":        (224,          48,           "code"),
    "crop_scale":   ((0.3, 1.0),   (0.7, 1.0),   "code: random resized crop, flip (toy: size is a cause)"),
    "tubelet":      ((2, 16, 16),  (4, 12, 12),  "code: 8 x 14 x 14 = 1,568 tokens (toy: 2 x 4 x 4 = 32)"),
    "sample_rate":  (44100,        16000,        ""),    # differs: the code leaves each file its own rate
    # differs: the code takes magnitudes for power (half the dB), interleaved stereo for mono, and Slaney's
    # mel scale (here HTK's)
    "n_fft":        (2048,         512,          "code: Hann; dB of power, 0 the loudest, floor at -80"),
    "hop":          (512,          160,          "code: samples from one mel frame to the next"),
    "n_mels":       (128,          64,           "code"),
    "columns":      (192,          192,          "code: the mel is interpolated to 128 x 192"),
    "std_floor":    (1.0,          1.0,          ""),    # differs: the code does not normalise the sound
    "stats_clips":  (10000,        512,          ""),    # unspecified: mean and std of each mel bin
    "mel_patch":    ((16, 16),     (32, 16),     "Sec. 5.5: 8 x 12 = 96 tokens (toy: 2 x 12 = 24)"),
    "video_blocks": (((8, 0.15), (2, 0.7)), ((8, 0.15), (2, 0.7)),
                     "code: a mask set each: how many, their area of the frame"),
    # differs: theirs draws height over width evenly, which makes flatter blocks; here width over height
    "video_aspect": ((1 / 1.5, 1 / 0.75), (0.75, 1.5),
                     "code: .75 to 1.5, of height over width"),
    "audio_block":  ((4, 6),       (1, 6),       "code: patches of frequency x time; as many blocks"),
    "pred_depth":   (12,           2,            "code"),
    # differs: 3 (Tiny), 6 (Small), 12 (Base)
    "pred_dim":     (384,          64,           "code; 12 heads of 32"),
    "tau":          ((0.998, 1.0), (0.998, 1.0), "code: EMA momentum, linear over the schedule"),
    "clips":        (30_000,       None,         "paper: of Kinetics-400, drawn with seed 0; see --clips"),
    "batch_size":   (24,           24,           "code"),
    "epochs":       (None,         None,         "by the steps"),
    "steps":        (2_000,        900,          "Sec. 5.4: stopped there, since the loss rose again"),
    "schedule":     (112_500,      None,         "code: 300 x 300 steps x 1.25: the run is all warm-up"),
    "lr_start":     (2e-4,         1e-4,         "code (--size small without --lr: all three a tenth)"),
    "lr":           (6.25e-4,      3e-3,         "code: cosine from here ..."),
    "lr_end":       (1e-6,         1e-3,         "code: ... to here"),
    "warmup":       (12_000,       100,          "code: steps"),
    "weight_decay": ((0.04, 0.4),  (0.04, 0.04), "code: cosine over the schedule; betas (.9, .999)"),
    # differs: the norm of all gradients together, not of each part
    "clip":         (10.0,         10.0,         "code: norm of the gradient, after the warm-up"),
}
MODALITIES = {"av": ("video", "audio"), "video": ("video",), "audio": ("audio",)}     # in their tokens' order


def get_args(argv=None):
    parser, add = make_parser(__doc__, METHOD["name"])
    add("--modalities", choices=tuple(MODALITIES), default="av",
        help="video: the JEPA of one modality that the paper compares with; everything else is the same")
    add("--mask-per", choices=("clip", "batch"), default="clip",
        help="batch: one mask set for all clips of a step, which did not converge for the authors")
    add("--clips", type=int,
        help="clips of the set that are trained on, drawn with seed 0; 0: all (default: the recipe's)")
    add("--tau", type=float, nargs=2, metavar=("START", "END"),
        help="momentum of the teacher at the start and the end of the schedule (default: the recipe's)")
    args = parser.parse_args(argv)
    if args.modalities != "av" and not args.out:       # not the folder of the run that it is compared with
        args.out = f"runs/{METHOD['name']}-{args.modalities}-{args.data}-seed{args.seed}"
    recipe = read_recipe(args, METHOD["name"], RECIPE, ("clips", "tau"), MODALITIES[args.modalities])
    if args.gain:
        raise UserError("--gain has no effect: this mel is relative to the loudest of the clip; leave it out")
    recipe["gain"] = 0.0
    common.check_range("--clips", recipe["clips"] or 0, 0, 10 ** 9)
    column = recipe_column(args)
    rates = {name: RECIPE[name][COLUMNS.index(column)] for name in ("lr_start", "lr", "lr_end")}
    ratio = recipe["lr"] / rates["lr"]                 # --lr scales the two ends as well
    if args.size == "small" and args.lr is None and column == "paper":
        ratio = 0.1
    for name, rate in rates.items():
        recipe[name] = ratio * rate
    if args.seconds is not None:                       # by the clock, whatever the frame rate
        recipe["stride"] = None
    recipe["modalities"] = args.modalities
    recipe["mask_per"] = args.mask_per
    if "video" in MODALITIES[args.modalities]:
        data.require(args.data, ("video",), "give --modalities audio, or use ajepa.py")
    if "audio" in MODALITIES[args.modalities]:
        data.require(args.data, ("audio",), "give --modalities video")
    return args, recipe


# ----------------------------------------------------------------------------------------------------------
# Views and masks
# ----------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds, modalities):
    """One view: pictures of a random stretch, and the sound of exactly these seconds (Sec. 5.5)."""
    # differs: the sound of a clip that is too short is filled up with silence, as the pictures are with its
    # last frame
    start = rng.uniform(0, max(0.0, duration - seconds))
    crop = "random" if "video" in modalities else None
    return [data.View(start, seconds, crop, "audio" in modalities)]


def hide_blocks(rng, grid, number, size, draws=1):
    """What `number` blocks of `size` (height, width) at random places hide: (draws, rows, columns) bool."""
    rows = np.arange(grid[0])
    cols = np.arange(grid[1])
    top = rng.integers(grid[0] - size[0] + 1, size=(draws, number, 1))
    left = rng.integers(grid[1] - size[1] + 1, size=(draws, number, 1))
    down = (rows >= top) & (rows < top + size[0])                               # (draws, number, rows)
    across = (cols >= left) & (cols < left + size[1])                           # (draws, number, columns)
    return (down[..., None] & across[..., None, :]).any(1)


def draw_set(key, places, grid, number, size):
    """What blocks hide of a grid: (B, rows x columns) bool, each row the same number, never all and never
    nothing. A pure function of (key, place). How much is hidden is drawn for the step, the same for all
    clips; each meets it by single patches."""
    # differs: the code cuts all lists to the shortest, which loses the last rows
    own = np.random.default_rng((*key, 0, 0))          # the step's own; the clips count from 1
    count = int(hide_blocks(own, grid, number, size).sum())
    count = min(max(1, count), math.prod(grid) - 1)
    masks = []
    for place in places:
        rng = np.random.default_rng((*key, 0, 1 + place))
        draws = hide_blocks(rng, grid, number, size, 5)
        distance = np.abs(draws.sum((1, 2)) - count)   # the nearest of five, so that single patches are few
        masks.append(common.meet_count(rng, draws[distance.argmin()], count).flatten())
    return np.stack(masks)


def draw_masks(seed, step, places, grids, recipe):
    """What is visible and what is to be predicted: for each mask set {"v": (context (B, C), target (B, M)),
    "a": the same}, indices of the modality's own tokens. A pure function of (seed, step, place, modality,
    set). places: of the clips in the step's batch over all processes; grids: {"video": (T, H, W), "audio":
    (F, T)}."""
    masks = []
    for s, (number, scale) in enumerate(recipe["video_blocks"]):
        masks.append({})
        for m, grid in grids.items():
            key = (seed, step, 1 + s, ("video", "audio").index(m))
            size = recipe["audio_block"]               # "static" (Sec. 5.5): of a fixed shape
            if m == "video":                           # V-JEPA: of one shape in a step
                rng = np.random.default_rng((*key, 1))
                size = common.block_size(rng, grid[-2:], (scale, scale), recipe["video_aspect"])
            if recipe["mask_per"] == "batch":
                hidden = draw_set(key, [0], grid[-2:], number, size).repeat(len(places), 0)
            else:
                hidden = draw_set(key, places, grid[-2:], number, size)
            if m == "video":                           # tubes: over the full time
                hidden = np.tile(hidden, (1, grid[0]))                          # (B, N)
            masks[s][m[0]] = common.split_mask(hidden)
    return masks


def make_inputs(recipe):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin are measured later
    (Run.normalise)."""
    modalities = MODALITIES[recipe["modalities"]]
    rate = recipe["frames"] * recipe["stride"] / recipe["seconds"] if recipe["stride"] else None
    return data.Inputs(
        seconds=recipe["seconds"], frames=recipe["frames"] if "video" in modalities else 0, frame_rate=rate,
        size=recipe["image"], resize=recipe["image"], crop_scale=recipe["crop_scale"],
        sample_rate=recipe["sample_rate"], n_fft=recipe["n_fft"], win_length=recipe["n_fft"],
        hop=recipe["hop"], n_mels=recipe["n_mels"] if "audio" in modalities else 0, window="hann",
        log="db_max", columns=recipe["columns"], interpolate=True, mel_mean=0.0, mel_std=1.0)


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same. Positions: 3-D
    and 2-D sine-cosine (Sec. 5.5)."""
    # differs: a modality embedding as soon as there are two, as in the other scripts; the code has none
    config = dict(size=recipe["size"], positions="sincos", checkpoint=checkpoint)
    if inputs.frames:
        config["video"] = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"])
    if inputs.n_mels:
        config["audio"] = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return config


def make_model(recipe, inputs, checkpoint=False):
    config = encoder_config(recipe, inputs, checkpoint)
    return AVJEPA(config, len(recipe["video_blocks"]), recipe["pred_dim"], recipe["pred_depth"])


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------

def by_input(h, masks):
    """The context's tokens (B, C, D) of a mask set -> {input: (B, C of it, D)}."""
    sizes = [context.shape[1] for context, _ in masks.values()]
    return dict(zip(masks, h.split(sizes, 1)))


class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each hidden one; an input
    projection for each input, and a mask token for each input and mask set (V-JEPA); heads of 32
    dimensions."""
    def __init__(self, dim, inputs, grids, sets, width, depth, checkpoint=False):
        super().__init__()
        self.embed = nn.ModuleDict({i: nn.Linear(dim, width) for i in inputs})
        # differs: the code's mask tokens begin at zero
        self.mask_tokens = nn.ParameterDict({i: torch.randn(sets, width) * 0.02 for i in inputs})
        places = {i: Positions(grids[m], width, "sincos") for i, (m,) in inputs.items()}
        self.positions = nn.ModuleDict(places)
        blocks = [Block(width, width // 32, 4 * width, checkpoint=checkpoint) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, dim)              # code: one for both
        self.apply(ViT.init_weights)

    def forward(self, h, masks, number):
        """h (B, C, D): the context's tokens of mask set `number`, those of the video first -> {input:
        predictions (B, M, D)}."""
        visible = []
        hidden = []
        for i, part in by_input(h, masks).items():
            context, target = masks[i]
            e = self.positions[i]().expand(len(h), -1, -1)                      # (B, N, P)
            visible.append(self.embed[i](part) + gather(e, context))            # (B, C, P)
            hidden.append(self.mask_tokens[i][number] + gather(e, target))      # (B, M, P)
        sizes = [x.shape[1] for x in hidden]
        x = self.norm(self.blocks(torch.cat(visible + hidden, 1)))[:, -sum(sizes):]     # (B, sum of M, P)
        return dict(zip(masks, self.head(x).split(sizes, 1)))                   # each (B, M, D)


class AVJEPA(nn.Module):
    """The context encoder, its EMA, the predictor, and the loss of a batch."""
    def __init__(self, config, sets, pred_dim, pred_depth):
        super().__init__()
        self.parts = dict(encoder=config)              # what load_encoder builds again
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim = self.context_encoder.dim
        self.grids = self.context_encoder.grids
        self.inputs = {m[0]: (m,) for m in self.grids}                    # {"v": ("video",), "a": ("audio",)}
        self.predictor = Predictor(dim, self.inputs, self.grids, sets, pred_dim, pred_depth,
                                   config["checkpoint"])
        # what one knows without any context
        self.means = nn.ModuleDict({i: RunningMean(dim) for i in self.inputs})

    def see(self, tokens, masks):
        """The context encoder on what a mask set leaves visible of tokens (B, N, D) -> (B, C, D)."""
        visible = []
        for i, (context, _) in masks.items():          # the sound's tokens stand behind those of the video
            before = self.context_encoder.num("video") if i == "a" and "v" in masks else 0
            visible.append(context + before)
        return self.context_encoder(tokens=tokens, visible=torch.cat(visible, 1))

    def forward(self, batch, masks, weight, tick):
        """A batch of data.collate; masks of draw_masks; weight: {input: (B,)}, of each clip in the mean
        over the clips that have it -> (loss, what the log shows)."""
        given = {m: batch[m] for m in self.grids}
        # 1 context: the visible tokens of both together, a pass for each mask set
        tokens = self.context_encoder.embed(**given)                            # (B, N, D)
        h = [self.see(tokens, mask_set) for mask_set in masks]                  # each (B, C, D)
        # 2 target: the teacher is given everything; each token is layer-normed
        with torch.no_grad():
            z = self.target_encoder(**given).float()                            # (B, N, D)
            y = F.layer_norm(z, z.shape[-1:])
            sizes = [self.context_encoder.num(m) for m in self.grids]
            y = dict(zip(self.inputs, y.split(sizes, 1)))                       # each (B, N of it, D)
            for i in self.inputs:
                self.means[i].update(y[i].mean(1), tick, weight[i])
        # 3 predict: at the hidden tokens of both, from the context of both
        predictions = [self.predictor(x, mask_set, s) for s, (x, mask_set) in enumerate(zip(h, masks))]
        # 4 loss: the mean over the mask sets, and the sum of the two modalities
        # differs: the code takes one mean over the hidden tokens of both, which leaves 3 to 7 % to the sound;
        # here each has a mean of its own, so that the video's term is that of --modalities video
        losses = {}
        shown = {}
        # differs: the code takes another clip for one without sound; here such a clip trains the video's term
        for i in self.inputs:
            targets = [gather(y[i], mask_set[i][1]) for mask_set in masks]      # each (B, M, D)
            pairs = [(prediction[i].float(), t) for prediction, t in zip(predictions, targets)]
            losses[i] = sum(prediction_loss(*pair, weight[i]) for pair in pairs) / len(masks)
            nothing = sum(prediction_loss(self.means[i].mean, t, weight[i]) for t in targets) / len(masks)
            shown[f"loss/{i}"] = losses[i].detach()
            shown[f"know_nothing/{i}"] = nothing
        for i, part in by_input(h[0], masks[0]).items():
            embedding = part.detach().float().mean(1)                           # (B, D)
            shown[f"embedding/{i}"] = embedding
            # the online probe's: of what is visible, so lower than the probe at the end, though these tokens
            # have seen those of the other modality
            shown[f"clip/{self.inputs[i][0]}"] = embedding
        if len(self.inputs) == 2:
            shown["clip/av"] = h[0].detach().float().mean(1)
        return sum(losses.values()), shown


# ----------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, weight):
    """L1, the mean over tokens and dimensions, the weighted sum over clips: prediction and target (B, M,
    D), weight (B,) -> scalar."""
    return (weight * (prediction - target).abs().flatten(1).mean(1)).sum()


def learning_rate(step, recipe):
    """Linear warm-up from lr_start, then a cosine to lr_end, over the whole schedule."""
    return common.warmup_cosine(step, schedule_steps(recipe), recipe["warmup"], recipe["lr"],
                                recipe["lr_start"], recipe["lr_end"])


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

def schedule_steps(recipe):
    """The length of the schedules: at least that of the run."""
    return max(recipe["schedule"] or 0, recipe["steps"])


def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe, recipe["clips"])
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs, args.checkpoint_activations)
    groups = common.weight_decay_groups(model, recipe["weight_decay"][0])
    optimizer = torch.optim.AdamW(groups)
    schedule = schedule_steps(recipe)
    run.resume(model, optimizer)
    inputs = run.normalise(inputs)
    plan = functools.partial(plan_views, seconds=recipe["seconds"], modalities=tuple(model.grids))
    draw = functools.partial(draw_masks, args.seed, places=run.places, grids=model.grids, recipe=recipe)
    run.begin(model, optimizer, inputs, plan, draw, weigh=model.inputs)
    for step in run.steps():
        lr = learning_rate(step, recipe)
        set_lr(optimizer, lr)
        optimizer.param_groups[0]["weight_decay"] = common.cosine(step, schedule, *recipe["weight_decay"])
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip(recipe["clip"] if step >= recipe["warmup"] else math.inf)
        optimizer.step()
        optimizer.zero_grad()
        tau = recipe["tau"][0] + (recipe["tau"][1] - recipe["tau"][0]) * step / schedule
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        run.log(step, grad_norm=grad_norm, tau=tau, lr=lr)
        run.save(step)
    run.finish(probe.toy_report)


if __name__ == "__main__":
    common.main_guard(main)
