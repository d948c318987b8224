"""A-JEPA: Joint-Embedding Predictive Architecture Can Listen (arXiv 2311.15830).

Blocks of time and frequency of a mel spectrogram are hidden. From the patches that stay visible, a predictor says what an EMA
teacher, which hears everything, represents at the hidden ones. Nothing is reconstructed and there are no negatives.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python ajepa.py                                                                  # the sound of the toy clips, a laptop, minutes
    python ajepa.py --data folder --data-dir clips/ --recipe toy                     # your own sounds, the small model
    python ajepa.py --data audioset-20k --data-dir audioset/ --accumulate 8          # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 ajepa.py --data audioset --data-dir audioset/
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        ajepa.py --data audioset --data-dir audioset/                                # the same line on each node
"""
import argparse, contextlib, copy, functools, math, time
from dataclasses import asdict, replace
from pathlib import Path

import common, data, probe                              # before torch: common sets how its threads wait
from common import UserError, ViT, gather, nearest

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

METHOD = "ajepa"

# Sources: seed = the document that we implement, paper = a third party's reading of the paper itself.
RECIPE = {
    # name           paper                 toy             source of the paper's value
    "size":         ("base",               "toy",          "seed: ViT-B, 12 x 768, 12 heads, MLP 3072"),
    "seconds":      (10.0,                 3.84,           "seed: length of a clip, padded or cropped"),
    "n_fft":        (512,                  512,            "seed: 16 kHz, window of 400 samples; log(mel + 1e-6)"),
    "hop":          (160,                  160,            "seed: samples from one mel frame to the next"),
    "n_mels":       (128,                  64,             "seed"),
    "columns":      (1024,                 384,            "seed: 10 s are 1,001 frames, padded to 1,024"),
    "std_floor":    (0.1,                  0.1,            ""),    # unspecified: the lowest filter is empty, its std is 0
    "stats_clips":  (10000,                512,            ""),    # differs: a sample of the training set, drawn with seed 0
    "mel_patch":    ((16, 16),             (16, 16),       "seed: 8 x 64 = 512 tokens (toy: 4 x 24 = 96)"),
    "pos":          ("learned",            "learned",      "seed (paper: sincos)"),     # unspecified: frequency + time
    "masking":      ("multiblock",         "multiblock",   "seed: 4 blocks a clip"),
    "block_scale":  ((0.15, 0.2),          (0.15, 0.2),    "seed: area of a block, of the grid"),
    "block_aspect": ((0.75, 1.5),          (0.75, 1.5),    "seed: time over frequency"),    # unspecified: see aspect_range
    "hidden":       ((0.6, 0.75),          (0.6, 0.75),    "seed: share that the union of the blocks hides"),
    "pred_depth":   (6,                    3,              "seed (paper: 16); with this width 11 M parameters, not the seed's ~22 M"),
    "pred_dim":     (384,                  64,             "seed: 12 heads, 32 dimensions each (paper: 512)"),
    "loss":         ("smooth_l1",          "smooth_l1",    "seed: beta 1 (paper: l2)"),
    "tau":          ((0.996, 0.9999),      (0.996, 0.999), "seed: EMA momentum, on a cosine"),
    "batch_size":   (256,                  64,             "seed: effective, across GPUs"),
    "epochs":       (400,                  None,           "seed: 300 to 400"),
    "steps":        (None,                 1000,           "by the epochs"),
    "lr":           (1.5e-4,               5e-4,           "seed: peak; cosine"),    # unspecified: to 0, and not scaled by the batch
    "warmup":       (0.1,                  0.2,            "seed: 40 epochs of 400, as a share of the steps"),
    "betas":        ((0.9, 0.95),          (0.9, 0.95),    "seed: AdamW"),
    "weight_decay": (0.05,                 0.05,           "seed"),    # unspecified: on matrices only
}
PANEL = ("loss", "know_nothing", "embedding_std", "effective_rank", "kept", "singles", "grad_norm", "tau", "lr", "ms_data", "ms_step")
MASKINGS = ("multiblock", "block", "random", "time", "freq", "curriculum")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    common.common_flags(parser, METHOD)
    add = parser.add_argument
    add("--masking", choices=MASKINGS, help="4 blocks, a single one, random patches, strips of time or of frequency, or the paper's "
        "curriculum from random to time-frequency masks (default: the recipe's)")
    add("--mask-ratio", type=float, help="share of the patches that is hidden (default: drawn from .6 to .75 for each step)")
    add("--block-aspect", choices=("grid", "patch"), help="aspect of a block relative to the grid (default), or counted in patches")
    add("--tf-removes", choices=("time", "freq", "both"), help="curriculum: what the context loses beside the targets (default: both)")
    add("--pred-depth", type=int, help="layers of the predictor (default: the recipe's)")
    add("--pred-dim", type=int, help="width of the predictor, in heads of 32 (default: the recipe's)")
    add("--loss", choices=("smooth_l1", "l2", "l1", "cosine"), help="(default: the recipe's)")
    add("--pos", choices=("learned", "sincos"), help="positions of the encoder and the predictor (default: the recipe's)")
    args = parser.parse_args(argv)
    recipe = common.read_recipe(args, METHOD, RECIPE, ("seconds", "masking", "pred_depth", "pred_dim", "loss", "pos"))
    common.check_range("--pred-depth", recipe["pred_depth"], 1, 1000), common.check_range("--pred-dim", recipe["pred_dim"], 32, 10 ** 5)
    if recipe["pred_dim"] % 32:
        raise UserError(f"--pred-dim {recipe['pred_dim']}: not a multiple of 32, the width of a head")
    if args.mask_ratio is not None:
        common.check_range("--mask-ratio", args.mask_ratio, 0.01, 0.99)
        if recipe["masking"] == "curriculum":
            raise UserError("--mask-ratio: the curriculum has ratios of its own; give another --masking")
        recipe["hidden"] = (args.mask_ratio, args.mask_ratio)
    if (recipe["seconds"], recipe["columns"]) not in zip(RECIPE["seconds"][:2], RECIPE["columns"][:2]):     # --seconds, of another length
        recipe["columns"] = None                        # as many as it gives, filled up to whole patches
    if args.tf_removes and recipe["masking"] != "curriculum":
        raise UserError("--tf-removes has no effect without --masking curriculum")
    if args.block_aspect and recipe["masking"] in ("random", "time", "freq"):
        raise UserError(f"--block-aspect has no effect on --masking {recipe['masking']}, which has no blocks")
    if args.data in data.SILENT:
        raise UserError(f"--data {args.data} has no sound; mjepa.py --terms separate-video trains on pictures alone")
    recipe.update(aspect_of=args.block_aspect or "grid", tf_removes=args.tf_removes or "both")
    return args, recipe


# ---------------------------------------------------------------------------------------------------------------------
# Views and masks
# ---------------------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds):
    """One view: the sound of the clip, a random stretch if it is longer. No augmentation (seed, section 7)."""
    # unspecified: what is cut off a long clip (here random), and what fills up a short one (digital silence, before the log); a clip
    # without sound is silence, and counted in the log
    return [data.View(rng.uniform(0, max(0.0, duration - seconds)), seconds, None, True)]


def aspect_range(grid, recipe):
    """The range of a block's width over its height, in patches."""
    # unspecified: an aspect counted in patches asks a grid of 8 rows for blocks 8 to 12 rows high: clamped, they lose a third of their
    # area; with the excess handed over to the width (--block-aspect patch), the four become strips of time. Relative to the grid,
    # rows = 8 sqrt(s / a) and columns = 64 sqrt(s a), areas and aspects stay as drawn: blocks of about 3 x 28.
    return [a * (grid[1] / grid[0] if recipe["aspect_of"] == "grid" else 1) for a in recipe["block_aspect"]]


def block_sizes(rng, grid, recipe):
    """(height, width) of each block of one clip; height is frequency, width is time."""
    rows, cols = grid
    # unspecified: with another share of hidden patches the blocks grow or shrink with it
    scale = [s * sum(recipe["hidden"]) / sum(RECIPE["hidden"][0]) for s in recipe["block_scale"]]
    if recipe["masking"] == "multiblock":
        return [common.block_size(rng, grid, scale, aspect_range(grid, recipe)) for _ in range(4)]
    if recipe["masking"] == "block":
        return [common.block_size(rng, grid, recipe["hidden"], aspect_range(grid, recipe))]
    if recipe["masking"] == "time":
        return [(rows, min(cols, max(1, round(rng.uniform(*scale) * cols)))) for _ in range(4)]
    return [(min(rows, max(1, round(rng.uniform(*scale) * rows))), cols) for _ in range(4)]


def hide_blocks(rng, grid, recipe, low, high):
    """A mask whose blocks together hide `low` to `high` patches: (rows, columns) bool."""
    if recipe["masking"] == "random":
        return common.meet_count(rng, np.zeros(grid, bool), int(rng.integers(low, high + 1)))
    # unspecified: four blocks of .15 to .2 that overlap freely hide only 40 to 52 %. Here a block goes where it overlaps the earlier ones
    # least, and all are drawn anew until their union is in range; where none of 50 draws is (one clip in 200, or an extreme
    # --mask-ratio), the nearest. The middle is hidden most (up to 99 %, free overlap: 94 %), the corners least (22 %, free: 4 %).
    def draw():
        mask = np.zeros(grid, bool)
        for size in block_sizes(rng, grid, recipe):
            # unspecified: how many strips; of the blocks' areas, at most four, as many as it takes
            if recipe["masking"] not in ("time", "freq") or mask.sum() < low:
                mask |= common.cover(grid, [common.place_apart(rng, mask, size)])
        return mask

    return nearest((draw() for _ in range(50)), lambda mask: max(low - int(mask.sum()), int(mask.sum()) - high, 0))


def hide_curriculum(rng, grid, recipe, time_frequency):
    """(targets, what the context lacks), each (rows, columns) bool: the paper's random block mask, or its time-frequency aware one."""
    (rows, cols), aspect = grid, aspect_range(grid, recipe)
    count, scale = (3, (0.05, 0.075)) if time_frequency else (4, recipe["block_scale"])
    for _ in range(1000):
        targets = common.cover(grid, [common.draw_block(rng, grid, scale, aspect) for _ in range(count)])
        hidden = targets.copy()
        if time_frequency and recipe["tf_removes"] in ("time", "both"):
            hidden |= targets.any(0, keepdims=True)
        if time_frequency and recipe["tf_removes"] in ("freq", "both"):
            hidden |= targets.any(1, keepdims=True)
        if not hidden.all():
            return targets, hidden
    raise UserError(f"--masking curriculum: its masks leave no context on a grid of {rows} x {cols} patches; raise --seconds, or give "
                    "another --tf-removes")


def draw_masks(seed, step, rank, batch, grid, recipe, progress=0.0):
    """Which patches are visible and which are targets: context (B, C) and target (B, M) indices, and what the log shows. A pure
    function of (seed, step, rank, clip). How many are hidden is drawn from (seed, step), the same for all clips and ranks; each
    clip meets it by single random patches. progress: 0 to 1, where the curriculum stands. kept: share of the patches that the context
    has; singles: single patches of a clip."""
    def stream(*numbers):                               # (0, 0) is the step's own, so the clips count from 1
        return np.random.default_rng((seed, step, *numbers))

    own, total, pairs, singles = stream(0, 0), math.prod(grid), [], 0
    # unspecified: a clip's own blocks come within 2 % of the grid of the step's number, the single patches do the rest
    near = 0 if recipe["masking"] == "random" else round(0.02 * total)
    if recipe["masking"] == "curriculum":
        # p = min(1, sqrt(s (1 - c0^2) / S) + c0^2), c0 = .01 (paper): one draw for all clips of a step
        time_frequency = own.random() < min(1.0, math.sqrt(progress * (1 - 0.01 ** 2)) + 0.01 ** 2)
        num_targets, num_hidden = (int(mask.sum()) for mask in hide_curriculum(own, grid, recipe, time_frequency))
    else:
        low, high = math.ceil(recipe["hidden"][0] * total - 1e-6), math.floor(recipe["hidden"][1] * total + 1e-6)
        if recipe["hidden"][0] == recipe["hidden"][1]:  # --mask-ratio
            num_hidden, low, high = round(recipe["hidden"][0] * total), 0, total
        else:
            num_hidden = min(max(low, int(hide_blocks(own, grid, recipe, low, high).sum())), max(low, high))
        num_hidden = num_targets = min(max(1, num_hidden), total - 1)
    for clip in range(batch):
        rng = stream(rank, 1 + clip)
        if recipe["masking"] == "curriculum":
            some = (hide_curriculum(rng, grid, recipe, time_frequency) for _ in range(50))
            drawn, lacks = nearest(some, lambda pair: abs(int(pair[1].sum()) - num_hidden), near)
        else:
            drawn = lacks = hide_blocks(rng, grid, recipe, max(low, num_hidden - near), min(high, num_hidden + near))
        targets = common.meet_count(rng, drawn, num_targets)
        hidden = common.meet_count(rng, lacks | targets, num_hidden, keep=targets)
        singles += int(((hidden != lacks) | (targets != drawn)).sum()) / batch
        pairs.append((np.flatnonzero(~hidden), np.flatnonzero(targets)))
    context, target = (torch.from_numpy(np.stack(indices)) for indices in zip(*pairs))
    return context, target, {"kept": 1 - num_hidden / total, "singles": singles}


def make_inputs(recipe, listing=None, workers=0):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin over clips of the listing, if there is one."""
    # unspecified: the window (Hann), the mel scale (HTK)
    same, patch = {name: recipe[name] for name in ("seconds", "n_fft", "hop", "n_mels")}, recipe["mel_patch"][1]
    inputs = data.Inputs(frames=0, sample_rate=16000, win_length=400, window="hann", log="ln", mel_mean=0.0, mel_std=1.0, **same)
    inputs = replace(inputs, columns=recipe["columns"] or math.ceil(inputs.mel_frames / patch) * patch)
    if listing is None:
        return inputs
    mean, std = data.mel_stats(listing, inputs, workers, recipe["stats_clips"])
    return replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.clamp_min(recipe["std_floor"]).tolist()))


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same."""
    return dict(size=recipe["size"], audio=dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"]),
                positions={"learned": "factorised", "sincos": "sincos"}[recipe["pos"]], checkpoint=checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each target; heads of 32 dimensions."""
    def __init__(self, dim, grid, width, depth, positions):
        super().__init__()
        self.embed, self.mask_token = nn.Linear(dim, width), nn.Parameter(torch.randn(width) * 0.02)
        self.positions = common.Positions(grid, width, positions)
        self.transformer, self.norm = common.Transformer(width, depth, width // 32, 4 * width), nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, dim)
        self.apply(common.init_weights)

    def forward(self, h, context, target):
        """h (B, C, D) at the patches context (B, C) -> predictions (B, M, D) at the patches target (B, M)."""
        e = self.positions().expand(len(h), -1, -1)                             # (B, N, P)
        m = self.mask_token + gather(e, target)                                 # (B, M, P)
        x = torch.cat([self.embed(h) + gather(e, context), m], 1)               # (B, C + M, P)
        x = self.norm(self.transformer(x))[:, context.shape[1]:]                # (B, M, P)
        return self.head(x)                                                     # (B, M, D)


class AJEPA(nn.Module):
    """The context encoder, its EMA, the predictor, and the loss of a batch."""
    def __init__(self, config, pred_dim, pred_depth, loss):
        super().__init__()
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim, grid = self.context_encoder.dim, self.context_encoder.audio.grid
        self.predictor, self.loss = Predictor(dim, grid, pred_dim, pred_depth, config["positions"]), loss
        self.register_buffer("running_mean", torch.zeros(dim))                  # of rank 0's targets: what one knows without any context

    def forward(self, mel, context, target, step):
        """mel (B, 1, F, T), the patches visible (B, C) and to be predicted (B, M) -> (loss, what the log shows)."""
        # 1 context: the visible patches alone
        h = self.context_encoder(audio=mel, visible=context)                    # (B, C, D)
        # 2 target: the teacher hears everything; each target is layer-normed
        with torch.no_grad():
            z = self.target_encoder(audio=mel).float()                          # (B, N, D)
            y = F.layer_norm(gather(z, target), z.shape[-1:])                   # (B, M, D)
        # 3 predict: at the hidden patches, from the context
        prediction = self.predictor(h, context, target)                         # (B, M, D)
        # 4 loss
        self.running_mean.lerp_(y.mean((0, 1)), max(0.01, 1 / (step + 1)))
        nothing = prediction_loss(self.running_mean.expand_as(y), y, self.loss)
        return prediction_loss(prediction.float(), y, self.loss), {"know_nothing": nothing, "z": z.mean(1)}


def restore(content):
    """The model of a checkpoint (of common.load_checkpoint), with its weights."""
    recipe = content["recipe"]
    model = AJEPA(content["encoder"], recipe["pred_dim"], recipe["pred_depth"], recipe["loss"])
    common.load_weights(model, content["model"], f"the checkpoint of {METHOD}")
    return model


@torch.no_grad()
def imagine(model, recipe, clips, seed, step):
    """What the pixel probe decodes. clips: {"audio": (B, 1, F, T)}, normalised -> tokens (B, N, D), the context encoder's where a patch is
    visible and the predictor's where it is hidden, and which are hidden, (B, N) bool. The masks of draw_masks(seed, step); hidden is all
    that the context lacks, with the curriculum (at its end) more than the targets."""
    mel, grid = clips["audio"], model.context_encoder.audio.grid
    context = draw_masks(seed, step, 0, len(mel), grid, recipe, progress=1.0)[0]            # (B, C)
    lacks = torch.ones(len(mel), math.prod(grid), dtype=torch.bool).scatter(1, context, False)
    context, target = context.to(mel.device), lacks.nonzero()[:, 1].view(len(mel), -1).to(mel.device)
    h = model.context_encoder(audio=mel, visible=context)                                   # (B, C, D)
    return common.assemble(h, context, model.predictor(h, context, target), target)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, kind="smooth_l1"):
    """Mean over clips, patches and dimensions of the distance of prediction and target (B, M, D): smooth L1 with beta 1 (seed, 4.5), or
    what its table of losses compares with."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()
    return {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss, "l1": F.l1_loss}[kind](prediction, target)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args, recipe = get_args(argv)
    process = common.start_process(args.device)
    inputs = make_inputs(recipe)
    config = encoder_config(recipe, inputs, args.checkpoint_activations)
    common.seed_step(args.seed, 0)
    model = AJEPA(config, recipe["pred_dim"], recipe["pred_depth"], recipe["loss"]).to(process.device)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, recipe["weight_decay"]), betas=recipe["betas"])

    if args.data == "toy" and process.main:
        data.list_clips("toy", args.data_dir)                                       # rank 0 writes the clips, the others wait
    process.barrier()
    listing = data.list_clips(args.data, args.data_dir)
    recipe["steps"] = steps = recipe["steps"] or max(1, round(recipe["epochs"] * (len(listing) // recipe["batch_size"])))
    found, start = common.open_run(args, METHOD, recipe, process), 0
    if found:
        common.load_weights(model, found["model"], args.out)
        common.load_optimizer(optimizer, found["optimizer"], args.out)
        start = found["step"]
    order = data.Batches(len(listing), recipe["batch_size"], args.seed, start, steps, process.rank, process.world, args.accumulate)
    workers = common.default_workers(process) if args.workers is None else args.workers
    inputs = data.Inputs(**found["inputs"]) if found else process.from_main(lambda: make_inputs(recipe, listing, workers))
    clips = data.Clips(listing, inputs, functools.partial(plan_views, seconds=recipe["seconds"]), args.seed)
    batches = iter(data.train_loader(clips, order, workers, pin=process.device.type == "cuda"))
    grid = model.context_encoder.audio.grid
    if process.main:
        print(data.describe(listing))
        print(f"A-JEPA, ViT {recipe['size']}, {grid[0]} x {grid[1]} = {math.prod(grid):,} tokens, "
              f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters and a teacher, {steps:,} steps of "
              f"{recipe['batch_size']} clips, {process.world} x {process.device.type}{' bf16' if process.bf16 else ''} -> {args.out}")
        if start:
            print(f"going on at step {start:,} of {steps:,}")
    if args.compile:
        model.context_encoder.compile(), model.target_encoder.compile()

    def save(step):                                     # weights: the seed names the context encoder, and the teacher as well
        if process.main:
            common.save_checkpoint(Path(args.out) / "latest.pt", method=METHOD, step=step, steps=steps, args=vars(args), recipe=recipe,
                                   inputs=asdict(inputs), encoder=config, projector=None, weights="context_encoder",
                                   model=model.state_dict(), optimizer=optimizer.state_dict())

    wrapped, stop = process.wrap(model), common.StopSignal()
    log, troubles = common.Log(args.out, start, process), data.Troubles(len(listing), args.max_bad)
    began, data_s, logged, collapsed = time.time(), 0.0, start, False
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=not process.main):
        lr = common.warmup_cosine(step, steps, max(1, round(recipe["warmup"] * steps)), recipe["lr"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock, z = time.time(), []
        mine = recipe["batch_size"] // process.world
        context, target, masks = draw_masks(args.seed, step, process.rank, mine, grid, recipe, step / steps)
        hidden = zip(context.to(process.device).chunk(args.accumulate), target.to(process.device).chunk(args.accumulate))
        for micro, (context, target) in enumerate(hidden):
            batch = next(batches)
            troubles.add(batch)
            mel = data.to_device(batch, process.device)["audio"]
            data_s += time.time() - clock
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                with process.autocast():
                    loss, parts = wrapped(mel, context, target, step)
                (loss / args.accumulate).backward()
            clock, z = time.time(), [*z, parts["z"]]
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])     # no clipping: not in the seed
        if process.any(not math.isfinite(loss.item() + grad_norm.item())):
            raise UserError(f"the loss or its gradient is not finite at step {step}; the last good checkpoint in {args.out} is kept; "
                            "give a new --out and a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        tau = common.cosine(step, steps, *recipe["tau"])
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            std, rank = common.health(common.gather_ranks(torch.cat(z)))
            count, seconds = step + 1 - logged, time.time() - began
            log.write({"step": step, "loss": loss.item(), "know_nothing": parts["know_nothing"].item(), "embedding_std": std,
                       "effective_rank": rank, **masks, "grad_norm": grad_norm.item(), "tau": tau, "lr": lr,
                       "ms_data": 1e3 * data_s / count, "ms_step": 1e3 * seconds / count, **troubles.row()}, ("step", *PANEL))
            if std < 0.02 and not collapsed and process.main:
                tqdm.write(f"COLLAPSE at step {step}: the embeddings' std is {std:.3f}, effective rank {rank:.1f}; lower --lr")
            began, data_s, logged, collapsed = time.time(), 0.0, step + 1, std < 0.02
        stopping = process.any(stop)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stopping:
            save(step + 1)
        if stopping and step + 1 < steps:
            if process.main:
                tqdm.write(f"stopped after step {step + 1} of {steps}, saved to {args.out}; the same command goes on from there")
            return
    stop.release()
    if process.main:
        common.draw_curves(f"{args.out}/curves.png", {"": common.read_log(args.out)},
                           f"A-JEPA, {args.data}, seed {args.seed}, {steps} steps")
        print(f"trained {steps:,} steps: {args.out}/latest.pt, log.jsonl, curves.png")
        if args.data == "toy":
            probe.toy_report(args.out, args.data_dir, process, workers)


if __name__ == "__main__":
    common.main_guard(main)
