"""What common.py and avjepa_lejepa.py claim, each against a reference of its own: a slow loop, a quadrature, torch."""
import argparse, itertools, json, math, os, signal, weakref
from dataclasses import asdict

import common, data
import avjepa_lejepa as method
from avjepa_lejepa import AVJEPA, invariance, plan_views
from common import Patches, Process, UserError, ViT, sigreg

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

CPU = Process(torch.device("cpu"))
VIDEO = dict(shape=(4, 16, 16), patch=(2, 8, 8))                # 2 x 2 x 2 = 8 tokens
AUDIO = dict(shape=(8, 22), patch=(4, 4))                       # 2 x 5 = 10 tokens, two columns are left over
NV, NA = 8, 10
AV, A, V = (True, True), (False, True), (True, False)           # what a view has: (video, audio)
MIXED = [(AV, AV, A, V), (AV, AV, V, A), (AV, AV, A, A), (AV, AV, V, V), (AV, AV, AV, V)]
PAPER = ["--data", "audioset", "--data-dir", "x", "--recipe", "paper"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(common.SIZES, "nano", (32, 2, 2, 64))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nano_config(**other):
    return dict(size="nano", video=VIDEO, audio=AUDIO, cls=True, norm_in=True, norm_out=False) | other


def nano_vit(seed=0, **other):
    common.seed_step(seed, 0)
    return ViT(**nano_config(**other)).eval()


def nano_model(seed=0, lam=0.05, **other):
    common.seed_step(seed, 0)
    return AVJEPA(nano_config(**other), (16, 16, 4), lam, 32)


def clips(count, patterns=(AV, AV, A, V), seed=0):
    """`count` clips, each a list of views (video or None, audio or None); patterns: one for all clips, or one for each."""
    each, draw = patterns if isinstance(patterns[0][0], tuple) else [patterns] * count, itertools.count(1000 * seed)

    def view(v, a):
        return (random(3, *VIDEO["shape"], seed=next(draw)) if v else None,
                random(1, *AUDIO["shape"], seed=next(draw)) if a else None)

    return [[view(*has) for has in views] for views in each]


def batch_of(views):
    """What data.collate makes of them."""
    flat = [view for clip in views for view in clip]
    parts = {name: [view[i] for view in flat if view[i] is not None] for i, name in enumerate(("video", "audio"))}
    return {**{name: torch.stack(rows) for name, rows in parts.items() if rows},
            "present": torch.tensor([[[part is not None for part in view] for view in clip] for clip in views])}


def grads(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def fails(function, *args, match=None, **kw):
    """The message of the UserError that the call raises: one sentence, on one line."""
    with pytest.raises(UserError, match=match) as e:
        function(*args, **kw)
    message = str(e.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# SIGReg
# ---------------------------------------------------------------------------------------------------------------------

def directions(step, dim, count):
    A = torch.randn(dim, count, generator=torch.Generator().manual_seed(step)).double().numpy()
    return A / np.sqrt((A ** 2).sum(0))


def slow_sigreg(z, step, num_slices, knots, t_max):
    """papers.md, section 2: trapz(|ecf - phi|^2 phi, t) x N, mean over slices; one slice and one knot after the other."""
    z, t, total = z.double().numpy(), np.linspace(-t_max, t_max, knots), 0.0
    for a in directions(step, z.shape[1], num_slices).T:
        f = []
        for t_k in t:
            phi, ecf = math.exp(-t_k ** 2 / 2), sum(np.exp(1j * t_k * (z_n @ a)) for z_n in z) / len(z)
            f.append(abs(ecf - phi) ** 2 * phi)
        total += sum((t[k + 1] - t[k]) * (f[k] + f[k + 1]) / 2 for k in range(knots - 1))
    return len(z) * total / num_slices


def integral(f, t_max=5.0, points=20001):
    t = np.linspace(-t_max, t_max, points)
    y = f(t)
    return ((y[..., 1:] + y[..., :-1]) / 2).sum(-1) * (t[1] - t[0])


@pytest.mark.parametrize("n, dim, slices, knots, t_max, scale",
                         [(9, 5, 7, 17, 5.0, 1.0), (30, 3, 4, 8, 3.0, 2.5), (2, 1, 3, 33, 4.0, 0.1)])
def test_sigreg_is_the_formula(n, dim, slices, knots, t_max, scale):
    z = scale * random(n, dim) + 0.3
    assert sigreg(z, 11, slices, knots, t_max).item() == pytest.approx(slow_sigreg(z, 11, slices, knots, t_max), rel=1e-5)


def test_sigreg_has_the_defaults_of_the_paper():
    z = random(8, 4)
    assert torch.equal(sigreg(z, 3), sigreg(z, 3, 2048, 17, 5.0))


def test_sigreg_approaches_the_integral_as_knots_grow():
    z, slices = 3 * random(20, 4), 6

    def of_a_slice(t, x):
        phi = np.exp(-t ** 2 / 2)
        return np.abs(np.exp(1j * np.outer(t, x)).mean(1) - phi) ** 2 * phi

    slices_of_z = (z.double().numpy() @ directions(5, 4, slices)).T
    fine = len(z) * np.mean([integral(lambda t, x=x: of_a_slice(t, x)) for x in slices_of_z])
    errors = [abs(sigreg(z, 5, slices, knots).item() / fine - 1) for knots in (9, 17, 25, 33, 257)]
    assert errors[0] > 0.1 and all(a > 2 * b for a, b in itertools.pairwise(errors[:4])) and max(errors[3:]) < 1e-5


@pytest.mark.parametrize("n", [64, 4096])
def test_sigreg_of_a_gaussian_batch_is_106_for_any_number_of_samples(n):
    expected = integral(lambda t: (1 - np.exp(-t ** 2)) * np.exp(-t ** 2 / 2))              # N E|ecf - phi|^2 = 1 - phi^2
    assert expected == pytest.approx(1.06, abs=0.005)
    values = [sigreg(random(n, 64, seed=step), step, 64).item() for step in range(30)]
    assert np.mean(values) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("n", [4, 100])
def test_sigreg_of_a_full_collapse_is_409_times_n(n):
    exact = integral(lambda t: (1 - np.exp(-t ** 2 / 2)) ** 2 * np.exp(-t ** 2 / 2))
    assert exact == pytest.approx(0.409, abs=5e-4)
    assert sigreg(torch.zeros(n, 6), 0, 16).item() == pytest.approx(exact * n, rel=1e-4)


def test_sigreg_is_larger_for_collapsed_than_for_gaussian_embeddings():
    z = random(64, 16)
    gaussian = sigreg(z, 0, 256)
    for collapsed in (0 * z, 0.1 * z, z[:1].expand_as(z), z[:, :1] * random(1, 16, seed=1), 5 * z):
        assert sigreg(collapsed, 0, 256) > 2 * gaussian


def test_sigreg_draws_its_directions_from_the_step_alone():
    z, values = random(32, 8), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        values.append(sigreg(z, 3, 16))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*values)
    assert len({sigreg(z, step, 16).item() for step in range(5)}) == 5


def test_sigreg_is_float32_and_the_same_under_bf16_autocast():
    z = random(64, 16).requires_grad_()
    plain = sigreg(z, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sigreg(z, 2, 64)
        half = sigreg(z.bfloat16(), 2, 64)
    assert plain.dtype == cast.dtype == half.dtype == torch.float32 and plain.shape == ()
    assert torch.equal(plain, cast) and torch.equal(half, sigreg(z.bfloat16().float(), 2, 64))
    assert torch.equal(*(torch.autograd.grad(value, z)[0] for value in (plain, cast)))


def test_sigreg_needs_no_process_group():
    assert not dist.is_initialized()
    x = random(4, 3)
    assert common.mean_over_ranks(x) is x and torch.isfinite(sigreg(x, 0, 4))


def test_sigreg_has_the_gradient_of_finite_differences():
    z = random(6, 3).requires_grad_()
    slope, = torch.autograd.grad(sigreg(z, 1, 5), z)
    for i, j in itertools.product(range(6), range(3)):
        step = torch.zeros(6, 3)
        step[i, j] = 1e-3
        high, low = (slow_sigreg(z.detach().double() + s * step, 1, 5, 17, 5.0) for s in (1, -1))
        assert slope[i, j].item() == pytest.approx((high - low) / 2e-3, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------

def joined():
    """The batch of all processes, and the layer that it goes through."""
    torch.manual_seed(0)
    return random(24, 6, seed=4), nn.Linear(6, 5)


def joined_model(local):
    """AV-JEPA with BatchNorm on its running statistics: then no sample depends on the others of its process."""
    patterns = {"modality": (AV, AV, A, V), "none": (AV, AV), "mixed": MIXED[:4]}
    return nano_model(lam=0.3).eval(), clips(4, patterns[local])


def on_a_rank(rank, folder):
    """What one of two processes does; what it finds goes into a file."""
    torch.set_num_threads(1)
    common.SIZES["nano"] = (32, 2, 2, 64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process, found = Process(torch.device("cpu"), rank, 2), {}
    x, layer = joined()
    wrapped = process.wrap(layer)                               # it must live until after the backward pass
    loss = sigreg(wrapped(x[rank::2]), 7, 32)
    loss.backward()
    found["layer"] = (loss.item(), grads(layer))
    for local in ("modality", "none", "mixed"):
        model, views = joined_model(local)
        wrapped = process.wrap(model)
        loss, parts = wrapped(batch_of(views[rank::2]), 7)
        loss.backward()
        found[local] = (parts["invariance"].item(), parts["sigreg"].item(), grads(model))
    found["any"] = [process.any(flag) for flag in (True, False, rank == 0, rank == 1)]
    stop = common.StopSignal()
    stop.came = rank == 1                                       # a SIGTERM may reach one process before the other
    try:
        found["any stop"] = process.any(stop)
    except Exception as e:
        found["any stop"] = repr(e)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_sigreg_on_two_processes_is_sigreg_of_the_joined_batch_in_value_and_gradient(ranks):
    x, layer = joined()
    loss = sigreg(layer(x), 7, 32)
    loss.backward()
    for value, gradient in (rank["layer"] for rank in ranks):
        assert value == pytest.approx(loss.item(), abs=1e-5)
        for name, g in grads(layer).items():
            torch.testing.assert_close(gradient[name], g, atol=1e-5, rtol=0)


@pytest.mark.parametrize("local", ["modality", "none", "mixed"])
def test_avjepa_on_two_processes_has_the_loss_and_gradient_of_one(ranks, local):
    model, views = joined_model(local)
    loss, parts = model(batch_of(views), 7)
    loss.backward()
    assert np.mean([rank[local][0] for rank in ranks]) == pytest.approx(parts["invariance"].item(), abs=1e-5)
    for _, value, gradient in (rank[local] for rank in ranks):
        assert value == pytest.approx(parts["sigreg"].item(), abs=1e-5)
        for name, g in grads(model).items():
            torch.testing.assert_close(gradient[name], g, atol=1e-5, rtol=1e-4)


def test_any_is_true_on_all_processes_if_it_is_true_on_one(ranks):
    assert [rank["any"] for rank in ranks] == [[True, False, True, True]] * 2


def test_a_stop_signal_at_one_process_stops_all(ranks):
    assert [rank["any stop"] for rank in ranks] == [True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Patches and positions
# ---------------------------------------------------------------------------------------------------------------------

def slow_sincos(grid, dim):
    per = dim // len(grid) // 2 * 2                                                 # channels of an axis, an even number
    out = np.zeros((math.prod(grid), dim))
    for i, place in enumerate(itertools.product(*map(range, grid))):
        for axis, x in enumerate(place):
            for k in range(per // 2):
                angle = x / 10000 ** (k / (per / 2))
                out[i, axis * per + k], out[i, axis * per + per // 2 + k] = math.sin(angle), math.cos(angle)
    return out


@pytest.mark.parametrize("grid, dim", [((11,), 8), ((11,), 9), ((3, 5), 16), ((3, 5), 22), ((2, 3, 4), 24), ((2, 3, 4), 64)])
def test_sincos_is_the_formula(grid, dim):
    out = common.sincos(grid, dim)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), slow_sincos(grid, dim), atol=1e-6)


@pytest.mark.parametrize("positions", ["factorised", "sincos"])
@pytest.mark.parametrize("shape, patch", [((16, 224, 224), (2, 16, 16)), ((128, 801), (16, 16)), ((128, 1024), (16, 16))])
def test_each_place_has_a_position_of_its_own(shape, patch, positions):
    torch.manual_seed(0)
    place = Patches(1, shape, patch, 192, positions).positions().detach()
    assert place.shape == (math.prod(n // p for n, p in zip(shape, patch)), 192)
    distance = torch.cdist(place, place) + 1e3 * torch.eye(len(place))
    assert distance.min() > 0.05


@pytest.mark.parametrize("positions", ["factorised", "sincos"])
@pytest.mark.parametrize("channels, shape, patch", [(1, (9, 14), (4, 3)), (3, (4, 6, 10), (2, 3, 5)), (2, (7, 5, 9), (3, 2, 4))])
def test_token_i_is_the_linear_map_of_patch_i_plus_its_position(channels, shape, patch, positions):
    torch.manual_seed(0)
    patches, x = Patches(channels, shape, patch, 32, positions), random(2, channels, *shape)
    grid = [n // p for n, p in zip(shape, patch)]
    weight, tokens = patches.proj.weight.flatten(1), patches(x)
    assert tokens.shape == (2, patches.num, 32) and patches.num == math.prod(grid)
    for i, place in enumerate(itertools.product(*map(range, grid))):
        cut = x[(slice(None), slice(None), *(slice(k * p, (k + 1) * p) for k, p in zip(place, patch)))]
        if positions == "sincos":
            here = torch.tensor(slow_sincos(grid, 32)[i], dtype=torch.float32)
        else:
            here = patches.positions.first[place[0], 0] + patches.positions.rest[0, np.ravel_multi_index(place[1:], grid[1:])]
        torch.testing.assert_close(tokens[:, i], cut.flatten(1) @ weight.T + patches.proj.bias + here, atol=1e-5, rtol=1e-5)


def slow_weights(block, x):
    """Per clip, head and query: exp of the scaled scores, over their sum; and the values. x (B, N, D) as it comes into the block."""
    dim, heads, d = x.shape[-1], block.heads, x.shape[-1] // block.heads
    h = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6).double().numpy()
    weight, bias = block.qkv.weight.double().numpy(), block.qkv.bias.double().numpy()
    out, values = np.zeros((len(x), heads, x.shape[1], x.shape[1])), np.zeros((len(x), heads, x.shape[1], d))
    for b, head in np.ndindex(len(x), heads):
        rows = [slice(part * dim + head * d, part * dim + head * d + d) for part in range(3)]
        q, k, values[b, head] = ([weight[some] @ token + bias[some] for token in h[b]] for some in rows)
        for i in range(len(q)):
            scores = [math.exp(q[i] @ k[j] / math.sqrt(d)) for j in range(len(k))]
            out[b, head, i] = [s / sum(scores) for s in scores]
    return torch.from_numpy(out), torch.from_numpy(values)


def steep_vit(**other):
    """Attention far from uniform, with biases that matter."""
    vit = nano_vit(**other).requires_grad_(False)
    for block in vit.transformer.blocks:
        block.qkv.weight.mul_(20), block.qkv.bias.copy_(random(len(block.qkv.bias)))
    return vit


@pytest.mark.parametrize("layer, more", [(-1, {}), (1, dict(cls=False)), (0, dict(norm_in=False)), (0, dict(cls=False, norm_out=True))])
def test_the_attention_weights_are_those_that_the_forward_pass_uses(layer, more):
    vit, video, audio, passed = steep_vit(**more), random(2, 3, *VIDEO["shape"]), random(2, 1, 8, 22), []
    block = vit.transformer.blocks[layer]
    block.register_forward_hook(lambda module, given, made: passed.append((given[0], made)))
    vit(video, audio)
    x, y = passed[0]
    (weights, values), got, n = slow_weights(block, x), vit.attention_weights(video, audio, layer).double(), x.shape[1]
    assert got.shape == (2, 2, n, n) and n == NV + NA + more.get("cls", True) and got.max() > 0.5
    torch.testing.assert_close(got, weights, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, n).double(), atol=1e-5, rtol=0)
    x = x + block.proj((got @ values).float().transpose(1, 2).flatten(2))                           # the attention branch
    torch.testing.assert_close(x + block.fc2(F.gelu(block.fc1(block.norm2(x)))), y, atol=1e-4, rtol=1e-3)


def test_the_forward_and_backward_pass_make_no_explicit_softmax(monkeypatch):
    def never(*args, **more):
        raise AssertionError("called")

    vit = nano_vit()
    monkeypatch.setattr(ViT, "attention_weights", never)
    for owner in (torch, torch.Tensor, F):
        monkeypatch.setattr(owner, "softmax", never)
    vit(random(2, 3, *VIDEO["shape"]), random(2, 1, 8, 22)).sum().backward()


def test_an_input_of_another_shape_is_refused():
    assert "(8, 22)" in fails(nano_vit(), audio=random(1, 1, 9, 22), match="9, 22")        # other mel bins
    fails(nano_vit(), audio=random(1, 1, 8, 1), match="8, 1")                               # shorter than a patch
    fails(nano_vit(), video=random(1, 3, 4, 16, 24), match="4, 16, 24")


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------

def test_the_encoder_of_the_paper_is_a_vit_base_over_1568_video_and_400_audio_tokens():
    _, recipe = method.get_args(PAPER)
    with torch.device("meta"):
        vit = ViT(**method.encoder_config(recipe, method.make_inputs(recipe)))
        out = vit(torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 801))
    assert (vit.video.num, vit.audio.num, vit.video.grid, vit.audio.grid) == (1568, 400, (8, 14, 14), (8, 50))
    assert (vit.dim, len(vit.transformer.blocks), {b.heads for b in vit.transformer.blocks}) == (768, 12, {12})
    assert {b.fc1.out_features for b in vit.transformer.blocks} == {3072}
    assert out.shape == (1, 1969, 768)
    assert isinstance(vit.norm_in, nn.LayerNorm) and isinstance(vit.norm_out, nn.Identity)      # no final LayerNorm
    assert {m.p for m in vit.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_the_paper_recipe_is_the_table_of_the_paper():
    args, recipe = method.get_args(PAPER)
    expected = dict(size="base", seconds=8.0, frames=16, image=224, resize=256, crop_scale=(0.4, 1.0), tubelet=(2, 16, 16),
                    n_mels=128, hop=160, mel_patch=(16, 16), mel_mean=-17.977, mel_std=24.468, dropout=0.1, lam=0.05, slices=2048,
                    projector=(2048, 2048, 128), batch_size=320, epochs=57, lr=5e-4, lr_end=1e-6, warmup=0.15, weight_decay=0.05,
                    clip_grad=5.0)
    assert {name: recipe[name] for name in expected} == expected and (args.absent, args.local) == ("zero", "modality")
    assert method.get_args(["--data", "vggsound", "--data-dir", "x"])[1]["epochs"] == 50
    assert method.get_args(["--data", "audioset", "--data-dir", "x"])[1] == recipe              # the paper's is the default


@pytest.mark.parametrize("size", ["toy", "tiny", "small", "base", "large", "huge", "giant"])
def test_every_size_has_the_parameters_of_the_formula(size):
    dim, depth, heads, hidden = common.SIZES[size]
    with torch.device("meta"):
        video, audio = dict(shape=(16, 224, 224), patch=(2, 16, 16)), dict(shape=(128, 801), patch=(16, 16))
        vit = ViT(size, video, audio, cls=True, norm_in=True)
    block = 2 * 2 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * hidden + (hidden + 1) * dim
    stems = (3 * 2 * 16 * 16 + 1) * dim + (16 * 16 + 1) * dim
    places = (8 + 14 * 14) * dim + (8 + 50) * dim
    assert dim % heads == 0 and hidden / dim == pytest.approx(48 / 11 if size == "giant" else 4)
    assert sum(p.numel() for p in vit.parameters()) == depth * block + stems + places + (1 + 2) * dim + 2 * 2 * dim


def test_the_sizes_are_those_of_the_vit_papers():
    paper = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16),
             "huge": (1280, 32, 16), "giant": (1408, 40, 22)}
    assert {name: common.SIZES[name][:3] for name in paper} == paper


def test_a_block_is_pre_norm_attention_and_mlp():
    torch.manual_seed(0)
    block, x = common.Block(12, 3, 20).eval(), random(2, 5, 12)
    y = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, 1e-6)
    weights = dict(in_proj_weight=block.qkv.weight, in_proj_bias=block.qkv.bias)
    mha = nn.MultiheadAttention(12, 3, batch_first=True)                        # torch's own, with the same weights
    mha.load_state_dict({**weights, "out_proj.weight": block.proj.weight, "out_proj.bias": block.proj.bias})
    y = x + mha(y, y, y)[0]
    z = F.layer_norm(y, (12,), block.norm2.weight, block.norm2.bias, 1e-6)
    torch.testing.assert_close(block(x), y + block.fc2(F.gelu(block.fc1(z))), atol=1e-5, rtol=1e-5)


def test_a_size_that_does_not_exist_is_refused_with_those_that_do():
    message = fails(ViT, "colossal", VIDEO, AUDIO)
    assert "colossal" in message and all(size in message for size in common.SIZES)


@pytest.mark.parametrize("shape", [(5, 16, 16), (4, 20, 16), (4, 16, 12)])
def test_frames_that_the_tubelet_does_not_divide_are_refused(shape):
    assert "--frames" in fails(ViT, "nano", dict(shape=shape, patch=(2, 8, 8)))


@pytest.mark.parametrize("shape", [(8, 3), (3, 22)])
def test_a_mel_smaller_than_a_patch_is_refused(shape):
    fails(ViT, "nano", None, dict(shape=shape, patch=(4, 4)), match="smaller than a patch")


def test_an_encoder_refuses_a_modality_that_it_was_built_without():
    fails(nano_vit(audio=None), random(1, 3, 4, 16, 16), random(1, 1, 8, 22), match="audio")
    fails(nano_vit(video=None), random(1, 3, 4, 16, 16), random(1, 1, 8, 22), match="video")


def inputs(batch=2, seed=0):
    return random(batch, 3, *VIDEO["shape"], seed=seed), random(batch, 1, *AUDIO["shape"], seed=seed + 50)


def test_an_absent_modality_is_embedded_as_an_input_of_zeros():
    vit, (video, audio) = nano_vit(absent="zero"), inputs()
    for name in ("video", "audio"):                                             # a bias that matters
        nn.init.normal_(getattr(vit, name).proj.bias)
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(vit.embed(None, audio), vit.embed(torch.zeros_like(video), audio), **close)
    torch.testing.assert_close(vit.embed(video, None), vit.embed(video, torch.zeros_like(audio)), **close)
    torch.testing.assert_close(vit(None, audio), vit(torch.zeros_like(video), audio), atol=1e-5, rtol=0)
    assert vit(None, audio).shape == vit(video, None).shape == (2, 1 + NV + NA, 32)


def test_drop_runs_only_the_tokens_of_what_is_there():
    vit, (video, audio), seen = nano_vit(absent="drop"), inputs(), []
    vit.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for given in ((video, audio), (video, None), (None, audio)):
        vit(*given)
    assert seen == [1 + NV + NA, 1 + NV, 1 + NA]
    assert torch.equal(vit.embed(video, None), vit.embed(video, audio)[:, :NV])             # video first
    assert torch.equal(vit.embed(None, audio), vit.embed(video, audio)[:, NV:])


def test_visible_runs_exactly_those_tokens():
    vit, given = nano_vit(norm_out=True), inputs()
    visible = torch.stack([torch.from_numpy(np.random.default_rng(b).permutation(NV + NA)[:7]) for b in range(2)])
    all_tokens, rows = vit.embed(*given), []
    for b in range(2):
        rows.append(torch.stack([vit.cls[0, 0]] + [all_tokens[b, i] for i in visible[b].tolist()]))
    x = vit.norm_in(torch.stack(rows))
    for block in vit.transformer.blocks:
        x = block(x)
    torch.testing.assert_close(vit(*given, visible=visible), vit.norm_out(x), atol=1e-6, rtol=1e-6)
    assert vit(*given, visible=visible).shape == (2, 1 + 7, 32)


def test_each_level_goes_through_its_own_norm_and_the_last_one_through_that_of_the_output():
    common.SIZES["nano"] = (32, 5, 2, 64)                                       # the fixture undoes it
    vit, given = nano_vit(cls=False, norm_in=False, norm_out=True, levels=[0, 2]), inputs()
    for i, norm in enumerate((vit.norms["0"], vit.norms["2"], vit.norm_out)):   # or all would be the same
        torch.nn.init.normal_(norm.weight, i + 1.0), torch.nn.init.normal_(norm.bias)
    x, after = vit.embed(*given), []
    for block in vit.transformer.blocks:
        x = block(x)
        after.append(x)

    def normed(n, norm):
        h = after[n]
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt() * norm.weight + norm.bias

    for layers in ([0, 2, 4], [2], [4, 0], [1, 2]):                             # block 1 has no norm of its own
        expected = torch.cat([normed(n, vit.norms[str(n)] if n in (0, 2) else vit.norm_out) for n in layers], -1)
        torch.testing.assert_close(vit(*given, layers=layers), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vit(*given), normed(4, vit.norm_out), atol=1e-5, rtol=1e-5)


def test_a_transformer_keeps_in_memory_only_the_layers_that_were_asked_for():
    transformer, outputs, alive = common.Transformer(16, 5, 2, 32), [], []
    for block in transformer.blocks:
        block.register_forward_hook(lambda module, given, out: outputs.append(weakref.ref(out)))
    transformer.blocks[4].register_forward_pre_hook(lambda module, given: alive.extend(n for n, x in enumerate(outputs) if x() is not None))
    with torch.no_grad():
        x = random(2, 3, 16)
        second, first = transformer(x, layers=[1, 0])
    assert alive == [0, 1, 3]                                                   # 3 is what the last block reads
    assert torch.equal(first, transformer.blocks[0](x)) and torch.equal(second, transformer.blocks[1](first))


def test_an_mlp_without_norm_is_linear_maps_with_gelu_between():
    mlp, x = common.mlp(6, [8, 8, 5], norm=False), random(3, 6)
    maps = [m for m in mlp if isinstance(m, nn.Linear)]
    expected = x
    for i, m in enumerate(maps):
        expected = expected @ m.weight.T + m.bias
        expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2))) if i < 2 else expected
    assert [(m.in_features, m.out_features) for m in maps] == [(6, 8), (8, 8), (8, 5)] and len(mlp) == 5
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp(x[:1])[0], mlp(x)[0])                        # a clip does not depend on the others
    assert sum(isinstance(m, nn.BatchNorm1d) for m in common.mlp(6, [8, 8, 5])) == 2


def test_a_hidden_patch_changes_no_bit_of_the_output():
    vit, (video, audio) = nano_vit(), inputs()
    hidden = {0, 5, NV + 3}                                                     # (0, 0, 0), (1, 0, 1), and audio (0, 3)
    visible = torch.tensor([[i for i in range(NV + NA) if i not in hidden]] * 2)
    other_video, other_audio = video.clone(), audio.clone()
    other_video[:, :, :2, :8, :8] += 9
    other_video[:, :, 2:, :8, 8:] -= 9
    other_audio[:, :, :4, 12:16] *= -5
    assert torch.equal(vit(video, audio, visible), vit(other_video, other_audio, visible))
    assert not torch.equal(vit(video, audio), vit(other_video, other_audio))
    other_video[:, :, :2, :8, 8:] += 1                                          # a visible one does
    assert not torch.equal(vit(video, audio, visible), vit(other_video, other_audio, visible))


def test_activation_checkpointing_changes_neither_loss_nor_gradient():
    views, results = clips(3), []
    for checkpoint in (False, True):
        model = nano_model(dropout=0.1, checkpoint=checkpoint)
        torch.manual_seed(1)
        loss, _ = model(batch_of(views), 0)
        loss.backward()
        results.append((loss, grads(model)))
    (loss, gradient), (other_loss, other) = results
    torch.testing.assert_close(other_loss, loss)
    assert all(g.abs().sum() > 0 for g in gradient.values() if g.ndim > 1)
    for name, g in gradient.items():
        torch.testing.assert_close(other[name], g)


def test_activation_checkpointing_computes_each_block_twice():
    counts = []
    for checkpoint in (False, True):
        vit, count = nano_vit(checkpoint=checkpoint), []
        vit.transformer.blocks[0].fc1.register_forward_hook(lambda *args, count=count: count.append(1))
        vit(*inputs()).sum().backward()
        counts.append(len(count))
    assert counts == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# AV-JEPA: views, embeddings, loss
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("local, patterns", [("none", {()}), ("modality", {(A, V)}), ("joint", {(AV, AV)}),
                                             ("dropout", set(itertools.product((A, V), repeat=2)))])
def test_the_views_have_the_modalities_of_their_kind_and_lie_inside_the_clip(local, patterns):
    seen, starts = [], []
    for seed in range(400):
        views = plan_views(np.random.default_rng(seed), 10.0, 8.0, local)
        present = tuple((bool(v.video), bool(v.audio)) for v in views)
        assert present[:2] == (AV, AV) and all(v.seconds == 8.0 for v in views)
        assert all(v.video == ("flip" if i < 2 else "random") for i, v in enumerate(views) if v.video)
        seen.append(present[2:])
        starts += [v.start for v in views]
    assert set(seen) == patterns
    for pattern in patterns:                                                    # dropout: a fair coin for each view
        assert seen.count(pattern) == pytest.approx(400 / len(patterns), abs=0 if len(patterns) == 1 else 40)
    assert min(starts) >= 0 and max(starts) <= 2.0 and len(set(starts)) == len(starts)
    assert np.mean(starts) == pytest.approx(1.0, abs=0.08)
    short = plan_views(np.random.default_rng(0), 3.0, 8.0, local)               # a clip shorter than a view begins at its start
    assert {v.start for v in short} == {0.0}


@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("patterns", [MIXED, [(AV, AV)] * 3, [(A,)] * 2, [(V, A)] * 2])
def test_the_embedding_of_each_view_stands_at_its_place(patterns, absent):
    model, views = nano_model(absent=absent).eval(), clips(len(patterns), patterns)
    batch = batch_of(views)
    h = model.embed(batch.get("video"), batch.get("audio"), batch["present"])
    assert h.shape == (len(patterns), len(patterns[0]), 32)
    for b, clip in enumerate(views):
        for v, (video, audio) in enumerate(clip):
            alone = model.encoder(video if video is None else video[None], audio if audio is None else audio[None])[0, 0]
            torch.testing.assert_close(h[b, v], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_an_absent_modality_leaks_nothing_into_a_view(absent):
    model, batch = nano_model(absent=absent).eval(), batch_of(clips(5, MIXED))
    has = batch["present"]
    h = model.embed(batch["video"], batch["audio"], has)
    for name, lacks in (("video", ~has[:, :, 0]), ("audio", ~has[:, :, 1])):
        other = batch | {name: random(*batch[name].shape, seed=99)}
        changed = model.embed(other["video"], other["audio"], has)
        assert lacks.any() and torch.equal(h[lacks], changed[lacks])
        assert ((h != changed)[~lacks]).any(-1).all()


def slow_invariance(z):
    views, count, dim = z.shape
    total = 0.0
    for b in range(count):
        for k in range(dim):
            mu = (z[0, b, k] + z[1, b, k]) / 2
            for v in range(views):
                total += (mu - z[v, b, k]) ** 2
    return total / (views * count * dim)


@pytest.mark.parametrize("views", [2, 4, 7])
def test_invariance_is_the_formula(views):
    z = random(views, 3, 5)
    assert invariance(z).item() == pytest.approx(slow_invariance(z.double()).item(), rel=1e-5)


def test_the_gradient_of_the_invariance_flows_through_the_centre():
    z = random(4, 3, 5).requires_grad_()
    gradient, = torch.autograd.grad(invariance(z), z)
    explicit, = torch.autograd.grad(slow_invariance(z), z)
    torch.testing.assert_close(gradient, explicit, atol=1e-6, rtol=1e-5)
    with torch.no_grad():                                       # by hand: 2 / VBK (away_w - [w global] sum_v away_v / 2)
        away = z - z[:2].mean(0)
        by_hand = 2 / z.numel() * (away - torch.tensor([1.0, 1, 0, 0]).view(4, 1, 1) * away.sum(0) / 2)
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=1e-5)
    stopped, = torch.autograd.grad((z[:2].mean(0).detach() - z).square().mean(), z)
    assert (gradient - stopped)[:2].abs().max() > 1e-2
    torch.testing.assert_close(gradient[2:], stopped[2:], atol=1e-7, rtol=0)    # a local view is no part of the centre


@pytest.mark.parametrize("patterns", [(AV, AV), (AV, AV, A, V), (AV, AV, AV, AV)])
@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_loss_is_the_weighted_sum_of_invariance_and_mean_sigreg(lam, patterns):
    model, batch = nano_model(lam=lam), batch_of(clips(6, patterns))
    loss, parts = model(batch, 3)
    h = model.embed(batch["video"], batch["audio"], batch["present"])
    z = model.projector(torch.cat([h[:, 0], h[:, 1]])).view(2, 6, 4)            # the globals in one call, the locals in ...
    if len(patterns) > 2:                                                       # ... another, with BatchNorm's statistics
        z = torch.cat([z, model.projector(torch.cat([h[:, 2], h[:, 3]])).view(2, 6, 4)])
    inv, reg = slow_invariance(z.double()), np.mean([slow_sigreg(z_v.detach(), 3, 32, 17, 5.0) for z_v in z])
    assert loss.item() == pytest.approx((1 - lam) * inv.item() + lam * reg, rel=1e-4)
    assert [parts["invariance"].item(), parts["sigreg"].item()] == pytest.approx([inv.item(), reg], rel=1e-4)
    torch.testing.assert_close(parts["z"], z[0].detach(), atol=1e-4, rtol=1e-4)     # over a small std rounding grows
    assert not any(part.requires_grad for part in parts.values())


def test_the_loss_is_float32_under_bf16_autocast():
    model, batch = nano_model(), batch_of(clips(4))
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = model(batch, 0)
    assert loss.dtype == parts["z"].dtype == torch.float32
    assert loss.item() == pytest.approx(nano_model()(batch, 0)[0].item(), rel=0.1)


@pytest.mark.parametrize("flag, value", [
    ("--lam", "1.5"), ("--lam", "nan"), ("--lr", "-1"), ("--batch-size", "1"), ("--steps", "-1"), ("--steps", "0"), ("--epochs", "0"),
    ("--seconds", "0"), ("--frames", "0"), ("--accumulate", "0"), ("--log-every", "0"), ("--save-every", "0"), ("--max-bad", "2"),
    ("--mel-std", "0"), ("--seed", "-1"), ("--workers", "-1")])
def test_a_flag_out_of_range_is_refused_by_name(flag, value):
    assert flag in fails(method.get_args, [flag, value])


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

GRIDS = [(8, 64), (14, 14)]
DRAWS = [((0.15, 0.2), (0.75, 1.5)), ((0.7, 0.7), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0)), ((0.05, 0.075), (0.2, 5.0))]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale, aspect", DRAWS)
def test_a_block_has_the_area_that_was_drawn_although_the_grid_cuts_its_sides(grid, scale, aspect):
    cells, rng = math.prod(grid), np.random.default_rng(0)
    blocks = np.array([common.draw_block(rng, grid, scale, aspect) for _ in range(5000)])
    top, left, height, width = blocks.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= grid[0]).all() and (left + width <= grid[1]).all()
    assert (height * width).mean() == pytest.approx(cells * sum(scale) / 2, rel=0.03)
    for s in np.linspace(*scale, 9):                                            # a known scale: half a row or column off
        for _ in range(50):
            top, left, height, width = common.draw_block(rng, grid, (s, s), aspect)
            assert abs(height * width - s * cells) <= max(height, width) / 2 + 1e-9


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_covers_the_first_and_the_last_row_and_column_equally_often(grid):
    for scale, aspect in [DRAWS[0], DRAWS[3]]:
        rng = np.random.default_rng(1)
        counts = sum(common.cover(grid, [common.draw_block(rng, grid, scale, aspect)]).astype(int) for _ in range(5000))
        for first, last in ((counts[0], counts[-1]), (counts[:, 0], counts[:, -1])):
            assert first.min() > 0 and last.min() > 0
        np.testing.assert_allclose(counts, counts[::-1], atol=5 * np.sqrt(2 * counts.max()))
        np.testing.assert_allclose(counts, counts[:, ::-1], atol=5 * np.sqrt(2 * counts.max()))


def test_each_place_of_a_block_that_fits_is_equally_likely():
    rng = np.random.default_rng(2)
    places = np.array([common.draw_block(rng, (6, 9), (12 / 54, 12 / 54), (4 / 3, 4 / 3)) for _ in range(6000)])
    assert (places[:, 2:] == (3, 4)).all()                                      # 3 x 4 has 4 x 6 places
    counts = np.zeros((4, 6))
    np.add.at(counts, (places[:, 0], places[:, 1]), 1)
    assert ((counts - 250) ** 2 / 250).sum() < 60                               # chi-squared, 23 degrees of freedom: p < 1e-4


def test_scale_and_aspect_of_a_block_are_two_independent_draws():
    rng, n = np.random.default_rng(3), 4000
    blocks = np.array([common.draw_block(rng, (1000, 1000), (0.15, 0.2), (0.75, 1.5)) for _ in range(n)])
    area, aspect = blocks[:, 2] * blocks[:, 3] / 1e6, blocks[:, 3] / blocks[:, 2]
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 4 / math.sqrt(n)
    for x, low, high in ((area, 0.15, 0.2), (aspect, 0.75, 1.5)):               # each uniform, over the whole of its range
        u = np.sort((x - low) / (high - low))
        assert np.abs(u - (np.arange(n) + 0.5) / n).max() < 2 / math.sqrt(n)    # Kolmogorov and Smirnov, p < 1e-3


def test_the_blocks_are_a_function_of_the_generator_alone():
    one, same_seed, other = (common.draw_block(np.random.default_rng(seed), (8, 64), *DRAWS[0]) for seed in (1, 1, 2))
    assert one == same_seed != other and all(type(x) is int for x in one)


def test_cover_marks_the_union_of_the_blocks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        blocks = [common.draw_block(rng, (5, 7), (0.05, 0.4), (0.5, 2.0)) for _ in range(3)]
        slow = np.zeros((5, 7), bool)
        for r, c in itertools.product(range(5), range(7)):
            slow[r, c] = any(t <= r < t + h and le <= c < le + w for t, le, h, w in blocks)
        mask = common.cover((5, 7), blocks)
        assert mask.dtype == bool and (mask == slow).all()
    assert not common.cover((5, 7), []).any()


@pytest.mark.parametrize("count", [0, 1, 6, 12, 20, 35])
def test_meet_count_hides_exactly_the_count_and_only_adds_or_only_removes(count):
    mask = common.cover((5, 7), [(1, 2, 3, 4)])                                 # 12 hidden
    before = mask.copy()
    for seed in range(20):
        out = common.meet_count(np.random.default_rng(seed), mask, count)
        assert out.shape == mask.shape and out.dtype == bool and out.sum() == count
        assert not (out & ~mask).any() if count <= 12 else not (mask & ~out).any()
        assert (mask == before).all() and not np.shares_memory(out, mask)


@pytest.mark.parametrize("count", [5, 20])
def test_meet_count_treats_all_places_alike(count):
    mask, n, rng = common.cover((5, 7), [(1, 2, 3, 4)]), 4000, np.random.default_rng(0)
    hidden = sum(common.meet_count(rng, mask, count).astype(float) for _ in range(n)) / n
    free, inside = hidden[~mask], hidden[mask]
    moved, share = (inside, 5 / 12) if count < 12 else (free, 8 / 23)
    np.testing.assert_allclose(moved, share, atol=5 * math.sqrt(share * (1 - share) / n))
    assert (free == 0).all() if count < 12 else (inside == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# EMA, schedules, health, weight decay
# ---------------------------------------------------------------------------------------------------------------------

def test_ema_after_k_steps_is_the_closed_form_and_leaves_buffers_alone():
    torch.manual_seed(0)
    target, online = (common.mlp(4, (6, 3)) for _ in range(2))
    online(random(50, 4))                                                       # moves BatchNorm's running mean
    target.requires_grad_(False)
    begin = {k: v.clone() for k, v in target.state_dict().items()}
    trail = [{k: v.clone() for k, v in online.state_dict().items()}]
    taus = [0.9, 0.5, 0.996, 0.0, 0.8, 0.99]
    for k, tau in enumerate(taus):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(random(*p.shape, seed=k))
        trail.append({k: v.clone() for k, v in online.state_dict().items()})
        common.ema_update(target, online, tau)
    for name, _ in target.named_parameters():
        expected = math.prod(taus) * begin[name].double()
        for k, tau in enumerate(taus):
            expected = expected + (1 - tau) * math.prod(taus[k + 1:]) * trail[k + 1][name].double()
        torch.testing.assert_close(target.get_parameter(name).double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(online.get_parameter(name), trail[-1][name])
    for name, buffer in target.named_buffers():
        assert torch.equal(buffer, begin[name])
    assert not torch.equal(online[1].running_mean, target[1].running_mean)


def test_ema_with_a_constant_tau_decays_geometrically():
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)
    begin = target.weight.detach().clone()
    for _ in range(25):
        common.ema_update(target, online, 0.9)
    torch.testing.assert_close(target.weight.detach(), 0.9 ** 25 * begin + (1 - 0.9 ** 25) * online.weight.detach())
    assert target.weight.grad_fn is None and online.weight.grad is None


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    lr = [common.warmup_cosine(step, 100, 15, 5e-4, end=1e-6) for step in range(100)]
    assert lr[0] == pytest.approx(5e-4 / 15) and lr[14] == pytest.approx(5e-4) and lr[99] == pytest.approx(1e-6)
    assert all(a < b for a, b in itertools.pairwise(lr[:15])) and all(a > b for a, b in itertools.pairwise(lr[15:]))
    assert max(lr) <= 5e-4 * (1 + 1e-12) and min(lr) >= 1e-6 * (1 - 1e-12)
    np.testing.assert_allclose(np.diff(lr[:15]), 5e-4 / 15)
    np.testing.assert_allclose(lr[15:], [1e-6 + (5e-4 - 1e-6) * (1 + math.cos(math.pi * k / 84)) / 2 for k in range(85)])
    assert common.warmup_cosine(0, 100, 10, 2.0, start=1.0) == pytest.approx(1.1)
    assert common.warmup_cosine(0, 1, 1, 3.0) == 3.0                            # a run of one step trains


def test_cosine_goes_from_start_to_end_and_stays_there():
    for start, end in ((0.996, 0.9999), (0.05, 0.0)):
        x = [common.cosine(step, 50, start, end) for step in range(50)]
        assert x[0] == pytest.approx(start) and x[49] == pytest.approx(end)
        assert x[24] + x[25] == pytest.approx(start + end)                      # point symmetric
        assert all((a - b) * (start - end) > 0 for a, b in itertools.pairwise(x))
        assert common.cosine(80, 50, start, end) == pytest.approx(end)


def test_health_of_known_matrices():
    std, rank = common.health(2.5 * random(40000, 16) + 7)
    assert std == pytest.approx(2.5, rel=0.01) and rank == pytest.approx(16, rel=0.01)
    std, rank = common.health(random(300, 1) * random(1, 16, seed=1) + 1)
    assert rank == pytest.approx(1, abs=0.01)
    std, rank = common.health(torch.full((64, 16), 0.3))
    assert std == pytest.approx(0, abs=1e-6) and math.isfinite(rank)
    assert common.health(torch.zeros(64, 16)) == pytest.approx((0, 1))


def test_the_effective_rank_is_exp_of_the_entropy_of_the_singular_values():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    u = torch.linalg.qr(torch.cat([torch.ones(50, 1), random(50, 4)], 1))[0][:, 1:]         # columns of mean 0
    v = torch.linalg.qr(random(6, 6, seed=1))[0][:, :4]
    z = u * values @ v.T + 3
    p = values.numpy() / 8
    assert common.health(z)[1] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert common.health(z)[0] == pytest.approx(z.double().numpy().std(0, ddof=1).mean(), rel=1e-4)


def test_weight_decay_takes_linear_maps_and_convolutions_and_spares_all_else():
    model = nano_model()
    decayed, spared = common.weight_decay_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    ids = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters()) and len(set(ids)) == len(ids)
    maps = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    assert {id(p) for p in decayed["params"]} == maps
    learned = [model.encoder.cls, model.encoder.modality, model.encoder.video.positions.first, model.encoder.audio.positions.rest]
    assert {id(p) for p in learned} < {id(p) for p in spared["params"]}


def test_weight_decay_leaves_frozen_parameters_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert [len(group["params"]) for group in common.weight_decay_groups(model, 0.1)] == [1, 1]


def test_weight_decay_takes_a_matrix_with_one_row_or_column_too():
    for layer in (nn.Linear(8, 1), nn.Linear(1, 8)):                            # a binary head, a map of a scalar
        decayed, spared = common.weight_decay_groups(layer, 0.1)
        assert [id(p) for p in decayed["params"]] == [id(layer.weight)]
        assert [id(p) for p in spared["params"]] == [id(layer.bias)]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

def write_run(folder, seed=5, model=None, **other):
    """A checkpoint as avjepa_lejepa.main writes it."""
    config, widths = nano_config(**other), (16, 16, 4)
    common.save_checkpoint(folder / "latest.pt", method=method.METHOD, step=3, steps=9, args=dict(seed=seed, out=str(folder)),
                           recipe=dict(lr=0.1, size="nano", crop_scale=(0.4, 1.0)), inputs=asdict(data.Inputs()), encoder=config,
                           projector=widths, weights="encoder", model=model.state_dict())
    return folder


def trained(seed=5, **other):
    """A model that is no longer as it was initialised."""
    model = nano_model(seed, **other)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * random(*p.shape, seed=i))
    return model.eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    model = trained()
    content = common.load_checkpoint(write_run(tmp_path, model=model), method.METHOD)       # the folder, or ...
    assert same(content["model"], model.state_dict()) and content["encoder"] == nano_config() and content["step"] == 3
    assert content["recipe"]["crop_scale"] == (0.4, 1.0) and content["version"].startswith(common.__version__)
    assert common.load_checkpoint(tmp_path / "latest.pt")["step"] == 3                      # ... the file
    assert torch.load(tmp_path / "latest.pt", weights_only=True)["method"] == method.METHOD
    assert [f.name for f in tmp_path.iterdir()] == ["latest.pt"]


def test_a_writer_that_is_killed_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    write_run(tmp_path, model=trained())
    old = (tmp_path / "latest.pt").read_bytes()

    def half(content, file):
        file.write(old[:len(old) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError):
            common.save_checkpoint(tmp_path / "latest.pt", method=method.METHOD, step=4)
    assert (tmp_path / "latest.pt").read_bytes() == old and common.load_checkpoint(tmp_path)["step"] == 3
    common.save_checkpoint(tmp_path / "latest.pt", method=method.METHOD, step=5)            # and the next one succeeds
    assert common.load_checkpoint(tmp_path)["step"] == 5


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")                # a bare tensor, indexed by a name
def test_what_is_no_checkpoint_of_ours_is_refused_with_a_sentence(tmp_path):
    file = tmp_path / "latest.pt"
    for missing in (tmp_path, file, tmp_path / "nowhere"):
        fails(common.load_checkpoint, missing, match="no such checkpoint")
    write_run(tmp_path, model=trained())
    whole = file.read_bytes()
    trap = f"cos\nmkdir\n(V{tmp_path / 'sprung'}\ntR.".encode()                # a pickle that makes a folder where it is loaded
    for damaged in (whole[:len(whole) // 2], whole[:-100], whole[:10], b"", b"step,loss\n0,1\n", b"\x80\x02junk", trap):
        file.write_bytes(damaged)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    for other in ([1, 2], torch.zeros(3), {"state_dict": {}}, "text", None):
        torch.save(other, file)
        assert str(file) in fails(common.load_checkpoint, tmp_path, match="cannot be read")
    assert not (tmp_path / "sprung").exists()                                               # weights_only: nothing ran


def test_a_checkpoint_of_another_method_is_refused_with_both_names(tmp_path):
    write_run(tmp_path, model=trained())
    message = fails(common.load_checkpoint, tmp_path, "mjepa")
    assert "avjepa_lejepa" in message and "mjepa" in message


def test_weights_of_another_size_are_refused_with_a_sentence():
    fails(common.load_weights, nn.Linear(3, 2), nn.Linear(3, 4).state_dict(), "runs/x", match="runs/x")


@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_load_encoder_gives_the_trained_encoder_and_projector(tmp_path, absent):
    model, given = trained(absent=absent, dropout=0.1), inputs()
    encoder = common.load_encoder(write_run(tmp_path, model=model, absent=absent, dropout=0.1))
    assert same(encoder.vit.state_dict(), model.encoder.state_dict())
    assert same(encoder.projector.state_dict(), model.projector.state_dict())
    tokens, embedding = encoder(*given)
    out = model.encoder(*given)
    assert torch.equal(tokens, out[:, 1:]) and torch.equal(embedding, out[:, 0])
    assert torch.equal(encoder.projector(embedding), model.projector(out[:, 0]))
    assert (encoder.method, encoder.dim, encoder.inputs, encoder.step) == (method.METHOD, 32, asdict(data.Inputs()), 3)


def test_an_untrained_encoder_is_as_training_initialised_it(tmp_path):
    write_run(tmp_path, seed=5, model=trained(seed=5))
    torch.manual_seed(123)                                                      # whatever the caller's stream
    encoder = common.load_encoder(tmp_path, untrained=True)
    common.seed_step(5, 0)                                                      # the order of avjepa_lejepa.main
    fresh = AVJEPA(nano_config(), (16, 16, 4), 0.05, 32)
    assert same(encoder.vit.state_dict(), fresh.encoder.state_dict())
    assert same(encoder.projector.state_dict(), fresh.projector.state_dict())
    assert not same(encoder.vit.state_dict(), trained(seed=5).encoder.state_dict())
    assert not same(encoder.vit.state_dict(), nano_model(seed=6).encoder.state_dict())


def test_a_loaded_encoder_stays_frozen_whoever_calls_train(tmp_path):
    encoder = common.load_encoder(write_run(tmp_path, model=trained(dropout=0.5), dropout=0.5))
    head = nn.Sequential(encoder, nn.Identity()).train()
    assert head.training and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.train() is encoder and encoder.train(True).training is False
    assert torch.equal(encoder(*inputs())[0], encoder(*inputs())[0])
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.projector(random(8, 32))                                            # BatchNorm's running mean stays
    assert same(encoder.state_dict(), before)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_a_loaded_encoder_returns_the_tokens_of_what_it_was_given_video_first(tmp_path, absent, cls):
    model, (video, audio) = trained(absent=absent, cls=cls), inputs()
    encoder, vit = common.load_encoder(write_run(tmp_path, model=model, absent=absent, cls=cls)), model.encoder
    for v, a in ((video, audio), (video, None), (None, audio)):
        tokens, embedding = encoder(v, a)
        if absent == "zero":                                                    # both ran, the absent one as zeros
            out = vit(torch.zeros_like(video) if v is None else v, torch.zeros_like(audio) if a is None else a)
        else:
            out = vit(v, a)
        rest = out[:, 1:] if cls else out
        if absent == "zero":
            rest = rest[:, 0 if v is not None else NV:NV + NA if a is not None else NV]
        assert tokens.shape == (2, NV * (v is not None) + NA * (a is not None), 32)
        torch.testing.assert_close(tokens, rest, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embedding, out[:, 0] if cls else rest.mean(1), atol=1e-5, rtol=1e-5)
    fails(encoder, match="neither")


@pytest.mark.parametrize("config", [dict(video=None), dict(audio=None)])
def test_a_loaded_encoder_of_one_modality_returns_all_its_tokens(tmp_path, config):
    model, (video, audio) = trained(absent="zero", cls=False, **config), inputs()
    encoder = common.load_encoder(write_run(tmp_path, model=model, absent="zero", cls=False, **config))
    given = (None, audio) if "video" in config else (video, None)
    tokens, embedding = encoder(*given)
    assert torch.equal(tokens, model.encoder(*given)) and torch.equal(embedding, tokens.mean(1))


CROSS = ("a->v", "v->a", "av->v")


def write_cross(folder, cross=CROSS):
    """A checkpoint as a method with two encoders and predictors from one input to another writes it. Returns its weights."""
    config, model = nano_config(cls=False, norm_out=True, levels=[0]), {}
    for i, prefix in enumerate(("context_encoder", "target_encoder")):
        model.update({f"{prefix}.{k}": v for k, v in nano_vit(10 + i, cls=False, norm_out=True, levels=[0]).state_dict().items()})
    for name in CROSS:
        model.update({f"cross.{name}.{k}": v for k, v in common.mlp(32, [32, 32, 32], norm=False).state_dict().items()})
    common.save_checkpoint(folder / "latest.pt", method="mjepa", step=3, args=dict(seed=5), inputs=asdict(data.Inputs()), encoder=config,
                           projector=None, cross={name: [32, 32, 32] for name in cross}, weights="target_encoder", model=model)
    return model


def test_load_encoder_gives_the_predictors_from_one_input_to_another(tmp_path):
    model, x = write_cross(tmp_path), random(1, 32)
    encoder = common.load_encoder(tmp_path, cross=True)
    assert set(encoder.cross) == set(CROSS) and encoder.projector is None and not any(p.requires_grad for p in encoder.parameters())
    for name in CROSS:
        y = x
        for i in (0, 2, 4):
            y = F.linear(F.gelu(y) if i else y, model[f"cross.{name}.{i}.weight"], model[f"cross.{name}.{i}.bias"])
        torch.testing.assert_close(encoder.cross[name](x), y)
    assert same(encoder.teacher.vit.state_dict(), {k: model[f"target_encoder.{k}"] for k in encoder.vit.state_dict()})
    for which in ("context", "target"):
        vit = common.load_encoder(tmp_path, weights=which).vit.state_dict()
        assert same(vit, {k: model[f"{which}_encoder.{k}"] for k in vit})
    for how in (dict(), dict(cross=True, layers=[0, 1])):                           # not asked for; they read the last layer alone
        encoder = common.load_encoder(tmp_path, **how)
        assert encoder.cross is None and encoder.teacher is None


def test_an_untrained_encoder_has_untrained_predictors_and_a_list_that_does_not_fit_the_weights_is_refused(tmp_path):
    model = write_cross(tmp_path)
    encoder = common.load_encoder(tmp_path, untrained=True, cross=True)
    assert same(encoder.teacher.vit.state_dict(), encoder.vit.state_dict())
    assert same(encoder.vit.state_dict(), nano_vit(5, cls=False, norm_out=True, levels=[0]).state_dict())
    assert set(encoder.cross) == set(CROSS) and encoder.cross["a->v"](random(2, 32)).shape == (2, 32)
    assert not torch.equal(encoder.cross["a->v"][0].weight, model["cross.a->v.0.weight"])
    write_cross(tmp_path, (*CROSS, "a->av"))
    fails(common.load_encoder, tmp_path, cross=True, match="other names")


def test_load_encoder_can_change_what_an_absent_modality_means(tmp_path):
    encoder = common.load_encoder(write_run(tmp_path, model=trained(), absent="zero"), absent="drop")
    seen = []
    encoder.vit.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    encoder(audio=inputs()[1])
    assert seen == [1 + NA]


# ---------------------------------------------------------------------------------------------------------------------
# A run: folder, log, signals, processes
# ---------------------------------------------------------------------------------------------------------------------

def run_args(out, resume="auto", fresh=False):
    return argparse.Namespace(out=str(out), resume=str(resume), fresh=fresh)


RUN = dict(lr=0.1, size="nano", crop_scale=(0.4, 1.0))                          # the recipe that write_run writes


def test_open_run_begins_in_a_new_folder_and_goes_on_in_an_old_one(tmp_path):
    out = tmp_path / "runs" / "a"
    assert common.open_run(run_args(out), method.METHOD, RUN, CPU) is None and out.is_dir()
    write_run(out, model=trained())
    assert common.open_run(run_args(out), method.METHOD, RUN, CPU)["step"] == 3
    assert common.open_run(run_args(out, fresh=True), method.METHOD, RUN, CPU) is None
    other = tmp_path / "runs" / "b"
    assert common.open_run(run_args(other, out / "latest.pt"), method.METHOD, RUN, CPU)["step"] == 3 and other.is_dir()


def test_open_run_refuses_other_values_in_a_sentence_that_names_them(tmp_path):
    write_run(tmp_path, model=trained())
    message = fails(common.open_run, run_args(tmp_path), method.METHOD, RUN | dict(lr=0.2, size="base"), CPU)
    assert all(part in message for part in ("lr 0.1", "0.2", "size nano", "base", "--out", "--fresh"))
    assert "crop_scale" not in message
    fails(common.open_run, run_args(tmp_path), "mjepa", RUN, CPU, match="mjepa")
    assert common.load_checkpoint(tmp_path)["step"] == 3                        # and nothing was overwritten


def test_open_run_does_not_start_over_an_unreadable_checkpoint(tmp_path):
    (tmp_path / "latest.pt").write_bytes(b"half")
    fails(common.open_run, run_args(tmp_path), method.METHOD, RUN, CPU, match="cannot be read")
    fails(common.open_run, run_args(tmp_path, tmp_path / "nowhere.pt"), method.METHOD, RUN, CPU, match="no such checkpoint")


def test_open_run_says_so_where_the_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        fails(common.open_run, run_args(out), method.METHOD, RUN, CPU, match="--out")


def test_the_log_drops_the_rows_from_the_step_on_that_a_run_goes_on_from(tmp_path):
    log = common.Log(tmp_path, 0, CPU)
    for step in range(0, 50, 10):
        log.write({"step": step, "loss": 1.5, "bad_clips": 0}, ("step", "loss"))
    log = common.Log(tmp_path, 30, CPU)
    assert [row["step"] for row in common.read_log(tmp_path)] == [0, 10, 20]
    log.write({"step": 30, "loss": 0.5}, ("step",))
    assert [(row["step"], row["loss"]) for row in common.read_log(tmp_path)] == [(0, 1.5), (10, 1.5), (20, 1.5), (30, 0.5)]
    common.Log(tmp_path, 0, CPU)
    assert common.read_log(tmp_path) == []


def test_only_the_first_process_writes_the_log(tmp_path):
    common.Log(tmp_path, 0, CPU).write({"step": 0}, ("step",))
    second = common.Log(tmp_path, 0, Process(torch.device("cpu"), rank=1, world=2))
    second.write({"step": 1}, ("step",))
    assert [row["step"] for row in common.read_log(tmp_path)] == [0]


def test_a_log_survives_a_last_line_that_was_cut_off(tmp_path):
    assert common.read_log(tmp_path) == []
    rows = [json.dumps({"step": step, "loss": 1 / (step + 1)}) for step in range(3)]
    (tmp_path / "log.jsonl").write_text("\n".join(rows) + "\n" + rows[0][:9])
    assert [row["step"] for row in common.read_log(tmp_path)] == [0, 1, 2]
    common.Log(tmp_path, 3, CPU).write({"step": 3}, ("step",))
    assert [row["step"] for row in common.read_log(tmp_path)] == [0, 1, 2, 3]


@pytest.fixture
def handlers():
    """Python's own signal handlers; afterwards those that were there before."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield own
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_true_once_it_came_and_lets_a_second_ctrl_c_through(handlers, number):
    stop = common.StopSignal()
    assert not stop and CPU.any(stop) is False
    os.kill(os.getpid(), number)
    assert stop and CPU.any(stop) is True
    assert (signal.getsignal(number) == handlers[number]) == (number == signal.SIGINT)      # SLURM and torchrun each send a SIGTERM


def test_after_the_loop_signals_are_handled_as_before(handlers):
    stop = common.StopSignal()
    stop.release()
    assert {number: signal.getsignal(number) for number in handlers} == handlers and not stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_bad_input_ends_with_exit_code_2_and_one_line(capsys):
    def main():
        raise UserError("--lam 7 is out of range: from 0 to 1")

    with pytest.raises(SystemExit) as e:
        common.main_guard(main)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err == "error: --lam 7 is out of range: from 0 to 1\n"


def test_a_fault_of_ours_keeps_its_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        common.main_guard(main)
    common.main_guard(lambda: None)                                             # and a good end ends quietly


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in ["potato", "cuda:99", "cpu:x"] + [name for name, there in here.items() if not there]:
        assert f"--device {device}" in fails(common.start_process, device)


def test_a_torch_built_without_cuda_is_reported_as_a_missing_device(monkeypatch):
    def zeros(*args, **kw):
        raise AssertionError("Torch not compiled with CUDA enabled")            # what such a build raises

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.delenv("RANK", raising=False)
    assert "--device cuda" in fails(common.start_process, "cuda")


def test_a_process_of_torchrun_touches_no_gpu_but_its_own(monkeypatch):
    calls, own = [], torch.device("cuda", 3)
    monkeypatch.setenv("RANK", "11"), monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", torch.device(device))))
    monkeypatch.setattr(torch, "zeros", lambda *args, device: calls.append(("zeros", torch.device(device))))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kw: calls.append((backend, kw["device_id"])))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kw: True)
    process = common.start_process("cuda")
    assert calls == [("set", own), ("zeros", own), ("nccl", own)] and process.device == own and process.bf16


def test_one_process_without_torchrun_has_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    process, layer = common.start_process("cpu"), nn.Linear(2, 2)
    assert (process.device.type, process.rank, process.world, process.main) == ("cpu", 0, 1, True)
    assert not dist.is_initialized() and process.wrap(layer) is layer
    process.barrier()
    with process.autocast():
        assert torch.is_autocast_enabled("cpu") == process.bf16


def test_the_random_stream_is_a_function_of_seed_step_and_rank():
    def draw(*key):
        common.seed_step(*key)
        return torch.rand(4)

    keys = list(itertools.product((0, 1, 2 ** 31), (0, 1, 10 ** 6), (0, 1, 31)))
    first = {key: draw(*key) for key in keys}
    for key in reversed(keys):
        torch.manual_seed(7), torch.rand(3), np.random.seed(1)
        assert torch.equal(draw(*key), first[key])
    assert len({tuple(x.tolist()) for x in first.values()}) == len(keys)
    assert torch.equal(draw(4, 2), draw(4, 2, 0))


def test_check_range_returns_the_value_or_names_the_range():
    for value in (0, 0.5, 1):
        assert common.check_range("--lam", value, 0, 1) is value
    for value in (-1e-9, 1.0001, math.nan, math.inf, None):
        message = fails(common.check_range, "--lam", value, 0, 1)
        assert "--lam" in message and str(value) in message and "from 0 to 1" in message


def test_the_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert common.default_workers(CPU) == 4 and common.default_workers(Process(torch.device("cuda"))) == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert common.default_workers(CPU) == 1 == common.default_workers(Process(torch.device("cuda")))


def test_the_curves_are_drawn(tmp_path):
    log = common.Log(tmp_path, 0, CPU)
    for step in range(3):
        log.write({"step": step, "loss": 1.0 / (step + 1)} | ({"probe": 0.5} if step == 2 else {}), ("step",))
    for rows in (common.read_log(tmp_path), [], [{"step": 0, "bad_clips": 0}]):             # a log may be lost, and hold nothing
        common.draw_curves(tmp_path / "curves.png", {"": rows}, "title")
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "curves.png").unlink()
