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
BEFORE = 2.0            # seconds of sound before the first window that are kept
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
        self.count = 0                                          # frames that came
        self.begin = math.inf                                   # when the first one came ...
        self.end = -math.inf                                    # ... and when the last one goes
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame, time):
        """The next frame, shown from `time` on: what was on screen until now is given to the moments
        before."""
        self.mark(time)
        while self.moments and self.moments[0][0] < time - 1e-6:
            if self.frame is None:                              # a moment before the first frame
                self.frame = frame
            self.take()
        self.frame = frame
        self.since = time
        self.picture = None
        self.count += 1
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
    def __init__(self, begin, rate):
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"its sound has a rate of {rate:,} Hz")
        self.begin = begin
        self.rate = rate
        self.parts = []                                         # (channels, samples)
        self.wave = None                                        # the mean of the channels at sample_rate

    def finish(self, sample_rate):
        """The mean of the channels, since FFmpeg's own down-mix would be 3 dB louder, or, where they cancel
        each other, the loudest one; at sample_rate."""
        x = np.concatenate(self.parts, 1)
        if not np.abs(x).max(initial=0) <= LOUDEST:             # also NaN
            raise ValueError(f"its sound holds samples that are none: NaN, infinite or above {LOUDEST:,.0f}")
        wave = x.mean(0)
        if len(x) > 1:
            powers = np.square(x).mean(1)
            if np.square(wave).mean() < CANCELLED * powers.max():
                wave = x[powers.argmax()]
        # exact for usual rates; for one like 22,254 Hz the filter would take a gigabyte
        ratio = Fraction(self.rate, sample_rate)
        ratio = ratio.limit_denominator(round(1000 / max(1, ratio)))
        wave = torch.from_numpy(wave)
        self.wave = torchaudio.functional.resample(wave, ratio.numerator, ratio.denominator).numpy()


class Sound:
    """Takes the sound from the first frame that comes to the end of the last window, in pieces without a gap,
    and cuts out the windows."""
    def __init__(self, stream, windows, sample_rate):
        self.stream = stream
        self.windows = windows
        self.sample_rate = sample_rate
        self.open = stream is not None and bool(windows)        # does it want more frames?
        self.until = end_of(windows)
        self.pieces = []
        self.count = 0                                          # frames that came
        self.end = -math.inf                                    # when the last piece ends
        self.beyond = 0                                         # frames in a row after the last window
        self.resampler = None                                   # to packed float, for frames ...
        self.form = None                                        # ... of this form

    def add(self, frame, time):
        """The next frame, heard from `time` on."""
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
        samples = self.samples(frame)                           # (channels, samples)
        new = not self.pieces or time > self.end + JITTER       # a hole in the stream stays a hole
        if new or frame.sample_rate != self.pieces[-1].rate or len(samples) != len(self.pieces[-1].parts[0]):
            self.pieces.append(Piece(time, frame.sample_rate))
            self.end = time
        self.pieces[-1].parts.append(samples)
        self.end += samples.shape[1] / frame.sample_rate
        self.open = self.end < self.until + LOOK_AHEAD

    def samples(self, frame):
        """A frame as (channels, samples) float32."""
        channels = frame.layout.nb_channels
        if frame.format.name == "fltp" and channels <= 2:
            return frame.to_ndarray()
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self.form = form
            self.resampler = av.AudioResampler(format="flt")    # planes of more than 7 channels crash PyAV
        packed = [part.to_ndarray().reshape(-1, channels) for part in self.resampler.resample(frame)]
        return np.concatenate([np.zeros((0, channels), np.float32), *packed]).T

    def finish(self):
        for piece in self.pieces:
            piece.finish(self.sample_rate)

    def is_late(self, first):
        """Whether it lacks the sound at `first`."""
        if self.stream is None or not self.windows:
            return False
        return not self.pieces or self.pieces[0].begin > first + SLACK

    def is_short(self):
        if self.stream is None or not self.windows:
            return False
        if not self.pieces:
            return True
        return self.pieces[0].begin > start_of(self.windows) + SLACK or self.end < self.until - SLACK

    def heard(self):
        """For each window: is there sound in it?"""
        out = []
        for start, seconds in self.windows:
            inside = [self.cut(piece, start, seconds) for piece in self.pieces]
            out.append(any(len(part) for _, part in inside))
        return out

    def arrays(self):
        """(samples,) of each window."""
        out = []
        for start, seconds in self.windows:
            window = np.zeros(round(seconds * self.sample_rate), np.float32)
            for piece in self.pieces:
                skipped, part = self.cut(piece, start, seconds)
                window[skipped:skipped + len(part)] = part
            out.append(window)
        return out

    def cut(self, piece, start, seconds):
        """(samples of the window before the piece begins, samples of the piece in the window)"""
        place = round((start - piece.begin) * self.sample_rate)         # of the window in the piece
        length = round(seconds * self.sample_rate)
        return max(-place, 0), piece.wave[max(place, 0):max(place + length, 0)]


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
    return np.ascontiguousarray(pixels)


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
    return av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(shape[1], shape[0]).to_ndarray()
