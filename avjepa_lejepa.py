"""AV-JEPA: Extending LeJEPA to Audio-Visual Self-Supervised Learning (arXiv 2607.15295).

One early-fusion ViT sees audio and video tokens together. The embeddings of audio-only and video-only views are pulled to the
mean of the joint views; SIGReg keeps the embeddings of each view an isotropic Gaussian, so that nothing collapses. There is no
teacher, no predictor, no decoder and there are no negatives; lambda is the only number of the loss.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python avjepa_lejepa.py                                                          # toy clips, a laptop, minutes
    python avjepa_lejepa.py --data folder --data-dir clips/ --recipe toy             # your own clips, the small model
    python avjepa_lejepa.py --data vggsound --data-dir vggsound/                     # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 avjepa_lejepa.py --data audioset --data-dir audioset/
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        avjepa_lejepa.py --data audioset --data-dir audioset/                        # the same line on each node
"""
import argparse, contextlib, functools, math, time
from dataclasses import asdict
from pathlib import Path

import common, data, probe                              # before torch: common sets how its threads wait
from common import UserError, ViT, sigreg

import torch
import torch.nn as nn
from tqdm import tqdm

METHOD = "avjepa_lejepa"

# Sources: seed = the authors' page, code = their released code, digest = a third party's reading of the paper.
RECIPE = {
    # name           paper                 toy             source of the paper's value
    "size":         ("base",               "toy",          "seed: ViT-Base"),
    "seconds":      (8.0,                  2.0,            "code: length of a view"),
    "frames":       (16,                   8,              "code"),    # differs: over 8 s, by timestamps; theirs step 12 at 25 fps
    "image":        (224,                  48,             "code"),
    "resize":       (256,                  48,             "code: short side, before the crop"),
    "crop_scale":   ((0.4, 1.0),           (0.7, 1.0),     "code: random resized crop of a local video view (toy: size is a cause)"),
    "tubelet":      ((2, 16, 16),          (2, 16, 16),    "code: 8 x 14 x 14 = 1,568 video tokens (seed)"),
    "n_mels":       (128,                  64,             "code: 16 kHz, n_fft 400, Hamming 400, dB"),
    "hop":          (160,                  320,            "code: samples from one mel frame to the next"),
    "mel_patch":    ((16, 16),             (16, 16),       "code: 128 x 801 -> 8 x 50 = 400 audio tokens (seed)"),
    "dropout":      (0.1,                  0.0,            "code"),    # unspecified: where; here not on attention weights
    "projector":    ((2048, 2048, 128),    (512, 512, 16), "code: BatchNorm and GELU between the layers"),
    "lam":          (0.05,                 0.05,           "code"),
    "slices":       (2048,                 512,            "code"),
    "batch_size":   (320,                  64,             "digest: global, on 8 H200"),
    "epochs":       (57,                   None,           "seed: AudioSet-2M (VGGSound: 50)"),
    "steps":        (None,                 400,            "by the epochs"),
    "lr":           (5e-4,                 2e-3,           "code"),
    "lr_end":       (1e-6,                 1e-6,           "code"),
    "warmup":       (0.15,                 0.15,           "code: share of the steps"),
    "weight_decay": (0.05,                 0.05,           "code"),
    "clip_grad":    (5.0,                  5.0,            "code: norm of the gradient"),
}
PANEL = ("loss", "invariance", "sigreg", "sigreg/N", "embedding_std", "effective_rank", "grad_norm", "lr", "ms_data", "ms_step")
MEL_STATS = {"toy": (-17.9, 17.1), "vggsound": (-20.437, 24.496)}      # dB; others: AudioSet's (code); toy: data.py --stats


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=common.Help)
    common.common_flags(parser, METHOD)
    add = parser.add_argument
    add("--lam", type=float, help="weight of SIGReg, 0 to 1; the invariance has 1 - lam (default: the recipe's)")
    add("--absent", choices=("zero", "drop"), default="zero", help="absent modality: input at zero (paper), or no tokens (LeAVJEPA)")
    add("--local", choices=("modality", "dropout", "joint", "none"), default="modality",
        help="local views: one audio-only and one video-only (paper), each loses one at random, both keep both, or no local views")
    add("--frames", type=int, help="video frames of a view (default: the recipe's)")
    add("--mel-mean", type=float, help="of the mel in dB over the data; see python data.py --stats (default: the authors', by data set)")
    add("--mel-std", type=float)
    args = parser.parse_args(argv)
    recipe = common.read_recipe(args, METHOD, RECIPE, ("lam", "frames", "seconds"))
    if args.data == "vggsound" and recipe["epochs"] == RECIPE["epochs"][0] and args.epochs is None:
        recipe["epochs"] = 50
    mean, std = MEL_STATS.get(args.data, (data.Inputs.mel_mean, data.Inputs.mel_std))
    recipe.update(mel_mean=mean if args.mel_mean is None else args.mel_mean, mel_std=std if args.mel_std is None else args.mel_std,
                  absent=args.absent, local=args.local)
    common.check_range("--lam", recipe["lam"], 0, 1), common.check_range("--frames", recipe["frames"], 1, 4096)
    common.check_range("--mel-std", recipe["mel_std"], 1e-6, 1e6)
    return args, recipe


# ---------------------------------------------------------------------------------------------------------------------
# Views: no masks; a local view lacks a modality
# ---------------------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds, local):
    """2 global views (audio and video) and 2 local ones, each with a start of its own; audio and video of a view share it."""
    # unspecified: a clip that lacks a stream keeps its views, with silence or black in its place; the log counts them
    def view(crop, video=True, audio=True):
        return data.View(rng.uniform(0, max(0.0, duration - seconds)), seconds, crop if video else None, audio)

    views = [view("flip"), view("flip")]
    if local == "modality":
        views += [view(None, video=False), view("random", audio=False)]
    elif local == "dropout":                            # unspecified: a fair coin for each local view of each clip
        views += [view("random", video=heads, audio=not heads) for heads in rng.integers(2, size=2) == 1]
    elif local == "joint":
        views += [view("random"), view("random")]
    return views


def make_inputs(recipe):
    """What data.py prepares, by the recipe."""
    same = {name: recipe[name] for name in ("seconds", "frames", "resize", "crop_scale", "n_mels", "hop", "mel_mean", "mel_std")}
    return data.Inputs(size=recipe["image"], **same)


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same."""
    return dict(size=recipe["size"], cls=True, absent=recipe["absent"], norm_in=True, norm_out=False, dropout=recipe["dropout"],
                video=dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"]),
                audio=dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"]), checkpoint=checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

class AVJEPA(nn.Module):
    """The encoder, the projector, and the loss of a batch."""
    def __init__(self, config, widths, lam, slices):
        super().__init__()
        self.encoder = ViT(**config)
        self.projector = common.mlp(self.encoder.dim, widths)          # unspecified: BatchNorm by the statistics of each process
        self.lam, self.slices = lam, slices

    def embed(self, video, audio, present):
        """CLS of each view. video (sum of the views that have it, 3, T, H, W), audio (the same, 1, F, T), present (B, V, 2) ->
        (B, V, D). Views with the same modalities run together."""
        has = present.flatten(0, 1).cpu()                                           # (B V, 2)
        place, rows, cls = has.cumsum(0) - 1, [], []                                # place: a view's row in video and audio
        for v, a in ((True, True), (False, True), (True, False)):
            group = ((has[:, 0] == v) & (has[:, 1] == a)).nonzero().squeeze(1)
            if len(group):
                rows.append(group)
                cls.append(self.encoder(video[place[group, 0]] if v else None, audio[place[group, 1]] if a else None)[:, 0])
        return torch.cat(cls)[torch.cat(rows).argsort()].unflatten(0, present.shape[:2])

    def forward(self, batch, step):
        """A batch of data.collate -> (loss, what the log shows)."""
        # 1 context: all views through the one encoder
        h = self.embed(batch.get("video"), batch.get("audio"), batch["present"])    # (B, V, D)
        # 2 target: none, LeJEPA has no teacher; the loss pulls to the mean of the global views, with gradient
        # 3 predict: none; the projector, once on the globals and once on the locals
        z = [self.projector(part.flatten(0, 1)).unflatten(0, part.shape[:2]) for part in (h[:, :2], h[:, 2:]) if part.shape[1]]
        z = torch.cat(z, 1).transpose(0, 1).float()                                 # (V, B, K)
        # 4 loss
        inv, reg = invariance(z), torch.stack([sigreg(z_v, step, self.slices) for z_v in z]).mean()
        return (1 - self.lam) * inv + self.lam * reg, {"invariance": inv.detach(), "sigreg": reg.detach(), "z": z[0].detach()}


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------

def invariance(z, num_global=2):
    """Mean over views, batch and dimensions of (mu - z_v)^2, mu the mean of the global views, with gradient. z (V, B, K)."""
    return (z[:num_global].mean(0) - z).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    args, recipe = get_args(argv)
    process = common.start_process(args.device)
    if recipe["batch_size"] < 2 * process.world * args.accumulate:
        raise UserError(f"--batch-size {recipe['batch_size']}: less than 2 clips for each of {process.world} processes x {args.accumulate} "
                        "micro-batches; raise it")
    inputs = make_inputs(recipe)
    config = encoder_config(recipe, inputs, args.checkpoint_activations)
    common.seed_step(args.seed, 0)
    model = AVJEPA(config, recipe["projector"], recipe["lam"], recipe["slices"]).to(process.device)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, recipe["weight_decay"]))    # unspecified: what decays

    if args.data in data.SOUNDS:
        raise UserError(f"--data {args.data} has no pictures; ajepa.py trains on sound alone")
    if args.data in data.SILENT:
        raise UserError(f"--data {args.data} has no sound; mjepa.py --terms separate-video trains on pictures alone")
    if args.data == "toy" and process.main:
        data.list_clips("toy", args.data_dir)                                       # rank 0 writes the clips, the others wait
    process.barrier()
    listing = data.list_clips(args.data, args.data_dir)
    recipe["steps"] = steps = recipe["steps"] or max(1, round(recipe["epochs"] * (len(listing) // recipe["batch_size"])))
    found, start = common.open_run(args, METHOD, recipe, process), 0
    if found:
        common.load_weights(model, found["model"], args.out)
        common.load_optimizer(optimizer, found["optimizer"], args.out)
        start = found["step"]
    workers = common.default_workers(process) if args.workers is None else args.workers
    clips = data.Clips(listing, inputs, functools.partial(plan_views, seconds=recipe["seconds"], local=args.local), args.seed)
    order = data.Batches(len(clips), recipe["batch_size"], args.seed, start, steps, process.rank, process.world, args.accumulate)
    batches = iter(data.train_loader(clips, order, workers, pin=process.device.type == "cuda"))
    if process.main:
        print(data.describe(listing))
        print(f"AV-JEPA, ViT {recipe['size']}, {model.encoder.video.num:,} video + {model.encoder.audio.num:,} audio + 1 tokens, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps:,} steps of {recipe['batch_size']} clips, "
              f"{process.world} x {process.device.type}{' bf16' if process.bf16 else ''} -> {args.out}")
        if start:
            print(f"going on at step {start:,} of {steps:,}")
        if recipe["lam"] == 0:
            print("lambda is 0: nothing keeps the embeddings apart, this run will collapse by design")
        if args.accumulate > 1:
            print(f"SIGReg sees the micro-batch of {recipe['batch_size'] // args.accumulate} clips, not the batch")
    if args.compile:
        model.encoder.compile()

    def save(step):
        if process.main:
            common.save_checkpoint(Path(args.out) / "latest.pt", method=METHOD, step=step, steps=steps, args=vars(args), recipe=recipe,
                                   inputs=asdict(inputs), encoder=config, projector=recipe["projector"], weights="encoder",
                                   model=model.state_dict(), optimizer=optimizer.state_dict())

    wrapped, stop = process.wrap(model), common.StopSignal()
    log, troubles = common.Log(args.out, start, process), data.Troubles(len(listing), args.max_bad)
    began, data_s, logged, collapsed = time.time(), 0.0, start, False
    for step in tqdm(range(start, steps), initial=start, total=steps, desc="train", unit="step", disable=not process.main):
        lr = common.warmup_cosine(step, steps, max(1, round(recipe["warmup"] * steps)), recipe["lr"], end=recipe["lr_end"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(args.accumulate):
            clock = time.time()
            batch = next(batches)
            troubles.add(batch)
            batch = data.to_device(batch, process.device)
            data_s += time.time() - clock
            common.seed_step(args.seed, step * args.accumulate + micro, process.rank)
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                with process.autocast():
                    loss, parts = wrapped(batch, step * args.accumulate + micro)
                (loss / args.accumulate).backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad"])
        if process.any(not math.isfinite(loss.item() + grad_norm.item())):
            raise UserError(f"the loss or its gradient is not finite at step {step}; the last good checkpoint in {args.out} is kept; "
                            "give a new --out and a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            std, rank = common.health(common.gather_ranks(parts["z"]))
            count, seconds = step + 1 - logged, time.time() - began
            log.write({"step": step, "loss": loss.item(), "invariance": parts["invariance"].item(), "sigreg": parts["sigreg"].item(),
                       "sigreg/N": parts["sigreg"].item() / (recipe["batch_size"] / args.accumulate), "embedding_std": std,
                       "effective_rank": rank, "grad_norm": grad_norm.item(), "lr": lr, "ms_data": 1e3 * data_s / count,
                       "ms_step": 1e3 * seconds / count, **troubles.row()}, ("step", *PANEL))
            if std < 0.05 and not collapsed and process.main:
                tqdm.write(f"COLLAPSE at step {step}: the embeddings' std is {std:.3f} (a Gaussian has 1), effective rank {rank:.1f}"
                           + (", by design: lambda is 0" if recipe["lam"] == 0 else "; raise --lam or lower --lr"))
            began, data_s, logged, collapsed = time.time(), 0.0, step + 1, std < 0.05
        stopping = process.any(stop)
        if (step + 1) % args.save_every == 0 or step + 1 == steps or stopping:
            save(step + 1)
        if stopping and step + 1 < steps:
            if process.main:
                tqdm.write(f"stopped after step {step + 1} of {steps}, saved to {args.out}; the same command goes on from there")
            return
    stop.release()
    if process.main:
        common.draw_curves(f"{args.out}/curves.png", {"": common.read_log(args.out)},
                           f"AV-JEPA, {args.data}, seed {args.seed}, {steps} steps")
        print(f"trained {steps:,} steps: {args.out}/latest.pt, log.jsonl, curves.png")
        if args.data == "toy":
            probe.toy_report(args.out, args.data_dir, process, workers)


if __name__ == "__main__":
    common.main_guard(main)
