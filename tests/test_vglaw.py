"""VG-LAW: each fast form against the printed one, the shipped weights, bad input, real rows, devices."""
import json
import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lsbook import load, scenes
from lsbook.files import load_tensors
from lsbook.metrics import evaluate
from lsbook.segmenter import Frame, save_weights
from lsbook.training import fit
from lsbook.vglaw.backbone import *
from lsbook.vglaw.heads import *
from lsbook.vglaw.language_weights import *
from lsbook.vglaw.model import *
from lsbook.vglaw.train import *
from lsbook.step.train import Expressions
from test_step import refer_folder

def agree(f, g, *inputs, tolerance=1e-5):
    "Same values and same gradients of a random projection, relative to the largest value."
    out = []
    for fn in (f, g):
        xs = [x.detach().clone().requires_grad_() for x in inputs]
        y = fn(*xs)
        torch.manual_seed(7)
        (y * torch.randn(y.shape)).sum().backward()
        out.append([y.detach(), *(x.grad for x in xs)])
    for a, b in zip(*out):
        error = (a - b).abs().max() / a.abs().max().clamp(min=1e-12)
        assert error < tolerance, (f.__name__, float(error))

@pytest.mark.parametrize("N,T,D,r", [(3, 5, 8, 4), (2, 196, 768, 32)])
def test_factored_equals_materialised(N, T, D, r):
    torch.manual_seed(0)
    agree(materialised_qkv, adaptive_qkv, torch.randn(N, T, D), torch.randn(3 * D, D) / D ** .5, torch.randn(3 * D), torch.randn(3 * D, r) / r ** .5,
          torch.randn(N, r, r) / r ** .5, torch.randn(D, r) / D ** .5)

@pytest.mark.parametrize("N,C,d,h,w", [(2, 4, 6, 3, 5), (1, 256, 768, 14, 14)])
def test_contracted_equals_literal(N, C, d, h, w):
    torch.manual_seed(0)
    def form(f):
        def run(x, cls, weight, bias):
            return torch.func.functional_call(Wrap(f, C, d), {"deconv.weight": weight, "deconv.bias": bias}, (x, cls))
        return run
    class Wrap(nn.Module):
        def __init__(self, f, C, d): super().__init__(); self.f, self.deconv = f, nn.ConvTranspose2d(C, d, 2, 2)
        def forward(self, x, cls): return self.f(x, cls, self.deconv)
    agree(form(deconv_dot_literal), form(deconv_dot), torch.randn(N, C, h, w), torch.randn(N, d), torch.randn(C, d, 2, 2) / C ** .5, torch.randn(d))

@pytest.mark.parametrize("N,heads,h,w,d", [(2, 3, 4, 5, 8), (1, 2, 14, 14, 64)])
def test_folded_equals_additive(N, heads, h, w, d):
    torch.manual_seed(0)
    q, k, v = (torch.randn(N, heads, h, w, d) for _ in range(3))
    agree(biased_attention, folded_attention, q, k, v, torch.randn(2 * h - 1, d) * .3, torch.randn(2 * w - 1, d) * .3)

def test_bias_is_what_detectron2_adds():
    "By loops: unscaled query times the vector of the distance q - k, rows plus columns."
    torch.manual_seed(0)
    h, w, d = 2, 3, 4
    q, rh, rw = torch.randn(1, 1, h, w, d), torch.randn(2 * h - 1, d), torch.randn(2 * w - 1, d)
    rows, columns = relative_scores(q, rh, rw)
    for y in range(h):
        for x in range(w):
            for ky in range(h): assert torch.isclose(rows[0, 0, y, x, ky], q[0, 0, y, x] @ rh[y - ky + h - 1], atol=1e-6)
            for kx in range(w): assert torch.isclose(columns[0, 0, y, x, kx], q[0, 0, y, x] @ rw[x - kx + w - 1], atol=1e-6)

def test_windows():
    x = torch.arange(2 * 4 * 6 * 3.).view(2, 4, 6, 3)
    parts = split_windows(x, 2)
    assert parts.shape == (12, 2, 2, 3) and torch.equal(parts[1], x[0, :2, 2:4])
    assert torch.equal(join_windows(parts, (4, 6)), x)

def test_windows_attend_to_themselves_alone():
    torch.manual_seed(0)
    attention, x = AdaptiveAttention(8, 2, (2, 2)), torch.randn(1, 4, 4, 8)
    y = attention(x)
    x[0, 3, 3] += 1
    changed = (attention(x) - y).abs().sum(-1)[0] > 1e-6
    assert changed[2:, 2:].all() and not changed[:2].any() and not changed[:, :2].any()

def tiny(**more): return VGLAWConfig(**small | more)

def test_start_equals_static_vit():
    "Phi = 0 at the start: whatever the expression, the features are those of the static network."
    torch.manual_seed(0)
    model = VGLAW(tiny()).eval()
    x = model.image_features(torch.rand(2, 3, 64, 64))
    words, mask = model.encode_text(["the red circle", "the star left of the cross"])
    with torch.no_grad(): assert (model.features(x, torch.arange(2), words, mask) - model.trunk(x)).abs().max() < 1e-6

def test_start_equals_timm():
    "With timm's weights, all blocks global and no words: timm's own features."
    import timm
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=3, num_heads=3, class_token=False, global_pool="avg", num_classes=0).eval()
    ours = AdaptiveViT(PatchEmbed(48), 4, 48, 3, 3, 4., 4, (), 0., False).eval()
    load_tensors(ours, convert_vit(theirs.state_dict(), ours), unused=("norm.", "fc_norm."))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        x = theirs.pos_drop(theirs.patch_embed(ours.patch_embed.normalise(images)) + theirs.pos_embed)
        want = theirs.blocks(x)
        got = ours(ours.embed(images)).flatten(2).mT
    assert (got - want).abs().max() < 1e-5 * want.abs().max()

def test_detector_checkpoint_warns(tmp_path):
    ours = AdaptiveViT(PatchEmbed(48), 4, 48, 3, 3, 4., 2, (2,), 0., False)
    state = {f"backbone.net.{k}": v for k, v in ours.state_dict().items()}
    state["backbone.net.pos_embed"] = torch.randn(1, 1 + 14 * 14, 48)
    state["backbone.net.blocks.2.attn.rel_pos_h"] = torch.randn(127, 16)
    state["roi_heads.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "vitdet.pth")
    with pytest.warns(UserWarning, match="COCO"): load_vit(ours, tmp_path / "vitdet.pth")
    assert ours.blocks[2].attn.rel_pos_h.shape == (7, 16) and ours.blocks[2].attn.rel_pos_h.abs().sum() > 0

def test_public_detector_file(tmp_path):
    "detectron2's model_final_*.pkl: a pickle of NumPy arrays; deeper than the trunk, which is said; without the prefix it is known by its relative positions."
    ours = AdaptiveViT(PatchEmbed(48), 4, 48, 3, 3, 4., 2, (2,), 0., False)
    larger = AdaptiveViT(PatchEmbed(48), 4, 48, 5, 3, 4., 2, (2,), 0., False).state_dict() | {"pos_embed": torch.randn(1, 197, 48)}
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps(dict(model={f"backbone.net.{k}": v.numpy() for k, v in larger.items()} | {"roi_heads.x": np.zeros(1)}, __author__="x")))
    torch.save(larger, tmp_path / "bare.pth")
    for name in ("d2.pkl", "bare.pth"):
        with pytest.warns(UserWarning) as said: load_vit(ours, tmp_path / name)
        assert [w.message.args[0][:20] for w in said] == [LEAK[:20], "2 blocks, from 3 on,"]
        assert torch.equal(ours.blocks[1].attn.qkv.weight, larger["blocks.1.attn.qkv.weight"]) and torch.equal(ours.pos_embed, fit_positions(larger["pos_embed"], 4))
    del larger["pos_embed"]
    torch.save(larger, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="weights: got no pos_embed; wanted a ViT, an MAE or a ViTDet"), pytest.warns(UserWarning): load_vit(ours, tmp_path / "bare.pth")
    with pytest.raises(FileNotFoundError, match="model_final.pkl"): VGLAW(tiny(weights="model_final.pkl"))

def test_a_trunk_fits_or_is_refused(tmp_path):
    "Of a whole model the trunk and the first deconvolution are taken; another depth or width says so."
    whole, name = lively(3), str(tmp_path / "model.safetensors")
    save_weights(whole, name)
    torch.manual_seed(9)
    begun, (text, own) = VGLAW(tiny(weights=name)), ("text.model.embeddings.word_embeddings.weight", whole.state_dict())
    same = {k.split(".")[0] for k, v in begun.state_dict().items() if torch.equal(v, own[k]) and v.numel() > 1 and v.float().std() > 0}
    assert all(torch.equal(begun.state_dict()[k], own[k]) for k in own if k.startswith(("trunk.", "mask.enlarge."))) and not torch.equal(begun.state_dict()[text], own[text])
    assert same == {"trunk", "mask"} and not torch.equal(begun.mask.deconv.weight, whole.mask.deconv.weight)
    for wrong in (dict(depth=6), dict(depth=3, global_blocks=(0,)), dict(dim=64)):
        with pytest.raises(ValueError, match="weights: got tensors that do not fit AdaptiveViT"): VGLAW(tiny(weights="vglaw-trunk", **wrong))
    boxes = VGLAW(tiny(weights=name, tasks=("box",)))
    assert torch.equal(boxes.trunk.pos_embed, whole.trunk.pos_embed)

def test_expressions_of_an_image_share_what_the_words_leave_alone():
    "The products of block 0 are made once an image: counted, and equal in values and gradients."
    from torch.utils.flop_counter import FlopCounterMode
    model, c = lively(), VGLAWConfig(**small)
    x, image = model.image_features(torch.rand(2, 3, 64, 64)).detach(), torch.tensor([0, 1, 1, 0, 0])
    words, mask = (t.detach() for t in model.encode_text(["the star", "the cross", "the red star", "the blue star", "the thing"]))
    def count(f):
        with FlopCounterMode(display=False) as counter, torch.no_grad(): f()
        return counter.get_total_flops() // 2
    shared, each = (lambda x: model.features(x, image, words, mask)), (lambda x: model.features(x[image], torch.arange(5), words, mask))
    assert count(lambda: each(x)) - count(lambda: shared(x)) == 3 * 64 * c.dim * (3 * c.dim + c.rank)
    agree(each, shared, x)
    trunk = model.trunk
    assert torch.allclose(trunk(x, None, image), trunk(x)[image], atol=1e-5)
    seen = []
    trunk.blocks[0].attn.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    model.segment(scenes.scene(0).image, ["the star", "the cross", "the thing"])
    assert seen == [1]

def test_aggregation():
    torch.manual_seed(0)
    read, words = LanguageAggregation(8, 3, 2), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    a, h0 = read.attention(words, mask), read(words, mask)
    assert a.shape == (2, 3, 2, 5) and torch.allclose(a.sum(-1), torch.ones(2, 3, 2)) and (a[0, ..., 3:] == 0).all()
    i, g, n = 1, 1, 0
    e, f = read.embedding[i, 4:], words[n, :3, 4:]
    assert torch.allclose(h0[n, i, 4:], (f @ e / 2).softmax(0) @ f, atol=1e-6)

def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = VGLAW(tiny())
    for g in model.language.generators: nn.init.normal_(g.phi.weight, std=.1)
    model(**model.collate([Expressions(4)[i] for i in range(2)])).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None]
    assert not dead, dead

def test_shared_images_change_nothing():
    torch.manual_seed(0)
    model = VGLAW(tiny()).eval()
    for g in model.language.generators: nn.init.normal_(g.phi.weight, std=.1)
    image, texts = scenes.scene(0).image, ["the red circle", "the star", "the large thing left of the cross"]
    together = model.segment(image, texts)
    for text, got in zip(texts, together):
        alone = model.segment(image, text)
        assert np.abs(alone.heatmap - got.heatmap).max() < 1e-5 and np.allclose(alone.box, got.box, atol=1e-3)

def test_shares_and_pixels():
    boxes = [(3., 4., 20., 30.)]
    frame = Frame((60, 40), (48, 32), (64, 64))       # an image 40 wide and 60 high, seen at 32 x 48
    shares = to_shares(boxes, frame)
    want = (11.5 * .8 / 64, 17 * .8 / 64, 17 * .8 / 64, 26 * .8 / 64)
    assert torch.allclose(shares, torch.tensor([want])) and torch.allclose(to_pixels(shares, frame), torch.tensor(boxes), atol=1e-4)
    assert torch.equal(to_pixels(torch.tensor([[.5, .5, 2., 2.]]), frame), torch.tensor([[0., 0., 40., 60.]]))
    beyond = to_pixels(torch.tensor([[.9, .9, .1, .1], [.25, .9, .2, .1], [-.5, -.5, .1, .1]]), frame)     # in the padding: the pixel next to it
    assert torch.allclose(beyond, torch.tensor([[39., 59, 40, 60], [12, 59, 28, 60], [0, 0, 1, 1]]), atol=1e-3)

def test_a_mask_does_not_vanish_on_its_way_to_the_network():
    dot = np.zeros((1, 480, 640), bool); dot[0, 301, 433] = True
    wide = np.zeros((1, 480, 640), bool); wide[0, 100:300, 50:90] = True
    frame = Frame((480, 640), (48, 64), (64, 64))
    both = network_masks([dot[0], wide[0]], frame)
    assert both[0].nonzero().tolist() == [[30, 43]] and both[1].nonzero().amin(0).tolist() == [10, 5] and both[1].sum() == 20 * 4
    batch = VGLAW(tiny()).collate([dict(image=np.zeros((480, 640, 3), np.uint8), expression="the dot", mask=dot[0])])
    assert batch["masks"].sum() == 1

def test_a_row_says_what_it_lacks():
    image = np.zeros((64, 64, 3), np.uint8)
    for row in (dict(image=image, expression="a"), dict(image=image, mask=np.ones((64, 64)))):
        with pytest.raises(ValueError, match="rows.0.: got no (mask|expression); wanted image, expression and mask"): VGLAW(tiny()).collate([row])
    with pytest.raises((ValueError, TypeError), match="image"): VGLAW(tiny()).collate([dict(expression="a", mask=np.ones((64, 64)))])

def test_mirror():
    assert mirror_words("the leftmost cup right of the bright box") == "the rightmost cup left of the bright box"
    row = checked_row(dict(image=Image.new("RGB", (6, 4)), expression="left", mask=np.eye(4, 6) > 0))
    twice = mirrored(mirrored(row))
    assert twice["expression"] == ["left"] and (twice["mask"][0] == row["mask"][0]).all() and twice["box"] == row["box"]
    assert mirrored(row)["box"] == [(2, 0, 6, 4)]

@pytest.mark.parametrize("wrong,says", [(dict(mask=np.zeros((64, 64))), "without a pixel"), (dict(box=[10, 10, 70, 20]), "inside 64 x 64"),
                                        (dict(mask=np.ones((4, 4))), "wanted one size"), (dict(expression=["a", "b"], mask=[np.ones((64, 64))]), "got 2 expressions, 1 masks; wanted as many"),
                                        (dict(box=[1, 2, 3]), "wanted x0, y0, x1, y1"), (dict(box=[1, 2, 3, 4, 5]), "wanted x0, y0, x1, y1"), (dict(expression=""), "expression"),
                                        (dict(expression=[]), "expression"), (dict(mask=None), "got no mask"),
                                        (dict(expression=["a", "b"], mask=[np.ones((64, 64))] * 2, box=[[0, 0, 1, 1]]), "2 masks, 1 boxes")])
def test_bad_rows(wrong, says):
    row = dict(image=np.zeros((64, 64, 3), np.uint8), expression="the star", mask=np.ones((64, 64)))
    with pytest.raises(ValueError, match=f"rows.1.: .*{says}"): VGLAW(tiny()).collate([row, row | wrong])

@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_answer(variant):
    torch.manual_seed(0)
    model = VGLAW(tiny(**VARIANTS[variant]))
    out = model(**model.collate([Expressions(4)[i] for i in range(2)]))
    out.loss.backward()
    got = model.eval().segment(scenes.scene(0).image, "the red circle")
    assert torch.isfinite(out.loss) and got.mask.shape == (64, 64)
    assert all(p.grad is not None for p in model.parameters())

def test_long_expression_is_said():
    with pytest.warns(UserWarning, match="cut"): VGLAW(tiny()).encode_text(["the red circle " * 20])

def lively(seed=0, **more):
    "A small model whose generated weights do something already."
    torch.manual_seed(seed)
    model = VGLAW(tiny(**more)).eval()
    for g in model.language.generators: nn.init.normal_(g.phi.weight, std=.1)
    return model

def test_half_precision_agrees():
    model, texts = lively(), ["the red circle", "the star left of the cross"]
    x, image = model.image_features(torch.rand(1, 3, 64, 64)), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        logits, boxes = model.ground(x, image, texts)
        with torch.autocast("cpu", torch.bfloat16): half, half_boxes = model.ground(x, image, texts)
    assert (logits - half).abs().max() < .05 * logits.abs().max() and (boxes - half_boxes).abs().max() < .02

def test_trunk_and_heads_compile_in_one_graph():
    model = lively()
    words, mask = model.encode_text(["the red circle", "the star"])
    x, image = model.image_features(torch.rand(1, 3, 64, 64)), torch.zeros(2, dtype=torch.long)
    def run(x, image, words, mask): return model.decode(model.features(x, image, words, mask), words[:, 0])
    with torch.no_grad(): a, b = run(x, image, words, mask), torch.compile(run, fullgraph=True, backend="eager")(x, image, words, mask)
    assert all(torch.allclose(u, v, atol=1e-5) for u, v in zip(a, b))

def test_real_rows_train_it(tmp_path):
    train, valid = RECIPES["paper"].rows(refer_folder(tmp_path))
    r = RECIPES["paper"].replace(steps=20, batch_size=2, accumulate=1, eval_every=20, warmup=0, lr=2e-3)
    torch.manual_seed(0)
    got = fit(VGLAW(tiny(flip=True)), train, valid, r)
    losses = got.series("loss")[1]
    assert sum(losses[-5:]) < sum(losses[:5]) and 0 <= got.metrics["mIoU"] <= 1 and "box Prec@0.5" in got.metrics

def test_answers_fit_any_picture():
    model = lively()
    for w, h in ((100, 40), (7, 90), (1, 1), (64, 64)):
        got = model.segment(np.zeros((h, w, 3), np.uint8), "the red circle")
        x0, y0, x1, y1 = got.box
        assert got.mask.shape == (h, w) and 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h

def test_saved_model_answers_alike(tmp_path):
    model = lively()
    save_weights(model, tmp_path / "vglaw.safetensors")
    image = scenes.scene(1).image
    a, b = (m.segment(image, "the star") for m in (model, load(str(tmp_path / "vglaw.safetensors"))))
    assert np.array_equal(a.heatmap, b.heatmap) and a.box == b.box

def test_paper_size(tmp_path):
    "The paper's model, with a BERT of random weights in a folder: one step forward and backward, 448 pixels."
    from transformers import BertConfig, BertModel, BertTokenizerFast
    BertModel(BertConfig(num_hidden_layers=6, vocab_size=100)).save_pretrained(tmp_path)
    BertTokenizerFast(vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *scenes.words()])}).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = VGLAW(VGLAWConfig(bert=str(tmp_path)))
    added = sum(p.numel() for p in model.language.parameters())
    assert added == 1_153_728, added
    mask = np.zeros((300, 448)); mask[20:60, 30:90] = 1
    batch = model.collate([dict(image=np.zeros((300, 448, 3), np.uint8), expression="the red circle", mask=mask)])
    out = model(**batch)
    out.loss.backward()
    assert out.logits.shape == (1, 448, 448) and out.boxes.shape == (1, 4) and torch.isfinite(out.loss)

def test_first_stage_is_handed_on(tmp_path):
    recipe = LABELS.replace(steps=2, batch_size=2, eval_every=1)
    path = pretrain(tmp_path / "labels", recipe)
    started = VGLAW(tiny(weights=str(path)))
    state = load_file(path)
    assert started.config.weights is None and torch.equal(started.trunk.blocks[0].attn.qkv.weight, state["trunk.blocks.0.attn.qkv.weight"].float())
    assert torch.equal(started.mask.enlarge[0].weight, state["mask.enlarge.0.weight"].float())
    assert pretrain(tmp_path / "labels", recipe) == path      # finished: not trained again

def test_paths():
    model, rows = lively(), scenes.rows("referring", 3, split="valid")
    a, b = score_paths(model, rows), evaluate(model, rows)
    assert all(abs(a[k] - b[k]) < 1e-6 for k in b)
    assert set(dissociation(model, rows)) == set(PATHS)

def test_attribute_kinds():
    assert [attribute_kind(t) for t in ("the red thing", "the star", "the red star")] == ["colour", "shape", "both"]


def test_the_shipped_weights_keep_their_promise():
    "500 test scenes: what the metadata says, and what the chapter promises of masks, boxes and kinds of expression."
    model, rows = load("vglaw"), scenes.rows("referring", 500, split="test")
    metadata = json.loads((files("lsbook") / "weights/vglaw.json").read_text(encoding="utf-8"))
    got = evaluate(model, with_attribute_kinds(rows))
    for name in ("mIoU", "oIoU", "Prec@0.5", "Prec@0.9", "box Prec@0.5", "mIoU/superlative"):
        assert got[name] == pytest.approx(metadata["metrics"][name], abs=.02), name
    assert got["mIoU"] >= .84 and got["box Prec@0.5"] >= .98
    assert got["mIoU/colour"] >= .8 and got["mIoU/shape"] >= .8 and got["mIoU/superlative"] >= .78
    assert evaluate(model, rows.map(lambda row: dict(expression=BLANK)))["mIoU"] < .3

def test_weights_and_trunk_stay_small():
    size = lambda name: (files("lsbook") / "weights" / name).stat().st_size
    assert size("vglaw.safetensors") + size("vglaw-trunk.safetensors") <= 4 * 2**20

def test_shipped_trunk_starts_the_scenes_recipe():
    recipe = RECIPES["scenes"]
    model, state = VGLAW(VGLAWConfig(**recipe.config)), load_file(files("lsbook") / "weights/vglaw-trunk.safetensors")
    own = model.state_dict()
    assert len(state) > 50 and all(torch.equal(own[k], v.to(own[k].dtype)) for k, v in state.items())
    stage = LabelPretraining(model, scenes.label_names())
    assert set(state) <= set(own) and stage.trunk is model.trunk and stage.enlarge is model.mask.enlarge

def test_generator_by_its_equation():
    torch.manual_seed(0)
    generate, h0 = WeightGenerator(dim=8, hidden=4, rank=2), torch.randn(3, 8)
    assert (generate(h0) == 0).all()                                 # the last map starts at zero
    nn.init.normal_(generate.phi.weight), nn.init.normal_(generate.phi.bias)
    W1, norm, _ = generate.reduce
    a = h0 @ W1.weight.T + W1.bias
    a = (a - a.mean(1, keepdim=True)) / (a.var(1, unbiased=False, keepdim=True) + norm.eps) ** .5
    h1 = a * .5 * (1 + torch.erf(a / 2 ** .5))
    assert torch.allclose(generate(h0), (h1 @ generate.phi.weight.T + generate.phi.bias).view(3, 2, 2), atol=1e-6)

def test_language_weights_start_by_their_fan_in_and_go_to_their_layers():
    torch.manual_seed(0)
    language = LanguageWeights(text_dim=8, dim=64, layers=3, groups=2, hidden=4, rank=4)
    for t, bound in ((language.P, 1 / 4 ** .5), (language.Q, 1 / 64 ** .5)): assert .98 * bound < t.abs().max() <= bound
    assert abs(LanguageAggregation(512, 8, 4).embedding.std() - 1) < .05
    for g in language.generators: nn.init.normal_(g.phi.weight)
    words, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    h0 = language.aggregate(words, mask)
    assert all(torch.equal(Phi, g(h0[:, i])) for i, (Phi, g) in enumerate(zip(language(words, mask), language.generators)))

def test_window_sizes_drop_path_and_order_of_weights():
    torch.manual_seed(0)
    trunk = AdaptiveViT(ConvStem(16), 8, 16, 6, 2, 3., 4, (2, 5), .2, False).eval()
    assert [b.attn.size for b in trunk.blocks] == [(4, 4), (4, 4), (8, 8)] * 2
    assert [round(b.drop_path.p, 3) for b in trunk.blocks] == [0, .04, .08, .12, .16, .2]
    assert trunk.blocks[0].mlp.fc1.out_features == 48 and trunk.blocks[0].norm1.eps == 1e-6
    for b in trunk.blocks: nn.init.normal_(b.norm1.weight), nn.init.normal_(b.norm2.weight)     # the two differ
    image = torch.rand(2, 3, 64, 64)
    x = trunk.embed(image)
    assert torch.equal(x, trunk.patch_embed(image) + trunk.pos_embed) and trunk.patch_embed.stride * 8 == 64
    weights = [(torch.randn(48, 2), torch.randn(2, 2, 2), torch.randn(16, 2)) for _ in range(6)]
    y = x
    for block, w in zip(trunk.blocks, weights):
        y = y + block.attn(block.norm1(y), w)
        y = y + block.mlp(block.norm2(y))
    assert torch.equal(trunk(x, weights), y.permute(0, 3, 1, 2)) and isinstance(trunk.norm, nn.Identity)
    assert all((p == 0).all() for n, p in trunk.named_parameters() if "rel_pos" in n)
    oblong = AdaptiveAttention(8, 2, (2, 3))
    assert oblong.rel_pos_h.shape == (3, 4) and oblong.rel_pos_w.shape == (5, 4) and oblong(torch.randn(1, 2, 3, 8)).shape == (1, 2, 3, 8)

def test_checkpoint_tables_take_another_size():
    ramp = torch.arange(4.).expand(4, 4).reshape(1, 16, 1)
    with_class = torch.cat([torch.full((1, 1, 1), 99.), ramp], 1)
    assert torch.equal(fit_positions(with_class, 4), ramp.view(1, 4, 4, 1)) and 3.05 < fit_positions(with_class, 8).max() < 4
    assert torch.allclose(fit_distances(torch.arange(-3., 4.)[:, None], 3)[:, 0], torch.tensor([-7 / 3, 0, 7 / 3]))

def test_stems_are_what_they_say():
    torch.manual_seed(0)
    image, patches, stem = torch.rand(1, 3, 32, 48), PatchEmbed(12), ConvStem(16).eval()
    want = patches.proj.weight.flatten(1) @ patches.normalise(image)[0, :, 16:32, 32:48].flatten() + patches.proj.bias
    assert torch.allclose(patches(image)[0, 1, 2], want, atol=1e-4) and patches.stride == 16
    _, fine, coarse = stem.pyramid(image)
    want = nn.functional.conv2d(fine, stem.fine.weight, stem.fine.bias, stride=2) + stem.coarse(coarse)
    assert torch.allclose(stem(image), want.permute(0, 2, 3, 1), atol=1e-5) and stem.stride == 8


gpu = pytest.mark.cuda

@gpu
def test_the_same_on_a_gpu():
    texts, image = ["the red circle", "the leftmost thing"], scenes.scene(0).image
    for m in (lively(), load("vglaw")):
        want = m.cpu().segment(image, texts)
        got = m.cuda().segment(image, texts)
        with torch.autocast("cuda", torch.bfloat16): half = m.segment(image, texts)
        for a, b, c in zip(want, got, half):
            assert np.allclose(a.heatmap, b.heatmap, atol=2e-3) and np.allclose(a.box, b.box, atol=.05)
            assert np.abs(a.heatmap - c.heatmap).mean() < 2e-2 and np.allclose(a.box, c.box, atol=2)

@gpu
def test_a_training_step_on_a_gpu():
    m = lively(flip=False).train()
    batch = m.collate([Expressions(10)[i] for i in range(2)])
    want = m(**batch).loss.item()
    got = m.cuda()(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}).loss
    got.backward()
    assert abs(got.item() - want) < 1e-2 and all(p.grad is not None for p in m.parameters())

@gpu
def test_trunk_and_heads_compile_on_a_gpu():
    m = lively().cuda()
    words, mask = m.encode_text(["the red circle", "the star"])
    x, image = m.image_features(torch.rand(1, 3, 64, 64, device="cuda")), torch.zeros(2, dtype=torch.long, device="cuda")
    def run(x, image, words, mask): return m.decode(m.features(x, image, words, mask), words[:, 0])
    with torch.no_grad(): a, b = run(x, image, words, mask), torch.compile(run, fullgraph=True)(x, image, words, mask)
    assert torch.allclose(a[0], b[0], atol=1e-2, rtol=1e-3) and torch.allclose(a[1], b[1], atol=1e-3)

@gpu
def test_the_fast_forms_on_a_gpu():
    "Folded positions through the fused kernel, the contracted mask head and the factored weights, at the paper's widths."
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, 14, 14, 64, device="cuda") for _ in range(3))
    rel = [torch.randn(27, 64, device="cuda") * .3 for _ in range(2)]
    a, b = biased_attention(q, k, v, *rel), folded_attention(q, k, v, *rel)
    assert (a - b).abs().max() < 2e-2 * a.abs().max()
    head, x, z = MaskHead(768, 256, 768).cuda(), torch.randn(2, 768, 28, 28, device="cuda"), torch.randn(2, 768, device="cuda")
    with torch.no_grad(): a, b = deconv_dot_literal(head.enlarge(x), z, head.deconv), head(x, z)
    assert (a - b).abs().max() < 2e-2 * a.abs().max()
    parts = [torch.randn(*s, device="cuda") / s[-1] ** .5 for s in ((4, 196, 768), (2304, 768), (2304,), (2304, 32), (4, 32, 32), (768, 32))]
    a, b = materialised_qkv(*parts), adaptive_qkv(*parts)
    assert (a - b).abs().max() < 2e-2 * a.abs().max()
