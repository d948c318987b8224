"""Measures, heads and retrieval say what they mean; which head, rates and views a probe takes."""
import functools
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize, one_hot

import common
import data
import probe
import retrieval
from conftest import CPU, INPUTS, METHOD, fails, names, tone, write, write_checkpoint
from slow import random

BOTH = ("a->v", "v->a", "a->av")


# ---- measures ------------------------------------------------------------------------------------------

def slow_map(scores, targets):
    """Mean over classes of: for each positive, the share of positives among those at least as high."""
    values = []
    for s, y in zip(scores.T, targets.double().T):
        precisions = [y[s >= own].mean().item() for own in s[y == 1]]
        if precisions:
            values.append(np.mean(precisions))
    return np.mean(values), len(values)


@pytest.mark.parametrize("levels", [1000, 4])
def test_mean_average_precision_equals_a_slow_loop_also_with_ties_and_without_empty_classes(levels):
    scores = (random(60, 7).sigmoid() * levels).round()
    targets = (random(60, 7, seed=1) > 0.8).float()
    targets[:, 3] = 0
    value, counted = probe.mean_average_precision(scores, targets)
    assert (value, counted) == (pytest.approx(slow_map(scores, targets)[0], abs=1e-9), 6)


def test_the_accuracy_counts_no_ties():
    assert probe.accuracy(torch.eye(4), torch.arange(4)) == 1
    assert probe.accuracy(torch.zeros(10, 4), torch.arange(10) % 4) == 0


def test_recall_equals_a_slow_loop_and_rows_are_the_queries():
    scores = random(40, 40)
    rank = []
    for i, row in enumerate(scores.tolist()):
        rank.append(sum(score >= row[i] for score in row))
    got = retrieval.recall(scores)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * np.mean(np.array(rank) <= k))
    assert got["median_rank"] == np.median(rank)
    assert retrieval.recall(scores.T) != got


def test_recall_of_random_embeddings_is_chance_and_ties_and_what_is_not_a_number_are_misses():
    chance = retrieval.chance(250)
    drawn = [retrieval.recall(random(250, 250, seed=seed))["R@10"] for seed in range(20)]
    std = 100 * (0.04 * 0.96 / 250) ** 0.5                  # of one draw
    assert np.mean(drawn) == pytest.approx(chance["R@10"], abs=4 * std / 20 ** 0.5)
    z = random(20, 5)
    assert retrieval.recall(retrieval.similarity(z, z, "predicted"))["R@1"] == 100
    for same in (z[:1].expand(20, 5), torch.full((20, 5), float("nan"))):
        worst = retrieval.recall(retrieval.similarity(z, same, "predicted"))
        assert worst["R@10"] == 0 and worst["median_rank"] >= retrieval.chance(20)["median_rank"]


def test_in_class_recall_does_not_reward_the_class_alone():
    labels = torch.arange(80) % 8
    by_class = one_hot(labels, 8).float() + 1e-3 * random(80, 8)
    others = by_class.roll(8, 0)                            # of each clip, another one of its class
    value, chance = retrieval.recall_in_class(by_class @ others.T, labels)
    assert chance == pytest.approx(10) and value < 30
    assert retrieval.recall(by_class @ others.T)["R@10"] > 50
    assert retrieval.recall_in_class(torch.eye(80), labels)[0] == 100


def test_views_are_averaged_as_probabilities():
    scores = random(5, 3, 4)
    for many, turn in ((False, lambda x: x.softmax(-1)), (True, torch.sigmoid)):
        expected = sum(turn(scores[:, view]) for view in range(3)) / 3
        torch.testing.assert_close(probe.average(scores, many), expected)


def test_the_single_query_has_the_output_and_the_gradients_of_the_library_s_attention():
    head = probe.AttentiveHead(128, 5).double()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = random(3, 7, 128).double().requires_grad_()
    x = head.norm(tokens)
    wanted = head.linear(head.attend(head.query.expand(3, -1, -1), x, x)[0][:, 0])
    got = head(tokens, None)
    torch.testing.assert_close(got, wanted)
    learnt = [tokens, *head.parameters()]
    gradients = [torch.autograd.grad(scores.square().mean(), learnt) for scores in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


def test_blocks_are_four_in_front_of_an_attentive_head_of_64_dimensions_a_query():
    plain = probe.HEADS["attentive"](128, 5)
    head = probe.HEADS["blocks"](128, 5)
    plain.load_state_dict(head.state_dict(), strict=False)
    assert (len(plain.blocks), len(head.blocks), plain.attend.num_heads) == (0, 4, 2)
    tokens = x = random(3, 7, 128)
    for block in head.blocks:
        assert block.heads == 2 and block.fc1.out_features == 512
        x = block(x)
    torch.testing.assert_close(head(tokens, None), plain(x, None))
    assert probe.HEADS["blocks"](32, 2)(random(2, 3, 32), None).shape == (2, 2)


def fit(kind, x, y, classes, lrs, epochs, batch=64):
    """What a probe that is trained on the first three quarters says of the last."""
    n = len(x) * 3 // 4
    return probe.probe_cached(kind, x[:n], y[:n], x[n:], y[n:], classes, lrs, epochs, batch, 0)


@pytest.mark.parametrize("kind, shape", [("linear", (600, 2, 32)), ("attentive", (600, 2, 6, 64))])
def test_a_probe_finds_a_planted_feature_and_nothing_in_noise(kind, shape):
    y = torch.arange(600) % 4
    noise = random(*shape)
    planted = noise.clone()
    planted[..., :4] += 4 * one_hot(y, 4).view(600, *[1] * (len(shape) - 2), 4)
    assert fit(kind, planted, y, 4, (1e-3, 1e-2), 25)["value"] > 90
    assert fit(kind, noise, y, 4, (1e-3, 1e-2), 25)["value"] < 40                       # chance: 25


def test_a_head_with_blocks_finds_what_stands_in_the_relation_of_two_tokens():
    """The class is whether two tokens agree: neither of them alone tells it."""
    signs = random(400, 2).sign()
    x = 0.1 * random(400, 1, 3, 32, seed=1)
    x[:, 0, :2, 0] += 3.0 * signs
    y = (signs[:, 0] == signs[:, 1]).long()
    assert fit("blocks", x, y, 2, (1e-3,), 12, 32)["value"] > 90                        # chance: 50


def test_a_multi_label_probe_learns_and_reports_map():
    x = random(400, 1, 16)
    y = (x[:, 0] @ random(16, 5, seed=1) > 2).float()
    result = fit("linear", x, y, 5, (1e-2,), 60)
    assert result["metric"] == "mAP" and result["value"] > 80 and result["classes"] == 5


def test_the_learning_rate_is_chosen_without_the_test_set():
    """Whatever the test targets are, the same rate is chosen; with the test set in sight another would be."""
    y = torch.arange(300) % 3
    chosen = set()
    for turn in range(3):
        y_test = (y[225:] + turn) % 3
        result = fit("linear", random(300, 1, 16), torch.cat([y[:225], y_test]), 3, (1e-5, 1e-3, 1e-1), 10)
        chosen.add(result["lr"])
    assert len(chosen) == 1


# ---- which clips are searched --------------------------------------------------------------------------

def listing_of(labels, classes, multilabel=False):
    files = [f"{i:011d}_000001.mp4" for i in range(len(labels))]
    return data.make_listing("x", "", files, labels, classes, multilabel)


def test_retrieval_draws_five_clips_of_each_class_with_a_seed():
    listing = listing_of([[i % 7] for i in range(100)], "abcdefg")
    chosen = [retrieval.choose(listing, "5", seed) for seed in (0, 0, 1)]
    assert np.bincount(chosen[0].labels).tolist() == [5] * 7
    assert (chosen[0].files == chosen[1].files).all() and (chosen[0].files != chosen[2].files).any()


def test_a_clip_with_several_labels_counts_for_its_rarest():
    listing = listing_of([[0, 1]] * 6 + [[0]] * 20 + [[]], "abc", True)
    assert retrieval.rarest(listing).tolist() == 6 * [1] + 20 * [0] + [-1]
    assert retrieval.rarest(listing, among=[0]).tolist() == 26 * [0] + [-1]
    chosen = retrieval.choose(listing, "5", 0)
    assert len(chosen) == 10 and sum(1 in chosen.clip_labels(i) for i in range(10)) == 5


def test_a_list_keeps_its_order_takes_no_clip_twice_and_an_exact_name_wins_over_an_id(tmp_path, capsys):
    files = ["word_1.mp4", "word_10.mp4", "word_100.mp4", "Y00000000007.wav", "00000000002_000001.mp4"]
    wanted = tmp_path / "ids.txt"
    wanted.write_text("00000000007\nword_1\nword_10.mp4\n\n00000000002\nword_1\nnot_there_x\n")
    chosen = retrieval.choose(data.make_listing("x", "", files, None, []), str(wanted))
    assert names(chosen) == [files[3], files[0], files[1], files[4]]
    assert "1 of 5 ids" in capsys.readouterr().out


# ---- retrieval -----------------------------------------------------------------------------------------

def view_means(encoder, listing, modality, of):
    """(N, D): of each clip the mean over three views, embedded one by one, of what `of` makes of (1, D)."""
    plan = functools.partial(retrieval.random_views, 3, INPUTS)
    clips = data.Clips(listing, INPUTS, plan, seed=0, replace=False)
    prepare = data.normalize_video if modality == "video" else torch.as_tensor
    means = []
    for i in range(len(listing)):
        views = [encoder(**{modality: prepare(x)[None]})[1] for x in clips[0, i][modality]]
        means.append(sum(of(z)[0] for z in views) / 3)
    return torch.stack(means).detach()


def test_a_clip_is_found_by_the_l1_distance_of_what_the_other_modality_predicts(toy, tmp_path):
    listing = data.list_clips("toy", toy, "test").subset(range(7))
    encoder = common.load_encoder(write_checkpoint(tmp_path, cross=BOTH), cross=True)
    result = retrieval.evaluate(encoder, listing, 3, 0, CPU)
    scores = {}
    for way, (asks, finds) in {"A->V": ("audio", "video"), "V->A": ("video", "audio")}.items():
        queries = view_means(encoder, listing, asks, encoder.cross[way.lower()])
        targets = view_means(encoder.teacher, listing, finds, lambda z: layer_norm(z, z.shape[1:]))
        scores[way] = -(queries[:, None] - targets).abs().mean(2).numpy()
        rank = (scores[way] >= scores[way].diagonal()[:, None]).sum(1)
        assert result[way]["R@1"] == pytest.approx(100 * np.mean(rank == 1)) and len(set(rank)) > 2
        assert result[way]["R@5"] == pytest.approx(100 * np.mean(rank <= 5)) and "class R@1" in result[way]
    _, best, _ = retrieval.query(encoder, listing.path(0), str(toy / "test"), 16, 3, 0, CPU)
    found = [score for score, _ in best]
    assert len(best) == 16 and found == sorted(found, reverse=True)
    of_itself, = [score for score, path in best if path == listing.path(0)]
    assert of_itself == pytest.approx(scores["A->V"][0, 0], abs=1e-5)


@pytest.mark.parametrize("parts, first, lacks", [
    (dict(cross=BOTH), "predicted", ["projected"]),
    (dict(cross=("a->v",)), "encoder", ["predicted", "projected"]),
    (dict(projector=(16, 8)), "projected", ["predicted"])])
def test_a_checkpoint_is_searched_as_its_authors_do_and_refuses_what_it_lacks(parts, first, lacks, tmp_path):
    run_folder = write_checkpoint(tmp_path, **parts)
    for untrained in (False, True):
        encoder = common.load_encoder(run_folder, untrained=untrained, cross=True)
        assert retrieval.choose_embedding(encoder) == first
        assert retrieval.choose_embedding(encoder, "encoder") == "encoder"
    for name in lacks:
        sentence = f"--embedding {name}: .* has no .* give --embedding encoder"
        fails(retrieval.choose_embedding, encoder, name, match=sentence)


@pytest.mark.parametrize("embedding, width", [("projected", 8), ("encoder", 64)])
def test_the_cosine_is_that_of_the_normalised_means_over_the_views(embedding, width, toy, tmp_path):
    encoder = common.load_encoder(write_checkpoint(tmp_path, projector=(16, 8)))
    listing = data.list_clips("toy", toy, "test").subset(range(4))
    got, read = retrieval.embed(encoder, listing, 3, process=CPU, workers=0, embedding=embedding)
    assert read["index"].tolist() == [0, 1, 2, 3]
    for modality, (queries, candidates) in got.items():
        of = encoder.projector if embedding == "projected" else torch.nn.Identity()
        expected = normalize(view_means(encoder, listing, modality, of))
        assert expected.shape == (4, width) and torch.equal(queries, candidates)
        torch.testing.assert_close(queries, expected, atol=1e-5, rtol=1e-4)


def test_a_query_lists_its_best_matches_by_negative_distances(toy, tmp_path, capsys):
    folder = write_checkpoint(tmp_path, cross=BOTH)
    words = f"--ckpt {folder} --query {toy}/test/00003.mp4 --folder {toy}/test --top 3 --views 1"
    retrieval.main([*words.split(), "--workers", "0", "--device", "cpu"])
    first, *rows = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in rows]
    assert first.startswith("by the audio of") and len(scores) == 3
    assert scores == sorted(scores, reverse=True) and scores[0] < 0


@pytest.mark.parametrize("more, sentence", [
    ("--data toy --ckpt nowhere", "no such checkpoint"),
    ("", "give either"), ("--data toy --query x.wav", "give either"),
    ("--data toy --views 0", "out of range"),
    ("--data esc50", "--data esc50 has no pictures; retrieval needs both"),
    *[(f"--data toy --data-dir TOY --clips {word}", f"--clips {word}.*: neither 'all', nor a number")
      for word in ("0", "²", "-1", "nan", "1e3", 5000 * "9")],
    ("--data toy --views -1", "--views -1 is out of range"),
    ("--data toy --top 0", "--top 0 is out of range"),
    ("--data toy --seed -1", "--seed -1 is out of range"),
    ("--query TOY/test/00000.mp4 --folder nowhere", "--folder nowhere: there is no such folder"),
    ("--query TOY/test/00000.mp4 --folder EMPTY", "EMPTY"),
    ("--query TOY/world.json --folder TOY", "--query TOY/world.json: no readable clip"),
    ("--query TOY/test --folder TOY", "--query TOY/test: there is no such file"),
    ("--data folder --data-dir ALONE --clips all", "1 clips have both sound and picture; .* at least 2"),
    ("--data toy --data-dir TOY --embedding projected", "has no projector"),
    ("--query x.wav --folder .", "there is no such file")])
def test_bad_input_to_retrieval_ends_in_one_sentence(more, sentence, toy, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    shutil.copy(toy / "test" / "00000.mp4", tmp_path / "alone")
    for name, folder in (("TOY", toy), ("EMPTY", tmp_path / "empty"), ("ALONE", tmp_path / "alone")):
        more = more.replace(name, str(folder))
        sentence = sentence.replace(name, str(folder))
    words = f"--ckpt {write_checkpoint(tmp_path)} --device cpu --workers 0 {more}"
    fails(retrieval.main, words.split(), match=sentence)


@pytest.mark.parametrize("more", ["--data toy --clips all", "--query TOY/test/00001.mp4 --folder TOY/test"])
@pytest.mark.parametrize("which, embedding", [("target", "encoder"), ("target", "predicted"),
                                              ("cross.a->v", "predicted"), ("projector", "projected")])
def test_weights_that_are_no_numbers_find_nothing(which, embedding, more, toy, tmp_path):
    parts = dict(projector=(16, 8)) if which == "projector" else dict(cross=BOTH)
    content = common.load_checkpoint(write_checkpoint(tmp_path, **parts))
    for name, weight in content["model"].items():
        if name.startswith(which) and weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(content, tmp_path / "latest.pt")
    words = f"--ckpt {tmp_path} --data-dir {toy} {more} --embedding {embedding} --views 1 --workers 0"
    if "--query" in more:
        words = words.replace(f"--data-dir {toy}", "")
    sentence = r"\.mp4: what the encoder says of this clip is no finite number"
    fails(retrieval.main, words.replace("TOY", str(toy)).split(), match=sentence)
    assert not (tmp_path / "retrieval.jsonl").exists()


def test_a_file_whose_sound_begins_late_is_asked_by_its_sound(toy, tmp_path):
    silence = np.zeros(16000 * 4)
    silence[40000:] = tone(500, 1.5)
    write(tmp_path / "late.wav", wave=silence, audio="pcm_s16le")
    encoder = common.load_encoder(write_checkpoint(tmp_path))
    asks, best, left_out = retrieval.query(encoder, tmp_path / "late.wav", toy / "test", 3, 2, 0, CPU)
    assert (asks, len(best), left_out) == ("audio", 3, 0)


# ---- which head, which rates, which views --------------------------------------------------------------

def ask(**given):
    """The flags of probe.py."""
    return Namespace(**vars(probe.get_args(["--ckpt", "x", "--data", "toy"])) | given)


@pytest.mark.parametrize("given, expected, schedule", [
    (dict(probe="linear"), ("linear", (1e-2, 1e-1), None, 0.0), (250, 250)),
    (dict(probe="attentive"), ("blocks", (1e-3, 3e-3), None, 0.0), (32, 32)),           # at least 2,000 steps
    (dict(probe="attentive", head="attentive"), ("attentive", probe.FROZEN_LRS, None, 0.0), (250, 250)),
    (dict(probe="attentive", head="blocks", lr=[0.5]), ("blocks", [0.5], None, 0.0), (32, 32)),
    (dict(probe="finetune", head="blocks"), ("blocks", (2e-3,), 1e-5, 0.1), (64, 2)),
    (dict(probe="finetune", encoder_lr=0.0), ("linear", (2e-3,), 0.0, 0.1), (64, 2))])
def test_a_probe_has_the_head_and_the_rates_of_its_method_unless_others_are_given(given, expected, schedule):
    protocol = probe.choose_protocol(ask(**given), METHOD, listing_of([[0]] * 2000, "a"))
    assert (protocol.head, protocol.lrs, protocol.encoder_lr, protocol.smoothing) == expected
    assert (protocol.batch_size, protocol.epochs) == schedule


PICTURES = dict(data="kinetics400", clip_seconds=10.0)


@pytest.mark.parametrize("given, views, crops, train, seconds", [
    # as many views as the set's own table says, else the method's; one where a view holds each whole clip
    (dict(), 3, 1, 2, 2.0), (dict(probe="finetune"), 2, 1, 2, 2.0), (dict(crops=3), 3, 3, 2, 2.0),
    (dict(clip_seconds=1.0), 1, 1, 1, 2.0), (dict(clip_seconds=1.5), 3, 1, 2, 2.0),
    (dict(clip_seconds=1.5, modality="audio"), 1, 1, 1, 1.5),
    (dict(modality="audio", seconds=5.0), 3, 1, 2, 5.0),
    (dict(modality="video"), 3, 1, 2, 1.0), (dict(modality="video", clip_seconds=1.5), 3, 1, 2, 1.0),
    (PICTURES, 8, 3, 2, 2.0), (PICTURES | dict(probe="finetune"), 8, 3, 2, 2.0),
    (PICTURES | dict(modality="audio"), 8, 1, 2, 2.0), (PICTURES | dict(crops=1, views=2), 2, 1, 2, 2.0),
    (dict(data="ssv2"), 2, 3, 2, 1.0), (dict(data="ssv2", views=1), 1, 3, 2, 1.0),
    (dict(data="fsd50k"), 15, 1, 15, 2.0), (dict(data="esc50", fold=True), 3, 1, 3, 2.0)])
def test_views_and_crops_are_those_of_the_set_or_of_the_method_unless_others_are_given(
        given, views, crops, train, seconds, tmp_path):
    words = dict(given)
    clip_seconds = words.pop("clip_seconds", None)
    fold = np.zeros(1, np.int8) if words.pop("fold", False) else None
    listing = data.make_listing("x", "", ["a.mp4"], [[0]], ["a"], seconds=clip_seconds, fold=fold)
    got = probe.choose_views(ask(**words), common.load_encoder(write_checkpoint(tmp_path)), listing)
    assert (got.test, got.crops, got.train, got.inputs.seconds) == (views, crops, train, seconds)
    has = data.SETS[words.get("data", "toy")].has
    assert got.modality == words.get("modality", "av" if len(has) == 2 else has[0])


@pytest.mark.parametrize("takes, given, sentence", [
    ("av", dict(seconds=5.0), "pictures come in the 1 s of training; leave it out, or give --modality audio"),
    ("av", dict(modality="audio", crops=3), "--crops 3: --modality audio has no pictures to crop"),
    ("av", dict(data="ssv2", modality="av"), "--data ssv2 has no sound; use --modality video"),
    ("av", dict(data="esc50", modality="av"), "--data esc50 has no pictures; use --modality audio"),
    ("a", dict(data="ssv2"), "--modality video: made_up takes no video"),
    ("a", dict(modality="av"), "--modality av: made_up takes no video"),
    ("v", dict(data="esc50"), "--modality audio: made_up takes no audio")])
def test_views_that_the_set_or_the_encoder_lacks_are_refused(takes, given, sentence, tmp_path):
    run_folder = write_checkpoint(tmp_path, video="v" in takes, audio="a" in takes)
    encoder = common.load_encoder(run_folder)
    fails(probe.choose_views, ask(**given), encoder, listing_of([[0]], "a"), match=sentence)


def test_the_table_of_a_toy_run_has_both_ways_of_retrieval(toy, tmp_path, monkeypatch, capsys):
    run_folder = write_checkpoint(tmp_path, cross=BOTH)
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (8, 1))
    table = probe.toy_report(run_folder, toy, CPU, 0)
    assert json.loads((run_folder / "results.json").read_text()) == table
    for name in ("trained", "untrained", "raw input", "chance"):
        ways = set() if name == "raw input" else {"A->V", "V->A"}
        assert set(table[name]) - {"N", "left_out", "embedding", "chance"} == {"audio", "video", "av"} | ways
    shown = capsys.readouterr().out
    assert "A->V (N = 16)" in shown and shown.count("\n") == 8
