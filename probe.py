"""What an encoder knows: linear and attentive probes, fine-tuning, their baselines, and features in a file.

    python probe.py --ckpt RUN --data toy --probe linear --modality audio
    python probe.py --ckpt RUN --data toy --baseline untrained          # as the encoder was initialised
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe attentive --modality av
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe finetune --head attentive
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe finetune --regularised-masking 0.1
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --layers 3 7 11
    python probe.py --ckpt RUN --data folder --data-dir clips/ --save-features clips.npz --patch-level

Learning rates are tried on the set's official validation clips, or where it has none on a tenth of the
training clips, never on the test; the head that is best there is tested. A set with folds is tested fold by
fold, and the mean counts. Each result is a row in RUN/probe.jsonl. What a method's authors do (heads, rates,
views) is its METHOD, which its checkpoint holds.

--save-features writes an npz with files (N,), clip (N, D) float32, seconds (length of a view), with
--patch-level also patch (N, views, tokens, D) float16, and where there are labels also labels, (N,) indices
or (N, C) zeros and ones, and classes (C,).
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import retrieval
import run
from common import UserError, main_guard

MODALITIES = {"audio": ("audio",), "video": ("video",), "av": ("video", "audio")}


# ----------------------------------------------------------------------------------------------------------
# Measures
# ----------------------------------------------------------------------------------------------------------

def accuracy(scores, targets):
    """Top-1, in 0..1. scores (N, C), targets (N,); the target must be strictly the best, so that ties do not
    count."""
    own = scores.gather(1, targets[:, None])
    below = (scores < own).sum(1)
    return (below == scores.shape[1] - 1).float().mean().item()


def mean_average_precision(scores, targets):
    """(mAP in 0..1, number of classes that counted): the mean, over the classes that have a positive, of the
    average precision. scores and targets (N, C). Clips with the same score share the precision at the end of
    their tie."""
    scores = torch.as_tensor(scores).double()
    targets = torch.as_tensor(targets).double()
    values = []
    for s, y in zip(scores.T, targets.T):
        if y.sum() > 0:
            s, order = s.sort(descending=True)
            last = torch.searchsorted(-s, -s, right=True)           # clips with this score or a better one
            hits = y[order].cumsum(0)
            precision = hits[last - 1] / last
            values.append((precision * y[order]).sum() / y.sum())
    if not values:
        return 0.0, 0
    return torch.stack(values).mean().item(), len(values)


def measure(scores, targets):
    """(name, value in percent, classes that counted): top-1 for class indices, mAP for zeros and ones."""
    if targets.ndim == 1:
        return "top-1", 100 * accuracy(scores, targets), scores.shape[1]
    value, counted = mean_average_precision(scores, targets)
    return "mAP", 100 * value, counted


def measure_held_out(scores, targets):
    """The value that a learning rate is chosen by; one that made scores of no finite numbers comes last."""
    return measure(scores, targets)[1] if scores.isfinite().all() else -math.inf


def measure_test(scores, targets):
    """`measure`. UserError where the scores are no finite numbers."""
    if not scores.isfinite().all():
        raise UserError("the scores of the test clips are not finite numbers: the head did not learn; lower "
                        "--lr")
    return measure(scores, targets)


# ----------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------

class LinearHead(nn.Module):
    """Linear on the clip embedding, standardised. (tokens (B, N, D), embedding (B, D)) -> (B, C)"""
    def __init__(self, dim, classes):
        super().__init__()
        # differs: AV-JEPA's authors have a LayerNorm with affine. unspecified: the others
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens, embedding):
        return self.linear(self.norm(embedding))


class AttentiveHead(nn.Module):
    """One learned query attends to the tokens, which may go through blocks before, then linear.
    (tokens (B, N, D), embedding (B, D)) -> (B, C)"""
    def __init__(self, dim, classes, blocks=0):
        super().__init__()
        heads = max(1, dim // 64)
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear = nn.Linear(dim, classes)
        self.blocks = nn.ModuleList(common.Block(dim, heads, 4 * dim) for _ in range(blocks))
        self.blocks.apply(common.ViT.init_weights)

    def forward(self, tokens, embedding):
        for block in self.blocks:
            tokens = block(tokens)
        # What self.attend(query, norm(x), norm(x)) returns, in another order, which is exact for a single
        # query: the keys' matrix meets the query, the values' matrix the mean, and no matrix all the tokens
        # (toy: a tenth of the time)
        norm = self.norm
        heads = self.attend.num_heads
        weight = self.attend.in_proj_weight.unflatten(0, (3, heads, -1))            # (3, H, d, D)
        bias = self.attend.in_proj_bias.unflatten(0, (3, heads, -1))                # (3, H, d)
        x = F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps)               # (B, N, D)
        q = torch.einsum("hde,e->hd", weight[0], self.query[0, 0]) + bias[0]        # (H, d)
        # the bias of the keys cancels in the softmax
        k = torch.einsum("hd,hde->he", q, weight[1]) / q.shape[1] ** 0.5            # (H, D)
        a = (x @ (norm.weight * k).T).softmax(1)                                    # (B, N, H)
        y = a.transpose(1, 2) @ x * norm.weight + norm.bias                         # (B, H, D)
        v = torch.einsum("bhe,hde->bhd", y, weight[2]) + bias[2]                    # (B, H, d)
        return self.linear(self.attend.out_proj(v.flatten(1)))                      # (B, C)


HEADS = {
    "linear": LinearHead,
    "attentive": AttentiveHead,
    # MJEPA, second-hand: "cross-attention + 4 blocks + linear"
    # unspecified: the order, here the blocks first, as in V-JEPA 2
    "blocks": functools.partial(AttentiveHead, blocks=4)}
# Rates that are tried for a frozen encoder's head where it is not the one of the method
FROZEN_LRS = (1e-3, 1e-2, 1e-1, 1.0)                    # authors' code: 1e-3
BLOCKS_LRS = (1e-4, 3e-4, 1e-3, 3e-3)                   # unspecified: larger ones tear the blocks apart
HEAD_LRS = {"linear": FROZEN_LRS, "attentive": FROZEN_LRS, "blocks": BLOCKS_LRS}


# ----------------------------------------------------------------------------------------------------------
# Which views of a clip, and what an encoder makes of them
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Views:
    """What is read of each clip."""
    modality: str                       # of MODALITIES
    inputs: data.Inputs
    test: int                           # views of a test clip whose scores are averaged
    crops: int                          # of each of them
    train: int                          # views of a training clip that are cached


def choose_modality(asked, encoder_vit, inputs, method, data_name):
    """(modality, Inputs): the modality that was asked for, or all that the encoder takes and the set has. The
    Inputs of pictures alone have the pictures' seconds. method: the dict of the checkpoint. UserError where
    one lacks it."""
    takes = tuple(encoder_vit.grids)
    has = data.find_set(data_name).has
    modality = asked
    if modality is None and len(has) == 1:
        modality = has[0]
    elif modality is None:
        modality = "av" if len(takes) == 2 else takes[0]
    for key in MODALITIES[modality]:
        if key not in takes:
            raise UserError(f"--modality {modality}: {method['name']} takes no {key}")
    data.require(data_name, MODALITIES[modality], f"use --modality {has[0]}")
    if modality == "video" and inputs.video_seconds:    # the pictures are all of the view
        inputs = replace(inputs, seconds=inputs.video_seconds, video_seconds=None)
    return modality, inputs


def choose_views(args, encoder, listing):
    """The Views by what the encoder takes, the set has, and args asks for (data, probe, modality, seconds,
    views, crops)."""
    data_set = data.find_set(args.data)
    inputs = data.Inputs(**encoder.inputs)
    modality, inputs = choose_modality(args.modality, encoder.vit, inputs, encoder.method, args.data)
    crops = args.crops or data_set.crops or 1
    if modality == "audio":
        if args.crops == 3:
            raise UserError("--crops 3: --modality audio has no pictures to crop; leave it out")
        crops = 1
        seconds = args.seconds or min(inputs.seconds, listing.seconds or inputs.seconds)
        inputs = inputs.at(seconds, encoder.vit.patch["audio"][1])
    elif args.seconds not in (None, inputs.seconds):
        span = inputs.video_seconds or inputs.seconds
        raise UserError(f"--seconds {args.seconds:g}: pictures come in the {span:g} s of training; leave it "
                        "out, or give --modality audio")
    shared = inputs.seconds                             # by sound and pictures of a view
    if modality == "av" and inputs.video_seconds:
        shared = inputs.video_seconds
    whole = listing.seconds is not None and listing.seconds <= shared
    if args.views:
        test = args.views
    elif whole:
        test = 1
    elif data_set.covers:                               # of very unequal clips
        test = math.ceil(data_set.covers / inputs.seconds)
    else:
        test = data_set.views or encoder.method[args.probe]["views"]
    # unspecified: the training views; a frozen head draws, each epoch, one of two windows of a clip, or of
    # the test's windows where those serve for both (folds) or the clips are very long; fine-tuning draws a
    # new one at random
    if data_set.covers or listing.fold is not None:
        train = test
    else:
        train = 1 if whole else 2
    return Views(modality, inputs, test, crops, train)


class RawInput(nn.Module):
    """The input itself as an embedding, average-pooled: mel to (16, 25), video to (4, 16, 16) and 3 colours.
    What a linear probe reads off it needed no encoder."""
    def forward(self, video=None, audio=None):
        parts = []
        if video is not None:                           # on the CPU: MPS lacks the two
            parts.append(F.adaptive_avg_pool3d(video.cpu(), (4, 16, 16)).flatten(1))
        if audio is not None:
            parts.append(F.adaptive_avg_pool2d(audio.cpu(), (16, 25)).flatten(1))
        return None, torch.cat(parts, 1)


def needed_keys(modalities):
    """What some modalities need of a clip: of "video" and "audio", in the order of `modalities`."""
    keys = itertools.chain.from_iterable(MODALITIES[modality] for modality in modalities)
    return list(dict.fromkeys(keys))


def pick(batch, modality):
    """The inputs of a modality as keyword arguments of an encoder."""
    return {key: batch[key] for key in MODALITIES[modality]}


def even_plan(views, inputs, keys, crops=1):
    """The plan of `views` evenly spread views of the modalities `keys`, for a loader."""
    return functools.partial(
        data.even_views, views, inputs, video="video" in keys, audio="audio" in keys, crops=crops)


def take(batch, keys, has, device):
    """The inputs `keys` of a batch on the device, {key: (B views, ...)}, of the clips `has` (B,) bool."""
    given = {key: batch[key] for key in keys}
    if not has.all():
        rows = has.repeat_interleave(len(batch[keys[0]]) // len(has))
        given = {key: x[rows] for key, x in given.items()}
    return data.to_device(given, device)


def read_clips(listing, inputs, keys, views, process, workers, label, crops=1, batch=32):
    """A batch at a time of the clips of a listing that have all of `keys`: (index (B,), inputs {key: (B views
    crops, ...)} on the device). The others are named. UserError where no clip has them."""
    troubles = data.Troubles(len(listing))
    plan = even_plan(views, inputs, keys, crops)
    size = max(1, batch // (views * crops))
    found = False
    for clips in data.eval_batches(listing, inputs, plan, size, workers, troubles, label):
        has = has_all(clips, keys)
        troubles.name(lacking(names_of(listing, clips["index"][~has]), keys))
        if has.any():
            found = True
            yield clips["index"][has], take(clips, keys, has, process.device)
    if not found:
        raise UserError(f"{listing.name}: no clip has all of {', '.join(keys)}; give another --modality")


def has_all(batch, keys):
    """Which clips of a batch have all of `keys`, (B,) bool."""
    return torch.stack([batch[f"has_{key}"] for key in keys]).all(0)


def names_of(listing, index):
    """The paths of the clips of these indices."""
    return [listing.path(i) for i in index.tolist()]


def lacking(names, keys):
    """What is said of clips that lack one of `keys`."""
    return [f"{name}: has no {' or no '.join(keys)}" for name in names]


@torch.no_grad()
def extract(encoders, listing, inputs, modalities, views, process, workers=1, tokens=False, batch=32,
            label="features", crops=1):
    """Decode each clip once, embed its `views` evenly spread views, each with so many `crops`, with each
    encoder and modality.

    Returns ({(encoder name, modality): (N, views x crops, D), with `tokens` (N, views x crops, number, D)},
    index (N,)). Clips that do not decode, or lack what one of the modalities needs, are left out and named on
    the screen."""
    features = {key: [] for key in itertools.product(encoders, modalities)}
    keys = needed_keys(modalities)
    indices = []
    for index, given in read_clips(listing, inputs, keys, views, process, workers, label, crops, batch):
        indices.append(index)
        for (name, modality), parts in features.items():
            with process.autocast():
                all_tokens, embedding = encoders[name](**pick(given, modality))
            x = all_tokens.to(torch.bfloat16) if tokens else embedding.to(torch.float32)
            x = x.unflatten(0, (-1, views * crops)).cpu()
            retrieval.check_finite(x, names_of(listing, index))
            parts.append(x)
    return {key: torch.cat(parts) for key, parts in features.items()}, torch.cat(indices)


# ----------------------------------------------------------------------------------------------------------
# How a head is trained, and which clips choose its learning rate
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Protocol:
    """How a head is trained."""
    probe: str                          # linear or attentive: the encoder stays frozen; finetune
    head: str                           # of HEADS
    lrs: tuple                          # tried on held-out clips
    epochs: int
    batch_size: int
    seed: int
    encoder_lr: float | None = None     # of fine-tuning, as the two below
    smoothing: float = 0.0              # of the labels
    regularised_masking: float = 0.0    # share of the tokens

    @property
    def frozen(self):
        return self.probe != "finetune"


def frozen_schedule(clips, most=512):
    """(batch, epochs) of a frozen probe: 512 (or `most`, for a head that would not fit) and 15 (authors'
    code), but at least 2,000 steps of an eighth of the set: on a small set a head would else end half
    trained, and that of an untrained encoder, with its badly conditioned features, most of all."""
    batch = min(most, max(2, clips // 8))
    return batch, max(15, math.ceil(2000 / math.ceil(clips / batch)))


def choose_protocol(args, method, listing):
    """The Protocol that args asks for (probe, head, lr, encoder_lr, epochs, batch_size, seed,
    regularised_masking), else what the method's authors do, by its dict. listing: the training clips."""
    clips = len(listing)
    if listing.fold is not None:
        _, sizes = np.unique(listing.fold, return_counts=True)
        clips -= int(sizes.max())
    if clips < 3:
        where = "" if listing.fold is None else ", outside of each fold"
        raise UserError(f"{listing.name}: {clips} training clips; a probe needs at least 3{where}")
    usual = method[args.probe]
    usual_head = usual.get("head", "linear")
    head = args.head or usual_head
    lrs = usual["lr"]
    if args.probe == "finetune":
        batch_size = 64                                 # unspecified: the batch of fine-tuning
        epochs = usual["epochs"]
    else:
        batch_size, epochs = frozen_schedule(clips, 32 if head == "blocks" else 512)
        if head != usual_head:
            lrs = HEAD_LRS[head]
    protocol = Protocol(
        args.probe, head, args.lr or lrs, args.epochs or epochs, args.batch_size or batch_size, args.seed)
    if protocol.frozen:
        return protocol
    encoder_lr = usual["encoder_lr"] if args.encoder_lr is None else args.encoder_lr
    return replace(protocol, encoder_lr=encoder_lr, smoothing=usual["smoothing"],
                   regularised_masking=args.regularised_masking)


def split_off(n, seed, share=0.1):
    """(train, held-out) indices of n clips."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    cut = max(1, round(share * n))
    return order[cut:], order[:cut]


def hold_out(listing, index, seed, needed=True):
    """(positions to train on, positions to choose by) among the clips `index` of a training listing: its
    official validation clips are held out, or where it has none a random tenth; that only if it is needed,
    otherwise (all, None)."""
    if listing.held is None:
        held = np.zeros(len(index), bool)
    else:
        held = listing.held[np.asarray(index)]
    if (~held).sum() < 2:
        beside = f" beside {held.sum():,} official validation clips" if held.any() else ""
        raise UserError(f"{listing.name}: fewer than two training clips can be read{beside}; look at the "
                        "files with python data.py --check")
    if held.any():
        return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
    if needed:
        return split_off(len(index), seed)
    return torch.arange(len(index)), None


def labelled(listing, split):
    """The clips of a listing that have a label; of a multi-label set all. UserError where none has."""
    if listing.labels is None or len(listing.labels) == 0:
        raise UserError(f"{listing.name}: its {split} clips have no labels, and a probe needs labels; put "
                        "them into one sub-folder for each class, or take the set's own csv")
    has = np.diff(listing.offsets) > 0
    if listing.multilabel or has.all():
        return listing
    print(f"{listing.name}: {(~has).sum():,} {split} clips have no label and are left out")
    return listing.subset(np.flatnonzero(has))


def some(names):
    """The first five, and how many more."""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def compare_classes(train, test):
    """Of the classes of a set, which have test clips but nothing to train on, and which have only that, two
    (C,) bool. UserError where a score would say nothing: one class only, or none that is trained and
    tested."""
    if train.held is not None and not train.held.all():
        train = train.subset(np.flatnonzero(~train.held))
    names = np.array(train.classes)
    trained = np.bincount(train.labels, minlength=len(names))
    tested = np.bincount(test.labels, minlength=len(names))
    differs = (trained > 0) & (trained < len(train))        # has training clips that are of it, and others
    if not differs.any():
        raise UserError(f"{train.name}: all {len(train):,} training clips are of {some(names[trained > 0])}, "
                        "which any head says; a probe needs clips of at least two classes")
    both = differs & (tested > 0)
    if not both.any():
        raise UserError(f"{train.name}: no class has both training clips ({some(names[trained > 0])}) and "
                        f"test clips ({some(names[tested > 0])}); a probe needs the same classes in both")
    if test.multilabel and (tested[both] == len(test)).all():
        raise UserError(f"{train.name}: all {len(test):,} test clips are of {some(names[both])}, so that any "
                        "ranking is right; a probe needs test clips of other classes beside them")
    return (trained == 0) & (tested > 0), (trained > 0) & (tested == 0)


def check_classes(train, test):
    """compare_classes of a set, or of each of its folds: prints which classes lack training or test clips,
    and returns how many they are: dict(untrained, untested)."""
    pairs = [(train, test)]
    where = ""
    if train.fold is not None:
        pairs = []
        where = " in one fold or another"
        for number, (inner, outer) in zip(np.unique(train.fold), rounds(train.fold)):
            named = replace(train, name=f"{train.name}, fold {number}")
            pairs.append((named.subset(inner), named.subset(outer)))
    untrained, untested = np.any([compare_classes(*pair) for pair in pairs], 0)
    names = np.array(train.classes)
    costs = "add next to nothing to the mAP" if train.multilabel else "count as wrong"
    if untrained.any():
        print(f"{train.name}: {untrained.sum():,} classes have no training clips{where}, so that their test "
              f"clips {costs}: {some(names[untrained])}")
    if untested.any():
        print(f"{train.name}: {untested.sum():,} classes have no test clips{where}, so that the score says "
              f"nothing of them: {some(names[untested])}")
    return {"untrained": int(untrained.sum()), "untested": int(untested.sum())}


def rounds(fold):
    """For each fold: (positions to train on, positions to test on)."""
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in np.unique(fold)]


def join_folds(results):
    """The results of all folds as one: the mean, and what stands for each fold."""
    each = {}
    for key in ("value", "lr", "held_out", "N"):
        each[key] = [result[key] for result in results]
    return {
        **results[0],
        "value": float(np.mean(each["value"])),
        "folds": each["value"],
        "lr": each["lr"],
        "held_out": each["held_out"],
        "N": sum(each["N"])}


def loss_of(scores, targets, smoothing=0.0):
    """Cross-entropy for class indices (N,), binary cross-entropy for zeros and ones (N, C); scores (N, C)."""
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)
    targets = targets.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(scores, targets)


def average(scores, multilabel):
    """(..., views, C) scores -> (..., C) probabilities, the mean over the views."""
    # differs: AV-JEPA's authors average logits. unspecified: the others
    probabilities = scores.sigmoid() if multilabel else scores.softmax(-1)
    return probabilities.mean(-2)


# ----------------------------------------------------------------------------------------------------------
# A probe of cached features
# ----------------------------------------------------------------------------------------------------------

def cached_batches(x, y, chosen, batch, seed, device):
    """Endless batches of cached features x (N, views, ...): each chosen clip once an epoch, with a view drawn
    for it. Yields (tokens or None, embedding or None, targets)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.as_tensor(chosen)
    while True:
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for index in order.split(batch):
            if len(index) < 2:                          # BatchNorm needs two
                continue
            view = torch.randint(x.shape[1], (len(index),), generator=generator)
            yield *as_features(x[index, view], device), y[index].to(device)


def as_features(x, device):
    """What a head is given of cached tokens (B, N, D) or embeddings (B, D): (tokens or None, embedding or
    None)."""
    x = x.float().to(device)
    return (x, None) if x.ndim == 3 else (None, x)


def train_heads(heads, batches, steps, lrs, smoothing=0.0, label="probe", progress=True):
    """AdamW without weight decay, cosine to 0, one optimiser for each head: all learning rates in one pass
    over the features. batches: an iterator of (tokens or None, embedding or None, targets)."""
    optimizers = []
    for head, lr in zip(heads, lrs):
        optimizers.append(torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0))
    for step in tqdm(range(steps), desc=label, unit="step", disable=not progress):
        tokens, embedding, targets = next(batches)
        for head, optimizer, lr in zip(heads, optimizers, lrs):
            optimizer.param_groups[0]["lr"] = common.cosine(step, steps, lr, 0.0)
            optimizer.zero_grad()
            scores = head.train()(tokens, embedding)
            loss_of(scores, targets, smoothing).backward()
            optimizer.step()


@torch.no_grad()
def predict(head, x, device, batch=256):
    """Scores (N, views, C) of cached features x (N, views, ...)."""
    head.eval()
    views = x.shape[1]
    scores = []
    for part in x.split(max(1, batch // views)):
        part_scores = head(*as_features(part.flatten(0, 1), device))                # (B views, C)
        scores.append(part_scores.unflatten(0, (-1, views)).cpu())
    return torch.cat(scores)


def probe_cached(kind, x, y, x_test, y_test, classes, lrs, epochs, batch, seed, device="cpu", progress=False,
                 split=None):
    """Train heads on cached features, choose the learning rate on held-out clips of train, test that head
    once. split: positions in x to train on and to choose by, by default a random tenth. Returns dict(metric,
    value, classes, lr, held_out, N)."""
    inner, held = split or split_off(len(x), seed)
    if len(inner) < 2:
        raise UserError(f"{len(inner)} training clips can be read; a probe needs at least 2 beside those "
                        "that choose the learning rate")
    torch.manual_seed(seed)
    first = HEADS[kind](x.shape[-1], classes).to(device)
    heads = [copy.deepcopy(first) for _ in lrs]
    steps = max(1, epochs * math.ceil(len(inner) / batch))
    batches = cached_batches(x, y, inner, batch, seed, device)
    with common.one_thread() if kind == "linear" else contextlib.nullcontext():
        train_heads(heads, batches, steps, lrs, progress=progress)

    def test(head, features, targets, score):
        probabilities = average(predict(head, features, device), targets.ndim == 2)
        return score(probabilities, targets)

    values = [test(head, x[held], y[held], measure_held_out) for head in heads]
    best = int(np.argmax(values))
    name, value, counted = test(heads[best], x_test, y_test, measure_test)
    return {
        "metric": name, "value": value, "classes": counted, "lr": lrs[best], "held_out": values[best],
        "N": len(y_test)}


# ----------------------------------------------------------------------------------------------------------
# A probe that decodes anew in each epoch: the tokens of a large set, and fine-tuning
# ----------------------------------------------------------------------------------------------------------

def bar_own_scores(batch, tokens, share, device):
    """Regularised masking (A-JEPA): a mask (B, 1, N, N) for the attention, True: attend, in which each token
    is with probability `share` barred from attending with its own score. A token that is alone has nothing
    else to attend to, and keeps it."""
    barred = torch.rand(batch, tokens, device=device) < (share if tokens > 1 else 0)            # (B, N)
    return ~torch.diag_embed(barred)[:, None]                                                   # (B, 1, N, N)


class Online(nn.Module):
    """An encoder and its heads. share: of the tokens that regularised masking bars, in training."""
    def __init__(self, encoder, heads, modality, frozen, share=0.0):
        super().__init__()
        self.vit = encoder.vit.requires_grad_(not frozen)
        self.heads = nn.ModuleList(heads)
        self.layers = encoder.layers
        self.modality = modality
        self.frozen = frozen
        self.share = share

    def train(self, mode=True):
        super().train(mode)
        self.vit.train(mode and not self.frozen)
        return self

    def draw_mask(self, given):
        """Of regularised masking, for a batch of inputs."""
        # one clip tells how many tokens there are
        first = self.vit.embed(**{key: x[:1] for key, x in given.items()})
        tokens = first.shape[1] + (self.vit.cls is not None)
        batch = len(next(iter(given.values())))
        # unspecified: drawn anew for each clip and step, the same in all layers and heads
        return bar_own_scores(batch, tokens, self.share, first.device)

    def encode(self, batch):
        """-> tokens (B, N, D), embedding (B, D)."""
        given = pick(batch, self.modality)
        mask = self.draw_mask(given) if self.training and self.share else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.vit(**given, mask=mask, layers=self.layers)
            tokens, embedding = self.vit.read_out(x, "video" in given, "audio" in given)
        return tokens.float(), embedding.float()

    def forward(self, batch):
        """-> (B, C) scores of each head."""
        tokens, embedding = self.encode(batch)
        return [head(tokens, embedding) for head in self.heads]


def train_views(rng, duration, inputs, modality):
    """One random view with its augmentation."""
    keys = MODALITIES[modality]
    view, = data.place_views([rng.uniform()], inputs, duration, "video" in keys, "audio" in keys)
    return [view._replace(video="random" if view.video else None)]


def parameter_groups(model, lrs, encoder_lr):
    """AdamW groups of an Online: each head at its learning rate without weight decay, the encoder, where it
    learns, with .05 (authors' code)."""
    groups = []
    for head, lr in zip(model.heads, lrs):
        groups.append({"params": list(head.parameters()), "peak": lr, "weight_decay": 0.0})
    if not model.frozen:
        for group in common.weight_decay_groups(model.vit, 0.05):
            groups.append({**group, "peak": encoder_lr})
    return groups


def train_online(model, listing, inner, protocol, views, process, workers):
    """Train an Online on the clips `inner` of a listing, each epoch on a new view of each."""
    optimizer = torch.optim.AdamW(parameter_groups(model, protocol.lrs, protocol.encoder_lr))
    steps = max(1, protocol.epochs * max(1, len(inner) // protocol.batch_size))
    plan = functools.partial(train_views, inputs=views.inputs, modality=views.modality)
    clips = data.Clips(listing.subset(inner.tolist()), views.inputs, plan, protocol.seed)
    order = data.Batches(len(clips), min(protocol.batch_size, len(clips)), protocol.seed, 0, steps)
    troubles = data.Troubles(len(clips), 1.0)
    loader = data.train_loader(clips, order, workers, process.device.type == "cuda")
    keys = MODALITIES[views.modality]
    begun = False
    for step, batch in enumerate(tqdm(loader, desc=protocol.probe, unit="step")):
        troubles.add(batch)
        for group in optimizer.param_groups:
            group["lr"] = common.cosine(step, steps, group["peak"], 0.0)
        has = has_all(batch, keys)
        index = inner[batch["index"]]
        troubles.name(lacking(names_of(listing, index[~has]), keys))
        if has.sum() < 2:                               # BatchNorm needs two
            continue
        index = index[has]
        targets = listing.targets(index).to(process.device)
        optimizer.zero_grad()
        with process.autocast():
            features = model.train().encode(take(batch, keys, has, process.device))
        if not begun:                                   # later it is the learning rate
            retrieval.check_finite(features[1], names_of(listing, index))
            begun = True
        learnt = 0
        for head in model.heads:                        # one after the other: the graphs of all would not fit
            with process.autocast():
                scores = head(*features)
            loss = loss_of(scores.float(), targets, protocol.smoothing)
            if math.isfinite(loss.item()):              # a rate that is too high loses, the others go on
                loss.backward()
                learnt += 1
        if not learnt:
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        optimizer.step()
    if not begun:
        raise UserError(f"{listing.name}: no two training clips of a batch have all of {', '.join(keys)}; "
                        "give another --modality")


@torch.no_grad()
def predict_online(model, listing, views, process, workers, label):
    """(probabilities (heads, N, C), the mean over the views, index (N,)) of the clips of a listing that can
    be read and have what the modality needs."""
    keys = MODALITIES[views.modality]
    parts = []
    indices = []
    model.eval()
    batches = read_clips(listing, views.inputs, keys, views.test, process, workers, label, views.crops)
    for index, given in batches:
        indices.append(index)
        with process.autocast():
            scores = torch.stack(model(given))                                      # (heads, B views, C)
        scores = scores.float().unflatten(1, (-1, views.test * views.crops))        # (heads, B, views, C)
        parts.append(average(scores, listing.multilabel).cpu())                     # (heads, B, C)
    return torch.cat(parts, 1), torch.cat(indices)


def probe_online(protocol, views, encoder, train, test, process, workers):
    """As probe_cached, but decoding anew in each epoch. Fine-tuning has one learning rate for the head and
    one for the encoder."""
    inner, held = hold_out(train, range(len(train)), protocol.seed, needed=len(protocol.lrs) > 1)
    torch.manual_seed(protocol.seed)
    heads = [HEADS[protocol.head](encoder.dim, len(train.classes)) for _ in protocol.lrs]
    model = Online(encoder, heads, views.modality, protocol.frozen, protocol.regularised_masking)
    model = model.to(process.device)
    train_online(model, train, inner, protocol, views, process, workers)
    best = 0
    held_out = None
    if held is not None:
        chosen = train.subset(held.tolist())
        scores, index = predict_online(model, chosen, views, process, workers, "held out")
        targets = train.targets(held[index])
        values = [measure_held_out(of_head, targets) for of_head in scores]
        best = int(np.argmax(values))
        held_out = values[best]
    scores, index = predict_online(model, test, views, process, workers, "test")
    if len(index) < len(test):                          # what was left out may have been a whole class
        compare_classes(train.subset(inner), test.subset(index))
    name, value, counted = measure_test(scores[best], test.targets(index))
    return {
        "metric": name, "value": value, "classes": counted, "lr": protocol.lrs[best], "held_out": held_out,
        "N": len(index)}


# ----------------------------------------------------------------------------------------------------------
# One or the other, once or fold by fold
# ----------------------------------------------------------------------------------------------------------

def cache_gigabytes(encoder, views, train, test):
    """Of the tokens of all views in bf16."""
    vit = encoder.vit
    tokens = 0
    if "video" in MODALITIES[views.modality]:
        tokens += vit.num("video")
    if "audio" in MODALITIES[views.modality]:           # the views may have another length than in training
        tokens += vit.grids["audio"][0] * (views.inputs.mel_frames // vit.patch["audio"][1])
    count = views.train * len(train)
    if train.fold is None:
        count += views.test * views.crops * len(test)
    return 2 * tokens * encoder.dim * count / 1e9


def run_probe(protocol, views, encoder, load, train, test, process, workers, cache_gb=4.0):
    """Train and test a head, once or fold by fold: dict(metric, value, classes, lr, held_out, N), for folds
    also each one's value. load(): the encoder as it was, for each fold that decodes anew."""
    online = not protocol.frozen
    if protocol.probe == "attentive":
        gigabytes = cache_gigabytes(encoder, views, train, test)
        online = gigabytes > cache_gb
        if online:
            print(f"{gigabytes:.1f} GB of tokens are more than --cache-gb {cache_gb:g}: decoding anew in "
                  f"each of {protocol.epochs} epochs")
    if not online:
        return run_cached(protocol, views, encoder, train, test, process, workers)
    if train.fold is None:
        return probe_online(protocol, views, encoder, train, test, process, workers)
    results = []
    for inner, outer in rounds(train.fold):
        results.append(
            probe_online(protocol, views, load(), train.subset(inner), train.subset(outer), process, workers))
    return join_folds(results)


def run_cached(protocol, views, encoder, train, test, process, workers):
    """As run_probe, on features that are decoded once."""
    tokens = protocol.probe == "attentive"

    def read(listing, count, crops, label):
        features, index = extract(
            {"it": encoder}, listing, views.inputs, [views.modality], count, process, workers, tokens,
            label=label, crops=crops)
        return features["it", views.modality], index

    fit = functools.partial(
        probe_cached, protocol.head, classes=len(train.classes), lrs=protocol.lrs, epochs=protocol.epochs,
        batch=protocol.batch_size, seed=protocol.seed, device=process.device, progress=True)
    x, index = read(train, views.train, 1, "features (train)")
    y = train.targets(index)
    if train.fold is None:
        x_test, index_test = read(test, views.test, views.crops, "features (test)")
        split = hold_out(train, index, protocol.seed)
        if len(index) + len(index_test) < len(train) + len(test):       # may have been a whole class
            compare_classes(train.subset(index), test.subset(index_test))
        return fit(x, y, x_test, test.targets(index_test), split=split)
    fold = train.fold[index.numpy()]
    if len(np.unique(fold)) < len(np.unique(train.fold)):
        raise UserError(f"{train.name}: a fold has no clip that can be read; look at the files with "
                        "python data.py --check")
    results = []
    for inner, outer in rounds(fold):
        compare_classes(train.subset(index[inner]), train.subset(index[outer]))
        results.append(fit(x[inner], y[inner], x[outer], y[outer]))
    return join_folds(results)


# ----------------------------------------------------------------------------------------------------------
# The small table at the end of a toy run
# ----------------------------------------------------------------------------------------------------------

def toy_report(out, data_dir, process, workers, name="toy"):
    """Linear probes for audio, video and both, and retrieval over all held-out clips: of the trained encoder,
    the same encoder untrained, the raw input, and chance. Prints the table, writes it to results.json in the
    run's folder `out`, and returns it."""
    began = time.time()
    train = data.list_clips(name, data_dir, "train")
    test = data.list_clips(name, data_dir, "test")
    encoders = {}
    for state in ("trained", "untrained"):
        encoders[state] = common.load_encoder(out, process.device, state == "untrained", cross=True)
    trained = encoders["trained"]
    inputs = data.Inputs(**trained.inputs)
    modalities = [m for m, keys in MODALITIES.items() if set(keys) <= set(trained.vit.grids)]
    table = {}
    ways = ()
    if "av" in modalities:
        ways = tuple(retrieval.WAYS)
        for name, encoder in encoders.items():
            table[name] = retrieval.evaluate(encoder, test, workers=workers, process=process)
    chance = {way: table["trained"]["chance"] for way in ways}
    encoders["raw input"] = RawInput()
    usual = trained.method["linear"]
    x, index = extract(encoders, train, inputs, modalities, 2, process, workers, label="features (train)")
    x_test, index_test = extract(
        encoders, test, inputs, modalities, usual["views"], process, workers, label="features (test)")
    y = train.targets(index)
    y_test = test.targets(index_test)
    batch, epochs = frozen_schedule(len(y))
    for name, modality in tqdm(x, desc="linear probes", unit="probe"):
        result = probe_cached(
            "linear", x[name, modality], y, x_test[name, modality], y_test, len(train.classes), usual["lr"],
            epochs, batch, seed=0)
        table.setdefault(name, {})[modality] = result["value"]
    most_common = 100 * y_test.bincount().max().item() / len(y_test)
    table["chance"] = {**dict.fromkeys(modalities, most_common), **chance}
    print_table(table, modalities, ways, len(y_test))
    table["seconds"] = round(time.time() - began, 1)
    text = json.dumps(table, indent=1) + "\n"
    file = Path(out) / "results.json"
    write_file(file, lambda f: f.write(text.encode()), "the table above is all there is")
    searched = f", retrieval by '{table['trained']['embedding']}' (retrieval.py)" if ways else ""
    print(f"evaluated in {table['seconds']:.0f} s{searched}: {file}")
    return table


def print_table(table, modalities, ways, clips):
    """The rows of toy_report on the screen."""
    heading = f"\nheld-out toy clips, percent     linear probe (N = {clips})"
    for way in ways:
        heading += f"    {way} (N = {table['trained']['N']})         "
    print(heading)
    columns = [*modalities, *itertools.product(ways, ("R@1", "R@10", "class R@1"))]
    names = [column if column in modalities else column[1] for column in columns]
    print(" " * 12 + "".join(f"{name:>11s}" for name in names))
    for name, row in table.items():
        line = f"{name:12s}"
        for column in columns:
            if column in modalities:
                value = row.get(column)
            else:
                way, measured = column
                value = row.get(way, {}).get(measured)
            line += f"{'-':>11s}" if value is None else f"{value:11.1f}"
        print(line)


# ----------------------------------------------------------------------------------------------------------
# Features in a file
# ----------------------------------------------------------------------------------------------------------

def write_file(path, write, advice):
    """run.replace_file: write(file) a file, of which no half is left. UserError with the advice where that
    fails."""
    try:
        run.replace_file(path, write)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}); {advice}") from None


@torch.no_grad()
def encode_clips(encoder, listing, inputs, modalities, views, process, workers, label="features", batch=32):
    """A batch at a time, of the clips that have all that the modalities need: (index (B,), inputs {"video" or
    "audio": (B views, ...)}, {modality: (tokens (B views, N, D), embedding (B views, D))}). The others are
    named."""
    keys = needed_keys(modalities)
    for index, given in read_clips(listing, inputs, keys, views, process, workers, label, batch=batch):
        with process.autocast():
            outputs = {modality: encoder(**pick(given, modality)) for modality in modalities}
        for tokens, embedding in outputs.values():
            for x in (tokens, embedding):
                if x is not None:                       # of the raw input
                    retrieval.check_finite(x.unflatten(0, (-1, views)), names_of(listing, index))
        yield index, given, outputs


def save_features(path, encoder, listing, views, process, workers, patch_level=False):
    """Embed each clip of a listing and write the npz that the top of this file describes. Clips that cannot
    be read, or lack a stream that the modality needs, are left out, named and counted."""
    modality = views.modality
    indices = []
    clip = []
    patch = []
    batches = encode_clips(encoder, listing, views.inputs, [modality], views.test, process, workers)
    for index, _, outputs in batches:
        tokens, embedding = outputs[modality]
        indices.append(index)
        clip.append(embedding.float().unflatten(0, (-1, views.test)).mean(1).cpu())     # (B, D)
        if patch_level:
            patch.append(tokens.half().unflatten(0, (-1, views.test)).cpu())            # (B, views, N, D)
            retrieval.check_finite(patch[-1], names_of(listing, index))                 # may exceed 65,504
    index = torch.cat(indices)
    arrays = {
        "files": np.array([os.fsdecode(bytes(listing.files[i])) for i in index]),
        "seconds": np.float64(views.inputs.seconds),
        "clip": torch.cat(clip).numpy()}
    if patch_level:
        arrays["patch"] = torch.cat(patch).numpy()
    if listing.labels is not None:
        arrays["labels"] = listing.targets(index).numpy()
        arrays["classes"] = np.array(listing.classes)
    write_file(path, lambda f: np.savez(f, **arrays), "give --save-features another place")
    shapes = [f"{key} {arrays[key].shape}" for key in ("clip", "patch", "labels") if key in arrays]
    print(f"{path}: {len(index):,} clips ({len(listing) - len(index):,} left out), {', '.join(shapes)}")


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

PROBES = ("linear", "attentive", "finetune")
NEEDS = {  # flag: what it serves; those that are not here serve all of it
    "head":                ("finetune", "attentive"),
    "cache_gb":            ("attentive",),
    "encoder_lr":          ("finetune",),
    "regularised_masking": ("finetune",),
    "epochs":              PROBES,
    "batch_size":          PROBES,
    "lr":                  PROBES,
    "crops":               PROBES,
    "split":               ("save-features",),
    "patch_level":         ("save-features",)}
RANGES = {
    "epochs": (1, 10 ** 6), "batch_size": (2, 10 ** 6), "lr": (1e-9, 10), "encoder_lr": (0, 10),
    "regularised_masking": (0, 1), "views": (1, 1000), "seconds": (0.1, 3600), "cache_gb": (0, 10 ** 6),
    "workers": (0, 1024), "seed": (0, 2 ** 31)}


def flag(name):
    return "--" + name.replace("_", "-")


def check_ranges(args, ranges):
    """UserError where a flag that was given, or one of its values, is out of its range {name: (low,
    high)}."""
    for name, (low, high) in ranges.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                common.check_range(flag(name), value, low, high)


def check_needs(parser, args):
    """UserError where a flag was given that has no effect on what is asked for."""
    purpose = "save-features" if args.save_features is not None else args.probe
    for name, purposes in NEEDS.items():
        if getattr(args, name) == parser.get_default(name) or purpose in purposes:
            continue
        if purposes == PROBES:
            needs = "a probe; leave --save-features out"
        elif purposes == ("save-features",):
            needs = "--save-features"
        else:
            needs = f"--probe {' or '.join(purposes)}"
        raise UserError(f"{flag(name)} has no effect without {needs}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=run.Help)
    add_data, add_run, add_method, _ = run.flag_groups(parser)
    add_data("--data", required=True, help=", ".join(data.SETS))
    add_data("--data-dir", help="folder with the clips and the csv files (default: none; toy: in cache/)")
    add_data("--split", choices=("train", "test", "all"), help="of --save-features; default: all")
    add_run("--ckpt", required=True, help="folder of a run, or its latest.pt")
    add_run("--seed", type=int, default=0)
    add_run("--save-features", metavar="OUT.npz",
        help="instead of a probe: write the features of the clips; default: none")
    add_run("--patch-level", action="store_true",
        help="of --save-features: the tokens too; all must fit into memory")
    add_method("--probe", choices=PROBES, default="linear",
        help="a head on the frozen clip embedding, on the frozen tokens, or all of it trained")
    add_method("--head", choices=tuple(HEADS),
        help="of --probe finetune and attentive; blocks: attentive (one query) behind four blocks; default: "
        "the method's")
    add_method("--modality", choices=tuple(MODALITIES),
        help="default: all that the encoder takes and the set has")
    add_method("--baseline", choices=("untrained", "raw"),
        help="instead of the trained encoder: as it was initialised, or the input itself; default: none")
    add_method("--encoder", choices=("context", "target"),
        help="of a method that has both; default: the one that it evaluates")
    add_method("--layers", type=int, nargs="+",
        help="blocks, from 0, whose outputs are put side by side; default: the last one's alone")
    add_method("--absent", choices=("zero", "drop"), help="of a modality; default: as in training")
    add_method("--seconds", type=float,
        help="length of a view of sound; default: the encoder's, or the clips' where they are all shorter")
    add_method("--views", type=int,
        help="test views that are averaged; default: 1 where a view holds each whole clip, else the set's "
        "own number, else the method's")
    add_method("--crops", type=int, choices=tuple(data.CROPS),
        help="crops of each test view: the centre, or also both ends of the longer side; default: the set's "
        "own number for its pictures, else 1")
    add_method("--epochs", type=int,
        help="default: 15 frozen (and at least 2,000 steps); fine-tuned the method's")
    add_method("--batch-size", type=int,
        help="default: 512 frozen (an eighth of a small set; 32 with blocks), 64 fine-tuned")
    add_method("--lr", type=float, nargs="+",
        help="tried on held-out clips of train; default: the method's; of another head 1e-3 1e-2 1e-1 1, "
        "with blocks 1e-4 3e-4 1e-3 3e-3")
    add_method("--encoder-lr", type=float, help="of the encoder in fine-tuning; default: the method's")
    add_method("--regularised-masking", type=float, default=0.0, metavar="SHARE",
        help="fine-tuning: share of the tokens that may not attend with their own score (paper of A-JEPA: "
        "0.1)")
    add_method("--cache-gb", type=float,
        help="an attentive probe caches its tokens up to this size, else it decodes anew; default: 4")
    return parser


def get_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_ranges(args, RANGES)
    if args.baseline == "raw" and (args.probe != "linear" or args.patch_level or args.layers):
        raise UserError("--baseline raw has no tokens, no layers and nothing to train; use --probe linear "
                        "without --layers, --patch-level")
    check_needs(parser, args)
    if args.probe == "finetune" and len(args.lr or ()) > 1:
        raise UserError("--lr: fine-tuning takes one learning rate")
    if args.probe == "attentive" and args.head == "linear":
        raise UserError("--head linear reads no tokens; use --probe linear, or another --head")
    if args.encoder and args.baseline:
        raise UserError("--encoder has no effect without the trained encoder; leave --baseline out")
    if args.save_features is not None:
        if args.probe != "linear":
            raise UserError("--save-features trains nothing; leave --probe out")
        out = Path(args.save_features)
        folder = out.absolute().parent
        if os.path.isdir(out) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UserError(f"--save-features {out}: its folder does not exist or is read-only, or it is a "
                            "folder itself; give a file in a folder that exists")
    return args


def main(argv=None):
    args = get_args(argv)
    began = time.time()
    process = run.start_process(args.device)
    if process.world > 1:
        raise UserError("probe.py runs in one process; start it without torchrun")
    workers = run.default_workers(process) if args.workers is None else args.workers
    load = functools.partial(
        common.load_encoder, args.ckpt, process.device, args.baseline == "untrained", args.absent,
        args.layers, args.encoder)
    encoder = load()
    seen = RawInput() if args.baseline == "raw" else encoder
    if args.save_features is not None:
        listing = data.list_clips(args.data, args.data_dir, args.split or "all")
        views = choose_views(args, encoder, listing)
        save_features(Path(args.save_features), seen, listing, views, process, workers, args.patch_level)
        return
    train = data.list_clips(args.data, args.data_dir, "train")
    test = data.list_clips(args.data, args.data_dir, "test")
    train = labelled(train, "training")
    test = labelled(test, "test")
    views = choose_views(args, encoder, train)
    if train.fold is None:
        print(f"{data.describe(train)} (train)\n{data.describe(test)} (test)")
    else:
        print(f"{data.describe(train)} (tested fold by fold)")
    protocol = choose_protocol(args, encoder.method, train)
    classes = check_classes(train, test)
    cache_gb = 4.0 if args.cache_gb is None else args.cache_gb
    result = run_probe(protocol, views, seen, load, train, test, process, workers, cache_gb)
    print_result(args, views, result, time.time() - began)
    run.add_row(args.ckpt, "probe.jsonl", {
        "data": args.data,
        "probe": args.probe,
        "head": protocol.head,
        "modality": views.modality,
        "baseline": args.baseline,
        "absent": encoder.vit.absent,
        "encoder": args.encoder,
        "layers": args.layers,
        **result,
        **classes,
        "left_out": len(test) - result["N"],
        "views": views.test,
        "crops": views.crops,
        "view_seconds": views.inputs.seconds,
        "epochs": protocol.epochs,
        "batch_size": protocol.batch_size,
        "lrs": protocol.lrs,
        "encoder_lr": protocol.encoder_lr,
        "version": run.code_version(),
        "regularised_masking": protocol.regularised_masking,
        "seed": protocol.seed,
        "ckpt": str(args.ckpt),
        "step": encoder.step,
        "seconds": round(time.time() - began, 1)})


def print_result(args, views, result, seconds):
    if "folds" in result:
        print("folds: " + "  ".join(f"{value:.1f}" for value in result["folds"]))
    rates = " ".join(dict.fromkeys(f"{lr:g}" for lr in np.atleast_1d(result["lr"])))
    print(f"{args.data}, {args.probe}, {views.modality}, {args.baseline or 'trained'}: {result['metric']} "
          f"{result['value']:.1f} (N = {result['N']:,}, {result['classes']} classes counted, lr {rates}, "
          f"{seconds:.1f} s)")


if __name__ == "__main__":
    main_guard(main)
