"""The reader: a file is opened once, and decoded in one pass for several windows of time.

    with open_clip(path) as clip:
        windows = [(0.0, 2.0), (clip.duration - 2.0, 2.0)]              # (start, seconds)
        read = clip.read(windows, windows, num_frames=16, size=224, sample_rate=16000)

Each stream has a collector, which takes from the decoded frames what the windows ask for: Pictures and Sound.
"""
import contextlib
import math
import os
from collections import deque

import av
import numpy as np
import torch
import torchaudio

from common import UserError

LOOK_AHEAD = 0.05       # seconds of sound after the last window: the resampling filter looks a little ahead
SLACK = 0.1             # seconds that a window may lie outside of what decoded: with more the clip is short
SEEK_FROM = 2.0         # seconds: a window that begins later is sought


class ClipError(UserError):
    """A file in which nothing decodes; the message holds its name and the reason."""


@contextlib.contextmanager
def errors_as_sentence(path):
    """What FFmpeg says of a file as a ClipError."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise ClipError(f"{path}: does not decode ({reason})") from None


@contextlib.contextmanager
def open_clip(path, frame_rate=None):
    """Open a file as a Clip, which can be read once. Raises ClipError.

    With a frame_rate the clip's duration and its windows count frames: one second is `frame_rate` frames of
    this clip, however long those take."""
    with errors_as_sentence(path):
        absolute = os.path.abspath(path)                        # FFmpeg would take "a:b" for a protocol
        if os.path.getsize(absolute) == 0:
            raise ClipError(f"{path}: the file is empty")
        container = av.open(absolute, metadata_errors="replace")
    with container:
        with errors_as_sentence(path):
            clip = Clip(path, container, frame_rate)
        yield clip


class Clip:
    """An open file: .video and .audio, its streams or None; .duration in seconds (of the frame_rate, where
    one is given); .stretch, seconds of the clip's own clock in one of those."""
    def __init__(self, path, container, frame_rate=None):
        self.path = path
        self.container = container
        self.video, self.audio = find_streams(container)
        self.origin = (container.start_time or 0) / av.time_base        # the clock's time at the start
        self.seconds = self.find_length()                               # on the clip's own clock
        self.stretch = time_stretch(self.video, frame_rate)
        self.duration = self.seconds / self.stretch

    def find_length(self):
        if (self.container.duration or 0) > 0:
            return self.container.duration / av.time_base
        lengths = [0.0]                                         # a container without an index, a raw stream
        for stream in (self.video, self.audio):
            if stream is not None and stream.duration:
                lengths.append(float(stream.duration * stream.time_base))
        return max(lengths)

    def read(self, video_windows, audio_windows, num_frames, size, sample_rate):
        """Decode the windows, each (start, seconds), in one pass. Returns a dict:

        video: a (T, H, W, 3) uint8 array for each video window, short side `size`, T = num_frames frames at
        the middle of T equal parts of the window; audio: a (samples,) float32 array for each audio window,
        the mean of the channels at sample_rate; has_video, has_audio (of a stream that no window asks for: is
        it there); short: more than .1 s of a window lies outside of what decoded (the picture then holds its
        nearest frame and the sound is zero). An absent stream is zeros. Raises ClipError."""
        with errors_as_sentence(self.path):
            pictures = Pictures(self.video, self.on_clock(video_windows), num_frames, size)
            sound = Sound(self.audio, self.on_clock(audio_windows), sample_rate)
            streams = [part.stream for part in (pictures, sound) if part.open]
            sought = bool(streams) and self.seek(pictures.windows + sound.windows)
            self.decode(streams, pictures, sound)
            pictures.finish()
            sound.finish()
            absent = self.video is None and self.audio is None
            if absent or streams and not (pictures.found or sound.parts):
                raise ClipError(f"{self.path}: nothing in it decodes (no video frame, no sound)")

            has_video = bool(pictures.found) if video_windows else self.video is not None
            silent = bool(audio_windows) and not sound.parts
            silent = silent and not sought                      # its sound may end before the place sought
            has_audio = self.audio is not None and not silent
            return {
                "video": pictures.arrays(),
                "audio": sound.arrays(),
                "has_video": has_video,
                "has_audio": has_audio,
                "short": bool(pictures.is_short() or has_audio and sound.is_short())}

    def on_clock(self, windows):
        """Windows on the clip's own clock."""
        return [(start * self.stretch, seconds * self.stretch) for start, seconds in windows]

    def seek(self, windows):
        """Go to the last key frame before the first window, unless that is near the start. Returns whether it
        did."""
        first = min(start for start, _ in windows)
        if first <= SEEK_FROM:
            return False
        if self.container.format.name in ("mpegts", "mpeg"):    # they have no index of key frames
            return False
        place = min(first, self.seconds or first) - 0.5 + self.origin
        self.container.seek(int(place * av.time_base), backward=True)
        return True

    def decode(self, streams, pictures, sound):
        """Hand the frames to their collectors until neither is open."""
        for stream, frame in self.frames(streams):
            time = frame.time - self.origin
            if stream.type == "video":
                pictures.add(frame, time)
            elif sound.open:
                sound.add(frame, time)
            if not (pictures.open or sound.open):
                break

    def frames(self, streams):
        """(stream, frame) of all frames that have a time, in the file's order."""
        if not streams:
            return
        for stream in streams:
            stream.codec_context.thread_count = 1       # frame threads and an early stop hang beside torch
        for packet in self.container.demux(streams):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:    # one broken packet, of half a dozen kinds: the rest may be fine
                continue
            for frame in frames:
                if frame.pts is not None:
                    yield packet.stream, frame


class Pictures:
    """Takes what the video windows show: for each of their moments the frame that is on screen then."""
    def __init__(self, stream, windows, num_frames, size):
        self.stream = stream
        self.windows = windows
        self.num_frames = num_frames
        self.size = size
        self.open = stream is not None and bool(windows)        # does it want more frames?
        self.until = end_of(windows)
        moments = []
        for w, (start, seconds) in enumerate(windows):
            for n in range(num_frames):
                moments.append((start + (n + 0.5) * seconds / num_frames, (w, n)))
        self.moments = deque(sorted(moments))               # (time, place) of those that have no picture yet
        self.found = {}                                         # place: picture
        self.frame = None                                       # the frame on screen ...
        self.picture = None                                 # ... and its picture, once a moment asks for it
        self.begin = math.inf                                   # when the first frame came ...
        self.end = -math.inf                                    # ... and when the last one goes
        self.reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame, time):
        """The next frame, shown from `time` on: what was on screen until now is given to the moments
        before."""
        while self.moments and self.moments[0][0] < time - 1e-6:
            if self.frame is None:                              # a moment before the first frame
                self.frame = frame
            self.take()
        self.frame = frame
        self.picture = None
        self.begin = min(self.begin, time)
        self.end = time + float(1 / (self.stream.average_rate or 10))
        self.open = bool(self.moments) or self.end < self.until - SLACK

    def take(self):
        """The next moment has the frame on screen."""
        if self.picture is None:
            self.picture = picture(self.frame, self.size, self.reformatter)
        _, place = self.moments.popleft()
        self.found[place] = self.picture

    def finish(self):
        """The last frame stays on screen."""
        while self.moments and self.frame is not None:
            self.take()

    def is_short(self):
        if not self.found:
            return False
        return self.begin > start_of(self.windows) + SLACK or self.end < self.until - SLACK

    def arrays(self):
        """(T, H, W, 3) of each window."""
        blank = np.zeros((self.size, self.size, 3), np.uint8)
        out = []
        for w in range(len(self.windows)):
            out.append(np.stack([self.found.get((w, n), blank) for n in range(self.num_frames)]))
        return out


class Sound:
    """Takes the sound from the first frame that comes to the end of the last window, without a gap, and cuts
    out the windows."""
    def __init__(self, stream, windows, sample_rate):
        self.stream = stream
        self.windows = windows
        self.sample_rate = sample_rate
        self.open = stream is not None and bool(windows)        # does it want more frames?
        self.until = end_of(windows)
        self.parts = []                                         # (channels, samples) each, at self.rate
        self.rate = None
        self.begin = 0.0                                        # when the first part begins ...
        self.end = 0.0                                          # ... and when the last one ends
        self.wave = None                                        # all of it at sample_rate
        self.to_float = av.AudioResampler(format="fltp")

    def add(self, frame, time):
        if self.rate is None:
            self.rate = frame.sample_rate
            self.begin = time
            self.end = time
        if self.parts and time > self.until + LOOK_AHEAD:     # also a wrong timestamp, hours ahead
            self.open = False
            return
        if time - self.end > 0.05:                              # a hole in the stream stays a hole
            channels = self.parts[-1].shape[0]
            self.parts.append(np.zeros((channels, int((time - self.end) * self.rate)), np.float32))
            self.end = time
        for part in [frame] if frame.format.name == "fltp" else self.to_float.resample(frame):
            self.parts.append(part.to_ndarray())                # (channels, samples)
            self.end += part.samples / self.rate
        self.open = self.end < self.until + LOOK_AHEAD

    def finish(self):
        """The mean of the channels, since FFmpeg's own down-mix would be 3 dB louder, at sample_rate."""
        if self.parts:
            wave = torch.from_numpy(np.concatenate(self.parts, 1).mean(0))
            self.wave = torchaudio.functional.resample(wave, self.rate, self.sample_rate).numpy()

    def is_short(self):
        if not self.windows:
            return False
        if not self.parts:
            return True
        end = self.begin + len(self.wave) / self.sample_rate
        return self.begin > start_of(self.windows) + SLACK or end < self.until - SLACK

    def arrays(self):
        """(samples,) of each window."""
        out = []
        for start, seconds in self.windows:
            window = np.zeros(round(seconds * self.sample_rate), np.float32)
            if self.parts:
                place = round((start - self.begin) * self.sample_rate)          # of the window in the wave
                part = self.wave[max(place, 0):max(place + len(window), 0)]
                skipped = max(-place, 0)
                window[skipped:skipped + len(part)] = part
            out.append(window)
        return out


def start_of(windows):
    return min(start for start, _ in windows)


def end_of(windows):
    return max((start + seconds for start, seconds in windows), default=0.0)


def find_streams(container):
    """(video, audio) of an open container, None for what it lacks."""
    video = None
    audio = None
    for stream in container.streams:
        if stream.type not in ("video", "audio") or stream.codec_context is None:
            continue                                # of a truncated file: to touch what lacks a codec crashes
        if stream.type == "audio" and audio is None:
            audio = stream
        cover = stream.disposition & av.stream.Disposition.attached_pic
        if stream.type == "video" and video is None and not cover:      # the cover of an album is no video
            video = stream
    return video, audio


def time_stretch(video, frame_rate):
    """Seconds of the clip's clock in one that counts `frame_rate` of its frames; 1 without a frame_rate,
    without pictures (None), or with a wrong header."""
    if not frame_rate or video is None:
        return 1.0
    rate = float(video.average_rate or 0)
    return frame_rate / rate if 1 <= rate <= 240 else 1.0


def picture(frame, size, reformatter):
    """A decoded frame as (H, W, 3) uint8: short side `size`, turned upright."""
    scale = size / min(frame.width, frame.height)
    width = max(size, round(frame.width * scale))
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


def read_clip(path, start=0.0, seconds=10.0, num_frames=16, size=224, sample_rate=16000):
    """One window of a clip, `start` to `start + seconds`: video (T, H, W, 3) uint8 with short side `size`,
    the frames evenly spread over the seconds by timestamp; audio (samples,) float32, mean of the channels;
    has_video, has_audio, short. An absent stream is zeros of full shape, a short one is padded. Raises
    ClipError where nothing decodes."""
    window = [(start, seconds)]
    with open_clip(path) as clip:
        read = clip.read(window, window, num_frames, size, sample_rate)
    return {**read, "video": read["video"][0], "audio": read["audio"][0]}
