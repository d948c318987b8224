"""MJEPA: its masks, views, nine terms, recipe and last phase, each against a reference of its own."""
import functools
import math
import shutil
import signal

import ajepa
import common
import data
import mjepa
import run as runs
import slow
from common import UserError
from conftest import same, weights
from mjepa import MJEPA, TERMS, WITHIN
from slow import is_uniform, quicken, record, small_batch, train

import numpy as np
import pytest
import torch

recipe_of = functools.partial(slow.recipe_of, mjepa)


def toy_recipe(*flags):
    return mjepa.get_args([*map(str, flags)])[1]


# ---- masks and views -------------------------------------------------------------------------------------

def test_the_blocks_of_a_sound_have_the_areas_and_the_aspects_of_a_jepa(monkeypatch):
    calls = record(monkeypatch, common, "block_size")
    recipe = recipe_of("--terms", "separate-audio")
    for step in range(40):
        mjepa.draw_masks(4, step, range(4), {"audio": (8, 64)}, recipe)
    h, w = np.array([size for _, size in calls]).T
    assert (h * w >= 0.15 * 512 - h / 2).all()         # the width is rounded last
    assert (h * w <= 0.2 * 512 + h / 2).all()
    assert set(h) <= {3, 4}                            # 8 sqrt(s / a) is 2.5 to 4.1: relative to the grid
    assert len(h) % 4 == 0


def views(*flags, duration=12.0, count=300):
    recipe = recipe_of(*flags)
    law = (recipe["seconds"], recipe["video_seconds"], ("video", "audio"))
    plans = [mjepa.plan_views(np.random.default_rng(seed), duration, *law) for seed in range(count)]
    return [view for (view,) in plans]


def test_the_pictures_are_a_random_part_of_the_sound_that_is_heard():
    assert {(view.video, view.pictures[1]) for view in views()} == {("random", 4)}
    starts = [view.start for view in views()]
    places = [(view.pictures[0] - view.start) / 6 for view in views()]
    assert is_uniform(places, 0, 1)
    assert abs(np.corrcoef(starts, places)[0, 1]) < 4 / math.sqrt(300)
    assert all(0 <= view.pictures[0] <= 2 for view in views(duration=6.0))      # in what there is
    assert all(view.pictures[0] == 0 for view in views(duration=1.5))


def test_aligned_sound_and_pictures_cover_the_same_span():
    for view in views("--aligned"):
        assert view.pictures == (view.start, view.seconds)
        assert view.seconds == 4
        assert 0 <= view.start <= 8
    inputs = mjepa.make_inputs(recipe_of("--aligned"))
    assert inputs.seconds == inputs.video_seconds == 4
    assert inputs.mel_frames == 416 == 16 * math.ceil(401 / 16)
    inputs = mjepa.make_inputs(toy_recipe("--aligned"))
    assert inputs.seconds == inputs.video_seconds == 1.28


def test_the_mel_has_whole_patches_and_pictures_are_of_what_is_heard_for_any_length():
    for seconds, frames in ((10, 1024), (3.84, 400), (2, 208)):
        recipe = recipe_of("--seconds", seconds)
        assert mjepa.make_inputs(recipe).mel_frames == frames
        assert recipe["video_seconds"] == min(4, seconds)
    for seconds, frames in ((1.92, 192), (10, 1008), (1, 112)):
        recipe = toy_recipe("--seconds", seconds)
        assert mjepa.make_inputs(recipe).mel_frames == frames
        assert recipe["video_seconds"] == min(1.28, seconds)


# ---- the nine terms --------------------------------------------------------------------------------------

def test_the_rows_of_terms_are_those_of_the_papers_table():
    within = {"a", "v", "av"}
    assert {name: set(terms) for name, terms in TERMS.items()} == {
        "separate-audio": {"a"}, "separate-video": {"v"}, "intra": within,
        "intra+av": within | {"a->v", "v->a"},
        "all": within | {"a->v", "v->a", "a->av", "av->a", "v->av", "av->v"}}


@pytest.mark.parametrize("size,levels", [
    ("base", [2, 5, 8, 11]), ("large", [5, 11, 17, 23]), ("giant", [9, 19, 29, 39]), ("toy", [0, 1, 2, 3]),
    ("three", [0, 1, 2])])
def test_the_levels_are_evenly_spread_end_with_the_last_and_none_comes_twice(size, levels, monkeypatch):
    monkeypatch.setitem(common.SIZES, "three", (64, 3, 2, 256))
    recipe = recipe_of("--size", size)
    with torch.device("meta"):
        model = mjepa.make_model(recipe, mjepa.make_inputs(recipe))
    assert model.layers == levels
    assert sorted(map(int, model.target_encoder.norms)) == levels[:-1]
    assert model.predictor.head.out_features == len(levels) * model.context_encoder.dim


def small_model(terms="all", like=None):
    """like: whose weights it has."""
    model, _ = slow.small_model(mjepa, "--terms", terms)
    if like is not None:
        model.load_state_dict({key: like[key] for key in model.state_dict()})
    return model


def term_gradients(model, batch):
    """{term: (its loss, {name: its gradient alone})}"""
    grids = {"video": (2, 4, 4), "audio": (3, 5)}
    weight = {name: torch.full((3,), 1 / 3) for name in WITHIN}
    with pytest.MonkeyPatch.context() as patch:
        calls = record(patch, mjepa, "mean_loss")
        model(batch, mjepa.draw_masks(5, 0, range(3), grids, recipe_of()), weight, 0)
    losses = [loss for _, loss in calls if loss.requires_grad]                  # not those of knowing nothing
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for term, loss in zip((*model.inputs, *model.across), losses, strict=True):
        gradients = torch.autograd.grad(loss, trained.values(), retain_graph=True, allow_unused=True)
        found[term] = (loss.item(), {n: g for n, g in zip(trained, gradients) if g is not None})
    return found


def test_each_term_and_its_gradient_is_the_same_with_and_without_the_others():
    model = small_model()
    every = term_gradients(model, small_batch(3))
    assert tuple(every) == TERMS["all"]
    for terms in ("intra", "intra+av"):
        found = term_gradients(small_model(terms, model.state_dict()), small_batch(3))
        assert tuple(found) == TERMS[terms]
        for term in found:
            assert same(found[term], every[term])


@pytest.mark.parametrize("number,m", [(0, "video"), (1, "audio")])
def test_a_model_of_one_modality_is_the_joint_one_with_the_modalitys_embedding_in_the_bias(number, m):
    state = small_model().state_dict()
    for encoder in ("context_encoder", "target_encoder"):
        state[f"{encoder}.stems.{m}.patches.bias"] += state[f"{encoder}.modality"][number, 0]
    alone = small_model(f"separate-{m}", state)
    ((term, (loss, gradients)),) = term_gradients(alone, small_batch(3)).items()
    other, expected = term_gradients(small_model(), small_batch(3))[term]
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)
    missing = {name for name, gradient in expected.items() if gradient.any()} - gradients.keys()
    assert missing == {"context_encoder.modality"}


# ---- the recipe of the paper -----------------------------------------------------------------------------

def test_the_cooldown_changes_the_frames_the_steps_and_the_rate():
    recipe = recipe_of()
    cooldown = recipe_of("--cooldown", "--init", "x")
    changed = {name: value for name, value in cooldown.items() if recipe.get(name) != value}
    assert changed == dict(frames=64, video_seconds=10.0, steps=12_000, warmup=0, lr_end=1e-6, cooldown=True)
    assert toy_recipe("--cooldown", "--init", "x")["frames"] == 4 * toy_recipe()["frames"]


def test_the_learning_rate_warms_up_stays_and_in_the_cooldown_falls_to_1_06e_4():
    recipe = recipe_of()
    for step in (0, 5999, 11_999, 12_000, 149_999):
        rate = 1e-4 + 4.25e-4 * min(step + 1, 12_000) / 12_000
        assert mjepa.learning_rate(step, recipe) == pytest.approx(rate, rel=1e-9)
    cooldown = recipe_of("--cooldown", "--init", "x")
    rates = [mjepa.learning_rate(step, cooldown) for step in range(12_000)]
    assert rates[0] == 5.25e-4
    assert rates[-1] == pytest.approx(1.06e-4, abs=1e-6)
    np.testing.assert_allclose(np.diff(rates), (1e-6 - 5.25e-4) / 15_000, rtol=1e-6)
    short = recipe_of("--cooldown", "--init", "x", "--steps", 100)              # the same fall
    assert mjepa.learning_rate(50, short) == pytest.approx(rates[6000])


# ---- runs ------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    quicken(monkeypatch, mjepa)


@pytest.fixture(scope="module")
def begun(toy, tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("mjepa")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, mjepa)
        train(mjepa, toy, out, "--steps", 2)
    return out


def interpolated(before, count):
    """Rows (T, 1, D) at the middles of `count` equal parts of the time, linear between those of the T."""
    before = before[:, 0].numpy()
    at = (np.arange(count) + 0.5) * len(before) / count - 0.5
    columns = [np.interp(at, np.arange(len(before)), column) for column in before.T]
    return torch.from_numpy(np.stack(columns, 1)[:, None]).float()


STRETCHED = ("context_encoder.stems.video.positions.first", "target_encoder.stems.video.positions.first",
             "predictor.positions.video.first")


@pytest.fixture(scope="module")
def cooled(toy, begun, tmp_path_factory):
    """The checkpoints before and after one step of the last phase with a learning rate of 0."""
    out = tmp_path_factory.mktemp("cooldown")
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch, mjepa)
        patch.setattr(data, "mel_stats", None)         # the statistics are the first checkpoint's
        train(mjepa, toy, out, "--steps", 1, "--cooldown", "--init", begun, "--lr", 0)
    return weights(begun), weights(out)


def test_the_cooldown_has_four_times_the_frames_of_all_that_is_heard_and_the_same_mel(cooled):
    before, after = (content["inputs"] for content in cooled)
    assert after["frames"] == 4 * before["frames"] == cooled[1]["encoder"]["video"]["shape"][0]
    assert after["video_seconds"] == after["seconds"] == before["seconds"]
    for name in ("mel_mean", "mel_std"):
        assert after[name] == before[name]
        assert len(before[name]) == 64


def test_the_cooldown_starts_from_the_weights_with_positions_of_time_interpolated(cooled):
    before, after = (content["model"] for content in cooled)
    assert after.keys() == before.keys()
    for name, now in after.items():
        if "means." in name:                           # they have seen a further step
            continue
        expected = before[name]
        if name in STRETCHED:
            assert (len(expected), len(now)) == (2, 8)
            expected = interpolated(expected, 8)
        if name.startswith("target_encoder."):         # .0005 of the way towards the student
            assert (now - expected).abs().max() < 1e-3
        else:
            torch.testing.assert_close(now, expected, atol=1e-6, rtol=1e-6)     # the learning rate is 0


def test_adamw_goes_on_in_the_cooldown_with_its_moments_but_for_the_stretched_positions(cooled):
    before, after = (content["optimizer"]["state"] for content in cooled)
    model = MJEPA(cooled[1]["encoder"], TERMS["all"], 64, 2)
    names = {id(p): name for name, p in model.named_parameters()}
    order = []
    for group in common.weight_decay_groups(model, 0.04):
        order += [names[id(p)] for p in group["params"]]
    assert set(STRETCHED) & set(order) == {STRETCHED[0], STRETCHED[2]}
    for number, name in enumerate(order):
        new = name in STRETCHED
        assert after[number]["step"] == (1 if new else before[number]["step"] + 1), name


def test_a_run_with_init_goes_on_when_its_first_checkpoint_is_gone_but_not_from_another(
        toy, begun, quick, tmp_path, monkeypatch):
    first = shutil.copytree(begun, tmp_path / "first")
    flags = ["--steps", 2, "--init", first]
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "note", lambda self, *shown: signal.raise_signal(signal.SIGTERM))
        patch.setattr(runs.Run, "clip", lambda self: 1.0)
        patch.setattr(runs.Run, "log", lambda self, step, **values: None)
        train(mjepa, toy, tmp_path / "run", *flags)
    assert weights(tmp_path / "run")["step"] == 1
    shutil.rmtree(first)
    train(mjepa, toy, tmp_path / "run", *flags)
    assert weights(tmp_path / "run")["step"] == 2
    with pytest.raises(UserError, match=f"the run there began from {first}"):
        train(mjepa, toy, tmp_path / "run", "--steps", 2, "--init", "other")


BAD_INIT = {
    "--cooldown --init OTHER": "checkpoint of ajepa, not of mjepa",
    "--init BEGUN --size toy": "another shape",
    "--init BEGUN --terms intra": "other names",
    "--init BEGUN/latest.pt --out BEGUN": "written over",
}


@pytest.mark.parametrize("flags", BAD_INIT)
def test_init_wants_a_checkpoint_of_this_method_size_and_terms_in_another_folder(
        toy, begun, tmp_path, flags):
    other = tmp_path / "other.pt"
    torch.save({**weights(begun), "method": ajepa.METHOD}, other)
    given = flags.replace("BEGUN", str(begun)).replace("OTHER", str(other))
    with pytest.raises(UserError, match=BAD_INIT[flags]) as error:
        train(mjepa, toy, tmp_path / "run", "--steps", 1, *given.split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "latest.pt").exists()


def test_a_cooldown_takes_a_folder_of_its_own_and_a_recipe_that_does_not_name_its_beginning():
    args, recipe = mjepa.get_args(["--cooldown", "--init", "x"])
    assert args.out == "runs/mjepa-cooldown-toy-seed0"
    assert "x" not in recipe.values()


