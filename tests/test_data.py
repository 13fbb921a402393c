"""Loaders on small fixtures in the official layouts, bad input, and the real data folder where it is present."""
import csv, io, json, os, pickle, subprocess, sys, tarfile, warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from test_files import evil

from lsbook import data as D

REAL = Path(os.environ.get("LSBOOK_DATA", Path(__file__).parents[1] / "../shared/data"))
datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "No test reads what another left in the datasets cache."
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def real(part):
    if not (REAL / part).exists(): pytest.skip(f"no real data at {REAL / part}")
    return REAL / part


def picture(path, size=(20, 16), colour=(200, 30, 30), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **kwargs)
    return path


def index_map(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    if palette: image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)
    return path


SQUARE, OVERLAP = [2, 2, 10, 2, 10, 10, 2, 10], [6, 6, 14, 6, 14, 14, 6, 14]


def refer_folder(root, name="refcoco", split_by="unc", protocol=2, file="COCO_train2014_000000000009.jpg"):
    "Two objects on one photograph (height 16, width 20): two overlapping polygons; an RLE."
    base = root / name
    base.mkdir(parents=True, exist_ok=True)
    photos = "images/saiapr_tc-12" if name == "refclef" else "images/mscoco/images/train2014"
    picture(root / photos / "COCO_train2014_000000000009.jpg")
    runs = [16 * 3 + 4, 5, 11, 5, 16 * 20 - 16 * 3 - 25]
    rle = {"size": [16, 20], "counts": runs}
    instances = {
        "images": [{"id": 9, "file_name": file, "height": 16, "width": 20}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 3, "segmentation": [SQUARE, OVERLAP], "bbox": [2, 2, 12, 12]},
            {"id": 2, "image_id": 9, "category_id": 3, "segmentation": [rle] if name == "refclef" else rle,
             "bbox": [3, 4, 2, 5]}],
        "categories": [{"id": 3, "name": "thing"}]}
    (base / "instances.json").write_text(json.dumps(instances))

    def ref(i, ann, split, *texts):
        sentences = [{"sent_id": j, "sent": t, "raw": t, "tokens": t.split()} for j, t in enumerate(texts)]
        return {"ref_id": i, "ann_id": ann, "image_id": 9, "category_id": 3, "split": split, "file_name": file,
                "sent_ids": list(range(len(texts))), "sentences": sentences}

    refs = [ref(0, 1, "val", "left thing", "the big one"), ref(1, 2, "testA", "small one"), ref(2, 1, "train", "it")]
    (base / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol))
    return root


# --- schemas

def small(task, n=4):
    image = Image.new("RGB", (8, 6))
    mask = Image.fromarray(np.pad(np.full((2, 2), 255, np.uint8), 2)[:, :6]).resize((8, 6), 0)
    row = {"image": image, "expression": "the red thing", "mask": mask, "box": [1, 1, 4, 4], "caption": "a red thing",
           "tags": ["thing"], "label_map": Image.fromarray(np.ones((6, 8), np.uint8))}
    f = D.features(task)
    ds = Dataset.from_dict({c: [row[c]] * n for c in f}, features=f)
    return D.with_names(ds, ["stuff", "thing"]) if task in ("semantic", "tags") else ds


@pytest.mark.parametrize("task", ["referring", "semantic", "caption", "tags"])
def test_every_schema_checks(task):
    ds = small(task)
    assert D.check_rows(ds, task) is ds
    stream = ds.to_iterable_dataset()
    if task in ("semantic", "tags"): stream = D.with_names(stream, ["stuff", "thing"])
    assert D.check_rows(stream, task) is stream


def test_names_travel():
    ds = small("semantic")
    made = [ds.select([0]), ds.shuffle(seed=0), ds.map(lambda r: {"x": 1}), ds.train_test_split(.5)["test"],
            ds.shard(2, 0), ds.filter(lambda r: True), ds.with_format("torch"), datasets.concatenate_datasets([ds, ds])]
    assert all(D.label_names(d) == ["stuff", "thing"] for d in made)
    stream = D.with_names(ds.to_iterable_dataset(), ["stuff", "thing"])
    made = [stream.shuffle(seed=0), stream.map(lambda r: {"x": 1}), stream.take(2), stream.skip(1),
            stream.filter(lambda r: True)]
    assert all(D.label_names(d) == ["stuff", "thing"] for d in made)


def test_with_names_leaves_its_input_alone():
    ds = small("semantic")
    D.with_names(ds, ["a", "b"])
    assert D.label_names(ds) == ["stuff", "thing"]


def test_names_survive_the_disk(tmp_path):
    small("semantic").save_to_disk(tmp_path / "rows")
    assert D.label_names(datasets.load_from_disk(tmp_path / "rows")) == ["stuff", "thing"]


@pytest.mark.parametrize("names", [[], ["a", " "], ["a", 3], "ab"])
def test_bad_names(names):
    with pytest.raises(ValueError, match="names: "): D.with_names(small("semantic"), names)


def test_a_fixed_list_may_hold_a_name_twice():
    "ADE20K's own list has two screens."
    assert D.label_names(D.with_names(small("semantic"), ["screen", "screen"])) == ["screen", "screen"]


@pytest.mark.parametrize("other", [["a", "b"], ["thing", "stuff"], ["stuff", "Thing"], ["stuff", "thing", "more"], None])
def test_two_lists_of_names_are_no_list(other):
    "Sets with other names, or with none, are refused where they are put together."
    one, two = small("semantic"), Dataset.from_list(list(small("semantic")), features=D.features("semantic"))
    if other: two = D.with_names(two, other)
    for sets in ([one, two], [two, one]):
        with pytest.raises(ValueError, match="aligned"): datasets.concatenate_datasets(sets)
        with pytest.raises(ValueError, match="aligned"): datasets.interleave_datasets([s.to_iterable_dataset() for s in sets])
    tags = [D.with_names(small("tags"), names) for names in (["stuff", "thing"], ["a", "b"])]
    with pytest.raises(ValueError, match="no single list"): D.label_names(datasets.concatenate_datasets(tags))


@pytest.mark.parametrize("task, change, message", [
    ("referring", lambda ds: ds.remove_columns("expression"), "no column 'expression'"),
    ("referring", lambda ds: ds.remove_columns(["mask", "box"]), "no column 'mask'"),
    ("referring", lambda ds: ds.map(lambda r: {"expression": " "}), "expression: got ' '; wanted words"),
    ("referring", lambda ds: ds.map(lambda r: {"box": [4., 1, 4, 4]}), "box: got"),
    ("referring", lambda ds: ds.map(lambda r: {"box": [1., 4, 4, 4]}), "box: got"),
    ("referring", lambda ds: ds.map(lambda r: {"mask": Image.new("L", (3, 3))}), "mask: got .3, 3., wanted the image"),
    ("referring", lambda ds: ds.map(lambda r: {"mask": Image.new("L", (8, 6))}), "an empty mask"),
    ("referring", lambda ds: ds.select([]), "no rows"),
    ("referring", lambda ds: ds.cast_column("box", datasets.Sequence(datasets.Value("string"))), "column 'box' as"),
    ("semantic", lambda ds: ds.map(lambda r: {"label_map": Image.new("L", (8, 6), 2)}), "has no name"),
    ("semantic", lambda ds: ds.map(lambda r: {"label_map": Image.new("RGB", (8, 6))}), "index image"),
    ("semantic", lambda ds: ds.map(lambda r: {"label_map": Image.new("L", (8, 7))}), "wanted the image's"),
    ("tags", lambda ds: ds.map(lambda r: {"tags": ["cat"]}), "'cat'"),
    ("caption", lambda ds: ds.map(lambda r: {"caption": ""}), "caption: got")])
def test_check_rows_says_what_is_wrong(task, change, message):
    with pytest.raises(ValueError, match=message): D.check_rows(change(small(task)), task)


def test_the_schemas_are_what_the_book_says():
    image, text = D.ImageFile(), datasets.Value("string")
    box = datasets.Sequence(datasets.Value("float32"), length=4)
    assert D.features("referring") == {"image": image, "expression": text, "mask": D.ImageFile(kind="mask"), "box": box}
    assert D.features("semantic") == {"image": image, "label_map": D.ImageFile(kind="index")}


def test_what_check_rows_leaves_free():
    "A mask or a box is enough; a type may be wider; only two names make 0 and 255 suspect."
    ds = small("referring")
    for c in ("mask", "box"): D.check_rows(ds.remove_columns(c), "referring")
    D.check_rows(ds.cast_column("expression", datasets.Value("large_string")).cast_column(
        "box", datasets.Sequence(datasets.Value("float64"))), "referring")
    holes = small("semantic").map(lambda r: {"label_map": Image.fromarray(np.tile(np.uint8([0, 255]), (6, 4)))})
    with pytest.warns(UserWarning, match="0 and 255 only"): D.check_rows(holes, "semantic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        D.check_rows(D.with_names(holes, ["a", "b", "c"]), "semantic")


def test_unknown_task():
    with pytest.raises(ValueError, match="task: got 'masks'"): D.features("masks")


# --- masks

@pytest.mark.parametrize("outline, inside", [
    ([1, 1, 4, 1, 4, 3, 1, 3], [(y, x) for y in (1, 2) for x in (1, 2, 3)]),
    ([.2, .2, 5.4, 1.2, 1.4, 4.8],
     [(0, 0), (0, 1), *((1, x) for x in range(1, 5)), *((2, x) for x in range(1, 4)), (3, 1), (3, 2), (4, 1)]),
    ([-5, -5, 20, -5, 20, 20, -5, 20], [(y, x) for y in range(5) for x in range(6)])])
def test_outlines(outline, inside):
    assert sorted(map(tuple, np.argwhere(D.segmentation_mask([outline], 5, 6)).tolist())) == sorted(inside)


def test_run_lengths_go_down_the_columns():
    want = [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    for counts in ([2, 3, 4], "234", b"234", [2, 3, 4, 0], [2, 1, 0, 2, 4]):
        assert D.segmentation_mask({"size": [3, 3], "counts": counts}, 3, 3).astype(int).tolist() == want


@pytest.mark.parametrize("bad", [
    {"size": [3, 3], "counts": [2, 3, 3]}, {"size": [3, 3], "counts": [2, 3, 5]}, {"size": [3, 3], "counts": "233"},
    {"size": [3, 3], "counts": ""}, {"size": [3, 3], "counts": []}, {"size": [3, 3], "counts": None}, {"size": [3, 3]},
    {"counts": "234"}, [1e9, 0, 2, 0, 2, 2], [0, 0, 2, 0, 2, "x"], [0, 0, 2, 2], 7])
def test_what_pycocotools_would_draw_wrongly(bad):
    with pytest.raises(ValueError, match="wanted"): D.compressed(bad, 3, 3)


def test_overlap_counts_once():
    both = D.segmentation_mask([SQUARE, OVERLAP], 16, 20)
    assert both.sum() == 64 + 64 - 16 and both.dtype == bool


@pytest.mark.parametrize("segmentation", [
    [], None, [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, float("nan")]], {"size": [9, 9], "counts": [81]},
    {"size": [16, 20], "counts": [5]}, {"size": [16, 20], "counts": [-1, 321]}, {"size": [16, 20], "counts": "~~"},
    {"size": [16, 20], "counts": "o"}])
def test_bad_segmentations(segmentation):
    with pytest.raises(ValueError, match="wanted"): D.segmentation_mask(segmentation, 16, 20)


# --- REFER

@pytest.mark.parametrize("name, split_by", [
    ("refcoco", "unc"), ("refcoco", "google"), ("refcoco+", "unc"), ("refcocog", "umd"), ("refclef", "berkeley")])
def test_refer(tmp_path, name, split_by):
    root = refer_folder(tmp_path, name, split_by)
    ds = D.check_rows(D.refer(root, name, split_by, "val"), "referring")
    assert ds["expression"][:] == ["left thing", "the big one"] and ds[0]["box"] == [2, 2, 14, 14]
    assert (np.asarray(ds[1]["mask"]) > 0).sum() == 112
    a = D.refer(root, name, split_by, "testA")
    assert len(a) == 1 and (np.asarray(a[0]["mask"]) > 0).sum() == 10 and np.asarray(a[0]["mask"])[4:9, 3:5].all()


@pytest.mark.parametrize("change, message", [
    (dict(name="refcoco+"), "root, name: .*is not a folder"), (dict(split_by="google"), r"split_by: .*\['unc'\]"),
    (dict(split="testB"), "split: got 'testB'; .*'val': 1"),
    (dict(images="/nowhere"), "images: got '/nowhere', which is not a folder")])
def test_refer_says_what_is_wrong(tmp_path, change, message):
    refer_folder(tmp_path)
    with pytest.raises(ValueError, match=message): D.refer(tmp_path, **change)


@pytest.mark.parametrize("file", [
    "../../../../secret.jpg", "/etc/passwd", "..\\..\\secret.jpg", "C:\\x.jpg", "", ".", "a\0b", "gone.jpg"])
def test_refer_stays_in_its_folder(tmp_path, file):
    picture(tmp_path / "secret.jpg")
    root = refer_folder(tmp_path / "in", file=file)
    with pytest.raises(ValueError, match="leads out of|not in"): D.refer(root)


def test_refer_refuses_the_evil_pickle(tmp_path):
    root = refer_folder(tmp_path)
    (root / "refcoco/refs(unc).p").write_bytes(evil(tmp_path / "made"))
    with pytest.raises(ValueError, match="wanted plain containers"): D.refer(root)
    assert not (tmp_path / "made").exists()


def test_refer_broken_files(tmp_path):
    root = refer_folder(tmp_path)
    (root / "refcoco/instances.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="instances.json: .*not JSON"): D.refer(root)
    (root / "refcoco/instances.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="ann_id 1"): D.refer(root)
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="wanted a list of refs"): D.refer(root)


def test_blank_expressions_are_reported(tmp_path):
    root = refer_folder(tmp_path)
    file = root / "refcoco/refs(unc).p"
    refs = pickle.loads(file.read_bytes())
    refs[0]["sentences"][0].update(sent="", raw="")
    refs[0]["sentences"][1].update(sent="", raw="The Big One")
    file.write_bytes(pickle.dumps(refs))
    with pytest.warns(UserWarning, match="1 blank"): ds = D.refer(root)
    assert ds["expression"][:] == ["The Big One"]


# --- hub

def benchmark_folder(root, split="refcoco_unc_val"):
    "The columns of jxu124/refcoco-benchmark: an image, its info, and a list of objects with expressions."
    F, V, L = datasets.Features, datasets.Value, datasets.Sequence
    i, f, s = V("int64"), V("float64"), V("string")
    features = F({"ref_list": [{"ann_info": {"area": f, "bbox": L(f), "id": i, "iscrowd": i, "segmentation": L(L(f))},
                                "ref_info": {"ref_id": i, "split": s, "sentences": [
                                    {"raw": s, "sent": s, "sent_id": i, "tokens": L(s)}]}}],
                  "image_info": {"file_name": s, "height": i, "width": i, "id": i}, "image": datasets.Image()})
    def one(text, k): return {"ann_info": {"area": 1., "bbox": [2, 2, 12, 12], "id": k, "iscrowd": 0,
                                           "segmentation": [SQUARE, OVERLAP]},
                              "ref_info": {"ref_id": k, "split": "val", "sentences": [
                                  {"raw": text, "sent": text, "sent_id": 0, "tokens": text.split()}] * 2}}
    rows = {"ref_list": [[one("left", 1), one("right", 2)], [one("top", 3)]],
            "image_info": [{"file_name": "a.jpg", "height": 16, "width": 20, "id": 1}] * 2,
            "image": [Image.new("RGB", (20, 16), c) for c in ("red", "blue")]}
    (root / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features=features).to_parquet(root / f"data/{split}-00000-of-00001.parquet")
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n"
                                    f"    path: data/{split}-*\n---\n")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_evaluation_splits(tmp_path, monkeypatch, streaming):
    benchmark_folder(tmp_path / "jxu124/refcoco-benchmark", "refcoco_plus_unc_testA")
    monkeypatch.chdir(tmp_path)  # a folder of this name stands for the hub's repository
    ds = D.refcoco_hub("refcoco+", "testA", streaming=streaming)
    assert isinstance(ds, datasets.IterableDataset) == streaming
    D.check_rows(ds, "referring")
    rows = list(ds)
    assert [r["expression"] for r in rows] == ["left"] * 2 + ["right"] * 2 + ["top"] * 2
    assert rows[5]["image"].getpixel((0, 0)) == (0, 0, 255) and (np.asarray(rows[5]["mask"]) > 0).sum() == 112


def bench(root):
    "A repository of other columns."
    (root / "other").mkdir()
    Dataset.from_list([{"question": "what?"}]).to_parquet(root / "other/refcoco_unc_val.parquet")
    (root / "other/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n"
                                          "  - split: refcoco_unc_val\n    path: refcoco_unc_val.parquet\n---\n")
    return root / "other"


def test_hub_train_split(tmp_path):
    ann = {"segmentation": [SQUARE], "bbox": [2, 2, 8, 8], "iscrowd": 0, "id": 1}
    info = {"file_name": "COCO_train2014_000000000009.jpg", "height": 16, "width": 20}
    picture(tmp_path / "train2014" / info["file_name"])
    (tmp_path / "hub").mkdir()
    row = {"sentences": [{"raw": "A", "sent": "a", "sent_id": 0, "tokens": ["a"]}], "raw_anns": json.dumps(ann),
           "raw_image_info": json.dumps(info), "split": "train", "bbox": [2, 2, 10, 10]}
    Dataset.from_list([row] * 3).to_parquet(tmp_path / "hub/train.parquet")
    ds = D.refcoco_hub(split="train", repo=tmp_path / "hub", images=tmp_path / "train2014")
    D.check_rows(ds, "referring")
    assert len(ds) == 3 and ds[0]["box"] == [2, 2, 10, 10] and (np.asarray(ds[0]["mask"]) > 0).sum() == 64
    with pytest.raises(ValueError, match="images: got 'None', which is not a folder"):
        D.refcoco_hub(split="train", repo=tmp_path / "hub")
    with pytest.raises(ValueError, match="split_by: got 'google'"): D.refcoco_hub(split="train", split_by="google")
    with pytest.raises(ValueError, match="repo: .*with the columns"): D.refcoco_hub("refcoco", "val", repo=bench(tmp_path))
    with pytest.raises(ValueError, match="name: got 'refclef'"): D.refcoco_hub("refclef")


# --- boxes and expressions

def test_box_expressions(tmp_path):
    line = {"image": "a.jpg", "bbox_xywh": [1, 2, 3, 4], "expression": "man"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n\n")
    ds = D.box_expressions(tmp_path / "x.jsonl")
    assert "mask" not in ds.column_names and ds[0] == {"image": None, "expression": "man", "box": [1, 2, 4, 6],
                                                       "file_name": "a.jpg"}
    picture(tmp_path / "photos/a.jpg")
    D.check_rows(D.box_expressions(tmp_path / "x.jsonl", tmp_path / "photos"), "referring")
    for bad, message in (("{", "line 1: .*not JSON"), ('{"image": "a.jpg"}', "line 1: got"), ("", "holds no lines")):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=message): D.box_expressions(tmp_path / "bad.jsonl")


# --- index maps

def pairs(root, values=(0, 1, 2), stems=("a_1", "b_1")):
    for s in stems:
        picture(root / f"images/{s}.jpg", (3, 2))
        index_map(root / f"labels/{s}.png", np.array([values, values], np.uint8))
    return root / "images", root / "labels"


def test_ade20k_numbers(tmp_path):
    ds = D.index_maps(*pairs(tmp_path), ["wall", "sky"], ignore=0, first=1)
    assert np.asarray(D.check_rows(ds, "semantic")[0]["label_map"]).tolist() == [[255, 0, 1]] * 2


def test_255_always_means_not_labelled():
    assert D.remap_labels(np.uint8([[0, 254, 255]]), 255).tolist() == [[0, 254, 255]]
    assert D.remap_labels(np.uint8([[0, 1, 255]]), 1, first=1, ignore=0).tolist() == [[255, 0, 255]]


def test_coco_stuff_and_sixteen_bits(tmp_path):
    images, labels = pairs(tmp_path, (0, 181, 255))
    names = [f"c{i}" for i in range(182)]
    assert np.asarray(D.index_maps(images, labels, names)[0]["label_map"]).tolist() == [[0, 181, 255]] * 2
    for f in labels.iterdir(): index_map(f, np.array([[0, 181, 65535]] * 2, np.uint16))
    assert np.asarray(D.index_maps(images, labels, names, ignore=65535)[0]["label_map"]).tolist() == [[0, 181, 255]] * 2


def test_a_map_that_was_read_is_not_shifted_twice(tmp_path):
    ds = D.index_maps(*pairs(tmp_path), ["wall", "sky"], ignore=0, first=1)
    again = ds.map(lambda r: {"label_map": r["label_map"]})
    assert (np.asarray(again[0]["label_map"]) == np.asarray(ds[0]["label_map"])).all()
    again.save_to_disk(tmp_path / "rows")
    back = datasets.load_from_disk(tmp_path / "rows")
    assert np.asarray(back[1]["label_map"]).tolist() == [[255, 0, 1]] * 2


def test_label_maps_packed_into_parquet_are_translated_once(tmp_path):
    ds = D.index_maps(*pairs(tmp_path), ["wall", "sky"], ignore=0, first=1)
    packed = ds.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    packed.to_parquet(tmp_path / "rows.parquet")  # as push_to_hub does
    back = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "c"))
    for s in ("a_1", "b_1"): (tmp_path / f"labels/{s}.png").unlink()
    assert np.asarray(back[0]["label_map"]).tolist() == [[255, 0, 1]] * 2


def test_prefixes(tmp_path):
    images, labels = pairs(tmp_path, stems=("0001TP_1", "0006R0_1", "0006R0_2", "0016E5_1"))
    n = ["a", "b", "c"]
    assert len(D.index_maps(images, labels, n, prefixes=("0006R0", "0001TP"))) == 3
    assert len(D.index_maps(images, labels, n, prefixes="0016E5")) == 1
    with pytest.raises(ValueError, match="prefixes: got '0007'"):
        D.index_maps(images, labels, n, prefixes=("0007",))


def test_index_maps_say_what_is_wrong(tmp_path):
    images, labels = pairs(tmp_path)
    ds = D.index_maps(images, labels, ["a", "b"])
    with pytest.raises(ValueError, match="a_1.png: got the value 2, which has no name"): ds[0]
    index_map(labels / "a_1.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="a_1.png: got mode RGB; wanted an index image"): ds[0]
    (images / "b_1.jpg").unlink()
    with pytest.raises(ValueError, match="images: got no photograph .*'b_1'"): D.index_maps(images, labels, ["a"])
    picture(images / "b_1.jpg"), picture(images / "c_1.jpg")
    with pytest.warns(UserWarning, match="1 of 3 photographs"): D.index_maps(images, labels, ["a"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="labels: got no image files"): D.index_maps(images, tmp_path / "none", ["a"])
    with pytest.raises(ValueError, match="names: got 256"): D.index_maps(images, labels, ["a"] * 256)
    picture(images / "c_1.png")
    with pytest.raises(ValueError, match="only in their ending"): D.index_maps(images, labels, ["a"])


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    images, labels = pairs(tmp_path)
    for f in (*images.iterdir(), *labels.iterdir()): f.write_bytes(b"not an image")
    ds = D.index_maps(images, labels, ["a"])
    assert len(ds) == 2
    with pytest.raises(ValueError, match="photo .*a_1.jpg: got UnidentifiedImageError"): ds[0]


def test_truncated_photographs_and_bombs_name_the_file(tmp_path, monkeypatch):
    images, labels = pairs(tmp_path)
    ds = D.index_maps(images, labels, ["a", "b", "c"])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(images / "a_1.jpg")
    whole = (images / "a_1.jpg").read_bytes()
    (images / "a_1.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="a_1.jpg: got .*truncated"): ds[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ValueError, match="b_1.jpg: got DecompressionBombError"): ds[1]


def test_photographs_of_every_mode_are_rgb(tmp_path):
    for i, mode in enumerate(("L", "RGBA", "P", "1", "LA", "I;16")):
        image = Image.fromarray(np.full((2, 3), 40000, np.uint16)) if mode == "I;16" else Image.new(mode, (3, 2))
        (tmp_path / "i").mkdir(exist_ok=True)
        image.save(tmp_path / f"i/{i}.png")
        index_map(tmp_path / f"l/{i}.png", np.zeros((2, 3), np.uint8))
    ds = D.index_maps(tmp_path / "i", tmp_path / "l", ["a"])
    assert all(r["image"].mode == "RGB" for r in ds) and ds[5]["image"].getpixel((0, 0)) == (156,) * 3


def test_rotated_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    picture(tmp_path / "i/a.jpg", (3, 2), exif=exif)
    index_map(tmp_path / "l/a.png", np.zeros((3, 2), np.uint8))
    D.check_rows(D.index_maps(tmp_path / "i", tmp_path / "l", ["a"]), "semantic")


# --- VOC, COCO polygons, folds, FSS

def test_voc(tmp_path):
    for s in ("2007_1", "2007_2"):
        picture(tmp_path / f"JPEGImages/{s}.jpg", (3, 2))
        index_map(tmp_path / f"SegmentationClass/{s}.png", np.array([[0, 15, 255]] * 2, np.uint8), palette=True)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_2\n")
    ds = D.check_rows(D.voc(tmp_path, "val"), "semantic")
    assert len(ds) == 1 and np.asarray(ds[0]["label_map"]).tolist() == [[0, 15, 255]] * 2 and len(D.voc(tmp_path)) == 2
    tags = D.check_rows(D.tag_rows(ds), "tags")
    assert tags[0]["tags"] == ["person"] and "background" not in D.label_names(tags)
    (tmp_path / "ImageSets/Segmentation/bad.txt").write_text("../../x\n")
    with pytest.raises(ValueError, match="leads out of"): D.voc(tmp_path, "bad")
    with pytest.raises(ValueError, match="split: .*train.txt', which is not a file"): D.voc(tmp_path, "train")


def test_coco_polygons(tmp_path):
    picture(tmp_path / "images/a.jpg", (20, 10))
    (tmp_path / "p").mkdir()
    text = "1 .4 .4 .6 .4 .6 .6 .4 .6\n0 0 0 1 0 1 1 0 1\n"
    (tmp_path / "p/a.txt").write_text(text)
    ds = D.check_rows(D.coco_polygons(tmp_path / "images", tmp_path / "p", ["big", "small"]), "semantic")
    m = np.asarray(ds[0]["label_map"])
    assert (m == 2).sum() == 8 and (m == 1).sum() == 192 and D.label_names(ds) == ["background", "big", "small"]
    for bad in ("7 0 0 1 0 1 1", "0 0 0 1", "x 0 0", "0 0 0 1 0 1 1 1"):
        (tmp_path / "p/a.txt").write_text(bad)
        with pytest.raises(ValueError, match="polygons"):
            D.coco_polygons(tmp_path / "images", tmp_path / "p", ["big", "small"])


def test_folds_cover_every_class_once():
    pascal, coco = ([c for f in range(4) for c in D.fold_classes(b, f)] for b in ("pascal-5i", "coco-20i"))
    assert pascal == D.VOC_NAMES[1:] and sorted(coco) == sorted(D.COCO_NAMES) and len(set(coco)) == 80
    assert D.fold_classes("coco-20i", 1)[:2] == ["bicycle", "bus"]
    for args in (("voc", 0), ("pascal-5i", 4), ("pascal-5i", "0")):
        with pytest.raises(ValueError, match="benchmark|fold"): D.fold_classes(*args)


def test_fss1000(tmp_path):
    for c in ("ab_wheel", "abacus"):
        for i in (1, 2, 10):
            picture(tmp_path / c / f"{i}.jpg", (3, 2))
            index_map(tmp_path / c / f"{i}.png", np.array([[[0] * 3, [130] * 3, [255] * 3]] * 2, np.uint8))
    ds = D.check_rows(D.fss1000(tmp_path), "referring")
    assert len(ds) == 6 and ds[0]["expression"] == "ab wheel"
    assert np.asarray(ds[0]["mask"]).tolist() == [[0, 255, 255]] * 2
    assert len(D.fss1000(tmp_path, ["abacus"])) == 3
    with pytest.raises(ValueError, match="classes: got ..zebra"): D.fss1000(tmp_path, ["zebra"])
    (tmp_path / "abacus/2.png").unlink()
    with pytest.raises(ValueError, match="2.png"): D.fss1000(tmp_path)


# --- captions

def tar(path, n, start=0, ending="txt"):
    with tarfile.open(path, "w") as t:
        for i in range(start, start + n):
            photo = io.BytesIO()
            Image.new("RGB", (8, 6), (i, 0, 0)).save(photo, "PNG")
            text = f"scene {i}".encode() if ending == "txt" else json.dumps({"caption": f"scene {i}"}).encode()
            for name, b in ((f"{i:04}.png", photo.getvalue()), (f"{i:04}.{ending}", text)):
                info = tarfile.TarInfo(name)
                info.size = len(b)
                t.addfile(info, io.BytesIO(b))


@pytest.mark.parametrize("ending", ["txt", "json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_shards(tmp_path, ending, streaming):
    tar(tmp_path / "a.tar", 3, 0, ending), tar(tmp_path / "b.tar", 2, 3, ending)
    ds = D.check_rows(D.captions(tmp_path, streaming), "caption")
    rows = list(ds)
    assert [r["caption"] for r in rows] == [f"scene {i}" for i in range(5)]
    assert rows[4]["image"].getpixel((0, 0))[0] == 4
    assert len(list(D.captions(tmp_path / "b.tar", streaming))) == 2
    if streaming: assert ds.n_shards == 2


def test_shards_are_split_by_node_and_worker(tmp_path):
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader
    for k in range(4): tar(tmp_path / f"{k}.tar", 3, 3 * k)
    seen = []
    for rank in range(2):
        mine = split_dataset_by_node(D.captions(tmp_path, streaming=True), rank, 2)
        loader = DataLoader(mine, batch_size=None, num_workers=2, multiprocessing_context="fork")
        seen.append(sorted(int(r["caption"].split()[1]) for r in loader))
    assert len(seen[0]) == len(seen[1]) == 6 and sorted(seen[0] + seen[1]) == list(range(12))


def test_tables_and_folders(tmp_path):
    photos = tmp_path / "photos"
    for i in range(3): picture(photos / f"{i}.jpg"), (photos / f"{i}.txt").write_text(f"scene {i}\n")
    want = [f"scene {i}" for i in range(3)]
    assert D.check_rows(D.captions(photos), "caption")["caption"][:] == want
    with open(photos / "metadata.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["file_name", "caption"])
        for i in range(3): w.writerow([f"{i}.jpg", f"scene, {i}"])
    assert D.captions(photos)["caption"][1] == "scene, 1"
    lines = [json.dumps({"file_name": f"{i}.jpg", "caption": t}) for i, t in enumerate(want)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    assert D.captions(photos)["caption"][:] == want
    stream = D.captions(photos / "metadata.jsonl", streaming=True)
    assert stream.n_shards == 3 and [r["caption"] for r in D.check_rows(stream, "caption")] == want
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "../x.jpg", "caption": "x"}))
    with pytest.raises(ValueError, match="leads out of"): D.captions(photos)
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "caption": " "}))
    with pytest.raises(ValueError, match="1 of 1 captions .* blank"): D.captions(photos)
    (photos / "metadata.jsonl").write_text(json.dumps({"file": "0.jpg"}))
    with pytest.raises(ValueError, match="metadata.jsonl line 1: .*wanted file_name, caption"): D.captions(photos)


def test_caption_trouble(tmp_path):
    with pytest.raises(ValueError, match="path: .*nothing"): D.captions(tmp_path / "nothing")
    with pytest.raises(ValueError, match="path: .*nothing"): D.captions(tmp_path / "nothing-*.tar")
    picture(tmp_path / "p/a.jpg")
    with pytest.raises(ValueError, match="path: got no text file beside 1"): D.captions(tmp_path / "p")
    (tmp_path / "p/a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"): D.captions(tmp_path / "p")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all")
    with pytest.raises(ValueError, match="bad.tar"): D.captions(tmp_path / "bad.tar")


# --- what people's data do

@pytest.mark.parametrize("turn", range(1, 9))
def test_mask_and_box_turn_with_the_photograph(tmp_path, turn):
    "COCO's json speaks of the stored pixels; the row is upright, mask and box still on the white square."
    root, exif = refer_folder(tmp_path), Image.Exif()
    photo, exif[0x0112] = np.zeros((16, 20, 3), np.uint8), turn
    photo[2:10, 2:10] = 255
    file = root / "images/mscoco/images/train2014/COCO_train2014_000000000009.jpg"
    Image.fromarray(photo).save(file, exif=exif.tobytes(), quality=95)
    instances = json.loads((root / "refcoco/instances.json").read_text())
    instances["annotations"][0].update(segmentation=[SQUARE], bbox=[2, 2, 8, 8])
    (root / "refcoco/instances.json").write_text(json.dumps(instances))
    row = D.refer(root)[0]
    white, mask = np.asarray(row["image"].convert("L")) > 128, np.asarray(row["mask"]) > 0
    assert white.shape == mask.shape and (white & mask).sum() > .9 * (white | mask).sum()
    x0, y0, x1, y1 = map(int, row["box"])
    assert mask[y0:y1, x0:x1].all() and mask.sum() == (x1 - x0) * (y1 - y0)


def test_an_outline_of_the_upright_photograph_stays(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = picture(tmp_path / "a.jpg", (20, 16), exif=exif.tobytes())
    assert D.annotation_turn(file, 16, 20) == 6 and D.annotation_turn(file, 20, 16) == 1
    with pytest.raises(ValueError, match="photograph of .20, 16.; wanted .9, 9."): D.annotation_turn(file, 9, 9)
    for exif[0x0112] in range(1, 9):
        file = picture(tmp_path / "a.jpg", (20, 16), exif=exif.tobytes())
        assert D.annotation_turn(file, 16, 20) == exif[0x0112]
        if exif[0x0112] > 4: assert D.annotation_turn(file, 20, 16) == 1
        else:
            with pytest.raises(ValueError, match="wanted .16, 20."): D.annotation_turn(file, 20, 16)


@pytest.mark.parametrize("segmentation", [
    [], [[10, 10, 20, 20]], [SQUARE, [10, 10, 20, 20]], {"size": [16, 20], "counts": [5]}])
def test_a_bad_outline_is_named(tmp_path, segmentation):
    root = refer_folder(tmp_path)
    instances = json.loads((root / "refcoco/instances.json").read_text())
    instances["annotations"][0]["segmentation"] = segmentation
    (root / "refcoco/instances.json").write_text(json.dumps(instances))
    with pytest.raises(ValueError, match="instances.json: annotation 1 on COCO_train2014_000000000009.jpg: got"):
        D.refer(root)


def masks(root, **images):
    for name, image in images.items():
        picture(root / "cat" / f"{name}.jpg", image.size)
        image.save(root / "cat" / f"{name}.png")
    return {Path(r["image"].info["file"]).stem: np.asarray(r["mask"]) > 0 for r in D.fss1000(root)}


def test_one_rule_for_what_is_on(tmp_path):
    on = np.zeros((6, 8), np.uint8)
    on[1:4, 1:5] = 1
    one = Image.fromarray(on)
    palette, white_first = one.copy(), Image.fromarray(1 - on)
    palette.putpalette([0, 0, 0, 128, 0, 0])
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    clear = Image.fromarray(np.dstack([np.full((6, 8, 3), 255, np.uint8), 255 * on]))
    found = masks(tmp_path, one=one, grey=Image.fromarray(255 * on), palette=palette, white=white_first, clear=clear,
                  deep=Image.fromarray(on.astype(np.uint16) * 65535), bits=Image.fromarray(on > 0),
                  colour=palette.convert("RGB"))
    assert all((m == on).all() for m in found.values()), {k: int(m.sum()) for k, m in found.items()}
    edge = np.where(on, 200, 3).astype(np.uint8)
    edge[0, 0], edge[5, 7] = 99, 100
    assert (masks(tmp_path / "2", edge=Image.fromarray(edge))["edge"] == (edge >= 100)).all()
    soft = Image.fromarray(np.where(on, 255, 127).astype(np.uint8))
    for name, image in (("empty", Image.new("L", (8, 6))), ("soft", soft)):
        with pytest.warns(UserWarning, match=f"mask .*{name}.png"): masks(tmp_path / name, **{name: image})


def test_half_as_bright_is_on_and_few_greys_are_not_said(tmp_path):
    "Beside the brightest: half is on; greys are 1/8 to 7/8 of it, and said where they are more than what is on."
    assert masks(tmp_path, half=Image.fromarray(np.uint8([[1, 2, 0]])))["half"].tolist() == [[True, True, False]]
    few = [200] + [180] * 4 + [60] * 3                                   # .9 and .3 of the brightest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, values in (("few", few), ("faint", [200] * 2 + [24] * 6)):
            assert masks(tmp_path / name, **{name: Image.fromarray(np.uint8([values]))})[name].sum() in (5, 2)
    with pytest.warns(UserWarning, match="45% on, 55% grey"): masks(tmp_path / "more", more=Image.fromarray(np.uint8([few + [60] * 3])))


def test_masks_and_files_of_cameras(tmp_path):
    "A mask with an orientation of its own is turned; endings in capitals count, hidden files do not."
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    mask = np.zeros((6, 8), np.uint8)
    mask[:2] = 255
    Image.fromarray(mask).save(tmp_path / "cat/1.png", exif=exif)
    picture(tmp_path / "cat/1.jpg", (6, 8))
    assert (np.asarray(D.fss1000(tmp_path)[0]["mask"]) == np.rot90(mask, -1)).all()
    images, labels = pairs(tmp_path, stems=("a",))
    (images / "a.jpg").rename(images / "a.JPG"), picture(labels / "._a.png", (3, 2))
    assert len(D.index_maps(images, labels, ["a", "b", "c"])) == 1


def test_fss_masks_of_another_size(tmp_path):
    picture(tmp_path / "cat/3.jpg", (64, 48))
    big = np.zeros((96, 128), np.uint8)
    big[20:60, 40:80] = 255
    index_map(tmp_path / "cat/3.png", big)
    with pytest.warns(UserWarning, match="1 masks were resized .*cat/3.png"): ds = D.fss1000(tmp_path)
    assert (np.asarray(ds[0]["mask"]) == big[::2, ::2]).all()


def test_masks_of_two_values_are_no_label_maps(tmp_path):
    images, labels = pairs(tmp_path, (0, 255, 255))
    with pytest.warns(UserWarning, match="0 and 255 only"):
        D.check_rows(D.index_maps(images, labels, ["background", "lesion"]), "semantic")


def test_the_file_of_a_wrong_size_is_named(tmp_path):
    images, labels = pairs(tmp_path)
    index_map(labels / "b_1.png", np.zeros((5, 5), np.uint8))
    rows = D.index_maps(images, labels, ["a", "b", "c"])
    (fault,) = D.row_faults(rows[1], "semantic", ["a", "b", "c"])
    assert "b_1.png" in fault and "(5, 5)" in fault and not list(D.row_faults(rows[0], "semantic", ["a", "b", "c"]))


def test_transparent_photograph_is_white_in_rows(tmp_path):
    images, labels = pairs(tmp_path, stems=("a",))
    (images / "a.jpg").unlink()
    Image.new("RGBA", (3, 2), (0, 0, 0, 0)).save(images / "a.png")
    assert D.index_maps(images, labels, ["a", "b", "c"])[0]["image"].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("change", [
    lambda ds: ds, lambda ds: ds.map(lambda r: {"label_map": r["label_map"]}), lambda ds: ds.shuffle(seed=1),
    lambda ds: ds.with_format("numpy").with_format(None), lambda ds: datasets.concatenate_datasets([ds, ds]),
    lambda ds: pickle.loads(pickle.dumps(ds))])
def test_new_numbers_stay_with_their_names(tmp_path, change):
    ds = change(D.only(D.index_maps(*pairs(tmp_path, stems=("a",)), ["a", "b", "c"]), ["c", "a"]))
    assert D.label_names(ds) == ["c", "a"] and np.asarray(ds[0]["label_map"]).tolist() == [[1, 255, 0]] * 2
    assert np.asarray(D.only(ds, ["a"])[0]["label_map"]).tolist() == [[0, 255, 255]] * 2
    with pytest.raises(ValueError, match="names: got 'b'"): D.only(ds, ["b"])


def test_maps_that_count_differently_do_not_mix(tmp_path):
    images, labels = pairs(tmp_path, (1, 2, 1))
    one, other = D.index_maps(images, labels, ["a", "b"], first=1), D.index_maps(images, labels, ["a", "b", "c"])
    with pytest.raises(ValueError, match="aligned"): datasets.concatenate_datasets([one, other])


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\u2029"])
def test_only_a_newline_ends_a_json_line(tmp_path, mark):
    picture(tmp_path / "0.jpg")
    row = dict(file_name="0.jpg", image="0.jpg", bbox_xywh=[1, 1, 5, 5], caption=f"a{mark}b", expression=f"a{mark}b")
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "m.jsonl").write_bytes(f"{text}\r\n\n{text}".encode())
    assert D.captions(tmp_path / "m.jsonl")["caption"][:] == [f"a{mark}b"] * 2
    assert D.box_expressions(tmp_path / "m.jsonl", tmp_path)["expression"][:] == [f"a{mark}b"] * 2


def test_a_quoted_field_may_hold_a_newline(tmp_path):
    picture(tmp_path / "0.jpg")
    text = '\ufefffile_name,caption\n0.jpg,"a dog, or\ntwo"\n0.jpg,one\n'
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    assert D.captions(tmp_path / "c.csv")["caption"][:] == ["a dog, or\ntwo", "one"]
    (tmp_path / "c.csv").write_text("file_name,caption\n0.jpg\n")
    with pytest.raises(ValueError, match="c.csv record 1: got"): D.captions(tmp_path / "c.csv")


@pytest.mark.parametrize("name", ["cc12m [part 1]", "a*b", "what?", "ünï cöde"])
def test_any_legal_name_of_a_shard(tmp_path, name):
    (tmp_path / name).mkdir()
    tar(tmp_path / name / "0.tar", 2)
    for path in (tmp_path / name, tmp_path / name / "0.tar"):
        assert [r["caption"] for r in D.captions(path, streaming=True)] == ["scene 0", "scene 1"]


def test_box_lines_are_named(tmp_path):
    for i in range(2): picture(tmp_path / f"i/p{i}.jpg")
    (tmp_path / "l").mkdir()
    (tmp_path / "l/p0.txt").write_text("0 0.1 0.1 0.9 0.1 0.9 0.5 0.1 0.5\n")
    (tmp_path / "l/p1.txt").write_text("\n0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(ValueError, match="polygons: p1.txt: line 2: got .*a box"):
        D.coco_polygons(tmp_path / "i", tmp_path / "l", ["x"])


def test_polygons_are_shares_of_the_upright_photograph(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "i/a.jpg", (20, 10), exif=exif.tobytes())
    (tmp_path / "l").mkdir()
    (tmp_path / "l/a.txt").write_text("0 0 0 1 0 1 .5 0 .5\n")
    row = D.check_rows(D.coco_polygons(tmp_path / "i", tmp_path / "l", ["x"]), "semantic")[0]
    found = np.asarray(row["label_map"])
    assert found.shape == (20, 10) and found[:10].all() and not found[10:].any()


# --- the module, and real data

def test_import_is_quiet():
    out = subprocess.run([sys.executable, "-W", "error", "-c", "import lsbook.data"], capture_output=True, text=True)
    assert out.returncode == 0 and not out.stderr, out.stderr


def test_real_camvid():
    root = real("camvid")
    fit, valid = D.camvid(root, "train", ("0006R0", "0001TP")), D.camvid(root, "val", "0016E5")
    D.check_rows(fit, "semantic"), D.check_rows(valid, "semantic")
    assert (len(fit), len(valid), len(D.camvid(root))) == (163, 101, 367) and D.label_names(fit)[3] == "road"
    assert set(np.unique(np.asarray(valid[0]["label_map"]))) <= {*range(11), 255}


def test_real_coco():
    root = real("coco128_seg")
    ours = D.index_maps(root / "images", root / "semantic", ["background", *D.COCO_NAMES])
    tags = json.loads((root / "image_labels.json").read_text())
    files = [Path(p["path"]).name for p in ours.cast_column("image", datasets.Image(decode=False))["image"]]
    assert all(sorted(r["tags"]) == sorted(tags[f]) for r, f in zip(D.tag_rows(ours), files))
    with pytest.warns(UserWarning, match="left out"): drawn = D.coco_polygons(root / "images", root / "polygons")
    paths = drawn.cast_column("image", datasets.Image(decode=False))["image"]
    where = {Path(p["path"]).name: i for i, p in enumerate(paths)}
    agree = [(np.asarray(drawn[where[f]]["label_map"]) == np.asarray(ours[i]["label_map"])).mean()
             for i, f in list(enumerate(files))[:30] if f in where]
    assert min(agree) > .98  # the given maps were drawn by another tool: outlines differ by a pixel


def test_real_voc():
    ds = D.check_rows(D.voc(real("voc")), "semantic")
    assert D.tag_rows(ds)["tags"][:] == [["bottle", "person"], ["chair", "person", "sofa"], ["bus", "car"]]


def test_real_refcoco_expressions():
    ds = D.box_expressions(real("refcoco/refcoco_unc_val.jsonl"))
    assert len(ds) == 10834 and len(set(ds["file_name"])) == 1500 and ds.column_names[1] == "expression"
    assert all(b[2] > b[0] and b[3] > b[1] for b in ds["box"])
