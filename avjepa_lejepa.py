"""AV-JEPA: Extending LeJEPA to Audio-Visual Self-Supervised Learning (arXiv 2607.15295).

One early-fusion ViT sees audio and video tokens together. The embeddings of audio-only and video-only views
are pulled to the mean of the joint views; SIGReg keeps the embeddings of each view an isotropic Gaussian,
so that nothing collapses. There is no teacher, no predictor, no decoder and there are no negatives; lambda
is the only number of the loss.

What differs from the paper or where it is silent stands at its line: `# differs:` and `# unspecified:`.

    python avjepa_lejepa.py                                                  # toy clips, a laptop, minutes
    python avjepa_lejepa.py --data folder --data-dir clips/ --recipe toy     # your own clips, the small model
    python avjepa_lejepa.py --data vggsound --data-dir vggsound/             # the paper's recipe, one GPU
    torchrun --nproc_per_node=8 avjepa_lejepa.py --data audioset --data-dir audioset/
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        avjepa_lejepa.py --data audioset --data-dir audioset/                # the same line on each node
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import functools
import math

import common
import data
import probe
from common import UserError, ViT, sigreg
from run import Run, make_parser, read_recipe, set_lr

import numpy as np
import torch
import torch.nn as nn

METHOD = dict(
    name="avjepa_lejepa",
    title="AV-JEPA",
    weights="encoder",
    protocol={
        # of probe.py
        # name             frozen       fine-tuned   source
        "linear":          ("linear",    "linear",    "code: LayerNorm with affine on CLS, then linear"),
        "attentive":       ("attentive", "attentive", "code: a query over the tokens, LayerNorm, linear"),
        "both":            (True,        True,        "code: side by side in one run, their losses summed"),
        "linear_lr":       ((1e-3,),     (2e-4,),     "code"),
        "attentive_lr":    ((1e-3,),     (2e-4,),     "code"),
        "encoder_lr":      (0.0,         1e-5,        "code: .05 of the heads'"),
        # unspecified: on matrices only
        "weight_decay":    (0.0,         0.05,        "code: on the encoder, none on the heads"),
        "warmup":          (0.05,        0.05,        "code: share of the steps, linear"),
        "warmup_start":    (0.1,         0.1,         "code: share of the peak"),
        "lr_end":          (1e-7,        1e-7,        "code: of the cosine"),
        "clip_grad":       (1.0,         1.0,         "code: norm of the gradient"),
        "smoothing":       (0.0,         0.1,         "code: where a clip has one label"),
        # unspecified: for a frozen encoder
        "pos_weight":      (True,        True,        "code: of several labels, negatives / positives"),
        # differs: fine-tuning in their job has 4 x 160
        "batch_size":      (512,         64,          "code"),
        "batch_share":     (1.0,         1.0,         "code: of the set"),
        "epochs":          (15,          13,          "code; page: 13 after AudioSet-2M"),
        "epochs_vggsound": (15,          6,           "code; page: 6 after VGGSound alone"),
        "least_steps":     (0,           0,           "code: so many epochs, however small the set"),
        # unspecified: the training views of a frozen encoder, here as in fine-tuning
        "train_views":     (None,        None,        "code: one of a clip, anew in each epoch"),
        "train_starts":    ("random",    "random",    "code"),
        "train_crop":      ("flip",      "flip",      "code: resize 256, centre crop, flip"),
        "views":           (4,           6,           "code: of a test clip"),
        "starts":          ("random",    "random",    "code"),
        "resize":          ("crop",      "crop",      "code: short side 224, then centre crop"),
        "average":         ("logits",    "logits",    "code: over the test views"),
    },
)

# Sources. page: the authors' project page; code: their released code; digest: second-hand, a published
# digest of the paper.
RECIPE = {
    # name           paper         toy             source of the paper's value
    "size":         ("base",      "toy",          "page: ViT-Base"),
    "seconds":      (8.0,         2.0,            "code: length of a view"),
    # differs: over 8 s, by timestamps; theirs step 12 at 25 fps
    "frames":       (16,          8,              "code"),
    "image":        (224,         48,             "code"),
    "resize":       (256,         48,             "code: short side, before the crop"),
    "crop_scale":   ((0.4, 1.0),  (0.7, 1.0),     "code: crop of a local video view (toy: size is a cause)"),
    "tubelet":      ((2, 16, 16), (2, 16, 16),    "code: 8 x 14 x 14 = 1,568 video tokens (page)"),
    "n_mels":       (128,         64,             "code: 16 kHz, n_fft 400, Hamming 400, dB"),
    "hop":          (160,         320,            "code: samples from one mel frame to the next"),
    "mel_patch":    ((16, 16),    (32, 16),       "code: 128 x 801 -> 8 x 50 = 400 audio tokens (page)"),
    # differs (toy): LeVJEPA's (arXiv 2608.27395), a random few of each view's video tokens
    "keep":         (1.0,         0.25,           "share of the video tokens that training runs: all"),
    # differs (toy): LeAVJEPA's
    "absent":       ("zero",      "drop",         "page: absent modality at zero, all tokens run"),
    # of --local masked; LeAVJEPA: the code of the authors' next version (arXiv 2610.06226)
    # the toy's 3 x 3 patches allow .67
    "hide_video":   (0.8,         0.8,            "LeAVJEPA: area of the picture, a block in all frames"),
    # differs: uniform, theirs is its logarithm
    "block_aspect": ((0.61, 1.65), (0.61, 1.65),  "LeAVJEPA: width over height, e^-.5 to e^.5"),
    "hide_audio":   (0.5,         0.5,            "LeAVJEPA: SpecAugment's two bands, each at most"),
    "dropout":      (0.1,         0.0,            "code: embeddings, attention, outputs (Block)"),
    "eps":          (1e-5,        1e-6,           "code: LayerNorms of the blocks"),
    "projector":    ((2048, 2048, 128), (512, 512, 16), "code: BatchNorm and GELU between the layers"),
    "lam":          (0.05,        0.05,           "code"),
    "slices":       (2048,        512,            "code"),
    "batch_size":   (320,         48,             "digest: global, on 8 H200"),
    "epochs":       (57,          None,           "page: AudioSet-2M (VGGSound: 50)"),
    "steps":        (None,        400,            "by the epochs"),
    "lr":           (5e-4,        2e-3,           "code"),
    "lr_end":       (1e-6,        1e-6,           "code"),
    "warmup":       (0.15,        0.15,           "code: share of the steps"),
    "warmup_start": (0.1,         0.0,            "code: share of the peak"),
    "weight_decay": (0.05,        0.05,           "code"),
    "decay_all":    (True,        False,          "code: on all parameters (toy: on matrices)"),
    "clip_grad":    (5.0,         5.0,            "code: norm of the gradient"),
}
# mean and std of the mel in dB (code; toys: data.py --stats); others have AudioSet's
MEL_STATS = {"toy": (-17.9, 17.1), "toy-still": (-19.9, 18.2), "vggsound": (-20.437, 24.496)}


def get_args(argv=None):
    parser, add = make_parser(__doc__, METHOD["name"])
    add("--lam", type=float,
        help="weight of SIGReg, 0 to 1; the invariance has 1 - lam (default: the recipe's)")
    add("--absent", choices=("zero", "drop"),
        help="absent modality: input at zero (paper), or no tokens (LeAVJEPA) (default: the recipe's)")
    add("--keep", type=float, metavar="SHARE",
        help="of the video tokens of each view that training runs, drawn anew (LeVJEPA; default: the "
        "recipe's)")
    locals_ = ("modality", "dropout", "masked", "joint", "audio-only", "none")
    add("--local", choices=locals_, default="modality",
        help="local views: one audio-only and one video-only (paper), each loses one or none at random, "
        "both keep both but lack parts of them, both keep both, both are audio-only, or no local views")
    add("--frames", type=int, help="video frames of a view (default: the recipe's)")
    add("--mel-mean", type=float,
        help="of the mel in dB over the data; see data.py --stats (default: the authors', by data set)")
    add("--mel-std", type=float, help="of the mel in dB (default: as --mel-mean)")
    args = parser.parse_args(argv)
    data.require(args.data, ("video",), "ajepa.py trains on sound alone")
    data.require(args.data, ("audio",), "mjepa.py --terms separate-video trains on pictures alone")
    flags = ("lam", "frames", "absent", "keep", "accumulate")          # SIGReg sees the micro-batch
    recipe = read_recipe(args, METHOD["name"], RECIPE, flags)
    if args.data == "vggsound" and recipe["epochs"] == RECIPE["epochs"][0] and args.epochs is None:
        recipe["epochs"] = 50
    mean, std = MEL_STATS.get(args.data, (data.Inputs.mel_mean, data.Inputs.mel_std))
    recipe["mel_mean"] = mean if args.mel_mean is None else args.mel_mean
    recipe["mel_std"] = std if args.mel_std is None else args.mel_std
    recipe["local"] = args.local
    common.check_range("--lam", recipe["lam"], 0, 1)
    common.check_range("--keep", recipe["keep"], 0.001, 1)
    common.check_range("--frames", recipe["frames"], 1, 4096)
    common.check_range("--mel-mean", recipe["mel_mean"], -1e6, 1e6)
    common.check_range("--mel-std", recipe["mel_std"], 1e-6, 1e6)
    return args, recipe


# ----------------------------------------------------------------------------------------------------------
# Views and masks: a local view lacks a modality; tokens are left out by --keep and in --local masked alone
# ----------------------------------------------------------------------------------------------------------

def plan_views(rng, duration, seconds, local):
    """2 global views (audio and video) and 2 local ones, each with a start of its own; audio and video of a
    view share it."""
    # unspecified: for a clip that cannot fill a view, as one without sound, data.Clips draws another
    def view(crop, video=True, audio=True):
        start = rng.uniform(0, max(0.0, duration - seconds))
        return data.View(start, seconds, crop if video else None, audio)

    views = [view("flip"), view("flip")]
    if local == "modality":
        views.append(view(None, video=False))
        views.append(view("random", audio=False))
    elif local == "dropout":
        for lost in rng.integers(4, size=2).tolist():  # code: a quarter lose the video, a quarter the sound
            views.append(view("random", video=lost != 0, audio=lost != 1))
    elif local in ("joint", "masked"):
        views.append(view("random"))
        views.append(view("random"))
    elif local == "audio-only":
        # differs: their row of that name (LeAVJEPA) has no picture in the global views either
        views.append(view(None, video=False))
        views.append(view(None, video=False))
    return views


def draw_kept(seed, step, places, views, tokens, keep):
    """Which of a video's tokens run in each view: (kept (B, views, K), left out (B, views, N - K)), N =
    tokens. A pure function of (seed, step, place)."""
    count = max(1, round(keep * tokens))
    orders = []
    for place in places:
        rng = np.random.default_rng((seed, step, place))
        orders.append(rng.permuted(np.tile(np.arange(tokens), (views, 1)), axis=1))
    return torch.from_numpy(np.stack(orders)).split((count, tokens - count), 2)


def draw_hidden(seed, step, places, grids, recipe):
    """Which tokens of the two masked local views, the video's first, are not hidden, and which are: (B, 2,
    K), (B, 2, N - K). Of the picture a block is hidden, the same in all frames, of the mel a band of bins and
    one of frames. A pure function of (seed, step, place)."""
    # differs: theirs have another size in each view; here those of a step have one and run together, and the
    # bands are of whole patches, so that their tokens can be dropped
    frames, *picture = grids["video"]
    mel = grids["audio"]
    own = np.random.default_rng((seed, step, 0, 1))    # the step's own; the clips count from 1
    block = common.block_size(own, picture, 2 * (recipe["hide_video"],), recipe["block_aspect"])
    height, width = (round(own.uniform(0, recipe["hide_audio"]) * side) for side in mel)
    hidden = []
    for place in places:
        rng = np.random.default_rng((seed, step, 1 + place, 1))
        for _ in range(2):
            tube = np.tile(common.random_block(rng, picture, block), (frames, 1, 1))
            if recipe["absent"] == "drop":             # of what is not hidden --keep runs a share
                count = max(1, round(recipe["keep"] * (~tube).sum()))
                tube = common.meet_count(rng, tube, tube.size - count)
            bands = common.random_block(rng, mel, (height, mel[1]))
            bands |= common.random_block(rng, mel, (mel[0], width))
            hidden.append(np.concatenate([tube.flatten(), bands.flatten()]))
    stay, hidden = common.split_mask(np.stack(hidden))                          # (2B, K), (2B, N - K)
    return stay.unflatten(0, (-1, 2)), hidden.unflatten(0, (-1, 2))


def draw_visible(seed, step, places, grids, recipe):
    """Which tokens run: [{"v": of draw_kept, where --keep is below 1; "local": of draw_hidden, in --local
    masked}]. places: of the clips in the step's batch over all processes; grids: {"video": (T, H, W),
    "audio": (F, T)}."""
    masks = {}
    if recipe["keep"] < 1:
        views = 2 if recipe["local"] == "none" else 4
        masks["v"] = draw_kept(seed, step, places, views, math.prod(grids["video"]), recipe["keep"])
    if recipe["local"] == "masked":
        masks["local"] = draw_hidden(seed, step, places, grids, recipe)
    return [masks]


def make_inputs(recipe):
    """What data.py prepares, by the recipe."""
    return data.Inputs(
        seconds=recipe["seconds"], frames=recipe["frames"], size=recipe["image"], resize=recipe["resize"],
        crop_scale=recipe["crop_scale"], n_mels=recipe["n_mels"], hop=recipe["hop"],
        mel_mean=recipe["mel_mean"], mel_std=recipe["mel_std"])


def encoder_config(recipe, inputs, checkpoint=False):
    """The arguments of ViT: what a checkpoint keeps, so that load_encoder builds the same."""
    video = dict(shape=(inputs.frames, inputs.size, inputs.size), patch=recipe["tubelet"])
    audio = dict(shape=(inputs.n_mels, inputs.mel_frames), patch=recipe["mel_patch"])
    return dict(size=recipe["size"], video=video, audio=audio, cls=True, absent=recipe["absent"],
                norm_in=True, norm_out=False, dropout=recipe["dropout"], eps=recipe["eps"],
                checkpoint=checkpoint)


def make_model(recipe, inputs, checkpoint=False):
    config = encoder_config(recipe, inputs, checkpoint)
    return AVJEPA(config, recipe["projector"], recipe["lam"], recipe["slices"], recipe["local"])


# ----------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------

class AVJEPA(nn.Module):
    """The encoder, the projector, and the loss of a batch."""
    def __init__(self, config, widths, lam, slices, local):
        super().__init__()
        self.parts = dict(encoder=config, projector=widths)                # what load_encoder builds again
        self.encoder = ViT(**config)
        # unspecified: BatchNorm by the statistics of each process, and in float32 (common.MLP)
        self.projector = common.mlp(self.encoder.dim, widths)
        self.lam = lam
        self.slices = slices
        self.local = local

    def visible(self, kept, video, audio):
        """kept (B, K) of the video's tokens -> the places of all that run (B, K or more): with those of the
        sound. None: all run. video, audio: do the views have them?"""
        every = self.encoder.absent == "zero"
        if kept is None or not (video or every):
            return None
        first = self.encoder.num("video")
        sounds = self.encoder.num("audio") if audio or every else 0
        sound = torch.arange(first, first + sounds, device=kept.device)
        return torch.cat([kept, sound.expand(len(kept), -1)], 1)

    def hide(self, video, audio, visible, stay):
        """Of masked views, stay (b, K): the tokens that are not hidden -> (tokens (b, N, D) or None, the
        places of those that run) for the encoder. Hidden is what is absent: its input at zero, or no
        tokens."""
        if self.encoder.absent == "drop":
            return None, stay
        tokens = self.encoder.embed(video, audio)                               # (b, N, D)
        zeros = self.encoder.embed(torch.zeros_like(video[:1]), torch.zeros_like(audio[:1]))    # (1, N, D)
        shown = torch.zeros_like(tokens[..., :1], dtype=torch.bool).scatter(1, stay.unsqueeze(-1), True)
        return torch.where(shown, tokens, zeros), visible

    def embed(self, video, audio, present, masks):
        """CLS of each view. video (sum of the views that have it, 3, T, H, W), audio (the same, 1, F, T),
        present (B, V, 2), masks: a set of draw_visible -> (B, V, D). Views with the same modalities run
        together, masked ones apart."""
        masked = torch.zeros_like(present[..., :1])
        masked[:, 2:] = "local" in masks
        has = torch.cat([present, masked], 2).flatten(0, 1).cpu()               # (B V, 3)
        place = has.cumsum(0) - 1                      # a view's row in video and in audio
        rows = []
        cls = []
        for v, a, hides in ((1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)):
            group = (has == torch.tensor([v, a, hides])).all(1).nonzero().squeeze(1)
            if len(group):
                given_video = video[place[group, 0]] if v else None
                given_audio = audio[place[group, 1]] if a else None
                kept = masks["v"][0].flatten(0, 1)[group] if "v" in masks else None
                visible = self.visible(kept, v, a)
                tokens = None
                if hides:
                    stay = masks["local"][0].flatten(0, 1)
                    tokens, visible = self.hide(given_video, given_audio, visible, stay)
                rows.append(group)
                cls.append(self.encoder(given_video, given_audio, visible, tokens=tokens)[:, 0])
        order = torch.cat(rows).argsort()
        return torch.cat(cls)[order].unflatten(0, present.shape[:2])

    def project(self, h):
        """(B, V, D) -> (B, V, K), all views at once"""
        return self.projector(h.flatten(0, 1)).unflatten(0, h.shape[:2])

    def forward(self, batch, masks, weight, tick):
        """A batch of data.collate, its masks of draw_visible, its weight in the mean over the step -> (loss,
        what the log shows)."""
        # 1 context: all views through the one encoder
        h = self.embed(batch.get("video"), batch.get("audio"), batch["present"], masks[0])  # (B, V, D)
        # 2 target: none, LeJEPA has no teacher; the loss pulls to the mean of the global views, with gradient
        # 3 predict: none; the projector, once on the globals and once on the locals
        z = [self.project(part) for part in (h[:, :2], h[:, 2:]) if part.shape[1]]
        z = torch.cat(z, 1).transpose(0, 1).float()                             # (V, B, K)
        # 4 loss
        inv = invariance(z)
        reg = torch.stack([sigreg(z_v, tick, self.slices) for z_v in z]).mean()
        loss = weight * ((1 - self.lam) * inv + self.lam * reg)
        shown = {"loss/invariance": weight * inv.detach(), "loss/sigreg": weight * reg.detach(),
                 "embedding/av": z[0].detach()}
        # the online probe's: of one random view, under dropout, so lower than the probe at the end
        clip = h.detach().float()
        shown["clip/av"] = clip[:, 0]                                           # (B, D)
        if self.local in ("modality", "audio-only"):   # what else a local view has differs from clip to clip
            shown["clip/audio"] = clip[:, 2]
        if self.local == "modality":
            shown["clip/video"] = clip[:, 3]
        return loss, shown


# ----------------------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------------------

def invariance(z, num_global=2):
    """Mean over views, batch and dimensions of (mu - z_v)^2, mu the mean of the global views, with gradient.
    z (V, B, K)."""
    mu = z[:num_global].mean(0)                                                 # (B, K)
    return (mu - z).square().mean()


def learning_rate(step, recipe):
    """Linear warm-up, then a cosine to lr_end."""
    warmup = max(1, round(recipe["warmup"] * recipe["steps"]))
    start = recipe["warmup_start"] * recipe["lr"]
    return common.warmup_cosine(step, recipe["steps"], warmup, recipe["lr"], start, recipe["lr_end"])


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

def check_batch(run, recipe):
    """What a run says of its batch and its loss before it begins."""
    clips = run.batch // recipe["accumulate"]
    if clips < 2:                                      # the projector's BatchNorm needs two
        raise UserError(f"--batch-size {recipe['batch_size']}: less than 2 clips for each of {run.world} "
                        f"processes x {recipe['accumulate']} micro-batches; raise it")
    if recipe["lam"] == 0:
        run.say("lambda is 0: nothing keeps the embeddings apart, this run will collapse by design")
    if recipe["accumulate"] > 1:
        run.say(f"SIGReg sees the micro-batch of {clips * run.world} clips, not the batch")


def main(argv=None):
    args, recipe = get_args(argv)
    run = Run(METHOD, args, recipe)
    check_batch(run, recipe)
    inputs = make_inputs(recipe)
    model = run.build(make_model, recipe, inputs, args.checkpoint_activations)
    groups = common.weight_decay_groups(model, recipe["weight_decay"], recipe["decay_all"])
    optimizer = torch.optim.AdamW(groups)
    run.resume(model, optimizer)
    plan = functools.partial(plan_views, seconds=recipe["seconds"], local=args.local)
    draw = functools.partial(draw_visible, args.seed, places=run.places, grids=model.encoder.grids,
                             recipe=recipe)
    run.begin(model, optimizer, inputs, plan, draw)
    for step in run.steps():
        lr = learning_rate(step, recipe)
        set_lr(optimizer, lr)
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip(recipe["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        # EMA: none
        run.log(step, grad_norm=grad_norm, lr=lr)
        run.save(step)
    run.finish(probe.toy_report)


if __name__ == "__main__":
    common.main_guard(main)
