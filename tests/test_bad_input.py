"""Whatever comes in: the right result at its own size, or an error naming argument, what came and what is wanted."""
import io
import json
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import LABELS, Finder, Toy, ToyConfig, methods, noise, toy  # noqa: F401 (fixtures)

import lsbook.images
from lsbook import segmenter as S

RGB = Image.fromarray(noise(30, 40))
GREY16 = np.arange(0, 30 * 40 * 54, 54, dtype=np.uint16).reshape(30, 40)


def encoded_file(format, image=RGB, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def palette_with_hole():
    image = RGB.quantize(8)
    image.info["transparency"] = 0
    return image


def turned(note):
    exif = Image.Exif()
    exif[0x0112] = note
    return Image.open(io.BytesIO(encoded_file("JPEG", exif=exif)))


# --- images that must work: what came -> (height, width) of the answer ------------------------------------------------

GOOD = {
    "1 x 1": (np.zeros((1, 1, 3), np.uint8), (1, 1)),
    "20,000 px wide": (Image.new("RGB", (20_000, 2), "red"), (2, 20_000)),
    "20,000 px high": (np.zeros((20_000, 1), np.uint8), (20_000, 1)),
    "bytes": (noise(30, 40), (30, 40)),
    "bytes, grey": (noise(30, 40)[..., 0], (30, 40)),
    "bytes, (H, W, 1)": (noise(30, 40)[..., :1], (30, 40)),
    "bytes, RGBA": (np.dstack([noise(30, 40), noise(30, 40)[..., :1]]), (30, 40)),
    "uint16": (GREY16, (30, 40)),
    "uint16, big-endian": (GREY16.astype(">u2"), (30, 40)),
    "float64": (noise(30, 40) / 255, (30, 40)),
    "float16": ((noise(30, 40) / 255).astype(np.float16), (30, 40)),
    "a view with negative strides": (noise(30, 40)[::-1, ::-1, ::-1], (30, 40)),
    "read-only": (np.broadcast_to(np.uint8(7), (30, 40, 3)), (30, 40)),
    "tensor": (torch.rand(3, 30, 40), (30, 40)),
    "tensor, uint8": (torch.from_numpy(noise(30, 40)).permute(2, 0, 1), (30, 40)),
    "tensor, uint16": (torch.from_numpy(GREY16), (30, 40)),
    "tensor, bfloat16": (torch.rand(1, 30, 40).bfloat16(), (30, 40)),
    "tensor with a gradient": (torch.rand(4, 30, 40).requires_grad_(), (30, 40)),
    "float noise beyond 1": (np.full((30, 40), 1 + 1e-6), (30, 40)),
    "RGBA": (RGB.convert("RGBA"), (30, 40)),
    "LA": (RGB.convert("LA"), (30, 40)),
    "La": (RGB.convert("LA").convert("La"), (30, 40)),
    "RGBa": (RGB.convert("RGBA").convert("RGBa"), (30, 40)),
    "P": (RGB.quantize(5), (30, 40)),
    "PA": (RGB.quantize(5).convert("PA"), (30, 40)),
    "P with transparency": (palette_with_hole(), (30, 40)),
    "1": (RGB.convert("1"), (30, 40)),
    "L": (RGB.convert("L"), (30, 40)),
    "CMYK": (RGB.convert("CMYK"), (30, 40)),
    "YCbCr": (RGB.convert("YCbCr"), (30, 40)),
    "HSV": (RGB.convert("HSV"), (30, 40)),
    "I;16": (Image.fromarray(GREY16), (30, 40)),
    "I;16B": (Image.fromarray(GREY16.astype(">u2")), (30, 40)),
    "I": (Image.fromarray(GREY16.astype(np.int32)), (30, 40)),
    "F": (Image.fromarray(np.random.default_rng(0).random((30, 40), np.float32)), (30, 40)),
    "EXIF 3": (turned(3), (30, 40)),
    "EXIF 6": (turned(6), (40, 30)),
    "EXIF 8": (turned(8), (40, 30)),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images(toy, name):  # noqa: F811
    image, size = GOOD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = toy.segment(image, LABELS)
    assert result.label_map.shape == size and result.image.mode == "RGB" and result.image.size == size[::-1]


@pytest.mark.parametrize("format, options", [("PNG", {}), ("JPEG", {"quality": 95}), ("BMP", {}), ("TIFF", {}),
                                             ("GIF", {}), ("WEBP", {"lossless": True})])
def test_files(tmp_path, format, options):
    path = tmp_path / f"photo.{format.lower()}"
    path.write_bytes(encoded_file(format, **options))
    for name in (path, str(path)):
        found = np.asarray(lsbook.images.to_image(name)).astype(int)
        assert found.shape == (30, 40, 3)
        if format in ("PNG", "BMP", "TIFF", "WEBP"):
            assert (found == noise(30, 40)).all()


def test_values_are_right():
    pixel = lambda im: lsbook.images.to_image(im).getpixel((0, 0))  # noqa: E731
    for white in (np.full((2, 2), 65535, np.uint16), np.ones((2, 2)), torch.ones(1, 2, 2)):
        assert pixel(white) == (255, 255, 255)
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 7, np.uint16))) == (7, 7, 7)
    assert pixel(Image.fromarray(np.full((2, 2), 257 * 7, np.int32))) == (7, 7, 7)
    assert pixel(np.full((2, 2, 4), (10, 20, 30, 0), np.uint8)) == (255, 255, 255)
    assert pixel(Image.new("LA", (2, 2), (0, 51))) == (204, 204, 204)
    grey = Image.new("L", (2, 2), 9)
    grey.info["transparency"] = 9
    assert pixel(grey) == (255, 255, 255)
    assert pixel(np.full((2, 2), .5, np.float16)) == (128, 128, 128)


def test_sixteen_bit_png_and_palette_png(tmp_path):
    Image.fromarray(GREY16).save(tmp_path / "deep.png")
    assert (np.asarray(lsbook.images.to_image(tmp_path / "deep.png"))[..., 0] == (GREY16.astype(int) + 128) // 257).all()
    palette_with_hole().save(tmp_path / "hole.png")
    index = np.asarray(RGB.quantize(8))
    assert (np.asarray(lsbook.images.to_image(tmp_path / "hole.png"))[index == 0] == 255).all()


def test_the_result_does_not_change_the_callers_image(toy):  # noqa: F811
    image = Image.new("RGB", (9, 9), "red")
    result = toy.segment(image, LABELS)
    image.paste("blue", (0, 0, 9, 9))
    assert result.image.getpixel((0, 0)) == (255, 0, 0)


# --- images that must be refused: what came -> (error, what it says) -------------------------------------------------

def lazily_cut():
    return Image.open(io.BytesIO(encoded_file("PNG")[:900]))


BAD = {
    "None": (None, TypeError, "NoneType"),
    "a number": (3, TypeError, "int"),
    "a dict row": ({"bytes": b"", "path": None}, TypeError, "dict"),
    "bytes": (b"\x89PNG", TypeError, "bytes"),
    "an empty list": ([], ValueError, "empty list"),
    "an empty tuple": ((), ValueError, "empty tuple"),
    "a list of numbers": ([[1, 2], [3, 4]], TypeError, r"\[0\]: got list"),
    "an empty batch": (torch.zeros(0, 3, 8, 8), ValueError, "empty"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), ValueError, "no pixels"),
    "no pixels, PIL": (Image.new("RGB", (0, 5)), ValueError, "no pixels"),
    "no pixels, tensor": (torch.zeros(3, 0, 5), ValueError, "no pixels"),
    "NaN": (torch.full((3, 8, 8), float("nan")), ValueError, "NaN"),
    "one NaN": (np.where(np.eye(8), np.nan, .5), ValueError, "8 of 64 values NaN"),
    "infinite": (np.full((8, 8), np.inf), ValueError, "infinite"),
    "0..255 as floats": (np.full((8, 8), 200.), ValueError, "divide by 255"),
    "normalised": (torch.full((3, 8, 8), -2.1), ValueError, "normalisation"),
    "int64": (np.zeros((8, 8), int), TypeError, "int64"),
    "complex": (torch.zeros(8, 8, dtype=torch.complex64), TypeError, "complex"),
    "strings": (np.array([["a"]]), TypeError, "<U1"),
    "objects": (np.array([[None]]), TypeError, "object"),
    "one dimension": (np.zeros(8, np.uint8), ValueError, r"\(8,\)"),
    "five dimensions": (np.zeros((1, 1, 8, 8, 3), np.uint8), ValueError, "shape"),
    "two channels": (np.zeros((8, 8, 2), np.uint8), ValueError, r"\(8, 8, 2\)"),
    "channels first in an array": (np.zeros((3, 8, 8), np.uint8), ValueError, "transpose"),
    "channels last in a tensor": (torch.zeros(8, 8, 3), ValueError, "permute"),
    "F beyond 1": (Image.fromarray(np.full((8, 8), 7, np.float32)), ValueError, "divide by 255"),
    "I beyond 16 bits": (Image.fromarray(np.full((8, 8), 70_000, np.int32)), ValueError, "65535"),
    "I below 0": (Image.fromarray(np.full((8, 8), -1, np.int32)), ValueError, "-1"),
    "cut, not yet read": (lazily_cut(), ValueError, "cut short"),
    "a missing file": ("no/such/photo.jpg", FileNotFoundError, "no/such/photo.jpg"),
    "an address": ("https://example.org/a.jpg", ValueError, "download"),
    "an empty path": ("", FileNotFoundError, "no file"),
    "a very long path": ("x" * 10_000, FileNotFoundError, "no file"),
    "a path with a zero byte": ("a\0b", FileNotFoundError, "no file"),
    "a bad image in a list": ([noise(8, 8), "no/such/photo.jpg"], FileNotFoundError, r"\[1\]: got .no/such/photo.jpg., but there is no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images(toy, name):  # noqa: F811
    image, error, says = BAD[name]
    for ask in (lambda: toy.segment(image, LABELS), lambda: toy.encode_image(image)):
        with pytest.raises(error, match=f"(?s)^image.*{says}") as caught:
            ask()
        assert len(str(caught.value)) < 800                             # says what came, does not print all of it


def damaged(kind):
    png, jpeg = encoded_file("PNG"), encoded_file("JPEG")
    return {"empty": b"", "text": b"not an image", "cut PNG": png[:len(png) // 2], "cut JPEG": jpeg[:len(jpeg) // 2],
            "PNG head alone": png[:20], "zeros": bytes(5000), "a pickle": pickle.dumps([1]),
            "flipped bits": png[:60] + bytes(255 - b for b in png[60:90]) + png[90:],
            "a lie about its size": png[:16] + struct.pack(">II", 200_000, 200_000) + png[24:]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut PNG", "cut JPEG", "PNG head alone", "zeros", "a pickle",
                                  "flipped bits", "a lie about its size"])
def test_damaged_files(tmp_path, kind):
    path = tmp_path / "photo.png"
    path.write_bytes(damaged(kind))
    with pytest.raises(ValueError, match="^image: .*photo.png"):
        lsbook.images.to_image(path)
    with pytest.raises(ValueError, match="folder"):
        lsbook.images.to_image(tmp_path)


def test_unreadable_exif_is_said_and_the_picture_kept():
    image = Image.fromarray(noise(8, 8))
    image.getexif = lambda: 1 / 0
    with pytest.warns(UserWarning, match="^image: .*EXIF"):
        assert (np.asarray(lsbook.images.to_image(image)) == noise(8, 8)).all()


# --- words ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, error, says", [
    ([], ValueError, "empty"), ((), ValueError, "empty"), ("sky, road", TypeError, "did you mean"),
    ("", TypeError, "list"), (None, TypeError, "NoneType"), ({"sky", "road"}, TypeError, "set"), (3, TypeError, "int"),
    ([3], TypeError, r"\[0\].*int"), (["sky", None], TypeError, r"\[1\]"), ([b"sky"], TypeError, "bytes"),
    ([["sky"]], TypeError, "list"), (["sky", ""], ValueError, r"\[1\].*blank"), (["  \t\n"], ValueError, "blank"),
    (["\u200b\u00a0"], ValueError, "blank"), (["\x00"], ValueError, "blank"),
    (["sky", "sky"], ValueError, "got 'sky' twice"), (["Sky", " sky "], ValueError, "twice"),
    (["x" * 10_000], ValueError, "10,000 characters.*1,000"), ((s for s in "ab"), TypeError, "generator"),
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
    ("word " * 10_000, ValueError, "characters.*20,000"), ({"a": 1}, TypeError, "dict"),
])
def test_bad_expressions(expression, error, says):
    finder = Finder(ToyConfig(1))
    with pytest.raises(error, match=f"(?s)^expression.*{says}"):
        finder.segment(RGB, expression)
    assert not finder.passes


def test_odd_expressions_that_are_fine():
    finder = Finder(ToyConfig(1))
    assert finder.segment(RGB, "red " * 500).mask.shape == (30, 40)     # cutting it is for the text encoder
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
        with pytest.raises((ValueError, FileNotFoundError), match="^name: .*A pickle.*safetensors.torch.save_file"):
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
    (dict(method="vglaw"), "'vglaw'.*wanted one of .*lseg"), (dict(method="os:system"), "os:system"),
    (dict(method="tpy"), "did you mean 'toy'"),
    (dict(method=["toy"]), "method"),
    (dict(method=None), "None"), (dict(config=None), "no metadata"), (dict(config=[1]), "no metadata"),
    (dict(config={"width": 8, "depth": 3}), "got the field 'depth'; wanted one of long_side, note, rate, sizes, width"),
    (dict(config={"width": 8, "long_syde": 3}), "'long_syde'.*did you mean 'long_side'"),
    (dict(config={"long_side": 8}), "width"), (dict(config={"width": 8, "rate": "fast"}), "config.rate: got 'fast'; wanted float"),
    (dict(config={"width": 8, "sizes": 3}), "config.sizes: got 3; wanted tuple"),
    (dict(config={"width": "wide"}), "config.width: got 'wide'; wanted int"), (dict(config={"width": 4}), "of another shape"),
    (dict(config={"width": -1}), "-1"),
    (dict(method="finder", config={"width": 8}), "weights of 'toy'.*wanted 'finder'"),
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
    with pytest.raises(ValueError, match="^name: .*weights of 'toy'.*wanted 'finder'"):
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
