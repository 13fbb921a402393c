"""The house rules (STYLE.md): how long a notebook, a module and a line may be, how a notebook begins, and that definitions are shown.

Every rule is a function from a notebook or a module to a list of complaints; the last tests plant a violation of each.
"""
import ast
import json
import re

import pytest
import yaml
from conftest import ROOT

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p.relative_to(NBS).with_suffix("").as_posix() for p in NBS.rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p.relative_to(ROOT / "lsbook").as_posix() for p in (ROOT / "lsbook").rglob("*.py")
                 if p.name not in ("_modidx.py", "__init__.py"))
PAGES = ("index", "how_to_read", "glossary")            # pages that export nothing and teach no code
METHODS = ("lseg/", "step/", "vglaw/", "groupvit/", "mcis/", "studio/")
LEARNERS = ("scenes/", "text/", "vision", "losses", "metrics", *METHODS[:-1])  # modules a learner reads
CELLS, METHOD_CELLS, MODULE_LINES, LINE, GUARDS = 120, 150, 450, 110, .08


def source(cell):
    return "".join(cell["source"])


def read(name):
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code(text):
    """The Python of a cell: without options and magics."""
    return "\n".join(line for line in text.splitlines() if not re.match(r"\s*(#\s*\||%|!)", line))


def exported(cell):
    return cell["cell_type"] == "code" and bool(re.search(r"^#\s*\|\s*exports?\b", source(cell), re.M))


def defines(cell):
    """The names that an exported cell defines; none for a cell of imports."""
    names = []
    for node in ast.parse(code(source(cell))).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names += [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return names


def too_long(name, nb):
    most = METHOD_CELLS if name.startswith(METHODS) else CELLS
    return [f"has {len(nb['cells'])} cells, over {most}"] if len(nb["cells"]) > most else []


def wide_lines(nb):
    """Lines of code that JupyterLab would cut. Options (`#|`) are one line each by nbdev's rule, and so are imports, which it makes relative."""
    return [f"cell {i} has a line of {len(line)} characters: {line.strip()[:60]}" for i, cell in enumerate(nb["cells"])
            if cell["cell_type"] == "code" for line in code(source(cell)).splitlines()
            if len(line) > (130 if re.match(r"from \S+ import \w", line) else LINE)]


def unshown(nb):
    """An exported cell directly behind another is fine where the next cell shows both at work: it names one, and one names the other."""
    names_in = lambda names, text: any(re.search(rf"\b{re.escape(n)}\b", text) for n in names)
    wrong, run = [], []
    for i, cell in enumerate([*nb["cells"], dict(cell_type="markdown", source=[])]):
        if exported(cell) and defines(cell):
            run.append((i, defines(cell), source(cell)))
            continue
        if len(run) > 2:
            wrong.append(f"cells {run[0][0]} to {run[-1][0]} are {len(run)} exported cells in a row")
        elif len(run) == 2:
            demo = next((source(c) for c in nb["cells"][i:i + 2] if c["cell_type"] == "code" and not exported(c)), "")
            (_, one, text_one), (_, two, text_two) = run
            both = [names_in(one, demo) or names_in(two, demo) and names_in(one, text_two),
                    names_in(two, demo) or names_in(one, demo) and names_in(two, text_one)]
            wrong += [f"cell {k} ({', '.join(names)[:50]}) stands beside another exported cell, and the next does not show it at work"
                      for (k, names, _), shown in zip(run, both) if not shown]
        run = []
    return wrong


def head(name, nb):
    """Title and summary, what one will be able to do with the minutes it takes, and at most two code cells before the first section."""
    wrong, cells = [], nb["cells"]
    first = next((i for i, c in enumerate(cells) if c["cell_type"] == "markdown" and re.search(r"^## ", source(c), re.M)), len(cells))
    boilerplate = sum(c["cell_type"] == "code" for c in cells[:first])
    if boilerplate > 2:
        wrong.append(f"has {boilerplate} code cells before its first section, over 2")
    if name not in PAGES and minutes(nb) is None:
        wrong.append("does not say at its top 'Reading: N minutes'")
    return wrong


def minutes(nb):
    found = re.search(r"Reading:\s+(\d+)\s+minutes", "\n".join(source(c) for c in nb["cells"][:3]))
    return found and int(found[1])


def estimate(nb):
    """Minutes of careful reading: 110 words of prose, 11 lines of code or 3 figures a minute; what is folded away is not counted."""
    prose = " ".join(re.sub(r"<details>.*?</details>", "", source(c), flags=re.S) for c in nb["cells"] if c["cell_type"] == "markdown")
    lines = sum(bool(line.strip()) for c in nb["cells"] if c["cell_type"] == "code" for line in code(source(c)).splitlines())
    figures = sum("image/png" in o.get("data", {}) for c in nb["cells"] if c["cell_type"] == "code" for o in c["outputs"])
    return len(prose.split()) / 110 + lines / 11 + figures / 3


def options(nb):
    """Every `#| key: value` line is YAML for just that text: Quarto reads it so, and stops at what is none."""
    wrong = []
    for i, cell in enumerate(nb["cells"]):
        for line in source(cell).splitlines() if cell["cell_type"] == "code" else ():
            if not (found := re.match(r"#\|\s*([\w-]+:\s.*)$", line)):
                continue
            try:
                ((key, value),) = yaml.safe_load(found[1]).items()
                meant = found[1].split(":", 1)[1].strip()
                if meant not in ("true", "false") and str(value) != (json.loads(meant) if meant[:1] == '"' else meant):
                    wrong.append(f"cell {i}: {line[:60]} would be read as {value!r}"[:200])
            except (yaml.YAMLError, ValueError, AttributeError) as error:
                wrong.append(f"cell {i}: {line[:60]} is no YAML ({str(error).splitlines()[0]})")
    return wrong


def bindings(text):
    """Names that a cell binds at its top level, with what is imported under them; methods put into a class by `@patch` are none."""
    out = {}

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not any(ast.unparse(d).startswith("patch") for d in node.decorator_list):
                out[node.name] = None
            return
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for a in node.names:
                out[a.asname or a.name.split(".")[0]] = (a.name if a.asname or isinstance(node, ast.ImportFrom) else a.name.split(".")[0])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out[node.id] = None
        for child in ast.iter_child_nodes(node):
            visit(child)
    visit(ast.parse(code(text)))
    return out


def rebound(nb):
    """A demonstration must not give another meaning to a name that exported cells bind or import: exported functions would meet it at their next call."""
    module, wrong = {}, []
    for cell in nb["cells"]:
        if exported(cell):
            module |= bindings(source(cell))
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "code" and not exported(cell):
            wrong += [f"cell {i} gives {name!r} a new meaning, which exported cells bind" for name, what in bindings(source(cell)).items()
                      if name in module and what not in (module[name] or name, name)]
    return wrong


def guard_share(text):
    """The share of a module's code lines that only refuse: `raise`, the `if` or `except` around nothing else, warnings."""
    tree = ast.parse(text)
    docs = {line for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node)
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")} - docs
    span = lambda node: set(range(node.lineno, node.end_lineno + 1))
    guards = set()
    for node in ast.walk(tree):
        refuses = isinstance(node, ast.Raise) or (isinstance(node, (ast.If, ast.ExceptHandler)) and not getattr(node, "orelse", None)
                                                  and all(isinstance(b, ast.Raise) for b in node.body))
        warns = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("warnings.warn", "_need", "need")
        if refuses or warns:
            guards |= span(node)
    return len(guards & lines) / max(1, len(lines)), len(lines)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name):
    nb = read(name)
    wrong = [*too_long(name, nb), *head(name, nb), *wide_lines(nb), *unshown(nb), *options(nb), *rebound(nb)]
    assert not wrong, f"{name}.ipynb " + f"\n{name}.ipynb ".join(wrong)


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if n not in PAGES])
def test_reading_time_is_about_true(name):
    said, about = minutes(read(name)), estimate(read(name))
    assert said and .7 * about <= said <= 1.4 * about, f"{name}.ipynb says {said} minutes; it has words, lines and figures for {about:.0f}"


def test_foundations_are_read_in_eight_hours():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    (rooms,) = (e["contents"] for e in site["website"]["sidebar"]["contents"] if e.get("section") == "Foundations")
    assert sum(estimate(read(r.removesuffix(".ipynb"))) for r in rooms) <= 8 * 60


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    text = (ROOT / "lsbook" / name).read_text(encoding="utf-8")
    length = sum(bool(line.strip()) for line in text.splitlines())
    assert length <= MODULE_LINES, f"lsbook/{name} has {length} lines, over {MODULE_LINES}"
    if name.startswith(LEARNERS) and not name.endswith("official.py"):
        share, lines = guard_share(text)
        assert share <= GUARDS, f"lsbook/{name}: {share:.1%} of {lines} code lines only refuse something, over {GUARDS:.0%}"


def cells(*texts):
    return dict(cells=[dict(cell_type="code" if t.startswith(("#|", ">>> ")) else "markdown", source=[t.removeprefix(">>> ")], outputs=[]) for t in texts])


def test_each_rule_sees_its_violation():
    assert too_long("vision", cells(*["text"] * 121)) and not too_long("vision", cells(*["text"] * 120))
    assert wide_lines(cells(">>> x = " + "1" * 110)) and not wide_lines(cells("#| fig-alt: " + "a" * 200))
    one, two = "#| exports\ndef one(): pass", "#| exports\ndef two(): pass"
    assert unshown(cells(one, two, ">>> one()")) and not unshown(cells(one, two, ">>> one(), two()"))
    assert not unshown(cells(one, "#| exports\ndef two(): one()", ">>> two()")) and unshown(cells(one, two, two, ">>> one(); two()"))
    assert not unshown(cells(one, "prose", two))
    assert head("vision", cells("# T\n\n> s", "Reading: 3 minutes", ">>> 1", ">>> 2", ">>> 3", "## One"))
    assert head("vision", cells("# T\n\n> s", "no time", "## One")) and not head("vision", cells("# T", "Reading: 3 minutes", "## One"))
    assert options(cells('#| fig-cap: two: three')) and options(cells('#| fig-cap: yes # no')) and options(cells('#| fig-cap: "open'))
    assert not options(cells('#| fig-cap: "two: three"\n#| fig-alt: plain words\n#| eval: false'))
    uses = "#| exports\nfrom m import named\ndef f(): return named"
    for bad in (">>> named = [1]", ">>> for named, x in y: pass", ">>> with g() as named: pass", ">>> def f(): pass", ">>> from other import thing as named", ">>> (a, f) = 1, 2"):
        assert rebound(cells(uses, bad)), bad
    assert not rebound(cells(uses, ">>> from m import named\nx = [named for named in y]\ndef g(named): f = 1", "#| exports\n@patch\ndef steps(self: X): pass", ">>> steps = 1"))
    assert guard_share("def f(x):\n    if x: raise ValueError(x)\n    return x")[0] == 1 / 3
    assert guard_share('"doc"\nx = 1\n# note\ny = 2')[0] == 0
