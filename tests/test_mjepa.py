"""MJEPA: its masks, views, nine terms, recipe and last phase, each against a reference of its own."""
import itertools
import math
import shutil
from dataclasses import asdict

import ajepa
import common
import data
import mjepa
import run as runs
from common import UserError
from conftest import StopAfter, same, weights
from mjepa import ACROSS, INPUTS, MJEPA, TERMS, WITHIN, draw_masks
from slow import block_parameters, count_parameters, is_uniform, layer_norm, linear, maps, narrow
from slow import patch_tokens, random, shake, slow_distance, slow_levels, slow_mlp, slow_positions

import numpy as np
import pytest
import torch

FULL = {"video": (8, 14, 14), "audio": (8, 64)}        # grids of the paper and of the toy
TOY = {"video": (2, 4, 4), "audio": (4, 12)}
PAPER = ["--data", "audioset", "--data-dir", "x"]


def recipe_of(*flags):
    """The paper's recipe with some flags."""
    return mjepa.get_args([*PAPER, *map(str, flags)])[1]


def toy_recipe(*flags):
    return mjepa.get_args([*map(str, flags)])[1]


def modalities_of(terms):
    return set().union(*mjepa.inputs_of(TERMS[terms]).values())


def hidden_in(masks, s, name, grids):
    """{modality: (B, *grid) bool}: what mask set s hides of an input."""
    _, target = masks[s][name]
    return maps(target, {m: grids[m] for m in INPUTS[name]})


# ----------------------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def watched(monkeypatch):
    """{name: what it returned, call by call}; of meet_count the mask it was given, before single patches."""
    calls = {}

    def watch(module, name, given=None):
        real = getattr(module, name)
        calls[name] = []

        def spy(*args, **more):
            result = real(*args, **more)
            calls[name].append(result if given is None else args[given])
            return result
        monkeypatch.setattr(module, name, spy)

    watch(common, "block_size")
    watch(common, "meet_count", given=1)
    watch(mjepa, "hide_tubes")
    watch(mjepa, "hide_blocks")
    return calls


def draw_watched(watched, key, grid, blocks=None):
    """What a mask set hides of 4 clips, (4, *grid) bool; the calls are those of this draw alone."""
    for calls in watched.values():
        calls.clear()
    return mjepa.draw_set(key, 0, 4, grid, recipe_of(), blocks).reshape(4, *grid)


@pytest.mark.parametrize("grids", [TOY, FULL], ids=["toy", "full"])
def test_a_video_is_hidden_in_tubes_over_the_full_time_and_a_sound_is_not(grids):
    recipe = recipe_of()
    for step in range(4):
        masks = draw_masks(0, step, 0, 4, grids, recipe)
        assert len(masks) == 2
        for s, name in itertools.product((0, 1), ("v", "av")):
            video = hidden_in(masks, s, name, grids)["video"]
            assert (video == video[:, :1]).all()
        audio = hidden_in(masks, 0, "a", grids)["audio"]
        assert not (audio == audio[:, :1]).all()


def opening(mask, height, width):
    """What whole blocks of that size cover that lie inside of the mask."""
    covered = np.zeros_like(mask)
    for top in range(mask.shape[0] - height + 1):
        for left in range(mask.shape[1] - width + 1):
            block = (slice(top, top + height), slice(left, left + width))
            covered[block] |= mask[block].all()
    return covered


@pytest.mark.parametrize("grid", [(4, 4), (14, 14)])
@pytest.mark.parametrize("number,area", [(8, 0.15), (2, 0.7)])
def test_a_mask_set_of_a_video_hides_blocks_of_one_size_a_step_but_for_a_few_single_patches(
        watched, grid, number, area):
    total = math.prod(grid)
    low, high = recipe_of()["video_aspect"]
    singles = []
    for step in range(40):
        masks = draw_watched(watched, (2, step, 1), grid, (number, area))
        ((h, w),) = watched["block_size"]              # one size for the step, not for each clip or block
        assert abs(h * w - area * total) <= h / 2      # the width is rounded last
        assert low * (h - 0.5) ** 2 <= area * total <= high * (h + 0.5) ** 2
        own = watched["hide_tubes"][0].sum()
        assert (masks.sum((1, 2)) == min(own, total - 1)).all()
        for mask, union in zip(masks, watched["meet_count"]):
            assert h * w <= union.sum() <= min(total, number * h * w)
            assert (opening(union, h, w) == union).all()
            singles.append((mask ^ union).mean())
    assert np.mean(singles) < 0.05


@pytest.mark.parametrize("grid", [TOY["audio"], FULL["audio"]], ids=str)
def test_the_blocks_of_a_sound_hide_60_to_75_percent_but_for_a_few_single_patches(watched, grid):
    total = math.prod(grid)
    counts = []
    singles = []
    for step in range(40):
        masks = draw_watched(watched, (3, step, 1), grid)
        own = watched["hide_blocks"][0].sum()
        counts.append(own / total)
        assert (masks.sum((1, 2)) == own).all()
        for union in watched["hide_blocks"]:
            assert 0.6 * total <= union.sum() <= 0.75 * total
        for mask, union in zip(masks, watched["meet_count"]):
            singles.append((mask ^ union).mean())
    assert np.mean(counts) == pytest.approx(0.675, abs=0.03)
    assert np.mean(singles) < 0.02


def test_the_blocks_of_a_sound_have_the_areas_and_the_aspects_of_a_jepa(watched):
    for step in range(40):
        draw_watched(watched, (4, step, 1), FULL["audio"])
        h, w = np.array(watched["block_size"]).T
        assert (h * w >= 0.15 * 512 - h / 2).all()     # the width is rounded last
        assert (h * w <= 0.2 * 512 + h / 2).all()
        assert set(h) <= {3, 4}                        # 8 sqrt(s / a) is 2.5 to 4.1: relative to the grid
        assert len(h) % 4 == 0


# ----------------------------------------------------------------------------------------------------------
# Views
# ----------------------------------------------------------------------------------------------------------

def views(*flags, duration=12.0, count=300):
    recipe = recipe_of(*flags)
    law = (recipe["seconds"], recipe["video_seconds"], modalities_of(recipe["terms"]))
    plans = [mjepa.plan_views(np.random.default_rng(seed), duration, *law) for seed in range(count)]
    return [view for (view,) in plans]


def test_the_pictures_are_a_random_part_of_the_sound_that_is_heard():
    starts = []
    places = []
    for view in views():
        begin, seconds = view.pictures
        assert (view.seconds, seconds, view.video, view.audio) == (10, 4, "random", True)
        starts.append(view.start)
        places.append((begin - view.start) / 6)
    assert is_uniform(starts, 0, 2)
    assert is_uniform(places, 0, 1)
    assert abs(np.corrcoef(starts, places)[0, 1]) < 4 / math.sqrt(300)


def test_the_view_of_a_short_clip_begins_with_it_and_its_pictures_lie_in_what_there_is():
    for view in views(duration=6.0):
        assert view.start == 0
        assert 0 <= view.pictures[0] <= 2
    for view in views(duration=1.5):
        assert view.start == view.pictures[0] == 0


def test_aligned_sound_and_pictures_cover_the_same_span():
    for view in views("--aligned"):
        assert view.pictures == (view.start, view.seconds)
        assert view.seconds == 4
        assert 0 <= view.start <= 8
    inputs = mjepa.make_inputs(recipe_of("--aligned"))
    assert inputs.seconds == inputs.video_seconds == 4
    assert inputs.mel_frames == 416 == 16 * math.ceil(401 / 16)
    inputs = mjepa.make_inputs(toy_recipe("--aligned"))
    assert inputs.seconds == inputs.video_seconds == 1.28


@pytest.mark.parametrize("terms", TERMS)
def test_all_terms_are_given_the_same_stretches_of_the_same_clips(terms):
    for view, other in zip(views(), views("--terms", terms)):
        assert (other.start, other.seconds, other.pictures) == (view.start, view.seconds, view.pictures)
        assert other.video == (None if terms == "separate-audio" else "random")
        assert other.audio == (terms != "separate-video")


def test_the_mel_has_whole_patches_and_pictures_are_of_what_is_heard_for_any_length():
    for seconds, frames in ((10, 1024), (3.84, 400), (2, 208)):
        recipe = recipe_of("--seconds", seconds)
        assert mjepa.make_inputs(recipe).mel_frames == frames
        assert recipe["video_seconds"] == min(4, seconds)
    for seconds, frames in ((1.92, 192), (10, 1008), (1, 112)):
        recipe = toy_recipe("--seconds", seconds)
        assert mjepa.make_inputs(recipe).mel_frames == frames
        assert recipe["video_seconds"] == min(1.28, seconds)
    assert recipe_of("--seconds", 10) == recipe_of()
    assert toy_recipe("--seconds", 1.92) == toy_recipe()


# ----------------------------------------------------------------------------------------------------------
# The nine terms
# ----------------------------------------------------------------------------------------------------------

SMALL = {"video": (2, 4, 4), "audio": (3, 5)}          # grids of a small model: 32 and 15 tokens
SHAPES = {"video": (4, 16, 16), "audio": (12, 20)}
PATCHES = {"video": (2, 4, 4), "audio": (4, 4)}


def small_model(terms="all"):
    """A model of three levels: blocks 0, 2 and 3 of four."""
    torch.manual_seed(0)
    config = dict(size="nano", positions="factorised", levels=[0, 2], checkpoint=False)
    config |= {m: dict(shape=SHAPES[m], patch=PATCHES[m]) for m in modalities_of(terms)}
    return shake(MJEPA(config, TERMS[terms], 32, 2))


def make_batch(count, seed=0):
    return {"video": random(count, 3, *SHAPES["video"], seed=seed),
            "audio": random(count, 1, *SHAPES["audio"], seed=seed + 100)}


def masks_of(batch):
    return draw_masks(5, 0, 0, batch, SMALL, toy_recipe())


def even(batch):
    return {name: torch.full((batch,), 1 / batch) for name in WITHIN}


def terms_of(model):
    return (*model.inputs, *model.across)


def slow_prediction(predictor, name, h, context, hidden):
    """One clip: visible tokens, all levels side by side (C, L D) -> what they say of the hidden (M, L D)."""
    e = []
    for m in INPUTS[name]:
        e += [position + predictor.modality[m] for position in slow_positions(predictor.positions[m])]
    visible = [linear(predictor.embed, x) + e[i] for x, i in zip(h, context)]
    asked = [predictor.mask_token + e[j] for j in hidden]
    return narrow(predictor, visible, asked)


@torch.no_grad()
def slow_passes(model, batch, masks):
    """What the encoders say of each clip: h {(input, clip, set): [(C, D) of each level]},
    y {(input, clip): (N, L D)}, pooled {(input, clip): (D,)}."""
    h = {}
    y = {}
    pooled = {}
    for name, b in itertools.product(model.inputs, range(len(batch["video"]))):
        clip = {m: batch[m][b] for m in INPUTS[name]}
        tokens = patch_tokens(model.context_encoder, clip)
        for s, mask_set in enumerate(masks):           # 1 the visible tokens alone
            visible = tokens[mask_set[name][0][b]]
            h[name, b, s] = slow_levels(model.context_encoder, visible, model.layers)
        tokens = patch_tokens(model.target_encoder, clip)
        z = slow_levels(model.target_encoder, tokens, model.layers)             # 2 everything
        y[name, b] = torch.cat([layer_norm(level, eps=1e-5) for level in z], -1)
        pooled[name, b] = layer_norm(z[-1].mean(0), eps=1e-5)
    return h, y, pooled


@torch.no_grad()
def slow_terms(model, batch, masks, weight):
    """{term: (its loss, that of who knows nothing)} at a first step, and the running means after it."""
    h, y, pooled = slow_passes(model, batch, masks)
    clips = range(len(batch["video"]))
    means = {}
    pooled_means = {}
    for name in model.inputs:
        w = weight[name] / weight[name].sum()
        means[name] = sum(w[b] * y[name, b].mean(0) for b in clips)
        pooled_means[name] = sum(w[b] * pooled[name, b] for b in clips)
    terms = {}
    for term in terms_of(model):
        source, _, target = term.partition("->")
        loss = 0.0
        nothing = 0.0
        for b, s in itertools.product(clips, range(len(masks))):
            if target:                                 # 3 across: the other input as a whole
                prediction = slow_mlp(model.cross[term], h[source, b, s][-1].mean(0))[None]
                truth = pooled[target, b][None]
                guess = pooled_means[target]
            else:                                      # within: its hidden tokens
                context, hidden = (index[b] for index in masks[s][source])
                seen = torch.cat(h[source, b, s], -1)
                prediction = slow_prediction(model.predictor, source, seen, context, hidden)
                truth = y[source, b][hidden]
                guess = means[source]
            share = weight["av" if target else source][b].item() / len(masks)
            loss += share * slow_distance(prediction, truth)                    # 4 L1
            nothing += share * slow_distance(guess.expand_as(truth), truth)
        terms[term] = (loss, nothing)
    return terms, means, pooled_means


@pytest.mark.parametrize("terms", TERMS)
def test_the_terms_of_a_batch_are_what_loops_over_its_clips_and_tokens_compute(terms):
    """In float32, outside of autocast. The second clip has no sound, and the weights are no mean."""
    model = small_model(terms)
    batch = make_batch(3)
    masks = masks_of(3)
    weight = {"a": torch.tensor([0.5, 0, 0.25]), "v": torch.tensor([0.2, 0.3, 0.4]),
              "av": torch.tensor([0.7, 0, 0.6])}
    loss, shown = model(batch, masks, weight, 0)
    slow, means, pooled_means = slow_terms(model, batch, masks, weight)
    assert tuple(slow) == TERMS[terms]
    for term, (of_term, nothing) in slow.items():
        assert shown[f"loss/{term}"].item() == pytest.approx(of_term, rel=1e-4)
        assert shown[f"know_nothing/{term}"].item() == pytest.approx(nothing, rel=1e-4)
    assert len({round(of_term, 5) for of_term, _ in slow.values()}) == len(slow)        # all differ
    assert loss.item() == pytest.approx(sum(of_term for of_term, _ in slow.values()), rel=1e-4)
    for name, module in model.means.items():
        torch.testing.assert_close(module.mean, means[name], atol=1e-5, rtol=1e-4)
    assert set(model.pooled_means) == {term.split("->")[1] for term in model.across}
    for name, module in model.pooled_means.items():
        torch.testing.assert_close(module.mean, pooled_means[name], atol=1e-5, rtol=1e-4)
    h, _, _ = slow_passes(model, batch, masks)
    for name in model.inputs:                          # the health of the log: of what is visible
        pooled = torch.stack([h[name, b, 0][-1].mean(0) for b in range(3)])
        torch.testing.assert_close(shown[f"embedding/{name}"], pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size,levels", [
    ("base", [2, 5, 8, 11]), ("large", [5, 11, 17, 23]), ("giant", [9, 19, 29, 39]), ("toy", [0, 1, 2, 3]),
    ("three", [0, 1, 2])])
def test_the_levels_are_evenly_spread_end_with_the_last_and_none_comes_twice(size, levels, monkeypatch):
    monkeypatch.setitem(common.SIZES, "three", (64, 3, 2, 256))
    recipe = recipe_of("--size", size)
    with torch.device("meta"):
        model = mjepa.make_model(recipe, mjepa.make_inputs(recipe))
    assert model.layers == levels
    assert sorted(map(int, model.target_encoder.norms)) == levels[:-1]
    assert model.predictor.head.out_features == len(levels) * model.context_encoder.dim


# ---- terms and what they depend on -----------------------------------------------------------------------

def term_gradients(model, batch, masks, weight):
    """{term: (its loss, {name: its gradient alone})}"""
    losses = []
    real = mjepa.mean_loss

    def spy(*args):
        loss = real(*args)
        if loss.requires_grad:                         # not one of knowing nothing
            losses.append(loss)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mjepa, "mean_loss", spy)
        model(batch, masks, weight, 0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {}
    for term, loss in zip(terms_of(model), losses, strict=True):
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        found[term] = (loss.item(), {n: g for n, g in zip(names, gradients) if g is not None})
    return found


def test_each_term_and_its_gradient_is_the_same_with_and_without_the_others():
    batch = make_batch(3)
    masks = masks_of(3)
    state = small_model().state_dict()
    every = term_gradients(small_model(), batch, masks, even(3))
    assert tuple(every) == TERMS["all"]
    for terms in ("intra", "intra+av"):
        model = small_model(terms)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        found = term_gradients(model, batch, masks, even(3))
        assert tuple(found) == TERMS[terms]
        for term in found:
            assert same(found[term], every[term])


@pytest.mark.parametrize("number,m", [(0, "video"), (1, "audio")])
def test_a_model_of_one_modality_is_the_joint_one_with_the_modalitys_embedding_in_the_bias(number, m):
    batch = make_batch(3)
    masks = masks_of(3)
    state = small_model().state_dict()
    for encoder in ("context_encoder", "target_encoder"):
        state[f"{encoder}.stems.{m}.patches.bias"] += state[f"{encoder}.modality"][number, 0]
    model = small_model(f"separate-{m}")
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    ((term, (loss, gradients)),) = term_gradients(model, batch, masks, even(3)).items()
    other, expected = term_gradients(small_model(), batch, masks, even(3))[term]
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)
    missing = {name for name, gradient in expected.items() if gradient.any()} - gradients.keys()
    assert missing == {"context_encoder.modality"}


def test_what_one_modality_shows_changes_no_bit_of_the_term_of_the_other():
    model = small_model()
    batch = make_batch(2)
    masks = masks_of(2)
    before = term_gradients(model, batch, masks, even(2))
    for changed, own, other in (("video", "a", "v"), ("audio", "v", "a")):
        after = term_gradients(model, {**batch, changed: 2 * batch[changed] + 1}, masks, even(2))
        assert same(after[own], before[own])
        assert after[other][0] != before[other][0]
        assert after["av"][0] != before["av"][0]
        assert not any(g.any() for name, g in before[own][1].items() if f".{changed}." in name)


def test_the_rows_of_terms_are_those_of_the_papers_table():
    within = {"a", "v", "av"}
    assert {name: set(terms) for name, terms in TERMS.items()} == {
        "separate-audio": {"a"}, "separate-video": {"v"}, "intra": within,
        "intra+av": within | {"a->v", "v->a"},
        "all": within | {"a->v", "v->a", "a->av", "av->a", "v->av", "av->v"}}
    assert recipe_of()["terms"] == toy_recipe()["terms"] == "all"


def test_what_only_a_dropped_term_needs_is_not_built():
    names = {terms: set(small_model(terms).state_dict()) for terms in TERMS}
    for own, other in (("audio", "video"), ("video", "audio")):
        alone = names[f"separate-{own}"]
        parts = set(".".join(alone).split("."))
        assert not parts & {other, other[0], "av", "cross", "pooled_means"}
        assert "context_encoder.modality" not in alone
        assert {own, own[0], "patches"} <= parts
    assert names["separate-audio"] | names["separate-video"] < names["intra"]
    assert names["intra"] < names["intra+av"] < names["all"]
    for terms, across in (("intra", ()), ("intra+av", ("a->v", "v->a")), ("all", ACROSS)):
        cross = [name for name in names[terms] if name.startswith("cross.")]
        assert {name.split(".")[1] for name in cross} == set(across)
        assert len(cross) == 6 * len(across)           # three weights and three biases of each


# ---- the sizes and the recipe of the paper ---------------------------------------------------------------

@pytest.mark.parametrize("size,dim,depth,heads,mlp,total", [
    ("large", 1024, 24, 16, 4096, 304e6), ("giant", 1408, 40, 22, 6144, 1.01e9)])
def test_the_paper_builds_a_vit_over_1568_and_512_tokens_a_narrow_predictor_and_six_mlps(
        size, dim, depth, heads, mlp, total):
    recipe = recipe_of("--size", size)
    with torch.device("meta"):
        model = mjepa.make_model(recipe, mjepa.make_inputs(recipe), checkpoint=True)
        both = model.context_encoder.embed(torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 1024))
    assert model.grids == FULL
    assert both.shape == (1, 1568 + 512, dim)
    count = count_parameters(model)
    video = (3 * 2 * 16 * 16 + 1) * dim + (8 + 196) * dim
    audio = (16 * 16 + 1) * dim + (8 + 64) * dim
    ends = 2 * dim + 4 * 2 * dim                       # modality, a norm for each level
    assert count["context_encoder"] == video + audio + depth * block_parameters(dim, mlp) + ends
    assert count["target_encoder"] == count["context_encoder"] == pytest.approx(total, rel=0.02)
    start = (4 * dim + 1) * 384 + 384                  # embed, mask token
    places = (8 + 196 + 8 + 64) * 384 + 2 * 384        # positions, modality
    end = 2 * 384 + (384 + 1) * 4 * dim                # norm, head
    assert count["predictor"] == start + places + 12 * block_parameters(384, 1536) + end
    assert count["cross"] == 6 * 3 * (dim + 1) * dim
    assert {block.heads for block in model.context_encoder.blocks} == {heads}
    assert {block.heads for block in model.predictor.blocks} == {12}
    assert model.context_encoder.cls is None


def test_the_paper_recipe_has_the_values_of_the_papers_page_and_the_sound_of_a_jepa():
    recipe = recipe_of()
    expected = dict(
        size="large", image=224, tubelet=(2, 16, 16), mel_patch=(16, 16), levels=4,
        pred_depth=12, pred_dim=384, positions="factorised",
        seconds=10.0, video_seconds=4.0, frames=16, columns=1024, n_mels=128, n_fft=512, hop=160,
        video_blocks=((8, 0.15), (2, 0.7)), video_aspect=(1 / 1.5, 1 / 0.75),
        audio_scale=(0.15, 0.2), audio_aspect=(0.75, 1.5), audio_hidden=(0.6, 0.75),
        tau=0.99925, batch_size=512, steps=500 * 300, epochs=None,
        lr_start=1e-4, lr=5.25e-4, warmup=12_000, weight_decay=0.04)
    assert {name: recipe[name] for name in expected} == expected
    inputs = mjepa.make_inputs(recipe)
    assert inputs.frames / inputs.video_seconds == 4   # pictures a second
    sound = asdict(ajepa.make_inputs(ajepa.get_args(PAPER)[1]))
    of_pictures = ("video_seconds", "frames", "size", "resize", "crop_scale")
    for name in sound.keys() - of_pictures:
        assert getattr(inputs, name) == sound[name], name


def test_the_cooldown_changes_the_frames_the_steps_and_the_rate():
    recipe = recipe_of()
    cooldown = recipe_of("--cooldown", "--init", "x")
    changed = {name: value for name, value in cooldown.items() if recipe.get(name) != value}
    assert changed == dict(frames=64, video_seconds=10.0, steps=12_000, warmup=0, lr_end=1e-6, cooldown=True)
    assert toy_recipe("--cooldown", "--init", "x")["frames"] == 4 * toy_recipe()["frames"]


def test_the_learning_rate_warms_up_stays_and_in_the_cooldown_falls_to_1_06e_4():
    recipe = recipe_of()
    rates = [mjepa.learning_rate(step, recipe) for step in (0, 5999, 11_999, 12_000, 149_999)]
    assert rates == pytest.approx([1e-4 + 4.25e-4 / 12_000, 3.125e-4, 5.25e-4, 5.25e-4, 5.25e-4], rel=1e-9)
    warm = np.diff([mjepa.learning_rate(step, recipe) for step in range(12_000)])
    np.testing.assert_allclose(warm, 4.25e-4 / 12_000, rtol=1e-6)
    cooldown = recipe_of("--cooldown", "--init", "x")
    rates = [mjepa.learning_rate(step, cooldown) for step in range(12_000)]
    assert rates[0] == 5.25e-4
    assert rates[-1] == pytest.approx(1.06e-4, abs=1e-6)
    np.testing.assert_allclose(np.diff(rates), (1e-6 - 5.25e-4) / 15_000, rtol=1e-6)
    short = recipe_of("--cooldown", "--init", "x", "--steps", 100)              # the same fall
    assert mjepa.learning_rate(50, short) == pytest.approx(rates[6000])


# ----------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------

def quicken(patch):
    """The statistics of the mel over four clips, and no curves."""
    patch.setitem(mjepa.RECIPE, "stats_clips", (4, 4, ""))
    patch.setattr(runs, "draw_curves", lambda *args: None)


@pytest.fixture
def quick(monkeypatch):
    quicken(monkeypatch)


def train(toy, out, *flags):
    """A small run on the training clips of the toy world as a folder: without the table at the end."""
    where = ["--data", "folder", "--data-dir", str(toy / "train"), "--out", str(out), "--device", "cpu"]
    small = ["--size", "nano", "--batch-size", "4", "--workers", "0", "--recipe", "toy", "--log-every", "1"]
    mjepa.main([*where, *small, *map(str, flags)])


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """{terms: (folder of a run of two steps, what its model was given)}"""
    found = {}
    for terms in ("all", "separate-audio", "separate-video"):
        out = tmp_path_factory.mktemp("mjepa")
        given = []
        forward = MJEPA.forward

        def spy(self, batch, masks, weight, tick, given=given, forward=forward):
            given.append((batch, masks))
            return forward(self, batch, masks, weight, tick)

        with pytest.MonkeyPatch.context() as patch:
            quicken(patch)
            patch.setattr(MJEPA, "forward", spy)
            train(toy, out, "--steps", 2, "--terms", terms)
        found[terms] = (out, given)
    return found


@pytest.mark.parametrize("m", ["audio", "video"])
def test_runs_of_other_terms_see_the_same_clips_under_the_same_masks(finished, m):
    _, everything = finished["all"]
    _, alone = finished[f"separate-{m}"]
    assert len(alone) == len(everything) == 2
    for (batch, masks), (every, all_masks) in zip(alone, everything):
        assert same(batch["index"], every["index"])
        assert torch.equal(batch[m], every[m])
        assert batch.keys() & {"video", "audio"} == {m}
        for mask_set, all_sets in zip(masks, all_masks):
            assert same(mask_set, {m[0]: all_sets[m[0]]})


@pytest.mark.parametrize("m", ["audio", "video"])
def test_a_run_of_one_modality_logs_its_term_alone_and_its_encoder_takes_what_load_clip_prepares(
        toy, finished, m):
    out, _ = finished[f"separate-{m}"]
    for row in runs.read_log(out):
        names = {f"{kind}/{m[0]}" for kind in ("loss", "know_nothing", "std", "rank")}
        assert {key for key in row if "/" in key} == names
    encoder = common.load_encoder(out, cross=True)
    clip = data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)
    assert set(clip) == {m}
    tokens, _ = encoder(**clip)
    assert tokens.shape == (1, math.prod(TOY[m]), encoder.dim)
    assert encoder.cross is None


def interpolated(before, count):
    """Rows (T, 1, D) at the middles of `count` equal parts of the time, linear between those of the T."""
    before = before[:, 0].numpy()
    at = (np.arange(count) + 0.5) * len(before) / count - 0.5
    columns = [np.interp(at, np.arange(len(before)), column) for column in before.T]
    return torch.from_numpy(np.stack(columns, 1)[:, None]).float()


STRETCHED = ("context_encoder.stems.video.positions.first", "target_encoder.stems.video.positions.first",
             "predictor.positions.video.first")


@pytest.fixture(scope="module")
def cooled(toy, finished, tmp_path_factory):
    """The checkpoints before and after one step of the last phase with a learning rate of 0."""
    begun, _ = finished["all"]
    out = tmp_path_factory.mktemp("cooldown")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        patch.setattr(data, "mel_stats", None)         # the statistics are the first checkpoint's
        train(toy, out, "--steps", 1, "--cooldown", "--init", begun, "--lr", 0)
    return weights(begun), weights(out)


def test_the_cooldown_has_four_times_the_frames_of_all_that_is_heard_and_the_same_mel(cooled):
    before, after = (content["inputs"] for content in cooled)
    assert after["frames"] == 4 * before["frames"] == cooled[1]["encoder"]["video"]["shape"][0]
    assert after["video_seconds"] == after["seconds"] == before["seconds"]
    for name in ("mel_mean", "mel_std"):
        assert after[name] == before[name]
        assert len(before[name]) == 64


def test_the_cooldown_starts_from_the_weights_with_positions_of_time_interpolated(cooled):
    before, after = (content["model"] for content in cooled)
    assert after.keys() == before.keys()
    for name, now in after.items():
        if "means." in name:                           # they have seen a further step
            continue
        expected = before[name]
        if name in STRETCHED:
            assert (len(expected), len(now)) == (2, 8)
            expected = interpolated(expected, 8)
        if name.startswith("target_encoder."):         # .0005 of the way towards the student
            assert (now - expected).abs().max() < 1e-3
        else:
            torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-6)     # the learning rate is 0


def test_adamw_goes_on_in_the_cooldown_with_its_moments_but_for_the_stretched_positions(cooled):
    before, after = (content["optimizer"]["state"] for content in cooled)
    model = MJEPA(cooled[1]["encoder"], TERMS["all"], 64, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    order = []
    for group in common.weight_decay_groups(model, 0.04):
        order += [names[id(p)] for p in group["params"]]
    assert set(STRETCHED) & set(order) == {STRETCHED[0], STRETCHED[2]}
    for number, name in enumerate(order):
        new = name in STRETCHED
        assert after[number]["step"] == (1 if new else before[number]["step"] + 1), name


def test_a_run_with_init_goes_on_when_its_first_checkpoint_is_gone_but_not_from_another(
        toy, finished, quick, tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    shutil.copytree(finished["all"][0], begun)
    flags = ["--steps", 2, "--init", begun]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "StopSignal", lambda: StopAfter(1))
        train(toy, tmp_path / "run", *flags)
    shutil.rmtree(begun)
    train(toy, tmp_path / "run", *flags)
    assert weights(tmp_path / "run")["step"] == 2
    with pytest.raises(UserError, match=f"the run there began from {begun}"):
        train(toy, tmp_path / "run", "--steps", 2, "--init", "other")


BAD_INIT = {
    "--cooldown --init OTHER": "checkpoint of ajepa, not of mjepa",
    "--init BEGUN --size toy": "another shape",
    "--init BEGUN --terms intra": "other names",
    "--init BEGUN --out BEGUN": "written over",
    "--init BEGUN/latest.pt --out BEGUN": "written over",
}


@pytest.mark.parametrize("flags", BAD_INIT)
def test_init_wants_a_checkpoint_of_this_method_size_and_terms_in_another_folder(
        toy, finished, tmp_path, flags):
    begun, _ = finished["all"]
    other = tmp_path / "other.pt"
    torch.save({**weights(begun), "method": ajepa.METHOD}, other)
    given = flags.replace("BEGUN", str(begun)).replace("OTHER", str(other))
    with pytest.raises(UserError, match=BAD_INIT[flags]) as error:
        train(toy, tmp_path / "run", "--steps", 1, *given.split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "latest.pt").exists()


def test_a_cooldown_takes_a_folder_of_its_own_and_a_recipe_that_does_not_name_its_beginning():
    args, recipe = mjepa.get_args(["--cooldown", "--init", "x"])
    assert args.out == "runs/mjepa-cooldown-toy-seed0"
    assert "x" not in recipe.values()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", data.SETS)
def test_a_set_of_one_modality_trains_that_one_alone(name, terms):
    flags = ["--data", name, "--data-dir", "x", "--terms", terms]
    if modalities_of(terms) <= set(data.SETS[name].has):
        assert mjepa.get_args(flags)[1]["terms"] == terms
        return
    with pytest.raises(UserError, match=f"--data {name} has no (pictures|sound); give --terms separate-"):
        mjepa.get_args(flags)
