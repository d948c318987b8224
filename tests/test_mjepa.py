"""MJEPA: its masks, its nine terms, its rows of terms, its alarms and its runs, each against a reference of its own."""
import copy, itertools, json, math, shutil, sys
from dataclasses import asdict
from pathlib import Path

import common, data, mjepa, probe
from common import Process, UserError
from conftest import ROOT, StopAfter, command, same, weights
from mjepa import CROSS, INTRA, MJEPA, MODALITIES, TERMS, draw_masks

import numpy as np
import pytest
import torch
import torch.distributed as dist

FULL, TOY = {"video": (8, 14, 14), "audio": (8, 64)}, {"video": (4, 6, 6), "audio": (4, 24)}       # the grids of the paper and of the toy
SMALL = {"video": (2, 4, 4), "audio": (3, 5)}                   # those of the model below: patches of 2 x 4 x 4 and of 4 x 4
SHAPES = {"video": (3, 4, 16, 16), "audio": (1, 12, 20)}
NANO, DIM, LEVELS = (32, 3, 4, 64), 32, 3
PAPER = ["--data", "audioset", "--data-dir", "x"]


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(common.SIZES, "nano", NANO)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe_of(*flags):
    return mjepa.get_args([*PAPER, *map(str, flags)])[1]


def toy_recipe(*flags):
    return mjepa.get_args([*map(str, flags)])[1]


def nano_config(terms="all", **other):
    shapes = {m: dict(shape=SHAPES[m][1 if m == "video" else 1:], patch=(2, 4, 4) if m == "video" else (4, 4)) for m in SHAPES}
    return dict(size="nano", video=None if terms == "separate-audio" else shapes["video"],
                audio=None if terms == "separate-video" else shapes["audio"], positions="factorised", levels=[0, 1]) | other


def nano_model(terms="all", seed=0, apart=True, **other):
    """A small MJEPA; apart: the teacher has other weights than the student, and all have biases and norms that matter."""
    common.seed_step(seed, 0)
    model = MJEPA(nano_config(terms, **other), TERMS[terms], 32, 2).eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters() if apart else ()):
            p.add_(0.1 * random(*p.shape, seed=i))
    return model


def clips_of(batch, seed=0):
    """video, audio"""
    return random(batch, *SHAPES["video"], seed=seed), random(batch, *SHAPES["audio"], seed=seed + 100)


def masks_of(batch, step=0, kinds=INTRA, rank=0):
    return draw_masks(5, step, rank, batch, SMALL, toy_recipe(), kinds)


def even(batch):
    return {kind: torch.full((batch,), 1 / batch) for kind in INTRA}


def hidden_maps(target, kind, grids):
    """(B, M) indices -> {modality: (B, *grid) bool}: what is hidden, the video's tokens first."""
    out, begin = {}, 0
    for m in MODALITIES[kind]:
        n = math.prod(grids[m])
        flat = np.zeros((len(target), n), bool)
        for b, row in enumerate(target.tolist()):
            for j in row:
                if begin <= j < begin + n:
                    flat[b, j - begin] = True
        out[m], begin = flat.reshape(-1, *grids[m]), begin + n
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def many():
    """{grids: (grids, masks of many steps of 8 clips)}"""
    return {name: (grids, [draw_masks(0, step, 0, 8, grids, recipe) for step in range(steps)])
            for name, grids, recipe, steps in (("toy", TOY, toy_recipe(), 110), ("full", FULL, recipe_of(), 12))}


@pytest.fixture
def drawn(monkeypatch):
    """What is hidden before any single patch: {"hide_tubes", "hide_blocks": every draw, in order; "chosen": the one of each clip}."""
    calls = {"hide_tubes": [], "hide_blocks": [], "chosen": []}

    def spied(name, key, real):
        def spy(*args, **more):
            calls[key].append(real(*args, **more))
            return calls[key][-1]
        monkeypatch.setattr(mjepa, name, spy)

    for name, key in (("hide_tubes", "hide_tubes"), ("hide_blocks", "hide_blocks"), ("nearest", "chosen")):
        spied(name, key, getattr(mjepa, name))
    return calls


@pytest.mark.parametrize("name", ["toy", "full"])
def test_visible_and_hidden_are_disjoint_and_complete_and_as_many_for_each_clip(many, name):
    grids, steps = many[name]
    for masks in steps:
        assert list(masks) == list(INTRA)
        for kind, sets in masks.items():
            total = sum(math.prod(grids[m]) for m in MODALITIES[kind])
            assert len(sets) == 2
            for context, target in sets:
                assert len(context) == len(target) == 8 and context.shape[1] >= 1 and target.shape[1] >= 1
                assert (torch.cat([context, target], 1).sort(1).values == torch.arange(total)).all()
                for m, hidden in hidden_maps(target, kind, grids).items():      # of each modality as many, and never none and never all
                    counts = hidden.reshape(8, -1).sum(1)
                    assert len(set(counts)) == 1 and 0 < counts[0] < math.prod(grids[m])


@pytest.mark.parametrize("name", ["toy", "full"])
def test_a_video_is_hidden_in_tubes_over_the_full_time_and_a_sound_is_not(many, name):
    grids, steps = many[name]
    for masks in steps:
        for kind in ("v", "av"):
            for _, target in masks[kind]:
                hidden = hidden_maps(target, kind, grids)
                assert (hidden["video"] == hidden["video"][:, :1]).all()
                if kind == "av" and name == "full":
                    assert not (hidden["audio"] == hidden["audio"][:, :1]).all()


@pytest.mark.parametrize("grids", [TOY, FULL], ids=["toy", "full"])
def test_each_mask_set_of_a_video_hides_what_its_blocks_cover_but_for_a_few_single_patches(drawn, grids, monkeypatch):
    recipe, sizes, singles, real, total = recipe_of(), [], [], common.block_size, math.prod(grids["video"][1:])
    monkeypatch.setattr(common, "block_size", lambda *a: (sizes.append(real(*a)), sizes[-1])[1])
    shares, paper = {0: [], 1: []}, ((8, 0.15), (2, 0.7))
    assert recipe["video_blocks"] == paper == toy_recipe()["video_blocks"]
    for step in range(40):
        for calls in (sizes, *drawn.values()):
            calls.clear()
        sets = draw_masks(2, step, 0, 4, grids, recipe, ("v",))["v"]
        assert len(sizes) == 2                                                  # one size for the step, not for each clip or block
        for s, ((blocks, area), (h, w)) in enumerate(zip(paper, sizes)):
            assert abs(h * w - area * total) <= h / 2                           # the width is rounded last
            low, high = recipe["video_aspect"]
            assert low * (h - 0.5) ** 2 <= area * total <= high * (h + 0.5) ** 2
            hidden = hidden_maps(sets[s][1], "v", grids)["video"][:, 0]
            for clip, chosen in zip(hidden, drawn["chosen"][4 * s:4 * s + 4]):
                assert h * w <= chosen.sum() <= min(total, blocks * h * w)
                # each hidden patch lies in a whole block of that size which is hidden
                whole = np.zeros_like(chosen)
                for top, left in itertools.product(range(chosen.shape[0] - h + 1), range(chosen.shape[1] - w + 1)):
                    if chosen[top:top + h, left:left + w].all():
                        whole[top:top + h, left:left + w] = True
                assert (whole == chosen).all()
                singles.append(sum(bool(a) != bool(b) for a, b in zip(clip.flat, chosen.flat)) / total)
                shares[s].append(clip.mean())
        assert any((m.sum() == hidden[0].sum()) or m.all() for m in drawn["hide_tubes"])        # the number is that of a draw
    assert np.mean(singles) < 0.04 and max(singles) < 0.35
    assert 0.55 < np.mean(shares[0]) < 0.8 and 0.75 < np.mean(shares[1]) <= 0.95


@pytest.mark.parametrize("grids", [TOY, FULL], ids=["toy", "full"])
def test_the_blocks_of_a_sound_hide_60_to_75_percent_before_any_single_patch(drawn, grids):
    recipe, total, singles, shares = recipe_of(), math.prod(grids["audio"]), [], []
    for step in range(25):
        for calls in drawn.values():
            calls.clear()
        sets = draw_masks(3, step, 0, 4, grids, recipe, ("a",))["a"]
        assert all(0.6 * total <= mask.sum() <= 0.75 * total for mask in drawn["hide_blocks"])
        for s, (context, target) in enumerate(sets):
            assert 0.6 * total <= target.shape[1] <= 0.75 * total and context.shape[1] == total - target.shape[1]
            hidden = hidden_maps(target, "a", grids)["audio"]
            singles += [(clip ^ chosen).mean() for clip, chosen in zip(hidden, drawn["chosen"][4 * s:4 * s + 4])]
            shares.append(target.shape[1] / total)
    assert np.mean(singles) < 0.02 and max(singles) < 0.12
    assert len(set(shares)) > 5 and np.mean(shares) == pytest.approx(0.675, abs=0.03)


def test_the_blocks_of_a_sound_are_four_and_have_the_area_and_the_aspect_of_the_recipe(monkeypatch):
    sizes, real, recipe = [], common.block_size, recipe_of()
    monkeypatch.setattr(common, "block_size", lambda *a: (sizes.append(real(*a)), sizes[-1])[1])
    for seed in range(200):
        before = len(sizes)
        mjepa.hide_blocks(np.random.default_rng(seed), FULL["audio"], recipe)
        assert (len(sizes) - before) % 4 == 0
    h, w = np.array(sizes).T
    assert (np.abs(h * w / 512 - 0.175) <= 0.025 + h / 2 / 512).all()
    assert (h * w).mean() / 512 == pytest.approx(0.175, abs=0.003) and set(h) == {3, 4}
    assert ((w / 64) / (h / 8)).mean() == pytest.approx(1.125, abs=0.05)        # relative to the grid


TINY = [{"video": (1, 2, 2), "audio": (4, 1)}, {"video": (1, 1, 2), "audio": (1, 2)}, {"video": (3, 3, 1), "audio": (2, 3)}]


@pytest.mark.parametrize("grids", TINY, ids=str)
def test_neither_modality_of_any_input_is_ever_wholly_hidden_or_wholly_visible_on_the_smallest_grids(grids):
    for step in range(3):
        for kind, sets in draw_masks(1, step, 0, 2, grids, recipe_of()).items():
            for context, target in sets:
                for hidden in hidden_maps(target, kind, grids).values():
                    flat = hidden.reshape(2, -1)
                    assert flat.any(1).all() and not flat.all(1).any() and context.shape[1] >= len(MODALITIES[kind])


def test_no_context_and_no_target_is_empty_in_thousands_of_draws():
    for grids, kinds, count in (({"video": (1, 3, 3), "audio": (4, 6)}, INTRA, 100), ({"video": (1, 2, 2)}, ("v",), 300)):
        for step in range(count):
            for kind, sets in draw_masks(9, step, 0, 4, grids, recipe_of(), kinds).items():
                total = sum(math.prod(grids[m]) for m in MODALITIES[kind])
                for context, target in sets:
                    assert len(MODALITIES[kind]) <= target.shape[1] <= total - len(MODALITIES[kind])
                    assert context.shape[1] + target.shape[1] == total


def test_the_last_row_column_and_frame_is_hidden_as_often_as_the_first(many):
    grids, steps = many["toy"]
    n = 8 * len(steps)
    for kind, s in itertools.product(INTRA, (0, 1)):
        share = {m: np.zeros(grids[m]) for m in MODALITIES[kind]}
        for masks in steps:
            for m, hidden in hidden_maps(masks[kind][s][1], kind, grids).items():
                share[m] += hidden.sum(0) / n
        for m, x in share.items():
            # as many are hidden in all clips of a step, and a place has a clip's draw alone: up to a few variances of one clip
            x, wide = x if m == "audio" else x[-1], 5.5 * math.sqrt(4 * 0.25 / n)
            assert x.min() > 0.1 and x.max() <= 1.0
            for turned in (x[::-1], x[:, ::-1]):
                np.testing.assert_allclose(x, turned, atol=wide)
            for first, last in ((x[0], x[-1]), (x[:, 0], x[:, -1])):
                assert first.mean() == pytest.approx(last.mean(), abs=wide / 2) and last.mean() > 0.2
            if m == "video":
                assert (share[m][0] == share[m][-1]).all()


def test_single_patches_are_spread_over_the_whole_grid(drawn):
    moved, n, recipe = {"v": np.zeros((6, 6)), "a": np.zeros((4, 24))}, 0, toy_recipe()
    for step in range(60):
        for kind, m in (("v", "video"), ("a", "audio")):
            drawn["chosen"].clear()
            sets = draw_masks(7, step, 0, 8, TOY, recipe, (kind,))[kind]
            for (_, target), chosen in zip(sets, (drawn["chosen"][:8], drawn["chosen"][8:])):
                hidden = hidden_maps(target, kind, TOY)[m]
                moved[kind] += sum(a ^ b for a, b in zip(hidden[:, 0] if m == "video" else hidden, chosen))
        n += 8
    for x in moved.values():
        halves = [part.sum() for part in np.array_split(x, 2, 0) + np.array_split(x, 2, 1)]
        assert x.sum() > 100
        assert abs(halves[0] - halves[1]) < 6 * math.sqrt(x.sum()) and abs(halves[2] - halves[3]) < 6 * math.sqrt(x.sum())


def test_masks_are_a_function_of_seed_step_rank_and_clip_alone():
    recipe, keys = toy_recipe(), list(itertools.product((0, 1), (0, 1, 7), (0, 1)))
    first = {key: draw_masks(*key, 3, TOY, recipe) for key in keys}
    for key in reversed(keys):
        np.random.seed(1), torch.manual_seed(sum(key))
        assert same(draw_masks(*key, 3, TOY, recipe), first[key])
        large = draw_masks(*key, 5, TOY, recipe)                                # nor of the batch
        assert all(torch.equal(a, b[:3]) for kind in INTRA for one, other in zip(first[key][kind], large[kind]) for a, b in zip(one, other))
    rows = [tuple(row.tolist()) for masks in first.values() for _, target in masks["av"] for row in target]
    assert len(set(rows)) == len(rows) == 2 * 3 * len(keys)                     # no two clips, sets, ranks, steps, seeds alike


@pytest.mark.parametrize("kinds", [("a",), ("v",), INTRA])
def test_the_masks_of_an_input_are_the_same_whichever_others_there_are(kinds):
    everything = draw_masks(3, 4, 1, 3, TOY, toy_recipe())
    assert same(draw_masks(3, 4, 1, 3, TOY, toy_recipe(), kinds), {kind: everything[kind] for kind in kinds})
    one = {m: TOY[m] for kind in kinds for m in MODALITIES[kind]}               # as main calls it: the grids of the encoder alone
    assert same(draw_masks(3, 4, 1, 3, one, toy_recipe(), kinds), {kind: everything[kind] for kind in kinds})


def test_all_ranks_hide_the_same_number_in_other_places():
    for step in range(6):
        found = [draw_masks(0, step, rank, 2, TOY, toy_recipe()) for rank in range(4)]
        for kind, s in itertools.product(INTRA, (0, 1)):
            assert len({tuple(x.shape for x in masks[kind][s]) for masks in found}) == 1
        assert len({tuple(row.tolist()) for masks in found for row in masks["av"][0][1]}) == 8


def test_no_two_draws_share_a_random_stream(monkeypatch):
    """numpy pads a seed with zeros: (seed, step, kind, 0, 0) is (seed, step, kind), so a clip must not be numbered 0."""
    states, real, recipe, steps, ranks, batch, sets = [], np.random.default_rng, toy_recipe(), 4, 3, 3, 4 * 2

    def spy(key):
        rng = real(key)
        states.append((step, rank, rng.bit_generator.state["state"]["state"]))
        return rng

    monkeypatch.setattr(np.random, "default_rng", spy)
    for step, rank in itertools.product(range(steps), range(ranks)):
        draw_masks(0, step, rank, batch, SMALL, recipe)
    assert len(states) == steps * ranks * sets * (1 + batch)
    own, other = {}, set()
    for step, rank, state in states:
        own.setdefault((step, state), set()).add(rank)
    for (_, state), seen in own.items():                                        # the step's own: the same on all ranks
        assert len(seen) in (1, ranks) and state not in other
        other.add(state)
    assert sum(len(seen) == ranks for seen in own.values()) == steps * sets
    assert sum(len(seen) == 1 for seen in own.values()) == steps * sets * ranks * batch


def test_the_masks_of_the_joint_input_and_of_the_two_sets_are_drawn_apart(many):
    """How much two masks of one clip overlap, less how much those of other steps do: zero within its standard error."""
    grids, steps = many["toy"]

    def maps(kind, s, m):
        return np.stack([hidden_maps(masks[kind][s][1], kind, grids)[m].reshape(8, -1) for masks in steps]).astype(float)

    found = {(kind, s, m): maps(kind, s, m) for kind in INTRA for s in (0, 1) for m in MODALITIES[kind]}
    for (one, x), (other, y) in itertools.combinations(found.items(), 2):
        if one[2] == other[2]:
            same_clip = (x * y).mean((1, 2)) - (x * np.roll(y, 7, 0)).mean((1, 2))              # (steps,)
        else:                                                                   # of two modalities: the corners of each
            x, y = x[..., 0] - x[..., -1], y[..., 0] - y[..., -1]
            same_clip = (x * y).mean(1)
        assert abs(same_clip.mean()) < 4.5 * same_clip.std() / math.sqrt(len(steps)), (one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------------------------

def views(*flags, duration=12.0, count=300):
    recipe = recipe_of(*flags)
    modalities = [m for m in SHAPES if any(m in MODALITIES[kind] for kind in mjepa.inputs_of(TERMS[recipe["terms"]]))]
    return [mjepa.plan_views(np.random.default_rng(seed), duration, recipe["seconds"], recipe["video_seconds"], modalities)
            for seed in range(count)]


def test_the_pictures_are_a_random_part_of_the_sound_that_is_heard():
    lengths, places = [], []
    for (view,) in views():
        begin, seconds = view.pictures
        assert view.seconds == 10 and seconds == 4 and (view.video, view.audio) == ("random", True)
        assert 0 <= view.start <= 2 and view.start <= begin and begin + seconds <= view.start + 10 + 1e-9
        lengths.append(view.start), places.append((begin - view.start) / 6)
    for x, low, high in ((lengths, 0, 2), (places, 0, 1)):
        x = (np.sort(x) - low) / (high - low)
        assert np.abs(x - (np.arange(300) + 0.5) / 300).max() < 2 / math.sqrt(300)              # Kolmogorov and Smirnov
    assert abs(np.corrcoef(lengths, places)[0, 1]) < 4 / math.sqrt(300)
    for (view,) in views(duration=6.0):                                         # a clip shorter than a view: inside of what there is
        assert view.start == 0 and 0 <= view.pictures[0] <= 2
    assert all(view.start == view.pictures[0] == 0 for (view,) in views(duration=1.5))


def test_aligned_sound_and_pictures_cover_the_same_span():
    for (view,) in views("--aligned"):
        assert view.pictures == (view.start, view.seconds) and view.seconds == 4 and 0 <= view.start <= 8
    recipe = recipe_of("--aligned")
    inputs = mjepa.make_inputs(recipe)
    assert inputs.seconds == inputs.video_seconds == 4 and inputs.mel_frames == 416 == 16 * math.ceil(401 / 16)
    assert mjepa.make_inputs(recipe_of()).seconds == 10 and mjepa.make_inputs(recipe_of()).video_seconds == 4
    toy = mjepa.make_inputs(toy_recipe("--aligned"))
    assert toy.seconds == toy.video_seconds == mjepa.RECIPE["video_seconds"][1]


def test_all_terms_are_given_the_same_stretches_of_the_same_clips():
    one = views()
    for terms in TERMS:
        for (view,), (other,) in zip(one, views("--terms", terms)):
            assert (view.start, view.seconds, view.pictures) == (other.start, other.seconds, other.pictures)
            assert other.video == (None if terms == "separate-audio" else "random")
            assert other.audio == (terms != "separate-video")


def test_the_mel_has_whole_patches_for_any_length():
    for flags, frames in (([], 1024), (["--seconds", "10"], 1024), (["--seconds", "3.84"], 400), (["--seconds", "2"], 208)):
        assert mjepa.make_inputs(recipe_of(*flags)).mel_frames == frames
    seconds, part, columns = (mjepa.RECIPE[name][1] for name in ("seconds", "video_seconds", "columns"))
    for flags, frames in (([], columns), (["--seconds", seconds], columns), (["--seconds", "10"], 1008), (["--seconds", "1"], 112)):
        recipe = toy_recipe(*flags)
        assert mjepa.make_inputs(recipe).mel_frames == frames
        assert recipe["video_seconds"] == min(part, recipe["seconds"])          # pictures of what is heard, not of more


# ---------------------------------------------------------------------------------------------------------------------
# The nine terms
# ---------------------------------------------------------------------------------------------------------------------

def layer_norm(x, norm=None, eps=1e-6):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x if norm is None else x * norm.weight + norm.bias


def slow_positions(positions):
    """One row for each place of the grid: that of the first axis plus that of the others."""
    rest = math.prod(positions.grid[1:])
    return [positions.first[i, 0] + positions.rest[0, j] for i, j in itertools.product(range(positions.grid[0]), range(rest))]


def patch_tokens(vit, kind, video, audio):
    """Tokens before the first block of one clip, patch by patch: linear map, position, modality; the video's first."""
    out = []
    for m, x in (("video", video), ("audio", audio)):
        if m not in MODALITIES[kind]:
            continue
        stem, size = getattr(vit, m), (2, 4, 4) if m == "video" else (4, 4)
        modality = 0 if vit.modality is None else vit.modality[("video", "audio").index(m), 0]
        for place, position in zip(itertools.product(*map(range, SMALL[m])), slow_positions(stem.positions)):
            cut = x[(slice(None), *(slice(p * s, p * s + s) for p, s in zip(place, size)))].flatten()
            out.append(stem.proj.weight.flatten(1) @ cut + stem.proj.bias + position + modality)
    return torch.stack(out)


def levels_of(vit, tokens):
    """One clip's tokens (N, D) through the blocks: what each level says, through its own norm."""
    out = []
    for n, block in enumerate(vit.transformer.blocks):
        tokens = block(tokens[None])[0]
        out.append(layer_norm(tokens, vit.norm_out if n == LEVELS - 1 else vit.norms[str(n)]))
    return out


def slow_predictor(g, kind, h, context, hidden):
    """h: the levels of the context's tokens, side by side (C, L D) -> predictions (M, L D)"""
    e = [position + g.modality[m] for m in MODALITIES[kind] for position in slow_positions(g.positions[m])]
    x = torch.stack([g.embed.weight @ h[i] + g.embed.bias + e[j] for i, j in enumerate(context.tolist())]
                    + [g.mask_token + e[j] for j in hidden.tolist()])
    for block in g.transformer.blocks:
        x = block(x[None])[0]
    return layer_norm(x[len(context):], g.norm) @ g.head.weight.T + g.head.bias


def slow_mlp(mlp, x):
    """Three linear maps, GELU between them."""
    one, two, three = (module for module in mlp if isinstance(module, torch.nn.Linear))
    for linear in (one, two):
        x = linear.weight @ x + linear.bias
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return three.weight @ x + three.bias


def l1(prediction, target):
    """The mean of the distances, one number after the other."""
    total = [abs(a - b) for p, t in zip(prediction.reshape(-1, target.shape[-1]).tolist(), target.reshape(-1, target.shape[-1]).tolist())
             for a, b in zip(p, t)]
    return sum(total) / len(total)


@torch.no_grad()
def slow_terms(model, video, audio, masks, weight, means=None):
    """{term: loss}, {term: what a predictor scores that knows nothing}, the running means after a first step."""
    losses, nothing = ({term: 0.0 for term in model.terms} for _ in range(2))
    h, y, pooled = {}, {}, {}
    for kind, b in itertools.product(model.kinds, range(len(weight[model.kinds[0]]))):
        clip = [None if x is None else x[b] for x in (video, audio)]
        z = levels_of(model.target_encoder, patch_tokens(model.target_encoder, kind, *clip))                # 2 everything
        y[kind, b] = torch.cat([layer_norm(level, eps=1e-5) for level in z], -1)
        pooled[kind, b] = layer_norm(z[-1].mean(0), eps=1e-5)
        for s, (context, _) in enumerate(masks[kind]):                                                      # 1 visible alone
            h[kind, b, s] = levels_of(model.context_encoder, patch_tokens(model.context_encoder, kind, *clip)[context[b]])
    if means is None:
        means = {}
        for kind in model.kinds:
            w, n = weight[kind].tolist(), len(weight[kind])
            means[kind] = sum(w[b] * y[kind, b].mean(0) for b in range(n)) / sum(w)
            means[f"pooled_{kind}"] = sum(w[b] * pooled[kind, b] for b in range(n)) / sum(w)
    for term in model.terms:
        source, target = term.split("->") if "->" in term else (term, None)
        for b, w in enumerate(weight["av" if target else source].tolist()):                                 # sound and pictures, or the one
            for s, (context, hidden) in enumerate(masks[source]):
                if target:                                                                                  # 3 predict, 4 loss
                    prediction = slow_mlp(model.cross[term], h[source, b, s][-1].mean(0))
                    truth, mean = pooled[target, b][None], means[f"pooled_{target}"]
                else:
                    prediction = slow_predictor(model.predictor, source, torch.cat(h[source, b, s], -1), context[b], hidden[b])
                    truth, mean = y[source, b][hidden[b]], means[source]
                losses[term] += w * l1(prediction, truth) / 2
                nothing[term] += w * l1(mean.expand_as(truth), truth) / 2
    return losses, nothing, means


@pytest.mark.parametrize("terms", TERMS)
def test_the_terms_of_a_batch_are_what_loops_over_its_clips_and_tokens_compute(terms):
    model, given, masks = nano_model(terms), clips_of(3), masks_of(3)
    given = [x if getattr(model.context_encoder, m) else None for m, x in zip(SHAPES, given)]
    weight = {"a": torch.tensor([0.5, 0, 0.25]), "v": torch.tensor([0.2, 0.3, 0.4]), "av": torch.tensor([0.7, 0, 0.6])}     # weighted sums
    loss, part = model(*given, masks, weight, 0)
    losses, nothing, means = slow_terms(model, *given, masks, weight)
    assert tuple(part["losses"]) == tuple(part["nothing"]) == TERMS[terms] and len(TERMS["all"]) == 9
    for term in model.terms:
        assert part["losses"][term].item() == pytest.approx(losses[term], rel=2e-5)
        assert part["nothing"][term].item() == pytest.approx(nothing[term], rel=2e-5)
    assert len({round(x, 6) for x in losses.values()}) == len(losses)           # each term is another number
    assert loss.item() == pytest.approx(sum(losses.values()), rel=1e-5)         # unweighted
    targets = {term.split("->")[1] for term in model.terms if "->" in term}
    assert set(dict(model.named_buffers(recurse=False))) == {f"mean_{x}" for x in (*model.kinds, *(f"pooled_{kind}" for kind in targets))}
    for name, mean in model.named_buffers(recurse=False):
        torch.testing.assert_close(mean, means[name.removeprefix("mean_")], atol=1e-5, rtol=1e-5)
    for kind in model.kinds:
        vit, seen, every = model.context_encoder, masks[kind][0][0], zip(*(x if x is not None else [None] * 3 for x in given))
        z = [levels_of(vit, patch_tokens(vit, kind, *clip)[seen[b]])[-1].mean(0) for b, clip in enumerate(every)]       # what is visible
        torch.testing.assert_close(part["embedding"][kind], torch.stack(z).detach(), atol=1e-5, rtol=1e-4)
    assert loss.requires_grad and not any(x.requires_grad for name in ("nothing", "embedding") for x in part[name].values())


def test_knowing_nothing_is_the_loss_of_the_running_mean_over_the_clips_that_have_it():
    model, means = nano_model(), None
    for step in range(3):
        given, masks, weight = clips_of(2, seed=step), masks_of(2, step), even(2)
        if step:
            weight["a"] = torch.tensor([0.0, 1.0])                              # the first clip has no sound
            weight["av"] = weight["a"]
        _, part = model(*given, masks, weight, step)
        _, _, now = slow_terms(model, *given, masks, weight)
        means = now if means is None else {k: means[k] + (now[k] - means[k]) / (step + 1) for k in now}     # so far the mean of all batches
        for name, mean in means.items():
            torch.testing.assert_close(getattr(model, f"mean_{name}"), mean, atol=1e-5, rtol=1e-5)
        _, nothing, _ = slow_terms(model, *given, masks, weight, means)
        for term, value in part["nothing"].items():
            assert value.item() == pytest.approx(nothing[term], rel=1e-4)
    model(*given, masks, weight, 5000)                                          # later each batch counts one in a hundred
    for name, mean in means.items():
        torch.testing.assert_close(getattr(model, f"mean_{name}"), mean + 0.01 * (now[name] - mean), atol=1e-5, rtol=1e-5)
    before = copy.deepcopy(model.state_dict())
    model(*given, masks, weight | {"a": torch.zeros(2), "av": torch.zeros(2)}, 1)               # a batch without sound
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) == (not name.startswith(("mean_v", "mean_pooled_v"))) or "mean_" not in name
               for name in before)


def test_the_loss_is_float32_under_bf16_autocast():
    model, given, masks = nano_model(), clips_of(2), masks_of(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, part = model(*given, masks, even(2), 0)
    assert {x.dtype for x in (loss, *part["losses"].values(), *part["nothing"].values(), *part["embedding"].values())} == {torch.float32}
    assert loss.item() == pytest.approx(nano_model()(*given, masks, even(2), 0)[0].item(), rel=0.05)


def test_each_level_of_the_targets_is_layer_normed_for_itself():
    x = 3 * random(2, 5, 4 * DIM) + torch.arange(4).repeat_interleave(DIM)
    y = mjepa.norm_levels(x, DIM)
    for level in y.split(DIM, -1):
        torch.testing.assert_close(level.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
        torch.testing.assert_close(level.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-4, rtol=0)
    for level in range(4):
        scaled = x.clone()
        scaled[..., level * DIM:(level + 1) * DIM] *= 7
        torch.testing.assert_close(mjepa.norm_levels(scaled, DIM), y, atol=1e-4, rtol=1e-4)

    given, masks, found = clips_of(2), masks_of(2), []
    for scaled in (None, "norms.0", "norms.1", "norm_out", "content"):          # and in the model
        model = nano_model()
        with torch.no_grad():
            if scaled == "content":
                model.target_encoder.norms["1"].bias.add_(random(DIM))
            elif scaled:
                norm = model.target_encoder.get_submodule(scaled)
                norm.weight.mul_(7), norm.bias.mul_(7)
        found.append({term: x.item() for term, x in model(*given, masks, even(2), 0)[1]["losses"].items()})
    for other in found[1:4]:
        assert other == pytest.approx(found[0], rel=1e-4)
    assert all((found[4][term] == found[0][term]) == ("->" in term) for term in found[0])       # across it is the last level alone


@pytest.mark.parametrize("size,levels", [("base", [2, 5, 8, 11]), ("large", [5, 11, 17, 23]), ("giant", [9, 19, 29, 39]),
                                         ("toy", [0, 1, 2, 3]), ("nano", [0, 1, 2])])
def test_the_levels_are_evenly_spread_and_end_with_the_last(size, levels):
    recipe = recipe_of("--size", size)
    config = mjepa.encoder_config(recipe, mjepa.make_inputs(recipe))
    with torch.device("meta"):
        model = MJEPA(config, ("v",), 64, 1)
    if size == "nano":
        levels = sorted({config["levels"][0], *config["levels"], 2})            # fewer layers than levels: none twice
    assert model.layers == [*config["levels"], common.SIZES[size][1] - 1] == levels
    assert sorted(map(int, model.target_encoder.norms)) == levels[:-1]
    assert model.predictor.head.out_features == len(levels) * model.context_encoder.dim


@pytest.mark.parametrize("kind", INTRA)
def test_to_exchange_two_hidden_tokens_exchanges_their_predictions_and_the_order_of_the_context_does_not_matter(kind):
    model = nano_model()
    context, target = masks_of(2)[kind][0]
    h = random(2, context.shape[1], LEVELS * DIM)
    swap = [target.shape[1] - 1, *range(1, target.shape[1] - 1), 0]             # of the joint input one of each modality
    if kind == "av":
        assert (target[:, 0] < 32).all() and (target[:, -1] >= 32).all()
    one, other = (model.predictor(h, context, t, MODALITIES[kind]) for t in (target, target[:, swap]))
    torch.testing.assert_close(one[:, swap], other, atol=1e-5, rtol=1e-5)
    assert min(torch.pdist(x).min() for x in one) > 1e-3                        # no two places have the same prediction
    turn = torch.arange(context.shape[1]).flip(0)
    torch.testing.assert_close(model.predictor(h[:, turn], context[:, turn], target, MODALITIES[kind]), one, atol=1e-5, rtol=1e-5)
    assert (model.predictor(h[:, turn], context, target, MODALITIES[kind]) - one).abs().max() > 1e-2        # but which token is where does


def test_one_place_of_a_sound_and_of_a_video_are_told_apart_by_their_modality():
    model = nano_model()
    with torch.no_grad():
        for p in model.predictor.positions.parameters():
            p.zero_()
    context, target = torch.arange(2)[None], torch.tensor([[5, 6, 40, 41]])     # two of the video, two of the sound
    x = model.predictor(random(1, 2, LEVELS * DIM), context, target, MODALITIES["av"])[0]
    torch.testing.assert_close(x[0], x[1]), torch.testing.assert_close(x[2], x[3])
    assert (x[0] - x[2]).abs().max() > 1e-2


def test_what_is_hidden_changes_no_bit_of_what_the_context_and_the_predictors_say():
    model, (video, audio), masks = nano_model(), clips_of(2), masks_of(2)
    others = {"v": video.clone(), "a": audio.clone()}
    context = {"v": masks["v"][0], "a": masks["a"][0]}
    for b in range(2):
        for kind, m, size in (("v", "video", (2, 4, 4)), ("a", "audio", (4, 4))):
            for j in context[kind][1][b].tolist():
                place = np.unravel_index(j, SMALL[m])
                others[kind][(b, slice(None), *(slice(p * s, p * s + s) for p, s in zip(place, size)))] = 9
    for kind, m in (("v", "video"), ("a", "audio")):
        encode = [model.context_encoder(**{m: x}, visible=context[kind][0], layers=model.layers) for x in
                  ((video if kind == "v" else audio), others[kind])]
        assert torch.equal(*encode)
        found = []
        hook = model.predictor.register_forward_hook(lambda module, args, out, found=found: found.append(out.detach()))
        first = {k: (v[:1] if k == kind else v) for k, v in masks.items()}
        for x in ((video, audio), (others["v"], audio) if kind == "v" else (video, others["a"])):
            model(*x, first, even(2), 0)
        hook.remove()
        a, b = found[:len(found) // 2], found[len(found) // 2:]
        of = list(INTRA).index(kind)                                            # the order of the terms; one set of the sound or the video
        at = 0 if kind == "a" else 2
        assert of in (0, 1) and torch.equal(a[at], b[at]) and not torch.equal(a[-1], b[-1])


def term_gradients(model, given, masks, weight):
    """{term: (its loss, {name: gradient of it alone})}"""
    _, part = model(*given, masks, weight, 0)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {term: (loss.item(), {name: g for (name, _), g in zip(named, torch.autograd.grad(
        loss, [p for _, p in named], retain_graph=True, allow_unused=True)) if g is not None}) for term, loss in part["losses"].items()}


def test_each_term_and_its_gradient_is_the_same_with_and_without_the_others():
    everything, given, masks = nano_model("all"), clips_of(3), masks_of(3)
    reference = term_gradients(everything, given, masks, even(3))
    for terms in ("intra", "intra+av"):
        model = nano_model(terms)
        model.load_state_dict({k: v for k, v in nano_model("all").state_dict().items() if k in model.state_dict()})
        found = term_gradients(model, given, masks, even(3))
        assert tuple(found) == TERMS[terms] and set(found) < set(reference)
        for term, (loss, gradient) in found.items():
            assert loss == reference[term][0] and same(gradient, reference[term][1])
    for terms, m in (("separate-audio", "audio"), ("separate-video", "video")):
        model, state, number = nano_model(terms), nano_model("all").state_dict(), list(SHAPES).index(m)
        for encoder in ("context_encoder", "target_encoder"):                   # without an embedding of the modality: into the bias
            state[f"{encoder}.{m}.proj.bias"] += state[f"{encoder}.modality"][number, 0]
        model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
        ((term, (loss, gradient)),) = term_gradients(model, [x if k == m else None for k, x in zip(SHAPES, given)], masks, even(3)).items()
        assert (term,) == TERMS[terms] and loss == pytest.approx(reference[term][0], rel=1e-6)
        for name, g in gradient.items():
            torch.testing.assert_close(g, reference[term][1][name], atol=1e-6, rtol=1e-4)
        missing = {name for name, g in reference[term][1].items() if g.abs().max() > 0} - gradient.keys()
        assert missing == {"context_encoder.modality"}


def test_the_rows_of_terms_are_those_of_the_papers_table():
    rows = {"separate-audio": {"a"}, "separate-video": {"v"}, "intra": {"a", "v", "av"}, "intra+av": {"a", "v", "av", "a->v", "v->a"},
            "all": {"a", "v", "av", "a->v", "v->a", "a->av", "av->a", "v->av", "av->v"}}
    assert {name: set(terms) for name, terms in TERMS.items()} == rows and set(INTRA) | set(CROSS) == rows["all"]
    assert recipe_of()["terms"] == toy_recipe()["terms"] == "all"
    assert [mjepa.inputs_of(TERMS[name]) for name in TERMS] == [["a"], ["v"], *[["a", "v", "av"]] * 3]


def test_what_only_a_dropped_term_needs_is_not_built():
    names = {terms: set(nano_model(terms).state_dict()) for terms in TERMS}

    def of(terms, *words):
        return {name for name in names[terms] if any(word in name for word in words)}

    assert not of("separate-audio", "video", "cross", "mean_v", "mean_av", "mean_pooled_v", "mean_pooled_av", "encoder.modality")
    assert not of("separate-video", "audio", "cross", "mean_a", "mean_av", "mean_pooled_a", "mean_pooled_av", "encoder.modality")
    assert of("separate-audio", "audio.proj", "positions.audio") and of("separate-video", "video.proj", "positions.video")
    assert names["separate-audio"] | names["separate-video"] < names["intra"] < names["intra+av"] < names["all"]
    for terms, which in (("intra", ()), ("intra+av", ("a->v", "v->a")), ("all", CROSS)):
        assert {name.split(".")[1] for name in of(terms, "cross.")} == set(which)
        assert len(of(terms, "cross.")) == 6 * len(which)                       # three weights and three biases of each
    recipe = recipe_of("--terms", "separate-audio")
    assert mjepa.encoder_config(recipe, mjepa.make_inputs(recipe))["video"] is None
    recipe = recipe_of("--terms", "separate-video")
    assert mjepa.encoder_config(recipe, mjepa.make_inputs(recipe))["audio"] is None
    for terms in ("intra", "intra+av", "all"):
        config = mjepa.encoder_config(recipe_of("--terms", terms), mjepa.make_inputs(recipe_of()))
        assert config["video"] == dict(shape=(16, 224, 224), patch=(2, 16, 16))
        assert config["audio"] == dict(shape=(128, 1024), patch=(16, 16))


@pytest.mark.parametrize("terms", TERMS)
def test_no_gradient_reaches_the_teacher_and_all_else_has_one(terms):
    model, given = nano_model(terms), clips_of(2)
    model(*[x if getattr(model.context_encoder, m) else None for m, x in zip(SHAPES, given)], masks_of(2), even(2), 0)[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.target_encoder.parameters())
    students = {name: p for name, p in model.named_parameters() if not name.startswith("target_encoder.")}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in students.values())
    groups = common.weight_decay_groups(model, 0.04)                            # as main calls it
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, students.values()))


def test_what_one_modality_shows_changes_no_bit_of_the_term_of_the_other():
    model, (video, audio), masks = nano_model(), clips_of(2), masks_of(2)
    first = term_gradients(model, (video, audio), masks, even(2))
    for own, other, changed in (("a", "v", (2 * video + 1, audio)), ("v", "a", (video, 2 * audio + 1))):
        found = term_gradients(model, changed, masks, even(2))
        assert found[own][0] == first[own][0] and same(found[own][1], first[own][1])
        assert found[other][0] != first[other][0] and found["av"][0] != first["av"][0]
        lacks = "video" if own == "a" else "audio"
        assert not any(f".{lacks}." in name and g.abs().max() > 0 for name, g in first[own][1].items())
    alone, other = model.context_encoder(audio=audio), model.context_encoder(video=video)
    with torch.no_grad():
        for name, p in model.context_encoder.named_parameters():
            if name.startswith("video."):
                p.add_(1)
        model.context_encoder.modality[0] += 1
    assert torch.equal(model.context_encoder(audio=audio), alone) and not torch.equal(model.context_encoder(video=video), other)


def test_a_clip_without_sound_trains_the_video_term_alone_and_is_in_no_mean_of_the_others():
    model, (video, audio), masks = nano_model(), clips_of(3), masks_of(3)
    batch = {"has_video": torch.ones(3, dtype=torch.bool), "has_audio": torch.tensor([True, False, True])}
    (weight,) = mjepa.weigh([batch], INTRA, Process(torch.device("cpu")))
    assert {kind: w.tolist() for kind, w in weight.items()} == {"a": [0.5, 0, 0.5], "av": [0.5, 0, 0.5], "v": pytest.approx([1 / 3] * 3)}
    first = term_gradients(model, (video, audio), masks, weight)
    loud = audio.clone()
    loud[1] = 50
    for term, (loss, gradient) in term_gradients(model, (video, loud), masks, weight).items():  # what it would say changes nothing
        assert loss == first[term][0] and same(gradient, first[term][1])
    pair = {kind: [tuple(x[[0, 2]] for x in part) for part in sets] for kind, sets in masks.items()}
    for term, (loss, gradient) in term_gradients(model, (video[[0, 2]], audio[[0, 2]]), pair, even(2)).items():
        assert (term == "v") == (abs(loss - first[term][0]) > 1e-5)             # the others are the mean over the two that have it
        for name, g in gradient.items() if term != "v" else ():
            torch.testing.assert_close(g, first[term][1][name], atol=1e-6, rtol=1e-4)


def test_a_batch_without_sound_leaves_zeros_and_no_nan():
    model, given, masks = nano_model(), clips_of(2), masks_of(2)
    batch = {"has_video": torch.ones(2, dtype=torch.bool), "has_audio": torch.zeros(2, dtype=torch.bool)}
    (weight,) = mjepa.weigh([batch], INTRA, Process(torch.device("cpu")))
    found = term_gradients(model, given, masks, weight)
    for term, (loss, gradient) in found.items():
        assert (loss > 0) == (term == "v") and all(g.isfinite().all() for g in gradient.values())
        assert term == "v" or all(g.abs().max() == 0 for g in gradient.values())
    assert all(x.isfinite().all() for x in model.state_dict().values())


def test_the_weights_of_a_step_are_a_mean_over_all_its_micro_batches():
    both = torch.tensor([True, True])
    some = [{"has_video": both, "has_audio": torch.tensor(has)} for has in ([True, True], [False, True], [False, False])]
    weight = mjepa.weigh(some, INTRA, Process(torch.device("cpu")))
    third = pytest.approx(1 / 3)
    assert [w["a"].tolist() for w in weight] == [w["av"].tolist() for w in weight] == [[third, third], [0, third], [0, 0]]
    assert all(w["v"].tolist() == [pytest.approx(1 / 6)] * 2 for w in weight)
    without = mjepa.weigh([{"has_video": torch.tensor([True, False])}], ("v",), Process(torch.device("cpu")))   # a row of one modality
    assert without[0]["v"].tolist() == [1, 0]


def test_the_teacher_begins_as_the_student_and_follows_it_by_a_constant_factor_its_buffers_untouched():
    """Closed form: tau^n theta_0 + sum over k of (1 - tau) tau^(n - 1 - k) theta_k."""
    model, tau, steps = nano_model(apart=False, positions="sincos"), recipe_of()["tau"], 4
    one, other = model.context_encoder.state_dict(), model.target_encoder.state_dict()
    assert same(dict(one), dict(other)) and all(one[k].data_ptr() != other[k].data_ptr() for k in one)
    buffers = {k: v.clone() for k, v in model.target_encoder.named_buffers()}
    optimizer, trail = torch.optim.AdamW(common.weight_decay_groups(model, 0.04), 1e-2), []
    begin = {k: p.detach().clone().double() for k, p in model.target_encoder.named_parameters()}
    for step in range(steps):
        model(*clips_of(2, seed=step), masks_of(2, step), even(2), step)[0].backward()
        optimizer.step(), optimizer.zero_grad()
        common.ema_update(model.target_encoder, model.context_encoder, tau)
        trail.append({k: p.detach().clone().double() for k, p in model.context_encoder.named_parameters()})
    assert tau == 0.99925 and buffers and same(buffers, dict(model.target_encoder.named_buffers()))
    for name, p in model.target_encoder.named_parameters():
        expected = tau ** steps * begin[name] + sum((1 - tau) * tau ** (steps - 1 - k) * x[name] for k, x in enumerate(trail))
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(p, model.context_encoder.get_parameter(name))


def test_one_batch_is_learnt_without_collapse():
    common.seed_step(0, 0)
    model = MJEPA(nano_config(), TERMS["all"], 64, 1)
    video = 2 * random(6, 3, 2, 4, 4).repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    audio = 2 * random(6, 1, 3, 5, seed=1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    masks, optimizer, stds = masks_of(6), torch.optim.AdamW(common.weight_decay_groups(model, 0.04)), []
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 15) * (1 - step / 130)
        loss, part = model(video, audio, masks, even(6), step)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        common.ema_update(model.target_encoder, model.context_encoder, 0.99)
        stds.append([common.health(part["embedding"][kind])[0] for kind in INTRA])
    for term in model.terms:
        assert part["losses"][term].item() < 0.85 * part["nothing"][term].item() and part["nothing"][term].item() > 0.15, term
    assert loss.item() < 0.5 * sum(part["nothing"].values()).item()
    assert all(last > 0.3 * first for first, last in zip(stds[0], stds[-1]))
    assert all(common.health(part["embedding"][kind])[1] > 2 for kind in INTRA)


# ---- the sizes and the recipe of the paper --------------------------------------------------------------------------

def block_parameters(d, m):
    return 4 * d + (d + 1) * 3 * d + (d + 1) * d + (d + 1) * m + (m + 1) * d


@pytest.mark.parametrize("size,dim,depth,heads,mlp,total", [("large", 1024, 24, 16, 4096, 304e6), ("giant", 1408, 40, 22, 6144, 1.01e9)])
def test_the_paper_builds_a_vit_over_1568_and_512_tokens_a_narrow_predictor_and_six_mlps(size, dim, depth, heads, mlp, total):
    recipe = recipe_of("--size", size)
    inputs = mjepa.make_inputs(recipe)
    with torch.device("meta"):
        model = MJEPA(mjepa.encoder_config(recipe, inputs, True), TERMS["all"], recipe["pred_dim"], recipe["pred_depth"])
        video, audio = torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 1024)
        both, sound = model.context_encoder.embed(video, audio), model.context_encoder.embed(audio=audio)
    assert {m: tuple(grid) for m, grid in model.grids.items()} == FULL
    assert both.shape == (1, 1568 + 512, dim) and sound.shape == (1, 512, dim)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    stems = (3 * 2 * 16 * 16 + 1) * dim + (8 + 196) * dim + (16 * 16 + 1) * dim + (8 + 64) * dim + 2 * dim  # and the modality
    assert count["context_encoder"] == count["target_encoder"] == depth * block_parameters(dim, mlp) + stems + 4 * 2 * dim  # a norm a level
    assert count["context_encoder"] == pytest.approx(total, rel=0.02)
    # embed, mask token, positions, modality, norm, head
    ends = (4 * dim + 1) * 384 + 384 + (8 + 196 + 8 + 64) * 384 + 2 * 384 + 2 * 384 + (384 + 1) * 4 * dim
    assert count["predictor"] == 12 * block_parameters(384, 1536) + ends
    assert count["cross"] == 6 * 3 * (dim + 1) * dim and set(model.cross) == set(CROSS)
    for part, d, h in ((model.context_encoder, depth, heads), (model.predictor, 12, 12)):
        assert len(part.transformer.blocks) == d and {b.heads for b in part.transformer.blocks} == {h}
    assert model.context_encoder.transformer.checkpoint and model.context_encoder.cls is None


def test_the_paper_recipe_is_the_table_of_the_papers_page():
    recipe = recipe_of()
    expected = dict(size="large", seconds=10.0, video_seconds=4.0, frames=16, image=224, tubelet=(2, 16, 16), mel_patch=(16, 16),
                    columns=1024, n_mels=128, n_fft=512, hop=160, video_blocks=((8, 0.15), (2, 0.7)), video_aspect=(1 / 1.5, 1 / 0.75),
                    audio_scale=(0.15, 0.2), audio_aspect=(0.75, 1.5), audio_hidden=(0.6, 0.75), levels=4, pred_depth=12, pred_dim=384,
                    tau=0.99925, batch_size=512, steps=150_000, lr_start=1e-4, lr=5.25e-4, warmup=12_000, weight_decay=0.04, epochs=None)
    assert {name: recipe[name] for name in expected} == expected and 150_000 == 500 * 300
    inputs = mjepa.make_inputs(recipe)
    assert (inputs.frames, inputs.size, inputs.sample_rate, inputs.win_length, inputs.log) == (16, 224, 16000, 400, "ln")
    assert inputs.frames / inputs.video_seconds == 4                            # pictures a second
    cooldown = mjepa.get_args([*PAPER, "--cooldown", "--init", "x"])[1]
    assert (cooldown["frames"], cooldown["steps"], cooldown["lr_end"], cooldown["lr"]) == (64, 12_000, 1e-6, 5.25e-4)
    assert cooldown["frames"] == 4 * recipe["frames"] and toy_recipe("--cooldown", "--init", "x")["frames"] == 4 * toy_recipe()["frames"]
    changed = {name for name in recipe if cooldown.get(name) != recipe[name]} - {"cooldown", "init"}
    assert changed == {"frames", "video_seconds", "steps"}


def test_the_learning_rate_warms_up_stays_and_cools_down_to_what_kin_ends_with():
    recipe = recipe_of()
    rates = [mjepa.learning_rate(step, recipe) for step in (0, 5999, 11_999, 12_000, 80_000, 149_999)]
    assert rates == pytest.approx([1e-4 + 4.25e-4 / 12_000, 3.125e-4, 5.25e-4, 5.25e-4, 5.25e-4, 5.25e-4], rel=1e-9)
    warm = np.diff([mjepa.learning_rate(step, recipe) for step in range(12_000)])
    np.testing.assert_allclose(warm, warm[0], rtol=1e-6)
    cool = mjepa.get_args([*PAPER, "--cooldown", "--init", "x"])[1]
    rates = [mjepa.learning_rate(step, cool) for step in range(12_000)]
    assert rates[0] == 5.25e-4 and rates[-1] == pytest.approx(1.06e-4, abs=1e-6)
    np.testing.assert_allclose(np.diff(rates), (1e-6 - 5.25e-4) / 15_000, rtol=1e-6)
    short = mjepa.get_args([*PAPER, "--cooldown", "--init", "x", "--steps", "100"])[1]          # another length: the same fall
    assert mjepa.learning_rate(50, short) == pytest.approx(mjepa.learning_rate(6000, cool))


# ---------------------------------------------------------------------------------------------------------------------
# Alarms
# ---------------------------------------------------------------------------------------------------------------------

def names(found):
    """The columns of which alarms speak."""
    return {key.split()[0] for key in found}


def log_of(n=60, noise=0.03, seed=0, **change):
    """n rows of a healthy run, in which the terms fall to half of what knowing nothing scores; change: {column: (n,) factor}."""
    rng, t = np.random.default_rng(seed), np.arange(n)
    columns = {"step": 10 * t}
    for term in TERMS["all"]:
        columns[term] = 0.4 + 0.4 * np.exp(-t / 8)
        columns[f"{term}/know_nothing"] = np.full(n, 0.8)
    for kind in INTRA:
        columns[f"rank_{kind}"] = 30 - 20 * np.exp(-t / 8)
        columns[f"std_{kind}"] = np.full(n, 0.5)
    for name, x in columns.items():
        factor = change[name] if name in change else 1
        columns[name] = x * factor * (np.exp(noise * rng.standard_normal(n)) if name != "step" else 1)
    return [{name: float(x[i]) for name, x in columns.items()} for i in range(n)]


def late(n, value, last):
    """1, and `value` in the last rows."""
    return np.where(np.arange(n) < n - last, 1.0, value)


def test_a_healthy_log_raises_no_alarm_at_any_moment():
    for seed in range(4):
        rows = log_of(seed=seed)
        assert all(mjepa.alarms(rows[:n + 1]) == {} for n in range(len(rows)))
    together = np.linspace(1, 2, 60)                                            # richer targets are harder: no alarm
    assert mjepa.alarms(log_of(**{"a": together, "a/know_nothing": together, "av": together, "av/know_nothing": together})) == {}


@pytest.mark.parametrize("term", INTRA)
def test_a_term_within_that_rises_is_named_suddenly_or_slowly(term):
    for factor in (late(60, 2.0, 3), late(60, 2.0, 6), np.where(np.arange(60) < 25, 1, np.linspace(0, 2.2, 60).clip(1))):
        found = mjepa.alarms(log_of(**{term: factor}))
        assert names(found) == {term} and term in found[f"{term} rises"] and "\n" not in found[f"{term} rises"]
    rows = log_of(**{term: late(60, 2.0, 10)})
    assert not any(mjepa.alarms(rows[:n]) for n in range(1, 51)) and f"{term} rises" in mjepa.alarms(rows[:54])     # when it happens
    assert mjepa.alarms(log_of(noise=0.05)) == {}                               # noise is no rise


@pytest.mark.parametrize("term", CROSS)
def test_a_term_across_at_its_floor_is_named(term):
    found = mjepa.alarms(log_of(**{term: late(60, 0.01, 8)}))
    assert names(found) == {term} and "floor" in found[f"{term} floor"]
    both = late(60, 0.01, 8)                                                    # its target says nothing: knowing nothing scores as little
    assert names(mjepa.alarms(log_of(**{term: both, f"{term}/know_nothing": both}))) == {term}
    assert mjepa.alarms(log_of(**{term: np.full(60, 0.7)})) == {}               # a term that is learnt well is not at its floor


@pytest.mark.parametrize("kind", INTRA)
def test_a_falling_effective_rank_is_named(kind):
    for factor in (late(60, 1 / 3, 10), np.linspace(1, 0.2, 60)):
        found = mjepa.alarms(log_of(**{f"rank_{kind}": factor}))
        assert names(found) == {f"rank_{kind}"} and "rank" in found[f"rank_{kind}"]
    assert mjepa.alarms(log_of(**{f"rank_{kind}": np.full(60, 0.5)})) == {}     # low from the start is no fall
    warmup = np.where(np.arange(60) < 10, 3, 1)
    assert mjepa.alarms(log_of(**{f"rank_{kind}": warmup}), 100) == {}          # nor is one in the warm-up, here 10 rows
    assert names(mjepa.alarms(log_of(**{f"rank_{kind}": warmup * late(60, 1 / 3, 10)}), 100)) == {f"rank_{kind}"}


def test_nothing_is_named_at_the_start_and_rows_of_fewer_terms_are_enough():
    wild = [1.0, 0.3, 2.0, 0.5, 4.0]
    for n in range(1, 6):
        rows = [{"step": i, "a": wild[i], "a/know_nothing": 0.8, "rank_a": wild[i] * 5, "std_a": 1.0} for i in range(n)]
        assert mjepa.alarms(rows) == {}
    rows = [{k: v for k, v in row.items() if k in ("step", "a", "a/know_nothing", "rank_a", "std_a")} for row in log_of(a=late(60, 2.0, 5))]
    assert names(mjepa.alarms(rows)) == {"a"}


def test_a_step_without_any_sound_is_no_alarm():
    """Its terms are 0, since no clip has them: nothing has gone wrong."""
    silent = {term for term in TERMS["all"] if term != "v"}
    silent |= {f"{term}/know_nothing" for term in silent}
    for where in ({59}, {57, 58, 59}, {40, 42, 44, 46, 48, 50}, set(range(30, 45, 2))):
        rows = [{k: 0.0 if i in where and k in silent else v for k, v in row.items()} for i, row in enumerate(log_of())]
        assert mjepa.alarms(rows) == {}, where


def test_a_term_that_no_clip_so_far_could_train_is_named():
    rows = [{k: 0.0 if k.split("/")[0] == "v" else v for k, v in row.items()} for row in log_of()]
    assert not any(mjepa.alarms(rows[:n]) for n in range(1, 5))
    found = mjepa.alarms(rows[:5])
    assert names(found) == {"v"} and "--terms" in found["v has none"]


def test_targets_of_a_term_within_that_say_nothing_are_named():
    found = mjepa.alarms(log_of(**{"a": late(60, 0.01, 8), "a/know_nothing": late(60, 0.01, 8)}))
    assert names(found) == {"a"} and "floor" in found["a floor"]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------

LITTLE = ["--size", "nano", "--workers", "0", "--device", "cpu"]


def flags(folder, out, *more):
    """A run on a folder of clips: without the report at the end."""
    return ["--data", "folder", "--data-dir", str(folder), "--recipe", "toy", "--out", str(out), "--batch-size", "4", "--log-every", "1",
            "--save-every", "1", *LITTLE, *map(str, more)]


def little(patch):
    """A small predictor and few pictures, the statistics of the mel over four clips, and no curves."""
    patch.setitem(common.SIZES, "nano", NANO)
    for name, value in (("stats_clips", 4), ("pred_dim", 32), ("pred_depth", 1), ("image", 16), ("frames", 4),
                        ("tubelet", (2, 8, 8)), ("levels", 3), ("tau", 0.99), ("n_mels", 64), ("lr", 1e-3), ("warmup", 100)):
        patch.setitem(mjepa.RECIPE, name, (value, value, ""))
    patch.setitem(mjepa.COOLDOWN, "frames", (16, 16, ""))


@pytest.fixture
def quick(monkeypatch):
    little(monkeypatch)
    monkeypatch.setattr(common, "draw_curves", lambda *a: None)


def quiet(rows):
    """The rows of a log without its times."""
    return [{k: v for k, v in row.items() if not k.startswith("ms_")} for row in rows]


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A finished run of four steps on the toy world with its evaluation, and the checkpoint after each step."""
    out, saved = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        real = common.save_checkpoint
        patch.setattr(common, "save_checkpoint", lambda path, **content: (saved.append(copy.deepcopy(content)), real(path, **content)))
        patch.setattr(probe, "frozen_schedule", lambda clips: (8, 5))
        mjepa.main(["--data-dir", str(toy), "--out", str(out), "--batch-size", "4", "--steps", "4", "--log-every", "1", "--save-every", "1",
                    *LITTLE])
    return out, saved


def test_a_run_leaves_checkpoint_log_curves_and_results(run):
    out, _ = run
    rows = common.read_log(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert np.isfinite(list(row.values())).all() and row["loss"] == pytest.approx(sum(row[term] for term in TERMS["all"]), rel=1e-4)
        assert all(row[term] > 0 and row[f"{term}/know_nothing"] > 0 for term in TERMS["all"])
        assert {f"{name}_{kind}" for name in ("std", "rank") for kind in INTRA} | {"grad_norm", "lr", "no_audio", "no_video"} < row.keys()
        assert row["lr"] == mjepa.learning_rate(row["step"], weights(out)["recipe"]) and row["no_audio"] == 0
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds") > 0 and set(results) == {"trained", "untrained", "raw input", "chance"}
    for name, row in results.items():
        assert all(0 <= row[m] <= 100 for m in ("audio", "video", "av")) and ("A->V" in row and "V->A" in row or name == "raw input")


def test_in_a_run_the_teacher_follows_the_student_by_tau_after_each_optimiser_step(run):
    out, saved = run
    content = weights(out)
    common.seed_step(content["args"]["seed"], 0)
    start = common.ViT(**content["encoder"]).state_dict()
    teacher, tau = start, content["recipe"]["tau"]
    assert [c["step"] for c in saved] == [1, 2, 3, 4] and tau == 0.99
    for c in saved:
        student, now = ({k[len(name):]: v for k, v in c["model"].items() if k.startswith(name)}
                        for name in ("context_encoder.", "target_encoder."))
        assert now.keys() == student.keys() == start.keys()
        for name in now:
            torch.testing.assert_close(now[name], tau * teacher[name] + (1 - tau) * student[name], atol=1e-6, rtol=1e-5)
        assert any(not torch.equal(student[name], start[name]) for name in now)
        teacher = now


def test_stopped_at_two_of_four_steps_and_continued_equals_four_steps_bit_for_bit(toy, run, quick, tmp_path, monkeypatch, capsys):
    out, _ = run
    args = ["--data-dir", str(toy), "--out", str(tmp_path), "--batch-size", "4", "--steps", "4", "--log-every", "1", *LITTLE]
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(common, "StopSignal", lambda: StopAfter(2))
        mjepa.main(args)
    assert weights(tmp_path)["step"] == 2 and "the same command goes on" in capsys.readouterr().out
    with monkeypatch.context() as patch:                                        # the mel's statistics come from the checkpoint
        patch.setattr(data, "mel_stats", None)
        mjepa.main(args)
    one, two = weights(out), weights(tmp_path)
    assert all(one["model"][f"mean_{name}{kind}"].abs().sum() > 0 for kind in INTRA for name in ("", "pooled_"))
    assert all(same(one[key], two[key]) for key in ("step", "steps", "model", "optimizer", "recipe", "inputs", "encoder"))
    rows, again = (quiet(common.read_log(o)) for o in (out, tmp_path))
    assert rows == again and len(rows) == 4


@pytest.mark.parametrize("terms,columns", [("separate-audio", {"audio"}), ("separate-video", {"video"})])
def test_a_run_of_one_modality_reports_that_one_and_its_encoder_takes_it_alone(toy, quick, tmp_path, monkeypatch, terms, columns):
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips: (8, 2))
    monkeypatch.setattr(data, "TOY", dict(data.TOY))
    mjepa.main(["--data-dir", str(toy), "--out", str(tmp_path), "--batch-size", "4", "--steps", "1", "--log-every", "1", "--terms", terms,
                *LITTLE])
    results = json.loads((tmp_path / "results.json").read_text())
    results.pop("seconds")
    assert all(set(row) == columns for row in results.values())
    (row,) = common.read_log(tmp_path)
    (kind,) = mjepa.inputs_of(TERMS[terms])
    assert {k for k in row if k in TERMS["all"]} == set(TERMS[terms]) and np.isfinite(list(row.values())).all()
    assert {k for k in row if k.startswith(("std_", "rank_"))} == {f"std_{kind}", f"rank_{kind}"}
    encoder, (m,) = common.load_encoder(tmp_path), columns
    clip = data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)
    tokens, _ = encoder(**{m: clip[m]})
    assert tokens.shape[2] == DIM and not encoder.cross


@pytest.mark.parametrize("terms", ["separate-audio", "separate-video"])
def test_a_clip_prepared_for_the_encoder_of_one_modality_holds_what_it_takes(toy, terms):
    recipe = toy_recipe("--terms", terms)
    inputs = mjepa.make_inputs(recipe)
    clip = data.load_clip(toy / "test" / "00000.mp4", asdict(inputs))           # README: encoder(**data.load_clip(file, encoder.inputs))
    assert set(clip) == {terms.removeprefix("separate-")}


def test_load_encoder_gives_the_tokens_of_the_context_encoder_for_one_modality_or_both_and_the_predictors_across(toy, run):
    out, _ = run
    content, encoder = weights(out), common.load_encoder(out, cross=True)
    clip = data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)
    model = MJEPA(content["encoder"], TERMS["all"], 32, 1)
    model.load_state_dict(content["model"])
    with torch.no_grad():
        for given in ({"audio": clip["audio"]}, {"video": clip["video"]}, clip):
            tokens, embedding = encoder(**given)
            assert torch.equal(tokens, model.context_encoder(**given)) and not torch.equal(tokens, model.target_encoder(**given))
            assert torch.equal(common.load_encoder(out, weights="target")(**given)[0], model.target_encoder(**given))
            assert torch.equal(encoder.teacher(**given)[0], model.target_encoder(**given))
            torch.testing.assert_close(embedding, tokens.mean(1))
        for name in CROSS:
            assert torch.equal(encoder.cross[name](embedding), model.cross[name](embedding))
        alone = encoder(audio=clip["audio"])[0]
        for name, p in encoder.vit.named_parameters():                          # nothing of the video is in it
            if name.startswith("video."):
                p.fill_(float("nan"))
        encoder.vit.modality[0] = float("nan")
        assert torch.equal(encoder(audio=clip["audio"])[0], alone)
    assert set(encoder.cross) == set(CROSS) and encoder.method == "mjepa" and encoder.projector is None and encoder.step == 4
    common.seed_step(0, 0)
    begin = MJEPA(content["encoder"], TERMS["all"], 32, 1).target_encoder
    assert same(common.load_encoder(out, untrained=True).vit.state_dict(), begin.state_dict())


def watch(patch):
    """What a run reads, (clip, its random state), and what the model is given, (video, audio, masks), as it comes."""
    seen, item, forward = [], data.Clips.item, MJEPA.forward
    patch.setattr(data.Clips, "item", lambda self, index, rng: (
        seen.append((int(index), rng.bit_generator.state["state"]["state"])), item(self, index, rng))[1])
    patch.setattr(MJEPA, "forward", lambda self, *a: (seen.append(a[:3]), forward(self, *a))[1])
    return seen


def test_two_runs_of_other_terms_see_the_same_clips_under_the_same_masks(toy, quick, tmp_path, monkeypatch):
    found = {}
    for terms in ("all", "intra", "separate-audio", "separate-video"):
        with monkeypatch.context() as patch:
            seen = watch(patch)
            patch.setattr(data, "mel_stats", lambda *a: (torch.zeros(64), torch.ones(64)))
            mjepa.main(flags(toy / "train", tmp_path / terms, "--steps", 2, "--terms", terms))
        found[terms] = seen
    clips = [x for x in found["all"] if len(x) == 2]
    assert len(clips) == 8
    for seen in found.values():
        assert [x for x in seen if len(x) == 2] == clips
        for (video, audio, masks), (all_video, all_audio, all_masks) in zip(*([x for x in s if len(x) == 3] for s in (seen, found["all"]))):
            assert same({kind: all_masks[kind] for kind in masks}, masks)
            assert (video is None or torch.equal(video, all_video)) and (audio is None or torch.equal(audio, all_audio))
            assert (video is None, audio is None) == ("v" not in masks, "a" not in masks)


@pytest.mark.parametrize("variant", [["--terms", "intra+av", "--accumulate", "2"], ["--checkpoint-activations", "--aligned"]], ids=" ".join)
def test_each_variant_trains_and_leaves_no_parameter_without_a_gradient(toy, quick, tmp_path, monkeypatch, variant):
    """DDP refuses unused parameters: whatever a flag drops must not be built."""
    models, seen, build, real = [], [], MJEPA.__init__, torch.optim.AdamW.step
    monkeypatch.setattr(MJEPA, "__init__", lambda self, *a: (build(self, *a), models.append(self))[0])
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (seen.append(
        {name for name, p in models[0].named_parameters() if p.grad is None}), real(self, *a))[1])
    mjepa.main(flags(toy / "train", tmp_path, "--steps", 2, *variant))
    assert seen == [{name for name, _ in models[0].named_parameters() if name.startswith("target_encoder.")}] * 2
    rows = common.read_log(tmp_path)
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() and row["grad_norm"] > 0 for row in rows)


def test_the_gradient_of_a_step_is_the_sum_over_its_micro_batches_of_the_whole_steps_mean(toy, quick, tmp_path, monkeypatch):
    """--accumulate 2 = 1: the same loss, gradient, embeddings."""
    monkeypatch.setattr(common, "start_process", lambda device: Process(torch.device("cpu")))               # without bf16
    for name, more in (("one", []), ("two", ["--accumulate", "2"])):
        mjepa.main(flags(toy / "train", tmp_path / name, "--steps", 1, *more))
    one, two = (common.read_log(tmp_path / name)[0] for name in ("one", "two"))
    for key in ("loss", "grad_norm", *TERMS["all"], *(f"{x}_{kind}" for x in ("std", "rank") for kind in INTRA)):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key
    one, two = (weights(tmp_path / name)["optimizer"]["state"] for name in ("one", "two"))
    for number in one:
        torch.testing.assert_close(one[number]["exp_avg"], two[number]["exp_avg"], atol=1e-6, rtol=1e-3)


def silent_folder(toy, clips, folder, silent, count=8):
    """A folder of `count` clips, of which those in the places `silent` of the first epoch (seed 0) have no sound."""
    folder.mkdir()
    order = np.random.default_rng((0, 0)).permutation(count)
    mute, loud = (clips / "silent.mp4").read_bytes(), sorted((toy / "train").glob("*.mp4"))
    for place, index in enumerate(order):
        (folder / f"{index:02d}.mp4").write_bytes(mute if place in silent else loud[index].read_bytes())
    return folder


def test_a_step_without_any_sound_trains_the_video_alone_and_is_counted_and_the_run_goes_on(toy, clips, quick, tmp_path, monkeypatch):
    folder, saved, real = silent_folder(toy, clips, tmp_path / "clips", {1, 2, 3}), [], common.save_checkpoint
    monkeypatch.setattr(common, "save_checkpoint", lambda path, **c: (saved.append(copy.deepcopy(c["model"])), real(path, **c)))
    mjepa.main(flags(folder, tmp_path / "run", "--steps", 4, "--batch-size", 2))
    rows = common.read_log(tmp_path / "run")
    assert [row["no_audio"] for row in rows] == [1, 3, 3, 3] and all(np.isfinite(list(row.values())).all() for row in rows)
    for row in rows:
        for term in TERMS["all"]:
            silent = row["step"] == 1 and term != "v"
            assert (row[term] == 0) == silent and (row[f"{term}/know_nothing"] == 0 or not silent)
    assert rows[1]["loss"] == pytest.approx(rows[1]["v"]) and rows[1]["grad_norm"] > 0
    assert all(x.isfinite().all() for model in saved for x in model.values())
    for name in saved[0]:                                                       # what a sound says leaves no trace in the means
        if name.startswith("mean_"):
            assert torch.equal(saved[0][name], saved[1][name]) == (name.split("_")[-1] != "v"), name


def test_an_alarm_is_shown_once_when_it_begins_and_not_again_when_the_run_goes_on(toy, quick, tmp_path, monkeypatch, capsys):
    """It is shown again if it comes back after 20 rows without."""
    wrong = {"a": "a rises: 9, after 1"}
    monkeypatch.setattr(mjepa, "alarms", lambda rows, warmup: wrong if rows[-1]["step"] in (1, 2, 3, 5, 26) else {})
    args = flags(toy / "train", tmp_path, "--steps", 28, "--save-every", 100, "--terms", "separate-audio")
    with monkeypatch.context() as patch:
        patch.setattr(common, "StopSignal", lambda: StopAfter(3))
        mjepa.main(args)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING at step 1: a rises: 9, after 1" in out
    mjepa.main(args)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING at step 26: a rises" in out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(toy, quick, tmp_path, monkeypatch):
    real, calls = mjepa.prediction_loss, []
    monkeypatch.setattr(mjepa, "prediction_loss", lambda *a: (calls.append(1), real(*a) * (float("nan") if len(calls) > 4 else 1))[1])
    with pytest.raises(UserError, match="not finite at step 1"):                # four calls a step: two sets, and knowing nothing
        mjepa.main(flags(toy / "train", tmp_path, "--steps", 3, "--terms", "separate-audio"))
    assert weights(tmp_path)["step"] == 1 and all(x.isfinite().all() for x in weights(tmp_path)["model"].values())


# ---- the last phase -------------------------------------------------------------------------------------------------

def interpolated(before, count):
    """Rows (T, 1, D) at the middles of `count` equal parts of the same time, linear between the middles of the T, constant beyond."""
    before = before[:, 0].numpy()
    at = (np.arange(count) + 0.5) * len(before) / count - 0.5
    return np.stack([np.interp(at, np.arange(len(before)), column) for column in before.T], 1)[:, None]


def test_the_cooldown_starts_from_the_checkpoint_with_more_frames_and_interpolated_positions(toy, run, quick, tmp_path, monkeypatch):
    out, _ = run
    monkeypatch.setattr(data, "mel_stats", None)                                # the statistics are the checkpoint's
    mjepa.main(flags(toy / "train", tmp_path, "--steps", 1, "--cooldown", "--init", out, "--lr", 0))
    before, after = weights(out), weights(tmp_path)
    assert after["inputs"]["frames"] == 4 * before["inputs"]["frames"] and after["encoder"]["video"]["shape"][0] == 16
    assert after["inputs"]["video_seconds"] == after["inputs"]["seconds"] == before["inputs"]["seconds"]
    assert all(after["inputs"][k] == before["inputs"][k] and len(before["inputs"][k]) == 64 for k in ("mel_mean", "mel_std"))
    assert after["step"] == 1 and after["model"].keys() == before["model"].keys()
    stretched = {"context_encoder.video.positions.first", "target_encoder.video.positions.first", "predictor.positions.video.first"}
    for name, now in after["model"].items():
        context = before["model"][name.replace("target_encoder", "context_encoder")]           # the teacher takes a step towards it
        tau = 0.99 if name.startswith("target_encoder") else 0.0
        if name in stretched:
            assert now.shape[0] == 8 and before["model"][name].shape[0] == 2
            expected = tau * interpolated(before["model"][name], 8) + (1 - tau) * interpolated(context, 8)
            np.testing.assert_allclose(now.numpy(), expected, atol=1e-6)
        elif tau:
            torch.testing.assert_close(now, tau * before["model"][name] + (1 - tau) * context, atol=1e-6, rtol=1e-5)
        elif not name.startswith("mean_"):
            assert torch.equal(now, before["model"][name]), name                # the learning rate is 0
    # AdamW goes on with its moments, but for the positions that were stretched: those have seen one step alone
    model = MJEPA(after["encoder"], TERMS["all"], 32, 1)
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = common.weight_decay_groups(model, 0.04)
    names = [trained[id(p)] for group in groups for p in group["params"]]
    old, new = before["optimizer"]["state"], after["optimizer"]["state"]
    for i, name in enumerate(names):
        assert new[i]["step"] == (1 if name in stretched else old[i]["step"] + 1), name
        if name in stretched:
            assert new[i]["exp_avg"].shape[0] == 8
    with pytest.raises(UserError, match="began from"):                          # another beginning for a run that is there
        mjepa.main(flags(toy / "train", tmp_path, "--steps", 1, "--cooldown", "--init", "other", "--lr", 0))


def test_a_cooldown_needs_a_checkpoint_and_one_of_this_method_and_size(toy, run, quick, tmp_path):
    out, _ = run
    torch.save({**weights(out), "method": "ajepa"}, tmp_path / "other.pt")
    for more, sentence in ((["--cooldown"], "--cooldown needs --init"),
                           (["--cooldown", "--init", tmp_path / "no.pt"], "no such checkpoint"),
                           (["--cooldown", "--init", tmp_path / "other.pt"], "checkpoint of ajepa, not of mjepa"),
                           (["--init", out, "--size", "toy"], "other names|another shape"),
                           (["--init", out, "--terms", "intra"], "other names"),
                           (["--init", out, "--out", out], "written over"),
                           (["--init", out / "latest.pt", "--out", out], "written over")):
        with pytest.raises(UserError, match=sentence) as error:
            mjepa.main(flags(toy / "train", tmp_path / "run", "--steps", 1, *more))
        assert "\n" not in str(error.value) and not (tmp_path / "run" / "latest.pt").exists()
    args, recipe = mjepa.get_args(["--cooldown", "--init", str(out)])                   # by itself it takes another folder
    assert args.out == "runs/mjepa-cooldown-toy-seed0" and "init" not in recipe


def test_a_run_with_init_goes_on_when_its_first_checkpoint_is_gone(toy, run, quick, tmp_path, monkeypatch):
    shutil.copytree(run[0], tmp_path / "first")
    args = flags(toy / "train", tmp_path / "run", "--steps", 3, "--init", tmp_path / "first", "--terms", "all")
    with monkeypatch.context() as patch:
        patch.setattr(common, "StopSignal", lambda: StopAfter(1))
        mjepa.main(args)
    shutil.rmtree(tmp_path / "first")
    mjepa.main(args)
    assert weights(tmp_path / "run")["step"] == 3


# ---- two processes --------------------------------------------------------------------------------------------------

HAS = {0: [True, False, True, True], 1: [False] * 4}            # the second process has no clip with sound


def part_of(rank):
    """Micro-batches of a process: [(video, audio, masks, weights' input)]"""
    video, audio = clips_of(8, seed=3)
    masks, has = masks_of(4, 6, rank=rank), torch.tensor(HAS[rank])
    return [(video[rank::2][part], audio[rank::2][part], {kind: [tuple(x[part] for x in pair) for pair in masks[kind]] for kind in INTRA},
             {"has_video": torch.ones(2, dtype=torch.bool), "has_audio": has[part]}) for part in (slice(0, 2), slice(2, 4))]


def on_a_rank(rank, folder, clips):
    """What one of two processes does; what it finds goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process, found = Process(torch.device("cpu"), rank, 2), {}
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        model = nano_model()
        wrapped, micro = process.wrap(model), part_of(rank)                     # it must live until after the backward pass
        weight, total = mjepa.weigh([m[3] for m in micro], INTRA, process), 0
        for i, (m, w) in enumerate(zip(micro, weight)):
            with wrapped.no_sync() if i == 0 else common.contextlib.nullcontext():
                loss, part = wrapped(*m[:3], w, 0)
                loss.backward()
            total += torch.stack([loss, *part["losses"].values()]).detach()
        found["loss"], found["gradient"] = total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        seen, item, models, build = [], data.Clips.item, [], MJEPA.__init__     # and a real run, in the same process group
        patch.setattr(data.Clips, "item", lambda self, index, rng: (seen.append(int(index)), item(self, index, rng))[1])
        patch.setattr(MJEPA, "__init__", lambda self, *a: (build(self, *a), models.append(self))[0])
        patch.setattr(common, "start_process", lambda device: process)
        patch.setattr(common, "draw_curves", lambda *a: None)
        mjepa.main(flags(Path(clips), Path(folder) / "run", "--steps", 2, "--batch-size", 8, "--accumulate", 2))
        found["run"] = {"seen": seen[-8:], "weights": {k: p.detach() for k, p in models[0].named_parameters()}}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(toy, clips, tmp_path_factory):
    """In the first step of the run, the second process has clips without sound only."""
    folder = tmp_path_factory.mktemp("ranks")
    silent_folder(toy, clips, folder / "clips", {1, 3, 5, 7, 8, 9}, 16)
    torch.multiprocessing.spawn(on_a_rank, (str(folder), str(folder / "clips")), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)], folder


def test_two_processes_of_two_micro_batches_have_the_loss_and_the_gradient_of_one_on_the_joined_batch(ranks):
    found, _ = ranks
    model, parts = nano_model(), [*part_of(0), *part_of(1)]
    masks = {kind: [tuple(torch.cat([p[2][kind][s][i] for p in parts]) for i in (0, 1)) for s in (0, 1)] for kind in INTRA}
    batch = {key: torch.cat([p[3][key] for p in parts]) for key in ("has_video", "has_audio")}
    (weight,) = mjepa.weigh([batch], INTRA, Process(torch.device("cpu")))
    loss, part = model(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), masks, weight, 0)
    loss.backward()
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, torch.stack([loss, *part["losses"].values()]).detach(),
                               atol=1e-6, rtol=1e-5)
    silent = found[1]["loss"][1:].tolist()
    assert all((x == 0) == (term != "v") for term, x in zip(TERMS["all"], silent))
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for one in found:
        assert one["gradient"].keys() == own.keys() and not any("target_encoder" in name for name in own)
        for name, g in own.items():
            torch.testing.assert_close(one["gradient"][name], g, atol=1e-6, rtol=1e-4)


def test_a_run_of_two_processes_is_that_of_one_with_the_same_masks_also_where_one_hears_nothing(ranks, quick, tmp_path, monkeypatch):
    found, folder = ranks
    a, b = (one["run"] for one in found)
    assert len(a["seen"]) == len(b["seen"]) == 8 and not set(a["seen"]) & set(b["seen"]) and same(a["weights"], b["weights"])
    draw = mjepa.draw_masks

    def joined(seed, step, rank, batch, **more):                                # the clips of a step in turn are one's and the other's
        each = [draw(seed, step, rank, batch // 2, **more) for rank in (0, 1)]
        return {kind: [tuple(torch.stack([one[kind][s][i] for one in each], 1).flatten(0, 1) for i in (0, 1)) for s in (0, 1)]
                for kind in each[0]}

    monkeypatch.setattr(mjepa, "draw_masks", joined)
    monkeypatch.setattr(common, "start_process", lambda device: Process(torch.device("cpu")))
    mjepa.main(flags(folder / "clips", tmp_path, "--steps", 2, "--batch-size", 8))
    two, one = common.read_log(folder / "run"), common.read_log(tmp_path)
    assert [row["no_audio"] for row in one] == [4, 6] and [row["step"] for row in two] == [0, 1]
    for x, y in zip(one, two):
        for key in ("loss", "grad_norm", "lr", *TERMS["all"], *(f"{n}_{kind}" for n in ("std", "rank") for kind in INTRA)):
            assert x[key] == pytest.approx(y[key], rel=2e-3 if x["step"] else 1e-4), (key, x["step"])
    saved = weights(folder / "run")["model"]
    assert all(torch.equal(saved[name], p) for name, p in a["weights"].items())


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "learning rate": (["--lr", "-1"], "--lr -1.0 is out of range"),
    "no step": (["--steps", "0"], "--steps 0 is out of range"),
    "one clip": (["--batch-size", "1"], "--batch-size 1 is out of range"),
    "seconds": (["--seconds", "0"], "--seconds 0.0 is out of range"),
    "seed": (["--seed", "-1"], "--seed -1 is out of range"),
    "unknown ViT": (["--size", "colossal"], "unknown ViT"),
    "not divisible": (["--accumulate", "3"], "not divisible"),
    "batch larger than the set": (["--batch-size", "100000"], "larger than the set"),
    "no such folder": (["--data-dir", "nowhere"], "no such folder"),
    "sound alone": (["--data", "esc50"], "--data esc50 has no pictures; give --terms separate-audio"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_sentence(toy, tmp_path, quick, name):
    bad, sentence = BAD[name]
    with pytest.raises(UserError, match=sentence) as error:
        mjepa.main(flags(toy / "train", tmp_path / "run", "--steps", 2, *bad))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "latest.pt").exists()


def test_sound_alone_trains_the_sound_alone():
    for name, terms in itertools.product(data.SOUNDS, TERMS):
        args = ["--data", name, "--data-dir", "x", "--terms", terms]
        if terms == "separate-audio":
            assert mjepa.get_args(args)[1]["terms"] == terms
        else:
            with pytest.raises(UserError, match="has no pictures"):
                mjepa.get_args(args)


def test_a_run_with_other_terms_is_refused_and_kept(toy, run, quick):
    out, _ = run
    before = (out / "latest.pt").read_bytes()
    for more, sentence in ((["--terms", "intra"], "terms all .now intra."), (["--aligned"], "aligned False .now True.")):
        with pytest.raises(UserError, match=sentence):
            mjepa.main(["--data-dir", str(toy), "--out", str(out), "--batch-size", "4", "--steps", "4", *LITTLE, *more])
        assert (out / "latest.pt").read_bytes() == before


def test_bad_input_as_a_command_exits_with_2_and_no_traceback(tmp_path):
    done = command([sys.executable, str(ROOT / "mjepa.py"), "--cooldown"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "error: --cooldown needs --init, the checkpoint that it starts from"
    assert not any(tmp_path.iterdir())
