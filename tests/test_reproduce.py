"""An experiment runs what is missing, goes on where it stopped; its table is mean and spread of its runs."""
import importlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, weights, write_checkpoint
from test_probe import full_disk

import common
import data
import mjepa
import probe
import reproduce
import run

SCRIPT = """
import json, os, pathlib, shutil, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here, out = pathlib.Path(sys.argv[0]).parent, pathlib.Path(flags["--out"])
with open(here / "order.txt", "a") as f: f.write(out.name + "\\n")
if flags["--way"] == flags.get("--broken"): sys.exit("this way is broken")
if flags["--way"] == flags.get("--stop") and not (out / "latest.pt").is_file():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait([signal.SIGTERM])
    time.sleep(0.2)
    (out / "latest.pt").touch()
    sys.exit(0)
time.sleep(float(flags.get("--sleep", 0)))
value = float(flags["--way"]) + float(flags["--seed"]) ** 2
trained = {"audio": value, **({"video": float(flags["--video"])} if "--video" in flags else {})}
if (here / flags["--way"]).is_dir(): shutil.copy(here / flags["--way"] / "latest.pt", out)
(out / "log.jsonl").write_text('{"step": 1, "ms_step": 3000}\\n{"step": 5, "ms_step": 9000}\\n')
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
line = json.dumps(row).encode()
odd = here / "line.txt"
if odd.is_file() and (key, baseline) == ("video", None): line = odd.read_bytes()
with open(folder / "probe.jsonl", "ab") as f: f.write(line + b"\\n")
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
    methods = {**reproduce.EXPERIMENTS["methods"], "rows": rows, "after": after}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"masking": small, "methods": methods})

    def start(*more, name="masking", seeds="0"):
        for way in ("10", "20") if name == "methods" else ():
            content = weights(write_checkpoint(tmp_path / way, video=way == "20"))
            content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(1234)}}}
            torch.save(content, tmp_path / way / "latest.pt")
        (tmp_path / "order.txt").write_text("")
        reproduce.main([name, "--out", str(tmp_path / "out"), "--seeds", *seeds.split(), *more])
        return started(tmp_path)

    return start


def started(tmp_path):
    return (tmp_path / "order.txt").read_text().split()


def table(tmp_path):
    """(table.md, the rows of table.json)"""
    content = json.loads((tmp_path / "out/table.json").read_text())
    return (tmp_path / "out/table.md").read_text(), content["rows"]


def test_each_row_runs_once_for_each_seed_and_the_table_is_their_mean_and_spread(start, tmp_path, capsys):
    order = start(seeds="0 1 3")
    assert order[:2] == BOTH and len(order) == len(set(order)) == 6
    text, rows = table(tmp_path)
    for row, base in (("ten", 10), ("twenty and more", 20)):
        values = np.array([base, base + 1, base + 9])
        cell = rows[row]["audio"]
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


def test_what_is_finished_is_skipped_and_what_is_missing_or_cut_off_is_run(start, tmp_path, capsys):
    assert start() == BOTH
    assert "| ten | 10.0 | 0 |" in table(tmp_path)[0]                   # one seed has no spread
    assert start(seeds="0 2") == ["ten-seed2", "twenty-and-more-seed2"]
    assert "2 of 4 runs finished" in capsys.readouterr().out
    assert list(table(tmp_path)[1]["ten"]["audio"]["values"]) == ["0", "2"]
    (tmp_path / "out/ten-seed0/results.json").write_text('{"trained": {"aud')
    assert start(seeds="0 2") == ["ten-seed0"]


def test_a_run_that_fails_is_named_and_not_probed_the_others_go_on_and_the_next_call_tries_it_again(
        start, tmp_path, capsys):
    fails(start, "--broken", "10", name="methods", match="1 of 2 runs did not finish")
    shown = capsys.readouterr().out
    assert "ten, seed 0 failed (exit code 1)" in shown and "| linear probe, audio | 20.0 |" in shown
    assert "this way is broken" in (tmp_path / "out/ten-seed0/output.txt").read_text()
    fails(start, "--broken", "10", name="methods")
    assert started(tmp_path) == ["ten-seed0"]


def test_runs_of_another_or_no_command_are_refused_but_not_those_that_never_began(start, tmp_path):
    fails(start, "--sleep", "much", match="no run of masking")
    assert start() == BOTH
    fails(start, "--sleep", "0", match="another command")
    assert started(tmp_path) == []
    (tmp_path / "out/ten-seed0/command.json").unlink()
    fails(start, match="another command")
    assert started(tmp_path) == []


def test_a_row_keeps_its_own_flags_and_a_folder_may_move(start, tmp_path):
    start("--way", "5")
    assert table(tmp_path)[1]["ten"]["audio"]["values"] == {"0": 10}
    (tmp_path / "out").rename(tmp_path / "moved")
    assert start("--way", "5", "--out", str(tmp_path / "moved")) == []


@pytest.mark.parametrize("flags, says", [
    (["--fresh"], "decides that itself"), (["--data=folder"], "decides that itself"),
    (["--seed", "3"], "decides that itself"),
    (["--out", __file__], "cannot be made .*; give another --out"),
    (["--out", f"{__file__}/x"], "cannot be made"), (["--out", 300 * "x"], "cannot be made"),
    (["--seeds", "-1"], "--seeds -1 is out of range"), (["--seeds", "0", "99999999999"], "out of range"),
    (["--seeds", "0", "1", "0"], "--seeds: 0 is given twice"),
    (["--workers", "-1"], "--workers -1 is out of range"), (["--device", "gpu"], "--device gpu")])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_an_experiment_cannot_take_is_refused_before_a_run_begins(
        flags, says, dry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "launch", None)
    fails(reproduce.main, ["masking", *dry, *flags], match=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--seeds", "²"], ["--seeds", "nan"], ["--seeds"], ["--workers", "two"]])
def test_what_is_no_number_is_refused_by_the_parser(flags, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(["masking", *flags])
    assert end.value.code == 2 and f"error: argument {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("line", [
    b"", b"[1]", b'{"modality": "video"}', b"\xff",
    b'{"modality": "video", "baseline": [], "value": 1, "seconds": 1}',
    b'{"modality": "video", "baseline": null, "value": "1", "seconds": 1}'])
def test_only_a_whole_row_of_a_probe_counts(line, tmp_path):
    file = tmp_path / "probe.jsonl"
    row = {"modality": "video", "baseline": None, "value": 80.0, "seconds": 30}
    file.write_bytes(line + b"\n" + json.dumps(row).encode() + b"\n")
    assert reproduce.last_row(file) == row
    file.write_bytes(json.dumps(row).encode() + b"\n" + line + b"\n")
    assert reproduce.last_row(file) is None


def test_a_broken_row_of_a_probe_is_a_probe_that_is_missing(start, tmp_path, capsys):
    (tmp_path / "line.txt").write_text('{"modality": "video", "value": 8')
    fails(start, name="methods", match="1 of 2 runs did not finish")
    shown = capsys.readouterr().out
    assert "attentive probe, video, trained was stopped before its end" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown
    (tmp_path / "line.txt").unlink()
    assert start(name="methods") == [f"{BOTH[1]}:video:None"]


def test_broken_files_of_a_run_are_as_good_as_none(start, tmp_path):
    start(name="methods")
    ten, twenty = [tmp_path / "out" / name for name in BOTH]
    (ten / "probes.json").write_text('{"a": 1, "' + reproduce.attentive("audio")[0] + '": [1]}')
    assert start(name="methods") == [f"{BOTH[0]}:audio:None", f"{BOTH[0]}:audio:untrained"]
    results = json.loads((twenty / "results.json").read_text())
    results.update(trained=[1], untrained={"audio": "5"})
    (twenty / "results.json").write_text(json.dumps(results))
    with open(twenty / "log.jsonl", "a") as f:
        f.write('{"step": 9}\n')
    assert start(name="methods") == []
    assert "| linear probe, audio | 10.0 | – |" in table(tmp_path)[0]
    for content in ('{"command": 3}', "[]", '{"command": ["x"], "versions": null}'):
        (ten / "command.json").write_text(content)
        fails(start, name="methods", match="holds a run of another command; give another --out, or remove it")


def test_a_full_disk_is_a_sentence_and_the_older_table_stays_whole(start, tmp_path, capsys):
    start()
    files = [tmp_path / "out" / name for name in ("table.json", "table.md", "table.png")]
    before = [file.read_bytes() for file in files]
    with full_disk(60):                                 # less than any of the three
        fails(start, match="out.*: cannot be written .*File too large.*; the same command goes on")
    assert before == [file.read_bytes() for file in files]
    (tmp_path / "out" / "ten-seed4").touch()            # where a folder has to be
    fails(start, seeds="0 4", match="ten-seed4: cannot be written .*File exists")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *BOTH, "ten-seed4", *(file.name for file in files)}


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_the_scripts_take_the_commands_of_each_experiment(name, tmp_path):
    for it in reproduce.plan(reproduce.EXPERIMENTS[name], [0], tmp_path, ["--workers", "0"], []):
        for script, *flags in (it["command"], *it["probes"].values()):
            importlib.import_module(Path(script).stem).get_args(flags)


def test_a_signal_reaches_the_run_under_way_which_saves_and_the_next_call_goes_on(start, tmp_path, handlers):
    with pytest.raises(SystemExit) as end:
        common.main_guard(lambda: start("--stop", "10"))
    assert end.value.code == 128 + signal.SIGTERM
    assert started(tmp_path) == BOTH[:1] and (tmp_path / "out/ten-seed0/latest.pt").is_file()
    assert start("--stop", "10") == BOTH and start("--stop", "10") == []


def test_rows_are_trained_then_probed_and_are_the_columns_of_a_table_of_measures(start, tmp_path, capsys):
    assert start("--dry-run", name="methods", seeds="0 1 2") == [] and not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert shown.count("left: ") == 6 and "then 6 probes of it" in shown
    order = start("--workers", "1", name="methods", seeds="0 1")
    assert order[:4] == ["ten-seed0", "ten-seed0:audio:None", "ten-seed0:audio:untrained", BOTH[1]]
    assert len(order) == len(set(order)) == 2 * (1 + 2 + 1 + 6)
    text, rows = table(tmp_path)
    assert text in capsys.readouterr().out and text.endswith("| seeds | 0, 1 | 0, 1 |\n")
    for line in ("| | ten | twenty and more |\n|---|---|---|\n"
                 "| linear probe, audio | 10.5 ± 0.7 (10.0, 11.0) | 20.5 ± 0.7 (20.0, 21.0) |\n",
                 "| linear probe, audio, raw input | 30.0 ± 0.0 (30.0, 30.0) |",
                 "| attentive probe, audio + video, untrained | – | 40.0 ± 0.0 (40.0, 40.0) |",
                 "| chance, probes | 12.5 | 12.5 |", "| video tokens of a clip | – | 4 |",
                 "| parameters trained | 1,234 | 1,234 |",
                 "| seconds a step | 6.000 ± 0.000 | 6.000 ± 0.000 |",
                 "| minutes of training | 0.7 ± 0.0 |",             # two steps of 3 s and four of 9 s
                 "| minutes of evaluation | 1.5 ± 0.0 |",
                 "| minutes of attentive probes | 1.0 ± 0.0 | 3.0 ± 0.0 |"):
        assert line in text
    fig = reproduce.draw(reproduce.EXPERIMENTS["methods"], rows)
    assert [ax.get_title() for ax in fig.axes] == list(reproduce.EXPERIMENTS["methods"]["panels"])
    assert sorted(bar.get_height() for bar in fig.axes[1].patches) == [80] * 4
    drawn = {tuple(line.get_ydata()) for line in fig.axes[1].lines if line.get_marker() == "None"}
    assert {(40, 40), (12.5, 12.5)} <= drawn                            # untrained, and chance
    assert start("--workers", "1", name="methods", seeds="0 1") == []


def test_a_probe_that_fails_or_is_missing_is_named_and_alone_run_again(start, tmp_path, capsys):
    (tmp_path / "broken.txt").write_text("video")
    fails(start, name="methods", match="1 of 2 runs did not finish")
    shown = capsys.readouterr().out
    assert "twenty and more, seed 0, attentive probe, video, trained failed (exit code 1)" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown
    assert "| minutes of attentive probes | 1.0 | – |" in shown
    (tmp_path / "broken.txt").unlink()
    with open(tmp_path / "out" / BOTH[1] / "probe.jsonl", "a") as f:    # of another probe: does not count
        f.write('{"modality": "video", "baseline": null, "value": 1.0, "seconds": 1}\n')
    assert start(name="methods") == [f"{BOTH[1]}:video:None", f"{BOTH[1]}:video:untrained"]
    assert table(tmp_path)[1]["twenty and more"]["attentive probe, video"]["mean"] == 80


def test_a_real_run_is_probed_and_measured(toy, tmp_path, monkeypatch):
    """The scripts themselves, in this process."""
    def launch(it, step):
        script, *flags = it["command"] if step == reproduce.TRAIN else it["probes"][step]
        importlib.import_module(Path(script).stem).main(flags)

    monkeypatch.setattr(reproduce, "launch", lambda it, step: launch(it, step) or 0)
    monkeypatch.setattr(run, "draw_curves", lambda *_: None)
    report = tmp_path / "out/it-seed0/results.json"
    monkeypatch.setattr(probe, "toy_report", lambda *_: report.write_text('{"chance": {"audio": 12.5}}'))
    monkeypatch.setattr(probe, "schedule", lambda protocol, clips: (8, 3))      # not 2,000 steps
    one = dict(rows={"it": "mjepa.py --size nano"}, after={"it": reproduce.attentive("video")})
    monkeypatch.setitem(reproduce.EXPERIMENTS, "methods", {**reproduce.EXPERIMENTS["methods"], **one})
    words = ["methods", "--out", str(tmp_path / "out"), "--data-dir", str(toy),
             *"--seeds 0 --steps 2 --batch-size 4 --workers 0 --device cpu".split()]
    reproduce.main(words)
    values = {column: cell["mean"] for column, cell in table(tmp_path)[1]["it"].items()}
    assert all(0 <= values[f"attentive probe, video{which}"] <= 100 for which in ("", ", untrained"))
    assert values["minutes of attentive probes"] >= 0 and values["seconds a step"] > 0
    content = weights(tmp_path / "out/it-seed0")
    model = mjepa.make_model(content["recipe"], data.Inputs(**content["inputs"]))
    trained = [p for p in model.parameters() if p.requires_grad]            # neither teacher nor buffers
    assert values["parameters trained"] == sum(p.numel() for p in trained)
    assert values["parameters of the encoder"] == sum(p.numel() for p in model.context_encoder.parameters())
    assert values["video tokens of a clip"] == 32 and values["audio tokens of a clip"] == 24
    assert reproduce.step_times([]) == (None, None)
