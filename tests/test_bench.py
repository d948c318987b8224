"""bench.py: a step of the scripts' own loops, FLOP against the formula, parts of a clip's cost."""
import functools
import importlib
import itertools
import re
import sys
import time
import types

import pytest
import torch

import bench
import data
from conftest import ROOT, command, fails, same

METHODS = pytest.mark.parametrize("method", bench.METHODS)
TINY = "--recipe toy --size nano --batch-size 4 --device cpu"


# ---- A step ----------------------------------------------------------------------------------------------

class Begun(Exception):
    pass


class BenchUntilBegin(bench.Bench):
    """A bench whose model, inputs, plan and masks are there, and which has not begun."""
    def begin(self, model, optimizer, inputs, plan, draw=None, weigh=None, clip_inputs=None):
        self.unwrapped = model
        self.inputs = inputs
        self.clip_inputs = clip_inputs or inputs
        self.plan = plan
        self.draw = draw
        self.weigh = weigh
        raise Begun(self)


def begun(patch, method, *flags):
    """The bench of a script, as far as it came."""
    script = importlib.import_module(method)
    patch.setattr(script, "Run", functools.partial(BenchUntilBegin, None, True))
    with pytest.raises(Begun) as e:
        script.main(["--out", bench.NOWHERE, "--no-online-probe", "--device", "cpu", *flags])
    return e.value.args[0]


def matrices(*modules):
    """How many weights the matrices have."""
    total = 0
    for module in modules:
        total += sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    return total


def blocks(transformer, tokens):
    """FLOP of a pass through the blocks: each token times all matrices, and twice N x N x D."""
    total = 0
    for block in transformer.blocks:
        total += 2 * tokens * matrices(block.qkv, block.proj, block.fc1, block.fc2)
        total += 4 * tokens ** 2 * block.proj.in_features
    return total


def patches(vit, modality):
    return 2 * vit.num(modality) * vit.stems[modality]["patches"].weight.numel()


def predicted(predictor, embed, context, target):
    """FLOP of a predictor's pass."""
    ends = context * matrices(embed) + target * matrices(predictor.head)
    return 2 * ends + blocks(predictor, context + target)


def formula_of_ajepa(model, masks):
    (context, target), = masks[0].values()
    student = model.context_encoder
    trained = blocks(student, context.shape[1])
    trained += predicted(model.predictor, model.predictor.embed, context.shape[1], target.shape[1])
    teacher = patches(student, "audio") + blocks(student, student.num("audio"))
    return 3 * trained + 2 * patches(student, "audio") + teacher


def formula_of_avjepa_lejepa(model, masks):
    """Two views of both, one of sound, one of pictures, each with all tokens and CLS."""
    vit = model.encoder
    tokens = 1 + vit.num("video") + vit.num("audio")
    trained = 4 * (blocks(vit, tokens) + 2 * matrices(model.projector))
    sigreg = 4 * 2 * model.projector[-1].out_features * model.slices
    return 3 * trained + 2 * (3 * patches(vit, "video") + 3 * patches(vit, "audio") + sigreg)


def formula_of_mjepa(model, masks):
    student = model.context_encoder
    stems = patches(student, "video") + patches(student, "audio")
    trained = 0
    teacher = stems
    for name in ("a", "v", "av"):
        for mask_set in masks:
            context, target = [x.shape[1] for x in mask_set[name]]
            trained += blocks(student, context)
            trained += predicted(model.predictor, model.predictor.embed, context, target)
        teacher += blocks(student, context + target)
    trained += 2 * len(masks) * matrices(model.cross)
    return 3 * trained + 2 * stems + teacher


def formula_of_avjepa_ncsu(model, masks):
    student = model.context_encoder
    stems = patches(student, "video") + patches(student, "audio")
    trained = 0
    for mask_set in masks:
        context = sum(c.shape[1] for c, _ in mask_set.values())
        target = sum(t.shape[1] for _, t in mask_set.values())
        trained += blocks(student, context)
        trained += predicted(model.predictor, model.predictor.embed["v"], context, target)
    return 3 * trained + 2 * stems + stems + blocks(student, context + target)


@METHODS
def test_flop_are_those_of_the_formula_with_the_papers_tokens(method, folder, monkeypatch):
    """Small matrices, so that much of it is attention; whatever is computed again does not count."""
    flags = "--recipe paper --size nano --batch-size 4 --checkpoint-activations"
    run = begun(monkeypatch, method, *flags.split())
    before = {name: x.clone() for name, x in run.unwrapped.state_dict().items()}
    masks = run.draw(run.warm) if run.draw else None
    assert run.flops() == pytest.approx(globals()[f"formula_of_{method}"](run.unwrapped, masks), rel=0.005)
    assert same(before, run.unwrapped.state_dict())
    assert all(p.grad is None for p in run.unwrapped.parameters())


def clips_of(method, toy, *flags):
    """data.Clips as the method's script makes them of the toy clips."""
    words = ["data", "--data", "folder", "--data-dir", f"{toy}/train", "--method", method, *flags]
    run, inputs, plan = bench.planned(*bench.get_args([*words, "--recipe", "toy"]))
    return data.Clips(run.listing, inputs, plan, augment=data.Augment(jitter=0.4, gain=6.0))


@METHODS
def test_a_made_up_batch_has_the_keys_shapes_and_types_of_a_real_one(method, toy):
    clips = clips_of(method, toy)
    real = data.collate([clips[0, i] for i in range(9)])
    made = bench.made_up_batch(clips.plan, clips.inputs, 9)
    assert made.keys() == real.keys()
    for key, x in real.items():
        if torch.is_tensor(x):
            assert (made[key].shape, made[key].dtype) == (x.shape, x.dtype), key
            assert key in ("video", "audio", "index") or torch.equal(made[key], x), key
        else:
            assert made[key] == x, key


def number(text, name):
    return float(re.search(rf"^{name} +([\d.e+-]+)", text, re.M)[1])


def check_block(shown, clips, counted):
    """Whether the numbers of the block at the end fit each other."""
    seconds = number(shown, "seconds a step")
    flops = number(shown, "TFLOP a step")
    assert f", median of {counted}:" in shown
    assert number(shown, "clips/s") == pytest.approx(clips / seconds, rel=2e-3)
    assert number(shown, "TFLOP/s") == pytest.approx(flops / seconds, rel=2e-3)
    assert 0.1 < number(shown, "peak memory") < 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty one, to work in; predictors are shallow, one step warms up, FLOP are counted of one, and the
    peak is not measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "COUNTED", 1)
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "measure_product", lambda *args: 1e12)
    for method in bench.METHODS:
        recipe = importlib.import_module(method).RECIPE
        if "pred_depth" in recipe:
            monkeypatch.setitem(recipe, "pred_depth", (2, 2, ""))
    return tmp_path


@METHODS
def test_a_bench_says_what_a_step_costs_and_leaves_no_file(method, folder, monkeypatch, capsys):
    monkeypatch.setattr(bench.Bench, "flops", lambda self: 1e9)         # the test above counts them
    bench.main([method, *TINY.split(), "--count", "1"])
    shown = capsys.readouterr().out
    check_block(shown, 4, 1)
    assert "1 x CPU, threads: 1" in shown and "recipe toy, ViT nano" in shown and "waited" not in shown
    assert not list(folder.iterdir())


def test_two_processes_bench_one_step(folder):
    words = [sys.executable, str(ROOT / "bench.py"), "avjepa_lejepa", *TINY.split(), "--count", "2"]
    done = command(words, folder, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    check_block(done.stdout, 4, 2)
    assert "2 x CPU" in done.stdout
    assert not list(folder.iterdir())


def test_real_clips_are_waited_for(toy, folder, capsys):
    words = f"--data folder --data-dir {toy}/train --workers 0 --count 2"
    bench.main(["ajepa", *TINY.split(), *words.split()])
    shown = capsys.readouterr().out
    assert "24 clips found" in shown and number(shown, "waited for clips") > 0
    assert not list(folder.iterdir())


@pytest.mark.parametrize("words, steps", [("", 3), ("--count 2", 2)])
def test_a_long_step_is_announced_and_is_warm_up_enough(folder, monkeypatch, capsys, words, steps):
    clock = itertools.count(0, 40)
    monkeypatch.setattr(bench.Bench, "now", lambda self: next(clock))
    bench.main(["ajepa", *TINY.split(), *words.split()])
    shown = capsys.readouterr().out
    assert f"the first step took 40 s, {steps} more: about {40 * steps / 60:.0f} min" in shown
    assert number(shown, "seconds a step") == 40
    check_block(shown, 4, steps)


def test_too_little_memory_is_a_sentence(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(importlib.import_module("ajepa").AJEPA, "forward", full)
    fails(bench.main, ["ajepa", *TINY.split()], match="raise --accumulate, give --checkpoint-activations")


def test_the_share_of_a_peak_is_of_cards_in_the_table_alone():
    def peak(name, bf16=True):
        of = types.SimpleNamespace(device=torch.device("cuda"), process=types.SimpleNamespace(bf16=bf16))
        return bench.Bench.peak(of, name)

    assert peak("NVIDIA H200")[0] == 989e12 and peak("NVIDIA H100 PCIe")[0] == 756e12
    for unknown in (peak("NVIDIA H200", bf16=False), peak("NVIDIA GH200 480GB")):
        assert unknown[0] is None and "no share" in unknown[1]


# ---- A clip ----------------------------------------------------------------------------------------------

KEYS = [(0, i) for i in range(8)]


def test_the_parts_of_a_clip_sum_to_what_a_plain_loop_takes(toy):
    clips = clips_of("avjepa_lejepa", toy)
    began = time.thread_time()
    bench.read_clips(clips, KEYS, data.Troubles(24))
    plain = (time.thread_time() - began) / len(KEYS)
    began = time.thread_time()
    parts = bench.time_clips(clips, KEYS, data.Troubles(24))
    around = (time.thread_time() - began) / len(KEYS)
    assert tuple(parts) == bench.PARTS and min(parts.values()) > 0
    assert 0.8 * around < sum(parts.values()) <= around
    assert plain / 3 < sum(parts.values()) < 3 * plain


def test_a_part_within_another_is_not_counted_twice():
    watch = bench.Stopwatch()
    clock = iter(range(100))
    watch.since = 0
    inner = watch.timed("scale", lambda x: x + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "thread_time", lambda: next(clock))
        assert watch.timed(lambda x: "decode", inner)(1) == 2           # the clock moves once at each turn
    assert (watch.seconds["decode"], watch.seconds["scale"], sum(watch.seconds.values())) == (2, 1, 3)


def many_views(rng, duration, plan, times):
    return [view for _ in range(times) for view in plan(rng, duration)]


def test_more_views_cost_more(toy):
    clips = clips_of("avjepa_lejepa", toy)
    few = bench.time_clips(clips, KEYS, data.Troubles(24))
    clips.plan = functools.partial(many_views, plan=clips.plan, times=8)
    many = bench.time_clips(clips, KEYS, data.Troubles(24))
    for part in ("crop", "mel"):
        assert many[part] > 2 * few[part], part


def test_data_says_how_many_cores_a_step_wants(toy, folder, capsys):
    off = " ".join(f"--{name} 0" for name in data.CHANGES)
    words = f"data --data folder --data-dir {toy}/train --recipe toy --method mjepa --clips 30 {off}"
    bench.main(words.split())
    shown = capsys.readouterr().out
    for rate in (20, 80, 120):
        cores = float(re.search(rf"^{rate} clips/s want ([\d.]+) cores", shown, re.M)[1])
        assert cores == pytest.approx(rate * number(shown, "total") / 1e3, rel=0.01, abs=0.051)
    assert number(shown, "augment") == 0
    bench.main([*words.split(), "--step-seconds", "0.25", "--jitter", "0.4"])
    shown = capsys.readouterr().out
    assert re.search(r"a step of 24 clips in 0.25 s:\n96 clips/s want", shown)
    assert number(shown, "augment") > 0
    assert not list(folder.iterdir())


def test_a_set_without_a_readable_clip_is_a_sentence(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"none" * 1000)
    words = ["data", "--data", "folder", "--data-dir", str(tmp_path)]
    assert "broken.mp4" in fails(bench.main, words, match="20 clips in a row cannot be used")


# ---- Bad flags -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    ("ajepa --out x", "--out: a bench keeps nothing"),
    ("ajepa --fresh", "--fresh: a bench keeps nothing"),
    ("ajepa --resume x", "--resume: a bench keeps nothing"),
    ("mjepa --steps 3", "--steps: a bench keeps nothing"),
    ("mjepa --data-dir x", "--data-dir: without --data the clips are made up"),
    ("mjepa --blur 0.5", "--blur: without --data the clips are made up"),
    ("mjepa --count 0", "--count 0 is out of range"),
    ("ajepa --batch-size 1", "--batch-size 1 is out of range"),
    ("ajepa --size nano --batch-size 4 --accumulate 3", "--batch-size 4 is not divisible by 1 processes x 3"),
    ("data --clips 0", "--clips 0 is out of range"),
    ("data --step-seconds 0", "--step-seconds 0.0 is out of range"),
    ("data --data folder --data-dir nowhere", "--data-dir nowhere: there is no such folder"),
    ("data --data folder --data-dir . --out x", "--out: a bench keeps nothing")])
def test_bad_flags_are_one_sentence(words, message, folder):
    assert fails(bench.main, words.split()).startswith(message)


@pytest.mark.parametrize("words", ["yjepa", "ajepa --yes", "data --method yjepa"])
def test_unknown_words_end_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(words.split())
    assert e.value.code == 2 and re.search("yjepa.*choose from|--yes", capsys.readouterr().err)
