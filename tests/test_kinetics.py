"""Kinetics-400 and Something-Something v2: their lists, the several crops of a test view, and a set without sound."""
import argparse, csv, functools, json, sys
from dataclasses import asdict
from pathlib import Path

import ajepa, avjepa_lejepa, common, data, mjepa, probe, retrieval
from common import UserError
from data import Inputs, View

import numpy as np
import pytest
import torch

from conftest import ROOT, command, tone

IDS = ("-0RWZT-miFs", "YxYxYxYxYxY", "a_b_c_d_e_f", "__________Z", "0123456789-", "---_---_---")       # YouTube ids that invite mistakes
LABELS = ("playing, loudly", "abseiling", "abseiling", "playing, loudly", "zumba", "abseiling")        # zumba is in the second list alone
OFFICIAL = ("label", "youtube_id", "time_start", "time_end", "split")
SMALL = Inputs(seconds=0.5, frames=2, size=16, resize=20, n_mels=16)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Bytes of a clip of one second, 24 x 40, with sound and without."""
    folder = tmp_path_factory.mktemp("clip")
    frames = np.random.default_rng(0).integers(0, 255, (12, 24, 40, 3)).astype(np.uint8)
    data.write_clip(folder / "sound.mp4", frames, tone(440, 1))
    data.write_clip(folder / "silent.mp4", frames)
    return {part: (folder / f"{part}.mp4").read_bytes() for part in ("sound", "silent")}


def put(folder, files):
    """Write {path: bytes, text, or rows of a csv}. Returns the folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            with open(folder / path, "w", newline="") as f:
                csv.writer(f).writerows(content)
        else:
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def named(listing):
    """{file: class}"""
    return {bytes(f).decode(): listing.classes[c] for f, c in zip(listing.files, listing.targets(range(len(listing))))}


# ---------------------------------------------------------------------------------------------------------------------
# Kinetics-400
# ---------------------------------------------------------------------------------------------------------------------

def official(numbers, split, columns=OFFICIAL):
    """Rows of the official csv: clip n of IDS, from second 10 n on; with a clip that is not on disk."""
    rows = [dict(label=LABELS[n], youtube_id=IDS[n], time_start=10 * n, time_end=10 * n + 10, split=split, is_cc=0) for n in numbers]
    rows += [dict(label="abseiling", youtube_id="MISSINGMISS", time_start=1, time_end=11, split=split, is_cc=1)]
    return [columns, *[[row[c] for c in columns] for row in rows]]


@pytest.mark.parametrize("lists", [("train.csv", "val.csv"), ("annotations/train.csv", "annotations/validate.csv"),
                                   ("train.txt", "annotations/validation.csv")])
@pytest.mark.parametrize("columns", [OFFICIAL, ("youtube_id", "is_cc", "label", "time_end", "time_start", "split")])
def test_the_official_csv_finds_clips_by_their_exact_name_or_else_by_their_id_wherever_they_lie(tmp_path, clip, lists, columns):
    there = {0: f"{IDS[0]}_000000_000010.mp4", 1: f"train/playing, loudly/{IDS[1]}_000010_000020.mkv", 2: f"deep/er/{IDS[2]}.webm",
             3: f"val/x/{IDS[3]}_000030_000040.mp4", 4: f"val/{IDS[4]}_000041_000051.mp4"}              # 2 and 4: by the id alone
    put(tmp_path, {f: clip["sound"] for f in there.values()})
    put(tmp_path, {f"zz/{IDS[3]}_000031_000041.mp4": b"", f"{IDS[3]}_40.000.mp4": b"", "notes.txt": "x",           # other seconds
                   lists[0]: official((0, 1, 2), "train", columns), lists[1]: official((3, 4, 5), "val", columns),
                   "test.csv": [("youtube_id", "time_start", "time_end", "split"), (IDS[0], 0, 10, "test")]})
    train, test, both = (data.list_clips("kinetics400", tmp_path, split) for split in ("train", "test", "all"))
    assert named(train) == {there[n]: LABELS[n] for n in (0, 1, 2)} and named(test) == {there[n]: LABELS[n] for n in (3, 4)}
    assert (train.missing, test.missing, both.missing) == (1, 2, 3) and named(both) == {there[n]: LABELS[n] for n in there}
    assert train.classes == test.classes == ["abseiling", "playing, loudly", "zumba"] and train.seconds == both.seconds == 10.0
    assert all(data.read_clip(both.path(i), 0.0, 0.5, 2, 16)["has_audio"] for i in range(5))            # also the mp4 called .webm


@pytest.mark.parametrize("end", ["csv", "txt"])
@pytest.mark.parametrize("labels, classes", [((7, 0, 19), ["0", "7", "19"]), (("b", "zumba", "a"), ["a", "b", "zumba"])])
def test_a_list_of_paths_and_labels_is_split_at_its_last_space(tmp_path, clip, end, labels, classes):
    folder, aside = tmp_path / "clips", tmp_path / "aside é.mp4"
    files = ["with space/a, b.mp4", "sub/b.mp4", "c.mp4"]
    put(folder, {**{f: clip["silent"] for f in files}, aside: clip["silent"]})
    put(folder, {f"train.{end}": f'{files[0]} {labels[0]}\n"{files[0]}" {labels[0]}\n./{files[1]} {labels[1]}\r\n\n{aside} {labels[0]}\n'
                                 f"gone.mp4 {labels[0]}\n{tmp_path}/gone.mp4 {labels[1]}\n",
                 f"val.{end}": f"{files[2]}\t{labels[2]}"})
    train, test = (data.list_clips("kinetics400", folder, split) for split in ("train", "test"))
    assert train.classes == test.classes == classes and (len(train), train.missing, test.missing) == (4, 2, 0)
    assert named(train) == {files[0]: str(labels[0]), files[1]: str(labels[1]), str(aside): str(labels[0])}
    assert named(test) == {files[2]: str(labels[2])} and all(Path(train.path(i)).is_file() for i in range(4))
    assert data.Clips(train, SMALL, functools.partial(data.even_views, 1, SMALL, audio=False))[0, 3]["has_video"]


def test_whole_numbers_are_the_lines_of_classes_txt_whatever_the_lists_hold_of_them(tmp_path):
    put(tmp_path, {"a.mp4": b"", "b.mp4": b"", "train.csv": "a.mp4 2\n", "val.csv": "b.mp4 0\n",
                   "classes.txt": "zumba\nplaying, loudly\nabseiling \n"})
    train, test = (data.list_clips("kinetics400", tmp_path, split) for split in ("train", "test"))
    assert train.classes == test.classes == ["zumba", "playing, loudly", "abseiling"]
    assert named(train) == {"a.mp4": "abseiling"} and named(test) == {"b.mp4": "zumba"}


def test_a_list_of_absolute_paths_alone_searches_no_folder(tmp_path, monkeypatch):
    put(tmp_path, {"clips/a.mp4": b"", "train.csv": f"{tmp_path}/clips/a.mp4 0\n"})
    monkeypatch.setattr(data, "_scan", None)
    assert named(data.list_clips("kinetics400", tmp_path)) == {str(tmp_path / "clips" / "a.mp4"): "0"}  # without a validation list as well


@pytest.mark.parametrize("test", ["val", "validate", "validation", "test"])
def test_without_lists_the_folders_below_train_and_val_are_the_classes(tmp_path, capsys, test):
    put(tmp_path, {f: b"" for f in ("train/b/1.mp4", "train/a/deep/2.mp4", "train/loose.mp4", f"{test}/c/3.mp4", f"{test}/a/4.mp4",
                                    "other/d/5.mp4", "6.mp4", *(["test/e/7.mp4"] if test != "test" else []))})
    train, tested = (data.list_clips("kinetics400", tmp_path, split) for split in ("train", "test"))
    assert named(train) == {"train/a/deep/2.mp4": "a", "train/b/1.mp4": "b"} and train.classes == tested.classes == ["a", "b", "c"]
    assert named(tested) == {f"{test}/a/4.mp4": "a", f"{test}/c/3.mp4": "c"} and tested.seconds == 10.0
    assert capsys.readouterr().out.count("1 files beside the class folders") == 1


HEAD = ",".join(OFFICIAL) + "\n"


@pytest.mark.parametrize("files, split, sentence", [
    ({}, "train", "neither lists .* nor class folders"), ({"a.mp4": b""}, "test", "neither lists .* nor class folders"),
    ({"train/a/1.mp4": b""}, "test", "no clip in .* for the test split"),
    ({"val.csv": "a.mp4 0\n"}, "train", "/train.csv: there is no such file; put the list of the training clips beside val.csv"),
    ({"annotations/train.txt": "a.mp4 0\n"}, "test", "annotations/val.txt: there is no such file"),
    ({"annotations/train.txt": "a.mp4 0\n", "a.mp4": b""}, "all", "annotations/val.txt: there is no such file"),
    ({"train.csv": ""}, "train", "train.csv: the list is empty"), ({"train.csv": HEAD}, "train", "train.csv: .* nothing but its header"),
    ({"train.csv": "label,youtube_id,split\na,b,train\n"}, "train", "train.csv: .* lacks one of the columns label, youtube_id, time_start"),
    ({"train.csv": HEAD + "a,abcdefghijk\n"}, "train", "train.csv: .* lacks one of the columns"),
    ({"train.csv": HEAD + "a,abcdefghijk,ten,20,train\n"}, "train", "train.csv: a time is not a number"),
    ({"train.csv": HEAD + "a,abcdefghijk,1,nan,train\n"}, "train", "train.csv: a time is not a number"),
    ({"train.csv": HEAD + "a,abcdefghijk,1,inf,train\n"}, "train", "train.csv: a time is not a number"),
    ({"train.csv": HEAD + "a,abcdefghijk,10,20,train\n"}, "train", "none of the 1 listed clips"),
    ({"train.csv": "a.mp4\n"}, "train", "train.csv: neither begins with a header .* the path of a clip and a label"),
    ({"train.csv": "a.mp4 0\nwith space/b.mp4\n"}, "train", "train.csv: neither begins"),
    ({"train.csv": b"\xff\xfe\x00"}, "train", "train.csv: .* UTF-8"),
    ({"train.csv": "a.mp4 0\n", "val.txt": "b.mp4 dog\n"}, "train", "train.csv: some labels are whole numbers and others are not"),
    ({"train.csv": "a.mp4 3\n", "classes.txt": "a\nb\n"}, "train", "classes.txt: has 2 names, but the lists hold the label 3"),
    ({"train.csv": "a.mp4 0\n", "annotations/classes.txt": ""}, "train", "classes.txt: the list is empty"),
    ({"train.csv": "a.mp4 0\n"}, "train", "none of the 1 listed clips")])
def test_a_bad_list_of_kinetics_is_one_sentence(tmp_path, files, split, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        data.list_clips("kinetics400", put(tmp_path, files), split)
    assert "\n" not in str(error.value)


def test_silent_clips_of_kinetics_are_counted_and_read_as_silence(tmp_path, clip, capsys):
    put(tmp_path, {"a.mp4": clip["sound"], "b.mp4": clip["silent"], "c.mp4": b"", "train.csv": "a.mp4 0\nb.mp4 1\nc.mp4 1\nd.mp4 1\n"})
    data.main(["--data", "kinetics400", "--data-dir", str(tmp_path), "--check", "--workers", "0"])
    assert "1 listed but missing, 2 classes" in (printed := capsys.readouterr().out)
    assert "unreadable 1, without picture 0, without sound 1," in printed and "c.mp4" in printed
    listing = data.list_clips("kinetics400", tmp_path)
    counts = data.check(listing, 0)
    assert (counts["clips"], counts["missing"], counts["no audio"], counts["unreadable"]) == (3, 1, 1, 1)
    clips, troubles = data.Clips(listing, SMALL, functools.partial(data.even_views, 1, SMALL), replace=False), data.Troubles(3)
    troubles.add(data.collate([clips[0, 0], clips[0, 1]]))
    assert troubles.row() == {"bad_clips": 0, "no_video": 0, "no_audio": 1, "short": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Something-Something v2
# ---------------------------------------------------------------------------------------------------------------------

TEMPLATES = ("Holding [something] next to [something]", "Closing [something]", "Tearing [something] just a little bit")


def ssv2(numbers):
    """The text of a list: clip n has template n % 3."""
    return json.dumps([{"id": str(100 + n), "label": "holding a cup", "template": TEMPLATES[n % 3], "placeholders": []} for n in numbers])


def classes(order=(2, 0, 1)):
    """The text of labels.json: template n has the number order[n]."""
    return json.dumps({t.replace("[", "").replace("]", ""): str(n) for t, n in zip(TEMPLATES, order)})


@pytest.mark.parametrize("stem", ["something-something-v2-", "", "labels/something-something-v2-", "labels/"])
def test_a_template_without_its_brackets_is_the_class_of_a_clip_without_sound(tmp_path, clip, stem):
    there = {100: "20bn/100.webm", 101: "101.webm", 103: "v/w/103.mp4", 104: "20bn/104.webm"}
    put(tmp_path, {**{f: clip["silent"] for f in there.values()}, f"{stem}labels.json": classes(), f"{stem}train.json": ssv2((0, 1, 2)),
                   f"{stem}validation.json": ssv2((3, 4)), f"{stem}test.json": json.dumps([{"id": "100"}])})
    train, test, both = (data.list_clips("ssv2", tmp_path, split) for split in ("train", "test", "all"))
    closing, tearing, holding = train.classes
    assert holding == "Holding something next to something" and closing == "Closing something" and test.classes == train.classes
    assert named(train) == {there[100]: holding, there[101]: closing} and train.missing == 1 and train.seconds is None
    assert named(test) == {there[103]: holding, there[104]: closing} and test.missing == 0 and len(both) == 4 and both.missing == 1
    counts = data.check(both, 0)
    assert (counts["no audio"], counts["no video"], counts["unreadable"]) == (4, 0, 0) and counts["seconds"] == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("files, split, sentence", [
    ({"labels.json": None}, "train", "v2-labels.json: there is no such file; .* labels.json into labels/"),
    ({"train.json": None}, "train", "v2-train.json: there is no such file"),
    ({"validation.json": None}, "test", "v2-validation.json: there is no such file"),
    ({"train.json": ""}, "train", "train.json: cannot be read as json"),
    ({"train.json": "[{"}, "train", "train.json: cannot be read as json"),
    ({"train.json": b"\xff\xfe\x00"}, "train", "train.json: cannot be read as json"),
    ({"train.json": "[" * 10 ** 5}, "train", "train.json: cannot be read as json"),
    ({"train.json": "[]"}, "train", "train.json: the list is empty"), ({"labels.json": "{}"}, "train", "labels.json: the list is empty"),
    ({"labels.json": '["Closing something"]'}, "train", "labels.json: does not give each template a number"),
    ({"labels.json": '{"Closing something": "one"}'}, "train", "labels.json: does not give each"),
    ({"labels.json": '{"Closing something": null}'}, "train", "labels.json: does not give each"),
    ({"labels.json": classes((0, 1, 3))}, "train", "labels.json: does not give each"),
    ({"labels.json": classes((0, 1, 1))}, "train", "labels.json: does not give each"),
    ({"train.json": '[{"id": "100"}]'}, "train", "train.json: is not a list of entries with an id and a template"),
    ({"train.json": '{"id": "100", "template": "x"}'}, "train", "train.json: is not a list"),
    ({"train.json": "3"}, "train", "train.json: is not a list"),
    ({"train.json": '[{"id": "100", "template": 3}]'}, "train", "train.json: is not a list"),
    ({"validation.json": '[{"id": "1", "template": "Juggling [a b]"}]'}, "test", "validation.json: unknown template 'Juggling a b'"),
    ({}, "train", "none of the 2 listed clips")])
def test_a_bad_list_of_something_something_is_one_sentence(tmp_path, files, split, sentence):
    files = {"labels.json": classes(), "train.json": ssv2((0, 1)), "validation.json": ssv2((2,)), **files}
    with pytest.raises(UserError, match=sentence) as error:
        data.list_clips("ssv2", put(tmp_path, {f: text for f, text in files.items() if text is not None}), split)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Three crops of a test view
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(36, 60), (60, 36), (36, 36), (37, 36), (72, 121), (33, 50)])
def test_the_three_crops_are_the_start_the_middle_and_the_end_of_the_longer_side(height, width):
    """Against slices of the resized picture."""
    inputs = Inputs(size=32, resize=36)
    video = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    small = data.transforms.functional.resize(video, 36, antialias=True)                                # itself where the short side is 36
    h, w = small.shape[2:]
    assert min(h, w) == 36 and (min(height, width) != 36 or torch.equal(small, video))
    for crop, along in (("first", 0), ("center", round((max(h, w) - 32) / 2)), ("last", max(h, w) - 32)):
        expected = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        for y in range(32):
            for x in range(32):
                expected[:, :, y, x] = small[:, :, 2 + y, along + x] if w >= h else small[:, :, along + y, 2 + x]
        assert torch.equal(data.crop_transform(inputs, crop)(video), expected), crop


@pytest.mark.parametrize("inputs", [SMALL, Inputs(seconds=4.0, video_seconds=1.0)])
def test_one_crop_is_what_it_ever_was_and_three_stand_beside_each_other_at_each_place(inputs):
    plain, several = (data.even_views(2, inputs, None, 9.0, **more) for more in ({}, {"crops": 3}))
    part = [(at, 1.0) if inputs.video_seconds else None for at in (0.0, 8.0)]
    assert plain == data.even_views(2, inputs, None, 9.0, crops=1) == [
        View(0.0, inputs.seconds, "center", True, part[0]), View(9.0 - inputs.seconds, inputs.seconds, "center", True, part[1])]
    assert several == [view._replace(video=crop) for view in plain for crop in ("first", "center", "last")]
    assert {view.video for view in data.even_views(2, inputs, None, 9.0, video=False, crops=3)} == {None}


@pytest.mark.parametrize("portrait", [False, True])
def test_views_with_three_crops_reach_both_ends_of_the_longer_side_and_hear_the_same(tmp_path, portrait):
    """On a real clip whose left (upper) fifth is red, whose right (lower) fifth is blue, and which grows louder."""
    frames = np.full((24, 64, 128, 3), 128, np.uint8)
    frames[:, :, :26], frames[:, :, -26:] = (255, 0, 0), (0, 0, 255)
    data.write_clip(tmp_path / "a.mp4", frames.transpose(0, 2, 1, 3) if portrait else frames, tone(440, 2) * np.linspace(0, 1, 32000))
    inputs = Inputs(seconds=0.5, frames=2, size=32, resize=32, n_mels=16)
    listing = data.make_listing("x", tmp_path, ["a.mp4"], None, [])
    one, three = (data.Clips(listing, inputs, functools.partial(data.even_views, 2, inputs, crops=n))[0, 0] for n in (1, 3))
    assert three["present"].tolist() == [[True, True]] * 6 and len(three["video"]) == len(three["audio"]) == 6
    assert three["audio"][0].mean() < three["audio"][3].mean()
    for place in range(2):
        first, centre, last = three["video"][3 * place:3 * place + 3]
        assert torch.equal(centre, one["video"][place]) and all(torch.equal(a, one["audio"][place]) for a in three["audio"][3 * place:][:3])
        start, end = (first[:, :, :6], last[:, :, -6:]) if portrait else (first[..., :6], last[..., -6:])
        assert start[0].float().mean() > 200 and start[2].float().mean() < 60 and end[2].float().mean() > 200
        assert centre.float().mean((1, 2, 3)) == pytest.approx([128] * 3, abs=6)


def test_the_frames_of_a_place_are_decoded_once_for_its_crops(tmp_path, clip, monkeypatch):
    put(tmp_path, {"a.mp4": clip["sound"]})
    asked, real = [], data.read_windows

    def spy(path, plan, *rest):
        return real(path, lambda duration: asked.append(plan(duration)) or asked[0], *rest)

    monkeypatch.setattr(data, "read_windows", spy)
    data.Clips(data.make_listing("x", tmp_path, ["a.mp4"], None, []), SMALL, functools.partial(data.even_views, 2, SMALL, crops=3))[0, 0]
    (video, audio), = asked
    assert video == audio and len(video) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """{method: folder of its untrained checkpoint}: AV-JEPA, with views of half a second, and A-JEPA, which takes sound alone."""
    folders = {}
    for method in ("avjepa_lejepa", "ajepa"):
        both, folders[method] = method == "avjepa_lejepa", tmp_path_factory.mktemp(method)
        config = dict(size="toy", video=dict(shape=(2, 16, 16), patch=(2, 8, 8)) if both else None, cls=both, absent="zero",
                      audio=dict(shape=(16, SMALL.mel_frames), patch=(16, 17)))
        common.save_checkpoint(folders[method] / "latest.pt", method=method, step=0, args=dict(seed=0), inputs=asdict(SMALL),
                               encoder=config, weights="encoder",
                               model={f"encoder.{k}": v for k, v in common.ViT(**config).state_dict().items()})
    return folders


@pytest.fixture(scope="session")
def kinetics(tmp_path_factory, clip):
    """8 clips for training and 4 for the test, of two classes; one has no sound, one does not decode, and one is missing."""
    parts = {"train": range(8), "val": range(8, 12)}
    return put(tmp_path_factory.mktemp("kinetics"), {
        **{f"{s}/{n}.mp4": b"" if n == 11 else clip["silent" if n == 1 else "sound"] for s in parts for n in parts[s]},
        **{f"{s}.csv": "".join(f"{s}/{n}.mp4 {n % 2}\n" for n in [*parts[s], 99]) for s in parts}})


@pytest.fixture(scope="session")
def something(tmp_path_factory, clip):
    """6 clips for training and 3 for the test."""
    return put(tmp_path_factory.mktemp("ssv2"), {**{f"{100 + n}.webm": clip["silent"] for n in range(9)}, "labels.json": classes(),
                                                 "train.json": ssv2(range(6)), "validation.json": ssv2(range(6, 9))})


def last_row(run):
    return json.loads((run / "probe.jsonl").read_text().splitlines()[-1])


def flags(run, name, folder, *more):
    return ["--ckpt", str(run), "--data", name, "--data-dir", str(folder), "--workers", "0", "--device", "cpu", *map(str, more)]


def test_a_probe_of_kinetics_is_tested_on_8_x_3_views_by_the_flags_that_a_newcomer_gives(runs, kinetics, tmp_path):
    words = [sys.executable, str(ROOT / "probe.py"), *flags(runs["avjepa_lejepa"], "kinetics400", kinetics, "--epochs", 2)]
    done = command([*map(str, words)], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    row = last_row(runs["avjepa_lejepa"])
    assert (row["views"], row["crops"], row["modality"], row["metric"], row["N"], row["left_out"]) == (8, 3, "av", "top-1", 3, 1)
    assert "11.mp4" in done.stderr + done.stdout and done.stdout.count("1 listed but missing, 2 classes") == 2


@pytest.mark.parametrize("kind, more, online", [
    ("linear", [], False), ("attentive", [], False), ("attentive", ["--cache-gb", 1.5e-4], True), ("finetune", [], True),
    ("attentive", ["--cache-gb", 1.5e-4, "--crops", 1], False), ("finetune", ["--crops", 1, "--views", 3], True)])
def test_each_probe_trains_as_ever_and_averages_all_views_and_crops_of_a_test_clip(kind, more, online, runs, kinetics, monkeypatch):
    """112 views of 7 tokens (and CLS) of 128 dimensions in bf16 are 200 kB, with one crop they are 86 kB."""
    seen, asked, averaged, ways = [], [], [], []

    def spy(module, name, note):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: note(*a, **k) or real(*a, **k))

    spy(data, "even_views", lambda count, *a, crops=1, **k: seen.append((count, crops)))
    spy(data, "eval_loader", lambda listing, inputs, plan, batch, *a: asked.append(batch))
    spy(probe, "average", lambda scores, many: averaged.append(scores.shape[-2]))
    spy(probe, "probe_online", lambda *a: ways.append("online"))
    probe.main(flags(runs["avjepa_lejepa"], "kinetics400", kinetics, "--probe", kind, "--epochs", 1, "--lr", 1e-3, *more))
    views, crops = (3 if "--views" in more else 8), (1 if "--crops" in more else 3)
    assert bool(ways) == online and set(seen) == ({(views, crops)} if online else {(2, 1), (views, crops)})
    assert asked[-1] == 32 // (views * crops) and averaged[-1] == views * crops
    assert seen.count((views, crops)) == 3                                                              # each clip that can be read, once
    row = last_row(runs["avjepa_lejepa"])
    assert (row["views"], row["crops"], row["N"], row["probe"]) == (views, crops, 3, kind)


def test_the_score_of_a_clip_is_the_mean_over_its_views_and_crops(runs, kinetics):
    """The cached features of 2 x 3 views, against the encoder on each view alone."""
    encoder, listing = common.load_encoder(runs["avjepa_lejepa"]), data.list_clips("kinetics400", kinetics, "test")
    cpu = common.Process(torch.device("cpu"))
    got, index = probe.extract({"it": encoder}, listing, SMALL, ["video"], 2, cpu, 0, crops=3)
    assert index.tolist() == [0, 1, 2] and got["it", "video"].shape == (3, 6, 128)
    for i in range(3):
        frames = data.read_windows(listing.path(i), lambda duration: ([(0.0, 0.5), (duration - 0.5, 0.5)], []), 2, 20, 16000)["video"]
        for n, (place, crop) in enumerate((place, crop) for place in range(2) for crop in ("first", "center", "last")):
            view = data.crop_transform(SMALL, crop)(torch.from_numpy(frames[place]).permute(0, 3, 1, 2))
            alone = encoder(video=data.normalize_video(view.transpose(0, 1))[None])[1][0]
            assert torch.allclose(got["it", "video"][i, n], alone, atol=1e-5)
    head = probe.LinearHead(128, 2)
    torch.nn.init.normal_(head.linear.weight)
    scores = probe.average(probe.predict(head, got["it", "video"], "cpu"), False)
    slow = sum(head.eval()(None, got["it", "video"][:, n]).softmax(-1) for n in range(6)) / 6
    assert torch.allclose(scores, slow, atol=1e-6)


@pytest.mark.parametrize("name, seconds, how, expected", [
    ("kinetics400", 10.0, {}, ("av", 8, 3)), ("kinetics400", 10.0, {"probe": "finetune"}, ("av", 8, 3)),
    ("kinetics400", 10.0, {"modality": "video"}, ("video", 8, 3)), ("kinetics400", 10.0, {"modality": "audio"}, ("audio", 8, 1)),
    ("kinetics400", 10.0, {"crops": 1, "views": 2}, ("av", 2, 1)), ("kinetics400", 0.5, {}, ("av", 1, 3)),
    ("ssv2", None, {}, ("video", 2, 3)), ("ssv2", None, {"probe": "finetune"}, ("video", 2, 3)),
    ("ssv2", None, {"views": 1}, ("video", 1, 3)), ("toy", None, {"crops": 3}, ("av", 4, 3)),
    ("vggsound", 10.0, {}, ("av", 4, 1)), ("vggsound", 10.0, {"probe": "finetune"}, ("av", 6, 1))])
def test_views_and_crops_are_those_of_v_jepa_on_its_two_sets_unless_others_are_given(runs, name, seconds, how, expected):
    args = argparse.Namespace(**dict(data=name, modality=None, seconds=None, views=None, crops=None, probe="linear") | how)
    listing = data.make_listing(name, "", ["a.mp4"], [[0]], ["a"], seconds=seconds)
    probe.choose_views(args, common.load_encoder(runs["avjepa_lejepa"]), listing)
    assert (args.modality, args.views, args.crops) == expected and args.train_views == (1 if seconds == 0.5 else 2)


def test_features_in_a_file_keep_one_centre_crop(runs, kinetics, tmp_path):
    words = flags(runs["avjepa_lejepa"], "kinetics400", kinetics, "--save-features", tmp_path / "f.npz", "--patch-level", "--split", "test")
    probe.main([*words, "--views", "2"])
    with np.load(tmp_path / "f.npz") as got:
        assert got["patch"].shape[:2] == (3, 2) and got["labels"].tolist() == [0, 1, 0]
    for crops in ("1", "3"):
        with pytest.raises(UserError, match="--crops has no effect without a probe; leave --save-features out"):
            probe.main([*words, "--crops", crops])


# ---------------------------------------------------------------------------------------------------------------------
# A set without sound
# ---------------------------------------------------------------------------------------------------------------------

def test_a_set_without_sound_is_probed_by_its_pictures(runs, something):
    run = runs["avjepa_lejepa"]
    probe.main(flags(run, "ssv2", something, "--epochs", 1, "--lr", 1e-3))
    row = last_row(run)
    assert (row["modality"], row["views"], row["crops"], row["N"], row["classes"]) == ("video", 2, 3, 3, 3)


@pytest.mark.parametrize("method, more, sentence", [
    ("avjepa_lejepa", ["--modality", "av"], "--modality av: ssv2 has no sound; use --modality video"),
    ("avjepa_lejepa", ["--modality", "audio"], "--modality audio: ssv2 has no sound"), ("ajepa", [], "ajepa takes no video")])
def test_a_probe_of_sound_is_refused_where_there_is_none(method, more, sentence, runs, something):
    with pytest.raises(UserError, match=sentence) as error:
        probe.main(flags(runs[method], "ssv2", something, *more))
    assert "\n" not in str(error.value)


def test_crops_of_sound_are_refused(runs, kinetics):
    with pytest.raises(UserError, match="--crops 3: --modality audio has no pictures to crop"):
        probe.main(flags(runs["avjepa_lejepa"], "kinetics400", kinetics, "--modality", "audio", "--crops", 3))


@pytest.mark.parametrize("name, sentence", [("ssv2", "--data ssv2 has no sound; retrieval needs both"), ("esc50", "has no pictures")])
def test_retrieval_needs_sound_and_pictures(name, sentence, runs, tmp_path):
    with pytest.raises(UserError, match=sentence):
        retrieval.main(flags(runs["avjepa_lejepa"], name, tmp_path))


@pytest.mark.parametrize("method, more", [(ajepa, []), (avjepa_lejepa, []), (mjepa, []), *[
    (mjepa, ["--terms", terms]) for terms in mjepa.TERMS if terms != "separate-video"]])
def test_a_method_that_needs_sound_refuses_a_set_without(method, more, something, tmp_path):
    words = ["--data", "ssv2", "--data-dir", str(something), "--recipe", "toy", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--data ssv2 has no sound; .*separate-video") as error:
        method.main([*words, *more])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_pictures_alone_train_the_pictures_alone(something):
    args, recipe = mjepa.get_args(["--data", "ssv2", "--data-dir", str(something), "--terms", "separate-video"])
    plan = functools.partial(mjepa.plan_views, seconds=1.0, video_seconds=0.5, modalities=("video",))
    clips, troubles = data.Clips(data.list_clips("ssv2", something), SMALL, plan), data.Troubles(6)
    troubles.add(batch := data.collate([clips[0, i] for i in range(6)]))
    assert recipe["terms"] == "separate-video" and "audio" not in batch and batch["video"].shape == (6, 3, 2, 16, 16)
    assert troubles.row() == {"bad_clips": 0, "no_video": 0, "no_audio": 0, "short": 0}                 # sound that nobody asked for
