"""Every command of the README runs, at tiny size: parsed from it, with flags that shrink it added at its end."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
LINES = [line.split(" #")[0].split("&&")[-1].strip().removeprefix(".venv/bin/") for line in BLOCKS.splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if re.match(r"(python|torchrun) ", line)))
TRAIN = "--steps 2 --batch-size 4 --recipe toy --workers 1 --log-every 1"
SHRINK = {"avjepa_lejepa.py": TRAIN, "probe.py": "--epochs 1 --batch-size 4 --views 1 --workers 1", "retrieval.py": "--views 1 --workers 1",
          "data.py": "--workers 1"}


@pytest.fixture(scope="module")
def place(toy, tmp_path_factory):
    """A folder with what the README's commands name: the toy's cache, clips/, dog.wav, audioset/, vggsound/ and a run of each name."""
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
    return place


def test_the_readme_has_the_commands_that_a_newcomer_needs():
    for start in ("python avjepa_lejepa.py", "torchrun --nproc_per_node=8 avjepa_lejepa.py --data audioset", "torchrun --nnodes",
                  "python probe.py", "python retrieval.py", "python data.py", "python -m pytest"):
        assert any(command.startswith(start) for command in COMMANDS), start


def test_two_commands_do_all_the_set_up():
    first, second = re.findall(r"^python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && (.*)$", BLOCKS, re.M)
    assert first == ".venv/bin/python avjepa_lejepa.py" and second == ".venv/bin/python -m pytest -q"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "pytest" not in c])
def test_command_of_the_readme_runs(place, command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    words[words.index(script)] = str(ROOT / script)
    if words[0] == "torchrun":
        port = 20000 + os.getpid() % 20000
        words = [w.replace("=8", "=2").replace("nnodes=4", "nnodes=1").replace("HOST:29500", f"localhost:{port}") for w in words]
        words[0:1] = [sys.executable, "-m", "torch.distributed.run"]
    else:
        words[0] = sys.executable
    run = re.search(r"--ckpt (\S+)", command)
    if run and not (place / run[1] / "latest.pt").exists():
        subprocess.run([sys.executable, str(ROOT / "avjepa_lejepa.py"), "--data", "folder", "--data-dir", "clips", "--out", run[1],
                        *TRAIN.split()], cwd=place, check=True, capture_output=True)
    words = [*(w.replace("10", "2") if words[i - 1] == "--accumulate" else w for i, w in enumerate(words)), *SHRINK[script].split()]
    if "avjepa_lejepa" in script and "--out" not in command:
        words += ["--fresh"]
    if "probe.py" in script and "finetune" not in command:
        words += ["--lr", "1e-3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": str(21000 + os.getpid() % 20000)}
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_the_five_lines_of_the_readme_run(place):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    run = place / "runs" / "avjepa_lejepa-toy-seed0"
    if not run.exists():
        subprocess.run([sys.executable, str(ROOT / "avjepa_lejepa.py"), "--data", "folder", "--data-dir", "clips", "--out", str(run),
                        *TRAIN.split()], cwd=place, check=True, capture_output=True)
    out = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.returncode == 0, out.stderr[-2000:]


def test_every_file_and_flag_that_the_readme_names_exists():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
    sources = "".join((ROOT / f).read_text() for f in SHRINK) + (ROOT / "common.py").read_text()
    for command in COMMANDS:
        for flag in re.findall(r"\.py\b.*", command):
            for name in re.findall(r"(?<!\S)(--[a-z-]+)", flag):
                assert f'"{name}"' in sources, name
