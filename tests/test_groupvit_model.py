"""GroupViT whole: shapes and counts of the paper's model, maps through stages, votes, any size, bad input, other devices and types."""
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lsbook import scenes
from lsbook.groupvit.contrastive import image_text_loss, noun_loss, text_ids
from lsbook.groupvit.grouping_block import assignment
from lsbook.groupvit.model import (
    ClipTower,
    GroupViT,
    GroupViTConfig,
    Rows,
    WordTable,
    compose,
    consistency_loss,
    solved,
)
from lsbook.groupvit.train import small
from lsbook.segmenter import config_from
from lsbook.text.words import word_vector

LITTLE = dict(dim=24, heads=3, depths=(1, 1, 1), group_tokens=(6, 3, 0), groups=(5, 2, 0), image_size=32, patch=8, text_dim=16,
              text_layers=1, text_heads=2, embed_dim=12, projector=20, short_side=32)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return GroupViT(GroupViTConfig(**LITTLE | changes))


def ours(seed=0, **changes):
    torch.manual_seed(seed)
    return GroupViT(GroupViTConfig(**small | dict(dim=24, heads=3, width=8, group_tokens=(6,), groups=(6,)) | changes))


def captions(n=4): return list(scenes.rows("caption", n, objects="patterned"))


def test_the_papers_sizes():
    m = GroupViT(GroupViTConfig())
    count = lambda x: sum(p.numel() for p in x.parameters())
    assert (count(m), count(m.image), count(m.text), count(m.projector)) == (55_726_610, 28_837_136, 24_255_488, 2_633_984)
    assert m.image.positions.shape == (1, 196, 384) and m.stride == 16
    assert [s.drop_path1.drop_prob if hasattr(s.drop_path1, "drop_prob") else 0. for s in m.image.stages[2].blocks][-1] == pytest.approx(.1)
    assert m.log_scale.item() == pytest.approx(math.log(1 / .07)) and m.log_scale_nouns.item() == pytest.approx(math.log(1 / .07))
    assert all(b.norm1.eps == 1e-5 for s in m.image.stages for b in s.blocks) and m.image.norm.eps == 1e-5
    w = m.image.stages[0].blocks[0].attn.qkv.weight
    assert .018 < w.std() < .022 and m.image.stages[0].blocks[0].attn.qkv.bias.abs().max() == 0
    assert m.image.stages[1].tokens.abs().max() == 0 and .018 < m.image.stages[0].tokens.std() < .022


def test_a_stage_by_hand():
    m = model().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        x = m.image.tokens(images)
        s = m.image.stages[0]
        y = s.blocks(torch.cat([x, s.tokens.expand(2, -1, -1)], 1))
        g1 = y[:, 16:]
        first = s.grouping(y[:, :16], g1)
        t = m.image.stages[1]
        z = t.blocks(torch.cat([first.segments, t.tokens + t.carry(g1)], 1))
        second = t.grouping(z[:, :5], z[:, 5:])
        last = m.image.norm(m.image.stages[2].blocks(second.segments))
        got = m.image(images)
    assert torch.allclose(got.segments, last, atol=1e-6) and torch.allclose(got.tokens, y[:, :16], atol=1e-6)
    assert torch.allclose(got.soft[0], first.soft) and torch.allclose(got.soft[1], second.soft, atol=1e-6)
    assert torch.allclose(got.first, m.image.norm(first.segments), atol=1e-6)
    f = m.eval().encode_image(Image.new("RGB", (32, 32))).features
    assert f["maps"][0].shape == (5, 4, 4) and f["maps"][1].shape == (2, 5) and f["segments"].shape == (2, 12) and f["image"].shape == (12,)


def test_the_image_vector_is_the_projected_mean():
    m = model().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        f = m.image_features(images)
        x = m.image(images).segments
        assert torch.allclose(f["image"], F.normalize(m.projector(x.mean(1)), dim=-1), atol=1e-6)
        assert torch.allclose(f["segments"], F.normalize(m.projector(x), dim=-1), atol=1e-6)


def test_rows_normalise_over_images_and_tokens():
    torch.manual_seed(0)
    x, rows = torch.randn(3, 4, 5), Rows(5)
    assert torch.allclose(rows(x).flatten(0, 1), torch.nn.BatchNorm1d(5)(x.flatten(0, 1)), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (24, 80)])
def test_any_size(size):
    m = model().eval()
    with torch.no_grad(): got = m.image(torch.rand(1, 3, *size))
    assert got.soft[0].shape == (1, 5, size[0] // 8 * (size[1] // 8)) and torch.allclose(got.soft[0].sum(1), torch.ones(1), atol=1e-5)


def test_the_size_of_images():
    m = model()
    for given, want in (((64, 48), (32, 40)), ((48, 64), (40, 32)), ((10, 1000), (3200, 32)), ((32, 32), (32, 32))):
        assert m.network_size(Image.new("RGB", given)) == want
    r = m.eval().segment(np.zeros((50, 90, 3), np.uint8), ["grass", "dog"])
    assert r.label_map.shape == (50, 90)


def test_compose():
    torch.manual_seed(0)
    A, B = assignment(torch.randn(2, 5, 7), "soft"), assignment(torch.randn(2, 3, 5), "soft")
    loop = torch.zeros(2, 3, 7)
    for b in range(2):
        for i in range(3):
            for p in range(7): loop[b, i, p] = sum(B[b, i, g] * A[b, g, p] for g in range(5))
    assert torch.allclose(compose([A, B]), loop, atol=1e-6) and torch.equal(compose([A]), A)
    hard = compose([A, B], hard=True)
    for b in range(2):
        for p in range(7): assert hard[b, B[b, :, A[b, :, p].argmax()].argmax(), p] == 1
    assert hard.sum() == 14


def test_the_label_map_is_the_mixture_of_the_segments_labels():
    m = model().eval()
    e = m.encode_image(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    text = m.encode_text(["grass", "dog", "red circle"])
    f = e.features
    maps = F.interpolate(compose([f["maps"][0].flatten(1), f["maps"][1]]).view(1, 2, 4, 4), (32, 32), mode="bilinear")[0]
    q = (m.scale * f["segments"] @ text.T).softmax(-1)
    want = torch.einsum("gn,ghw->nhw", q, maps).argmax(0)
    with torch.no_grad(): assert torch.equal(m.label_map(e, text), want)


def test_templates_are_averaged_before_they_are_normalised():
    from lsbook.groupvit.contrastive import templates
    m = model(ask="simple").eval()
    with torch.no_grad():
        raw = torch.stack([m.text([t.format("dog")])[0] for t in templates("simple")])
        assert torch.allclose(m.encode_text(["cat", "dog"])[1], F.normalize(raw.mean(0), dim=-1), atol=1e-5)


def test_the_text_tower_stops_at_the_end_token():
    t = ClipTower(16, 1, 2).eval()
    with torch.no_grad(): alone, together = t(["dog"]), t(["dog", "a photo of a very large red circle on grass"])
    assert torch.allclose(alone[0], together[0], atol=1e-5) and t.model.config.hidden_act == "quick_gelu" and t.model.config.vocab_size == 49408
    with pytest.warns(UserWarning, match="cut"): t(["dog " * 100])


def test_words_are_summed_and_unknown_ones_said():
    t = WordTable(["red", "circle"], 8)
    assert torch.allclose(t(["red circle", "red"])[0], t.table.sum(0)) and t.table.requires_grad and "table" in t.state_dict()
    with pytest.warns(UserWarning, match="dog"): v = t(["dog", "red"])
    assert torch.allclose(v[0], torch.from_numpy(word_vector("dog", 8))) and torch.allclose(v[1], t.table[0])


def test_the_captions_loss_is_both_contrasts():
    m = model(augment=False, drop_path=0.)
    m.eval()
    b = m.collate(captions())
    image = m.projector(m.image(b["images"]).segments.mean(1))
    want = image_text_loss(image, m.text(b["texts"]), m.scale, text_ids(b["texts"]))
    assert len(b["prompts"]) == 12 and len(b["about"]) == 12
    assert torch.allclose(GroupViT(m.config).eval().requires_grad_(False)(**b | dict(prompts=None)).loss * 0 + want, m(**b | dict(prompts=None)).loss, atol=1e-5)
    more = image_text_loss(image, m.text(b["prompts"]), m.log_scale_nouns.exp(), text_ids(b["about"]))
    assert torch.allclose(m(**b).loss, want + more, atol=1e-4)


def test_the_nouns_loss():
    m = ours(consistency=0.)
    m.eval()
    b = m.collate(captions())
    assert b["texts"] == sorted({n for r in captions() for n in r["nouns"]})
    x = m.image(b["images"])
    s = m.scale * m.unit(x.segments) @ m.encode_text(b["texts"]).T
    plain = noun_loss(s, b["present"])
    assert torch.allclose(m(**b).loss, plain, atol=1e-5)
    m.config.consistency = 2.
    votes = m.scale * m.unit(m.image.alone(x.tokens)) @ m.encode_text(b["texts"]).T
    assert torch.allclose(m(**b).loss, plain + 2 * consistency_loss(s, x.soft[0], votes, b["present"]), atol=1e-5)
    m.config.consistency, m.config.auxiliary = 0., .5                  # of one stage the first segments are the last
    assert torch.allclose(m(**b).loss, 1.5 * plain, atol=1e-5)


def test_solved_by_loops():
    torch.manual_seed(0)
    s, y = torch.randn(3, 4, 5), torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    got = solved(s, y)
    for b in range(2):
        pooled = s[b].exp().sum(0).log()
        terms = [-math.log(pooled[k].exp() / (pooled[k].exp() + pooled[~y[b]].exp().sum())) for k in range(5) if y[b, k]]
        assert float(got[b]) == pytest.approx(math.exp(-sum(terms) / len(terms)), rel=1e-5)
    assert got[2] == 0


def test_votes_by_loops():
    torch.manual_seed(0)
    said, joined, votes = torch.randn(2, 3, 4), assignment(torch.randn(2, 3, 6), "soft"), torch.randn(2, 6, 4)
    y, total = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool(), 0.
    for b in range(2):
        each = []
        for p in range(6):
            v = [math.exp(votes[b, p, k]) if y[b, k] else 0. for k in range(4)]
            mix = [sum(joined[b, g, p] * said[b, g].softmax(-1)[k] for g in range(3)) for k in range(4)]
            each.append(-sum(v[k] / sum(v) * math.log(mix[k]) for k in range(4)))
        total += float(solved(said, y)[b]) * sum(each) / 6 / 2
    assert float(consistency_loss(said, joined, votes, y)) == pytest.approx(total, rel=1e-4)


def test_votes_are_constants_and_reach_map_and_segments():
    s, v = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 6, 4, requires_grad=True)
    scores = torch.randn(1, 3, 6, requires_grad=True)
    y = torch.tensor([[True, True, False, False]])
    consistency_loss(s, assignment(scores, "soft"), v, y).backward()
    assert v.grad is None and s.grad.abs().sum() > 0 and scores.grad.abs().sum() > 0


def test_no_mask_is_looked_at():
    class Unreadable(dict):
        def __getitem__(self, k):
            assert k in ("image", "caption", "nouns"), f"{k} was read"
            return super().__getitem__(k)
        def get(self, k, default=None): return self[k] if k in self else default
    m = ours()
    rows = [Unreadable(r | dict(mask="no", label_map="no")) for r in captions()]
    m(**m.collate(rows)).loss.backward()
    assert all(p.grad is not None for p in m.parameters())


def test_nouns_are_found_where_none_are_given():
    m = ours()
    rows = [{k: r[k] for k in ("image", "caption")} for r in captions()]
    b = m.collate(rows)
    assert "circle" in " ".join(b["texts"]) or "star" in " ".join(b["texts"])


def test_captions_without_nouns():
    m = ours()
    rows = [dict(image=r["image"], caption="of and the", nouns=[]) for r in captions()[:1]] + captions()[1:]
    out = m(**m.collate(rows))
    assert torch.isfinite(out.loss)
    p = model(augment=False)
    with pytest.warns(UserWarning, match="without a noun"): b = p.collate(rows)
    assert b["prompts"][:3] == ["of and the"] * 3 and torch.isfinite(p(**b).loss)


@pytest.mark.parametrize("changes", [{}, dict(consistency=1.), dict(consistency=1., auxiliary=1.)])
def test_a_batch_without_nouns_teaches_nothing_and_goes_on(changes):
    m = ours(**changes)
    rows = [dict(image=r["image"], caption=said) for r, said in zip(captions(3), ("running fast", "so beautiful", " "))]
    batch = m.collate(rows)
    assert batch["texts"] == [] and batch["present"].shape == (3, 0) and batch["present"].dtype == torch.bool
    out = m(**batch)
    out.loss.backward()
    assert out.loss == 0 and all(p.grad is not None and not p.grad.any() for p in m.parameters())
    assert m.collate([rows[0] | dict(nouns=["", "red star"])])["texts"] == ["red star"]


@pytest.mark.parametrize("multi_label", [0., 1.])
def test_a_blank_caption_is_read_as_a_photo(multi_label):
    m = model(augment=False, multi_label=multi_label)
    rows = [r | dict(caption=said, nouns=None) for r, said in zip(captions(3), ("", " \n", "a dog"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        batch = m.collate(rows)
    assert batch["texts"] == ["a photo", "a photo", "a dog"] and torch.isfinite(m(**batch).loss)


def test_what_a_fresh_tower_draws():
    "The text tower keeps its own first numbers, by width and depth; the image encoder has `init`, the projectors PyTorch's"
    m = GroupViT(GroupViTConfig(**LITTLE | dict(text_dim=64, dim=48, projector=256, init=.05)))
    layer, std = m.text.encoder.tower.model.encoder.layers[0], lambda p: pytest.approx(p.std().item(), rel=.1)
    assert std(layer.mlp.fc1.weight) == 128 ** -.5 and std(m.text.encoder.tower.model.embeddings.position_embedding.weight) == .01
    assert std(m.image.stages[0].blocks[0].mlp.fc1.weight) == .05 and std(m.projector[3].weight) == (3 * 256) ** -.5


def test_one_label_and_a_thousand():
    m = ours().eval()
    image = scenes.scene(0).image
    assert (m.segment(image, ["grass"]).label_map == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        many = m.segment(image, [f"red circle {i}" for i in range(1000)])
    assert many.label_map.max() < 1000 and many.label_map.dtype == np.int32


def test_gradients_in_parts_are_those_of_the_whole():
    rows = captions(6)
    grads = []
    for cached in (None, 2):
        m = ours(cached=cached)
        for x in m.modules():                                       # BatchNorm mixes images: the stem's statistics are fixed
            if isinstance(x, torch.nn.BatchNorm2d): x.eval()
        torch.manual_seed(0)
        m.train()
        for x in m.modules():
            if isinstance(x, torch.nn.BatchNorm2d): x.eval()
        m(**m.collate(rows)).loss.backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_models_without_groups_and_with_several_stages():
    rows = captions()
    for changes in (dict(group_tokens=(0,), groups=(0,)),
                    dict(depths=(1, 1), group_tokens=(6, 4), groups=(6, 4), auxiliary=1., consistency=1.)):
        m = ours(**changes)
        m(**m.collate(rows)).loss.backward()
        r = m.eval().segment(rows[0]["image"], scenes.label_names())
        assert r.label_map.shape == (64, 64)


def test_configs_come_back_from_json():
    import json
    c = GroupViTConfig(**small)
    assert config_from(GroupViTConfig, json.loads(json.dumps(asdict(c)))) == c


def test_half_precision_and_compile():
    m = ours().eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = m.image(images)
        with torch.autocast("cpu", torch.bfloat16): half = m.image(images)
    assert (want.soft[0] - half.soft[0]).abs().mean() < .05 and half.soft[0].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    m = ours().eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        want = m.image_features(images)
        m.cuda()
        got = m.image_features(images.cuda())
    assert torch.allclose(want["segments"], got["segments"].cpu(), atol=1e-3)
    assert torch.allclose(want["maps"][0], got["maps"][0].cpu(), atol=1e-3)
    m.train()
    out = m(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in m.collate(captions()).items()})
    out.loss.backward()
    assert torch.isfinite(out.loss)
