"""datasets/reader.py on files as people have them: made by `av`, or byte by byte what it does not write.

The clips are clocks of 12 seconds: the frames are numbered, 10 a second, and the pitch of the sound tells its
time."""
import heapq
import os
import struct
import sys
import tarfile
import tracemalloc
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition

import common
import data
from conftest import command, fails, numbered, read_number
from data import ClipError, Inputs
from datasets import collectors, reader, shards

SECONDS = 12
FPS = 10
LOW = 300                                               # Hz at the start ...
RISE = 150                                              # ... and this much more each second
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1", 16: "hexadecagonal"}
SMALL = Inputs(seconds=1.0, frames=4, size=48, resize=48, n_mels=16, mel_mean=-30.0, mel_std=20.0)


# --- Clocks ---

class Track(NamedTuple):
    """The clock from `begin` to `end` as one stream, whose timestamps begin at `at`."""
    codec: str
    begin: float = 0.0
    end: float = SECONDS
    at: float = 0.0
    size: tuple = (48, 64)                              # of pictures
    aspect: Fraction | None = None                      # of their pixels
    refreshes: bool = False                             # key frames are columns that move, of many frames
    rate: int = 16000                                   # of sound
    gains: tuple = (1.0,)                               # of its channels
    bits: int | None = None                             # a second
    quiet: tuple = ()                                   # seconds, from and to, of silence
    default: bool | None = None                         # is it the one to play?
    b_frames: bool = False


SPEED = {
    "libx264": {"preset": "ultrafast", "crf": "15", "g": "10"},
    "libx265": {"x265-params": "log-level=none:pools=1", "preset": "ultrafast", "g": "10"},
    "libvpx": {"deadline": "realtime", "cpu-used": "16", "g": "10"},
    "mpeg4": {"g": "10"},
    "wmv2": {"g": "10"},
    "aac": {"aac_coder": "fast"},
    "libopus": {"mapping_family": "1", "compression_level": "0"}}


def sweep(begin, end, rate=16000):
    t = np.arange(round(begin * rate), round(end * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (LOW * t + RISE / 2 * t * t))


def time_of(wave, rate=16000):
    """Seconds on the clock in the middle of a piece of the sweep; NaN if that is silent."""
    if np.abs(wave).max() < 1e-3:
        return np.nan
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 4 * len(wave))) ** 2
    pitch = np.arange(len(power)) * rate / (4 * len(wave))
    near = np.abs(pitch - pitch[power.argmax()]) < 40
    return ((pitch * power)[near].sum() / power[near].sum() - LOW) / RISE


def pictures(stream, track):
    """(time, stream, frame) of each frame."""
    for n in range(round((track.end - track.begin) * FPS)):
        frame = numbered(round(track.begin * FPS) + n, height=track.size[0], width=track.size[1])
        frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
        frame.pts = n + round(track.at * FPS)
        yield frame.pts / FPS, stream, frame


def sounds(stream, track):
    """(time, stream, frame) of every 1,024 samples."""
    wave = sweep(track.begin, track.end, track.rate)
    if track.quiet:
        wave[round(track.quiet[0] * track.rate):round(track.quiet[1] * track.rate)] = 0
    samples = np.outer(wave, track.gains).astype(np.float32)            # (samples, channels)
    for start in range(0, len(samples), 1024):
        packed = samples[start:start + 1024].reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=LAYOUTS[len(track.gains)])
        frame.sample_rate = track.rate
        frame.pts = start + round(track.at * track.rate)
        yield frame.pts / track.rate, stream, frame


def add_track(container, track):
    options = dict(SPEED.get(track.codec, {}))
    if av.Codec(track.codec, "w").type == "audio":
        layout = LAYOUTS[len(track.gains)]
        stream = container.add_stream(track.codec, rate=track.rate, layout=layout, options=options)
        frames = sounds(stream, track)
    else:
        if track.refreshes:
            options |= {"preset": "veryfast", "x264-params": "intra-refresh=1:scenecut=0"}
        if track.b_frames:
            options |= {"bf": "2", "preset": "veryfast"}
        stream = container.add_stream(track.codec, rate=FPS, options=options)
        stream.height, stream.width = track.size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if track.aspect:
            stream.sample_aspect_ratio = track.aspect
        frames = pictures(stream, track)
    if track.bits:
        stream.bit_rate = track.bits
    if track.default is not None:
        stream.disposition = Disposition.default if track.default else Disposition(0)
    return frames


class Pipe:
    """What can be written to, but not sought."""
    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, part):
        return self.file.write(bytes(part))

    def close(self):
        self.file.close()


def record(tracks, path, format=None, pipe=False, **options):
    """Write the tracks in the order of their times."""
    target = Pipe(path) if pipe else str(path)
    with av.open(target, "w", format=format, options=options) as container:
        frames = [add_track(container, track) for track in tracks]
        for _, stream, frame in heapq.merge(*frames, key=lambda item: item[0]):
            container.mux(stream.encode(frame))
        for stream in container.streams:
            container.mux(stream.encode(None))
    if pipe:
        target.close()


def join(first, second, path, offset=0, **options):
    """Two files one after the other. offset: seconds, of the timestamps of the second one."""
    record(first, path, **options)
    part = path.with_name(f"part-{path.name}")
    record(second, part, **options, output_ts_offset=str(offset))
    path.write_bytes(path.read_bytes() + part.read_bytes())
    part.unlink()


def write_wav(samples, path, rate=16000, size=None):
    """By hand. samples: (n, channels) int16 or float32; size: what the header says, if not the truth."""
    width = samples.dtype.itemsize
    channels = samples.shape[1]
    kind = 3 if samples.dtype.kind == "f" else 1
    raw = samples.tobytes()
    size = len(raw) if size is None else size
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width, channels * width, 8 * width)
    head = b"RIFF" + struct.pack("<I", (size + 36) % 2 ** 32) + b"WAVEfmt " + struct.pack("<I", 16) + form
    path.write_bytes(head + b"data" + struct.pack("<I", size) + raw)


def record_wav(gains, path, end=SECONDS, **how):
    write_wav(np.outer(sweep(0, end) * 32767, gains).astype("<i2"), path, **how)


def flac_without_total(path):
    """STREAMINFO (RFC 9639) ends in 36 bits of the number of samples, 0 if unknown, and an MD5."""
    record([FLAC], path)
    raw = bytearray(path.read_bytes())
    raw[21] &= 0xf0
    raw[22:26] = bytes(4)
    path.write_bytes(raw)


def two_sizes(path):
    """One stream whose pictures change their size, in a container that says one size."""
    codec = "libvpx"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "yuv420p"
        for begin, size in ((0, (48, 64)), (60, (64, 96))):
            encoder = av.CodecContext.create(codec, "w")
            encoder.height, encoder.width = size
            encoder.pix_fmt = "yuv420p"
            encoder.time_base = Fraction(1, FPS)
            encoder.options = SPEED[codec]
            encoder.thread_count = 1
            track = Track(codec, begin / FPS, begin / FPS + 6, size=size)
            frames = [frame.reformat(format="yuv420p") for _, _, frame in pictures(None, track)]
            for frame in [*frames, None]:
                for packet in encoder.encode(frame):
                    packet.pts += begin
                    packet.dts += begin
                    packet.time_base = Fraction(1, FPS)
                    packet.stream = stream
                    container.mux(packet)


H264 = Track("libx264")
MPEG4 = Track("mpeg4")
VP8 = Track("libvpx")
AAC = Track("aac", bits=64_000)
STEREO = Track("aac", bits=64_000, gains=(1.0, 1.0))
AC3 = Track("ac3", rate=48000)
OPUS = Track("libopus", rate=48000)
WMV = Track("wmv2")
WMA = Track("wmav2", rate=44100, bits=64_000)
MP3 = Track("libmp3lame")
FLAC = Track("flac")
PCM = Track("pcm_s16le")
MUSIC = Track("aac", begin=30.0, end=42.0, bits=64_000, default=False)  # of another time
LATE = {"output_ts_offset": "3600"}
BARE = {"write_xing": "0", "id3v2_version": "0"}                        # an mp3 without headers
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def first(track, **changes):
    return track._replace(end=6.0, **changes)


def second(track, **changes):
    return track._replace(begin=6.0, **changes)


def go_on(pictures, sound):
    """mpeg-ts whose second half is these."""
    return partial(join, [first(H264), first(AAC)], [second(pictures), second(sound)], offset=6)


WHOLE = {                                               # name: (v: pictures, a: sound; how to write it)
    # lengths that are missing or guessed
    "pipe.webm": ("va", partial(record, [VP8, OPUS], format="webm", pipe=True)),
    "pipe.mkv": ("va", partial(record, [H264, AAC], format="matroska", pipe=True)),
    "pipe.mp4": ("va", partial(record, [H264, AAC], format="mp4", pipe=True, **FRAGMENTS)),
    "pipe.flv": ("va", partial(record, [H264, AAC], format="flv", pipe=True)),
    "pipe.avi": ("va", partial(record, [MPEG4, PCM], format="avi", pipe=True)),
    "pipe.ts": ("va", partial(record, [H264, AC3], format="mpegts", pipe=True)),
    "pipe.wmv": ("va", partial(record, [WMV, WMA], format="asf", pipe=True)),
    "pipe.flac": ("a", partial(record, [FLAC], format="flac", pipe=True)),
    "no-total.flac": ("a", flac_without_total),
    "size-0.wav": ("a", partial(record_wav, (1.0,), size=0)),
    "size-ffffffff.wav": ("a", partial(record_wav, (1.0,), size=2 ** 32 - 1)),
    "quiet-first.aac": ("a", partial(record, [AAC._replace(quiet=(0, 1.1))], format="adts")),
    "quiet-later.aac": ("a", partial(record, [AAC._replace(quiet=(2.5, 8.2))], format="adts")),
    "vbr-up.mp3": ("a", partial(join, [first(MP3, bits=8000)], [second(MP3, bits=160_000)], **BARE)),
    "vbr-down.mp3": ("a", partial(join, [first(MP3, bits=160_000)], [second(MP3, bits=8000)], **BARE)),
    # clocks that begin late
    "late.mkv": ("va", partial(record, [H264, AAC], **LATE)),
    "late.mp4": ("va", partial(record, [H264, AAC], **LATE)),
    "late.ts": ("va", partial(record, [H264, AAC], **LATE)),
    "late.nut": ("va", partial(record, [H264, AAC], **LATE)),
    "late.wmv": ("va", partial(record, [WMV, WMA], format="asf", **LATE)),
    "late.ogg": ("a", partial(record, [OPUS], **LATE)),
    "late-pipe.webm": ("va", partial(record, [VP8, OPUS], format="webm", pipe=True, **LATE)),
    "sound-late.mp4": ("va", partial(record, [H264, AAC._replace(begin=1.0, at=1.0)])),
    "sound-late.mkv": ("va", partial(record, [H264, AAC._replace(begin=1.0, at=1.0)])),
    "sound-late.ts": ("va", partial(record, [H264, AAC._replace(begin=1.0, at=1.0)])),
    "pictures-late.mp4": ("va", partial(record, [H264._replace(begin=1.0, at=1.0), AAC])),
    "pictures-late.flv": ("va", partial(record, [H264._replace(begin=1.0, at=1.0), AAC])),
    # changes in mid-stream
    "channels.aac": ("a", partial(join, [first(AAC)], [second(STEREO)], format="adts")),
    "channels.mp3": ("a", partial(join, [first(MP3)], [second(MP3, gains=(1.0, 1.0))])),
    "channels.ts": ("va", go_on(H264, STEREO)),
    "rate.aac": ("a", partial(join, [first(AAC)], [second(AAC, rate=48000)], format="adts")),
    "rate.ac3": ("a", partial(join, [first(AC3, rate=32000)], [second(AC3)])),
    "rate.mp3": ("a", partial(join, [first(MP3)], [second(MP3, rate=48000)])),
    "rate.ts": ("va", go_on(H264, AAC._replace(rate=48000))),
    "size.ts": ("va", go_on(H264._replace(size=(64, 96)), AAC)),
    "size.h264": ("v", partial(join, [first(H264)], [second(H264, size=(64, 96))])),
    "size.webm": ("v", two_sizes),
    # no times, or such as FFmpeg seeks wrongly
    "plain.h264": ("v", partial(record, [H264])),
    "b-frames.h264": ("v", partial(record, [H264._replace(b_frames=True)])),
    "plain.hevc": ("v", partial(record, [Track("libx265")])),
    "plain.m4v": ("v", partial(record, [MPEG4])),
    "plain.avi": ("va", partial(record, [MPEG4, PCM])),
    "b-frames.avi": ("va", partial(record, [H264._replace(b_frames=True), PCM])),
    "plain.wv": ("a", partial(record, [Track("wavpack")])),
    "plain.oga": ("a", partial(record, [FLAC], format="oga")),
    "plain.ac3": ("a", partial(record, [AC3])),
    # which stream, and channels that cancel each other
    "second.mkv": ("va", partial(record, [H264, MUSIC, AAC._replace(default=True)])),
    "second.mp4": ("va", partial(record, [H264, MUSIC, AAC._replace(default=True)])),
    "still.mp4": ("a", partial(record, [H264._replace(end=0.1), AAC])),
    "still.mkv": ("a", partial(record, [H264._replace(end=0.1), AAC])),
    "still.ts": ("a", partial(record, [H264._replace(end=0.1), AAC])),
    "still.webm": ("a", partial(record, [VP8._replace(end=0.1), OPUS], format="webm", pipe=True)),
    "opposite.wav": ("a", partial(record_wav, (1.0, -1.0))),
    "opposite.mp4": ("va", partial(record, [H264, STEREO._replace(gains=(1.0, -1.0))]))}


for ending in ("mp4", "ts"):
    WHOLE[f"refreshed.{ending}"] = ("v", partial(record, [H264._replace(refreshes=True)]))


# --- Whole files: the right length, the right moment ---

def read(path, windows):
    with data.open_clip(path) as clip:
        return clip.read(windows, windows, 16, 48, 16000)


def late(pictures, window):
    """Seconds from the middle of the window to the time that its pictures tell."""
    times = [(read_number(picture) + 0.5) / FPS for picture in pictures]
    return np.mean(times) - (window[0] + window[1] / 2)


def late_sound(wave, window):
    middle = len(wave) // 2
    return time_of(wave[middle - 2000:middle + 2000]) - (window[0] + window[1] / 2)


def assert_right(found, windows, kinds, exact=0.11):
    """All of the windows decoded, to the right pictures ("v") and the right sound ("a")."""
    for kind, flag, each in (("v", "has_video", "seen"), ("a", "has_audio", "heard")):
        assert found[flag] == (kind in kinds) and found[each] == [kind in kinds] * len(windows)
    assert not found["short"]
    for window, pictures, wave in zip(windows, found["video"], found["audio"], strict=True):
        assert "v" not in kinds or abs(late(pictures, window)) < exact
        assert "a" not in kinds or abs(late_sound(wave, window)) < exact


@pytest.mark.parametrize("name", WHOLE)
def test_length_pictures_and_sound_are_right(tmp_path, name):
    """Of three windows at once, and of each alone, sought. An encoder's delay may come first, in joined files
    once more."""
    kinds, make = WHOLE[name]
    exact = 0.2 if getattr(make, "func", None) is join else 0.11
    make(tmp_path / name)
    with data.open_clip(tmp_path / name) as clip:
        assert clip.duration == pytest.approx(SECONDS, abs=exact)
    windows = [(1.2, 1.0), (8.4, 1.0), (10.7, 1.0)]
    for some in (windows, windows[1:2], windows[2:]):
        assert_right(read(tmp_path / name, some), some, kinds, exact)


@pytest.mark.parametrize("end", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("aspect, shape", [(Fraction(2), (48, 128)), (Fraction(1, 2), (72, 48))])
def test_pixels_that_are_not_square_are_shown_as_they_are_meant(tmp_path, end, aspect, shape):
    record([H264._replace(aspect=aspect, end=1.0)], tmp_path / f"wide.{end}")
    pictures = data.read_clip(tmp_path / f"wide.{end}", 0.2, 0.5, 5, 48)["video"]
    assert pictures.shape[1:3] == shape and abs(late(pictures, (0.2, 0.5))) < 0.11


def test_a_single_picture_is_no_video_in_windows_far_apart(tmp_path):
    record([H264._replace(end=0.1), AAC._replace(end=30.0)], tmp_path / "one.mp4")
    found = read(tmp_path / "one.mp4", [(0.0, 1.0), (28.0, 1.0)])
    assert found["seen"] == [False, False] and found["heard"] == [True, True] and not found["short"]
    views = partial(data.even_views, 2, SMALL)
    listing = data.make_listing("one", tmp_path, ["one.mp4"], None, [])
    assert data.Clips(listing, SMALL, views, replace=False)[0, 0]["decoded"].tolist() == [[False, True]] * 2


def test_a_picture_shorter_than_the_window_is_seen(tmp_path):
    record([H264._replace(end=0.4)], tmp_path / "brief.mp4")
    assert data.read_clip(tmp_path / "brief.mp4", 0.0, 10.0, 1, 48)["has_video"]


def test_pictures_that_are_nearly_a_line_are_named(tmp_path):
    record([Track("ffv1", end=0.3, size=(2, 1000))], tmp_path / "line.mkv")
    with pytest.raises(data.ClipError, match="1000 x 2"):
        data.read_clip(tmp_path / "line.mkv", 0.0, 0.3, 2, 48)


@pytest.mark.parametrize("window", [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (0.0, 0.0)])
def test_a_window_that_is_none_is_named(tmp_path, window):
    record([PCM], tmp_path / "some.wav")
    with pytest.raises(common.UserError, match="cannot be read"):
        data.read_clip(tmp_path / "some.wav", *window)


# --- Only what is needed is decoded ---

OPEN = {"g": "10", "bf": "3", "preset": "veryfast", "x264-params": "open-gop=1:b-pyramid=normal:scenecut=0"}
OPEN_265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:open-gop=1:keyint=10:bframes=3"}
SPARSE = {                                              # name: (codec, options), of moving noise
    "b-frames.mp4": ("libx264", {"g": "10", "bf": "3", "preset": "veryfast"}),
    "open.mp4": ("libx264", OPEN),
    "open.mkv": ("libx264", OPEN),
    "every.mp4": ("libx264", {"g": "1"}),
    "open-265.mp4": ("libx265", OPEN_265),
    "four.mp4": ("mpeg4", {"g": "10", "bf": "2"}),
    "two.mkv": ("mpeg2video", {"g": "10", "bf": "2"}),
    "nine.webm": ("libvpx-vp9", {"g": "10", "deadline": "good", "cpu-used": "8", "lag-in-frames": "8"}),
    "one.mp4": ("libsvtav1", {"g": "16", "preset": "12", "svtav1-params": "lp=1"}),
    "open.ts": ("libx264", OPEN),
    "b-frames.avi": ("mpeg4", {"g": "10", "bf": "2"})}


def noise(path, codec, options, seconds=12):
    """Pictures by which a wrong reference shows: noise that moves, and is mirrored after each 4 seconds."""
    canvas = np.random.default_rng(0).integers(0, 255, (128, 192, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width = 64, 96
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for n in range(seconds * FPS):
            pixels = np.roll(canvas, (n, 2 * n), (0, 1))[:64, :96]
            pixels = pixels[::-1] if n // 40 % 2 else pixels
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def plain(path, windows, num_frames):
    """All frames in order; of those that have come at a moment, the last one."""
    frames = []
    with av.open(str(path)) as container:
        origin = (container.start_time or 0) / av.time_base
        first = None
        for frame in container.decode(video=0):
            first = frame.time if first is None else first
            late = first if path.suffix == ".avi" else origin           # it has no times of its own
            frames.append((frame.time - late, frame))
        scale = av.video.reformatter.VideoReformatter()
        for start, seconds in windows:
            shown = []
            for n in range(num_frames):
                moment = start + (n + 0.5) * seconds / num_frames + 1e-6
                past = [frame for time, frame in frames if time <= moment]
                shown.append(data.picture((past or [frames[0][1]])[-1], 48, scale))
            yield np.stack(shown)


def count_decoded(monkeypatch):
    """{kind: packets decoded so far}"""
    counts = {"video": 0, "audio": 0}
    really_decoded = reader.decoded

    def decoded(packet, *more):
        counts[packet.stream.type] += packet.size > 0
        return really_decoded(packet, *more)

    monkeypatch.setattr(reader, "decoded", decoded)
    return counts


PLANS = [[(0.0, 12.0)], [(0.31, 1.0), (1.1, 8.0), (9.04, 0.05)], [(5.55, 2.0), (11.2, 2.0)], [(3.0, 0.2)]]


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_moments_have_the_bits_of_all_frames_decoded_in_order(tmp_path, monkeypatch, name):
    path = tmp_path / name
    noise(path, *SPARSE[name])
    counts = count_decoded(monkeypatch)
    for windows in PLANS:
        with data.open_clip(path) as clip:
            found = clip.read(windows, [], 3, 48, 16000)
        for one, other in zip(found["video"], plain(path, windows, 3), strict=True):
            assert np.array_equal(one, other)
        assert found["seen"] == [True] * len(windows)
        assert found["short"] == (windows[-1][0] == 11.2)
        if windows == PLANS[0]:                         # moments at 2, 6 and 10 seconds, and both ends
            assert (counts["video"] < 70) == (path.suffix not in (".ts", ".avi"))
            reach = found["reach"]
            assert reach["audio"] is None and reach["video"] == pytest.approx((0, 12), abs=0.16)
    assert name != "every.mp4" or counts["video"] < 30


@pytest.mark.parametrize("before", [0.0, 0.5])
def test_before_the_first_picture_the_first_one_is_shown(tmp_path, before):
    """Also by a later moment's skipping: the first key frame is at 1 second, another one at 2."""
    record([H264._replace(begin=1.0, at=1.0), AAC], tmp_path / "late.mp4")
    first = read(tmp_path / "late.mp4", [(1.0, 0.05)])["video"][0]
    found = read(tmp_path / "late.mp4", [(before, 0.4), (4.0, 0.4)])
    assert np.array_equal(found["video"][0][0], first[0])


@pytest.mark.parametrize("end", ["mp4", "mkv"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_where_key_frames_lie_nothing_is_left_out(tmp_path, end, codec):
    """Each packet says that it is one."""
    honest = tmp_path / f"honest.{end}"
    path = tmp_path / f"liar.{end}"
    noise(honest, codec, {"g": "40"})
    with av.open(str(honest)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.is_keyframe = True
                packet.stream = stream
                target.mux(packet)
    windows = [(0.31, 1.2), (1.4, 4.0)]
    assert all(map(np.array_equal, read(path, windows)["video"], plain(honest, windows, 16)))


def test_sound_between_windows_is_not_decoded_and_changes_nothing(tmp_path, monkeypatch):
    record([AAC], tmp_path / "some.m4a")
    windows = [(0.5, 1.0), (8.3, 1.0)]
    alone = read(tmp_path / "some.m4a", [(0.0, 12.0)])["audio"][0]
    counts = count_decoded(monkeypatch)
    found = read(tmp_path / "some.m4a", windows)
    assert counts["audio"] < 60                         # of 188
    for (start, _), wave in zip(windows, found["audio"]):
        place = round(start * 16000)
        assert np.abs(wave - alone[place:place + 16000]).max() < 0.01
    assert found["reach"]["video"] is None and found["reach"]["audio"] == pytest.approx((0, 9.4), abs=0.1)


def test_overlapping_windows_are_resampled_once(tmp_path, monkeypatch):
    record_wav((1.0, 0.5), tmp_path / "some.wav", rate=44100)
    asked = []
    resample = collectors.torchaudio.functional.resample
    monkeypatch.setattr(collectors.torchaudio.functional, "resample",
                        lambda wave, *rates: asked.append(len(wave)) or resample(wave, *rates))
    read(tmp_path / "some.wav", [(1.0, 4.0), (2.0, 4.0), (0.5, 5.0), (1.0, 1.0)])
    assert len(asked) == 1 and asked[0] < 44100 * 5.7


# --- Clips in a tar ---

def test_a_clip_in_a_tar_is_read_as_the_file(tmp_path):
    record([H264, AAC], tmp_path / "film.mp4")
    record([MP3], tmp_path / "song.mp3")
    record([MP3], tmp_path / "bare.mp3", **BARE)
    (tmp_path / "empty.mp4").touch()
    names = ["film.mp4", "song.mp3", "bare.mp3", "empty.mp4"]
    tar = tmp_path / "some: clips.tar"
    with tarfile.open(tar, "w") as file:
        for name in names:
            file.add(tmp_path / name, f"train/{name}")
    places = {name: shards.address(tar, at, size, name) for name, at, size in shards.read_members(tar)}
    windows = [(1.2, 1.0), (8.4, 1.0)]
    for name in names[:3]:
        inside = places[f"train/{name}"]
        assert reader.says_its_length(inside) == reader.says_its_length(tmp_path / name)
        assert reader.says_its_length(inside) == (name == "song.mp3")
        one = read(tmp_path / name, windows)
        other = read(inside, windows)
        for key in ("video", "audio"):
            assert all(map(np.array_equal, one.pop(key), other.pop(key)))
        assert one == other
    fails(data.read_clip, places["train/empty.mp4"], error=ClipError, match="the file is empty")
    tar.unlink()
    fails(data.read_clip, places["train/film.mp4"], error=ClipError, match="No such file")


# --- A clip of which a part is there ---

CUT = {
    "cut.mp4": partial(record, [H264, AAC], movflags="faststart"),
    "cut.mkv": partial(record, [H264, AAC]),
    "cut.flv": partial(record, [H264, AAC]),
    "cut.avi": partial(record, [MPEG4, PCM]),
    "cut.wmv": partial(record, [WMV, WMA], format="asf"),
    "cut.mp3": partial(record, [MP3]),
    "cut.flac": partial(record, [FLAC]),
    "cut.wv": partial(record, [Track("wavpack")]),
    "cut.ogg": partial(record, [OPUS]),
    "cut.wav": partial(record_wav, (1.0,)),
    "late-cut.mkv": partial(record, [H264, AAC], **LATE)}


def three_views(durations, rng, duration):
    durations.append(duration)
    return data.even_views(3, SMALL, rng, duration)


@pytest.mark.parametrize("name", CUT)
def test_all_views_of_a_file_that_was_cut_lie_in_what_is_left(tmp_path, name):
    """Its header says 12 seconds; two fifths of its bytes are there."""
    path = tmp_path / name
    CUT[name](path)
    os.truncate(path, os.path.getsize(path) * 2 // 5)
    durations = []
    listing = data.make_listing("cut", tmp_path, [name], None, [])
    item = data.Clips(listing, SMALL, partial(three_views, durations), replace=False)[0, 0]
    assert item["bad"] == [] and 3.8 < durations[-1] < 5.4
    has = [item["has_video"], item["has_audio"]]
    assert has == [name.split(".")[1] in ("mp4", "mkv", "flv", "avi", "wmv"), True]
    assert (item["decoded"] == item["present"] & torch.tensor(has)).all()
    places = [start + 0.5 for start in np.linspace(0, durations[-1] - 1, 3)]
    for place, video, mel in zip(places, item["video"], item["audio"]):
        assert not has[0] or abs(late(video.permute(1, 2, 3, 0).numpy(), (place, 0))) < 0.11
        assert mel.max() > 0                            # of silence it is -3.5

    windows = [(1.2, 1.0), (10.7, 1.0)]                 # asked for all the same
    found = read(path, windows)
    assert found["seen"] == [has[0], False] and found["heard"] == [True, False] and found["short"]
    assert not found["has_video"] and not found["has_audio"] and not found["audio"][1].any()


def test_a_window_in_a_hole_is_not_heard(tmp_path):
    path = tmp_path / "hole.ts"
    before = [H264._replace(end=3.0), AAC._replace(end=3.0)]
    after = [H264._replace(begin=9.0), AAC._replace(begin=9.0)]
    join(before, after, path, offset=9)
    for windows in ([(1.0, 1.0), (5.0, 1.0), (10.0, 1.0)], [(5.0, 1.0), (10.0, 1.0)]):
        found = read(path, windows)
        assert found["heard"] == [window[0] != 5.0 for window in windows] and not found["has_audio"]
        assert not found["audio"][-2].any()
        assert abs(late_sound(found["audio"][-1], windows[-1])) < 0.2
        assert abs(late(found["video"][-1], windows[-1])) < 0.2


def test_a_clock_that_jumps_back_leaves_the_first_part(tmp_path):
    """Two recordings in one mpeg-ts, each from 0: which is at a time is open, but it is one of them."""
    join([first(H264), first(AAC)], [second(H264), second(AAC)], tmp_path / "back.ts")
    for window in ((1.2, 1.0), (3.4, 1.0)):
        found = read(tmp_path / "back.ts", [window])
        away = [late(found["video"][0], window), late_sound(found["audio"][0], window)]
        assert found["seen"] == found["heard"] == [True]
        assert away == pytest.approx([0, 0], abs=0.2) or away == pytest.approx([6, 6], abs=0.2)


@pytest.mark.parametrize("end, codec", [("ogg", "libopus"), ("oga", "flac")])
def test_of_a_chained_ogg_a_part_is_right(tmp_path, end, codec):
    """FFmpeg ends at a second part that is not like the first one, or times it wrongly."""
    one = Track(codec, rate=48000, end=6.0)
    two = Track(codec, rate=24000, begin=6.0, gains=(1.0, 1.0))
    join([one], [two], tmp_path / f"chained.{end}")
    listing = data.make_listing("chained", tmp_path, [f"chained.{end}"], None, [])
    durations = []
    item = data.Clips(listing, SMALL, partial(three_views, durations), replace=False)[0, 0]
    assert item["bad"] == [] and item["decoded"][:, 1].all() and 1 < durations[-1] < 12.1
    found = read(tmp_path / f"chained.{end}", [(1.2, 1.0), (4.4, 1.0)])
    assert_right(found, [(1.2, 1.0), (4.4, 1.0)], "a")


# --- Many channels: in a process of its own, since what is wrong here is a segmentation fault ---

def gains(count, low=None):
    """A gain of its own for each channel; 0 for the one of low frequencies, which is filtered."""
    return tuple(0.0 if c == low else (c + 1) / count for c in range(count))


MANY = {                                                # name: (gains of the channels, how to write it)
    "3.wav": (gains(3), record_wav),
    "8.wav": (gains(8), record_wav),
    "16.wav": (gains(16), record_wav),
    "32.wav": (gains(32), record_wav),
    "8.mka": (gains(8), "pcm_f32le"),
    "16.mka": (gains(16), "pcm_s16le"),
    "8.flac": (gains(8), "flac"),
    "8.wv": (gains(8), "wavpack"),
    "8.m4a": (gains(8, low=3), "aac"),
    "8.ogg": (gains(8, low=3), "libopus"),
    "6.ac3": (gains(6, low=3), "ac3")}
READ = """
import resource
import sys
import numpy as np
import data
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for path in sys.argv[1:]:
    try:
        found = data.read_clip(path, 0.0, 3.0, 1, 16)
        np.save(path + ".npy", found["audio"])
        print("read")
    except data.ClipError as e:
        print("named" if path in str(e) and "\\n" not in str(e) else "nameless")
"""


def answers(folder, paths, seconds=60):
    """What the script READ says of each of the files."""
    (folder / "read.py").write_text(READ)
    ran = command([sys.executable, str(folder / "read.py"), *map(str, paths)], folder, seconds=seconds)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = ran.stdout.split()
    assert len(said) == len(paths)
    return said


def test_any_number_of_channels_is_read_as_their_mean_and_a_damaged_one_does_not_crash(tmp_path):
    for name, (each, make) in MANY.items():
        if make is record_wav:
            record_wav(each, tmp_path / name, end=3.0)
        else:
            rate = 48000 if make in ("libopus", "ac3") else 16000
            record([Track(make, end=3.0, rate=rate, gains=each)], tmp_path / name)
    damaged = []
    for seed in range(12):
        path = tmp_path / f"damaged-{seed}{('.m4a', '.flac', '.ogg')[seed % 3]}"
        raw = bytearray((tmp_path / f"8{path.suffix}").read_bytes())
        rng = np.random.default_rng(seed)
        for at in rng.integers(len(raw), size=60):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        damaged.append(path)
    paths = [tmp_path / name for name in MANY]
    said = answers(tmp_path, paths + damaged)
    assert said[:len(paths)] == ["read"] * len(paths) and set(said) <= {"read", "named"}
    for path, (each, _) in zip(paths, MANY.values()):
        wave = np.load(f"{path}.npy")
        assert np.abs(wave[8000:40000]).max() == pytest.approx(0.5 * np.mean(each), abs=0.006), path.name
        assert abs(time_of(wave[22000:26000]) - 1.5) < 0.02, path.name


@pytest.mark.parametrize("rate", [7, 2 ** 31 - 1])
def test_a_rate_that_no_sound_has_is_named(tmp_path, rate):
    """One wrong bit in a header; the filter that resamples from there would take all memory."""
    record_wav((1.0,), tmp_path / "rate.wav", end=1.0, rate=rate)
    assert answers(tmp_path, [tmp_path / "rate.wav"]) == ["named"]


# --- Poison ---

@pytest.mark.parametrize("end, codec, value", [
    ("wav", "pcm_f32le", np.nan), ("wav", "pcm_f32le", np.inf), ("wav", "pcm_f32le", -1e29),
    ("mkv", "pcm_f32le", np.nan), ("mkv", "pcm_f32le", 1e29), ("wav", "pcm_f64le", 1e300)])
def test_samples_that_are_no_sound_are_named_everywhere(tmp_path, end, codec, value, capsys):
    """One in 12 seconds, in one of two channels, in the middle."""
    sound = Track(codec, gains=(1.0, 0.5))
    record([sound], tmp_path / f"good.{end}")
    kind = np.dtype("<f4" if codec == "pcm_f32le" else "<f8")
    at = 6 * 16000 + 10
    around = np.outer(sweep(0, SECONDS), (1.0, 0.5)).astype("<f4")[at:at + 8].astype(kind).tobytes()
    raw = bytearray((tmp_path / f"good.{end}").read_bytes())
    place = raw.index(around)
    raw[place:place + kind.itemsize] = kind.type(value).tobytes()
    bad = tmp_path / f"bad.{end}"
    bad.write_bytes(raw)
    message = fails(data.read_clip, bad, 5.5, 1.0, error=ClipError, match=f"{bad}: ")
    listing = data.make_listing("two", tmp_path, [f"good.{end}", f"bad.{end}"], None, [])
    item = data.Clips(listing, SMALL, partial(data.even_views, 1, SMALL))[0, 1]
    assert set(item["bad"]) == {message} and item["index"] == 0
    assert data.check(listing, 0)["unreadable"] == 1 and str(bad) in "".join(capsys.readouterr())
    only = listing.subset(np.array([0]))
    for both, good in zip(data.mel_stats(listing, SMALL, 0, 10), data.mel_stats(only, SMALL, 0, 10)):
        assert both.isfinite().all() and (both == good).all()


def test_a_float_sound_above_full_scale_is_sound(tmp_path):
    record([Track("pcm_f32le", gains=(4.0,))], tmp_path / "loud.wav")
    wave = data.read_clip(tmp_path / "loud.wav", 5.0, 1.0, 1, 16)["audio"]
    assert np.abs(wave).max() == pytest.approx(2.0, abs=0.01)


# --- What a file may cost ---

TEXTS = {
    "list.mp4": "ffconcat version 1.0\nfile clip.mp4\n",
    "waits.mp4": "ffconcat version 1.0\nfile pipe.mp4\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\nclip.ts\n#EXT-X-ENDLIST\n",
    "list.ts": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\nclip.ts\n#EXT-X-ENDLIST\n",
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "dash.mp4": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
                "<AdaptationSet><Representation><BaseURL>clip.mp4</BaseURL></Representation></AdaptationSet>"
                "</Period></MPD>\n"}


def test_what_is_no_file_or_names_other_files_is_refused_at_once(tmp_path):
    """A reader that follows one would find a whole clip, or wait for ever."""
    record([H264._replace(end=3.0)], tmp_path / "clip.mp4")
    record([H264._replace(end=3.0)], tmp_path / "clip.ts")
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zeros.mp3").symlink_to("/dev/zero")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "linked.mp4").symlink_to("clip.mp4")
    refused = [tmp_path / name for name in (*TEXTS, "pipe.mp4", "zeros.mp3", "folder.mp4")]
    said = answers(tmp_path, [*refused, tmp_path / "linked.mp4"], seconds=20)
    assert said == ["named"] * len(refused) + ["read"]


@pytest.mark.parametrize("name", ["zeros.mp3", "zeros.ac3"])
def test_three_gigabytes_of_zeros_are_given_up(tmp_path, monkeypatch, name):
    """Left alone, FFmpeg looks for a first frame in all of it."""
    monkeypatch.setattr(reader, "MAX_SECONDS", 0.5)
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 3 << 30)
    fails(data.read_clip, tmp_path / name, error=ClipError, match=f"{tmp_path / name}: ")


def hour_of_wav(path):
    """A sparse file: silence but for the first and the last 12 seconds."""
    samples = (sweep(0, SECONDS) * 32767).astype("<i2")
    write_wav(samples[:, None], path, size=3600 * 32000)
    os.truncate(path, 44 + 3588 * 32000)
    with open(path, "ab") as file:
        file.write(samples.tobytes())


def long_mp3(path):
    """12 seconds, which an encoder's delay makes 12.168, again and again."""
    record([MP3._replace(rate=8000)], path, **BARE)
    path.write_bytes(path.read_bytes() * 100)


def hour_of_film(path):
    """The packets of 12 seconds 300 times."""
    part = path.with_name("part.mkv")
    record([H264, AC3._replace(rate=32000)], part)
    with av.open(str(part)) as source, av.open(str(path), "w") as container:
        streams = [container.add_stream_from_template(stream) for stream in source.streams]
        packets = [packet for packet in source.demux() if packet.size]
        once = [(bytes(p), p.stream.index, p.pts, p.dts, p.duration, p.is_keyframe) for p in packets]
        for n in range(300):
            for content, index, pts, dts, duration, key in once:
                packet = av.Packet(content)
                packet.stream = streams[index]
                packet.time_base = Fraction(1, 1000)
                packet.pts = pts + n * 12000
                packet.dts = dts + n * 12000
                packet.duration = duration
                packet.is_keyframe = key
                container.mux(packet)


@pytest.mark.parametrize("name, make, times, period", [
    ("hour.wav", hour_of_wav, 300, 12.0), ("hour.mkv", hour_of_film, 300, 12.0),
    ("long.mp3", long_mp3, 100, 12.168)])
def test_two_windows_far_apart_cost_the_memory_of_two_windows(tmp_path, name, make, times, period):
    make(tmp_path / name)
    windows = [(2.0, 1.0), ((times - 1) * period + 6.0, 1.0)]
    tracemalloc.start()
    with data.open_clip(tmp_path / name) as clip:
        assert clip.duration == pytest.approx(times * period, abs=0.2)
        found = clip.read(windows, windows, 16, 48, 16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6                                  # 20 minutes of sound are 77e6
    assert_right(found, [(2.0, 1.0), (6.0, 1.0)], "va" if name == "hour.mkv" else "a", exact=0.2)


def test_windows_all_over_a_long_sound_cost_the_memory_of_the_windows(tmp_path):
    """5 minutes, of which 5 seconds in 12 are wanted: 4 MB; all samples of both channels would be 38 MB."""
    write_wav(np.zeros((1, 2), "<i2"), tmp_path / "long.wav", size=300 * 64000)
    os.truncate(tmp_path / "long.wav", 44 + 300 * 64000)
    windows = [(2.4 * n, 1.0) for n in range(125)]
    tracemalloc.start()
    with data.open_clip(tmp_path / "long.wav") as clip:
        found = clip.read([], windows, 0, 48, 8000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(found["heard"]) and peak < 8e6


def test_a_short_window_within_one_long_packet_of_sound_is_heard(tmp_path):
    """A packet of FLAC lasts .1 s here; before and after each window is a long gap."""
    x = np.random.default_rng(0).integers(-9000, 9000, (1, 22 * 44100)).astype(np.int16)
    with av.open(str(tmp_path / "long.flac"), "w") as container:
        stream = container.add_stream("flac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(x, format="s16", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])
    windows = [(start, 0.02) for start in (0.0, 3.0, 6.01, 9.02, 12.03, 15.04, 18.05, 21.06)]
    with reader.open_clip(tmp_path / "long.flac") as clip:
        got = clip.read([], windows, 1, 64, 44100)
    assert all(got["heard"])
    for (start, _), sound in zip(windows, got["audio"]):
        begin = round(start * 44100)
        assert np.array_equal(sound, x[0, begin:begin + len(sound)] / np.float32(32768))
