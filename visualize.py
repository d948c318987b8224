"""See what an encoder has learnt: attention between sound and pictures, PCA of its tokens, a map of its clips, the curves of its runs.

    python visualize.py attention --ckpt runs/avjepa_lejepa-toy-seed0 --clip dog.mp4          # a picture, and an mp4 with the sound
    python visualize.py attention --ckpt runs/avjepa_lejepa-toy-seed0 --data toy              # how often the peak is what sounds
    python visualize.py pca --ckpt RUN --data vggsound --data-dir vggsound/ --classes "dog barking" "playing piano"
    python visualize.py map --ckpt RUN --data folder --data-dir clips/ --pairs                # t-SNE and PCA, and a csv
    python visualize.py curves runs/ajepa-toy-seed0 runs/ajepa-toy-seed1

Any checkpoint of ours will do, as far as it takes what is to be drawn. Files go into the run's folder, or into --out; numbers into a row of
visualize.jsonl there. Attention, PCA and map are those of AV-JEPA's page (its last three sections).
"""
import argparse, csv, functools, io, math, os, textwrap, time
from fractions import Fraction
from pathlib import Path

import common, data, probe, retrieval                   # before torch: common sets how its threads wait
from common import UserError, main_guard

import av
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt                         # after the choice of a backend without a window

plt.rcParams["text.parse_math"] = False                 # a $ in a file's or a class's name is a $
NAMES = {"ajepa": "A-JEPA", "avjepa_lejepa": "AV-JEPA", "mjepa": "MJEPA", "avjepa_ncsu": "AVJEPA (NC State)"}
MARKERS = "osD^v<>PX*ph"
LONGEST = 300                                           # seconds of a clip whose attention is drawn


def title(encoder, args, what):
    """What each figure says of itself: method, what is drawn of which data, checkpoint and step."""
    state = "untrained" if args.untrained else f"step {encoder.step:,}"
    return f"{NAMES.get(encoder.method, encoder.method)}: {what}\n{args.ckpt}, {state}"


def head(fig, text):
    """Put the title over a figure, in lines that fit its width."""
    fig.suptitle("\n".join(textwrap.fill(line, int(11 * fig.get_figwidth())) for line in text.split("\n")), fontsize=10)


def save(args, name, fig):
    """Write a figure as NAME.png into --out, or the run's folder. Returns the path."""
    return write(args, f"{name}.png", lambda f: fig.savefig(f, format="png", dpi=110))


def write(args, name, fill):
    """fill(file) a file of that name in --out or the run's folder; whoever is killed leaves the old one. Returns its path."""
    file = place(args, name)
    try:
        common.replace_file(file, fill)
    except OSError as e:
        raise UserError(f"{file}: cannot be written ({e.strerror}); give another --out") from None
    finally:
        plt.close("all")
    return file


def place(args, name):
    """The path of a file of that name in --out, or in the run's folder."""
    folder = Path(args.out) if args.out else Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be made ({e.strerror})") from None
    return folder / name


def variant(args):
    """What a file's name says of the encoder, if it is not the one that the method evaluates."""
    return f"-{args.encoder}" * bool(args.encoder) + "-untrained" * args.untrained


def add_row(args, row):
    """A row of visualize.jsonl beside the figures."""
    row.update(encoder=args.encoder, version=common.code_version(), ckpt=str(args.ckpt))
    common.add_row(place(args, ""), "visualize.jsonl", row)


def picture_of(video):
    """What the encoder saw, (..., 3, T, H, W) normalised -> (..., T, H, W, 3) in 0..1."""
    x = video.movedim(-4, -1).float().cpu() * torch.tensor(data.IMAGENET_STD) + torch.tensor(data.IMAGENET_MEAN)
    return x.clamp(0, 1).numpy()


def shown_frames(patches):
    """At most four tubelets, evenly spread, and a frame in the middle of each: two arrays of indices."""
    moments = np.unique(np.linspace(0, patches.grid[0] - 1, 4).round().astype(int))
    return moments, moments * patches.patch[0] + patches.patch[0] // 2


def mel_extent(inputs, columns, span):
    """(left, right, bottom, top) of `columns` mel frames, in seconds and bins. span: (start, length in seconds) of the view."""
    whole = inputs.columns if inputs.interpolate and inputs.columns else inputs.seconds * inputs.sample_rate / inputs.hop
    return span[0], span[0] + span[1] * columns / whole, 0, inputs.n_mels


def mel_axes(ax, inputs, columns, span, labels=True):
    """Axes in seconds and Hz for what was drawn with mel_extent."""
    ticks = [f for f in (250, 1000, 2000, 4000, 8000, 16000) if f < inputs.sample_rate / 2]
    mel = [math.log10(1 + f / 700) / math.log10(1 + inputs.sample_rate / 1400) for f in ticks]          # HTK's scale, as the filters'
    ax.set_yticks([m * (inputs.n_mels + 1) - 0.5 for m in mel], [str(f) for f in ticks] if labels else [])
    ax.tick_params(labelsize=7)
    left, right, bottom, top = mel_extent(inputs, columns, span)
    ax.set(xlim=(left, right), ylim=(bottom, top))


# ---------------------------------------------------------------------------------------------------------------------
# Attention between sound and pictures
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def cross_attention(vit, video, audio, layer=-1):
    """What the sound looks at, and what the pictures listen to, in one block: audio -> video attention (B, heads, T, H, W), the mean over
    the audio tokens, and video -> audio (B, heads, F, T), the mean over the video tokens; both on the grids of the tokens. Not
    normalised: the rest of a token's attention stays within its own modality and CLS."""
    first, pictures = int(vit.cls is not None), vit.video.num
    # unspecified (AV-JEPA's page): the mean over all tokens that look, not those of the same moment alone
    weights = vit.attention_weights(video, audio, layer)[:, :, first:, first:]                          # (B, heads, N, N)
    seen, heard = weights[:, :, pictures:, :pictures].mean(2), weights[:, :, :pictures, pictures:].mean(2)
    columns = audio.shape[-1] // vit.audio.patch[1]
    return seen.unflatten(2, vit.video.grid), heard.unflatten(2, (-1, columns))


def cover(path, inputs):
    """A clip as views, one after the other, whose pictures cover all of it: (load_views of them, [(sound, pictures)], each (start, length)
    in seconds of the clip's clock). Raises UserError where it is too long to hold in memory."""
    spans, length = [], inputs.video_seconds or inputs.seconds

    def plan(duration):                                 # in seconds of inputs.frame_rate, where that is set
        if duration > LONGEST:
            raise UserError(f"--clip {path}: is too long; cut out a part of at most {LONGEST // 60} minutes")
        for n in range(max(1, math.ceil(duration / length - 1e-3))):
            start = min(n * length, max(0.0, duration - length))
            sound = min(max(0.0, start + (length - inputs.seconds) / 2), max(0.0, duration - inputs.seconds))
            spans.append(((sound, inputs.seconds), (start, length)))
        return [pictures for _, pictures in spans], [sound for sound, _ in spans]

    views = data.load_views(path, inputs, plan)
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        stretch = data.time_stretch(data.find_streams(container)[0], inputs.frame_rate)
    return views, [tuple((start * stretch, seconds * stretch) for start, seconds in span) for span in spans]


def light(picture, heat):
    """A picture (H, W, 3) in 0..1 lit by its attention (h, w) in 0..1: bright where there is much, dark where there is none."""
    heat = F.interpolate(torch.from_numpy(np.float32(heat))[None, None], picture.shape[:2], mode="bilinear")[0, 0].numpy()
    return picture * (0.1 + 0.9 * heat[..., None])


def draw_attention(encoder, views, spans, number, maps, heading):
    """The figure of view `number`: its pictures and its mel in the first row; below, a row for each of maps [(name, audio -> video
    attention (V, T, H, W), video -> audio attention (V, F, T))], the pictures lit by it, and it with the outline of what is loud."""
    inputs, vit, (sound, pictures) = data.Inputs(**encoder.inputs), encoder.vit, spans[number]
    mel = views["audio"][number, 0].cpu().numpy()
    moments, shown = shown_frames(vit.video)
    frames, times = picture_of(views["video"][number])[shown], pictures[0] + (shown + 0.5) * pictures[1] / inputs.frames
    fig = plt.figure(figsize=(2 * len(moments) + 5, 2.9 + 2.1 * len(maps)), layout="constrained")
    head(fig, heading)
    axes = fig.subplots(len(maps) + 1, len(moments) + 1, squeeze=False, width_ratios=[1] * len(moments) + [2])
    for row, (name, seen, heard) in zip(axes, [("input", None, None), *maps]):
        for ax, moment, frame, time_ in zip(row, moments, frames, times):
            ax.set(xticks=[], yticks=[])
            if seen is None:
                ax.imshow(frame)
                ax.set_title(f"{time_:.2f} s", fontsize=9)
                continue
            heat = seen[number][moment]
            ax.imshow(light(frame, heat / seen[number].max()))
            most = np.unravel_index(heat.argmax(), heat.shape)
            peak = [(n + 0.5) * side / count - 0.5 for n, side, count in zip(most, frame.shape, heat.shape)]
            ax.plot(*peak[::-1], "w+", ms=11, mew=3), ax.plot(*peak[::-1], "k+", ms=10, mew=1)
        row[0].set_ylabel(name, fontsize=9)
        image, label, extent = mel, "log mel, normalised", mel_extent(inputs, mel.shape[1], sound)
        if heard is not None:
            columns = np.linspace(*extent[:2], 2 * mel.shape[1] + 1)[1::2]
            row[-1].contour(columns, np.arange(len(mel)) + 0.5, mel, levels=[np.percentile(mel, 85)], colors="tab:orange", linewidths=0.5)
            image, label = heard[number] / heard[number].max(), "share of the largest"
            extent = (*mel_extent(inputs, image.shape[1] * vit.audio.patch[1], sound)[:2], 0, image.shape[0] * vit.audio.patch[0])
        drawn = row[-1].imshow(image, origin="lower", aspect="auto", extent=extent, cmap="gray", vmin=None if heard is None else 0)
        fig.colorbar(drawn, ax=row[-1]).set_label(label, fontsize=7)
        mel_axes(row[-1], inputs, mel.shape[1], sound)
        row[-1].set_ylabel("Hz", fontsize=8)
    axes[-1, -1].set_xlabel("seconds", fontsize=8)
    return fig


def header(text, width):
    """A line of text as an image (h, width, 3) uint8, h even."""
    fig = plt.figure(figsize=(width / 100, 0.16 * (text.count("\n") + 2)), dpi=100)
    longest = max(map(len, text.split("\n")))
    fig.text(0.01, 0.5, text, va="center", fontsize=min(8, 1.15 * width / longest))
    fig.canvas.draw()
    image = np.asarray(fig.canvas.buffer_rgba())[..., :3]
    plt.close(fig)
    return np.pad(image[:, :width], ((0, image.shape[0] % 2), (0, max(0, width - image.shape[1])), (0, 0)), constant_values=255)


def write_film(path, out, moments, maps, crop, text):
    """The clip `path` as an mp4 with its sound: the picture, and beside it the picture lit by each of the maps, which move with it.
    moments (M,): seconds, increasing; maps [(M, H, W)] in 0..1 at these; crop: the side of the square in the middle that they cover, as a
    share of the short side."""
    with av.open(os.path.abspath(path), metadata_errors="replace") as source, av.open(os.path.abspath(out), "w", format="mp4") as film:
        video, sound = data.find_streams(source)
        origin, layout = (source.start_time or 0) / av.time_base, "mono" if sound.codec_context.channels == 1 else "stereo"
        shown = film.add_stream("libx264", rate=video.average_rate or 25, options={"crf": "20", "preset": "veryfast"})
        shown.pix_fmt, shown.codec_context.time_base, shown.codec_context.thread_count = "yuv420p", Fraction(1, 90000), 1
        heard, resampler = film.add_stream("aac", rate=48000, layout=layout), av.AudioResampler("fltp", layout, 48000)
        reformatter, above, last, early = av.video.reformatter.VideoReformatter(), None, -1, []
        video.codec_context.thread_count = sound.codec_context.thread_count = 1
        bar = tqdm(total=(source.duration or 0) / av.time_base, desc="film", bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} s [{elapsed}]")
        for packet in source.demux(video, sound):
            try:
                frames = [frame for frame in packet.decode() if frame.pts is not None]
            except av.error.FFmpegError:                # one broken packet: the rest may be fine
                continue
            for frame in frames:
                now = frame.time - origin
                if packet.stream.type == "audio":
                    frame.pts = round(now / frame.time_base)
                    early += [made for part in resampler.resample(frame) for made in heard.encode(part)]
                else:
                    image = np.concatenate(tiles(frame, now, moments, maps, crop, reformatter), 1)          # (H, W of all tiles, 3)
                    if above is None:
                        above = header(text, image.shape[1])
                        shown.width, shown.height = image.shape[1], image.shape[0] + len(above)
                    image = av.VideoFrame.from_ndarray(np.concatenate([above, image]), "rgb24")
                    image.time_base, image.pts = shown.codec_context.time_base, max(last + 1, round(now * 90000))
                    last = image.pts
                    early += shown.encode(image)
                    bar.update(max(0, min(now, bar.total) - bar.n))
                if above is not None:                   # to mux opens both streams, and that of the pictures needs its size before
                    film.mux(early)
                    early = []
        bar.close()
        if above is None:
            raise ValueError("none of its pictures decodes")
        for stream, rest in ((shown, ()), (heard, resampler.resample(None))):
            for part in (*rest, None):
                film.mux(stream.encode(part))


def tiles(frame, now, moments, maps, crop, reformatter):
    """A decoded frame, and the same lit by each of the maps at its time: a list of (H, W, 3) uint8 of even sides. As write_film."""
    small, large = sorted((frame.width, frame.height))
    size = min(480, max(240, small), 4000 * small // (large * (len(maps) + 1)))             # a film of at most some 4,000 pixels
    image = data.picture(frame, max(16, size), reformatter) / np.float32(255)
    image = image[:image.shape[0] // 2 * 2, :image.shape[1] // 2 * 2]
    side = round(min(image.shape[:2]) * crop)
    square = tuple(slice((n - side) // 2, (n - side) // 2 + side) for n in image.shape[:2])
    out = [image]
    for heat in maps:
        heat = np.stack([np.interp(now, moments, patch) for patch in heat.reshape(len(heat), -1).T]).reshape(heat.shape[1:])
        out.append(light(image, np.zeros((1, 1))))      # dark outside of what the encoder saw
        out[-1][square] = light(image[square], heat)
    return [(255 * one).astype(np.uint8) for one in out]


def attention_of_clip(args, encoder, process):
    """attention --clip: the picture of the clip's middle view, and the film of all of it."""
    vit, inputs, clip = encoder.vit, data.Inputs(**encoder.inputs), Path(args.clip)
    if not clip.is_file():
        raise UserError(f"--clip {clip}: there is no such file")
    views, spans = cover(clip, inputs)
    for key, what in (("video", "picture"), ("audio", "sound")):
        if key not in views:
            raise UserError(f"--clip {clip}: has no {what}, so there is no attention between the two; give a clip that has both")
    parts = [cross_attention(vit, views["video"][n:n + 1].to(process.device), views["audio"][n:n + 1].to(process.device), args.layer)
             for n in tqdm(range(len(spans)), desc="attention", unit="view")]
    seen, heard = (torch.cat(x).cpu().numpy() for x in zip(*parts))                 # (V, heads, T, H, W), (V, heads, F, T)
    maps, each = [("mean of heads", seen.mean(1), heard.mean(1))], args.heads == "each"
    if each:
        maps = [(f"head {h}", seen[:, h], heard[:, h]) for h in range(seen.shape[1])]
    block = args.layer % len(vit.transformer.blocks)
    what, name = f"attention in block {block}", f"attention-{clip.stem}{f'-block{block}' * (args.layer != -1)}{'-heads' * each}"
    name += variant(args)
    fig = draw_attention(encoder, views, spans, len(spans) // 2, maps, title(
        encoder, args, f"{what} of the sound to the pictures (bright: much; cross: the most) and\nof the pictures to the sound (bright: "
        f"much; outlined: what is loud), {clip.name}"))
    print(save(args, name, fig))

    length = vit.video.grid[0]
    moments = np.array([start + (k + 0.5) * seconds / length for _, (start, seconds) in spans for k in range(length)])
    order = np.argsort(moments, kind="stable")
    heats = [x.reshape(-1, *x.shape[2:])[order] / x.max() for _, x, _ in maps]                              # each (M, H, W)
    text = title(encoder, args, f"{what} of the sound to the pictures, {'each head' if each else 'mean of heads'}: {clip.name}")
    film = place(args, f"{name}.mp4")
    part = film.with_name(film.name + ".part")
    try:
        write_film(clip, part, moments[order], heats, inputs.size / inputs.resize, text)
        part.replace(film)
    except (av.error.FFmpegError, OSError, ValueError) as e:
        raise UserError(f"{film}: the film could not be made ({e})") from None
    finally:
        part.unlink(missing_ok=True)
    print(film)


def touched(place, times, grid, crop):
    """Which patches hold an object's centre while they are shown: (T, H, W) bool of the grid. place (frames, 2): its x and y in 0..1 at
    each of the clip's frames, NaN where there is none; times (T, frames of a tubelet): which of these are shown; crop: as write_film."""
    out = np.zeros(grid, bool)
    for moment, frames in enumerate(times):
        for x, y in (place[frames] - 0.5) / crop + 0.5:
            if 0 <= x < 1 and 0 <= y < 1:               # False for NaN
                out[moment, int(y * grid[1]), int(x * grid[2])] = True
    return out


def hits(heat, target):
    """How often the largest of a map lies on the target: heat (N, T, H, W), target the same, bool -> percent of the moments T of all N that
    have a target. Of several largest the first counts."""
    heat, target = heat.reshape(*heat.shape[:2], -1), target.reshape(*target.shape[:2], -1)
    hit = np.take_along_axis(target, heat.argmax(2)[..., None], 2)[..., 0]
    return 100 * float(hit[target.any(2)].mean()) if target.any() else math.nan


def toy_frames(inputs):
    """Which frames of a toy clip its middle view shows, by what the reader does: (frames,) indices."""
    stretch = inputs.frame_rate / data.TOY["fps"] if inputs.frame_rate else 1.0             # as data.time_stretch
    view, = data.even_views(1, inputs, None, data.TOY["seconds"] / stretch)
    start, seconds = view.pictures or view[:2]
    times = (start + (np.arange(inputs.frames) + 0.5) * seconds / inputs.frames) * stretch * data.TOY["fps"]
    return np.floor(times + 1e-5).astype(int).clip(0, round(data.TOY["seconds"] * data.TOY["fps"]) - 1)


def attention_on_toy(args, trained, process, workers):
    """attention --data toy: how often the peak of audio -> video attention, at each moment, is the patch where the sounding object is, or
    the silent one: of the encoder, of the same one untrained, of the one patch that is right most often, of the encoder's attention to
    other clips (the eight before), and of a random patch."""
    began, encoders = time.time(), {"trained": trained, "untrained": load(args, process, untrained=True)}
    vit, inputs, listing = trained.vit, data.Inputs(**trained.inputs), data.list_clips("toy", args.data_dir, "test")
    plan, maps, index = functools.partial(data.even_views, 1, inputs), {name: [] for name in encoders}, []
    for b in data.eval_batches(listing, inputs, plan, 32, workers, data.Troubles(len(listing)), "attention"):
        index += b["index"].tolist()
        b = data.to_device(b, process.device)
        for name, encoder in encoders.items():
            maps[name].append(cross_attention(encoder.vit, b["video"], b["audio"], args.layer)[0].cpu())
    maps = {name: torch.cat(parts).numpy() for name, parts in maps.items()}                                 # each (N, heads, T, H, W)

    times = toy_frames(inputs).reshape(vit.video.grid[0], -1)
    # toy_clip is a pure function, so this holds for clips that an older version wrote, too
    truths = [data.toy_clip(data.TOY["seed"], "test", i)[2] for i in tqdm(index, desc="where the objects are", unit="clip")]
    sounding, silent = (np.stack([touched(truth[key], times, vit.video.grid, inputs.size / inputs.resize) for truth in truths])
                        for key in ("place", "silent_place"))                                               # (N, T, H, W)
    two, share = silent.any((1, 2, 3)), sounding.mean((0, 1))
    columns = {"sounding": (slice(None), sounding), "sounding, of two": (two, sounding[two]), "silent, of two": (two, silent[two])}
    heat = {**{name: x.mean(1) for name, x in maps.items()}, "same patch": np.broadcast_to(share, sounding.shape)}
    rows = {name: {column: hits(x[some], target) for column, (some, target) in columns.items()} for name, x in heat.items()}
    rows["another clip's"] = {column: float(np.mean([hits(np.roll(heat["trained"], shift, 0)[some], target) for shift in range(1, 9)]))
                              for column, (some, target) in columns.items()}
    rows["random patch"] = {column: 100 * float(target[target.any((2, 3))].mean()) for column, (_, target) in columns.items()}
    heads = {name: [hits(x[:, h], sounding) for h in range(x.shape[1])] for name, x in maps.items()}
    block = args.layer % len(vit.transformer.blocks)
    print(f"the peak of the sound's attention to the pictures lies on the object: percent of {sounding.shape[1]} moments of {len(index)} "
          f"held-out\nclips, {two.sum()} of them with a second, silent object; block {block}, mean of heads, {vit.video.grid[1]} x "
          f"{vit.video.grid[2]} patches\n{'':14s}" + "".join(f"{column:>18s}" for column in columns))
    for name, row in rows.items():
        print(f"{name:14s}" + "".join(f"{value:18.1f}" for value in row.values()))
    for name, values in heads.items():
        print(f"sounding, by each head, {name}: " + "  ".join(f"{value:.1f}" for value in values))
    add_row(args, {"what": "attention", "data": "toy", "layer": block, "percent": rows, "heads": heads, "N": len(index),
                   "of two": int(two.sum()), "grid": list(vit.video.grid), "step": trained.step,
                   "seconds": round(time.time() - began, 1)})


# ---------------------------------------------------------------------------------------------------------------------
# PCA of the tokens
# ---------------------------------------------------------------------------------------------------------------------

def principal(x, count=3):
    """PCA of x (N, D): (coordinates (N, count), share of the variance of each (count,)). The sign is fixed, as scikit-learn does it: of a
    component's weights the largest is positive. What has fewer than `count` components has zeros for the others."""
    from sklearn.decomposition import PCA               # here: a second to import, for which the other figures need not wait
    fit = PCA(min(count, *x.shape), svd_solver="covariance_eigh" if len(x) > x.shape[1] else "full")
    y = fit.fit_transform(np.asarray(x, np.float64))
    share, more = np.nan_to_num(fit.explained_variance_ratio_), count - y.shape[1]          # not a number: all of x are the same
    return np.pad(y, ((0, 0), (0, more))), np.pad(share, (0, more))


def to_rgb(y):
    """Coordinates (N, 3) -> (N, 3) in 0..1, each component stretched from its 1st to its 99th percentile."""
    # unspecified (AV-JEPA's page): how a component becomes a colour; DINOv2 also fits a second basis, to the foreground of the first
    low, high = np.percentile(y, (1, 99), axis=0)
    return ((y - low) / np.maximum(high - low, 1e-9)).clip(0, 1)


def choose_clips(listing, classes, count, seed):
    """{class: indices of at most `count` of its clips, drawn with the seed}; by default of the first three classes that have any, and of a
    set without classes, of all clips. Raises UserError where a class is unknown or has none."""
    order = np.random.default_rng(seed).permutation(len(listing))
    if listing.labels is None:
        if classes:
            raise UserError("--classes: these clips have no classes; leave it out, or put them into one sub-folder for each class")
        return {"all clips": np.sort(order[:count])}
    by_class = {name: [] for name in listing.classes}
    for i in order:
        for c in listing.clip_labels(i):
            by_class[listing.classes[c]].append(i)
    for name in classes or ():
        if not by_class.get(name):
            there = [name for name, some in by_class.items() if some]
            raise UserError(f"--classes {name}: {listing.name} has no clip of such a class; it has {', '.join(there[:12])}"
                            + (f" and {len(there) - 12:,} more" if len(there) > 12 else ""))
    return {name: np.sort(by_class[name][:count]) for name in classes or [name for name, some in by_class.items() if some][:3]}


def strip_of(frames, ax, label):
    """Draw frames (some, H, W, 3) side by side, a gap between them, and their labels below."""
    height, width = frames.shape[1:3]
    gap = max(1, width // 16)
    ax.imshow(np.concatenate(np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1), 1))
    ax.set_xticks(np.arange(len(frames)) * (width + gap) + (width - 1) / 2, label)
    ax.set(yticks=[], frame_on=False)


def draw_pca(encoder, key, clips, heading):
    """The figure of one modality. clips: {class: [(input (1, ...), tokens (N, D))]}; a basis for each class. Of each clip its input, the
    top three components as red, green and blue, and the first one in grey."""
    inputs, patches, count = data.Inputs(**encoder.inputs), getattr(encoder.vit, key), max(map(len, clips.values()))
    fig = plt.figure(figsize=(max(7, 0.6 + (4.6 if key == "video" else 3.6) * count), 0.8 + 3.5 * len(clips)), layout="constrained")
    head(fig, heading)
    for block, (name, some) in zip(np.atleast_1d(fig.subfigures(len(clips), 1)), clips.items()):
        y, share = principal(torch.cat([tokens for _, tokens in some]).numpy())
        block.suptitle(f"{name}: {', '.join(f'{100 * s:.0f} %' for s in share)} of the variance", fontsize=9)
        axes = block.subplots(3, count, squeeze=False)
        for ax in axes[:, len(some):].flat:
            ax.axis("off")
        for column, (x, _), color in zip(axes.T, some, np.split(to_rgb(y), len(some))):
            color = color.reshape(*patches.grid[:-1], -1, 3)                        # ([T,] rows, columns, 3)
            layers = {"input": None, "components\n1, 2, 3 as RGB": color, "component 1": color[..., :1].repeat(3, -1)}
            for ax, (label, layer) in zip(column, layers.items()):
                bottom = ax is column[-1]
                if key == "video":
                    moments, shown = shown_frames(patches)
                    times = (shown + 0.5) * (inputs.video_seconds or inputs.seconds) / inputs.frames
                    frames = picture_of(x[0])[shown]
                    if layer is not None:               # as large as the frames above it
                        frames = layer[moments].repeat(patches.patch[1], 1).repeat(patches.patch[2], 2)
                    strip_of(frames, ax, [f"{t:.2f}" for t in times] if bottom else [""] * len(times))
                else:
                    image, view = x[0, 0].cpu().numpy(), (0.0, inputs.seconds)
                    columns, span = image.shape[1], mel_extent(inputs, image.shape[1], view)
                    if layer is not None:
                        image, columns_ = layer, layer.shape[1] * patches.patch[1]
                        span = (*mel_extent(inputs, columns_, view)[:2], 0, len(layer) * patches.patch[0])
                    ax.imshow(image, origin="lower", aspect="auto", interpolation="nearest", cmap="gray", extent=span)
                    mel_axes(ax, inputs, columns, view, labels=ax in axes[:, 0])
                ax.tick_params(labelsize=7, labelbottom=bottom)
                if ax in axes[:, 0]:
                    ax.set_ylabel(label + "\nHz" * (key == "audio"), fontsize=8)
            clock = f", at {inputs.frame_rate:g} frames a second" if inputs.frame_rate else ""             # the clip's own may be another
            column[-1].set_xlabel(f"seconds of the {'pictures' if key == 'video' else 'sound'}{clock}", fontsize=8)
    return fig


def pca(args, encoder, process, workers):
    """visualize.py pca: a figure for each modality."""
    inputs = probe.choose_modality(args, encoder.vit, data.Inputs(**encoder.inputs), encoder.method)
    keys, listing = probe.MODALITIES[args.modality], data.list_clips(args.data, args.data_dir, "test")
    chosen, found = choose_clips(listing, args.classes, args.clips, args.seed), {}
    some = sorted({int(i) for indices in chosen.values() for i in indices})
    for index, given, made in probe.encode_clips(encoder, listing.subset(some), inputs, [args.modality], 1, process, workers, "tokens", 1):
        tokens = made[args.modality][0][0].float().cpu()                            # (N, D), the video's first
        parts = tokens.tensor_split([encoder.vit.video.num] if len(keys) == 2 else [])
        found[some[int(index)]] = {key: (given[key], part) for key, part in zip(keys, parts)}
    for name, indices in chosen.items():
        if not any(i in found for i in indices):
            raise UserError(f"--classes {name}: none of the {len(indices)} clips drawn has all of {', '.join(keys)}; give another --seed "
                            "or --modality")
    for key in keys:
        clips = {name: [found[i][key] for i in indices if i in found] for name, indices in chosen.items()}
        together = ", seen and heard together" * (len(keys) == 2)
        heading = title(encoder, args, f"{args.data}, PCA of the last layer's {key} tokens{together}, one basis for each class")
        fig = draw_pca(encoder, key, clips, heading)
        print(save(args, f"pca-{args.data}-{key}{'' if len(keys) == 2 else '-alone'}{variant(args)}", fig))


# ---------------------------------------------------------------------------------------------------------------------
# A map of the clips
# ---------------------------------------------------------------------------------------------------------------------

def read_groups(path, classes):
    """{class: group} of a csv with the columns class and group. Raises UserError where it names a class that is none."""
    groups = dict(data.read_columns(Path(path), "class", "group"))
    unknown = next((name for name in groups if name not in classes), None)
    if unknown is not None:
        raise UserError(f"--groups {path}: the set has no class {unknown!r}; give its classes by their names")
    return groups


def neighbours(x, labels, count=10):
    """Of the `count` nearest (Euclidean) of each of x (N, D), how many have its label, and how many would by chance, in percent."""
    x, labels = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(labels)
    near = torch.cdist(x, x).fill_diagonal_(math.inf).topk(min(count, len(x) - 1), largest=False).indices       # (N, count)
    same = labels[:, None] == labels
    return 100 * same.gather(1, near).float().mean().item(), 100 * ((same.sum(1) - 1) / (len(x) - 1)).mean().item()


def draw_map(planes, groups, names, hollow, lines, heading):
    """Planes {name: (axis labels, (N, 2))} side by side; groups (N,): a colour and a marker for each of names, not filled where hollow
    (N,); lines: pairs of points that are joined."""
    fig, axes = plt.subplots(1, len(planes), figsize=(6.2 * len(planes), 6 + 0.25 * math.ceil(len(names) / 6)), layout="constrained")
    head(fig, heading)
    styles = [(plt.get_cmap("tab10").colors[g % 10], MARKERS[g % len(MARKERS)]) for g in range(len(names))]
    if len(names) > 60:                                 # no two of 60 are the same
        styles = len(names) * [("0.3", ".")]
    for ax, (name, (labels, xy)) in zip(axes, planes.items()):
        for pair in lines:
            ax.plot(*xy[list(pair)].T, color="0.7", lw=0.6, zorder=1)
        for g, (color, marker) in enumerate(styles):
            for empty in (False, True):
                at = (groups == g) & (hollow == empty)
                ax.plot(*xy[at].T, marker, color=color, mfc="w" if empty else color, ms=5, mew=0.9, zorder=2)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(labels[0], fontsize=9), ax.set_ylabel(labels[1], fontsize=9)
        ax.tick_params(labelsize=8)
    legend = {name: plt.Line2D([], [], color=color, marker=marker, ls="") for name, (color, marker) in zip(names, styles)
              if name and len(names) <= 60}
    if hollow.any():
        legend.update({name: plt.Line2D([], [], color="k", marker="o", mfc=fill, ls="") for name, fill in
                       (("filled: by the sound", "k"), ("hollow: by the pictures", "w"))})
    if legend:
        fig.legend(legend.values(), legend, loc="outside lower center", ncols=min(6, len(legend)), fontsize=8)
    return fig


def group_clips(listing, path):
    """(names of the groups, group of each clip (N,), -1: not to be drawn): its class (of several the rarest), or the group of its class by
    the csv at `path` (of several that it names the rarest); all are one where there are no classes."""
    if listing.labels is None:
        if path:
            raise UserError("--groups: these clips have no classes; put them into one sub-folder for each class")
        return [""], np.zeros(len(listing), int)
    groups = read_groups(path, listing.classes) if path else {name: name for name in listing.classes}
    names = list(dict.fromkeys(groups.values()))
    of_class = np.array([names.index(groups[name]) if name in groups else -1 for name in listing.classes] + [-1])       # [-1]: no label
    return names, of_class[retrieval.rarest(listing, np.flatnonzero(of_class[:-1] >= 0))]


def map_clips(args, encoder, process, workers):
    """visualize.py map: the figure, the csv, and where there are classes how well they lie together."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    if args.pairs and (args.data in data.SOUNDS + data.SILENT or None in (encoder.vit.video, encoder.vit.audio)):
        raise UserError("--pairs needs an encoder and a set with both sound and pictures; leave it out")
    if args.pairs and args.modality:
        raise UserError("--pairs takes sound and pictures apart; leave --modality out")
    embedding, inputs = retrieval.choose_embedding(encoder, args.embedding), data.Inputs(**encoder.inputs)
    if not args.pairs:                                  # of pictures alone the seconds change
        inputs = probe.choose_modality(args, encoder.vit, inputs, encoder.method)
    modalities = ["audio", "video"] if args.pairs else [args.modality]
    listing = data.list_clips(args.data, args.data_dir, "test")
    names, group = group_clips(listing, args.groups)
    some = np.random.default_rng(args.seed).permutation(np.flatnonzero(group >= 0))
    some, index, parts = np.sort(some[:args.clips]), [], {m: [] for m in modalities}
    if len(some) < 5:
        raise UserError(f"{listing.name}: {len(some)} held-out clips{' of the classes of --groups' * bool(args.groups)}; a map needs at "
                        "least 5")
    if len(names) > 60:
        print(f"{len(names)} classes are too many for colours and a legend; --groups puts them into families, or draws some of them alone")
    for i, _, made in probe.encode_clips(encoder, listing.subset(some), inputs, modalities, 1, process, workers, "embed"):
        index.append(some[i])
        for m, (_, z) in made.items():
            parts[m].append((encoder.projector(z.float()) if embedding == "projected" else z.float()).cpu())       # (B, D)
    n = sum(map(len, index))
    if n < 5:
        raise UserError(f"{listing.name}: {n} clips have all that {' and '.join(modalities)} needs; a map needs at least 5")
    index = np.tile(np.concatenate(index), len(modalities))                         # (M n,), as all below
    x, of = torch.cat([part for m in modalities for part in parts[m]]).numpy(), np.repeat(modalities, n)
    g = group[index]

    print(f"t-SNE of {len(x):,} points", flush=True)
    tsne = TSNE(2, init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=args.seed, verbose=2 * (len(x) > 500)).fit_transform(x)
    flat, share = principal(x, 2)
    planes = {"t-SNE": (("t-SNE 1 (no unit)", "t-SNE 2 (no unit)"), tsne),
              "PCA": ([f"component {k + 1} ({100 * s:.0f} % of the variance)" for k, s in enumerate(share)], flat)}
    numbers = {}
    for m in modalities:
        if 1 < len(np.unique(g[of == m])) < n:
            for space, z in (("embedding", x), ("t-SNE", tsne), ("PCA", flat)):
                near, luck = neighbours(z[of == m], g[of == m])
                shape = float(silhouette_score(z[of == m], g[of == m]))
                numbers[f"{m}, {space}"] = {"neighbours": near, "chance": luck, "silhouette": shape}
                print(f"{m}, {space}: {near:.1f} % of a clip's 10 nearest are of its {'group' if args.groups else 'class'} (chance "
                      f"{luck:.1f}), silhouette {shape:.2f}")

    what = {"av": "by sound and pictures together", "audio": "by sound", "video": "by pictures", None: "by sound and by pictures"}
    kind = "projected" if embedding == "projected" else "clip"
    heading = title(encoder, args, f"{n:,} clips of {args.data} {what[args.modality]}, {kind} embedding")
    fig = draw_map(planes, g, names, of != modalities[0], [(i, n + i) for i in range(n)] if args.pairs else (), heading)
    name = f"map-{args.data}-{'pairs' if args.pairs else args.modality}{'-projected' * (embedding == 'projected')}" + variant(args)

    def fill(f):
        text = io.TextIOWrapper(f, "utf-8", errors="replace", newline="")
        rows = csv.writer(text)
        rows.writerow(("file", "class", "group", "modality", "tsne_1", "tsne_2", "pca_1", "pca_2"))
        for i, *row in zip(index, [names[k] for k in g], of, *tsne.T, *flat.T):
            labels = [] if listing.labels is None else [listing.classes[c] for c in listing.clip_labels(i)]
            rows.writerow((listing.path(i), " / ".join(labels), *row))
        text.detach()

    file = write(args, f"{name}.csv", fill)
    add_row(args, {"what": "map", "data": args.data, "modality": args.modality, "pairs": args.pairs, "embedding": embedding,
                   "untrained": args.untrained, "groups": args.groups, "N": n, "left_out": len(some) - n, **numbers, "seed": args.seed,
                   "step": encoder.step})
    print(f"{save(args, name, fig)}\n{file}")


# ---------------------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------------------

def curves(args):
    """visualize.py curves: several runs in one picture, which goes into the folder of the first."""
    runs = {}
    for run in dict.fromkeys(args.runs):
        rows = [row for row in common.read_log(run) if isinstance(row, dict) and isinstance(row.get("step"), int)]
        if not any(key != "step" and row[key] for row in rows for key in row):
            raise UserError(f"{run}: has no log.jsonl with a row in it; give the folder of a run")
        content = common.load_checkpoint(run) if (Path(run) / "latest.pt").is_file() else None
        what = f"{NAMES.get(content['method'], content['method'])}, {content['args']['data']}, " if content else ""
        runs[f"{what}{run}, step {rows[-1]['step'] + 1:,}"] = rows
    args.ckpt, heading = args.runs[0], next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs"
    if any("know_nothing" in key for rows in runs.values() for key in rows[-1]):
        heading += "; thin and dotted: the loss of a predictor that knows nothing"
    print(write(args, "curves.png" if len(runs) == 1 else f"curves-of-{len(runs)}.png", lambda f: common.draw_curves(f, runs, heading)))


# ---------------------------------------------------------------------------------------------------------------------

def load(args, process, untrained=False):
    """The encoder that the flags ask for."""
    return common.load_encoder(args.ckpt, process.device, untrained or args.untrained, weights=args.encoder)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, formatter_class=common.Help).add_argument

    def encoder_flags(add):
        add("--ckpt", required=True, help="folder of a run, or its latest.pt")
        add("--untrained", action="store_true", help="the same encoder as it was initialised, for comparison")
        add("--encoder", choices=("context", "target"), help="of a method that has both; default: the one that it evaluates")
        add("--data-dir", help="folder with the clips and the csv files")
        add("--out", help="folder for the files (default: the run's)")
        add("--workers", type=int, help="processes that decode")
        add("--device", default="auto", help="auto, cpu, mps or cuda")

    def set_flags(add, most, text):
        add("--data", required=True, help=", ".join(data.NAMES))
        add("--modality", choices=tuple(probe.MODALITIES), help="default: all that the encoder takes and the set has")
        add("--clips", type=int, default=most, help=text)
        add("--seed", type=int, default=0, help="of the choice of clips, and of t-SNE")

    add = command("attention", "audio -> video and video -> audio attention: of a clip, as a picture and a film; or how often it finds the "
                  "toy's sounding object")
    encoder_flags(add)
    add("--clip", help="a file with sound and pictures")
    add("--data", choices=("toy",), help="in place of --clip: where what sounds is known")
    add("--heads", choices=("mean", "each"), default="mean", help="averaged, or one by one")
    add("--layer", type=int, default=-1, help="block, from 0; -1 is the last one")
    add = command("pca", "PCA of the last layer's tokens, one basis for each class, the top three components as colours")
    encoder_flags(add), set_flags(add, 3, "clips of each class")
    add("--classes", nargs="+", help="names of classes (default: the first three)")
    add = command("map", "clips in the plane, by t-SNE and by PCA, and their coordinates in a csv")
    encoder_flags(add), set_flags(add, 5000, "at most so many")
    add("--pairs", action="store_true", help="each clip twice, by its sound and by its pictures, joined by a line")
    add("--groups", help="a csv with the columns class and group: colours for groups, and these classes alone")
    add("--embedding", choices=("encoder", "projected"), default="encoder", help="encoder: CLS, or the mean of the tokens; projected: "
        "where the loss was taken (AV-JEPA)")
    add = command("curves", "losses and health of one or several runs, from their logs")
    add("runs", nargs="+", metavar="RUN", help="folder of a run")
    add("--out", help="folder for the file (default: the first run's)")
    args = parser.parse_args(argv)
    if args.what == "curves":
        return args
    check = common.check_range
    check("--workers", args.workers or 0, 0, 1024)
    if args.what != "attention":
        check("--seed", args.seed, 0, 2 ** 31), check("--clips", args.clips, 1, 10 ** 7)
    if args.what == "attention" and bool(args.clip) == bool(args.data):
        raise UserError("attention: give either --clip FILE, or --data toy")
    if args.what == "attention":
        for flag, given, needs in (("--untrained", args.untrained and args.data, "--clip, since --data toy has both encoders"),
                                   ("--heads", args.heads == "each" and args.data, "--clip, since --data toy has each head"),
                                   ("--data-dir", args.data_dir and args.clip, "--data toy")):
            if given:
                raise UserError(f"{flag} has no effect without {needs}")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.what == "curves":
        return curves(args)
    process = common.start_process(args.device)
    if process.world > 1:
        raise UserError("visualize.py runs in one process; start it without torchrun")
    workers = common.default_workers(process) if args.workers is None else args.workers
    encoder = load(args, process)
    if args.what != "attention":
        return {"pca": pca, "map": map_clips}[args.what](args, encoder, process, workers)
    common.check_range("--layer", args.layer, -1, len(encoder.vit.transformer.blocks) - 1)
    if encoder.vit.video is None or encoder.vit.audio is None:
        raise UserError(f"{args.ckpt}: this {encoder.method} encoder takes one modality only; attention between the two needs both")
    attention_of_clip(args, encoder, process) if args.clip else attention_on_toy(args, encoder, process, workers)


if __name__ == "__main__":
    main_guard(main)
