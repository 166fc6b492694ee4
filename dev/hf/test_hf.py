"""
Tests hf.py and modeling_rev_gpt2.py: transformers and the trainer must compute the same logits from the same weights.

    python3 dev/hf/test_hf.py [--trainer PATH] [--sampler PATH]      without them, what `make` builds

Needs torch, transformers and safetensors, no network, some 4 GB of memory and a few minutes. The last line is
`N passed, N failed`, the exit status 1 if any failed.
"""
import argparse, json, os, resource, shutil, signal, struct, subprocess, sys, tempfile, time, traceback
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TMP = tempfile.TemporaryDirectory(prefix="test_hf-")
ROOM = Path(TMP.name)
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(ROOM / "hf_home"), "TRANSFORMERS_VERBOSITY": "error",
               "HF_MODULES_CACHE": str(ROOM / "hf_modules"), "OMP_WAIT_POLICY": "passive"}
try:
    import numpy as np
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
except ImportError as e:
    print(f"skipped, no package {e.name}\n0 passed, 0 failed")
    sys.exit(0)
sys.path.append(str(ROOT / "dev/reference"))
from reference import shapes

transformers.utils.logging.disable_progress_bar()
TOLERANCE = 1e-4
passed = failed = 0

def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}", flush=True)

def near(a, b, what, tolerance=TOLERANCE):
    difference = float(abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()) if np.shape(a) == np.shape(b) else np.inf
    check(difference <= tolerance, f"{what}: {difference:.1e}, at most {tolerance:.0e} is meant")  # NaN fails too
    return difference

# ------------------------------------------------------------------------------------------------------------------------
# What is tested, and what it is tested with

def hf(*args, limit=None):
    """Runs hf.py; limit: bytes that a file may have."""
    limits = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.run([sys.executable, HERE / "hf.py", *map(str, args)], capture_output=True, text=True, preexec_fn=limits)

def convert(*args):
    done = hf(*args)
    check(done.returncode == 0 and not done.stderr, f"hf.py {' '.join(map(str, args))}: status {done.returncode}, {done.stderr}")

def run(*args):
    done = subprocess.run([*map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, args))}: status {done.returncode}, {done.stderr}")

def trainer(*args):
    run(TRAINER, *args)

def trainer_logits(model, tokens, *flags):
    out = ROOM / "logits.npy"
    run(SAMPLER, "-e", model, "-i", tokens.path, "-b", tokens.ids.shape[0], "-t", tokens.ids.shape[1], "--logits", out, *flags)
    return np.load(out)

def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits

def make_tokens(V, B, T):
    """A token file, and the same as ids (B, T)."""
    tokens, path = torch.randint(0, V, (B * T + 1,)), ROOM / f"tokens_{V}_{B}_{T}.bin"
    header = np.zeros(256, "<i4")
    header[:4] = 20240520, 1, len(tokens), V
    path.write_bytes(header.tobytes() + tokens.numpy().astype("<u2").tobytes())
    return SimpleNamespace(path=path, ids=tokens[:-1].view(B, T))

def random_gpt2(**config):
    """A GPT-2 with no tensor left as it is initialized: logits of order 1, forces that matter."""
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.05 if p.ndim == 2 else 0.2).add_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    return model

TINY = dict(n_layer=4, n_embd=48, n_head=3, n_positions=40, vocab_size=300, bos_token_id=None, eos_token_id=None)

def same_tensors(a, b, what):
    a, b = a.state_dict(), b.state_dict()
    wrong = [name for name in a if name not in b or a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    check(a.keys() == b.keys() and not wrong, f"{what}: not the same bits: {wrong}, {a.keys() ^ b.keys()}")

def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()

# ------------------------------------------------------------------------------------------------------------------------
# A GPT-2 there and back

def test_shapes():
    for L, C, NH, context, T in [(12, 768, 12, 1024, 1024), (2, 1024, 16, 48, 48), (2, 1280, 20, 48, 48), (2, 1600, 25, 48, 48)]:
        what, tokens = f"GPT-2 of {L} layers, {C} channels, {NH} heads", make_tokens(50257, 1, T)
        model = random_gpt2(n_layer=L, n_embd=C, n_head=NH, n_positions=context)
        model.save_pretrained(ROOM / "gpt2")
        convert("import", ROOM / "gpt2", ROOM / "gpt2.bin")
        logits = logits_of(model, tokens.ids)
        check(logits.std() > 0.5, f"{what}: logits of order 1")
        difference = near(trainer_logits(ROOM / "gpt2.bin", tokens), logits, f"{what}, logits")
        convert("export", ROOM / "gpt2.bin", ROOM / "back")
        back = load(ROOM / "back")
        check(type(back) is GPT2LMHeadModel and back.lm_head.weight is back.transformer.wte.weight, f"{what}: exported is a tied GPT-2")
        same_tensors(model, back, what)
        check(torch.equal(logits_of(back, tokens.ids), logits), f"{what}: exported has the same logits")
        print(f"{what}: logits differ by {difference:.1e} of {logits.abs().max():.1f}", flush=True)
        for path in ("gpt2", "back"):
            shutil.rmtree(ROOM / path)
        (ROOM / "gpt2.bin").unlink()
        tokens.path.unlink()

def test_checkpoints():
    """Every form a checkpoint comes in gives the model file of its numbers."""
    model = random_gpt2(**TINY)
    state = {name: p.contiguous() for name, p in model.state_dict().items() if name != "lm_head.weight"}
    masks = {f"h.{l}.attn.{name}": torch.ones(1) for l in range(TINY["n_layer"]) for name in ("bias", "masked_bias")}
    short = {name.removeprefix("transformer."): p for name, p in state.items()}
    model.save_pretrained(ROOM / "plain")
    convert("import", ROOM / "plain", ROOM / "plain.bin")
    want = (ROOM / "plain.bin").read_bytes()
    check(len(want) == 1024 + 4 * (84 * 48 + sum(p.numel() for p in model.parameters())), "plain: 300 rows of wte become 384")
    check(struct.unpack("8i", want[:32]) == (20240326, 3, 40, 300, 4, 3, 48, 384), "plain: the header")

    for form, tensors in [("no prefix", short), ("masks", short | masks), ("prefixed masks", state | {f"transformer.{n}": t for n, t in masks.items()}),
                          ("lm_head", state | {"lm_head.weight": state["transformer.wte.weight"].clone()})]:
        shutil.copytree(ROOM / "plain", ROOM / form)
        save_file(tensors, ROOM / form / "model.safetensors")
        convert("import", ROOM / form, ROOM / f"{form}.bin")
        check((ROOM / f"{form}.bin").read_bytes() == want, f"{form}: the same model file")
    model.save_pretrained(ROOM / "shards", max_shard_size="100KB")
    check(len(list((ROOM / "shards").glob("*.safetensors"))) > 2, "shards: several")
    convert("import", ROOM / "shards", ROOM / "shards.bin")
    check((ROOM / "shards.bin").read_bytes() == want, "shards: the same model file")
    for dtype in (torch.float16, torch.bfloat16):
        model.to(dtype).save_pretrained(ROOM / str(dtype))
        convert("import", ROOM / str(dtype), ROOM / f"{dtype}.bin")
        convert("export", ROOM / f"{dtype}.bin", ROOM / f"{dtype} back")
        same_tensors(model.to(torch.float32), load(ROOM / f"{dtype} back"), f"{dtype}")
        check((ROOM / f"{dtype}.bin").read_bytes() != want, f"{dtype}: rounded")

    tokens = make_tokens(300, 2, 40)  # version 5: bf16 stays bf16
    trainer("-e", ROOM / "plain.bin", "-i", tokens.path, "-b", 2, "-x", 0, "-o", ROOM / "run", "--save", "bf16")
    convert("export", ROOM / "run" / "model_00000000.bin", ROOM / "version 5")
    same_tensors(load(ROOM / "plain", dtype=torch.bfloat16), load(ROOM / "version 5"), "version 5")
    logits = logits_of(load(ROOM / "version 5", dtype=torch.float32), tokens.ids)
    near(trainer_logits(ROOM / "run" / "model_00000000.bin", tokens), logits, "version 5")
    check(json.loads((ROOM / "version 5" / "config.json").read_text())["dtype"] == "bfloat16", "version 5: dtype in config.json")

    old = (ROOM / "plain.bin").read_bytes()
    convert("import", ROOM / "torch.float16", ROOM / "plain.bin", "--force")
    check((ROOM / "plain.bin").read_bytes() == (ROOM / "torch.float16.bin").read_bytes() != old, "--force overwrites")

def test_tokenizer():
    files = {"vocab.json": '{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}', "merges.txt": "#version: 0.2\na b\n",
             "tokenizer_config.json": '{"model_max_length": 40}'}
    (ROOM / "tokenizer").mkdir()
    for name, text in files.items():
        (ROOM / "tokenizer" / name).write_text(text)
    (ROOM / "tokenizer" / "other.txt").write_text("not to be copied")
    for model in ("plain.bin", "midpoint/model_00000000.bin"):
        convert("export", ROOM / model, ROOM / "with tokenizer", "--tokenizer", ROOM / "tokenizer")
        there = {p.name for p in (ROOM / "with tokenizer").iterdir()}
        code = {"modeling_rev_gpt2.py"} if "midpoint" in model else set()
        check(there == {"config.json", "generation_config.json", "model.safetensors"} | files.keys() | code, f"{model}: not all or other files, {there}")
        tokenizer = AutoTokenizer.from_pretrained(ROOM / "with tokenizer", trust_remote_code=True)
        check(tokenizer.encode("abba") == [2, 1, 0] and tokenizer.decode([2, 1, 0]) == "abba", f"{model}: AutoTokenizer")
        shutil.rmtree(ROOM / "with tokenizer")

# ------------------------------------------------------------------------------------------------------------------------
# The reversible networks

NETWORKS = [("midpoint", "--step-size", 0.4), ("midpoint-a",), ("leapfrog",), ("hamiltonian", "--step-size", 0.75),
            ("retrofit", "--coefficient", -0.0625, "--stem", 1), ("retrofit", "--coefficient", 1, "--fixed-point", 2, "--stem", 3),
            ("retrofit", "--coefficient", 0.5, "--fixed-point", 0), ("bdia", "--coefficient", -0.0625, "--stem", 2),
            ("bdia", "--coefficient", 0.25, "--stem", 0)]

def randomize(path):
    """Every tensor of a model file random, the padding of wte too, which nobody may read."""
    header, rng = np.fromfile(path, "<i4", 256), np.random.default_rng(1)
    m = SimpleNamespace(**dict(zip(("maxT", "V", "L", "NH", "C", "Vp"), map(int, header[2:8]))))
    with open(path, "r+b") as out:
        out.seek(1024)
        for name, shape in shapes(m).items():
            mean, std = name in ("ln1w", "ln2w", "lnfw"), 0.4 if name == "wpe" else 0.1 if name.startswith("ln") or name.endswith("b") else 0.08
            out.write((mean + std * rng.standard_normal(shape)).astype("<f4").tobytes())

def generated(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=2, pad_token_id=0, **kwargs)[:, ids.shape[1]:].tolist()

def test_generation(model, what):
    prompts = [torch.randint(0, 256, (n,)) for n in (3, 7, 12)]
    alone = [generated(model, p[None])[0] for p in prompts]
    check(all(len(set(tokens)) > 2 for tokens in alone), f"{what}: something is generated, {alone}")
    check(alone == [generated(model, p[None], use_cache=False)[0] for p in prompts], f"{what}: the same tokens without a cache")
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, 12 - len(p):], mask[i, 12 - len(p):] = p, 1
    check(alone == generated(model, ids, mask), f"{what}: the same tokens in a batch padded on the left")
    check(alone == generated(model, ids, mask, use_cache=False), f"{what}: and there without a cache")
    check(alone == generated(model, ids, mask, cache_implementation="static"), f"{what}: and with a cache of fixed size")
    check(alone != generated(model, ids), f"{what}: which needs the mask")
    past = sys.modules[type(model).__module__].Past(None, 0, 12, mask)
    check(past.visible(12, "cpu").any(-1).all(), f"{what}: padding sees something, lest it be NaN")
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for i, p in enumerate(prompts):
            near(padded[i, 12 - len(p):], model(p[None]).logits[0], f"{what}: logits of prompt {i} padded", 1e-5)
        whole, first = model(ids[2:]).logits, model(ids[2:, :5], use_cache=True)
        rest = model(ids[2:, 5:], past_key_values=first.past_key_values)
        near(torch.cat([first.logits, rest.logits], 1), whole, f"{what}: logits by two pieces", 1e-5)
        check(len(first.past_key_values) == model.config.num_hidden_layers, f"{what}: num_hidden_layers is what a cache holds")
    a, b = (generated(model, ids, mask, num_beams=3, use_cache=cache) for cache in (True, False))
    check(a == b, f"{what}: beam search with and without a cache")

def test_training(model, ids, what):
    """The loss, and its derivative along a random direction against finite differences, in float64."""
    model, ids = model.double(), ids[:, :16]
    check(model(ids).logits.dtype == torch.float64, f"{what}: float64 is kept")
    logits = logits_of(model, ids)
    want = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
    model.train()
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    near(loss.detach(), want, f"{what}: loss", 1e-9)
    check(all(p.grad is not None and p.grad.any() for p in model.parameters()), f"{what}: every parameter has a gradient")
    direction, eps = [torch.randn_like(p) for p in model.parameters()], 1e-6
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction))
    ends = []
    with torch.no_grad():
        for step in (eps, -2 * eps):
            for p, d in zip(model.parameters(), direction):
                p.add_(d, alpha=step)
            ends.append(model(ids, labels=ids).loss)
    differences = (ends[0] - ends[1]) / (2 * eps)
    check(abs(differences / slope - 1) < 1e-5, f"{what}: gradient {slope}, finite differences {differences}")

def test_knobs(model, ids, what):
    """Were any number of the recurrence wrong, the logits would show it."""
    config, logits = model.config, logits_of(model, ids)
    def moved(**changes):
        before = {name: getattr(config, name) for name in changes}
        for name, value in changes.items():
            setattr(config, name, value)
        difference = (logits_of(model, ids) - logits).abs().max()
        for name, value in before.items():
            setattr(config, name, value)
        check(difference > 10 * TOLERANCE, f"{what}: logits show {changes}: {difference:.1e}")
    if config.mode in ("retrofit", "bdia"):
        moved(stem=config.stem + 1)
        moved(coefficients=[config.coefficients[0] + 1 / 16])
    else:
        moved(step_size=1.02 * config.step_size)
    if config.mode == "retrofit":
        moved(fixed_point=config.fixed_point + 1)
    if config.mode == "midpoint-a":
        for k, a in enumerate(config.coefficients[1:], 1):
            moved(coefficients=[*config.coefficients[:k], a + 1 / 16, *config.coefficients[k + 1:]])

def test_networks():
    tokens, V = make_tokens(256, 2, 64), 256
    scratch = ["-e", "d6", "--layers", 6, "--channels", 96, "--heads", 4, "--context", 64, "-i", tokens.path, "-b", 2, "-x", 0]
    trainer(*scratch, "--mode", "baseline", "-o", ROOM / "baseline")
    baseline = ROOM / "baseline" / "model_00000000.bin"
    randomize(baseline)
    convert("export", baseline, ROOM / "ordinary")
    ordinary = load(ROOM / "ordinary")
    for i, (mode, *flags) in enumerate(NETWORKS):
        what, run, folder = " ".join(map(str, [mode, *flags])), ROOM / (mode if i == 0 else f"run {i}"), ROOM / f"network {i}"
        if mode in ("retrofit", "bdia"):
            trainer("-e", baseline, "-i", tokens.path, "-b", 2, "-x", 0, "-o", run, "--mode", mode, *flags)
        else:
            trainer(*scratch, "--mode", mode, *flags, "-o", run)
            randomize(run / "model_00000000.bin")
        logits = trainer_logits(run / "model_00000000.bin", tokens)
        convert("export", run / "model_00000000.bin", folder)
        model = load(folder, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        check((config.mode, config.vocab_size, config.n_positions, config.n_layer) == (mode, V, 64, 6), f"{what}: AutoConfig")
        check(model.lm_head.weight is model.transformer.wte.weight, f"{what}: tied")
        check(logits.std() > 0.5, f"{what}: logits of order 1")
        difference = near(logits_of(model, tokens.ids), logits, f"{what}: logits")
        floating = trainer_logits(run / "model_00000000.bin", tokens, "--stream", "float")
        near(logits_of(model, tokens.ids), floating, f"{what}: logits of floating-point streams", TOLERANCE / 10)
        check(np.abs(logits - logits_of(ordinary, tokens.ids).numpy()).max() > 1e-2, f"{what}: another network than the ordinary one")
        print(f"{what}: logits differ by {difference:.1e} of {abs(logits).max():.1f}, "
              f"by {abs(logits_of(model, tokens.ids).numpy() - floating).max():.1e} with --stream float", flush=True)
        test_knobs(model, tokens.ids, what)
        test_generation(model, what)
        model.save_pretrained(ROOM / "saved")
        again = load(ROOM / "saved", trust_remote_code=True)
        same_tensors(model, again, f"{what}, saved")
        check(torch.equal(logits_of(again, tokens.ids), logits_of(model, tokens.ids)), f"{what}: saved and loaded again")
        shutil.rmtree(ROOM / "saved")
        if mode in ("retrofit", "bdia"):
            convert("export", run / "model_00000000.bin", ROOM / "as baseline", "--as-baseline")
            plain = load(ROOM / "as baseline")
            check(type(plain) is GPT2LMHeadModel, f"{what} --as-baseline: an ordinary GPT-2")
            same_tensors(plain, ordinary, f"{what} --as-baseline")
            shutil.rmtree(ROOM / "as baseline")
        test_training(model, tokens.ids, what)
    # bf16 weights, streams in float32
    trainer("-e", ROOM / "midpoint" / "model_00000000.bin", "-i", tokens.path, "-b", 2, "-x", 0, "--save", "bf16", "-o", ROOM / "bf16")
    convert("export", ROOM / "bf16" / "model_00000000.bin", ROOM / "version 1005")
    logits = trainer_logits(ROOM / "bf16" / "model_00000000.bin", tokens)
    near(logits_of(load(ROOM / "version 1005", trust_remote_code=True, dtype=torch.float32), tokens.ids), logits, "version 1005, float32")
    model = load(ROOM / "version 1005", trust_remote_code=True)
    check(model.dtype == torch.bfloat16, "version 1005: bf16")
    near(logits_of(model, tokens.ids).float(), logits, "version 1005, bf16", 0.1)
    # a new one
    config = AutoConfig.from_pretrained(ROOM / "network 0", trust_remote_code=True)
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    block = new.transformer.h[0]
    check(abs(new.transformer.wte.weight.std() - 0.02) < 1e-3 and abs(block.mlp.c_proj.weight.std() - 0.02 / 12 ** 0.5) < 1e-3
          and (block.ln_1.weight == 1).all() and not block.attn.c_attn.bias.any(), "from_config: GPT-2's initialization")

# ------------------------------------------------------------------------------------------------------------------------
# Bad input: one line that says what, the right status, nothing left behind

def refused(what, words, *args, status=1, **kwargs):
    room = ROOM / "out"
    before = {p: p.read_bytes() for p in room.rglob("*") if p.is_file()}
    names = set(room.rglob("*"))
    done = hf(*args, **kwargs)
    line = done.stderr.count("\n") == 1 and done.stderr.startswith("hf.py: ") and words in done.stderr
    check(done.returncode == status and line and not done.stdout,
          f"{what}: status {done.returncode} and {status} is meant, with {words!r}: {done.stderr!r}")
    check(set(room.rglob("*")) == names and all(p.read_bytes() == content for p, content in before.items()), f"{what}: leaves something behind")
    for p in sorted(set(room.rglob("*")) - names, reverse=True):
        p.rmdir() if p.is_dir() else p.unlink()

def changed_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))
    return change

def changed_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return apply

def changed_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))

def put(name, value):
    return changed_tensors(lambda t: t.update({name: value}))

def number(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value
    return changed_tensors(change)

def sharded(change_map=None, change_folder=None):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        half = sorted(tensors)[len(tensors) // 2]
        parts = {"one.safetensors": {n: t for n, t in tensors.items() if n < half},
                 "two.safetensors": {n: t for n, t in tensors.items() if n >= half}}
        for part, content in parts.items():
            save_file(content, folder / part)
        index = {"weight_map": {n: part for part, content in parts.items() for n in content}}
        if change_map:
            change_map(index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if change_folder:
            change_folder(folder)
    return apply

QKV, WTE = "transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"
BAD_CHECKPOINTS = [
    ("no config.json", "config.json: No such file", lambda f: (f / "config.json").unlink()),
    ("config.json cut short", "not JSON", changed_bytes("config.json", lambda b: b[:-10])),
    ("config.json of bytes", "not JSON", changed_bytes("config.json", lambda b: b"\xff\xfe" + b)),
    ("config.json nested deep", "not JSON", changed_bytes("config.json", lambda b: b"[" * 100000)),
    ("config.json a list", "JSON object", changed_bytes("config.json", lambda b: b"[1]")),
    ("another family", 'model_type is "llama"', changed_config(model_type="llama")),
    ("no family", "model_type is null", changed_config(model_type="absent")),
    ("activation", 'activation_function is "relu"', changed_config(activation_function="relu")),
    ("epsilon", "layer_norm_epsilon is 1e-06", changed_config(layer_norm_epsilon=1e-6)),
    ("unscaled attention", "scale_attn_weights is false", changed_config(scale_attn_weights=False)),
    ("attention scaled by layer", "scale_attn_by_inverse_layer_idx is true", changed_config(scale_attn_by_inverse_layer_idx=True)),
    ("cross attention", "add_cross_attention is true", changed_config(add_cross_attention=True)),
    ("untied", "tie_word_embeddings is false", changed_config(tie_word_embeddings=False)),
    ("n_inner", "n_inner is 100; only 4 n_embd = 64", changed_config(n_inner=100)),
    ("heads", "n_embd 16 cannot be shared by n_head 3", changed_config(n_head=3)),
    ("layers a text", 'n_layer is "2"', changed_config(n_layer="2")),
    ("layers negative", "n_layer is -2", changed_config(n_layer=-2)),
    ("heads zero", "n_head is 0", changed_config(n_head=0)),
    ("layers true", "n_layer is true", changed_config(n_layer=True)),
    ("vocabulary too large", "vocab_size is 65537", changed_config(vocab_size=65537)),
    ("no weights", "neither model.safetensors nor", lambda f: (f / "model.safetensors").unlink()),
    ("weights missing", "lacks 'h.1.attn.c_attn.weight'", changed_tensors(lambda t: t.pop(QKV))),
    ("a layer more in config.json", "lacks 'h.2.attn.c_attn.bias' and 11 more", changed_config(n_layer=3)),
    ("a layer less in config.json", "'h.1.attn.c_attn.bias' and 11 more", changed_config(n_layer=1)),
    ("weights too many", "has, beyond a GPT-2 of this config.json, 'score.weight'", put("score.weight", torch.ones(2, 16))),
    ("a name of two lines", "'a\\nb'", put("a\nb", torch.ones(2))),
    ("a mask of no layer", "'h.2.attn.bias'", put("h.2.attn.bias", torch.ones(2))),
    ("a name twice", "a second 'wte.weight'", put("wte.weight", torch.ones(40, 16))),
    ("vocabulary of another size", "wte.weight is (40, 16); by config.json it is (41, 16)", changed_config(vocab_size=41)),
    ("transposed", "h.1.attn.c_attn.weight is (48, 16); by config.json it is (16, 48)", put(QKV, torch.ones(48, 16))),
    ("integers", "h.1.attn.c_attn.weight is I32; F32, F16 or BF16", put(QKV, torch.ones(16, 48, dtype=torch.int32))),
    ("float64", "wte.weight is F64", put(WTE, torch.ones(40, 16, dtype=torch.float64))),
    ("NaN", "ln_f.bias: holds NaN or infinity", number("transformer.ln_f.bias", torch.nan)),
    ("infinity", "wpe.weight: holds NaN or infinity", number("transformer.wpe.weight", -torch.inf)),
    ("infinity in F16", "wte.weight: holds NaN or infinity", put(WTE, torch.full((40, 16), torch.inf).half())),
    ("NaN in BF16", "wte.weight: holds NaN or infinity", put(WTE, torch.full((40, 16), torch.nan).bfloat16())),
    ("another head", "lm_head.weight differs from wte.weight", put("lm_head.weight", torch.ones(40, 16))),
    ("a head of another shape", "lm_head.weight is (39, 16)", put("lm_head.weight", torch.ones(39, 16))),
    ("safetensors cut short", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: b[:-7])),
    ("safetensors too long", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: b + b"\0")),
    ("safetensors empty", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: b"")),
    ("safetensors of zeros", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: bytes(len(b)))),
    ("safetensors header broken", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: b[:8] + b"?" + b[9:])),
    ("safetensors header long", "no whole safetensors file", changed_bytes("model.safetensors", lambda b: struct.pack("<Q", 1 << 62) + b[8:])),
    ("index broken", "model.safetensors.index.json: not JSON", sharded(change_folder=changed_bytes("model.safetensors.index.json", lambda b: b[:-1]))),
    ("index without map", "weight_map is meant", sharded(lambda index: index.pop("weight_map"))),
    ("index of numbers", "weight_map is meant", sharded(lambda index: index["weight_map"].update({WTE: 7}))),
    ("index elsewhere", "weight_map is meant", sharded(lambda index: index["weight_map"].update({WTE: "../two.safetensors"}))),
    ("shard missing", "two.safetensors: No such file", sharded(change_folder=lambda f: (f / "two.safetensors").unlink())),
    ("shard not in index", "lacks 'h.1.", sharded(lambda index: index.update(weight_map={"x": "one.safetensors"}))),
    ("shard cut short", "two.safetensors: no whole", sharded(change_folder=changed_bytes("two.safetensors", lambda b: b[:-1]))),
]

def slot(i, value):
    return lambda b: b[:4*i] + struct.pack("<i", value) + b[4*i + 4:]

BAD_MODELS = [
    ("empty", "tiny", "not a model file", lambda b: b""),
    ("half a header", "tiny", "not a model file", lambda b: b[:1000]),
    ("magic", "tiny", "not a model file", slot(0, 20240520)),
    ("version", "tiny", "version 4; 3, 5, 1003 and 1005", slot(1, 4)),
    ("version negative", "tiny", "version -997", slot(1, -997)),
    ("vocabulary", "tiny", "vocabulary 65537", lambda b: slot(3, 65537)(slot(7, 65664)(b))),
    ("padding", "tiny", "vocabulary 40 padded to 39", slot(7, 39)),
    ("no layers", "tiny", "0 layers", slot(4, 0)),
    ("heads", "tiny", "3 heads", slot(5, 3)),
    ("channels negative", "tiny", "-16 channels", slot(6, -16)),
    ("cut short", "tiny", "bytes, but what its header describes takes", lambda b: b[:-4]),
    ("too long", "tiny", "bytes, but what its header describes takes", lambda b: b + b"\0"),
    ("a layer more", "tiny", "bytes, but what its header describes takes", slot(4, 3)),
    ("not a number", "tiny", "ln_f.bias: holds NaN or infinity", lambda b: b[:-4] + struct.pack("<f", float("nan"))),
    ("mode", "midpoint", "mode 7", slot(8, 7)),
    ("mode of a baseline", "midpoint", "mode 0", slot(8, 0)),
    ("step size", "midpoint", "step size", lambda b: b[:36] + struct.pack("<f", float("nan")) + b[40:]),
    ("a_k of 0", "midpoint-a", "a_k are not those", slot(17, 0)),
    ("coefficient 0", "retrofit", "no retrofit has coefficient 0", slot(16, 0)),
    ("coefficient 2", "retrofit", "no retrofit has coefficient 32", slot(16, 32)),
    ("denominator", "retrofit", "no retrofit has coefficient -1 / 2^30", slot(13, 30)),
    ("iterations", "retrofit", "17 iterations", slot(11, 17)),
    ("stem", "bdia", "a stem of 99", slot(12, 99)),
    ("stem of retrofit", "retrofit", "a stem of 0", slot(12, 0)),
]

def test_bad_input():
    out, good = ROOM / "out", ROOM / "good"
    out.mkdir()
    random_gpt2(n_layer=2, n_embd=16, n_head=2, n_positions=12, vocab_size=40, bos_token_id=None, eos_token_id=None).save_pretrained(good)
    for what, words, change in BAD_CHECKPOINTS:
        shutil.copytree(good, ROOM / "bad")
        change(ROOM / "bad")
        refused(f"import, {what}", words, "import", ROOM / "bad", out / "model.bin")
        shutil.rmtree(ROOM / "bad")
    refused("import from nowhere", "config.json: No such file", "import", ROOM / "nowhere", out / "model.bin")
    refused("import into no folder", "no such folder", "import", good, out / "no" / "model.bin")
    refused("import onto a folder", "exists already", "import", good, out, "--force")

    convert("import", good, ROOM / "tiny.bin")
    files, tokens = {"tiny": ROOM / "tiny.bin"}, make_tokens(40, 1, 12)
    for mode in ("midpoint", "midpoint-a", "retrofit", "bdia"):
        start = ["-e", ROOM / "tiny.bin"] if mode in ("retrofit", "bdia") else ["-e", "d6", "--layers", 2, "--channels", 16, "--heads", 2]
        start += ["--context", 12, "-i", tokens.path, "-b", 1, "-x", 0]
        trainer(*start, "--mode", mode, "-o", ROOM / f"tiny {mode}")
        files[mode] = ROOM / f"tiny {mode}" / "model_00000000.bin"
    bad = ROOM / "bad.bin"
    for what, of, words, change in BAD_MODELS:
        bad.write_bytes(change(files[of].read_bytes()))
        refused(f"export, {of}, {what}", words, "export", bad, out / "folder")
    refused("export from nowhere", "no such file", "export", ROOM / "nowhere", out / "folder")
    refused("export a folder", "no such file", "export", good, out / "folder")
    refused("export into no folder", "no such folder", "export", files["tiny"], out / "no" / "folder")
    refused("export without a tokenizer", "no tokenizer", "export", files["tiny"], out / "folder", "--tokenizer", ROOM / "out")
    refused("midpoint --as-baseline", "is of a midpoint network", "export", files["midpoint"], out / "folder", "--as-baseline", status=2)
    refused("a disk too small", "File too large", "import", good, out / "model.bin", limit=8192)
    refused("a disk too small", "File too large", "export", files["midpoint"], out / "folder", limit=16384)

    (out / "folder").mkdir()
    shutil.copyfile(files["tiny"], out / "model.bin")
    refused("import onto a file", "exists already; --force", "import", good, out / "model.bin")
    refused("a disk too small, --force", "File too large", "import", good, out / "model.bin", "--force", limit=8192)
    refused("export onto a folder", "exists already", "export", files["tiny"], out / "folder")
    refused("export onto a file", "exists already", "export", files["tiny"], out / "model.bin")
    for what, *args in [("no command",), ("another command", "convert"), ("too little", "import", good),
                        ("unknown flag", "export", "a", "b", "--fast"), ("a flag of the other command", "export", "a", "b", "--force")]:
        done = hf(*args)
        check(done.returncode == 2 and "usage:" in done.stderr and "Traceback" not in done.stderr, f"usage, {what}: {done.returncode}, {done.stderr!r}")

def test_interrupted():
    """Stopped by a signal in the middle, it takes away what it has begun."""
    random_gpt2(n_layer=12, n_embd=768, n_head=12).save_pretrained(ROOM / "large")
    convert("import", ROOM / "large", ROOM / "large.bin")
    (ROOM / "stopped").mkdir()
    for sig, status in [(signal.SIGTERM, 143), (signal.SIGINT, 130)]:
        for args in (["import", ROOM / "large", ROOM / "stopped" / "model.bin"], ["export", ROOM / "large.bin", ROOM / "stopped" / "folder"]):
            process = subprocess.Popen([sys.executable, HERE / "hf.py", *args], stderr=subprocess.PIPE, text=True,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # ignored in the background
            end = time.time() + 30
            while not any(p.is_file() for p in (ROOM / "stopped").rglob("*")) and time.time() < end:
                time.sleep(0.005)
            process.send_signal(sig)
            error = process.communicate()[1]
            check(process.returncode == status and not error and not list((ROOM / "stopped").iterdir()),
                  f"{args[0]} stopped by {sig.name}: status {process.returncode}, {error!r}, {list((ROOM / 'stopped').rglob('*'))}")

def main():
    global TRAINER, SAMPLER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", metavar="PATH", help="the trainer; without it, what make builds")
    parser.add_argument("--sampler", metavar="PATH", help="the program that writes logits; likewise")
    args = parser.parse_args()
    if not args.trainer or not args.sampler:
        subprocess.run(["make", "-s", "-C", ROOT, "train_rev_gpt2", "sample_rev_gpt2"], check=True)
    TRAINER = Path(args.trainer or ROOT / "train_rev_gpt2").resolve()
    SAMPLER = Path(args.sampler or ROOT / "sample_rev_gpt2").resolve()
    torch.manual_seed(1)
    for test in (test_shapes, test_checkpoints, test_networks, test_tokenizer, test_bad_input, test_interrupted):
        start = time.time()
        try:
            test()
        except Exception:
            check(False, f"{test.__name__} ended early\n{traceback.format_exc()}")
        print(f"{test.__name__}: {time.time() - start:.0f} s", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    main()
