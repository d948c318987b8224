"""finetune.py: what is trained, on which clips, in how many processes; what is kept, and asked afterwards."""
import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from dataclasses import asdict

import ajepa
import common
import data
import features
import finetune
import heads as kinds
import pixels
import probe
import retrieval
import run
import visualize
from conftest import CPU, FORK, INPUTS, METHOD, ROOT, command, fails, last_row, same, tone, weights, write
from conftest import write_checkpoint
from slow import random, record
from test_methods import end_of
from test_methods import start as start_command

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

TONES = {"high": 3000, "low": 400, "middle": 1100}      # Hz, of each class
BATCH = 8


# ---- models, clips and commands ------------------------------------------------------------------------

def views_of(modality="audio", **more):
    usual = dict(modality=modality, inputs=INPUTS, test_inputs=INPUTS, test=1, crops=1, train=1)
    return features.Views(**{**usual, **more})


def model_of(*heads, modality="audio", multilabel=False, layers=None, vit=None, mix=0, seed=3, **more):
    """A Tuned of three classes whose heads are not at their start."""
    parts = dict(size="nano", audio=dict(shape=(32, INPUTS.mel_frames), patch=(16, 16)))
    if modality != "audio" or vit:
        parts["video"] = dict(shape=(2, 16, 16), patch=(2, 8, 8))
    torch.manual_seed(seed)
    vit = common.ViT(**parts, **(vit or {}))
    encoder = Namespace(vit=vit, dim=vit.dim * len(layers or [0]))
    views = views_of(modality, test=more.pop("places", 1), together=True)
    tuning = finetune.Tuning(heads or ("linear",), list("abc"), multilabel, views, "logits", layers, mix)
    model = finetune.Tuned(encoder, tuning, **more)
    for head in model.heads.values():
        nn.init.normal_(getattr(head, "head", head).linear.weight, std=0.1)
    return model


def batch_of(rows=range(BATCH), modality="audio", multilabel=False, places=1):
    """Some rows of a batch of noise, each with a loudness and a colour of its own."""
    count = BATCH * places
    own = 1 + torch.arange(BATCH).repeat_interleave(places) / 4
    batch = {"audio": own.view(-1, 1, 1, 1) * random(count, 1, 32, INPUTS.mel_frames),
             "video": own.view(-1, 1, 1, 1, 1) * random(count, 3, 2, 16, 16, seed=1)}
    rows = torch.as_tensor(list(rows))
    places_of = (rows[:, None] * places + torch.arange(places)).flatten()
    targets = torch.arange(BATCH) % 3
    if multilabel:
        targets = (random(BATCH, 3, seed=2) > 0).to(torch.uint8)
    return {"index": rows, "targets": targets[rows], "has_audio": rows >= 0, "has_video": rows >= 0,
            **{key: batch[key][places_of] for key in features.MODALITIES[modality]}}


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Sounds of 1 s, 8 of each of three classes to train and, in all, 11 to test."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    places = [("train", n) for n in range(8)] + [("test", n) for n in range(4)]
    for name, (split, n) in itertools.product(TONES, places):
        if (split, name, n) == ("test", "middle", 3):
            continue
        wave = tone(TONES[name], 1, amplitude=rng.uniform(0.1, 0.4)) + 0.01 * rng.standard_normal(16000)
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        write(folder / split / name / f"{n}.wav", wave=wave, audio="pcm_s16le")
    return folder


def noisy(folder, **parts):
    """A checkpoint whose encoder has dropout in training."""
    content = common.load_checkpoint(write_checkpoint(folder, **parts))
    content["encoder"]["dropout"] = 0.1
    torch.save(content, folder / "latest.pt")
    return folder


@pytest.fixture(scope="module")
def ears(tmp_path_factory):
    return noisy(tmp_path_factory.mktemp("ears"), video=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("both"))


draw_curves = run.draw_curves


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No curves; a set of these tests whose clips have several labels, the first none."""
    def list_many(folder, split):
        plain = data.SETS["folder"].list(folder, split)
        labels = [[]]
        for i in range(1, len(plain)):
            first = int(plain.clip_labels(i)[0])
            labels.append([first] if i % 3 else [first, (first + 1) % 3])
        files = [bytes(file).decode() for file in plain.files]
        return data.make_listing("many", folder, files, labels, plain.classes, True)

    monkeypatch.setitem(data.SETS, "many", data.DataSet(list_many, has=("audio",), all_splits=True))
    monkeypatch.setattr(run, "draw_curves", lambda file, *_: file.write(b"drawn"))


def words_of(ckpt, folder, out, *more):
    words = ("--ckpt", ckpt, "--data", "folder", "--data-dir", folder, "--probe", "finetune", "--out", out,
             "--views", 1, "--batch-size", BATCH, "--log-every", 1, "--workers", 0, "--device", "cpu",
             "--no-bf16", *more)
    return list(map(str, words))


def tune(*given):
    probe.main(words_of(*given))


def without_times(out):
    """The log's rows without what differs from run to run."""
    rows = run.read_log(out)
    return [{key: row[key] for key in row.keys() - {"ms_data", "ms_step"}} for row in rows]


def stop_at(patch, step, seed=0):
    """A SIGTERM once this step of the fine-tuning of a seed is logged."""
    log = run.Run.log

    def log_and_stop(self, number, **values):
        log(self, number, **values)
        if number == step and self.args.seed == seed:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(run.Run, "log", log_and_stop)


# ---- two processes -------------------------------------------------------------------------------------

CASES = {                                               # of model_of
    "linear": dict(heads=["linear"]),
    "standardised": dict(heads=["standardised"]),
    "attentive": dict(heads=["attentive"]),
    "several labels": dict(heads=["standardised", "attentive"], multilabel=True,
                           weight=torch.tensor([1.0, 2.0, 3.0])),
    "mixup": dict(heads=["standardised", "attentive"], mixup=0.3, smoothing=0.1),
    "mixup of both streams": dict(heads=["linear"], modality="av", mixup=0.3),
    # DDP would wait for the gradient of what these leave out
    "sound, pictures at zero": dict(heads=["linear"], vit=dict(absent="zero")),
    "sound, no pictures": dict(heads=["attentive"], vit=dict(absent="drop", cls=True)),
    "pictures, an earlier block": dict(heads=["linear"], modality="video", layers=[1], vit=dict(cls=True)),
    "both, a mix of blocks": dict(heads=["attentive"], modality="av", layers=[0, 2], mix=2)}


def steps_of(case, accumulate, rank=0, world=1):
    """Two steps on this rank's rows of a batch: (losses, gradients and weights by name). Plain SGD: AdamW
    would make whole steps of a gradient that is zero but for rounding, as of a bias before BatchNorm."""
    case = dict(case)
    more = {key: case[key] for key in ("modality", "multilabel") if key in case}
    model = model_of(*case.pop("heads"), **case)
    finetune.freeze_unused(model, model.tuning.views)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    wrapped = run.Process(torch.device("cpu"), rank, world).wrap(model)
    mine = torch.arange(BATCH)[rank::world]
    losses = []
    for step in range(2):
        loss_of_step = 0.0
        for micro, rows in enumerate(mine.chunk(accumulate)):
            last = micro == accumulate - 1 or world == 1
            with contextlib.nullcontext() if last else wrapped.no_sync():
                batch = batch_of(rows.tolist(), **more)
                loss, _ = wrapped(batch, None, 1 / accumulate, step * accumulate + micro)
                loss.backward()
            loss_of_step += loss.item()
        losses.append(loss_of_step)
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, {name: x.clone() for name, x in model.state_dict().items()}


def standardise(rows):
    """Output, gradient of the input and running statistics after two batches, on some rows of each."""
    norm = kinds.Standardise(6)
    found = []
    for seed in (0, 1):
        # the means of the features from 0 to 50 times their std
        x = (3 * random(12, 6, seed=seed) + 30 * torch.arange(6.0))[rows].requires_grad_()
        y = norm(x)
        (y * random(12, 6, seed=5)[rows]).sum().backward()
        found += [y.detach(), x.grad]
    return found, norm.state_dict(), norm.eval()(x).detach()


def share_out(folder, process):
    """Scores of the sounds of a folder, shared out; the sentence where there is none."""
    listing = data.list_clips("folder", folder)
    encoder = common.load_encoder(folder / "ckpt")
    source = features.Decoded(encoder, listing, views_of(), process, 0, True)
    head = model_of("linear").heads["linear"]
    protocol = Namespace(average="logits")
    try:
        return probe.score_shared([head], source, np.arange(len(listing)), ["audio"], protocol, "test")
    except common.UserError as e:
        return str(e)


TESTED = {"undivided": (5, ()), "one alone": (1, ()), "broken": (5, (1, 3)), "nothing": (4, range(4))}


def on_a_rank(rank, folder):
    """What one of two processes finds goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    process = run.Process(torch.device("cpu"), rank, 2)
    found = {"standardise": standardise(torch.arange(rank, 12, 2))}
    for name, case in CASES.items():
        for accumulate in (1, 2):
            found[name, accumulate] = steps_of(case, accumulate, rank, 2)
    for name in TESTED:
        found[name] = share_out(folder / name, process)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tones):
    """(folder, what each of two processes found)"""
    folder = tmp_path_factory.mktemp("ranks")
    for name, (count, broken) in TESTED.items():
        write_checkpoint(folder / name / "ckpt", video=False)
        for n in range(count):
            shutil.copy(tones / "train" / "low" / f"{n}.wav", folder / name / f"{n}.wav")
            if n in broken:
                (folder / name / f"{n}.wav").write_bytes(b"garbage" * 50)
    how = "fork" if FORK else "spawn"
    torch.multiprocessing.start_processes(on_a_rank, (folder,), nprocs=2, start_method=how)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_on_the_joined_batch_in_loss_gradient_and_weights(name, accumulate, ranks):
    _, found = ranks
    (first, gradients, state), (second, *others) = [of_rank[name, accumulate] for of_rank in found]
    assert same([gradients, state], others)             # both processes have the same
    losses, expected, after = steps_of(CASES[name], accumulate)
    assert np.mean([first, second], 0) == pytest.approx(losses, rel=1e-4)
    assert gradients.keys() == expected.keys() and losses[1] != losses[0]
    for key, x in expected.items():
        assert (gradients[key] - x).norm() <= 1e-3 * x.norm() + 1e-6, key
    for key, x in after.items():
        torch.testing.assert_close(state[key], x, atol=1e-5, rtol=1e-4)


def test_standardise_in_two_processes_is_the_library_s_batch_norm_on_the_joined_batch(ranks):
    library = nn.BatchNorm1d(6, affine=False)
    for seed in (0, 1):
        x = (3 * random(12, 6, seed=seed) + 30 * torch.arange(6.0)).requires_grad_()
        y = library(x)
        (y * random(12, 6, seed=5)).sum().backward()
        for rank, of_rank in enumerate(ranks[1]):
            outputs, _, _ = of_rank["standardise"]
            torch.testing.assert_close(outputs[2 * seed], y[rank::2].detach(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(outputs[2 * seed + 1], x.grad[rank::2], atol=1e-5, rtol=1e-3)
    for rank, of_rank in enumerate(ranks[1]):
        _, state, tested = of_rank["standardise"]
        torch.testing.assert_close(state, library.state_dict())
        torch.testing.assert_close(tested, library.eval()(x)[rank::2].detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TESTED)
def test_each_test_clip_is_scored_once_by_one_of_the_processes_and_all_have_all_scores(name, ranks):
    """Also where they do not divide, and where one process's are all broken, or one has none."""
    folder, found = ranks
    count, broken = TESTED[name]
    one, other = (of_rank[name] for of_rank in found)
    if len(broken) == count:
        assert "no readable clip" in one and "no readable clip" in other
        return
    positions, scores = one["audio"]
    assert same(one, other) and positions.tolist() == [n for n in range(count) if n not in broken]
    expected, of_one = share_out(folder / name, CPU)["audio"]
    assert torch.equal(positions, expected)
    torch.testing.assert_close(scores, of_one)


RESULT = ("N", "left_out", "value", "metric", "lr")


def test_a_command_in_two_processes_writes_the_log_the_weights_and_the_row_of_one(tones, tmp_path):
    ckpt = write_checkpoint(tmp_path / "ckpt", video=False)
    found = []
    for world in (1, 2):
        out = tmp_path / str(world)
        words = words_of(ckpt, tones, out, "--steps", 3, "--mixup", 0.3, "--weighted", "--lr", 1e-2)
        done = command([sys.executable, str(ROOT / "probe.py"), *words], tmp_path, ranks=world)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert done.stdout.count("trained 3 steps") == done.stdout.count("N = 11") == 1     # rank 0 alone
        assert (out / "seed0" / "curves.png").is_file()
        found.append((without_times(out / "seed0"), weights(out / "seed0"), last_row(ckpt)))
    (log, one, row), (log_of_two, two, row_of_two) = found
    assert len(log) == len(log_of_two) == 3
    for of_one, of_two in zip(log, log_of_two):
        assert of_two == pytest.approx(of_one, rel=1e-3, abs=1e-6)
    for key, x in one["model"].items():
        torch.testing.assert_close(two["model"][key], x, atol=1e-3, rtol=1e-3)
    assert [row[key] for key in RESULT] == [row_of_two[key] for key in RESULT] and row["N"] == 11
    assert len((ckpt / "probe.jsonl").read_text().splitlines()) == 2


# ---- a run that stops ----------------------------------------------------------------------------------

DRAWN = ("--weighted", "--mixup", 0.3, "--specaugment", 4, 8, "--regularised-masking", 0.1)


@pytest.fixture(scope="module")
def whole(ears, tones, tmp_path_factory):
    """(folder of a fine-tuning of four steps with all that is drawn at random, its row)"""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", lambda file, *_: file.write(b"drawn"))
        tune(ears, tones, out, "--steps", 4, *DRAWN)
    return out / "seed0", last_row(ears)


def assert_same_run(out, other):
    one, two = weights(out), weights(other)
    for key in one.keys() - {"args", "version"}:
        assert same(one[key], two[key]), key
    assert without_times(out) == without_times(other)


@pytest.mark.parametrize("step", [0, 2])
def test_a_stopped_run_goes_on_by_the_same_command_to_the_same_bits(
        step, whole, ears, tones, tmp_path, monkeypatch, capsys):
    """With dropout, masking, mixup, SpecAugment and weighted draws."""
    flags = (ears, tones, tmp_path, "--steps", 4, *DRAWN)
    before = (ears / "probe.jsonl").read_text()
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        tune(*flags)
    assert weights(tmp_path / "seed0")["step"] == step + 1
    assert (ears / "probe.jsonl").read_text() == before and "same command goes on" in capsys.readouterr().out
    tune(*flags)
    assert_same_run(whole[0], tmp_path / "seed0")
    assert [last_row(ears)[key] for key in RESULT] == [whole[1][key] for key in RESULT]


@pytest.mark.skipif(not FORK, reason="kills what is forked")
def test_a_killed_run_leaves_whole_files_and_goes_on_to_the_same_bits_also_where_its_log_is_torn(
        whole, ears, tones, tmp_path):
    words = words_of(ears, tones, tmp_path / "out", "--steps", 4, *DRAWN, "--save-every", 1)
    out = tmp_path / "out" / "seed0"
    pid, _ = start_command([str(ROOT / "probe.py"), *words], tmp_path)
    until = time.time() + 30
    while not (out / "latest.pt").is_file() and time.time() < until:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    end_of(pid)
    assert 1 <= weights(out)["step"] <= 4
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 0.')
    tune(ears, tones, tmp_path / "out", "--steps", 4, *DRAWN)
    assert_same_run(whole[0], out)
    assert not list(out.glob(".*.part"))


def test_a_finished_run_is_only_tested_again(whole, ears, tones, monkeypatch):
    folder, row = whole
    before = (folder / "latest.pt").read_bytes()
    monkeypatch.setattr(run.Run, "micro_batches", lambda *_: pytest.fail("it was trained again"))
    tune(ears, tones, folder.parent, "--steps", 4, *DRAWN)
    assert [last_row(ears)[key] for key in RESULT] == [row[key] for key in RESULT]
    tune(ears, tones, folder.parent, "--steps", 4, *DRAWN, "--views", 2)    # other test views train nothing
    assert last_row(ears)["views"] == 2 and (folder / "latest.pt").read_bytes() == before


@pytest.mark.parametrize("more, sentence", [
    ("--mixup 0.5", r"mixup 0.3 \(now 0.5\)"),
    ("--specaugment 4 9", r"specaugment \(4, 8\) \(now \(4, 9\)\)"),
    ("--regularised-masking 0.2", r"regularised_masking 0.1 \(now 0.2\)"), ("--lr 1e-4", "heads .*0.0001"),
    ("--encoder-lr 1e-4", "encoder_lr 1e-05"), ("--head attentive", "heads .*attentive"),
    ("--batch-size 4", "batch_size 8"), ("--steps 3", r"steps 4 \(now 3\)"), ("--absent zero", "absent drop"),
    ("--layers 1", r"layers None \(now \[1\]\)"), ("--baseline untrained", "encoder "),
    ("--seconds 1", r"seconds 2.0 \(now 1"), ("--clips 12", r"clips 24 \(\w+\) \(now 12")])
def test_a_run_with_other_flags_is_refused_and_nothing_is_written_over(more, sentence, whole, ears, tones):
    folder, _ = whole
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    flags = ("--steps", 4, *DRAWN, *more.split())
    said = fails(tune, ears, tones, folder.parent, *flags, match=f"the run there has .*{sentence}")
    assert said.endswith("give another --out, or --fresh to start over")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_same_clips_with_other_labels_or_classes_are_another_set(ears, tones, tmp_path):
    """Else a run of other labels would be tested as if it had learned these, and training clips could be."""
    folder = shutil.copytree(tones, tmp_path / "set")
    flags = (ears, folder, tmp_path / "out", "--steps", 2, "--batch-size", 8)
    tune(*flags)
    before = (tmp_path / "out" / "seed0" / "latest.pt").read_bytes()
    for split in ("train", "test"):                     # the same files, two classes exchanged
        (folder / split / "high").rename(folder / split / "x")
        (folder / split / "low").rename(folder / split / "high")
        (folder / split / "x").rename(folder / split / "low")
    (folder / "train" / "low" / "0.wav").rename(folder / "train" / "low" / "10.wav")
    fails(tune, *flags, match=r"the run there has clips 24 \(\w+\) \(now 24 \(\w+\)\)")
    assert (tmp_path / "out" / "seed0" / "latest.pt").read_bytes() == before
    listing = data.list_clips("folder", tones)
    other = data.make_listing("x", "", listing.files, [[i % 3] for i in range(24)], listing.classes)
    names = {finetune.name_clips(one) for one in (listing, other, data.list_clips("folder", folder))}
    assert len(names) == 3


def test_a_batch_that_nobody_asked_for_is_one_that_the_processes_can_share():
    protocol = Namespace(batch_size=64, batch_share=1.0, steps=None, epochs=2, least_steps=0)
    assert probe.schedule(protocol, 27) == (27, 2) and probe.schedule(protocol, 27, 2) == (26, 2)
    assert probe.schedule(protocol, 1000, 24) == (48, 40) and probe.schedule(protocol, 5, 8) == (8, 1)


def test_what_is_stopped_in_its_second_seed_does_not_train_the_first_one_again(
        ears, tones, tmp_path, monkeypatch):
    trained = []
    note = run.Run.note

    def spy(self, *given):
        trained.append((self.args.seed, self.step))
        note(self, *given)

    monkeypatch.setattr(run.Run, "note", spy)
    flags = (ears, tones, tmp_path / "out", "--steps", 3, "--seeds", 0, 4)
    with monkeypatch.context() as patch:
        stop_at(patch, 1, seed=4)
        tune(*flags)
    first = trained[:]
    tune(*flags)
    assert first == [(0, 0), (0, 1), (0, 2), (4, 0), (4, 1)] and trained == [*first, (4, 2)]
    row = last_row(ears)
    tune(ears, tones, tmp_path / "other", "--steps", 3, "--seeds", 0, 4)
    assert row["values"] == last_row(ears)["values"] and len(row["values"]) == 2 and row["seeds"] == [0, 4]
    for seed in (0, 4):
        assert_same_run(tmp_path / "out" / f"seed{seed}", tmp_path / "other" / f"seed{seed}")


# ---- the log -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, metric", [("folder", "top-1"), ("many", "mAP")])
def test_a_row_of_the_log_has_losses_and_measure_of_each_head_over_all_micro_batches(
        name, metric, tones, tmp_path, monkeypatch):
    ckpt = write_checkpoint(tmp_path, video=False)
    content = common.load_checkpoint(ckpt)
    content["method"]["protocol"] = {
        **METHOD["protocol"], "warmup": (0, 0.5, ""), "smoothing": (0, 0, "")}
    torch.save(content, tmp_path / "latest.pt")
    with monkeypatch.context() as patch:
        noted = record(patch, run.Run, "note")
        tune(ckpt, tones, tmp_path / "out", "--data", name, "--steps", 4, "--accumulate", 2, "--lr", 1e-2,
             "--head", "attentive")
    rows = run.read_log(tmp_path / "out" / "seed0")
    assert (tmp_path / "out" / "seed0" / "curves.png").read_bytes() == b"drawn" and len(rows) == 4
    for step, row in enumerate(rows):
        loss = 0.0
        scores = []
        targets = []
        for (_, _, shown), _ in noted[2 * step:2 * step + 2]:
            scores.append(shown["scores/attentive"].double())
            targets.append(shown["targets"])
            if metric == "top-1":
                chosen = scores[-1].log_softmax(1)[range(4), targets[-1]]
            else:
                p = scores[-1].sigmoid()
                chosen = torch.where(targets[-1] > 0, p, 1 - p).log()
            loss -= chosen.mean().item() / 2
        scores = torch.cat(scores)
        targets = torch.cat(targets)
        value = (scores.argmax(1) == targets).double().mean().item() if metric == "top-1" else None
        if metric == "mAP":
            there = targets.numpy().any(0)
            value = average_precision_score(targets.numpy()[:, there], scores.numpy()[:, there])
        assert row[f"{metric}/attentive"] == pytest.approx(100 * value)
        assert row["loss"] == pytest.approx(row["loss/attentive"]) == pytest.approx(loss, rel=1e-5)
        assert row["lr"] == pytest.approx(kinds.learning_rate(step, 4, 1e-2, 0.5))
        assert row["encoder_lr"] == pytest.approx(kinds.learning_rate(step, 4, 1e-5, 0.5))
        assert row["ms_step"] > 0 and row["grad_norm"] > 0


def test_the_end_of_a_fine_tuning_and_visualize_draw_its_curves(
        whole, ears, tones, plain_layout, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw_curves", draw_curves)
    folder, _ = whole
    (folder / "curves.png").unlink()
    tune(ears, tones, folder.parent, "--steps", 4, *DRAWN)
    visualize.main(["curves", str(folder), "--out", str(tmp_path)])
    picture, = tmp_path.glob("*.png")
    for file in (picture, folder / "curves.png"):
        assert file.read_bytes()[:4] == b"\x89PNG"


def test_heads_side_by_side_have_columns_of_their_own_whose_losses_sum_up():
    model = model_of("linear", "attentive")
    loss, shown = model(batch_of(), None, 0.5, 0)
    assert loss.item() == pytest.approx(sum(shown[f"loss/{name}"].item() for name in model.heads))
    given = model.read(batch_of())
    for name, head in model.heads.items():
        scores = head(*model.encode(given))
        torch.testing.assert_close(shown[f"scores/{name}"], scores.detach())
        expected = F.cross_entropy(scores, batch_of()["targets"]).item() / 2
        of_head = shown[f"loss/{name}"]
        assert of_head.item() == pytest.approx(expected) and not of_head.requires_grad


def test_a_training_clip_without_the_stream_that_is_asked_for_is_replaced_and_counted(
        both, toy, clips, tmp_path):
    for split in ("train", "test"):
        for name, n in (("a", 0), ("a", 1), ("b", 2), ("b", 3)):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            source = clips / "silent.mp4" if n % 2 else toy / "test" / f"{n:05d}.mp4"
            shutil.copy(source, tmp_path / split / name / f"{n}.mp4")
    tune(both, tmp_path, tmp_path / "out", "--batch-size", 4, "--epochs", 2, "--modality", "audio")
    row = last_row(both)
    log, = run.read_log(tmp_path / "out" / "seed0")[-1:]
    assert (row["N"], row["left_out"], row["tested"]) == (2, 2, "audio")
    assert log["step"] == 1 and log["empty"] >= 4 and log["no_audio"] == log["bad_clips"] == 0


# ---- which clips are drawn -----------------------------------------------------------------------------

def uneven(multilabel=False):
    """40 clips of a, 10 of b, 4 of c; with several labels the last two are of all and of none."""
    labels = [[0]] * 40 + [[1]] * 10 + [[2]] * 4
    if multilabel:
        labels += [[0, 1, 2], []]
    return data.make_listing("x", "", [f"{i}.wav" for i in range(len(labels))], labels, "abc", multilabel)


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_clip_weighs_the_sum_over_its_classes_of_one_by_their_clips(multilabel):
    listing = uneven(multilabel)
    expected = []
    for i in range(len(listing)):
        own = listing.clip_labels(i)
        expected.append(sum(1 / sum(c in listing.clip_labels(j) for j in range(len(listing))) for c in own))
    assert finetune.clip_weights(listing) == pytest.approx(np.array(expected) / sum(expected))


def test_clips_are_drawn_as_often_as_they_weigh():
    """Pearson's statistic over 30,000 draws, under its mean by four standard deviations of it."""
    weights = finetune.clip_weights(uneven(True))
    keys = np.array(list(data.Batches(len(weights), 50, 3, 0, 600, weights=weights)))
    counts = np.bincount(keys[..., 1].ravel(), minlength=len(weights))
    expected = weights * counts.sum()
    assert counts[-1] == 0 and weights[-1] == 0 and counts.sum() == 30_000
    pearson = ((counts - expected)[:-1] ** 2 / expected[:-1]).sum()
    free = len(weights) - 2
    assert abs(pearson - free) < 4 * (2 * free) ** 0.5


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (2, 3)])
def test_weighted_draws_of_all_ranks_are_those_of_one_process_also_from_the_middle_and_none_comes_twice(
        world, accumulate):
    weights = finetune.clip_weights(uneven())

    def draw(start, rank=0, world=1, accumulate=1, seed=7):
        return list(data.Batches(54, 24, seed, start, 6, rank, world, accumulate, weights))

    whole = draw(0)
    parts = [draw(0, rank, world, accumulate) for rank in range(world)]
    for rank in range(world):
        for start in range(7):
            assert draw(start, rank, world, accumulate) == parts[rank][start * accumulate:]
    keys = np.array(parts).reshape(world, 6, -1, 2)                     # (rank, step, clip, key)
    for step in range(6):
        assert sorted(map(tuple, keys[:, step].reshape(-1, 2).tolist())) == sorted(whole[step])
    numbers = [number for batch in whole for number, _ in batch]
    assert len(set(numbers)) == 6 * 24                  # a view's random numbers come from (seed, this, clip)
    assert draw(0, seed=8) != whole and len({tuple(i for _, i in batch) for batch in whole}) == 6


# ---- mixup and SpecAugment -----------------------------------------------------------------------------

@pytest.mark.parametrize("multilabel", [False, True])
def test_the_loss_of_mixup_is_that_of_mixed_clips_with_mixed_targets(multilabel, monkeypatch):
    weight = torch.tensor([1.0, 2.0, 3.0]) if multilabel else None
    model = model_of("linear", modality="av", multilabel=multilabel, mixup=0.4, smoothing=0.1, weight=weight,
                     places=2, seed=1)
    batch = batch_of(modality="av", multilabel=multilabel, places=2)
    with monkeypatch.context() as patch:
        mixed = record(patch, finetune, "mix_pairs")
        loss, shown = model(batch, None, 1.0, 5)
    share, = {share for (_, share), _ in mixed}         # the same for sound and pictures
    assert 0.5 <= share < 1 and len(mixed) == 2
    given = {}
    for key in ("audio", "video"):
        given[key] = torch.zeros_like(batch[key])
        for i in range(BATCH):
            for place in (0, 1):
                own, other = batch[key][2 * i + place], batch[key][2 * ((i + BATCH // 2) % BATCH) + place]
                given[key][2 * i + place] = share * own + (1 - share) * other
    scores = model.heads["linear"](*model.encode(given))
    torch.testing.assert_close(shown["scores/linear"], scores.detach(), atol=1e-5, rtol=1e-4)
    total = 0.0
    for i in range(BATCH):
        y, other = batch["targets"][i], batch["targets"][(i + BATCH // 2) % BATCH]
        for c in range(3):
            if multilabel:
                soft = share * y[c].item() + (1 - share) * other[c].item()
                p = scores[i, c].sigmoid()
                total -= (weight[c] * soft * p.log() + (1 - soft) * (1 - p).log()) / 3
            else:
                soft = 0.9 * (share * (y == c).item() + (1 - share) * (other == c).item()) + 0.1 / 3
                total -= soft * scores[i].log_softmax(0)[c]
    torch.testing.assert_close(loss, total / BATCH, atol=1e-5, rtol=1e-4)
    assert torch.equal(shown["targets"], batch["targets"])      # the log measures what counts for more


def test_the_share_is_that_of_its_seed_and_step_alone_and_folds_the_beta_distribution(monkeypatch):
    shares = []
    model = model_of("linear", mixup=0.3)
    monkeypatch.setattr(finetune, "mix_pairs", lambda x, share: shares.append(share) or x)
    monkeypatch.setattr(model, "encode", lambda given: (None, torch.zeros(BATCH, 64)))
    for number in range(1000):
        np.random.seed(number)
        model(batch_of(), None, 1.0, number % 500)
    assert shares[:500] == shares[500:] and len(set(shares)) == 500
    x = np.linspace(0, 1, 200_002)[1:-1]                # the mean of max(x, 1 - x) by its density
    density = (x * (1 - x)) ** -0.7
    expected = (density * np.maximum(x, 1 - x)).sum() / density.sum()
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / 500 ** 0.5 + 1e-3)


def test_without_mixup_and_specaugment_the_loss_is_the_plain_one_bit_for_bit_and_nothing_is_drawn():
    model = model_of("standardised", modality="av", smoothing=0.1)
    plain = copy.deepcopy(model)
    before = torch.get_rng_state()
    loss, _ = model(batch_of(modality="av"), None, 1.0, 5)
    assert torch.equal(torch.get_rng_state(), before)
    scores = plain.heads["standardised"](*plain.encode(plain.read(batch_of(modality="av"))))
    assert torch.equal(loss, kinds.loss_of(scores, batch_of()["targets"], 0.1))


def band(hidden):
    """How many of a row of bools are True, which must lie side by side."""
    count = int(hidden.sum())
    assert count == 0 or hidden.nonzero()[-1] - hidden.nonzero()[0] == count - 1
    return count


@pytest.mark.parametrize("bins, frames", [(6, 20), (6, 0), (0, 20)])
def test_specaugment_hides_one_band_of_bins_and_one_of_frames_of_each_view_for_each_clip_another(
        bins, frames, monkeypatch):
    model = model_of("linear", modality="av", specaugment=(bins, frames), places=2)
    batch = batch_of(modality="av", places=2)
    seen = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda given: seen.append(given) or encode(given))
    for tick in range(20):
        model(batch, None, 1.0, tick)
    drawn = []
    for given in seen:
        assert torch.equal(given["video"], batch["video"])
        for x, own in zip(given["audio"], batch["audio"]):
            hidden = x[0] != own[0]                     # (F, T)
            assert (x[0][hidden] == 0).all()
            rows, columns = hidden.all(1), hidden.all(0)
            assert torch.equal(hidden, rows[:, None] | columns[None])
            drawn.append((band(rows), band(columns)))
    assert len(drawn) == 20 * BATCH * 2
    for counts, most in zip(zip(*drawn), (bins, frames)):
        assert max(counts) <= most and (np.mean(counts) > most / 4 or most == 0)
    assert len(set(drawn[:2 * BATCH])) > 2              # of one batch


def test_regularised_masking_and_specaugment_are_for_training_only_and_have_a_finite_gradient():
    plain, other = model_of("linear"), model_of("linear", share=0.5, specaugment=(8, 40))
    given = plain.read(batch_of())
    assert same(plain.eval().encode(given), other.eval().encode(given))
    assert not torch.allclose(plain.train().encode(given)[1], other.train().encode(given)[1])
    other(batch_of(), None, 1.0, 0)[0].backward()
    assert all(p.grad.isfinite().all() for p in other.parameters() if p.grad is not None)


# ---- what is trained -----------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("layers", [None, [1], [0, 3]])
@pytest.mark.parametrize("absent", ["zero", "drop"])
@pytest.mark.parametrize("modality", ["audio", "video", "av"])
def test_exactly_what_the_loss_does_not_reach_is_frozen(modality, absent, layers, cls):
    vit = dict(absent=absent, cls=cls)
    model = model_of("linear", "attentive", modality=modality, layers=layers, vit=vit)
    loss, _ = model(batch_of(modality=modality), None, 1.0, 0)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    reached = {name for name, gradient in zip(parameters, gradients) if gradient is not None}
    finetune.freeze_unused(model, model.tuning.views)
    assert {name for name, p in parameters.items() if p.requires_grad} == reached
    assert all(p.grad is None for p in parameters.values()) and model.training
    if modality == "av" and layers is None:
        assert len(reached) == len(parameters)


class Count:
    """How many numbers are kept for the backward pass."""
    numbers = 0

    def pack(self, x):
        self.numbers += x.numel()
        return x


def test_checkpointed_activations_are_fewer_and_the_gradient_is_the_same(ears, tones, tmp_path):
    found = []
    for checkpoint in (False, True):
        model = model_of("attentive", share=0.2, vit=dict(dropout=0.1))
        for block in model.encoder.blocks:
            block.checkpoint = checkpoint
        torch.manual_seed(0)
        kept = Count()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            loss, _ = model(batch_of(), None, 1.0, 0)
        loss.backward()
        found.append((kept.numbers, [p.grad for p in model.parameters()]))
    (more, gradients), (fewer, again) = found
    assert fewer < 0.6 * more
    for one, two in zip(gradients, again):
        assert (one is None and two is None) or torch.allclose(one, two, atol=1e-6)
    for name, flags in (("plain", ()), ("checkpointed", ("--checkpoint-activations",))):
        tune(ears, tones, tmp_path / name, "--steps", 2, *flags)
    assert without_times(tmp_path / "plain" / "seed0") == [
        pytest.approx(row, rel=1e-4) for row in without_times(tmp_path / "checkpointed" / "seed0")]


def test_the_flags_of_the_loop_reach_it(ears, tones, tmp_path, monkeypatch):
    """Without a compiler: what is asked of torch."""
    compiled = []
    checkpointed = record(monkeypatch, common, "recompute")
    monkeypatch.setattr(common.ViT, "compile", lambda self: compiled.append(self))
    tune(ears, tones, tmp_path, "--steps", 2, "--compile", "--checkpoint-activations")
    assert [type(module) for module in compiled] == [common.ViT] and checkpointed


def test_each_rate_decays_and_weighs_what_it_should():
    """The heads at their rate and without decay, the encoder's matrices with it, nothing that is frozen."""
    model = model_of("linear", "attentive", modality="audio", vit={})
    finetune.freeze_unused(model, model.tuning.views)
    heads = {"linear": (1e-2,), "attentive": (3e-2,)}
    optimizer = finetune.make_optimizer(model, Namespace(heads=heads, weight_decay=0.05, encoder_lr=1e-4))
    found = {}
    for group in optimizer.param_groups:
        found.update((id(p), (group["peak"], group["weight_decay"])) for p in group["params"])
    for name, p in model.named_parameters():
        expected = (1e-4, 0.05 if name.endswith("weight") and p.ndim >= 2 else 0.0)
        if name.startswith("heads."):
            expected = (heads[name.split(".")[1]][0], 0.0)
        assert found.get(id(p)) == (expected if p.requires_grad or name.startswith("heads.") else None), name


# ---- the checkpoint ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def av_run(both, toy, tmp_path_factory):
    """(folder of a fine-tuning on sound and pictures, its rows, the encoder's weights as they were trained,
    {modality: (positions, scores)} of the test)"""
    out = tmp_path_factory.mktemp("av")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", lambda file, *_: file.write(b"drawn"))
        built = record(patch, run.Run, "build")
        scored = record(patch, probe, "score_shared")
        tune(both, toy, out, "--data", "toy", "--data-dir", toy, "--steps", 3, "--lr", 1e-2)
    (_, model), = built
    (_, found), = scored
    rows = {}
    for line in (both / "probe.jsonl").read_text().splitlines()[-3:]:
        rows[json.loads(line)["tested"]] = json.loads(line)
    return out / "seed0", rows, copy.deepcopy(model.encoder.state_dict()), found


def test_the_checkpoint_s_encoder_is_what_was_trained_and_its_heads_score_as_the_test_did(av_run, both, toy):
    folder, rows, trained, scored = av_run
    encoder, heads, tuning = finetune.load_tuned(folder)
    assert same(common.load_encoder(folder).vit.state_dict(), trained)
    assert not same(common.load_encoder(both).vit.state_dict(), trained)
    listing = data.list_clips("toy", toy, "test")
    assert tuning.classes == listing.classes and tuning.heads == ("standardised",) and not tuning.multilabel
    for modality, keys in features.MODALITIES.items():
        positions, (scores,) = scored[modality]
        assert positions.tolist() == list(range(16)) and rows[modality]["N"] == 16
        right = 0
        for i in range(16):
            clip = data.load_clip(listing.path(i), tuning.views.test_inputs)
            of_clip = heads["standardised"](*encoder(**{key: clip[key] for key in keys}))[0]
            assert scores[i] == pytest.approx(of_clip.softmax(0).numpy(), abs=1e-3)
            right += int(of_clip.argmax()) == listing.clip_labels(i)[0]
        assert rows[modality]["value"] == pytest.approx(100 * right / 16, abs=7)        # a clip may tie


def test_the_other_commands_take_the_checkpoint_of_a_fine_tuning(av_run, toy, tmp_path, monkeypatch):
    folder = av_run[0]
    where = ["--ckpt", str(folder), "--device", "cpu", "--workers", "0"]
    where += ["--data", "toy", "--data-dir", str(toy)]
    probe.main([*where, "--probe", "linear", "--modality", "audio", "--views", "1"])
    row = last_row(folder)
    assert (row["probe"], row["head"], row["step"], row["N"]) == ("linear", "regression", 3, 16)
    retrieval.main([*where, "--clips", "all", "--views", "1"])
    assert last_row(folder, "retrieval.jsonl")["step"] == 3
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **how: None)
    clip = toy / "test" / "00000.mp4"
    visualize.main(["attention", *where[:4], "--clip", str(clip), "--out", str(tmp_path)])
    assert list(tmp_path.glob("*.mp4"))


def test_a_fine_tuned_encoder_is_fine_tuned_again_in_a_folder_of_its_own(av_run, toy):
    folder = av_run[0]
    words = words_of(folder, toy, folder / "again", "--data", "toy", "--data-dir", toy, "--steps", 1)
    probe.main(words[:words.index("--out")] + words[words.index("--out") + 2:])
    again = folder / "finetune-toy-av" / "seed0"
    assert weights(again)["method"]["title"] == "made up, fine-tuned" and weights(again)["step"] == 1
    assert weights(folder)["recipe"]["encoder"] != weights(again)["recipe"]["encoder"]


def test_pixels_and_pre_training_refuse_the_checkpoint_of_a_fine_tuning(av_run, toy, tmp_path):
    folder = av_run[0]
    where = ["--data", "toy", "--data-dir", str(toy), "--workers", "0", "--device", "cpu"]
    sentence = "probe has no predictor of hidden patches.*takes a checkpoint of a method that has one"
    fails(pixels.main, ["--ckpt", str(folder), *where], match=sentence)
    words = [*where, "--out", str(tmp_path), "--resume", str(folder / "latest.pt")]
    fails(ajepa.main, words, match="is a checkpoint of probe, not of ajepa")


def test_a_length_of_sound_other_than_the_encoder_s_is_kept_by_the_checkpoint(ears, tones, tmp_path, capsys):
    tune(ears, tones, tmp_path, "--steps", 1, "--seconds", 1)
    encoder, _, tuning = finetune.load_tuned(tmp_path / "seed0")
    assert encoder.inputs == asdict(INPUTS) and tuning.views.inputs == INPUTS.at(1.0, 16)
    heard = []
    encoder.register_forward_pre_hook(lambda *given: heard.append(given[2]["audio"].shape), with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        heads = finetune.make_heads(tuning, 64).eval()
        patch.setattr(finetune, "load_tuned", lambda *_: (encoder, heads, tuning))
        ask(tmp_path / "seed0", tones / "test" / "low" / "0.wav")
    frames, = {shape[-1] for shape in heard}
    assert frames == INPUTS.at(1.0, 16).mel_frames < INPUTS.mel_frames


# ---- a person's own file -------------------------------------------------------------------------------

def ask(folder, file, *more):
    probe.main(["--ckpt", str(folder), "--query", str(file), "--device", "cpu", "--no-bf16", *more])


@pytest.fixture(scope="module")
def learnt(ears, tones, tmp_path_factory):
    """The folder of a fine-tuning that tells the tones apart."""
    out = tmp_path_factory.mktemp("learnt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", lambda file, *_: file.write(b"drawn"))
        tune(ears, tones, out, "--steps", 30, "--batch-size", 12, "--lr", 2e-2, "--encoder-lr", 1e-3)
    assert last_row(ears)["value"] > 90
    return out / "seed0"


def test_a_file_has_its_class_first_and_probabilities_that_sum_to_one(learnt, tones, capsys):
    for name in TONES:
        file = tones / "test" / name / "0.wav"
        ask(learnt, file)
        title, *rows = [line for line in capsys.readouterr().out.splitlines() if line]
        assert title == f"{file}, by the head 'standardised':"
        shares = [float(row.split(" %")[0]) for row in rows]
        assert rows[0].split(" %  ")[1] == name and shares == sorted(shares, reverse=True) and shares[0] > 50
        assert len(rows) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
        found, classes = finetune.classify(learnt, file, CPU)
        assert classes == sorted(TONES) and found["standardised"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_probabilities_are_those_of_the_mean_over_the_views(multilabel, average):
    scores = random(4, 3)
    tuning = finetune.Tuning(("linear",), list("abc"), multilabel, views_of(), average)

    def of(x):
        return 1 / (1 + np.exp(-x)) if multilabel else np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    x = scores.double().numpy()
    expected = of(x.mean(0)) if average == "logits" else of(x).mean(0)
    assert tuning.probabilities(scores).numpy() == pytest.approx(expected)


def take_stream(path, kind, out):
    """One stream of a clip as a file of its own, its packets as they are."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = getattr(source.streams, kind)[0]
        copied = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                target.mux(packet)
    return out


def test_a_file_with_one_stream_is_judged_by_it_as_in_the_test_with_one_alone(av_run, toy, tmp_path):
    folder, _, _, scored = av_run
    clip = toy / "test" / "00003.mp4"
    files = {"av": clip}
    for kind in ("audio", "video"):
        files[kind] = take_stream(clip, kind, tmp_path / f"{kind}.mp4")
    told = {}
    for modality, file in files.items():
        found, _ = finetune.classify(folder, file, CPU)
        told[modality] = found["standardised"].numpy()
        _, (scores,) = scored[modality]                 # probabilities
        assert told[modality] == pytest.approx(scores[3].numpy(), abs=1e-3)
    assert max(abs(told["audio"] - told["av"])) > 0.005 < max(abs(told["video"] - told["av"]))


@pytest.mark.parametrize("which, file, more, sentence", [
    ("LEARNT", "nowhere.wav", "", "--query nowhere.wav: there is no such file"),
    ("LEARNT", ".", "", r"--query \.: there is no such file"),
    ("LEARNT", "BROKEN", "", "broken.wav: cannot be read as a sound or a video"),
    ("LEARNT", "SILENT", "", "silent.mp4: has no audio, by which this checkpoint tells classes apart"),
    ("EARS", "GOOD", "", "holds an encoder that knows no classes; fine-tune it first"),
    ("nowhere", "GOOD", "", "there is no such checkpoint"),
    ("DAMAGED", "GOOD", "", "its 'tuned' describes no heads of this version of the code"),
    ("OTHER", "GOOD", "", "its weights have another shape"),
    ("LEARNT", "GOOD", "--data folder", "--data has no effect with --query"),
    ("LEARNT", "GOOD", "--views 3", "--views has no effect with --query"),
    ("LEARNT", "GOOD", "--probe finetune", "--probe has no effect with --query"),
    ("LEARNT", "GOOD", "--ckpt a b", "--query is for one encoder; give one --ckpt")])
def test_what_cannot_be_asked_is_one_sentence(
        which, file, more, sentence, learnt, ears, tones, clips, tmp_path):
    content = common.load_checkpoint(learnt)
    torch.save({**content, "tuned": {"heads": 3}}, tmp_path / "damaged.pt")
    fewer = {**content["tuned"], "classes": ["high"]}
    (tmp_path / "other").mkdir()
    torch.save({**content, "tuned": fewer}, tmp_path / "other" / "latest.pt")
    (tmp_path / "broken.wav").write_bytes(b"garbage" * 50)
    places = {"LEARNT": learnt, "EARS": ears, "DAMAGED": tmp_path / "damaged.pt", "OTHER": tmp_path / "other",
              "GOOD": tones / "test" / "low" / "0.wav", "BROKEN": tmp_path / "broken.wav",
              "SILENT": clips / "silent.mp4"}
    fails(ask, places.get(which, which), places.get(file, file), *more.split(), match=sentence)


def test_a_damaged_entry_of_any_kind_is_one_sentence(learnt, tmp_path):
    content = common.load_checkpoint(learnt)
    whole_entry = content["tuned"]
    wrong = [None, [], "x", {}, *({**whole_entry, key: 3} for key in ("heads", "classes", "views", "mix")),
             {**whole_entry, "views": {**whole_entry["views"], "inputs": {"n_mels": "x"}}},
             {**whole_entry, "heads": ("nothing",)}, {**whole_entry, "more": 1}]
    for entry in wrong:
        torch.save({**content, "tuned": entry}, tmp_path / "latest.pt")
        sentence = "describes no heads|unknown|another shape|its weights"
        fails(finetune.load_tuned, tmp_path, match=sentence)


def test_a_command_that_cannot_be_asked_ends_with_code_2(tmp_path, ears):
    words = ["--ckpt", str(ears), "--query", str(tmp_path / "none.wav")]
    done = command([sys.executable, str(ROOT / "probe.py"), *words], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --query")
    assert "Traceback" not in done.stderr


# ---- flags ---------------------------------------------------------------------------------------------

ONLY_HERE = ("--out x", "--fresh", "--accumulate 2", "--log-every 3", "--save-every 3", "--max-bad .5",
             "--compile", "--checkpoint-activations", "--weighted", "--mixup .3", "--specaugment 4 8",
             "--regularised-masking .1", "--encoder-lr 1e-4")


@pytest.mark.parametrize("words", ONLY_HERE)
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_flag_of_fine_tuning_is_refused_by_a_frozen_probe(words, kind):
    sentence = f"{words.split()[0]} has no effect without --probe finetune"
    fails(probe.get_args, ["--ckpt", "x", "--data", "toy", "--probe", kind, *words.split()], match=sentence)


@pytest.mark.parametrize("words, sentence", [
    ("--batch-size 8 --accumulate 8", "--batch-size 8: less than 2 clips for each of 1 processes x 8"),
    ("--batch-size 8 --accumulate 3", "--batch-size 8 is not divisible by 1 processes x 3 micro-batches"),
    ("--accumulate 0", "--accumulate 0 is out of range"), ("--mixup -1", "--mixup -1.0 is out of range"),
    ("--specaugment 4 -8", "--specaugment -8 is out of range"),
    ("--mixup nan", "--mixup nan is out of range"),
    ("--specaugment 33 8", "--specaugment F 33 is out of range: from 0 to 32"),
    ("--specaugment 4 202", "--specaugment T 202 is out of range: from 0 to 201")])
def test_what_cannot_be_trained_is_one_sentence_before_anything_is_written(
        words, sentence, ears, tones, tmp_path):
    fails(tune, ears, tones, tmp_path / "out", "--steps", 1, *words.split(), match=sentence)
    assert not list(tmp_path.rglob("*.pt"))


def test_pictures_have_no_spectrum_to_hide(both, toy, tmp_path):
    flags = ("--data", "toy", "--data-dir", toy, "--modality", "video", "--steps", 1, "--specaugment", 4, 8)
    sentence = "--specaugment has no effect: this run takes pictures alone; leave it out"
    fails(tune, both, toy, tmp_path, *flags, match=sentence)


def test_a_probe_needs_data_and_a_frozen_one_a_single_process(monkeypatch):
    fails(probe.get_args, ["--ckpt", "x"], match="give --data SET, or with --query FILE ask")
    monkeypatch.setattr(run, "start_process", lambda device, bf16: run.Process(torch.device("cpu"), 0, 2))
    for more in (["--data", "toy"], ["--query", "x.wav"]):
        sentence = "probe.py runs in one process; start it without torchrun"
        fails(probe.main, ["--ckpt", "x", *more], match=sentence)
