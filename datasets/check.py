"""What is there, and the statistics of its mel: python data.py --check, --stats."""
import functools
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from common import UserError
from datasets.batches import LOOK, Loader, Troubles, eval_loader
from datasets.files import printable
from datasets.listing import describe
from datasets.reader import ClipError, open_clip
from datasets.views import even_views


LONG = 120.0            # seconds: a longer clip is named, and listened to until here
NOTHING = "nothing in it decodes"                       # what the reader says of a stream without a frame


class Look(Dataset):
    """Opens clip i and decodes a moment of its pictures, at its middle, and all the sound of its first two
    minutes: (has_video, has_audio, duration, what is said of it)."""
    def __init__(self, listing):
        self.listing = listing

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, i):
        path = self.listing.path(i)
        try:
            with open_clip(path) as clip:
                return look(clip, path)
        except ClipError as e:
            return False, False, 0.0, [f"unreadable: {e}"]


def look(clip, path):
    middle = clip.duration / 2
    halves = [(0.0, min(middle, LONG) or LONG)]
    if 0 < middle < LONG:
        halves.append((middle, min(clip.duration, LONG) - middle))
    seconds = clip.duration
    pictures = read_part(clip, [(middle, 0.1)], []) if clip.video is not None else None
    sound = read_part(clip, [], halves) if clip.audio is not None else None
    if pictures is None and sound is None:
        raise ClipError(f"{path}: {NOTHING} (no video frame, no sound)")
    has_video = pictures is not None and clip.video is not None         # the reader drops a single picture
    has_audio = sound is not None and any(sound["heard"])
    said = []
    if has_video and not pictures["seen"][0]:
        said.append(f"short: {path}: its pictures end before the middle of its {seconds:,.1f} seconds")
    if has_audio and not sound["heard"][-1]:
        said.append(f"short: {path}: its sound ends before the middle of its {seconds:,.1f} seconds")
    if seconds > LONG:
        said.append(f"long: {path}: {seconds:,.0f} seconds")
    return has_video, has_audio, seconds, said


def read_part(clip, video_windows, audio_windows, size=16):
    """What Clip.read says of windows of one stream; None where nothing of that decodes."""
    try:
        return clip.read(video_windows, audio_windows, num_frames=1, size=size, sample_rate=16000)
    except ClipError as e:
        if NOTHING in str(e):
            return None
        raise


def check(listing, workers):
    """Decode a part of each clip and print what is there: a dict of counts. Names each clip that is
    unreadable, short (a stream ends before the middle) or long (over two minutes)."""
    counts = {"clips": len(listing), "missing": listing.missing}
    counts |= {"unreadable": 0, "no video": 0, "no audio": 0, "seconds": 0.0, "short": 0, "long": 0}
    print(describe(listing), flush=True)
    rows = Loader(Look(listing), workers, batch_size=None)
    for has_video, has_audio, seconds, said in tqdm(rows, desc="check", unit="clip"):
        kinds = {message.split(":")[0] for message in said}
        for kind in kinds:
            counts[kind] += 1
        for message in said:
            tqdm.write(printable(message))
        counts["seconds"] += seconds
        if "unreadable" not in kinds:
            counts["no video"] += not has_video
            counts["no audio"] += not has_audio
    print(f"unreadable {counts['unreadable']:,}, without picture {counts['no video']:,}, "
          f"without sound {counts['no audio']:,}, {counts['seconds'] / 3600:.2f} hours, "
          f"short {counts['short']:,}, long {counts['long']:,}")
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
