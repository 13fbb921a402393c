"""The promises about speed and memory, at the paper's size, measured by the command line itself: ratios taken in one run."""
import json
import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc")
def test_bench_lseg(tmp_path):
    subprocess.run([sys.executable, "-m", "lsbook.cli", "bench", "lseg", "--json", str(tmp_path / "bench.json")], check=True, stdout=subprocess.DEVNULL)
    rows = {r["name"]: r for r in json.loads((tmp_path / "bench.json").read_text())}
    assert rows["lseg/5-new-labels"]["ratio"] >= 20
    assert rows["lseg/150-new-labels"]["ratio"] >= 5
    assert rows["lseg/text-length"]["ratio"] >= 5
    assert rows["lseg/1000-labels-memory"]["ours"] < 400e6 < rows["lseg/1000-labels-memory"]["other"]
