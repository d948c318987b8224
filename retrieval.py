"""Cross-modal retrieval: find the video of a sound and the sound of a video, by the embeddings of one modality at a time.

    python retrieval.py --ckpt runs/avjepa_lejepa-toy-seed0 --data toy --clips all
    python retrieval.py --ckpt RUN --data vggsound --data-dir vggsound/                  # 5 clips a class, seed 0: N = 1,545
    python retrieval.py --ckpt RUN --data audioset --data-dir audioset/ --clips ids.txt  # a list of ids or file names
    python retrieval.py --ckpt RUN --query dog.wav --folder clips/                       # a sound or a silent video
"""
import argparse, functools, time
from pathlib import Path

import common, data                                     # before torch: common sets how its threads wait
from common import UserError, main_guard

import numpy as np
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------

def ranks(similarity):
    """Rank of the match, 1 the best. similarity (N, N): rows are the queries, the diagonal is the match. Whatever does not lie
    strictly below the match stands before it, so that ties (and NaN) never count for the model."""
    return similarity.shape[1] - (similarity < similarity.diagonal()[:, None]).sum(1)


def recall(similarity):
    """One direction: R@1, R@5, R@10 in percent and the median rank."""
    r = ranks(similarity)
    return {**{f"R@{k}": 100 * (r <= k).float().mean().item() for k in (1, 5, 10)}, "median_rank": r.float().quantile(0.5).item()}


def chance(n):
    """What a random order of n candidates scores."""
    return {**{f"R@{k}": 100 * min(1.0, k / n) for k in (1, 5, 10)}, "median_rank": (n + 1) / 2}


def recall_in_class(similarity, labels):
    """(R@1 in percent among the clips of the query's own class, its chance): class alone does not help here. labels (N,)."""
    hits, luck = [], []
    for c in labels.unique():
        members = (labels == c).nonzero().squeeze(1)
        hits.append(ranks(similarity[members][:, members]) == 1)
        luck.append(torch.full((len(members),), 1 / len(members)))
    return 100 * torch.cat(hits).float().mean().item(), 100 * torch.cat(luck).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------

ACROSS = {"audio": "a->v", "video": "v->a"}             # the predictor that a query of a modality goes through


def random_views(count, inputs, rng, duration, video=True, audio=True):
    """`count` views at random places of the clip, centre crop (authors' code: 4, averaged)."""
    return data.place_views(rng.random(count), inputs, duration, video, audio)


def choose_embedding(encoder, name=None):
    """The `name` that is asked for, or the first of these that the checkpoint has. Raises UserError where it lacks it."""
    has = {"predicted": set(ACROSS.values()) <= set(encoder.cross or ()), "projected": encoder.projector is not None, "encoder": True}
    name = name or next(one for one in has if has[one])
    if not has[name]:
        lacks = {"predicted": f"predictors {' and '.join(ACROSS.values())}", "projected": "projector"}[name]
        raise UserError(f"--embedding {name}: this {encoder.method} checkpoint has no {lacks}; leave it out, or give --embedding encoder")
    return name


@torch.no_grad()
def embed(encoder, listing, views=4, batch=128, workers=1, process=None, seed=0, embedding=None):
    """Each clip once per modality, as a query and as a candidate: {"audio": ((N, D), (N, D)), "video": the same}, means over the views,
    and what was read: index (N,), has_video, has_audio (N,) bool. A clip that does not decode is left out."""
    embedding = choose_embedding(encoder, embedding)
    inputs, process = data.Inputs(**encoder.inputs), process or common.start_process("cpu")
    plan = functools.partial(random_views, views, inputs)
    out, read, troubles = {"audio": [], "video": []}, {"index": [], "has_video": [], "has_audio": []}, data.Troubles(len(listing))
    for b in data.eval_batches(listing, inputs, plan, max(1, batch // views), workers, troubles, "embed for retrieval", seed):
        for key in read:
            read[key].append(b[key])
        b = data.to_device(b, process.device)
        for modality in out:
            with process.autocast():
                z = encoder(**{modality: b[modality]})[1].float()                   # (B views, D)
            if embedding == "predicted":                                            # a prediction, and what it was trained on
                # unspecified: predictors that were trained on the visible part are given the whole input; the mean over the views comes
                # last, and is not normalised
                with process.autocast():
                    target = encoder.teacher(**{modality: b[modality]})[1].float()
                roles = encoder.cross[ACROSS[modality]](z), F.layer_norm(target, target.shape[-1:])
                roles = [x.unflatten(0, (-1, views)).mean(1).cpu() for x in roles]  # each (B, D)
            else:
                z = encoder.projector(z) if embedding == "projected" else z
                roles = 2 * [F.normalize(z.unflatten(0, (-1, views)).mean(1), dim=-1).cpu()]
            out[modality].append(roles)
    return {k: [torch.cat(x) for x in zip(*v)] for k, v in out.items()}, {k: torch.cat(v) for k, v in read.items()}


def similarity(queries, candidates, embedding):
    """(Q, N) of queries (Q, D) and candidates (N, D): the cosine, or minus the L1 distance, the mean over the dimensions."""
    if embedding == "predicted":
        return -torch.cdist(queries, candidates, p=1) / queries.shape[1]
    return queries @ candidates.T


def rarest(listing, among=None):
    """The rarest label of each clip, (N,), -1 where it has none. among: the class indices that count, by default all."""
    frequency = np.bincount(listing.labels, minlength=len(listing.classes))
    among = set(range(len(listing.classes)) if among is None else among)
    labels = ([c for c in listing.clip_labels(i).tolist() if c in among] for i in range(len(listing)))
    return np.array([min(some, key=lambda c: frequency[c], default=-1) for some in labels])


def choose(listing, clips, seed=0):
    """The clips to search: 'all', a number of clips for each class (drawn with the seed; a clip with several labels counts for
    the rarest), or a file with an id or a file name in each line."""
    if clips == "all":
        return listing
    if clips.isdigit() and int(clips) > 0:
        if listing.labels is None:
            raise UserError(f"--clips {clips}: {listing.name} has no classes; give --clips all or a list of ids")
        label = rarest(listing)
        rng, chosen = np.random.default_rng(seed), []
        for c in range(len(listing.classes)):
            chosen += rng.permutation(np.flatnonzero(label == c))[:int(clips)].tolist()
        return listing.subset(sorted(chosen))
    if not Path(clips).is_file():
        raise UserError(f"--clips {clips}: neither 'all', nor a number of clips for each class, nor a file with ids")
    try:
        wanted = list(dict.fromkeys(line.strip() for line in Path(clips).read_text().splitlines() if line.strip()))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--clips {clips}: cannot be read as a text file with an id in each line") from None
    names = [Path(listing.path(i)) for i in range(len(listing))]
    place = {}                                          # exact names win over ids
    for key in (lambda p: p.stem[:11], lambda p: p.stem[1:12] if p.stem[0] == "Y" else p.stem, lambda p: p.stem, lambda p: p.name):
        place.update({key(p): i for i, p in enumerate(names)})
    missing = [w for w in wanted if w not in place]
    if len(missing) == len(wanted):
        raise UserError(f"--clips {clips}: none of its {len(wanted):,} ids is in {listing.name}")
    if missing:
        print(f"{len(missing):,} of {len(wanted):,} ids of {clips} are not on disk, the first: {missing[0]}")
    return listing.subset([place[w] for w in wanted if w in place])


def evaluate(encoder, listing, views=4, workers=1, process=None, embedding=None, seed=0):
    """Both directions, chance and, with classes, R@1 within the class: a flat dict for the log. Only clips that have both sound
    and picture are searched; the others are counted. embedding: of choose_embedding."""
    embedding = choose_embedding(encoder, embedding)
    z, read = embed(encoder, listing, views, workers=workers, process=process, seed=seed, embedding=embedding)
    both = read["has_video"] & read["has_audio"]
    index = read["index"][both]
    if not len(index):
        raise UserError(f"{listing.name}: no clip has both sound and picture")
    result = {"N": len(index), "left_out": len(listing) - len(index), "embedding": embedding, "chance": chance(len(index))}
    for name, asks, finds in (("A->V", "audio", "video"), ("V->A", "video", "audio")):
        found = similarity(z[asks][0][both], z[finds][1][both], embedding)
        result[name] = recall(found)
        if listing.labels is not None and not listing.multilabel:
            result[name]["class R@1"], result["chance"]["class R@1"] = recall_in_class(found, listing.targets(index.numpy()))
    return result


def query(encoder, file, folder, top, views, workers, process, embedding=None, seed=0):
    """(the modality that was searched with, [(score, path)], number of clips left out): the clips of a folder whose other
    modality lies nearest to the file. A file that has sound is asked by its sound. Scores are those of `similarity`."""
    embedding = choose_embedding(encoder, embedding)

    def one(paths, modality, role):
        listing = data.make_listing("query", "", paths, None, [])
        z, read = embed(encoder, listing, views, workers=workers, process=process, seed=seed, embedding=embedding)
        keep = read[f"has_{modality}"]
        return z[modality][role][keep], [paths[i] for i in read["index"][keep]], len(paths) - int(keep.sum())

    if not Path(file).is_file():
        raise UserError(f"--query {file}: there is no such file")
    candidates = data.list_clips("folder", folder, split="all")
    clip = data.read_clip(file, 0.0, 1.0, 1, 16, 16000)
    asks = "audio" if clip["has_audio"] else "video"
    z, _, _ = one([str(file)], asks, 0)
    found, paths, left_out = one([candidates.path(i) for i in range(len(candidates))], "video" if asks == "audio" else "audio", 1)
    if not paths:
        raise UserError(f"--folder {folder}: no clip in it has {'a picture' if asks == 'audio' else 'sound'} to compare with")
    scores = similarity(z, found, embedding)[0].tolist()
    return asks, sorted(zip(scores, paths), reverse=True)[:top], left_out


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    add = parser.add_argument
    add("--ckpt", required=True, help="folder of a run, or its latest.pt")
    add("--data", help="toy, audioset, vggsound, kinetics400 or folder")
    add("--data-dir", help="folder with the clips and the csv files")
    add("--clips", default="5", help="all, a number of clips for each class, or a file with ids")
    add("--views", type=int, default=4, help="random views of a clip that are averaged")
    add("--embedding", choices=("predicted", "projected", "encoder"), help="predicted: L1 between what one modality predicts of the other "
        "and what that is (MJEPA); projected: cosine after the projector (the table of AV-JEPA's paper); encoder: cosine of CLS (its "
        "authors' job) or the mean of the tokens; default: the first of them that the checkpoint has")
    add("--untrained", action="store_true", help="the same encoder as it was initialised, for comparison")
    add("--absent", choices=("zero", "drop"), help="if other than in training")
    add("--query", help="a sound or a video: list its best matches in --folder")
    add("--folder", help="folder that is searched with --query")
    add("--top", type=int, default=10, help="matches to list")
    add("--workers", type=int, help="processes that decode")
    add("--device", default="auto", help="auto, cpu, mps or cuda")
    add("--seed", type=int, default=0, help="of the choice of clips and of the views")
    args = parser.parse_args(argv)
    if bool(args.query) == bool(args.data) or bool(args.query) != bool(args.folder):
        raise UserError("give either --data SET, or --query FILE with --folder DIR")
    common.check_range("--workers", args.workers or 0, 0, 1024)
    common.check_range("--views", args.views, 1, 1000), common.check_range("--top", args.top, 1, 10 ** 6)
    common.check_range("--seed", args.seed, 0, 2 ** 31)
    began, process = time.time(), common.start_process(args.device)
    if process.world > 1:
        raise UserError("retrieval.py runs in one process; start it without torchrun")
    workers = common.default_workers(process) if args.workers is None else args.workers
    encoder = common.load_encoder(args.ckpt, process.device, args.untrained, args.absent, cross=True)
    if encoder.vit.video is None or encoder.vit.audio is None:
        raise UserError(f"{args.ckpt}: this {encoder.method} encoder takes one modality only; retrieval needs both")
    embedding = choose_embedding(encoder, args.embedding)
    if args.query:
        asks, best, left_out = query(encoder, args.query, args.folder, args.top, args.views, workers, process, embedding, args.seed)
        print(f"by the {asks} of {args.query}:")
        for score, path in best:
            print(f"{score:7.3f}  {path}")
        if left_out:
            print(f"({left_out} clips left out: unreadable, or without {'picture' if asks == 'audio' else 'sound'})")
        return
    if args.data in data.SOUNDS:
        raise UserError(f"--data {args.data} has no pictures; retrieval needs both")
    if args.data in data.SILENT:
        raise UserError(f"--data {args.data} has no sound; retrieval needs both")
    listing = data.list_clips(args.data, args.data_dir, "test")
    if listing.labels is None:
        print(f"{args.data_dir} has no sub-folders and so no held-out part: pre-training saw these clips")
    listing = choose(listing, args.clips, args.seed)
    result = evaluate(encoder, listing, args.views, workers, process, embedding, args.seed)
    print(f"{args.data}, N = {result['N']:,}, left out {result['left_out']:,}" + (", untrained encoder" if args.untrained else ""))
    for name in ("A->V", "V->A", "chance"):
        print(f"{name:7s}" + "".join(f"  {k} {v:6.1f}" for k, v in result[name].items()))
    common.add_row(args.ckpt, "retrieval.jsonl", {
        "data": args.data, "clips": args.clips, "embedding": embedding, "untrained": args.untrained, "absent": encoder.vit.absent,
        "seed": args.seed, "ckpt": str(args.ckpt), "step": encoder.step, "seconds": round(time.time() - began, 1), **result})


if __name__ == "__main__":
    main_guard(main)
