"""What run.py claims: processes, files, alarms, curves, flags, and a run on made-up clips. What a run does
with gradients, logs and checkpoints: test_methods.py."""
import functools
import itertools
import os
import signal
import types

import common
import data
import run
from run import Process

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import CPU, FORK, METHOD, StopAfter, fails, free_port


# ---- Little: a method whose clips are numbers ----------------------------------------------------------

TABLE = {"size": ("nano", "nano", ""), "seconds": (1.0, 1.0, ""), "batch_size": (8, 8, ""),
         "lr": (0.1, 0.05, ""), "steps": (None, 4, ""), "epochs": (2, None, ""), "warmup": (0.1, 0.1, "")}


class Little(nn.Module):
    """Keeps what it is given."""
    def __init__(self):
        super().__init__()
        self.parts = dict(encoder=dict(size="nano", audio=dict(shape=(16, 16), patch=(16, 16))))
        self.encoder = common.ViT(**self.parts["encoder"]).requires_grad_(False)
        self.slope = nn.Parameter(torch.randn(2))
        self.given = []

    def forward(self, batch, masks, weight, tick):
        drawn = tuple(torch.rand(3).tolist())
        self.given.append(dict(masks=masks, weight=weight, tick=tick, drawn=drawn))
        loss = weight * self.slope.square().sum()
        return loss, {"loss/a": loss.detach()}


def numbers(clips, order, workers, pin):
    """In place of data.train_loader: nothing is decoded."""
    for keys in order:
        there = torch.ones(len(keys), dtype=torch.bool)
        yield dict(index=there, has_audio=there, has_video=there, short=~there, bad=[], lost=0)


def draw_masks(step, rank):
    """Masks that tell step, rank and row."""
    rows = torch.arange(8)[:, None]
    return [{"a": (1000 * step + 100 * rank + rows, -rows)}]


def read(*words):
    parser, _ = run.make_parser("Little.", "little")
    args = parser.parse_args([str(word) for word in words])
    return args, run.read_recipe(args, "little", TABLE)


def train(out, *words, interrupt=None):
    """Train a Little as the scripts' main does. Returns its model."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    for number in range(16):
        (out / "clips" / f"{number:02d}.wav").touch()
    where = ["--data", "folder", "--data-dir", out / "clips", "--out", out / "run"]
    flags = ["--recipe", "toy", "--workers", 0, "--device", "cpu", "--log-every", 1]
    args, recipe = read(*where, *flags, *words)
    little = run.Run(METHOD, args, recipe)
    model = little.build(Little)
    optimizer = torch.optim.SGD(model.parameters(), recipe["lr"])
    little.resume(model, optimizer)
    little.begin(model, optimizer, data.Inputs(), None, functools.partial(draw_masks, rank=little.rank))
    if interrupt:
        little.stop = StopAfter(interrupt)
    for step in little.steps():
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


@pytest.fixture(autouse=True)
def no_decoding(monkeypatch):
    monkeypatch.setattr(data, "train_loader", numbers)


# ---- Two processes -------------------------------------------------------------------------------------

def on_a_rank(rank, folder, port):
    """What one of two processes finds goes into a file."""
    data.train_loader = numbers
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    process = run.start_process("cpu")
    stop = run.StopSignal()
    stop.came = rank == 1                                      # a SIGTERM may reach one process first
    found = dict(
        place=(process.rank, process.world, process.main),
        any=[process.any(flag) for flag in (True, False, rank == 0, stop)],
        largest=process.largest(3 - rank),
        total=process.total(torch.tensor([1.0, rank])).tolist(),
        main=process.from_main(lambda: f"of {rank}"),
        gathered=common.gather_ranks(torch.full((2, 1), float(rank))).flatten().tolist(),
        given=train(folder, "--accumulate", 2).given)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()                               # when DDP is gone, else gloo may hang


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
            rows = torch.arange(8)[4 * (tick % 2):][:4, None]
            assert torch.equal(context, 1000 * (tick // 2) + 100 * rank + rows) and torch.equal(target, -rows)
            assert one["tick"] == tick and one["weight"] == 0.5
            draws.add(one["drawn"])
    assert len(draws) == 2 * 4 * 2


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
    train(tmp_path, "--fresh", "--steps", 1)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [0]


def test_a_run_of_another_recipe_is_refused_by_all_that_differs(tmp_path):
    train(tmp_path, "--steps", 1)
    message = fails(train, tmp_path, "--lr", 0.2, "--steps", 5)
    assert "has lr 0.05 (now 0.2), steps 1 (now 5); give another --out, or --fresh" in message
    fails(train, tmp_path, "--fresh", "--resume", "x.pt", match="exclude each other")
    fails(train, tmp_path, "--out", tmp_path / "clips" / "00.wav", "--fresh", match="cannot be made")


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


def test_rows_are_added_beside_a_checkpoint_and_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    assert run.read_log(tmp_path) == []
    for step, place in enumerate((tmp_path, tmp_path / "latest.pt")):
        run.add_row(place, "log.jsonl", {"step": step})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert run.read_log(tmp_path) == [{"step": 0}, {"step": 1}]
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
        run.draw_curves(tmp_path / "curves.png", runs, "a $title")
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


# ---- Processes and signals -----------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_true_once_it_came_and_lets_a_second_ctrl_c_through(handlers, number):
    stop = run.StopSignal()
    assert CPU.any(stop) is False
    os.kill(os.getpid(), number)
    assert CPU.any(stop) is True
    again = signal.getsignal(number) == handlers[number]
    assert again == (number == signal.SIGINT)                  # SLURM and torchrun each send a SIGTERM
    stop.release()                                             # after the loop signals are handled as before
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    def zeros(*args, **more):
        raise AssertionError("Torch not compiled with CUDA enabled")   # what such a torch raises

    assert "--device potato" in fails(run.start_process, "potato")
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


@pytest.mark.parametrize("bf16", [True, False])
def test_autocast_is_bf16_where_the_device_computes_in_it(bf16):
    with Process(torch.device("cpu"), bf16=bf16).autocast():
        assert torch.is_autocast_enabled("cpu") == bf16 and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_the_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    gpu = Process(torch.device("cuda"))
    assert (run.default_workers(CPU), run.default_workers(gpu)) == (4, 7)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (run.default_workers(CPU), run.default_workers(gpu)) == (1, 1)


# ---- Flags ---------------------------------------------------------------------------------------------

def test_a_run_takes_the_column_of_its_recipe_with_the_flags_in_place_of_its_values():
    args, recipe = read()
    shared = dict(size="nano", seconds=1.0, batch_size=8, warmup=0.1, accumulate=1, seed=0)
    assert recipe == {**shared, "lr": 0.05, "steps": 4, "epochs": None, "data": "toy"}
    assert args.out == "runs/little-toy-seed0"
    _, recipe = read("--data", "vggsound")                     # the paper's, but for the toy clips
    assert recipe == {**shared, "lr": 0.1, "steps": None, "epochs": 2, "data": "vggsound"}
    _, recipe = read("--recipe", "paper", "--steps", 7, "--size", "toy", "--lr", 0.2)
    assert recipe == {**shared, "lr": 0.2, "steps": 7, "epochs": None, "data": "toy", "size": "toy"}


@pytest.mark.parametrize("flag, value", [
    ("--lr", -1), ("--lr", "nan"), ("--batch-size", 1), ("--steps", -1), ("--steps", 0), ("--epochs", 0),
    ("--seconds", 0), ("--accumulate", 0), ("--log-every", 0), ("--save-every", 0), ("--max-bad", 2),
    ("--seed", -1), ("--workers", -1), ("--size", "colossal")])
def test_a_flag_out_of_range_is_refused_by_name(flag, value):
    assert flag in fails(read, flag, value)
