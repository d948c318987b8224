"""What the methods share, each piece to be copied: the ViT and its patchers, masks, EMA, SIGReg, schedules,
health, load_encoder.

Policy (which views, which masks, which loss) stands in the scripts; here are mechanics, on plain numbers
and tensors.

    encoder = common.load_encoder("runs/avjepa_lejepa-toy-seed0/latest.pt")    # frozen, of any of the methods
    tokens, embedding = encoder(video=video, audio=audio)                         # or one of the two alone
"""
import contextlib
import copy
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do. `main_guard` prints it and exits with
    2."""


# ----------------------------------------------------------------------------------------------------------
# 1. The encoder
# ----------------------------------------------------------------------------------------------------------

SIZES = {                              # dim, depth, heads, mlp
    "nano":  (64, 4, 2, 256),          # nano and toy are our own, for a laptop
    "toy":   (128, 4, 4, 512),
    "tiny":  (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base":  (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge":  (1280, 32, 16, 5120),
    "giant": (1408, 40, 22, 6144),
}
CHANNELS = {"video": 3, "audio": 1}    # of an input; tokens stand in this order, the video's first


class Block(nn.Module):
    """Pre-norm transformer block: (B, N, D) -> (B, N, D).

    dropout: on the attention's weights (not on a CPU), on its output, and on the MLP's. checkpoint: keep only
    the input, and compute the rest again in the backward pass."""
    def __init__(self, dim, heads, mlp, dropout=0.0, checkpoint=False, eps=1e-6):
        super().__init__()
        self.heads = heads
        self.checkpoint = checkpoint
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, mlp)
        self.fc2 = nn.Linear(mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, N, D) -> queries, keys, values: (3, B, heads, N, d)"""
        return self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q, k, v, mask):
        """(B, heads, N, d) -> the same; mask (B, 1, N, N), True: attend."""
        if q.device.type == "cpu":     # in float32: there the backward pass in bf16 takes three times as long
            # differs (AV-JEPA): no dropout on the attention's weights, which would take a far slower path
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
        dropout = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)

    def compute(self, x, mask):
        q, k, v = self.split_heads(x)                                                  # each (B, heads, N, d)
        y = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)                       # (B, N, D)
        x = x + self.dropout(self.proj(y))
        y = F.gelu(self.fc1(self.norm2(x)))                                             # (B, N, mlp)
        return x + self.dropout(self.fc2(y))

    def forward(self, x, mask=None):
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(self.compute, x, mask, use_reentrant=False)
        return self.compute(x, mask)


class Positions(nn.Module):
    """The positions of a grid (F, T) of audio or (T, H, W) of video: (N, dim).

    kind: 'factorised' (learned; video: time + space, audio: frequency + time) or 'sincos' (fixed)."""
    def __init__(self, grid, dim, kind="factorised"):
        super().__init__()
        self.grid = tuple(grid)
        self.kind = kind
        if kind == "factorised":
            first, *rest = grid
            self.first = nn.Parameter(torch.randn(first, 1, dim) * 0.02)              # time, or frequency
            self.rest = nn.Parameter(torch.randn(1, math.prod(rest), dim) * 0.02)     # space, or time
        else:
            self.register_buffer("fixed", self.sincos(grid, dim), persistent=False)

    @staticmethod
    def sincos(grid, dim):
        """Sines and cosines (prod(grid), dim) of any number of axes. The channels are shared out evenly
        over the axes, in pairs; what does not divide stays zero (ViT, MAE: 2-D; V-JEPA: 3-D)."""
        per_axis = dim // (2 * len(grid)) * 2
        omega = 10000.0 ** (-torch.arange(per_axis // 2, dtype=torch.float64) / (per_axis / 2))
        parts = []
        for axis, n in enumerate(grid):
            angle = torch.arange(n, dtype=torch.float64)[:, None] * omega               # (n, per_axis / 2)
            shape = [1] * len(grid) + [per_axis]
            shape[axis] = n
            waves = torch.cat([angle.sin(), angle.cos()], 1)                            # (n, per_axis)
            parts.append(waves.view(shape).expand(*grid, per_axis))
        positions = torch.cat(parts, -1).flatten(0, -2).float()
        return F.pad(positions, (0, dim - positions.shape[1]))

    def forward(self, columns=None):
        """columns: length of the last axis, if other than in training: fewer have the first columns, more
        interpolated ones."""
        x = self.fixed if self.kind == "sincos" else (self.first + self.rest).flatten(0, 1)     # (N, dim)
        if columns in (None, self.grid[-1]):
            return x
        x = x.unflatten(0, (-1, self.grid[-1]))                                         # (rows, columns, dim)
        if columns < self.grid[-1]:
            return x[:, :columns].flatten(0, 1)
        x = F.interpolate(x.transpose(1, 2), columns, mode="linear")                    # (rows, dim, columns)
        return x.transpose(1, 2).flatten(0, 1)


class ViT(nn.Module):
    """One transformer over [CLS, video tokens, audio tokens], or over the tokens of one modality alone.

    size: a name of SIZES. video: dict(shape=(T, H, W), patch=(t, h, w)) or None; audio: dict(shape=(F, T),
    patch=(f, t)) or None; what is left over of a mel at the end is cut off. absent: 'zero' runs all tokens
    with the input of the absent modality at zero, 'drop' leaves its tokens out. norm_in: LayerNorm on the
    tokens before the first block; norm_out: after the last. levels: indices of inner blocks whose output
    has a LayerNorm of its own. dropout: on the tokens before the first block, and in each block (Block).
    eps: of the LayerNorms in the blocks.
    """
    def __init__(self, size, video=None, audio=None, cls=False, positions="factorised", absent="drop",
                 norm_in=False, norm_out=True, dropout=0.0, checkpoint=False, levels=(), eps=1e-6):
        super().__init__()
        dim, depth, heads, mlp = SIZES[size]
        self.dim = dim
        self.absent = absent
        self.shape = {}
        self.patch = {}
        self.grids = {}
        stems = nn.ModuleDict()                        # of each modality: its patches, and their positions
        for m, given in {"video": video, "audio": audio}.items():
            if given is None:
                continue
            shape = tuple(given["shape"])
            patch = tuple(given["patch"])
            if m == "video" and any(n % p for n, p in zip(shape, patch)):
                raise ValueError(f"frames, height, width {shape} are not divisible by the tubelet {patch}; "
                                 "change --frames")
            if m == "audio" and any(n < p for n, p in zip(shape, patch)):
                raise ValueError(f"the mel {shape} is smaller than a patch {patch}; raise --seconds")
            conv = nn.Conv3d if m == "video" else nn.Conv2d
            grid = tuple(n // p for n, p in zip(shape, patch))
            patches = conv(CHANNELS[m], dim, patch, stride=patch)
            stems[m] = nn.ModuleDict({"patches": patches, "positions": Positions(grid, dim, positions)})
            self.shape[m] = shape
            self.patch[m] = patch
            self.grids[m] = grid
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if cls else None
        two = len(self.grids) == 2
        self.modality = nn.Parameter(torch.randn(2, 1, dim) * 0.02) if two else None    # modality embedding
        self.stems = stems
        self.norm_in = nn.LayerNorm(dim, eps=1e-6) if norm_in else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(dim, heads, mlp, dropout, checkpoint, eps) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(dim, eps=1e-6) if norm_out else nn.Identity()
        self.norms = nn.ModuleDict({str(level): nn.LayerNorm(dim, eps=1e-6) for level in levels})
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module):
        """ViT's usual start: truncated normal .02 for the matrices, zero biases, LayerNorm at identity. Use
        with .apply()."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def num(self, modality):
        """The number of tokens of a modality, 0 if the encoder does not take it."""
        return math.prod(self.grids[modality]) if modality in self.grids else 0

    def patchify(self, modality, x, batch):
        """An input (B, C, *shape), or None: zeros for `batch` clips -> its tokens (B, N, dim). A mel may be
        longer or shorter than those of training."""
        patches, positions = self.stems[modality].values()
        if x is None:                                  # a patch of zeros is mapped to the bias
            return (patches.bias + positions()).expand(batch, -1, -1)
        shape = tuple(x.shape[2:])
        fixed = shape == self.shape[modality] if modality == "video" else shape[0] == self.shape[modality][0]
        if not fixed or shape[-1] < self.patch[modality][-1]:
            raise ValueError(f"the encoder takes an input of {self.shape[modality]}, not of {shape}; prepare "
                             "it with data.load_clip")
        columns = shape[-1] // self.patch[modality][-1]
        return patches(x).flatten(2).transpose(1, 2) + positions(columns)               # (B, N, dim)

    def embed(self, video=None, audio=None):
        """Tokens before the first block, without CLS: (B, N, dim), video first."""
        batch = len(audio if video is None else video)
        tokens = []
        for number, (m, x) in enumerate({"video": video, "audio": audio}.items()):
            if m not in self.grids:
                if x is not None:
                    raise ValueError(f"this encoder takes no {m}: it was trained without")
                continue
            if x is None and self.absent == "drop":
                continue
            t = self.patchify(m, x, batch)                                              # (B, N of it, dim)
            tokens.append(t if self.modality is None else t + self.modality[number])
        return torch.cat(tokens, 1)

    def start(self, x):
        """Tokens (B, N, D) -> what the first block is given, CLS first: (B, [1 +] N, D)"""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.dropout(self.norm_in(x))

    def forward(self, video=None, audio=None, visible=None, mask=None, layers=None, tokens=None):
        """video (B, 3, T, H, W) and/or audio (B, 1, F, T), or their tokens (B, N, dim) of `embed`; visible
        (B, K): the indices of the tokens to run; mask (B, 1, N, N), True: attend. Returns (B, [1 +] N or K,
        dim), CLS first; with layers (indices of blocks) their outputs side by side, each through its own
        norm or, where it has none, the last one: (B, [1 +] N or K, len(layers) dim)."""
        x = self.embed(video, audio) if tokens is None else tokens                      # (B, N, D)
        if visible is not None:
            x = x.take_along_dim(visible.unsqueeze(-1), 1)                              # (B, K, D)
        x = self.start(x)                                                               # (B, [1 +] K, D)
        outputs = {}
        for number, block in enumerate(self.blocks):
            x = block(x, mask)
            if number in (layers or ()):               # else they would all stay in memory
                outputs[number] = x
        if layers is None:
            return self.norm_out(x)
        # unspecified (A-JEPA, features of several layers): whether and how the inner layers are normed
        norms = [self.norms[str(n)] if str(n) in self.norms else self.norm_out for n in layers]
        return torch.cat([norm(outputs[n]) for n, norm in zip(layers, norms)], -1)

    def attention_weights(self, video=None, audio=None, layer=-1):
        """How much each token (rows) attends to each in block number `layer`: (B, heads, [1 +] N, [1 +] N),
        rows sum to 1. For looking at one layer: the explicit softmax, which the forward pass never
        makes."""
        x = self.start(self.embed(video, audio))
        for block in self.blocks[:layer % len(self.blocks)]:
            x = block(x)
        q, k, _ = self.blocks[layer].split_heads(x).float()                            # each (B, heads, N, d)
        return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)

    def read_out(self, x, video=True, audio=True):
        """The output of `forward` on all tokens -> (tokens of the modalities that were given, clip
        embedding (B, D)): CLS where there is one, else the mean of those tokens."""
        cls = None
        if self.cls is not None:
            cls = x[:, 0]
            x = x[:, 1:]
        if self.absent == "zero" and not (video and audio):                    # both ran: keep what was given
            pictures = self.num("video")
            x = x[:, :pictures] if video else x[:, pictures:]
        return x, x.mean(1) if cls is None else cls


class MLP(nn.Sequential):
    """Layers in float32, also under autocast: in bf16 AV-JEPA's projector puts the gradient of all weights
    off by 7 % at the start of a run, in float32 by 1.4 % (RESULTS.md)."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def mlp(dim, widths, norm=True):
    """Linear layers with GELU, and with `norm` BatchNorm, between them. (N, dim) -> (N, widths[-1])"""
    layers = []
    for width in widths[:-1]:
        layers.append(nn.Linear(dim, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.GELU())
        dim = width
    return MLP(*layers, nn.Linear(dim, widths[-1]))


def gather(x, index):
    """(B, N, D), (B, K) -> (B, K, D)"""
    return x.take_along_dim(index.unsqueeze(-1), 1)


# ----------------------------------------------------------------------------------------------------------
# 2. Masks: geometry only; which blocks a method draws stands in its script
# ----------------------------------------------------------------------------------------------------------

def block_size(rng, grid, scale, aspect):
    """(height, width) of a random block of a (rows, columns) grid. Its area is U[scale] of the grid, its
    width over its height U[aspect] (two draws, not one); a side that the grid cuts hands its excess to the
    other, so that the area stays as drawn."""
    rows, cols = grid
    area = rng.uniform(*scale) * rows * cols
    width_over_height = rng.uniform(*aspect)
    height = min(max(math.sqrt(area / width_over_height), area / cols), rows)
    height = min(max(1, round(height)), rows)
    return height, min(max(1, round(area / height)), cols)


def random_block(rng, grid, size):
    """A block of the size (height, width) at a random place: (rows, columns) bool, True where it lies. Each
    place that fits is equally likely, the last row and column included."""
    top = int(rng.integers(grid[0] - size[0] + 1))
    left = int(rng.integers(grid[1] - size[1] + 1))
    mask = np.zeros(grid, bool)
    mask[top:top + size[0], left:left + size[1]] = True
    return mask


def block_apart(rng, mask, size):
    """As random_block, where the block lies least on what `mask` hides: one of those places, each equally
    likely."""
    height, width = size
    above = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    above[1:, 1:] = mask.cumsum(0).cumsum(1)           # hidden above and left of each corner
    overlap = above[height:, width:] - above[:-height, width:]
    overlap = overlap - above[height:, :-width] + above[:-height, :-width]
    best = np.flatnonzero(overlap == overlap.min())
    top, left = divmod(int(rng.choice(best)), overlap.shape[1])
    block = np.zeros_like(mask)
    block[top:top + height, left:left + width] = True
    return block


def meet_count(rng, mask, count, keep=None):
    """Hide or free random single patches until `count` are hidden: all samples of a batch then have the
    same length, and no part of the grid is cut off to get there. Those of `keep` stay hidden. Returns a new
    mask of the same shape."""
    flat = mask.flatten()
    hidden = int(flat.sum())
    free = flat == (hidden > count)                    # those that may change
    if keep is not None:
        free &= ~keep.flatten()
    change = rng.permutation(np.flatnonzero(free))[:abs(hidden - count)]
    flat[change] = ~flat[change]
    return flat.reshape(mask.shape)


def split_mask(hidden):
    """What is hidden, (B, N) bool, each row the same number -> indices of the visible and of the hidden
    tokens, each in order: (B, C), (B, N - C)."""
    order = torch.from_numpy(np.argsort(hidden, 1, kind="stable"))
    visible = int((~hidden[0]).sum())
    return order[:, :visible], order[:, visible:]


# ----------------------------------------------------------------------------------------------------------
# 3. EMA, SIGReg, schedules, health
# ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def ema_update(target, online, tau):
    """target <- tau target + (1 - tau) online, parameters only; call it after the optimiser step."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


class RunningMean(nn.Module):
    """The running mean (dim,) of targets, over all processes: the guess of a predictor that knows nothing of
    the clip."""
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    @torch.no_grad()
    def update(self, x, step, weight=None):
        """x (N, dim); weight (N,): those whose weight is 0 do not count."""
        rate = max(0.01, 1 / (step + 1))
        weight = x.new_ones(len(x)) if weight is None else weight
        total = torch.cat([(weight[:, None] * x).sum(0), weight.sum()[None]])  # (dim + 1,)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        mean = total[:-1] / total[-1].clamp_min(1e-12)
        self.mean.lerp_(mean, rate * (total[-1] > 0))


@torch.no_grad()
def gather_ranks(x):
    """(N, D) of each process -> (sum of N, D), without gradient."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x):
    """The mean over the processes, with the gradient of this rank's own term: DDP averages the gradients
    afterwards, which makes the sum exact. A plain all_reduce is recorded by autograd on gloo, and the
    gradient is then a world size too small."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return x + (mean / dist.get_world_size() - x.detach())


def sigreg(z, step, num_slices=2048, knots=17, t_max=5.0):
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544): the Epps-Pulley statistic of z
    (N, D) along random directions, against a standard Gaussian. Scalar: ~1.06 for a Gaussian batch of any
    N, .409 N when all embeddings are 0. The directions come from `step`, the same on each rank."""
    # differs: float32 throughout; the authors' matmul runs in bf16 under autocast
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        n = len(z) * (dist.get_world_size() if dist.is_initialized() else 1)
        A = torch.randn(z.shape[1], num_slices, generator=torch.Generator().manual_seed(step)).to(z.device)
        A = A / A.norm(dim=0)                                                         # (D, S) unit directions
        t = torch.linspace(-t_max, t_max, knots, device=z.device)                       # (K,)
        phi = torch.exp(-t ** 2 / 2)                                      # characteristic function of N(0, 1)
        tzA = (z @ A).unsqueeze(-1) * t                                                 # (N, S, K)
        ecf = torch.stack([tzA.cos().mean(0), tzA.sin().mean(0)])             # (2, S, K) real, imaginary part
        ecf = mean_over_ranks(ecf)
        error = (ecf[0] - phi) ** 2 + ecf[1] ** 2                                       # |ecf - phi|^2
        return n * torch.trapezoid(error * phi, t, dim=-1).mean()


def warmup_cosine(step, steps, warmup, peak, start=0.0, end=0.0):
    """Linear from `start` to `peak` in `warmup` steps, then half a cosine from `peak` to `end` at the last
    step."""
    if step < warmup:
        return start + (peak - start) * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


def cosine(step, steps, start, end):
    """Half a cosine from `start` at step 0 to `end` at step steps - 1 (a single step stays at `start`)."""
    progress = min(1.0, step / max(1, steps - 1))
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def health(z):
    """(N, D) -> (mean over dimensions of the std, effective rank): exp of the entropy of the normalised
    singular values of the centred batch (Roy & Vetterli 2007). Both fall when embeddings collapse."""
    z = z.float() - z.float().mean(0)
    s = torch.linalg.svdvals(z.cpu())
    p = s / s.sum().clamp_min(1e-12)
    entropy = -(p * p.clamp_min(1e-12).log()).sum()
    return z.std(0).mean().item(), torch.exp(entropy).item()


def weight_decay_groups(module, weight_decay, everywhere=False):
    """AdamW groups: decay on the weights of linear maps and convolutions, none on biases, norms, positions
    and learned tokens; or, everywhere, on all of them."""
    decayed = []
    spared = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            matrix = name.endswith("weight") and p.ndim >= 2
            (decayed if matrix or everywhere else spared).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


# ----------------------------------------------------------------------------------------------------------
# 4. A checkpoint's encoder
# ----------------------------------------------------------------------------------------------------------

# A checkpoint holds (weights_only=True) its version, method (METHOD of the script), world (processes), steps,
# the state of an online probe, of a fine-tuning `tuned` (what its heads are: finetune.Tuning), and:
KEYS = {
    "step", "args", "recipe",                          # steps done, flags, values of the recipe
    "inputs",                                          # how a clip is prepared: data.Inputs
    "encoder", "projector", "cross",                   # arguments of ViT, widths, widths by name
    "model", "optimizer"}                              # weights by name, AdamW's moments


def checkpoint_file(path):
    """The file of a checkpoint: itself, or the latest of a run's folder."""
    return Path(path) / "latest.pt" if os.path.isdir(path) else Path(path)


def load_checkpoint(path, method=None):
    """The dict of a run's latest.pt, on the CPU. path: the file, or the folder of the run; method: the name
    of the one that it must be of. Raises UserError if it is missing, cut off, or of another method or
    version, or if its entries are not what a run writes."""
    path = checkpoint_file(path)
    if not os.path.isfile(path):                       # nor is a name that is too long
        raise UserError(f"{path}: there is no such checkpoint; give a run's folder or its latest.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["method"]
        if isinstance(found, dict):
            missing = KEYS - content.keys() | {"name", "title", "weights"} - found.keys()
            if missing:
                raise KeyError(f"without {', '.join(sorted(missing))}")
    except Exception as e:                             # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path}: cannot be read as a checkpoint of ours ({type(e).__name__}); it is cut "
                        "off, or something else wrote it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is of version {content.get('version')} of the code, this one is newer and "
                        "names the weights otherwise; use that version, or train again with --fresh")
    if method and found["name"] != method:
        raise UserError(f"{path}: is a checkpoint of {found['name']}, not of {method}; start "
                        f"{found['name']}.py with it")
    wrong = check_content(content) or check_inputs(content["inputs"])
    if wrong:
        raise UserError(f"{path}: {wrong}; another version of the code wrote it (its 'version' names the "
                        "commit), or something else")
    return content


def check_content(content):
    """What is wrong with the entries of a checkpoint, None where nothing is."""
    kinds = {"args": dict, "recipe": dict, "inputs": dict, "encoder": dict, "model": dict, "optimizer": dict,
             "projector": list | tuple | None, "cross": dict | None}
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            return f"its '{key}' is of type {type(content[key]).__name__}"
    for key in ("name", "title", "weights"):
        if not isinstance(content["method"][key], str):
            return f"the '{key}' of its method is {content['method'][key]!r}"
    if not all(map(torch.is_tensor, content["model"].values())):
        return "its 'model' holds something else than weights"
    seed = content["args"].get("seed")
    if type(seed) is not int or seed < 0:
        return f"its seed is {seed!r}"
    step = content["step"]
    steps = content.get("steps", step)
    if type(step) is not int or type(steps) is not int or not 0 <= step <= steps:
        return f"it is at step {step!r} of {steps!r}"
    planned = content["recipe"].get("steps", steps)
    return None if planned == steps else f"it is at step {step} of {steps}, while its recipe has {planned!r}"


def check_inputs(found):
    """What is wrong with the fields of a checkpoint's data.Inputs, None where nothing is."""
    from datasets.inputs import Inputs, LogMel         # here, so that this file can be copied from alone
    for name in sorted({field.name for field in fields(Inputs)} ^ found.keys(), key=str):
        return f"its inputs {'have' if name in found else 'lack'} a field '{name}'"
    inputs = Inputs(**found)
    if inputs.log not in ("db", "ln", "db_max"):
        return f"the 'log' of its inputs is {inputs.log!r}"
    try:
        for name in ("seconds", "video_seconds", "size", "resize", "sample_rate", "frame_rate", "n_fft"):
            if found[name] is not None:
                check_range(name, found[name], 0.01, 10 ** 6)
        if inputs.n_mels:
            check_range("mel_frames", inputs.mel_frames, 1, 10 ** 6)
            mel = LogMel(inputs)
            made = mel(torch.zeros(2 * inputs.n_fft))                           # (1, F, T)
            check_range("mel_std", mel.std.min().item(), 1e-9, 1e9)
            if made.shape[1] != inputs.n_mels or not made.isfinite().all():
                raise ValueError("mel_mean and mel_std do not fit n_mels")
    except Exception as e:                             # a number can be wrong in many ways
        return f"its inputs make no clip {reason(e)}"
    return None


def check_shapes(vit, found):
    """ValueError where the fields of a data.Inputs make other clips than the encoder takes."""
    from datasets.inputs import Inputs
    inputs = Inputs(**found)
    made = {"video": (inputs.frames, inputs.size, inputs.size), "audio": (inputs.n_mels, inputs.mel_frames)}
    for modality, shape in vit.shape.items():
        if shape != made[modality]:
            raise ValueError(f"it takes {shape}, its inputs make {made[modality]}")


def reason(error):
    """An error of any kind as a part of a sentence."""
    return " ".join(f"({type(error).__name__}: {error})".split())


def weights_of(model, name):
    """Of a checkpoint's weights those of one part, by its name."""
    return {key[len(name) + 1:]: x for key, x in model.items() if key.startswith(name + ".")}


def load_weights(module, weights, path):
    """load_state_dict, with a sentence where the names or the shapes are others."""
    own = module.state_dict()
    if weights.keys() != own.keys():
        raise UserError(f"{path}: its weights have other names than the model that was asked for: another "
                        "--size or recipe, or another version of the code (its 'version' names the commit)")
    for name, x in weights.items():
        if x.is_floating_point() != own[name].is_floating_point() or not x.isfinite().all():
            raise UserError(f"{path}: '{name}' in the file holds something else than finite weights, nothing "
                            "goes on from there; give another checkpoint, or train again with --fresh")
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path}: its weights have another shape than the model that was asked for; use the "
                        "same --size and recipe") from None


class FrozenEncoder(nn.Module):
    """What load_encoder returns. Call: video (B, 3, T, H, W) and/or audio (B, 1, F, T), normalised as
    data.py delivers them -> tokens (B, N, D) of the modalities given, video first, and the clip embedding
    (B, D).

    `.config` are the arguments of its ViT, `.inputs` goes into data.load_clip; `.method` is what the method's
    script says of itself, `.args` the flags of the run; `.projector` maps the embedding to where the loss was
    taken, `.cross` holds the predictors from one input's embedding to what `.teacher`, a FrozenEncoder, makes
    of another, by name ("a->v"): None for a method that has none. layers: indices of blocks whose outputs
    stand side by side in D, instead of the last one's alone."""
    def __init__(self, vit, projector, content, layers=None, cross=None, teacher=None):
        super().__init__()
        self.vit = vit
        self.projector = projector
        self.cross = cross
        self.teacher = teacher
        self.layers = layers
        self.dim = vit.dim * (len(layers) if layers else 1)
        self.config = content["encoder"]
        self.inputs = content["inputs"]
        self.method = content["method"]
        self.args = content["args"]
        self.step = content["step"]
        self.eval().requires_grad_(False)

    def forward(self, video=None, audio=None):
        if video is None and audio is None:
            raise UserError("the encoder needs video, audio or both; the clip has neither")
        x = self.vit(video, audio, layers=self.layers)
        return self.vit.read_out(x, video is not None, audio is not None)

    def train(self, mode=True):
        return super().train(False)                    # frozen: no dropout, whoever calls .train() around it


def load_encoder(path, device="cpu", untrained=False, absent=None, layers=None, weights=None, cross=False):
    """The encoder of a checkpoint of any method, frozen. untrained: the same architecture as it was
    initialised, with the run's seed, as a baseline. absent: 'zero' or 'drop', if other than it was trained
    with. layers: of FrozenEncoder. weights: 'context' or 'target', if other than the one that the method
    evaluates. cross: with .cross and .teacher, where the method has them."""
    content = load_checkpoint(path)
    method = content["method"]
    model = content["model"]
    weights = f"{weights}_encoder" if weights else method["weights"]
    if not any(name.startswith(weights + ".") for name in model):
        raise UserError(f"{path}: {method['title']} has no {weights.replace('_', ' ')} of its own; leave "
                        "--encoder out")
    projector = predictors = teacher = None
    try:
        with torch.random.fork_rng(devices=[]):        # the caller's random stream stays as it was
            seed_step(content["args"]["seed"], 0)
            vit = ViT(**content["encoder"])
            check_shapes(vit, content["inputs"])
            if content["projector"] and not layers:
                projector = mlp(vit.dim, content["projector"])
            if content["cross"] and cross and not layers:
                predictors = nn.ModuleDict()
                for name, widths in content["cross"].items():
                    predictors[name] = mlp(vit.dim, widths, norm=False)
                teacher = copy.deepcopy(vit)
    except Exception as e:                             # what is said of a network can be wrong in many ways
        raise UserError(f"{path}: its 'encoder' or 'projector' describes no network of this version of the "
                        f"code {reason(e)}; its 'version' names the commit that wrote it") from None
    vit.absent = absent or vit.absent
    for layer in layers or ():
        check_range("--layers", layer, 0, len(vit.blocks) - 1)
    parts = {weights: vit, "projector": projector, "cross": predictors}
    loaded = [*parts.items(), ("target_encoder", teacher)]
    for name, module in loaded:
        if module is not None and not untrained:
            load_weights(module, weights_of(model, name), path)
    if teacher is not None:
        teacher = FrozenEncoder(teacher, None, content)
    return FrozenEncoder(vit, projector, content, layers, predictors, teacher).to(device)


# ----------------------------------------------------------------------------------------------------------
# 5. A command
# ----------------------------------------------------------------------------------------------------------

def seed_step(seed, step, rank=0):
    """Set torch's random stream (dropout, initial weights) as a pure function of (seed, step, rank): resume
    replays nothing."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> 1))


@contextlib.contextmanager
def one_thread():
    """Small operations are done sooner by one thread than shared out (a linear head of the toy: in a third
    of the time)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_range(name, value, low, high):
    """A flag's value, or a UserError that names its range."""
    if value is None or not low <= value <= high:
        raise UserError(f"{name} {value} is out of range: from {low} to {high}")
    return value


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handle_signals(handler):
    """Give the signals that end a command to handler(number, frame), but for those that are ignored (SIGHUP
    under nohup). Returns {number: the handler before}; in another thread than the main one nothing
    changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    return before


@contextlib.contextmanager
def signals_held():
    """Signals come after the block: in a fork or a __del__ Python swallows what their handlers raise."""
    came = []
    before = handle_signals(lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def end_workers():
    """End the data workers that are left, by SIGKILL since they ignore SIGTERM: Python would wait for them
    at its exit."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
            worker.join()


def main_guard(main):
    """Run a script's main(): bad input ends with its sentence and exit code 2, a signal that nobody handles
    without a traceback. Signals that come later are ignored: the command ends anyway."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # an ASCII terminal, and names that are no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            handle_signals(lambda number, frame: sys.exit(128 + number))
            main()
        finally:
            handle_signals(lambda number, frame: None)
    except SystemExit as e:
        code = e.code
    except UserError as e:
        with contextlib.suppress(OSError):             # a terminal that was closed
            print(f"error: {e}", file=sys.stderr)
        code = 2
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()                          # holds main's frame: the group would hang, see below
        end_workers()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    finally:
        end_workers()
        # by now main's frame is gone, and DDP with it: a group that a model still holds hangs here
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        sys.exit(code)
