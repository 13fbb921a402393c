"Runs that are killed, runs in two processes, and what fit refuses. Run as a script it is the process that gets killed."
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

from lsbook import load, metrics, scenes, segmenter, training
from lsbook.scenes import label_names, rows
from lsbook.segmenter import ReferringSegmenter, SemanticSegmenter
from lsbook.images import to_image
from lsbook.training import (Batches, Progress, Recipe, Stream, checkpoint_fault, experiments, fit, new_model, newest_checkpoint,
        optimizer, parameter_groups, recipe, recipe_from, schedule)
from lsbook.training import train as train_


@dataclass(frozen=True)
class Config:
    labels: tuple = tuple(label_names())
    long_side: int = 64


class Tiny(SemanticSegmenter):
    "A few convolutions with everything that a resumed run could get wrong: batch norm, dropout, random augmentation"
    method, task = "tiny", "semantic"

    def __init__(self, config: Config, noise=.1, dropout=.2):
        super().__init__()
        self.config, self.noise = config, noise
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8) if noise else nn.Identity(), nn.ReLU(),
                                 nn.Dropout(dropout), nn.Conv2d(8, len(config.labels), 1))

    def image_features(self, x): return self.net(x)
    def encode_text(self, labels): return torch.tensor([self.config.labels.index(s) for s in labels])
    def label_map(self, encoded, text): return self.to_image_size(encoded.features[text], encoded).argmax(0)

    def collate(self, rows):
        x, _ = self.preprocess([to_image(r["image"]) for r in rows])
        y = torch.stack([torch.from_numpy(np.array(r["label_map"])).long() for r in rows])
        noise = self.noise * self.training           # as the book's methods: evaluation mode augments nothing
        if noise and random.random() < .5: x, y = x.flip(-1), y.flip(-1)
        return dict(pixel_values=x + noise * torch.randn_like(x) * np.random.rand(), label_map=y, texts=["some", "words"])

    def forward(self, pixel_values, label_map, texts):
        assert texts == ["some", "words"]
        logits = nn.functional.interpolate(self.net(pixel_values), label_map.shape[-2:])
        return dict(loss=nn.functional.cross_entropy(logits, label_map, ignore_index=255), logits=logits)


RECIPE = Recipe("tiny", steps=24, batch_size=8, lr=1e-2, eval_every=8, weight_decay=.01, warmup=3, clip=1.)


def data(): return rows("semantic", 20, split="train"), rows("semantic", 5, split="valid")


def small_rows(root=None): return data()


def entry(cls="test_training:Tiny"):
    "What METHODS holds for Tiny, in the form of its other entries."
    other = segmenter.METHODS["lseg"]
    return other._replace(cls=cls) if hasattr(other, "_replace") else cls


def tiny(**more):
    torch.manual_seed(0)
    return Tiny(Config(), **more)


def state(model): return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def child(out, die, what):
    "Train into `out`; end by SIGKILL in the forward pass of step `die`, or while the checkpoint of step `die` is written."
    model, (train, valid) = tiny(), data()
    if what == "forward":
        passes = [0]
        def count(*_):
            passes[0] += model.training
            if passes[0] == die: os.kill(os.getpid(), signal.SIGKILL)
        model.register_forward_pre_hook(count)
    if what == "save":
        write = torch.save
        def cut(obj, f, *a, **k):
            if Path(f).parent.name == f"checkpoint-{die}" and Path(f).name == "optimizer.pt":
                Path(f).write_bytes(b"PK half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(obj, f, *a, **k)
        torch.save = cut
    if what == "plain":                # no augmentation, no dropout, no batch norm: the number of processes changes nothing
        model = tiny(noise=0, dropout=0.)
    got = fit(model, train, valid, RECIPE, out=out)
    if int(os.environ.get("RANK", 0)) == 0:
        save_model(model, str(Path(out) / "final.safetensors"))
        (Path(out) / "metrics.json").write_text(json.dumps(got.metrics))
    if what == "plain":                # and a whole run, which ends with a measurement that all processes share
        segmenter.METHODS["tiny"] = entry("__main__:Tiny")
        train_(RECIPE.replace(steps=2, batch_size=4, rows=small_rows), Path(out) / "run")


def launch(*args, before=(sys.executable,)):
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=str(Path(__file__).parents[1]))
    return subprocess.run([*before, __file__, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole():
    model = tiny()
    return fit(model, *data(), RECIPE), state(model)


def test_same_seed_same_weights_and_another_seed_others(whole):
    got, before = whole
    model = tiny()
    again = fit(model, *data(), RECIPE)
    assert same(before, state(model))
    assert json.dumps(again.metrics) == json.dumps(got.metrics) and not model.training
    model = tiny()
    fit(model, *data(), RECIPE.replace(seed=1))
    assert not same(before, state(model))


def test_history_and_metrics(whole):
    got, _ = whole
    assert [r["step"] for r in got.history] == list(range(1, 25))
    assert [r["step"] for r in got.history if "mIoU" in r] == [8, 16, 24]
    assert {"mIoU", "IoU/grass"} <= set(got.metrics) and "loss" not in got.metrics
    assert got.history[-1]["loss"] < got.history[0]["loss"] and got.seconds > 0
    assert max(r["lr"] for r in got.history) == RECIPE.lr
    assert got.series("mIoU")[0] == [8, 16, 24]
    with pytest.raises(ValueError, match="name: got 'nothing'; the history has .*mIoU"): got.series("nothing")
    assert got.curves() is not None and got.curves("lr") is not None


@pytest.mark.parametrize("die, what", [(13, "forward"), (16, "save")])
def test_killed_and_resumed_equals_not_killed(whole, tmp_path, capsys, die, what):
    got = launch(tmp_path, die, what)
    assert got.returncode == -signal.SIGKILL, got.stderr
    model = tiny().eval()
    resumed = fit(model, *data(), RECIPE, out=tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "resuming from" in said and "checkpoint-8" in said
    assert ("checkpoint-16 is incomplete" in said) == (what == "save")
    assert same(whole[1], state(model))
    assert json.dumps(resumed.metrics) == json.dumps(whole[0].metrics) and [r["step"] for r in resumed.history] == list(range(1, 25))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-24"]


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, capsys):
    model, passes = tiny(), [0]
    def interrupt(*_):
        passes[0] += model.training
        if passes[0] == 11: signal.raise_signal(signal.SIGINT)
    model.register_forward_pre_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 11.*resume=True.*checkpoint-11"): fit(model, *data(), RECIPE, out=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and not model.training
    model = tiny()
    fit(model, *data(), RECIPE, out=tmp_path, resume=True)
    assert "checkpoint-11" in capsys.readouterr().out
    assert same(whole[1], state(model))
    model = tiny()                     # a finished run: nothing left to do, the weights are those of its end
    fit(model, *data(), RECIPE, out=tmp_path, resume=True)
    assert same(whole[1], state(model))
    with pytest.raises(FileExistsError, match="out: .*checkpoint-24"): fit(tiny(), *data(), RECIPE, out=tmp_path)
    with pytest.raises(ValueError, match="recipe: .*lr.*0.01 -> 0.02"):
        fit(tiny(), *data(), RECIPE.replace(lr=.02), out=tmp_path, resume=True)
    assert len(fit(tiny(), *data(), RECIPE.replace(steps=26, warmup=2), out=tmp_path, resume=True).history) == 26
    with pytest.raises(ValueError, match="recipe: .*warmup"): fit(tiny(), *data(), RECIPE.replace(steps=26), out=tmp_path, resume=True)


def test_resume_on_nothing_starts_and_says_so(tmp_path, capsys):
    out = tmp_path / "new"
    got = fit(tiny(), data()[0], None, RECIPE.replace(steps=2), out=out, resume=True)
    assert "nothing to resume" in capsys.readouterr().out
    assert got.metrics == {} and newest_checkpoint(out).name == "checkpoint-2"
    with pytest.raises(ValueError, match="resume: .*wanted out"): fit(tiny(), *data(), RECIPE, resume=True)


def test_incomplete_checkpoints_are_told(tmp_path):
    fit(tiny(), data()[0], None, RECIPE.replace(steps=2), out=tmp_path)
    c = tmp_path / "checkpoint-2"
    assert checkpoint_fault(c) == ""
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "model.safetensors", "scheduler.pt"):
        whole = (c / name).read_bytes()
        (c / name).unlink()
        assert name in checkpoint_fault(c)
        (c / name).write_bytes(whole[:len(whole) // 2])
        assert checkpoint_fault(c) == f"{name} is missing or cut short"
        said = []
        assert newest_checkpoint(tmp_path, said.append) is None and "checkpoint-2 is incomplete" in said[0]
        (c / name).write_bytes(whole)
    assert checkpoint_fault(c) == ""


def test_not_a_number_names_the_step(tmp_path):
    model, passes = tiny(), [0]
    def spoil(module, args, out):
        passes[0] += module.training
        if passes[0] == 13: out["loss"] = out["loss"] * float("nan")
    model.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="at step 13"): fit(model, *data(), RECIPE.replace(steps=24), out=tmp_path)
    assert newest_checkpoint(tmp_path).name == "checkpoint-8"


def test_two_processes_equal_one(tmp_path):
    "The same rows in the same order, half to each process: the averaged gradient, hence the weights, are those of one process."
    # accelerate starts several processes with --multi_gpu alone; without GPUs they talk through gloo
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    got = launch(tmp_path, 0, "plain", before=accelerate)
    assert got.returncode == 0, got.stderr[:3000]
    model = tiny(noise=0, dropout=0.)
    alone = fit(model, *data(), RECIPE)
    two = load_file(tmp_path / "final.safetensors")
    assert max(float((v - two[k]).abs().max()) for k, v in model.state_dict().items()) < 1e-4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert abs(metrics["mIoU"] - alone.metrics["mIoU"]) < .01
    assert len(list((tmp_path / "checkpoint-24").glob("rng_state_*.pth"))) == 2
    told = json.loads((tmp_path / "run" / "tiny.json").read_text())
    assert told["measured_on"] == "500 test scenes" and told["versions"]["processes"] == 2 and got.stdout.count("parameters to train") == 1


def test_bf16_and_accumulation():
    model = tiny()
    got = fit(model, data()[0], None, RECIPE.replace(steps=4, precision="bf16"))
    assert np.isfinite([r["loss"] for r in got.history]).all()
    assert all(p.dtype == torch.float32 for p in model.parameters()) and "forward" not in vars(model)
    models = []
    for accumulate in (1, 2, 4):
        models.append(tiny(noise=0, dropout=0.))
        fit(models[-1], data()[0], None, RECIPE.replace(steps=4, accumulate=accumulate))
    for m in models[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(models[0].state_dict().values(), m.state_dict().values()))


def test_experiments_go_on_where_they_were_interrupted(tmp_path):
    jobs, done = [dict(variant=v, seed=s) for s in (0, 1) for v in ("a", "b")], []
    def run(variant, seed):
        if len(done) == 3: raise KeyboardInterrupt
        done.append((variant, seed))
        return dict(changes=dict(x=[1, 2]), score=.1 + .2)
    with pytest.raises(KeyboardInterrupt): experiments(tmp_path / "runs.json", jobs, run)
    assert len(json.loads((tmp_path / "runs.json").read_text())) == 3
    done.clear()
    runs = experiments(tmp_path / "runs.json", jobs, run)
    assert done == [("b", 1)] and [(r["variant"], r["seed"]) for r in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert runs == json.loads((tmp_path / "runs.json").read_text()) and {r["score"] for r in runs} == {.1 + .2}
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]


def test_worker_processes_change_nothing():
    models = [tiny(), tiny()]
    for m, workers in zip(models, (0, 2)): fit(m, data()[0], None, RECIPE.replace(steps=4, workers=workers))
    assert same(state(models[0]), state(models[1]))


def test_batches_cover_every_row_once_a_pass():
    r = Recipe("tiny", steps=10, batch_size=6)
    parts = [Batches(list(range(15)), list, r.replace(accumulate=3 // world * world), rank, world)
             for world in (1,) for rank in range(world)]
    dealt = [x for k in range(len(parts[0])) for x in parts[0][k]]
    assert [sorted(dealt[i:i + 15]) for i in (0, 15, 30, 45)] == [list(range(15))] * 4
    assert dealt[:15] != dealt[15:30] != list(range(15))
    two = [Batches(list(range(15)), list, r, rank, 2) for rank in (0, 1)]
    one = Batches(list(range(15)), list, r)
    assert all(two[0][k] + two[1][k] == one[k] for k in range(10))
    with pytest.raises(ValueError, match="batch_size: got 6; wanted a multiple of 4 processes x 1"): Batches([1], list, r, 0, 4)
    with pytest.raises(ValueError, match="train: there are no rows"): Batches([], list, r)


def test_streams(capsys):
    train = data()[0]
    stream = train.to_iterable_dataset(num_shards=4)
    r = RECIPE.replace(steps=6, eval_every=3)
    a, b = tiny(), tiny()
    fit(a, stream, None, r)
    fit(b, stream, None, r)
    assert same(state(a), state(b))
    class Numbers:
        def __iter__(self): return iter(range(5))
    class Nothing:
        def __iter__(self): return iter(())
    r = Recipe("tiny", steps=4, batch_size=4)
    one = list(Stream(Numbers(), list, r))
    assert one == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1], [2, 3, 4, 0]]
    assert list(Stream(Numbers(), list, r, 1, 2))[:2] == [[1, 3], [1, 3]]
    with pytest.raises(ValueError, match="train: the stream has no rows"): list(Stream(Nothing(), list, r))


def test_stream_killed_and_resumed(tmp_path):
    r, stream = RECIPE.replace(steps=6, eval_every=3), data()[0].to_iterable_dataset(num_shards=2)
    whole, model, passes = tiny(), tiny(), [0]
    fit(whole, stream, None, r)
    class Killed(Exception): pass
    def die(*_):
        passes[0] += 1
        if passes[0] == 5: raise Killed
    hook = model.register_forward_pre_hook(die)
    with pytest.raises(Killed): fit(model, stream, None, r, out=tmp_path)
    hook.remove()
    fit(model, stream, None, r, out=tmp_path, resume=True)
    assert same(state(whole), state(model))


def test_groups():
    model = tiny()
    for p in model.net[4].parameters(): p.requires_grad_(False)
    r = RECIPE.replace(lr_scale={"": 10, "net.0": 1})
    groups = parameter_groups(model, r)
    assert {n: (g["scale"], g["weight_decay"]) for g in groups for n in g["names"]} == {
        "net.0.weight": (1, .01), "net.0.bias": (1, 0), "net.1.weight": (10, 0), "net.1.bias": (10, 0)}
    assert sorted({g["lr"] for g in optimizer(model, r).param_groups}) == [.01, .1]
    got = fit(model, data()[0], None, r.replace(steps=4, warmup=0))
    assert got.history[0]["lr"] == pytest.approx(RECIPE.lr)       # of multiplier 1, whatever the first group is
    with pytest.raises(ValueError, match="lr_scale.*no parameter begins with 'backbone'; there are net"):
        parameter_groups(model, r.replace(lr_scale={"backbone": 1}))
    for p in model.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"): parameter_groups(model, r)


def test_schedules_against_the_formulas():
    for name, f in dict(cosine=lambda t: (1 + np.cos(np.pi * t)) / 2, polynomial=lambda t: (1 - t) ** .9, constant=lambda t: 1).items():
        r = Recipe("tiny", steps=100, warmup=10, lr=.5, schedule=name)
        o = optimizer(nn.Linear(2, 2), r)
        s, lrs = schedule(o, r), []
        for _ in range(100):
            lrs.append(o.param_groups[0]["lr"])
            o.step(); s.step()
        assert np.allclose(lrs[:10], .5 * np.arange(10) / 10)
        assert np.allclose(lrs[10:], [.5 * f((i - 10) / 90) for i in range(10, 100)])


@pytest.mark.parametrize("change, words", [
    (dict(optimizer="adagrad"), "optimizer: got 'adagrad'; wanted adamw, adam, sgd"), (dict(schedule="step"), "schedule: got 'step'"),
    (dict(precision="fp16"), "precision: got"), (dict(steps=0), "steps: got 0; wanted a whole"), (dict(batch_size=2.5), "batch_size: got 2.5"),
    (dict(eval_every=True), "eval_every: got True"), (dict(lr=0), "lr: got 0; wanted a positive"), (dict(warmup=-1), "warmup: got -1"),
    (dict(accumulate=3), "batch_size: got 8; wanted a multiple of 3")])
def test_recipes_that_cannot_be_meant(change, words):
    with pytest.raises(ValueError, match=words): RECIPE.replace(**change)


def test_recipe_fields_and_lookup():
    with pytest.raises(TypeError, match="learning_rate"): RECIPE.replace(learning_rate=1)
    with pytest.raises(TypeError): Recipe("tiny", learning_rate=1)
    with pytest.raises(Exception, match="steps"): RECIPE.steps = 3
    d = RECIPE.replace(rows=data, config=dict(size=(3, 4))).as_dict()
    assert json.loads(json.dumps(d)) == d and d["rows"].endswith(":data") and d["config"] == {"size": [3, 4]}
    with pytest.raises(ValueError, match="method: got 'os'; wanted .*lseg"): recipe("os")
    with pytest.raises(ValueError, match="scale: got 'all' for lseg; wanted one of camvid"): recipe("lseg", "all")
    assert "lsbook.os.train" not in sys.modules


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fit(tiny(), data()[0], None, RECIPE.replace(steps=2))
    assert not list(tmp_path.iterdir())


def test_what_fit_leaves_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(segmenter.METHODS, "tiny", entry())
    model, r = tiny(), RECIPE.replace(steps=5, eval_every=3)
    got = fit(model, *data(), r, out=tmp_path)
    again = load(tmp_path)
    assert same(state(model), state(again)) and got.weights == tmp_path / "tiny.safetensors" and not again.training
    told = json.loads((tmp_path / "tiny.json").read_text())
    assert (told["seed"], told["measured_on"], told["method"]) == (0, "validation rows", "tiny") and told["recipe"] == r.as_dict()
    assert told["metrics"]["mIoU"] == got.metrics["mIoU"] == metrics.evaluate(again, data()[1])["mIoU"]   # of the last step, not of step 3
    assert [row["step"] for row in got.history if "mIoU" in row] == [3, 5]


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(segmenter.METHODS, "tiny", entry())
    r = RECIPE.replace(steps=2, scale="few", rows=small_rows, seed=3)
    got = train_(r, tmp_path, command="as typed")
    assert "tiny/few: " in (said := capsys.readouterr().out) and "20 rows, 2 steps of 8" in said
    told = json.loads((tmp_path / "tiny.json").read_text())
    assert told["command"] == "as typed" and told["seed"] == 3 and told["measured_on"] == "validation rows"
    assert told["data"].endswith(":small_rows") and {"torch", "device", "processes"} <= set(told["versions"])
    other = new_model(r)
    fit(other, *data(), r)
    assert same(state(load(tmp_path)), state(other)) and got.metrics["mIoU"] == told["metrics"]["mIoU"]
    with pytest.raises(ValueError, match="recipe: .*rows=None"): train_(r.replace(rows=None), tmp_path / "b")
    with pytest.raises(ValueError, match="root: got None; lseg/pascal-5i/1 wants the folder"): train_(recipe("lseg", "pascal-5i/1"), tmp_path / "b")


def test_a_stage_that_comes_first(tmp_path, monkeypatch):
    "It is told where the run is, by which recipe and whether it goes on; it decides fields of the config, and recipe and metadata name it as it stands."
    monkeypatch.setitem(segmenter.METHODS, "tiny", entry())
    called = []
    def first(out, r, resume): return called.append((out, r.seed, resume)) or r.replace(config=r.config | dict(long_side=48))
    r = RECIPE.replace(steps=1, scale="few", rows=small_rows, first=first)
    train_(r, tmp_path)
    assert called == [(tmp_path, r.seed, False)] and load(tmp_path).config.long_side == 48 != Config().long_side
    assert json.loads((tmp_path / "recipe.json").read_text()) == r.as_dict() and r.as_dict()["first"].endswith("first")
    with pytest.raises(ValueError, match="got the field 'long_syde'"): train_(r.replace(config=dict(long_syde=9)), tmp_path / "b")
    assert len(called) == 1                                                       # refused before the stage
    train_(r, tmp_path, resume=True)
    assert called[1] == (tmp_path, r.seed, True)
    assert recipe("lseg").first is None and recipe_from(r.as_dict() | dict(first="os:system")).first is None


@pytest.mark.parametrize("streamed, workers", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_loaded_model_is_trained_as_a_fresh_one(streamed, workers):
    "Batches are collated in training mode from the first one on, whatever mode the model came in: a loaded one is in evaluation mode"
    rows, r = data()[0], RECIPE.replace(steps=3, workers=workers, warmup=0)
    if streamed: rows = rows.to_iterable_dataset(num_shards=2)
    fresh, loaded, plain = tiny(), tiny().eval(), tiny()
    plain.noise = 0
    for m in (fresh, loaded, plain): fit(m, rows, None, r)
    assert same(state(fresh), state(loaded)) and not same(state(fresh), state(plain))


@pytest.mark.parametrize("method, scale", [(m, s) for m in segmenter.METHODS for s in __import__(
    f"lsbook.{m}.train", fromlist=["RECIPES"]).RECIPES])
def test_recipes_are_read_back(method, scale):
    r = recipe(method, scale)
    again = recipe_from(json.loads(json.dumps(r.as_dict())))
    assert again.as_dict() == r.as_dict() and callable(again.rows)
    assert again.rows is r.rows or (again.rows.func, again.rows.args, again.rows.keywords) == (r.rows.func, r.rows.args, r.rows.keywords)


def test_a_file_does_not_choose_what_is_run():
    d = recipe("lseg").as_dict()
    for text in ("os:system", "os:system('ls')", "lsbook.cli:main", "lsbook.lseg.train:np.load('x')", None):
        assert recipe_from(d | dict(rows=text)).rows is None
    with pytest.raises(ValueError): recipe_from(d | dict(rows="lsbook.lseg.train:fold_rows(__import__('os'))"))


def test_progress_where_output_is_redirected(capsys, tmp_path):
    fit(tiny(), *data(), RECIPE.replace(steps=30, eval_every=15), out=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert "loss" in lines[1] and "to go" in lines[1] and "mIoU" in lines[-1] and "to go" not in lines[-1]
    bar, at = Progress(1000), type("State", (), dict(global_step=1))
    bar.kind = "lines"
    bar.on_step_end(None, at, None)
    assert not capsys.readouterr().out
    bar.then -= 31
    bar.on_step_end(None, at, None)
    assert capsys.readouterr().out.startswith("step 1 of 1000")


class Mute(ReferringSegmenter):
    "Says everywhere that nothing is there, or that everything is"
    method, task = "mute", "referring"

    def __init__(self, says):
        super().__init__()
        self.config, self.says = Config(), nn.Parameter(torch.tensor(says))

    def image_features(self, x): return x
    def heatmaps(self, encoded, texts): return [self.says.sigmoid().expand(e.image.size[::-1]) for e in encoded], None
    def collate(self, rows): return dict(x=torch.zeros(1))
    def forward(self, x): return dict(loss=(self.says - self.says.detach()).square())


def test_a_training_that_finds_nothing_says_so(capsys):
    for says in (-5., 5.):
        got = fit(Mute(says), rows("referring", 4), rows("referring", 4, split="valid"), RECIPE.replace(steps=1, batch_size=1))
        said = capsys.readouterr().out
        assert ("every mask is empty" in said and "step/04_train" in said) == (says < 0) == (got.metrics["mIoU"] == 0)


def test_an_unusable_row_is_named_by_its_place_in_the_data():
    def collate(rows):
        if 7 in rows: raise ValueError(f"rows[{rows.index(7)}]: no picture")
    deal = Batches(list(range(9)), collate, Recipe("tiny", steps=3, batch_size=3))
    with pytest.raises(ValueError, match=r"^rows\[7\]: no picture"): [deal[k] for k in range(3)]


def test_recipes_are_light():
    "transformers takes seconds to import, and is imported by what trains alone"
    code = ("import sys, lsbook.training as t; t.recipe('step'); t.recipe('lseg').as_dict(); t.Batches; "
            "light = 'transformers' not in sys.modules; t.fit; print(light, 'transformers' in sys.modules)")
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split() == ["True", "True"]


def test_the_model_stays_as_it_was():
    model = tiny()
    before, config = set(vars(model)), model.config
    fit(model, data()[0], None, RECIPE.replace(steps=1, precision="bf16"))
    assert set(vars(model)) == before and model.config is config and vars(config) == vars(Config())


if __name__ == "__main__": child(sys.argv[1], int(sys.argv[2]), sys.argv[3])
