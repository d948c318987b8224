"""Clips in, tensors out: every data set goes through the same decoder and the same front end.

A clip is opened and decoded once, whatever the number of views; audio and video of a view cover the same seconds, by timestamps,
unless the method takes pictures of a part of them only. From top to bottom: read a clip, turn it into tensors, list a data set, draw
batches, make the toy world.

    python data.py --data toy --check                                 # writes the toy clips if they are not there
    python data.py --data vggsound --data-dir vggsound/ --check       # what is there, missing, unreadable
    python data.py --data esc50 --data-dir ESC-50/ --check            # the same for sets of sound alone
    python data.py --data folder --data-dir clips/ --stats            # mean and std of the mel, for --mel-mean/--mel-std
"""
import argparse, atexit, csv, functools, hashlib, json, math, multiprocessing, os, shutil, signal, tempfile, warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from common import UserError, check_range, main_guard, one_thread     # before torch: common sets how its threads wait

import av
import numpy as np
import torch
import torchaudio
import torchvision.transforms.v2 as transforms
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

SOUNDS = ("esc50", "speechcommands", "fsd50k")          # sets without pictures
SILENT = ("ssv2",)                                      # sets without sound
NAMES = ("toy", "audioset", "audioset-20k", "audioset-full", "vggsound", "kinetics400", *SILENT, *SOUNDS, "folder")
MEDIA = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ogv", ".ts",
         ".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".wma", ".aif", ".aiff"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Read a clip
# ---------------------------------------------------------------------------------------------------------------------

class ClipError(UserError):
    """A file in which nothing decodes; the message holds its name and the reason."""


def read_windows(path, plan, num_frames, size, sample_rate, frame_rate=None):
    """Decode one clip once for several windows of time.

    plan(duration in seconds) -> (video windows, audio windows), each a list of (start, seconds) on the clip's own clock. With a
    frame_rate the plan's seconds count frames: one of its seconds is `frame_rate` frames of this clip, however long those take.
    Returns a dict: video, one (T, H, W, 3) uint8 array for each video window, short side `size`, T = num_frames frames at
    the middle of T equal parts of the window; audio, one (samples,) float32 array for each audio window, the mean of the
    channels at sample_rate; has_video, has_audio (of a stream that no window asks for: is it there); short: more than .1 s of a
    window lies outside of what decoded (the picture then holds its nearest frame and the sound is zero). An absent stream is
    zeros. Raises ClipError.
    """
    try:
        return _read_windows(os.path.abspath(path), plan, num_frames, size, sample_rate, frame_rate)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise ClipError(f"{path}: does not decode ({reason})") from None


def _read_windows(path, plan, num_frames, size, sample_rate, frame_rate):
    if os.path.getsize(path) == 0:
        raise ClipError(f"{path}: the file is empty")
    with av.open(path, metadata_errors="replace") as container:
        video, audio = find_streams(container)
        origin = (container.start_time or 0) / av.time_base
        duration = (container.duration or 0) / av.time_base
        if duration <= 0:                                               # a container without an index, a raw stream
            duration = max((float(s.duration * s.time_base) for s in (video, audio) if s is not None and s.duration), default=0.0)
        stretch = time_stretch(video, frame_rate)
        video_windows, audio_windows = ([(start * stretch, seconds * stretch) for start, seconds in w] for w in plan(duration / stretch))
        chosen = [s for s in (video if video_windows else None, audio if audio_windows else None) if s is not None]

        wanted = sorted((start + (i + 0.5) * seconds / num_frames, w, i)
                        for w, (start, seconds) in enumerate(video_windows) for i in range(num_frames))
        first = min([start for start, _ in video_windows + audio_windows], default=0.0)
        video_end, sound_end = (max([start + seconds for start, seconds in w], default=0.0) for w in (video_windows, audio_windows))
        sought = first > 2.0 and bool(chosen) and container.format.name not in ("mpegts", "mpeg")   # no index of key frames there
        if sought:
            container.seek(int((min(first, duration or first) - 0.5 + origin) * av.time_base), backward=True)

        reformatter = av.video.reformatter.VideoReformatter()
        to_float = av.AudioResampler(format="fltp")
        pictures, shown, k = {}, None, 0                                # shown: the frame on screen, and its picture
        video_span = [math.inf, -math.inf]                              # when the first frame came, and when the last one goes
        sound, rate, sound_start, sound_time = [], None, 0.0, 0.0
        video_open, audio_open = video in chosen, audio in chosen
        for s in chosen:
            s.codec_context.thread_count = 1                            # frame threads and an early stop hang beside torch
        for packet in container.demux(chosen) if chosen else ():
            try:
                frames = packet.decode()
            except av.error.FFmpegError:                                # one broken packet, of half a dozen kinds: the rest may be fine
                continue
            for frame in frames:
                if frame.pts is None:
                    continue
                time = frame.time - origin
                if packet.stream.type == "video":
                    while k < len(wanted) and wanted[k][0] < time - 1e-6:       # what was on screen until now
                        shown = shown or [frame, None]
                        if shown[1] is None:
                            shown[1] = picture(shown[0], size, reformatter)
                        pictures[wanted[k][1:]] = shown[1]
                        k += 1
                    shown, video_span = [frame, None], [min(video_span[0], time), time + float(1 / (video.average_rate or 10))]
                    video_open = k < len(wanted) or video_span[1] < video_end - 0.1
                elif audio_open:
                    if rate is None:
                        rate, sound_start, sound_time = frame.sample_rate, time, time
                    if sound and time > sound_end + 0.05:               # also a wrong timestamp, hours ahead
                        audio_open = False
                        continue
                    if time - sound_time > 0.05:                        # a hole in the stream stays a hole
                        sound.append(np.zeros((sound[-1].shape[0], int((time - sound_time) * rate)), np.float32))
                        sound_time = time
                    for part in [frame] if frame.format.name == "fltp" else to_float.resample(frame):
                        sound.append(part.to_ndarray())                 # (channels, samples)
                        sound_time += part.samples / rate
                    audio_open = sound_time < sound_end + 0.05          # the resampling filter looks a little ahead
            if not (video_open or audio_open):
                break
        if shown is not None:                                           # wanted after the last frame: it stays on screen
            for _, *place in wanted[k:]:
                shown[1] = picture(shown[0], size, reformatter) if shown[1] is None else shown[1]
                pictures[tuple(place)] = shown[1]

    has_video = bool(pictures) if video_windows else video is not None
    has_audio = audio is not None and (bool(sound) or sought or not audio_windows)      # its sound may end before the place sought
    if (video, audio) == (None, None) or chosen and not (pictures or sound):
        raise ClipError(f"{path}: nothing in it decodes (no video frame, no sound)")
    blank = np.zeros((size, size, 3), np.uint8)
    waves, short = [], bool(pictures) and (video_span[0] > min(video_windows)[0] + 0.1 or video_span[1] < video_end - 0.1)
    short |= bool(audio_windows) and has_audio and not sound
    if sound:
        wave = torch.from_numpy(np.concatenate(sound, 1).mean(0))       # FFmpeg's own down-mix would be 3 dB louder
        wave = torchaudio.functional.resample(wave, rate, sample_rate).numpy()
        short |= sound_start > min(audio_windows)[0] + 0.1 or sound_start + len(wave) / sample_rate < sound_end - 0.1
    for start, seconds in audio_windows:
        out = np.zeros(round(seconds * sample_rate), np.float32)
        if sound:
            begin = round((start - sound_start) * sample_rate)          # where the window begins in the decoded sound
            part = wave[max(begin, 0):max(begin + len(out), 0)]
            out[max(-begin, 0):][:len(part)] = part
        waves.append(out)
    return {"video": [np.stack([pictures.get((w, i), blank) for i in range(num_frames)]) for w in range(len(video_windows))],
            "audio": waves, "has_video": has_video, "has_audio": has_audio, "short": bool(short), "duration": duration}


def find_streams(container):
    """(video, audio) of an open container, None for what it lacks."""
    # A truncated file can have streams without a codec: touching those crashes. An album cover is no video.
    streams = [s for s in container.streams if s.type in ("video", "audio") and s.codec_context is not None]
    cover = av.stream.Disposition.attached_pic
    video = next((s for s in streams if s.type == "video" and not s.disposition & cover), None)
    return video, next((s for s in streams if s.type == "audio"), None)


def time_stretch(video, frame_rate):
    """Seconds of the clip's clock in one that counts `frame_rate` of its frames; 1 without a frame_rate, without pictures (None), or
    with a wrong header."""
    own = float(video.average_rate or 0) if frame_rate and video is not None else 0.0
    return frame_rate / own if 1 <= own <= 240 else 1.0


def picture(frame, size, reformatter):
    """A decoded frame as (H, W, 3) uint8: short side `size`, turned upright."""
    scale = size / min(frame.width, frame.height)
    frame_rgb = reformatter.reformat(frame, max(size, round(frame.width * scale)), max(size, round(frame.height * scale)),
                                     "rgb24", threads=1)
    upright, matrix = frame_rgb.to_ndarray(), frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:                                              # a phone held upright, or its front camera's mirror
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]             # a point (x, y) is shown at (a x + c y, b x + d y)
        turned = abs(b) > abs(a)
        upright = upright.transpose(1, 0, 2) if turned else upright
        upright = upright[::-1 if (b if turned else d) < 0 else 1, ::-1 if (c if turned else a) < 0 else 1]
    return np.ascontiguousarray(upright)


def read_clip(path, start=0.0, seconds=10.0, num_frames=16, size=224, sample_rate=16000):
    """One window of a clip, `start` to `start + seconds`: video (T, H, W, 3) uint8 with short side `size`, the frames evenly
    spread over the seconds by timestamp; audio (samples,) float32, mean of the channels; has_video, has_audio, short.
    An absent stream is zeros of full shape, a short one is padded. Raises ClipError where nothing decodes."""
    clip = read_windows(path, lambda duration: ([(start, seconds)], [(start, seconds)]), num_frames, size, sample_rate)
    return {**clip, "video": clip["video"][0], "audio": clip["audio"][0]}


# ---------------------------------------------------------------------------------------------------------------------
# 2. Turn it into tensors
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Inputs:
    """What the encoder eats: saved with each checkpoint, so that whoever loads it prepares a clip in the same way."""
    seconds: float = 8.0            # length of a view
    video_seconds: float | None = None      # of its pictures, if they cover a part of it only
    frames: int = 16                # video frames spread over it; 0: the encoder takes no video
    size: int = 224                 # side of the square that is cut out ...
    resize: int = 256               # ... after the short side was scaled to this
    crop_scale: tuple = (0.4, 1.0)  # area of a random resized crop, as a fraction
    sample_rate: int = 16000
    n_fft: int = 400
    win_length: int = 400
    hop: int = 160
    window: str = "hamming"         # or "hann"
    n_mels: int = 128               # 0: the encoder takes no sound
    log: str = "db"                 # decibel, floor at -100; "db_max": below the clip's loudest, floor at -80; or "ln": log(mel + 1e-6)
    mel_mean: float | tuple = -17.977       # one for all bins (dB, AudioSet, authors' code), or one for each; python data.py --stats
    mel_std: float | tuple = 24.468
    columns: int | None = None      # frames of the mel: what is missing is silence; None: as many as the seconds give
    interpolate: bool = False       # squeeze or stretch the mel to `columns` instead
    frame_rate: float | None = None         # the seconds above count frames of the clip at this rate (frame_rate of read_windows)

    @property
    def mel_frames(self):
        return self.columns or round(self.seconds * self.sample_rate) // self.hop + 1

    def at(self, seconds, patch):
        """The same for views of another length, by the clock; the mel padded to whole patches of `patch` frames, or, where it is
        interpolated, with as many frames a second as before."""
        other = replace(self, seconds=seconds, columns=None, frame_rate=None)
        frames = seconds / self.seconds * self.columns if self.interpolate and self.columns else other.mel_frames
        return self if seconds == self.seconds else replace(other, columns=math.ceil(frames / patch) * patch)


class LogMel(torch.nn.Module):
    """(..., samples) -> (..., 1, F, T): mel power, with silence up to inputs.columns (or interpolated to them), its log, minus the mean,
    over the std."""
    def __init__(self, inputs):
        super().__init__()
        for name, value in (("mean", inputs.mel_mean), ("std", inputs.mel_std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1), persistent=False)                       # (1 or F, 1)
        self.log, self.columns, self.interpolate = inputs.log, inputs.columns, inputs.interpolate
        window = {"hamming": torch.hamming_window, "hann": torch.hann_window}[inputs.window]
        with warnings.catch_warnings():                                 # 128 bins of 512 samples: the lowest filter is empty
            warnings.filterwarnings("ignore", message="At least one mel filterbank")
            self.mel = torchaudio.transforms.MelSpectrogram(inputs.sample_rate, inputs.n_fft, inputs.win_length, inputs.hop,
                                                            n_mels=inputs.n_mels, window_fn=window, power=2.0)

    def forward(self, wave):
        mel = self.mel(wave)                                                                                    # (..., F, T)
        if not self.interpolate:
            mel = torch.nn.functional.pad(mel, (0, (self.columns or mel.shape[-1]) - mel.shape[-1]))    # or cut, if there are more
        mel = (mel + 1e-6).log() if self.log == "ln" else 10 * mel.clamp_min(1e-10).log10()
        if self.log == "db_max":                        # digital silence lies at the floor, not at the top
            top = mel.amax((-2, -1), keepdim=True)
            mel = torch.where(top > -100, mel - top, -80.0).clamp_min(-80)
        if self.interpolate and self.columns not in (None, mel.shape[-1]):
            size = (mel.shape[-2], self.columns)
            mel = torch.nn.functional.interpolate(mel.reshape(1, -1, *mel.shape[-2:]), size, mode="bilinear", antialias=True).reshape(
                *mel.shape[:-2], *size)
        return ((mel - self.mean) / self.std).unsqueeze(-3)                                                     # (..., 1, F, T)


def crop_transform(inputs, crop):
    """Transform for (T, 3, H, W) uint8: 'center' (resize and centre crop), 'first' and 'last' (the same at the start and at the end of
    the longer side), 'flip' ('center', flipped half of the time) or 'random' (random resized crop and flip)."""
    if crop == "random":
        steps = [transforms.RandomResizedCrop(inputs.size, scale=inputs.crop_scale, antialias=True)]
    else:
        # differs: V-JEPA's code scales the short side to the very size of the crop for its three crops; here they are as large as 'center'
        cut = functools.partial(_cut_end, inputs.size, crop) if crop in ("first", "last") else transforms.CenterCrop(inputs.size)
        steps = [transforms.Resize(inputs.resize, antialias=True), cut]
    return transforms.Compose(steps + [transforms.RandomHorizontalFlip()] * (crop in ("flip", "random")))


def _cut_end(size, crop, video):
    """The square of `size` at the first or the last end of the longer side (of a square: of the width), in the middle of the other."""
    corner, long = [round((side - size) / 2) for side in video.shape[-2:]], int(video.shape[-1] >= video.shape[-2])
    corner[long] = 0 if crop == "first" else video.shape[-2:][long] - size
    return video[..., corner[0]:corner[0] + size, corner[1]:corner[1] + size]


def normalize_video(video):
    """(..., 3, T, H, W) uint8 -> float32, ImageNet mean and std. Runs where the tensor lies, so on the GPU in training."""
    mean = torch.tensor(IMAGENET_MEAN, device=video.device).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=video.device).view(3, 1, 1, 1)
    return (video.float() / 255 - mean) / std


class View(NamedTuple):
    """A stretch of a clip and what is taken from it."""
    start: float                    # seconds on the clip's clock
    seconds: float
    video: str | None               # a crop of crop_transform, or None: no picture in this view
    audio: bool
    pictures: tuple | None = None   # (start, seconds) of the pictures, if not those of the sound


CROPS = {1: ("center",), 3: ("first", "center", "last")}            # test crops of a place, in their order


def place_views(places, inputs, duration, video=True, audio=True, crops=1):
    """Views at `places`, 0 (as early as can be) to 1 (as late as can be): centre crop, or each place with all three of CROPS."""
    room, spare = (max(0.0, duration - seconds) for seconds in (inputs.seconds, inputs.video_seconds or inputs.seconds))
    return [View(float(room * place), inputs.seconds, crop if video else None, audio,
                 (float(spare * place), inputs.video_seconds) if inputs.video_seconds else None)
            for place in places for crop in CROPS[crops]]


def even_views(count, inputs, rng, duration, video=True, audio=True, crops=1):
    """Test views at `count` places spread evenly over the clip, each with as many crops."""
    return place_views([0.5] if count == 1 else np.linspace(0, 1, count), inputs, duration, video, audio, crops)


class Clips(Dataset):
    """The clips of a listing as views. Key: (epoch, index). The item is a pure function of (seed, epoch, index):

    video (Vv, 3, T, H, W) uint8 and audio (Va, 1, F, T) float32 of the views that have them, present (V, 2) bool, index,
    has_video, has_audio, short, bad. A clip that does not decode is named in `bad` and, with `replace`, another one is
    drawn for it; without, the item holds nothing but `bad`.

    plan(rng, duration) -> list of View is the method's policy (at module level: it must pickle).
    """
    def __init__(self, listing, inputs, plan, seed=0, replace=True):
        self.listing, self.inputs, self.plan, self.seed, self.replace = listing, inputs, plan, seed, replace
        self.mel = LogMel(inputs) if inputs.n_mels else None
        self.crops = {crop: crop_transform(inputs, crop) for crop in (*CROPS[3], "flip", "random")}

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, key):
        epoch, index = key
        rng, bad = np.random.default_rng((self.seed, epoch, index)), []
        with one_thread():                      # also for the same bits with and without workers
            for _ in range(20):
                try:
                    return {**self.item(index, rng), "bad": bad}
                except ClipError as e:
                    bad.append(str(e))
                    if not self.replace:
                        return {"bad": bad}
                    index = int(rng.integers(len(self)))
        return {"bad": bad}                     # 20 clips in a row: Troubles says so in the training process

    def item(self, index, rng):
        views, shown, heard = [], {}, {}                    # shown and heard: what a window (start, seconds) holds

        def windows(duration):                              # each of them once: the crops of a place share its frames and its sound
            views.extend(self.plan(rng, duration))
            shown.update(dict.fromkeys(v.pictures or v[:2] for v in views if v.video))
            heard.update(dict.fromkeys(v[:2] for v in views if v.audio))
            return list(shown), list(heard)

        clip = read_windows(self.listing.path(index), windows, self.inputs.frames, self.inputs.resize, self.inputs.sample_rate,
                            self.inputs.frame_rate)
        out = {"index": index, "present": torch.tensor([[bool(v.video), bool(v.audio)] for v in views])}
        with torch.random.fork_rng(devices=[]):             # torchvision draws its crops from torch's global stream
            torch.manual_seed(int(rng.integers(2 ** 62)))
            shown = {window: torch.from_numpy(frames).permute(0, 3, 1, 2) for window, frames in zip(shown, clip["video"])}
            out["video"] = [self.crops[v.video](shown[v.pictures or v[:2]]).transpose(0, 1) for v in views if v.video]
        heard = {window: self.mel(torch.from_numpy(wave)) for window, wave in zip(heard, clip["audio"])}
        out["audio"] = [heard[v[:2]] for v in views if v.audio]
        return {**out, **{k: clip[k] for k in ("has_video", "has_audio", "short")}}


def collate(items):
    """A list of items -> a batch: video (sum of Vv, 3, T, H, W), audio (sum of Va, 1, F, T), present (B, V, 2), index,
    has_video, has_audio, short (each (B,)), bad (messages) and lost (how many items hold no clip)."""
    bad = [message for item in items for message in item["bad"]]
    lost, items = sum("index" not in item for item in items), [item for item in items if "index" in item]
    if not items:
        return {"index": torch.zeros(0, dtype=torch.long), "bad": bad, "lost": lost}
    batch = {key: torch.stack([x for item in items for x in item[key]]) for key in ("video", "audio")
             if any(item[key] for item in items)}
    return {**batch, "present": torch.stack([item["present"] for item in items]), "bad": bad, "lost": lost,
            **{key: torch.tensor([item[key] for item in items]) for key in ("index", "has_video", "has_audio", "short")}}


def to_device(batch, device):
    """Move video and audio, and normalise the video there."""
    batch = {**batch, **{k: batch[k].to(device, non_blocking=True) for k in ("video", "audio") if k in batch}}
    return {**batch, "video": normalize_video(batch["video"])} if "video" in batch else batch


def load_clip(path, inputs, start=None):
    """A file -> {"video": (1, 3, T, H, W), "audio": (1, 1, F, T)} as `encoder(**clip)` takes it; a stream that the file lacks or the
    encoder does not take is left out. `start` in seconds (of inputs.frame_rate, where that is set); the middle of the clip if None."""
    inputs = inputs if isinstance(inputs, Inputs) else Inputs(**inputs)

    def middle(duration):
        begin = max(0.0, duration - inputs.seconds) / 2 if start is None else start
        seconds = inputs.video_seconds or inputs.seconds                        # the pictures: the middle of the sound
        return [(begin + max(0.0, min(inputs.seconds, duration - begin) - seconds) / 2, seconds)], [(begin, inputs.seconds)]

    return load_views(path, inputs, middle)


def load_views(path, inputs, plan):
    """load_clip for several views: video (V, 3, T, H, W), audio (V, 1, F, T) of the windows that plan(duration) asks for, as that of
    read_windows."""
    def taken(duration):
        pictures, sounds = plan(duration)
        return pictures if inputs.frames else [], sounds if inputs.n_mels else []

    clip, out = read_windows(path, taken, inputs.frames, inputs.resize, inputs.sample_rate, inputs.frame_rate), {}
    if clip["has_video"] and inputs.frames:
        frames = torch.from_numpy(np.stack(clip["video"])).permute(0, 1, 4, 2, 3)               # (V, T, 3, H, W)
        out["video"] = normalize_video(crop_transform(inputs, "center")(frames).transpose(1, 2))
    if clip["has_audio"] and inputs.n_mels:
        out["audio"] = LogMel(inputs)(torch.from_numpy(np.stack(clip["audio"])))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 3. List a data set
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Listing:
    """The clips of a split: paths relative to root as one numpy bytes array (two million strings would be copied by each
    data worker), labels as one flat array with offsets, since a clip may have none, one or several."""
    name: str
    root: str
    files: np.ndarray
    labels: np.ndarray | None = None        # flat, int16
    offsets: np.ndarray | None = None       # (N + 1,)
    classes: list = field(default_factory=list)
    multilabel: bool = False
    missing: int = 0                        # listed in the csv, not on disk
    fold: np.ndarray | None = None          # (N,) int8: the set is tested fold by fold, each clip is in both splits
    held: np.ndarray | None = None          # (N,) bool: the official validation clips of a training split
    seconds: float | None = None            # length that no clip exceeds, where the set fixes it

    def __len__(self):
        return len(self.files)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.files[i])))

    def clip_labels(self, i):
        """The class indices of clip i."""
        return self.labels[self.offsets[i]:self.offsets[i + 1]]

    def targets(self, indices):
        """(N,) class indices, or (N, C) zeros and ones for a multi-label set."""
        if not self.multilabel:
            return torch.from_numpy(self.labels[self.offsets[np.asarray(indices)]].astype(np.int64))
        out = torch.zeros(len(indices), len(self.classes), dtype=torch.uint8)           # AudioSet-2M in float: 4 GB
        for row, i in enumerate(indices):
            out[row, self.clip_labels(int(i)).astype(np.int64)] = 1
        return out

    def subset(self, indices):
        labels = None if self.labels is None else [self.clip_labels(i) for i in indices]
        fold, held = (None if x is None else x[np.asarray(indices, int)] for x in (self.fold, self.held))
        return make_listing(self.name, self.root, [self.files[i] for i in indices], labels, self.classes, self.multilabel,
                            fold=fold, held=held, seconds=self.seconds)


def make_listing(name, root, files, labels, classes, multilabel=False, missing=0, **more):
    """Pack lists into a Listing; labels: one sequence of class indices for each file, or None; more: fold, held, seconds."""
    flat = offsets = None
    if labels is not None:
        flat = np.array([c for row in labels for c in row], np.int16)
        offsets = np.cumsum([0] + [len(row) for row in labels])
    return Listing(name, str(root), np.array([os.fsencode(f) for f in files], dtype=np.bytes_), flat, offsets, list(classes),
                   multilabel, missing, **more)


def list_clips(name, folder=None, split="train"):
    """The clips of `name` that lie under `folder`. split: 'train', 'test' or 'all'. Raises UserError with what to do."""
    if name not in NAMES:
        raise UserError(f"--data {name}: not a data set; one of {', '.join(NAMES)}")
    if name != "toy" and not folder:
        raise UserError(f"--data {name} needs --data-dir, the folder with the clips and the csv files")
    folder = Path(folder or toy_folder())
    if name == "toy":
        make_toy(folder)
    if not folder.is_dir():
        raise UserError(f"--data-dir {folder}: there is no such folder")
    if split == "all" and name not in ("folder", "esc50"):
        return _join(*(list_clips(name, folder, part) for part in ("train", "test")))
    listing = {"toy": _list_toy, "vggsound": _list_vggsound, "esc50": _list_esc50, "speechcommands": _list_speechcommands,
               "fsd50k": _list_fsd50k, "kinetics400": _list_kinetics400, "ssv2": _list_ssv2,
               "folder": _list_folder}.get(name, _list_audioset)(name, folder, split)
    if len(listing) == 0:
        raise UserError(f"--data {name}: none of the {listing.missing:,} listed clips lies under {folder}" if listing.missing else
                        f"--data {name}: no clip in {folder} for the {split} split")
    return listing


def _join(a, b):
    """Two splits as one listing."""
    labels = None if a.labels is None else [part.clip_labels(i) for part in (a, b) for i in range(len(part))]
    return make_listing(a.name, a.root, [*a.files, *b.files], labels, a.classes, a.multilabel, a.missing + b.missing, seconds=a.seconds)


def describe(listing):
    missing = f", {listing.missing:,} listed but missing" if listing.missing else ""
    return f"{listing.name}: {len(listing):,} clips found{missing}" + (f", {len(listing.classes)} classes" if listing.classes else "")


def _scan(folder):
    """All media files below a folder, as relative paths, sorted so that the order is the same on each machine."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        found += [os.path.relpath(os.path.join(base, f), folder) for f in files if os.path.splitext(f)[1].lower() in MEDIA]
    return sorted(found)


def _stems(folder):
    """Path without its ending -> file, for all media files below a folder: a set's .wav files may have been packed as .flac."""
    return {os.path.splitext(f)[0]: f for f in _scan(folder)}


def _by_name(files):
    """The file's name without its ending -> file, whatever folder it lies in."""
    return {os.path.splitext(os.path.basename(f))[0]: f for f in files}


def _by_id(files):
    """YouTube id -> file, for <id>.flac, <id>_40.000.mp4, <id>_<start>_<end>.mp4 and Y<id>.wav. An id has 11 characters, and
    may itself begin with Y or hold underscores: a name that can be read in two ways is entered under both."""
    index = {}
    for file in files:
        stem = os.path.splitext(os.path.basename(file))[0]
        if len(stem) >= 12 and stem[0] == "Y" and (len(stem) == 12 or stem[12] == "_"):
            index.setdefault(stem[1:12], file)
        if len(stem) == 11 or stem[11:12] == "_":
            index[stem[:11]] = file
    return index


def _by_name_or_id(files, stems):
    """For each of the names <id>_<start>..., without an ending: the file of just this name, else that of its id, else None."""
    exact, index = _by_name(files), _by_id(files)
    return [exact.get(stem) or index.get(stem[:11]) for stem in stems]


WHOLE = {"delimiter": "\x1f", "quoting": csv.QUOTE_NONE}                # form of _rows: each line is one field, whatever is in it


def _rows(path, **form):
    """Rows of a csv (form: of csv.reader), without the comments and the empty ones."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; put the data set's list there")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f, skipinitialspace=True, **form) if row and not row[0].startswith("#")]
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise UserError(f"{path}: cannot be read as a csv in UTF-8 ({e})") from None
    if not rows:
        raise UserError(f"{path}: the list is empty")
    return rows


def read_columns(path, *names):
    """The named columns of a csv with a header, as a list of tuples."""
    header, *rows = _rows(path)
    try:
        places = [header.index(name) for name in names]
        return [tuple(row[i] for i in places) for row in rows]
    except (ValueError, IndexError):
        raise UserError(f"{path}: its header or a row lacks one of the columns {', '.join(names)}; take the data set's own csv") from None


def _list_audioset(name, folder, split):
    lists = {"audioset": ["unbalanced_train"], "audioset-20k": ["balanced_train"],      # AS-2M, AS-20K, both
             "audioset-full": ["unbalanced_train", "balanced_train"]}[name] if split == "train" else ["eval"]
    labels_csv = _rows(folder / "class_labels_indices.csv")[1:]
    try:
        classes, mids = [row[2] for row in labels_csv], {row[1]: int(row[0]) for row in labels_csv}
        rows = [(row[0], [mids[m] for m in row[3].split(",")]) for part in lists for row in _rows(folder / f"{part}_segments.csv")]
    except (IndexError, ValueError):
        raise UserError(f"{folder}: a row of the csv files is not of AudioSet's form (id, start, end, \"mid,mid\")") from None
    except KeyError as e:
        raise UserError(f"{folder}: unknown class {e} in the segments csv; class_labels_indices.csv does not list it") from None
    index = _by_id(_scan(folder))
    rows, listed = [(index[i], c) for i, c in rows if i in index], len(rows)
    return make_listing(name, folder, [f for f, _ in rows], [c for _, c in rows], classes, True, listed - len(rows), seconds=10.0)


def _list_vggsound(name, folder, split):
    if (folder / "vggsound.csv").is_file():
        rows = _rows(folder / "vggsound.csv")
        rows = rows[rows[0][1:2] == ["start"]:]                        # the list has no header, but some copies do
        if any(len(row) != 4 or not row[1].strip().isdigit() for row in rows):
            raise UserError(f"{folder / 'vggsound.csv'}: a row does not have the four fields id, start (whole seconds), label, split")
        names = {row[2] for row in rows}
        rows = [(f"{row[0]}_{int(row[1]):06d}", row[2]) for row in rows if row[3].strip() == split]
    else:
        both = {s: _rows(folder / f"{s}.csv") for s in ("train", "test")}
        if any(len(row) != 2 for part in both.values() for row in part):
            raise UserError(f"{folder}: a row of train.csv or test.csv does not have the two fields file, label")
        names = {row[1] for part in both.values() for row in part}
        rows = [(os.path.splitext(row[0])[0], row[1]) for row in both[split]]
    classes = sorted(names)
    number = {c: i for i, c in enumerate(classes)}
    found = zip(_by_name_or_id(_scan(folder), [stem for stem, _ in rows]), rows)
    found = [(f, number[label]) for f, (_, label) in found if f]
    return make_listing(name, folder, [f for f, _ in found], [[c] for _, c in found], classes, False, len(rows) - len(found), seconds=10.0)


def _list_kinetics400(name, folder, split):
    """train, and as test the validation clips: by lists of either form, or without any by class folders below train/ and val/."""
    parts, places = {"train": ["train"], "test": ["val", "validate", "validation"]}, (folder, folder / "annotations")
    lists = {s: [p for place in places for stem in stems for p in (place / f"{stem}.csv", place / f"{stem}.txt") if p.is_file()]
             for s, stems in parts.items()}
    if not any(lists.values()):
        return _list_class_folders(name, folder, split, [*parts["test"], "test"])
    if not lists[split]:
        there = next(p[0] for p in lists.values() if p)
        raise UserError(f"{there.parent / parts[split][0]}{there.suffix}: there is no such file; put the list of the "
                        f"{'training' if split == 'train' else 'validation'} clips beside {there.name}")
    rows = {s: _kinetics_rows(p[0]) for s, p in lists.items() if p}
    labels = {label for _, part in rows.values() for _, label in part}
    classes, named = sorted(labels), next((p for place in places if (p := place / "classes.txt").is_file()), None)
    if all(map(str.isdecimal, labels)):                                 # whole numbers, from 0: of the lines of classes.txt, if it is there
        labels = {label: int(label) for label in labels}
        classes = [row[0].strip() for row in _rows(named, **WHOLE)] if named else sorted(set(labels.values()))
        if named and max(labels.values()) >= len(classes):
            raise UserError(f"{named}: has {len(classes):,} names, but the lists hold the label {max(labels.values())}; give one name a "
                            "line, the first for the label 0")
        number = labels if named else {label: classes.index(i) for label, i in labels.items()}
    elif any(map(str.isdecimal, labels)):
        raise UserError(f"{lists[split][0]}: some labels are whole numbers and others are not; give all of both lists in the same form")
    else:
        number = {label: i for i, label in enumerate(classes)}
    official, listed = rows[split]
    paths = [f if official else os.path.normpath(f) for f, _ in listed]
    files = _scan(folder) if official or not all(map(os.path.isabs, paths)) else []
    files.sort(key=lambda f: "replacement" in Path(f).parts)            # of one name the last counts: whole copies of broken clips
    if official:
        found = _by_name_or_id(files, paths)
    else:
        files = set(files)
        found = [(os.path.isfile(f) if os.path.isabs(f) else f in files) and f for f in paths]
    found = [(f, number[label]) for f, (_, label) in zip(found, listed) if f]
    return make_listing(name, folder, [f for f, _ in found], [[c] for _, c in found], map(str, classes), False, len(listed) - len(found),
                        seconds=10.0)


def _kinetics_rows(path):
    """A list of Kinetics: (is it the official csv, [(<id>_<start>_<end>, or a path, and the label)])."""
    rows, columns = [row[0] for row in _rows(path, **WHOLE)], ("label", "youtube_id", "time_start", "time_end")
    if set(columns) & set(next(csv.reader(rows[:1], skipinitialspace=True))):
        rows = read_columns(path, *columns)
        if not rows:
            raise UserError(f"{path}: the csv holds nothing but its header; take the data set's own csv")
        try:
            return True, [(f"{clip}_{round(float(start)):06d}_{round(float(end)):06d}", label) for label, clip, start, end in rows]
        except (ValueError, OverflowError):
            raise UserError(f"{path}: a time is not a number of seconds; take the data set's own csv") from None
    rows = [[part.strip('"') for part in row.rsplit(None, 1)] for row in rows]              # quotes: pandas puts them around spaces
    if any([os.path.splitext(part)[1].lower() in MEDIA for part in row] != [True, False] for row in rows):
        raise UserError(f"{path}: neither begins with a header that names {', '.join(columns)}, nor is each row the path of a clip and a "
                        "label without spaces, with a space between them; give a list of one of the two forms")
    return False, rows


def _list_class_folders(name, folder, split, tests):
    """Kinetics without lists: <split>/<class>/<file>, the first of the folders `tests` that is there beside train/."""
    test = next((part for part in tests if (folder / part).is_dir()), None)
    rows = [(f, *Path(f).parts[:2], len(Path(f).parts)) for f in _scan(folder)]
    rows = [row for row in rows if row[1] in ("train", test)]
    classes = sorted({row[2] for row in rows if row[3] > 2})
    if not classes:
        raise UserError(f"{folder}: has neither lists (train.csv and val.csv, here or in annotations/) nor class folders below train/ and "
                        "val/; put the one or the other there")
    rows = [row for row in rows if (row[1] == "train") == (split == "train")]
    found = [(f, classes.index(c)) for f, _, c, depth in rows if depth > 2]
    if len(found) < len(rows):
        print(f"{folder / rows[0][1]}: {len(rows) - len(found):,} files beside the class folders have no label and are left out")
    return make_listing(name, folder, [f for f, _ in found], [[c] for _, c in found], classes, False, seconds=10.0)


def _list_ssv2(name, folder, split):
    """A clip's template without its brackets is its class. test: the validation clips, since the test list has no labels."""
    (labels_json, labels), (path, rows) = (_json(folder, part) for part in ("labels", {"train": "train", "test": "validation"}[split]))
    try:
        number = {template: int(i) for template, i in labels.items()}
        if sorted(number.values()) != list(range(len(number))):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{labels_json}: does not give each template a number of its own, from 0 on; take the data set's own "
                        "list") from None
    try:
        rows = [(str(row["id"]), row["template"].replace("[", "").replace("]", "")) for row in rows]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: is not a list of entries with an id and a template; take the data set's own list") from None
    unknown = next((template for _, template in rows if template not in number), None)
    if unknown is not None:
        raise UserError(f"{path}: unknown template {unknown!r}; {labels_json.name} does not list it")
    files = _by_name(_scan(folder))
    found = [(files[i], number[template]) for i, template in rows if i in files]
    return make_listing(name, folder, [f for f, _ in found], [[c] for _, c in found], sorted(number, key=number.get), False,
                        len(rows) - len(found))


def _json(folder, part):
    """(path, content) of a list of Something-Something v2, by its older or its newer name, in the folder or in labels/."""
    paths = [place / f"{stem}{part}.json" for place in (folder, folder / "labels") for stem in ("something-something-v2-", "")]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise UserError(f"{paths[0]}: there is no such file; put the data set's list there, or as {part}.json into labels/")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as json ({e}); take the data set's own list") from None
    if not content:
        raise UserError(f"{path}: the list is empty; take the data set's own list")
    return path, content


def _list_esc50(name, folder, split):
    """All 2,000 clips, whatever the split: the set is tested fold by fold."""
    path = folder / "meta" / "esc50.csv"
    rows = read_columns(path, "filename", "fold", "target", "category")
    if any(not (row[1].isdecimal() and row[2].isdecimal() and int(row[1]) < 100) for row in rows):
        raise UserError(f"{path}: a fold or target is not a whole number; take the data set's own csv")
    rows = [(os.path.splitext(f)[0], int(fold), int(target), c) for f, fold, target, c in rows]
    targets = dict(sorted((target, c) for _, _, target, c in rows))
    if any(targets[target] != c for _, _, target, c in rows) or len(set(targets.values())) < len(targets):
        raise UserError(f"{path}: a target has two categories, or two targets the same one; take the data set's own csv")
    number, found = {c: i for i, c in enumerate(targets.values())}, _stems(folder / "audio")
    there = [row for row in rows if row[0] in found]
    return make_listing(name, folder, [f"audio/{found[f]}" for f, *_ in there], [[number[c]] for *_, c in there], number, False,
                        len(rows) - len(there), fold=np.array([fold for _, fold, *_ in there], np.int8), seconds=5.0)


def _list_speechcommands(name, folder, split):
    """Two lists name the validation and the test clips, the rest is for training. The train split holds the validation clips too."""
    lists = {}
    for part in ("validation", "testing"):
        path = folder / f"{part}_list.txt"
        lists[part] = [os.path.splitext(row[0])[0] for row in _rows(path)]
        if any(stem.count("/") != 1 for stem in lists[part]):
            raise UserError(f"{path}: a row is not of the form word/file.wav; take the data set's own list")
    found = {stem: f for stem, f in _stems(folder).items() if stem.count("/") == 1 and not stem.startswith("_")}     # _background_noise_
    words = sorted({stem.split("/")[0] for stem in found})
    number, validation, testing = {word: i for i, word in enumerate(words)}, set(lists["validation"]), set(lists["testing"])
    chosen = [stem for stem in found if (stem in testing) == (split == "test")]
    listed = testing if split == "test" else validation
    held = None if split == "test" else np.array([stem in validation for stem in chosen], bool)
    return make_listing(name, folder, [found[stem] for stem in chosen], [[number[stem.split("/")[0]]] for stem in chosen], words, False,
                        len(listed - found.keys()), held=held, seconds=1.0)


def _list_fsd50k(name, folder, split):
    """train: the development clips, of which the list marks those for validation. test: the evaluation clips."""
    part, truth = {"train": "dev", "test": "eval"}[split], folder / "FSD50K.ground_truth"
    try:
        number = {row[1]: int(row[0]) for row in _rows(truth / "vocabulary.csv")}
        if sorted(number.values()) != list(range(len(number))):
            raise ValueError
    except (IndexError, ValueError):
        raise UserError(f"{truth / 'vocabulary.csv'}: a row is not of the form index,label,mid, or an index is missing; take the data "
                        "set's own csv") from None
    rows = read_columns(truth / f"{part}.csv", "fname", "labels", *(["split"] if part == "dev" else []))
    unknown = [c for row in rows for c in row[1].split(",") if c not in number]
    if unknown:
        raise UserError(f"{truth / part}.csv: unknown class {unknown[0]!r}; vocabulary.csv does not list it")
    if any(row[2:] not in ((), ("train",), ("val",)) for row in rows):
        raise UserError(f"{truth / part}.csv: a split is neither train nor val; take the data set's own csv")
    found = _stems(folder / f"FSD50K.{part}_audio")
    there = [row for row in rows if row[0] in found]
    held = np.array([row[2] == "val" for row in there], bool) if part == "dev" else None
    return make_listing(name, folder, [f"FSD50K.{part}_audio/{found[row[0]]}" for row in there],
                        [[number[c] for c in row[1].split(",")] for row in there], sorted(number, key=number.get), True,
                        len(rows) - len(there), held=held)


def _list_folder(name, folder, split):
    """Sub-folders are the labels; train/ and test/ above them are the splits, otherwise one clip in five, by a hash of its
    name, is held out for the test. Without sub-folders there are no labels, and all clips are in both splits. 'all' takes each file,
    and has labels where each has one."""
    files = _scan(folder)
    parts = [Path(f).parts for f in files]
    if files and all(p[0] in ("train", "test") for p in parts):
        keep, parts = [split in (p[0], "all") for p in parts], [p[1:] for p in parts]
        names = sorted({d.name for s in ("train", "test") for d in (folder / s).glob("*") if d.is_dir()})
    else:
        names = sorted({p[0] for p in parts if len(p) > 1})
        keep = [not names or split == "all" or (hashlib.sha256(os.fsencode(f)).digest()[0] % 5 == 0) == (split == "test") for f in files]
    files, parts = [f for f, k in zip(files, keep) if k], [p for p, k in zip(parts, keep) if k]
    loose = sum(len(p) == 1 for p in parts)
    if not names or split == "all" and loose:
        return make_listing(name, folder, files, None, [])
    if loose:
        print(f"{folder}: {loose:,} files beside the sub-folders have no label and are left out")
    number = {c: i for i, c in enumerate(names)}
    rows = [(f, number[p[0]]) for f, p in zip(files, parts) if len(p) > 1]
    return make_listing(name, folder, [f for f, _ in rows], [[c] for _, c in rows], names, False)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Draw batches
# ---------------------------------------------------------------------------------------------------------------------

class Batches(Sampler):
    """Keys (epoch, index) of this rank's (micro-)batches from step `start` to `steps`: a pure function of (seed, step, rank),
    so that a run that goes on replays nothing. `batch` is global; the last, smaller batch of an epoch is dropped."""
    def __init__(self, count, batch, seed, start, steps, rank=0, world=1, accumulate=1):
        if batch > count:
            raise UserError(f"--batch-size {batch} is larger than the set ({count:,} clips); make it smaller")
        if batch % (world * accumulate):
            raise UserError(f"--batch-size {batch} is not divisible by {world} processes x {accumulate} micro-batches")
        self.count, self.batch, self.seed, self.start, self.steps = count, batch, seed, start, steps
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        per_epoch, order, last = self.count // self.batch, None, None
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != last:
                order, last = np.random.default_rng((self.seed, epoch)).permutation(self.count), epoch
            mine = order[place * self.batch:(place + 1) * self.batch][self.rank::self.world]
            for micro in np.split(mine, self.accumulate):
                yield [(epoch, int(i)) for i in micro]


def start_worker(worker):
    """For the data workers: a mel is slower on two threads; and a signal is for the training process, which then ends them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers():
    """End the workers that are left, by SIGKILL since they ignore SIGTERM: Python would wait for them at its exit."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
            worker.join()


def train_loader(clips, batches, workers, pin=False):
    """Batches of a Clips data set, decoded by `workers` processes (0: in this one)."""
    return DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=start_worker, pin_memory=pin)


def eval_loader(listing, inputs, plan, batch, workers, seed=0):
    """All clips of a listing once, in order; what does not decode is left out and stands in `bad`."""
    keys = [[(0, i) for i in range(a, min(a + batch, len(listing)))] for a in range(0, len(listing), batch)]
    return DataLoader(Clips(listing, inputs, plan, seed, replace=False), batch_sampler=keys, num_workers=workers,
                      collate_fn=collate, worker_init_fn=start_worker)


def eval_batches(listing, inputs, plan, batch, workers, troubles, label, seed=0):
    """The batches of eval_loader that hold a clip. Names each bad clip; UserError when no clip at all can be used."""
    used = False
    for b in tqdm(eval_loader(listing, inputs, plan, batch, workers, seed), desc=label, unit="batch"):
        troubles.name(b["bad"])
        if len(b["index"]):
            used |= any(bool(b[f"has_{key}"].any()) for key in ("video", "audio") if key in b)
            yield b
            troubles.count(b)
    for key, lack in (("video", "pictures"), ("audio", "sound")):
        if used and troubles.counts[f"no_{key}"]:
            print(f"{label}: {troubles.counts[f'no_{key}']:,} of {len(listing):,} clips have no {lack}")
    if not used:
        raise UserError(f"{listing.name}: no readable clip among {len(listing):,}; look at the files with python data.py --check")


class Troubles:
    """Counts what was wrong with the clips, names each bad one once, and stops the run when too many are bad."""
    def __init__(self, total, max_share=0.1):
        self.total, self.max_share, self.bad = total, max_share, set()
        self.counts = {"no_video": 0, "no_audio": 0, "short": 0}

    def count(self, batch):
        if len(batch["index"]):
            for key in ("video", "audio"):
                self.counts[f"no_{key}"] += int((~batch[f"has_{key}"]).sum()) if key in batch else 0        # only what was asked for
            self.counts["short"] += int(batch["short"].sum())

    def add(self, batch):
        self.count(batch)
        self.name(batch["bad"])
        if batch["lost"]:
            raise UserError(f"20 clips in a row do not decode, the last: {batch['bad'][-1]}; look at the files with python data.py --check")
        if len(self.bad) > self.max_share * self.total:
            raise UserError(f"{len(self.bad)} of {self.total:,} clips do not decode, more than {self.max_share:.0%}: stopped; "
                            "look at the files with python data.py --check, or raise --max-bad")

    def name(self, messages):
        for message in messages:
            if message not in self.bad:
                self.bad.add(message)
                tqdm.write(f"bad clip: {message}")

    def row(self):
        return {"bad_clips": len(self.bad), **self.counts}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The toy world: sound and sight with common causes, as real H.264 + AAC files
# ---------------------------------------------------------------------------------------------------------------------
# The class is heard as timbre and seen as hue. Size is pitch (small is high). Each bounce is an onset. The shape, the
# background, brightness, place, drift, gain and noise mean nothing; in half of the clips a second object of another hue
# glides by without bouncing or sounding.

TOY = dict(train=1536, test=256, seconds=4.0, fps=10, side=64, sample_rate=16000, seed=0, version=1)
TOY_CLASSES = ("red odd", "orange saw", "green octaves", "teal bell", "blue tremolo", "violet hollow", "pink breath", "lime formant")
TOY_HUES = (0.0, 0.09, 0.36, 0.48, 0.62, 0.74, 0.87, 0.22)


def toy_folder():
    return Path("cache") / f"toy-v{TOY['version']}-seed{TOY['seed']}"


def toy_clip(seed, split, index):
    """One clip of the world: (frames (T, H, W, 3) uint8, wave (samples,) float32, truth dict). A pure function."""
    rng = np.random.default_rng((seed, ("train", "test").index(split), index))
    label = index % len(TOY_CLASSES)
    octave = rng.uniform(0, 2)                                  # the cause that size and pitch share
    radius, pitch = TOY["side"] * 0.27 * 3 ** (-octave / 2), 220 * 2 ** octave
    period, phase = rng.uniform(0.5, 1.2), rng.uniform(0, 1)    # seconds from bounce to bounce
    onsets = (np.arange(-1, 10) + phase) * period
    t = (np.arange(int(TOY["seconds"] * TOY["fps"])) + 0.5) / TOY["fps"]
    u = (t / period - phase) % 1.0
    x = _reflect(rng.uniform(0.2, 0.8) + rng.uniform(-0.12, 0.12) * t)
    floor, height = rng.uniform(0.75, 0.88), rng.uniform(0.3, 0.5)
    y = floor - height * 4 * u * (1 - u)                        # parabolas: on the floor at each onset
    silent = bool(rng.integers(2))
    frames, other_place = _toy_background(rng, t), np.full((len(t), 2), np.nan)
    if silent:
        other = (label + rng.integers(1, len(TOY_CLASSES))) % len(TOY_CLASSES)
        sx, sy = (_reflect(rng.uniform(0.2, 0.8) + rng.uniform(-0.12, 0.12) * t) for _ in range(2))
        frames = _toy_draw(frames, sx, sy, TOY["side"] * 0.27 * 3 ** (-rng.uniform(0, 1)), _toy_color(rng, other), rng.integers(4))
        other_place = np.stack([sx, sy], 1)
    frames = _toy_draw(frames, x, y, radius, _toy_color(rng, label), rng.integers(4))
    frames = frames * np.float32(rng.uniform(0.6, 1.0)) + 6 * rng.standard_normal(frames.shape, np.float32)
    wave = _toy_sound(rng, label, pitch, onsets)
    return (frames.clip(0, 255).astype(np.uint8), wave,
            {"label": label, "octave": octave, "period": period, "silent": silent, "place": np.stack([x, y], 1),
             "silent_place": other_place})


def _reflect(x):
    return 0.15 + 0.7 * np.abs((x - 0.15) / 0.7 % 2 - 1)         # bounces off the side walls


def _toy_color(rng, label):
    h, s, v = (TOY_HUES[label] + rng.normal(0, 0.012)) % 1, rng.uniform(0.7, 1.0), rng.uniform(0.7, 1.0)
    k = (np.array([5, 3, 1]) + h * 6) % 6
    return 255 * (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))              # HSV -> RGB


def _toy_background(rng, t):
    """A smooth field of dull colours that becomes another one every second."""
    coarse = torch.from_numpy(rng.uniform(35, 170, (1, 3, int(TOY["seconds"]) + 1, 3, 3)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(len(t), TOY["side"], TOY["side"]), mode="trilinear", align_corners=True)
    return smooth[0].permute(1, 2, 3, 0).numpy()


def _toy_draw(frames, x, y, radius, color, shape):
    """Paint a disc, square, diamond or ring at (x, y) of each frame, (0, 0) the top left corner and (1, 1) the other."""
    side = frames.shape[1]
    grid, x, y = ((np.arange(side) + 0.5) / side).astype(np.float32), x.astype(np.float32), y.astype(np.float32)
    dx, dy = (grid[None, None, :] - x[:, None, None]) * side, (grid[None, :, None] - y[:, None, None]) * side   # (T, 1, W), (T, H, 1)
    distance = (np.hypot(dx, dy), 1.13 * np.maximum(np.abs(dx), np.abs(dy)), 0.8 * (np.abs(dx) + np.abs(dy)), np.hypot(dx, dy))[shape]
    cover = np.clip(radius - distance + 0.5, 0, 1)
    if shape == 3:
        cover *= np.clip(distance - radius * 0.45 + 0.5, 0, 1)
    return frames + cover[..., None] * (color.astype(np.float32) - frames)


def _toy_sound(rng, label, pitch, onsets):
    """A note at each onset; the class is the timbre: which partials, how loud, and how they move."""
    rate = TOY["sample_rate"]
    t = np.arange(int(TOY["seconds"] * rate)) / rate
    n = np.arange(1, 13)
    ratios, gains = [
        (2 * n - 1, 1.0 / (2 * n - 1)),                                                 # odd partials: a square wave
        (n, 1.0 / n),                                                                   # saw
        (2.0 ** np.arange(5), np.ones(5)),                                              # octaves, equally loud
        (np.array([1, 2.76, 5.40, 8.93]), np.array([1, 0.8, 0.7, 0.5])),                # a bell: partials out of tune
        (n[:4], 1.0 / n[:4]),                                                           # few partials, with tremolo
        (np.array([1, 5, 6, 7]), np.array([1, 0.6, 0.8, 0.6])),                         # hollow: nothing between 1 and 5
        (n[:3], np.array([0.6, 0.3, 0.2])),                                             # breath: tone in noise
        (n, np.exp(-0.5 * ((n * pitch - 1800) / 500) ** 2) + 0.02),                     # a formant that stays at 1,800 Hz
    ][label]
    gains = gains / np.sqrt((gains ** 2).sum())
    decay = rng.uniform(0.12, 0.3)
    wave = np.zeros_like(t)
    for onset in onsets:
        begin = max(0, int(round(onset * rate)))
        if begin >= len(t) or onset < -0.5:
            continue
        s = t[begin:begin + rate] - onset                        # after a second nothing is left of a note
        freqs = pitch * ratios * 2 ** rng.normal(0, 0.01)
        keep = freqs < 0.45 * rate
        note = (gains[keep, None] * np.sin(2 * np.pi * freqs[keep, None] * s + rng.uniform(0, 2 * np.pi, (keep.sum(), 1)))).sum(0)
        if label == 4:
            note = note * (1 + 0.9 * np.sin(2 * np.pi * 14 * s))
        if label == 6:
            note = note + 0.7 * rng.normal(size=len(s))
        wave[begin:begin + rate] += note * np.exp(-s / decay) * np.clip(s / 0.005, 0, 1)
    hiss = np.cumsum(rng.normal(size=len(t))) if rng.integers(2) else rng.normal(size=len(t))     # brown or white
    hiss = (hiss - hiss.mean()) / hiss.std()
    wave = wave / wave.std() + hiss * 10 ** (-rng.uniform(5, 20) / 20)
    return (0.1 * 10 ** (-rng.uniform(0, 12) / 20) * wave).clip(-1, 1).astype(np.float32)


def write_clip(path, frames=None, wave=None, fps=12, sample_rate=16000, bit_rate=64_000):
    """Write an mp4 with H.264 and AAC. frames (T, H, W, 3) uint8, wave (samples,) or (channels, samples) float in [-1, 1]."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        if frames is not None:
            video = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "tune": "fastdecode", "crf": "20",
                                                                           "x264-params": "mbtree=0"})     # mbtree is not repeatable
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
            video.codec_context.thread_count = 1
        if wave is not None:
            wave = np.atleast_2d(wave).astype(np.float32)
            layout = {1: "mono", 2: "stereo"}[len(wave)]
            audio = container.add_stream("aac", rate=sample_rate, layout=layout)
            audio.bit_rate = bit_rate
        for picture in () if frames is None else frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        if frames is not None:
            container.mux(video.encode(None))
        for a in range(0, 0 if wave is None else wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, a:a + 1024]), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = sample_rate, a
            container.mux(audio.encode(frame))
        if wave is not None:
            container.mux(audio.encode(None))


class _ToyWriter(Dataset):
    """Writes clip i when it is asked for it: the data workers are the processes that make the set."""
    def __init__(self, folder, split):
        self.folder, self.split = Path(folder), split

    def __len__(self):
        return TOY[self.split]

    def __getitem__(self, i):
        frames, wave, truth = toy_clip(TOY["seed"], self.split, i)
        write_clip(self.folder / self.split / f"{i:05d}.mp4", frames, wave, TOY["fps"], TOY["sample_rate"])
        return truth


def make_toy(folder):
    """Write the toy clips, once: <split>/<number>.mp4, and truth.npz beside them with label, octave (of pitch and of 1/size),
    period (s between bounces), silent (is there a silent object), place (N, T, 2), the sounding object's x and y in [0, 1] at the
    middle of each frame, and silent_place, the silent one's (NaN without). The folder appears under its name only when it is whole."""
    folder, world = Path(folder), json.dumps(TOY, sort_keys=True)
    if (folder / "world.json").is_file():
        if (folder / "world.json").read_text() != world:
            raise UserError(f"{folder} holds toy clips of another world; remove it or give another --data-dir")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no toy clips; give --data-dir an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=folder.parent))
    try:
        for split in ("train", "test"):
            (part / split).mkdir()
            rows = DataLoader(_ToyWriter(part, split), batch_size=None, num_workers=os.cpu_count() or 1, worker_init_fn=start_worker)
            rows = list(tqdm(rows, desc=f"writing toy clips ({split})", unit="clip"))
            np.savez(part / split / "truth.npz", **{k: np.stack([np.asarray(row[k]) for row in rows]) for k in rows[0]})
        (part / "world.json").write_text(world)
        part.chmod(0o755)                                       # mkdtemp's folder is its owner's alone
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except BaseException:
        try:
            end_workers()                                       # they would go on writing
        finally:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _list_toy(name, folder, split):
    labels = np.load(folder / split / "truth.npz")["label"]
    return make_listing(name, folder, [f"{split}/{i:05d}.mp4" for i in range(len(labels))], labels[:, None], TOY_CLASSES)


# ---------------------------------------------------------------------------------------------------------------------
# 6. What is there, and its statistics
# ---------------------------------------------------------------------------------------------------------------------

class _Check(Dataset):
    """Opens clip i and decodes its middle: (has_video, has_audio, duration, message)."""
    def __init__(self, listing):
        self.listing = listing

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, i):
        try:
            clip = read_windows(self.listing.path(i), lambda duration: ([(duration / 2, 0.1)], [(duration / 2, 0.1)]), 1, 16, 16000)
        except ClipError as e:
            return False, False, 0.0, str(e)
        return clip["has_video"], clip["has_audio"], clip["duration"], ""


def check(listing, workers):
    """Decode a moment of each clip and print what is there: a dict of counts. Names each unreadable clip."""
    counts = {"clips": len(listing), "missing": listing.missing, "unreadable": 0, "no video": 0, "no audio": 0, "seconds": 0.0}
    rows = DataLoader(_Check(listing), batch_size=None, num_workers=workers, worker_init_fn=start_worker)
    for has_video, has_audio, duration, message in tqdm(rows, desc="check", unit="clip"):
        counts["seconds"] += duration
        if message:
            counts["unreadable"] += 1
            tqdm.write(f"unreadable: {message}")
        else:
            counts["no video"] += not has_video
            counts["no audio"] += not has_audio
    print(describe(listing))
    print(f"unreadable {counts['unreadable']:,}, without picture {counts['no video']:,}, without sound {counts['no audio']:,}, "
          f"{counts['seconds'] / 3600:.2f} hours")
    return counts


def mel_stats(listing, inputs, workers, most):
    """(means, stds), each (F,) float64, of the mel's bins over the middle of at most `most` clips, drawn with seed 0; clips without
    sound are left out."""
    some = np.random.default_rng(0).permutation(len(listing))[:most]
    plain = replace(inputs, mel_mean=0.0, mel_std=1.0, columns=inputs.columns if inputs.interpolate else None)
    loader = eval_loader(listing.subset(np.sort(some)), plain, functools.partial(_middle_sound, plain), 1, workers)
    total, square, count, troubles = 0.0, 0.0, 0, Troubles(len(some))
    for batch in tqdm(loader, desc="stats", unit="clip"):
        troubles.name(batch["bad"])
        if len(batch["index"]) and batch["has_audio"].all():
            x = batch["audio"][0, 0].double()                                                   # (F, T)
            total, square, count = total + x.sum(1), square + x.square().sum(1), count + x.shape[1]
    if not count:
        raise UserError(f"{listing.name}: no clip has a sound that decodes, so its mel has no statistics; look at the files with python "
                        "data.py --check")
    return total / count, (square / count - (total / count) ** 2).clamp_min(0).sqrt()


def _middle_sound(inputs, rng, duration):
    """The middle of a clip, no longer than the clip: padding would shift the mean."""
    seconds = max(0.1, min(inputs.seconds, duration)) if duration else inputs.seconds
    return even_views(1, replace(inputs, seconds=seconds), rng, duration, video=False)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="toy", help=", ".join(NAMES))
    add("--data-dir", help="folder with the clips and the csv files (toy: where to write them)")
    add("--split", choices=("train", "test"), default="train")
    add("--check", action="store_true", help="decode a moment of each clip; say what is there, missing, unreadable")
    add("--stats", action="store_true", help="mean and std of the mel in dB, for --mel-mean and --mel-std")
    add("--clips", type=int, default=2000, help="clips that --stats reads at most")
    add("--seconds", type=float, default=Inputs.seconds, help="length of the windows of --stats")
    add("--mels", type=int, default=Inputs.n_mels, help="mel bins of --stats")
    add("--hop", type=int, default=Inputs.hop, help="samples between two mel frames of --stats")
    add("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    check_range("--workers", args.workers, 0, 1024), check_range("--mels", args.mels, 1, 4096), check_range("--hop", args.hop, 1, 10 ** 6)
    check_range("--seconds", args.seconds, 0.1, 3600), check_range("--clips", args.clips, 1, 10 ** 9)
    listing = list_clips(args.data, args.data_dir, args.split)
    if args.check:
        check(listing, args.workers)
    if args.stats:
        mean, std = mel_stats(listing, Inputs(seconds=args.seconds, n_mels=args.mels, hop=args.hop), args.workers, args.clips)
        print(f"--mel-mean {mean.mean():.3f} --mel-std {(std ** 2 + mean ** 2).mean().sub(mean.mean() ** 2).sqrt():.3f}")
    if not (args.check or args.stats):
        print(describe(listing))


if __name__ == "__main__":
    main_guard(main)
