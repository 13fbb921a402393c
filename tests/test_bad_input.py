"""Whatever comes in: the right result at its own size, or an error naming argument, what came and what is wanted."""
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import Finder, LABELS, methods, noise, Toy, toy, ToyConfig  # noqa: F401 (fixtures)

from lsbook import segmenter as S

RGB = Image.fromarray(noise(30, 40))


# --- words ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, error, says", [
    ([], ValueError, "empty"), ((), ValueError, "empty"), ("sky, road", TypeError, "did you mean"),
    ("", TypeError, "list"), (None, TypeError, "NoneType"), ({"sky", "road"}, TypeError, "set"), (3, TypeError, "int"),
    ([3], TypeError, r"\[0\].*int"), (["sky", None], TypeError, r"\[1\]"), ([b"sky"], TypeError, "bytes"),
    ([["sky"]], TypeError, "list"), (["sky", ""], ValueError, r"\[1\].*blank"), (["  \t\n"], ValueError, "blank"),
    (["\u200b\u00a0"], ValueError, "blank"), (["\x00"], ValueError, "blank"),
    (["sky", "sky"], ValueError, "got 'sky' twice"), (["Sky", " sky "], ValueError, "twice"),
    (["x" * 1_001], ValueError, "1,001 characters.*1,000"), ((s for s in "ab"), TypeError, "generator"),
    (np.array(["sky"]), TypeError, "ndarray"),
])
def test_bad_labels(toy, labels, error, says):  # noqa: F811
    with pytest.raises(error, match=f"^labels.*{says}") as caught:
        toy.segment(RGB, labels)
    assert len(str(caught.value)) < 300
    assert not toy.passes                                               # refused before the network is asked


@pytest.mark.parametrize("labels", [["x" * 1000], ["草"], ["C++", "c"], ["7"], ("a", "b"), ["a\nb"], [" sky "]])
def test_odd_labels_that_are_fine(toy, labels):  # noqa: F811
    result = toy.segment(RGB, labels)
    assert result.labels == [s.strip() for s in labels]
    with pytest.raises(ValueError, match="^label: got 'nothing'; wanted one of"):
        result.mask_of("nothing")
    with pytest.raises(ValueError, match="^label"):
        result.mask_of(3)


@pytest.mark.parametrize("expression, error, says", [
    ("", ValueError, "blank"), (" \n", ValueError, "blank"), ([], ValueError, "empty"), (None, TypeError, "NoneType"),
    (["a", ""], ValueError, r"\[1\].*blank"), ([3], TypeError, r"\[0\]"), (b"red", TypeError, "bytes"),
    ("x" * 20_001, ValueError, "20,001 characters.*20,000"), ({"a": 1}, TypeError, "dict"),
])
def test_bad_expressions(expression, error, says):
    finder = Finder(ToyConfig(1))
    with pytest.raises(error, match=f"(?s)^expression.*{says}"):
        finder.segment(RGB, expression)
    assert not finder.passes


def test_odd_expressions_that_are_fine():
    finder = Finder(ToyConfig(1))
    assert finder.segment(RGB, "red " * 500).mask.shape == (30, 40)     # cutting it is for the text encoder
    assert finder.segment(RGB, "x" * 20_000).mask.shape == (30, 40)
    results = finder.segment([noise(1, 1), noise(5, 90), noise(90, 5)], "red")
    assert [r.mask.shape for r in results] == [(1, 1), (5, 90), (90, 5)]
    assert len(finder.segment(RGB, ["red", "green"])) == 2


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", None, True])
def test_bad_batch_sizes(toy, size):  # noqa: F811
    with pytest.raises(ValueError, match="^batch_size: got"):
        toy.segment(RGB, LABELS, batch_size=size)


# --- models on disk -------------------------------------------------------------------------------------------------

@pytest.fixture
def saved(toy, tmp_path):  # noqa: F811
    return S.save_weights(toy, tmp_path / "toy.safetensors")


class Trap:
    "Reading its pickle creates a file"
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def trap_zip(path, target):
    torch.save({"weight": torch.zeros(2), "trap": Trap(target)}, path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "model.pkl", "MODEL.PT",
                                  "toy.safetensors", "model.safetensors"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_never_read(tmp_path, name, zipped):
    target, path = tmp_path / "it ran", tmp_path / "m" / name
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(Trap(target)))
    if zipped:
        trap_zip(path, target)
    for beside in ("toy.json", "config.json"):
        path.with_name(beside).write_text(json.dumps({"method": "toy", "config": {"width": 8}}))
    for ask in (path, str(path), path.parent):
        with pytest.raises((ValueError, FileNotFoundError), match="^name: .*(A pickle.*safetensors.torch.save_file|it asks for pathlib.Path.touch)"):
            S.load(ask)
        with pytest.raises((ValueError, FileNotFoundError)):
            Toy.from_pretrained(ask)
    assert not target.exists()
    pickle.loads(pickle.dumps(Trap(target)))
    assert target.exists()                                              # it would have


def test_a_hub_repository_of_pickles_is_refused(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    class Missing(EntryNotFoundError):
        def __init__(self):
            Exception.__init__(self, "404")

    def download(repo, name, **kw):
        raise Missing if name == "model.safetensors" else AssertionError(f"{name} was asked for")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match="me/toy.*lacks model.safetensors.*A pickle"):
        S.load("me/toy")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="^name: .*toy.safetensors.*cut short"):
        S.load(saved)


def edit(saved, change):
    from safetensors.torch import load_file, save_file
    state = load_file(saved)
    change(state)
    save_file(state, saved)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("norm.weight"), "1 missing: norm.weight"),
    (lambda s: s.update({"head.weight": torch.zeros(1)}), "1 unexpected: head.weight"),
    (lambda s: s.update({"norm.bias": torch.zeros(9)}), r"of another shape: norm.bias \(9,\) for \(8,\)"),
    (lambda s: s.update({"count": torch.tensor(1.5)}), "of another type: count torch.float32 for torch.int64"),
    (lambda s: s.update({"norm.bias": torch.full((8,), float("nan"))}), "1 with NaN: norm.bias"),
    (lambda s: [s.pop(k) for k in list(s)[1:]], "6 missing: conv.bias, conv.weight, norm.bias, norm.running_mean, norm.running_var and 1 more"),
])
def test_tensors_that_do_not_fit(saved, change, says):
    edit(saved, change)
    with pytest.raises(ValueError, match=f"^name: .*toy.safetensors.*do not fit Toy; .*{says}"):
        S.load(saved)


def metadata(saved, **change):
    path = saved.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("change, says", [
    (dict(method="stranger"), "'stranger'.*wanted one of .*lseg"), (dict(method="os:system"), "os:system"),
    (dict(method="tpy"), "did you mean 'toy'"),
    (dict(method=["toy"]), "method"),
    (dict(method=None), "None"), (dict(config=None), "no metadata"), (dict(config=[1]), "no metadata"),
    (dict(config={"width": 8, "depth": 3}), "got the field 'depth'; wanted one of long_side, note, rate, sizes, width"),
    (dict(config={"width": 8, "long_syde": 3}), "'long_syde'.*did you mean 'long_side'"),
    (dict(config={"long_side": 8}), "width"), (dict(config={"width": 8, "rate": "fast"}), "config.rate: got 'fast'; wanted float"),
    (dict(config={"width": 8, "sizes": 3}), "config.sizes: got 3; wanted tuple"),
    (dict(config={"width": "wide"}), "config.width: got 'wide'; wanted int"), (dict(config={"width": 4}), "of another shape"),
    (dict(config={"width": -1}), "-1"),
    (dict(method="finder", config={"width": 8}), "weights of 'toy'.*wanted those of 'finder'"),
])
def test_metadata_are_not_trusted(saved, change, says):
    metadata(saved, **change)
    with pytest.raises(ValueError, match=f"^name: .*{says}"):
        S.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "\ufeff{}", "[" * 100_000, '{"method": "toy"}'])
def test_metadata_that_are_none(saved, text):
    saved.with_suffix(".json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="^name: .*(toy.json.*not JSON|no metadata.*toy.json)"):
        S.load(saved)


def test_metadata_in_another_encoding(saved):
    saved.with_suffix(".json").write_bytes(b'{"method": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        S.load(saved)


def test_weights_of_another_method(saved):
    saved.with_suffix(".json").write_text(json.dumps({"method": "finder", "config": {"width": 1}}))
    with pytest.raises(ValueError, match="^name: .*weights of 'toy'.*wanted those of 'finder'"):
        S.load(saved)


@pytest.mark.parametrize("name, error, says", [
    ("nothing", FileNotFoundError, "no folder or file here; wanted one of .*lseg.*owner/name"),
    ("lsegg", FileNotFoundError, "did you mean 'lseg'"),
    ("./nothing", FileNotFoundError, "no folder or file"), ("/no/such/folder", FileNotFoundError, "no folder or file"),
    ("toy.safetensors", FileNotFoundError, "no file"), ("a/b/c", FileNotFoundError, "no folder or file"),
    ("", FileNotFoundError, "without a .safetensors file"), ("toy", FileNotFoundError, "ships no weights"),
    (None, TypeError, "NoneType"), (3, TypeError, "int"), (b"lseg", TypeError, "bytes"),
    ("me/not-there", FileNotFoundError, "me/not-there.*the hub did not give it"),
])
def test_names_that_lead_nowhere(tmp_path, monkeypatch, name, error, says):
    monkeypatch.chdir(tmp_path)
    kw = {"local_files_only": True, "cache_dir": tmp_path} if name == "me/not-there" else {}
    with pytest.raises(error, match=f"(?s)^name: .*{says}"):
        S.load(name, **kw)


def test_folders(saved, toy, tmp_path):  # noqa: F811
    assert S.load(tmp_path).config == toy.config
    S.save_weights(toy, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="second.safetensors, toy.safetensors; wanted one"):
        S.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="without a .safetensors file"):
        S.load(tmp_path / "empty")
    saved.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="no metadata .*toy.json"):
        S.load(saved)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no .safetensors file"):
        S.load(tmp_path / "notes.txt")


def test_saving_says_what_is_wrong(toy, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="^path: .*wanted an ending .safetensors"):
        S.save_weights(toy, tmp_path / "toy.pt")
    with pytest.raises(ValueError, match="^metadata: got 'config'.*from the model itself"):
        S.save_weights(toy, tmp_path / "toy.safetensors", config={})
    with pytest.raises(TypeError):
        S.save_weights(toy, tmp_path / "toy.safetensors", metrics={"f": open})
    assert list(tmp_path.iterdir()) == []                               # nothing half written
