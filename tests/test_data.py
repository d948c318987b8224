"""data.py: what is on screen and heard at a time, the mel, views and batches, the toy world."""
import functools
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import av
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from matplotlib.colors import rgb_to_hsv

import common
import data
from common import UserError
from conftest import MOMENTS, RATES, ROOT, command, numbered, read_flash, read_number, same, tone, write
from data import ClipError, Inputs, View
from datasets import batches as loaders
from datasets import made, reader
from slow import mel_power

SMALL = Inputs(seconds=1.0, frames=4, size=32, resize=36, n_mels=16, mel_mean=-30.0, mel_std=20.0)
ONE_VIEW = functools.partial(data.even_views, 1, SMALL)


def four_views(rng, duration):
    """Two of both, one of sound, one of pictures, each with a start of its own."""
    starts = rng.uniform(0, max(0.0, duration - 1.0), 4)
    kinds = (("flip", True), ("flip", True), (None, True), ("random", False))
    return [View(start, 1.0, *kind) for start, kind in zip(starts.tolist(), kinds)]


# --- Read a clip ---

def numbers_of(video):
    return [read_number(picture) for picture in video]


def on_screen(fps, start, seconds, count):
    """The number of the frame that is shown in the middle of each of `count` equal parts of the window."""
    times = start + (np.arange(count) + 0.5) * seconds / count
    assert np.abs(times * float(fps) % 1 - 0.5).max() < 0.499, "a time falls on a frame's edge"
    return np.floor(times * float(fps)).astype(int).tolist()


@pytest.mark.parametrize("fps", RATES)
def test_frames_are_those_on_screen_at_evenly_spread_times(clocks, fps):
    for window in ((0, 7.9, 13), (0, 1.9, 7), (1.93, 4, 11), (3.37, 2, 5), (5.06, 2.3, 11), (6.63, 0.29, 3)):
        assert numbers_of(data.read_clip(clocks[fps], *window, 48)["video"]) == on_screen(RATES[fps], *window)


def click_time(wave, rate=16000):
    """Seconds at which the energy of the loudest 40 ms of a wave has its centre."""
    peak = np.abs(wave).argmax()
    index = np.arange(max(peak - rate // 50, 0), min(peak + rate // 50, len(wave)))
    energy = wave[index].astype(float) ** 2
    return (index * energy).sum() / energy.sum() / rate


@pytest.mark.parametrize("start", [2.51, 3.71, 5.06])
@pytest.mark.parametrize("name", [*RATES, "mkv", "ts"])
def test_a_seek_changes_nothing(clocks, name, start):
    """A first window at 0 keeps the reader from seeking; the second one must be what a seek finds."""
    windows = [(0.0, 0.1), (start, 1.7)]                                # one click in it
    with data.open_clip(clocks[name]) as clip:
        whole = clip.read(windows, windows, 9, 48, 16000)
    sought = data.read_clip(clocks[name], start, 1.7, 9, 48, 16000)
    assert np.array_equal(whole["video"][1], sought["video"])
    exact = 0.001 if name == "mkv" else 1 / 16000                       # its timestamps are in ms
    assert abs(click_time(whole["audio"][1]) - click_time(sought["audio"])) < exact
    assert all(whole[flag] == sought[flag] for flag in ("has_video", "has_audio", "short"))


@pytest.mark.parametrize("start", [0.0, 2.2, 5.0, 6.7])
@pytest.mark.parametrize("name", [*RATES, "mkv", "ts"])
def test_a_flash_and_a_click_are_found_at_the_same_time(clocks, name, start):
    """The mpeg-ts begins with the priming of its AAC: its clock is late."""
    clip = data.read_clip(clocks[name], start, 1.0, 60, 48, 16000)
    flash = start + [read_flash(picture) for picture in clip["video"]].index(True) / 60     # to a 60th of a s
    click = start + click_time(clip["audio"]) - 0.0005                              # it lasts a millisecond
    fps = float(RATES.get(name, RATES["25"]))
    moments = [round(moment * fps) / fps for moment in MOMENTS]
    truth = min(moments, key=lambda moment: abs(moment - start - 0.4))
    late = 0.03 if name == "ts" else 0.0
    assert abs(flash - click) < 1 / fps
    assert -0.001 < click - truth < 0.001 + late and -1 / 60 <= flash - truth <= 1 / 60 + late


def write_pieces(path, *pieces):
    """Sound of a level from begin to end, for each piece (begin, end, level), and nothing in between."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for begin, end, level in pieces:
            samples = np.full((1, round((end - begin) * 16000)), level, np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 16000
            frame.pts = round(begin * 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_hole_in_the_sound_stays_a_hole(tmp_path):
    write_pieces(tmp_path / "hole.mkv", (0, 1, 0.5), (1.5, 2.5, 0.5), (2.5, 3, -0.5))
    wave = data.read_clip(tmp_path / "hole.mkv", 0, 3.0, 1, 16, 16000)["audio"]
    for begin, end, level in ((0, 0.99, 0.5), (1.01, 1.49, 0.0), (1.51, 2.49, 0.5), (2.51, 3.0, -0.5)):
        assert np.abs(wave[int(begin * 16000):int(end * 16000)] - level).max() < 1e-3, begin


def test_a_wrong_timestamp_far_ahead_costs_no_memory(tmp_path):
    """One flipped bit in an mpeg-ts makes a hole of 26 hours: 6 GB of zeros, if it is filled."""
    write_pieces(tmp_path / "far.mkv", (0, 1, 0.5), (3601, 3602, 0.5))
    tracemalloc.start()
    wave = data.read_clip(tmp_path / "far.mkv", 0, 2.0, 1, 16, 16000)["audio"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and np.abs(wave[:15900] - 0.5).max() < 1e-3 and not wave[16100:].any()


def amplitude_at(wave, frequency, rate=16000):
    """Amplitude of the partial at `frequency`, over the middle of a wave, and the strongest frequency."""
    part = wave[len(wave) // 4:-len(wave) // 4]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)))) * 4 / len(part)
    return spectrum[round(frequency * len(part) / rate)], spectrum.argmax() * rate / len(part)


@pytest.mark.parametrize("end, codec, rate, asked", [
    ("mp4", "aac", 16000, 16000), ("mp4", "aac", 44100, 16000), ("mp4", "aac", 48000, 8000),
    ("mp4", "aac", 22050, 48000), ("wav", "pcm_s16le", 44100, 16000), ("flac", "flac", 48000, 24000),
    ("mkv", "pcm_f32le", 8000, 16000)])
def test_sound_is_the_mean_of_the_channels_at_the_rate_that_was_asked_for(tmp_path, end, codec, rate, asked):
    for channels in ((0.5,), (0.5, 0.5), (0.5, 0.0), (0.5, -0.5)):
        wave = np.stack([tone(1000, 4, rate, amplitude) for amplitude in channels])
        path = write(tmp_path / f"tone.{end}", wave=wave, rate=rate, audio=codec)
        for start in (0.0, 2.5):
            wave = data.read_clip(path, start, 1.0, 1, 16, asked)["audio"]
            amplitude, frequency = amplitude_at(wave, 1000, asked)
            assert wave.shape == (asked,) and wave.dtype == np.float32
            assert abs(amplitude - (np.mean(channels) or 0.5)) < 0.01       # where they cancel, the loudest
            assert abs(frequency - 1000) <= 2


TURNS = {"upright": (1, 0, 0, 1), "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0),
         "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1), "transposed": (0, 1, 1, 0)}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_clip_comes_out_upright(tmp_path, turn):
    """ISO/IEC 14496-12, tkhd: a point (x, y), y downwards, is shown at (a x + c y, b x + d y)."""
    a, b, c, d = TURNS[turn]
    corners = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
    frame = np.zeros((48, 64, 3), np.uint8)
    for (x, y), colour in corners.items():
        frame[24 * (y > 0):, 32 * (x > 0):][:24, :32] = colour
    path = write(tmp_path / "turned.mp4", [frame] * 10)
    raw = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    at = raw.index(upright, raw.index(b"tkhd"))
    path.write_bytes(raw[:at] + matrix + raw[at + len(matrix):])
    picture = data.read_clip(path, 0, 0.3, 1, 24)["video"][0].astype(int)
    assert picture.shape == ((24, 32, 3) if b == 0 else (32, 24, 3))
    for (x, y), colour in corners.items():
        shown = picture[-4 if b * x + d * y > 0 else 3, -4 if a * x + c * y > 0 else 3]
        assert np.abs(shown - colour).max() < 40, f"the corner {x, y} is elsewhere"


@pytest.mark.parametrize("height, width, size", [
    (48, 64, 32), (64, 48, 32), (49, 65, 24), (65, 49, 33), (30, 100, 64), (51, 51, 17)])
def test_the_short_side_has_the_size_and_the_shape_stays(tmp_path, height, width, size):
    write(tmp_path / "odd.mp4", [numbered(n, height=height, width=width) for n in range(5)], pixels="yuv444p")
    video = data.read_clip(tmp_path / "odd.mp4", 0, 0.2, 5, size)["video"]
    assert video.dtype == np.uint8 and min(video.shape[1:3]) == size
    assert video.shape[2] / video.shape[1] == pytest.approx(width / height, rel=1 / size)
    assert numbers_of(video) == [0, 1, 2, 3, 4]


def test_the_cover_of_an_album_is_no_video(tmp_path):
    """An attached picture is a video stream of one frame; here by hand in a flac (RFC 9639)."""
    path = write(tmp_path / "song.flac", wave=tone(1000, 1), audio="flac")
    plt.imsave(tmp_path / "cover.png", np.full((16, 16, 3), 200, np.uint8))
    png = (tmp_path / "cover.png").read_bytes()
    picture = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 16, 16, 24, 0, len(png)) + png
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[5:8], "big")                   # "fLaC", then STREAMINFO, not the last block
    path.write_bytes(raw[:end] + bytes([6]) + len(picture).to_bytes(3, "big") + picture + raw[end:])
    with av.open(str(path)) as container:
        assert [s.type for s in container.streams] == ["audio", "video"]
    clip = data.read_clip(path, 0, 1.0, 2, 16)
    assert clip["has_audio"] and not clip["has_video"]


@pytest.mark.parametrize("name", ["good.mp4", "silent.mp4", "sound.mp4", "sound.wav", "sound.flac"])
@pytest.mark.parametrize("start, seconds, count, short", [
    (0.0, 8.0, 16, False), (1.0, 2.0, 1, False), (3.0, 4.0, 4, False), (5.0, 3.0, 8, False),
    (7.0, 1.05, 4, False), (0.0, 9.0, 16, True), (5.0, 6.0, 1, True), (9.0, 3.0, 4, True),
    (30.0, 2.0, 4, True), (-1.0, 2.0, 4, True)])
def test_a_window_outside_is_padded_and_flagged_and_a_stream_that_a_clip_lacks_is_zeros(
        clips, name, start, seconds, count, short):
    clip = data.read_clip(clips / name, start, seconds, count, 24, 16000)
    video = clip["video"]
    wave = clip["audio"]
    assert clip["short"] is short
    there = start < 8                                                   # else nothing decodes in the window
    assert clip["has_video"] == (there and "sound" not in name)
    assert clip["has_audio"] == (there and name != "silent.mp4")
    assert len(video) == count and video.dtype == np.uint8
    assert wave.shape == (round(seconds * 16000),) and wave.dtype == np.float32
    if "sound" not in name:                                             # the nearest frame
        times = start + (np.arange(count) + 0.5) * seconds / count
        assert np.abs(numbers_of(video) - np.clip(times * 25, 0, 199)).max() <= 1
    else:
        assert video.shape[1:] == (24, 24, 3) and not video.any()
    t = start + (np.arange(len(wave)) + 0.5) / 16000
    inside = (t > 0.1) & (t < 7.9) & clip["has_audio"]
    assert np.abs(wave[(t < -0.05) | (t > 8.1) | (not clip["has_audio"])]).max(initial=0) < 1e-3
    assert np.abs(wave[inside]).max(initial=0.5) == pytest.approx(0.5, abs=0.05)        # the tone


@pytest.mark.parametrize("end", ["mp4", "mkv"])
def test_a_stream_that_ends_early_is_padded_and_flagged(tmp_path, end):
    """Also where a seek finds nothing of it: the clip is not one without, for --check as well."""
    frames = [numbered(n) for n in range(200)]
    write(tmp_path / f"sound.{end}", frames, tone(1000, 3))
    write(tmp_path / f"picture.{end}", frames[:75], tone(1000, 8))
    for name, start in (("sound", 0.5), ("picture", 0.5), ("sound", 2.1), ("picture", 2.1), ("sound", 5.04)):
        clip = data.read_clip(tmp_path / f"{name}.{end}", start, 2.0, 4, 24)
        assert clip["has_video"] and clip["has_audio"] == (start < 5) and clip["short"] == (start > 1)
        shown = np.minimum(on_screen(25, start, 2.0, 4), 74 if name == "picture" else 199)
        assert numbers_of(clip["video"]) == shown.tolist()
        t = start + np.arange(32000) / 16000
        last = 3 if name == "sound" else 8
        assert np.abs(clip["audio"][t < last - 0.1]).max(initial=0.5) > 0.4
        assert np.abs(clip["audio"][t > last + 0.1]).max(initial=0) < 1e-3
    assert data.check(data.list_clips("folder", tmp_path), 0)["no audio"] == 0


@pytest.mark.parametrize("frame_rate, stretch", [(None, 1.0), (50.0, 2.0), (5.0, 0.2)])
def test_with_a_frame_rate_seconds_count_frames(clips, frame_rate, stretch):
    """The clip has 25 frames a second: at 50, a second of its windows is two of its clock."""
    with data.open_clip(clips / "good.mp4", frame_rate) as clip:
        assert clip.duration == pytest.approx(8.0 / stretch, abs=0.05 / stretch) and clip.stretch == stretch
        read = clip.read([(1.03 / stretch, 2 / stretch)], [(1.0 / stretch, 2 / stretch)], 5, 24, 16000)
    assert numbers_of(read["video"][0]) == on_screen(25, 1.03, 2.0, 5) and len(read["audio"][0]) == 32000
    with data.open_clip(clips / "sound.wav", 50.0) as clip:
        assert clip.stretch == 1.0                                      # it has no frames


@pytest.mark.parametrize("wrong", [0x00, 0xff])
@pytest.mark.parametrize("kind", ["audio", "video"])
def test_one_broken_packet_of_whatever_error_costs_its_own_moment_alone(tmp_path, clips, kind, wrong):
    raw = bytearray((clips / "good.mp4").read_bytes())
    with av.open(str(clips / "good.mp4")) as container:
        packet = [p for p in container.demux(**{kind: 0}) if p.size and 3.9 < p.pts * p.time_base < 4.1][0]
        raw[packet.pos:packet.pos + packet.size] = bytes([wrong]) * packet.size
    (tmp_path / "broken.mp4").write_bytes(raw)
    clip = data.read_clip(tmp_path / "broken.mp4", 0.0, 8.0, 16, 48)
    assert clip["has_video"] and clip["has_audio"]
    loud = np.abs(clip["audio"]).reshape(16, -1).max(1) > 0.4           # of each half second
    assert loud.sum() >= 15 and loud[:7].all() and loud[9:].all()
    away = np.abs(numbers_of(clip["video"]) - 25 * (np.arange(16) + 0.5) / 2)
    assert np.delete(away, range(7, 11)).max() < 1.5


BROKEN = """
import sys
import data
for path in sys.argv[1:]:
    for start in (0.0, 3.0):
        try:
            data.read_clip(path, start, 2.0, 4, 24)
            print("read")
        except data.ClipError as e:
            print("named" if path in str(e) and "\\n" not in str(e) else "nameless")
"""


def test_nothing_crashes_on_a_damaged_file(tmp_path, clips, monkeypatch):
    """In a process of its own, since what a damaged file does to FFmpeg may be a segmentation fault."""
    for name in ("good", "fast"):
        raw = (clips / f"{name}.mp4").read_bytes()
        for share in (0.02, 0.25, 0.5, 0.75, 0.95):
            (tmp_path / f"{name}-cut-{share}.mp4").write_bytes(raw[:int(len(raw) * share)])
        for seed in range(12):                                          # a hundred wrong bytes
            rng = np.random.default_rng(seed)
            wrong = bytearray(raw)
            for at in rng.integers(len(raw) if seed % 2 else 6000, size=100):
                wrong[at] = rng.integers(256)
            (tmp_path / f"{name}-wrong-{seed}.mp4").write_bytes(wrong)
    paths = sorted(str(path) for path in tmp_path.iterdir())
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ran = command([sys.executable, "broken.py", *paths], tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for path, answer in zip(np.repeat(paths, 2), ran.stdout.split(), strict=True):
        no_index = "good-cut" in path                                   # it was at the end
        assert answer == "named" or answer == "read" and not no_index, path


def test_a_truncated_file_with_its_index_in_front_gives_its_first_part(tmp_path, clips):
    raw = (clips / "fast.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(raw[:len(raw) // 2])
    clip = data.read_clip(tmp_path / "half.mp4", 0.0, 8.0, 8, 24)
    numbers = numbers_of(clip["video"])
    assert clip["short"] and numbers[0] == 12 and numbers == sorted(numbers) and numbers[-1] < 190


@pytest.mark.parametrize("name, content, reason", [
    ("text", b"this is no film\n" * 100, "does not decode"), ("zeros", bytes(5000), "does not decode"),
    (".", None, "does not decode"), ("empty", b"", "the file is empty"), ("missing", None, "No such file")])
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipError, match=f"{tmp_path / name}: .*{reason}"):
        data.read_clip(tmp_path / name)


# --- Turn it into tensors ---

def decibel_by_numpy(wave, inputs):
    return 10 * np.log10(np.maximum(mel_power(wave, inputs), 1e-10))


@pytest.mark.parametrize("how", [
    dict(), dict(n_mels=40, window="hann"), dict(n_mels=64, hop=320), dict(n_fft=512, n_mels=80)])
def test_the_mel_in_db_is_what_numpy_computes(how):
    inputs = Inputs(**how)
    wave = np.random.default_rng(1).normal(0, 0.05, 8 * 16000)
    wave = (wave + tone(440, 8) + tone(3000, 8, amplitude=0.1)).astype(np.float32)
    both = np.stack([wave, np.zeros_like(wave)])
    decibel, silence = data.LogMel(inputs)(torch.from_numpy(both))[:, 0] * inputs.mel_std + inputs.mel_mean
    expected = decibel_by_numpy(wave, inputs)
    above = expected > -80                      # some of 128 filters lie between two bins of the FFT: empty
    assert decibel.shape == expected.shape == (inputs.n_mels, inputs.mel_frames) and above.mean() > 0.7
    assert np.abs(decibel.numpy() - expected)[above].max() < 1e-2
    assert np.abs(decibel.numpy()[expected == -100] + 100).max(initial=0) < 1e-2
    assert torch.allclose(silence, torch.tensor(-100.0))
    assert how or decibel.shape == (128, 801)


def test_video_is_normalised_by_imagenets_mean_and_std_per_channel():
    video = torch.arange(720).remainder(256).to(torch.uint8).view(2, 3, 4, 5, 6)
    out = data.normalize_video(video)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        assert torch.allclose(out[:, c], (video[:, c] / 255 - mean) / std, atol=1e-6)


def test_crops_are_what_their_names_say():
    """On a picture whose red and green are the column and the row: 36 x 60, cropped to 32 x 32."""
    inputs = Inputs(size=32, resize=36, crop_scale=(0.1, 0.5))
    picture = np.zeros((3, 36, 60), np.uint8)
    picture[0] = np.arange(60) * 4
    picture[1] = np.arange(36)[:, None] * 7
    video = torch.from_numpy(np.stack([picture, picture]))                                  # (T, 3, H, W)
    centre = video[:, :, 2:34, 14:46]
    assert torch.equal(data.crop_transform(inputs, "center")(video), centre)
    flipped = [data.crop_transform(inputs, "flip")(video) for _ in range(40)]
    assert all(torch.equal(x, centre) or torch.equal(x, centre.flip(-1)) for x in flipped)
    assert 8 < sum(torch.equal(x, centre) for x in flipped) < 32
    areas = []
    for _ in range(40):
        crop = data.crop_transform(inputs, "random")(video).float()
        assert crop.shape == (2, 3, 32, 32) and torch.equal(crop[0], crop[1])       # the same in each frame
        width = crop[0, 0, 0].diff().mean().abs().item() / 4 * 32
        height = crop[0, 1, :, 0].diff().mean().item() / 7 * 32
        areas.append(width * height / (36 * 60))
    assert 0.07 < min(areas) < 0.2 and 0.4 < max(areas) < 0.55


@pytest.mark.parametrize("height, width", [(36, 60), (60, 36), (36, 36), (37, 36), (72, 121), (33, 50)])
def test_the_three_crops_are_the_start_the_middle_and_the_end_of_the_longer_side(height, width):
    """Against slices of the resized picture."""
    inputs = Inputs(size=32, resize=36)
    video = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    small = transforms.resize(video, 36, antialias=True)
    h, w = small.shape[2:]
    room = max(h, w) - 32
    assert min(h, w) == 36
    for crop, along in (("first", 0), ("center", round(room / 2)), ("last", room)):
        top, left = (2, along) if w >= h else (along, 2)
        expected = small[:, :, top:top + 32, left:left + 32]
        assert torch.equal(data.crop_transform(inputs, crop)(video), expected), crop


# --- Views ---

@pytest.fixture(scope="session")
def listing(clips):
    files = ["good.mp4", "silent.mp4", "fast.mp4", "sound.wav"]
    return data.make_listing("some", clips, files, [[0], [1], [0], [1]], ["a", "b"])


@pytest.fixture()
def broken(tmp_path, clips):
    """Clips 1 and 3 of 4 are empty files."""
    files = [f"{name}.mp4" for name in "abcd"]
    for i, file in enumerate(files):
        (tmp_path / file).write_bytes(b"" if i % 2 else (clips / "good.mp4").read_bytes())
    return data.make_listing("broken", tmp_path, files, None, [])


def test_items_are_a_pure_function_of_seed_epoch_and_index(listing, broken):
    """Of no global stream, of no process, and after pickling."""
    def batches(listing, workers, seed=0):
        clips = data.Clips(listing, SMALL, four_views, seed)
        return list(data.train_loader(clips, data.Batches(4, 2, 0, 0, 4), workers))

    for clips in (listing, broken):
        here = batches(clips, 0)
        torch.manual_seed(99)
        assert same(here, batches(clips, 2)) and same(here, batches(clips, 0))
        assert not same(here, batches(clips, 0, seed=1))
    clips = data.Clips(listing, SMALL, four_views, 0)
    state = torch.get_rng_state()
    item = clips[0, 0]
    assert torch.equal(torch.get_rng_state(), state) and not same(clips[1, 0]["video"], item["video"])
    assert same(pickle.loads(pickle.dumps(clips))[0, 0], item)


def test_a_batch_holds_the_views_in_order_and_says_what_lacks(listing):
    clips = data.Clips(listing, SMALL, four_views, replace=False)
    items = [clips[0, i] for i in range(4)]
    batch = data.collate(items)
    assert batch["video"].shape == (4 * 3, 3, 4, 32, 32) and batch["video"].dtype == torch.uint8
    assert batch["audio"].shape == (4 * 3, 1, 16, SMALL.mel_frames) and batch["audio"].dtype == torch.float32
    assert batch["present"].tolist() == [[[True, True], [True, True], [False, True], [True, False]]] * 4
    for clip, (video, audio) in enumerate(((True, True), (True, False), (True, True), (False, True))):
        there = batch["present"][clip] & torch.tensor([video, audio])
        assert torch.equal(batch["decoded"][clip], there)
    assert batch["index"].tolist() == [0, 1, 2, 3] and batch["bad"] == [] and not batch["short"].any()
    assert batch["has_video"].tolist() == [True, True, True, False]
    assert batch["has_audio"].tolist() == [True, False, True, True]
    assert torch.equal(batch["video"][3:6], torch.stack(items[1]["video"]))
    assert torch.equal(batch["audio"][9:], torch.stack(items[3]["audio"]))
    moved = data.to_device(batch, torch.device("cpu"))
    assert same(moved["video"], data.normalize_video(batch["video"])) and same(moved["audio"], batch["audio"])


def test_a_clip_is_opened_once_for_all_its_views_and_each_window_decoded_once(listing, monkeypatch):
    opened = []
    asked = []
    really_open = av.open
    really_read = reader.Clip.read
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a[0]) or really_open(*a, **k))
    monkeypatch.setattr(reader.Clip, "read", lambda *a: asked.append(a[1:3]) or really_read(*a))
    item = data.Clips(listing, SMALL, four_views)[0, 2]
    assert len(item["video"]) == len(item["audio"]) == 3 and opened == [listing.path(2)]
    item = data.Clips(listing, SMALL, functools.partial(data.even_views, 2, SMALL, crops=3))[0, 2]
    assert len(item["video"]) == len(item["audio"]) == 6            # the crops of a place share its frames
    video, audio = asked[-1]
    assert video == audio and len(video) == 2


@pytest.mark.parametrize("duration", [1.0, 1.46, 3.0, 10.0, 600.0])
@pytest.mark.parametrize("inputs", [Inputs(seconds=2.0), Inputs(seconds=4.0, video_seconds=1.46)])
def test_test_views_are_spread_evenly_over_the_clip_with_one_crop_or_three(inputs, duration):
    views = functools.partial(data.even_views, inputs=inputs, rng=None, duration=duration)
    plain = views(3)
    room = max(0.0, duration - inputs.seconds)
    for view, place in zip(plain, (0, 0.5, 1), strict=True):
        pictures = (max(0.0, duration - 1.46) * place, 1.46) if inputs.video_seconds else None
        assert view == View(room * place, inputs.seconds, "center", True, pictures)
    assert views(1) == plain[1:2]
    assert views(3, video=False) == [view._replace(video=None) for view in plain]
    three = views(3, crops=3)                                           # of one place each, picture and sound
    assert [view.video for view in three] == ["first", "center", "last"] * 3
    assert all(three[i]._replace(video="center") == plain[i // 3] for i in range(9))


PART = Inputs(seconds=5.0, video_seconds=1.46, frames=6, size=48, resize=48, n_mels=16)
WHOLE = Inputs(seconds=1.46, frames=6, size=48, resize=48, n_mels=16)


def assert_shows(video, mel, pictures, sound):
    """A view of a clock clip shows the window `pictures`, and clicks as `sound` does."""
    assert numbers_of(video.permute(1, 2, 3, 0).float().numpy()) == on_screen(25, *pictures, PART.frames)
    curve = mel[0].mean(0)
    clicks = [moment - sound[0] for moment in MOMENTS if sound[0] < moment < sum(sound)]
    if clicks:
        loud = np.flatnonzero(curve > (curve.max() + curve.median()) / 2) * PART.hop / PART.sample_rate
        found = [cluster.mean() for cluster in np.split(loud, np.flatnonzero(np.diff(loud) > 0.2) + 1)]
        assert found == pytest.approx(clicks, abs=0.04)


@pytest.mark.parametrize("inputs", [WHOLE, PART])
@pytest.mark.parametrize("places", [[0.5], [0, 0.5, 1], [0.13, 0.77, 0.61]])
def test_pictures_and_sound_of_a_view_are_what_the_clip_holds_there(clocks, inputs, places):
    """Of the same seconds, or each at the same place of the room that it has in the clip."""
    def plan(rng, duration):
        return data.place_views(places, inputs, duration)

    path = clocks["25"]
    item = data.Clips(data.make_listing("clock", path.parent, [path.name], None, []), inputs, plan)[0, 0]
    with data.open_clip(path) as clip:
        duration = clip.duration
    for place, video, mel in zip(places, item["video"], item["audio"], strict=True):
        sound = (place * (duration - inputs.seconds), inputs.seconds)
        assert_shows(video, mel, (place * (duration - 1.46), 1.46), sound)


@pytest.mark.parametrize("start, begin", [(None, 1.5), (0.5, 0.5)])
def test_a_clip_for_an_encoder_has_its_pictures_from_the_middle_of_its_sound(clocks, start, begin):
    clip = data.load_clip(clocks["25"], PART, start)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    video = (clip["video"][0] * std + mean) * 255
    assert_shows(video, clip["audio"][0], (begin + (5 - 1.46) / 2, 1.46), (begin, 5.0))


def test_an_unreadable_clip_is_named_and_replaced_by_another(broken):
    clips = data.Clips(broken, SMALL, four_views)
    items = [clips[0, i] for i in range(4)]
    assert [items[i]["index"] for i in (0, 2)] == [0, 2] and items[0]["bad"] == items[2]["bad"] == []
    for i, name in ((1, "b.mp4"), (3, "d.mp4")):
        assert name in items[i]["bad"][0] and items[i]["index"] in (0, 2) and len(items[i]["video"]) == 3
    assert {clips[epoch, 1]["index"] for epoch in range(8)} == {0, 2}
    batch = data.collate(items)
    assert len(batch["index"]) == 4 and {Path(m.split(":")[0]).stem for m in batch["bad"]} == {"b", "d"}


def test_without_replacement_an_unreadable_clip_is_left_out(broken):
    assert data.Clips(broken, SMALL, ONE_VIEW, replace=False)[0, 1].keys() == {"bad", "empty"}
    first, second = data.eval_loader(broken, SMALL, ONE_VIEW, 3, 0)
    assert first["index"].tolist() == [0, 2] and first["video"].shape[0] == 2 and "b.mp4" in first["bad"][0]
    assert second["index"].tolist() == [] and "d.mp4" in second["bad"][0]


def test_another_clip_is_drawn_for_one_that_cannot_fill_a_view_and_counted(listing):
    """Of these the two with both streams can fill a view of sound alone and one of pictures alone."""
    clips = data.Clips(listing, SMALL, four_views)
    items = [clips[epoch, index] for epoch in range(4) for index in range(4)]
    assert {item["index"] for item in items} == {0, 2}
    assert all(item["decoded"].any(-1).all() for item in items)
    for number, item in enumerate(items):
        lacks = {1: "no sound", 3: "no pictures"}.get(number % 4)
        assert bool(item["empty"]) == bool(lacks) and (not lacks or lacks in item["empty"][0])
    assert len(data.collate(items)["empty"]) == sum(len(item["empty"]) for item in items)
    both = data.Clips(listing, SMALL, ONE_VIEW)                         # a view of both takes what there is
    assert [both[0, index]["index"] for index in range(4)] == [0, 1, 2, 3]


def test_20_unreadable_clips_in_a_row_end_the_run(tmp_path):
    (tmp_path / "a.mp4").touch()
    clips = data.Clips(data.make_listing("none", tmp_path, ["a.mp4"] * 30, None, []), SMALL, four_views)
    with pytest.raises(UserError, match="20 clips in a row"):
        data.Troubles(30, max_share=1.0).add(data.collate([clips[0, 0]]))


def trouble(*bad, **flags):
    """What collate says of a batch: its flags as lists, no clip at all without flags."""
    index = torch.arange(len(flags.get("short", [])))
    batch = {"bad": list(bad), "empty": ["one"], "lost": 0, "index": index, "video": 0, "audio": 0}
    return batch | {key: torch.tensor(values) for key, values in flags.items()}


def test_troubles_names_each_bad_clip_once_and_stops_above_the_share(capsys):
    troubles = data.Troubles(20, max_share=0.1)
    flags = dict(has_video=[True, False], has_audio=[False, False], short=[True, True])
    troubles.add(trouble("a: broken", "a: broken", **flags))
    troubles.add(trouble("a: broken", "b: broken", has_video=[False], has_audio=[True], short=[False]))
    troubles.add(trouble())                                             # two of twenty are a tenth, not more
    assert troubles.row() == {"bad_clips": 2, "no_video": 2, "no_audio": 2, "short": 2, "empty": 3}
    printed = "".join(capsys.readouterr())
    assert printed.count("a: broken") == 1 and printed.count("b: broken") == 1
    with pytest.raises(UserError, match="3 of 20"):
        troubles.add(trouble("c: broken"))


def test_a_stream_that_no_view_asked_for_is_not_counted_as_missing(listing):
    plan = functools.partial(data.even_views, 1, SMALL, video=False)
    batch = next(iter(data.eval_loader(listing, SMALL, plan, 4, 0)))
    troubles = data.Troubles(4)
    troubles.add(batch)
    assert "video" not in batch
    assert troubles.row() == {"bad_clips": 0, "no_video": 0, "no_audio": 1, "short": 0, "empty": 0}


@pytest.mark.parametrize("name, keys", [
    ("good.mp4", {"video", "audio"}), ("silent.mp4", {"video"}), ("sound.wav", {"audio"})])
def test_load_clip_returns_what_the_encoder_takes(clips, name, keys):
    vit = common.ViT("toy", video=dict(shape=(4, 32, 32), patch=(2, 16, 16)),
                     audio=dict(shape=(16, SMALL.mel_frames), patch=(16, 16)))
    clip = data.load_clip(clips / name, SMALL.__dict__)
    whole = data.read_clip(clips / name, 3.5, 1.0, 4, 36, 16000)        # the middle of 8 seconds
    frames = torch.from_numpy(whole["video"][:, 2:34, 8:40]).permute(3, 0, 1, 2)[None]
    mel = data.LogMel(SMALL)(torch.from_numpy(whole["audio"]))[None]
    assert clip.keys() == keys and torch.isfinite(vit(**clip)).all()
    assert "video" not in clip or torch.equal(clip["video"], data.normalize_video(frames))
    assert "audio" not in clip or torch.allclose(clip["audio"], mel, atol=1e-3)


def test_several_windows_are_each_what_load_clip_reads(tmp_path):
    """Also past a seek, and of noise."""
    noise = 0.3 * np.random.randn(96000).clip(-2, 2)
    path = write(tmp_path / "clip.mp4", [numbered(n) for n in range(60)], noise, fps=10)
    windows = [(0.0, 1.0), (1.3, 1.0), (3.1, 1.0)]
    views = data.load_views(path, SMALL, lambda duration: (windows, windows))
    assert (views["audio"][0] - views["audio"][1]).abs().max() > 0.1
    for n, (start, _) in enumerate(windows):
        clip = data.load_clip(path, SMALL, start)
        assert torch.allclose(views["video"][n], clip["video"][0], atol=0.02)              # one level of 255
        assert torch.allclose(views["audio"][n], clip["audio"][0], atol=1e-3)


def test_no_clip_comes_twice_in_an_epoch_and_another_epoch_has_another_order():
    batches = list(data.Batches(23, 6, seed=0, start=0, steps=9))       # 3 steps an epoch, 5 clips left over
    epochs = np.array(batches).reshape(3, 18, 2)                        # (epoch, clip, key)
    assert (epochs[..., 0] == np.arange(3)[:, None]).all() and len(np.unique(epochs[..., 1])) == 23
    assert [len(set(order)) for order in epochs[..., 1]] == [18] * 3
    assert not np.array_equal(epochs[0, :, 1], epochs[1, :, 1])
    assert batches == list(data.Batches(23, 6, 0, 0, 9)) and batches != list(data.Batches(23, 6, 1, 0, 9))


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (3, 2), (1, 4), (4, 3)])
def test_ranks_and_micro_batches_part_the_batch_and_a_run_that_goes_on_draws_the_tail(world, accumulate):
    def draw(start, *more):
        batches = data.Batches(50, 24, 7, start, 6, *more)
        assert len(batches) == len(list(batches))
        return list(batches)

    whole = draw(0)
    parts = [draw(0, rank, world, accumulate) for rank in range(world)]
    for rank in range(world):
        for start in range(7):
            assert draw(start, rank, world, accumulate) == parts[rank][start * accumulate:]
    keys = np.array(parts).reshape(world, 6, -1, 2)                     # (rank, step, clip, key)
    for step in range(6):
        assert sorted(map(tuple, keys[:, step].reshape(-1, 2).tolist())) == sorted(whole[step])


def test_a_batch_that_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="larger than the set"):
        data.Batches(5, 6, 0, 0, 1)
    for batch, world, accumulate in ((9, 2, 1), (6, 1, 4), (12, 4, 2)):
        with pytest.raises(UserError, match="not divisible"):
            data.Batches(50, batch, 0, 0, 1, 0, world, accumulate)


CRASH = """
import functools, sys
import common, data
def main():
    listing = data.make_listing("some", sys.argv[1], ["good.mp4"] * 40, None, [])
    inputs = data.Inputs(seconds=1.0, frames=2, size=16, resize=16, n_mels=16)
    plan = functools.partial(data.even_views, 1, inputs)
    for batch in data.train_loader(data.Clips(listing, inputs, plan), data.Batches(40, 2, 0, 0, 20), 1):
        raise RuntimeError("out of memory")
common.main_guard(main)
"""


def test_an_exception_beside_the_data_workers_ends_the_process(clips):
    """The workers ignore SIGTERM, by which Python ends them at exit: it must not wait for them forever."""
    words = [sys.executable, "-c", CRASH, clips]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "out of memory" in ran.stderr


# --- The toy world ---

@functools.cache
def toy_item(index, split="train"):
    return data.toy_clip(0, split, index)


@pytest.fixture()
def tiny_world(monkeypatch):
    for key, value in (("train", 6), ("test", 4)):
        monkeypatch.setitem(data.TOY, key, value)


def circular(a, b, period=1.0):
    """The distance on a circle."""
    return np.abs((np.asarray(a) - b + period / 2) % period - period / 2)


GRID = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1)
HUES = dict(red=0, orange=0.09, green=0.36, teal=0.48, blue=0.62, violet=0.74, pink=0.87, lime=0.22)


def pixels_of(index, label, place=None):
    """(T, H, W) bool: the pixels of a toy clip that have the hue of a label, within 20 of a place (T, 2)."""
    hue, saturation, _ = np.moveaxis(rgb_to_hsv(toy_item(index)[0] / 255), -1, 0)
    name = data.TOY_CLASSES[label].split()[0]
    near = True if place is None else np.abs(GRID - place[:, None, None]).max(-1) < 20
    return (circular(hue, HUES[name]) < 0.05) & (saturation > 0.55) & near


def misses(mask, place, seen=True):
    """How far the middle of a mask lies from a place, where it is whole, no edge cuts it and `seen`."""
    whole = seen & (mask.sum((1, 2)) > 20) & ~mask[:, [0, -1]].any((1, 2)) & ~mask[:, :, [0, -1]].any((1, 2))
    middles = [np.median(np.argwhere(m)[:, ::-1], 0) + 0.5 for m in mask[whole]]
    return np.abs(np.array(middles).reshape(-1, 2) - place[whole])


def test_a_toy_clip_is_a_pure_function_of_seed_split_and_index():
    frames, wave, truth = toy_item(3)
    assert frames.shape == (40, 64, 64, 3) and frames.dtype == np.uint8 and truth["place"].shape == (40, 2)
    assert wave.shape == (64000,) and wave.dtype == np.float32 and 0.01 < np.abs(wave).max() <= 1
    np.random.seed(6)
    torch.manual_seed(6)
    again = data.toy_clip(0, "train", 3)
    for a, b in zip((frames, wave, *truth.values()), (*again[:2], *again[2].values()), strict=True):
        np.testing.assert_array_equal(a, b)
    labels = [toy_item(i, "test")[2]["label"] for i in range(16)]
    assert np.bincount(labels).tolist() == [2] * 8 and data.TOY["train"] % 8 == data.TOY["test"] % 8 == 0
    for key in ((0, "test", 3), (1, "train", 3), (0, "train", 11)):
        other = data.toy_clip(*key)
        assert not np.array_equal(other[0], frames) and not np.array_equal(other[1], wave)


@pytest.mark.parametrize("index", range(8))
def test_toy_onsets_in_the_sound_fall_at_the_bounces(index):
    """The phase where the wave's energy rises most is that of the parabolas that fit the height best."""
    _, wave, truth = toy_item(index)
    period = truth["period"]
    y = truth["place"][:, 1]
    t = (np.arange(len(y)) + 0.5) / 10
    phases = np.linspace(0, 1, 400, endpoint=False)
    level = np.log(np.convolve(wave.astype(float) ** 2, np.ones(320) / 320, "same") + 1e-6)     # over 20 ms
    rise = np.maximum(level[320:] - level[:-320], 0)                                # at 10 ms + its index
    beats = (np.arange(11)[:, None] + phases) * period                              # (beat, phase) seconds
    inside = (beats > 0.1) & (beats < 3.8)
    risen = rise[np.clip(beats * 16000 - 160, 0, len(rise) - 1).astype(int)]
    heard = phases[(np.where(inside, risen, 0).sum(0) / inside.sum(0)).argmax()]
    u = (t[:, None] / period - phases) % 1
    fits = [np.linalg.lstsq(np.stack([np.ones(len(t)), v * (1 - v)], 1), y, rcond=None)[1].sum() for v in u.T]
    assert circular(heard, phases[np.argmin(fits)]) * period < 0.05                 # half a frame
    lowest = np.flatnonzero((y[1:-1] > y[:-2]) & (y[1:-1] > y[2:])) + 1             # frames, y is downwards
    assert len(lowest) >= 2 and (circular(t[lowest], (heard * period) % period, period) < 0.1).all()


def test_toy_places_point_at_the_sounding_object_and_the_silent_one():
    """The middle of the pixels of its hue, where the other one does not cover it; but for rings, a pixel."""
    hits = []
    found = 0
    for index in range(24):
        truth = toy_item(index)[2]
        place = truth["place"] * 64
        mask = pixels_of(index, truth["label"], place)                  # not the specks of the background
        distance = misses(mask, place)
        assert len(distance) >= 5 and np.median(distance) < 1, index
        hits.append(np.mean([m[int(y), int(x)] for m, (x, y) in zip(mask, place)]) > 0.9)
        silent = truth["silent_place"] * 64
        assert silent.shape == (40, 2) and (np.isnan(silent) != truth["silent"]).all()
        if truth["silent"]:
            others = [label for label in range(8) if label != truth["label"]]
            mask = max((pixels_of(index, label, silent) for label in others), key=np.sum)
            distance = misses(mask, silent, seen=np.abs(place - silent).max(1) > 26)
            found += len(distance) >= 5
            assert len(distance) < 5 or np.median(distance) < 1, index
    assert 0.55 < np.mean(hits) <= 1 and found >= 5                     # three shapes of four have no hole


def test_toy_size_and_pitch_move_together():
    """Area by counting pixels, pitch by the strongest partial, in the class whose fundamental is loudest."""
    areas = []
    pitches = []
    for index in range(0, 160, 8):
        _, wave, truth = toy_item(index)
        if not truth["silent"]:
            areas.append(np.median(pixels_of(index, truth["label"]).sum((1, 2))))
            spectrum = np.abs(np.fft.rfft(wave))[800:4000]              # 200 to 1,000 Hz, by a quarter
            pitches.append(200 + spectrum.argmax() / 4)
            assert abs(np.log2(pitches[-1] / 220) - truth["octave"]) < 0.06
    assert len(areas) >= 6 and np.ptp(np.log2(pitches)) > 1.2
    assert np.corrcoef(np.log(areas), np.log(pitches))[0, 1] < -0.9


def test_the_toy_clips_are_written_once_and_the_same_each_time(tmp_path, tiny_world, monkeypatch):
    def look(name):
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        content = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}
        return content, [path.stat().st_mtime_ns for path in files]

    train = data.list_clips("toy", tmp_path / "one")
    first = look("one")
    monkeypatch.setattr(made.os, "cpu_count", lambda: 1)                 # by another number of processes
    data.TOY_WORLD.make(tmp_path / "two")
    data.TOY_WORLD.make(tmp_path / "one")
    assert look("one") == first and look("two")[0] == first[0]
    assert sum(name.endswith(".mp4") for name in first[0]) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    test = data.list_clips("toy", tmp_path / "one", "test")
    assert len(test) == 4 and train.targets(range(6)).tolist() == [0, 1, 2, 3, 4, 5]
    truths = np.load(tmp_path / "one" / "test" / "truth.npz")
    for i in range(4):
        frames, wave, truth = toy_item(i, "test")
        clip = data.read_clip(test.path(i), 0.0, 4.0, 40, 64, 16000)
        assert clip["has_video"] and clip["has_audio"] and not clip["short"]
        assert np.abs(clip["video"] - frames.astype(int)).mean() < 12
        assert np.corrcoef(clip["audio"], wave)[0, 1] > 0.9
        np.testing.assert_equal({key: truths[key][i] for key in truths}, truth)


def test_a_loader_ends_although_a_killed_worker_keeps_the_lock_of_torchs_event():
    batches = iter(loaders.Loader(range(100), 1, batch_size=None))
    next(batches)
    inside = batches.gi_frame.f_locals["batches"]
    assert inside._workers_done_event._cond.acquire()   # as a process that died with it
    ended = threading.Thread(target=batches.close, daemon=True)
    ended.start()
    ended.join(20)
    assert not ended.is_alive()


def test_nothing_is_left_behind_when_a_disk_is_full(tmp_path, tiny_world, monkeypatch):
    def full(path, *args, really_write=data.write_clip):                # in a worker
        if path.name == "00003.mp4":
            raise OSError("No space left on device")
        really_write(path, *args)

    monkeypatch.setattr(made, "write_clip", full)
    with pytest.raises(UserError, match="No space"):
        data.TOY_WORLD.make(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_toy_clips_are_written_ends_it_and_leaves_nothing_behind(tmp_path, signum):
    words = [sys.executable, ROOT / "data.py", "--data", "toy", "--data-dir", tmp_path / "toy"]
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)      # a background job ignores it
    ran = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=hear)
    try:
        end = time.time() + 60
        while len(list(tmp_path.rglob("*.mp4"))) < 5 and time.time() < end:
            time.sleep(0.05)
        assert list(tmp_path.rglob("*.mp4")), "nothing was written"
        ran.send_signal(signum)
        ran.wait(30)
        assert list(tmp_path.iterdir()) == []
    finally:
        ran.kill()
        ran.wait()


def test_a_toy_folder_of_another_world_or_with_other_files_is_refused(tmp_path, tiny_world, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        data.TOY_WORLD.make(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "toy").mkdir()                                          # an empty folder will do
    data.TOY_WORLD.make(tmp_path / "toy")
    monkeypatch.setitem(data.TOY, "seed", 1)
    with pytest.raises(UserError, match="another world"):
        data.TOY_WORLD.make(tmp_path / "toy")
    assert len(list((tmp_path / "toy").rglob("*.mp4"))) == 10


def test_write_clip_writes_what_was_given(tmp_path):
    wave = np.stack([tone(1000, 4), tone(2000, 4, amplitude=0.2)])
    data.write_clip(tmp_path / "clip.mp4", np.stack([numbered(n) for n in range(48)]), wave, fps=12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        assert container.streams.audio[0].channels == 2
        assert numbers_of(f.to_ndarray(format="rgb24") for f in container.decode(video=0)) == list(range(48))
    clip = data.read_clip(tmp_path / "clip.mp4", 1.0, 2.0, 24, 48)
    assert numbers_of(clip["video"]) == list(range(12, 36))
    for frequency, amplitude in ((1000, 0.25), (2000, 0.1)):
        assert abs(amplitude_at(clip["audio"], frequency)[0] - amplitude) < 0.01


# --- What is there, and its statistics ---

def run_data(folder, flags):
    data.main(["--data-dir", str(folder), "--workers", "0", *flags.split()])


def test_check_counts_what_lies_in_a_folder(tmp_path, clips, capsys):
    for name in ("good.mp4", "silent.mp4", "sound.wav"):
        shutil.copy(clips / name, tmp_path)
    raw = (clips / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(raw[:len(raw) // 2])
    (tmp_path / "empty.mp4").touch()
    names = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "train.csv").write_text("".join(f"{name} 0\n" for name in [*names, "gone.mp4"]))
    layout = "no sub-folders, so no labels; left out: 1 .csv"
    for flags, found in (("folder", f"folder: 5 clips found ({layout})\n"),
                         ("kinetics400 --workers 1", "5 clips found, 1 listed but missing, 1 classes\n")):
        run_data(tmp_path, f"--check --data {flags}")
        printed = "".join(capsys.readouterr())
        assert found in printed
        assert "unreadable 2, without picture 1, without sound 1, 0.01 hours" in printed
        assert printed.count("unreadable: ") == 2 and "cut.mp4: " in printed and "empty.mp4: " in printed
    assert data.check(data.list_clips("folder", tmp_path), 0)["seconds"] == pytest.approx(24, abs=0.2)


@pytest.mark.parametrize("flags, how, lengths", [
    ("", {}, (8.5, 10.0, 12.0)), ("", {}, (2.0,)),                      # a short clip is not padded
    ("--mels 64 --hop 320 --seconds 2.5", dict(n_mels=64, hop=320, seconds=2.5), (8.5, 10.0, 12.0))])
def test_stats_are_the_mean_and_std_of_the_mel_in_db(tmp_path, clips, capsys, flags, how, lengths):
    shutil.copy(clips / "silent.mp4", tmp_path)                         # left out: nothing to hear
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="no clip"):
        run_data(tmp_path, f"--data folder --stats {flags}")
    inputs = Inputs(**how)
    mels = []
    for i, length in enumerate(lengths):
        wave = np.random.default_rng(i).normal(0, 0.1 / (i + 1), round(length * 16000))
        path = write(tmp_path / f"{i}.wav", wave=wave, audio="pcm_s16le")
        seconds = min(inputs.seconds, length)
        middle = data.read_clip(path, (length - seconds) / 2, seconds, 1, 16, 16000)["audio"]
        mels.append(decibel_by_numpy(middle, inputs))
    run_data(tmp_path, f"--data folder --stats {flags}")
    mean, _, std = capsys.readouterr().out.split("--mel-mean ")[1].split()
    assert (float(mean), float(std)) == pytest.approx((np.mean(mels), np.std(mels)), abs=2e-3)
