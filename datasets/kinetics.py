"""Kinetics-400: the official csv files, lists of paths and labels as V-JEPA's code takes them, or class
folders."""
import csv
import os
from pathlib import Path

from common import UserError
from datasets.listing import find_by_name_or_id, is_media, list_found, number_of
from datasets.listing import read_columns, read_lines, scan

# Of a split's list or folder; the first that is there counts.
NAMES = {"train": ["train"], "test": ["val", "validate", "validation"]}
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
    files = find(folder, [clip for clip, _ in rows])
    found = [(file, [number[label]]) for file, (_, label) in zip(files, rows)]
    return list_found(folder, found, classes)


def find_lists(folder):
    """{split: path of its list}, of the splits that have one."""
    lists = {}
    for split, names in NAMES.items():
        for path in candidates(folder, names, (".csv", ".txt")):
            if path.is_file():
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
        for label, clip, start, end in rows:
            out.append((f"{clip}_{round(float(start)):06d}_{round(float(end)):06d}", label))
    except (ValueError, OverflowError):
        raise UserError(f"{path}: a time is not a number of seconds; take the data set's own csv") from None
    return out


def number_labels(folder, labels, path):
    """(classes, {label: its index}). Whole numbers are from 0 the lines of classes.txt, if it is there."""
    whole = [label for label in labels if label.isdecimal()]
    if not whole:
        classes = sorted(labels)
        return classes, number_of(classes)
    if len(whole) < len(labels):
        raise UserError(f"{path}: some labels are whole numbers and others are not; "
                        "give all of both lists in the same form")
    numbers = {label: int(label) for label in labels}
    for names in candidates(folder, ["classes"], [".txt"]):
        if names.is_file():
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
    files = scan(folder)
    # Of one name the last counts: the folder "replacement" holds whole copies of broken clips.
    files.sort(key=lambda file: "replacement" in Path(file).parts)
    return find_by_name_or_id(files, names)


def find_paths(folder, paths):
    paths = [os.path.normpath(path) for path in paths]
    relative = [path for path in paths if not os.path.isabs(path)]
    files = set(scan(folder)) if relative else set()
    found = []
    for path in paths:
        there = os.path.isfile(path) if os.path.isabs(path) else path in files
        found.append(path if there else None)
    return found


def list_class_folders(folder, split):
    """Without lists: <split>/<class>/<file>, where the test's folder is the first of its names that is
    there."""
    test = None
    for name in (*NAMES["test"], "test"):
        if test is None and (folder / name).is_dir():
            test = name
    part = "train" if split == "train" else test
    classes = set()
    rows = []                                                   # (file, class) of the split
    loose = 0
    for file in scan(folder):
        top, *below = Path(file).parts
        if top not in ("train", test):
            continue
        if len(below) > 1:
            classes.add(below[0])
        if top == part and len(below) > 1:
            rows.append((file, below[0]))
        elif top == part:
            loose += 1
    if not classes:
        raise UserError(f"{folder}: has neither lists (train.csv and val.csv, here or in annotations/) "
                        "nor class folders below train/ and val/; put the one or the other there")
    if loose:
        print(f"{folder / part}: {loose:,} files beside the class folders have no label and are left out")
    classes = sorted(classes)
    number = number_of(classes)
    return list_found(folder, [(file, [number[c]]) for file, c in rows], classes)
