"""What common.py claims, each piece against a reference of its own: a slow loop, a quadrature, torch."""
import ast
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import weakref
from functools import partial

import common
from common import ViT, sigreg
from datasets.batches import tell

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHOD, ROOT, command, fails, same, write_checkpoint
from slow import block_parameters, layer_norm, placements, random, record

VIDEO = dict(shape=(4, 16, 16), patch=(2, 8, 8))               # 2 x 2 x 2 = 8 tokens
AUDIO = dict(shape=(8, 22), patch=(4, 4))                      # 2 x 5 = 10 tokens, two columns are left over
NV = 8
NA = 10
DIM = common.SIZES["nano"][0]


def nano_vit(**other):
    common.seed_step(0, 0)
    return ViT(**{"size": "nano", "video": VIDEO, "audio": AUDIO, "cls": True, **other}).eval()


def inputs():
    return random(2, 3, *VIDEO["shape"], seed=1), random(2, 1, *AUDIO["shape"], seed=2)


# ---- SIGReg --------------------------------------------------------------------------------------------

def slow_sigreg(z, step, num_slices, knots=17, t_max=5.0):
    """N times the mean over slices of trapz(|ecf - phi|^2 phi, t): one slice and one knot after the other."""
    A = torch.randn(z.shape[1], num_slices, generator=torch.Generator().manual_seed(step)).double()
    width = 2 * t_max / (knots - 1)
    total = 0.0
    for a in A.T:
        x = z.double() @ (a / a.square().sum().sqrt())
        for k in range(knots):
            t = -t_max + k * width
            phi = math.exp(-t ** 2 / 2)
            error = ((t * x).cos().mean() - phi) ** 2 + (t * x).sin().mean() ** 2
            total += error * phi * width / (2 if k in (0, knots - 1) else 1)
    return len(z) * total / num_slices


@pytest.mark.parametrize("n, dim, scale, more", [
    (9, 5, 1.0, (7, 17, 5.0)), (30, 3, 2.5, (4, 8, 3.0)), (2, 1, 0.1, (3, 33, 4.0))])
def test_sigreg_and_its_gradient_are_those_of_the_formula_and_leave_the_random_stream(n, dim, scale, more):
    z = (scale * random(n, dim) + 0.3).requires_grad_()
    before = torch.get_rng_state()
    fast = sigreg(z, 11, *more)
    assert torch.equal(torch.get_rng_state(), before)
    slow = slow_sigreg(z, 11, *more)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4)
    gradient = torch.autograd.grad(slow, z)
    torch.testing.assert_close(torch.autograd.grad(fast, z), gradient, atol=1e-4, rtol=1e-3)
    assert torch.equal(sigreg(z, 3), sigreg(z, 3, 2048, 17, 5.0))              # the paper's values


def test_sigreg_is_float32_and_the_same_under_bf16_autocast():
    z = random(64, 16).requires_grad_()
    plain = sigreg(z, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sigreg(z, 2, 64)
        half = sigreg(z.bfloat16(), 2, 64)
    assert cast.dtype == half.dtype == torch.float32
    torch.testing.assert_close(cast, plain)
    torch.testing.assert_close(half, sigreg(z.bfloat16().float(), 2, 64))
    torch.testing.assert_close(torch.autograd.grad(cast, z), torch.autograd.grad(plain, z))


@pytest.mark.parametrize("norm", [True, False])
def test_a_projector_computes_in_float32_under_bf16_autocast_and_so_does_its_gradient(norm):
    projector = common.mlp(8, (16, 4), norm)
    x = random(32, 8).requires_grad_()
    plain = projector(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = projector(x)
        half = projector(x.bfloat16())
    assert cast.dtype == half.dtype == torch.float32 and torch.equal(cast, plain)
    assert torch.equal(half, projector(x.bfloat16().float()))
    ways = random(32, 4, seed=1)
    parameters = [x, *projector.parameters()]
    for one, other in zip(*(torch.autograd.grad((y * ways).sum(), parameters) for y in (cast, plain))):
        assert torch.equal(one, other)


# ---- The encoder; its tokens and sincos positions: test_papers.py ---------------------------------

@pytest.mark.parametrize("kind", ["factorised", "sincos"])
def test_a_shorter_grid_has_the_first_columns_and_a_longer_one_interpolated_ones(kind):
    positions = common.Positions((3, 5), 8, kind).requires_grad_(False)
    grid = positions().view(3, 5, 8)
    torch.testing.assert_close(positions(2), grid[:, :2].flatten(0, 1))
    middles = (np.arange(9) + 0.5) * 5 / 9 - 0.5               # nine columns over the same time
    longer = positions(9).view(3, 9, 8)
    for row, channel in np.ndindex(3, 8):
        slow = np.interp(middles, np.arange(5), grid[row, :, channel])
        np.testing.assert_allclose(longer[row, :, channel], slow, atol=1e-6)


PAPERS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
          "huge": (1280, 32, 16), "giant": (1408, 40, 22)}     # those of the ViT papers


@pytest.mark.parametrize("size", common.SIZES)
def test_a_size_is_that_of_the_papers_and_has_the_parameters_of_the_formula(size):
    dim, depth, heads, hidden = common.SIZES[size]
    assert PAPERS.get(size, (dim, depth, heads)) == (dim, depth, heads)
    assert dim % heads == 0 and hidden / dim == pytest.approx(48 / 11 if size == "giant" else 4)
    with torch.device("meta"):
        vit = ViT(size, dict(shape=(16, 224, 224), patch=(2, 16, 16)), cls=True, norm_in=True)
    ends = (3 * 2 * 16 * 16 + 1) * dim + (8 + 14 * 14) * dim + dim + 2 * 2 * dim    # and norms
    assert sum(p.numel() for p in vit.parameters()) == depth * block_parameters(dim, hidden) + ends


def torchs_own(block, x, mask=None):
    """What a pre-norm block of torch's attention makes of x (B, N, D), and its attention weights."""
    dim = x.shape[-1]
    attention = nn.MultiheadAttention(dim, block.heads, batch_first=True)
    attention.load_state_dict({"in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias,
                               "out_proj.weight": block.proj.weight, "out_proj.bias": block.proj.bias})
    if mask is not None:                                       # torch's says what is not attended to
        mask = ~mask.expand(-1, block.heads, -1, -1).flatten(0, 1)
    y = layer_norm(x, block.norm1)
    y, weights = attention(y, y, y, attn_mask=mask, average_attn_weights=False)
    x = x + y
    return x + block.fc2(F.gelu(block.fc1(layer_norm(x, block.norm2)))), weights


def test_a_block_attends_to_what_its_mask_allows():
    block = common.Block(12, 3, 20)
    x = random(2, 5, 12)
    mask = torch.eye(5, dtype=torch.bool) | (torch.rand(2, 1, 5, 5) < 0.6)
    torch.testing.assert_close(block(x, mask), torchs_own(block, x, mask)[0], atol=1e-5, rtol=1e-5)


def slow_block(block, x, p, eps):
    """As a pre-norm block with dropout p on what the attention and the MLP add, drawn in this order."""
    dim = x.shape[-1]
    y = layer_norm(x, block.norm1, eps) @ block.qkv.weight.T + block.qkv.bias
    parts = [part.chunk(block.heads, -1) for part in y.split(dim, -1)]
    heads = []
    for q, k, v in zip(*parts):                                # each (B, N, d)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        heads.append(scores.softmax(-1) @ v)
    y = torch.cat(heads, -1) @ block.proj.weight.T + block.proj.bias
    x = x + y * F.dropout(torch.ones_like(y), p)
    y = layer_norm(x, block.norm2, eps) @ block.fc1.weight.T + block.fc1.bias
    y = y * (1 + torch.erf(y / math.sqrt(2))) / 2              # GELU, and no dropout
    y = y @ block.fc2.weight.T + block.fc2.bias
    return x + y * F.dropout(torch.ones_like(y), p)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
def test_on_a_cpu_a_block_has_dropout_on_what_the_attention_and_the_mlp_add_and_nowhere_else(eps):
    block = common.Block(12, 3, 20, dropout=0.3, eps=eps)
    x = random(2, 5, 12)
    outputs = {}
    for p in (0.3, 0.0):
        block.train(p > 0)
        torch.manual_seed(5)
        outputs[p] = block(x)
        torch.manual_seed(5)
        torch.testing.assert_close(outputs[p], slow_block(block, x, p, eps), atol=1e-5, rtol=1e-5)
    assert (outputs[0.3] - outputs[0.0]).abs().max() > 0.01


@pytest.mark.parametrize("device, weights", [("cpu", 0.0), ("meta", 0.3)])
def test_the_attentions_weights_have_dropout_in_training_on_any_device_but_a_cpu(
        device, weights, monkeypatch):
    calls = record(monkeypatch, F, "scaled_dot_product_attention")
    block = common.Block(12, 3, 20, dropout=0.3).to(device)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device)
    for given in (None, mask):
        for training in (True, False):
            block.train(training)(random(2, 5, 12).to(device), given)
            (q, k, v, masked, *p), _ = calls.pop()
            assert not calls and q.device.type == device and masked is given
            assert sum(p) == (weights if training else 0)


def test_the_tokens_have_dropout_after_their_norm_and_before_the_first_block():
    vit = nano_vit(norm_in=True, dropout=0.3).train().requires_grad_(False)
    vit.norm_in.bias.normal_(2.0)                              # else a norm of what is dropped could pass
    x = random(2, 3, DIM)
    torch.manual_seed(5)
    found = vit.start(x)
    tokens = torch.cat([vit.cls.expand(2, 1, DIM), x], 1)
    torch.manual_seed(5)
    keep = F.dropout(torch.ones_like(tokens), 0.3)
    torch.testing.assert_close(found, keep * layer_norm(tokens, vit.norm_in), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer, more", [(-1, {}), (1, dict(cls=False)), (0, dict(norm_in=True))])
def test_blocks_are_pre_norm_attention_and_mlp_and_their_weights_are_those_of_the_forward_pass(layer, more):
    vit = nano_vit(**more).requires_grad_(False)
    for block in vit.blocks:                                   # far from uniform, with biases that matter
        block.qkv.weight.mul_(12)
        block.qkv.bias.normal_()
    passed = []
    vit.blocks[layer].register_forward_hook(lambda module, given, output: passed.extend([given[0], output]))
    vit(*inputs())
    expected, weights = torchs_own(vit.blocks[layer], passed[0])
    torch.testing.assert_close(vit.attention_weights(*inputs(), layer), weights, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(passed[1], expected, atol=1e-4, rtol=1e-3)
    assert weights.max() > 0.5


@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_an_absent_modality_is_embedded_as_an_input_of_zeros_or_left_out(absent):
    vit = nano_vit(absent=absent)
    for stem in vit.stems.values():
        nn.init.normal_(stem["patches"].bias)                  # a bias that matters
    video, audio = inputs()
    silent = vit.embed(video, torch.zeros_like(audio))
    blind = vit.embed(torch.zeros_like(video), audio)
    if absent == "drop":
        silent = silent[:, :NV]
        blind = blind[:, NV:]
    for given, expected in (((video, None), silent), ((None, audio), blind)):
        torch.testing.assert_close(vit.embed(*given), expected, atol=1e-6, rtol=0)
        assert vit(*given).shape == (2, 1 + expected.shape[1], DIM)


def test_sizes_and_inputs_that_do_not_fit_are_refused():
    for shape in ((5, 16, 16), (4, 20, 16), (4, 16, 12)):
        fails(ViT, "nano", dict(shape=shape, patch=(2, 8, 8)), match="--frames", error=ValueError)
    for shape in ((8, 3), (3, 22)):
        audio = dict(shape=shape, patch=(4, 4))
        fails(ViT, "nano", None, audio, match="smaller than a patch", error=ValueError)
    for shape in ((9, 22), (8, 1)):                            # other mel bins; shorter than a patch
        fails(nano_vit(), audio=random(1, 1, *shape), match=f"{shape[0]}, {shape[1]}", error=ValueError)
    fails(nano_vit(), video=random(1, 3, 4, 16, 24), match="4, 16, 24", error=ValueError)
    for lacks in ("video", "audio"):
        fails(nano_vit(**{lacks: None}), *inputs(), match=lacks, error=ValueError)


def test_each_level_goes_through_its_own_norm_or_where_it_has_none_through_the_last_one():
    vit = nano_vit(cls=False, levels=[0, 2]).requires_grad_(False)
    norms = [vit.norms["0"], vit.norm_out, vit.norms["2"], vit.norm_out]
    for number, norm in enumerate(norms):
        norm.weight.normal_(number + 1.0)                      # or all would be the same
        norm.bias.normal_()
    x = vit.embed(*inputs())
    outputs = []
    for block, norm in zip(vit.blocks, norms):
        x = block(x)
        outputs.append(layer_norm(x, norm))
    for layers in ([0, 2, 3], [3, 1]):
        expected = torch.cat([outputs[n] for n in layers], -1)
        torch.testing.assert_close(vit(*inputs(), layers=layers), expected, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_computes_each_block_twice_with_the_same_dropout():
    gradients = []
    for checkpoint in (False, True):
        vit = nano_vit(dropout=0.1, checkpoint=checkpoint).train()
        count = []
        vit.blocks[0].fc1.register_forward_hook(lambda *args, count=count: count.append(1))
        torch.manual_seed(1)
        vit(*inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
        assert len(count) == 1 + checkpoint
    torch.testing.assert_close(*gradients)


def test_an_mlp_has_gelu_and_perhaps_batchnorm_between_its_linear_maps():
    for norm, between in ((True, ["BatchNorm1d", "GELU"]), (False, ["GELU"])):
        kinds = [type(module).__name__ for module in common.mlp(6, [8, 8, 5], norm)]
        assert kinds == 2 * ["Linear", *between] + ["Linear"]


# ---- Masks ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [(8, 64), (14, 14), (64, 8)])
@pytest.mark.parametrize("scale, aspect", [
    ((0.15, 0.2), (0.75, 1.5)), ((0.7, 0.7), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0)),
    ((0.05, 0.075), (0.2, 5.0))])
def test_a_block_has_the_area_that_was_drawn_although_the_grid_cuts_its_sides(grid, scale, aspect):
    rng = np.random.default_rng(0)
    for share in np.linspace(*scale, 9):
        for _ in range(50):
            height, width = common.block_size(rng, grid, (share, share), aspect)
            assert 1 <= height <= grid[0] and 1 <= width <= grid[1]
            half_a_line = max(height, width) / 2 + 1e-9        # what rounding a side can add or take
            assert abs(height * width - share * math.prod(grid)) <= half_a_line


PLACES = placements((6, 9), (3, 4))                            # (24, 6, 9)


def place_of(block):
    """The number of the place where a block lies, once it is seen to be one rectangle of that size."""
    assert block.dtype == bool
    number, = np.flatnonzero((PLACES == block).all((1, 2)))
    return int(number)


def chi_squared(draws, values):
    counts = [draws.count(value) for value in values]
    expected = len(draws) / len(values)
    return ((np.array(counts) - expected) ** 2 / expected).sum()


def test_each_place_of_a_block_that_fits_is_equally_likely():
    rng = np.random.default_rng(2)
    places = [place_of(common.random_block(rng, (6, 9), (3, 4))) for _ in range(6000)]
    assert chi_squared(places, range(24)) < 60                 # p < 1e-4


def test_a_block_apart_overlaps_least_and_each_such_place_is_equally_likely():
    rng = np.random.default_rng(4)
    for _ in range(20):
        mask = rng.random((6, 9)) < 0.5
        overlap = (PLACES & mask).sum((1, 2))
        assert overlap[place_of(common.block_apart(rng, mask, (3, 4)))] == overlap.min()
    mask[:, :5] = True
    mask[:, 5:] = False                                        # there 4 places have no overlap
    places = [place_of(common.block_apart(rng, mask, (3, 4))) for _ in range(2000)]
    assert chi_squared(places, range(5, 24, 6)) < 24 and len(set(places)) == 4                # p < 1e-4


MASK = np.zeros((5, 7), bool)
MASK[1:4, 2:6] = True                                          # 12 hidden


@pytest.mark.parametrize("count", [0, 1, 6, 12, 20, 35])
def test_meet_count_hides_exactly_the_count_and_only_adds_or_only_removes(count):
    before = MASK.copy()
    keep = np.zeros((5, 7), bool)
    keep[2, 3] = count > 0
    for seed, kept in itertools.product(range(20), (None, keep)):
        out = common.meet_count(np.random.default_rng(seed), MASK, count, kept)
        assert out.shape == MASK.shape and out.dtype == bool and out.sum() == count
        assert not (out & ~MASK if count <= 12 else MASK & ~out).any()
        assert kept is None or not (keep & ~out).any()
    assert (MASK == before).all() and not np.shares_memory(out, MASK)


@pytest.mark.parametrize("count, where, share", [(5, MASK, 5 / 12), (20, ~MASK, 8 / 23)])
def test_meet_count_treats_all_places_alike(count, where, share):
    rng = np.random.default_rng(0)
    hidden = np.mean([common.meet_count(rng, MASK, count)[where] for _ in range(4000)], 0)
    np.testing.assert_allclose(hidden, share, atol=5 * math.sqrt(share * (1 - share) / 4000))


# ---- EMA, schedules, health, weight decay --------------------------------------------------------------

def test_ema_leaves_buffers_alone():
    target = common.mlp(4, (6, 3))
    online = common.mlp(4, (6, 3))
    online(random(50, 4))                                      # moves BatchNorm's running mean
    buffers = {name: x.clone() for name, x in target.named_buffers()}
    common.ema_update(target, online, 0.9)
    assert same(dict(target.named_buffers()), buffers)
    assert not torch.equal(online[1].running_mean, target[1].running_mean)


def test_the_running_mean_is_the_mean_so_far_then_forgets_in_a_hundred_steps_and_skips_what_has_no_weight():
    running = common.RunningMean(3)
    weighted = common.RunningMean(3)
    x = random(150, 5, 3)
    expected = torch.zeros(3)
    for step, batch in enumerate(x):
        running.update(batch, step)
        weighted.update(torch.cat([batch, random(2, 3)]), step, torch.tensor([2.0, 2, 2, 2, 2, 0, 0]))
        expected = x[:step + 1].mean((0, 1)) if step < 100 else 0.99 * expected + 0.01 * batch.mean(0)
        torch.testing.assert_close(running.mean, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weighted.mean, running.mean, atol=1e-5, rtol=1e-4)
    before = weighted.mean.clone()
    weighted.update(x[0], 150, torch.zeros(5))                 # no clip has it
    assert torch.equal(weighted.mean, before)


@pytest.mark.parametrize("first, then", [(1, 3), (3, 1)])
def test_the_running_mean_weighs_all_alike_where_a_run_goes_on_in_other_micro_batches(first, then):
    running = common.RunningMean(3)
    x = random(8, 6, 3)
    for step, batch in enumerate(x):
        accumulate = first if step < 5 else then
        for micro, part in enumerate(batch.chunk(accumulate)):
            running.update(part, step * accumulate + micro)
    torch.testing.assert_close(running.mean, x.mean((0, 1)))


def test_a_schedule_stays_at_its_end_and_a_run_of_one_step_trains():
    assert common.cosine(80, 50, 0.05, 0.0) == pytest.approx(0)
    assert common.warmup_cosine(0, 1, 1, 3.0) == 3.0


def test_health_is_the_std_and_exp_of_the_entropy_of_the_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    ones = torch.ones(50, 1)
    centred = torch.linalg.qr(torch.cat([ones, random(50, 4)], 1))[0][:, 1:]   # columns of mean 0
    z = centred * values @ torch.linalg.qr(random(6, 6, seed=1))[0][:, :4].T + 3
    p = values.numpy() / 8
    std, rank = common.health(z)
    assert rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert std == pytest.approx(z.numpy().std(0, ddof=1).mean(), rel=1e-3)
    assert common.health(torch.zeros(64, 16)) == pytest.approx((0, 1))


def test_weight_decay_takes_linear_maps_and_convolutions_and_spares_all_else():
    model = nn.ModuleList([nano_vit(norm_in=True), nn.Linear(8, 1), nn.Linear(1, 8), nn.Linear(3, 3)])
    model[3].requires_grad_(False)                             # a frozen map is in no group
    decayed, spared = common.weight_decay_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    matrices = (nn.Linear, nn.Conv2d, nn.Conv3d)
    maps = {id(m.weight) for m in model.modules() if isinstance(m, matrices)} - {id(model[3].weight)}
    assert {id(p) for p in decayed["params"]} == maps
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in spared["params"]} == trained - maps
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)
    decayed, spared = common.weight_decay_groups(model, 0.05, everywhere=True)
    assert {id(p) for p in decayed["params"]} == trained and len(decayed["params"]) == len(trained)
    assert not spared["params"]


# ---- A checkpoint's encoder ----------------------------------------------------------------------------

CROSS = ("a->v", "v->a", "av->v")


def rewrite(folder, encoder=None, **other):
    """Change entries of a checkpoint, and arguments of its encoder."""
    content = torch.load(folder / "latest.pt")
    content["encoder"].update(encoder or {})
    torch.save({**content, **other}, folder / "latest.pt")


def weights_of(folder, part):
    """The weights of a part of the checkpoint's model."""
    model = torch.load(folder / "latest.pt")["model"]
    return {name.removeprefix(part + "."): x for name, x in model.items() if name.startswith(part + ".")}


def clip(encoder):
    """Two clips that the encoder takes."""
    return [random(2, common.CHANNELS[m], *shape, seed=3) for m, shape in encoder.vit.shape.items()]


CHANGED = [                                                    # of a checkpoint, and what is said
    (dict(step=-1), "it is at step -1 of 3"), (dict(step=900, steps=40), "it is at step 900 of 40"),
    (dict(step=1.5), "it is at step 1.5 of 3"), (dict(step="3"), "it is at step '3' of 3"),
    (dict(step=True), "it is at step True"), (dict(steps=None), "it is at step 3 of None"),
    (dict(args=dict(seed="x")), "its seed is 'x'"), (dict(args={}), "its seed is None"),
    (dict(args=[]), "its 'args' is of type list"), (dict(recipe=None), "its 'recipe' is of type NoneType"),
    (dict(optimizer=[1]), "its 'optimizer' is of type list"), (dict(projector=7), "its 'projector' is of"),
    (dict(cross=[7]), "its 'cross' is of type list"), (dict(inputs="text"), "its 'inputs' is of type str"),
    (dict(model={"target_encoder.x": 3}), "its 'model' holds something else than weights"),
    (dict(method={**METHOD, "weights": 3}), "the 'weights' of its method is 3"),
    (dict(inputs=dict(colour=1)), "its inputs have a field 'colour'"),
    (dict(step=30, steps=40, recipe=dict(steps=12)), "it is at step 30 of 40, while its recipe has 12"),
    (dict(inputs=dict(log="sqrt")), "the 'log' of its inputs is 'sqrt'"),
    *[(dict(inputs=change), "its inputs make no clip (") for change in (
        dict(hop=None), dict(hop="160"), dict(hop=0), dict(hop=-5), dict(seconds=math.nan),
        dict(seconds=-1.0), dict(size=0), dict(sample_rate="x"), dict(mel_mean=(1.0, "x")),
        dict(mel_mean=math.nan), dict(mel_std=0.0), dict(mel_std=3 * (1.0,)), dict(window="square"),
        dict(n_fft=-5))],
    *[(dict(inputs=change), "its 'encoder' or 'projector' describes no network") for change in (
        dict(frames=4), dict(frames="x"), dict(seconds=3.0))],
    (dict(encoder=dict(size="colossal")), "its 'encoder' or 'projector' describes no network"),
    (dict(encoder=dict(wheels=4)), "its 'encoder' or 'projector' describes no network"),
    (dict(encoder=dict(video=dict(shape="x"))), "its 'encoder' or 'projector' describes no network"),
    (dict(projector=["x"]), "its 'encoder' or 'projector' describes no network"),
]


@pytest.mark.parametrize("change, sentence", CHANGED, ids=str)
def test_a_checkpoint_whose_entries_are_not_what_a_run_writes_is_refused_by_what_is_wrong(
        tmp_path, change, sentence):
    content = torch.load(write_checkpoint(tmp_path) / "latest.pt")
    for key, value in change.items():
        both = isinstance(value, dict) and key in ("inputs", "encoder")
        content[key] = {**content[key], **value} if both else value
    torch.save(content, tmp_path / "latest.pt")
    message = fails(common.load_encoder, tmp_path)
    assert message.startswith(str(tmp_path)) and f": {sentence}" in message
    if "describes" not in sentence:
        assert fails(common.load_checkpoint, tmp_path, "made_up") == message


def test_a_checkpoint_whose_inputs_lack_a_field_is_refused(tmp_path):
    content = torch.load(write_checkpoint(tmp_path) / "latest.pt")
    del content["inputs"]["window"]
    torch.save(content, tmp_path / "latest.pt")
    fails(common.load_encoder, tmp_path, match="its inputs lack a field 'window'")


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")               # a tensor, indexed by a name
def test_what_is_no_checkpoint_of_ours_is_refused_with_a_sentence(tmp_path):
    file = tmp_path / "latest.pt"
    for missing in (tmp_path, file, tmp_path / "nowhere", 300 * "x", "a\0"):
        fails(common.load_checkpoint, missing, match="no such checkpoint")
    write_checkpoint(tmp_path)
    whole = file.read_bytes()
    trap = f"cos\nmkdir\n(V{tmp_path / 'sprung'}\ntR.".encode()               # makes a folder when loaded
    for content in (whole[:-100], whole[:10], b"", b"step,loss\n0,1\n", b"\x80\x02junk", trap):
        file.write_bytes(content)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    write_checkpoint(tmp_path)
    content = torch.load(file)
    parts = []
    for part in ("recipe", "step", "model"):
        parts.append({key: x for key, x in content.items() if key != part})
    nameless = {**content, "method": {"title": "?"}}
    for other in ([1, 2], torch.zeros(3), {"state_dict": {}}, "text", None, nameless, *parts):
        torch.save(other, file)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    assert not (tmp_path / "sprung").exists()                  # weights_only: nothing ran


def test_weights_of_another_size_or_name_are_refused_with_a_sentence():
    layer = nn.Linear(3, 2)
    fails(common.load_weights, layer, nn.Linear(3, 4).state_dict(), "runs/x", match="runs/x.*another shape")
    fails(common.load_weights, layer, {"weight": layer.weight}, "runs/x", match="runs/x.*other names")
    for bad in (torch.tensor([0.0, math.nan]), torch.tensor([1, 2])):
        other = {**layer.state_dict(), "bias": bad}
        fails(common.load_weights, layer, other, "runs/x", match="runs/x: 'bias' in the file holds something")


def test_load_encoder_gives_the_evaluated_encoder_and_the_projector_frozen(tmp_path):
    write_checkpoint(tmp_path, projector=[16, 8])
    rewrite(tmp_path, encoder=dict(dropout=0.5))
    encoder = common.load_encoder(tmp_path / "latest.pt")
    head = nn.Sequential(encoder, nn.Identity()).train()
    assert head.training and not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert same(encoder(*clip(encoder)), encoder(*clip(encoder)))              # no dropout
    encoder.projector(random(8, DIM))                          # BatchNorm's running mean stays
    assert same(dict(encoder.vit.state_dict()), weights_of(tmp_path, METHOD["weights"]))
    assert same(dict(encoder.projector.state_dict()), weights_of(tmp_path, "projector"))
    context = common.load_encoder(tmp_path, weights="context").vit.state_dict()
    assert same(dict(context), weights_of(tmp_path, "context_encoder"))
    rewrite(tmp_path, method={**METHOD, "weights": "encoder"})                 # a method without a teacher
    fails(common.load_encoder, tmp_path, match="no encoder of its own")


@pytest.mark.parametrize("projector", [None, [8]])             # with one there is a CLS token
@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_a_loaded_encoder_returns_the_tokens_of_what_it_was_given_video_first(tmp_path, absent, projector):
    encoder = common.load_encoder(write_checkpoint(tmp_path, projector=projector), absent=absent)
    vit = encoder.vit
    video, audio = clip(encoder)
    pictures = vit.num("video")
    for given in (dict(video=video, audio=audio), dict(video=video), dict(audio=audio)):
        x = vit(**given)
        expected = x if vit.cls is None else x[:, 1:]
        if absent == "zero" and len(given) == 1:               # both ran
            expected = expected[:, :pictures] if "video" in given else expected[:, pictures:]
        tokens, embedding = encoder(**given)
        assert torch.equal(tokens, expected)
        assert torch.equal(embedding, expected.mean(1) if vit.cls is None else x[:, 0])
    fails(encoder, match="neither")


@pytest.mark.parametrize("lacks", ["video", "audio"])
def test_a_loaded_encoder_of_one_modality_returns_all_its_tokens(tmp_path, lacks):
    encoder = common.load_encoder(write_checkpoint(tmp_path, **{lacks: False}), absent="zero")
    modality, = encoder.vit.shape
    given = {modality: clip(encoder)[0]}
    assert same(encoder(**given), encoder.vit.read_out(encoder.vit(**given)))


def test_load_encoder_gives_the_predictors_from_one_input_to_another(tmp_path):
    write_checkpoint(tmp_path, cross=CROSS)
    encoder = common.load_encoder(tmp_path, cross=True)
    for name in CROSS:
        assert same(encoder.cross[name].state_dict(), weights_of(tmp_path, f"cross.{name}"))
    assert same(encoder.teacher.vit.state_dict(), weights_of(tmp_path, "target_encoder"))
    assert set(encoder.cross) == set(CROSS) and not any(p.requires_grad for p in encoder.parameters())
    for how in (dict(), dict(cross=True, layers=[0, 1])):      # not asked for; they read the last layer alone
        encoder = common.load_encoder(tmp_path, **how)
        assert encoder.cross is None and encoder.teacher is None
    assert encoder.dim == 2 * DIM and encoder(*clip(encoder))[1].shape == (2, 2 * DIM)
    fails(common.load_encoder, tmp_path, layers=[0, 4], match="--layers 4")


@pytest.mark.parametrize("more", [dict(projector=[16, 8]), dict(cross=CROSS)])
def test_what_stands_on_an_untrained_encoder_is_as_training_initialised_it(tmp_path, more):
    content = common.load_checkpoint(write_checkpoint(tmp_path, **more))
    before = torch.get_rng_state()
    encoder = common.load_encoder(tmp_path, untrained=True, cross=True)
    assert torch.equal(torch.get_rng_state(), before)          # the caller's stream stays as it was
    common.seed_step(content["args"]["seed"], 0)               # as a script does: the encoder, then the rest
    vit = ViT(**content["encoder"])
    assert same(encoder.vit.state_dict(), vit.state_dict())
    if "projector" in more:
        assert same(encoder.projector.state_dict(), common.mlp(DIM, [16, 8]).state_dict())
    else:
        first = common.mlp(DIM, content["cross"]["a->v"], norm=False)
        assert same(encoder.cross["a->v"].state_dict(), first.state_dict())
        assert same(encoder.teacher.vit.state_dict(), vit.state_dict())


# ---- A command -----------------------------------------------------------------------------------------

def test_the_random_stream_is_a_function_of_seed_step_and_rank():
    def draw(*key):
        common.seed_step(*key)
        return tuple(torch.rand(4).tolist())

    keys = list(itertools.product((0, 1, 2 ** 31), (0, 1, 10 ** 6), (0, 1, 31)))
    first = [draw(*key) for key in keys]
    assert [draw(*key) for key in reversed(keys)] == first[::-1] and len(set(first)) == len(keys)


@pytest.mark.parametrize("end, code, line", [
    (partial(common.check_range, "--lam", 7, 0, 1), 2, "error: --lam 7 is out of range: from 0 to 1\n"),
    (partial(common.check_range, "--mel-std", math.nan, 0, 1), 2,
     "error: --mel-std nan is out of range: from 0 to 1\n"),
    (partial(signal.raise_signal, signal.SIGINT), 130, ""),
    (partial(signal.raise_signal, signal.SIGHUP), 129, ""),
    (partial(signal.raise_signal, signal.SIGTERM), 143, "")])
def test_a_command_ends_with_an_exit_code_at_most_one_line_and_its_group_gone_after_its_model(
        end, code, line, handlers, capsys, monkeypatch):
    def destroy():
        for number in common.SIGNALS:                          # they change nothing any more
            signal.raise_signal(number)
        models.append(models[0]())

    models = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)

    def main():
        model = nn.Linear(1, 1)
        models.append(weakref.ref(model))
        end()

    with pytest.raises(SystemExit) as e:
        common.main_guard(main)
    assert e.value.code == code and capsys.readouterr() == ("", line)
    assert models[1:] == [None]


def test_a_fault_of_ours_keeps_its_traceback(handlers):
    with pytest.raises(ZeroDivisionError):
        common.main_guard(lambda: 1 / 0)
    common.main_guard(lambda: None)                            # and a good end ends quietly


def test_a_hangup_that_is_ignored_as_under_nohup_stays_ignored(handlers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    common.main_guard(partial(signal.raise_signal, signal.SIGHUP))
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_signal_comes_after_the_block_that_holds_it(handlers):
    done = []
    with pytest.raises(KeyboardInterrupt):
        with common.signals_held():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
    assert done and signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]


def test_a_terminal_that_lacks_the_letters_shows_the_rest(handlers, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    tell("ü")                                                  # in a notebook
    common.main_guard(lambda: tell("dög"))
    sys.stdout.flush()
    assert b"d\\xf6g" in shown.getvalue()


SCRIPTS = sorted(file.name for file in ROOT.glob("*.py") if "main_guard(main)\n" in file.read_text()[-60:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_a_command_imports_ends_it_without_a_word(script, tmp_path):
    (tmp_path / "numpy.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / script], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


FAULT = """
import sys
sys.path.insert(0, sys.argv[1])
import common, run, torch
def main():
    process = run.start_process("cpu")
    model = process.wrap(torch.nn.Linear(2, 1))
    model(torch.ones(1, 2)).sum().backward()
    if process.rank == int(sys.argv[2]):
        model = 1 / 0 + model
    model(torch.ones(1, 2)).sum().backward()
common.main_guard(main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_ours_on_one_of_two_ranks_ends_with_its_traceback_and_does_not_hang(tmp_path, rank):
    (tmp_path / "fault.py").write_text(FAULT)
    done = command([sys.executable, "fault.py", str(ROOT), str(rank)], tmp_path, ranks=2, seconds=20)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


# ---- Pieces to copy -------------------------------------------------------------------------------------

IMPORTS = """
import ast, atexit, importlib, os, random, signal, sys, threading, warnings
import matplotlib, numpy, torch

folder, *names = sys.argv[1:]
for name in names:                                             # first what is not ours and ours import
    for node in ast.parse(open(folder + "/" + name.replace(".", "/") + ".py").read()).body:
        line = ast.unparse(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and line.replace(".", " ").split()[1] not in ours:
            exec(line)

def state():
    draws = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    compute = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    signals = [signal.getsignal(number) for number in signal.valid_signals()]
    figures = dict(matplotlib.rcParams), list(warnings.filters)
    hooks = sys.excepthook, sys.stdout, atexit._ncallbacks(), threading.active_count()
    return dict(os.environ), os.getcwd(), list(sys.path), draws, compute, signals, figures, hooks

sys.path.insert(0, folder)
for name in names:
    before = state()
    importlib.import_module(name)
    if state() != before:
        print(name)
"""


def test_no_import_changes_anything_in_the_callers_process():
    files = [*ROOT.glob("*.py"), *ROOT.glob("datasets/*.py")]
    names = sorted(str(file.relative_to(ROOT).with_suffix("")).replace(os.sep, ".") for file in files)
    assert {"common", "run", "probe", "mjepa", "datasets.toy"} <= set(names)
    ours = f"ours = {[name.split('.')[0] for name in names]}\n"
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    words = [sys.executable, "-c", ours + IMPORTS, ROOT, *names]               # without what is set here
    done = subprocess.run(words, capture_output=True, text=True, env=kept)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def names_in(node):
    """The names that a function or class reads and does not itself define."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return read - own - {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


@pytest.mark.parametrize("piece", [
    "sigreg", "ViT", "block_size", "random_block", "block_apart", "meet_count", "split_mask"])
def test_whoever_copies_a_piece_takes_at_most_two_other_functions_or_classes_along(piece):
    body = ast.parse((ROOT / "common.py").read_text()).body
    code = {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    taken = [piece]
    for name in taken:                                         # grows while it is read
        taken += sorted((names_in(code[name]) & code.keys()) - set(taken))
    assert len(taken) <= 3, taken
