"""What a frozen encoder knows: linear and attentive probes, fine-tuning, and the baselines to read them by.

    python probe.py --ckpt runs/avjepa_lejepa-toy-seed0 --data toy --probe linear --modality audio
    python probe.py --ckpt RUN --data vggsound --data-dir vggsound/ --probe attentive --modality av
    python probe.py --ckpt RUN --data audioset-20k --data-dir audioset/ --probe finetune --head attentive
    python probe.py --ckpt RUN --data toy --baseline untrained                       # the same encoder as it was initialised

Learning rates are tried on a tenth of the training clips, never on the test; the head that is best there is tested.
Each result is a row in RUN/probe.jsonl.
"""
import argparse, contextlib, copy, functools, json, math, time
from pathlib import Path

import common, data, retrieval                          # before torch: common sets how its threads wait
from common import UserError, main_guard

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

FROZEN_LRS = (1e-3, 1e-2, 1e-1, 1.0)                    # authors' code: 1e-3; each is tried on held-out clips of train
MODALITIES = {"audio": ("audio",), "video": ("video",), "av": ("video", "audio")}


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
    """One learned query attends to the tokens, then linear. (tokens (B, N, D), embedding (B, D)) -> (B, C)"""
    def __init__(self, dim, classes):
        super().__init__()
        self.norm, self.query = nn.LayerNorm(dim), nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.attend = nn.MultiheadAttention(dim, max(1, dim // 64), batch_first=True)
        self.linear = nn.Linear(dim, classes)

    def forward(self, tokens, embedding):
        x = self.norm(tokens)
        return self.linear(self.attend(self.query.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0])


HEADS = {"linear": LinearHead, "attentive": AttentiveHead}


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
def extract(encoders, listing, inputs, modalities, views, process, workers=1, tokens=False, batch=32, label="features"):
    """Decode each clip once, embed its `views` evenly spread views with each encoder and modality.

    Returns ({(encoder name, modality): (N, views, D), with `tokens` (N, views, number, D)}, index (N,)). Clips that do not decode
    are left out and counted on the screen."""
    out, index, troubles = {(e, m): [] for e in encoders for m in modalities}, [], data.Troubles(len(listing))
    needed = {key for m in modalities for key in MODALITIES[m]}
    plan = functools.partial(data.even_views, views, inputs.seconds, video="video" in needed, audio="audio" in needed)
    for b in data.eval_batches(listing, inputs, plan, max(1, batch // views), workers, troubles, label):
        index.append(b["index"])
        b = data.to_device(b, process.device)
        for (e, m), parts in out.items():
            with process.autocast():
                x = encoders[e](**pick(b, m))[0 if tokens else 1]
            parts.append(x.unflatten(0, (-1, views)).to(torch.bfloat16 if tokens else torch.float32).cpu())
    return {k: torch.cat(v) for k, v in out.items()}, torch.cat(index)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def loss_of(scores, targets, smoothing=0.0):
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(scores, targets * (1 - smoothing) + smoothing / 2)


def split_off(n, seed, share=0.1):
    """(train, held-out) indices of n clips."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    cut = max(1, round(share * n))
    return order[cut:], order[:cut]


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


def cached_batches(x, y, batch, seed, device):
    """Endless batches of cached features x (N, views, ...): each clip once an epoch, with a view drawn for it."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
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


def average(scores, targets):
    """(N, views, C) scores -> (N, C) probabilities, the mean over the views."""
    # unspecified: the authors average test clips; whether scores or probabilities is not said
    return (scores.softmax(-1) if targets.ndim == 1 else scores.sigmoid()).mean(1)


def probe_cached(kind, x, y, x_test, y_test, classes, lrs, epochs, batch, seed, device="cpu", progress=False):
    """Train heads on cached features, choose the learning rate on a held-out tenth of train, test that head once.
    Returns dict(metric, value, classes, lr, held_out)."""
    inner, held = split_off(len(x), seed)
    torch.manual_seed(seed)
    first = HEADS[kind](x.shape[-1], classes).to(device)
    heads = [copy.deepcopy(first) for _ in lrs]
    steps = max(1, epochs * math.ceil(len(inner) / batch))
    with common.one_thread() if kind == "linear" else contextlib.nullcontext():
        train_heads(heads, cached_batches(x[inner], y[inner], batch, seed, device), steps, lrs, progress=progress)
    scores = [measure(average(predict(head, x[held], device), y), y[held])[1] for head in heads]
    best = int(np.argmax(scores))
    name, value, counted = measure(average(predict(heads[best], x_test, device), y_test), y_test)
    return {"metric": name, "value": value, "classes": counted, "lr": lrs[best], "held_out": scores[best]}


def frozen_schedule(clips):
    """(batch, epochs) of a frozen probe: 512 and 15 (authors' code), but at least 2,000 steps of an eighth of the set: on a small
    set a head would else end half trained, and that of an untrained encoder, with its badly conditioned features, most of all."""
    batch = min(512, max(2, clips // 8))
    return batch, max(15, math.ceil(2000 / math.ceil(clips / batch)))


class Online(nn.Module):
    """An encoder and its heads, for what does not fit a cache: the tokens of a large set, and fine-tuning."""
    def __init__(self, encoder, heads, modality, frozen):
        super().__init__()
        self.vit, self.heads = encoder.vit.requires_grad_(not frozen), nn.ModuleList(heads)
        self.modality, self.frozen = modality, frozen

    def train(self, mode=True):
        super().train(mode)
        self.vit.train(mode and not self.frozen)
        return self

    def forward(self, batch):
        """-> (B, C) scores of each head."""
        given = pick(batch, self.modality)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens, embedding = self.vit.read_out(self.vit(**given), "video" in given, "audio" in given)
        return [head(tokens.float(), embedding.float()) for head in self.heads]


def train_views(rng, duration, seconds, modality):
    """One random view with its augmentation."""
    start = rng.uniform(0, max(0.0, duration - seconds))
    return [data.View(start, seconds, "random" if modality != "audio" else None, modality != "video")]


def probe_online(kind, encoder, modality, train, test, y, y_test, inputs, process, workers, args, frozen):
    """The same, decoding anew in each epoch. Fine-tuning (not frozen): label smoothing, backbone at .05 of the head's learning
    rate with weight decay .05, one learning rate for all (authors' code)."""
    classes, lrs = len(train.classes), args.lr if frozen else args.lr[:1]
    inner, held = split_off(len(train), args.seed) if len(lrs) > 1 else (torch.arange(len(train)), None)
    torch.manual_seed(args.seed)
    model = Online(encoder, [HEADS[kind](encoder.dim, classes) for _ in lrs], modality, frozen).to(process.device)
    groups = [{"params": list(head.parameters()), "peak": lr, "weight_decay": 0.0} for head, lr in zip(model.heads, lrs)]
    if not frozen:
        groups += [{**group, "peak": 0.05 * lrs[0]} for group in common.weight_decay_groups(model.vit, 0.05)]
    optimizer = torch.optim.AdamW(groups)
    per_epoch = max(1, len(inner) // args.batch_size)
    steps = max(1, args.epochs * per_epoch)
    plan = functools.partial(train_views, seconds=inputs.seconds, modality=modality)
    clips = data.Clips(train.subset(inner.tolist()), inputs, plan, args.seed)
    order = data.Batches(len(clips), min(args.batch_size, len(clips)), args.seed, 0, steps)
    troubles = data.Troubles(len(clips), 1.0)
    loader = data.train_loader(clips, order, workers, process.device.type == "cuda")
    for step, batch in enumerate(tqdm(loader, desc=args.probe, unit="step")):
        troubles.add(batch)
        for group in optimizer.param_groups:
            group["lr"] = common.cosine(step, steps, group["peak"], 0.0)
        targets = y[inner[batch["index"]]].to(process.device)
        with process.autocast():
            scores = model.train()(data.to_device(batch, process.device))
        losses = [loss_of(s.float(), targets, 0.0 if frozen else 0.1) for s in scores]
        losses = [loss for loss in losses if math.isfinite(loss.item())]        # a rate that is too high loses, the others go on
        if not losses:
            raise UserError(f"the loss is not finite at step {step}; lower --lr")
        loss = sum(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def scores_of(listing, label):
        plan = functools.partial(data.even_views, args.views, inputs.seconds, video=modality != "audio", audio=modality != "video")
        out, index = [], []
        for batch in data.eval_batches(listing, inputs, plan, max(1, 32 // args.views), workers, data.Troubles(len(listing)), label):
            index.append(batch["index"])
            with torch.no_grad(), process.autocast():
                scores = torch.stack(model.eval()(data.to_device(batch, process.device)))
            out.append(scores.float().unflatten(1, (-1, args.views)).cpu())         # (heads, B, views, C)
        return torch.cat(out, 1), torch.cat(index)

    best, held_out = 0, None
    if held is not None:
        scores, index = scores_of(train.subset(held.tolist()), "held out")
        values = [measure(average(s, y), y[held[index]])[1] for s in scores]
        best, held_out = int(np.argmax(values)), max(values)
    scores, index = scores_of(test, "test")
    name, value, counted = measure(average(scores[best], y_test), y_test[index])
    return {"metric": name, "value": value, "classes": counted, "lr": lrs[best], "held_out": held_out, "N": len(index)}


# ---------------------------------------------------------------------------------------------------------------------
# The small table at the end of a toy run
# ---------------------------------------------------------------------------------------------------------------------

def toy_report(run, data_dir, process, workers):
    """Linear probes for audio, video and both, and retrieval over all held-out clips: of the trained encoder, the same encoder
    untrained, the raw input, and chance. Prints the table, writes it to results.json in the run's folder, and returns it."""
    began, seed = time.time(), 0
    train, test = data.list_clips("toy", data_dir, "train"), data.list_clips("toy", data_dir, "test")
    encoders = {"trained": common.load_encoder(run, process.device), "untrained": common.load_encoder(run, process.device, untrained=True)}
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
    (Path(run) / "results.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"evaluated in {table['seconds']:.0f} s: {run}/results.json")
    return table


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="folder of a run, or its latest.pt")
    add("--data", required=True, help=", ".join(data.NAMES))
    add("--data-dir", help="folder with the clips and the csv files")
    add("--probe", choices=("linear", "attentive", "finetune"), default="linear")
    add("--head", choices=tuple(HEADS), default="linear", help="of --probe finetune")
    add("--modality", choices=tuple(MODALITIES), default="av")
    add("--baseline", choices=("untrained", "raw"), help="instead of the trained encoder: as it was initialised, or the input itself")
    add("--absent", choices=("zero", "drop"), help="if other than in training")
    add("--epochs", type=int, help="default: 15 frozen (and at least 2,000 steps), 13 fine-tuned")
    add("--batch-size", type=int, help="default: 512 frozen (an eighth of a small set), 64 fine-tuned")
    add("--lr", type=float, nargs="+", help="tried on a held-out tenth of train; default: 1e-3 1e-2 1e-1 1 frozen, 2e-4 fine-tuned")
    add("--views", type=int, help="test views that are averaged; default: 4 frozen, 6 fine-tuned")
    add("--cache-gb", type=float, default=4.0, help="an attentive probe caches its tokens up to this size, else it decodes anew")
    add("--workers", type=int, help="processes that decode")
    add("--device", default="auto", help="auto, cpu, mps or cuda")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    finetune = args.probe == "finetune"
    # Authors' code: frozen 15 epochs, batch 512, 4 test clips; fine-tuned lr 2e-4, 6 test clips; 13 epochs (seed).
    args.lr = args.lr or ([2e-4] if finetune else list(FROZEN_LRS))
    args.views = (6 if finetune else 4) if args.views is None else args.views
    check = common.check_range
    check("--epochs", 1 if args.epochs is None else args.epochs, 1, 10 ** 6), check("--seed", args.seed, 0, 2 ** 31)
    check("--batch-size", 2 if args.batch_size is None else args.batch_size, 2, 10 ** 6)
    check("--workers", args.workers or 0, 0, 1024)
    check("--views", args.views, 1, 1000), check("--cache-gb", args.cache_gb, 0, 10 ** 6), [check("--lr", lr, 0, 10) for lr in args.lr]
    if finetune and len(args.lr) > 1:
        raise UserError("--lr: fine-tuning takes one learning rate")
    began, process = time.time(), common.start_process(args.device)
    if process.world > 1:
        raise UserError("probe.py runs in one process; start it without torchrun")
    workers = common.default_workers(process) if args.workers is None else args.workers
    train, test = (data.list_clips(args.data, args.data_dir, split) for split in ("train", "test"))
    if train.labels is None:
        raise UserError(f"--data {args.data}: a probe needs labels; put the clips into one sub-folder for each class")
    encoder = common.load_encoder(args.ckpt, process.device, args.baseline == "untrained", args.absent)
    for key in MODALITIES[args.modality]:
        if getattr(encoder.vit, key) is None:
            raise UserError(f"--modality {args.modality}: {encoder.method} takes no {key}")
    print(data.describe(train) + " (train)\n" + data.describe(test) + " (test)")
    inputs, y, y_test = data.Inputs(**encoder.inputs), train.targets(range(len(train))), test.targets(range(len(test)))
    kind = args.head if finetune else args.probe
    tokens = sum(getattr(encoder.vit, key).num for key in MODALITIES[args.modality])
    gigabytes = 2 * tokens * encoder.dim * (2 * len(train) + args.views * len(test)) / 1e9
    if args.baseline == "raw" and args.probe != "linear":
        raise UserError("--baseline raw has no tokens and nothing to train; use --probe linear")
    if len(train) < 3:
        raise UserError(f"{train.name}: {len(train)} training clips; a probe needs at least 3")
    batch, epochs = (64, 13) if finetune else frozen_schedule(len(train))       # unspecified: the batch of fine-tuning
    args.batch_size, args.epochs = args.batch_size or batch, args.epochs or epochs
    if finetune or args.probe == "attentive" and gigabytes > args.cache_gb:
        if not finetune:
            print(f"{gigabytes:.1f} GB of tokens are more than --cache-gb {args.cache_gb:g}: decoding anew in each of {args.epochs} epochs")
        result = probe_online(kind, encoder, args.modality, train, test, y, y_test, inputs, process, workers, args, not finetune)
    else:
        encoders = {"it": RawInput() if args.baseline == "raw" else encoder}
        extract_from = functools.partial(extract, encoders, inputs=inputs, modalities=[args.modality], process=process,
                                         workers=workers, tokens=args.probe == "attentive")
        x, index = extract_from(train, views=2, label="features (train)")
        x_test, index_test = extract_from(test, views=args.views, label="features (test)")
        x, x_test = x["it", args.modality], x_test["it", args.modality]
        result = {**probe_cached(kind, x, y[index], x_test, y_test[index_test], len(train.classes), args.lr, args.epochs, args.batch_size,
                                 args.seed, process.device, progress=True), "N": len(index_test)}
    row = {"data": args.data, "probe": args.probe, "head": kind, "modality": args.modality, "baseline": args.baseline,
           "absent": encoder.vit.absent, **result, "left_out": len(test) - result["N"], "seed": args.seed, "ckpt": str(args.ckpt),
           "step": encoder.step, "seconds": round(time.time() - began, 1)}
    print(f"{args.data}, {args.probe}, {args.modality}, {args.baseline or 'trained'}: {result['metric']} {result['value']:.1f} "
          f"(N = {result['N']:,}, {result['classes']} classes counted, lr {result['lr']:g}, {row['seconds']} s)")
    common.add_row(args.ckpt, "probe.jsonl", row)


if __name__ == "__main__":
    main_guard(main)
