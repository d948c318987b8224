"""Something-Something v2, whose clips have no sound."""
import json
import os

from common import UserError
from datasets.files import by_name, scan
from datasets.listing import list_found

LISTS = ("*labels.json", "*train.json", "*validation.json")
SSV2_LISTS = (*LISTS, *[f"labels/{name}" for name in LISTS])


def list_ssv2(folder, split):
    """A clip's template without its brackets is its class. test: the validation clips, since the test list
    has no labels."""
    labels_json, labels = read_json(folder, "labels")
    path, entries = read_json(folder, "train" if split == "train" else "validation")
    number = read_numbers(labels_json, labels)
    rows = []                                                   # (id, template)
    try:
        for entry in entries:
            template = entry["template"].replace("[", "").replace("]", "")
            rows.append((str(entry["id"]), template))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: is not a list of entries with an id and a template; "
                        "take the data set's own list") from None
    for _, template in rows:
        if template not in number:
            raise UserError(f"{path}: unknown template {template!r}; {labels_json.name} does not list it")
    files = scan(folder)
    index = by_name(files)
    found = [(index.get(clip), [number[template]]) for clip, template in rows]
    return list_found(files, found, sorted(number, key=number.get))


def read_numbers(path, labels):
    """{template: number}, from 0 on."""
    try:
        number = {template: int(n) for template, n in labels.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        number = {}
    if not number or sorted(number.values()) != list(range(len(number))):
        raise UserError(f"{path}: does not give each template a number of its own, from 0 on; "
                        "take the data set's own list")
    return number


def read_json(folder, part):
    """(path, content) of a list, by its older or its newer name, in the folder or in labels/."""
    paths = []
    for place in (folder, folder / "labels"):
        paths += [place / f"something-something-v2-{part}.json", place / f"{part}.json"]
    path = next((p for p in paths if os.path.exists(p)), None)
    if path is None:
        raise UserError(f"{paths[0]}: there is no such file; put the data set's list there, "
                        f"or as {part}.json into labels/")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as json ({e}); take the data set's own list") from None
    if not content:
        raise UserError(f"{path}: the list is empty; take the data set's own list")
    return path, content
