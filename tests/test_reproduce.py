"""An experiment runs what is missing, goes on where it stopped, and its table is the mean and the spread of its runs."""
import json, os, signal, subprocess, sys, time

import ajepa, common, reproduce
from common import UserError
from conftest import ROOT

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

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


def test_a_signal_saves_the_run_under_way_which_the_next_call_then_ends(toy, tmp_path):
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
    ajepa.main([*json.loads((folder / "command.json").read_text())["command"][1:]])                # what the next call does first
    assert [row["step"] for row in common.read_log(folder)] == list(range(60))         # nothing twice, nothing left out
    assert "left: random" not in subprocess.run([*words, "--dry-run"], env=env, capture_output=True, text=True).stdout


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
    done = subprocess.run([sys.executable, str(ROOT / "reproduce.py"), "masking", "--fresh"], capture_output=True, text=True)
    assert done.returncode == 2 and "error: --fresh: an experiment decides that itself" in done.stderr and "Traceback" not in done.stderr
