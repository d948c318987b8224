"""A-JEPA: the law of its masks, its terms, its recipe and its mel, each against a reference of its own."""
import itertools
import math
from dataclasses import replace

import ajepa
import data
import run as runs
from ajepa import AJEPA, RECIPE, draw_masks, prediction_loss
from common import UserError
from conftest import weights
from slow import block_parameters, count_parameters, is_uniform, layer_norm, linear, maps, mel_filters
from slow import mel_power, narrow, patch_tokens, random, shake, slow_distance, slow_levels, slow_positions

import numpy as np
import pytest
import torch

FULL = (8, 64)                                         # grids of the paper and the toy, frequency x time
TOY = (4, 24)
BLOCKS = ("multiblock", "block", "time", "freq")       # the maskings that hide a share in blocks


def recipe_of(*flags):
    """The paper's recipe with some flags."""
    return ajepa.get_args(["--data", "audioset", "--data-dir", "x", *map(str, flags)])[1]


def draw(seed, grid, recipe, batch=4, step=0, steps=None):
    """What is visible, what is a target, each (batch, rows, cols) bool; steps None: the curriculum's end."""
    (mask_set,) = draw_masks(seed, step, 0, batch, {"audio": grid}, recipe, steps=steps)
    context, target = mask_set["a"]
    return maps(context, {"audio": grid})["audio"], maps(target, {"audio": grid})["audio"]


@pytest.fixture
def drawn(monkeypatch):
    """Calls of hide_blocks and hide_curriculum, (arguments, result): the step's first, then the clips'."""
    calls = []

    def watch(name):
        real = getattr(ajepa, name)

        def spy(*args):
            calls.append((args, real(*args)))
            return calls[-1][1]
        monkeypatch.setattr(ajepa, name, spy)

    watch("hide_blocks")
    watch("hide_curriculum")
    return calls


# ----------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------

def draw_sizes(grid, count, relative=True):
    """Heights and widths, each (count, 4), of the blocks of the paper's masks."""
    rng = np.random.default_rng(0)
    aspect = ajepa.aspect_range(grid, RECIPE["block_aspect"][0], relative)
    law = (grid, "multiblock", RECIPE["block_scale"][0], aspect)
    sizes = [ajepa.block_sizes(rng, *law) for _ in range(count)]
    return np.moveaxis(np.array(sizes), 2, 0)


def test_the_paper_draws_four_blocks_a_clip_with_its_areas_and_aspects_up_to_rounding():
    h, w = draw_sizes(FULL, 2000)
    assert h.shape == (2000, 4)
    assert (h * w >= 0.15 * 512 - h / 2).all()         # the width is rounded last
    assert (h * w <= 0.2 * 512 + h / 2).all()
    lowest = (w - 0.5) * h / (h + 0.5) ** 2 / 8        # of (w / 64) / (h / 8), before the rounding
    highest = (w + 0.5) * h / (h - 0.5) ** 2 / 8
    assert (lowest <= 1.5).all()
    assert (highest >= 0.75).all()
    assert set(h.flat) == {3, 4}                       # 8 sqrt(s / a) is 2.5 to 4.1
    assert (h * w).mean() / 512 == pytest.approx(0.175, abs=0.001)


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
def test_masks_have_the_aspect_of_the_flag(drawn, flags, aspect):
    draw(0, FULL, recipe_of(*flags))
    for arguments, _ in drawn:
        assert arguments[4] == aspect                  # width over height in patches, on 8 x 64


# ----------------------------------------------------------------------------------------------------------
# Masks
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [FULL, TOY])
@pytest.mark.parametrize("masking", BLOCKS)
def test_the_union_of_the_blocks_hides_60_to_75_percent_before_any_single_patch(drawn, masking, grid):
    recipe = recipe_of("--masking", masking)
    total = math.prod(grid)
    missed = []
    counts = set()
    for seed in range(50):
        drawn.clear()
        visible, target = draw(seed, grid, recipe)
        own, *clips = [union for _, union in drawn]
        count = own.sum()
        counts.add(count)
        assert (visible == ~target).all()
        assert 0.6 * total <= count <= 0.75 * total
        assert (target.sum((1, 2)) == count).all()     # the step's number for all clips
        for union, hidden in zip(clips, target):
            singles = abs(union.sum() - count)
            assert 0.6 * total <= union.sum() <= 0.75 * total
            assert (union ^ hidden).sum() == singles   # no more single patches than the number asks for
            missed.append(singles > 0.02 * total + 0.5)
    assert np.mean(missed) < 0.05                      # of a hundred clips few find no draw so near
    if (masking, grid) != ("freq", TOY):               # there it is always 3 rows of 4
        assert len(counts) > 1
    if masking == "multiblock":
        assert np.mean(list(counts)) / total == pytest.approx(0.675, abs=0.03)


@pytest.mark.parametrize("masking", [*BLOCKS, "random"])
def test_a_mask_ratio_hides_exactly_that_share_and_never_all_or_nothing(masking):
    for grid, ratio in itertools.product((FULL, (8, 3), (8, 1)), (0.01, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)):
        recipe = recipe_of("--masking", masking, "--mask-ratio", ratio)
        total = math.prod(grid)
        for seed in range(2):
            visible, target = draw(seed, grid, recipe, batch=2)
            assert (visible == ~target).all()
            assert (target.sum((1, 2)) == min(max(1, round(ratio * total)), total - 1)).all()


def test_the_corners_are_hidden_least_but_no_patch_always_or_never():
    recipe = recipe_of()
    hidden = [draw(seed, FULL, recipe, batch=8)[1] for seed in range(250)]
    share = np.concatenate(hidden).mean(0)
    assert share.mean() == pytest.approx(0.675, abs=0.02)
    corners = share[::7, ::63]
    assert corners.max() < share.min() + 0.05
    assert share.min() > 0.1
    assert share.max() < 1


def test_strips_of_time_are_whole_columns_and_strips_of_frequency_whole_rows(drawn):
    for masking, axis in (("time", 0), ("freq", 1)):
        drawn.clear()
        for seed in range(40):
            draw(seed, FULL, recipe_of("--masking", masking))
        for _, union in drawn:
            assert (union.all(axis) == union.any(axis)).all()


def test_the_single_block_is_one_rectangle(drawn):
    for seed in range(40):
        draw(seed, FULL, recipe_of("--masking", "block"))
    for _, union in drawn:
        rows = np.flatnonzero(union.any(1))
        cols = np.flatnonzero(union.any(0))
        assert union[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1].all()
        assert not np.delete(union, rows, 0).any()
        assert not np.delete(union, cols, 1).any()


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
                draw_masks(seed, step, rank, 2 if seed < 20 else 1, {"audio": TOY}, recipe, steps=100)
            assert len(set(map(kind_of, drawn))) == 1
            kinds.append(kind_of(drawn[0]))
        p = min(1.0, math.sqrt(step / 100 * (1 - 0.01 ** 2)) + 0.01 ** 2)       # c0 = .01
        assert np.mean(kinds) == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / count) + 1e-4)


@pytest.mark.parametrize("removes", ["time", "freq", "both"])
def test_a_time_frequency_mask_takes_the_rows_and_columns_of_the_targets_from_the_context(drawn, removes):
    recipe = recipe_of("--masking", "curriculum", "--tf-removes", removes)
    for seed in range(30):
        drawn.clear()
        visible, target = draw(seed, FULL, recipe)
        for call in drawn:
            targets, hidden = call[1]
            expected = targets.copy()
            for row, col in zip(*np.nonzero(targets)):
                if removes in ("time", "both"):
                    expected[:, col] = True
                if removes in ("freq", "both"):
                    expected[row] = True
            assert kind_of(call)
            assert (hidden == expected).all()
            assert 0.05 * 512 - 4 <= targets.sum() <= 3 * (0.075 * 512 + 4)     # three that may overlap
        assert not (visible & target).any()
        assert (target.sum((1, 2)) == drawn[0][1][0].sum()).all()
        assert (visible.sum((1, 2)) == 512 - drawn[0][1][1].sum()).all()
        assert visible.any()
        assert (visible | target).mean() < 1           # what lies beside the targets is neither


def test_a_random_block_mask_of_the_curriculum_hides_its_four_blocks_and_nothing_else(drawn):
    recipe = recipe_of("--masking", "curriculum")
    for seed in range(40):
        drawn.clear()
        visible, target = draw(seed, FULL, recipe, steps=1)
        assert not kind_of(drawn[0])                   # at step 0 one of 10,000 would be
        assert (visible == ~target).all()
        for _, (targets, hidden) in drawn:
            assert (targets == hidden).all()
            assert 0.15 * 512 - 4 <= targets.sum() <= 4 * (0.2 * 512 + 4)


@pytest.mark.parametrize("removes", ["time", "both"])
def test_a_curriculum_that_leaves_no_context_on_a_grid_ends_in_a_sentence(removes):
    recipe = recipe_of("--masking", "curriculum", "--tf-removes", removes)
    with pytest.raises(UserError, match="curriculum: its masks leave no context on a grid of 8 x 1 patches"):
        draw(0, (8, 1), recipe)


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------

SHAPE = (12, 20)                                       # a small mel in 3 x 5 patches


def small_model(loss="smooth_l1", positions="factorised"):
    audio = dict(shape=SHAPE, patch=(4, 4))
    config = dict(size="nano", audio=audio, positions=positions, checkpoint=False)
    torch.manual_seed(0)
    return shake(AJEPA(config, 32, 2, loss))


def small_masks(batch):
    return draw_masks(3, 0, 0, batch, {"audio": (3, 5)}, recipe_of("--masking", "random"))


def slow_prediction(model, h, context, target):
    """One clip: what its visible tokens h (C, D) say of the hidden ones, token by token (M, D)."""
    predictor = model.predictor
    e = slow_positions(predictor.positions)
    visible = [linear(predictor.embed, x) + e[i] for x, i in zip(h, context)]
    hidden = [predictor.mask_token + e[j] for j in target]
    return narrow(predictor, visible, hidden)


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1", "cosine"])
def test_the_loss_is_the_formula(kind):
    p = random(3, 7, 5)
    z = 2 * random(3, 7, 5, seed=1)                    # some are nearer than 1, some farther
    expected = slow_distance(p.flatten(0, 1), z.flatten(0, 1), kind)
    assert prediction_loss(p, z, kind).item() == pytest.approx(expected, rel=1e-5)
    assert prediction_loss(z, z, kind).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind,positions", [
    ("smooth_l1", "factorised"), ("l2", "factorised"), ("l1", "factorised"), ("cosine", "factorised"),
    ("smooth_l1", "sincos")])
def test_the_loss_of_a_batch_is_what_a_loop_over_its_clips_computes(kind, positions):
    """In float32, outside of autocast."""
    model = small_model(kind, positions)
    mel = random(3, 1, *SHAPE)
    masks = small_masks(3)
    loss, shown = model({"audio": mel}, masks, 1.0, 0)
    predictions = []
    targets = []
    embeddings = []
    with torch.no_grad():
        for x, context, target in zip(mel, *masks[0]["a"]):
            heard = patch_tokens(model.context_encoder, {"audio": x})
            (h,) = slow_levels(model.context_encoder, heard[context])           # 1 the visible patches alone
            everything = patch_tokens(model.target_encoder, {"audio": x})
            (z,) = slow_levels(model.target_encoder, everything)                # 2 everything
            targets.append(layer_norm(z[target], eps=1e-5))
            predictions.append(slow_prediction(model, h, context, target))      # 3 predict
            embeddings.append(z.mean(0))
    predictions = torch.cat(predictions)
    targets = torch.cat(targets)
    assert loss.item() == pytest.approx(slow_distance(predictions, targets, kind), rel=1e-4)
    mean = targets.mean(0).expand_as(targets)          # at step 0 the running mean is that of the batch
    assert shown["know_nothing/a"].item() == pytest.approx(slow_distance(mean, targets, kind), rel=1e-4)
    torch.testing.assert_close(shown["embedding/a"], torch.stack(embeddings), atol=1e-5, rtol=1e-4)
    assert shown["loss/a"].item() == loss.item()
    assert shown["kept/a"].item() == pytest.approx(masks[0]["a"][0].shape[1] / 15)


def test_the_paper_builds_a_vit_base_over_512_tokens_and_a_narrow_predictor():
    recipe = recipe_of()
    inputs = ajepa.make_inputs(recipe)
    with torch.device("meta"):
        model = ajepa.make_model(recipe, inputs)
        tokens = model.context_encoder(audio=torch.empty(1, 1, 128, 1024))
    assert inputs.mel_frames == 1024
    assert model.grids["audio"] == FULL
    assert tokens.shape == (1, 512, 768)
    count = count_parameters(model)
    stem = (256 + 1) * 768 + (8 + 64) * 768
    assert count["context_encoder"] == 12 * block_parameters(768, 3072) + stem + 2 * 768
    assert count["target_encoder"] == count["context_encoder"] == pytest.approx(86e6, rel=0.01)
    start = (768 + 1) * 384 + 384 + (8 + 64) * 384     # embed, mask token, positions
    end = 2 * 384 + (384 + 1) * 768                    # norm, head
    assert count["predictor"] == start + 6 * block_parameters(384, 1536) + end
    assert {block.heads for block in (*model.context_encoder.blocks, *model.predictor.blocks)} == {12}
    assert model.context_encoder.cls is None


def test_the_paper_recipe_has_the_values_of_the_paper():
    recipe = recipe_of()
    expected = dict(
        size="base", pos="learned", mel_patch=(16, 16), pred_depth=6, pred_dim=384,
        seconds=10.0, n_fft=512, hop=160, n_mels=128, columns=1024,
        masking="multiblock", block_scale=(0.15, 0.2), block_aspect=(0.75, 1.5), hidden=(0.6, 0.75),
        loss="smooth_l1", tau=(0.996, 0.9999), batch_size=256, epochs=400, steps=None,
        lr=1.5e-4, warmup=0.1, betas=(0.9, 0.95), weight_decay=0.05)
    assert {name: recipe[name] for name in expected} == expected
    inputs = ajepa.make_inputs(recipe)
    assert (inputs.sample_rate, inputs.win_length, inputs.window, inputs.log) == (16000, 400, "hann", "ln")


# ----------------------------------------------------------------------------------------------------------
# The mel
# ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags,frames", [(["--recipe", "paper"], 1001), (["--recipe", "toy"], 385)], ids=str)
def test_the_mel_is_the_definition_filled_up_with_silence_or_cut_to_whole_patches(flags, frames):
    recipe = ajepa.get_args(flags)[1]
    plain = ajepa.make_inputs(recipe)
    mean = np.linspace(-5, 1, plain.n_mels)
    std = np.linspace(0.5, 3, plain.n_mels)
    t = np.arange(round(plain.seconds * 16000)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * (100 + 300 * t) * t) + np.random.default_rng(0).normal(0, 0.05, t.size)
    wave = torch.from_numpy(wave).float()
    mel = data.LogMel(replace(plain, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist())))(wave)
    power = mel_power(wave.numpy(), plain)
    assert power.shape[1] == frames
    assert mel.shape == (1, plain.n_mels, plain.mel_frames)
    assert plain.mel_frames % 16 == 0
    power = np.pad(power, ((0, 0), (0, 1024)))[:, :plain.mel_frames]
    np.testing.assert_allclose(mel[0].numpy() * std[:, None] + mean[:, None], np.log(power + 1e-6), atol=2e-3)


def test_each_bin_is_normalised_over_the_clips_and_the_empty_one_is_floored(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "stats_clips", (7, 7, ""))
    monkeypatch.setitem(RECIPE, "n_mels", (128, 128, ""))
    out = tmp_path / "run"
    train(toy, out, "--seconds", 2, "--steps", 1)
    inputs = data.Inputs(**weights(out)["inputs"])
    listing = data.list_clips("folder", toy / "train")
    plain = replace(inputs, mel_mean=0.0, mel_std=1.0, columns=None)
    chosen = np.random.default_rng(0).permutation(len(listing))[:7]
    mels = [data.load_clip(listing.path(i), plain)["audio"][0, 0].double().numpy() for i in chosen]
    heard = np.concatenate(mels, 1)                    # (bins, frames)
    std = heard.std(1)
    np.testing.assert_allclose(inputs.mel_mean, heard.mean(1), rtol=1e-5)
    np.testing.assert_allclose(inputs.mel_std, np.maximum(std, 0.1), rtol=1e-3)
    empty = mel_filters(plain).sum(1) == 0             # the lowest filter lies between two frequencies
    assert empty.tolist() == [True] + [False] * 127
    assert std[0] < 1e-4
    assert inputs.mel_mean[0] == pytest.approx(math.log(1e-6), abs=1e-4)
    frames = 2 * 16000 // 160 + 1
    for i in chosen:                                   # after the sound comes silence, up to whole patches
        mel = data.load_clip(listing.path(i), inputs)["audio"][0, 0].numpy()
        silence = (math.log(1e-6) - np.array(inputs.mel_mean)) / np.array(inputs.mel_std)
        assert mel.shape[1] == math.ceil(frames / 16) * 16
        np.testing.assert_allclose(mel[:, frames:] - silence[:, None], 0, atol=1e-3)


def test_a_view_is_a_random_stretch_of_sound_inside_the_clip():
    starts = []
    for seed in range(400):
        (view,) = ajepa.plan_views(np.random.default_rng(seed), 12.0, 10.0)
        assert (view.seconds, view.video, view.audio) == (10.0, None, True)
        starts.append(view.start)
    assert is_uniform(starts, 0, 2)
    assert ajepa.plan_views(np.random.default_rng(0), 3.0, 10.0)[0].start == 0


# ----------------------------------------------------------------------------------------------------------
# Runs and flags
# ----------------------------------------------------------------------------------------------------------

def train(toy, out, *flags):
    """A small run on the training clips of the toy world as a folder: without the table at the end."""
    small = ["--size", "nano", "--pred-dim", "32", "--pred-depth", "1", "--batch-size", "4", "--workers", "0"]
    where = ["--data", "folder", "--data-dir", str(toy / "train"), "--out", str(out), "--device", "cpu"]
    ajepa.main([*where, *small, "--recipe", "toy", "--log-every", "1", *map(str, flags)])


def test_learning_rate_tau_and_curriculum_follow_the_recipe_over_a_run(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "stats_clips", (4, 4, ""))
    monkeypatch.setattr(runs, "draw_curves", lambda *args: None)
    own = ["--masking", "curriculum", "--loss", "l2", "--pos", "sincos", "--seconds", 1]
    train(toy, tmp_path, "--steps", 8, *own)
    recipe = weights(tmp_path)["recipe"]
    rows = runs.read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    for step, row in enumerate(rows):
        half_cosine = (1 + math.cos(math.pi * step / 7)) / 2
        assert row["tau"] == pytest.approx(0.999 + (0.996 - 0.999) * half_cosine)
        half_cosine = (1 + math.cos(math.pi * (step - 2) / 5)) / 2
        rate = 5e-4 * (step + 1) / 2 if step < 2 else 5e-4 * half_cosine        # a fifth is warm-up
        assert row["lr"] == pytest.approx(rate, abs=1e-12)
        visible, _ = draw(0, (4, 7), recipe, step=step, steps=8)
        assert row["kept/a"] == pytest.approx(visible.mean())


def test_the_length_of_the_recipe_given_as_a_flag_changes_nothing():
    assert recipe_of("--seconds", "10") == recipe_of()
    assert ajepa.get_args(["--seconds", "3.84"])[1] == ajepa.get_args([])[1]


@pytest.mark.parametrize("flags", ["--size colossal", "--batch-size 100000", "--batch-size 5 --accumulate 2"])
def test_a_run_with_an_impossible_size_ends_before_any_clip_is_decoded(toy, tmp_path, monkeypatch, flags):
    monkeypatch.setattr("datasets.views.open_clip", lambda *args: pytest.fail("decoded"))
    with pytest.raises(UserError):
        train(toy, tmp_path / "run", "--steps", 2, *flags.split())
