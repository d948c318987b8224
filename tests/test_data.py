"""data.py: what is on screen and what is heard at a time, the mel, the order of batches, the lists, the toy world."""
import contextlib, csv, functools, pickle, signal, struct, subprocess, sys, time, tracemalloc
from pathlib import Path

import avjepa_lejepa, common, data, probe, retrieval
from common import UserError
from data import ClipError, Inputs, View

import av
import numpy as np
import pytest
import torch

from conftest import MOMENTS, RATES, ROOT, numbered, read_flash, read_number, tone, write

SMALL = Inputs(seconds=1.0, frames=4, size=32, resize=36, n_mels=16, mel_mean=-30.0, mel_std=20.0)
VIEWS = functools.partial(avjepa_lejepa.plan_views, seconds=SMALL.seconds, local="modality")
ONE_VIEW = functools.partial(data.even_views, 1, SMALL)
TREE = ("-0RWZT-miFs", "YxYxYxYxYxY", "a_b_c_d_e_f", "__________Z", "YYYYYYYYYY_")     # YouTube ids that invite mistakes


# ---------------------------------------------------------------------------------------------------------------------
# 1. Read a clip
# ---------------------------------------------------------------------------------------------------------------------

def on_screen(fps, start, seconds, count):
    """The number of the frame that is shown in the middle of each of `count` equal parts of the window."""
    times = start + (np.arange(count) + 0.5) * seconds / count
    assert np.abs(times * float(fps) % 1 - 0.5).max() < 0.499, "a time falls on a frame's edge: choose another window"
    return np.floor(times * float(fps)).astype(int).tolist()


WINDOWS = [(0, 7.9, 13), (0, 1.9, 7), (1.93, 4, 11), (3.37, 2, 5), (5.06, 2.3, 11), (6.63, 0.29, 3)]


@pytest.mark.parametrize("start, seconds, count", WINDOWS)
@pytest.mark.parametrize("fps", RATES)
def test_frames_are_those_on_screen_at_evenly_spread_times(clocks, fps, start, seconds, count):
    clip = data.read_clip(clocks[fps], start, seconds, count, 48)
    assert [read_number(picture) for picture in clip["video"]] == on_screen(RATES[fps], start, seconds, count)


def click_time(wave, rate=16000):
    """Seconds at which the energy of the loudest 40 ms of a wave has its centre."""
    at = np.abs(wave).argmax()
    near = np.arange(max(at - rate // 50, 0), min(at + rate // 50, len(wave)))
    return (near * wave[near].astype(float) ** 2).sum() / (wave[near].astype(float) ** 2).sum() / rate


@pytest.mark.parametrize("start", [2.51, 3.71, 5.06])
@pytest.mark.parametrize("name", [*RATES, "mkv", "ts"])
def test_a_seek_changes_nothing(clocks, name, start):
    """A first window at 0 keeps the reader from seeking; the second one must be what a seek finds."""
    windows = [(0.0, 0.1), (start, 1.7)]                                                        # one click in it
    whole = data.read_windows(clocks[name], lambda duration: (windows, windows), 9, 48, 16000)
    sought = data.read_clip(clocks[name], start, 1.7, 9, 48, 16000)
    assert np.array_equal(whole["video"][1], sought["video"])
    exact = 0.001 if name == "mkv" else 1 / 16000                                               # its timestamps are in ms
    assert abs(click_time(whole["audio"][1]) - click_time(sought["audio"])) < exact
    assert (whole["has_video"], whole["has_audio"], whole["short"]) == (sought["has_video"], sought["has_audio"], sought["short"])


@pytest.mark.parametrize("start", [0.0, 2.2, 5.0, 6.7])
@pytest.mark.parametrize("name", [*RATES, "mkv", "ts"])
def test_a_flash_and_a_click_are_found_at_the_same_time(clocks, name, start):
    """Read from 0, or after a seek (start > 2). The mpeg-ts begins with the priming of its AAC, so its clock is a little late."""
    clip = data.read_clip(clocks[name], start, 1.0, 60, 48, 16000)
    flash = start + [read_flash(picture) for picture in clip["video"]].index(True) / 60          # to a 60th of a second
    click = start + click_time(clip["audio"]) - 0.0005                                           # it lasts a millisecond
    fps = RATES.get(name, RATES["25"])
    assert abs(flash - click) < 1 / fps
    truth, late = min((round(m * fps) / fps for m in MOMENTS), key=lambda m: abs(m - start - 0.4)), 0.03 if name == "ts" else 0.0
    assert -0.001 < click - truth < 0.001 + late and -1 / 60 <= flash - truth <= 1 / 60 + late


def write_pieces(path, *pieces):
    """Uncompressed sound at 16 kHz with the level of each piece (begin, end, level), in seconds, and nothing in between."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for begin, end, level in pieces:
            for at in range(round(begin * 16000), round(end * 16000), 1000):
                frame = av.AudioFrame.from_ndarray(np.full((1, 1000), level, np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, at
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
    try:
        clip = data.read_clip(tmp_path / "far.mkv", 0, 2.0, 1, 16, 16000)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert np.abs(clip["audio"][:15900] - 0.5).max() < 1e-3 and not clip["audio"][16100:].any()


def amplitude_at(wave, frequency, rate=16000):
    """Amplitude of the partial at `frequency`, over the middle of a wave, and the strongest frequency there."""
    part = wave[len(wave) // 4:-len(wave) // 4]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)))) * 4 / len(part)
    return spectrum[round(frequency * len(part) / rate)], spectrum.argmax() * rate / len(part)


@pytest.mark.parametrize("end, codec, rate", [("mp4", "aac", 16000), ("mp4", "aac", 44100), ("mp4", "aac", 48000), ("mp4", "aac", 22050),
                                              ("wav", "pcm_s16le", 44100), ("flac", "flac", 48000), ("mkv", "pcm_f32le", 8000)])
@pytest.mark.parametrize("left, right, mean", [(0.5, None, 0.5), (0.5, 0.5, 0.5), (0.5, 0.0, 0.25), (0.5, -0.5, 0.0)],
                         ids=["mono", "both", "left", "antiphase"])
def test_sound_is_the_mean_of_the_channels_at_16_khz(tmp_path, end, codec, rate, left, right, mean):
    wave = tone(1000, 4, rate, left) if right is None else np.stack([tone(1000, 4, rate, a) for a in (left, right)])
    write(tmp_path / f"tone.{end}", wave=wave, rate=rate, audio=codec)
    for start in (0.0, 2.5):
        clip = data.read_clip(tmp_path / f"tone.{end}", start, 1.0, 1, 16, 16000)
        amplitude, frequency = amplitude_at(clip["audio"], 1000)
        assert clip["audio"].shape == (16000,) and clip["audio"].dtype == np.float32
        assert abs(amplitude - mean) < 0.01
        assert mean == 0 or frequency == pytest.approx(1000, abs=2)


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_sound_comes_at_the_rate_that_was_asked_for(clips, rate):
    clip = data.read_clip(clips / "good.mp4", 1.0, 2.0, 1, 16, rate)
    amplitude, frequency = amplitude_at(clip["audio"], 1000, rate)
    assert len(clip["audio"]) == 2 * rate and abs(amplitude - 0.5) < 0.01 and abs(frequency - 1000) < 2


TURNS = {"upright": (1, 0, 0, 1), "90": (0, 1, -1, 0), "180": (-1, 0, 0, -1), "270": (0, -1, 1, 0), "mirrored": (-1, 0, 0, 1),
         "upside down": (1, 0, 0, -1), "transposed": (0, 1, 1, 0)}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_clip_comes_out_upright(tmp_path, turn):
    """ISO/IEC 14496-12, tkhd: a point (x, y) of the picture, y downwards, is shown at (a x + c y, b x + d y)."""
    a, b, c, d = TURNS[turn]
    colours = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 255)}     # (x, y) of a corner
    frame = np.zeros((48, 64, 3), np.uint8)
    for (x, y), colour in colours.items():
        frame[24 * (y > 0):, 32 * (x > 0):][:24, :32] = colour
    path = write(tmp_path / "turned.mp4", [frame] * 10)
    raw, matrix = path.read_bytes(), struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = raw.index(matrix, raw.index(b"tkhd"))
    path.write_bytes(raw[:at] + struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30) + raw[at + 36:])

    picture = data.read_clip(path, 0, 0.3, 1, 24)["video"][0].astype(int)
    assert picture.shape == ((24, 32, 3) if b == 0 else (32, 24, 3))
    for (x, y), colour in colours.items():
        shown = picture[-4 if b * x + d * y > 0 else 3, -4 if a * x + c * y > 0 else 3]
        assert np.abs(shown - colour).max() < 40, f"the corner {x, y} is not at {a * x + c * y, b * x + d * y}"


@pytest.mark.parametrize("height, width, size", [(48, 64, 32), (64, 48, 32), (49, 65, 24), (65, 49, 33), (30, 100, 64), (51, 51, 17)])
def test_the_short_side_has_the_size_and_the_shape_stays(tmp_path, height, width, size):
    write(tmp_path / "odd.mp4", [numbered(n, height=height, width=width) for n in range(5)], pixels="yuv444p")
    video = data.read_clip(tmp_path / "odd.mp4", 0, 0.2, 5, size)["video"]
    assert video.dtype == np.uint8 and min(video.shape[1:3]) == size
    assert video.shape[2] / video.shape[1] == pytest.approx(width / height, rel=1 / size)
    assert [read_number(picture) for picture in video] == [0, 1, 2, 3, 4]


def test_a_clip_without_sound_has_zeros_for_it(clips):
    clip = data.read_clip(clips / "silent.mp4", 1.0, 2.0, 4, 32, 16000)
    assert clip["has_video"] and not clip["has_audio"]
    assert clip["audio"].shape == (32000,) and clip["audio"].dtype == np.float32 and not clip["audio"].any()
    assert [read_number(picture) for picture in clip["video"]] == on_screen(25, 1.0, 2.0, 4)


@pytest.mark.parametrize("start", [0.0, 3.0])
@pytest.mark.parametrize("name", ["sound.mp4", "sound.wav", "sound.flac"])
def test_a_clip_without_picture_has_zeros_for_it(clips, name, start):
    clip = data.read_clip(clips / name, start, 2.0, 4, 32, 16000)
    assert clip["has_audio"] and not clip["has_video"] and not clip["short"]
    assert clip["video"].shape == (4, 32, 32, 3) and clip["video"].dtype == np.uint8 and not clip["video"].any()
    assert abs(amplitude_at(clip["audio"], 1000)[0] - 0.5) < 0.01


def test_the_cover_of_an_album_is_no_video(tmp_path):
    """An attached picture is a video stream of one frame in the container; here it is written into the flac by hand (RFC 9639)."""
    path = write(tmp_path / "song.flac", wave=tone(1000, 1), audio="flac")
    with av.open(str(tmp_path / "cover.png"), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 3), 200, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    png, raw = next(tmp_path.glob("cover*.png")).read_bytes(), path.read_bytes()
    picture = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 16, 16, 24, 0, len(png)) + png
    first_end = 8 + int.from_bytes(raw[5:8], "big")                             # "fLaC", then STREAMINFO, not the last block
    path.write_bytes(raw[:first_end] + bytes([6]) + len(picture).to_bytes(3, "big") + picture + raw[first_end:])
    with av.open(str(path)) as container:
        assert [s.type for s in container.streams] == ["audio", "video"]
    clip = data.read_clip(path, 0, 1.0, 2, 16)
    assert clip["has_audio"] and not clip["has_video"]


@pytest.mark.parametrize("name", ["good.mp4", "silent.mp4", "sound.mp4", "sound.wav", "sound.flac"])
@pytest.mark.parametrize("start, seconds, count, short", [
    (0.0, 8.0, 16, False), (1.0, 2.0, 1, False), (3.0, 4.0, 4, False), (5.0, 3.0, 8, False), (7.0, 1.05, 4, False),
    (0.0, 9.0, 16, True), (5.0, 6.0, 1, True), (9.0, 3.0, 4, True), (30.0, 2.0, 4, True), (-1.0, 2.0, 4, True)])
def test_a_window_outside_is_padded_and_flagged_short_one_inside_is_not(clips, name, start, seconds, count, short):
    clip = data.read_clip(clips / name, start, seconds, count, 24, 16000)
    assert clip["short"] is short
    assert len(clip["video"]) == count and len(clip["audio"]) == round(seconds * 16000)
    if clip["has_video"]:                                                       # the nearest frame
        times = start + (np.arange(count) + 0.5) * seconds / count
        numbers = np.array([read_number(picture) for picture in clip["video"]])
        assert np.abs(numbers - np.clip(times * 25, 0, 199)).max() <= 1
    if clip["has_audio"]:                                                       # silence outside, the tone inside
        t = start + (np.arange(len(clip["audio"])) + 0.5) / 16000
        assert np.abs(clip["audio"][(t < -0.05) | (t > 8.1)]).max(initial=0) < 1e-3
        assert np.abs(clip["audio"][(t > 0.1) & (t < 7.9)]).max(initial=0.5) == pytest.approx(0.5, abs=0.05)


def test_a_stream_that_ends_early_is_padded_and_flagged(tmp_path):
    frames, wave = [numbered(n) for n in range(200)], tone(1000, 8)
    for name, clip in (("sound ends", (frames, wave[:3 * 16000])), ("picture ends", (frames[:75], wave))):
        write(tmp_path / f"{name}.mp4", *clip)
        assert not data.read_clip(tmp_path / f"{name}.mp4", 0.5, 2.0, 4, 24)["short"]
        late = data.read_clip(tmp_path / f"{name}.mp4", 2.1, 2.0, 4, 24)
        assert late["short"] and late["has_video"] and late["has_audio"]
        if name == "sound ends":
            assert np.abs(late["audio"][:13000]).max() > 0.4 and not np.abs(late["audio"][16000:]).max() > 1e-3
        else:
            assert [read_number(picture) for picture in late["video"]] == [58, 71, 74, 74]


@pytest.mark.parametrize("end", ["mp4", "mkv"])
def test_a_window_after_the_end_of_the_sound_alone_is_flagged(tmp_path, end):
    """The clip has sound, though none after a seek to the window: it is short, and not one without sound."""
    write(tmp_path / f"early.{end}", [numbered(n) for n in range(200)], tone(1000, 2.5))
    clip = data.read_clip(tmp_path / f"early.{end}", 5.03, 1.0, 4, 24)
    assert clip["has_audio"] and clip["short"] and np.abs(clip["audio"]).max() < 1e-3
    assert [read_number(picture) for picture in clip["video"]] == on_screen(25, 5.03, 1.0, 4)


def test_several_windows_are_each_what_one_alone_would_be(clips):
    windows, sounds = [(4.03, 1.0), (0.03, 2.0), (4.53, 2.0), (0.03, 2.0)], [(6.0, 1.0), (1.0, 0.5)]
    clip = data.read_windows(clips / "good.mp4", lambda duration: (windows, sounds), 5, 24, 16000)
    assert clip["duration"] == pytest.approx(8.0, abs=0.05)
    for video, window in zip(clip["video"], windows):
        assert [read_number(picture) for picture in video] == on_screen(25, *window, 5)
    for wave, window in zip(clip["audio"], sounds):
        alone = data.read_clip(clips / "good.mp4", *window, 1, 24, 16000)["audio"]
        assert wave.shape == alone.shape and np.abs(wave - alone).max() < 0.01


BROKEN = """
import sys
import data
for path in sys.argv[1:]:
    for start in (0.0, 3.0):
        try:
            clip = data.read_clip(path, start, 2.0, 4, 24)
            answer = "short" if clip["short"] else "whole"
        except data.ClipError as e:
            answer = "named" if path in str(e) and "\\n" not in str(e) else "nameless"
        print(path, start, answer, sep="\\t")
"""


@pytest.mark.parametrize("kind, wrong", [("audio", 0x00), ("audio", 0xff), ("video", 0x00), ("video", 0xff)])
def test_one_broken_packet_of_whatever_error_costs_its_own_moment_alone(tmp_path, clips, kind, wrong):
    raw, path = bytearray((clips / "good.mp4").read_bytes()), tmp_path / "broken.mp4"
    with av.open(str(clips / "good.mp4")) as container:
        packet = [p for p in container.demux(**{kind: 0}) if p.size and 3.9 < p.pts * p.time_base < 4.1][0]
        raw[packet.pos:packet.pos + packet.size] = bytes([wrong]) * packet.size
    path.write_bytes(raw)
    clip = data.read_clip(path, 0.0, 8.0, 16, 48)
    assert clip["has_video"] and clip["has_audio"]
    loud = np.abs(clip["audio"]).reshape(16, -1).max(1) > 0.4                           # of each half second
    assert loud.sum() >= 15 and loud[:7].all() and loud[9:].all()
    numbers = [read_number(frame) for frame in clip["video"]]
    assert np.abs(np.array(numbers[:7] + numbers[11:]) - (25 * (np.r_[:7, 11:16] + 0.5) / 2)).max() < 1.5


def test_nothing_crashes_on_a_damaged_file(tmp_path, clips):
    """In a process of its own, since what a damaged file does to FFmpeg may be a segmentation fault."""
    kinds = {}                                                                  # file name: the answers that are right
    for name in ("good", "fast"):
        raw = (clips / f"{name}.mp4").read_bytes()
        for share in (0.02, 0.25, 0.5, 0.75, 0.95):
            (tmp_path / f"{name}-{share}.mp4").write_bytes(raw[:int(len(raw) * share)])
            kinds[f"{name}-{share}.mp4"] = {"named"} if name == "good" else {"named", "short", "whole"}
        for seed in range(12):                                                  # a hundred wrong bytes
            rng, wrong = np.random.default_rng(seed), bytearray(raw)
            for at in rng.integers(len(raw) if seed % 2 else 6000, size=100):
                wrong[at] = rng.integers(256)
            (tmp_path / f"{name}-wrong{seed}.mp4").write_bytes(wrong)
            kinds[f"{name}-wrong{seed}.mp4"] = {"named", "short", "whole"}
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no film\n" * 100)
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    (tmp_path / "folder.mp4").mkdir()
    kinds |= {name: {"named"} for name in ("empty.mp4", "text.mp4", "zeros.mp4", "folder.mp4", "missing.mp4")}
    ran = subprocess.run([sys.executable, "-c", BROKEN, *(str(tmp_path / name) for name in kinds)], cwd=ROOT, capture_output=True,
                         text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = [line.split("\t") for line in ran.stdout.splitlines() if line.count("\t") == 2]
    assert len(answers) == 2 * len(kinds)
    for path, start, answer in answers:
        assert answer in kinds[Path(path).name], (path, start, answer)


def test_a_truncated_file_with_its_index_in_front_gives_its_first_part(tmp_path, clips):
    raw = (clips / "fast.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(raw[:len(raw) // 2])
    try:
        clip = data.read_clip(tmp_path / "half.mp4", 0.0, 8.0, 8, 24)
    except ClipError as e:
        assert "half.mp4" in str(e)
    else:
        numbers = [read_number(picture) for picture in clip["video"]]
        assert clip["short"] and numbers[0] == 12 and numbers == sorted(numbers) and numbers[-1] < 190


@pytest.mark.parametrize("name, reason", [("empty.mp4", "empty"), ("missing.mp4", "No such file"), ("text.mp4", "does not decode"),
                                          ("folder.mp4", "does not decode")])
def test_an_unreadable_file_is_named_with_the_reason(tmp_path, name, reason):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no film\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ClipError, match=reason) as e:
        data.read_clip(tmp_path / name)
    assert str(tmp_path / name) in str(e.value) and isinstance(e.value, UserError)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Turn it into tensors
# ---------------------------------------------------------------------------------------------------------------------

def mel_centres(inputs):
    """Edges and centres of the HTK mel filters in Hz: n_mels + 2 points, evenly spread on 2595 log10(1 + f / 700)."""
    top = 2595 * np.log10(1 + inputs.sample_rate / 2 / 700)
    return 700 * (10 ** (np.linspace(0, top, inputs.n_mels + 2) / 2595) - 1)


def mel_by_numpy(wave, inputs):
    """(F, T) power in dB: frames centred on multiples of the hop, periodic window, triangular filters of height 1."""
    k = np.arange(inputs.win_length)
    shape = {"hamming": (0.54, 0.46), "hann": (0.5, 0.5)}[inputs.window]
    window = shape[0] - shape[1] * np.cos(2 * np.pi * k / inputs.win_length)
    pad = (inputs.n_fft - inputs.win_length) // 2
    window = np.pad(window, (pad, inputs.n_fft - inputs.win_length - pad))
    padded = np.pad(wave.astype(np.float64), inputs.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, inputs.n_fft)[::inputs.hop]
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2                                           # (T, n_fft / 2 + 1)
    f, points = np.arange(inputs.n_fft // 2 + 1) * inputs.sample_rate / inputs.n_fft, mel_centres(inputs)
    low, centre, high = points[:-2, None], points[1:-1, None], points[2:, None]
    filters = np.clip(np.minimum((f - low) / (centre - low), (high - f) / (high - centre)), 0, None)    # (F, n_fft / 2 + 1)
    return 10 * np.log10(np.maximum(filters @ power.T, 1e-10))


@pytest.mark.parametrize("n_mels", [40, 64, 128])
@pytest.mark.parametrize("window", ["hamming", "hann"])
def test_a_1_khz_tone_peaks_in_the_mel_bin_nearest_to_1_khz(window, n_mels):
    inputs = Inputs(seconds=1.0, window=window, n_mels=n_mels)
    mel = data.LogMel(inputs)(torch.from_numpy(tone(1000, 1).astype(np.float32)))
    nearest = np.abs(mel_centres(inputs)[1:-1] - 1000).argmin()
    assert (mel[0, :, 5:-5].argmax(0) == nearest).all()


@pytest.mark.parametrize("how", [dict(), dict(window="hann"), dict(n_mels=64, hop=320), dict(n_fft=512, n_mels=80, window="hann")])
def test_the_mel_in_db_is_what_numpy_computes(how):
    inputs = Inputs(seconds=1.0, **how)
    wave = np.random.default_rng(1).normal(0, 0.05, 16000) + tone(440, 1) + tone(3000, 1, amplitude=0.1)
    mel = data.LogMel(inputs)(torch.from_numpy(wave.astype(np.float32)))
    decibel, expected = mel[0].numpy() * inputs.mel_std + inputs.mel_mean, mel_by_numpy(wave.astype(np.float32), inputs)
    above = expected > -80                                  # some filters of 128 lie between two bins of the FFT: they are empty
    assert decibel.shape == expected.shape == (inputs.n_mels, inputs.mel_frames) and above.mean() > 0.7
    assert np.abs(decibel - expected)[above].max() < 1e-2
    assert np.abs(decibel[expected == -100] + 100).max(initial=0) < 1e-2


def test_8_seconds_at_the_defaults_are_128_x_801():
    mel = data.LogMel(Inputs())(torch.zeros(2, 8 * 16000))
    assert mel.shape == (2, 1, 128, 801) and Inputs().mel_frames == 801
    assert torch.allclose(mel, torch.tensor((-100 - Inputs().mel_mean) / Inputs().mel_std))             # silence: the floor


def test_video_is_normalised_by_imagenets_mean_and_std_per_channel():
    video = torch.arange(2 * 3 * 4 * 5 * 6, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 3, 4, 5, 6)
    out = data.normalize_video(video)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))):
        assert torch.allclose(out[:, c], (video[:, c] / 255 - mean) / std, atol=1e-6)


def test_crops_are_what_their_names_say():
    """On a picture whose red and green are the column and the row: 36 x 60, cropped to 32 x 32."""
    inputs, columns, rows = Inputs(size=32, resize=36, crop_scale=(0.1, 0.5)), np.arange(60) * 4, np.arange(36) * 7
    picture = np.stack([np.broadcast_to(columns, (36, 60)), np.broadcast_to(rows[:, None], (36, 60)), np.zeros((36, 60))])
    video = torch.from_numpy(np.stack([picture, picture]).astype(np.uint8))                             # (T, 3, H, W)
    centre, areas = video[:, :, 2:34, 14:46], []
    assert torch.equal(data.crop_transform(inputs, "center")(video), centre)
    flipped = [data.crop_transform(inputs, "flip")(video) for _ in range(40)]
    assert all(torch.equal(x, centre) or torch.equal(x, centre.flip(-1)) for x in flipped)
    assert 8 < sum(torch.equal(x, centre) for x in flipped) < 32
    for _ in range(40):
        crop = data.crop_transform(inputs, "random")(video).float()
        assert crop.shape == (2, 3, 32, 32) and torch.equal(crop[0], crop[1])                           # the same in each frame
        step = crop[0, 0, 0].diff().mean().abs().item() / 4 * 32, crop[0, 1, :, 0].diff().mean().item() / 7 * 32
        areas.append(step[0] * step[1] / (36 * 60))
    assert 0.07 < min(areas) < 0.2 and 0.4 < max(areas) < 0.55


@pytest.fixture(scope="session")
def listing(clips):
    return data.make_listing("some", clips, ["good.mp4", "silent.mp4", "fast.mp4", "sound.wav"], [[0], [1], [0], [1]], ["a", "b"])


@pytest.fixture()
def broken(tmp_path, clips):
    """Clips 1 and 3 of 4 are empty files."""
    for name in ("a.mp4", "c.mp4"):
        (tmp_path / name).write_bytes((clips / "good.mp4").read_bytes())
    for name in ("b.mp4", "d.mp4"):
        (tmp_path / name).touch()
    return data.make_listing("broken", tmp_path, ["a.mp4", "b.mp4", "c.mp4", "d.mp4"], None, [])


def same(a, b):
    """Equal in structure and bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_items_are_a_pure_function_of_seed_epoch_and_index(listing, broken):
    def batches(listing, workers, seed=0):
        clips = data.Clips(listing, SMALL, VIEWS, seed)
        return list(data.train_loader(clips, data.Batches(4, 2, 0, 0, 4), workers))

    for clips in (listing, broken):
        here, elsewhere = batches(clips, 0), batches(clips, 2)
        torch.manual_seed(99), np.random.seed(99)
        assert same(here, elsewhere) and same(here, batches(clips, 0))
        assert not same(here, batches(clips, 0, seed=1))
    clips = data.Clips(listing, SMALL, VIEWS, 0)
    assert not torch.equal(clips[0, 0]["video"][0], clips[1, 0]["video"][0])                # another epoch, other views
    state = torch.get_rng_state()
    clips[0, 0]
    assert torch.equal(torch.get_rng_state(), state)                                        # the global stream stays as it was


def test_clips_pickle(listing):
    clips = data.Clips(listing, SMALL, VIEWS, 3)
    assert same(pickle.loads(pickle.dumps(clips))[2, 0], clips[2, 0])


def test_a_batch_holds_the_views_in_order_and_says_what_lacks(listing):
    clips = data.Clips(listing, SMALL, VIEWS)
    items = [clips[0, i] for i in range(4)]
    batch = data.collate(items)
    assert batch["video"].shape == (4 * 3, 3, 4, 32, 32) and batch["video"].dtype == torch.uint8        # 2 globals, 1 local
    assert batch["audio"].shape == (4 * 3, 1, 16, SMALL.mel_frames) and batch["audio"].dtype == torch.float32
    assert batch["present"].tolist() == [[[True, True], [True, True], [False, True], [True, False]]] * 4
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["has_video"].tolist() == [True, True, True, False] and batch["has_audio"].tolist() == [True, False, True, True]
    assert batch["short"].tolist() == [False] * 4 and batch["bad"] == []
    assert torch.equal(batch["video"][3:6], torch.stack(items[1]["video"]))
    assert torch.equal(batch["audio"][9:], torch.stack(items[3]["audio"]))
    moved = data.to_device(batch, torch.device("cpu"))
    assert torch.equal(moved["video"], data.normalize_video(batch["video"])) and torch.equal(moved["audio"], batch["audio"])


def test_a_clip_is_opened_once_for_all_its_views(listing, monkeypatch):
    opened, really_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *args, **kwargs: opened.append(args[0]) or really_open(*args, **kwargs))
    item = data.Clips(listing, SMALL, VIEWS)[0, 2]
    assert len(item["video"]) == len(item["audio"]) == 3 and opened == [listing.path(2)]


def test_each_view_has_its_own_start_and_is_what_the_clip_holds_there(listing):
    """The global views are centre crops, some of them flipped: they must be what read_clip gives at the plan's start. The local
    view of the picture is a random crop: it must be neither."""
    clips, starts, flips = data.Clips(listing, SMALL, VIEWS, seed=5), [], []
    for epoch in range(4):
        item, views = clips[epoch, 0], VIEWS(np.random.default_rng((5, epoch, 0)), 8.0)
        assert all(0 <= view.start <= 7.0 and view.seconds == 1.0 for view in views)
        starts += [view.start for view in views]
        for v in (0, 1, 3):                                                                             # view 2 is sound alone
            clip = data.read_clip(listing.path(0), views[v].start, 1.0, 4, 36, 16000)
            frames = torch.from_numpy(clip["video"][:, 2:34, 8:40]).permute(3, 0, 1, 2)                 # 36 x 48 -> 32 x 32
            found = [torch.equal(item["video"][min(v, 2)], x) for x in (frames, frames.flip(-1))]
            assert sum(found) == (v < 3)
            if v < 3:
                flips.append(found[1])
                assert torch.allclose(item["audio"][v], data.LogMel(SMALL)(torch.from_numpy(clip["audio"])), atol=0.05)
    assert len(set(starts)) == 16 and max(starts) > 5 and min(starts) < 2 and 0 < sum(flips) < 8


def three_moments(rng, duration):
    return [View(MOMENTS[2] - wait, 1.0, "center", True) for wait in rng.uniform(0.1, 0.9, 3)]


def test_picture_and_sound_of_a_view_cover_the_same_seconds(clocks):
    """The clip flashes and clicks once, and each view starts at another time before: both must show the same wait."""
    inputs = Inputs(seconds=1.0, frames=50, size=32, resize=40, n_mels=16)
    listing = data.make_listing("clock", clocks["25"].parent, [clocks["25"].name], None, [])
    item = data.Clips(listing, inputs, three_moments, seed=1)[0, 0]
    waits = np.random.default_rng((1, 0, 0)).uniform(0.1, 0.9, 3)
    assert np.ptp(waits) > 0.2
    for video, mel, wait in zip(item["video"], item["audio"], waits):
        bright = [read_flash(picture) for picture in video.permute(1, 2, 3, 0).float().numpy()]
        assert abs(bright.index(True) / 50 - wait) < 0.04
        assert abs(mel[0].mean(0).argmax().item() * inputs.hop / 16000 - wait) < 0.03


def test_test_views_are_spread_evenly_over_the_clip():
    rng = np.random.default_rng(0)
    assert [v.start for v in data.even_views(3, Inputs(seconds=2.0), rng, 10.0)] == [0.0, 4.0, 8.0]
    assert [v.start for v in data.even_views(1, Inputs(seconds=2.0), rng, 10.0)] == [4.0]
    assert [v.start for v in data.even_views(2, Inputs(seconds=20.0), rng, 10.0)] == [0.0, 0.0]
    assert data.even_views(1, Inputs(seconds=2.0), rng, 10.0, video=False)[0] == View(4.0, 2.0, None, True)


PART = Inputs(seconds=5.0, video_seconds=1.46, frames=6, size=48, resize=48, n_mels=16)


def shown_and_heard(video, mel, inputs):
    """The numbers on the pictures (3, T, H, W) 0..255, and the seconds of the clicks in a mel (1, F, T)."""
    curve = mel[0].mean(0)
    loud = np.flatnonzero(curve > (curve.max() + curve.median()) / 2) * inputs.hop / inputs.sample_rate
    return ([read_number(picture) for picture in video.permute(1, 2, 3, 0).float().numpy()],
            [cluster.mean() for cluster in np.split(loud, np.flatnonzero(np.diff(loud) > 0.2) + 1)])


def agrees(got, pictures, sound):
    """Does a view show the frames of the window `pictures` and sound as the window `sound`, each (start, seconds)?"""
    clicks = [moment - sound[0] for moment in MOMENTS if sound[0] < moment < sum(sound)]
    return got[0] == on_screen(RATES["25"], *pictures, PART.frames) and got[1] == pytest.approx(clicks, abs=0.04)


@pytest.mark.parametrize("plan, places", [(functools.partial(data.even_views, 1, PART), [1 / 2]),
                                          (functools.partial(data.even_views, 3, PART), [0, 1 / 2, 1]),
                                          (functools.partial(retrieval.random_views, 3, PART), None)])
def test_pictures_may_cover_a_part_of_the_sound(clocks, plan, places):
    """Both at the same place of the room that each of them has, in the clip as it is decoded."""
    listing, seen = data.make_listing("clock", clocks["25"].parent, [clocks["25"].name], None, []), []

    def spy(rng, duration):
        seen.append(duration)
        return plan(rng, duration)

    item = data.Clips(listing, PART, spy, seed=3)[0, 0]
    places = np.random.default_rng((3, 0, 0)).uniform(0, 1, 3) if places is None else places
    assert len(item["video"]) == len(item["audio"]) == len(places) and seen[0] == pytest.approx(8, abs=0.05)
    for place, video, mel in zip(places, item["video"], item["audio"]):
        assert agrees(shown_and_heard(video, mel, PART), (place * (seen[0] - 1.46), 1.46), (place * (seen[0] - 5), 5.0))


@pytest.mark.parametrize("start", [None, 0.5])
def test_a_clip_for_an_encoder_has_its_pictures_from_the_middle_of_its_sound(clocks, start):
    clip, sound = data.load_clip(clocks["25"], PART, start), (1.5 if start is None else start, 5.0)
    video = (clip["video"][0] * torch.tensor(data.IMAGENET_STD).view(3, 1, 1, 1) + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1, 1)) * 255
    assert agrees(shown_and_heard(video, clip["audio"][0], PART), (sound[0] + (5 - 1.46) / 2, 1.46), sound)


@pytest.mark.parametrize("duration", [1.0, 1.46, 3.0, 5.0, 8.0, 600.0])
def test_pictures_lie_inside_the_sound_and_the_clip_as_far_as_it_lasts(duration):
    rng = np.random.default_rng(0)
    views = [view for count in (1, 7) for view in data.even_views(count, PART, rng, duration)]
    views += retrieval.random_views(50, PART, rng, duration)
    views += [view for _ in range(50) for view in probe.train_views(rng, duration, PART, "av")]
    for view in views:
        start, seconds = view.pictures
        assert seconds == 1.46 and view.seconds == 5.0
        assert view.start - 1e-9 <= start and start + min(seconds, duration) <= min(view.start + 5.0, duration) + 1e-9
    spread = np.ptp([view.pictures[0] for view in views])
    assert spread > 0.9 * (duration - 1.46) if duration > 1.46 else spread == 0                # no place is left out


def test_without_a_part_of_their_own_pictures_and_sound_are_one_window_drawn_as_ever():
    inputs, rng, again = Inputs(seconds=2.7), np.random.default_rng(4), np.random.default_rng(4)
    views = retrieval.random_views(5, inputs, rng, 10.0)
    assert [view.start for view in views] == again.uniform(0, 10.0 - 2.7, 5).tolist()
    assert probe.train_views(rng, 10.0, inputs, "av") == [View(again.uniform(0, 10.0 - 2.7), 2.7, "random", True)]
    assert probe.train_views(rng, 1.0, inputs, "audio") == [View(again.uniform(0, 0.0), 2.7, None, True)]
    assert probe.train_views(rng, 9.0, inputs, "video") == [View(again.uniform(0, 9.0 - 2.7), 2.7, "random", False)]
    assert all(view[:2] == (view.start, 2.7) and view.pictures is None for view in views + data.even_views(3, inputs, rng, 10.0))


def test_an_unreadable_clip_is_named_and_replaced_by_another(broken):
    clips = data.Clips(broken, SMALL, VIEWS)
    for index, name in ((1, "b.mp4"), (3, "d.mp4")):
        item = clips[0, index]
        assert name in item["bad"][0] and item["index"] in (0, 2) and len(item["video"]) == 3
        assert all("b.mp4" in message or "d.mp4" in message for message in item["bad"])
    assert clips[0, 0]["bad"] == [] and clips[0, 0]["index"] == 0
    assert {clips[epoch, 1]["index"] for epoch in range(8)} == {0, 2}
    batch = data.collate([clips[0, i] for i in range(4)])
    assert len(batch["index"]) == 4 and any("b.mp4" in m for m in batch["bad"]) and any("d.mp4" in m for m in batch["bad"])


def test_without_replacement_an_unreadable_clip_is_left_out(broken):
    assert data.Clips(broken, SMALL, ONE_VIEW, replace=False)[0, 1].keys() == {"bad"}
    batches = list(data.eval_loader(broken, SMALL, ONE_VIEW, 3, 0))
    assert [batch["index"].tolist() for batch in batches] == [[0, 2], []]
    assert [[Path(m.split(":")[0]).name for m in batch["bad"]] for batch in batches] == [["b.mp4"], ["d.mp4"]]
    assert batches[0]["video"].shape[0] == 2


def test_20_unreadable_clips_in_a_row_end_the_run(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.mp4").touch()
    listing = data.make_listing("none", tmp_path, [f"{i}.mp4" for i in range(30)], None, [])
    with pytest.raises(UserError, match="20 clips in a row"):
        data.Troubles(30, max_share=1.0).add(data.collate([data.Clips(listing, SMALL, VIEWS)[0, 0]]))


def test_files_beside_the_sub_folders_are_searched_and_else_said_to_be_left_out(tmp_path, capsys):
    for name in ("loose.mp4", "dogs/a.mp4", "dogs/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(data.list_clips("folder", tmp_path, "all")) == 3
    parts = []
    for split in ("train", "test"):
        with contextlib.suppress(UserError):
            parts.append(data.list_clips("folder", tmp_path, split))
    assert sum(len(part) for part in parts) == 2 and "1 files beside the sub-folders" in capsys.readouterr().out


def trouble(*bad, **flags):
    """What collate says of a batch: its flags as lists, no clip at all without flags."""
    index = torch.arange(len(flags.get("short", [])))
    return {"bad": list(bad), "lost": 0, "index": index, "video": 0, "audio": 0, **{k: torch.tensor(v) for k, v in flags.items()}}


def test_a_stream_that_no_view_asked_for_is_not_counted_as_missing():
    troubles, batch = data.Troubles(20), trouble(has_video=[False, False], has_audio=[True, False], short=[False, False])
    troubles.add({key: value for key, value in batch.items() if key != "video"})
    assert troubles.row() == {"bad_clips": 0, "no_video": 0, "no_audio": 1, "short": 0}


def test_troubles_names_each_bad_clip_once_and_stops_above_the_share(capsys):
    troubles = data.Troubles(20, max_share=0.1)
    troubles.add(trouble("a: broken", "a: broken", has_video=[True, False], has_audio=[False, False], short=[True, True]))
    troubles.add(trouble("a: broken", "b: broken", has_video=[False], has_audio=[True], short=[False]))
    troubles.add(trouble())                                                     # two of twenty are a tenth, not more
    assert troubles.row() == {"bad_clips": 2, "no_video": 2, "no_audio": 2, "short": 2}
    printed = "".join(capsys.readouterr())
    assert printed.count("a: broken") == 1 and printed.count("b: broken") == 1
    with pytest.raises(UserError, match="3 of 20"):
        troubles.add(trouble("c: broken"))


@pytest.mark.parametrize("name", ["good.mp4", "silent.mp4", "sound.wav"])
def test_load_clip_returns_what_the_encoder_takes(clips, name):
    vit = common.ViT("toy", video=dict(shape=(4, 32, 32), patch=(2, 16, 16)), audio=dict(shape=(16, SMALL.mel_frames), patch=(16, 16)))
    clip = data.load_clip(clips / name, SMALL.__dict__)
    assert clip.keys() == {"good.mp4": {"video", "audio"}, "silent.mp4": {"video"}, "sound.wav": {"audio"}}[name]
    assert torch.isfinite(vit(**clip)).all()
    whole = data.read_clip(clips / name, 3.5, 1.0, 4, 36, 16000)                # the middle of 8 seconds
    if "video" in clip:
        frames = torch.from_numpy(whole["video"][:, 2:34, 8:40]).permute(3, 0, 1, 2)[None]
        assert torch.equal(clip["video"], data.normalize_video(frames))
    if "audio" in clip:
        assert torch.equal(clip["audio"][0], data.LogMel(SMALL)(torch.from_numpy(whole["audio"])))
    assert not same(data.load_clip(clips / "good.mp4", SMALL, start=0.0)["video"], data.load_clip(clips / "good.mp4", SMALL)["video"])


def test_several_windows_are_each_what_load_clip_reads(tmp_path):
    """Also past a seek, and of noise, bit for bit."""
    path, starts = tmp_path / "clip.mp4", [0.0, 1.3, 3.1]
    write(path, [numbered(n) for n in range(60)], 0.3 * np.random.randn(96000).clip(-2, 2), fps=10)
    views = data.load_views(path, SMALL, lambda duration: ([(s, 1.0) for s in starts], [(s, 1.0) for s in starts]))
    assert not torch.equal(views["audio"][0], views["audio"][1])
    for n, start in enumerate(starts):
        assert same({key: x[n:n + 1] for key, x in views.items()}, data.load_clip(path, SMALL, start))


# ---------------------------------------------------------------------------------------------------------------------
# 3. List a data set
# ---------------------------------------------------------------------------------------------------------------------

def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def contents(listing):
    """{file: sorted class names}"""
    labels = [[] if listing.labels is None else sorted(listing.classes[c] for c in listing.clip_labels(i)) for i in range(len(listing))]
    return dict(zip((str(Path(listing.path(i)).relative_to(listing.root)) for i in range(len(listing))), labels))


CLASSES = [("/m/09x0r", "Speech"), ("/m/05zppz", "Male speech, man speaking"), ("/m/03v3yw", "Keys jangling"), ("/m/0k4j", "Car")]


def make_audioset(folder):
    with open(folder / "class_labels_indices.csv", "w", newline="") as f:
        rows = csv.writer(f, quoting=csv.QUOTE_NONNUMERIC)
        f.write("index,mid,display_name\n")
        rows.writerows((i, mid, name) for i, (mid, name) in enumerate(CLASSES))
    for part, rows in {"balanced_train": f'''{TREE[0]}, 420.000, 430.000, "/m/03v3yw,/m/0k4j"
{TREE[1]}, 40.000, 50.000, "/m/09x0r"
MISSINGMISS, 0.000, 10.000, "/m/0k4j"
''', "unbalanced_train": f'''{TREE[2]}, 30.000, 40.000, "/m/09x0r,/m/05zppz,/m/0k4j"
{TREE[3]}, 0.000, 10.000, "/m/05zppz"
''', "eval": f'''{TREE[4]}, 5.000, 15.000, "/m/03v3yw"
missingmiss, 1.000, 11.000, "/m/03v3yw"
'''}.items():
        (folder / f"{part}_segments.csv").write_text(
            "# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=22160, num_segs=22160, num_unique_labels=527\n"
            f"# YTID, start_seconds, end_seconds, positive_labels\n{rows}")
    touch(folder, f"balanced/0/Y{TREE[0]}.wav", f"{TREE[1]}_40.000.mp4", f"un/deep/er/{TREE[2]}_30000_40000.mp4", f"un/{TREE[3]}.flac",
          f"eval/Y{TREE[4]}.wav", "notes.txt", "other.mp4", "Yunlisted00.wav")
    return folder


BALANCED = {f"balanced/0/Y{TREE[0]}.wav": ["Car", "Keys jangling"], f"{TREE[1]}_40.000.mp4": ["Speech"]}
UNBALANCED = {f"un/deep/er/{TREE[2]}_30000_40000.mp4": ["Car", "Male speech, man speaking", "Speech"],
              f"un/{TREE[3]}.flac": ["Male speech, man speaking"]}


@pytest.mark.parametrize("name, split, expected, missing", [
    ("audioset-20k", "train", BALANCED, 1), ("audioset", "train", UNBALANCED, 0), ("audioset-full", "train", BALANCED | UNBALANCED, 1),
    *((name, "test", {f"eval/Y{TREE[4]}.wav": ["Keys jangling"]}, 1) for name in ("audioset-20k", "audioset", "audioset-full"))])
def test_audioset_is_listed_by_its_csv_whatever_the_files_are_called(tmp_path, name, split, expected, missing):
    listing = data.list_clips(name, make_audioset(tmp_path), split)
    assert contents(listing) == expected and listing.missing == missing and listing.multilabel
    assert listing.classes == [name for _, name in CLASSES]
    targets = listing.targets(range(len(listing)))
    assert targets.shape == (len(expected), 4) and targets.dtype == torch.uint8
    for row, labels in zip(targets, contents(listing).values()):
        assert [name for (_, name), hot in zip(CLASSES, row) if hot == 1] == [n for _, n in CLASSES if n in labels]
        assert row.sum() == len(labels)
    assert f"{len(expected)} clips found" in data.describe(listing) and ("missing" in data.describe(listing)) == (missing > 0)


@pytest.mark.parametrize("stem, found", [
    ("abcdefghijk", "abcdefghijk"), ("Yabcdefghijk", "abcdefghijk"), ("abcdefghijk_30000_40000", "abcdefghijk"),
    ("abcdefghijk_30.000", "abcdefghijk"), ("Yabcdefghijk_30.000", "abcdefghijk"), ("Yabcdefghij", "Yabcdefghij"),
    ("YYabcdefghij", "Yabcdefghij"), ("Yabcdefghij_30000_40000", "Yabcdefghij"), ("Yabcdefghij_30.000", "Yabcdefghij"),
    ("YYabcdefghij_30.000", "Yabcdefghij"), ("Yabcdefghi__30.000", "Yabcdefghi_"), ("Y-_________-", "-_________-"),
    ("__________", None), ("abcdefghijkl", None), ("Yabcdefghijkl", None)])
def test_a_youtube_id_is_read_from_each_form_of_a_name(tmp_path, stem, found):
    touch(tmp_path, f"x/{stem}.mp4")
    index = data._by_id(data._scan(tmp_path))
    assert index.get(found) == (f"x/{stem}.mp4" if found else None) and (found or not index)


VGG = {"train": {f"{TREE[0]}_000030.mp4": ["playing drum kit, fast"], f"deep/{TREE[2]}_000005.mp4": ["cat purring"]},
       "test": {f"{TREE[1]}_000120.mp4": ["dog barking"]}}
VGG_FORMS = {
    "vggsound.csv": {"vggsound.csv": f'{TREE[0]},30,"playing drum kit, fast",train\n{TREE[1]},120,dog barking,test\n'
                                     f'{TREE[2]},5,cat purring,train\nMISSINGMISS,7,dog barking,train\n'},
    "two files": {"train.csv": f'{TREE[0]}_000030.mp4,"playing drum kit, fast"\n{TREE[2]}_000005.mp4,cat purring\n'
                               'MISSINGMISS_000007.mp4,dog barking\n', "test.csv": f"{TREE[1]}_000120.mp4,dog barking\n"}}


@pytest.mark.parametrize("form", VGG_FORMS)
def test_vggsound_is_listed_by_either_form_of_its_csv(tmp_path, form):
    touch(tmp_path, *VGG["train"], *VGG["test"], f"{TREE[4]}_000001.mp4")
    for name, text in VGG_FORMS[form].items():
        (tmp_path / name).write_text(text)
    for split, missing in (("train", 1), ("test", 0)):
        listing = data.list_clips("vggsound", tmp_path, split)
        assert contents(listing) == VGG[split] and listing.missing == missing and not listing.multilabel
        assert listing.classes == ["cat purring", "dog barking", "playing drum kit, fast"]
        assert [[listing.classes[c]] for c in listing.targets(range(len(listing)))] == list(VGG[split].values())


def test_a_folder_of_folders_is_split_the_same_way_each_time(tmp_path):
    names = {f"{label}/{'deep/' * (i % 2)}{i:02d}.mp4": [label] for label in ("cat", "dog", "owl") for i in range(30)}
    touch(tmp_path / "one", *names), touch(tmp_path / "two", *reversed(names))
    train, test = (contents(data.list_clips("folder", tmp_path / "one", split)) for split in ("train", "test"))
    assert not train.keys() & test.keys() and train | test == names and list(train) == sorted(train)
    assert 5 <= len(test) <= 35 and {labels[0] for labels in test.values()} == {"cat", "dog", "owl"}        # one in five
    assert [contents(data.list_clips("folder", tmp_path / "two", split)) for split in ("train", "test")] == [train, test]
    (tmp_path / "one" / "cat" / "new.mp4").touch()                              # a new clip moves no other to the other side
    assert contents(data.list_clips("folder", tmp_path / "one", "test")).items() >= test.items()


def test_a_folder_with_train_and_test_keeps_them(tmp_path):
    touch(tmp_path, "train/cat/1.mp4", "train/dog/2.wav", "train/dog/x/3.mkv", "test/cat/4.mp4", "test/dog/readme.txt")
    train, test = (data.list_clips("folder", tmp_path, split) for split in ("train", "test"))
    assert contents(train) == {"train/cat/1.mp4": ["cat"], "train/dog/2.wav": ["dog"], "train/dog/x/3.mkv": ["dog"]}
    assert contents(test) == {"test/cat/4.mp4": ["cat"]} and train.classes == test.classes == ["cat", "dog"]
    assert train.targets([2, 0]).tolist() == [1, 0]


def test_a_folder_without_folders_has_no_labels_and_serves_both_splits(tmp_path):
    touch(tmp_path, "a.mp4", "b c.wav", "ünïcode.MP4", "notes.txt")
    for split in ("train", "test"):
        listing = data.list_clips("folder", tmp_path, split)
        assert contents(listing) == {"a.mp4": [], "b c.wav": [], "ünïcode.MP4": []}
        assert listing.labels is None and listing.classes == []


def test_a_clip_with_any_name_can_be_read(tmp_path, clips):
    for name in ("-0RWZT-miFs_000030.mp4", "a:b%20c d#1?.mp4", "ünï.mp4"):
        (tmp_path / name).write_bytes((clips / "silent.mp4").read_bytes())
    listing = data.list_clips("folder", tmp_path)
    assert len(listing) == 3 and all(data.read_clip(listing.path(i), 0, 1, 1, 16)["has_video"] for i in range(3))


def test_the_current_folder_can_be_given_by_a_dot(tmp_path, monkeypatch):
    touch(tmp_path, "a.mp4")
    monkeypatch.chdir(tmp_path)
    assert contents(data.list_clips("folder", ".")) == {"a.mp4": []}


def test_a_subset_keeps_files_labels_and_classes(tmp_path):
    listing = data.list_clips("audioset-full", make_audioset(tmp_path))
    part = listing.subset(np.array([3, 0]))
    assert list(contents(part).items()) == [list(contents(listing).items())[i] for i in (3, 0)] and part.multilabel
    assert part.classes == listing.classes and torch.equal(part.targets([0, 1]), listing.targets([3, 0]))


def rewrite(name, text):
    return lambda folder: (make_audioset(folder) / name).write_text(text)


def vggsound(text):
    return lambda folder: (folder / "vggsound.csv").write_text(text)


@pytest.mark.parametrize("name, make, words", [
    ("audioset2", None, "not a data set"),
    ("folder", lambda folder: folder.rmdir(), "no such folder"),
    ("folder", None, "no clip in"),
    ("folder", lambda folder: touch(folder, "notes.txt"), "no clip in"),
    ("folder", lambda folder: touch(folder, "test/a/1.mp4"), "train split"),
    ("audioset", None, "class_labels_indices.csv: there is no such file"),
    ("vggsound", None, "train.csv: there is no such file"),
    ("audioset", lambda folder: (make_audioset(folder) / "unbalanced_train_segments.csv").unlink(), "train_segments.csv: there is no"),
    ("audioset", rewrite("unbalanced_train_segments.csv", ""), "empty"),
    ("audioset", rewrite("unbalanced_train_segments.csv", "# only\n# a\n# comment\n\n"), "empty"),
    ("vggsound", vggsound(""), "empty"),
    ("audioset", rewrite("unbalanced_train_segments.csv", 'abcdefghijk, 0.000, 10.000, "/m/0k4j,/m/unknown"\n'), "/m/unknown"),
    ("audioset", rewrite("unbalanced_train_segments.csv", "abcdefghijk, 0.000\n"), "form"),
    ("audioset", rewrite("class_labels_indices.csv", "index,mid,display_name\nzero,/m/0k4j,Car\n"), "form"),
    ("audioset", rewrite("class_labels_indices.csv", "index,mid,display_name\n"), "unknown class|empty"),
    ("audioset", rewrite("unbalanced_train_segments.csv", 'MISSINGMISS, 0.000, 10.000, "/m/0k4j"\n'), "none of the 1 listed clips"),
    ("vggsound", vggsound("abcdefghijk,30,dog barking,train\n"), "none of the 1 listed clips"),
    ("vggsound", vggsound("abcdefghijk,30,dog barking\n"), "four fields"),
    ("vggsound", vggsound("abcdefghijk,thirty,dog barking,train\n"), "start")])
def test_what_is_wrong_with_a_data_set_is_said_in_a_sentence(tmp_path, name, make, words):
    folder = tmp_path / "data"
    folder.mkdir()
    if make:
        make(folder)
    with pytest.raises(UserError, match=words) as e:
        data.list_clips(name, folder)
    assert "\n" not in str(e.value) and len(str(e.value)) > 20


def test_a_header_in_vggsounds_csv_makes_no_class(tmp_path):
    (tmp_path / "vggsound.csv").write_text("youtube_id,start,label,split\nabcdefghijk,30,dog barking,train\n")
    touch(tmp_path, "abcdefghijk_000030.mp4")
    with contextlib.suppress(UserError):                                        # the set has none: refuse it, or leave it out
        assert data.list_clips("vggsound", tmp_path).classes == ["dog barking"]


def test_a_csv_that_is_not_utf8_is_read_or_refused_in_a_sentence(tmp_path):
    (tmp_path / "vggsound.csv").write_bytes(b"abcdefghijk,30,caf\xe9,train\n")
    touch(tmp_path, "abcdefghijk_000030.mp4")
    with contextlib.suppress(UserError):
        assert len(data.list_clips("vggsound", tmp_path)) == 1


@pytest.mark.parametrize("name", ["audioset", "audioset-20k", "audioset-full", "vggsound", "folder"])
def test_a_data_set_without_a_folder_is_refused(name):
    with pytest.raises(UserError, match="--data-dir"):
        data.list_clips(name)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Draw batches
# ---------------------------------------------------------------------------------------------------------------------

def test_no_clip_comes_twice_in_an_epoch_and_another_epoch_has_another_order():
    batches = list(data.Batches(23, 6, seed=0, start=0, steps=9))               # 3 steps an epoch, 5 clips left over
    epochs = [[key for batch in batches[e * 3:e * 3 + 3] for key in batch] for e in range(3)]
    for e, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {e} and len({i for _, i in keys}) == 18 and all(0 <= i < 23 for _, i in keys)
    orders = [[i for _, i in keys] for keys in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert {i for order in orders for i in order} == set(range(23))             # what one epoch leaves out, another takes
    assert batches == list(data.Batches(23, 6, 0, 0, 9)) and batches != list(data.Batches(23, 6, 1, 0, 9))


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (3, 2), (1, 4), (4, 3)])
def test_ranks_and_micro_batches_part_the_global_batch(world, accumulate):
    whole = list(data.Batches(50, 24, 7, 0, 6))
    parts = [list(data.Batches(50, 24, 7, 0, 6, rank, world, accumulate)) for rank in range(world)]
    for rank in range(world):
        assert len(parts[rank]) == len(data.Batches(50, 24, 7, 0, 6, rank, world, accumulate)) == 6 * accumulate
    for step in range(6):
        micro = [batch for part in parts for batch in part[step * accumulate:(step + 1) * accumulate]]
        assert {len(batch) for batch in micro} == {24 // world // accumulate}
        assert sorted(key for batch in micro for key in batch) == sorted(whole[step])


@pytest.mark.parametrize("start", [0, 1, 3, 5, 8, 9])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_goes_on_draws_exactly_the_tail(start, accumulate):
    whole, tail = (list(data.Batches(23, 8, 2, s, 9, 1, 2, accumulate)) for s in (0, start))
    assert tail == whole[start * accumulate:]


@pytest.mark.parametrize("count, batch, world, accumulate, words", [(5, 6, 1, 1, "larger than the set"), (50, 9, 2, 1, "not divisible"),
                                                                    (50, 6, 1, 4, "not divisible"), (50, 12, 4, 2, "not divisible")])
def test_a_batch_that_cannot_be_drawn_is_refused(count, batch, world, accumulate, words):
    with pytest.raises(UserError, match=words):
        data.Batches(count, batch, 0, 0, 1, 0, world, accumulate)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The toy world
# ---------------------------------------------------------------------------------------------------------------------

@functools.cache
def toy_item(index, split="train"):
    return data.toy_clip(0, split, index)


@pytest.fixture()
def tiny_world(monkeypatch):
    monkeypatch.setattr(data, "TOY", {**data.TOY, "train": 6, "test": 4})


def hue(rgb):
    """Hue in [0, 1) of (..., 3), by the hexagon's definition, and chroma over value."""
    rgb = np.asarray(rgb, float)
    top, low, (r, g, b) = rgb.max(-1), rgb.min(-1), np.moveaxis(rgb, -1, 0)
    chroma = np.maximum(top - low, 1e-9)
    sector = np.select([top == r, top == g], [(g - b) / chroma, (b - r) / chroma + 2], (r - g) / chroma + 4)
    return sector / 6 % 1, chroma / np.maximum(top, 1e-9)


def circular(a, b, period=1.0):
    return np.abs((np.asarray(a) - b + period / 2) % period - period / 2)


def test_a_toy_clip_is_a_pure_function_of_seed_split_and_index():
    for key in ((0, "train", 3), (0, "test", 3), (1, "train", 3), (0, "train", 11)):
        np.random.seed(5), torch.manual_seed(5)
        one = data.toy_clip(*key)
        np.random.seed(6), torch.manual_seed(6)
        two = data.toy_clip(*key)
        assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1]) and one[2].keys() == two[2].keys()
        for k in one[2]:
            np.testing.assert_array_equal(one[2][k], two[2][k])
        if key != (0, "train", 3):
            assert not np.array_equal(one[0], toy_item(3)[0]) and not np.array_equal(one[1], toy_item(3)[1])
    frames, wave, truth = toy_item(3)
    assert frames.shape == (40, 64, 64, 3) and frames.dtype == np.uint8 and truth["place"].shape == (40, 2)
    assert wave.shape == (64000,) and wave.dtype == np.float32 and 0.01 < np.abs(wave).max() <= 1


def test_toy_labels_are_balanced():
    assert data.TOY["train"] % 8 == data.TOY["test"] % 8 == 0
    for split in ("train", "test"):
        assert np.bincount([toy_item(i, split)[2]["label"] for i in range(16)]).tolist() == [2] * 8


@pytest.mark.parametrize("index", range(8))
def test_toy_onsets_in_the_sound_fall_at_the_bounces(index):
    """With the period known, both phases are found by a search: the one where the wave's energy rises, and the one of the
    parabolas that fit the object's height best. They differ by less than half a frame."""
    frames, wave, truth = toy_item(index)
    period, y, phases = truth["period"], truth["place"][:, 1], np.linspace(0, 1, 400, endpoint=False)
    t = (np.arange(len(y)) + 0.5) / 10
    level = np.log(np.convolve(wave.astype(float) ** 2, np.ones(320) / 320, "same") + 1e-6)              # over 20 ms
    rise = np.maximum(level[320:] - level[:-320], 0)                                                    # at 10 ms + its index
    beats = (np.arange(11)[:, None] + phases) * period                                                  # (beat, phase) seconds
    inside = (beats > 0.1) & (beats < 3.8)
    heard = (np.where(inside, rise[np.clip(beats * 16000 - 160, 0, len(rise) - 1).astype(int)], 0).sum(0) / inside.sum(0)).argmax()
    u = (t[:, None] / period - phases) % 1
    fits = [np.linalg.lstsq(np.stack([np.ones(len(t)), v * (1 - v)], 1), y, rcond=None)[1].sum() for v in u.T]
    seen = int(np.argmin(fits))
    assert circular(phases[heard], phases[seen]) * period < 0.05
    lowest = np.flatnonzero((y[1:-1] > y[:-2]) & (y[1:-1] > y[2:])) + 1                                  # frames, y is downwards
    assert len(lowest) >= 2
    assert (circular(t[lowest], (phases[heard] * period) % period, period) < 0.1).all()


def pixels_of(index, label=None):
    """(T, H, W) bool: the pixels of a toy clip that have the hue of its label, or of another one."""
    frames, _, truth = toy_item(index)
    hues = dict(red=0, orange=0.09, green=0.36, teal=0.48, blue=0.62, violet=0.74, pink=0.87, lime=0.22)
    found, strength = hue(frames)
    name = data.TOY_CLASSES[truth["label"] if label is None else label]
    return (circular(found, hues[name.split()[0]]) < 0.05) & (strength > 0.55)


def test_toy_place_points_at_the_objects_colour():
    """The middle of the pixels of its hue, in the frames where no edge cuts the object; and, but for the rings, the very pixel."""
    hits = []
    for index in range(24):
        mask, place = pixels_of(index), toy_item(index)[2]["place"] * 64
        near = np.abs(np.stack(np.meshgrid(*[np.arange(64) + 0.5] * 2), -1) - place[:, None, None]).max(-1) < 20
        mask = mask & near                                                      # not the specks of the background
        whole = (mask.sum((1, 2)) > 20) & ~(mask[:, [0, -1]].any((1, 2)) | mask[:, :, [0, -1]].any((1, 2)))
        middles = np.array([[np.median(np.nonzero(m)[1]), np.median(np.nonzero(m)[0])] for m in mask[whole]]) + 0.5
        assert whole.sum() >= 5 and np.median(np.abs(middles - place[whole])) < 1, index
        hits.append(np.mean([m[int(y), int(x)] for m, (x, y) in zip(mask, place)]) > 0.9)
    assert 0.55 < np.mean(hits) <= 1                                            # three shapes of four have no hole


def test_toy_silent_place_points_at_the_second_object_and_is_nan_without_one():
    """Of the seven other hues one lies around the place in the frames, as far as the sounding object does not cover it."""
    found = 0
    for index in range(24):
        truth = toy_item(index)[2]
        place = truth["silent_place"] * 64
        assert place.shape == (40, 2) and np.isnan(place).all() == np.isnan(place).any() == (not truth["silent"])
        if truth["silent"]:
            apart = np.abs(np.stack(np.meshgrid(*[np.arange(64) + 0.5] * 2), -1) - place[:, None, None]).max(-1)
            masks = [pixels_of(index, label) & (apart < 20) for label in range(8) if label != truth["label"]]
            mask = max(masks, key=np.sum)
            whole = (mask.sum((1, 2)) > 20) & ~(mask[:, [0, -1]].any((1, 2)) | mask[:, :, [0, -1]].any((1, 2)))
            whole &= np.abs(truth["place"] * 64 - place).max(1) > 26                # the sounding object is drawn over it
            middles = np.array([[np.median(np.nonzero(m)[1]), np.median(np.nonzero(m)[0])] for m in mask[whole]]) + 0.5
            if whole.sum() >= 5:
                found += 1
                assert np.median(np.abs(middles - place[whole])) < 1, index
    assert found >= 5


def test_toy_size_and_pitch_move_together():
    """Area by counting pixels of the hue, pitch by the strongest partial, over clips of the class whose fundamental is loudest."""
    areas, pitches = [], []
    for index in range(0, 160, 8):
        if not toy_item(index)[2]["silent"]:
            areas.append(np.median(pixels_of(index).sum((1, 2))))
            spectrum = np.abs(np.fft.rfft(toy_item(index)[1]))
            frequencies = np.arange(len(spectrum)) / 4                                                  # 4 seconds
            band = (frequencies > 200) & (frequencies < 1000)
            pitches.append(frequencies[band][spectrum[band].argmax()])
            assert abs(np.log2(pitches[-1] / (220 * 2 ** toy_item(index)[2]["octave"]))) < 0.06
    assert len(areas) >= 6 and np.ptp(np.log2(pitches)) > 1.2 and np.corrcoef(np.log(areas), np.log(pitches))[0, 1] < -0.9


def test_the_toy_clips_are_written_once_and_the_same_each_time(tmp_path, tiny_world, monkeypatch):
    listing = data.list_clips("toy", tmp_path / "one")
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)                        # by another number of processes
    data.make_toy(tmp_path / "two")
    one, two = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "one", tmp_path / "two"))
    assert [name for name in one if one[name] != two.get(name)] == [] and one.keys() == two.keys()
    assert sum(name.endswith(".mp4") for name in one) == 10
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")}
    data.make_toy(tmp_path / "one")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]

    test = data.list_clips("toy", tmp_path / "one", "test")
    assert len(listing) == 6 and len(test) == 4 and listing.targets(range(6)).tolist() == [0, 1, 2, 3, 4, 5]
    truth = np.load(tmp_path / "one" / "test" / "truth.npz")
    for i in range(4):
        frames, wave, true = toy_item(i, "test")
        clip = data.read_clip(test.path(i), 0.0, 4.0, 40, 64, 16000)
        assert clip["has_video"] and clip["has_audio"] and not clip["short"]
        assert np.abs(clip["video"].astype(int) - frames).mean() < 12 and np.corrcoef(clip["audio"], wave)[0, 1] > 0.9
        assert all(np.array_equal(truth[k][i], true[k]) for k in ("label", "octave", "period", "silent", "place"))


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError])
def test_nothing_is_left_behind_when_writing_the_toy_clips_is_interrupted(tmp_path, tiny_world, monkeypatch, cause):
    if cause is OSError:                                                        # a full disk, in a worker
        def full(path, *args, really_write=data.write_clip):
            if path.name == "00003.mp4":
                raise OSError("No space left on device")
            really_write(path, *args)
        monkeypatch.setattr(data, "write_clip", full)
    else:                                                                       # Ctrl-C, in this process
        def interrupted(rows, **kwargs):
            for i, row in enumerate(rows):
                if i == 2:
                    raise KeyboardInterrupt
                yield row
        monkeypatch.setattr(data, "tqdm", interrupted)
    with pytest.raises(cause):
        data.make_toy(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_toy_clips_are_written_ends_it_and_leaves_nothing_behind(tmp_path, signum):
    ran = subprocess.Popen([sys.executable, ROOT / "data.py", "--data", "toy", "--data-dir", tmp_path / "toy", "--workers", "1"],
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))             # a job in the background ignores it
    try:
        end = time.time() + 40
        while len(list(tmp_path.rglob("*.mp4"))) < 5 and time.time() < end:
            time.sleep(0.05)
        assert list(tmp_path.rglob("*.mp4")), "nothing was written"
        ran.send_signal(signum)
        ran.wait(10)
        assert list(tmp_path.iterdir()) == []
    finally:
        ran.kill()
        ran.wait()


CRASH = """
import functools, sys
import common, data
def main():
    listing = data.make_listing("some", sys.argv[1], ["good.mp4"] * 40, None, [])
    inputs = data.Inputs(seconds=1.0, frames=2, size=16, resize=16, n_mels=16)
    clips = data.Clips(listing, inputs, functools.partial(data.even_views, 1, inputs))
    for batch in data.train_loader(clips, data.Batches(40, 2, 0, 0, 20), 1):
        raise RuntimeError("out of memory")
common.main_guard(main)
"""


def test_an_exception_beside_the_data_workers_ends_the_process(clips):
    """The workers ignore SIGTERM, by which Python ends them at exit: it must not wait for them forever."""
    ran = subprocess.run([sys.executable, "-c", CRASH, clips], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 1 and "out of memory" in ran.stderr


def test_a_toy_folder_of_another_world_or_with_other_files_is_refused(tmp_path, tiny_world, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        data.make_toy(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "toy").mkdir()                                                  # an empty folder will do
    monkeypatch.setattr(data, "TOY", {**data.TOY, "train": 2, "test": 1})
    data.make_toy(tmp_path / "toy")
    monkeypatch.setattr(data, "TOY", {**data.TOY, "seed": 1})
    with pytest.raises(UserError, match="another world"):
        data.make_toy(tmp_path / "toy")
    assert len(list((tmp_path / "toy").rglob("*.mp4"))) == 3


def test_write_clip_writes_what_was_given(tmp_path):
    frames, wave = np.stack([numbered(n) for n in range(48)]), np.stack([tone(1000, 4), tone(2000, 4, amplitude=0.2)])
    data.write_clip(tmp_path / "clip.mp4", frames, wave, fps=12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"] and container.streams.audio[0].channels == 2
        assert [read_number(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)] == list(range(48))
    clip = data.read_clip(tmp_path / "clip.mp4", 1.0, 2.0, 24, 48)
    assert [read_number(picture) for picture in clip["video"]] == list(range(12, 36))
    assert abs(amplitude_at(clip["audio"], 1000)[0] - 0.25) < 0.01 and abs(amplitude_at(clip["audio"], 2000)[0] - 0.1) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# 6. What is there, and its statistics
# ---------------------------------------------------------------------------------------------------------------------

def test_check_counts_what_lies_in_a_folder(tmp_path, clips, capsys):
    raw = (clips / "good.mp4").read_bytes()
    (tmp_path / "good.mp4").write_bytes(raw)
    (tmp_path / "silent.mp4").write_bytes((clips / "silent.mp4").read_bytes())
    (tmp_path / "sound.wav").write_bytes((clips / "sound.wav").read_bytes())
    (tmp_path / "cut.mp4").write_bytes(raw[:len(raw) // 2])
    (tmp_path / "empty.mp4").touch()
    for workers in (0, 1):
        data.main(["--data", "folder", "--data-dir", str(tmp_path), "--check", "--workers", str(workers)])
        printed = "".join(capsys.readouterr())
        assert "folder: 5 clips found" in printed and "unreadable 2, without picture 1, without sound 1, 0.01 hours" in printed
        assert printed.count("unreadable: ") == 2 and "cut.mp4" in printed and "empty.mp4" in printed
    assert data.check(data.list_clips("folder", tmp_path), 0) == {
        "clips": 5, "missing": 0, "unreadable": 2, "no video": 1, "no audio": 1, "seconds": pytest.approx(24, abs=0.2)}


@pytest.mark.parametrize("end", ["mp4", "mkv"])
def test_check_calls_no_clip_silent_whose_sound_ends_early(tmp_path, end):
    write(tmp_path / f"early.{end}", [numbered(n) for n in range(200)], tone(1000, 2.5))
    assert data.check(data.list_clips("folder", tmp_path), 0)["no audio"] == 0


@pytest.mark.parametrize("flags, how", [("", {}), ("--mels 64 --hop 320 --seconds 2.5", dict(n_mels=64, hop=320, seconds=2.5))])
def test_stats_are_the_mean_and_std_of_the_mel_in_db(tmp_path, clips, capsys, flags, how):
    rng = np.random.default_rng(0)
    lengths = (8.5, 10.0, 12.0)                                                 # longer than the 8 seconds of a view
    for i, seconds in enumerate(lengths):
        write(tmp_path / f"{i}.wav", wave=rng.normal(0, 0.1 / (i + 1), round(seconds * 16000)), audio="pcm_s16le")
    (tmp_path / "silent.mp4").write_bytes((clips / "silent.mp4").read_bytes())  # left out: nothing to hear
    (tmp_path / "empty.mp4").touch()
    data.main(["--data", "folder", "--data-dir", str(tmp_path), "--stats", "--workers", "0", *flags.split()])
    found = capsys.readouterr().out.split("--mel-mean ")[1].split()
    inputs = Inputs(**how)
    middles = [data.read_clip(tmp_path / f"{i}.wav", (n - inputs.seconds) / 2, inputs.seconds, 1, 16, 16000) for i, n in enumerate(lengths)]
    mels = [mel_by_numpy(clip["audio"], inputs) for clip in middles]
    assert float(found[0]) == pytest.approx(np.mean(mels), abs=2e-3) and float(found[2]) == pytest.approx(np.std(mels), abs=2e-3)


def test_stats_of_short_clips_do_not_count_the_padding(tmp_path, capsys):
    """A loud clip of 2 seconds: its mel is what numpy says of the 2 seconds, not of 6 more of silence."""
    wave = np.random.default_rng(0).normal(0, 0.1, 2 * 16000)
    write(tmp_path / "short.wav", wave=wave, audio="pcm_s16le")
    data.main(["--data", "folder", "--data-dir", str(tmp_path), "--stats", "--workers", "0"])
    found = capsys.readouterr().out.split("--mel-mean ")[1].split()
    mel = mel_by_numpy(data.read_clip(tmp_path / "short.wav", 0, 2.0, 1, 16, 16000)["audio"], Inputs())
    assert float(found[0]) == pytest.approx(mel.mean(), abs=2e-3) and float(found[2]) == pytest.approx(mel.std(), abs=2e-3)


def test_stats_without_any_sound_are_refused(tmp_path, clips):
    (tmp_path / "silent.mp4").write_bytes((clips / "silent.mp4").read_bytes())
    with pytest.raises(UserError, match="no clip"):
        data.main(["--data", "folder", "--data-dir", str(tmp_path), "--stats", "--workers", "0"])
