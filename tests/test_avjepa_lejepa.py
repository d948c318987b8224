"""AV-JEPA (LeJEPA): its views, the embedding of each, its loss, its recipe and its learning rate."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import avjepa_lejepa
import common
import run
from avjepa_lejepa import AVJEPA, invariance, plan_views
from common import UserError, sigreg
from slow import random

BOTH = (True, True)                                     # what a view has: (video, audio)
SOUND = (False, True)
PICTURE = (True, False)
MODALITY = (BOTH, BOTH, SOUND, PICTURE)
MIXED = [MODALITY, (BOTH, BOTH, PICTURE, SOUND), (BOTH, BOTH, SOUND, SOUND), (BOTH, BOTH, BOTH, PICTURE)]
VIDEO = dict(shape=(4, 16, 16), patch=(2, 8, 8))
AUDIO = dict(shape=(8, 22), patch=(4, 4))
PAPER = ["--data", "audioset", "--data-dir", "x"]


def small_model(lam=0.05, absent="zero"):
    config = dict(size="nano", video=VIDEO, audio=AUDIO, cls=True, absent=absent, norm_in=True)
    common.seed_step(0, 0)
    return AVJEPA(config | {"norm_out": False}, (16, 16, 4), lam, 32)


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


def embed(model, batch):
    return model.embed(batch.get("video"), batch.get("audio"), batch["present"])


# ---- views ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("local, kinds", [
    ("none", [()]), ("modality", [(SOUND, PICTURE)]), ("joint", [(BOTH, BOTH)]),
    ("dropout", list(itertools.product((SOUND, PICTURE), repeat=2)))])
def test_two_views_have_both_modalities_and_the_local_ones_those_of_their_kind(local, kinds):
    seen = []
    starts = []
    for seed in range(400):
        views = plan_views(np.random.default_rng(seed), 10.0, 8.0, local)
        present = tuple((bool(view.video), view.audio) for view in views)
        assert present[:2] == (BOTH, BOTH) and {view.seconds for view in views} == {8.0}
        assert {view.video for view in views[:2]} == {"flip"}
        assert {view.video for view in views[2:]} <= {"random", None}
        seen.append(present[2:])
        starts += [view.start for view in views]
    assert set(seen) == set(kinds)
    expected = 400 / len(kinds)                         # dropout: a fair coin for each view
    spread = math.sqrt(expected * (1 - 1 / len(kinds)))
    for kind in kinds:
        assert abs(seen.count(kind) - expected) <= 4.5 * spread
    assert 0 <= min(starts) and max(starts) <= 2.0 and len(set(starts)) == len(starts)
    assert np.mean(starts) == pytest.approx(1.0, abs=4.5 * 2 / math.sqrt(12 * len(starts)))


def test_the_views_of_a_clip_shorter_than_a_view_begin_at_its_start():
    views = plan_views(np.random.default_rng(0), 3.0, 8.0, "modality")
    assert {view.start for view in views} == {0.0}


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


@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("place, name", [(0, "video"), (1, "audio")])
def test_an_absent_modality_leaks_nothing_into_a_view(place, name, absent):
    model = small_model(absent=absent).eval()
    batch = batch_of(MIXED)
    has = batch["present"][:, :, place]
    h = embed(model, batch)
    changed = embed(model, batch | {name: random(*batch[name].shape, seed=9)})
    assert torch.equal(h[~has], changed[~has])
    assert (h != changed)[has].any(-1).all()


# ---- loss ----------------------------------------------------------------------------------------------

def slow_invariance(z):
    """Views, clips and dimensions one after the other; the centre is the mean of the two global views."""
    views, count, dim = z.shape
    total = 0.0
    for v, b, k in np.ndindex(views, count, dim):
        centre = (z[0, b, k] + z[1, b, k]) / 2
        total = total + (centre - z[v, b, k]) ** 2
    return total / (views * count * dim)


@pytest.mark.parametrize("views", [2, 4, 7])
def test_the_invariance_and_its_gradient_are_those_of_the_formula(views):
    """The gradient flows through the centre as well."""
    z = random(views, 3, 5).requires_grad_()
    loss = slow_invariance(z)
    torch.testing.assert_close(invariance(z), loss, atol=1e-6, rtol=1e-5)
    gradient, = torch.autograd.grad(invariance(z), z)
    expected, = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("views", [(BOTH, BOTH), MODALITY, (BOTH, BOTH, BOTH, BOTH)])
@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_loss_is_the_weighted_sum_of_the_invariance_and_the_mean_sigreg_of_the_views(lam, views):
    """BatchNorm has the statistics of the global views, and apart from them those of the local ones."""
    model = small_model(lam)
    batch = batch_of([views] * 6)
    loss, shown = model(batch, None, 0.5, 3)
    h = embed(model, batch)                                                     # (B, V, D)
    z = []
    for first in range(0, len(views), 2):
        rows = torch.cat([h[:, first], h[:, first + 1]])
        z += model.projector(rows).split(6)
    inv = slow_invariance(torch.stack(z))
    reg = torch.stack([sigreg(z_v, 3, 32) for z_v in z]).mean()
    torch.testing.assert_close(shown["loss/invariance"], 0.5 * inv.detach(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(shown["loss/sigreg"], 0.5 * reg.detach(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(loss, 0.5 * ((1 - lam) * inv + lam * reg), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(shown["embedding/av"], z[0].detach(), atol=1e-3, rtol=1e-3)


def test_without_sigreg_the_embeddings_collapse_and_with_it_they_do_not():
    stds = {}
    for lam in (0.0, 0.05):
        model = small_model(lam)
        batch = batch_of([MODALITY] * 8)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(60):
            loss, shown = model(batch, None, 1.0, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stds[lam], _ = common.health(shown["embedding/av"])
    assert stds[0.05] > 0.5 and stds[0.05] > 5 * stds[0.0]


# ---- recipe and run ------------------------------------------------------------------------------------

def test_the_paper_recipe_is_the_table_of_the_papers_page():
    _, recipe = avjepa_lejepa.get_args(PAPER)
    expected = dict(
        size="base", seconds=8.0, frames=16, image=224, resize=256, crop_scale=(0.4, 1.0),
        n_mels=128, hop=160, tubelet=(2, 16, 16), mel_patch=(16, 16), mel_mean=-17.977, mel_std=24.468,
        dropout=0.1, projector=(2048, 2048, 128), lam=0.05, slices=2048, batch_size=320, epochs=57,
        steps=None, lr=5e-4, lr_end=1e-6, warmup=0.15, weight_decay=0.05, clip_grad=5.0,
        absent="zero", local="modality")
    assert {name: recipe[name] for name in expected} == expected
    _, vggsound = avjepa_lejepa.get_args(["--data", "vggsound", "--data-dir", "x"])
    differs = {name: value for name, value in vggsound.items() if recipe[name] != value}
    assert differs == dict(data="vggsound", epochs=50, mel_mean=-20.437, mel_std=24.496)
    _, own = avjepa_lejepa.get_args([*PAPER, "--mel-mean", "-1", "--mel-std", "2"])
    inputs = avjepa_lejepa.make_inputs(own)
    assert (inputs.mel_mean, inputs.mel_std, inputs.mel_frames, inputs.frames) == (-1, 2, 801, 16)


def test_the_encoder_of_the_paper_is_a_vit_base_over_1568_video_and_400_audio_tokens():
    _, recipe = avjepa_lejepa.get_args(PAPER)
    with torch.device("meta"):
        model = avjepa_lejepa.make_model(recipe, avjepa_lejepa.make_inputs(recipe))
        vit = model.encoder
        out = vit(torch.empty(1, 3, 16, 224, 224), torch.empty(1, 1, 128, 801))
    assert vit.grids == {"video": (8, 14, 14), "audio": (8, 50)}
    assert out.shape == (1, 1 + 1568 + 400, 768) and len(vit.blocks) == 12
    assert isinstance(vit.norm_in, nn.LayerNorm) and isinstance(vit.norm_out, nn.Identity)
    assert {m.p for m in vit.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert [m.out_features for m in model.projector if isinstance(m, nn.Linear)] == [2048, 2048, 128]


def flags(toy, out, *more):
    words = "--data folder --recipe toy --size nano --frames 2 --seconds 0.5 --batch-size 4 --log-every 1"
    words = f"{words} --workers 0 --device cpu --data-dir {toy}/train --out {out}"
    return [*words.split(), *more]


def test_the_rate_rises_over_the_first_15_percent_of_the_steps_and_falls_along_a_cosine(
        toy, tmp_path, monkeypatch):
    """And decay and clipping are those of the table: single steps of a run of 1,000."""
    groups = []
    norms = []
    real = torch.optim.AdamW.step

    def spy(optimizer):
        groups.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return real(optimizer)

    steps = (0, 75, 149, 150, 600, 999)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(run.Run, "steps", lambda self: iter(steps))
    monkeypatch.setattr(avjepa_lejepa, "invariance", lambda z: 1e4 * invariance(z))     # for large gradients
    avjepa_lejepa.main(flags(toy, tmp_path, "--steps", "1000"))
    rows = run.read_log(tmp_path)
    assert [row["step"] for row in rows] == list(steps)
    for row, ((lr, decay), (other, none)), norm in zip(rows, groups, norms):
        done = (row["step"] - 150) / 849
        falling = 1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * done)) / 2
        expected = 2e-3 * (row["step"] + 1) / 150 if row["step"] < 150 else falling
        assert lr == other == row["lr"] == pytest.approx(expected, rel=1e-6)
        assert (decay, none) == (0.05, 0.0)
        assert row["grad_norm"] > 5 and norm == pytest.approx(5, rel=1e-3)


def test_a_run_says_what_its_flags_do_to_sigreg(toy, tmp_path, capsys):
    more = ["--steps", "1", "--accumulate", "2", "--lam", "0"]
    avjepa_lejepa.main(flags(toy, tmp_path, *more))
    said = capsys.readouterr().out
    assert "SIGReg sees the micro-batch of 2 clips, not the batch" in said
    assert "lambda is 0: nothing keeps the embeddings apart, this run will collapse by design" in said


@pytest.mark.parametrize("more, sentence", [
    (["--accumulate", "4"],
     "--batch-size 4: less than 2 clips for each of 1 processes x 4 micro-batches; raise it"),
    (["--lam", "2"], "--lam 2.0 is out of range: from 0 to 1"),
    (["--lam", "nan"], "--lam nan is out of range: from 0 to 1"),
    (["--mel-std", "0"], "--mel-std 0.0 is out of range: from 1e-06 to 1000000.0"),
    (["--frames", "0"], "--frames 0 is out of range: from 1 to 4096"),
    (["--data", "esc50"], "--data esc50 has no pictures; ajepa.py trains on sound alone"),
    (["--data", "ssv2"],
     "--data ssv2 has no sound; mjepa.py --terms separate-video trains on pictures alone")])
def test_what_its_own_flags_cannot_mean_is_refused_in_a_sentence(toy, tmp_path, more, sentence):
    with pytest.raises(UserError) as error:
        avjepa_lejepa.main(flags(toy, tmp_path / "run", "--steps", "1", *more))
    assert str(error.value) == sentence and not (tmp_path / "run").exists()
