"""What the four methods share: the transformer and its patchers, masks, EMA, SIGReg, schedules, and the run-time plumbing.

Policy (which views, which masks, which loss) stands in the scripts; here are mechanics, on plain numbers and tensors.
From top to bottom: encoder, masks, EMA, SIGReg, schedules, health, processes, checkpoints, log, flags.

    encoder = common.load_encoder("runs/avjepa_lejepa-toy-seed0/latest.pt")       # frozen, of any of the methods
    tokens, embedding = encoder(video=video, audio=audio)                         # or one of the two alone
"""
import argparse, contextlib, copy, datetime, json, math, os, signal, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: spinning threads rob the data workers (toy: 560, not 780 ms a step)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

__version__ = "0.1.0"


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and what to do. `main_guard` prints it and exits with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. The encoder
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {  # name: (dim, depth, heads, mlp); nano and toy are our own, for a laptop
    "nano": (64, 4, 2, 256), "toy": (128, 4, 4, 512), "tiny": (192, 12, 3, 768), "small": (384, 12, 6, 1536), "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096), "huge": (1280, 32, 16, 5120), "giant": (1408, 40, 22, 6144)}


def attention(q, k, v, mask=None):
    """(B, heads, N, d) -> the same; mask (B, 1, N, N), True: attend. On a CPU in float32: there the backward pass in bf16 takes three
    times as long."""
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


class Block(nn.Module):
    """Pre-norm transformer block. (B, N, D) -> (B, N, D)"""
    def __init__(self, dim, heads, mlp, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)
        self.dropout = nn.Dropout(dropout)

    def split(self, x):
        """(B, N, D) -> queries, keys, values: (3, B, heads, N, d)"""
        return self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, mask=None):
        q, k, v = self.split(x)                                                                     # each (B, heads, N, d)
        y = attention(q, k, v, mask).transpose(1, 2).flatten(2)                                     # (B, N, D)
        x = x + self.dropout(self.proj(y))
        return x + self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(x))))))


class Transformer(nn.Module):
    """A stack of blocks. checkpoint: keep only the input of each block, and compute it again in the backward pass."""
    def __init__(self, dim, depth, heads, mlp, dropout=0.0, checkpoint=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, mlp, dropout) for _ in range(depth))
        self.checkpoint = checkpoint

    def forward(self, x, mask=None, layers=None):
        """(B, N, D) -> the same; or, with layers (indices of blocks), the outputs of those, a list."""
        outputs = {}
        for number, block in enumerate(self.blocks):
            x = recompute(block, x, mask, use_reentrant=False) if self.checkpoint and torch.is_grad_enabled() else block(x, mask)
            if number in (layers or ()):                # else they would all stay in memory
                outputs[number] = x
        return x if layers is None else [outputs[layer] for layer in layers]


def init_weights(module):
    """ViT's usual start: truncated normal .02 for the matrices, zero biases, LayerNorm at identity. Use with .apply()."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos(grid, dim):
    """Fixed sine-cosine positions of a grid of any number of axes: (prod(grid), dim). The channels are shared out evenly
    over the axes, in pairs; what does not divide stays zero (ViT, MAE: 2-D; V-JEPA: 3-D)."""
    per = dim // (2 * len(grid)) * 2
    omega = 10000.0 ** (-torch.arange(per // 2, dtype=torch.float64) / (per / 2))
    parts = []
    for axis, n in enumerate(grid):
        angle = torch.arange(n, dtype=torch.float64)[:, None] * omega                               # (n, per / 2)
        shape = [n if a == axis else 1 for a in range(len(grid))] + [per]
        parts.append(torch.cat([angle.sin(), angle.cos()], 1).view(shape).expand(*grid, per))
    out = torch.cat(parts, -1).flatten(0, -2).float()
    return F.pad(out, (0, dim - out.shape[1]))


class Positions(nn.Module):
    """The positions of a grid (F, T) of audio or (T, H, W) of video: (N, dim).

    kind: 'factorised' (learned; video: time + space, audio: frequency + time) or 'sincos' (fixed)."""
    def __init__(self, grid, dim, kind="factorised"):
        super().__init__()
        self.grid, self.kind = tuple(grid), kind
        if kind == "factorised":
            first, *rest = grid
            self.first = nn.Parameter(torch.randn(first, 1, dim) * 0.02)              # video time, or audio frequency
            self.rest = nn.Parameter(torch.randn(1, math.prod(rest), dim) * 0.02)     # video space, or audio time
        else:
            self.register_buffer("fixed", sincos(grid, dim), persistent=False)

    def forward(self, columns=None):
        """columns: length of the last axis, if other than in training: fewer have the first columns, more interpolated ones."""
        x = (self.first + self.rest).flatten(0, 1) if self.kind == "factorised" else self.fixed           # (N, dim)
        if columns in (None, self.grid[-1]):
            return x
        x = x.unflatten(0, (-1, self.grid[-1]))                                                           # (rows, columns, dim)
        if columns < self.grid[-1]:
            return x[:, :columns].flatten(0, 1)
        return F.interpolate(x.transpose(1, 2), columns, mode="linear").transpose(1, 2).flatten(0, 1)


class Patches(nn.Module):
    """Cut a signal into patches, map each to dim, add its position. (B, C, *shape) -> (B, N, dim)

    shape: (F, T) of a spectrogram or (T, H, W) of a video; patch: as many sides; what is left over at the end is cut off.
    """
    def __init__(self, channels, shape, patch, dim, positions="factorised"):
        super().__init__()
        self.shape, self.patch = tuple(shape), tuple(patch)
        self.grid = tuple(n // p for n, p in zip(shape, patch))
        conv = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.proj = conv(channels, dim, self.patch, stride=self.patch)
        self.positions = Positions(self.grid, dim, positions)

    @property
    def num(self):
        return math.prod(self.grid)

    def forward(self, x, batch=None):
        """x None: the tokens of an input of zeros (a patch of zeros is mapped to the bias), for `batch` samples. A mel may be longer
        or shorter than those of training."""
        if x is None:
            return (self.proj.bias + self.positions()).expand(batch, -1, -1)
        shape = tuple(x.shape[2:])
        if len(self.patch) == 3 and shape != self.shape or shape[0] != self.shape[0] or shape[-1] < self.patch[-1]:
            raise UserError(f"the encoder takes an input of {self.shape}, not of {shape}; prepare it with data.load_clip")
        return self.proj(x).flatten(2).transpose(1, 2) + self.positions(shape[-1] // self.patch[-1])      # (B, N, dim)


class ViT(nn.Module):
    """One transformer over [CLS, video tokens, audio tokens], or over the tokens of one modality alone.

    size: a name of SIZES. video: dict(shape=(T, H, W), patch=(t, h, w)) or None; audio: dict(shape=(F, T), patch=(f, t)) or
    None. absent: 'zero' runs all tokens with the input of the absent modality at zero, 'drop' leaves its tokens out.
    norm_in: LayerNorm on the tokens before the first block; norm_out: after the last. levels: indices of inner blocks whose output
    has a LayerNorm of its own.
    """
    def __init__(self, size, video=None, audio=None, cls=False, positions="factorised", absent="drop", norm_in=False,
                 norm_out=True, dropout=0.0, checkpoint=False, levels=()):
        super().__init__()
        if size not in SIZES:
            raise UserError(f"--size {size}: unknown ViT; one of {', '.join(SIZES)}")
        if video and any(n % p for n, p in zip(video["shape"], video["patch"])):
            raise UserError(f"frames, height, width {tuple(video['shape'])} are not divisible by the tubelet {tuple(video['patch'])}; "
                            "change --frames")
        if audio and any(n < p for n, p in zip(audio["shape"], audio["patch"])):
            raise UserError(f"the mel {tuple(audio['shape'])} is smaller than a patch {tuple(audio['patch'])}; raise --seconds")
        dim, depth, heads, mlp = SIZES[size]
        self.dim, self.absent = dim, absent
        self.video = Patches(3, video["shape"], video["patch"], dim, positions) if video else None
        self.audio = Patches(1, audio["shape"], audio["patch"], dim, positions) if audio else None
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if cls else None
        self.modality = nn.Parameter(torch.randn(2, 1, dim) * 0.02) if video and audio else None      # modality embedding
        self.norm_in = nn.LayerNorm(dim, eps=1e-6) if norm_in else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.transformer = Transformer(dim, depth, heads, mlp, dropout, checkpoint)
        self.norm_out = nn.LayerNorm(dim, eps=1e-6) if norm_out else nn.Identity()
        self.norms = nn.ModuleDict({str(level): nn.LayerNorm(dim, eps=1e-6) for level in levels})
        self.apply(init_weights)

    def embed(self, video=None, audio=None):
        """Tokens before the first block, without CLS: (B, N, dim), video first."""
        batch, tokens = len(audio if video is None else video), []
        for which, (patches, x) in enumerate(((self.video, video), (self.audio, audio))):
            if patches is None and x is not None:
                raise UserError(f"this encoder takes no {('video', 'audio')[which]}: it was trained without")
            if x is not None or patches is not None and self.absent == "zero":
                t = patches(x, batch)
                tokens.append(t if self.modality is None else t + self.modality[which])
        return torch.cat(tokens, 1)

    def start(self, x):
        """Tokens (B, N, D) -> what the first block is given, CLS first: (B, [1 +] N, D)"""
        x = x if self.cls is None else torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.dropout(self.norm_in(x))

    def forward(self, video=None, audio=None, visible=None, mask=None, layers=None, tokens=None):
        """video (B, 3, T, H, W) and/or audio (B, 1, F, T), or their tokens (B, N, dim) of `embed`; visible (B, K): the indices of the
        tokens to run; mask: of `attention`. Returns (B, [1 +] N or K, dim), CLS first; with layers (indices of blocks) their outputs side
        by side, each through its own norm or, where it has none, the last one: (B, [1 +] N or K, len(layers) dim)."""
        x = self.embed(video, audio) if tokens is None else tokens                          # (B, N, D)
        x = self.start(x if visible is None else gather(x, visible))                        # (B, [1 +] K, D)
        x = self.transformer(x, mask, layers)
        if layers is None:
            return self.norm_out(x)
        # unspecified (A-JEPA, features of several layers): whether and how the inner layers are normed
        return torch.cat([(self.norms[str(n)] if str(n) in self.norms else self.norm_out)(h) for n, h in zip(layers, x)], -1)

    def attention_weights(self, video=None, audio=None, layer=-1):
        """How much each token (rows) attends to each in block number `layer`: (B, heads, [1 +] N, [1 +] N), rows sum to 1. For looking at
        one layer: the explicit softmax, which the forward pass never makes."""
        x, blocks = self.start(self.embed(video, audio)), self.transformer.blocks
        for block in blocks[:layer % len(blocks)]:
            x = block(x)
        q, k, _ = blocks[layer].split(x).float()                                            # each (B, heads, N, d)
        return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)

    def read_out(self, x, video=True, audio=True):
        """The output of `forward` on all tokens -> (tokens of the modalities that were given, clip embedding (B, D)): CLS where
        there is one, else the mean of those tokens."""
        cls, x = (x[:, 0], x[:, 1:]) if self.cls is not None else (None, x)
        if self.absent == "zero" and not (video and audio):                                 # both ran: keep what was given
            x = x[:, :self.video.num] if video else x[:, self.video.num if self.video else 0:]
        return x, x.mean(1) if cls is None else cls


def mlp(dim, widths, norm=True):
    """Linear layers with GELU, and with `norm` BatchNorm, between them. (N, dim) -> (N, widths[-1])"""
    layers = []
    for width in widths[:-1]:
        layers += [nn.Linear(dim, width), *([nn.BatchNorm1d(width)] if norm else []), nn.GELU()]
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, widths[-1]))


def gather(x, index):
    """(B, N, D), (B, K) -> (B, K, D)"""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def assemble(h, context, prediction, target):
    """Tokens in the order of their grid, h (B, C, D) at context (B, C) and prediction (B, M, D) at target (B, M), which together are all of
    them -> (B, C + M, D), and which are of target, (B, C + M) bool."""
    order = torch.cat([context, target], 1).argsort(1)                                      # where each token of the grid stands
    return gather(torch.cat([h.float(), prediction.float()], 1), order), order >= context.shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Masks: geometry only; which blocks a method draws stands in its script
# ---------------------------------------------------------------------------------------------------------------------

def block_size(rng, grid, scale, aspect):
    """(height, width) of a random block of a (rows, columns) grid. Its area is U[scale] of the grid, its width over its height
    U[aspect] (two draws, not one); a side that the grid cuts hands its excess to the other, so that the area stays as drawn."""
    rows, cols = grid
    area, a = rng.uniform(*scale) * rows * cols, rng.uniform(*aspect)
    height = min(max(math.sqrt(area / a), area / cols), rows)
    height = min(max(1, round(height)), rows)
    return height, min(max(1, round(area / height)), cols)


def draw_block(rng, grid, scale, aspect):
    """A random block (top, left, height, width), sized by block_size. Each place that fits is equally likely, the last row and column
    included."""
    height, width = block_size(rng, grid, scale, aspect)
    return int(rng.integers(grid[0] - height + 1)), int(rng.integers(grid[1] - width + 1)), height, width


def place_apart(rng, mask, size):
    """A block (top, left, height, width) of the size (height, width) where it lies least on what `mask` hides: one of those places,
    each equally likely."""
    (height, width), total = size, np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)                            # hidden above and left of each corner
    overlap = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    top, left = divmod(int(rng.choice(np.flatnonzero(overlap == overlap.min()))), overlap.shape[1])
    return top, left, height, width


def cover(grid, blocks):
    """Blocks (top, left, height, width) -> (rows, columns) bool, True where one of them lies."""
    mask = np.zeros(grid, bool)
    for top, left, height, width in blocks:
        mask[top:top + height, left:left + width] = True
    return mask


def nearest(draws, off, near=0):
    """The first of some draws that is off by `near` or less, or the one that is off least."""
    best = None
    for one in draws:
        if best is None or off(one) < off(best):
            best = one
        if off(best) <= near:
            break
    return best


def meet_count(rng, mask, count, keep=None):
    """Hide or free random single patches until `count` are hidden: all samples of a batch then have the same length, and no
    part of the grid is cut off to get there. Those of `keep` stay hidden. Returns a new mask of the same shape."""
    flat = mask.flatten()
    free = flat == (flat.sum() > count)
    free = free if keep is None else free & ~keep.flatten()
    change = rng.permutation(np.flatnonzero(free))[:abs(int(flat.sum()) - count)]
    flat[change] = ~flat[change]
    return flat.reshape(mask.shape)


# ---------------------------------------------------------------------------------------------------------------------
# 3. EMA, SIGReg, schedules, health
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def ema_update(target, online, tau):
    """target <- tau target + (1 - tau) online, parameters only; call it after the optimiser step."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


@torch.no_grad()
def follow(mean, x, weight, step):
    """A running mean (D,) of x (B, D) over the clips whose weight is not 0."""
    total = weight.sum()
    mean.lerp_((weight[:, None] * x).sum(0) / total.clamp_min(1e-12), max(0.01, 1 / (step + 1)) * (total > 0))


@torch.no_grad()
def gather_ranks(x):
    """(N, D) of each process -> (sum of N, D), without gradient."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean_over_ranks(x):
    """The mean over the processes, with the gradient of this rank's own term: DDP averages the gradients afterwards, which
    makes the sum exact. A plain all_reduce is recorded by autograd on gloo, and the gradient is then a world size too small."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return x + (mean / dist.get_world_size() - x.detach())


def sigreg(z, step, num_slices=2048, knots=17, t_max=5.0):
    """Sketched isotropic Gaussian regularisation (LeJEPA, arXiv 2511.08544): the Epps-Pulley statistic of z (N, D) along random
    directions, against a standard Gaussian. Scalar: ~1.06 for a Gaussian batch of any N, .409 N when all embeddings are 0.
    The directions come from `step`, the same on each rank."""
    # differs: float32 throughout; the authors' matmul runs in bf16 under autocast
    with torch.autocast(z.device.type, enabled=False):
        z, n = z.float(), len(z) * (dist.get_world_size() if dist.is_initialized() else 1)
        A = torch.randn(z.shape[1], num_slices, generator=torch.Generator().manual_seed(step)).to(z.device)
        A = A / A.norm(dim=0)                                                       # (D, S) unit directions
        t = torch.linspace(-t_max, t_max, knots, device=z.device)                   # (K,)
        phi = torch.exp(-t ** 2 / 2)                                                # characteristic function of N(0, 1)
        tzA = (z @ A).unsqueeze(-1) * t                                             # (N, S, K)
        ecf = mean_over_ranks(torch.stack([tzA.cos().mean(0), tzA.sin().mean(0)]))  # (2, S, K) real and imaginary part
        error = (ecf[0] - phi) ** 2 + ecf[1] ** 2                                   # |ecf - phi|^2
        return n * torch.trapezoid(error * phi, t, dim=-1).mean()


def warmup_cosine(step, steps, warmup, peak, start=0.0, end=0.0):
    """Linear from `start` to `peak` in `warmup` steps, then half a cosine from `peak` to `end` at the last step."""
    if step < warmup:
        return start + (peak - start) * (step + 1) / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


def cosine(step, steps, start, end):
    """Half a cosine from `start` at step 0 to `end` at step steps - 1 (a single step stays at `start`)."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / max(1, steps - 1)))) / 2


@torch.no_grad()
def health(z):
    """(N, D) -> (mean over dimensions of the std, effective rank): exp of the entropy of the normalised singular values of the
    centred batch (Roy & Vetterli 2007). Both fall when embeddings collapse."""
    z = z.float() - z.float().mean(0)
    s = torch.linalg.svdvals(z.cpu())
    p = s / s.sum().clamp_min(1e-12)
    return z.std(0).mean().item(), torch.exp(-(p * p.clamp_min(1e-12).log()).sum()).item()


def weight_decay_groups(module, weight_decay):
    """AdamW groups: decay on the weights of linear maps and convolutions, none on biases, norms, positions and learned tokens."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if name.endswith("weight") and p.ndim >= 2]
    spared = [p for name, p in named if not (name.endswith("weight") and p.ndim >= 2)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Devices and processes
# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Process:
    """Where this process runs. `torchrun` sets the environment; without it there is no process group at all."""
    device: torch.device
    rank: int = 0
    world: int = 1
    bf16: bool = False

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        """bf16 where the device computes in it. It has float32's range, so there is no GradScaler."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, model):
        """DistributedDataParallel under torchrun, the model itself otherwise. Keep it: gradients are averaged while it lives."""
        if not dist.is_initialized():
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def any(self, flag):
        """True on all ranks if it is True on one."""
        return bool(flag) if self.world == 1 else bool(self.largest(int(bool(flag))))

    def largest(self, value):
        """The largest of the ranks' integers."""
        value = torch.tensor(value, device=self.device)
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value.item())

    def total(self, x):
        """The sum over the ranks of a tensor."""
        x = x.to(self.device)
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self):
        if dist.is_initialized():
            dist.barrier()

    def from_main(self, make):
        """What rank 0's make() returns, on all ranks."""
        box = [make() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]


def start_process(device="auto"):
    """Pick the device ('auto': CUDA, then MPS, then CPU), and join the process group if torchrun started us."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else \
            "mps" if torch.backends.mps.is_available() and "RANK" not in os.environ else "cpu"      # MPS has no process group
    try:
        device = torch.device(device)
        if device.type == "cuda" and "RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: this machine or this torch does not have it; use cpu, mps, cuda or auto") from None
    if "RANK" in os.environ and not dist.is_initialized():
        # rank 0 alone writes the toy clips and the statistics of the mel: the others wait, maybe longer than NCCL's 10 minutes
        how = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(timeout=datetime.timedelta(minutes=30), **how)
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:                                               # elsewhere bf16 is emulated, and slower than float32
        has = torch.cpu.get_capabilities()
        bf16 = device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Process(device, rank, world, bf16)


@contextlib.contextmanager
def one_thread():
    """Small operations are done sooner by one thread than shared out (a linear head of the toy: in a third of the time)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seed_step(seed, step, rank=0):
    """Set torch's random stream (dropout, initial weights) as a pure function of (seed, step, rank): resume replays nothing."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1))


class StopSignal:
    """True once SIGTERM or Ctrl-C came: the loop then ends the step, saves and says how to go on. A second Ctrl-C is not caught; a
    second SIGTERM is, since SLURM and torchrun each send one."""
    def __init__(self):
        self.came = False
        try:
            self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:                              # not in the main thread: whoever runs us there handles signals
            self.before = {}

    def catch(self, number, frame):
        self.came = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def release(self):
        """Handle signals as before: the loop is over."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.came


def main_guard(main):
    """Run a script's main(): bad input ends with its sentence and exit code 2, a signal that nobody handles without a traceback."""
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# 5. Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def code_version():
    """The version, and the commit where there is one."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5,
                                cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__


def replace_file(path, write):
    """write(file) under a temporary name, then rename: whoever is killed in between leaves the old file whole. Raises OSError."""
    temporary = Path(path).with_name(Path(path).name + ".part")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, **content):
    """Save a dict that load_checkpoint reads."""
    replace_file(path, lambda f: torch.save({"version": code_version(), **content}, f))


def load_checkpoint(path, method=None, device="cpu"):
    """The dict that save_checkpoint wrote. path: the file, or the folder of the run. Raises UserError if it is missing, cut
    off, or of another method than the one asked for."""
    path = Path(path) / "latest.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint; give a run's folder or its latest.pt")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        found = content["method"]
    except Exception as e:                              # torch raises half a dozen kinds for a damaged file
        raise UserError(f"{path}: cannot be read as a checkpoint of ours ({type(e).__name__}); it is cut off, or something else wrote "
                        "it") from None
    if method and found != method:
        raise UserError(f"{path}: is a checkpoint of {found}, not of {method}; start {found}.py with it")
    return content


def load_weights(module, weights, path):
    """load_state_dict, with a sentence where the names or the shapes are others. weights None: it stays as it was initialised."""
    if weights is None:
        return
    if weights.keys() != module.state_dict().keys():
        raise UserError(f"{path}: its weights have other names than the model that was asked for: another --size or recipe, or another "
                        "version of the code (the checkpoint's 'version' names its commit)")
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path}: its weights have another shape than the model that was asked for; use the same --size and "
                        "recipe") from None


class FrozenEncoder(nn.Module):
    """What load_encoder returns. Call: video (B, 3, T, H, W) and/or audio (B, 1, F, T), normalised as data.py delivers them ->
    tokens (B, N, D) of the modalities given, video first, and the clip embedding (B, D). `.inputs` goes into data.load_clip;
    `.projector` maps the embedding to where the loss was taken, None for a method that has none; `.cross` holds the predictors from
    one input's embedding to what `.teacher`, a FrozenEncoder, makes of another, by name ("a->v"), both None for a method that has none.
    layers: indices of blocks whose outputs stand side by side in D, instead of the last one's alone."""
    def __init__(self, vit, projector, content, layers=None, cross=None, teacher=None):
        super().__init__()
        self.vit, self.projector, self.cross, self.teacher = vit, projector, cross, teacher
        self.layers, self.dim = layers, len(layers or [0]) * vit.dim
        self.inputs, self.method, self.step = content["inputs"], content["method"], content["step"]
        self.eval().requires_grad_(False)

    def forward(self, video=None, audio=None):
        if video is None and audio is None:
            raise UserError("the encoder needs video, audio or both; the clip has neither")
        return self.vit.read_out(self.vit(video, audio, layers=self.layers), video is not None, audio is not None)

    def train(self, mode=True):
        return super().train(False)                     # frozen: no dropout, whoever calls .train() around it


def stretch_positions(weights, module):
    """A state dict whose learned positions of video time are interpolated to the number of frames that `module` takes."""
    # unspecified (MJEPA, cooldown): how; the longer span is stretched over the positions of the shorter one
    weights = dict(weights)
    for name, now in module.state_dict().items():
        if name.endswith("video.positions.first") or name.endswith("positions.video.first"):
            before = weights.get(name)                                                                    # (T, 1, D)
            if before is not None and before.shape[1:] == now.shape[1:] and len(before) != len(now):
                weights[name] = F.interpolate(before.permute(1, 2, 0), len(now), mode="linear").permute(2, 0, 1)
    return weights


def load_optimizer(optimizer, state, path):
    """load_state_dict, with a sentence where the parameter groups are others."""
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        raise UserError(f"{path}: its optimiser state is of another version of the code; give another --out, or --fresh") from None


def load_encoder(path, device="cpu", untrained=False, absent=None, layers=None, weights=None, cross=False):
    """The encoder of a checkpoint of any method, frozen. untrained: the same architecture as it was initialised, with the run's
    seed, as a baseline. absent: 'zero' or 'drop', if other than it was trained with. layers: of FrozenEncoder. weights: 'context' or
    'target', if other than the one that the method evaluates. cross: with .cross and .teacher, where the method has them."""
    content = load_checkpoint(path)
    weights = f"{weights}_encoder" if weights else content["weights"]
    if not any(k.startswith(weights + ".") for k in content["model"]):
        raise UserError(f"{path}: {content['method']} has no {weights.replace('_', ' ')} of its own; leave --encoder out")
    with torch.random.fork_rng(devices=[]):             # the caller's random stream stays as it was
        seed_step(content["args"]["seed"], 0)
        vit = ViT(**content["encoder"])
        projector = mlp(vit.dim, content["projector"]) if content.get("projector") and not layers else None
        widths = content.get("cross") if cross and not layers else None
        cross = nn.ModuleDict({name: mlp(vit.dim, w, norm=False) for name, w in widths.items()}) if widths else None
    vit.absent = absent or vit.absent
    teacher = copy.deepcopy(vit) if cross else None
    for layer in layers or ():
        check_range("--layers", layer, 0, len(vit.transformer.blocks) - 1)
    for module, name in ((vit, weights), (projector, "projector"), (cross, "cross"), (teacher, "target_encoder")):
        if module is not None and not untrained:
            load_weights(module, {k[len(name) + 1:]: v for k, v in content["model"].items() if k.startswith(name + ".")}, path)
    return FrozenEncoder(vit, projector, content, layers, cross, teacher and FrozenEncoder(teacher, None, content)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# 6. A run: its folder, its log, its flags
# ---------------------------------------------------------------------------------------------------------------------

def open_run(args, method, recipe, process):
    """Make the run's folder and say where to go on: the checkpoint found there, or None.

    args: out, resume, fresh. A run with other recipe values than the ones asked for is refused, not overwritten. Under torchrun
    all processes must see the same folder."""
    out = Path(args.out)
    found = None
    if args.fresh and args.resume != "auto":
        raise UserError("--fresh and --resume FILE exclude each other; give one of them")
    if not args.fresh:
        file = out / "latest.pt" if args.resume == "auto" else Path(args.resume)
        if file.exists() or args.resume != "auto":
            found = load_checkpoint(file, method)
            before = found.get("recipe", {})
            other = [f"{k} {before.get(k)} (now {v})" for k, v in recipe.items() if before.get(k) != v]
            if other:
                raise UserError(f"{file}: the run there has {', '.join(other)}; give another --out, or --fresh to start over")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None
    step = found["step"] if found else 0
    if process.any(step != process.largest(step)):
        raise UserError(f"--out {out}: the processes find different checkpoints there; it must lie on a file system that all nodes share")
    return found


class Log:
    """One JSON row in log.jsonl and one line on the screen at each interval; rows after the step that a run goes on from are
    dropped. Only rank 0 writes."""
    def __init__(self, out, start, process):
        self.file, self.on = Path(out) / "log.jsonl", process.main
        if self.on:
            (Path(out) / "results.json").unlink(missing_ok=True)        # of a run that this one writes over; its end writes it anew
            rows = [row for row in read_log(out) if row["step"] < start]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row, show):
        """row: a flat dict with 'step'. show: the keys that go on the screen; a pair of keys is one value beside the other."""
        if self.on:
            with open(self.file, "a") as f:
                f.write(json.dumps(row) + "\n")
            def text(value):
                return f"{value:.4g}" if isinstance(value, float) else str(value)
            tqdm.write("  ".join(f"{k} {text(row[k])}" if isinstance(k, str) else f"{k[0]} {row[k[0]]:.3g}/{row[k[1]]:.3g}" for k in show))


def read_log(out):
    """The rows of a run's log.jsonl; a last line that was cut off is left out."""
    file, rows = Path(out) / "log.jsonl", []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def add_row(ckpt, name, row):
    """Append a JSON row to the file `name` beside a checkpoint."""
    file = (Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent) / name
    try:
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"{file}: the result above could not be written there ({e.strerror})") from None


LINES, MARKERS = (("k", "-"), ("0.6", "--"), ("0.35", "-."), ("0.5", ":"), ("0.75", "-"), ("0.2", "--")), "os^Dvx*"      # 42 together
LOSSES = ("loss", "know_nothing", "invariance", "sigreg", "sigreg/N")


def draw_curves(path, runs, title):
    """A picture with a small plot for each column of the logs over the steps: the losses, and the loss of a predictor that knows nothing
    beside its own, thin and dotted; then what tells a healthy run. path: or a file; runs: {label: rows of read_log}, of any methods."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    # a column that is always 0 counts troubles that never came
    columns = dict.fromkeys(key for rows in runs.values() for row in rows for key in row if row[key] and key != "step") or ["loss"]
    losses = [c for c in columns if c in LOSSES or f"{c}/know_nothing" in columns]
    panels = {"losses": [c for c in losses if c != "know_nothing"],
              "health": [c for c in columns if c not in losses and not c.endswith("/know_nothing")]}
    panels = {name: some for name, some in panels.items() if some}
    width = min(6, max(3, *map(len, panels.values())))             # of three at least, for the title
    rows_of = {name: math.ceil(len(some) / width) for name, some in panels.items()}
    many, styles, size = len(runs) > 1, {}, (0.7 + 2.8 * width, 1.1 + 0.22 * len(runs) + 2.3 * sum(rows_of.values()))
    fig, axes = plt.subplots(sum(rows_of.values()), width, figsize=size, squeeze=False)
    # by hand: matplotlib's own layout takes a second for MJEPA's thirty plots
    fig.subplots_adjust(0.8 / size[0], (0.6 + 0.22 * many * len(runs)) / size[1], 1 - 0.1 / size[0], 1 - 0.7 / size[1], 0.3, 0.6)
    fig.suptitle(title, y=1 - 0.2 / size[1], parse_math=False)
    for name, height in rows_of.items():
        mine, axes = list(axes[:height].flat), axes[height:]
        mine[0].annotate(name, (0, 0.5), (-0.6 * 72, 0), "axes fraction", "offset points", ha="center", va="center", rotation=90)
        for ax, column in zip(mine, panels[name]):
            thin = "know_nothing" if column == "loss" else f"{column}/know_nothing"
            for number, (label, rows) in enumerate(runs.items()):
                style = dict(zip(("color", "ls"), LINES[number % len(LINES)]), marker=MARKERS[number % len(MARKERS)] if many else None)
                styles[label] = style
                for key, how in ((column, {**style, "ms": 3, "lw": 1.2}), (thin, {"color": style["color"], "ls": ":", "lw": 0.8})):
                    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                    if points:
                        ax.plot(*zip(*points), markevery=max(1, len(points) // 6), **how)
            ax.set_title(f"{column}, ms" if column.startswith("ms_") else column, fontsize=9)
            ax.set_xlabel("step", fontsize=8)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        for ax in mine[len(panels[name]):]:
            ax.axis("off")
    if many:
        legend = fig.legend([plt.Line2D([], [], **style) for style in styles.values()], styles, loc="lower center", fontsize=9)
        [text.set_parse_math(False) for text in legend.get_texts()]                 # a $ in a folder's name is a $
    fig.savefig(path, format="png", dpi=110)
    plt.close(fig)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults that are values; where the recipe or the machine decides, the text says so."""
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def read_recipe(args, method, table, flags):
    """The column of a recipe's table {name: (paper, toy, source)} that a run takes, with the flags that were given (of `flags` and of
    those that all scripts share) in place of its values. Checks the shared flags; sets args.out where it was left open."""
    column = ("paper", "toy").index(args.recipe or ("toy" if args.data == "toy" else "paper"))
    recipe = {name: row[column] for name, row in table.items()}
    if args.steps is not None or args.epochs is not None:
        recipe["steps"], recipe["epochs"] = args.steps, args.epochs
    for name in ("size", "batch_size", "lr", *flags):
        if getattr(args, name) is not None:
            recipe[name] = getattr(args, name)
    check_range("--lr", recipe["lr"], 0, 10), check_range("--batch-size", recipe["batch_size"], 2, 10 ** 6)
    check_range("--steps", 1 if recipe["steps"] is None else recipe["steps"], 1, 10 ** 9)
    check_range("--epochs", 1 if recipe["epochs"] is None else recipe["epochs"], 1e-6, 10 ** 6)
    check_range("--seconds", recipe["seconds"], 0.1, 3600), check_range("--accumulate", args.accumulate, 1, 10 ** 6)
    check_range("--log-every", args.log_every, 1, 10 ** 9), check_range("--save-every", args.save_every, 1, 10 ** 9)
    check_range("--workers", args.workers or 0, 0, 1024), check_range("--max-bad", args.max_bad, 0, 1)
    check_range("--seed", args.seed, 0, 2 ** 31)
    recipe.update(accumulate=args.accumulate, data=args.data, seed=args.seed)
    args.out = args.out or f"runs/{method}-{args.data}-seed{args.seed}"
    return recipe


def common_flags(parser, method):
    """The flags that all four scripts share, with the same meaning."""
    add = parser.add_argument
    add("--data", default="toy", help="toy, audioset, audioset-20k, audioset-full, vggsound, kinetics400, folder; sound alone: esc50, "
        "speechcommands, fsd50k; pictures alone: ssv2")
    add("--data-dir", help="folder with the clips and the csv files (toy: where to write them)")
    add("--out", help=f"folder of the run (default: runs/{method}-DATA-seedSEED)")
    add("--recipe", choices=("toy", "paper"), help="values of the table at the top (default: toy for --data toy, else paper)")
    add("--size", help=f"ViT: {', '.join(SIZES)} (default: the recipe's)")
    add("--steps", type=int, help="optimiser steps (instead of --epochs) (default: the recipe's)")
    add("--epochs", type=float, help="passes over the data (default: the recipe's)")
    add("--batch-size", type=int, help="clips a step, over all processes (default: the recipe's)")
    add("--accumulate", type=int, default=1, help="micro-batches a step, for small memories")
    add("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add("--seconds", type=float, help="length of a view; where the pictures are shorter, of its sound (default: the recipe's)")
    add("--workers", type=int, help="processes that decode, for each training process (default: by the number of cores)")
    add("--device", default="auto", help="auto, cpu, mps or cuda")
    add("--seed", type=int, default=0)
    add("--resume", default="auto", metavar="auto|FILE", help="auto goes on from --out; or a checkpoint of the same recipe")
    add("--fresh", action="store_true", help="start over, whatever lies in --out")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add("--checkpoint-activations", action="store_true", help="less memory: the backward pass computes each block again")
    add("--log-every", type=int, default=10, help="steps between two rows of the log")
    add("--save-every", type=int, default=500, help="steps between two checkpoints")
    add("--max-bad", type=float, default=0.1, help="stop when more than this share of the clips does not decode")


def check_range(name, value, low, high):
    """A flag's value, or a UserError that names its range."""
    if value is None or not low <= value <= high:
        raise UserError(f"{name} {value} is out of range: from {low} to {high}")
    return value


def default_workers(process):
    """Processes that decode: half of the cores for training on a CPU, most of them beside a GPU, at most 16 a process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(16, (cores // 2 if process.device.type == "cpu" else cores - local) // local))
