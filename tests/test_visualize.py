"""visualize.py: the weights are the model's own, maps land on their patches, films keep sound and time, figures say what they show."""
import csv, functools, itertools, json, math, signal, sys
from dataclasses import asdict, replace

import common, data, probe, visualize
from conftest import RATES, ROOT, command, numbered, read_number, tone, write

import av
import numpy as np
import pytest
import torch

INPUTS = data.Inputs(seconds=2.0, frames=4, size=32, resize=40, n_mels=32, mel_mean=-30.0, mel_std=20.0)     # a mel of 201 columns
VIDEO, AUDIO = dict(shape=(4, 32, 32), patch=(2, 8, 8)), dict(shape=(32, INPUTS.mel_frames), patch=(16, 16))
GRID, CPU = (2, 4, 4), common.Process(torch.device("cpu"))
CLICKS = ((0.4, 2.2), (1.3,))                           # of the left channel, of the right one


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{method: folder}: checkpoints of random weights: A-JEPA's of sound alone, AV-JEPA's with CLS and projector, MJEPA's without."""
    folders, both = {}, dict(size="nano", video=VIDEO, audio=AUDIO)
    for method, config, widths in (("ajepa", both | {"video": None}, None), ("avjepa_lejepa", both | {"cls": True}, [48, 8]),
                                   ("mjepa", both, None)):
        folders[method] = tmp_path_factory.mktemp(method)
        torch.manual_seed(5)
        parts = {"target_encoder": common.ViT(**config), **({"projector": common.mlp(64, widths)} if widths else {})}
        common.save_checkpoint(
            folders[method] / "latest.pt", method=method, step=1234, args=dict(seed=0, data="toy"), encoder=config, projector=widths,
            inputs=asdict(INPUTS if config["video"] else replace(INPUTS, frames=0)), weights="target_encoder",
            model={f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()})
    return folders


@pytest.fixture
def figures(monkeypatch):
    """What would be written as a picture, by the name of its file; the files themselves are stubs. In float32 on every machine."""
    monkeypatch.setattr(common, "start_process", lambda device: CPU)
    caught, plain = {}, visualize.write
    monkeypatch.setattr(visualize.plt.Figure, "savefig", lambda self, file, **how: caught.update(now=self) or file.write(b"picture"))

    def catch(args, name, fill):
        out = plain(args, name, fill)
        caught[name] = caught.pop("now", None)
        return out

    monkeypatch.setattr(visualize, "write", catch)
    return caught


def said(fig, *parts):
    return all("".join(part.split()) in "".join(fig._suptitle.get_text().split()) for part in parts)     # its lines are broken


def words(what, run, out, *more, toy=None):
    return [what, "--ckpt", str(run), "--out", str(out), "--device", "cpu", "--workers", "0",
            *(["--data", "toy", "--data-dir", str(toy)] if toy else []), *map(str, more)]


@pytest.mark.parametrize("cls, columns", [(True, 201), (False, 201), (True, 52)])
def test_attention_lands_on_the_cells_of_its_tokens(monkeypatch, cls, columns):
    vit, t, asked = common.ViT("nano", VIDEO, AUDIO, cls=cls), columns // 16, []
    n = cls + 32 + 2 * t
    planted = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(vit, "attention_weights", lambda v, a, layer: asked.append(layer) or planted)
    seen, heard = visualize.cross_attention(vit, torch.zeros(2, 3, 4, 32, 32), torch.zeros(2, 1, 32, columns), 2)
    assert asked == [2] and seen.shape == (2, 3, *GRID) and heard.shape == (2, 3, 2, t)
    for b, h in np.ndindex(2, 3):
        for i, j, k in np.ndindex(*GRID):
            mean = sum(planted[b, h, q, cls + 16 * i + 4 * j + k].item() for q in range(cls + 32, n)) / (2 * t)
            assert seen[b, h, i, j, k].item() == pytest.approx(mean, rel=1e-4)
        for f, k in np.ndindex(2, t):
            mean = sum(planted[b, h, q, cls + 32 + t * f + k].item() for q in range(cls, cls + 32)) / 32
            assert heard[b, h, f, k].item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("change, count", [({}, 3), (dict(seconds=8.0), 1), (dict(video_seconds=1.0), 5), (dict(seconds=5.0), 1),
                                           (dict(frame_rate=20.0, seconds=1.5, columns=60, interpolate=True), 2)])
def test_views_cover_the_whole_clip_and_show_the_seconds_that_they_name(tmp_path, monkeypatch, change, count):
    """Five seconds at ten frames a second, numbered; a tone from second 2.5 to 2.9."""
    wave, long_clip = tone(1000, 5) * ((np.arange(80000) >= 40000) & (np.arange(80000) < 46400)), tmp_path / "long.mp4"
    write(long_clip, [numbered(n) for n in range(50)], wave, fps=10)
    inputs = replace(INPUTS, size=48, resize=48, n_mels=16, **change)
    views, spans = visualize.cover(long_clip, inputs)
    stretch = 2 if inputs.frame_rate else 1             # 20 frames take two seconds
    length, covered, end = (inputs.video_seconds or inputs.seconds) * stretch, 0.0, max(sum(pictures) for _, pictures in spans)
    assert len(views["video"]) == len(views["audio"]) == len(spans) and count <= len(spans) <= count + 1        # AAC: 5.0x seconds
    for (sound, pictures), video, mel in zip(spans, views["video"], views["audio"]):
        assert pictures[1] == pytest.approx(length) and sound[1] == pytest.approx(inputs.seconds * stretch)
        assert 0 <= pictures[0] <= covered + 1e-6               # and the sound around them, as far as there is any
        assert sound[0] == pytest.approx(max(0, min(pictures[0] + (length - sound[1]) / 2, end - sound[1])), abs=1e-5)
        covered = max(covered, sum(pictures))
        for i, frame in enumerate(visualize.picture_of(video)):
            assert read_number(255 * frame) == min(49, int(10 * (pictures[0] + (i + 0.5) * length / 4)))
        left, right, _, _ = visualize.mel_extent(inputs, mel.shape[-1], sound)
        loud = np.flatnonzero((mel[0].max(0).values > 0).numpy())                                           # above -30 dB
        times = left + (loud + 0.5) * (right - left) / mel.shape[-1]
        begin, stop = max(2.5, sound[0]), min(2.9, sum(sound))
        assert abs(times[0] - begin) < 0.07 and abs(times[-1] - stop) < 0.07 if len(times) else stop < begin + 0.05
    assert covered >= 5.0 - 1e-6
    monkeypatch.setattr(visualize, "LONGEST", 2)
    with pytest.raises(common.UserError, match=r"long.mp4: is too long; cut out a part of at most"):
        visualize.cover(long_clip, inputs)


def read_film(path):
    """(times of the frames, frames (N, H, W, 3), wave (channels, samples), rate, seconds), the times from the clip's begin."""
    with av.open(str(path)) as container:
        assert [s.codec_context.name for s in data.find_streams(container)] == ["h264", "aac"]
        origin, times, frames, parts, begin = container.start_time / av.time_base, [], [], [], None
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                times.append(frame.time - origin), frames.append(frame.to_ndarray(format="rgb24"))
            else:
                begin, rate = frame.time - origin if begin is None else begin, frame.sample_rate
                parts.append(frame.to_ndarray())
        wave = np.concatenate(parts, 1)
        return np.array(times), np.stack(frames), np.pad(wave, ((0, 0), (max(0, round(begin * rate)), 0))), rate, container.duration / 1e6


def middles(square):
    """Brightness in the middle of 4 x 4 cells."""
    at = (np.arange(4) * 2 + 1) * len(square) // 8
    return np.array([[square[i - 2:i + 3, j - 2:j + 3].mean() for j in at] for i in at])


@pytest.mark.parametrize("name, fps, height, width, more", [
    ("plain.mp4", 25, 48, 64, {}), ("odd.mp4", 12, 61, 47, dict(pixels="yuv444p")),
    ("late.mkv", RATES["29.97"], 48, 64, dict(options={"output_ts_offset": "7.3", "max_interleave_delta": "1"}))])
def test_the_film_has_the_sound_and_the_time_of_its_clip_and_light_where_the_map_is(tmp_path, name, fps, height, width, more):
    """A grey clip of three seconds flashes where the left or the right channel clicks. In the mkv half a second of sound comes first."""
    path, film, wave = tmp_path / name, tmp_path / "film.mp4", np.zeros((2, 132300))
    for side, times in zip(wave, CLICKS):
        for time in times:
            side[round(time * 44100):][:441] = 0.9 * np.sin(np.arange(441))
    flashes = sorted(round(time * fps) for time in sum(CLICKS, ()))
    write(path, [np.full((height, width, 3), 250 if n in flashes else 160, np.uint8) for n in range(math.ceil(3 * fps))], wave, fps, 44100,
          **more)
    moments, peaks = np.array([0.25, 1.0, 1.75, 2.6]), [(0, 0), (3, 1), (1, 2), (2, 3)]
    maps = np.zeros((2, 4, 4, 4), np.float32)
    for m, peak in enumerate(peaks):
        maps[(0, m, *peak)] = maps[(1, m, *peak[::-1])] = 1
    visualize.write_film(path, film, moments, list(maps), 0.8, "a title\nof two lines")
    before, _, sound, rate, length = read_film(path)
    times, shown, wave, film_rate, seconds = read_film(film)
    assert abs(seconds - 3) < 0.1 and (abs(seconds - length) < 0.1 or name == "late.mkv")                   # the length of that is its end
    assert len(times) == len(before) and np.abs(times - before).max() < 0.005
    assert wave.shape[0] == 2 and film_rate == 48000 and abs(wave.shape[1] / film_rate - sound.shape[1] / rate) < 0.1
    for side, other, clicks in zip(wave, wave[::-1], CLICKS):
        for click in clicks:
            near, after = slice(round((click - 0.05) * 48000), round((click + 0.06) * 48000)), round((click + 0.06) * 48000)
            assert np.abs(side[near]).max() > 0.4 > 4 * max(np.abs(other[near]).max(), np.abs(side[after:after + 9600]).max())
    h, w = (int(round(side * 240 / min(height, width))) // 2 * 2 for side in (height, width))
    assert shown.shape[2] == 3 * w and shown.shape[1] > h + 20
    assert shown[0, :-h].mean() > 200 and np.ptp(shown[0, :-h]) > 150                                       # the header, dark on white
    plain, *lit = (shown[:, -h:, k * w:(k + 1) * w].mean(-1) for k in range(3))
    assert np.flatnonzero(plain.mean((1, 2)) > 200).tolist() == flashes
    side = round(min(h, w) * 0.8)
    top, left = (h - side) // 2, (w - side) // 2
    for n, time in enumerate([*moments, 0.625]):        # the last: between the first two
        frame = np.abs(times - time).argmin()
        for tile, order in zip(lit, (1, -1)):
            got = middles(tile[frame, top:top + side, left:left + side])
            tile[frame, top - 4:top + side + 4, left - 4:left + side + 4] = 0
            assert tile[frame].max() < 45               # what the encoder does not see
            assert n == 4 or np.unravel_index(got.argmax(), (4, 4)) == peaks[n][::order] and got.max() > 120 and np.sort(got, None)[-2] < 60
            assert n < 4 or all(60 < got[peak[::order]] < 110 for peak in peaks[:2])


def test_the_command_lights_the_clip_where_and_when_the_encoder_attends(runs, tmp_path, monkeypatch, capsys):
    """The planted peak of each view and moment is found in the film at its time; the figure says what it shows."""
    clip, calls, figs, save, run = tmp_path / "long.mp4", [], [], visualize.save, str(runs["mjepa"])
    write(clip, 44 * [np.full((48, 64, 3), 180, np.uint8)], tone(500, 4.4), fps=10)        # the last two views overlap

    def planted(vit, video, audio, layer):
        calls.append(layer)
        seen, heard = torch.full((1, 2, *GRID), 0.01), torch.rand(1, 2, 2, 12)
        for t in range(2):
            seen[0, :, t, t + 1, (len(calls) - 1) % 4] = len(calls)     # view n: column n
        return seen, heard

    monkeypatch.setattr(visualize, "cross_attention", planted)
    monkeypatch.setattr(visualize, "save", lambda args, name, fig: figs.append(fig) or save(args, name, fig))
    visualize.main(words("attention", run, tmp_path, "--clip", clip, "--layer", 2))
    out = [tmp_path / f"attention-long-block2.{end}" for end in ("png", "mp4")]
    assert capsys.readouterr().out.split() == [str(path) for path in out] and set(tmp_path.iterdir()) == {clip, *out} and calls == [2, 2, 2]
    assert out[0].read_bytes()[:4] == b"\x89PNG" and said(figs[0], "MJEPA", "long.mp4", run, "step 1,234", "block 2")
    rows = np.reshape(figs[0].axes[:6], (2, 3))         # the pictures of two moments and the sound; input, and lit
    assert [float(ax.get_title().removesuffix(" s")) for ax in rows[0, :2]] == pytest.approx([2.75, 3.75], abs=0.05)
    assert all(row[-1].get_ylabel() == "Hz" for row in rows) and rows[1, -1].get_xlabel() == "seconds"
    assert {ax.get_ylabel() for ax in figs[0].axes[6:]} == {"log mel, normalised", "share of the largest"}
    assert rows[1, -1].get_xlim() == pytest.approx((2, 4), abs=0.02)
    lit = read_film(out[1])[1][:, -240:, 320:].mean(-1)[:, 24:216, 64:256]         # the crop of .8
    for frame, cell in {5: (1, 0), 15: (2, 0), 25: (1, 1), 29: (1, 2), 35: (2, 1), 39: (2, 2)}.items():     # ten a second
        assert np.unravel_index(middles(lit[frame]).argmax(), (4, 4)) == cell
    monkeypatch.setattr(visualize, "write_film", lambda path, part, *more: (part.touch(), open(tmp_path)))
    with pytest.raises(common.UserError, match="attention-long.mp4: the film could not be made"):
        visualize.main(words("attention", run, tmp_path, "--clip", clip))
    assert not list(tmp_path.glob("*.part"))


def test_the_patches_that_an_object_touches_equal_a_slow_loop():
    rng, grid = np.random.default_rng(0), (9, 4, 5)
    place, times = rng.uniform(-0.1, 1.1, (20, 2)), rng.integers(20, size=(9, 2))
    place[[3, 7, 8]], times[2] = np.nan, [7, 8]         # nothing there
    got, inside = visualize.touched(place, times, grid, 0.8), 0
    for t, i, j in np.ndindex(*grid):
        (top, bottom), (left, right) = ((0.1 + 0.8 * n / count, 0.1 + 0.8 * (n + 1) / count) for n, count in ((i, 4), (j, 5)))
        there = any(top <= y < bottom and left <= x < right for x, y in place[times[t]])
        assert got[t, i, j] == there
        inside += there
    assert inside >= 6 and not got[2].any()


def test_hits_equal_a_slow_loop_and_leave_out_moments_without_a_target():
    g = np.random.default_rng(0)
    heat, target = g.random((6, 3, 2, 4)), g.random((6, 3, 2, 4)) < 0.2
    target[0, 1], target[4] = False, False
    won = [bool(target[n, t].flat[heat[n, t].argmax()]) for n, t in np.ndindex(6, 3) if target[n, t].any()]
    assert visualize.hits(heat, target) == pytest.approx(100 * np.mean(won)) and 0 < np.mean(won) < 1 and len(won) < 15
    assert visualize.hits(target.astype(float), target) == 100 and math.isnan(visualize.hits(heat, target & False))
    assert visualize.hits(g.random((9999, 1, 2, 4)), np.tile(np.arange(8).reshape(2, 4) < 2, (9999, 1, 1, 1))) == pytest.approx(25, abs=2)


@pytest.mark.parametrize("change", [dict(seconds=1.0, frames=7), dict(video_seconds=0.5), dict(frame_rate=20.0, seconds=0.9, columns=60,
                                                                                               interpolate=True)])
def test_the_toy_objects_are_looked_for_in_the_frames_that_the_encoder_sees(tmp_path, change):
    write(tmp_path / "clip.mp4", [numbered(n) for n in range(40)], tone(440, 4), fps=10)
    inputs, listing = replace(INPUTS, size=48, resize=48, **change), data.make_listing("folder", tmp_path, ["clip.mp4"], None, [])
    clip = data.Clips(listing, inputs, functools.partial(data.even_views, 1, inputs))[0, 0]["video"][0]
    assert visualize.toy_frames(inputs).tolist() == [read_number(frame.numpy()) for frame in clip.permute(1, 2, 3, 0)]


def test_a_peak_on_the_object_counts_and_on_the_silent_one_does_not(runs, toy, tmp_path, monkeypatch, capsys):
    """The trained encoder's peak is planted on the sounding object, the untrained one's on the silent object."""
    mine, count = common.load_checkpoint(runs["avjepa_lejepa"])["model"]["target_encoder.cls"], {True: 0, False: 0}
    read, patches = np.load(toy / "test" / "truth.npz"), {}
    for key in ("place", "silent_place"):               # on screen in the two moments of the middle two seconds, ten frames a second
        patches[key] = [[[tuple(int(4 * ((v - 0.5) / 0.8 + 0.5)) for v in places[f][::-1]) for f in pair if not np.isnan(places[f, 0])]
                         for pair in ((12, 17), (22, 27))] for places in read[key]]

    def planted(vit, video, audio, layer):
        trained, seen = torch.equal(vit.cls, mine), torch.rand(len(video), 2, *GRID) / 10
        for n, t in np.ndindex(len(video), 2):
            for patch in patches["place" if trained else "silent_place"][count[trained] + n][t][:1]:
                seen[(n, slice(None), t, *patch)] = 1
        count[trained] += len(video)
        return seen, None

    monkeypatch.setattr(visualize, "cross_attention", planted)
    visualize.main(words("attention", runs["avjepa_lejepa"], tmp_path, toy=toy))
    row, two = json.loads((tmp_path / "visualize.jsonl").read_text()), np.flatnonzero(read["silent"])
    percent, out = row["percent"], capsys.readouterr().out
    assert all(f"{name:14s}" in out for name in ("trained", "untrained", "same patch", "another clip's", "random patch"))
    assert "block 3" in out
    assert count == {True: 16, False: 16} and [row[k] for k in ("of two", "N", "layer", "step")] == [len(two), 16, 3, 1234]
    assert percent["trained"]["sounding"] == percent["trained"]["sounding, of two"] == 100 == percent["untrained"]["silent, of two"]
    overlap = np.mean([patches["silent_place"][n][t][0] in patches["place"][n][t] for n in two for t in range(2)])
    assert percent["untrained"]["sounding, of two"] == pytest.approx(100 * overlap) and overlap < 0.5
    assert row["heads"]["trained"] == [100, 100] and row["heads"]["untrained"][0] < 60
    for column, key, some in (("sounding", "place", range(16)), ("silent, of two", "silent_place", two)):
        shares = [len(set(patches[key][n][t])) / 16 for n in some for t in range(2)]
        assert percent["random patch"][column] == pytest.approx(100 * np.mean(shares))
    best = [max(sum(patch in one[t] for one in patches["place"]) for patch in np.ndindex(4, 4)) for t in range(2)]
    assert percent["same patch"]["sounding"] == pytest.approx(100 * sum(best) / 32)
    places = patches["place"]                           # where the trained peaks are: those of the eight clips before, on this one's object
    others = [places[n - shift][t][0] in places[n][t] for n in range(16) for t in range(2) for shift in range(1, 9)]
    assert percent["another clip's"]["sounding"] == pytest.approx(100 * np.mean(others))


def test_the_command_line_writes_its_row(runs, toy, tmp_path):
    done = command([sys.executable, str(ROOT / "visualize.py"), *words("attention", runs["mjepa"], tmp_path, toy=toy)], tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "random patch" in done.stdout, done.stderr[-2000:]
    names = ["trained", "untrained", "same patch", "another clip's", "random patch"]
    assert list(json.loads((tmp_path / "visualize.jsonl").read_text())["percent"]) == names


@pytest.mark.parametrize("n, d, count", [(50, 8, 3), (6, 20, 3), (30, 2, 3), (2, 5, 3), (40, 9, 2)])
def test_principal_components_equal_an_svd_with_a_fixed_sign(n, d, count):
    x = torch.randn(n, d) * torch.arange(1, d + 1) + 3
    y, share = visualize.principal(x.numpy(), count)
    u, s, vh = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    k = min(count, n - 1, d)
    assert y.shape == (n, count) and share.shape == (count,) and np.abs(y[:, k:]).max(initial=0) < 1e-5
    for c in range(k):
        sign = 1 if vh[c].max() > -vh[c].min() else -1  # the largest weight is positive
        np.testing.assert_allclose(y[:, c], sign * (u[:, c] * s[c]).numpy(), atol=1e-5)
    np.testing.assert_allclose(share[:k], (s ** 2 / (s ** 2).sum())[:k].numpy(), atol=1e-6)
    order = np.random.default_rng(0).permutation(n)
    np.testing.assert_allclose(visualize.principal(x.numpy()[order], count)[0], y[order], atol=1e-8)


def test_colours_lie_in_0_to_1_and_keep_the_order():
    y = np.random.default_rng(0).normal(size=(500, 3)) * [1, 10, 0]
    y[0] = [1e4, -1e4, 0]                               # an outlier does not take the contrast
    rgb = visualize.to_rgb(y)
    assert rgb.min() == 0 and rgb.max() == 1 and rgb[0].tolist() == [1, 0, 0] and (rgb[:, :2].std(0) > 0.2).all() and not rgb[:, 2].any()
    assert all((np.diff(rgb[np.argsort(y[:, c]), c]) >= 0).all() and np.mean((rgb[:, c] % 1) > 0) > 0.97 for c in (0, 1))


@pytest.mark.parametrize("method", ["ajepa", "avjepa_lejepa", "mjepa"])
def test_pca_draws_a_figure_for_each_modality(runs, toy, tmp_path, figures, method):
    classes, keys = ["teal bell", "red odd"], ["audio-alone"] if method == "ajepa" else ["video", "audio"]
    visualize.main(words("pca", runs[method], tmp_path, "--clips", 2, "--classes", *classes, toy=toy))
    assert list(figures) == [f"pca-toy-{key}.png" for key in keys] and {p.name for p in tmp_path.iterdir()} == set(figures)
    encoder = common.load_encoder(runs[method])
    for key, fig in zip(keys, figures.values()):
        assert said(fig, visualize.NAMES[method], f"{key[:5]} tokens", "toy", str(runs[method]), "step 1,234") and len(fig.subfigs) == 2
        for block, name in zip(fig.subfigs, classes):
            axes, which = np.reshape(block.axes, (3, 2)), data.TOY_CLASSES.index(name)
            tokens = [encoder(**data.load_clip(toy / "test" / f"{i:05d}.mp4", encoder.inputs))[0][0] for i in (which, which + 8)]
            y, share = visualize.principal(torch.cat([t[:32] if key == "video" else t[-24:] for t in tokens]).numpy())
            assert block._suptitle.get_text() == f"{name}: {', '.join(f'{100 * s:.0f} %' for s in share)} of the variance"
            for column, rgb in enumerate(np.split(visualize.to_rgb(y), 2)):
                image, grey = (np.asarray(axes[row, column].images[0].get_array()) for row in (1, 2))
                if key == "video":                      # moments side by side, 32 pixels and a gap of 2
                    image, grey = (np.stack([one[4::8, 34 * t + 4:34 * t + 32:8] for t in range(2)]) for one in (image, grey))
                rgb = rgb.reshape(image.shape)
                np.testing.assert_allclose(np.stack([image, grey]), np.stack([rgb, rgb[..., :1].repeat(3, -1)]), atol=1e-4)
            assert [ax.get_xlabel() for ax in axes[-1]] == 2 * [f"seconds of the {'pictures' if key == 'video' else 'sound'}"]
            assert key == "video" or all("Hz" in ax.get_ylabel() for ax in axes[:, 0])


def test_neighbours_of_the_same_label_equal_a_slow_loop():
    x, labels = torch.randn(25, 3).numpy(), np.arange(25) % 3
    same = [[labels[j] == labels[i] for j in sorted(range(25), key=lambda j: sum((x[i] - x[j]) ** 2)) if j != i] for i in range(25)]
    for count in (10, 4):
        assert visualize.neighbours(x, labels, count) == pytest.approx((100 * np.mean([row[:count] for row in same]), 100 * np.mean(same)))
    assert visualize.neighbours(x[:4], [0, 0, 0, 0])[0] == 100           # fewer than ten others


@pytest.mark.parametrize("method, more, name", [
    ("ajepa", (), "audio"), ("avjepa_lejepa", (), "av"), ("mjepa", ("--modality", "video", "--untrained"), "video-untrained"),
    ("avjepa_lejepa", ("--pairs", "--embedding", "projected"), "pairs-projected"), ("mjepa", ("--groups", "GROUPS"), "av")])
def test_the_map_has_a_row_and_a_point_for_each_clip_and_modality(runs, toy, tmp_path, figures, method, more, name):
    grouped, pairs, projected, file = "--groups" in more, "--pairs" in more, "projected" in more, tmp_path / "groups.csv"
    file.write_text("class,group\n" + "".join(f"{c},{'cold' if c[0] in 'btvg' else 'warm'}\n" for c in data.TOY_CLASSES[1:]))
    visualize.main(words("map", runs[method], tmp_path, *(file if word == "GROUPS" else word for word in more), toy=toy))
    assert set(figures) == {f"map-toy-{name}.png", f"map-toy-{name}.csv"}
    header, *rows = csv.reader((tmp_path / f"map-toy-{name}.csv").read_text().splitlines())
    assert header == ["file", "class", "group", "modality", "tsne_1", "tsne_2", "pca_1", "pca_2"]
    some, modalities = [i for i in range(16) if not grouped or i % 8], ["audio", "video"] if pairs else [name.split("-")[0]]
    assert [(row[0].split("/")[-1], row[1], row[3]) for row in rows] == [(f"{i:05d}.mp4", data.TOY_CLASSES[i % 8], m) for m in modalities
                                                                     for i in some]
    assert all(row[2] == (("cold" if row[1][0] in "btvg" else "warm") if grouped else row[1]) for row in rows)
    encoder, z = common.load_encoder(runs[method], untrained="--untrained" in more), []
    for m, i in itertools.product(modalities, some):
        _, made = encoder(**probe.pick(data.load_clip(toy / "test" / f"{i:05d}.mp4", encoder.inputs), m))
        z.append((encoder.projector(made) if projected else made)[0])
    y, xy = visualize.principal(torch.stack(z).numpy(), 2)[0], np.array([row[4:] for row in rows], float)
    np.testing.assert_allclose(xy[:, 2:], y, atol=2e-3 * np.abs(y).max())
    fig = figures[f"map-toy-{name}.png"]
    assert said(fig, visualize.NAMES[method], f"{len(some)} clips of toy", f"{'projected' if projected else 'clip'} embedding",
                str(runs[method]), "untrained" if "--untrained" in more else "step 1,234")
    for at, (ax, (plane, unit)) in enumerate(zip(fig.axes, (("t-SNE", "(no unit)"), ("PCA", "% of the variance")))):
        assert ax.get_title() == plane and unit in ax.get_xlabel() and unit in ax.get_ylabel()
        joined, here = [line for line in ax.lines if line.get_marker() == "None"], xy[:, 2 * at:2 * at + 2]
        points = [line for line in ax.lines if line not in joined and len(line.get_xdata())]
        assert sorted(map(tuple, np.concatenate([line.get_xydata() for line in points]).round(3))) == sorted(map(tuple, here.round(3)))
        assert len({(line.get_marker(), line.get_color(), line.get_mfc()) for line in points}) == (2 if grouped else 8) * (1 + pairs)
        for line, i in itertools.zip_longest(joined, range(16) if pairs else ()):
            np.testing.assert_allclose(line.get_xydata(), here[[i, 16 + i]], rtol=1e-3)
    row = json.loads((tmp_path / "visualize.jsonl").read_text())
    assert [row[k] for k in ("N", "left_out", "step", "pairs")] == [len(some), 0, 1234, pairs]
    groups = np.unique([r[2] for r in rows[-len(some):]], return_inverse=True)[1]
    assert row[f"{modalities[-1]}, PCA"]["neighbours"] == pytest.approx(visualize.neighbours(xy[-len(some):, 2:], groups)[0], abs=1.5)


def test_curves_of_runs_with_other_columns_are_told_apart_without_colour(runs, tmp_path, figures):
    folders, logs = [tmp_path / name for name in "abc"], [{"loss": 1.0, "know_nothing": 2.0, "rank": 7.0, "ms_step": 9.0},
                                                          {"loss": 3.0, "sigreg": 4.0, "a": 1.0, "a/know_nothing": 1.5}]
    for folder, log in zip(folders, logs + logs[:1]):
        folder.mkdir()
        rows = [{"step": 10 * n, **{k: v + n for k, v in log.items()}} for n in range(4)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders[0] / "latest.pt").write_bytes((runs["mjepa"] / "latest.pt").read_bytes())
    visualize.main(["curves", *map(str, folders)]), visualize.main(["curves", str(folders[0]), "--out", str(tmp_path / "new")])
    assert (tmp_path / "a" / "curves-of-3.png").is_file() and (tmp_path / "new" / "curves.png").is_file()
    many, text = figures["curves-of-3.png"], figures["curves.png"]._suptitle.get_text()
    assert text == f"MJEPA, toy, {folders[0]}, step 31; thin and dotted: the loss of a predictor that knows nothing"
    handles = many.legends[0].legend_handles
    named = [text.get_text() for text in many.legends[0].get_texts()]
    assert named == [f"MJEPA, toy, {folders[0]}, step 31"] + [f"{folder}, step 31" for folder in folders[1:]]
    axes = {ax.get_title(): ax for ax in many.axes if ax.lines}
    assert set(axes) == {"loss", "rank", "ms_step, ms", "sigreg", "a"} and all(ax.get_xlabel() == "step" for ax in axes.values())
    assert {text.get_text() for ax in many.axes for text in ax.texts} == {"losses", "health"}
    thick, thin = ([line for line in axes["loss"].lines if (line.get_linewidth() < 1) == below] for below in (False, True))
    assert [line.get_ydata().tolist() for line in thick] == [[first + n for n in range(4)] for first in (1, 3, 1)]
    assert [(line.get_ydata()[0], line.get_linestyle()) for line in thin] == [(2, ":"), (2, ":")]
    assert len({line.get_marker() for line in thick}) == 3 and [line.get_ydata()[0] for line in axes["a"].lines] == [1, 1.5]
    assert [(h.get_linestyle(), h.get_marker()) for h in handles] == [(line.get_linestyle(), line.get_marker()) for line in thick]


def test_clips_that_lack_a_stream_are_named_and_the_others_stay_in_line(runs, tmp_path, capsys):
    frames, wave, encoder = [numbered(n) for n in range(30)], tone(440, 3), common.load_encoder(runs["avjepa_lejepa"])
    for n, has in enumerate(("av", "v", "a", "av", "av", "a")):
        write(tmp_path / f"{n}.mp4", frames[n:] if "v" in has else None, wave * (n + 1) / 8 if "a" in has else None, fps=10)
    (tmp_path / "6.mp4").write_text("no clip")
    listing = data.make_listing("folder", tmp_path, [f"{n}.mp4" for n in range(7)], None, [])
    for modalities, keys, fits in ((["av", "audio"], ("video", "audio"), [0, 3, 4]), (["audio"], ("audio",), [0, 2, 3, 4, 5])):
        found = []
        for index, given, made in probe.encode_clips(encoder, listing, INPUTS, modalities, 2, CPU, 0, batch=4):
            for row, i in enumerate(index.tolist()):
                found.append(i)
                alone, = data.eval_loader(listing.subset([i]), INPUTS, functools.partial(data.even_views, 2, INPUTS), 1, 0)
                alone, here = data.to_device(alone, CPU.device), slice(2 * row, 2 * row + 2)
                assert set(given) == set(keys) and all(torch.equal(given[key][here], alone[key]) for key in keys)
                for m in modalities:
                    for got, true in zip(made[m], encoder(**probe.pick(alone, m))):
                        torch.testing.assert_close(got[here], true, atol=1e-4, rtol=1e-4)
        named = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad clip: ")]
        assert found == fits and sorted(line.split("/")[-1][0] for line in named) == [str(n) for n in range(7) if n not in fits]


REFUSED = """
attention mjepa --clip CLIPS/silent.mp4 | silent.mp4: has no sound, so there is no attention between the two
attention mjepa --clip CLIPS/sound.wav | sound.wav: has no picture
attention mjepa --clip CLIPS/none.mp4 | none.mp4: there is no such file
attention mjepa --clip TOY/world.json | world.json: does not decode
attention ajepa CLIP | this ajepa encoder takes one modality only
attention mjepa | give either --clip FILE, or --data toy
attention mjepa CLIP WORLD | give either --clip FILE, or --data toy
attention mjepa WORLD --untrained | --untrained has no effect without --clip
attention mjepa WORLD --heads each | --heads has no effect without --clip
attention mjepa CLIP --layer 4 | --layer 4 is out of range: from -1 to 3
attention mjepa CLIP --out TOY/world.json/x | cannot be made
pca mjepa WORLD --classes teal hmm | --classes teal: toy has no clip of such a class; it has red odd, orange saw
pca mjepa WORLD --clips 0 | --clips 0 is out of range
map mjepa WORLD --embedding projected | has no projector
map ajepa WORLD --pairs | --pairs needs an encoder and a set with both sound and pictures
map mjepa WORLD --pairs --modality audio | leave --modality out
map mjepa WORLD --groups GROUPS | the set has no class 'a dog'
map mjepa WORLD --clips 4 | toy: 4 held-out clips; a map needs at least 5
curves mjepa | has no log.jsonl with a row in it""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_ends_in_a_sentence_and_writes_nothing(runs, toy, clips, tmp_path, capsys, line):
    (tmp_path / "groups.csv").write_text("class,group\nred odd,warm\na dog,animals\n")
    names = {"CLIP": "--clip CLIPS/good.mp4", "WORLD": "--data toy --data-dir TOY"}
    (what, method, *more), sentence = (part.strip() for part in line.split("|")[0].split()), line.split("| ")[1]
    more = [word.replace("CLIPS", str(clips)).replace("TOY", str(toy)).replace("GROUPS", str(tmp_path / "groups.csv"))
            for name in more for word in names.get(name, name).split()]
    run, before = str(runs[method]), signal.getsignal(signal.SIGTERM)
    argv = ["curves", run] if what == "curves" else [what, "--ckpt", run, "--workers", "0", *more]
    there = [sorted(folder.rglob("*")) for folder in (*runs.values(), tmp_path, clips, toy)]
    try:
        with pytest.raises(SystemExit) as end:
            common.main_guard(lambda: visualize.main(argv))
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in err and err.splitlines()[-1].startswith("error: ") and sentence in err
    assert there == [sorted(folder.rglob("*")) for folder in (*runs.values(), tmp_path, clips, toy)]
