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
import run
import slow
from avjepa_ncsu import MODALITIES, draw_masks
from slow import mel_power, placements, quicken, single_steps

recipe_of = functools.partial(slow.recipe_of, avjepa_ncsu)

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


def heard(mel, seconds, length=10.0):
    """(when the sound begins, the largest deviation of a column), in seconds, of the mel (1, F, T) of a view
    of a tone that rises for `length` seconds."""
    power = 10 ** (mel[0].double().numpy() / 10)                                # (F, T)
    bins = np.arange(128)[:, None]
    centres = (bins + 1) / 129 * 2595 * np.log10(1 + 44100 / 2 / 700)           # of the filters, in mel
    power = power * (np.abs(bins - power.argmax(0)) <= 2)                       # the peak and its neighbours
    pitch = (power * centres).sum(0) / power.sum(0)
    frames = round(seconds * 44100) // 512 + 1                                  # before it is interpolated
    times = ((np.arange(192) + 0.5) * frames / 192 - 0.5) * 512 / 44100         # from the view's beginning
    begin = (pitch - LOW) / (HIGH - LOW) * length - times
    begin = begin[6:-6]
    return np.median(begin), np.abs(begin - np.median(begin)).max()


@pytest.fixture(scope="module")
def rising_clips(tmp_path_factory):
    """{name: path}: a clip of COUNT told frames under a rising tone for each of RATES; and of 10
    seconds a slide show, one whose header says 1,000 frames a second, and the sound alone."""
    folder = tmp_path_factory.mktemp("rising")

    def write(name, fps, count, wave):
        frames = np.stack([told(n) for n in range(count)]) if count else None
        data.write_clip(folder / f"{name}.mp4", frames, wave, fps, 44100, 128_000)

    for name, fps in RATES.items():
        write(name, fps, COUNT, rising(float(COUNT / fps)))
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
    plain = data.LogMel(replace(inputs, columns=None))
    native = plain(torch.from_numpy(waves[0]))
    assert native.shape[-1] == waves.shape[1] // 512 + 1 and (native.max(), native.min()) == (0, -80)
    one_to_one = torch.from_numpy(noisy((191 * 512 + 100) / 44100))             # has the columns already
    assert torch.equal(data.LogMel(inputs)(one_to_one), plain(one_to_one))
    silence = torch.zeros(round(inputs.seconds * inputs.sample_rate))
    assert (data.LogMel(inputs)(silence) == -80).all()


def test_a_view_of_another_length_has_as_many_columns_a_second_up_to_whole_patches():
    _, inputs = view_inputs()
    other = inputs.at(10.0, 16)                         # 90 a second: 900; and by the clock
    assert (other.columns, other.frame_rate, other.seconds) == (912, None, 10.0)
    assert inputs.at(inputs.seconds, 16) == inputs


# ---- masks ---------------------------------------------------------------------------------------------

BLOCKS = [((8, 12), 8, (4, 6)), ((8, 12), 2, (4, 6)), ((14, 14), 8, (5, 6)), ((14, 14), 2, (12, 11))]


@pytest.mark.parametrize("grid, number, size", BLOCKS)
def test_a_patch_is_hidden_as_often_as_that_many_blocks_at_places_of_equal_chance_hide_it(grid, number, size):
    """With probability 1 - (1 - p)^number, p the share of the places of a block that cover it."""
    expected = 1 - (1 - placements(grid, size).mean(0)) ** number
    draws = [avjepa_ncsu.draw_set((3, step, 1, 0), range(2), grid, number, size) for step in range(500)]
    hidden = np.stack(draws).reshape(-1, 2, *grid)      # both clips of a step hide as much
    share = hidden[:, 0].mean((1, 2))
    assert share.mean() == pytest.approx(expected.mean(), abs=4.5 * share.std() / math.sqrt(500))
    often = hidden.mean((0, 1))                         # single patches and the choice of five level it
    np.testing.assert_allclose(often, expected, atol=0.1)
    assert np.corrcoef(often.flat, expected.flat)[0, 1] > 0.98


GRIDS = {"video": (8, 14, 14), "audio": (8, 12)}


def test_one_mask_set_for_a_batch_is_the_same_for_all_its_clips_and_all_ranks_and_another_in_each_step():
    recipe = recipe_of("--mask-per", "batch")
    seen = set()
    for step in range(4):
        first = draw_masks(0, step, range(4), GRIDS, recipe)
        other = draw_masks(0, step, [3, 7], GRIDS, recipe)
        for s, name in itertools.product((0, 1), "va"):
            target = first[s][name][1]                                          # (4, M)
            assert torch.equal(target, target[:1].expand(4, -1))
            assert torch.equal(target[:2], other[s][name][1])
            seen.add((s, name, tuple(target[0].tolist())))
    assert len(seen) == 4 * 2 * 2


# ---- recipe --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, factor", [
    ([], 1), (["--size", "tiny"], 1), (["--size", "small"], 0.1), (["--lr", 1.25e-3], 2), (["--lr", 0], 0),
    (["--size", "small", "--lr", 6.25e-4], 1)])
def test_the_three_learning_rates_are_a_tenth_for_vit_small_and_scale_with_the_one_that_is_asked_for(
        flags, factor):
    recipe = recipe_of(*flags)
    rates = [recipe[name] for name in ("lr_start", "lr", "lr_end")]
    assert rates == pytest.approx([factor * rate for rate in (2e-4, 6.25e-4, 1e-6)], rel=1e-12)


# ---- runs ----------------------------------------------------------------------------------------------

def test_at_each_step_of_the_papers_schedule_rate_momentum_decay_and_clipping_are_those_of_its_formulas(
        toy, tmp_path, monkeypatch):
    """Single steps of a run of 90,000 under a schedule of 112,500."""
    quicken(monkeypatch, avjepa_ncsu)
    for name in ("tau", "schedule", "lr_start", "lr", "lr_end", "warmup", "weight_decay", "clip"):
        paper = avjepa_ncsu.RECIPE[name][0]
        monkeypatch.setitem(avjepa_ncsu.RECIPE, name, (paper, paper, ""))
    steps = (0, 2000, 11_999, 12_000, 60_000, 89_998)
    found = single_steps(
        monkeypatch, avjepa_ncsu, "prediction_loss", steps, toy, tmp_path, "--steps", 90_000)
    for row, (lr, decay), (other, none), norm in found:
        step = row["step"]
        falling = 1e-6 + 6.24e-4 * (1 + math.cos(math.pi * (step - 12_000) / 100_499)) / 2
        rate = 2e-4 + 4.25e-4 * (step + 1) / 12_000 if step < 12_000 else falling
        assert lr == other == row["lr"] == pytest.approx(rate, rel=1e-9)
        assert decay == pytest.approx(common.cosine(step, 112_500, 0.04, 0.4), rel=1e-9) and none == 0
        assert row["tau"] == pytest.approx(0.998 + 0.002 * step / 112_500, abs=1e-12)
        assert row["grad_norm"] > 1000                  # clipped after the warm-up alone
        assert norm == pytest.approx(10 if step >= 12_000 else row["grad_norm"], rel=1e-3)


def test_clips_are_that_many_of_the_set_always_the_same_and_with_0_all(toy, tmp_path):
    def files(count, seed=0):
        words = f"--data folder --data-dir {toy}/train --out {tmp_path} --device cpu --workers 0 --steps 1"
        words = f"{words} --batch-size 4 --clips {count} --seed {seed}"
        args, recipe = avjepa_ncsu.get_args(words.split())
        begun = run.Run(avjepa_ncsu.METHOD, args, recipe, recipe["clips"])
        assert ("of which" in begun.described) == (0 < count < 24)
        return [begun.listing.path(i) for i in range(len(begun.listing))]

    every = files(0)
    ten = files(10)
    assert len(every) == 24 and every == files(24) == files(1000)
    assert len(ten) == 10 and ten == sorted(ten) == files(10, seed=1) and ten != every[:10]
    assert set(ten) < set(files(20)) < set(every)
