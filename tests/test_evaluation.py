"""Retrieval and probes say what they mean; which clips, heads, rates and views a probe takes."""
import functools
import inspect
import json
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize, one_hot

import ajepa
import avjepa_lejepa
import avjepa_ncsu
import common
import data
import features
import heads as kinds
import mjepa
import probe
import retrieval
import run
from conftest import CPU, INPUTS, METHOD, fails, names, tone, write, write_checkpoint, write_two_steps
from slow import quicken_table, random, record

BOTH = ("a->v", "v->a", "a->av")


# ---- measures of retrieval -----------------------------------------------------------------------------

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


# ---- probes --------------------------------------------------------------------------------------------

def planted(x, y, classes):
    """(a listing of sounds of the classes y, their features x (N, V, D) or tokens (N, V, n, D), kept)."""
    labels = [torch.as_tensor(row).nonzero().flatten().tolist() if y.ndim > 1 else [int(row)] for row in y]
    listing = listing_of(labels, [str(c) for c in range(classes)], y.ndim > 1)
    index = torch.arange(len(x))
    tokens, embedding = (x, x.mean(2)) if x.ndim == 4 else (None, x)
    seen = Namespace(dim=x.shape[-1])
    views = Namespace(modality="audio", train=x.shape[1])
    return listing, features.Cached(
        seen, listing, views, CPU, index, torch.ones(x.shape[:2], dtype=torch.bool), tokens, embedding,
        {"audio": (index, tokens, embedding)})


def made_protocol(kind, lrs, **more):
    """The general protocol of a frozen encoder, with one head and what is given."""
    values = {name: row[0] for name, row in probe.PROTOCOL.items()}
    return Namespace(**{**values, "probe": "linear", "heads": {kind: lrs}, "seeds": [0], "frozen": True,
                        "mix": 0, "least_steps": 0, "batch_share": 1.0, **more})


def fit(kind, x, y, classes, lrs, epochs, batch=64, seed=0, **more):
    """What a probe that is trained on the first three quarters says of the last."""
    n = len(x) * 3 // 4
    listing, source = planted(x, y, classes)
    protocol = made_protocol(kind, lrs, epochs=epochs, batch_size=batch, **more)
    inner, held = probe.divide(listing, np.arange(n), protocol, seed)
    task = probe.Task(seed, 0, inner, held, np.arange(n, len(x)))
    found = probe.fit_and_test(protocol, (source, source), listing, listing, task, ["audio"])
    return found[kind, "audio"]


@pytest.mark.parametrize("kind, shape, epochs", [
    ("linear", (600, 2, 32), 25), ("standardised", (600, 2, 32), 25), ("attentive", (600, 2, 6, 64), 10),
    ("cross", (600, 2, 6, 64), 10), ("regression", (600, 2, 32), None)])
def test_a_probe_finds_a_planted_feature_and_nothing_in_noise(kind, shape, epochs):
    y = torch.arange(600) % 4
    noise = random(*shape)
    found = noise.clone()
    found[..., :4] += 4 * one_hot(y, 4).view(600, *[1] * (len(shape) - 2), 4)
    lrs = () if kind == "regression" else (1e-3, 1e-2)
    assert fit(kind, found, y, 4, lrs, epochs)["value"] > 90
    assert fit(kind, noise, y, 4, lrs, epochs)["value"] < 40                                # chance: 25


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
    for more in (dict(), dict(pos_weight=True, average="logits", warmup=0.05)):
        result = fit("standardised", x, y, 5, (1e-2,), 60, **more)
        assert result["metric"] == "mAP" and result["value"] > 80 and result["classes"] == 5
    fails(fit, "regression", x, y, 5, (), 1, match="several labels, which a regression does not take")


@pytest.mark.parametrize("kind, lrs", [("linear", (1e-5, 1e-3, 1e-1)), ("regression", ())])
def test_the_rate_is_chosen_without_the_test_set(kind, lrs):
    """Whatever the test targets are, the same rate is chosen; with the test set in sight another would be."""
    y = torch.arange(300) % 3
    chosen = set()
    for turn in range(3):
        y_test = (y[225:] + turn) % 3
        result = fit(kind, random(300, 1, 16), torch.cat([y[:225], y_test]), 3, lrs, 10)
        chosen.add((result["lr"], result.get("C")))
    assert len(chosen) == 1


@pytest.mark.parametrize("kind, shape, epochs", [
    ("linear", (300, 1, 96), 30), ("standardised", (300, 1, 96), 30), ("attentive", (300, 1, 4, 96), 30)])
def test_of_a_mix_the_block_that_carries_the_class_counts_most(kind, shape, epochs):
    x = random(*shape)
    y = torch.arange(300) % 3
    x[..., 32:35] += 3 * one_hot(y, 3).view(300, *[1] * (len(shape) - 2), 3)     # in the second of three
    found = fit(kind, x, y, 3, (1e-1,), epochs, mix=3)
    first, second, third = found["mix_weights"]
    assert second > 2 * max(first, third) and first + second + third == pytest.approx(1, abs=1e-3)
    assert found["value"] > 80 and all(round(w, 4) == w for w in found["mix_weights"])


def test_a_head_never_trains_on_official_validation_clips():
    """Their features are not a number: a head that saw them would not be one either."""
    y = torch.arange(24) % 3
    x = random(24, 1, 8) + 5 * one_hot(y, 8)[:, None]
    listing, source = planted(x, y, 3)
    listing.held = np.arange(24) % 8 == 7
    x[torch.from_numpy(listing.held)] = float("nan")
    for lrs in ((1e-2,), (1e-2, 1e-3)):
        protocol = made_protocol("linear", lrs, epochs=30, batch_size=8)
        inner, held = probe.divide(listing, range(24), protocol, 0)
        assert held.tolist() == [7, 15, 23] and sorted([*inner, *held]) == list(range(24))
        task = probe.Task(0, 0, inner, held, inner)
        found = probe.fit_and_test(protocol, (source, source), listing, listing, task, ["audio"])
        assert found["linear", "audio"]["value"] == 100


def test_a_head_that_was_lost_to_its_learning_rate_is_neither_chosen_nor_tested(monkeypatch):
    y = torch.arange(40) % 2
    x = random(40, 1, 8)
    x[:, 0, 0] += 4 * y
    real = kinds.average
    lost = []

    def average(scores, *more):
        return real(scores, *more) * (float("nan") if lost and lost.pop(0) else 1)

    monkeypatch.setattr(kinds, "average", average)
    lost = [True, False, False]                             # the first of two, when they are compared
    assert fit("linear", x, y, 2, (1e-3, 1e-2), 50, 8)["lr"] == 1e-2
    lost = [True]                                           # the only one, when it is tested
    sentence = "scores of the test clips are not finite numbers.*; lower --lr"
    fails(fit, "linear", x, y, 2, (1e-2,), 50, 8, match=sentence)


@pytest.mark.parametrize("lrs, trained", [((1e-2,), [90]), ((1e-3, 1e-2), [81, 90])])
def test_all_labelled_clips_train_the_head_that_is_tested(lrs, trained, monkeypatch):
    """At once where there is one rate; again where a tenth of them has chosen it."""
    calls = record(monkeypatch, probe, "train_heads")
    fit("linear", random(120, 1, 8), torch.arange(120) % 3, 3, lrs, 2)
    assert [len(chosen) for (_, _, _, _, chosen, *_), _ in calls] == trained
    assert [len(heads) for (heads, *_), _ in calls] == [len(lrs), 1][:len(trained)]


@pytest.mark.parametrize("lrs", [(1e-2,), (1e-3, 1e-2)])
def test_the_log_of_a_head_has_its_losses_and_scores_on_the_way_which_change_nothing(
        lrs, tmp_path, monkeypatch):
    x = random(120, 1, 8)
    y = torch.arange(120) % 3
    x[..., :3] += one_hot(y, 3)[:, None]
    listing, source = planted(x, y, 3)
    outer = np.arange(90, 120)
    protocol = made_protocol("linear", lrs, steps=25, batch_size=16)
    task = probe.Task(0, 0, *probe.divide(listing, np.arange(90), protocol, 0), outer)
    given = (protocol, (source, source), listing, listing, task, ["audio"])
    plain = probe.fit_and_test(*given)
    calls = record(monkeypatch, kinds, "loss_of")
    watch = probe.Watch(tmp_path / "a" / "b", 7, protocol, source, outer)
    assert probe.fit_and_test(*given, watch) == plain
    rows = run.read_log(tmp_path / "a" / "b")
    assert [row["step"] for row in rows] == [6, 9, 13, 19, 20, 24]
    of_steps = [loss.item() for _, loss in calls[-25:]]     # of the head that is tested, trained on all
    begin = 0
    for row in rows:
        expected = np.mean(of_steps[begin:row["step"] + 1])
        begin = row["step"] + 1
        assert row["loss/linear"] == pytest.approx(expected)
    key = "test top-1/linear"
    assert [row["step"] for row in rows if key in row] == [6, 13, 20, 24] and len(rows[0]) == 3
    assert rows[-1][key] == plain["linear", "audio"]["value"]


def test_a_head_that_is_lost_has_no_row_and_the_other_goes_on(tmp_path, monkeypatch):
    real = kinds.loss_of
    calls = []

    def loss_of(*more):
        calls.append(0)
        return real(*more) * (1 if len(calls) % 2 else float("inf"))

    monkeypatch.setattr(kinds, "loss_of", loss_of)
    listing, source = planted(random(20, 1, 8), torch.arange(20) % 2, 2)
    protocol = made_protocol("linear", (1e-3, 1e-2), steps=10, batch_size=8)
    watch = probe.Watch(tmp_path, None, protocol, source, np.arange(20))
    probe.fit_heads(protocol, source, listing, np.arange(20), None, 0, watch)
    row, = run.read_log(tmp_path)
    assert set(row) == {"step", "loss/linear, lr 0.001"}


def test_heads_side_by_side_are_those_trained_alone_but_for_the_norm_that_clips_them_together():
    x = random(90, 2, 5, 64)
    y = torch.arange(90) % 3
    x[..., :3] += one_hot(y, 3)[:, None, None]
    listing, source = planted(x, y, 3)
    for clip, same in ((None, True), (0.01, False)):
        found = []
        for trained in (["linear"], ["attentive"], ["linear", "attentive"]):
            protocol = made_protocol("linear", (), batch_size=30, epochs=2, clip_grad=clip)
            protocol.heads = dict.fromkeys(trained, (1e-3,))
            heads, _ = probe.fit_heads(protocol, source, listing, np.arange(90), None, 0)
            found += heads
        linear, _, beside, _ = found
        assert torch.equal(linear.linear.weight, beside.linear.weight) == same


def test_a_class_weighs_as_many_negatives_as_positives_and_the_head_starts_and_ends_as_the_protocol_says(
        monkeypatch):
    """Rates, clipping, weights and smoothing of a step are those of the protocol."""
    x = random(40, 1, 8)
    y = (random(40, 3, seed=1) > 0.5).float()
    losses = record(monkeypatch, kinds, "loss_of")
    rates = record(monkeypatch, kinds, "learning_rate")
    fit("linear", x, y, 3, (2e-3,), 5, 10, pos_weight=True, smoothing=0.1, warmup=0.2, warmup_start=0.1,
        lr_end=1e-7)
    (_, _, smoothing, weight), _ = losses[0]
    positives = y[:30].sum(0)
    torch.testing.assert_close(weight, (30 - positives) / positives)
    assert smoothing == 0.1 and len(rates) == 15
    assert rates[2][1] == pytest.approx(2e-3) and rates[-1][1] == pytest.approx(1e-7)


def test_few_labels_are_drawn_evenly_over_the_classes_by_the_seed():
    listing = listing_of([[0]] * 50 + [[1]] * 3 + [[2]] * 20 + [[3, 0]] * 4, "abcd", True)
    drawn, again, other = [probe.draw_evenly(listing, 16, seed) for seed in (0, 0, 1)]
    counts = np.bincount(retrieval.rarest(listing)[drawn])
    assert len(drawn) == 16 and (np.diff(drawn) > 0).all() and sorted(counts) == [3, 4, 4, 5]
    assert drawn.tolist() == again.tolist() != other.tolist()
    assert len(probe.draw_evenly(listing, 1000, 0)) == 77
    held = listing_of([[0]] * 9 + [[1]] * 9, "ab")
    held.held = np.arange(18) % 9 == 8
    inner, choose = probe.divide(held, range(18), made_protocol("linear", (1e-3,), clips=6), 0)
    assert choose.tolist() == [8, 17] and np.bincount(inner // 9).tolist() == [3, 3]


def test_seeds_give_the_mean_and_the_standard_deviation_of_the_sample():
    results = [dict(metric="top-1", value=v, lr=0.1, held_out=v, N=5) for v in (50.0, 60.0, 76.0)]
    joined = probe.join_seeds(results)
    assert joined["value"] == pytest.approx(62)
    assert joined["std"] == pytest.approx(np.std([50, 60, 76], ddof=1))
    assert joined["values"] == [50, 60, 76] and joined["held_out"] == [50, 60, 76]
    assert probe.join_seeds(results[:1])["std"] is None


# ---- which clips are searched --------------------------------------------------------------------------

def listing_of(labels, classes, multilabel=False):
    files = [f"{i:011d}_000001.mp4" for i in range(len(labels))]
    return data.make_listing("x", "", files, labels, classes, multilabel)


def test_a_hub_near_to_all_queries_is_found_by_none_of_them_once_the_ranking_takes_its_nearness_off():
    """One candidate lies in the middle of all queries, nearer than their own: the paper's rule ranks it first
    for each of them, both corrections find each query's own, and by the slow formula."""
    g = torch.Generator().manual_seed(0)
    queries = torch.randn(20, 8, generator=g) + 5
    candidates = 5 + 3 * (queries - 5)
    candidates[0] = queries.mean(0)
    plain = retrieval.rank_by("plain", queries, candidates, "predicted")
    assert (plain.argmax(1) == 0).float().mean() > 0.5
    hubs = retrieval.rank_by("hubs", queries, candidates, "predicted")
    centred = retrieval.rank_by("centred", queries, candidates, "predicted")
    for scores in (hubs, centred):
        assert (scores.argmax(1)[1:] == torch.arange(1, 20)).float().mean() > 0.9
    q = queries - queries.mean(0)
    c = candidates - candidates.mean(0)
    for i in range(20):
        for j in range(20):
            distances = [(queries[k] - candidates[j]).abs().mean().item() for k in range(20)]
            assert hubs[i, j].item() == pytest.approx(np.mean(distances) - distances[i], abs=1e-5)
            cosine = (q[i] @ c[j]) / (q[i].norm() * c[j].norm())
            assert centred[i, j].item() == pytest.approx(cosine.item(), abs=1e-5)


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
    ("--query x.wav --folder . --ranking hubs", "--ranking hubs is measured over many queries"),
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


def test_retrieval_with_several_checkpoints_writes_the_rows_that_each_has_alone(toy, tmp_path):
    earlier, folder = write_two_steps(tmp_path)
    words = f"--data toy --data-dir {toy} --clips all --views 1 --workers 0 --device cpu --ckpt".split()
    fails(retrieval.main, [*words, str(earlier), str(folder / "x.pt")], match="x.pt: there is no such")
    assert not (folder / "retrieval.jsonl").exists()
    for ckpts in ([earlier, folder], [earlier], [folder]):
        retrieval.main([*words, *map(str, ckpts)])
    rows = [json.loads(line) for line in (folder / "retrieval.jsonl").read_text().splitlines()]
    assert [(row["step"], row["ckpt"]) for row in rows] == 2 * [(2, str(earlier)), (3, str(folder))]
    for row, alone in zip(rows[:2], rows[2:]):
        assert {**row, "seconds": 0} == {**alone, "seconds": 0}
    assert rows[0]["A->V"]["R@10"] == 0 < rows[1]["A->V"]["R@10"]       # ties do not count
    assert {row["ranking"] for row in rows} == {"plain"}
    retrieval.main([*words, str(folder), "--ranking", "centred"])
    row = json.loads((folder / "retrieval.jsonl").read_text().splitlines()[-1])
    z, _ = retrieval.embed(common.load_encoder(folder, cross=True), data.list_clips("toy", toy, "test"), 1,
                           workers=0, process=CPU)
    queries = z["audio"][0] - z["audio"][0].mean(0)
    candidates = z["video"][1] - z["video"][1].mean(0)
    found = retrieval.recall(normalize(queries) @ normalize(candidates).T)
    assert row["ranking"] == "centred" and found.items() <= row["A->V"].items()
    words = ["--query", "x.wav", "--folder", ".", "--ckpt", str(earlier), str(folder)]
    fails(retrieval.main, words, match="--query is asked of one encoder; give one --ckpt")


@pytest.mark.parametrize("more", ["--data toy --clips all", "--query TOY/test/00001.mp4 --folder TOY/test"])
@pytest.mark.parametrize("which, embedding", [("target", "encoder"), ("target", "predicted"),
                                              ("cross.a->v", "predicted"), ("projector", "projected")])
def test_weights_too_large_to_compute_with_find_nothing(which, embedding, more, toy, tmp_path):
    parts = dict(projector=(16, 8)) if which == "projector" else dict(cross=BOTH)
    content = common.load_checkpoint(write_checkpoint(tmp_path, **parts))
    for name, weight in content["model"].items():
        if name.startswith(which) and weight.is_floating_point():
            weight.fill_(3e38)
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


def encoder_of(method, **args):
    return Namespace(method=method, args=args)


@pytest.mark.parametrize("given, heads, encoder_lr, smoothing, schedule", [
    (dict(probe="linear"), {"regression": ()}, 0.0, 0.0, None),
    (dict(probe="linear", recipe="paper"), {"standardised": (1e-2, 1e-1)}, 0.0, 0.0, (250, 2000)),
    (dict(probe="linear", head="linear"), {"linear": probe.LRS}, 0.0, 0.0, (250, 2000)),
    (dict(probe="attentive"), {"attentive": probe.LRS}, 0.0, 0.0, (250, 2000)),
    (dict(probe="attentive", recipe="paper"), {"blocks": (1e-3, 3e-3)}, 0.0, 0.0, (32, 2000)),
    (dict(probe="attentive", recipe="paper", head="attentive"), {"attentive": probe.LRS}, 0.0, 0.0,
     (250, 2000)),
    (dict(probe="attentive", head="blocks", lr=[0.5]), {"blocks": (0.5,)}, 0.0, 0.0, (32, 2000)),
    (dict(probe="attentive", epochs=3, batch_size=500), {"attentive": probe.LRS}, 0.0, 0.0, (500, 12)),
    (dict(probe="finetune", head="blocks"), {"blocks": (2e-3,)}, 1e-5, 0.1, (32, 124)),
    (dict(probe="finetune", encoder_lr=0.0, steps=7), {"standardised": (2e-3,)}, 0.0, 0.1, (64, 7))])
def test_a_probe_has_the_protocol_of_its_method_unless_other_values_are_given(
        given, heads, encoder_lr, smoothing, schedule):
    protocol = probe.choose_protocol(ask(**given), encoder_of(METHOD))
    assert (protocol.heads, protocol.encoder_lr, protocol.smoothing) == (heads, encoder_lr, smoothing)
    assert schedule is None or probe.schedule(protocol, 2000) == schedule


@pytest.mark.parametrize("more", [dict(lr=[1.0]), dict(epochs=3), dict(steps=3), dict(batch_size=8)])
def test_a_regression_takes_no_rates_and_no_steps(more):
    sentence = f"--{next(iter(more)).replace('_', '-')} has no effect on a regression"
    fails(probe.choose_protocol, ask(**more), encoder_of(METHOD), match=sentence)


@pytest.mark.parametrize("trained, data, column", [
    (dict(), "toy", "toy"), (dict(), "vggsound", "frozen"), (dict(data="toy"), "folder", "toy"),
    (dict(data="folder", recipe="toy"), "folder", "toy"), (dict(data="audioset"), "toy", "toy"),
    (dict(), "toy-still", "toy"), (dict(data="toy-still"), "folder", "toy")])
def test_small_sets_and_encoders_have_the_recipe_of_small_sets(trained, data, column):
    encoder = encoder_of(METHOD, **trained)
    assert probe.choose_protocol(ask(data=data), encoder).column == column
    assert probe.choose_protocol(ask(data=data, recipe="paper"), encoder).column == "frozen"
    assert probe.choose_protocol(ask(data=data, probe="finetune"), encoder).column == "finetune"


def test_av_jepa_is_evaluated_as_its_authors_do():
    """The rows of the facts, and 13 or 6 epochs by what the encoder has seen."""
    def protocol(probe_name, trained_on="audioset"):
        given = ask(probe=probe_name, data="vggsound")
        return probe.choose_protocol(given, encoder_of(avjepa_lejepa.METHOD, data=trained_on))

    for name in ("attentive", "finetune"):
        it = protocol(name)
        rate = 1e-3 if name == "attentive" else 2e-4
        assert it.heads == {"linear": (rate,), "attentive": (rate,)}
        assert (it.warmup, it.warmup_start, it.lr_end, it.clip_grad) == (0.05, 0.1, 1e-7, 1.0)
        assert (it.average, it.starts, it.resize, it.train_crop) == ("logits", "random", "crop", "flip")
    assert probe.schedule(protocol("linear"), 20_000) == (512, 15 * 39)
    assert protocol("linear").views == 4 and protocol("finetune").views == 6
    assert protocol("finetune").epochs == 13 and protocol("finetune", "vggsound").epochs == 6
    assert protocol("finetune").encoder_lr == pytest.approx(0.05 * 2e-4)
    assert (protocol("attentive").smoothing, protocol("finetune").smoothing) == (0.0, 0.1)


def test_the_other_papers_heads_and_counts_are_those_of_the_facts():
    def protocol(script):
        return probe.choose_protocol(ask(probe="attentive", data="kinetics400"), encoder_of(script.METHOD))

    ncsu = protocol(avjepa_ncsu)
    assert list(ncsu.heads) == ["cross"] and (ncsu.views, ncsu.together) == (8, True)
    assert (ncsu.clips, ncsu.test_clips, probe.schedule(ncsu, 3500)[1]) == (3500, 3500, 6020)
    assert list(protocol(mjepa).heads) == ["blocks"] and list(protocol(ajepa).heads) == ["attentive"]
    tuned = probe.choose_protocol(ask(probe="finetune", data="esc50"), encoder_of(ajepa.METHOD))
    assert (tuned.heads, tuned.encoder_lr) == ({"standardised": (1e-3,)}, 1e-5)


@pytest.mark.parametrize("script", [ajepa, avjepa_lejepa, mjepa, avjepa_ncsu], ids=lambda s: s.__name__)
def test_a_protocol_is_plain_names_known_rows_and_has_a_source_or_a_mark(script, tmp_path):
    torch.save(script.METHOD, tmp_path / "method.pt")
    table = script.METHOD["protocol"]
    assert torch.load(tmp_path / "method.pt", weights_only=True)["protocol"] == table
    assert set(table) <= set(probe.PROTOCOL) and all(len(row) == 3 for row in table.values())
    source = inspect.getsource(script).split("protocol={")[1].split("\n    },")[0].splitlines()
    for before, line in zip(source, source[1:]):
        if line.rstrip().endswith('""),'):
            assert "# unspecified" in before, line


PICTURES = dict(data="kinetics400", clip_seconds=10.0)


@pytest.mark.parametrize("given, views, crops, train, seconds", [
    # as many views as the set's own table says, else the method's; one where a view holds each whole clip
    (dict(), 3, 1, 2, 2.0), (dict(probe="finetune"), 2, 1, None, 2.0), (dict(crops=3), 3, 3, 2, 2.0),
    (dict(clip_seconds=1.0), 1, 1, 1, 2.0), (dict(clip_seconds=1.5), 3, 1, 2, 2.0),
    (dict(clip_seconds=1.5, modality="audio"), 1, 1, 1, 1.5),
    (dict(modality="audio", seconds=5.0), 3, 1, 2, 5.0),
    (dict(modality="video"), 3, 1, 2, 1.0), (dict(modality="video", clip_seconds=1.5), 3, 1, 2, 1.0),
    (PICTURES, 8, 3, 2, 2.0), (PICTURES | dict(probe="finetune"), 8, 3, None, 2.0),
    (PICTURES | dict(modality="audio"), 8, 1, 2, 2.0), (PICTURES | dict(crops=1, views=2), 2, 1, 2, 2.0),
    (dict(data="ssv2"), 2, 3, 2, 1.0), (dict(data="ssv2", views=1), 1, 3, 2, 1.0),
    (dict(data="fsd50k"), 15, 1, 2, 2.0), (dict(data="esc50", fold=True), 3, 1, 2, 2.0)])
def test_views_and_crops_are_those_of_the_set_or_of_the_method_unless_others_are_given(
        given, views, crops, train, seconds, tmp_path):
    words = dict(given)
    clip_seconds = words.pop("clip_seconds", None)
    fold = np.zeros(1, np.int8) if words.pop("fold", False) else None
    listing = data.make_listing("x", "", ["a.mp4"], [[0]], ["a"], seconds=clip_seconds, fold=fold)
    encoder = common.load_encoder(write_checkpoint(tmp_path))
    words.setdefault("recipe", "paper" if words.get("probe") != "finetune" else None)
    args = ask(**words)
    got = features.choose_views(args, encoder, listing, probe.choose_protocol(args, encoder))
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
    protocol = probe.choose_protocol(ask(), encoder)
    fails(features.choose_views, ask(**given), encoder, listing_of([[0]], "a"), protocol, match=sentence)


def test_the_table_of_a_toy_run_has_few_labels_beside_all_and_both_ways_of_retrieval(
        toy, tmp_path, monkeypatch, capsys):
    quicken_table(monkeypatch, draws=2)
    run_folder = write_checkpoint(tmp_path, cross=BOTH)
    table = probe.toy_report(run_folder, toy, CPU, 0)
    assert json.loads((run_folder / "results.json").read_text()) == table
    for name in ("trained", "untrained", "raw input", "chance"):
        ways = set() if name == "raw input" else {"A->V", "V->A"}
        probes = {"audio", "video", "av"}
        assert set(table[name]) - {"N", "left_out", "embedding", "chance"} == probes | {"few"} | ways
        assert set(table[name]["few"]) == probes
    shown = capsys.readouterr().out
    assert "A->V (N = 16)" in shown and "10 a class" in shown and shown.count("\n") == 15
