"""Every command of the README runs, at tiny size: parsed from it, with flags that shrink it added at its end."""
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
import probe
from conftest import FORK, ROOT, command, write

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
LINES = [line.split(" #")[0].split("&&")[-1].strip().removeprefix(".venv/bin/") for line in BLOCKS.splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if re.match(r"(python|torchrun) ", line)))
TRAIN = "--steps 2 --batch-size 4 --recipe toy --size toy --workers 1 --log-every 1"
METHODS = ("ajepa.py", "mjepa.py", "avjepa_lejepa.py", "avjepa_ncsu.py")
SHRINK = {**dict.fromkeys(METHODS, TRAIN), "probe.py": "--workers 1", "retrieval.py": "--views 1 --workers 1", "data.py": "--workers 1",
          "reproduce.py": "--dry-run", "visualize.py": "--out seen"}


@pytest.fixture(scope="module")
def place(toy, tmp_path_factory):
    """A folder with what the README's commands name: the toy's cache, clips/, dog.wav, audioset/, vggsound/, k400/, ssv2/ and the
    sets of sound."""
    place = tmp_path_factory.mktemp("readme")
    (place / "cache").mkdir()
    shutil.copytree(toy, place / data.toy_folder())
    clips = sorted((toy / "train").glob("*.mp4"))[:8]
    for c, name in enumerate(("dogs", "bells")):
        for i in range(8):
            (place / "clips" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(clips[i], place / "clips" / name / f"{c}{i}.mp4")
    shutil.copy(clips[0], place / "dog.wav")                     # any file that FFmpeg reads
    ids = [f"{i:011d}" for i in range(8)]
    for folder in ("audioset", "vggsound"):
        (place / folder / "clips").mkdir(parents=True)
        for i, c in zip(ids, clips):
            shutil.copy(c, place / folder / "clips" / f"{i}_000030.mp4")
    rows = "# a\n# b\n# c\n" + "".join(f'{i}, 30.000, 40.000, "/m/{k % 2}"\n' for k, i in enumerate(ids))
    for part in ("balanced_train", "unbalanced_train", "eval"):
        (place / "audioset" / f"{part}_segments.csv").write_text(rows)
    (place / "audioset" / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/0,"Dog, bark"\n1,/m/1,Bell\n')
    (place / "vggsound" / "vggsound.csv").write_text("".join(f'{i},30,"dog, barking",{s}\n' if k % 2 else f"{i},30,bell,{s}\n"
                                                             for s in ("train", "test") for k, i in enumerate(ids)))
    (place / "k400").mkdir(), (place / "ssv2").mkdir()
    for i, c in zip(ids, clips):
        shutil.copy(c, place / "k400" / f"{i}_000030_000040.mp4"), shutil.copy(c, place / "ssv2" / f"{int(i)}.webm")
    for part in ("train", "val"):
        (place / "k400" / f"{part}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(
            f"{('archery', 'baking cookies')[k % 2]},{i},30,40,{part}\n" for k, i in enumerate(ids)))
    templates = ("Holding [something]", "Pushing [something] left")
    for part in ("train", "validation"):
        (place / "ssv2" / f"something-something-v2-{part}.json").write_text(json.dumps(
            [{"id": str(int(i)), "template": templates[k % 2]} for k, i in enumerate(ids)]))
    (place / "ssv2" / "something-something-v2-labels.json").write_text(json.dumps(
        {template.replace("[", "").replace("]", ""): str(k) for k, template in enumerate(templates)}))
    write_sounds(place)
    return place


def write_sounds(place):
    """ESC-50/, speech_commands/ and FSD50K/ with a few noises each."""
    rng = np.random.default_rng(0)

    def sound(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, wave=0.1 * rng.standard_normal(16000), audio="pcm_s16le")

    rows = [(f"{fold}-{i}-A-{i % 2}.wav", fold, i % 2) for fold in range(1, 6) for i in range(4)]
    for name, _, _ in rows:
        sound(place / "ESC-50" / "audio" / name)
    (place / "ESC-50" / "meta").mkdir()
    (place / "ESC-50" / "meta" / "esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n" + "".join(
        f"{name},{fold},{target},{('dog', 'rain')[target]},False,1,A\n" for name, fold, target in rows))
    for i, word in enumerate(("no", "yes") * 8):
        sound(place / "speech_commands" / word / f"{i:08x}_nohash_0.wav")
    for part, first in (("validation", 0), ("testing", 4)):
        lines = [f"{word}/{i:08x}_nohash_0.wav" for i, word in list(enumerate(("no", "yes") * 8))[first:first + 4]]
        (place / "speech_commands" / f"{part}_list.txt").write_text("\n".join(lines) + "\n")
    truth = place / "FSD50K" / "FSD50K.ground_truth"
    truth.mkdir(parents=True)
    (truth / "vocabulary.csv").write_text("0,Bark,/m/0\n1,Rain,/m/1\n")
    for part in ("dev", "eval"):
        for i in range(8):
            sound(place / "FSD50K" / f"FSD50K.{part}_audio" / f"{i}.wav")
        lines = [f'{i},"{("Bark", "Bark,Rain")[i % 2]}","/m/0"' + (",train", ",val")[i // 6] * (part == "dev") for i in range(8)]
        (truth / f"{part}.csv").write_text("fname,labels,mids" + ",split" * (part == "dev") + "\n" + "\n".join(lines) + "\n")


def run(words, cwd, ranks=1):
    """A command line in processes of its own: (exit code, what it printed)."""
    done = command(words, cwd, ranks=ranks)
    return done.returncode, done.stdout + done.stderr


def train(place, folder):
    """A run of the method that the folder's name begins with, if there is none yet."""
    if not (place / folder / "latest.pt").exists():
        script = next(s for s in METHODS if Path(folder).name.startswith(s.split(".")[0]))
        code, shown = run([sys.executable, str(ROOT / script), *f"--data folder --data-dir clips --out {folder} {TRAIN}".split()], place)
        assert code == 0, shown[-2000:]


def test_the_readme_has_the_commands_that_a_newcomer_needs():
    for start in ("python avjepa_lejepa.py", "torchrun --nproc_per_node=8 avjepa_lejepa.py --data audioset", "torchrun --nnodes",
                  "python ajepa.py", "torchrun --nproc_per_node=8 ajepa.py --data audioset", "python reproduce.py masking",
                  "python mjepa.py", "torchrun --nproc_per_node=8 mjepa.py --data audioset", "python reproduce.py cross-modal",
                  "python avjepa_ncsu.py", "torchrun --nproc_per_node=8 avjepa_ncsu.py --data kinetics400", "python reproduce.py sound",
                  "python probe.py", "python retrieval.py", "python visualize.py attention", "python visualize.py pca",
                  "python visualize.py map", "python visualize.py curves", "python reproduce.py methods", "python data.py",
                  "python -m pytest"):
        assert any(line.startswith(start) for line in COMMANDS), start


def test_two_commands_do_all_the_set_up():
    first, second = re.findall(r"^python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && (.*)$", BLOCKS, re.M)
    assert first == ".venv/bin/python avjepa_lejepa.py" and second == ".venv/bin/python -m pytest -q"


@pytest.mark.parametrize("line", [c for c in COMMANDS if "pytest" not in c])
def test_command_of_the_readme_runs(place, line, monkeypatch):
    # the probes at the end of a toy run: of two epochs, not of 2,000 steps (where the command is forked off this process)
    monkeypatch.setattr(probe, "frozen_schedule", lambda clips, most=512: (min(most, max(2, clips // 8)), 2))
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    words[words.index(script)] = str(ROOT / script)
    ranks = 1
    if words[0] == "torchrun" and FORK and line != next(c for c in COMMANDS if c.startswith("torchrun")):       # one of them as it is
        words, ranks = [sys.executable, *words[words.index(str(ROOT / script)):]], 2
    elif words[0] == "torchrun":
        port = 20000 + os.getpid() % 20000
        words = [w.replace("=8", "=2").replace("nnodes=4", "nnodes=1").replace("HOST:29500", f"localhost:{port}") for w in words]
        words[0:1] = [sys.executable, "-m", "torch.distributed.run"]
    else:
        words[0] = sys.executable
    for folder in re.findall(r"--(?:ckpt|init) (\S+)", line) + (re.findall(r"runs/\S+", line) if "curves" in line else []):
        train(place, folder)
    words = [*("2" if words[i - 1] == "--accumulate" else w for i, w in enumerate(words)), *SHRINK[script].split()]
    if SHRINK[script] == TRAIN and "--out" not in line:
        words += ["--fresh"]
    if "probe.py" in script and "--save-features" not in line:
        words += ["--epochs", "1", "--batch-size", "4", *(() if "finetune" in line else ("--lr", "1e-3"))]
    if "probe.py" in script and "pixels" not in line:
        words += ["--views", "1"]
    code, shown = run(words, place, ranks=ranks)
    assert code == 0, shown[-2000:]
    assert "Traceback" not in shown
    assert f"{max(2, ranks) if line.startswith('torchrun') else 1} x cpu" in shown or SHRINK[script] != TRAIN


def test_as_many_lines_of_two_scripts_differ_as_the_readme_says():
    said = re.findall(r"^diff (\w+\.py) (\w+\.py) +# (\d+)", README, re.M)
    assert len(said) == 6
    for one, other, count in said:
        shown = subprocess.run(["diff", one, other], cwd=ROOT, capture_output=True, text=True).stdout
        assert sum(line[:1] in ("<", ">") for line in shown.splitlines()) == int(count), (one, other)


def test_the_five_lines_of_the_readme_run(place):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    train(place, "runs/avjepa_lejepa-toy-seed0")
    out = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.returncode == 0, out.stderr[-2000:]


def test_every_file_and_flag_that_the_readme_names_exists():
    for script, link in re.findall(r"`(\w+\.py)`|\]\(([^#)]\S*?)\)", README):
        assert "://" in link or any((folder / (script or link)).is_file() for folder in (ROOT, ROOT / "figures")), script or link
    sources = "".join((ROOT / f).read_text() for f in SHRINK) + (ROOT / "common.py").read_text()
    for line in COMMANDS:
        for flag in re.findall(r"\.py\b.*", line):
            for name in re.findall(r"(?<!\S)(--[a-z-]+)", flag):
                assert f'"{name}"' in sources, name
