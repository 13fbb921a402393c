"""What every test file shares: one thread a worker, no network, a scratch copy of the project, the optional real data."""
import os

# Before torch is imported anywhere: two workers of one thread each fill two cores, more threads only get in the way.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def data_folder():
    """The optional real photographs: the folder `LSBOOK_DATA` names, else `shared/data` beside the repository."""
    return Path(os.environ.get("LSBOOK_DATA") or ROOT.parent / "shared" / "data").resolve()


def kernel_env():
    """The environment of a notebook kernel: inline pictures, and the real data where it is, seen from any folder."""
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    if data_folder().is_dir():
        env["LSBOOK_DATA"] = str(data_folder())
    return env


def copy_project(to):
    """A scratch copy of what is kept in git (no environment, no build output), for tests that write."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints", ".last_checked", "nbdev.yml")
    to.mkdir(parents=True, exist_ok=True)
    for name in ("nbs", "lsbook"):
        shutil.copytree(ROOT / name, to / name, ignore=skip)
    for name in ("settings.ini", "setup.py", "README.md", "LICENSE", "_quarto.yml"):
        shutil.copy2(ROOT / name, to / name)
    return to


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` skip, saying why, on a machine without a GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch
        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here; .ci/gpu runs it on a machine with one"))


@pytest.fixture(scope="session")
def real_data():
    """The folder with CamVid, VOC, COCO and RefCOCO samples, or a skip that says why."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LSBOOK_DATA to the folder that holds camvid/, voc/, refcoco/")
    return folder
