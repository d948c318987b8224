"""A clip written anew, small and quick to read: one mp4 of H.264 without B-frames, with a key frame every few
frames, and of its sound as FLAC, in packets of a second; without pictures a wav.

It is read by the reader, piece by piece, so that it holds what the reader shows of the original at the same
seconds, whatever that one's clocks, codecs and holes are. The same clip becomes the same bytes."""
import math
import os
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from datasets.check import NOTHING, read_part
from datasets.collectors import pixel_aspect
from datasets.reader import MAX_SECONDS, ClipError, open_clip

CHUNK = 12.0            # seconds that are read at once: they cost memory
FADE = 0.01             # seconds over which the sound of a piece goes over into the next one's
FASTEST = 60            # frames a second; of more each second one is left out, or the third, or fourth
USUAL = 25              # frames a second of a file that says none, less than one, or more than 4 * FASTEST
LONGEST = 65535         # samples of a packet of FLAC
TICKS = 100             # of the mp4's clock in a frame, over the denominator of the frame rate


@dataclass(frozen=True)
class Coding:
    """How clips are written."""
    side: int = 256                         # the short side of the pictures, at most
    fps: float | None = None                # frames a second, at most
    gop: int = 6                            # frames from key frame to key frame
    sample_rate: int = 16000
    shards: int = 0                         # tars of a set; 0: files


def rewrite(path, temporary, how):
    """Write a clip anew as the file `temporary`: a generator that comes back after each piece of it, and
    returns (its ending, its seconds). Raises ClipError, and what av raises of the encoder and of the disk."""
    with open_clip(path) as clip:
        side = short_side(clip.video, how.side)
        shown = look(clip, "video", side)
        heard = look(clip, "audio", side)
        if shown is None and heard is None:
            raise ClipError(f"{path}: {NOTHING} (no video frame, no sound)")
        fps = frame_rate(clip.video, how.fps)
        output = Output(temporary, shown, heard, fps, how)
        with output.container:
            for piece in read_pieces(clip, output, side):
                output.add(*piece)
                yield
            output.finish()
        return ".mp4" if shown else ".wav", output.seconds


def look(clip, kind, side):
    """What the reader says of the first moment of a stream, None where nothing of the stream decodes."""
    if getattr(clip, kind) is None:
        return None
    moment = [(0.0, 0.001)]
    read = read_part(clip, moment if kind == "video" else [], moment if kind == "audio" else [], side)
    if read is None or getattr(clip, kind) is None:             # a single picture was found to be no video
        return None
    return read if read["reach"][kind] else None


def short_side(video, most):
    """The short side of the upright pictures with square pixels, but not more than `most`."""
    if video is None:
        return most
    codec = video.codec_context
    own = round(min(codec.width * pixel_aspect(video), codec.height))
    return min(most, own) if own > 0 else most


def frame_rate(video, most):
    """Frames a second, a Fraction: the clip's average, or the round one beside it, but not more than `most`,
    where that is given."""
    rate = Fraction(video and video.average_rate or USUAL)
    guess = Fraction(video and video.guessed_rate or rate)      # of a file with few frames the average is off
    rate = guess if abs(guess - rate) < rate / 50 else rate
    rate = rate if 1 <= rate <= 4 * FASTEST else Fraction(USUAL)
    rate /= math.ceil(rate / FASTEST)
    return min(rate, Fraction(most or rate)).limit_denominator(1001)


def read_pieces(clip, output, side):
    """(number of its first frame, (first sample, first one of the next piece), what the reader says) of one
    piece of the clip after the other."""
    fps = output.fps
    rate = output.rate
    seconds = clip.duration or CHUNK
    each = math.ceil(CHUNK * fps)
    first = 0
    checked = False
    while first / fps < seconds:
        count = max(1, min(each, math.ceil((seconds - output.phase) * fps - 0.01) - first))
        place = math.ceil(first / fps * rate)
        until = math.ceil((first + each) / fps * rate)
        length = max(1, min(until + output.fade, round(seconds * rate)) - place)
        videos = [(float(output.phase + first / fps), float(count / fps))] if output.video else []
        audios = [(place / rate, length / rate)] if output.audio else []
        clip.budget = MAX_SECONDS                               # it holds for a piece
        read = clip.read(videos, audios, count, side, rate)
        end = max((span[1] for span in read["reach"].values() if span), default=0.0)
        if end <= first / fps and not checked:                  # is the length wrong, or is this a hole?
            seconds = min(seconds, max(clip.ends().values(), default=0.0))
            checked = True
        yield first, (place, until), read
        first += each


class Output:
    """The file that is written, and how far it is. Frame n is shown from phase + n / fps seconds on."""
    def __init__(self, path, shown, heard, fps, how):
        self.fps = fps
        self.rate = how.sample_rate
        self.fade = round(FADE * self.rate)
        self.held = np.zeros(0, np.float32)                     # samples of the time after the last piece
        self.seconds = 0.0                                      # how far it is
        options = {"fflags": "+bitexact"}                       # no time of writing
        if shown:
            options |= {"movflags": "+faststart", "movie_timescale": str(self.rate)}
        path = os.path.abspath(path)                            # FFmpeg would take "a:b" for a protocol
        self.container = av.open(path, "w", format="mp4" if shown else "wav", options=options)
        self.video = self.add_video(shown["video"][0].shape[1:3], how.gop) if shown else None
        self.audio = self.add_audio("flac" if shown else "pcm_s16le") if heard else None
        begin = shown["reach"]["video"][0] if shown else math.inf
        sound = heard["reach"]["audio"][0] if heard else math.inf
        # the stream that begins first begins at 0, since a file's clock does there
        self.begin = -math.inf if begin <= sound else begin     # seconds, before which there is no picture
        self.phase = 0.0 if begin <= sound or not shown else begin - round(begin * fps) / fps
        self.samples = 0 if sound <= begin else None            # that are written; None: it has not begun

    def add_video(self, shape, gop):
        coding = {"preset": "veryfast", "tune": "fastdecode", "crf": "23", "bf": "0", "g": str(gop),
                  "keyint_min": str(gop), "sc_threshold": "0",
                  "x264-params": "mbtree=0:rc-lookahead=0"}     # mbtree is not repeatable
        video = self.container.add_stream("libx264", rate=self.fps, options=coding)
        video.height = shape[0] // 2 * 2                        # yuv420p has even sides
        video.width = shape[1] // 2 * 2
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.time_base = Fraction(1, self.fps.numerator * TICKS)
        return video

    def add_audio(self, codec):
        # plain samples come in packets of 1,024, each of which costs as much to read as a second of FLAC
        packet = {"frame_size": str(min(self.rate, LONGEST))} if codec == "flac" else {}
        audio = self.container.add_stream(codec, rate=self.rate, layout="mono", options=packet)
        audio.codec_context.format = "s16"
        return audio

    def add(self, first, samples, read):
        """A piece of read_pieces: what decoded of it, second by second, so that in the file the frames and
        samples of a time lie together."""
        wave = self.take_sound(*samples, read) if self.audio else ()
        frames = read["video"][0] if self.video else ()
        end = (read["reach"]["video"] or (0, -math.inf))[1]
        block = round(self.fps)
        for n in range(max(math.ceil(len(frames) / block), math.ceil(len(wave) / self.rate))):
            self.write_sound(wave[n * self.rate:(n + 1) * self.rate])
            for k in range(n * block, min((n + 1) * block, len(frames))):
                if self.begin - 1e-6 <= self.phase + (first + k + 0.5) / self.fps < end:
                    self.write_frame(first + k, frames[k])

    def take_sound(self, place, until, read):
        """The samples to write of a piece, of which the first is sample `place`. Those from `until` on are
        held: over them the sound goes over into that of the next piece, whose samples may lie between them.
        """
        wave = self.held
        self.held = wave[:0]
        begin, end = (round(seconds * self.rate) for seconds in read["reach"]["audio"] or (0, 0))
        if end <= place or self.samples is None and begin >= until:
            return wave                                         # none of the piece is heard
        fade = len(wave)
        ramp = (np.arange(fade, dtype=np.float32) + 0.5) / max(1, fade)
        mixed = read["audio"][0]
        mixed[:fade] = ramp * mixed[:fade] + (1 - ramp) * wave
        if self.samples is None:
            self.samples = max(begin, place)
        lack = max(0, place - self.samples)                     # samples that the pieces before lacked
        mixed = mixed[max(0, self.samples - place):max(end - place, fade)]
        mixed = np.concatenate([np.zeros(lack, np.float32), mixed])
        ready = until - self.samples
        self.held = mixed[ready:]
        return mixed[:ready]

    def write_frame(self, number, frame):
        frame = np.ascontiguousarray(frame[:self.video.height, :self.video.width])
        frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
        clock = self.video.codec_context.time_base
        frame.time_base = clock
        frame.pts = max(0, round(self.phase / clock) + number * self.fps.denominator * TICKS)
        self.container.mux(self.video.encode(frame))
        self.seconds = max(self.seconds, float(frame.pts * clock + 1 / self.fps))

    def write_sound(self, wave):
        if len(wave) == 0:
            return
        whole = (wave * 32768).round().clip(-32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(whole[None], format="s16", layout="mono")
        frame.sample_rate = self.rate
        frame.time_base = Fraction(1, self.rate)
        frame.pts = self.samples
        self.container.mux(self.audio.encode(frame))
        self.samples += len(wave)
        self.seconds = max(self.seconds, self.samples / self.rate)

    def finish(self):
        self.write_sound(self.held)
        for stream in self.container.streams:
            self.container.mux(stream.encode(None))
