"""What run.py claims: processes, files, alarms, curves, flags, and a run on made-up clips. What a run does
with gradients, logs and checkpoints: test_methods.py."""
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
import types
from dataclasses import asdict
from pathlib import Path

import common
import data
import run
from datasets import batches
from run import Process

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import CPU, FORK, METHOD, fails, free_port, same, weights
from slow import random


# ---- Little: a method whose clips are numbers ----------------------------------------------------------

TABLE = {"size": ("nano", "nano", ""), "seconds": (1.0, 1.0, ""), "batch_size": (8, 8, ""),
         "lr": (0.1, 0.05, ""), "steps": (None, 4, ""), "epochs": (2, None, ""), "warmup": (0.1, 0.1, "")}


class Little(nn.Module):
    """Keeps what it is given."""
    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.parts = dict(encoder=dict(size="nano", audio=dict(shape=(16, 16), patch=(16, 16))))
        self.encoder = common.ViT(**self.parts["encoder"]).requires_grad_(False)
        self.slope = nn.Parameter(torch.randn(2))
        self.given = []

    def forward(self, batch, masks, weight, tick):
        drawn = tuple(torch.rand(3).tolist())
        self.given.append(dict(index=batch["index"], masks=masks, weight=weight, tick=tick, drawn=drawn))
        loss = weight * self.slope.square().sum()
        if "audio" in batch:
            loss = loss + batch["audio"].sum()
        return loss, {"loss/a": loss.detach(), "clip/audio": random(24, 64)[batch["index"]]}


def numbers(clips, order, workers, pin, ahead, at=None, then=None):
    """In place of data.train_loader: nothing is decoded, clip 3 is short and silent. Before the micro-batch
    number `at` comes then()."""
    for number, keys in enumerate(order):
        if number == at:
            then()
        index = torch.tensor([i for _, i in keys])
        there = index >= 0
        flags = dict(has_audio=there & (index != 3), has_video=there, short=index == 3)
        yield dict(index=index, **flags, bad=[], empty=[], lost=0)


def draw_masks(step, places):
    """Masks that tell step and place."""
    rows = torch.tensor(places)[:, None]
    return [{"a": (1000 * step + rows, -rows)}]


def read(*words):
    parser, _ = run.make_parser("Little.", "little")
    args = parser.parse_args([str(word) for word in words])
    return args, run.read_recipe(args, "little", TABLE)


def train(out, *words, interrupt=None, dropout=0.0, classes=None):
    """Train a Little as the scripts' main does, with a SIGTERM in step number `interrupt`. classes: of its
    clips, which have else no labels. Returns its model."""
    for number in range(16):
        folder = out / "clips"
        if classes:
            folder = folder / "train" / str(number % classes)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.wav").touch()
    where = ["--data", "folder", "--data-dir", out / "clips", "--out", out / "run"]
    flags = ["--recipe", "toy", "--workers", 0, "--device", "cpu", "--log-every", 1]
    args, recipe = read(*where, *flags, *words)
    little = run.Run(METHOD, args, recipe)
    model = little.build(Little, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), recipe["lr"])
    little.resume(model, optimizer)
    little.begin(model, optimizer, data.Inputs(), None, functools.partial(draw_masks, places=little.places))
    for step in little.steps():
        if step + 1 == interrupt:
            signal.raise_signal(signal.SIGTERM)
        for batch, masks, weight, tick in little.micro_batches(step):
            loss, shown = little.model(batch, masks, weight, tick)
            loss.backward()
            little.note(loss, shown)
        little.clip()
        optimizer.step()
        optimizer.zero_grad()
        little.log(step)
        little.save(step)
    little.finish(None)
    return model


draw_curves = run.draw_curves


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No decoding and no curves."""
    monkeypatch.setattr(data, "train_loader", numbers)
    monkeypatch.setattr(run, "draw_curves", lambda *_: None)


# ---- Two processes -------------------------------------------------------------------------------------

def on_a_rank(rank, folder, port):
    """What one of two processes finds goes into a file."""
    data.train_loader = numbers
    run.draw_curves = lambda *_: None
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    process = run.start_process("cpu")
    stop = run.StopSignal()
    stop.came = rank == 1                                      # a SIGTERM may reach one process first
    found = dict(
        folder=str(folder),
        place=(process.rank, process.world, process.main),
        any=[process.any(flag) for flag in (True, False, rank == 0, stop)],
        largest=process.largest(3 - rank),
        total=process.total(torch.tensor([1.0, rank])).tolist(),
        main=process.from_main(lambda: f"of {rank}"),
        gathered=common.gather_ranks(torch.full((2, 1), float(rank))).flatten().tolist(),
        given=train(folder, "--accumulate", 2).given)
    train(folder / "probed", "--accumulate", 2, "--online-probe", classes=2)
    for name, then in ON_RANK_1.items():
        if rank == 1:
            data.train_loader = functools.partial(numbers, at=5, then=then)
        found[name] = outcome(folder / name, "--accumulate", 2)
        data.train_loader = numbers
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()                               # when DDP is gone, else gloo may hang


def outcome(*words):
    """The message of the error in which a training ends; None without one."""
    try:
        train(*words)
    except common.UserError as e:
        return str(e)
    return None


def wait_for(number):
    """Wait for clips for a minute, and get a signal soon."""
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    time.sleep(60)


def no_memory():
    raise common.UserError("a data worker was killed")


# what comes to the second process in the midst of its third step's clips, while the first one trains
ON_RANK_1 = {"signal": functools.partial(wait_for, signal.SIGTERM), "error": no_memory}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    how = "fork" if FORK else "spawn"
    torch.multiprocessing.start_processes(on_a_rank, (folder, free_port()), nprocs=2, start_method=how)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_processes_share_what_one_of_them_knows(ranks):
    for rank, found in enumerate(ranks):
        assert found["place"] == (rank, 2, rank == 0)
        assert found["any"] == [True, False, True, True]       # a signal at one process stops all
        assert found["largest"] == 3 and found["total"] == [2, 1] and found["main"] == "of 0"
        assert found["gathered"] == [0, 0, 1, 1]


def test_each_micro_batch_has_the_masks_of_its_own_clips_and_a_random_stream_of_its_own(ranks):
    draws = set()
    for rank, found in enumerate(ranks):
        for tick, one in enumerate(found["given"]):
            context, target = one["masks"][0]["a"]
            rows = torch.arange(rank, 8, 2)[2 * (tick % 2):][:2, None]
            assert torch.equal(context, 1000 * (tick // 2) + rows) and torch.equal(target, -rows)
            assert one["tick"] == tick and one["weight"] == 0.5
            draws.add(one["drawn"])
    assert len(draws) == 2 * 4 * 2


def test_a_clip_has_the_same_mask_in_any_number_of_processes_and_micro_batches(ranks, tmp_path):
    def masks(found):
        pairs = []
        for one in found:
            pairs += zip(one["index"].tolist(), one["masks"][0]["a"][0].flatten().tolist())
        return sorted(pairs)

    whole = masks(train(tmp_path).given)
    assert masks(ranks[0]["given"] + ranks[1]["given"]) == whole and len(set(whole)) == 4 * 8


def probed(out):
    """The online probe's values in a run's log."""
    return [row["probe/audio"] for row in run.read_log(out)]


def test_the_online_probe_of_two_processes_with_two_micro_batches_is_that_of_one(ranks, tmp_path):
    train(tmp_path, "--online-probe", classes=2)
    folders = tmp_path / "run", Path(ranks[0]["folder"]) / "probed" / "run"
    one, two = map(probed, folders)
    assert one == two and len(set(one)) > 1
    one, two = (weights(folder)["online_probe"]["heads"] for folder in folders)
    torch.testing.assert_close(one, two)


def test_what_one_process_meets_ends_all_after_the_last_complete_step_which_is_saved(ranks):
    first, second = ranks
    folder = Path(first["folder"])
    assert first["signal"] is second["signal"] is None
    assert first["error"].startswith("another process of this run has met an error, and says which")
    assert first["error"].endswith("latest.pt holds step 2 of 4, and the same command goes on from there")
    assert second["error"] == "a data worker was killed; rank 0 says what is saved"
    for name in ON_RANK_1:
        assert weights(folder / name / "run")["step"] == 2


def test_the_weights_are_a_mean_over_the_clips_of_the_step_that_have_all_that_an_input_needs():
    weigh = {"a": ("audio",), "av": ("video", "audio"), "none": ("video", "audio", "touch")}
    little = types.SimpleNamespace(weigh=weigh, world=1, process=CPU, device=CPU.device)
    hears = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    sees = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    batches = [dict(has_audio=hears[i], has_video=sees[i], has_touch=sees[1]) for i in range(2)]
    a, b = run.Run.weights(little, batches)
    assert a["a"].tolist() + b["a"].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 1 / 3])
    assert a["av"].tolist() + b["av"].tolist() == [1, 0, 0, 0, 0, 0]
    assert a["none"].tolist() + b["none"].tolist() == [0, 0, 0, 0, 0, 0]       # and no nan


# ---- A run ---------------------------------------------------------------------------------------------

def test_rows_and_checkpoints_come_at_their_intervals_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(torch, "save", lambda content, file: saved.append(content["step"]))
    train(tmp_path, "--log-every", 2, "--save-every", 2, "--steps", 5)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [1, 3, 4]
    assert saved == [2, 4, 5]


def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint_and_a_fresh_one_everything(tmp_path, capsys):
    train(tmp_path, interrupt=2)
    first = run.read_log(tmp_path / "run")
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    run.add_row(tmp_path / "run", "log.jsonl", {"step": 2, "loss": 9.0})       # before a kill
    (tmp_path / "run" / "results.json").write_text("[]")       # of what is written over
    train(tmp_path)
    rows = run.read_log(tmp_path / "run")
    assert rows[:2] == first and [row["step"] for row in rows] == [0, 1, 2, 3] and rows[2]["loss"] != 9
    assert "going on at step 2 of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "results.json").exists()
    train(tmp_path / "whole")
    counts = [row["short"] for row in run.read_log(tmp_path / "whole" / "run")]
    assert [row["short"] for row in rows] == counts and counts[-1] == 2        # they go on
    train(tmp_path, "--fresh", "--steps", 1)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [0]


def test_a_stopped_run_s_online_probe_goes_on_bit_for_bit_or_where_the_checkpoint_has_none_anew(tmp_path):
    flags = ["--online-probe", "--log-every", 3]
    for name in ("whole", "stopped", "without"):
        train(tmp_path / name, *flags, classes=4, interrupt=None if name == "whole" else 2)
    content = weights(tmp_path / "without" / "run")
    assert len(content.pop("online_probe")["scored"]["audio"][0]) == 15         # of two steps, but one
    torch.save(content, tmp_path / "without" / "run" / "latest.pt")
    for name in ("stopped", "without"):
        train(tmp_path / name, *flags, classes=4)
    whole, stopped, without = (tmp_path / name / "run" for name in ("whole", "stopped", "without"))
    assert same(weights(whole)["online_probe"], weights(stopped)["online_probe"])
    one, two, three = map(probed, (whole, stopped, without))
    assert one == two and one[0] > 0 == three[0]               # before its first step a head says nothing
    assert "other classes; give --no-online-probe" in fails(train, tmp_path / "stopped", *flags, classes=5)


def kept(folder):
    """{name: step} of the checkpoints that stay."""
    return {file.name: weights(file)["step"] for file in (folder / "run").glob("step-*.pt")}


def test_a_copy_of_the_checkpoint_stays_at_each_nth_step_whatever_save_every_is(tmp_path):
    train(tmp_path, "--keep-every", 2, "--save-every", 3, "--steps", 7)
    assert kept(tmp_path) == {"step-000002.pt": 2, "step-000004.pt": 4, "step-000006.pt": 6}
    assert weights(tmp_path / "run")["step"] == 7
    train(tmp_path / "stops", "--keep-every", 2, "--save-every", 9, "--steps", 7, interrupt=5)
    assert set(kept(tmp_path / "stops")) == {"step-000002.pt", "step-000004.pt"}           # not the fifth
    content = weights(tmp_path / "run" / "step-000004.pt")
    assert same(content["model"], weights(tmp_path / "stops" / "run" / "step-000004.pt")["model"])


@pytest.mark.parametrize("words, start, left", [
    (["--steps", 9], 7, {2, 4, 6}), (["--fresh"], 0, set()), (["--resume", "step-000004.pt"], 4, {2, 4}),
    (["--resume", "step-000002.pt"], 2, {2})])
def test_what_a_run_before_kept_of_later_steps_goes_once_a_step_is_done_and_not_where_none_can_be(
        tmp_path, monkeypatch, words, start, left):
    train(tmp_path, "--keep-every", 2, "--steps", 7)
    out = tmp_path / "run"
    others = [out / name for name in ("step-9.pt", "step-best.pt", "0step-000009.pt")]
    for file in (*others, out / "step-000008.pt"):
        file.touch()
    log = (out / "log.jsonl").read_bytes()
    where = [out / word if str(word).endswith(".pt") else word for word in ["--steps", 7, *words]]
    now = functools.partial(numbers, at=0, then=functools.partial(signal.raise_signal, signal.SIGTERM))
    with monkeypatch.context() as patch:                       # while the first clips are waited for
        patch.setattr(data, "train_loader", now)
        train(tmp_path, *where)
    assert {step for step in range(9) if (out / run.step_file(step)).exists()} == {2, 4, 6, 8}
    assert (out / "log.jsonl").read_bytes() == log and weights(out)["step"] == 7
    train(tmp_path, *where, interrupt=start + 1)
    assert {step for step in range(9) if (out / run.step_file(step)).exists()} == left
    assert all(file.exists() for file in others)
    assert weights(out)["step"] == start + 1
    assert [row["step"] for row in run.read_log(out)] == list(range(start + 1))
    if start in (2, 4):
        for file in others:
            file.unlink()
        train(tmp_path, "--steps", 7, "--keep-every", 2)
        train(tmp_path / "whole", "--steps", 7)
        assert same(weights(out)["model"], weights(tmp_path / "whole" / "run")["model"])
        assert set(kept(tmp_path).values()) == {2, 4, 6}


def test_over_another_run_s_checkpoint_one_is_written_after_the_first_step(tmp_path, monkeypatch):
    """So that whoever is killed later does not go on from the other one."""
    train(tmp_path, "--steps", 7)
    saved = []
    replace = run.replace_file

    def note(path, write):
        replace(path, write)
        if path.name == "latest.pt":
            saved.append(weights(path.parent)["step"])

    monkeypatch.setattr(run, "replace_file", note)
    train(tmp_path, "--fresh", "--steps", 3)
    assert saved == [1, 3]


def test_what_is_kept_of_earlier_steps_stays_when_a_run_goes_on_and_latest_is_never_ahead_of_it(
        tmp_path, monkeypatch, disk, capsys):
    fills = functools.partial(numbers, at=3, then=functools.partial(full, 20_000))
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_loader", fills)
        message = fails(train, tmp_path, "--save-every", 1, "--keep-every", 2)
    assert "run/step-000004.pt: cannot be written (File too large)" in message
    assert message.endswith("latest.pt holds step 3 of 4, and the same command goes on from there")
    full(resource.RLIM_INFINITY)
    train(tmp_path, "--keep-every", 2)
    assert kept(tmp_path) == {"step-000002.pt": 2, "step-000004.pt": 4}


def test_a_signal_in_the_last_step_leaves_curves_and_table_to_the_next_call(tmp_path, capsys):
    train(tmp_path, interrupt=4)
    said = capsys.readouterr().out
    assert "stopped before the curves" in said and "holds step 4 of 4, and the same command goes on" in said
    assert not (tmp_path / "run" / "curves.png").exists()
    train(tmp_path)
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait_for_clips_at_once_and_the_run_goes_on_bit_for_bit(
        tmp_path, monkeypatch, capsys, number):
    began = time.time()
    with monkeypatch.context() as patch:                       # in the midst of the clips of the third step
        waits = functools.partial(numbers, at=5, then=functools.partial(wait_for, number))
        patch.setattr(data, "train_loader", waits)
        train(tmp_path / "a", "--accumulate", 2)
    assert time.time() - began < 30                            # of 60
    said = "latest.pt holds step 2 of 4, and the same command goes on from there"
    assert said in capsys.readouterr().out and weights(tmp_path / "a" / "run")["step"] == 2
    for folder in "ab":
        train(tmp_path / folder, "--accumulate", 2)
    one, two = (weights(tmp_path / folder / "run") for folder in "ab")
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])


@pytest.mark.parametrize("words, interrupt, advice", [
    ([], 1, "nothing of this run is in {out}/latest.pt yet"),
    (["--fresh"], 2, "holds step 2 of 4, and the same command without --fresh goes on from there"),
    (["--resume", "first.pt"], 3, "holds step 3 of 4, and the same command without --resume goes on")])
def test_what_a_stopped_run_says_of_its_checkpoint_is_true(
        tmp_path, monkeypatch, capsys, words, interrupt, advice):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "first", interrupt=2)
    os.rename(tmp_path / "first" / "run" / "latest.pt", "first.pt")
    if interrupt == 1:                                         # while the first clips are waited for
        stops = functools.partial(numbers, at=0, then=functools.partial(signal.raise_signal, signal.SIGTERM))
        monkeypatch.setattr(data, "train_loader", stops)
    train(tmp_path, *words, interrupt=interrupt)
    assert advice.format(out=tmp_path / "run") in capsys.readouterr().out
    if interrupt > 1:
        train(tmp_path)
        assert f"going on at step {interrupt} of 4" in capsys.readouterr().out


def full(size):
    """From now on no file can be written beyond `size` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, file", [(20_000, "latest.pt"), (1, "log.jsonl")])
def test_a_full_disk_ends_the_run_in_a_sentence_and_leaves_the_older_checkpoint(
        tmp_path, monkeypatch, capsys, disk, size, file):
    # capsys: pytest's own capture writes files, too
    fills = functools.partial(numbers, at=2, then=functools.partial(full, size))
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_loader", fills)
        message = fails(train, tmp_path, "--save-every", 1)
    assert f"run/{file}: cannot be written (File too large)" in message
    assert message.endswith("latest.pt holds step 2 of 4, and the same command goes on from there")
    full(resource.RLIM_INFINITY)
    assert weights(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.part")) + list((tmp_path / "run").glob(".*.part"))
    train(tmp_path)
    assert "going on at step 2 of 4" in capsys.readouterr().out


def test_a_full_disk_at_the_end_leaves_a_whole_run_that_says_so(tmp_path, monkeypatch, capsys, disk):
    def draw(file, *more):
        full(100)
        file.write(bytes(200))

    monkeypatch.setattr(run, "draw_curves", draw)
    message = fails(train, tmp_path)
    assert "curves.png or results.json cannot be written (File too large)" in message
    full(resource.RLIM_INFINITY)
    assert weights(tmp_path / "run")["step"] == 4 and "latest.pt is whole" in message


def test_a_loss_that_is_not_finite_names_the_clip_to_blame_and_what_is_kept(tmp_path, monkeypatch):
    clip = np.random.default_rng((0, 0)).permutation(16)[12]   # of the second step

    def loader(clips, order, *more):
        for batch in numbers(clips, order, *more):
            mels = torch.zeros(2 * 8, 1, 4, 4)                 # of two of the three views of each clip
            mels[1::2][batch["index"] == clip] = math.nan
            present = torch.tensor([[True, True], [True, False], [False, True]]).expand(8, 3, 2)
            yield {**batch, "audio": mels, "present": present}

    def explode(self, *given):
        loss, shown = forward(self, *given)
        return math.inf * loss, shown

    forward = Little.forward
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_loader", loader)
        message = fails(train, tmp_path, "--save-every", 1)
    assert f"the mel of {tmp_path}/clips/{clip:02d}.wav is not finite at step 1" in message
    assert "latest.pt holds step 1 of 4" in message
    monkeypatch.setattr(Little, "forward", explode)
    message = fails(train, tmp_path, "--fresh")
    assert "the loss or its gradient is not finite at step 0, while the clips are" in message
    assert f"nothing of this run is in {tmp_path}/run/latest.pt yet" in message


def test_weights_that_are_not_finite_are_not_saved_over_those_that_are(tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def break_third(self):
        step(self)
        steps.append(1)
        if len(steps) == 3:
            self.param_groups[0]["params"][-1].data.fill_(math.inf)

    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", break_third)
    message = fails(train, tmp_path, "--save-every", 1)
    assert "the weights are not finite after step 3" in message and "holds step 2 of 4" in message
    assert weights(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_that_goes_on_with_other_processes_says_so_where_that_makes_it_another_run(
        tmp_path, capsys, dropout):
    train(tmp_path, interrupt=2, dropout=dropout)
    for world, said in ((1, False), (2, dropout > 0), (None, False)):
        content = weights(tmp_path / "run")
        content["world"] = world
        if world is None:                                      # of an older version
            del content["world"]
        torch.save(content, tmp_path / "run" / "latest.pt")
        train(tmp_path, dropout=dropout, interrupt=3)
        assert ("going on with 1 processes where there were 2" in capsys.readouterr().out) == said


def test_a_checkpoint_whose_optimiser_does_not_fit_is_refused(tmp_path):
    train(tmp_path, "--steps", 1)
    content = weights(tmp_path / "run")
    state = content["optimizer"]
    wrong = [{}, {"state": {}, "param_groups": 1}, {**state, "param_groups": []}]
    slope, moments = state["state"].popitem()
    for change in (dict(momentum_buffer=torch.zeros(2)), dict(exp_avg=torch.zeros(3)), dict(exp_avg=None),
                   dict(exp_avg_sq=torch.full((2,), math.nan)), dict(step=-torch.ones(())), dict(step="x")):
        wrong.append({**state, "state": {slope: {**moments, **change}}})
    for other in ({}, {slope: {}}, {99: moments}, {slope: moments, 99: moments}, {slope - 1: moments}):
        wrong.append({**state, "state": other})
    for other in wrong:
        torch.save({**content, "optimizer": other}, tmp_path / "run" / "latest.pt")
        fails(train, tmp_path, "--steps", 1, match="its optimiser state")


def test_weights_of_a_file_that_are_not_finite_are_refused_by_its_name(tmp_path):
    train(tmp_path, interrupt=2)
    content = weights(tmp_path / "run")
    content["model"]["slope"][0] = math.nan
    torch.save(content, tmp_path / "bad.pt")
    message = fails(train, tmp_path, "--resume", tmp_path / "bad.pt")
    assert f"{tmp_path}/bad.pt: 'slope' in the file" in message and "give another checkpoint" in message


def test_the_optimisers_settings_are_those_of_the_recipe_not_of_the_file(tmp_path):
    train(tmp_path, interrupt=2)
    content = weights(tmp_path / "run")
    content["optimizer"]["param_groups"][0]["lr"] = 7.0
    torch.save(content, tmp_path / "run" / "latest.pt")
    train(tmp_path)
    assert weights(tmp_path / "run")["optimizer"]["param_groups"][0]["lr"] == 0.05


@pytest.mark.parametrize("name", [".lock", *run.FILES, "step-000010.pt"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_lies_where_a_run_writes_a_file_and_is_none_is_named(tmp_path, name, make):
    folder = tmp_path / "run"
    (folder / ".latest.pt.x.part").mkdir(parents=True)         # nobody's
    make(folder / name)
    fails(train, tmp_path, match=f"{folder / name}: lies where a run writes a file")
    (os.rmdir if make is os.mkdir else os.unlink)(folder / name)
    train(tmp_path, "--steps", 1)


def test_a_model_that_is_too_large_is_a_sentence():
    little = types.SimpleNamespace(args=types.SimpleNamespace(seed=0), device="cpu")
    fails(run.Run.build, little, torch.empty, 10 ** 15, match="too large for this machine")


def test_a_run_of_another_recipe_is_refused_by_all_that_differs(tmp_path):
    train(tmp_path, "--steps", 2)
    message = fails(train, tmp_path, "--lr", 0.2, "--steps", 1)
    assert "has lr 0.05 (now 0.2), steps 2 (now 1); give another --out, or --fresh" in message
    message = fails(train, tmp_path, "--lr", 0.2, "--steps", 3)
    assert "has lr 0.05 (now 0.2); give another --out, or --fresh" in message
    fails(train, tmp_path, "--fresh", "--resume", "x.pt", match="exclude each other")
    fails(train, tmp_path, "--out", tmp_path / "clips" / "00.wav", "--fresh", match="cannot be made")


def test_a_run_goes_on_with_its_own_augmentation_alone_and_one_from_before_there_was_any_without(tmp_path):
    off = [word for name in data.CHANGES for word in (f"--{name}", 0)]
    train(tmp_path, "--steps", 2, *off, "--jitter", 0.4)
    assert "has jitter 0.4 (now 0.2);" in fails(train, tmp_path, "--steps", 3, *off, "--jitter", 0.2)
    assert "has jitter 0.4 (now 0.0);" in fails(train, tmp_path, "--steps", 3, *off)
    train(tmp_path, "--steps", 3, *off, "--jitter", 0.4)
    train(tmp_path, "--steps", 2, "--fresh", *off)
    content = weights(tmp_path / "run")
    content["recipe"] = {k: v for k, v in content["recipe"].items() if k not in data.CHANGES}
    torch.save(content, tmp_path / "run" / "latest.pt")
    assert "has jitter 0.0 (now 0.4);" in fails(train, tmp_path, "--steps", 3, *off, "--jitter", 0.4)
    train(tmp_path, "--steps", 3, *off)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("interrupt, words", [
    (2, ["--steps", 6]), (None, ["--steps", 6]), (None, ["--epochs", 3])])
def test_a_run_is_made_longer_by_more_steps_or_epochs_and_says_so_once(
        tmp_path, capsys, interrupt, words):
    """Two steps an epoch."""
    train(tmp_path, interrupt=interrupt)
    before = run.read_log(tmp_path / "run")
    start = interrupt or 4
    train(tmp_path, *words, interrupt=5)
    longer = "longer than the 4 before, from here by the schedules of 6"
    assert f"going on at step {start} of 6: {longer}\n" in capsys.readouterr().out
    train(tmp_path, *words)
    assert "going on at step 5 of 6\n" in capsys.readouterr().out
    rows = run.read_log(tmp_path / "run")
    assert rows[:start] == before and [row["step"] for row in rows] == list(range(6))
    assert weights(tmp_path / "run")["steps"] == weights(tmp_path / "run")["recipe"]["steps"] == 6
    assert "has steps 6 (now 4)" in fails(train, tmp_path)     # the recipe's: not what was asked for


def test_as_many_steps_are_the_same_run_however_given_but_a_set_that_has_grown_makes_another(
        tmp_path, capsys):
    paper = ["--recipe", "paper", "--batch-size", 8]           # two epochs
    train(tmp_path, *paper, interrupt=2)
    train(tmp_path, *paper, "--steps", 4, interrupt=3)
    train(tmp_path, *paper)
    assert "longer" not in capsys.readouterr().out and weights(tmp_path / "run")["step"] == 4
    for number in range(8):
        (tmp_path / "clips" / f"new{number}.wav").touch()
    assert "has steps 4 (now 6); give another --out" in fails(train, tmp_path, *paper)
    train(tmp_path, *paper, "--epochs", 2)
    assert weights(tmp_path / "run")["step"] == 6


def test_an_alarm_is_shown_when_it_begins_and_again_only_after_20_rows_without(tmp_path, monkeypatch, capsys):
    wrong = {"a rises": "a rises: 9, after 1"}
    when = (1, 2, 3, 5, 26)
    monkeypatch.setattr(run, "alarms", lambda rows, warmup: wrong if rows[-1]["step"] in when else {})
    for interrupt, step in ((3, 1), (None, 26)):               # not again when the run goes on
        train(tmp_path, "--steps", 28, interrupt=interrupt)
        out = capsys.readouterr().out
        assert out.count("WARNING") == 1 and f"WARNING at step {step}: a rises: 9, after 1" in out


def test_a_row_on_screen_has_a_loss_beside_that_of_knowing_nothing():
    row = {"step": 7, "loss": 0.5, "loss/a": 0.25, "know_nothing/a": 1.0, "std/a": 0.5, "bad_clips": 3}
    assert run.on_screen(row) == "step 7  loss 0.5  a 0.25/1  std/a 0.5"


# ---- Alarms --------------------------------------------------------------------------------------------

WITHIN = ("a", "v", "av")
ACROSS = ("a->v", "v->a", "av->a", "a->av")


def log_of(noise=0.03, seed=0, **change):
    """60 rows of a healthy run: losses fall to half of that of knowing nothing. change: {column: factor}."""
    rng = np.random.default_rng(seed)
    t = np.arange(60)
    columns = {}
    for term in WITHIN + ACROSS:
        columns[f"loss/{term}"] = 0.4 + 0.4 * np.exp(-t / 8)
        columns[f"know_nothing/{term}"] = np.full(60, 0.8)
    for name in WITHIN:
        columns[f"rank/{name}"] = 30 - 20 * np.exp(-t / 8)
        columns[f"std/{name}"] = np.full(60, 0.5)
    rows = [{"step": 10 * i} for i in range(60)]
    for name, column in columns.items():
        column = column * change.get(name, 1) * np.exp(noise * rng.standard_normal(60))
        for row, value in zip(rows, column):
            row[name] = value
    return rows


def late(value, last):
    """1, and `value` in the last rows."""
    return np.where(np.arange(60) < 60 - last, 1.0, value)


def test_a_healthy_log_raises_no_alarm_at_any_moment():
    for rows in (log_of(seed=1), log_of(seed=2), log_of(noise=0.05)):
        assert not any(run.alarms(rows[:n + 1]) for n in range(60))
    harder = np.linspace(1, 2, 60)                             # richer targets are harder: no alarm
    assert not run.alarms(log_of(**{"loss/a": harder, "know_nothing/a": harder}))


EMPTY = late(0.01, 8)                                          # the targets say nothing any more
HIGH_AT_FIRST = np.where(np.arange(60) < 10, 3, 1)


@pytest.mark.parametrize("term", WITHIN)
@pytest.mark.parametrize("kind, factor, alarm", [
    ("loss", late(2.0, 3), "rises"), ("loss", late(1.35, 6), "rises"), ("loss", late(1.05, 6), None),
    ("loss", np.where(np.arange(60) < 25, 1, np.linspace(0, 2.2, 60).clip(1)), "rises"),         # slowly
    ("rank", late(1 / 3, 10), "rank"), ("rank", np.linspace(1, 0.2, 60), "rank"),
    ("rank", HIGH_AT_FIRST * late(1 / 3, 10), "rank"), ("rank", HIGH_AT_FIRST, None),           # a warm-up
    ("rank", 0.5, None), ("std", late(0.01, 1), "collapse")])  # low from the start is no fall
def test_what_goes_wrong_within_an_input_is_named(term, kind, factor, alarm):
    found = run.alarms(log_of(**{f"{kind}/{term}": factor}), 100)              # a warm-up of 10 rows
    assert set(found) == ({f"{term} {alarm}"} if alarm else set())


@pytest.mark.parametrize("term", WITHIN)
def test_a_rise_is_named_when_it_happens(term):
    rows = log_of(**{f"loss/{term}": late(2.0, 10)})
    named = [n for n in range(1, 55) if run.alarms(rows[:n])]
    assert 50 < named[0] and named[-1] == 54


@pytest.mark.parametrize("term", WITHIN + ACROSS)
def test_a_term_at_its_floor_is_named(term):
    for kinds in [("loss", "know_nothing"), ("loss",)][:1 + (term in ACROSS)]:
        rows = log_of(**{f"{kind}/{term}": EMPTY for kind in kinds})
        assert set(run.alarms(rows)) == {f"{term} floor"}
    assert not run.alarms(log_of(**{f"loss/{term}": 0.7}))          # what is learnt well is not at its floor


def test_steps_without_any_sound_are_no_alarm_and_a_term_that_no_clip_could_train_is_named():
    def without(term, steps):
        rows = log_of()
        for step, column in itertools.product(steps, (f"loss/{term}", f"know_nothing/{term}")):
            rows[step][column] = 0.0                           # no clip has it
        return rows

    for steps in ([59], [57, 58, 59], range(40, 52, 2), range(30, 45, 2)):
        assert not run.alarms(without("a", steps)) and not run.alarms(without("a->v", steps))
    never = without("v", range(60))
    assert not any(run.alarms(never[:n]) for n in range(1, 5))
    assert "--terms" in run.alarms(never[:5])["v has none"]


def test_a_row_without_a_terms_loss_says_nothing_of_it():
    rows = log_of()
    for row in rows[10:20] + rows[-1:]:
        del row["loss/a"]
    assert not run.alarms(rows)


def test_nothing_is_named_in_the_first_rows():
    wild = [1.0, 0.3, 2.0, 0.5, 4.0]
    rows = [{"step": i, "loss/a": x, "know_nothing/a": 0.8, "rank/a": 5 * x} for i, x in enumerate(wild)]
    assert not any(run.alarms(rows[:n]) for n in range(1, 6))


# ---- Files ---------------------------------------------------------------------------------------------

def test_a_writer_that_is_killed_leaves_the_old_file_whole(tmp_path):
    def half(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    run.replace_file(tmp_path / "x", lambda file: file.write(b"old"))
    with pytest.raises(OSError):
        run.replace_file(tmp_path / "x", half)
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_of_two_writers_at_once_each_writes_a_whole_file(tmp_path):
    def first(file):
        file.write(b"fir")
        run.replace_file(tmp_path / "x", lambda other: other.write(b"second"))
        assert (tmp_path / "x").read_bytes() == b"second"
        file.write(b"st")

    run.replace_file(tmp_path / "x", first)
    assert (tmp_path / "x").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def hold(folder, ready):
    """Lock a folder, with a child that outlives this process, and leave something half written."""
    locked = run.lock_folder(folder)
    for name in ("latest.pt", "step-000010.pt"):
        (folder / f".{name}.0123.part").write_bytes(b"half")
    child = os.fork()
    if child:
        ready.send(child)
    time.sleep(60)
    locked.close()


@pytest.mark.skipif(not FORK, reason="forks")
def test_a_folder_takes_one_run_at_a_time_and_is_free_when_that_is_killed(tmp_path):
    mine, theirs = multiprocessing.Pipe()
    other = multiprocessing.Process(target=hold, args=(tmp_path, theirs))
    other.start()
    child = mine.recv()
    try:
        message = fails(train, tmp_path.parent, "--out", tmp_path)
        assert f"--out {tmp_path}: another run is writing there" in message
    finally:
        other.kill()
        other.join()
    run.lock_folder(tmp_path).close()                          # though its child lives
    os.kill(child, signal.SIGKILL)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


BROKEN = [b'{"step": 1, "lo', b"7", b"[]", b"null", b'{"loss": 1.0}', b'{"step": "1"}', b'{"step": 1.5}',
          b'{"step": 1, "loss": null}', b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": 1e31}',
          b'{"step": 1, "a\\nb": 1.0}', b'{"step": 1, "\\ud800": 1.0}',
          b'{"step": 1, "loss": "x"}', b"\xff\xfe", b"", b"[" * 100_000]


@pytest.mark.parametrize("line", BROKEN, ids=lambda line: repr(line[:20]))
def test_a_broken_line_of_the_log_loses_no_row_but_its_own_and_is_said(tmp_path, capsys, line):
    rows = [b'{"step": 0, "loss": 2.0}', b'{"step": 2, "loss": 1.0}']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([rows[0], line, rows[1]]) + b"\n")
    assert run.read_log(tmp_path) == [json.loads(row) for row in rows]
    assert "1 of its 3 lines are no rows of a log and left out" in capsys.readouterr().out


def test_rows_are_added_beside_a_checkpoint_and_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    assert run.read_log(tmp_path) == []
    for step, place in enumerate((tmp_path, tmp_path / "latest.pt")):
        run.add_row(place, "log.jsonl", {"step": step})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert run.read_log(tmp_path) == [{"step": 0}, {"step": 1}]
    run.add_row(tmp_path, "log.jsonl", {"step": 2})            # on a line of its own
    assert run.read_log(tmp_path) == [{"step": 0}, {"step": 1}, {"step": 2}]
    fails(run.add_row, tmp_path / "nowhere" / "latest.pt", "probe.jsonl", {}, match="could not be written")


def test_the_curves_show_each_column_over_the_steps_and_nothing_of_pyplots_changes(tmp_path, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(fig, *args, **more):
        figures.append(fig)
        save(fig, *args, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    before = dict(matplotlib.rcParams)
    row = {"std/a": 1.0, "know_nothing/a": 2.0, "bad_clips": 0}
    rows = [{"step": n, "loss/a": 1 / (n + 1), **row} for n in range(5)]
    rows[4]["probe"] = 0.5                                     # a column may begin late
    several = {"a $b$": rows, "other": rows[:2]}
    for runs in ({"": rows}, several, {"": []}, {"": [{"step": 0, "bad_clips": 0}]}):
        draw_curves(tmp_path / "curves.png", runs, "a $title")
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "curves.png").unlink()
    axes = {ax.get_title(): ax for ax in figures[0].axes if ax.get_title()}
    assert list(axes) == ["loss/a", "std/a", "probe"]          # zeros count troubles that never came
    loss, nothing = axes["loss/a"].get_lines()
    assert loss.get_xydata().tolist() == [[row["step"], row["loss/a"]] for row in rows]
    assert nothing.get_linestyle() == ":" and set(nothing.get_ydata()) == {2.0}
    assert axes["probe"].get_lines()[0].get_xydata().tolist() == [[4, 0.5]]
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == list(several)
    assert dict(matplotlib.rcParams) == before


# ---- Clips that do not come ------------------------------------------------------------------------------

class Ends(torch.utils.data.Dataset):
    """Numbers; a worker that comes to number 5 does something to itself."""
    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i == 5:
            self.act()
        return {"index": i}


def collate(items):
    return {"index": torch.tensor([item["index"] for item in items]), "large": torch.zeros(300_000)}


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))       # of shared memory, too


def signals(number):
    return functools.partial(signal.raise_signal, number)


NO_MEMORY = "--shm-size, such as 8g, or give --workers 0"
WORKERS = {
    "killed": (signals(signal.SIGKILL), "a data worker was killed, most often for want of memory"),
    "segfault": (signals(signal.SIGSEGV), "a data worker ended by SIGSEGV"),
    "bus error": (signals(signal.SIGBUS), NO_MEMORY),
    "ends": (functools.partial(os._exit, 3), "a data worker ended with exit code 3"),
    "hangs": (signals(signal.SIGSTOP), "no clips came from the 2 data workers for 1 s"),
    "no shared memory": (no_room, NO_MEMORY),
}


@pytest.mark.skipif(not FORK, reason="a worker acts on itself")
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_dies_or_hangs_or_has_no_memory_ends_in_a_sentence(name, monkeypatch, capsys):
    act, sentence = WORKERS[name]
    poll = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(poll, "__defaults__", (0.2,))          # seconds between two looks at the workers: 5
    monkeypatch.setattr(batches, "collate", collate)
    if name == "hangs":
        monkeypatch.setattr(batches, "WORD", 0.5)
        monkeypatch.setattr(batches, "PATIENCE", 1)
    handler = signal.getsignal(signal.SIGCHLD)
    keys = [[0, 1], [2, 3], [4, 5], [6, 7]]
    came = []
    loader = batches.Loader(Ends(act), 2, batch_sampler=keys, collate_fn=batches.share)
    before = set(multiprocessing.active_children())
    taken = iter(loader)
    workers = set(multiprocessing.active_children()) - before
    with pytest.raises(common.UserError, match=sentence) as error:
        for batch in taken:
            came.append(batch["index"].tolist())
    assert came == keys[:len(came)] and len(came) <= 2 and "\n" not in str(error.value)
    assert ("no clips for 0.5 s" in capsys.readouterr().out) == (name == "hangs")
    assert signal.getsignal(signal.SIGCHLD) == handler         # torch's would raise in the midst of a step
    for worker in workers:
        worker.join(10)
        assert worker.exitcode is not None


def test_workers_that_cannot_be_started_are_a_sentence(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")           # of a semaphore in /dev/shm

    monkeypatch.setattr(multiprocessing, "Event", full)
    assert "(No space left on device); lower --workers" in fails(iter, batches.Loader(Ends(None), 1))


def test_a_signal_while_the_workers_are_started_comes_when_they_are(handlers, monkeypatch):
    def begin(process):
        start(process)
        started.append(process)
        signal.raise_signal(signal.SIGINT)

    started = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", begin)
    with pytest.raises(KeyboardInterrupt):
        iter(batches.Loader(Ends(None), 2, batch_sampler=[[0]], collate_fn=batches.share))
    assert len(started) == 2


def test_the_limit_of_open_files_is_raised_if_allowed_or_a_sentence_comes_before_the_workers(monkeypatch):
    loader = batches.Loader(Ends(None), 2, batch_sampler=[[0]], collate_fn=batches.share)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, before[1]))
        batches.need_files(loader.loader)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 128 + 8 * 2 * 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (24, 24))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    fails(iter, loader, match="2 data workers need 160 open files, ulimit -n allows 24")


def refuse(what, limits):
    raise ValueError("not allowed to raise maximum limit")


def test_a_fault_of_ours_in_a_worker_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="in __getitem__"):
        list(batches.Loader(Ends(lambda: 1 / 0), 1, batch_sampler=[[5]], collate_fn=batches.share))


# ---- Processes and signals -----------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_is_true_once_it_came_and_lets_a_second_ctrl_c_through(handlers, number):
    before = signal.getsignal(number)
    stop = run.StopSignal()
    assert CPU.any(stop) is False
    os.kill(os.getpid(), number)
    assert CPU.any(stop) is True
    again = signal.getsignal(number) == before
    assert again == (number == signal.SIGINT)                  # SLURM and torchrun each send a SIGTERM
    stop.release()                                             # after the loop signals are handled as before
    assert signal.getsignal(number) == before
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_stop_signal_leaves_a_hangup_alone_that_is_ignored_as_under_nohup(handlers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = run.StopSignal()
    signal.raise_signal(signal.SIGHUP)
    stop.release()
    assert not stop and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    def zeros(*args, **more):
        raise AssertionError("Torch not compiled with CUDA enabled")   # what such a torch raises

    for name in ("potato", "meta", "hpu", "", "cuda:²", "cuda:99999999999", "cpu:-1", "fpga"):
        assert f"--device {name}: " in fails(run.start_process, name)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert "--device cuda" in fails(run.start_process, "cuda")


def test_a_process_of_torchrun_touches_no_gpu_but_its_own(monkeypatch):
    calls = []
    own = torch.device("cuda", 3)
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "zeros", lambda *args, device: calls.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda **more: calls.append(more))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **more: True)
    process = run.start_process("cuda")
    assert calls[:2] == [own, own] and (calls[2]["backend"], calls[2]["device_id"]) == ("nccl", own)
    assert process.device == own and process.bf16


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_where_the_device_computes_in_it_or_as_the_flag_says(has, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "computes_bf16", lambda device: has)
    for number, (flags, on) in enumerate({(): has, ("--bf16",): True, ("--no-bf16",): False}.items()):
        train(tmp_path / str(number), *flags, "--steps", 1)
        assert ("1 x cpu bf16 ->" in capsys.readouterr().out) == on


@pytest.mark.parametrize("bf16", [True, False])
def test_autocast_is_bf16_where_a_process_has_it(bf16):
    with Process(torch.device("cpu"), bf16=bf16).autocast():
        assert torch.is_autocast_enabled("cpu") == bf16 and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_the_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    gpu = Process(torch.device("cuda"))
    assert (run.default_workers(CPU), run.default_workers(gpu)) == (4, 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (run.default_workers(CPU), run.default_workers(gpu)) == (1, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    for cores, workers in {1: 1, 2: 2, 3: 2, 6: 3}.items():
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert run.default_workers(CPU) == workers


# ---- Flags ---------------------------------------------------------------------------------------------

def test_a_run_takes_the_column_of_its_recipe_with_the_flags_in_place_of_its_values():
    args, recipe = read()
    shared = dict(size="nano", seconds=1.0, batch_size=8, warmup=0.1, seed=0, **asdict(data.Augment()))
    assert recipe == {**shared, "lr": 0.05, "steps": 4, "epochs": None, "data": "toy"}
    assert args.out == "runs/little-toy-seed0"
    _, recipe = read("--data", "vggsound")                     # the paper's, but for the toy clips
    assert recipe == {**shared, "lr": 0.1, "steps": None, "epochs": 2, "data": "vggsound"}
    _, recipe = read("--recipe", "paper", "--steps", 7, "--size", "toy", "--lr", 0.2)
    assert recipe == {**shared, "lr": 0.2, "steps": 7, "epochs": None, "data": "toy", "size": "toy"}


@pytest.mark.parametrize("flag, value", [
    ("--lr", -1), ("--lr", "nan"), ("--batch-size", 1), ("--steps", -1), ("--steps", 0), ("--epochs", 0),
    ("--epochs", "nan"), ("--seconds", 0), ("--seconds", "nan"), ("--accumulate", 0), ("--log-every", 0),
    ("--save-every", 0), ("--keep-every", 0), ("--max-bad", 2), ("--max-bad", "nan"), ("--seed", -1),
    ("--workers", -1), ("--size", "colossal"), ("--out", ""), ("--data-dir", "")])
def test_a_flag_out_of_range_is_refused_by_name(flag, value):
    assert flag in fails(read, flag, value)
