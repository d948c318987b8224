"""A listing: the clips of a split with their labels; and how a set's csv lists are read."""
import csv
import os
import re
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from common import UserError
from datasets import shards
from datasets.files import folder_of


@dataclass
class Listing:
    """The clips of a split: paths relative to root as one numpy bytes array (two million strings would be
    copied by each data worker), labels as one flat array with offsets, since a clip may have none, one or
    several."""
    name: str
    root: str
    files: np.ndarray
    labels: np.ndarray | None = None        # flat, int32
    offsets: np.ndarray | None = None       # (N + 1,)
    classes: list = field(default_factory=list)
    multilabel: bool = False
    missing: int = 0                        # listed in the csv, not on disk
    fold: np.ndarray | None = None  # (N,) int8: the set is tested fold by fold, each clip is in both splits
    held: np.ndarray | None = None          # (N,) bool: the official validation clips of a training split
    seconds: float | None = None            # length that no clip exceeds, where the set fixes it
    notes: tuple = ()                       # what the layout was, what was left out and why: see describe
    tars: tuple = ()                        # paths relative to root, of those in which clips lie
    places: np.ndarray | None = None        # (N, 3) int64: number of the tar, -1 for a file; offset, size

    def __len__(self):
        return len(self.files)

    def file(self, i):
        """The path of clip i relative to root: the same, whether it lies in a tar or not."""
        return os.fsdecode(bytes(self.files[i]))

    def path(self, i):
        """What open_clip takes for clip i."""
        file = self.file(i)
        if self.places is None or self.places[i, 0] < 0:
            return os.path.join(self.root, file)
        number, offset, size = self.places[i].tolist()
        tar = self.tars[number]
        return shards.address(os.path.join(self.root, tar), offset, size, file[len(folder_of(tar)):])

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
        places = None if self.places is None else self.places[chosen]
        return make_listing(self.name, self.root, files, labels, self.classes, self.multilabel,
                            fold=fold, held=held, seconds=self.seconds, notes=self.notes,
                            tars=self.tars, places=places)


def make_listing(name, root, files, labels, classes, multilabel=False, missing=0, **more):
    """Pack lists into a Listing; labels: one sequence of class indices for each file, or None; more: fold,
    held, seconds, notes, tars, places."""
    flat = None
    offsets = None
    if labels is not None:
        flat = np.array(list(chain.from_iterable(labels)), np.int32)
        offsets = np.cumsum([0] + [len(row) for row in labels])
    files = np.array([os.fsencode(f) for f in files], dtype=np.bytes_)
    return Listing(name, str(root), files, flat, offsets, list(classes), multilabel, missing, **more)


def list_found(files, rows, classes, multilabel=False, missing=0, fold=None, held=None, notes=None):
    """The Listing of a family's rows: (file, class indices), the file None where it is not on disk: that row
    is left out and counts as missing. files: the Files of `scan`, which know where each lies. Without classes
    there are no labels. fold, held: one value for each row. notes: by default files.trouble().
    data.list_clips adds what data.SETS says of it."""
    there = [n for n, (file, _) in enumerate(rows) if file is not None]
    found = [rows[n][0] for n in there]
    labels = [rows[n][1] for n in there] if classes else None
    if fold is not None:
        fold = np.array([fold[n] for n in there], np.int8)
    if held is not None:
        held = np.array([held[n] for n in there], bool)
    missing += len(rows) - len(there)
    places = None
    if files.inside:
        places = np.array([files.inside.get(file, (-1, 0, 0)) for file in found], np.int64).reshape(-1, 3)
    return make_listing("", files.folder, found, labels, classes, multilabel, missing, fold=fold, held=held,
                        notes=files.trouble() if notes is None else notes, tars=tuple(files.tars),
                        places=places)


def join(a, b):
    """Two splits as one listing."""
    labels = None
    if a.labels is not None:
        labels = [a.clip_labels(i) for i in range(len(a))]
        labels += [b.clip_labels(i) for i in range(len(b))]
    notes = tuple(dict.fromkeys(a.notes + b.notes))
    places = None
    if a.places is not None or b.places is not None:
        places = np.concatenate([places_of(a, 0), places_of(b, len(a.tars))])
    return make_listing(a.name, a.root, [*a.files, *b.files], labels, a.classes, a.multilabel,
                        a.missing + b.missing, seconds=a.seconds, notes=notes, tars=a.tars + b.tars,
                        places=places)


def places_of(listing, before):
    """The places of its clips, (N, 3), behind `before` tars of another listing."""
    if listing.places is None:
        return np.tile(np.int64([-1, 0, 0]), (len(listing), 1))
    places = listing.places.copy()
    places[places[:, 0] >= 0, 0] += before
    return places


def describe(listing):
    """One line: how many clips, how many are missing, how many classes, and the notes."""
    text = f"{listing.name}: {len(listing):,} clips found"
    if listing.missing:
        text += f", {listing.missing:,} listed but missing"
    if listing.classes:
        text += f", {len(listing.classes):,} classes"
    if listing.notes:
        text += f" ({'; '.join(listing.notes)})"
    return text


# ------------------------------------------------------------------------------------------------------------
# Lists
# ------------------------------------------------------------------------------------------------------------

def read_rows(path, **form):
    """Rows of a csv (form: of csv.reader), without the comments and the empty ones. UserError where there are
    none."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; put the data set's list there")
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file; put the data set's list there")
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.reader(f, skipinitialspace=True, **form)
            for row in reader:
                if re.search(r"[\0\r\n]", "".join(row)):
                    raise csv.Error(f"line {reader.line_num:,}: a zero byte, or a quote that is not closed")
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


def whole(text):
    """The whole number that a field of a list holds, or None: at most nine figures, and nothing but these."""
    text = text.strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        return None
    return int(text)
