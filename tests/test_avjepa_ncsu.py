"""AVJEPA (NC State): its views, its mel, its masks' law, its loss and its recipe."""
import functools
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import avjepa_ncsu
import common
import data
import pixels
import run
from avjepa_ncsu import MODALITIES, draw_masks
from common import UserError
from conftest import same, weights
from slow import layer_norm, linear, maps, mel_power, narrow, patch_tokens, random, shake
from slow import slow_distance, slow_levels, slow_sincos

PAPER_GRIDS = {"video": (8, 14, 14), "audio": (8, 12)}
GRIDS = {"video": (2, 4, 4), "audio": (3, 7)}           # of the small model
SMALL = dict(
    frames=4, stride=2, seconds=0.8, image=16, tubelet=(2, 4, 4), sample_rate=16000, n_fft=512, hop=160,
    n_mels=12, columns=28, stats_clips=4, mel_patch=(4, 4), audio_block=(2, 3), pred_dim=64, pred_depth=2)


def recipe_of(*flags):
    words = ["--data", "kinetics400", "--data-dir", "x", *flags]
    return avjepa_ncsu.get_args([str(word) for word in words])[1]


def small_model(modalities="av"):
    """(a small AVJEPA whose teacher has other weights than its student, the recipe)"""
    recipe = recipe_of("--recipe", "toy", "--size", "nano", "--modalities", modalities) | SMALL
    common.seed_step(0, 0)
    model = avjepa_ncsu.make_model(recipe, avjepa_ncsu.make_inputs(recipe))
    return shake(model).eval(), recipe


def clips_of(count, modalities="av"):
    """{modality: (B, ...)}"""
    shapes = {"video": (3, 4, 16, 16), "audio": (1, 12, 28)}
    return {m: random(count, *shapes[m], seed=len(m)) for m in MODALITIES[modalities]}


# ---- views: the sound spans what the pictures span -----------------------------------------------------

RATES = {"10": Fraction(10), "12.5": Fraction(25, 2), "25": Fraction(25), "29.97": Fraction(30000, 1001),
         "60": Fraction(60)}
COUNT = 100                                             # frames of a clip
LOW = 1000.0                                            # mel of its tone at the beginning ...
HIGH = 2600.0                                           # ... and at the end


def told(n):
    """Frame number n < 100 as a colour, which no crop and no flip changes: tens in the red, ones in the
    blue."""
    colour = np.array([25 + 22 * (n // 10), 120, 25 + 22 * (n % 10)], np.uint8)
    return np.broadcast_to(colour, (32, 40, 3))


def numbers(video):
    """The numbers on the frames of (3, T, H, W) uint8."""
    red, _, blue = video.float().mean((2, 3)).sub(25).div(22).round().int()
    return (10 * red + blue).tolist()


def rising(seconds, rate=44100):
    """A tone that rises evenly in mel from LOW to HIGH: its pitch tells the time."""
    mel = np.linspace(LOW, HIGH, round(seconds * rate))
    frequency = 700 * (10 ** (mel / 2595) - 1)
    return 0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / rate)


def heard(mel, seconds, length=10.0, columns=192):
    """(when the sound begins, the largest deviation of a column), in seconds, of the mel (1, F, T) of a view
    of a tone that rises for `length` seconds; columns: those in which it sounds."""
    power = 10 ** (mel[0].double().numpy() / 10)                                # (F, T)
    bins = np.arange(128)[:, None]
    centres = (bins + 1) / 129 * 2595 * np.log10(1 + 44100 / 2 / 700)           # of the filters, in mel
    power = power * (np.abs(bins - power.argmax(0)) <= 2)                       # the peak and its neighbours
    pitch = (power * centres).sum(0) / power.sum(0)
    frames = round(seconds * 44100) // 512 + 1                                  # before it is interpolated
    times = ((np.arange(192) + 0.5) * frames / 192 - 0.5) * 512 / 44100         # from the view's beginning
    begin = (pitch - LOW) / (HIGH - LOW) * length - times
    begin = begin[6:columns - 6]
    return np.median(begin), np.abs(begin - np.median(begin)).max()


@pytest.fixture(scope="module")
def rising_clips(tmp_path_factory):
    """{name: path}: a clip of COUNT told frames under a rising tone for each of RATES; one too short for a
    view; and of 10 seconds a slide show, one whose header says 1,000 frames a second, and the sound alone."""
    folder = tmp_path_factory.mktemp("rising")

    def write(name, fps, count, wave):
        frames = np.stack([told(n) for n in range(count)]) if count else None
        data.write_clip(folder / f"{name}.mp4", frames, wave, fps, 44100, 128_000)

    for name, fps in RATES.items():
        write(name, fps, COUNT, rising(float(COUNT / fps)))
    write("short", Fraction(25), 40, rising(4.0)[:round(1.6 * 44100)])
    write("slides", Fraction(1, 2), 5, rising(10.0))
    write("wrong", Fraction(1000), 50, rising(10.0))
    write("sound", None, 0, rising(10.0))
    return {path.stem: path for path in folder.glob("*.mp4")}


def view_inputs(*flags):
    """The paper's recipe and what data.py prepares by it, with small pictures."""
    recipe = recipe_of(*flags) | {"image": 16}
    return recipe, avjepa_ncsu.make_inputs(recipe)


def clips_at(path, *flags, plan=None):
    """data.Clips of one file."""
    recipe, inputs = view_inputs(*flags)
    modalities = MODALITIES[recipe["modalities"]]
    plan = plan or functools.partial(avjepa_ncsu.plan_views, seconds=recipe["seconds"], modalities=modalities)
    return data.Clips(data.make_listing("rising", path.parent, [path.name], None, []), inputs, plan)


def check_span(video, mel, fps):
    """The pictures are the third of each four of 64 frames, and the sound is that of these 64. Returns the
    first."""
    shown = numbers(video)
    begin, deviation = heard(mel, 64 / fps, COUNT / fps)
    assert shown == [shown[0] + 4 * i for i in range(16)]
    assert deviation * fps < 0.7                        # in frames
    assert shown[0] - 2.35 < begin * fps < shown[0] - 0.65
    return begin * fps


@pytest.mark.parametrize("name", RATES)
def test_a_view_is_every_fourth_frame_of_a_clip_and_the_sound_of_these_seconds_at_any_frame_rate(
        rising_clips, name):
    fps = float(RATES[name])
    clips = clips_at(rising_clips[name])
    starts = []
    for epoch in range(5):
        item = clips[epoch, 0]
        assert not item["short"] and not item["bad"]
        starts.append(check_span(item["video"][0], item["audio"][0], fps))
    # anywhere in the 100 frames; AAC adds up to .05 s to the clip
    assert min(starts) > -0.35 and max(starts) < 36.35 + 0.05 * fps and np.ptp(starts) > 12


@pytest.mark.parametrize("name", ["12.5", "60"])
def test_views_of_an_evaluation_and_a_clip_that_is_loaded_keep_the_same_rule(rising_clips, name):
    fps = float(RATES[name])
    _, inputs = view_inputs()
    item = clips_at(rising_clips[name], plan=functools.partial(data.even_views, 3, inputs))[0, 0]
    for first, video, mel in zip((0, 18, 36), item["video"], item["audio"]):
        assert first - 0.35 < check_span(video, mel, fps) < first + 0.35 + 0.05 * fps
    clip = data.load_clip(rising_clips[name], inputs)
    assert torch.equal(clip["audio"][0], item["audio"][1])
    assert torch.equal(clip["video"][0], data.normalize_video(item["video"][1]))
    later = data.load_clip(rising_clips[name], inputs, 0.25)                    # its start counts frames, too
    begin, _ = heard(later["audio"][0], 64 / fps, COUNT / fps)
    assert abs(begin * fps - 0.25 * 30) < 0.35


def test_a_clip_that_is_too_short_holds_its_last_frame_and_then_is_silent(rising_clips):
    item = clips_at(rising_clips["short"])[0, 0]        # 40 frames, of 64
    mel = item["audio"][0]
    columns = 192 * 40 // 64
    begin, deviation = heard(mel, 64 / 25, 4.0, columns)
    assert item["short"] and numbers(item["video"][0]) == [*range(2, 40, 4), *6 * [39]]
    assert abs(begin) * 25 < 0.35 and deviation * 25 < 0.7
    assert mel[..., columns + 8:].amax() < -79.99 and mel[..., :columns - 8].amax(1).min() > -20


@pytest.mark.parametrize("name, fps, flags", [
    ("sound", None, ["--modalities", "audio"]), ("slides", 0.5, []), ("wrong", 1000, []),
    ("10", 10, ["--seconds", "1.0"]), ("60", 60, ["--seconds", "1.5"])])
def test_views_go_by_the_clock_without_pictures_or_a_true_frame_rate_or_with_seconds(
        rising_clips, name, fps, flags):
    recipe, inputs = view_inputs(*flags)
    seconds = recipe["seconds"]
    item = clips_at(rising_clips[name], *flags)[1, 0]
    length = COUNT / fps if "--seconds" in flags else 10.0
    begin, deviation = heard(item["audio"][0], seconds, length)
    assert -0.02 <= begin < length - seconds + 0.05 and deviation < 0.05
    assert item["has_video"] == bool(fps)
    if "--seconds" in flags:
        assert recipe["stride"] is None and inputs.frame_rate is None
        assert (inputs.frames, inputs.mel_frames) == (16, 192)
    if fps:
        middles = begin + (np.arange(16) + 0.5) * seconds / 16
        last = {"slides": 4, "wrong": 49}.get(name, 99)
        expected = np.clip(middles * fps, 0, last).astype(int)
        assert np.abs(numbers(item["video"][0]) - expected).max() <= 1 + 0.02 * min(fps, 60)


# ---- the mel -------------------------------------------------------------------------------------------

def noisy(seconds, seed=1):
    """Noise whose loudness falls by 100 dB, and a tone in its first half."""
    t = np.arange(round(seconds * 44100)) / 44100
    noise = np.random.default_rng(seed).normal(0, 0.1, len(t)) * 10 ** (-5 * t / seconds)
    tone = 0.01 * np.sin(2 * np.pi * 500 * t) * (t < seconds / 2)
    return (noise + tone).astype(np.float32)


def below_the_loudest(wave, inputs):
    """(F, columns): decibel of power below the loudest, not under -80, interpolated."""
    power = np.maximum(mel_power(wave, inputs), 1e-10)
    decibel = torch.from_numpy(np.maximum(10 * np.log10(power / power.max()), -80))
    shape = len(decibel), inputs.columns
    return F.interpolate(decibel[None, None], shape, mode="bilinear", antialias=True)[0, 0].numpy()


@pytest.mark.parametrize("seconds", [64 / 60, 64 / 30, 6.4])
def test_the_mel_is_decibel_of_power_below_the_clips_loudest_interpolated_to_192_columns(seconds):
    _, inputs = view_inputs()
    waves = np.stack([noisy(seconds), 0.1 * noisy(seconds, seed=2)])            # each has its own loudest
    mel = data.LogMel(inputs)(torch.from_numpy(waves))
    assert mel.shape == (2, 1, 128, 192) and inputs.mel_frames == 192
    for one, wave in zip(mel, waves):
        assert np.abs(one[0].numpy() - below_the_loudest(wave, inputs)).max() < 0.05
    quieter = data.LogMel(inputs)(torch.from_numpy(0.125 * waves[0]))
    torch.testing.assert_close(quieter, mel[0], atol=1e-3, rtol=0)
    native = data.LogMel(replace(inputs, columns=None))(torch.from_numpy(waves[0]))
    assert native.shape[-1] == waves.shape[1] // 512 + 1 and (native.max(), native.min()) == (0, -80)
    silence = torch.zeros(round(inputs.seconds * inputs.sample_rate))
    assert (data.LogMel(inputs)(silence) == -80).all()


def test_a_mel_that_has_the_columns_already_is_left_as_it_is_and_mean_and_std_come_last():
    _, inputs = view_inputs()
    wave = torch.from_numpy(noisy((191 * 512 + 100) / 44100))
    plain = data.LogMel(replace(inputs, columns=None))(wave)
    assert plain.shape[-1] == 192 and torch.equal(data.LogMel(inputs)(wave), plain)
    mean = torch.linspace(-40, 0, 128)
    std = torch.linspace(1, 20, 128)
    normed = data.LogMel(replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist())))(wave)
    torch.testing.assert_close(normed, (plain - mean[:, None]) / std[:, None], atol=1e-4, rtol=1e-5)


def test_the_statistics_are_the_mean_and_std_of_each_bin_over_the_middles_of_the_clips(rising_clips):
    _, inputs = view_inputs()
    names = ("10", "60")
    folder = rising_clips["10"].parent
    listing = data.make_listing("rising", folder, [f"{name}.mp4" for name in names], None, [])
    mean, std = data.mel_stats(listing, inputs, 0, 2)
    mels = [data.load_clip(rising_clips[name], inputs)["audio"][0, 0].double() for name in names]
    mels = torch.cat(mels, 1)                                                   # (F, 2 x 192)
    torch.testing.assert_close(mean, mels.mean(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, mels.std(1, correction=0), atol=1e-2, rtol=0)


def test_a_view_of_another_length_has_as_many_columns_a_second_up_to_whole_patches():
    _, inputs = view_inputs()
    other = inputs.at(10.0, 16)                         # 90 a second: 900; and by the clock
    assert (other.columns, other.frame_rate, other.seconds) == (912, None, 10.0)
    assert inputs.at(inputs.seconds, 16) == inputs


# ---- masks ---------------------------------------------------------------------------------------------

def test_a_video_is_hidden_in_tubes():
    for step in range(20):
        for mask_set in draw_masks(0, step, 0, 4, PAPER_GRIDS, recipe_of()):
            hidden = maps(mask_set["v"][1], {"video": PAPER_GRIDS["video"]})["video"]
            assert (hidden == hidden[:, :1]).all()


def test_hidden_are_8_video_blocks_of_15_percent_and_2_of_70_of_one_size_a_step_and_as_many_4_x_6_of_sound(
        monkeypatch):
    calls = []
    real = avjepa_ncsu.draw_set

    def spy(key, rank, batch, grid, number, size):
        calls.append((tuple(grid), number, size))
        return real(key, rank, batch, grid, number, size)

    monkeypatch.setattr(avjepa_ncsu, "draw_set", spy)
    for step in range(80):
        draw_masks(2, step, 0, 2, PAPER_GRIDS, recipe_of())
    assert len(calls) == 80 * 4                         # one size for all clips
    sound = calls[1::2]
    assert sound == 80 * [((8, 12), 8, (4, 6)), ((8, 12), 2, (4, 6))]
    for first, (number, share) in enumerate(((8, 0.15), (2, 0.7))):
        chosen = calls[2 * first::4]
        assert {call[:2] for call in chosen} == {((14, 14), number)}
        sizes = [size for _, _, size in chosen]
        height, width = np.array(sizes).T
        area = share * 14 * 14
        assert (np.abs(height * width - area) <= height / 2).all()              # the width is rounded last
        assert (0.75 * area <= (height + 0.5) ** 2).all()                       # height over width .75 ...
        assert ((1.5 * area >= (height - 0.5) ** 2) | (width == 14)).all()      # ... to 1.5
        assert len(set(sizes)) > 2                      # drawn in each step anew


def placements(grid, size):
    """Each place of a block: (places, rows, columns) bool."""
    out = np.zeros((grid[0] - size[0] + 1, grid[1] - size[1] + 1, *grid), bool)
    for top, left in np.ndindex(out.shape[:2]):
        out[top, left, top:top + size[0], left:left + size[1]] = True
    return out.reshape(-1, *grid)


BLOCKS = [((8, 12), 8, (4, 6)), ((8, 12), 2, (4, 6)), ((14, 14), 8, (5, 6)), ((14, 14), 2, (12, 11))]


@pytest.mark.parametrize("grid, number, size", BLOCKS)
def test_a_patch_is_hidden_as_often_as_that_many_blocks_at_places_of_equal_chance_hide_it(grid, number, size):
    """With probability 1 - (1 - p)^number, p the share of the places of a block that cover it."""
    expected = 1 - (1 - placements(grid, size).mean(0)) ** number
    draws = [avjepa_ncsu.draw_set((3, step, 1, 0), 0, 2, grid, number, size) for step in range(500)]
    hidden = np.stack(draws).reshape(-1, 2, *grid)      # both clips of a step hide as much
    share = hidden[:, 0].mean((1, 2))
    assert share.mean() == pytest.approx(expected.mean(), abs=4.5 * share.std() / math.sqrt(500))
    often = hidden.mean((0, 1))                         # single patches and the choice of five level it
    np.testing.assert_allclose(often, expected, atol=0.1)
    assert np.corrcoef(often.flat, expected.flat)[0, 1] > 0.98


@pytest.mark.parametrize("grid, number, size", BLOCKS)
def test_what_is_hidden_is_a_union_of_whole_blocks_but_for_a_few_single_patches(
        grid, number, size, monkeypatch):
    unions = []
    meet_count = common.meet_count

    def spy(rng, mask, count):
        unions.append(mask.copy())
        return meet_count(rng, mask, count)

    monkeypatch.setattr(common, "meet_count", spy)
    draws = [avjepa_ncsu.draw_set((3, step, 1, 0), 0, 4, grid, number, size) for step in range(40)]
    hidden = np.concatenate(draws).reshape(-1, *grid)
    blocks = placements(grid, size)
    for union in unions:
        inside = blocks[(blocks <= union).all((1, 2))]
        assert (inside.any(0) == union).all() and union.sum() <= number * math.prod(size)
        if number == 2:
            pairs = inside[:, None] | inside                                    # (places, places, *grid)
            assert (pairs == union).all((2, 3)).any()
    assert (hidden != np.stack(unions)).mean() < 0.05


def test_blocks_that_cover_the_whole_grid_leave_one_patch_visible():
    hidden = avjepa_ncsu.draw_set((0, 0, 1, 0), 0, 5, (4, 3), 2, (4, 3))
    assert (hidden.sum(1) == 11).all()


def test_masks_are_the_same_with_and_without_the_other_modality():
    for step in range(5):
        both = draw_masks(1, step, 0, 3, PAPER_GRIDS, recipe_of())
        for m, grid in PAPER_GRIDS.items():
            alone = draw_masks(1, step, 0, 3, {m: grid}, recipe_of("--modalities", m))
            assert same(alone, [{m[0]: mask_set[m[0]]} for mask_set in both])


def test_one_mask_set_for_a_batch_is_the_same_for_all_its_clips_and_all_ranks_and_another_in_each_step():
    recipe = recipe_of("--mask-per", "batch")
    seen = set()
    for step in range(4):
        first = draw_masks(0, step, 0, 4, PAPER_GRIDS, recipe)
        other = draw_masks(0, step, 3, 2, PAPER_GRIDS, recipe)
        for s, name in itertools.product((0, 1), "va"):
            target = first[s][name][1]                                          # (4, M)
            assert torch.equal(target, target[:1].expand(4, -1))
            assert torch.equal(target[:2], other[s][name][1])
            seen.add((s, name, tuple(target[0].tolist())))
    assert recipe["mask_per"] == "batch" and recipe_of()["mask_per"] == "clip"
    assert len(seen) == 4 * 2 * 2


# ---- model and loss ------------------------------------------------------------------------------------

def places_of(mask_set, b):
    """Of one clip: {input: (context (C,), target (M,))}"""
    return {name: (context[b], target[b]) for name, (context, target) in mask_set.items()}


def slow_see(vit, clip, places):
    """One clip's context, {input: (C, D)}: of all its tokens only the visible ones run, the video's first."""
    tokens = patch_tokens(vit, clip)
    visible = []
    for name, (context, _) in places.items():
        before = math.prod(GRIDS["video"]) if name == "a" and "v" in places else 0
        visible += [tokens[before + place] for place in context.tolist()]
    h, = slow_levels(vit, torch.stack(visible))
    sizes = [len(context) for context, _ in places.values()]
    return dict(zip(places, h.split(sizes)))


def slow_predictor(g, h, places, s):
    """One clip's context {input: (C, D)} -> {input: predictions (M, D)}, token by token."""
    visible = []
    hidden = []
    for name, (context, target) in places.items():
        e = slow_sincos(GRIDS["video" if name == "v" else "audio"], 64)
        for place, token in zip(context.tolist(), h[name]):
            visible.append(linear(g.embed[name], token) + e[place])
        for place in target.tolist():
            hidden.append(g.mask_tokens[name][s] + e[place])
    sizes = [len(target) for _, target in places.values()]
    return dict(zip(places, narrow(g, visible, hidden).split(sizes)))


@torch.no_grad()
def slow_step(model, clips, masks, weight):
    """What a first step shows, by loops over clips, mask sets and tokens, from the paper's description."""
    count = len(next(iter(clips.values())))
    sizes = [math.prod(GRIDS[m]) for m in clips]
    each = []
    shown = {}
    targets = {}
    for b in range(count):                              # the teacher is given everything
        each.append({m: x[b] for m, x in clips.items()})
        z, = slow_levels(model.target_encoder, patch_tokens(model.target_encoder, each[b]))
        for m, y in zip(clips, layer_norm(z, eps=1e-5).split(sizes)):
            targets[m[0], b] = y
    for m in clips:
        name = m[0]
        mean = sum(weight[name][b] * targets[name, b].mean(0) for b in range(count)) / weight[name].sum()
        loss = nothing = 0.0
        for b, s in itertools.product(range(count), range(len(masks))):
            places = places_of(masks[s], b)
            h = slow_see(model.context_encoder, each[b], places)
            prediction = slow_predictor(model.predictor, h, places, s)[name]
            truth = targets[name, b][places[name][1]]
            share = weight[name][b].item() / len(masks)
            loss += share * slow_distance(prediction, truth)
            nothing += share * slow_distance(mean.expand_as(truth), truth)
        shown[f"loss/{name}"] = loss
        shown[f"know_nothing/{name}"] = nothing
        contexts = [slow_see(model.context_encoder, each[b], places_of(masks[0], b)) for b in range(count)]
        shown[f"embedding/{name}"] = torch.stack([h[name].mean(0) for h in contexts])
    return shown


@pytest.mark.parametrize("modalities", MODALITIES)
def test_the_loss_of_a_batch_is_what_loops_over_its_clips_sets_and_tokens_compute(modalities):
    model, recipe = small_model(modalities)
    clips = clips_of(3, modalities)
    masks = draw_masks(5, 0, 0, 3, model.grids, recipe)
    weight = {"v": torch.tensor([0.2, 0.3, 0.4]), "a": torch.tensor([0.5, 0.0, 0.25])}      # one has no sound
    loss, shown = model(clips, masks, weight, 0)
    expected = slow_step(model, clips, masks, weight)
    assert shown.keys() == expected.keys() and not any(x.requires_grad for x in shown.values())
    for name, value in expected.items():
        torch.testing.assert_close(shown[name], torch.as_tensor(value).float(), atol=1e-5, rtol=1e-4)
    total = sum(value for name, value in expected.items() if name.startswith("loss/"))
    assert loss.requires_grad and loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("m, other", [("audio", "v"), ("video", "a")])
def test_all_that_is_visible_of_one_modality_and_nothing_hidden_tells_what_is_predicted_of_the_other(
        m, other):
    model, recipe = small_model()
    mask_set = draw_masks(5, 0, 0, 2, model.grids, recipe)[0]
    clips = clips_of(2)
    clips[m].requires_grad_()
    h = model.see(model.context_encoder.embed(**clips), mask_set)
    model.predictor(h, mask_set, 0)[other].square().sum().backward()
    gradient = pixels.patchify(clips[m].grad, model.context_encoder.patch[m])   # (B, N, P)
    _, target = mask_set[m[0]]
    visible = torch.ones(gradient.shape[:2], dtype=torch.bool).scatter(1, target, False)
    assert torch.equal(gradient.abs().sum(2) > 0, visible)


def test_to_exchange_two_hidden_tokens_exchanges_their_predictions_which_differ():
    model, recipe = small_model()
    mask_set = draw_masks(5, 0, 0, 2, model.grids, recipe)[0]
    h = random(2, sum(context.shape[1] for context, _ in mask_set.values()), 64)
    before = model.predictor(h, mask_set, 1)
    for name, (context, target) in mask_set.items():
        after = model.predictor(h, mask_set | {name: (context, target.flip(1))}, 1)
        expected = before | {name: before[name].flip(1)}
        for key, x in expected.items():
            torch.testing.assert_close(after[key], x, atol=1e-5, rtol=1e-4)
        assert min(torch.pdist(x).min() for x in before[name]) > 1e-3


@pytest.mark.parametrize("m, other", [("video", "audio"), ("audio", "video")])
def test_the_model_of_one_modality_is_the_joint_one_without_the_other(m, other):
    alone, recipe = small_model(m)
    both, _ = small_model()
    left = {}
    for name, x in both.state_dict().items():
        if not {other, other[0], "modality"} & set(name.split(".")):
            left[name] = x.shape
    assert {name: x.shape for name, x in alone.state_dict().items()} == left
    assert list(alone.inputs) == [m[0]] and alone.context_encoder.modality is None
    inputs = avjepa_ncsu.make_inputs(recipe)
    assert (inputs.frames, inputs.n_mels) == ((4, 0) if m == "video" else (0, 12))


# ---- recipe --------------------------------------------------------------------------------------------

def test_the_paper_recipe_is_the_table_of_the_papers_page():
    recipe = recipe_of()
    expected = dict(
        size="base", frames=16, stride=4, image=224, crop_scale=(0.3, 1.0),
        tubelet=(2, 16, 16), mel_patch=(16, 16), n_fft=2048, hop=512, n_mels=128, columns=192,
        video_blocks=((8, 0.15), (2, 0.7)), audio_block=(4, 6), pred_depth=12, pred_dim=384,
        tau=(0.998, 1.0), clips=30_000, batch_size=24, steps=2000, schedule=112_500,
        lr_start=2e-4, lr=6.25e-4, lr_end=1e-6, warmup=12_000, weight_decay=(0.04, 0.4), clip=10.0,
        modalities="av", mask_per="clip")
    assert {name: recipe[name] for name in expected} == expected
    inputs = avjepa_ncsu.make_inputs(recipe)
    assert (inputs.frames, inputs.size) == (16, 224)
    assert (inputs.window, inputs.win_length, inputs.log) == ("hann", 2048, "db_max")
    assert inputs.frame_rate * inputs.seconds == pytest.approx(64)
    assert inputs.mel_frames == 192 and inputs.video_seconds is None


@pytest.mark.parametrize("flags, factor", [
    ([], 1), (["--size", "tiny"], 1), (["--size", "small"], 0.1), (["--lr", 1.25e-3], 2), (["--lr", 0], 0),
    (["--size", "small", "--lr", 6.25e-4], 1)])
def test_the_three_learning_rates_are_a_tenth_for_vit_small_and_scale_with_the_one_that_is_asked_for(
        flags, factor):
    recipe = recipe_of(*flags)
    rates = [recipe[name] for name in ("lr_start", "lr", "lr_end")]
    assert rates == pytest.approx([factor * rate for rate in (2e-4, 6.25e-4, 1e-6)], rel=1e-12)


@pytest.mark.parametrize("size, dim, heads, total", [
    ("tiny", 192, 3, 5.7e6), ("small", 384, 6, 21.5e6), ("base", 768, 12, 86e6)])
def test_the_paper_builds_a_vit_over_1568_and_96_tokens_and_a_narrow_predictor(size, dim, heads, total):
    recipe = recipe_of("--size", size)
    with torch.device("meta"):
        model = avjepa_ncsu.make_model(recipe, avjepa_ncsu.make_inputs(recipe))
        vit = model.context_encoder
        tokens = vit.embed(torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 192))
    assert model.grids == PAPER_GRIDS and tokens.shape == (1, 1568 + 96, dim) and vit.cls is None
    count = {}
    for name, part in model.named_children():
        count[name] = sum(p.numel() for p in part.parameters())
    assert count["context_encoder"] == count["target_encoder"] == pytest.approx(total, rel=0.03)
    # 12 blocks, two projections, two mask tokens for each modality, norm, head
    block = 12 * 384 ** 2 + 13 * 384
    around = 2 * (dim + 1) * 384 + 2 * 2 * 384 + 2 * 384 + (384 + 1) * dim
    assert count["predictor"] == 12 * block + around and count["means"] == 0
    for part, number in ((vit, heads), (model.predictor, 12)):
        assert len(part.blocks) == 12 and {block.heads for block in part.blocks} == {number}


def test_a_set_that_lacks_a_modality_is_refused_unless_the_other_is_asked_for():
    sentences = {"video": "has no pictures; give --modalities audio, or use ajepa.py",
                 "audio": "has no sound; give --modalities video"}
    for name, modalities in itertools.product(data.SETS, MODALITIES):
        lacking = [m for m in MODALITIES[modalities] if m not in data.SETS[name].has]
        words = ["--data", name, "--data-dir", "x", "--modalities", modalities]
        if not lacking:
            _, recipe = avjepa_ncsu.get_args(words)
            assert recipe["modalities"] == modalities
            continue
        with pytest.raises(UserError) as error:
            avjepa_ncsu.get_args(words)
        assert str(error.value) == f"--data {name} {sentences[lacking[0]]}"


# ---- runs ----------------------------------------------------------------------------------------------

@pytest.fixture
def little(monkeypatch):
    """The geometry of the small model in both columns of the recipe, and no statistics of the mel."""
    for name, value in SMALL.items():
        monkeypatch.setitem(avjepa_ncsu.RECIPE, name, (value, value, ""))
    monkeypatch.setattr(data, "mel_stats", lambda *args: (torch.zeros(12), torch.ones(12)))


def flags(toy, out, *more):
    words = "--data folder --size nano --batch-size 4 --log-every 1 --workers 0 --device cpu"
    return [*words.split(), "--data-dir", str(toy / "train"), "--out", str(out), *map(str, more)]


def test_at_each_step_of_the_papers_schedule_rate_momentum_decay_and_clipping_are_those_of_its_formulas(
        toy, little, tmp_path, monkeypatch):
    """Single steps of a run of 90,000 under a schedule of 112,500, with large gradients."""
    groups = []
    norms = []
    real = torch.optim.AdamW.step
    loss = avjepa_ncsu.prediction_loss

    def spy(optimizer):
        groups.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return real(optimizer)

    def half_a_cosine(step, steps, start, end):
        return end + (start - end) * (1 + math.cos(math.pi * step / (steps - 1))) / 2

    steps = (0, 2000, 11_999, 12_000, 60_000, 89_998)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(run.Run, "steps", lambda self: iter(steps))
    monkeypatch.setattr(avjepa_ncsu, "prediction_loss", lambda *args: 1e4 * loss(*args))
    avjepa_ncsu.main(flags(toy, tmp_path, "--steps", 90_000))
    rows = run.read_log(tmp_path)
    assert [row["step"] for row in rows] == list(steps)
    for row, ((lr, decay), (other, none)), norm in zip(rows, groups, norms):
        step = row["step"]
        rate = half_a_cosine(step - 12_000, 100_500, 6.25e-4, 1e-6)
        if step < 12_000:
            rate = 2e-4 + 4.25e-4 * (step + 1) / 12_000
        assert lr == other == row["lr"] == pytest.approx(rate, rel=1e-9)
        assert decay == pytest.approx(half_a_cosine(step, 112_500, 0.04, 0.4), rel=1e-9) and none == 0
        assert row["tau"] == pytest.approx(0.998 + 0.002 * step / 112_500, abs=1e-12)
        assert row["grad_norm"] > 1000                  # clipped after the warm-up alone
        assert norm == pytest.approx(10 if step >= 12_000 else row["grad_norm"], rel=1e-3)


def test_runs_with_and_without_the_other_modality_see_the_same_clips_under_the_same_masks(
        toy, little, tmp_path, monkeypatch):
    found = {}
    forward = avjepa_ncsu.AVJEPA.forward

    def spy(model, batch, masks, weight, tick):
        found[modalities].append((batch, masks))
        return forward(model, batch, masks, weight, tick)

    monkeypatch.setattr(avjepa_ncsu.AVJEPA, "forward", spy)
    for modalities in MODALITIES:
        found[modalities] = []
        out = tmp_path / modalities
        avjepa_ncsu.main(flags(toy, out, "--recipe", "toy", "--steps", 2, "--modalities", modalities))
        names = {m[0] for m in MODALITIES[modalities]}
        for row in run.read_log(out):
            terms = {column.split("/")[1] for column in row if "/" in column}
            assert terms == names and row["loss"] == pytest.approx(sum(row[f"loss/{name}"] for name in names))
        assert set(weights(out)["encoder"]) & {"video", "audio"} == set(MODALITIES[modalities])
        encoder = common.load_encoder(out)
        assert set(data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)) == set(MODALITIES[modalities])
    for m in ("video", "audio"):
        for (batch, masks), (both, joint) in zip(found[m], found["av"], strict=True):
            assert torch.equal(batch["index"], both["index"]) and torch.equal(batch[m], both[m])
            assert same(masks, [{m[0]: mask_set[m[0]]} for mask_set in joint])
            assert {"video", "audio"} & set(batch) == {m}


def test_clips_are_that_many_of_the_set_always_the_same_and_with_0_all(toy, tmp_path):
    def files(count, seed=0):
        words = flags(toy, tmp_path, "--steps", 1, "--clips", count, "--seed", seed)
        args, recipe = avjepa_ncsu.get_args(words)
        begun = run.Run(avjepa_ncsu.METHOD, args, recipe, recipe["clips"])
        assert ("of which" in begun.described) == (0 < count < 24)
        return [begun.listing.path(i) for i in range(len(begun.listing))]

    every = files(0)
    ten = files(10)
    assert len(every) == 24 and every == files(24) == files(1000)
    assert len(ten) == 10 and ten == sorted(ten) == files(10, seed=1) and ten != every[:10]
    assert set(ten) < set(files(20)) < set(every)
    assert recipe_of()["clips"] == 30_000
