"""Clips in, tensors out: every data set goes through the same decoder and the same front end.

A clip is opened and decoded once, whatever the number of views; audio and video of a view cover the same
seconds, by timestamps, unless the method takes pictures of a part of them only. This is the door; the rooms
are the files of datasets/: reader.py decodes, inputs.py makes tensors, views.py and batches.py give them to a
method, files.py finds the clips, listing.py and one file for each family list the sets, prepare.py writes
them anew. A new set is a function (folder, split) -> Listing in such a file, and an entry of SETS.

    python data.py --data toy --check                           # writes the toy clips if they are not there
    python data.py --data vggsound --data-dir vggsound/ --check       # what is there, missing, unreadable
    python data.py --data esc50 --data-dir ESC-50/ --check            # the same for sets of sound alone
    python data.py --data folder --data-dir clips/ --stats            # for --mel-mean and --mel-std
    python data.py --data vggsound --data-dir vggsound/ --prepare small/      # written anew, quick to read
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from common import UserError, check_range, main_guard
from datasets.audioset import list_audioset
from datasets.augment import AUGMENT, CHANGES, Augment  # noqa: F401
from datasets.batches import Batches, NoClip, Troubles, eval_batches, eval_loader, train_loader  # noqa: F401
from datasets.check import check, mel_stats
from datasets.collectors import picture, pixel_aspect  # noqa: F401
from datasets.files import MEDIA, few, name_of  # noqa: F401
from datasets.folder import list_folder
from datasets.inputs import IMAGENET_MEAN, IMAGENET_STD, Inputs, LogMel  # noqa: F401
from datasets.inputs import crop_transform, normalize_video  # noqa: F401
from datasets.kinetics import KINETICS_LISTS, list_kinetics
from datasets.listing import Listing, describe, join, make_listing, read_rows  # noqa: F401
from datasets.made import write_clip  # noqa: F401
from datasets.prepare import prepare
from datasets.reader import ClipError, find_streams, open_clip, read_clip, time_stretch  # noqa: F401
from datasets.rewrite import Coding
from datasets.shards import is_clip  # noqa: F401
from datasets.sounds import list_esc50, list_fsd50k, list_speechcommands
from datasets.ssv2 import SSV2_LISTS, list_ssv2
from datasets.still import STILL, STILL_CLASSES, STILL_WORLD, still_clip  # noqa: F401
from datasets.toy import TOY, TOY_CLASSES, TOY_WORLD, toy_clip  # noqa: F401
from datasets.vggsound import list_vggsound
from datasets.views import CROPS, Clips, View, even_views, place_views  # noqa: F401
from datasets.views import collate, load_clip, load_views, to_device  # noqa: F401


@dataclass(frozen=True)
class DataSet:
    """What is to be known of a data set. Its name stands in SETS alone."""
    list: Callable                          # (folder, split) -> Listing
    has: tuple = ("video", "audio")
    seconds: float | None = None            # length that no clip exceeds, where the set fixes it
    views: int | None = None                # test views, where the set has a number of its own ...
    crops: int | None = None                # ... and crops of their pictures
    covers: float | None = None             # seconds that the test views of a set of very unequal clips cover
    all_splits: bool = False                # `list` knows the split 'all'
    make: Callable | None = None            # (folder) writes the set, where it is not there ...
    folder: Callable | None = None          # ... into () -> folder, unless another one is given
    lists: tuple = ()                       # glob patterns below the folder: the set's own lists
    augment: bool = True                    # False: colours are its classes, the recipes change none


AS_2M = partial(list_audioset, parts=["unbalanced_train"])
AS_20K = partial(list_audioset, parts=["balanced_train"])
AS_FULL = partial(list_audioset, parts=["unbalanced_train", "balanced_train"])
AS_LISTS = ("class_labels_indices.csv", "*_segments.csv")
MADE_LISTS = ("world.json", "*/truth.npz")
SETS = {
    "toy": DataSet(
        TOY_WORLD.list, make=TOY_WORLD.make, folder=TOY_WORLD.folder, lists=MADE_LISTS, augment=False),
    "toy-still": DataSet(
        STILL_WORLD.list, make=STILL_WORLD.make, folder=STILL_WORLD.folder, lists=MADE_LISTS),
    "audioset": DataSet(AS_2M, seconds=10.0, lists=AS_LISTS),
    "audioset-20k": DataSet(AS_20K, seconds=10.0, lists=AS_LISTS),
    "audioset-full": DataSet(AS_FULL, seconds=10.0, lists=AS_LISTS),
    "vggsound": DataSet(list_vggsound, seconds=10.0, lists=("vggsound.csv", "train.csv", "test.csv")),
    "kinetics400": DataSet(                                                     # test views: V-JEPA's paper
        list_kinetics, seconds=10.0, views=8, crops=3, lists=KINETICS_LISTS),
    "ssv2": DataSet(list_ssv2, has=("video",), views=2, crops=3, lists=SSV2_LISTS),     # as above
    "esc50": DataSet(
        list_esc50, has=("audio",), seconds=5.0, all_splits=True, lists=("meta/esc50.csv",)),
    "speechcommands": DataSet(
        list_speechcommands, has=("audio",), seconds=1.0, lists=("validation_list.txt", "testing_list.txt")),
    "fsd50k": DataSet(                                                          # .3 to 30 s: the longest clip
        list_fsd50k, has=("audio",), covers=30.0, lists=("FSD50K.ground_truth/*.csv",)),
    "folder": DataSet(list_folder, all_splits=True)}


def find_set(name):
    """The entry of SETS. UserError where there is none."""
    if name not in SETS:
        raise UserError(f"--data {name}: not a data set; one of {', '.join(SETS)}")
    return SETS[name]


def require(name, modalities, advice):
    """UserError where the set lacks one of the modalities, "video" and "audio", with the advice what to do
    instead."""
    words = {"video": "pictures", "audio": "sound"}
    for modality in modalities:
        if modality not in find_set(name).has:
            raise UserError(f"--data {name} has no {words[modality]}; {advice}")


def list_clips(name, folder=None, split="train"):
    """The clips of `name` that lie under `folder`. split: 'train', 'test' or 'all'. Raises UserError with
    what to do."""
    entry = find_set(name)
    if not folder and entry.folder is None:
        raise UserError(f"--data {name} needs --data-dir, the folder with the clips and the csv files")
    folder = Path(folder or entry.folder())
    if entry.make:
        entry.make(folder)
    check_folder(folder)
    if split == "all" and not entry.all_splits:
        return join(list_clips(name, folder, "train"), list_clips(name, folder, "test"))
    listing = replace(entry.list(folder, split), name=name, seconds=entry.seconds)
    notes = f" ({'; '.join(listing.notes)})" if listing.notes else ""
    if len(listing) == 0 and listing.missing:
        raise UserError(
            f"--data {name}: none of the {listing.missing:,} listed clips lies under {folder}{notes}")
    if len(listing) == 0:
        raise UserError(f"--data {name}: no clip in {folder} for the {split} split{notes}")
    return listing


def list_all(name, folder=None):
    """The clips of all splits that are there, each once."""
    if find_set(name).all_splits:
        listing = list_clips(name, folder, "all")
    else:
        listing = list_clips(name, folder, "train")
        try:
            listing = join(listing, list_clips(name, folder, "test"))
        except UserError as e:
            print(f"the training clips alone: {e}")
    first = np.unique(listing.files, return_index=True)[1]
    return listing if len(first) == len(listing) else listing.subset(np.sort(first))


def check_folder(folder):
    """UserError where there is no folder that can be read."""
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        reason = "there is no such folder"
        if folder.is_symlink():
            reason = f"is a link to {os.readlink(folder)}, which is not there"
    except NotADirectoryError:
        reason = "is a file; give the folder that holds the clips"
    except (OSError, ValueError) as e:
        reason = f"cannot be read ({getattr(e, 'strerror', None) or e})"
    else:
        return
    raise UserError(f"--data-dir {folder}: {reason}")


def read_coding(args):
    """How --prepare writes the clips, by its flags."""
    how = Coding(args.side, args.fps, args.gop, args.sample_rate, args.shards)
    if args.prepare is None and how != Coding():
        raise UserError("--side, --fps, --gop, --sample-rate and --shards are for --prepare; give --prepare "
                        "OUT as well")
    if args.prepare is not None and (args.check or args.stats):
        raise UserError("--prepare, --check and --stats are commands of their own; give --prepare alone")
    check_range("--side", how.side, 16, 4096)
    check_range("--fps", 1 if how.fps is None else how.fps, 1, 240)
    check_range("--gop", how.gop, 1, 1000)
    check_range("--sample-rate", how.sample_rate, 1000, 192000)
    check_range("--shards", how.shards, 0, 100000)
    return how


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="toy", help=", ".join(SETS))
    add("--data-dir", help="folder with the clips and the csv files (toys: where to write them)")
    add("--split", choices=("train", "test"), default="train")
    add("--check", action="store_true", help="decode a part of each clip: what is missing, unreadable, long")
    add("--stats", action="store_true", help="mean and std of the mel in dB, for --mel-mean and --mel-std")
    add("--clips", type=int, default=2000, help="clips that --stats reads at most")
    add("--seconds", type=float, default=Inputs.seconds, help="length of the windows of --stats")
    add("--mels", type=int, default=Inputs.n_mels, help="mel bins of --stats")
    add("--hop", type=int, default=Inputs.hop, help="samples between two mel frames of --stats")
    add("--prepare", metavar="OUT", help="write all clips anew into this folder, quick to read")
    add("--side", type=int, default=Coding.side, help="short side of --prepare's pictures, at most")
    add("--fps", type=float, help="frames a second of --prepare, at most; by default as the clip has")
    add("--gop", type=int, default=Coding.gop, help="frames of --prepare from key frame to key frame")
    add("--sample-rate", type=int, default=Coding.sample_rate, help="Hz of --prepare's sound")
    add("--shards", type=int, default=0, help="tars of --prepare (WebDataset); 0: files")
    add("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    check_range("--workers", args.workers, 0, 1024)
    check_range("--mels", args.mels, 1, 4096)
    check_range("--hop", args.hop, 1, 10 ** 6)
    check_range("--seconds", args.seconds, 0.1, 3600)
    check_range("--clips", args.clips, 1, 10 ** 9)
    how = read_coding(args)
    if args.prepare is not None:
        prepare(list_all(args.data, args.data_dir), SETS[args.data].lists, args.prepare, how, args.workers)
        return
    listing = list_clips(args.data, args.data_dir, args.split)
    if args.check:
        check(listing, args.workers)
    if args.stats:
        inputs = Inputs(seconds=args.seconds, n_mels=args.mels, hop=args.hop)
        means, stds = mel_stats(listing, inputs, args.workers, args.clips)
        mean = means.mean()                                     # over all bins
        square = (stds ** 2 + means ** 2).mean()
        print(f"--mel-mean {mean:.3f} --mel-std {square.sub(mean ** 2).sqrt():.3f}")
    if not (args.check or args.stats):
        print(describe(listing))


if __name__ == "__main__":
    main_guard(main)
