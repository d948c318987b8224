"""AV-JEPA (LeJEPA): its views, the embedding of each, its loss, its recipe and its learning rate."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn

import avjepa_lejepa
import common
import run
from avjepa_lejepa import AVJEPA, plan_views
from common import UserError, sigreg
from conftest import ROOT, command
from slow import is_uniform, maps, placements, random, recipe_of, single_steps, train

BOTH = (True, True)                                     # what a view has: (video, audio)
SOUND = (False, True)
PICTURE = (True, False)
MODALITY = (BOTH, BOTH, SOUND, PICTURE)
MIXED = [MODALITY, (BOTH, BOTH, PICTURE, SOUND), (BOTH, BOTH, SOUND, SOUND), (BOTH, BOTH, BOTH, PICTURE)]
VIDEO = dict(shape=(4, 16, 16), patch=(2, 8, 8))
AUDIO = dict(shape=(8, 22), patch=(4, 4))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(run, "draw_curves", lambda *_: None)


def small_model(lam=0.05, absent="zero", local="none"):
    config = dict(size="nano", video=VIDEO, audio=AUDIO, cls=True, absent=absent, norm_in=True)
    common.seed_step(0, 0)
    return AVJEPA(config | {"norm_out": False}, (16, 16, 4), lam, 32, local)


def batch_of(patterns):
    """Random clips as data.collate gives them; patterns: for each clip what each of its views has."""
    present = torch.tensor(patterns)                                            # (B, V, 2)
    videos, sounds = present.sum((0, 1)).tolist()
    batch = {"present": present}
    if videos:
        batch["video"] = random(videos, 3, *VIDEO["shape"])
    if sounds:
        batch["audio"] = random(sounds, 1, *AUDIO["shape"], seed=1)
    return batch


def embed(model, batch, masks=()):
    return model.embed(batch.get("video"), batch.get("audio"), batch["present"], dict(masks))


# ---- views ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("local, kinds", [
    ("none", [()]), ("modality", [(SOUND, PICTURE)]), ("joint", [(BOTH, BOTH)]), ("masked", [(BOTH, BOTH)]),
    ("audio-only", [(SOUND, SOUND)]),
    ("dropout", list(itertools.product((SOUND, PICTURE, BOTH, BOTH), repeat=2)))])     # half keep both
def test_two_views_have_both_modalities_and_the_local_ones_those_of_their_kind(local, kinds):
    seen = []
    for seed in range(400):
        views = plan_views(np.random.default_rng(seed), 10.0, 8.0, local)
        present = tuple((bool(view.video), view.audio) for view in views)
        assert present[:2] == (BOTH, BOTH)
        assert {view.video for view in views[:2]} == {"flip"}
        assert {view.video for view in views[2:]} <= {"random", None}
        seen.append(present[2:])
    assert set(seen) == set(kinds)
    for kind in set(kinds):
        share = kinds.count(kind) / len(kinds)
        spread = math.sqrt(400 * share * (1 - share))
        assert abs(seen.count(kind) - 400 * share) <= 4.5 * spread


# ---- embeddings ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("patterns", [MIXED, [(BOTH, BOTH)] * 3, [(SOUND,)] * 2, [(PICTURE, SOUND)] * 2])
def test_the_embedding_of_each_view_stands_at_its_place(patterns, absent):
    """Against the encoder's CLS on one view after the other."""
    model = small_model(absent=absent).eval()
    batch = batch_of(patterns)
    h = embed(model, batch)
    videos = iter(batch.get("video", ()))
    sounds = iter(batch.get("audio", ()))
    assert h.shape == (len(patterns), len(patterns[0]), 64)
    for b, v in np.ndindex(h.shape[:2]):
        has_video, has_audio = patterns[b][v]
        video = next(videos)[None] if has_video else None
        audio = next(sounds)[None] if has_audio else None
        torch.testing.assert_close(h[b, v], model.encoder(video, audio)[0, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep, count", [(0.01, 1), (0.25, 2), (0.3, 2), (0.32, 3), (0.99, 8)])
def test_of_each_view_another_random_share_of_the_video_s_tokens_is_kept_by_the_clip_s_place(keep, count):
    kept, left = avjepa_lejepa.draw_kept(0, 5, range(100), 4, 8, keep)
    assert kept.shape == (100, 4, count) and left.shape == (100, 4, 8 - count)
    assert torch.equal(torch.cat([kept, left], 2).sort(2).values, torch.arange(8).expand(100, 4, 8))
    often = kept.flatten().bincount(minlength=8)                                # each as often as any other
    share = count / 8
    assert (often - 400 * share).abs().max() <= 4.5 * math.sqrt(400 * share * (1 - share))
    if count < 8:
        assert len(kept.sort(2).values.flatten(0, 1).unique(dim=0)) == math.comb(8, count)
    alone, _ = avjepa_lejepa.draw_kept(0, 5, [7, 98], 4, 8, keep)
    assert torch.equal(alone, kept[[7, 98]])
    later, _ = avjepa_lejepa.draw_kept(0, 6, range(100), 4, 8, keep)
    assert not torch.equal(later, kept)


@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_the_embedding_of_a_view_is_that_of_its_kept_tokens_and_of_all_of_its_sound(absent):
    """Against the encoder on the tokens of one view after the other."""
    model = small_model(absent=absent).eval()
    batch = batch_of(3 * [MODALITY])
    masks = {"v": avjepa_lejepa.draw_kept(0, 0, range(3), 4, 8, 0.5)}
    kept, _ = masks["v"]                                                        # (3, 4, 4)
    h = embed(model, batch, masks)
    videos = iter(batch["video"])
    sounds = iter(batch["audio"])
    for b, v in np.ndindex(3, 4):
        has_video, has_audio = MODALITY[v]
        video = next(videos)[None] if has_video else None
        audio = next(sounds)[None] if has_audio else None
        tokens = model.encoder.embed(video, audio)                              # (1, N, D)
        pictures = 8 if has_video or absent == "zero" else 0
        chosen = tokens[:, kept[b, v]] if pictures else tokens[:, :0]
        tokens = torch.cat([chosen, tokens[:, pictures:]], 1)
        torch.testing.assert_close(h[b, v], model.encoder(tokens=tokens)[0, 0], atol=1e-5, rtol=1e-4)


# ---- masked local views --------------------------------------------------------------------------------

GRIDS = {"paper": {"video": (8, 14, 14), "audio": (8, 50)}, "toy": {"video": (4, 3, 3), "audio": (2, 6)}}


def masked_recipe(**values):
    return recipe_of(avjepa_lejepa, "--local", "masked") | values


def span(line):
    """How many of a row of bools are True; they must be in one piece."""
    places = np.flatnonzero(line)
    assert len(places) == 0 or len(places) == places[-1] - places[0] + 1
    return len(places)


@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_a_masked_view_lacks_a_block_through_all_frames_and_a_band_of_bins_and_one_of_frames(grids, absent):
    """The block has .8 of the picture, as near as a whole side allows; the bands are as wide as a uniform
    draw up to half of the mel's sides, to the next whole patch, the same for all views of a step."""
    frames, *picture = grids["video"]
    sides = []
    bands = []
    for step in range(300):
        recipe = masked_recipe(absent=absent)
        stay, hidden = avjepa_lejepa.draw_hidden(0, step, range(2), grids, recipe)
        both = torch.cat([stay, hidden], 2).sort(2).values                      # (2, 2, N)
        tokens = frames * math.prod(picture) + math.prod(grids["audio"])
        assert torch.equal(both, torch.arange(tokens).expand(2, 2, -1))
        found = maps(hidden.flatten(0, 1), grids)
        of_step = set()
        for tube, mel in zip(found["video"], found["audio"]):
            height = span(tube[0].any(1))
            width = span(tube[0].any(0))
            assert (tube == tube[0]).all() and tube[0].sum() == height * width < math.prod(picture)
            assert abs(height * width - 0.8 * math.prod(picture)) <= max(height, width) / 2
            bins = mel.all(1)
            columns = mel.all(0)
            assert np.array_equal(mel, bins[:, None] | columns)
            of_step.add((height, width, span(bins), span(columns)))
        (size,) = of_step
        sides.append(size[:2])
        bands.append(size[2:])
    assert {height > width for height, width in sides} == {True, False}
    for lengths, side in zip(np.transpose(bands), grids["audio"]):
        most = side // 2                               # its ends come half as often
        assert set(lengths) == set(range(most + 1))
        inside = lengths[(lengths > 0) & (lengths < most)]
        if len(inside):
            spread = np.random.default_rng(0).uniform(-0.5, 0.5, len(inside))   # undoes the rounding
            assert is_uniform(inside + spread, 0.5, most - 0.5)


def test_what_is_masked_is_a_function_of_seed_step_and_place_so_any_number_of_ranks_draw_the_same():
    draw = avjepa_lejepa.draw_hidden
    grids = GRIDS["paper"]
    recipe = masked_recipe(absent="drop", keep=0.25)
    whole = draw(3, 5, range(6), grids, recipe)
    for places in ([0, 2, 4], [1, 3, 5], [4]):
        for alone, x in zip(draw(3, 5, places, grids, recipe), whole):
            assert torch.equal(alone, x[places])
    views = set(map(tuple, whole[0].flatten(0, 1).tolist()))
    for seed, step in ((4, 5), (3, 6)):
        views |= set(map(tuple, draw(seed, step, range(6), grids, recipe)[0].flatten(0, 1).tolist()))
    assert len(views) == 3 * 6 * 2


@pytest.mark.parametrize("keep, count", [(0.01, 1), (0.25, 3), (1.0, 12)])
def test_where_tokens_are_dropped_keep_is_a_share_of_those_that_are_not_hidden(keep, count):
    """Of a toy's view 6 of 9 places are hidden in 4 frames, 12 tokens are left."""
    blocks = np.concatenate([placements((3, 3), (2, 3)), placements((3, 3), (3, 2))])
    often = np.zeros(36)
    for step in range(200):
        recipe = masked_recipe(absent="drop", keep=keep)
        masks, = avjepa_lejepa.draw_visible(0, step, range(2), GRIDS["toy"], recipe)
        stay = masks["local"][0].flatten(0, 1)
        for view in maps(stay, GRIDS["toy"])["video"]:
            assert view.sum() == count
            assert not (blocks & view.any(0)).any((1, 2)).all()                 # one block is empty
            often += view.flatten()
    # every block of six lies on the middle
    assert np.array_equal(often.reshape(4, 9) == 0, np.tile(np.arange(9) == 4, (4, 1)))


def zeroed(x, hidden, patch):
    """One clip (C, *input) with zeros in the patches where hidden (*grid) is True."""
    x = x.clone()
    for place in np.argwhere(hidden):
        window = [slice(p * side, (p + 1) * side) for p, side in zip(place, patch)]
        x[(slice(None), *window)] = 0
    return x


@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_a_masked_view_is_embedded_with_zeros_in_its_hidden_patches_or_without_their_tokens(absent, keep):
    """Against the encoder on one view after the other: its input zeroed by hand, or its tokens chosen."""
    model = small_model(absent=absent, local="masked").eval()
    encoder = model.encoder
    batch = batch_of(3 * [4 * [BOTH]])
    recipe = masked_recipe(absent=absent, keep=keep, hide_video=0.5)            # 2 of its 2 x 2 places
    for step in range(4):
        masks, = avjepa_lejepa.draw_visible(0, step, range(3), encoder.grids, recipe)
        h = embed(model, batch, masks)
        stay, hidden = masks["local"]
        found = maps(hidden.flatten(0, 1), encoder.grids)
        for b, v in np.ndindex(3, 4):
            video = batch["video"][4 * b + v]
            audio = batch["audio"][4 * b + v]
            chosen = torch.arange(18)                                           # 8 and 10 tokens
            if keep < 1:
                chosen = torch.cat([masks["v"][0][b, v], chosen[8:]])
            if v >= 2 and absent == "zero":
                video = zeroed(video, found["video"][2 * b + v - 2], VIDEO["patch"])
                audio = zeroed(audio, found["audio"][2 * b + v - 2], AUDIO["patch"])
            if v >= 2 and absent == "drop":
                chosen = stay[b, v - 2]
            tokens = encoder.embed(video[None], audio[None])[:, chosen]
            torch.testing.assert_close(h[b, v], encoder(tokens=tokens)[0, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", ["--local masked", "--local masked --absent zero --keep 1",
                                   "--local audio-only"])
def test_a_few_steps_with_other_local_views_by_a_command(toy, tmp_path, flags):
    where = f"--data folder --data-dir {toy}/train --out {tmp_path} --device cpu --workers 0 --log-every 1"
    more = f"--recipe toy --size nano --batch-size 4 --steps 2 {flags}"
    done = command([sys.executable, str(ROOT / "avjepa_lejepa.py"), *where.split(), *more.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = run.read_log(tmp_path)
    assert len(rows) == 2 and all(np.isfinite(list(row.values())).all() for row in rows)
    assert common.load_checkpoint(tmp_path)["recipe"]["local"] == flags.split()[1]


# ---- loss ----------------------------------------------------------------------------------------------

def slow_invariance(z):
    """Views, clips and dimensions one after the other; the centre is the mean of the two global views."""
    views, count, dim = z.shape
    total = 0.0
    for v, b, k in np.ndindex(views, count, dim):
        centre = (z[0, b, k] + z[1, b, k]) / 2
        total = total + (centre - z[v, b, k]) ** 2
    return total / (views * count * dim)


@pytest.mark.parametrize("views", [(BOTH, BOTH), MODALITY, (BOTH, BOTH, BOTH, BOTH)])
@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_loss_is_the_weighted_sum_of_the_invariance_and_the_mean_sigreg_of_the_views(lam, views):
    """And its gradient, also through the centre. BatchNorm has the statistics of the global views, and apart
    from them those of the local ones."""
    model = small_model(lam)
    batch = batch_of([views] * 6)
    loss, shown = model(batch, [{}], 0.5, 3)
    h = embed(model, batch)                                                     # (B, V, D)
    z = []
    for first in range(0, len(views), 2):
        rows = torch.cat([h[:, first], h[:, first + 1]])
        z += model.projector(rows).split(6)
    inv = slow_invariance(torch.stack(z))
    reg = torch.stack([sigreg(z_v, 3, 32) for z_v in z]).mean()
    torch.testing.assert_close(shown["loss/invariance"], 0.5 * inv.detach(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(shown["loss/sigreg"], 0.5 * reg.detach(), atol=1e-5, rtol=1e-3)
    expected = 0.5 * ((1 - lam) * inv + lam * reg)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-3)
    gradient, = torch.autograd.grad(loss, model.projector[-1].weight)
    slow_gradient, = torch.autograd.grad(expected, model.projector[-1].weight)
    torch.testing.assert_close(gradient, slow_gradient, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(shown["embedding/av"], z[0].detach(), atol=1e-3, rtol=1e-3)


def test_the_online_probe_is_shown_cls_of_the_first_view_and_of_those_with_one_modality():
    batch = batch_of(4 * [MODALITY])
    model = small_model(local="modality")
    shown = model(batch, [{}], 1.0, 0)[1]
    video, audio = (batch[m].unflatten(0, (4, 3)) for m in ("video", "audio"))      # of those that have it
    expected = dict(av=model.encoder(video[:, 0], audio[:, 0]), audio=model.encoder(None, audio[:, 2]),
                    video=model.encoder(video[:, 2]))
    for name, x in expected.items():
        torch.testing.assert_close(shown[f"clip/{name}"], x[:, 0].detach(), atol=1e-5, rtol=1e-4)
    shown = small_model(local="audio-only")(batch_of(4 * [(BOTH, BOTH, SOUND, SOUND)]), [{}], 1.0, 0)[1]
    assert {name for name in shown if name.startswith("clip/")} == {"clip/av", "clip/audio"}
    shown = small_model(local="dropout")(batch, [{}], 1.0, 0)[1]       # where the ranks would differ
    assert {name for name in shown if name.startswith("clip/")} == {"clip/av"}


def test_without_sigreg_the_embeddings_collapse_and_with_it_they_do_not():
    stds = {}
    for lam in (0.0, 0.05):
        model = small_model(lam)
        batch = batch_of([MODALITY] * 8)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(40):
            loss, shown = model(batch, [{}], 1.0, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stds[lam], _ = common.health(shown["embedding/av"])
    assert stds[0.05] > 0.5 and stds[0.05] > 5 * stds[0.0]


# ---- recipe and run ------------------------------------------------------------------------------------

def test_vggsound_has_statistics_and_a_length_of_its_own_and_a_flag_replaces_them():
    recipe = recipe_of(avjepa_lejepa)
    _, vggsound = avjepa_lejepa.get_args(["--data", "vggsound", "--data-dir", "x"])
    differs = {name: value for name, value in vggsound.items() if recipe[name] != value}
    assert differs == dict(data="vggsound", epochs=50, mel_mean=-20.437, mel_std=24.496)
    inputs = avjepa_lejepa.make_inputs(recipe_of(avjepa_lejepa, "--mel-mean", -1, "--mel-std", 2))
    assert (inputs.mel_mean, inputs.mel_std) == (-1, 2)


def test_the_encoder_of_the_paper_is_a_vit_base_over_1568_video_and_400_audio_tokens():
    recipe = recipe_of(avjepa_lejepa)
    with torch.device("meta"):
        model = avjepa_lejepa.make_model(recipe, avjepa_lejepa.make_inputs(recipe))
    vit = model.encoder
    assert vit.grids == {"video": (8, 14, 14), "audio": (8, 50)}
    assert (vit.dim, len(vit.blocks), vit.cls is None) == (768, 12, False)
    assert isinstance(vit.norm_in, nn.LayerNorm) and isinstance(vit.norm_out, nn.Identity)
    assert {m.p for m in vit.modules() if isinstance(m, nn.Dropout)} == {0.1}
    norms = [m for block in vit.blocks for m in block.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 24 and {norm.eps for norm in norms} == {1e-5} and vit.norm_in.eps == 1e-6
    assert [m.out_features for m in model.projector if isinstance(m, nn.Linear)] == [2048, 2048, 128]


SHORT = ("--frames", 2, "--seconds", 0.5)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")                # of BatchNorm


@pytest.mark.parametrize("column, steps, peak, start", [
    ("toy", (0, 75, 149, 150, 600, 999), 2e-3, 0.0), ("paper", (0, 149), 5e-4, 5e-5)])
def test_the_rate_rises_over_the_first_15_percent_of_the_steps_and_falls_along_a_cosine(
        column, steps, peak, start, toy, tmp_path, monkeypatch):
    """And decay and clipping are those of the table, the paper's decay on all parameters, the toy's on
    matrices: single steps of a run of 1,000."""
    if column == "paper":                               # its optimiser on the toy's model
        for name in ("lr", "lr_end", "warmup", "warmup_start", "weight_decay", "decay_all", "clip_grad"):
            value = avjepa_lejepa.RECIPE[name][0]
            monkeypatch.setitem(avjepa_lejepa.RECIPE, name, (value, value, ""))
    found = single_steps(
        monkeypatch, avjepa_lejepa, "invariance", steps, toy, tmp_path, "--steps", 1000, "--save-every", 150,
        *SHORT)
    for row, (lr, decay), (other, none), norm in found:
        done = (row["step"] - 150) / 849
        falling = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * done)) / 2
        rising = start + (peak - start) * (row["step"] + 1) / 150
        expected = rising if row["step"] < 150 else falling
        assert lr == other == row["lr"] == pytest.approx(expected, rel=1e-6)
        assert (decay, none) == (0.05, 0.0)
        assert row["grad_norm"] > 5 and norm == pytest.approx(5, rel=1e-3)
    content = common.load_checkpoint(tmp_path)
    decayed, spared = content["optimizer"]["param_groups"]
    assert (len(spared["params"]) == 0) == (column == "paper")
    trained = [name for name in content["model"] if not name.endswith(BUFFERS)]
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)


def test_a_run_of_before_with_another_recipe_is_refused_in_a_sentence(toy, tmp_path, monkeypatch):
    """As one that was begun before eps, the start of the warm-up and what decays stood in the recipe."""
    flags = ("--steps", 1, *SHORT)
    train(avjepa_lejepa, toy, tmp_path, *flags)
    content = torch.load(tmp_path / "latest.pt", weights_only=False)
    for name in ("eps", "warmup_start", "decay_all"):
        del content["recipe"][name]
    torch.save(content, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="has eps None .now 1e-06., .* None .now False.; give another --out"):
        train(avjepa_lejepa, toy, tmp_path, *flags)


def test_a_run_says_what_its_flags_do_to_sigreg(toy, tmp_path, capsys):
    train(avjepa_lejepa, toy, tmp_path, "--steps", 1, "--accumulate", 2, "--lam", 0, *SHORT)
    said = capsys.readouterr().out
    assert "SIGReg sees the micro-batch of 2 clips, not the batch" in said
    assert "lambda is 0: nothing keeps the embeddings apart, this run will collapse by design" in said


@pytest.mark.parametrize("flag, value, limits", [
    ("--lam", "nan", "0 to 1"), ("--mel-std", 0.0, "1e-06 to 1000000.0"), ("--frames", 0, "1 to 4096")])
def test_what_its_own_flags_cannot_mean_is_refused_in_a_sentence(toy, tmp_path, flag, value, limits):
    with pytest.raises(UserError, match=f"^{flag} {value} is out of range: from {limits}$"):
        train(avjepa_lejepa, toy, tmp_path / "run", "--steps", 1, flag, value)
    assert not (tmp_path / "run").exists()
