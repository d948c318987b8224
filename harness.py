"""An encoder of ours as two public harnesses ask for one that takes sound; neither is needed here.

HEAR (hearbenchmark.com/hear-api.html) calls load_model, get_timestamp_embeddings and get_scene_embeddings. It
keeps embeddings by the name of this file, so that each checkpoint needs a folder of its own:

    python -m heareval.embeddings.runner harness --model RUN/latest.pt --embeddings-dir RUN/hear

X-ARES (github.com/jimbozhang/xares, "Notes on Encoder implementation") wants a file with one class whose name
ends in Encoder, and keeps embeddings by that name:

    import harness
    class FirstEncoder(harness.SoundEncoder):
        def __init__(self):
            super().__init__("runs/ajepa-audioset-seed0")

Both give mono sound in [-1, 1] at the rate that the encoder states, all of a batch equally long, and take
float32. What is longer than a view of training is cut into chunks of whole patches without overlap, each
heard by itself: its mel has its ends mirrored, as a clip's has, and with `db_max` counts from the loudest of
the chunk. So its embeddings are those that it has alone, and a long sound takes the memory of one chunk. The
last one is shorter, filled up with silence to whole patches. An embedding in time is the mean over the
frequency rows; that of a scene is the clip embedding of ViT.read_out (CLS where there is one, else the mean
of the tokens), averaged over the chunks by their patches. A patch, 160 ms or more, is longer than the 50 ms
that HEAR suggests for its transcription.
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
from common import UserError


class SoundEncoder(nn.Module):
    """Of any checkpoint of ours that takes sound: (B, samples) or (samples,) -> (B, T, D), one for each
    hop_size_in_ms that has begun. UserError where it takes none."""
    def __init__(self, path):
        super().__init__()
        self.encoder = common.load_encoder(path)
        vit = self.encoder.vit
        if "audio" not in vit.grids:
            raise UserError(f"{path}: {self.encoder.method['title']} was trained without sound; give a "
                            "checkpoint that was trained with it")
        self.inputs = inputs = data.Inputs(**self.encoder.inputs)
        self.columns = vit.patch["audio"][1]            # of the mel, in a patch
        view = round(inputs.seconds * inputs.sample_rate)
        patch = self.columns * inputs.hop               # samples
        if inputs.columns and inputs.interpolate:
            patch = self.columns * view / inputs.columns
        self.patches = min(vit.grids["audio"][1], math.ceil(view / patch))      # of a chunk ...
        self.samples = round(self.patches * patch)                              # ... and its samples
        self.sample_rate = self.sampling_rate = inputs.sample_rate
        self.scene_embedding_size = self.timestamp_embedding_size = self.output_dim = self.encoder.dim
        self.hop_size_in_ms = 1000 * self.samples / self.patches / inputs.sample_rate

    @torch.no_grad()
    def encode(self, audio):
        """(B, samples) -> embeddings in time (B, T, D), of the scene (B, D)"""
        if audio.ndim != 2:
            raise UserError(f"sound of shape {tuple(audio.shape)}: give one channel, (sounds, samples)")
        times = []
        scenes = []
        for wave in audio.float().split(self.samples, 1):
            count = max(1, -(-wave.shape[1] * self.patches // self.samples))            # patches, rounded up
            wave = F.pad(wave, (0, round(count * self.samples / self.patches) - wave.shape[1]))
            inputs = replace(self.inputs, columns=count * self.columns)
            mel = data.LogMel(inputs).to(wave.device)(wave)                             # (B, 1, F, T)
            tokens, embedding = self.encoder(audio=mel)
            times.append(tokens.unflatten(1, (-1, count)).mean(1).float())              # (B, count, D)
            scenes.append(count * embedding.float())
        times = torch.cat(times, 1)
        return times, sum(scenes) / times.shape[1]

    def forward(self, audio):
        times, _ = self.encode(audio[None] if audio.ndim == 1 else audio)
        return times


def load_model(model_file_path):
    """The model that the two functions below take. UserError where its checkpoint takes no sound."""
    return SoundEncoder(model_file_path)


def get_timestamp_embeddings(audio, model):
    """(n_sounds, n_samples) -> embeddings (n_sounds, T, D), and the middle of what each was made of in ms
    (n_sounds, T), without a last one whose middle lies behind the end of the sound."""
    embeddings, _ = model.encode(audio)
    frame = 1000 * model.inputs.hop / model.sample_rate         # of the STFT, whose first is centred on 0
    number = torch.arange(embeddings.shape[1], device=audio.device)
    times = (number + 0.5) * model.hop_size_in_ms - frame / 2
    heard = (times < 1000 * audio.shape[1] / model.sample_rate) | (number == 0)
    return embeddings[:, heard], times[heard].expand(len(audio), -1)


def get_scene_embeddings(audio, model):
    """(n_sounds, n_samples) -> (n_sounds, D)"""
    _, scene = model.encode(audio)
    return scene
