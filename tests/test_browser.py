"""JupyterLab in a real browser: the landing notebook runs from top to bottom, and new labels change its picture.

Needs Chromium (Debian: `apt-get install chromium`); skips, saying so, where there is none.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT, copy_project, kernel_env

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
NOTEBOOK = os.environ.get("LSBOOK_BROWSER_NOTEBOOK", "index.ipynb")
TOKEN, LABELS = "lsbook-test", "sand, red circle, blue square"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

# What the page shows, read in one go: the state of the kernel, cells still running or waiting, and errors among the outputs.
STATE = """() => {
    const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
    const status = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return {kernel: status ? status.dataset.status : null,
            waiting: [...panel.querySelectorAll('.jp-InputPrompt')].filter(p => p.textContent.includes('*')).length,
            errors: [...panel.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"], ' +
                     '[data-mime-type="application/vnd.jupyter.stderr"]')].map(e => e.innerText)};
}"""
# Every picture among the outputs, in order: the source of an image, or the pixels of a canvas.
PICTURES = """() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-OutputArea-output :is(img, canvas)')]
    .map(e => e.toDataURL ? e.toDataURL() : e.src)"""


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """A JupyterLab on a scratch copy of the notebooks; gives its address."""
    if not CHROMIUM:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    pytest.importorskip("playwright", reason="playwright is not installed (pip install playwright)")
    if not (ROOT / "nbs" / NOTEBOOK).is_file() and not os.path.isabs(NOTEBOOK):
        pytest.fail(f"nbs/{NOTEBOOK} is missing")
    home = tmp_path_factory.mktemp("browser")
    project = copy_project(home / "lsbook")
    if os.path.isabs(NOTEBOOK):
        shutil.copy(NOTEBOOK, project / "nbs")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = kernel_env() | {name: str(home / name.lower()) for name in
                          ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    tracker = home / "jupyterlab_settings_dir" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # every cell is in the page, also where one has to scroll to it
    with open(home / "jupyter.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
             "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={project / 'nbs'}",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.time() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.time() < deadline, (home / "jupyter.log").read_text()[-3000:]
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="module")
def page(jupyter, tmp_path_factory):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1800})
        page.set_default_timeout(60_000)
        page.goto(f"{jupyter}/lab/tree/{os.path.basename(NOTEBOOK)}?token={TOKEN}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell")
        yield page
        browser.close()


def wait_until_idle(page, seconds=120):
    """No cell runs or waits, and the kernel is idle: seen twice in a row, as a kernel is idle for a moment between cells."""
    deadline, calm = time.time() + seconds, 0
    while calm < 3:
        state = page.evaluate(STATE)
        calm = calm + 1 if state["kernel"] == "idle" and not state["waiting"] else 0
        assert time.time() < deadline, f"the notebook is still busy: {json.dumps(state)[:2000]}"
        page.wait_for_timeout(250)
    return state


def test_landing_notebook_runs_and_answers_to_new_labels(page):
    page.wait_for_function("() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status == 'idle'")
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
    page.wait_for_function("() => [...document.querySelectorAll('.jp-InputPrompt')].some(p => /\\[[*\\d]+\\]/.test(p.textContent))")
    state = wait_until_idle(page)
    assert not state["errors"], "\n".join(state["errors"])

    field = page.locator(".widget-text", has=page.locator(".widget-label", has_text="labels")).locator("input").first
    if not field.count():
        field = page.locator(".widget-text input[placeholder*='labels']").first
    field.scroll_into_view_if_needed()
    page.wait_for_function(f"() => ({PICTURES})().length > 0")
    before = page.evaluate(PICTURES)
    assert field.input_value() != LABELS
    field.fill(LABELS)
    field.press("Enter")
    page.wait_for_function("before => { const now = (" + PICTURES + ")();"
                           " return now.length == before.length && now.some((p, i) => p != before[i]); }", arg=before)
    state = wait_until_idle(page)
    assert not state["errors"], "\n".join(state["errors"])
    if folder := os.environ.get("LSBOOK_SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, "landing.png"))
