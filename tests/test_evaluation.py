"""Measures, heads and retrieval say what they mean; which head, rates and views a probe takes."""
import argparse
import functools
import itertools
import json

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, one_hot

import common
import data
import probe
import retrieval
import run
from common import UserError
from conftest import INPUTS, METHOD, write_checkpoint

CPU = run.Process(torch.device("cpu"))
BOTH = ("a->v", "v->a", "a->av")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- measures ------------------------------------------------------------------------------------------

def slow_map(scores, targets):
    """Mean over classes of: for each positive, the share of positives among those at least as high."""
    values = []
    for s, y in zip(scores.T.tolist(), targets.T.tolist()):
        precisions = []
        for own, positive in zip(s, y):
            if positive:
                ahead = [hit for score, hit in zip(s, y) if score >= own]
                precisions.append(sum(ahead) / len(ahead))
        if precisions:
            values.append(np.mean(precisions))
    return np.mean(values), len(values)


@pytest.mark.parametrize("levels", [None, 4])
def test_mean_average_precision_equals_a_slow_loop_also_with_ties_and_without_empty_classes(levels):
    scores = random(60, 7).sigmoid()
    if levels:
        scores = (scores * levels).round()
    targets = (random(60, 7, seed=1) > 0.8).float()
    targets[:, 3] = 0
    value, counted = probe.mean_average_precision(scores, targets)
    assert (value, counted) == (pytest.approx(slow_map(scores, targets)[0], abs=1e-9), 6)


def test_a_perfect_score_gets_all_and_a_constant_one_nothing_but_chance():
    targets = (random(200, 5) > 0.5).float()
    assert probe.mean_average_precision(targets, targets) == (1.0, 5)
    constant, _ = probe.mean_average_precision(torch.zeros(200, 5), targets)
    assert constant == pytest.approx(targets.mean().item(), abs=1e-6)
    assert probe.accuracy(torch.zeros(10, 4), torch.arange(10) % 4) == 0
    assert probe.accuracy(torch.eye(4), torch.arange(4)) == 1


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


def test_recall_of_the_same_embeddings_is_100_of_random_ones_chance_and_of_ties_or_nan_no_better():
    z = torch.nn.functional.normalize(random(250, 16), dim=1)
    assert retrieval.recall(z @ z.T) == {"R@1": 100, "R@5": 100, "R@10": 100, "median_rank": 1}
    chance = retrieval.chance(250)
    for value in (1.0, float("nan")):
        worst = retrieval.recall(torch.full((250, 250), value))
        assert worst["R@10"] == 0 and worst["median_rank"] >= chance["median_rank"]
    drawn = [retrieval.recall(random(250, 250, seed=seed))["R@10"] for seed in range(20)]
    std = 100 * (0.04 * 0.96 / 250) ** 0.5                  # of one draw
    assert np.mean(drawn) == pytest.approx(chance["R@10"], abs=4 * std / 20 ** 0.5)


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
    expected = sum(scores[:, view].softmax(-1) for view in range(3)) / 3
    torch.testing.assert_close(probe.average(scores, False), expected)
    expected = sum(scores[:, view].sigmoid() for view in range(3)) / 3
    torch.testing.assert_close(probe.average(scores, True), expected)


# ---- heads ---------------------------------------------------------------------------------------------

def test_an_attentive_head_is_blocks_a_query_for_each_64_dimensions_and_a_linear_map():
    for kind, blocks in (("attentive", 0), ("blocks", 4)):
        head = probe.HEADS[kind](128, 5)                    # two heads of 64
        tokens = x = random(3, 7, 128)
        for block in head.blocks:
            assert block.heads == 2 and block.fc1.out_features == 512
            x = block(x)
        x = layer_norm(x, (128,))
        weights = head.attend.in_proj_weight.chunk(3)
        biases = head.attend.in_proj_bias.chunk(3)
        q, k, v = (y @ weight.T + bias for y, weight, bias in zip((head.query[0], x, x), weights, biases))
        parts = []
        for part in (slice(0, 64), slice(64, 128)):
            scores = (k[..., part] @ q[0, part] / 8).softmax(1)                         # (B, N)
            parts.append((scores[..., None] * v[..., part]).sum(1))
        expected = head.linear(head.attend.out_proj(torch.cat(parts, 1)))
        assert len(head.blocks) == blocks
        torch.testing.assert_close(head(tokens, None), expected, atol=1e-5, rtol=1e-4)
        assert probe.HEADS[kind](32, 2)(random(2, 3, 32), None).shape == (2, 2)


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


# ---- a probe of cached features ------------------------------------------------------------------------

@pytest.mark.parametrize("kind, shape", [("linear", (600, 2, 32)), ("attentive", (600, 2, 6, 64))])
def test_a_probe_finds_a_planted_feature_and_nothing_in_noise(kind, shape):
    y = torch.arange(600) % 4
    noise = random(*shape)
    planted = noise.clone()
    planted[..., :4] += 4 * one_hot(y, 4).view(600, *[1] * (len(shape) - 2), 4)
    scores = {}
    for name, x in (("planted", planted), ("noise", noise)):
        result = probe.probe_cached(kind, x[:450], y[:450], x[450:], y[450:], 4, (1e-3, 1e-2), 25, 64, 0)
        scores[name] = result["value"]
    assert scores["planted"] > 90 and scores["noise"] < 40                              # chance: 25


def test_a_head_with_blocks_finds_what_stands_in_the_relation_of_two_tokens():
    """The class is whether two tokens agree: neither of them alone tells it."""
    signs = random(400, 2).sign()
    x = 0.1 * random(400, 1, 3, 32, seed=1)
    x[:, 0, :2, 0] += 3.0 * signs
    y = (signs[:, 0] == signs[:, 1]).long()
    result = probe.probe_cached("blocks", x[:300], y[:300], x[300:], y[300:], 2, (1e-3,), 12, 32, 0)
    assert result["value"] > 90                             # chance: 50


def test_a_multi_label_probe_learns_and_reports_map():
    x = random(400, 1, 16)
    y = (x[:, 0] @ random(16, 5, seed=1) > 2).float()
    result = probe.probe_cached("linear", x[:300], y[:300], x[300:], y[300:], 5, (1e-2,), 60, 64, 0)
    assert result["metric"] == "mAP" and result["value"] > 80 and result["classes"] == 5


def test_the_learning_rate_is_chosen_without_the_test_set():
    """Whatever the test targets are, the same rate is chosen; with the test set in sight another would be."""
    x = random(300, 1, 16)
    y = torch.arange(300) % 3
    chosen = set()
    for turn in range(3):
        y_test = (y[200:] + turn) % 3
        lrs = (1e-5, 1e-3, 1e-1)
        result = probe.probe_cached("linear", x[:200], y[:200], x[200:], y_test, 3, lrs, 10, 64, 0)
        chosen.add(result["lr"])
    assert len(chosen) == 1
    train, held = probe.split_off(200, 0)
    assert len(held) == 20 and sorted([*train.tolist(), *held.tolist()]) == list(range(200))


# ---- which clips are searched --------------------------------------------------------------------------

def listing_of(labels, classes, multilabel=False):
    names = [f"{i:011d}_000001.mp4" for i in range(len(labels))]
    return data.make_listing("x", "", names, labels, classes, multilabel)


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
    names = ["word_1.mp4", "word_10.mp4", "word_100.mp4", "Y00000000007.wav", "00000000002_000001.mp4"]
    listing = data.make_listing("x", "", names, None, [])
    file = tmp_path / "ids.txt"
    file.write_text("00000000007\nword_1\nword_10.mp4\n\n00000000002\nword_1\nnot_there_x\n")
    chosen = retrieval.choose(listing, str(file))
    assert [bytes(file).decode() for file in chosen.files] == [names[3], names[0], names[1], names[4]]
    assert "1 of 5 ids" in capsys.readouterr().out


# ---- retrieval -----------------------------------------------------------------------------------------

def view_embeddings(encoder, listing, modality):
    """The embedding of each view by itself: a list of clips, each a list of three (1, D)."""
    plan = functools.partial(retrieval.random_views, 3, INPUTS)
    clips = data.Clips(listing, INPUTS, plan, seed=0, replace=False)
    embeddings = []
    for i in range(len(listing)):
        views = clips[0, i][modality]
        if modality == "video":
            views = [data.normalize_video(x) for x in views]
        embeddings.append([encoder(**{modality: x[None]})[1] for x in views])
    return embeddings


def l1(query, target):
    return -sum(abs(q - t) for q, t in zip(query, target)) / len(query)


def test_a_clip_is_found_by_the_l1_distance_of_what_the_other_modality_predicts(toy, tmp_path):
    run_folder = write_checkpoint(tmp_path, cross=BOTH)
    listing = data.list_clips("toy", toy, "test").subset(range(7))
    encoder = common.load_encoder(run_folder, cross=True)
    result = retrieval.evaluate(encoder, listing, 3, 0, CPU)
    scores = {}
    ways = (("A->V", "audio", "video", "a->v"), ("V->A", "video", "audio", "v->a"))
    for way, asks, finds, predictor in ways:
        queries = []
        for views in view_embeddings(encoder, listing, asks):
            queries.append((sum(encoder.cross[predictor](z)[0] for z in views) / 3).tolist())
        targets = []
        for views in view_embeddings(encoder.teacher, listing, finds):
            targets.append((sum(layer_norm(z[0], z[0].shape) for z in views) / 3).tolist())
        pairs = itertools.product(queries, targets)
        scores[way] = np.reshape([l1(query, target) for query, target in pairs], (7, 7))
        rank = (scores[way] >= scores[way].diagonal()[:, None]).sum(1)
        assert result[way]["R@1"] == pytest.approx(100 * np.mean(rank == 1)) and len(set(rank)) > 2
        assert result[way]["R@5"] == pytest.approx(100 * np.mean(rank <= 5))
        assert result[way]["median_rank"] == np.median(rank)
    file = listing.path(0)
    _, best, _ = retrieval.query(encoder, file, str(toy / "test"), 16, 3, 0, CPU)
    found = [score for score, _ in best]
    assert len(best) == 16 and found == sorted(found, reverse=True)
    assert {path: score for score, path in best}[file] == pytest.approx(scores["A->V"][0, 0], abs=1e-5)


def test_l1_ties_are_misses_and_so_is_what_is_not_a_number():
    z = random(9, 5)
    for same in (z[:1].expand(9, 5), torch.full((9, 5), float("nan"))):
        assert retrieval.recall(retrieval.similarity(z, same, "predicted"))["R@5"] == 0
    assert retrieval.recall(retrieval.similarity(z, z, "predicted"))["R@1"] == 100


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
        words = ["--ckpt", str(run_folder), "--data", "toy", "--device", "cpu", "--embedding", name]
        with pytest.raises(UserError, match=f"--embedding {name}: .* has no .* give --embedding encoder"):
            retrieval.main(words)


@pytest.mark.parametrize("embedding, width", [("projected", 8), ("encoder", 64)])
def test_the_cosine_is_that_of_the_normalised_means_over_the_views(embedding, width, toy, tmp_path):
    encoder = common.load_encoder(write_checkpoint(tmp_path, projector=(16, 8)))
    listing = data.list_clips("toy", toy, "test").subset(range(4))
    got, read = retrieval.embed(encoder, listing, 3, process=CPU, workers=0, embedding=embedding)
    assert read["index"].tolist() == [0, 1, 2, 3]
    for modality, roles in got.items():
        for i, views in enumerate(view_embeddings(encoder, listing, modality)):
            mean = sum(encoder.projector(z)[0] if embedding == "projected" else z[0] for z in views) / 3
            assert len(mean) == width
            for role in roles:
                torch.testing.assert_close(role[i], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_the_command_searches_writes_its_row_and_lists_negative_distances(toy, tmp_path, capsys):
    run_folder = write_checkpoint(tmp_path, cross=BOTH)
    words = ["--ckpt", str(run_folder), "--workers", "0", "--device", "cpu", "--views", "1"]
    search = [*words, "--data", "toy", "--data-dir", str(toy), "--clips", "1"]
    retrieval.main(search)
    retrieval.main([*search, "--embedding", "encoder"])
    rows = [json.loads(line) for line in (run_folder / "retrieval.jsonl").read_text().splitlines()]
    assert [row["embedding"] for row in rows] == ["predicted", "encoder"]
    assert rows[0]["N"] == 8 and "class R@1" in rows[0]["A->V"]
    capsys.readouterr()
    folder = toy / "test"
    retrieval.main([*words, "--query", str(folder / "00003.mp4"), "--folder", str(folder), "--top", "3"])
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0


@pytest.mark.parametrize("more, sentence", [
    (["--data", "toy", "--ckpt", "nowhere"], "no such checkpoint"), ([], "give either"),
    (["--data", "toy", "--query", "x.wav"], "give either"),
    (["--data", "toy", "--views", "0"], "out of range"),
    (["--data", "esc50"], "--data esc50 has no pictures; retrieval needs both"),
    (["--data", "ssv2"], "--data ssv2 has no sound; retrieval needs both"),
    (["--data", "toy", "--clips", "0"], "neither 'all', nor a number"),
    (["--query", "x.wav", "--folder", "."], "there is no such file")])
def test_bad_input_to_retrieval_ends_in_one_sentence(more, sentence, toy, tmp_path):
    words = ["--ckpt", str(write_checkpoint(tmp_path)), "--device", "cpu"]
    if "toy" in more:
        words += ["--data-dir", str(toy)]
    with pytest.raises(UserError, match=sentence) as error:
        retrieval.main([*words, *more])
    assert "\n" not in str(error.value)


# ---- which head, which rates, which views --------------------------------------------------------------

def ask(**given):
    """The flags of probe.py."""
    words = probe.get_args(["--ckpt", "x", "--data", "toy"])
    return argparse.Namespace(**vars(words) | given)


@pytest.mark.parametrize("given, expected", [
    (dict(probe="linear"), ("linear", (1e-2, 1e-1), None, 0.0)),
    (dict(probe="attentive"), ("blocks", (1e-3, 3e-3), None, 0.0)),
    (dict(probe="attentive", head="attentive"), ("attentive", probe.FROZEN_LRS, None, 0.0)),
    (dict(probe="attentive", head="blocks", lr=[0.5]), ("blocks", [0.5], None, 0.0)),
    (dict(probe="finetune"), ("linear", (2e-3,), 1e-5, 0.1)),
    (dict(probe="finetune", head="blocks"), ("blocks", (2e-3,), 1e-5, 0.1)),
    (dict(probe="finetune", encoder_lr=0.0), ("linear", (2e-3,), 0.0, 0.1))])
def test_a_probe_has_the_head_and_the_rates_of_its_method_unless_others_are_given(given, expected):
    protocol = probe.choose_protocol(ask(**given), METHOD, listing_of([[0]] * 2000, "a"))
    assert (protocol.head, protocol.lrs, protocol.encoder_lr, protocol.smoothing) == expected
    batch, epochs = {"linear": (250, 250), "attentive": (250, 250), "finetune": (64, 2)}[given["probe"]]
    if given["probe"] == "attentive" and protocol.head == "blocks":
        batch, epochs = 32, 32                              # at least 2,000 steps
    assert (protocol.batch_size, protocol.epochs) == (batch, epochs)


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
    if got.modality == "av":  # the pictures' places are spread over the clip, too
        places = data.even_views(3, got.inputs, None, 10.0)
        assert [view.pictures for view in places] == [(0.0, 1.0), (4.5, 1.0), (9.0, 1.0)]


@pytest.mark.parametrize("takes, given, sentence", [
    ("av", dict(seconds=5.0), "pictures come in the 1 s of training; leave it out, or give --modality audio"),
    ("av", dict(modality="audio", crops=3), "--crops 3: --modality audio has no pictures to crop"),
    ("av", dict(data="ssv2", modality="av"), "--data ssv2 has no sound; use --modality video"),
    ("av", dict(data="esc50", modality="av"), "--data esc50 has no pictures; use --modality audio"),
    ("a", dict(data="ssv2"), "--modality video: made_up takes no video"),
    ("a", dict(modality="av"), "--modality av: made_up takes no video"),
    ("v", dict(data="esc50"), "--modality audio: made_up takes no audio"),
    ("av", dict(data="sounds"), "--data sounds: not a data set; one of toy, ")])
def test_views_that_the_set_or_the_encoder_lacks_are_refused(takes, given, sentence, tmp_path):
    run_folder = write_checkpoint(tmp_path, video="v" in takes, audio="a" in takes)
    with pytest.raises(UserError, match=sentence):
        probe.choose_views(ask(**given), common.load_encoder(run_folder), listing_of([[0]], "a"))


# ---- the table of a toy run ----------------------------------------------------------------------------

@pytest.mark.parametrize("modalities", [("video",), ("audio", "video")])
def test_the_table_of_a_toy_run_has_what_the_encoder_takes(modalities, toy, tmp_path, monkeypatch, capsys):
    two = len(modalities) == 2
    run_folder = write_checkpoint(tmp_path, audio="audio" in modalities, cross=BOTH if two else ())
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (8, 1))
    table = probe.toy_report(run_folder, toy, CPU, 0)
    ways = {"A->V", "V->A"} if two else set()
    columns = {*modalities, *(["av"] if two else []), *ways}
    assert json.loads((run_folder / "results.json").read_text()) == table
    for name in ("trained", "untrained", "raw input", "chance"):
        of_row = columns - ways if name == "raw input" else columns
        assert set(table[name]) - {"N", "left_out", "embedding", "chance"} == of_row
    shown = capsys.readouterr().out
    assert ("A->V (N = 16)" in shown) == two and shown.count("\n") == 8
