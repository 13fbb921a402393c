"""VG-LAW's heads and model by hand: pooling, contraction, rows, frames, and which path carries what in the shipped weights."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lsbook import load, scenes
from lsbook.losses import box_loss, mask_loss
from lsbook.metrics import iou
from lsbook.segmenter import Frame
from lsbook.vglaw.heads import *
from lsbook.vglaw.model import *
from lsbook.vglaw.train import attribute_kind, small


def tiny(**more):
    torch.manual_seed(0)
    model = VGLAW(VGLAWConfig(**small | more)).eval()
    for g in model.language.generators if model.config.adaptive else (): nn.init.normal_(g.phi.weight, std=.1)
    return model


def test_lap_is_the_printed_sum():
    torch.manual_seed(0)
    pool, x, z = LanguageAdaptivePooling(5, 6, 9), torch.randn(2, 5, 3, 4), torch.randn(2, 6)
    with torch.no_grad():
        for n in range(2):
            cells = x[n].flatten(1).T
            a = ((pool.key(cells) @ pool.query(z[n])) / 3).softmax(0)             # sqrt(9)
            assert torch.allclose(pool.attention(x, z)[n].flatten(), a, atol=1e-6)
            assert torch.allclose(pool(x, z)[n], a @ cells, atol=1e-6)


def test_average_pooling_reads_no_words_and_weighs_cells_alike():
    torch.manual_seed(0)
    pool, x, z = AveragePooling(), torch.randn(2, 5, 3, 4), torch.randn(2, 6)
    assert torch.allclose(pool.attention(x, z), torch.full((2, 3, 4), 1 / 12))
    assert torch.allclose(pool(x, z), x.flatten(2).mean(2), atol=1e-6) and torch.equal(pool(x, z), pool(x, -z))


def test_box_head_has_three_layers_and_a_sigmoid():
    torch.manual_seed(0)
    head, x, z = BoxHead(AveragePooling(), 4, 6), torch.randn(3, 4, 2, 2), torch.randn(3, 5)
    w = [m for m in head.mlp if isinstance(m, nn.Linear)]
    with torch.no_grad():
        v = w[1](w[0](x.mean((2, 3))).relu()).relu()
        assert len(w) == 3 and torch.allclose(head(x, z), 1 / (1 + (-w[2](v)).exp()), atol=1e-6)


def test_contraction_by_hand():
    deconv = nn.ConvTranspose2d(1, 2, 2, 2)
    with torch.no_grad():
        deconv.weight.copy_(torch.tensor([[[[2., 0], [0, 5]], [[3., 0], [7, 0]]]]))    # (1, d, i, j)
        deconv.bias.copy_(torch.tensor([1., 0]))
        for form in (deconv_dot, deconv_dot_literal):
            got = form(torch.tensor([[[[5.]]]]), torch.tensor([[10., 1.]]), deconv)
            assert got.tolist() == [[[125., 10.], [45., 260.]]]     # 23 * 5 + 10, the bias, 7 * 5 + 10, 50 * 5 + 10


def test_mask_head_draws_sixteen_pixels_a_cell():
    torch.manual_seed(0)
    head, x, z = MaskHead(8, 6, 5).eval(), torch.randn(1, 8, 3, 3), torch.randn(1, 5)
    with torch.no_grad():
        literal = deconv_dot_literal(head.enlarge(x), z, head.deconv)
        assert torch.allclose(head(x, z), literal, atol=1e-5) and literal.shape == (1, 12, 12)
        inner = head.enlarge[0](x)
        assert torch.allclose(head.enlarge(x), nn.functional.gelu(nn.functional.layer_norm(inner.movedim(1, -1), (6,), eps=1e-6)).movedim(-1, 1), atol=1e-5)


def test_config_says_what_is_wrong():
    scenes_ones = [dict(groups=5), dict(groups=0), dict(text_dim=126), dict(heads=3), dict(window=3, global_blocks=(0,)), dict(long_side=60), dict(global_blocks=(4,))]
    for wrong in (dict(pooling="max"), dict(stem="mlp"), dict(tasks=()), dict(tasks=("caption",)), dict(heads=5), dict(heads=0), dict(dim=18, heads=3), dict(window=13),
                  dict(global_blocks=(12,)), dict(global_blocks=(-1,)), dict(long_side=450), dict(long_side=0), dict(groups=-1), dict(heads_read=False, adaptive=False),
                  *(small | w for w in scenes_ones)):
        name = next(k for k in wrong if k not in small or wrong[k] != small[k]) if "words" in wrong else next(iter(wrong))
        with pytest.raises(ValueError, match=f"^{name}: got .*; wanted "): VGLAWConfig(**wrong)
    VGLAWConfig(**small | dict(window=3)), VGLAWConfig(adaptive=False), VGLAWConfig(heads_read=False), VGLAWConfig(groups=16)   # no block has windows; one of two hears
    c = VGLAWConfig()
    assert (c.l1, c.giou, c.focal, c.dice, c.bce, c.threshold) == (1, 1, 4, 4, 0, .35)
    assert (c.dim, c.depth, c.heads, c.mlp_ratio, c.window, c.global_blocks, c.drop_path) == (768, 12, 12, 4, 14, (2, 5, 8, 11), .1)
    assert (c.text_layers, c.max_tokens, c.groups, c.hidden, c.rank, c.key_dim, c.head_dim, c.long_side) == (6, 40, 12, 48, 32, 64, 256, 448)


def test_small_bert_starts_wide_and_without_dropout():
    c = small_bert(VGLAWConfig(**small))
    assert (c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["initializer_range"]) == (128, 256, 2, .08)
    assert c["hidden_dropout_prob"] == c["attention_probs_dropout_prob"] == 0 and c["max_position_embeddings"] == 40


def test_texts_are_read_once_and_dealt_out():
    model, read = tiny(), []
    words = model.text.words
    model.text.words = lambda texts: (read.append(list(texts)), words(texts))[1]
    a, mask = model.encode_text(["the star", "the red star", "the star"])
    assert read == [["the star", "the red star"]] and torch.equal(a[0], a[2]) and mask.sum(1).tolist() == [4, 5, 4]


def test_static_backbone_looks_once_an_image():
    for adaptive, want in ((True, 3), (False, 2)):
        model, seen = tiny(adaptive=adaptive), []
        model.trunk.blocks[1].register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
        x, (words, mask) = model.image_features(torch.rand(2, 3, 64, 64)), model.encode_text(["the star", "the cross", "the red star"])
        maps = model.features(x, torch.tensor([0, 1, 1]), words, mask)
        assert seen == [want] and maps.shape == (3, 128, 8, 8)
        assert torch.allclose(maps[1], maps[2], atol=1e-5) == (not adaptive)


def test_decode_enlarges_logits_and_leaves_tasks_out():
    maps, cls = torch.randn(2, 128, 8, 8), torch.randn(2, 128)
    with torch.no_grad():
        model = tiny()
        logits, boxes = model.decode(maps, cls)
        assert torch.allclose(logits, nn.functional.interpolate(model.mask(maps, cls)[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0], atol=1e-5)
        assert torch.equal(boxes, model.box(maps, cls))
        assert tiny(tasks=("box",)).decode(maps, cls)[0] is None and tiny(tasks=("mask",)).decode(maps, cls)[1] is None
        deaf = tiny(heads_read=False)
        assert torch.equal(deaf.decode(maps, cls)[0], deaf.decode(maps, -cls)[0])
        assert torch.allclose(deaf.decode(maps, cls)[1], deaf.box(maps, deaf.query.expand(2, -1)))


def test_the_heads_are_asked_by_the_first_token():
    model = tiny()
    x, image = model.image_features(torch.rand(1, 3, 64, 64)), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        words, mask = model.encode_text(["the star", "the red cross"])
        want, got = model.decode(model.features(x, image, words, mask), words[:, 0]), model.ground(x, image, ["the star", "the red cross"])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(want, got))


@pytest.mark.parametrize("weights", [dict(), dict(l1=2., giou=.5, focal=4., dice=3., bce=0.)])
def test_loss_is_the_weighted_sum(weights):
    model = tiny(**weights)
    k, masks, boxes = model.config, (torch.rand(3, 64, 64) > .7).float(), torch.rand(3, 4) * .4 + .1
    out = model(torch.rand(2, 3, 64, 64), ["the star", "the cross", "the thing"], torch.tensor([0, 0, 1]), masks, boxes)
    l1, giou = (out.boxes - boxes).abs().sum(1).mean(), box_loss(out.boxes, boxes, l1=0, giou=1)
    bce, dice, focal = (mask_loss(out.logits, masks, *w) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert torch.isclose(out.loss, k.l1 * l1 + k.giou * giou + k.bce * bce + k.dice * dice + k.focal * focal, rtol=1e-4)


def test_true_box_takes_the_rows_or_the_masks_and_refuses_the_rest():
    blot = np.zeros((6, 8), bool)
    blot[2:4, 3:7] = True
    assert true_box(blot) == (3, 2, 7, 4) and true_box(blot, [0, 0, 8, 6]) == (0, 0, 8, 6)
    for box in ([-1, 0, 3, 3], [0, -1, 3, 3], [0, 0, 9, 3], [0, 0, 3, 7], [3, 0, 3, 3], [0, 3, 3, 3], [4, 0, 3, 3]):
        with pytest.raises(ValueError, match="inside 8 x 6"): true_box(blot, box)
    with pytest.raises(ValueError, match="wanted x0, y0, x1, y1"): true_box(blot, [1, 2, 3])
    with pytest.raises(ValueError, match="without a pixel"): true_box(blot & False)


def test_mirror_words_knows_where_a_word_begins():
    assert mirror_words("Left of the rightmost, bright, upright lamp") == "Right of the leftmost, bright, upright lamp"
    assert mirror_words("right and left") == "left and right"


def test_mirrored_row_by_hand():
    mask = np.zeros((4, 10), bool)
    mask[1:3, 2:5] = True
    picture = Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB")
    row = checked_row(dict(image=picture, expression=["left", "top"], mask=[mask, mask], box=[(2, 1, 5, 3), (0, 0, 10, 4)]))
    got = mirrored(row)
    assert got["box"] == [(5, 1, 8, 3), (0, 0, 10, 4)] and got["expression"] == ["right", "top"]
    assert true_box(got["mask"][0]) == (5, 1, 8, 3) and ((np.asarray(got["image"])[..., 0] > 0) == got["mask"][0]).all()


def test_masks_and_boxes_meet_in_the_padded_square():
    frame = Frame((40, 80), (32, 64), (64, 64))
    mask = np.zeros((40, 80), bool)
    mask[10:30, 40:80] = True
    net, shares = network_masks([mask], frame)[0], to_shares([(40, 10, 80, 30)], frame)
    assert net.shape == (64, 64) and set(net.unique().tolist()) == {0., 1.}
    assert true_box(net.numpy() > 0) == (32, 8, 64, 24)
    assert torch.allclose(shares * 64, torch.tensor([[48., 16, 32, 16]]), atol=1e-4)
    odd = np.zeros((40, 80), bool)
    odd[11:29, 41:77] = True
    assert set(network_masks([odd], frame).unique().tolist()) == {0., 1.}                # no half pixels at a rim
    tall = Frame((80, 20), (64, 16), (64, 64))
    assert torch.allclose(share_of_pixel(tall), torch.tensor([1 / 80] * 4)) and torch.allclose(share_of_pixel(Frame((10, 20), (64, 64), (64, 64))), torch.tensor([1 / 20, 1 / 10, 1 / 20, 1 / 10]))
    assert to_pixels(torch.tensor([[.5, .5, 2., 2.]]), frame).tolist() == [[0, 0, 80, 40]]


def test_collate_keeps_rows_and_expressions_together():
    model, a, b = tiny(), np.zeros((32, 64), bool), np.zeros((64, 64), bool)
    a[:8, :8], b[16:32, 48:] = True, True
    batch = model.collate([dict(image=np.zeros((32, 64, 3), np.uint8), expression=["one", "two"], mask=[a, a]), dict(image=np.zeros((64, 64, 3), np.uint8), expression="three", mask=b)])
    assert batch["texts"] == ["one", "two", "three"] and batch["image"].tolist() == [0, 0, 1]
    assert torch.allclose(batch["boxes"] * 64, torch.tensor([[4., 4, 8, 8], [4, 4, 8, 8], [56, 24, 16, 16]]), atol=1e-4)
    assert batch["masks"][0].sum() == 64 and batch["masks"][2].sum() == 256 and not batch["images"][0, :, 32:].any()


def test_flips_come_in_training_alone_and_half_of_the_time():
    row = dict(image=np.zeros((8, 8, 3), np.uint8), expression="left", mask=np.eye(8) > 0)
    torch.manual_seed(0)
    model = tiny(flip=True).train()
    mirrored_rows = sum(model.collate([row])["texts"] == ["right"] for _ in range(60))
    assert 18 < mirrored_rows < 42
    model.eval()
    assert all(model.collate([row])["texts"] == ["left"] for _ in range(12))
    still = tiny(flip=False).train()
    assert all(still.collate([row])["texts"] == ["left"] for _ in range(12))


def test_images_are_stacked_once():
    model = tiny()
    one, two = model.encode_image(scenes.scene(0).image), model.encode_image(scenes.scene(1).image)
    x, image = model.encoded_batch([two, one, two])
    assert x.shape[0] == 2 and image.tolist() == [0, 1, 0] and torch.equal(x[1], one.features)


def test_heatmaps_are_probabilities_and_a_box_fills_its_pixels():
    model = tiny()
    encoded = [model.encode_image(np.zeros((30, 60, 3), np.uint8))]
    with torch.no_grad():
        logits, _ = model.ground(*model.encoded_batch(encoded), ["the star"])
        (heat,), (box,) = model.heatmaps(encoded, ["the star"])
        assert torch.allclose(heat, model.to_image_size(logits[0], encoded[0]).sigmoid(), atol=1e-6)
        (heat,), (box,) = tiny(tasks=("box",)).heatmaps(encoded, ["the star"])
    assert torch.equal(heat, filled(box, (30, 60)))
    assert filled(torch.tensor([1.6, 0, 3.4, 1]), (2, 4)).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert filled(torch.tensor([.5, 0, 2.5, 1]), (2, 4)).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]    # centres on the rim are out


@pytest.fixture(scope="module")
def shipped_answers():
    "Masks' IoU by kind for 120 expressions: what each path reads, and which blocks' generated weights are on"
    model = load("vglaw")
    rows = [r for kind, n in (("attribute", 45), ("superlative", 35), ("relation", 40)) for r in scenes.rows("referring", n, split="test", kinds=kind)]
    encoded, said = model.encode_image([r["image"] for r in rows]), [r["expression"] for r in rows]
    truths, kinds = [torch.from_numpy(np.array(r["mask"]) > 0) for r in rows], np.array([r["kind"] for r in rows])

    @torch.inference_mode()
    def ask(weights, heads, blocks=range(4)):
        x, image = model.encoded_batch(encoded)
        W = model.adaptive_weights(*model.encode_text(weights or said))
        maps = model.trunk(x[image], [(P, Phi * (i in blocks), Q) for i, (P, Phi, Q) in enumerate(W)])
        heats, _ = model.answers(*model.decode(maps, model.encode_text(heads or said)[0][:, 0]), encoded)
        v = np.array([iou(h > model.threshold, t).item() for h, t in zip(heats, truths)])
        return {k: v[kinds == k].mean() for k in ("attribute", "superlative", "relation")}
    return ask, ["the thing"] * len(rows)


def test_weights_carry_comparisons_and_heads_attributes_alone(shipped_answers):
    ask, blank = shipped_answers
    whole, weights, heads, nothing = ask(None, None), ask(None, blank), ask(blank, None), ask(blank, blank)
    assert min(whole.values()) > .8 and min(weights.values()) > .65 and max(nothing.values()) < .35
    assert heads["attribute"] > .6 and max(heads["relation"], heads["superlative"]) < .5


def test_blocks_divide_the_labour(shipped_answers):
    ask, _ = shipped_answers
    without = [ask(None, None, [j for j in range(4) if j != i]) for i in range(4)]
    assert without[0]["attribute"] > .8 and max(without[0]["relation"], without[0]["superlative"]) < .65
    assert min(without[2].values()) > .8                                  # the third block's weights are not missed
    alone = [ask(None, None, [i]) for i in (0, 3)]
    assert alone[1]["attribute"] > alone[0]["attribute"] and alone[0]["relation"] > alone[1]["relation"] + .2


def test_lap_points_and_every_cell_holds_a_box():
    from torchvision.ops import box_iou
    from lsbook.images import box_of
    model, s = load("vglaw"), scenes.scene(32, seed=5, size=64, split="test")
    encoded = [model.encode_image(s.image)]
    with torch.inference_mode():
        words, mask = model.encode_text(["the blue square"])
        maps = model.features(*model.encoded_batch(encoded), words, mask)
        assert model.box.pool.attention(maps, words[:, 0]).max() > .8
        every = to_pixels(model.box.mlp(maps[0].flatten(1).T).sigmoid(), encoded[0].frame)
    overlap = box_iou(every, torch.tensor([box_of(t.mask) for t in s.things]).float())
    assert ((overlap > .5).sum(0) >= 2).all()
