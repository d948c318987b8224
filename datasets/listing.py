"""A listing: the clips of a split with their labels; and how a set's files and csv lists are found and
read."""
import csv
import os
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from common import UserError

MEDIA = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv", ".ts",
         ".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma", ".aif", ".aiff"}


@dataclass
class Listing:
    """The clips of a split: paths relative to root as one numpy bytes array (two million strings would be
    copied by each data worker), labels as one flat array with offsets, since a clip may have none, one or
    several."""
    name: str
    root: str
    files: np.ndarray
    labels: np.ndarray | None = None        # flat, int16
    offsets: np.ndarray | None = None       # (N + 1,)
    classes: list = field(default_factory=list)
    multilabel: bool = False
    missing: int = 0                        # listed in the csv, not on disk
    fold: np.ndarray | None = None  # (N,) int8: the set is tested fold by fold, each clip is in both splits
    held: np.ndarray | None = None          # (N,) bool: the official validation clips of a training split
    seconds: float | None = None            # length that no clip exceeds, where the set fixes it

    def __len__(self):
        return len(self.files)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def clip_labels(self, i):
        """The class indices of clip i."""
        return self.labels[self.offsets[i]:self.offsets[i + 1]]

    def targets(self, indices):
        """(N,) class indices, or (N, C) zeros and ones for a multi-label set."""
        if not self.multilabel:
            first = self.offsets[np.asarray(indices)]
            return torch.from_numpy(self.labels[first].astype(np.int64))
        out = torch.zeros(len(indices), len(self.classes), dtype=torch.uint8)   # AudioSet-2M in float: 4 GB
        for row, i in enumerate(indices):
            out[row, self.clip_labels(int(i)).astype(np.int64)] = 1
        return out

    def subset(self, indices):
        """The clips of these indices, in their order."""
        chosen = np.asarray(indices, int)
        files = [self.files[i] for i in chosen]
        labels = None if self.labels is None else [self.clip_labels(i) for i in chosen]
        fold = None if self.fold is None else self.fold[chosen]
        held = None if self.held is None else self.held[chosen]
        return make_listing(self.name, self.root, files, labels, self.classes, self.multilabel,
                            fold=fold, held=held, seconds=self.seconds)


def make_listing(name, root, files, labels, classes, multilabel=False, missing=0, **more):
    """Pack lists into a Listing; labels: one sequence of class indices for each file, or None; more: fold,
    held, seconds."""
    flat = None
    offsets = None
    if labels is not None:
        flat = np.array(list(chain.from_iterable(labels)), np.int16)
        offsets = np.cumsum([0] + [len(row) for row in labels])
    files = np.array([os.fsencode(f) for f in files], dtype=np.bytes_)
    return Listing(name, str(root), files, flat, offsets, list(classes), multilabel, missing, **more)


def list_found(folder, rows, classes, multilabel=False, missing=0, fold=None, held=None):
    """The Listing of a family's rows: (file, class indices), the file None where it is not on disk: that row
    is left out and counts as missing. fold, held: one value for each row. data.list_clips adds what data.SETS
    says of the set."""
    there = [n for n, (file, _) in enumerate(rows) if file is not None]
    files = [rows[n][0] for n in there]
    labels = [rows[n][1] for n in there]
    if fold is not None:
        fold = np.array([fold[n] for n in there], np.int8)
    if held is not None:
        held = np.array([held[n] for n in there], bool)
    missing += len(rows) - len(there)
    return make_listing("", folder, files, labels, classes, multilabel, missing, fold=fold, held=held)


def join(a, b):
    """Two splits as one listing."""
    labels = None
    if a.labels is not None:
        labels = [a.clip_labels(i) for i in range(len(a))]
        labels += [b.clip_labels(i) for i in range(len(b))]
    return make_listing(a.name, a.root, [*a.files, *b.files], labels, a.classes, a.multilabel,
                        a.missing + b.missing, seconds=a.seconds)


def describe(listing):
    """One line: how many clips, how many are missing, how many classes."""
    text = f"{listing.name}: {len(listing):,} clips found"
    if listing.missing:
        text += f", {listing.missing:,} listed but missing"
    if listing.classes:
        text += f", {len(listing.classes)} classes"
    return text


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

def scan(folder):
    """All media files below a folder, as relative paths, sorted so that the order is the same on each
    machine."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for file in files:
            if is_media(file):
                found.append(os.path.relpath(os.path.join(base, file), folder))
    return sorted(found)


def is_media(file):
    return os.path.splitext(file)[1].lower() in MEDIA


def without_ending(file):
    return os.path.splitext(file)[0]


def name_of(file):
    """The file's name without its folder and its ending."""
    return without_ending(os.path.basename(file))


def by_path(files):
    """Path without its ending -> file: a set's .wav files may have been packed as .flac."""
    return {without_ending(file): file for file in files}


def by_name(files):
    """The file's name without its ending -> file, whatever folder it lies in."""
    return {name_of(file): file for file in files}


def by_id(files):
    """YouTube id -> file, for <id>.flac, <id>_40.000.mp4, <id>_<start>_<end>.mp4 and Y<id>.wav. An id has 11
    characters, and may itself begin with Y or hold underscores: a name that can be read in two ways is
    entered under both."""
    index = {}
    for file in files:
        name = name_of(file)
        if len(name) >= 12 and name[0] == "Y" and (len(name) == 12 or name[12] == "_"):
            index.setdefault(name[1:12], file)
        if len(name) == 11 or name[11:12] == "_":
            index[name[:11]] = file
    return index


def find_by_name_or_id(files, names):
    """For each of the names <id>_<start>...: the file of just this name, else that of its id, else None."""
    exact = by_name(files)
    index = by_id(files)
    found = []
    for name in names:
        found.append(exact[name] if name in exact else index.get(name[:11]))
    return found


# ------------------------------------------------------------------------------------------------------------
# Lists
# ------------------------------------------------------------------------------------------------------------

def read_rows(path, **form):
    """Rows of a csv (form: of csv.reader), without the comments and the empty ones. UserError where there are
    none."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; put the data set's list there")
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            for row in csv.reader(f, skipinitialspace=True, **form):
                if row and not row[0].startswith("#"):
                    rows.append(row)
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise UserError(f"{path}: cannot be read as a csv in UTF-8 ({e})") from None
    if not rows:
        raise UserError(f"{path}: the list is empty")
    return rows


def read_lines(path):
    """As read_rows, but each line is one string, whatever is in it."""
    return [row[0] for row in read_rows(path, delimiter="\x1f", quoting=csv.QUOTE_NONE)]


def read_columns(path, *names):
    """The named columns of a csv with a header, as a list of tuples."""
    header, *rows = read_rows(path)
    out = []
    try:
        places = [header.index(name) for name in names]
        for row in rows:
            out.append(tuple(row[place] for place in places))
    except (ValueError, IndexError):
        raise UserError(f"{path}: its header or a row lacks one of the columns {', '.join(names)}; "
                        "take the data set's own csv") from None
    return out


def number_of(classes):
    """Class -> its index."""
    return {c: i for i, c in enumerate(classes)}
