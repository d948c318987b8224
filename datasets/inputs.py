"""The front end: what an encoder takes, and how pictures and sound become that."""
import functools
import math
import warnings
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torchaudio
import torchvision.transforms.v2 as transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Inputs:
    """What the encoder eats: saved with each checkpoint, so that whoever loads it prepares a clip in the same
    way."""
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
    log: str = "db"                 # decibel, floor at -100; or "ln": log(mel + 1e-6); or "db_max": decibel
    #                                 below the clip's loudest, floor at -80
    mel_mean: float | tuple = -17.977       # one (dB, AudioSet, authors' code), or one for each bin ...
    mel_std: float | tuple = 24.468         # ... by python data.py --stats
    columns: int | None = None      # frames of the mel, filled up with silence; None: as the seconds give
    interpolate: bool = False       # squeeze or stretch the mel to `columns` instead
    frame_rate: float | None = None         # the seconds above count frames at this rate (see open_clip)

    @property
    def mel_frames(self):
        return self.columns or round(self.seconds * self.sample_rate) // self.hop + 1

    def at(self, seconds, patch):
        """The same for views of another length, by the clock; the mel padded to whole patches of `patch`
        frames, or, where it is interpolated, with as many frames a second as before."""
        if seconds == self.seconds:
            return self
        other = replace(self, seconds=seconds, columns=None, frame_rate=None)
        frames = other.mel_frames
        if self.interpolate and self.columns:
            frames = seconds / self.seconds * self.columns
        return replace(other, columns=math.ceil(frames / patch) * patch)


class LogMel(torch.nn.Module):
    """(..., samples) -> (..., 1, F, T): mel power, with silence up to inputs.columns (or interpolated to
    them), its log, minus the mean, over the std."""
    def __init__(self, inputs):
        super().__init__()
        self.log = inputs.log
        self.columns = inputs.columns
        self.interpolate = inputs.interpolate
        mean = torch.tensor(inputs.mel_mean).view(-1, 1)                                    # (1 or F, 1)
        std = torch.tensor(inputs.mel_std).view(-1, 1)                                      # (1 or F, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        window = {"hamming": torch.hamming_window, "hann": torch.hann_window}[inputs.window]
        with warnings.catch_warnings():                 # 128 bins of 512 samples: the lowest filter is empty
            warnings.filterwarnings("ignore", message="At least one mel filterbank")
            self.mel = torchaudio.transforms.MelSpectrogram(
                inputs.sample_rate, inputs.n_fft, inputs.win_length, inputs.hop,
                n_mels=inputs.n_mels, window_fn=window, power=2.0)

    def forward(self, wave):
        mel = self.mel(wave)                                                                # (..., F, T)
        if self.columns and not self.interpolate:
            mel = F.pad(mel, (0, self.columns - mel.shape[-1]))         # or cut, if there are more
        if self.log == "ln":
            mel = (mel + 1e-6).log()
        else:
            mel = 10 * mel.clamp_min(1e-10).log10()
        if self.log == "db_max":                        # digital silence lies at the floor, not at the top
            top = mel.amax((-2, -1), keepdim=True)
            mel = torch.where(top > -100, mel - top, -80.0).clamp_min(-80)
        if self.columns and self.interpolate and self.columns != mel.shape[-1]:
            shape = (*mel.shape[:-1], self.columns)
            flat = mel.reshape(1, -1, *mel.shape[-2:])                                      # (1, N, F, T)
            mel = F.interpolate(flat, shape[-2:], mode="bilinear", antialias=True).reshape(shape)
        return ((mel - self.mean) / self.std).unsqueeze(-3)                                 # (..., 1, F, T)


def crop_transform(inputs, crop):
    """Transform for (T, 3, H, W) uint8: 'center' (resize and centre crop), 'first' and 'last' (the same at
    the start and at the end of the longer side), 'flip' ('center', flipped half of the time) or 'random'
    (random resized crop and flip)."""
    if crop == "random":
        steps = [transforms.RandomResizedCrop(inputs.size, scale=inputs.crop_scale, antialias=True)]
    else:
        # differs: V-JEPA's code scales the short side to the very size of the crop for its three crops; here
        # they are as large as 'center'
        steps = [transforms.Resize(inputs.resize, antialias=True)]
        if crop in ("first", "last"):
            steps.append(functools.partial(cut_end, inputs.size, crop))
        else:
            steps.append(transforms.CenterCrop(inputs.size))
    if crop in ("flip", "random"):
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose(steps)


def cut_end(size, crop, video):
    """The square of `size` at the first or the last end of the longer side (of a square: of the width), in
    the middle of the other."""
    height, width = video.shape[-2:]
    top = round((height - size) / 2)
    left = round((width - size) / 2)
    if width >= height:
        left = 0 if crop == "first" else width - size
    else:
        top = 0 if crop == "first" else height - size
    return video[..., top:top + size, left:left + size]


def normalize_video(video):
    """(..., 3, T, H, W) uint8 -> float32, ImageNet mean and std. Runs where the tensor lies, so on the GPU in
    training."""
    mean = torch.tensor(IMAGENET_MEAN, device=video.device).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=video.device).view(3, 1, 1, 1)
    return (video.float() / 255 - mean) / std
