"""A-JEPA: the law of its masks, its terms, its recipe and its mel, each against a reference of its own."""
import functools
import itertools
import math
from dataclasses import replace

import ajepa
import common
import data
import run as runs
import slow
from ajepa import RECIPE, draw_masks
from common import UserError
from conftest import weights
from slow import is_uniform, maps, mel_power, quicken, record, train

import numpy as np
import pytest
import torch

FULL = (8, 64)                                         # grids of the paper and the toy, frequency x time
TOY = (2, 24)
recipe_of = functools.partial(slow.recipe_of, ajepa)


def draw(seed, grid, recipe, batch=4, step=0, steps=None):
    """What is visible, what is a target, each (batch, rows, cols) bool; steps None: the curriculum's end."""
    (mask_set,) = draw_masks(seed, step, range(batch), {"audio": grid}, recipe, steps=steps)
    context, target = mask_set["a"]
    return maps(context, {"audio": grid})["audio"], maps(target, {"audio": grid})["audio"]


# ---- blocks ----------------------------------------------------------------------------------------------

def draw_sizes(grid, count, relative=True):
    """Heights and widths, each (count, 4), of the blocks of the paper's masks."""
    rng = np.random.default_rng(0)
    aspect = ajepa.aspect_range(grid, RECIPE["block_aspect"][0], relative)
    law = (grid, "multiblock", RECIPE["block_scale"][0], aspect)
    sizes = [ajepa.block_sizes(rng, *law) for _ in range(count)]
    return np.moveaxis(np.array(sizes), 2, 0)


def test_area_and_aspect_of_the_blocks_are_independent_uniform_draws():
    h, w = draw_sizes((800, 6400), 1000)               # so fine that nothing rounds
    area = h * w / (800 * 6400)
    aspect = (w / 6400) / (h / 800)
    assert is_uniform(area, 0.15, 0.2)
    assert is_uniform(aspect, 0.75, 1.5)
    assert abs(np.corrcoef(area.ravel(), aspect.ravel())[0, 1]) < 4 / math.sqrt(area.size)
    for one, other in itertools.combinations(range(4), 2):     # nor do the four of a clip depend on another
        for x in (area, aspect):
            assert abs(np.corrcoef(x[:, one], x[:, other])[0, 1]) < 4 / math.sqrt(len(x))


def test_an_aspect_in_patches_hands_the_excess_to_the_width_and_keeps_the_area():
    h, w = draw_sizes(FULL, 2000, relative=False)
    assert set(h.flat) == {7, 8}
    assert (h == 8).mean() > 0.8                       # 8 to 12 rows were asked for
    assert (h * w >= 0.15 * 512 - h / 2).all()
    assert (h * w <= 0.2 * 512 + h / 2).all()
    h, w = draw_sizes((800, 800), 500, relative=False)
    assert is_uniform(w / h, 0.75, 1.5)                # on a square grid both are the same


@pytest.mark.parametrize("flags,aspect", [([], [6, 12]), (["--block-aspect", "patch"], [0.75, 1.5])], ids=str)
def test_masks_have_the_aspect_of_the_flag(monkeypatch, flags, aspect):
    calls = record(monkeypatch, ajepa, "hide_blocks")
    draw(0, FULL, recipe_of(*flags))
    for arguments, _ in calls:
        assert arguments[4] == aspect                  # width over height in patches, on 8 x 64


# ---- masks -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masking", ["multiblock", "block", "time", "freq", "random"])
def test_a_mask_ratio_hides_exactly_that_share_and_never_all_or_nothing(masking):
    for grid, ratio in itertools.product((FULL, (8, 3), (8, 1)), (0.01, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)):
        recipe = recipe_of("--masking", masking, "--mask-ratio", ratio)
        total = math.prod(grid)
        for seed in range(2):
            visible, target = draw(seed, grid, recipe, batch=2)
            assert (visible == ~target).all()
            assert (target.sum((1, 2)) == min(max(1, round(ratio * total)), total - 1)).all()


@pytest.mark.parametrize("masking", ["time", "freq", "block"])
def test_strips_are_whole_columns_or_rows_and_the_single_block_is_one_rectangle(monkeypatch, masking):
    calls = record(monkeypatch, ajepa, "hide_blocks")
    for seed in range(40):
        draw(seed, FULL, recipe_of("--masking", masking))
    for _, union in calls:
        rows = union.any(1)
        cols = union.any(0)
        assert (union == rows[:, None] & cols).all()
        if masking == "block":
            assert all(np.ptp(np.flatnonzero(side)) == side.sum() - 1 for side in (rows, cols))
        else:
            assert (rows if masking == "time" else cols).all()


def test_random_masks_have_no_blocks_and_multiblock_masks_have():
    excess = {}                                        # how much oftener one is hidden beside a hidden one
    for masking in ("random", "multiblock"):
        recipe = recipe_of("--masking", masking)
        hidden = np.concatenate([draw(seed, FULL, recipe, batch=8)[1] for seed in range(40)])
        beside = hidden[:, :, 1:][hidden[:, :, :-1]]
        excess[masking] = beside.mean() - hidden.mean()
    assert abs(excess["random"]) < 0.01
    assert excess["multiblock"] > 0.2


# ---- the paper's curriculum ------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """Calls of hide_curriculum, (arguments, result): the step's first, then the clips'."""
    return record(monkeypatch, ajepa, "hide_curriculum")


def kind_of(call):
    """Whether a call of hide_curriculum asked for a time-frequency mask."""
    return call[0][4]


def test_the_curriculum_turns_to_time_frequency_masks_by_the_formula_with_one_draw_for_batch_and_ranks(drawn):
    recipe = recipe_of("--masking", "curriculum")
    count = 400
    for step in (0, 1, 10, 30, 70, 100):
        kinds = []
        for seed in range(count):
            drawn.clear()
            for rank in range(2 if seed < 20 else 1):
                places = range(rank, 4, 2) if seed < 20 else [0]
                draw_masks(seed, step, places, {"audio": TOY}, recipe, steps=100)
            assert len(set(map(kind_of, drawn))) == 1
            kinds.append(kind_of(drawn[0]))
        p = min(1.0, math.sqrt(step / 100 * (1 - 0.01 ** 2)) + 0.01 ** 2)       # c0 = .01
        assert np.mean(kinds) == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / count) + 1e-4)


@pytest.mark.parametrize("removes,blocks,low,high", [
    ("", 4, 0.15, 0.2), ("time", 3, 0.05, 0.075), ("freq", 3, 0.05, 0.075), ("both", 3, 0.05, 0.075)])
def test_a_mask_of_the_curriculum_hides_its_blocks_and_a_time_frequency_one_their_rows_and_columns_too(
        drawn, removes, blocks, low, high):
    recipe = recipe_of("--masking", "curriculum", "--tf-removes", removes or "both")
    for seed in range(40):
        drawn.clear()
        visible, target = draw(seed, FULL, recipe, steps=None if removes else 1)
        for call in drawn:
            targets, hidden = call[1]
            expected = targets.copy()
            if removes in ("time", "both"):
                expected |= targets.any(0)
            if removes in ("freq", "both"):
                expected |= targets.any(1)[:, None]
            assert kind_of(call) == bool(removes)      # at step 0 one of 10,000 would be
            assert (hidden == expected).all()
            assert low * 512 - 4 <= targets.sum() <= blocks * (high * 512 + 4)  # they may overlap
        targets, hidden = drawn[0][1]
        assert not (visible & target).any()
        assert (target.sum((1, 2)) == targets.sum()).all()
        assert (visible.sum((1, 2)) == 512 - hidden.sum()).all()
        assert visible.any()
        assert ((visible | target).mean() < 1) == bool(removes)                 # the rest is neither


@pytest.mark.parametrize("removes", ["time", "both"])
def test_a_curriculum_that_leaves_no_context_on_a_grid_ends_in_a_sentence(removes):
    recipe = recipe_of("--masking", "curriculum", "--tf-removes", removes)
    with pytest.raises(UserError, match="curriculum: its masks leave no context on a grid of 8 x 1 patches"):
        draw(0, (8, 1), recipe)


# ---- the mel ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("column,seconds,frames,columns", [
    ("paper", 10, 1001, 1024), ("toy", 3.84, 385, 384)])
def test_the_mel_is_the_definition_filled_up_with_silence_or_cut_to_whole_patches(
        column, seconds, frames, columns):
    """Also where the length of the recipe is given as a flag."""
    recipe = ajepa.get_args(["--recipe", column])[1]
    assert ajepa.get_args(["--recipe", column, "--seconds", str(seconds)])[1] == recipe
    plain = ajepa.make_inputs(recipe)
    mean = np.linspace(-5, 1, plain.n_mels)
    std = np.linspace(0.5, 3, plain.n_mels)
    t = np.arange(round(plain.seconds * 16000)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * (100 + 300 * t) * t) + np.random.default_rng(0).normal(0, 0.05, t.size)
    wave = torch.from_numpy(wave).float()
    mel = data.LogMel(replace(plain, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist())))(wave)
    power = mel_power(wave.numpy(), plain)
    assert power.shape[1] == frames
    assert mel.shape == (1, plain.n_mels, columns)
    power = np.pad(power, ((0, 0), (0, 1024)))[:, :columns]
    np.testing.assert_allclose(mel[0].numpy() * std[:, None] + mean[:, None], np.log(power + 1e-6), atol=2e-3)


def test_each_bin_is_normalised_over_the_clips_and_the_empty_one_is_floored(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "stats_clips", (7, 7, ""))
    monkeypatch.setitem(RECIPE, "n_mels", (128, 128, ""))
    out = tmp_path / "run"
    train(ajepa, toy, out, "--seconds", 2, "--steps", 1)
    inputs = data.Inputs(**weights(out)["inputs"])
    listing = data.list_clips("folder", toy / "train")
    plain = replace(inputs, mel_mean=0.0, mel_std=1.0, columns=None)
    chosen = np.random.default_rng(0).permutation(len(listing))[:7]
    mels = [data.load_clip(listing.path(i), plain)["audio"][0, 0].double().numpy() for i in chosen]
    heard = np.concatenate(mels, 1)                    # (bins, frames)
    std = heard.std(1)
    np.testing.assert_allclose(inputs.mel_mean, heard.mean(1), rtol=1e-5)
    np.testing.assert_allclose(inputs.mel_std, np.maximum(std, 0.1), rtol=1e-3)
    assert std[0] < 1e-4                               # the lowest filter lies between two frequencies


# ---- runs and flags --------------------------------------------------------------------------------------

def test_learning_rate_tau_and_curriculum_follow_the_recipe_over_a_run(toy, tmp_path, monkeypatch):
    quicken(monkeypatch, ajepa)
    own = ["--masking", "curriculum", "--loss", "l2", "--pos", "sincos", "--seconds", 1]
    train(ajepa, toy, tmp_path, "--steps", 8, *own)
    recipe = weights(tmp_path)["recipe"]
    rows = runs.read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    for step, row in enumerate(rows):
        assert row["tau"] == pytest.approx(common.cosine(step, 8, 0.996, 0.999))
        rate = common.warmup_cosine(step, 8, 2, 1e-3)  # a fifth is warm-up; the formulas: test_formulas.py
        assert row["lr"] == pytest.approx(rate, abs=1e-12)
        visible, _ = draw(0, (2, 7), recipe, step=step, steps=8)
        assert row["kept/a"] == pytest.approx(visible.mean())


@pytest.mark.parametrize("flags", ["--size colossal", "--batch-size 100000", "--batch-size 5 --accumulate 2"])
def test_a_run_with_an_impossible_size_ends_before_any_clip_is_decoded(toy, tmp_path, monkeypatch, flags):
    monkeypatch.setattr("datasets.views.open_clip", lambda *args: pytest.fail("decoded"))
    with pytest.raises(UserError):
        train(ajepa, toy, tmp_path / "run", "--steps", 2, *flags.split())
