"""What runs have found, the table of an experiment of experiments.py, and its picture.

experiment: an entry, with all that it may leave out; table: of tabulate.
"""
import contextlib
import functools
import json
import math
import re
import statistics
import textwrap

import torch
from matplotlib.figure import Figure

import common
import heads
import probe
import run
from common import UserError

WIDTH = 1.4                                             # inches of a row in the picture
KEPT = "step-*.pt"                                      # in a step's words: all checkpoints of a run


# ----------------------------------------------------------------------------------------------------------
# What a run has found
# ----------------------------------------------------------------------------------------------------------

def read(path):
    """The dict in a JSON file, None if it is missing, cut off or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def texts(value):
    """A list of texts as it is, of anything else an empty one."""
    return value if isinstance(value, list) and all(isinstance(text, str) for text in value) else []


def write(path, content):
    text = json.dumps(content, indent=1) + "\n"
    run.replace_file(path, lambda file: file.write(text.encode()))


@functools.lru_cache(None)
def sizes(folder):
    """Of a finished run {measure: number}. The parameters trained are those that the optimiser has moments
    of: neither the teacher nor a buffer is among them."""
    moments = common.load_checkpoint(folder)["optimizer"]["state"].values()
    vit = common.load_encoder(folder).vit
    return {"parameters of the encoder": sum(p.numel() for p in vit.parameters()),
            "parameters trained": sum(moment["exp_avg"].numel() for moment in moments),
            **{f"{modality} tokens of a clip": vit.num(modality) for modality in vit.grids}}


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


def seconds_of(rows):
    """That a step took: the rows of one checkpoint say it each."""
    return sum({row["step"]: row["seconds"] for row in rows}.values())


def are_rows(rows):
    """Whether these are rows of probe.jsonl or retrieval.jsonl that say what is taken from them here."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    for row in rows:
        values = [row.get("seconds"), row.get("step")]
        names = []
        if "tested" in row:                             # of probe.py
            values.append(row.get("value"))
            names += [row["tested"], row.get("head")]
        if not all(isinstance(x, (int, float)) for x in values) or not all(isinstance(x, str) for x in names):
            return False
    return bool(rows)


def new_rows(file, before, words):
    """The rows of a .jsonl file from a byte on that a step of these words writes; [] where one is broken."""
    try:
        rows = [json.loads(line) for line in file.read_bytes()[before:].splitlines()]
    except (OSError, ValueError):
        return []
    flags = dict(zip(words, words[1:]))
    said = {"data": flags.get("--data"), "baseline": flags.get("--baseline"),
            "untrained": "--untrained" in words}
    if "--modality" in flags:
        said["modality"] = flags["--modality"]
    own = []
    for row in rows if are_rows(rows) else ():
        if {name: row.get(name, value) for name, value in said.items()} == said:
            own.append(row)
    return own


def numbers(results, steps, names):
    """{path: number}: of results.json, and of the rows {step: rows} that the steps behind a training wrote,
    each below its name of {step: name}. A head on both modalities that is tested on one of them counts where
    no head of that modality does."""
    flat = flatten(results)
    for step, rows in steps.items():
        for row in rows:
            above = [names[step]]
            if KEPT in step:
                above.append(str(row["step"]))
            if "tested" not in row:                     # of pixels.py or retrieval.py
                flat.update(flatten(row, *above))
                continue
            if row["head"] not in (*heads.ON_EMBEDDING, "regression"):
                above.append("attentive")
            path = "/".join((*above, row["tested"]))
            if path not in flat or row.get("modality") == row["tested"]:
                flat[path] = row["value"]
    return flat


def measures(folder, results, steps, count):
    """Of a finished run {"run/measure": number}. steps: as of numbers, of `count` that it is to have."""
    seconds, minutes = step_times(run.read_log(folder))
    values = {"seconds a step": seconds, "minutes of training": minutes}
    with contextlib.suppress(UserError):                # a checkpoint that is gone, or broken
        values.update(sizes(folder))
    if isinstance(results.get("seconds"), (int, float)):
        values["minutes of evaluation"] = results["seconds"] / 60
    if steps and len(steps) == count:
        values["minutes of the steps after"] = sum(map(seconds_of, steps.values())) / 60
    return flatten({"run": values})


def progress(file):
    """(steps done, steps in all) of a checkpoint; (0, None) where there is none, or it is broken."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)    # reads no weights
        return content["step"], content.get("steps")
    except Exception:                                   # torch raises half a dozen kinds for a damaged file
        return 0, None


def training_time(folder):
    """(seconds that a run's training and the table at its end take, share of it that is done), or (None, 0)
    where nothing says so."""
    seconds, _ = step_times(run.read_log(folder))
    done, total = progress(folder / "latest.pt")
    if not (seconds and total):
        return None, 0
    results = flatten(read(folder / "results.json") or {})
    return seconds * total + results.get("seconds", 0), done / total


def flatten(content, *above):
    """{path: number} of the numbers in nested dicts, their keys with a slash between them."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, *above, str(key)))
        elif isinstance(value, (int, float)):
            flat["/".join((*above, str(key)))] = value
    return flat


def mean_log(logs):
    """The logs of several seeds as one: the means, at each step that all of them have."""
    rows = {}
    for log in logs:
        last = {row["step"]: row for row in log}        # two processes may have written it
        for step, row in last.items():
            rows.setdefault(step, []).append(row)
    mean = []
    for _, of_seeds in sorted(rows.items()):
        if len(of_seeds) < len(logs):
            continue
        columns = set(of_seeds[0]).intersection(*of_seeds[1:])
        means = {}
        for name in of_seeds[0]:                        # in their order
            if name in columns:
                means[name] = statistics.mean(row[name] for row in of_seeds)
        mean.append(means)
    return mean


def curves(folders, below):
    """{row, and how many seeds: the mean of their logs}, of those in the folder `below` those of the runs,
    {row: [folder]}."""
    found = {}
    for row, of_seeds in folders.items():
        logs = [run.read_log(folder / below) for folder in of_seeds]
        logs = [log for log in logs if log]
        mean = mean_log(logs)
        if mean:
            found[f"{row} ({len(logs)} seeds)" if len(logs) > 1 else row] = mean
    return found


# ----------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------

def spell_out(experiment, found):
    """The experiment with a column for each checkpoint that the runs have kept, for those with {step}."""
    columns = {}
    for column, path in experiment["columns"].items():
        if "{step" not in column:
            columns[column] = path
            continue
        steps = set()
        for _, _, numbers in found:
            steps.update(re.findall(path.replace("{step}", r"(\d+)"), "\n".join(numbers)))
        for step in sorted(map(int, steps)):
            columns[column.format(step=step)] = path.format(step=step)
    return {**experiment, "columns": columns}



def summary(values):
    """{seed: value} with mean and standard deviation."""
    numbers = list(values.values())
    return {"values": values, "mean": sum(numbers) / len(numbers), "std": probe.spread(numbers)}


def tabulate(experiment, found):
    """{row: {column: summary, with `differences`, {other row: summary of the differences to it by seeds}}}
    of [(row, seed, {path: number})]; a column that the runs of a row lack is left out."""
    values = {row: {} for row in experiment["rows"]}
    for row, seed, numbers in found:
        for column, path in experiment["columns"].items():
            if path in numbers:
                values[row].setdefault(column, {})[seed] = numbers[path]
    table = {}
    for row, columns in values.items():
        for column, seeds in columns.items():
            cell = table.setdefault(row, {})[column] = summary(seeds)
            for other in others(experiment, row) if compared(experiment, column) else ():
                base = values[other].get(column, {})
                pairs = {seed: value - base[seed] for seed, value in seeds.items() if seed in base}
                if pairs:
                    cell.setdefault("differences", {})[other] = summary(pairs)
    return table


def others(experiment, row):
    """The rows that a row is compared with: those that the experiment names, else the first."""
    if experiment["against"] is None:
        return []
    first, *_ = experiment["rows"]
    return [other for other in experiment["against"].get(row, [first]) if other != row]


def compared(experiment, column):
    """Whether rows are compared by a column; an untrained encoder, a mean and a copy say nothing of them."""
    return not re.search("untrained/|/mean$|/nearest$", experiment["columns"][column])


def number(experiment, column, value, sign=""):
    return format(value, sign + (experiment["formats"].get(column) or ".1f"))


def cell_text(experiment, column, cell):
    """Mean ± standard deviation over the seeds, and of percentages the single values."""
    form = experiment["formats"].get(column, "")
    mean = number(experiment, column, cell["mean"])
    if cell["std"] is None or "," in form:
        return mean
    text = f"{mean} ± {number(experiment, column, cell['std'])}"
    if form:
        return text
    values = [number(experiment, column, value) for value in cell["values"].values()]
    return f"{text} ({', '.join(values)})"


def lines_of(lines):
    """Rows of texts as a Markdown table."""
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts.insert(1, "|---" * len(lines[0]) + "|")
    return "\n".join(texts).replace("|  |", "| |") + "\n"


def markdown(experiment, table):
    """The table as Markdown, the paper's numbers in it; – where a row has no such value, or no run yet."""
    lines = [["", *experiment["columns"], "seeds"]]
    for row in experiment["rows"]:
        cells = table.get(row, {})
        line = [row]
        seeds = {}
        for column in experiment["columns"]:
            cell = cells.get(column)
            paper = experiment["paper"].get(row, {}).get(column)
            text = cell_text(experiment, column, cell) if cell else "–"
            line.append(text if paper is None else f"{text} *({paper})*")
            seeds.update(cell["values"] if cell else {})
        lines.append([*line, ", ".join(map(str, seeds)) or "–"])
    return lines_of(list(zip(*lines)) if experiment["turned"] else lines)


def has_paper(experiment, rows):
    """Whether the paper has a number for some of these rows."""
    return any(experiment["paper"].get(row) for row in rows)


def differences(experiment, table):
    """(the differences by seeds as Markdown, "" of none; those that are no larger than their spread; those
    of one seed, which have none)."""
    columns = [column for column in experiment["columns"] if compared(experiment, column)]
    lines = [["difference by seeds", *columns]]
    small = []
    single = []
    for row, cells in table.items():
        for other in others(experiment, row):
            name = f"{row}, against {other}"
            line = []
            for column in columns:
                cell = cells.get(column, {}).get("differences", {}).get(other)
                line.append(number(experiment, column, cell["mean"], "+") if cell else "–")
                if cell and cell["std"] is None:
                    single.append(f"{name}: {column}")
                elif cell:
                    line[-1] += f" ± {number(experiment, column, cell['std'])}"
                    small += [] if abs(cell["mean"]) > cell["std"] else [f"{name}: {column}"]
            lines += [[name, *line]] if set(line) - {"–"} else []
    return lines_of(lines) if lines[1:] else "", small, single


def notes(experiment, table, lacking):
    """What stands below the table. lacking: {row: seeds} that are missing or not whole."""
    texts = []
    if has_paper(experiment, experiment["rows"]):
        texts.append(f"*(In italics)*: the paper's ({experiment['source']}): other data, other size.\n")
    text, small, single = differences(experiment, table)
    if text:
        texts.append(text)
    if small:
        texts.append(f"No larger than its own spread, so not shown by these seeds: {'; '.join(small)}.\n")
    if single:
        which = "; ".join(single) if "±" in text else "all of these differences"
        texts.append(f"Of one seed alone, so without a spread, and not shown: {which}.\n")
    lines = [f"{row} (seeds: {', '.join(seeds)})" for row, seeds in lacking.items()]
    if lines:
        texts.append(f"Missing or not whole: {'; '.join(lines)}.\n")
    return "\n".join(texts)


# ----------------------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------------------

def panels_of(experiment):
    """{title: (unit, columns, the column of chance)}; one for all columns where the experiment names none. An
    untrained encoder's column is no bar."""
    panels = {}
    for title, (unit, columns, chance) in experiment.get(
            "panels", {"": ("percent", experiment["columns"], None)}).items():
        panels[title] = (unit, [name for name in columns if not name.endswith(", untrained")], chance)
    return panels


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


def draw_panel(ax, experiment, table, unit, columns, chance):
    """The columns side by side for each row. ax: WIDTH wide for each row, and as much more."""
    width = 0.8 / max(2, len(columns))
    for r, (row, cells) in enumerate(table.items()):
        for c, column in enumerate(columns):
            x = r + (c - (len(columns) - 1) / 2) * width
            if column in cells:
                label = re.split(", |: ", column)[-1]
                draw_bar(ax, x, width, cells[column], (c, len(columns)), label)
            if f"{column}, untrained" in cells:
                draw_level(ax, x, width, cells[f"{column}, untrained"])
            if column in experiment["paper"].get(row, {}):
                ax.plot(x, experiment["paper"][row][column], "D", color="0.85", mec="0.4", ms=7,
                        label="paper")
    levels = [cells[chance]["mean"] for cells in table.values() if chance in cells]
    if levels:
        ax.axhline(statistics.mean(levels), color="k", ls="--", lw=1, label="chance")
    handles, labels = ax.get_legend_handles_labels()
    handles = dict(zip(labels, handles))                # each name once
    entry = 0.55 + 0.08 * max(map(len, handles), default=0)         # inches of the longest
    across = max(1, min(5, len(handles), int(WIDTH * (1 + len(table)) / entry)))
    top = ax.get_ylim()[1] * (1.1 + 0.08 * math.ceil(len(handles) / across))    # room for the legend
    ax.set(ylabel=unit, xlim=(-0.5, len(table) - 0.5), ylim=(0, top))
    ax.set_xticks(range(len(table)), [textwrap.fill(row, 18) for row in table])
    if "percent" in unit and top > 100:
        ax.set_yticks(range(0, 101, 20))
    if len(handles) > 1:
        ax.legend(handles.values(), handles, loc="upper center", ncol=across, fontsize=9, columnspacing=1)


def draw(experiment, table):
    """The picture: the panels, two side by side."""
    panels = panels_of(experiment)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / 2)
    width = max(6, across * WIDTH * (1 + len(table)))
    fig = Figure(figsize=(width, 4.5 * down), layout="constrained")
    axes = fig.subplots(down, across, squeeze=False)
    for ax, (title, panel) in zip(axes.flat, panels.items()):
        draw_panel(ax, experiment, table, *panel)
        ax.set_title(title)
    for ax in list(axes.flat)[len(panels):]:
        ax.axis("off")
    legend = "bars: mean over the seeds, whiskers: one standard deviation, dots: the seeds"
    if has_paper(experiment, table):
        legend += "; grey diamonds: the paper's, other data, other size"
    lines = [textwrap.fill(line, int(12 * width)) for line in (experiment["title"], legend)]
    fig.suptitle("\n".join(lines), fontsize=10)
    return fig


# ----------------------------------------------------------------------------------------------------------
# Their files
# ----------------------------------------------------------------------------------------------------------

def slug(text):
    """A name of a row or a picture as one of a file."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def save(experiment, found, folders, lacking, about, out):
    """Write table.json, table.md, table.png and the curves into the folder `out`, and show the table. found:
    of tabulate; folders: {row: [folder of a finished run]}; lacking: of notes; about: more for the JSON."""
    experiment = spell_out(experiment, found)
    table = tabulate(experiment, found)
    write(out / "table.json", {
        "title": experiment["title"], **about, "rows": table, "paper": experiment["paper"],
        "source": experiment["source"]})
    text = f"{markdown(experiment, table)}\n{notes(experiment, table, lacking)}".rstrip() + "\n"
    run.replace_file(out / "table.md", lambda file: file.write(text.encode()))
    files = ["table.md", "table.json"]
    if table:
        picture = draw(experiment, table)
        files.append("table.png")
        run.replace_file(out / files[-1], lambda file: picture.savefig(file, format="png", dpi=110))
    for title, below in experiment["curves"].items():
        logs = curves(folders, below)
        if logs:
            draw_logs = functools.partial(run.draw_curves, runs=logs, title=f"{experiment['title']}: {title}")
            files.append(f"{slug(title)}.png")
            run.replace_file(out / files[-1], draw_logs)
    print(f"\n{experiment['title']}\n\n{text}\n{out}/{', '.join(files)}")
