"""An experiment runs what is missing, goes on where it stopped, and its table is the mean and the spread of its runs."""
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import asdict

import ajepa, common, mjepa, probe, reproduce
from common import UserError
from conftest import ROOT, command

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

SCRIPT = '''
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
with open(out.parent / "order.txt", "a") as f: f.write(out.name + "\\n")
if flags["--way"] == flags.get("--broken"): sys.exit("this way is broken")
time.sleep(float(flags.get("--sleep", 0)))
video = {"video": float(flags["--video"])} if "--video" in flags else {}
(out / "results.json").write_text(json.dumps({"trained": {"audio": float(flags["--way"]) + float(flags["--seed"]) ** 2, **video}}))
'''


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment of two rows whose runs write 10 (or 20) plus the seed squared. Returns its folder."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    rows = {"ten": f"{script} --way 10", "twenty and more": f"{script} --way 20"}
    monkeypatch.setitem(reproduce.EXPERIMENTS, "masking", dict(title="What: of what", columns={"audio": ("trained", "audio")}, flags="",
                                                               rows=rows))
    return tmp_path / "out"


def started(out):
    return (out / "order.txt").read_text().split()


def test_each_row_runs_once_for_each_seed_and_the_table_is_their_mean_and_spread(experiment, capsys):
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "1", "3"])
    assert len(started(experiment)) == len(set(started(experiment))) == 6
    table = json.loads((experiment / "table.json").read_text())["rows"]
    for row, base in (("ten", 10), ("twenty and more", 20)):
        values, cell = np.array([base, base + 1, base + 9]), table[row]["audio"]
        assert list(cell["values"].values()) == values.tolist()
        np.testing.assert_allclose([cell["mean"], cell["std"]], [values.mean(), values.std(ddof=1)])
    text = (experiment / "table.md").read_text()
    assert "| ten | 13.3 ± 4.9 (10.0, 11.0, 19.0) | 0, 1, 3 |" in text and text in capsys.readouterr().out
    assert (experiment / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_a_row_that_lacks_a_column_has_a_dash_in_the_table_and_no_bar_in_the_picture(experiment, monkeypatch):
    now = reproduce.EXPERIMENTS["masking"]
    now["columns"] = {"video": ("trained", "video"), "raw": ("raw input", "A->V", "R@1"), "audio": ("trained", "audio")}
    now["rows"]["twenty and more"] += " --video 3"
    monkeypatch.setattr(plt, "close", lambda figure: None)
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "1"])
    text, ax = (experiment / "table.md").read_text(), plt.gcf().axes[0]
    assert "| ten | – | – | 10.5 ± 0.7 (10.0, 11.0) | 0, 1 |" in text
    assert "| twenty and more | 3.0 ± 0.0 (3.0, 3.0) | – | 20.5 ± 0.7 (20.0, 21.0) | 0, 1 |" in text
    assert sorted(bar.get_height() for bar in ax.patches) == [3, 10.5, 20.5]
    assert [label.get_text() for label in ax.get_legend().get_texts()] == ["video", "audio"]
    assert list(json.loads((experiment / "table.json").read_text())["rows"]["ten"]) == ["audio"]


def test_what_is_finished_is_skipped_and_more_seeds_run_only_what_is_missing(experiment, capsys):
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0"])
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "2"])
    assert started(experiment) == ["ten-seed0", "twenty-and-more-seed0", "ten-seed2", "twenty-and-more-seed2"]
    assert "2 of 4 runs finished" in capsys.readouterr().out
    assert list(json.loads((experiment / "table.json").read_text())["rows"]["ten"]["audio"]["values"]) == ["0", "2"]


def test_a_dry_run_shows_what_is_left_and_runs_nothing(experiment, capsys):
    reproduce.main(["masking", "--out", str(experiment), "--dry-run"])
    assert capsys.readouterr().out.count("left: ") == 6 and not experiment.exists()


def test_a_run_that_fails_is_named_and_the_others_go_on_and_the_next_call_tries_it_again(experiment, capsys):
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "--broken", "10"])
    shown = capsys.readouterr().out
    assert "ten, seed 0 failed (exit code 1)" in shown and "| twenty and more | 20.0" in shown
    assert "this way is broken" in (experiment / "ten-seed0" / "output.txt").read_text()
    with pytest.raises(UserError):
        reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "--broken", "10"])
    assert started(experiment) == ["ten-seed0", "twenty-and-more-seed0", "ten-seed0"]


def test_runs_of_another_command_in_the_folder_are_refused(experiment):
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0"])
    with pytest.raises(UserError, match="another command"):
        reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "--sleep", "0"])
    assert len(started(experiment)) == 2


def test_a_signal_saves_the_run_under_way_which_the_next_call_then_ends(toy, tmp_path, monkeypatch):
    """The real command, on the tiny toy world: SIGTERM in the middle of a row's training."""
    out, folder = tmp_path / "masking", tmp_path / "masking" / "random-patches-75-seed0"
    words = [sys.executable, str(ROOT / "reproduce.py"), "masking", "--seeds", "0", "--out", str(out), "--data-dir", str(toy)]
    words += "--steps 60 --batch-size 4 --workers 0 --log-every 1".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.time() + 60
        while time.time() < until and len(common.read_log(folder)) < 4:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
    shown, stopped = process.communicate(timeout=60)[0], len(common.read_log(folder))
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in shown
    assert 3 < stopped < 60 and common.load_checkpoint(folder)["step"] == stopped and not (folder / "results.json").exists()
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips: (8, 2))            # not 2,000 steps of each probe at its end
    ajepa.main([*json.loads((folder / "command.json").read_text())["command"][1:]])                # what the next call does first
    assert [row["step"] for row in common.read_log(folder)] == list(range(60))         # nothing twice, nothing left out
    assert "left: random" not in command([*words, "--dry-run"], tmp_path).stdout


def test_flags_that_made_every_run_fail_do_not_block_the_folder(experiment):
    with pytest.raises(UserError, match="no run"):
        reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "--sleep", "much"])
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0"])
    assert len(started(experiment)) == 4


def test_a_row_keeps_its_own_flags_and_a_folder_may_move(experiment):
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "--way", "5"])
    assert json.loads((experiment / "table.json").read_text())["rows"]["ten"]["audio"]["values"] == {"0": 10}
    experiment.rename(experiment.parent / "moved")
    reproduce.main(["masking", "--out", str(experiment.parent / "moved"), "--seeds", "0", "--way", "5"])
    assert len(started(experiment.parent / "moved")) == 2


def test_results_that_were_cut_off_count_as_unfinished_and_one_seed_has_no_spread(experiment):
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0"])
    (experiment / "ten-seed0" / "results.json").write_text('{"trained": {"aud')
    reproduce.main(["masking", "--out", str(experiment), "--seeds", "0", "0"])
    assert started(experiment) == ["ten-seed0", "twenty-and-more-seed0", "ten-seed0"]
    assert "| ten | 10.0 | 0 |" in (experiment / "table.md").read_text()


def test_a_run_that_someone_else_left_in_the_folder_is_refused_and_never_counted(experiment):
    (experiment / "ten-seed0").mkdir(parents=True)
    for begun in (None, '["script.py", "--way", "10"]'):
        (experiment / "ten-seed0" / "results.json").write_text('{"trained": {"audio": 99}}')
        if begun:
            (experiment / "ten-seed0" / "command.json").write_text(begun)
        with pytest.raises(UserError, match="another command"):
            reproduce.main(["masking", "--out", str(experiment), "--seeds", "0"])
    assert not (experiment / "order.txt").exists()


@pytest.mark.parametrize("flags, says", [(["masking", "--fresh"], "decides that itself"), (["masking", "--data=folder"], "decides"),
                                         (["masking", "--out", __file__], "cannot be made")])
def test_what_an_experiment_cannot_take_is_refused(flags, says):
    with pytest.raises(UserError, match=says):
        reproduce.main(flags)


def test_a_bad_flag_ends_the_command_with_a_sentence():
    done = command([sys.executable, str(ROOT / "reproduce.py"), "masking", "--fresh"], ROOT)
    assert done.returncode == 2 and "error: --fresh: an experiment decides that itself" in done.stderr and "Traceback" not in done.stderr


# --- the four methods side by side: runs that are finished elsewhere, and probes after the training ---

FLAGS = ["--size", "nano", "--steps", "4"]
TRAIN = """
import json, pathlib, shutil, sys
script, flags = pathlib.Path(sys.argv[0]), dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, seed = pathlib.Path(flags["--out"]), float(flags["--seed"])
with open(script.parent / "order.txt", "a") as f: f.write(f"{script.stem}{seed:.0f}\\n")
shutil.copy(script.with_suffix(".pt"), out / "latest.pt")
(out / "log.jsonl").write_text('{"step": 1, "ms_step": 3000}\\n{"step": 3, "ms_step": 9000}\\n')
(out / "results.json").write_text(json.dumps({
    "trained": {"audio": 50 + seed}, "untrained": {"audio": 20.0}, "raw input": {"audio": 30.0}, "chance": {"audio": 12.5}, "seconds": 90}))
"""
PROBE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[-8::2], sys.argv[-7::2])) | {word: sys.argv[n + 1] for n, word in enumerate(sys.argv[:-1])}
run, key, baseline = pathlib.Path(flags["--ckpt"]), flags["--modality"], flags.get("--baseline")
here = pathlib.Path(sys.argv[0]).parent
with open(here / "order.txt", "a") as f: f.write(f"{run.name}:{key}:{baseline}\\n")
if (here / "broken.txt").is_file() and (here / "broken.txt").read_text() == key: sys.exit("this probe is broken")
row = {**json.loads((here / "row.json").read_text()), "modality": key, "baseline": baseline, "value": 40.0 if baseline else 80.0}
row["view_seconds"] = {"ajepa": 3.84, "mjepa": 1.28 if key == "video" else 1.92}["mjepa" if "mjepa" in run.name else "ajepa"]
with open(run / "probe.jsonl", "a") as f: f.write(json.dumps(row) + "\\n")
"""
ROW = {"data": "toy", "probe": "attentive", "head": "attentive", "absent": "drop", "encoder": None, "layers": None, "views": 4,
       "epochs": 250, "lrs": [0.001, 0.01], "seed": 0, "step": 4, "seconds": 30}


def build(method, recipe):
    """The script's own model of a recipe, after a step of its optimiser. Returns (model, content of its checkpoint)."""
    module = {"ajepa": ajepa, "mjepa": mjepa}[method]
    inputs = module.make_inputs(recipe)
    config = module.encoder_config(recipe, inputs)
    what = recipe["loss"] if method == "ajepa" else mjepa.TERMS[recipe["terms"]]
    model = ajepa.AJEPA(config, recipe["pred_dim"], recipe["pred_depth"], what) if method == "ajepa" else \
        mjepa.MJEPA(config, what, recipe["pred_dim"], recipe["pred_depth"])
    optimizer = torch.optim.AdamW(common.weight_decay_groups(model, 0.05))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    return model, dict(inputs=asdict(inputs), encoder=config, projector=None, weights="context_encoder", model=model.state_dict(),
                       optimizer=optimizer.state_dict())


def save_run(folder, method="ajepa", flags=(), step=4, data_dir=None, **recipe):
    """A finished run of a method, as its script leaves it. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    args, asked = {"ajepa": ajepa, "mjepa": mjepa}[method].get_args([*FLAGS, *flags])
    content = {**build(method, asked)[1], "recipe": {**asked, **recipe}, "args": {**vars(args), "data_dir": data_dir}}
    common.save_checkpoint(folder / "latest.pt", method=method, step=step, steps=4, **content)
    (folder / "log.jsonl").write_text('{"step": 3, "ms_step": 5000}\n')
    results = {"trained": {"audio": 77.0}, "untrained": {"audio": 22.0}, "chance": {"audio": 12.5}, "seconds": 60}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for method in ("ajepa", "mjepa"):
        shutil.move(save_run(folder / method, method) / "latest.pt", folder / f"{method}.pt")
    return folder


@pytest.fixture
def methods(tmp_path, monkeypatch, templates):
    """The experiment of A-JEPA and MJEPA, with scripts and a probe that only write their files. Returns a function that runs it, and
    returns what it started."""
    for method in ("ajepa", "mjepa"):
        (tmp_path / f"{method}.py").write_text(TRAIN), shutil.copy(templates / f"{method}.pt", tmp_path)
    (tmp_path / "probe.py").write_text(PROBE), (tmp_path / "row.json").write_text(json.dumps(ROW))
    now = reproduce.EXPERIMENTS["methods"]
    monkeypatch.setitem(reproduce.EXPERIMENTS, "methods", {**now, "rows": {row: now["rows"][row] for row in ("A-JEPA", "MJEPA")}})
    monkeypatch.setattr(reproduce, "__file__", str(tmp_path / "reproduce.py"))
    reproduce.facts.cache_clear()

    def run(*words, seeds="0"):
        order = tmp_path / "order.txt"
        order.unlink(missing_ok=True)
        reproduce.main(["methods", "--out", str(tmp_path / "runs" / "methods"), "--seeds", *seeds.split(), *FLAGS, *words])
        return order.read_text().split() if order.exists() else []

    return run


def test_the_methods_are_trained_then_probed_and_are_the_columns_of_a_table_of_measures(methods, tmp_path, capsys):
    started = methods(seeds="0 1")
    assert started[:4] == ["ajepa0", "a-jepa-seed0:audio:None", "a-jepa-seed0:audio:untrained", "mjepa0"]
    assert len(started) == len(set(started)) == 2 * (1 + 2 + 1 + 6)
    out = tmp_path / "runs" / "methods"
    text = (out / "table.md").read_text()
    assert "| | A-JEPA | MJEPA |\n|---|---|---|\n| linear probe, audio | 50.5 ± 0.7 (50.0, 51.0) | 50.5 ± 0.7 (50.0, 51.0) |" in text
    assert "| linear probe, audio, raw input | 30.0 ± 0.0 (30.0, 30.0) |" in text and text in capsys.readouterr().out
    assert "| attentive probe, audio + video, untrained | – | 40.0 ± 0.0 (40.0, 40.0) |" in text
    assert "| chance, probes | 12.5 | 12.5 |" in text and "| video tokens of a clip | – | 32 |" in text
    assert "| seconds a step | 6.000 ± 0.000 | 6.000 ± 0.000 |" in text and "| minutes of training | 0.4 ± 0.0 |" in text
    assert "| minutes of evaluation | 1.5 ± 0.0 |" in text and "| minutes of attentive probes | 1.0 ± 0.0 | 3.0 ± 0.0 |" in text
    assert text.endswith("| seeds | 0, 1 | 0, 1 |\n") and (out / "table.png").read_bytes()[:4] == b"\x89PNG"
    cell = json.loads((out / "table.json").read_text())["rows"]["MJEPA"]["attentive probe, video"]
    assert cell == {"values": {"0": 80.0, "1": 80.0}, "mean": 80.0, "std": 0.0}
    assert methods(seeds="0 1") == []


def test_a_finished_run_of_the_same_recipe_is_taken_and_nothing_but_its_probes_is_written_there(methods, tmp_path, capsys):
    for folder, method in (("ajepa-toy-seed0", "ajepa"), ("cross-modal/all-nine-mjepa-seed0", "mjepa")):
        save_run(tmp_path / "runs" / folder, method)
    before = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    assert methods("--dry-run") == []
    shown = capsys.readouterr().out
    assert f"A-JEPA, seed 0: takes {tmp_path}/runs/ajepa-toy-seed0, which is finished" in shown and "all-nine-mjepa-seed0, which" in shown
    assert shown.count("left: ") == 8 and "left: MJEPA, seed 0, attentive probe, video, untrained: probe.py" in shown
    assert len(methods()) == 8 and not [word for word in methods() if ":" not in word]
    new = {file for file in (tmp_path / "runs").rglob("*") if file.is_file() and "methods" not in file.parts} - before.keys()
    assert {file.name for file in new} == {"probe.jsonl"} and all(file.read_bytes() == was for file, was in before.items())
    table = json.loads((tmp_path / "runs" / "methods" / "table.json").read_text())
    assert table["rows"]["MJEPA"]["linear probe, audio"]["mean"] == 77 and table["versions"] == [common.code_version()]
    assert str(tmp_path / "runs" / "ajepa-toy-seed0") in table["taken"].values()


@pytest.mark.parametrize("how", [dict(flags=["--seed", "1"]), dict(flags=["--lr", "1e-3"]), dict(step=3), dict(method="mjepa"), "results",
                                 "no checkpoint", dict(init="another.pt"), dict(flags=["--data-dir", "elsewhere"])])
def test_a_run_of_another_recipe_or_method_or_that_is_not_finished_is_not_taken(methods, tmp_path, how, capsys):
    folder = save_run(tmp_path / "runs" / "it", **(how if isinstance(how, dict) else {}))
    if how == "results":
        (folder / "results.json").write_text('{"trained"')
    if how == "no checkpoint":
        (folder / "latest.pt").write_bytes(b"cut")
    words = ["--data-dir", str(tmp_path)] if how == dict(flags=["--data-dir", "elsewhere"]) else []
    methods("--dry-run", *words)
    assert ("A-JEPA, seed 0: takes" in capsys.readouterr().out) is False


def test_a_run_on_the_same_folder_of_clips_is_taken_and_without_the_flag_its_folder_does_not_matter(methods, tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "runs" / "it", data_dir="toy")
    monkeypatch.chdir(tmp_path)
    for words in (["--data-dir", str(tmp_path / "toy")], []):
        methods("--dry-run", *words)
        shown = capsys.readouterr().out
        assert "A-JEPA, seed 0: takes" in shown and ("--data-dir" in shown.split("left: ")[1]) == bool(words)


def test_a_row_of_any_experiment_takes_a_finished_run(tmp_path, capsys):
    save_run(tmp_path / "runs" / "mjepa-toy-seed0", "mjepa")
    reproduce.main(["cross-modal", "--out", str(tmp_path / "runs" / "cross-modal"), "--seeds", "0", "--dry-run", *FLAGS])
    shown = capsys.readouterr().out
    assert "all nine, seed 0: takes" in shown and "1 of 5 runs finished" in shown and shown.count("takes") == 1


def test_what_only_main_settles_may_be_open_in_the_recipe_that_is_asked_for_and_nothing_else():
    args, recipe = reproduce.asked(["avjepa_ncsu.py"])
    content = {"method": "avjepa_ncsu", "step": 1000, "steps": 1000, "args": vars(args), "recipe": {**recipe, "schedule": 1000}}
    assert reproduce.same_run(content, ["avjepa_ncsu.py"]) and not reproduce.same_run({**content, "method": "mjepa"}, ["avjepa_ncsu.py"])
    assert not reproduce.same_run({**content, "recipe": {**recipe, "schedule": 1000, "clips": 100}}, ["avjepa_ncsu.py"])


def test_probes_that_are_there_are_not_run_again_and_those_that_are_missing_are(methods, tmp_path):
    folder = save_run(tmp_path / "runs" / "ajepa-toy-seed0")
    good = {**ROW, "modality": "audio", "baseline": None, "view_seconds": 3.84, "value": 91.0}
    other = [{**good, **change, "value": 1.0} for change in (
        {"step": 3}, {"head": "blocks"}, {"lrs": [0.001]}, {"views": 1}, {"epochs": 1}, {"seed": 1}, {"data": "esc50"}, {"probe": "linear"},
        {"absent": "zero"}, {"view_seconds": 1.0}, {"layers": [1]}, {"encoder": "target"}, {"modality": "video"})]
    (folder / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [good, *other]) + '{"cut\n')
    assert [word for word in methods() if word.startswith("ajepa")] == ["ajepa-toy-seed0:audio:untrained"]
    table = json.loads((tmp_path / "runs" / "methods" / "table.json").read_text())["rows"]["A-JEPA"]
    assert table["attentive probe, audio"]["mean"] == 91 and table["minutes of attentive probes"]["mean"] == 1


def test_a_probe_that_fails_is_named_and_the_others_go_on_and_the_next_call_tries_it_again(methods, tmp_path, capsys):
    (tmp_path / "broken.txt").write_text("video")
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        methods()
    shown = capsys.readouterr().out
    assert "MJEPA, seed 0, attentive probe, video, trained failed (exit code 1)" in shown and "A-JEPA, seed 0, attentive probe" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown and "| minutes of attentive probes | 1.0 | – |" in shown
    (tmp_path / "broken.txt").unlink()
    assert methods() == ["mjepa-seed0:video:None", "mjepa-seed0:video:untrained"]


def test_a_training_that_fails_is_not_probed(methods, tmp_path, capsys):
    (tmp_path / "ajepa.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="1 of 2 runs did not finish"):
        methods()
    assert "A-JEPA, seed 0 failed (exit code 3)" in capsys.readouterr().out and "a-jepa" not in (tmp_path / "order.txt").read_text()


def test_seconds_a_step_and_minutes_are_those_of_a_slow_loop_over_the_steps():
    log = [{"step": 9, "ms_step": 100.0}, {"step": 19, "ms_step": 300.0}, {"step": 24, "ms_step": 200.0}, {"step": 26, "ms_step": 50.0}]
    milliseconds, row = 0.0, 0
    for step in range(27):
        row += step > log[row]["step"]
        milliseconds += log[row]["ms_step"]
    np.testing.assert_allclose(reproduce.step_times(log), [0.150, milliseconds / 60_000])
    assert reproduce.step_times([]) == (None, None)


@pytest.mark.parametrize("method", ["ajepa", "mjepa"])
def test_the_parameters_are_those_that_the_model_trains_without_teacher_and_buffers(method, tmp_path):
    folder = save_run(tmp_path / method, method)
    model, sizes = build(method, common.load_checkpoint(folder)["recipe"])[0], reproduce.facts(folder)["sizes"]
    assert sizes["parameters trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes["parameters of the encoder"] == sum(p.numel() for p in model.context_encoder.parameters())
    tokens = {m: sizes.get(f"{m} tokens of a clip") for m in ("video", "audio")}
    assert tokens == ({"video": None, "audio": 96} if method == "ajepa" else {"video": 32, "audio": 48})


def test_the_row_of_the_real_probe_is_the_one_that_is_looked_for(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (8, 2))
    folder = save_run(tmp_path / "run", "mjepa")
    run = {"command": ["mjepa.py", *FLAGS, "--data-dir", str(toy), "--workers", "0"], "folder": folder,
           "after": [f"{reproduce.ATTENTIVE} audio", f"{reproduce.ATTENTIVE} video --baseline untrained"]}
    for words in reproduce.probes(run):
        assert reproduce.probed(run, words) is None
        probe.main(words[1:])
        assert reproduce.probed(run, words)["value"] >= 0
