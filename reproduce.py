"""A claim as one command: train the rows of an experiment over several seeds, write its table and picture.

    python reproduce.py masking                       # A-JEPA's table of maskings on the toy data
    python reproduce.py masking --dry-run             # what is finished and what is left
    python reproduce.py masking --seeds 0 1 2 3 4     # more seeds: only those that are missing are run
    python reproduce.py methods                       # the four methods: probes, retrieval, size and time

A row is a command line of our own scripts. Each run is a process of its own with a folder of its own: what is
finished is skipped, a run that was stopped goes on from its checkpoint, and one that failed is named while
the others go on. Flags that this script does not know are handed to each run (--steps 100 --batch-size 16);
what a row says itself stays.
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import functools
import json
import math
import re
import shlex
import stat
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from matplotlib.figure import Figure

import common
import probe
from common import UserError, check_range, main_guard
from run import Help, choose_device, code_version, read_log, replace_file

TRAIN = "train"                                         # of a run's steps the one that is not a probe


def attentive(*modalities):
    """The steps that probe a finished run with attention. One query for all methods, and two rates:
    MJEPA's own head, of four blocks, takes too long on two cores."""
    steps = []
    for modality in modalities:
        step = f"probe.py --data toy --probe attentive --head attentive --lr 1e-3 1e-2 --modality {modality}"
        steps += [step, f"{step} --baseline untrained"]
    return steps


EXPERIMENTS = {
    # columns {name: where it lies in results.json, or in `measures`}; flags of all rows, which the user's may
    # replace; rows {name: command line}. Where there is more to it: formats of the columns that are not
    # percent, with a comma if it is the same for all seeds; panels of the picture {title: (unit, columns, the
    # column of chance)}; after {row: steps that follow its training}
    "masking": dict(
        title="A-JEPA's table of maskings, on the toy data: linear probe on held-out clips, top-1 in percent",
        columns={"linear probe": "trained/audio",
                 "untrained": "untrained/audio"},
        flags="--steps 500",                            # half of the toy run, for 15 runs in 40 minutes
        rows={"random patches, 75 %": "ajepa.py --masking random --mask-ratio 0.75",
              "time strips": "ajepa.py --masking time",
              "frequency strips": "ajepa.py --masking freq",
              "single block, 75 %": "ajepa.py --masking block --mask-ratio 0.75",
              "multi-block": "ajepa.py --masking multiblock"}),
    "cross-modal": dict(
        title="MJEPA's table of terms, on the toy data: linear probe on held-out clips, top-1 in percent",
        columns={"A": "trained/audio",
                 "V": "trained/video",
                 "AV": "trained/av",
                 "A, untrained": "untrained/audio",
                 "V, untrained": "untrained/video",
                 "AV, untrained": "untrained/av"},
        flags="",
        rows={"separate, audio": "mjepa.py --terms separate-audio",
              "separate, video": "mjepa.py --terms separate-video",
              "shared, within alone": "mjepa.py --terms intra",
              "and A<->V across": "mjepa.py --terms intra+av",
              "all nine": "mjepa.py --terms all"}),
    "sound": dict(
        title="AVJEPA: does sound help a small model? Toy data: linear probe of the class on held-out clips, "
              "top-1 in percent",
        # the encoder trained with sound is asked without it as well: so the authors' code asks it
        columns={"video alone": "trained/video",
                 "video + sound": "trained/av",
                 "video alone, untrained": "untrained/video",
                 "video + sound, untrained": "untrained/av"},
        flags="",
        rows={"nano, trained on video": "avjepa_ncsu.py --size nano --modalities video",
              "nano, trained on video + sound": "avjepa_ncsu.py --size nano --modalities av",
              "toy, trained on video": "avjepa_ncsu.py --size toy --modalities video",
              "toy, trained on video + sound": "avjepa_ncsu.py --size toy --modalities av"}),
    "methods": dict(
        title="The four methods on the toy data: frozen encoders on held-out clips, probes (top-1) and "
              "retrieval (R@10) in percent",
        columns={"linear probe, audio": "trained/audio",
                 "linear probe, audio, untrained": "untrained/audio",
                 "linear probe, audio, raw input": "raw input/audio",
                 "linear probe, video": "trained/video",
                 "linear probe, video, untrained": "untrained/video",
                 "linear probe, video, raw input": "raw input/video",
                 "linear probe, audio + video": "trained/av",
                 "linear probe, audio + video, untrained": "untrained/av",
                 "linear probe, audio + video, raw input": "raw input/av",
                 "10 labels a class, audio": "trained/few/audio",
                 "10 labels a class, audio, untrained": "untrained/few/audio",
                 "10 labels a class, audio, raw input": "raw input/few/audio",
                 "10 labels a class, video": "trained/few/video",
                 "10 labels a class, video, untrained": "untrained/few/video",
                 "10 labels a class, video, raw input": "raw input/few/video",
                 "10 labels a class, audio + video": "trained/few/av",
                 "10 labels a class, audio + video, untrained": "untrained/few/av",
                 "10 labels a class, audio + video, raw input": "raw input/few/av",
                 "attentive probe, audio": "attentive/trained/audio",
                 "attentive probe, audio, untrained": "attentive/untrained/audio",
                 "attentive probe, video": "attentive/trained/video",
                 "attentive probe, video, untrained": "attentive/untrained/video",
                 "attentive probe, audio + video": "attentive/trained/av",
                 "attentive probe, audio + video, untrained": "attentive/untrained/av",
                 "R@10, A->V": "trained/A->V/R@10",
                 "R@10, A->V, untrained": "untrained/A->V/R@10",
                 "R@10, V->A": "trained/V->A/R@10",
                 "R@10, V->A, untrained": "untrained/V->A/R@10",
                 "chance, probes": "chance/audio",
                 "chance, R@10": "chance/A->V/R@10",
                 "parameters of the encoder": "run/parameters of the encoder",
                 "parameters trained": "run/parameters trained",
                 "video tokens of a clip": "run/video tokens of a clip",
                 "audio tokens of a clip": "run/audio tokens of a clip",
                 "seconds a step": "run/seconds a step",
                 "minutes of training": "run/minutes of training",
                 "minutes of evaluation": "run/minutes of evaluation",
                 "minutes of attentive probes": "run/minutes of attentive probes"},
        formats={"chance, probes": ",.1f",
                 "chance, R@10": ",.1f",
                 "parameters of the encoder": ",.0f",
                 "parameters trained": ",.0f",
                 "video tokens of a clip": ",.0f",
                 "audio tokens of a clip": ",.0f",
                 "seconds a step": ".3f",
                 "minutes of training": ".1f",
                 "minutes of evaluation": ".1f",
                 "minutes of attentive probes": ".1f"},
        panels={"linear probe": (
                    "top-1, percent",
                    ["linear probe, audio", "linear probe, video", "linear probe, audio + video"],
                    "chance, probes"),
                "attentive probe": (
                    "top-1, percent",
                    ["attentive probe, audio", "attentive probe, video", "attentive probe, audio + video"],
                    "chance, probes"),
                "retrieval": ("R@10, percent", ["R@10, A->V", "R@10, V->A"], "chance, R@10"),
                "time of a training step": ("seconds", ["seconds a step"], None)},
        flags="",
        rows={"A-JEPA": "ajepa.py",
              "AV-JEPA": "avjepa_lejepa.py",
              "MJEPA": "mjepa.py",
              "AVJEPA (NC State)": "avjepa_ncsu.py"},
        after={"A-JEPA": attentive("audio"),
               "AV-JEPA": attentive("audio", "video", "av"),
               "MJEPA": attentive("audio", "video", "av"),
               "AVJEPA (NC State)": attentive("audio", "video", "av")}),
}


# ----------------------------------------------------------------------------------------------------------
# What is to be run, and what is finished
# ----------------------------------------------------------------------------------------------------------

def plan(experiment, seeds, out, given, extra):
    """The runs: a list of dict(row, seed, folder, command, probes), seed by seed, so that whoever stops
    early has a whole table of fewer seeds. given: flags for the run and its probes; extra: for the run
    alone."""
    runs = []
    for seed in seeds:
        for row, line in experiment["rows"].items():
            name = re.sub("[^a-z0-9]+", "-", row.lower()).strip("-")
            folder = Path(out) / f"{name}-seed{seed}"
            script, *flags = shlex.split(line)
            command = [script, *shlex.split(experiment["flags"]), *given, *extra, *flags]
            command += ["--seed", str(seed), "--out", str(folder)]
            probes = {}
            for step in experiment.get("after", {}).get(row, []):
                probes[step] = [*shlex.split(step), *given, "--ckpt", str(folder)]
            runs.append(dict(row=row, seed=seed, folder=folder, command=command, probes=probes))
    return runs


def read(path):
    """The dict in a JSON file, None if it is missing, cut off or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write(path, content):
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def begun(run):
    """(command, versions of the code) by which a run was begun; two empty lists where it was not, or the file
    that says so is broken."""
    content = read(run["folder"] / "command.json") or {}
    lists = [content.get("command"), content.get("versions")]
    if not all(isinstance(words, list) for words in lists):
        return [], []
    return lists


def finished(run):
    """The results of a run, with its measures where the experiment probes it further, or None if it is not
    finished. Raises UserError if the folder holds a run of another command."""
    command, versions = begun(run)
    results = read(run["folder"] / "results.json")
    same = command[:-2] == run["command"][:-2]          # but for --out: it may move
    if not same and (results or (run["folder"] / "latest.pt").is_file()):
        raise UserError(f"{run['folder']} holds a run of another command; give another --out, or remove it")
    if not same or not results:
        return None
    results["versions"] = versions
    if run["probes"]:
        results.update(measures(run, results))
    return results


def probed(run):
    """The rows of probe.jsonl that the run's probes have written: {step: row}."""
    rows = read(run["folder"] / "probes.json") or {}
    return {step: rows[step] for step in run["probes"] if is_row(rows.get(step))}


def is_row(row):
    """Whether this is a row of probe.jsonl that says what is taken from it here."""
    if not isinstance(row, dict) or row.get("baseline") not in (None, "untrained"):
        return False
    numbers = [row.get("value"), row.get("seconds")]
    return isinstance(row.get("modality"), str) and all(isinstance(x, (int, float)) for x in numbers)


def last_row(file):
    """The last row of a probe.jsonl, None where it is broken."""
    try:
        row = json.loads(file.read_bytes().splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return row if is_row(row) else None


def missing(run):
    """The steps that a run still needs, in their order."""
    if not finished(run):
        return [TRAIN, *run["probes"]]
    rows = probed(run)
    return [step for step in run["probes"] if step not in rows]


@functools.lru_cache(None)
def sizes(folder):
    """Of a finished run {measure: number}. The parameters trained are those that the optimiser has moments
    of: neither the teacher nor a buffer is among them."""
    moments = common.load_checkpoint(folder)["optimizer"]["state"].values()
    vit = common.load_encoder(folder).vit
    tokens = {f"{modality} tokens of a clip": vit.num(modality) for modality in vit.grids}
    return {"parameters of the encoder": sum(p.numel() for p in vit.parameters()),
            "parameters trained": sum(moment["exp_avg"].numel() for moment in moments),
            **tokens}


def step_times(log):
    """(median seconds a step, minutes of all steps) by the rows of a log.jsonl, each of which holds the
    milliseconds of the steps since the row before; of no rows (None, None)."""
    log = [row for row in log if "ms_step" in row]
    if not log:
        return None, None
    before = -1
    total = 0.0
    for row in log:
        total += row["ms_step"] * (row["step"] - before)
        before = row["step"]
    return statistics.median(row["ms_step"] for row in log) / 1e3, total / 6e4


def measures(run, results):
    """What results.json lacks: {"attentive": {trained or untrained: {modality: top-1}}, "run": {measure:
    value}}."""
    table = {"trained": {}, "untrained": {}}
    rows = probed(run)
    for row in rows.values():
        table[row["baseline"] or "trained"][row["modality"]] = row["value"]
    seconds, minutes = step_times(read_log(run["folder"]))
    values = {**sizes(run["folder"]), "seconds a step": seconds, "minutes of training": minutes}
    if "seconds" in results:
        values["minutes of evaluation"] = results["seconds"] / 60
    if len(rows) == len(run["probes"]):
        values["minutes of attentive probes"] = sum(row["seconds"] for row in rows.values()) / 60
    return {"attentive": table, "run": values}


# ----------------------------------------------------------------------------------------------------------
# Run it
# ----------------------------------------------------------------------------------------------------------

def launch(run, step):
    """Run a step of a run to its end; its output goes into the run's folder. Returns the exit code."""
    script, *flags = run["command"] if step == TRAIN else run["probes"][step]
    with open(run["folder"] / "output.txt", "ab") as output:
        command = [sys.executable, str(Path(__file__).parent / script), *flags]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            return process.wait()
        except BaseException:                           # Ctrl-C reached it as well: it saves, then ends
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise


def train(run):
    """Begin a run, or go on with it. Returns the exit code."""
    run["folder"].mkdir(parents=True, exist_ok=True)
    versions = []                                       # of the code, of all that trained it
    if (run["folder"] / "latest.pt").is_file():
        _, versions = begun(run)
    versions = list(dict.fromkeys([*versions, code_version()]))
    (run["folder"] / "probes.json").unlink(missing_ok=True)                     # of a training before
    write(run["folder"] / "command.json", {"command": run["command"], "versions": versions})
    return launch(run, TRAIN)


def probe_run(run, step):
    """Probe a finished run, and keep the row that this wrote. Returns the exit code."""
    file = run["folder"] / "probe.jsonl"
    before = file.stat().st_size if file.is_file() else 0
    code = launch(run, step)
    if code == 0 and file.is_file() and file.stat().st_size > before:
        row = last_row(file)
        if row:
            write(run["folder"] / "probes.json", {**probed(run), step: row})
    return code


def name_of(run, step):
    """What the screen calls a step of a run."""
    name = f"{run['row']}, seed {run['seed']}"
    if step == TRAIN:
        return name
    args = probe.get_args(run["probes"][step][1:])
    return f"{name}, {args.probe} probe, {args.modality}, {args.baseline or 'trained'}"


def show_left(run, steps):
    """Name what is left of a run."""
    if steps[0] == TRAIN:                               # the probes' lines would be many
        then = f", then {len(steps) - 1} probes of it" if len(steps) > 1 else ""
        print(f"  left: {name_of(run, TRAIN)}: {shlex.join(run['command'])}{then}", flush=True)
        return
    for step in steps:
        print(f"  left: {name_of(run, step)}: {shlex.join(run['probes'][step])}", flush=True)


def new_values(experiment, run, before):
    """The values, for the screen, that a run has and had not `before`; of those that the picture shows, if
    there are any."""
    cells = tabulate(experiment, [run])[run["row"]]
    shown = []
    for _, columns, _ in panels_of(experiment).values():
        shown += columns
    new = [column for column in cells if column not in before]
    new = [column for column in new if column in shown] or new
    return ", ".join(f"{column} {number(experiment, column, cells[column]['mean'])}" for column in new)


def run_all(experiment, jobs):
    """Run the jobs [(run, step)] one after the other, and say how each ends. Returns the runs that did not
    finish."""
    began = time.time()
    failed = []
    for done, (run, step) in enumerate(jobs, 1):
        if run in failed and not finished(run):         # it failed in training: there is nothing to probe
            continue
        clock = time.time()
        before = tabulate(experiment, [run]).get(run["row"], {})
        code = train(run) if step == TRAIN else probe_run(run, step)
        if code or step in missing(run):
            if run not in failed:
                failed.append(run)
            how = f"failed (exit code {code})" if code else "was stopped before its end"
            print(f"{name_of(run, step)} {how}: see {run['folder']}/output.txt", flush=True)
            continue
        left = len(jobs) - done
        rest = (time.time() - began) / done * left
        print(f"{name_of(run, step)}: {new_values(experiment, run, before)} ({time.time() - clock:.0f} s; "
              f"{left} runs left, about {rest / 60:.0f} min)", flush=True)
    return failed


# ----------------------------------------------------------------------------------------------------------
# The table and the picture
# ----------------------------------------------------------------------------------------------------------

def look_up(results, path):
    """The number at a path (keys with a slash between them), or None."""
    for key in path.split("/"):
        results = results.get(key) if isinstance(results, dict) else None
    return results if isinstance(results, (int, float)) else None


def spread(values):
    """(mean, probe.spread)"""
    return sum(values) / len(values), probe.spread(values)


def tabulate(experiment, runs):
    """{row: {column: {mean, std, values by seed}}} of what is finished; a column that the runs of a row
    lack is left out."""
    table = {}
    for run in runs:
        results = finished(run)
        if not results:
            continue
        cells = table.setdefault(run["row"], {})
        for column, path in experiment["columns"].items():
            value = look_up(results, path)
            if value is not None:
                cell = cells.setdefault(column, {"values": {}})
                cell["values"][run["seed"]] = value
                cell["mean"], cell["std"] = spread(list(cell["values"].values()))
    return table


def format_of(experiment, column):
    return experiment.get("formats", {}).get(column, "")


def number(experiment, column, value):
    return format(value, format_of(experiment, column) or ".1f")


def cell_text(experiment, column, cell):
    """Mean ± standard deviation over the seeds, and of percentages the single values."""
    mean = number(experiment, column, cell["mean"])
    if cell["std"] is None or "," in format_of(experiment, column):
        return mean
    text = f"{mean} ± {number(experiment, column, cell['std'])}"
    if format_of(experiment, column):
        return text
    values = [number(experiment, column, value) for value in cell["values"].values()]
    return f"{text} ({', '.join(values)})"


def markdown(experiment, table):
    """The table as Markdown; – where a row has no such value. An experiment with panels has many measures:
    there the rows are its columns."""
    lines = [["", *experiment["columns"], "seeds"]]
    for row, cells in table.items():
        line = [row]
        seeds = {}
        for column in experiment["columns"]:
            cell = cells.get(column)
            line.append(cell_text(experiment, column, cell) if cell else "–")
            seeds.update(cell["values"] if cell else {})
        lines.append([*line, ", ".join(map(str, seeds))])
    if "panels" in experiment:
        lines = list(zip(*lines))
    rule = "|---" * len(lines[0]) + "|"
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts.insert(1, rule)
    return "\n".join(texts).replace("|  |", "| |") + "\n"


def panels_of(experiment):
    """{title: (unit, columns, the column of chance)}; one for all columns where the experiment names none."""
    columns = [column for column in experiment["columns"] if not column.endswith(", untrained")]
    return experiment.get("panels", {"": ("percent", columns, None)})


def draw_bar(ax, x, width, cell, shade, label):
    """A bar for the mean, a line for one standard deviation, a dot for each seed. shade: (number of the
    column, how many there are), which its grey and its hatch tell."""
    column, columns = shade
    grey = str(0.45 + 0.45 * column / columns)
    ax.bar(x, cell["mean"], 0.9 * width, color=grey, hatch=("", "//", "..")[column % 3], edgecolor="k",
           yerr=cell["std"] or 0, capsize=4, label=label)
    ax.plot([x] * len(cell["values"]), cell["values"].values(), "ko", ms=4, mfc="w")


def draw_level(ax, x, width, cell):
    """A thick line over a bar where the untrained encoder stands."""
    ends = [x - 0.45 * width, x + 0.45 * width]
    level = [cell["mean"], cell["mean"]]
    ax.plot(ends, level, "w-", lw=6, solid_capstyle="butt", zorder=1.5)     # to be seen on the darkest bar
    ax.plot(ends, level, "k-", lw=3, solid_capstyle="butt", zorder=1.6, label="untrained")


def draw_panel(ax, table, unit, columns, chance):
    """The columns side by side for each row."""
    width = 0.8 / max(2, len(columns))
    for r, cells in enumerate(table.values()):
        for c, column in enumerate(columns):
            x = r + (c - (len(columns) - 1) / 2) * width
            if column in cells:
                label = column.split(", ")[-1]
                draw_bar(ax, x, width, cells[column], (c, len(columns)), label)
            if f"{column}, untrained" in cells:
                draw_level(ax, x, width, cells[f"{column}, untrained"])
    levels = [cells[chance]["mean"] for cells in table.values() if chance in cells]
    if levels:
        ax.axhline(statistics.mean(levels), color="k", ls="--", lw=1, label="chance")
    top = ax.get_ylim()[1]
    ax.set(ylabel=unit, xlim=(-0.5, len(table) - 0.5), ylim=(0, 1.25 * top))    # room for the legend
    ax.set_xticks(range(len(table)), [textwrap.fill(row, 18) for row in table])
    if "percent" in unit and 1.25 * top > 100:
        ax.set_yticks(range(0, 101, 20))
    handles, labels = ax.get_legend_handles_labels()
    handles = dict(zip(labels, handles))                # each name once
    if len(columns) > 1 and handles:
        ax.legend(handles.values(), handles, loc="upper center", ncol=len(handles), fontsize=9,
                  columnspacing=1)


def draw(experiment, table):
    """The picture: the panels, two side by side."""
    panels = panels_of(experiment)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / 2)
    width = across * (1.4 + 1.4 * len(table))
    fig = Figure(figsize=(width, 4.5 * down), layout="tight")
    axes = fig.subplots(down, across, squeeze=False)
    for ax, (title, panel) in zip(axes.flat, panels.items()):
        draw_panel(ax, table, *panel)
        ax.set_title(title)
    legend = "bars: mean over the seeds, whiskers: one standard deviation, dots: the seeds"
    lines = [textwrap.fill(line, int(12 * width)) for line in (experiment["title"], legend)]
    fig.suptitle("\n".join(lines), fontsize=10)
    return fig


def write_table(experiment, table, runs, flags, out):
    """Write table.json, table.md and table.png of what is finished, and show the table."""
    versions = set()
    for run in runs:
        results = finished(run)
        versions.update(results["versions"] if results else [])
    write(out / "table.json", {
        "title": experiment["title"], "commands": experiment["rows"],
        "flags": [*shlex.split(experiment["flags"]), *flags], "versions": sorted(versions), "rows": table})
    text = markdown(experiment, table)
    replace_file(out / "table.md", lambda file: file.write(text.encode()))
    replace_file(out / "table.png", lambda file: draw(experiment, table).savefig(file, format="png", dpi=110))
    print(f"\n{experiment['title']}\n\n{text}\n{out}/table.md, table.json, table.png")
    if len(versions) > 1:
        print(f"the runs are of different versions of the code: {', '.join(sorted(versions))}")


# ----------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    """(args, flags that are not ours, for each run)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", help="of each run and its probes: folder with the clips (default: theirs)")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each row for each")
    add("--out", help="folder of its runs, table and picture (default: runs/EXPERIMENT)")
    add("--dry-run", action="store_true", help="show what is finished and what is left, and run nothing")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="of each run and its probes: auto, cpu, mps or cuda (default: theirs)")
    add("--workers", type=int, help="of each run and its probes: processes that decode (default: theirs)")
    args, extra = parser.parse_known_args(argv)
    for word in extra:
        if word.split("=")[0] in ("--data", "--fresh", "--resume", "--seed"):
            raise UserError(f"{word}: an experiment decides that itself; leave it out")
    for seed in args.seeds:
        check_range("--seeds", seed, 0, 2 ** 31)
        if args.seeds.count(seed) > 1:
            raise UserError(f"--seeds: {seed} is given twice, which is one run; give each seed once")
    check_range("--workers", args.workers or 0, 0, 1024)
    if args.device is not None:
        choose_device(args.device)
    return args, extra


def check_out(out):
    """UserError where there is no folder `out` and none can be made."""
    for place in (out, *out.absolute().parents):
        try:
            if not stat.S_ISDIR(place.stat().st_mode):
                raise UserError(f"--out {out}: cannot be made ({place} is no folder); give another --out")
            return
        except FileNotFoundError:
            continue
        except OSError as e:
            raise UserError(f"--out {out}: cannot be made ({e.strerror}); give another --out") from None


def main(argv=None):
    args, extra = get_args(argv)
    given = []
    for flag, value in ("--data-dir", args.data_dir), ("--workers", args.workers), ("--device", args.device):
        if value is not None:
            given += [flag, str(value)]
    experiment = EXPERIMENTS[args.experiment]
    out = Path(args.out or f"runs/{args.experiment}")
    check_out(out)
    runs = plan(experiment, args.seeds, out, given, extra)
    left = [(run, missing(run)) for run in runs]
    left = [(run, steps) for run, steps in left if steps]
    print(f"{args.experiment}: {len(runs) - len(left)} of {len(runs)} runs finished", flush=True)
    jobs = []
    for run, steps in left:
        show_left(run, steps)
        jobs += [(run, step) for step in steps]
    if args.dry_run:
        return
    try:
        failed = run_all(experiment, jobs)
        table = tabulate(experiment, runs)
        if not table:
            raise UserError(f"no run of {args.experiment} has finished; the reason stands in "
                            f"{out}/*/output.txt")
        write_table(experiment, table, runs, [*given, *extra], out)
    except OSError as e:                                # a disk that is full or read-only
        raise UserError(f"{e.filename or out}: cannot be written ({e.strerror or e}); the same command goes "
                        "on from what is there") from None
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs did not finish, their rows lack them; the same "
                        "command tries them again")


if __name__ == "__main__":
    main_guard(main)
