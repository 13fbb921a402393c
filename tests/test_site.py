"""The site: every notebook has its place in the sidebar, its processed page a title and a summary, and links that lead somewhere.

nbdev's processing needs no Quarto. Where Quarto is installed, the whole site is rendered and looked at too.
"""
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT, copy_project

LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)[^)]*\)|<a\s[^>]*href=[\"']([^\"']+)|!\[[^\]]*\]\(([^)\s]+)|<img\s[^>]*src=[\"']([^\"']+)")
PROCESS = """
if __name__ == "__main__":
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    proc_nbs(n_workers=1, force=True)
"""
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)


def sidebar(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif "contents" in entry:
            yield from sidebar(entry["contents"])
        else:
            yield entry["href"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A scratch copy whose pages have been processed, as `nbdev_docs` does before it calls Quarto."""
    copy = copy_project(tmp_path_factory.mktemp("site") / "lsbook")
    (copy / "process.py").write_text(PROCESS)
    done = subprocess.run([sys.executable, "process.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (copy / "process.log").write_text(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr))
    return copy


@pytest.fixture(scope="module")
def pages(project):
    """Notebook path -> (its processed notebook, the path of the page it becomes)."""
    found = {}
    for path in sorted((project / "_proc").rglob("*.ipynb")):
        name = path.relative_to(project / "_proc").as_posix()
        nb = json.loads(path.read_text(encoding="utf-8"))
        found[name] = nb, str(PurePosixPath(name).parent / front(nb).get("output-file", PurePosixPath(name).with_suffix(".html").name))
    return found


def front(nb):
    """The front matter that processing put into the first cell."""
    source = "".join(nb["cells"][0]["source"])
    return yaml.safe_load(source.strip().strip("-")) if nb["cells"][0]["cell_type"] == "raw" else {}


def anchors(nb):
    """Every place of a page that a link can name: headings, documented objects, explicit ids."""
    text = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown")
    text += "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for c in nb["cells"] for o in c.get("outputs", []))
    slugs = {re.sub(r"[^\w\s.-]", "", re.sub(r"[`*]", "", h)).strip().lower().replace(" ", "-").lstrip("0123456789.-_")
             for h in re.findall(r"^#{1,6}\s+(.*?)(?:\s*\{.*\})?\s*$", text, re.M)}
    return slugs | set(re.findall(r"(?:\{#|id=[\"'])([\w.-]+)", text))


def test_sidebar_lists_every_notebook_once():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    listed = list(sidebar(config["website"]["sidebar"]["contents"]))
    assert sorted(listed) == NOTEBOOKS
    assert listed[0] == "index.ipynb"


def test_pages_hold_only_what_they_can_show_by_themselves(pages):
    """No HTML, no widgets, no saved widget state: Quarto would add scripts from elsewhere; and each caption once.

    Quarto makes no figure of a drawing that stands in the page itself: there the caption that the notebook printed is the only one."""
    for name, (nb, _) in pages.items():
        assert "widgets" not in nb["metadata"], f"{name} carries widget state"
        for cell in nb["cells"]:
            every = [o.get("data", {}) for o in cell.get("outputs", [])]
            drawn = any("".join(data.get("text/markdown", "")).startswith("```{=html}") for data in every)
            for data in every:
                foreign = [k for k in data if k == "text/html" or "widget" in k or "javascript" in k]
                assert not foreign, f"{name} shows {foreign}: {''.join(cell['source'])[:80]}"
                said = "".join(data.get("text/markdown", ""))
                assert drawn or not said or f'"{said[1:-1]}"' not in "".join(cell["source"]), f"{name} says its caption twice: {said[:80]}"


def test_readme_has_a_row_a_notebook():
    """The question it answers, its module, its minutes: as the notebooks say them."""
    rows = re.findall(r"^\| \[(.+?)\]\(nbs/(.+?\.ipynb)\) \| (.+?\?) \| `(.+?)` \| (\d+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    taught = [n for n in NOTEBOOKS if n.removesuffix(".ipynb") not in ("index", "how_to_read", "glossary")]
    assert sorted(path for _, path, *_ in rows) == taught
    for title, path, _, module, minutes in rows:
        cells = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))["cells"]
        head = "\n".join("".join(c["source"]) for c in cells[:3])
        assert head.startswith(f"# {title}\n") and f"Reading: {minutes} minutes" in head, path
        assert module == "lsbook." + re.sub(r"(^|/)\d+_", r"\1", path.removesuffix(".ipynb")).replace("/", ".")


def cells_of(name):
    return ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]]


def test_breadcrumbs_follow_the_sidebar():
    """The first line under a title: the section, the place in its room, and the notebooks before and after, by their titles and links."""
    entries = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    order = [(e["section"], name) for e in entries if "section" in e for name in e["contents"]]
    title = {name: cells_of(name)[0].splitlines()[0].removeprefix("# ") for _, name in order}
    wrong = []
    for i, (section, name) in enumerate(order):
        crumb, folder = cells_of(name)[1].splitlines()[0], str(PurePosixPath(name).parent)
        room = [n for s, n in order if s == section and str(PurePosixPath(n).parent) == folder]
        counted = section not in ("Toolbox", "Studio") and folder != "." and len(room) > 1 or folder == "data"
        place = re.escape(section) + (rf"[\w ·]*, {room.index(name) + 1} of {len(room)}" if counted else r"[\w ·]*")
        if not re.match(rf"\*{place} · before: ", crumb) or not crumb.endswith("*"):
            wrong.append(f"{name}: {crumb!r} does not begin with {place}")
        for word, j in (("before", i - 1), ("next", i + 1)):
            if 0 <= j < len(order):
                link = f"{word}: [{title[order[j][1]]}]({posixpath.relpath(order[j][1], folder)})"
                wrong += [f"{name}: {crumb!r} lacks {link}"] if link not in crumb else []
    assert not wrong, "\n".join(wrong)


def test_glossary_is_linked_from_the_book():
    """Every word is linked from a notebook, and every link names a word, to the letter."""
    words = re.findall(r"^### (\S+)$", "\n".join(cells_of("glossary.ipynb")), re.M)
    links = [(link, name) for name in NOTEBOOKS if name != "glossary.ipynb" for text in cells_of(name)
             for link in re.findall(r"\]\([./]*glossary\.ipynb#([^)]*)\)", text)]
    assert words == sorted(set(words))
    assert not (lost := [pair for pair in links if pair[0] not in words]), f"{lost} are no headings of the glossary"
    assert not (bare := set(words) - {link for link, _ in links}), f"no notebook links to {bare} of the glossary"


def test_configuration_is_found_from_both_folders(project):
    for folder in (project / "nbs", project / "_proc"):
        config = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
        assert config == {"metadata-files": ["nbdev.yml", "../_quarto.yml"]}
        assert all((folder / f).is_file() for f in config["metadata-files"])
    site = yaml.safe_load((project / "_quarto.yml").read_text(encoding="utf-8"))
    assert site["format"]["html"]["html-math-method"] == "mathml", "formulas are shown without a script from elsewhere"
    assert (project / "_proc" / site["format"]["html"]["css"]).is_file()
    assert "://" not in json.dumps(site["format"]), "a page loads nothing from another host"


def test_pages_are_processed_without_errors(project, pages):
    assert sorted(pages) == NOTEBOOKS
    said = (project / "process.log").read_text()
    assert "Error" not in said, said[-4000:]
    for name, (nb, _) in pages.items():
        errors = [o for c in nb["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert not errors, f"{name} would be published with {errors[0].get('ename')}: {errors[0].get('evalue')}"


def test_pages_have_a_title_and_a_summary(pages):
    bare = [name for name, (nb, _) in pages.items() if not (front(nb).get("title") and front(nb).get("description"))]
    assert not bare, f"{bare} have no '# Title' and '> summary' for the page's head"


def test_links_lead_somewhere(pages, project):
    lost = [f"{name}: {why}" for name, (nb, _) in pages.items() for why in lost_links(name, nb, pages, project / "_proc")]
    assert not lost, "\n".join(lost)


def lost_links(name, nb, pages, folder):
    by_page = {page: notebook for notebook, (_, page) in pages.items()}
    for source in ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"]:
        for link in ("".join(groups) for groups in LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "_", source, flags=re.S))):
            if re.match(r"(https?|mailto|data|attachment):", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            # Quarto reads a leading "/" as the root of the site, wherever that is
            base = PurePosixPath() if path.startswith("/") else PurePosixPath(name).parent
            target = normal(base / path.lstrip("/")) if path else name
            notebook = by_page.get(target, target)
            if notebook in pages:
                # a private name has no heading of its own: its link leads to the page
                if anchor and anchor[0] != "_" and anchor.lower() not in anchors(pages[notebook][0]):
                    yield f"{link}: no such place in {notebook}"
            elif not (folder / target).is_file():
                yield f"{link}: no such file"


def normal(path):
    parts = []
    for part in path.parts:
        if part == "..":
            parts.pop() if parts else parts.append("..")
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not on PATH; the pages are processed but not rendered")
def test_rendered_site(project, pages):
    done = subprocess.run(["quarto", "render", "--no-cache"], cwd=project / "_proc", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    out = project / "_proc" / "_docs"
    assert (out / "index.html").is_file()
    for name, (_, page) in pages.items():
        html = (out / page).read_text(encoding="utf-8")
        assert "Traceback (most recent call last)" not in html, f"{page} shows an error"
        scripts = re.findall(r"<(?:script|link)[^>]+(?:src|href)=[\"'](https?://[^\"']+)[^>]*>", html)
        if "application/vnd.jupyter.widget" not in html:
            assert not scripts, f"{page} loads {scripts}"
