"""One door for every picture, word and file: tables of forms by doors, and what is said of what a model does not know.

The cases are of kinds that people reported; each kind is tried in several forms, at several doors and, where methods differ, with each.
"""
import json
import pickle
import warnings

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from lsbook import cli, evaluate, fit, load, recipe, scenes
from lsbook import data as D
from lsbook.images import TURNS, to_array, to_image, upright
from lsbook.segmenter import Known, SemanticSegmenter, colours_of, save_weights
from lsbook.segmenter.known import Untrained
from lsbook.step.model import STEP, STEPConfig
from lsbook.vglaw.model import VGLAW
from lsbook.vglaw.train import small as VGLAW_SMALL

W, H = 12, 8
SHAPE = np.zeros((H, W), bool)
SHAPE[1:4, 2:7] = True                                                  # no turn maps it to itself


def exif(note):
    block = Image.Exif()
    block[0x0112] = note
    return block.tobytes()


# --- one picture, one meaning: forms x doors -----------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def form(name, path):
    """A picture file of some form; returns its path."""
    if name == "rgb": Image.fromarray(PIXELS).save(path := path / "p.png")
    elif name == "grey": Image.fromarray(PIXELS[..., 0]).save(path := path / "p.png")
    elif name == "one bit": Image.fromarray(PIXELS[..., 0] > 127).save(path := path / "p.png")
    elif name == "16 bits": Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(path := path / "p.png")
    elif name == "palette": Image.fromarray(PIXELS).quantize(16).save(path := path / "p.png")
    elif name == "transparent": Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]])).save(path := path / "p.png")
    elif name == "clear colour": Image.fromarray(PIXELS).save(path := path / "p.png", transparency=tuple(int(v) for v in PIXELS[0, 0]))
    elif name == "grey and alpha": Image.fromarray(PIXELS[..., :2], "LA").save(path := path / "p.png")
    elif name == "cmyk": Image.fromarray(PIXELS).convert("CMYK").save(path := path / "p.jpg", quality=95)
    else: Image.fromarray(PIXELS).save(path := path / "p.jpg", exif=exif(int(name[-1])), quality=95)
    return path


FORMS = ["rgb", "grey", "one bit", "16 bits", "palette", "transparent", "clear colour", "grey and alpha", "cmyk", *(f"exif {n}" for n in TURNS)]


def rows_door(path, tmp):
    (tmp / "maps").mkdir()
    Image.new("L", to_image(path).size).save(tmp / "maps/p.png")
    return np.asarray(D.index_maps(path.parent, tmp / "maps", ["a"])[0]["image"])


def features_door(path, tmp):
    return np.asarray(Dataset.from_dict({"image": [str(path)], "caption": ["x"]}, features=D.features("caption"))[0]["image"])


def bytes_door(path, tmp):
    value = {"path": None, "bytes": path.read_bytes()}
    return np.asarray(Dataset.from_dict({"image": [value], "tags": [["x"]]}, features=D.features("tags"))[0]["image"])


def captions_door(path, tmp):
    (path.parent / "metadata.jsonl").write_text(json.dumps(dict(file_name=path.name, caption="x")))
    return np.asarray(D.captions(path.parent / "metadata.jsonl")[0]["image"])


def boxes_door(path, tmp):
    (tmp / "b.jsonl").write_text(json.dumps(dict(image=path.name, bbox_xywh=[0, 0, 2, 2], expression="x")))
    return np.asarray(D.box_expressions(tmp / "b.jsonl", path.parent)[0]["image"])


class Asked(SemanticSegmenter):
    method = "asked"
    def encode_text(self, labels): return labels
    def frame(self, image): raise StopIteration(np.asarray(image))


def segment_door(path, tmp):
    model, got = Asked(), []
    model._batches = lambda items, size: got.extend(items) or iter(())
    model.notes_on_words = lambda labels: []
    try: model.segment(path, ["x"])
    except AttributeError: pass                                         # nothing was answered; the picture is what we want
    return np.asarray(got[0])


@pytest.mark.parametrize("door", [rows_door, features_door, bytes_door, captions_door, boxes_door, segment_door, lambda p, t: to_array(Image.open(p))])
@pytest.mark.parametrize("name", FORMS)
def test_one_picture_means_one_thing(tmp_path, name, door):
    (tmp_path / "photos").mkdir()
    path = form(name, tmp_path / "photos")
    assert np.array_equal(door(path, tmp_path), np.asarray(to_image(path)))


# --- what belongs to a picture turns with it -----------------------------------------------------------------------------------------

def photo(path, note, **more):
    Image.fromarray(np.where(SHAPE, 255, 0).astype(np.uint8)).convert("RGB").resize((W * 8, H * 8), 0).save(path, exif=exif(note), quality=95, **more)


def big(a): return np.kron(a, np.ones((8, 8), np.uint8))


def turned_index_maps(root, note):
    photo(root / "i/1.jpg", note)
    Image.fromarray(big(SHAPE)).save(root / "l/1.png")
    return D.index_maps(root / "i", root / "l", ["back", "thing"])[0]["label_map"]


def turned_ade(root, note):
    photo(root / "i/1.jpg", note)
    Image.fromarray(big(SHAPE) + np.uint8(1)).save(root / "l/1.png")
    return D.index_maps(root / "i", root / "l", ["back", "thing"], ignore=0, first=1)[0]["label_map"]


def turned_voc(root, note):
    (root / "JPEGImages").mkdir(), (root / "SegmentationClass").mkdir()
    photo(root / "JPEGImages/1.jpg", note)
    palette = Image.fromarray(big(SHAPE))
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(root / "SegmentationClass/1.png")
    return D.voc(root)[0]["label_map"]


def turned_fss(root, note):
    (root / "c").mkdir()
    photo(root / "c/1.jpg", note)
    Image.fromarray(big(SHAPE) * np.uint8(255)).save(root / "c/1.png")
    return D.fss1000(root, ["c"])[0]["mask"]


def turned_small_fss(root, note):
    "A mask half as large, which is brought to the photograph's size after the turn."
    (root / "c").mkdir()
    photo(root / "c/1.jpg", note)
    Image.fromarray(np.kron(SHAPE, np.ones((4, 4), np.uint8)) * np.uint8(255)).save(root / "c/1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return D.fss1000(root, ["c"])[0]["mask"]


def turned_refer(root, note):
    f, im = root / "refcoco", root / "images/mscoco/images/train2014"
    f.mkdir(), im.mkdir(parents=True)
    photo(im / "p.jpg", note)
    shape = [v * 8 for v in (2, 1, 7, 1, 7, 4, 2, 4)]
    (f / "instances.json").write_text(json.dumps(dict(images=[dict(id=1, file_name="p.jpg", height=H * 8, width=W * 8)], annotations=[
        dict(id=1, image_id=1, bbox=[16, 8, 40, 24], segmentation=[shape])])))
    (f / "refs(unc).p").write_bytes(pickle.dumps([dict(ref_id=1, ann_id=1, image_id=1, split="train", sentences=[dict(sent="it", raw="")])], 2))
    row = D.refer(root, split="train")[0]
    x0, y0, x1, y1 = (round(v) for v in row["box"])
    assert np.asarray(row["mask"])[y0:y1, x0:x1].all() and (np.asarray(row["mask"]) > 0).sum() == (y1 - y0) * (x1 - x0)
    return row["mask"]


@pytest.mark.parametrize("note", [1, *TURNS])
@pytest.mark.parametrize("door", [turned_index_maps, turned_ade, turned_voc, turned_fss, turned_small_fss, turned_refer])
def test_what_was_drawn_turns_with_its_photograph(tmp_path, door, note):
    (tmp_path / "i").mkdir(), (tmp_path / "l").mkdir()
    got = np.asarray(door(tmp_path, note)) > 0
    want = np.asarray(upright(Image.fromarray(big(SHAPE)), note)) > 0
    assert got.shape == want.shape and (got & want).sum() / (got | want).sum() == 1


@pytest.mark.parametrize("note", [5, 6, 7, 8])
def test_what_was_drawn_on_the_upright_picture_stays(tmp_path, note):
    (tmp_path / "i").mkdir(), (tmp_path / "l").mkdir()
    photo(tmp_path / "i/1.jpg", note)
    drawn = np.asarray(upright(Image.fromarray(big(SHAPE)), note))
    Image.fromarray(drawn).save(tmp_path / "l/1.png")
    assert np.array_equal(D.index_maps(tmp_path / "i", tmp_path / "l", ["back", "thing"])[0]["label_map"], drawn)


# --- names and numbers travel together -----------------------------------------------------------------------------------------------

NAMES = ["wall", "sky", "tree"]


def sets(tmp_path):
    """Rows of three kinds: files that count from 1, in memory, renumbered; each with a function that gives the names by the file's numbers."""
    for f in ("i", "l"): (tmp_path / f).mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (3, 2)).save(tmp_path / f"i/{i}.png")
        Image.fromarray(np.array([[1, 2, 3], [0, 1, 2]], np.uint8)).save(tmp_path / f"l/{i}.png")
    files = D.index_maps(tmp_path / "i", tmp_path / "l", NAMES, ignore=0, first=1)
    return dict(files=files, memory=files.map(lambda r: r), only=D.only(files, ["tree", "wall"]))


def spelled(rows):
    """The label maps of rows in words: what cannot be wrong unnoticed."""
    names = D.label_names(rows)
    return [[[names[v] if v != 255 else "-" for v in line] for line in np.asarray(r["label_map"]).tolist()] for r in rows]


WORDS = dict(files=[["wall", "sky", "tree"], ["-", "wall", "sky"]], only=[["wall", "-", "tree"], ["-", "wall", "-"]])
WORDS["memory"] = WORDS["files"]
OPERATIONS = {
    "select": lambda ds, tmp: ds.select([1, 0]), "shuffle": lambda ds, tmp: ds.shuffle(seed=1), "map": lambda ds, tmp: ds.map(lambda r: {"x": 1}),
    "map the map": lambda ds, tmp: ds.map(lambda r: {"label_map": r["label_map"]}), "map twice": lambda ds, tmp: ds.map(lambda r: r).map(lambda r: r),
    "map in batches": lambda ds, tmp: ds.map(lambda b: {"label_map": b["label_map"]}, batched=True), "filter": lambda ds, tmp: ds.filter(lambda r: True),
    "split": lambda ds, tmp: ds.train_test_split(.5)["test"], "shard": lambda ds, tmp: ds.shard(2, 1), "sort": lambda ds, tmp: ds.add_column("k", [3, 1, 2, 0]).sort("k"),
    "concatenate": lambda ds, tmp: datasets.concatenate_datasets([ds, ds]), "interleave": lambda ds, tmp: datasets.interleave_datasets([ds, ds]),
    "flatten indices": lambda ds, tmp: ds.shuffle(seed=0).flatten_indices(), "formats": lambda ds, tmp: ds.with_format("numpy").with_format(None),
    "pickle": lambda ds, tmp: pickle.loads(pickle.dumps(ds)), "rename there and back": lambda ds, tmp: ds.rename_column("label_map", "m").rename_column("m", "label_map"),
    "columns": lambda ds, tmp: ds.select_columns(["label_map"]), "stream": lambda ds, tmp: ds.to_iterable_dataset(), "shuffled stream": lambda ds, tmp: ds.to_iterable_dataset().shuffle(seed=0).take(2),
    "disk": lambda ds, tmp: (ds.save_to_disk(tmp / "d"), datasets.load_from_disk(tmp / "d"))[1],
    "parquet": lambda ds, tmp: (ds.to_parquet(tmp / "p.parquet"), datasets.load_dataset("parquet", data_files=str(tmp / "p.parquet"), split="train", cache_dir=str(tmp / "c")))[1],
    "only again": lambda ds, tmp: D.only(ds, D.label_names(ds)),
}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_names_and_numbers_travel_together(tmp_path, kind, operation):
    changed = OPERATIONS[operation](sets(tmp_path)[kind], tmp_path)
    assert all(words == WORDS[kind] for words in spelled(changed)) and next(iter(changed))


LOST = {"a cast to pictures": lambda ds: ds.cast_column("label_map", datasets.Image()), "read anew": lambda ds: Dataset.from_list(list(ds)),
        "a generator": lambda ds: Dataset.from_generator(ds.__iter__), "a list": list,
        "a stream mapped without types": lambda ds: ds.to_iterable_dataset().map(lambda r: {"label_map": r["label_map"]})}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("operation", LOST)
def test_names_that_are_lost_are_missed(tmp_path, kind, operation):
    "Where the type of the column goes, the names go: they are refused, at every door, and not guessed."
    lost, model = LOST[operation](sets(tmp_path)[kind]), load("lseg")
    for door in (D.label_names, lambda rows: D.check_rows(rows, "semantic"), lambda rows: evaluate(model, rows),
                 lambda rows: fit(model, rows, None, recipe("lseg").replace(steps=1))):
        with pytest.raises(ValueError, match="no single list of names"): door(lost)


# --- fit trains the rows' names, whatever the model was trained on --------------------------------------------------------------------

def own_rows(names=("tumour", "vessel"), n=8, size=(16, 16)):
    m = np.zeros(size, np.uint8)
    m[:, size[1] // 2:] = 1
    row = dict(image=Image.fromarray(np.array([[200, 30, 30], [30, 200, 30]], np.uint8)[m]), label_map=Image.fromarray(m))
    return D.with_names(Dataset.from_list([row] * n, features=D.features("semantic")), list(names))


def quick(**changes): return recipe("lseg").replace(**dict(steps=2, batch_size=4, warmup=0, eval_every=2) | changes)


@pytest.mark.parametrize("other", [0., .5])
def test_lseg_learns_the_names_of_its_rows(other, tmp_path):
    model = load("lseg")
    model.config.other = other
    fit(model, own_rows(), own_rows(), quick(), out=tmp_path)
    again = load(tmp_path)
    assert model.config.labels == again.config.labels == ["tumour", "vessel"] and {"tumour", "vessel"} <= set(again.config.words)
    assert set(again.trained.words) == {"tumour", "vessel"} | ({"other"} if other else set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.segment(own_rows()[0]["image"], ["tumour", "vessel"])
    with pytest.warns(Untrained, match='never trained on the word "grass"'): again.segment(own_rows()[0]["image"], ["tumour", "grass"])


@pytest.mark.parametrize("other", [0., .5])
@pytest.mark.parametrize("value", [2, 7, 254])
def test_a_number_without_a_name_is_refused_whatever_the_config(other, value):
    model, rows = load("lseg"), own_rows()
    model.config.other = other
    bad = rows.map(lambda r, i: {"label_map": Image.new("L", (16, 16), value if i == 5 else 0)}, with_indices=True)
    with pytest.raises(ValueError, match=rf"train: row 5: label_map: got {value}, which has no name; wanted 0..1, or 255"): fit(model, bad, None, quick())
    with pytest.raises(ValueError, match=rf"rows: row 5: label_map: got {value}"): evaluate(model, bad)


def tiny_step(**changes):
    return STEP(STEPConfig(words=scenes.words(), vector=8, cell=8, backbone="small", width=8, context=16, norm=True, atrous=16, attention=16, embed=16,
                           folds=1, grid=2, maps=4, long_side=64, **changes))


@pytest.mark.parametrize("names, fine", [(scenes.label_names(), True), (scenes.label_names()[::-1], False), (["a", "b"], False), (None, False)])
def test_step_compares_the_names_of_its_label_maps(names, fine):
    rows = scenes.rows("referring", 4)
    maps = [Image.fromarray(scenes.scene(i).label_map) for i in range(4)]
    rows = rows.add_column("label_map", [{"bytes": D.label_maps.png(m), "path": None} for m in maps], feature=D.features("semantic")["label_map"])
    if names: rows = D.with_names(rows, names)
    r = recipe("step").replace(steps=1, batch_size=2, warmup=0, lr_scale={}, eval_every=1)
    if fine: fit(tiny_step(dense=scenes.label_names()), rows, None, r)
    else:
        with pytest.raises(ValueError, match="train: .*(config.dense|names)"): fit(tiny_step(dense=scenes.label_names()), rows, None, r)
    if names is None: fit(tiny_step(), rows, None, r)                  # without `dense` nobody asks for them


# --- rows are checked before the first step --------------------------------------------------------------------------------------------

MODELS = dict(lseg=lambda: load("lseg"), step=tiny_step, vglaw=lambda: VGLAW(__import__("lsbook.vglaw.model").vglaw.model.VGLAWConfig(**VGLAW_SMALL)))
TASK = dict(lseg="semantic", step="referring", vglaw="referring")


def steps_of(method): return recipe(method).replace(steps=2, batch_size=2, warmup=0, eval_every=2, lr_scale={}, first=None, accumulate=1)


@pytest.mark.parametrize("task", ["referring", "semantic", "caption", "tags"])
@pytest.mark.parametrize("method", MODELS)
def test_rows_of_another_task(method, task, capsys):
    if task == TASK[method]: return
    model, rows = MODELS[method](), scenes.rows(task, 3)
    for bad in (rows, list(rows), rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="train: got no column"): fit(model, bad, None, steps_of(method))
        with pytest.raises(ValueError, match="valid: got no column"): fit(model, scenes.rows(TASK[method], 3), bad, steps_of(method))
        with pytest.raises(ValueError, match="rows: got "): evaluate(model, bad)
    assert "step 1" not in capsys.readouterr().out


FAULTS = {  # what row 3 holds instead, and what is said of it
    "another size": (dict(mask=Image.new("L", (9, 9), 255)), r"mask: got \(9, 9\), wanted the image's size \(64, 64\)"),
    "an empty mask": (dict(mask=Image.new("L", (64, 64))), "mask: got an empty mask"),
    "a soft mask": (dict(mask=np.full((64, 64), 100, np.uint8)), "mask: got the value 100; wanted 0 and 255"),
    "a mask of shares": (dict(mask=np.full((64, 64), .3)), "mask: got the value 0.3; wanted 0 and 255"),
    "a mask of colours": (dict(mask=Image.new("RGB", (64, 64), "white")), "mask: got RGB; wanted an index image"),
    "no mask and no box": (dict(mask=None, box=None), "mask, box: got neither"),
    "a box inside out": (dict(box=[9., 9., 3., 3.]), "box: got .*wanted x0 < x1"),
    "a blank expression": (dict(expression="  "), "expression: got '  '; wanted words"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["step", "vglaw"])
def test_what_is_wrong_with_a_referring_row_is_said_with_its_number(method, fault, capsys):
    model, rows = MODELS[method](), list(scenes.rows("referring", 6))
    bad = rows[:3] + [rows[3] | FAULTS[fault][0]] + rows[4:]
    said = "row 3: .*" + FAULTS[fault][1]
    with pytest.raises(ValueError, match="train: " + said): fit(model, bad, None, steps_of(method))
    with pytest.raises(ValueError, match="valid: " + said): fit(model, rows, bad, steps_of(method))
    with pytest.raises(ValueError, match="rows: " + said): evaluate(model, bad)
    assert "step 1" not in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("what", ["map of another size", "value without a name", "broken map", "broken photograph", "coloured map"])
def test_the_file_of_a_bad_row_is_named(tmp_path, what, place):
    for f in ("i", "l"): (tmp_path / f).mkdir()
    for i in range(6):
        Image.new("RGB", (64, 48)).save(tmp_path / f"i/p{i}.png"), Image.new("L", (64, 48)).save(tmp_path / f"l/p{i}.png")
    bad = tmp_path / ("i" if what == "broken photograph" else "l") / f"p{place}.png"
    if what.startswith("broken"): bad.write_bytes(bad.read_bytes()[:60])
    elif what == "coloured map": Image.new("RGB", (64, 48)).save(bad)
    else: Image.new("L", (32, 24) if "size" in what else (64, 48), 0 if "size" in what else 9).save(bad)
    rows, model = D.index_maps(tmp_path / "i", tmp_path / "l", ["grass", "sand"]), load("lseg")
    for door in (lambda: fit(model, rows, None, quick()), lambda: fit(model, own_rows(), rows, quick()), lambda: evaluate(model, rows), lambda: D.check_rows(rows, "semantic")):
        with pytest.raises(ValueError, match=f"p{place}.png"): door()


def test_maps_that_are_ignored_whole():
    rows = own_rows().map(lambda r: {"label_map": Image.new("L", (16, 16), 255)})
    with pytest.raises(ValueError, match=r"train: got label maps of 255 \(ignore\) alone"): fit(load("lseg"), rows, None, quick())


def test_evaluate_asks_equal_names_once_and_the_first_wins():
    asked = []

    class First:
        def segment(self, images, names):
            asked.append(names)
            return [type("R", (), dict(label_map=np.array([[0, 1]]))) for _ in images]
    rows = [dict(image=Image.new("RGB", (2, 1)), label_map=np.array([[2, 1]]))]
    got = evaluate(First(), rows, names=["screen", "wall", "screen"])
    assert asked == [["screen", "wall"]] and got["accuracy"] == .5


def test_a_models_own_list_may_hold_a_name_twice():
    model = load("lseg")
    model.config.labels = ["grass", "sand", "grass"]
    got = model.segment(scenes.scene(0).image, ["grass", "sand", "grass"])
    assert 2 not in got.label_map and got.labels == ["grass", "sand", "grass"]
    with pytest.raises(ValueError, match="twice"): model.segment(scenes.scene(0).image, ["sand", "sand"])


@pytest.mark.parametrize("absent, want", [(float("nan"), 1.), (0., .5)])
def test_labels_that_occur_nowhere(absent, want):
    class Right:
        def segment(self, images, names): return [type("R", (), dict(label_map=np.zeros((1, 2), int))) for _ in images]
    rows = [dict(image=Image.new("RGB", (2, 1)), label_map=np.zeros((1, 2), np.uint8))]
    assert evaluate(Right(), rows, names=["a", "b"], absent=absent)["mIoU"] == want


def test_seen_and_unseen_ignore_case():
    class Right:
        config = type("C", (), dict(labels=["Grass"]))
        def segment(self, images, names): return [type("R", (), dict(label_map=np.zeros((1, 2), int))) for _ in images]
    rows = [dict(image=Image.new("RGB", (2, 1)), label_map=np.zeros((1, 2), np.uint8))]
    assert evaluate(Right(), rows, names=["grass", "sky"])["mIoU/seen"] == 1


# --- what a model knows is said ---------------------------------------------------------------------------------------------------------

SCENE = Image.fromarray(scenes.scene(5, size=128, split="test").image)
ASK = dict(lseg=lambda words: words, groupvit=lambda words: words, step=lambda words: f"the {' '.join(words)}", vglaw=lambda words: f"the {' '.join(words)}")


@pytest.mark.parametrize("method", ASK)
def test_words_are_counted_against_what_was_trained(method):
    model = load(method)
    assert "elephant" in model.config.words and "elephant" not in model.trained.words
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.segment(SCENE, ASK[method](["red", "star"]))
    with pytest.warns(Untrained) as said: result = model.segment(SCENE, ASK[method](["red", "elephant"]))
    (text,) = {str(w.message) for w in said}
    assert text == f'{method} was never trained on the word "elephant": what it finds by that is a guess' == result.notes[0]
    assert text in repr(result) and said[0].filename == __file__
    assert result.picture().height > model.segment(SCENE, ASK[method](["red"])).picture().height        # it stands below the picture


@pytest.mark.parametrize("method", ASK)
def test_a_picture_unlike_those_of_the_training_is_said_to_be(method):
    night = Image.new("RGB", (300, 200), (20, 20, 60))
    with pytest.warns(Untrained, match=f"{method} was trained on other pictures"): result = load(method).segment(night, ASK[method](["red", "circle"]))
    assert len(result.notes) == 1 and "do not rely" in result.notes[0]


@pytest.mark.parametrize("words, many", [(["car"], "the word"), (["car", "cat"], "the words"), ([f"w{i}" for i in range(30)], "30 in all")])
def test_a_sentence_names_the_words(words, many):
    (note,) = load("lseg").notes_on_words([*words, "grass", "the grass"])
    assert many in note and '"car"' in note or many == "30 in all" and len(note) < 200


def test_evaluate_has_the_truth_and_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(load("lseg"), scenes.rows("semantic", 2, objects="parts", split="test"))


def test_how_often_the_measure_is_wrong(request):
    known = [load(m).trained for m in ASK]
    test = [colours_of(Image.fromarray(scenes.scene(i, split="test").image)) for i in range(500)]
    for k in known: assert np.mean([k.newness(c) > k.limit for c in test]) < .005
    folder = request.getfixturevalue("real_data") / "coco128_seg/images"
    photos = [colours_of(to_image(p)) for p in sorted(folder.glob("*.jpg"))]
    assert len(photos) == 125
    for k in known: assert np.mean([k.newness(c) <= k.limit for c in photos]) < .02


def test_known_by_hand():
    rare = np.array([1] * 999 + [2])                                    # a thousandth is familiar, less is not
    known = Known.of([rare, np.array([1] * 1001)], ["a"])
    assert known.colours == [1] and Known.of([rare], []).colours == [1, 2] and known.limit == .1
    assert colours_of(Image.new("RGB", (4, 2), (255, 16, 15))).tolist() == [(15 * 16 + 1) * 16 + 0] * 8
    assert len(colours_of(Image.new("RGB", (640, 10)))) == 64


@pytest.mark.parametrize("fault", [dict(words="grass"), dict(colours=3), dict(limit="a"), dict(more=1), [1]])
def test_knowledge_of_strangers_is_checked(tmp_path, fault):
    path = save_weights(load("lseg"), tmp_path / "a.safetensors")
    info = json.loads(path.with_suffix(".json").read_text())
    info["trained"] = info["trained"] | fault if isinstance(fault, dict) else fault
    path.with_suffix(".json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="config"): load(path)


# --- the command line ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SCENE.save("scene.png")
    return tmp_path


def test_a_command_says_what_was_not_trained_in_one_line(folder, capsys):
    "Every time, and whatever is done with warnings."
    cli.main(["segment", "lseg", "scene.png", "grass, elephant"]), capsys.readouterr()
    assert cli.main(["segment", "lseg", "scene.png", "grass, elephant"]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert said == ['lsbook segment: lseg was never trained on the word "elephant": what it finds by that is a guess']


@pytest.mark.parametrize("method, text, kind", [("lseg", "grass, other", "labels"), ("step", "the star", "mask")])
def test_nothing_is_overwritten_unasked(folder, method, text, kind):
    mine = {f"out.png": b"mine", f"out_2_{kind}.png": b"mine too"}
    for name, content in mine.items(): (folder / name).write_bytes(content)
    assert cli.main(["segment", method, "scene.png", text]) == 0
    assert (folder / "out_3.png").exists() and (folder / f"out_3_{kind}.png").exists()
    assert all((folder / n).read_bytes() == c for n, c in mine.items())
    assert cli.main(["segment", method, "scene.png", text, "-o", "out_2.png"]) == 2                      # would write out_2_labels.png
    assert cli.main(["segment", method, "scene.png", text, "-o", "out_3.png"]) == 0                      # our own may be written again
    assert cli.main(["segment", method, "scene.png", text, "-o", "scene.png"]) == 2
    SCENE.save(f"x_{kind}.png")
    assert cli.main(["segment", method, f"x_{kind}.png", text, "-o", "x.png"]) == 2                      # the input would be lost
    assert all((folder / n).read_bytes() == c for n, c in mine.items()) and np.array_equal(Image.open("scene.png"), SCENE)


@pytest.mark.parametrize("args, says", [
    (["train", "stp", "--out", "x"], "did you mean 'step'"), (["train", "lseg", "--scale", "papr", "--out", "x"], "did you mean 'paper'"),
    (["evaluate", "lsge"], "did you mean 'lseg'"), (["evaluate", "--weights", "nowhere"], "--weights: 'nowhere': no folder"),
    (["evaluate"], "METHOD: got none"), (["segment", "lseg", "scene.png", "grass", "--weights", "nowhere"], "--weights: 'nowhere'"),
    (["train", "step", "--out", "x", "--set", "dice=-1"], "config.dice: got -1; wanted 0 or more"),
    (["train", "vglaw", "--out", "x", "--set", "bce=-0.5"], "config.bce: got -0.5"),
    (["evaluate", "lseg", "--protocol", "zero-shot"], "wanted pascal-5i/0"), (["convert", "none.ckpt", "-o", "x"], "none.ckpt"),
])
def test_an_error_names_the_option(folder, capsys, args, says):
    assert cli.main(args) == 2
    assert says in capsys.readouterr().err


# --- LSeg for a person with the authors' checkpoint -----------------------------------------------------------------------------------------

def test_convert_then_evaluate_with_the_published_protocol(folder, monkeypatch, capsys):
    from test_lseg import published

    from lsbook.lseg import official
    g = torch.Generator().manual_seed(0)
    state = {"net." + k: torch.randn(s, generator=g) * .02 if s else torch.tensor(7) for k, s in published("vitb32").items()}
    torch.save({"state_dict": state, "callbacks": {}}, "demo_e200.ckpt")
    del state
    with pytest.raises(ValueError, match="lsbook convert"): load("demo_e200.ckpt")
    assert cli.main(["convert", "demo_e200.ckpt", "-o", "lseg-ade"]) == 0
    assert cli.main(["convert", "demo_e200.ckpt", "-o", "lseg-ade"]) == 2          # it is there
    for s in ("training", "validation"):
        for f in ("images", "annotations"): (folder / "ADE20K" / f / s).mkdir(parents=True)
        Image.new("RGB", (60, 40), "red").save(f"ADE20K/images/{s}/a.jpg"), Image.new("L", (60, 40), 130).save(f"ADE20K/annotations/{s}/a.png")
    monkeypatch.setattr(official.MultiScale.__init__, "__defaults__", (52, 64, (1.,)))
    capsys.readouterr()
    assert cli.main(["evaluate", "--weights", "lseg-ade", "--root", "ADE20K", "--protocol", "multi-scale", "--json", "got.json"]) == 0
    got = json.loads((folder / "got.json").read_text())
    assert got["method"] == "lseg" and got["scale"] == "paper" and len(load("lseg-ade").config.labels) == 150 and 0 <= got["metrics"]["mIoU"] <= 1


def test_multi_scale_by_the_plain_rule():
    "Every square cut out and asked alone, added up pixel by pixel."
    from lsbook.lseg.model import LSeg, LSegConfig
    from lsbook.lseg.official import MultiScale
    torch.manual_seed(0)
    model = LSeg(LSegConfig("small", "words", words=["a", "b", "c"], fusion=8, width=4, long_side=32, depth=2)).eval()
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    total = torch.zeros(3, 50, 80)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    resize = lambda y, size: torch.nn.functional.interpolate(y, size, mode="bilinear", align_corners=True)
    for long, short in ((26, 16), (78, 49)):                            # 52 x .5, 52 x 1.5; 16.25 and 48.75 rounded
        y = torch.zeros(1, 3, max(48, short), max(48, long))
        y[..., :short, :long] = resize(x, (short, long))
        starts = lambda side: [0] if side <= 48 else [0, 32] if side <= 80 else [0, 32, 64]
        out, n = torch.zeros(3, *y.shape[-2:]), torch.zeros(y.shape[-2:])
        for top in starts(y.shape[-2]):
            for left in starts(y.shape[-1]):
                square = torch.zeros(1, 3, 48, 48)
                part = y[..., top:top + 48, left:left + 48]
                square[..., :part.shape[-2], :part.shape[-1]] = part
                with torch.no_grad(): both = model(square, texts=["a", "b", "c"]).logits + model(square.flip(-1), texts=["a", "b", "c"]).logits.flip(-1)
                out[:, top:top + 48, left:left + 48] += both[0, :, :part.shape[-2], :part.shape[-1]]
                n[top:top + 48, left:left + 48] += 1
        total += resize((out / n)[None, :, :short, :long], (50, 80))[0]
    got = MultiScale(model, base=52, crop=48, scales=(.5, 1.5)).scores(image, ["a", "b", "c"])
    assert (got - total).abs().max() < 1e-4 * total.abs().max()
