"""An experiment runs what is missing, goes on where it stopped; its table is mean and spread of its runs."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, command, write_checkpoint

import ajepa
import common
import probe
import reproduce
import run
from common import UserError

SCRIPT = """
import json, pathlib, shutil, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here, out = pathlib.Path(sys.argv[0]).parent, pathlib.Path(flags["--out"])
with open(here / "order.txt", "a") as f: f.write(out.name + "\\n")
if flags["--way"] == flags.get("--broken"): sys.exit("this way is broken")
time.sleep(float(flags.get("--sleep", 0)))
value = float(flags["--way"]) + float(flags["--seed"]) ** 2
trained = {"audio": value, **({"video": float(flags["--video"])} if "--video" in flags else {})}
if (here / flags["--way"]).is_dir(): shutil.copy(here / flags["--way"] / "latest.pt", out)
(out / "log.jsonl").write_text('{"step": 1, "ms_step": 3000}\\n{"step": 3, "ms_step": 9000}\\n')
(out / "results.json").write_text(json.dumps({
    "trained": trained, "untrained": {"audio": 5.0}, "raw input": {"audio": 30.0}, "chance": {"audio": 12.5},
    "seconds": 90}))
"""
PROBE = """
import json, pathlib, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
key, baseline, here = flags["--modality"], flags.get("--baseline"), pathlib.Path(sys.argv[0]).parent
folder, broken = pathlib.Path(flags["--ckpt"]), here / "broken.txt"
with open(here / "order.txt", "a") as f: f.write(f"{folder.name}:{key}:{baseline}\\n")
if broken.is_file() and broken.read_text() == key: sys.exit("this probe is broken")
row = {"modality": key, "baseline": baseline, "value": 40.0 if baseline else 80.0, "seconds": 30}
with open(folder / "probe.jsonl", "a") as f: f.write(json.dumps(row) + "\\n")
"""
BOTH = ["ten-seed0", "twenty-and-more-seed0"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that runs an experiment of two rows, whose runs write 10 (or 20) plus the seed squared and
    whose probes 80 (or 40 untrained), and gives what it started. The first row is of sound alone."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setattr(reproduce, "__file__", str(tmp_path / "reproduce.py"))
    rows = {"ten": "script.py --way 10", "twenty and more": "script.py --way 20"}
    after = {"ten": reproduce.attentive("audio"),
             "twenty and more": reproduce.attentive("audio", "video", "av")}
    small = dict(title="What: of what", columns={"audio": "trained/audio"}, flags="", rows=rows)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "masking", small)
    methods = {**reproduce.EXPERIMENTS["methods"], "rows": rows, "after": after}
    monkeypatch.setitem(reproduce.EXPERIMENTS, "methods", methods)

    def start(*more, name="masking", seeds="0"):
        if name == "methods":
            for way in ("10", "20"):
                file = write_checkpoint(tmp_path / way, video=way == "20") / "latest.pt"
                content = torch.load(file, weights_only=True)
                torch.save({**content, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1234)}}}}, file)
        order = tmp_path / "order.txt"
        order.write_text("")
        reproduce.main([name, "--out", str(tmp_path / "out"), "--seeds", *seeds.split(), *more])
        return order.read_text().split()

    return start


def table(tmp_path):
    """(table.md, the rows of table.json)"""
    content = json.loads((tmp_path / "out/table.json").read_text())
    return (tmp_path / "out/table.md").read_text(), content["rows"]


def test_each_row_runs_once_for_each_seed_and_the_table_is_their_mean_and_spread(start, tmp_path, capsys):
    started = start(seeds="0 1 3")
    assert started[:2] == BOTH and len(started) == len(set(started)) == 6
    text, rows = table(tmp_path)
    for row, base in (("ten", 10), ("twenty and more", 20)):
        values, cell = np.array([base, base + 1, base + 9]), rows[row]["audio"]
        assert list(cell["values"].values()) == values.tolist()
        np.testing.assert_allclose([cell["mean"], cell["std"]], [values.mean(), values.std(ddof=1)])
    assert "| | audio | seeds |\n|---|---|---|\n| ten | 13.3 ± 4.9 (10.0, 11.0, 19.0) | 0, 1, 3 |\n" in text
    assert text in capsys.readouterr().out and (tmp_path / "out/table.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_that_lacks_a_column_has_a_dash_in_the_table_and_no_bar_in_the_picture(start, tmp_path):
    now = reproduce.EXPERIMENTS["masking"]
    now["columns"] = {"video": "trained/video", "raw": "raw input/A->V/R@1", "audio": "trained/audio",
                      "audio, untrained": "untrained/audio"}
    now["rows"] = {**now["rows"], "twenty and more": "script.py --way 20 --video 3"}
    start(seeds="0 1")
    text, rows = table(tmp_path)
    assert "| ten | – | – | 10.5 ± 0.7 (10.0, 11.0) | 5.0 ± 0.0 (5.0, 5.0) | 0, 1 |" in text
    assert "| twenty and more | 3.0 ± 0.0 (3.0, 3.0) | – | 20.5 ± 0.7 (20.0, 21.0) |" in text
    assert list(rows["ten"]) == ["audio", "audio, untrained"]
    ax, = reproduce.draw(now, rows).axes
    assert sorted(bar.get_height() for bar in ax.patches) == [3, 10.5, 20.5]
    assert {label.get_text() for label in ax.get_legend().get_texts()} == {"video", "audio", "untrained"}


def test_what_is_finished_is_skipped_and_more_seeds_run_only_what_is_missing(start, tmp_path, capsys):
    assert start() == BOTH
    assert start(seeds="0 2 2") == ["ten-seed2", "twenty-and-more-seed2"]
    assert "2 of 4 runs finished" in capsys.readouterr().out
    assert list(table(tmp_path)[1]["ten"]["audio"]["values"]) == ["0", "2"]


def test_a_dry_run_shows_what_is_left_and_runs_nothing(start, tmp_path, capsys):
    assert start("--dry-run", seeds="0 1 2") == [] and not (tmp_path / "out").exists()
    assert capsys.readouterr().out.count("left: ") == 6


def test_a_run_that_fails_is_named_the_others_go_on_and_the_next_call_tries_it_again(start, tmp_path, capsys):
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        start("--broken", "10")
    shown = capsys.readouterr().out
    assert "ten, seed 0 failed (exit code 1)" in shown and "| twenty and more | 20.0" in shown
    assert "this way is broken" in (tmp_path / "out/ten-seed0/output.txt").read_text()
    with pytest.raises(UserError):
        start("--broken", "10")
    assert (tmp_path / "order.txt").read_text().split() == ["ten-seed0"]


def test_runs_of_another_command_are_refused_but_not_those_that_never_began(start, tmp_path):
    with pytest.raises(UserError, match="no run of masking"):
        start("--sleep", "much")
    assert start() == BOTH
    with pytest.raises(UserError, match="another command"):
        start("--sleep", "0")
    assert (tmp_path / "order.txt").read_text() == ""


@pytest.mark.parametrize("begun", [None, '["script.py", "--way", "10"]'])
def test_a_run_that_someone_else_left_in_the_folder_is_refused_and_never_counted(start, tmp_path, begun):
    folder = tmp_path / "out/ten-seed0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"trained": {"audio": 99}}')
    if begun:
        (folder / "command.json").write_text(begun)
    with pytest.raises(UserError, match="another command"):
        start()
    assert (tmp_path / "order.txt").read_text() == ""


def test_a_row_keeps_its_own_flags_and_a_folder_may_move(start, tmp_path):
    start("--way", "5")
    assert table(tmp_path)[1]["ten"]["audio"]["values"] == {"0": 10}
    (tmp_path / "out").rename(tmp_path / "moved")
    assert start("--way", "5", "--out", str(tmp_path / "moved")) == []


def test_results_that_were_cut_off_count_as_unfinished_and_one_seed_has_no_spread(start, tmp_path):
    start()
    (tmp_path / "out/ten-seed0/results.json").write_text('{"trained": {"aud')
    assert start() == ["ten-seed0"] and "| ten | 10.0 | 0 |" in table(tmp_path)[0]


@pytest.mark.parametrize("flags, says", [
    (["--fresh"], "decides that itself"), (["--data=folder"], "decides that itself"),
    (["--seed", "3"], "decides that itself"), (["--out", __file__], "cannot be made")])
def test_what_an_experiment_cannot_take_is_refused(flags, says):
    with pytest.raises(UserError, match=says):
        reproduce.main(["masking", *flags])


def test_a_signal_saves_the_run_under_way_which_the_next_call_then_ends(toy, tmp_path, monkeypatch):
    """The real command, on the tiny toy world: SIGTERM in the middle of a row's training."""
    out, folder = tmp_path / "masking", tmp_path / "masking" / "random-patches-75-seed0"
    words = [sys.executable, str(ROOT / "reproduce.py"), "masking", "--out", str(out), "--data-dir", str(toy),
             *"--seeds 0 --steps 60 --batch-size 4 --workers 0 --log-every 1".split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.time() + 60
        while time.time() < until and len(run.read_log(folder)) < 4:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
    shown, stopped = process.communicate(timeout=60)[0], len(run.read_log(folder))
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in shown
    assert 3 < stopped < 60 and common.load_checkpoint(folder)["step"] == stopped
    assert not (folder / "results.json").exists()
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (8, 2))   # not 2,000 steps
    ajepa.main(json.loads((folder / "command.json").read_text())["command"][1:])    # the next call does so
    assert [row["step"] for row in run.read_log(folder)] == list(range(60))
    assert "left: random" not in command([*words, "--dry-run"], tmp_path).stdout


def test_rows_are_trained_then_probed_and_are_the_columns_of_a_table_of_measures(start, tmp_path, capsys):
    start("--dry-run", "--workers", "1", name="methods")
    assert "then 6 probes of it" in capsys.readouterr().out
    started = start("--workers", "1", name="methods", seeds="0 1")
    assert started[:4] == ["ten-seed0", "ten-seed0:audio:None", "ten-seed0:audio:untrained", BOTH[1]]
    assert len(started) == len(set(started)) == 2 * (1 + 2 + 1 + 6)
    text, rows = table(tmp_path)
    assert text in capsys.readouterr().out and text.endswith("| seeds | 0, 1 | 0, 1 |\n")
    for line in ("| | ten | twenty and more |\n|---|---|---|\n"
                 "| linear probe, audio | 10.5 ± 0.7 (10.0, 11.0) | 20.5 ± 0.7 (20.0, 21.0) |\n",
                 "| linear probe, audio, raw input | 30.0 ± 0.0 (30.0, 30.0) |",
                 "| attentive probe, audio + video, untrained | – | 40.0 ± 0.0 (40.0, 40.0) |",
                 "| chance, probes | 12.5 | 12.5 |", "| video tokens of a clip | – | 4 |",
                 "| parameters trained | 1,234 | 1,234 |",
                 "| seconds a step | 6.000 ± 0.000 | 6.000 ± 0.000 |",
                 "| minutes of training | 0.4 ± 0.0 |", "| minutes of evaluation | 1.5 ± 0.0 |",
                 "| minutes of attentive probes | 1.0 ± 0.0 | 3.0 ± 0.0 |"):
        assert line in text
    cell = rows["twenty and more"]["attentive probe, video"]
    assert cell == {"values": {"0": 80.0, "1": 80.0}, "mean": 80.0, "std": 0.0}
    fig = reproduce.draw(reproduce.EXPERIMENTS["methods"], rows)
    assert [ax.get_title() for ax in fig.axes] == list(reproduce.EXPERIMENTS["methods"]["panels"])
    assert sorted(bar.get_height() for bar in fig.axes[1].patches) == [80] * 4
    drawn = {tuple(line.get_ydata()) for line in fig.axes[1].lines if line.get_marker() == "None"}
    assert {(40, 40), (12.5, 12.5)} <= drawn                            # untrained, and chance
    assert start("--workers", "1", name="methods", seeds="0 1") == []


def test_a_probe_that_fails_or_is_missing_is_named_and_alone_run_again(start, tmp_path, capsys):
    (tmp_path / "broken.txt").write_text("video")
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        start(name="methods")
    shown = capsys.readouterr().out
    assert "twenty and more, seed 0, attentive probe, video, trained failed (exit code 1)" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown
    assert "| minutes of attentive probes | 1.0 | – |" in shown
    (tmp_path / "broken.txt").unlink()
    with open(tmp_path / "out" / BOTH[1] / "probe.jsonl", "a") as f:    # of another probe: does not count
        f.write('{"modality": "video", "baseline": null, "value": 1.0, "seconds": 1}\n')
    assert start(name="methods") == [f"{BOTH[1]}:video:None", f"{BOTH[1]}:video:untrained"]
    assert table(tmp_path)[1]["twenty and more"]["attentive probe, video"]["mean"] == 80


def test_a_training_that_fails_is_not_probed(start, tmp_path):
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        start("--broken", "10", name="methods")
    assert "ten-seed0:" not in (tmp_path / "order.txt").read_text()


def test_seconds_a_step_and_minutes_are_those_of_a_slow_loop_over_the_steps():
    log = [{"step": 9, "ms_step": 100.0}, {"step": 19, "ms_step": 300.0}, {"step": 24, "ms_step": 200.0},
           {"step": 26, "ms_step": 50.0}]
    milliseconds, row = 0.0, 0
    for step in range(27):
        row += step > log[row]["step"]
        milliseconds += log[row]["ms_step"]
    np.testing.assert_allclose(reproduce.step_times(log), [0.150, milliseconds / 60_000])
    assert reproduce.step_times([]) == (None, None)


@pytest.mark.parametrize("method", ["ajepa", "mjepa"])
def test_the_parameters_are_those_that_the_model_trains_without_teacher_and_buffers(method, tmp_path):
    module = importlib.import_module(method)
    _, recipe = module.get_args(["--size", "nano"])
    inputs = module.make_inputs(recipe)
    model = module.make_model(recipe, inputs)
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, 0.05))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    content = dict(method=module.METHOD, step=1, args={"seed": 0}, inputs=asdict(inputs), projector=None)
    content.update(cross=None, model=model.state_dict(), optimizer=optimizer.state_dict())
    content.update(model.parts)
    torch.save(content, tmp_path / "latest.pt")
    encoder = sum(p.numel() for p in model.context_encoder.parameters())
    tokens = {"audio": 96} if method == "ajepa" else {"video": 32, "audio": 48}
    assert reproduce.sizes(tmp_path) == {
        "parameters of the encoder": encoder, "parameters trained": sum(p.numel() for p in trained),
        **{f"{name} tokens of a clip": count for name, count in tokens.items()}}


def test_the_row_of_the_real_probe_is_kept(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (8, 2))
    monkeypatch.setattr(reproduce, "launch", lambda run, step: probe.main(run["probes"][step][1:]) or 0)
    step = reproduce.attentive("video")[1]
    experiment = {"rows": {"it": "it.py"}, "after": {"it": [step]}, "flags": ""}
    it, = reproduce.plan(experiment, [0], tmp_path, ["--data-dir", str(toy), "--workers", "0"], [])
    write_checkpoint(it["folder"])
    assert reproduce.probe_run(it, step) == 0
    row = reproduce.probed(it)[step]
    assert row["modality"] == "video" and row["baseline"] == "untrained" and 0 <= row["value"] <= 100
    assert row["seconds"] >= 0
