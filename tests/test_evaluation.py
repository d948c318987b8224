"""Probes and retrieval measure what they say."""
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
