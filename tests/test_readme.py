"""Every command of the four pages runs, at tiny size: parsed from them, with flags that shrink it."""
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from conftest import FORK, ROOT, command, write, write_world
from slow import quicken_table

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md", "DATA.md", "FORMULAS.md")}
README = PAGES["README.md"]
METHODS = ("ajepa.py", "mjepa.py", "avjepa_lejepa.py", "avjepa_ncsu.py")
TRAIN = "--steps 2 --batch-size 4 --recipe toy --size nano --workers 0 --log-every 1"
SHRINK = {
    **dict.fromkeys(METHODS, TRAIN),
    "data.py": "--workers 1",
    "bench.py": "--recipe toy --size nano --batch-size 2",
    "probe.py": "--workers 0",
    "pixels.py": "--workers 0 --epochs 1 --batch-size 8",
    "retrieval.py": "--views 1 --workers 0",
    "visualize.py": "--out seen",
    "reproduce.py": "--dry-run"}


def commands(text):
    """The python and torchrun command lines of a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.split(" #")[0].split("&&")[-1].strip() for line in lines]
    lines = [line.removeprefix(".venv/bin/") for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun) ", line)]


ALL = list(dict.fromkeys(itertools.chain.from_iterable(map(commands, PAGES.values()))))
COMMANDS = [line for line in ALL if "pytest" not in line and "figures/" not in line]


# ----------------------------------------------------------------------------------------------------------
# What the commands name
# ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(toy, plain_layout, tmp_path_factory):
    """A folder with what the commands name: the toy's cache, clips/, dog.wav and a small copy of each set."""
    place = tmp_path_factory.mktemp("pages")
    (place / "cache").mkdir()
    shutil.copytree(toy, place / data.TOY_WORLD.folder())
    write_world(data.STILL_WORLD, place / data.STILL_WORLD.folder())
    clips = sorted((toy / "train").glob("*.mp4"))[:8]
    for number, name in enumerate(("dogs", "bells")):
        (place / "clips" / name).mkdir(parents=True)
        for i, clip in enumerate(clips):
            shutil.copy(clip, place / "clips" / name / f"{number}{i}.mp4")
    shutil.copy(clips[0], place / "dog.wav")            # any file that FFmpeg reads
    write_youtube(place, clips)
    write_something(place / "ssv2", clips)
    write_esc50(place / "ESC-50")
    write_speech(place / "speech_commands")
    write_fsd50k(place / "FSD50K")
    return place


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_youtube(place, clips):
    """audioset/, vggsound/ and k400/: the same eight clips under ids."""
    ids = [f"{i:011d}" for i in range(8)]
    for folder, name in (("audioset", "{}_000030"), ("vggsound", "{}_000030"), ("k400", "{}_000030_000040")):
        (place / folder).mkdir()
        for clip_id, clip in zip(ids, clips):
            shutil.copy(clip, place / folder / f"{name.format(clip_id)}.mp4")
    rows = [f'{clip_id}, 30.000, 40.000, "/m/{k % 2}"' for k, clip_id in enumerate(ids)]
    for part in ("balanced_train", "unbalanced_train", "eval"):
        text(place / "audioset" / f"{part}_segments.csv", "# a", "# b", "# c", *rows)
    classes = ('0,/m/0,"Dog, bark"', "1,/m/1,Bell")
    text(place / "audioset" / "class_labels_indices.csv", "index,mid,display_name", *classes)
    rows = []
    for split in ("train", "test"):
        for k, clip_id in enumerate(ids):
            label = ("bell", '"dog, barking"')[k % 2]
            rows.append(f"{clip_id},30,{label},{split}")
    text(place / "vggsound" / "vggsound.csv", *rows)
    for part in ("train", "val"):
        rows = [f"{('archery', 'baking')[k % 2]},{clip_id},30,40,{part}" for k, clip_id in enumerate(ids)]
        text(place / "k400" / f"{part}.csv", "label,youtube_id,time_start,time_end,split", *rows)


def write_something(folder, clips):
    """Something-Something v2."""
    templates = ("Holding [something]", "Pushing [something] left")
    folder.mkdir()
    rows = []
    for k, clip in enumerate(clips):
        shutil.copy(clip, folder / f"{k}.webm")
        rows.append({"id": str(k), "template": templates[k % 2]})
    for part in ("train", "validation"):
        text(folder / f"something-something-v2-{part}.json", json.dumps(rows))
    labels = {"Holding something": "0", "Pushing something left": "1"}
    text(folder / "something-something-v2-labels.json", json.dumps(labels))


def noise(path, seed):
    """A second of noise as a wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(16000)
    write(path, wave=wave, audio="pcm_s16le")


def write_esc50(folder):
    rows = []
    for fold in range(1, 6):
        for i in range(4):
            name = f"{fold}-{i}-A-{i % 2}.wav"
            noise(folder / "audio" / name, 10 * fold + i)
            rows.append(f"{name},{fold},{i % 2},{('dog', 'rain')[i % 2]},False,1,A")
    text(folder / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take", *rows)


def write_speech(folder):
    """Speech Commands."""
    stems = [f"{('no', 'yes')[i % 2]}/{i:08x}_nohash_0.wav" for i in range(16)]
    for i, stem in enumerate(stems):
        noise(folder / stem, i)
    text(folder / "validation_list.txt", *stems[:4])
    text(folder / "testing_list.txt", *stems[4:8])


def write_fsd50k(folder):
    truth = folder / "FSD50K.ground_truth"
    text(truth / "vocabulary.csv", "0,Bark,/m/0", "1,Rain,/m/1")
    for part in ("dev", "eval"):
        rows = []
        for i in range(8):
            noise(folder / f"FSD50K.{part}_audio" / f"{i}.wav", i)
            split = f",{('train', 'val')[i // 6]}" if part == "dev" else ""
            rows.append(f'{i},"{("Bark", "Bark,Rain")[i % 2]}","/m/0"{split}')
        text(truth / f"{part}.csv", "fname,labels,mids" + (",split" if part == "dev" else ""), *rows)


# ----------------------------------------------------------------------------------------------------------
# The commands
# ----------------------------------------------------------------------------------------------------------

def run(words, cwd, ranks=1):
    """A command line in processes of its own: (exit code, what it printed)."""
    done = command(words, cwd, ranks=ranks)
    return done.returncode, done.stdout + done.stderr


TUNE = "--steps 2 --batch-size 4 --lr 1e-3 --views 1"


def tune(place, run_folder, tuned):
    """A fine-tuning of a run, on the set that its folder's name says."""
    name = tuned.split("-")[0]
    train(place, run_folder)
    flags = f"--ckpt {run_folder} --data {name} --data-dir {name}/ --probe finetune --workers 0 {TUNE}"
    code, shown = run([sys.executable, str(ROOT / "probe.py"), *flags.split()], place)
    assert code == 0, shown[-2000:]


def train(place, folder):
    """A run of the method that the folder's name begins with, or a fine-tuning of one, if there is none."""
    if (place / folder / "latest.pt").exists():
        return
    run_folder, found, tuned = folder.partition("/finetune-")
    if found:
        tune(place, run_folder, tuned)
        return
    script = next(s for s in METHODS if Path(folder).name.startswith(s.removesuffix(".py")))
    flags = f"--data folder --data-dir clips --out {folder} {TRAIN}".split()
    code, shown = run([sys.executable, str(ROOT / script), *flags], place)
    assert code == 0, shown[-2000:]


PREPARED = {
    "small/": "--data folder --data-dir clips/ --side 64",
    "shards/": "--data vggsound --data-dir vggsound/ --shards 2"}


def prepare(place, folder):
    """A folder that `data.py --prepare` writes, if there is none yet."""
    if not (place / folder).exists():
        flags = [*PREPARED[folder].split(), "--prepare", folder, "--workers", "1"]
        code, shown = run([sys.executable, str(ROOT / "data.py"), *flags], place)
        assert code == 0, shown[-2000:]


def shrink(words, script):
    """The same command, small."""
    small = [*words, *SHRINK[script].split()]
    if "--shards" in small:
        small[small.index("--shards") + 1] = "2"
    if script == "bench.py":
        small += ["--clips", "2"] if words[0] == "data" else ["--count", "1"]
    if "--accumulate" in small:
        small[small.index("--accumulate") + 1] = "2"
    if script in METHODS and "--out" not in words:
        small.append("--fresh")
    if script == "probe.py" and ("attentive" in words or "finetune" in words):          # else a regression
        small += ["--steps", "2", "--batch-size", "4", "--lr", "1e-3"]
    if script == "probe.py" and "--query" not in words:
        small += ["--views", "1"]
    return small


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_pages_runs(place, line, monkeypatch):
    quicken_table(monkeypatch)                          # where the command is forked
    words = shlex.split(line)
    torchrun = words[0] == "torchrun"
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[at]
    for folder in re.findall(r"--(?:ckpt|init) (\S+)", line):
        train(place, folder)
    for folder in re.findall(r"--data-dir (\S+)", line):
        if folder in PREPARED:
            prepare(place, folder)
    if "curves" in words:
        for folder in re.findall(r"runs/\S+", line):
            train(place, folder)
    launch = [sys.executable]
    ranks = 1
    if torchrun and FORK and line != next(c for c in COMMANDS if c.startswith("torchrun")):
        ranks = 2
    elif torchrun:                                      # one of them as it is
        port = 20000 + os.getpid() % 20000
        flags = " ".join(words[1:at]).replace("=8", "=2").replace("nnodes=4", "nnodes=1")
        launch += ["-m", "torch.distributed.run", *flags.replace("HOST:29500", f"localhost:{port}").split()]
    small = shrink(words[at + 1:], script)
    code, shown = run([*launch, str(ROOT / script), *small], place, ranks)
    assert code == 0, shown[-2000:]
    assert "Traceback" not in shown
    if script in METHODS:
        assert f"{2 if torchrun else 1} x cpu" in shown


# ----------------------------------------------------------------------------------------------------------
# What the pages say
# ----------------------------------------------------------------------------------------------------------

def test_the_readme_has_a_command_for_each_thing_that_a_newcomer_wants():
    lines = commands(README)
    for start in ("python data.py", "python bench.py", "python probe.py", "python pixels.py",
                  "python retrieval.py", "python visualize.py attention", "python visualize.py pca",
                  "python visualize.py map", "python visualize.py curves",
                  "python reproduce.py methods", "torchrun --nnodes", "python -m pytest"):
        assert any(line.startswith(start) for line in lines), start
    for script in METHODS:
        assert any(line.startswith(f"python {script}") for line in lines), script
        assert any(line.startswith("torchrun") and script in line for line in lines), script


def test_two_commands_do_all_the_set_up():
    install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
    first, second = (line for line in README.splitlines() if line.startswith(install))
    assert first.removeprefix(install) == ".venv/bin/python avjepa_lejepa.py"
    assert second.removeprefix(install) == ".venv/bin/python -m pytest -q"


def test_the_readme_fits_a_readers_patience():
    assert len(README.split()) <= 1800


def test_as_many_lines_of_two_scripts_differ_as_the_readme_says():
    said = re.findall(r"^diff (\w+\.py) (\w+\.py) +# (\d+)", README, re.M)
    assert said
    for one, other, count in said:
        shown = subprocess.run(["diff", one, other], cwd=ROOT, capture_output=True, text=True).stdout
        differ = [line for line in shown.splitlines() if line[:1] in ("<", ">")]
        assert len(differ) == int(count), (one, other)


def test_the_five_lines_from_a_file_to_its_embedding_run(place, monkeypatch):
    (place / "five.py").write_text(re.search(r"```python\n(.*?)```", README, re.S)[1])
    train(place, "runs/avjepa_lejepa-toy-seed0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, shown = run([sys.executable, "five.py"], place)
    assert code == 0, shown[-2000:]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_that_a_page_names_exists(page):
    for script in re.findall(r"`(\w+(?:/\w+)?\.py)`", PAGES[page]):
        folders = (ROOT, ROOT / "figures", ROOT / "datasets", ROOT / "tests")
        assert any((folder / script).is_file() for folder in folders), script
    for link in re.findall(r"\]\(([^#)]\S*?)\)", PAGES[page]):
        assert "://" in link or (ROOT / link.split("#")[0]).is_file(), link


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_gives_a_script_exists(page):
    for line in commands(PAGES[page]):
        script, _, flags = line.partition(".py ")
        script = f"{script.split()[-1]}.py"
        if script.startswith(("figures", "-")) or not flags:
            continue
        names = [script, "run.py"]
        if script in ("bench.py", "reproduce.py"):      # they take the flags of all methods
            names += METHODS
        source = "".join((ROOT / name).read_text() for name in names)
        flags = re.sub(r'"[^"]*"', "", flags)           # of another command
        for flag in re.findall(r"(?<!\S)(--[a-z-]+)", flags):
            assert f'"{flag}"' in source, (script, flag)
