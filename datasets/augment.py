"""Augmentation: a training view as another camera and another microphone would have it."""
import math
from dataclasses import dataclass

import torch
import torchaudio.functional as filters
import torchvision.transforms.v2 as transforms

CHANGES = {                             # name: (what it changes, its largest value)
    "jitter": ("video", 1.0),
    "hue": ("video", 0.5),
    "grey": ("video", 1.0),
    "blur": ("video", 1.0),
    "gain": ("audio", 60.0),
    "filter": ("audio", 60.0),
    "noise": ("audio", 100.0),
}


@dataclass(frozen=True)
class Augment:
    """What is changed of each view, by draws from torch's global stream; 0: nothing."""
    # in 8 of 10 views, of brightness, contrast and saturation: factors from 1 - jitter to 1 + jitter
    jitter: float = 0.0
    hue: float = 0.0        # in the same views: of a turn of the colour circle, at most
    grey: float = 0.0       # probability of a view without colours
    blur: float = 0.0       # probability of a blurred view
    gain: float = 0.0       # dB, louder or softer by at most
    filter: float = 0.0     # dB, by which a frequency becomes louder or softer at most
    noise: float = 0.0      # dB from white noise up to the sound, at least; at most 20 more

    @property
    def changes_video(self):
        return any((self.jitter, self.hue, self.grey, self.blur))

    @property
    def changes_audio(self):
        return any((self.gain, self.filter, self.noise))

    def video(self, frames):
        """(3, T, H, W) uint8 -> the same: one change for all frames."""
        # one high picture: the contrast would turn about the mean of each frame, and that of a flash vanish
        high = frames.flatten(1, 2)                                             # (3, T H, W)
        if self.jitter or self.hue:                     # .8: DINO (arXiv 2104.14294), LeJEPA (2511.08544)
            change = transforms.ColorJitter(self.jitter, self.jitter, self.jitter, self.hue)
            high = transforms.RandomApply([change], 0.8)(high)
        if self.grey:
            high = transforms.RandomGrayscale(self.grey)(high)
        frames = high.unflatten(1, frames.shape[1:3])                           # (3, T, H, W)
        if self.blur:
            scale = frames.shape[-1] / 224              # DINO: sigma .1 to 2 of 224 pixels
            reach = math.ceil(2 * 2 * scale)            # two sigma
            change = transforms.GaussianBlur(2 * reach + 1, (0.1 * scale, 2 * scale))
            frames = transforms.RandomApply([change], self.blur)(frames)
        return frames

    def audio(self, wave, rate):
        """(samples,) float32 at `rate` a second -> the same: noise of the place, then filter and gain of the
        microphone. Digital silence stays silence; nothing is clipped."""
        if self.noise:
            there = wave != 0
            power = wave.square().sum() / there.sum().clamp_min(1)
            snr = draw(self.noise, self.noise + 20)
            wave = wave + there * torch.randn_like(wave) * power.sqrt() * 10 ** (-snr / 20)
        if self.filter:
            most = 0.75 * self.filter                   # of each: within the bound, too, where they overlap
            wave = wave * 2 ** -20                      # torchaudio clips what it filters at 1
            wave = filters.bass_biquad(wave, rate, draw(-most, most), draw(100, 300))
            wave = filters.equalizer_biquad(wave, rate, draw(600, 2000), draw(-most, most))
            treble = min(draw(4000, 6000), 0.4 * rate)
            wave = filters.treble_biquad(wave, rate, draw(-most, most), treble)
            wave = wave * 2 ** 20
        if self.gain:
            wave = wave * 10 ** (draw(-self.gain, self.gain) / 20)
        return wave


# differs (toy): the papers' views are cropped and flipped, and no more. A small set of clips that each have
# colours and a microphone of their own is told apart by these alone, and nothing else is learnt
AUGMENT = {
    "paper": Augment(),
    "toy": Augment(jitter=0.6, hue=0.2, grey=0.2, gain=6.0, filter=6.0, noise=10.0),
}


def draw(low, high):
    """A number from low to high."""
    return torch.empty(()).uniform_(low, high).item()
