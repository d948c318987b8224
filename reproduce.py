"""A claim as one command: train the rows of an experiment over several seeds, and write its table and its picture.

    python reproduce.py masking                       # A-JEPA's table of maskings on the toy data
    python reproduce.py masking --dry-run             # what is finished and what is left
    python reproduce.py masking --seeds 0 1 2 3 4     # more seeds: only those that are missing are run
    python reproduce.py methods                       # the four methods side by side: probes, retrieval, size and time

A row is a command line of our own scripts. Each run is a process of its own with a folder of its own: what is finished is skipped, a
run that was stopped goes on from its checkpoint, and one that failed is named while the others go on. A finished run of the same
recipe beside the experiment (runs/*, runs/*/*) is taken, not trained again; nothing but rows of probe.jsonl is written there. Flags
that this script does not know are handed to each run (--steps 100 --data-dir toy/); what a row says itself stays.
"""
import argparse, contextlib, functools, importlib, io, json, math, re, shlex, signal, statistics, subprocess, sys, time
from pathlib import Path

import common, data, probe
from common import Help, UserError, code_version, main_guard, replace_file

# one head for all, and two rates: MJEPA's own, of four blocks, takes too long on two cores
ATTENTIVE = "probe.py --data toy --probe attentive --head attentive --lr 1e-3 1e-2 --modality"
METHODS = {"A-JEPA": "ajepa.py", "AV-JEPA": "avjepa_lejepa.py", "MJEPA": "mjepa.py", "AVJEPA (NC State)": "avjepa_ncsu.py"}
NAMES = {"audio": "audio", "video": "video", "audio + video": "av"}
WAYS = ("A->V", "V->A")
EXPERIMENTS = {
    # name: what the title says; {column: where it lies in results.json}; flags of all rows, which the user's may replace; {row: command}
    "masking": dict(
        title="A-JEPA's table of maskings, on the toy data: linear probe on held-out clips, top-1 in percent",
        columns={"linear probe": ("trained", "audio"), "untrained": ("untrained", "audio")},
        flags="--steps 500",                            # half of the toy run, for 15 runs in 40 minutes
        rows={"random patches, 75 %": "ajepa.py --masking random --mask-ratio 0.75",
              "time strips": "ajepa.py --masking time",
              "frequency strips": "ajepa.py --masking freq",
              "single block, 75 %": "ajepa.py --masking block --mask-ratio 0.75",
              "multi-block": "ajepa.py --masking multiblock"}),
    "cross-modal": dict(
        title="MJEPA's table of terms, on the toy data: linear probe on held-out clips, top-1 in percent",
        columns={**{name: ("trained", key) for name, key in (("A", "audio"), ("V", "video"), ("AV", "av"))},
                 **{f"{name}, untrained": ("untrained", key) for name, key in (("A", "audio"), ("V", "video"), ("AV", "av"))}},
        flags="",
        rows={"separate, audio": "mjepa.py --terms separate-audio",
              "separate, video": "mjepa.py --terms separate-video",
              "shared, within alone": "mjepa.py --terms intra",
              "and A<->V across": "mjepa.py --terms intra+av",
              "all nine": "mjepa.py --terms all"}),
    "sound": dict(
        title="AVJEPA: does sound help a small model? Toy data: linear probe of the class on held-out clips, top-1 in percent",
        # the encoder trained with sound is asked without it as well: so the authors' code asks it
        columns={"video alone": ("trained", "video"), "video + sound": ("trained", "av"), "video alone, untrained": ("untrained", "video"),
                 "video + sound, untrained": ("untrained", "av")},
        flags="",
        rows={f"{size}, trained on {what}": f"avjepa_ncsu.py --size {size} --modalities {modalities}"
              for size in ("nano", "toy") for what, modalities in (("video", "video"), ("video + sound", "av"))}),
    "methods": dict(
        title="The four methods on the toy data: frozen encoders on held-out clips, probes (top-1) and retrieval (R@10) in percent",
        columns={**{f"linear probe, {name}{which and ', ' + which}": (which or "trained", key)
                    for name, key in NAMES.items() for which in ("", "untrained", "raw input")},
                 **{f"attentive probe, {name}{which and ', ' + which}": ("attentive", which or "trained", key)
                    for name, key in NAMES.items() for which in ("", "untrained")},
                 **{f"R@10, {way}{which and ', ' + which}": (which or "trained", way, "R@10")
                    for way in WAYS for which in ("", "untrained")},
                 "chance, probes": ("chance", "audio"), "chance, R@10": ("chance", "A->V", "R@10"),
                 **{name: ("run", name) for name in (
                     "parameters of the encoder", "parameters trained", "video tokens of a clip", "audio tokens of a clip",
                     "seconds a step", "minutes of training", "minutes of evaluation", "minutes of attentive probes")}},
        # how a value is written that is not measured in percent; with a comma: it is the same for all seeds
        formats={"chance, probes": ",.1f", "chance, R@10": ",.1f", "parameters of the encoder": ",.0f", "parameters trained": ",.0f",
                 "video tokens of a clip": ",.0f", "audio tokens of a clip": ",.0f", "seconds a step": ".3f",
                 "minutes of training": ".1f", "minutes of evaluation": ".1f", "minutes of attentive probes": ".1f"},
        # of the picture: {title: (unit, columns, the column of chance)}
        panels={"linear probe": ("top-1, percent", [f"linear probe, {name}" for name in NAMES], "chance, probes"),
                "attentive probe": ("top-1, percent", [f"attentive probe, {name}" for name in NAMES], "chance, probes"),
                "retrieval": ("R@10, percent", [f"R@10, {way}" for way in WAYS], "chance, R@10"),
                "time of a training step": ("seconds", ["seconds a step"], None)},
        flags="",
        rows=METHODS,
        # {row: commands on the folder of its finished run}
        after={row: [f"{ATTENTIVE} {key}{baseline}" for key in (NAMES.values() if row != "A-JEPA" else ("audio",))
                     for baseline in ("", " --baseline untrained")] for row in METHODS}),
}


def asked(command):
    """(args, recipe) that the script of a command makes of its flags; None for a script that is no method of ours, and for flags that it
    refuses: the run itself then says why."""
    script, *flags = command
    if script.removesuffix(".py") not in probe.ATTENTIVE:
        return None
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return importlib.import_module(script.removesuffix(".py")).get_args(flags)
        except (UserError, SystemExit):
            return None


def plan(experiment, seeds, out, extra):
    """The runs: a list of dict(row, seed, folder, own, command, after); seed by seed, so that whoever stops early has a whole table of
    fewer seeds. folder: where its checkpoint lies, own: where its output goes; after: the commands on its folder."""
    runs = []
    for seed in seeds:
        for row, command in experiment["rows"].items():
            script, *flags = shlex.split(command)
            folder = Path(out) / f"{re.sub('[^a-z0-9]+', '-', row.lower()).strip('-')}-seed{seed}"
            command = [script, *shlex.split(experiment["flags"]), *extra, *flags, "--seed", str(seed), "--out", str(folder)]
            runs.append({"row": row, "seed": seed, "folder": folder, "own": folder, "command": command,
                         "after": experiment.get("after", {}).get(row, [])})
    return runs


def probes(run):
    """The command lines on the folder of a run, with those of the user's flags that they know as well."""
    args = (asked(run["command"]) or [argparse.Namespace(data_dir=None, workers=None, device="auto")])[0]
    given = {"--data-dir": args.data_dir, "--workers": args.workers, "--device": args.device}
    words = [str(word) for flag, value in given.items() if value not in (None, "auto") for word in (flag, value)]
    return [[*shlex.split(command), *words, "--ckpt", str(run["folder"])] for command in run["after"]]


def read(path):
    """The dict in a JSON file, None if it is missing, cut off or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished(run):
    """The results of a run, with its measures where the experiment probes it further, or None if it is not finished. Raises UserError if
    the folder holds a run of another command."""
    begun, results = read(run["folder"] / "command.json"), read(run["folder"] / "results.json")
    same = "taken" in run or begun and begun["command"][:-2] == run["command"][:-2]        # but for --out: the folder may have moved
    if not same and (results or (run["folder"] / "latest.pt").is_file()):
        raise UserError(f"{run['folder']} holds a run of another command; give another --out, or remove it")
    if not (same and results):
        return None
    return {**results, "versions": run.get("taken") or begun["versions"], **(measures(run, results) if run["after"] else {})}


@functools.lru_cache(None)
def facts(folder):
    """Of a finished run, what does not change any more: dict(step, absent, seconds of a view by modality, sizes). The parameters trained
    are those that the optimiser has moments of: neither the teacher nor a buffer is among them."""
    content, vit = common.load_checkpoint(folder), common.load_encoder(folder).vit
    seconds = content["inputs"]["seconds"]
    sizes = {"parameters of the encoder": sum(p.numel() for p in vit.parameters()),
             "parameters trained": sum(moments["exp_avg"].numel() for moments in content["optimizer"]["state"].values()),
             **{f"{m} tokens of a clip": getattr(vit, m).num for m in ("video", "audio") if getattr(vit, m)}}
    return {"step": content["step"], "absent": vit.absent, "sizes": sizes,
            "seconds": {"audio": seconds, "av": seconds, "video": content["inputs"].get("video_seconds") or seconds}}


def probed(run, command):
    """The last row of the run's probe.jsonl that this command has written or would write again, or None."""
    args, of = probe.get_args(command[1:]), facts(run["folder"].resolve())
    # views, epochs: the defaults on the toy data
    want = {**{key: getattr(args, key) for key in ("data", "probe", "head", "modality", "baseline", "encoder", "layers", "seed")},
            "lrs": args.lr, "absent": of["absent"], "step": of["step"], "views": 4, "view_seconds": of["seconds"][args.modality],
            "epochs": probe.frozen_schedule(data.TOY["train"])[1]}
    file = run["folder"] / "probe.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):                 # a line that was cut off
            rows.append(json.loads(line))
    rows = [row for row in rows if all(row.get(key) == value for key, value in want.items())]
    return rows[-1] if rows else None


def step_times(log):
    """(median seconds a step, minutes of all steps) by the rows of a log.jsonl, each of which holds the milliseconds of the steps since the
    row before; of no rows (None, None)."""
    if not log:
        return None, None
    steps = [row["step"] - before for row, before in zip(log, [-1, *(row["step"] for row in log)])]
    return (statistics.median(row["ms_step"] for row in log) / 1e3,
            sum(row["ms_step"] * count for row, count in zip(log, steps)) / 6e4)


def measures(run, results):
    """What results.json lacks: {"attentive": {trained or untrained: {modality: top-1 in percent}}, "run": {measure: value}}."""
    table, rows = {"trained": {}, "untrained": {}}, [probed(run, command) for command in probes(run)]
    for row in filter(None, rows):
        table[row["baseline"] or "trained"][row["modality"]] = row["value"]
    step, training = step_times(common.read_log(run["folder"]))
    return {"attentive": table, "run": {
        **facts(run["folder"].resolve())["sizes"], "seconds a step": step, "minutes of training": training,
        "minutes of evaluation": results["seconds"] / 60 if "seconds" in results else None,
        "minutes of attentive probes": sum(row["seconds"] for row in rows) / 60 if all(rows) else None}}


def missing(run):
    """The commands that a run still needs, in their order."""
    if not finished(run):
        return [run["command"], *probes(run)]
    return [command for command in probes(run) if not probed(run, command)]


def elsewhere(out):
    """{folder: its checkpoint, but for the weights} of the finished runs one or two levels below the folder in which `out` lies."""
    found = {}
    for file in sorted([*out.parent.glob("*/results.json"), *out.parent.glob("*/*/results.json")]):
        with contextlib.suppress(UserError):            # no checkpoint beside it, or a damaged one
            content = read(file) and common.load_checkpoint(file.parent)
            if content and {"recipe", "args", "steps"} <= content.keys():
                found[file.parent] = {key: content[key] for key in ("method", "step", "steps", "args", "recipe", "version")}
    return found


def same_run(content, command):
    """Whether a checkpoint is the end of the run that the command asks for, wherever its folder is."""
    args, recipe = asked(command)
    before = content["recipe"]
    # steps (of --epochs) and schedule: None in get_args, and settled in main
    other = [key for key in {**before, **recipe} if before.get(key) != recipe.get(key)
             and not (key in ("steps", "schedule") and recipe.get(key) is None)]
    other += [key for key in ("init",) if content["args"].get(key) != getattr(args, key, None)]             # weights of another run
    there = args.data_dir is None or Path(content["args"]["data_dir"] or data.toy_folder()).resolve() == Path(args.data_dir).resolve()
    return content["method"] == command[0].removesuffix(".py") and content["step"] == content["steps"] and not other and there


def take_finished(runs, out):
    """Put a finished run of the same recipe, where one lies elsewhere, in the place of each that is not finished, and say so."""
    wanting = [run for run in runs if asked(run["command"]) and not finished(run)]
    found = elsewhere(out) if wanting else {}
    for run in wanting:
        folder = next((folder for folder, content in found.items() if same_run(content, run["command"])), None)
        if folder:
            begun = read(folder / "command.json") or {}
            run.update(folder=folder, taken=begun.get("versions") or [found[folder]["version"]])
            print(f"{run['row']}, seed {run['seed']}: takes {folder}, which is finished", flush=True)


def execute(run, command):
    """Run a command of a run to its end; its output goes into the run's own folder. Returns the exit code."""
    run["own"].mkdir(parents=True, exist_ok=True)
    if command == run["command"]:
        before = read(run["folder"] / "command.json") if (run["folder"] / "latest.pt").is_file() else None
        versions = dict.fromkeys([*(before["versions"] if before else []), code_version()])     # of all that trained it
        content = json.dumps({"command": run["command"], "versions": list(versions)})
        replace_file(run["folder"] / "command.json", lambda f: f.write(content.encode()))
    with open(run["own"] / "output.txt", "ab") as output:
        script, *flags = command
        process = subprocess.Popen([sys.executable, str(Path(__file__).parent / script), *flags], stdout=output, stderr=output)
        try:
            return process.wait()
        except BaseException:                           # Ctrl-C reached it as well: it saves, then ends
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise


def spread(values):
    """(mean, standard deviation of the sample, None for a single value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None


def tabulate(experiment, runs):
    """{row: {column: {mean, std, values by seed}}} of what is finished; a column that the runs of a row lack is left out."""
    table = {}
    for run in runs:
        results = finished(run)
        if results:
            cells = table.setdefault(run["row"], {})
            for column, keys in experiment["columns"].items():
                value = functools.reduce(lambda part, key: (part or {}).get(key), keys, results)
                if value is not None:
                    cells.setdefault(column, {"values": {}})["values"][run["seed"]] = value
    for row in table.values():
        for cell in row.values():
            cell["mean"], cell["std"] = spread(list(cell["values"].values()))
    return table


def number(experiment, column, value):
    return format(value, experiment.get("formats", {}).get(column, ".1f"))


def markdown(experiment, table):
    """The table as Markdown: mean ± standard deviation over the seeds, and the single values of percentages; – where a row has none. An
    experiment with panels has many measures: there the rows are its columns."""
    def text(column, cell):
        write, style = functools.partial(number, experiment, column), experiment.get("formats", {}).get(column, "")
        if cell["std"] is None or "," in style:
            return write(cell["mean"])
        return f"{write(cell['mean'])} ± {write(cell['std'])}" + ("" if style else f" ({', '.join(map(write, cell['values'].values()))})")

    lines = [["", *experiment["columns"], "seeds"]]
    for row, cells in table.items():
        texts = [text(column, cells[column]) if column in cells else "–" for column in experiment["columns"]]
        seeds = dict.fromkeys(str(seed) for cell in cells.values() for seed in cell["values"])
        lines.append([row, *texts, ", ".join(seeds)])
    lines = list(zip(*lines)) if "panels" in experiment else lines
    lines.insert(1, None)
    return "".join("|---" * len(lines[0]) + "|\n" if line is None else "".join(f"| {cell} " if cell else "| " for cell in line) + "|\n"
                   for line in lines)


def bar(ax, x, width, cell, c, columns, label):
    """A bar for the mean, a line for one standard deviation, a dot for each seed; c: which of so many columns, by its grey and hatch."""
    ax.bar(x, cell["mean"], 0.9 * width, color=str(0.45 + 0.45 * c / columns), hatch=("", "//", "..")[c % 3], edgecolor="k",
           yerr=cell["std"] or 0, capsize=4, label=label)
    ax.plot([x] * len(cell["values"]), cell["values"].values(), "ko", ms=4, mfc="w")


def draw(experiment, table, path):
    """table.png: the columns side by side, for each row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns, rows = list(experiment["columns"]), list(table)
    fig, ax = plt.subplots(figsize=(1.6 + 1.6 * len(rows), 4.2))
    width = 0.8 / len(columns)
    for c, column in enumerate(columns):
        there = [row for row in rows if column in table[row]]
        for row in there:
            cell, x = table[row][column], rows.index(row) + (c - (len(columns) - 1) / 2) * width
            bar(ax, x, width, cell, c, len(columns), column if row == there[0] else None)
    ax.set(xticks=range(len(rows)), ylabel="percent", title="\n".join(experiment["title"].split(": ")))
    ax.set_xticklabels(rows)
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])             # room for the legend
    ax.legend(loc="upper right", ncol=len(columns))
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_panels(experiment, table, path):
    """table.png of an experiment with panels: one for each, with a thick line over a bar where the untrained encoder stands."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 2, figsize=(14, 9))
    for ax, (title, (unit, columns, chance)) in zip(axes.flat, experiment["panels"].items()):
        width = 0.8 / max(2, len(columns))
        for r, cells in enumerate(table.values()):
            for c, column in enumerate(columns):
                x = r + (c - (len(columns) - 1) / 2) * width
                if column in cells:
                    bar(ax, x, width, cells[column], c, len(columns), column.split(", ")[-1])
                if f"{column}, untrained" in cells:
                    level, ends = 2 * [cells[f"{column}, untrained"]["mean"]], [x - 0.45 * width, x + 0.45 * width]
                    ax.plot(ends, level, "w-", lw=6, solid_capstyle="butt", zorder=1.5)         # to be seen on the darkest bar as well
                    ax.plot(ends, level, "k-", lw=3, solid_capstyle="butt", zorder=1.6, label="untrained")
        levels = [cells[chance]["mean"] for cells in table.values() if chance in cells]
        if levels:
            ax.axhline(statistics.mean(levels), color="k", ls="--", lw=1, label="chance")
        ax.set(xticks=range(len(table)), ylabel=unit, title=title, xlim=(-0.5, len(table) - 0.5), ylim=(0, 1.25 * ax.get_ylim()[1]))
        ax.set_xticklabels(table)
        if "percent" in unit and ax.get_ylim()[1] > 100:
            ax.set_yticks(range(0, 101, 20))
        labels = dict(zip(*ax.get_legend_handles_labels()[::-1]))                   # each name once
        if len(columns) > 1 and labels:
            ax.legend(labels.values(), labels, loc="upper center", ncol=len(labels), fontsize=9, columnspacing=1)
    fig.suptitle(experiment["title"] + "\nbars: mean over the seeds, whiskers: one standard deviation, dots: the seeds")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def called(run, command):
    """What the screen calls a command of a run."""
    if command == run["command"]:
        return f"{run['row']}, seed {run['seed']}"
    args = probe.get_args(command[1:])
    return f"{run['row']}, seed {run['seed']}, {args.probe} probe, {args.modality}, {args.baseline or 'trained'}"


def describe_left(run, commands):
    """The lines that name what is left of a run."""
    if commands[0] == run["command"]:                   # the probes' lines would be many
        then = f", then {len(commands) - 1} probes of it" if len(commands) > 1 else ""
        return f"\n  left: {called(run, commands[0])}: {shlex.join(commands[0])}{then}"
    return "".join(f"\n  left: {called(run, command)}: {shlex.join(command)}" for command in commands)


def brought(experiment, run, before):
    """The values, for the screen, that a run has more of than it had; of those that the picture shows, if there are any."""
    cells = tabulate(experiment, [run])[run["row"]]
    shown = [column for _, columns, _ in experiment.get("panels", {}).values() for column in columns]
    new = [column for column in cells if column not in before]
    return ", ".join(f"{column} {number(experiment, column, cells[column]['mean'])}"
                     for column in [column for column in new if column in shown] or new)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("experiment", choices=tuple(EXPERIMENTS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--out", help="folder of its runs, table and picture (default: runs/EXPERIMENT)")
    add("--dry-run", action="store_true", help="show what is finished and what is left, and run nothing")
    args, extra = parser.parse_known_args(argv)
    for word in extra:
        if word.split("=")[0] in ("--data", "--fresh", "--resume"):
            raise UserError(f"{word}: an experiment decides that itself; leave it out")
    experiment, out = EXPERIMENTS[args.experiment], Path(args.out or f"runs/{args.experiment}")
    runs = plan(experiment, dict.fromkeys(args.seeds), out, extra)
    take_finished(runs, out)
    left = [(run, commands) for run in runs if (commands := missing(run))]
    print(f"{args.experiment}: {len(runs) - len(left)} of {len(runs)} runs finished" + "".join(
        describe_left(run, commands) for run, commands in left), flush=True)
    if args.dry_run:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None
    began, failed, jobs = time.time(), [], [(run, command) for run, commands in left for command in commands]
    for done, (run, command) in enumerate(jobs, 1):
        if run in failed and not finished(run):         # it failed in training: there is nothing to probe
            continue
        clock, before = time.time(), tabulate(experiment, [run]).get(run["row"], {})
        code = execute(run, command)
        if code or command in missing(run):
            failed += [run] if run not in failed else []
            how = f"failed (exit code {code})" if code else "was stopped before its end"
            print(f"{called(run, command)} {how}: see {run['own']}/output.txt", flush=True)
            continue
        rest = (time.time() - began) / done * (len(jobs) - done)
        print(f"{called(run, command)}: {brought(experiment, run, before)} ({time.time() - clock:.0f} s; {len(jobs) - done} runs left, "
              f"about {rest / 60:.0f} min)", flush=True)
    table = tabulate(experiment, runs)
    if not table:
        raise UserError(f"no run of {args.experiment} has finished; the reason stands in {out}/*/output.txt")
    versions = sorted({version for results in map(finished, runs) if results for version in results["versions"]})
    content = {"title": experiment["title"], "commands": experiment["rows"], "flags": [*shlex.split(experiment["flags"]), *extra],
               "versions": versions, "rows": table}
    taken = {str(run["own"]): str(run["folder"]) for run in runs if "taken" in run}
    content.update({"taken": taken} if taken else {})
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text(markdown(experiment, table))
    (draw_panels if "panels" in experiment else draw)(experiment, table, out / "table.png")
    print(f"\n{experiment['title']}\n\n{markdown(experiment, table)}\n{out}/table.md, table.json, table.png")
    if len(versions) > 1:
        print(f"the runs are of different versions of the code: {', '.join(versions)}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs did not finish, their rows lack them; the same command tries them again")


if __name__ == "__main__":
    main_guard(main)
