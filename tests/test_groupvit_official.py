"""Published GroupViT weights: every tensor has its place, and the network computes what transformers' does."""
import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lsbook import load
from lsbook.groupvit.model import GroupViT, GroupViTConfig
from lsbook.groupvit.official import (check_tokenizer, config_from_transformers, convert, from_released, from_transformers, published)

SETTINGS = dict(model_type="groupvit", projection_dim=12, projection_intermediate_dim=20,
                text_config=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
                vision_config=dict(hidden_size=32, intermediate_size=128, depths=[2, 1, 1], num_hidden_layers=4, num_attention_heads=4,
                                   num_group_tokens=[6, 3, 0], num_output_groups=[6, 3, 3], image_size=64))
TEXTS = ["a photo of a dog.", "grass", "a red star left of two circles, and more words than the others have"]


def noisy(model, seed=0):
    "No token, position, norm, bias or running statistic is trivial, so that exchanged tensors of one shape are noticed"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if name.endswith("running_var"): t.uniform_(.5, 2, generator=g)
            elif t.is_floating_point(): t.add_(torch.randn(t.shape, generator=g) * (.3 if t.ndim < 2 else .1))
    return model.eval()


@pytest.fixture(scope="module")
def port():
    import transformers
    return noisy(transformers.GroupViTModel(transformers.GroupViTConfig(**SETTINGS)))


@pytest.fixture(scope="module")
def made(port, tmp_path_factory):
    "A folder as the hub has it: settings, a pickle of tensors (with the buffer old files have), the tokenizer's two files"
    from lsbook.text.pretrained import clip_tokenizer
    folder = tmp_path_factory.mktemp("nvidia")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    torch.save(port.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "pytorch_model.bin")
    tokenizer = clip_tokenizer(77)
    (folder / "vocab.json").write_text(json.dumps(tokenizer.encoder))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks))
    return folder


@pytest.fixture
def folder(made, tmp_path): return shutil.copytree(made, tmp_path / "groupvit")


@pytest.fixture(scope="module")
def model(made): return from_transformers(made)


def token_ids(model, fill=49407):
    tokens = model.text.encoder.tower.tokens(TEXTS)
    return torch.tensor([t + [fill] * (max(map(len, tokens)) - len(t)) for t in tokens])


@torch.inference_mode()
def test_embeddings_and_soft_maps_are_those_of_transformers(port, model):
    x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    want = port(input_ids=token_ids(model), pixel_values=model.image.normalise(x), output_attentions=True)
    got, text = model.image_features(x), F.normalize(model.text(TEXTS), dim=-1)
    assert torch.allclose(got["image"], want.image_embeds, atol=1e-5) and torch.allclose(text, want.text_embeds, atol=1e-5)
    segments = F.normalize(port.visual_projection(want.vision_model_output.last_hidden_state.flatten(0, 1)), dim=-1)
    assert torch.allclose(got["segments"].flatten(0, 1), segments, atol=1e-5)
    for ours, theirs in zip(got["maps"], want.vision_model_output.attentions, strict=True):
        assert torch.allclose(ours.flatten(2) if ours.ndim == 4 else ours, theirs, atol=1e-5)
    assert torch.isclose(model.scale, port.logit_scale.exp().clamp(max=100))


@torch.inference_mode()
@pytest.mark.parametrize("size", [(96, 96), (64, 128), (112, 80)])
def test_other_image_sizes(port, model, size):
    "transformers resizes positions too, behind a flag that none of its models passes on"
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    embedded = port.vision_model.embeddings(model.image.normalise(x), interpolate_pos_encoding=True)
    states, maps = port.vision_model.encoder(embedded, output_attentions=True, return_dict=False)
    want = F.normalize(port.visual_projection(port.vision_model.layernorm(states).flatten(0, 1)), dim=-1)
    got = model.image_features(x)
    assert torch.allclose(got["segments"].flatten(0, 1), want, atol=1e-5)
    assert torch.allclose(got["maps"][0].flatten(2), maps[0], atol=1e-5) and torch.allclose(got["maps"][1], maps[1], atol=1e-5)


@torch.inference_mode()
def test_the_same_hard_choice_given_the_same_soft_maps(port, model):
    "One-hot over groups at the maximum of the soft map; what a group gets of its tokens: their mean, counted with one more"
    from lsbook.groupvit.grouping_block import assignment
    from transformers.models.groupvit.modeling_groupvit import hard_softmax
    scores = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assignment(scores, "hard").round(), hard_softmax(scores, dim=-2).round())
    block, theirs = model.image.stages[0].grouping, port.vision_model.encoder.stages[0].downsample
    segments, groups = (torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n)) for n in (16, 6))
    got, (want, soft) = block(segments, groups), theirs(segments, groups)
    assert torch.equal(got.soft.argmax(1), soft.argmax(1)) and torch.allclose(got.soft, soft, atol=1e-6)
    assert torch.allclose(got.segments, want, atol=1e-5)


@torch.inference_mode()
def test_pixels_as_transformers_but_for_its_second_scale(port, model):
    from lsbook.groupvit.model import compose
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    want = port(input_ids=token_ids(model), pixel_values=model.image.normalise(x), output_segmentation=True).segmentation_logits
    f, text = model.image_features(x), F.normalize(model.text(TEXTS), dim=-1)
    maps = F.interpolate(compose([f["maps"][0].flatten(2), *f["maps"][1:]]).unflatten(2, (4, 4)), (64, 64), mode="bilinear")
    got = torch.einsum("bgn,bghw->bnhw", port.logit_scale.exp() * f["segments"] @ text.T, maps)
    assert torch.allclose(got * port.logit_scale.exp(), want, atol=2e-3, rtol=1e-4)


def test_there_and_back(model):
    state = model.state_dict()
    for layout in ("transformers", "released"):
        there = convert(state, "ours", layout)
        back = convert(there, layout, "ours")
        assert state.keys() - back.keys() == ({"log_scale_nouns"} if layout == "transformers" else set())
        assert all(torch.equal(back[k], state[k]) for k in back)
    across = convert(convert(state, "ours", "released"), "released", "transformers")
    direct = convert(state, "ours", "transformers")
    assert across.keys() == direct.keys() and all(torch.equal(across[k], direct[k]) for k in direct)
    with pytest.raises(ValueError, match="'vision_model.head.weight', which is not GroupViT's"):
        convert({"vision_model.head.weight": torch.zeros(1)}, "transformers", "ours")
    with pytest.raises(ValueError): convert({}, "ours", "onnx")


def test_names_and_shapes_at_the_full_size():
    import transformers
    state = GroupViT(GroupViTConfig()).state_dict()
    with torch.device("meta"): port = transformers.GroupViTModel(transformers.GroupViTConfig()).state_dict()
    there = convert(state, "ours", "transformers")
    assert {k: v.shape for k, v in there.items()} == {k: v.shape for k, v in port.items()} and len(there) == 502
    released = convert(state, "ours", "released")
    assert len(released) == 407
    for name, shape in {    # as the facts about the authors' file have them
            "img_encoder.pos_embed": (1, 196, 384), "img_encoder.patch_embed.proj.weight": (384, 3, 16, 16), "multi_label_logit_scale": (),
            "img_encoder.layers.0.group_token": (1, 64, 384), "img_encoder.layers.1.blocks.2.attn.qkv.weight": (1152, 384),
            "img_encoder.layers.0.blocks.5.norm1.weight": (384,), "img_encoder.layers.2.blocks.2.norm2.bias": (384,),
            "img_encoder.layers.0.blocks.0.attn.proj.bias": (384,), "img_encoder.layers.2.blocks.0.mlp.fc1.weight": (1536, 384),
            "img_encoder.layers.0.downsample.norm_tokens.weight": (384,), "img_encoder.layers.0.downsample.norm_x.weight": (384,),
            "img_encoder.layers.0.downsample.norm_post_tokens.weight": (384,), "img_encoder.layers.0.downsample.norm_new_x.weight": (384,),
            "img_encoder.layers.0.downsample.mlp_channels.fc2.weight": (384, 1536), "text_encoder.transformer.resblocks.0.ln_1.weight": (256,),
            "img_encoder.layers.1.group_projector.1.fc1.weight": (192, 64), "img_encoder.layers.0.downsample.mlp_inter.fc2.weight": (64, 192),
            "img_encoder.layers.1.downsample.pre_assign_attn.attn.proj.weight": (384, 384), "img_encoder.norm.bias": (384,),
            "img_encoder.layers.1.downsample.pre_assign_attn.norm2.weight": (384,), "img_encoder.layers.0.downsample.assign.proj.bias": (384,),
            "text_encoder.token_embedding.weight": (49408, 256), "text_encoder.positional_embedding": (77, 256),
            "text_encoder.transformer.resblocks.11.attn.in_proj_weight": (768, 256), "text_encoder.transformer.resblocks.0.mlp.c_fc.bias": (1024,),
            "text_encoder.ln_final.weight": (256,), "img_projector.linear_hidden.0.weight": (4096, 384, 1),
            "img_projector.linear_hidden.1.running_var": (4096,), "text_projector.linear_out.weight": (256, 4096, 1), "logit_scale": ()}.items():
        assert released[name].shape == shape, name


def test_queries_keys_and_values_keep_their_places(port, model):
    p, ours = port.vision_model.encoder.stages[0].layers[1].self_attn, model.image.stages[0].blocks[1].attn.qkv
    assert torch.equal(ours.weight, torch.cat([p.q_proj.weight, p.k_proj.weight, p.v_proj.weight]))
    assert torch.equal(ours.bias, torch.cat([p.q_proj.bias, p.k_proj.bias, p.v_proj.bias]))


class Harm:
    def __reduce__(self): return exec, ("raise SystemExit('this ran')",)


def test_the_authors_file(model, tmp_path):
    file, state = tmp_path / "group_vit.pth", convert(model.state_dict(), "ours", "released")
    torch.save(dict(model=state, optimizer=dict(state=Harm()), config=Harm(), epoch=29, metrics={}), file)
    again = from_released(file, head=8)
    assert again.config == model.config and not again.training
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in again.state_dict().items())
    state["multi_label_logit_scale"] = torch.tensor(1.5)
    torch.save(dict(model=state), file)
    assert from_released(file, head=8).log_scale_nouns == 1.5
    del state["multi_label_logit_scale"]                            # RedCaps: no second scale
    torch.save(dict(model=state), file)
    assert from_released(file, head=8).log_scale_nouns == model.log_scale
    del state["img_encoder.norm.bias"]
    torch.save(dict(model=state), file)
    with pytest.raises(ValueError, match="group_vit.pth.*missing: image.norm.bias"): from_released(file, head=8)
    torch.save(dict(model={"a": torch.zeros(1)}), file)
    with pytest.raises(ValueError, match="got no img_encoder"): from_released(file)
    assert published(file) is None
    with pytest.raises(ValueError, match="no .safetensors file"): load(file)


def test_the_full_size_is_read_off_the_shapes(tmp_path):
    full = GroupViT(GroupViTConfig())
    torch.save(dict(model=convert(full.state_dict(), "ours", "released")), tmp_path / "full.pth")
    again = load(tmp_path / "full.pth")
    assert again.config == GroupViTConfig() and torch.equal(again.image.positions, full.image.positions)


def test_one_line_to_a_photograph(folder, model, tmp_path):
    from PIL import Image
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(tmp_path / "photo.jpg")
    loaded = load(folder)
    result = loaded.segment(tmp_path / "photo.jpg", ["dog", "grass"])
    assert result.label_map.shape == (70, 90) and result.labels == ["dog", "grass"] and loaded.config.short_side == 448
    assert (result.label_map == model.segment(tmp_path / "photo.jpg", ["dog", "grass"]).label_map).all()
    many = [f"thing {i}" for i in range(1000)]
    assert load(str(folder)).segment(tmp_path / "photo.jpg", many).label_map.max() < 1000
    assert not loaded.segment(tmp_path / "photo.jpg", ["dog"]).label_map.any()


def test_safetensors_come_before_a_pickle(folder, port, model):
    from safetensors.torch import save_file
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    save_file({k: v.contiguous() for k, v in port.state_dict().items()}, folder / "model.safetensors")
    assert torch.equal(load(folder).image.positions, model.image.positions)


@pytest.mark.parametrize("file, words", [("vocab.json", "lacks the tokenizer; wanted vocab.json or tokenizer.json"),
                                         ("pytorch_model.bin", "lacks the weights; wanted model.safetensors or pytorch_model.bin")])
def test_a_missing_file_is_named(folder, file, words):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=words): load(folder)


def test_another_tokenizer_is_refused(folder):
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(dict(version="1.0", model=dict(type="BPE", vocab=words))))
    check_tokenizer(folder / "tokenizer.json")
    (folder / "vocab.json").unlink()
    load(folder)                                                    # one of the two is enough
    words["dog</w>"], words["cat</w>"] = words["cat</w>"], words["dog</w>"]
    (folder / "vocab.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="vocab.json: got another vocabulary than CLIP's, of 49,408 entries: 2 differ"): load(folder)
    words["dog</w>"], words["cat</w>"] = words["cat</w>"], words["dog</w>"]
    last = next(w for w, i in words.items() if i == 49405)
    (folder / "vocab.json").write_text(json.dumps({w: i for w, i in words.items() if w != last}))
    with pytest.raises(ValueError, match="1 differ"): load(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(ValueError, match="of 2 entries"): load(folder)


@pytest.mark.parametrize("part, name, value", [("vision_config", "layer_norm_eps", 1e-6), ("vision_config", "hidden_act", "relu"), ("vision_config", "assign_mlp_ratio", [1, 4]), ("vision_config", "image_size", [64, 96]),
    ("vision_config", "num_channels", 1), ("text_config", "hidden_act", "gelu"), ("text_config", "intermediate_size", 32), ("text_config", "max_position_embeddings", 78)])
def test_settings_without_a_counterpart_are_refused(part, name, value):
    with pytest.raises(ValueError, match=f"got {name} "): config_from_transformers(SETTINGS | {part: SETTINGS[part] | {name: value}})


def test_settings():
    assert config_from_transformers({}) == GroupViTConfig()
    c = config_from_transformers(SETTINGS | dict(vision_config=SETTINGS["vision_config"] | dict(assign_eps=.5, patch_size=8)))
    assert c.mlp_ratio == 4
    thin = SETTINGS["vision_config"] | dict(intermediate_size=96, assign_mlp_ratio=[.5, 3])
    assert config_from_transformers(SETTINGS | dict(vision_config=thin)).mlp_ratio == 3
    assert (c.eps, c.patch, c.groups, c.text_layers, c.text_heads, c.embed_dim, c.projector) == (.5, 8, (6, 3, 0), 2, 2, 12, 20)


def test_the_hub(made, model, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    asked = []
    def download(repo_id, filename, **how):
        asked.append((repo_id, filename, how["revision"]))
        if not (made / filename).is_file(): raise EntryNotFoundError(filename)
        return str(made / filename)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load("nvidia/groupvit-gcc-yfcc", revision="main")
    assert torch.equal(loaded.image.positions, model.image.positions)
    assert [f for _, f, _ in asked] == ["config.json", "config.json", "vocab.json", "model.safetensors", "pytorch_model.bin"]
    assert {(r, v) for r, _, v in asked} == {("nvidia/groupvit-gcc-yfcc", "main")}
    made_without = shutil.copytree(made, tmp_path / "other")
    (made_without / "tokenizer.json").write_text((made / "vocab.json").read_text())
    (made_without / "vocab.json").unlink()
    made, asked[:] = made_without, []
    load("nvidia/groupvit-gcc-redcaps", revision="main")
    assert [f for _, f, _ in asked][2:4] == ["vocab.json", "tokenizer.json"]
