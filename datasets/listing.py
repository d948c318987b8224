"""A listing: the clips of a split with their labels; and how a set's files and csv lists are found and
read."""
import csv
import os
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from common import UserError

# The endings that FFmpeg reads: of pictures, and of sound alone.
MEDIA = set(
    ".mp4 .m4v .mov .qt .mkv .mk3d .webm .avi .divx .wmv .asf .flv .f4v .mpg .mpeg .mpe .mpv .m1v .m2v .m2p "
    ".vob .evo .ts .mts .m2ts .m2t .tp .trp .tod .3gp .3g2 .ogv .ogm .mxf .gxf .dv .nut .rm .rmvb .wtv .mj2 "
    ".mjpg .mjpeg .amv .nsv .ivf .y4m .h264 .264 .h265 .265 .hevc "
    ".wav .wave .w64 .rf64 .bwf .flac .mp3 .mp2 .mp1 .mpa .m4a .m4b .m4r .aac .adts .ogg .oga .opus .spx "
    ".wma .aif .aiff .aifc .caf .mka .weba .amr .awb .3ga .ac3 .eac3 .ec3 .dts .au .snd .ape .tta .tak .wv "
    ".mpc .shn .dsf .dff .ra .oma .gsm .voc .sph .qoa".split())
# Names, in small letters, of what a system puts beside the files; and all that begin with a dot.
JUNK = {"__macosx", "@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found",
        "lost.dir", "found.000", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "network trash folder",
        "temporary items", "__pycache__"}


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
                            fold=fold, held=held, seconds=self.seconds, notes=self.notes)


def make_listing(name, root, files, labels, classes, multilabel=False, missing=0, **more):
    """Pack lists into a Listing; labels: one sequence of class indices for each file, or None; more: fold,
    held, seconds, notes."""
    flat = None
    offsets = None
    if labels is not None:
        flat = np.array(list(chain.from_iterable(labels)), np.int32)
        offsets = np.cumsum([0] + [len(row) for row in labels])
    files = np.array([os.fsencode(f) for f in files], dtype=np.bytes_)
    return Listing(name, str(root), files, flat, offsets, list(classes), multilabel, missing, **more)


def list_found(folder, rows, classes, multilabel=False, missing=0, fold=None, held=None, notes=()):
    """The Listing of a family's rows: (file, class indices), the file None where it is not on disk: that row
    is left out and counts as missing. fold, held: one value for each row. notes: of Files.trouble, where a
    list says what belongs to the set. data.list_clips adds what data.SETS says of it."""
    there = [n for n, (file, _) in enumerate(rows) if file is not None]
    files = [rows[n][0] for n in there]
    labels = [rows[n][1] for n in there]
    if fold is not None:
        fold = np.array([fold[n] for n in there], np.int8)
    if held is not None:
        held = np.array([held[n] for n in there], bool)
    missing += len(rows) - len(there)
    return make_listing("", folder, files, labels, classes, multilabel, missing,
                        fold=fold, held=held, notes=notes)


def join(a, b):
    """Two splits as one listing."""
    labels = None
    if a.labels is not None:
        labels = [a.clip_labels(i) for i in range(len(a))]
        labels += [b.clip_labels(i) for i in range(len(b))]
    notes = tuple(dict.fromkeys(a.notes + b.notes))
    return make_listing(a.name, a.root, [*a.files, *b.files], labels, a.classes, a.multilabel,
                        a.missing + b.missing, seconds=a.seconds, notes=notes)


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


def few(names, most=3):
    """The first of the names, each quoted on one line, and how many more there are."""
    shown = []
    for name in names[:most]:
        shown.append(repr(name if len(name) <= 40 else f"{name[:20]}...{name[-17:]}"))
    text = ", ".join(shown)
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more"


def plural(names, word):
    """How many of what."""
    return f"{len(names):,} {word}{'' if len(names) == 1 else 's'}"


def printable(text):
    """What a terminal can show of a message with file names in it, which hold any bytes but / and 0."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------

class Files(list):
    """The media files below a folder, as sorted relative paths, and the paths of what else was met."""
    def __init__(self):
        self.links = set()          # of the media files, those that are links
        self.junk = []              # hidden or a system's own; a folder of this kind is not entered
        self.endings = Counter()    # how many files of each other ending
        self.broken = []            # links to nothing; pipes and devices
        self.again = []             # links to folders that are taken already, or that hold this one
        self.unreadable = []        # folders

    def trouble(self):
        """What may hold clips and could not be looked at: at most one short text."""
        if not self.unreadable:
            return ()
        return (f"{plural(self.unreadable, 'folder')} not readable: {few(self.unreadable)}",)

    def left_out(self):
        """Short texts: what else is no clip."""
        out = []
        if self.endings:
            ordered = sorted(self.endings, key=lambda ending: (-self.endings[ending], ending))
            counts = [f"{self.endings[ending]:,} {ending}" for ending in ordered[:5]]
            if len(ordered) > 5:
                counts.append(f"{sum(self.endings[ending] for ending in ordered[5:]):,} of other endings")
            out.append(", ".join(counts))
        if self.junk:
            out.append(f"{plural(self.junk, 'hidden or system name')}: {few(self.junk)}")
        if self.broken:
            out.append(f"{len(self.broken):,} broken or no file: {few(self.broken)}")
        if self.again:
            out.append(f"{plural(self.again, 'link')} to a folder that is here already: {few(self.again)}")
        return out


def scan(folder):
    """The Files below a folder, sorted so that the order is the same on each machine.

    Links to folders are followed, but each folder is entered once, by its own path rather than by a link, and
    none that holds `folder` itself: a link adds no clip that is there already, and none ends in a circle."""
    files = Files()
    entered = above(folder)
    folders = deque([""])
    links = deque()                                             # to folders: they wait for the others
    while folders or links:
        place = (folders or links).popleft()
        for entry in enter(files, folder, place, entered):
            path = os.path.join(place, entry.name)
            kind = sort_out(files, path, entry)
            if kind == "folder":
                folders.append(path)
            elif kind == "link":
                links.append(path)
    for paths in (files, files.junk, files.broken, files.again, files.unreadable):
        paths.sort()
    return files


def above(folder):
    """The identities of the folders that hold a folder, itself left out."""
    out = set()
    path = os.path.realpath(folder)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.path.isdir(path):
            out.add(identity(path))
    return out


def enter(files, folder, place, entered):
    """What lies in a folder, sorted by name: nothing where it was entered before, or cannot be read."""
    path = os.path.join(folder, place)
    try:
        found = identity(path)
        if found in entered:
            files.again.append(place)
            return []
        entered.add(found)
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        files.unreadable.append(place or os.path.basename(folder))
        return []


def identity(folder):
    """The same for one folder by whatever path."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def sort_out(files, path, entry):
    """Enter what lies at a path into `files`; "folder", or "link" to one, where there is more to look at."""
    try:
        is_folder = entry.is_dir()
        is_file = entry.is_file()
    except OSError:                                             # a link that leads to itself
        is_folder = False
        is_file = False
    ending = os.path.splitext(entry.name)[1].lower()
    if is_junk(entry.name):
        files.junk.append(path)
    elif is_folder:
        return "link" if entry.is_symlink() else "folder"
    elif not is_file:
        files.broken.append(path)
    elif ending in MEDIA:
        files.append(path)
        if entry.is_symlink():
            files.links.add(path)
    else:
        files.endings[ending if re.fullmatch(r"\.[\w~-]{1,12}", ending) else "without an ending"] += 1
    return None


def is_junk(name):
    return name.startswith((".", "~$")) or name.casefold() in JUNK


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
