"""Files from strangers: what leads out, runs code, is damaged or does not fit is refused; what is honest is read."""
import collections
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lsbook.files import (
    Inert,
    PickledArray,
    PickledType,
    inside,
    is_path,
    load_tensors,
    named,
    read_json,
    read_pickle,
    read_tensors,
    read_text,
    TensorUnpickler,
    tied,
    write_atomically,
)

def evil(target):
    "A pickle that calls open(target, 'w'): what `pickle.dumps` would never write for data, spelt out in opcodes."
    return b"cbuiltins\nopen\n(V" + str(target).encode() + b"\nVw\ntR."


class Harm:
    "Leaves a file where its pickle is run."
    def __init__(self, path): self.path = path
    def __reduce__(self): return exec, (f"open({str(self.path)!r}, 'w').write('ran')",)


# --- names, text, JSON -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, kind", [
    (ValueError("x"), ValueError), (TypeError("x"), TypeError), (FileNotFoundError("x"), FileNotFoundError),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), ValueError), (json.JSONDecodeError("x", "", 0), ValueError)])
def test_named(error, kind):
    with pytest.raises(kind, match=r"^rows\[3\]: image: .*x") as caught:
        with named("rows[3]"), named("image"): raise error
    assert type(caught.value) is kind and caught.value.__cause__.__cause__ is error


def test_named_leaves_other_errors_alone():
    with pytest.raises(KeyError, match="^'x'$"):
        with named("image"): raise KeyError("x")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/../../a", "..", "..\\a", "C:\\a", "C:a", "\\\\server\\a", "", ".", "a\0b", None, 3, b"a"])
def test_names_that_lead_out(tmp_path, name):
    (tmp_path / "a").write_text("")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="^got the name .* leads out of"): inside(tmp_path / "in", name)


def test_names_below_the_folder(tmp_path):
    (tmp_path / "sub/..hidden").mkdir(parents=True)
    for name in ("a.jpg", "sub/b c.jpg", "sub/..hidden/é.jpg", "sub/[1].jpg"):
        (tmp_path / name).write_text("")
        assert Path(inside(tmp_path, name)) == tmp_path / name and Path(inside(str(tmp_path), name.replace("/", "\\"))).is_file()
    for name in ("sub", "none.jpg", "x" * 300):
        with pytest.raises((ValueError, OSError), match="not in|too long"): inside(tmp_path, name)


def test_text_and_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + '["é\u2028"]'.encode())
    assert read_text(path) == '["é\u2028"]' and read_json(path) == read_json('["é\u2028"]') == ["é\u2028"]
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="^got .*x.json', which is not UTF-8"): read_json(path)
    for text in ("", "{", "{'a': 1}", "[" * 100_000, '{"a": 1', "x.json"):
        with pytest.raises(ValueError, match="^got .*, which is not JSON .*; wanted JSON$") as caught: read_json(text)
        assert len(str(caught.value)) < 300
        path.write_text(text)
        with pytest.raises(ValueError, match="x.json', which is not JSON"): read_json(path)


# --- pickles -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(tmp_path, protocol):
    value = [{"a": (1, 2.5, None, True), "é": ["x", 2**70]}]
    (tmp_path / "p").write_bytes(pickle.dumps(value, protocol))
    assert read_pickle(tmp_path / "p") == value


def test_python_2_text_is_latin_1(tmp_path):
    (tmp_path / "p").write_bytes(b"\x80\x02]q\x00U\x04caf\xe9q\x01a.")
    assert read_pickle(tmp_path / "p") == ["caf\xe9"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    target = tmp_path / "made"
    bad = [evil(target), b"(S'touch " + str(target).encode() + b"'\nios\nsystem\n.",
           b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.", b"\x80\x02\x82\x01.", b"Pname\n.",
           pickle.dumps(np.zeros(2)), pickle.dumps(Path("x"))]
    for b in bad:
        (tmp_path / "p").write_bytes(b)
        with pytest.raises(ValueError, match="wanted plain containers"): read_pickle(tmp_path / "p")
        assert not target.exists()
    pickle.loads(evil(target))
    assert target.exists()  # so the same bytes do harm through the ordinary reader


def test_truncated_and_missing_pickles(tmp_path):
    (tmp_path / "p").write_bytes(pickle.dumps([{"a": 1}])[:-4])
    with pytest.raises(ValueError, match="p.*truncated.*wanted plain containers"): read_pickle(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="q', which is not a file"): read_pickle(tmp_path / "q")


# --- tensors -----------------------------------------------------------------------------------------------------------------

STATE = {"a.weight": torch.arange(6.).reshape(2, 3), "a.bias": torch.ones(2).half(), "count": torch.tensor(7), "b": torch.ones(2, 2).bfloat16().t()}


def same(got, want=STATE):
    return got.keys() == want.keys() and all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)


def test_every_kind_of_tensor_file(tmp_path):
    save_file({k: t.contiguous() for k, t in STATE.items()}, tmp_path / "safetensors")          # the name says nothing, the bytes do
    torch.save(STATE, tmp_path / "plain.safetensors")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(collections.OrderedDict({k: nn.Parameter(t, requires_grad=t.is_floating_point()) for k, t in STATE.items()}), tmp_path / "parameters.pth")
    torch.save({"state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}, "when": Path("x")}, tmp_path / "wrapped.ckpt")
    torch.save({"model": {"state_dict": {f"module.{k}": t for k, t in STATE.items()}}}, tmp_path / "twice.pt")
    torch.save({**STATE, "epoch": 3, 5: torch.ones(1)}, tmp_path / "mixed.pt")
    for f in tmp_path.iterdir():
        got = read_tensors(f)
        assert same(got) and not any(t.requires_grad or isinstance(t, nn.Parameter) for t in got.values()), f
        assert same(read_tensors(str(f), skip=["a."]), {k: t for k, t in STATE.items() if not k.startswith("a.")})


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    for length in (0x80, 0x4b50):                                       # the first bytes of a pickle and of a zip archive
        header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
        (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + header + np.float32(3).tobytes())
        assert read_tensors(tmp_path / "x")["x"].tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8])
def test_rare_types(tmp_path, dtype):
    torch.save({"a": torch.ones(2).to(dtype)}, tmp_path / "a.pt")
    got = read_tensors(tmp_path / "a.pt")["a"]
    assert got.dtype == dtype and got.to(torch.complex64).tolist() == [1, 1]


def test_nothing_pickled_beside_tensors_runs(tmp_path):
    trace = tmp_path / "trace"
    for i, content in enumerate(({"state_dict": {"net.a": torch.ones(2)}, "callbacks": {Harm: 1, "x": Harm(trace)}},
                                 {"state_dict": {"net.a": torch.ones(2), "net.b": Harm(trace)}},
                                 {"net.a": torch.ones(2), "loops": [Harm(trace), {1, 2}, np.float64(3), torch.device("cpu")]})):
        for new in (True, False):
            torch.save(content, tmp_path / f"{i}.ckpt", _use_new_zipfile_serialization=new)
            assert same(read_tensors(tmp_path / f"{i}.ckpt"), {"net.a": torch.ones(2)})
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harm(trace)))
    (tmp_path / "text.ckpt").write_bytes(evil(trace))
    torch.save(Harm(trace), tmp_path / "alone.ckpt")
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.ckpt")
    with tarfile.open(tmp_path / "tar.ckpt", "w") as tar: tar.add(tmp_path / "0.ckpt", "../../storages")
    for name in ("plain", "text", "alone", "script", "tar"):
        with pytest.raises(ValueError, match=f"{name}.ckpt"): read_tensors(tmp_path / f"{name}.ckpt")
    with pytest.raises(ValueError, match="TorchScript, which is code"): read_tensors(tmp_path / "script.ckpt")
    assert not trace.exists()


def test_a_pickle_cannot_write_to_what_it_finds(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.storage\nUntypedStorage\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
                   b"ctorch\nfloat32\n", b"ctorch\nFloatStorage\n", b"ctorch\n_dynamo\n", b"ctorch\nload\n"):
        code = b"\x80\x02" + target + b"(N}X\x05\x00\x00\x00owneds\x86b."                        # BUILD with slots {"owned": None}
        code = b"\x80\x02}(X\x01\x00\x00\x00x" + target + b"N}X\x05\x00\x00\x00ownedNs\x86bu."
        with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
            for n in old.namelist(): new.writestr(n, code if n.endswith("data.pkl") else old.read(n))
        with pytest.raises(ValueError, match="b.pt"): read_tensors(tmp_path / "b.pt")
        for thing in (torch._utils._rebuild_tensor_v2, torch.UntypedStorage, collections.OrderedDict, os.system, torch.float32, torch.FloatStorage, torch.load, Inert):
            assert not hasattr(thing, "owned"), target


def test_looking_up_a_name_imports_nothing():
    names = [n for n in ("_inductor", "_export", "onnx", "_lazy") if f"torch.{n}" not in sys.modules]   # torch would import these by itself
    for name in names: assert TensorUnpickler(io.BytesIO()).find_class("torch", name) is Inert and f"torch.{name}" not in sys.modules
    assert TensorUnpickler(io.BytesIO()).find_class("torch", "load") is Inert


def test_inert_takes_everything():
    thing = TensorUnpickler(io.BytesIO(pickle.dumps([collections.Counter("aab"), collections.deque([1]), Path("x"), np.zeros(2), np.int64(3)]))).load()
    assert len(thing) == 5 and all(isinstance(t, Inert) for t in thing)
    assert Inert(1, a=2)(3) is not None and Inert.append(thing[0], 1) is thing[0]


def test_truncated_missing_and_empty_checkpoints_are_named(tmp_path):
    torch.save({"state_dict": {"net.a": torch.ones(1000)}}, tmp_path / "whole.ckpt")
    data = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(data[:len(data) // 2])
    (tmp_path / "end.ckpt").write_bytes(data[:-30] + bytes(30))                     # a broken table of contents
    torch.save({"a": torch.ones(1000)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "old.ckpt").write_bytes((tmp_path / "old.ckpt").read_bytes()[:-900])
    save_file({"a": torch.ones(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-1])
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    (tmp_path / "nothing.pt").write_bytes(b"")
    for name in ("short.ckpt", "end.ckpt", "old.ckpt", "cut.safetensors", "text.safetensors", "nothing.pt"):
        with pytest.raises(ValueError, match=f"^got .*{name}', which is cut short or no file of tensors"): read_tensors(tmp_path / name)
    for i, thing in enumerate((torch.zeros(2), {}, {"a": 1}, [torch.zeros(1)], {"state_dict": {}}, {"state_dict": 7}, {3: torch.ones(1)})):
        torch.save(thing, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match=f"^got .*{i}.pt', which holds no dictionary of tensors"): read_tensors(tmp_path / f"{i}.pt")
    for name in ("none.pt", "."):
        with pytest.raises(FileNotFoundError, match="no such file"): read_tensors(tmp_path / name)


# --- do they fit? --------------------------------------------------------------------------------------------------------------

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)
        self.out.weight = self.words.weight
        self.register_buffer("yes", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("empty too", torch.zeros(0))


def state_of(model, **changes):
    return {k: t.clone() for k, t in model.state_dict().items()} | {k.replace("__", "."): t for k, t in changes.items()}


def test_what_fits_is_loaded_exactly():
    theirs, ours = Model(), Model()
    nn.init.uniform_(theirs.norm.running_mean)
    state = state_of(theirs)
    assert load_tensors(ours, state) == [] and all(torch.equal(ours.state_dict()[k], t) for k, t in state.items())
    assert load_tensors(ours, {k: t.double() if t.is_floating_point() else t for k, t in state.items()}) == []
    assert ours.out.bias.dtype == torch.float32 and torch.equal(ours.out.bias, theirs.out.bias) and ours.out.weight is ours.words.weight
    assert load_tensors(ours, {**state, "fc.a": torch.ones(1), "head.b": torch.ones(1)}, unused=("fc.", "head.")) == ["fc.a", "head.b"]


@pytest.mark.parametrize("dropped", ["words.weight", "out.weight", "norm.num_batches_tracked"])
def test_one_name_of_tied_tensors_is_enough_and_counters_may_be_missing(dropped):
    theirs, ours = Model(), Model()
    state = state_of(theirs)
    del state[dropped]
    assert load_tensors(ours, state) == [] and torch.equal(ours.words.weight, theirs.words.weight)
    assert load_tensors(nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.ones(3), "bn.num_batches_tracked": torch.tensor(1)}) == []


FAULTS = [(dict(fc__a=torch.ones(1)), "1 unexpected: fc.a"), (dict(out__bias=torch.ones(4)), r"1 of another shape: out.bias \(4,\) for \(3,\)"),
          (dict(out__bias=torch.ones(3, dtype=torch.int64)), "1 of another type: out.bias torch.int64 for torch.float32"),
          (dict(yes=torch.ones(2)), "1 of another type: yes torch.float32 for torch.bool"),
          (dict(out__bias=torch.ones(3, dtype=torch.complex64)), "1 of another type: out.bias torch.complex64 for torch.float32"),
          (dict(out__bias=torch.tensor([0, 0, torch.nan])), "1 with NaN: out.bias"),
          (dict(out__bias=torch.ones(1, 3)), r"1 of another shape: out.bias \(1, 3\) for \(3,\)"),
          ({f"x{i}": torch.ones(1) for i in range(5)}, "5 unexpected: x0, x1, x2, x3, x4"),
          ({f"x{i}": torch.ones(1) for i in range(7)}, "7 unexpected: x0, x1, x2, x3, x4 and 2 more")]


@pytest.mark.parametrize("changes, says", FAULTS)
def test_what_does_not_fit_is_said_and_nothing_is_written(changes, says):
    model = Model()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^got tensors that do not fit Model; .*{says}$"): load_tensors(model, state_of(Model(), **changes))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_is_missing():
    state = {k: t for k, t in state_of(Model()).items() if k not in ("words.weight", "out.weight", "norm.bias")}
    with pytest.raises(ValueError, match="Model; 2 missing: norm.bias, words.weight$"): load_tensors(Model(), state)
    with pytest.raises(ValueError, match="1 unexpected: fcx"): load_tensors(Model(), state_of(Model(), fcx=torch.ones(1)), unused=("fc.",))


def test_tied():
    state = Model().state_dict()
    assert {k: first for k, first in tied(state).items() if k != first} == {"out.weight": "words.weight"}
    a = torch.zeros(4)
    assert len(set(tied({"a": a, "half": a[:2], "other half": a[2:], "as rows": a.view(2, 2), "same": a.view(4)}).values())) == 4


@pytest.mark.parametrize("name, is_one", [("a/b", True), ("a\\b", True), ("a.pt", True), ("a.pth", True), ("a.bin", True), ("a.ckpt", True),
                                          ("a.safetensors", True), ("IMAGENET1K_V2", False), ("openai", False), ("v1.5", False)])
def test_is_path(tmp_path, monkeypatch, name, is_one):
    monkeypatch.chdir(tmp_path)
    assert is_path(name) == is_one
    if not is_one:
        (tmp_path / name).write_text("")
        assert is_path(name) and is_path(tmp_path / name)                           # a file that is there wins


# --- writing -------------------------------------------------------------------------------------------------------------------

def test_write_atomically(tmp_path):
    path = tmp_path / "a.txt"
    assert write_atomically(str(path), lambda p: p.write_text("old")) == path and path.read_text() == "old"

    def crash(part):
        assert part.parent == path.parent and path.read_text() == "old"             # same folder: the rename is one step
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_atomically(path, crash)
    with pytest.raises(OSError): write_atomically(path, lambda part: None)          # nothing was written
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new"


def test_files_and_images_need_no_torch():
    code = "import sys, lsbook.files, lsbook.images; sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pickles_of_arrays_are_read_and_nothing_else_in_them(tmp_path):
    "detectron2 publishes its detectors so: {'model': {name: array}}, read with latin-1."
    arrays = {"a.f": np.arange(6., dtype="f4").reshape(2, 3, order="F"), "a.big": np.array([1, -2], ">i8"), "a.half": np.float16([.5]),
              "a.b": np.array([True, False]), "a.none": np.zeros((0, 3)), "a.one": np.array(7)}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "d2.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, protocol=protocol))
        got = read_tensors(tmp_path / "d2.pkl")
        assert got.keys() == arrays.keys() and all(np.array_equal(got[k].numpy(), arrays[k]) and got[k].shape == arrays[k].shape for k in arrays)
    python2 = (b"\x80\x02}q\x00U\x01aq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
               b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xff\x07tbs.")
    (tmp_path / "p2.pkl").write_bytes(python2)
    assert read_tensors(tmp_path / "p2.pkl")["a"].tolist() == [255, 7]
    trace = tmp_path / "trace"
    for bad, says in ((Harm(trace), "it asks for"), (np.array([Harm(trace)], object), "it asks for|it holds an array of 'O8'"), (np.array(["text"]), "it holds an array of 'U4'"),
                      (Path("x"), "it asks for pathlib")):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"model": arrays | {"x": bad}}))
        with pytest.raises(ValueError, match=says): read_tensors(tmp_path / "bad.pkl")
    (tmp_path / "cut.pkl").write_bytes(python2.replace(b"K\x02\x85c", b"K\x03\x85c"))       # says three numbers, has two
    with pytest.raises(ValueError, match="cut short"): read_tensors(tmp_path / "cut.pkl")
    for target in (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n"):
        (tmp_path / "own.pkl").write_bytes(b"\x80\x02" + target + b"N}X\x05\x00\x00\x00ownedNs\x86b.")     # BUILD writes to what was found
        with pytest.raises(ValueError): read_tensors(tmp_path / "own.pkl")
    assert not trace.exists() and not any(hasattr(t, "owned") for t in (np.dtype, np.ndarray, PickledType, PickledArray, Inert))
