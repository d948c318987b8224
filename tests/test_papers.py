"""What the papers' scripts claim each in its own form: blocks, terms, sizes, recipes, one modality alone."""
import itertools
import math

import ajepa
import avjepa_lejepa
import avjepa_ncsu
import common
import data
import mjepa
import run
from common import UserError
from conftest import FORK, same, weights
from slow import block_parameters, count_parameters, is_uniform, layer_norm, linear, maps, narrow
from slow import patch_tokens, placements, quicken, random, recipe_of, record, slow_distance, slow_levels
from slow import slow_mlp, slow_positions, small_batch, small_model, train

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

GRIDS = {"video": (8, 14, 14), "audio": (8, 64)}
TOY = (4, 24)
ALONE = {mjepa: "--terms=separate-", avjepa_ncsu: "--modalities="}
for_both = pytest.mark.parametrize("script", ALONE, ids=lambda script: script.__name__)


# ---- views and masks -------------------------------------------------------------------------------------

PAIR = ("video", "audio")
VIEWS = [(ajepa, (), {(0, 1)}), (mjepa, (4.0, PAIR), {(1, 1)}), (avjepa_ncsu, (PAIR,), {(1, 1)}),
         (avjepa_lejepa, ("modality",), {(1, 1), (0, 1), (1, 0)})]              # (pictures, sound)


@pytest.mark.parametrize("script, more, has", VIEWS)
def test_views_begin_anywhere_where_they_fit_and_those_of_a_short_clip_with_it(script, more, has):
    starts = []
    for seed in range(400):
        views = script.plan_views(np.random.default_rng(seed), 12.0, 10.0, *more)
        assert {view.seconds for view in views} == {10.0}
        assert {(bool(view.video), view.audio) for view in views} == has
        starts += [view.start for view in views]
    assert is_uniform(starts, 0, 2)
    assert len(set(starts)) == len(starts)             # each has its own
    assert {view.start for view in script.plan_views(np.random.default_rng(0), 3.0, 10.0, *more)} == {0}


@for_both
def test_a_video_is_hidden_in_tubes_over_the_full_time_and_a_sound_is_not(script):
    for step in range(10):
        for mask_set in script.draw_masks(0, step, range(4), GRIDS, recipe_of(script)):
            for name, (_, target) in mask_set.items():
                grids = {m: GRIDS[m] for m in mjepa.INPUTS[name]}
                for m, hidden in maps(target, grids).items():
                    assert (hidden == hidden[:, :1]).all() == (m == "video")


@pytest.mark.parametrize("script, m, grid", [
    (mjepa, "video", (4, 4)), (mjepa, "video", (14, 14)), (avjepa_ncsu, "video", (4, 4)),
    (avjepa_ncsu, "video", (14, 14)), (avjepa_ncsu, "audio", (8, 12))])
def test_hidden_are_8_blocks_of_15_percent_and_2_of_70_of_one_size_a_step_but_for_a_few_single_patches(
        script, m, grid, monkeypatch):
    """Of a sound 8 and 2 of 4 x 6 patches."""
    sizes = record(monkeypatch, common, "block_size")
    unions = record(monkeypatch, common, "meet_count")
    grids = {"video": {"video": (2, *grid)}, "audio": {"audio": grid}}[m]
    recipe = recipe_of(script, ALONE[script] + m)
    total = math.prod(grid)
    singles = {8: [], 2: []}
    seen = set()
    for step in range(40):
        sizes.clear()
        unions.clear()
        script.draw_masks(2, step, range(4), grids, recipe)
        chosen = [size for _, size in sizes]
        assert len(chosen) == (2 if m == "video" else 0)        # one size for all clips and blocks
        for s, (number, share) in enumerate(((8, 0.15), (2, 0.7))):
            h, w = chosen[s] if chosen else (4, 6)
            area = share * total
            if chosen:
                assert abs(h * w - area) <= h / 2               # the width is rounded last
                assert (h - 0.5) ** 2 / 1.5 <= area <= (h + 0.5) ** 2 / 0.75
            seen.add((s, h, w))
            blocks = placements(grid, (h, w))
            calls = unions[4 * s:4 * s + 4]
            for (_, union, _), hidden in calls:
                assert h * w <= union.sum() <= min(total, number * h * w)
                inside = blocks[(blocks <= union).all((1, 2))]
                assert (inside.any(0) == union).all()
                singles[number].append((union ^ hidden).mean())
            assert len({hidden.sum() for _, hidden in calls}) == 1
            assert hidden.sum() <= total - 1
    assert max(map(np.mean, singles.values())) < 0.05
    assert grid != (14, 14) or len(seen) > 4                    # drawn in each step anew


SOUNDS = [(mjepa, "", GRIDS["audio"]), (mjepa, "", (4, 12))]
for masking in ("multiblock", "block", "time", "freq"):
    SOUNDS += [(ajepa, f"--masking={masking}", GRIDS["audio"]), (ajepa, f"--masking={masking}", TOY)]


@pytest.mark.parametrize("script, masking, grid", SOUNDS)
def test_the_blocks_of_a_sound_hide_60_to_75_percent_but_for_a_few_single_patches(
        script, masking, grid, monkeypatch):
    calls = record(monkeypatch, common, "meet_count")
    recipe = recipe_of(script, masking or "--terms=separate-audio")
    total = math.prod(grid)
    singles = []
    counts = []
    for step in range(50):
        calls.clear()
        masks = script.draw_masks(0, step, range(4), {"audio": grid}, recipe)
        own = calls[::2] if script is ajepa else calls         # what it targets, then what it hides
        assert len(own) == 4 * len(masks)
        for number, ((_, union, count), _) in enumerate(own):
            target = masks[number // 4]["a"][1]
            assert target.shape[1] == count
            assert 0.6 * total <= count <= 0.75 * total
            assert 0.6 * total <= union.sum() <= 0.75 * total
            counts.append(count)
            singles.append(abs(union.sum() - count) / total)
    assert np.mean(singles) < 0.02
    if script is ajepa:                                # few find no draw so near, of a hundred
        assert np.mean(np.array(singles) > 0.02 + 0.5 / total) < 0.05
    if (masking, grid) != ("--masking=freq", TOY):     # there it is always 3 rows of 4
        assert len(set(counts)) > 1
    if masking in ("", "--masking=multiblock"):
        assert np.mean(counts) / total == pytest.approx(0.675, abs=0.03)


# ---- terms -----------------------------------------------------------------------------------------------

def passes_of(model):
    """The inputs that run through an encoder together."""
    if isinstance(model, avjepa_ncsu.AVJEPA):
        return [list(model.inputs)]
    return [[name] for name in model.inputs]


@torch.no_grad()
def slow_passes(model, batch, masks):
    """What the encoders say, each level (N, D): {(input, clip, set): of the visible tokens, by the context
    encoder}, {(input, clip): of all tokens, by the teacher}."""
    student = model.context_encoder
    teacher = model.target_encoder
    layers = getattr(model, "layers", None)
    h = {}
    z = {}
    for names, b in itertools.product(passes_of(model), range(3)):
        modalities = set().union(*(model.inputs[name] for name in names))
        clip = {m: batch[m][b] for m in modalities}
        tokens = patch_tokens(student, clip)
        sizes = [masks[0][name][0].shape[1] + masks[0][name][1].shape[1] for name in names]
        levels = slow_levels(teacher, patch_tokens(teacher, clip), layers)
        for name, *parts in zip(names, *(level.split(sizes) for level in levels)):
            z[name, b] = parts
        for s, mask_set in enumerate(masks):
            visible = [x[mask_set[name][0][b]] for name, x in zip(names, tokens.split(sizes))]
            levels = slow_levels(student, torch.cat(visible), layers)
            counts = [len(x) for x in visible]
            for name, *parts in zip(names, *(level.split(counts) for level in levels)):
                h[name, b, s] = parts
    return h, z


def slow_predictions(model, h, masks, b, s):
    """{input: predictions (M, L D)} of one clip, token by token; h: what slow_passes found."""
    g = model.predictor
    found = {}
    for names in passes_of(model):
        visible = []
        hidden = []
        for name in names:
            embed = g.embed
            token = getattr(g, "mask_token", None)
            if isinstance(model, avjepa_ncsu.AVJEPA):  # a map for each input, a mask token for each set, too
                embed = embed[name]
                token = g.mask_tokens[name][s]
                e = slow_positions(g.positions[name])
            elif isinstance(model, mjepa.MJEPA):
                parts = [slow_positions(g.positions[m]) + g.modality[m] for m in model.inputs[name]]
                e = torch.cat(parts)
            else:
                e = slow_positions(g.positions)
            context, target = (index[b] for index in masks[s][name])
            seen = torch.cat(h[name, b, s], -1)
            visible += [linear(embed, x) + e[i] for x, i in zip(seen, context)]
            hidden += [token + e[j] for j in target]
        sizes = [masks[s][name][1].shape[1] for name in names]
        found.update(zip(names, narrow(g, visible, hidden).split(sizes)))
    return found


@torch.no_grad()
def slow_step(model, batch, masks, weight, kind):
    """What a first step shows, and the running means after it, by loops over clips, mask sets and tokens."""
    h, z = slow_passes(model, batch, masks)
    y = {}
    for key, levels in z.items():
        y[key] = torch.cat([layer_norm(level, eps=1e-5) for level in levels], -1)
    pooled = {key: layer_norm(levels[-1].mean(0), eps=1e-5) for key, levels in z.items()}
    predictions = {}
    for b, s in itertools.product(range(3), range(len(masks))):
        predictions[b, s] = slow_predictions(model, h, masks, b, s)
    of_a_jepa = isinstance(model, ajepa.AJEPA)
    means = {}
    pooled_means = {}
    shown = {}
    for name in model.inputs:
        share = weight[name] / weight[name].sum()
        known = [y[name, b] for b in range(3)]
        health = [h[name, b, 0][-1].mean(0) for b in range(3)]
        if of_a_jepa:                                  # the mean of the targets, the health of the teacher
            known = [x[masks[0][name][1][b]] for b, x in enumerate(known)]
            health = [z[name, b][-1].mean(0) for b in range(3)]
            shown["kept/a"] = torch.tensor(masks[0]["a"][0].shape[1] / 15)
        means[name] = sum(share[b] * x.mean(0) for b, x in enumerate(known))
        pooled_means[name] = sum(share[b] * pooled[name, b] for b in range(3))
        shown[f"embedding/{name}"] = torch.stack(health)
        column = {"a": "audio", "v": "video", "av": "av"}[name]
        shown[f"clip/{column}"] = torch.stack([h[name, b, 0][-1].mean(0) for b in range(3)])
    if isinstance(model, avjepa_ncsu.AVJEPA) and len(model.inputs) == 2:
        joined = [torch.cat([h["v", b, 0][-1], h["a", b, 0][-1]]) for b in range(3)]
        shown["clip/av"] = torch.stack([x.mean(0) for x in joined])
    for term in (*model.inputs, *getattr(model, "across", ())):
        source, _, target = term.partition("->")
        loss = 0.0
        nothing = 0.0
        for b, s in itertools.product(range(3), range(len(masks))):
            if target:                                 # across: the other input as a whole
                prediction = slow_mlp(model.cross[term], h[source, b, s][-1].mean(0))[None]
                truth = pooled[target, b][None]
                guess = pooled_means[target]
            else:                                      # within: its hidden tokens
                prediction = predictions[b, s][source]
                truth = y[source, b][masks[s][source][1][b]]
                guess = means[source]
            share = weight["av" if target else source][b].item() / len(masks)
            loss += share * slow_distance(prediction, truth, kind)
            nothing += share * slow_distance(guess.expand_as(truth), truth, kind)
        shown[f"loss/{term}"] = torch.tensor(loss)
        shown[f"know_nothing/{term}"] = torch.tensor(nothing)
    return shown, means, pooled_means


STEPS = [(ajepa, f"--loss={kind}") for kind in ("smooth_l1", "l2", "l1", "cosine")]
STEPS += [(ajepa, "--pos=sincos")]
STEPS += [(mjepa, f"--terms={terms}") for terms in mjepa.TERMS]
STEPS += [(avjepa_ncsu, f"--modalities={modalities}") for modalities in avjepa_ncsu.MODALITIES]


@pytest.mark.parametrize("script, flag", STEPS)
def test_the_terms_of_a_batch_are_what_loops_over_its_clips_sets_and_tokens_compute(script, flag):
    """In float32, outside of autocast. The second clip has no sound, and the weights are no mean."""
    model, recipe = small_model(script, flag)
    batch = small_batch(3)
    masks = script.draw_masks(5, 0, range(3), model.grids, recipe)
    weight = {"a": torch.tensor([0.5, 0, 0.25]), "v": torch.tensor([0.2, 0.3, 0.4]),
              "av": torch.tensor([0.7, 0, 0.6])}
    if script is ajepa:                                # has no clips without sound
        weight = {"a": torch.full((3,), 1 / 3)}
    loss, shown = model(batch, masks, 1.0 if script is ajepa else weight, 0)
    expected, means, pooled_means = slow_step(model, batch, masks, weight, recipe.get("loss", "l1"))
    assert shown.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(shown[name], x, atol=1e-5, rtol=1e-4)
    terms = [x.item() for name, x in expected.items() if name.startswith("loss/")]
    assert len({round(term, 5) for term in terms}) == len(terms)                # all differ
    assert loss.item() == pytest.approx(sum(terms), rel=1e-4)
    for name, module in getattr(model, "means", {}).items():
        torch.testing.assert_close(module.mean, means[name], atol=1e-5, rtol=1e-4)
    pooled = getattr(model, "pooled_means", {})
    assert set(pooled) == {term.split("->")[1] for term in getattr(model, "across", ())}
    for name, module in pooled.items():
        torch.testing.assert_close(module.mean, pooled_means[name], atol=1e-5, rtol=1e-4)


# ---- one modality alone ----------------------------------------------------------------------------------

@for_both
def test_runs_of_one_modality_see_the_clips_and_masks_of_the_joint_one_and_log_and_load_that_one_alone(
        toy, tmp_path, monkeypatch, script):
    quicken(monkeypatch, script)
    found = {}
    for m in ("", "audio", "video"):
        with monkeypatch.context() as patch:
            calls = record(patch, {mjepa: mjepa.MJEPA, avjepa_ncsu: avjepa_ncsu.AVJEPA}[script], "forward")
            train(script, toy, tmp_path / m, "--steps", 2, *([ALONE[script] + m] if m else []))
        found[m] = [args for args, _ in calls]
    for m in ("audio", "video"):
        for (_, batch, masks, *_), (_, every, all_masks, *_) in zip(found[m], found[""], strict=True):
            assert same(batch["index"], every["index"])
            assert torch.equal(batch[m], every[m])
            assert batch.keys() & {"video", "audio"} == {m}
            assert same(masks, [{m[0]: mask_set[m[0]]} for mask_set in all_masks])
        for row in run.read_log(tmp_path / m):
            names = {f"{kind}/{m[0]}" for kind in ("loss", "know_nothing", "std", "rank")}
            assert {key for key in row if "/" in key} == names
        assert weights(tmp_path / m)["encoder"].keys() & {"video", "audio"} == {m}
        encoder = common.load_encoder(tmp_path / m, cross=True)
        assert encoder.cross is None
        assert set(data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)) == {m}


@for_both
@pytest.mark.parametrize("name, m, other", [("esc50", "audio", "video"), ("ssv2", "video", "audio")])
def test_a_set_of_one_modality_trains_that_one_alone(script, name, m, other):
    """Both together are refused in test_methods.py."""
    words = ["--data", name, "--data-dir", "x"]
    script.get_args([*words, ALONE[script] + m])
    with pytest.raises(UserError, match=f"--data {name} has no "):
        script.get_args([*words, ALONE[script] + other])


# ---- the sizes and the recipes of the papers -------------------------------------------------------------

def ends(dim, embeds=1, levels=1, tokens=1):
    """Of a predictor of width 384: how many numbers its maps, its mask tokens and its norm have."""
    return embeds * (levels * dim + 1) * 384 + tokens * 384 + 2 * 384 + (384 + 1) * levels * dim


SIZES = [                                              # grids, all parameters, blocks of the predictor
    (ajepa, "base", {"audio": (8, 64)}, 86e6, 6, ends(768) + (8 + 64) * 384),
    (mjepa, "large", GRIDS, 304e6, 12, ends(1024, levels=4) + (8 + 196 + 8 + 64 + 2) * 384),
    (mjepa, "giant", GRIDS, 1.01e9, 12, ends(1408, levels=4) + (8 + 196 + 8 + 64 + 2) * 384)]
for size, dim, total in (("tiny", 192, 5.7e6), ("small", 384, 21.5e6), ("base", 768, 86e6)):
    beside = ends(dim, embeds=2, tokens=4)
    SIZES.append((avjepa_ncsu, size, {**GRIDS, "audio": (8, 12)}, total, 12, beside))


@pytest.mark.parametrize("script, size, grids, total, depth, beside", SIZES)
def test_the_paper_builds_a_vit_over_these_tokens_and_a_narrow_predictor(
        script, size, grids, total, depth, beside):
    """The parameters of each ViT: test_common.py."""
    recipe = recipe_of(script, "--size", size)
    with torch.device("meta"):
        model = script.make_model(recipe, script.make_inputs(recipe))
    vit = model.context_encoder
    count = count_parameters(model)
    assert model.grids == grids
    assert count["context_encoder"] == count["target_encoder"] == pytest.approx(total, rel=0.03)
    assert count["predictor"] == depth * block_parameters(384, 1536) + beside
    assert count.get("cross", 0) == (6 * 3 * (vit.dim + 1) * vit.dim if script is mjepa else 0)
    assert {block.heads for block in vit.blocks} == {common.SIZES[size][2]}
    assert {block.heads for block in model.predictor.blocks} == {12}
    assert vit.cls is None


SOUND = dict(sample_rate=16000, win_length=400, window="hann", log="ln", mel_frames=1024)
RECIPES = [                                            # beside what FORMULAS.md quotes: test_formulas.py
    (ajepa, dict(size="base", seconds=10.0, masking="multiblock", steps=None), SOUND),
    (mjepa, dict(size="large", image=224, epochs=None, terms="all", n_mels=128, n_fft=512, hop=160), SOUND),
    (avjepa_ncsu, dict(size="base", frames=16, stride=4, image=224, crop_scale=(0.3, 1.0), modalities="av",
                       mask_per="clip", clips=30_000),
     dict(size=224, frames=16, mel_frames=192, video_seconds=None, window="hann", win_length=2048,
          log="db_max", frame_rate=30)),
    (avjepa_lejepa, dict(size="base", frames=16, image=224, resize=256, crop_scale=(0.4, 1.0), steps=None,
                         mel_mean=-17.977, mel_std=24.468, absent="zero", local="modality", decay_all=True),
     dict(frames=16, mel_frames=801))]


@pytest.mark.parametrize("script, recipe, inputs", RECIPES)
def test_the_paper_recipe_has_the_values_of_the_paper(script, recipe, inputs):
    found = recipe_of(script)
    assert {name: found[name] for name in recipe} == recipe
    given = script.make_inputs(found)
    assert {name: getattr(given, name) for name in inputs} == pytest.approx(inputs)


# ---- SIGReg on two processes -----------------------------------------------------------------------------

def reference_sigreg(z, step, slices):
    """The formula, with the library's all_reduce, through which the gradient goes to the other processes."""
    directions = torch.randn(z.shape[1], slices, generator=torch.Generator().manual_seed(step))
    t = torch.linspace(-5, 5, 17)
    projected = (z @ (directions / directions.norm(dim=0)))[..., None] * t              # (N, S, K)
    waves = torch.stack([projected.cos().mean(0), projected.sin().mean(0)])
    waves = all_reduce(waves) / dist.get_world_size()
    phi = (-t ** 2 / 2).exp()
    error = (waves[0] - phi) ** 2 + waves[1] ** 2
    return len(z) * dist.get_world_size() * torch.trapezoid(error * phi, t).mean()


def sigreg_on_a_rank(rank, folder):
    """Value and gradient on this process's half of the batch, by both, go into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for loss in (common.sigreg, reference_sigreg):
        z = random(24, 6)[12 * rank:12 * rank + 12].requires_grad_()
        value = loss(z, 3, 32)
        value.backward()
        found.append((value.detach(), z.grad))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_sigreg_s_gradient_on_two_processes_is_that_through_the_library_s_all_reduce(tmp_path):
    """And, once DDP has averaged it, that of one process on the joined batch."""
    how = "fork" if FORK else "spawn"
    torch.multiprocessing.start_processes(sigreg_on_a_rank, (str(tmp_path),), nprocs=2, start_method=how)
    z = random(24, 6).requires_grad_()
    whole = common.sigreg(z, 3, 32)
    whole.backward()
    for rank in (0, 1):
        (value, gradient), (expected, by_library) = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(value, whole.detach())
        torch.testing.assert_close(gradient, by_library)
        torch.testing.assert_close(gradient / 2, z.grad[12 * rank:12 * rank + 12])
