"""A training run, the same for all methods: processes, folder, loader, micro-batches, log, alarms, saving,
curves, flags.

The scripts' loops stand on the class Run:

    run = Run(METHOD, args, recipe)                     # processes, the clips of the set, the number of steps
    ...
    for step in run.steps():                             # ends at the last step, or after a signal's save
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
"""
import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import data
from common import UserError, ViT, check_range

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

    def any(self, flag):
        """True on all ranks if it is True on one."""
        return bool(flag) if self.world == 1 else bool(self.largest(int(bool(flag))))

    def largest(self, value):
        """The largest of the ranks' integers."""
        value = torch.tensor(value, device=self.device)
        if self.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value.item())

    def total(self, x):
        """The sum over the ranks of a tensor."""
        x = x.to(self.device)
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def barrier(self):
        if dist.is_initialized():
            dist.barrier()

    def from_main(self, make):
        """What rank 0's make() returns, on all ranks."""
        box = [make() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]


def choose_device(name):
    """'auto': CUDA, then MPS, then the CPU. UserError where this machine does not have it."""
    torchrun = "RANK" in os.environ
    if name == "auto":
        mps = torch.backends.mps.is_available() and not torchrun           # MPS has no process group
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torchrun:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        reason = "this machine or this torch does not have it"
        raise UserError(f"--device {name}: {reason}; use cpu, mps, cuda or auto") from None
    return device


def computes_bf16(device):
    """Whether the device has bf16 in hardware; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def start_process(device="auto"):
    """Pick the device, and join the process group if torchrun started us."""
    device = choose_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # rank 0 alone writes the toy clips and the statistics of the mel: the others wait, maybe longer than
        # NCCL's 10 minutes
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(timeout=datetime.timedelta(minutes=30), **backend)
    if not dist.is_initialized():
        return Process(device, bf16=computes_bf16(device))
    return Process(device, dist.get_rank(), dist.get_world_size(), computes_bf16(device))


def default_workers(process):
    """Processes that decode: half of the cores for training on a CPU, most of them beside a GPU, at most 16 a
    process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = cores // 2 if process.device.type == "cpu" else cores - local
    return max(1, min(16, free // local))


class StopSignal:
    """True once SIGTERM or Ctrl-C came: the loop then ends the step, saves and says how to go on. A second
    Ctrl-C is not caught; a second SIGTERM is, since SLURM and torchrun each send one."""
    def __init__(self):
        self.came = False
        self.before = {}
        with contextlib.suppress(ValueError):         # not in the main thread: who runs us there handles them
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.came = True
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

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
    """write(file) under a temporary name, then rename: whoever is killed in between leaves the old file
    whole. Raises OSError."""
    temporary = Path(path).with_name(Path(path).name + ".part")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_log(out):
    """The rows of a run's log.jsonl; a last line that was cut off is left out."""
    file = Path(out) / "log.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def add_row(ckpt, name, row):
    """Append a JSON row to the file `name` beside a checkpoint."""
    folder = Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent
    try:
        with open(folder / name, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        reason = f"the result above could not be written there ({e.strerror})"
        raise UserError(f"{folder / name}: {reason}") from None


def load_optimizer(optimizer, state, path):
    """load_state_dict, with a sentence where the parameter groups are others."""
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        raise UserError(f"{path}: its optimiser state is of another version of the code; give another --out, "
                        "or --fresh") from None


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
    heard = [row for row in rows if row.get(f"know_nothing/{name}")]
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
    """One column of several logs over the steps, the solid lines first."""
    nothing = "know_nothing" + column.removeprefix("loss")
    for key in (column, nothing) if column.startswith("loss/") else (column,):
        for number, rows in enumerate(runs.values()):
            color, dashes = LINES[number % len(LINES)]
            marker = MARKERS[number % len(MARKERS)] if len(runs) > 1 else None
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            x, y = zip(*points) if points else ((), ())
            if key == column:
                every = max(1, len(x) // 6)
                ax.plot(x, y, color=color, ls=dashes, lw=1.2, marker=marker, ms=3, markevery=every)
            else:
                ax.plot(x, y, color=color, ls=":", lw=0.8)
    ax.set_title(f"{column}, ms" if column.startswith("ms_") else column, fontsize=9, parse_math=False)
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


# ----------------------------------------------------------------------------------------------------------
# 4. The run
# ----------------------------------------------------------------------------------------------------------

class Run:
    """One training run of a method. method: the METHOD of its script; recipe: of read_recipe; clips: how
    many of the set's clips are trained on, drawn with seed 0 (None or 0: all)."""
    def __init__(self, method, args, recipe, clips=None):
        self.method = method
        self.args = args
        self.recipe = recipe
        self.out = Path(args.out)
        self.process = start_process(args.device)
        self.device = self.process.device
        self.rank = self.process.rank
        self.world = self.process.world
        self.workers = default_workers(self.process) if args.workers is None else args.workers
        if self.device.type == "cpu" and recipe["size"] in ("nano", "toy"):
            torch.set_num_threads(1)                   # small operations, and the other cores decode

        self.made = data.find_set(args.data).make is not None
        if self.made and self.process.main:
            data.list_clips(args.data, args.data_dir)  # rank 0 writes the clips, the others wait
        self.process.barrier()
        self.listing = data.list_clips(args.data, args.data_dir)
        self.described = data.describe(self.listing)
        if clips and clips < len(self.listing):
            self.described += f", of which {clips:,} are trained on (--clips)"
            drawn = np.random.default_rng(0).permutation(len(self.listing))[:clips]
            self.listing = self.listing.subset(np.sort(drawn))
        self.batch = recipe["batch_size"] // self.world                    # clips of this rank
        per_epoch = len(self.listing) // recipe["batch_size"]
        self.total = recipe["steps"] or max(1, round(recipe["epochs"] * per_epoch))
        recipe["steps"] = self.total

    # -- before the loop -----------------------------------------------------------------------------------

    def build(self, make_model, *settings):
        """make_model(*settings) with the run's initial weights, on its device."""
        common.seed_step(self.args.seed, 0)
        try:
            return make_model(*settings).to(self.device)
        except ValueError as e:                        # lengths and patches that do not fit each other
            raise UserError(str(e)) from None

    def resume(self, model, optimizer):
        """Make the folder, and go on from the checkpoint that a stopped run left there. A run with other
        recipe values than the ones asked for is refused, not written over. Under torchrun all processes
        must see the same folder."""
        found = self.find()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {self.out}: cannot be made ({e.strerror})") from None
        self.start = found["step"] if found else 0
        if self.process.any(self.start != self.process.largest(self.start)):
            raise UserError(f"--out {self.out}: the processes find different checkpoints there; it must lie "
                            "on a file system that all nodes share")
        self.order = data.Batches(len(self.listing), self.recipe["batch_size"], self.args.seed, self.start,
                                  self.total, self.rank, self.world, self.args.accumulate)
        self.found = None                   # what is small of it; the weights would be gigabytes on each rank
        if found:
            common.load_weights(model, found["model"], self.out)
            load_optimizer(optimizer, found["optimizer"], self.out)
            self.found = {key: found[key] for key in ("inputs", "args")}

    def find(self):
        """The checkpoint to go on from, None if there is none."""
        args = self.args
        if args.fresh and args.resume != "auto":
            raise UserError("--fresh and --resume FILE exclude each other; give one of them")
        file = self.out / "latest.pt" if args.resume == "auto" else Path(args.resume)
        if args.fresh or args.resume == "auto" and not file.exists():
            return None
        found = common.load_checkpoint(file, self.method["name"])
        before = found["recipe"]
        other = [f"{k} {before.get(k)} (now {v})" for k, v in self.recipe.items() if before.get(k) != v]
        if other:
            raise UserError(f"{file}: the run there has {', '.join(other)}; give another --out, or --fresh "
                            "to start over")
        return found

    def normalise(self, inputs):
        """data.Inputs with the mean and std of each mel bin: those of the run that goes on, or of clips of
        the set."""
        if self.found:
            return data.Inputs(**self.found["inputs"])
        if not inputs.n_mels:
            return inputs
        clips = self.recipe["stats_clips"]
        mean, std = self.process.from_main(lambda: data.mel_stats(self.listing, inputs, self.workers, clips))
        std = std.clamp_min(self.recipe["std_floor"])
        return replace(inputs, mel_mean=tuple(mean.tolist()), mel_std=tuple(std.tolist()))

    def begin(self, model, optimizer, inputs, plan, draw=None, weigh=None):
        """Open the loader and the log, say what is trained, compile and wrap the model.

        plan(rng, duration): the views of a clip (data.Clips). draw(step): the masks of this rank's clips, a
        list of {input: (context (B, C), target (B, M))}; None: the method hides nothing. weigh: {input: its
        modalities}, for the weights of a mean over those clips that have them; None: over all clips."""
        args = self.args
        self.unwrapped = model
        self.optimizer = optimizer
        self.inputs = inputs
        self.weigh = weigh
        clips = data.Clips(self.listing, inputs, plan, args.seed)
        pin = self.device.type == "cuda"
        self.batches = iter(data.train_loader(clips, self.order, self.workers, pin))
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

    def say(self, line):
        """Print a line, on rank 0 alone."""
        if self.process.main:
            print(line)

    def say_what(self):
        """What is trained, on how many clips, and where it goes."""
        recipe = self.recipe
        tokens = [f"{self.encoders[0].num(m):,} {m}" for m in self.encoders[0].grids]
        trained = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
        teacher = " and a teacher" if len(self.encoders) > 1 else ""
        bf16 = " bf16" if self.process.bf16 else ""
        self.say(self.described)
        self.say(f"{self.method['title']}, ViT {recipe['size']}, {' + '.join(tokens)} tokens, {trained:,} "
                 f"parameters{teacher}, {self.total:,} steps of {recipe['batch_size']} clips, "
                 f"{self.world} x {self.device.type}{bf16} -> {self.out}")
        if self.start:
            self.say(f"going on at step {self.start:,} of {self.total:,}")

    def open_log(self):
        """Drop the rows after the step that the run goes on from, and the results of a run that this one
        writes over."""
        share = self.recipe.get("warmup", 0)
        self.warmup = share if share >= 1 else share * self.total
        self.rows = []
        self.alarmed = {}                              # {alarm: the step at which it last was}
        if self.process.main:
            self.rows = [row for row in read_log(self.out) if row["step"] < self.start]
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            try:
                (self.out / "results.json").unlink(missing_ok=True)
                (self.out / "log.jsonl").write_text(text)
            except OSError as e:
                raise UserError(f"{self.out}/log.jsonl: cannot be written ({e.strerror})") from None
        if self.rows:
            self.alarmed = dict.fromkeys(alarms(self.rows, self.warmup), self.start)
        self.noted = []
        self.logged = self.start
        self.began = time.time()
        self.waited = 0.0                              # seconds for clips and masks since the last row

    # -- in the loop ---------------------------------------------------------------------------------------

    def steps(self):
        """The steps that are left; ends after the save that a signal asked for."""
        bar = tqdm(range(self.start, self.total), "train", self.total, unit="step", initial=self.start,
                   disable=not self.process.main)
        for step in bar:
            self.step = step
            yield step
            if self.stopped:
                return

    def micro_batches(self, step):
        """(batch on the device, its masks, weight, tick) for each of --accumulate: weight is {input: (B,)}
        of `weights`, or this micro-batch's share of the step's mean; tick counts the micro-batches of the
        run. DDP averages the gradients at the last one alone. Sets torch's random stream."""
        accumulate = self.args.accumulate
        clock = time.time()
        masks = self.masks(step)
        batches = self.decoded(accumulate)
        weights = itertools.repeat(1 / accumulate)
        if self.weigh:                                 # counts over the whole step: all its clips at once
            batches = list(batches)
            weights = self.weights(batches)
        for micro, (batch, weight) in enumerate(zip(batches, weights)):
            batch = data.to_device(batch, self.device)
            part = None if masks is None else self.part(masks, micro)
            self.waited += time.time() - clock
            tick = step * accumulate + micro
            common.seed_step(self.args.seed, tick, self.rank)
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or self.model is self.unwrapped else self.model.no_sync():
                yield batch, part, weight, tick
            clock = time.time()

    def decoded(self, count):
        """The next micro-batches as they come from the workers; their troubles are counted."""
        for batch in itertools.islice(self.batches, count):
            self.troubles.add(batch)
            yield batch

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
        """Keep what a micro-batch shows: scalars, its part of the step's mean, and embeddings (B, D)."""
        self.noted.append({"loss": loss.detach(), **shown})

    def clip(self, max_norm=math.inf):
        """Clip the norm of all gradients together; returns what it was. UserError where it, or the loss, is
        not finite."""
        grad_norm = nn.utils.clip_grad_norm_(self.unwrapped.parameters(), max_norm).item()
        loss = sum(shown["loss"] for shown in self.noted).item()
        if self.process.any(not math.isfinite(loss + grad_norm)):
            raise UserError(f"the loss or its gradient is not finite at step {self.step}; the last good "
                            f"checkpoint in {self.out} is kept; give a new --out and a lower --lr")
        return grad_norm

    def log(self, step, **values):
        """At each interval: a JSON row in log.jsonl, of the whole step over all micro-batches and ranks, a
        line on the screen, and the alarms. values: further columns, the same on all ranks."""
        noted = self.noted
        self.noted = []
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
            else:
                row[name] = self.process.total(sum(parts)).item() / self.world
        row.update(values)
        count = step + 1 - self.logged
        row["ms_data"] = 1e3 * self.waited / count
        row["ms_step"] = 1e3 * (time.time() - self.began) / count
        row.update(self.troubles.row())
        if self.process.main:
            self.write(row)
        self.logged = step + 1
        self.began = time.time()
        self.waited = 0.0

    def write(self, row):
        step = row["step"]
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        tqdm.write(on_screen(row))
        if len(self.rows) >= 4000:
            self.rows = self.rows[:2000:2] + self.rows[2000:]              # the older ones thinner
        self.rows.append(row)
        for name, message in alarms(self.rows, self.warmup).items():
            again = name in self.alarmed and step - self.alarmed[name] <= 20 * self.args.log_every
            if not again:                              # said once, and again if it comes back
                tqdm.write(f"WARNING at step {step}: {message}; see the README, Is it healthy?")
            self.alarmed[name] = step

    def save(self, step):
        """A checkpoint at each interval, at the end, and after a signal, which then ends `steps`."""
        done = step + 1
        stopping = self.process.any(self.stop)
        if (done % self.args.save_every == 0 or done == self.total or stopping) and self.process.main:
            parts = {"projector": None, "cross": None, **self.unwrapped.parts}
            content = dict(version=code_version(), method=self.method, step=done, steps=self.total,
                           args=vars(self.args), recipe=self.recipe, inputs=asdict(self.inputs), **parts,
                           model=self.unwrapped.state_dict(), optimizer=self.optimizer.state_dict())
            replace_file(self.out / "latest.pt", lambda f: torch.save(content, f))
        if stopping and done < self.total:
            self.stopped = True
            if self.process.main:
                tqdm.write(f"stopped after step {done} of {self.total}, saved to {self.out}; the same "
                           "command goes on from there")

    # -- after the loop ------------------------------------------------------------------------------------

    def finish(self, report):
        """The curves, and for a set that we make ourselves the table: report(folder, data folder, process,
        workers, set)."""
        self.stop.release()
        self.pool.shutdown()
        self.batches = None                            # ends the data workers
        if self.stopped or not self.process.main:
            return
        title = f"{self.method['title']}, {self.args.data}, seed {self.args.seed}, {self.total} steps"
        draw_curves(self.out / "curves.png", {"": read_log(self.out)}, title)
        print(f"trained {self.total:,} steps: {self.out}/latest.pt, log.jsonl, curves.png")
        if self.made:
            report(self.out, self.args.data_dir, self.process, self.workers, self.args.data)


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
    last has its --device and --workers."""
    names = ("data", "run", "method", "machine")
    groups = [parser.add_argument_group(name).add_argument for name in names]
    groups[-1]("--device", default="auto", help="auto, cpu, mps or cuda")
    groups[-1]("--workers", type=int, help="processes that decode (default: by the cores)")
    return groups


def make_parser(doc, name):
    """A parser with the flags that all methods share, with the same meaning, and the add_argument of its
    group "method". doc: the script's; name: of the method."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=Help)
    add_data, add_run, add_method, add_machine = flag_groups(parser)
    add_data("--data", default="toy", help=", ".join(data.SETS))
    add_data("--data-dir",
        help="folder with the clips and the csv files (default: none; toy: in cache/)")
    add_data("--max-bad", type=float, default=0.1,
        help="stop when more than this share of the clips does not decode")
    add_run("--out", help=f"folder of the run (default: runs/{name}-DATA-seedSEED)")
    add_run("--seed", type=int, default=0, help="of initial weights, order, views and masks")
    add_run("--steps", type=int, help="optimiser steps, instead of --epochs (default: the recipe's)")
    add_run("--epochs", type=float, help="passes over the data (default: the recipe's)")
    add_run("--batch-size", type=int, help="clips a step, over all processes (default: the recipe's)")
    add_run("--accumulate", type=int, default=1, help="micro-batches a step, for small memories")
    add_run("--lr", type=float, help="peak learning rate (default: the recipe's)")
    add_run("--resume", default="auto", metavar="auto|FILE",
        help="auto goes on from --out; or a checkpoint of the same recipe")
    add_run("--fresh", action="store_true", help="start over, whatever lies in --out")
    add_run("--log-every", type=int, default=10, help="steps between two rows of the log")
    add_run("--save-every", type=int, default=500, help="steps between two checkpoints")
    add_method("--recipe", choices=COLUMNS,
        help="values of the table at the top (default: toy for --data toy, else paper)")
    add_method("--size", help=f"ViT: {', '.join(common.SIZES)} (default: the recipe's)")
    add_method("--seconds", type=float,
        help="length of a view; where the pictures are shorter, of its sound (default: the recipe's)")
    add_machine("--compile", action="store_true", help="torch.compile the encoder")
    add_machine("--checkpoint-activations", action="store_true",
        help="less memory: the backward pass computes each block again")
    return parser, add_method


def recipe_column(args):
    """--recipe, or the one that fits --data."""
    return args.recipe or ("toy" if data.find_set(args.data).make else "paper")


def read_recipe(args, name, table, flags=()):
    """The column of a recipe's table {value's name: (paper, toy, source)} that a run takes, with the flags
    that were given (of `flags` and of those that all scripts share) in place of its values. Checks the
    shared flags; sets args.out where it was left open. name: of the method."""
    column = COLUMNS.index(recipe_column(args))
    recipe = {key: row[column] for key, row in table.items()}
    if args.steps is not None or args.epochs is not None:
        recipe["steps"] = args.steps
        recipe["epochs"] = args.epochs
    for key in ("size", "batch_size", "lr", "seconds", *flags):
        if getattr(args, key) is not None:
            recipe[key] = getattr(args, key)
    if recipe["size"] not in common.SIZES:
        raise UserError(f"--size {recipe['size']}: unknown ViT; one of {', '.join(common.SIZES)}")
    check_range("--lr", recipe["lr"], 0, 10)
    check_range("--batch-size", recipe["batch_size"], 2, 10 ** 6)
    check_range("--steps", 1 if recipe["steps"] is None else recipe["steps"], 1, 10 ** 9)
    check_range("--epochs", 1 if recipe["epochs"] is None else recipe["epochs"], 1e-6, 10 ** 6)
    check_range("--seconds", recipe["seconds"], 0.1, 3600)
    check_range("--accumulate", args.accumulate, 1, 10 ** 6)
    check_range("--log-every", args.log_every, 1, 10 ** 9)
    check_range("--save-every", args.save_every, 1, 10 ** 9)
    check_range("--workers", args.workers or 0, 0, 1024)
    check_range("--max-bad", args.max_bad, 0, 1)
    check_range("--seed", args.seed, 0, 2 ** 31)
    recipe.update(accumulate=args.accumulate, data=args.data, seed=args.seed)
    args.out = args.out or f"runs/{name}-{args.data}-seed{args.seed}"
    return recipe
