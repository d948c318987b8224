"""What an encoder makes of the clips of a set: which views are read; their features, decoded whenever they
are asked for or kept in memory; and features in a file.

probe.py, visualize.py and pixels.py read clips by these; `python probe.py --save-features` writes the file.
"""
import functools
import itertools
import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

import data
import retrieval
import run
from common import UserError

MODALITIES = {"audio": ("audio",), "video": ("video",), "av": ("video", "audio")}
PART = 32                                               # clips that are decoded and encoded at once


# ----------------------------------------------------------------------------------------------------------
# Which views of a clip, and what an encoder makes of them
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Views:
    """What is read of each clip."""
    modality: str                       # of MODALITIES
    inputs: data.Inputs
    test_inputs: data.Inputs            # of the test clips
    test: int                           # views of a test clip ...
    crops: int                          # ... and crops of each of them
    train: int | None                   # different views of a training clip, in turn; None: always new ones
    starts: str = "even"                # of the test views: even or random
    train_starts: str = "even"
    train_crop: str = "center"          # of data.crop_transform
    together: bool = False              # a head reads all places of a clip at once, instead of one by one

    @property
    def tested(self):
        """What a head that was trained on these is tested on."""
        return ["audio", "video", "av"] if self.modality == "av" else [self.modality]

    @property
    def places(self):
        """Places of a training clip that are read at once."""
        return self.test if self.together else 1


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


def choose_views(args, encoder, listing, protocol):
    """The Views by what the encoder takes, the set has, the protocol says, and args asks for (data, modality,
    seconds, views, crops)."""
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
        test = data_set.views or protocol.views
    same = whole and (modality == "audio" or protocol.train_crop == "center")           # all views of a clip
    test_inputs = replace(inputs, resize=inputs.size) if protocol.resize == "crop" else inputs
    return Views(modality, inputs, test_inputs, test, crops, 1 if same else protocol.train_views,
                 protocol.starts, protocol.train_starts, protocol.train_crop, protocol.together)


def train_plan(rng, duration, views, number):
    """The View of a training clip, or those that are read together. number: of the view, among views.train of
    the clip."""
    places = [0.5]
    if views.train_starts == "random":
        places = (np.arange(views.places) + rng.random(views.places)) / views.places
    elif views.places > 1:
        places = np.linspace(0, 1, views.places)
    elif views.train and views.train > 1:
        places = [number / (views.train - 1)]
    keys = MODALITIES[views.modality]
    placed = data.place_views(places, views.inputs, duration, "video" in keys, "audio" in keys)
    return [view._replace(video=views.train_crop if view.video else None) for view in placed]


def test_plan(rng, duration, views):
    """The Views of a test clip."""
    places = [0.5] if views.test == 1 else np.linspace(0, 1, views.test)
    if views.starts == "random":
        places = rng.random(views.test)
    keys = MODALITIES[views.modality]
    return data.place_views(
        places, views.test_inputs, duration, "video" in keys, "audio" in keys, views.crops)


class TrainingViews(Dataset):
    """The training views of the clips of a listing. Key: (epoch, index); each epoch has the next of the
    views.train views, a pure function of (its number, index): the same whether it is decoded in this epoch or
    was before."""
    def __init__(self, listing, views):
        self.count = views.train
        self.clips = []
        for number in range(views.train if views.train and views.train_starts == "even" else 1):
            plan = functools.partial(train_plan, views=views, number=number)
            self.clips.append(data.Clips(listing, views.inputs, plan, replace=False))

    def __len__(self):
        return len(self.clips[0])

    def __getitem__(self, key):
        epoch, index = key
        number = epoch % self.count if self.count else epoch
        return self.clips[number % len(self.clips)][number, index]


class RawInput(nn.Module):
    """The input itself as an embedding, average-pooled: mel to (16, 25), video to (4, 8, 8) and 3 colours.
    What a linear probe reads off it needed no encoder."""
    def __init__(self, modality="av"):
        super().__init__()
        sizes = {"video": 4 * 8 * 8 * 3, "audio": 16 * 25}
        self.dim = sum(sizes[key] for key in MODALITIES[modality])

    def forward(self, video=None, audio=None):
        parts = []
        if video is not None:                           # on the CPU: MPS lacks the two
            parts.append(F.adaptive_avg_pool3d(video.cpu(), (4, 8, 8)).flatten(1))
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


def even_plan(views, inputs, keys):
    """The plan of `views` evenly spread views of the modalities `keys`, for a loader."""
    return functools.partial(data.even_views, views, inputs, video="video" in keys, audio="audio" in keys)


def take(batch, keys, device, some=False):
    """Of the clips of a batch that have all of `keys`, or with `some` at least one: (which these are (B,)
    bool, inputs {key: (their views, ...)} on the device, what they have {key: (theirs,) bool}). An input that
    a clip lacks is at zero, as an encoder is given an absent modality."""
    found = torch.stack([batch[f"has_{key}"] for key in keys])                          # (K, B)
    kept = found.any(0) if some else found.all(0)
    given = {}
    for key in keys:
        views = len(batch[key]) // len(kept)
        given[key] = batch[key][kept.repeat_interleave(views)]
    given = data.to_device(given, device)
    has = {}
    for key, one in zip(keys, found):
        has[key] = one[kept]
        views = len(batch[key]) // len(kept)
        given[key][~has[key].repeat_interleave(views)] = 0
    return kept, given, has


def read_clips(listing, inputs, keys, plan, size, process, workers, label):
    """`size` clips of a listing at a time, of those that have all of `keys`: (index (B,), inputs {key: (B
    views, ...)} on the device). The others are named. UserError where no clip has them."""
    troubles = data.Troubles(len(listing))
    found = False
    for clips in data.eval_batches(listing, inputs, plan, size, workers, troubles, label):
        kept, given, _ = take(clips, keys, process.device)
        troubles.name(lacking(names_of(listing, clips["index"][~kept]), keys))
        if kept.any():
            found = True
            yield clips["index"][kept], given
    if not found:
        raise nothing_has(listing, keys)


def nothing_has(listing, keys):
    return UserError(f"{listing.name}: no clip has all of {', '.join(keys)}; give another --modality")


def names_of(listing, index):
    """The paths of the clips of these indices."""
    return [listing.path(i) for i in index.tolist()]


def lacking(names, keys):
    """What is said of clips that lack one of `keys`."""
    return [f"{name}: has no {' or no '.join(keys)}" for name in names]


# ----------------------------------------------------------------------------------------------------------
# Features: decoded whenever they are asked for, or kept
# ----------------------------------------------------------------------------------------------------------

class Decoded:
    """Features of the clips of a listing, which are decoded whenever they are asked for.

    tokens: whether these are wanted, in bf16, beside the embedding."""
    def __init__(self, encoder, listing, views, process, workers, tokens):
        self.encoder = encoder
        self.listing = listing
        self.views = views
        self.process = process
        self.workers = workers
        self.tokens = tokens
        self.named = data.Troubles(len(listing))        # each bad clip once, however often it is read

    def encode(self, given, places, crops, names):
        """Inputs {key: (B places crops, ...)} -> (tokens (B, V, N, D) or None, embedding (B, V, D)), V:
        places x crops, or crops, of which a head reads all places at once."""
        with self.process.autocast():
            tokens, embedding = self.encoder(**given)
        if self.tokens:
            tokens = tokens.to(torch.bfloat16).unflatten(0, (-1, places, crops))        # (B, P, C, N, D)
        embedding = embedding.float().unflatten(0, (-1, places, crops))                 # (B, P, C, D)
        retrieval.check_finite(embedding, names)
        if self.views.together:
            tokens = tokens.transpose(1, 2).flatten(2, 3) if self.tokens else None      # (B, C, P N, D)
            return tokens, embedding.mean(1)
        return tokens.flatten(1, 2) if self.tokens else None, embedding.flatten(1, 2)

    def training(self, chosen, batches):
        """For each batch [(epoch, i)] of training views of the clips chosen[i], those that can be read:
        (positions in the listing (B,), tokens (B, N, D) or None, embedding (B, D) or None of no clip)."""
        clips = TrainingViews(self.listing.subset(chosen), self.views)
        chosen = torch.as_tensor(chosen)
        cuda = self.process.device.type == "cuda"
        counts = deque()
        parts = []
        for batch in data.train_loader(clips, self.cut(batches, counts), self.workers, cuda):
            parts.append(self.see(batch, chosen))
            if len(parts) == counts[0]:
                counts.popleft()
                yield join(parts)
                parts = []

    def cut(self, batches, counts):
        """The batches in parts, so that 512 clips need not be decoded before the first is seen; how many
        parts of each goes into `counts`."""
        size = max(1, PART // self.views.places)
        for batch in batches:
            starts = range(0, len(batch), size)
            counts.append(len(starts))
            for start in starts:
                yield batch[start:start + size]

    def see(self, batch, chosen):
        """Features of the clips in a batch of a loader, as `training` gives them."""
        self.named.name(batch["bad"])
        positions = chosen[batch["index"]]
        if len(positions) == 0:
            return positions, None, None
        keys = MODALITIES[self.views.modality]
        kept, given, _ = take(batch, keys, self.process.device, some=True)
        names = names_of(self.listing, positions)
        self.named.name(lacking([name for name, has in zip(names, kept) if not has], keys))
        positions = positions[kept]
        if len(positions) == 0:
            return positions, None, None
        with torch.no_grad():
            tokens, embedding = self.encode(given, self.views.places, 1, names_of(self.listing, positions))
        return positions, None if tokens is None else tokens[:, 0], embedding[:, 0]

    def readable(self, chosen):
        """Those of the clips `chosen` that can be read, as far as is known."""
        return chosen

    @torch.no_grad()
    def testing(self, chosen, modalities, label):
        """A batch at a time of the test views of the clips `chosen`: {modality: (positions in the listing
        (B,), tokens (B, V, N, D) or None, embedding (B, V, D))}, of each modality the clips that have it."""
        views = self.views
        keys = MODALITIES[views.modality]
        listing = self.listing.subset(chosen)
        chosen = torch.as_tensor(chosen)
        plan = functools.partial(test_plan, views=views)
        size = max(1, PART // (views.test * views.crops))
        troubles = data.Troubles(len(listing))
        troubles.bad = self.named.bad
        for batch in data.eval_batches(listing, views.test_inputs, plan, size, self.workers, troubles, label):
            positions = chosen[batch["index"]]
            kept, given, has = take(batch, keys, self.process.device, some=True)
            troubles.name(lacking(names_of(self.listing, positions[~kept]), keys))
            positions = positions[kept]
            outputs = {}
            for modality in modalities:
                rows = torch.ones(len(positions), dtype=torch.bool)
                if modality != views.modality:
                    rows = has[modality]
                if rows.any():
                    there = rows.repeat_interleave(views.test * views.crops)
                    part = {key: given[key][there] for key in MODALITIES[modality]}
                    names = names_of(self.listing, positions[rows])
                    features = self.encode(part, views.test, views.crops, names)
                    outputs[modality] = (positions[rows], *features)
            yield outputs


@dataclass
class Cached:
    """The same from memory: made by `keep`."""
    encoder: nn.Module
    listing: data.Listing
    views: Views
    process: run.Process
    row: torch.Tensor                   # (len(listing),): of a clip in what follows, -1: it has none
    filled: torch.Tensor                # (n, V) bool: could this training view be read ...
    tokens: torch.Tensor | None         # ... its tokens (n, V, N, D) ...
    embedding: torch.Tensor | None      # ... and embedding (n, V, D)
    test: dict                          # {modality: (positions (m,), tokens (m, V, N, D), embedding)}

    def training(self, chosen, batches):
        chosen = torch.as_tensor(chosen)
        for batch in batches:
            epochs, index = torch.tensor(batch).T
            positions = chosen[index]
            row = self.row[positions]
            number = epochs % self.filled.shape[1]
            there = self.filled[row, number]
            row = row[there]
            number = number[there]
            tokens = None
            if self.tokens is not None:
                tokens = self.tokens[row, number].to(self.process.device)
            yield positions[there], tokens, self.embedding[row, number].to(self.process.device)

    def readable(self, chosen):
        return chosen[self.filled[self.row[chosen]].all(1).numpy()]

    def testing(self, chosen, modalities, label):
        wanted = torch.zeros(len(self.row), dtype=torch.bool)
        wanted[torch.as_tensor(chosen)] = True
        for modality in modalities:
            if modality not in self.test:
                continue
            positions, tokens, embedding = self.test[modality]
            rows = wanted[positions].nonzero().squeeze(1)
            for part in rows.split(max(1, 256 // embedding.shape[1])):
                of_part = None if tokens is None else tokens[part].to(self.process.device)
                yield {modality: (positions[part], of_part, embedding[part].to(self.process.device))}


def keep(source, epochs, train=(), test=(), modalities=(), label=""):
    """A Cached of the features of a Decoded: of the training views of the clips `train`, as many as so many
    epochs ask for, and of the test views of the clips `test`."""
    count = source.views.train or epochs
    row = torch.full((len(source.listing),), -1)
    row[torch.as_tensor(train, dtype=torch.long)] = torch.arange(len(train))
    filled = torch.zeros(len(train), count, dtype=torch.bool)
    kept = {"tokens": None, "embedding": None}
    keys = []
    for number in range(count):
        for index in torch.arange(len(train)).split(PART):
            keys.append([(number, i) for i in index.tolist()])
    read = source.training(train, keys) if len(train) else ()
    for batch, found in zip(keys, tqdm(read, desc=f"features ({label})", total=len(keys), unit="batch")):
        positions, *features = found
        number, _ = batch[0]
        rows = row[positions]
        filled[rows, number] = True
        for name, x in zip(kept, features):
            if x is not None:
                if kept[name] is None:
                    kept[name] = torch.zeros(len(train), count, *x.shape[1:], dtype=x.dtype)
                kept[name][rows, number] = x.cpu()
    if len(train) and not filled.any():
        raise UserError(f"{source.listing.name}: no training clip can be read; look at the files with python "
                        "data.py --check, or give another --modality")
    parts = {modality: [] for modality in modalities}
    outputs = source.testing(test, modalities, f"test views ({label})") if len(test) else ()
    for modality, (positions, tokens, embedding) in itertools.chain.from_iterable(map(dict.items, outputs)):
        parts[modality].append((positions, None if tokens is None else tokens.cpu(), embedding.cpu()))
    found = {modality: join(batches) for modality, batches in parts.items() if batches}
    return Cached(
        source.encoder, source.listing, source.views, source.process, row, filled, **kept, test=found)


def join(batches):
    """A list of (positions, tokens or None, embedding) as one; of no clips, (positions, None, None)."""
    positions = torch.cat([index for index, _, _ in batches])
    _, *features = zip(*[batch for batch in batches if len(batch[0])] or batches)
    return positions, *[None if x[0] is None else torch.cat(x) for x in features]


def gigabytes(encoder, views, epochs, tokens, counts, tested):
    """Of the features of (training clips, held-out clips, test clips), with their tokens or without."""
    vit = getattr(encoder, "vit", None)                 # the raw input has none, and no tokens
    sizes = {"video": 0, "audio": 0}
    if tokens:
        sizes["video"] = vit.num("video")
    if tokens and "audio" in vit.grids:                 # the views may have another length than in training
        sizes["audio"] = vit.grids["audio"][0] * (views.inputs.mel_frames // vit.patch["audio"][1])

    def of_a_view(modality):
        return encoder.dim * (4 + 2 * sum(sizes[key] for key in MODALITIES[modality]))

    train, held, test = counts
    total = train * (views.train or epochs) * views.places * of_a_view(views.modality)
    for modality, count in [(views.modality, held), *((modality, test) for modality in tested)]:
        total += count * views.test * views.crops * of_a_view(modality)
    return total / 1e9


@torch.no_grad()
def extract(encoders, listing, inputs, modalities, views, process, workers=1, label="features"):
    """Decode each clip once, embed its `views` evenly spread views with each encoder and modality.

    Returns ({(encoder name, modality): (N, views, D)}, index (N,)). Clips that do not decode, or lack what
    one of the modalities needs, are left out and named on the screen."""
    features = {key: [] for key in itertools.product(encoders, modalities)}
    keys = needed_keys(modalities)
    indices = []
    plan = even_plan(views, inputs, keys)
    size = max(1, PART // views)
    for index, given in read_clips(listing, inputs, keys, plan, size, process, workers, label):
        indices.append(index)
        for (name, modality), parts in features.items():
            with process.autocast():
                _, embedding = encoders[name](**pick(given, modality))
            x = embedding.float().unflatten(0, (-1, views)).cpu()
            retrieval.check_finite(x, names_of(listing, index))
            parts.append(x)
    return {key: torch.cat(parts) for key, parts in features.items()}, torch.cat(indices)


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
def encode_clips(encoder, listing, inputs, modalities, views, process, workers, label="features", batch=PART):
    """A batch at a time, of the clips that have all that the modalities need: (index (B,), inputs {"video" or
    "audio": (B views, ...)}, {modality: (tokens (B views, N, D), embedding (B views, D))}). The others are
    named."""
    keys = needed_keys(modalities)
    plan = even_plan(views, inputs, keys)
    size = max(1, batch // views)
    for index, given in read_clips(listing, inputs, keys, plan, size, process, workers, label):
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
        "files": np.array([listing.file(i) for i in index]),
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
