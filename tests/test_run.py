"""What run.py claims: processes, files, alarms, curves, flags, and a run, on clips that are numbers."""
import functools
import itertools
import os
import signal
import socket
import types

import common
import data
import run
from common import UserError, sigreg
from run import Process

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import METHOD, StopAfter, weights

CPU = Process(torch.device("cpu"))


def fails(function, *args, match=None):
    """The message of the UserError that the call raises: one sentence, on one line."""
    with pytest.raises(UserError, match=match) as e:
        function(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- Little: a method whose clips are numbers ----------------------------------------------------------

TABLE = {"size": ("nano", "nano", ""), "seconds": (1.0, 1.0, ""), "batch_size": (8, 8, ""),
         "lr": (0.1, 0.05, ""), "steps": (None, 4, ""), "epochs": (2, None, ""), "warmup": (0.1, 0.1, "")}
CLIPS = torch.linspace(-1, 2, 16)
HEARD = torch.arange(16) % 3 > 0                               # the clips that have sound


class Little(nn.Module):
    """The loss of a clip x is (slope x - 1)^2, in float32 under autocast too. Keeps what it is given."""
    def __init__(self):
        super().__init__()
        config = dict(size="nano", audio=dict(shape=(16, 16), patch=(16, 16)))
        self.parts = dict(encoder=config)
        self.encoder = common.ViT(**config).requires_grad_(False)
        self.slope = nn.Parameter(torch.randn(2))
        self.given = []

    def forward(self, batch, masks, weight, tick):
        x = batch["audio"]
        drawn = torch.rand(3)
        self.given.append(dict(index=batch["index"], masks=masks, weight=weight, tick=tick, drawn=drawn))
        each = (self.slope[0] * x - self.slope[1]).square()
        loss = (weight["a"] * each).sum() if isinstance(weight, dict) else weight * each.mean()
        return loss, {"loss/a": loss.detach(), "know_nothing/a": 2 * loss.detach(),
                      "embedding/a": torch.stack([x, x ** 2, x ** 3], 1)}


def numbers(clips, order, workers, pin):
    """In place of data.train_loader: nothing is decoded."""
    for keys in order:
        index = torch.tensor([i for _, i in keys])
        present = torch.ones(len(index), dtype=torch.bool)
        yield dict(index=index, audio=CLIPS[index], has_audio=HEARD[index], has_video=present, short=~present,
                   bad=[], lost=0)


def draw_masks(step, rank):
    """Masks that tell step, rank and row."""
    rows = torch.arange(8)[:, None]
    return [{"a": (1000 * step + 100 * rank + rows, -rows)}]


def read(*words):
    parser, _ = run.make_parser("Little.", "little")
    args = parser.parse_args([str(word) for word in words])
    return args, run.read_recipe(args, "little", TABLE)


def train(out, *words, weigh=None, interrupt=None):
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
    draw = functools.partial(draw_masks, rank=little.rank)
    little.begin(model, optimizer, data.Inputs(), None, draw, weigh)
    if interrupt:
        little.stop = StopAfter(interrupt)
    for step in little.steps():
        for batch, masks, weight, tick in little.micro_batches(step):
            with little.autocast():
                loss, shown = little.model(batch, masks, weight, tick)
            loss.backward()
            little.note(loss, shown)
        grad_norm = little.clip()
        optimizer.step()
        optimizer.zero_grad()
        little.log(step, grad_norm=grad_norm)
        little.save(step)
    little.finish(None)
    return model


@pytest.fixture(autouse=True)
def no_decoding(monkeypatch):
    monkeypatch.setattr(data, "train_loader", numbers)


# ---- Two processes -------------------------------------------------------------------------------------

RUNS = {"plain": {}, "weighed": {"weigh": {"a": ("audio",)}}}


def joined():
    """The batch of all processes, and the layer that it goes through."""
    torch.manual_seed(0)
    return torch.randn(24, 6), nn.Linear(6, 5)


def work(rank, folder):
    """What one of two processes finds."""
    process = run.start_process("cpu")
    stop = run.StopSignal()
    stop.came = rank == 1                                      # a SIGTERM may reach one process first
    found = dict(
        place=(process.rank, process.world, process.main),
        any=[process.any(flag) for flag in (True, False, rank == 0, stop)],
        largest=process.largest(3 - rank),
        total=process.total(torch.tensor([1.0, rank])),
        main=process.from_main(lambda: f"of {rank}"),
        gathered=common.gather_ranks(torch.full((2, 1), float(rank))))
    x, layer = joined()
    wrapped = process.wrap(layer)                              # it must live until after the backward pass
    loss = sigreg(wrapped(x[rank::2]), 7, 32)
    loss.backward()
    found["sigreg"] = [loss.detach(), layer.weight.grad, layer.bias.grad]
    for name, more in RUNS.items():
        model = train(folder / name, "--accumulate", 2, **more)
        found[name] = (model.slope.detach(), model.given)
    return found


def on_a_rank(rank, folder, port):
    data.train_loader = numbers
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()                               # when DDP is gone, else gloo may hang


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of two processes, and what each found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(on_a_rank, (folder, port), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_processes_share_what_one_of_them_knows(ranks):
    for rank, found in enumerate(ranks[1]):
        assert found["place"] == (rank, 2, rank == 0)
        assert found["any"] == [True, False, True, True]       # a signal at one process stops all
        assert found["largest"] == 3 and found["total"].tolist() == [2, 1] and found["main"] == "of 0"
        assert found["gathered"].flatten().tolist() == [0, 0, 1, 1]


def test_sigreg_on_two_processes_is_that_of_the_joined_batch_in_value_and_gradient(ranks):
    x, layer = joined()
    loss = sigreg(layer(x), 7, 32)
    loss.backward()
    for found in ranks[1]:
        expected = [loss.detach(), layer.weight.grad, layer.bias.grad]
        torch.testing.assert_close(found["sigreg"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_micro_batches_and_processes_train_and_log_the_mean_over_the_whole_step(ranks, tmp_path, name):
    """By hand, from the clips of each step. Computed in float32, whose sums have another order."""
    folder, found = ranks
    whole = train(tmp_path / "whole", **RUNS[name])
    micro = train(tmp_path / "micro", "--accumulate", 4, **RUNS[name])
    logs = [run.read_log(out / "run") for out in (tmp_path / "whole", tmp_path / "micro", folder / name)]
    common.seed_step(0, 0)
    slope = Little().slope.detach().double().numpy()
    for step, given in enumerate(whole.given):
        heard = HEARD[given["index"]] if name == "weighed" else slice(None)
        x = CLIPS[given["index"]][heard].double().numpy()
        error = slope[0] * x - slope[1]
        gradient = 2 * np.array([(error * x).mean(), -error.mean()])
        slope = slope - 0.05 * gradient
        for rows in logs:
            row = rows[step]
            assert [row["loss"], row["loss/a"]] == pytest.approx(2 * [(error ** 2).mean()], rel=1e-4)
            assert row["grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
            assert row["std/a"] == pytest.approx(logs[0][step]["std/a"], rel=1e-4)     # over all clips
    for trained in (whole.slope, micro.slope, found[0][name][0], found[1][name][0]):
        np.testing.assert_allclose(trained.detach(), slope, rtol=1e-4, atol=1e-5)


def test_each_micro_batch_has_the_masks_of_its_own_clips_and_a_random_stream_of_its_own(ranks):
    both = [found["plain"][1] for found in ranks[1]]
    for rank, given in enumerate(both):
        for tick, one in enumerate(given):
            context, target = one["masks"][0]["a"]
            rows = torch.arange(8)[4 * (tick % 2):][:4, None]
            assert torch.equal(context, 1000 * (tick // 2) + 100 * rank + rows) and torch.equal(target, -rows)
            assert one["tick"] == tick and one["weight"] == 0.5
    assert len({tuple(one["drawn"].tolist()) for one in both[0] + both[1]}) == 2 * 4 * 2


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
    save = torch.save

    def keep(content, file):
        saved.append(content["step"])
        save(content, file)

    monkeypatch.setattr(torch, "save", keep)
    model = train(tmp_path, "--log-every", 2, "--save-every", 2, "--steps", 5)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [1, 3, 4]
    assert saved == [2, 4, 5]
    last = weights(tmp_path / "run")
    assert last["method"] == METHOD and last["steps"] == 5 and last["version"].startswith(run.__version__)
    assert last["encoder"] == model.parts["encoder"] and last["projector"] is last["cross"] is None
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"latest.pt", "log.jsonl", "curves.png"}


def test_the_log_of_a_run_that_goes_on_continues_from_its_checkpoint(tmp_path, capsys):
    train(tmp_path, interrupt=2)
    first = run.read_log(tmp_path / "run")
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    with open(tmp_path / "run" / "log.jsonl", "a") as f:       # after the checkpoint, before a kill
        f.write('{"step": 2, "loss": 9}\n{"step": 3, "lo')
    (tmp_path / "run" / "results.json").write_text("[]")       # of what is written over
    train(tmp_path)
    rows = run.read_log(tmp_path / "run")
    assert rows[:2] == first and [row["step"] for row in rows] == [0, 1, 2, 3] and rows[2]["loss"] != 9
    assert "going on at step 2 of 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "results.json").exists()
    train(tmp_path, "--fresh", "--steps", 1)
    assert [row["step"] for row in run.read_log(tmp_path / "run")] == [0]


def test_a_run_does_not_write_over_another_one(tmp_path):
    train(tmp_path)
    message = fails(train, tmp_path, "--lr", 0.2, "--steps", 5)
    assert all(part in message for part in ("lr 0.05 (now 0.2)", "steps 4 (now 5)", "--out", "--fresh"))
    assert "seconds" not in message and weights(tmp_path / "run")["step"] == 4
    fails(train, tmp_path, "--fresh", "--resume", "x.pt", match="exclude each other")
    fails(train, tmp_path, "--out", tmp_path / "clips" / "00.wav", "--fresh", match="cannot be made")


def test_the_norm_that_is_clipped_is_that_of_all_gradients_together():
    model = nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), 2.0)
    model.bias.grad = torch.tensor([3.0, 4.0])
    little = types.SimpleNamespace(unwrapped=model, noted=[{"loss": torch.tensor(1.0)}], process=CPU)
    assert run.Run.clip(little) == run.Run.clip(little, 3.5) == pytest.approx(7)
    assert model.bias.grad.tolist() == pytest.approx([1.5, 2], rel=1e-4)


def test_an_alarm_is_shown_when_it_begins_and_again_only_after_20_rows_without(tmp_path, monkeypatch, capsys):
    wrong = {"a rises": "a rises: 9, after 1"}
    when = (1, 2, 3, 5, 26)
    monkeypatch.setattr(run, "alarms", lambda rows, warmup: wrong if rows[-1]["step"] in when else {})
    train(tmp_path, "--steps", 28, interrupt=3)
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING at step 1: a rises: 9, after 1" in out
    train(tmp_path, "--steps", 28)                             # not again when the run goes on
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1 and "WARNING at step 26: a rises" in out


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


def names(*given):
    """Of what alarms speak."""
    return {name.split()[0] for name in run.alarms(*given)}


def test_a_healthy_log_raises_no_alarm_at_any_moment():
    for rows in (log_of(seed=1), log_of(seed=2), log_of(noise=0.05)):
        assert not any(run.alarms(rows[:n + 1]) for n in range(60))
    harder = np.linspace(1, 2, 60)                             # richer targets are harder: no alarm
    assert not names(log_of(**{"loss/a": harder, "know_nothing/a": harder}))


@pytest.mark.parametrize("term", WITHIN)
def test_what_goes_wrong_within_an_input_is_named(term):
    slowly = np.where(np.arange(60) < 25, 1, np.linspace(0, 2.2, 60).clip(1))
    for factor in (late(2.0, 3), late(1.35, 6), slowly):
        assert set(run.alarms(log_of(**{f"loss/{term}": factor}))) == {f"{term} rises"}
    assert not names(log_of(**{f"loss/{term}": late(1.05, 6)}))
    rows = log_of(**{f"loss/{term}": late(2.0, 10)})
    assert not any(run.alarms(rows[:n]) for n in range(1, 51))
    assert names(rows[:54]) == {term}                          # when it happens
    empty = late(0.01, 8)                                      # the targets say nothing any more
    rows = log_of(**{f"loss/{term}": empty, f"know_nothing/{term}": empty})
    assert set(run.alarms(rows)) == {f"{term} floor"}
    for factor in (late(1 / 3, 10), np.linspace(1, 0.2, 60)):
        assert set(run.alarms(log_of(**{f"rank/{term}": factor}))) == {f"{term} rank"}
    assert not names(log_of(**{f"rank/{term}": 0.5}))          # low from the start is no fall
    warmup = np.where(np.arange(60) < 10, 3, 1)
    assert not names(log_of(**{f"rank/{term}": warmup}), 100)  # nor is one in the warm-up, here 10 rows
    assert names(log_of(**{f"rank/{term}": warmup * late(1 / 3, 10)}), 100) == {term}
    assert set(run.alarms(log_of(**{f"std/{term}": late(0.01, 1)}))) == {f"{term} collapse"}


@pytest.mark.parametrize("term", ACROSS)
def test_a_term_across_at_its_floor_is_named(term):
    empty = late(0.01, 8)
    assert set(run.alarms(log_of(**{f"loss/{term}": empty}))) == {f"{term} floor"}
    assert names(log_of(**{f"loss/{term}": empty, f"know_nothing/{term}": empty})) == {term}
    assert not names(log_of(**{f"loss/{term}": 0.7}))          # what is learnt well is not at its floor


def test_steps_without_any_sound_are_no_alarm_and_a_term_that_no_clip_could_train_is_named():
    def without(term, steps):
        rows = log_of()
        for step, column in itertools.product(steps, (f"loss/{term}", f"know_nothing/{term}")):
            rows[step][column] = 0.0                           # no clip has it
        return rows

    for steps in ([59], [57, 58, 59], range(40, 52, 2), range(30, 45, 2)):
        assert not names(without("a", steps)) and not names(without("a->v", steps))
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

@pytest.fixture
def handlers():
    """Python's own signal handlers; afterwards those that were there before."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield own
    for number, handler in before.items():
        signal.signal(number, handler)


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
    monkeypatch.delenv("RANK", raising=False)
    for device in ("potato", "cuda:99", "cpu:x"):
        assert f"--device {device}" in fails(run.start_process, device)

    def zeros(*args, **more):
        raise AssertionError("Torch not compiled with CUDA enabled")   # what such a torch raises

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


def test_one_process_without_torchrun_has_no_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    process = run.start_process("cpu")
    layer = nn.Linear(2, 2)
    assert (process.rank, process.world, process.main) == (0, 1, True)
    assert not dist.is_initialized() and process.wrap(layer) is layer
    with process.autocast():
        assert torch.is_autocast_enabled("cpu") == process.bf16


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
