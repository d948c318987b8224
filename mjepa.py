"""MJEPA: A Simple and Scalable Joint-Embedding Predictive Architecture for Audio-Visual Learning (arXiv 2606.25225).

One ViT takes the tokens of a sound, of a video, or of both. From what is visible of each input, it is predicted what an EMA teacher
represents of the hidden rest (within: audio, video, both) and of the clip as another input shows it (across: six directions). One
objective, nine terms, no weights, no negatives, no reconstruction.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python mjepa.py                                                                  # toy clips, a laptop, minutes
    python mjepa.py --data folder --data-dir clips/ --recipe toy                     # your own clips, the small model
    python mjepa.py --data audioset-20k --data-dir audioset/ --accumulate 16 --checkpoint-activations        # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 mjepa.py --data audioset --data-dir audioset/ --checkpoint-activations
    torchrun --nproc_per_node=8 mjepa.py --data audioset --data-dir audioset/ --cooldown --init runs/mjepa-audioset-seed0 \\
        --accumulate 8 --checkpoint-activations
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        mjepa.py --data audioset --data-dir audioset/ --size giant --checkpoint-activations                  # the same line on each node
"""
import argparse, contextlib, copy, functools, math, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import common, data, probe                              # before torch: common sets how its threads wait
from common import UserError, ViT, gather, nearest

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

METHOD = "mjepa"

# Sources: seed = the document that we implement, digest = a third party's reading of the paper, issues = the authors' issue tracker,
# kin = V-JEPA 2, on which the authors build, where nothing says more.
RECIPE = {
    # name            paper                  toy                source of the paper's value
    "size":          ("large",               "toy",             "digest: ViT-L (seed: ViT-g, --size giant)"),
    "seconds":       (10.0,                  1.92,              "issues: of sound, the full clip (toy: half of it)"),
    "video_seconds": (4.0,                   1.28,              "issues: of pictures, a random stretch of what is heard"),
    "frames":        (16,                    8,                 "issues: 4 a second"),
    "image":         (224,                   48,                "issues"),
    "crop_scale":    ((0.3, 1.0),            (0.7, 1.0),        "kin: random resized crop, and flip (toy: size is a cause)"),
    "tubelet":       ((2, 16, 16),           (4, 12, 12),       "kin: 8 x 14 x 14 = 1,568 tokens (toy: 2 x 4 x 4 = 32)"),
    "n_fft":         (512,                   512,               "A-JEPA's front end, for want of one"),    # unspecified: the sound
    "hop":           (160,                   160,               "A-JEPA: samples from one mel frame to the next, at 16 kHz"),
    "n_mels":        (128,                   64,                "A-JEPA"),
    "columns":       (1024,                  192,               "A-JEPA: 10 s are 1,001 frames, padded to 1,024"),
    "std_floor":     (0.1,                   0.1,               "A-JEPA"),
    "stats_clips":   (10000,                 512,               "A-JEPA: clips for mean and std of the mel"),
    "mel_patch":     ((16, 16),              (16, 16),          "A-JEPA: 8 x 64 = 512 tokens (toy: 4 x 12 = 48)"),
    "positions":     ("factorised",          "factorised",      ""),    # unspecified: learned; V-JEPA 2 has rotary ones
    "video_blocks":  (((8, 0.15), (2, 0.7)), ((8, 0.15), (2, 0.7)), "kin: a mask set each: how many, their area of the frame"),
    "video_aspect":  ((1 / 1.5, 1 / 0.75),   (0.75, 1.5),       "kin: width over height (its own, height over width: .75 to 1.5)"),
    "audio_scale":   ((0.15, 0.2),           (0.15, 0.2),       "A-JEPA: 4 blocks, their area of the mel"),
    "audio_aspect":  ((0.75, 1.5),           (0.75, 1.5),       "A-JEPA: time over frequency, relative to the grid"),
    "audio_hidden":  ((0.6, 0.75),           (0.6, 0.75),       "A-JEPA: share that the union of the blocks hides"),
    "levels":        (4,                     2,                 "kin: of 24 layers 5, 11, 17, 23"),
    "pred_depth":    (12,                    2,                 "kin"),
    "pred_dim":      (384,                   64,                "kin: 12 heads of 32 dimensions"),
    "tau":           (0.99925,               0.9995,            "kin: EMA momentum, constant (toy: 3/4 of it is still the start)"),
    "batch_size":    (512,                   32,                "issues"),
    "epochs":        (None,                  None,              "by the steps"),
    "steps":         (150_000,               600,               "issues: 500 epochs of 300 steps"),
    "lr_start":      (1e-4,                  1e-4,              "kin"),
    "lr":            (5.25e-4,               2e-3,              "kin: constant after the warm-up"),
    "warmup":        (12_000,                100,               "kin: steps"),
    "weight_decay":  (0.04,                  0.04,              "kin"),    # unspecified: betas, torch's own
}
COOLDOWN = {                                            # --cooldown puts these in the place of the values above
    "frames":        (64,                    32,                "digest"),
    "video_seconds": (10.0,                  1.92,              ""),    # unspecified: at 4 a second, 64 frames outlast a clip
    "steps":         (12_000,                60,                "digest"),
    "lr_end":        (1e-6,                  1e-6,              "kin: linear, aimed at 15,000 steps, so that it ends at 1.06e-4"),
}
INTRA, CROSS = ("a", "v", "av"), ("a->v", "v->a", "a->av", "av->a", "v->av", "av->v")
TERMS = {"separate-audio": ("a",), "separate-video": ("v",), "intra": INTRA, "intra+av": (*INTRA, "a->v", "v->a"), "all": (*INTRA, *CROSS)}
MODALITIES = {"a": ("audio",), "v": ("video",), "av": ("video", "audio")}       # of an input, in the order of their tokens


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    common.common_flags(parser, METHOD)
    add = parser.add_argument
    add("--terms", choices=tuple(TERMS), default="all", help="rows of the paper's ablation: an encoder for one modality alone, the three "
        "terms within, those and audio<->video, or all nine")
    add("--aligned", action="store_true", help="sound of the pictures' span alone (default: sound of the full clip, pictures of a part)")
    add("--cooldown", action="store_true", help="the last phase: four times the frames, a learning rate that falls from --lr; needs --init")
    add("--init", metavar="FILE", help="checkpoint of this method, or its folder, whose weights a new run starts from")
    args = parser.parse_args(argv)
    if args.cooldown and not args.init:
        raise UserError("--cooldown needs --init, the checkpoint that it starts from")
    if args.cooldown and not args.out:                  # not the folder of the run that it goes on from
        args.out = f"runs/{METHOD}-cooldown-{args.data}-seed{args.seed}"
    table = {**RECIPE, **(COOLDOWN if args.cooldown else {}), **({"video_seconds": RECIPE["video_seconds"]} if args.aligned else {})}
    recipe = common.read_recipe(args, METHOD, table, ("seconds",))
    recipe["video_seconds"] = min(recipe["video_seconds"], recipe["seconds"])
    if args.aligned:
        recipe["seconds"] = recipe["video_seconds"]
    if (recipe["seconds"], recipe["columns"]) not in zip(RECIPE["seconds"][:2], RECIPE["columns"][:2]):     # of another length
        recipe["columns"] = None                        # as many as it gives, filled up to whole patches
    recipe.update(terms=args.terms, aligned=args.aligned, cooldown=args.cooldown)
    if args.init and Path(args.out).resolve() == (Path(args.init) if Path(args.init).is_dir() else Path(args.init).parent).resolve():
        raise UserError(f"--init {args.init} lies in --out {args.out}, where it would be written over; give another --out")
    if args.data in data.SOUNDS and args.terms != "separate-audio":
        raise UserError(f"--data {args.data} has no pictures; give --terms separate-audio, or use ajepa.py")
    if args.data in data.SILENT and args.terms != "separate-video":
        raise UserError(f"--data {args.data} has no sound; give --terms separate-video")
    return args, recipe


# ---------------------------------------------------------------------------------------------------------------------
# Views and masks
# ---------------------------------------------------------------------------------------------------------------------

def inputs_of(terms):
    """The kinds of input that some terms need: of "a", "v", "av"."""
    return [kind for kind in MODALITIES if any(kind in term.split("->") for term in terms)]


def plan_views(rng, duration, seconds, video_seconds, modalities):
    """One view: the sound of the clip, and pictures of a random part of what is heard (issues)."""
    # unspecified: what is cut off a long clip (here random), and what fills up a short one (silence, its last frame)
    start, place = rng.uniform(0, max(0.0, duration - seconds)), rng.random()
    spare = max(0.0, min(seconds, duration) - video_seconds)
    return [data.View(start, seconds, "random" if "video" in modalities else None, "audio" in modalities,
                      (start + place * spare, video_seconds))]


def hide_tubes(rng, grid, recipe, s, size):
    """Blocks of mask set `s` of a video, for all frames alike: (rows, columns) bool. size: (height, width) of all of them."""
    return common.cover(grid, [(int(rng.integers(grid[0] - size[0] + 1)), int(rng.integers(grid[1] - size[1] + 1)), *size)
                               for _ in range(recipe["video_blocks"][s][0])])


def hide_blocks(rng, grid, recipe):
    """Time-frequency blocks of a mel, as A-JEPA's: (rows, columns) bool. Four blocks, each where it overlaps the earlier ones least, drawn
    until their union hides the share that is asked for."""
    low, high = (share * math.prod(grid) for share in recipe["audio_hidden"])
    aspect = [a * grid[1] / grid[0] for a in recipe["audio_aspect"]]

    def draw():
        mask = np.zeros(grid, bool)
        for _ in range(4):
            mask |= common.cover(grid, [common.place_apart(rng, mask, common.block_size(rng, grid, recipe["audio_scale"], aspect))])
        return mask

    return common.nearest((draw() for _ in range(50)), lambda mask: max(low - mask.sum(), mask.sum() - high, 0))


def draw_set(key, rank, batch, video, grid, recipe, s):
    """What mask set `s` hides of one modality: (B, rows x columns) bool, each row the same number, never all and never nothing. A pure
    function of (key, rank, clip). How much is hidden, and the size of a video's blocks, is drawn for the step (kin), the same for all
    clips and ranks; a clip meets the number by single patches."""
    # unspecified: how (kin: by cutting the longer lists, which loses the last rows)
    own, hide = np.random.default_rng((*key, 0, 0)), hide_blocks        # the step's own; the clips count from 1
    if video:
        scale = recipe["video_blocks"][s][1]
        hide = functools.partial(hide_tubes, s=s, size=common.block_size(own, grid, (scale, scale), recipe["video_aspect"]))
    count, masks = min(max(1, int(hide(own, grid, recipe).sum())), math.prod(grid) - 1), []
    for clip in range(batch):
        rng = np.random.default_rng((*key, rank, 1 + clip))
        some = (hide(rng, grid, recipe) for _ in range(5))             # one of five that comes near, so that single patches are few
        mask = nearest(some, lambda mask: abs(int(mask.sum()) - count), round(0.02 * math.prod(grid)))
        masks.append(common.meet_count(rng, mask, count).flatten())
    return np.stack(masks)


def draw_masks(seed, step, rank, batch, grids, recipe, kinds=INTRA):
    """What is visible and what is to be predicted: {kind of input: [(context (B, C), target (B, M)) for each mask set]}, indices of its
    tokens. A pure function of (seed, step, rank, clip, kind, modality, set). grids: {"video": (T, H, W), "audio": (F, T)}."""
    # unspecified: the sound has as many mask sets as the video, and the joint input has masks of its own
    masks = {kind: [] for kind in kinds}
    for kind in kinds:
        for s in range(len(recipe["video_blocks"])):
            hidden = []
            for m in MODALITIES[kind]:
                key = (seed, step, 1 + INTRA.index(kind) + 3 * (m == "video") + 6 * s)
                mask = draw_set(key, rank, batch, m == "video", grids[m][-2:], recipe, s)
                hidden.append(np.tile(mask, grids[m][0]) if m == "video" else mask)             # tubes: over the full time
            hidden = np.concatenate(hidden, 1)                                                  # (B, N)
            order = torch.from_numpy(np.argsort(hidden, 1, kind="stable"))                      # visible, then hidden, each in order
            masks[kind].append(order.tensor_split([int((~hidden[0]).sum())], 1))
    return masks


def make_inputs(recipe, listing=None, workers=0):
    """What data.py prepares, by the recipe; the mel's mean and std for each bin over clips of the listing, if there is one."""
    same = {name: recipe[name] for name in ("seconds", "video_seconds", "frames", "crop_scale", "n_fft", "hop", "n_mels")}
    same.update({"separate-audio": {"frames": 0}, "separate-video": {"n_mels": 0}}.get(recipe["terms"], {}))
    inputs = data.Inputs(size=recipe["image"], resize=recipe["image"], sample_rate=16000, win_length=400, window="hann", log="ln",
                         mel_mean=0.0, mel_std=1.0, **same)
    inputs = replace(inputs, columns=recipe["columns"] or math.ceil(inputs.mel_frames / recipe["mel_patch"][1]) * recipe["mel_patch"][1])
    if listing is None or recipe["terms"] == "separate-video":
        return inputs
    mean, std = data.mel_stats(listing, inputs, workers, recipe["stats_clips"])
    return replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.clamp_min(recipe["std_floor"]).tolist()))


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same. What only a dropped term needs is not built."""
    depth, kinds = common.SIZES[recipe["size"]][1] if recipe["size"] in common.SIZES else 1, inputs_of(TERMS[recipe["terms"]])
    levels = sorted({max(1, depth * (level + 1) // recipe["levels"]) - 1 for level in range(recipe["levels"])})
    video = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"])
    audio = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return dict(size=recipe["size"], video=video if kinds != ["a"] else None, audio=audio if kinds != ["v"] else None,
                positions=recipe["positions"], levels=levels[:-1], checkpoint=checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

class Predictor(nn.Module):
    """A narrow transformer over the context's tokens and a mask token for each hidden one, shared by the three inputs; heads of 32
    dimensions. It reads and predicts all levels (kin)."""
    def __init__(self, dim, levels, grids, width, depth, positions, checkpoint=False):
        super().__init__()
        # unspecified: one mask token for all, and an embedding of the modality on every token
        self.embed, self.mask_token = nn.Linear(levels * dim, width), nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.ModuleDict({modality: common.Positions(grid, width, positions) for modality, grid in grids.items()})
        self.modality = nn.ParameterDict({modality: torch.randn(width) * 0.02 for modality in grids})
        self.transformer = common.Transformer(width, depth, width // 32, 4 * width, checkpoint=checkpoint)
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, levels * dim)
        self.apply(common.init_weights)

    def forward(self, h, context, target, modalities):
        """h (B, C, L D) at the tokens context (B, C) of an input of these modalities -> predictions (B, M, L D) at the tokens target."""
        e = torch.cat([self.positions[m]() + self.modality[m] for m in modalities])     # (N, P)
        e = e.expand(len(h), -1, -1)                                                    # (B, N, P)
        m = self.mask_token + gather(e, target)                                         # (B, M, P)
        x = torch.cat([self.embed(h) + gather(e, context), m], 1)                       # (B, C + M, P)
        x = self.norm(self.transformer(x))[:, context.shape[1]:]                        # (B, M, P)
        return self.head(x)                                                             # (B, M, L D)


class MJEPA(nn.Module):
    """The context encoder, its EMA, the predictor within and those across, and the loss of a batch."""
    def __init__(self, config, terms, pred_dim, pred_depth):
        super().__init__()
        self.terms, self.kinds = terms, inputs_of(terms)
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        dim, levels = self.context_encoder.dim, len(config["levels"]) + 1
        self.layers = [*config["levels"], len(self.context_encoder.transformer.blocks) - 1]
        self.grids = {m: getattr(self.context_encoder, m).grid for m in ("video", "audio") if getattr(self.context_encoder, m)}
        self.predictor = Predictor(dim, levels, self.grids, pred_dim, pred_depth, config["positions"],
                                   self.context_encoder.transformer.checkpoint)
        # unspecified: their width (the encoder's) and activation (GELU)
        self.cross = nn.ModuleDict({term: common.mlp(dim, 3 * [dim], norm=False) for term in terms if term in CROSS})
        for kind in self.kinds:                         # of rank 0's targets: what one knows without any context
            self.register_buffer(f"mean_{kind}", torch.zeros(levels * dim))
        for kind in dict.fromkeys(term.partition("->")[2] for term in self.cross):
            self.register_buffer(f"mean_pooled_{kind}", torch.zeros(dim))

    def forward(self, video, audio, masks, weight, step):
        """video (B, 3, T, H, W) and audio (B, 1, F, T), or None; masks of draw_masks; weight: {kind of input: (B,)}, of each clip in the
        mean over the clips that have it -> (loss, what the log shows)."""
        dim, given = self.context_encoder.dim, {"video": video, "audio": audio}

        def embed(encoder):                             # patches once for each modality, for all inputs and mask sets
            each = {m: encoder.embed(**{m: given[m]}) for m in self.grids}
            return {kind: torch.cat([each[m] for m in MODALITIES[kind]], 1) for kind in self.kinds}             # (B, N, D)

        # 1 context: the visible tokens alone, a pass for each kind of input and mask set
        h = {kind: [self.context_encoder(tokens=x, visible=context, layers=self.layers) for context, _ in masks[kind]]
             for kind, x in embed(self.context_encoder).items()}                                # each (B, C, L D)
        # 2 target: the teacher is given everything, a pass for each kind of input; each level of each token is layer-normed
        with torch.no_grad():
            z = {kind: self.target_encoder(tokens=x, layers=self.layers).float() for kind, x in embed(self.target_encoder).items()}
            # unspecified: pooled over all tokens alike, then layer-normed
            pooled = {kind: norm_levels(x[..., -dim:].mean(1), dim) for kind, x in z.items()}   # (B, D)
            y = {kind: norm_levels(z.pop(kind), dim) for kind in self.kinds}                    # (B, N, L D)
            for name, mean in self.named_buffers(recurse=False):
                kind = name.split("_")[-1]
                common.follow(mean, pooled[kind] if "pooled" in name else y[kind].mean(1), weight[kind], step)
        # 3 predict: within, at the hidden tokens; across, another input as a whole, from what is visible of this one
        losses, nothing = {}, {}
        for term in self.terms:
            source, _, target = term.partition("->")
            share, pairs = weight["av" if target else source], []
            for (context, hidden), x in zip(masks[source], h[source]):
                if target:
                    pairs.append((self.cross[term](x[..., -dim:].mean(1)), pooled[target]))
                else:
                    pairs.append((self.predictor(x, context, hidden, MODALITIES[source]), gather(y[source], hidden)))
            # 4 loss: each term the mean over the mask sets, their sum unweighted
            losses[term] = sum(prediction_loss(prediction.float(), t, share) for prediction, t in pairs) / len(pairs)
            mean = getattr(self, f"mean_pooled_{target}" if target else f"mean_{source}")
            nothing[term] = sum(prediction_loss(mean, t, share) for _, t in pairs) / len(pairs)
        embedding = {kind: h[kind][0][..., -dim:].detach().float().mean(1) for kind in self.kinds}              # (B, D)
        return sum(losses.values()), {"losses": losses, "nothing": nothing, "embedding": embedding}


def restore(content):
    """The model of a checkpoint (of common.load_checkpoint), with its weights."""
    recipe = content["recipe"]
    model = MJEPA(content["encoder"], TERMS[recipe["terms"]], recipe["pred_dim"], recipe["pred_depth"])
    common.load_weights(model, content["model"], f"the checkpoint of {METHOD}")
    return model


@torch.no_grad()
def imagine(model, recipe, clips, seed, step):
    """What the pixel probe decodes. clips: {"video": (B, 3, T, H, W), "audio": (B, 1, F, T)}, normalised, or one of them -> tokens
    (B, N, L D), all levels side by side, the context encoder's where a patch is visible and the predictor's where it is hidden, and
    which are hidden, (B, N) bool; video's first. The masks of draw_masks(seed, step), of mask set number step % sets."""
    kind, x = next(kind for kind in INTRA if set(MODALITIES[kind]) == set(clips)), next(iter(clips.values()))
    if kind not in model.terms:
        raise UserError(f"--modality: this run's --terms {recipe['terms']} has no term {kind}, so its predictor knows nothing of such an "
                        "input; give another --modality")
    sets = draw_masks(seed, step, 0, len(x), model.grids, recipe, (kind,))[kind]
    context, target = (indices.to(x.device) for indices in sets[step % len(sets)])          # (B, C), (B, M)
    h = model.context_encoder(**clips, visible=context, layers=model.layers)                # (B, C, L D)
    return common.assemble(h, context, model.predictor(h, context, target, MODALITIES[kind]), target)


def norm_levels(x, dim):
    """Layer norm without affine of each level for itself. (..., L D) -> the same"""
    return F.layer_norm(x.unflatten(-1, (-1, dim)), (dim,)).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

def prediction_loss(prediction, target, weight):
    """L1, the mean over tokens and dimensions, the weighted sum over clips: prediction and target (B, [M,] D), weight (B,) -> scalar."""
    return (weight * (prediction - target).abs().flatten(1).mean(1)).sum()


def weigh(batches, kinds, process):
    """For each (micro-)batch of a step {kind of input: (B,)}: the weights of a mean over those clips, of the whole step and all processes,
    that have what the input needs. A clip without sound so trains the video terms alone, and silence trains nothing. Times the number
    of processes, since DDP averages the gradients."""
    has = [{kind: torch.stack([b[f"has_{m}"] for m in MODALITIES[kind]]).all(0).float() for kind in kinds} for b in batches]
    count = process.total(torch.stack([sum(h[kind].sum() for h in has) for kind in kinds]))
    return [{kind: (h[kind] * process.world / max(1.0, n)).to(process.device) for kind, n in zip(kinds, count.tolist())} for h in has]


def learning_rate(step, recipe):
    """Linear from lr_start to lr, then constant; in the cooldown linear from lr towards lr_end (kin)."""
    if recipe["cooldown"]:
        return recipe["lr"] + (recipe["lr_end"] - recipe["lr"]) * step / (1.25 * recipe["steps"])       # of 15,000 steps, 12,000
    return recipe["lr_start"] + (recipe["lr"] - recipe["lr_start"]) * min(1.0, (step + 1) / recipe["warmup"])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def alarms(rows, warmup=0):
    """What has gone wrong by the last of the log's rows: {column and what: message}. The authors' release is said to degrade late in
    training, with rising terms within and falling terms across (their issue tracker). A row whose clips lack what a term needs says
    nothing of it."""
    found = {}
    for name in (key for key in rows[-1] if f"{key}/know_nothing" in rows[-1]):
        pairs = [(row[name], row[f"{name}/know_nothing"]) for row in rows if row.get(f"{name}/know_nothing")]
        if not pairs and len(rows) >= 5:
            found[f"{name} has none"] = f"no clip so far has what {name} needs, it learns nothing; another --terms fits these clips"
        if not pairs or not rows[-1][f"{name}/know_nothing"]:
            continue
        loss, nothing = zip(*pairs)
        if name in INTRA and len(loss) >= 13:           # by more than what richer targets explain
            share = [a / b for a, b in pairs]
            if all(np.mean(x[-3:]) > 1.2 * min(np.convolve(x[:-3], np.full(10, 0.1), "valid")) for x in (loss, share)):
                found[f"{name} rises"] = f"{name} rises: {np.mean(loss[-3:]):.3g}, after {min(loss):.3g}"
        lowest = min(loss[-1], nothing[-1]) if name in CROSS else nothing[-1]
        if lowest < 0.05 * max(nothing):
            found[f"{name} floor"] = f"{name} is at its floor ({lowest:.3g}): its target says next to nothing any more"
    for name in (key for key in rows[-1] if key.startswith("rank_")):
        rank = [row[name] for row in rows if name in row and row["step"] >= warmup]         # it falls in the warm-up of a healthy run
        if len(rank) >= 10 and np.mean(rank[-5:]) < 0.5 * max(np.convolve(rank[:-5], np.full(5, 0.2), "valid")):
            found[name] = f"the effective rank of {name[5:]} falls: {np.mean(rank[-5:]):.1f}, after {max(rank):.1f}"
    return found


def main(argv=None):
    args, recipe = get_args(argv)
    process, terms = common.start_process(args.device), TERMS[recipe["terms"]]
    kinds = inputs_of(terms)
    if process.device.type == "cpu" and recipe["size"] == "toy":        # small operations: 335 ms a step instead of 405, and the other
        torch.set_num_threads(1)                                        # core decodes
    inputs = make_inputs(recipe)
    config = encoder_config(recipe, inputs, args.checkpoint_activations)
    common.seed_step(args.seed, 0)
    model = MJEPA(config, terms, recipe["pred_dim"], recipe["pred_depth"]).to(process.device)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, recipe["weight_decay"]))

    if args.data == "toy" and process.main:
        data.list_clips("toy", args.data_dir)                                       # rank 0 writes the clips, the others wait
    process.barrier()
    listing = data.list_clips(args.data, args.data_dir)
    recipe["steps"] = steps = recipe["steps"] or max(1, round(recipe["epochs"] * (len(listing) // recipe["batch_size"])))
    found, start = common.open_run(args, METHOD, recipe, process), 0
    if found and args.init and found["args"]["init"] != args.init:
        raise UserError(f"{args.out}: the run there began from {found['args']['init']}; give another --out, or --fresh to start over")
    begun = common.load_checkpoint(args.init, METHOD) if args.init and not found else None
    if found:
        common.load_weights(model, found["model"], args.out)
        common.load_optimizer(optimizer, found["optimizer"], args.out)
        start, inputs = found["step"], data.Inputs(**found["inputs"])
    elif begun:
        common.load_weights(model, common.stretch_positions(begun["model"], model), args.init)
        inputs = replace(inputs, **{name: begun["inputs"][name] for name in ("mel_mean", "mel_std")})       # which the weights know
        if args.cooldown:                               # kin: with the optimiser's state, but for positions of another length
            common.load_optimizer(optimizer, begun["optimizer"], args.init)
            for p in [p for p, state in optimizer.state.items() if state["exp_avg"].shape != p.shape]:
                del optimizer.state[p]
    order = data.Batches(len(listing), recipe["batch_size"], args.seed, start, steps, process.rank, process.world, args.accumulate)
    workers = common.default_workers(process) if args.workers is None else args.workers
    if not (found or begun):
        inputs = process.from_main(lambda: make_inputs(recipe, listing, workers))
    found = begun = None                                # gigabytes, on each rank
    modalities = [m for m in ("video", "audio") if m in model.grids]
    clips = data.Clips(listing, inputs, functools.partial(plan_views, seconds=recipe["seconds"], video_seconds=recipe["video_seconds"],
                                                          modalities=modalities), args.seed)
    batches = iter(data.train_loader(clips, order, workers, pin=process.device.type == "cuda"))
    if process.main:
        print(data.describe(listing))
        print(f"MJEPA, ViT {recipe['size']}, {' + '.join(f'{math.prod(model.grids[m]):,} {m}' for m in modalities)} tokens, "
              f"{len(terms)} terms, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters and a teacher, "
              f"{steps:,} steps of {recipe['batch_size']} clips, {process.world} x {process.device.type}{' bf16' if process.bf16 else ''} "
              f"-> {args.out}")
        if start:
            print(f"going on at step {start:,} of {steps:,}")
    if args.compile:
        model.context_encoder.compile(), model.target_encoder.compile()

    def save(step):                                     # weights: unspecified which are evaluated (kin: the teacher's)
        if process.main:
            common.save_checkpoint(Path(args.out) / "latest.pt", method=METHOD, step=step, steps=steps, args=vars(args), recipe=recipe,
                                   inputs=asdict(inputs), encoder=config, projector=None, weights="context_encoder",
                                   cross={term: 3 * [model.context_encoder.dim] for term in model.cross},
                                   model=model.state_dict(), optimizer=optimizer.state_dict())

    wrapped, stop = process.wrap(model), common.StopSignal()
    log, troubles = common.Log(args.out, start, process), data.Troubles(len(listing), args.max_bad)
    panel = ("loss", *((term, f"{term}/know_nothing") for term in terms), *(f"rank_{kind}" for kind in kinds),
             *(f"std_{kind}" for kind in kinds), "grad_norm", "lr", "ms_data", "ms_step")
    rows, began, data_s, logged = common.read_log(args.out) if process.main else [], time.time(), 0.0, start
    warmup, mine = 0 if recipe["cooldown"] else recipe["warmup"], recipe["batch_size"] // process.world
    named = dict.fromkeys(alarms(rows, warmup), start) if rows else {}              # what is wrong, and when it last was
    draw = functools.partial(draw_masks, args.seed, rank=process.rank, batch=mine, grids=model.grids, recipe=recipe, kinds=kinds)
    pool = ThreadPoolExecutor(1)                        # draws the masks of the next step (1.3 ms a clip) while this one computes
    ahead = pool.submit(draw, start)
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=not process.main):
        lr = learning_rate(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock, parts = time.time(), []
        masks, ahead = ahead.result(), pool.submit(draw, step + 1) if step + 1 < steps else None
        masks = {kind: [[x.to(process.device).chunk(args.accumulate) for x in pair] for pair in masks[kind]] for kind in kinds}
        some = [next(batches) for _ in range(args.accumulate)]                      # all at once: weigh counts over the whole step
        for batch in some:
            troubles.add(batch)
        weights = weigh(some, kinds, process)
        data_s += time.time() - clock
        for micro, (batch, weight) in enumerate(zip(some, weights)):
            batch = data.to_device(batch, process.device)
            hidden = {kind: [(context[micro], target[micro]) for context, target in masks[kind]] for kind in kinds}
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                with process.autocast():
                    loss, part = wrapped(batch.get("video"), batch.get("audio"), hidden, weight, step)
                loss.backward()
            values = [loss, *(part[name][term] for name in ("losses", "nothing") for term in terms)]
            parts.append({"values": torch.stack(values).detach(), **part["embedding"]})
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])     # no clipping: kin
        if process.any(not math.isfinite(loss.item() + grad_norm.item())):
            raise UserError(f"the loss or its gradient is not finite at step {step}; the last good checkpoint in {args.out} is kept; "
                            "give a new --out and a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(model.target_encoder, model.context_encoder, recipe["tau"])
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            values = (process.total(sum(p["values"] for p in parts)) / process.world).tolist()
            row = {"step": step, **dict(zip(("loss", *terms, *(f"{term}/know_nothing" for term in terms)), values))}
            for kind in kinds:
                row[f"std_{kind}"], row[f"rank_{kind}"] = common.health(common.gather_ranks(torch.cat([p[kind] for p in parts])))
            count, seconds = step + 1 - logged, time.time() - began
            row.update({"grad_norm": grad_norm.item(), "lr": lr, "ms_data": 1e3 * data_s / count, "ms_step": 1e3 * seconds / count,
                        **troubles.row()})
            log.write(row, ("step", *panel))
            rows = [*(rows if len(rows) < 4000 else rows[:2000:2] + rows[2000:]), row]     # the older ones thinner
            for name, message in alarms(rows, warmup).items() if process.main else ():
                if name not in named or step - named[name] > 20 * args.log_every:           # once, and again if it comes back
                    tqdm.write(f"WARNING at step {step}: {message}; see the README, Is it healthy?")
                named[name] = step
            began, data_s, logged = time.time(), 0.0, step + 1
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
                           f"MJEPA, {args.terms}, {args.data}, seed {args.seed}, {steps} steps")
        print(f"trained {steps:,} steps: {args.out}/latest.pt, log.jsonl, curves.png")
        if args.data == "toy":
            probe.toy_report(args.out, args.data_dir, process, workers)


if __name__ == "__main__":
    common.main_guard(main)
