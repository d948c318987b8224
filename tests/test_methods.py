"""What the methods share, claimed once and run for each: masks, leakage, teacher, loss, runs, bad input.

A fifth method, which lives in the tests, goes through the same claims.
"""
import ast
import copy
import difflib
import gc
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ajepa
import avjepa_lejepa
import avjepa_ncsu
import common
import data
import features
import fifth_method
import mjepa
import pixels
import probe
import retrieval
import run
import visualize
from common import UserError
from conftest import FORK, ROOT, command, fails, forked, last_row, same, weights
from slow import quicken_table, random, shake

import numpy as np
import pytest
import torch
import torch.distributed as dist

PNG = b"\x89PNG"
CPU = run.Process(torch.device("cpu"))                 # without bf16, whatever the machine has


# ---- one adapter a method --------------------------------------------------------------------------------

class Method(NamedTuple):
    """What the claims have to know of a method."""
    script: ModuleType
    terms: tuple                        # of its loss, as the log names them
    variants: tuple                     # flags that change what is built or drawn
    bad: tuple                          # flags, and the sentence that they end in
    masked: bool = True                 # hides tokens, has a teacher and a predictor
    together: bool = False              # the inputs of a mask set run through the encoder in one pass
    weighs: bool = False                # a clip trains what it has: a weight for each clip and input
    replaces: bool = False              # has views of sound alone: another clip is drawn for a silent one
    tau: object = (0.9, 0.99)           # a momentum that moves the teacher within a few steps

    @property
    def name(self):
        return self.script.METHOD["name"]


AJEPA = Method(
    ajepa, ("a",),
    variants=("--masking block", "--masking random", "--masking time", "--masking freq",
              "--masking curriculum", "--masking curriculum --tf-removes time", "--loss l2", "--loss l1",
              "--loss cosine", "--pos sincos", "--mask-ratio 0.9 --block-aspect patch"),
    bad=(("--mask-ratio 1.5", "--mask-ratio 1.5 is out of range: from 0.01 to 0.99"),
         ("--mask-ratio nan", "--mask-ratio nan is out of range"),
         ("--masking curriculum --mask-ratio 0.5", "the curriculum has ratios of its own"),
         ("--pred-dim 100", "--pred-dim 100: not a multiple of 32"),
         ("--pred-depth 0", "--pred-depth 0 is out of range"),
         ("--tf-removes time", "--tf-removes has no effect without --masking curriculum"),
         ("--jitter 0.4", "--jitter has no effect: this run takes audio alone"),
         ("--masking random --block-aspect patch", "--block-aspect has no effect on --masking random"),
         ("--data ssv2 --data-dir .", "--data ssv2 has no sound; mjepa.py --terms separate-video")),
    replaces=True)
LEJEPA = Method(
    avjepa_lejepa, ("invariance", "sigreg"),
    variants=("--local dropout", "--local joint", "--local none", "--local masked", "--local audio-only",
              "--absent zero --local masked", "--absent drop --local modality",
              "--absent drop --local dropout", "--absent drop --local joint"),
    bad=(("--frames 3", "frames, height, width (3, 48, 48) are not divisible by the tubelet (2, 16, 16)"),
         ("--seconds 0.1", "the mel (64, 6) is smaller than a patch (32, 16); raise --seconds"),
         ("--mel-mean nan", "--mel-mean nan is out of range"), ("--lam nan", "--lam nan is out of range"),
         ("--accumulate 4", "less than 2 clips for each of 1 processes x 4 micro-batches"),
         ("--data esc50 --data-dir .", "--data esc50 has no pictures; ajepa.py trains on sound alone"),
         ("--data ssv2 --data-dir .", "--data ssv2 has no sound; mjepa.py --terms separate-video")),
    masked=False, replaces=True)
MJEPA = Method(
    mjepa, ("a", "v", "av", "a->v", "v->a", "a->av", "av->a", "v->av", "av->v"),
    variants=tuple(f"--terms {terms}" for terms in mjepa.TERMS) + ("--aligned",),
    bad=(("--cooldown", "--cooldown needs --init, the checkpoint that it starts from"),
         ("--cooldown --init no.pt", "no.pt: there is no such checkpoint"),
         ("--data esc50 --data-dir .", "--data esc50 has no pictures; give --terms separate-audio, or"),
         ("--data ssv2 --data-dir .", "--data ssv2 has no sound; give --terms separate-video")),
    weighs=True, tau=(0.9, 0.9))
NCSU = Method(
    avjepa_ncsu, ("v", "a"),
    variants=("--modalities video", "--modalities audio", "--mask-per batch", "--seconds 0.5"),
    bad=(("--clips -1", "--clips -1 is out of range"),
         ("--clips 3", "--batch-size 4 is larger than the set (3 clips)"),
         ("--data esc50 --data-dir .", "--data esc50 has no pictures; give --modalities audio, or use"),
         ("--data ssv2 --data-dir .", "--data ssv2 has no sound; give --modalities video")),
    together=True, weighs=True)
FIFTH = Method(fifth_method, ("av",), variants=(), bad=(), tau=0.9)
PAPERS = [AJEPA, LEJEPA, MJEPA, NCSU]
METHODS = [*PAPERS, FIFTH]
MASKED = [method for method in METHODS if method.masked]


def for_each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


SMALL = dict(                                          # the same small inputs and models for all
    size="nano", seconds=0.8, video_seconds=0.4, frames=4, image=16, resize=16, tubelet=(2, 4, 4), stride=2,
    sample_rate=16000, n_fft=512, n_mels=16, hop=400, columns=40, mel_patch=(4, 8), audio_block=(2, 2),
    stats_clips=4, levels=2, pred_dim=32, pred_depth=1, projector=(32, 8), slices=64, batch_size=4, lr=1e-3)


def shrink(patch):
    """The recipes' tables with small values in both columns."""
    patch.setitem(common.SIZES, "nano", (32, 2, 4, 64))
    for method in METHODS:
        table = method.script.RECIPE
        for name, value in {**SMALL, "tau": method.tau}.items():
            if name in table:
                patch.setitem(table, name, (value, value, ""))
    for script in (mjepa, avjepa_ncsu):                # in steps
        patch.setitem(script.RECIPE, "warmup", (1, 1, ""))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


# ---- models and batches ----------------------------------------------------------------------------------

def recipe_of(method, flags=""):
    return method.script.get_args(flags.split())[1]


def model_of(method, flags="", seed=0, apart=False, checkpoint=False):
    """(model, recipe). apart: the teacher has other weights than the student, and biases and norms matter."""
    recipe = recipe_of(method, flags)
    common.seed_step(seed, 0)
    model = method.script.make_model(recipe, method.script.make_inputs(recipe), checkpoint)
    return (shake(model) if apart else model), recipe


def by_patch(x, patch):
    """(B, C, *grid) -> (B, C, *input): each value fills its patch."""
    for axis, side in enumerate(patch):
        x = x.repeat_interleave(side, 2 + axis)
    return x


def clips_of(model, count, seed=0):
    """{modality: (B, C, *input)}: clips with a colour and a spectrum of their own."""
    encoder = model.encoder if hasattr(model, "encoder") else model.context_encoder
    clips = {}
    for m, grid in encoder.grids.items():
        alike = (1, 1, 1) if m == "video" else (grid[0], 1)
        own = random(count, common.CHANNELS[m], *alike, seed=seed)
        patches = random(count, common.CHANNELS[m], *grid, seed=seed + 1)
        clips[m] = by_patch(1.4 * own + 0.3 * patches, encoder.patch[m])
    return clips


def views_of(local, count):
    """What the views of AV-JEPA's --local have: (B, V, 2) bool."""
    present = []
    for clip in range(count):
        views = avjepa_lejepa.plan_views(np.random.default_rng(clip), 4.0, 0.8, local)
        present.append([[bool(view.video), view.audio] for view in views])
    return torch.tensor(present)


def batch_of(method, model, recipe, count, seed=0):
    """A batch as data.collate makes it."""
    batch = clips_of(model, count, seed)
    if not method.masked:
        batch["present"] = views_of(recipe["local"], count)
        for number, m in enumerate(("video", "audio")):
            has = batch["present"][..., number]                                 # (B, V)
            views = batch[m].repeat_interleave(has.shape[1], 0)[has.flatten()]
            batch[m] = views + 0.3 * random(*views.shape, seed=seed + 2)
    for m in ("video", "audio"):
        batch[f"has_{m}"] = torch.ones(count, dtype=torch.bool)
    return batch


def masks_of(method, model, recipe, count, step=0):
    if not method.masked:
        return [{}]
    return method.script.draw_masks(7, step, range(count), model.grids, recipe)


def weight_of(method, model, count):
    """As run.Run gives it for a step of one micro-batch."""
    if not method.weighs:
        return 1.0
    return {name: torch.full((count,), 1 / count) for name in model.inputs}


def ready(method, flags="", count=2, **how):
    """(model, the arguments of a step)"""
    model, recipe = model_of(method, flags, **how)
    masks = masks_of(method, model, recipe, count)
    return model, [batch_of(method, model, recipe, count), masks, weight_of(method, model, count), 0]


# ---- masks -----------------------------------------------------------------------------------------------

GRIDS = {
    "wide": {"video": (2, 6, 6), "audio": (4, 24)}, "paper": {"video": (8, 14, 14), "audio": (8, 64)},
    "pair": {"video": (1, 1, 2), "audio": (4, 6)}, "square": {"video": (3, 2, 2), "audio": (4, 2)},
    "row": {"video": (2, 3, 1), "audio": (2, 6)}, "three": {"video": (1, 1, 3), "audio": (8, 3)},
}


def draw(method, grids, seed=0, step=0, places=range(4)):
    return method.script.draw_masks(seed, step, places, grids, recipe_of(method))


def modalities_of(name):
    return {"a": ("audio",), "v": ("video",), "av": ("video", "audio")}[name]


def hidden_maps(name, target, grids):
    """(B, M) indices of an input's tokens -> {modality: (B, *grid) bool}"""
    sizes = {m: math.prod(grids[m]) for m in modalities_of(name)}
    flat = torch.zeros(len(target), sum(sizes.values()), dtype=torch.bool).scatter(1, target, True)
    parts = flat.split(list(sizes.values()), 1)
    return {m: part.unflatten(1, grids[m]).numpy() for m, part in zip(sizes, parts)}


@for_each(MASKED)
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
def test_visible_and_hidden_are_disjoint_and_complete_as_many_for_each_clip_and_never_a_whole_modality(
        method, grids):
    for step in range(20):
        for mask_set in draw(method, grids, step=step):
            for name, (context, target) in mask_set.items():
                total = sum(math.prod(grids[m]) for m in modalities_of(name))
                both = torch.cat([context, target], 1).sort(1).values
                assert len(context) == len(target) == 4
                assert (both == torch.arange(total)).all()
                assert (context.diff(dim=1) > 0).all() and (target.diff(dim=1) > 0).all()       # in order
                for hidden in hidden_maps(name, target, grids).values():
                    flat = hidden.reshape(4, -1)
                    assert flat.any(1).all() and not flat.all(1).any()


@for_each(MASKED)
def test_masks_are_a_function_of_seed_step_and_place_alone_so_those_of_two_ranks_are_those_of_one(method):
    grids = GRIDS["paper"]
    keys = list(itertools.product((0, 1), (0, 1, 7)))
    first = {key: draw(method, grids, *key, range(6)) for key in keys}
    for number, (seed, step) in enumerate(reversed(keys)):
        np.random.seed(1)
        torch.manual_seed(number)
        for places in ([0, 2, 4], [1, 3, 5], [5]):
            again = draw(method, grids, seed, step, places)
            for mask_set, whole in zip(again, first[seed, step], strict=True):
                assert mask_set.keys() == whole.keys()
                for name, pair in mask_set.items():
                    assert same(pair, tuple(x[places] for x in whole[name]))
    for name in first[keys[0]][0]:                     # no two clips, steps, seeds alike
        rows = set()
        for masks in first.values():
            rows.update(map(tuple, masks[0][name][1].tolist()))
        assert len(rows) == 6 * len(keys)


@for_each(MASKED)
def test_the_last_row_and_column_is_hidden_as_often_as_the_first(method):
    """The mean difference of a clip's two edges is 0, within five standard errors: the clips of a step have
    as many hidden, but each in places of its own."""
    grids = GRIDS["wide"]
    steps = [draw(method, grids, step=step, places=range(8)) for step in range(60)]
    for s, mask_set in enumerate(steps[0]):
        for name in mask_set:
            maps = [hidden_maps(name, masks[s][name][1], grids) for masks in steps]
            for m in modalities_of(name):
                hidden = np.concatenate([found[m] for found in maps]).astype(float)
                hidden = hidden.reshape(480, -1, *grids[m][-2:]).mean(1)        # (480, rows, columns)
                for turned in (hidden, hidden.transpose(0, 2, 1)):
                    edges = turned[:, [0, -1]].mean(2)                          # (480, 2)
                    difference = edges[:, 0] - edges[:, 1]
                    assert abs(difference.mean()) <= 5 * difference.std() / math.sqrt(480), (s, name, m)
                    assert edges.mean(0).min() > 0.01
                    assert hidden.mean(0).max() < 1


@for_each(MASKED)
def test_no_two_draws_share_a_random_stream(method, monkeypatch):
    """numpy pads a seed with zeros, so a clip must not be numbered 0. A step's own streams are the same on
    all ranks; a clip has one for each set, input and modality, at its place alone."""
    seen = []                                          # (step, rank, state of a stream at its start)
    real = np.random.default_rng

    def spy(key):
        rng = real(key)
        seen.append((step, rank, rng.bit_generator.state["state"]["state"]))
        return rng

    monkeypatch.setattr(np.random, "default_rng", spy)
    for step, rank in itertools.product(range(4), range(3)):
        masks = draw(method, GRIDS["wide"], step=step, places=range(rank, 15, 3))
    users = {}
    for step, rank, state in seen:
        users.setdefault((step, state), []).append(rank)
    assert len({state for _, state in users}) == len(users)                     # in no other step
    shared = [sorted(found) for found in users.values() if len(found) > 1]
    assert all(found == [0, 1, 2] for found in shared)                          # once on each rank
    draws = len(masks) * sum(len(modalities_of(name)) for name in masks[0])
    assert len(users) - len(shared) == 4 * 3 * 5 * draws


# ---- the model -------------------------------------------------------------------------------------------

def repaint(clips, maps, encoder):
    """The clips with other pixels where the maps {modality: (B, *grid) bool} are True."""
    changed = dict(clips)
    for m, hidden in maps.items():
        mask = by_patch(torch.from_numpy(hidden)[:, None], encoder.patch[m])
        changed[m] = torch.where(mask, 9 * random(*clips[m].shape, seed=5), clips[m])
    return changed


@for_each(MASKED)
def test_what_is_hidden_changes_no_bit_of_what_context_and_predictor_say(method):
    model, recipe = model_of(method, apart=True)
    encoder = model.context_encoder
    clips = clips_of(model, 2)
    for s, mask_set in enumerate(masks_of(method, model, recipe, 2)):
        for part in [mask_set] if method.together else [{name: mask_set[name]} for name in mask_set]:
            hidden = {}
            visible = {}
            for name, (context, target) in part.items():
                hidden.update(hidden_maps(name, target, model.grids))
                visible.update(hidden_maps(name, context[:, :1], model.grids))
            given = {m: x for m, x in clips.items() if m in hidden}
            said = []
            for shown in (given, repaint(given, hidden, encoder), repaint(given, visible, encoder)):
                h = model.see(encoder.embed(**shown), part)
                said.append({"h": h, **model.predictor(h, part, s)})
            assert same(said[0], said[1])
            for name in part:
                assert said[0][name].shape == (2, part[name][1].shape[1], model.predictor.head.out_features)
                assert not torch.equal(said[0][name], said[2][name])
            losses = [model.target_encoder(**shown) for shown in (given, repaint(given, hidden, encoder))]
            assert not torch.equal(*losses)            # the teacher is given it


VARIANTS = []
for each in METHODS:
    rows = ("", *each.variants)
    VARIANTS += [pytest.param(each, flags, id=f"{each.name} {flags}") for flags in rows]


@pytest.mark.parametrize("method,flags", VARIANTS)
def test_the_teacher_begins_as_the_student_and_has_no_gradient_and_everything_else_has_one(method, flags):
    """DDP refuses unused parameters: whatever a flag drops must not be built."""
    model, given = ready(method, flags, count=4)
    if method.masked:                                  # in memory of its own
        student = model.context_encoder.state_dict()
        teacher = model.target_encoder.state_dict()
        assert same(dict(student), dict(teacher))
        assert all(student[name].data_ptr() != teacher[name].data_ptr() for name in student)
    loss, shown = model(*given)
    loss.backward()
    assert math.isfinite(loss.item()) and all(x.isfinite().all() for x in shown.values())
    for name, p in model.named_parameters():
        taught = not name.startswith("target_encoder.")
        assert p.requires_grad == (p.grad is not None) == taught, name
        assert flags or not taught or p.grad.abs().sum() > 0, name


@for_each(METHODS)
def test_the_loss_is_float32_under_bf16_autocast_and_what_is_shown_has_no_gradient(method):
    model, given = ready(method, count=4, apart=True)
    expected, _ = copy.deepcopy(model)(*given)
    with torch.autocast("cpu", torch.bfloat16):
        loss, shown = model(*given)
    assert {x.dtype for x in (loss, *shown.values())} == {torch.float32}
    assert not any(x.requires_grad for x in shown.values())
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)              # bf16 has 8 bits


@for_each(PAPERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_batch_is_learnt_without_collapse(method, seed):
    """Of clips that differ. Masked: the loss is well below that of knowing nothing, as each term is.
    AV-JEPA: the views of a clip lie nearer to each other than before, against the distance of two clips."""
    steps = 120 if method is NCSU else 70 if method.masked else 40
    model, recipe = model_of(method, seed=seed)
    batch = batch_of(method, model, recipe, 6, seed=10 * seed)
    masks = masks_of(method, model, recipe, 6, step=seed)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, 0.04))
    history = []
    for step in range(steps):
        run.set_lr(optimizer, common.warmup_cosine(step, steps, steps // 10, 4e-3))
        loss, shown = model(batch, masks, weight_of(method, model, 6), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if method.masked:
            common.ema_update(model.target_encoder, model.context_encoder, 0.99)
        history.append(shown)
    first = history[0]
    last = history[-1]
    for name in first:
        if name.startswith("embedding/"):
            std, rank = common.health(last[name])
            assert std > 0.5 * common.health(first[name])[0] and rank > 1.3     # 1: all on a line
    if method.masked:
        knows = [last[f"know_nothing/{term}"].item() for term in method.terms]
        learnt = [last[f"loss/{term}"].item() for term in method.terms]
        assert sum(learnt) < 0.75 * sum(knows) and min(knows) > 0.1             # else the targets say nothing
        assert all(x < 0.9 * nothing for x, nothing in zip(learnt, knows))
    else:
        before, after = (x["loss/invariance"] / x["embedding/av"].var(0).mean() for x in (first, last))
        assert after < 0.25 * before


# ---- a run -----------------------------------------------------------------------------------------------

def flags_of(folder, out, more=""):
    """Of a run on a folder of clips, or on the toy world: then with the table at the end."""
    where = ["--data-dir", str(folder), "--out", str(out)]
    if not (folder / "world.json").is_file():
        where += ["--data", "folder", "--recipe", "toy"]
    every = "--steps 4 --log-every 1 --save-every 1 --workers 0 --device cpu"
    return [*where, *every.split(), *more.split()]


@pytest.fixture
def quick(monkeypatch):
    """No curves and no table at the end."""
    monkeypatch.setattr(run, "draw_curves", lambda *_: None)
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)


@pytest.fixture(scope="module")
def finished(toy, plain_layout, tmp_path_factory):
    """{method's name: the folder of a run of four steps on the toy world with its evaluation, and with its
    checkpoint after each step, step-1.pt to step-4.pt}"""
    folders = {}
    save = run.Run.save

    def keep(self, step):
        save(self, step)
        shutil.copy(self.out / "latest.pt", self.out / f"step-{step + 1}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "save", keep)
        quicken_table(patch)
        for method in METHODS:
            folders[method.name] = tmp_path_factory.mktemp(method.name)
            method.script.main(flags_of(toy, folders[method.name]))
    return folders


def parts_of(row, kind):
    """Of the columns of a log, as "loss/a", those of a kind."""
    return {name.removeprefix(kind) for name in row if name.startswith(kind)}


@for_each(METHODS)
def test_a_run_leaves_checkpoint_log_curves_and_results(finished, method):
    out = finished[method.name]
    rows = run.read_log(out)
    content = weights(out)
    takes = [m for m, keys in features.MODALITIES.items() if set(keys) <= content["encoder"].keys()]
    inputs = {name for name in method.terms if name in ("a", "v", "av")} or {"av"}
    knows = set(method.terms) if method in (AJEPA, MJEPA, NCSU) else set()
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and content["step"] == content["steps"] == 4
    assert content["method"] == method.script.METHOD
    for row in rows:
        assert np.isfinite(list(row.values())).all()
        assert {"grad_norm", "ms_data", "ms_step", "bad_clips", "no_video", "no_audio"} < set(row)
        assert parts_of(row, "loss/") == set(method.terms) and parts_of(row, "know_nothing/") == knows
        assert parts_of(row, "std/") == parts_of(row, "rank/") == inputs
        assert parts_of(row, "probe/") == (set(takes) if method in PAPERS else set())
        if method.masked:
            assert row["loss"] == pytest.approx(sum(row[f"loss/{term}"] for term in method.terms), rel=1e-4)
    assert (out / "curves.png").read_bytes()[:4] == PNG
    results = json.loads((out / "results.json").read_text())
    assert results.pop("seconds") > 0 and set(results) == {"trained", "untrained", "raw input", "chance"}
    for row in results.values():
        assert all(0 <= part[m] <= 100 for m in takes for part in (row, row["few"]))
        assert not {"audio", "video", "av"} - set(takes) & row.keys()


@for_each(MASKED)
def test_in_a_run_the_teacher_follows_the_student_by_tau_after_each_optimiser_step(finished, method):
    out = finished[method.name]
    model = begun(method, weights(out))
    teacher = {f"target_encoder.{name}": x for name, x in model.target_encoder.state_dict().items()}
    moved = 0
    for row in run.read_log(out):
        saved = torch.load(out / f"step-{row['step'] + 1}.pt", weights_only=True)["model"]
        for name, before in teacher.items():
            student = saved[name.replace("target_encoder", "context_encoder")]
            expected = row["tau"] * before + (1 - row["tau"]) * student
            torch.testing.assert_close(saved[name], expected, atol=1e-6, rtol=1e-5)
            moved = max(moved, (expected - before).abs().max().item())
        teacher = {name: saved[name] for name in teacher}
    assert moved > 2e-5                                # far more than the tolerance


@for_each([method for method in MASKED if method is not FIFTH])
def test_the_flag_tau_says_where_the_momentum_begins_and_ends_and_is_kept_by_the_run(
        toy, quick, method, tmp_path, capsys):
    flags = flags_of(toy, tmp_path, "--steps 3 --log-every 1 --tau .5 .9")
    method.script.main(flags)
    taus = [row["tau"] for row in run.read_log(tmp_path)]
    middle = (0.5 + 0.9) / 2 if method is not NCSU else 0.5 + 0.4 / 3       # NC State's is linear, to step S
    assert taus[:2] == pytest.approx([0.5, middle])
    assert method is NCSU or taus[2] == pytest.approx(0.9)
    fails(method.script.main, [*flags, "--tau", ".5", ".8"], match="the run there has tau .*another --out")
    fails(method.script.main, [*flags, "--tau", ".5", "1.1"], match="--tau 1.1 is out of range")


def test_a_run_of_mjepa_from_before_the_flag_tau_goes_on(toy, quick, tmp_path):
    """Its recipe had one number."""
    flags = flags_of(toy, tmp_path, "--log-every 1 --tau .9 .9 --steps")
    mjepa.main([*flags, "2"])
    content = weights(tmp_path)
    content["recipe"]["tau"] = 0.9
    torch.save(content, tmp_path / "latest.pt")
    mjepa.main([*flags, "3"])
    assert [row["step"] for row in run.read_log(tmp_path)] == [0, 1, 2]


def begun(method, content):
    """The model as the run of a checkpoint began with it."""
    common.seed_step(content["args"]["seed"], 0)
    return method.script.make_model(content["recipe"], data.Inputs(**content["inputs"]))


@for_each(METHODS)
def test_stopped_at_two_of_four_steps_and_continued_equals_four_steps_bit_for_bit(
        toy, finished, quick, method, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    log = run.Run.log

    def log_and_stop(self, step, **values):
        log(self, step, **values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "log", log_and_stop)
        method.script.main(flags_of(toy, tmp_path))
    assert weights(tmp_path)["step"] == 2 and signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.setattr(data, "mel_stats", None)       # the statistics come from the checkpoint
    method.script.main(flags_of(toy, tmp_path))
    one = weights(finished[method.name])
    two = weights(tmp_path)
    for key in one.keys() - {"args", "version"}:
        assert same(one[key], two[key]), key
    for row, other in zip(run.read_log(finished[method.name]), run.read_log(tmp_path), strict=True):
        assert all(row[name] == other[name] for name in row.keys() - {"ms_data", "ms_step"})


@for_each(PAPERS)
def test_without_the_online_probe_weights_and_log_are_the_same_bit_for_bit(
        toy, finished, quick, method, tmp_path):
    method.script.main(flags_of(toy, tmp_path, "--no-online-probe"))
    one = weights(finished[method.name])
    two = weights(tmp_path)
    assert one.keys() - two.keys() == {"online_probe"}
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])
    for row, other in zip(run.read_log(finished[method.name]), run.read_log(tmp_path), strict=True):
        assert not parts_of(other, "probe/")
        assert all(row[name] == other[name] for name in other.keys() - {"ms_data", "ms_step"})


@for_each(PAPERS)
def test_a_finished_run_is_made_longer_by_the_schedules_of_the_new_length_and_not_shorter(
        toy, finished, quick, method, tmp_path, monkeypatch):
    out = shutil.copytree(finished[method.name], tmp_path / "run")
    before = run.read_log(out)
    method.script.main(flags_of(toy, out, "--steps 8"))
    rows = run.read_log(out)
    assert rows[:4] == before and [row["step"] for row in rows] == list(range(8))
    recipe = recipe_of(method, "--steps 8")
    rates = [method.script.learning_rate(step, recipe) for step in range(4, 8)]
    assert [row["lr"] for row in rows[4:]] == rates
    with pytest.raises(UserError, match=r"has steps 8 \(now 4\); give another --out, or --fresh"):
        method.script.main(flags_of(toy, out))
    # single steps of a run that was to have 8 from its beginning
    monkeypatch.setattr(run.Run, "steps", lambda self: (self.fetch() or step for step in (3, 7)))
    method.script.main(flags_of(toy, tmp_path / "whole", "--steps 8"))
    fourth, last = run.read_log(tmp_path / "whole")
    now, whole = weights(out), weights(tmp_path / "whole")
    assert now["recipe"] == whole["recipe"]
    assert now["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for key in {"lr", "tau"} & last.keys():
        assert rows[7][key] == last[key]
    changes = [before[3][key] != fourth[key] for key in {"lr", "tau"} & last.keys()]
    assert any(changes) == (method is not MJEPA)       # both constant


@for_each([AJEPA, NCSU])
def test_a_run_goes_on_in_other_micro_batches_as_if_it_had_not_changed(
        toy, quick, method, tmp_path, monkeypatch):
    """In float32. The running mean, too, weighs all clips alike."""
    monkeypatch.setattr(run, "start_process", lambda device, bf16: CPU)
    one = tmp_path / "one"
    two = tmp_path / "two"
    method.script.main(flags_of(toy, one, "--keep-every 2"))
    method.script.main(flags_of(toy, two, f"--accumulate 2 --resume {one}/step-000002.pt"))
    for row, other in zip(run.read_log(one)[2:], run.read_log(two), strict=True):
        for key in row:
            if key.startswith(("loss", "std/", "rank/", "kept/", "grad_norm", "lr", "tau")):
                assert other[key] == pytest.approx(row[key], rel=1e-4), key
    before, after = (weights(out)["model"] for out in (one, two))
    means = [key for key in before if key.endswith("mean")]
    assert means
    for key in means:
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-4)


def test_av_jepa_whose_sigreg_sees_the_micro_batch_does_not_go_on_in_another(toy, finished, quick, tmp_path):
    out = shutil.copytree(finished["avjepa_lejepa"], tmp_path / "run")
    with pytest.raises(UserError, match=r"has accumulate 1 \(now 2\)"):
        avjepa_lejepa.main(flags_of(toy, out, "--accumulate 2"))


def start(argv, folder):
    """A script in a process of its own, forked off this one; its pid and the file of what it says."""
    said = open(folder / "said.txt", "w+b")
    pid = os.fork()
    if pid == 0:
        forked(argv, folder, said, said)
    return pid, said


def worker_of(pid, log, seconds=30):
    """The data worker of a training process that has logged a step."""
    until = time.time() + seconds
    while time.time() < until:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and log.is_file() and log.read_text():
            return int(children[0])
        time.sleep(0.02)
    raise TimeoutError(log)


def end_of(pid, seconds=30):
    """The exit code of a process, which is killed where it takes longer."""
    until = time.time() + seconds
    while time.time() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    raise TimeoutError(pid)


WORKER = {                                             # what happens to it, to the run, its code and sentence
    "stopped": (signal.SIGSTOP, signal.SIGTERM, 0, "the same command goes on from there"),
    "hung up": (signal.SIGSTOP, signal.SIGHUP, 0, "the same command goes on from there"),
    "killed": (signal.SIGKILL, None, 2, "error: a data worker was killed, most often for want of memory"),
}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir() or not FORK, reason="looks for it in /proc")
@pytest.mark.parametrize("name", WORKER)
def test_a_command_whose_data_worker_stops_or_dies_ends_in_a_sentence_with_the_last_step_saved(
        toy, name, tmp_path):
    to_worker, to_run, code, sentence = WORKER[name]
    more = "--steps 100000 --save-every 100000 --workers 1 --size nano --batch-size 4"
    pid, said = start([str(ROOT / "ajepa.py"), *flags_of(toy, tmp_path / "run", more)], tmp_path)
    try:
        os.kill(worker_of(pid, tmp_path / "run" / "log.jsonl"), to_worker)
        time.sleep(0.3)                                # until what it has decoded is used up
        began = time.time()
        if to_run:
            os.kill(pid, to_run)
        ended = end_of(pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert ended == code and time.time() - began < 15
    said.seek(0)
    text = said.read().decode()
    step = run.read_log(tmp_path / "run")[-1]["step"] + 1
    assert sentence in text and f"latest.pt holds step {step} of 100000" in text and "Traceback" not in text
    assert weights(tmp_path / "run")["step"] == step


@for_each(PAPERS)
def test_the_flag_checkpoint_activations_trains_and_reaches_all_blocks(toy, quick, method, tmp_path):
    for checkpoint in (False, True):
        model, _ = model_of(method, checkpoint=checkpoint)
        blocks = [block for block in model.modules() if isinstance(block, common.Block)]
        assert {block.checkpoint for block in blocks} == {checkpoint}
    method.script.main(flags_of(toy / "train", tmp_path, "--steps 1 --checkpoint-activations"))
    assert weights(tmp_path)["encoder"]["checkpoint"] and weights(tmp_path)["step"] == 1


def silent_folder(toy, clips, folder, silent, count=8):
    """A folder of clips, of which those in the places `silent` of the first epoch (seed 0) have no sound."""
    folder.mkdir()
    loud = sorted((toy / "train").glob("*.mp4"))
    for place, index in enumerate(np.random.default_rng((0, 0)).permutation(count)):
        source = clips / "silent.mp4" if place in silent else loud[index]
        shutil.copy(source, folder / f"{index:02d}.mp4")
    return folder


@for_each(METHODS)
def test_a_step_without_any_sound_is_counted_and_the_run_goes_on(toy, clips, quick, method, tmp_path):
    folder = silent_folder(toy, clips, tmp_path / "clips", {1, 2, 3})
    method.script.main(flags_of(folder, tmp_path / "run", "--batch-size 2"))
    rows = run.read_log(tmp_path / "run")
    assert [row["no_audio"] for row in rows] == ([0, 0, 0, 0] if method.replaces else [1, 3, 3, 3])
    assert (rows[0]["empty"] >= 1 and rows[1]["empty"] >= 3) == method.replaces
    assert all(np.isfinite(list(row.values())).all() and row["grad_norm"] > 0 for row in rows)
    for row, term in itertools.product(rows, method.terms if method.weighs else ()):
        silent = row["step"] == 1 and term != "v"
        assert (row[f"loss/{term}"] == 0) == silent
        assert row[f"know_nothing/{term}"] == 0 or not silent
    assert all(x.isfinite().all() for x in weights(tmp_path / "run")["model"].values())


@for_each(METHODS)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        toy, quick, method, tmp_path, monkeypatch):
    note = run.Run.note

    def broken(self, loss, shown):
        note(self, loss * (math.nan if self.step == 1 else 1), shown)

    monkeypatch.setattr(run.Run, "note", broken)
    with pytest.raises(UserError, match="not finite at step 1"):
        method.script.main(flags_of(toy / "train", tmp_path))
    saved = weights(tmp_path)
    assert saved["step"] == 1 and all(x.isfinite().all() for x in saved["model"].values())


# ---- two processes ---------------------------------------------------------------------------------------

def plain_projector(patch):
    """AV-JEPA's without BatchNorm, which has the statistics of each process."""
    patch.setitem(avjepa_lejepa.RECIPE, "projector", ((8,), (8,), ""))


def train_as_rank(rank, folder):
    """What one of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train_all(rank, folder)
    gc.collect()                                       # a DDP that outlives the group may hang at its end
    dist.destroy_process_group()


RANKED = {method.name: (method, "") for method in METHODS}
RANKED["dropout"] = (LEJEPA, "--local dropout")        # what the views have is another on each process
RANKED["masked"] = (LEJEPA, "--local masked")


def train_all(rank, folder):
    """A step of each method, of the masked ones in two micro-batches; what is found goes into a file."""
    item = data.Clips.item
    seen = []
    ended = []

    def read(self, index, rng):
        clip = item(self, index, rng)
        seen.append(clip["present"])
        return clip

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        plain_projector(patch)
        patch.setattr(run, "start_process", lambda device, bf16: run.Process(torch.device("cpu"), rank, 2))
        patch.setattr(run, "draw_curves", lambda *_: None)
        patch.setattr(data.Clips, "item", read)
        patch.setattr(run.Run, "finish", lambda self, report: ended.append(self.unwrapped))
        for name, (method, flags) in RANKED.items():
            more = f"--steps 1 --batch-size 8 --accumulate {2 if method.masked else 1} {flags}"
            method.script.main(flags_of(folder / "clips", folder / name, more))
            state = {name: p.detach() for name, p in ended[-1].named_parameters()}
            found[name] = {"present": torch.stack(seen[-4:]), "weights": state}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(toy, clips, tmp_path_factory):
    """The folder of what two processes did; no clip of the second has sound."""
    folder = tmp_path_factory.mktemp("ranks")
    silent_folder(toy, clips, folder / "clips", {1, 3, 5, 7}, 16)
    how = "fork" if FORK else "spawn"
    torch.multiprocessing.start_processes(train_as_rank, (folder,), nprocs=2, start_method=how)
    return folder


@pytest.mark.parametrize("name", RANKED)
def test_two_processes_are_one_on_the_joined_batch_in_loss_and_gradient(
        ranks, quick, name, tmp_path, monkeypatch):
    """In float32. Masked: two processes with two micro-batches each, and one with one, two or four; the
    guess of knowing nothing moves with each micro-batch."""
    method, flags = RANKED[name]
    a, b = (torch.load(ranks / f"{rank}.pt", weights_only=True)[name] for rank in (0, 1))
    assert torch.equal(a["present"], b["present"]) != (name == "dropout")
    assert same(a["weights"], b["weights"])
    saved = weights(ranks / name)
    assert all(torch.equal(saved["model"][key], p) for key, p in a["weights"].items())
    monkeypatch.setattr(run, "start_process", lambda device, bf16: CPU)
    plain_projector(monkeypatch)
    other, = run.read_log(ranks / name)
    for accumulate in (1, 2, 4) if method.masked else (1,):
        out = tmp_path / str(accumulate)
        more = f"--steps 1 --batch-size 8 --accumulate {accumulate} {flags}"
        method.script.main(flags_of(ranks / "clips", out, more))
        row, = run.read_log(out)
        replaces = method.replaces and name != "masked"        # has no views of sound alone
        assert row["no_audio"] == other["no_audio"] and (row["no_audio"] == 4) != replaces
        alike = ("loss", "std/", "rank/", "kept/", "grad_norm", "lr", "tau")
        for key in row:
            if key.startswith(alike) or accumulate == 2 and key.startswith("know_nothing/"):
                assert other[key] == pytest.approx(row[key], rel=1e-4), key
        for number, state in weights(out)["optimizer"]["state"].items():
            gradient = state["exp_avg"]                # .1 of it
            distance = (saved["optimizer"]["state"][number]["exp_avg"] - gradient).norm()
            assert distance <= 1e-3 * gradient.norm() + 1e-7, number


# ---- a checkpoint ----------------------------------------------------------------------------------------

@for_each(METHODS)
@pytest.mark.parametrize("untrained", [False, True])
def test_load_encoder_gives_the_evaluated_weights_or_those_of_the_beginning(finished, method, untrained):
    content = weights(finished[method.name])
    expected = begun(method, content)
    if not untrained:
        expected.load_state_dict(content["model"])
    expected = getattr(expected, method.script.METHOD["weights"])
    encoder = common.load_encoder(finished[method.name], untrained=untrained)
    assert same(encoder.vit.state_dict(), expected.state_dict())


REFUSED = {
    "method": (dict(name="other"), "is a checkpoint of other, not of {name}"),
    "version": ("0.1.0+abc", "is of version 0.1.0+abc of the code"),
    "recipe": ({"lr": 7.0}, "the run there has lr 7.0 (now"),
    "step": (900, "it is at step 900 of 4"),
    "inputs": ({"crop_scale": (0.1, 0.2)}, "the run there has other inputs than its recipe makes here"),
    "online_probe": ({"heads": {}}, "the state of its online probe is damaged, or of other classes"),
    "optimizer": ({"param_groups": []}, "its optimiser state is damaged, or of another version of the code"),
}


@for_each(METHODS)
@pytest.mark.parametrize("key", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence_and_kept(
        toy, finished, quick, method, key, tmp_path):
    value, sentence = REFUSED[key]
    out = shutil.copytree(finished[method.name], tmp_path / "run")
    content = weights(out)
    content[key] = content[key] | value if isinstance(value, dict) else value
    if key == "version":                               # the first one wrote the method's name alone
        content["method"] = method.name
    torch.save(content, out / "latest.pt")
    before = [(out / name).read_bytes() for name in ("latest.pt", "log.jsonl", "results.json")]
    with pytest.raises(UserError) as error:
        method.script.main(flags_of(toy, out))
    assert sentence.replace("{name}", method.name) in str(error.value) and "\n" not in str(error.value)
    assert before == [(out / name).read_bytes() for name in ("latest.pt", "log.jsonl", "results.json")]


# ---- bad input -------------------------------------------------------------------------------------------

BAD = [                                                # flags that all share: each for one of the four
    ("--lr -1", "--lr -1.0 is out of range"),
    ("--size colossal", "--size colossal: unknown ViT"),
    ("--device cuda:99", "--device cuda:99: this machine or this torch does not have it"),
    ("--device meta", "--device meta: nothing of ours runs there; use cpu, mps, cuda or auto"),
    ("--accumulate 3", "is not divisible by 1 processes x 3 micro-batches"),
    ("--batch-size 100000", "--batch-size 100000 is larger than the set (24 clips)"),
    ("--data-dir nowhere", "--data-dir nowhere: there is no such folder"),
    ("--data imagenet", "--data imagenet: not a data set; one of toy, "),
    ("--resume no.pt", "no.pt: there is no such checkpoint"),
    (f"--out {300 * 'x'}", "xxx: cannot be made (File name too long)"),
    (f"--resume {300 * 'x'}", "xxx: there is no such checkpoint"),
    ("--online-probe", "toy/train have no labels; put them into sub-folders, one for each class, or leave"),
    ("--noise -1", "--noise -1.0 is out of range: from 0 to 100"),
]
ROWS = []
for number, each in enumerate(PAPERS):
    rows = [*BAD[number::4], *each.bad]
    ROWS += [pytest.param(each, *row, id=f"{each.name} {row[0]}") for row in rows]


@pytest.mark.parametrize("method,flags,sentence", ROWS)
def test_bad_input_as_a_command_ends_in_a_sentence_and_exit_code_2(toy, method, flags, sentence, tmp_path):
    flags = flags_of(toy / "train", tmp_path / "run", f"--size nano --batch-size 4 {flags}")
    done = command([sys.executable, str(ROOT / f"{method.name}.py"), *flags], tmp_path)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and sentence in errors[0] and done.stderr.rstrip().endswith(errors[0])
    assert not (tmp_path / "run" / "latest.pt").exists()


@for_each(PAPERS)
def test_a_folder_without_a_clip_that_decodes_ends_in_one_sentence(method, tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match="decode") as error:
        method.script.main(flags_of(tmp_path, tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "latest.pt").exists()


# ---- the four scripts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("one,other", list(itertools.combinations(PAPERS, 2)), ids=lambda method: method.name)
def test_two_mains_differ_in_at_most_24_lines(one, other):
    before, after = (inspect.getsource(method.script.main).splitlines() for method in (one, other))
    lines = [line for line in difflib.ndiff(before, after) if line.startswith(("+ ", "- "))]
    assert len(lines) <= 24, "\n".join(lines)


@for_each(PAPERS)
def test_a_main_has_25_to_50_statements(method):
    function, = ast.parse(inspect.getsource(method.script.main)).body
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    assert 25 <= len(statements) <= 50


# ---- the fifth method, which no shared file knows --------------------------------------------------------

EVALUATED = {
    "probe": (probe, "--recipe paper --epochs 1 --modality av", dict(lrs=[0.1], views=2, N=16)),
    "retrieval": (retrieval, "--clips all --views 1", dict(embedding="encoder", N=16)),
    "pixels": (pixels, "--epochs 1 --batch-size 4", dict(probe="pixels", N={"video": 16, "audio": 16})),
    "visualize": (visualize, "map", dict(what="map", N=16)),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_the_fifth_method_is_probed_as_it_says_searched_decoded_and_drawn(finished, toy, tmp_path, name):
    script, words, expected = EVALUATED[name]
    out = shutil.copytree(finished["fifth_method"], tmp_path / "run")
    where = ["--data", "toy", "--data-dir", str(toy), "--workers", "0", "--device", "cpu"]
    script.main([*words.split(), "--ckpt", str(out), *where])
    row = last_row(out, f"{name.replace('pixels', 'probe')}.jsonl")
    assert {key: row[key] for key in expected} == expected
    (out / "curves.png").unlink()
    visualize.main(["curves", str(out)])
    pictures = list(out.glob("*.png"))
    assert len(pictures) == (2 if name in ("pixels", "visualize") else 1)
    assert all(picture.read_bytes()[:4] == PNG for picture in pictures)
