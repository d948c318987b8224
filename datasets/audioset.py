"""AudioSet, by its official csv files: <part>_segments.csv and class_labels_indices.csv beside the clips."""
from common import UserError
from datasets.files import by_id, scan
from datasets.listing import list_found, read_rows

LABELS = "class_labels_indices.csv"


def list_audioset(folder, split, parts):
    """parts: of the training clips, "unbalanced_train" (AS-2M) and "balanced_train" (AS-20K)."""
    try:
        classes = {}                                            # mid: (index, name)
        for row in read_rows(folder / LABELS)[1:]:
            classes[row[1]] = (int(row[0]), row[2])
        if sorted(number for number, _ in classes.values()) != list(range(len(classes))):
            raise UserError(f"{folder / LABELS}: does not give each class an index of its own, from 0 on; "
                            "take the data set's own csv")
        rows = []                                               # (YouTube id, class indices)
        for part in parts if split == "train" else ["eval"]:
            for row in read_rows(folder / f"{part}_segments.csv"):
                labels = [classes[mid][0] for mid in row[3].split(",")]
                rows.append((row[0], labels))
    except (IndexError, ValueError):
        raise UserError(f"{folder}: a row of the csv files is not of AudioSet's form "
                        '(id, start, end, "mid,mid")') from None
    except KeyError as e:
        raise UserError(f"{folder}: unknown class {e} in the segments csv; "
                        f"{LABELS} does not list it") from None
    files = scan(folder)
    index = by_id(files)
    found = [(index.get(clip), labels) for clip, labels in rows]
    names = [name for _, name in sorted(classes.values())]
    return list_found(files, found, names, multilabel=True)
