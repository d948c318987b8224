"""Probes and retrieval measure what they say."""
import argparse, functools, json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import common
import data
import probe
import retrieval


def slow_map(scores, targets):
    """Mean over classes of: for each positive, the share of positives among the clips that score at least as high."""
    values = []
    for c in range(scores.shape[1]):
        at = []
        for i in range(len(scores)):
            if targets[i, c]:
                ahead = [j for j in range(len(scores)) if scores[j, c] >= scores[i, c]]
                at.append(sum(float(targets[j, c]) for j in ahead) / len(ahead))
        if at:
            values.append(sum(at) / len(at))
    return sum(values) / len(values), len(values)


@pytest.mark.parametrize("levels", [None, 4])
def test_mean_average_precision_equals_a_slow_loop_also_with_ties_and_without_empty_classes(levels):
    g = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(60, 7, generator=g), (torch.rand(60, 7, generator=g) < 0.2).float()
    scores = scores if levels is None else (scores * levels).round()
    targets[:, 3] = 0
    value, counted = probe.mean_average_precision(scores, targets)
    assert counted == 6 and value == pytest.approx(slow_map(scores, targets)[0], abs=1e-9)


def test_mean_average_precision_of_a_perfect_and_of_a_constant_score():
    targets = (torch.rand(200, 5, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    assert probe.mean_average_precision(targets, targets) == (1.0, 5)
    assert probe.mean_average_precision(torch.zeros(200, 5), targets)[0] == pytest.approx(targets.mean().item(), abs=1e-6)


def test_a_constant_score_gets_no_accuracy():
    assert probe.accuracy(torch.zeros(10, 4), torch.arange(10) % 4) == 0
    assert probe.accuracy(torch.eye(4), torch.arange(4)) == 1


def test_recall_of_identical_embeddings_is_100_and_of_a_constant_chance_or_worse():
    z = torch.nn.functional.normalize(torch.randn(250, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert retrieval.recall(z @ z.T) == {"R@1": 100, "R@5": 100, "R@10": 100, "median_rank": 1}
    for constant in (torch.ones(250, 250), torch.full((250, 250), float("nan"))):
        worst, chance = retrieval.recall(constant), retrieval.chance(250)
        assert all(worst[k] <= chance[k] for k in ("R@1", "R@5", "R@10")) and worst["median_rank"] >= chance["median_rank"]


def test_recall_equals_a_slow_loop_and_rows_are_the_queries():
    similarity = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    order = [1 + sum(float(similarity[i, j]) >= float(similarity[i, i]) for j in range(40) if j != i) for i in range(40)]
    got = retrieval.recall(similarity)
    assert got["R@5"] == pytest.approx(100 * np.mean(np.array(order) <= 5)) and got["median_rank"] == pytest.approx(np.median(order))
    assert retrieval.recall(similarity.T) != got


def test_random_embeddings_score_chance():
    g = torch.Generator().manual_seed(3)
    got = [retrieval.recall(torch.randn(300, 300, generator=g))["R@10"] for _ in range(20)]
    assert np.mean(got) == pytest.approx(retrieval.chance(300)["R@10"], abs=0.6)


def test_in_class_recall_does_not_reward_the_class_alone():
    labels = torch.arange(80) % 8
    by_class = torch.nn.functional.one_hot(labels, 8).float() + 1e-3 * torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    rolled = torch.cat([(labels == c).nonzero().squeeze(1).roll(1) for c in range(8)])     # within each class
    shuffled = by_class[rolled[labels.argsort(stable=True).argsort()]]
    value, chance = retrieval.recall_in_class(by_class @ shuffled.T, labels)
    assert chance == pytest.approx(10) and value < 30
    assert retrieval.recall(by_class @ shuffled.T)["R@10"] > 50
    assert retrieval.recall_in_class(torch.eye(80), labels)[0] == 100


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_finds_a_planted_feature_and_nothing_in_noise(kind):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (600,), generator=g)
    shape = (600, 2, 32) if kind == "linear" else (600, 2, 6, 64)
    noise = torch.randn(*shape, generator=g)
    planted = noise.clone()
    planted[..., :4] += 4 * torch.nn.functional.one_hot(y, 4).view(600, *[1] * (len(shape) - 2), 4)
    score = {name: probe.probe_cached(kind, x[:450], y[:450], x[450:], y[450:], 4, (1e-3, 1e-2), 25, 64, 0)["value"]
             for name, x in (("planted", planted), ("noise", noise))}
    assert score["planted"] > 90 and score["noise"] < 40


def test_the_learning_rate_is_chosen_without_the_test_set(monkeypatch):
    """Whatever the test targets are, the same rate is chosen; with the test set in sight another would be."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 1, 16, generator=g), torch.randint(3, (300,), generator=g)
    chosen = {probe.probe_cached("linear", x[:200], y[:200], x[200:], y_test, 3, (1e-5, 1e-3, 1e-1), 10, 64, 0)["lr"]
              for y_test in (y[200:], (y[200:] + 1) % 3, (y[200:] + 2) % 3)}
    assert len(chosen) == 1
    train, held = probe.split_off(200, 0)
    assert len(held) == 20 and sorted([*train.tolist(), *held.tolist()]) == list(range(200))


def test_a_multi_label_probe_learns_and_reports_map():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, 16, generator=g)
    y = (x[:, 0] @ torch.randn(16, 5, generator=g) > 2).float()
    result = probe.probe_cached("linear", x[:300], y[:300], x[300:], y[300:], 5, (1e-2,), 60, 64, 0)
    assert result["metric"] == "mAP" and result["value"] > 80 and result["classes"] == 5


def test_views_are_averaged_as_probabilities():
    scores = torch.randn(5, 3, 4)
    expected = torch.stack([torch.softmax(scores[:, v], -1) for v in range(3)]).mean(0)
    assert torch.allclose(probe.average(scores, False), expected)


def test_an_exact_name_wins_over_an_id_and_no_clip_is_taken_twice(tmp_path):
    names = ["recording_1.mp4", "recording_10.mp4", "recording_100.mp4"]
    (tmp_path / "ids.txt").write_text("recording_1\nrecording_10.mp4\nrecording_1\n")
    chosen = retrieval.choose(data.make_listing("x", "", names, None, []), str(tmp_path / "ids.txt"))
    assert [bytes(f).decode() for f in chosen.files] == names[:2]


def listing_of(labels, classes, multilabel=False):
    return data.make_listing("x", "", [f"{i:011d}_000001.mp4" for i in range(len(labels))], labels, classes, multilabel)


def test_retrieval_draws_five_clips_of_each_class_with_a_seed():
    listing = listing_of([[i % 7] for i in range(100)], "abcdefg")
    chosen = retrieval.choose(listing, "5", 0)
    assert len(chosen) == 35 and np.bincount(chosen.labels).tolist() == [5] * 7
    assert (retrieval.choose(listing, "5", 0).files == chosen.files).all()
    assert (retrieval.choose(listing, "5", 1).files != chosen.files).any()


def test_a_clip_with_several_labels_counts_for_its_rarest():
    listing = listing_of([[0, 1]] * 6 + [[0]] * 20, "ab", True)
    chosen = retrieval.choose(listing, "5", 0)
    assert len(chosen) == 10 and sum(1 in chosen.clip_labels(i) for i in range(10)) == 5


def test_a_list_of_ids_is_kept_in_its_order(tmp_path, capsys):
    listing = listing_of([[0]] * 10, "a")
    (tmp_path / "ids.txt").write_text("00000000007\n00000000002_000001\nnot_there_x\n")
    chosen = retrieval.choose(listing, str(tmp_path / "ids.txt"))
    assert [bytes(f).decode()[:11] for f in chosen.files] == ["00000000007", "00000000002"]
    assert "1 of 3 ids" in capsys.readouterr().out


# ---- an encoder of audio, video or both, with predictors from one to the other --------------------------------------

CPU = common.Process(torch.device("cpu"))
INPUTS = data.Inputs(seconds=2.0, video_seconds=1.0, frames=2, size=16, resize=16, n_fft=512, n_mels=16, mel_mean=-40.0)
BOTH = ("a->v", "v->a", "a->av")


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    """Writes a checkpoint of random weights as MJEPA (or, with a projector, AV-JEPA) would; returns its folder."""
    monkeypatch.setitem(common.SIZES, "nano", (32, 2, 2, 64))

    def write(cross=BOTH, video=True, audio=True, projector=None, method="mjepa"):
        config = dict(size="nano", video=dict(shape=(2, 16, 16), patch=(2, 8, 8)) if video else None, cls=projector is not None,
                      audio=dict(shape=(16, INPUTS.mel_frames), patch=(16, 16)) if audio else None)
        parts = {"target_encoder": common.ViT(**config), **{f"cross.{name}": common.mlp(32, 3 * [32], norm=False) for name in cross}}
        if projector:
            parts["projector"] = common.mlp(32, projector)
        model = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
        common.save_checkpoint(tmp_path / "latest.pt", method=method, step=3, args=dict(seed=0), inputs=asdict(INPUTS), encoder=config,
                               projector=projector, cross={name: 3 * [32] for name in cross}, weights="target_encoder",
                               model=model)
        return tmp_path

    return write


def view_embeddings(encoder, listing, modality):
    """The embedding of each view by itself: a list of clips, each a list of three (1, D)."""
    clips = data.Clips(listing, INPUTS, functools.partial(retrieval.random_views, 3, INPUTS), seed=0, replace=False)
    return [[encoder(**{modality: (data.normalize_video(x) if modality == "video" else x)[None]})[1] for x in clips[0, i][modality]]
            for i in range(len(listing))]


def test_a_clip_is_found_by_the_l1_distance_of_what_the_other_modality_predicts(toy, write_run):
    run, listing = write_run(), data.list_clips("toy", toy, "test").subset(range(7))
    encoder, asked = common.load_encoder(run, cross=True), {}
    result = retrieval.evaluate(encoder, listing, 3, 0, CPU)
    embeddings = {modality: view_embeddings(encoder, listing, modality) for modality in ("audio", "video")}
    for way, asks, finds, predictor in (("A->V", "audio", "video", "a->v"), ("V->A", "video", "audio", "v->a")):
        score = np.zeros((7, 7))
        for i in range(7):
            query = sum(encoder.cross[predictor](e)[0] for e in embeddings[asks][i]).numpy() / 3
            for j in range(7):
                target = sum((e[0] - e[0].mean()) / (e[0].var(unbiased=False) + 1e-5).sqrt() for e in embeddings[finds][j]).numpy() / 3
                score[i, j] = -sum(abs(query[d] - target[d]) for d in range(32)) / 32
        rank = [1 + sum(score[i, j] >= score[i, i] for j in range(7) if j != i) for i in range(7)]
        assert result[way]["R@1"] == pytest.approx(100 * np.mean([r == 1 for r in rank])) and len(set(rank)) > 2
        assert result[way]["R@5"] == pytest.approx(100 * np.mean([r <= 5 for r in rank]))
        assert result[way]["median_rank"] == np.median(rank)
        asked[way] = score
    file, folder = listing.path(0), str(toy / "test")
    _, best, _ = retrieval.query(encoder, file, folder, 16, 3, 0, CPU)
    assert len(best) == 16 and dict((path, s) for s, path in best)[file] == pytest.approx(asked["A->V"][0, 0], abs=1e-5)
    assert [s for s, _ in best] == sorted((s for s, _ in best), reverse=True)


def test_l1_ties_are_misses_and_so_is_what_is_not_a_number():
    queries, candidates = torch.randn(9, 5), torch.randn(9, 5)
    got = retrieval.similarity(queries, candidates, "predicted")
    for i in range(9):
        for j in range(9):
            assert got[i, j].item() == pytest.approx(-sum(abs(float(queries[i, d] - candidates[j, d])) for d in range(5)) / 5, abs=1e-6)
    for same in (candidates[:1].expand(9, 5), torch.full((9, 5), float("nan"))):
        assert retrieval.recall(retrieval.similarity(queries, same, "predicted"))["R@5"] == 0
    assert retrieval.recall(retrieval.similarity(candidates, candidates, "predicted"))["R@1"] == 100


def test_each_checkpoint_is_searched_as_its_authors_do_and_refuses_what_it_lacks(write_run):
    for words, first, lacks in ((dict(), "predicted", ["projected"]), (dict(cross=("a->av",)), "encoder", ["predicted", "projected"]),
                                (dict(cross=("a->v",)), "encoder", ["predicted"]),
                                (dict(cross=(), projector=(16, 8), method="avjepa_lejepa"), "projected", ["predicted"])):
        run = write_run(**words)
        for untrained in (False, True):
            assert retrieval.choose_embedding(common.load_encoder(run, untrained=untrained, cross=True)) == first
        assert retrieval.choose_embedding(common.load_encoder(run, cross=True), "encoder") == "encoder"
        for name in lacks:
            with pytest.raises(common.UserError, match=f"--embedding {name}: .* has no .* give --embedding encoder"):
                retrieval.main(["--ckpt", str(run), "--data", "toy", "--device", "cpu", "--embedding", name])


@pytest.mark.parametrize("embedding", ["projected", "encoder"])
def test_the_cosine_is_that_of_the_normalised_means_over_the_views(toy, write_run, embedding):
    run = write_run(cross=(), projector=(16, 8), method="avjepa_lejepa")
    encoder, listing, z = common.load_encoder(run, cross=True), data.list_clips("toy", toy, "test").subset(range(4)), {}
    for modality in ("audio", "video"):
        means = [sum(encoder.projector(e) if embedding == "projected" else e for e in one) / 3
                 for one in view_embeddings(encoder, listing, modality)]
        z[modality] = torch.cat([x / x.norm() for x in means])
    got, read = retrieval.embed(encoder, listing, 3, process=CPU, workers=0, embedding=embedding)
    assert read["index"].tolist() == [0, 1, 2, 3] and len(z["audio"][0]) == (8 if embedding == "projected" else 32)
    for modality, x in z.items():
        for role in got[modality]:
            torch.testing.assert_close(role, x, atol=1e-5, rtol=1e-5)


def test_the_command_searches_writes_its_row_and_lists_negative_distances(toy, write_run, capsys):
    run = write_run()
    words = ["--ckpt", str(run), "--workers", "0", "--device", "cpu", "--views", "1"]
    retrieval.main([*words, "--data", "toy", "--data-dir", str(toy), "--clips", "1"])
    retrieval.main([*words, "--data", "toy", "--data-dir", str(toy), "--clips", "1", "--embedding", "encoder"])
    rows = [json.loads(line) for line in (run / "retrieval.jsonl").read_text().splitlines()]
    assert [row["embedding"] for row in rows] == ["predicted", "encoder"] and rows[0]["N"] == 8 and "class R@1" in rows[0]["A->V"]
    capsys.readouterr()
    retrieval.main([*words, "--query", str(toy / "test" / "00003.mp4"), "--folder", str(toy / "test"), "--top", "3"])
    scores = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0


@pytest.mark.parametrize("blocks", [0, 4])
def test_the_attentive_heads_are_blocks_a_query_and_a_linear_map(blocks):
    head = probe.HEADS["blocks" if blocks else "attentive"](128, 5)                      # two heads of 64
    x = tokens = torch.randn(3, 7, 128)
    assert len(head.transformer.blocks) == blocks
    for block in head.transformer.blocks:
        assert block.heads == 2 and block.fc1.out_features == 512
        x = block(x)
    x = torch.nn.functional.layer_norm(x, (128,))
    maps = zip((head.query[0], x, x), head.attend.in_proj_weight.chunk(3), head.attend.in_proj_bias.chunk(3))
    q, k, v = (y @ weight.T + bias for y, weight, bias in maps)
    rows = []
    for b in range(3):
        parts = [(q[:, s] @ k[b, :, s].T / 8).softmax(-1) @ v[b, :, s] for s in (slice(0, 64), slice(64, 128))]
        rows.append(head.linear(head.attend.out_proj(torch.cat(parts, 1)))[0])
    torch.testing.assert_close(head(tokens, None), torch.stack(rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_single_query_has_the_output_and_the_gradients_of_the_library_s_attention(blocks):
    head, tokens = probe.AttentiveHead(128, 5, blocks), torch.randn(3, 7, 128, requires_grad=True)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = head.norm(head.transformer(tokens))
    wanted = head.linear(head.attend(head.query.expand(3, -1, -1), x, x)[0][:, 0])
    got, learnt = head(tokens, None), [tokens, *head.parameters()]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(out.square().mean(), learnt) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * other.abs().max().item() + 1e-6, rtol=1e-4)


def test_a_head_with_blocks_finds_what_stands_in_the_relation_of_two_tokens():
    """The class is whether two tokens agree: neither of them alone tells it."""
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (400, 2), generator=g)
    x = 0.1 * torch.randn(400, 1, 3, 32, generator=g)
    x[:, 0, :2, 0] += 3.0 * (2 * signs - 1)
    y = (signs[:, 0] == signs[:, 1]).long()
    assert probe.probe_cached("blocks", x[:300], y[:300], x[300:], y[300:], 2, (1e-3,), 12, 32, 0)["value"] > 95
    assert all(probe.HEADS["blocks"](dim, 2)(torch.randn(2, 3, dim), None).shape == (2, 2) for dim in (32, 192))


def test_the_attentive_probe_has_the_head_of_the_method_unless_another_is_given(toy, write_run):
    run = write_run()
    words = ["--ckpt", str(run), "--data", "toy", "--data-dir", str(toy), "--workers", "0", "--device", "cpu", "--epochs", "1",
             "--batch-size", "8", "--views", "1", "--modality", "audio", "--probe"]
    for more in (["attentive"], ["attentive", "--head", "attentive"], ["finetune"], ["finetune", "--head", "blocks"]):
        probe.main([*words, *more])
    rows = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    assert [row["head"] for row in rows] == ["blocks", "attentive", "linear", "blocks"]
    assert [tuple(row["lrs"]) for row in rows] == [probe.BLOCKS_LRS, probe.FROZEN_LRS, (1e-3,), (1e-3,)]
    for bad, sentence in ((["attentive", "--head", "linear"], "reads no tokens"), (["linear", "--head", "blocks"], "no effect without")):
        with pytest.raises(common.UserError, match=sentence):
            probe.main([*words, *bad])
    assert set(probe.ATTENTIVE) == set(probe.FINETUNE)


@pytest.mark.parametrize("modality, views, seconds", [("audio", (1, 1), 10.0), ("video", (4, 2), 4.0), ("av", (4, 2), 10.0)])
def test_clips_as_long_as_the_sound_are_tested_in_several_views_of_the_shorter_pictures(write_run, modality, views, seconds):
    encoder = common.load_encoder(write_run(), cross=True)
    encoder.inputs = asdict(data.Inputs(seconds=10.0, video_seconds=4.0))
    listing = data.make_listing("audioset", "", ["a.mp4"], [[0]], ["a"], seconds=10.0)

    def choose(**other):
        args = argparse.Namespace(**dict(modality=modality, seconds=None, views=None, crops=None, probe="linear", data="audioset") | other)
        return probe.choose_views(args, encoder, listing), args

    inputs, args = choose()
    assert (args.views, args.train_views) == views and inputs.seconds == seconds
    pictures = [view.pictures or view[:2] for view in data.even_views(3, inputs, None, 10.0)]
    assert modality == "audio" or pictures == [(0.0, 4.0), (3.0, 4.0), (6.0, 4.0)]
    if modality == "audio":
        assert choose(seconds=5.0)[0].seconds == 5.0
    else:
        with pytest.raises(common.UserError, match="in the 4 s of training"):
            choose(seconds=5.0)


@pytest.mark.parametrize("modalities", [("video",), ("audio", "video")])
def test_the_table_of_a_toy_run_has_what_the_encoder_takes(toy, write_run, modalities, monkeypatch, capsys):
    run = write_run(cross=BOTH if len(modalities) == 2 else (), video="video" in modalities, audio="audio" in modalities)
    real = probe.train_heads
    monkeypatch.setattr(probe, "train_heads", lambda heads, batches, steps, *a, **k: real(heads, batches, min(steps, 3), *a, **k))
    table, ways = probe.toy_report(run, toy, CPU, 0), {"A->V", "V->A"} if len(modalities) == 2 else set()
    columns = {*modalities, *(["av"] if ways else []), *ways}
    assert json.loads((run / "results.json").read_text()) == table
    for name in ("trained", "untrained", "raw input", "chance"):
        assert set(table[name]) - {"N", "left_out", "embedding", "chance"} == columns - (ways if name == "raw input" else set())
    shown = capsys.readouterr().out
    assert ("A->V (N = 16)" in shown) == bool(ways) and shown.count("\n") == 8


@pytest.mark.parametrize("argv,sentence", [
    (["--ckpt", "nowhere", "--data", "toy"], "no such checkpoint"), (["--ckpt", "x"], "give either"),
    (["--ckpt", "x", "--data", "toy", "--views", "0"], "out of range")])
def test_bad_input_to_retrieval_ends_in_one_sentence(argv, sentence):
    with pytest.raises(common.UserError, match=sentence):
        retrieval.main(argv)


@pytest.mark.parametrize("argv,sentence", [
    (["--data", "toy", "--ckpt", "nowhere"], "no such checkpoint"), (["--data", "folder", "--ckpt", "x"], "no such checkpoint"),
    (["--data", "toy", "--ckpt", "x", "--lr", "-1"], "out of range")])
def test_bad_input_to_probe_ends_in_one_sentence(toy, argv, sentence):
    with pytest.raises(common.UserError, match=sentence):
        probe.main([*argv, *(["--data-dir", str(toy)] if "toy" in argv else [])])
