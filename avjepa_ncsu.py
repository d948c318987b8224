"""AVJEPA: Exploring Multimodal Representations using Joint Embedding Predictive Architecture (Ge and Zhu, NC State, 2024).

V-JEPA with sound: blocks of the pictures and of the mel spectrogram of the same seconds are hidden. From the tokens of both that stay
visible, one predictor says what an EMA teacher, which is given everything, represents at the hidden ones.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python avjepa_ncsu.py                                                            # toy clips, a laptop, minutes
    python avjepa_ncsu.py --modalities video                                         # the JEPA without sound that the paper compares with
    python avjepa_ncsu.py --data folder --data-dir clips/ --recipe toy --seconds 1.6          # your own clips, the small model
    python avjepa_ncsu.py --data kinetics400 --data-dir k400/ --size small --accumulate 2         # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 avjepa_ncsu.py --data kinetics400 --data-dir k400/
    torchrun --nnodes=4 --nproc_per_node=6 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        avjepa_ncsu.py --data kinetics400 --data-dir k400/                           # the same line on each node
"""
import argparse, contextlib, copy, functools, math, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import common, data, probe                              # before torch: common sets how its threads wait
from common import UserError, ViT, gather

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

METHOD = "avjepa_ncsu"

# Sources: seed = the document that we implement, code = the authors', kin = V-JEPA, of which it is a fork, where nothing says more.
RECIPE = {
    # name            paper                  toy                source of the paper's value
    "size":          ("base",                "toy",             "seed: ViT-Tiny, Small and Base"),
    "frames":        (16,                    8,                 "seed"),
    "stride":        (4,                     2,                 "code: 16 of 64 frames, evenly; here the third of each four"),
    "seconds":       (64 / 30,               1.6,               "what that is at 30 frames a second (toy: 10); --seconds: by the clock"),
    "image":         (224,                   48,                "code"),
    "crop_scale":    ((0.3, 1.0),            (0.7, 1.0),        "code: random resized crop, and flip (toy: size is a cause)"),
    "tubelet":       ((2, 16, 16),           (4, 12, 12),       "code: 8 x 14 x 14 = 1,568 tokens (toy: 2 x 4 x 4 = 32)"),
    "sample_rate":   (44100,                 16000,             ""),    # differs: the code leaves each file its own rate
    # differs: the code takes magnitudes for power (half the dB), interleaved stereo for mono, and Slaney's mel scale (here HTK's)
    "n_fft":         (2048,                  512,               "code: Hann; power in dB, 0 the clip's loudest, floor at -80"),
    "hop":           (512,                   160,               "code: samples from one mel frame to the next"),
    "n_mels":        (128,                   64,                "code"),
    "columns":       (192,                   192,               "code: the mel is interpolated to 128 x 192"),
    "std_floor":     (1.0,                   1.0,               ""),    # differs: the code does not normalise the sound
    "stats_clips":   (10000,                 512,               ""),    # unspecified: mean and std of each mel bin
    "mel_patch":     ((16, 16),              (16, 16),          "seed: 8 x 12 = 96 tokens (toy: 4 x 12 = 48)"),
    "video_blocks":  (((8, 0.15), (2, 0.7)), ((8, 0.15), (2, 0.7)), "code: a mask set each: how many, their area of the frame"),
    "video_aspect":  ((1 / 1.5, 1 / 0.75),   (0.75, 1.5),       "code: width over height; its own is height over width, .75 to 1.5"),
    "audio_block":   ((4, 6),                (2, 6),            "code: patches of frequency x time, as many as the video has blocks"),
    "pred_depth":    (12,                    2,                 "code"),
    "pred_dim":      (384,                   64,                "code; 12 heads of 32"),    # differs: 3 for Tiny, 6 for Small, 12 for Base
    "tau":           ((0.998, 1.0),          (0.998, 1.0),      "code: EMA momentum, linear over the schedule"),
    "clips":         (30_000,                None,              "seed: of Kinetics-400, drawn with seed 0; see --clips"),
    "batch_size":    (24,                    32,                "code"),
    "epochs":        (None,                  None,              "by the steps"),
    "steps":         (2_000,                 1_000,              "seed: stopped there, since the loss rose again"),
    "schedule":      (112_500,               None,              "code: 300 epochs of 300 steps, x 1.25: the run is all warm-up"),
    "lr_start":      (2e-4,                  1e-4,              "code (--size small without --lr: all three a tenth)"),
    "lr":            (6.25e-4,               3e-3,              "code: cosine from here ..."),
    "lr_end":        (1e-6,                  1e-3,              "code: ... to here"),
    "warmup":        (12_000,                100,               "code: steps"),
    "weight_decay":  ((0.04, 0.4),           (0.04, 0.04),      "code: cosine over the schedule; betas (.9, .999)"),
    "clip":          (10.0,                  10.0,              "code: norm of the gradient, after the warm-up"),
}
MODALITIES = {"av": ("video", "audio"), "video": ("video",), "audio": ("audio",)}       # in the order of their tokens


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    common.common_flags(parser, METHOD)
    add = parser.add_argument
    add("--modalities", choices=tuple(MODALITIES), default="av", help="video: the JEPA of one modality that the paper compares with; "
        "everything else is the same")
    add("--mask-per", choices=("clip", "batch"), default="clip", help="batch: one mask set for all clips of a step, which did not converge "
        "for the authors")
    add("--clips", type=int, help="clips of the set that are trained on, drawn with seed 0; 0: all (default: the recipe's)")
    args = parser.parse_args(argv)
    if args.modalities != "av" and not args.out:        # not the folder of the run that it is compared with
        args.out = f"runs/{METHOD}-{args.modalities}-{args.data}-seed{args.seed}"
    recipe = common.read_recipe(args, METHOD, RECIPE, ("seconds", "clips"))
    common.check_range("--clips", recipe["clips"] or 0, 0, 10 ** 9)
    table = {name: row[(args.recipe or ("toy" if args.data == "toy" else "paper")) == "toy"] for name, row in RECIPE.items()}
    tenth = 0.1 if args.size == "small" and args.lr is None and table["size"] != "toy" else 1.0
    ratio = tenth * recipe["lr"] / table["lr"]          # --lr scales the two ends as well
    recipe.update({name: ratio * table[name] for name in ("lr_start", "lr", "lr_end")})
    if args.seconds is not None:                        # by the clock, whatever the frame rate
        recipe["stride"] = None
    recipe.update(modalities=args.modalities, mask_per=args.mask_per)
    if args.data in data.SOUNDS and args.modalities != "audio":
        raise UserError(f"--data {args.data} has no pictures; give --modalities audio, or use ajepa.py")
    if args.data in data.SILENT and args.modalities != "video":
        raise UserError(f"--data {args.data} has no sound; give --modalities video")
    return args, recipe


# ---------------------------------------------------------------------------------------------------------------------
# Views and masks
# ---------------------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds, modalities):
    """One view: pictures of a random stretch, and the sound of exactly these seconds (seed, 5.5)."""
    # differs: the sound of a clip that is too short is filled up with silence, as the pictures are with its last frame
    start = rng.uniform(0, max(0.0, duration - seconds))
    return [data.View(start, seconds, "random" if "video" in modalities else None, "audio" in modalities)]


def draw_set(key, rank, batch, grid, number, size):
    """What `number` blocks of `size` (height, width) at random places hide of a grid: (B, rows x columns) bool, each row the same number,
    never all and never nothing. A pure function of (key, rank, clip). How much is hidden is drawn for the step, the same for all clips
    and ranks; a clip meets it by single patches."""
    # differs: the code cuts all lists to the shortest, which loses the last rows
    rows, cols = np.arange(grid[0]), np.arange(grid[1])

    def hide(rng, times):
        top, left = (rng.integers(n - side + 1, size=(times, number, 1)) for n, side in zip(grid, size))
        down, across = (rows >= top) & (rows < top + size[0]), (cols >= left) & (cols < left + size[1])   # (times, number, side)
        return (down[..., None] & across[..., None, :]).any(1)                                  # (times, rows, columns)

    count, masks = int(hide(np.random.default_rng((*key, 0, 0)), 1).sum()), []          # the step's own; the clips count from 1
    count = min(max(1, count), math.prod(grid) - 1)
    for clip in range(batch):
        rng = np.random.default_rng((*key, rank, 1 + clip))
        some = hide(rng, 5)                             # the one of five that comes nearest, so that single patches are few
        masks.append(common.meet_count(rng, some[np.abs(some.sum((1, 2)) - count).argmin()], count).flatten())
    return np.stack(masks)


def draw_masks(seed, step, rank, batch, grids, recipe):
    """What is visible and what is to be predicted: for each mask set {modality: (context (B, C), target (B, M))}, indices of its tokens.
    A pure function of (seed, step, rank, clip, modality, set). grids: {"video": (T, H, W), "audio": (F, T)}."""
    masks = []
    for s, (number, scale) in enumerate(recipe["video_blocks"]):
        masks.append({})
        for m, grid in grids.items():
            key = (seed, step, 1 + s, ("video", "audio").index(m))
            size = recipe["audio_block"]                                                # "static" (seed, 5.5): of a fixed shape
            if m == "video":                                                            # kin: of one shape in a step
                size = common.block_size(np.random.default_rng((*key, 1)), grid[-2:], (scale, scale), recipe["video_aspect"])
            drawn = draw_set(key, *((0, 1) if recipe["mask_per"] == "batch" else (rank, batch)), grid[-2:], number, size)
            hidden = np.tile(drawn, (batch // len(drawn), grid[0] if m == "video" else 1))      # tubes: over the full time, (B, N)
            order = torch.from_numpy(np.argsort(hidden, 1, kind="stable"))              # visible, then hidden, each in order
            masks[s][m] = order.tensor_split([int((~hidden[0]).sum())], 1)
    return masks


def make_inputs(recipe, listing=None, workers=0):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin over clips of the listing, if there is one."""
    same = {name: recipe[name] for name in ("seconds", "frames", "crop_scale", "sample_rate", "n_fft", "hop", "n_mels", "columns")}
    same.update({"audio": {"frames": 0}, "video": {"n_mels": 0}}.get(recipe["modalities"], {}))
    rate = recipe["frames"] * recipe["stride"] / recipe["seconds"] if recipe["stride"] else None
    inputs = data.Inputs(size=recipe["image"], resize=recipe["image"], win_length=recipe["n_fft"], window="hann", log="db_max",
                         mel_mean=0.0, mel_std=1.0, interpolate=True, frame_rate=rate, **same)
    if listing is None or recipe["modalities"] == "video":
        return inputs
    mean, std = data.mel_stats(listing, inputs, workers, recipe["stats_clips"])
    return replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.clamp_min(recipe["std_floor"]).tolist()))


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same. Positions: 3-D and 2-D sine-cosine (seed)."""
    shapes = {"video": (inputs.frames, inputs.size, inputs.size), "audio": (inputs.n_mels, inputs.mel_frames)}
    patches = {"video": recipe["tubelet"], "audio": recipe["mel_patch"]}
    # differs: a modality embedding as soon as there are two, as in the other scripts; the code has none
    return dict(size=recipe["size"], positions="sincos", checkpoint=checkpoint,
                **{m: dict(shape=shapes[m], patch=patches[m]) for m in MODALITIES[recipe["modalities"]]})


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

def by_modality(h, masks):
    """The context's tokens (B, C, D) of a mask set -> {modality: (B, C, D)}."""
    return dict(zip(masks, h.split([context.shape[1] for context, _ in masks.values()], 1)))


class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each hidden one; an input projection for each modality, and a
    mask token for each modality and mask set (kin); heads of 32 dimensions."""
    def __init__(self, dim, grids, sets, width, depth, checkpoint=False):
        super().__init__()
        self.embed = nn.ModuleDict({m: nn.Linear(dim, width) for m in grids})
        # differs: the code's mask tokens begin at zero
        self.mask_tokens = nn.ParameterDict({m: torch.randn(sets, width) * 0.02 for m in grids})
        self.positions = nn.ModuleDict({m: common.Positions(grid, width, "sincos") for m, grid in grids.items()})
        self.transformer = common.Transformer(width, depth, width // 32, 4 * width, checkpoint=checkpoint)
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, dim)     # code: one head for both
        self.apply(common.init_weights)

    def forward(self, h, masks, s):
        """h (B, C, D): the context's tokens of mask set number s, those of the video first -> {modality: predictions (B, M, D)}."""
        x, targets = [], []
        for m, part in by_modality(h, masks).items():
            e, (context, target) = self.positions[m]().expand(len(h), -1, -1), masks[m]     # (B, N, P)
            x.append(self.embed[m](part) + gather(e, context))                          # (B, C, P)
            targets.append(self.mask_tokens[m][s] + gather(e, target))                  # (B, M, P)
        sizes = [t.shape[1] for t in targets]
        x = self.norm(self.transformer(torch.cat(x + targets, 1)))[:, -sum(sizes):]     # (B, sum of M, P)
        return dict(zip(masks, self.head(x).split(sizes, 1)))                           # each (B, M, D)


class AVJEPA(nn.Module):
    """The context encoder, its EMA, the predictor, and the loss of a batch."""
    def __init__(self, config, sets, pred_dim, pred_depth):
        super().__init__()
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim = self.context_encoder.dim
        self.grids = {m: getattr(self.context_encoder, m).grid for m in ("video", "audio") if getattr(self.context_encoder, m)}
        self.predictor = Predictor(dim, self.grids, sets, pred_dim, pred_depth, self.context_encoder.transformer.checkpoint)
        for m in self.grids:                            # of rank 0's targets: what one knows without any context
            self.register_buffer(f"mean_{m}", torch.zeros(dim))

    def split(self, x):
        """Tokens of all modalities (B, N, D) -> {modality: (B, N, D)}."""
        return dict(zip(self.grids, x.split([math.prod(grid) for grid in self.grids.values()], 1)))

    def see(self, tokens, masks):
        """The context encoder on what a mask set leaves visible of its tokens (B, N, D) -> (B, C, D)."""
        first = math.prod(self.grids["video"]) if "video" in masks else 0               # the sound's tokens stand behind
        visible = torch.cat([context + (first if m == "audio" else 0) for m, (context, _) in masks.items()], 1)
        return self.context_encoder(tokens=tokens, visible=visible)

    def forward(self, video, audio, masks, weight, step):
        """video (B, 3, T, H, W) and/or audio (B, 1, F, T); masks of draw_masks; weight: {modality: (B,)}, of each clip in the mean over
        the clips that have it -> (loss, what the log shows)."""
        # 1 context: the visible tokens of both together, a pass for each mask set
        tokens = self.context_encoder.embed(video, audio)                                       # (B, N, D)
        h = [self.see(tokens, some) for some in masks]                                          # each (B, C, D)
        # 2 target: the teacher is given everything; each token is layer-normed
        with torch.no_grad():
            z = self.target_encoder(video, audio).float()                                       # (B, N, D)
            y = self.split(F.layer_norm(z, z.shape[-1:]))                                       # each (B, N, D)
            for m in self.grids:
                common.follow(getattr(self, f"mean_{m}"), y[m].mean(1), weight[m], step)
        # 3 predict: at the hidden tokens of both, from the context of both
        predictions = [self.predictor(x, some, s) for s, (x, some) in enumerate(zip(h, masks))]
        # 4 loss: the mean over the mask sets, and the sum of the two modalities
        # differs: the code takes one mean over the hidden tokens of both, which leaves 3 to 7 % to the sound; here each has a mean of its
        # own, so that the video's term is that of --modalities video
        losses, nothing = {}, {}
        for m in self.grids:
            pairs = [(prediction[m].float(), gather(y[m], some[m][1])) for prediction, some in zip(predictions, masks)]
            losses[m] = sum(prediction_loss(*pair, weight[m]) for pair in pairs) / len(pairs)
            nothing[m] = sum(prediction_loss(getattr(self, f"mean_{m}"), t, weight[m]) for _, t in pairs) / len(pairs)
        embedding = {m: x.detach().float().mean(1) for m, x in by_modality(h[0], masks[0]).items()}     # each (B, D)
        return sum(losses.values()), {"losses": losses, "nothing": nothing, "embedding": embedding}


def restore(content):
    """The model of a checkpoint (of common.load_checkpoint), with its weights."""
    recipe = content["recipe"]
    model = AVJEPA(content["encoder"], len(recipe["video_blocks"]), recipe["pred_dim"], recipe["pred_depth"])
    common.load_weights(model, content["model"], f"the checkpoint of {METHOD}")
    return model


@torch.no_grad()
def imagine(model, recipe, clips, seed, step):
    """What the pixel probe decodes. clips: {"video": (B, 3, T, H, W), "audio": (B, 1, F, T)}, normalised -> tokens (B, N, D), the context
    encoder's where a patch is visible and the predictor's where it is hidden, and which are hidden (B, N) bool; video's first. The
    masks of draw_masks(seed, step), of mask set number step % sets."""
    for m in clips:
        if m not in model.grids:
            raise UserError(f"--modality: this run's --modalities {recipe['modalities']} has no predictor for {m}")
    batch, sets = len(next(iter(clips.values()))), len(recipe["video_blocks"])
    grids = {m: model.grids[m] for m in model.grids if m in clips}
    device = next(model.parameters()).device
    drawn = draw_masks(seed, step, 0, batch, grids, recipe)[step % sets]
    masks = {m: tuple(x.to(device) for x in drawn[m]) for m in grids}
    h = model.see(model.context_encoder.embed(**clips), masks)                          # (B, C, D)
    predictions, out, hidden = model.predictor(h, masks, step % sets), [], []
    for m, part in by_modality(h, masks).items():
        context, target = masks[m]
        tokens, which = common.assemble(part, context, predictions[m], target)
        out, hidden = [*out, tokens], [*hidden, which]
    return torch.cat(out, 1), torch.cat(hidden, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, weight):
    """L1, the mean over tokens and dimensions, the weighted sum over clips: prediction and target (B, M, D), weight (B,) -> scalar."""
    return (weight * (prediction - target).abs().flatten(1).mean(1)).sum()


def weigh(batches, modalities, process):
    """For each (micro-)batch of a step {modality: (B,)}: the weights of a mean over those clips, of the whole step and all processes, that
    have it: silence is not to be predicted. Times the number of processes, since DDP averages the gradients."""
    # differs: the code takes another clip for one without sound; here it trains the video's term, its own sound at the floor
    has = [{m: b[f"has_{m}"].float() for m in modalities} for b in batches]
    count = process.total(torch.stack([sum(h[m].sum() for h in has) for m in modalities]))
    return [{m: (h[m] * process.world / max(1.0, n)).to(process.device) for m, n in zip(modalities, count.tolist())} for h in has]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args, recipe = get_args(argv)
    process, modalities = common.start_process(args.device), MODALITIES[recipe["modalities"]]
    if process.device.type == "cpu" and recipe["size"] in ("nano", "toy"):
        torch.set_num_threads(1)                        # small operations, and the other core decodes
    inputs = make_inputs(recipe)
    config = encoder_config(recipe, inputs, args.checkpoint_activations)
    common.seed_step(args.seed, 0)
    model = AVJEPA(config, len(recipe["video_blocks"]), recipe["pred_dim"], recipe["pred_depth"]).to(process.device)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, recipe["weight_decay"][0]))

    if args.data == "toy" and process.main:
        data.list_clips("toy", args.data_dir)                                       # rank 0 writes the clips, the others wait
    process.barrier()
    listing = data.list_clips(args.data, args.data_dir)
    described = data.describe(listing)
    if recipe["clips"] and recipe["clips"] < len(listing):
        described += f", of which {recipe['clips']:,} are trained on (--clips)"
        listing = listing.subset(np.sort(np.random.default_rng(0).permutation(len(listing))[:recipe["clips"]]))
    recipe["steps"] = steps = recipe["steps"] or max(1, round(recipe["epochs"] * (len(listing) // recipe["batch_size"])))
    recipe["schedule"] = schedule = max(recipe["schedule"] or 0, steps)
    found, start = common.open_run(args, METHOD, recipe, process), 0
    if found:
        common.load_weights(model, found["model"], args.out)
        common.load_optimizer(optimizer, found["optimizer"], args.out)
        start = found["step"]
    order = data.Batches(len(listing), recipe["batch_size"], args.seed, start, steps, process.rank, process.world, args.accumulate)
    workers = common.default_workers(process) if args.workers is None else args.workers
    inputs = data.Inputs(**found["inputs"]) if found else process.from_main(lambda: make_inputs(recipe, listing, workers))
    found = None                                        # gigabytes, on each rank
    clips = data.Clips(listing, inputs, functools.partial(plan_views, seconds=recipe["seconds"], modalities=modalities), args.seed)
    batches = iter(data.train_loader(clips, order, workers, pin=process.device.type == "cuda"))
    if process.main:
        print(described)
        print(f"AVJEPA, ViT {recipe['size']}, {' + '.join(f'{math.prod(model.grids[m]):,} {m}' for m in modalities)} tokens, "
              f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters and a teacher, {steps:,} steps of "
              f"{recipe['batch_size']} clips, {process.world} x {process.device.type}{' bf16' if process.bf16 else ''} -> {args.out}")
        if start:
            print(f"going on at step {start:,} of {steps:,}")
    if args.compile:
        model.context_encoder.compile(), model.target_encoder.compile()

    def save(step):                                     # weights, differs: the code evaluates the teacher's (probe.py --encoder target)
        if process.main:
            common.save_checkpoint(Path(args.out) / "latest.pt", method=METHOD, step=step, steps=steps, args=vars(args), recipe=recipe,
                                   inputs=asdict(inputs), encoder=config, projector=None, weights="context_encoder",
                                   model=model.state_dict(), optimizer=optimizer.state_dict())

    wrapped, stop = process.wrap(model), common.StopSignal()
    log, troubles = common.Log(args.out, start, process), data.Troubles(len(listing), args.max_bad)
    names = (*modalities, *(f"{m}/know_nothing" for m in modalities))
    panel = ("loss", *((m, f"{m}/know_nothing") for m in modalities), *(f"rank_{m}" for m in modalities),
             *(f"std_{m}" for m in modalities), "grad_norm", "tau", "lr", "ms_data", "ms_step")
    began, data_s, logged, collapsed, learnt = time.time(), 0.0, start, False, set()
    draw = functools.partial(draw_masks, args.seed, rank=process.rank, batch=recipe["batch_size"] // process.world, grids=model.grids,
                             recipe=recipe)
    pool = ThreadPoolExecutor(1)                        # draws the masks of the next step (.3 ms a clip) while this one computes
    ahead = pool.submit(draw, start)
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=not process.main):
        lr = common.warmup_cosine(step, schedule, recipe["warmup"], recipe["lr"], recipe["lr_start"], recipe["lr_end"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = common.cosine(step, schedule, *recipe["weight_decay"])
        clock, parts = time.time(), []
        masks, ahead = ahead.result(), pool.submit(draw, step + 1) if step + 1 < steps else None
        masks = [{m: [x.to(process.device).chunk(args.accumulate) for x in pair] for m, pair in some.items()} for some in masks]
        some = [next(batches) for _ in range(args.accumulate)]                      # all at once: weigh counts over the whole step
        for batch in some:
            troubles.add(batch)
        weights = weigh(some, modalities, process)
        data_s += time.time() - clock
        for micro, (batch, weight) in enumerate(zip(some, weights)):
            batch = data.to_device(batch, process.device)
            hidden = [{m: (context[micro], target[micro]) for m, (context, target) in each.items()} for each in masks]
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                with process.autocast():
                    loss, part = wrapped(batch.get("video"), batch.get("audio"), hidden, weight, step)
                loss.backward()
            values = [loss, *(part[name][m] for name in ("losses", "nothing") for m in modalities)]
            parts.append({"values": torch.stack(values).detach(), **part["embedding"]})
        clip = recipe["clip"] if step >= recipe["warmup"] else math.inf             # differs: of all together, not of each part
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if process.any(not math.isfinite(loss.item() + grad_norm.item())):
            raise UserError(f"the loss or its gradient is not finite at step {step}; the last good checkpoint in {args.out} is kept; "
                            "give a new --out and a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        tau = recipe["tau"][0] + (recipe["tau"][1] - recipe["tau"][0]) * step / schedule
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            values = (process.total(sum(p["values"] for p in parts)) / process.world).tolist()
            row = {"step": step, **dict(zip(("loss", *names), values))}
            for m in modalities:
                row[f"std_{m}"], row[f"rank_{m}"] = common.health(common.gather_ranks(torch.cat([p[m] for p in parts])))
            count, seconds = step + 1 - logged, time.time() - began
            row.update({"grad_norm": grad_norm.item(), "tau": tau, "lr": lr, "ms_data": 1e3 * data_s / count,
                        "ms_step": 1e3 * seconds / count, **troubles.row()})
            log.write(row, ("step", *panel))
            learnt |= {m for m in modalities if row[f"{m}/know_nothing"]}
            if logged - start < 50 <= step + 1 - start and learnt != set(modalities) and process.main:
                tqdm.write(f"WARNING at step {step}: no clip so far has {' or '.join(set(modalities) - learnt)}, nothing is "
                           "learnt of it; give another --modalities")
            low = [m for m in modalities if row[f"std_{m}"] < 0.02]
            if low and not collapsed and process.main:
                tqdm.write(f"COLLAPSE at step {step}: the embeddings' std of {' and '.join(low)} is below .02; lower --lr")
            began, data_s, logged, collapsed = time.time(), 0.0, step + 1, bool(low)
        stopping = process.any(stop)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stopping:
            save(step + 1)
        if stopping and step + 1 < steps:
            if process.main:
                tqdm.write(f"stopped after step {step + 1} of {steps}, saved to {args.out}; the same command goes on from there")
            return
    stop.release(), pool.shutdown()
    if process.main:
        common.draw_curves(f"{args.out}/curves.png", {"": common.read_log(args.out)},
                           f"AVJEPA, {args.modalities}, {args.data}, seed {args.seed}, {steps} steps")
        print(f"trained {steps:,} steps: {args.out}/latest.pt, log.jsonl, curves.png")
        if args.data == "toy":
            probe.toy_report(args.out, args.data_dir, process, workers)


if __name__ == "__main__":
    common.main_guard(main)
