"""The data sets: a table of layouts and the rows that they must give, and one of broken lists."""
import itertools
import json
import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import datasets.kinetics
from common import UserError
from conftest import fails, numbered, tone, write
from datasets import check as checks
from datasets import files as folders
from datasets import made

IDS = ("-0RWZT-miFs", "YxYxYxYxYxY", "a_b_c_d_e_f", "__________Z", "YYYYYYYYYY_")      # YouTube ids
HERE = "{folder}"                           # in a list: the folder that it lies in


def put(folder, files):
    """Write {path: text or bytes, None: no such file} below a folder."""
    for path, content in files.items():
        if content is not None:
            path = folder / path.replace(HERE, str(folder))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                content = content.replace(HERE, str(folder)).encode()
            path.write_bytes(content)
    return folder


def names(listing):
    return [bytes(file).decode() for file in listing.files]


def contents(listing):
    """{file: its class, or a list of them}, by its flat labels."""
    out = {}
    for i, file in enumerate(names(listing)):
        numbers = () if listing.labels is None else listing.clip_labels(i)
        classes = [listing.classes[c] for c in numbers]
        out[file] = classes if listing.multilabel else "".join(classes)
    return out


@dataclass
class Layout:
    name: str
    files: dict                         # path: content, of the lists; the clips of the rows are empty files
    rows: dict                          # split: {file: its class, or a list of them}
    classes: list
    missing: dict = field(default_factory=dict)
    fold: list | None = None            # in each split
    held: tuple = ()                    # the official validation clips, in the training split


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


# --- AudioSet ---
HEAD = "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=22160\n# YTID, start, end, labels\n"
CLASSES = "class_labels_indices.csv"
SEGMENTS = "unbalanced_train_segments.csv"
AUDIOSET = {
    CLASSES: lines(
        'index,mid,display_name', '0,"/m/09x0r","Speech"', '1,"/m/05zppz","Male, man speaking"',
        '2,"/m/03v3yw","Keys jangling"', '3,"/m/0k4j","Car"'),
    SEGMENTS: HEAD + lines(
        f'{IDS[2]}, 30.000, 40.000, "/m/09x0r,/m/05zppz,/m/0k4j"', f'{IDS[3]}, 0.000, 10.000, "/m/05zppz"'),
    "eval_segments.csv": HEAD + lines(
        f'{IDS[4]}, 5.000, 15.000, "/m/03v3yw"', 'missingmiss, 1.000, 11.000, "/m/03v3yw"')}
BALANCED_CSV = HEAD + lines(
    f'{IDS[0]}, 420.000, 430.000, "/m/03v3yw,/m/0k4j"', f'{IDS[1]}, 40.000, 50.000, "/m/09x0r"',
    'MISSINGMISS, 0.000, 10.000, "/m/0k4j"')
BALANCED = {f"balanced/0/Y{IDS[0]}.wav": ["Keys jangling", "Car"], f"{IDS[1]}_40.000.mp4": ["Speech"]}
UNBALANCED = {
    f"un/deep/er/{IDS[2]}_30000_40000.mp4": ["Speech", "Male, man speaking", "Car"],
    f"un/{IDS[3]}.flac": ["Male, man speaking"]}
EVAL = {f"eval/Y{IDS[4]}.wav": ["Keys jangling"]}
OTHERS = {"balanced_train_segments.csv": BALANCED_CSV, "other.mp4": "", "Yunlisted00.wav": ""}


def audioset(name, train, missing):
    classes = ["Speech", "Male, man speaking", "Keys jangling", "Car"]
    missing = {"train": missing, "test": 1}
    return Layout(name, AUDIOSET | OTHERS, {"train": train, "test": EVAL}, classes, missing)


# --- VGGSound ---
VGGSOUND = {
    "train": {f"{IDS[0]}_000030.mp4": "playing drum kit, fast", f"deep/{IDS[2]}_000005.mp4": "cat purring"},
    "test": {f"{IDS[1]}_000120.mp4": "dog barking"}}
VGGSOUND_CSV = lines(f'{IDS[0]},30,"playing drum kit, fast",train', f"{IDS[1]},120,dog barking,test",
                     f"{IDS[2]},5,cat purring,train", "MISSINGMISS,7,dog barking,train")
TRAIN_CSV = lines(f'{IDS[0]}_000030.mp4,"playing drum kit, fast"', f"{IDS[2]}_000005.mp4,cat purring",
                  "MISSINGMISS_000007.mp4,dog barking")


def vggsound(**lists):
    files = {f"{name}.csv": text for name, text in lists.items()} | {f"{IDS[4]}_000001.mp4": ""}
    classes = ["cat purring", "dog barking", "playing drum kit, fast"]
    return Layout("vggsound", files, VGGSOUND, classes, {"train": 1})


# --- Kinetics: a clip of the official lists is found by its id and seconds, or else by its id alone ---
OFFICIAL = ("label,youtube_id,time_start,time_end,split", '"{}",{},{},{},x')      # header, and form of a row
MIXED = ("youtube_id,is_cc,label,time_end,time_start,split", '{1},0,"{0}",{3},{2},x')
LABELS = ("playing, loudly", "abseiling", "abseiling", "playing, loudly", "zumba")   # zumba: the test alone
KINETICS = {
    "train": {f"{IDS[0]}_000000_000010.mp4": LABELS[0], f"train/x, y/{IDS[1]}_000010_000020.mkv": LABELS[1],
              f"deep/er/{IDS[2]}.webm": LABELS[2]},
    "test": {f"val/x/{IDS[3]}_000030_000040.mp4": LABELS[3], f"val/{IDS[4]}_000041_000051.mp4": LABELS[4]}}
OTHER_SECONDS = {f"zz/{IDS[3]}_000031_000041.mp4": "", f"{IDS[3]}_40.000.mp4": "", "notes.txt": "x"}


def official(numbers, columns):
    """The official csv: clip n of IDS, from second 10 n on; and a clip that is not on disk."""
    header, row = columns
    rows = [row.format(LABELS[n], IDS[n], 10 * n, 10 * n + 10) for n in numbers]
    return lines(header, *rows, row.format("abseiling", "MISSINGMISS", 1, 11))


def kinetics_official(train, val, columns):
    files = {train: official((0, 1, 2), columns), val: official((3, 4), columns), "test.csv": "youtube_id\n"}
    classes = ["abseiling", "playing, loudly", "zumba"]
    return Layout("kinetics400", files | OTHER_SECONDS, KINETICS, classes, {"train": 1, "test": 1})


def kinetics_paths(end, a, b, c, classes):
    """A list of paths and labels, split at its last space."""
    train = lines(f"a b/a, b.mp4 {a}", f"./sub/b.mp4 {b}\r", "", f'"a c/c.mp4" {a}', f"gone.mp4 {a}",
                  f"{HERE}/gone.mp4 {b}", f"{HERE}/é.mp4 {a}")
    rows = {
        "train": {"a b/a, b.mp4": a, "sub/b.mp4": b, "a c/c.mp4": a, f"{HERE}/é.mp4": a},
        "test": {"c.mp4": c}}
    files = {f"train.{end}": train, f"val.{end}": f"c.mp4\t{c}"}
    return Layout("kinetics400", files, rows, classes, {"train": 2})


def kinetics_folders(test):
    rows = {"train": {"train/a/deep/2.mp4": "a", "train/b/1.mp4": "b"},
            "test": {f"{test}/a/4.mp4": "a", f"{test}/c/3.mp4": "c"}}
    files = ["train/loose.mp4", "other/d/5.mp4", "6.mp4"] + ["test/e/7.mp4"] * (test != "test")
    return Layout("kinetics400", dict.fromkeys(files, ""), rows, ["a", "b", "c"])


# --- Something-Something v2 ---
TEMPLATES = ("Holding [something] next to [something]", "Closing [something]", "Tearing [something] a bit")
PLAIN = [template.replace("[", "").replace("]", "") for template in TEMPLATES]


def ssv2_list(*numbers):
    """Clip n has template n % 3."""
    return json.dumps([{"id": str(100 + n), "template": TEMPLATES[n % 3], "label": "x"} for n in numbers])


def ssv2_labels(*order):
    """Template n has the number order[n]."""
    return json.dumps({template: str(n) for template, n in zip(PLAIN, order)})


SSV2 = "something-something-v2-"


def ssv2(stem):
    files = {f"{stem}labels.json": ssv2_labels(2, 0, 1), f"{stem}train.json": ssv2_list(0, 1, 2),
             f"{stem}validation.json": ssv2_list(3, 4), f"{stem}test.json": '[{"id": "100"}]'}
    rows = {"train": {"20bn/100.webm": PLAIN[0], "101.webm": PLAIN[1]},
            "test": {"v/w/103.mp4": PLAIN[0], "20bn/104.webm": PLAIN[1]}}
    return Layout("ssv2", files, rows, [PLAIN[1], PLAIN[2], PLAIN[0]], {"train": 1})


# --- sound alone ---
ESC50 = {"audio/1-0-A-30.wav": "zebra", "audio/1-1-A-2.flac": "siren",
         "audio/2-2-A-7.wav": "door", "audio/2-3-A-2.wav": "siren"}
ESC50_CSV = lines(
    "filename,fold,target,category,esc10", "1-0-A-30.wav,1,30,zebra,False", "1-1-A-2.wav,1,2,siren,False",
    "2-2-A-7.wav,2,7,door,False", "2-9-A-7.wav,2,7,door,False", "2-3-A-2.wav,2,2,siren,False")
SPEECH = {
    "train": {"no/7_0.wav": "no", "no/8_0.wav": "no", "yes/7_0.wav": "yes", "yes/8_0.wav": "yes"},
    "test": {"no/9_0.wav": "no"}}
SPEECH_FILES = {
    "validation_list.txt": lines("no/8_0.wav", "yes/8_0.wav", "yes/5_0.wav"),
    "testing_list.txt": lines("no/9_0.wav", "yes/9_0.wav"),
    "_background_noise_/tap.wav": "", "README.md": "", "loose.wav": ""}
TRUTH = "FSD50K.ground_truth"
FSD50K_FILES = {
    f"{TRUTH}/vocabulary.csv": "0,Siren,/m/0\n1,Bark,/m/1\n2,Accordion,/m/2\n",
    f"{TRUTH}/eval.csv": "fname,labels,mids\n200,Accordion,x\n201,Bark,x\n",
    f"{TRUTH}/dev.csv": lines(
        "fname,labels,mids,split", '100,"Siren,Bark",x,train', "101,Bark,x,val", "102,Bark,x,val",
        "104,Siren,x,train")}
FSD50K = {
    "train": {"FSD50K.dev_audio/100.wav": ["Siren", "Bark"], "FSD50K.dev_audio/102.flac": ["Bark"],
              "FSD50K.dev_audio/104.wav": ["Siren"]},
    "test": {"FSD50K.eval_audio/200.wav": ["Accordion"]}}
SPLITS = {
    "train": {"train/cat/1.mp4": "cat", "train/dog/2.wav": "dog", "train/dog/x/3.mkv": "dog"},
    "test": {"test/cat/4.mp4": "cat"}}
FILES = {"a.mp4": "", "b c.wav": "", "ünïcode.MP4": ""}
CLASSES_TXT = {"train.csv": "a.mp4 2\n", "val.csv": "b.mp4 0\n", "classes.txt": "zumba\na b\nabseiling \n"}

LAYOUTS = {
    "AudioSet-2M": audioset("audioset", UNBALANCED, 0),
    "AudioSet-20K": audioset("audioset-20k", BALANCED, 1),
    "AudioSet, both": audioset("audioset-full", UNBALANCED | BALANCED, 1),
    "VGGSound, official": vggsound(vggsound=VGGSOUND_CSV),
    "VGGSound with a header": vggsound(vggsound="youtube_id,start,label,split\n" + VGGSOUND_CSV),
    "VGGSound, by a spreadsheet": vggsound(vggsound="\ufeff" + VGGSOUND_CSV.replace("\n", "\r\n")),
    "VGGSound, two lists": vggsound(train=TRAIN_CSV, test=f"{IDS[1]}_000120.mp4,dog barking\n"),
    "Kinetics": kinetics_official("train.csv", "val.csv", OFFICIAL),
    "Kinetics, other columns": kinetics_official("annotations/train.csv", "annotations/validate.csv", MIXED),
    "Kinetics, two places": kinetics_official("train.txt", "annotations/validation.csv", OFFICIAL),
    "Kinetics, paths and numbers": kinetics_paths("csv", "7", "0", "19", ["0", "7", "19"]),
    "Kinetics, paths and words": kinetics_paths("txt", "b", "zumba", "a", ["a", "b", "zumba"]),
    "Kinetics, classes.txt": Layout(
        "kinetics400", CLASSES_TXT,
        {"train": {"a.mp4": "abseiling"}, "test": {"b.mp4": "zumba"}}, ["zumba", "a b", "abseiling"]),
    "Kinetics, one list": Layout("kinetics400", {"train.csv": "a.mp4 0\n"}, {"train": {"a.mp4": "0"}}, ["0"]),
    **{f"Kinetics, {test}/": kinetics_folders(test) for test in ("val", "validate", "Validation", "test")},
    **{f"SSv2, {stem}": ssv2(stem) for stem in ("", "labels/", SSV2, f"labels/{SSV2}")},
    "ESC-50": Layout(
        "esc50", {"meta/esc50.csv": ESC50_CSV}, {"train": ESC50, "test": ESC50, "all": ESC50},
        ["siren", "door", "zebra"], {"train": 1, "test": 1, "all": 1},
        fold=[1, 1, 2, 2]),
    "Speech Commands": Layout(
        "speechcommands", SPEECH_FILES, SPEECH, ["no", "yes"], {"train": 1, "test": 1},
        held=("no/8_0.wav", "yes/8_0.wav")),
    "FSD50K": Layout(
        "fsd50k", FSD50K_FILES, FSD50K, ["Siren", "Bark", "Accordion"], {"train": 1, "test": 1},
        held=("FSD50K.dev_audio/102.flac",)),
    "folder with splits": Layout(
        "folder", {"test/dog/readme.txt": ""}, SPLITS | {"all": SPLITS["test"] | SPLITS["train"]},
        ["cat", "dog"]),
    "folder of files": Layout(
        "folder", {"notes.txt": ""}, {"train": FILES, "test": FILES, "all": FILES}, [])}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_gives_the_rows_that_lie_there(tmp_path, case):
    """In the order of the list, whatever the files are called, with what is missing counted."""
    layout = LAYOUTS[case]
    put(tmp_path, layout.files)
    splits = {}
    for split, rows in layout.rows.items():
        put(tmp_path, dict.fromkeys(rows, ""))
        splits[split] = {file.replace(HERE, str(tmp_path)): label for file, label in rows.items()}
    for split, rows in splits.items():
        listing = data.list_clips(layout.name, tmp_path, split)
        missing = layout.missing.get(split, 0)
        assert list(contents(listing).items()) == list(rows.items())
        assert (listing.name, listing.classes, listing.missing) == (layout.name, layout.classes, missing)
        assert all(Path(listing.path(i)).is_file() for i in range(len(rows)))
        assert f"{len(rows)} clips found" in data.describe(listing)
        assert (f"{missing} listed but missing" in data.describe(listing)) == (missing > 0)
        assert (None if listing.fold is None else listing.fold.tolist()) == layout.fold
        held = [] if listing.held is None else np.flatnonzero(listing.held)
        assert [names(listing)[i] for i in held] == list(layout.held if split == "train" else ())
        if listing.labels is not None:
            check_targets(listing)
    if "test" in splits and "all" not in splits:
        both = data.list_clips(layout.name, tmp_path, "all")
        assert contents(both) == splits["train"] | splits["test"]
        assert (both.missing, both.seconds) == (sum(layout.missing.values()), data.SETS[layout.name].seconds)


def check_targets(listing):
    """The class indices, or zeros and ones, against the flat labels."""
    targets = listing.targets(range(len(listing)))
    rows = [[c] for c in targets.tolist()]
    if listing.multilabel:
        assert targets.shape == (len(listing), len(listing.classes)) and targets.dtype == torch.uint8
        rows = [row.nonzero().flatten().tolist() for row in targets]
    assert rows == [sorted(listing.clip_labels(i).tolist()) for i in range(len(listing))]


def test_the_table_of_sets_says_what_each_lacks_and_its_test_views():
    """The only place where a set's name stands: a name without an entry is no set."""
    has = {name: entry.has for name, entry in data.SETS.items()}
    assert {name for name in has if has[name] == ("audio",)} == {"esc50", "speechcommands", "fsd50k"}
    assert {name for name in has if has[name] == ("video",)} == {"ssv2"}
    longest = {name: entry.seconds for name, entry in data.SETS.items() if entry.seconds}
    of_ten = ("audioset", "audioset-20k", "audioset-full", "vggsound", "kinetics400")
    assert longest == dict.fromkeys(of_ten, 10.0) | {"esc50": 5.0, "speechcommands": 1.0}
    views = {name: (entry.views, entry.crops) for name, entry in data.SETS.items() if entry.views}
    assert views == {"kinetics400": (8, 3), "ssv2": (2, 3)}
    assert {name: entry.covers for name, entry in data.SETS.items() if entry.covers} == {"fsd50k": 30.0}


def test_a_set_that_lacks_what_a_method_needs_is_refused_in_a_sentence():
    data.require("vggsound", ("video", "audio"), "")
    data.require("esc50", ("audio",), "")
    with pytest.raises(UserError, match="^--data esc50 has no pictures; use ajepa.py$"):
        data.require("esc50", ("video", "audio"), "use ajepa.py")
    with pytest.raises(UserError, match="^--data ssv2 has no sound; take another$"):
        data.require("ssv2", ("audio",), "take another")
    with pytest.raises(UserError, match="audioset2: not a data set; one of toy, toy-still, .*folder"):
        data.require("audioset2", (), "") or data.list_clips("audioset2", ".")


@pytest.mark.parametrize("name", [name for name, entry in data.SETS.items() if not entry.make])
def test_a_data_set_without_a_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"--data {name} needs --data-dir"):
        data.list_clips(name)
    with pytest.raises(UserError, match="--data-dir .*: there is no such folder"):
        data.list_clips(name, tmp_path / "none")


def test_a_subset_keeps_what_belongs_to_its_clips(tmp_path):
    for case in ("ESC-50", "FSD50K"):
        layout = LAYOUTS[case]
        put(tmp_path, layout.files | dict.fromkeys(layout.rows["train"], ""))
    folds = data.list_clips("esc50", tmp_path)
    part = folds.subset([3, 0])
    assert list(contents(part).items()) == [list(contents(folds).items())[i] for i in (3, 0)]
    assert (part.fold.tolist(), part.held, part.seconds, part.classes) == ([2, 1], None, 5.0, folds.classes)
    several = data.list_clips("fsd50k", tmp_path)
    part = several.subset(np.array([1, 0]))
    assert part.held.tolist() == [True, False] and part.multilabel and several.seconds is None
    assert torch.equal(part.targets([0, 1]), several.targets([1, 0])) and len(several.subset([])) == 0


@pytest.mark.parametrize("found, stems", [
    ("abcdefghijk", ("abcdefghijk", "abcdefghijk_3_4", "abcdefghijk_3.0", "Yabcdefghijk", "Yabcdefghijk_3")),
    ("Yabcdefghij", ("Yabcdefghij", "YYabcdefghij", "Yabcdefghij_3_4", "Yabcdefghij_3.0", "YYabcdefghij_3")),
    ("-_________-", ("Y-_________-",)),
    ("Yabcdefghi_", ("Yabcdefghi__30.0",)),
    (None, ("__________", "abcdefghijkl", "Yabcdefghijkl"))])
def test_a_youtube_id_is_read_from_each_form_of_a_name(found, stems):
    for stem in stems:
        index = folders.by_id([f"x/{stem}.mp4"])
        assert index.get(found) == (f"x/{stem}.mp4" if found else None)
        assert found or not index


def test_a_list_of_absolute_paths_alone_searches_no_folder(tmp_path, monkeypatch):
    put(tmp_path, {"clips/a.mp4": "", "train.csv": f"{HERE}/clips/a.mp4 0\n"})
    monkeypatch.setattr(datasets.kinetics, "scan", None)
    assert contents(data.list_clips("kinetics400", tmp_path)) == {f"{tmp_path}/clips/a.mp4": "0"}


def test_a_folder_of_folders_is_split_the_same_way_each_time(tmp_path):
    files = {}
    for i in range(90):
        label = ("cat", "dog", "owl")[i % 3]
        files[f"{label}/{'deep/' if i % 2 else ''}{i:02d}.mp4"] = label
    put(tmp_path / "one", dict.fromkeys(files, ""))
    put(tmp_path / "two", dict.fromkeys(reversed(files), ""))
    train = contents(data.list_clips("folder", tmp_path / "one", "train"))
    test = contents(data.list_clips("folder", tmp_path / "one", "test"))
    assert contents(data.list_clips("folder", tmp_path / "two", "train")) == train
    assert not train.keys() & test.keys() and train | test == files
    assert list(train) == sorted(train) and set(test.values()) == {"cat", "dog", "owl"}
    assert 5 <= len(test) <= 35                                         # one in five
    put(tmp_path / "one", {"cat/new.mp4": ""})                  # a new clip moves no other to the other side
    assert contents(data.list_clips("folder", tmp_path / "one", "test")).items() >= test.items()


# What is said of a folder, and what becomes of each clip in it: its split and its class, "class" for those of
# both splits together; "": left out.
FLAT = {f"{name}/{i}.mp4": f"class {name}" for name in ("bus", "car", "plane") for i in range(9)}
FATES = {
    "train and val": (
        "(splits by folder: Train/ for training, VAL/ for the test; "
        "left out: 1 clip beside the splits: 's.mp4')",
        {"Train/cat/1.mp4": "train cat", "Train/dog/x/2.mp4": "train dog", "VAL/cat/3.mp4": "test cat",
         "VAL/dog/4.mp4": "test dog", "s.mp4": ""}),
    "train, val and test": (
        "train/ for training, valid/ for validation, TEST/ for the test; "
        "left out: 2 clips beside the splits: 'o/')",
        {"train/cat/1.mp4": "train cat", "valid/cat/2.mp4": "held cat", "TEST/cat/3.mp4": "test cat",
         "o/cat/4.mp4": "", "o/5.mp4": ""}),
    "two of a kind": (
        "train_set/ for training, dev/ and val_256/ for the test",
        {"train_set/a/1.mp4": "train a", "dev/a/2.mp4": "test a", "val_256/a/3.mp4": "test a"}),
    "splits without classes": (
        "train/ for training, eval/ for the test; no class folders, so no labels",
        {"train/1.mp4": "train", "train/2.wav": "train", "eval/3.mp4": "test", "4.mp4": ""}),
    "a clip without a class": (
        "left out: 1 clip without a class folder: 'train/2.mp4'",
        {"train/a/1.mp4": "train a", "train/2.mp4": "", "test/a/3.mp4": "test a"}),
    "no class in training": (
        "no labels, since not all of these clips lie in class folders",
        {"train/1.mp4": "train", "test/a/2.mp4": "test a"}),
    "classes compared exactly": (
        "train/ lacks 1 of the classes: 'Cat'; test/ lacks 2 of the classes: 'cat', 'o'",
        {"train/cat/1.mp4": "train cat", "train/o/2.mp4": "train o", "test/Cat/3.mp4": "test Cat"}),
    "training alone": (
        "(splits by folder: train/ for training)",
        {"train/a/1.mp4": "train a", "train/b/2.mp4": "train b"}),
    "training beside a stray folder": (
        "train/ for training; left out: 1 clip beside the splits: 'x/'",
        {"train/a/1.mp4": "train a", "train/b/2.mp4": "train b", "x/3.mp4": ""}),
    "a class of trains": (
        "sub-folders are classes, one clip in five is for the test; taken for no splits: 'train/'",
        FLAT | {f"train/{i}.mp4": "class train" for i in range(9)}),
    "classes of trains and tests": (
        "taken for no splits: 'test/', 'train/'",
        FLAT | {"train/1.mp4": "class train", "test/2.mp4": "class test"}),
    "splits in classes": (
        "taken for no splits: 'bus/test/', 'bus/train/'",
        FLAT | {"bus/train/1.mp4": "class bus", "bus/test/2.mp4": "class bus"}),
    "a clip beside classes": (
        "left out: 1 clip beside the sub-folders: 'loose.mp4'", FLAT | {"loose.mp4": ""}),
    "words in the names": (
        "(splits by folder: UCF_train/ for training, UCF-Test01/ for the test)",
        {"UCF_train/a/1.mp4": "train a", "UCF-Test01/a/2.mp4": "test a"}),
    "classes with such words": (
        "(sub-folders are classes, one clip in five is for the test)",
        FLAT | {f"train whistling/{i}.mp4": "class train whistling" for i in range(9)}),
    "a folder around": (
        "(all in 'set/v2/'; splits by folder: train/ for training, test/ for the test)",
        {"set/v2/train/a/1.mp4": "train a", "set/v2/test/a/2.mp4": "test a"}),
    "a folder around classes": (
        "(all in 'clips/'; sub-folders are classes, one clip in five is for the test)",
        {f"clips/{file}": fate for file, fate in FLAT.items()}),
    "no folders": ("(no sub-folders, so no labels)", {"1.mp4": "class", "2.MP4": "class"})}


@pytest.mark.parametrize("case", FATES)
def test_the_folders_are_splits_or_classes_and_it_is_said_which(tmp_path, case):
    note, fates = FATES[case]
    put(tmp_path, dict.fromkeys(fates, ""))
    seen = {}
    for split, parts in (("train", ("train", "held", "class")), ("test", ("test", "class"))):
        wanted = {}
        for file, fate in fates.items():
            part, _, label = fate.partition(" ")
            if part in parts:
                wanted[file] = label
        if not wanted:
            with pytest.raises(UserError, match=f"no clip in .* for the {split} split .*splits by folder: "):
                data.list_clips("folder", tmp_path, split)
            continue
        listing = data.list_clips("folder", tmp_path, split)
        found = contents(listing)
        seen |= found
        assert found.items() <= wanted.items()
        assert found == wanted or "class" in {fate.split(" ")[0] for fate in fates.values()}
        held = [] if listing.held is None else np.flatnonzero(listing.held)
        assert [fates[names(listing)[i]][:4] for i in held] == ["held"] * len(held)
        assert split == "test" or len(held) == sum(fate.startswith("held") for fate in fates.values())
        said = data.describe(listing)
        assert "\n" not in said and (note in said or split == "test")
    assert seen.keys() == {file for file in fates if fates[file]}
    assert len(data.list_clips("folder", tmp_path, "all")) == len(fates)            # a search takes each


def test_a_link_adds_no_clip_that_is_there_already(tmp_path):
    files = [f"{label}/{i}.mp4" for label in ("a", "b") for i in range(8)]
    put(tmp_path / "clips", dict.fromkeys(files, ""))
    put(tmp_path / "other", {f"c/{i}.mp4": "" for i in range(4)})
    links = {"a/self": ".", "a/other_self": ".", "a/up": "..", "b/above": "../../..", "b/a": "../a", "0": "a",
             "broken": "nowhere", "loop": "loop", "a/gone.mp4": "nowhere.mp4", "a/b1.mp4": "../b/1.mp4",
             "c": "../other/c", "d": "../other/c", "c1.mp4": "../other/c/1.mp4"}
    for link, target in links.items():
        (tmp_path / "clips" / link).symlink_to(target)
    os.mkfifo(tmp_path / "clips" / "a" / "pipe.mp4")
    both = {}
    for split in ("train", "test"):
        listing = data.list_clips("folder", tmp_path / "clips", split)
        assert not both.keys() & contents(listing).keys()
        both |= contents(listing)
    assert sorted(both) == files + [f"c/{i}.mp4" for i in range(4)]
    said = data.describe(listing)
    assert "7 links to a folder or tar that is here already: '0', 'a/other_self', 'a/self' and 4 more" in said
    assert "2 links to a clip that is here already: 'a/b1.mp4', 'c1.mp4'" in said
    assert "4 broken or no file: 'a/gone.mp4', 'a/pipe.mp4', 'broken' and 1 more" in said


def test_what_a_system_puts_beside_the_clips_is_neither_clip_nor_class(tmp_path):
    clips = {f"{label}/{i}.mp4": "" for label in "ab" for i in range(9)}
    junk = ("._x.mp4", "a/._1.mp4", "a/.hidden.mp4", "__MACOSX/a/1.mp4", ".Trash-0/files/1.mp4",
            "@eaDir/x/1.mp4", "a/@eaDir/1.mp4", "#recycle/1.mp4", "$RECYCLE.BIN/1.mp4",
            "System Volume Information/1.mp4", ".ipynb_checkpoints/1.mp4", "lost+found/1.mp4",
            "Thumbs.db", "a/desktop.ini", ".DS_Store")
    put(tmp_path, clips | dict.fromkeys(junk, ""))
    listing = data.list_clips("folder", tmp_path, "all")
    assert names(listing) == sorted(clips) and listing.classes == ["a", "b"]
    named = "'#recycle', '$RECYCLE.BIN', '.DS_Store' and 12 more"
    assert listing.notes[-1] == f"left out: {len(junk)} hidden or system names: {named}"


def test_files_that_ffmpeg_reads_are_clips_and_all_others_are_counted(tmp_path):
    endings = ("wmv mts M2TS asf vob 3g2 mka oga caf amr wv m2v mp2 ac3 w64 au f4v mxf ape tta webm Mp4 aiff "
               "opus ogm rmvb m4b dts spx aifc 3ga weba m2t").split()
    put(tmp_path, {f"clip.{ending}": "" for ending in endings})
    others = ("a.xyz", "b.xyz", "c.XYZ", "d.mp4.part", "e.jpg", "f", "g.a b", "h.srt", "i.json", "j.npz")
    put(tmp_path, dict.fromkeys(others, ""))
    listing = data.list_clips("folder", tmp_path)
    assert names(listing) == sorted(f"clip.{ending}" for ending in endings)
    left_out = "3 .xyz, 2 without an ending, 1 .jpg, 1 .json, 1 .npz, 2 of other endings"
    assert data.describe(listing).endswith(f"(no sub-folders, so no labels; left out: {left_out})")


@pytest.mark.parametrize("name, case", [("folder", "folder with splits"), ("vggsound", "VGGSound, official")])
def test_a_folder_that_cannot_be_read_is_said(tmp_path, monkeypatch, name, case):
    layout = LAYOUTS[case]
    put(tmp_path, layout.files | dict.fromkeys(layout.rows["train"], "") | {"private/x/1.mp4": ""})

    def scandir(path, really=os.scandir):               # root may read all
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    listing = data.list_clips(name, tmp_path)
    assert len(listing) == len(layout.rows["train"])
    assert "1 folder not readable: 'private'" in data.describe(listing)


def test_names_of_any_bytes_are_classes_and_clips_and_are_printed_on_one_line(tmp_path):
    odd = ("two\nlines", "a  b", "byte \udcff", "tab\t", "'", "ünï", "-")
    files = {f"{label}/{i}{label}.mp4": label for label in odd for i in range(4)}
    try:
        put(tmp_path, dict.fromkeys([*files, "x\n\udcfe.mp4"], ""))
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    both = {}
    for split in ("train", "test"):
        listing = data.list_clips("folder", tmp_path, split)
        assert all(Path(listing.path(i)).is_file() for i in range(len(listing)))
        for i, file in enumerate(listing.files):
            both[os.fsdecode(bytes(file))] = listing.classes[int(listing.targets([i]))]
        assert data.describe(listing).encode().isascii() and "\n" not in data.describe(listing)
    assert both == files


def test_labels_count_further_than_16_bits():
    count = 40_000
    listing = data.make_listing("x", "", [f"{i}/1.mp4" for i in range(count)], [[i] for i in range(count)],
                                [str(i) for i in range(count)])
    assert torch.equal(listing.targets(range(count)), torch.arange(count))
    assert listing.subset([39_999]).targets([0]).tolist() == [39_999]
    assert data.describe(listing) == "x: 40,000 clips found, 40,000 classes"


def test_a_data_dir_that_is_no_folder_is_refused_in_a_sentence(tmp_path, monkeypatch):
    put(tmp_path, {"file": "x"})
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    reasons = {"file": "is a file; give the folder", "link": "is a link to nowhere, which is not there",
               "none": "there is no such folder", "loop": "cannot be read", "x" * 300: "cannot be read",
               "a\0b": "cannot be read", "file/below": "is a file"}
    for name, reason in reasons.items():
        for data_set in ("folder", "vggsound"):
            fails(data.list_clips, data_set, tmp_path / name, match=f"--data-dir .*: {reason}")

    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.os, "scandir", scandir)    # root may read all
    fails(data.list_clips, "folder", tmp_path, match="cannot be read .Permission denied")


def test_a_clip_of_any_name_can_be_read_from_the_current_folder_too(tmp_path, clips, monkeypatch):
    stems = ("-0RWZT-miFs_000030", "a:b%20c d#1?", "ünï")
    put(tmp_path, {f"{stem}.mp4": (clips / "silent.mp4").read_bytes() for stem in stems})
    monkeypatch.chdir(tmp_path)
    listing = data.list_clips("folder", ".")
    assert len(listing) == 3
    assert all(data.read_clip(listing.path(i), 0, 1, 1, 16)["has_video"] for i in range(3))


# --- What is wrong with a set ---
KINETICS_HEAD = OFFICIAL[0] + "\n"
ESC50_PATH = "meta/esc50.csv"
ESC50_HEAD = "filename,fold,target,category\n"
VOCABULARY = f"{TRUTH}/vocabulary.csv"
DEV = f"{TRUTH}/dev.csv"
FSD50K_HEAD = "fname,labels,mids,split\n"
TESTS = ("val.csv", "validation.json", "eval_segments.csv", f"{TRUTH}/eval.csv")     # read for the test split
GOOD = {                                                    # lists without a clip
    "audioset": AUDIOSET,
    "vggsound": {"vggsound.csv": "abcdefghijk,30,dog,train\n"},
    "kinetics400": {"train.csv": "a.mp4 0\n", "val.csv": "a.mp4 0\n"},
    "ssv2": {
        "labels.json": ssv2_labels(2, 0, 1), "train.json": ssv2_list(0, 1), "validation.json": ssv2_list(2)},
    "esc50": {ESC50_PATH: ESC50_HEAD + "a.wav,1,0,dog\n"},
    "speechcommands": {"validation_list.txt": "no/a.wav\n", "testing_list.txt": "no/b.wav\n"},
    "fsd50k": {VOCABULARY: "0,Siren,/m/0\n", DEV: FSD50K_HEAD + "1,Siren,x,train\n",
               f"{TRUTH}/eval.csv": FSD50K_HEAD + "2,Siren,x,x\n"}}
NUMBERS = ("²", "9" * 5000, "-1", "1.5", "")                # none of them counts anything
ROWS = {                                                    # (set, list): {sentence: contents}
    ("audioset", SEGMENTS): {
        "unknown class '/m/x'": ['abcdefghijk, 0.0, 10.0, "/m/0k4j,/m/x"\n'],
        "not of AudioSet's form": ["abcdefghijk, 0.000\n"]},
    ("audioset", CLASSES): {
        "not of AudioSet's form": [f"index,mid,name\n{n},/m/0k4j,Car\n" for n in ("zero", *NUMBERS[:2])],
        "does not give each class an index of its own": [
            "index,mid,name\n1,/m/0k4j,Car\n", "index,mid,name\n0,/m/0k4j,Car\n0,/m/x,Bus\n"],
        "unknown class": ["index,mid,display_name\n"]},
    ("vggsound", "vggsound.csv"): {
        "the four fields id, start .whole": ["abcdefghijk,30,dog\n", "abcdefghijk,thirty,dog,train\n",
                                             *[f"abcdefghijk,{n},dog,train\n" for n in NUMBERS]]},
    ("kinetics400", "train.csv"): {
        "train.csv: .* nothing but its header": [KINETICS_HEAD],
        "train.csv: .* lacks one of the columns label, youtube_id, time_start": [
            "label,youtube_id,split\na,b,train\n", KINETICS_HEAD + "a,abcdefghijk\n"],
        "train.csv: a time is not a number": [
            f"{KINETICS_HEAD}a,abcdefghijk,1,{time},x\n" for time in ("ten", "nan", "inf", *NUMBERS[:3])],
        "train.csv: neither begins .* the path of a clip and a label": [
            "a.mp4\n", "a.mp4 0\nwith space/b.mp4\n"],
        "train.csv: some labels are whole numbers and others are not": ["a.mp4 dog\n"]},
    ("ssv2", "labels.json"): {
        "labels.json: the list is empty": ["{}"],
        "labels.json: does not give each template a number": [
            '["Closing something"]', '{"Closing something": "one"}', '{"Closing something": null}',
            ssv2_labels(0, 1, 3), ssv2_labels(0, 1, 1), *[f'{{"Closing something": "{n}"}}' for n in NUMBERS],
            '{"Closing something": Infinity}']},
    ("ssv2", "train.json"): {
        "train.json: the list is empty": ["[]"],
        "train.json: cannot be read as json": ["[{", "[" * 10 ** 5],
        "train.json: is not a list of entries with an id": [
            '[{"id": "100"}]', '{"id": "1", "template": "x"}', "3", '[{"id": 1, "template": 3}]'],
        "train.json: unknown template 'Juggling a b'": ['[{"id": "1", "template": "Juggling [a b]"}]']},
    ("esc50", ESC50_PATH): {
        "lacks one of the columns": ["fold\n1\n", ESC50_HEAD + "a,1\n"],
        "not a whole number": [
            ESC50_HEAD + "a.wav,one,0,dog\n", *[f"{ESC50_HEAD}a.wav,{n},0,dog\n" for n in NUMBERS],
            *[f"{ESC50_HEAD}a.wav,1,{n},dog\n" for n in NUMBERS]],
        "a target has two categories, or two targets the same one": [
            ESC50_HEAD + "a,1,0,dog\nb,1,0,cat\n", ESC50_HEAD + "a,1,0,dog\nb,1,1,dog\n"]},
    ("speechcommands", "testing_list.txt"): {"word/file.wav": ["yes\n"]},
    ("fsd50k", VOCABULARY): {"index,label,mid": [
        "Siren\n", "0,Siren,/m/0\n2,Bark,/m/1\n", *[f"{n},Siren,/m/0\n" for n in NUMBERS]]},
    ("fsd50k", DEV): {
        "unknown class 'Cough'": [FSD50K_HEAD + "1,Cough,x,train\n"],
        "lacks one of the columns": ["fname,labels\n1,Siren\n"],
        "neither train nor val": [FSD50K_HEAD + "1,Siren,x,test\n"]}}
NO_LISTS = {"train.csv": None, "val.csv": None}
FOLDERS = [                                                 # (set, split, sentence, files besides GOOD)
    ("folder", "train", "no clip in .* for the train split", {}),
    ("folder", "train", "no clip in .* for the train split", {"notes.txt": "", "test/a/1.mp4": ""}),
    ("vggsound", "train", "the two fields",
     {"vggsound.csv": None, "train.csv": "a.mp4,dog\n", "test.csv": "b.mp4\n"}),
    ("kinetics400", "train", "neither lists .* nor class folders", NO_LISTS | {"a.mp4": ""}),
    ("kinetics400", "test", "no clip in .* for the test split", NO_LISTS | {"train/a/1.mp4": ""}),
    ("kinetics400", "all", "annotations/val.txt: there is no such file; put the list .* beside train.txt",
     NO_LISTS | {"annotations/train.txt": "a.mp4 0\n", "a.mp4": ""}),
    ("kinetics400", "train", "classes.txt: has 2 names, but the lists hold the label 3",
     {"train.csv": "a.mp4 3\n", "classes.txt": "a\nb\n"}),
    ("kinetics400", "train", "classes.txt: the list is empty", {"annotations/classes.txt": ""}),
    ("ssv2", "train", "v2-labels.json: there is no such file; .* into labels/", {"labels.json": None})]


@pytest.fixture()
def refused(tmp_path):
    """Claims that a set of these files is refused in one sentence."""
    count = itertools.count()

    def claim(name, split, sentence, files):
        folder = tmp_path / str(next(count))
        folder.mkdir()
        put(folder, GOOD.get(name, {}) | files)
        with pytest.raises(UserError, match=sentence) as error:
            data.list_clips(name, folder, split)
        assert "\n" not in str(error.value)

    return claim


@pytest.mark.parametrize("name", GOOD)
def test_a_list_that_is_not_there_or_empty_or_not_in_utf_8_is_named(refused, name):
    refused(name, "train", "none of the . listed clips", {})
    wrong = {None: "there is no such file; put", "": "the list is empty|as json",
             "# only\n# comments\n\n": "the list is empty|as json", b"\xff\xfe\x00": "UTF-8|as json",
             "a,1\n".encode("utf-16-le"): "zero byte|as json", "a,b\0\n": "zero byte|as json",
             "x" * 200_000: "field larger|as json"}
    for path in GOOD[name]:
        for content, sentence in wrong.items():
            split = "test" if path in TESTS else "train"
            refused(name, split, f"({Path(path).name}|train.csv): .*({sentence})", {path: content})
        is_folder = {path: None, f"{path}/x": ""}
        refused(name, split, f"{Path(path).name}: .*[Ii]s a (folder|directory)", is_folder)


def test_a_quote_that_is_left_open_swallows_no_rows(refused):
    refused("vggsound", "train", "cannot be read as a csv .*quote", {
        "vggsound.csv": 'abcdefghijk,30,"dog,train\nabcdefghijl,30,dog,train\nabcdefghijm,30,"cat",train\n'})


@pytest.mark.parametrize("name, path", ROWS)
def test_what_is_wrong_in_a_list_is_said_in_one_sentence(refused, name, path):
    for sentence, contents in ROWS[name, path].items():
        for content in contents:
            refused(name, "train", sentence, {path: content})


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_wrong_in_a_folder_is_said_in_one_sentence(refused, case):
    refused(*case)


# --- data.py ---

def test_check_listens_to_two_minutes_and_names_what_is_wrong_with_a_clip(tmp_path, capsys):
    second = tone(1000, 1, 8000)
    poison = np.tile(second, 20)
    poison[8000] = np.nan                               # at its first second; the middle is fine
    write(tmp_path / "poison.wav", wave=poison, rate=8000, audio="pcm_f32le")
    loud = np.tile(second, 130)
    write(tmp_path / "long.wav", wave=loud, rate=8000, audio="pcm_s16le")
    loud[125 * 8000] = np.inf                           # later than it listens
    write(tmp_path / "late.wav", wave=loud, rate=8000, audio="pcm_f32le")
    frames = [numbered(n) for n in range(100)]
    write(tmp_path / "sound.mkv", frames, tone(1000, 1))
    write(tmp_path / "picture.mkv", frames[:25], tone(1000, 4))
    write(tmp_path / "late.mkv", frames, np.concatenate([np.zeros(48000), tone(1000, 1)]))
    (tmp_path / "two\nlines.mp4").write_bytes(b"no clip")
    for workers in (0, 1):
        counts = data.check(data.list_clips("folder", tmp_path), workers)
        assert counts.items() >= {
            "clips": 7, "unreadable": 2, "short": 2, "long": 2, "no audio": 0, "no video": 2}.items()
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == "folder: 7 clips found (no sub-folders, so no labels)"              # at once
        said = {line.split(": ")[1].split("/")[-1]: line.split(": ")[0] for line in rest if ": " in line}
        assert said == {"poison.wav": "unreadable", "two\\nlines.mp4": "unreadable", "long.wav": "long",
                        "late.wav": "long", "sound.mkv": "short", "picture.mkv": "short"}
        assert rest[-1].startswith("unreadable 2, without picture 2, without sound 0, 0.0")
        assert rest[-1].endswith(" hours, short 2, long 2")


def test_a_worker_that_was_killed_while_it_checks_is_a_sentence(tmp_path, clips, monkeypatch):
    def killed(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(checks, "look", killed)
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.2,))   # torch looks for its workers each so many s, not 5
    put(tmp_path, {"a.mp4": (clips / "good.mp4").read_bytes()})
    flags = f"--data folder --data-dir {tmp_path} --workers 1 --check"
    fails(data.main, flags.split(), match="data worker was killed")


@pytest.mark.parametrize("flag", ["--clips", "--seconds", "--mels", "--hop", "--workers"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "²", "9" * 5000, "", "1e400"])
def test_a_number_that_is_none_ends_in_a_sentence(flag, value, capsys):
    try:
        fails(data.main, ["--stats", flag, value], match=f"{flag} .*is out of range: from ")
    except SystemExit as e:                             # argparse's
        assert e.code == 2 and f"error: argument {flag}: " in capsys.readouterr().err


@pytest.fixture()
def tiny_world(monkeypatch):
    for key, value in (("train", 3), ("test", 2)):
        monkeypatch.setitem(data.TOY, key, value)


def test_of_two_that_write_the_toy_clips_at_once_the_second_takes_those_of_the_first(
        tmp_path, tiny_world, monkeypatch):
    def interrupted(world, folder, split, really=made.write_split):
        really(world, folder, split)
        monkeypatch.setattr(made, "write_split", really)
        data.TOY_WORLD.make(tmp_path / "toy")                 # another one begins later, and is done first

    monkeypatch.setattr(made, "write_split", interrupted)
    assert len(data.list_clips("toy", tmp_path / "toy")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert (tmp_path / "toy" / "world.json").read_bytes() == made.content(data.TOY_WORLD)


def test_toy_clips_that_cannot_be_written_or_read_end_in_a_sentence_and_leave_nothing(tmp_path, tiny_world):
    put(tmp_path, {"file": "x"})
    for place in ("file", "file/toy"):
        fails(data.list_clips, "toy", tmp_path / place, match="clips cannot be written there .*; make room")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))      # as a full disk: in the workers
        fails(data.list_clips, "toy", tmp_path / "toy", match="cannot be written there .File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    data.TOY_WORLD.make(tmp_path / "toy")
    (tmp_path / "toy" / "test" / "truth.npz").write_bytes(b"PK")
    fails(data.list_clips, "toy", tmp_path / "toy", "test", match="truth.npz: cannot be read .*; remove ")
