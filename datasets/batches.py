"""Batches: which clips a step sees, the loaders that decode them, and what is counted of their troubles."""
import atexit
import contextlib
import math
import multiprocessing
import resource
import signal
import threading
from multiprocessing import connection

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, get_worker_info
from tqdm import tqdm

from common import UserError, end_workers, signals_held
from datasets.views import TRIES, Clips, collate

LOOK = "look at the files with python data.py --check"          # what each sentence about bad clips ends with


class NoClip(UserError):
    """Not one clip of a listing can be used."""


class Batches(Sampler):
    """Keys (epoch, index) of this rank's (micro-)batches from step `start` to `steps`: a pure function of
    (seed, step, rank), so that a run that goes on replays nothing. `batch` is global; the last, smaller batch
    of an epoch is dropped. weights (count,): a step's clips are drawn with these probabilities, with
    replacement, and each has a number of its own in place of the epoch."""
    def __init__(self, count, batch, seed, start, steps, rank=0, world=1, accumulate=1, weights=None):
        if batch > count:
            raise UserError(f"--batch-size {batch} is larger than the set ({count:,} clips); make it smaller")
        if batch % (world * accumulate):
            raise UserError(f"--batch-size {batch} is not divisible by {world} processes x {accumulate} "
                            "micro-batches")
        self.count = count
        self.batch = batch
        self.seed = seed
        self.start = start
        self.steps = steps
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.weights = weights

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        batches = self.ordered() if self.weights is None else self.drawn()
        for batch in batches:
            mine = batch[self.rank::self.world]
            for micro in np.split(mine, self.accumulate):
                yield [(int(number), int(i)) for number, i in micro]

    def ordered(self):
        """(batch, 2) of each step: (epoch, index)."""
        per_epoch = self.count // self.batch
        ordered = None                                          # the epoch whose order is at hand
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != ordered:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
                ordered = epoch
            batch = order[place * self.batch:(place + 1) * self.batch]
            yield np.stack([np.full(self.batch, epoch), batch], 1)

    def drawn(self):
        """(batch, 2) of each step: (number of the draw, index), each index by its weight."""
        reached = np.cumsum(self.weights)
        for step in range(self.start, self.steps):
            draws = np.random.default_rng((self.seed, step)).random(self.batch)
            index = np.searchsorted(reached, draws * reached[-1], side="right")
            yield np.stack([step * self.batch + np.arange(self.batch), index], 1)


def start_worker(worker):
    """For the data workers: a mel is slower on two threads; and a signal is for the training process, which
    then ends them."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def share(items):
    """collate, and in a data worker the tensors into shared memory: the queue would put them there later,
    where a batch that finds no room is lost without a word."""
    batch = collate(items)
    if get_worker_info() is not None:
        for x in batch.values():
            if torch.is_tensor(x) and x.numel():
                x.share_memory_()
    return batch


def tell(line):
    """A line on the screen, beside the progress bars. A terminal that was closed or lacks the letters, or a
    full disk under a file in its place, hinders nothing."""
    with contextlib.suppress(OSError, UnicodeError):
        tqdm.write(line)


WORD = 60                               # seconds without a batch, after which a line says so ...
PATIENCE = 900                          # ... and after which the workers are given up
NO_MEMORY = ("the data workers have no room in shared memory (/dev/shm); start docker with a larger "
             "--shm-size, such as 8g, or give --workers 0, which needs none")


def plain(item):
    """Arrays as they are: made tensors, they would need shared memory."""
    return item


class Loader:
    """A DataLoader of `workers` processes (0: in this one) whose troubles end in a sentence: no shared
    memory, a worker that died, one that hangs. The batches are DataLoader's; so is `how`."""
    def __init__(self, dataset, workers, collate_fn=plain, **how):
        self.loader = DataLoader(dataset, num_workers=workers, worker_init_fn=start_worker,
                                 collate_fn=collate_fn, **how)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        """Starts the workers at once."""
        others = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            if self.loader.num_workers:
                multiprocessing.Event()                         # or torch's iterator fails half built
                need_files(self.loader)
            with signals_held():
                batches = iter(self.loader)
        except OSError as e:
            raise UserError(f"the data workers cannot be started ({e.strerror}); lower --workers: 0 needs "
                            "none, nor shared memory, of which docker has more by --shm-size 8g") from None
        finally:
            # torch's raises in the midst of whatever this process does when a worker dies; `take` misses its
            # batch within seconds
            with contextlib.suppress(ValueError):               # not in the main thread: torch set none
                signal.signal(signal.SIGCHLD, handler)
        return self.take(batches, set(multiprocessing.active_children()) - others)

    def take(self, batches, workers):
        """The batches. Whoever takes no more of them ends the workers."""
        try:
            while True:
                came = threading.Event()
                given_up = threading.Event()
                if workers:
                    args = (came, given_up, workers)
                    threading.Thread(target=watch, args=args, daemon=True).start()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except Exception as e:                          # of a worker that dies, of any kind
                    sentence = explain(e, workers, given_up.is_set()) if workers else None
                    if sentence is None:
                        raise                                   # a fault of ours keeps its traceback
                    raise UserError(sentence) from None
                finally:
                    came.set()
                yield batch
        finally:
            with signals_held():
                for worker in workers:                          # one that hangs would be waited for
                    worker.kill()
                if workers:         # a worker that was killed as it looked at torch's event keeps its lock
                    batches._workers_done_event = threading.Event()
                del batches                                     # joins them


def need_files(loader):
    """Each tensor on its way from a worker is an open file, and where one fails to open the batch is lost
    without a word: raise the limit of open files as far as allowed, or UserError."""
    need = 128 + 8 * loader.num_workers * loader.prefetch_factor
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < need:                                        # -1: no limit
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
            soft = need
    if 0 <= soft < need:
        raise UserError(f"{loader.num_workers} data workers need {need:,} open files, ulimit -n allows "
                        f"{soft:,}; raise it, or lower --workers")


def watch(came, given_up, workers):
    """In a thread: say that no batch came, and in the end kill the workers, so that nobody waits for them."""
    if came.wait(WORD):
        return
    names = ", ".join(str(worker.pid) for worker in workers)
    tell(f"no clips for {WORD} s; the data workers (process {names}) are slow, or wait for a disk")
    if not came.wait(PATIENCE - WORD):
        given_up.set()
        for worker in workers:
            worker.kill()


def explain(error, workers, given_up):
    """What an error of a DataLoader says of its workers, None where it is none of theirs."""
    if given_up:
        return (f"no clips came from the {len(workers)} data workers for {PATIENCE} s: they were stopped, or "
                "wait for a disk or a network that does not answer; --workers 0 shows where")
    if "shared memory" in str(error) or "</torch_" in str(error):
        return NO_MEMORY
    if "open files" in str(error) or "ancdata" in str(error):
        return "the data workers need more open files than ulimit -n allows; raise it, or lower --workers"
    if str(error).startswith("Caught "):
        return None                                             # of our code in a worker that lives
    dying = connection.wait([worker.sentinel for worker in workers], 1)
    for worker in workers:
        if worker.sentinel in dying:
            worker.join(1)
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if not codes:
        return None
    if -signal.SIGBUS in codes:
        return NO_MEMORY
    if -signal.SIGKILL in codes:
        return "a data worker was killed, most often for want of memory; lower --workers or --batch-size"
    code = codes[0]
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"a data worker ended {how}: a clip that the decoder does not survive; {LOOK}"


def train_loader(clips, batches, workers, pin=False, ahead=2):
    """Batches of a Clips data set, decoded by `workers` processes (0: in this one), as many as `ahead` before
    they are asked for, and at least two by each process."""
    atexit.unregister(end_workers)
    atexit.register(end_workers)                                # whoever does not read them to their end
    each = max(2, math.ceil(ahead / workers)) if workers else None
    return Loader(clips, workers, batch_sampler=batches, collate_fn=share, pin_memory=pin,
                  prefetch_factor=each)


def eval_loader(listing, inputs, plan, batch, workers, seed=0):
    """All clips of a listing once, in order; what does not decode is left out and stands in `bad`."""
    keys = []
    for first in range(0, len(listing), batch):
        last = min(first + batch, len(listing))
        keys.append([(0, i) for i in range(first, last)])
    clips = Clips(listing, inputs, plan, seed, replace=False)
    return train_loader(clips, keys, workers)


def eval_batches(listing, inputs, plan, batch, workers, troubles, label, seed=0):
    """The batches of eval_loader that hold a clip. Names each bad clip; UserError when no clip at all can be
    used."""
    used = False
    for b in tqdm(eval_loader(listing, inputs, plan, batch, workers, seed), desc=label, unit="batch"):
        troubles.name(b["bad"])
        if len(b["index"]) == 0:
            continue
        for key in ("video", "audio"):
            if key in b and b[f"has_{key}"].any():
                used = True
        yield b
        troubles.count(b)
    for key, lack in (("video", "pictures"), ("audio", "sound")):
        count = troubles.counts[f"no_{key}"]
        if used and count:
            print(f"{label}: {count:,} of {len(listing):,} clips have no {lack}")
    if not used:
        raise NoClip(f"{listing.name}: no readable clip among {len(listing):,}; {LOOK}")


class Troubles:
    """Counts what was wrong with the clips, names each bad one once, and stops the run when too many are
    bad."""
    def __init__(self, total, max_share=0.1):
        self.total = total
        self.max_share = max_share
        self.bad = set()
        self.bad_before = 0
        self.counts = {"no_video": 0, "no_audio": 0, "short": 0, "empty": 0}

    def count(self, batch):
        """What the clips of a batch lack, of the streams that were asked for; and how many had a view in
        which nothing decoded, so that others were drawn for them."""
        self.counts["empty"] += len(batch.get("empty", ()))
        if len(batch["index"]) == 0:
            return
        for key in ("video", "audio"):
            if key in batch:
                self.counts[f"no_{key}"] += int((~batch[f"has_{key}"]).sum())
        self.counts["short"] += int(batch["short"].sum())

    def add(self, batch):
        """Count a training batch. UserError where too many clips are bad."""
        self.count(batch)
        self.name(batch["bad"])
        if batch["lost"]:
            last = [*batch.get("empty", ()), *batch["bad"]][-1]
            raise UserError(f"{TRIES} clips in a row cannot be used, the last: {last}; {LOOK}")
        if len(self.bad) > self.max_share * self.total:
            raise UserError(f"{len(self.bad)} of {self.total:,} clips do not decode, more than "
                            f"{self.max_share:.0%}: stopped; {LOOK}, or raise --max-bad")

    def name(self, messages):
        for message in messages:
            if message not in self.bad:
                self.bad.add(message)
                tell(f"bad clip: {message}")

    def go_on(self, row):
        """Count on from a row of the log."""
        self.bad_before = row.get("bad_clips", 0)
        for key in self.counts:
            self.counts[key] += row.get(key, 0)

    def row(self):
        """For the log."""
        return {"bad_clips": self.bad_before + len(self.bad), **self.counts}
