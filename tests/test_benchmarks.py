"""Sets of sound alone, views of another length, fine-tuning and features in a file do what they say."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import probe
from common import UserError
from conftest import ROOT, command, tone, write

TONES = (400, 1100, 3000)                               # Hz, of classes 0, 1, 2


def sound(path, wave, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, wave=wave, rate=rate, audio="flac" if path.suffix == ".flac" else "pcm_s16le")


def note(c, seconds, rate=16000, seed=0, channels=1):
    """The tone of class c in noise, at a random loudness."""
    rng = np.random.default_rng(seed)
    wave = tone(TONES[c], seconds, rate, rng.uniform(0.1, 0.4)) + 0.01 * rng.standard_normal(round(seconds * rate))
    return np.stack([wave] * channels)


def names(listing, indices=None):
    return [bytes(listing.files[i]).decode() for i in (range(len(listing)) if indices is None else indices)]


def make_esc50(folder):
    """Five folds of 3 classes x 3 clips, whose targets are 2, 7 and 30; three clips are missing, silent, and empty."""
    rows = [(fold, c) for fold in range(1, 6) for _ in range(3) for c in range(3)]
    for n, (fold, c) in enumerate(rows):
        rate, end = ((44100, "wav"), (16000, "flac"), (22050, "wav"))[n % 3]
        path = folder / "audio" / f"{fold}-{n}-A-{(30, 2, 7)[c]}.{end}"
        sound(path, note(c, 2.0, rate, n, 1 + n % 2) * (n != 1), rate)                         # clip 1 is digital silence
        if n == 0:
            path.write_bytes(b"")
        elif n == 2:
            path.unlink()
    (folder / "meta").mkdir()
    with open(folder / "meta" / "esc50.csv", "w", newline="") as f:
        csv.writer(f).writerows([("filename", "fold", "target", "category", "esc10", "src_file", "take")] + [
            (f"{fold}-{n}-A-{(30, 2, 7)[c]}.wav", fold, (30, 2, 7)[c], ("zebra", "siren", "door")[c], "False", n, "A")
            for n, (fold, c) in enumerate(rows)])
    return folder


def make_speech(folder):
    """Words 'no', 'on', 'yes' with 10 clips each, of which 8 train, 9 validate, 10 and 11 test; 11 is not on disk."""
    for c, word in enumerate(("no", "on", "yes")):
        for n in range(11):
            sound(folder / word / f"{n:02d}_nohash_0.wav", note(c, 1.0 if n else 0.4, seed=n))
    sound(folder / "_background_noise_" / "tap.wav", note(0, 3.0))
    (folder / "no" / "03_nohash_0.wav").write_bytes(b"garbage" * 100)
    for part, numbers in (("validation", (9,)), ("testing", (10, 11))):
        (folder / f"{part}_list.txt").write_text("".join(f"{w}/{n:02d}_nohash_0.wav\n" for w in ("no", "on", "yes") for n in numbers))
    (folder / "README.md").touch()
    return folder


def make_fsd50k(folder):
    """12 development clips (4 of them validation) and 6 for the test, of .3 to 25 s; one of each is missing."""
    truth = folder / "FSD50K.ground_truth"
    truth.mkdir(parents=True)
    (truth / "vocabulary.csv").write_text("0,Siren,/m/0\n1,Bark,/m/1\n2,Accordion,/m/2\n")
    word = ("Siren", "Bark", "Accordion")
    dev, test = [], []
    for n in range(12):
        labels = word[n % 3] if n % 2 else f"{word[n % 3]},{word[(n + 1) % 3]}"
        dev.append((100 + n, labels, "/m/0", ("train", "val")[n % 3 == 2]))
        if n != 11:
            wave = note(n % 3, 0.3 if n == 0 else 1.0, 44100, n)
            sound(folder / "FSD50K.dev_audio" / f"{100 + n}.{'flac' if n == 4 else 'wav'}", wave, 44100)
    for n in range(6):
        test.append((200 + n, word[n % 3], "/m/0"))
        if n != 5:
            sound(folder / "FSD50K.eval_audio" / f"{200 + n}.wav", note(n % 3, 25.0 if n == 1 else 0.5, seed=n))
    for part, rows in (("dev", [("fname", "labels", "mids", "split"), *dev]), ("eval", [("fname", "labels", "mids"), *test])):
        with open(truth / f"{part}.csv", "w", newline="") as f:
            csv.writer(f).writerows(rows)
    return folder


@pytest.fixture(scope="session")
def esc50(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("ESC-50"))


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    return make_speech(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def fsd50k(tmp_path_factory):
    return make_fsd50k(tmp_path_factory.mktemp("FSD50K"))


@pytest.fixture(scope="session")
def wavs(tmp_path_factory):
    """A folder without labels: 6 clips of 3 to 8 s, and a broken one."""
    folder = tmp_path_factory.mktemp("wavs")
    for n in range(6):
        sound(folder / f"{n} ü.{('wav', 'flac')[n % 2]}", note(n % 3, 3.0 + n, seed=n))
    (folder / "broken.wav").write_bytes(b"garbage" * 50)
    return folder


def start(*words, cwd):
    return command([sys.executable, str(ROOT / words[0]), *map(str, words[1:])], cwd)


@pytest.fixture(scope="session")
def ajepa(wavs, tmp_path_factory):
    """The folder of a run of A-JEPA: 2 steps of the toy recipe, views of 3.84 s, 4 blocks of 128 dimensions."""
    folder = tmp_path_factory.mktemp("runs")
    done = start("ajepa.py", "--data", "folder", "--data-dir", wavs, "--recipe", "toy", "--steps", 2, "--batch-size", 4, "--workers", 0,
                 "--max-bad", 1, "--out", folder / "run", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run"


@pytest.fixture(scope="session")
def avjepa(ajepa, tmp_path_factory):
    """A checkpoint of AV-JEPA as it was initialised: one encoder, for video and audio."""
    folder, content = tmp_path_factory.mktemp("avjepa"), common.load_checkpoint(ajepa)
    inputs = {"seconds": 2.0, "frames": 4, "size": 32, "resize": 36}
    config = dict(size="toy", video=dict(shape=(4, 32, 32), patch=(2, 16, 16)), audio=dict(shape=(128, 201), patch=(16, 16)), cls=True,
                  absent="zero")
    vit = common.ViT(**config)
    content.update(method="avjepa_lejepa", inputs=inputs, encoder=config, weights="encoder",
                   model={f"encoder.{k}": v for k, v in vit.state_dict().items()})
    common.save_checkpoint(folder / "latest.pt", **content)
    return folder


def last_row(run):
    return json.loads((run / "probe.jsonl").read_text().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The sets
# ---------------------------------------------------------------------------------------------------------------------

def test_esc50_lists_all_clips_in_both_splits_with_their_fold_and_categories_in_the_order_of_their_targets(esc50):
    train, test = data.list_clips("esc50", esc50), data.list_clips("esc50", esc50, "test")
    assert names(train) == names(test) == names(data.list_clips("esc50", esc50, "all"))
    assert len(train) == 44 and train.missing == 1 and train.classes == ["siren", "door", "zebra"] and train.seconds == 5.0
    assert {Path(f).suffix for f in names(train)} == {".wav", ".flac"}
    for i, f in enumerate(names(train)):
        fold, _, _, target = Path(f).stem.split("-")
        assert train.fold[i] == int(fold) and train.classes[train.targets([i])] == {"2": "siren", "7": "door", "30": "zebra"}[target]
        assert Path(train.path(i)).is_file()


def test_speech_commands_respects_the_official_lists_and_drops_the_background_noise(speech):
    train, test = (data.list_clips("speechcommands", speech, s) for s in ("train", "test"))
    assert train.classes == test.classes == ["no", "on", "yes"] and train.seconds == test.seconds == 1.0
    assert names(test) == [f"{w}/10_nohash_0.wav" for w in ("no", "on", "yes")] and test.missing == 3 and test.held is None
    assert len(train) == 30 and train.missing == 0 and not set(names(train)) & set(names(test))
    assert [f for f, h in zip(names(train), train.held) if h] == [f"{w}/09_nohash_0.wav" for w in ("no", "on", "yes")]
    assert train.targets(range(30)).tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert sorted(names(data.list_clips("speechcommands", speech, "all"))) == sorted(names(train) + names(test))


def test_fsd50k_lists_several_labels_for_a_clip_and_its_official_validation_clips(fsd50k):
    train, test = (data.list_clips("fsd50k", fsd50k, s) for s in ("train", "test"))
    assert train.classes == test.classes == ["Siren", "Bark", "Accordion"] and train.multilabel and train.seconds is None
    assert (len(train), train.missing, len(test), test.missing) == (11, 1, 5, 1)
    assert "FSD50K.dev_audio/104.flac" in names(train) and names(test)[0] == "FSD50K.eval_audio/200.wav"
    assert [f[-7:-4] for f, h in zip(names(train), train.held) if h] == ["102", "105", "108"]
    assert train.targets([0, 1]).tolist() == [[1, 1, 0], [0, 1, 0]] and test.held is None


def test_a_subset_and_both_splits_together_keep_what_belongs_to_the_clips(esc50, speech, fsd50k):
    folds, held, both = data.list_clips("esc50", esc50), data.list_clips("speechcommands", speech), data.list_clips("fsd50k", fsd50k, "all")
    some = folds.subset([5, 20, 3])
    assert some.fold.tolist() == folds.fold[[5, 20, 3]].tolist() and some.seconds == 5.0 and some.held is None
    assert held.subset([29, 0]).held.tolist() == [True, False] and len(held.subset([])) == 0
    assert len(both) == 16 and both.missing == 2 and both.targets([11]).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("name", ["audioset", "audioset-20k"])
def test_audioset_lists_and_reads_a_folder_of_sounds_alone(name, tmp_path):
    ids = [f"{n:011d}" for n in range(4)]
    for n, i in enumerate(ids):
        sound(tmp_path / "deep" / (f"Y{i}.wav" if n % 2 else f"{i}.flac"), note(n % 3, 1.0), 16000)
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/a,A\n1,/m/b,B\n")
    for part, rows in (("unbalanced_train", ids[:2]), ("balanced_train", ids[:2]), ("eval", ids[2:] + ["missingmiss"])):
        (tmp_path / f"{part}_segments.csv").write_text("# a\n" + "".join(f'{i}, 0.000, 10.000, "/m/a,/m/b"\n' for i in rows))
    train, test = (data.list_clips(name, tmp_path, s) for s in ("train", "test"))
    assert names(train) == [f"deep/{ids[0]}.flac", f"deep/Y{ids[1]}.wav"] and len(test) == 2 and test.missing == 1
    for listing in (train, test):
        assert all(data.load_clip(listing.path(i), data.Inputs(seconds=1.0)).keys() == {"audio"} for i in range(2))


@pytest.mark.parametrize("rate,end,channels", [(44100, "wav", 2), (48000, "flac", 1), (22050, "flac", 2), (8000, "wav", 1)])
def test_a_tone_at_any_rate_becomes_16_khz_mono_with_its_frequency_and_the_mean_of_the_channels(rate, end, channels, tmp_path):
    wave = np.stack([tone(1000, 2, rate, 0.6), tone(1000, 2, rate, 0.2)][:channels])
    clip = data.read_clip(sound(tmp_path / f"a.{end}", wave, rate), 0.0, 2.0)
    part = clip["audio"][4000:28000]                                                    # 1.5 s: away from the filter's edges
    spectrum = np.abs(np.fft.rfft(part)) / len(part) * 2
    assert clip["audio"].shape == (32000,) and spectrum.argmax() * 16000 / len(part) == pytest.approx(1000)
    assert spectrum.max() == pytest.approx(wave.max(1).mean(), rel=0.01) and not clip["has_video"]


def test_silent_empty_and_broken_clips_are_finite_or_named(esc50, speech, capsys):
    listing = data.list_clips("esc50", esc50)
    silent, empty = (next(i for i, f in enumerate(names(listing)) if f"/1-{n}-" in f) for n in (1, 0))
    assert torch.isfinite(data.load_clip(listing.path(silent), data.Inputs())["audio"]).all()
    assert data.check(listing.subset([silent, empty]), 0)["unreadable"] == 1
    assert data.check(data.list_clips("speechcommands", speech), 0)["unreadable"] == 1
    printed = "".join(capsys.readouterr())
    assert printed.count("unreadable: ") == 2 and "the file is empty" in printed and "03_nohash_0.wav" in printed


@pytest.mark.parametrize("name,file,text,sentence", [
    ("esc50", "meta/esc50.csv", None, "no such file"), ("esc50", "meta/esc50.csv", "", "is empty"),
    ("esc50", "meta/esc50.csv", "filename,fold\na.wav,1\n", "lacks one of the columns"),
    ("esc50", "meta/esc50.csv", "filename,fold,target,category\na.wav,1\n", "lacks one of the columns"),
    ("esc50", "meta/esc50.csv", "filename,fold,target,category\na.wav,one,0,dog\n", "not a whole number"),
    ("esc50", "meta/esc50.csv", "filename,fold,target,category\na.wav,1,0,dog\nb.wav,1,0,cat\n", "two categories"),
    ("esc50", "meta/esc50.csv", "filename,fold,target,category\na.wav,1,0,dog\n", "none of the 1 listed"),
    ("speechcommands", "testing_list.txt", None, "no such file"), ("speechcommands", "testing_list.txt", "yes\n", "word/file.wav"),
    ("speechcommands", "validation_list.txt", b"\xff\xfe\x00", "UTF-8"),
    ("fsd50k", "FSD50K.ground_truth/vocabulary.csv", "Siren\n", "index,label,mid"),
    ("fsd50k", "FSD50K.ground_truth/vocabulary.csv", "0,Siren,/m/0\n2,Bark,/m/1\n", "index,label,mid"),
    ("fsd50k", "FSD50K.ground_truth/dev.csv", "fname,labels,mids,split\n1,Cough,/m/0,train\n", "unknown class 'Cough'"),
    ("fsd50k", "FSD50K.ground_truth/dev.csv", "fname,labels,mids\n1,Siren,/m/0\n", "lacks one of the columns"),
    ("fsd50k", "FSD50K.ground_truth/dev.csv", "fname,labels,mids,split\n1,Siren,/m/0,test\n", "neither train nor val")])
def test_a_broken_list_is_one_sentence(name, file, text, sentence, tmp_path):
    good = {"esc50": {}, "speechcommands": {"validation_list.txt": "no/a.wav\n", "testing_list.txt": "no/b.wav\n"},
            "fsd50k": {"FSD50K.ground_truth/vocabulary.csv": "0,Siren,/m/0\n"}}[name]
    for path, content in {**good, file: text}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    for split in ("train", "test") if "testing" in file or name == "esc50" else ("train",):
        with pytest.raises(UserError, match=sentence) as error:
            data.list_clips(name, tmp_path, split)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What trains a head, and what tests it
# ---------------------------------------------------------------------------------------------------------------------

def test_a_cached_head_never_trains_on_official_validation_clips(speech):
    """Their features are not a number: a head that saw them would not be one either."""
    listing = data.list_clips("speechcommands", speech)
    index = torch.tensor([i for i in range(30) if i != 3])                             # one does not decode
    y, g = listing.targets(index), torch.Generator().manual_seed(0)
    x = torch.randn(29, 1, 8, generator=g) + 5 * torch.nn.functional.one_hot(y, 8)[:, None]
    x[torch.from_numpy(listing.held[index])] = float("nan")
    inner, held = split = probe.hold_out(listing, index, 0)
    assert names(listing, index[held]) == [f"{w}/09_nohash_0.wav" for w in ("no", "on", "yes")] and len(inner) == 26
    seen = x[inner]
    assert probe.probe_cached("linear", x, y, seen, y[inner], 3, (1e-2,), 30, 8, 0, split=split)["value"] == 100


def test_the_held_out_clips_are_the_official_ones_or_a_tenth(esc50, speech):
    listing, plain = data.list_clips("speechcommands", speech), data.list_clips("esc50", esc50)
    assert [len(part) for part in probe.hold_out(listing, range(30), 0, needed=False)] == [27, 3]
    assert [len(part) for part in probe.hold_out(plain, range(44), 0)] == [40, 4]
    assert probe.hold_out(plain, range(44), 0, needed=False)[1] is None
    with pytest.raises(UserError, match="fewer than two training clips"):
        probe.hold_out(listing.subset([9, 19, 0]), range(3), 0)


def quick(run, name, folder, *more):
    """The row of a probe started in this process."""
    probe.main(["--ckpt", str(run), "--data", name, "--data-dir", str(folder), "--workers", "0", "--device", "cpu", "--epochs", "1",
                "--batch-size", "8", *map(str, more)])
    return last_row(run)


@pytest.mark.parametrize("kind", ["finetune", "attentive"])
def test_decoding_anew_never_trains_on_validation_or_test_clips(kind, ajepa, speech, monkeypatch):
    trained, whole = set(), data.Clips

    def spy(listing, inputs, plan, seed=0, replace=True):
        trained.update(names(listing) if replace else ())
        return whole(listing, inputs, plan, seed, replace)

    monkeypatch.setattr(data, "Clips", spy)
    row = quick(ajepa, "speechcommands", speech, "--probe", kind, "--lr", 1e-3, *(["--cache-gb", 0] if kind == "attentive" else []))
    assert trained == {f"{w}/{n:02d}_nohash_0.wav" for w in ("no", "on", "yes") for n in range(9)}
    assert row["N"] == 3 and row["held_out"] is not None and row["view_seconds"] == 1.0 and row["views"] == 1


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_each_fold_is_tested_only_on_itself_by_a_head_trained_on_the_others(kind, ajepa, esc50, monkeypatch):
    calls, listing = [], data.list_clips("esc50", esc50)
    fold_of = dict(zip(names(listing), listing.fold))

    def cached(kind, x, y, x_test, y_test, **more):
        calls.append((set(x[:, 0, 0].tolist()), set(x_test[:, 0, 0].tolist())))
        return {"metric": "top-1", "value": float(len(calls)), "classes": 3, "lr": 0.1, "held_out": 0.0, "N": len(y_test)}

    def online(kind, encoder, train, test, *rest):
        encoders.append(encoder)
        calls.append(tuple({float(fold_of[f]) for f in names(part)} for part in (train, test)))
        return {"metric": "top-1", "value": float(len(calls)), "classes": 3, "lr": 0.1, "held_out": None, "N": len(test)}

    def planted(encoders, listing, inputs, modalities, views, *rest, **more):
        read.append(views)
        return {("it", "audio"): torch.from_numpy(listing.fold[1:]).float().view(-1, 1, 1)}, torch.arange(1, len(listing))

    encoders, read = [], []
    monkeypatch.setattr(probe, "probe_cached", cached), monkeypatch.setattr(probe, "probe_online", online)
    monkeypatch.setattr(probe, "extract", planted)
    row = quick(ajepa, "esc50", esc50, "--probe", kind)
    assert calls == [({1.0, 2.0, 3.0, 4.0, 5.0} - {f}, {f}) for f in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert row["folds"] == [1, 2, 3, 4, 5] and row["value"] == 3 and row["N"] == (43 if kind == "linear" else 44)
    assert len(read) == (1 if kind == "linear" else 0) and len({id(e.vit) for e in encoders}) == len(encoders)


def test_the_pitch_of_a_tone_is_found_on_every_fold(ajepa, esc50):
    done = start("probe.py", "--ckpt", ajepa, "--data", "esc50", "--data-dir", esc50, "--epochs", 40, "--batch-size", 12, "--workers", 0,
                 "--device", "cpu", cwd=ajepa)
    assert done.returncode == 0, done.stderr[-2000:]
    row = last_row(ajepa)
    assert len(row["folds"]) == 5 and min(row["folds"]) > 60 and row["value"] == pytest.approx(np.mean(row["folds"]))
    assert row["N"] == 43 and row["left_out"] == 1 and row["modality"] == "audio" and "folds: " in done.stdout
    assert (done.stdout + done.stderr).count("the file is empty") == 1                 # all clips are decoded once


@pytest.mark.parametrize("name", data.SOUNDS)
def test_the_flags_that_a_newcomer_gives_suffice(ajepa, name, request, monkeypatch):
    folder = request.getfixturevalue({"speechcommands": "speech"}.get(name, name))
    real = probe.train_heads
    monkeypatch.setattr(probe, "train_heads", lambda heads, batches, steps, *a, **k: real(heads, batches, min(steps, 3), *a, **k))
    probe.main(["--ckpt", str(ajepa), "--data", name, "--data-dir", str(folder), "--workers", "0", "--device", "cpu"])
    row = last_row(ajepa)
    assert row["data"] == name and row["lrs"] == list(probe.FROZEN_LRS) and row["epochs"] * row["batch_size"] > 0 and row["version"]


def test_windows_cover_a_clip_of_25_seconds_and_are_averaged_to_a_map(ajepa, fsd50k):
    row = quick(ajepa, "fsd50k", fsd50k, "--lr", 1e-2)
    assert row["metric"] == "mAP" and row["views"] == 8 and row["N"] == 5 and row["classes"] == 3      # 8 x 3.84 s are more than 30
    for duration in (0.3, 3.84, 25.0, 30.0):
        views = data.even_views(row["views"], data.Inputs(seconds=row["view_seconds"]), None, duration, video=False)
        for moment in np.arange(0, duration, 0.01):
            assert any(v.start <= moment <= v.start + v.seconds for v in views)


# ---------------------------------------------------------------------------------------------------------------------
# Views of another length
# ---------------------------------------------------------------------------------------------------------------------

def mels(vit, columns, batch=1):
    """Random mels of so many patches in time: (B, 1, F, T)."""
    return torch.randn(batch, 1, vit.audio.shape[0], vit.audio.patch[1] * columns)


def positions_of(vit, columns):
    """What the patcher adds to each token of a mel of so many patches: (rows, columns, D)."""
    with torch.no_grad():
        vit.audio.proj.weight.zero_(), vit.audio.proj.bias.zero_()
        return vit.audio(mels(vit, columns))[0].unflatten(0, (vit.audio.grid[0], columns))


def test_a_shorter_input_takes_the_first_columns_of_the_positions(ajepa):
    encoder = common.load_encoder(ajepa)
    (rows, trained), patch = encoder.vit.audio.grid, encoder.vit.audio.patch[1]
    inputs = data.Inputs(**encoder.inputs).at(1.0, patch)
    columns = inputs.mel_frames // patch                                                # the last patch is filled up with silence
    assert inputs.mel_frames % patch == 0 and 0 <= inputs.mel_frames - (16000 // inputs.hop + 1) < patch and columns < trained
    got, table = positions_of(encoder.vit, columns), encoder.vit.audio.positions
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(got[row, column], table.first[row, 0] + table.rest[0, column])


def test_a_longer_input_takes_linearly_interpolated_positions(ajepa):
    encoder = common.load_encoder(ajepa)
    rows, trained = encoder.vit.audio.grid
    got, table = positions_of(encoder.vit, trained + 9).numpy(), encoder.vit.audio.positions
    known, wanted = ((np.arange(n) + 0.5) / n for n in (trained, trained + 9))          # the middles of the patches, in [0, 1]
    for row in (0, rows - 1):
        for d in (0, 64, 127):
            curve = (table.first[row, 0, d] + table.rest[0, :, d]).detach().numpy()
            assert got[row, :, d] == pytest.approx(np.interp(wanted, known, curve), abs=1e-6)


@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.84, 9.0])
def test_an_encoder_and_the_raw_input_take_sound_of_any_length(seconds, ajepa, wavs):
    encoder = common.load_encoder(ajepa)
    inputs = data.Inputs(**encoder.inputs).at(seconds, encoder.vit.audio.patch[1])
    clip = data.load_clip(sorted(wavs.iterdir())[0], inputs)
    tokens, embedding = encoder(**clip)
    frames, (rows, trained) = round(seconds * 16000) // inputs.hop + 1, encoder.vit.audio.grid
    columns = trained if seconds == encoder.inputs["seconds"] else int(np.ceil(frames / encoder.vit.audio.patch[1]))
    assert tokens.shape == (1, rows * columns, 128) and torch.isfinite(embedding).all()
    assert probe.RawInput()(**clip)[1].shape == (1, 400)


def test_only_sound_may_have_another_length_beside_an_encoder_with_video(avjepa, toy, speech):
    with pytest.raises(UserError, match="--modality audio"):
        probe.main(["--ckpt", str(avjepa), "--data", "toy", "--data-dir", str(toy), "--seconds", "1"])
    with pytest.raises(UserError, match="has no pictures"):
        probe.main(["--ckpt", str(avjepa), "--data", "speechcommands", "--data-dir", str(speech), "--modality", "av"])
    row = quick(avjepa, "speechcommands", speech, "--lr", 1e-2)
    assert row["view_seconds"] == 1.0 and row["modality"] == "audio" and row["N"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ---------------------------------------------------------------------------------------------------------------------

def test_attention_without_own_scores_equals_a_slow_softmax_and_takes_nothing_from_a_barred_tokens_own_value():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=g, requires_grad=True) for _ in range(3))
    mask = probe.bar_own_scores(2, 5, 0.5, "cpu")
    out = common.attention(q, k, v, mask)
    barred = ~mask[:, 0].diagonal(dim1=1, dim2=2)                                       # (B, N)
    assert barred.any() and not barred.all() and (mask | torch.eye(5, dtype=torch.bool)).all()
    for b in range(2):
        for n in range(5):
            others = [m for m in range(5) if m != n or not barred[b, n]]
            for h in range(3):
                weights = torch.tensor([(q[b, h, n] @ k[b, h, m] / 2).exp().item() for m in others])
                expected = sum(w * v[b, h, m] for w, m in zip(weights / weights.sum(), others))
                assert torch.allclose(out[b, h, n], expected, atol=1e-5)
            own = torch.autograd.grad(out[b, :, n].sum(), (k, v), retain_graph=True)
            assert all((part[b, :, n] == 0).all() == barred[b, n] for part in own)


def test_the_share_of_barred_tokens_is_met_and_a_token_alone_is_never_barred():
    mask = probe.bar_own_scores(400, 50, 0.1, "cpu")
    assert (~mask).float().sum().item() / 400 / 50 == pytest.approx(0.1, abs=0.01)
    assert probe.bar_own_scores(64, 1, 1.0, "cpu").all()


def online(run, share, layers=None):
    encoder = common.load_encoder(run, layers=layers)
    torch.manual_seed(0)
    head = probe.LinearHead(encoder.dim, 3)
    torch.nn.init.normal_(head.linear.weight)
    return probe.Online(encoder, [head], "audio", False, share)


def test_regularised_masking_is_for_training_only_and_has_a_finite_gradient(ajepa):
    plain, barred = online(ajepa, 0.0), online(ajepa, 0.5)
    batch = {"audio": mels(plain.vit, 4, 4)}
    assert torch.equal(plain.eval()(batch)[0], barred.eval()(batch)[0])
    assert not torch.allclose(plain.train()(batch)[0], barred.train()(batch)[0])
    barred.train()(batch)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in barred.parameters() if p.grad is not None)


@pytest.mark.parametrize("method,rates", [("ajepa", (1e-3, 1e-5, 0.0)), ("avjepa_lejepa", (2e-4, 1e-5, 0.1))])
def test_fine_tuning_takes_the_rates_of_the_papers(method, rates, ajepa, avjepa, speech, monkeypatch):
    """(head, encoder, label smoothing); no weight decay on the head."""
    seen, smoothing, adam, loss_of = [], set(), torch.optim.AdamW, probe.loss_of
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups: seen.extend(groups) or adam(groups))
    monkeypatch.setattr(probe, "loss_of", lambda s, y, e: smoothing.add(e) or loss_of(s, y, e))
    row = quick({"ajepa": ajepa, "avjepa_lejepa": avjepa}[method], "speechcommands", speech, "--probe", "finetune")
    head, *encoder = seen
    assert (head["peak"], head["weight_decay"]) == (rates[0], 0) and row["lr"] == rates[0] and row["encoder_lr"] == rates[1]
    assert {g["peak"] for g in encoder} == {rates[1]} and {g["weight_decay"] for g in encoder} == {0.05, 0.0} and smoothing == {rates[2]}
    vit = common.load_encoder({"ajepa": ajepa, "avjepa_lejepa": avjepa}[method]).vit
    assert sum(len(g["params"]) for g in encoder) == len(list(vit.parameters()))


def test_fine_tuning_moves_the_encoder_at_its_own_rate(ajepa):
    model = online(ajepa, 0.1, [0, 3])
    optimizer = torch.optim.AdamW(probe.parameter_groups(model, [1e-3], 0.0))
    before = [p.detach().clone() for p in model.vit.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    probe.loss_of(model.train()({"audio": mels(model.vit, 5, 4)})[0], torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.vit.parameters())) and model.heads[0].linear.bias.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Layers, weights, features
# ---------------------------------------------------------------------------------------------------------------------

def test_layers_are_what_hooks_on_the_blocks_see(ajepa):
    encoder, several, seen = common.load_encoder(ajepa), common.load_encoder(ajepa, layers=[0, 3, 2]), {}
    for n, block in enumerate(encoder.vit.transformer.blocks):
        block.register_forward_hook(lambda module, given, out, n=n: seen.update({n: out}))
    mel = mels(encoder.vit, 7, 2)
    last, _ = encoder(audio=mel)
    tokens, embedding = several(audio=mel)
    assert several.dim == 384 and torch.equal(tokens[..., 128:256], last)
    assert torch.equal(tokens, torch.cat([encoder.vit.norm_out(seen[n]) for n in (0, 3, 2)], -1))
    assert torch.allclose(embedding, tokens.mean(1))
    with pytest.raises(UserError, match="--layers 4 is out of range: from 0 to 3"):
        common.load_encoder(ajepa, layers=[0, 4])


def test_context_and_target_encoder_are_the_two_of_the_checkpoint(ajepa, avjepa):
    model = common.load_checkpoint(ajepa)["model"]
    for which in ("context", "target"):
        for key, value in common.load_encoder(ajepa, weights=which).vit.state_dict().items():
            assert torch.equal(value, model[f"{which}_encoder.{key}"])
    assert not torch.equal(model["context_encoder.audio.proj.weight"], model["target_encoder.audio.proj.weight"])
    with pytest.raises(UserError, match="no context encoder of its own"):
        common.load_encoder(avjepa, weights="context")


def features(run, name, folder, out, *more):
    probe.main(["--ckpt", str(run), "--data", name, "--data-dir", str(folder), "--workers", "0", "--device", "cpu", "--save-features",
                str(out), *map(str, more)])
    with np.load(out) as file:                                                          # allow_pickle is off
        return dict(file)


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_features_equal_what_load_encoder_says_of_each_clip(layers, ajepa, wavs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "start_process", lambda device: common.Process(torch.device(device)))        # without bf16
    more = ["--views", 1, "--patch-level", *(["--layers", *layers] if layers else [])]
    got = features(ajepa, "folder", wavs, tmp_path / "f.npz", *more)
    encoder, width = common.load_encoder(ajepa, layers=layers), 128 * len(layers or [0])
    number = encoder.vit.audio.num
    assert got.keys() == {"files", "seconds", "clip", "patch"} and got["seconds"] == encoder.inputs["seconds"]
    assert got["files"].tolist() == [f"{n} ü.{('wav', 'flac')[n % 2]}" for n in range(6)]
    assert got["clip"].shape == (6, width) and got["clip"].dtype == np.float32
    assert got["patch"].shape == (6, 1, number, width) and got["patch"].dtype == np.float16
    for n, file in enumerate(got["files"]):
        tokens, embedding = encoder(**data.load_clip(wavs / str(file), encoder.inputs))
        assert got["clip"][n] == pytest.approx(embedding[0].numpy(), abs=1e-4)
        assert got["patch"][n, 0] == pytest.approx(tokens[0].numpy(), abs=3e-3)         # float16
    printed = "".join(capsys.readouterr())
    assert "broken.wav" in printed and "(1 left out)" in printed and not list(tmp_path.glob("*.part"))


def test_features_are_the_mean_over_the_views_and_come_with_the_labels_of_the_set(ajepa, fsd50k, speech, tmp_path):
    got = features(ajepa, "fsd50k", fsd50k, tmp_path / "f.npz", "--split", "test", "--patch-level")
    assert got["patch"].shape == (5, 8, common.load_encoder(ajepa).vit.audio.num, 128)
    assert got["labels"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert got["classes"].tolist() == ["Siren", "Bark", "Accordion"]
    assert got["clip"] == pytest.approx(got["patch"].astype(np.float32).mean((1, 2)), abs=0.01)
    got = features(ajepa, "speechcommands", speech, tmp_path / "f.npz", "--baseline", "raw")
    assert len(got["files"]) == 32 and got["clip"].shape == (32, 400) and got["seconds"] == 1.0                # one is broken
    assert [got["classes"][c] for c in got["labels"]] == [f.split("/")[0] for f in got["files"]]


def test_clips_that_lack_a_stream_are_left_out_of_the_features_and_named(avjepa, clips, tmp_path, capsys):
    got = features(avjepa, "folder", clips, tmp_path / "f.npz", "--views", 2)
    assert got["files"].tolist() == ["fast.mp4", "good.mp4"] and got["clip"].shape == (2, 128)
    printed = "".join(capsys.readouterr())
    assert all(name in printed for name in ("silent.mp4", "sound.mp4", "sound.wav", "sound.flac")) and "(4 left out)" in printed


def test_a_folder_with_classes_has_labels_for_all_its_files_at_once(tmp_path):
    for name in ("train/a/1.wav", "train/b/2.wav", "test/a/3.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    both = data.list_clips("folder", tmp_path, "all")
    assert names(both) == ["test/a/3.wav", "train/a/1.wav", "train/b/2.wav"] and both.targets(range(3)).tolist() == [0, 0, 1]
    assert names(data.list_clips("folder", tmp_path / "train", "all")) == ["a/1.wav", "b/2.wav"]


# ---------------------------------------------------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,more", [
    ("speechcommands", ["--layers", 0, 1, 3, "--epochs", 1, "--batch-size", 8]),
    ("fsd50k", ["--probe", "finetune", "--regularised-masking", 0.1, "--epochs", 1, "--batch-size", 4, "--encoder", "context"]),
    ("esc50", ["--probe", "finetune", "--head", "attentive", "--seconds", 0.5, "--views", 1, "--epochs", 1, "--batch-size", 16]),
    ("folder", ["--save-features", "clips.npz", "--patch-level"])])
def test_each_command_of_the_docstring_runs(name, more, ajepa, esc50, speech, fsd50k, wavs, tmp_path):
    folder = {"speechcommands": speech, "fsd50k": fsd50k, "esc50": esc50, "folder": wavs}[name]
    done = start("probe.py", "--ckpt", ajepa, "--data", name, "--data-dir", folder, "--workers", int(name == "fsd50k"), "--device", "cpu",
                 *more, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    if name == "folder":
        assert np.load(tmp_path / "clips.npz")["patch"].shape == (6, 4, common.load_encoder(ajepa).vit.audio.num, 128)
    else:
        row = last_row(ajepa)
        assert row["data"] == name and row["metric"] == ("mAP" if name == "fsd50k" else "top-1") and 0 <= row["value"] <= 100
        assert ("folds" in row) == (name == "esc50") and row["regularised_masking"] == (0.1 if name == "fsd50k" else 0)


@pytest.mark.parametrize("more,sentence", [
    (["--regularised-masking", "0.1"], "--regularised-masking has no effect without --probe finetune"),
    (["--encoder-lr", "1e-5"], "--encoder-lr has no effect"), (["--split", "test"], "--split has no effect"),
    (["--patch-level"], "--patch-level has no effect"), (["--encoder", "context", "--baseline", "untrained"], "--encoder has no effect"),
    (["--save-features", "nowhere/f.npz"], "its folder does not exist"), (["--save-features", "."], "is a folder itself"),
    (["--save-features", "f.npz", "--probe", "finetune"], "trains nothing"), (["--layers", "9"], "--layers 9 is out of range"),
    (["--baseline", "raw", "--layers", "1"], "no layers"), (["--seconds", "0"], "out of range"), (["--modality", "av"], "takes no video"),
    (["--probe", "finetune", "--regularised-masking", "2"], "out of range"),
    (["--probe", "finetune", "--lr", "1", "2"], "one learning rate")])
def test_bad_flags_are_one_sentence(more, sentence, ajepa, wavs):
    folder = wavs.parent / "classes"
    for n in range(8):
        if not (folder / "ab"[n % 2] / f"{n}.wav").exists():
            sound(folder / "ab"[n % 2] / f"{n}.wav", note(n % 3, 0.5))
    with pytest.raises(UserError, match=sentence) as error:
        probe.main(["--ckpt", str(ajepa), "--data", "folder", "--data-dir", str(folder), "--device", "cpu", "--workers", "0", *more])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words,sentence", [
    (["--data", "esc50", "--data-dir", "."], "esc50.csv: there is no such file"),
    (["--data", "folder", "--data-dir", ".", "--save-features", "there/is/none.npz"], "its folder does not exist")])
def test_bad_input_ends_with_exit_code_2_and_no_traceback(words, sentence, ajepa, tmp_path):
    done = start("probe.py", "--ckpt", ajepa, *words, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr and "Traceback" not in done.stderr


def test_one_fold_alone_cannot_be_tested(ajepa, tmp_path):
    for n in range(4):
        sound(tmp_path / "audio" / f"{n}.wav", note(n % 2, 0.5))
    (tmp_path / "meta").mkdir()
    rows = [f"{n}.wav,1,{n % 2},{'ab'[n % 2]}\n" for n in range(4)]
    (tmp_path / "meta" / "esc50.csv").write_text("filename,fold,target,category\n" + "".join(rows))
    with pytest.raises(UserError, match="outside of each fold"):
        quick(ajepa, "esc50", tmp_path)
