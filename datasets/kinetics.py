"""Kinetics-400: the official csv files, lists of paths and labels as V-JEPA's code takes them, or class
folders."""
import csv
import os
from pathlib import Path

from common import UserError
from datasets.files import Files, bare, by_path, few
from datasets.files import find_by_name_or_id, is_media, plural, scan, without_ending
from datasets.listing import list_found, number_of, read_columns, read_lines, whole

# Of a split's list or folder; the first that is there counts.
NAMES = {"train": ["train"], "test": ["val", "validate", "validation"]}
LISTS = ("train.csv", "train.txt", "val*.csv", "val*.txt", "classes.txt")
KINETICS_LISTS = (*LISTS, *[f"annotations/{name}" for name in LISTS])
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def list_kinetics(folder, split):
    """train, and as test the validation clips: by lists of either form, or without any by class folders below
    train/ and val/."""
    lists = find_lists(folder)
    if not lists:
        return list_class_folders(folder, split)
    if split not in lists:
        there = next(iter(lists.values()))
        wanted = there.parent / f"{NAMES[split][0]}{there.suffix}"
        part = "training" if split == "train" else "validation"
        raise UserError(f"{wanted}: there is no such file; put the list of the {part} clips beside "
                        f"{there.name}")
    read = {part: read_list(path) for part, path in lists.items()}
    labels = set()
    for _, rows in read.values():
        labels.update(label for _, label in rows)
    classes, number = number_labels(folder, labels, lists[split])
    official, rows = read[split]
    find = find_clips if official else find_paths
    files, chosen = find(folder, [clip for clip, _ in rows])
    found = [(file, [number[label]]) for file, (_, label) in zip(chosen, rows)]
    return list_found(files, found, classes)


def find_lists(folder):
    """{split: path of its list}, of the splits that have one."""
    lists = {}
    for split, names in NAMES.items():
        for path in candidates(folder, names, (".csv", ".txt")):
            if os.path.exists(path):
                lists.setdefault(split, path)
    return lists


def candidates(folder, names, endings):
    """The paths where a list may lie, the first choice first."""
    paths = []
    for place in (folder, folder / "annotations"):
        for name in names:
            paths += [place / f"{name}{ending}" for ending in endings]
    return paths


def read_list(path):
    """A list of either form: (is it the official csv, [(<id>_<start>_<end>, or a path, and the label)])."""
    lines = read_lines(path)
    header = next(csv.reader(lines[:1], skipinitialspace=True))
    if set(COLUMNS) & set(header):
        return True, read_official(path)
    rows = []
    for line in lines:
        row = [part.strip('"') for part in line.rsplit(None, 1)]    # quotes: pandas puts them around spaces
        if [is_media(part) for part in row] != [True, False]:
            raise UserError(f"{path}: neither begins with a header that names {', '.join(COLUMNS)}, "
                            "nor is each row the path of a clip and a label without spaces, with a space "
                            "between them; give a list of one of the two forms")
        rows.append(row)
    return False, rows


def read_official(path):
    rows = read_columns(path, *COLUMNS)
    if not rows:
        raise UserError(f"{path}: the csv holds nothing but its header; take the data set's own csv")
    out = []
    try:
        for label, clip, *times in rows:
            start, end = (float(time) for time in times)
            if not (0 <= start < 10 ** 6 and 0 <= end < 10 ** 6):
                raise ValueError
            out.append((f"{clip}_{round(start):06d}_{round(end):06d}", label))
    except ValueError:
        raise UserError(f"{path}: a time is not a number of seconds; take the data set's own csv") from None
    return out


def number_labels(folder, labels, path):
    """(classes, {label: its index}). Whole numbers are from 0 the lines of classes.txt, if it is there."""
    numbers = {label: whole(label) for label in labels}
    if set(numbers.values()) == {None}:
        classes = sorted(labels)
        return classes, number_of(classes)
    if None in numbers.values():
        raise UserError(f"{path}: some labels are whole numbers and others are not; "
                        "give all of both lists in the same form")
    for names in candidates(folder, ["classes"], [".txt"]):
        if os.path.exists(names):
            return read_classes(names, max(numbers.values())), numbers
    classes = sorted(set(numbers.values()))
    place = number_of(classes)
    return [str(c) for c in classes], {label: place[c] for label, c in numbers.items()}


def read_classes(path, highest):
    classes = [line.strip() for line in read_lines(path)]
    if highest >= len(classes):
        raise UserError(f"{path}: has {len(classes):,} names, but the lists hold the label {highest}; "
                        "give one name a line, the first for the label 0")
    return classes


def find_clips(folder, names):
    """(the Files there, the one of each name, or None)"""
    files = scan(folder)
    # Of one name the last counts: the folder "replacement" holds whole copies of broken clips.
    files.sort(key=lambda file: "replacement" in Path(file).parts)
    return files, find_by_name_or_id(files, names)


def find_paths(folder, paths):
    """(the Files there, the one of each path, or None): of just this path, else of it with one more ending,
    else with another one. a.avi may have become a.mp4, and beside another a.mp4 it has become a.avi.mp4."""
    paths = [os.path.normpath(path) for path in paths]
    relative = [path for path in paths if not os.path.isabs(path)]
    files = scan(folder) if relative else Files(folder)
    there = {file: file for file in files}
    longer = {without_ending(file): file for file in files}
    others = by_path(files)
    found = []
    for path in paths:
        if os.path.isabs(path):
            found.append(path if os.path.isfile(path) else None)
        else:
            found.append(there.get(path) or longer.get(path) or others.get(bare(path)))
    return files, found


def list_class_folders(folder, split):
    """Without lists: <split>/<class>/<file>, where the test's folder is the first of its names that is
    there, in any case."""
    files = scan(folder)
    tops = {}
    for name in sorted({Path(file).parts[0] for file in files}):
        tops.setdefault(name.lower(), name)
    there = [tops[name] for name in (*NAMES["test"], "test") if name in tops]
    parts = {"train": tops.get("train"), "test": there[0] if there else None}
    classes = set()
    rows = []                                                   # (file, class) of the split
    loose = []
    for file in files:
        top, *below = Path(file).parts
        if top not in parts.values():
            continue
        if len(below) > 1:
            classes.add(below[0])
        if top == parts[split] and len(below) > 1:
            rows.append((file, below[0]))
        elif top == parts[split]:
            loose.append(file)
    if not classes:
        raise UserError(f"{folder}: has neither lists (train.csv and val.csv, here or in annotations/) "
                        "nor class folders below train/ and val/; put the one or the other there")
    notes = files.trouble()
    if loose:
        notes += (f"left out: {plural(loose, 'clip')} without a class folder: {few(loose)}",)
    classes = sorted(classes)
    number = number_of(classes)
    return list_found(files, [(file, [number[c]]) for file, c in rows], classes, notes=notes)
