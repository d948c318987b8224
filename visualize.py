"""See what an encoder has learnt: attention between sound and pictures, PCA of its tokens, a map of its clips
and the curves of its runs, with what probes and retrieval found at their steps.

    python visualize.py attention --ckpt RUN --clip dog.mp4       # a picture, and an mp4 with the sound
    python visualize.py attention --ckpt RUN --data vggsound --data-dir vggsound/ --clips 2     # of a set
    python visualize.py attention --ckpt RUN --data toy           # how often the peak is what sounds
    python visualize.py pca --ckpt RUN --data vggsound --data-dir vggsound/ --classes "dog barking" airplane
    python visualize.py map --ckpt RUN --data folder --data-dir clips/ --pairs      # t-SNE and PCA, and a csv
    python visualize.py map --ckpt RUN RUN2 --data SET --data-dir FOLDER --split all --classes families.csv
    python visualize.py curves runs/ajepa-toy-seed0 runs/ajepa-toy-seed1

Any checkpoint of ours will do, as far as it takes what is to be drawn; several stand side by side, with the
same clips. Files go into the first run's folder, or into --out; numbers into rows of visualize.jsonl there.
Attention, PCA and map are those of AV-JEPA's page (its last three sections).
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import contextlib
import csv
import functools
import io
import math
import os
import re
import textwrap
import time
from fractions import Fraction
from pathlib import Path

import av
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import common
import data
import features
import retrieval
import run
from common import UserError, check_range, main_guard

MARKERS = "osD^v<>PX*ph"
LONGEST = 300                                           # seconds of a clip whose attention is drawn


def captions(encoders, args):
    """What stands above the column of each encoder: its method, checkpoint and step."""
    found = []
    for encoder in encoders:
        state = "untrained" if args.untrained else f"step {encoder.step:,}"
        found.append(f"{encoder.method['title']}, {encoder.ckpt}, {state}")
    return found


def make_figure(encoders, args, width, height, heading):
    """(a figure that says what is drawn of which data, its columns: one for each encoder, of this width in
    inches)."""
    whole = len(encoders) * width
    fig = Figure(figsize=(whole, height), layout="constrained")
    lines = [textwrap.fill(line, int(11 * whole)) for line in heading.split("\n")]
    fig.suptitle("\n".join(lines), fontsize=10)
    columns = np.atleast_1d(fig.subfigures(1, len(encoders)))
    for column, label in zip(columns, captions(encoders, args)):
        column.suptitle(textwrap.fill(label, int(11 * width)), fontsize=9)
    return fig, columns


def folder_of(args):
    """The folder for the files: --out, which is made, or the first run's."""
    folder = Path(args.out or args.ckpt[0])
    if not args.out and not folder.is_dir():
        folder = folder.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be made ({e.strerror})") from None
    return folder


def write(args, name, fill):
    """fill(file) a file of that name; whoever is killed leaves the old one. Returns its path."""
    path = folder_of(args) / name
    features.write_file(path, fill, "give another --out")
    return path


def save(args, name, fig):
    """Write a figure as NAME.png. Returns the path."""
    return write(args, f"{name}.png", lambda file: fig.savefig(file, format="png", dpi=110))


def variant(args):
    """What a file's name says of the encoders, if it is not the one that the method evaluates."""
    name = f"-{args.encoder}" if args.encoder else ""
    if args.untrained:
        name += "-untrained"
    return f"{name}-of-{len(args.ckpt)}" if len(args.ckpt) > 1 else name


def add_row(args, encoder, row):
    """A row of visualize.jsonl beside the figures."""
    row.update(step=encoder.step, encoder=args.encoder, version=run.code_version(), ckpt=str(encoder.ckpt))
    run.add_row(folder_of(args), "visualize.jsonl", row)


def picture_of(video):
    """What the encoder saw, (..., 3, T, H, W) normalised -> (..., T, H, W, 3) in 0..1."""
    mean = torch.tensor(data.IMAGENET_MEAN)
    std = torch.tensor(data.IMAGENET_STD)
    x = video.movedim(-4, -1).float().cpu() * std + mean
    return x.clamp(0, 1).numpy()


def shown_frames(vit):
    """At most four tubelets, evenly spread, and a frame in the middle of each: two arrays of indices."""
    length = vit.patch["video"][0]
    moments = np.linspace(0, vit.grids["video"][0] - 1, 4)
    moments = np.unique(moments.round().astype(int))
    return moments, moments * length + length // 2


def mel_extent(inputs, columns, span):
    """(left, right, bottom, top) of `columns` mel frames, in seconds and bins. span: (start, length in
    seconds) of the view."""
    start, seconds = span
    if inputs.interpolate and inputs.columns:
        whole = inputs.columns
    else:
        whole = inputs.seconds * inputs.sample_rate / inputs.hop
    return start, start + seconds * columns / whole, 0, inputs.n_mels


def token_extent(vit, inputs, tokens, span):
    """mel_extent of a map of audio tokens (F, T)."""
    height, width = vit.patch["audio"]
    left, right, _, _ = mel_extent(inputs, tokens.shape[1] * width, span)
    return left, right, 0, tokens.shape[0] * height


def mel_axes(ax, inputs, columns, span, labels=True):
    """Axes in seconds and Hz for what was drawn with mel_extent."""
    nyquist = inputs.sample_rate / 2
    ticks = [hertz for hertz in (250, 1000, 2000, 4000, 8000, 16000) if hertz < nyquist]
    top_mel = math.log10(1 + nyquist / 700)             # HTK's scale, as the filters'
    mel = [math.log10(1 + hertz / 700) / top_mel for hertz in ticks]
    bins = [m * (inputs.n_mels + 1) - 0.5 for m in mel]
    ax.set_yticks(bins, [str(hertz) for hertz in ticks] if labels else [])
    ax.tick_params(labelsize=7)
    left, right, bottom, top = mel_extent(inputs, columns, span)
    ax.set(xlim=(left, right), ylim=(bottom, top))


# ----------------------------------------------------------------------------------------------------------
# Attention between sound and pictures
# ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def cross_attention(vit, video, audio, layer=-1):
    """What the sound looks at, and what the pictures listen to, in one block.

    Audio -> video attention (B, heads, T, H, W), the mean over the audio tokens, and video -> audio (B,
    heads, F, T), the mean over the video tokens; both on the grids of the tokens. Not normalised: the rest
    of a token's attention stays within its own modality and CLS."""
    weights = vit.attention_weights(video, audio, layer)                        # (B, heads, [1 +] N, [1 +] N)
    if vit.cls is not None:
        weights = weights[:, :, 1:, 1:]                                         # (B, heads, N, N)
    pictures = vit.num("video")
    # unspecified (AV-JEPA's page): the mean over all tokens that look, not those of the same moment alone
    seen = weights[:, :, pictures:, :pictures].mean(2)                          # (B, heads, video tokens)
    heard = weights[:, :, :pictures, pictures:].mean(2)                         # (B, heads, audio tokens)
    columns = audio.shape[-1] // vit.patch["audio"][1]
    return seen.unflatten(2, vit.grids["video"]), heard.unflatten(2, (-1, columns))


def spans_of(duration, inputs):
    """Views one after the other whose pictures cover `duration` seconds, each with the sound around them:
    [((start, length) of the sound, (start, length) of the pictures)]."""
    length = inputs.video_seconds or inputs.seconds
    last = max(0.0, duration - length)
    last_sound = max(0.0, duration - inputs.seconds)
    spans = []
    for n in range(max(1, math.ceil(duration / length - 1e-3))):
        start = min(n * length, last)
        sound = max(0.0, start + (length - inputs.seconds) / 2)
        spans.append(((min(sound, last_sound), inputs.seconds), (start, length)))
    return spans


def whole_clip(path, inputs):
    """A clip as views that cover it: (load_views of them, their spans_of in seconds of the clip's clock).
    Raises ClipError where it is too long to hold in memory."""
    spans = []

    def plan(duration):                                 # in seconds of inputs.frame_rate, where that is set
        if duration > LONGEST:
            raise data.ClipError(f"{path}: is too long; cut out a part of at most {LONGEST // 60} minutes")
        spans.extend(spans_of(duration, inputs))
        return [pictures for _, pictures in spans], [sound for sound, _ in spans]

    views = data.load_views(path, inputs, plan)
    with data.open_clip(path, inputs.frame_rate) as clip:
        spans = np.array(spans) * clip.stretch          # (V, sound and pictures, start and length)
    return views, spans.tolist()


def light(picture, heat):
    """A picture (H, W, 3) in 0..1 lit by its attention (h, w) in 0..1: bright where there is much, dark
    where there is none."""
    heat = torch.from_numpy(np.float32(heat))[None, None]
    heat = F.interpolate(heat, picture.shape[:2], mode="bilinear")[0, 0].numpy()                    # (H, W)
    return picture * (0.1 + 0.9 * heat[..., None])


def draw_lit(ax, frame, heat, largest):
    """A frame (H, W, 3) lit by its attention (h, w), and a cross where there is most."""
    ax.imshow(light(frame, heat / largest))
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    y = (row + 0.5) * frame.shape[0] / heat.shape[0] - 0.5
    x = (column + 0.5) * frame.shape[1] / heat.shape[1] - 0.5
    ax.plot(x, y, "w+", ms=11, mew=3)
    ax.plot(x, y, "k+", ms=10, mew=1)


def draw_sound(ax, image, extent, label, vmin=None):
    """A mel, or a map over it, in grey, with its bar."""
    drawn = ax.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="gray", vmin=vmin)
    ax.figure.colorbar(drawn, ax=ax).set_label(label, fontsize=7)
    ax.set_ylabel("Hz", fontsize=8)


def outline_loud(ax, mel, extent):
    """Lines around what is loud in a mel."""
    columns = np.linspace(*extent[:2], 2 * mel.shape[1] + 1)[1::2]              # the middles of its frames
    bins = np.arange(len(mel)) + 0.5
    loud = np.percentile(mel, 85)
    ax.contour(columns, bins, mel, levels=[loud], colors="tab:orange", linewidths=0.5)


def draw_attention(fig, encoder, views, spans, number, maps):
    """View `number` in its part of the figure: its pictures and its mel in the first row; below, a row for
    each of maps [(name, audio -> video attention (V, T, H, W), video -> audio attention (V, F, T))], the
    pictures lit by it, and it with the outline of what is loud."""
    vit = encoder.vit
    inputs = data.Inputs(**encoder.inputs)
    sound, (start, seconds) = spans[number]
    mel = views["audio"][number, 0].cpu().numpy()                               # (n_mels, columns)
    extent = mel_extent(inputs, mel.shape[1], sound)
    moments, shown = shown_frames(vit)
    frames = picture_of(views["video"][number])[shown]                          # (moments, H, W, 3)
    times = start + (shown + 0.5) * seconds / inputs.frames

    widths = [1] * len(moments) + [2]
    axes = fig.subplots(len(maps) + 1, len(widths), squeeze=False, width_ratios=widths)
    for ax, frame, second in zip(axes[0], frames, times):
        ax.imshow(frame)
        ax.set_title(f"{second:.2f} s", fontsize=9)
    axes[0, 0].set_ylabel("input", fontsize=9)
    draw_sound(axes[0, -1], mel, extent, "log mel, normalised")
    for row, (name, seen, heard) in zip(axes[1:], maps):
        for ax, frame, heat in zip(row, frames, seen[number][moments]):
            draw_lit(ax, frame, heat, seen[number].max())
        row[0].set_ylabel(name, fontsize=9)
        outline_loud(row[-1], mel, extent)
        heat = heard[number] / heard[number].max()
        draw_sound(row[-1], heat, token_extent(vit, inputs, heat, sound), "share of the largest", vmin=0)
    for ax in axes[:, :-1].flat:
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, -1]:
        mel_axes(ax, inputs, mel.shape[1], sound)
    axes[-1, -1].set_xlabel("seconds", fontsize=8)


def text_image(text, width):
    """Lines of text as an image (h, width, 3) uint8, h even."""
    lines = text.split("\n")
    longest = max(map(len, lines))
    fig = Figure(figsize=(width / 100, 0.16 * (len(lines) + 1)), dpi=100)
    fig.text(0.01, 0.5, text, va="center", fontsize=min(8, 1.15 * width / longest))
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[:, :width, :3]
    more = (0, image.shape[0] % 2), (0, width - image.shape[1]), (0, 0)
    return np.pad(image, more, constant_values=255)


class Film:
    """An mp4 that is written frame by frame into an open container, as a clip of these two streams has
    them; a text stands above its pictures."""
    def __init__(self, container, video, sound, text):
        self.container = container
        self.text = text
        self.above = None                               # the text as an image, from the first picture on
        self.last = -1                                  # time stamp of the last picture
        self.waiting = []                               # packets
        coding = {"crf": "20", "preset": "veryfast"}
        self.pictures = container.add_stream("libx264", rate=video.average_rate or 25, options=coding)
        self.pictures.pix_fmt = "yuv420p"
        self.pictures.codec_context.time_base = Fraction(1, 90000)
        self.pictures.codec_context.thread_count = 1
        layout = "mono" if sound.codec_context.channels == 1 else "stereo"
        self.sound = container.add_stream("aac", rate=48000, layout=layout)
        self.resampler = av.AudioResampler("fltp", layout, 48000)

    def add_sound(self, frame, now):
        """A decoded frame of sound, at `now` seconds."""
        frame.pts = round(now / frame.time_base)
        for part in self.resampler.resample(frame):
            self.waiting += self.sound.encode(part)
        self.mux()

    def add_picture(self, image, now):
        """A picture (H, W, 3) uint8 of even sides, at `now` seconds."""
        if self.above is None:
            self.above = text_image(self.text, image.shape[1])
            self.pictures.width = image.shape[1]
            self.pictures.height = image.shape[0] + len(self.above)
        frame = av.VideoFrame.from_ndarray(np.concatenate([self.above, image]), "rgb24")
        frame.time_base = self.pictures.codec_context.time_base
        frame.pts = max(self.last + 1, round(now * 90000))
        self.last = frame.pts
        self.waiting += self.pictures.encode(frame)
        self.mux()

    def mux(self):
        """Write what waits. That opens both streams, and the one of the pictures needs its size before."""
        if self.above is not None:
            self.container.mux(self.waiting)
            self.waiting = []

    def finish(self):
        """Write what the encoders still hold."""
        if self.above is None:
            raise ValueError("none of its pictures decodes")
        self.container.mux(self.pictures.encode(None))
        for part in self.resampler.resample(None):
            self.container.mux(self.sound.encode(part))
        self.container.mux(self.sound.encode(None))


def write_film(path, file, maps, text):
    """The clip `path` as an mp4 with its sound, into an open file: the picture, and beside it the picture
    lit by each of the maps [(moments (M,), heat (M, H, W), crop)], which move with it. moments: seconds,
    increasing; heat in 0..1 at these; crop: the side of the square in the middle that it covers, as a share
    of the short side."""
    look = "{l_bar}{bar}| {n:.1f}/{total:.1f} s [{elapsed}]"
    reformatter = av.video.reformatter.VideoReformatter()
    with data.open_clip(path) as clip, av.open(file, "w", format="mp4") as container:
        clip.budget = math.inf                          # to write a film takes longer than a clip may cost
        aspect = data.pixel_aspect(clip.video)
        film = Film(container, clip.video, clip.audio, text)
        bar = tqdm(total=clip.seconds, desc="film", bar_format=look)
        for stream, now, frame in clip.frames((clip.video, clip.audio)):
            if stream.type == "audio":
                film.add_sound(frame, now)
                continue
            tiles = lit_tiles(frame, now, maps, reformatter, aspect)
            film.add_picture(np.concatenate(tiles, 1), now)
            bar.update(max(0, min(now, bar.total) - bar.n))
        bar.close()
        film.finish()


def at_time(maps, moments, now):
    """Maps (M, h, w) at the moments (M,) -> (h, w) at the time `now`, linearly between two of them."""
    patches = maps.reshape(len(maps), -1).T             # (h w, M)
    values = [np.interp(now, moments, patch) for patch in patches]
    return np.reshape(values, maps.shape[1:])


def lit_tiles(frame, now, maps, reformatter, aspect=1.0):
    """A decoded frame, and the same lit by each of the maps at its time: a list of (H, W, 3) uint8 of even
    sides. As write_film; aspect: of a pixel."""
    small = min(frame.width * aspect, frame.height)
    large = max(frame.width * aspect, frame.height)
    widest = 4000 * small / (large * (len(maps) + 1))   # a film of at most some 4,000 pixels
    size = int(min(480, max(240, small), widest))
    image = data.picture(frame, max(16, size), reformatter, aspect) / np.float32(255)
    height = image.shape[0] // 2 * 2
    width = image.shape[1] // 2 * 2
    image = image[:height, :width]
    tiles = [image]
    for moments, heat, crop in maps:
        side = round(min(height, width) * crop)
        top = (height - side) // 2
        left = (width - side) // 2
        square = slice(top, top + side), slice(left, left + side)
        tile = light(image, np.zeros((1, 1)))           # dark outside of what the encoder saw
        tile[square] = light(image[square], at_time(heat, moments, now))
        tiles.append(tile)
    return [(255 * tile).astype(np.uint8) for tile in tiles]


def attend(encoder, views, args, process, clip):
    """The attention of each view: maps [(name, audio -> video (V, T, H, W), video -> audio (V, F, T))],
    the mean of the heads or one map for each."""
    seen = []
    heard = []
    for n in tqdm(range(len(views["video"])), desc="attention", unit="view"):
        video = views["video"][n:n + 1].to(process.device)
        audio = views["audio"][n:n + 1].to(process.device)
        to_video, to_audio = cross_attention(encoder.vit, video, audio, args.layer)
        retrieval.check_finite(to_video, [clip])
        seen.append(to_video.cpu())
        heard.append(to_audio.cpu())
    seen = torch.cat(seen).numpy()                      # (V, heads, T, H, W)
    heard = torch.cat(heard).numpy()                    # (V, heads, F, T)
    if args.heads == "mean":
        return [("mean of heads", seen.mean(1), heard.mean(1))]
    return [(f"head {h}", seen[:, h], heard[:, h]) for h in range(seen.shape[1])]


def film_maps(encoder, spans, maps):
    """The maps of all views of a clip one after the other, as write_film takes them."""
    inputs = data.Inputs(**encoder.inputs)
    length = encoder.vit.grids["video"][0]
    moments = []                                        # seconds, the middles of the tubelets of each view
    for _, (start, seconds) in spans:
        moments += [start + (k + 0.5) * seconds / length for k in range(length)]
    order = np.argsort(moments, kind="stable")          # the last two views may overlap
    moments = np.array(moments)[order]
    found = []
    for _, seen, _ in maps:
        heat = seen.reshape(-1, *seen.shape[2:])                                # (M, H, W)
        found.append((moments, heat[order] / seen.max(), inputs.size / inputs.resize))
    return found


def attention_of_clip(args, encoders, process, clip, name, title):
    """The picture of the middle view of the clip at this path, and the film of all of it, as files of that
    name. Raises ClipError where the clip allows of none."""
    title = title.encode(errors="replace").decode()     # a file's name may be no UTF-8
    if not data.is_clip(clip):
        raise data.ClipError(f"{clip}: there is no such file")
    seen = []                                           # of each encoder: its views, their spans, its maps
    for encoder in encoders:
        views, spans = whole_clip(clip, data.Inputs(**encoder.inputs))
        for key, lack in (("video", "picture"), ("audio", "sound")):
            if key not in views:
                raise data.ClipError(f"{clip}: has no {lack}, so there is no attention between the two; "
                                     "it takes a clip that has both")
        seen.append((views, spans, attend(encoder, views, args, process, clip)))
    name = f"attention-{name}"
    if args.layer != -1:
        name += f"-block{args.layer}"
    if args.heads == "each":
        name += "-heads"
    name += variant(args)

    block = "the last block" if args.layer == -1 else f"block {args.layer}"
    what = f"attention in {block} of the sound to the pictures"
    heading = (f"{what} (bright: much; cross: the most) and\n"
               f"of the pictures to the sound (bright: much; outlined: what is loud), {title}")
    frames = max(len(shown_frames(encoder.vit)[0]) for encoder in encoders)
    rows = max(len(maps) for _, _, maps in seen)
    fig, columns = make_figure(encoders, args, 2 * frames + 5, 2.9 + 2.1 * rows, heading)
    for column, encoder, (views, spans, maps) in zip(columns, encoders, seen):
        draw_attention(column, encoder, views, spans, len(spans) // 2, maps)
    print(save(args, name, fig))

    heads = "each head" if args.heads == "each" else "mean of heads"
    text = "\n".join([f"{what}, {heads}: {title}", *captions(encoders, args)])
    lit = []
    for encoder, (_, spans, maps) in zip(encoders, seen):
        lit += film_maps(encoder, spans, maps)
    film = folder_of(args) / f"{name}.mp4"
    try:
        run.replace_file(film, lambda file: write_film(clip, file, lit, text))
    except (av.error.FFmpegError, OSError, ValueError) as e:
        error = data.ClipError if isinstance(e, ValueError) else UserError      # this clip alone, or the disk
        raise error(f"{film}: the film could not be made ({e})") from None
    print(film)


def attention_of_set(args, encoders, process):
    """attention --data: held-out clips of a set, as attention_of_clip; names those that allow of none."""
    listing = data.list_clips(args.data, args.data_dir, "test")
    classes = choose_clips(listing, args.classes, args.clips, args.seed or 0)
    drawn = dict.fromkeys(np.concatenate(list(classes.values())).tolist())      # a clip may be of several
    shown = 0
    for i in drawn:
        stem = re.sub(r"[^\w-]+", "_", Path(listing.file(i)).stem, flags=re.ASCII)
        name = f"{args.data}-{i}-{stem[-100:]}"         # several classes may have a file of that stem
        try:
            attention_of_clip(args, encoders, process, Path(listing.path(i)), name, listing.file(i))
            shown += 1
        except data.ClipError as e:
            print(f"bad clip: {e}")
    if not shown:
        raise UserError(f"--data {args.data}: none of the clips drawn can be shown, for the reasons above; "
                        "give another --seed, other --classes or more --clips")


def touched(places, times, grid, crop):
    """Which patches hold an object's centre while they are shown: (T, H, W) bool of the grid. places
    (frames, 2): its x and y in 0..1 at each of the clip's frames, NaN where there is none; times (T,
    frames of a tubelet): which of these are shown; crop: as write_film."""
    _, height, width = grid
    mask = np.zeros(grid, bool)
    for moment, frames in enumerate(times):
        for x, y in (places[frames] - 0.5) / crop + 0.5:
            if 0 <= x < 1 and 0 <= y < 1:               # False for NaN
                mask[moment, int(y * height), int(x * width)] = True
    return mask


def hits(heat, target):
    """How often the largest of a map lies on the target: heat (N, T, H, W), target the same, bool ->
    percent of the moments T of all N that have a target. Of several largest the first counts."""
    if not target.any():
        return math.nan
    heat = heat.reshape(*heat.shape[:2], -1)                                    # (N, T, H W)
    target = target.reshape(*target.shape[:2], -1)
    peak = heat.argmax(2)[..., None]                                            # (N, T, 1)
    hit = np.take_along_axis(target, peak, 2)[..., 0]                           # (N, T)
    return 100 * float(hit[target.any(2)].mean())


def toy_frames(inputs):
    """Which frames of a toy clip its middle view shows, by what the reader does: (frames,) indices."""
    fps = data.TOY["fps"]
    stretch = inputs.frame_rate / fps if inputs.frame_rate else 1.0             # as the reader's
    view, = data.even_views(1, inputs, None, data.TOY["seconds"] / stretch)
    start, seconds = view.pictures or view[:2]
    times = start + (np.arange(inputs.frames) + 0.5) * seconds / inputs.frames
    frames = np.floor(times * stretch * fps + 1e-5).astype(int)
    return frames.clip(0, round(data.TOY["seconds"] * fps) - 1)


def toy_targets(vit, inputs, index):
    """Where the sounding and the silent object of the toy's test clips are: two (N, T, H, W) bool."""
    times = toy_frames(inputs).reshape(vit.grids["video"][0], -1)
    sounding = []
    silent = []
    for i in tqdm(index, desc="where the objects are", unit="clip"):
        # toy_clip is a pure function, so this holds for clips that an older version wrote, too
        _, _, truth = data.toy_clip(data.TOY["seed"], "test", i)
        for masks, key in ((sounding, "place"), (silent, "silent_place")):
            masks.append(touched(truth[key], times, vit.grids["video"], inputs.size / inputs.resize))
    return np.stack(sounding), np.stack(silent)


def toy_maps(args, encoders, process, workers):
    """(audio -> video attention of each encoder {name: (N, heads, T, H, W)}, index of the toy's test clips
    [N])."""
    inputs = data.Inputs(**encoders["trained"].inputs)
    listing = data.list_clips("toy", args.data_dir, "test")
    plan = functools.partial(data.even_views, 1, inputs)
    troubles = data.Troubles(len(listing))
    maps = {name: [] for name in encoders}
    index = []
    for batch in data.eval_batches(listing, inputs, plan, 32, workers, troubles, "attention"):
        index += batch["index"].tolist()
        batch = data.to_device(batch, process.device)
        for name, encoder in encoders.items():
            seen, _ = cross_attention(encoder.vit, batch["video"], batch["audio"], args.layer)
            retrieval.check_finite(seen, [listing.path(i) for i in batch["index"].tolist()])
            maps[name].append(seen.cpu())
    return {name: torch.cat(parts).numpy() for name, parts in maps.items()}, index


def peak_table(heats, sounding, silent):
    """How often the peaks of heats {name: (N, T, H, W)} lie on the objects, and those of what knows
    nothing of the clip: {row: {column: percent}}."""
    everyone = np.ones(len(silent), bool)
    two = silent.any((1, 2, 3))                         # clips with a second, silent object
    columns = {"sounding": (everyone, sounding),
               "sounding, of two": (two, sounding),
               "silent, of two": (two, silent)}
    often = sounding.mean((0, 1))                   # (H, W): its peak is the patch that is right most often
    heats = {**heats, "same patch": np.broadcast_to(often, sounding.shape)}
    table = {name: {} for name in (*heats, "another clip's", "random patch")}
    for column, (clips, target) in columns.items():
        target = target[clips]
        for name, heat in heats.items():
            table[name][column] = hits(heat[clips], target)
        others = []                                     # the attention to each of the eight clips before
        for shift in range(1, 9):
            heat = np.roll(heats["trained"], shift, 0)
            others.append(hits(heat[clips], target))
        table["another clip's"][column] = float(np.mean(others))
        shown = target.any((2, 3))                      # (N, T): the moments that have a target
        table["random patch"][column] = 100 * float(target[shown].mean())
    return table


def attention_on_toy(args, trained, process, workers):
    """attention --data toy: how often the peak of audio -> video attention, at each moment, is the patch
    where the sounding object is, or the silent one: of the encoder, of the same one untrained, of the one
    patch that is right most often, of the encoder's attention to other clips (the eight before), and of a
    random patch."""
    began = time.time()
    vit = trained.vit
    encoders = {"trained": trained, "untrained": load(args, trained.ckpt, process, untrained=True)}
    maps, index = toy_maps(args, encoders, process, workers)
    sounding, silent = toy_targets(vit, data.Inputs(**trained.inputs), index)
    two = int(silent.any((1, 2, 3)).sum())
    table = peak_table({name: x.mean(1) for name, x in maps.items()}, sounding, silent)
    heads = {}
    for name, x in maps.items():
        heads[name] = [hits(x[:, h], sounding) for h in range(x.shape[1])]

    block = args.layer % len(vit.blocks)
    moments, height, width = vit.grids["video"]
    print(f"{trained.ckpt}, step {trained.step:,}")
    print("the peak of the sound's attention to the pictures lies on the object: percent of "
          f"{moments} moments of {len(index)} held-out\nclips, {two} of them with a second, silent object; "
          f"block {block}, mean of heads, {height} x {width} patches")
    print(" " * 14 + "".join(f"{column:>18s}" for column in table["trained"]))
    for name, row in table.items():
        print(f"{name:14s}" + "".join(f"{value:18.1f}" for value in row.values()))
    for name, values in heads.items():
        print(f"sounding, by each head, {name}: " + "  ".join(f"{value:.1f}" for value in values))
    add_row(args, trained, {"what": "attention", "data": "toy", "layer": block, "percent": table,
        "heads": heads, "N": len(index), "of two": two, "grid": list(vit.grids["video"]),
        "seconds": round(time.time() - began, 1)})


# ----------------------------------------------------------------------------------------------------------
# PCA of the tokens
# ----------------------------------------------------------------------------------------------------------

def principal(x, count=3):
    """PCA of x (N, D): (coordinates (N, count), share of the variance of each (count,)). The sign is
    fixed, as scikit-learn does it: of a component's weights the largest is positive. What has fewer than
    `count` components has zeros for the others."""
    from sklearn.decomposition import PCA               # here: takes a second, which not all figures need
    solver = "covariance_eigh" if len(x) > x.shape[1] else "full"
    fit = PCA(min(count, *x.shape), svd_solver=solver)
    y = fit.fit_transform(np.asarray(x, np.float64))
    share = np.nan_to_num(fit.explained_variance_ratio_)    # not a number: all of x are the same
    more = count - y.shape[1]
    return np.pad(y, ((0, 0), (0, more))), np.pad(share, (0, more))


def to_rgb(y):
    """Coordinates (N, 3) -> (N, 3) in 0..1, each component stretched from its 1st to its 99th percentile."""
    # unspecified (AV-JEPA's page): how a component becomes a colour; DINOv2 also fits a second basis, to the
    # foreground of the first
    low, high = np.percentile(y, (1, 99), axis=0)
    return ((y - low) / np.maximum(high - low, 1e-9)).clip(0, 1)


def choose_clips(listing, classes, count, seed):
    """{class: indices of at most `count` of its clips, drawn with the seed}; by default of the first three
    classes that have any, and of a set without classes, of all clips. Raises UserError where a class is
    unknown or has none."""
    order = np.random.default_rng(seed).permutation(len(listing))
    if listing.labels is None:
        if classes:
            raise UserError("--classes: these clips have no classes; leave it out, or put them into one "
                            "sub-folder for each class")
        return {"all clips": np.sort(order[:count])}
    by_class = {name: [] for name in listing.classes}
    for i in order:
        for c in listing.clip_labels(i):
            by_class[listing.classes[c]].append(i)
    by_class = {name: clips for name, clips in by_class.items() if clips}
    for name in classes or ():
        if name not in by_class:
            known = ", ".join(list(by_class)[:12])
            if len(by_class) > 12:
                known += f" and {len(by_class) - 12:,} more"
            raise UserError(f"--classes {name}: {listing.name} has no clip of such a class; it has {known}")
    return {name: np.sort(by_class[name][:count]) for name in classes or list(by_class)[:3]}


def draw_strip(ax, frames, labels):
    """Frames (n, H, W, 3) side by side, a gap between them, and their labels below."""
    height, width = frames.shape[1:3]
    gap = max(1, width // 16)
    padded = np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1)
    ax.imshow(np.concatenate(padded, 1))
    middles = np.arange(len(frames)) * (width + gap) + (width - 1) / 2
    ax.set_xticks(middles, labels)
    ax.set(yticks=[], frame_on=False)


def draw_pca_video(axes, encoder, x, layers):
    """Frames of a clip x (1, 3, T, H, W), and below each layer (T, h, w, 3) of its tokens; the seconds
    under the last."""
    inputs = data.Inputs(**encoder.inputs)
    moments, shown = shown_frames(encoder.vit)
    times = (shown + 0.5) * (inputs.video_seconds or inputs.seconds) / inputs.frames
    _, height, width = encoder.vit.patch["video"]
    strips = [picture_of(x[0])[shown]]
    for layer in layers:                                # as large as the frames above it
        strips.append(layer[moments].repeat(height, 1).repeat(width, 2))
    for ax, frames in zip(axes, strips):
        draw_strip(ax, frames, [f"{second:.2f}" for second in times])


def draw_pca_audio(axes, encoder, x, layers, labels):
    """The mel of a clip x (1, 1, F, T), and below each layer (f, t, 3) of its tokens. labels: of the axis
    in Hz."""
    inputs = data.Inputs(**encoder.inputs)
    mel = x[0, 0].cpu().numpy()
    span = 0.0, inputs.seconds
    extents = [mel_extent(inputs, mel.shape[1], span)]
    for layer in layers:
        extents.append(token_extent(encoder.vit, inputs, layer, span))
    for ax, image, extent in zip(axes, [mel, *layers], extents):
        ax.imshow(image, origin="lower", aspect="auto", interpolation="nearest", cmap="gray", extent=extent)
        mel_axes(ax, inputs, mel.shape[1], span, labels)


def draw_pca_class(block, encoder, key, name, clips, count):
    """A class in its block of the figure: a column for each of its clips [(input, tokens)], room for
    `count`. Returns the shares of the variance (3,)."""
    inputs = data.Inputs(**encoder.inputs)
    y, share = principal(torch.cat([tokens for _, tokens in clips]).numpy())
    percents = ", ".join(f"{100 * s:.0f} %" for s in share)
    block.suptitle(f"{name}: {percents} of the variance", fontsize=9)
    axes = block.subplots(3, count, squeeze=False)
    for ax in axes[:, len(clips):].flat:
        ax.axis("off")
    seconds = "seconds of the pictures" if key == "video" else "seconds of the sound"
    if inputs.frame_rate:                               # the clip's own may be another
        seconds += f", at {inputs.frame_rate:g} frames a second"
    colors = np.split(to_rgb(y), len(clips))            # each (N, 3)
    for n, (x, _) in enumerate(clips):
        color = colors[n].reshape(*encoder.vit.grids[key][:-1], -1, 3)          # ([T,] rows, columns, 3)
        layers = color, color[..., :1].repeat(3, -1)
        if key == "video":
            draw_pca_video(axes[:, n], encoder, x, layers)
        else:
            draw_pca_audio(axes[:, n], encoder, x, layers, labels=n == 0)
        for ax in axes[:, n]:
            ax.tick_params(labelsize=7, labelbottom=ax is axes[-1, n])
        axes[-1, n].set_xlabel(seconds, fontsize=8)
    for ax, label in zip(axes[:, 0], ("input", "components\n1, 2, 3 as RGB", "component 1")):
        ax.set_ylabel(f"{label}\nHz" if key == "audio" else label, fontsize=8)
    return share


def draw_pca(args, encoders, key, clips, what):
    """(The figure of one modality, shares of the variance of each encoder {class: [3]}). clips: of each
    encoder {class: [(input (1, ...), tokens (N, D))]}; a basis for each class. Of each clip its input, the
    top three components as red, green and blue, and the first one in grey."""
    classes = list(clips[0])
    count = max(map(len, clips[0].values()))
    width = 4.6 if key == "video" else 3.6
    fig, columns = make_figure(encoders, args, max(7, 0.6 + width * count), 0.8 + 3.5 * len(classes), what)
    shares = []
    for column, encoder, mine in zip(columns, encoders, clips):
        blocks = np.atleast_1d(column.subfigures(len(classes), 1))
        shares.append({})
        for block, name in zip(blocks, classes):
            shares[-1][name] = draw_pca_class(block, encoder, key, name, mine[name], count).tolist()
    return fig, shares


def encode_tokens(encoder, listing, inputs, modality, process, workers):
    """Of the clips that have what the modality needs: {their number in the listing: {"video" or "audio":
    (input (1, ...), tokens (N, D))}}."""
    keys = features.MODALITIES[modality]
    sizes = [encoder.vit.num("video")] if len(keys) == 2 else []            # the video's tokens come first
    found = {}
    batches = features.encode_clips(encoder, listing, inputs, [modality], 1, process, workers, "tokens", 1)
    for index, given, outputs in batches:
        tokens, _ = outputs[modality]
        parts = tokens[0].float().cpu().tensor_split(sizes)                     # each (N, D)
        found[int(index)] = {key: (given[key], part) for key, part in zip(keys, parts)}
    return found


def choose_modality(args, encoders):
    """The Inputs of each encoder in the one modality of all, which goes into args."""
    chosen = []
    for encoder in encoders:
        chosen.append(features.choose_modality(
            args.modality, encoder.vit, data.Inputs(**encoder.inputs), encoder.method, args.data))
    modalities = list(dict.fromkeys(modality for modality, _ in chosen))
    if len(modalities) > 1:
        raise UserError(f"--ckpt: these encoders take {' or '.join(modalities)}; give a --modality that all "
                        "of them take")
    args.modality, = modalities
    return [inputs for _, inputs in chosen]


def in_all(found):
    """The clips that each encoder could read, of {clip: what it made of it} for each."""
    return sorted(set(found[0]).intersection(*found[1:]))


def pca(args, encoders, process, workers):
    """visualize.py pca: a figure for each modality."""
    inputs = choose_modality(args, encoders)
    keys = features.MODALITIES[args.modality]
    listing = data.list_clips(args.data, args.data_dir, "test")
    classes = choose_clips(listing, args.classes, args.clips, args.seed)
    drawn = set()                                       # a clip may be of several classes
    for indices in classes.values():
        drawn.update(indices.tolist())
    drawn = sorted(drawn)
    found = []
    for encoder, its in zip(encoders, inputs):
        tokens = encode_tokens(encoder, listing.subset(drawn), its, args.modality, process, workers)
        found.append({drawn[i]: clip for i, clip in tokens.items()})
    there = set(in_all(found))
    for name, indices in classes.items():
        if there.isdisjoint(indices):
            raise UserError(f"--classes {name}: none of the {len(indices)} clips drawn has all of "
                            f"{', '.join(keys)}; give another --seed or --modality")
    for key in keys:
        clips = [{} for _ in encoders]
        for mine, tokens in zip(clips, found):
            for name, indices in classes.items():
                mine[name] = [tokens[i][key] for i in indices if i in there]
        what = f"{key} tokens, seen and heard together" if len(keys) == 2 else f"{key} tokens"
        name = f"pca-{args.data}-{key}" if len(keys) == 2 else f"pca-{args.data}-{key}-alone"
        what = f"{args.data}, PCA of the last layer's {what}, one basis for each class"
        fig, shares = draw_pca(args, encoders, key, clips, what)
        print(save(args, name + variant(args), fig))
        for encoder, variance in zip(encoders, shares):
            add_row(args, encoder, {"what": "pca", "data": args.data, "modality": args.modality,
                "tokens": key, "untrained": args.untrained, "variance": variance, "seed": args.seed})


# ----------------------------------------------------------------------------------------------------------
# A map of the clips
# ----------------------------------------------------------------------------------------------------------

def read_families(path, classes):
    """{class: family} of the csv of --classes, of the classes that the set has; says which it lacks."""
    if not os.path.isfile(path):
        raise UserError(f"--classes {path}: there is no such file; give a csv of family,class")
    families = {}
    for row in data.read_rows(path):
        family, *name = [field.strip() for field in row]
        if not family or len(name) != 1 or not name[0]:
            raise UserError(f"--classes {path}: {data.few([', '.join(row)])} is not family,class; put a name "
                            "with a comma into quotes")
        if families.setdefault(name[0], family) != family:
            raise UserError(f"--classes {path}: has {data.few(name)} in two families; give it one")
    lacking = [name for name in families if name not in classes]
    if len(lacking) == len(families):
        raise UserError(f"--classes {path}: the set has none of its classes: {data.few(lacking)}; spell "
                        "them as the set does")
    if lacking:
        print(f"--classes {path}: the set lacks {data.few(lacking, len(lacking))}")
    return {name: family for name, family in families.items() if name not in lacking}


def group_clips(listing, path):
    """(names of the groups, group of each clip (N,), its class (N,); -1: not to be drawn): a group is a class
    (of a clip's several the rarest), or the family of it by the csv at `path` (of several that it names the
    rarest); all are one where there are no classes."""
    if listing.labels is None:
        if path:
            raise UserError("--classes: these clips have no classes; put them into one sub-folder for each "
                            "class")
        return [""], np.zeros(len(listing), int), np.zeros(len(listing), int)
    groups = {name: name for name in listing.classes}
    if path:
        groups = read_families(path, listing.classes)
    names = list(dict.fromkeys(groups.values()))
    of_class = [names.index(groups[name]) if name in groups else -1 for name in listing.classes]
    of_class = np.array(of_class + [-1])                # [-1]: of a clip without a label
    label = retrieval.rarest(listing, np.flatnonzero(of_class[:-1] >= 0))
    return names, of_class[label], label


def neighbours(x, labels, count=10):
    """Of the `count` nearest (Euclidean) of each of x (N, D), how many have its label, and how many would
    by chance, in percent."""
    x = torch.as_tensor(x, dtype=torch.float32)
    labels = torch.as_tensor(labels)
    others = len(x) - 1
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)                       # (N, N)
    closest = distance.topk(min(count, others), largest=False).indices          # (N, count)
    same = labels[:, None] == labels                                            # (N, N)
    chance = ((same.sum(1) - 1) / others).mean()
    return 100 * same.gather(1, closest).float().mean().item(), 100 * chance.item()


def draw_map(fig, columns, maps, groups, names, hollow, lines):
    """Planes {name: (axis labels, (N, 2))} of each encoder in its column, of several to the same scale;
    groups (N,): a colour and a marker for each of names, not filled where hollow (N,); lines: pairs of points
    that are joined."""
    shape = (2, 1) if len(maps) > 1 else (1, 2)
    colors = matplotlib.colormaps["tab10"].colors
    styles = [(colors[g % 10], MARKERS[g % len(MARKERS)]) for g in range(len(names))]
    if len(names) > 60:                                 # no two of 60 are the same
        styles = len(names) * [("0.3", ".")]
    first = {}                                          # {plane: its axes in the first column}
    for column, planes in zip(columns, maps):
        for ax, (name, (labels, xy)) in zip(column.subplots(*shape).flat, planes.items()):
            ax.sharex(first.setdefault(name, ax))
            ax.sharey(first[name])
            for pair in lines:
                ax.plot(*xy[list(pair)].T, color="0.7", lw=0.6, zorder=1)
            for g, (color, marker) in enumerate(styles):
                for empty, fill in ((False, color), (True, "w")):
                    points = xy[(groups == g) & (hollow == empty)]
                    ax.plot(*points.T, marker, color=color, mfc=fill, ms=5, mew=0.9, zorder=2)
            ax.set_title(name, fontsize=10)
            ax.set_xlabel(labels[0], fontsize=9)
            ax.set_ylabel(labels[1], fontsize=9)
            ax.tick_params(labelsize=8)
    legend = {}
    if len(names) <= 60:
        for name, (color, marker) in zip(names, styles):
            if name:
                legend[name] = Line2D([], [], color=color, marker=marker, ls="")
    if hollow.any():
        for name, fill in (("filled: by the sound", "k"), ("hollow: by the pictures", "w")):
            legend[name] = Line2D([], [], color="k", marker="o", mfc=fill, ls="")
    if legend:
        fig.legend(legend.values(), legend, loc="outside lower center", ncols=min(6, len(legend)), fontsize=8)


def embed_clips(encoder, listing, inputs, modalities, embedding, process, workers):
    """{clip of the listing: its embeddings (M, D)} of the clips that have all that the M modalities need."""
    found = {}
    batches = features.encode_clips(encoder, listing, inputs, modalities, 1, process, workers, "embed")
    for part, _, outputs in batches:
        embedded = []
        for _, z in outputs.values():
            z = z.float()                                                       # (B, D)
            if embedding == "projected":
                z = encoder.projector(z)
                retrieval.check_finite(z, features.names_of(listing, part))
            embedded.append(z.cpu())
        found.update(zip(part.tolist(), torch.stack(embedded, 1)))
    return found


def project(x, seed):
    """Embeddings (P, D) in the plane: {name: (labels of the axes, coordinates (P, 2))}."""
    from sklearn.manifold import TSNE
    print(f"t-SNE of {len(x):,} points", flush=True)
    perplexity = min(30, (len(x) - 1) / 3)
    verbose = 2 if len(x) > 500 else 0
    tsne = TSNE(2, init="pca", perplexity=perplexity, random_state=seed, verbose=verbose).fit_transform(x)
    flat, share = principal(x, 2)
    labels = [f"component {k + 1} ({100 * s:.0f} % of the variance)" for k, s in enumerate(share)]
    return {"t-SNE": (("t-SNE 1 (no unit)", "t-SNE 2 (no unit)"), tsne), "PCA": (labels, flat)}


def score_spaces(spaces, group, of, kind):
    """How well the groups lie together, for each modality and space {name: (P, D)}, printed: {"MODALITY,
    SPACE": {measure: value}}. group (P,), of (P,): the group and the modality of each point; kind: what a
    group is called."""
    from sklearn.metrics import silhouette_score
    numbers = {}
    for m in dict.fromkeys(of.tolist()):
        mine = of == m
        if not 1 < len(np.unique(group[mine])) < mine.sum():
            continue
        for space, x in spaces.items():
            same, chance = neighbours(x[mine], group[mine])
            silhouette = float(silhouette_score(x[mine], group[mine]))
            numbers[f"{m}, {space}"] = {"neighbours": same, "chance": chance, "silhouette": silhouette}
            print(f"{m}, {space}: {same:.1f} % of a clip's 10 nearest are of its {kind} "
                  f"(chance {chance:.1f}), silhouette {silhouette:.2f}")
    return numbers


def write_points(file, encoders, maps, listing, index, groups, of):
    """The csv of a map: a row for each encoder's each point, its clip, group, modality and coordinates."""
    text = io.TextIOWrapper(file, "utf-8", errors="replace", newline="")
    rows = csv.writer(text)
    rows.writerow(("file", "class", "group", "modality", "tsne_1", "tsne_2", "pca_1", "pca_2", "ckpt"))
    for encoder, planes in zip(encoders, maps):
        _, tsne = planes["t-SNE"]
        _, flat = planes["PCA"]
        for i, group, modality, *point in zip(index, groups, of, *tsne.T, *flat.T):
            labels = [] if listing.labels is None else listing.clip_labels(i)
            classes = [listing.classes[c] for c in labels]
            rows.writerow((listing.path(i), " / ".join(classes), group, modality, *point, encoder.ckpt))
    text.detach()


def check_pairs(args, encoders):
    """Refuse --pairs where there are none."""
    if any(len(encoder.vit.grids) < 2 for encoder in encoders):
        raise UserError("--pairs needs an encoder and a set with both sound and pictures; leave it out")
    data.require(args.data, ("video", "audio"), "--pairs needs both; leave it out")
    if args.modality:
        raise UserError("--pairs takes sound and pictures apart; leave --modality out")


def clips_of_map(args):
    """(the listing, names of the groups, group and class of each of its clips, which clips are drawn), by the
    flags."""
    if args.split == "all":
        listing = data.list_all(args.data, args.data_dir)
    else:
        listing = data.list_clips(args.data, args.data_dir, args.split)
    names, group, label = group_clips(listing, args.classes)
    drawn = np.random.default_rng(args.seed).permutation(np.flatnonzero(group >= 0))
    drawn = np.sort(drawn[:args.clips])
    if len(drawn) < 5:
        some = " of the classes of --classes" if args.classes else ""
        raise UserError(f"{listing.name}: {len(drawn)} clips{some}; a map needs at least 5")
    if len(names) > 60:
        print(f"{len(names)} classes are too many for colours and a legend; --classes puts them into "
              "families, or draws some of them alone")
    return listing, names, group, label, drawn


def describe_map(args, count):
    """(what a map of so many clips shows, the name of its file)"""
    by = {"av": "by sound and pictures together", "audio": "by sound", "video": "by pictures",
          None: "by sound and by pictures"}[args.modality]
    kind = "projected" if args.embedding == "projected" else "clip"
    name = f"map-{args.data}-{'pairs' if args.pairs else args.modality}"
    if args.split != "test":
        name += f"-{args.split}"
    if args.embedding == "projected":
        name += "-projected"
    if args.classes:
        name += f"-{Path(args.classes).stem}"
    return f"{count:,} clips of {args.data} ({args.split}) {by}, {kind} embedding", name + variant(args)


def map_clips(args, encoders, process, workers):
    """visualize.py map: the figure, the csv, and where there are classes how well they lie together."""
    for encoder in encoders:
        retrieval.choose_embedding(encoder, args.embedding)                     # refuse what it lacks
    if args.pairs:
        check_pairs(args, encoders)
        modalities = ["audio", "video"]
        inputs = [data.Inputs(**encoder.inputs) for encoder in encoders]
    else:                                               # of pictures alone the seconds change
        inputs = choose_modality(args, encoders)
        modalities = [args.modality]
    listing, names, group, label, drawn = clips_of_map(args)
    found = []
    for encoder, its in zip(encoders, inputs):
        found.append(embed_clips(
            encoder, listing.subset(drawn), its, modalities, args.embedding, process, workers))
    there = in_all(found)
    n = len(there)
    if n < 5:
        raise UserError(f"{listing.name}: {n} clips have all that {' and '.join(modalities)} needs; "
                        "a map needs at least 5")
    index = np.tile(drawn[there], len(modalities))                              # (P,), P = M n, as all below
    of = np.repeat(modalities, n)
    group = group[index]
    label = label[index]

    maps = []
    rows = []
    for encoder, embedded in zip(encoders, found):
        print(f"{encoder.ckpt}, step {encoder.step:,}")
        x = torch.stack([embedded[i] for i in there], 1).flatten(0, 1).numpy()                  # (P, D)
        planes = project(x, args.seed)
        spaces = {"embedding": x, "t-SNE": planes["t-SNE"][1], "PCA": planes["PCA"][1]}
        numbers = score_spaces(spaces, group, of, "family" if args.classes else "class")
        if args.classes:
            numbers["by class"] = score_spaces(spaces, label, of, "class")
        maps.append(planes)
        rows.append({"what": "map", "data": args.data, "split": args.split, "modality": args.modality,
            "pairs": args.pairs, "embedding": args.embedding, "untrained": args.untrained,
            "classes": args.classes, "N": n, "left_out": len(drawn) - n, **numbers, "seed": args.seed})
    what, name = describe_map(args, n)
    width, height = (6.2, 11) if len(encoders) > 1 else (12.4, 6)
    fig, columns = make_figure(encoders, args, width, height + 0.25 * math.ceil(len(names) / 6), what)
    pairs = [(i, n + i) for i in range(n)] if args.pairs else []
    draw_map(fig, columns, maps, group, names, of != modalities[0], pairs)
    groups = [names[g] for g in group]
    table = write(
        args, f"{name}.csv", lambda file: write_points(file, encoders, maps, listing, index, groups, of))
    for encoder, row in zip(encoders, rows):
        add_row(args, encoder, row)
    print(save(args, name, fig))
    print(table)


# ----------------------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------------------

SCORE = {"data", "probe", "head", "modality", "tested", "metric", "value"}  # what says what a probe measured
# and how, if not as usual
SETTINGS = ("clips", "layers", "mix", "encoder", "regularised_masking", "weighted", "mixup", "specaugment")


def scores(row):
    """A row of probe.jsonl or retrieval.jsonl as one of a log: {step, what was measured: percent}, the step
    alone where that is a baseline, or the errors of pixels.py."""
    found = {"step": row.get("step")}
    if row.get("baseline") or row.get("untrained"):
        return found
    if SCORE <= row.keys():
        alone = row["tested"] == row["modality"]
        tested = row["tested"] if alone else f"{row['tested']} of {row['modality']}"
        others = [f"{key} {row[key]}, " for key in SETTINGS if row.get(key)]
        name = f"{row['probe']} {row['head']}: {tested}, {row['data']}, {''.join(others)}{row['metric']}, %"
        found[name] = row["value"]
    for way in retrieval.WAYS:
        if isinstance(row.get(way), dict):
            ranked = row.get("ranking", "plain")
            how = row.get("embedding") if ranked == "plain" else f"{row.get('embedding')}, ranking {ranked}"
            searched = f"{row.get('data')}, {how}, R@10 of {row.get('N')}"
            found[f"retrieval: {way}, {searched}, %"] = row[way].get("R@10")
    return found


def evaluations(folder, steps):
    """What probes and retrieval have found of a run's checkpoints, as rows of a log by their steps; of
    several values of the same step and measure the last counts. steps: how many the run has; what lies
    beyond is of a run before."""
    points = {}
    for name in ("probe.jsonl", "retrieval.jsonl"):
        for row in run.read_rows(Path(folder) / name, scores):
            if row["step"] <= steps:
                points.setdefault(row["step"], {}).update(row)
    return [points[step] for step in sorted(points)]


def curves(args):
    """visualize.py curves: several runs in one picture, which goes into the folder of the first."""
    runs = {}
    columns = set()
    for folder in dict.fromkeys(args.runs):
        rows = run.read_log(folder) if os.path.isdir(folder) else []
        if not any(set(row) - {"step"} for row in rows):
            raise UserError(f"{folder}: has no log.jsonl with a row in it; give the folder of a run, or "
                            "of a head or decoder in it")
        label = f"{folder}, step {rows[-1]['step'] + 1:,}"
        with contextlib.suppress(UserError):            # no checkpoint, or one of an older version
            content = common.load_checkpoint(folder)
            label = f"{content['method']['title']}, {content['args']['data']}, {label}"
        columns.update(rows[-1])
        runs[label] = rows + evaluations(folder, rows[-1]["step"] + 1)
    heading = f"{len(runs)} runs" if len(runs) > 1 else list(runs)[0]
    if any(column.startswith("know_nothing") for column in columns):
        heading += "; thin and dotted: the loss of a predictor that knows nothing"
    name = f"curves-of-{len(runs)}.png" if len(runs) > 1 else "curves.png"
    args.ckpt = args.runs
    print(write(args, name, lambda file: run.draw_curves(file, runs, heading)))


# ----------------------------------------------------------------------------------------------------------

def load(args, ckpt, process, untrained=False):
    """The encoder of a checkpoint that the flags ask for; .ckpt: where it is from."""
    encoder = common.load_encoder(ckpt, process.device, untrained or args.untrained, weights=args.encoder)
    encoder.ckpt = ckpt
    return encoder


def encoder_flags(add_data, add_run, add_method):
    add_data("--data-dir", help="folder with the clips and the csv files (default: none; toys: in cache/)")
    add_run("--ckpt", nargs="+", required=True,
        help="folder of a run, its latest.pt or another checkpoint; several stand side by side")
    add_run("--out", help="folder for the files (default: the first run's)")
    add_method("--untrained", action="store_true",
        help="the same encoder as it was initialised, for comparison")
    add_method("--encoder", choices=("context", "target"),
        help="of a method that has both; default: the one that it evaluates")


def set_flags(add_data, add_run, add_method, clips, text):
    add_data("--data", required=True, help=", ".join(data.SETS))
    add_data("--clips", type=int, default=clips, help=text)
    add_run("--seed", type=int, default=0, help="of the choice of clips, and of t-SNE")
    add_method("--modality", choices=tuple(features.MODALITIES),
        help="default: all that the encoder takes and the set has")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name, text):
        return commands.add_parser(name, help=text, description=text, formatter_class=run.Help)

    def groups(name, text):
        return run.flag_groups(command(name, text))[:3]

    add_data, add_run, add_method = groups(
        "attention", "audio -> video and video -> audio attention: of a clip, or of held-out clips of a set, "
        "as a picture and a film; or how often it finds the toy's sounding object")
    encoder_flags(add_data, add_run, add_method)
    add_data("--clip", help="a file with sound and pictures (default: none)")
    add_data("--data", help=f"in place of --clip: {', '.join(data.SETS)} (default: none)")
    add_data("--clips", type=int, help="clips of each class (default: 1; of toy alone: it is measured)")
    add_data("--classes", nargs="+", help="names of classes (default: the first three)")
    add_run("--seed", type=int, help="of the choice of clips (default: 0)")
    add_method("--heads", choices=("mean", "each"), default="mean", help="averaged, or one by one")
    add_method("--layer", type=int, default=-1, help="block, from 0; -1 is the last one")

    add_data, add_run, add_method = groups(
        "pca", "PCA of the last layer's tokens, one basis for each class, the top three components as "
        "colours")
    encoder_flags(add_data, add_run, add_method)
    set_flags(add_data, add_run, add_method, 3, "clips of each class")
    add_data("--classes", nargs="+", help="names of classes (default: the first three)")

    add_data, add_run, add_method = groups(
        "map", "clips in the plane, by t-SNE and by PCA, and their coordinates in a csv")
    encoder_flags(add_data, add_run, add_method)
    set_flags(add_data, add_run, add_method, 12000, "at most so many (AV-JEPA's page: 11,143)")
    add_data("--split", choices=("train", "test", "all"), default="test", help="whose clips")
    add_data("--classes",
        help="a csv of family,class: these classes alone, a colour for each family (default: all classes)")
    add_method("--pairs", action="store_true",
        help="each clip twice, by its sound and by its pictures, joined by a line")
    add_method("--embedding", choices=("encoder", "projected"), default="encoder",
        help="encoder: CLS, or the mean of the tokens; projected: where the loss was taken")

    add = command(
        "curves", "losses and health of one or several runs, from their logs, and what probe.py and "
        "retrieval.py found at their steps").add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or of another training's log.jsonl in it")
    add("--out", help="folder for the file (default: the first run's)")
    args = parser.parse_args(argv)
    if args.what != "curves":
        check_range("--workers", args.workers or 0, 0, 1024)
        check_range("--seed", args.seed or 0, 0, 2 ** 31)
        check_range("--clips", 1 if args.clips is None else args.clips, 1, 10 ** 7)
    if args.what == "attention":
        check_attention(args)
    return args


def check_attention(args):
    """Refuse flags of attention that have no effect. --clips stays None where the toy is measured."""
    if bool(args.clip) == bool(args.data):
        raise UserError("attention: give either --clip FILE, or --data SET")
    if args.clip:
        for flag, value in (("--data-dir", args.data_dir), ("--clips", args.clips),
                            ("--classes", args.classes), ("--seed", args.seed)):
            if value is not None:
                raise UserError(f"{flag} has no effect without --data")
        return
    data.require(args.data, ("video", "audio"), "attention between the two needs both")
    if args.data != "toy" or args.classes:
        args.clips = args.clips or 1
    for flag, given, why in (("--untrained", args.untrained, "has both encoders"),
                             ("--heads", args.heads == "each", "has each head"),
                             ("--seed", args.seed is not None, "measures all clips")):
        if given and not args.clips:
            raise UserError(f"{flag} has no effect without --clips, since --data toy alone {why}")


@matplotlib.rc_context({"text.parse_math": False})      # a $ in a file's or a class's name is a $
def main(argv=None):
    args = get_args(argv)
    if args.what == "curves":
        curves(args)
        return
    process, workers = run.one_process(args, "visualize.py")
    args.ckpt = [one.ckpt for one in run.each_checkpoint(args)]
    encoders = [load(args, ckpt, process) for ckpt in args.ckpt]
    if args.what == "pca":
        pca(args, encoders, process, workers)
        return
    if args.what == "map":
        map_clips(args, encoders, process, workers)
        return
    for encoder in encoders:
        check_range("--layer", args.layer, -1, len(encoder.vit.blocks) - 1)
        if len(encoder.vit.grids) < 2:
            raise UserError(f"{encoder.ckpt}: this {encoder.method['name']} encoder takes one modality only; "
                            "attention between the two needs both")
    if args.clip:
        clip = Path(args.clip)
        attention_of_clip(args, encoders, process, clip, clip.stem, clip.name)
    elif args.clips:
        attention_of_set(args, encoders, process)
    else:
        for encoder in encoders:
            attention_on_toy(args, encoder, process, workers)


if __name__ == "__main__":
    main_guard(main)
