"""probe.py: which clips train, choose and test; fine-tuning; layers, features in a file; its flags."""
import contextlib
import functools
import itertools
import json
import resource
import shutil
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

import common
import data
import features
import finetune
import heads as kinds
import probe
import run
import visualize
from conftest import CPU, INPUTS, METHOD, ROOT, command, fails, last_row, names, tone, write, write_checkpoint
from conftest import write_two_steps
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
    if "finetune" in more and "--save-features" not in more:
        words.append("--fresh")                             # that of another test lies beside the checkpoint
    probe.main([str(word) for word in (*words, *more)])


def all_rows(run_folder):
    return [json.loads(line) for line in (run_folder / "probe.jsonl").read_text().splitlines()]


def decoded(run_folder, listing, modality, **views):
    """(features.Decoded of the clips of a listing, with the Views that are given, the Views)"""
    encoder = common.load_encoder(run_folder)
    usual = dict(modality=modality, inputs=INPUTS, test_inputs=INPUTS, test=1, crops=1, train=1)
    views = features.Views(**{**usual, **views})
    return features.Decoded(encoder, listing, views, CPU, 0, True), views


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
PAPER = (*QUICK, "--lr", 1e-3, "--recipe", "paper")


# ---- what trains a head, and what tests it -------------------------------------------------------------

def test_the_held_out_clips_are_the_official_ones_or_a_tenth(tones):
    listing = data.list_clips("held", tones)
    plain = data.list_clips("folder", tones)
    several = Namespace(clips=None, heads={"linear": (1e-3, 1e-2)})
    one = Namespace(clips=None, heads={"linear": (1e-3,)})
    for some, count in ((listing, 3), (plain, 2)):
        inner, held = probe.divide(some, range(24), several, 0)
        assert len(held) == count and sorted([*inner, *held]) == list(range(24))
    assert probe.divide(listing, range(24), one, 0)[1].tolist() == [7, 15, 23]
    inner, held = probe.divide(plain, range(24), one, 0)
    assert held is None and inner.tolist() == list(range(24))
    sentence = "1 training clips beside 2 official validation clips; a probe needs at least 3"
    fails(probe.divide, listing.subset([7, 15, 0]), range(3), one, 0, match=sentence)


def listing_of(*labels, **more):
    """A set of clips of the classes a to h, each named by its letters."""
    rows = [list(map("abcdefgh".index, word)) for word in labels]
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


ANEW = ("--cache-gb", 0)
WAYS = [("linear",), ("linear", *ANEW), ("attentive",), ("attentive", *ANEW), ("finetune",)]


@pytest.mark.parametrize("flags", WAYS)
def test_a_clip_of_one_stream_trains_and_tests_with_the_other_at_zero_and_alone_where_it_has_it(
        flags, both, half_silent, monkeypatch, capsys):
    losses = record(monkeypatch, kinds, "loss_of")
    start(both, "folder", half_silent, *PAPER, "--probe", *flags)
    rows = {row["tested"]: row for row in all_rows(both)[-3:]}
    assert {name: (row["N"], row["left_out"]) for name, row in rows.items()} == {
        "audio": (2, 2), "video": (4, 0), "av": (4, 0)}
    assert sum(len(targets) for (_, targets, *_), _ in losses) == 8
    shown = capsys.readouterr().out
    assert "bad clip" not in shown and "audio alone, trained on av" in shown


@pytest.mark.parametrize("flags", WAYS[:-1])                # a fine-tuning takes another one in its place
def test_a_clip_without_the_one_stream_that_is_asked_for_neither_trains_nor_tests(
        flags, both, half_silent, monkeypatch, capsys):
    losses = record(monkeypatch, kinds, "loss_of")
    start(both, "folder", half_silent, *PAPER, "--modality", "audio", "--probe", *flags)
    row = last_row(both)
    assert (row["N"], row["left_out"], row["untested"], row["tested"]) == (2, 2, 0, "audio")
    assert sum(len(targets) for (_, targets, *_), _ in losses) == 6
    shown = capsys.readouterr().out
    for split, name in itertools.product(("train", "test"), ("high", "low")):
        assert shown.count(f"{split}/{name}/0.mp4: has no audio") == 1


def test_an_absent_stream_is_at_zero_after_the_normalisation(both, half_silent):
    listing = data.list_clips("folder", half_silent, "test")
    source, views = decoded(both, listing, "av", test=1)
    encoder = source.encoder
    for outputs in source.testing(np.arange(4), ["av", "video"], "test"):
        positions, tokens, embedding = outputs["av"]
        assert positions.tolist() == list(range(len(positions)))
        for i in positions.tolist():
            clip = data.load_clip(listing.path(i), views.test_inputs)
            clip.setdefault("audio", torch.zeros(1, 1, *encoder.vit.shape["audio"]))
            torch.testing.assert_close(embedding[i, 0], encoder(**clip)[1][0], atol=1e-4, rtol=1e-3)
            alone = encoder(video=clip["video"])
            torch.testing.assert_close(outputs["video"][2][i, 0], alone[1][0], atol=1e-4, rtol=1e-3)
            assert outputs["video"][1].shape[2] == alone[0].shape[1] < tokens.shape[2]


@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_a_head_trained_on_both_is_tested_on_the_tokens_of_one_alone(absent, both, toy, monkeypatch):
    tokens = []
    real = kinds.AttentiveHead.forward

    def forward(self, given, embedding):
        tokens.append((self.training, given.shape[1]))
        return real(self, given, embedding)

    monkeypatch.setattr(kinds.AttentiveHead, "forward", forward)
    flags = ("--probe", "attentive", "--head", "attentive", "--modality", "av", "--views", 1)
    start(both, "toy", toy, *QUICK, "--lr", 1e-3, "--absent", absent, *flags)
    vit = common.load_encoder(both).vit
    counts = vit.num("video"), vit.num("audio")
    assert {n for training, n in tokens if training} == {sum(counts)}
    assert {n for training, n in tokens if not training} == {*counts, sum(counts)}
    assert [(row["modality"], row["tested"]) for row in all_rows(both)[-3:]] == [
        ("av", "audio"), ("av", "video"), ("av", "av")]


@pytest.mark.parametrize("more", [
    ("linear",), ("attentive", "--head", "cross"), ("attentive", "--head", "attentive", "--seeds", 0, 1),
    ("linear", "--head", "linear", "--baseline", "raw")])
def test_the_cache_changes_memory_and_time_and_not_the_result(more, ears, tones):
    """With random starts and several rates, of which held-out clips choose."""
    rows = []
    for gigabytes in (4, 0):
        content = common.load_checkpoint(ears)
        content["method"]["protocol"] = {**METHOD["protocol"], "train_starts": ("random", "random", ""),
                                         "train_views": (3, None, ""), "starts": ("random", "random", "")}
        torch.save(content, tones.parent / "drawn.pt")
        flags = ("--epochs", 2, "--batch-size", 8, "--lr", 1e-3, 1e-2, "--recipe", "paper")
        start(tones.parent / "drawn.pt", "folder", tones, *flags, "--probe", *more, "--cache-gb", gigabytes)
        rows.append(last_row(tones.parent))
    kept, anew = rows
    for key in ("values", "held_out", "lr"):
        assert kept[key] == anew[key]


@pytest.mark.parametrize("gigabytes", [4, 0])
def test_a_head_reads_all_segments_of_few_clips_together_for_the_steps_of_the_protocol(
        gigabytes, both, toy, tmp_path, monkeypatch):
    rows = {"attentive": ("cross", "cross", ""), "attentive_lr": ((1e-3,), (1e-3,), ""), "views": (4, 1, ""),
            "together": (True, False, ""), "train_views": (None, None, ""), "batch_size": (4, 4, ""),
            "train_starts": ("random", "random", ""), "steps": (5, None, ""), "clips": (12, None, ""),
            "test_clips": (8, None, "")}
    content = common.load_checkpoint(both)
    content["method"]["protocol"] = rows
    torch.save(content, tmp_path / "latest.pt")
    trained = record(monkeypatch, probe, "train_heads")
    losses = record(monkeypatch, kinds, "loss_of")
    asked = record(monkeypatch, kinds, "ask_once")
    flags = ("--recipe", "paper", "--probe", "attentive", "--modality", "av", "--cache-gb", gigabytes)
    start(tmp_path, "toy", toy, *flags)
    row = last_row(tmp_path)
    (_, _, _, listing, chosen, *_), _ = trained[0]
    counts = np.bincount(listing.targets(chosen))
    assert len(chosen) == 12 and counts.max() - counts.min() <= 1
    assert len(losses) == 5 and row["steps"] == 5 and (row["N"], row["left_out"], row["views"]) == (8, 0, 4)
    vit = common.load_encoder(both).vit
    tokens = {x.shape[1] for (_, _, x), _ in asked}
    assert tokens == {4 * vit.num("video"), 4 * vit.num("audio"), 4 * (vit.num("video") + vit.num("audio"))}


@pytest.mark.parametrize("part", [1, 32])
def test_training_views_are_the_same_whether_they_are_kept_or_decoded_anew(part, both, toy, monkeypatch):
    """Random starts and flips: the features that a batch of a later epoch is given, in parts or at once."""
    monkeypatch.setattr(features, "PART", part)
    listing = data.list_clips("toy", toy, "train")
    source, _ = decoded(both, listing, "av", train=3, train_starts="random", train_crop="flip")
    chosen = np.array([1, 5, 8, 13])
    kept = features.keep(source, 0, chosen, (), (), "train")
    batches = [[(4, 1), (4, 3)], [(5, 0), (5, 2)]]
    for one, other in zip(source.training(chosen, batches), kept.training(chosen, batches), strict=True):
        assert one[0].tolist() == other[0].tolist()
        torch.testing.assert_close(one[1].float(), other[1].float(), atol=0.02, rtol=0.02)      # of bf16
        torch.testing.assert_close(one[2], other[2], atol=1e-4, rtol=1e-3)
    first, again, third = [next(kept.training(chosen, [[(epoch, 0)]]))[2] for epoch in (0, 3, 1)]
    assert torch.equal(first, again) and not torch.allclose(first, third)


@pytest.mark.parametrize("more", [("finetune",), ("attentive", "--cache-gb", 0)])
def test_decoding_anew_never_trains_on_validation_or_test_clips(more, ears, tones, monkeypatch):
    made = record(monkeypatch, data, "Clips")
    row = probed(ears, "held", tones, *PAPER, "--probe", *more)
    trained = made[0][1]                                    # the test views come later
    files = [f"train/{c}/{n}.wav" for c, n in itertools.product(sorted(TONES), range(7))]
    assert sorted(names(trained.listing)) == files
    assert (row["N"], row["left_out"], row["view_seconds"], row["views"]) == (8, 1, 1.0, 1)
    assert row["held_out"] is not None


@pytest.mark.parametrize("kind", ["linear", "finetune"])
def test_each_fold_is_tested_only_on_itself_by_a_head_trained_on_the_others(kind, ears, tones, monkeypatch):
    folds = data.list_clips("folds", tones).fold
    calls = []
    places = []

    def stub(*given):
        task, = [x for x in given if isinstance(x, probe.Task)]
        calls.append((task.seed, set(folds[union(task.inner, task.held)]), set(folds[task.outer])))
        places.append(given[-1])
        result = dict(metric="top-1", value=len(calls), classes=3, lr=0.1, held_out=None, N=len(task.outer))
        result["left_out"] = 0
        return {("it", "audio"): result}

    monkeypatch.setattr(probe, "fit_and_test", stub)
    monkeypatch.setattr(probe, "tune_and_test", stub)
    monkeypatch.setattr(probe, "print_result", lambda *_: None)
    monkeypatch.setattr(probe, "choose_heads", lambda *_: ["it"])
    row = probed(ears, "folds", tones, *PAPER, "--probe", kind, "--seeds", 0, 5)
    once = [({1, 2}, {0}), ({0, 2}, {1}), ({0, 1}, {2})]
    assert calls == [(seed, *pair) for seed in (0, 5) for pair in once]
    assert (row["values"], row["value"], row["N"]) == ([2, 5], 3.5, 33)
    if kind == "finetune":                                  # each has a folder of its own
        kept = [f"finetune-folds-audio/seed{seed}-fold{fold}" for seed in (0, 5) for fold in range(3)]
        assert places == [ears / folder for folder in kept]


def union(inner, held):
    return np.concatenate([inner, [] if held is None else held]).astype(int)


def test_the_pitch_of_a_tone_is_found_on_every_fold_and_each_clip_is_decoded_once(ears, tones, capsys):
    row = probed(ears, "folds", tones, "--epochs", 60, "--batch-size", 12, "--recipe", "paper")
    shown = "".join(capsys.readouterr())
    assert len(row["folds"]) == 3 and min(row["folds"]) > 60                            # chance: 33
    assert (row["left_out"], row["modality"]) == (1, "audio") and "folds: " in shown
    assert shown.count("high/2.wav") == 1


@pytest.mark.parametrize("flags, kept, views", [
    (("linear", "--head", "linear"), True, 12), (("attentive",), True, 12),
    (("attentive", "--cache-gb", 1e-5), False, 12), (("finetune",), False, 6),
    (("finetune", "--views", 5, "--crops", 1, "--layers", 0, 3), False, 5)])
def test_all_views_and_crops_of_a_test_clip_are_averaged_once(flags, kept, views, both, toy, monkeypatch):
    averaged = record(monkeypatch, kinds, "average")
    made = record(monkeypatch, probe, "keep")
    row = probed(both, "toy", toy, *QUICK, "--lr", 1e-3, "--crops", 3, "--probe", *flags)
    assert bool(made) == kept and row["views"] * row["crops"] == views and row["N"] == 16
    assert {x.shape[-2] for (x, *_), _ in averaged} == {views}
    assert sum(x.shape[0] for (x, *_), _ in averaged) == 3 * 16                         # clips: A, V and AV


def test_the_score_of_a_clip_is_the_mean_over_its_views_and_crops(both, tmp_path):
    """The cached features of 2 x 3 views, against the encoder on each view alone."""
    frames = np.random.default_rng(0).integers(0, 255, (36, 24, 40, 3)).astype(np.uint8)
    data.write_clip(tmp_path / "a.mp4", frames)             # 3 s
    encoder = common.load_encoder(both)
    inputs = replace(INPUTS, seconds=0.5, video_seconds=None, resize=20)
    listing = data.list_clips("folder", tmp_path)
    source, _ = decoded(both, listing, "video", inputs=inputs, test_inputs=inputs, test=2, crops=3)
    (_, tokens, got), = [outputs["video"] for outputs in source.testing([0], ["video"], "test")]
    alone = []
    for start, crop in itertools.product((0.0, 2.5), ("first", "center", "last")):
        clip = data.read_clip(tmp_path / "a.mp4", start, 0.5, 2, 20)["video"]
        view = data.crop_transform(inputs, crop)(torch.from_numpy(clip).permute(0, 3, 1, 2)).transpose(0, 1)
        alone.append(encoder(video=data.normalize_video(view)[None]))
    embedding = torch.cat([z for _, z in alone])
    torch.testing.assert_close(got[0], embedding, atol=1e-5, rtol=1e-4)
    source.views = replace(source.views, together=True)
    (_, tokens, got), = [outputs["video"] for outputs in source.testing([0], ["video"], "test")]
    for crop in range(3):                                   # the tokens of both places side by side
        expected = torch.cat([alone[place * 3 + crop][0][0] for place in range(2)])
        torch.testing.assert_close(tokens[0, crop].float(), expected, atol=0.02, rtol=0.02)     # bf16
        torch.testing.assert_close(got[0, crop], embedding[crop::3].mean(0), atol=1e-4, rtol=1e-3)


def test_attention_without_own_scores_equals_a_slow_softmax_over_the_others():
    q, k, v = torch.randn(3, 2, 3, 5, 4)                    # each (B, heads, N, d)
    mask = finetune.bar_own_scores(2, 5, 0.5, "cpu")
    out = common.Block(12, 3, 12).attend(q, k, v, mask)
    barred = ~mask[:, 0].diagonal(dim1=1, dim2=2)                                       # (B, N)
    assert barred.any() and not barred.all() and (mask | torch.eye(5, dtype=torch.bool)).all()
    for b, n in np.ndindex(2, 5):
        others = [m for m in range(5) if m != n or not barred[b, n]]
        weights = (q[b, :, n, None] * k[b][:, others]).sum(-1).div(2).softmax(-1)       # (heads, others)
        expected = (weights[..., None] * v[b][:, others]).sum(1)
        torch.testing.assert_close(out[b, :, n], expected, atol=1e-5, rtol=1e-4)


def test_the_share_of_barred_tokens_is_met_and_a_token_alone_is_never_barred():
    mask = finetune.bar_own_scores(400, 50, 0.1, "cpu")
    share = (~mask).float().sum().item() / 400 / 50
    assert share == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / 400 / 50) ** 0.5)
    assert finetune.bar_own_scores(64, 1, 1.0, "cpu").all()


def test_fine_tuning_takes_the_rates_of_the_method(ears, tones, monkeypatch):
    """Head, encoder and label smoothing; no weight decay on the head."""
    optimizers = record(monkeypatch, torch.optim, "AdamW")
    losses = record(monkeypatch, kinds, "loss_of")
    row = probed(ears, "held", tones, *QUICK, "--probe", "finetune")
    (groups,), _ = optimizers[0]
    head, *encoder = [(group["peak"], group["weight_decay"]) for group in groups]
    assert head == (2e-3, 0) and set(encoder) == {(1e-5, 0.05), (1e-5, 0.0)}
    assert {smoothing for (_, _, smoothing, _), _ in losses} == {0.1}
    assert (row["lr"], row["encoder_lr"], row["head"]) == (2e-3, 1e-5, "standardised")
    trained = sum(len(group["params"]) for group in groups[1:])
    assert trained == len(list(common.load_encoder(ears).vit.parameters()))


def test_a_row_has_how_much_each_block_counts_of_each_seed(ears, tones):
    for kind in ("linear", "attentive", "finetune"):
        more = ("--probe", kind, "--steps", 4, "--lr", 0.1, "--batch-size", 8)
        row = probed(ears, "held", tones, *more, "--layers", 3, 1, "--mix")
        assert row["mix"] is True and row["layers"] == [3, 1]
        assert len(row["mix_weights"]) == 2 and sum(row["mix_weights"]) == pytest.approx(1, abs=1e-3)
        assert row["mix_weights"] != [0.5, 0.5]
    row = probed(ears, "held", tones, *PAPER, "--layers", 3, 1, "--mix", "--seeds", 0, 1)
    assert [len(weights) for weights in row["mix_weights"]] == [2, 2]
    row = probed(ears, "folds", tones, *PAPER, "--layers", 3, 2, 1, "--mix")
    assert [len(weights) for weights in row["mix_weights"]] == [3, 3, 3]
    row = probed(ears, "held", tones, *PAPER, "--layers", 3, 1)
    assert row["mix"] is False and "mix_weights" not in row


@pytest.mark.parametrize("seconds, columns", [(0.2, 2), (1.0, 7), (2.0, 12), (5.0, 32)])
def test_an_encoder_and_the_raw_input_take_sound_of_any_length(seconds, columns, ears, tones):
    encoder = common.load_encoder(ears)
    clip = data.load_clip(tones / "test" / "low" / "0.wav", INPUTS.at(seconds, 16))
    tokens, embedding = encoder(**clip)
    assert tokens.shape == (1, 2 * columns, 64) and torch.isfinite(embedding).all()
    assert features.RawInput()(**clip)[1].shape == (1, 400)


# ---- features in a file --------------------------------------------------------------------------------

def saved(run_folder, name, folder, out, *more):
    start(run_folder, name, folder, "--save-features", out, *more)
    with np.load(out) as file:                              # allow_pickle is off
        return dict(file)


@pytest.mark.parametrize("layers", [None, [3, 1]])
def test_features_equal_what_the_layers_of_the_encoder_say_of_each_clip(
        layers, ears, tones, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "start_process", lambda device, bf16: CPU)                       # without bf16
    folder = shutil.copytree(tones / "test" / "low", tmp_path / "sounds")
    (folder / "2.wav").rename(folder / "ü.wav")
    more = ["--layers", *layers] if layers else []
    got = saved(ears, "folder", folder, tmp_path / "f.npz", "--views", 1, "--patch-level", *more)
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
    got = saved(ears, "many", tones, tmp_path / "f.npz", "--split", "test", "--patch-level")
    assert got["patch"].shape == (8, 3, 24, 64) and got["classes"].tolist() == list(TONES)
    assert got["labels"].tolist()[:3] == [[1, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert got["clip"] == pytest.approx(got["patch"].astype(np.float32).mean((1, 2)), abs=0.01)
    assert "high/2.wav" in "".join(capsys.readouterr())
    got = saved(ears, "held", tones, tmp_path / "f.npz", "--baseline", "raw")
    assert got["clip"].shape == (32, 400) and got["seconds"] == 1.0
    assert [got["classes"][c] for c in got["labels"]] == [file.split("/")[1] for file in got["files"]]


def test_clips_that_lack_a_stream_are_left_out_of_the_features(both, clips, tmp_path, capsys):
    got = saved(both, "folder", clips, tmp_path / "f.npz", "--views", 2)
    assert got["files"].tolist() == ["fast.mp4", "good.mp4"] and got["clip"].shape == (2, 64)
    assert "(4 left out)" in capsys.readouterr().out


def test_features_that_do_not_fit_on_the_disk_leave_the_older_file_whole(ears, tones, tmp_path, capsys):
    out = tmp_path / "f.npz"
    saved(ears, "folder", tones, out)
    before = out.read_bytes()
    words = ("--save-features", out, "--patch-level")
    with full_disk(out.stat().st_size + 1000):
        fails(start, ears, "folder", tones, *words, match="f.npz: cannot be written .*; give --save-features")
    assert out.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("flags", [
    "--probe linear", "--probe attentive", "--probe attentive --cache-gb 0", "--probe finetune",
    "--save-features f.npz", "--save-features f.npz --patch-level"])
def test_an_encoder_whose_weights_overflow_has_no_score_and_no_features(
        flags, ears, tones, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = common.load_checkpoint(ears)
    content["model"]["target_encoder.blocks.1.fc1.weight"][:] = 3e38
    torch.save(content, "latest.pt")
    of = "of an empty clip" if "finetune" in flags else "of this clip"
    sentence = f"what the encoder says {of} is no finite number; .* take another checkpoint"
    fails(start, ".", "folder", tones, *flags.split(), match=sentence)
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


# ---- several checkpoints -------------------------------------------------------------------------------

def alike(row):
    """What of a row does not tell how it came to be."""
    return {key: value for key, value in row.items() if key not in ("ckpt", "seconds")}


def test_several_checkpoints_have_the_rows_that_each_has_alone_and_one_given_twice_has_one(
        tones, tmp_path, capsys):
    earlier, folder = write_two_steps(tmp_path, video=False)
    flags = (*PAPER, "--views", 1)
    start(folder, "folder", tones, *flags, "--ckpt", earlier, folder, folder / "latest.pt")
    said = capsys.readouterr().out
    assert said.index(f"{earlier}, step 2\n") < said.index(f"{folder}, step 3\n")
    for ckpt in (earlier, folder):
        start(ckpt, "folder", tones, *flags)
    rows = all_rows(folder)
    assert [(row["step"], row["ckpt"]) for row in rows] == 2 * [(2, str(earlier)), (3, str(folder))]
    assert list(map(alike, rows[:2])) == list(map(alike, rows[2:]))
    assert rows[0]["value"] < rows[1]["value"]


def test_a_checkpoint_that_is_missing_or_cut_off_is_told_before_the_first_is_probed(
        tones, tmp_path, monkeypatch):
    earlier, folder = write_two_steps(tmp_path, video=False)
    (tmp_path / "cut.pt").write_bytes(earlier.read_bytes()[:1000])
    monkeypatch.setattr(probe, "probe_checkpoint", lambda *_: pytest.fail("a checkpoint was probed"))
    for last, sentence in (("nowhere.pt", "nowhere.pt: there is no such"), ("cut.pt", "cut.pt: cannot be")):
        ckpts = ("--ckpt", folder, earlier, tmp_path / last)
        fails(start, folder, "folder", tones, *ckpts, match=sentence)
    ckpts = ("--ckpt", earlier, folder, "--save-features", tmp_path / "f.npz")
    fails(start, folder, "folder", tones, *ckpts, match="--save-features writes one file; give one --ckpt")


# ---- the command line ----------------------------------------------------------------------------------

def test_the_flags_that_a_newcomer_gives_suffice(ears, tones, tmp_path, monkeypatch):
    """In a process of its own, with a worker."""
    words = f"{ROOT}/probe.py --ckpt {ears} --data folder --data-dir {tones} --workers 1 --device cpu".split()
    done = command([sys.executable, *words], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    row = last_row(ears)
    assert (row["probe"], row["head"], row["lrs"]) == ("linear", "standardised", [1e-2, 1e-1])
    assert (row["N"], row["views"], row["crops"], row["absent"], row["step"]) == (8, 3, 1, "drop", 3)
    assert row["value"] > 60 and row["version"]                                         # chance: 38
    bad = command([sys.executable, *words, "--data-dir", "."], tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


@pytest.mark.parametrize("gigabytes", [0, 4])
def test_tests_on_the_way_change_no_value_and_their_log_is_drawn(
        gigabytes, ears, tones, tmp_path, capsys):
    """Features decoded anew, and kept."""
    ears = shutil.copytree(ears, tmp_path / "ears")
    words = ("--recipe", "paper", "--lr", 1e-2, "--steps", 12, "--batch-size", 8, "--cache-gb", gigabytes)
    start(ears, "folder", tones, *words)
    start(ears, "folder", tones, *words, "--test-every", 5)
    before, after = all_rows(ears)[-2:]
    assert before | {"seconds": 0} == after | {"seconds": 0}
    folder = ears / "linear-folder-audio" / "seed0"
    log = run.read_log(folder)
    assert [row["step"] for row in log] == [4, 9, 11]
    assert log[-1]["test top-1/standardised"] == after["value"]
    visualize.main(["curves", str(folder)])
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    shutil.rmtree(folder.parent)
    folder.parent.touch()                                   # where a folder has to be
    capsys.readouterr()
    start(ears, "folder", tones, *words)
    assert "log.jsonl: cannot be written (Not a directory); the curve ends" in capsys.readouterr().out
    assert last_row(ears) | {"seconds": 0} == after | {"seconds": 0}


REFUSED = """
--head blocks | --head blocks reads tokens; use --probe attentive
--cache-gb 0 --probe finetune | --cache-gb has no effect without --probe linear or attentive
--head regression --probe finetune | --head regression trains no encoder
--recipe toy --probe finetune | --recipe toy is for frozen encoders
--head regression --epochs 3 | --epochs has no effect on a regression
--head regression --cache-gb 1 | --cache-gb has no effect on a regression
--head regression --test-every 1 | --test-every has no effect on a regression
--probe finetune --test-every 1 | --test-every has no effect without --probe linear or attentive
--test-every 0 | --test-every 0 is out of range
--clips -1 | --clips -1 is out of range
--clips 2 | 2 training clips; a probe needs at least 3
--steps 0 | --steps 0 is out of range
--save-features f.npz --seeds 1 | --seeds has no effect without a probe
--regularised-masking .1 | --regularised-masking has no effect without --probe finetune
--split test | --split has no effect without --save-features
--patch-level | --patch-level has no effect without --save-features
--save-features f.npz --epochs 2 | --epochs has no effect without a probe; leave --save-features out
--save-features f.npz --crops 3 | --crops has no effect without a probe; leave --save-features out
--save-features f.npz --probe finetune | trains nothing; leave --probe out
--encoder context --baseline untrained | --encoder has no effect without the trained
--baseline raw --layers 1 | no layers
--baseline raw --patch-level | no tokens
--baseline raw --mix | no layers
--mix | --mix averages blocks; give --layers with at least two
--mix --layers 3 | --mix averages blocks; give --layers with at least two
--mix --layers 0 3 --head regression | --mix: a regression learns no weights of the blocks; give --head
--mix --layers 0 3 --recipe toy | --mix: a regression learns no weights of the blocks; give --head
--mix --layers 0 3 --save-features f.npz | --mix has no effect without a probe; leave --save-features out
--probe attentive --head linear | --head linear reads no tokens
--probe finetune --lr 1 2 | fine-tuning takes one learning rate
--lr 1 -1 | --lr -1.0 is out of range
--lr 0 | --lr 0.0 is out of range
--lr nan | --lr nan is out of range
--lr 1e-3 inf | --lr inf is out of range
--cache-gb nan --probe attentive | --cache-gb nan is out of range
--views -1 | --views -1 is out of range
--seeds 0 -1 | --seeds -1 is out of range
--seeds 99999999999999999999 | --seeds 99999999999999999999 is out of range
--layers -1 | --layers -1 is out of range
--seconds 0 | out of range
--regularised-masking 2 | out of range
--save-features nowhere/f.npz | its folder does not exist
--save-features . | a folder itself
--save-features LONG | LONG: cannot be written .*; give --save-features another place
--ckpt nowhere | no such checkpoint
--ckpt TONES | latest.pt: there is no such checkpoint; give a run's folder or its latest.pt
--data one-fold | 0 training clips; a probe needs at least 3
--data nothing | --data nothing: not a data set; one of toy,
--data-dir TONES/train/low | a probe needs labels""".strip().splitlines()


WORDS = ["--lr ²", "--epochs 1e3", "--views ²", "--seeds 1.5", "--layers ²", "--crops 2"]


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
