"""What is put on an encoder to measure it: heads, the losses and rates that they are trained with, the
measures. Small modules and pure functions, each piece to be copied; probe.py uses them.

A head takes (tokens (B, N, D), embedding (B, D)), of which it may leave one alone, and gives scores (B, C),
in float32 also under autocast.
"""
import copy
import functools
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits             # comes with scikit-learn
from torch.distributed.nn.functional import all_reduce

import common


# ----------------------------------------------------------------------------------------------------------
# Measures
# ----------------------------------------------------------------------------------------------------------

def accuracy(scores, targets):
    """Top-1, in 0..1. scores (N, C), targets (N,); the target must be strictly the best, so that ties do not
    count."""
    own = scores.gather(1, targets[:, None])
    below = (scores < own).sum(1)
    return (below == scores.shape[1] - 1).float().mean().item()


def mean_average_precision(scores, targets):
    """(mAP in 0..1, number of classes that counted): the mean, over the classes that have a positive, of the
    average precision. scores and targets (N, C). Clips with the same score share the precision at the end of
    their tie."""
    scores = torch.as_tensor(scores).T                              # (C, N)
    targets = torch.as_tensor(targets).T
    values = []
    for s, y in zip(scores.split(64), targets.split(64)):           # so many classes at once
        y = y.double()
        there = y.sum(1) > 0
        s, order = s[there].double().sort(1, descending=True)
        last = torch.searchsorted(-s, -s, right=True)               # clips with this score or a better one
        y = y[there].gather(1, order)
        precision = y.cumsum(1).gather(1, last - 1) / last
        values.append((precision * y).sum(1) / y.sum(1))
    values = torch.cat(values)
    return (values.mean().item(), len(values)) if len(values) else (0.0, 0)


def measure(scores, targets):
    """(name, value in percent, classes that counted, those that a clip is of): top-1 for class indices (N,),
    mAP for zeros and ones (N, C)."""
    if targets.ndim == 1:
        return "top-1", 100 * accuracy(scores, targets), len(targets.unique())
    value, counted = mean_average_precision(scores, targets)
    return "mAP", 100 * value, counted


def average(scores, multilabel, of="logits"):
    """(..., views, C) scores -> (..., C), the mean over the views, in float64, where far less of them tie: of
    the logits, or of the probabilities."""
    scores = scores.double()
    if of == "probabilities":
        scores = scores.sigmoid() if multilabel else scores.softmax(-1)
    return scores.mean(-2)


# ----------------------------------------------------------------------------------------------------------
# Heads
# ----------------------------------------------------------------------------------------------------------

class Standardise(nn.BatchNorm1d):
    """BatchNorm without weights, in training by the clips of all processes; nn.SyncBatchNorm knows no CPU."""
    def __init__(self, dim):
        super().__init__(dim, affine=False)

    def forward(self, x):
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        mean = all_reduce(x.mean(0)) / world                    # (D,), with the gradient of all processes
        var = all_reduce((x - mean).square().mean(0)) / world
        with torch.no_grad():
            count = world * len(x)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) / (var + self.eps).sqrt()


class LinearHead(nn.Module):
    """Linear on the clip embedding, behind a LayerNorm with affine (AV-JEPA) or, standardised, minus the mean
    and over the std of the training clips."""
    def __init__(self, dim, classes, standardised=False):
        super().__init__()
        self.norm = Standardise(dim) if standardised else nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.weight)              # unspecified: the start
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens, embedding):
        with torch.autocast(embedding.device.type, enabled=False):
            return self.linear(self.norm(embedding.float()))


def ask_once(attend, query, x):
    """What attend(query, x, x), a MultiheadAttention, says of one query (1, 1, D) and x (B, N, D): (B, D).

    In another order, which is exact for a single query: the keys' matrix meets the query, the values' matrix
    the mean, and no matrix all the tokens (toy: a tenth of the time)."""
    heads = attend.num_heads
    weight = attend.in_proj_weight.unflatten(0, (3, heads, -1))                     # (3, H, d, D)
    bias = attend.in_proj_bias.unflatten(0, (3, heads, -1))                         # (3, H, d)
    q = torch.einsum("hde,e->hd", weight[0], query[0, 0]) + bias[0]                 # (H, d)
    # the bias of the keys cancels in the softmax
    k = torch.einsum("hd,hde->he", q, weight[1]) / q.shape[1] ** 0.5                # (H, D)
    a = (x @ k.T).softmax(1)                                                        # (B, N, H)
    y = a.transpose(1, 2) @ x                                                       # (B, H, D)
    v = torch.einsum("bhe,hde->bhd", y, weight[2]) + bias[2]                        # (B, H, d)
    return attend.out_proj(v.flatten(1))                                            # (B, D)


class AttentiveHead(nn.Module):
    """AV-JEPA's: one learned query attends to the tokens as they are, then LayerNorm, then linear."""
    def __init__(self, dim, classes):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        # unspecified: heads of 64 dimensions
        self.attend = nn.MultiheadAttention(dim, max(1, dim // 64), batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)

    def forward(self, tokens, embedding):
        with torch.autocast(tokens.device.type, enabled=False):
            return self.linear(self.norm(ask_once(self.attend, self.query, tokens.float())))


class CrossHead(nn.Module):
    """V-JEPA's: one learned query attends to the normed tokens, is added to what it finds, and goes through
    an MLP with a residual of its own; then linear. blocks: that the tokens go through before."""
    def __init__(self, dim, classes, blocks=0):
        super().__init__()
        heads = max(1, dim // 64)                       # unspecified: of the tokens' blocks and of the query
        self.blocks = nn.ModuleList(common.Block(dim, heads, 4 * dim) for _ in range(blocks))
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.linear = nn.Linear(dim, classes)
        self.apply(common.ViT.init_weights)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens, embedding):
        y = tokens.float()
        for block in self.blocks:                       # under autocast in bf16, as an encoder's
            y = block(y)
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.query[0] + ask_once(self.attend, self.query, self.norm1(y.float()))        # (B, D)
            x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
            return self.linear(x)


ON_EMBEDDING = {
    "linear": LinearHead,
    "standardised": functools.partial(LinearHead, standardised=True)}
ON_TOKENS = {
    "attentive": AttentiveHead,
    "cross": CrossHead,
    # MJEPA, second-hand: "cross-attention + 4 blocks + linear"
    # unspecified: the order, here the blocks first, as in V-JEPA 2
    "blocks": functools.partial(CrossHead, blocks=4)}
HEADS = {**ON_EMBEDDING, **ON_TOKENS}


class Mixed(nn.Module):
    """A head behind the average of several blocks, whose outputs stand side by side in (..., blocks D): a
    learned number for each block, and their softmax is how much it counts, as SUPERB (2105.01051) measures
    HuBERT and others."""
    def __init__(self, head, blocks):
        super().__init__()
        self.head = head
        self.weights = nn.Parameter(torch.zeros(blocks))        # at the start the plain mean, as in s3prl

    def mix(self, x):
        """(..., blocks D) -> (..., D)"""
        with torch.autocast(x.device.type, enabled=False):
            return self.weights.softmax(0) @ x.float().unflatten(-1, (len(self.weights), -1))

    def forward(self, tokens, embedding):
        mixed = [None if x is None else self.mix(x) for x in (tokens, embedding)]
        return self.head(*mixed)


def make_head(name, dim, classes, mix=0):
    """A head of HEADS for features of width dim. mix: of so many blocks side by side in dim, the head reads
    the learned average; 0: all that there is."""
    return Mixed(HEADS[name](dim // mix, classes), mix) if mix else HEADS[name](dim, classes)


# ----------------------------------------------------------------------------------------------------------
# How they learn
# ----------------------------------------------------------------------------------------------------------

def loss_of(scores, targets, smoothing=0.0, weight=None):
    """scores (B, C). Class indices (B,): cross-entropy with label smoothing. Zeros and ones (B, C): binary
    cross-entropy, weight (C,): of a class's positives, without smoothing."""
    if targets.ndim == 1:
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)
    return F.binary_cross_entropy_with_logits(scores, targets.float(), pos_weight=weight)


def positive_weight(positives, clips):
    """Negatives over positives of each class, (C,): positives (C,) of so many clips. A class without any
    counts as with one."""
    positives = positives.clamp_min(1)
    return (clips - positives) / positives


def learning_rate(step, steps, peak, warmup=0.0, start=0.0, end=0.0):
    """Linear from the share `start` of the peak to the peak in the share `warmup` of the steps, then a cosine
    to `end`."""
    return common.warmup_cosine(step, steps, round(warmup * steps), peak, start * peak, end)


class OnlineProbe:
    """A LinearHead for each of `names`, trained by AdamW on the clip embeddings of an encoder while that is
    trained. Each batch is scored before it is trained on: in the first epoch, that is on new clips."""
    def __init__(self, names, dim, classes, device="cpu"):
        with torch.random.fork_rng(devices=[]):         # the caller's random stream stays as it was
            heads = {name: LinearHead(dim, classes) for name in names}
        self.heads = nn.ModuleDict(heads).to(device)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-3)
        self.scored = {name: [] for name in names}      # (scores, targets), a batch each, since the last row
        self.measured_on = device if torch.device(device).type == "cuda" else "cpu"     # MPS has no float64

    def step(self, embeddings, has, targets):
        """embeddings {name: (B, D)}, without gradient; has {name: (B,) bool}: the clips that count; targets
        (B,) or (B, C) as of loss_of. A head without such a clip stays as it is."""
        losses = []
        for name, x in embeddings.items():
            if has[name].any():
                y = targets[has[name]].to(x.device)
                scores = self.heads[name](None, x[has[name]])
                self.scored[name].append((scores.detach().cpu(), y.cpu()))
                losses.append(loss_of(scores, y))
        if losses:
            self.optimizer.zero_grad()
            sum(losses).backward()
            self.optimizer.step()

    def row(self):
        """{"probe/NAME": `measure` in percent} over the clips since the last call, without those names that
        had none."""
        row = {}
        for name, batches in self.scored.items():
            if batches:
                scores, targets = map(torch.cat, zip(*batches))
                row[f"probe/{name}"] = measure(scores.to(self.measured_on), targets.to(self.measured_on))[1]
                batches.clear()
        return row

    def state_dict(self):
        scored = {}
        for name, batches in self.scored.items():
            if batches:
                scored[name] = tuple(map(torch.cat, zip(*batches)))
        moments = self.optimizer.state_dict()["state"]
        return {"heads": self.heads.state_dict(), "moments": moments, "scored": scored}

    def load_state_dict(self, state):
        """Raises an exception of some kind where the state does not fit."""
        self.heads.load_state_dict(state["heads"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["moments"], "param_groups": groups})
        for p, moments in self.optimizer.state.items():
            shapes = {key: x.shape for key, x in moments.items()}
            finite = all(x.isfinite().all() for x in (p, *moments.values()))
            if not finite or shapes != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError("moments")
        for name, (scores, targets) in state["scored"].items():
            if scores.shape != (len(targets), self.heads[name].linear.out_features):
                raise ValueError("scores")
            measure(scores, targets)                    # raises, too
            self.scored[name].append((scores, targets))


STRENGTHS = (1.0, 10.0, 100.0, 1e3)                      # C of the regression that are tried


def regressions(x, y, classes, strengths=STRENGTHS):
    """Logistic regressions by scikit-learn on standardised features: x (N, D), class indices y (N,) -> for
    each strength the LinearHead that computes it. Strengths are C, the inverse of the regularisation, for
    features that are scaled to a mean square norm of 1. A class without clips in y is never said."""
    head = LinearHead(x.shape[1], classes, standardised=True).eval()
    head.norm.running_mean = x.mean(0)
    head.norm.running_var = x.var(0, correction=0)
    said = y.unique()
    with torch.no_grad():
        head.linear.bias.fill_(-1e4)
        head.linear.bias[said] = 0.0
    if len(said) == 1:
        return [head for _ in strengths]
    z = head.norm(x)
    basis = None
    if 4 * len(x) < x.shape[1]:     # the solution lies in the span of the clips: the same in fewer dimensions
        u, s, basis = torch.linalg.svd(z, full_matrices=False)
        z = u * s                                                       # (N, N)
    # each begins where the one before ended; at a tolerance of 1e-3 the toy is off by 2
    model = LogisticRegression(max_iter=1000, tol=1e-4, warm_start=True)
    found = []
    for C in strengths:
        with warnings.catch_warnings(), threadpool_limits(1):           # two that wait for each other crawl
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=C / x.shape[1]).fit(z.numpy(), y.numpy())
        weight = torch.from_numpy(model.coef_).float()                  # (C, D); of two classes (1, D)
        weight = weight if basis is None else weight @ basis
        bias = torch.from_numpy(model.intercept_).float()
        if len(weight) == 1:
            weight = torch.cat([-weight / 2, weight / 2])
            bias = torch.cat([-bias / 2, bias / 2])
        found.append(copy.deepcopy(head))
        with torch.no_grad():
            found[-1].linear.weight[said] = weight
            found[-1].linear.bias[said] = bias
    return found
