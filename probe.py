"""What an encoder knows: linear and attentive probes, fine-tuning, their baselines, and features in a file.

    python probe.py --ckpt RUN --data toy --probe linear --modality audio
    python probe.py --ckpt RUN --data toy --baseline untrained          # as the encoder was initialised
    python probe.py --ckpt RUN/step-*.pt RUN --data toy                 # earlier steps, each in turn
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe attentive           # A, V and AV at once
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe finetune --seeds 0 1 2
    torchrun --nproc_per_node=8 probe.py --ckpt RUN --data SET --data-dir FOLDER --probe finetune --weighted
    python probe.py --ckpt RUN/finetune-SET-av/seed0 --query dog.wav    # what it says of a person's own file
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --clips 500 --steps 1000    # few labels
    python probe.py --ckpt RUN --data SET --data-dir FOLDER --layers 3 7 11 --mix       # which blocks count
    python probe.py --ckpt RUN --data folder --data-dir clips/ --save-features clips.npz --patch-level

What a method's authors do (heads, rates, schedule, views) is the protocol in its METHOD, which its checkpoint
holds, and PROTOCOL below where they do not say. --recipe toy is for small sets: linear probes are then
scikit-learn's logistic regression, which has no steps and no rates. Where several rates are tried, the
set's official validation clips choose, or where it has none a tenth of the training clips, never the test;
then the head is trained again on all. A head that was trained on sound and pictures together is also tested
with one of them absent. A set with folds is tested fold by fold, and the mean counts.

Fine-tuning is a training run (finetune.py): a folder for each seed and fold, a log, and a checkpoint that
every script takes; stopped, the same command goes on.

Each result is a row in RUN/probe.jsonl: one for each checkpoint, each head and each modality that it was
tested on; `visualize.py curves RUN` draws them over the steps. RUN/PROBE-DATA-MODALITY/seedN (of folds
seedN-foldN) has a log.jsonl of the last heads that learnt step by step: their losses, and with --test-every
what they score on the way. `visualize.py curves` draws that folder too.

--save-features writes an npz with files (N,), clip (N, D) float32, seconds (length of a view), with
--patch-level also patch (N, views, tokens, D) float16, and where there are labels also labels, (N,) indices
or (N, C) zeros and ones, and classes (C,).
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import copy
import functools
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import common
import data
import finetune
import heads as kinds
import retrieval
import run
from common import UserError, main_guard
from features import MODALITIES, Decoded, RawInput, choose_views, extract, gigabytes, keep, nothing_has
from features import save_features, write_file


# ----------------------------------------------------------------------------------------------------------
# The protocol: how heads are trained and tested
# ----------------------------------------------------------------------------------------------------------

LRS = (1e-3, 1e-2, 1e-1, 1.0)
GENTLE_LRS = (1e-4, 3e-4, 1e-3, 3e-3)                   # larger ones tear blocks apart
HEAD_LRS = {**dict.fromkeys(kinds.HEADS, LRS), "blocks": GENTLE_LRS, "cross": GENTLE_LRS}
PROTOCOL = {
    # unspecified: all of it is ours; what a paper says in its place stands in METHOD["protocol"] of its
    # script, with the first two columns
    # name            frozen           fine-tuned       toy              what it is
    "linear":        ("standardised",  "standardised",  "regression",    "head on the embedding"),
    "attentive":     ("attentive",     "attentive",     "attentive",     "head on the tokens"),
    "both":          (False,           False,           False,           "both side by side in one run"),
    "linear_lr":     (LRS,             (1e-3,),         LRS,             "rates that are tried"),
    "attentive_lr":  (LRS,             (1e-3,),         LRS,             "of the other head"),
    "encoder_lr":    (0.0,             1e-5,            0.0,             "of the encoder"),
    "weight_decay":  (0.0,             0.05,            0.0,             "of the encoder's matrices"),
    "warmup":        (0.0,             0.0,             0.0,             "share of the steps"),
    "warmup_start":  (0.0,             0.0,             0.0,             "share of the peak"),
    "lr_end":        (0.0,             0.0,             0.0,             "where the cosine ends"),
    "clip_grad":     (None,            None,            None,            "norm of the gradient"),
    "smoothing":     (0.0,             0.0,             0.0,             "of a single label"),
    "pos_weight":    (False,           False,           False,           "of several: negatives / positives"),
    "batch_size":    (512,             64,              512,             "clips a step"),
    "batch_share":   (1 / 8,           1.0,             1 / 8,           "of the set, at most"),
    "epochs":        (15,              30,              15,              "passes over the training clips"),
    "epochs_vggsound": (15,            30,              15,              "after pre-training on VGGSound"),
    # a head would else end half trained on a small set, and that of an untrained encoder, with its badly
    # conditioned features, most of all
    "least_steps":   (2000,            0,               2000,            "even if these are more epochs"),
    "steps":         (None,            None,            None,            "instead of epochs"),
    "clips":         (None,            None,            None,            "training clips; None: all"),
    "test_clips":    (None,            None,            None,            "test clips; None: all"),
    "train_views":   (2,               None,            2,               "of a clip, in turn; None: all new"),
    "train_starts":  ("even",          "random",        "even",          "where they lie"),
    "train_crop":    ("center",        "random",        "center",        "of data.crop_transform"),
    "views":         (4,               1,               4,               "test views"),
    "starts":        ("even",          "even",          "even",          "where they lie"),
    "resize":        (None,            None,            None,            "of a test clip; crop: to its side"),
    "average":       ("probabilities", "probabilities", "probabilities", "over the test views: or logits"),
    "together":      (False,           False,           False,           "or a head reads all views at once"),
}
OWN = ("linear", "attentive", "linear_lr", "attentive_lr", "epochs_vggsound", "views")      # not in a row
COLUMNS = {"frozen": 0, "finetune": 1, "toy": 2}
BLOCKS_BATCH = 32                                       # more clips with four blocks would not fit


def choose_column(args, encoder):
    """The column of a protocol: by --probe and --recipe; without the latter 'toy' for the toy sets, and for
    an encoder that was trained on one or with that recipe."""
    if args.probe == "finetune":
        return "finetune"
    sets = (args.data, encoder.args.get("data"))
    made = any(name in data.SETS and data.SETS[name].make for name in sets)
    small = made or encoder.args.get("recipe") == "toy"
    recipe = args.recipe or ("toy" if small else "paper")
    return "toy" if recipe == "toy" else "frozen"


def choose_heads(probe, asked, values):
    """The heads of a probe: the one that is asked for, or those of the protocol."""
    if asked:
        return [asked]
    names = {"linear": ["linear"], "attentive": ["attentive"], "finetune": ["linear"]}[probe]
    if probe != "linear" and values["both"] and values["linear"] in kinds.HEADS:
        names = ["linear", "attentive"]
    return [values[name] for name in names]


def choose_protocol(args, encoder):
    """The protocol that args asks for, as a namespace with the rows of PROTOCOL, and: probe, column, seeds,
    regularised_masking, mix (of heads.make_head), heads {name: the rates that are tried}."""
    column = choose_column(args, encoder)
    values = {name: row[COLUMNS[column]] for name, row in PROTOCOL.items()}
    if column != "toy":
        for name, row in encoder.method.get("protocol", {}).items():
            values[name] = row[COLUMNS[column]]
    if encoder.args.get("data") == "vggsound":
        values["epochs"] = values["epochs_vggsound"]
    heads = {}
    for name in choose_heads(args.probe, args.head, values):
        heads[name] = HEAD_LRS.get(name, ())
        if args.probe == "finetune" or name == values["linear"]:
            heads[name] = values["linear_lr"]
        elif name == values["attentive"]:
            heads[name] = values["attentive_lr"]
        heads[name] = tuple(args.lr or heads[name])
    if "blocks" in heads:
        values["batch_size"] = min(values["batch_size"], BLOCKS_BATCH)
    for name in ("encoder_lr", "epochs", "steps", "batch_size", "clips"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
            if name == "epochs":
                values.update(least_steps=0, steps=None)
            if name == "batch_size":
                values["batch_share"] = 1.0
    if "regression" in heads:
        heads["regression"] = ()
        for name in ("lr", "epochs", "steps", "batch_size", "cache_gb", "test_every"):
            if getattr(args, name) is not None:
                raise UserError(f"{flag(name)} has no effect on a regression, which has no rates and no "
                                "steps and keeps its features; leave it out, or give --head linear")
        if args.mix:
            raise UserError("--mix: a regression learns no weights of the blocks; give --head linear, or "
                            "--probe attentive")
    return SimpleNamespace(
        **values, probe=args.probe, column=column, heads=heads, seeds=list(dict.fromkeys(args.seeds)),
        regularised_masking=args.regularised_masking, frozen=args.probe != "finetune",
        mix=len(args.layers) if args.mix else 0)


def schedule(protocol, clips, parts=1):
    """(batch, steps) of so many training clips; the batch can be shared out in so many parts."""
    batch = min(protocol.batch_size, clips, max(2, int(protocol.batch_share * clips)))
    batch = max(parts, batch - batch % parts)
    return batch, protocol.steps or max(1, protocol.epochs * (clips // batch), protocol.least_steps)


# ----------------------------------------------------------------------------------------------------------
# Which clips train, choose and test
# ----------------------------------------------------------------------------------------------------------

def split_off(n, seed, share=0.1):
    """(train, held-out) indices of n clips."""
    order = np.random.default_rng(seed).permutation(n)
    cut = max(1, round(share * n))
    return order[cut:], order[:cut]


def draw_evenly(listing, count, seed):
    """Which `count` clips to take, of each class as many, as far as they reach: (count,), in order. A clip
    with several labels counts for the rarest, one without any is not drawn."""
    labels = retrieval.rarest(listing)
    order = np.random.default_rng(seed).permutation(len(listing))
    order = order[labels[order] >= 0]
    taken = dict.fromkeys(labels.tolist(), 0)
    turns = []                                          # the how manieth of its class each clip is
    for label in labels[order].tolist():
        turns.append(taken[label])
        taken[label] += 1
    first = np.argsort(turns, kind="stable")[:count]
    return np.sort(order[first])


def divide(listing, among, protocol, seed):
    """(clips to train on, clips to choose a rate by or None) of the positions `among` in a training listing:
    the official validation clips choose; where the set has none a random tenth, if there is something to
    choose. protocol.clips: of the training clips."""
    among = np.asarray(among)
    held = np.zeros(len(among), bool) if listing.held is None else listing.held[among]
    inner = among[~held]
    if protocol.clips:
        inner = inner[draw_evenly(listing.subset(inner), protocol.clips, seed)]
    if len(inner) < 3:
        beside = f" beside {held.sum():,} official validation clips" if held.any() else ""
        raise UserError(f"{listing.name}: {len(inner)} training clips{beside}; a probe needs at least 3")
    if held.any():
        return inner, among[held]
    tried = [len(lrs) for lrs in protocol.heads.values()]
    if "regression" in protocol.heads or max(tried) > 1:
        train, choose = split_off(len(inner), seed)
        return inner[train], inner[choose]
    return inner, None


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


# ----------------------------------------------------------------------------------------------------------
# Heads are trained, chosen and tested
# ----------------------------------------------------------------------------------------------------------

@dataclass
class Watch:
    """The log of heads while they learn: their losses, and every `test_every` steps what they score on the
    clips `outer` of a source, by which nothing is chosen."""
    folder: Path
    test_every: int | None
    protocol: SimpleNamespace
    source: Decoded
    outer: np.ndarray

    def begin(self, names):
        self.names = names
        self.log = run.Log(self.folder)

    def step(self, step, heads, losses, last):
        """losses: of the heads, those that are lost are not finite; last: whether no step follows."""
        values = {f"loss/{name}": loss for name, loss in zip(self.names, losses) if math.isfinite(loss)}
        test = bool(self.test_every) and (last or (step + 1) % self.test_every == 0)
        modality = self.source.views.modality
        found = score(heads, self.source, self.outer, [modality], self.protocol, "test") if test else {}
        for positions, scores in found.values():
            targets = self.source.listing.targets(positions)
            for name, of_head in zip(self.names, scores):
                if of_head.isfinite().all():
                    metric, value, _ = kinds.measure(of_head, targets)
                    values[f"test {metric}/{name}"] = value
        self.log.add(step, values, test or last)


def train_heads(heads, lrs, source, listing, chosen, protocol, seed, label, watch=None):
    """Train heads on a frozen encoder, each at its rate, on the clips `chosen` of a listing, in one pass over
    their features: AdamW without weight decay. The losses of the heads of one rate are summed and their
    gradient is clipped as one. watch: a Watch that has begun."""
    process = source.process
    batch, steps = schedule(protocol, len(chosen))
    groups = [{"params": list(head.parameters()), "peak": lr, "weight_decay": 0.0}
              for head, lr in zip(heads, lrs)]
    optimizer = torch.optim.AdamW(groups)
    weight = None
    if protocol.pos_weight and listing.multilabel:
        positives = count_positives(listing, chosen)
        weight = kinds.positive_weight(positives, len(chosen)).float().to(process.device)
    order = data.Batches(len(chosen), batch, seed, 0, steps)
    begun = False
    batches = tqdm(source.training(chosen, order), desc=label, total=steps, unit="step")
    for step, (positions, tokens, embedding) in enumerate(batches):
        if len(positions) < 2:                          # BatchNorm needs two
            continue
        begun = True
        for group in optimizer.param_groups:
            group["lr"] = kinds.learning_rate(
                step, steps, group["peak"], protocol.warmup, protocol.warmup_start, protocol.lr_end)
        targets = listing.targets(positions).to(process.device)
        optimizer.zero_grad()
        losses = []
        for head in heads:
            with process.autocast():
                scores = head.train()(tokens, embedding)
            loss = kinds.loss_of(scores.float(), targets, protocol.smoothing, weight)
            losses.append(loss.item())
            if math.isfinite(losses[-1]):               # a rate that is too high loses, the others go on
                loss.backward()
        if not any(map(math.isfinite, losses)):
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        clip_gradients(optimizer, protocol)
        optimizer.step()
        if watch:
            watch.step(step, heads, losses, step + 1 == steps)
    if not begun:
        raise UserError(f"{listing.name}: no two training clips of a batch can be read; give another "
                        "--modality, or look at the files with python data.py --check")


def count_positives(listing, chosen):
    """How many of the clips `chosen` are of each class, (C,)."""
    wanted = np.zeros(len(listing), bool)
    wanted[chosen] = True
    labels = listing.labels[wanted.repeat(np.diff(listing.offsets))]
    return torch.from_numpy(np.bincount(labels, minlength=len(listing.classes)))


def clip_gradients(optimizer, protocol):
    """Those of the heads of each rate as one."""
    if protocol.clip_grad is None:
        return
    rates = {}
    for group in optimizer.param_groups:
        rates.setdefault(group["peak"], []).extend(group["params"])
    for parameters in rates.values():
        nn.utils.clip_grad_norm_(parameters, protocol.clip_grad)


@torch.no_grad()
def score(heads, source, chosen, modalities, protocol, label):
    """{modality: (positions of the clips that have it (n,), scores (heads, n, C), means over the views)}."""
    multilabel = source.listing.multilabel
    parts = {}
    for outputs in source.testing(chosen, modalities, label):
        for modality, (positions, tokens, embedding) in outputs.items():
            views = embedding.shape[1]
            given = (None if tokens is None else tokens.flatten(0, 1), embedding.flatten(0, 1))
            scores = []
            for head in heads:
                with source.process.autocast():
                    of_views = head.eval()(*given).unflatten(0, (-1, views)).cpu()              # (B, V, C)
                scores.append(kinds.average(of_views, multilabel, protocol.average))            # (B, C)
            parts.setdefault(modality, []).append((positions, torch.stack(scores)))
    return {modality: join_scores(batches) for modality, batches in parts.items()}


def join_scores(batches):
    """[(positions (n,), scores (heads, n, C))] as one, in the order of the positions."""
    positions, scores = zip(*batches)
    positions, order = torch.cat(positions).sort()
    return positions, torch.cat(scores, 1)[:, order]


def score_shared(heads, source, chosen, modalities, protocol, label):
    """`score`, of which each process does its share, for all processes alike."""
    process = source.process
    found = {}
    error = None
    try:
        mine = chosen[process.rank::process.world]
        if len(mine):
            found = score(heads, source, mine, modalities, protocol, label)
    except data.NoClip as e:                            # the clips of the other processes may be whole
        error = e
    parts = {}
    for of_rank in process.gather(found):
        for modality, scores in of_rank.items():
            parts.setdefault(modality, []).append(scores)
    if error and not parts:
        raise error
    return {modality: join_scores(batches) for modality, batches in parts.items()}


def measure_held_out(scores, targets):
    """The value that a rate is chosen by; one that made scores of no finite numbers comes last."""
    return kinds.measure(scores, targets)[1] if scores.isfinite().all() else -math.inf


def measure_test(scores, targets):
    """heads.measure. UserError where the scores are no finite numbers."""
    if not scores.isfinite().all():
        raise UserError("the scores of the test clips are not finite numbers: the head did not learn; lower "
                        "--lr")
    return kinds.measure(scores, targets)


def fit_regression(x, y, classes, inner, held, again=True, average="probabilities"):
    """The regression of features x (N, V, D) and class indices y (N,) on the clips `inner`, at the strength
    that is best on `held`, and then `again` on all: (head, dict(C, held_out)). average: over the views."""
    def fit(clips, strengths):
        flat = x[clips].flatten(0, 1)                                   # (clips views, D)
        return kinds.regressions(flat, y[clips].repeat_interleave(x.shape[1]), classes, strengths)

    heads = fit(inner, kinds.STRENGTHS)
    values = []
    for head in heads:
        scores = head(None, x[held].flatten(0, 1)).unflatten(0, (-1, x.shape[1]))
        values.append(measure_held_out(kinds.average(scores, False, average), y[held]))
    best = int(np.argmax(values))
    C = kinds.STRENGTHS[best]
    head = fit(np.concatenate([inner, held]), [C])[0] if again else heads[best]
    return head, {"lr": None, "C": C, "held_out": values[best]}


def fit_kept(protocol, source, listing, inner, held):
    """fit_regression of the kept embeddings: ([head], [dict(lr, C, held_out)])."""
    if listing.multilabel:
        raise UserError(f"{listing.name}: a clip has several labels, which a regression does not take; give "
                        "--head linear, or --recipe paper")
    inner = source.readable(inner)
    held = source.readable(held)
    clips = np.concatenate([inner, held])
    places = np.arange(len(clips))
    again = listing.held is None or not listing.held.any()
    head, choice = fit_regression(
        source.embedding[source.row[clips]], listing.targets(clips), len(listing.classes),
        places[:len(inner)], places[len(inner):], again, protocol.average)
    return [head.to(source.process.device)], [choice]


def fit_heads(protocol, source, listing, inner, held, seed, watch=None):
    """Train the heads of a protocol at each rate, choose by the clips `held`, and train the best on all where
    these are no official ones: ([head], [dict(lr, held_out)]). watch: a Watch of it."""
    candidates = []
    for name, lrs in protocol.heads.items():
        candidates += [(name, lr) for lr in lrs]
    dim = source.encoder.dim
    torch.manual_seed(seed)
    first = {}
    for name in protocol.heads:
        first[name] = kinds.make_head(name, dim, len(listing.classes), protocol.mix)

    def train(candidates, chosen, label, watch=None):
        heads = [copy.deepcopy(first[name]).to(source.process.device) for name, _ in candidates]
        if watch:
            several = len(candidates) > len(protocol.heads)         # rates of a head
            watch.begin([f"{name}, lr {lr:g}" if several else name for name, lr in candidates])
        torch.manual_seed(seed)
        lrs = [lr for _, lr in candidates]
        train_heads(heads, lrs, source, listing, chosen, protocol, seed, label, watch)
        return heads

    official = listing.held is not None and listing.held.any()
    again = held is not None and not official and len(candidates) > len(protocol.heads)
    heads = train(candidates, inner, protocol.probe, None if again else watch)
    if held is None:
        return heads, [{"lr": lr, "held_out": None} for _, lr in candidates]
    modality = source.views.modality
    found = score(heads, source, held, [modality], protocol, "held out")
    if modality not in found:
        raise nothing_has(listing, MODALITIES[modality])
    positions, scores = found[modality]
    values = [measure_held_out(of_head, listing.targets(positions)) for of_head in scores]
    best = []
    for name in protocol.heads:
        own = [i for i, (other, _) in enumerate(candidates) if other == name]
        best.append(max(own, key=lambda i: values[i]))
    chosen = [{"lr": candidates[i][1], "held_out": values[i]} for i in best]
    if not again:
        return [heads[i] for i in best], chosen
    everything = np.sort(np.concatenate([inner, held]))
    return train([candidates[i] for i in best], everything, f"{protocol.probe}, on all", watch), chosen


def fit_and_test(protocol, sources, train, test, task, tested, watch=None):
    """Train on clips of one listing, test on those of another: what test_heads returns. sources: of either
    listing's features; watch: a Watch of heads that learn step by step."""
    source, test_source = sources
    readable = source.readable(task.inner)
    if len(readable) < len(task.inner):                 # what is left out may be a whole class
        compare_classes(train.subset(readable), test.subset(task.outer))
    if "regression" in protocol.heads:
        heads, chosen = fit_kept(protocol, source, train, task.inner, task.held)
    else:
        heads, chosen = fit_heads(protocol, source, train, task.inner, task.held, task.seed, watch)
    return test_heads(protocol, heads, chosen, test_source, train.subset(readable), task.outer, tested)


def test_heads(protocol, heads, chosen, source, train, outer, tested):
    """Test heads on the clips `outer` of a source: {(head, modality tested on): dict(metric, value, classes,
    lr, held_out, N)}, of a mix also mix_weights. train: the listing that they learned from."""
    test = source.listing
    if protocol.mix:
        for head, choice in zip(heads, chosen):
            choice["mix_weights"] = [round(w, 4) for w in head.weights.softmax(0).tolist()]
    found = score_shared(heads, source, outer, tested, protocol, "test")
    if source.views.modality not in found:
        raise nothing_has(test, MODALITIES[source.views.modality])
    index, _ = found[source.views.modality]
    if len(index) < len(outer):
        compare_classes(train, test.subset(index))
    results = {}
    for which, (positions, scores) in found.items():
        targets = test.targets(positions)
        for name, of_head, choice in zip(protocol.heads, scores, chosen):
            metric, value, counted = measure_test(of_head, targets)
            results[name, which] = {
                "metric": metric, "value": value, "classes": counted, **choice, "N": len(positions),
                "left_out": len(outer) - len(positions)}
    return results


def tune_and_test(args, protocol, views, load, train, test, task, tested, process, workers, out):
    """fit_and_test of an encoder that learns with its heads, in the folder `out`; None where a signal
    came."""
    listing = train.subset(task.inner)
    parts = process.world * args.accumulate if args.batch_size is None else 1
    batch, steps = schedule(protocol, len(listing), parts)
    encoder = load()
    tuned = finetune.tune(args, protocol, views, encoder, listing, batch, steps, task.seed, out)
    if tuned is None:
        return None
    with torch.compiler.set_stance("force_eager"):     # each length of a test batch would compile anew
        return test_tuned(protocol, views, encoder, tuned, train, test, task, tested, process, workers)


def test_tuned(protocol, views, encoder, tuned, train, test, task, tested, process, workers):
    """Test the heads of a Tuned, which has trained the encoder."""
    heads = list(tuned.heads.values())
    held_out = [None] * len(heads)
    if task.held is not None:
        source = Decoded(encoder, train, views, process, workers, True)
        found = score_shared(heads, source, task.held, [views.modality], protocol, "held out")
        if views.modality not in found:
            raise nothing_has(train, MODALITIES[views.modality])
        positions, scores = found[views.modality]
        held_out = [measure_held_out(of_head, train.targets(positions)) for of_head in scores]
    chosen = []
    for (lr,), value in zip(protocol.heads.values(), held_out):
        chosen.append({"lr": lr, "held_out": value})
    source = Decoded(encoder, test, views, process, workers, True)
    return test_heads(protocol, heads, chosen, source, train.subset(task.inner), task.outer, tested)


# ----------------------------------------------------------------------------------------------------------
# Once, or fold by fold, or seed by seed
# ----------------------------------------------------------------------------------------------------------

def spread(values):
    """The standard deviation of the sample; None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def join_folds(results):
    """The results of all folds as one: the mean, and what stands for each fold."""
    each = {}
    for key in results[0]:
        each[key] = [result[key] for result in results]
    return {
        **results[0],
        **{key: each[key] for key in ("lr", "C", "held_out", "mix_weights") if key in each},
        "value": float(np.mean(each["value"])),
        "folds": each["value"],
        "N": sum(each["N"]),
        "left_out": sum(each["left_out"])}


def join_seeds(results):
    """The results of all seeds as one: the mean, the standard deviation, and each one's value."""
    values = [result["value"] for result in results]
    joined = {**results[0], "value": float(np.mean(values)), "std": spread(values), "values": values}
    if len(results) > 1:
        for key in ("lr", "C", "held_out", "mix_weights"):
            if key in joined:
                joined[key] = [result[key] for result in results]
    return joined


@dataclass(frozen=True)
class Task:
    """One head's training: positions in the listings of training and test clips."""
    seed: int
    fold: int
    inner: np.ndarray                   # to train on
    held: np.ndarray | None             # to choose by
    outer: np.ndarray                   # to test on


def list_tasks(protocol, train, test):
    """The Tasks of all seeds and folds."""
    parts = [(np.arange(len(train)), np.arange(len(test)))]
    if train.fold is not None:
        parts = rounds(train.fold)
    tasks = []
    for seed in protocol.seeds:
        for fold, (among, outer) in enumerate(parts):
            inner, held = divide(train, among, protocol, seed)
            if protocol.test_clips and train.fold is None:
                outer = draw_evenly(test, protocol.test_clips, seed=0)
            tasks.append(Task(seed, fold, inner, held, outer))
    return tasks


def union(parts):
    """All positions of some arrays, of which one may be None, each once and in order."""
    return np.unique(np.concatenate([part for part in parts if part is not None] or [np.arange(0)]))


def warn_of_few_steps(protocol, clips):
    batch, steps = schedule(protocol, clips)
    if "regression" not in protocol.heads and steps < 200:
        print(f"{steps} steps of {batch} clips: a head may end half trained; raise --steps, or give --recipe "
              "toy")


def count_epochs(protocol, clips):
    """How many views of each of so many training clips are asked for."""
    batch, steps = schedule(protocol, clips)
    return math.ceil(steps / (clips // batch))


def open_sources(protocol, views, encoder, train, test, tasks, tested, process, workers, cache_gb):
    """(source of the training listing, source of the test listing) for a frozen encoder: kept in memory where
    the features are not more than cache_gb, else decoded whenever they are asked for."""
    tokens = bool(set(protocol.heads) & set(kinds.ON_TOKENS))
    sources = [Decoded(encoder, listing, views, process, workers, tokens) for listing in (train, test)]
    if train.fold is not None:                          # the same clips: each bad one is named once
        sources[1].named = sources[0].named
    held = union([task.held for task in tasks])
    inner = union([task.inner for task in tasks] + ([] if train.held is not None else [held]))
    outer = union([task.outer for task in tasks])
    epochs = max(count_epochs(protocol, len(task.inner)) for task in tasks)
    if "regression" in protocol.heads:                  # nothing to choose by but what is kept already
        inner = union([inner, held])
        held = held[:0]
        epochs = 2
    size = gigabytes(encoder, views, epochs, tokens, (len(inner), len(held), len(outer)), tested)
    if size > cache_gb and "regression" not in protocol.heads:
        print(f"{size:.1f} GB of features are more than --cache-gb {cache_gb:g}: decoding anew in each of "
              f"{epochs} epochs")
        return sources
    return (keep(sources[0], epochs, inner, held, [views.modality], "train"),
            keep(sources[1], epochs, (), outer, tested, "test"))


def run_probe(args, protocol, views, encoder, load, train, test, tasks, process, workers):
    """Train and test the heads, once, or fold by fold, and for each seed: {(head, modality that it was tested
    on): dict(metric, value, classes, lr, held_out, N), also std and the values of the seeds, and for folds
    each one's value}; None where a signal came. load(): the encoder as it was, for each that is
    fine-tuned."""
    tested = views.tested
    if protocol.frozen:
        cache_gb = 4.0 if args.cache_gb is None else args.cache_gb
        sources = open_sources(
            protocol, views, encoder, train, test, tasks, tested, process, workers, cache_gb)
    results = {}
    for task in tasks:
        out = folder_of(args, views, train, task)
        if protocol.frozen:
            watch = Watch(out, args.test_every, protocol, sources[1], task.outer)
            found = fit_and_test(protocol, sources, train, test, task, tested, watch)
        else:
            found = tune_and_test(
                args, protocol, views, load, train, test, task, tested, process, workers, out)
        if found is None:
            return None
        for key, result in found.items():
            results.setdefault(key, {}).setdefault(task.seed, []).append(result)
    joined = {}
    for key, seeds in results.items():
        of_seeds = []
        for folds in seeds.values():
            of_seeds.append(folds[0] if train.fold is None else join_folds(folds))
        joined[key] = join_seeds(of_seeds)
    return joined


def folder_of(args, views, train, task):
    """Where a fine-tuning is kept, and the log of a head: in --out, or beside the checkpoint, a folder for
    each seed and fold."""
    file = common.checkpoint_file(args.ckpt)
    name = f"{args.probe}-{args.data}-{views.modality}"
    if file.name != "latest.pt":
        name += f"-{file.stem}"
    if args.baseline:
        name += f"-{args.baseline}"
    folder = Path(args.out) if args.out else file.parent / name
    return folder / (f"seed{task.seed}" if train.fold is None else f"seed{task.seed}-fold{task.fold}")


# ----------------------------------------------------------------------------------------------------------
# The small table at the end of a toy run
# ----------------------------------------------------------------------------------------------------------

FEW = 10                                                # labelled clips of a class, and draws of these
DRAWS = 5


def probe_regression(x, y, x_test, y_test, classes, train, count=None, seed=0):
    """Top-1 in percent of a regression on features x (N, V, D) of a listing's clips; count: on so many."""
    clips = np.arange(len(y)) if count is None else draw_evenly(train, count, seed)
    inner, held = split_off(len(clips), seed)
    head, _ = fit_regression(x, y, classes, clips[inner], clips[held])
    with torch.no_grad():
        scores = head(None, x_test.flatten(0, 1)).unflatten(0, x_test.shape[:2])
    return measure_test(kinds.average(scores, False, "probabilities"), y_test)[1]


def toy_report(out, data_dir, process, workers, name="toy"):
    """Linear probes for audio, video and both, with all labels and with ten of a class, and retrieval over
    all held-out clips: of the trained encoder, the same encoder untrained, the raw input, and chance. Prints
    the table, writes it to results.json in the run's folder `out`, and returns it."""
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
    toy = {name: row[COLUMNS["toy"]] for name, row in PROTOCOL.items()}
    x, index = extract(
        encoders, train, inputs, modalities, toy["train_views"], process, workers, "features (train)")
    x_test, index_test = extract(
        encoders, test, inputs, modalities, toy["views"], process, workers, "features (test)")
    y_test = test.targets(index_test)
    train = train.subset(index)
    fit = functools.partial(
        probe_regression, y=train.targets(range(len(train))), y_test=y_test, classes=len(train.classes),
        train=train)
    for name, modality in tqdm(x, desc="linear probes", unit="probe"):
        row = table.setdefault(name, {})
        given = dict(x=x[name, modality], x_test=x_test[name, modality])
        row[modality] = fit(**given)
        few = [fit(**given, count=FEW * len(train.classes), seed=seed) for seed in range(DRAWS)]
        row.setdefault("few", {})[modality] = float(np.mean(few))
    most_common = dict.fromkeys(modalities, 100 * y_test.bincount().max().item() / len(y_test))
    table["chance"] = {**most_common, "few": most_common, **chance}
    print_table(table, modalities, ways, test.name, len(y_test))
    table["seconds"] = round(time.time() - began, 1)
    text = json.dumps(table, indent=1) + "\n"
    file = Path(out) / "results.json"
    write_file(file, lambda f: f.write(text.encode()), "the table above is all there is")
    searched = f", retrieval by '{table['trained']['embedding']}' (retrieval.py)" if ways else ""
    print(f"evaluated in {table['seconds']:.0f} s{searched}: {file}")
    return table


def print_table(table, modalities, ways, data_name, clips):
    """The rows of toy_report on the screen: the probes, with all labels and with few, then retrieval."""
    columns = [((m,), m) for m in modalities] + [(("few", m), m) for m in modalities]
    width = 11 * len(modalities)
    print(f"\nheld-out {data_name} clips, percent (N = {clips}), linear probe of")
    print(" " * 12 + f"{'all labels':>{width}s}{f'{FEW} a class':>{width}s}")
    print_rows(table, columns)
    if ways:
        columns = []
        for way in ways:
            columns += [((way, measured), measured) for measured in ("R@1", "R@10", "class R@1")]
        titles = [f"{way} (N = {table['trained']['N']})" for way in ways]
        print("\n" + " " * 12 + "".join(f"{title:>33s}" for title in titles))
        print_rows({name: row for name, row in table.items() if ways[0] in row}, columns)


def print_rows(table, columns):
    """columns: [(where it lies in a row, heading)]"""
    print(" " * 12 + "".join(f"{heading:>11s}" for _, heading in columns))
    for name, row in table.items():
        line = f"{name:12s}"
        for path, _ in columns:
            value = functools.reduce(lambda found, key: found.get(key, {}), path, row)
            line += f"{value:11.1f}"
        print(line)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

PROBES = ("linear", "attentive", "finetune")
NEEDS = {  # flag: what it serves; those that are not here serve all of it
    "cache_gb":            ("linear", "attentive"),
    "test_every":          ("linear", "attentive"),
    "encoder_lr":          ("finetune",),
    "regularised_masking": ("finetune",),
    **dict.fromkeys(("out", "fresh", "accumulate", "log_every", "save_every", "max_bad", "compile",
                     "checkpoint_activations", "weighted", "mixup", "specaugment"), ("finetune",)),
    **dict.fromkeys(("head", "epochs", "steps", "batch_size", "lr", "crops", "clips", "seeds"), PROBES),
    "mix":                 PROBES,
    "split":               ("save-features",),
    "patch_level":         ("save-features",)}
RANGES = {
    "epochs": (1, 10 ** 6), "steps": (1, 10 ** 9), "batch_size": (2, 10 ** 6), "lr": (1e-9, 10),
    "test_every": (1, 10 ** 9), "encoder_lr": (0, 10), "regularised_masking": (0, 1), "views": (1, 1000),
    "seconds": (0.1, 3600), "cache_gb": (0, 10 ** 6), "workers": (0, 1024), "seed": (0, 2 ** 31),
    "seeds": (0, 2 ** 31), "clips": (0, 10 ** 9), "mixup": (0, 1000), "specaugment": (0, 10 ** 6),
    **run.LOOP_RANGES}


def flag(name):
    return "--" + name.replace("_", "-")


def check_ranges(args, ranges):
    """UserError where a flag that was given, or one of its values, is out of its range {name: (low,
    high)}."""
    for name, (low, high) in ranges.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                common.check_range(flag(name), value, low, high)


ASKING = ("ckpt", "query", "device", "bf16", "workers")  # the flags that --query has


def check_needs(parser, args):
    """UserError where a flag was given that has no effect on what is asked for."""
    for name, value in vars(args).items():
        if args.query and name not in ASKING and value != parser.get_default(name):
            raise UserError(f"{flag(name)} has no effect with --query, which asks the heads of a fine-tuned "
                            "checkpoint; leave it out")
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
    add_data("--data", help=f"{', '.join(data.SETS)} (default: none, with --query)")
    add_data("--data-dir", help="folder with the clips and the csv files (default: none; toys: in cache/)")
    add_data("--query", metavar="FILE",
        help="what a fine-tuned --ckpt says of a person's own file: its best classes (default: none)")
    add_data("--split", choices=("train", "test", "all"), help="of --save-features; default: all")
    add_run("--ckpt", nargs="+", required=True,
        help="folder of a run, its latest.pt or another checkpoint; of several, each in turn")
    add_run("--seeds", type=int, nargs="+", default=[0],
        help="of the head's start, the clips drawn and held out, and their order; of several the row has the "
        "mean and the standard deviation")
    add_run("--save-features", metavar="OUT.npz",
        help="instead of a probe: write the features of the clips; default: none")
    add_run("--patch-level", action="store_true",
        help="of --save-features: the tokens too; all must fit into memory")
    add_method("--probe", choices=PROBES, default="linear",
        help="a head on the frozen clip embedding; on the frozen tokens, or as the protocol says both side "
        "by side; or all of it trained")
    add_method("--recipe", choices=("paper", "toy"),
        help="the method's protocol, or that of small sets, in which a linear probe is a regression; "
        "default: toy for the toy sets, and for an encoder that was trained so")
    add_method("--head", choices=(*kinds.HEADS, "regression"),
        help="linear (behind a LayerNorm), standardised, or a logistic regression by scikit-learn, on the "
        "embedding; attentive (one query), cross (with residual and MLP), or blocks (cross behind four "
        "blocks), on the tokens; default: the protocol's")
    add_method("--modality", choices=tuple(MODALITIES),
        help="default: all that the encoder takes and the set has")
    add_method("--baseline", choices=("untrained", "raw"),
        help="instead of the trained encoder: as it was initialised, or the input itself; default: none")
    add_method("--encoder", choices=("context", "target"),
        help="of a method that has both; default: the one that it evaluates")
    add_method("--layers", type=int, nargs="+",
        help="blocks, from 0, whose outputs are put side by side; default: the last one's alone")
    add_method("--mix", action="store_true",
        help="the head reads the average of --layers instead, one learned weight for each block (SUPERB)")
    add_method("--absent", choices=("zero", "drop"), help="of a modality; default: as in training")
    add_method("--seconds", type=float,
        help="length of a view of sound; default: the encoder's, or the clips' where they are all shorter")
    add_method("--views", type=int,
        help="test views that are averaged; default: 1 where a view holds each whole clip, else the set's "
        "own number, else the method's")
    add_method("--crops", type=int, choices=tuple(data.CROPS),
        help="crops of each test view: the centre, or also both ends of the longer side; default: the set's "
        "own number for its pictures, else 1")
    add_method("--clips", type=int,
        help="labelled training clips, drawn evenly over the classes by the seed, 0: all; default: all, or "
        "the protocol's")
    add_method("--epochs", type=int, help="default: the protocol's (on a small set at least 2,000 steps)")
    add_method("--steps", type=int, help="instead of --epochs; default: none, or the protocol's")
    add_method("--batch-size", type=int, help="default: the protocol's (of a small set an eighth)")
    add_method("--lr", type=float, nargs="+",
        help="of the head; of several, held-out clips of train choose; default: the protocol's; of another "
        "head 1e-3 1e-2 1e-1 1, of blocks and cross 1e-4 3e-4 1e-3 3e-3")
    add_method("--test-every", type=int,
        help="of a frozen encoder's heads: test them every so many steps too, for the curves alone; default: "
        "none")
    add_method("--cache-gb", type=float,
        help="a probe keeps its features in memory up to this size, else it decodes anew; default: 4")
    tuning_flags(parser.add_argument_group("fine-tuning").add_argument)
    return parser


def tuning_flags(add):
    """The flags of fine-tuning alone."""
    add("--encoder-lr", type=float, help="of the encoder; default: the method's")
    add("--regularised-masking", type=float, default=0.0, metavar="SHARE",
        help="share of the tokens that may not attend with their own score (paper of A-JEPA: 0.1)")
    add("--weighted", action="store_true",
        help="draw clips by the inverse frequency of their classes, with replacement (AST)")
    add("--mixup", type=float, default=0.0, metavar="ALPHA",
        help="mix the clips of a micro-batch in pairs, all at one share from Beta(ALPHA, ALPHA); the log's "
        "top-1 is then of mixed clips")
    add("--specaugment", type=int, nargs=2, metavar=("F", "T"),
        help="hide a band of up to F mel bins and one of up to T frames of each view of sound; default: none")
    add("--out", help="folder, with one for each seed and fold in it (default: finetune-DATA-MODALITY beside "
        "the checkpoint)")
    run.loop_flags(add, add, add)


def get_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    check_ranges(args, RANGES)
    if not args.query and not args.data:
        raise UserError("give --data SET, or with --query FILE ask a fine-tuned checkpoint")
    if args.baseline == "raw" and (args.probe != "linear" or args.patch_level or args.layers or args.mix):
        raise UserError("--baseline raw has no tokens, no layers and nothing to train; use --probe linear "
                        "without --layers, --mix, --patch-level")
    check_needs(parser, args)
    if args.mix and len(set(args.layers or ())) < 2:
        raise UserError("--mix averages blocks; give --layers with at least two, such as --layers 1 3")
    if args.probe == "finetune" and len(args.lr or ()) > 1:
        raise UserError("--lr: fine-tuning takes one learning rate")
    if len(args.ckpt) > 1 and (args.out or args.query):
        raise UserError(f"{'--out' if args.out else '--query'} is for one encoder; give one --ckpt")
    on_embedding = args.head in (*kinds.ON_EMBEDDING, "regression")
    if args.probe == "attentive" and on_embedding:
        raise UserError(f"--head {args.head} reads no tokens; use --probe linear, or another --head")
    if args.probe == "linear" and args.head and not on_embedding:
        raise UserError(f"--head {args.head} reads tokens; use --probe attentive, or another --head")
    if args.probe == "finetune" and args.head == "regression":
        raise UserError("--head regression trains no encoder; use --probe linear, or another --head")
    if args.probe == "finetune" and args.recipe == "toy":
        raise UserError("--recipe toy is for frozen encoders; leave it out")
    if args.encoder and args.baseline:
        raise UserError("--encoder has no effect without the trained encoder; leave --baseline out")
    if args.save_features is not None:
        if len(args.ckpt) > 1:
            raise UserError("--save-features writes one file; give one --ckpt")
        if args.probe != "linear":
            raise UserError("--save-features trains nothing; leave --probe out")
        out = Path(args.save_features)
        folder = out.absolute().parent
        if os.path.isdir(out) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UserError(f"--save-features {out}: its folder does not exist or is read-only, or it is a "
                            "folder itself; give a file in a folder that exists")
    return args


BEST = 5                                                # classes that --query shows
TUNING = ("regularised_masking", "weighted", "mixup", "specaugment")    # flags of fine-tuning in a row


def probe_checkpoint(args, process, workers):
    """Probe the one checkpoint args.ckpt, or save its features, as the flags say; whether it was done before
    a signal came."""
    began = time.time()
    load = functools.partial(
        common.load_encoder, args.ckpt, process.device, args.baseline == "untrained", args.absent,
        args.layers, args.encoder)
    encoder = load()
    protocol = choose_protocol(args, encoder)
    if args.save_features is not None:
        listing = data.list_clips(args.data, args.data_dir, args.split or "all")
        views = choose_views(args, encoder, listing, protocol)
        seen = RawInput(views.modality) if args.baseline == "raw" else encoder
        save_features(Path(args.save_features), seen, listing, views, process, workers, args.patch_level)
        return True
    with process.alone():
        train, test, views, tasks, classes = look_at_set(args, encoder, protocol, process)
    seen = RawInput(views.modality) if args.baseline == "raw" else encoder
    results = run_probe(args, protocol, views, seen, load, train, test, tasks, process, workers)
    if results is not None and process.main:
        write_rows(args, encoder, protocol, views, results, classes, round(time.time() - began, 1))
    return results is not None


def look_at_set(args, encoder, protocol, process):
    """Say what there is of a set: (training clips, test clips, Views, Tasks, what check_classes returns)."""
    print(f"{args.ckpt}, step {encoder.step:,}")
    train = labelled(run.list_clips(args, process), "training")
    test = labelled(data.list_clips(args.data, args.data_dir, "test"), "test")
    if "protocol" not in encoder.method and protocol.column != "toy":
        print(f"{args.ckpt} holds no protocol of its method; an older version of the code wrote it: the "
              "general one is taken (PROTOCOL in probe.py)")
    views = choose_views(args, encoder, train, protocol)
    if train.fold is None:
        print(f"{data.describe(train)} (train)\n{data.describe(test)} (test)")
    else:
        print(f"{data.describe(train)} (tested fold by fold)")
    tasks = list_tasks(protocol, train, test)
    classes = check_classes(train, test)
    if train.fold is None and (protocol.clips or protocol.test_clips):
        first = tasks[0]
        learnt = train.subset(union([first.inner, first.held]))
        classes = check_classes(learnt, test.subset(first.outer))
    warn_of_few_steps(protocol, len(tasks[0].inner))
    return train, test, views, tasks, classes


def write_rows(args, encoder, protocol, views, results, classes, seconds):
    """Each result on the screen, and as a row of probe.jsonl beside the checkpoint."""
    for (head, tested), result in results.items():
        print_result(args, protocol, views, head, tested, result)
        run.add_row(args.ckpt, "probe.jsonl", {
            "data": args.data,
            "probe": args.probe,
            "head": head,
            "modality": views.modality,
            "tested": tested,
            "baseline": args.baseline,
            "absent": encoder.vit.absent,
            "encoder": args.encoder,
            "layers": args.layers,
            "mix": args.mix,
            **result,
            **classes,
            "views": views.test,
            "crops": views.crops,
            "view_seconds": views.inputs.seconds,
            "lrs": protocol.heads[head],
            **{name: getattr(protocol, name) for name in PROTOCOL if name not in OWN},
            "recipe": protocol.column,
            "version": run.code_version(),
            **{name: getattr(args, name) for name in TUNING},
            "seeds": protocol.seeds,
            "ckpt": str(args.ckpt),
            "step": encoder.step,
            "seconds": seconds})
    print(f"{seconds:.1f} s")


def show_classes(args, process):
    """--query: the best classes of one file on the screen, by each head."""
    found, classes = finetune.classify(args.ckpt[0], args.query, process)
    for name, probabilities in found.items():
        print(f"{args.query}, by the head '{name}':")
        for share, index in zip(*probabilities.topk(min(BEST, len(classes)))):
            print(f"{100 * share:6.1f} %  {classes[index]}")


def main(argv=None):
    args = get_args(argv)
    if args.probe == "finetune":
        process, workers = run.any_processes(args)
    else:
        process, workers = run.one_process(args, "probe.py")
    if args.query:
        show_classes(args, process)
        return
    for one in run.each_checkpoint(args):
        if not probe_checkpoint(one, process, workers):
            return


def print_result(args, protocol, views, head, tested, result):
    """A line for each head and each modality that it was tested on."""
    name = tested if tested == views.modality else f"{tested} alone, trained on {views.modality}"
    spread = "" if result["std"] is None else f" ± {result['std']:.1f}"
    chosen = f"C {flat(result['C'])}" if head == "regression" else f"lr {flat(result['lr'])}"
    print(f"{args.data}, {args.probe}, {head}, {name}, {args.baseline or 'trained'}: {result['metric']} "
          f"{result['value']:.1f}{spread} (N = {result['N']:,}, {result['classes']} classes counted, "
          f"{chosen})")
    for key in ("folds", "values"):
        if len(result.get(key, ())) > 1:
            print(f"  {key}: " + "  ".join(f"{value:.1f}" for value in result[key]))


def flat(values):
    """The different numbers in nested lists, as text."""
    return " ".join(dict.fromkeys(f"{value:g}" for value in np.ravel(values)))


if __name__ == "__main__":
    main_guard(main)
