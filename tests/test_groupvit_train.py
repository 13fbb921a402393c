"""Training GroupViT: rows without masks, recipes, the loop, what is measured, claims, and the shipped weights measured again."""
import json
import tarfile
from functools import partial
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lsbook.groupvit.train as T
from lsbook import load, scenes
from lsbook.groupvit.grouping_block import assignment_entropy
from lsbook.groupvit.model import GroupViT, GroupViTConfig, compose
from lsbook.metrics import evaluate
from lsbook.segmenter import METHODS
from lsbook.training import fit, parameter_groups

LITTLE = dict(dim=24, heads=3, width=8, group_tokens=(6,), groups=(6,))


def little(seed=0, **changes):
    torch.manual_seed(seed)
    return GroupViT(GroupViTConfig(**T.small | LITTLE | changes))


def few(steps, **changes):
    r = T.shortened(steps, **LITTLE | changes)
    return r.replace(batch_size=4, warmup=2)


def test_rows_hold_no_mask():
    rows = T.Captions(50, seed=1, split="train", objects="patterned")
    scene = scenes.scene(7, seed=1, split="train", objects="patterned")
    assert len(rows) == 50 and set(rows[7]) == {"image", "caption", "nouns"}
    assert (rows[7]["image"] == scene.image).all() and rows[7]["caption"] == scene.caption and rows[7]["nouns"] == scene.nouns
    for bad in (-1, 50):
        with pytest.raises(IndexError, match="of 50"): rows[bad]


def test_a_training_reads_no_mask(monkeypatch):
    "Masks and label maps of every scene are made unreadable once it is drawn; training does not notice."
    real = scenes.scene
    class Sealed:
        def __init__(self, scene): self._scene = scene
        def __getattr__(self, name):
            assert name in ("image", "caption", "nouns"), f"{name} was read"
            return getattr(self._scene, name)
    monkeypatch.setattr(T.scenes, "scene", lambda *a, **k: Sealed(real(*a, **k)))
    m = little(consistency=1.)
    notes = T.follow(m, T.Captions(20, objects="patterned"), few(3, consistency=1.), every=1)
    assert len(notes) == 3 and all(np.isfinite(n["loss"]) for n in notes)
    with pytest.raises(AssertionError, match="label_map was read"): T.scenes.scene(0).label_map


def test_the_recipes():
    r, p = T.RECIPES["scenes"], T.RECIPES["paper"]
    assert (p.steps, p.batch_size, p.lr, p.weight_decay, p.warmup, p.clip, p.optimizer, p.schedule) == \
        (30 * 6291, 4096, 1.6e-3, .05, 5 * 6291, 5., "adamw", "cosine")
    assert p.config == dict(cached=256) and p.rows is T.shards and T.EPOCH == (11_156_203 + 14_615_499) // 4096
    assert (r.steps, r.lr, r.batch_size, r.weight_decay, r.warmup, r.clip) == (1250, 2e-3, 32, .05, 50, 1.) and r.rows is T.scene_rows
    c = GroupViTConfig(**r.config)
    assert (c.assign, c.scores, c.eps, c.loss, c.text, c.stem, c.consistency) == ("soft", "cosine", .1, "nouns", "words", "conv", 1.)
    assert not (c.mixer or c.pre_assign or c.residual or c.augment or c.init or c.projector or c.auxiliary)
    train, valid = r.rows()
    assert len(train) == 100_000 and c.image_size == c.short_side == 96 and T.small["image_size"] == 64
    assert train.kind["objects"] == "patterned" and train.kind["split"] == "train" and "label_map" in valid.column_names
    assert valid[0]["image"].size == (64, 64) and len(valid) == 200
    spared = {n for g in parameter_groups(GroupViT(c), r) if g["weight_decay"] == 0 for n in g["names"]}
    assert {"image.positions", "image.stages.0.tokens", "log_scale"} <= spared and "text.encoder.tower.table" not in spared


def shard(path, n=6):
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            s, b = scenes.scene(i), BytesIO()
            Image.fromarray(s.image).resize((80, 70)).save(b, "PNG")
            for name, data in ((f"{i}.png", b.getvalue()), (f"{i}.txt", s.caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def test_two_steps_of_the_papers_recipe_at_full_size(tmp_path):
    for name in ("cc12m", "yfcc14m"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar")
    rows, valid = T.shards(str(tmp_path))
    assert valid is None and set(next(iter(rows))) == {"image", "caption"}
    r = T.RECIPES["paper"].replace(steps=2, batch_size=4, warmup=0, eval_every=2, precision="fp32", config=dict(cached=2))
    torch.manual_seed(0)
    m = GroupViT(GroupViTConfig(**r.config))
    before = m.image.stages[0].tokens.detach().clone()
    got = fit(m, rows, None, r)
    assert np.isfinite([h["loss"] for h in got.history]).all() and not torch.equal(before, m.image.stages[0].tokens.cpu())


def test_shortened():
    r = T.shortened(7, consistency=0.)
    assert (r.steps, r.eval_every, r.config["consistency"], r.warmup) == (7, 7, 0., 50)
    assert r.config["image_size"] == r.config["short_side"] == 64 and T.shortened(7, image_size=96).config["image_size"] == 96
    assert T.shortened(7, group_tokens=(0,), groups=(0,)).no_decay == ("image.positions",)


def test_the_loop_is_that_of_fit():
    rows, r = T.Captions(40, seed=1, objects="patterned"), few(4, consistency=1.)
    a, b = little(consistency=1.), little(consistency=1.)
    notes = T.follow(a, rows, r, every=1)
    got = fit(b, rows, None, r)
    assert all(torch.allclose(x.cpu(), y.cpu(), atol=1e-6) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert [n["loss"] for n in notes] == pytest.approx([h["loss"] for h in got.history], rel=1e-4)
    assert [n["step"] for n in notes] == [1, 2, 3, 4] and not a.training
    assert all(0 < n["entropy"] < 1 and 0 < n["used"] <= 1 for n in notes)


def test_notes_are_means_since_the_last():
    rows, r = T.Captions(40, seed=1, objects="patterned"), few(5)
    each, two = T.follow(little(), rows, r, every=1), T.follow(little(), rows, r, every=2)
    assert [n["step"] for n in two] == [2, 4, 5]
    assert two[0]["loss"] == pytest.approx((each[0]["loss"] + each[1]["loss"]) / 2, rel=1e-4)
    assert two[2]["loss"] == pytest.approx(each[4]["loss"], rel=1e-4)
    assert len(T.follow(little(), rows, r, every=1, stop=lambda n: n["step"] == 2)) == 2


def test_a_loss_that_is_not_finite_stops_the_run():
    m = little()
    with torch.no_grad(): m.log_scale.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 2"):
        T.follow(m, T.Captions(20, objects="patterned"), few(4), every=2)
    with pytest.raises(FloatingPointError, match="not a finite number at step 1"):
        fit(m, T.Captions(20, objects="patterned"), None, few(4))


def test_used():
    shares = torch.tensor([[[.9, .8, .4], [.1, .2, .3], [.0, .0, .3]], [[.9, .1, .2], [.1, .8, .2], [.0, .1, .6]]])
    assert T.used(shares) == pytest.approx((1 / 3 + 1) / 2)


def test_clusters():
    x = torch.cat([torch.zeros(5, 2), torch.ones(7, 2) * 4, torch.tensor([[0., 9.]]).expand(3, 2)])
    found = T.clusters(x, 3, seed=1)
    assert len(set(found[:5].tolist())) == len(set(found[5:12].tolist())) == len(set(found[12:].tolist())) == 1
    assert torch.equal(T.clusters(x, 3, seed=1), found)
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 255
    for place in (0., .1): assert len(np.unique(np.asarray(T.colour_clusters(image, 2, place))[:, :4])) == 1
    assert T.colour_clusters(image, 2, 0., (4, 2)).shape == (4, 2)


@torch.no_grad()
def test_readouts():
    m = little().eval()
    e = m.encode_image(scenes.scene(0, objects="patterned").image)
    text = m.encode_text(scenes.label_names())
    got = T.readouts(m, e, text, 4)
    assert set(got) == {"groups", "groups, hard", "tokens", "colour clusters", "colour and place"}
    assert torch.equal(got["groups"], m.label_map(e, text)) and set(T.readouts(m, e, text, 0)) == {"groups", "groups, hard", "tokens"}
    one = T.readouts(m, e, text, 1)["colour clusters"]                 # one cluster: one label
    assert len(one.unique()) == 1
    alone = m.unit(m.image.alone(e.features["tokens"][None]))[0]
    q = (m.scale * alone @ text.T).softmax(-1).T.view(-1, 16, 16)
    assert torch.equal(got["tokens"], m.to_image_size(q, e).argmax(0))


def test_measure():
    m = little()
    rows = scenes.rows("semantic", 5, split="valid", objects="patterned")
    names = scenes.label_names()
    got = T.measure(m, rows, names, 4)
    assert got["groups"] == pytest.approx(evaluate(m.eval(), rows)["mIoU"], abs=1e-6)
    e = m.encode_image(rows[0]["image"]).features["maps"][0].flatten(1)
    assert 0 < got["used"] <= 1 and 0 <= got["backgrounds"] <= 1
    one = T.measure(m, [rows[0]], names, 0)
    assert one["entropy"] == pytest.approx(float(assignment_entropy(compose([e]))), abs=1e-5)


def test_every_variant_builds_and_trains():
    rows = list(T.Captions(4, objects="patterned")[i] for i in range(4))
    for name, changes in T.VARIANTS.items():
        m = GroupViT(GroupViTConfig(**T.shortened(1, **changes).config))
        loss = m(**m.collate(rows)).loss
        assert torch.isfinite(loss), name


def test_claims_are_kept_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "RECIPES", {"scenes": T.RECIPES["scenes"].replace(batch_size=2)})
    path, rows = tmp_path / "claims.json", T.Captions(10, seed=1, objects="patterned")
    monkeypatch.setattr(T, "measure", lambda *a: dict(groups=.5))
    monkeypatch.setitem(METHODS, "groupvit", METHODS.get("groupvit") or next(iter(METHODS.values()))._replace(cls="lsbook.groupvit.model:GroupViT"))
    runs = T.claims(path, steps=2, seeds=(0,), variants=("groups", "two stages, late"), rows=rows)
    assert [r["variant"] for r in runs] == ["groups", "two stages, late"] and json.loads(path.read_text()) == json.loads(json.dumps(runs))
    assert all({"code", "command", "device", "cpu_seconds", "torch", "notes", "seed", "steps", "changes"} <= set(r) for r in runs)
    assert [n["step"] for n in runs[1]["notes"]] == [1, 2]
    monkeypatch.setattr(T, "follow", None)
    assert T.claims(path, steps=2, seeds=(0,), variants=("groups",), rows=rows) == json.loads(json.dumps(runs))


def test_shipped_weights_do_what_their_metadata_say():
    "On 40 of the 500 test scenes; and they are what the recipe makes, in a small file."
    folder = files("lsbook") / "weights"
    told = json.loads((folder / "groupvit.json").read_text(encoding="utf-8"))
    assert (folder / "groupvit.safetensors").stat().st_size < 4e6
    assert told["config"] == json.loads(json.dumps(told["recipe"]["config"])) | {k: told["config"][k] for k in told["config"].keys() - told["recipe"]["config"].keys()}
    r = json.loads(json.dumps(T.RECIPES["scenes"].as_dict()))
    assert {k: told["recipe"][k] for k in ("steps", "batch_size", "lr", "rows", "seed", "config")} == {k: r[k] for k in ("steps", "batch_size", "lr", "rows", "seed", "config")}
    said = told["metrics"]
    assert said["mIoU"] >= .6 and said["mIoU/plain"] >= .55 and said["mIoU"] >= said["mIoU/tokens"] and said["segments used"] >= .5
    m = load("groupvit")
    for objects, key in (("patterned", "mIoU"), ("plain", "mIoU/plain")):
        got = T.measure(m, scenes.rows("semantic", 40, split="test", objects=objects), scenes.label_names(), 0)
        assert abs(got["groups"] - said[key]) < .08 and got["used"] > .4, objects


def test_claims_are_complete():
    "Three seeds of each variant at each number of steps, each run with what made it; the config's change as the code has it."
    runs = json.loads((Path(__file__).resolve().parent.parent / "nbs" / "groupvit" / "claims.json").read_text(encoding="utf-8"))
    made = {}
    for r in runs: made.setdefault((r["variant"], r["steps"]), []).append(r)
    for (variant, steps), found in made.items():
        assert sorted(r["seed"] for r in found) == [0, 1, 2], (variant, steps)
        assert all(r["changes"] == json.loads(json.dumps(T.VARIANTS[variant])) and r["precision"] == "fp32" for r in found)
        assert all({"device", "torch", "code", "command", "groups", "tokens", "used", "entropy"} <= r.keys() for r in found)
        assert all(r["notes"][-1]["step"] == steps for r in found)
    assert {("groups", 1600), ("no consistency", 1600), ("no groups", 1600)} <= made.keys()
