"""AV-JEPA from the command line to the checkpoint, on real mp4 files."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import avjepa_lejepa
import common
import data
import probe
import retrieval
from conftest import ROOT, StopAfter, same, weights

TINY = ["--batch-size", "4", "--log-every", "1", "--save-every", "1", "--device", "cpu", "--size", "nano"]


def flags(toy, out, *more):
    return ["--data-dir", str(toy), "--out", str(out), "--workers", "0", *TINY, *map(str, more)]


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A finished run of four steps, with its evaluation."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "frozen_schedule", lambda clips: (8, 5))
        avjepa_lejepa.main(flags(toy, out, "--steps", 4))
    return out


def test_a_run_leaves_checkpoint_log_curves_and_results(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in (*avjepa_lejepa.PANEL, "bad_clips", "no_audio", "no_video", "short"):
        assert np.isfinite(rows[-1][key])
    lam = avjepa_lejepa.RECIPE["lam"][1]
    assert rows[-1]["loss"] == pytest.approx((1 - lam) * rows[-1]["invariance"] + lam * rows[-1]["sigreg"], rel=1e-5)
    assert rows[-1]["sigreg/N"] == pytest.approx(rows[-1]["sigreg"] / 4)
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((run / "results.json").read_text())
    assert results.pop("seconds") > 0 and set(results) == {"trained", "untrained", "raw input", "chance"}
    assert all(0 <= results[name][m] <= 100 for name in results for m in ("audio", "video", "av"))
    assert results["trained"]["N"] == data.list_clips("toy", weights(run)["args"]["data_dir"], "test").files.size


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_two_of_four_steps_and_continued_equals_four_steps_bit_for_bit(toy, run, tmp_path, monkeypatch, capsys, workers):
    args = flags(toy, tmp_path, "--steps", 4, "--workers", workers)
    with monkeypatch.context() as patch:
        patch.setattr(common, "StopSignal", lambda: StopAfter(2))
        avjepa_lejepa.main(args)
    assert weights(tmp_path)["step"] == 2
    assert "the same command goes on" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(probe, "toy_report", lambda *_: None)
        avjepa_lejepa.main(args)
    one, two = weights(run), weights(tmp_path)
    assert all(same(one[key], two[key]) for key in ("step", "model", "optimizer", "recipe"))
    assert [row["step"] for row in common.read_log(tmp_path)] == [0, 1, 2, 3]
    assert [row["loss"] for row in common.read_log(tmp_path)] == [row["loss"] for row in common.read_log(run)]


def test_sigterm_saves_and_says_how_to_go_on(toy, tmp_path):
    command = [sys.executable, str(ROOT / "avjepa_lejepa.py"), *flags(toy, tmp_path, "--steps", 5000, "--save-every", 100000)]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(600):
        if len(common.read_log(tmp_path)) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the same command goes on" in out
    assert weights(tmp_path)["step"] == common.read_log(tmp_path)[-1]["step"] + 1


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(toy, tmp_path, monkeypatch):
    real = common.sigreg
    monkeypatch.setattr(avjepa_lejepa, "sigreg", lambda z, step, s: real(z, step, s) * (float("nan") if step == 2 else 1))
    with pytest.raises(common.UserError, match="not finite at step 2"):
        avjepa_lejepa.main(flags(toy, tmp_path, "--steps", 4))
    saved = weights(tmp_path)
    assert saved["step"] == 2 and all(torch.isfinite(v).all() for v in saved["model"].values())


def test_lambda_zero_says_that_it_collapses_and_names_the_collapse(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    avjepa_lejepa.main(flags(toy, tmp_path, "--steps", 60, "--save-every", 60, "--lam", 0, "--lr", 0.01, "--seconds", 0.5, "--frames", 2))
    out = capsys.readouterr().out
    assert "collapse by design" in out and "COLLAPSE at step" in out
    assert common.read_log(tmp_path)[-1]["step"] == 59                                          # it said so and went on


def test_one_batch_is_learnt_without_collapse(toy):
    _, recipe = avjepa_lejepa.get_args(["--seconds", "0.5", "--frames", "2"])
    inputs = avjepa_lejepa.make_inputs(recipe)
    plan = avjepa_lejepa.functools.partial(avjepa_lejepa.plan_views, seconds=0.5, local="modality")
    clips = data.Clips(data.list_clips("toy", toy), inputs, plan)
    batch = data.to_device(data.collate([clips[0, i] for i in range(16)]), torch.device("cpu"))
    common.seed_step(0, 0)
    model = avjepa_lejepa.AVJEPA(avjepa_lejepa.encoder_config(recipe, inputs), (64, 8), 0.05, 64)
    optimizer, apart = torch.optim.AdamW(model.parameters(), 1e-3), []
    for step in range(60):
        loss, parts = model(batch, step)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        std, rank = common.health(parts["z"])
        apart.append(parts["invariance"].item() / std ** 2)             # distance of a clip's views, against that of the clips
    print(apart[::10], std, rank)
    assert apart[-1] < 0.1 * apart[0]
    assert std > 0.5 and rank > 4


@pytest.mark.parametrize("local", ["modality", "dropout", "joint", "none"])
@pytest.mark.parametrize("absent", ["zero", "drop"])
def test_each_ablation_trains_and_leaves_no_parameter_without_a_gradient(toy, tmp_path, monkeypatch, local, absent):
    """DDP refuses unused parameters: whatever a flag drops must not be built."""
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    seen, init = [], avjepa_lejepa.AVJEPA.__init__
    monkeypatch.setattr(avjepa_lejepa.AVJEPA, "__init__", lambda self, *a: (init(self, *a), seen.append(self))[0])
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self: None)
    avjepa_lejepa.main(flags(toy, tmp_path, "--steps", 1, "--local", local, "--absent", absent))
    assert seen and all(p.grad is not None for p in seen[0].parameters())


def test_the_same_epoch_of_clips_whatever_accumulates(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    avjepa_lejepa.main(flags(toy, tmp_path, "--steps", 2, "--accumulate", 2))
    assert "SIGReg sees the micro-batch of 2 clips" in capsys.readouterr().out


# ---- two processes --------------------------------------------------------------------------------------------------

def train_as_rank(rank, toy, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    seen, item, build = [], data.Clips.item, avjepa_lejepa.AVJEPA.__init__
    models = []
    data.Clips.item = lambda self, index, rng: (seen.append(int(index)), item(self, index, rng))[1]
    avjepa_lejepa.AVJEPA.__init__ = lambda self, *a: (build(self, *a), models.append(self))[0]
    probe.toy_report = lambda *_: None
    avjepa_lejepa.main(flags(toy, Path(folder) / "run", "--steps", 2))
    torch.save({"seen": seen, "model": {k: v for k, v in models[0].named_parameters()}}, Path(folder) / f"rank{rank}.pt")


def test_two_real_processes_train_on_disjoint_clips_and_end_with_equal_weights(toy, tmp_path):
    mp.spawn(train_as_rank, (str(toy), str(tmp_path), str(20000 + os.getpid() % 20000)), nprocs=2)
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))
    assert len(a["seen"]) == len(b["seen"]) == 4 and not set(a["seen"]) & set(b["seen"])
    assert same(dict(a["model"]), dict(b["model"]))


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "no such folder": (["--data", "folder", "--data-dir", "nowhere"], "no such folder"),
    "no folder given": (["--data", "vggsound"], "needs --data-dir"),
    "unknown data": (["--data", "imagenet"], "not a data set"),
    "batch larger than the set": (["--batch-size", "100000"], "larger than the set"),
    "unknown ViT": (["--size", "colossal"], "unknown ViT"),
    "frames and tubelet": (["--frames", "5"], "not divisible by the tubelet"),
    "lam": (["--lam", "2"], "--lam 2.0 is out of range"),
    "lr": (["--lr", "-1"], "out of range"),
    "steps": (["--steps", "-3"], "out of range"),
    "device": (["--device", "cuda:99"], "does not have it"),
    "accumulate": (["--batch-size", "8", "--accumulate", "3"], "not divisible"),
    "one clip": (["--accumulate", "4"], "less than 2 clips"),
    "workers": (["--workers", "-1"], "--workers -1 is out of range"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_sentence(toy, tmp_path, name):
    bad, sentence = BAD[name]
    with pytest.raises(common.UserError, match=sentence) as error:
        known = flags(toy, tmp_path / "run", "--steps", 2) if "--data" not in bad else ["--out", str(tmp_path / "run"), *TINY]
        avjepa_lejepa.main([*known, *bad])
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "latest.pt").exists()


def test_a_checkpoint_that_is_cut_off_or_of_another_method_or_recipe_is_refused_and_kept(toy, run, tmp_path):
    for change, sentence in (("cut", "cut off"), ("method", "not of avjepa_lejepa"), ("recipe", "lam 0.05 .now 0.5.")):
        out = tmp_path / change
        shutil.copytree(run, out)
        if change == "cut":
            (out / "latest.pt").write_bytes((out / "latest.pt").read_bytes()[:5000])
        elif change == "method":
            torch.save({**weights(out), "method": "ajepa"}, out / "latest.pt")
        before = (out / "latest.pt").read_bytes(), (out / "log.jsonl").read_bytes()
        with pytest.raises(common.UserError, match=sentence):
            avjepa_lejepa.main([*flags(toy, out, "--steps", 4), *(["--lam", "0.5"] if change == "recipe" else [])])
        assert before == ((out / "latest.pt").read_bytes(), (out / "log.jsonl").read_bytes())


def test_no_readable_clip_stops_with_a_sentence(tmp_path):
    (tmp_path / "clips").mkdir()
    for i in range(8):
        (tmp_path / "clips" / f"{i}.mp4").write_bytes(b"not a video")
    with pytest.raises(common.UserError, match="do not decode"):
        avjepa_lejepa.main(["--data", "folder", "--data-dir", str(tmp_path / "clips"), "--recipe", "toy", "--steps", "2", "--workers", "0",
                            "--out", str(tmp_path / "run"), *TINY])


def test_bad_input_as_a_command_exits_with_2_and_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "avjepa_lejepa.py"), "--lam", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --lam 2.0 is out of range: from 0 to 1" and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


# ---- what is done with a run ----------------------------------------------------------------------------------------

def test_fresh_starts_over(toy, run, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "toy_report", lambda *_: None)
    out = tmp_path / "run"
    shutil.copytree(run, out)
    avjepa_lejepa.main(flags(toy, out, "--steps", 1, "--fresh"))
    assert weights(out)["step"] == 1 and len(common.read_log(out)) == 1


def test_five_lines_from_a_file_to_an_embedding(toy, run):
    encoder = common.load_encoder(run)
    clip = data.load_clip(toy / "test" / "00000.mp4", encoder.inputs)
    tokens, embedding = encoder(**clip)
    assert tokens.shape == (1, 36 + 24, 64) and embedding.shape == (1, 64)
    sound, _ = encoder(audio=clip["audio"])
    assert sound.shape == (1, 24, 64) and not embedding.requires_grad


def test_a_query_by_a_clips_own_sound_lists_the_folder_with_scores(toy, run, capsys):
    retrieval.main(["--ckpt", str(run), "--query", str(toy / "test" / "00003.mp4"), "--folder", str(toy / "test"), "--top", "5",
                    "--workers", "0", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines[1:6]]
    assert lines[0].startswith("by the audio") and scores == sorted(scores, reverse=True) and len(scores) == 5
    assert all(line.endswith(".mp4") for line in lines[1:6])


@pytest.mark.parametrize("kind,more", [("linear", []), ("attentive", []), ("attentive", ["--cache-gb", "0"]), ("finetune", []),
                                       ("finetune", ["--head", "attentive"])])
def test_each_probe_runs_on_each_modality_and_writes_its_row(toy, run, kind, more, capsys):
    modality = {"linear": "audio", "attentive": "video", "finetune": "av"}[kind]
    probe.main(["--ckpt", str(run), "--data", "toy", "--data-dir", str(toy), "--probe", kind, "--modality", modality, "--epochs", "1",
                "--batch-size", "4", "--views", "2", "--workers", "0", "--device", "cpu", *more])
    row = json.loads((run / "probe.jsonl").read_text().splitlines()[-1])
    assert row["probe"] == kind and row["modality"] == modality and row["N"] == 16 and row["metric"] == "top-1" and 0 <= row["value"] <= 100
    assert row["seed"] == 0 and row["step"] == 4 and row["seconds"] > 0
