"""Any folder of clips."""
import hashlib
import os
from pathlib import Path

from datasets.listing import list_found, make_listing, number_of, scan

SPLITS = ("train", "test")


def list_folder(folder, split):
    """Sub-folders are the labels; train/ and test/ above them are the splits, otherwise one clip in five, by
    a hash of its name, is held out for the test. Without sub-folders there are no labels, and all clips are
    in both splits. 'all' takes each file, and has labels where each has one."""
    rows = [(file, Path(file).parts) for file in scan(folder)]
    if rows and all(parts[0] in SPLITS for _, parts in rows):
        classes = classes_below(folder)
        rows = [(file, parts[1:]) for file, parts in rows if split in (parts[0], "all")]
    else:
        classes = sorted({parts[0] for _, parts in rows if len(parts) > 1})
        if classes and split != "all":
            rows = [(file, parts) for file, parts in rows if split_by_hash(file) == split]
    number = number_of(classes)
    labelled = [(file, [number[parts[0]]]) for file, parts in rows if len(parts) > 1]
    loose = len(rows) - len(labelled)
    if not classes or split == "all" and loose:
        return make_listing("", folder, [file for file, _ in rows], None, [])
    if loose:
        print(f"{folder}: {loose:,} files beside the sub-folders have no label and are left out")
    return list_found(folder, labelled, classes)


def classes_below(folder):
    """The folders below train/ and test/."""
    names = set()
    for split in SPLITS:
        names.update(path.name for path in (folder / split).glob("*") if path.is_dir())
    return sorted(names)


def split_by_hash(file):
    """A new clip moves no other one to the other side."""
    held_out = hashlib.sha256(os.fsencode(file)).digest()[0] % 5 == 0
    return "test" if held_out else "train"
