"""Cross-modal retrieval: find the video of a sound and the sound of a video.

    python retrieval.py --ckpt RUN --data toy --clips all
    python retrieval.py --ckpt RUN/step-*.pt RUN --data toy --clips all          # earlier steps, each in turn
    python retrieval.py --ckpt RUN --data SET --data-dir FOLDER                  # 5 clips a class, seed 0
    python retrieval.py --ckpt RUN --data SET --data-dir FOLDER --clips ids.txt  # a list of ids or file names
    python retrieval.py --ckpt RUN --query dog.wav --folder clips/               # a sound or a silent video

Each clip is embedded by one modality at a time. Each result is a row in RUN/retrieval.jsonl;
`visualize.py curves RUN` draws R@10 over the steps.
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import functools
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
import run
from common import UserError, main_guard

WAYS = {"A->V": ("audio", "video"), "V->A": ("video", "audio")}     # name: (asks, finds)
ACROSS = {"audio": "a->v", "video": "v->a"}             # the predictor that a query goes through
OTHER = {"audio": "video", "video": "audio"}


# ----------------------------------------------------------------------------------------------------------
# Measures
# ----------------------------------------------------------------------------------------------------------

def ranks(similarity):
    """Rank of the match, 1 the best. similarity (N, N): rows are the queries, the diagonal is the match.
    Whatever does not lie strictly below the match stands before it, so that ties (and NaN) never count for
    the model."""
    below = similarity < similarity.diagonal()[:, None]
    return similarity.shape[1] - below.sum(1)


def recall(similarity):
    """One direction: R@1, R@5, R@10 in percent and the median rank."""
    rank = ranks(similarity)
    result = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in (1, 5, 10)}
    result["median_rank"] = rank.float().quantile(0.5).item()
    return result


def chance(n):
    """What a random order of n candidates scores."""
    result = {f"R@{k}": 100 * min(1.0, k / n) for k in (1, 5, 10)}
    result["median_rank"] = (n + 1) / 2
    return result


def recall_in_class(similarity, labels):
    """(R@1 in percent among the clips of the query's own class, its chance): class alone does not help here.
    labels (N,)."""
    hits = []
    luck = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        hits.append(ranks(similarity[members][:, members]) == 1)
        luck.append(torch.full((len(members),), 1 / len(members)))
    return 100 * torch.cat(hits).float().mean().item(), 100 * torch.cat(luck).mean().item()


# ----------------------------------------------------------------------------------------------------------
# Embeddings
# ----------------------------------------------------------------------------------------------------------

def check_finite(x, names):
    """UserError where something in x (B, ...), what an encoder says of the clips `names` (B,), is no finite
    number: it names the first such clip."""
    bad = ~x.isfinite().flatten(1).all(1)                                           # (B,)
    if bad.any():
        raise UserError(f"{names[int(bad.int().argmax())]}: what the encoder says of this clip is no finite "
                        "number; its weights or the clip must be broken: take another checkpoint, or look at "
                        "the clip with python data.py --check")


def random_views(count, inputs, rng, duration, video=True, audio=True):
    """`count` views at random places of the clip, centre crop (authors' code: 4, averaged)."""
    return data.place_views(rng.random(count), inputs, duration, video, audio)


def choose_embedding(encoder, name=None):
    """The `name` that is asked for, or the first of these that the checkpoint has. Raises UserError where it
    lacks it."""
    has = {
        "predicted": set(ACROSS.values()) <= set(encoder.cross or ()),
        "projected": encoder.projector is not None,
        "encoder": True}
    if name is None:
        return next(kind for kind in has if has[kind])
    if not has[name]:
        lacks = {"predicted": f"predictors {' and '.join(ACROSS.values())}", "projected": "projector"}[name]
        raise UserError(f"--embedding {name}: this {encoder.method['name']} checkpoint has no {lacks}; leave "
                        "it out, or give --embedding encoder")
    return name


def embed_batch(encoder, modality, x, views, embedding, process):
    """One modality of a batch, x (B views, ...) -> what the clips are as queries and as candidates, each (B,
    D)."""
    def average(z):
        return z.unflatten(0, (-1, views)).mean(1)                                  # (B views, D) -> (B, D)

    with process.autocast():
        z = encoder(**{modality: x})[1].float()                                     # (B views, D)
    if embedding == "predicted":
        # a prediction, and what it was trained on
        # unspecified: predictors that were trained on the visible part are given the whole input; the mean
        # over the views comes last, and is not normalised
        with process.autocast():
            target = encoder.teacher(**{modality: x})[1].float()
        query = encoder.cross[ACROSS[modality]](z)
        candidate = F.layer_norm(target, target.shape[-1:])
        return average(query).cpu(), average(candidate).cpu()
    if embedding == "projected":
        z = encoder.projector(z)
    z = F.normalize(average(z), dim=-1).cpu()
    return z, z


@torch.no_grad()
def embed(encoder, listing, views=4, batch=128, workers=1, process=None, seed=0, embedding=None):
    """Each clip once per modality, as a query and as a candidate, means over the views: {"audio": (queries
    (N, D), candidates (N, D)), "video": the same}, and what was read: index (N,), has_video, has_audio (N,)
    bool. A clip that does not decode is left out."""
    embedding = choose_embedding(encoder, embedding)
    inputs = data.Inputs(**encoder.inputs)
    process = process or run.start_process("cpu")
    plan = functools.partial(random_views, views, inputs)
    size = max(1, batch // views)
    troubles = data.Troubles(len(listing))
    label = "embed for retrieval"
    parts = {"audio": [], "video": []}
    read = {"index": [], "has_video": [], "has_audio": []}
    for clips in data.eval_batches(listing, inputs, plan, size, workers, troubles, label, seed):
        for key in read:
            read[key].append(clips[key])
        names = [listing.path(i) for i in clips["index"].tolist()]
        clips = data.to_device(clips, process.device)
        for modality in parts:
            x = clips[modality]
            pair = embed_batch(encoder, modality, x, views, embedding, process)
            for z in pair:
                check_finite(z, names)
            parts[modality].append(pair)
    z = {}
    for modality, pairs in parts.items():
        queries, candidates = zip(*pairs)
        z[modality] = (torch.cat(queries), torch.cat(candidates))
    return z, {key: torch.cat(values) for key, values in read.items()}


def similarity(queries, candidates, embedding):
    """(Q, N) of queries (Q, D) and candidates (N, D): the cosine, or minus the L1 distance, the mean over the
    dimensions."""
    if embedding == "predicted":
        return -torch.cdist(queries, candidates, p=1) / queries.shape[1]
    return queries @ candidates.T


# differs: the papers rank by the similarity as it is
RANKINGS = {
    "plain": "as the paper ranks",
    "centred": "cosine after the mean over the clips is taken off queries and candidates",
    "hubs": "minus the candidate's mean over the queries, so that no hub is near to all"}


def rank_by(ranking, queries, candidates, embedding):
    """`similarity`, or what RANKINGS says of it."""
    if ranking == "centred":
        queries = F.normalize(queries - queries.mean(0), dim=-1)
        candidates = F.normalize(candidates - candidates.mean(0), dim=-1)
        return queries @ candidates.T
    scores = similarity(queries, candidates, embedding)
    if ranking == "hubs":
        scores = scores - scores.mean(0)
    return scores


# ----------------------------------------------------------------------------------------------------------
# Which clips are searched
# ----------------------------------------------------------------------------------------------------------

def rarest(listing, among=None):
    """The rarest label of each clip, (N,), -1 where it has none. among: the class indices that count, by
    default all."""
    frequency = np.bincount(listing.labels, minlength=len(listing.classes))
    counts = set(range(len(listing.classes)) if among is None else among)
    chosen = []
    for i in range(len(listing)):
        labels = [label for label in listing.clip_labels(i).tolist() if label in counts]
        chosen.append(min(labels, key=lambda label: frequency[label], default=-1))
    return np.array(chosen)


def choose(listing, clips, seed=0):
    """The clips to search: 'all', a number of clips for each class (drawn with the seed; a clip with several
    labels counts for the rarest), or a file with an id or a file name in each line."""
    if clips == "all":
        return listing
    if re.fullmatch("0*[1-9][0-9]{0,8}", clips, re.ASCII):
        return draw_of_each_class(listing, int(clips), seed)
    if not os.path.isfile(clips):                       # Path's raises where a name is too long
        raise UserError(f"--clips {clips}: neither 'all', nor a number of clips for each class, nor a file "
                        "with ids")
    return find_ids(listing, clips)


def draw_of_each_class(listing, count, seed):
    """At most `count` random clips of each class, in the order of the listing."""
    if listing.labels is None:
        raise UserError(f"--clips {count}: {listing.name} has no classes; give --clips all or a list of ids")
    label = rarest(listing)
    rng = np.random.default_rng(seed)
    chosen = []
    for c in range(len(listing.classes)):
        members = rng.permutation(np.flatnonzero(label == c))
        chosen += members[:count].tolist()
    return listing.subset(sorted(chosen))


def find_ids(listing, file):
    """The clips that the lines of a text file name, in their order, each once."""
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--clips {file}: cannot be read as a text file with an id in each line") from None
    wanted = [line for line in dict.fromkeys(lines) if line]
    files = [listing.file(i) for i in range(len(listing))]
    stems = [data.name_of(file) for file in files]
    # exact names win over ids: what comes later replaces what came before
    index = {stem[:11]: i for i, stem in enumerate(stems)}
    index.update((stem[1:12] if stem[0] == "Y" else stem, i) for i, stem in enumerate(stems))
    index.update((stem, i) for i, stem in enumerate(stems))
    index.update((os.path.basename(file), i) for i, file in enumerate(files))
    wanted = {name: index.get(name, index.get(data.name_of(name))) for name in wanted}
    missing = [name for name in wanted if wanted[name] is None]
    if len(missing) == len(wanted):
        raise UserError(f"--clips {file}: none of its {len(wanted):,} ids is in {listing.name}")
    if missing:
        print(f"{len(missing):,} of {len(wanted):,} ids of {file} are not on disk, the first: {missing[0]}")
    return listing.subset([i for i in dict.fromkeys(wanted.values()) if i is not None])


# ----------------------------------------------------------------------------------------------------------
# Search
# ----------------------------------------------------------------------------------------------------------

def evaluate(encoder, listing, views=4, workers=1, process=None, embedding=None, seed=0, ranking="plain"):
    """Both directions, chance and, with classes, R@1 within the class: a flat dict for the log. Only clips
    that have both sound and picture are searched; the others are counted. embedding: of choose_embedding;
    ranking: of RANKINGS."""
    embedding = choose_embedding(encoder, embedding)
    z, read = embed(encoder, listing, views, workers=workers, process=process, seed=seed, embedding=embedding)
    both = read["has_video"] & read["has_audio"]
    index = read["index"][both]
    if len(index) < 2:
        raise UserError(f"{listing.name}: {len(index)} clips have both sound and picture; retrieval needs at "
                        "least 2, to have one to search among")
    result = {
        "N": len(index),
        "left_out": len(listing) - len(index),
        "embedding": embedding,
        "chance": chance(len(index))}
    for way, (asks, finds) in WAYS.items():
        queries, _ = z[asks]
        _, candidates = z[finds]
        scores = rank_by(ranking, queries[both], candidates[both], embedding)
        result[way] = recall(scores)
        if listing.labels is not None and not listing.multilabel:
            labels = listing.targets(index.numpy())
            result[way]["class R@1"], result["chance"]["class R@1"] = recall_in_class(scores, labels)
    return result


def query(encoder, file, folder, top, views, workers, process, embedding=None, seed=0):
    """(the modality that was searched with, [(score, path)], number of clips left out): the clips of a folder
    whose other modality lies nearest to the file. A file that has sound is asked by its sound. Scores are
    those of `similarity`."""
    options = dict(views=views, workers=workers, process=process, seed=seed, embedding=embedding)

    if not data.is_clip(file):
        raise UserError(f"--query {file}: there is no such file")
    if not os.path.isdir(folder):
        raise UserError(f"--folder {folder}: there is no such folder")
    asked = data.make_listing(f"--query {file}", "", [str(file)], None, [])
    searched = replace(data.list_clips("folder", folder, split="all"), name=f"--folder {folder}")
    z, read = embed(encoder, asked, **options)
    asks = "audio" if read["has_audio"][0] else "video"
    queries, _ = z[asks]
    z, read = embed(encoder, searched, **options)
    has = read[f"has_{OTHER[asks]}"]
    if not has.any():
        lacks = "a picture" if asks == "audio" else "sound"
        raise UserError(f"--folder {folder}: no clip in it has {lacks} to compare with")
    _, candidates = z[OTHER[asks]]
    paths = [searched.path(i) for i in read["index"][has].tolist()]
    scores = similarity(queries, candidates[has], choose_embedding(encoder, embedding))[0].tolist()
    best = sorted(zip(scores, paths), reverse=True)[:top]
    return asks, best, len(searched) - len(paths)


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=run.Help)
    both = [name for name, data_set in data.SETS.items() if len(data_set.has) == 2]
    add_data, add_run, add_method, _ = run.flag_groups(parser)
    add_data("--data", help=f"{', '.join(both)} (default: none, with --query)")
    add_data("--data-dir", help="folder with the clips and the csv files (default: none; toys: in cache/)")
    add_data("--clips", default="5", help="all, a number of clips for each class, or a file with ids")
    add_data("--query", help="a sound or a video: list its best matches in --folder (default: none)")
    add_data("--folder", help="folder that is searched with --query (default: none)")
    add_run("--ckpt", nargs="+", required=True,
        help="folder of a run, its latest.pt or another checkpoint; of several, each in turn")
    add_run("--seed", type=int, default=0, help="of the choice of clips and of the views")
    add_method("--embedding", choices=("predicted", "projected", "encoder"),
        help="predicted: L1 between what one modality predicts of the other and what that is; projected: "
        "cosine after the projector; encoder: cosine of CLS or the mean of the tokens; default: the first of "
        "them that the checkpoint has")
    add_method("--ranking", choices=tuple(RANKINGS), default="plain",
        help="; ".join(f"{name}: {what}" for name, what in RANKINGS.items()))
    add_method("--views", type=int, default=4, help="random views of a clip that are averaged")
    add_method("--top", type=int, default=10, help="matches to list")
    add_method("--untrained", action="store_true",
        help="the same encoder as it was initialised, for comparison")
    add_method("--absent", choices=("zero", "drop"), help="of a modality; default: as in training")
    args = parser.parse_args(argv)
    if bool(args.query) == bool(args.data) or bool(args.query) != bool(args.folder):
        raise UserError("give either --data SET, or --query FILE with --folder DIR")
    if args.query and args.ranking != "plain":
        raise UserError(f"--ranking {args.ranking} is measured over many queries; leave it out with --query")
    if args.query and len(args.ckpt) > 1:
        raise UserError("--query is asked of one encoder; give one --ckpt")
    common.check_range("--workers", args.workers or 0, 0, 1024)
    common.check_range("--views", args.views, 1, 1000)
    common.check_range("--top", args.top, 1, 10 ** 6)
    common.check_range("--seed", args.seed, 0, 2 ** 31)
    return args


def show_matches(args, encoder, embedding, process, workers):
    """--query: the best matches of one file on the screen."""
    asks, best, left_out = query(
        encoder, args.query, args.folder, args.top, args.views, workers, process, embedding, args.seed)
    print(f"by the {asks} of {args.query}:")
    for score, path in best:
        print(f"{score:7.3f}  {path}")
    if left_out:
        lacks = "picture" if asks == "audio" else "sound"
        print(f"({left_out} clips left out: unreadable, or without {lacks})")


def search_checkpoint(args, process, workers):
    """Search with the one checkpoint args.ckpt, as the flags say."""
    began = time.time()
    encoder = common.load_encoder(args.ckpt, process.device, args.untrained, args.absent, cross=True)
    if len(encoder.vit.grids) < 2:
        name = encoder.method["name"]
        raise UserError(f"{args.ckpt}: this {name} encoder takes one modality only; retrieval needs both")
    embedding = choose_embedding(encoder, args.embedding)
    if args.query:
        show_matches(args, encoder, embedding, process, workers)
        return
    data.require(args.data, ("video", "audio"), "retrieval needs both")
    listing = data.list_clips(args.data, args.data_dir, "test")
    if listing.labels is None:
        print(f"{args.data_dir} has no sub-folders and so no held-out part: pre-training saw these clips")
    listing = choose(listing, args.clips, args.seed)
    print(f"{args.ckpt}, step {encoder.step:,}")
    result = evaluate(encoder, listing, args.views, workers, process, embedding, args.seed,
                      args.ranking)
    untrained = ", untrained encoder" if args.untrained else ""
    ranked = f", ranking {args.ranking}" if args.ranking != "plain" else ""
    print(f"{args.data}, N = {result['N']:,}, left out {result['left_out']:,}{untrained}{ranked}")
    for name in (*WAYS, "chance"):
        print(f"{name:7s}" + "".join(f"  {key} {value:6.1f}" for key, value in result[name].items()))
    run.add_row(args.ckpt, "retrieval.jsonl", {
        "data": args.data,
        "clips": args.clips,
        "embedding": embedding,
        "ranking": args.ranking,
        "untrained": args.untrained,
        "absent": encoder.vit.absent,
        "seed": args.seed,
        "ckpt": str(args.ckpt),
        "step": encoder.step,
        "seconds": round(time.time() - began, 1),
        **result})


def main(argv=None):
    args = get_args(argv)
    process, workers = run.one_process(args, "retrieval.py")
    for one in run.each_checkpoint(args):
        search_checkpoint(one, process, workers)


if __name__ == "__main__":
    main_guard(main)
