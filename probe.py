"""What a frozen encoder knows: linear and attentive probes, fine-tuning, the baselines to read them by, and its features in a file.

    python probe.py --ckpt runs/avjepa_lejepa-toy-seed0 --data toy --probe linear --modality audio
    python probe.py --ckpt RUN --data vggsound --data-dir vggsound/ --probe attentive --modality av
    python probe.py --ckpt RUN --data audioset-20k --data-dir audioset/ --probe finetune --head attentive
    python probe.py --ckpt RUN --data toy --baseline untrained                       # the same encoder as it was initialised
    python probe.py --ckpt RUN --data esc50 --data-dir ESC-50/                       # the mean of five folds
    python probe.py --ckpt RUN --data speechcommands --data-dir speech_commands/ --layers 3 7 11
    python probe.py --ckpt RUN --data fsd50k --data-dir FSD50K/ --probe finetune --regularised-masking 0.1
    python probe.py --ckpt RUN --data folder --data-dir clips/ --save-features clips.npz --patch-level
    python probe.py --ckpt runs/mjepa-toy-seed0 --data toy --probe pixels            # what it imagines where it sees nothing, as a picture

Learning rates are tried on the set's official validation clips, or where it has none on a tenth of the training clips, never on the
test; the head that is best there is tested. Each result is a row in RUN/probe.jsonl.

--save-features writes an npz with files (N,), clip (N, D) float32, seconds (length of a view), with --patch-level also patch
(N, views, tokens, D) float16, and where there are labels also labels, (N,) indices or (N, C) zeros and ones, and classes (C,).

--probe pixels trains a decoder from what the encoder says of the visible patches, and the predictor of the hidden ones, to the patches
themselves: RUN/pixels-DATA.png, and the squared error beside that of the mean image and of a copy of the nearest visible patch. With
--decode apart a hidden patch is decoded from predictions alone.
"""
import argparse, collections, contextlib, copy, functools, importlib, json, math, os, time
from dataclasses import replace
from pathlib import Path

import common, data, retrieval                          # before torch: common sets how its threads wait
from common import UserError, main_guard

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

FROZEN_LRS = (1e-3, 1e-2, 1e-1, 1.0)                    # authors' code: 1e-3; each is tried on held-out clips of train
BLOCKS_LRS = (1e-4, 3e-4, 1e-3, 3e-3)                   # unspecified: of a head with blocks, which larger ones tear apart
# --probe attentive: the head of the method
ATTENTIVE = {"avjepa_lejepa": "attentive", "ajepa": "attentive", "mjepa": "blocks", "avjepa_ncsu": "attentive"}
# Fine-tuning by method: AV-JEPA, authors' code and 13 epochs (seed); A-JEPA, the two rates (seed, section 8).
FINETUNE = {
    "avjepa_lejepa": dict(lr=[2e-4], encoder_lr=1e-5, smoothing=0.1, epochs=13, views=6),
    "ajepa":         dict(lr=[1e-3], encoder_lr=1e-5, smoothing=0.0, epochs=30, views=1)}      # unspecified: epochs, views, weight decay
FINETUNE["mjepa"] = FINETUNE["avjepa_ncsu"] = FINETUNE["ajepa"]         # unspecified: all of it, these papers' probes are frozen
TESTS = {"kinetics400": (8, 3), "ssv2": (2, 3)}         # views and crops of a test clip, by the paper of V-JEPA
LONGEST = {"fsd50k": 30.0}                              # seconds: the test views of a set of very unequal clips cover its longest
MODALITIES = {"audio": ("audio",), "video": ("video",), "av": ("video", "audio")}
IMAGINE = ("ajepa", "mjepa", "avjepa_ncsu")             # methods with a predictor of hidden patches, for --probe pixels


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------

def accuracy(scores, targets):
    """Top-1, in 0..1. scores (N, C), targets (N,); the target must be strictly the best, so that ties do not count."""
    own = scores.gather(1, targets[:, None])
    return ((scores < own).sum(1) == scores.shape[1] - 1).float().mean().item()


def mean_average_precision(scores, targets):
    """(mAP in 0..1, number of classes that counted): the mean, over the classes that have a positive, of the average precision.
    scores and targets (N, C). Clips with the same score share the precision at the end of their tie."""
    scores, targets = torch.as_tensor(scores).double(), torch.as_tensor(targets).double()
    values = []
    for s, y in zip(scores.T, targets.T):
        if y.sum() > 0:
            s, order = s.sort(descending=True)
            last = torch.searchsorted(-s, -s, right=True)                           # clips with this score or a better one
            hits = y[order].cumsum(0)
            values.append(((hits[last - 1] / last) * y[order]).sum() / y.sum())
    return (torch.stack(values).mean().item() if values else 0.0), len(values)


def measure(scores, targets):
    """(name, value in percent, classes that counted): top-1 for class indices, mAP for zeros and ones."""
    if targets.ndim == 1:
        return "top-1", 100 * accuracy(scores, targets), scores.shape[1]
    value, counted = mean_average_precision(scores, targets)
    return "mAP", 100 * value, counted


# ---------------------------------------------------------------------------------------------------------------------
# Heads and features
# ---------------------------------------------------------------------------------------------------------------------

class LinearHead(nn.Module):
    """Linear on the clip embedding, standardised. (tokens (B, N, D), embedding (B, D)) -> (B, C)"""
    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, classes)    # unspecified: the standardisation
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, tokens, embedding):
        return self.linear(self.norm(embedding))


class AttentiveHead(nn.Module):
    """One learned query attends to the tokens, which may go through blocks before, then linear. (tokens (B, N, D), embedding (B, D)) ->
    (B, C)"""
    def __init__(self, dim, classes, blocks=0):
        super().__init__()
        heads = max(1, dim // 64)
        self.norm, self.query = nn.LayerNorm(dim), nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear = nn.Linear(dim, classes)
        self.transformer = common.Transformer(dim, blocks, heads, 4 * dim).apply(common.init_weights)

    def forward(self, tokens, embedding):
        # What self.attend(query, norm(x), norm(x)) returns, in another order, which is exact for a single query: the keys' matrix meets
        # the query, the values' matrix the mean, and no matrix all the tokens (toy: a tenth of the time)
        norm, parts = self.norm, (self.attend.in_proj_weight, self.attend.in_proj_bias)
        x = F.layer_norm(self.transformer(tokens), norm.normalized_shape, eps=norm.eps)         # (B, N, D)
        w, bias = (part.unflatten(0, (3, self.attend.num_heads, -1)) for part in parts)         # (3, H, d, D), (3, H, d)
        q = torch.einsum("hde,e->hd", w[0], self.query[0, 0]) + bias[0]             # (H, d)
        k = torch.einsum("hd,hde->he", q, w[1]) / q.shape[1] ** 0.5                 # (H, D); its bias cancels in the softmax
        a = (x @ (norm.weight * k).T).softmax(1)                                    # (B, N, H)
        y = a.transpose(1, 2) @ x * norm.weight + norm.bias                         # (B, H, D)
        v = torch.einsum("bhe,hde->bhd", y, w[2]) + bias[2]                         # (B, H, d)
        return self.linear(self.attend.out_proj(v.flatten(1)))


# MJEPA's "cross-attention + 4 blocks + linear"; unspecified: the order, here the blocks first, as in V-JEPA 2
HEADS = {"linear": LinearHead, "attentive": AttentiveHead, "blocks": functools.partial(AttentiveHead, blocks=4)}


class RawInput(nn.Module):
    """The input itself as an embedding, average-pooled: mel to (16, 25), video to (4, 16, 16) and 3 colours. What a linear probe
    reads off it needed no encoder."""
    def forward(self, video=None, audio=None):
        parts = [] if video is None else [F.adaptive_avg_pool3d(video.cpu(), (4, 16, 16)).flatten(1)]       # MPS lacks the two
        parts += [] if audio is None else [F.adaptive_avg_pool2d(audio.cpu(), (16, 25)).flatten(1)]
        return None, torch.cat(parts, 1)


def pick(batch, modality):
    """The inputs of a modality as keyword arguments of an encoder."""
    return {key: batch[key] for key in MODALITIES[modality]}


@torch.no_grad()
def extract(encoders, listing, inputs, modalities, views, process, workers=1, tokens=False, batch=32, label="features", crops=1):
    """Decode each clip once, embed its `views` evenly spread views, each with so many `crops`, with each encoder and modality.

    Returns ({(encoder name, modality): (N, views x crops, D), with `tokens` (N, views x crops, number, D)}, index (N,)). Clips that do
    not decode are left out and named on the screen."""
    out, index, troubles = {(e, m): [] for e in encoders for m in modalities}, [], data.Troubles(len(listing))
    needed = {key for m in modalities for key in MODALITIES[m]}
    plan = functools.partial(data.even_views, views, inputs, video="video" in needed, audio="audio" in needed, crops=crops)
    for b in data.eval_batches(listing, inputs, plan, max(1, batch // (views * crops)), workers, troubles, label):
        index.append(b["index"])
        b = data.to_device(b, process.device)
        for (e, m), parts in out.items():
            with process.autocast():
                x = encoders[e](**pick(b, m))[0 if tokens else 1]
            parts.append(x.unflatten(0, (-1, views * crops)).to(torch.bfloat16 if tokens else torch.float32).cpu())
    return {k: torch.cat(v) for k, v in out.items()}, torch.cat(index)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def loss_of(scores, targets, smoothing=0.0):
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(scores, targets.float() * (1 - smoothing) + smoothing / 2)


def split_off(n, seed, share=0.1):
    """(train, held-out) indices of n clips."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    cut = max(1, round(share * n))
    return order[cut:], order[:cut]


def hold_out(listing, index, seed, needed=True):
    """(positions to train on, positions to choose by) among the clips `index` of a training listing: its official validation clips
    are held out, or where it has none a random tenth; that only if it is needed, otherwise (all, None)."""
    held = np.zeros(len(index), bool) if listing.held is None else listing.held[np.asarray(index)]
    if (~held).sum() < 2:
        raise UserError(f"{listing.name}: fewer than two training clips can be read" + (
            f" beside {held.sum():,} official validation clips" if held.any() else "") + "; look at the files with python data.py --check")
    if held.any():
        return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
    return split_off(len(index), seed) if needed else (torch.arange(len(index)), None)


def rounds(fold):
    """For each fold: (positions to train on, positions to test on)."""
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]


def join_folds(results):
    """The results of all folds as one: the mean, and what stands for each fold."""
    each = {key: [r[key] for r in results] for key in ("value", "lr", "held_out", "N")}
    return {**results[0], "value": float(np.mean(each["value"])), "folds": each["value"], "lr": each["lr"], "held_out": each["held_out"],
            "N": sum(each["N"])}


def train_heads(heads, batches, steps, lrs, smoothing=0.0, label="probe", progress=True):
    """AdamW without weight decay, cosine to 0, one optimiser for each head: all learning rates in one pass over the features.
    batches: an iterator of (tokens or None, embedding or None, targets)."""
    optimizers = [torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0) for head, lr in zip(heads, lrs)]
    for step in tqdm(range(steps), desc=label, unit="step", disable=not progress):
        tokens, embedding, targets = next(batches)
        for head, optimizer, lr in zip(heads, optimizers, lrs):
            optimizer.param_groups[0]["lr"] = common.cosine(step, steps, lr, 0.0)
            optimizer.zero_grad()
            loss_of(head.train()(tokens, embedding), targets, smoothing).backward()
            optimizer.step()


def cached_batches(x, y, chosen, batch, seed, device):
    """Endless batches of cached features x (N, views, ...): each chosen clip once an epoch, with a view drawn for it."""
    generator, chosen = torch.Generator().manual_seed(seed), torch.as_tensor(chosen)
    while True:
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for i in order.split(batch):
            if len(i) > 1:                              # BatchNorm needs two
                part = x[i, torch.randint(x.shape[1], (len(i),), generator=generator)].float().to(device)
                yield (part, None, y[i].to(device)) if x.ndim == 4 else (None, part, y[i].to(device))


@torch.no_grad()
def predict(head, x, device, batch=256):
    """Scores (N, views, C) of cached features x (N, views, ...)."""
    out, _ = [], head.eval()
    for part in x.split(max(1, batch // x.shape[1])):
        flat = part.flatten(0, 1).float().to(device)
        out.append(head(*((flat, None) if x.ndim == 4 else (None, flat))).unflatten(0, (-1, x.shape[1])).cpu())
    return torch.cat(out)


def average(scores, multilabel):
    """(..., views, C) scores -> (..., C) probabilities, the mean over the views."""
    # unspecified: the authors average test clips; whether scores or probabilities is not said
    return (scores.sigmoid() if multilabel else scores.softmax(-1)).mean(-2)


def probe_cached(kind, x, y, x_test, y_test, classes, lrs, epochs, batch, seed, device="cpu", progress=False, split=None):
    """Train heads on cached features, choose the learning rate on held-out clips of train, test that head once. split: positions in x
    to train on and to choose by, by default a random tenth. Returns dict(metric, value, classes, lr, held_out, N)."""
    inner, held = split or split_off(len(x), seed)
    if len(inner) < 2:
        raise UserError(f"{len(inner)} training clips can be read; a probe needs at least 2 beside those that choose the learning rate")
    torch.manual_seed(seed)
    first = HEADS[kind](x.shape[-1], classes).to(device)
    heads = [copy.deepcopy(first) for _ in lrs]
    steps = max(1, epochs * math.ceil(len(inner) / batch))
    with common.one_thread() if kind == "linear" else contextlib.nullcontext():
        train_heads(heads, cached_batches(x, y, inner, batch, seed, device), steps, lrs, progress=progress)
    scores = [measure(average(predict(head, x[held], device), y.ndim == 2), y[held])[1] for head in heads]
    best = int(np.argmax(scores))
    name, value, counted = measure(average(predict(heads[best], x_test, device), y.ndim == 2), y_test)
    return {"metric": name, "value": value, "classes": counted, "lr": lrs[best], "held_out": scores[best], "N": len(y_test)}


def frozen_schedule(clips, most=512):
    """(batch, epochs) of a frozen probe: 512 (or `most`, for a head that would not fit) and 15 (authors' code of AV-JEPA), but at least
    2,000 steps of an eighth of the set: on a small set a head would else end half trained, and that of an untrained encoder, with its
    badly conditioned features, most of all."""
    batch = min(most, max(2, clips // 8))
    return batch, max(15, math.ceil(2000 / math.ceil(clips / batch)))


def bar_own_scores(batch, tokens, share, device):
    """Regularised masking (A-JEPA): a mask (B, 1, N, N) for `attention`, True: attend, in which each token is with probability `share`
    barred from attending with its own score. A token that is alone has nothing else to attend to, and keeps it."""
    barred = torch.rand(batch, tokens, device=device) < (share if tokens > 1 else 0)            # (B, N)
    return ~torch.diag_embed(barred)[:, None]                                                   # (B, 1, N, N)


class Online(nn.Module):
    """An encoder and its heads, for what does not fit a cache: the tokens of a large set, and fine-tuning. share: of the tokens that
    regularised masking bars, in training."""
    def __init__(self, encoder, heads, modality, frozen, share=0.0):
        super().__init__()
        self.vit, self.heads, self.layers = encoder.vit.requires_grad_(not frozen), nn.ModuleList(heads), encoder.layers
        self.modality, self.frozen, self.share = modality, frozen, share

    def train(self, mode=True):
        super().train(mode)
        self.vit.train(mode and not self.frozen)
        return self

    def encode(self, batch):
        """-> tokens (B, N, D), embedding (B, D)."""
        given, mask = pick(batch, self.modality), None
        if self.training and self.share:
            first = self.vit.embed(**{key: x[:1] for key, x in given.items()})                  # one clip tells how many tokens there are
            # unspecified: drawn anew for each clip and step, the same in all layers and heads
            mask = bar_own_scores(len(next(iter(given.values()))), first.shape[1] + (self.vit.cls is not None), self.share, first.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.vit(**given, mask=mask, layers=self.layers)
            tokens, embedding = self.vit.read_out(x, "video" in given, "audio" in given)
        return tokens.float(), embedding.float()

    def forward(self, batch):
        """-> (B, C) scores of each head."""
        features = self.encode(batch)
        return [head(*features) for head in self.heads]


def train_views(rng, duration, inputs, modality):
    """One random view with its augmentation."""
    view, = data.place_views([rng.uniform()], inputs, duration, modality != "audio", modality != "video")
    return [view._replace(video="random" if view.video else None)]


def parameter_groups(model, lrs, encoder_lr):
    """AdamW groups of an Online: each head at its learning rate without weight decay, the encoder, where it learns, with .05 (authors'
    code of AV-JEPA)."""
    groups = [{"params": list(head.parameters()), "peak": lr, "weight_decay": 0.0} for head, lr in zip(model.heads, lrs)]
    encoder = [] if model.frozen else common.weight_decay_groups(model.vit, 0.05)
    return groups + [{**group, "peak": encoder_lr} for group in encoder]


def probe_online(kind, encoder, train, test, inputs, process, workers, args, frozen):
    """As probe_cached, but decoding anew in each epoch. Fine-tuning (not frozen) has one learning rate for the head and one for the
    encoder."""
    classes, lrs, modality = len(train.classes), args.lr, args.modality
    inner, held = hold_out(train, range(len(train)), args.seed, needed=len(lrs) > 1)
    torch.manual_seed(args.seed)
    heads = [HEADS[kind](encoder.dim, classes) for _ in lrs]
    model = Online(encoder, heads, modality, frozen, args.regularised_masking).to(process.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, lrs, args.encoder_lr))
    per_epoch = max(1, len(inner) // args.batch_size)
    steps = max(1, args.epochs * per_epoch)
    plan = functools.partial(train_views, inputs=inputs, modality=modality)
    clips = data.Clips(train.subset(inner.tolist()), inputs, plan, args.seed)
    order = data.Batches(len(clips), min(args.batch_size, len(clips)), args.seed, 0, steps)
    troubles = data.Troubles(len(clips), 1.0)
    loader = data.train_loader(clips, order, workers, process.device.type == "cuda")
    for step, batch in enumerate(tqdm(loader, desc=args.probe, unit="step")):
        troubles.add(batch)
        for group in optimizer.param_groups:
            group["lr"] = common.cosine(step, steps, group["peak"], 0.0)
        targets = train.targets(inner[batch["index"]]).to(process.device)
        optimizer.zero_grad()
        with process.autocast():
            features = model.train().encode(data.to_device(batch, process.device))
        lost = 0
        for head in model.heads:                        # one after the other: the graphs of all would not fit
            with process.autocast():
                scores = head(*features)
            loss = loss_of(scores.float(), targets, args.smoothing)
            if math.isfinite(loss.item()):
                loss.backward()
            else:                                       # a rate that is too high loses, the others go on
                lost += 1
        if lost == len(heads):
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        optimizer.step()

    def scores_of(listing, label):
        video, audio, views = modality != "audio", modality != "video", args.views * args.crops
        plan = functools.partial(data.even_views, args.views, inputs, video=video, audio=audio, crops=args.crops)
        out, index = [], []
        for batch in data.eval_batches(listing, inputs, plan, max(1, 32 // views), workers, data.Troubles(len(listing)), label):
            index.append(batch["index"])
            with torch.no_grad(), process.autocast():
                scores = torch.stack(model.eval()(data.to_device(batch, process.device)))
            out.append(average(scores.float().unflatten(1, (-1, views)), listing.multilabel).cpu())        # (heads, B, C)
        return torch.cat(out, 1), torch.cat(index)

    best, held_out = 0, None
    if held is not None:
        scores, index = scores_of(train.subset(held.tolist()), "held out")
        values = [measure(s, train.targets(held[index]))[1] for s in scores]
        best, held_out = int(np.argmax(values)), max(values)
    scores, index = scores_of(test, "test")
    name, value, counted = measure(scores[best], test.targets(index))
    return {"metric": name, "value": value, "classes": counted, "lr": lrs[best], "held_out": held_out, "N": len(index)}


# ---------------------------------------------------------------------------------------------------------------------
# The small table at the end of a toy run
# ---------------------------------------------------------------------------------------------------------------------

def toy_report(run, data_dir, process, workers):
    """Linear probes for audio, video and both, and retrieval over all held-out clips: of the trained encoder, the same encoder
    untrained, the raw input, and chance. Prints the table, writes it to results.json in the run's folder, and returns it."""
    began, seed = time.time(), 0
    train, test = data.list_clips("toy", data_dir, "train"), data.list_clips("toy", data_dir, "test")
    encoders = {name: common.load_encoder(run, process.device, name == "untrained", cross=True) for name in ("trained", "untrained")}
    vit, inputs = encoders["trained"].vit, data.Inputs(**encoders["trained"].inputs)
    modalities = [m for m in MODALITIES if all(getattr(vit, key) for key in MODALITIES[m])]
    table = {}
    if "av" in modalities:
        table = {name: retrieval.evaluate(e, test, workers=workers, process=process) for name, e in encoders.items()}
    encoders["raw input"] = RawInput()
    x, index = extract(encoders, train, inputs, modalities, 2, process, workers, label="features (train)")
    x_test, index_test = extract(encoders, test, inputs, modalities, 4, process, workers, label="features (test)")
    y, y_test = train.targets(index), test.targets(index_test)
    for name, m in tqdm(x, desc="linear probes", unit="probe"):
        batch, epochs = frozen_schedule(len(y))
        result = probe_cached("linear", x[name, m], y, x_test[name, m], y_test, len(train.classes), FROZEN_LRS, epochs, batch, seed)
        table.setdefault(name, {})[m] = result["value"]
    chance = {m: 100 * y_test.bincount().max().item() / len(y_test) for m in modalities}
    chance.update({way: table["trained"]["chance"] for way in ("A->V", "V->A") if way in table["trained"]})
    table["chance"] = chance

    ways = ("A->V", "V->A") if "av" in modalities else ()
    print(f"\nheld-out toy clips, percent     linear probe (N = {len(y_test)})" + "".join(
        f"    {way} (N = {table['trained']['N']})         " for way in ways))
    columns = [(m,) for m in modalities] + [(way, k) for way in ways for k in ("R@1", "R@10", "class R@1")]
    print(" " * 12 + "".join(f"{c[-1]:>11s}" for c in columns))
    for name, row in table.items():
        values = [row.get(c[0]) if len(c) == 1 else row.get(c[0], {}).get(c[1]) for c in columns]
        print(f"{name:12s}" + "".join(f"{'-' if v is None else f'{v:.1f}':>11s}" for v in values))
    table["seconds"] = round(time.time() - began, 1)
    common.replace_file(Path(run) / "results.json", lambda f: f.write((json.dumps(table, indent=1) + "\n").encode()))
    print(f"evaluated in {table['seconds']:.0f} s" + (f", retrieval by '{table['trained']['embedding']}' (retrieval.py)" if ways else "")
          + f": {run}/results.json")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Features in a file
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def encode_clips(encoder, listing, inputs, modalities, views, process, workers, label="features", batch=32):
    """A batch at a time, of the clips that have all that the modalities need: (index (B,), inputs {"video" or "audio": (B views, ...)},
    {modality: (tokens (B views, N, D), embedding (B views, D))}). The others are named."""
    keys, troubles = list(dict.fromkeys(key for m in modalities for key in MODALITIES[m])), data.Troubles(len(listing))
    plan = functools.partial(data.even_views, views, inputs, video="video" in keys, audio="audio" in keys)
    for b in data.eval_batches(listing, inputs, plan, max(1, batch // views), workers, troubles, label):
        has = torch.stack([b[f"has_{key}"] for key in keys]).all(0)                             # (B,)
        troubles.name([f"{listing.path(i)}: has no {' or no '.join(keys)}" for i in b["index"][~has].tolist()])
        if has.any():
            b = data.to_device({key: b[key] for key in (*keys, "index")}, process.device)
            given = {key: b[key][has.repeat_interleave(views).to(process.device)] for key in keys}
            with process.autocast():
                made = {m: encoder(**pick(given, m)) for m in modalities}
            yield b["index"][has], given, made


def save_features(args, encoder, listing, inputs, process, workers):
    """Embed each clip of a listing and write args.save_features, as the top of this file says. Clips that cannot be read, or lack a
    stream that the modality needs, are left out, named and counted."""
    out, keys, index, clip, patch = Path(args.save_features), MODALITIES[args.modality], [], [], []
    for some, _, made in encode_clips(encoder, listing, inputs, [args.modality], args.views, process, workers):
        tokens, embedding = made[args.modality]
        index.append(some)
        clip.append(embedding.float().unflatten(0, (-1, args.views)).mean(1).cpu())             # (B, D)
        if args.patch_level:
            patch.append(tokens.half().unflatten(0, (-1, args.views)).cpu())                    # (B, views, N, D)
    if not index:
        raise UserError(f"{listing.name}: no clip has all of {', '.join(keys)}; give another --modality")
    index = torch.cat(index)
    arrays = {"files": np.array([os.fsdecode(bytes(listing.files[i])) for i in index]), "seconds": np.float64(inputs.seconds),
              "clip": torch.cat(clip).numpy(), **({"patch": torch.cat(patch).numpy()} if patch else {})}
    if listing.labels is not None:
        arrays.update(labels=listing.targets(index).numpy(), classes=np.array(listing.classes))
    try:
        common.replace_file(out, lambda f: np.savez(f, **arrays))
    except OSError as e:
        raise UserError(f"--save-features {out}: cannot be written ({e.strerror}); give another place") from None
    print(f"{out}: {len(index):,} clips ({len(listing) - len(index):,} left out), "
          + ", ".join(f"{key} {tuple(arrays[key].shape)}" for key in ("clip", "patch", "labels") if key in arrays))


# ---------------------------------------------------------------------------------------------------------------------
# What the model imagines, in pixels
# ---------------------------------------------------------------------------------------------------------------------

def patchify(x, patch):
    """(B, C, *shape) -> (B, N, C prod(patch)): patches in the order of the encoder's tokens, the pixels of each in the order of its
    convolution's weights; what is left over at the end is cut off."""
    for axis, side in enumerate(patch):
        x = x.unfold(2 + axis, side, side)                                          # in the end (B, C, *grid, *patch)
    return x.movedim(1, 1 + len(patch)).flatten(1, len(patch)).flatten(2)


def unpatchify(x, grid, patch):
    """The inverse: (B, N, C prod(patch)) -> (B, C, *shape), without what was cut off."""
    x = x.unflatten(1, grid).unflatten(-1, (-1, *patch)).movedim(1 + len(grid), 1)  # (B, C, *grid, *patch)
    for axis in range(2, 2 + len(grid)):                                            # each side of a patch behind the axis that it cuts
        x = x.movedim(2 + len(grid), axis + 1).flatten(axis, axis + 1)
    return x


class PixelDecoder(nn.Module):
    """Tokens to pixels by linear projection, multi-head attention and query pooling, as in AVJEPA (Ge and Zhu; 5.6.3). (tokens (B, N, D),
    which are predicted (B, N) bool) -> {modality: (B, N of it, pixels of a patch)}. patches: {modality: Patches}, as the tokens stand.
    apart: predicted tokens attend to predicted ones alone, visible to visible ones: else the decoder itself fills in what is hidden, and
    does so nearly as well from an untrained encoder."""
    def __init__(self, dim, patches, width, apart=False):
        super().__init__()
        # unspecified: all but those three words. Here one layer, heads of 64 dimensions, pre-norm; a token says whether it was predicted;
        # one query for each patch, its place, which at the start looks at its own token
        heads, self.sizes, self.apart = max(1, width // 64), [p.num for p in patches.values()], apart
        self.norm, self.project, self.state = nn.LayerNorm(dim), nn.Linear(dim, width), nn.Parameter(torch.randn(2, width) * 0.02)
        place = [common.Positions(p.grid, width, "sincos")() for p in patches.values()]                 # each (N of it, W)
        # each channel with mean 0 and std 1 over the grid: else most of them hardly tell one place from the next
        self.register_buffer("place", torch.cat([(e - e.mean(0)) / (e.std(0, correction=0) + 1e-4) for e in place]))
        self.modality = nn.Parameter(torch.randn(len(patches), width) * 0.02)
        self.norm1, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2, self.pool = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.query = nn.Linear(width, width)
        for weight in (self.query.weight.data, *self.pool.in_proj_weight.data.chunk(3)[:2]):
            nn.init.eye_(weight)
        self.pixels = nn.ModuleDict({m: nn.Linear(width, p.proj.in_channels * math.prod(p.patch)) for m, p in patches.items()})

    def forward(self, tokens, hidden):
        place = self.place + torch.cat([e.expand(size, -1) for e, size in zip(self.modality, self.sizes)])          # (N, W)
        x = self.project(self.norm(tokens)) + self.state[hidden.long()] + place                         # (B, N, W)
        barred = None
        if self.apart:                                  # float: MultiheadAttention would make that of a bool, for each of the two
            differ = (hidden[:, :, None] != hidden[:, None]).repeat_interleave(self.attend.num_heads, 0)            # (B heads, N, N)
            barred = torch.zeros(differ.shape, device=x.device).masked_fill_(differ, -math.inf)
        y = self.norm1(x)
        x = self.norm2(x + self.attend(y, y, y, attn_mask=barred, need_weights=False)[0])
        x = self.pool(self.query(place).expand(len(x), -1, -1), x, x, attn_mask=barred, need_weights=False)[0]      # (B, N, W)
        return {m: self.pixels[m](part) for m, part in zip(self.pixels, x.split(self.sizes, 1))}


def nearest_visible(x, hidden, grid):
    """Patches x (B, N, P) of a grid, each replaced by the visible one that is nearest, by the distance in patches; of several the first.
    hidden (B, N) bool."""
    place = torch.tensor(list(np.ndindex(*grid)), device=x.device)                                      # (N, axes)
    distance = (place[:, None] - place).square().sum(2).float()                                         # (N, N)
    return torch.stack([one[distance.masked_fill(h, math.inf).argmin(1)] for one, h in zip(x, hidden)])


def random_view(rng, duration, inputs, keys):
    """A view at a random place, with the test's centre crop."""
    return data.place_views([rng.uniform()], inputs, duration, "video" in keys, "audio" in keys)


def need(count, split):
    absent = [m for m, number in count.items() if not number]
    if absent:
        raise UserError(f"no {split} clip has {' or '.join(absent)}; give another --modality")


def train_decoder(decode, parameters, batches, steps, lr, troubles):
    """Train on the squared error of all patches, visible and hidden alike. decode: of probe_pixels. Returns the mean image of the clips,
    {modality: (N, P)}."""
    # unspecified: loss and schedule; AdamW without weight decay, cosine to 0, the mean over the modalities
    optimizer, total, count = torch.optim.AdamW(parameters, weight_decay=0.0), collections.Counter(), collections.Counter()
    for step, batch in enumerate(tqdm(batches, desc="pixels", unit="step", total=steps)):
        troubles.add(batch)
        losses = []
        for m, (made, true, _, has) in decode(batch, step).items():
            total[m], count[m] = total[m] + true[has].sum(0).cpu().double(), count[m] + int(has.sum())  # on the CPU: MPS has no float64
            losses.append(((made - true).square().mean((1, 2)) * has).sum() / has.sum().clamp_min(1))
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        optimizer.param_groups[0]["lr"] = common.cosine(step, steps, lr, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    need(count, "training")
    return {m: (total[m] / count[m]).float() for m in total}


@torch.no_grad()
def pixel_errors(decode, batches, mean, grids, step):
    """Mean squared errors {"hidden" or "visible": {modality: {"decoder", "mean", "nearest": value}}}, {modality: number of clips that have
    it}, and the indices of those that have all. Each batch comes under two masks, those of an even and of an odd step: a method's mask
    sets, which hide different shares, then count alike."""
    sums, count, whole = collections.defaultdict(lambda: np.zeros(2)), collections.Counter(), []
    for b, batch in enumerate(batches):
        whole += batch["index"][torch.stack([batch[f"has_{m}"] for m in grids]).all(0)].tolist()
        count.update({m: int(batch[f"has_{m}"].sum()) for m in grids})
        for m, (made, true, hidden, has) in (one for s in (0, 1) for one in decode(batch, step + 2 * b + s).items()):
            for name, guess in {"decoder": made, "mean": mean[m].to(true), "nearest": nearest_visible(true, hidden, grids[m])}.items():
                error = (guess - true).square().mean(2)                                                 # (B, N)
                for part, where in (("hidden", hidden & has[:, None]), ("visible", ~hidden & has[:, None])):
                    sums[part, m, name] += error[where].sum().item(), int(where.sum())
    need(count, "test")
    return {part: {m: {name: float(sums[part, m, name][0] / max(1, sums[part, m, name][1])) for name in names} for m in grids}
            for part, names in (("hidden", ("decoder", "mean", "nearest")), ("visible", ("decoder", "mean")))}, count, whole


def draw_pixels(clips, inputs, patches, title):
    """A figure: of each of the clips, (path, what decode returns of it), what is given, what is decoded, and the truth, in frames over time
    (at most 8) and as a spectrogram. What is hidden is striped."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    width = {m: 8.4 if m == "video" or len(patches) == 1 else 5.6 for m in patches}
    fig = plt.figure(figsize=(0.7 + sum(width.values()), 0.5 + 0.2 * title.count("\n") + 3.7 * len(clips)), layout="constrained")
    fig.suptitle(title, fontsize=10)
    for block, (path, clip) in zip(np.atleast_1d(fig.subfigures(len(clips), 1)), clips):
        block.suptitle(path.encode(errors="replace").decode(), fontsize=9, parse_math=False)
        axes = block.subplots(3, len(patches), squeeze=False, width_ratios=[*width.values()])
        for column, (m, (made, true, hidden, _)) in zip(axes.T, clip.items()):
            made, true, hidden = (unpatchify(x.float().cpu(), patches[m].grid, patches[m].patch)[0].movedim(0, -1).numpy()
                                  for x in (made, true, hidden[..., None].expand_as(true)))             # (*shape, C)
            (*_, H, W, _), scale = true.shape, plt.Normalize(*np.percentile(true, (1, 99)))
            stripes = np.where(np.add.outer(np.arange(H), np.arange(W)) // max(1, H // 16) % 2, 0.55, 0.85)[..., None]
            for ax, name, x in zip(column, ("given", "decoded", "truth"), (true, made, true)):
                x = x * data.IMAGENET_STD + data.IMAGENET_MEAN if m == "video" else plt.cm.magma(scale(x[..., 0]))[..., :3]
                x = np.where((hidden[..., :1] > 0) & (name == "given"), stripes, x.clip(0, 1))          # ([T,] H, W, 3)
                if m == "video":
                    some, gap = np.unique(np.linspace(0, len(x) - 1, 8).round().astype(int)), max(1, W // 16)
                    ax.imshow(np.concatenate(np.pad(x[some], ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1), 1))
                    times = (some + 0.5) * (inputs.video_seconds or inputs.seconds) / inputs.frames
                    ax.set_xticks(np.arange(len(some)) * (W + gap) + W / 2, [f"{t:.2f}" for t in times])
                    ax.set(yticks=[], frame_on=False)
                else:
                    second = inputs.mel_frames / inputs.seconds if inputs.interpolate else inputs.sample_rate / inputs.hop
                    ax.imshow(x, origin="lower", aspect="auto", interpolation="nearest", extent=(0, W / second, 0, H))
                ax.set_ylabel("\n".join([name] * (ax in axes[:, 0]) + ["mel bin"] * (m == "audio")), fontsize=8)
                ax.tick_params(labelsize=8, labelbottom=name == "truth")
            clock = f", at {inputs.frame_rate:g} frames a second" if inputs.frame_rate else ""          # the clip's own may be another
            column[-1].set_xlabel(f"seconds of the {'pictures' if m == 'video' else 'sound'}{clock}", fontsize=8)
    return fig


def probe_pixels(args, process, workers):
    """--probe pixels: train the decoder on what the frozen encoder and predictor make of masked clips, test it on held-out ones beside two
    baselines, draw four of them."""
    began, content = time.time(), common.load_checkpoint(args.ckpt)
    if content["method"] not in IMAGINE:
        raise UserError(f"{args.ckpt}: {content['method']} has no predictor of hidden patches; --probe pixels takes a checkpoint of "
                        f"{', '.join(IMAGINE)}")
    method = importlib.import_module(content["method"])                             # here, since the scripts import this file
    common.seed_step(content["args"]["seed"], 0)
    model = method.restore({**content, "model": None if args.baseline else content["model"]}).to(process.device)
    vit = model.eval().requires_grad_(False).context_encoder
    inputs, keys = choose_modality(args, vit, data.Inputs(**content["inputs"]), content["method"]), MODALITIES[args.modality]
    patches = {m: getattr(vit, m) for m in keys}
    train, test = (data.list_clips(args.data, args.data_dir, split) for split in ("train", "test"))
    if train.fold is not None:                          # unspecified: of a set with folds the first one is the test
        train, test = (train.subset(part) for part in rounds(train.fold)[0])
    elif np.array_equal(train.files, test.files):
        raise UserError(f"--data {args.data}: no clip is held out, all are for training; put them into two sub-folders, train and test")
    print(f"{data.describe(train)} (train)\n{data.describe(test)} (test)")

    # differs: the authors take one clip and two masks at a time; here 16 clips, for 1,000 steps
    args.batch_size, args.lr = args.batch_size or min(16, len(train)), args.lr or [1e-3]
    steps = args.epochs * max(1, len(train) // args.batch_size) if args.epochs else 1000
    torch.manual_seed(args.seed)
    decoder = PixelDecoder(model.predictor.head.out_features, patches, 256, args.decode == "apart").to(process.device)

    def decode(batch, step):
        """{modality: (the decoder's patches, the true ones, both (B, N, P), which are hidden (B, N), which clips have it (B,))}"""
        batch = data.to_device(batch, process.device)
        with process.autocast():
            tokens, hidden = method.imagine(model, content["recipe"], pick(batch, args.modality), args.seed, step)
        made, parts = decoder(tokens.float(), hidden), hidden.split(decoder.sizes, 1)
        return {m: (made[m], patchify(batch[m], p.patch), part, batch[f"has_{m}"].to(process.device))
                for (m, p), part in zip(patches.items(), parts)}

    clips = data.Clips(train, inputs, functools.partial(random_view, inputs=inputs, keys=keys), args.seed)
    order, troubles = data.Batches(len(train), args.batch_size, args.seed, 0, steps), data.Troubles(len(train), 1.0)
    loader = data.train_loader(clips, order, workers, process.device.type == "cuda")
    mean = train_decoder(decode, decoder.parameters(), loader, steps, args.lr[0], troubles)
    plan = functools.partial(data.even_views, 1, inputs, video="video" in keys, audio="audio" in keys)
    read = functools.partial(data.eval_batches, inputs=inputs, plan=plan, workers=workers)
    grids = {m: p.grid for m, p in patches.items()}
    batches = read(test, batch=args.batch_size, label="test", troubles=data.Troubles(len(test)))
    errors, count, whole = pixel_errors(decode, batches, mean, grids, steps)

    columns = [(part, name) for part in errors for name in errors[part][keys[0]]]
    print(" " * 10 + "".join(f"{f'{part}: {name}':>18s}" for part, name in columns))
    for m in keys:
        print(f"{m:10s}" + "".join(f"{errors[part][m][name]:18.4f}" for part, name in columns) + f"    (N = {count[m]:,})")
    partial = f"-{args.modality}" if len(keys) < (vit.video is not None) + (vit.audio is not None) else ""
    file = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    file = file / f"pixels-{args.data}{partial}{'-apart' if args.decode == 'apart' else ''}{'-untrained' if args.baseline else ''}.png"
    some = sorted(np.random.default_rng(args.seed).permutation(whole)[:4].tolist())
    common.add_row(args.ckpt, "probe.jsonl", {
        "data": args.data, "probe": args.probe, "modality": args.modality, "baseline": args.baseline, "decode": args.decode or "together",
        **errors, "N": count, "left_out": len(test) - max(count.values()), "picture": file.name if some else None,
        "view_seconds": inputs.seconds, "steps": steps, "batch_size": args.batch_size, "lrs": args.lr, "version": common.code_version(),
        "seed": args.seed, "ckpt": str(args.ckpt), "step": content["step"], "seconds": round(time.time() - began, 1)})
    if some:
        with torch.no_grad():
            batches = enumerate(read(test.subset(some), batch=1, label="picture", troubles=data.Troubles(len(some))))
            shown = [(os.fsdecode(bytes(test.files[some[n]])), decode(batch, n)) for n, batch in batches]
        title = f"{content['method']}, {args.data}, " + ("untrained" if args.baseline else f"step {content['step']:,}")
        title += ", hidden patches decoded from predictions alone" * (args.decode == "apart")
        for m, e in errors["hidden"].items():
            title += f"\n{m}, squared error where hidden: decoder {e['decoder']:.3f}, mean image {e['mean']:.3f}, nearest visible patch " \
                     f"{e['nearest']:.3f}"
        try:
            common.replace_file(file, lambda f: draw_pixels(shown, inputs, patches, title).savefig(f, format="png", dpi=100))
        except OSError as e:
            raise UserError(f"{file}: cannot be written ({e.strerror})") from None
    print(f"{file if some else 'no picture, since no clip has all'} ({time.time() - began:.0f} s)")


# ---------------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="folder of a run, or its latest.pt")
    add("--data", required=True, help=", ".join(data.NAMES))
    add("--data-dir", help="folder with the clips and the csv files")
    add("--probe", choices=("linear", "attentive", "finetune", "pixels"), default="linear")
    add("--head", choices=tuple(HEADS), help="of --probe finetune and attentive; default: linear fine-tuned, else attentive (one query), "
        "for MJEPA blocks (four blocks before it)")
    add("--decode", choices=("together", "apart"), help="of --probe pixels: each patch from all tokens (default, as in the paper), or the "
        "hidden ones from predicted tokens alone, so that the decoder cannot fill them in by itself")
    add("--modality", choices=tuple(MODALITIES), help="default: all that the encoder takes and the set has")
    add("--baseline", choices=("untrained", "raw"), help="instead of the trained encoder: as it was initialised, or the input itself")
    add("--encoder", choices=("context", "target"), help="of a method that has both; default: the one that it evaluates")
    add("--layers", type=int, nargs="+", help="blocks, from 0, whose outputs are put side by side; default: the last one's alone")
    add("--absent", choices=("zero", "drop"), help="if other than in training")
    add("--seconds", type=float, help="length of a view of sound; default: the encoder's, or the clips' where they are all shorter")
    add("--epochs", type=int, help="default: 15 frozen (and at least 2,000 steps); fine-tuned 13 (AV-JEPA), 30 (others); pixels: "
        "1,000 steps, whatever the set")
    add("--batch-size", type=int, help="default: 512 frozen (an eighth of a small set; 32 with blocks), 64 fine-tuned, 16 pixels")
    add("--lr", type=float, nargs="+", help="tried on held-out clips of train; default: 1e-3 1e-2 1e-1 1 frozen, 1e-4 3e-4 1e-3 3e-3 "
        "with blocks; fine-tuned that of the head, 2e-4 (AV-JEPA), 1e-3 (others); pixels 1e-3")
    add("--encoder-lr", type=float, help="of the encoder in fine-tuning; default: 1e-5")
    add("--regularised-masking", type=float, default=0.0, metavar="SHARE",
        help="fine-tuning: share of the tokens that may not attend with their own score (the paper of A-JEPA: 0.1)")
    add("--views", type=int, help="test views that are averaged; default: 4 frozen; fine-tuned 6 (AV-JEPA), 1 (others); kinetics400: 8; "
        "ssv2: 2; fsd50k: as many as cover 30 s; 1 where a view holds each whole clip")
    add("--crops", type=int, choices=tuple(data.CROPS), help="crops of each test view: the centre, or also both ends of the longer side; "
        "default: 3 for the pictures of kinetics400 and ssv2, else 1")
    add("--save-features", metavar="OUT.npz", help="instead of a probe: write the features of the clips")
    add("--split", choices=("train", "test", "all"), help="of --save-features; default: all")
    add("--patch-level", action="store_true", help="of --save-features: the tokens too; all must fit into memory")
    add("--cache-gb", type=float, help="an attentive probe caches its tokens up to this size, else it decodes anew; default: 4")
    add("--workers", type=int, help="processes that decode")
    add("--device", default="auto", help="auto, cpu, mps or cuda")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    finetune, saves, raw = args.probe == "finetune", args.save_features is not None, args.baseline == "raw"
    pixels, labels = args.probe == "pixels", "--probe linear, attentive or finetune"
    check = common.check_range
    check("--epochs", 1 if args.epochs is None else args.epochs, 1, 10 ** 6), check("--seed", args.seed, 0, 2 ** 31)
    check("--batch-size", 2 if args.batch_size is None else args.batch_size, 2, 10 ** 6)
    check("--workers", args.workers or 0, 0, 1024), check("--cache-gb", args.cache_gb or 0, 0, 10 ** 6)
    check("--views", 1 if args.views is None else args.views, 1, 1000), [check("--lr", lr, 0, 10) for lr in args.lr or ()]
    check("--seconds", 1 if args.seconds is None else args.seconds, 0.1, 3600), check("--encoder-lr", args.encoder_lr or 0, 0, 10)
    check("--regularised-masking", args.regularised_masking, 0, 1)
    if (finetune or pixels) and len(args.lr or ()) > 1:
        raise UserError(f"--lr: {'fine-tuning' if finetune else '--probe pixels'} takes one learning rate")
    if raw and (args.probe != "linear" or args.patch_level or args.layers):
        raise UserError("--baseline raw has no tokens, no layers and nothing to train; use --probe linear without --layers, --patch-level")
    for flag, given, applies, needs in (
            ("--head", args.head, args.probe in ("finetune", "attentive") and not saves, "--probe finetune or attentive"),
            ("--cache-gb", args.cache_gb is not None, args.probe == "attentive" and not saves, "--probe attentive"),
            ("--encoder-lr", args.encoder_lr is not None, finetune and not saves, "--probe finetune"),
            ("--regularised-masking", args.regularised_masking, finetune and not saves, "--probe finetune"),
            ("--crops", args.crops, not saves, "a probe; leave --save-features out"), ("--decode", args.decode, pixels, "--probe pixels"),
            ("--views", args.views, not pixels, labels), ("--crops", args.crops, not pixels, labels),
            ("--layers", args.layers, not pixels, labels), ("--encoder", args.encoder, not pixels, labels),
            ("--absent", args.absent, not pixels, labels), ("--seconds", args.seconds, not pixels, labels),
            ("--split", args.split, saves, "--save-features"), ("--patch-level", args.patch_level, saves, "--save-features"),
            ("--encoder", args.encoder, not args.baseline, "the trained encoder; leave --baseline out")):
        if given and not applies:
            raise UserError(f"{flag} has no effect without {needs}")
    if args.probe == "attentive" and args.head == "linear":
        raise UserError("--head linear reads no tokens; use --probe linear, or another --head")
    if saves and any((args.probe != "linear", args.epochs, args.batch_size, args.lr)):
        raise UserError("--save-features trains nothing; leave --probe, --epochs, --batch-size and --lr out")
    if saves and (not Path(args.save_features).absolute().parent.is_dir() or Path(args.save_features).is_dir()):
        raise UserError(f"--save-features {args.save_features}: its folder does not exist, or it is a folder itself; give a file in a "
                        "folder that exists")
    return args


def choose_modality(args, vit, inputs, method):
    """Settle args.modality by what the encoder takes and the set has. Returns the Inputs, for pictures alone of their seconds."""
    takes = [key for key in ("video", "audio") if getattr(vit, key) is not None]
    alone = "audio" if args.data in data.SOUNDS else "video" if args.data in data.SILENT else None
    args.modality = args.modality or alone or ("av" if len(takes) == 2 else takes[0])
    for key in MODALITIES[args.modality]:
        if key not in takes:
            raise UserError(f"--modality {args.modality}: {method} takes no {key}")
        if key == "video" and args.data in data.SOUNDS:
            raise UserError(f"--modality {args.modality}: {args.data} has no pictures; use --modality audio")
        if key == "audio" and args.data in data.SILENT:
            raise UserError(f"--modality {args.modality}: {args.data} has no sound; use --modality video")
    if args.modality == "video" and inputs.video_seconds:                                       # the pictures are all of the view
        inputs = replace(inputs, seconds=inputs.video_seconds, video_seconds=None)
    return inputs


def choose_views(args, encoder, listing):
    """Settle what depends on the encoder and the set: args.modality, args.views, args.crops, args.train_views. Returns the Inputs."""
    vit, inputs = encoder.vit, choose_modality(args, encoder.vit, data.Inputs(**encoder.inputs), encoder.method)
    if args.modality == "audio" and args.crops == 3:
        raise UserError("--crops 3: --modality audio has no pictures to crop; leave it out")
    args.crops = args.crops or (TESTS[args.data][1] if args.data in TESTS and args.modality != "audio" else 1)
    if args.modality == "audio":
        seconds = args.seconds or min(inputs.seconds, listing.seconds or inputs.seconds)
        inputs = inputs.at(seconds, vit.audio.patch[1])
    elif args.seconds not in (None, inputs.seconds):
        raise UserError(f"--seconds {args.seconds:g}: pictures come in the {inputs.video_seconds or inputs.seconds:g} s of training; leave "
                        "it out, or give --modality audio")
    covered = args.modality == "av" and inputs.video_seconds or inputs.seconds                  # by sound and pictures of a view
    whole, longest = listing.seconds is not None and listing.seconds <= covered, LONGEST.get(args.data)
    usual = FINETUNE[encoder.method]["views"] if args.probe == "finetune" else 4                # frozen: authors' code of AV-JEPA
    usual = TESTS[args.data][0] if args.data in TESTS else usual
    args.views = args.views or (1 if whole else math.ceil(longest / inputs.seconds) if longest else usual)
    # unspecified: the training views; a frozen head draws, each epoch, one of two windows of a clip, or of the test's windows where
    # those serve for both (folds) or the clips are very long; fine-tuning draws a new one at random
    args.train_views = args.views if longest or listing.fold is not None else 1 if whole else 2
    return inputs


def run_probe(args, kind, encoder, load, train, test, inputs, process, workers):
    """Train and test a head, once or fold by fold: dict(metric, value, classes, lr, held_out, N), for folds also each one's value.
    load(): the encoder as it was, for the next fold."""
    frozen, vit = args.probe != "finetune", encoder.vit
    clips = len(train) if train.fold is None else len(train) - int(np.unique(train.fold, return_counts=True)[1].max())
    if clips < 3:
        raise UserError(f"{train.name}: {clips} training clips; a probe needs at least 3" + ("" if train.fold is None else ", outside of "
                        "each fold"))
    # unspecified: the batch of fine-tuning
    batch, epochs = frozen_schedule(clips, 32 if kind == "blocks" else 512) if frozen else (64, FINETUNE[encoder.method]["epochs"])
    args.batch_size, args.epochs = args.batch_size or batch, args.epochs or epochs
    args.lr = args.lr or (list(BLOCKS_LRS if kind == "blocks" else FROZEN_LRS) if frozen else FINETUNE[encoder.method]["lr"])
    args.smoothing = 0.0 if frozen else FINETUNE[encoder.method]["smoothing"]
    args.encoder_lr = FINETUNE[encoder.method]["encoder_lr"] if args.encoder_lr is None and not frozen else args.encoder_lr

    tokens = vit.video.num if "video" in MODALITIES[args.modality] else 0
    tokens += vit.audio.grid[0] * (inputs.mel_frames // vit.audio.patch[1]) if "audio" in MODALITIES[args.modality] else 0
    views = args.train_views * len(train) + (args.views * args.crops * len(test) if train.fold is None else 0)
    gigabytes = 2 * tokens * encoder.dim * views / 1e9
    cache = 4.0 if args.cache_gb is None else args.cache_gb
    if not frozen or args.probe == "attentive" and gigabytes > cache:
        if frozen:
            print(f"{gigabytes:.1f} GB of tokens are more than --cache-gb {cache:g}: decoding anew in each of {args.epochs} epochs")
        if train.fold is None:
            return probe_online(kind, encoder, train, test, inputs, process, workers, args, frozen)
        return join_folds([probe_online(kind, load(), train.subset(inner), train.subset(outer), inputs, process, workers, args, frozen)
                           for inner, outer in rounds(train.fold)])

    read = functools.partial(extract, {"it": encoder if args.baseline != "raw" else RawInput()}, inputs=inputs, modalities=[args.modality],
                             process=process, workers=workers, tokens=args.probe == "attentive")
    fit = functools.partial(probe_cached, kind, classes=len(train.classes), lrs=args.lr, epochs=args.epochs, batch=args.batch_size,
                            seed=args.seed, device=process.device, progress=True)
    x, index = read(listing=train, views=args.train_views, label="features (train)")
    x, y = x["it", args.modality], train.targets(index)
    if train.fold is not None:
        if len(np.unique(train.fold[index.numpy()])) < len(np.unique(train.fold)):
            raise UserError(f"{train.name}: a fold has no clip that can be read; look at the files with python data.py --check")
        return join_folds([fit(x[inner], y[inner], x[outer], y[outer]) for inner, outer in rounds(train.fold[index.numpy()])])
    x_test, index_test = read(listing=test, views=args.views, crops=args.crops, label="features (test)")
    return fit(x, y, x_test["it", args.modality], test.targets(index_test), split=hold_out(train, index, args.seed))


def main(argv=None):
    args = get_args(argv)
    began, process = time.time(), common.start_process(args.device)
    if process.world > 1:
        raise UserError("probe.py runs in one process; start it without torchrun")
    workers = common.default_workers(process) if args.workers is None else args.workers
    if args.probe == "pixels":
        return probe_pixels(args, process, workers)
    load = functools.partial(common.load_encoder, args.ckpt, process.device, args.baseline == "untrained", args.absent, args.layers,
                             args.encoder)
    if args.save_features:
        encoder, listing = load(), data.list_clips(args.data, args.data_dir, args.split or "all")
        inputs = choose_views(args, encoder, listing)
        return save_features(args, RawInput() if args.baseline == "raw" else encoder, listing, inputs, process, workers)
    encoder = load()
    train, test = (data.list_clips(args.data, args.data_dir, split) for split in ("train", "test"))
    if train.labels is None:
        raise UserError(f"--data {args.data}: a probe needs labels; put the clips into one sub-folder for each class")
    inputs = choose_views(args, encoder, train)
    print(data.describe(train) + (" (train)\n" + data.describe(test) + " (test)" if train.fold is None else " (tested fold by fold)"))
    kind = args.head or (ATTENTIVE[encoder.method] if args.probe == "attentive" else "linear")
    result = run_probe(args, kind, encoder, load, train, test, inputs, process, workers)
    row = {"data": args.data, "probe": args.probe, "head": kind, "modality": args.modality, "baseline": args.baseline,
           "absent": encoder.vit.absent, "encoder": args.encoder, "layers": args.layers, **result, "left_out": len(test) - result["N"],
           "views": args.views, "crops": args.crops, "view_seconds": inputs.seconds, "epochs": args.epochs, "batch_size": args.batch_size,
           "lrs": args.lr, "encoder_lr": args.encoder_lr, "version": common.code_version(),
           "regularised_masking": args.regularised_masking, "seed": args.seed, "ckpt": str(args.ckpt), "step": encoder.step,
           "seconds": round(time.time() - began, 1)}
    if "folds" in result:
        print("folds: " + "  ".join(f"{value:.1f}" for value in result["folds"]))
    rates = " ".join(dict.fromkeys(f"{lr:g}" for lr in np.atleast_1d(result["lr"])))
    print(f"{args.data}, {args.probe}, {args.modality}, {args.baseline or 'trained'}: {result['metric']} {result['value']:.1f} "
          f"(N = {result['N']:,}, {result['classes']} classes counted, lr {rates}, {row['seconds']} s)")
    common.add_row(args.ckpt, "probe.jsonl", row)


if __name__ == "__main__":
    main_guard(main)
