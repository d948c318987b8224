"""The clips of a set written once, small and quick to read: python data.py --prepare OUT.

OUT is laid out as the set is, so that the set's own listing finds the same clips there, as files or in tars.
A clip gets its name once it is whole: after a kill the same command goes on, to the same bytes."""
import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import tarfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from common import UserError, one_thread
from datasets import shards
from datasets.batches import Loader, tell
from datasets.files import few, plural, printable, scan, without_ending
from datasets.reader import ClipError, open_clip, reason_of
from datasets.rewrite import rewrite

VERSION = 1             # of what is written: another one is another preparation
SETTINGS = "prepared.json"
BAD = "bad.txt"
WRONG = {errno.EINVAL, errno.ENOMEM, errno.EDOM, errno.ERANGE}      # of the encoder; others are of the disk
NAMES = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}     # of a name that cannot be given


class Shard(NamedTuple):
    """A tar that is not whole yet."""
    number: int
    clips: np.ndarray                       # indices of those that it lacks, in their order
    size: int                               # bytes that hold the others


class Row(NamedTuple):
    """What a worker says of a clip, "written" or "bad", or of the disk, "full"."""
    kind: str
    index: int = -1
    reason: str = ""
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------

class Writer(IterableDataset):
    """Writes clips while it is iterated over, in each data worker its share. The items are Rows, and
    None after each piece of a clip: a long one must not seem to hang."""
    def __init__(self, listing, names, out, how, work):
        self.listing = listing
        self.names = names
        self.out = out
        self.how = how
        self.work = work                                        # indices of clips, or Shards

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        temporary = self.out / f".clip-{os.getpid()}.part"
        write = self.write_shard if self.how.shards else self.write_file
        try:
            for each in self.work[first::step]:
                yield from write(each, temporary)
        except OSError as e:
            yield Row("full", reason=reason_of(e))
        finally:
            temporary.unlink(missing_ok=True)

    def write_file(self, i, temporary):
        ending, row = yield from self.write_clip(i, temporary)
        if ending:
            path = self.out / (name_at(self.names, i) + ending)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
            except OSError as e:
                if e.errno not in NAMES:
                    raise
                row = Row("bad", i, f"{path}: cannot be the name of a clip ({reason_of(e)})")
        yield row

    def write_shard(self, shard, temporary):
        """Add the clips that a tar lacks, and give it its name."""
        path = shard_path(self.out, shard.number)
        part = part_of(path)
        with open(part, "ab") as file:
            with contextlib.suppress(OSError):                  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)                # a worker may outlive its killed process
            if path.exists():                                   # that worker has made it whole
                raise OSError(errno.EEXIST, "another process has just written there")
            file.truncate(shard.size)
            file.seek(0, os.SEEK_END)
            with tarfile.open(fileobj=file, mode="w") as tar:
                for i in shard.clips:
                    ending, row = yield from self.write_clip(i, temporary)
                    if ending:
                        self.add_members(tar, ending, row, temporary)
                    yield row
            file.flush()
            os.replace(part, path)                              # before the lock is given up
        shards.read_index(path)                                 # writes it

    def write_clip(self, i, temporary):
        """A generator of None after each piece, which returns (the ending, the Row), of a bad clip (None, the
        Row). Raises OSError of the disk."""
        path = self.listing.path(i)
        try:
            ending, seconds = yield from rewrite(path, temporary, self.how)
            return ending, Row("written", i, seconds=seconds)
        except ClipError as e:
            return None, Row("bad", i, str(e))
        except (av.error.FFmpegError, OSError, ValueError) as e:
            if isinstance(e, OSError) and e.errno not in WRONG:
                raise
            return None, Row("bad", i, f"{path}: cannot be written anew ({reason_of(e)})")

    def add_members(self, tar, ending, row, temporary):
        """A clip, and beside it what is known of it, under headers without a time or a user."""
        classes = []
        if self.listing.labels is not None:
            classes = [self.listing.classes[c] for c in self.listing.clip_labels(row.index)]
        about = {
            "file": self.listing.file(row.index),
            "classes": classes,
            "seconds": round(row.seconds, 3)}
        with open(temporary, "rb") as clip:
            for end, file in ((ending, clip), (".json", io.BytesIO(json.dumps(about).encode()))):
                member = tarfile.TarInfo(name_at(self.names, row.index) + end)
                member.size = file.seek(0, os.SEEK_END)
                file.seek(0)
                tar.addfile(member, file)


def name_at(names, i):
    """A name out of an array of bytes."""
    return os.fsdecode(bytes(names[i]))


def shard_path(out, number):
    return out / f"shard-{number:05d}.tar"


def part_of(path):
    """The name of a file that is not whole."""
    return path.with_name(f".{path.name}.part")


def put(path, write):
    """write(a path), and then give that file its name."""
    write(part_of(path))
    os.replace(part_of(path), path)


# ------------------------------------------------------------------------------------------------------------
# What is there
# ------------------------------------------------------------------------------------------------------------

def new_names(files):
    """The files without their endings; those that would then be called alike keep them."""
    names = [without_ending(file) for file in files]
    alike = True
    while alike:
        count = Counter(names)
        alike = [n for n, name in enumerate(names) if count[name] > 1 and name != files[n]]
        for n in alike:
            names[n] = files[n]
    return names


def find_prepared(names, out, how):
    """(index, path, bytes) of each clip that is there, in tars that are whole."""
    if not how.shards:
        for i in range(len(names)):
            for ending in (".mp4", ".wav"):
                path = out / (name_at(names, i) + ending)
                if os.path.isfile(path):
                    yield i, path, path.stat().st_size
        return
    place = {name_at(names, i): i for i in range(len(names))}
    for number in range(how.shards):
        path = shard_path(out, number)
        for name, offset, size in shards.read_index(path):
            if not name.endswith(".json"):
                yield place[without_ending(name)], shards.address(path, offset, size, name), size


def find_work(names, out, how):
    """(what is to be done: indices of clips, or Shards; indices of the clips that earlier runs left out of
    their tars)"""
    if not how.shards:
        there = {i for i, _, _ in find_prepared(names, out, how)}
        return [i for i in range(len(names)) if i not in there], []
    work = []
    left_out = []
    for number, block in enumerate(np.array_split(np.arange(len(names)), how.shards)):
        path = shard_path(out, number)
        whole = {}                                              # name: bytes of the tar up to its end
        for name, offset, size in members_of(path):
            if name.endswith(".json"):                          # a clip's second member
                whole[os.fsencode(without_ending(name))] = math.ceil((offset + size) / 512) * 512
        has = np.array([bytes(names[i]) in whole for i in block])
        if len(whole) > has.sum():
            raise damaged(path)
        done = len(block) if path.exists() else has.nonzero()[0].max(initial=-1) + 1
        left_out += block[:done][~has[:done]].tolist()
        if not path.exists():
            work.append(Shard(number, block[done:], max(whole.values(), default=0)))
    return work, left_out


def members_of(path):
    """Those of a tar, or of what there is of it. UserError where a whole one is none."""
    if path.exists():
        try:
            members = shards.read_places(path)
        except tarfile.TarError:
            raise damaged(path) from None
        if shards.REST in members[-1:]:
            raise damaged(path)
        return members
    with contextlib.suppress(FileNotFoundError, tarfile.ReadError):     # it was not begun, or is empty
        return shards.read_members(part_of(path))
    return []


def damaged(path):
    return UserError(f"{path}: is damaged, or holds other clips; remove it, and the same command writes it "
                     "anew")


def read_bad(out):
    """{file: reason} of the last run."""
    with contextlib.suppress(OSError, ValueError):              # whoever has edited it
        lines = (out / BAD).read_text(encoding="utf-8").splitlines()
        return dict(line.split("\t", 1) for line in lines)
    return {}


def write_bad(out, files, bad):
    """bad: {index: reason}."""
    lines = [f"{printable(files[i])}\t{printable(bad[i])}\n" for i in sorted(bad)]
    with contextlib.suppress(OSError):                          # a full disk has been told of
        (out / BAD).unlink(missing_ok=True)
        if lines:
            put(out / BAD, lambda path: path.write_text("".join(lines), encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

def prepare(listing, lists, out, how, workers):
    """Write all clips of a listing into the folder `out`, as `how`, a Coding, says, and copy the set's lists
    (glob patterns). Says what came of it. Raises UserError where something else lies there, or nothing can be
    written."""
    out = Path(out)
    files = [listing.file(i) for i in range(len(listing))]
    names = np.array([os.fsencode(name) for name in new_names(files)], np.bytes_)
    try:
        check_places(listing, files, out, how)
        out.mkdir(parents=True, exist_ok=True)
        with lock(out) as settings:
            check_settings(settings, listing, out, how)
            copy_lists(Path(listing.root), lists, out)
            write_clips(listing, files, names, out, how, workers)
            name_strays(names, out)
    except OSError as e:
        raise cannot_write(out, reason_of(e)) from None
    compare(listing, names, out, how)


def write_clips(listing, files, names, out, how, workers):
    """Write the clips that are not there. Says how many those are, and which are bad."""
    began = time.monotonic()
    work, left_out = find_work(names, out, how)
    left = sum(len(shard.clips) for shard in work) if how.shards else len(work)
    told = read_bad(out)
    bad = {i: told.get(printable(files[i]), "left out by an earlier run") for i in left_out}
    there = len(files) - left - len(bad)
    written = 0
    seconds = 0.0
    writer = Writer(listing, names, out, how, work)
    rows = Loader(writer, min(workers, len(work)), batch_size=None, in_order=False)
    try:
        with tqdm(total=len(files), initial=len(files) - left, desc="prepare", unit="clip") as bar:
            for row in rows:
                if row is None:
                    continue
                if row.kind == "full":
                    raise cannot_write(out, row.reason)
                if row.kind == "bad":
                    bad[row.index] = row.reason
                    tell(printable(f"bad clip: {row.reason}"))
                written += row.kind == "written"
                seconds += row.seconds
                bar.update()
    finally:
        write_bad(out, files, bad)
    wall = time.monotonic() - began
    print(f"{listing.name}: {written:,} clips written ({seconds / 3600:.2f} hours) in {wall:.1f} s, "
          f"{written / wall:.2f} a second; {there:,} were there")
    if bad:
        print(f"{plural(bad, 'bad clip')}: see {out / BAD}")


def name_strays(names, out):
    """Say which clips there are of none that is to be prepared: it was removed, or has another name now."""
    known = set(names.tolist())
    strays = [file for file in scan(out) if os.fsencode(without_ending(file)) not in known]
    if strays:
        print(f"{plural(strays, 'clip')} there without an original: {few(strays)}; remove what should not be "
              "trained on")


def cannot_write(out, reason):
    return UserError(f"--prepare {out}: the clips cannot be written there ({reason}); make room, and the "
                     "same command goes on, or give another folder")


def check_places(listing, files, out, how):
    """UserError where the folders, what lies in them, or the lists do not allow it."""
    raw = os.path.realpath(listing.root)
    new = os.path.realpath(out)
    if os.path.commonpath([raw, new]) in (raw, new):
        raise UserError(f"--prepare {out}: is, holds or lies in --data-dir {listing.root}; give a folder "
                        "beside it")
    absolute = [file for file in files if os.path.isabs(file)]
    if absolute:
        raise UserError(f"{listing.name}: its lists name {absolute[0]} by an absolute path; make the paths "
                        "in them relative to --data-dir")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise UserError(f"--prepare {out}: holds other files; give an empty or a new folder")
    if how.shards > len(files):
        raise UserError(f"--shards {how.shards:,} is more than the {len(files):,} clips; give fewer")


@contextlib.contextmanager
def lock(out):
    """The folder is this process's, without the half clips of one that was killed: the file of its settings,
    open. UserError where another process is at work there."""
    with open(out / SETTINGS, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--prepare {out}: another process is writing there; wait for its end, or give "
                            "another folder") from None
        except OSError:
            pass                                                # a file system without locks
        for left in out.glob(".clip-*.part"):
            left.unlink(missing_ok=True)
        yield file


def check_settings(file, listing, out, how):
    """Write down in `file` what is being prepared. UserError where something else is written there."""
    settings = {"version": VERSION, "data": listing.name, **asdict(how)}
    if how.shards:                                              # a clip's tar hangs on those before it
        known = hashlib.sha256(listing.files.tobytes()).hexdigest()[:16]
        settings["clips"] = f"{len(listing)} ({known})"
    file.seek(0)
    text = file.read()
    if not text:
        file.write(json.dumps(settings))
        file.flush()
        return
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"--prepare {out}: its {SETTINGS} cannot be read; give another folder") from None
    other = [f"{key} {found.get(key)} and not {settings[key]}"
             for key in settings if found.get(key) != settings[key]]
    if other:
        raise UserError(f"--prepare {out}: was begun with {', '.join(other)}; give the same again, or "
                        "another folder")


def copy_lists(raw, lists, out):
    for pattern in lists:
        for path in raw.glob(pattern):
            copy = out / path.relative_to(raw)
            copy.parent.mkdir(parents=True, exist_ok=True)
            put(copy, lambda part, path=path: shutil.copyfile(path, part))


def compare(listing, names, out, how):
    """Say what the clips and the reading of them cost before and now, and how to train on them."""
    prepared = [row for row in find_prepared(names, out, how) if shards.is_clip(listing.path(row[0]))]
    if not prepared:
        return
    raw = 0
    for i, _, _ in prepared:
        inside = shards.find_address(listing.path(i))
        raw += inside[2] if inside else os.path.getsize(listing.path(i))
    new = sum(size for _, _, size in prepared)
    chosen = prepared[::math.ceil(len(prepared) / 20)]
    before = time_reading([listing.path(i) for i, _, _ in chosen])
    after = time_reading([path for _, path, _ in chosen])
    print(f"{raw / 1e6:,.1f} MB before, {new / 1e6:,.1f} MB now; a clip {raw / len(prepared) / 1e3:,.0f} kB "
          f"before, {new / len(prepared) / 1e3:,.0f} kB now; to read one {before:.1f} ms before, "
          f"{after:.1f} ms now")
    print(f"to train on them: --data {listing.name} --data-dir {out}")


def time_reading(paths):
    """Milliseconds a clip, of up to 8 seconds from its middle."""
    began = time.perf_counter()
    for path in paths:
        with one_thread(), contextlib.suppress(ClipError), open_clip(path) as clip:
            seconds = min(clip.duration or 8.0, 8.0)
            window = [((clip.duration - seconds) / 2, seconds)]
            clip.read(window, window, num_frames=16, size=224, sample_rate=16000)
    return 1000 * (time.perf_counter() - began) / len(paths)
