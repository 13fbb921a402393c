"""The promises about speed and memory, at the papers' sizes, measured by the command line itself: ratios taken in one run."""
import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    subprocess.run([sys.executable, "-W", "ignore", "-m", "lsbook.cli", "bench", "--json", str(path)], check=True, stdout=subprocess.DEVNULL)
    return {r["name"]: r for r in json.loads(path.read_text())}


def test_lseg(rows):
    assert rows["lseg/5-new-labels"]["ratio"] >= 20
    assert rows["lseg/150-new-labels"]["ratio"] >= 5
    assert rows["lseg/text-length"]["ratio"] >= 5
    assert rows["lseg/1000-labels-memory"]["ours"] < 400e6 < rows["lseg/1000-labels-memory"]["other"]


def test_step(rows):
    assert rows["step/text-attention"]["ratio"] >= 10
    assert rows["step/folds-time"]["ratio"] >= 1 / 1.25      # K = 5 takes at most 1.25 times what K = 1 takes
    assert rows["step/folds-memory"]["ratio"] >= 1 / 1.3
