"""The reader: a file is opened once, and decoded in one pass for several windows of time.

    with open_clip(path) as clip:
        windows = [(0.0, 2.0), (clip.duration - 2.0, 2.0)]              # (start, seconds)
        read = clip.read(windows, windows, num_frames=16, size=224, sample_rate=16000)

What a file says of itself may be wrong: a length that is a guess is measured, a seek is judged by what came
of it, and a file in which nothing decodes, or which costs too much, is a ClipError with its name.
"""
import contextlib
import math
import os
import time

import av
import numpy as np

from common import UserError
from datasets.collectors import SLACK, Pictures, Sound, seconds_of
from datasets.leads import PREROLL, PictureLead, SoundLead, gaps_between
from datasets.shards import find_address

SEEK_FROM = 2.0         # seconds: to a window that begins later the reader jumps
APART = 6.0             # seconds from the end of one window to the next: between such two it jumps, too
MAX_SECONDS = 60.0      # what a clip may cost; or as many as were asked for

# These containers know their length and find a place by an index or by counting bytes ...
INDEXED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "flv", "nut", "mxf", "flac", "wav", "w64",
           "aiff", "au", "caf", "tta"}
# ... these know it, but a seek in them goes wrong; of all others FFmpeg guesses by the bit rate
TIMED = {"mpegts", "mpeg", "avi", "ogg"}
COUNTED = {"aac"}       # FFmpeg times its packets by the first one's sample rate: their samples tell the time
# What makes FFmpeg read other files or devices is not opened
FOLLOWERS = {"concat", "hls", "dash", "webm_dash_manifest", "imf", "sdp", "rtp", "rtsp", "sap", "image2",
             "vobsub", "lavfi", "avisynth", "vapoursynth", "alsa", "oss", "pulse", "jack", "fbdev", "kmsgrab",
             "x11grab", "xcbgrab", "video4linux2,v4l2", "avfoundation", "dshow", "gdigrab", "decklink"}
SINGLE = ",".join(sorted(av.formats_available - FOLLOWERS))
OPTIONS = {"format_whitelist": SINGLE, "protocol_whitelist": "file"}


class ClipError(UserError):
    """A file in which nothing decodes; the message holds its name and the reason."""


@contextlib.contextmanager
def errors_as_sentence(path):
    """What FFmpeg says of a file as a ClipError."""
    try:
        yield
    except av.error.ExitError:
        raise too_slow(path) from None
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as e:
        raise ClipError(f"{path}: does not decode ({reason_of(e)})") from None


def reason_of(error):
    """What went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def too_slow(path):
    return ClipError(f"{path}: does not decode (it takes more than {MAX_SECONDS:g} seconds; cut it into "
                     "shorter clips, or write it anew)")


@contextlib.contextmanager
def open_clip(path, frame_rate=None):
    """Open a file as a Clip. Raises ClipError.

    With a frame_rate the clip's duration and its windows count frames: one second is `frame_rate` frames of
    this clip, however long those take."""
    with errors_as_sentence(path):
        clip = Clip(path, frame_rate)
    try:
        yield clip
    finally:
        clip.container.close()


class Clip:
    """An open file: .video and .audio, its streams or None; .duration in seconds (of the frame_rate, where
    one is given); .stretch, seconds of the clip's own clock in one of those."""
    def __init__(self, path, frame_rate=None):
        self.path = path
        self.budget = MAX_SECONDS                               # seconds that it may still cost
        self.shape = None                                       # (height, width) of its pictures as read
        self.lonely = False                                     # its video is a single picture: none
        self.open()
        self.sparse = self.container.format.name in INDEXED     # are its times and key frames to be trusted?
        try:
            self.origin = (self.container.start_time or 0) / av.time_base       # the clock's at the start
            self.stretch = time_stretch(self.video, frame_rate)
            self.set_length(self.find_length())
        except BaseException:
            self.container.close()
            raise

    def open(self):
        """Open the file, at its beginning."""
        file, begin, size = place_of(self.path)
        if not os.path.isfile(file):                            # to open a pipe is to wait for its writer
            raise ClipError(f"{self.path}: does not decode (it is no file)")
        if size == 0:
            raise ClipError(f"{self.path}: the file is empty")
        options = OPTIONS
        if find_address(self.path):
            file = f"subfile,,start,{begin},end,{begin + size},,:{file}"
            options = OPTIONS | {"protocol_whitelist": "file,subfile"}
        self.container = av.open(
            file, metadata_errors="replace", timeout=MAX_SECONDS, container_options=options)
        self.fresh = True                                       # nothing of it was read yet
        self.video, self.audio = find_streams(self.container)
        if self.lonely:
            self.video = None
        for stream in (self.video, self.audio):
            if stream is not None:
                stream.codec_context.thread_count = 1   # frame threads and an early stop hang beside torch

    def rewind(self):
        """To the beginning; by opening it again, since not every file can be sought."""
        if not self.fresh:
            self.container.close()
            self.open()

    def set_length(self, seconds):
        """seconds: on the clip's own clock."""
        self.seconds = seconds
        self.duration = seconds / self.stretch

    def find_length(self):
        """Seconds on the clip's own clock: what the file says, or, where that is a guess, its packets."""
        name = self.container.format.name
        known = name in INDEXED or name in TIMED or name == "mp3" and says_its_length(self.path)
        late = self.origin > 1                                  # some count from 0 all the same
        piped = any(stream.frames >= 2 ** 30 for stream in self.container.streams)      # an avi's placeholder
        if known and not late and not piped and (self.container.duration or 0) > 0:
            return self.container.duration / av.time_base
        return max(self.ends().values(), default=0.0)

    def ends(self, decode=False):
        """{"video": seconds, "audio": seconds}: when the streams that are there end, on the clip's own clock,
        by their packets, or by what decodes. Finds out whether the video is a single picture."""
        self.rewind()
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        ends = {stream.type: [] for stream in streams}
        if decode or self.container.format.name in COUNTED:
            for stream, at, frame in self.frames(streams):
                ends[stream.type].append(at + length_of(frame, stream))
            streams = []
        clocks = {stream.type: 0.0 for stream in streams}       # when the last packet ended
        for packet in self.packets(streams):
            if packet.size:
                kind = packet.stream.type
                begin = self.time_of(packet)
                begin = clocks[kind] if begin is None else begin
                clocks[kind] = begin + seconds_of(packet.duration or 0, packet.time_base)
                ends[kind].append(clocks[kind])
        self.lonely = len(ends.get("video", ())) == 1
        self.rewind()
        return {kind: last_of(np.array(each)) for kind, each in ends.items() if len(each) > (kind == "video")}

    def shorten(self, video, audio):
        """Measure the length: as far as all streams reach that are asked for. video, audio: are they? Returns
        whether it is less than was thought, or the video none."""
        asked = {"video": video, "audio": audio}
        lonely = self.lonely
        for decode in (False, True):
            with errors_as_sentence(self.path):
                ends = self.ends(decode)
            if self.lonely and not lonely:
                return True
            seconds = min((end for kind, end in ends.items() if asked[kind]), default=self.seconds)
            if seconds < self.seconds - SLACK:
                self.set_length(seconds)
                return True
        return False

    def read(self, video_windows, audio_windows, num_frames, size, sample_rate):
        """Decode the windows, each (start, seconds); those that lie close together in one pass. Returns a
        dict:

        video: a (T, H, W, 3) uint8 array for each video window, short side `size`, T = num_frames frames at
        the middle of T equal parts of the window; audio: a (samples,) float32 array for each audio window,
        the mean of the channels at sample_rate; seen, heard: a bool for each video and each audio window: did
        something in it decode; has_video, has_audio: did it in all of them (of a stream that no window asks
        for: is it there); short: more than .1 s of a window lies outside of what decoded (the picture then
        holds its nearest frame and the sound is zero); reach: {"video": (begin, end), "audio": (begin, end)},
        seconds, of all that decoded, None where nothing did. An absent stream is zeros. Raises ClipError."""
        shown = self.on_clock(video_windows)
        heard = self.on_clock(audio_windows)
        for start, seconds in shown + heard:
            if not (math.isfinite(start) and 0 < seconds < math.inf):
                raise UserError(f"{self.path}: a window from {start} of {seconds} seconds cannot be read")
        with errors_as_sentence(self.path):
            self.budget += max(0.0, sum(seconds for _, seconds in {*shown, *heard}) - MAX_SECONDS)
            passes = []
            for first, last in stretches(shown + heard):
                wanted = [window for window in shown if first <= window[0] <= last]
                sounds = [window for window in heard if first <= window[0] <= last]
                passes.append(self.read_stretch(first, wanted, sounds, num_frames, size, sample_rate))
            if self.video is not None and max((pictures.count for pictures, _ in passes), default=0) == 1:
                self.ends()                                     # is it all there is?
            came = any(pictures.count or sound.count for pictures, sound in passes)
            absent = self.video is None and self.audio is None
            if absent or passes and not came and not self.decodes(bool(shown), bool(heard)):
                found = "a single picture, which is no video" if self.lonely else "no video frame"
                raise ClipError(f"{self.path}: nothing in it decodes ({found}, no sound)")
            return self.join(passes, shown, heard, num_frames, size)

    def decodes(self, video, audio):
        """Whether anything does of the streams that are asked for, wherever it lies; or none of them is
        there."""
        self.rewind()
        asked = [self.video] if video else []
        asked += [self.audio] if audio else []
        streams = [stream for stream in asked if stream is not None]
        return not streams or any(True for _ in self.frames(streams))

    def join(self, passes, shown, heard, num_frames, size):
        """What `read` returns, of its passes."""
        films = [pictures for pictures, _ in passes]
        sounds = [sound for _, sound in passes]
        videos = {}                                             # window: (pictures, is something in it)
        waves = {}
        for pictures, sound in passes:
            videos.update(zip(pictures.windows, zip(pictures.arrays(self.shape), pictures.seen())))
            waves.update(zip(sound.windows, zip(sound.arrays(), sound.heard())))
        if self.lonely:
            blank = np.zeros((num_frames, size, size, 3), np.uint8)
            videos = dict.fromkeys(shown, (blank, False))
        seen = [videos[window][1] for window in shown]
        audible = [waves[window][1] for window in heard]
        return {
            "video": [videos[window][0] for window in shown],
            "audio": [waves[window][0] for window in heard],
            "seen": seen,
            "heard": audible,
            "has_video": self.video is not None and all(seen),
            "has_audio": self.audio is not None and all(audible),
            "short": any(part.is_short() for part in (sounds if self.lonely else films + sounds)),
            "reach": {"video": self.reach(films), "audio": self.reach(sounds)}}

    def reach(self, parts):
        """(begin, end) in seconds of what decoded for the parts; None where nothing did."""
        begin = min((part.begin for part in parts), default=math.inf)
        if begin == math.inf:
            return None
        return begin / self.stretch, max(part.end for part in parts) / self.stretch

    def on_clock(self, windows):
        """Windows on the clip's own clock."""
        return [(start * self.stretch, seconds * self.stretch) for start, seconds in windows]

    def read_stretch(self, first, wanted, sounds, num_frames, size, sample_rate):
        """One pass, from `first` on: (Pictures, Sound) of the windows `wanted` and `sounds`. A seek that came
        too late, or to nothing, is done again without one, and if need be by decoding all that comes
        before; what went wrong where frames were left out, without leaving out any."""
        jumps = first > SEEK_FROM
        for sought, lead in ((True, first), (False, first), (False, -math.inf)):
            if sought and not (jumps and self.seek(first)):
                continue
            if not sought:
                self.rewind()
            pictures = Pictures(self.video, wanted, num_frames, size)
            sound = Sound(self.audio, sounds, sample_rate)
            parts = {"video": pictures, "audio": sound}
            streams = [part.stream for part in parts.values() if part.open]
            leads = self.leads(pictures, sound, lead, sought)
            for stream, at, frame in self.frames(streams, leads, sought):
                part = parts[stream.type]
                if part.open:
                    part.add(frame, at)
                leads[stream.type].open = part.open
                if not (pictures.open or sound.open):
                    break
            pictures.finish()
            sound.finish()
            until = math.inf if pictures.open else pictures.since
            if self.sparse and (pictures.lost or leads["video"].misses(pictures.times, until)):
                self.sparse = False
                self.rewind()
                return self.read_stretch(first, wanted, sounds, num_frames, size, sample_rate)
            if not (pictures.is_late(first) or sound.is_late(first)):
                break
            if not (sought or jumps and pictures.is_late(first)):       # else its key frames are none
                break
        self.shape = self.shape or pictures.shape
        return pictures, sound

    def leads(self, pictures, sound, first, sought):
        """{kind: Lead} of a pass that begins at `first`; -inf: with all that comes before."""
        lead = first if first > SEEK_FROM else -math.inf
        heard_from = -math.inf if sought else lead
        moments = [] if lead == -math.inf else [lead]
        if self.sparse and pictures.open and first > -math.inf:
            moments = pictures.needs()
        counted = self.container.format.name in COUNTED
        gaps = [] if counted else gaps_between(sound.windows, heard_from)
        return {"video": PictureLead(moments, self.sparse), "audio": SoundLead(gaps)}

    def seek(self, first):
        """Go to the last key frame before `first`. Returns whether that can be trusted."""
        if self.container.format.name not in INDEXED:
            return False
        self.fresh = False
        place = min(first, self.seconds or first) - PREROLL + self.origin
        try:
            self.container.seek(int(place * av.time_base), backward=True)
        except av.error.FFmpegError:
            return False
        return True

    def frames(self, streams, leads=None, sought=False):
        """(stream, time, frame) in the file's order of the packets that {kind: Lead} lets through; (stream,
        time, None) where others were left out, up to one of this time. sought: this is not the beginning."""
        counted = self.container.format.name in COUNTED
        clocks = {stream.type: None if sought else self.origin for stream in streams}
        for packet in self.led(streams, leads):
            kind = packet.stream.type
            if kind == "video":
                packet.stream.codec_context.skip_frame = "NONREF" if packet.opaque else "DEFAULT"
            for frame in decoded(packet, leads and leads[kind]):
                if frame.pts is None and clocks[kind] is None:
                    continue
                if frame.pts is None or counted:                # it follows on the one before
                    frame.pts = round(clocks[kind] / frame.time_base)
                at = seconds_of(frame.pts, frame.time_base)
                clocks[kind] = at + length_of(frame, packet.stream)
                yield packet.stream, at - self.origin, frame
            if packet.size == 0 and packet.pts is not None:     # of `drain`
                packet.stream.codec_context.flush_buffers()
                clocks[kind] = None
                yield packet.stream, self.time_of(packet), None

    def led(self, streams, leads):
        """The packets to decode: {kind: Lead} leaves those out that nobody needs; None: all."""
        for packet in self.packets(streams):
            if leads is None:
                yield packet
                continue
            lead = leads[packet.stream.type]
            if lead.open:
                yield from lead.add(packet, self.time_of(packet))
        for lead in (leads or {}).values():                     # of a file that breaks off
            if lead.open:
                yield from lead.rest()

    def packets(self, streams):
        """The packets of the streams, as far as they can be read. Raises ClipError after the deadline."""
        if not streams:
            return
        self.fresh = False
        starts = {}
        deadline = time.monotonic() + self.budget
        packets = self.container.demux(streams)
        try:
            while True:
                packet = next(packets)
                if time.monotonic() > deadline:
                    raise too_slow(self.path)
                if self.container.format.name == "avi" and packet.pts is not None:
                    # it has no times: FFmpeg begins as late as B-frames could make it
                    packet.pts -= starts.setdefault(packet.stream.type, packet.pts)
                yield packet
        except StopIteration:
            return
        except av.error.ExitError:                              # FFmpeg itself took so long
            raise too_slow(self.path) from None
        except av.error.FFmpegError:                        # a broken file: the part before it may be fine
            return
        finally:
            self.budget = deadline - time.monotonic()

    def time_of(self, packet):
        """A packet's time in seconds on the clip's own clock, None if it has none."""
        pts = packet.dts if packet.pts is None else packet.pts
        return None if pts is None else seconds_of(pts, packet.time_base) - self.origin


def decoded(packet, lead=None):
    """The frames of a packet. lead: is told where it fails."""
    try:
        return packet.decode()
    except av.error.FFmpegError:            # one broken packet, of half a dozen kinds: the rest may be fine
        if lead is not None:
            lead.lost = True
        return []


def length_of(frame, stream):
    """Seconds that a frame lasts."""
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    if frame.duration:
        return seconds_of(frame.duration, frame.time_base)
    return float(1 / (stream.average_rate or 10))


def last_of(ends):
    """The largest of many times, apart from those that a flipped bit has thrown hours ahead."""
    return float(ends[ends <= np.quantile(ends, 0.99) + 60].max())


def stretches(windows):
    """Windows (start, seconds) -> [(first start, last start)] of those that are read in one pass."""
    found = []
    until = -math.inf                                           # the end of the windows so far
    for start, seconds in sorted(windows):
        if found and start < until + APART:
            found[-1] = (found[-1][0], start)
        else:
            found.append((start, start))
        until = max(until, start + seconds)
    return found


def find_streams(container):
    """(video, audio) of an open container, None for what it lacks: of several the one that is marked as the
    default."""
    best = {"video": None, "audio": None}
    rank = {"video": (), "audio": ()}
    for stream in container.streams:
        if stream.type not in best or stream.codec_context is None:
            continue                                # of a truncated file: to touch what lacks a codec crashes
        if stream.disposition & av.stream.Disposition.attached_pic:     # the cover of an album is no video
            continue
        default = bool(stream.disposition & av.stream.Disposition.default)
        own = (stream.frames != 1, default)                     # nor is a track of one picture
        if best[stream.type] is None or own > rank[stream.type]:
            best[stream.type] = stream
            rank[stream.type] = own
    return best["video"], best["audio"]


def place_of(path):
    """(file, first byte, bytes) of a path, or of an address in a tar."""
    tar, begin, size = find_address(path) or (path, 0, None)
    file = os.path.abspath(tar)                                 # FFmpeg would take "a:b" for a protocol
    held = os.path.getsize(file)
    return file, begin, held if size is None else size


def says_its_length(path):
    """Whether an mp3 begins with a Xing header, a frame that counts the others, and the count of bytes in it
    is the file's; without one FFmpeg guesses by the first frame's bit rate."""
    path, start, size = place_of(path)
    begin = start
    with open(path, "rb") as file:
        file.seek(start)
        head = file.read(10)
        if head[:3] == b"ID3":                                  # the tag's length, 7 bits a byte
            begin += 10 + sum((byte & 127) << 7 * n for n, byte in enumerate(head[9:5:-1]))
        file.seek(begin)
        first = file.read(4096)
    place = max(first.find(b"Xing"), first.find(b"Info"))
    if place < 0 or len(first) < place + 16 or not first[place + 7] & 2:        # flag 2: it counts the bytes
        return False
    skipped = 12 if first[place + 7] & 1 else 8                 # flag 1: the frames come before
    count = int.from_bytes(first[place + skipped:place + skipped + 4], "big")
    return abs(start + size - begin - count) < 0.02 * count + 4096


def time_stretch(video, frame_rate):
    """Seconds of the clip's clock in one that counts `frame_rate` of its frames; 1 without a frame_rate,
    without pictures (None), or with a wrong header."""
    if not frame_rate or video is None:
        return 1.0
    rate = float(video.average_rate or 0)
    return frame_rate / rate if 1 <= rate <= 240 else 1.0


def read_clip(path, start=0.0, seconds=10.0, num_frames=16, size=224, sample_rate=16000):
    """One window of a clip, `start` to `start + seconds`: video (T, H, W, 3) uint8 with short side `size`,
    the frames evenly spread over the seconds by timestamp; audio (samples,) float32, mean of the channels;
    has_video, has_audio, short. An absent stream is zeros of full shape, a short one is padded. Raises
    ClipError where nothing decodes."""
    window = [(start, seconds)]
    with open_clip(path) as clip:
        read = clip.read(window, window, num_frames, size, sample_rate)
    return {**read, "video": read["video"][0], "audio": read["audio"][0]}
