"""heads.py: measures, heads, losses and rates say what they mean, against libraries and slow loops."""
import copy
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import gelu, layer_norm, one_hot

import heads
from conftest import same
from slow import random

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
def test_mean_average_precision_is_a_slow_loop_s_and_scikit_learn_s_also_with_ties_and_without_empty_classes(
        levels):
    scores = (random(60, 7).sigmoid() * levels).round()
    targets = (random(60, 7, seed=1) > 0.8).float()
    targets[:, 3] = 0
    value, counted = heads.mean_average_precision(scores, targets)
    assert (value, counted) == (pytest.approx(slow_map(scores, targets)[0], abs=1e-9), 6)
    there = targets.any(0)
    theirs = average_precision_score(targets[:, there].numpy(), scores[:, there].numpy(), average="macro")
    assert value == pytest.approx(theirs, abs=1e-9)


def test_the_accuracy_counts_no_ties():
    assert heads.accuracy(torch.eye(4), torch.arange(4)) == 1
    assert heads.accuracy(torch.zeros(10, 4), torch.arange(10) % 4) == 0


def test_classes_count_that_a_test_clip_is_of():
    scores = random(6, 5)
    targets = torch.tensor([0, 0, 3, 3, 3, 0])
    assert heads.measure(scores, targets)[2] == 2
    assert heads.measure(scores, one_hot(targets, 5))[2] == 2


def test_views_are_averaged_as_logits_or_as_probabilities_so_that_far_scores_do_not_tie():
    scores = random(5, 3, 4)
    for many, turn in ((False, lambda x: x.softmax(-1)), (True, torch.sigmoid)):
        expected = sum(turn(scores[:, view].double()) for view in range(3)) / 3
        torch.testing.assert_close(heads.average(scores, many, "probabilities"), expected)
        torch.testing.assert_close(heads.average(scores, many), scores.double().mean(1))
    sure = torch.tensor([[[20.0]], [[20.1]]])               # the sigmoid of either is 1 in float32
    assert len(set(heads.average(sure, True, "probabilities").flatten().tolist())) == 2


# ---- heads ---------------------------------------------------------------------------------------------

def started(head, std=0.3):
    for p in head.double().parameters():
        torch.nn.init.normal_(p, std=std)
    return head


def by_library(kind, head, tokens):
    """What the formulas of the heads on tokens say, by torch's own attention."""
    def ask(x):
        return head.attend(head.query.expand(len(x), -1, -1), x, x)[0][:, 0]

    def norm(module, x):
        return layer_norm(x, x.shape[-1:], module.weight, module.bias)

    if kind == "attentive":
        return head.linear(norm(head.norm, ask(tokens)))
    for block in head.blocks:
        tokens = block(tokens)
    x = head.query[0] + ask(norm(head.norm1, tokens))
    return head.linear(x + head.fc2(gelu(head.fc1(norm(head.norm2, x)))))


def test_the_single_query_has_the_output_and_the_gradients_of_the_library_s_attention():
    head = started(heads.AttentiveHead(128, 5))
    tokens = random(3, 7, 128).double().requires_grad_()
    learnt = [tokens, head.query, *head.attend.parameters()]
    got = heads.ask_once(head.attend, head.query, tokens)
    wanted = head.attend(head.query.expand(3, -1, -1), tokens, tokens)[0][:, 0]
    torch.testing.assert_close(got, wanted)
    gradients = [torch.autograd.grad(x.square().mean(), learnt) for x in (got, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("kind, blocks", [("attentive", 0), ("cross", 0), ("blocks", 4)])
def test_a_head_on_tokens_computes_its_formula_in_float32_also_under_autocast(kind, blocks):
    head = started(heads.HEADS[kind](128, 5), 0.05).float()
    tokens = random(3, 7, 128)
    got = head(tokens, None)
    torch.testing.assert_close(got, by_library(kind, head, tokens), atol=1e-5, rtol=1e-4)
    assert len(getattr(head, "blocks", ())) == blocks and head.attend.num_heads == 2
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(tokens.bfloat16(), None)
    assert cast.dtype == torch.float32
    if not blocks:
        torch.testing.assert_close(cast, head(tokens.bfloat16().float(), None))


@pytest.mark.parametrize("kind", heads.ON_EMBEDDING)
def test_a_linear_head_is_linear_behind_its_norm_and_float32(kind):
    head = started(heads.HEADS[kind](16, 5)).float()
    x = 3 * random(40, 16) + 1
    if kind == "linear":
        normed = layer_norm(x, (16,), head.norm.weight, head.norm.bias)
    else:
        normed = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        assert not list(head.norm.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        got = head(None, x)
    torch.testing.assert_close(got, normed @ head.linear.weight.T + head.linear.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", heads.HEADS)
def test_a_mix_gives_any_head_the_average_of_the_blocks_by_the_softmax_of_their_weights(kind):
    head = heads.make_head(kind, 3 * 64, 5, mix=3)
    for p in head.head.parameters():
        torch.nn.init.normal_(p, std=0.05)
    tokens = random(4, 7, 3 * 64)
    embedding = random(4, 3 * 64, seed=1)
    for weights in ([0.0, 0.0, 0.0], [0.3, -1.0, 2.0]):             # it starts with the first: the plain mean
        if any(weights):
            head.weights.data = torch.tensor(weights)
        total = sum(math.exp(w) for w in weights)
        mixed = []
        for x in (tokens, embedding):
            average = torch.zeros(*x.shape[:-1], 64)
            for number, w in enumerate(weights):
                average += math.exp(w) / total * x[..., 64 * number:64 * (number + 1)]
            mixed.append(average)
        torch.testing.assert_close(head(tokens, embedding), head.head(*mixed), atol=1e-5, rtol=1e-4)
        given = (None, embedding) if kind in heads.ON_EMBEDDING else (tokens, None)
        with torch.autocast("cpu", torch.bfloat16):
            assert head.mix(tokens.bfloat16()).dtype == head(*given).dtype == torch.float32
    plain = heads.make_head(kind, 64, 5)
    assert type(plain) is type(head.head)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in head.head.state_dict().items()}


def test_a_query_starts_as_a_truncated_normal_of_02():
    for kind in heads.ON_TOKENS.values():
        query = kind(512, 2).query
        assert query.std().item() == pytest.approx(0.02, rel=0.2) and query.abs().max() > 0.03


# ---- losses and rates ----------------------------------------------------------------------------------

def test_the_loss_of_one_label_is_smoothed_and_that_of_several_weighs_the_positives():
    scores = random(6, 4).double()
    label = torch.tensor([0, 3, 1, 1, 2, 0])
    expected = 0.0
    for s, y in zip(scores.tolist(), label.tolist()):
        log_z = math.log(sum(map(math.exp, s)))
        aim = [0.1 / 4 + 0.9 * (c == y) for c in range(4)]
        expected -= sum(a * (x - log_z) for a, x in zip(aim, s)) / 6
    assert heads.loss_of(scores, label, 0.1).item() == pytest.approx(expected)
    many = (random(6, 4, seed=1) > 0.3).long()
    many[:, 2] = 0                                          # counts as with one positive
    weight = heads.positive_weight(many.sum(0), 6)
    expected = 0.0
    for c in range(4):
        positives = max(1, sum(many[:, c].tolist()))
        for s, y in zip(scores[:, c].tolist(), many[:, c].tolist()):
            p = 1 / (1 + math.exp(-s))
            expected -= ((6 - positives) / positives * math.log(p) if y else math.log(1 - p)) / 24
    assert heads.loss_of(scores, many, 0.1, weight).item() == pytest.approx(expected)   # and no smoothing
    plain = heads.loss_of(scores, many).item()
    assert plain == pytest.approx(heads.loss_of(scores, many, 0.1, torch.ones(4)).item())


def test_the_rate_warms_up_from_a_share_of_the_peak_and_ends_where_it_says():
    rates = [heads.learning_rate(step, 100, 2.0, 0.05, 0.1, 1e-7) for step in range(100)]
    for step in range(5):
        assert rates[step] == pytest.approx(0.2 + 1.8 * (step + 1) / 5)
    for step in range(5, 100):
        assert rates[step] == pytest.approx(1e-7 + (2 - 1e-7) * (1 + math.cos(math.pi * (step - 5) / 94)) / 2)
    assert [heads.learning_rate(step, 3, 1.0) for step in range(3)] == pytest.approx([1, 0.5, 0])


# ---- regression ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("clips, dim", [(120, 9), (24, 120)])           # also of far fewer clips than numbers
def test_the_regression_has_the_scores_of_scikit_learn_s_on_standardised_features(classes, clips, dim):
    x = 3 * random(clips, dim) + 2
    y = torch.arange(clips) % classes
    x[:, :classes] += one_hot(y, classes)
    head = heads.regressions(x, y, classes, [10.0])[0]
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=10.0 / dim, max_iter=1000, tol=1e-8)
    model.fit(scaler.transform(x.numpy()), y.numpy())
    new = 3 * random(30, dim, seed=1) + 2
    got = head(None, new).softmax(-1).detach().numpy()
    np.testing.assert_allclose(got, model.predict_proba(scaler.transform(new.numpy())), atol=5e-3)


def test_a_class_without_training_clips_is_never_said():
    x = random(60, 5)
    head = heads.regressions(x, 2 * (torch.arange(60) % 2) + 1, 4, [1.0])[0]     # classes 1 and 3
    scores = head(None, random(50, 5, seed=1))
    assert set(scores.argmax(1).tolist()) == {1, 3} and torch.isfinite(scores).all()
    alone = heads.regressions(x, torch.full((60,), 2), 4, [1.0])[0]
    assert set(alone(None, x).argmax(1).tolist()) == {2}


# ---- the online probe ----------------------------------------------------------------------------------

def slow_scores(batches, classes):
    """What LayerNorm and a linear layer say of each batch (x, y) before AdamW's formulas train them on it."""
    dim = batches[0][0].shape[1]
    params = [torch.ones(dim), torch.zeros(dim), torch.zeros(classes, dim), torch.zeros(classes)]
    params = [p.double().requires_grad_() for p in params]
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]
    said = []
    for t, (x, y) in enumerate(batches, 1):
        scale, shift, weight, bias = params
        x = x.double() - x.double().mean(1, keepdim=True)
        x = scale * x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() + shift
        scores = x @ weight.T + bias
        said.append(scores.detach())
        loss = -sum(scores[i].log_softmax(0)[label] for i, label in enumerate(y.tolist())) / len(y)
        grads = torch.autograd.grad(loss, params)
        for p, pair, grad in zip(params, moments, grads):
            pair[0] = 0.9 * pair[0] + 0.1 * grad
            pair[1] = 0.999 * pair[1] + 0.001 * grad ** 2
            step = pair[0] / (1 - 0.9 ** t) / ((pair[1] / (1 - 0.999 ** t)).sqrt() + 1e-8)
            p.data = p.data * (1 - 1e-3 * 0.01) - 1e-3 * step
    return said


def test_the_online_probe_scores_each_batch_as_a_slow_loop_before_it_trains_on_it():
    x = random(40, 12)
    y = torch.arange(40) % 4
    probe = heads.OnlineProbe(["av"], 12, 4)
    rows = []
    for _ in range(5):
        probe.step({"av": x}, {"av": torch.ones(40).bool()}, y)
        rows.append(probe.row()["probe/av"])
    for value, scores in zip(rows, slow_scores(5 * [(x, y)], 4), strict=True):
        best = [(s > s[label]).sum() + (s == s[label]).sum() == 1 for s, label in zip(scores, y)]
        assert value == pytest.approx(100 * sum(best).item() / 40)
    assert rows[0] == 0 and rows[1] > 40                    # at first all scores are the same


def test_the_online_probe_s_row_is_the_map_of_scikit_learn_over_the_clips_since_the_last_one():
    probe = heads.OnlineProbe(["audio", "video"], 12, 5)
    for row in range(2):
        scores = []
        targets = []
        for step in range(3):
            x = random(20, 12, seed=10 * row + step)
            y = (random(20, 5, seed=50 + 10 * row + step) > 0.8).to(torch.uint8)
            has = torch.arange(20) % 4 != step
            scores.append(probe.heads["audio"](None, x)[has].detach())
            targets.append(y[has])
            probe.step({"audio": x, "video": x}, {"audio": has, "video": has & False}, y)
        expected = average_precision_score(torch.cat(targets).numpy(), torch.cat(scores).numpy())
        assert probe.row() == {"probe/audio": pytest.approx(100 * expected)}
    fresh = heads.OnlineProbe(["video"], 12, 5).state_dict()["heads"]       # of video no clip came
    for name, p in fresh.items():
        assert torch.equal(probe.heads.state_dict()[name], p)


def test_an_online_probe_that_goes_on_from_its_state_amid_a_row_is_the_same_bit_for_bit():
    def train(probe, steps):
        for step in steps:
            x = random(8, 6, seed=step)
            probe.step({"av": x.bfloat16().float()}, {"av": torch.ones(8).bool()}, torch.arange(8) % 3)

    whole, first, second = (heads.OnlineProbe(["audio", "av"], 6, 3) for _ in range(3))
    train(whole, range(5))
    train(first, range(3))
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    train(second, range(3, 5))
    assert same(whole.state_dict(), second.state_dict()) and whole.row() == second.row()
    for key in state:                                       # and what does not fit it is not taken
        with pytest.raises(Exception):  # noqa: B017
            heads.OnlineProbe(["audio", "av"], 7, 3).load_state_dict(state | {key: {"0": 1}})
