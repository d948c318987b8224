"""Batches: which clips a step sees, the loaders that decode them, and what is counted of their troubles."""
import atexit
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from common import UserError, end_workers
from datasets.views import TRIES, Clips, collate

LOOK = "look at the files with python data.py --check"          # what each sentence about bad clips ends with


class Batches(Sampler):
    """Keys (epoch, index) of this rank's (micro-)batches from step `start` to `steps`: a pure function of
    (seed, step, rank), so that a run that goes on replays nothing. `batch` is global; the last, smaller batch
    of an epoch is dropped."""
    def __init__(self, count, batch, seed, start, steps, rank=0, world=1, accumulate=1):
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

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        per_epoch = self.count // self.batch
        ordered = None                                          # the epoch whose order is at hand
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != ordered:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
                ordered = epoch
            batch = order[place * self.batch:(place + 1) * self.batch]
            mine = batch[self.rank::self.world]
            for micro in np.split(mine, self.accumulate):
                yield [(epoch, int(i)) for i in micro]


def start_worker(worker):
    """For the data workers: a mel is slower on two threads; and a signal is for the training process, which
    then ends them."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train_loader(clips, batches, workers, pin=False):
    """Batches of a Clips data set, decoded by `workers` processes (0: in this one)."""
    atexit.unregister(end_workers)
    atexit.register(end_workers)                                # whoever does not read them to their end
    return DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=collate,
                      worker_init_fn=start_worker, pin_memory=pin)


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
        raise UserError(f"{listing.name}: no readable clip among {len(listing):,}; {LOOK}")


class Troubles:
    """Counts what was wrong with the clips, names each bad one once, and stops the run when too many are
    bad."""
    def __init__(self, total, max_share=0.1):
        self.total = total
        self.max_share = max_share
        self.bad = set()
        self.counts = {"no_video": 0, "no_audio": 0, "short": 0}

    def count(self, batch):
        """What the clips of a batch lack, of the streams that were asked for."""
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
            raise UserError(f"{TRIES} clips in a row do not decode, the last: {batch['bad'][-1]}; {LOOK}")
        if len(self.bad) > self.max_share * self.total:
            raise UserError(f"{len(self.bad)} of {self.total:,} clips do not decode, more than "
                            f"{self.max_share:.0%}: stopped; {LOOK}, or raise --max-bad")

    def name(self, messages):
        for message in messages:
            if message not in self.bad:
                self.bad.add(message)
                tqdm.write(f"bad clip: {message}")

    def row(self):
        """For the log."""
        return {"bad_clips": len(self.bad), **self.counts}
