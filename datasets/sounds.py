"""Sets of sound alone: ESC-50, Speech Commands, FSD50K."""
from common import UserError
from datasets.files import bare, by_path, scan
from datasets.listing import list_found, number_of, read_columns, read_rows, whole


def list_esc50(folder, split):
    """All 2,000 clips, whatever the split: the set is tested fold by fold."""
    path = folder / "meta" / "esc50.csv"
    rows = read_columns(path, "filename", "fold", "target", "category")
    categories = {}                                             # target: category
    for _, fold, target, category in rows:
        if whole(target) is None or whole(fold) is None or whole(fold) >= 100:
            raise UserError(f"{path}: a fold or target is not a whole number; take the data set's own csv")
        categories.setdefault(whole(target), set()).add(category)
    classes = []
    for target in sorted(categories):
        classes += categories[target]
    number = number_of(classes)
    if len(classes) > len(categories) or len(number) < len(classes):
        raise UserError(f"{path}: a target has two categories, or two targets the same one; "
                        "take the data set's own csv")
    files = scan(folder, "audio")
    index = by_path(files)
    found = [(index.get(bare(f"audio/{name}")), [number[category]]) for name, _, _, category in rows]
    return list_found(files, found, classes, fold=[whole(fold) for _, fold, _, _ in rows])


def list_speechcommands(folder, split):
    """Two lists name the validation and the test clips, the rest is for training. The train split holds the
    validation clips too."""
    validation = read_names(folder / "validation_list.txt")
    testing = read_names(folder / "testing_list.txt")
    scanned = scan(folder)
    files = {}                                                  # word/name: file, without _background_noise_
    for name, file in by_path(scanned).items():
        if name.count("/") == 1 and not name.startswith("_"):
            files[name] = file
    words = sorted({name.split("/")[0] for name in files})
    number = number_of(words)
    names = [name for name in files if (name in testing) == (split == "test")]
    found = [(files[name], [number[name.split("/")[0]]]) for name in names]
    listed = testing if split == "test" else validation
    held = None if split == "test" else [name in validation for name in names]
    return list_found(scanned, found, words, missing=len(listed - files.keys()), held=held)


def read_names(path):
    """The names word/file of a list, without their endings, as a set."""
    names = {bare(row[0]) for row in read_rows(path)}
    if any(name.count("/") != 1 for name in names):
        raise UserError(f"{path}: a row is not of the form word/file.wav; take the data set's own list")
    return names


def list_fsd50k(folder, split):
    """train: the development clips, of which the list marks those for validation. test: the evaluation
    clips."""
    part = "dev" if split == "train" else "eval"
    truth = folder / "FSD50K.ground_truth"
    number = read_vocabulary(truth / "vocabulary.csv")
    path = truth / f"{part}.csv"
    columns = ["fname", "labels", "split"] if part == "dev" else ["fname", "labels"]
    rows = read_columns(path, *columns)
    labels = [read_labels(path, row[1], number) for row in rows]
    if any(row[2:] not in ((), ("train",), ("val",)) for row in rows):
        raise UserError(f"{path}: a split is neither train nor val; take the data set's own csv")
    files = scan(folder, f"FSD50K.{part}_audio")
    index = by_path(files)
    found = [(index.get(f"FSD50K.{part}_audio/{row[0]}"), indices) for row, indices in zip(rows, labels)]
    held = [row[2] == "val" for row in rows] if part == "dev" else None
    return list_found(files, found, sorted(number, key=number.get), multilabel=True, held=held)


def read_vocabulary(path):
    """{class: its index}, from 0 on."""
    try:
        number = {row[1]: int(row[0]) for row in read_rows(path)}
    except (IndexError, ValueError):
        number = {}
    if not number or sorted(number.values()) != list(range(len(number))):
        raise UserError(f"{path}: a row is not of the form index,label,mid, or an index is missing; "
                        "take the data set's own csv")
    return number


def read_labels(path, labels, number):
    """The indices of a clip's labels."""
    labels = labels.split(",")
    for label in labels:
        if label not in number:
            raise UserError(f"{path}: unknown class {label!r}; vocabulary.csv does not list it")
    return [number[label] for label in labels]
