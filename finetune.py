"""Fine-tuning: the encoder of a checkpoint and the heads on it, trained together on labelled clips.

    python probe.py --ckpt RUN --data SET --data-dir FOLDER --probe finetune
    torchrun --nproc_per_node=8 probe.py --ckpt RUN --data audioset --data-dir audioset/ --probe finetune
    python probe.py --ckpt RUN/finetune-SET-av/seed0 --query dog.wav

probe.py is the command: it reads the protocol, and tests what was trained here. A fine-tuning is a Run as
those of the four scripts, with a folder, a log and a checkpoint of its own. The checkpoint holds the encoder,
which load_encoder takes as any other, and the heads with the names of their classes, which `load_tuned`
takes.
"""
import hashlib
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import common
import data
import heads as kinds
from common import UserError
from features import MODALITIES, Decoded, Views, train_plan
from run import Run

import numpy as np
import torch
import torch.nn as nn
import torchaudio


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tuning:
    """What a checkpoint says of its heads, beside their weights."""
    heads: tuple                        # names of heads.HEADS
    classes: list                       # their names, in the order of the scores
    multilabel: bool
    views: Views                        # of a clip, in training and in the test
    average: str                        # over the test views, of heads.average
    layers: list | None = None          # of FrozenEncoder
    mix: int = 0                        # of heads.make_head

    def probabilities(self, scores):
        """(views, C) scores of a clip's views -> (C,), as the test averages them."""
        mean = kinds.average(scores, self.multilabel, self.average)
        if self.average == "probabilities":
            return mean
        return mean.sigmoid() if self.multilabel else mean.softmax(-1)


def make_heads(tuning, dim):
    """{name: head} on an encoder of width dim."""
    heads = {name: kinds.make_head(name, dim, len(tuning.classes), tuning.mix) for name in tuning.heads}
    return nn.ModuleDict(heads)


def bar_own_scores(batch, tokens, share, device):
    """Regularised masking (A-JEPA): a mask (B, 1, N, N) for the attention, True: attend, in which each token
    is with probability `share` barred from attending with its own score. A token that is alone has nothing
    else to attend to, and keeps it."""
    barred = torch.rand(batch, tokens, device=device) < (share if tokens > 1 else 0)            # (B, N)
    return ~torch.diag_embed(barred)[:, None]                                                   # (B, 1, N, N)


def mix_pairs(x, share):
    """Mixup (Zhang et al., arXiv 1710.09412) of a batch (B, ...): each row at `share` with the row half a
    batch away. So the pairs of a batch that is shared out evenly over processes are those of the whole."""
    return share * x + (1 - share) * x.roll(len(x) // 2, 0)


class Tuned(nn.Module):
    """The encoder of a FrozenEncoder and its heads, to be trained, and the loss of a batch. share: of the
    tokens that regularised masking bars; mixup: alpha of its Beta distribution, 0: none; specaugment: the
    most mel bins and frames that are hidden of a view, zeros: none; weight: of loss_of."""
    def __init__(self, encoder, tuning, share=0.0, smoothing=0.0, weight=None, mixup=0.0, specaugment=(0, 0),
                 seed=0, config=None):
        super().__init__()
        self.parts = dict(encoder=config, tuned=asdict(tuning))
        self.encoder = encoder.vit.requires_grad_(True)
        self.heads = make_heads(tuning, encoder.dim)
        self.tuning = tuning
        self.share = share
        self.smoothing = smoothing
        self.register_buffer("weight", weight, persistent=False)
        self.mixup = mixup
        bins, frames = specaugment
        # SpecAugment (arXiv 1904.08779), one band of each kind as in AST
        hide_bins = torchaudio.transforms.FrequencyMasking(bins, iid_masks=True)
        hide_frames = torchaudio.transforms.TimeMasking(frames, iid_masks=True)
        self.hide = nn.Sequential(hide_bins, hide_frames) if bins or frames else None
        self.seed = seed

    def read(self, batch):
        """A batch of data.collate -> {"video" or "audio": (B places, ...)}. What a clip lacks is at zero."""
        given = {}
        for key in MODALITIES[self.tuning.views.modality]:
            x = batch[key]
            lacks = ~batch[f"has_{key}"].repeat_interleave(len(x) // len(batch["index"])).to(x.device)
            given[key] = x.masked_fill(lacks.view(-1, *[1] * (x.ndim - 1)), 0)
        return given

    def draw_mask(self, given):
        """Of regularised masking, for a batch of inputs."""
        # one clip tells how many tokens there are
        first = self.encoder.embed(**{key: x[:1] for key, x in given.items()})
        tokens = first.shape[1] + (self.encoder.cls is not None)
        batch = len(next(iter(given.values())))
        # unspecified: drawn anew for each clip and step, the same in all layers and heads
        return bar_own_scores(batch, tokens, self.share, first.device)

    def encode(self, given):
        """Inputs of `read` -> (tokens (B, N, D), embedding (B, D)), of all places of a clip together."""
        places = self.tuning.views.places
        mask = self.draw_mask(given) if self.training and self.share else None
        x = self.encoder(**given, mask=mask, layers=self.tuning.layers)
        tokens, embedding = self.encoder.read_out(x, "video" in given, "audio" in given)
        tokens = tokens.unflatten(0, (-1, places)).flatten(1, 2)                        # (B, P N, D)
        return tokens, embedding.float().unflatten(0, (-1, places)).mean(1)

    def forward(self, batch, masks, weight, tick):
        """A batch of data.collate with its `targets`, no masks, its weight in the mean over the step ->
        (loss, what the log shows)."""
        given = self.read(batch)
        share = 1.0
        if self.mixup:                                 # one share for sound, pictures and targets
            # a stream of its own: (seed, step) is that of the order, (seed, epoch, clip) that of the views
            rng = np.random.default_rng((self.seed, tick, 0, 1))
            share = rng.beta(self.mixup, self.mixup)
            share = max(share, 1 - share)              # its other half mixes the same pairs
            places = self.tuning.views.places
            for key, x in given.items():
                given[key] = mix_pairs(x.unflatten(0, (-1, places)), share).flatten(0, 1)
        if self.hide is not None:
            given["audio"] = self.hide(given["audio"])
        tokens, embedding = self.encode(given)
        targets = batch["targets"].to(embedding.device)
        loss = 0.0
        shown = {"targets": targets}
        for name, head in self.heads.items():
            scores = head(tokens, embedding).float()                                    # (B, C)
            of_head = share * kinds.loss_of(scores, targets, self.smoothing, self.weight)
            if share < 1:                              # the loss is linear in the targets
                others = targets.roll(len(targets) // 2, 0)
                of_head = of_head + (1 - share) * kinds.loss_of(scores, others, self.smoothing, self.weight)
            loss = loss + weight * of_head
            shown[f"scores/{name}"] = scores.detach()
            shown[f"loss/{name}"] = weight * of_head.detach()
        return loss, shown


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

# what of a protocol counts while training
TRAINING = ("heads", "encoder_lr", "weight_decay", "warmup", "warmup_start", "lr_end", "clip_grad",
            "smoothing", "pos_weight", "regularised_masking", "train_starts", "train_crop")


def fingerprint(parts):
    """A short name of arrays, or of their bytes."""
    digest = hashlib.sha1()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def name_weights(module):
    return fingerprint(x.cpu().contiguous().numpy() for x in module.state_dict().values())


def name_clips(listing):
    """How many clips, and what tells others, or the same with other labels or classes, apart."""
    classes = "\n".join(listing.classes).encode()
    return f"{len(listing)} ({fingerprint([listing.files, listing.labels, listing.offsets, classes])})"


def count_classes(listing):
    """How many clips are of each class (C,)."""
    return np.bincount(listing.labels, minlength=len(listing.classes))


def clip_weights(listing):
    """How likely each clip is drawn (N,), in sum 1: the sum over its classes of 1 / the clips of the class
    (AST, arXiv 2104.01778, Sec. 3.1 and its code's gen_weight_file, with replacement; Audio-MAE has the same
    weights, and draws without). A clip without a class is never drawn."""
    summed = np.concatenate([[0.0], np.cumsum(1 / count_classes(listing)[listing.labels])])
    weights = np.diff(summed[listing.offsets])
    return weights / weights.sum()


def freeze_unused(model, views):
    """No gradient for the parameters that no loss reaches, such as the patches of a modality that is left
    out: DDP would wait for them. UserError where the encoder says nothing finite of an empty clip."""
    model.eval()
    device = next(model.parameters()).device
    given = {}
    for key in MODALITIES[views.modality]:
        shape = model.encoder.shape[key]
        if key == "audio":                             # the views may have another length than in training
            shape = (shape[0], views.inputs.mel_frames)
        given[key] = torch.zeros(views.places, common.CHANNELS[key], *shape, device=device)
    tokens, embedding = model.encode(given)
    if not embedding.isfinite().all():
        raise UserError("what the encoder says of an empty clip is no finite number; its weights are broken, "
                        "take another checkpoint")
    sum(head(tokens, embedding).sum() for head in model.heads.values()).backward()
    for p in model.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    model.train()


def make_optimizer(model, protocol):
    """AdamW, for each head at its rate and without decay; for the encoder at its own, with decay on the
    matrices."""
    groups = []
    for name, head in model.heads.items():
        lr, = protocol.heads[name]
        groups.append({"params": list(head.parameters()), "peak": lr, "weight_decay": 0.0})
    for group in common.weight_decay_groups(model.encoder, protocol.weight_decay):
        groups.append({**group, "peak": protocol.encoder_lr})
    return torch.optim.AdamW(groups)


def set_rates(optimizer, step, recipe):
    """The rates of a step; returns those of the heads and of the encoder, the first and the last."""
    for group in optimizer.param_groups:
        group["lr"] = kinds.learning_rate(
            step, recipe["steps"], group["peak"], recipe["warmup"], recipe["warmup_start"], recipe["lr_end"])
    return optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]


def make_recipe(args, protocol, views, encoder, listing, batch, steps, seed):
    """All that a fine-tuning is made of, as a script's recipe. UserError where --specaugment does not fit."""
    bins, frames = args.specaugment or (0, 0)
    if bins or frames:
        if "audio" not in MODALITIES[views.modality]:
            raise UserError("--specaugment has no effect: this run takes pictures alone; leave it out")
        common.check_range("--specaugment F", bins, 0, views.inputs.n_mels)
        common.check_range("--specaugment T", frames, 0, views.inputs.mel_frames)
    recipe = {name: getattr(protocol, name) for name in TRAINING}
    recipe.update(
        encoder=name_weights(encoder.vit), size=encoder.config["size"], absent=encoder.vit.absent,
        layers=args.layers, mix=protocol.mix, modality=views.modality, seconds=views.inputs.seconds,
        places=views.places, data=args.data, clips=name_clips(listing), batch_size=batch, steps=steps,
        seed=seed,
        weighted=args.weighted, mixup=args.mixup, specaugment=(bins, frames), **asdict(data.Augment()))
    return recipe


def make_tuned(recipe, protocol, views, encoder, listing):
    """The Tuned of a recipe."""
    weight = None
    if recipe["pos_weight"] and listing.multilabel:
        weight = kinds.positive_weight(torch.from_numpy(count_classes(listing)), len(listing)).float()
    tuning = Tuning(
        tuple(recipe["heads"]), listing.classes, listing.multilabel, views, protocol.average,
        recipe["layers"], recipe["mix"])
    config = {**encoder.config, "absent": recipe["absent"]}
    return Tuned(
        encoder, tuning, recipe["regularised_masking"], recipe["smoothing"], weight, recipe["mixup"],
        recipe["specaugment"], recipe["seed"], config)


def tune(args, protocol, views, encoder, listing, batch, steps, seed, out):
    """Train a FrozenEncoder's weights and the heads of a protocol on the clips of a listing, in the folder
    `out`, or go on there: the Tuned, or None where a signal came. args: of probe.py."""
    method = {**encoder.method, "name": "probe", "weights": "encoder"}      # probe.py goes on with it
    method["title"] = encoder.method["title"].removesuffix(", fine-tuned") + ", fine-tuned"
    recipe = make_recipe(args, protocol, views, encoder, listing, batch, steps, seed)
    own = dict(seed=seed, out=str(out), resume="auto", online_probe=False, keep_every=None)
    run = Run(method, Namespace(**vars(args) | own), recipe, listing=listing)
    if run.batch // args.accumulate < 2:               # BatchNorm needs two, and so do the pairs of mixup
        raise UserError(f"--batch-size {batch}: less than 2 clips for each of {run.world} processes x "
                        f"{args.accumulate} micro-batches; raise it, or lower --accumulate")
    if args.mixup and run.world > 1 and run.batch // args.accumulate % 2:
        raise UserError(f"--mixup: a micro-batch of {run.batch // args.accumulate} clips cannot be paired as "
                        "in one process; give a --batch-size that leaves each an even number")
    model = run.build(make_tuned, recipe, protocol, views, encoder, listing)
    for module in model.modules():
        if isinstance(module, common.Block):
            module.checkpoint = args.checkpoint_activations
    freeze_unused(model, views)
    optimizer = make_optimizer(model, protocol)
    run.resume(model, optimizer, clip_weights(listing) if args.weighted else None)
    plan = partial(train_plan, views=views, number=0)
    run.begin(model, optimizer, data.Inputs(**encoder.inputs), plan, clip_inputs=views.inputs)
    for step in run.steps():
        lr, encoder_lr = set_rates(optimizer, step, recipe)
        for clips, masks, weight, tick in run.micro_batches(step):
            clips["targets"] = run.listing.targets(clips["index"])
            with run.autocast():
                loss, shown = run.model(clips, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip(recipe["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, grad_norm=grad_norm, lr=lr, encoder_lr=encoder_lr)
        run.save(step)
    run.finish()
    torch.set_num_threads(run.threads)
    return None if run.process.any(run.stopped or run.stop) else model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------
# A person's own file
# ----------------------------------------------------------------------------------------------------------

def load_tuned(path, device="cpu"):
    """(FrozenEncoder, {name: head}, Tuning) of a checkpoint that a fine-tuning wrote. UserError where it has
    no heads."""
    content = common.load_checkpoint(path)
    if "tuned" not in content:
        raise UserError(f"{path}: holds an encoder that knows no classes; fine-tune it first (--probe "
                        "finetune), and give the checkpoint that this writes")
    try:
        views = content["tuned"]["views"]
        inputs = {}
        for name in ("inputs", "test_inputs"):
            wrong = common.check_inputs(views[name])
            if wrong:
                raise ValueError(wrong)
            inputs[name] = data.Inputs(**views[name])
        tuning = Tuning(**{**content["tuned"], "views": Views(**{**views, **inputs})})
        encoder = common.load_encoder(path, device, layers=tuning.layers)
        heads = make_heads(tuning, encoder.dim)
    except UserError:
        raise
    except Exception as e:                             # what is said of heads can be wrong in many ways
        raise UserError(f"{path}: its 'tuned' describes no heads of this version of the code "
                        f"{common.reason(e)}; its 'version' names the commit that wrote it") from None
    common.load_weights(heads, common.weights_of(content["model"], "heads"), path)
    return encoder, heads.eval().requires_grad_(False).to(device), tuning


@torch.no_grad()
def classify(path, file, process):
    """What the heads of a checkpoint say of a file: ({head: (C,) probabilities}, classes). A file with one
    stream alone is judged by it."""
    if not Path(file).is_file():
        raise UserError(f"--query {file}: there is no such file; give a sound or a video")
    encoder, heads, tuning = load_tuned(path, process.device)
    listing = data.make_listing(f"--query {file}", "", [str(file)], None, [])
    source = Decoded(encoder, listing, tuning.views, process, 0, tokens=True)
    outputs = None
    try:
        for found in source.testing([0], tuning.views.tested, "clip"):
            outputs = found
    except data.NoClip:                                # of a file that decodes another sentence follows
        if outputs is None:
            raise UserError(f"--query {file}: cannot be read as a sound or a video; give another") from None
    alone = [modality for modality in ("audio", "video") if modality in outputs]
    modality = alone[0] if len(alone) == 1 else tuning.views.modality
    if modality not in outputs:
        lacks = " or ".join(MODALITIES[modality])
        raise UserError(f"--query {file}: has no {lacks}, by which this checkpoint tells classes apart")
    _, tokens, embedding = outputs[modality]
    found = {}
    for name, head in heads.items():
        found[name] = tuning.probabilities(head(tokens[0], embedding[0]).cpu())
    return found, tuning.classes
