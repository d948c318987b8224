"""probe.py: which clips train, choose and test; fine-tuning; layers, features in a file; its flags."""
import contextlib
import functools
import itertools
import resource
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import common
import data
import probe
import run
from conftest import CPU, INPUTS, METHOD, ROOT, command, fails, last_row, names, tone, write, write_checkpoint
from slow import record

TONES = {"high": 3000, "low": 400, "middle": 1100}      # Hz, of each class


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Sounds of 1 s, 8 of each class to train and 3 to test; of the test one is broken, one has 5 s."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    places = [("train", n) for n in range(8)] + [("test", n) for n in range(3)]
    for name, (split, n) in itertools.product(TONES, places):
        seconds = 5 if (split, name, n) == ("test", "low", 0) else 1
        noise = 0.01 * rng.standard_normal(16000 * seconds)
        wave = tone(TONES[name], seconds, amplitude=rng.uniform(0.1, 0.4)) + noise
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        write(folder / split / name / f"{n}.wav", wave=wave, audio="pcm_s16le")
    (folder / "test" / "high" / "2.wav").write_bytes(b"garbage" * 50)
    return folder


def list_held(folder, split):
    """The last training clip of each class is an official validation clip."""
    listing = data.SETS["folder"].list(folder, split)
    return replace(listing, held=np.arange(24) % 8 == 7) if split == "train" else listing


def list_folds(folder, split, count=3):
    """All clips in so many folds."""
    listing = data.SETS["folder"].list(folder, "all")
    return replace(listing, fold=(np.arange(len(listing)) % count).astype(np.int8))


def list_many(folder, split):
    """Each third clip has two labels."""
    plain = data.SETS["folder"].list(folder, split)
    labels = []
    for i in range(len(plain)):
        first = int(plain.clip_labels(i)[0])
        labels.append([first] if i % 3 else [first, (first + 1) % 3])
    return data.make_listing("", folder, names(plain), labels, plain.classes, True)


@pytest.fixture(autouse=True)
def sets(monkeypatch):
    """Data sets of these tests, by their entries alone."""
    sound = functools.partial(data.DataSet, has=("audio",), all_splits=True)
    monkeypatch.setitem(data.SETS, "held", sound(list_held, seconds=1.0))
    monkeypatch.setitem(data.SETS, "folds", sound(list_folds, seconds=1.0))
    monkeypatch.setitem(data.SETS, "one-fold", sound(functools.partial(list_folds, count=1)))
    monkeypatch.setitem(data.SETS, "many", sound(list_many, covers=5.0))


@pytest.fixture(scope="session")
def ears(tmp_path_factory):
    """A checkpoint of an encoder of sound alone."""
    return write_checkpoint(tmp_path_factory.mktemp("ears"), video=False)


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """A checkpoint of an encoder of pictures and sound."""
    return write_checkpoint(tmp_path_factory.mktemp("both"))


def start(run_folder, name, folder, *more):
    words = ["--ckpt", run_folder, "--data", name, "--data-dir", folder, "--workers", 0, "--device", "cpu"]
    probe.main([str(word) for word in (*words, *more)])


def probed(run_folder, *more):
    """The row of a probe started in this process."""
    start(run_folder, *more)
    return last_row(run_folder)


@contextlib.contextmanager
def full_disk(size):
    """No file can be larger than `size` bytes, as on a disk that is full. Needs capsys: else what is printed
    is such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


QUICK = ("--epochs", 1, "--batch-size", 8)


# ---- what trains a head, and what tests it -------------------------------------------------------------

def test_the_held_out_clips_are_the_official_ones_or_a_tenth(tones):
    listing = data.list_clips("held", tones)
    plain = data.list_clips("folder", tones)
    for some, count in ((listing, 3), (plain, 2)):
        inner, held = probe.hold_out(some, range(24), 0)
        assert len(held) == count and sorted([*inner, *held]) == list(range(24))
    assert probe.hold_out(listing, range(24), 0, needed=False)[1].tolist() == [7, 15, 23]
    assert probe.hold_out(plain, range(24), 0, needed=False)[1] is None
    sentence = "fewer than two training clips can be read beside 2 official"
    fails(probe.hold_out, listing.subset([7, 15, 0]), range(3), 0, match=sentence)


def test_a_cached_head_never_trains_on_official_validation_clips(tones):
    """Their features are not a number: a head that saw them would not be one either."""
    listing = data.list_clips("held", tones)
    index = torch.arange(1, 24)                             # one does not decode
    y = listing.targets(index)
    x = torch.randn(23, 1, 8) + 5 * one_hot(y, 8)[:, None]
    x[torch.from_numpy(listing.held[1:])] = float("nan")
    inner, held = split = probe.hold_out(listing, index, 0)
    assert len(inner) == 20 and listing.held[index[held]].all()
    result = probe.probe_cached("linear", x, y, x[inner], y[inner], 3, (1e-2,), 30, 8, 0, split=split)
    assert result["value"] == 100


def listing_of(*labels, **more):
    """A set of clips of the classes a to h, each named by its letters."""
    rows = [["abcdefgh".index(letter) for letter in word] for word in labels]
    return data.make_listing("made-up", "", ["x.wav"] * len(rows), rows, "abcdefgh", **more)


many = functools.partial(listing_of, multilabel=True)
NOTHING_TO_SAY = {
    "all 3 training clips are of a, which any head says": (listing_of(*"aaa"), listing_of(*"ab")),
    r"no class has both training clips \(a, b\) and test clips \(c\)": (listing_of(*"aab"), listing_of("c")),
    "its training clips have no labels": (listing_of(), listing_of(*"a")),
    "its test clips have no labels": (many("a", "ab"), many("", "")),
    "all 2 training clips are of a, b, c, d, e and 1 more": (many("abcdef", "abcdef"), many("a", "b")),
    r"no class has both training clips \(a, b\)": (many("a", "b", ""), many("c", "")),
    "all 2 test clips are of a, so that any ranking is right": (many("a", "b", "ab"), many("ac", "a"))}


@pytest.mark.parametrize("sentence", NOTHING_TO_SAY)
def test_a_set_whose_score_would_say_nothing_is_refused(sentence):
    def check(train, test):
        probe.check_classes(probe.labelled(train, "training"), probe.labelled(test, "test"))

    fails(check, *NOTHING_TO_SAY[sentence], match=f"^made-up: {sentence}.*; .*(needs|put)")


def test_a_class_that_is_trained_or_tested_alone_is_counted_and_named_at_most_five(capsys):
    assert probe.check_classes(listing_of(*"abcdefgg"), listing_of(*"aah")) == dict(untrained=1, untested=6)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("made-up: 1 classes have no training clips") and first.endswith("as wrong: h")
    assert second.startswith("made-up: 6 classes have no test clips")
    assert second.endswith("nothing of them: b, c, d, e, f and 1 more")
    assert probe.check_classes(many("a", "b", ""), many("ab", "")) == dict(untrained=0, untested=0)
    held = listing_of(*"aabbc", held=np.array([0, 0, 0, 0, 1], bool))       # c: nothing to train on
    assert probe.check_classes(held, listing_of(*"abc")) == dict(untrained=1, untested=0)
    assert capsys.readouterr().out.endswith("count as wrong: c\n")
    folds = listing_of(*"aabbcc", fold=np.array([0, 1, 0, 1, 0, 0], np.int8))
    assert probe.check_classes(folds, folds) == dict(untrained=1, untested=1)
    assert capsys.readouterr().out.count("in one fold or another") == 2
    alone = listing_of(*"aab", fold=np.array([0, 0, 1], np.int8))
    fails(probe.check_classes, alone, alone, match="made-up, fold 0: all 1 training clips are of b")


def test_clips_without_a_label_are_left_out_but_say_something_where_a_clip_may_have_several(capsys):
    kept = probe.labelled(listing_of("a", "", "b"), "test")
    assert kept.targets(range(len(kept))).tolist() == [0, 1]
    assert capsys.readouterr().out == "made-up: 1 test clips have no label and are left out\n"
    assert len(probe.labelled(many("a", "", "b"), "test")) == 3


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_what_does_not_decode_may_leave_a_set_that_says_nothing(kind, ears, tones, tmp_path):
    for split, name in itertools.product(("train", "test"), ("high", "low")):
        shutil.copytree(tones / split / name, tmp_path / split / name)
    (tmp_path / "test" / "low").rename(tmp_path / "test" / "none")
    for file in (tmp_path / "test" / "high").iterdir():
        file.write_bytes(b"garbage")
    sentence = "no class has both training clips .*high, low.* and test clips .*none"
    fails(start, ears, "folder", tmp_path, *QUICK, "--lr", 1e-3, "--probe", kind, match=sentence)


@pytest.fixture(scope="session")
def half_silent(tmp_path_factory):
    """Clips of two classes, four of each to train and two to test; of each class and split one is silent."""
    folder = tmp_path_factory.mktemp("silent")
    for split, count in (("train", 4), ("test", 2)):
        for name, n in itertools.product(("high", "low"), range(count)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            frames = np.full((10, 16, 16, 3), 40 * n, np.uint8)
            wave = tone(TONES[name], 1) if n else None
            write(folder / split / name / f"{n}.mp4", frames, wave, fps=10)
    return folder


@pytest.mark.parametrize("flags", [("linear",), ("attentive", "--cache-gb", 0), ("finetune",)])
def test_a_clip_that_lacks_a_stream_neither_trains_nor_tests(flags, both, half_silent, monkeypatch, capsys):
    losses = record(monkeypatch, probe, "loss_of")
    row = probed(both, "folder", half_silent, *QUICK, "--lr", 1e-3, "--probe", *flags)
    assert (row["N"], row["left_out"], row["untested"]) == (2, 2, 0)
    trained = max(len(targets) for (_, targets, *_), _ in losses)
    assert trained == (5 if flags[0] == "linear" else 6)    # a cached probe holds out a tenth
    shown = capsys.readouterr().out
    for split, name in itertools.product(("train", "test"), ("high", "low")):
        assert shown.count(f"{split}/{name}/0.mp4: has no video or no audio") == 1


@pytest.mark.parametrize("more", [("finetune",), ("attentive", "--cache-gb", 0)])
def test_decoding_anew_never_trains_on_validation_or_test_clips(more, ears, tones, monkeypatch):
    made = record(monkeypatch, data, "Clips")
    row = probed(ears, "held", tones, "--lr", 1e-3, *QUICK, "--probe", *more)
    trained, = [clips for _, clips in made if clips.replace]
    files = [f"train/{c}/{n}.wav" for c, n in itertools.product(sorted(TONES), range(7))]
    assert sorted(names(trained.listing)) == files
    assert (row["N"], row["left_out"], row["view_seconds"], row["views"]) == (8, 1, 1.0, 1)
    assert row["held_out"] is not None


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_each_fold_is_tested_only_on_itself_by_a_head_trained_on_the_others(kind, ears, tones, monkeypatch):
    listing = data.list_clips("folds", tones)
    fold_of = dict(zip(names(listing), listing.fold.tolist()))
    calls = []
    encoders = set()

    def note(train, test):
        test = list(test)
        calls.append((set(train), set(test)))
        return dict(metric="top-1", value=len(calls), classes=3, lr=0.1, held_out=None, N=len(test))

    def cached(kind, x, y, x_test, y_test, **more):
        return note(x.flatten().tolist(), x_test.flatten().tolist())

    def online(protocol, views, encoder, train, test, *more):
        encoders.add(encoder.vit)
        return note(map(fold_of.get, names(train)), map(fold_of.get, names(test)))

    def planted(*given, **more):  # once for all folds; the first clip does not decode
        folds = torch.from_numpy(listing.fold[1:])
        return {("it", "audio"): folds.float().view(-1, 1, 1)}, torch.arange(1, 33)

    for name, stub in (("probe_cached", cached), ("probe_online", online), ("extract", planted)):
        monkeypatch.setattr(probe, name, stub)
    row = probed(ears, "folds", tones, *QUICK, "--probe", kind)
    assert calls == [({1, 2}, {0}), ({0, 2}, {1}), ({0, 1}, {2})]
    assert (row["folds"], row["value"], row["N"]) == ([1, 2, 3], 2, 32 if kind == "linear" else 33)
    assert len(encoders) == (0 if kind == "linear" else 3)  # each fold trains another one


def test_the_pitch_of_a_tone_is_found_on_every_fold_and_each_clip_is_decoded_once(ears, tones, capsys):
    row = probed(ears, "folds", tones, "--epochs", 60, "--batch-size", 12)
    shown = "".join(capsys.readouterr())
    assert len(row["folds"]) == 3 and min(row["folds"]) > 60                            # chance: 33
    assert (row["left_out"], row["modality"]) == (1, "audio") and "folds: " in shown
    assert shown.count("high/2.wav") == 1


@pytest.mark.parametrize("flags, online, views", [
    (("linear",), False, 9), (("attentive",), False, 9), (("attentive", "--cache-gb", 1e-5), True, 9),
    (("finetune",), True, 6), (("finetune", "--views", 5, "--crops", 1, "--layers", 0, 3), True, 5)])
def test_all_views_and_crops_of_a_test_clip_are_averaged_once(flags, online, views, both, toy, monkeypatch):
    averaged = record(monkeypatch, probe, "average")
    ways = record(monkeypatch, probe, "probe_online")
    row = probed(both, "toy", toy, *QUICK, "--lr", 1e-3, "--crops", 3, "--probe", *flags)
    assert bool(ways) == online and row["views"] * row["crops"] == views and row["N"] == 16
    assert sum(x.shape[-3] for (x, _), _ in averaged if x.shape[-2] == views) == 16     # clips


def test_the_score_of_a_clip_is_the_mean_over_its_views_and_crops(both, tmp_path):
    """The cached features of 2 x 3 views, against the encoder on each view alone."""
    frames = np.random.default_rng(0).integers(0, 255, (36, 24, 40, 3)).astype(np.uint8)
    data.write_clip(tmp_path / "a.mp4", frames)             # 3 s
    encoder = common.load_encoder(both)
    inputs = replace(INPUTS, seconds=0.5, video_seconds=None, resize=20)
    listing = data.list_clips("folder", tmp_path)
    got, _ = probe.extract({"it": encoder}, listing, inputs, ["video"], 2, CPU, 0, crops=3)
    alone = []
    for start, crop in itertools.product((0.0, 2.5), ("first", "center", "last")):
        clip = data.read_clip(tmp_path / "a.mp4", start, 0.5, 2, 20)["video"]
        view = data.crop_transform(inputs, crop)(torch.from_numpy(clip).permute(0, 3, 1, 2)).transpose(0, 1)
        alone.append(encoder(video=data.normalize_video(view)[None])[1][0])
    alone = torch.stack(alone)
    torch.testing.assert_close(got["it", "video"][0], alone, atol=1e-5, rtol=1e-4)
    head = probe.LinearHead(64, 2).eval()
    torch.nn.init.normal_(head.linear.weight)
    scores = probe.average(probe.predict(head, got["it", "video"], "cpu"), False)
    torch.testing.assert_close(scores[0], head(None, alone).softmax(-1).mean(0), atol=1e-5, rtol=1e-4)


def test_attention_without_own_scores_equals_a_slow_softmax_over_the_others():
    q, k, v = torch.randn(3, 2, 3, 5, 4)                    # each (B, heads, N, d)
    mask = probe.bar_own_scores(2, 5, 0.5, "cpu")
    out = common.Block(12, 3, 12).attend(q, k, v, mask)
    barred = ~mask[:, 0].diagonal(dim1=1, dim2=2)                                       # (B, N)
    assert barred.any() and not barred.all() and (mask | torch.eye(5, dtype=torch.bool)).all()
    for b, n in np.ndindex(2, 5):
        others = [m for m in range(5) if m != n or not barred[b, n]]
        weights = (q[b, :, n, None] * k[b][:, others]).sum(-1).div(2).softmax(-1)       # (heads, others)
        expected = (weights[..., None] * v[b][:, others]).sum(1)
        torch.testing.assert_close(out[b, :, n], expected, atol=1e-5, rtol=1e-4)


def test_the_share_of_barred_tokens_is_met_and_a_token_alone_is_never_barred():
    mask = probe.bar_own_scores(400, 50, 0.1, "cpu")
    share = (~mask).float().sum().item() / 400 / 50
    assert share == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / 400 / 50) ** 0.5)
    assert probe.bar_own_scores(64, 1, 1.0, "cpu").all()


def test_regularised_masking_is_for_training_only_and_has_a_finite_gradient(ears):
    encoder = common.load_encoder(ears)
    head = probe.LinearHead(encoder.dim, 3)
    torch.nn.init.normal_(head.linear.weight)
    plain, barred = [probe.Online(encoder, [head], "audio", False, share) for share in (0.0, 0.5)]
    batch = {"audio": torch.randn(4, 1, *encoder.vit.shape["audio"])}
    assert torch.equal(plain.eval()(batch)[0], barred.eval()(batch)[0])
    assert not torch.allclose(plain.train()(batch)[0], barred.train()(batch)[0])
    barred(batch)[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in barred.parameters() if p.grad is not None)


def test_fine_tuning_takes_the_rates_of_the_method(ears, tones, monkeypatch):
    """Head, encoder and label smoothing; no weight decay on the head."""
    optimizers = record(monkeypatch, torch.optim, "AdamW")
    losses = record(monkeypatch, probe, "loss_of")
    row = probed(ears, "held", tones, *QUICK, "--probe", "finetune")
    (groups,), _ = optimizers[0]
    usual = METHOD["finetune"]
    rate = usual["lr"][0]
    head, *encoder = [(group["peak"], group["weight_decay"]) for group in groups]
    assert head == (rate, 0) and set(encoder) == {(usual["encoder_lr"], 0.05), (usual["encoder_lr"], 0.0)}
    assert {share for (_, _, share), _ in losses} == {usual["smoothing"]}
    assert (row["lr"], row["encoder_lr"], row["head"]) == (rate, usual["encoder_lr"], "linear")
    trained = sum(len(group["params"]) for group in groups[1:])
    assert trained == len(list(common.load_encoder(ears).vit.parameters()))


@pytest.mark.parametrize("seconds, columns", [(0.2, 2), (1.0, 7), (2.0, 12), (5.0, 32)])
def test_an_encoder_and_the_raw_input_take_sound_of_any_length(seconds, columns, ears, tones):
    encoder = common.load_encoder(ears)
    clip = data.load_clip(tones / "test" / "low" / "0.wav", INPUTS.at(seconds, 16))
    tokens, embedding = encoder(**clip)
    assert tokens.shape == (1, 2 * columns, 64) and torch.isfinite(embedding).all()
    assert probe.RawInput()(**clip)[1].shape == (1, 400)


# ---- features in a file --------------------------------------------------------------------------------

def features(run_folder, name, folder, out, *more):
    start(run_folder, name, folder, "--save-features", out, *more)
    with np.load(out) as file:                              # allow_pickle is off
        return dict(file)


@pytest.mark.parametrize("layers", [None, [3, 1]])
def test_features_equal_what_the_layers_of_the_encoder_say_of_each_clip(
        layers, ears, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start_process", lambda device: CPU)                       # without bf16
    folder = shutil.copytree(tones / "test" / "low", tmp_path / "sounds")
    (folder / "2.wav").rename(folder / "ü.wav")
    more = ["--layers", *layers] if layers else []
    got = features(ears, "folder", folder, tmp_path / "f.npz", "--views", 1, "--patch-level", *more)
    encoder = common.load_encoder(ears)
    width = 64 * len(layers or [0])
    assert got.keys() == {"files", "seconds", "clip", "patch"} and got["seconds"] == 2.0
    assert got["files"].tolist() == ["0.wav", "1.wav", "ü.wav"]
    assert got["clip"].shape == (3, width) and got["clip"].dtype == np.float32
    assert got["patch"].shape == (3, 1, 24, width) and got["patch"].dtype == np.float16
    for n, file in enumerate(got["files"]):
        tokens = encoder.vit(**data.load_clip(folder / str(file), encoder.inputs), layers=layers)[0]
        assert got["clip"][n] == pytest.approx(tokens.mean(0).numpy(), abs=1e-4)
        assert got["patch"][n, 0] == pytest.approx(tokens.numpy(), abs=3e-3)            # float16
    assert not list(tmp_path.glob("*.part"))


def test_features_are_the_mean_over_the_views_and_have_the_labels_of_the_set(ears, tones, tmp_path, capsys):
    got = features(ears, "many", tones, tmp_path / "f.npz", "--split", "test", "--patch-level")
    assert got["patch"].shape == (8, 3, 24, 64) and got["classes"].tolist() == list(TONES)
    assert got["labels"].tolist()[:3] == [[1, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert got["clip"] == pytest.approx(got["patch"].astype(np.float32).mean((1, 2)), abs=0.01)
    assert "high/2.wav" in "".join(capsys.readouterr())
    got = features(ears, "held", tones, tmp_path / "f.npz", "--baseline", "raw")
    assert got["clip"].shape == (32, 400) and got["seconds"] == 1.0
    assert [got["classes"][c] for c in got["labels"]] == [file.split("/")[1] for file in got["files"]]


def test_clips_that_lack_a_stream_are_left_out_of_the_features(both, clips, tmp_path, capsys):
    got = features(both, "folder", clips, tmp_path / "f.npz", "--views", 2)
    assert got["files"].tolist() == ["fast.mp4", "good.mp4"] and got["clip"].shape == (2, 64)
    assert "(4 left out)" in capsys.readouterr().out


def test_features_that_do_not_fit_on_the_disk_leave_the_older_file_whole(ears, tones, tmp_path, capsys):
    out = tmp_path / "f.npz"
    features(ears, "folder", tones, out)
    before = out.read_bytes()
    words = ("--save-features", out, "--patch-level")
    with full_disk(out.stat().st_size + 1000):
        fails(start, ears, "folder", tones, *words, match="f.npz: cannot be written .*; give --save-features")
    assert out.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("flags", [
    "--probe linear", "--probe attentive", "--probe attentive --cache-gb 0", "--probe finetune",
    "--save-features f.npz", "--save-features f.npz --patch-level"])
def test_an_encoder_whose_weights_are_no_numbers_has_no_score_and_no_features(
        flags, ears, tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = common.load_checkpoint(ears)
    content["model"]["target_encoder.blocks.1.fc1.weight"][0, 0] = float("nan")
    torch.save(content, "latest.pt")
    sentence = r"\.wav: what the encoder says of this clip is no finite number; .* take another checkpoint"
    fails(start, ".", "folder", tones, *flags.split(), match=sentence)
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


def test_a_head_that_was_lost_to_its_learning_rate_is_neither_chosen_nor_tested(monkeypatch):
    x = torch.randn(40, 1, 8)
    y = torch.arange(40) % 2
    x[:, 0, 0] += 4 * y
    real = probe.predict
    lost = 2 * [True]

    def predict(head, *more):
        scores = real(head, *more)
        return scores * float("nan") if lost and lost.pop() else scores

    monkeypatch.setattr(probe, "predict", predict)
    fit = functools.partial(probe.probe_cached, "linear", x, y, x, y, 2)
    lost = [False, False, True]                             # the first of two, when they are compared
    assert fit((1e-3, 1e-2), 50, 8, 0)["lr"] == 1e-2
    lost = [True, False]                                    # the only one, when it is tested
    fails(fit, (1e-2,), 50, 8, 0, match="scores of the test clips are not finite numbers.*; lower --lr")


# ---- the command line ----------------------------------------------------------------------------------

def test_the_flags_that_a_newcomer_gives_suffice(ears, tones, tmp_path, monkeypatch):
    """In a process of its own, with a worker."""
    words = f"{ROOT}/probe.py --ckpt {ears} --data folder --data-dir {tones} --workers 1 --device cpu".split()
    done = command([sys.executable, *words], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    row = last_row(ears)
    assert (row["probe"], row["head"], row["lrs"]) == ("linear", "linear", list(METHOD["linear"]["lr"]))
    assert (row["N"], row["views"], row["crops"], row["absent"], row["step"]) == (8, 3, 1, "drop", 3)
    assert row["value"] > 60 and row["version"]                                         # chance: 38
    bad = command([sys.executable, *words, "--data-dir", "."], tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


REFUSED = """
--head blocks | --head has no effect without --probe finetune or attentive
--cache-gb 0 | --cache-gb has no effect without --probe attentive
--regularised-masking .1 | --regularised-masking has no effect without --probe finetune
--split test | --split has no effect without --save-features
--patch-level | --patch-level has no effect without --save-features
--save-features f.npz --epochs 2 | --epochs has no effect without a probe; leave --save-features out
--save-features f.npz --crops 3 | --crops has no effect without a probe; leave --save-features out
--save-features f.npz --probe finetune | trains nothing; leave --probe out
--encoder context --baseline untrained | --encoder has no effect without the trained
--baseline raw --layers 1 | no layers
--baseline raw --patch-level | no tokens
--probe attentive --head linear | --head linear reads no tokens
--probe finetune --lr 1 2 | fine-tuning takes one learning rate
--lr 1 -1 | --lr -1.0 is out of range
--lr 0 | --lr 0.0 is out of range
--lr nan | --lr nan is out of range
--lr 1e-3 inf | --lr inf is out of range
--cache-gb nan --probe attentive | --cache-gb nan is out of range
--views -1 | --views -1 is out of range
--seed -1 | --seed -1 is out of range
--seed 99999999999999999999 | --seed 99999999999999999999 is out of range
--layers -1 | --layers -1 is out of range
--seconds 0 | out of range
--regularised-masking 2 | out of range
--save-features nowhere/f.npz | its folder does not exist
--save-features . | a folder itself
--save-features LONG | LONG: cannot be written .*; give --save-features another place
--ckpt nowhere | no such checkpoint
--ckpt TONES | latest.pt: there is no such checkpoint; give a run's folder or its latest.pt
--data one-fold | 0 training clips; a probe needs at least 3, outside of each fold
--data nothing | --data nothing: not a data set; one of toy,
--data-dir TONES/train/low | a probe needs labels""".strip().splitlines()


WORDS = ["--lr ²", "--epochs 1e3", "--views ²", "--seed 1.5", "--layers ²", "--crops 2"]


@pytest.mark.parametrize("words", WORDS)
def test_what_is_no_such_number_is_refused_by_the_parser(words, ears, tones, capsys):
    with pytest.raises(SystemExit) as end:
        start(ears, "folder", tones, *words.split())
    assert end.value.code == 2 and f"error: argument {words.split()[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_sentence(line, ears, tones):
    line = line.replace("TONES", str(tones)).replace("LONG", 300 * "x")
    more, sentence = line.split(" | ")
    fails(start, ears, "folder", tones, *more.split(), match=sentence)
