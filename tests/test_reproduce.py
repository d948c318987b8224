"""An experiment runs what is missing, goes on where it stopped; its table is mean and spread of its runs."""
import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails, weights, write_checkpoint
from test_probe import full_disk

import common
import data
import experiments
import mjepa
import probe
import reproduce
import run
import tables

SCRIPT = """
import json, os, pathlib, shutil, signal, sys, time
began = time.time()
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
here, out = pathlib.Path(sys.argv[0]).parent, pathlib.Path(flags["--out"])
with open(here / "order.txt", "a") as f: f.write(out.name + "\\n")
if flags["--way"] == flags.get("--broken"): sys.exit("this way is broken")
if flags["--way"] == flags.get("--stop") and not (out / "latest.pt").is_file():
    while len((here / "order.txt").read_text().split()) < int(flags.get("--others", 0)): time.sleep(0.01)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.kill(os.getppid(), signal.SIGTERM)
    signal.sigwait([signal.SIGTERM])
    time.sleep(0.2)
    (out / "latest.pt").touch()
    sys.exit(0)
time.sleep(float(flags.get("--sleep", 0)))
value = float(flags["--way"]) + float(flags["--seed"]) ** 2
trained = {"audio": value, **({"video": float(flags["--video"])} if "--video" in flags else {})}
if flags["--data"] != "toy": shutil.copy(here / "done.pt", out / "latest.pt")
if (here / flags["--way"]).is_dir(): shutil.copy(here / flags["--way"] / "latest.pt", out)
(out / "log.jsonl").write_text('{"step": 1, "ms_step": 3000}\\n{"step": 5, "ms_step": 9000}\\n')
print("1,206 steps of 64 clips, bf16")
(out / "device.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
(out / "times.txt").write_text(f"{began} {time.time()}")
if flags["--data"] != "toy": sys.exit()
(out / "results.json").write_text(json.dumps({
    "trained": trained, "untrained": {"audio": 5.0}, "raw input": {"audio": 30.0}, "chance": {"audio": 12.5},
    "seconds": 90}))
"""
PROBE = """
import json, pathlib, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
key, baseline, here = flags.get("--modality"), flags.get("--baseline"), pathlib.Path(sys.argv[0]).parent
folder, broken = pathlib.Path(flags["--ckpt"]), here / "broken.txt"
head = "attentive" if "attentive" in flags else "standardised"
with open(here / "order.txt", "a") as f: f.write(f"{folder.name}:{key}:{baseline}\\n")
if broken.is_file() and broken.read_text() == key: sys.exit("this probe is broken")
row = {"head": head, "tested": key, "value": 40.0 if baseline else 80.0, "seconds": 30, "step": 3}
row["data"] = flags["--data"]
line = json.dumps(row).encode()
odd = here / "line.txt"
if odd.is_file() and (key, baseline) == ("video", None): line = odd.read_bytes()
with open(folder / "probe.jsonl", "ab") as f: f.write(line + b"\\n")
"""
STEP = f"{experiments.QUICK} --modality video"
BOTH = ["ten-seed0", "twenty-and-more-seed0"]


ENTRY = dict(flags="", after={}, only={}, formats={}, paper={}, source="", against={}, turned=False)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that runs an experiment of two rows, whose runs write 10 (or 20) plus the seed squared and
    whose probes 80 (or 40 untrained), and gives what it started. The first row is of sound alone."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "probe.py").write_text(PROBE)
    torch.save(dict(step=3, steps=3), tmp_path / "done.pt")
    monkeypatch.setattr(reproduce, "__file__", str(tmp_path / "reproduce.py"))
    rows = {"ten": "script.py --way 10", "twenty and more": "script.py --way 20"}
    small = dict(title="What: of what", columns={"audio": "trained/audio"}, rows=rows)
    methods = {**reproduce.EXPERIMENTS["methods"], "rows": rows, "only": {"ten": "audio"}}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"small": small, "methods": methods})
    module = SimpleNamespace(get_args=lambda words: words, RECIPE={"steps": (9, 9)})
    monkeypatch.setitem(sys.modules, "script", module)

    def start(*more, name="small", seeds="0"):
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
    now = reproduce.EXPERIMENTS["small"]
    now["columns"] = {"video": "trained/video", "raw": "raw input/A->V/R@1", "audio": "trained/audio",
                      "audio, untrained": "untrained/audio"}
    now["rows"] = {**now["rows"], "twenty and more": "script.py --way 20 --video 3"}
    start(seeds="0 1")
    text, rows = table(tmp_path)
    assert "| ten | – | – | 10.5 ± 0.7 (10.0, 11.0) | 5.0 ± 0.0 (5.0, 5.0) | 0, 1 |" in text
    assert "| twenty and more | 3.0 ± 0.0 (3.0, 3.0) | – | 20.5 ± 0.7 (20.0, 21.0) |" in text
    assert list(rows["ten"]) == ["audio", "audio, untrained"]
    ax, = tables.draw({**ENTRY, **now}, rows).axes
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
    assert "ten, seed 0 failed (exit code 1)" in shown and "| linear probe, audio | – | 20.0 |" in shown
    assert "this way is broken" in (tmp_path / "out/ten-seed0/output.txt").read_text()
    fails(start, "--broken", "10", name="methods")
    assert started(tmp_path) == ["ten-seed0"]


def test_runs_of_another_or_no_command_are_refused_but_not_those_that_never_began(start, tmp_path):
    fails(start, "--sleep", "much", match="no run of small")
    assert start() == BOTH
    fails(start, "--sleep", "0", match="another command")
    assert started(tmp_path) == []
    (tmp_path / "out/ten-seed0/command.json").unlink()
    fails(start, match="another command")
    assert started(tmp_path) == []


def test_a_folder_may_move_and_the_machine_may_be_another(start, tmp_path):
    reproduce.EXPERIMENTS["small"].update(after={"x": ["probe.py --modality av --out {run}/x"]})
    assert len(start("--data", "folder", "--data-dir", "clips")) == 2 * 3      # each with two steps
    (tmp_path / "out").rename(tmp_path / "moved")
    clips = str(Path("clips").resolve())
    again = ["--out", str(tmp_path / "moved"), "--workers", "1", "--device", "cpu"]
    assert start("--data", "folder", "--data-dir", clips, *again) == []


@pytest.mark.parametrize("name, flags, says", [
    ("ajepa-loss", "--loss l2", "--loss"),
    ("ncsu-sizes", "--size tiny", "--size"), ("avjepa-components", "--local none", "--local"),
    ("avjepa-components", "--lam 0.5", "--lam"), ("avjepa-components", "--absent drop", "--absent")])
def test_a_flag_that_tells_the_rows_apart_is_refused_and_one_of_all_rows_is_replaced(name, flags, says):
    fails(planned, name, *flags.split(), match=f"{says}: rows of {name} set it themselves; leave it out")
    _, runs = planned("ajepa-loss", "--steps", "7")
    assert all(words_after(it["command"], "--steps")[-1] == "7" for it in runs)


def words_after(words, flag):
    return [word for before, word in zip(words, words[1:]) if before == flag]


@pytest.mark.parametrize("flags, says", [
    (["--fresh"], "decides that itself"), (["--resume=auto"], "decides that itself"),
    (["--seed", "3"], "decides that itself"), (["--data", "tous"], "--data tous: not a data set"),
    (["--row", "blocks"], "--row blocks: .* no such row, but random-patches-75, "),
    (["--places", "ids=x"], "--places ids=x: not NAME=PATH; names of ajepa-masking: none"),
    (["--places", "ids"], "--places ids: not NAME=PATH"),
    (["--ckpt", "runs/x"], "--ckpt has no effect on ajepa-masking"), (["--jobs", "0"], "out of range"),
    (["--jobs", "2", "--launch", "torchrun"], "with --launch a run has all devices"),
    (["--out", __file__], "cannot be made .*; give another --out"),
    (["--out", f"{__file__}/x"], "cannot be made"), (["--out", 300 * "x"], "cannot be made"),
    (["--seeds", "-1"], "--seeds -1 is out of range"), (["--seeds", "0", "99999999999"], "out of range"),
    (["--seeds", "0", "1", "0"], "--seeds: 0 is given twice"),
    (["--workers", "-1"], "--workers -1 is out of range"), (["--device", "gpu"], "--device gpu"),
    (["--probe-data", "esc50"], "--probe-data esc50: has no effect")])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_an_experiment_cannot_take_is_refused_before_a_run_begins(
        flags, says, dry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "launch", None)
    fails(reproduce.main, ["ajepa-masking", *dry, *flags], match=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--seeds", "²"], ["--seeds", "nan"], ["--seeds"], ["--workers", "two"]])
def test_what_is_no_number_is_refused_by_the_parser(flags, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(["ajepa-masking", *flags])
    assert end.value.code == 2 and f"error: argument {flags[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("line", [
    b"", b"[1]", b'{"tested": "video"}', b"\xff",
    b'{"head": "linear", "tested": [], "value": 1, "seconds": 1, "step": 1}',
    b'{"head": "linear", "tested": "av", "value": "1", "seconds": 1, "step": 1}',
    b'{"tested": "av", "value": 1, "seconds": 1, "step": 1}',
    b'{"head": "linear", "tested": "av", "seconds": 1, "step": 1}'])
def test_only_whole_rows_of_a_step_count(line, tmp_path):
    file = tmp_path / "probe.jsonl"
    row = {"head": "linear", "tested": "video", "value": 80.0, "seconds": 30, "step": 5}
    file.write_bytes(line + b"\n")
    before = file.stat().st_size
    with open(file, "ab") as f:
        f.write(json.dumps(row).encode() + b"\n")
    assert tables.new_rows(file, before, []) == [row] and tables.new_rows(file, 0, []) == []


@pytest.mark.parametrize("other", [
    {"data": "esc50"}, {"baseline": "untrained"}, {"modality": "av"}, {"untrained": True}])
def test_a_row_that_another_probe_writes_meanwhile_does_not_count(other, tmp_path):
    words = "probe.py --modality video --data toy --ckpt x".split()
    row = {"head": "linear", "tested": "video", "value": 80.0, "seconds": 30, "step": 5, "data": "toy",
           "modality": "video", "baseline": None}
    file = tmp_path / "probe.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in ({**row, **other}, row)))
    assert tables.new_rows(file, 0, words) == [row]
    file.write_text(json.dumps({**row, **other}))
    assert tables.new_rows(file, 0, words) == []


def test_a_run_that_was_made_longer_by_hand_is_refused(start, tmp_path):
    (tmp_path / "10").mkdir()
    torch.save(dict(step=6, steps=6), tmp_path / "10" / "latest.pt")
    start("--row", "ten")
    assert start("--row", "ten") == []
    torch.save(dict(step=9, steps=9), tmp_path / "out/ten-seed0/latest.pt")
    fails(start, "--row", "ten", match="ten-seed0: its run has been made one of 9 steps since; give another")
    (tmp_path / "out/ten-seed0/latest.pt").unlink()     # to save room
    assert start("--row", "ten") == []


def test_a_broken_row_of_a_probe_is_a_probe_that_is_missing(start, tmp_path, capsys):
    (tmp_path / "line.txt").write_text('{"modality": "video", "value": 8')
    fails(start, name="methods", match="1 of 2 runs did not finish")
    shown = capsys.readouterr().out
    assert "trained: " + STEP + " was stopped before its end" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown
    (tmp_path / "line.txt").unlink()
    assert start(name="methods") == [f"{BOTH[1]}:video:None"]


def test_broken_files_of_a_run_are_as_good_as_none(start, tmp_path):
    start(name="methods")
    ten, twenty = [tmp_path / "out" / name for name in BOTH]
    (ten / "steps.json").write_text('{"a": 1, "' + STEP.replace("video", "audio") + '": [1]}')
    assert start(name="methods") == [f"{BOTH[0]}:audio:None", f"{BOTH[0]}:audio:untrained"]
    results = json.loads((twenty / "results.json").read_text())
    results.update(trained=[1], untrained={"audio": "5"}, seconds="90")
    (twenty / "results.json").write_text(json.dumps(results))
    with open(twenty / "log.jsonl", "a") as f:
        f.write('{"step": 9}\n')
    assert start(name="methods") == []
    assert "| linear probe, audio | 10.0 | – |" in table(tmp_path)[0]
    for content in ('{"command": 3}', "[]", '{"command": [3], "versions": ["x"]}',
                    '{"command": ["x"], "versions": null}'):
        (ten / "command.json").write_text(content)
        fails(start, name="methods", match="another command, see its command.json; give another --out")


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


def planned(name, *flags):
    """(the experiment, its runs of seed 0) by a command line."""
    args, extra = reproduce.get_args([name, "--seeds", "0", "--workers", "0", *flags])
    experiment = reproduce.choose(args)
    return experiment, reproduce.plan(experiment, args, extra)


@pytest.mark.parametrize("flags", ["", "--data vggsound --data-dir vggsound/"])
@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_the_scripts_take_the_commands_of_each_experiment(name, flags, tmp_path):
    flags = flags.split()
    if name == "mjepa-frozen":
        flags += ["--ckpt", str(write_checkpoint(tmp_path / "run"))]
        if "vggsound" in flags:
            sets = ("audioset-20k", "esc50", "fsd50k", "kinetics400", "ssv2")
            flags += ["--places", *(f"{name}={tmp_path}" for name in sets)]
    if name == "avjepa-retrieval":
        flags += ["--places", f"ids={tmp_path}"]
    experiment, runs = planned(name, *flags)
    assert len(runs) == len(experiment["rows"]) and not any(it["lacks"] for it in runs)
    for it in runs:
        for script, *words in ([] if it["ckpt"] else [it["command"]]) + [*it["steps"].values()]:
            importlib.import_module(Path(script).stem).get_args(words)


@pytest.mark.parametrize("recipe", ["paper", "toy"])
@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_what_an_entry_says_of_rows_and_columns_is_of_its_own(name, recipe):
    it = reproduce.choose(SimpleNamespace(experiment=name, recipe=recipe, data="toy"))
    assert not {*(it["against"] or ()), *sum((it["against"] or {}).values(), [])} - {*it["rows"]}
    assert not set(it["only"]) - set(it["rows"]) and not set(it["formats"]) - set(it["columns"])
    assert bool(it["paper"]) == bool(it["source"])
    for row, numbers in it["paper"].items():
        assert row in it["rows"] or recipe == "toy"
        assert not set(numbers) - set(it["columns"])
    for _, columns, chance in tables.panels_of(it).values():
        assert not set(columns) - set(it["columns"]) and chance in (None, *it["columns"])
    folders = [tables.slug(row) for row in it["rows"]]
    assert len(set(folders)) == len(folders)


def test_a_signal_reaches_the_run_under_way_which_saves_and_the_next_call_goes_on(start, tmp_path, handlers):
    with pytest.raises(SystemExit) as end:
        common.main_guard(lambda: start("--stop", "10"))
    assert end.value.code == 128 + signal.SIGTERM
    assert started(tmp_path) == BOTH[:1] and (tmp_path / "out/ten-seed0/latest.pt").is_file()
    assert start("--stop", "10") == BOTH and start("--stop", "10") == []


def test_rows_are_trained_then_probed_and_are_the_columns_of_a_table_of_measures(start, tmp_path, capsys):
    assert start("--dry-run", name="methods", seeds="0 1 2") == [] and not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert shown.count("left: ") == 6 and "then 6 steps on it" in shown
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
                 "| minutes of the probes after | 1.0 ± 0.0 | 3.0 ± 0.0 |"):
        assert line in text
    fig = tables.draw({**ENTRY, **reproduce.EXPERIMENTS["methods"]}, rows)
    assert [ax.get_title() for ax in fig.axes] == list(reproduce.EXPERIMENTS["methods"]["panels"])
    assert sorted(bar.get_height() for bar in fig.axes[1].patches) == [80] * 4
    drawn = {tuple(line.get_ydata()) for line in fig.axes[1].lines if line.get_marker() == "None"}
    assert {(40, 40), (12.5, 12.5)} <= drawn                            # untrained, and chance
    assert start("--workers", "1", name="methods", seeds="0 1") == []


def test_a_probe_that_fails_or_is_missing_is_named_and_alone_run_again(start, tmp_path, capsys):
    (tmp_path / "broken.txt").write_text("video")
    fails(start, name="methods", match="1 of 2 runs did not finish")
    shown = capsys.readouterr().out
    assert f"twenty and more, seed 0, trained: {STEP} failed (exit code 1)" in shown
    assert "| attentive probe, audio + video | – | 80.0 |" in shown
    assert "| minutes of the probes after | 1.0 | – |" in shown
    (tmp_path / "broken.txt").unlink()
    with open(tmp_path / "out" / BOTH[1] / "probe.jsonl", "a") as f:    # of another probe: does not count
        f.write('{"head": "attentive", "tested": "video", "value": 1.0, "seconds": 1, "step": 1}\n')
    assert start(name="methods") == [f"{BOTH[1]}:video:None", f"{BOTH[1]}:video:untrained"]
    assert table(tmp_path)[1]["twenty and more"]["attentive probe, video"]["mean"] == 80


def test_a_real_run_is_probed_and_measured(toy, tmp_path, monkeypatch):
    """The scripts themselves, in this process."""
    def launch(it, step, words, device):
        script, *flags = reproduce.words_of(it, step)
        importlib.import_module(Path(script).stem).main(flags)
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(reproduce, "launch", launch)
    drawn = {}
    monkeypatch.setattr(run, "draw_curves", lambda file, runs, title: drawn.update({title: runs}))
    report = tmp_path / "out/it-seed0/results.json"
    monkeypatch.setattr(probe, "toy_report", lambda *_: report.write_text('{"chance": {"audio": 12.5}}'))
    monkeypatch.setattr(probe, "schedule", lambda protocol, clips: (8, 3))      # not 2,000 steps
    quick = f"{experiments.QUICK} --test-every 2"
    after = {**experiments.states(quick, experiments.PICTURE), "search": ["retrieval.py"],
             "kept": ["probe.py --modality audio --ckpt {run}/step-*.pt"]}
    columns = {**reproduce.EXPERIMENTS["methods"]["columns"], "search": "search/V->A/R@5",
               "step {step:,}": "kept/{step}/audio"}
    curves = {"training": "", "the head's": "attentive-{data}-video/seed0", "none": "attentive-{data}-av"}
    one = dict(rows={"it": "mjepa.py --size nano --keep-every 1"}, only={}, after=after, columns=columns,
               curves=curves)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "methods", {**reproduce.EXPERIMENTS["methods"], **one})
    words = ["methods", "--out", str(tmp_path / "out"), "--data-dir", str(toy),
             *"--seeds 0 --steps 2 --batch-size 4 --workers 0 --device cpu".split()]
    reproduce.main(words)
    values = {column: cell["mean"] for column, cell in table(tmp_path)[1]["it"].items()}
    assert all(0 <= values[f"attentive probe, video{which}"] <= 100 for which in ("", ", untrained"))
    assert values["minutes of the probes after"] >= 0 and values["seconds a step"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/it-seed0/probe.jsonl").read_text().splitlines()]
    assert [values["step 1"], values["step 2"]] == [row["value"] for row in rows if row["probe"] == "linear"]
    title = "The four methods: frozen encoders on held-out clips, probes and retrieval (R@10) (toy)"
    assert drawn[f"{title}: training"] == {"it": run.read_log(tmp_path / "out/it-seed0")}
    *_, head = drawn[f"{title}: the head's"]["it"]
    assert head["step"] == 2 and len(head) == 3 and f"{title}: none" not in drawn
    assert (tmp_path / "out/the-head-s.png").is_file() and not (tmp_path / "out/none.png").exists()
    search = json.loads((tmp_path / "out/it-seed0/retrieval.jsonl").read_text())
    assert values["search"] == search["V->A"]["R@5"]
    content = weights(tmp_path / "out/it-seed0")
    model = mjepa.make_model(content["recipe"], data.Inputs(**content["inputs"]))
    trained = [p for p in model.parameters() if p.requires_grad]            # neither teacher nor buffers
    assert values["parameters trained"] == sum(p.numel() for p in trained)
    assert values["parameters of the encoder"] == sum(p.numel() for p in model.context_encoder.parameters())
    assert values["video tokens of a clip"] == 32 and values["audio tokens of a clip"] == 24
    assert tables.step_times([]) == (None, None)


def test_curves_are_of_whole_runs_alone(start, tmp_path, monkeypatch):
    """The log of a head that a training before left lies beside one whose probe fails."""
    drawn = []
    monkeypatch.setattr(run, "draw_curves", lambda file, runs, title: drawn.append(list(runs)))
    reproduce.EXPERIMENTS["small"].update(
        after={"x": ["probe.py --modality video"]}, curves={"head": "head"}, only={"ten": "audio"})
    for name in BOTH:
        (tmp_path / "out" / name / "head").mkdir(parents=True)
        run.append_row(tmp_path / "out" / name / "head" / "log.jsonl", {"step": 1, "loss": 1.0})
    (tmp_path / "broken.txt").write_text("video")
    fails(start, match="1 of 2 runs did not finish")
    (tmp_path / "broken.txt").unlink()
    start()
    assert drawn == [["ten"], ["ten", "twenty and more"]]


def test_the_curve_of_a_row_is_the_mean_of_its_seeds_where_they_all_have_a_step(tmp_path):
    folders = []
    for seed, steps in enumerate([(9, 19, 29), (9, 29, 39), (9, 29)]):
        folders.append(tmp_path / f"seed{seed}")
        folders[-1].mkdir()
        for step in steps:
            row = {"step": step, "loss": step * (seed + 1) ** 2, f"of seed {seed}": 1.0}
            run.append_row(folders[-1] / "log.jsonl", row)
    run.append_row(folders[2] / "log.jsonl", {"step": 29, "loss": 29 * 9})          # written twice
    empty = tmp_path / "none"
    found = tables.curves({"a": [*folders, empty], "b": [empty], "c": folders[:1]}, "")
    assert list(found) == ["a (3 seeds)", "c"] and found["c"] == run.read_log(folders[0])
    assert found["a (3 seeds)"] == [{"step": step, "loss": pytest.approx(step * 14 / 3)} for step in (9, 29)]


@pytest.mark.parametrize("flags, columns", [
    ("", ["step 0", "step 150", "step 1,050"]), ("--data vggsound", ["step 0", "step 300"])])
def test_probes_over_the_steps_have_a_column_for_each_checkpoint_that_is_kept(flags, columns):
    experiment, runs = planned("ncsu-curves", *flags.split())
    kept = [int(column.split()[1].replace(",", "")) for column in columns[1:]]
    kind = "attentive/" if flags else ""
    found = []
    for it in runs:
        values = {f"kept/{step}/{kind}video": step / 100 for step in kept}
        found.append((it["row"], 0, {f"untrained/{kind}video": 1.0, "kept/7/audio": 3, **values}))
    spelt = tables.spell_out(experiment, found)
    assert list(spelt["columns"]) == columns
    assert f"| trained on video | 1.0 | {kept[0] / 100:.1f} |" in tables.markdown(
        spelt, tables.tabulate(spelt, found))
    assert list(tables.spell_out(experiment, [])["columns"]) == ["step 0"]


# ----------------------------------------------------------------------------------------------------------
# Spread, and the paper's numbers
# ----------------------------------------------------------------------------------------------------------

def test_differences_are_those_of_the_same_seeds_and_the_small_ones_are_named():
    rng = np.random.default_rng(0)
    values = {"first": rng.normal(50, 9, 4), "near": rng.normal(50, 9, 4)}
    values["far"] = values["first"] + 5 + rng.normal(0, 1, 4)           # less than the spread of its seeds
    it = {**ENTRY, "rows": dict.fromkeys(values, ""), "columns": {"top-1": "a", "raw": "untrained/b"}}
    found = []
    for seed in range(4):
        for row, numbers in values.items():
            if (row, seed) != ("first", 3):             # the others then lack a pair
                found.append((row, seed, {"a": numbers[seed], "untrained/b": 1}))
    table = tables.tabulate(it, found)
    for row in ("near", "far"):
        pairs = (values[row] - values["first"])[:3]
        cell = table[row]["top-1"]["differences"]["first"]
        np.testing.assert_allclose([cell["mean"], cell["std"]], [pairs.mean(), pairs.std(ddof=1)])
        assert set(cell["values"]) == {0, 1, 2} and "differences" not in table[row]["raw"]
    assert "differences" not in table["first"]["top-1"]
    text, small, single = tables.differences(it, table)
    far = table["far"]["top-1"]["differences"]["first"]
    assert f"| far, against first | {far['mean']:+.1f} ± {far['std']:.1f} |" in text and single == []
    assert small == ["near, against first: top-1"]
    assert "not shown by these seeds: near, against first: top-1." in tables.notes(it, table, {})


def test_a_row_is_compared_with_those_that_its_entry_names_and_two_equal_ones_show_nothing():
    it = {**ENTRY, "rows": dict.fromkeys("abc"), "columns": {"x": "x"}, "against": {"c": ["a", "b"], "b": []}}
    values = {"a": (1, 2), "b": (5, 6), "c": (5, 6)}
    found = [(row, seed, {"x": pair[seed]}) for row, pair in values.items() for seed in (0, 1)]
    text, small, _ = tables.differences(it, tables.tabulate(it, found))
    assert text.splitlines()[2:] == ["| c, against a | +4.0 ± 0.0 |", "| c, against b | +0.0 ± 0.0 |"]
    assert small == ["c, against b: x"]
    text = tables.notes(it, tables.tabulate(it, found[::2]), {})        # of one seed
    assert "not shown: all of these differences." in text
    text = tables.notes(it, tables.tabulate(it, [*found[::2], found[1], found[5]]), {})
    assert "not shown: c, against b: x." in text        # of b there is one seed
    none = {**it, "against": None}
    assert tables.differences(none, tables.tabulate(none, found))[0] == ""


def test_the_matched_rows_are_compared():
    def choose(name, recipe):
        return reproduce.choose(SimpleNamespace(experiment=name, recipe=recipe, data="toy"))

    terms = choose("mjepa-terms", "paper")
    for row in ("all nine", "and A<->V across"):
        assert tables.others(terms, row) == ["shared, within alone", "shared, within alone, 3x"]
    for recipe in ("paper", "toy"):
        sizes = choose("ncsu-sizes", recipe)
        for row in sizes["rows"]:
            if "sound" in row:
                assert tables.others(sizes, row) == [row.replace(" + sound", "")]
    assert tables.others(choose("mjepa-frozen", "toy"), "toy-still") == []
    pixels = choose("ncsu-pixels", "paper")
    same = {column.split(": ")[1] for column in pixels["columns"] if tables.compared(pixels, column)}
    assert same == {"decoder", "from predictions alone"}


def test_a_row_without_a_run_keeps_its_line_and_no_papers_numbers_are_spoken_of_where_there_are_none():
    it = {**ENTRY, "rows": dict.fromkeys("ab"), "columns": {"x": "x"}, "paper": {"b": {"x": 3}},
          "source": "Table 1", "title": ""}
    table = tables.tabulate(it, [("a", 0, {"x": 1})])
    assert "| a | 1.0 | 0 |\n| b | – *(3)* | – |\n" in tables.markdown(it, table)
    assert "In italics" in tables.notes(it, table, {}) and "diamonds" not in legend(it, table)
    both = tables.tabulate(it, [("a", 0, {"x": 1}), ("b", 0, {"x": 1})])
    assert "diamonds" in legend(it, both)
    toy = {**it, "rows": dict.fromkeys("a")}
    assert "In italics" not in tables.notes(toy, table, {})


def legend(it, table):
    return tables.draw(it, table).get_suptitle()


def test_the_papers_numbers_stand_beside_ours_in_italics_and_grey_and_each_seed_is_a_dot(start, tmp_path):
    now = reproduce.EXPERIMENTS["small"]
    now.update(paper={"ten": {"audio": 12.3}, "twenty and more": {"audio": 37.2}}, source="Table 9, mAP")
    start(seeds="0 1 3")
    text, rows = table(tmp_path)
    assert "| ten | 13.3 ± 4.9 (10.0, 11.0, 19.0) *(12.3)* | 0, 1, 3 |" in text
    assert "*(In italics)*: the paper's (Table 9, mAP): other data, other size." in text
    ax, = tables.draw({**ENTRY, **now}, rows).axes
    drawn = {line.get_marker(): [] for line in ax.lines}
    for line in ax.lines:
        drawn[line.get_marker()] += list(line.get_ydata())
    assert drawn["D"] == [12.3, 37.2] and sorted(drawn["o"]) == [10, 11, 19, 20, 21, 29]
    assert "other data, other size" in tables.draw({**ENTRY, **now}, rows).get_suptitle()


# ----------------------------------------------------------------------------------------------------------
# Any data, several at once, one row alone
# ----------------------------------------------------------------------------------------------------------

def test_on_other_data_probes_give_the_numbers_that_a_toy_run_gives_itself(start, tmp_path):
    columns = {"audio": "trained/audio", "audio, untrained": "untrained/audio",
               "attentive": "trained/attentive/video"}
    after = {"trained": ["probe.py --probe attentive --modality video"]}
    reproduce.EXPERIMENTS["small"].update(columns=columns, after=after, only={"ten": "audio"})
    order = start("--data", "folder", "--data-dir", "clips")
    assert sorted(order) == sorted([
        BOTH[0], f"{BOTH[0]}:audio:None", f"{BOTH[0]}:audio:untrained", BOTH[1], f"{BOTH[1]}:video:None",
        f"{BOTH[1]}:audio:None", f"{BOTH[1]}:audio:untrained"])
    text, _ = table(tmp_path)
    assert "| ten | 80.0 | 40.0 | – | 0 |" in text and "| twenty and more | 80.0 | 40.0 | 80.0 | 0 |" in text
    assert "What: of what (folder)" in (tmp_path / "out/table.json").read_text()
    assert start("--data", "folder", "--data-dir", "clips") == []
    other = ["--data", "folder", "--data-dir", "clips", "--probe-data", "esc50"]
    assert len(start(*other)) == 5                      # the probes alone: they are of another set
    torch.save(dict(step=2, steps=3), tmp_path / "out/ten-seed0/latest.pt")
    (tmp_path / "out/ten-seed0/curves.png").touch()     # of visualize.py, on a run that has stopped
    assert start("--data", "folder", "--data-dir", "clips")[0] == BOTH[0]
    fails(start, "--data", "folder", "--data-dir", "others", match="another command")


def test_an_encoder_of_one_modality_is_asked_for_that_alone():
    _, runs = planned("methods", "--data", "vggsound")
    steps = {it["row"]: [step.split() for step in it["steps"]] for it in runs}
    assert all(words[0] == "probe.py" and "audio" in words for words in steps["A-JEPA"])
    assert len(steps["A-JEPA"]) == 2 + 3 and len(steps["MJEPA"]) == 6 + 9 + 2


def test_av_jepas_two_heads_are_probed_once(tmp_path):
    _, runs = planned("avjepa-components", "--data", "vggsound")
    assert list(runs[0]["steps"]) == ["probe.py --probe attentive --modality av",
                                      "probe.py --modality av --baseline untrained"]
    step = "probe.py --probe attentive --modality av"
    words = reproduce.essence(runs[0]["steps"][step], tmp_path)
    row = dict(words=words, seconds=1, step=9, value=3.0)
    rows = [dict(row, head="linear", tested="av"), dict(row, head="attentive", tested="av", value=4.0),
            dict(row, head="attentive", tested="video", value=5.0)]
    runs[0]["folder"] = tmp_path
    (tmp_path / "steps.json").write_text(json.dumps({step: rows}))
    assert tables.numbers({}, reproduce.probed(runs[0]), runs[0]["names"]) == {
        "trained/av": 3, "trained/attentive/av": 4, "trained/attentive/video": 5}


@pytest.mark.parametrize("order", [["audio", "av"], ["av", "audio"]])
def test_a_modality_has_the_number_of_its_own_head_and_else_of_that_on_both(order):
    heads = {"audio": {"audio": 90.0}, "av": {"av": 80.0, "audio": 50.0, "video": 30.0}}
    steps = {}
    for modality in order:
        steps[modality] = [dict(head="blocks", modality=modality, tested=tested, value=value)
                           for tested, value in heads[modality].items()]
    assert tables.numbers({}, steps, dict.fromkeys(order, "trained")) == {
        "trained/attentive/audio": 90, "trained/attentive/av": 80, "trained/attentive/video": 30}


def test_jobs_run_at_once_each_on_a_device_of_its_own(start, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    start("--jobs", "2", "--sleep", "0.6")
    times = []
    for name in BOTH:
        times.append([float(x) for x in (tmp_path / "out" / name / "times.txt").read_text().split()])
    assert max(first for first, _ in times) < min(last for _, last in times)
    assert [(tmp_path / "out" / name / "device.txt").read_text() for name in BOTH] == ["4", "6"]
    assert reproduce.share_devices(3) == ["4", "6", "4"] and reproduce.share_devices(1) == [None]


def test_a_signal_reaches_all_jobs(start, monkeypatch, handlers):
    reproduce.EXPERIMENTS["small"]["rows"]["twenty and more"] = "script.py --way 20 --sleep 60"
    launch = reproduce.launch
    processes = []
    monkeypatch.setattr(reproduce, "launch", lambda *args: processes.append(launch(*args)) or processes[-1])
    with pytest.raises(SystemExit):
        common.main_guard(lambda: start("--stop", "10", "--others", "2", "--jobs", "2"))
    assert [process.returncode for process in processes] == [0, -signal.SIGTERM]


def test_a_row_alone_is_run_and_the_table_names_the_rows_that_are_missing(start, tmp_path):
    assert start("--row", "twenty-and-more", seeds="0 1") == [BOTH[1], "twenty-and-more-seed1"]
    text, _ = table(tmp_path)
    assert "| twenty and more | 20.5" in text and "Missing or not whole: ten (seeds: 0, 1)." in text
    assert start("--row", "ten") == [BOTH[0]]
    text, _ = table(tmp_path)
    assert "| ten | 10.0 |" in text and "| twenty and more | 20.0 |" in text and "Missing" not in text


def test_launch_starts_trainings_but_no_probes(start, tmp_path):
    (tmp_path / "twice.py").write_text("import runpy, sys\nopen(sys.argv[1], 'a').write(sys.argv[2] + ' ')\n"
                                       "sys.argv = sys.argv[2:]\nrunpy.run_path(sys.argv[0])")
    starter = f"'{sys.executable}' {tmp_path}/twice.py '{tmp_path}/launched.txt'"
    start("--launch", starter, "--data", "folder")
    assert (tmp_path / "launched.txt").read_text().split() == 2 * [f"{tmp_path}/script.py"]
    fails(start, "--launch", "no-such-starter", match="--launch: there is no command no-such-starter here")
    fails(start, "--launch", "torchrun '", match="--launch torchrun ': is no command line .No closing quot")


def test_the_recipe_that_a_set_has_anyway_may_be_said():
    for more, said in (([], "toy"), (["--data", "vggsound"], "paper")):
        _, runs = planned("ajepa-loss", *more)
        _, same_runs = planned("ajepa-loss", *more, "--recipe", said)
        assert [it["command"] for it in runs] == [it["command"] for it in same_runs]
    _, runs = planned("ajepa-loss", "--recipe", "paper")
    assert "--recipe" in runs[0]["command"]


def test_a_dry_run_estimates_by_the_runs_that_exist(start, tmp_path, capsys):
    (tmp_path / "10").mkdir()
    torch.save(dict(step=1206, steps=1206), tmp_path / "10" / "latest.pt")
    start("--dry-run")
    assert "none of it has been run yet" in capsys.readouterr().out
    start("--row", "ten")
    start("--dry-run", seeds="0 1 2")                   # five of 1,206 steps of 6 s, and tables of 90 s
    assert f"about {5 * (1206 * 6 + 90) / 60:.0f} min, by the runs" in capsys.readouterr().out
    (tmp_path / "out/ten-seed0/results.json").unlink()
    torch.save(dict(step=6, steps=1206), tmp_path / "out/ten-seed0/latest.pt")
    start("--dry-run", "--jobs", "2")
    assert f"about {(1200 + 1206) * 6 / 60 / 2:.0f} min, by the runs" in capsys.readouterr().out


def test_three_times_the_steps_are_of_the_users_or_the_recipes():
    for flags, steps in (((), "1650"), (("--steps", "20"), "60"), (("--steps=20",), "60"),
                         (("--data", "audioset"), "450000")):
        _, runs = planned("mjepa-terms", *flags)
        command = {it["row"]: it["command"] for it in runs}
        long = command["separate, audio, 3x"]
        assert long[len(long) - 1 - long[::-1].index("--steps") + 1] == steps
        assert steps not in command["all nine"]
    fails(planned, "mjepa-terms", "--epochs", "3", match="a multiple of the others' steps")


def test_sets_that_are_not_there_are_named_and_the_rest_is_probed(start, tmp_path, capsys):
    rows = {"one": "probe.py --data esc50 --data-dir {esc50} --list {ids}",
            "two": "probe.py --data ssv2 --data-dir {ssv2}"}
    reproduce.EXPERIMENTS["small"].update(rows=rows, after={"trained": ["--modality audio"]})
    fails(start, match="trains nothing; give --ckpt")
    ckpt = write_checkpoint(tmp_path / "run")
    more = ["--ckpt", str(ckpt), "--places", f"esc50={tmp_path}", f"ids={tmp_path}"]
    assert start(*more, seeds="0 1") == ["one-seed0:audio:None", "one-seed1:audio:None"]
    assert "left out of two: what needs ssv2" in capsys.readouterr().out
    text, _ = table(tmp_path)
    assert "| one | 80.0 ± 0.0 (80.0, 80.0) | 0, 1 |" in text and "whole: two (seeds: all)." in text
    assert (tmp_path / "out/one-seed0/latest.pt").resolve() == (tmp_path / "run/latest.pt").resolve()
    assert not (tmp_path / "run/probe.jsonl").exists() and start(*more, seeds="0 1") == []
    assert start("--ckpt", str(ckpt / "../run/latest.pt"), *more[2:]) == []     # the same, by other names
    (tmp_path / "other").touch()
    assert start(*more[:3], f"ids={tmp_path}/other", f"esc50={tmp_path}") == ["one-seed0:audio:None"]
    content = weights(ckpt)
    torch.save({**content, "step": 2}, ckpt / "latest.pt")              # it has moved on since
    assert start(*more) == ["one-seed0:audio:None"] and start(*more) == []
    other = write_checkpoint(tmp_path / "second")       # of the same step, while the first one is gone
    (ckpt / "latest.pt").unlink()
    fails(start, "--ckpt", str(other), *more[2:], match="holds a run of another command")
    fails(start, "--ckpt", str(tmp_path / "none"), match="there is no such checkpoint")
    more[1] = str(other)
    fails(start, *more[:2], "--size", "nano", match="--size: no effect on small, which trains nothing")
    fails(start, *more, "ssv2=nowhere", match="--places ssv2=nowhere: nowhere is not there")
    fails(start, *more[:2], match="--places: of small nothing can be run without them")
    fails(start, *more, "--launch", sys.executable, match="--launch: no effect on small")
    fails(start, *more, "--probe-data", "esc50", match="--probe-data esc50: has no effect on rows that name")


def test_the_users_epochs_take_the_place_of_an_entrys_steps():
    _, runs = planned("ajepa-loss", "--epochs", "2")
    assert "--steps" not in runs[0]["command"] and "--epochs" in runs[0]["command"]


@pytest.mark.parametrize("words", ["--step 3", "--fres", "--los=l2", "--stpes 100", "foo", "--dry"])
def test_what_the_scripts_do_not_take_is_refused_before_a_run_begins(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "launch", None)
    with pytest.raises(SystemExit) as end:
        reproduce.main(["ajepa-loss", *words.split()])
    said = words.replace("=", " ")                      # as the runs are given it
    assert end.value.code == 2 and f"error: unrecognized arguments: {said}" in capsys.readouterr().err
    fails(reproduce.main, ["ajepa-loss", "--log-every", "0"], match="--log-every 0 is out of range")
    assert not list(tmp_path.iterdir())


def test_the_order_of_flags_and_what_a_later_one_replaces_make_no_other_command(tmp_path):
    words = "script.py --steps 5 --lr 1 2 --steps 3 --workers 2 --grey -1".split()
    same = "script.py --grey -1 --device cpu --lr 1 2 --steps 3".split()
    assert reproduce.essence(words, tmp_path) == reproduce.essence(same, tmp_path)
    for other in ("script.py --steps 3 --lr 2 1 --grey -1", "other.py --steps 3 --lr 1 2 --grey -1",
                  "script.py --steps 3 --lr 1 2 --grey", "script.py --steps 3 --lr 1 2"):
        assert reproduce.essence(words, tmp_path) != reproduce.essence(other.split(), tmp_path)


def test_a_path_is_that_of_the_call_wherever_the_next_call_is_made(monkeypatch, tmp_path):
    commands = []
    for place in ("a", "b"):
        (tmp_path / place / "clips").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        _, runs = planned("ajepa-loss", "--data", "folder", "--data-dir", "clips")
        commands.append(runs[0]["command"])
    assert str(tmp_path / "a" / "clips") in commands[0] and commands[0] != commands[1]


def test_a_foreign_row_is_refused_before_another_is_trained(start, tmp_path):
    start("--row", "ten", "--sleep", "0")
    fails(start, "--row", "twenty-and-more", match="ten-seed0 holds a run of another command")
    assert started(tmp_path) == []


def test_a_run_that_another_process_has_begun_or_finished_is_left_alone(start, tmp_path, capsys, monkeypatch):
    """The stub of the first row finishes the second's, as another process would, or holds its lock."""
    out = tmp_path / "out"
    start()
    (out / BOTH[1]).rename(tmp_path / "theirs")
    (out / BOTH[0] / "results.json").unlink()
    (tmp_path / "10").mkdir()
    (tmp_path / "10/latest.pt").touch()
    take = "import shutil; shutil.move(here / 'theirs', out.parent / 'twenty-and-more-seed0')\n"
    stub = (tmp_path / "script.py").read_text()
    (tmp_path / "script.py").write_text(stub + take)
    assert start() == BOTH[:1] and "| twenty and more | 20.0 | 0 |" in table(tmp_path)[0]
    (tmp_path / "script.py").write_text(stub)
    (out / BOTH[1] / "results.json").unlink()
    (out / BOTH[1] / "steps.json").write_text("{}")
    hold = ("import fcntl, sys\nf = open(sys.argv[1], 'a')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
            "print(1, flush=True)\ninput()")
    with subprocess.Popen([sys.executable, "-c", hold, out / BOTH[1] / ".job"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        fails(start, match="1 of 2 runs did not finish")
        assert started(tmp_path) == [] and (out / BOTH[1] / "steps.json").is_file()
        assert "another reproduce.py is at work there" in capsys.readouterr().out
        other.communicate(b"\n")
    assert start() == BOTH[1:]


def test_on_sets_that_we_do_not_make_a_column_that_no_step_fills_is_left_out():
    experiment, runs = planned("methods", "--data", "vggsound")
    assert not [name for name in experiment["columns"] if re.search("10 labels|chance|evaluation", name)]
    names = set(sum((list(it["names"].values()) for it in runs), ["run"]))
    assert {path.split("/")[0] for path in experiment["columns"].values()} == names
    assert "chance, probes" in planned("methods")[0]["columns"]


def test_only_the_word_for_kept_checkpoints_is_many(tmp_path, capsys):
    folder = tmp_path / "a*b"
    folder.mkdir()
    for name in ("step-000002.pt", "step-000001.pt"):
        (folder / name).touch()
    it = dict(folder=folder, steps={"s": ["probe.py", "--ckpt", f"{folder}/step-*.pt", "--out", str(folder)]})
    it.update(row="r", seed=0, names={"s": "kept"})
    reproduce.show_left(it, ["s"], "torchrun")
    assert f"python probe.py --ckpt '{folder}/step-000001.pt'" in capsys.readouterr().out
    assert reproduce.words_of(it, "s") == [
        "probe.py", "--ckpt", f"{folder}/step-000001.pt", f"{folder}/step-000002.pt", "--out", str(folder)]


def test_a_row_of_three_times_the_steps_is_estimated_as_three(start, tmp_path, capsys):
    (tmp_path / "10").mkdir()
    torch.save(dict(step=1206, steps=1206), tmp_path / "10" / "latest.pt")
    start("--row", "ten")
    reproduce.EXPERIMENTS["small"]["rows"]["long"] = "script.py --way 30 --steps 3x"
    start("--dry-run", "--row", "long")                 # of 1,206 steps of 6 s, three times
    assert f"about {3 * (1206 * 6 + 90) / 60:.0f} min, by the runs" in capsys.readouterr().out
