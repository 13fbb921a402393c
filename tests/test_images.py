"""Every form of a picture through every door: the same pixels, or an error that says what came and what is wanted."""
import io
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import LABELS, methods, noise, toy  # noqa: F401 (fixtures)

from lsbook import show
from lsbook.data import index_maps
from lsbook.images import box_of, orientation, png, to_array, to_image, to_images, upright, upright_box

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
        found = np.asarray(to_image(name)).astype(int)
        assert found.shape == (30, 40, 3)
        if format in ("PNG", "BMP", "TIFF", "WEBP"):
            assert (found == noise(30, 40)).all()


def test_values_are_right():
    pixel = lambda im: to_image(im).getpixel((0, 0))  # noqa: E731
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
    assert (np.asarray(to_image(tmp_path / "deep.png"))[..., 0] == (GREY16.astype(int) + 128) // 257).all()
    palette_with_hole().save(tmp_path / "hole.png")
    index = np.asarray(RGB.quantize(8))
    assert (np.asarray(to_image(tmp_path / "hole.png"))[index == 0] == 255).all()


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
    "I beyond 16 bits": (Image.fromarray(np.full((8, 8), 65_536, np.int32)), ValueError, "65535"),
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
        to_image(path)
    with pytest.raises(ValueError, match="folder"):
        to_image(tmp_path)


def test_unreadable_exif_is_said_and_the_picture_kept():
    image = Image.fromarray(noise(8, 8))
    image.getexif = lambda: 1 / 0
    with pytest.warns(UserWarning, match="^image: .*EXIF"):
        assert (np.asarray(to_image(image)) == noise(8, 8)).all()


@pytest.mark.parametrize("mode", "1 L LA P PA RGB RGBA CMYK YCbCr HSV LAB I;16 I F".split())
def test_pil_modes(mode):
    image = Image.fromarray(np.full((20, 30), 40000, np.uint16)) if mode == "I;16" else Image.new("F", (30, 20), .5) \
        if mode == "F" else Image.new(mode, (30, 20))
    a = to_array(image)
    assert a.shape == (20, 30, 3)
    if mode == "I;16": assert a[0, 0, 0] == 156
    if mode == "F": assert a[0, 0, 0] == 128


# --- numbers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, byte", [(0, 0), (128, 0), (129, 1), (200, 1), (257, 1), (385, 1), (386, 2), (40000, 156),
                                         (65406, 254), (65407, 255), (65535, 255)])
def test_one_rule_for_16_bits(tmp_path, value, byte):
    deep = np.full((2, 2), value, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for form in (deep, deep.astype(">u2"), torch.from_numpy(deep), Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)),
                 tmp_path / "deep.png", np.stack([deep] * 3, -1)):
        assert (to_array(form) == byte).all(), type(form)


@pytest.mark.parametrize("value, byte", [(0, 0), (.0019, 0), (.002, 1), (.5, 128), (.998, 254), (.9981, 255), (1, 255), (-.0019, 0), (1.0019, 255)])
def test_floats_are_rounded(value, byte):
    for form in (np.full((2, 2), float(value)), torch.full((1, 2, 2), float(value)), Image.new("F", (2, 2), value)):
        assert (to_array(form) == byte).all()


def test_floats_beyond_half_a_byte_are_refused():
    for value in (-.002, 1.002, 1.5, 255):
        with pytest.raises(ValueError, match=r"^image: got floats from .*; wanted \[0, 1\]"): to_array(np.full((2, 2), float(value)))


def test_yes_and_no_are_white_and_black():
    yes = np.eye(3, dtype=bool)
    for form in (yes, torch.from_numpy(yes), Image.fromarray(yes)):
        assert (to_array(form)[..., 0] == yes * 255).all()


def test_a_clear_value_of_16_bit_grey_is_white(tmp_path):
    deep = np.array([[300, 40000]], np.uint16)
    image = Image.fromarray(deep)
    image.info["transparency"] = 300
    assert to_array(image)[0, :, 0].tolist() == [255, 156]
    image.save(tmp_path / "clear.png", transparency=300)
    assert to_array(tmp_path / "clear.png")[0, :, 0].tolist() == [255, 156]


@pytest.mark.parametrize("alpha", [0, 1, 51, 128, 254, 255])
def test_glass_lies_on_white(alpha):
    want = np.array([10, 100, 250]) * alpha / 255 + 255 - alpha
    image = Image.new("RGBA", (2, 2), (10, 100, 250, alpha))
    for form in (image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)):
        assert abs(to_array(form)[0, 0] - want).max() <= 1


def test_a_palette_with_alpha_lies_on_white():
    glass = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    glass.putpixel((1, 0), (200, 0, 0, 255))
    assert to_array(glass.convert("PA"))[0, :, 1].tolist() == [255, 0]


def test_the_array_may_be_written_to():
    a = to_array(Image.new("RGB", (2, 2)))
    a[0, 0] = 7
    assert a.dtype == np.uint8 and a.flags.c_contiguous


def test_a_list_keeps_what_it_is_told_to_keep():
    class Done: pass
    done, white = Done(), np.full((2, 2), 255, np.uint8)
    items, one = to_images([done, white], keep=Done)
    assert items[0] is done and items[1].mode == "RGB" and not one
    assert to_images(done, keep=(Done,)) == ([done], True)
    with pytest.raises(TypeError, match=r"^image\[1\]: got Done; wanted a path"): to_images([white, done])


# --- EXIF -------------------------------------------------------------------------------------------------------------

SIX = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
SEEN = {1: [[1, 2, 3], [4, 5, 6]], 2: [[3, 2, 1], [6, 5, 4]], 3: [[6, 5, 4], [3, 2, 1]], 4: [[4, 5, 6], [1, 2, 3]],
        5: [[1, 4], [2, 5], [3, 6]], 6: [[4, 1], [5, 2], [6, 3]], 7: [[6, 3], [5, 2], [4, 1]], 8: [[3, 6], [2, 5], [1, 4]]}


def noted(note, image=None):
    "As if opened from a file with that note."
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = note
    (image or Image.fromarray(SIX)).save(out, "PNG", exif=exif)
    return Image.open(io.BytesIO(out.getvalue()))


@pytest.mark.parametrize("note", range(1, 9))
def test_the_eight_notes(note):
    im = noted(note)
    assert orientation(im) == note and np.asarray(upright(im)).tolist() == SEEN[note]
    assert np.asarray(upright(Image.fromarray(SIX), note)).tolist() == SEEN[note]    # a mask with its photograph's note
    assert to_array(noted(note))[..., 0].tolist() == SEEN[note]
    assert to_array(to_image(noted(note)))[..., 0].tolist() == SEEN[note]            # obeyed once
    assert orientation(upright(im)) == 1 and orientation(to_image(im)) == 1
    for y in range(2):
        for x in range(3):
            mask = np.zeros((2, 3), bool)
            mask[y, x:] = True
            turned_mask = np.asarray(upright(Image.fromarray(mask), note))
            assert upright_box(box_of(mask), (3, 2), note) == box_of(turned_mask)


@pytest.mark.parametrize("note", [0, 9, 77])
def test_a_note_that_means_nothing_turns_nothing(note):
    assert orientation(noted(note)) == 1 and upright(noted(note)).size == upright(Image.fromarray(SIX), note).size == (3, 2)
    assert upright_box([0, 0, 1, 2], (3, 2), note) == [0, 0, 1, 2]


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_index_images_turn_and_keep_their_numbers(mode):
    a = SIX.astype(np.uint16) if mode == "I;16" else SIX % 2 == 1 if mode == "1" else SIX
    im = Image.fromarray(a)
    if mode == "P": im.putpalette(list(range(256)) * 3)
    seen = upright(noted(6, im))
    assert seen.mode in (mode, "I;16") and np.asarray(seen).astype(int).tolist() == np.rot90(a, -1).astype(int).tolist()


# --- the same pixels behind every door -----------------------------------------------------------------------------------

def odd_files(folder):
    "name -> file: pictures that loaders of other libraries disagree about"
    veil, note = RGB.copy(), Image.Exif()
    veil.putalpha(Image.linear_gradient("L").resize(RGB.size))
    note[0x0112] = 6
    odd = {"rgb": (RGB, {}), "grey": (RGB.convert("L"), {}), "bit": (RGB.convert("1"), {}), "deep": (Image.fromarray(GREY16), {}),
           "palette": (RGB.quantize(8), {}), "hole": (RGB.quantize(8), {"transparency": 0}), "rgba": (veil, {}), "la": (veil.convert("LA"), {}),
           "keyed": (RGB, {"transparency": RGB.getpixel((0, 0))}), "turned": (RGB, {"exif": note}), "turned deep": (Image.fromarray(GREY16), {"exif": note})}
    folder.mkdir()
    for name, (im, options) in odd.items(): im.save(folder / f"{name}.png", **options)
    note[0x0112] = 8
    RGB.save(folder / "jpeg.jpg", exif=note)
    RGB.convert("CMYK").save(folder / "cmyk.jpg")
    RGB.save(folder / "tif.tif"), RGB.save(folder / "webp.webp")
    return {f.stem: f for f in sorted(folder.iterdir())}


def test_every_form_is_the_same_picture_behind_every_door(toy, tmp_path):  # noqa: F811
    files = odd_files(tmp_path / "images")
    (tmp_path / "maps").mkdir()
    for f in files.values(): Image.new("L", to_image(f).size).save(tmp_path / f"maps/{f.stem}.png")
    rows = index_maps(tmp_path / "images", tmp_path / "maps", ["a"])
    in_memory = index_maps(tmp_path / "images", tmp_path / "maps", ["a"]).map(lambda row: row)     # bytes in the row
    assert len(rows) == len(files) > 14
    for row, again, stored in zip(rows, in_memory, rows.with_format("arrow")["image"].to_pylist()):
        path = stored["path"]
        want = to_array(path)
        with Image.open(path) as opened: doors = {"PIL": to_array(opened)}
        doors |= {"row": np.asarray(row["image"]), "row again": np.asarray(again["image"]), "figure": np.asarray(show.label_overlay(path, np.zeros(want.shape[:2], int), alpha=0)),
                  "segment": np.asarray(toy.segment(path, LABELS).image), "encode": np.asarray(toy.encode_image([path])[0].image), "text path": to_array(str(path))}
        for door, got in doors.items(): assert got.shape == want.shape and (got == want).all(), f"{path}: {door}"
    assert min(to_image(files["rgba"]).getpixel((0, 0))) > 250 and to_image(files["turned"]).size == (30, 40)


# --- boxes and PNG ------------------------------------------------------------------------------------------------------

def test_boxes():
    for _ in range(50):
        mask = np.random.default_rng(_).random((7, 9)) > .95
        ys, xs = np.nonzero(mask)
        want = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else None
        got = box_of(mask)
        assert got == want and (got is None or all(type(v) is int for v in got))


def test_png_keeps_every_value():
    for a in (noise(5, 6), noise(5, 6)[..., 0], GREY16): assert (np.asarray(Image.open(io.BytesIO(png(a)))) == a).all()
    assert np.asarray(Image.open(io.BytesIO(png(Image.fromarray(SIX > 3))))).tolist() == (SIX > 3).tolist()
