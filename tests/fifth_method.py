"""Mean-JEPA, a fifth method, of no paper: the shared files do not know it and train it all the same.

Half of the tokens of pictures and sound are hidden. From the mean of what is visible, and from a token's
place, it is predicted what an EMA teacher, which is given everything, represents there.
"""
import copy
import functools
import math

import common
import data
import probe
from common import RunningMean, ViT, gather
from run import Run, make_parser, read_recipe

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METHOD = dict(
    name="fifth_method", title="Mean-JEPA", weights="target_encoder",
    linear=dict(lr=(1e-2, 1e-1), views=2),
    attentive=dict(head="attentive", lr=(1e-2,), views=2),
    finetune=dict(head="linear", lr=(1e-3,), encoder_lr=1e-4, smoothing=0.0, epochs=1, views=1))
RECIPE = {                                             # paper, toy, source
    "size": ("nano", "nano", ""),
    "seconds": (0.8, 0.8, ""),
    "frames": (4, 4, ""),
    "image": (16, 16, ""),
    "tubelet": ((2, 4, 4), (2, 4, 4), ""),
    "n_mels": (16, 16, ""),
    "hop": (400, 400, ""),
    "mel_patch": ((4, 8), (4, 8), ""),
    "batch_size": (4, 4, ""),
    "epochs": (None, None, ""),
    "steps": (4, 4, ""),
    "lr": (1e-3, 1e-3, ""),
    "tau": (0.9, 0.9, ""),
}


def get_args(argv=None):
    parser, _ = make_parser(__doc__, METHOD["name"])
    args = parser.parse_args(argv)
    return args, read_recipe(args, METHOD["name"], RECIPE)


def plan_views(rng, duration, seconds):
    return [data.View(rng.uniform(0, max(0.0, duration - seconds)), seconds, "random", True)]


def draw_masks(seed, step, rank, batch, grids, recipe):
    hidden = []
    for number, grid in enumerate(grids.values()):
        empty = np.zeros(math.prod(grid), bool)
        streams = [np.random.default_rng((seed, step, rank, 1 + clip, number)) for clip in range(batch)]
        hidden.append(np.stack([common.meet_count(rng, empty, empty.size // 2) for rng in streams]))
    return [{"av": common.split_mask(np.concatenate(hidden, 1))}]


def make_inputs(recipe):
    return data.Inputs(seconds=recipe["seconds"], frames=recipe["frames"], size=recipe["image"],
                       resize=recipe["image"], n_mels=recipe["n_mels"], hop=recipe["hop"])


def make_model(recipe, inputs, checkpoint=False):
    video = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"])
    audio = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return MeanJEPA(dict(size=recipe["size"], video=video, audio=audio, checkpoint=checkpoint))


class Predictor(nn.Module):
    def __init__(self, dim, count):
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(count, dim))
        self.head = nn.Linear(dim, dim)

    def forward(self, h, masks, number=0):
        mean = h.mean(1, keepdim=True)                                          # (B, 1, D)
        return {"av": self.head(F.gelu(mean + self.places[masks["av"][1]]))}    # (B, M, D)


class MeanJEPA(nn.Module):
    inputs = {"av": ("video", "audio")}

    def __init__(self, config):
        super().__init__()
        self.parts = dict(encoder=config)
        self.context_encoder = ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.grids = self.context_encoder.grids
        count = sum(self.context_encoder.num(m) for m in self.grids)
        self.predictor = Predictor(self.context_encoder.dim, count)
        self.mean = RunningMean(self.context_encoder.dim)

    def see(self, tokens, masks):
        return self.context_encoder(tokens=tokens, visible=masks["av"][0])

    def forward(self, batch, masks, weight, tick):
        given = {m: batch[m] for m in self.grids}
        h = self.see(self.context_encoder.embed(**given), masks[0])             # (B, C, D)
        with torch.no_grad():
            z = gather(self.target_encoder(**given).float(), masks[0]["av"][1])
            y = F.layer_norm(z, z.shape[-1:])                                   # (B, M, D)
            self.mean.update(y.flatten(0, 1), tick)
        prediction = self.predictor(h, masks[0])["av"].float()
        loss = weight * F.l1_loss(prediction, y)
        nothing = weight * F.l1_loss(self.mean.mean.expand_as(y), y)
        embedding = h.detach().float().mean(1)                                  # (B, D)
        return loss, {"loss/av": loss.detach(), "know_nothing/av": nothing, "embedding/av": embedding}


def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe)
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs, args.checkpoint_activations)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, 0.05), recipe["lr"])
    run.resume(model, optimizer)
    plan = functools.partial(plan_views, seconds=recipe["seconds"])
    draw = functools.partial(draw_masks, args.seed, rank=run.rank, batch=run.batch, grids=model.grids,
                             recipe=recipe)
    run.begin(model, optimizer, inputs, plan, draw)
    for step in run.steps():
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip()
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(model.target_encoder, model.context_encoder, recipe["tau"])
        run.log(step, grad_norm=grad_norm, tau=recipe["tau"], lr=recipe["lr"])
        run.save(step)
    run.finish(probe.toy_report)


if __name__ == "__main__":
    common.main_guard(main)
