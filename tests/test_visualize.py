"""visualize.py: maps land on their patches, films keep sound and time, figures say what they show."""
import csv
import functools
import itertools
import json
import math
import shutil
from dataclasses import asdict, replace

import av
import numpy as np
import pytest
import torch
from conftest import RATES, ROOT, fails, last_row, numbered, read_number, tone, write
from test_probe import full_disk

import common
import data
import features
import run
import visualize

INPUTS = data.Inputs(seconds=2.0, frames=4, size=32, resize=40, n_mels=32, mel_mean=-30.0, mel_std=20.0)
VIDEO = dict(shape=(4, 32, 32), patch=(2, 8, 8))
AUDIO = dict(shape=(32, INPUTS.mel_frames), patch=(16, 16))     # of 201 columns
GRID = (2, 4, 4)
CPU = run.Process(torch.device("cpu"))
TITLES = {"deaf": "Sound alone", "cls": "Sees and hears", "plain": "A third one"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: folder}: random weights, of methods that no file of ours names: of sound alone, with CLS and
    projector, and without."""
    folders = {}
    for name, title in TITLES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        config = dict(size="nano", video=None if name == "deaf" else VIDEO, audio=AUDIO, cls=name == "cls")
        inputs = asdict(replace(INPUTS, frames=0) if name == "deaf" else INPUTS)
        widths = [48, 8] if name == "cls" else None
        torch.manual_seed(5)
        parts = torch.nn.ModuleDict({"teacher": common.ViT(**config)})
        if widths:
            parts["projector"] = common.mlp(64, widths)
        content = dict(method=dict(name=name, title=title, weights="teacher"), step=1234, inputs=inputs,
                       args=dict(seed=0, data="toy"), recipe={}, optimizer={}, encoder=config,
                       projector=widths, cross=None)
        torch.save({**content, "model": parts.state_dict()}, folders[name] / "latest.pt")
    return folders


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in their order; their files stay empty. In float32 on every machine."""
    caught = []
    monkeypatch.setattr(run, "start_process", lambda device, bf16: CPU)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **how: caught.append(self))
    return caught


def said(fig, *parts):
    """Whether the titles of a figure and of its columns say all parts, wherever their lines are broken."""
    titles = [part._suptitle.get_text() for part in (fig, *fig.subfigs) if part._suptitle]
    title = "".join("".join(titles).split())
    return all("".join(part.split()) in title for part in parts)


def words(what, folder, out, *more, toy=None):
    data_flags = ["--data", "toy", "--data-dir", str(toy)] if toy else []
    return [what, "--ckpt", str(folder), "--out", str(out), "--device", "cpu", "--workers", "0", *data_flags,
            *map(str, more)]


@pytest.mark.parametrize("cls, columns", [(False, 201), (True, 52)])
def test_attention_lands_on_the_cells_of_its_tokens(monkeypatch, cls, columns):
    """Planted: its own number for each token that is seen, plus what has mean 0 over those that look."""
    vit = common.ViT("nano", VIDEO, AUDIO, cls=cls)
    video, audio = torch.arange(32.0), torch.arange(2.0 * (columns // 16))
    planted = torch.full((2, 3, cls + 32 + len(audio), cls + 32 + len(audio)), math.nan)
    planted[:, :, cls + 32:, cls:cls + 32] = (audio - audio.mean())[:, None] + video
    planted[:, :, cls:cls + 32, cls + 32:] = (video - video.mean())[:, None] + audio
    monkeypatch.setattr(vit, "attention_weights", lambda video, audio, layer: planted * (layer == 2))
    clip = torch.zeros(2, 3, 4, 32, 32), torch.zeros(2, 1, 32, columns)
    seen, heard = visualize.cross_attention(vit, *clip, 2)
    torch.testing.assert_close(seen, video.view(GRID).expand(2, 3, *GRID))
    torch.testing.assert_close(heard, audio.view(2, -1).expand(2, 3, -1, -1))


@pytest.mark.parametrize("change, count", [
    ({}, 3), (dict(seconds=8.0), 1), (dict(video_seconds=1.0), 5),
    (dict(frame_rate=20.0, seconds=1.5, columns=60, interpolate=True), 2)])
def test_views_cover_the_whole_clip_and_show_the_seconds_that_they_name(tmp_path, monkeypatch, change, count):
    """Five seconds at ten frames a second, numbered; a tone from second 2.5 to 2.9."""
    clip = tmp_path / "long.mp4"
    wave = tone(1000, 5)
    wave[:40000] = wave[46400:] = 0
    write(clip, [numbered(n) for n in range(50)], wave, fps=10)
    inputs = replace(INPUTS, size=48, resize=48, n_mels=16, **change)
    views, spans = visualize.whole_clip(clip, inputs)
    assert len(views["video"]) == len(views["audio"]) == len(spans)
    assert count <= len(spans) <= count + 1             # AAC: 5.0x seconds
    covered = 0.0
    for ((sound, heard), (start, shown)), video, mel in zip(spans, views["video"], views["audio"]):
        stretch = 2 if inputs.frame_rate else 1         # 20 frames take two seconds
        assert shown == stretch * (inputs.video_seconds or inputs.seconds)
        assert heard == stretch * inputs.seconds
        assert 0 <= start <= covered + 1e-6
        assert sound <= start + 1e-6 and start + shown <= max(sound + heard, 5.05)
        covered = start + shown
        for i, frame in enumerate(visualize.picture_of(video)):
            assert read_number(255 * frame) == min(49, int(10 * (start + (i + 0.5) * shown / 4)))
        left, right, _, _ = visualize.mel_extent(inputs, mel.shape[-1], (sound, heard))
        loud = np.flatnonzero(mel[0].max(0).values > 0)                     # above -30 dB
        times = left + (loud + 0.5) * (right - left) / mel.shape[-1]
        begin, end = max(2.5, sound), min(2.9, sound + heard)
        if end > begin + 0.05:
            assert abs(times[0] - begin) < 0.07 and abs(times[-1] - end) < 0.07
    assert covered >= 5.0 - 1e-6
    monkeypatch.setattr(visualize, "LONGEST", 2)
    fails(visualize.whole_clip, clip, inputs, match="long.mp4: is too long; cut out a part of at most")


def read_film(path):
    """(times of the frames, frames (N, H, W, 3), wave (channels, samples), rate), from the clip's begin."""
    frames = []
    parts = []
    times = []
    heard = []
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in data.find_streams(container)] == ["h264", "aac"]
        origin = container.start_time / av.time_base
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time - origin)
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                heard.append(frame.time - origin)
                parts.append(frame.to_ndarray())
                rate = frame.sample_rate
    silence = max(0, round(heard[0] * rate))
    return np.array(times), np.stack(frames), np.pad(np.concatenate(parts, 1), ((0, 0), (silence, 0))), rate


def cells(square):
    """The brightness in the middles of 4 x 4 cells."""
    side = len(square) // 4
    middles = slice(side // 2 - 2, side // 2 + 3)
    return square[:4 * side, :4 * side].reshape(4, side, 4, side)[:, middles, :, middles].mean((1, 3))


LATE = dict(options={"output_ts_offset": "7.3", "max_interleave_delta": "1"})


@pytest.mark.parametrize("name, fps, size, more", [
    ("odd.mp4", 12, (61, 47), dict(pixels="yuv444p")), ("late.mkv", RATES["29.97"], (48, 64), LATE)])
def test_the_film_has_sound_and_time_of_its_clip_and_light_where_the_map_is(tmp_path, name, fps, size, more):
    """A grey clip flashes where the left or the right channel clicks. In the mkv the sound comes first."""
    wave = np.zeros((2, 132300))
    clicks = [(0, 0.4), (1, 1.3)]                       # channel, second
    for side, second in clicks:
        wave[side, round(second * 44100):][:441] = 0.9 * np.sin(np.arange(441))
    flashes = sorted(round(second * fps) for _, second in clicks)
    frames = np.full((math.ceil(3 * fps), *size, 3), 160, np.uint8)
    frames[flashes] = 250
    write(tmp_path / name, frames, wave, fps, 44100, **more)
    moments = np.array([0.25, 1.0, 1.75, 2.6])
    peaks = [(0, 0), (3, 1), (1, 2), (2, 3)]
    maps = np.zeros((2, 4, 4, 4), np.float32)
    for m, (row, column) in enumerate(peaks):
        maps[0, m, row, column] = maps[1, m, column, row] = 1
    film = tmp_path / "film.mp4"
    lit = [(moments, heat, 0.8) for heat in maps]
    visualize.write_film(tmp_path / name, film, lit, "a title\nof two lines")

    before, _, sound, rate = read_film(tmp_path / name)
    times, shown, wave, film_rate = read_film(film)
    np.testing.assert_allclose(times, before, atol=0.005)
    assert film_rate == 48000 and abs(wave.shape[1] / 48000 - sound.shape[1] / rate) < 0.1
    for side, second in clicks:
        begin, end = round((second - 0.05) * 48000), round((second + 0.06) * 48000)
        quiet = max(np.abs(wave[1 - side, begin:end]).max(), np.abs(wave[side, end:end + 9600]).max())
        assert np.abs(wave[side, begin:end]).max() > 0.4 > 4 * quiet
    h, w = (round(240 * side / min(size)) // 2 * 2 for side in size)
    assert shown.shape[2] == 3 * w and shown.shape[1] > h + 20
    assert shown[0, :-h].mean() > 200 and np.ptp(shown[0, :-h]) > 150       # the title, dark on white
    plain, *lit = (shown[:, -h:, k * w:(k + 1) * w].mean(-1) for k in range(3))
    assert np.flatnonzero(plain.mean((1, 2)) > 200).tolist() == flashes
    side = round(min(h, w) * 0.8)
    top, left = (h - side) // 2, (w - side) // 2
    for tile, order in zip(lit, (1, -1)):
        square = tile[:, top:top + side, left:left + side]
        shown_at = [np.abs(times - moment).argmin() for moment in moments]
        for frame, peak in zip(shown_at, peaks):
            light = cells(square[frame])
            assert light[peak[::order]] > 120 and np.sort(light, None)[-2] < 60
        between = cells(square[np.abs(times - 0.625).argmin()])     # in the middle of the first two moments
        assert all(60 < between[peak[::order]] < 110 for peak in peaks[:2])
        tile[:, top - 4:top + side + 4, left - 4:left + side + 4] = 0
        assert tile[shown_at].max() < 45                # what the encoder does not see


def test_the_film_is_lit_where_and_when_the_encoder_attends(runs, tmp_path, figures, monkeypatch, capsys):
    """The planted peak of each view and moment is in the film at its time; the figure says what it shows."""
    calls = []
    clip = tmp_path / "long.mp4"
    write(clip, np.full((44, 48, 64, 3), 180, np.uint8), tone(500, 4.4), fps=10)    # the last views overlap

    def planted(vit, video, audio, layer):
        calls.append(layer)
        seen, heard = torch.full((1, 2, *GRID), 0.01), torch.rand(1, 2, 2, 12)
        for t in range(2):
            seen[0, :, t, t + 1, (len(calls) - 1) % 4] = len(calls)     # view n: column n
        return seen, heard

    monkeypatch.setattr(visualize, "cross_attention", planted)
    visualize.main(words("attention", runs["plain"], tmp_path, "--clip", clip, "--layer", 2))
    out = [tmp_path / f"attention-long-block2.{end}" for end in ("png", "mp4")]
    assert capsys.readouterr().out.split() == list(map(str, out)) and calls == [2, 2, 2]
    assert set(tmp_path.iterdir()) == {clip, *out}
    fig, = figures
    assert said(fig, TITLES["plain"], "long.mp4", str(runs["plain"]), "step 1,234", "block 2")
    rows = np.reshape(fig.axes[:6], (2, 3))     # pictures of two moments and the sound; input, and lit
    shown = [float(ax.get_title().removesuffix(" s")) for ax in rows[0, :2]]
    assert shown == pytest.approx([2.75, 3.75], abs=0.05)
    assert all(row[-1].get_ylabel() == "Hz" for row in rows) and rows[1, -1].get_xlabel() == "seconds"
    assert {ax.get_ylabel() for ax in fig.axes[6:]} == {"log mel, normalised", "share of the largest"}
    assert rows[1, -1].get_xlim() == pytest.approx((2, 4), abs=0.02)
    lit = read_film(out[1])[1][:, -240:, 320:].mean(-1)[:, 24:216, 64:256]      # the crop of .8
    peaks = {5: (1, 0), 15: (2, 0), 25: (1, 1), 29: (1, 2), 35: (2, 1), 39: (2, 2)}     # ten frames a second
    assert {frame: np.unravel_index(cells(lit[frame]).argmax(), (4, 4)) for frame in peaks} == peaks
    monkeypatch.setattr(visualize, "write_film", lambda *given: open(tmp_path))
    argv = words("attention", runs["plain"], tmp_path, "--clip", clip)
    fails(visualize.main, argv, match="attention-long.mp4: the film could not be made")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("what", ["attention", "pca", "map"])
def test_a_full_disk_leaves_no_half_of_a_file(what, runs, toy, clips, tmp_path, monkeypatch, capsys):
    more = ["--clip", clips / "good.mp4"] if what == "attention" else []
    argv = words(what, runs["cls"], tmp_path, *more, toy=None if more else toy)
    with full_disk(500):
        fails(visualize.main, argv, match="cannot be written .*File too large.*; give another --out")
    assert not list(tmp_path.iterdir())
    if what == "attention":
        monkeypatch.setattr(visualize, "save", lambda *given: "")           # the film is the smaller one
        of_set = words(what, runs["cls"], tmp_path, "--clips", 1, toy=toy)
        for given in (argv, of_set):
            for size in (500, 20000):
                with full_disk(size):
                    fails(visualize.main, given, match="mp4: the film could not be made")
                assert not list(tmp_path.iterdir())


def test_the_patches_that_an_object_touches_equal_a_slow_loop():
    rng = np.random.default_rng(0)
    places = rng.uniform(-0.1, 1.1, (20, 2))
    times = rng.integers(20, size=(9, 2))
    places[[7, 8]] = np.nan                             # nothing there
    times[2] = [7, 8]
    got = visualize.touched(places, times, (9, 4, 5), 0.8)
    for t, i, j in np.ndindex(got.shape):
        top, left = 0.1 + 0.8 * i / 4, 0.1 + 0.8 * j / 5
        inside = [top <= y < top + 0.2 and left <= x < left + 0.16 for x, y in places[times[t]]]
        assert got[t, i, j] == any(inside)
    assert got.sum() >= 6 and not got[2].any()


def test_hits_equal_a_slow_loop_and_leave_out_moments_without_a_target():
    g = np.random.default_rng(0)
    heat, target = g.random((6, 3, 2, 4)), g.random((6, 3, 2, 4)) < 0.2
    target[0, 1] = target[4] = False
    places = [(n, t) for n, t in np.ndindex(6, 3) if target[n, t].any()]
    won = [target[place].flat[heat[place].argmax()] for place in places]
    assert visualize.hits(heat, target) == pytest.approx(100 * np.mean(won)) and 0 < np.mean(won) < 1
    assert math.isnan(visualize.hits(heat, target & False))


@pytest.mark.parametrize("change", [
    dict(video_seconds=0.5), dict(frame_rate=20.0, seconds=0.9, columns=60, interpolate=True)])
def test_the_toy_objects_are_looked_for_in_the_frames_that_the_encoder_sees(tmp_path, change):
    write(tmp_path / "clip.mp4", [numbered(n) for n in range(40)], tone(440, 4), fps=10)
    inputs = replace(INPUTS, size=48, resize=48, **change)
    listing = data.make_listing("folder", tmp_path, ["clip.mp4"], None, [])
    clips = data.Clips(listing, inputs, functools.partial(data.even_views, 1, inputs))
    frames = clips[0, 0]["video"][0].permute(1, 2, 3, 0).numpy()
    assert visualize.toy_frames(inputs).tolist() == [read_number(frame) for frame in frames]


def test_a_peak_on_the_object_counts_and_on_the_silent_one_does_not(runs, toy, tmp_path, monkeypatch, capsys):
    """The trained encoder's peak is planted on the sounding object, the untrained one's on the silent one."""
    truth = np.load(toy / "test" / "truth.npz")
    masks = {}
    peaks = {}
    for key in ("place", "silent_place"):               # of the middle two seconds, ten frames a second
        mask = [visualize.touched(place, [[12, 17], [22, 27]], GRID, 0.8) for place in truth[key]]
        masks[key] = np.reshape(mask, (16, 2, 16))
        peaks[key] = masks[key] & (masks[key].cumsum(2) == 1)           # the first patch of each moment
    mine = common.load_checkpoint(runs["cls"])["model"]["teacher.cls"]
    planted = {True: iter(peaks["place"]), False: iter(peaks["silent_place"])}

    def attend(vit, video, audio, layer):
        peak = np.reshape([next(planted[torch.equal(vit.cls, mine)]) for _ in video], (-1, 1, *GRID))
        return torch.rand(len(video), 2, *GRID) / 10 + torch.from_numpy(peak), None

    monkeypatch.setattr(visualize, "cross_attention", attend)
    visualize.main(words("attention", runs["cls"], tmp_path, toy=toy))
    row = last_row(tmp_path, "visualize.jsonl")
    percent = row["percent"]
    out = capsys.readouterr().out
    two = np.flatnonzero(truth["silent"])
    assert list(percent) == ["trained", "untrained", "same patch", "another clip's", "random patch"]
    assert all(f"{name:14s}" in out for name in percent) and "block 3" in out
    assert [row[key] for key in ("of two", "N", "layer", "step")] == [len(two), 16, 3, 1234]
    assert row["heads"]["trained"] == [100, 100] and row["heads"]["untrained"][0] < 60

    sounding = masks["place"]
    others = [(np.roll(peaks["place"], shift, 0) & sounding).any(2) for shift in range(1, 9)]
    best = sounding.mean(0).max(1)                      # of each moment
    assert percent["trained"]["sounding"] == percent["trained"]["sounding, of two"] == 100
    assert percent["untrained"]["silent, of two"] == 100
    overlap = 100 * (peaks["silent_place"] & sounding)[two].any(2).mean()
    assert percent["untrained"]["sounding, of two"] == pytest.approx(overlap) and overlap < 50
    assert percent["another clip's"]["sounding"] == pytest.approx(100 * np.mean(others))
    assert percent["same patch"]["sounding"] == pytest.approx(100 * best.mean())
    assert percent["random patch"]["sounding"] == pytest.approx(100 * sounding.mean())
    assert percent["random patch"]["silent, of two"] == pytest.approx(100 * masks["silent_place"][two].mean())


@pytest.mark.parametrize("n, d, count", [(50, 8, 3), (6, 20, 3), (30, 2, 3), (2, 5, 2)])
def test_principal_components_equal_an_svd_with_a_fixed_sign(n, d, count):
    x = np.random.default_rng(0).normal(size=(n, d)) * np.arange(1, d + 1) + 3
    y, share = visualize.principal(x, count)
    u, s, vh = np.linalg.svd(x - x.mean(0), full_matrices=False)
    k = min(count, n - 1, d)
    assert y.shape == (n, count) and share.shape == (count,) and np.abs(y[:, k:]).max(initial=0) < 1e-5
    for c in range(k):
        sign = 1 if vh[c].max() > -vh[c].min() else -1  # the largest weight is positive
        np.testing.assert_allclose(y[:, c], sign * u[:, c] * s[c], atol=1e-5)
    np.testing.assert_allclose(share[:k], (s ** 2 / (s ** 2).sum())[:k], atol=1e-6)


def test_colours_lie_in_0_to_1_and_keep_the_order():
    y = np.random.default_rng(0).normal(size=(500, 3)) * [1, 10, 0]
    y[0] = [1e4, -1e4, 0]                               # an outlier does not take the contrast
    rgb = visualize.to_rgb(y)
    assert rgb.min() == 0 and rgb.max() == 1 and rgb[0].tolist() == [1, 0, 0]
    assert (rgb[:, :2].std(0) > 0.2).all() and not rgb[:, 2].any()
    for c in (0, 1):
        assert (np.diff(rgb[np.argsort(y[:, c]), c]) >= 0).all() and np.mean((rgb[:, c] % 1) > 0) > 0.97


@pytest.mark.parametrize("method", ["deaf", "cls"])
def test_pca_draws_a_figure_for_each_modality(runs, toy, tmp_path, figures, method):
    classes = ["teal bell", "red odd"]
    visualize.main(words("pca", runs[method], tmp_path, "--clips", 2, "--classes", *classes, toy=toy))
    keys = ["audio-alone"] if method == "deaf" else ["video", "audio"]
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"visualize.jsonl", *(f"pca-toy-{key}.png" for key in keys)}
    encoder = common.load_encoder(runs[method])
    for key, fig in zip(keys, figures, strict=True):
        assert said(fig, TITLES[method], f"{key[:5]} tokens", "toy", str(runs[method]), "step 1,234")
        for block, name in zip(fig.subfigs[0].subfigs, classes, strict=True):
            tokens = []
            number = data.TOY_CLASSES.index(name)
            for i in (number, number + 8):
                clip = data.load_clip(toy / "test" / f"{i:05d}.mp4", encoder.inputs)
                tokens.append(encoder(**clip)[0][0][slice(32) if key == "video" else slice(-24, None)])
            y, share = visualize.principal(torch.cat(tokens).numpy())
            said_name, percents = block._suptitle.get_text().split(": ")
            percents = [float(part.split()[0]) for part in percents.split(", ")]
            assert said_name == name and percents == pytest.approx(100 * share, abs=0.51)
            axes = np.reshape(block.axes, (3, 2))
            for column, rgb in enumerate(np.split(visualize.to_rgb(y), 2)):
                images = [np.asarray(axes[row, column].images[0].get_array()) for row in (1, 2)]
                if key == "video":                      # moments side by side, 32 pixels and a gap of 2
                    images = np.stack(images)[:, 4::8]
                    images = np.stack([images[:, :, 4:32:8], images[:, :, 38:66:8]], 1)
                rgb = rgb.reshape(images[0].shape)
                np.testing.assert_allclose(images, [rgb, rgb[..., :1].repeat(3, -1)], atol=1e-4)
            seconds = f"seconds of the {'pictures' if key == 'video' else 'sound'}"
            assert [ax.get_xlabel() for ax in axes[-1]] == [seconds, seconds]
            assert key == "video" or all("Hz" in ax.get_ylabel() for ax in axes[:, 0])


def test_neighbours_of_the_same_label_equal_a_slow_loop():
    x = torch.randn(25, 3).numpy()
    labels = np.arange(25) % 3
    same = []
    for i in range(25):
        order = sorted(range(25), key=lambda j: sum((x[i] - x[j]) ** 2))
        same.append([labels[j] == labels[i] for j in order[1:]])
    slow = 100 * np.mean([row[:10] for row in same]), 100 * np.mean(same)
    assert visualize.neighbours(x, labels) == pytest.approx(slow)
    assert visualize.neighbours(x[:4], [0, 0, 0, 0])[0] == 100           # fewer than ten others


@pytest.mark.parametrize("method, flags, name", [
    ("deaf", "", "audio"), ("cls", "", "av"), ("plain", "--modality video --untrained", "video-untrained"),
    ("cls", "--pairs --embedding projected", "pairs-projected"),
    ("plain", "--classes families.csv", "av-families")])
def test_the_map_has_a_row_and_a_point_for_each_clip_and_modality(
        runs, toy, tmp_path, figures, monkeypatch, method, flags, name):
    monkeypatch.chdir(tmp_path)
    pairs = "--pairs" in flags
    group_of = {label: label for label in data.TOY_CLASSES}
    if "--classes" in flags:                            # of all classes but the first
        group_of = {label: "cold" if label[0] in "btvg" else "warm" for label in data.TOY_CLASSES[1:]}
        lines = [f"{family}, {label}\n" for label, family in group_of.items()]
        (tmp_path / "families.csv").write_text("# ours\n" + "".join(lines) + '"cold","a dog, barking"\n')
    visualize.main(words("map", runs[method], tmp_path, *flags.split(), toy=toy))
    header, *rows = csv.reader((tmp_path / f"map-toy-{name}.csv").read_text().splitlines())
    assert header == ["file", "class", "group", "modality", "tsne_1", "tsne_2", "pca_1", "pca_2", "ckpt"]
    assert {row.pop() for row in rows} == {str(runs[method])}
    assert (tmp_path / f"map-toy-{name}.png").is_file()
    encoder = common.load_encoder(runs[method], untrained="--untrained" in flags)
    z = []
    expected = []
    for m, i in itertools.product(["audio", "video"] if pairs else [name.split("-")[0]], range(16)):
        label = data.TOY_CLASSES[i % 8]
        if label in group_of:
            clip = data.load_clip(toy / "test" / f"{i:05d}.mp4", encoder.inputs)
            _, embedding = encoder(**features.pick(clip, m))
            z.append(encoder.projector(embedding) if "projected" in flags else embedding)
            expected.append([f"{i:05d}.mp4", label, group_of[label], m])
    assert [[row[0].split("/")[-1], *row[1:4]] for row in rows] == expected
    n = len(rows) // (1 + pairs)
    xy = np.array([row[4:] for row in rows], float)
    y, _ = visualize.principal(torch.cat(z).numpy(), 2)
    np.testing.assert_allclose(xy[:, 2:], y, atol=2e-3 * np.abs(y).max())

    fig, = figures
    assert said(fig, TITLES[method], f"{n} clips of toy", str(runs[method]))
    assert said(fig, "projected embedding" if "projected" in flags else "clip embedding")
    assert said(fig, "untrained" if "--untrained" in flags else "step 1,234")
    for ax, plane, unit, here in zip(fig.axes, ("t-SNE", "PCA"), ("(no unit)", "% of the variance"),
                                     np.split(xy, 2, 1)):
        assert ax.get_title() == plane and unit in ax.get_xlabel() and unit in ax.get_ylabel()
        joined = [line for line in ax.lines if line.get_marker() == "None"]
        points = [line for line in ax.lines if line not in joined and len(line.get_xdata())]
        drawn = np.concatenate([line.get_xydata() for line in points])
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(here.tolist()), atol=1e-4 * np.ptp(here))
        styles = {(line.get_marker(), line.get_color(), line.get_mfc()) for line in points}
        assert len(styles) == len(set(group_of.values())) * (1 + pairs)
        ends = [line.get_xydata() for line in joined]
        both = np.stack([here[:n], here[-n:]], 1) if pairs else np.empty((0, 2, 2))
        np.testing.assert_allclose(np.reshape(ends, (-1, 2, 2)), both, atol=1e-4 * np.ptp(here))
    row = last_row(tmp_path, "visualize.jsonl")
    assert [row[key] for key in ("N", "left_out", "step", "pairs")] == [n, 0, 1234, pairs]
    _, groups = np.unique([row[2] for row in rows[-n:]], return_inverse=True)
    close, _ = visualize.neighbours(xy[-n:, 2:], groups)
    assert row[f"{rows[-1][3]}, PCA"]["neighbours"] == pytest.approx(close, abs=1.5)    # two of 150, if tied


def read_map(path):
    """{ckpt: [the other fields of its rows]} of the csv of a map."""
    _, *rows = csv.reader(path.read_text().splitlines())
    found = {}
    for *row, ckpt in rows:
        found.setdefault(ckpt, []).append(row)
    return found


def rows_of(folder):
    return [json.loads(line) for line in (folder / "visualize.jsonl").read_text().splitlines()]


def test_a_file_of_families_says_which_clips_of_all_splits_are_shown_and_in_which_colours(
        runs, toy, tmp_path, figures, capsys):
    """Of the training and the test clips; a class that the set lacks is named; a clip's class counts, too."""
    families = {"teal bell": "cold", "red odd": "warm", "orange saw": "warm", "blue tremolo": "cold"}
    lines = [f"{family},{name}\n" for name, family in families.items()]
    (tmp_path / "f.csv").write_text("# ours\n" + "".join(lines) + 'cold,"a dog, barking"\n')
    more = ["--split", "all", "--classes", tmp_path / "f.csv", "--modality", "audio"]
    visualize.main(words("map", runs["plain"], tmp_path, *more, toy=toy))
    assert "f.csv: the set lacks 'a dog, barking'\n" in capsys.readouterr().out
    rows, = read_map(tmp_path / "map-toy-audio-all-f.csv").values()
    expected = []
    for split in ("train", "test"):
        listing = data.list_clips("toy", toy, split)
        for i in range(len(listing)):
            name = listing.classes[listing.clip_labels(i)[0]]
            if name in families:
                expected.append([listing.path(i), name, families[name], "audio"])
    assert [row[:4] for row in rows] == expected and len(rows) == 20
    for ax, columns in zip(figures[0].axes, ((4, 5), (6, 7))):
        colour = {}
        for line in ax.lines:
            for x, y in line.get_xydata():
                colour[np.float32(x), np.float32(y)] = line.get_color(), line.get_marker()
        shown = {}
        for row in rows:
            x, y = (np.float32(row[column]) for column in columns)
            shown.setdefault(row[2], set()).add(colour[x, y])
        assert all(len(styles) == 1 for styles in shown.values())
        keys = figures[0].legends[0]
        legend = {text.get_text(): {(line.get_color(), line.get_marker())}
                  for text, line in zip(keys.get_texts(), keys.legend_handles)}
        assert shown == legend and len(set.union(*shown.values())) == 2
    row, = rows_of(tmp_path)
    flat = np.array([row[6:8] for row in rows], float)
    for column, found in ((2, row), (1, row["by class"])):
        _, labels = np.unique([row[column] for row in rows], return_inverse=True)
        close, chance = visualize.neighbours(flat, labels)
        assert found["audio, PCA"]["neighbours"] == pytest.approx(close, abs=1.5)
        assert found["audio, PCA"]["chance"] == pytest.approx(chance)
    assert row["split"] == "all" and row["N"] == len(rows)


def test_the_families_of_vggsound_are_six_of_ten_classes_each_and_called_ours():
    path = ROOT / "datasets" / "vggsound_families.csv"
    assert path.read_text().startswith("# Ours: ")
    rows = [tuple(row) for row in data.read_rows(path)]
    names = [name for _, name in rows]
    assert len(set(names)) == len(rows) == 60
    families = [family for family, _ in rows]
    assert {family: families.count(family) for family in families} == dict.fromkeys(families, 10)
    assert len(set(families)) == 6
    assert len(visualize.read_families(path, names)) == 60


def side_by_side(what, runs, tmp_path, *more, toy=None):
    """Draw two checkpoints alone, into the folders cls and plain, and together, into both."""
    for name in ("cls", "plain"):
        visualize.main(words(what, runs[name], tmp_path / name, *more, toy=toy))
    argv = words(what, runs["cls"], tmp_path / "both", *more, toy=toy)
    argv.insert(3, str(runs["plain"]))
    visualize.main(argv)


def check_columns(fig, runs):
    """A column for each checkpoint, as large as the other, named by method and step."""
    left, right = fig.subfigs
    assert left.bbox.width == right.bbox.width and left.bbox.height == right.bbox.height
    for column, name in ((left, "cls"), (right, "plain")):
        assert said(column, TITLES[name], "step 1,234", str(runs[name]))
    return left, right


def test_maps_side_by_side_have_the_numbers_that_each_has_alone_and_one_scale(runs, toy, tmp_path, figures):
    side_by_side("map", runs, tmp_path, toy=toy)
    both = read_map(tmp_path / "both" / "map-toy-av-of-2.csv")
    assert list(both) == [str(runs["cls"]), str(runs["plain"])]
    for name, row in zip(("cls", "plain"), rows_of(tmp_path / "both"), strict=True):
        assert both[str(runs[name])] == read_map(tmp_path / name / "map-toy-av.csv")[str(runs[name])]
        assert row == last_row(tmp_path / name, "visualize.jsonl")
    columns = check_columns(figures[2], runs)
    for alone, column in zip(figures, columns):
        for ax, drawn in zip(alone.axes, column.axes, strict=True):
            assert ax.get_title() == drawn.get_title()
            for line, other in zip(ax.lines, drawn.lines, strict=True):
                np.testing.assert_array_equal(line.get_xydata(), other.get_xydata())
    for one, other in zip(*(column.axes for column in columns)):
        assert one.get_xlim() == other.get_xlim() and one.get_ylim() == other.get_ylim()
    spread = [column.axes[1].dataLim.width for column in columns]
    left, right = columns[0].axes[1].get_xlim()
    assert right - left >= max(spread) > min(spread)


def test_what_one_checkpoint_cannot_read_is_drawn_of_none(runs, toy, tmp_path, figures, monkeypatch):
    whole = visualize.embed_clips

    def embed(encoder, *given):
        found = whole(encoder, *given)
        del found[3 if encoder.method["name"] == "cls" else 7]
        return found

    monkeypatch.setattr(visualize, "embed_clips", embed)
    visualize.main(["map", "--ckpt", str(runs["cls"]), *words("map", runs["plain"], tmp_path, toy=toy)[2:]])
    left = [f"{i:05d}.mp4" for i in range(16) if i not in (3, 7)]
    for rows in read_map(tmp_path / "map-toy-av-of-2.csv").values():
        assert [row[0][-9:] for row in rows] == left
    assert [(row["N"], row["left_out"]) for row in rows_of(tmp_path)] == [(14, 2), (14, 2)]


def images_of(column):
    """What the axes of a part of a figure show."""
    return [np.asarray(image.get_array()) for ax in column.axes for image in ax.images]


def test_pca_side_by_side_has_the_colours_and_the_variance_that_each_has_alone(runs, toy, tmp_path, figures):
    side_by_side("pca", runs, tmp_path, "--clips", 2, "--classes", "red odd", toy=toy)
    assert len(list((tmp_path / "both").glob("pca-toy-*-of-2.png"))) == 2
    for key, fig in enumerate(figures[4:]):
        for n, (name, column) in enumerate(zip(("cls", "plain"), check_columns(fig, runs))):
            alone = images_of(figures[2 * n + key])
            for one, other in zip(alone, images_of(column.subfigs[0]), strict=True):
                np.testing.assert_array_equal(one, other)
            assert rows_of(tmp_path / "both")[2 * key + n] == rows_of(tmp_path / name)[key]
            assert len(rows_of(tmp_path / name)[key]["variance"]["red odd"]) == 3


def test_the_peaks_of_two_checkpoints_are_a_row_each_as_alone(runs, toy, tmp_path):
    argv = words("attention", runs["plain"], tmp_path, toy=toy)
    visualize.main(argv)
    visualize.main(["attention", "--ckpt", str(runs["cls"]), *argv[2:]])
    alone, first, second = rows_of(tmp_path)
    assert first["ckpt"] == str(runs["cls"]) and first["heads"] != second["heads"]
    assert {**second, "seconds": 0} == {**alone, "seconds": 0}


def test_attention_side_by_side_shows_what_each_shows_alone_and_films_one_beside_the_other(
        runs, tmp_path, figures, monkeypatch):
    """Planted: one encoder looks at the second patch of the first row, the other one at the last of all."""
    def planted(vit, video, audio, layer):
        seen = torch.full((1, 2, *GRID), 0.01)
        seen[:, :, :, *((0, 1) if vit.cls is not None else (3, 3))] = 1
        return seen, torch.rand(1, 2, 2, 12)

    monkeypatch.setattr(visualize, "cross_attention", planted)
    clip = tmp_path / "good.mp4"
    write(clip, np.full((20, 48, 64, 3), 180, np.uint8), tone(500, 2), fps=10)
    side_by_side("attention", runs, tmp_path, "--clip", clip)
    columns = check_columns(figures[2], runs)
    for alone, column in zip(figures, columns):
        shown = [images_of(part)[:5] for part in (alone, column)]           # frames, mel, lit frames
        for one, other in zip(*shown, strict=True):
            np.testing.assert_array_equal(one, other)
    film = read_film(tmp_path / "both" / "attention-good-of-2.mp4")[1][:, -240:].mean(-1)
    assert film.shape[2] == 3 * 320
    for tile, peak in zip(np.split(film[10], 3, 1)[1:], ((0, 1), (3, 3))):
        assert np.unravel_index(cells(tile[24:216, 64:256]).argmax(), (4, 4)) == peak


def grey(path, brightness=90, size=(48, 64), seconds=1, **more):
    """A clip of one brightness and one tone, ten frames a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((10 * seconds, *size, 3), brightness, np.uint8)
    return write(path, frames, tone(400, seconds), fps=10, **more)


def test_the_clips_of_a_set_are_drawn_as_the_same_files_alone_under_names_of_their_own(
        runs, tmp_path, figures):
    """Two of the three clips have the same stem, and the name of one is no UTF-8. Titles say the folder."""
    for n, file in enumerate(("a b/0.mp4", "a_b/0.mp4", "c/d\udcff.1.mkv")):
        made = grey(tmp_path / f"made{file[-4:]}", 60 * n + 60)
        (tmp_path / "test" / file).parent.mkdir(parents=True)
        made.rename(tmp_path / "test" / file)
    more = ["--layer", 1, "--untrained"]
    where = ["--data", "folder", "--data-dir", tmp_path]
    visualize.main(words("attention", runs["cls"], tmp_path / "set", *where, *more))
    names = ["0-0", "1-0", "2-d_1"]
    names = [f"attention-folder-{name}-block1-untrained" for name in names]
    written = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert written == sorted(f"{name}.{end}" for name in names for end in ("png", "mp4"))
    listing = data.list_clips("folder", tmp_path, "test")
    for n, name in enumerate(names):
        out = tmp_path / str(n)
        visualize.main(words("attention", runs["cls"], out, "--clip", listing.path(n), *more))
        title = " ".join(figures[n]._suptitle.get_text().split())           # without the breaks of its lines
        assert title.endswith(f", {listing.file(n)}".replace("\udcff", "?"))
        for one, other in zip(images_of(figures[n]), images_of(figures[3 + n]), strict=True):
            np.testing.assert_array_equal(one, other)
        film, = out.glob("*.mp4")
        for one, other in zip(read_film(tmp_path / "set" / f"{name}.mp4"), read_film(film), strict=True):
            if np.ndim(one) == 4:                           # without the text above the pictures
                one = one[:, -192:]
                other = other[:, -192:]
            np.testing.assert_allclose(one, other, atol=3)      # x264 does not repeat each bit
    assert not np.array_equal(images_of(figures[0])[0], images_of(figures[1])[0])


def drawn_by(monkeypatch, argv):
    """(paths, names) of the clips that a command draws."""
    calls = []
    monkeypatch.setattr(visualize, "attention_of_clip", lambda *given: calls.append(map(str, given[3:5])))
    visualize.main(argv)
    return map(list, zip(*calls))


@pytest.mark.parametrize("flags, classes, asked", [
    ("--clips 1", None, (1, 0)), ("--classes", ["teal bell", "red odd"], (1, 0)),
    ("--seed 7 --clips 1 --classes", ["red odd", "teal bell"], (1, 7))])
def test_the_clips_drawn_of_the_toy_are_those_of_choose_clips(
        runs, toy, tmp_path, monkeypatch, flags, classes, asked):
    listing = data.list_clips("toy", toy, "test")
    argv = words("attention", runs["plain"], tmp_path, *flags.split(), *classes or (), toy=toy)
    paths, names = drawn_by(monkeypatch, argv)
    chosen = itertools.chain(*visualize.choose_clips(listing, classes, *asked).values())
    assert paths == [listing.path(i) for i in chosen]
    assert names == [f"toy-{int(path[-9:-4])}-{path[-9:-4]}" for path in paths]


@pytest.mark.parametrize("labels, expected", [([[0, 1], [1], [0, 2], [], [2]], "acbe"), (None, "abcde")])
def test_a_clip_of_several_classes_is_drawn_once_and_those_of_a_set_without_classes_too(
        runs, tmp_path, monkeypatch, labels, expected):
    files = [f"{letter}.mp4" for letter in "abcde"]
    listing = data.make_listing("audioset", tmp_path, files, labels, "xyz" if labels else "", multilabel=True)
    monkeypatch.setattr(data, "list_clips", lambda *given: listing)
    argv = words("attention", runs["plain"], tmp_path, "--data", "audioset", "--clips", 9)
    _, names = drawn_by(monkeypatch, argv)
    assert names == [f"audioset-{'abcde'.index(letter)}-{letter}" for letter in expected]


def test_clips_of_a_set_that_allow_of_no_attention_are_named_and_the_others_drawn(
        runs, tmp_path, figures, monkeypatch, capsys):
    """A text, three seconds where two are too long, pictures or sound alone, pictures of two sizes; one that
    is whole."""
    monkeypatch.setattr(visualize, "LONGEST", 2)
    folder = tmp_path / "set"
    whole = grey(folder / "whole.mp4")
    (folder / "broken.mp4").write_text("no clip")
    grey(folder / "long.mp4", seconds=3)
    write(folder / "silent.mp4", [numbered(n) for n in range(10)], fps=10)
    write(folder / "sound.mp4", wave=tone(400, 1))
    parts = []
    for n, size in enumerate(((48, 64), (64, 48))):
        part = grey(tmp_path / "part.ts", size=size, options={"output_ts_offset": str(n)})
        parts.append(part.read_bytes())
    (folder / "turned.ts").write_bytes(b"".join(parts))
    out = tmp_path / "out"
    argv = words("attention", runs["plain"], out, "--data", "folder", "--data-dir", folder, "--clips", 9)
    visualize.main(argv)
    lines = capsys.readouterr().out.splitlines()
    drawn = [out / f"attention-folder-{name}" for name in ("4-turned.png", "5-whole.png", "5-whole.mp4")]
    bad = f"bad clip: {folder}"
    expected = [f"{bad}/broken.mp4: does not decode", f"{bad}/long.mp4: is too long; cut out a part",
                f"{bad}/silent.mp4: has no sound", f"{bad}/sound.mp4: has no picture", str(drawn[0]),
                f"bad clip: {drawn[0].with_suffix('.mp4')}: the film could not be made", *map(str, drawn[1:])]
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
    assert set(out.iterdir()) == set(drawn)
    whole.unlink()
    assert "none of the clips drawn can be shown" in fails(visualize.main, argv)


def test_curves_of_several_runs_are_named_and_told_apart_without_colour(runs, tmp_path, figures):
    folders = [tmp_path / name for name in "abc"]
    logs = {"loss": 1.0, "loss/a": 1.0, "know_nothing/a": 2.0}, {"loss": 3.0, "sigreg": 4.0}, {"loss": 1.0}
    for folder, log in zip(folders, logs):
        folder.mkdir()
        rows = [json.dumps({"step": 10 * n, **log}) for n in range(4)]
        odd = '{"step": 0, "loss": null, "name": "a", "sigreg": [1]}\n[]\n{"loss": 1}\n'
        (folder / "log.jsonl").write_text(odd + "\n".join(rows) + "\n" + odd.split("\n", 1)[1])
    shutil.copy(runs["plain"] / "latest.pt", folders[0])
    visualize.main(["curves", *map(str, folders)])
    visualize.main(["curves", str(folders[0]), "--out", str(tmp_path / "new")])
    assert (tmp_path / "a" / "curves-of-3.png").is_file() and (tmp_path / "new" / "curves.png").is_file()
    nothing = "; thin and dotted: the loss of a predictor that knows nothing"
    first = f"{TITLES['plain']}, toy, {folders[0]}, step 31"
    assert [fig._suptitle.get_text() for fig in figures] == ["3 runs" + nothing, first + nothing]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == [first, *(f"{folder}, step 31" for folder in folders[1:])]
    axes = {ax.get_title(): ax for ax in figures[0].axes if ax.lines}
    assert set(axes) == {"loss", "loss/a", "sigreg"}
    assert [line.get_ydata()[0] for line in axes["loss"].lines] == [1, 3, 1]
    assert len({line.get_marker() for line in axes["loss"].lines}) == 3


def test_curves_draw_what_probes_and_retrieval_found_of_the_trained_encoder_over_the_steps(
        tmp_path, figures, capsys):
    log = [json.dumps({"step": step, "loss": 1.0}) for step in range(40)]
    (tmp_path / "log.jsonl").write_text("\n".join(log))
    probed = dict(data="toy", probe="linear", head="regression", modality="av", tested="av", baseline=None,
                  metric="top-1")
    found = [dict(step=40, value=9.0), dict(step=40, value=60.0), dict(step=20, value=70.0),
             dict(step=20, value=1.0, baseline="untrained"), dict(step=20, value=2.0, baseline="raw"),
             dict(step=20, value=50.0, tested="audio"), dict(step=20, value=33.0, clips=80),
             dict(step=60, value=99.0),                                # of a longer run before
             dict(step=30, value=None), dict(step="30", value=3.0), dict(step=30, value=math.nan)]
    rows = [json.dumps({**probed, **row}) for row in found]
    pixels = json.dumps(dict(step=30, probe="pixels", data="toy", baseline=None, hidden={"audio": {}}))
    (tmp_path / "probe.jsonl").write_text("\n".join([*rows, pixels, "[]", '{"step": 30, "val']))
    ways = {"A->V": {"R@1": 1.0, "R@10": 20.0}, "V->A": {"R@1": 2.0, "R@10": 30.0}}
    of_all = dict(data="toy", embedding="encoder", N=256, **ways)
    searched = [dict(step=20, untrained=False, **of_all), dict(step=10, untrained=True, **of_all)]
    (tmp_path / "retrieval.jsonl").write_text("\n".join(map(json.dumps, searched)))
    visualize.main(["curves", str(tmp_path)])
    lines = {" ".join(ax.get_title().split()): ax.lines[0] for ax in figures[0].axes if ax.lines}
    assert {title: line.get_xydata().tolist() for title, line in lines.items()} == {
        "loss": [[step, 1] for step in range(40)],
        "linear regression: av, toy, top-1, %": [[20, 70], [40, 60]],
        "linear regression: audio of av, toy, top-1, %": [[20, 50]],
        "linear regression: av, toy, clips 80, top-1, %": [[20, 33]],
        "retrieval: A->V, toy, encoder, R@10 of 256, %": [[20, 20]],
        "retrieval: V->A, toy, encoder, R@10 of 256, %": [[20, 30]]}
    assert [title for title, line in lines.items() if line.get_marker() == "None"] == ["loss"]
    assert "probe.jsonl: 5 of its 14 lines are no rows of a log and left out" in capsys.readouterr().out


def test_clips_that_lack_a_stream_are_named_and_the_others_in_line(runs, tmp_path, capsys):
    encoder = common.load_encoder(runs["cls"])
    for n, has in enumerate(("av", "v", "a", "av", "av", "a")):
        frames = [numbered(k) for k in range(n, 30)] if "v" in has else None
        write(tmp_path / f"{n}.mp4", frames, tone(440, 3) * (n + 1) / 8 if "a" in has else None, fps=10)
    (tmp_path / "6.mp4").write_text("no clip")
    listing = data.make_listing("folder", tmp_path, [f"{n}.mp4" for n in range(7)], None, [])

    def encode(clips):
        found = {}
        for index, given, outputs in features.encode_clips(
                encoder, listing.subset(clips), INPUTS, ["av", "audio"], 2, CPU, 0, batch=4):
            parts = [*given.values(), *itertools.chain(*outputs.values())]      # each (B views, ...)
            for row, i in enumerate(index.tolist()):
                found[clips[i]] = [part.unflatten(0, (-1, 2))[row] for part in parts]
        return found

    together = encode(range(7))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad clip: ")]
    assert sorted(line.split("/")[-1][0] for line in lines) == list("1256") and list(together) == [0, 3, 4]
    for i, parts in together.items():
        torch.testing.assert_close(parts, encode([i])[i], atol=1e-4, rtol=1e-4)


REFUSED = """
attention plain --clip CLIPS/silent.mp4 | silent.mp4: has no sound, so there is no attention between the two
attention plain --clip CLIPS/sound.wav | sound.wav: has no picture
attention plain --clip CLIPS/none.mp4 | none.mp4: there is no such file
attention deaf CLIP | this deaf encoder takes one modality only
attention plain CLIP WORLD | give either --clip FILE, or --data SET
attention plain | give either --clip FILE, or --data SET
attention plain WORLD --untrained | --untrained has no effect without --clips, since --data toy alone has both
attention plain WORLD --heads each | --heads has no effect without --clips, since --data toy alone has
attention plain WORLD --seed 0 | --seed has no effect without --clips, since --data toy alone measures all
attention plain CLIP --data-dir TOY | --data-dir has no effect without --data
attention plain CLIP --clips 1 | --clips has no effect without --data
attention plain CLIP --classes a | --classes has no effect without --data
attention plain CLIP --seed 0 | --seed has no effect without --data
attention plain WORLD --clips 0 | --clips 0 is out of range: from 1 to
attention plain WORLD --clips 1 --seed -1 | --seed -1 is out of range
attention plain WORLD --clips 1 --layer 4 | --layer 4 is out of range: from -1 to 3
attention plain WORLD --classes hmm | --classes hmm: toy has no clip of such a class; it has red odd, orange
attention plain --data folder --data-dir CLIPS --classes a | --classes: these clips have no classes
attention plain --data esc50 --data-dir TOY | --data esc50 has no pictures; attention between the two needs
attention plain --data ssv2 --data-dir TOY | --data ssv2 has no sound; attention between the two needs both
attention plain --data vggsound | --data vggsound needs --data-dir
attention plain --data hmm | --data hmm: not a data set; one of toy, toy-still
attention deaf WORLD --clips 1 | this deaf encoder takes one modality only
attention plain CLIP --layer 4 | --layer 4 is out of range: from -1 to 3
attention plain CLIP --out TOY/world.json/x | cannot be made
pca plain WORLD --classes teal hmm | --classes teal: toy has no clip of such a class; it has red odd, orange
map plain WORLD --embedding projected | has no projector
map deaf WORLD --pairs | --pairs needs an encoder and a set with both sound and pictures
map plain --data esc50 --pairs | --data esc50 has no pictures; --pairs needs both
map plain WORLD --pairs --modality audio | leave --modality out
map plain WORLD --classes NONE | the set has none of its classes: 'a dog', 'a cat, meowing'; spell them as the
map plain WORLD --classes UNQUOTED | 'animals, a cat, meowing' is not family,class; put a name with a
map plain WORLD --classes TWICE | has 'red odd' in two families; give it one
map plain WORLD --classes EMPTY | empty.csv: the list is empty
map plain WORLD --classes TOY/none.csv | none.csv: there is no such file; give a csv of family,class
map plain WORLD --classes FEW | toy: 4 clips of the classes of --classes; a map needs at least 5
map plain WORLD --clips 4 | toy: 4 clips; a map needs at least 5
map plain,deaf WORLD | these encoders take av or audio; give a --modality that all of them take
map plain,deaf WORLD --pairs | --pairs needs an encoder and a set with both
pca plain,deaf WORLD --modality av | deaf takes no video
attention plain,deaf CLIP | this deaf encoder takes one modality only
attention plain CLIP --layer -2 | --layer -2 is out of range: from -1 to 3
pca plain WORLD --clips -1 | --clips -1 is out of range
pca plain WORLD --clips 99999999999 | --clips 99999999999 is out of range
map plain WORLD --seed -1 | --seed -1 is out of range
map plain WORLD --out EMPTY | empty.csv: cannot be made
attention broken CLIP | good.mp4: what the encoder says of this clip is no finite number
attention broken WORLD --clips 1 | .mp4: what the encoder says of this clip is no finite number
attention broken WORLD | 00000.mp4: what the encoder says of this clip is no finite number
pca broken WORLD | .mp4: what the encoder says of this clip is no finite number
map broken WORLD | 00000.mp4: what the encoder says of this clip is no finite number
map broken-projector WORLD --embedding projected | 00000.mp4: what the encoder says of this clip is no finite
curves plain | has no log.jsonl with a row in it
curves LONG | has no log.jsonl with a row in it""".strip().splitlines()


def break_weights(run_folder, folder, which):
    """A copy of a checkpoint with weights too large to compute with. Returns its folder."""
    content = common.load_checkpoint(run_folder)
    name = next(name for name in content["model"] if name.startswith(which) and name.endswith("weight"))
    content["model"][name][:] = 3e38
    (folder / "broken").mkdir()
    torch.save(content, folder / "broken" / "latest.pt")
    return folder / "broken"


FILES = {
    "NONE": "animals,a dog\nanimals,'a cat, meowing'\n".replace("'", '"'),
    "UNQUOTED": "warm,red odd\nanimals,a cat, meowing\n",
    "TWICE": "warm,red odd\ncold,red odd\n",
    "EMPTY": "# nothing yet\n",
    "FEW": "warm,red odd\nwarm,orange saw\n"}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_ends_in_a_sentence_and_writes_nothing(runs, toy, clips, tmp_path, line):
    line, sentence = line.split(" | ")
    for name, text in FILES.items():
        (tmp_path / f"{name.lower()}.csv").write_text(text)
        line = line.replace(name, str(tmp_path / f"{name.lower()}.csv"))
    for name, value in (("CLIP ", "--clip CLIPS/good.mp4 "), ("WORLD", "--data toy --data-dir TOY"),
                        ("CLIPS", clips), ("TOY", toy)):
        line = f"{line} ".replace(name, str(value))
    what, method, *more = line.split()
    if method.startswith("broken"):
        which = "projector" if "projector" in method else "teacher"
        runs = {**runs, method: break_weights(runs["cls"], tmp_path, which)}
    folders = [str(runs.get(name, 300 * "x")) for name in method.split(",")]
    argv = ["curves", *folders] if what == "curves" else [what, "--ckpt", *folders, "--workers", "0", *more]
    there = [sorted(folder.rglob("*")) for folder in (*runs.values(), tmp_path, clips, toy)]
    assert sentence in fails(visualize.main, argv)
    assert there == [sorted(folder.rglob("*")) for folder in (*runs.values(), tmp_path, clips, toy)]
