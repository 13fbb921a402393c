"""The promises about memory and equal results, at the papers' sizes. Those about time depend on what else the machine does: `lsbook bench --check`."""
import pytest

from lsbook.studio.speed import BENCHES


@pytest.mark.parametrize("name", [name for name, row in BENCHES.items() if row.unit == "bytes"])
def test_memory(name):
    ours, other = BENCHES[name].run()
    assert BENCHES[name].kept(ours, other), f"{name}: ours {ours / 1e6:.0f} MB, other {other / 1e6:.0f} MB"


def test_every_row_promises_something():
    assert all(row.least > 0 or row.most < float("inf") for row in BENCHES.values())
