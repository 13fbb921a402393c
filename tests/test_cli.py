"The commands, called as a script would call them: exit codes, what is written, and one line for an error."
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsbook import cli, doctor, scenes, segmenter, training
from lsbook.segmenter import load, save_weights
from lsbook.training import Recipe
from test_training import Tiny, tiny


def small_rows(root=None): return scenes.rows("semantic", 12), scenes.rows("semantic", 4, split="valid")


RECIPE = Recipe("tiny", rows=small_rows, steps=4, batch_size=4, lr=1e-2, eval_every=2)


@pytest.fixture
def method(monkeypatch, tmp_path):
    "A method called tiny, with a recipe, in an empty folder"
    monkeypatch.setitem(segmenter.METHODS, "tiny", segmenter.Method("test_training:Tiny", "Tiny", "semantic", "", "", ""))
    monkeypatch.setattr(training, "recipe", lambda m, s="scenes": RECIPE if m == "tiny" else {}[m])
    monkeypatch.chdir(tmp_path)
    save_weights(tiny(), tmp_path / "tiny.safetensors")
    Image.fromarray(scenes.scene(0).image).save(tmp_path / "scene.png")
    return tmp_path


def test_segment_writes_picture_and_label_map(method, capsys):
    assert cli.main(["segment", "tiny", "scene.png", "grass, red circle,sand", "-o", "found.png", "--weights", "tiny.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "found.png" in said and "found_labels.png" in said and re.search(r"red circle +\d+\.\d%", said)
    assert sum(float(x) for x in re.findall(r"([\d.]+)%", said)) == pytest.approx(100, abs=.2)
    labels = Image.open("found_labels.png")
    expected = load("tiny.safetensors").segment("scene.png", ["grass", "red circle", "sand"]).label_map
    assert np.array_equal(np.asarray(labels), expected) and json.loads(labels.text["labels"]) == ["grass", "red circle", "sand"]
    assert Image.open("found.png").width >= 64


@pytest.mark.parametrize("args, words", [
    (["segment", "nope", "scene.png", "a"], "method: got 'nope'; wanted one of"),
    (["segment", "tiny", "none.png", "grass", "--weights", "tiny.safetensors"], "none.png"),
    (["segment", "tiny", "broken.png", "grass", "--weights", "tiny.safetensors"], "broken.png"),
    (["segment", "tiny", "scene.png", "grass,,sand", "--weights", "tiny.safetensors"], "blank"),
    (["segment", "tiny", "scene.png", "", "--weights", "tiny.safetensors"], "blank"),
    (["segment", "tiny", "scene.png", "grass,grass", "--weights", "tiny.safetensors"], "twice"),
    (["segment", "tiny", "scene.png", "grass", "--weights", "none.safetensors"], "none.safetensors"),
    (["segment", "tiny", "scene.png", "grass", "--weights", "pickled.ckpt"], "pickled"),
    (["segment", "tiny", "scene.png", "grass", "--weights", "tiny.safetensors", "-o", "no/such/out.png"], "wanted a folder that exists"),
    (["segment", "tiny", "scene.png", "grass", "--weights", "tiny.safetensors", "-o", "out.txt"], "out.txt"),
    (["segment", "lseg", "scene.png", "grass", "--weights", "tiny.safetensors"], "got weights of 'tiny' in tiny.safetensors; wanted 'lseg'"),
    (["segment", "tiny", "scene.png", "grass", "--out", "./scene.png"], "the picture itself"),
    (["train", "tiny", "--out", "scene.png"], "scene.png"),
])
def test_errors_are_one_line_and_exit_code_2(method, capsys, args, words):
    Path("broken.png").write_bytes(Path("scene.png").read_bytes()[:200])
    Path("pickled.ckpt").write_bytes(b"\x80\x04.")
    assert cli.main(args) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith(f"lsbook {args[0]}: ") and words in said.err
    assert "Traceback" not in said.err


def test_debug_shows_the_error_itself(method):
    with pytest.raises(FileNotFoundError): cli.main(["--debug", "segment", "tiny", "none.png", "grass", "--weights", "tiny.safetensors"])


@pytest.mark.parametrize("args", [[], ["nope"], ["train", "lseg"], ["train", "lseg", "--out", "x", "--steps", "0"],
                                  ["train", "lseg", "--out", "x", "--steps", "few"], ["evaluate", "lseg", "--split", "all"]])
def test_wrong_usage(args, capsys):
    with pytest.raises(SystemExit) as e: cli.main(args)
    assert e.value.code == 2 and "usage: lsbook" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], *([c, "--help"] for c in ("doctor", "segment", "train", "evaluate", "bench"))])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as e: cli.main(args)
    assert e.value.code == 0 and len(capsys.readouterr().out) > 100


def test_train_writes_weights_and_card(method, capsys):
    assert cli.main(["train", "tiny", "--out", "run", "--steps", "2", "--seed", "3"]) == 0
    metadata = json.loads(Path("run/tiny.json").read_text())
    assert metadata["method"] == "tiny" and metadata["seed"] == 3 == metadata["recipe"]["seed"] and metadata["recipe"]["steps"] == 2
    assert metadata["command"] == "lsbook train tiny --out run --steps 2 --seed 3" and {"torch", "device", "processes"} <= set(metadata["versions"])
    model = load("run")
    assert isinstance(model, Tiny)
    rows = cli.importlib.import_module("lsbook.scenes").rows("semantic", 500, split="test")           # the scale is "scenes"
    assert metadata["measured_on"] == "500 test scenes"
    assert metadata["metrics"]["mIoU"] == pytest.approx(cli.importlib.import_module("lsbook.metrics").evaluate(model, rows)["mIoU"], rel=1e-3)
    assert cli.main(["train", "tiny", "--out", "run", "--steps", "2", "--seed", "3"]) == 2          # a run is there already
    assert "add --resume" in capsys.readouterr().err
    assert cli.main(["train", "tiny", "--out", "run", "--steps", "4", "--seed", "3", "--resume"]) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert json.loads(Path("run/tiny.json").read_text())["recipe"]["steps"] == 4


def test_same_command_same_weights(method):
    for out in "ab": assert cli.main(["train", "tiny", "--out", out]) == 0
    a, b = (load(out).state_dict() for out in "ab")
    assert all((a[k] == b[k]).all() for k in a)


def test_not_finite_and_interrupted(method, monkeypatch, capsys):
    def raising(error):
        def fit(*args, **kw): raise error
        return fit
    monkeypatch.setattr(training.runs, "fit", raising(FloatingPointError("the loss is not a finite number at step 7")))
    assert cli.main(["train", "tiny", "--out", "x"]) == 1 and "at step 7" in capsys.readouterr().err
    monkeypatch.setattr(training.runs, "fit", raising(KeyboardInterrupt(
        "interrupted after step 7; checkpoint saved: fit(..., out='x', resume=True) goes on from there")))
    assert cli.main(["train", "tiny", "--out", "x"]) == 130
    said = capsys.readouterr().err
    assert "after step 7" in said and "the same command with --resume goes on" in said and "fit(" not in said


def test_evaluate(method, capsys):
    assert cli.main(["evaluate", "tiny", "--weights", "tiny.safetensors", "--n", "6", "--json", "got.json"]) == 0
    got = json.loads(Path("got.json").read_text())       # strict JSON: labels that no scene has are null, not NaN
    assert 0 <= got["metrics"]["mIoU"] <= 1 and None in got["metrics"].values()
    said = capsys.readouterr().out
    assert "mIoU" in said and "IoU/grass" not in said and "got.json" in said


def test_evaluate_on_the_rows_of_a_recipe(method, capsys):
    assert cli.main(["evaluate", "tiny", "--weights", "tiny.safetensors", "--scale", "scenes", "--n", "4"]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_evaluate_names_the_scales_there_are(capsys):
    assert cli.main(["evaluate", "lseg", "--scale", "nowhere"]) == 2 and "camvid" in capsys.readouterr().err


def test_kinds_of_scenes_are_named(capsys):
    with pytest.raises(SystemExit) as stopped: cli.main(["evaluate", "lseg", "--objects", "cats"])
    assert stopped.value.code == 2 and "plain" in capsys.readouterr().err


def test_bench(method, monkeypatch, capsys):
    from lsbook.studio import speed
    monkeypatch.setattr(speed, "BENCHES", {"tiny/a": speed.Bench(lambda: (1., 20.), "the slow way", least=20),
                                           "tiny/b": speed.Bench(lambda: (2e6, 3e6), "all at once", "bytes", most=1e6),
                                           "other/c": speed.Bench(lambda: (1, 1), "itself")})
    assert cli.main(["bench", "tiny", "--json", "rows.json"]) == 0
    rows = json.loads(Path("rows.json").read_text())
    assert [(r["name"], r["ours"], r["other"], r["ratio"], r["kept"]) for r in rows] == [
        ("tiny/a", 1., 20., 20., True), ("tiny/b", 2e6, 3e6, 1.5, False)]
    said = capsys.readouterr().out
    assert "the slow way" in said and "1 s" in said and "2 MB" in said and said.count("FALLS SHORT") == 1
    assert cli.main(["bench", "nope"]) == 2 and "wanted one of tiny, other" in capsys.readouterr().err
    assert cli.main(["bench", "tiny", "--check"]) == 1 and cli.main(["bench", "other", "--check"]) == 0


def test_help_of_train_lists_what_can_be_trained(capsys):
    with pytest.raises(SystemExit): cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "lseg: --scale scenes" in said and "folds=" in said and "--scale scenes | paper" in said


def test_doctor(method, monkeypatch, capsys):
    monkeypatch.setattr(segmenter, "METHODS", {"tiny": segmenter.METHODS["tiny"]})
    monkeypatch.setattr(doctor, "needs", lambda: ["torch", "fastcore<1", "no-such-thing>=3", "tomli; python_version < '3.0'"])
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "OK   torch" in said and "FAIL fastcore" in said and 'pip install "fastcore<1"' in said and "FAIL no-such-thing" in said
    assert "OK   tomli" in said and "FAIL weights tiny" in said and "lsbook train tiny" in said
    assert all(re.search(f"OK +{word}", said) for word in ("device", "torch, -vision", "cores", "memory", "cache"))
    monkeypatch.setattr(doctor, "needs", lambda: ["torch"])
    monkeypatch.setattr(segmenter, "METHODS", {})
    assert cli.main(["doctor"]) == 0 and "all is well" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "needs", lambda: [])
    assert cli.main(["doctor"]) == 1 and "pip install -e ." in capsys.readouterr().out


def test_the_installed_command_and_the_module_are_the_same():
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    got = subprocess.run([sys.executable, "-m", "lsbook.cli", "segment", "nope", "a", "b"], env=env, capture_output=True, text=True)
    assert got.returncode == 2 and got.stderr.startswith("lsbook segment: method: got 'nope'") and got.stderr.count("\n") == 1


def test_help_is_quick():
    "Nothing heavy is imported before a command needs it"
    code = "import sys, lsbook.cli; lsbook.cli.parser(); print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "[]"


def test_set_changes_the_config(method, capsys):
    assert cli.main(["train", "tiny", "--out", "run", "--steps", "2", "--set", "nonsense"]) == 2
    assert "FIELD=VALUE" in capsys.readouterr().err
    assert cli.main(["train", "tiny", "--out", "run", "--steps", "2", "--set", "colour=red"]) == 2
    assert "colour" in capsys.readouterr().err
