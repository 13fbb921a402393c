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
    const prompts = [...panel.querySelectorAll('.jp-InputPrompt')].map(p => p.textContent);
    const status = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return {kernel: status ? status.dataset.status : null,
            waiting: prompts.filter(p => p.includes('*')).length, done: prompts.filter(p => /\\d/.test(p)).length,
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


def wait_for(page, question, wanted, seconds=60):
    """Asks the page again and again, until the answer is as wanted; gives the answer."""
    deadline = time.time() + seconds
    while not wanted(answer := page.evaluate(question)):
        assert time.time() < deadline, f"after {seconds} s the page still answers {json.dumps(answer)[:2000]}"
        page.wait_for_timeout(200)
    return answer


def wait_until_idle(page):
    """Nothing runs or waits, three times in a row, as a kernel is idle for a moment between two cells."""
    for _ in range(3):
        state = wait_for(page, STATE, lambda s: s["kernel"] == "idle" and s["done"] and not s["waiting"])
        page.wait_for_timeout(200)
    assert not state["errors"], "\n".join(state["errors"])


def run_all_cells(page):
    """Run > Run All Cells, asked again where the page was drawn but its kernel was not listening yet."""
    from playwright.sync_api import TimeoutError
    deadline = time.time() + 120
    while time.time() < deadline:
        page.wait_for_timeout(500)
        for dialog in page.locator(".jp-Dialog").all():  # "Select Kernel", where the page came before the list of kernels
            dialog.locator(".jp-mod-accept").click()
        if (state := page.evaluate(STATE))["kernel"] != "idle":
            continue
        try:
            page.click(".lm-MenuBar-itemLabel:text-is('Run')", timeout=5_000)
            page.click(".lm-Menu-itemLabel:text-is('Run All Cells')", timeout=5_000)
        except TimeoutError:
            continue
        for _ in range(10):
            page.wait_for_timeout(200)
            state = page.evaluate(STATE)
            if state["waiting"] or state["done"]:
                return
    pytest.fail(f"'Run All Cells' starts nothing: {state}")


def test_landing_notebook_runs_and_answers_to_new_labels(page):
    run_all_cells(page)
    wait_until_idle(page)

    # the field says "labels" beside it, or inside it while it is empty
    label = page.locator(".widget-text", has=page.locator(".widget-label", has_text="labels")).locator("input")
    field = label.or_(page.locator(".widget-text input[placeholder*='labels']")).first
    field.scroll_into_view_if_needed()
    assert field.input_value() != LABELS
    before = wait_for(page, PICTURES, len)
    field.fill(LABELS)
    field.press("Enter")
    wait_for(page, PICTURES, lambda now: len(now) == len(before) and now != before)
    wait_until_idle(page)
    if folder := os.environ.get("LSBOOK_SCREENSHOTS"):
        page.screenshot(path=os.path.join(folder, "landing.png"))
