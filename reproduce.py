"""A claim as one command: train the rows of an experiment over several seeds, write its table and picture.

    python reproduce.py ajepa-masking                   # A-JEPA's table of maskings on the toy data
    python reproduce.py ajepa-masking --dry-run         # what is finished, what is left, about how long
    python reproduce.py ajepa-masking --seeds 0 1 2 3 4 # more seeds: only those that are missing are run
    python reproduce.py ajepa-ratio --data audioset --data-dir audioset/ --probe-data audioset-20k \\
        --launch "torchrun --nproc_per_node=8"          # the paper's recipe, each run on eight GPUs
    python reproduce.py avjepa-components --data vggsound --data-dir vggsound/ --jobs 8     # a run on each
    python reproduce.py avjepa-components --data vggsound --data-dir vggsound/ --row no-local --seeds 0
    python reproduce.py mjepa-frozen --recipe paper --ckpt runs/mjepa-audioset-seed0 --places esc50=ESC-50/

The experiments stand in experiments.py. A row is a command line of our own scripts. Each run is a process of
its own with a folder of its own: what is finished is skipped, a run that was stopped goes on from its
checkpoint, and one that failed is named while the others go on. Flags that this script does not know are
handed to each run (--steps 100 --batch-size 16); what a row says itself stays.
"""
import signal

# Ctrl-C while the rest is imported ends the command at once, without a traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import argparse
import contextlib
import fcntl
import importlib
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import common
import data
import tables
from common import UserError, check_range, main_guard
from experiments import EXPERIMENTS
from run import COLUMNS, Help, choose_device, code_version

TRAIN = "train"                                         # of a run's steps the one that comes first
PLACE = r"\{([\w-]+)\}"                                 # in a line of an experiment
MACHINE = ("--workers", "--device")                     # flags that no number depends on
MULTIPLE = r"--steps (\d+)x"                            # in a row's line
TOY_REPORT = r"chance/|.*/few/|run/minutes of evaluation"       # paths that the end of a toy run alone fills
BASELINES = {"trained": "", "untrained": " --baseline untrained", "raw input": " --baseline raw"}


# ----------------------------------------------------------------------------------------------------------
# What is to be run, and what is finished
# ----------------------------------------------------------------------------------------------------------

def choose(args):
    """The experiment as the recipe has it, with all that an entry may leave out."""
    entry = EXPERIMENTS[args.experiment]
    toy = entry.get("toy", {}) if args.recipe == "toy" else {}
    rest = dict(flags="", after={}, only={}, formats={}, paper={}, source="", against={}, turned=False,
                curves={})
    experiment = {**rest, **entry, **toy}
    if not data.find_set(args.data).make:
        columns = experiment["columns"].items()
        experiment["columns"] = {name: path for name, path in columns if not re.match(TOY_REPORT, path)}
    return experiment


def trains(line):
    return not line.startswith("probe.py")


def follow(experiment, row, made):
    """{step: its name} of the steps behind the training of a row. made: a set of our own, whose runs end with
    a small table; on others probes and searches find what the columns want of it."""
    line = experiment["rows"][row]
    steps = {}
    for name, after in experiment["after"].items():
        steps.update({step if trains(line) else f"{line} {step}": name for step in after})
    for path in experiment["columns"].values() if trains(line) and not made else ():
        name, *keys = path.split("/")
        # AV-JEPA's protocol trains both heads side by side
        beside = f"probe.py --probe attentive --modality {keys[-1]}" in experiment["after"].get(name, ())
        if name in BASELINES and len(keys) == 1 and not beside:
            steps[f"probe.py --modality {keys[0]}{BASELINES[name]}"] = name
        elif name in ("trained", "untrained") and "->" in path:
            steps["retrieval.py" + " --untrained" * (name == "untrained")] = name
    if row in experiment["only"]:
        others = {"audio", "video", "av", "retrieval.py"} - {experiment["only"][row]}
        steps = {step: name for step, name in steps.items() if others.isdisjoint(step.split())}
    return steps


def multiply(line, said, recipe):
    """A row's line with `--steps 3x` as a number: of the steps that its other flags or the recipe say."""
    times = re.search(MULTIPLE, line)
    if not times:
        return line
    given = [value for flag, value in zip(said, said[1:]) if flag == "--steps"]
    script = importlib.import_module(line.split(".py")[0])
    steps = given[-1] if given else str(script.RECIPE["steps"][COLUMNS.index(recipe)])
    if "--epochs" in said or not steps.isdecimal():
        raise UserError("a row has a multiple of the others' steps; give their number, such as --steps 1000")
    return line.replace(times[0], f"--steps {int(times[1]) * int(steps)}")


def plan(experiment, args, extra):
    """The runs: a list of dict(row, seed, folder, command, and below), seed by seed, so that whoever stops
    early has a whole table of fewer seeds. extra: flags for the training alone. steps: {step: its words} of
    those behind the training, names: {step: its name}, lacks: what --places does not give them; ckpt: what
    takes the training's place; made: of follow; times: the others' steps that it trains; measured: whether a
    column wants its measures."""
    made = bool(data.find_set(args.data).make)
    where = ["--data-dir", str(Path(args.data_dir).resolve())] if args.data_dir else []
    source = ["--data", args.data, *where]
    given = []
    for flag, value in zip(MACHINE, (args.workers, args.device)):
        given += [flag, str(value)] if value is not None else []
    flags = experiment["flags"]
    if "--epochs" in extra:                             # the scripts take the steps of the two
        flags = re.sub(r"--steps \d+", "", flags)
    said = [*shlex.split(flags), *source, *given, *args.given_recipe, *extra]
    measured = any(path.startswith("run/") for path in experiment["columns"].values())
    runs = []
    for seed in args.seeds:
        for row, line in experiment["rows"].items():
            folder = Path(args.out) / f"{tables.slug(row)}-seed{seed}"
            script, *flags = shlex.split(multiply(line, said, args.recipe))
            command = [script, *said, *flags] if trains(line) else [args.ckpt, *source]
            command += ["--seed", str(seed), "--out", str(folder)]
            times = re.search(MULTIPLE, line)
            run = dict(row=row, seed=seed, folder=folder, command=command, ckpt=args.ckpt, steps={},
                       lacks=set(), names=follow(experiment, row, made), made=made, measured=measured,
                       times=int(times[1]) if times else 1)
            places = {**args.places, "run": str(folder)}
            for step in run["names"]:
                lacks = set(re.findall(PLACE, step)) - places.keys()
                run["lacks"] |= lacks
                if not lacks:
                    words = [word.format_map(places) for word in shlex.split(step)]
                    words += given if "--data" in words else ["--data", args.probe_data, *where, *given]
                    words += [] if "--ckpt" in words else ["--ckpt", str(folder)]
                    if run["ckpt"]:                     # else the seed is that of the training
                        words += ["--seeds", str(seed)]
                    run["steps"][step] = words
            runs.append(run)
    return runs


def begun(run):
    """(command, versions of the code) by which a run was begun, empty where it was not or command.json is
    broken, and the steps that it ended with, None before."""
    content = tables.read(run["folder"] / "command.json") or {}
    return tables.texts(content.get("command")), tables.texts(content.get("versions")), content.get("steps")


def essence(words, folder, ckpt=None):
    """What is computed, {flag: its values}: not the flags of the machine; paths in the run's folder below a
    name, for it may move; of the checkpoint `ckpt` its size and time, by which another one is told."""
    values = []                                         # of the script, before the first flag
    flags = {"script": values}
    for word in words:
        if word.startswith("--"):
            values = flags[word] = []                   # given twice, the last counts
            continue
        path = Path(word)
        if path.is_relative_to(folder):
            word = str("{run}" / path.relative_to(folder))
        values.append(word)
    if ckpt:
        about = os.stat(ckpt)
        flags["--ckpt"].append(f"{about.st_size} bytes of {about.st_mtime_ns}")
    return {flag: values for flag, values in flags.items() if flag not in MACHINE}


def finished(run):
    """{path: number} of what a run and the steps behind it have found, or None if its training is not
    finished. Raises UserError if the folder holds a run of another command."""
    command, _, steps = begun(run)
    folder = run["folder"]
    results = tables.read(folder / "results.json")
    latest = folder / "latest.pt"
    done, total = tables.progress(latest)
    trained = results if run["made"] else done == total
    # but for --out: it may move
    same = essence(command[:-2], folder) == essence(run["command"][:-2], folder)
    if not same and (trained or os.path.lexists(latest)):
        raise UserError(f"{folder} holds a run of another command, see its command.json; give another --out")
    if None not in (steps, total) and steps != total:
        raise UserError(f"{folder}: its run has been made one of {total} steps since; give another --out")
    if not run["ckpt"] and not (same and trained):
        return None
    rows = probed(run)
    numbers = tables.numbers(results or {}, rows, run["names"])
    if run["measured"]:
        numbers.update(tables.measures(folder, results or {}, rows, len(run["steps"])))
    return numbers


def probed(run):
    """The rows that a run's steps have written by the words that they have now, and on the checkpoint as it
    is now: {step: rows}."""
    kept = tables.read(run["folder"] / "steps.json") or {}
    found = {}
    for step, words in run["steps"].items():
        rows = kept.get(step)
        if tables.are_rows(rows) and rows[0].get("words") == essence(words, run["folder"], run["ckpt"]):
            found[step] = rows
    return found


def missing(run):
    """The steps that a run still needs, in their order."""
    if finished(run) is None:
        return [TRAIN, *run["steps"]]
    rows = probed(run)
    return [step for step in run["steps"] if step not in rows]


# ----------------------------------------------------------------------------------------------------------
# How long it takes
# ----------------------------------------------------------------------------------------------------------

def estimate(runs, left, jobs):
    """How long the steps left [(run, steps)] take, in words: by what the same have taken in the row, else in
    others."""
    took = {}
    done = {}
    for run in runs:
        times = {step: tables.seconds_of(rows) for step, rows in probed(run).items()}
        seconds, done[run["folder"]] = tables.training_time(run["folder"])
        if seconds:
            times[TRAIN] = seconds / run["times"]
        for step, seconds in times.items():
            took.setdefault(step, []).append(seconds)
            took.setdefault((run["row"], step), []).append(seconds)
    total = 0.0
    unknown = 0
    for run, steps in left:
        for step in steps:
            times = took.get((run["row"], step)) or took.get(step)
            share = run["times"] * (1 - done[run["folder"]]) if step == TRAIN else 1
            total += statistics.mean(times) * share if times else 0
            unknown += not times
    if unknown and not total:
        return "how long it takes is not known: none of it has been run yet"
    beside = f" and {unknown} steps of which none has been run" if unknown else ""
    return f"about {total / 60 / min(jobs, len(left)):.0f} min{beside}, by the runs that there are"


# ----------------------------------------------------------------------------------------------------------
# Run it
# ----------------------------------------------------------------------------------------------------------

def words_of(run, step):
    """The words of a step, of which one is all checkpoints that a run has kept."""
    words = []
    for word in run["command"] if step == TRAIN else run["steps"][step]:
        kept = sorted(map(str, run["folder"].glob(tables.KEPT))) if Path(word).name == tables.KEPT else []
        words += kept or [word]                         # of none the script says so
    return words


def launch(run, step, words, device):
    """Start a step of a run; its output goes into the run's folder. words: what runs a script."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device} if device else None
    script, *flags = words_of(run, step)
    command = [*words, str(Path(__file__).parent / script), *flags]
    with open(run["folder"] / "output.txt", "ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def lock_job(folder):
    """The file whose lock keeps other reproduce.py out of a run's folder, while it is open in this process.
    UserError where one is at work there."""
    file = open(folder / ".job", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another reproduce.py is at work there") from None
    except OSError:                                     # a file system without locks
        pass
    return file


def begin(run):
    """Note the command of a run in its folder; one on --ckpt has a link to it."""
    latest = run["folder"] / "latest.pt"
    _, versions, _ = begun(run) if latest.is_file() else ([], [], None) # of the code, of all that trained it
    versions = list(dict.fromkeys([*versions, code_version()]))
    tables.write(run["folder"] / "command.json", {"command": run["command"], "versions": versions})
    if run["ckpt"]:
        latest.unlink(missing_ok=True)
        latest.symlink_to(run["ckpt"])
    elif not latest.is_file():
        (run["folder"] / "steps.json").unlink(missing_ok=True)          # of a training before


class Job:
    """What is left of a run, on a device: one step after the other."""
    def __init__(self, run, device):
        self.run = run
        self.steps = missing(run)                       # now: another process may have been at it
        self.device = device                            # of CUDA_VISIBLE_DEVICES, None: as it is
        self.process = None
        self.failed = False

    def start(self, experiment, words):
        """The next step, if there is one and no other process is at work on the run. words: what runs a
        training, which may be several processes."""
        self.process = None
        if not self.steps:
            return
        self.run["folder"].mkdir(parents=True, exist_ok=True)
        self.step = self.steps.pop(0)
        try:
            self.locked = lock_job(self.run["folder"])
        except UserError as e:
            print(f"{name_of(self.run, self.step)}: {e}", flush=True)
            self.failed = True
            return
        self.began = time.time()
        self.before = tables.tabulate(experiment, found([self.run])).get(self.run["row"], {})
        if self.step == TRAIN or self.run["ckpt"]:
            begin(self.run)
        searches = self.step.startswith("retrieval.py")
        self.file = self.run["folder"] / ("retrieval.jsonl" if searches else "probe.jsonl")
        self.size = self.file.stat().st_size if self.file.is_file() else 0
        words = words if is_training(self.step) else [sys.executable]
        self.process = launch(self.run, self.step, words, self.device)

    def end(self, experiment, rest):
        """Keep the rows that the step wrote, and say how it ended, with the rest that there is to do. Nothing
        follows a training that failed."""
        code = self.process.poll()
        folder = self.run["folder"]
        if self.step == TRAIN and not code:
            file = folder / "command.json"
            _, steps = tables.progress(folder / "latest.pt")
            tables.write(file, {**(tables.read(file) or {}), "steps": steps})
        elif not code:
            words = self.run["steps"][self.step]
            found = {"words": essence(words, folder, self.run["ckpt"])}
            rows = [{**row, **found} for row in tables.new_rows(self.file, self.size, words)]
            file = folder / "steps.json"
            tables.write(file, {**(tables.read(file) or {}), self.step: rows})
        self.locked.close()
        name = name_of(self.run, self.step)
        if not code and self.step not in missing(self.run):
            took = f"{time.time() - self.began:.0f} s"
            print(f"{name}: {new_values(experiment, self)} ({took}; {rest})", flush=True)
            return
        self.failed = True
        if self.step == TRAIN:
            self.steps = []
        trouble = f"failed (exit code {code})" if code else "was stopped before its end"
        print(f"{name} {trouble}: see {self.run['folder']}/output.txt", flush=True)


def is_training(step):
    """Whether it takes several processes."""
    return step == TRAIN or "finetune" in step


def name_of(run, step):
    """What the screen calls a step of a run."""
    name = f"{run['row']}, seed {run['seed']}"
    return name if step == TRAIN else f"{name}, {run['names'][step]}: {step}"


def show_left(run, steps, words):
    """Name what is left of a run. words: what starts a training."""
    if steps[0] == TRAIN:                               # the steps behind it would be many
        then = f", then {len(steps) - 1} steps on it" if len(steps) > 1 else ""
        print(f"  left: {name_of(run, TRAIN)}: {words} {shlex.join(run['command'])}{then}", flush=True)
        return
    for step in steps:
        start = words if is_training(step) else "python"
        print(f"  left: {name_of(run, step)}: {start} {shlex.join(words_of(run, step))}", flush=True)


def new_values(experiment, job):
    """The values, for the screen, that a run has and had not before a step; of those that the picture shows,
    if there are any."""
    cells = tables.tabulate(experiment, found([job.run])).get(job.run["row"], {})
    shown = sum((columns for _, columns, _ in tables.panels_of(experiment).values()), [])
    new = [column for column in cells if column not in job.before]
    new = [column for column in new if column in shown] or new
    new = [f"{column} {tables.number(experiment, column, cells[column]['mean'])}" for column in new]
    return ", ".join(new) or "done"


def share_devices(jobs):
    """What CUDA_VISIBLE_DEVICES is to be for each of several jobs, round and round; None: as it is."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    names = names.split(",") if jobs > 1 and names else [None]
    return [names[job % len(names)] for job in range(jobs)]


def run_all(experiment, left, args):
    """Run what is left [(run, steps)], --jobs runs at a time, and say how each step ends. Returns the runs
    that did not finish."""
    waiting = [*left]
    words = shlex.split(args.launch or "") or [sys.executable]
    free = share_devices(args.jobs)
    active = []
    failed = []
    try:
        while waiting or active:
            while waiting and free:
                run, _ = waiting.pop(0)
                try:
                    active.append(Job(run, free[0]))
                    free.pop(0)
                except UserError as e:                  # another process has begun something else there
                    print(e, flush=True)
                    failed.append(run)
            for job in [job for job in active if not job.process or job.process.poll() is not None]:
                if job.process:
                    todo = sum(len(steps) for _, steps in waiting)
                    todo += sum(len(other.steps) + (other is not job) for other in active)
                    job.end(experiment, f"{todo} steps left")
                job.start(experiment, words)
                if not job.process:
                    active.remove(job)
                    free.append(job.device)
                    failed += [job.run] if job.failed else []
            time.sleep(0.02)
    except BaseException:                               # Ctrl-C reached them as well: they save, then end
        processes = [job.process for job in active if job.process]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
        raise
    return failed


def found(runs):
    """[(row, seed, {path: number})] of the runs that have finished."""
    each = []
    for run in runs:
        with contextlib.suppress(UserError):            # of another command by now
            each.append((run["row"], run["seed"], finished(run)))
    return [(row, seed, numbers) for row, seed, numbers in each if numbers is not None]


def write_table(experiment, runs, flags, out):
    """Write the table of what is finished, its picture and its curves, and show it."""
    versions = set()
    folders = {}
    lacking = {}
    for run in runs:
        if finished(run) is not None:
            versions.update(begun(run)[1])
        if missing(run):
            lacking.setdefault(run["row"], []).append(str(run["seed"]))
        else:
            folders.setdefault(run["row"], []).append(run["folder"])
    there = [run["row"] for run in runs]
    lacking.update({row: ["all"] for row in experiment["rows"] if row not in there})
    flags = [*shlex.split(experiment["flags"]), *flags]
    about = {"commands": experiment["rows"], "flags": flags, "versions": sorted(versions)}
    tables.save(experiment, found(runs), folders, lacking, about, out)
    if len(versions) > 1:
        print(f"the runs are of different versions of the code: {', '.join(sorted(versions))}")


# ----------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    """(args, flags that are not ours, for each run). args.recipe is the one that the runs have."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=Help, allow_abbrev=False)
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    add = parser.add_argument_group("data").add_argument
    add("--data", default="toy", help="of each run and the steps behind it")
    add("--data-dir", help="of each run and the steps behind it: folder with the clips (default: theirs)")
    add("--probe-data", help="set that the steps behind a training read, such as audioset-20k, in the same "
        "folder (default: --data)")
    add("--places", nargs="+", metavar="NAME=PATH", help="folders of further sets, or a list of "
        "ids, that steps behind the runs read; steps that lack theirs are left out (default: none)")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each row for each")
    add("--row", action="append", metavar="ROW",
        help="run this row alone, by its name or its folder's; may be given several times (default: all)")
    add("--out", help="folder of its runs, table and picture (default: runs/EXPERIMENT, on other data than "
        "the toy runs/EXPERIMENT-DATA)")
    add("--ckpt", help="checkpoint for rows that train nothing (default: none)")
    add("--recipe", choices=COLUMNS, help="of each run (default: toy for the toy sets, else paper)")
    add("--dry-run", action="store_true", help="show what is finished and what is left, and run nothing")
    add = parser.add_argument_group("machine").add_argument
    add("--launch", help='what starts a training or fine-tuning, such as "torchrun --nproc_per_node=8" '
        "(default: this Python)")
    add("--jobs", type=int, default=1, help="runs at the same time; of several GPUs each has one")
    add("--device", help="of each run and the steps behind it: auto, cpu, mps or cuda (default: theirs)")
    add("--workers", type=int,
        help="of each run and the steps behind it: processes that decode (default: theirs)")
    args, unknown = parser.parse_known_args(argv)
    extra = []
    for word in unknown:
        flag = word.split("=")[0]
        if flag in ("--fresh", "--resume", "--seed"):
            raise UserError(f"{word}: an experiment decides that itself; leave it out")
        extra += word.split("=", 1) if word.startswith("--") else [word]
    for seed in args.seeds:
        check_range("--seeds", seed, 0, 2 ** 31)
        if args.seeds.count(seed) > 1:
            raise UserError(f"--seeds: {seed} is given twice, which is one run; give each seed once")
    check_range("--workers", args.workers or 0, 0, 1024)
    check_range("--jobs", args.jobs, 1, 1024)
    if args.device is not None:
        choose_device(args.device)
    args.probe_data = args.probe_data or args.data
    data.find_set(args.probe_data)
    usual = "toy" if data.find_set(args.data).make else "paper"
    args.recipe = args.recipe or usual
    args.given_recipe = [] if args.recipe == usual else ["--recipe", args.recipe]
    args.out = args.out or f"runs/{args.experiment}" + (f"-{args.data}" if args.data != "toy" else "")
    check_fit(args, choose(args), extra)
    return args, extra


def check_fit(args, experiment, extra):
    """UserError where flags do not fit each other or the experiment; makes --row names of rows, --places a
    dict and --ckpt the file itself. extra: flags for each run."""
    try:
        words = shlex.split(args.launch or "")
    except ValueError as e:
        raise UserError(f"--launch {args.launch}: is no command line ({e})") from None
    sets = (args.data, args.probe_data)
    if words and args.jobs > 1:
        raise UserError("--jobs: with --launch a run has all devices; leave one of them out")
    if words and not args.dry_run and not shutil.which(words[0]):
        raise UserError(f"--launch: there is no command {words[0]} here")
    if args.probe_data != args.data and (args.ckpt or any(data.find_set(name).make for name in sets)):
        raise UserError(f"--probe-data {args.probe_data}: has no effect on rows that name their set, and on "
                        "clips that we make a run is evaluated itself; leave it out")
    rows = {tables.slug(row): row for row in experiment["rows"]}
    for row in args.row or ():
        if tables.slug(row) not in rows:
            raise UserError(f"--row {row}: {args.experiment} has no such row, but {', '.join(rows)}")
    args.row = [rows[tables.slug(row)] for row in args.row] if args.row else list(experiment["rows"])
    if args.ckpt is None and not all(map(trains, experiment["rows"].values())):
        raise UserError(f"{args.experiment} trains nothing; give --ckpt, the checkpoint that it probes")
    if args.ckpt is not None and any(map(trains, experiment["rows"].values())):
        raise UserError(f"--ckpt has no effect on {args.experiment}, whose rows are trained; leave it out")
    if args.ckpt is not None:
        if not common.checkpoint_file(args.ckpt).is_file():
            raise UserError(f"--ckpt {args.ckpt}: there is no such checkpoint")
        if extra:
            raise UserError(f"{extra[0]}: no effect on {args.experiment}, which trains nothing; leave it out")
        args.ckpt = str(common.checkpoint_file(args.ckpt).resolve())
    own = re.findall(r"--\S+", re.sub(MULTIPLE, "", " ".join(experiment["rows"].values())))
    for word in extra:
        if word in own:
            raise UserError(f"{word}: rows of {args.experiment} set it themselves; leave it out")
    lines = " ".join([*experiment["rows"].values(), *sum(experiment["after"].values(), [])])
    if words and args.ckpt and "finetune" not in lines:
        raise UserError(f"--launch: no effect on {args.experiment}, which trains nothing; leave it out")
    known = set(re.findall(PLACE, lines)) - {"run"}
    places = {}
    for word in args.places or ():
        name, _, path = word.partition("=")
        if name not in known or not path:
            raise UserError(f"--places {word}: not NAME=PATH; names of {args.experiment}: "
                            f"{', '.join(sorted(known)) or 'none'}")
        if not os.path.exists(path):
            raise UserError(f"--places {word}: {path} is not there; give its path, or leave it out")
        places[name] = str(Path(path).resolve())
    args.places = places


def check_out(out):
    """UserError where there is no folder `out` and none can be made."""
    for place in (out, *out.absolute().parents):
        try:
            if place.is_dir():
                return
            if os.path.lexists(place):
                raise UserError(f"--out {out}: cannot be made ({place} is no folder); give another --out")
        except OSError as e:
            raise UserError(f"--out {out}: cannot be made ({e.strerror}); give another --out") from None


def check_commands(runs):
    """End as the scripts do, before the first is started, where one of them does not take its flags."""
    for run in runs:
        script, *words = run["command"]
        if not run["ckpt"]:
            importlib.import_module(script.removesuffix(".py")).get_args(words)


def main(argv=None):
    args, extra = get_args(argv)
    experiment = choose(args)
    sets = " and ".join(dict.fromkeys((args.data, args.probe_data)))
    experiment["title"] += "" if args.ckpt else f" ({sets})"
    curves = experiment["curves"].items()
    experiment["curves"] = {title: below.format(data=args.probe_data) for title, below in curves}
    out = Path(args.out)
    check_out(out)
    runs = plan(experiment, args, extra)
    for row, names in {run["row"]: run["lacks"] for run in runs if run["lacks"]}.items():
        print(f"left out of {row}: what needs {', '.join(sorted(names))}; give --places NAME=PATH of it")
    runs = [run for run in runs if run["steps"] or not run["ckpt"]]
    asked = [run for run in runs if run["row"] in args.row]
    if not asked:
        raise UserError(f"--places: of {args.experiment} nothing can be run without them; give them as above")
    check_commands(asked)
    all_left = [(run, missing(run)) for run in runs]    # of those not asked as well: they are in the table
    left = [(run, steps) for run, steps in all_left if run["row"] in args.row and steps]
    print(f"{args.experiment}: {len(asked) - len(left)} of {len(asked)} runs finished", flush=True)
    for run, steps in left:
        show_left(run, steps, args.launch or "python")
    if left:
        print(f"  {estimate(runs, left, args.jobs)}", flush=True)
    if args.dry_run:
        return
    try:
        failed = run_all(experiment, left, args)
        if not found(runs):
            raise UserError(f"no run of {args.experiment} has finished; the reason stands in "
                            f"{out}/*/output.txt")
        write_table(experiment, runs, extra, out)
    except OSError as e:                                # a disk that is full or read-only
        raise UserError(f"{e.filename or out}: cannot be written ({e.strerror or e}); the same command goes "
                        "on from what is there") from None
    if failed:
        raise UserError(f"{len(failed)} of {len(asked)} runs did not finish, their rows lack them; the same "
                        "command tries them again")


if __name__ == "__main__":
    main_guard(main)
