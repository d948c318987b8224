"""Views: which stretches of a clip a method asks for, and the clips of a listing as tensors of these."""
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common import one_thread
from datasets.augment import Augment
from datasets.inputs import Inputs, LogMel, crop_transform, normalize_video
from datasets.reader import ClipError, open_clip

CROPS = {1: ("center",), 3: ("first", "center", "last")}        # test crops of a place, in their order
FLAGS = ("has_video", "has_audio", "short")                     # what the reader says of a clip
TRIES = 20                                                      # clips in a row that may fail to decode


class View(NamedTuple):
    """A stretch of a clip and what is taken from it."""
    start: float                    # seconds on the clip's clock
    seconds: float
    video: str | None               # a crop of crop_transform, or None: no picture in this view
    audio: bool
    pictures: tuple | None = None   # (start, seconds) of the pictures, if not those of the sound

    @property
    def sound_window(self):
        return self.start, self.seconds

    @property
    def video_window(self):
        return self.pictures or self.sound_window


def place_views(places, inputs, duration, video=True, audio=True, crops=1):
    """Views at `places`, 0 (as early as can be) to 1 (as late as can be): centre crop, or each place with all
    three of CROPS."""
    room = max(0.0, duration - inputs.seconds)
    video_room = max(0.0, duration - (inputs.video_seconds or inputs.seconds))
    views = []
    for place in places:
        pictures = None
        if inputs.video_seconds:
            pictures = (float(video_room * place), inputs.video_seconds)
        for crop in CROPS[crops]:
            views.append(View(float(room * place), inputs.seconds, crop if video else None, audio, pictures))
    return views


def even_views(count, inputs, rng, duration, video=True, audio=True, crops=1):
    """Test views at `count` places spread evenly over the clip, each with as many crops."""
    places = [0.5] if count == 1 else np.linspace(0, 1, count)
    return place_views(places, inputs, duration, video, audio, crops)


class Clips(Dataset):
    """The clips of a listing as views. Key: (epoch, index). The item is a pure function of (seed, epoch,
    index):

    video (Vv, 3, T, H, W) uint8 and audio (Va, 1, F, T) float32 of the views that have them, present (V, 2)
    bool, decoded (V, 2) bool: was there something in the file to fill them with, index, has_video, has_audio
    (in all views that have them), short, bad, empty. A clip that does not decode is named in `bad`, and with
    `replace` another one is drawn for it; without, the item holds no more. With `replace` another one is
    drawn, too, for a clip with a view in which nothing decoded; `empty` names these.

    plan(rng, duration) -> list of View is the method's policy (at module level: it must pickle). augment:
    what of each view is changed, in training alone.
    """
    def __init__(self, listing, inputs, plan, seed=0, replace=True, augment=None):
        self.listing = listing
        self.inputs = inputs
        self.plan = plan
        self.seed = seed
        self.replace = replace
        self.augment = augment or Augment()
        self.mel = LogMel(inputs) if inputs.n_mels else None
        self.crops = {crop: crop_transform(inputs, crop) for crop in (*CROPS[3], "flip", "random")}

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        bad = []
        empty = []
        with one_thread():                      # also for the same bits with and without workers
            for _ in range(TRIES):
                try:
                    item = self.item(index, rng)
                    lacks = unfilled(item["present"], item["decoded"])
                    if not lacks or not self.replace:
                        return {**item, "bad": bad, "empty": empty}
                    empty.append(f"{self.listing.path(index)}: has no {lacks} for one of its views")
                except ClipError as e:
                    bad.append(str(e))
                if not self.replace:
                    break
                index = int(rng.integers(len(self)))
        return {"bad": bad, "empty": empty}             # TRIES clips in a row: Troubles says so in training

    def item(self, index, rng):
        """The views of one clip, of which each window is decoded once: the crops of a place share its frames
        and its sound."""
        before = rng.bit_generator.state
        views = []

        def windows(duration):
            rng.bit_generator.state = before            # planned again, it is another plan by the same draws
            views[:] = self.plan(rng, duration)
            video_windows = unique(view.video_window for view in views if view.video)
            return video_windows, unique(view.sound_window for view in views if view.audio)

        video_windows, audio_windows, read = read_windows(self.listing.path(index), self.inputs, windows)
        frames = {}
        for window, array in zip(video_windows, read["video"]):
            frames[window] = torch.from_numpy(array).permute(0, 3, 1, 2)                    # (T, 3, H, W)
        waves = {}
        for window, wave in zip(audio_windows, read["audio"]):
            waves[window] = torch.from_numpy(wave)                                          # (samples,)
        seen = dict(zip(video_windows, read["seen"]))
        heard = dict(zip(audio_windows, read["heard"]))
        video = []
        with torch.random.fork_rng(devices=[]):     # torchvision draws from torch's global stream
            # of the CPU alone: torch.manual_seed would note for each GPU where it was called from, 1 ms
            seed = int(rng.integers(2 ** 62))
            torch.default_generator.manual_seed(seed)
            for view in views:
                if view.video:
                    cut = self.crops[view.video](frames[view.video_window])         # (T, 3, size, size)
                    video.append(cut.transpose(0, 1))                               # (3, T, size, size)
            if self.augment.changes_video:              # once all are cut, as they are without it
                video = [self.augment.video(x) for x in video]
            torch.default_generator.manual_seed(seed + 1)       # the same sound, with pictures and without
            audio = self.hear(waves, [view.sound_window for view in views if view.audio])
        present = [[bool(view.video), bool(view.audio)] for view in views]
        decoded = []
        for view in views:
            decoded.append([seen.get(view.video_window, False), heard.get(view.sound_window, False)])
        present = torch.tensor(present)                                                     # (V, 2)
        return {
            "index": index,
            "present": present,
            "decoded": present & torch.tensor(decoded),                                     # (V, 2)
            "video": video,
            "audio": audio,
            **{flag: read[flag] for flag in FLAGS}}

    def hear(self, waves, windows):
        """The mel (1, F, T) of each of the windows of {window: wave}; the same window has one mel, but for
        augmented views, which have each their own."""
        if self.augment.changes_audio:
            rate = self.inputs.sample_rate
            return [self.mel(self.augment.audio(waves[window], rate)) for window in windows]
        mels = {window: self.mel(wave) for window, wave in waves.items()}
        return [mels[window] for window in windows]


def read_windows(path, inputs, plan):
    """(video windows, audio windows, Clip.read of them). plan(duration) -> windows, (start, seconds) each.
    Where nothing decodes in one, the file's length was wrong, or a stream ends before the other: they are
    planned again, as far as all the streams reach."""
    with open_clip(path, inputs.frame_rate) as clip:
        while True:
            video, audio = plan(clip.duration)
            read = clip.read(video, audio, inputs.frames, inputs.resize, inputs.sample_rate)
            if all(read["seen"] + read["heard"]) or not clip.shorten(bool(video), bool(audio)):
                return video, audio, read


def unfilled(present, decoded):
    """What the first view has nothing of in which nothing decoded: pictures, sound, or both; present and
    decoded (V, 2). None where each view has something."""
    for wants, has in zip(present.tolist(), decoded.tolist()):
        if not any(has):
            return " and no ".join(word for word, wanted in zip(("pictures", "sound"), wants) if wanted)
    return None


def unique(values):
    """Each of the values once, in the order in which they first come."""
    return list(dict.fromkeys(values))


def collate(items):
    """A list of items -> a batch: video (sum of Vv, 3, T, H, W), audio (sum of Va, 1, F, T), present and
    decoded (B, V, 2), index, has_video, has_audio, short (each (B,)), bad and empty (messages)
    and lost (how many items hold no clip)."""
    bad = []
    for item in items:
        bad += item["bad"]
    whole = [item for item in items if "index" in item]
    empty = []
    for item in items:
        empty += item["empty"]
    batch = {"bad": bad, "empty": empty, "lost": len(items) - len(whole)}
    if not whole:
        return {**batch, "index": torch.zeros(0, dtype=torch.long)}
    for key in ("video", "audio"):
        views = []
        for item in whole:
            views += item[key]
        if views:
            batch[key] = torch.stack(views)
    for key in ("present", "decoded"):
        batch[key] = torch.stack([item[key] for item in whole])
    for key in ("index", *FLAGS):
        batch[key] = torch.tensor([item[key] for item in whole])
    return batch


def to_device(batch, device):
    """Move video and audio, and normalise the video there."""
    batch = dict(batch)
    for key in ("video", "audio"):
        if key in batch:
            batch[key] = batch[key].to(device, non_blocking=True)
    if "video" in batch:
        batch["video"] = normalize_video(batch["video"])
    return batch


def load_clip(path, inputs, start=None):
    """A file -> {"video": (1, 3, T, H, W), "audio": (1, 1, F, T)} as `encoder(**clip)` takes it; a stream
    that the file lacks or the encoder does not take is left out. `start` in seconds (of inputs.frame_rate,
    where that is set); the middle of the clip if None."""
    inputs = inputs if isinstance(inputs, Inputs) else Inputs(**inputs)

    def middle(duration):
        begin = max(0.0, duration - inputs.seconds) / 2 if start is None else start
        seconds = inputs.video_seconds or inputs.seconds
        heard = min(inputs.seconds, duration - begin)
        shown = begin + max(0.0, heard - seconds) / 2           # the pictures: the middle of the sound
        return [(shown, seconds)], [(begin, inputs.seconds)]

    return load_views(path, inputs, middle)


def load_views(path, inputs, plan):
    """load_clip for several views: video (V, 3, T, H, W), audio (V, 1, F, T) of the windows that the method
    asks for: plan(duration) -> (video windows, audio windows), each a list of (start, seconds)."""
    def taken(duration):
        video, audio = plan(duration)
        return video if inputs.frames else [], audio if inputs.n_mels else []

    _, _, read = read_windows(path, inputs, taken)
    out = {}
    if read["has_video"] and inputs.frames:
        frames = torch.from_numpy(np.stack(read["video"])).permute(0, 1, 4, 2, 3)           # (V, T, 3, H, W)
        out["video"] = normalize_video(crop_transform(inputs, "center")(frames).transpose(1, 2))
    if read["has_audio"] and inputs.n_mels:
        out["audio"] = LogMel(inputs)(torch.from_numpy(np.stack(read["audio"])))
    return out
