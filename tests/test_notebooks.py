"""Every notebook runs in a fresh kernel, still says what its saved outputs say, is clean, and is in step with its module.

Cells marked `#| slow`, `#| cuda` or `#| eval: false` are not run. A cell marked `#| volatile` runs, but its words may differ from the
saved ones, as what it prints depends on the machine; one that prints "skipped: ..." for lack of data is not compared at all.
Numbers are compared as closely as another processor or library version allows; in a cell marked `#| loose`, whose numbers come out of
a training, with a wide tolerance. Measured times and sizes are not compared.
"""
import filecmp
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT, copy_project, kernel_env
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from lsbook.show import caption_of

NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
NOT_RUN = {"slow", "cuda"}
TIGHT, LOOSE = (0.02, 0.002), (0.5, 0.1)  # (relative, absolute): how far a number may be from its saved twin

DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*([^\s:]+)[ \t]*:?[ \t]*(.*?)[ \t]*$", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
MEASURED = re.compile(r"\d[\d.,]*\s*(?:ns|us|µs|μs|ms|s|sec|seconds?|min|minutes?|[KMG]i?B|bytes|\w*/s|x|×|times)(?!\w)")
ADDRESS = re.compile(r"( at)? ?0x[0-9A-Fa-f]+|(?<=#L)\d+(-L\d+)?")  # nbdev_clean drops the " at 0x..." of an object


def read(name):
    return nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def directives(cell):
    return dict(DIRECTIVE.findall(cell.source))


def not_run(cell):
    marks = directives(cell)
    return bool(NOT_RUN & set(marks)) or marks.get("eval") == "false"


def texts(cell):
    """What a cell says: kind of output -> text, where neighbouring pieces of one stream are one."""
    said = {}
    for out in cell.outputs:
        if out.output_type == "stream":
            if out.name == "stdout":
                said["stdout"] = said.get("stdout", "") + out.text
        else:
            for mime, value in out.get("data", {}).items():
                said[mime] = said.get(mime, "") + (str(value) if mime in ("text/plain", "text/markdown") else "")
    return said


def words_and_numbers(text):
    text = MEASURED.sub("<measured>", ADDRESS.sub("", ANSI.sub("", text)))
    numbers = [float(n.replace(",", "")) for n in NUMBER.findall(text)]
    return re.sub(r"\s+", "", NUMBER.sub("<n>", text)), numbers


def difference(saved, fresh, tolerance=TIGHT):
    """None where two texts agree up to numbers, else what differs."""
    relative, absolute = tolerance
    (words, numbers), (new_words, new_numbers) = words_and_numbers(saved), words_and_numbers(fresh)
    if words != new_words:
        return "the words differ"
    for a, b in zip(numbers, new_numbers):
        if abs(a - b) > absolute + relative * max(abs(a), abs(b)):
            return f"{a:g} was saved, now it is {b:g}"
    return None


def test_difference_sees_what_it_should():
    assert difference("mIoU 0.830 in 1.2 s\n", "mIoU  0.831 in 9.7 s") is None
    assert difference("mIoU 0.83", "oIoU 0.83") == "the words differ"
    assert difference("mIoU 0.83", "mIoU 0.80") == "0.83 was saved, now it is 0.8"
    assert difference("scale 14.29", "scale 10.0") and difference("0.07", "0.1") and difference("gain 0.05", "gain 0.04")
    assert difference("mIoU 0.83", "mIoU 0.71", LOOSE) is None and difference("mIoU 0.83", "mIoU 0.12", LOOSE)
    assert difference("tensor([1., 2.])", "tensor([1., 2., 3.])") == "the words differ"
    assert difference("<Image size=64x64>", "<Image size=64x64 at 0x7F83F5A62F10>") is None
    assert difference("1,024 pixels", "1,000 pixels") == "1024 was saved, now it is 1000"


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("run") / "lsbook")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_as_saved(name, scratch):
    saved, path = read(name), scratch / "nbs" / f"{name}.ipynb"
    for last in (False, True):
        fresh = nbformat.from_dict(saved)
        for cell in fresh.cells:
            if cell.cell_type == "code":
                cell.outputs = []
                if not_run(cell):
                    cell.source = "pass  # not run here"
        client = NotebookClient(fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
        try:
            client.execute(env=kernel_env())
            break
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            # now and then a message between client and kernel is lost, and each waits for the other: once more
            if last or not isinstance(error, CellTimeoutError):
                pytest.fail(f"{name}.ipynb does not run:\n{ANSI.sub('', str(error))[-6000:]}", pytrace=False)
    stale = []
    for number, (old, new) in enumerate(zip(saved.cells, fresh.cells)):
        if old.cell_type != "code" or not_run(old):
            continue
        was, now = texts(old), texts(new)
        if now.get("stdout", "").startswith("skipped: "):  # optional data that is not here: nothing to compare
            continue
        where = f"cell {number} ({old.source.strip().splitlines()[0][:60]!r})"
        if set(was) != set(now):
            stale.append(f"{where}: saved {sorted(was) or 'nothing'}, now {sorted(now) or 'nothing'}")
        elif "volatile" not in directives(old) and "versions()" not in old.source:
            for kind in was:
                if why := difference(was[kind], now[kind], LOOSE if "loose" in directives(old) else TIGHT):
                    stale.append(f"{where}: {why}\n--- saved\n{was[kind][:1500]}\n--- now\n{now[kind][:1500]}")
    if stale:
        pytest.fail(f"{name}.ipynb: run it again and save it, its outputs are stale:\n" + "\n".join(stale), pytrace=False)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_clean(name):
    path, nb, wrong = ROOT / "nbs" / f"{name}.ipynb", read(name), []
    if (nb.nbformat, nb.nbformat_minor) != (4, 5):
        wrong.append(f"is nbformat {nb.nbformat}.{nb.nbformat_minor}, not 4.5")
    ids = [cell.get("id") for cell in nb.cells]
    if None in ids or len(set(ids)) < len(ids):
        wrong.append("has cells without an id of their own")
    if path.stat().st_size > 1.5e6:
        wrong.append(f"weighs {path.stat().st_size / 1e6:.1f} MB, over 1.5 MB")
    if not re.fullmatch(r"# \S.*\n+> \S.*\s*", nb.cells[0].source):
        wrong.append("does not begin with a cell of '# Title' and '> one-line summary' alone (the site makes them the page's head, "
                     "and drops whatever else that cell says)")
    if {"export", "exports"} & set(directives(nb.cells[-1])):
        wrong.append("ends in an exported cell, which the site's processing cannot document")
    if any(c.cell_type == "code" for c in nb.cells) and not any(cell.outputs for cell in nb.cells if cell.cell_type == "code"):
        wrong.append("is saved without outputs")
    for number, cell in enumerate(nb.cells):
        said = cell.source
        if cell.cell_type == "code":
            kinds = [out.output_type for out in cell.outputs]
            pictures = sum("image/png" in out.get("data", {}) for out in cell.outputs)
            streams = {out.name for out in cell.outputs if out.output_type == "stream"}
            if "error" in kinds:
                wrong.append(f"saved an error in cell {number}")
            if "stderr" in streams:
                wrong.append(f"saved something on stderr in cell {number}")
            if pictures > 1:
                wrong.append(f"shows {pictures} pictures under the one caption of cell {number}")
            for need in ("fig-cap", "fig-alt"):
                if pictures and not directives(cell).get(need):
                    wrong.append(f"shows a picture without #| {need} in cell {number}")
            if pictures and f"*{caption_of(cell.source)}*" not in [out.get("data", {}).get("text/markdown") for out in cell.outputs]:
                wrong.append(f"does not show its caption below the picture of cell {number}: import lsbook.show, run it again")
            said += "".join(texts(cell).values())
        if hit := re.search(r"(?<![\w.~:/])/(?:work|root|home|Users|tmp)/\S*", said):
            wrong.append(f"names a folder of one machine in cell {number}: {hit.group()}")
    if wrong:
        pytest.fail(f"{name}.ipynb " + f"\n{name}.ipynb ".join(wrong), pytrace=False)


def test_modules_and_notebooks_are_in_step(tmp_path):
    """Exporting and cleaning a copy changes nothing: no module was edited by hand, no notebook saved unclean."""
    copy = copy_project(tmp_path / "lsbook")
    for command in ("from nbdev.doclinks import nbdev_export as f", "from nbdev.clean import nbdev_clean as f"):
        done = subprocess.run([sys.executable, "-c", f"{command}; f()"], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    changed = []
    for folder, pattern in (("lsbook", "*.py"), ("nbs", "*.ipynb")):
        before = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob(pattern) if ".ipynb_checkpoints" not in p.parts}
        after = {p.relative_to(copy).as_posix() for p in (copy / folder).rglob(pattern)}
        changed += sorted(before ^ after)
        changed += sorted(p for p in before & after if not filecmp.cmp(ROOT / p, copy / p, shallow=False))
    assert not changed, f"nbdev_export and nbdev_clean change {changed}: run both and keep what they write"


def test_a_modules_path_is_its_notebooks_path():
    for name in NOTEBOOKS:
        exported = [directives(c)["default_exp"] for c in read(name).cells
                    if c.cell_type == "code" and "default_exp" in directives(c)]
        path = re.sub(r"(^|/)\d+_", r"\1", name).replace("/", ".")
        assert exported in ([], [path]), f"{name}.ipynb exports {exported}, its path says {path}"
