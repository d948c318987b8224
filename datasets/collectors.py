"""What the reader's frames become: Pictures and Sound take from them what windows of time ask for."""
import math
from collections import deque
from fractions import Fraction

import av
import numpy as np
import torch
import torchaudio

LOOK_AHEAD = 0.05       # seconds of sound after the last window: the resampling filter looks a little ahead
SLACK = 0.1             # seconds that a window may lie outside of what decoded: with more the clip is short
JITTER = 0.05           # seconds by which a timestamp of sound may differ from the samples before it
THINNEST = 32           # longer side of a picture over the shorter one; above it costs gigabytes
BEFORE = 2.0            # seconds of sound before a window that are kept
SPAN = 60.0             # seconds of windows that are cut out, and resampled, at once
BEYOND = 20             # frames of sound after the last window that end it; one may be a wrong timestamp
RATES = (1000, 1000000)         # Hz: a rate outside of these is a broken header
LOUDEST = 1e6           # above this a sample is no sound; full scale is 1
CANCELLED = 1e-3        # channels whose mean has less of the power of the loudest one cancel each other


class Pictures:
    """Takes what the video windows show: for each of their moments the frame that is on screen then."""
    def __init__(self, stream, windows, num_frames, size):
        self.stream = stream
        self.windows = windows
        self.num_frames = num_frames
        self.size = size
        self.aspect = 1.0 if stream is None else pixel_aspect(stream)
        self.frame_seconds = 0.0 if stream is None else float(1 / (stream.average_rate or 10))
        self.open = stream is not None and bool(windows)        # does it want more frames?
        self.until = end_of(windows)
        moments = []
        for w, (start, seconds) in enumerate(windows):
            for n in range(num_frames):
                moments.append((start + (n + 0.5) * seconds / num_frames, (w, n)))
        self.moments = deque(sorted(moments))               # (time, place) of those that have no picture yet
        self.found = {}                                         # place: picture
        self.on = set()                                         # windows in which a frame is on screen
        self.shape = None                                       # (height, width) of the first picture
        self.frame = None                                       # the frame on screen ...
        self.since = math.inf                                   # ... from this time on
        self.picture = None                                 # ... and its picture, once a moment asks for it
        self.landing = None                                     # when the key frame is due after a jump
        self.lost = False                                       # it is none, or a picture is damaged
        self.count = 0                                          # frames that came
        self.times = {-math.inf}                                # theirs
        self.begin = math.inf                                   # when the first one came ...
        self.end = -math.inf                                    # ... and when the last one goes
        self.reformatter = av.video.reformatter.VideoReformatter()

    def needs(self):
        """The times, sorted, at which a picture is to be on screen: those of the moments, and those that tell
        whether the stream covers the windows."""
        times = [time for time, _ in self.moments] + [start_of(self.windows) + SLACK, self.until - SLACK]
        return [time + 1e-6 for time in sorted(times)]

    def add(self, frame, time):
        """The next frame, shown from `time` on: what was on screen until now is given to the moments before.
        None: frames were left out, up to a key frame at `time`."""
        if frame is None:
            self.landing = time
            return
        if self.landing is not None:
            if time < self.landing - 1e-6:                      # it leans on pictures before the key frame
                return
            self.lost |= not frame.key_frame
            self.landing = None
        self.lost |= frame.is_corrupt
        self.mark(time)
        while self.moments and self.moments[0][0] < time - 1e-6:
            if self.frame is None:                              # a moment before the first frame
                self.frame = frame
            self.take()
        self.frame = frame
        self.since = time
        self.picture = None
        self.count += 1
        self.times.add(time)
        self.begin = min(self.begin, time)
        self.end = time + max(seconds_of(frame.duration or 0, frame.time_base), self.frame_seconds)
        self.open = bool(self.moments) or self.end < self.until - SLACK

    def mark(self, until):
        """The frame on screen goes at `until`: in which windows was it?"""
        for w, (start, seconds) in enumerate(self.windows):
            if self.since < start + seconds and until > start:
                self.on.add(w)

    def take(self):
        """The next moment has the frame on screen."""
        if self.picture is None:
            self.picture = picture(self.frame, self.size, self.reformatter, self.aspect)
            self.shape = self.shape or self.picture.shape[:2]
        _, place = self.moments.popleft()
        self.found[place] = self.picture

    def finish(self):
        """The last frame stays on screen."""
        self.mark(self.end)
        while self.moments and self.frame is not None:
            self.take()

    def is_late(self, first):
        """Whether it lacks the picture at `first`."""
        return self.stream is not None and bool(self.windows) and self.begin > first + SLACK

    def is_short(self):
        if not self.found:
            return False
        return self.begin > start_of(self.windows) + SLACK or self.end < self.until - SLACK

    def seen(self):
        """For each window: is a frame on screen in it?"""
        return [w in self.on for w in range(len(self.windows))]

    def arrays(self, shape):
        """(T, H, W, 3) of each window. shape: (H, W), to which pictures are stretched whose size changes in
        mid-stream; None without any."""
        blank = np.zeros((*(shape or (self.size, self.size)), 3), np.uint8)
        out = []
        for w in range(len(self.windows)):
            pictures = [self.found.get((w, n), blank) for n in range(self.num_frames)]
            out.append(np.stack([stretch_to(blank.shape, one) for one in pictures]))
        return out


class Piece:
    """Sound without a gap, of one rate and one number of channels. ValueError for what is no sound."""
    def __init__(self, begin, rate, channels):
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"its sound has a rate of {rate:,} Hz")
        self.begin = begin
        self.rate = rate
        self.channels = channels
        self.parts = deque()                                    # (channels, samples)
        self.place = 0                                          # of the first of them, in samples

    def drop(self, until):
        """Forget what ends before `until`, in seconds."""
        while self.parts and self.begin + (self.place + self.parts[0].shape[1]) / self.rate < until:
            self.place += self.parts.popleft().shape[1]

    def wave(self, begin, end, sample_rate):
        """What is there of the sound from `begin` to `end`, in seconds, as (place, samples): the mean of the
        channels, since FFmpeg's own down-mix would be 3 dB louder, or, where they cancel each other, the
        loudest one; at sample_rate. place: of the first sample, in samples since the piece began."""
        # exact for usual rates; for one like 22,254 Hz the filter would take a gigabyte
        ratio = Fraction(self.rate, sample_rate)
        ratio = ratio.limit_denominator(round(1000 / max(1, ratio)))
        old, new = ratio.as_integer_ratio()
        steps = max(0, math.floor((begin - self.begin) * self.rate) // old)     # so that any cut is like none
        last = max(self.place, math.ceil((end - self.begin) * self.rate))
        x = np.concatenate([np.zeros((self.channels, 0), np.float32), *self.parts], 1)
        x = x[:, max(0, steps * old - self.place):last - self.place]                    # (channels, samples)
        if x.shape[1] == 0:
            return 0, x[0]
        if not (x.min() >= -LOUDEST and x.max() <= LOUDEST):                            # also NaN
            raise ValueError(f"its sound holds samples that are none: NaN, infinite or above {LOUDEST:,.0f}")
        wave = x.mean(0)
        if len(x) > 1:
            powers = np.square(x).mean(1)
            if np.square(wave).mean() < CANCELLED * powers.max():
                wave = x[powers.argmax()]
        return steps * new, torchaudio.functional.resample(torch.from_numpy(wave), old, new).numpy()


class Sound:
    """Takes the sound from the first frame that comes to the end of the last window, in pieces without a gap,
    and cuts out the windows, those of a span at once; what no later span needs is not kept."""
    def __init__(self, stream, windows, sample_rate):
        self.stream = stream
        self.windows = windows
        self.sample_rate = sample_rate
        self.open = stream is not None and bool(windows)        # does it want more frames?
        self.until = end_of(windows)
        self.spans = deque(spans_of(windows))                   # those that are not cut out yet
        self.waves = {}                                         # window: (samples,)
        self.audible = set()                                    # windows in which there is sound
        self.pieces = []
        self.count = 0                                          # frames that came
        self.begin = math.inf                                   # when the first piece begins ...
        self.end = -math.inf                                    # ... and the last one ends
        self.beyond = 0                                         # frames in a row after the last window
        self.resampler = None                                   # to packed float, for frames ...
        self.form = None                                        # ... of this form

    def add(self, frame, time):
        """The next frame, heard from `time` on. None: frames were left out."""
        if frame is None:
            return
        self.count += 1
        if time + frame.samples / frame.sample_rate < start_of(self.windows) - BEFORE:
            return
        if self.pieces and time > self.until + LOOK_AHEAD:      # maybe a wrong timestamp, hours ahead
            self.beyond += 1
            self.open = self.beyond < BEYOND
            return
        self.beyond = 0
        if time < self.end - JITTER:                            # the clock jumps back: this was here before
            return
        form = (frame.sample_rate, frame.layout.nb_channels)
        new = not self.pieces or time > self.end + JITTER       # a hole in the stream stays a hole
        if new or form != (self.pieces[-1].rate, self.pieces[-1].channels):
            self.pieces.append(Piece(time, *form))
            self.begin = min(self.begin, time)
            self.end = time
        self.pieces[-1].parts.append(self.samples(frame))
        self.end += frame.samples / frame.sample_rate
        self.cut(self.end - LOOK_AHEAD)
        self.open = self.end < self.until + LOOK_AHEAD

    def cut(self, until=math.inf):
        """Cut out the spans that end before `until`, and forget what none of the others needs."""
        while self.spans and self.spans[0][1] <= until:
            begin, end, windows = self.spans.popleft()
            for window in windows:
                self.waves[window] = np.zeros(round(window[1] * self.sample_rate), np.float32)
            for piece in self.pieces:
                place, wave = piece.wave(begin - LOOK_AHEAD, end + LOOK_AHEAD, self.sample_rate)
                for window in windows:
                    start = round((window[0] - piece.begin) * self.sample_rate) - place      # in the wave
                    room = self.waves[window][max(-start, 0):]
                    part = wave[max(start, 0):max(start + len(self.waves[window]), 0)]
                    room[:len(part)] = part
                    if len(part):
                        self.audible.add(window)
        needed = self.spans[0][0] - BEFORE if self.spans else math.inf
        for piece in self.pieces:
            piece.drop(needed)
        self.pieces = [piece for piece in self.pieces[:-1] if piece.parts] + self.pieces[-1:]

    def samples(self, frame):
        """A frame as (channels, samples) float32."""
        channels = frame.layout.nb_channels
        if frame.format.name == "fltp" and channels <= 2:
            return frame.to_ndarray()
        if frame.format.name == "s16" and channels == 1:        # as prepared clips have it
            packed = np.frombuffer(frame.planes[0], np.int16, frame.samples)
            return packed[None].astype(np.float32) / 32768
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self.form = form
            self.resampler = av.AudioResampler(format="flt")    # planes of more than 7 channels crash PyAV
        packed = [part.to_ndarray().reshape(-1, channels) for part in self.resampler.resample(frame)]
        return np.concatenate([np.zeros((0, channels), np.float32), *packed]).T

    def finish(self):
        self.cut()

    def is_late(self, first):
        """Whether it lacks the sound at `first`."""
        return self.stream is not None and bool(self.windows) and self.begin > first + SLACK

    def is_short(self):
        if self.stream is None or not self.windows:
            return False
        return self.begin > start_of(self.windows) + SLACK or self.end < self.until - SLACK

    def heard(self):
        """For each window: is there sound in it?"""
        return [window in self.audible for window in self.windows]

    def arrays(self):
        """(samples,) of each window."""
        return [self.waves[window] for window in self.windows]


def spans_of(windows):
    """Windows (start, seconds) -> [(begin, end, windows)] of those that overlap or touch: spans of at most
    SPAN seconds, or of one window."""
    spans = []
    for start, seconds in sorted(set(windows)):
        end = start + seconds
        if spans and start <= spans[-1][1] and end <= spans[-1][0] + SPAN:
            begin, before, others = spans[-1]
            spans[-1] = (begin, max(before, end), [*others, (start, seconds)])
        else:
            spans.append((start, end, [(start, seconds)]))
    return spans


def seconds_of(ticks, time_base):
    """A count of a stream's ticks in seconds: float(ticks * time_base), without a Fraction on the way."""
    return ticks * time_base.numerator / time_base.denominator


def start_of(windows):
    return min(start for start, _ in windows)


def end_of(windows):
    return max((start + seconds for start, seconds in windows), default=0.0)


def pixel_aspect(stream):
    """Width of a pixel over its height."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else 1.0


def picture(frame, size, reformatter, aspect=1.0):
    """A decoded frame as (H, W, 3) uint8: short side `size`, turned upright. aspect: of a pixel. ValueError
    where one side is many times the other."""
    shown = frame.width * aspect                                # the width in pixels that are square
    if not 1 / THINNEST < shown / frame.height < THINNEST:
        raise ValueError(f"its pictures are {frame.width} x {frame.height}")
    scale = size / min(shown, frame.height)
    width = max(size, round(shown * scale))
    height = max(size, round(frame.height * scale))
    pixels = reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:                              # a phone held upright, or its front camera's mirror
        pixels = turn_upright(pixels, np.frombuffer(matrix, np.int32))
    return pixels


def turn_upright(pixels, matrix):
    """A point (x, y) of the pixels is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d = matrix[:5]
    turned = abs(b) > abs(a)                                    # by a quarter: x becomes y
    if turned:
        pixels = pixels.transpose(1, 0, 2)
    if (b if turned else d) < 0:
        pixels = pixels[::-1]
    if (c if turned else a) < 0:
        pixels = pixels[:, ::-1]
    return pixels


def stretch_to(shape, pixels):
    """(h, w, 3) -> the same stretched to `shape` (H, W, 3)."""
    if pixels.shape == shape:
        return pixels
    pixels = np.ascontiguousarray(pixels)
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(shape[1], shape[0]).to_ndarray()
