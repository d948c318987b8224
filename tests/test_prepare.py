"""data.py --prepare: what was put into clips comes out of those that it writes, at the same seconds.

The clips of test_reader are clocks: numbered frames, 10 a second, and a sound whose pitch tells the time."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import av
import numpy as np
import pytest
import torch

import common
import data
import mjepa
from conftest import FORK, MOMENTS, RATES, ROOT, command, fails, forked, names
from conftest import numbered, read_number, tone, write
from datasets import prepare, rewrite, shards
from run import read_log
from slow import quicken
from slow import record as record_calls
from test_data import click_time
from test_reader import AAC, H264, SECONDS, WHOLE, assert_right, join, read, record, time_of

# of test_reader's: guessed lengths, late clocks and streams, changes in mid-stream, single pictures
HARD = ("pipe.mkv", "pipe.mp4", "size-0.wav", "vbr-up.mp3", "late.mkv", "sound-late.mp4",
        "pictures-late.mp4", "rate.ts", "size.webm", "b-frames.h264", "b-frames.avi", "still.webm",
        "opposite.mp4")


def run(raw, out, *flags, name="folder", workers=0):
    words = ["--data", name, "--data-dir", raw, "--prepare", out, "--workers", workers, *flags]
    data.main([str(word) for word in words])


def contents(folder):
    """{path: bytes} of what a command leaves; of an index, which knows when its tar was written, the
    members."""
    out = {}
    for path in folder.rglob("*"):
        if path.suffix == ".index":
            out[path.name] = shards.load_index(path.with_suffix(""))
        elif path.is_file():
            out[str(path.relative_to(folder))] = path.read_bytes()
    return out


def packets(path, kind="video"):
    """[(seconds, is it a key frame, frames decoded before it in the file's order)] of a stream."""
    with av.open(str(path)) as container:
        stream = container.streams.get({kind: 0})[0]
        return [(float(p.pts * p.time_base), p.is_keyframe, p.pts == p.dts)
                for p in container.demux(stream) if p.size]


# --- The same seconds ---

@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """(the folder of the HARD clips, that of the prepared ones, written in pieces of five seconds)"""
    raw = tmp_path_factory.mktemp("hard")
    for name in HARD:
        WHOLE[name][1](raw / name)
    out = raw.with_name("hard-prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "CHUNK", 5.0)
        run(raw, out)
    return raw, out


@pytest.mark.parametrize("name", HARD)
def test_what_a_clip_shows_and_sounds_like_is_there_at_the_same_seconds(hard, name):
    """Whatever its container, clock and streams: the brightness of a frame and the pitch are their time."""
    kinds, make = WHOLE[name]
    raw, out = hard
    stem = prepare.new_names(HARD)[HARD.index(name)]
    path = out / f"{stem}.{'mp4' if 'v' in kinds else 'wav'}"
    exact = 0.2 if getattr(make, "func", None) is join else 0.11
    with data.open_clip(raw / name) as before, data.open_clip(path) as after:
        assert after.duration == pytest.approx(before.duration, abs=0.1)
        assert (after.video is not None) == ("v" in kinds)
        assert (after.audio is not None) == ("a" in kinds)
    windows = [(1.2, 1.0), (4.6, 1.0), (8.4, 1.0), (10.7, 1.0)]         # one lies over the end of a piece
    for some in (windows, windows[2:3]):
        assert_right(read(path, some), some, kinds, exact)


def test_a_stream_that_is_late_or_ends_early_is_so_in_the_prepared_clip(tmp_path):
    make_raw(tmp_path / "raw", **{
        "late-sound.mp4": [H264, AAC._replace(begin=7.0, at=7.0)],
        "late-pictures.mp4": [H264._replace(begin=7.0, at=7.0), AAC],
        "early-sound.mkv": [H264, AAC._replace(end=5.0)],
        "early-pictures.mkv": [H264._replace(end=5.0), AAC]})
    run(tmp_path / "raw", tmp_path / "out")
    windows = [(0.5, 1.0), (3.0, 1.0), (8.0, 1.0), (10.5, 1.0)]
    for path in (tmp_path / "raw").iterdir():
        before = read(path, windows)
        after = read(tmp_path / "out" / f"{path.stem}.mp4", windows)
        late = "late" in path.name
        has = [not late, not late, late, late]
        sound = "sound" in path.name
        for found in (before, after):
            assert found["heard"] == (has if sound else [True] * 4)
            assert found["seen"] == ([True] * 4 if sound else has)
        for a, b, seen in zip(before["video"], after["video"], before["seen"]):
            assert not seen or [read_number(one) for one in a] == [read_number(one) for one in b]
        for x, y in zip(before["audio"], after["audio"]):
            np.testing.assert_allclose(time_of(x), time_of(y), atol=0.05)           # both NaN in silence


def make_raw(folder, **clips):
    """{name: Tracks} of test_reader as files."""
    folder.mkdir()
    for name, tracks in clips.items():
        record(tracks, folder / name)


@pytest.mark.parametrize("name", ["25", "29.97"])
def test_each_frame_comes_once_at_its_time_and_a_click_at_its_sample(clocks, tmp_path, monkeypatch, name):
    """Also over the ends of pieces, here of 1.7 seconds."""
    monkeypatch.setattr(rewrite, "CHUNK", 1.7)
    (tmp_path / "raw").mkdir()
    shutil.copy(clocks[name], tmp_path / "raw" / "clip.mp4")
    run(tmp_path / "raw", tmp_path / "out")
    path = tmp_path / "out" / "clip.mp4"
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        rate = container.streams.video[0].average_rate
    fps = RATES[name]
    assert rate == fps
    count = int(8 * fps)
    assert [read_number(frame.to_ndarray(format="rgb24")) for frame in frames] == list(range(count))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(count) / float(fps), atol=1e-4)
    for moment in MOMENTS:
        before = data.read_clip(clocks[name], moment - 0.3, 0.6, 1, 16, 16000)["audio"]
        after = data.read_clip(path, moment - 0.3, 0.6, 1, 16, 16000)["audio"]
        assert click_time(after) == pytest.approx(click_time(before), abs=1 / 16000)


def test_sound_goes_over_the_ends_of_pieces_without_a_click(tmp_path, monkeypatch):
    """A sample of a sine is known by the two before it: of a tone coded at 44.1 kHz as in the clip itself."""
    monkeypatch.setattr(rewrite, "CHUNK", 0.7)
    (tmp_path / "raw").mkdir()
    frames = [numbered(n) for n in range(150)]
    write(tmp_path / "raw" / "a.mp4", frames, tone(1000, 6, 44100), rate=44100)
    run(tmp_path / "raw", tmp_path / "out")
    before, after = (surprises(tmp_path / which / "a.mp4") for which in ("raw", "out"))
    assert after < before + 0.01 < 0.05
    assert len(packets(tmp_path / "out" / "a.mp4")) == 150


def surprises(path):
    """The most by which a sample differs from the sine of 1 kHz through the two before it."""
    wave = data.read_clip(path, 0.0, 6.0, 1, 16, 16000)["audio"][800:-800]
    return np.abs(wave[2:] - 2 * np.cos(np.pi / 8) * wave[1:-1] + wave[:-2]).max()


def test_of_a_file_that_breaks_off_there_is_what_decodes(clips, tmp_path, monkeypatch):
    """Its index says eight seconds."""
    monkeypatch.setattr(rewrite, "CHUNK", 1.0)
    (tmp_path / "raw").mkdir()
    whole = (clips / "fast.mp4").read_bytes()
    (tmp_path / "raw" / "a.mp4").write_bytes(whole[:len(whole) // 2])
    pieces = record_calls(monkeypatch, rewrite.Output, "add")
    run(tmp_path / "raw", tmp_path / "out")
    rows = packets(tmp_path / "out" / "a.mp4")
    assert 50 < len(rows) < 150 and len(pieces) < 8
    with data.open_clip(tmp_path / "out" / "a.mp4") as clip:
        with data.open_clip(tmp_path / "raw" / "a.mp4") as before:
            assert clip.duration == pytest.approx(max(before.ends(decode=True).values()), abs=0.05)
        found = clip.read([(1.0, 1.0)], [(1.0, 1.0)], 5, 48, 16000)
    assert [read_number(picture) for picture in found["video"][0]] == [27, 32, 37, 42, 47]


def test_a_variable_frame_rate_shows_each_moment_within_a_frame(tmp_path):
    """Pictures at 0, 1/25, ... of the first two seconds, then one each half second."""
    times = [*np.arange(50) / 25, *np.arange(2, 8, 0.5)]
    (tmp_path / "raw").mkdir()
    with av.open(str(tmp_path / "raw" / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width = 48, 64
        stream.pix_fmt = "yuv420p"
        for n, second in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(n), format="rgb24")
            frame.pts = round(second * 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    run(tmp_path / "raw", tmp_path / "out")
    with data.open_clip(tmp_path / "out" / "a.mp4") as clip:
        fps = float(clip.video.average_rate)
        moments = np.arange(0.1, 7.4, 0.23)
        shown = clip.read([(m, 0.02) for m in moments], [], 1, 48, 16000)["video"]
    for moment, (picture,) in zip(moments + 0.01, shown):
        near = np.searchsorted(times, (moment - 1 / fps, moment + 1 / fps), side="right") - 1
        assert near[0] <= read_number(picture) <= near[1], moment


# --- What is written ---

def test_there_are_no_b_frames_a_key_frame_each_gop_and_sound_beside_its_pictures(hard):
    path = hard[1] / "b-frames.h264.mp4"
    rows = packets(path)
    assert all(in_order for _, _, in_order in rows)
    assert [key for _, key, _ in rows] == [n % 6 == 0 for n in range(len(rows))]
    with av.open(str(hard[1] / "late.mp4")) as container:
        places = [(p.pos, float(p.pts * p.time_base)) for p in container.demux() if p.size]
    ordered = [second for _, second in sorted(places)]
    assert all(b > a - 1.1 for a, b in zip(ordered, ordered[1:]))               # in the file's order
    raw = (hard[1] / "late.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")              # the index in front


@pytest.mark.parametrize("size, flags, shape", [
    ((48, 64), (), (48, 64)), ((48, 64), ("--side", 32), (32, 42)), ((90, 51), ("--side", 64), (90, 50))])
def test_pictures_are_made_smaller_and_never_larger(tmp_path, size, flags, shape):
    (tmp_path / "raw").mkdir()
    frames = [numbered(n, height=size[0], width=size[1]) for n in range(12)]
    write(tmp_path / "raw" / "a.mp4", frames, fps=12, pixels="yuv444p")
    run(tmp_path / "raw", tmp_path / "out", "--fps", 6, "--gop", 2, *flags)
    rows = packets(tmp_path / "out" / "a.mp4")
    assert [second for second, _, _ in rows] == pytest.approx(np.arange(6) / 6, abs=1e-3)
    assert [key for _, key, _ in rows] == [True, False] * 3
    with data.open_clip(tmp_path / "out" / "a.mp4") as clip:
        assert (clip.video.height, clip.video.width) == shape


# --- The same set ---

def small(path, seconds=1.0, picture=True, sound=True):
    """A clip of its own brightness and pitch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode()) % 200
    frames = [numbered(seed) for _ in range(round(12 * seconds))] if picture else None
    codec = {".wav": "pcm_s16le", ".webm": "libopus"}.get(path.suffix, "aac")
    video = "libvpx" if path.suffix == ".webm" else "libx264"
    write(path, frames, tone(300 + 5 * seed, seconds) if sound else None, fps=12, audio=codec, video=video)


LAYOUTS = {
    "folder": ["train/dog/a.mp4", "train/dog/a.mkv", "train/cat/b.mov", "train/cat/b.1.mp4", "val/dog/c.mp4",
               "test/dog/d.mkv", "test/cat/e.mp4"],
    "classes": [f"{c}/{n}.{end}" for c in "xy" for n, end in enumerate(("mp4", "mkv", "mov", "mkv"))],
    "vggsound": ["-0RWZT-miFs_000030.mp4", "deep/a_b_c_d_e_f_000005.mkv", "YxYxYxYxYxY_000120.mp4"],
    "esc50": ["audio/1-1-A-0.wav", "audio/2-1-A-1.wav", "audio/1-2-A-1.wav"]}
LISTS = {
    "vggsound": {"vggsound.csv": "-0RWZT-miFs,30,drum,train\nYxYxYxYxYxY,120,dog,test\n"
                                 "a_b_c_d_e_f,5,cat,train\nMISSINGMISS,7,dog,train\n"},
    "esc50": {"meta/esc50.csv": "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n2-1-A-1.wav,2,1,cat\n"
                                "1-2-A-1.wav,1,1,cat\n"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_set_lists_the_same_clips_with_the_same_labels(tmp_path, layout):
    """In the same order, training, test, validation and folds; a clip without its ending is the same."""
    for file in LAYOUTS[layout]:
        small(tmp_path / "raw" / file, 0.5, picture=layout != "esc50")
    for file, text in LISTS.get(layout, {}).items():
        (tmp_path / "raw" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / file).write_text(text)
    name = "folder" if layout == "classes" else layout
    for flags in ((), ("--shards", 2)):
        out = tmp_path / f"out{len(flags)}"
        run(tmp_path / "raw", out, *flags, name=name)
        for split in ("train", "test"):
            before, after = (data.list_clips(name, folder, split) for folder in (tmp_path / "raw", out))
            assert_same_listing(before, after)


def assert_same_listing(before, after):
    assert len(before) and [bare(file) for file in names(before)] == [bare(file) for file in names(after)]
    assert before.classes == after.classes and before.missing == after.missing
    for key in ("labels", "offsets", "held", "fold"):
        np.testing.assert_array_equal(getattr(before, key), getattr(after, key))
    for i in range(len(before)):
        pictures, sounds = zip(*[show(listing.path(i)) for listing in (before, after)])
        assert pictures[0] == pictures[1] and sounds[0] == pytest.approx(sounds[1], abs=5)


def bare(file):
    while data.MEDIA & {os.path.splitext(file)[1]}:
        file = os.path.splitext(file)[0]
    return file


def show(path):
    """(number of the picture or None, Hz of the tone) of a clip of `small`."""
    found = data.read_clip(path, 0.1, 0.3, 1, 48, 16000)
    spectrum = np.abs(np.fft.rfft(found["audio"] * np.hanning(len(found["audio"])), 2 ** 14))
    return read_number(found["video"][0]) if found["has_video"] else None, spectrum.argmax() * 16000 / 2 ** 14


def test_names_that_differ_by_the_ending_alone_keep_it_and_none_comes_twice():
    files = ["a.avi", "a.mp4", "a.avi.mkv", "b/a.avi", "b.c.mp4", "A.MP4"]
    assert prepare.new_names(files) == ["a.avi", "a.mp4", "a.avi.mkv", "b/a", "b.c", "A"]


def test_the_toy_world_can_be_prepared(tmp_path, monkeypatch):
    for split, count in (("train", 5), ("test", 4)):
        monkeypatch.setitem(data.TOY, split, count)
    toy = tmp_path / "toy"
    run(toy, tmp_path / "out", name="toy")                      # writes it, too
    for split, count in (("train", 5), ("test", 4)):
        before = data.list_clips("toy", toy, split)
        after = data.list_clips("toy", tmp_path / "out", split)
        assert names(after) == names(before) and len(after) == count
        np.testing.assert_array_equal(before.labels, after.labels)
        a, b = (data.read_clip(listing.path(3), 1.0, 2.0, 8, 64, 16000) for listing in (before, after))
        assert np.abs(a["video"].astype(float) - b["video"]).mean() < 6
        assert np.abs(a["audio"] - b["audio"]).max() < 1e-3


# --- Kills, shards, bad clips ---

@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of nine clips, of which one is bad."""
    folder = tmp_path_factory.mktemp("set")
    for n in range(8):
        small(folder / "train" / "ab"[n % 2] / f"{n}.mkv", 3.0, picture=n != 3)
    (folder / "train" / "a" / "5.mp4").write_bytes(b"no clip")
    return folder


@pytest.fixture(scope="module")
def undisturbed(raw):
    """{number of shards: the folder of an undisturbed run}"""
    outs = {count: raw.with_name(f"undisturbed{count}") for count in (0, 2)}
    for count, out in outs.items():
        run(raw, out, "--shards", count)
    return outs


@pytest.mark.skipif(not FORK, reason="forks")
@pytest.mark.parametrize("count", [0, 2], ids=["files", "shards"])
def test_after_a_kill_the_same_command_makes_the_bytes_of_an_undisturbed_run(raw, undisturbed, tmp_path,
                                                                             count, capsys):
    flags = ("--shards", str(count))
    whole = contents(undisturbed[count])
    words = ["--data", "folder", "--data-dir", raw, "--prepare", tmp_path / "out", "--workers", "1", *flags]
    process = os.fork()
    if process == 0:
        os.setsid()
        with open(os.devnull, "w") as nothing:
            forked(["data.py", *map(str, words)], ROOT, nothing, nothing)
    try:
        until = time.time() + 60
        while not is_under_way(tmp_path / "out"):
            assert os.waitpid(process, os.WNOHANG)[0] == 0 and time.time() < until
            time.sleep(0.001)
    finally:
        os.killpg(process, signal.SIGKILL)                      # and its worker
        os.waitpid(process, 0)
    half = contents(tmp_path / "out")
    assert any(name.endswith(".part") for name in half) and half.keys() != whole.keys()
    run(raw, tmp_path / "out", *flags)
    shown = capsys.readouterr().out
    assert " 0 were there" not in shown and "1 bad clip:" in shown
    assert contents(tmp_path / "out") == whole
    run(raw, tmp_path / "out", *flags)
    assert "folder: 0 clips written" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole


def is_under_way(out):
    """Two clips are written and another one is being written."""
    tars = [shards.read_members(path) for path in out.glob(".shard-*.part") if path.stat().st_size > 512]
    done = list(out.rglob("*.mp4")) + sum(tars, [])[::2]
    return len(done) >= 2 and any(path.stat().st_size for path in out.glob(".clip-*.part"))


def test_training_on_shards_is_training_on_files_and_goes_on_bit_for_bit(undisturbed, tmp_path, monkeypatch):
    quicken(monkeypatch, mjepa)
    runs = {"files": (0, ()), "shards": (2, ()), "on": (2, ("--resume", tmp_path / "shards/step-000002.pt"))}
    found = {}
    for name, (count, more) in runs.items():
        words = f"--data folder --data-dir {undisturbed[count]} --recipe toy --size nano --batch-size 4"
        words += f" --steps 4 --keep-every 2 --workers 0 --log-every 1 --max-bad 1 --out {tmp_path / name}"
        mjepa.main([*words.split(), *map(str, more)])
        losses = {row["step"]: row["loss/a"] for row in read_log(tmp_path / name)}
        found[name] = losses, common.load_checkpoint(tmp_path / name)["model"]
    for name, steps in (("shards", range(4)), ("on", (2, 3))):
        losses, weights = found["files"]
        assert found[name][0] == {step: losses[step] for step in steps}
        assert all(torch.equal(weights[key], found[name][1][key]) for key in weights)


def test_shards_are_read_by_a_plain_loop_as_webdatasets_are(raw, undisturbed, tmp_path):
    run(raw, tmp_path / "out", "--shards", 3, workers=2)
    tars = [f"shard-0000{n}.tar" for n in range(3)]
    left = {"bad.txt", "prepared.json", *tars, *(f"{tar}.index" for tar in tars)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == left
    samples = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        subprocess.run(["tar", "tf", path], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(path) as tar:
            for member in tar:
                key, end = member.name.split(".", 1)
                if not samples or samples[-1]["key"] != key:
                    samples.append({"key": key})
                samples[-1][end] = tar.extractfile(member).read()
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    listed = data.list_clips("folder", raw, "all")
    kept = [file for file in names(listed) if file != "train/a/5.mp4"]
    assert [sample["key"] for sample in samples] == [prepared_stem(file) for file in kept]
    for file, sample in zip(kept, samples):
        end = "wav" if "/3." in file else "mp4"
        assert sample[end] == (undisturbed[0] / f"{sample['key']}.{end}").read_bytes()
        about = json.loads(sample["json"])
        assert about == {"file": file, "classes": [file.split("/")[1]], "seconds": pytest.approx(3, abs=0.1)}


def prepared_stem(file):
    return file.rsplit(".", 1)[0]


def test_bad_clips_are_named_and_counted_and_tried_again(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    words = ["data.py", "--data", "folder", "--data-dir", tmp_path / "raw", "--prepare", tmp_path / "out"]
    done = command([sys.executable, *map(str, words), "--workers", "2"], ROOT)
    assert done.returncode == 0, done.stderr
    assert "1 bad clip:" in done.stdout and "bad clip: " in done.stdout and "8 clips written" in done.stdout
    file, reason = (tmp_path / "out" / "bad.txt").read_text().rstrip("\n").split("\t")
    assert file == "train/a/5.mp4" and "does not decode" in reason
    small(tmp_path / "raw" / file)
    run(tmp_path / "raw", tmp_path / "out")
    assert (tmp_path / "out" / file).exists() and not (tmp_path / "out" / "bad.txt").exists()


def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(raw, undisturbed, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 50_000                                               # bytes: less than a clip
    for count in (0, 2):
        flags = ("--shards", count)
        out = tmp_path / f"out{count}"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
            message = fails(run, raw, out, *flags, match="cannot be written there .File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert message.startswith(f"--prepare {out}: ") and "the same command goes on" in message
        run(raw, out, *flags)
        assert contents(out) == contents(undisturbed[count])


def test_a_name_that_a_prepared_clip_cannot_have_makes_a_bad_clip_and_the_rest_is_written(tmp_path, capsys):
    for file in (f"{'y' * 252}.ts", "b.avi", "b.mp4/c.mkv", "d.mkv"):
        small(tmp_path / "raw" / file, 0.2)
    out = tmp_path / "a:b"                                      # FFmpeg's name of a protocol
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run("raw", "a:b")
    shown = capsys.readouterr().out
    assert "2 clips written" in shown and "2 bad clips: see a:b/bad.txt" in shown
    assert (out / "d.mp4").is_file() and not list(out.rglob("*.part"))
    assert "File name too long" in (out / "bad.txt").read_text()
    (out / "bad.txt").write_text("edited\n")
    run(tmp_path / "raw", out)
    assert "2 were there" in capsys.readouterr().out


def test_a_tar_that_was_damaged_or_exchanged_is_named_and_written_anew_once_it_is_gone(raw, undisturbed,
                                                                                       tmp_path):
    out = shutil.copytree(undisturbed[2], tmp_path / "out")
    tar = out / "shard-00001.tar"
    whole = tar.read_bytes()
    for content in (b"", b"x" * 1024, whole[:len(whole) // 2], (out / "shard-00000.tar").read_bytes()):
        tar.write_bytes(content)
        message = fails(run, raw, out, "--shards", 2, match="is damaged, or holds other clips; remove it")
        assert message.startswith(str(tar)) and tar.read_bytes() == content
    tar.unlink()
    run(raw, out, "--shards", 2)
    assert tar.read_bytes() == whole


def test_a_tar_that_a_worker_of_a_killed_process_has_made_whole_is_left_alone(raw, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed[2], tmp_path / "out")
    listing = data.list_all("folder", raw)
    stems = np.array([os.fsencode(name) for name in prepare.new_names(names(listing))], np.bytes_)
    work = [prepare.Shard(0, np.arange(1), 0)]                  # as it was found before
    writer = prepare.Writer(listing, stems, out, rewrite.Coding(shards=2), work)
    (row,) = writer
    assert row.kind == "full" and "another process" in row.reason
    assert (out / "shard-00000.tar").read_bytes() == (undisturbed[2] / "shard-00000.tar").read_bytes()


@pytest.mark.parametrize("fps, expected", [(60, 60), (100, 50), (120, 60), (240, 60)])
def test_of_a_slow_motion_each_second_frame_is_kept_and_more_are_left_out(tmp_path, fps, expected):
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / "a.mp4", [numbered(n) for n in range(fps // 2)], fps=fps)
    run(tmp_path / "raw", tmp_path / "out")
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        frames = list(container.decode(video=0))
    step = fps // expected
    assert len(frames) == fps // 2 // step
    for n, frame in enumerate(frames):
        assert frame.time == pytest.approx(n / expected, abs=1e-3)
        assert n * step <= read_number(frame.to_ndarray(format="rgb24")) < (n + 1) * step


# --- What is refused ---

def test_a_folder_that_holds_anything_else_is_refused(raw, undisturbed, tmp_path):
    out = undisturbed[0]
    message = fails(run, raw, out, "--side", 32, "--gop", 12)
    assert "was begun with side 256 and not 32, gop 6 and not 12; give the same again" in message
    fails(run, raw, "", match="holds other files")              # the folder where the command is given
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    fails(run, raw, tmp_path / "other", match="holds other files; give an empty or a new folder")
    fails(run, raw, tmp_path / "other" / "file", match="cannot be written there")
    (tmp_path / "link").symlink_to(raw)
    for place in (raw, raw / "new", raw.parent, tmp_path / "link"):
        fails(run, raw, place, match="is, holds or lies in --data-dir")
    with prepare.lock(out):
        words = ["--data", "folder", "--data-dir", raw, "--prepare", out]
        done = command([sys.executable, "data.py", *map(str, words)], ROOT)
    assert done.returncode == 2 and "another process is writing there" in done.stderr


def test_tars_of_other_clips_are_refused(raw, undisturbed, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(undisturbed[2], tmp_path / "out")
    small(tmp_path / "raw" / "train" / "a" / "0.avi.mp4")
    fails(run, tmp_path / "raw", tmp_path / "out", "--shards", 2, match="was begun with clips .* and not ")
    fails(run, tmp_path / "raw", tmp_path / "new", "--shards", 11, match="is more than the 10 clips")


@pytest.mark.parametrize("words, sentence", [
    ("--side 64", "are for --prepare; give --prepare OUT as well"),
    ("--shards 2 --check", "are for --prepare; give --prepare OUT as well"),
    ("--prepare out --stats", "are commands of their own; give --prepare alone")])
def test_flags_that_would_do_nothing_are_refused(raw, words, sentence):
    fails(data.main, ["--data", "folder", "--data-dir", str(raw), *words.split()], match=sentence)


def test_a_list_of_absolute_paths_is_refused(tmp_path):
    small(tmp_path / "raw" / "a.mp4", 0.2)
    for name in ("train.csv", "val.csv"):
        (tmp_path / "raw" / name).write_text(f"{tmp_path}/raw/a.mp4 1\n")
    fails(run, tmp_path / "raw", tmp_path / "out", name="kinetics400", match="by an absolute path; make ")


@pytest.mark.parametrize("flag, value", [("--side", 15), ("--gop", 0), ("--fps", 0.5), ("--sample-rate", 999),
                                         ("--shards", -1)])
def test_a_number_out_of_range_is_refused(tmp_path, flag, value):
    fails(run, tmp_path, tmp_path / "out", flag, value, match=f"{flag} .*is out of range: from ")


assert SECONDS == 12
