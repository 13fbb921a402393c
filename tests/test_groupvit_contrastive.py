"""The losses over captions and nouns against loops and other libraries, on one process and two, in one pass and in parts."""
import os
import random
import subprocess
import sys
import tarfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsbook.groupvit.contrastive import (NOUNS, NounPrompts, clamped_scale, everyones, image_text_loss, in_parts, matching_loss,
                                         noun_loss, nouns_of, templates, text_ids)
from lsbook.losses import gather, info_nce


def random_pairs(n=4, k=3, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g), torch.randn(n * k, d, generator=g)


def test_several_right_answers_against_soft_targets():
    g = torch.Generator().manual_seed(0)
    z, match = torch.randn(5, 7, generator=g), torch.rand(5, 7, generator=g) > .6
    match[torch.arange(5), torch.arange(5)] = True
    assert torch.isclose(matching_loss(z, match), F.cross_entropy(z, match / match.sum(1, keepdim=True)))
    right = torch.stack([row[m].logsumexp(0) for row, m in zip(z, match)])
    assert torch.isclose(matching_loss(z, match, inside=True), (z.logsumexp(1) - right).mean())
    single = torch.eye(5, 7).bool()
    for inside in (False, True):
        assert torch.isclose(matching_loss(z, single, inside), F.cross_entropy(z, torch.arange(5)))


def test_captions_as_transformers_has_them():
    from transformers.models.groupvit.modeling_groupvit import image_text_contrastive_loss
    image, text = random_pairs(k=1)
    cosines = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    assert torch.isclose(image_text_loss(image, text, 20.), image_text_contrastive_loss(20 * cosines))
    assert torch.isclose(image_text_loss(image, text), image_text_contrastive_loss(cosines / .07))
    assert torch.isclose(image_text_loss(image, text, 20.), info_nce(image, text, 20.))


@pytest.mark.parametrize("inside", [False, True])
def test_shared_nouns_are_right_for_each_other(inside):
    image, text = random_pairs()
    about = ["dog", "grass", "sky", "dog", "cat", "dog", "car", "road", "sky", "boat", "sea", "sand"]
    c = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * 9
    own = [set(about[3 * i:3 * i + 3]) for i in range(4)]
    right = torch.tensor([[a in o for a in about] for o in own])
    want = (matching_loss(c, right, inside) + matching_loss(c.T, right.T, inside)) / 2
    assert torch.isclose(image_text_loss(image, text, 9, text_ids(about), inside), want)
    assert not torch.isclose(image_text_loss(image, text, 9, None, inside), want)


def test_equal_captions_need_no_soft_targets():
    image, text = random_pairs(5, 1)
    names = ["a", "b", "a", "c", "a"]
    ids = text_ids(names)
    image.requires_grad_(), text.requires_grad_()
    same = text[[names.index(n) for n in names]]                    # one text network: equal texts, equal vectors
    for one, other in zip(torch.autograd.grad(image_text_loss(image, same), (image, text), retain_graph=True),
                          torch.autograd.grad(image_text_loss(image, same, ids=ids), (image, text))):
        assert torch.allclose(one, other, atol=1e-6)


def test_text_ids():
    assert text_ids(["a red star", "a red star "]).unique().numel() == 2
    assert text_ids(["a red star"]).tolist() == [6773605511173971685] and text_ids(["ü"]).dtype == torch.int64


def test_the_scale_is_bounded():
    t = torch.tensor([0., 2.6593, 4.61, 50.], requires_grad=True)
    s = clamped_scale(t)
    s.sum().backward()
    assert torch.allclose(s, torch.tensor([1., 14.2863, 100., 100.]), atol=1e-3) and t.grad.tolist()[2:] == [0, 0]
    assert clamped_scale(torch.tensor(3.), most=5.) == 5


def naive_noun_loss(z, y):
    s, total = z.double().exp().sum(1).log(), 0.
    for i, n in y.nonzero().tolist():
        total += torch.log1p(sum((s[i, m] - s[i, n]).exp() for m in range(y.shape[1]) if not y[i, m] and y[:, m].any()) + torch.zeros(1))
        total += torch.log1p(sum((s[j, n] - s[i, n]).exp() for j in range(len(y)) if not y[j, n]) + torch.zeros(1))
    return float(total) / (2 * int(y.sum()))


def test_noun_loss_against_loops():
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        z, y = 3 * torch.randn(6, 4, 9, generator=g), torch.rand(6, 9, generator=g) > .7
        assert abs(noun_loss(z, y).item() - naive_noun_loss(z, y)) < 1e-5
        assert torch.equal(noun_loss(z, y), noun_loss(z, y.float()))


@pytest.mark.parametrize("y", [torch.ones(3, 5), torch.zeros(3, 5), torch.eye(3, 5), torch.tensor([[1] * 5, [0] * 5, [1, 0, 0, 0, 0]])])
def test_noun_loss_of_odd_batches_is_finite(y):
    z = (1e3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = noun_loss(z, y)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32(dtype):
    image, text = random_pairs()
    z, y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.eye(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert image_text_loss(image.to(dtype), text.to(dtype)).dtype == torch.float32
        assert torch.isclose(image_text_loss(image, text), image_text_loss(image.float(), text.float()))
        assert torch.isclose(noun_loss(z.to(dtype), y), noun_loss(z.to(dtype).float(), y))


def test_nouns_without_a_network(monkeypatch):
    import socket
    monkeypatch.setattr(socket, "socket", None)
    assert nouns_of("Two small dogs run after a blue ball on the grass in Prague.") == ["dogs", "ball", "grass", "prague"]
    assert nouns_of("running fast!") == [] and nouns_of("") == [] and nouns_of("...") == []
    assert nouns_of("100 % ☃ ~") == []                              # the tagger calls a sign a noun
    assert nouns_of("dogs and Dogs") == ["dogs"]
    assert NOUNS == ("NN", "NNS", "NNP", "NNPS")


def test_prompts():
    assert templates("bare") == ["{}"] and templates("photo") == ["a photo of a {}."]
    assert len(templates("simple")) == 7 and len(templates("imagenet")) == 80
    with pytest.raises(ValueError, match="templates: got 'all'; wanted one of bare, photo, simple, imagenet"): templates("all")
    make = NounPrompts(template="photo")
    random.seed(0)
    prompts, about = make(["x", "y"], [["a", "b", "c", "d"], ["e"]])
    assert len({*about[:3]}) == 3 and {*about[:3]} < {*"abcd"} and about[3:] == ["e", "y", "y"]
    assert prompts == [f"a photo of a {w}." for w in about[:4]] + ["y", "y"] and make.without == 0
    random.seed(0)
    assert make(["x", "y"], [["a", "b", "c", "d"], ["e"]]) == (prompts, about)
    seen = {make(["x"], [["a", "b"]])[1][0] for _ in range(40)}
    assert seen == {"a", "b"}                                       # drawn at random, not the first
    forms = {NounPrompts(1, "simple")(["x"], [["dog"]])[0][0] for _ in range(100)}
    assert forms == {t.format("dog") for t in templates("simple")}


def test_a_caption_without_nouns_is_kept_and_said_once():
    make = NounPrompts(2, "bare")
    with pytest.warns(UserWarning, match="without a noun are prompted whole; the first is 'so beautiful'"):
        assert make(["a dog", "so beautiful"]) == (["dog", "a dog", "so beautiful", "so beautiful"],) * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(["wow"], [[]])
    assert make.without == 2


def towers(dropout=0.):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16))
    return body, nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def gradients(size, dropout=0., rows=22):
    body, projector = towers(dropout)
    x, text = (torch.randn(rows, n, generator=torch.Generator().manual_seed(n)) for n in (6, 4))
    torch.manual_seed(1)
    loss = image_text_loss(projector(in_parts(body, x, size)), text)
    loss.backward()
    return [loss, *(p.grad for m in (body, projector) for p in m.parameters())]


@pytest.mark.parametrize("size", [22, 11, 7, 1, 100])
def test_gradients_in_parts_are_those_of_the_batch(size):
    "to 1e-5, BatchNorm in the projector included"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(size), gradients(None)))


def test_gradients_in_parts_with_dropout_are_the_encoded_ones():
    "What is encoded again is what was encoded: the gradient of a batch with dropout in parts, by numerical differentiation"
    body, _ = towers(.5)
    body = body.double()
    x, text = torch.randn(6, 6).double(), torch.randn(6, 16).double()
    def loss():
        torch.manual_seed(4)
        return image_text_loss(in_parts(body, x, 2), text)
    loss().backward()
    w, eps = body[0].weight, 1e-6
    with torch.no_grad():
        w[0, 0] += eps; up = loss()
        w[0, 0] -= 2 * eps; down = loss()
    assert abs((up - down).item() / (2 * eps) - w.grad[0, 0].item()) < 1e-6


def test_parts_need_less_memory():
    from lsbook.studio.speed import peak_bytes
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16)) for _ in range(4)))
    x, text = torch.randn(256, 16), torch.randn(256, 16)
    def step(size):
        net.zero_grad()
        image_text_loss(in_parts(net, x, size), text).backward()
    assert peak_bytes(lambda: step(32)) < .6 * peak_bytes(lambda: step(None))


def test_in_parts_takes_tuples_and_runs_once_where_all_fit():
    calls = []
    def encode(x):
        calls.append(len(x))
        return x + 1, (2 * x).sum(1)
    x = torch.randn(5, 3)
    a, b = in_parts(encode, x, 2)
    assert calls == [2, 2, 1] and torch.equal(a, x + 1) and torch.equal(b, (2 * x).sum(1))
    in_parts(encode, x.requires_grad_(), 5)[0].sum().backward()
    in_parts(encode, x)
    assert calls[3:] == [5, 5]


# --- two processes

def make_batch():
    g = torch.Generator().manual_seed(0)
    about = ["dog", "sky", "dog", "sea", "sky", "sky", "car", "dog", "road", "sea", "boat", "sea"]
    nouns = [["red star", "sand"], ["sand"], ["blue star"], ["sea", "red star"]]
    return torch.randn(4, 6, generator=g), torch.randn(4, 5, generator=g), torch.randn(12, 5, generator=g), about, nouns


class Net(nn.Module):
    "Towers and a scale; the three losses of one batch, with the words of the whole batch whatever the process has"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.))
        self.words = nn.ParameterDict({w.replace(" ", "_"): nn.Parameter(torch.randn(4)) for w in ("red star", "blue star", "sand", "sea")})

    def forward(self, x, captions, names, prompts, about, nouns, size=None):
        v, scale = in_parts(self.image, x, size), clamped_scale(self.log_scale)
        words = sorted({w for row in nouns for w in row})
        words, present = everyones(words, torch.tensor([[w in row for w in words] for row in nouns]))
        table = torch.stack([self.words[w.replace(" ", "_")] for w in words])
        segments = torch.stack([v, v.tanh(), -v], 1)
        return torch.stack([image_text_loss(v, self.text(captions), scale, text_ids(names)),
                            image_text_loss(v, self.text(prompts), scale, text_ids(about)),
                            image_text_loss(v, self.text(prompts), scale, inside=True),
                            noun_loss(scale * segments @ table.T, present)])


def measured(net, model, rank=0, world=1, size=None):
    x, captions, prompts, about, nouns = make_batch()
    n = 4 // world
    mine, three = slice(rank * n, rank * n + n), slice(3 * rank * n, 3 * (rank * n + n))
    out = []
    for which in range(4):
        net.zero_grad()
        losses = model(x[mine], captions[mine], [*"abac"][mine], prompts[three], about[three], nouns[mine], size)
        losses[which].backward()
        out += [losses[which].detach()] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]
    return out


def child(out):
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    rank, world = accelerator.process_index, accelerator.num_processes
    assert world == 2
    net = Net()
    model = accelerator.prepare(net)
    found = []
    for size in (None, 1):
        values = measured(net, model, rank, world, size)
        for v in values:
            if v.ndim == 0: v.copy_(accelerator.reduce(v, "mean"))  # losses; for the scale's gradient a mean of equals
        found.append(values)
    for f in (lambda: image_text_loss(torch.zeros(2 + rank, 3), torch.zeros(2 + rank, 3)), lambda: noun_loss(torch.zeros(2 + rank, 1, 3), torch.zeros(2 + rank, 3))):
        try: f()
        except ValueError as e: assert "[2, 3]" in str(e), e
        else: raise AssertionError("unequal batches went through")
    words, present = everyones(["a", "b"] if rank else ["c", "a"], torch.tensor([[True, False], [True, True]]))
    assert words == ["a", "b", "c"] and present.int().tolist() == ([[1, 0, 0], [1, 1, 0]] if rank else [[0, 0, 1], [1, 0, 1]])
    found = dict(losses=found)
    for loss in ("captions", "nouns"):
        net = groupvit(loss)
        found[loss] = groupvit_gradients(net, accelerator.prepare(net), loss, rank, world)
        found[loss][0].copy_(accelerator.reduce(found[loss][0], "mean"))
    for none in (False, True):
        net = groupvit("nouns", consistency=1.)
        found[f"none {none}"] = one_has_none(net, accelerator.prepare(net), rank, world, none)
        for v in found[f"none {none}"][:1]: v.copy_(accelerator.reduce(v, "mean"))
    if not rank: torch.save(found, out)
    accelerator.end_training()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    "What two processes found"
    out = tmp_path_factory.mktemp("two") / "found"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[1]))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    got = subprocess.run([*accelerate, __file__, str(out)], env=env, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr[-3000:]
    return torch.load(out)


def test_two_processes_equal_one(together):
    "Loss and gradients, to 1e-5: captions, prompts in both forms, nouns; also with the images encoded one at a time"
    net = Net()
    want = measured(net, net)
    for found in together["losses"]:
        assert len(found) == len(want)
        for a, b in zip(found, want): assert torch.allclose(a, b, atol=1e-5), (a, b)


# --- the whole model

SMALL = dict(dim=16, heads=2, depths=(1, 1), group_tokens=(4, 0), groups=(4, 0), image_size=16, patch=4, drop_path=0., assign="hard",
             text="words", words=["dog", "sky", "sea", "car", "road", "boat"], embed_dim=8, template="bare", augment=False)


def groupvit(loss, **changes):
    from lsbook.groupvit.model import GroupViT, GroupViTConfig
    torch.manual_seed(0)
    model = GroupViT(GroupViTConfig(loss=loss, **SMALL | dict(projector=12 if loss == "captions" else 0) | changes))
    return model.double() if loss == "captions" else model          # BatchNorm over 4 rows magnifies rounding


def one_has_none(model, wrapped, rank=0, world=1, none=False):
    "The first process' captions have no noun, or nobody's have: loss and gradients by `collate`, votes included"
    from PIL import Image
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    said = [dict(image=Image.fromarray(im), caption="so", nouns=ns) for im, ns in
            zip(pictures, [[]] * 4 if none else [[], [], ["dog", "sky"], ["sea"]])]
    n = 4 // world
    got = wrapped(**model.eval().collate(said[rank * n:rank * n + n])).loss
    got.backward()
    return [got.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def groupvit_gradients(model, wrapped, loss, rank=0, world=1):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    words, n = SMALL["words"], 4 // world
    mine, three = slice(rank * n, rank * n + n), slice(3 * rank * n, 3 * (rank * n + n))
    nouns = [["dog", "sky"], ["sea"], ["car", "road"], ["sky", "boat"]]
    about = ["dog", "sky", "sky", "sea", "boat", "sea", "car", "road", "car", "sky", "boat", "boat"]
    if loss == "captions": batch = dict(texts=["dog sky", "sea", "car road", "sky boat"][mine], prompts=about[three], about=about[three])
    else:
        texts = sorted({w for row in nouns[mine] for w in row})
        batch = dict(texts=texts, present=torch.tensor([[t in row for t in texts] for row in nouns[mine]]))
    got = wrapped(images=images[mine], **batch).loss
    got.backward()
    running = [t.clone() for name, t in model.named_buffers() if "running" in name]
    return [got.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()] + running


@pytest.mark.parametrize("loss", ["captions", "nouns"])
def test_two_processes_of_the_model_equal_one(together, loss):
    "BatchNorm of the projectors included: its statistics are those of the whole batch"
    model = groupvit(loss)
    want = groupvit_gradients(model, model, loss)
    for a, b in zip(together[loss], want, strict=True): assert torch.allclose(a, b, atol=1e-5), (a, b)


@pytest.mark.parametrize("none", [False, True])
def test_a_process_without_nouns_takes_part(together, none):
    "Its batch has no column of its own; where nobody has one the loss is 0 and every gradient too"
    model = groupvit("nouns", consistency=1.)
    want = one_has_none(model, model, none=none)
    for a, b in zip(together[f"none {none}"], want, strict=True): assert torch.allclose(a, b, atol=1e-5), (a, b)
    assert all(t.isfinite().all() for t in want) and none == (not any(t.any() for t in want))


def test_blank_captions_of_shards_are_left_out(tmp_path):
    from lsbook.data import captions
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        from PIL import Image
        for i, text in enumerate(["a dog", "", " \n", "a cat"]):
            photo = BytesIO()
            Image.new("RGB", (8, 8)).save(photo, "PNG")
            for ending, data in (("png", photo.getvalue()), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{i}.{ending}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    assert [r["caption"] for r in captions(tmp_path, streaming=True)] == ["a dog", "a cat"]
    with pytest.warns(UserWarning, match="2 of 4 rows without a caption left out"): assert len(captions(tmp_path)) == 2


def test_not_a_number_stops_the_training_and_keeps_the_last_good_state(tmp_path):
    "Logits of one step are NaN: the error names the step, whose batch depends on nothing but seed and step; the checkpoint before is kept"
    from lsbook.scenes import rows
    from lsbook.training import Recipe, fit, newest_checkpoint
    from safetensors.torch import load_file
    model, steps = groupvit("nouns"), [0]
    def spoil(module, args, out):
        steps[0] += module.training
        return out * float("nan") if steps[0] == 7 else out
    model.projector.register_forward_hook(spoil)
    recipe = Recipe("groupvit", steps=12, batch_size=4, eval_every=3)
    with pytest.raises(FloatingPointError, match="not a finite number at step 7.*checkpoints are kept"):
        with pytest.warns(UserWarning, match="unknown"): fit(model, rows("caption", 12), None, recipe, out=tmp_path)
    assert newest_checkpoint(tmp_path).name == "checkpoint-6"
    assert all(t.isfinite().all() for t in load_file(newest_checkpoint(tmp_path) / "model.safetensors").values())


# --- rows from shards

def shards(folder, n=4, each=3):
    "As img2dataset writes CC12M: picture, caption and a JSON of where they are from, in tar files"
    from PIL import Image
    for k in range(n):
        with tarfile.open(folder / f"{k:05}.tar", "w") as tar:
            for i in range(k * each, k * each + each):
                photo = BytesIO()
                Image.new("RGB", (40, 30), (i, 0, 0)).save(photo, "JPEG")
                about = f'{{"caption": "a dog and ball {i}", "url": "https://example.org/{i}.jpg", "status": "success", "width": 40}}'
                for ending, data in (("jpg", photo.getvalue()), ("json", about.encode()), ("txt", f"a dog and ball {i}".encode())):
                    info = tarfile.TarInfo(f"{i:09}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))
    return folder


def test_shards_as_cc12m_has_them_stream_to_nodes_and_workers(tmp_path):
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader
    from lsbook.data import captions, check_rows
    stream = check_rows(captions(str(shards(tmp_path) / "*.tar"), streaming=True), "caption")
    assert [r["caption"] for r in stream] == [f"a dog and ball {i}" for i in range(12)]
    assert all(r["image"].size == (40, 30) for r in stream)
    seen = []
    for rank in range(2):
        loader = DataLoader(split_dataset_by_node(stream, rank, 2), batch_size=None, num_workers=2, multiprocessing_context="fork")
        seen.append({r["caption"] for r in loader})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 12


if __name__ == "__main__": child(sys.argv[1])
