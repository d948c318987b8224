"""What is there, and the statistics of its mel: python data.py --check, --stats."""
import functools
from dataclasses import replace

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import UserError
from datasets.batches import LOOK, Troubles, eval_loader, start_worker
from datasets.listing import describe
from datasets.reader import ClipError, open_clip
from datasets.views import even_views


class Middles(Dataset):
    """Opens clip i and decodes its middle: (has_video, has_audio, duration, message)."""
    def __init__(self, listing):
        self.listing = listing

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, i):
        try:
            with open_clip(self.listing.path(i)) as clip:
                window = [(clip.duration / 2, 0.1)]
                read = clip.read(window, window, num_frames=1, size=16, sample_rate=16000)
        except ClipError as e:
            return False, False, 0.0, str(e)
        return read["has_video"], read["has_audio"], clip.duration, ""


def check(listing, workers):
    """Decode a moment of each clip and print what is there: a dict of counts. Names each unreadable clip."""
    counts = {"clips": len(listing), "missing": listing.missing}
    counts |= {"unreadable": 0, "no video": 0, "no audio": 0, "seconds": 0.0}
    rows = DataLoader(Middles(listing), batch_size=None, num_workers=workers, worker_init_fn=start_worker)
    for has_video, has_audio, duration, message in tqdm(rows, desc="check", unit="clip"):
        counts["seconds"] += duration
        if message:
            counts["unreadable"] += 1
            tqdm.write(f"unreadable: {message}")
        else:
            counts["no video"] += not has_video
            counts["no audio"] += not has_audio
    print(describe(listing))
    print(f"unreadable {counts['unreadable']:,}, without picture {counts['no video']:,}, "
          f"without sound {counts['no audio']:,}, {counts['seconds'] / 3600:.2f} hours")
    return counts


def mel_stats(listing, inputs, workers, most):
    """(means, stds), each (F,) float64, of the mel's bins over the middle of at most `most` clips, drawn with
    seed 0; clips without sound are left out."""
    chosen = np.random.default_rng(0).permutation(len(listing))[:most]
    columns = inputs.columns if inputs.interpolate else None
    plain = replace(inputs, mel_mean=0.0, mel_std=1.0, columns=columns)
    plan = functools.partial(middle_sound, plain)
    loader = eval_loader(listing.subset(np.sort(chosen)), plain, plan, 1, workers)
    troubles = Troubles(len(chosen))
    total = 0.0
    square = 0.0
    count = 0
    for batch in tqdm(loader, desc="stats", unit="clip"):
        troubles.name(batch["bad"])
        if len(batch["index"]) and batch["has_audio"].all():
            mel = batch["audio"][0, 0].double()                                             # (F, T)
            total = total + mel.sum(1)
            square = square + mel.square().sum(1)
            count += mel.shape[1]
    if not count:
        raise UserError(f"{listing.name}: no clip has a sound that decodes, so its mel has no statistics; "
                        f"{LOOK}")
    mean = total / count
    return mean, (square / count - mean ** 2).clamp_min(0).sqrt()


def middle_sound(inputs, rng, duration):
    """The middle of a clip, no longer than the clip: padding would shift the mean."""
    seconds = max(0.1, min(inputs.seconds, duration)) if duration else inputs.seconds
    return even_views(1, replace(inputs, seconds=seconds), rng, duration, video=False)
