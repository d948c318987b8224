"""AVJEPA (NC State): its views, its masks, its loss and its runs, each against a reference of its own."""
import copy, functools, itertools, json, math, os, signal, sys
from fractions import Fraction
from pathlib import Path

import avjepa_ncsu, common, data, probe
from avjepa_ncsu import AVJEPA, MODALITIES, draw_masks
from common import Process, UserError
from conftest import ROOT, StopAfter, command, same, weights, write

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

FULL, MIDDLE = {"video": (8, 14, 14), "audio": (8, 12)}, {"video": (2, 4, 4), "audio": (4, 12)}    # the paper's grids, and smaller ones
SMALL = {"video": (2, 4, 4), "audio": (3, 7)}                   # those of the model below: patches of 2 x 4 x 4 and of 4 x 4
SHAPES = {"video": (3, 4, 16, 16), "audio": (1, 12, 28)}
NANO, DIM, WIDTH = (32, 3, 4, 64), 32, 32
PAPER = ["--data", "kinetics400", "--data-dir", "x"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(common.SIZES, "nano", NANO)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe_of(*flags):
    return avjepa_ncsu.get_args([*PAPER, *map(str, flags)])[1]


def small_recipe(*flags, block=(2, 3)):
    """The paper's, with a rectangle that fits into the smaller grids."""
    return recipe_of(*flags) | {"audio_block": block}


def nano_config(modalities="av"):
    shapes = {m: dict(shape=SHAPES[m][1 if m == "video" else 1:], patch=(2, 4, 4) if m == "video" else (4, 4)) for m in SHAPES}
    return dict(size="nano", positions="sincos", **{m: shapes[m] for m in MODALITIES[modalities]})


def nano_model(modalities="av", seed=0, apart=True):
    """A small AVJEPA; apart: the teacher has other weights than the student, and all have biases and norms that matter."""
    common.seed_step(seed, 0)
    model = AVJEPA(nano_config(modalities), 2, WIDTH, 2).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters() if apart else ()):
            p.add_(0.1 * random(*p.shape, seed=i))
    return model


def clips_of(batch, modalities="av", seed=0):
    """{modality: (B, ...)}"""
    return {m: random(batch, *SHAPES[m], seed=seed + 100 * i) for i, m in enumerate(SHAPES) if m in MODALITIES[modalities]}


def pair(clips):
    return clips.get("video"), clips.get("audio")


def masks_of(batch, step=0, modalities="av", rank=0):
    return draw_masks(5, step, rank, batch, {m: SMALL[m] for m in MODALITIES[modalities]}, small_recipe())


def even(batch, modalities="av"):
    return {m: torch.full((batch,), 1 / batch) for m in MODALITIES[modalities]}


def maps(target, grid):
    """(B, M) indices -> (B, *grid) bool: what is hidden."""
    out = np.zeros((len(target), math.prod(grid)), bool)
    for b, row in enumerate(target.tolist()):
        for j in row:
            out[b, j] = True
    return out.reshape(-1, *grid)


def plane(target, m, grids):
    """The same in one frame of a video, or in a sound: (B, rows, columns)."""
    return maps(target, grids[m])[:, 0] if m == "video" else maps(target, grids[m])


# ---------------------------------------------------------------------------------------------------------------------
# Views: the sound spans what the pictures span
# ---------------------------------------------------------------------------------------------------------------------

RATES = {"10": Fraction(10), "12.5": Fraction(25, 2), "24": Fraction(24), "25": Fraction(25), "29.97": Fraction(30000, 1001),
         "30": Fraction(30), "50": Fraction(50), "60": Fraction(60)}
COUNT, LOW, HIGH = 100, 1000.0, 2600.0                          # frames of a clip; mel of its tone at the beginning and at the end


def told(n):
    """Frame number n < 100 as a colour, which no crop and no flip changes: tens in the red, ones in the blue."""
    return np.broadcast_to(np.array([25 + 22 * (n // 10), 120, 25 + 22 * (n % 10)], np.uint8), (32, 40, 3))


def numbers(video):
    """The numbers on the frames of (3, T, H, W) uint8."""
    red, _, blue = video.float().mean((2, 3)).tolist()
    return [10 * round((r - 25) / 22) + round((b - 25) / 22) for r, b in zip(red, blue)]


def rising(seconds, rate):
    """A tone that rises evenly in mel from LOW to HIGH: its pitch tells the time."""
    mel = LOW + (HIGH - LOW) * np.arange(round(seconds * rate)) / (seconds * rate)
    return 0.5 * np.sin(2 * np.pi * np.cumsum(700 * (10 ** (mel / 2595) - 1)) / rate)


def write_rising(path, fps, count=COUNT, rate=44100, seconds=None, frames=None):
    """A clip of COUNT (or `count` of them) told frames, and of the rising tone that would be over with the COUNT-th."""
    seconds = seconds or float(COUNT / fps)
    wave = rising(seconds, rate)[:round(seconds * (count if seconds == float(COUNT / fps) else COUNT) / COUNT * rate)]
    data.write_clip(path, np.stack([told(n) for n in range(count)]) if frames is None else frames, wave, fps, rate, 128_000)


@pytest.fixture(scope="module")
def rising_clips(tmp_path_factory):
    """{name: path}: a clip for each of RATES, one too short for a view at 25 a second, a slide show and a wrong header (of 10 seconds), and
    the sound alone (10 seconds)."""
    folder = tmp_path_factory.mktemp("rising")
    for i, (name, fps) in enumerate(RATES.items()):
        write_rising(folder / f"{name}.mp4", fps, rate=48000 if i % 2 else 44100)
    write_rising(folder / "short.mp4", Fraction(25), 40)
    write_rising(folder / "slides.mp4", Fraction(1, 2), 5, seconds=10.0)
    write_rising(folder / "wrong.mp4", Fraction(1000), 50, seconds=10.0)
    data.write_clip(folder / "sound.mp4", None, rising(10.0, 44100), sample_rate=44100, bit_rate=128_000)
    return {path.stem: path for path in folder.glob("*.mp4")}


def view_inputs(*flags):
    """The paper's recipe and what data.py prepares by it, with small pictures."""
    recipe = recipe_of(*flags) | {"image": 16}
    return recipe, avjepa_ncsu.make_inputs(recipe)


def clips_at(path, *flags, plan=None, seed=0):
    recipe, inputs = view_inputs(*flags)
    plan = plan or functools.partial(avjepa_ncsu.plan_views, seconds=recipe["seconds"], modalities=MODALITIES[recipe["modalities"]])
    return data.Clips(data.make_listing("rising", path.parent, [path.name], None, []), inputs, plan, seed)


def heard(mel, seconds, long=10.0, columns=192, most=192):
    """(when the sound begins, how far a column is off the line from there over these seconds) of a mel (1, F, T) of a tone that rises for
    `long` seconds; most: columns that sound."""
    bins, power = mel.shape[1], 10 ** (mel[0].double().numpy() / 10)
    centres = (np.arange(bins) + 1) / (bins + 1) * 2595 * np.log10(1 + 44100 / 2 / 700)
    peak = power.argmax(0)
    near = np.clip(peak + np.arange(-2, 3)[:, None], 0, bins - 1)
    pitch = (np.take_along_axis(power, near, 0) * centres[near]).sum(0) / np.take_along_axis(power, near, 0).sum(0)
    frames = round(seconds * 44100) // 512 + 1                                  # of the mel before it is interpolated
    at = ((np.arange(columns) + 0.5) * frames / columns - 0.5) * 512 / 44100    # when a column is, from the beginning of the view
    off = ((pitch - LOW) / (HIGH - LOW) * long - at)[6:most - 6]
    return np.median(off), np.abs(off - np.median(off)).max()


@pytest.mark.parametrize("name", RATES)
def test_a_view_is_every_fourth_frame_of_a_clip_and_the_sound_of_exactly_these_seconds_at_any_frame_rate(rising_clips, name):
    fps, starts = float(RATES[name]), []
    clips = clips_at(rising_clips[name])
    for epoch in range(5):
        item = clips[epoch, 0]
        (video,), (mel,) = item["video"], item["audio"]
        shown = numbers(video)
        assert video.shape == (3, 16, 16, 16) and mel.shape == (1, 128, 192) and not item["short"] and not item["bad"]
        assert shown == [shown[0] + 4 * i for i in range(16)]                   # 64 frames of the clip, the third of each four
        begin, off = heard(mel, 64 / fps, COUNT / fps)
        assert off * fps < 0.7 and shown[0] - 2.35 < begin * fps < shown[0] - 0.65          # in frames: those that the sound spans
        starts.append(begin * fps)
    assert min(starts) > -0.35 and max(starts) < 38.5 and np.ptp(starts) > 12   # anywhere in the 100 frames (and the end of the AAC)


@pytest.mark.parametrize("name", ["12.5", "60"])
def test_pictures_and_sound_are_the_same_bits_with_and_without_the_other_modality(rising_clips, name):
    both = clips_at(rising_clips[name])[1, 0]
    for m in SHAPES:
        alone = clips_at(rising_clips[name], "--modalities", m)[1, 0]
        assert torch.equal(alone[m][0], both[m][0]) and not alone["audio" if m == "video" else "video"]
        assert alone["has_audio"] and alone["has_video"]


def test_a_clip_that_is_too_short_holds_its_last_frame_and_then_is_silent(rising_clips):
    item = clips_at(rising_clips["short"])[0, 0]                                # 40 frames, of 64
    assert numbers(item["video"][0])[:10] == [2 + 4 * i for i in range(10)] and set(numbers(item["video"][0])[10:]) == {39}
    sounds = round(192 * 40 / 64)
    begin, off = heard(item["audio"][0], 64 / 25, 4.0, most=sounds)
    assert abs(begin) * 25 < 0.35 and off * 25 < 0.7 and item["short"]
    assert item["audio"][0][..., sounds + 8:].amax() < -79.99 and item["audio"][0][..., :sounds - 8].amax(1).min() > -20


@pytest.mark.parametrize("name,fps", [("sound", None), ("slides", 0.5), ("wrong", 1000)])
def test_a_file_without_pictures_or_with_a_wrong_frame_rate_in_its_header_is_cut_by_the_clock(rising_clips, name, fps):
    for epoch in range(2):
        item = clips_at(rising_clips[name], *(("--modalities", "audio") if fps is None else ()))[epoch, 0]
        begin, off = heard(item["audio"][0], 64 / 30)
        assert 0 <= begin + 0.02 and begin < 10 - 64 / 30 + 0.05 and off < 0.05
        if fps:
            middles = begin + (np.arange(16) + 0.5) * 4 / 30
            on = np.clip(middles * fps, 0, 4 if fps < 1 else 49).astype(int)
            assert all(a in (b - 1, b, b + 1) for a, b in zip(numbers(item["video"][0]), on))
        assert item["has_video"] == bool(fps)


@pytest.mark.parametrize("name", ["10", "29.97", "60"])
def test_seconds_that_are_asked_for_go_by_the_clock_whatever_the_frame_rate(rising_clips, name):
    fps = float(RATES[name])
    for seconds in (1.0, 64 / 30 if fps < 60 else 1.5):                         # also where they are those of the recipe
        item = clips_at(rising_clips[name], "--seconds", seconds)[2, 0]
        begin, off = heard(item["audio"][0], seconds, COUNT / fps)
        middles = begin + (np.arange(16) + 0.5) * seconds / 16
        assert off < 0.03 and np.abs(np.array(numbers(item["video"][0])) + 0.5 - middles * fps).max() < 0.5 + 0.02 * fps
    recipe, inputs = view_inputs("--seconds", 1.0)
    assert recipe["stride"] is None and inputs.frame_rate is None and (inputs.frames, inputs.mel_frames) == (16, 192)


@pytest.mark.parametrize("name", ["12.5", "29.97", "60"])
def test_views_of_an_evaluation_and_a_clip_that_is_loaded_keep_the_same_rule(rising_clips, name):
    fps, (_, inputs) = float(RATES[name]), view_inputs()
    item = clips_at(rising_clips[name], plan=functools.partial(data.even_views, 3, inputs))[0, 0]
    for place, video, mel in zip((0, 18, 36), item["video"], item["audio"]):    # the first 64 frames, the middle ones, the last
        shown, (begin, off) = numbers(video), heard(mel, 64 / fps, COUNT / fps)
        assert shown == [shown[0] + 4 * i for i in range(16)] and off * fps < 0.7 and shown[0] - 2.35 < begin * fps < shown[0] - 0.65
        assert place - 0.35 < begin * fps < place + 3                           # AAC adds up to .05 seconds to the clip
    clip = data.load_clip(rising_clips[name], inputs)
    assert torch.equal(clip["audio"][0], item["audio"][1])
    assert torch.equal(clip["video"][0], data.normalize_video(item["video"][1]))


@pytest.mark.parametrize("name", ["12.5", "60"])
def test_a_clip_that_is_loaded_from_a_frame_on_begins_there(rising_clips, name):
    """Its start counts frames as well: in seconds of 30 frames."""
    fps, (_, inputs), start = float(RATES[name]), view_inputs(), 0.25
    clip = data.load_clip(rising_clips[name], inputs, start)
    begin, _ = heard(clip["audio"][0], 64 / fps, COUNT / fps)
    assert abs(begin * fps - start * 30) < 0.35


# ---------------------------------------------------------------------------------------------------------------------
# The mel
# ---------------------------------------------------------------------------------------------------------------------

def mel_power(wave, inputs):
    """(F, T): frames centred on multiples of the hop, Hann, |FFT| squared, triangles of height 1 on HTK's mel scale."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(inputs.n_fft) / inputs.n_fft)
    padded = np.pad(wave.astype(np.float64), inputs.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, inputs.n_fft)[::inputs.hop]
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2                                           # (T, n_fft / 2 + 1)
    top = 2595 * np.log10(1 + inputs.sample_rate / 2 / 700)
    points, f = 700 * (10 ** (np.linspace(0, top, inputs.n_mels + 2) / 2595) - 1), np.linspace(0, inputs.sample_rate / 2, power.shape[1])
    low, centre, high = points[:-2, None], points[1:-1, None], points[2:, None]
    return np.clip(np.minimum((f - low) / (centre - low), (high - f) / (high - centre)), 0, None) @ power.T


def below_the_loudest(wave, inputs, columns=None):
    """(F, columns): decibel below the loudest, not below -80, then interpolated."""
    power = np.maximum(mel_power(wave, inputs), 1e-10)
    decibel = torch.from_numpy(np.maximum(10 * np.log10(power / power.max()), -80))
    if columns:
        decibel = F.interpolate(decibel[None, None], (len(decibel), columns), mode="bilinear", antialias=True)[0, 0]
    return decibel.numpy()


def noisy(seconds, rate=44100, seed=1):
    """Noise whose loudness falls by 100 dB, and two tones."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.1, len(t)) * 10 ** (-5 * t / seconds)
    return (noise + 0.01 * np.sin(2 * np.pi * 500 * t) * (t < seconds / 2)).astype(np.float32)


@pytest.mark.parametrize("seconds", [64 / 60, 64 / 30, 6.4])
def test_the_mel_is_decibel_of_power_below_the_clips_loudest_interpolated_to_192_columns(seconds):
    _, inputs = view_inputs()
    waves = np.stack([noisy(seconds), 0.1 * noisy(seconds, seed=2)])            # the maximum is each clip's own
    mel = data.LogMel(inputs)(torch.from_numpy(waves))
    assert mel.shape == (2, 1, 128, 192) and inputs.mel_frames == 192
    for one, wave in zip(mel, waves):
        expected = below_the_loudest(wave, inputs, 192)
        assert np.abs(one[0].numpy() - expected).max() < 0.05
        torch.testing.assert_close(data.LogMel(inputs)(torch.from_numpy(wave)), one, atol=1e-3, rtol=0)     # with and without a batch
    plain = data.replace(inputs, columns=None)
    native = data.LogMel(plain)(torch.from_numpy(waves[0]))[0].numpy()
    assert native.shape[1] == len(waves[0]) // 512 + 1 and native.max() == 0 and native.min() == -80
    assert np.abs(native - below_the_loudest(waves[0], plain)).max() < 0.05
    torch.testing.assert_close(data.LogMel(inputs)(torch.from_numpy(0.125 * waves[0])), mel[0], atol=1e-3, rtol=0)      # quieter: the same


def test_a_tenth_of_the_amplitude_is_20_decibel():
    _, inputs = view_inputs()
    t = np.arange(44100) / 44100
    wave = np.where(t < 0.5, 0.5, 0.05) * np.sin(2 * np.pi * 2000 * t)
    loudest = data.LogMel(inputs)(torch.from_numpy(wave.astype(np.float32)))[0].amax(0)
    assert loudest[20:80].numpy() == pytest.approx(0, abs=0.1) and loudest[110:170].numpy() == pytest.approx(-20, abs=0.1)


def test_a_mel_that_has_the_columns_already_is_left_as_it_is_and_mean_and_std_come_last():
    _, inputs = view_inputs()
    wave = torch.from_numpy(noisy((191 * 512 + 100) / 44100))
    plain = data.LogMel(data.replace(inputs, columns=None))(wave)
    assert plain.shape[-1] == 192 and torch.equal(data.LogMel(inputs)(wave), plain)
    mean, std = np.linspace(-40, 0, 128), np.linspace(1, 20, 128)
    normed = data.LogMel(data.replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist())))(wave)
    np.testing.assert_allclose(normed[0].numpy(), (plain[0].numpy() - mean[:, None]) / std[:, None], atol=1e-4)


def test_two_channels_are_averaged_and_not_read_one_after_the_other(tmp_path):
    t = np.arange(4 * 44100) / 44100
    left, right = (0.4 * np.sin(2 * np.pi * f * t) * (t > 2) for f in (1000, 4000))                      # silent for two seconds
    data.write_clip(tmp_path / "two.mp4", np.stack([told(n) for n in range(100)]), np.stack([left, right]), 25, 44100, 128_000)
    _, inputs = view_inputs()
    mel = data.load_clip(tmp_path / "two.mp4", inputs)["audio"][0, 0]           # from .72 to 3.28 seconds
    expected = below_the_loudest(((left + right) / 2)[round(0.72 * 44100):round(3.28 * 44100)], inputs, 192)
    loud = expected > -20
    assert np.abs(mel.numpy() - expected)[:, 100:][loud[:, 100:]].max() < 2 and (mel[:, :88] < -50).all()


def test_the_statistics_are_the_mean_and_std_of_each_bin_over_the_middles_of_the_clips(rising_clips, tmp_path):
    for name in ("10", "60"):
        (tmp_path / f"{name}.mp4").write_bytes(rising_clips[name].read_bytes())
    recipe, plain = view_inputs()
    inputs = avjepa_ncsu.make_inputs(recipe, data.list_clips("folder", tmp_path), 0)
    mels = np.concatenate([data.load_clip(path, plain)["audio"][0, 0].double().numpy() for path in tmp_path.glob("*.mp4")], 1)
    assert mels.shape == (128, 2 * 192) and len(inputs.mel_mean) == len(inputs.mel_std) == 128
    np.testing.assert_allclose(inputs.mel_mean, mels.mean(1), atol=1e-3)
    np.testing.assert_allclose(inputs.mel_std, mels.std(1).clip(recipe["std_floor"]), atol=1e-2)
    without = avjepa_ncsu.make_inputs(recipe_of("--modalities", "video"), data.list_clips("folder", tmp_path), 0)
    assert without.n_mels == 0 and without.mel_mean == 0


def test_digital_silence_lies_at_the_floor_and_a_view_of_another_length_has_as_many_columns_a_second():
    inputs = view_inputs()[1]
    assert (data.LogMel(inputs)(torch.zeros(round(inputs.seconds * inputs.sample_rate))) == -80).all()
    other = inputs.at(10.0, 16)                         # 90 a second: 900, filled up to whole patches; and by the clock
    assert (other.columns, other.frame_rate, other.seconds) == (912, None, 10.0) and inputs.at(inputs.seconds, 16) == inputs


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def many():
    """{name: (grids, recipe, masks of many steps of 8 clips)}"""
    return {name: (grids, recipe, [draw_masks(0, step, 0, 8, grids, recipe) for step in range(steps)])
            for name, grids, recipe, steps in (("paper", FULL, recipe_of(), 120), ("middle", MIDDLE, small_recipe(block=(2, 6)), 60),
                                               ("small", SMALL, small_recipe(), 60))}


GRIDS = ["paper", "middle", "small"]


@pytest.fixture
def drawn(monkeypatch):
    """What masks are made of: {"sets": (grid, number of blocks, their size) for each set and modality, in order; "before": what each clip
    hides before any single patch}."""
    calls, draw, meet = {"sets": [], "before": []}, avjepa_ncsu.draw_set, common.meet_count

    def spy(key, rank, batch, grid, number, size):
        calls["sets"].append((tuple(grid), number, size))
        return draw(key, rank, batch, grid, number, size)

    monkeypatch.setattr(avjepa_ncsu, "draw_set", spy)
    monkeypatch.setattr(common, "meet_count", lambda rng, mask, count: (calls["before"].append(mask.copy()), meet(rng, mask, count))[1])
    return calls


@pytest.mark.parametrize("name", GRIDS)
def test_visible_and_hidden_are_disjoint_and_complete_and_as_many_for_each_clip(many, name):
    grids, _, steps = many[name]
    for masks in steps:
        assert len(masks) == 2 and all(list(some) == ["video", "audio"] for some in masks)
        for some, m in itertools.product(masks, grids):
            context, target = some[m]
            assert len(context) == len(target) == 8 and context.shape[1] >= 1 and target.shape[1] >= 1
            assert (torch.cat([context, target], 1).sort(1).values == torch.arange(math.prod(grids[m]))).all()
            assert (context.diff(dim=1) > 0).all() and (target.diff(dim=1) > 0).all()


@pytest.mark.parametrize("name", GRIDS)
def test_a_video_is_hidden_in_tubes_so_that_its_last_frame_hides_exactly_as_many_as_its_first(many, name):
    grids, _, steps = many[name]
    for some in itertools.chain(*steps):
        hidden = maps(some["video"][1], grids["video"])
        assert (hidden == hidden[:, :1]).all() and hidden[:, -1].mean() == hidden[:, 0].mean()
        assert some["video"][1].shape[1] == grids["video"][0] * hidden[0, 0].sum()


def test_a_video_hides_8_blocks_of_15_percent_and_2_of_70_of_one_size_a_step_and_a_sound_as_many_rectangles_of_4_x_6(drawn):
    recipe, sizes = recipe_of(), {0: [], 1: []}
    for step in range(80):
        drawn["sets"].clear()
        draw_masks(2, step, 0, 2, FULL, recipe)
        video, audio = (drawn["sets"][i::2] for i in (0, 1))                    # one size for all clips
        assert audio == [((8, 12), 8, (4, 6)), ((8, 12), 2, (4, 6))]
        assert [one[:2] for one in video] == [((14, 14), 8), ((14, 14), 2)]
        for s in (0, 1):
            sizes[s].append(video[s][2])
    for s, area in ((0, 0.15 * 196), (1, 0.7 * 196)):
        h, w = np.array(sizes[s]).T
        assert (np.abs(h * w - area) <= h / 2).all()                            # the width is rounded last
        assert (0.75 * area <= (h + 0.5) ** 2).all() and ((1.5 * area >= (h - 0.5) ** 2) | (w == 14)).all()        # height over width
        assert len(set(sizes[s])) > 2                                           # the aspect is drawn, in each step anew


def placements(grid, size):
    """Each place of a block: (places, rows, columns) bool."""
    out = np.zeros((grid[0] - size[0] + 1, grid[1] - size[1] + 1, *grid), bool)
    for top, left in np.ndindex(out.shape[:2]):
        out[top, left, top:top + size[0], left:left + size[1]] = True
    return out.reshape(-1, *grid)


@pytest.mark.parametrize("grid,number,size", [((8, 12), 8, (4, 6)), ((8, 12), 2, (4, 6)), ((14, 14), 8, (5, 6)), ((14, 14), 2, (12, 11))])
def test_a_set_hides_as_much_as_that_many_blocks_at_corners_of_equal_chance(grid, number, size):
    """A patch is hidden with probability 1 - (1 - p)^number, p the share of the places of a block that cover it."""
    expected = 1 - (1 - placements(grid, size).mean(0)) ** number
    hidden = np.stack([avjepa_ncsu.draw_set((3, step, 1, 0), 0, 2, grid, number, size) for step in range(500)]).reshape(-1, 2, *grid)
    share = hidden[:, 0].mean((1, 2))
    assert share.mean() == pytest.approx(expected.mean(), abs=4 * share.std() / math.sqrt(500) + 1 / math.prod(grid))
    np.testing.assert_allclose(hidden.mean((0, 1)), expected, atol=0.1)         # single patches and the choice of five level it a little
    assert np.corrcoef(hidden.mean((0, 1)).flat, expected.flat)[0, 1] > 0.98


@pytest.mark.parametrize("grids", [FULL, MIDDLE], ids=["paper", "middle"])
def test_what_is_hidden_is_a_union_of_whole_blocks_but_for_a_few_single_patches(drawn, grids):
    recipe, singles = small_recipe(block=(4, 6) if grids is FULL else (2, 6)), {(m, s): [] for m in FULL for s in (0, 1)}
    for step in range(40):
        drawn["sets"].clear(), drawn["before"].clear()
        masks = draw_masks(3, step, 0, 4, grids, recipe)
        for place, (s, m) in enumerate(itertools.product((0, 1), grids)):
            grid, number, size = drawn["sets"][place]
            hidden, blocks = plane(masks[s][m][1], m, grids), placements(grid, size)
            for clip, before in zip(hidden, drawn["before"][4 * place:4 * place + 4]):
                whole = blocks[(blocks <= before).all((1, 2))]                  # those that lie in it
                assert (whole.any(0) == before).all() and before.sum() <= number * math.prod(size)
                if number == 2:
                    assert any((a | b == before).all() for a, b in itertools.product(whole, whole))
                singles[m, s].append((clip ^ before).mean())
    for key, x in singles.items():
        assert np.mean(x) < (0.04 if grids is FULL else 0.05) and max(x) < 0.35, key


@pytest.mark.parametrize("name", GRIDS)
def test_the_last_row_and_column_is_hidden_as_often_as_the_first_and_each_corner_is(many, name):
    grids, _, steps = many[name]
    n = 8 * len(steps)
    for s, m in itertools.product((0, 1), grids):
        share = sum(plane(masks[s][m][1], m, grids).sum(0) for masks in steps) / n
        wide = 5.5 * math.sqrt(2 * 0.25 / n)                                    # of the difference of two places: a variance for each clip
        for turned in (share[::-1], share[:, ::-1]):
            np.testing.assert_allclose(share, turned, atol=wide)
        for first, last in ((share[0], share[-1]), (share[:, 0], share[:, -1])):
            assert first.mean() == pytest.approx(last.mean(), abs=wide / 2) and last.mean() > 0.05
        assert min(share[0, 0], share[0, -1], share[-1, 0], share[-1, -1]) > 0.01 and share.max() < 1


def test_masks_are_a_function_of_seed_step_rank_and_clip_alone():
    recipe, keys = small_recipe(), list(itertools.product((0, 1), (0, 1, 7), (0, 1)))
    first = {key: draw_masks(*key, 3, FULL, recipe) for key in keys}
    for key in reversed(keys):
        np.random.seed(1), torch.manual_seed(sum(key))
        assert same(draw_masks(*key, 3, FULL, recipe), first[key])
        large = draw_masks(*key, 5, FULL, recipe)                               # nor of the batch
        assert all(torch.equal(a, b[:3]) for some, more in zip(first[key], large) for m in FULL for a, b in zip(some[m], more[m]))
        for m in FULL:                                                          # nor of the other modality
            alone = draw_masks(*key, 3, {m: FULL[m]}, recipe | {"modalities": m})
            assert same(alone, [{m: some[m]} for some in first[key]])
    for m in FULL:                                                              # no two clips, ranks, steps, seeds alike (of two large
        rows = [tuple(row.tolist()) for masks in first.values() for row in masks[0][m][1]]     # blocks there are but a few dozen)
        assert len(rows) == len(set(rows)) == 3 * len(keys)


def test_the_clips_of_a_batch_and_the_ranks_have_masks_of_their_own_and_the_same_number_hidden():
    for step in range(6):
        found = [draw_masks(0, step, rank, 2, FULL, recipe_of()) for rank in range(4)]
        for s, m in itertools.product((0, 1), FULL):
            assert len({masks[s][m][1].shape for masks in found}) == 1
        for s, m in itertools.product((0, 1), FULL):
            assert len({tuple(row.tolist()) for masks in found for row in masks[s][m][1]}) >= (2 if s else 8)


def test_one_mask_set_for_a_batch_is_the_same_for_all_its_clips_and_all_ranks_and_another_in_each_step():
    recipe = recipe_of("--mask-per", "batch")
    assert recipe["mask_per"] == "batch" and recipe_of()["mask_per"] == "clip"
    seen = set()
    for step in range(4):
        found = [draw_masks(0, step, rank, batch, FULL, recipe) for rank, batch in ((0, 4), (1, 4), (3, 2))]
        for s, m, i in itertools.product((0, 1), FULL, (0, 1)):
            rows = {tuple(row.tolist()) for masks in found for row in masks[s][m][i]}
            assert len(rows) == 1 and [len(masks[s][m][i]) for masks in found] == [4, 4, 2]
            seen |= rows
        for s, m in itertools.product((0, 1), FULL):
            assert torch.equal(torch.cat(found[0][s][m], 1).sort(1).values, torch.arange(math.prod(FULL[m])).expand(4, -1))
    assert len(seen) == 4 * 2 * 2 * 2


def test_no_two_draws_share_a_random_stream(monkeypatch):
    """numpy pads a seed with zeros, so a clip must not be numbered 0. Streams: of each set and modality one for the step, and for a video
    one for the size, the same on all ranks; and one for each clip."""
    states, real, steps, ranks, batch = [], np.random.default_rng, 4, 3, 8

    def spy(key):
        rng = real(key)
        states.append((step, rank, rng.bit_generator.state["state"]["state"]))
        return rng

    monkeypatch.setattr(np.random, "default_rng", spy)
    for step, rank in itertools.product(range(steps), range(ranks)):
        draw_masks(0, step, rank, batch, SMALL, small_recipe())
    assert len(states) == steps * ranks * (2 * 2 * (1 + batch) + 2)
    own = {}
    for step, rank, state in states:
        own.setdefault((step, state), []).append(rank)
    assert len({state for _, state in own}) == len(own)                         # in no other step
    assert all(len(seen) == len(set(seen)) and len(seen) in (1, ranks) for seen in own.values())        # and once on a rank
    assert sum(len(seen) == ranks for seen in own.values()) == steps * (2 * 2 + 2)
    assert sum(len(seen) == 1 for seen in own.values()) == steps * ranks * 2 * 2 * batch


def test_the_masks_of_the_two_sets_and_of_the_two_modalities_are_drawn_apart(many):
    """How much two masks of one clip overlap, less how much those of other steps do: zero within its standard error."""
    grids, _, steps = many["middle"]
    found = {(m, s): np.stack([plane(masks[s][m][1], m, grids).reshape(8, -1) for masks in steps]).astype(float)
             for m in grids for s in (0, 1)}
    for (one, x), (other, y) in itertools.combinations(found.items(), 2):
        if one[0] == other[0]:
            same_clip = (x * y).mean((1, 2)) - (x * np.roll(y, 7, 0)).mean((1, 2))              # (steps,)
        else:                                                                   # of two modalities: the corners of each
            x, y = x[..., 0] - x[..., -1], y[..., 0] - y[..., -1]
            same_clip = (x * y).mean(1)
        assert abs(same_clip.mean()) < 4.5 * same_clip.std() / math.sqrt(len(steps)), (one, other)


def test_no_context_and_no_target_is_empty_in_10000_draws():
    """2,500 steps of four clips, for each modality and set, on the paper's grids (of a video one frame). At times two large blocks cover
    the whole of it: then one patch is freed."""
    recipe, grids, least = recipe_of(), FULL | {"video": (1, 14, 14)}, math.inf
    for step in range(2500):
        for some in draw_masks(11, step, 0, 4, grids, recipe):
            for m, (context, target) in some.items():
                assert len(context) == len(target) == 4 and target.shape[1] >= 1 and context.shape[1] >= 1
                assert context.shape[1] + target.shape[1] == math.prod(grids[m])
                least = min(least, context.shape[1])
    assert least == 1


@pytest.mark.parametrize("grids", [{"video": (1, 1, 2), "audio": (4, 6)}, {"video": (3, 2, 2), "audio": (4, 7)},
                                   {"video": (2, 3, 1), "audio": (5, 6)}, {"video": (1, 1, 3), "audio": (8, 6)}], ids=str)
def test_neither_modality_is_ever_wholly_hidden_or_wholly_visible_on_the_smallest_grids(grids):
    for step in range(60):
        for some in draw_masks(1, step, 0, 3, grids, recipe_of()):
            for m, (context, target) in some.items():
                hidden = maps(target, grids[m]).reshape(3, -1)
                assert hidden.any(1).all() and not hidden.all(1).any() and context.shape[1] + target.shape[1] == hidden.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss
# ---------------------------------------------------------------------------------------------------------------------

def layer_norm(x, norm=None, eps=1e-6):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x if norm is None else x * norm.weight + norm.bias


def slow_sincos(grid, dim):
    """One row for each place: of each axis the sines and then the cosines of its index, by 10000^(-k / pairs); zeros at the end."""
    pairs, rows = dim // (2 * len(grid)), []
    for place in itertools.product(*map(range, grid)):
        angles = [[index / 10000 ** (k / pairs) for k in range(pairs)] for index in place]
        row = [wave(a) for axis in angles for wave in (math.sin, math.cos) for a in axis]
        rows.append(row + [0.0] * (dim - len(row)))
    return torch.tensor(rows)


def patch_tokens(vit, clip):
    """Tokens before the first block of one clip {modality: (C, ...)}, patch by patch: linear map, position, modality; the video's first."""
    out = []
    for m, size in (("video", (2, 4, 4)), ("audio", (4, 4))):
        stem, modality = getattr(vit, m), 0 if vit.modality is None else vit.modality[("video", "audio").index(m), 0]
        for place, position in zip(itertools.product(*map(range, SMALL[m])), slow_sincos(SMALL[m], DIM)) if m in clip else ():
            cut = clip[m][(slice(None), *(slice(p * s, p * s + s) for p, s in zip(place, size)))].flatten()
            out.append(stem.proj.weight.flatten(1) @ cut + stem.proj.bias + position + modality)
    return torch.stack(out)


def encode(vit, tokens):
    """One clip's tokens (N, D) through the blocks."""
    for block in vit.transformer.blocks:
        tokens = block(tokens[None])[0]
    return layer_norm(tokens, vit.norm_out)


def slow_see(vit, tokens, places):
    """One clip's context: of the tokens, the visible ones of places {modality: (context, target)}; the video's come first."""
    first = dict(video=0, audio=math.prod(SMALL["video"]) if "video" in places else 0)
    return encode(vit, torch.stack([tokens[first[m] + j] for m, (context, _) in places.items() for j in context.tolist()]))


def slow_predictor(g, h, places, s):
    """One clip's context (C, D) and places -> {modality: predictions (M, D)}, token by token."""
    known, asked, row = [], [], 0
    for m, (context, target) in places.items():
        e = slow_sincos(SMALL[m], WIDTH)
        for j in context.tolist():
            known.append(g.embed[m].weight @ h[row] + g.embed[m].bias + e[j])
            row += 1
        asked += [g.mask_tokens[m][s] + e[j] for j in target.tolist()]
    x = torch.stack(known + asked)
    for block in g.transformer.blocks:
        x = block(x[None])[0]
    x, out = layer_norm(x[len(known):], g.norm) @ g.head.weight.T + g.head.bias, {}
    for m, (_, target) in places.items():
        out[m], x = x[:len(target)], x[len(target):]
    return out


def l1(prediction, target):
    """The mean of the distances, one number after the other."""
    total = [abs(a - b) for p, t in zip(prediction.tolist(), target.tolist()) for a, b in zip(p, t)]
    return sum(total) / len(total)


@torch.no_grad()
def slow_terms(model, clips, masks, weight, means=None):
    """{modality: loss}, {modality: what a predictor scores that knows nothing}, the running means after a first step."""
    losses, nothing = ({m: 0.0 for m in clips} for _ in range(2))
    batch, targets = range(len(next(iter(clips.values())))), {}
    for b in batch:                                                                             # 2 everything
        z = encode(model.target_encoder, patch_tokens(model.target_encoder, {m: x[b] for m, x in clips.items()}))
        y = layer_norm(z, eps=1e-5)
        for m in clips:
            n = math.prod(SMALL[m])
            targets[m, b], y = y[:n], y[n:]
    means = means or {m: sum(weight[m][b] * targets[m, b].mean(0) for b in batch) / weight[m].sum() for m in clips}
    for b, (s, some) in itertools.product(batch, enumerate(masks)):
        places = {m: (context[b], target[b]) for m, (context, target) in some.items()}
        h = slow_see(model.context_encoder, patch_tokens(model.context_encoder, {m: x[b] for m, x in clips.items()}), places)   # 1 context
        for m, prediction in slow_predictor(model.predictor, h, places, s).items():             # 3 predict
            truth = targets[m, b][places[m][1]]
            losses[m] += weight[m][b].item() * l1(prediction, truth) / len(masks)               # 4 loss
            nothing[m] += weight[m][b].item() * l1(means[m].expand_as(truth), truth) / len(masks)
    return losses, nothing, means


@pytest.mark.parametrize("modalities", MODALITIES)
def test_the_loss_of_a_batch_is_what_loops_over_its_clips_sets_and_tokens_compute(modalities):
    model, clips, masks = nano_model(modalities), clips_of(3, modalities), masks_of(3, 0, modalities)
    weight = {"video": torch.tensor([0.2, 0.3, 0.4]), "audio": torch.tensor([0.5, 0, 0.25])}    # the second has no sound
    loss, part = model(*pair(clips), masks, weight, 0)
    losses, nothing, means = slow_terms(model, clips, masks, weight)
    assert set(part["losses"]) == set(part["nothing"]) == set(part["embedding"]) == set(clips) == set(model.grids)
    for m in clips:
        assert part["losses"][m].item() == pytest.approx(losses[m], rel=2e-5)
        assert part["nothing"][m].item() == pytest.approx(nothing[m], rel=2e-5)
        torch.testing.assert_close(getattr(model, f"mean_{m}"), means[m], atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(sum(losses.values()), rel=1e-5)
    for b in range(3):                                                          # what is visible in the first set
        places = {m: (context[b], target[b]) for m, (context, target) in masks[0].items()}
        h = slow_see(model.context_encoder, patch_tokens(model.context_encoder, {m: x[b] for m, x in clips.items()}), places)
        for m, (context, _) in places.items():
            torch.testing.assert_close(part["embedding"][m][b], h[:len(context)].mean(0).detach(), atol=1e-5, rtol=1e-4)
            h = h[len(context):]
    assert loss.requires_grad and not any(x.requires_grad for name in ("nothing", "embedding") for x in part[name].values())


def test_the_l1_loss_against_a_loop():
    prediction, target, weight = random(3, 4, 5), random(3, 4, 5, seed=1), torch.tensor([0.5, 0.0, 2.0])
    expected = sum(w * l1(p, t) for p, t, w in zip(prediction, target, weight.tolist()))
    assert avjepa_ncsu.prediction_loss(prediction, target, weight).item() == pytest.approx(expected, rel=1e-6)
    one = avjepa_ncsu.prediction_loss(random(5), target, weight)                # one mean for all tokens
    assert one.item() == pytest.approx(sum(w * l1(random(5).expand(4, 5), t) for t, w in zip(target, weight.tolist())), rel=1e-6)


def test_knowing_nothing_is_the_loss_of_the_running_mean_over_the_clips_that_have_it():
    model, means = nano_model(), None
    for step in range(3):
        clips, masks, weight = clips_of(2, seed=step), masks_of(2, step), even(2)
        if step:
            weight["audio"] = torch.tensor([0.0, 1.0])                          # the first clip has no sound
        _, part = model(*pair(clips), masks, weight, step)
        _, _, now = slow_terms(model, clips, masks, weight)
        means = now if means is None else {m: means[m] + (now[m] - means[m]) / (step + 1) for m in now}     # so far the mean of all batches
        for m, mean in means.items():
            torch.testing.assert_close(getattr(model, f"mean_{m}"), mean, atol=1e-5, rtol=1e-5)
        _, nothing, _ = slow_terms(model, clips, masks, weight, means)
        for m, value in part["nothing"].items():
            assert value.item() == pytest.approx(nothing[m], rel=1e-4)
    model(*pair(clips), masks, weight, 5000)                                    # later each batch counts one in a hundred
    for m, mean in means.items():
        torch.testing.assert_close(getattr(model, f"mean_{m}"), mean + 0.01 * (now[m] - mean), atol=1e-5, rtol=1e-5)
    before = copy.deepcopy(model.state_dict())
    model(*pair(clips), masks, weight | {"audio": torch.zeros(2)}, 1)           # a batch without sound
    assert {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])} == {"mean_video"}


def test_the_targets_are_layer_normed_and_see_everything():
    found = []
    for scaled in (None, "norm_out", "content"):
        model, clips, masks = nano_model(), clips_of(2), masks_of(2)
        with torch.no_grad():
            if scaled == "norm_out":                                            # seven times as large: the same
                model.target_encoder.norm_out.weight.mul_(7), model.target_encoder.norm_out.bias.mul_(7)
            elif scaled:
                model.target_encoder.norm_out.bias.add_(3 * random(DIM))
        found.append(model(*pair(clips), masks, even(2), 0)[0].item())
    assert found[1] == pytest.approx(found[0], rel=1e-4) and abs(found[2] / found[0] - 1) > 3e-4
    given = []
    model.target_encoder.register_forward_pre_hook(lambda module, *how: given.append(how), with_kwargs=True)
    model(*pair(clips), masks, even(2), 0)
    ((args, more),) = given
    assert same(list(args), list(pair(clips))) and not more


def test_the_loss_is_float32_under_bf16_autocast():
    model, clips, masks = nano_model(), clips_of(2), masks_of(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, part = model(*pair(clips), masks, even(2), 0)
    assert {x.dtype for x in (loss, *(x for some in part.values() for x in some.values()))} == {torch.float32}
    assert loss.item() == pytest.approx(nano_model()(*pair(clips), masks, even(2), 0)[0].item(), rel=0.05)


@pytest.mark.parametrize("modalities", MODALITIES)
def test_the_predictor_against_a_loop_over_its_tokens(modalities):
    """An input projection for each modality, a mask token for each modality and set, 3-D and 2-D sine-cosine positions, shared blocks."""
    model, masks = nano_model(modalities), masks_of(2, 3, modalities)
    for s, some in enumerate(masks):
        h = random(2, sum(context.shape[1] for context, _ in some.values()), DIM, seed=s)
        found = model.predictor(h, some, s)
        assert list(found) == list(some)
        for b in range(2):
            expected = slow_predictor(model.predictor, h[b], {m: (c[b], t[b]) for m, (c, t) in some.items()}, s)
            for m in some:
                torch.testing.assert_close(found[m][b], expected[m], atol=1e-5, rtol=1e-4)
        other = model.predictor(h, some, 1 - s)                                 # the mask tokens of the other set
        assert all((other[m] - found[m]).abs().max() > 1e-3 for m in some)
    assert model.predictor.mask_tokens[m].shape == (2, WIDTH) and {b.heads for b in model.predictor.transformer.blocks} == {WIDTH // 32}


def change(clips, places, m):
    """The clips with other pixels at the patches `places` (B, K) of modality m."""
    x, size = clips[m].clone(), (2, 4, 4) if m == "video" else (4, 4)
    for b, j in ((b, j) for b, row in enumerate(places.tolist()) for j in row):
        x[(b, slice(None), *(slice(p * n, p * n + n) for p, n in zip(np.unravel_index(j, SMALL[m]), size)))] += 9
    return clips | {m: x}


def test_what_is_hidden_changes_no_bit_of_the_context_nor_of_a_prediction():
    model, clips, masks = nano_model(), clips_of(2), masks_of(2)
    for (s, some), m in itertools.product(enumerate(masks), SMALL):
        found = []
        for given in (clips, change(clips, some[m][1], m), change(clips, some[m][0][:, :1], m)):        # hidden; visible
            h = model.see(model.context_encoder.embed(*pair(given)), some)
            found.append({"h": h, **model.predictor(h, some, s)})
        assert same(found[0], found[1]) and not any(torch.equal(found[0][k], found[2][k]) for k in found[0])
        losses = [model(*pair(given), masks[s:s + 1], even(2), 0)[1]["losses"] for given in (clips, change(clips, some[m][1], m))]
        assert all(losses[0][k] != losses[1][k] for k in losses[0])             # the teacher sees it


def test_the_context_of_one_modality_changes_what_is_predicted_of_the_other_and_the_gradient_reaches_it():
    model, some = nano_model(), masks_of(2)[0]
    for m, other in (("audio", "video"), ("video", "audio")):
        clips = {k: x.requires_grad_() for k, x in clips_of(2).items()}
        model.predictor(model.see(model.context_encoder.embed(*pair(clips)), some), some, 0)[other].square().sum().backward()
        size, reached = (1, 2, 4, 4) if m == "video" else (1, 4, 4), clips[m].grad.abs()
        reached = F.avg_pool3d(reached, size[1:], size[1:]) if m == "video" else F.avg_pool2d(reached, size[1:], size[1:])
        hidden = maps(some[m][1], SMALL[m])
        assert (reached.mean(1) > 0).numpy().tolist() == (~hidden).tolist()     # all that is visible, and nothing that is hidden


def test_to_exchange_two_hidden_tokens_exchanges_their_predictions():
    model, some = nano_model(), masks_of(2)[1]
    h = random(2, sum(context.shape[1] for context, _ in some.values()), DIM)
    one = model.predictor(h, some, 1)
    for m, (context, target) in some.items():
        swap = [target.shape[1] - 1, *range(1, target.shape[1] - 1), 0]
        other = model.predictor(h, some | {m: (context, target[:, swap])}, 1)
        for k in some:
            torch.testing.assert_close(one[k][:, swap] if k == m else one[k], other[k], atol=1e-5, rtol=1e-5)
        assert min(torch.pdist(x).min() for x in one[m]) > 1e-3                 # no two places have the same prediction


def gradients(model, clips, masks, weight, which=None):
    """{name: gradient} of the loss, or of a modality's term alone."""
    loss, part = model(*pair(clips), masks, weight, 0)
    model.zero_grad(), (part["losses"][which] if which else loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modalities", MODALITIES)
def test_no_gradient_reaches_the_teacher_and_all_else_has_one(modalities):
    model = nano_model(modalities)
    found = gradients(model, clips_of(2, modalities), masks_of(2, 0, modalities), even(2, modalities))
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    students = {name: p for name, p in model.named_parameters() if not name.startswith("target_encoder.")}
    assert found.keys() == students.keys() and all(g.abs().sum() > 0 for g in found.values())
    for m in model.grids:                                                       # of each mask token
        assert (found[f"predictor.mask_tokens.{m}"].abs().sum(1) > 0).all()
    groups = common.weight_decay_groups(model, 0.04)                            # as main calls it
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, students.values()))


@pytest.mark.parametrize("modalities,other", [("video", "audio"), ("audio", "video")])
def test_the_model_of_one_modality_has_nothing_of_the_other_and_is_the_joint_one_without_it(modalities, other):
    model, both = nano_model(modalities), nano_model()
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]}
    assert not any(other in name or name.endswith("modality") for name in names) and list(model.grids) == [modalities]
    assert model.context_encoder.modality is None and getattr(model.context_encoder, other) is None
    left = {name for name in both.state_dict() if other not in name and not name.endswith("encoder.modality")}
    assert set(model.state_dict()) == left                                      # all else is the same
    assert {name: both.state_dict()[name].shape for name in left} == {name: x.shape for name, x in model.state_dict().items()}
    found = gradients(model, clips_of(2, modalities), masks_of(2, 0, modalities), even(2, modalities))
    assert not any(other in name for name in found)
    recipe = recipe_of("--modalities", modalities)
    inputs = avjepa_ncsu.make_inputs(recipe)
    assert set(avjepa_ncsu.encoder_config(recipe, inputs)) == {"size", "positions", "checkpoint", modalities}
    assert (inputs.frames, inputs.n_mels) == ((16, 0) if modalities == "video" else (0, 128))
    with pytest.raises(UserError, match=f"takes no {other}"):
        model.context_encoder(**clips_of(1))


def test_a_clip_without_sound_does_not_count_in_the_audio_term():
    model, clips, masks = nano_model(), clips_of(3), masks_of(3)
    batch = {"has_video": torch.ones(3, dtype=torch.bool), "has_audio": torch.tensor([True, False, True])}
    (weight,) = avjepa_ncsu.weigh([batch], ("video", "audio"), Process(torch.device("cpu")))
    assert weight["audio"].tolist() == [0.5, 0, 0.5] and weight["video"].tolist() == pytest.approx([1 / 3] * 3)
    _, part = model(*pair(clips), masks, weight, 0)
    two = [0, 2]
    _, other = model(*pair({m: x[two] for m, x in clips.items()}),
                     [{m: tuple(x[two] for x in some[m]) for m in some} for some in masks], even(2), 0)
    assert part["losses"]["audio"].item() == pytest.approx(other["losses"]["audio"].item(), rel=1e-5)
    assert abs(part["losses"]["video"].item() - other["losses"]["video"].item()) > 1e-5
    found = gradients(model, clips, masks, weight, "audio")
    for name, g in gradients(model, clips | {"video": clips["video"] + torch.tensor([0, 5, 0]).view(3, 1, 1, 1, 1)}, masks, weight,
                             "audio").items():
        assert torch.equal(g, found[name])                                      # of that clip nothing is in the audio term's gradient


def test_a_batch_without_sound_leaves_zeros_and_no_nan():
    model, clips, masks = nano_model(), clips_of(2), masks_of(2)
    batch = {"has_video": torch.ones(2, dtype=torch.bool), "has_audio": torch.zeros(2, dtype=torch.bool)}
    (weight,) = avjepa_ncsu.weigh([batch], ("video", "audio"), Process(torch.device("cpu")))
    loss, part = model(*pair(clips), masks, weight, 0)
    assert part["losses"]["audio"] == part["nothing"]["audio"] == 0 and loss == part["losses"]["video"] > 0
    found = gradients(model, clips, masks, weight)
    assert all(g.isfinite().all() for g in found.values()) and found["predictor.mask_tokens.audio"].abs().max() > 0    # seen, not asked
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_the_weights_of_a_step_are_a_mean_over_all_its_micro_batches():
    both, process = torch.tensor([True, True]), Process(torch.device("cpu"))
    some = [{"has_video": both, "has_audio": torch.tensor(has)} for has in ([True, True], [False, True], [False, False])]
    weight = avjepa_ncsu.weigh(some, ("video", "audio"), process)
    third = pytest.approx(1 / 3)
    assert [w["audio"].tolist() for w in weight] == [[third, third], [0, third], [0, 0]]
    assert all(w["video"].tolist() == [pytest.approx(1 / 6)] * 2 for w in weight)
    assert avjepa_ncsu.weigh([{"has_video": torch.tensor([True, False])}], ("video",), process)[0]["video"].tolist() == [1, 0]


def test_one_batch_is_learnt_without_collapse():
    """Each clip has a colour and a spectrum of its own, and patches that differ."""
    common.seed_step(0, 0)
    model = AVJEPA(nano_config(), 2, 64, 1)
    video = 0.6 * random(6, 3, 2, 4, 4) + 1.4 * random(6, 3, 1, 1, 1, seed=7)
    audio = 0.6 * random(6, 1, 3, 7) + 1.4 * random(6, 1, 3, 1, seed=8)
    clips = {"video": video.repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4),
             "audio": audio.repeat_interleave(4, 2).repeat_interleave(4, 3)}
    masks, optimizer, stds = masks_of(6), torch.optim.AdamW(common.weight_decay_groups(model, 0.04)), []
    for step in range(100):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, (step + 1) / 15) * (1 - step / 110)
        loss, part = model(*pair(clips), masks, even(6), step)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        common.ema_update(model.target_encoder, model.context_encoder, 0.99)
        stds.append({m: common.health(x)[0] for m, x in part["embedding"].items()})
    for m, x in part["embedding"].items():
        assert part["losses"][m].item() < 0.6 * part["nothing"][m].item() and part["nothing"][m].item() > 0.15, m
        assert stds[-1][m] > 0.3 * stds[0][m] and common.health(x)[1] > 2, m


# ---- a checkpoint, and what the pixel probe decodes -----------------------------------------------------------------

@torch.no_grad()
def slow_imagine(model, clips, masks, s):
    """(B, N, D), (B, N), token by token."""
    out, which = [], []
    for b in range(len(next(iter(clips.values())))):
        places = {m: (context[b], target[b]) for m, (context, target) in masks[s].items()}
        h = slow_see(model.context_encoder, patch_tokens(model.context_encoder, {m: x[b] for m, x in clips.items()}), places)
        predictions, row, tokens, hidden = slow_predictor(model.predictor, h, places, s), 0, [], []
        for m, (context, target) in places.items():
            context, target = context.tolist(), target.tolist()
            for j in range(math.prod(SMALL[m])):
                tokens.append(predictions[m][target.index(j)] if j in target else h[row + context.index(j)])
                hidden.append(j in target)
            row += len(context)
        out.append(torch.stack(tokens)), which.append(hidden)
    return torch.stack(out), torch.tensor(which)


@pytest.mark.parametrize("modalities,given", [("av", "av"), ("av", "video"), ("av", "audio"), ("video", "video"), ("audio", "audio")])
def test_imagined_are_the_contexts_tokens_where_a_patch_is_visible_and_the_predictors_where_it_is_hidden(modalities, given):
    model, clips, recipe = nano_model(modalities), clips_of(2, given), small_recipe("--modalities", modalities)
    for step in range(4):                                                       # the mask sets in turn
        tokens, hidden = avjepa_ncsu.imagine(model, recipe, clips, 5, step)
        masks = draw_masks(5, step, 0, 2, {m: SMALL[m] for m in clips}, recipe)
        expected, which = slow_imagine(model, clips, masks, step % 2)
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(hidden, which) and not tokens.requires_grad
        at = 0
        for m in clips:
            changed = change(clips, masks[step % 2][m][1], m)                   # what is hidden does not leak
            assert torch.equal(avjepa_ncsu.imagine(model, recipe, changed, 5, step)[0], tokens)
            n = math.prod(SMALL[m])
            assert torch.equal(hidden[:, at:at + n].sum(1), torch.full((2,), masks[step % 2][m][1].shape[1]))
            at += n


def test_a_model_imagines_nothing_of_a_modality_that_it_was_not_trained_on():
    for modalities, given in (("video", "audio"), ("audio", "video"), ("video", "av")):
        with pytest.raises(UserError, match=f"--modalities {modalities} has no predictor for") as error:
            avjepa_ncsu.imagine(nano_model(modalities), small_recipe("--modalities", modalities), clips_of(2, given), 0, 0)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe and the sizes of the paper
# ---------------------------------------------------------------------------------------------------------------------

def test_the_paper_recipe_is_the_table_of_the_papers_page():
    recipe = recipe_of()
    expected = dict(size="base", frames=16, stride=4, image=224, tubelet=(2, 16, 16), mel_patch=(16, 16), n_fft=2048, hop=512, n_mels=128,
                    columns=192, video_blocks=((8, 0.15), (2, 0.7)), audio_block=(4, 6), pred_depth=12, pred_dim=384, tau=(0.998, 1.0),
                    clips=30_000, batch_size=24, steps=2000, schedule=112_500, lr_start=2e-4, lr=6.25e-4, lr_end=1e-6, warmup=12_000,
                    weight_decay=(0.04, 0.4), clip=10.0, modalities="av", mask_per="clip")
    assert {name: recipe[name] for name in expected} == expected
    inputs = avjepa_ncsu.make_inputs(recipe)
    assert (inputs.frames, inputs.size, inputs.window, inputs.win_length, inputs.log) == (16, 224, "hann", 2048, "db_max")
    assert inputs.frame_rate * inputs.seconds == pytest.approx(64) and inputs.mel_frames == 192 and inputs.video_seconds is None
    assert math.prod(inputs.crop_scale) == 0.3


def test_the_three_learning_rates_are_a_tenth_for_vit_small_and_scale_with_the_one_that_is_asked_for():
    names, whole = ("lr_start", "lr", "lr_end"), [2e-4, 6.25e-4, 1e-6]
    for flags, factor in (([], 1), (["--size", "tiny"], 1), (["--size", "base"], 1), (["--size", "small"], 0.1), (["--lr", 1.25e-3], 2),
                          (["--size", "small", "--lr", 6.25e-4], 1), (["--lr", 0], 0)):
        recipe = recipe_of(*flags)
        assert [recipe[name] for name in names] == pytest.approx([factor * x for x in whole], rel=1e-12)
    start, end = (avjepa_ncsu.RECIPE[name][1] / avjepa_ncsu.RECIPE["lr"][1] for name in ("lr_start", "lr_end"))
    toy = avjepa_ncsu.get_args(["--lr", "1"])[1]
    assert [toy[name] for name in names] == pytest.approx([start, 1, end])


def block_parameters(d, m):
    return 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d


@pytest.mark.parametrize("size,dim,heads,total", [("tiny", 192, 3, 5.7e6), ("small", 384, 6, 21.5e6), ("base", 768, 12, 86e6)])
def test_the_paper_builds_a_vit_over_1568_and_96_tokens_and_a_narrow_predictor(size, dim, heads, total):
    recipe = recipe_of("--size", size)
    config = avjepa_ncsu.encoder_config(recipe, avjepa_ncsu.make_inputs(recipe), True)
    with torch.device("meta"):
        model = AVJEPA(config, 2, recipe["pred_dim"], recipe["pred_depth"])
        video, audio = torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 192)
        both, sound = model.context_encoder.embed(video, audio), model.context_encoder.embed(audio=audio)
    assert {m: tuple(grid) for m, grid in model.grids.items()} == FULL
    assert both.shape == (1, 1568 + 96, dim) and sound.shape == (1, 96, dim)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    stems = (3 * 2 * 16 * 16 + 1) * dim + (16 * 16 + 1) * dim + 2 * dim         # the positions are fixed; and the modality
    assert count["context_encoder"] == count["target_encoder"] == 12 * block_parameters(dim, 4 * dim) + stems + 2 * dim
    assert count["context_encoder"] == pytest.approx(total, rel=0.03)
    # two projections, two mask tokens for each modality, norm, head
    assert count["predictor"] == 12 * block_parameters(384, 1536) + 2 * (dim + 1) * 384 + 2 * 2 * 384 + 2 * 384 + (384 + 1) * dim
    for part, d, h in ((model.context_encoder, 12, heads), (model.predictor, 12, 12)):
        assert len(part.transformer.blocks) == d and {b.heads for b in part.transformer.blocks} == {h} and part.transformer.checkpoint
    assert model.context_encoder.cls is None and set(count) == {"context_encoder", "target_encoder", "predictor"}


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

LITTLE = ["--size", "nano", "--workers", "0", "--device", "cpu"]


def flags(folder, out, *more):
    """A run on a folder of clips: without the report at the end."""
    return ["--data", "folder", "--data-dir", str(folder), "--recipe", "toy", "--out", str(out), "--batch-size", "4", "--log-every", "1",
            "--save-every", "1", *LITTLE, *map(str, more)]


def little(patch):
    """A small predictor, few and small pictures, a small mel and its statistics over four clips, in both columns of the recipe; and rates
    of the toy's that do not change with it."""
    patch.setitem(common.SIZES, "nano", NANO)
    for name, value in (("stats_clips", 4), ("pred_dim", WIDTH), ("pred_depth", 1), ("image", 16), ("frames", 4), ("stride", 2),
                        ("seconds", 0.8), ("tubelet", (2, 8, 8)), ("sample_rate", 16000), ("n_fft", 512), ("hop", 160), ("n_mels", 16),
                        ("columns", 32), ("mel_patch", (4, 8)), ("audio_block", (2, 2)), ("video_blocks", ((8, 0.15), (2, 0.7)))):
        patch.setitem(avjepa_ncsu.RECIPE, name, (value, value, ""))
    for name, value in (("tau", (0.99, 1.0)), ("schedule", None), ("lr_start", 1e-4), ("lr", 1e-3), ("lr_end", 1e-4), ("warmup", 100)):
        patch.setitem(avjepa_ncsu.RECIPE, name, (avjepa_ncsu.RECIPE[name][0], value, ""))


@pytest.fixture
def quick(monkeypatch):
    little(monkeypatch)
    monkeypatch.setattr(common, "draw_curves", lambda *a: None)


def quiet(rows):
    """The rows of a log without its times."""
    return [{k: v for k, v in row.items() if not k.startswith("ms_")} for row in rows]


TERMS = ("video", "audio")


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A finished run of four steps on the toy world with its evaluation, and the checkpoint after each step."""
    out, saved = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        real = common.save_checkpoint
        patch.setattr(common, "save_checkpoint", lambda path, **content: (saved.append(copy.deepcopy(content)), real(path, **content)))
        patch.setattr(probe, "frozen_schedule", lambda clips: (8, 5))
        avjepa_ncsu.main(["--data-dir", str(toy), "--out", str(out), "--batch-size", "4", "--steps", "4", "--log-every", "1",
                          "--save-every", "1", *LITTLE])
    return out, saved


def test_a_run_leaves_checkpoint_log_curves_and_results(run):
    out, _ = run
    rows = common.read_log(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert np.isfinite(list(row.values())).all() and row["loss"] == pytest.approx(row["video"] + row["audio"], rel=1e-4)
        assert all(row[m] > 0 and row[f"{m}/know_nothing"] > 0 for m in TERMS)
        assert {"std_video", "std_audio", "rank_video", "rank_audio", "grad_norm", "tau", "lr", "no_audio", "no_video"} < row.keys()
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds") > 0 and set(results) == {"trained", "untrained", "raw input", "chance"}
    for row in results.values():
        assert all(0 <= row[m] <= 100 for m in MODALITIES)


def test_in_a_run_the_teacher_follows_the_student_by_a_momentum_that_rises_linearly(run):
    out, saved = run
    content = weights(out)
    common.seed_step(content["args"]["seed"], 0)
    teacher, (first, last) = common.ViT(**content["encoder"]).state_dict(), content["recipe"]["tau"]
    assert [c["step"] for c in saved] == [1, 2, 3, 4] and content["recipe"]["schedule"] == 4
    for c, row in zip(saved, common.read_log(out)):
        student, now = ({k[len(name):]: v for k, v in c["model"].items() if k.startswith(name)}
                        for name in ("context_encoder.", "target_encoder."))
        tau = first + (last - first) * row["step"] / 4
        assert row["tau"] == pytest.approx(tau, abs=1e-12) and now.keys() == student.keys() == teacher.keys()
        for name in now:
            torch.testing.assert_close(now[name], tau * teacher[name] + (1 - tau) * student[name], atol=1e-6, rtol=1e-5)
        assert any(not torch.equal(student[name], teacher[name]) for name in now)
        teacher = now


def cosine(step, steps, start, end):
    return end + (start - end) / 2 * (1 + math.cos(math.pi * step / (steps - 1)))


def test_at_each_step_of_the_papers_schedule_rates_momentum_decay_and_clipping_are_those_of_its_formulas(toy, quick, tmp_path, monkeypatch):
    """Single steps of a run of 90,000 under a schedule of 112,500, with a gradient 1e4 times too large."""
    seen, real, loss = [], torch.optim.AdamW.step, avjepa_ncsu.prediction_loss

    def spy(self, *a):
        grads = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        seen.append(([{k: group[k] for k in ("lr", "weight_decay")} for group in self.param_groups], grads.norm().item(),
                     [sorted({p.ndim for p in group["params"]}) for group in self.param_groups]))
        return real(self, *a)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(avjepa_ncsu, "prediction_loss", lambda *a: 1e4 * loss(*a))
    monkeypatch.setattr(common, "StopSignal", lambda: StopAfter(1))
    for step in (0, 2000, 11_999, 12_000, 60_000, 89_998):
        if step:                                                                # go on from there
            torch.save(weights(tmp_path) | {"step": step}, tmp_path / "latest.pt")
        avjepa_ncsu.main(flags(toy / "train", tmp_path, "--recipe", "paper", "--steps", 90_000))
        row, (groups, norm, dims) = common.read_log(tmp_path)[-1], seen[-1]
        lr = 2e-4 + 4.25e-4 * (step + 1) / 12_000 if step < 12_000 else cosine(step - 12_000, 100_500, 6.25e-4, 1e-6)
        assert row["step"] == step and row["lr"] == pytest.approx(lr, rel=1e-9) and all(g["lr"] == row["lr"] for g in groups)
        assert row["tau"] == pytest.approx(0.998 + 0.002 * step / 112_500, abs=1e-12)
        assert groups[0]["weight_decay"] == pytest.approx(cosine(step, 112_500, 0.04, 0.4), rel=1e-9) and groups[1]["weight_decay"] == 0
        assert min(dims[0]) >= 2 and 1 in dims[1]
        assert row["grad_norm"] > 1000 and norm == pytest.approx(10 if step >= 12_000 else row["grad_norm"], rel=1e-3)
    assert weights(tmp_path)["recipe"]["schedule"] == 112_500 and len(seen) == 6


def test_stopped_by_sigterm_at_two_of_four_steps_and_continued_equals_four_bit_for_bit(toy, run, quick, tmp_path, monkeypatch, capsys):
    out, _ = run
    args = ["--data-dir", str(toy), "--out", str(tmp_path), "--batch-size", "4", "--steps", "4", "--log-every", "1", *LITTLE]
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    handlers, calls, ema = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)], [], common.ema_update
    with monkeypatch.context() as patch:
        patch.setattr(common, "ema_update", lambda *a: (ema(*a), calls.append(1), len(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM)))
        avjepa_ncsu.main(args)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers):
        signal.signal(number, handler)
    assert weights(tmp_path)["step"] == len(calls) == 2 and "the same command goes on" in capsys.readouterr().out
    with monkeypatch.context() as patch:                                        # the mel's statistics come from the checkpoint
        patch.setattr(data, "mel_stats", None)
        avjepa_ncsu.main(args)
    one, two = weights(out), weights(tmp_path)
    assert all(one["model"][f"mean_{m}"].abs().sum() > 0 for m in TERMS)
    assert all(same(one[key], two[key]) for key in ("step", "steps", "model", "optimizer", "recipe", "inputs", "encoder"))
    rows, again = (quiet(common.read_log(o)) for o in (out, tmp_path))
    assert rows == again and len(rows) == 4


def test_restore_gives_back_the_model_bit_for_bit_and_imagines_with_it(toy, run, quick):
    out, _ = run
    content = common.load_checkpoint(out, "avjepa_ncsu")
    model = avjepa_ncsu.restore(content)
    assert same(dict(model.state_dict()), content["model"]) and set(model.grids) == {"video", "audio"}
    clip = data.load_clip(toy / "test" / "00000.mp4", content["inputs"])
    tokens, hidden = avjepa_ncsu.imagine(model, content["recipe"], clip, 0, 0)
    n = sum(math.prod(grid) for grid in model.grids.values())
    assert tokens.shape == (1, n, DIM) and hidden.shape == (1, n) and 0 < hidden.sum() < n
    content["model"].pop("mean_video")
    with pytest.raises(UserError, match="other names"):
        avjepa_ncsu.restore(content)


def test_load_encoder_gives_the_tokens_of_the_context_encoder_for_one_modality_or_both(toy, run):
    out, _ = run
    content, encoder = weights(out), common.load_encoder(out)
    clip = data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)
    model = AVJEPA(content["encoder"], 2, WIDTH, 1)
    model.load_state_dict(content["model"])
    with torch.no_grad():
        for given in ({"audio": clip["audio"]}, {"video": clip["video"]}, clip):
            tokens, embedding = encoder(**given)
            assert torch.equal(tokens, model.context_encoder(**given)) and not torch.equal(tokens, model.target_encoder(**given))
            assert torch.equal(common.load_encoder(out, weights="target")(**given)[0], model.target_encoder(**given))
            torch.testing.assert_close(embedding, tokens.mean(1))
        alone = encoder(audio=clip["audio"])[0]
        for name, p in encoder.vit.named_parameters():                          # nothing of the video is in it
            if name.startswith("video."):
                p.fill_(float("nan"))
        encoder.vit.modality[0] = float("nan")
        assert torch.equal(encoder(audio=clip["audio"])[0], alone)
    assert encoder.method == "avjepa_ncsu" and encoder.projector is None and encoder.cross is None and encoder.step == 4
    common.seed_step(0, 0)
    begin = AVJEPA(content["encoder"], 2, WIDTH, 1).target_encoder
    untrained = common.load_encoder(out, untrained=True)
    assert same(untrained.vit.state_dict(), begin.state_dict()) and torch.equal(untrained(**clip)[0], begin(**clip))


@pytest.mark.parametrize("modalities", ["video", "audio"])
def test_a_run_of_one_modality_reports_that_one_and_its_encoder_takes_it_alone(toy, quick, tmp_path, monkeypatch, modalities):
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips: (8, 2))
    avjepa_ncsu.main(["--data-dir", str(toy), "--out", str(tmp_path), "--batch-size", "4", "--steps", "1", "--log-every", "1",
                      "--modalities", modalities, *LITTLE])
    results = json.loads((tmp_path / "results.json").read_text())
    results.pop("seconds")
    assert all(set(row) == {modalities} for row in results.values())
    (row,) = common.read_log(tmp_path)
    assert np.isfinite(list(row.values())).all() and row["loss"] == pytest.approx(row[modalities])
    other = "audio" if modalities == "video" else "video"
    assert not any(other in name for name in (*(row.keys() - {"no_audio", "no_video"}), *weights(tmp_path)["model"]))
    clip = data.load_clip(toy / "test" / "00000.mp4", common.load_encoder(tmp_path).inputs)
    assert set(clip) == {modalities} and common.load_encoder(tmp_path)(**clip)[0].shape[2] == DIM


def watch(patch):
    """What a run reads, (clip, its random state), and what the model is given, (video, audio, masks), as it comes."""
    seen, item, forward = [], data.Clips.item, AVJEPA.forward
    patch.setattr(data.Clips, "item", lambda self, index, rng: (
        seen.append((int(index), rng.bit_generator.state["state"]["state"])), item(self, index, rng))[1])
    patch.setattr(AVJEPA, "forward", lambda self, *a: (seen.append(a[:3]), forward(self, *a))[1])
    return seen


def test_runs_with_and_without_sound_see_the_same_pictures_under_the_same_masks(toy, quick, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(data, "mel_stats", lambda *a: (torch.zeros(16), torch.ones(16)))
    for modalities in MODALITIES:
        with monkeypatch.context() as patch:
            seen = watch(patch)
            avjepa_ncsu.main(flags(toy / "train", tmp_path / modalities, "--steps", 2, "--modalities", modalities))
        found[modalities] = seen
    for modalities, seen in found.items():
        assert [x for x in seen if len(x) == 2] == [x for x in found["av"] if len(x) == 2] and len(seen) == 8 + 2
        for one, both in zip(*([x for x in s if len(x) == 3] for s in (seen, found["av"]))):
            for m, x, y in zip(TERMS, one, both):
                assert torch.equal(x, y) if m in MODALITIES[modalities] else x is None
            assert same([{m: some[m] for m in MODALITIES[modalities]} for some in both[2]], one[2])


@pytest.mark.parametrize("variant", [["--accumulate", "2", "--mask-per", "batch"], ["--checkpoint-activations", "--seconds", "0.5"]],
                         ids=" ".join)
def test_each_variant_trains_and_leaves_no_parameter_without_a_gradient(toy, quick, tmp_path, monkeypatch, variant):
    """DDP refuses unused parameters: whatever a flag drops must not be built."""
    models, seen, build, real = [], [], AVJEPA.__init__, torch.optim.AdamW.step
    monkeypatch.setattr(AVJEPA, "__init__", lambda self, *a: (build(self, *a), models.append(self))[0])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (seen.append(
        {name for name, p in models[0].named_parameters() if p.grad is None}), real(self, *a))[1])
    avjepa_ncsu.main(flags(toy / "train", tmp_path, "--steps", 2, *variant))
    assert seen == [{name for name, _ in models[0].named_parameters() if name.startswith("target_encoder.")}] * 2
    rows = common.read_log(tmp_path)
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() and row["grad_norm"] > 0 for row in rows)


def test_the_gradient_of_a_step_is_the_sum_over_its_micro_batches_of_the_whole_steps_mean(toy, clips, quick, tmp_path, monkeypatch):
    """--accumulate 2 = 1: the same loss, gradient, embeddings, also where the clips without sound are all in one of them."""
    monkeypatch.setattr(common, "start_process", lambda device: Process(torch.device("cpu")))               # without bf16
    folder = silent_folder(toy, clips, tmp_path / "clips", {0, 1})
    for name, more in (("one", []), ("two", ["--accumulate", "2"])):
        avjepa_ncsu.main(flags(folder, tmp_path / name, "--steps", 1, *more))
    one, two = (common.read_log(tmp_path / name)[0] for name in ("one", "two"))
    assert one["no_audio"] == two["no_audio"] == 2
    for key in ("loss", "grad_norm", *TERMS, *(f"{x}_{m}" for x in ("std", "rank") for m in TERMS)):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key
    one, two = (weights(tmp_path / name)["optimizer"]["state"] for name in ("one", "two"))
    for number in one:
        torch.testing.assert_close(one[number]["exp_avg"], two[number]["exp_avg"], atol=1e-6, rtol=1e-3)


def silent_folder(toy, clips, folder, silent, count=8):
    """A folder of `count` clips, of which those in the places `silent` of the first epoch (seed 0) have no sound."""
    folder.mkdir()
    order = np.random.default_rng((0, 0)).permutation(count)
    mute, loud = (clips / "silent.mp4").read_bytes(), sorted((toy / "train").glob("*.mp4"))
    for place, index in enumerate(order):
        (folder / f"{index:02d}.mp4").write_bytes(mute if place in silent else loud[index].read_bytes())
    return folder


def test_a_step_without_any_sound_trains_the_video_alone_and_is_counted_and_the_run_goes_on(toy, clips, quick, tmp_path):
    folder = silent_folder(toy, clips, tmp_path / "clips", {1, 2, 3})
    avjepa_ncsu.main(flags(folder, tmp_path / "run", "--steps", 4, "--batch-size", 2))
    rows = common.read_log(tmp_path / "run")
    assert [row["no_audio"] for row in rows] == [1, 3, 3, 3] and all(np.isfinite(list(row.values())).all() for row in rows)
    for row in rows:
        assert (row["audio"] == 0) == (row["audio/know_nothing"] == 0) == (row["step"] == 1) and row["video"] > 0
    assert rows[1]["loss"] == pytest.approx(rows[1]["video"]) and rows[1]["grad_norm"] > 0
    assert all(x.isfinite().all() for x in weights(tmp_path / "run")["model"].values())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(toy, quick, tmp_path, monkeypatch):
    real, calls = avjepa_ncsu.prediction_loss, []
    monkeypatch.setattr(avjepa_ncsu, "prediction_loss", lambda *a: (calls.append(1), real(*a) * (math.nan if len(calls) > 4 else 1))[1])
    with pytest.raises(UserError, match="not finite at step 1"):                # four calls a step: two sets, and knowing nothing
        avjepa_ncsu.main(flags(toy / "train", tmp_path, "--steps", 3, "--modalities", "video"))
    assert weights(tmp_path)["step"] == 1 and all(x.isfinite().all() for x in weights(tmp_path)["model"].values())


def test_clips_are_that_many_of_the_set_always_the_same_and_with_0_all(toy, quick, tmp_path, monkeypatch, capsys):
    found, build = [], data.Clips.__init__
    monkeypatch.setattr(data, "mel_stats", lambda *a: (torch.zeros(16), torch.ones(16)))
    monkeypatch.setattr(data.Clips, "__init__", lambda self, listing, *a, **more: (
        found.append([listing.path(i) for i in range(len(listing))]), build(self, listing, *a, **more))[1])
    every = [str(path) for path in sorted((toy / "train").glob("*.mp4"))]
    for i, (count, seed) in enumerate(((10, 0), (10, 1), (20, 0), (0, 0), (24, 0), (1000, 0))):
        avjepa_ncsu.main(flags(toy / "train", tmp_path / str(i), "--steps", 1, "--clips", count, "--seed", seed))
        assert ("of which" in capsys.readouterr().out) == (0 < count < 24)
    assert [len(files) for files in found] == [10, 10, 20, 24, 24, 24] and found[3] == found[4] == found[5] == every
    assert found[0] == found[1] == sorted(found[0]) and set(found[0]) < set(found[2]) < set(every) and found[0] != every[:10]
    assert recipe_of()["clips"] == 30_000 and recipe_of("--clips", 0)["clips"] == 0
    with pytest.raises(UserError, match="clips 10 .now 11."):                   # another set is another run
        avjepa_ncsu.main(flags(toy / "train", tmp_path / "0", "--steps", 1, "--clips", 11))


# ---- two processes --------------------------------------------------------------------------------------------------

HAS = {0: [True, False, True, True], 1: [False] * 4}            # the second process has no clip with sound


def part_of(rank):
    """Micro-batches of a process: [(clips, masks, weights' input)]"""
    clips, masks, has = clips_of(8, seed=3), masks_of(4, 6, rank=rank), torch.tensor(HAS[rank])
    return [({m: x[rank::2][part] for m, x in clips.items()}, [{m: tuple(x[part] for x in some[m]) for m in some} for some in masks],
             {"has_video": torch.ones(2, dtype=torch.bool), "has_audio": has[part]}) for part in (slice(0, 2), slice(2, 4))]


def on_a_rank(rank, folder, clips):
    """What one of two processes does; what it finds goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process, found = Process(torch.device("cpu"), rank, 2), {}
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        model = nano_model()
        wrapped, micro = process.wrap(model), part_of(rank)                     # it must live until after the backward pass
        weight, total = avjepa_ncsu.weigh([m[2] for m in micro], TERMS, process), 0
        for i, (m, w) in enumerate(zip(micro, weight)):
            with wrapped.no_sync() if i == 0 else common.contextlib.nullcontext():
                loss, part = wrapped(*pair(m[0]), m[1], w, 0)
                loss.backward()
            total += torch.stack([loss, *part["losses"].values()]).detach()
        found["loss"], found["gradient"] = total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        seen, item, models, build = [], data.Clips.item, [], AVJEPA.__init__    # and a real run, in the same process group
        patch.setattr(data.Clips, "item", lambda self, index, rng: (seen.append(int(index)), item(self, index, rng))[1])
        patch.setattr(AVJEPA, "__init__", lambda self, *a: (build(self, *a), models.append(self))[0])
        patch.setattr(common, "start_process", lambda device: process)
        patch.setattr(common, "draw_curves", lambda *a: None)
        avjepa_ncsu.main(flags(Path(clips), Path(folder) / "run", "--steps", 2, "--batch-size", 8, "--accumulate", 2))
        found["run"] = {"seen": seen[-8:], "weights": {k: p.detach() for k, p in models[0].named_parameters()}}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(toy, clips, tmp_path_factory):
    """In the first step of the run, the second process has clips without sound only."""
    folder = tmp_path_factory.mktemp("ranks")
    silent_folder(toy, clips, folder / "clips", {1, 3, 5, 7, 8, 9}, 16)
    torch.multiprocessing.spawn(on_a_rank, (str(folder), str(folder / "clips")), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)], folder


def test_two_processes_of_two_micro_batches_have_the_loss_and_the_gradient_of_one_on_the_joined_batch(ranks):
    found, _ = ranks
    model, parts = nano_model(), [*part_of(0), *part_of(1)]
    masks = [{m: tuple(torch.cat([p[1][s][m][i] for p in parts]) for i in (0, 1)) for m in TERMS} for s in (0, 1)]
    batch = {key: torch.cat([p[2][key] for p in parts]) for key in ("has_video", "has_audio")}
    (weight,) = avjepa_ncsu.weigh([batch], TERMS, Process(torch.device("cpu")))
    loss, part = model(*(torch.cat([p[0][m] for p in parts]) for m in TERMS), masks, weight, 0)
    loss.backward()
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, torch.stack([loss, *part["losses"].values()]).detach(),
                               atol=1e-6, rtol=1e-5)
    assert found[1]["loss"][1] > 0 and found[1]["loss"][2] == 0
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for one in found:
        assert one["gradient"].keys() == own.keys() and not any("target_encoder" in name for name in own)
        for name, g in own.items():
            torch.testing.assert_close(one["gradient"][name], g, atol=1e-6, rtol=1e-4)


def test_a_run_of_two_processes_is_that_of_one_with_the_same_masks_also_where_one_hears_nothing(ranks, quick, tmp_path, monkeypatch):
    found, folder = ranks
    a, b = (one["run"] for one in found)
    assert len(a["seen"]) == len(b["seen"]) == 8 and not set(a["seen"]) & set(b["seen"]) and same(a["weights"], b["weights"])
    draw = avjepa_ncsu.draw_masks

    def joined(seed, step, rank, batch, **more):                                # the clips of a step in turn are one's and the other's
        each = [draw(seed, step, rank, batch // 2, **more) for rank in (0, 1)]
        return [{m: tuple(torch.stack([one[s][m][i] for one in each], 1).flatten(0, 1) for i in (0, 1)) for m in TERMS} for s in (0, 1)]

    monkeypatch.setattr(avjepa_ncsu, "draw_masks", joined)
    monkeypatch.setattr(common, "start_process", lambda device: Process(torch.device("cpu")))
    avjepa_ncsu.main(flags(folder / "clips", tmp_path, "--steps", 2, "--batch-size", 8))
    two, one = common.read_log(folder / "run"), common.read_log(tmp_path)
    assert [row["no_audio"] for row in one] == [4, 6] and [row["step"] for row in two] == [0, 1]
    for x, y in zip(one, two):
        for key in ("loss", "grad_norm", "lr", "tau", *TERMS, *(f"{n}_{m}" for n in ("std", "rank") for m in TERMS)):
            assert x[key] == pytest.approx(y[key], rel=2e-3 if x["step"] else 1e-4), (key, x["step"])
    saved = weights(folder / "run")["model"]
    assert all(torch.equal(saved[name], p) for name, p in a["weights"].items())


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "learning rate": (["--lr", "-1"], "--lr -1.0 is out of range"),
    "no step": (["--steps", "0"], "--steps 0 is out of range"),
    "one clip": (["--batch-size", "1"], "--batch-size 1 is out of range"),
    "seconds": (["--seconds", "0"], "--seconds 0.0 is out of range"),
    "seed": (["--seed", "-1"], "--seed -1 is out of range"),
    "clips": (["--clips", "-1"], "--clips -1 is out of range"),
    "unknown ViT": (["--size", "colossal"], "--size colossal: unknown ViT"),
    "not divisible": (["--accumulate", "3"], "not divisible"),
    "batch larger than the set": (["--batch-size", "100000"], "larger than the set"),
    "fewer clips than a batch": (["--clips", "3"], "larger than the set (3 clips)"),
    "no such folder": (["--data-dir", "nowhere"], "no such folder"),
    "sound alone": (["--data", "esc50"], "--data esc50 has no pictures; give --modalities audio"),
    "sound alone, video": (["--data", "fsd50k", "--modalities", "video"], "--data fsd50k has no pictures; give --modalities audio"),
    "pictures alone": (["--data", "ssv2"], "--data ssv2 has no sound; give --modalities video"),
    "pictures alone, audio": (["--data", "ssv2", "--modalities", "audio"], "--data ssv2 has no sound; give --modalities video"),
}


def guarded(capsys, args):
    """What main_guard prints on bad input, and exits with."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        common.main_guard(lambda: avjepa_ncsu.main(args))
    signal.signal(signal.SIGTERM, handler)
    return end.value.code, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("stats")]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(toy, tmp_path, quick, name, capsys):
    bad, sentence = BAD[name]
    code, lines = guarded(capsys, flags(toy / "train", tmp_path / "run", "--steps", 2, *bad))
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and sentence in lines[0]
    assert not (tmp_path / "run" / "latest.pt").exists()


def test_sets_of_sound_or_pictures_alone_train_these():
    for names, own in ((data.SOUNDS, "audio"), (data.SILENT, "video")):
        for name in names:
            assert avjepa_ncsu.get_args(["--data", name, "--data-dir", "x", "--modalities", own])[1]["modalities"] == own


def test_a_run_of_another_method_or_of_other_modalities_or_masks_is_refused_and_kept(toy, run, quick, tmp_path, capsys):
    out, _ = run
    torch.save({**weights(out), "method": "mjepa"}, tmp_path / "latest.pt")
    for folder, more, sentence in ((out, ["--modalities", "video"], "modalities av (now video)"),
                                   (out, ["--mask-per", "batch"], "mask_per clip (now batch)"),
                                   (out, ["--seconds", "0.8"], "stride 2 (now None)"),
                                   (tmp_path, [], "is a checkpoint of mjepa, not of avjepa_ncsu")):
        before = (folder / "latest.pt").read_bytes()
        code, lines = guarded(capsys, ["--data-dir", str(toy), "--out", str(folder), "--batch-size", "4", "--steps", "4", *LITTLE, *more])
        assert code == 2 and len(lines) == 1 and sentence in lines[0]
        assert (folder / "latest.pt").read_bytes() == before


def test_a_modality_that_no_clip_has_is_named_once(tmp_path, capsys):
    for i in range(4):
        write(tmp_path / f"{i}.wav", wave=0.1 * np.random.default_rng(i).standard_normal(32000), audio="pcm_s16le")
    avjepa_ncsu.main(["--data", "folder", "--data-dir", str(tmp_path), "--recipe", "toy", "--modalities", "video", "--steps", "60",
                      "--size", "nano", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")])
    shown = "".join(capsys.readouterr())
    assert shown.count("WARNING at step 49: no clip so far has video, nothing is learnt of it; give another --modalities") == 1


def test_bad_input_as_a_command_exits_with_2_and_no_traceback(tmp_path):
    done = command([sys.executable, str(ROOT / "avjepa_ncsu.py"), "--data", "esc50"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "error: --data esc50 has no pictures; give --modalities audio, or use ajepa.py"
    assert not any(tmp_path.iterdir())
