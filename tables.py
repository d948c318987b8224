"""The table of an experiment of experiments.py, and its picture.

experiment: an entry, with all that it may leave out; table: of tabulate.
"""
import math
import statistics
import textwrap

from matplotlib.figure import Figure

import probe


def flatten(content, *above):
    """{path: number} of the numbers in nested dicts, their keys with a slash between them."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat.update(flatten(value, *above, str(key)))
        elif isinstance(value, (int, float)):
            flat["/".join((*above, str(key)))] = value
    return flat


def summary(values):
    """{seed: value} with mean and standard deviation."""
    numbers = list(values.values())
    return {"values": values, "mean": sum(numbers) / len(numbers), "std": probe.spread(numbers)}


def tabulate(experiment, found):
    """{row: {column: summary, with `difference`, the summary of the differences to the first row by seeds}}
    of [(row, seed, {path: number})]; a column that the runs of a row lack is left out."""
    values = {row: {} for row in experiment["rows"]}
    for row, seed, numbers in found:
        for column, path in experiment["columns"].items():
            if path in numbers:
                values[row].setdefault(column, {})[seed] = numbers[path]
    table = {}
    first, *_ = values.values()
    for row, columns in values.items():
        for column, seeds in columns.items():
            cell = table.setdefault(row, {})[column] = summary(seeds)
            base = first.get(column, {})
            pairs = {seed: value - base[seed] for seed, value in seeds.items() if seed in base}
            if pairs and columns is not first and compared(experiment, column):
                cell["difference"] = summary(pairs)
    return table


def compared(experiment, column):
    """Whether rows are compared by a column; an untrained encoder's says nothing of them."""
    return not experiment["rivals"] and not column.endswith(", untrained")


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
    """The table as Markdown, the paper's numbers in it; – where a row has no such value."""
    lines = [["", *experiment["columns"], "seeds"]]
    for row, cells in table.items():
        line = [row]
        seeds = {}
        for column in experiment["columns"]:
            cell = cells.get(column)
            paper = experiment["paper"].get(row, {}).get(column)
            text = cell_text(experiment, column, cell) if cell else "–"
            line.append(text if paper is None else f"{text} *({paper})*")
            seeds.update(cell["values"] if cell else {})
        lines.append([*line, ", ".join(map(str, seeds))])
    return lines_of(list(zip(*lines)) if experiment["rivals"] else lines)


def differences(experiment, table):
    """(the differences to the first row by seeds as Markdown, "" of none; the rows and columns whose
    difference is smaller than its spread)."""
    columns = [column for column in experiment["columns"] if compared(experiment, column)]
    lines = []
    small = []
    for row, cells in table.items():
        line = []
        for column in columns:
            cell = cells.get(column, {}).get("difference")
            line.append(number(experiment, column, cell["mean"], "+") if cell else "–")
            if cell and cell["std"] is not None:
                line[-1] += f" ± {number(experiment, column, cell['std'])}"
                small += [f"{row}, {column}"] if abs(cell["mean"]) < cell["std"] else []
        lines += [[row, *line]] if set(line) - {"–"} else []
    first, *_ = experiment["rows"]
    return lines_of([[f"difference to {first}, by seeds", *columns], *lines]) if lines else "", small


def notes(experiment, table, lacking):
    """What stands below the table. lacking: {row: seeds} that are missing or not whole."""
    texts = []
    if experiment["paper"]:
        texts.append(f"*(In italics)*: the paper's ({experiment['source']}): other data, other size.\n")
    text, small = differences(experiment, table)
    if text:
        texts.append(text)
    if small:
        texts.append(f"Smaller than its own spread, so not shown by these seeds: {'; '.join(small)}.\n")
    lines = [f"{row} (seeds: {', '.join(seeds)})" for row, seeds in lacking.items()]
    if lines:
        texts.append(f"Missing or not whole: {'; '.join(lines)}.\n")
    return "\n".join(texts)


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
    """The columns side by side for each row."""
    width = 0.8 / max(2, len(columns))
    for r, (row, cells) in enumerate(table.items()):
        for c, column in enumerate(columns):
            x = r + (c - (len(columns) - 1) / 2) * width
            if column in cells:
                label = column.split(", ")[-1]
                draw_bar(ax, x, width, cells[column], (c, len(columns)), label)
            if f"{column}, untrained" in cells:
                draw_level(ax, x, width, cells[f"{column}, untrained"])
            if column in experiment["paper"].get(row, {}):
                ax.plot(x, experiment["paper"][row][column], "D", color="0.85", mec="0.4", ms=7,
                        label="paper")
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
    if len(handles) > 1:
        ax.legend(handles.values(), handles, loc="upper center", ncol=min(5, len(handles)), fontsize=9,
                  columnspacing=1)


def draw(experiment, table):
    """The picture: the panels, two side by side."""
    panels = panels_of(experiment)
    across = min(2, len(panels))
    down = math.ceil(len(panels) / 2)
    width = max(6, across * (1.4 + 1.4 * len(table)))
    fig = Figure(figsize=(width, 4.5 * down), layout="tight")
    axes = fig.subplots(down, across, squeeze=False)
    for ax, (title, panel) in zip(axes.flat, panels.items()):
        draw_panel(ax, experiment, table, *panel)
        ax.set_title(title)
    for ax in list(axes.flat)[len(panels):]:
        ax.axis("off")
    legend = "bars: mean over the seeds, whiskers: one standard deviation, dots: the seeds"
    if experiment["paper"]:
        legend += "; grey diamonds: the paper's, other data, other size"
    lines = [textwrap.fill(line, int(12 * width)) for line in (experiment["title"], legend)]
    fig.suptitle("\n".join(lines), fontsize=10)
    return fig
