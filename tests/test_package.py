"""The wheel holds everything, installs and imports away from the checkout, and `import lsbook` is light."""
import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import version

import lsbook
import pytest
from conftest import ROOT, copy_project

HEAVY = ["transformers", "open_clip", "datasets", "timm", "matplotlib", "torchvision", "accelerate"]


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def python(code, executable=sys.executable, cwd=None):
    """Runs `code` in a new interpreter and returns what it printed last, read as JSON."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(executable), "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy = copy_project(tmp_path_factory.mktemp("wheel") / "lsbook")
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "dist"],
                          cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def shipped():
    """Every file of the package, by its path."""
    files = [*(ROOT / "lsbook").rglob("*.py"), *(ROOT / "lsbook" / "weights").glob("*")]
    return {f.relative_to(ROOT).as_posix() for f in files if "__pycache__" not in f.parts}


def test_wheel_holds_every_module_and_the_weights(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        assert shipped() <= names, f"missing in the wheel: {sorted(shipped() - names)}"
        assert not [n for n in names if n.startswith(("tests", "nbs"))]
        (metadata,) = (z.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
        (entries,) = (z.read(n).decode() for n in names if n.endswith(".dist-info/entry_points.txt"))
        assert any(n.endswith("LICENSE") for n in names), "the licence travels with the code"
    assert f"Version: {settings()['version']}\n" in metadata and re.search("License(-Expression)?: Apache-2.0\n", metadata)
    assert "lsbook = lsbook.cli:main" in entries and "lsbook = lsbook._modidx:d" in entries


def test_wheel_imports_in_a_fresh_environment(wheel, tmp_path):
    """Installed into an environment that sees today's dependencies but not the checkout, every module imports from there."""
    home = tmp_path / "env"
    venv.EnvBuilder(with_pip=False).create(home)
    here = "Scripts" if os.name == "nt" else "bin"
    fresh = home / here / ("python.exe" if os.name == "nt" else "python")
    done = subprocess.run([sys.executable, "-m", "pip", "--python", str(fresh), "install", "-q", "--no-deps", "--no-index", str(wheel)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = python("import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))", fresh)
    with open(os.path.join(site, "dependencies.pth"), "w") as f:
        f.write("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])))
    modules = sorted(n[:-3].replace("/", ".").removesuffix(".__init__") for n in shipped() if n.endswith(".py"))
    files = python(f"import importlib, json; print(json.dumps([importlib.import_module(m).__file__ for m in {modules!r}]))",
                   fresh, tmp_path)
    elsewhere = [f for f in files if not os.path.realpath(f).startswith(os.path.realpath(site))]
    assert len(files) == len(modules) and not elsewhere
    done = subprocess.run([home / here / "lsbook", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "doctor" in done.stdout, done.stdout + done.stderr


def test_one_version():
    assert lsbook.__version__ == version("lsbook") == settings()["version"]


def test_import_is_light():
    """Under 0.3 s beyond `import torch`, in the better of several runs, and none of the large libraries."""
    code = ("import time, torch, sys, json; before = set(sys.modules); start = time.perf_counter(); import lsbook; "
            "seconds = time.perf_counter() - start; new = set(sys.modules) - before; "
            f"print(json.dumps([seconds, [m for m in {HEAVY!r} if m in new]]))")
    runs = [python(code) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3, runs
    assert all(not heavy for _, heavy in runs), runs


def test_load_alone_needs_no_large_library():
    heavy = python("import sys, json; from lsbook import load; "
                   "print(json.dumps([m for m in ('transformers', 'open_clip', 'datasets') if m in sys.modules]))")
    assert not heavy, f"`from lsbook import load` imports {heavy}"


def test_names_of_the_package_are_there():
    for name in lsbook.__all__:
        assert getattr(lsbook, name) is not None and name in dir(lsbook)
    assert lsbook.scenes.__name__ == "lsbook.scenes"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lsbook.nothing


def test_no_module_imports_itself_in_a_circle():
    """The graph of the modules' imports at their top has no cycle; that of the rooms, imports inside functions too: tests/test_book.py."""
    home, below = ROOT / "lsbook", {}
    for path in home.rglob("*.py"):
        if path.name == "_modidx.py":
            continue
        parts = ("lsbook", *path.relative_to(home).with_suffix("").parts)
        package = parts[:-1]
        name = ".".join(package if parts[-1] == "__init__" else parts)
        found = below.setdefault(name, set())
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[:len(package) - node.level + 1], *(node.module or "").split(".")]
                whole = ".".join(filter(None, base))
                found |= {whole} | {f"{whole}.{a.name}" for a in node.names}
    below = {name: {f for f in found if f in below and f != name and not (f + ".").startswith(name + ".")} for name, found in below.items()}
    order, open_ = [], []

    def visit(name):
        assert name not in open_, f"a cycle: {' -> '.join([*open_[open_.index(name):], name])}"
        if name not in order:
            open_.append(name)
            for other in sorted(below[name]):
                visit(other)
            order.append(open_.pop())

    for name in below:
        visit(name)
    assert len(order) > 30
