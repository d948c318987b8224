"""datasets/augment.py: what of a training view is changed, and of no other."""
import itertools
from dataclasses import replace

import ajepa
import avjepa_lejepa
import avjepa_ncsu
import data
import mjepa
import probe
from conftest import fails, same, tone, weights
from data import Augment, Inputs, View
from datasets import augment
from slow import is_uniform, quicken, random, record, train

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import rgb_to_grayscale

SMALL = Inputs(seconds=1.0, frames=4, size=32, resize=36, n_mels=16)
ALL = Augment(jitter=0.4, hue=0.1, grey=0.2, blur=0.5, gain=6.0, filter=12.0, noise=10.0)
RATE = 16000


def views_twice(rng, duration):
    """Two views of both, of the same window and crop; one of sound; one of pictures."""
    start = rng.uniform(0, max(0.0, duration - 1.0))
    kinds = (("center", True), ("center", True), (None, True), ("random", False))
    return [View(start, 1.0, *kind) for kind in kinds]


@pytest.fixture(scope="module")
def listing(clips):
    files = ["good.mp4", "silent.mp4", "fast.mp4", "sound.wav"]
    return data.make_listing("some", clips, files, None, [])


def times(count, change, *args):
    """So many draws of a change."""
    return [change(*args) for _ in range(count)]


# ---- Pictures ------------------------------------------------------------------------------------------

def palette_video():
    """(3, 6, 16, 16) uint8 of eight colours, and which a pixel has (6, 16, 16). One frame is white."""
    which = (8 * random(6, 16, 16).sigmoid()).long()
    which[3] = 0
    colours = (256 * random(8, 3, seed=1).sigmoid()).to(torch.uint8)
    colours[0] = 255
    return colours[which].permute(3, 0, 1, 2), which


def test_a_colour_becomes_the_same_colour_in_all_frames_of_a_view_and_another_one_in_another_view():
    video, which = palette_video()
    seen = set()
    for changed in times(20, Augment(jitter=0.8, hue=0.5, grey=0.2).video, video):
        assert changed.shape == video.shape and changed.dtype == torch.uint8
        for colour in range(8):
            assert len(changed[:, which == colour].unique(dim=1).T) == 1
        seen.add(tuple(changed[:, which == 1][:, 0].tolist()))
    assert len(seen) > 10


@pytest.mark.parametrize("name", data.CHANGES)
def test_each_change_alone_changes_its_own_modality_and_leaves_the_other(name, toy):
    listing = data.list_clips("toy", toy)
    value = 1.0 if name == "noise" else data.CHANGES[name][1]
    inputs = replace(SMALL, size=112, resize=112)       # where a blur is wide enough to be seen
    plain = data.Clips(listing, inputs, views_twice)
    changed = data.Clips(listing, inputs, views_twice, augment=Augment(**{name: value}))
    own = data.CHANGES[name][0]
    other = {"video": "audio", "audio": "video"}[own]
    moved = 0
    for epoch in range(6):
        before = plain[epoch, 0]
        after = changed[epoch, 0]
        assert same(before[other], after[other])
        moved += not same(before[own], after[own])
    assert moved > 0


def test_colours_are_changed_in_eight_of_ten_views():
    video, _ = palette_video()
    changed = [not torch.equal(x, video) for x in times(400, Augment(jitter=0.8, hue=0.5).video, video)]
    assert 290 <= sum(changed) <= 350                  # 320 +- 8


def test_the_filter_of_a_telephones_8_khz_stays_finite():
    wave = random(8000) * 0.1
    for heard in times(20, Augment(filter=6.0).audio, wave, 8000):
        assert heard.isfinite().all() and heard.abs().max() < 10


@pytest.mark.parametrize("size", [224, 112])
def test_views_are_blurred_as_often_as_asked_for_all_frames_alike_as_wide_as_dinos_for_their_size(
        size, monkeypatch):
    """Sigma is drawn evenly from .1 to 2 of 224 pixels."""
    drawn = record(monkeypatch, augment.transforms.GaussianBlur, "make_params")
    video = (256 * random(3, 1, 8, size).sigmoid()).to(torch.uint8).expand(-1, 4, -1, -1)
    seen = 0
    for blurred in times(200, Augment(blur=0.3).video, video):
        assert torch.equal(blurred, blurred[:, :1].expand_as(blurred))
        seen += not torch.equal(blurred, video)
    sigmas = [params["sigma"][0] for _, params in drawn]
    assert 40 <= len(sigmas) <= 80 and len(sigmas) / 2 < seen <= len(sigmas)
    assert is_uniform(np.array(sigmas) * 224 / size, 0.1, 2)


def test_grey_views_have_three_equal_channels_of_the_crops_that_coloured_ones_have(listing):
    plain = data.Clips(listing, SMALL, views_twice)[0, 0]["video"]
    grey = data.Clips(listing, SMALL, views_twice, augment=Augment(grey=1.0))[0, 0]["video"]
    for before, after in zip(plain, grey, strict=True):
        assert torch.equal(after, after[:1].expand_as(after))
        expected = rgb_to_grayscale(before.transpose(0, 1), 3).transpose(0, 1)
        assert torch.equal(after, expected)


# ---- Sound ---------------------------------------------------------------------------------------------

def decibel(wave):
    """The mel (F, T) in dB."""
    return data.LogMel(Inputs(n_mels=32, mel_mean=0.0, mel_std=1.0))(wave)[0]


def test_gain_moves_the_mel_by_one_number_of_db_drawn_evenly_from_minus_to_plus():
    wave = random(RATE)
    gains = []
    for louder in times(100, Augment(gain=9.0).audio, wave, RATE):
        change = decibel(louder) - decibel(wave)
        assert change.max() - change.min() < 1e-3
        gains.append(change.mean().item())
    assert np.abs(gains).max() <= 9.001 and is_uniform(gains, -9, 9)


def response(changed):
    """What became of an impulse: dB at each frequency."""
    return 20 * torch.fft.rfft(changed).abs().log10()


@pytest.mark.parametrize("most", [3.0, 12.0, 30.0])
def test_a_filter_changes_no_frequency_by_more_than_its_bound_even_at_the_ends_of_what_is_drawn(
        most, monkeypatch):
    impulse = torch.zeros(4096)
    impulse[10] = 1.0
    found = []
    for ends in itertools.product((0, 1), repeat=6):
        draws = list(ends)
        monkeypatch.setattr(augment, "draw", lambda *bounds, draws=draws: bounds[draws.pop()])
        found.append(response(Augment(filter=most).audio(impulse, RATE)))
    assert 0.7 * most < torch.stack(found).abs().max() <= most


def test_a_filter_changes_neighbouring_bins_of_the_mel_nearly_alike_each_time_others():
    wave = 0.1 * random(2 * RATE)
    changes = []
    for changed in times(30, Augment(filter=12.0).audio, wave, RATE):
        changes.append((decibel(changed) - decibel(wave)).mean(1))              # (F,)
    changes = torch.stack(changes)
    assert changes.abs().max() < 12 and (changes.amax(1) - changes.amin(1)).min() > 1
    assert changes.diff(dim=1).abs().max() < 4
    for part in (changes[:, 1], changes[:, 16], changes[:, -2]):
        assert part.min() < -3 and part.max() > 3


def test_noise_is_white_and_so_many_db_below_the_sound_as_drawn_from_the_floor_to_20_more():
    wave = torch.from_numpy(tone(1000, 1)).float()
    ratios = []
    for noisy in times(100, Augment(noise=10.0).audio, wave, RATE):
        noise = noisy - wave
        ratios.append(10 * (wave.square().mean() / noise.square().mean()).log10().item())
        spectrum = torch.fft.rfft(noise).abs().square()
        assert spectrum[:2000].mean() == pytest.approx(spectrum[-2000:].mean().item(), rel=0.2)
    assert min(ratios) > 9.8 and max(ratios) < 30.2 and is_uniform(ratios, 10, 30)


def test_silence_stays_silence_and_what_is_loud_is_not_clipped():
    loud = 5 * random(RATE)
    loud[8000:] = 0
    for change in (Augment(noise=10.0), Augment(filter=3.0), Augment(gain=3.0), ALL):
        assert not change.audio(torch.zeros(RATE), RATE).any()
        changed = change.audio(loud, RATE)
        assert changed.isfinite().all() and changed.abs().max() > 5 and changed[9000:].abs().max() < 1e-6


# ---- Items ---------------------------------------------------------------------------------------------

def plain_item(listing, index):
    """(video, audio) of a clip's views, from the parts of the reader alone."""
    rng = np.random.default_rng((0, 0, index))
    with data.open_clip(listing.path(index), None) as clip:
        views = views_twice(rng, clip.duration)
        window = views[0].sound_window
        read = clip.read([window], [window], SMALL.frames, SMALL.resize, SMALL.sample_rate)
    frames = torch.from_numpy(read["video"][0]).permute(0, 3, 1, 2)
    torch.manual_seed(int(rng.integers(2 ** 62)))
    cut = [data.crop_transform(SMALL, view.video)(frames).transpose(0, 1) for view in views if view.video]
    return cut, 3 * [data.LogMel(SMALL)(torch.from_numpy(read["audio"][0]))]


def test_without_augmentation_an_item_is_what_it_was_bit_for_bit(listing):
    for change, index in itertools.product((None, Augment()), (0, 2)):
        item = data.Clips(listing, SMALL, views_twice, augment=change)[0, index]
        assert same((item["video"], item["audio"]), plain_item(listing, index))


def test_augmented_views_of_the_same_seconds_differ_and_those_of_a_silent_clip_in_pictures_alone(listing):
    plain = data.Clips(listing, SMALL, views_twice, replace=False)
    clips = data.Clips(listing, SMALL, views_twice, replace=False, augment=ALL)
    assert same(plain[0, 0]["video"][0], plain[0, 0]["video"][1])
    item = clips[0, 0]
    assert not same(item["video"][0], item["video"][1])
    for one, other in itertools.combinations(item["audio"], 2):
        assert not same(one, other)
    silent = clips[0, 1]
    assert same(silent["audio"], plain[0, 1]["audio"]) and not same(silent["video"], plain[0, 1]["video"])


def test_augmented_items_are_a_pure_function_of_seed_epoch_and_index_with_workers_and_without(listing):
    def batches(workers):
        clips = data.Clips(listing, SMALL, views_twice, augment=ALL)
        return list(data.train_loader(clips, data.Batches(4, 2, 0, 0, 2), workers))

    here = batches(0)
    torch.manual_seed(99)
    assert same(here, batches(2))
    clips = data.Clips(listing, SMALL, views_twice, augment=ALL)
    state = torch.get_rng_state()
    item = clips[0, 0]
    assert torch.equal(torch.get_rng_state(), state) and same(item["audio"], clips[0, 0]["audio"])
    assert not same(item["audio"], clips[1, 0]["audio"])


# ---- Runs ----------------------------------------------------------------------------------------------

def test_training_views_are_changed_and_not_what_is_measured_or_evaluated(toy, tmp_path, monkeypatch):
    quicken(monkeypatch, mjepa)
    calls = [record(monkeypatch, Augment, name) for name in ("video", "audio")]
    train(mjepa, toy, tmp_path / "run", "--steps", 1, "--jitter", 0.4, "--filter", 12, "--noise", 0)
    recipe = weights(tmp_path / "run")["recipe"]
    assert (recipe["jitter"], recipe["filter"], recipe["noise"]) == (0.4, 12, 0)
    assert [len(each) for each in calls] == [4, 4]     # of each clip of the batch; none for the mel's mean
    where = f"--ckpt {tmp_path}/run --data toy --data-dir {toy} --device cpu --workers 0"
    probe.main([*where.split(), "--save-features", str(tmp_path / "features.npz")])
    assert [len(each) for each in calls] == [4, 4]


ALONE = [
    (ajepa, "", "jitter", "audio"), (mjepa, "--terms separate-audio", "blur", "audio"),
    (mjepa, "--terms separate-video", "gain", "video"), (avjepa_ncsu, "--modalities video", "noise", "video")]


@pytest.mark.parametrize("script, words, name, alone", ALONE)
def test_a_change_of_what_a_run_does_not_take_is_refused_and_that_of_the_table_left_out(
        script, words, name, alone, monkeypatch):
    message = fails(script.get_args, [*words.split(), f"--{name}", "0.1"])
    assert message == f"--{name} has no effect: this run takes {alone} alone; leave it out"
    assert script.get_args([*words.split(), "--recipe", "toy"])[1][name] == 0


@pytest.mark.parametrize("script", [ajepa, avjepa_lejepa, mjepa, avjepa_ncsu])
def test_the_papers_and_the_coloured_toy_change_nothing_and_the_toys_recipe_all_other_sets(script):
    for words, changes in (("", False), ("--data folder", False), ("--data folder --recipe toy", True)):
        recipe = script.get_args(words.split())[1]
        for name, (modality, _) in data.CHANGES.items():
            takes = modality == "audio" or script is not ajepa
            moves = name != "blur" and not (script is avjepa_ncsu and name == "gain")
            assert bool(recipe[name]) == (changes and takes and moves), (words, name)


def test_a_recipes_change_stands_until_the_flag_gives_another_and_0_is_none():
    words = ["--data", "folder", "--recipe", "toy"]
    assert mjepa.get_args(words)[1]["jitter"] == data.AUGMENT["toy"].jitter
    assert mjepa.get_args([*words, "--jitter", "0"])[1]["jitter"] == 0
    assert mjepa.get_args([*words, "--jitter", "0.3"])[1]["jitter"] == 0.3


@pytest.mark.parametrize("name", data.CHANGES)
def test_a_change_out_of_its_range_is_refused_by_its_name(name):
    largest = data.CHANGES[name][1]
    for value in (-0.1, 1.01 * largest, np.nan):
        message = fails(mjepa.get_args, [f"--{name}", str(value)])
        assert message == f"--{name} {value} is out of range: from 0 to {largest}"
    assert mjepa.get_args([f"--{name}", str(largest)])[1][name] == largest


def test_gain_is_refused_where_the_mel_is_relative_to_the_loudest():
    assert "leave it out" in fails(avjepa_ncsu.get_args, ["--gain", "3"], match="--gain has no effect")
