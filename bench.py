"""How long a training step takes, and what a clip costs the loader.

    python bench.py avjepa_lejepa --batch-size 4                      # made-up clips, the paper's recipe
    python bench.py mjepa --batch-size 32 --checkpoint-activations --compile
    torchrun --nproc_per_node=8 bench.py ajepa
    python bench.py finetune --ckpt RUN --data toy                    # probe.py --probe finetune, on noise
    python bench.py avjepa_lejepa --data folder --data-dir clips/     # real ones: how long it waits for them
    python bench.py data --data folder --data-dir clips/ --method mjepa --step-seconds 1.5

A step is one of the script's own loop, of a run that keeps nothing. FLOP are those that the algorithm needs,
whatever is computed again to save memory.
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import contextlib
import functools
import importlib
import itertools
import os
import resource
import statistics
import sys
import time
from unittest.mock import patch

import common
import data
import finetune
import probe
from common import UserError, check_range, main_guard
from datasets import batches, collectors, reader
from datasets.listing import make_listing
from run import Help, Run, recipe_column

import numpy as np
import torch
import torch.distributed as dist
import torchaudio
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

METHODS = ("ajepa", "avjepa_lejepa", "mjepa", "avjepa_ncsu")
NOWHERE = os.devnull                    # the folder of a run that keeps nothing
WARM_UP = 2                             # steps that are not timed; with --compile twice as many
LEAST = 3                               # timed steps, without --count ...
MOST = 20
ENOUGH = 30.0                           # ... and the seconds after which no more of them begin
COUNTED = 3                             # steps whose FLOP are counted: the masks of each hide another number
CLIP_SECONDS = 10.0                     # length of a made-up clip
PEAKS = {                               # TFLOP/s of matrix products in bf16, dense, summed in float32
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312, "NVIDIA GeForce RTX 4090": 165}


# ----------------------------------------------------------------------------------------------------------
# A step
# ----------------------------------------------------------------------------------------------------------

def made_up_batch(plan, inputs, count):
    """What data.collate makes of `count` clips with pictures and sound, here noise. Eight clips differ."""
    noise = torch.Generator().manual_seed(0)
    items = []
    for index in range(min(count, 8)):
        video = []
        audio = []
        views = plan(np.random.default_rng(index), max(CLIP_SECONDS, inputs.seconds))
        for view in views:
            if view.video:
                shape = (3, inputs.frames, inputs.size, inputs.size)
                video.append(torch.randint(256, shape, dtype=torch.uint8, generator=noise))
            if view.audio:
                audio.append(torch.randn(1, inputs.n_mels, inputs.mel_frames, generator=noise))
        present = torch.tensor([[bool(view.video), view.audio] for view in views])          # (V, 2)
        items.append(dict(index=index, present=present, decoded=present, video=video, audio=audio,
                          has_video=True, has_audio=True, short=False, bad=[], empty=[]))
    return data.collate([items[n % len(items)] for n in range(count)])


def no_autocast(*args, **more):
    return contextlib.nullcontext()


def count_flops(model, batch, masks, weight):
    """FLOP of a forward and a backward pass on tensors without numbers (device meta), which takes no memory
    and leaves the model's weights and gradients as they are."""
    for module in model.modules():
        if isinstance(module, common.Block):
            module.checkpoint = False                  # what is computed again does not count
    state = {}
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        state[name] = torch.empty_like(x, device="meta", requires_grad=x.requires_grad)
    with contextlib.ExitStack() as stack:
        # plain products: the counter does not know the CPU's attention, and of a GPU's it counts what the
        # backward pass computes again
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(patch.object(torch, "autocast", no_autocast))               # meta has none
        stack.enter_context(patch.object(dist, "is_initialized", lambda: False))        # nothing to send
        counter = stack.enter_context(FlopCounterMode(display=False))
        loss, _ = torch.func.functional_call(model, state, (batch, masks, weight, 0))
        loss.backward()
    return counter.get_total_flops()


class Bench(Run):
    """A run that keeps nothing, times its steps, and says what they cost. count: timed steps, None: as the
    constants above say; made_up: no clip is read."""
    def __init__(self, count, made_up, method, args, recipe, clips=None, listing=None):
        given = {"--out": args.out != NOWHERE, "--resume": args.resume != "auto", "--fresh": args.fresh,
                 "--keep-every": args.keep_every, "--steps": args.steps, "--epochs": args.epochs}
        for flag, value in given.items():
            if value:
                raise UserError(f"{flag}: a bench keeps nothing, and has --count steps; leave it out")
        if made_up and args.data_dir and not listing:
            raise UserError("--data-dir: without --data the clips are made up; give --data as well")
        for name in data.CHANGES:
            if made_up and getattr(args, name, None):
                raise UserError(f"--{name}: without --data the clips are made up; give --data as well")
        self.count = count
        self.made_up = made_up
        self.warm = WARM_UP * (1 + args.compile)       # masks of another length compile anew
        self.seconds = []                              # of each step
        self.waits = []                                # seconds that each waited for its clips
        recipe["steps"] = self.warm + (count or MOST)
        super().__init__(method, args, recipe, clips, listing)

    def list_clips(self):
        if not self.made_up:
            return super().list_clips()
        return make_listing("made up", "", ["noise"] * self.recipe["batch_size"], None, [])

    def open_folder(self):
        return None

    def normalise(self, inputs):
        return inputs                                  # to measure the mel would be to read clips

    def load(self, plan):
        self.plan = plan
        if not self.made_up:
            return super().load(plan)
        batch = made_up_batch(plan, self.clip_inputs, self.batch // self.args.accumulate)
        if self.device.type == "cuda":
            batch = {key: x.pin_memory() if torch.is_tensor(x) else x for key, x in batch.items()}
        return (batch for _ in itertools.count())

    def say_what(self):
        if not self.made_up:
            self.say(self.described)

    def write(self, row):
        pass

    def keep(self):
        pass

    def kept(self):
        return "a bench keeps nothing"

    def fetch(self):
        before = self.waited
        super().fetch()
        self.waits.append(self.waited - before)

    def steps(self):
        began = self.now()
        for step in super().steps():
            yield step
            ended = self.now()
            self.seconds.append(ended - began)
            began = ended
            if len(self.seconds) == 1 and not self.args.compile:
                self.foresee()
            timed = self.seconds[self.warm:]
            enough = len(timed) >= LEAST and sum(timed) > ENOUGH
            if self.process.any(len(timed) == self.count if self.count else enough):
                break

    def now(self):
        """Seconds, once the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def foresee(self):
        """After the first step: how long the others take, where that is long; one has then warmed up."""
        first = self.process.largest(round(self.seconds[0]))
        if first > ENOUGH:
            self.warm = 1
        left = self.warm - 1 + (self.count or LEAST)
        if first * left > 60:
            self.say(f"the first step took {first:,} s, {left} more: about {first * left / 60:,.0f} min; a "
                     "lower --batch-size takes less")

    def words(self):
        return f"recipe {recipe_column(self.args)}"

    def finish(self, report=None):
        self.close()
        if self.process.main and len(self.seconds) > self.warm:
            for name, text in self.found_out().items():
                print(f"{name:18}{text}")

    def flops(self):
        """FLOP that a clip needs, the mean over some of the timed steps."""
        batch = data.to_device(made_up_batch(self.plan, self.clip_inputs, 2), "meta")
        if self.listing.labels is not None:
            batch["targets"] = self.listing.targets(batch["index"])
        weight = {name: torch.empty(2, device="meta") for name in self.weigh} if self.weigh else 1.0
        counts = []
        for step in range(self.warm, self.warm + (COUNTED if self.draw else 1)):
            masks = self.draw(step) if self.draw else None
            for mask_set in masks or ():
                for name, indices in mask_set.items():
                    mask_set[name] = [x[:2].to("meta") for x in indices]
            counts.append(count_flops(self.unwrapped, batch, masks, weight) / 2)
        return statistics.mean(counts)

    def peak(self, device):
        """(FLOP/s that the device can do, or None; the same in words)"""
        dtype = torch.bfloat16 if self.process.bf16 else torch.float32
        kind = str(dtype).removeprefix("torch.")
        if self.device.type == "cpu":
            dim, _, _, mlp = common.SIZES[self.recipe["size"]]
            peak = measure_product(4096, dim, mlp, dtype)
            return peak, f"of the {peak / 1e12:.3g} of a {kind} product (4096, {dim}) @ ({dim}, {mlp}) here"
        if self.process.bf16 and device in PEAKS:
            return PEAKS[device] * 1e12, f"of the {PEAKS[device]} of its data sheet, {kind}"
        return None, f"no share: bench.py knows no peak of {device} in {kind}"

    def found_out(self):
        """{name: text} of the block at the end."""
        memory = peak_memory(self.device)              # before FLOP are counted
        device = f"CPU, threads: {torch.get_num_threads()}" if self.device.type == "cpu" else self.device.type
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        clips = self.recipe["batch_size"]
        timed = self.seconds[self.warm:]
        median = statistics.median(timed)
        # of real clips some steps wait for those of the next ones, too
        seconds = median if self.made_up else statistics.mean(timed)
        flops = clips * self.flops()
        peak, words = self.peak(device)
        share = words if peak is None else f"{flops / seconds / peak / self.world:.0%} {words}"
        trained = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
        switches = {"bf16": self.process.bf16, "compile": self.args.compile,
                    "checkpoint-activations": self.args.checkpoint_activations}
        words = [f"{name} {'on' if on else 'off'}" for name, on in switches.items()]
        found = {
            "device": f"{self.world} x {device}",
            "method": f"{self.method['title']}, {self.words()}, "
                      f"ViT {self.recipe['size']}, {self.tokens()} tokens, {trained:,} parameters",
            "step": f"clips: {clips:,}, micro-batches: {self.args.accumulate}, {', '.join(words)}",
            "seconds a step": f"{median:.4g}, median of {len(timed)}: {min(timed):.4g} to {max(timed):.4g}",
            "clips/s": f"{clips / seconds:.4g}",
            "TFLOP a step": f"{flops / 1e12:.4g}",
            "TFLOP/s": f"{flops / 1e12 / seconds:.4g}, {share}",
            "peak memory": f"{memory:.2f} GB"}
        if not self.made_up:
            waited = statistics.mean(self.waits[self.warm:len(self.seconds)])
            found["waited for clips"] = f"{1e3 * waited:.0f} ms a step, mean, workers: {self.workers}"
        return found


class Ended(Exception):
    """A bench has said what it found."""


class TuneBench(Bench):
    """Of fine-tuning: noise with the labels of a set."""
    def __init__(self, count, method, args, recipe, listing):
        args.out = NOWHERE
        super().__init__(count, True, method, args, recipe, listing=listing)

    def words(self):
        return f"heads {' + '.join(self.recipe['heads'])}"

    def finish(self, report=None):
        super().finish(report)
        raise Ended


def peak_memory(device):
    """GB that were taken at most: of a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024     # bytes, or kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure_product(rows, dim, width, dtype):
    """FLOP/s of a matrix product (rows, dim) @ (dim, width) on the CPU, the best of several."""
    a = torch.randn(rows, dim, dtype=dtype)
    b = torch.randn(dim, width, dtype=dtype)
    times = []
    while len(times) < 3 or sum(times) < 0.2:
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * rows * dim * width / min(times)


def bench_step(args, flags):
    try:
        if args.what == "finetune":
            bench_tuning(args, flags)
        else:
            bench_training(args, flags)
    except torch.OutOfMemoryError:
        raise UserError("the device has not enough memory for such a step; raise --accumulate, give "
                        "--checkpoint-activations, or lower --batch-size or --size") from None


def bench_training(args, flags):
    script = importlib.import_module(args.what)
    made_up = args.data is None
    own = ["--recipe", "paper", "--no-online-probe"] if made_up else ["--data", args.data]
    with patch.object(script, "Run", functools.partial(Bench, args.count, made_up)):
        script.main(["--out", NOWHERE, *own, *flags])


def bench_tuning(args, flags):
    for flag in ("--probe", "--query", "--save-features", "--out"):
        if any(word.split("=")[0] == flag for word in flags):
            raise UserError(f"{flag}: a bench of fine-tuning has none; leave it out")
    with patch.object(finetune, "Run", functools.partial(TuneBench, args.count)):
        with contextlib.suppress(Ended):
            probe.main(["--probe", "finetune", *flags])


# ----------------------------------------------------------------------------------------------------------
# A clip
# ----------------------------------------------------------------------------------------------------------

PARTS = ("open", "decode", "sound", "scale", "crop", "augment", "mel", "collate", "rest")
RATES = (20, 80, 120)                   # clips/s of the table without --step-seconds
TOGETHER = 4                            # clips that are collated at once: docker's shared memory has 64 MB


class Planned(Exception):
    """A run, its inputs and its plan on their way out of a script's main."""


class PlanOnly(Bench):
    """A run up to where its inputs and its plan are there."""
    def resume(self, model, optimizer):
        self.found = None

    def begin(self, model, optimizer, inputs, plan, draw=None, weigh=None):
        raise Planned(self, inputs, plan)


class Stopwatch:
    """CPU seconds of this thread in each part, without those of a part within it."""
    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.parts = ["rest"]                          # at work, the innermost last
        self.since = time.thread_time()

    def turn(self):
        """What went by belongs to the innermost part."""
        now = time.thread_time()
        self.seconds[self.parts[-1]] += now - self.since
        self.since = now

    def timed(self, part, function):
        """The function, as a part; part: its name, or part(first argument) -> name."""
        def run(first, *args, **more):
            self.turn()
            self.parts.append(part(first) if callable(part) else part)
            try:
                return function(first, *args, **more)
            finally:
                self.turn()
                self.parts.pop()
        return run


def stream_of(packet):
    return "decode" if packet.stream.type == "video" else "sound"


TIMED = ((reader.Clip, "__init__", "open"), (reader, "decoded", stream_of), (collectors, "picture", "scale"),
         (torchaudio.functional, "resample", "sound"), (data.LogMel, "forward", "mel"),
         (data.Augment, "video", "augment"), (data.Augment, "audio", "augment"),
         (batches, "share", "collate"))


def read_clips(clips, keys, troubles):
    """Read the keys' clips as a data worker does, with the copy into shared memory."""
    with common.one_thread(), patch.object(batches, "get_worker_info", lambda: True):
        for first in range(0, len(keys), TOGETHER):
            items = [clips[key] for key in keys[first:first + TOGETHER]]
            troubles.add(batches.share(items))


def time_clips(clips, keys, troubles):
    """{part: CPU seconds a clip} of one thread."""
    watch = Stopwatch()
    crops = {name: watch.timed("crop", crop) for name, crop in clips.crops.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(clips, "crops", crops))
        for owner, name, part in TIMED:
            stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        read_clips(clips, keys, troubles)
        watch.turn()
    return {part: seconds / len(keys) for part, seconds in watch.seconds.items()}


def planned(args, flags):
    """(run, inputs, plan) of --method. Neither the inputs nor the plan depend on the model's size."""
    script = importlib.import_module(args.method)
    try:
        with patch.object(script, "Run", functools.partial(PlanOnly, None, False)):
            script.main(["--out", NOWHERE, "--data", args.data, *flags, "--size", "nano", "--device", "cpu"])
    except Planned as found:
        return found.args


def bench_data(args, flags):
    run, inputs, plan = planned(args, flags)
    if run.world > 1:
        raise UserError("bench.py data runs in one process; start it without torchrun")
    clips = data.Clips(run.listing, inputs, plan, run.args.seed, augment=run.augment)
    troubles = data.Troubles(len(run.listing), run.args.max_bad)
    order = np.random.default_rng(0).permutation(len(run.listing)).tolist()
    keys = [(n // len(order), order[n % len(order)]) for n in range(args.clips)]
    read_clips(clips, keys[:1], troubles)              # what is done but once
    began = time.perf_counter()
    parts = time_clips(clips, keys, troubles)
    by_clock = (time.perf_counter() - began) / len(keys)
    total = sum(parts.values())
    print(run.described)
    title = f"{run.method['title']}, recipe {recipe_column(run.args)}"
    print(f"{title}, {len(keys):,} clips: milliseconds of one core for each")
    for part, seconds in parts.items():
        print(f"{part:10}{1e3 * seconds:10.2f}{seconds / total:8.1%}")
    print(f"{'total':10}{1e3 * total:10.2f}, {1 / total:.4g} clips/s a core")
    print(f"{'by clock':10}{1e3 * by_clock:10.2f}, with what the disk and other programs take")
    rates = RATES
    if args.step_seconds:
        batch = run.recipe["batch_size"]
        rates = (batch / args.step_seconds,)
        print(f"a step of {batch:,} clips in {args.step_seconds:g} s:")
    for rate in rates:
        print(f"{rate:.4g} clips/s want {rate * total:.1f} cores")


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    """(args, flags that are not ours, for the method's script)"""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True, metavar="METHOD|data")

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, formatter_class=Help,
                                   allow_abbrev=False).add_argument

    add = command("finetune", "a step of fine-tuning, with the flags of probe.py, on noise with the labels "
                              "of --data")
    add("--count", type=int, help=f"timed steps (default: {LEAST} to {MOST}, about {ENOUGH:g} s)")
    for name in METHODS:
        add = command(name, f"a step of {name}.py, with the flags of that script; --recipe is 'paper' unless "
                            "it or --data is given")
        add("--data", help="a set, whose clips the loader reads (default: noise, and nothing is read)")
        add("--count", type=int, help="timed steps; with --data several times the workers, each of which "
            f"makes a batch of its own (default: {LEAST} to {MOST}, about {ENOUGH:g} s)")
    add = command("data", "what a clip costs the loader, with the flags of --method's script")
    add("--data", default="toy", help=", ".join(data.SETS))
    add("--method", choices=METHODS, default="avjepa_lejepa", help="whose views and inputs")
    add("--clips", type=int, default=64, help="that are read, again where the set has fewer")
    add("--step-seconds", type=float, help="that a step takes, by the bench of --method: how many cores it "
        "wants (default: a table)")
    args, flags = parser.parse_known_args(argv)
    if args.what == "data":
        check_range("--clips", args.clips, 1, 10 ** 6)
        check_range("--step-seconds", 1 if args.step_seconds is None else args.step_seconds, 1e-6, 10 ** 6)
    else:
        check_range("--count", 1 if args.count is None else args.count, 1, 10 ** 6)
    return args, flags


def main(argv=None):
    args, flags = get_args(argv)
    if args.what == "data":
        bench_data(args, flags)
    else:
        bench_step(args, flags)


if __name__ == "__main__":
    main_guard(main)
