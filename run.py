"""A training run, the same for all methods: processes, folder, loader, micro-batches, log, alarms, saving,
curves, flags.

The scripts' loops stand on the class Run:

    run = Run(METHOD, args, recipe)                     # processes, the clips of the set, the number of steps
    ...
    for step in run.steps():                             # ends at the last step, or after a signal
        for batch, masks, weight, tick in run.micro_batches(step):
            with run.autocast():
                loss, shown = run.model(batch, masks, weight, tick)
            loss.backward()
            run.note(loss, shown)
        grad_norm = run.clip(5.0)                        # one sentence where it is not finite
        optimizer.step()
        run.log(step, lr=lr, grad_norm=grad_norm)
        run.save(step)
    run.finish(probe.toy_report)

What a process can meet alone (a signal, no clips, a full disk) it keeps until the next step is to begin:
there all of them agree whether to go on.
"""
import argparse
import contextlib
import datetime
import fcntl
import functools
import io
import json
import math
import os
import signal
import subprocess
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import data
import heads
from common import UserError, ViT, check_range
from datasets.batches import tell

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

__version__ = "0.2.0"


# ----------------------------------------------------------------------------------------------------------
# 1. Devices and processes
# ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Process:
    """Where this process runs. `torchrun` sets the environment; without it there is no process group at
    all."""
    device: torch.device
    rank: int = 0
    world: int = 1
    bf16: bool = False

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        """bf16 where the device computes in it. It has float32's range, so there is no GradScaler."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, model):
        """DistributedDataParallel under torchrun, the model itself otherwise. Keep it: gradients are
        averaged while it lives."""
        if not dist.is_initialized():
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def alone(self):
        """A context in which rank 0 alone prints, for what all ranks do alike."""
        return contextlib.nullcontext() if self.main else contextlib.redirect_stdout(io.StringIO())

    def gather(self, thing):
        """Each rank's `thing`, on all ranks."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things

    def any(self, flag):
        """True on all ranks if it is True on one."""
        return bool(self.largest(int(bool(flag))))

    def largest(self, value):
        """The largest of the ranks' integers."""
        if self.world == 1:
            return value
        value = torch.tensor(value, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value.item())

    def total(self, x):
        """The sum over the ranks of a tensor."""
        x = x.to(self.device)
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def from_main(self, make):
        """What rank 0's make() returns, on all ranks; so its UserError."""
        box = [None, None]
        if self.main:
            try:
                box[0] = make()
            except UserError as e:
                box[1] = str(e)
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        if box[1]:
            raise UserError(box[1])
        return box[0]


def choose_device(name):
    """'auto': CUDA, then MPS, then the CPU. UserError where this machine does not have it."""
    torchrun = "RANK" in os.environ
    if name == "auto":
        mps = torch.backends.mps.is_available() and not torchrun           # MPS has no process group
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    reason = "this machine or this torch does not have it"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torchrun:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "mps", "cuda"):          # such as meta, which has no numbers
            reason = "nothing of ours runs there"
            device = None
    except Exception:                                  # torch raises half a dozen kinds
        device = None
    if device is None:
        raise UserError(f"--device {name}: {reason}; use cpu, mps, cuda or auto")
    return device


def computes_bf16(device):
    """Whether the device has bf16 in hardware; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def start_process(device="auto", bf16=None):
    """Pick the device, and join the process group if torchrun started us. bf16: None where the device
    computes in it."""
    device = choose_device(device)
    if bf16 is None:
        bf16 = computes_bf16(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # rank 0 alone writes the toy clips and the statistics of the mel: the others wait, maybe longer than
        # NCCL's 10 minutes
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(timeout=datetime.timedelta(minutes=30), **backend)
    if not dist.is_initialized():
        return Process(device, bf16=bf16)
    return Process(device, dist.get_rank(), dist.get_world_size(), bf16)


def default_workers(process):
    """Processes that decode: half of the cores for training on a CPU, of two both, and most of them beside a
    GPU; at most 16 a process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = max(min(cores, 2), cores // 2) if process.device.type == "cpu" else cores - local
    return max(1, min(16, free // local))


def any_processes(args):
    """(Process, number of data workers) of a command, by its flags."""
    process = start_process(args.device, args.bf16)
    return process, default_workers(process) if args.workers is None else args.workers


def one_process(args, script):
    """any_processes of a command that evaluates. UserError where torchrun started it."""
    process, workers = any_processes(args)
    if process.world > 1:
        raise UserError(f"{script} runs in one process; start it without torchrun")
    return process, workers


def list_clips(args, process, split="train"):
    """The listing of --data. Clips that we make ourselves rank 0 writes first, while the others wait."""
    if data.find_set(args.data).make is not None:
        process.from_main(lambda: data.list_clips(args.data, args.data_dir, split))
    return data.list_clips(args.data, args.data_dir, split)


class Stopped(BaseException):
    """A signal came while the process waited for clips."""


class StopSignal:
    """True once SIGTERM, Ctrl-C or SIGHUP (a closed terminal) came: the loop then ends the step, saves and
    says how to go on. A second Ctrl-C is not caught; a second SIGTERM is, since SLURM and torchrun each send
    one."""
    def __init__(self):
        self.came = False
        self.waiting = False
        self.before = common.handle_signals(self.catch)

    def catch(self, number, frame):
        self.came = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])
        if self.waiting:
            self.waiting = False
            raise Stopped

    def wait(self, take):
        """What take() returns; None when a signal comes first."""
        try:
            try:
                self.waiting = True
                return None if self.came else take()
            finally:
                self.waiting = False
        except Stopped:
            return None

    def release(self):
        """Handle signals as before: the loop is over."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.came


# ----------------------------------------------------------------------------------------------------------
# 2. Files of a run
# ----------------------------------------------------------------------------------------------------------

def code_version():
    """The version, and the commit where there is one."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        commit = subprocess.run(git, capture_output=True, text=True, timeout=5, cwd=here).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__


def replace_file(path, write):
    """write(file) under a temporary name of one's own, then rename: whoever is killed in between leaves the
    old file whole. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(temporary, "xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(content, file):
    """torch.save; of a full disk it makes a RuntimeError of its own, here it is an OSError again."""
    try:
        torch.save(content, file)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):
            raise e.__context__ from None
        raise


FILES = ("latest.pt", "log.jsonl", "results.json", "curves.png")      # that a run writes


def step_file(step):
    """The name of a checkpoint that --keep-every leaves."""
    return f"step-{step:06d}.pt"


def step_files(folder):
    """{step: what has the name of its checkpoint there}"""
    found = {}
    for file in Path(folder).glob("step-*.pt"):
        digits = file.name[len("step-"):-len(".pt")]
        if digits.isdecimal() and file.name == step_file(int(digits)):
            found[int(digits)] = file
    return found


def lock_folder(folder):
    """The file whose lock keeps other runs out of a folder while it is open, in this process alone: a fork
    does not hold it, and the kernel gives it back when we are killed. Removes what killed runs left half
    written. UserError where another run is at work there."""
    kept = [file.name for file in step_files(folder).values()]
    for name in (".lock", *FILES, *kept):
        if os.path.exists(folder / name) and not os.path.isfile(folder / name):
            raise UserError(f"{folder / name}: lies where a run writes a file, and is none; take it away, or "
                            "give another --out")
    try:
        file = open(folder / ".lock", "a")
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be written to ({e.strerror})") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out {folder}: another run is writing there; wait for its end, or give another "
                        "--out") from None
    except OSError:
        return file                                    # a file system without locks
    for name in (*FILES, "step-*.pt"):
        for left in folder.glob(f".{name}.*.part"):
            with contextlib.suppress(OSError):         # gone meanwhile, or a folder
                left.unlink()
    return file


def read_log(out):
    """The rows of a run's log.jsonl."""
    return read_rows(Path(out) / "log.jsonl")


def read_rows(file, turn=dict):
    """The rows of a .jsonl file, turn(each) one of a log. Says how many lines are none: cut off by a kill, or
    damaged."""
    rows = []
    broken = 0
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):           # no JSON, or no UTF-8
            row = None
        row = turn(row) if isinstance(row, dict) else None
        if is_row(row):
            rows.append(row)
        else:
            broken += 1
    if broken:
        tell(f"{file}: {broken:,} of its {broken + len(rows):,} lines are no rows of a log and left out")
    return rows


def is_row(row):
    """Whether it is a row of a log: names that can be shown, of numbers that can be drawn, and a step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not "".join(row).isprintable():
        return False
    return all(type(value) in (int, float) and abs(value) < 1e30 for value in row.values())


def append_row(path, row):
    """Append a JSON row to a file; on a line of its own where the last one was cut off. Raises OSError."""
    with open(path, "ab+") as f:
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(json.dumps(row).encode() + b"\n")


class Log:
    """log.jsonl of a training that is no Run, from its start, in a folder that is made: every ten steps a
    row, with the mean of each value since the row before."""
    def __init__(self, folder):
        self.file = Path(folder) / "log.jsonl"
        self.values = {}                               # of the steps since the last row
        self.write(lambda: self.file.write_bytes(b""))

    def write(self, how):
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            how()
        except OSError as e:
            tell(f"{self.file}: cannot be written ({e.strerror}); the curve ends there, the result counts")
            self.file = None

    def add(self, step, values, now=False):
        """Note {column: finite number} of a step. now: it has a row in any case."""
        for column, value in values.items():
            self.values.setdefault(column, []).append(value)
        if not now and (step + 1) % 10:
            return
        row = {column: float(np.mean(noted)) for column, noted in self.values.items()}
        row = {column: value for column, value in row.items() if abs(value) < 1e30}     # as is_row wants it
        self.values = {}
        if self.file:
            self.write(lambda: append_row(self.file, {"step": step, **row}))


def add_row(ckpt, name, row):
    """Append a JSON row to the file `name` beside a checkpoint."""
    folder = Path(ckpt) if os.path.isdir(ckpt) else Path(ckpt).parent
    try:
        append_row(folder / name, row)
    except OSError as e:
        reason = f"the result above could not be written there ({e.strerror})"
        raise UserError(f"{folder / name}: {reason}") from None


def each_checkpoint(args):
    """The flags with each --ckpt in turn, each step of a folder once. All are read before the first is
    evaluated: a typo at the end costs nothing."""
    paths = {}
    for path in args.ckpt:
        folder = os.path.realpath(common.checkpoint_file(path).parent)
        step = common.load_checkpoint(path)["step"] if len(args.ckpt) > 1 else None
        paths.setdefault((folder, step), path)
    for path in paths.values():
        yield argparse.Namespace(**{**vars(args), "ckpt": path})


def load_optimizer(optimizer, state, path):
    """The moments of a checkpoint for an AdamW, of all its parameters or of none; its settings stay. A
    sentence where they are none, or of other parameter groups."""
    try:
        own = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("groups")
        optimizer.load_state_dict({"state": state["state"], "param_groups": own})
        for moments in optimizer.state.values():
            sound = moments.keys() == {"step", "exp_avg", "exp_avg_sq"} and moments["step"].item() >= 0
            if not sound or not all(x.isfinite().all() for x in moments.values()):
                raise ValueError("moments")
        trained = set()
        for group in optimizer.param_groups:
            trained.update(id(p) for p in group["params"] if p.requires_grad)
        if optimizer.state and set(map(id, optimizer.state)) != trained:
            raise ValueError("parameters")
    except Exception:                                  # a dict can be wrong in many ways
        raise UserError(f"{path}: its optimiser state is damaged, or of another version of the code; give "
                        "another --out, or --fresh") from None


def load_probe(probe, state, path):
    """What a checkpoint keeps of an OnlineProbe, or a sentence."""
    try:
        probe.load_state_dict(state)
    except Exception:                                  # a dict can be wrong in many ways
        raise UserError(f"{path}: the state of its online probe is damaged, or of other classes; give "
                        "--no-online-probe to go on without, or another --out, or --fresh") from None


def check_moments(optimizer, step, path):
    """UserError where the optimiser's state has other shapes than its parameters, or after steps is none."""
    shapes = []
    for p, moments in optimizer.state.items():
        shapes += [moments["exp_avg"].shape == p.shape, moments["exp_avg_sq"].shape == p.shape]
    if not all(shapes) or step and not shapes:
        raise UserError(f"{path}: its optimiser state has another shape than its weights; give another "
                        "--out, or --fresh")


# ----------------------------------------------------------------------------------------------------------
# 3. Is it healthy?
# ----------------------------------------------------------------------------------------------------------

COLLAPSED = 0.02                      # std of an embedding over the clips; AV-JEPA's Gaussian has 1


def alarms(rows, warmup=0):
    """What has gone wrong by the last of the log's rows: {name: message}. warmup: steps in which the ranks
    of a healthy run fall. A row whose clips lack what a term needs says nothing of it."""
    found = {}
    for column in rows[-1]:
        kind, _, name = column.partition("/")
        if kind == "know_nothing":
            found.update(term_alarms(rows, name))
        if kind == "rank":
            found.update(rank_alarm(rows, name, warmup))
        if kind == "std" and rows[-1][column] < COLLAPSED:
            std = f"the std of the embeddings of {name} is {rows[-1][column]:.3f}"
            found[f"{name} collapse"] = f"COLLAPSE, {std}; lower --lr"
    return found


def term_alarms(rows, name):
    """Of a term and of a predictor that knows nothing. The authors' release of MJEPA is said to degrade
    late in training, with rising terms within and falling terms across (their issue tracker, #4)."""
    heard = [row for row in rows if row.get(f"know_nothing/{name}") and f"loss/{name}" in row]
    if not heard:
        message = f"no clip so far has what {name} needs, it learns nothing; try other --terms, --modalities"
        return {f"{name} has none": message} if len(rows) >= 5 else {}
    if not rows[-1][f"know_nothing/{name}"]:
        return {}
    found = {}
    loss = np.array([row[f"loss/{name}"] for row in heard])
    nothing = np.array([row[f"know_nothing/{name}"] for row in heard])
    across = "->" in name
    if len(loss) >= 13 and not across and rises(loss) and rises(loss / nothing):
        found[f"{name} rises"] = f"{name} rises: {loss[-3:].mean():.3g}, after {loss.min():.3g}"
    lowest = min(loss[-1], nothing[-1]) if across else nothing[-1]
    if lowest < 0.05 * nothing.max():
        message = f"{name} is at its floor ({lowest:.3g}): its target says next to nothing any more"
        found[f"{name} floor"] = message
    return found


def rises(values):
    """Whether the last three are a fifth above the lowest mean of ten before: richer targets explain less."""
    lowest = np.convolve(values[:-3], np.full(10, 0.1), "valid").min()
    return values[-3:].mean() > 1.2 * lowest


def rank_alarm(rows, name, warmup):
    """An effective rank under half of the highest mean of five rows before."""
    rank = [row[f"rank/{name}"] for row in rows if row["step"] >= warmup and f"rank/{name}" in row]
    if len(rank) < 10:
        return {}
    highest = np.convolve(rank[:-5], np.full(5, 0.2), "valid").max()
    now = np.mean(rank[-5:])
    if now >= 0.5 * highest:
        return {}
    return {f"{name} rank": f"the effective rank of {name} falls: {now:.1f}, after {max(rank):.1f}"}


def on_screen(row):
    """A row of the log as a line: a loss stands beside that of a predictor that knows nothing."""
    words = [f"step {row['step']}"]
    for column, value in row.items():
        kind, _, name = column.partition("/")
        beside = row.get(f"know_nothing/{name}")
        if kind == "know_nothing" or isinstance(value, int):       # counts of troubles stand in the file
            continue
        if kind == "loss" and beside is not None:
            words.append(f"{name} {value:.3g}/{beside:.3g}")
        else:
            words.append(f"{column} {value:.4g}")
    return "  ".join(words)


# greys and dashes
LINES = (("k", "-"), ("0.6", "--"), ("0.35", "-."), ("0.5", ":"), ("0.75", "-"), ("0.2", "--"))
MARKERS = "os^Dvx*"                                    # 42 together


def draw_curves(path, runs, title):
    """A picture with a small plot for each column of the logs over the steps, the losses first; thin and
    dotted: the loss of a predictor that knows nothing. path: or a file; runs: {label: rows of read_log}, of
    any methods."""
    from matplotlib.figure import Figure               # its own canvas: nothing of pyplot's state changes
    columns = {}                                   # a column that is always 0 counts troubles that never came
    for rows in runs.values():
        for row in rows:
            columns.update((key, None) for key, value in row.items() if value)
    columns = [c for c in columns if c != "step" and not c.startswith("know_nothing")] or ["loss"]
    columns.sort(key=lambda column: not column.startswith("loss"))
    across = min(6, max(3, math.ceil(len(columns) ** 0.5)))
    down = math.ceil(len(columns) / across)
    fig = Figure(figsize=(0.7 + 2.8 * across, 1.1 + 0.22 * len(runs) + 2.3 * down), layout="constrained")
    fig.suptitle(title, parse_math=False)
    axes = fig.subplots(down, across, squeeze=False).flat
    for ax, column in zip(axes, columns):
        draw_column(ax, column, runs)
    for ax in axes[len(columns):]:
        ax.axis("off")
    if len(runs) > 1:
        handles = axes[0].get_lines()[:len(runs)]
        legend = fig.legend(handles, runs, loc="outside lower center", fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)                 # a $ in a folder's name is a $
    fig.savefig(path, format="png", dpi=110)


def draw_column(ax, column, runs):
    """One column of several logs over the steps, the solid lines first; with few points each has a marker."""
    nothing = "know_nothing" + column.removeprefix("loss")
    for key in (column, nothing) if column.startswith("loss/") else (column,):
        for number, rows in enumerate(runs.values()):
            color, dashes = LINES[number % len(LINES)]
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            x, y = zip(*points) if points else ((), ())
            if key == column:
                every = max(1, len(x) // 6)
                marker = MARKERS[number % len(MARKERS)] if len(runs) > 1 or every == 1 else None
                ax.plot(x, y, color=color, ls=dashes, lw=1.2, marker=marker, ms=3, markevery=every)
            else:
                ax.plot(x, y, color=color, ls=":", lw=0.8)
    title = f"{column}, ms" if column.startswith("ms_") else column
    ax.set_title(textwrap.fill(title, 40), fontsize=9, parse_math=False)
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


# ----------------------------------------------------------------------------------------------------------
# 4. The run
# ----------------------------------------------------------------------------------------------------------

class Run:
    """One training run of a method. method: the METHOD of its script; recipe: of read_recipe; clips: how
    many of the set's clips are trained on, drawn with seed 0 (None or 0: all); listing: of the clips, where
    they are not those of the set."""
    def __init__(self, method, args, recipe, clips=None, listing=None):
        self.method = method
        self.args = args
        self.recipe = recipe
        self.out = Path(args.out)
        self.process = start_process(args.device, args.bf16)
        self.device = self.process.device
        self.rank = self.process.rank
        self.world = self.process.world
        self.workers = default_workers(self.process) if args.workers is None else args.workers
        self.threads = torch.get_num_threads()
        if self.device.type == "cpu" and recipe["size"] in ("nano", "toy"):
            torch.set_num_threads(1)                   # small operations, and the other cores decode

        self.made = data.find_set(args.data).make is not None
        self.listing = listing or self.list_clips()
        self.described = data.describe(self.listing)
        if clips and clips < len(self.listing):
            self.described += f", of which {clips:,} are trained on (--clips)"
            drawn = np.random.default_rng(0).permutation(len(self.listing))[:clips]
            self.listing = self.listing.subset(np.sort(drawn))
        if args.online_probe and self.listing.labels is None:
            raise UserError(f"--online-probe: the clips of {self.listing.root} have no labels; put them into "
                            "sub-folders, one for each class, or leave the flag out")
        self.batch = recipe["batch_size"] // self.world                    # clips of this rank ...
        self.places = range(self.rank, recipe["batch_size"], self.world)   # ... and their places in a step
        per_epoch = len(self.listing) // recipe["batch_size"]
        self.augment = data.Augment(**{name: recipe[name] for name in data.CHANGES})
        self.total = recipe["steps"] or max(1, round(recipe["epochs"] * per_epoch))
        recipe["steps"] = self.total

    def list_clips(self):
        return list_clips(self.args, self.process)

    # -- before the loop -----------------------------------------------------------------------------------

    def build(self, make_model, *settings):
        """make_model(*settings) with the run's initial weights, on its device."""
        common.seed_step(self.args.seed, 0)
        try:
            return make_model(*settings).to(self.device)
        except ValueError as e:                        # lengths and patches that do not fit each other
            raise UserError(str(e)) from None
        except (MemoryError, RuntimeError) as e:
            raise UserError(f"the model is too large for this machine {common.reason(e)}; make it or its "
                            "inputs smaller") from None

    def resume(self, model, optimizer, weights=None):
        """Make the folder, and go on from the checkpoint that a stopped run left there, or make a
        finished one longer. A run with other recipe values than the ones asked for is refused, not written
        over. Under torchrun all processes must see the same folder. weights: of data.Batches."""
        found = self.open_folder()
        self.start = found["step"] if found else 0
        self.done = self.start                         # steps ...
        here = [self.out.resolve(), (self.out / "latest.pt").resolve()]
        mine = self.args.resume == "auto" or Path(self.args.resume).resolve() in here
        self.saved = self.start if found and mine else None    # ... that this run's checkpoint has, if any
        if self.process.any(self.start != self.process.largest(self.start)):
            raise UserError(f"--out {self.out}: the processes find different checkpoints there; it must lie "
                            "on a file system that all nodes share")
        self.order = data.Batches(len(self.listing), self.recipe["batch_size"], self.args.seed, self.start,
                                  self.total, self.rank, self.world, self.args.accumulate, weights)
        self.online = self.make_probe(model)
        self.found = None                   # what is small of it; the weights would be gigabytes on each rank
        if found:
            file = self.out / "latest.pt" if self.args.resume == "auto" else self.args.resume
            common.load_weights(model, found["model"], file)
            load_optimizer(optimizer, found["optimizer"], file)
            check_moments(optimizer, self.start, file)
            if self.online and "online_probe" in found:
                load_probe(self.online, found["online_probe"], file)
            self.found = {key: found[key] for key in ("inputs", "args", "recipe")}
            self.say_world(model, found.get("world", self.world))

    def open_folder(self):
        """Make the folder and lock it. Returns the checkpoint to go on from, None if there is none."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {self.out}: cannot be made ({e.strerror})") from None
        self.process.from_main(self.lock)
        return self.find()

    def find(self):
        """The checkpoint to go on from, None if there is none."""
        args = self.args
        if args.fresh and args.resume != "auto":
            raise UserError("--fresh and --resume FILE exclude each other; give one of them")
        file = self.out / "latest.pt" if args.resume == "auto" else Path(args.resume)
        if args.fresh or args.resume == "auto" and not os.path.exists(file):
            return None
        found = common.load_checkpoint(file, self.method["name"])
        before = {**asdict(data.Augment()), **found["recipe"]}     # of a run before there was any
        tau = before.get("tau")
        if isinstance(tau, float) and isinstance(self.recipe["tau"], tuple):    # of MJEPA's before --tau
            before["tau"] = (tau, tau)
        free = {"epochs"}                              # the steps say it all
        if (args.steps or args.epochs) and before.get("steps", self.total) < self.total:
            free.add("steps")                          # longer, and asked for: not by a set that has grown
        asked = {k: v for k, v in self.recipe.items() if k not in free}
        other = [f"{k} {before.get(k)} (now {v})" for k, v in asked.items() if before.get(k) != v]
        if other:
            raise UserError(f"{file}: the run there has {', '.join(other)}; give another --out, or --fresh "
                            "to start over")
        return found

    def lock(self):
        self.locked = lock_folder(self.out)            # for the life of this run

    def make_probe(self, model):
        """The heads of --online-probe, for those of audio, video and av that the encoder takes; or None."""
        wanted = self.args.online_probe
        if wanted is None:
            wanted = self.made
        if not wanted:
            return None
        encoder = next(m for m in model.children() if isinstance(m, ViT))
        names = sorted(encoder.grids)                  # audio, video
        if len(names) == 2:
            names.append("av")
        return heads.OnlineProbe(names, encoder.dim, len(self.listing.classes), self.device)

    def say_world(self, model, before):
        """A line where a run that goes on with other processes than `before` is another one."""
        noisy = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
        noisy += [m for m in model.modules() if type(m) is nn.BatchNorm1d]         # not heads.Standardise
        if before != self.world and noisy:
            self.say(f"going on with {self.world} processes where there were {before}: dropout and BatchNorm "
                     "are drawn and measured by each process, so this is another run from here")

    def normalise(self, inputs):
        """data.Inputs with the mean and std of each mel bin: those of the run that goes on, or of clips of
        the set."""
        if self.found:
            before = self.found["inputs"]
            return replace(inputs, mel_mean=before["mel_mean"], mel_std=before["mel_std"])
        if not inputs.n_mels:
            return inputs
        clips = self.recipe["stats_clips"]
        mean, std = self.process.from_main(lambda: data.mel_stats(self.listing, inputs, self.workers, clips))
        std = std.clamp_min(self.recipe["std_floor"])
        return replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist()))

    def begin(self, model, optimizer, inputs, plan, draw=None, weigh=None, clip_inputs=None):
        """Open the loader and the log, say what is trained, compile and wrap the model.

        plan(rng, duration): the views of a clip (data.Clips). draw(step): the masks of this rank's clips, a
        list of {input: (context (B, C), target (B, M))}; None: the method hides nothing. weigh: {input: its
        modalities}, for the weights of a mean over those clips that have them; None: over all clips.
        clip_inputs: of the clips, where these are longer or shorter than the encoder's `inputs`."""
        args = self.args
        self.unwrapped = model
        self.optimizer = optimizer
        self.inputs = inputs
        if self.found and self.found["inputs"] != asdict(inputs):
            raise UserError(f"{self.out}: the run there has other inputs than its recipe makes here, as of "
                            "another version of the code; give another --out, or --fresh")
        self.weigh = weigh
        self.clip_inputs = clip_inputs or inputs
        self.batches = self.load(plan)
        self.fetched = []                              # the micro-batches of a step
        self.error = None                              # what ends the run when the next step is to begin
        self.draw = draw
        self.pool = ThreadPoolExecutor(1)           # draws the masks of the next step while this one computes
        self.drawn = None
        self.encoders = [m for m in model.children() if isinstance(m, ViT)]
        self.say_what()
        if args.compile:
            for encoder in self.encoders:
                encoder.compile()
        self.model = self.process.wrap(model)
        self.stop = StopSignal()
        self.stopped = False
        self.troubles = data.Troubles(len(self.listing), args.max_bad)
        self.open_log()

    def load(self, plan):
        """An iterator over the micro-batches of all steps that are left."""
        clips = data.Clips(self.listing, self.clip_inputs, plan, self.args.seed, augment=self.augment)
        pin = self.device.type == "cuda"
        return iter(data.train_loader(clips, self.order, self.workers, pin, self.args.accumulate))

    def say(self, line):
        """Print a line, on rank 0 alone."""
        if self.process.main:
            tell(line)

    def tokens(self):
        """How many tokens of a clip the encoder is given, in words."""
        encoder = self.encoders[0]
        given = [m for m in encoder.grids if self.recipe.get("modality") in (None, "av", m)]
        return " + ".join(f"{encoder.num(m):,} {m}" for m in given)

    def say_what(self):
        """What is trained, on how many clips, and where it goes."""
        recipe = self.recipe
        trained = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
        teacher = " and a teacher" if len(self.encoders) > 1 else ""
        bf16 = " bf16" if self.process.bf16 else ""
        self.say(self.described)
        self.say(f"{self.method['title']}, ViT {recipe['size']}, {self.tokens()} tokens, {trained:,} "
                 f"parameters{teacher}, {self.total:,} steps of {recipe['batch_size']} clips, "
                 f"{self.world} x {self.device.type}{bf16} -> {self.out}")
        if self.start:
            before = self.found["recipe"]["steps"]
            longer = ""
            if before < self.total:
                longer = f": longer than the {before:,} before, from here by the schedules of {self.total:,}"
            self.say(f"going on at step {self.start:,} of {self.total:,}{longer}")

    def open_log(self):
        """Read the rows of the steps before the one that the run goes on from."""
        share = self.recipe.get("warmup", 0)
        self.warmup = share if share >= 1 else share * self.total
        self.rows = []
        self.alarmed = {}                              # {alarm: the step at which it last was}
        if self.process.main:
            self.rows = [row for row in read_log(self.out) if row["step"] < self.start]
        self.before = list(self.rows)                  # what stays of a log that lies there
        self.stale = self.saved is None and os.path.exists(self.out / "latest.pt")      # another run's
        if self.rows:
            self.alarmed = dict.fromkeys(alarms(self.rows, self.warmup), self.start)
            self.troubles.go_on(self.rows[-1])
        self.noted = []
        self.logged = self.start
        self.began = time.time()
        self.waited = 0.0                              # seconds for clips and masks since the last row

    def take_over(self):
        """Drop what lies in the folder of steps after the one that this run has begun at: once a step is
        done, so that a run which cannot begin leaves all of another one. Raises OSError."""
        if self.before is None:
            return
        text = "".join(json.dumps(row) + "\n" for row in self.before)
        replace_file(self.out / "log.jsonl", lambda file: file.write(text.encode()))
        (self.out / "results.json").unlink(missing_ok=True)
        for step, file in step_files(self.out).items():
            if step > self.start:
                file.unlink(missing_ok=True)
        self.before = None

    # -- in the loop ---------------------------------------------------------------------------------------

    def steps(self):
        """The steps that are left, each when its clips are there; ends when a signal comes."""
        bar = tqdm(desc="train", total=self.total, unit="step", initial=self.start, delay=1e-3,
                   disable=not self.process.main)
        for step in range(self.start, self.total):
            self.step = step
            self.fetch()
            if self.ends():
                break
            yield step
            with contextlib.suppress(OSError):         # as in `tell`
                bar.update()
        else:
            self.ends()                                # the last step may have met an error
        with contextlib.suppress(OSError):
            bar.close()

    def fetch(self):
        """Wait for the micro-batches of a step; a signal ends the wait."""
        self.fetched = []
        clock = time.time()
        try:
            while not self.error and len(self.fetched) < self.args.accumulate:
                batch = self.stop.wait(functools.partial(next, self.batches))
                if batch is None:
                    break
                self.troubles.add(batch)
                self.fetched.append(batch)
        except UserError as e:
            self.error = str(e)
        self.waited += time.time() - clock

    def ends(self):
        """Whether the run ends before the next step, on all ranks alike: a signal came to one of them, or one
        has an error, which is raised. The last complete step is saved."""
        stop = bool(self.stop) and self.done < self.total
        worst = self.process.largest(2 if self.error else int(stop))
        if worst == 0:
            return False
        self.keep()
        if worst == 2 or self.error:
            self.stop.release()
            error = self.error or "another process of this run has met an error, and says which"
            raise UserError(f"{error}; {self.kept()}{self.advice()}")
        self.stopped = True
        self.say(f"stopped after step {self.done} of {self.total}: {self.kept()}{self.advice()}")
        return True

    def kept(self):
        """What there is to go on from."""
        if not self.process.main:
            return "rank 0 says what is saved"
        if self.saved is None:
            return f"nothing of this run is in {self.out}/latest.pt yet"
        return f"{self.out}/latest.pt holds step {self.saved} of {self.total}"

    def advice(self):
        """How to go on, if there is something to go on from."""
        if self.saved is None:
            return ""
        without = ""
        if self.args.fresh:
            without = " without --fresh"
        if self.args.resume != "auto":
            without = " without --resume"
        return f", and the same command{without} goes on from there"

    def micro_batches(self, step):
        """(batch on the device, its masks, weight, tick) for each of --accumulate: weight is {input: (B,)}
        of `weights`, or this micro-batch's share of the step's mean; tick counts the micro-batches of the
        run, as if all its steps had as many. DDP averages the gradients at the last one alone. Sets torch's
        random stream."""
        accumulate = self.args.accumulate
        clock = time.time()
        masks = self.masks(step)
        weights = self.weights(self.fetched) if self.weigh else [1 / accumulate] * accumulate
        for micro, (batch, weight) in enumerate(zip(self.fetched, weights)):
            batch = data.to_device(batch, self.device)
            part = None if masks is None else self.part(masks, micro)
            self.waited += time.time() - clock
            tick = step * accumulate + micro
            common.seed_step(self.args.seed, tick, self.rank)
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or self.model is self.unwrapped else self.model.no_sync():
                yield batch, part, weight, tick
            clock = time.time()

    def masks(self, step):
        """The masks of a step; those of the next one are drawn meanwhile."""
        if self.draw is None:
            return None
        masks = self.drawn.result() if self.drawn else self.draw(step)
        self.drawn = self.pool.submit(self.draw, step + 1) if step + 1 < self.total else None
        return masks

    def part(self, masks, micro):
        """A micro-batch's rows of the masks, on the device."""
        sets = []
        for mask_set in masks:
            sets.append({})
            for name, (context, target) in mask_set.items():
                context = context.chunk(self.args.accumulate)[micro].to(self.device)
                target = target.chunk(self.args.accumulate)[micro].to(self.device)
                sets[-1][name] = (context, target)
        return sets

    def weights(self, batches):
        """For each micro-batch {input: (B,)}: the weights of a mean over those clips, of the whole step and
        all processes, that have what the input needs: silence trains nothing. Times the number of
        processes, since DDP averages the gradients."""
        weights = []
        for batch in batches:
            weights.append({})
            for name, modalities in self.weigh.items():
                has = [batch[f"has_{m}"] for m in modalities]                   # each (B,) bool
                weights[-1][name] = torch.stack(has).all(0).float()
        for name in self.weigh:
            count = self.process.total(sum(weight[name].sum() for weight in weights)).item()
            for weight in weights:
                weight[name] = (weight[name] * self.world / max(1.0, count)).to(self.device)
        return weights

    def autocast(self):
        return self.process.autocast()

    def note(self, loss, shown):
        """Keep what a micro-batch shows: scalars, its part of the step's mean; embeddings (B, D), whose
        health is logged; clip embeddings clip/audio, clip/video, clip/av (B, D) for the online probe; scores
        (B, C) of heads, which are measured by `targets`."""
        self.noted.append({"loss": loss.detach(), **shown})

    def clip(self, max_norm=None):
        """Clip the norm of all gradients together, if at all; returns what it was. UserError where it, or the
        loss, is not finite."""
        limit = math.inf if max_norm is None else max_norm
        grad_norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), limit).item()
        loss = sum(shown["loss"] for shown in self.noted).item()
        if self.process.any(not math.isfinite(loss + grad_norm)):
            poisoned = []
            for batch in self.fetched:
                poisoned += self.not_finite(batch)
            where = f"not finite at step {self.step}"
            if poisoned:
                raise UserError(f"the mel of {', '.join(poisoned)} is {where}: take the clip out, or see to "
                                f"the mean and std of the mel; {self.kept()}")
            raise UserError(f"the loss or its gradient is {where}, while the clips are; {self.kept()}; give "
                            "a new --out and a lower --lr")
        return grad_norm

    def not_finite(self, batch):
        """The files of a batch whose mel is not finite; pictures always are."""
        if "audio" not in batch:
            return []
        bad = ~batch["audio"].flatten(1).isfinite().all(1)                  # a view with sound each
        clip = batch["present"][:, :, 1].nonzero()[:, 0]                    # and whose it is
        return [str(self.listing.path(batch["index"][i])) for i in clip[bad].unique()]

    def log(self, step, **values):
        """At each interval: a JSON row in log.jsonl, of the whole step over all micro-batches and ranks, a
        line on the screen, and the alarms. values: further columns, the same on all ranks."""
        noted = self.noted
        self.noted = []
        if self.online:
            self.probe_clips(noted)
        if (step + 1) % self.args.log_every and step + 1 < self.total:
            return
        row = {"step": step}
        for name in noted[0]:
            parts = [shown[name] for shown in noted]
            kind, _, part = name.partition("/")
            if kind == "embedding":
                std, rank = common.health(common.gather_ranks(torch.cat(parts)))
                row[f"std/{part}"] = std
                row[f"rank/{part}"] = rank
            elif kind == "scores":
                targets = common.gather_ranks(torch.cat([shown["targets"] for shown in noted])).cpu()
                scores = common.gather_ranks(torch.cat(parts)).cpu()
                metric, value, _ = heads.measure(scores, targets)
                row[f"{metric}/{part}"] = value
            elif kind not in ("clip", "targets"):
                row[name] = self.process.total(sum(parts)).item() / self.world
        if self.online:
            row.update(self.online.row())
        row.update(values)
        count = step + 1 - self.logged
        row["ms_data"] = 1e3 * self.waited / count
        row["ms_step"] = 1e3 * (time.time() - self.began) / count
        counts = self.troubles.row()
        row.update(zip(counts, self.process.total(torch.tensor(list(counts.values()))).tolist()))
        if self.process.main:
            self.write(row)
        self.logged = step + 1
        self.began = time.time()
        self.waited = 0.0

    def probe_clips(self, noted):
        """A step of the online probe, on all ranks the same: on the clip embeddings of the whole step, over
        all micro-batches and ranks."""
        clips = []
        for batch in self.fetched:
            clips.append(torch.stack([batch["index"], batch["has_audio"], batch["has_video"]], 1))
        clips = common.gather_ranks(torch.cat(clips).to(self.device)).cpu()             # (B, 3)
        index = clips[:, 0].numpy()
        audio, video = clips[:, 1:].bool().T
        has = {"audio": audio, "video": video, "av": audio & video}
        offsets = self.listing.offsets
        labelled = offsets[index + 1] > offsets[index]
        embeddings = {}
        for key in noted[0]:
            kind, _, name = key.partition("/")
            if kind == "clip":
                x = common.gather_ranks(torch.cat([shown[key] for shown in noted]))     # (B, D)
                embeddings[name] = x[labelled]
                has[name] = has[name][labelled]
        self.online.step(embeddings, has, self.listing.targets(index[labelled]))

    def write(self, row):
        step = row["step"]
        try:
            self.take_over()
            append_row(self.out / "log.jsonl", row)
        except OSError as e:
            self.error = f"{self.out}/log.jsonl: cannot be written ({e.strerror})"
        tell(on_screen(row))
        if len(self.rows) >= 4000:
            self.rows = self.rows[:2000:2] + self.rows[2000:]              # the older ones thinner
        self.rows.append(row)
        for name, message in alarms(self.rows, self.warmup).items():
            again = name in self.alarmed and step - self.alarmed[name] <= 20 * self.args.log_every
            if not again:                              # said once, and again if it comes back
                tell(f"WARNING at step {step}: {message}; see the README, Is it healthy?")
            self.alarmed[name] = step

    def save(self, step):
        """A checkpoint at each interval of the two, at the end, and over another run's at once."""
        self.done = step + 1
        if self.done % self.args.save_every == 0 or self.stays() or self.stale or self.done == self.total:
            self.keep()
            self.stale = False

    def stays(self):
        """Whether --keep-every wants the checkpoint of the last complete step to stay."""
        return bool(self.args.keep_every) and self.done % self.args.keep_every == 0

    def keep(self):
        """Write the checkpoint of the last complete step, unless it is there; what hinders it is kept for
        `ends`."""
        if not self.process.main or self.done in (self.start, self.saved):
            return
        model = self.unwrapped.state_dict()
        if not all(x.isfinite().all() for x in model.values()):
            error = f"the weights are not finite after step {self.done}; give a new --out and a lower --lr"
            self.error = self.error or error
            return
        parts = {"projector": None, "cross": None, **self.unwrapped.parts}
        content = dict(version=code_version(), method=self.method, step=self.done, steps=self.total,
                       world=self.world, args=vars(self.args), recipe=self.recipe, inputs=asdict(self.inputs),
                       **parts, model=model, optimizer=self.optimizer.state_dict())
        if self.online:
            content["online_probe"] = self.online.state_dict()
        # the one that stays first: a run that goes on from latest.pt has it
        names = [step_file(self.done), "latest.pt"] if self.stays() else ["latest.pt"]
        name = "log.jsonl"
        try:
            self.take_over()
            for name in names:
                replace_file(self.out / name, lambda f: write_tensors(content, f))
            self.saved = self.done
        except OSError as e:
            self.error = self.error or f"{self.out}/{name}: cannot be written ({e.strerror})"

    # -- after the loop ------------------------------------------------------------------------------------

    def close(self):
        """End the data workers and the thread of the masks; signals are handled as before."""
        self.batches.close()
        self.pool.shutdown()
        self.stop.release()

    def finish(self, report=None):
        """The curves, and for a set that we make ourselves the table: report(folder, data folder, process,
        workers, set), if there is one."""
        self.close()
        if self.stopped or not self.process.main:
            return
        if self.stop:
            self.say(f"stopped before the curves and the table: {self.kept()}{self.advice()}")
            return
        title = f"{self.method['title']}, {self.args.data}, seed {self.args.seed}, {self.total} steps"
        rows = {"": read_log(self.out)}
        try:
            replace_file(self.out / "curves.png", lambda file: draw_curves(file, rows, title))
            self.say(f"trained {self.total:,} steps: {self.out}/latest.pt, log.jsonl, curves.png")
            if self.made and report:
                torch.set_num_threads(self.threads)
                report(self.out, self.args.data_dir, self.process, self.workers, self.args.data)
        except OSError as e:
            raise UserError(f"{e.filename or self.out}: curves.png or results.json cannot be written "
                            f"({e.strerror}); {self.out}/latest.pt is whole, and the same command makes them "
                            "once it can") from None


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ----------------------------------------------------------------------------------------------------------
# 5. Flags
# ----------------------------------------------------------------------------------------------------------

COLUMNS = ("paper", "toy")                             # of a recipe's table


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help says each default: the value; off for a switch; or, where the recipe or the machine decides,
    what the flag's own text says."""
    def _get_help_string(self, action):
        if action.default is False:
            return f"{action.help} (default: off)"
        return action.help if action.default is None else super()._get_help_string(action)


def flag_groups(parser):
    """The add_argument of the groups of --help, in the order of all scripts: data, run, method, machine. The
    last has its --device, --bf16 and --workers."""
    names = ("data", "run", "method", "machine")
    groups = [parser.add_argument_group(name).add_argument for name in names]
    groups[-1]("--device", default="auto", help="auto, cpu, mps or cuda")
    groups[-1]("--bf16", action=argparse.BooleanOptionalAction,
        help="matrix products in bf16 (default: where the device computes in it)")
    groups[-1]("--workers", type=int, help="processes that decode, 0: none (default: on a CPU half of the "
        "cores, of two both; beside GPUs all but one for each; at most 16 a process)")
    return groups


# of the flags of every loop
LOOP_RANGES = {
    "accumulate": (1, 10 ** 6), "log_every": (1, 10 ** 9), "save_every": (1, 10 ** 9), "max_bad": (0, 1)}


def loop_flags(add_data, add_run, add_machine):
    """The flags of every loop, with the same meaning: of the four scripts and of fine-tuning."""
    add_data("--max-bad", type=float, default=0.1,
        help="stop training when more than this share of the clips does not decode")
    add_run("--fresh", action="store_true", help="start over, whatever lies in --out")
    add_run("--accumulate", type=int, default=1, help="micro-batches a step, for small memories")
    add_run("--log-every", type=int, default=10, help="steps between two rows of the log")
    add_run("--save-every", type=int, default=500, help="steps between two checkpoints")
    add_machine("--compile", action="store_true", help="torch.compile the encoder")
    add_machine("--checkpoint-activations", action="store_true",
        help="less memory: the backward pass computes each block again")


def make_parser(doc, name):
    """A parser with the flags that all methods share, with the same meaning, and the add_argument of its
    group "method". doc: the script's; name: of the method."""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    add_data, add_run, add_method, add_machine = flag_groups(parser)
    add_data("--data", default="toy", help=", ".join(data.SETS))
    add_data("--data-dir",
        help="folder with the clips and the csv files (default: none; toys: in cache/)")
    add_run("--out", help=f"folder of the run (default: runs/{name}-DATA-seedSEED)")
    add_run("--seed", type=int, default=0, help="of initial weights, order, views and masks")
    add_run("--steps", type=int, help="optimiser steps, instead of --epochs; more than before make a "
        "run longer (default: the recipe's)")
    add_run("--epochs", type=float, help="passes over the data (default: the recipe's)")
    add_run("--batch-size", type=int, help="clips a step, over all processes (default: the recipe's)")
    add_run("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add_run("--resume", default="auto", metavar="auto|FILE",
        help="auto goes on from --out; or a checkpoint of the same recipe")
    loop_flags(add_data, add_run, add_machine)
    add_run("--online-probe", action=argparse.BooleanOptionalAction,
        help="linear heads trained along on labels, which change nothing else: probe/audio, probe/video and "
        "probe/av in the log (default: on for the sets that we make ourselves)")
    add_run("--keep-every", type=int,
        help=f"steps between two checkpoints that stay, as {step_file(1000)} (default: none)")
    add_method("--recipe", choices=COLUMNS,
        help="values of the table at the top (default: toy for the toy sets, else paper)")
    add_method("--size", help=f"ViT: {', '.join(common.SIZES)} (default: the recipe's)")
    add_method("--seconds", type=float,
        help="length of a view; where the pictures are shorter, of its sound (default: the recipe's)")
    add = parser.add_argument_group("augmentation of the training views (default: none in the papers; the "
        "toy's recipes have all but blur, but for --data toy; 0: off)").add_argument
    add("--jitter", type=float,
        help="brightness, contrast and saturation by factors of 1 +- this, in 8 of 10 views")
    add("--hue", type=float, help="colours by up to this share of a turn of their circle, in 8 of 10 views")
    add("--grey", type=float, help="probability of a view without colours")
    add("--blur", type=float, help="probability of a blurred view")
    add("--gain", type=float, help="louder or softer by up to so many dB")
    add("--filter", type=float, help="bass, middle and treble louder or softer by up to so many dB")
    add("--noise", type=float, help="white noise so many dB below the sound, or up to 20 more: a "
        "small number is loud")
    return parser, add_method


def recipe_column(args):
    """--recipe, or the one that fits --data."""
    return args.recipe or ("toy" if data.find_set(args.data).make else "paper")


def read_recipe(args, name, table, flags=(), modalities=("video", "audio")):
    """The column of a recipe's table {value's name: (paper, toy, source)} that a run takes, with the flags
    that were given (of `flags` and of those that all scripts share) in place of its values. Checks the
    shared flags; sets args.out where it was left open. name: of the method; modalities: that it takes."""
    name_of_column = recipe_column(args)
    column = COLUMNS.index(name_of_column)
    recipe = {key: row[column] for key, row in table.items()}
    augment = data.AUGMENT[name_of_column] if data.find_set(args.data).augment else data.Augment()
    recipe.update(asdict(augment))
    for flag, value in vars(args).items():
        if value == "":
            raise UserError(f"--{flag.replace('_', '-')} '': is empty; give a value, or leave the flag out")
    if args.steps is not None or args.epochs is not None:
        recipe["steps"] = args.steps
        recipe["epochs"] = args.epochs
    for key in ("size", "batch_size", "lr", "seconds", *data.CHANGES, *flags):
        value = getattr(args, key)
        if value is not None:
            recipe[key] = tuple(value) if isinstance(value, list) else value
    if recipe["size"] not in common.SIZES:
        raise UserError(f"--size {recipe['size']}: unknown ViT; one of {', '.join(common.SIZES)}")
    for tau in getattr(args, "tau", None) or ():
        check_range("--tau", tau, 0, 1)
    check_range("--lr", recipe["lr"], 0, 10)
    check_range("--batch-size", recipe["batch_size"], 2, 10 ** 6)
    check_range("--steps", 1 if recipe["steps"] is None else recipe["steps"], 1, 10 ** 9)
    check_range("--epochs", 1 if recipe["epochs"] is None else recipe["epochs"], 1e-6, 10 ** 6)
    check_range("--seconds", recipe["seconds"], 0.1, 3600)
    for key, (modality, largest) in data.CHANGES.items():
        check_range(f"--{key}", recipe[key], 0, largest)
        if modality not in modalities and getattr(args, key):
            raise UserError(f"--{key} has no effect: this run takes {modalities[0]} alone; leave it out")
        if modality not in modalities:
            recipe[key] = 0.0
    for key, (low, high) in LOOP_RANGES.items():
        check_range("--" + key.replace("_", "-"), getattr(args, key), low, high)
    check_range("--keep-every", 1 if args.keep_every is None else args.keep_every, 1, 10 ** 9)
    check_range("--workers", args.workers or 0, 0, 1024)
    check_range("--seed", args.seed, 0, 2 ** 31)
    recipe.update(data=args.data, seed=args.seed)
    args.out = args.out or f"runs/{name}-{args.data}-seed{args.seed}"
    return recipe
