"""Any folder of clips."""
import hashlib
import os
import re
from typing import NamedTuple

from datasets.files import bare, few, plural, scan
from datasets.listing import list_found, number_of

PARTS = {"train": ("train", "training"),
         "val": ("val", "valid", "validation", "validate", "eval", "evaluation", "dev"),
         "test": ("test", "testing")}
PURPOSE = {"train": "for training", "val": "for validation", "test": "for the test"}


class Row(NamedTuple):
    """A clip of the folder."""
    file: str
    part: str | None                # a key of PARTS; None: in none of them
    label: str | None               # its class; None: it has none


def list_folder(folder, split):
    """train/, val/ and test/ are the splits, by any of their names and in any case, and the folders in them
    the classes; where there is no such folder, the sub-folders are the classes, and one clip in five, by a
    hash of its path without its ending, is held out for the test. One folder around all of these is looked
    through. Without sub-folders there are no labels, and all clips are in each split. The validation clips
    are the held-out ones of the training split, or the test where that is missing. 'all' takes each clip, and
    has labels where each has one."""
    files = scan(folder)
    kept, copies = without_copies(files)
    around = find_around(kept)
    paths = [file[len(around):] for file in kept]               # below the folder around them
    splits = find_splits(paths)
    rows = read_splits(paths, splits) if splits else read_classes(paths)
    rows = [row._replace(file=around + row.file) for row in rows]
    classes = sorted({row.label for row in rows} - {None})
    chosen = choose(rows, split, splits, classes)
    labelled = [row for row in chosen if row.label is not None]
    if split == "test":
        has_labels = bool(classes)
    else:
        has_labels = bool(labelled) and (split == "train" or len(labelled) == len(chosen))

    left_out = []
    if len(chosen) < len(rows):
        left_out += name_strays(rows, splits, around)
    if has_labels and len(labelled) < len(chosen):
        loose = [row.file for row in chosen if row.label is None]
        left_out.append(f"{plural(loose, 'clip')} without a class folder: {few(loose)}")
    if copies:
        left_out.append(f"{plural(copies, 'link')} to a clip that is here already: {few(copies)}")
    left_out += files.left_out()
    notes = [name_layout(paths, splits, classes), *name_lacks(rows, splits, classes), *files.trouble()]
    if around:
        notes.insert(0, f"all in {around!r}")
    if classes and chosen and not has_labels:
        notes.append("no labels, since not all of these clips lie in class folders")
    if left_out:
        notes.append(f"left out: {', '.join(left_out)}")

    if not has_labels:
        return list_found(files, [(row.file, None) for row in chosen], [], notes=tuple(notes))
    number = number_of(classes)
    found = [(row.file, [number[row.label]]) for row in labelled]
    held = [row.part == "val" for row in labelled]
    return list_found(files, found, classes, held=held if any(held) else None, notes=tuple(notes))


def choose(rows, split, splits, classes):
    """The rows of a split."""
    if split == "all" or not splits and not classes:
        return rows
    if split == "test":
        return [row for row in rows if row.part == "test"]
    if splits and "train" not in splits.values():               # validation clips alone are no training split
        return []
    return [row for row in rows if row.part in ("train", "val")]


# ------------------------------------------------------------------------------------------------------------
# The layout
# ------------------------------------------------------------------------------------------------------------

def part_of(name):
    """The key of PARTS that a folder is called by, also as train_set, Test-data or val_256; or None."""
    stem = re.sub(r"[ _-]?(set|split|data|clips|videos|[0-9]+)$", "", name.casefold().strip())
    for part, names in PARTS.items():
        if stem in names:
            return part
    return None


def loose_part_of(name):
    """part_of any single word of the name, as in UCF_train or test-audio."""
    parts = {part_of(word) for word in re.split(r"[\W\d_]+", name)} - {None}
    return parts.pop() if len(parts) == 1 else None


def find_around(files):
    """The one folder, or one in the other, in which everything lies, with the separator behind it; "" where
    there is none: it holds nothing but folders, and its name is that of no split."""
    around = ""
    while files:
        places = [file[len(around):].split(os.sep) for file in files]
        top = places[0][0]
        if part_of(top) or any(place[0] != top or len(place) < 3 for place in places):
            break
        around += top + os.sep
    return around


def find_splits(files):
    """{top folder: its part} where the top folders are splits, else nothing. A class may be called `train`:
    so one of these names alone, beside other folders, is a split only where it holds folders and the others
    hold none; and two of them are where they hold folders, or the others are not more than they. Where all
    folders have such a word in their names (UCF_train, UCF_test), they are splits, too."""
    deep = {}                                                   # top folder: is a clip in a folder of it?
    for file in files:
        top, *below = file.split(os.sep)
        if below:
            deep[top] = deep.get(top, False) or len(below) > 1
    loose = {top: loose_part_of(top) for top in deep}
    all_loose = None not in loose.values() and len(set(loose.values())) > 1
    splits = {}
    for top in deep:
        part = loose[top] if all_loose else part_of(top)
        if part:
            splits[top] = part
    others = [top for top in deep if top not in splits]
    holds_folders = any(deep[top] for top in splits)
    if len(set(splits.values())) > 1:
        taken = holds_folders or len(others) <= len(splits)
    else:
        taken = not others or holds_folders and not any(deep[top] for top in others)
    if not taken:
        return {}
    if "test" not in splits.values():
        for top, part in splits.items():
            splits[top] = "test" if part == "val" else part
    return splits


def read_splits(files, splits):
    rows = []
    for file in files:
        top, *below = file.split(os.sep)
        part = splits.get(top) if below else None
        rows.append(Row(file, part, below[0] if part and len(below) > 1 else None))
    return rows


def read_classes(files):
    rows = []
    for file in files:
        top, *below = file.split(os.sep)
        rows.append(Row(file, split_by_hash(file), top) if below else Row(file, None, None))
    return rows


def split_by_hash(file):
    """A new clip moves no other one to the other side, and another ending not this one."""
    held_out = hashlib.sha256(os.fsencode(bare(file))).digest()[0] % 5 == 0
    return "test" if held_out else "train"


def without_copies(files):
    """(files, those left out): a link to a clip that is there already is no second clip."""
    there = set()
    if files.links:
        there = {files.place(file) for file in files if file not in files.links}
    kept = []
    copies = []
    for file in files:
        target = files.place(file) if file in files.links else None
        if target in there:
            copies.append(file)
        else:
            kept.append(file)
        if target:
            there.add(target)
    return kept, copies


# ------------------------------------------------------------------------------------------------------------
# What is said of it
# ------------------------------------------------------------------------------------------------------------

def name_layout(paths, splits, classes):
    """Which folders are classes and which are splits."""
    if not splits and not classes:
        return "no sub-folders, so no labels"
    if not splits:
        text = "sub-folders are classes, one clip in five is for the test"
        like = {f"{name}/" for name in classes if part_of(name)}
        like |= {inner_split(path) for path in paths} - {None}
        return f"{text}; taken for no splits: {few(sorted(like))}" if like else text
    said = []
    for part in PARTS:
        tops = [f"{top}/" for top in splits if splits[top] == part]
        if tops:
            said.append(f"{' and '.join(tops)} {PURPOSE[part]}")
    text = f"splits by folder: {', '.join(said)}"
    return text if classes else f"{text}; no class folders, so no labels"


def inner_split(file):
    """The folder in a class folder in which a clip lies, where that is called like a split."""
    parts = file.split(os.sep)
    return f"{parts[0]}/{parts[1]}/" if len(parts) > 2 and part_of(parts[1]) else None


def name_lacks(rows, splits, classes):
    """Which classes a split lacks that another one has."""
    out = []
    for part in PARTS:
        tops = [top for top in splits if splits[top] == part]
        has = {row.label for row in rows if row.part == part}
        lacks = [name for name in classes if name not in has]
        if tops and lacks:
            out.append(f"{tops[0]}/ lacks {len(lacks):,} of the classes: {few(lacks)}")
    return out


def name_strays(rows, splits, around):
    """What lies beside the splits, or beside the class folders."""
    strays = [row.file for row in rows if row.part is None]
    if not strays:
        return []
    names = []
    for file in strays:
        top, *below = file[len(around):].split(os.sep)
        names.append(f"{top}/" if below else top)
    beside = "splits" if splits else "sub-folders"
    return [f"{plural(strays, 'clip')} beside the {beside}: {few(list(dict.fromkeys(names)))}"]
