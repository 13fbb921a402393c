"""Training VG-LAW: the recipes' numbers, the first stage, real rows, claims, and a short training that learns."""
import json
from dataclasses import asdict
from functools import partial
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lsbook.vglaw.train as T
from lsbook import evaluate, load, scenes
from lsbook.images import box_of
from lsbook.step.train import Expressions, refer_rows, scene_rows, words_of
from lsbook.training import fit, optimizer, parameter_groups, recipe, recipe_from
from lsbook.training import train as train_
from lsbook.vglaw.model import VGLAW, VGLAWConfig
from test_step import refer_folder

SMALL = T.small | dict(text_dim=32, text_layers=1, dim=32, depth=2, heads=4, groups=4, hidden=8, rank=4, key_dim=8, head_dim=16,
                       global_blocks=(0, 1))


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return VGLAW(VGLAWConfig(**SMALL | changes))


def test_the_recipes_are_as_printed():
    r = recipe("vglaw", "paper")
    assert (r.optimizer, r.lr, r.weight_decay, r.batch_size, r.clip, r.precision) == ("adamw", 4e-4, 1e-4, 256, .15, "fp32")
    assert r.lr_scale == {"text.": .1, "trunk.": .1} and r.schedule == "cosine" and r.config == {} and r.first is None
    assert (r.steps, r.warmup, r.eval_every, r.accumulate) == (42406, 4711, 471, 8)
    assert (r.rows.func, r.rows.args) == (refer_rows, ("refcoco", "unc"))
    c = VGLAWConfig()
    assert (c.text_layers, c.max_tokens, c.long_side, c.window, c.global_blocks, c.drop_path) == (6, 40, 448, 14, (2, 5, 8, 11), .1)
    assert (c.groups, c.hidden, c.rank, c.key_dim, c.head_dim) == (12, 48, 32, 64, 256) and c.threshold == .35 and c.flip
    assert (c.l1, c.giou, c.focal, c.dice, c.bce) == (1, 1, 4, 4, 0)


def test_the_books_own_recipes():
    r, first = recipe("vglaw"), T.LABELS
    assert (r.steps, r.batch_size, r.lr, r.weight_decay, r.warmup, r.clip, r.eval_every) == (4000, 16, 2e-3, .02, 150, 1., 200)
    assert r.lr_scale == {"trunk.": .3} and r.rows is scene_rows and r.first is T.from_labels and r.config["weights"] == "vglaw-trunk"
    assert r.no_decay == ("trunk.pos_embed", "language.aggregate", "text.model.embeddings")
    assert (first.steps, first.batch_size, first.lr, first.weight_decay, first.warmup, first.clip, first.eval_every) == (600, 32, 2e-3, .02, 30, 1., 200)
    assert first.no_decay == ("trunk.pos_embed",) and first.config == T.small and first.rows is T.label_rows and first.lr_scale == {}
    c = VGLAWConfig(**r.config)
    assert (c.stem, c.dim, c.depth, c.heads, c.mlp_ratio, c.window, c.drop_path, c.final_norm) == ("conv", 128, 4, 4, 2., 8, 0., True)
    assert (c.groups, c.hidden, c.rank, c.key_dim, c.head_dim, c.text_dim, c.text_layers) == (4, 32, 32, 64, 96, 128, 2)
    assert (c.focal, c.dice, c.bce, c.l1, c.giou, c.flip, c.threshold) == (0, 1, 1, 1, 1, False, .5) and c.global_blocks == (0, 1, 2, 3)
    card = json.loads((files("lsbook") / "weights/vglaw.json").read_text(encoding="utf-8"))
    free = {"notes", "first", "rows"}
    assert {k: v for k, v in r.as_dict().items() if k not in free} == \
        {k: v for k, v in recipe_from(card["recipe"]).as_dict().items() if k not in free}
    assert recipe_from(r.as_dict()).first is T.from_labels


def test_vectors_are_spared_weight_decay():
    r = recipe("vglaw").replace(config=SMALL)
    groups = parameter_groups(small(), r)
    spared = {n for g in groups for n in g["names"] if g["weight_decay"] == 0}
    assert {"trunk.pos_embed", "language.aggregate.embedding"} <= spared and any(n.startswith("text.model.embeddings.word") for n in spared)
    assert not any(n.endswith("qkv.weight") or n == "language.P" for n in spared)
    assert {g["lr"] for g in groups if any(n.startswith("trunk.") for n in g["names"])} == {6e-4}


def test_shortened():
    full, r = recipe("vglaw"), T.shortened(200, adaptive=False)
    assert (r.steps, r.warmup, r.eval_every) == (200, 20, 200) and r.config == full.config | dict(adaptive=False)
    assert r.no_decay == ("trunk.pos_embed", "text.model.embeddings") and T.shortened(50, pooling="average").no_decay == full.no_decay
    assert r.lr == full.lr and r.first is full.first


def test_the_first_stage_shows_other_scenes():
    rows, valid = T.label_rows()
    assert len(rows) == 100_000 and valid is None
    x = scenes.scene(5, seed=7, split="train")
    assert (rows[5]["image"] == x.image).all() and (rows[5]["label_map"] == x.label_map).all()
    assert (rows[5]["image"] != scene_rows()[0][5]["image"]).any()
    with pytest.raises(IndexError, match="row 100000 of 100000"): rows[100_000]
    with pytest.raises(IndexError): rows[-1]


def test_the_stage_trains_what_it_shares():
    model = small()
    stage = T.LabelPretraining(model, scenes.label_names())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(stage, T.LabelMaps(50, seed=7), None, T.LABELS.replace(steps=2, batch_size=2, warmup=0, config=SMALL))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("trunk.blocks") for k in moved) and any(k.startswith("mask.enlarge") for k in moved)
    assert all(k.startswith(("trunk.", "mask.enlarge.")) for k in moved)


def test_object_accuracy_leaves_grounds_out():
    stage = T.LabelPretraining(small(), scenes.label_names())
    rows = [T.LabelMaps(9, seed=7)[i] for i in range(3)]
    truth = nn.functional.interpolate(torch.from_numpy(np.stack([r["label_map"] for r in rows]))[:, None].float(), (16, 16), mode="nearest-exact")[:, 0].long()
    n = len(scenes.label_names())
    stage.label.names, stage.label.pixel = torch.eye(n), nn.Identity()
    answer = lambda labels: setattr(stage, "maps", lambda images: nn.functional.one_hot(labels, n).movedim(-1, 1).float())
    answer(truth)
    assert T.object_accuracy(stage, rows) == 1
    answer(torch.where(truth < 4, 9, truth))                 # wrong about every ground: no matter
    assert T.object_accuracy(stage, rows) == 1
    answer(torch.where(truth >= 4, 0, truth))
    assert T.object_accuracy(stage, rows) == 0
    k = int(truth[truth >= 4].min())                         # the first label that is no ground counts
    answer(torch.full_like(truth, k))
    share = float((truth == k).sum() / (truth >= k).sum())
    assert T.object_accuracy(stage, rows, grounds=k) == pytest.approx(share) and 0 < share < 1


def test_the_first_stage_resumes_and_is_not_repeated(tmp_path, capsys):
    r = T.LABELS.replace(steps=4, batch_size=2, eval_every=2, warmup=0, config=SMALL)
    whole = load_file(T.pretrain(tmp_path / "whole", r))
    (tmp_path / "cut").mkdir()
    torch.manual_seed(r.seed)
    model = VGLAW(VGLAWConfig(**SMALL))
    def stop(*_):
        if stop.steps == 3: raise RuntimeError("cut off")
        stop.steps += 1
    stop.steps, hook = 0, model.trunk.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="cut off"):
        fit(T.LabelPretraining(model, scenes.label_names()), *r.rows(), r, tmp_path / "cut")
    capsys.readouterr()
    with pytest.raises(FileExistsError, match="holds checkpoints up to checkpoint-2"): T.pretrain(tmp_path / "cut", r)
    path = T.pretrain(tmp_path / "cut", r, resume=True)
    assert "resuming from checkpoint-2" in capsys.readouterr().out and path.name == "trunk.safetensors"
    again = load_file(path)
    assert all(torch.equal(again[k], whole[k]) for k in whole) and set(again) == set(whole)
    assert {"trunk.pos_embed", "mask.enlarge.0.weight"} <= set(again)
    assert all(k.startswith(("trunk.", "mask.enlarge.")) for k in again) and again["trunk.pos_embed"].dtype is torch.half
    path.write_bytes(path.read_bytes())
    changed = path.stat().st_mtime_ns
    assert T.pretrain(tmp_path / "cut", r.replace(notes="x")) == path and path.stat().st_mtime_ns == changed and not capsys.readouterr().out
    for other, says in ((r.replace(seed=5), "seed"), (r.replace(config=SMALL | dict(dim=64)), "config")):
        with pytest.raises(ValueError, match=f"of another {says}; wanted"): T.pretrain(tmp_path / "cut", other)


def test_a_whole_run_makes_its_trunk_first(tmp_path, monkeypatch):
    "`lsbook train vglaw`: both stages, the first in <out>/labels, with the run's sizes and seed; the second run finds it there."
    monkeypatch.setattr(T, "LABELS", T.LABELS.replace(steps=1, batch_size=2, eval_every=1, warmup=0))
    rows = lambda root=None: (Expressions(20, each=2), scenes.rows("referring", 4, split="valid"))
    r = recipe("vglaw").replace(scale="few", rows=rows, steps=1, batch_size=2, warmup=0, eval_every=1, lr=1e-9, weight_decay=0.,
                                config=SMALL | dict(weights="vglaw-trunk"))
    got = train_(r, tmp_path)
    trunk, model = load_file(tmp_path / "labels/trunk.safetensors"), load(tmp_path)
    key = "trunk.blocks.0.attn.qkv.weight"
    assert torch.allclose(model.state_dict()[key], trunk[key].float(), atol=1e-4)
    told = json.loads(got.weights.with_suffix(".json").read_text())["recipe"]
    assert told["config"]["weights"] == "vglaw-trunk" and told == r.as_dict()      # no path of this machine
    first = json.loads((tmp_path / "labels/recipe.json").read_text())
    assert first["seed"] == r.seed and first["config"] == json.loads(json.dumps(SMALL))
    assert train_(r, tmp_path, resume=True).metrics.keys() == got.metrics.keys()
    assert len(list((tmp_path / "labels").glob("checkpoint-*"))) == 1
    with pytest.raises(ValueError, match="of another seed"): train_(r.replace(seed=9), tmp_path, resume=True)
    deaf = r.replace(seed=4, config=r.config | dict(adaptive=False, tasks=["box"], dim=16, rank=2))
    train_(deaf, tmp_path / "deaf")                       # another width, no words in the backbone, no mask head (which the first stage has)
    trunk, model = load_file(tmp_path / "deaf/labels/trunk.safetensors"), load(tmp_path / "deaf")
    assert torch.allclose(model.state_dict()[key], trunk[key].float(), atol=1e-4) and model.config.dim == 16 and not hasattr(model, "language")
    for wrong, says in ((dict(heads=5), "heads: got 5"), (dict(long_side=60), "long_side: got 60"), (dict(widht=3), "widht")):
        with pytest.raises(ValueError, match=says): train_(r.replace(config=r.config | wrong), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_trunk_that_is_named_is_taken(tmp_path):
    r = recipe("vglaw")
    for weights in ("mine.safetensors", None):
        mine = r.replace(config=r.config | dict(weights=weights, adaptive=False), no_decay=(*r.no_decay, "box."))
        assert T.from_labels(tmp_path, mine) == mine.replace(no_decay=("trunk.pos_embed", "text.model.embeddings", "box."))
    assert not list(tmp_path.iterdir())


def test_real_rows_train_boxes_and_masks(tmp_path):
    "Twenty steps of the paper's recipe, flips and focal loss included, on RefCOCO's layout."
    root, known = refer_folder(tmp_path, 4), recipe("vglaw", "paper")
    instances = json.loads((root / "refcoco/instances.json").read_text())
    for i, a in enumerate(instances["annotations"]):         # true boxes, as x, y, width, height
        x = scenes.scene(i, size=80)
        x0, y0, x1, y1 = box_of(x.things[x.expressions()[0][1]].mask[:70])
        a["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    (root / "refcoco/instances.json").write_text(json.dumps(instances))
    train, valid = known.rows(root)
    config = dict(words=words_of(train), text_dim=32, text_layers=1, dim=48, depth=2, heads=4, window=4, global_blocks=(1,), groups=4,
                  hidden=8, rank=4, key_dim=16, head_dim=16, long_side=128)
    torch.manual_seed(0)
    model = VGLAW(VGLAWConfig(**config))
    got = fit(model, train, valid, known.replace(steps=20, batch_size=4, accumulate=1, warmup=2, eval_every=20, lr=4e-3))
    losses = got.series("loss")[1]
    assert losses[-1] < .9 * losses[0] and "box Prec@0.5" in got.metrics
    batch = model.eval().collate([train[i] for i in range(4)])
    x0, y0, x1, y1 = train[0]["box"]
    assert torch.allclose(batch["boxes"][0], torch.tensor([(x0 + x1) / 160, (y0 + y1) / 160, (x1 - x0) / 80, (y1 - y0) / 80]))
    one = model.segment(train[0]["image"], train[0]["expression"])
    assert one.mask.shape == (70, 80) and len(one.box) == 4


def test_claims_say_how_they_were_made(tmp_path, monkeypatch):
    seen, changed = [], []
    def short(steps, **changes):
        changed.append(changes)
        config = T.RECIPES["scenes"].config | SMALL | changes
        return T.RECIPES["scenes"].replace(steps=steps, batch_size=2, warmup=0, eval_every=steps, no_decay=(), lr_scale={}, config=config)
    def few(task, n, **kind): return rows(task, 4, **kind)
    def watched(n, **kind): return seen.append(kind) or Expressions(n, **kind)
    rows = scenes.rows
    monkeypatch.setattr(T, "shortened", short), monkeypatch.setattr(scenes, "rows", few), monkeypatch.setattr(T, "Expressions", watched)
    trunk = T.pretrain(tmp_path / "labels", T.LABELS.replace(steps=1, batch_size=2, eval_every=1, warmup=0, config=SMALL))
    runs = T.claims(tmp_path / "claims.json", steps=1, seeds=(3,), trunk=trunk)
    assert [r["variant"] for r in runs] == list(T.VARIANTS) and [k["blank"] for k in seen] == [v == "no words" for v in T.VARIANTS]
    assert all(k["split"] == "train" for k in seen) and changed == list(T.VARIANTS.values())
    for r in runs:
        assert r["seed"] == 3 and r["steps"] == 1 and r["changes"] == T.VARIANTS[r["variant"]] and "mIoU" in r
        assert {"code", "command", "precision", "device", "torch", "cpu_seconds"} <= set(r)
    assert len(T.claims(tmp_path / "claims.json", steps=1, seeds=(3,), trunk=trunk)) == len(T.VARIANTS) == len(seen)   # none again


def test_variants_change_what_they_say():
    kept = asdict(VGLAWConfig(**T.small))
    for name, changes in T.VARIANTS.items():
        now = asdict(VGLAWConfig(**T.small | changes))
        assert {k for k in now if now[k] != kept[k]} == set(changes), name
    assert T.VARIANTS["static backbone"] == dict(adaptive=False) and T.VARIANTS["weights only"] == dict(heads_read=False)
    assert T.VARIANTS["box only"] == dict(tasks=("box",)) and T.VARIANTS["mask only"] == dict(tasks=("mask",))


def test_paths_read_different_texts():
    assert [T.attribute_kind(t) for t in ("the red thing", "the star", "the red star")] == ["colour", "shape", "both"]
    model, rows = load("vglaw"), list(scenes.rows("referring", 12, split="valid"))
    blank = lambda part: [r | dict(expression=T.BLANK) for r in part]
    assert T.score_paths(model, rows, T.blank, T.blank)["mIoU"] == pytest.approx(evaluate(model, blank(rows))["mIoU"], abs=1e-6)
    assert list(T.PATHS) == ["text / text", "the thing / text", "text / the thing", "the thing / the thing", "Delta W = 0 / text"]
    assert [T.PATHS[k] for k in T.PATHS] == [(T.same, T.same), (T.blank, T.same), (T.same, T.blank), (T.blank, T.blank), (None, T.same)]
    weights, heads = T.score_paths(model, rows, T.same, T.blank)["mIoU"], T.score_paths(model, rows, T.blank, T.same)["mIoU"]
    assert weights > heads + .1 and T.score_paths(model, rows, None, T.same)["mIoU"] < weights
    assert T.score_paths(model, rows, None, T.same)["mIoU"] != heads         # no words at all is not "the thing"
    assert [r["kind"] for r in T.with_attribute_kinds(rows)] == [T.attribute_kind(r["expression"]) if r["kind"] == "attribute" else r["kind"] for r in rows]
