"""AudioSet, by its official csv files: <part>_segments.csv and class_labels_indices.csv beside the clips."""
from common import UserError
from datasets.listing import by_id, list_found, read_rows, scan


def list_audioset(folder, split, parts):
    """parts: of the training clips, "unbalanced_train" (AS-2M) and "balanced_train" (AS-20K)."""
    try:
        classes = {}                                            # mid: (index, name)
        for row in read_rows(folder / "class_labels_indices.csv")[1:]:
            classes[row[1]] = (int(row[0]), row[2])
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
                        "class_labels_indices.csv does not list it") from None
    files = by_id(scan(folder))
    found = [(files.get(clip), labels) for clip, labels in rows]
    return list_found(folder, found, [name for _, name in classes.values()], multilabel=True)
