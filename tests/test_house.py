"""The house keeps its order: floors, first sentences, a light front door."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlm_probe"

# A file or folder of the package, its floor, and the sentence its docstring opens with.
# It imports only from lower floors, and from nothing beside it on its own.
HOUSE = {
    "tokens": (
        0,
        "The words for axes and token groups, and which position belongs to which "
        "group.",
    ),
    "sums": (
        0,
        "What a layer's autoencoder makes of its tokens, as sums that add up exactly.",
    ),
    "codes": (
        0,
        "The exact sparse codes of one autoencoder, and what they decode to.",
    ),
    "weights": (0, "Tensors are read from files that run no code."),
    "settings": (1, "What a probe is asked to do, and with which model."),
    "examples": (1, "Pictures and conversations on disk become examples."),
    "vision": (1, "Images become patch tokens."),
    "adapter": (1, "Patch tokens become input vectors of the language model."),
    "language": (
        1,
        "One frozen pass through the language model with image vectors put in.",
    ),
    "saes": (1, "One sparse autoencoder per layer."),
    "controls": (
        2,
        "What a curve must beat: image vectors that know nothing of the picture.",
    ),
    "result": (1, "What a probe found: tables, and where they came from."),
    "model": (2, "The four frozen parts, joined and checked."),
    "checkpoint": (2, "A run that can be killed and goes on."),
    "checkup": (
        3,
        "Whether the parts of a model belong together, and what to do if not.",
    ),
    "probe": (3, "The one road from images to a result."),
    "analysis": (4, "What a result means."),
    "training": (4, "Fitting the adapter while everything else stays frozen."),
    "toy": (
        4,
        "A world where every answer is known, and the small stack trained on it.",
    ),
    "plots": (
        4,
        "Figures of a result: curves over layers, with bounds and control arms.",
    ),
    "report": (5, "One self-contained page from a result."),
    "cli": (6, "The command line."),
    "__main__": (7, "`python -m vlm_probe`, which `torchrun -m vlm_probe` starts."),
}
FRONT_DOOR = "__init__"

# result.plot(), result.report() and what a result means are promised to users; each
# looks up when it is called, and not before, so a result can be read without them.
CALLED_LATE = {("result", "plots"), ("result", "report"), ("result", "analysis")}


def unit_of(path):
    """`sums` for vlm_probe/sums.py, `toy` for every file in vlm_probe/toy/."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules():
    """Every module file under the package except the front door itself."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [file for file in files if file != PACKAGE / "__init__.py"]


def is_unit(name):
    """Whether `from vlm_probe import name` means a file or folder of the package."""
    found = PACKAGE / f"{name}.py", PACKAGE / name
    return name in HOUSE or any(path.exists() for path in found)


def imported_units(source):
    """Line and unit of each import from vlm_probe, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "vlm_probe":
            names = [
                f"vlm_probe.{alias.name}" if is_unit(alias.name) else "vlm_probe"
                for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom):
            # A relative import has no place in the house; ruff (TID252) says so too.
            names = ["vlm_probe"] if node.level else [node.module]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "vlm_probe":
                found.append((node.lineno, rest[0] if rest else FRONT_DOOR))
    return found


def wrong_imports(unit, source):
    """What is wrong with the imports of a file of this unit, in words."""
    floor = HOUSE[unit][0]
    wrong = []
    for line, other in imported_units(source):
        if other == unit or (unit, other) in CALLED_LATE:
            continue
        if other == FRONT_DOOR:
            wrong.append(f"line {line}: imports the front door, which is above all")
        elif other not in HOUSE:
            wrong.append(f"line {line}: imports {other}, which has no floor")
        elif HOUSE[other][0] > floor:
            above = HOUSE[other][0]
            wrong.append(f"line {line}: imports up, {other} is on floor {above}")
        elif HOUSE[other][0] == floor:
            wrong.append(f"line {line}: imports sideways, {other} is on floor {floor}")
    return wrong


def first_sentence(source):
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split())
    return re.split(r"(?<=\.) ", text)[0]


def run_python(code):
    """The code in a new interpreter, away from what this one has imported."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )


def test_every_file_has_a_floor():
    homeless = sorted({unit_of(file) for file in modules()} - set(HOUSE))
    assert not homeless, (
        f"{homeless} in vlm_probe/ has no place in the house. Give it a floor and "
        "its first sentence in HOUSE, tests/test_house.py, before anything else."
    )


def test_imports_point_down():
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in modules()
        if unit_of(file) in HOUSE
        and (found := wrong_imports(unit_of(file), file.read_text()))
    }
    assert not wrong


@pytest.mark.parametrize("unit", HOUSE)
def test_first_sentence(unit):
    file = PACKAGE / f"{unit}.py"
    if not file.exists():
        file = PACKAGE / unit / "__init__.py"
    if not file.exists():
        pytest.skip(f"{unit} is not built yet")
    assert first_sentence(file.read_text()) == HOUSE[unit][1]


@pytest.mark.parametrize(
    ("unit", "source", "words"),
    [
        ("sums", "from vlm_probe.probe import probe_layers", "up, probe is on floor 3"),
        ("sums", "from vlm_probe import probe", "up, probe is on floor 3"),
        ("sums", "import vlm_probe.probe as p", "up, probe is on floor 3"),
        ("sums", "import os, vlm_probe.toy.world", "up, toy is on floor 4"),
        ("probe", "def f():\n    from vlm_probe.cli import main", "line 2: imports up"),
        ("probe", "if TYPE_CHECKING:\n    import vlm_probe.report", "line 2"),
        ("saes", "from vlm_probe.vision import Vision", "sideways, vision"),
        ("toy", "from vlm_probe.training.fit import fit", "sideways, training"),
        ("plots", "from vlm_probe import toy", "sideways, toy"),
        ("report", "from vlm_probe import load", "front door"),
        ("report", "import vlm_probe", "front door"),
        ("report", "from . import plots", "front door"),
        ("report", "from .plots import draw", "front door"),
        ("cli", "import vlm_probe.attic", "attic, which has no floor"),
    ],
)
def test_a_wrong_import_is_seen(unit, source, words):
    (found,) = wrong_imports(unit, source)
    assert words in found


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        (
            "probe",
            "from vlm_probe.sums import Sums\nfrom vlm_probe import tokens, saes",
        ),
        ("toy", "from vlm_probe.toy.world import draw\nimport vlm_probe.toy.texts"),
        ("cli", "def main():\n    import vlm_probe.report"),
        ("sums", "import torch\nfrom vlm_probe_extras import probe"),
    ],
)
def test_a_right_import_is_let_pass(unit, source):
    assert wrong_imports(unit, source) == []


def test_the_first_sentence_is_found():
    assert first_sentence('"""One idea,\ntold twice. And more.\n\nMore."""') == (
        "One idea, told twice."
    )
    assert first_sentence('"""Figures."""') == "Figures."
    assert first_sentence("x = 1") == ""


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split()) - {"vlm_probe.data"}
    built = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in PACKAGE.rglob("__init__.py")
    }
    assert listed == built, "setup.cfg [options] packages and the folders differ"


def test_import_is_fast():
    code = (
        "import time\nstart = time.perf_counter()\nimport vlm_probe\n"
        "print(time.perf_counter() - start)"
    )
    # The best of three, since a busy machine says nothing about the import.
    assert min(float(run_python(code).stdout) for _ in range(3)) < 1.0


@pytest.mark.parametrize("module", ["vlm_probe", "vlm_probe.cli"])
def test_import_is_light_and_silent(module):
    done = run_python(f"import sys, {module}\nsys.exit('torch' in sys.modules)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_front_door_is_small():
    done = run_python("import vlm_probe as v\nprint(*dir(v), '|', *v.__all__)")
    seen, listed = (part.split() for part in done.stdout.split("|"))
    public = {name for name in seen if not name.startswith("_")}
    assert public <= set(listed)
    assert len(listed) <= 12


def test_every_public_name_is_there():
    import vlm_probe

    assert all(getattr(vlm_probe, name) is not None for name in vlm_probe.__all__)
