"""FORMULAS.md: each place that it names is there, and each number of a recipe is the script's."""
import ast
import importlib
import math
import re

import numpy as np
import pytest
import torch

import common
import probe
from conftest import ROOT

PAGE = (ROOT / "FORMULAS.md").read_text()
SCRIPTS = ("ajepa.py", "avjepa_lejepa.py", "mjepa.py", "avjepa_ncsu.py")
COMMANDS = ("probe.py", "retrieval.py", "pixels.py", "run.py")
INTRO, *SECTIONS = PAGE.split("\n## ")
SPANS = re.findall(r"`([^`]+)`", "".join(SECTIONS))
PLACES = sorted({span for span in SPANS if re.fullmatch(r"[\w/]+\.py: [\w.]+", span)})


def section_of(script):
    """The page's section on the paper of a script."""
    section, = [text for text in SECTIONS if f"Script: `{script}`" in " ".join(text.split())]
    return section


def defined(file):
    """All names that stand in a file: functions, classes, Class.method, and what is assigned at the top."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names.update(f"{node.name}.{method.name}" for method in methods)
    return names


def flat(value):
    """Nested tuples -> a list of what is in them."""
    if not isinstance(value, tuple):
        return [value]
    parts = []
    for part in value:
        parts += flat(part)
    return parts


def number(text):
    """'.15', '1e-4' or '64/30' as a number; anything else as it is."""
    over, _, under = text.strip().partition("/")
    try:
        return float(over) / float(under or 1)
    except ValueError:
        return text.strip()


def look_up(module, name):
    """What the page calls 'tau', 'COOLDOWN.steps', 'METHOD.weights' or 'finetune.views'."""
    table, *keys = name.split(".")
    if not keys:
        return module.RECIPE[name][0]
    if table in ("frozen", "finetune"):
        return module.METHOD["protocol"][keys[0]][probe.COLUMNS[table]]
    value = getattr(module, table)
    for key in keys:
        value = value[key]
    return value[0] if table == "COOLDOWN" else value


def test_sections_are_the_four_papers_in_order():
    starts = [PAGE.index(section_of(script)) for script in SCRIPTS]
    assert starts == sorted(starts)
    assert len(SECTIONS) == 5                              # and what all share


@pytest.mark.parametrize("file", sorted({place.split(": ")[0] for place in PLACES}))
def test_each_name_is_where_the_page_says(file):
    named = {place.split(": ")[1] for place in PLACES if place.startswith(f"{file}: ")}
    assert named - defined(file) == set()


def test_no_place_and_no_value_stands_in_another_form():
    for span in SPANS:
        if ".py" in span:
            assert span in PLACES or span in SCRIPTS, span
        if "=" in span:
            assert re.fullmatch(r"[A-Za-z_.]+ = \S.*", span), span


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_are_those_of_the_recipe(script):
    module = importlib.import_module(script[:-3])
    quoted = re.findall(r"`([A-Za-z_.]+) = ([^`]+)`", section_of(script))
    assert len(quoted) >= 15
    for name, text in quoted:
        said = [number(part) for part in text.split(",")]
        assert said == flat(look_up(module, name)), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_and_mask_samplers_of_a_script_are_in_its_section(script):
    source = (ROOT / script).read_text()
    losses = source.split("\n# Loss\n")[1].split("\n# Training\n")[0]
    names = re.findall(r"^def (\w+)", losses, re.M)
    names += re.findall(r"^def ((?:hide|draw)_\w+|plan_views)", source, re.M)
    if script == "ajepa.py":
        names.remove("plan_views")                         # the whole clip
    assert "learning_rate" in names and len(names) >= 3
    for name in names:
        assert f"`{script}: {name}`" in section_of(script), name


def test_flags_of_the_page_are_those_of_a_script():
    sources = {file: (ROOT / file).read_text() for file in (*SCRIPTS, *COMMANDS)}
    for script in SCRIPTS:
        section = section_of(script)
        known = "".join(sources[file] for file in (script, *COMMANDS))
        for flag in re.findall(r"`(--[a-z-]+)", section):
            assert f'"{flag}"' in known, flag


def test_sigreg_has_the_constants_of_the_page():
    gaussian = float(re.search(r"Gaussian batch gives \*\*([\d.]+)\*\*", PAGE)[1])
    collapsed = float(re.search(r"collapsed batch, all at 0, gives \*\*([\d.]+) N\*\*", PAGE)[1])
    unit = math.sqrt(2 * math.pi)
    assert gaussian == pytest.approx(unit * (1 - 1 / math.sqrt(3)), rel=1e-3)
    assert collapsed == pytest.approx(unit * (1 - math.sqrt(2) + 1 / math.sqrt(3)), rel=1e-3)
    generator = torch.Generator().manual_seed(0)
    for n in (16, 256):
        values = [common.sigreg(torch.randn(n, 64, generator=generator), step, 64) for step in range(60)]
        assert torch.stack(values).mean().item() == pytest.approx(gaussian, abs=0.05)
        assert common.sigreg(torch.zeros(n, 64), 0, 64).item() == pytest.approx(collapsed * n, rel=1e-3)


def test_schedules_are_as_the_page_writes_them():
    peak = 3.0
    warmup = 10
    steps = 50
    for s in range(steps):
        cosine = peak / 2 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup - 1)))
        expected = peak * (s + 1) / warmup if s < warmup else cosine
        assert common.warmup_cosine(s, steps, warmup, peak) == pytest.approx(expected, abs=1e-9)
        tau = 0.9999 + (0.996 - 0.9999) / 2 * (1 + math.cos(math.pi * s / (steps - 1)))
        assert common.cosine(s, steps, 0.996, 0.9999) == pytest.approx(tau, abs=1e-9)
    mjepa = importlib.import_module("mjepa")
    table = {**mjepa.RECIPE, **mjepa.COOLDOWN}
    recipe = {name: row[0] for name, row in table.items()}
    last = mjepa.learning_rate(recipe["steps"] - 1, {**recipe, "cooldown": True})
    said = re.search(r"it\s+ends\s+at\s+(1\.\d+e-4)", PAGE)[1]
    assert f"{last:.2e}".replace("e-04", "e-4") == said


def test_blocks_have_the_sides_of_the_page():
    ajepa = importlib.import_module("ajepa")
    grid = (8, 64)
    for area, r in ((0.15, 0.75), (0.175, 1.0), (0.2, 1.5)):
        aspect = ajepa.aspect_range(grid, (r, r))
        rows, columns = common.block_size(np.random.default_rng(0), grid, (area, area), aspect)
        assert rows == round(8 * math.sqrt(area / r))
        assert columns == round(area * 512 / rows)


def test_formulas_are_shown_by_github():
    for formula in re.findall(r"\$([^$]*)\$", PAGE):
        assert not re.search(r"\\[^A-Za-z]|[|<>*\n]", formula), formula        # Markdown would take these
        assert formula == formula.strip()
        assert formula.count("{") == formula.count("}")
    for line in PAGE.splitlines():
        assert line.count("$") % 2 == 0 and line.count("`") % 2 == 0, line
        assert len(line) <= 110
        assert not re.match(r" *([+*]|\d+[.)]) ", line), line                 # would begin a list
