"""Small real clips, H.264 + AAC, written once, and the helpers that read back what was put into them."""
import heapq
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common
import data
import run

import av
import numpy as np
import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)

RATES = {"24": Fraction(24), "25": Fraction(25), "29.97": Fraction(30000, 1001), "30": Fraction(30)}
MOMENTS = (0.4, 2.7, 5.3, 7.2)                          # seconds at which a clock clip flashes and clicks


def pictures(stream, frames, fps):
    """(time, stream, frame) of each frame."""
    for n, frame in enumerate(frames):
        yield n / fps, stream, av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")


def sounds(stream, wave, rate, layout):
    """(time, stream, frame) of every 1,024 samples."""
    for start in range(0, wave.shape[1], 1024):
        samples = np.ascontiguousarray(wave[:, start:start + 1024])
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.pts = start
        yield start / rate, stream, frame


def write(path, frames=None, wave=None, fps=25, rate=16000, gop=25, video="libx264", audio="aac",
          pixels="yuv420p", options=None):
    """A clip by PyAV alone, independent of data.write_clip, with a key frame at least every `gop` frames,
    pictures and sound in the order of their times, as recorders do. Returns the path."""
    tracks = []
    with av.open(str(path), "w", options=options or {}) as container:
        if frames is not None:
            coding = {"preset": "veryfast", "crf": "18", "g": str(gop), "x264-params": "mbtree=0"}
            stream = container.add_stream(video, rate=fps, options=coding)      # mbtree is not repeatable
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1
            tracks.append(pictures(stream, frames, fps))
        if wave is not None:
            wave = np.atleast_2d(wave).astype(np.float32)
            layout = {1: "mono", 2: "stereo"}[len(wave)]
            stream = container.add_stream(audio, rate=rate, layout=layout)
            if audio == "aac":
                stream.bit_rate = 96_000 * len(wave)
            tracks.append(sounds(stream, wave, rate, layout))
        for _, stream, frame in heapq.merge(*tracks, key=lambda item: item[0]):
            container.mux(stream.encode(frame))
        for stream in container.streams:
            container.mux(stream.encode(None))
    return path


FORK = multiprocessing.get_start_method() == "fork" and not torch.cuda.is_available()


def command(words, cwd, ranks=1, seconds=120):
    """A command line in a process of its own, as subprocess.run has it. Where that is safe, python SCRIPT is
    forked off this one, which has torch already: three seconds less for each. ranks: as many processes, with
    the environment that torchrun sets."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if FORK and words[0] == sys.executable and words[1].endswith(".py"):
            code = fork(words[1:], cwd, out, err, ranks, seconds)
        else:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            code = subprocess.run(words, cwd=cwd, stdout=out, stderr=err, timeout=seconds, env=env).returncode
        shown = []
        for file in (out, err):
            file.seek(0)
            shown.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(words, code, *shown)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def fork(argv, cwd, out, err, ranks, seconds):
    """The first exit code that is not 0; the other ranks, which would wait for that one, are then ended."""
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
    world["LOCAL_WORLD_SIZE"] = world["WORLD_SIZE"]
    left = []
    code = 0
    until = time.time() + seconds
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(ranks):
        left.append(os.fork())
        if left[-1] == 0:
            if ranks > 1:
                os.environ.update({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            forked(argv, cwd, out, err)
    try:
        while left and code == 0:
            for pid in left[:]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    left.remove(pid)
                    code = code or os.waitstatus_to_exitcode(status)
            assert time.time() < until, f"not done after {seconds} s: {argv}"
            time.sleep(0.02)
    finally:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return code


def forked(argv, cwd, out, err):
    """The forked process: run the script as python would, and end."""
    code = 1
    try:
        multiprocessing.process._children.clear()               # those of the other process
        # that of all bars is shared with it, which would wait forever for one who is killed while it draws
        tqdm.set_lock(threading.RLock())
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.chdir(cwd)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            common.end_workers()
        finally:
            os._exit(code)


def tone(frequency, seconds, rate=16000, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def numbered(n, flash=False, height=48, width=64):
    """Frame number n < 256 as brightness: the lower left quarter holds n % 16, the lower right one n // 16.
    The upper half is black, or white for a flash."""
    frame = np.full((height, width, 3), 255 * flash, np.uint8)
    frame[height // 2:, :width // 2] = n % 16 * 16 + 8
    frame[height // 2:, width // 2:] = n // 16 * 16 + 8
    return frame


def read_number(picture):
    """The number that `numbered` put into a picture of any size."""
    h, w = picture.shape[:2]
    rows = picture[5 * h // 8:7 * h // 8]
    left = rows[:, w // 8:3 * w // 8].mean()
    right = rows[:, 5 * w // 8:7 * w // 8].mean()
    return round((left - 8) / 16) + 16 * round((right - 8) / 16)


def read_flash(picture):
    return picture[picture.shape[0] // 8:3 * picture.shape[0] // 8].mean() > 128


def clock(path, fps, seconds=8.0, rate=16000, **how):
    """A clip whose frames are numbered, and which flashes for one frame and clicks at the same MOMENTS."""
    starts = [round(m * fps) for m in MOMENTS]         # the frames that flash; the clicks come at their times
    wave = np.zeros(round(seconds * rate))
    for n in starts:
        wave[round(n / fps * rate):][:rate // 1000] = 0.9
    frames = [numbered(n, n in starts) for n in range(int(seconds * fps))]
    return write(path, frames, wave, fps, rate, **how)


def weights(out):
    """The checkpoint of a run, or of a file."""
    file = Path(out) if Path(out).is_file() else Path(out) / "latest.pt"
    return torch.load(file, weights_only=True)


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, (list, tuple)) else a == b


CPU = run.Process(torch.device("cpu"))                 # without bf16, whatever the machine has


def names(listing):
    """The files of a listing."""
    return [bytes(file).decode() for file in listing.files]


def last_row(folder, file="probe.jsonl"):
    return json.loads((Path(folder) / file).read_text().splitlines()[-1])


def fails(function, *args, match=None, error=common.UserError, **more):
    """The message of the error that the call raises: one sentence, on one line."""
    with pytest.raises(error, match=match) as e:
        function(*args, **more)
    message = str(e.value)
    assert message and "\n" not in message
    return message


METHOD = dict(                                          # of a checkpoint that no script has written
    name="made_up", title="made up", weights="target_encoder",
    protocol={
        "linear_lr": ((1e-2, 1e-1), (2e-3,), ""),
        "attentive": ("blocks", "blocks", ""),
        "attentive_lr": ((1e-3, 3e-3), (2e-3,), ""),
        "smoothing": (0.0, 0.1, ""),
        "epochs": (15, 2, ""),
        "views": (3, 2, "")})
INPUTS = data.Inputs(
    seconds=2.0, video_seconds=1.0, frames=2, size=16, resize=16, n_fft=512, n_mels=32, mel_mean=-40.0)


def write_checkpoint(folder, video=True, audio=True, cross=(), projector=None, seed=0):
    """A checkpoint of a context and a target encoder with random weights, with predictors across (names) or a
    projector (its widths). Returns the folder."""
    config = dict(size="nano", cls=projector is not None)
    if video:
        config["video"] = dict(shape=(2, 16, 16), patch=(2, 8, 8))
    if audio:
        config["audio"] = dict(shape=(32, INPUTS.mel_frames), patch=(16, 16))
    widths = {name: 3 * [64] for name in cross}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {f"{which}_encoder": common.ViT(**config) for which in ("context", "target")}
        modules = torch.nn.ModuleDict(encoders)
        if cross:
            predictors = {name: common.mlp(64, width, norm=False) for name, width in widths.items()}
            modules["cross"] = torch.nn.ModuleDict(predictors)
        if projector:
            modules["projector"] = common.mlp(64, projector)
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(version="0", method=METHOD, step=3, steps=3, args=dict(seed=0), recipe={}, optimizer={},
                   inputs=asdict(INPUTS), encoder=config, projector=projector, cross=widths or None)
    torch.save({**content, "model": modules.state_dict()}, folder / "latest.pt")
    return folder


def write_two_steps(folder, **parts):
    """A run's checkpoints of two steps: (that of step 2, whose weights are 0, so that clips are told apart
    by nothing; the folder with the latest, of step 3)."""
    content = common.load_checkpoint(write_checkpoint(folder, **parts))
    zeros = {name: torch.zeros_like(x) for name, x in content["model"].items()}
    torch.save({**content, "step": 2, "model": zeros}, folder / "step-000002.pt")
    return folder / "step-000002.pt", folder


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def hears_signals():
    """Also where the tests were started under nohup, or in the background."""
    own = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def handlers():
    """Python's own signal handlers; afterwards those that were there before."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield own
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def plain_layout():
    """Pictures are drawn once, without the search for a layout, here and in what is forked: four times as
    fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.get_layout_engine", lambda figure: None)
        yield


@pytest.fixture(scope="session")
def clocks(tmp_path_factory):
    """{name: path} of 8-second clock clips: one for each of RATES (the sound at 16, 44.1 or 48 kHz), and two
    other containers, whose timestamps begin at 7.3 seconds."""
    folder = tmp_path_factory.mktemp("clocks")
    made = {}
    for (name, fps), rate in zip(RATES.items(), (48000, 16000, 44100, 48000)):
        made[name] = clock(folder / f"{name}.mp4", fps, rate=rate)
    for end in ("mkv", "ts"):
        late = {"output_ts_offset": "7.3"}
        made[end] = clock(folder / f"25.{end}", RATES["25"], rate=44100, options=late)
    return made


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with 8 seconds of the same numbered frames at 25 fps and 1 kHz tone: good.mp4, silent.mp4,
    sound.mp4, .wav and .flac; fast.mp4 is good.mp4 with its index in front."""
    folder = tmp_path_factory.mktemp("clips")
    frames = [numbered(n) for n in range(200)]
    wave = tone(1000, 8)
    write(folder / "good.mp4", frames, wave)
    write(folder / "fast.mp4", frames, wave, options={"movflags": "faststart"})
    write(folder / "silent.mp4", frames)
    write(folder / "sound.mp4", wave=wave)
    write(folder / "sound.wav", wave=wave, audio="pcm_s16le")
    write(folder / "sound.flac", wave=wave, audio="flac")
    return folder


def write_world(world, folder):
    """24 training and 16 test clips of a made-up world that scripts take for the whole one."""
    whole = dict(world.numbers)
    try:
        world.numbers.update(train=24, test=16)
        world.make(folder)
    finally:
        world.numbers.update(whole)
    (folder / "world.json").write_text(json.dumps(whole, sort_keys=True))
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return write_world(data.TOY_WORLD, tmp_path_factory.mktemp("world") / "toy")
