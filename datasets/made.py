"""Made-up worlds, written once as real H.264 + AAC files: what toy.py and still.py have in common."""
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from common import UserError, end_workers
from datasets.batches import Loader
from datasets.files import scan
from datasets.listing import list_found
from datasets.reader import reason_of

CODING = {"preset": "ultrafast", "tune": "fastdecode", "crf": "20",
          "x264-params": "mbtree=0"}                            # mbtree is not repeatable
FAST = {"aac_coder": "fast"}                            # AAC in a third of the time, with 1 dB more noise


@dataclass(frozen=True)
class World:
    """A made-up world as a data set: list, make and folder are those of data.DataSet."""
    name: str
    numbers: dict           # train and test clips, seconds, fps, side, sample_rate, seed, version
    classes: tuple
    clip: Callable          # (seed, split, index) -> (frames (T, H, W, 3), wave (samples,), truth dict)

    def folder(self):
        """Where the clips lie unless another folder is given."""
        return Path("cache") / f"{self.name}-v{self.numbers['version']}-seed{self.numbers['seed']}"

    def list(self, folder, split):
        path = folder / split / "truth.npz"
        try:
            labels = np.load(path)["label"]
        except Exception as e:                                  # numpy raises half a dozen kinds
            raise UserError(f"{path}: cannot be read ({type(e).__name__}); remove {folder}, and the "
                            f"{self.name} clips are written anew") from None
        files = scan(folder, split)
        there = set(files)
        found = []
        for i, label in enumerate(labels):
            file = f"{split}/{i:05d}.mp4"
            found.append((file if file in there else None, [label]))
        return list_found(files, found, self.classes)

    def make(self, folder):
        """Write the clips, once: <split>/<number>.mp4, and truth.npz beside them with the clips' truths. The
        folder appears under its name only when it is whole; of several processes that write it at once the
        first one counts. Raises UserError where something else lies there, or nothing can be written."""
        folder = Path(folder)
        part = None
        try:
            if is_made(self, folder):
                return
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=folder.parent))
            for split in ("train", "test"):
                write_split(self, part, split)
            (part / "world.json").write_bytes(content(self))
            part.chmod(0o755)                                   # mkdtemp's folder is its owner's alone
            put_in_place(self, part, folder)
        except OSError as e:
            raise UserError(f"{folder}: the {self.name} clips cannot be written there ({reason_of(e)}); make "
                            "room, or give --data-dir another folder") from None
        finally:
            if part is not None and part.exists():              # it was not put in place
                try:
                    end_workers()                               # they would go on writing
                finally:
                    shutil.rmtree(part, ignore_errors=True)


def is_made(world, folder):
    """Whether the world's clips are there. UserError where something else is."""
    if (folder / "world.json").is_file():
        if (folder / "world.json").read_bytes() != content(world):
            raise UserError(f"{folder} holds clips of another world than the {world.name} clips; "
                            "remove it or give another --data-dir")
        return True
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {world.name} clips; "
                        "give --data-dir an empty or a new folder")
    return False


def content(world):
    """What world.json holds."""
    return json.dumps(world.numbers, sort_keys=True).encode()


def put_in_place(world, part, folder):
    """Give the whole folder its name, unless another process was first."""
    try:
        if folder.exists():
            folder.rmdir()                                      # it is empty
        part.rename(folder)
    except OSError:
        if not is_made(world, folder):
            raise


class Writer(Dataset):
    """Writes clip i when it is asked for it: the data workers are the processes that make the set. The item
    is its truth, or the reason why it could not be written."""
    def __init__(self, world, folder, split):
        self.world = world
        self.folder = folder
        self.split = split

    def __len__(self):
        return self.world.numbers[self.split]

    def __getitem__(self, i):
        numbers = self.world.numbers
        frames, wave, truth = self.world.clip(numbers["seed"], self.split, i)
        path = self.folder / self.split / f"{i:05d}.mp4"
        try:
            write_clip(path, frames, wave, numbers["fps"], numbers["sample_rate"])
        except (OSError, av.error.FFmpegError) as e:
            return reason_of(e)
        return truth


def write_split(world, folder, split):
    (folder / split).mkdir()
    clips = Writer(world, folder, split)
    workers = os.cpu_count() or 1
    loader = Loader(clips, workers, batch_size=None)
    truths = []
    for truth in tqdm(loader, desc=f"writing {world.name} clips ({split})", unit="clip"):
        if isinstance(truth, str):
            raise OSError(truth)
        truths.append(truth)
    columns = {}
    for key in truths[0]:
        columns[key] = np.stack([np.asarray(truth[key]) for truth in truths])
    np.savez(folder / split / "truth.npz", **columns)


def write_clip(path, frames=None, wave=None, fps=12, sample_rate=16000, bit_rate=64_000):
    """Write an mp4 with H.264 and AAC. frames (T, H, W, 3) uint8, wave (samples,) or (channels, samples)
    float in [-1, 1]."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        if frames is not None:
            video = container.add_stream("libx264", rate=fps, options=CODING)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            video.codec_context.thread_count = 1
        if wave is not None:
            wave = np.atleast_2d(wave).astype(np.float32)
            layout = "mono" if len(wave) == 1 else "stereo"
            audio = container.add_stream("aac", rate=sample_rate, layout=layout, options=FAST)
            audio.bit_rate = bit_rate
        if frames is not None:                              # both streams are there before the first packet
            for picture in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        if wave is not None:
            for first in range(0, wave.shape[1], 1024):
                part = np.ascontiguousarray(wave[:, first:first + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate = sample_rate
                frame.pts = first
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
