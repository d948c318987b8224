"""VGGSound, by its official vggsound.csv, or by train.csv and test.csv of some mirrors."""
import os

from common import UserError
from datasets.files import bare, find_by_name_or_id, scan
from datasets.listing import list_found, number_of, read_rows, whole


def list_vggsound(folder, split):
    if os.path.exists(folder / "vggsound.csv"):
        parts = read_official(folder / "vggsound.csv")
    else:
        parts = read_two_lists(folder)
    labels = set()
    for part in parts.values():
        labels.update(label for _, label in part)
    classes = sorted(labels)
    number = number_of(classes)
    rows = parts.get(split, [])
    files = scan(folder)
    chosen = find_by_name_or_id(files, [name for name, _ in rows])
    found = [(file, [number[label]]) for file, (_, label) in zip(chosen, rows)]
    return list_found(files, found, classes)


def read_official(path):
    """{split: [(<id>_<start>, label)]} of id, start, label, split."""
    rows = read_rows(path)
    if rows[0][1:2] == ["start"]:                               # the list has no header, but some copies do
        rows = rows[1:]
    parts = {}
    for row in rows:
        if len(row) != 4 or whole(row[1]) is None:
            raise UserError(f"{path}: a row does not have the four fields "
                            "id, start (whole seconds), label, split")
        clip, start, label, split = row
        parts.setdefault(split.strip(), []).append((f"{clip}_{whole(start):06d}", label))
    return parts


def read_two_lists(folder):
    """{split: [(name without its ending, label)]} of file, label."""
    parts = {split: read_rows(folder / f"{split}.csv") for split in ("train", "test")}
    out = {}
    for split, rows in parts.items():
        if any(len(row) != 2 for row in rows):
            raise UserError(f"{folder}: a row of train.csv or test.csv does not have the two fields "
                            "file, label")
        out[split] = [(bare(file), label) for file, label in rows]
    return out
