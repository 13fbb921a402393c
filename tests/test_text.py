"""lsbook.text: bad input, odd files and larger checks that do not belong in the notebook."""
import copy, inspect, json, os, pickle, subprocess, sys, unicodedata, warnings

import numpy as np
import pytest
import torch
from torch import nn

from lsbook.text import (Bert, BiLSTM, ClipText, Report, TextCache, Vocabulary, WordVectors, check_texts, clip_config,
        clip_weights, cut_words, glove_width, load_glove, split_words, text_encoder, word_vector)
from lsbook.files import read_tensors
from lsbook.text.pretrained import clip_text_state, weights_version, word_pieces
from lsbook.text.words import some

SMALL = dict(embed_dim=16, quick_gelu=True,
             text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
PIECES = "the a red blue circle square left of big ##s".split()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


def encoders():
    torch.manual_seed(0)
    return {"words": WordVectors(["red circle", "blue square"], dim=16),
            "bilstm": BiLSTM(Vocabulary("the red circle blue square left of".split()), dim=16, embed=8).eval(),
            "bert": Bert(TINY, layers=2, vocabulary=PIECES).eval(),
            "clip": ClipText(SMALL)}


@pytest.fixture(scope="module")
def all_encoders(): return encoders()


KINDS = ["words", "bilstm", "bert", "clip"]


@pytest.mark.parametrize("bad, error, says", [
    ("red circle", TypeError, "got str 'red circle'; wanted a list"), (None, TypeError, "NoneType"),
    ({"a": 1}, TypeError, "dict"), ([], ValueError, "at least one"), ([""], ValueError, "texts[0]"),
    (["a", " \n\t"], ValueError, "texts[1]"), (["a", "\u200b\u00a0"], ValueError, "texts[1]"),
    (["a", 3], TypeError, "texts[1]"), (["a", None], TypeError, "NoneType"), ([b"a"], TypeError, "bytes")])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_texts(all_encoders, kind, bad, error, says):
    for call in (all_encoders[kind], all_encoders[kind].check, TextCache(all_encoders[kind])):
        with pytest.raises(error, match="texts") as e: call(bad)
        assert says in str(e.value)


@pytest.mark.parametrize("kind", ["words", "bilstm"])
def test_text_without_words(all_encoders, kind):
    with pytest.raises(ValueError, match=r"'\?!'.*letter or digit"): all_encoders[kind](["red", "?!"])


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_nothing(all_encoders, kind):
    e = all_encoders[kind]
    texts = ["red", "the red circle left of the blue square", "circle", "blue circle"]
    with torch.no_grad(): together, alone = quiet(e, texts), torch.cat([quiet(e, [t]) for t in texts])
    assert together.shape == (4, e.dim)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["words", "bilstm", "bert"])
def test_words(all_encoders, kind):
    e = all_encoders[kind]
    with torch.no_grad(): features, mask = quiet(e.words, ["blue square", "the red circle left of the blue square"])
    assert features.shape == (*mask.shape, e.dim) and mask.dtype == torch.bool
    assert mask[:, 0].all() and mask[1].all() and not mask[0, -1]
    assert (mask.int().diff(dim=1) <= 0).all()          # words first, then padding


def test_clip_has_no_words(all_encoders):
    with pytest.raises(NotImplementedError, match="ClipText"): all_encoders["clip"].words(["red"])


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts(all_encoders, kind):
    texts = ["x" * 10_000, "naïve Ærøskøbing", "红色 圆", "red\ncircle\t\x00square", "RED", "🙂 red",
             "red " * 500, "42"]
    with torch.no_grad(): rows = quiet(all_encoders[kind], texts)
    assert rows.shape[0] == len(texts) and rows.isfinite().all()
    if kind == "bert": assert torch.equal(quiet(all_encoders[kind], ["RED"]), quiet(all_encoders[kind], ["red"]))


def test_500_words_are_cut_and_said():
    long = "circle " * 499 + "red"
    for e, room in ((encoders()["bilstm"], 20), (encoders()["bert"], 38), (encoders()["clip"], 75)):
        with pytest.warns(UserWarning, match=rf"cut.*loses.*\({500 - room} in all\)"): e([long, "red"])
        report = e.check([long, "red"])
        assert report.truncated == [long] and len(report.dropped[0]) == 500 - room and report.dropped[0][-1] == "red"
        with torch.no_grad():
            torch.testing.assert_close(quiet(e, [long]), quiet(e, ["circle " * room]), atol=1e-5, rtol=1e-5)


def test_only_unknown_words_are_said_and_answered():
    for kind in ("words", "bilstm", "bert"):
        e = encoders()[kind]
        with pytest.warns(UserWarning, match="zebra"): row = e(["zebra"])
        assert row.isfinite().all() and e.check(["zebra"]).unknown == ["zebra"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")              # once is enough
            e(["zebra"])
    assert encoders()["clip"].check(["zebraish qwzx"]).unknown == []
    e = WordVectors(["red"], dim=16, seed=3)
    assert e.check(["of the", "red"]).unknown == []         # stop words alone are no unknown words
    assert torch.equal(quiet(e, ["zebra"]), WordVectors(["zebra"], dim=16, seed=3)(["zebra"]))


def test_a_cut_text_is_said_once():
    e = encoders()["bilstm"]
    with pytest.warns(UserWarning, match="cut"): e(["red " * 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        e(["red " * 30])
    with pytest.warns(UserWarning, match="cut"): e(["blue " * 30])


def test_warning_stays_short():
    words = [f"w{i}" for i in range(1000)]
    texts = [" ".join(words[i:i+20]) for i in range(0, 1000, 20)]
    with pytest.warns(UserWarning) as caught: encoders()["bilstm"](texts)
    assert "(1000 in all)" in str(caught[0].message) and len(str(caught[0].message)) < 400


def test_many_cut_texts_are_counted():
    report = str(Report([], [f"t{i}" for i in range(5)], [["w"]] * 5))
    assert report.count("loses w") == 3 and report.endswith("5 texts cut in all")
    assert "all" not in str(Report([], ["t"] * 3, [["w"]] * 3))
    assert some(list("abcdefgh")) == "a, b, c, d, e, f, g, h" and some(list("abcdefghi")).endswith("h, ... (9 in all)")
    assert some(["w" * 40]) == "w" * 40


@pytest.mark.parametrize("text", ["हिन्दी", "की", "ภาษาไทย", "cafe\u0301", "می\u200cخواهم"])
def test_a_word_keeps_its_marks(text):
    assert split_words(f"({text}), {text}!") == [unicodedata.normalize("NFC", text)] * 2


def test_accents_written_in_two_ways_are_one_word():
    assert split_words("CAFE\u0301") == split_words("café") == ["café"]
    assert split_words("❤\ufe0f red") == ["red"]                    # a mark alone is no word
    vectors = quiet(WordVectors(["a"]), ["की", "के", "cafe\u0301", "caf\u00e9"])
    assert not torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[2], vectors[3])


def test_word_vectors_are_the_same_in_another_process():
    code = "from lsbook.text import word_vector; print(word_vector('red', 8).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "123"}).stdout
    assert np.allclose(json.loads(out), word_vector("red", 8))
    known = [0.3619, 0.6679, 0.0629, -0.3294, -0.2166, -0.0086, 0.0711, 0.5084]     # shipped weights rely on them
    assert np.allclose(word_vector("red", 8), known, atol=1e-4)


def test_word_vectors_options():
    assert not WordVectors(["red"]).state_dict()
    assert WordVectors(["red"]).dim == 64 and WordVectors(["red"]).seed == 0
    with pytest.raises(ValueError, match="at least one text"): WordVectors([])
    a = WordVectors(["red"]).half()(["red", "red"])
    assert a.dtype == torch.float16


def test_vocabulary():
    v = Vocabulary.from_texts(["b a", "B c"], min_count=1)
    assert v.words == ["b", "a", "c"] and v.ids(["c", "zzz"]) == [4, 1]
    assert Vocabulary.from_texts(["b a", "b c"], min_count=2).words == ["b"]
    assert Vocabulary.from_texts(["d b a b d"]).words == ["b", "d", "a"]
    with pytest.raises(ValueError, match="words: got a more than once"): Vocabulary(["a", "b", "a"])
    assert cut_words(["a b c"], 2)[1].dropped == [["c"]] and not cut_words(["a b"], 2)[1]
    assert split_words("left-most don't 3rd_one") == ["left", "most", "don", "t", "3rd", "one"]


def glove_file(folder, lines, end="\n"):
    path = folder/"glove.txt"
    path.write_bytes(end.join(lines).encode())
    return path


def test_glove_reads(tmp_path):
    rng = np.random.default_rng(0)
    table = {f"w{i}": rng.normal(size=5).round(4) for i in range(200)}
    lines = ["200 5", *(f"{w} {' '.join(map(str, v))}" for w, v in table.items())]
    lines += ["at name@domain.com 1 2 3 4 5", "1 2 3 4 5 6"]
    wanted = Vocabulary([*table, "at name@domain.com", "1", "nope"])
    for end in ("\n", "\r\n", " \n"):
        g = quiet(load_glove, glove_file(tmp_path, lines, end), wanted)
        assert g.vectors.shape == (205, 5) and g.missing == ["nope"] and g.malformed == []
        assert np.allclose(g.vectors[2:202], np.stack(list(table.values())), atol=1e-6)
        assert g.vectors[202].tolist() == [1, 2, 3, 4, 5] and g.vectors[203].tolist() == [2, 3, 4, 5, 6]
    assert torch.equal(g.vectors, quiet(load_glove, tmp_path/"glove.txt", wanted).vectors)       # missing ones too
    many = quiet(load_glove, tmp_path/"glove.txt", [*table, *(f"missing{i}" for i in range(500))]).vectors
    assert abs(many[-500:].std() / many[2:202].std() - 1) < .1 and not torch.equal(
        many[-1], quiet(load_glove, tmp_path/"glove.txt", [*table, *(f"missing{i}" for i in range(500))], seed=1).vectors[-1])


def test_glove_of_another_width_is_refused(tmp_path):
    path = glove_file(tmp_path, [f"{w} " + " ".join(["0.1"] * 300) for w in ("red", "circle", "grass")])
    assert load_glove(path, ["red"], dim=300).vectors.shape == (3, 300)
    with pytest.raises(ValueError, match="dim: got 50; wanted 300"): load_glove(path, ["red"], dim=50)


def test_glove_rows_that_are_not_in_the_file(tmp_path):
    path = glove_file(tmp_path, [f"w{i} " + " ".join(str(.01 * (-1) ** (i + j)) for j in range(50)) for i in range(9)])
    vectors = quiet(load_glove, path, ["w1", "gone", "lost"]).vectors
    assert not vectors[0].any() and vectors[1].any() and .005 < vectors[3:].std() < .02       # as the others spread
    path = glove_file(tmp_path, ["x\u2003 1 2 3", "y 4 5 6"])                                  # only the plain space counts
    assert load_glove(path, ["x\u2003"]).found == ["x\u2003"]


def test_glove_may_begin_with_a_byte_order_mark(tmp_path):
    path = glove_file(tmp_path, ["\ufeffa 1 2 3", "b 4 5 6"])
    assert load_glove(path, ["a", "b"]).found == ["a", "b"]


def test_glove_first_line_may_be_the_odd_one(tmp_path):
    path = glove_file(tmp_path, [". . . 1 2 3", "a 1 2 3", "b 4 5 6", "c 7 8 9"])
    assert glove_width(path) == 3 and quiet(load_glove, path, ["b"]).vectors[2].tolist() == [4, 5, 6]


def test_glove_malformed_lines_are_numbered(tmp_path):
    path = glove_file(tmp_path, ["a 1 2 3", "", "b 1 x 3", "c 1 2", "d 1 2 inf", "e 1 2 3", "f 1 2"])
    says = "5 malformed lines.*line 2:.*line 3: 'b'.*line 4: 2 numbers instead of 3.*line 5: 'd'.*line 7"
    with pytest.warns(UserWarning, match=says):
        g = load_glove(path, list("abcdef"))
    assert [n for n, _ in g.malformed] == [2, 3, 4, 5, 7] and g.found == ["a", "e"]
    assert g.vectors.isfinite().all()


def test_glove_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt"): load_glove(tmp_path/"none.txt", ["a"])
    with pytest.raises(ValueError, match="path"): load_glove(glove_file(tmp_path, [""]), ["a"])
    with pytest.raises(ValueError, match="path"): load_glove(glove_file(tmp_path, ["a", "b"]), ["a"])
    path = tmp_path/"binary"
    path.write_bytes(os.urandom(2000).replace(b" ", b"_"))
    with pytest.raises(ValueError, match="path"): load_glove(path, ["a"])


@pytest.mark.parametrize("join", ["concat", "sum"])
def test_bilstm_equals_one_text_at_a_time(join):
    torch.manual_seed(0)
    e = BiLSTM(list("abcdefgh"), dim=12, embed=6, join=join)
    texts = ["a b c", "d", "e f g h a b c d", "h h"]
    features, mask = e.words(texts)
    for row, m, text in zip(features, mask, texts):
        x = e.embedding(torch.tensor(e.vocabulary.ids(text.split())))[None]
        plain = e.lstm(x)[0]
        plain = plain if join == "concat" else plain[..., :12] + plain[..., 12:]
        torch.testing.assert_close(row[m], plain[0], atol=1e-6, rtol=1e-5)
    assert (features[~mask] == 0).all()


def test_bilstm_learns_order_and_pads_get_no_gradient():
    torch.manual_seed(0)
    e = BiLSTM(["circle", "square", "left", "of"], dim=16, embed=8)
    texts, y = ["circle left of square", "square left of circle"], torch.tensor([0, 1])
    head = nn.Linear(16, 2)
    opt = torch.optim.Adam([*e.parameters(), *head.parameters()], 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(e(texts)), y)
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < .1 and (e.embedding.weight[0] == 0).all() and (e.embedding.weight.grad[0] == 0).all()


def test_bilstm_options():
    frozen = BiLSTM(["a"], dim=4, embed=3, train_words=False)
    assert not frozen.embedding.weight.requires_grad and frozen.lstm.weight_hh_l0.requires_grad
    for options, name in ((dict(dim=5), "dim"), (dict(join="mean"), "join"), (dict(dim=0), "hidden_size")):
        with pytest.raises(ValueError, match=name): BiLSTM(["a"], **options)
    assert BiLSTM(["a"], dim=5, join="sum").lstm.hidden_size == 5
    e = BiLSTM(["a"])
    assert (e.dim, e.join, e.max_words, e.lstm.hidden_size, e.lstm.input_size) == (256, "concat", 20, 128, 300)
    assert e.embedding.weight.requires_grad and len(e(["a"])[0]) == 256
    with pytest.raises(RuntimeError, match="size mismatch"):
        BiLSTM(["a"], glove=type("G", (), {"vectors": torch.zeros(9, 3)})())
    copied = copy.deepcopy(frozen)
    assert torch.equal(copied(["a"]), frozen(["a"]))
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(["a"]), frozen(["a"]))


def test_bert_options():
    for options, name in ((dict(layers=4), "layers"), (dict(layers=0), "layers"), (dict(max_tokens=2), "max_tokens"),
                          (dict(max_tokens=1000), "max_tokens")):
        with pytest.raises(ValueError, match=name): Bert(TINY, **{"layers": 2, "vocabulary": PIECES, **options})
    with pytest.raises(ValueError, match="vocabulary"): Bert(TINY, layers=2)
    with pytest.raises(ValueError, match="vocabulary"): Bert("bert-base-uncased", vocabulary=PIECES)
    with pytest.raises((OSError, ValueError), match="no/such"): Bert("/no/such/folder")
    from transformers import BertConfig
    config = BertConfig(**TINY)
    assert Bert(config, layers=1, vocabulary=PIECES).dim == 32 and config.vocab_size == 30522   # the caller's stays as it was
    eight = Bert({**TINY, "num_hidden_layers": 8}, vocabulary=PIECES)
    assert eight.max_tokens == 40 and len(eight.model.encoder.layer) == 6 and eight.model.pooler is None
    ids, report = word_pieces(eight.tokenizer, ["circle " * 60 + "zebra"])
    assert len(ids[0]) == 40 and report.unknown == []       # what was cut is not unknown
    frozen = Bert(TINY, layers=1, vocabulary=PIECES, frozen=True)
    assert not frozen.train().training and not frozen(["red"]).requires_grad
    live = Bert(TINY, layers=1, vocabulary=PIECES)
    assert live.training and live(["red"]).requires_grad
    assert live.train(False).training is False


def test_bert_folder_without_a_word_on_stderr(tmp_path, capfd):
    torch.manual_seed(0)
    a = Bert(TINY, layers=3, vocabulary=PIECES).eval()
    a.model.save_pretrained(tmp_path)
    a.tokenizer.save_pretrained(tmp_path)
    b = Bert(tmp_path, layers=3).eval()
    assert torch.allclose(a(["the red circles"]), b(["the red circles"]), atol=1e-6)
    assert b.model.pooler is None and Bert(tmp_path, layers=1).dim == 32 and "rror" not in capfd.readouterr().err


def test_clip_lengths_agree_over_many_texts(all_encoders):
    clip, rng = all_encoders["clip"], np.random.default_rng(0)
    words = ["red", "unicyclist", "of", "über", "7", "left"]
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, 64)]
    own, padded = quiet(clip, texts), quiet(clip, texts, pad=True)
    plain = quiet(lambda: clip.tower(clip.token_ids(texts, pad=True)))
    torch.testing.assert_close(own, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, plain.detach(), atol=1e-5, rtol=1e-5)
    assert clip.token_ids(["red"]).shape[1] == 3 and clip.token_ids(["red"], pad=True).shape[1] == 77
    assert ClipText(SMALL, pad=True).token_ids(["red"]).shape[1] == 77


def test_clip_tokens_are_open_clips(all_encoders):
    import open_clip
    texts = ["a photo of a cat", "zebraish qwzx 12", "dog " * 100]
    theirs = open_clip.get_tokenizer("ViT-B-32-quickgelu")(texts)
    assert torch.equal(quiet(all_encoders["clip"].token_ids, texts, pad=True), theirs)


def test_clip_equals_open_clips_whole_model(tmp_path):
    import open_clip
    torch.manual_seed(0)
    config = {**SMALL, "vision_cfg": dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)}
    whole = open_clip.CLIP(**config).eval()
    texts = ["red circle", "a photo of a very large cat"]
    with torch.no_grad(): want = whole.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
    torch.save(whole.state_dict(), tmp_path/"whole.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, tmp_path/"module.pt")
    from safetensors.torch import save_file
    (tmp_path/"folder").mkdir()
    tensors = {k: v.contiguous() for k, v in whole.state_dict().items()}
    save_file(tensors, tmp_path/"folder"/"open_clip_model.safetensors")
    (tmp_path/"folder"/"open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    custom = open_clip.CustomTextCLIP(**config)
    torch.save(custom.state_dict(), tmp_path/"custom.pt")
    for source in ((SMALL, tmp_path/"whole.pt"), (config, tmp_path/"module.pt"), (tmp_path/"folder", None),
                   (f"local-dir:{tmp_path/'folder'}", None), (SMALL, tmp_path/"folder")):
        clip = ClipText(*source)
        torch.testing.assert_close(clip(texts), want, atol=1e-5, rtol=1e-5)
        assert clip.source != "random weights" and not any("visual" in k for k in clip.state_dict())
    torch.testing.assert_close(ClipText(SMALL, tmp_path/"custom.pt")(texts), custom.eval().encode_text(
        open_clip.get_tokenizer("ViT-B-32")(texts)).detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pretrained"): ClipText(tmp_path/"folder", "openai")


class Trap:
    def __reduce__(self): return os.mkdir, (Trap.path,)


def test_bad_checkpoints(tmp_path):
    good = tmp_path/"good.pt"
    torch.save(ClipText(SMALL).tower.state_dict(), good)
    Trap.path = str(tmp_path/"executed")
    torch.save({"a": Trap()}, tmp_path/"trap.pt")
    (tmp_path/"cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path/"cut.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path/"empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path/"list.pt")
    torch.save({"epoch": 3}, tmp_path/"numbers.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path/"other.pt")
    for name in ("trap.pt", "cut.pt", "cut.safetensors", "empty.pt", "list.pt", "numbers.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"pretrained.*{name}"): ClipText(SMALL, tmp_path/name)
    assert not (tmp_path/"executed").exists()
    with pytest.raises(FileNotFoundError, match="none.pt"): read_tensors(tmp_path/"none.pt")
    with pytest.raises(ValueError, match="another shape"): ClipText({**SMALL, "embed_dim": 8}, good)
    with pytest.raises(ValueError, match="pretrained"): clip_weights(SMALL, "openai")
    (tmp_path/"two.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pretrained.*one checkpoint"): clip_weights(SMALL, tmp_path)
    (tmp_path/"cut.safetensors").unlink()
    assert clip_weights(SMALL, tmp_path) == str(tmp_path/"two.safetensors")      # before all the pickles beside it


def test_only_the_text_tower_is_taken_out_of_a_clip():
    keep = {"token_embedding.weight": 1, "positional_embedding": 2, "transformer.x": 3, "ln_final.bias": 4, "text_projection": 5}
    drop = dict.fromkeys(["visual.proj", "logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask"])
    assert clip_text_state(keep | drop) == clip_text_state({f"module.{k}": v for k, v in (keep | drop).items()}) == keep
    assert clip_text_state({f"text.{k}": v for k, v in keep.items()} | drop) == keep


def test_a_tag_of_another_activation_is_said(monkeypatch):
    import open_clip
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: "there.pt")
    with pytest.warns(UserWarning, match="QuickGELU"): assert clip_weights("ViT-B-32", "openai") == "there.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip_weights("ViT-B-32-quickgelu", "openai") == clip_weights("ViT-B-32", "laion2b_s34b_b79k") == "there.pt"


def test_clip_names():
    with pytest.raises(ValueError, match="ViT-B-32"): clip_config("ViT-B-23")
    for name in ("xlm-roberta-base-ViT-B-32", "ViT-B-16-SigLIP"):
        with pytest.raises(ValueError, match="causal"): clip_config(name)
    for odd in (dict(no_causal_mask=True), dict(embed_cls=True), dict(hf_model_name="x"), dict(pool_type="first")):
        with pytest.raises(ValueError, match="causal"): clip_config({**SMALL, "text_cfg": {**SMALL["text_cfg"], **odd}})
    assert inspect.signature(ClipText).parameters["name"].default == "ViT-B-32-quickgelu"
    config = clip_config("RN50x16")
    assert config["embed_dim"] == 768 and config["text_cfg"]["context_length"] == 77
    clip_config(SMALL)["text_cfg"]["width"] = 1
    assert SMALL["text_cfg"]["width"] == 32                # a copy
    trained = ClipText(SMALL, frozen=False)
    assert trained.training and trained(["red"]).requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_devices(kind, device):
    e = encoders()[kind]
    here = quiet(e, ["red circle", "blue"]).detach()
    there = quiet(e.to(device), ["red circle", "blue"])
    assert there.device.type == device
    torch.testing.assert_close(here, there.detach().cpu(), atol=1e-3, rtol=1e-3)
    if kind != "clip": assert quiet(e.words, ["red circle", "blue"])[1].device.type == device


class Counted(nn.Module):
    "Counts what it encodes."
    dim = 3
    def __init__(self, trainable=False):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3), requires_grad=trainable)
        self.drop, self.calls = nn.Dropout(.5), []
        self.eval()

    def forward(self, texts):
        self.calls += texts
        return torch.tensor([[float(len(t))] for t in texts]) .to(self.w) * self.drop(self.w)


def test_cache_encodes_once_in_order():
    e = Counted()
    cache = TextCache(e, chunk=2)
    texts = ["ccc", "a", "bb", "a", "dddd"]
    assert cache(texts)[:, 0].tolist() == [3, 1, 2, 1, 4] and sorted(e.calls) == ["a", "bb", "ccc", "dddd"]
    cache(texts[::-1])
    assert len(e.calls) == 4 == cache.encoded
    cache(["a"])[0] += 5                                    # a caller's edit stays with the caller
    assert cache(["a"])[0, 0] == 1


def test_cache_follows_the_weights():
    e = Counted()
    cache = TextCache(e)
    def stale(): return not torch.equal(cache(["aa"]), e(["aa"]))
    cache(["aa"])
    with torch.no_grad(): e.w.mul_(2)
    assert not stale()
    e.load_state_dict({"w": torch.full((3,), 7.)})
    assert not stale()
    e.load_state_dict({"w": torch.full((3,), 9.)}, assign=True)
    assert not stale()
    e.w = nn.Parameter(torch.full((3,), 4.), requires_grad=False)
    assert not stale()
    e.w.requires_grad_(True).grad = torch.ones(3)
    torch.optim.SGD([e.w], 1.).step()
    e.w.requires_grad_(False)
    assert not stale()
    cache.encoder = Counted()
    assert torch.equal(cache(["aa"]), cache.encoder(["aa"]))
    e = cache.encoder
    with torch.no_grad(): e.w.fill_(1 + 2**-20)
    cache(["aa"])
    nn.Sequential(cache).half().float()                     # the round trip loses digits
    assert not stale()
    e.w.data.add_(1)
    assert stale()
    cache.clear()
    assert not stale() and cache.texts == ["aa"]
    assert cache._held[0].data_ptr() == e.w.data_ptr()      # the old numbers stay in memory: new ones get no address that was seen


def test_cache_follows_a_cast_of_the_encoder_alone():
    e = Counted()
    cache = TextCache(e)
    with torch.no_grad(): e.w.fill_(1 + 2**-20)
    for _ in range(20):
        kept = cache(["aa"])
        e.half().float()                                    # behind the cache's back; the first round loses digits
        assert torch.equal(cache(["aa"]), e(["aa"]))
    assert not torch.equal(kept, torch.full((1, 3), 2 * (1 + 2**-20)))


def test_a_version_belongs_to_its_module_and_its_weights():
    a = nn.Linear(2, 2)
    seen = {weights_version(a), weights_version(copy.deepcopy(a))}
    assert len(seen) == 2 and weights_version(a) in seen
    twin = nn.Linear(2, 2)
    twin.weight, twin.bias = a.weight, a.bias
    assert weights_version(twin) != weights_version(a)      # the same tensors, another module
    for change in (lambda: a.requires_grad_(False).weight.add_(1), lambda: setattr(a, "bias", nn.Parameter(a.bias + 1)),
                   lambda: a.double(), lambda: a.load_state_dict(a.state_dict())):
        change()
        assert weights_version(a) not in seen
        seen.add(weights_version(a))
    b = nn.BatchNorm1d(2)
    before = weights_version(b)
    b(torch.rand(4, 2))                                     # a buffer is a weight too
    assert weights_version(b) != before


def test_cache_steps_aside_while_training():
    e = Counted(trainable=True)
    cache = TextCache(e)
    for k in range(3):
        cache(["aa"]).sum().backward()                      # a kept graph would fail the second time
        assert cache.texts == [] and e.w.grad.sum() == 6 * (k + 1)
    with torch.no_grad():
        cache(["aa"])
        assert cache.texts == ["aa"]
        cache.train()                                       # dropout is on: nothing to keep, nothing to reuse
        assert len({tuple(cache(["aa"])[0].tolist()) for _ in range(30)}) > 1


def test_cache_in_inference_mode_and_autocast():
    e = ClipText(SMALL)
    cache = TextCache(e)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16): cache(["red circle"])
    row = cache(["red circle"])
    torch.testing.assert_close(row, e(["red circle"]), atol=1e-5, rtol=1e-5)
    layer = nn.Linear(16, 1)
    layer(row).sum().backward()                             # an inference tensor could not be used here
    assert layer.weight.grad is not None


@pytest.mark.parametrize("device", DEVICES)
def test_cache_follows_the_device(device):
    cache = TextCache(WordVectors(["red"]))
    cache(["red"])
    assert cache.to(device)(["red"]).device.type == device and cache.cpu()(["red"]).device.type == "cpu"
    assert cache.dim == 64 and cache.check(["red"]) == Report() and not cache.state_dict()


def test_specs(tmp_path):
    assert text_encoder("words", words=["red"]).dim == 64
    with pytest.raises(ValueError, match="words"): text_encoder("words")
    for bad in ("word", "clip", "clip:", "bert:", ""):
        with pytest.raises(ValueError, match="spec"): text_encoder(bad)
    with pytest.raises(ValueError, match="spec"): text_encoder(None)
    with pytest.raises(ValueError, match="pretrained: got 'no@tag'"): text_encoder("clip:ViT-B-32@no@tag")
    a = Bert(TINY, layers=2, vocabulary=PIECES)
    a.model.save_pretrained(tmp_path)
    a.tokenizer.save_pretrained(tmp_path)
    assert text_encoder(f"bert:{tmp_path}", layers=1, frozen=True).frozen


def test_check_texts_takes_tuples_and_a_name():
    assert check_texts(("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^labels\[1\]: got the blank ''; wanted words$"): check_texts(["a", ""], "labels")


def test_import_is_light():
    code = ("import sys, lsbook.text; "
            "print([m for m in ('transformers', 'open_clip', 'datasets', 'timm') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
