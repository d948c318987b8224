"""What common.py claims, each piece against a reference of its own: a slow loop, a quadrature, torch."""
import ast
import itertools
import math
import os
import signal
import subprocess
import sys

import common
from common import UserError, ViT, sigreg

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import METHOD, ROOT, same, write_checkpoint
from slow import block_parameters, layer_norm, patch_tokens, random, slow_levels, slow_mlp, slow_sincos

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


def fails(function, *args, match=None, error=UserError, **more):
    """The message of the error that the call raises: one sentence, on one line."""
    with pytest.raises(error, match=match) as e:
        function(*args, **more)
    message = str(e.value)
    assert message and "\n" not in message
    return message


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
def test_sigreg_and_its_gradient_are_those_of_the_formula(n, dim, scale, more):
    z = (scale * random(n, dim) + 0.3).requires_grad_()
    fast = sigreg(z, 11, *more)
    slow = slow_sigreg(z, 11, *more)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-4)
    gradient = torch.autograd.grad(slow, z)
    torch.testing.assert_close(torch.autograd.grad(fast, z), gradient, atol=1e-4, rtol=1e-3)
    assert torch.equal(sigreg(z, 3), sigreg(z, 3, 2048, 17, 5.0))              # the paper's values


def test_sigreg_approaches_the_integral_as_knots_grow():
    z = 3 * random(20, 4)
    fine = slow_sigreg(z, 5, 6, knots=2001).item()
    errors = {knots: abs(sigreg(z, 5, 6, knots).item() / fine - 1) for knots in (9, 17, 33, 257)}
    assert errors[9] > 0.1 and errors[9] > 2 * errors[17] and max(errors[33], errors[257]) < 1e-4


def test_sigreg_draws_its_directions_from_the_step_alone():
    z = random(32, 8)
    first = sigreg(z, 3, 16)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(sigreg(z, 3, 16), first) and torch.equal(torch.get_rng_state(), before)
    assert len({sigreg(z, step, 16).item() for step in range(5)}) == 5


def test_sigreg_is_float32_and_the_same_under_bf16_autocast():
    z = random(64, 16).requires_grad_()
    plain = sigreg(z, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sigreg(z, 2, 64)
        half = sigreg(z.bfloat16(), 2, 64)
    assert plain.dtype == cast.dtype == half.dtype == torch.float32
    torch.testing.assert_close(cast, plain)
    torch.testing.assert_close(half, sigreg(z.bfloat16().float(), 2, 64))
    torch.testing.assert_close(torch.autograd.grad(cast, z), torch.autograd.grad(plain, z))


# ---- Patches and positions -----------------------------------------------------------------------------

@pytest.mark.parametrize("grid, dim", [((11,), 9), ((3, 5), 22), ((2, 3, 4), 64)])
def test_sincos_is_the_formula(grid, dim):
    positions = common.Positions(grid, dim, "sincos")()
    torch.testing.assert_close(positions, slow_sincos(grid, dim), atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("kind", ["factorised", "sincos"])
def test_a_token_is_the_linear_map_of_its_patch_plus_its_position_and_its_modality(kind):
    vit = nano_vit(positions=kind).requires_grad_(False)
    for stem in vit.stems.values():
        stem["patches"].bias.normal_()
    video, audio = inputs()
    tokens = vit.embed(video, audio)
    assert vit.grids == {"video": (2, 2, 2), "audio": (2, 5)}
    assert (vit.num("video"), vit.num("audio")) == (NV, NA)
    for b in range(2):
        slow = patch_tokens(vit, {"video": video[b], "audio": audio[b]})
        torch.testing.assert_close(tokens[b], slow, atol=1e-5, rtol=1e-5)


# ---- The encoder ---------------------------------------------------------------------------------------

PAPERS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
          "huge": (1280, 32, 16), "giant": (1408, 40, 22)}     # those of the ViT papers


@pytest.mark.parametrize("size", common.SIZES)
def test_every_size_has_the_parameters_of_the_formula(size):
    dim, depth, heads, hidden = common.SIZES[size]
    assert PAPERS.get(size, (dim, depth, heads)) == (dim, depth, heads)
    with torch.device("meta"):
        video = dict(shape=(16, 224, 224), patch=(2, 16, 16))
        vit = ViT(size, video, dict(shape=(128, 801), patch=(16, 16)), cls=True, norm_in=True)
    stems = (3 * 2 * 16 * 16 + 1) * dim + (16 * 16 + 1) * dim
    places = (8 + 14 * 14) * dim + (8 + 50) * dim
    assert dim % heads == 0 and hidden / dim == pytest.approx(48 / 11 if size == "giant" else 4)
    other = (1 + 2) * dim + 2 * 2 * dim                        # CLS and modality, two norms
    total = depth * block_parameters(dim, hidden) + stems + places + other
    assert sum(p.numel() for p in vit.parameters()) == total


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


def test_a_block_is_pre_norm_attention_and_mlp():
    block = common.Block(12, 3, 20)
    x = random(2, 5, 12)
    mask = torch.eye(5, dtype=torch.bool) | (torch.rand(2, 1, 5, 5) < 0.6)
    for allowed in (None, mask):
        torch.testing.assert_close(block(x, allowed), torchs_own(block, x, allowed)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer, more", [(-1, {}), (1, dict(cls=False)), (0, dict(norm_in=True))])
def test_the_attention_weights_are_those_that_the_forward_pass_uses(layer, more):
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


def test_an_absent_modality_is_embedded_as_an_input_of_zeros():
    vit = nano_vit(absent="zero")
    for stem in vit.stems.values():
        nn.init.normal_(stem["patches"].bias)                  # a bias that matters
    video, audio = inputs()
    for given in ((None, audio), (video, None)):
        zeros = [torch.zeros_like(x) if y is None else x for x, y in zip((video, audio), given)]
        torch.testing.assert_close(vit.embed(*given), vit.embed(*zeros), atol=1e-6, rtol=0)
        torch.testing.assert_close(vit(*given), vit(*zeros), atol=1e-4, rtol=0)
        assert vit(*given).shape == (2, 1 + NV + NA, DIM)


def test_drop_runs_only_the_tokens_of_what_is_there():
    vit = nano_vit(absent="drop")
    video, audio = inputs()
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    for given in ((video, audio), (video, None), (None, audio)):
        vit(*given)
    assert seen == [1 + NV + NA, 1 + NV, 1 + NA]


def test_visible_runs_exactly_those_tokens():
    vit = nano_vit(cls=False)
    tokens = vit.embed(*inputs())
    visible = torch.stack([torch.randperm(NV + NA)[:7] for _ in range(2)])
    for x in (vit(*inputs(), visible=visible), vit(tokens=tokens, visible=visible)):
        for b in range(2):
            slow, = slow_levels(vit, torch.stack([tokens[b, i] for i in visible[b]]))
            torch.testing.assert_close(x[b], slow, atol=1e-5, rtol=1e-5)


def test_each_level_goes_through_its_own_norm_and_the_last_one_through_that_of_the_output():
    vit = nano_vit(cls=False, levels=[0, 2]).requires_grad_(False)
    norms = {0: vit.norms["0"], 1: vit.norm_out, 2: vit.norms["2"], 3: vit.norm_out}   # 1 has no own one
    for number, norm in norms.items():
        norm.weight.normal_(number + 1.0)                      # or all would be the same
        norm.bias.normal_()
    x = vit.embed(*inputs())
    outputs = []
    for number, block in enumerate(vit.blocks):
        x = block(x)
        outputs.append(layer_norm(x, norms[number]))
    for layers in ([0, 2, 3], [2], [3, 0], [1, 2]):
        expected = torch.cat([outputs[n] for n in layers], -1)
        torch.testing.assert_close(vit(*inputs(), layers=layers), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit(*inputs()), outputs[3], atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_computes_each_block_twice_and_changes_neither_output_nor_gradient():
    results = []
    for checkpoint in (False, True):
        vit = nano_vit(dropout=0.1, checkpoint=checkpoint).train()
        count = []
        vit.blocks[0].fc1.register_forward_hook(lambda *args, count=count: count.append(1))
        torch.manual_seed(1)
        x = vit(*inputs())
        x.square().mean().backward()
        results.append((x, {name: p.grad for name, p in vit.named_parameters()}))
        assert len(count) == 1 + checkpoint
    torch.testing.assert_close(results[0], results[1])


def test_an_mlp_is_linear_maps_with_gelu_and_perhaps_batchnorm_between():
    plain = common.mlp(6, [8, 8, 5], norm=False)
    x = random(3, 6)
    torch.testing.assert_close(plain(x), torch.stack([slow_mlp(plain, row) for row in x]))
    kinds = [type(module).__name__ for module in common.mlp(6, [8, 8, 5])]
    assert kinds == 2 * ["Linear", "BatchNorm1d", "GELU"] + ["Linear"]


# ---- Masks ---------------------------------------------------------------------------------------------

GRIDS = [(8, 64), (14, 14), (64, 8)]
DRAWS = [((0.15, 0.2), (0.75, 1.5)), ((0.7, 0.7), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0)),
         ((0.05, 0.075), (0.2, 5.0))]                          # scale and aspect


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale, aspect", DRAWS)
def test_a_block_has_the_area_that_was_drawn_although_the_grid_cuts_its_sides(grid, scale, aspect):
    rng = np.random.default_rng(0)
    for share in np.linspace(*scale, 9):
        for _ in range(50):
            height, width = common.block_size(rng, grid, (share, share), aspect)
            assert 1 <= height <= grid[0] and 1 <= width <= grid[1]
            half_a_line = max(height, width) / 2 + 1e-9        # what rounding a side can add or take
            assert abs(height * width - share * math.prod(grid)) <= half_a_line


def place_of(block, size):
    """The top left corner of a block, once it is seen to be one rectangle of that size."""
    top, left = np.argwhere(block)[0]
    assert block.dtype == bool and block.sum() == math.prod(size)
    assert block[top:top + size[0], left:left + size[1]].all()
    return int(top), int(left)


def chi_squared(draws, values):
    counts = [draws.count(value) for value in values]
    expected = len(draws) / len(values)
    return ((np.array(counts) - expected) ** 2 / expected).sum()


def test_each_place_of_a_block_that_fits_is_equally_likely():
    rng = np.random.default_rng(2)
    places = [place_of(common.random_block(rng, (6, 9), (3, 4)), (3, 4)) for _ in range(6000)]
    assert chi_squared(places, list(np.ndindex(4, 6))) < 60    # 23 degrees of freedom: p < 1e-4


def test_a_block_apart_overlaps_least_and_each_such_place_is_equally_likely():
    rng = np.random.default_rng(4)
    for _ in range(20):
        mask = rng.random((6, 9)) < 0.5
        overlap = {}
        for top, left in np.ndindex(4, 6):
            overlap[top, left] = mask[top:top + 3, left:left + 4].sum()
        place = place_of(common.block_apart(rng, mask, (3, 4)), (3, 4))
        assert overlap[place] == min(overlap.values())
    mask[:, :5] = True
    mask[:, 5:] = False                                        # 3 x 4 then fits at 4 places without overlap
    blocks = [common.block_apart(rng, mask, (3, 4)) for _ in range(2000)]
    assert not np.any(blocks & mask)
    assert chi_squared([place_of(b, (3, 4))[0] for b in blocks], range(4)) < 24               # p < 1e-4


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


def test_split_mask_gives_the_visible_and_the_hidden_tokens_each_in_order():
    rng = np.random.default_rng(0)
    hidden = np.stack([rng.permutation(20) < 8 for _ in range(3)])
    visible, targets = common.split_mask(hidden)
    for row in range(3):
        assert visible[row].tolist() == np.flatnonzero(~hidden[row]).tolist()
        assert targets[row].tolist() == np.flatnonzero(hidden[row]).tolist()
    x = random(3, 20, 4)
    assert torch.equal(common.gather(x, targets)[1, 2], x[1, targets[1, 2]])


# ---- EMA, schedules, health, weight decay --------------------------------------------------------------

def test_ema_after_k_steps_is_the_closed_form_and_leaves_buffers_alone():
    target = common.mlp(4, (6, 3))
    online = common.mlp(4, (6, 3))
    online(random(50, 4))                                      # moves BatchNorm's running mean
    buffers = {name: x.clone() for name, x in target.named_buffers()}
    taus = [0.9, 0.5, 0.996, 0.0, 0.8, 0.99]
    shares = [(1 - tau) * math.prod(taus[k + 1:]) for k, tau in enumerate(taus)]
    expected = [math.prod(taus) * p.detach().double() for p in target.parameters()]
    for tau, share in zip(taus, shares):
        for p, mean in zip(online.parameters(), expected):
            p.data += random(*p.shape)
            mean += share * p.detach().double()
        common.ema_update(target, online, tau)
    for p, mean in zip(target.parameters(), expected):
        torch.testing.assert_close(p.detach().double(), mean, atol=1e-5, rtol=1e-5)
        assert p.grad_fn is None
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


def test_schedules_begin_where_they_are_told_and_end_at_the_last_step():
    """Their formulas: test_formulas.py."""
    lr = [common.warmup_cosine(step, 100, 15, 5e-4, start=1e-5, end=1e-6) for step in range(100)]
    assert lr[0] == pytest.approx(1e-5 + 4.9e-4 / 15)
    assert [lr[14], lr[15], lr[99]] == pytest.approx([5e-4, 5e-4, 1e-6])
    assert common.cosine(80, 50, 0.05, 0.0) == pytest.approx(0)                # and stays there
    assert common.warmup_cosine(0, 1, 1, 3.0) == 3.0           # a run of one step trains


def test_health_is_the_std_and_exp_of_the_entropy_of_the_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    ones = torch.ones(50, 1)
    centred = torch.linalg.qr(torch.cat([ones, random(50, 4)], 1))[0][:, 1:]   # columns of mean 0
    z = centred * values @ torch.linalg.qr(random(6, 6, seed=1))[0][:, :4].T + 3
    p = values.numpy() / 8
    std, rank = common.health(z)
    assert rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert std == pytest.approx(z.numpy().std(0, ddof=1).mean(), rel=1e-3)
    assert common.health(2.5 * random(40000, 16) + 7) == pytest.approx((2.5, 16), rel=0.01)
    assert common.health(random(300, 1) * random(1, 16, seed=1) + 1)[1] == pytest.approx(1, abs=0.01)
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


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")               # a tensor, indexed by a name
def test_what_is_no_checkpoint_of_ours_is_refused_with_a_sentence(tmp_path):
    file = tmp_path / "latest.pt"
    for missing in (tmp_path, file, tmp_path / "nowhere"):
        fails(common.load_checkpoint, missing, match="no such checkpoint")
    write_checkpoint(tmp_path)
    whole = file.read_bytes()
    trap = f"cos\nmkdir\n(V{tmp_path / 'sprung'}\ntR.".encode()               # makes a folder when loaded
    cut_off = [whole[:len(whole) // 2], whole[:-100], whole[:10], b""]
    for content in (*cut_off, b"step,loss\n0,1\n", b"\x80\x02junk", trap):
        file.write_bytes(content)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    for other in ([1, 2], torch.zeros(3), {"state_dict": {}}, "text", None):
        torch.save(other, file)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    assert not (tmp_path / "sprung").exists()                  # weights_only: nothing ran


def test_a_checkpoint_of_another_method_or_of_an_older_version_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    for path in (tmp_path, tmp_path / "latest.pt"):
        assert common.load_checkpoint(path, METHOD["name"])["method"] == METHOD
    message = fails(common.load_checkpoint, tmp_path, "mjepa")
    assert METHOD["name"] in message and "mjepa" in message
    rewrite(tmp_path, version="0.1.0+abc", method="avjepa_lejepa")             # as the first version wrote it
    assert "--fresh" in fails(common.load_checkpoint, tmp_path, match="0.1.0")
    fails(common.load_encoder, tmp_path, match="0.1.0")


def test_weights_of_another_size_or_name_are_refused_with_a_sentence():
    layer = nn.Linear(3, 2)
    fails(common.load_weights, layer, nn.Linear(3, 4).state_dict(), "runs/x", match="runs/x.*another shape")
    fails(common.load_weights, layer, {"weight": layer.weight}, "runs/x", match="runs/x.*other names")


def test_load_encoder_gives_the_evaluated_encoder_frozen_and_what_the_method_says_of_itself(tmp_path):
    write_checkpoint(tmp_path, projector=[16, 8])
    rewrite(tmp_path, encoder=dict(dropout=0.5))
    encoder = common.load_encoder(tmp_path)
    assert encoder.method == METHOD and encoder.inputs == common.load_checkpoint(tmp_path)["inputs"]
    assert encoder.step == 3 and encoder.dim == DIM
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
    cls = vit.cls is not None
    pictures = cls + vit.num("video")
    zeros = absent == "zero"                                   # both modalities run, the absent one as zeros
    of_video = vit(video, torch.zeros_like(audio) if zeros else None)[:, cls:pictures]
    of_audio = vit(torch.zeros_like(video) if zeros else None, audio)
    heard = of_audio[:, pictures:] if zeros else of_audio[:, cls:]
    for given, expected in (((video, audio), vit(video, audio)[:, cls:]), ((video, None), of_video),
                            ((None, audio), heard)):
        tokens, embedding = encoder(*given)
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
        mean = vit(*given)[:, 0] if cls else expected.mean(1)
        torch.testing.assert_close(embedding, mean, atol=1e-5, rtol=1e-5)
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
    rewrite(tmp_path, cross={name: [64] for name in (*CROSS, "a->av")})
    fails(common.load_encoder, tmp_path, cross=True, match="other names")


@pytest.mark.parametrize("more", [dict(projector=[16, 8]), dict(cross=CROSS)])
def test_an_untrained_encoder_is_as_training_initialised_it(tmp_path, more):
    write_checkpoint(tmp_path, **more)
    content = common.load_checkpoint(tmp_path)
    torch.manual_seed(123)                                     # the caller's stream stays as it was
    before = torch.get_rng_state()
    encoder = common.load_encoder(tmp_path, untrained=True, cross=True)
    assert torch.equal(torch.get_rng_state(), before)
    common.seed_step(content["args"]["seed"], 0)               # as a script does: the encoder, then the rest
    vit = ViT(**content["encoder"])
    assert same(encoder.vit.state_dict(), vit.state_dict())
    assert not same(encoder.vit.state_dict(), weights_of(tmp_path, "target_encoder"))
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


def test_check_range_returns_the_value_or_names_the_range():
    for value in (0, 0.5, 1):
        assert common.check_range("--lam", value, 0, 1) is value
    for value in (-1e-9, 1.0001, math.nan, math.inf, None):
        fails(common.check_range, "--lam", value, 0, 1, match=f"--lam {value} is out of range: from 0 to 1")


@pytest.fixture
def handler():
    """Afterwards SIGTERM is handled as before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def bad_input():
    raise UserError("--lam 7 is out of range: from 0 to 1")


def interrupted():
    raise KeyboardInterrupt


def ended():
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


@pytest.mark.parametrize("main, code, line", [
    (bad_input, 2, "error: --lam 7 is out of range: from 0 to 1\n"), (interrupted, 130, ""),
    (ended, 143, "")])
def test_a_command_ends_with_an_exit_code_and_at_most_one_line(main, code, line, handler, capsys):
    with pytest.raises(SystemExit) as e:
        common.main_guard(main)
    assert e.value.code == code and capsys.readouterr() == ("", line)


def test_a_fault_of_ours_keeps_its_traceback(handler):
    with pytest.raises(ZeroDivisionError):
        common.main_guard(lambda: 1 / 0)
    common.main_guard(lambda: None)                            # and a good end ends quietly


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
