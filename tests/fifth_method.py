"""Mean-JEPA, a fifth method, of no paper, which the shared files do not know: the mean of the visible half of
the tokens and a token's place predict what an EMA teacher, which is given everything, represents there."""
import copy
import functools
import math

import common
import data
import probe
from run import Run, make_parser, read_recipe
import numpy as np
import torch
from torch import nn

PROTOCOL = {"linear_lr": ((0.1,), (0.1,), ""), "views": (2, 2, "")}
METHOD = dict(name="fifth_method", title="Mean", weights="target_encoder", protocol=PROTOCOL)
VALUES = dict(size="nano", seconds=0.8, batch_size=4, epochs=None, steps=4, lr=1e-3, tau=0.9)
RECIPE = {name: (value, value, "") for name, value in VALUES.items()}


def get_args(argv=None):
    args = make_parser(__doc__, METHOD["name"])[0].parse_args(argv)
    return args, read_recipe(args, METHOD["name"], RECIPE)


def plan_views(rng, duration, seconds):
    return [data.View(rng.uniform(0, max(0.0, duration - seconds)), seconds, "random", True)]


def draw_masks(seed, step, places, grids, recipe=None):
    hidden = []
    for number, grid in enumerate(grids.values()):
        odd = np.arange(math.prod(grid)) % 2 == 1
        streams = [np.random.default_rng((seed, step, 0, 1 + place, number)) for place in places]
        hidden.append(np.stack([rng.permutation(odd) for rng in streams]))
    return [{"av": common.split_mask(np.concatenate(hidden, 1))}]


def make_inputs(recipe):
    return data.Inputs(seconds=recipe["seconds"], frames=4, size=16, resize=16, n_mels=16, hop=400)


def make_model(recipe, inputs, checkpoint=False):
    video = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=(2, 4, 4))
    audio = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=(4, 8))
    return MeanJEPA(dict(size=recipe["size"], video=video, audio=audio, checkpoint=checkpoint))


class Predictor(nn.Module):
    def __init__(self, dim, count):
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(count, dim))
        self.head = nn.Linear(dim, dim)

    def forward(self, h, masks, number=0):
        return {"av": self.head(h.mean(1, keepdim=True) + self.places[masks["av"][1]])}         # (B, M, D)


class MeanJEPA(nn.Module):
    inputs = {"av": ("video", "audio")}
    def __init__(self, config):
        super().__init__()
        self.parts = dict(encoder=config)
        self.context_encoder = common.ViT(**config)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.grids = self.context_encoder.grids
        self.predictor = Predictor(self.context_encoder.dim, sum(map(math.prod, self.grids.values())))

    def see(self, tokens, masks):
        return self.context_encoder(tokens=tokens, visible=masks["av"][0])

    def forward(self, batch, masks, weight, tick):
        given = {m: batch[m] for m in self.grids}
        h = self.see(self.context_encoder.embed(**given), masks[0])             # (B, C, D)
        y = common.gather(self.target_encoder(**given).float(), masks[0]["av"][1])          # (B, M, D)
        loss = weight * (self.predictor(h, masks[0])["av"].float() - y).abs().mean()
        return loss, {"loss/av": loss.detach(), "embedding/av": h.detach().float().mean(1)}


def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe)
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), recipe["lr"])
    run.resume(model, optimizer)
    draw = functools.partial(draw_masks, args.seed, places=run.places, grids=model.grids)
    run.begin(model, optimizer, inputs, functools.partial(plan_views, seconds=recipe["seconds"]), draw)
    for step in run.steps():
        for batch, masks, weight, tick in run.micro_batches(step):
            loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip()
        optimizer.step()
        optimizer.zero_grad()
        common.ema_update(model.target_encoder, model.context_encoder, recipe["tau"])
        run.log(step, grad_norm=grad_norm, tau=recipe["tau"])
        run.save(step)
    run.finish(probe.toy_report)
