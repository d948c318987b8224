"""A claim as one command: train the rows of an experiment over several seeds, and write its table and its picture.

    python reproduce.py masking                       # A-JEPA's table of maskings on the toy data
    python reproduce.py masking --dry-run             # what is finished and what is left
    python reproduce.py masking --seeds 0 1 2 3 4     # more seeds: only those that are missing are run

A row is a command line of our own scripts. Each run is a process of its own with a folder of its own: what is finished is skipped, a
run that was stopped goes on from its checkpoint, and one that failed is named while the others go on. Flags that this script does
not know are handed to each run (--steps 100 --data-dir toy/); what a row says itself stays.
"""
import argparse, functools, json, math, re, shlex, signal, subprocess, sys, time
from pathlib import Path

from common import Help, UserError, code_version, main_guard, replace_file

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
}


def plan(experiment, seeds, out, extra):
    """The runs: a list of dict(row, seed, folder, command); seed by seed, so that whoever stops early has a whole table of fewer seeds."""
    runs = []
    for seed in seeds:
        for row, command in experiment["rows"].items():
            script, *flags = shlex.split(command)
            folder = Path(out) / f"{re.sub('[^a-z0-9]+', '-', row.lower()).strip('-')}-seed{seed}"
            runs.append({"row": row, "seed": seed, "folder": folder,
                         "command": [script, *shlex.split(experiment["flags"]), *extra, *flags, "--seed", str(seed), "--out", str(folder)]})
    return runs


def read(path):
    """The dict in a JSON file, None if it is missing, cut off or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finished(run):
    """The results of a run, or None if it is not finished. Raises UserError if the folder holds a run of another command."""
    begun, results = read(run["folder"] / "command.json"), read(run["folder"] / "results.json")
    same = begun and begun["command"][:-2] == run["command"][:-2]          # but for --out: the folder may have moved
    if not same and (results or (run["folder"] / "latest.pt").is_file()):
        raise UserError(f"{run['folder']} holds a run of another command; give another --out, or remove it")
    return {**results, "versions": begun["versions"]} if same and results else None


def execute(run):
    """Run the command to its end; its output goes into the folder. Returns the exit code."""
    run["folder"].mkdir(parents=True, exist_ok=True)
    before = read(run["folder"] / "command.json") if (run["folder"] / "latest.pt").is_file() else None
    versions = dict.fromkeys([*(before["versions"] if before else []), code_version()])     # of all that trained it
    content = json.dumps({"command": run["command"], "versions": list(versions)})
    replace_file(run["folder"] / "command.json", lambda f: f.write(content.encode()))
    with open(run["folder"] / "output.txt", "ab") as output:
        script, *flags = run["command"]
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


def markdown(experiment, table):
    """The table as Markdown: mean ± standard deviation over the seeds, and the single values; – where a row has none."""
    def text(cell):
        values = ", ".join(f"{value:.1f}" for value in cell["values"].values())
        return f"{cell['mean']:.1f}" + ("" if cell["std"] is None else f" ± {cell['std']:.1f} ({values})")

    lines = ["| | " + " | ".join(experiment["columns"]) + " | seeds |", "|---" * (len(experiment["columns"]) + 2) + "|"]
    for row, cells in table.items():
        texts = [text(cells[column]) if column in cells else "–" for column in experiment["columns"]]
        seeds = dict.fromkeys(str(seed) for cell in cells.values() for seed in cell["values"])
        lines.append(f"| {row} | " + " | ".join(texts) + f" | {', '.join(seeds)} |")
    return "\n".join(lines) + "\n"


def draw(experiment, table, path):
    """A bar for the mean, a line for one standard deviation, a dot for each seed; the first columns side by side."""
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
            ax.bar(x, cell["mean"], 0.9 * width, color=str(0.45 + 0.45 * c / len(columns)), hatch=("", "//", "..")[c % 3], edgecolor="k",
                   yerr=cell["std"] or 0, capsize=4, label=column if row == there[0] else None)
            ax.plot([x] * len(cell["values"]), cell["values"].values(), "ko", ms=4, mfc="w")
    ax.set(xticks=range(len(rows)), ylabel="percent", title="\n".join(experiment["title"].split(": ")))
    ax.set_xticklabels(rows)
    ax.set_ylim(top=1.2 * ax.get_ylim()[1])             # room for the legend
    ax.legend(loc="upper right", ncol=len(columns))
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


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
    left = [run for run in runs if not finished(run)]
    print(f"{args.experiment}: {len(runs) - len(left)} of {len(runs)} runs finished" + "".join(
        f"\n  left: {run['row']}, seed {run['seed']}: {shlex.join(run['command'])}" for run in left), flush=True)
    if args.dry_run:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from None
    began, failed = time.time(), []
    for number, run in enumerate(left):
        clock = time.time()
        code = execute(run)
        if code or not finished(run):
            failed.append(run)
            how = f"failed (exit code {code})" if code else "was stopped before its end"
            print(f"{run['row']}, seed {run['seed']} {how}: see {run['folder']}/output.txt", flush=True)
            continue
        cells = tabulate(experiment, [run])[run["row"]]
        values = ", ".join(f"{column} {cell['mean']:.1f}" for column, cell in cells.items())
        rest = (time.time() - began) / (number + 1) * (len(left) - number - 1)
        print(f"{run['row']}, seed {run['seed']}: {values} ({time.time() - clock:.0f} s; {len(left) - number - 1} runs left, about "
              f"{rest / 60:.0f} min)", flush=True)
    table = tabulate(experiment, runs)
    if not table:
        raise UserError(f"no run of {args.experiment} has finished; the reason stands in {out}/*/output.txt")
    versions = sorted({version for results in map(finished, runs) if results for version in results["versions"]})
    content = {"title": experiment["title"], "commands": experiment["rows"], "flags": [*shlex.split(experiment["flags"]), *extra],
               "versions": versions, "rows": table}
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "table.md").write_text(markdown(experiment, table))
    draw(experiment, table, out / "table.png")
    print(f"\n{experiment['title']}\n\n{markdown(experiment, table)}\n{out}/table.md, table.json, table.png")
    if len(versions) > 1:
        print(f"the runs are of different versions of the code: {', '.join(versions)}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs did not finish, their rows lack them; the same command tries them again")


if __name__ == "__main__":
    main_guard(main)
