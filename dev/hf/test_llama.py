"""
Tests what test_hf.py tests, with Llama's block: hf.py, modeling_rev_llama.py and reference.py against transformers.

    python3 dev/hf/test_llama.py [--sampler PATH] [TEST ...]      without it, the sample_rev_llama that `make` builds

Model files are read by dev/reference/reference.py in float64, which shares nothing with hf.py, and by the trainer's own network.
Needs what test_hf.py needs, and gguf. The last line is `N passed, N failed`.
"""
import argparse, contextlib, io, json, shutil, struct, subprocess, sys, time, traceback
from pathlib import Path

import test_hf as t
from test_hf import ROOM, TOLERANCE, check, convert, load, logits_of, make_tokens, near, refused, same_tensors
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
import reference

TINY = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1000.0, bos_token_id=None, eos_token_id=None)

def random_llama(**config):
    """A Llama with no tensor left as it is initialized: logits of order 1, forces that matter."""
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 * p.shape[-1]**-0.5 * 3 if p.ndim == 2 else 0.2).add_(1.0 if p.ndim == 1 else 0.0)
    return model

def reference_logits(path, ids):
    with torch.no_grad():
        return reference.logits_of(reference.read_model(path, torch.float64), ids)

# ------------------------------------------------------------------------------------------------------------------------
# A Llama there and back

def test_shapes():
    """Two layers of two models of the family."""
    for what, config in [("TinyLlama", dict(vocab_size=32000, num_key_value_heads=4, intermediate_size=5632)),
                         ("SmolLM2-1.7B", dict(vocab_size=49152, num_key_value_heads=32, intermediate_size=8192, rope_theta=130000.0,
                                               tie_word_embeddings=True))]:
        model = random_llama(hidden_size=2048, num_attention_heads=32, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-5, **config)
        tokens = make_tokens(config["vocab_size"], 1, 48)
        model.save_pretrained(ROOM / "large", max_shard_size="200MB")
        convert("import", ROOM / "large", ROOM / "large.bin")
        logits = logits_of(model, tokens.ids)
        check(logits.std() > 0.5, f"{what}: logits of order 1")
        difference = near(t.trainer_logits(ROOM / "large.bin", tokens), logits, f"{what}: logits", 1e-4 * float(logits.abs().max()))
        convert("export", ROOM / "large.bin", ROOM / "large back")
        same_tensors(model, load(ROOM / "large back"), what)
        print(f"{what}: logits differ by {difference:.1e} of {logits.abs().max():.1f}", flush=True)
        for path in ("large", "large back"):
            shutil.rmtree(ROOM / path)
        (ROOM / "large.bin").unlink()

def test_checkpoints():
    """Each form that a checkpoint comes in, and back; every tensor with the same bits, and the same type."""
    for tied in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            what, model = f"{'tied' if tied else 'untied'} {dtype}", random_llama(tie_word_embeddings=tied, **TINY).to(dtype)
            folder, path, back = ROOM / what, ROOM / f"{what}.bin", ROOM / f"{what} back"
            model.save_pretrained(folder, max_shard_size="20KB")
            check(len(list(folder.glob("*.safetensors"))) > 2, f"{what}: shards")
            convert("import", folder, path)
            header, size = np.fromfile(path, "<i4", 256), 2 if dtype == torch.bfloat16 else 4
            fields = [20240326, 1003 if size == 4 else 1005, 64, 300, 4, 4, 64, 384, 0]
            check(header[:9].tolist() == fields and header[14] == 1 and header[[240, 241, 244, 245]].tolist() == [2, 96, tied, 16]
                  and header[242:244].view("<f4").tolist() == [1000, np.float32(1e-5)], f"{what}: the header, {header[:15]}, {header[240:246]}")
            count = 1024 + size * (sum(p.numel() for p in model.parameters()) + 84 * 64 * (2 - tied))
            check(path.stat().st_size == count, f"{what}: 300 rows become 384, {path.stat().st_size} bytes of {count}")
            convert("export", path, back)
            again = load(back)
            check(type(again) is LlamaForCausalLM and (again.lm_head.weight is again.model.embed_tokens.weight) == tied, f"{what}: a Llama")
            same_tensors(model, again, what)
            ids = torch.randint(0, 300, (2, 40))
            check(torch.equal(logits_of(again, ids), logits_of(load(folder), ids)), f"{what}: the same logits")
            convert("import", back, ROOM / "again.bin", "--force")
            check((ROOM / "again.bin").read_bytes() == path.read_bytes(), f"{what}: the same file again")
            if dtype == torch.float32:
                check(logits_of(model, ids).std() > 0.5, f"{what}: logits of order 1")
                near(reference_logits(path, ids), logits_of(model, ids), f"{what}: logits", 1e-5)
    check_forms(ROOM / "tied torch.float32", ROOM / "untied torch.float32")

def check_forms(tied, untied):
    """Older config.json files; what they leave out; half precision; a head that need not be there."""
    def form(what, of, **changes):
        shutil.rmtree(ROOM / "form", ignore_errors=True)
        shutil.copytree(of, ROOM / "form")
        config = json.loads((of / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value != "absent"}
        (ROOM / "form" / "config.json").write_text(json.dumps(config))
        convert("import", ROOM / "form", ROOM / "form.bin", "--force")
        check((ROOM / "form.bin").read_bytes() == (ROOM / f"{of.name}.bin").read_bytes(), f"{what}: the same file")
    form("of version 4", untied, rope_parameters="absent", rope_theta=1000.0, rope_scaling=None, head_dim="absent", pretraining_tp=1)
    form("said to be none", untied, rope_parameters="absent", rope_theta=1000.0, rope_scaling={"type": "default"}, sliding_window=None)
    model = load(tied)
    state = {name: x.contiguous().clone() for name, x in model.state_dict().items()}  # the head, too
    state |= {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": torch.ones(8) for l in range(4)}
    config = json.loads((tied / "config.json").read_text())
    (ROOM / "older").mkdir()
    (ROOM / "older" / "config.json").write_text(json.dumps(config))
    t.save_file(state, ROOM / "older" / "model.safetensors")
    convert("import", ROOM / "older", ROOM / "older.bin")
    check((ROOM / "older.bin").read_bytes() == (ROOM / f"{tied.name}.bin").read_bytes(), "with a head and constants: the same file")
    model.to(torch.float16).save_pretrained(ROOM / "half")
    convert("import", ROOM / "half", ROOM / "half.bin")
    convert("export", ROOM / "half.bin", ROOM / "half back")
    same_tensors(model.to(torch.float32), load(ROOM / "half back"), "float16 becomes float32")

# ------------------------------------------------------------------------------------------------------------------------
# GGUF

def test_gguf():
    import gguf
    ids = torch.randint(0, 300, (1, 40))
    for name in ("tied torch.float32", "untied torch.float32", "tied torch.bfloat16", "untied torch.bfloat16"):
        path, bin = ROOM / f"{name}.gguf", ROOM / f"{name}.bin"
        done = convert("export", bin, path)
        check("llama.cpp needs one" in done.stderr, f"{name}: it has no tokenizer, {done.stderr!r}")
        convert("import", path, ROOM / "again.bin", "--force")
        check((ROOM / "again.bin").read_bytes() == bin.read_bytes(), f"{name}: to GGUF and back, the same file")
        model, read = load(ROOM / name), AutoModelForCausalLM.from_pretrained(ROOM, gguf_file=path.name, **{t.DTYPE: torch.float32}).eval()
        near(logits_of(read, ids), logits_of(model.to(torch.float32), ids), f"{name}: as transformers reads it", 1e-6)
        same_tensors(model.to(torch.float32), read, f"{name}: as transformers reads it")
    reader = gguf.GGUFReader(ROOM / "untied torch.float32.gguf")
    writer = gguf.GGUFWriter(ROOM / "quantized.gguf", "llama")
    copy_fields(reader, writer)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(300)])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    kinds, want = gguf.GGMLQuantizationType, {}
    for x in reader.tensors:
        kind = kinds.F32 if x.data.ndim == 1 else kinds.F16 if x.name == "token_embd.weight" else kinds.Q8_0
        data = gguf.quantize(x.data, kind)
        want[x.name] = gguf.dequantize(data, kind)
        writer.add_tensor(x.name, data, raw_dtype=kind)
    finish(writer)
    check({str(x.tensor_type.name) for x in gguf.GGUFReader(ROOM / "quantized.gguf").tensors} >= {"F16", "F32", "Q8_0"}, "quantized: three types")
    convert("import", ROOM / "quantized.gguf", ROOM / "quantized.bin")
    done = convert("export", ROOM / "quantized.bin", ROOM / "back.gguf", "--tokenizer", ROOM / "quantized.gguf")
    check(not done.stderr, f"quantized: its tokenizer goes along, {done.stderr!r}")
    back = gguf.GGUFReader(ROOM / "back.gguf")
    check(all(np.array_equal(x.data, want[x.name]) for x in back.tensors), "quantized: what it dequantizes to")
    check(back.fields["tokenizer.ggml.tokens"].contents() == [f"t{i}" for i in range(300)], "quantized: the tokenizer's tokens")
    bad_gguf(gguf, reader)

def copy_fields(reader, writer, without=()):
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in without:
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])

def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

def bad_gguf(gguf, reader):
    out = ROOM / "out"
    out.mkdir(exist_ok=True)
    def made(what, words, change=lambda writer: None, architecture="llama", without=(), tensors=lambda x: x):
        writer = gguf.GGUFWriter(ROOM / "bad.gguf", architecture)
        copy_fields(reader, writer, without)
        change(writer)
        for x in reader.tensors:
            if (data := tensors(x.data) if x.name == "blk.1.attn_q.weight" else x.data) is not None:
                writer.add_tensor(x.name, data)
        finish(writer)
        refused(f"GGUF, {what}", words, "import", ROOM / "bad.gguf", out / "model.bin")
    made("another architecture", "architecture is 'qwen2'", architecture="qwen2")
    made("experts", "llama.expert_count is 8", lambda w: w.add_uint32("llama.expert_count", 8))
    made("rotary scaling", "llama.rope.scaling.type is 'yarn'", lambda w: w.add_string("llama.rope.scaling.type", "yarn"))
    made("a window", "llama.attention.sliding_window is 64", lambda w: w.add_uint32("llama.attention.sliding_window", 64))
    made("part of a rotary", "rope.dimension_count is 8", lambda w: w.add_uint32("llama.rope.dimension_count", 8), without=["llama.rope.dimension_count"])
    sizes = ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"]
    made("narrow heads", "4 heads of 12 channels have 48 of the network's 64", lambda w: [w.add_uint32(key, 12) for key in sizes], without=sizes)
    made("several files", "one of 3 parts", lambda w: w.add_uint16("split.count", 3))
    made("a bias", "has, beyond a Llama of these sizes, 'blk.0.attn_q.bias'", lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, "f4")))
    made("scaled rotary", "'rope_freqs.weight'", lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, "f4")))
    made("no layers", "has context 64, vocabulary 300, None layers", without=["llama.block_count"])
    made("a tensor missing", "lacks 'layers.1.self_attn.q_proj.weight'", tensors=lambda x: None)
    made("another shape", "layers.1.self_attn.q_proj.weight is (40, 64)", tensors=lambda x: x[:40])
    made("NaN", "q_proj.weight: holds NaN", tensors=lambda x: x * np.float32(np.nan))
    for what, change in [("cut short", lambda b: b[:-100]), ("empty", lambda b: b""), ("no GGUF", lambda b: b"GGUF" + b"\xff" * 99)]:
        (ROOM / "bad.gguf").write_bytes(change((ROOM / "untied torch.float32.gguf").read_bytes()))
        refused(f"GGUF, {what}", "no whole GGUF file", "import", ROOM / "bad.gguf", out / "model.bin")
    good, name = (ROOM / "untied torch.float32.gguf").read_bytes(), b"blk.1.attn_q.weight"
    at = good.index(name) + len(name) + 4 + 2 * 8  # behind the name two sizes with their number, then the type
    for kind, words in ((9, "blk.1.attn_q.weight is Q8_1, of which"), (26, "blk.1.attn_q.weight is I32, of which"),
                        (4, "a type that the package gguf does not know")):
        (ROOM / "bad.gguf").write_bytes(good[:at] + struct.pack("<I", kind) + good[at + 4:])
        refused(f"GGUF, type {kind}", words, "import", ROOM / "bad.gguf", out / "model.bin")
    refused("GGUF from nowhere", "no such file", "import", ROOM / "nowhere.gguf", out / "model.bin")
    refused("GGUF, no tokenizer", "no tokenizer in this file", "export", ROOM / "tied torch.float32.bin", out / "x.gguf",
            "--tokenizer", ROOM / "untied torch.float32.gguf")
    shutil.rmtree(out)

def gguf_tokenizer(path, kind, pre, vocabulary, merges=()):
    import gguf
    texts = sorted(vocabulary, key=vocabulary.get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_scores([-float(i) for i in range(len(texts))])
    writer.add_token_types([3 if text.startswith("<") and text.endswith(">") and len(text) > 2 else 1 for text in texts])
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    finish(writer)

def test_gguf_tokenizer():
    """tokens.py gguf: as transformers makes it, but digits stand alone where the file says smollm, and what it does not know of has a warning."""
    import tokenizers
    text, path, folder = "In 2024 and 2024, 2024 of 12345.", ROOM / "tokenizer.gguf", ROOM / "of gguf"
    cut, made = tokenizers.pre_tokenizers, tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = cut.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([text] * 9, tokenizers.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False,
                                                                             initial_alphabet=cut.ByteLevel.alphabet()))
    model = json.loads(made.to_str())["model"]
    plain, digits = made.encode(text).tokens, cut.Sequence([cut.Digits(individual_digits=True), made.pre_tokenizer])
    made.pre_tokenizer = digits
    apart = made.encode(text).tokens
    check("\u01202024" in plain and apart[2:6] == list("2024"), f"digits together, and apart: {plain}, {apart}")
    sys.path.append(str(t.HERE))
    from gguf_storage import write_tokenizer
    def made_of(path, folder):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                write_tokenizer(path, folder)
            except SystemExit as e:
                return e.code, said.getvalue()
        return 0, said.getvalue()
    for pre, want, words in (("gpt-2", plain, ""), ("command-r", plain, "tokenizer.ggml.pre is 'command-r'"), (None, plain, "is None"),
                             ("smollm", apart, "")):
        gguf_tokenizer(path, "gpt2", pre, model["vocab"], model["merges"])
        shutil.rmtree(folder, ignore_errors=True)
        status, said = made_of(path, folder)
        check(status == 0 and words in said and said.count("\n") == bool(words), f"{pre}: status {status}, {said!r}")
        got = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).tokens
        check(got == want and AutoTokenizer.from_pretrained(folder).tokenize(text) == want, f"{pre}: {got}, {want} is meant")
    def tokens_py(*args):
        return subprocess.run([sys.executable, t.HERE / "tokens.py", "gguf", *args], capture_output=True, text=True)
    done = tokens_py(path, ROOM / "by tokens.py")
    same = all((ROOM / "by tokens.py" / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())
    check(done.returncode == 0 and not done.stderr and same, f"by tokens.py: status {done.returncode}, {done.stderr!r}")
    done = tokens_py(path, folder)
    check(done.returncode == 1 and "exists already" in done.stderr, f"by tokens.py again: {done.stderr!r}")
    other = path.parent / "tokenizer.json"
    other.write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}}')
    status, said = made_of(path, ROOM / "beside another")
    check(status == 0 and (ROOM / "beside another/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes(), f"another beside it: {said!r}")
    other.unlink()
    for what, words, *args in [("no file", "no such file", ROOM / "nowhere.gguf", ROOM / "none"),
                               ("no tokenizer", "no tokenizer in", ROOM / "tied torch.float32.gguf", ROOM / "none"),
                               ("no folder", "no such folder", path, ROOM / "no" / "folder")]:
        status, said = made_of(*args)
        check(status == 1 and words in said and said.count("\n") == 1 and not (ROOM / "none").exists(), f"{what}: status {status}, {said!r}")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcn0123456789", "an", "\u2581an", "20", "2024", "24"]
    gguf_tokenizer(path, "llama", "default", {text: i for i, text in enumerate(pieces)})
    status, said = made_of(path, ROOM / "of pieces")
    tokens = AutoTokenizer.from_pretrained(ROOM / "of pieces").tokenize("an 2024")
    check(status == 0 and not said and tokens[-1] == "2024", f"sentencepiece: status {status}, {said!r}, {tokens}")

# ------------------------------------------------------------------------------------------------------------------------
# The reversible networks

NETWORKS = [("midpoint", dict(h=0.4)), ("midpoint-a", dict(grid=23, a=[20, -12, 13, -19, 17, -15])), ("leapfrog", dict(h=0.7, grid=19)),
            ("hamiltonian", dict(h=0.75)), ("retrofit", dict(stem=1, shift=4, a=[-1])), ("retrofit", dict(K=2, stem=3, a=[16])),
            ("retrofit", dict(K=1, stem=-1, ordinary=[0, 2, 5], shift=2, a=[-1])), ("bdia", dict(stem=2, shift=4, a=[-1])),
            ("bdia", dict(shift=2, a=[1])), ("bdia", dict(stem=-1, ordinary=[1, 4, 5], shift=3, a=[1])), ("bdia", dict(stem=6, shift=1, a=[1]))]

def network_file(path, baseline, mode, h=1.0, grid=20, K=0, stem=0, shift=0, a=(), ordinary=()):
    data = baseline.read_bytes()
    header = np.frombuffer(data[:1024], "<i4").copy()
    if mode in ("retrofit", "bdia") and not shift:  # whole coefficients: an odd numerator
        a, shift = [n // 16 for n in a], 0
    header[8], header[9:10], header[10:14] = t.MODES.index(mode), np.array([h], "<f4").view("<i4"), (grid, K, stem, shift)
    if mode in ("retrofit", "bdia") and not shift:
        header[16] = 16 * a[0]
    else:
        header[16:16 + len(a)] = a
    for k in ordinary:
        header[17 + k // 32] |= 1 << k % 32
    path.write_bytes(header.tobytes() + data[1024:])

def by_file_names(model, path):
    """Gradients of a model as the reference has them: stacked over the layers, q with k and v, gate with up."""
    m, grads = reference.read_model(path, torch.float64), {n.removeprefix("model."): p.grad for n, p in model.named_parameters()}
    of = {"ln1w": ["input_layernorm"], "qkvw": [f"self_attn.{x}_proj" for x in "qkv"], "attprojw": ["self_attn.o_proj"],
          "ln2w": ["post_attention_layernorm"], "gateupw": ["mlp.gate_proj", "mlp.up_proj"], "downw": ["mlp.down_proj"]}
    stacked = {name: torch.stack([torch.cat([grads[f"layers.{l}.{part}.weight"] for part in parts]) for l in range(m.L)]) for name, parts in of.items()}
    ends = {"wte": grads["embed_tokens.weight"], "lnfw": grads["norm.weight"]} | ({} if m.tied else {"headw": grads["lm_head.weight"]})
    return m, stacked | ends

def against_reference(folder, path, ids, what):
    """Logits and all gradients in float64, where what is left is rounding."""
    model = load(folder, trust_remote_code=True).double()
    near(logits_of(model, ids), reference_logits(path, ids), f"{what}: logits of the reference in float64", 1e-9)
    log = model(ids).logits[:, :-1].log_softmax(-1)
    loss = -log.gather(2, ids[:, 1:, None]).mean()
    loss.backward()
    m, got = by_file_names(model, path)
    wanted = torch.nn.functional.cross_entropy(reference.logits_of(m, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    near(loss.detach(), wanted.detach(), f"{what}: loss in float64", 1e-11)
    wanted.backward()
    worst = max(float((m.P[name].grad[:len(g)] - g).norm() / m.P[name].grad.norm()) for name, g in got.items())
    check(got.keys() == m.P.keys() and worst < 1e-7, f"{what}: gradients of the reference in float64, {worst:.1e}, {got.keys() ^ m.P.keys()}")
    return worst

def test_networks():
    size = dict(vocab_size=256, hidden_size=96, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=500.0, bos_token_id=None, eos_token_id=None)
    tokens = make_tokens(256, 2, 64)
    for i, (mode, fields) in enumerate(NETWORKS):
        what, folder, path, tied = f"{mode} {fields}", ROOM / f"network {i}", ROOM / f"network {i}.bin", i % 2 == 1
        ordinary = random_llama(**size, tie_word_embeddings=tied)
        ordinary.save_pretrained(ROOM / "ordinary")
        convert("import", ROOM / "ordinary", ROOM / "ordinary.bin", "--force")
        network_file(path, ROOM / "ordinary.bin", mode, **fields)
        check(not convert("export", path, folder).stderr, f"{what}: with the tokenizer of bytes")
        there = {p.name for p in folder.iterdir()}
        check(there == {"config.json", "generation_config.json", "model.safetensors", "modeling_rev.py", "modeling_rev_llama.py",
                        "tokenizer.json", "tokenizer_config.json"}, f"{what}: files, {there}")
        model = load(folder, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        check((config.mode, config.vocab_size, config.max_position_embeddings, config.n_layer) == (mode, 256, 64, 6), f"{what}: AutoConfig")
        check(AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode("abc") == [97, 98, 99], f"{what}: AutoTokenizer")
        check((model.lm_head.weight is model.model.embed_tokens.weight) == tied, f"{what}: tied or not")
        logits = logits_of(model, tokens.ids)
        check(logits.std() > 0.5, f"{what}: logits of order 1")
        difference = near(logits, reference_logits(path, tokens.ids), f"{what}: logits of the reference", TOLERANCE / 4)
        worst = against_reference(folder, path, tokens.ids, what)
        near(t.trainer_logits(path, tokens), logits, f"{what}: logits of the trainer", TOLERANCE)
        same = fields.get("stem") == 6  # every step is an ordinary one
        apart = (logits - logits_of(ordinary, tokens.ids)).abs().max()
        check((apart < 1e-5) if same else (apart > 1e-2), f"{what}: the ordinary network only where all steps are, {apart:.1e}")
        print(f"{what}: logits differ by {difference:.1e} of {logits.abs().max():.1f}; gradients in float64 by {worst:.1e}", flush=True)
        convert("import", folder, ROOM / "back.bin", "--force")
        check((ROOM / "back.bin").read_bytes() == path.read_bytes(), f"{what}: exported and imported, the same file")
        if not same:
            t.test_knobs(model, tokens.ids, what)
            t.test_arguments(model, tokens.ids, folder, what)
            t.test_generation(model, what)
            t.test_generations(model, tokens.ids[:1, :12], what)
            t.test_reversing(model, tokens.ids, what, "input_layernorm", 8)
        if mode in ("retrofit", "bdia"):
            convert("export", path, ROOM / "as baseline", "--as-baseline")
            same_tensors(ordinary, load(ROOM / "as baseline"), f"{what}, --as-baseline")
            shutil.rmtree(ROOM / "as baseline")
        if t.whole(NETWORKS, i):
            t.test_forms(folder, tokens, what)
            t.test_tuning(folder, what, dict(target_modules="all-linear"))
        model._modules.pop("_cache", None)  # a cache of fixed size is part of the model in 4.48
        model.save_pretrained(ROOM / "saved")
        same_tensors(model, load(ROOM / "saved", trust_remote_code=True), f"{what}, saved")
        shutil.rmtree(ROOM / "saved")
        t.test_training(model, tokens.ids, what)

def test_tokenizer():
    """A tokenizer's files go along, with what its folder says of the tokens that begin and end a text."""
    folder = ROOM / "tokenizer"
    folder.mkdir()
    files = {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "<s>": 2}, "merges": []}}), "tokenizer_config.json": "{}",
             "generation_config.json": '{"eos_token_id": [1, 2], "temperature": 0.2}', "config.json": '{"bos_token_id": 2, "eos_token_id": 1}'}
    for name, text in files.items():
        (folder / name).write_text(text)
    convert("export", ROOM / "tied torch.float32.bin", ROOM / "with tokenizer", "--tokenizer", folder)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((ROOM / "with tokenizer" / name).read_text())
        check((said["bos_token_id"], said["eos_token_id"]) == (2, [1, 2]), f"{name}: {said}")
    check((ROOM / "with tokenizer" / "tokenizer.json").read_text() == files["tokenizer.json"], "its files are copied")
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    convert("export", ROOM / "tied torch.float32.bin", ROOM / "with pieces", "--tokenizer", folder)
    check((ROOM / "with pieces" / "spiece.model").read_text() == files["tokenizer.json"], "another vocabulary's file, too")
    small = dict(TINY, vocab_size=50257, hidden_size=16, num_hidden_layers=1, num_key_value_heads=4, intermediate_size=16)
    random_llama(**small).save_pretrained(ROOM / "V 50257")
    convert("import", ROOM / "V 50257", ROOM / "V 50257.bin")
    done = convert("export", ROOM / "V 50257.bin", ROOM / "V 50257 back")
    check("nothing says that these are its tokens" in done.stderr or "without a tokenizer" in done.stderr, f"as many tokens as GPT-2 has: {done.stderr!r}")
    gguf_tokenizer(ROOM / "others.gguf", "gpt2", "gpt-2", {text: i for i, text in enumerate(["<s>", "</s>", *(f"t{i}" for i in range(50255))])})
    convert("export", ROOM / "V 50257.bin", ROOM / "V 50257.gguf", "--tokenizer", ROOM / "others.gguf")
    done = convert("import", ROOM / "V 50257.gguf", ROOM / "V 50257 again.bin")
    check("its tokens are not GPT-2's" in done.stdout, f"as many tokens as GPT-2 has, but others: {done.stdout!r}")

# ------------------------------------------------------------------------------------------------------------------------
# Bad input

BAD_CHECKPOINTS = [
    ("another family", 'model_type is "mistral"; only "gpt2", "rev_gpt2", "llama", "rev_llama"', dict(model_type="mistral")),
    ("experts", 'model_type is "mixtral"', dict(model_type="mixtral")),
    ("activation", 'hidden_act is "gelu"', dict(hidden_act="gelu")),
    ("attention biases", "attention_bias is true; only false", dict(attention_bias=True)),
    ("MLP biases", "mlp_bias is true; only false", dict(mlp_bias=True)),
    ("a window", "sliding_window is 4096; only null", dict(sliding_window=4096)),
    ("experts in a Llama", "num_local_experts is 8", dict(num_local_experts=8)),
    ("quantized", "quantization_config is", dict(quantization_config={"bits": 4})),
    ("rotary scaling of version 4", 'a rotary scaling "linear"', dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})),
    ("rotary scaling of version 5", 'a rotary scaling "llama3"', dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})),
    ("part of a rotary", "partial_rotary_factor is 0.5", dict(partial_rotary_factor=0.5)),
    ("a rotary base of 0", "positive numbers are meant", dict(rope_parameters={"rope_theta": 0})),
    ("epsilon a text", "positive numbers are meant", dict(rms_norm_eps="1e-5")),
    ("vocabulary too large", "vocab_size is 128256; a whole number from 1 to 65536 is meant, as tokens are 16 bits", dict(vocab_size=128256)),
    ("layers a text", 'num_hidden_layers is "2"', dict(num_hidden_layers="2")),
    ("key heads", "no Llama has 64 channels, 4 heads of 16 and 3 of keys", dict(num_key_value_heads=3)),
    ("odd heads", "4 heads of 7 and", dict(head_dim=7)),
    ("narrow heads", "4 heads of 12 channels have 48 of the network's 64; the trainer has only heads that share them all", dict(head_dim=12)),
    ("heads", "64 channels, 5 heads", dict(num_attention_heads=5, num_key_value_heads=5, head_dim=None)),
    ("tied a text", 'tie_word_embeddings is "no"', dict(tie_word_embeddings="no")),
    ("tied, though another head", "lm_head.weight differs from embed_tokens.weight", dict(tie_word_embeddings=True)),
    ("a layer more", "lacks 'layers.4.input_layernorm.weight' and 8 more", dict(num_hidden_layers=5)),
    ("a layer less", "has, beyond a Llama of these sizes, 'layers.3.input_layernorm.weight' and 8 more", dict(num_hidden_layers=3)),
    ("another width", "mlp.gate_proj.weight is (96, 64); by its sizes it is (88, 64)", dict(intermediate_size=88)),
]
BAD_MODELS = [
    ("block", "block 2; 0 is GPT-2, 1 is Llama", t.slot(14, 2)), ("block of GPT-2", "mode 0; 1 to 6", t.slot(14, 0)),
    ("mode", "mode 7; 0 to 6", t.slot(8, 7)), ("key heads", "4 heads of 16, 3 of keys", t.slot(240, 3)), ("no width", "feed-forward 0", t.slot(241, 0)),
    ("base", "rotary base nan", t.slot(242, 0x7fc00000)), ("epsilon", "epsilon 0.0", t.slot(243, 0)), ("tied", "and 2 for whether", t.slot(244, 2)),
    ("tied otherwise", "bytes, but what its header describes takes", t.slot(244, 1)), ("head size", "4 heads of 9", t.slot(245, 9)),
    ("narrow heads", "4 heads of 12 channels have 48 of the network's 64", t.slot(245, 12)),
    ("cut short", "bytes, but what its header describes takes", lambda b: b[:-4]),
    ("NaN", "lm_head.weight: holds NaN or infinity", lambda b: b[:-4*64*84 - 4] + struct.pack("<f", float("nan")) + b[-4*64*84:])]

def test_bad_input():
    out, good = ROOM / "out", ROOM / "untied torch.float32"
    out.mkdir(exist_ok=True)
    for what, words, changes in BAD_CHECKPOINTS:
        shutil.copytree(good, ROOM / "bad")
        config = json.loads((good / "config.json").read_text()) | changes
        (ROOM / "bad" / "config.json").write_text(json.dumps(config))
        refused(f"import, {what}", words, "import", ROOM / "bad", out / "model.bin")
        shutil.rmtree(ROOM / "bad")
    state = load(good).state_dict() | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    (ROOM / "bad").mkdir()
    shutil.copyfile(good / "config.json", ROOM / "bad" / "config.json")
    t.save_file(state, ROOM / "bad" / "model.safetensors")
    refused("import, a bias", "has, beyond a Llama of these sizes, 'layers.0.self_attn.q_proj.bias'", "import", ROOM / "bad", out / "model.bin")
    model = (ROOM / "untied torch.float32.bin").read_bytes()
    for what, words, change in BAD_MODELS:
        (ROOM / "bad.bin").write_bytes(change(model))
        refused(f"export, {what}", words, "export", ROOM / "bad.bin", out / "folder")
    network_file(ROOM / "bad.bin", ROOM / "untied torch.float32.bin", "midpoint", h=0.5)
    refused("a midpoint network to GGUF", "a GGUF file can hold a baseline with Llama's", "export", ROOM / "bad.bin", out / "x.gguf", status=2)

def main():
    every = [test_shapes, test_checkpoints, test_gguf, test_gguf_tokenizer, test_tokenizer, test_networks, test_bad_input]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler", metavar="PATH", help="the program that writes logits; without it, what make builds")
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"{', '.join(test.__name__ for test in every)}; some need test_checkpoints before")
    parser.add_argument("--few", action="store_true", help="networks as test_hf.py --few has them")
    args = parser.parse_args()
    NETWORKS[:] = t.few(NETWORKS) if args.few else NETWORKS
    if not args.sampler:
        subprocess.run(["make", "-s", "-C", t.ROOT, "sample_rev_llama"], check=True)
    t.SAMPLER = Path(args.sampler or t.ROOT / "sample_rev_llama").resolve()
    torch.manual_seed(1)
    for test in every:
        if args.tests and test.__name__ not in args.tests:
            continue
        start = time.time()
        try:
            test()
        except Exception:
            check(False, f"{test.__name__} ended early\n{traceback.format_exc()}")
        print(f"{test.__name__}: {time.time() - start:.0f} s", flush=True)
    print(f"{t.passed} passed, {t.failed} failed")
    sys.exit(1 if t.failed else 0)

if __name__ == "__main__":
    main()
