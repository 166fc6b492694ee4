"""
Tests hf.py, modeling_rev.py and modeling_rev_gpt2.py: transformers and the trainer must compute the same logits from the same weights.

    python3 dev/hf/test_hf.py [--trainer PATH] [--sampler PATH] [TEST ...]      without them, what `make` builds, and every test

Needs torch, transformers (4.48 or newer) and safetensors, some 4 GB of memory and a few minutes; peft and accelerate for
fine-tuning as their users do it, tiktoken with its cache or a network for GPT-2's tokenizer. The last line is
`N passed, N failed`, the exit status 1 if any failed. dev/test/common.py runs transformers' own tests.
"""
import argparse, contextlib, importlib.util, json, os, resource, shutil, signal, struct, subprocess, sys, tempfile, time, traceback
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
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
except ImportError as e:
    print(f"skipped, no package {e.name}\n0 passed, 0 failed")
    sys.exit(0)
sys.path.append(str(ROOT / "dev/reference"))
from reference import GPT2, shapes

transformers.utils.logging.disable_progress_bar()
DTYPE = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"  # the argument's name
MODES = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia"]
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

def hf(*args, limit=None, **env):
    """Runs hf.py; limit: bytes that a file may have."""
    limits = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return subprocess.run([sys.executable, HERE / "hf.py", *map(str, args)], capture_output=True, text=True, preexec_fn=limits,
                          env=os.environ | env)

def convert(*args):
    done = hf(*args)
    ok = done.returncode == 0 and all(line.startswith("hf.py: warning: ") for line in done.stderr.splitlines())
    check(ok, f"hf.py {' '.join(map(str, args))}: status {done.returncode}, {done.stderr}")
    return done

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
    return AutoModelForCausalLM.from_pretrained(folder, **{DTYPE: "auto"} | kwargs).eval()  # which is the default since version 5

# ------------------------------------------------------------------------------------------------------------------------
# A GPT-2 there and back

def test_shapes():
    sizes = [(12, 768, 12, 1024, 1024), (2, 1600, 25, 48, 48), (2, 1024, 16, 48, 48), (2, 1280, 20, 48, 48)]
    for L, C, NH, context, T in sizes[:2] if NETWORKS == few(NETWORKS) else sizes:
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
    same_tensors(load(ROOM / "plain", **{DTYPE: torch.bfloat16}), load(ROOM / "version 5"), "version 5")
    logits = logits_of(load(ROOM / "version 5", **{DTYPE: torch.float32}), tokens.ids)
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
        code = {"modeling_rev.py", "modeling_rev_gpt2.py"} if "midpoint" in model else set()
        check(there == {"config.json", "generation_config.json", "model.safetensors"} | files.keys() | code, f"{model}: not all or other files, {there}")
        tokenizer = AutoTokenizer.from_pretrained(ROOM / "with tokenizer", trust_remote_code=True)
        check(tokenizer.encode("abba") == [2, 1, 0] and tokenizer.decode([2, 1, 0]) == "abba", f"{model}: AutoTokenizer")
        shutil.rmtree(ROOM / "with tokenizer")

def test_vocabularies():
    """A tokenizer goes along where it is known; a vocabulary somewhat larger than GPT-2's is GPT-2's."""
    small = dict(n_layer=1, n_embd=16, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None)
    texts = ["Hello world", " \u00e4\u00df\u20ac\n\t<|endoftext|> don't", bytes(range(128)).decode()]
    nowhere = dict(TIKTOKEN_CACHE_DIR=str(ROOM / "no cache"), https_proxy="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9")
    for model in (ROOM / "baseline" / "model_00000000.bin", ROOM / "midpoint" / "model_00000000.bin"):
        check(not convert("export", model, ROOM / "bytes").stderr, "bytes: no warning")
        tokenizer = AutoTokenizer.from_pretrained(ROOM / "bytes", trust_remote_code=True)
        for text in texts:
            ids = tokenizer.encode(text)
            check(ids == list(text.encode()) and tokenizer.decode(ids) == text, f"bytes: {text!r} is {ids}, {tokenizer.decode(ids)!r}")
        check(len(tokenizer) == 256, f"bytes: {len(tokenizer)} tokens")
        shutil.rmtree(ROOM / "bytes")
    done = convert("export", ROOM / "plain.bin", ROOM / "unknown")
    check("a vocabulary of 300 has is not known" in done.stderr and done.stderr.count("\n") == 1, f"another vocabulary: {done.stderr!r}")
    for V, found in [(50257, ""), (50258, "; taken for GPT-2's 50257 tokens and 1 of padding"), (50304, "and 47 of padding"), (50305, "")]:
        random_gpt2(vocab_size=V, **small).save_pretrained(ROOM / f"V {V}")
        done = convert("import", ROOM / f"V {V}", ROOM / f"{V}.bin")
        check(done.stdout.strip().endswith("context 16") if not found else found in done.stdout, f"V {V}: {done.stdout!r}")
    done = hf("export", ROOM / "50257.bin", ROOM / "offline", **nowhere)
    check(done.returncode == 0 and done.stderr.count("\n") == 1 and "neither in tiktoken's cache nor on the network" in done.stderr, f"no network: {done.stderr!r}")
    tokenizer_of(ROOM / "V 50257", [f"t{i}" for i in range(50257)])
    done = convert("import", ROOM / "V 50257", ROOM / "other.bin")
    check("its tokens are not GPT-2's" in done.stdout, f"50257 others: {done.stdout!r}")
    (ROOM / "half a tokenizer").mkdir()
    for name in ("tokenizer_config.json", "merges.txt", "special_tokens_map.json"):
        (ROOM / "half a tokenizer" / name).write_text("{}")
    refused("no vocabulary", "no tokenizer, that is none of", "export", ROOM / "plain.bin", ROOM / "out" / "folder",
            "--tokenizer", ROOM / "half a tokenizer")
    refused("a tokenizer too large", "a tokenizer of 301 tokens, but the model has 300", "export", ROOM / "plain.bin", ROOM / "out" / "folder",
            "--tokenizer", tokenizer_of(ROOM / "of 301", [f"t{i}" for i in range(301)]))
    (ROOM / "of 301" / "merges.txt").unlink()
    refused("no merges", "the second with merges.txt", "export", ROOM / "plain.bin", ROOM / "out" / "folder", "--tokenizer", ROOM / "of 301")
    try:
        import tiktoken
        enc = tiktoken.get_encoding("gpt2")
    except Exception as e:
        print(f"GPT-2's tokenizer: left out, no tiktoken or no vocabulary ({type(e).__name__})", flush=True)
        return
    trainer("-e", ROOM / "50304.bin", "-i", make_tokens(50304, 1, 16).path, "-b", 1, "-t", 16, "-x", 0, "-o", ROOM / "bdia 50304", "--mode", "bdia")
    for V, model in [(50257, ROOM / "50257.bin"), (50258, ROOM / "50258.bin"), (50304, ROOM / "bdia 50304" / "model_00000000.bin")]:
        check(not convert("export", model, ROOM / "gpt2").stderr, f"V {V}: no warning")
        tokenizer = AutoTokenizer.from_pretrained(ROOM / "gpt2", trust_remote_code=True)
        for text in texts:
            ids = tokenizer.encode(text)
            check(ids == enc.encode(text, allowed_special="all") and tokenizer.decode(ids) == text, f"V {V}: {text!r} is {ids}")
        end = json.loads((ROOM / "gpt2" / "config.json").read_text())["eos_token_id"]
        check(end == tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257, f"V {V}: ends with {end}")
        if V == 50258:  # a user adds a token
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            tokenizer.save_pretrained(ROOM / "V 50258")
            done = convert("import", ROOM / "V 50258", ROOM / "50258.bin", "--force")
            check("GPT-2's 50257 tokens, whose tokenizer suits it, and 1 more, '[PAD]'" in done.stdout, f"V {V}: {done.stdout!r}")
            convert("export", ROOM / "50258.bin", ROOM / "padded", "--tokenizer", ROOM / "V 50258")
            check(AutoTokenizer.from_pretrained(ROOM / "padded").encode("Hello[PAD]") == [15496, 50257], "V 50258: --tokenizer copies the token added")
            tokenizer_of(ROOM / "V 50258", [f"t{i}" for i in range(50258)])
            done = convert("import", ROOM / "V 50258", ROOM / "50258.bin", "--force")
            check("its tokens are not GPT-2's" in done.stdout, f"V {V}: {done.stdout!r}")
        shutil.rmtree(ROOM / "gpt2")

def tokenizer_of(folder, texts):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder

def test_versions():
    """Another transformers than those that work is refused in one line."""
    for version, works in [("4.47.1", False), ("4.48.0", True)]:
        code = f"import transformers; transformers.__version__ = '{version}'; import modeling_rev"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=HERE)
        last = done.stderr.strip().splitlines()[-1:]
        check((done.returncode == 0) == works and (works or f"this is transformers {version}; 4.48 or newer is needed" in last[0]), f"transformers {version}: {last}")
    config = json.loads((ROOM / "network 0" / "config.json").read_text())
    check(config["transformers_needed"] == ">=4.48", "the oldest version is in config.json")

# ------------------------------------------------------------------------------------------------------------------------
# The reversible networks

NETWORKS = [("midpoint", "--step-size", 0.4), ("midpoint-a",), ("leapfrog", "--grid", 19), ("hamiltonian", "--step-size", 0.75),
            ("retrofit", "--coefficient", -0.0625, "--stem", 1), ("retrofit", "--coefficient", 1, "--fixed-point", 2, "--stem", 3),
            ("retrofit", "--coefficient", 0.5, "--fixed-point", 0), ("retrofit", "--coefficient", 0.25, "--ordinary", "0,2-3,5"),
            ("bdia", "--coefficient", -0.0625, "--stem", 2), ("bdia", "--coefficient", 0.25, "--stem", 0),
            ("bdia", "--coefficient", -0.25, "--ordinary", "1,4-5")]

def few(networks):
    """Those that go back in ways of their own: with remainders, in halves, by estimates, with ordinary steps between others."""
    return [x for x in networks if x[0] in ("midpoint", "midpoint-a", "hamiltonian") or "ordinary" in str(x)]

def whole(networks, i):
    """Whether network i goes through what transformers does alike with all: the first of each mode does, of few the second and the last,
    of which test_llama.py ties the embeddings of one."""
    if networks == few(networks):
        return i in (1, len(networks) - 1)
    return networks[i][0] != networks[i - 1][0]

def randomize(path):
    """Every tensor of a model file random, the padding of wte too, which nobody may read."""
    header, rng = np.fromfile(path, "<i4", 256), np.random.default_rng(1)
    m = SimpleNamespace(**dict(zip(("maxT", "V", "L", "NH", "C", "Vp"), map(int, header[2:8]))), block=GPT2)
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
    past = module_of(model).Past(None, 0, 12, mask)
    check(past.visible(12, "cpu").any(-1).all(), f"{what}: padding sees something, lest it be NaN")
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for i, p in enumerate(prompts):
            near(padded[i, 12 - len(p):], model(p[None]).logits[0], f"{what}: logits of prompt {i} padded", 1e-5)
        whole, first = model(ids[2:]).logits, model(ids[2:, :5], use_cache=True)
        rest = model(ids[2:, 5:], past_key_values=first.past_key_values)
        near(torch.cat([first.logits, rest.logits], 1), whole, f"{what}: logits by two pieces", 1e-5)
        first = model(ids[2:, :5], use_cache=True)
        rest = model(ids[2:, 5:], cache=first.past_key_values)
        near(torch.cat([first.logits, rest.logits], 1), whole, f"{what}: logits by two pieces, by the cache's newer name", 1e-5)
        check(len(first.past_key_values) == model.config.num_hidden_layers, f"{what}: num_hidden_layers is what a cache holds")
    a, b = (generated(model, ids, mask, num_beams=3, use_cache=cache) for cache in (True, False))
    check(a == b, f"{what}: beam search with and without a cache")

def test_training(model, ids, what):
    """The loss, and its derivative along a random direction against finite differences, in float64."""
    model, ids = model.double(), ids[:, :16]
    check(model(ids).logits.dtype == torch.float64, f"{what}: float64 is kept")
    def loss_of():  # transformers computes it in float32
        return -model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
    near(model(ids, labels=ids).loss.detach(), loss_of().detach(), f"{what}: loss", 1e-5)
    model.train()
    model.zero_grad()
    loss_of().backward()
    check(all(p.grad is not None and p.grad.any() for p in model.parameters()), f"{what}: every parameter has a gradient")
    direction, eps = [torch.randn_like(p) for p in model.parameters()], 1e-6
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction))
    ends = []
    with torch.no_grad():
        for step in (eps, -2 * eps):
            for p, d in zip(model.parameters(), direction):
                p.add_(d, alpha=step)
            ends.append(loss_of())
    differences = (ends[0] - ends[1]) / (2 * eps)
    check(abs(differences / slope - 1) < 1e-5, f"{what}: gradient {slope}, finite differences {differences}")

def module_of(model):
    """That of the recurrences, not of the block."""
    return sys.modules[type(model).__base__.__module__]

def test_arguments(model, ids, folder, what):
    """Every argument of a GPT-2 means here what it means there."""
    L, (B, T), C, heads = model.config.n_layer, ids.shape, model.config.hidden_size, model.config.num_attention_heads
    places = getattr(model.base_model, "wpe", None)  # GPT-2's
    with torch.no_grad():
        logits, embed = model(ids).logits, model.get_input_embeddings()
        for name in ("position_ids", "cache_position", "inputs_embeds", "head_mask", "encoder_hidden_states", "past_key_values", "another"):
            near(model(ids, **{name: None}).logits, logits, f"{what}: {name}=None", 0)
        near(model(ids, cache_position=torch.arange(T)).logits, logits, f"{what}: cache_position", 0)
        near(model(ids, attention_mask=torch.ones_like(ids)).logits, logits, f"{what}: attention_mask of ones", 0)
        near(model(inputs_embeds=embed(ids)).logits, logits, f"{what}: inputs_embeds", 0)
        types = embed(ids.flip(1)) if places else 0
        near(model(ids, token_type_ids=ids.flip(1)).logits, model(inputs_embeds=embed(ids) + types).logits,
             f"{what}: token_type_ids are embedded and added in GPT-2, and nothing elsewhere", 1e-5)
        near(model(ids, logits_to_keep=3).logits, logits[:, -3:], f"{what}: logits_to_keep", 1e-5)
        near(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]], f"{what}: logits_to_keep, places", 1e-5)
        out = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
        near(out.logits, logits, f"{what}: logits with attentions", 1e-5)
        check([tuple(s.shape) for s in out.hidden_states] == [(B, T, C)] * (L + 1), f"{what}: a hidden state before each layer and one at last")
        near(model.lm_head(out.hidden_states[-1]), out.logits, f"{what}: the last hidden state is what the head reads", 0)
        near(out.hidden_states[0], embed(ids) + (places(torch.arange(T)) if places else 0), f"{what}: the first is the embedding", 1e-6)
        check([tuple(w.shape) for w in out.attentions] == [(B, heads, T, T)] * L, f"{what}: the attention of each layer")
        near(torch.stack(out.attentions).sum(-1), torch.ones(L, B, heads, T), f"{what}: of sum 1", 1e-5)
        check(not any(w.triu(1).any() for w in out.attentions), f"{what}: and nothing seen of what follows")
        check(isinstance(model(ids, return_dict=False), tuple), f"{what}: return_dict=False")
        labels, loss = ids.clone(), model(ids, labels=ids).loss
        near(model(ids, labels=ids, num_items_in_batch=5).loss, loss * B * (T - 1) / 5, f"{what}: num_items_in_batch", 1e-3)
        labels[:, :T // 2] = -100
        near(model(ids, labels=labels).loss, -logits[:, T//2 - 1:-1].log_softmax(-1).gather(2, ids[:, T//2:, None]).mean(), f"{what}: labels of -100", 1e-5)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        near(base(ids).last_hidden_state, out.hidden_states[-1], f"{what}: AutoModel is what is before the head", 1e-5)
    for name, value in [("encoder_hidden_states", embed(ids)), ("head_mask", torch.ones(L, 1)), ("input_ids", None)]:
        try:
            model(**{"input_ids": ids, name: value})
            check(False, f"{what}: {name} is refused")
        except ValueError:
            check(True, name)

def test_generations(model, ids, what):
    """Ways to generate that must find what greedy search does, and ways with an output of their own."""
    greedy, V = generated(model, ids), model.config.vocab_size
    never = dict(eos_token_id=-1) if transformers.__version__ < "4.57" else {}  # where guessing cannot do without such a token
    check(greedy == generated(model, ids, prompt_lookup_num_tokens=2, **never), f"{what}: with tokens guessed from the prompt")
    assistant = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True).eval()
    check(greedy == generated(model, ids, assistant_model=assistant, **never), f"{what}: with tokens guessed by another")
    embeds = model.get_input_embeddings()(ids)
    plain = dict(do_sample=False, max_new_tokens=8, pad_token_id=0, attention_mask=torch.ones_like(ids))
    whole = model.generate(ids, **plain)
    check(torch.equal(model.generate(inputs_embeds=embeds, **plain), whole[:, ids.shape[1]:]), f"{what}: from embeddings")
    torch.manual_seed(3)
    a = model.generate(ids, do_sample=True, top_k=20, num_beams=2, max_new_tokens=8, pad_token_id=0)
    torch.manual_seed(3)
    b = model.generate(ids, do_sample=True, top_k=20, num_beams=2, max_new_tokens=8, pad_token_id=0, use_cache=False)
    check(torch.equal(a, b), f"{what}: sampled beams with and without a cache")
    out = model.generate(ids, **plain, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True, output_scores=True)
    check(torch.equal(out.sequences, whole) and out.scores[0].shape == (1, V), f"{what}: scores")
    check({len(x) for x in out.attentions} == {model.config.n_layer} and {len(x) for x in out.hidden_states} == {model.config.n_layer + 1},
          f"{what}: attentions and hidden states of every token")
    plain["attention_mask"] = torch.ones_like(whole)
    more = model.generate(whole, **plain, past_key_values=out.past_key_values)
    check(torch.equal(more, model.generate(whole, **plain)), f"{what}: goes on from a cache")

def test_forms(folder, tokens, what):
    """Half precision, another size of the vocabulary, torch.compile, untied embeddings; saved, and read by hf.py."""
    model, out = load(folder, trust_remote_code=True), ROOM / "form"
    logits = logits_of(model, tokens.ids)
    for dtype, near_enough in [(torch.bfloat16, 0.3), (torch.float16, 0.05)]:
        half = load(folder, trust_remote_code=True, **{DTYPE: dtype})
        near(logits_of(half, tokens.ids).float(), logits, f"{what}: {dtype}", near_enough)
        half.generate(tokens.ids[:, :5], max_new_tokens=3, pad_token_id=0)
        half.train()
        half.gradient_checkpointing_enable()
        check(all(g.isfinite().all() for g in gradients(half, tokens.ids).values()), f"{what}: {dtype} trains, stepping back")
    near(logits_of(load(folder, trust_remote_code=True, attn_implementation="eager"), tokens.ids), logits, f"{what}: eager attention", 1e-5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    near(compiled(tokens.ids, use_cache=False).logits.detach(), logits, f"{what}: torch.compile", 1e-5)
    want = gradients(model, tokens.ids)
    with reversing(model):
        again = {name.removeprefix("_orig_mod."): g for name, g in gradients(torch.compile(model, backend="aot_eager"), tokens.ids).items()}
        check(apart(want, again) < 2e-5, f"{what}: torch.compile and stepping back, {apart(want, again):.1e}")
    torch._dynamo.reset()
    model.eval().resize_token_embeddings(260)
    tied = model.config.tie_word_embeddings
    check(model.config.vocab_size == 260 and (model.lm_head.weight is model.base_model.wte.weight) == tied, f"{what}: resized, tied as before")
    near(logits_of(model, tokens.ids)[..., :256], logits, f"{what}: resized", 1e-5)
    model.save_pretrained(out)
    check(("lm_head.weight" not in load_file(out / "model.safetensors")) == tied, f"{what}: tied weights are saved once")
    again = load(out, trust_remote_code=True)
    convert("import", out, ROOM / "form.bin", "--force")
    near(logits_of(again, tokens.ids), logits_of(model, tokens.ids), f"{what}: resized and saved", 0)
    header = np.fromfile(ROOM / "form.bin", "<i4", 256)
    check(header[3] == 260 and header[8] == MODES.index(model.config.mode), f"{what}: resized and imported, {header[:18]}")
    shutil.rmtree(out)

LORA = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)

def test_tuning(folder, what, lora=LORA):
    """As users do it: all of it, then a LoRA, by Trainer with gradient checkpointing; saved, and in the trainer the same network."""
    if not all(importlib.util.find_spec(name) for name in ("peft", "accelerate")):
        print("fine-tuning: left out, no package peft or accelerate", flush=True)
        return
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments
    text = torch.frombuffer(bytearray((ROOT / "README.md").read_bytes()[:1600]), dtype=torch.uint8).long().view(-1, 64)
    tokens = make_tokens(256, 1, 64)
    def tune(model, rate, **checkpointing):
        args = TrainingArguments(str(ROOM / "trainer"), max_steps=50, per_device_train_batch_size=2, learning_rate=rate, use_cpu=True, report_to=[],
                                 save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=1, gradient_checkpointing=True, **checkpointing)
        losses = [model.eval()(text, labels=text).loss.item()]
        trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in text])
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        losses.append(model.eval()(text, labels=text).loss.item())
        check(losses[1] < 0.8 * losses[0], f"{what}: 50 steps lower the loss, {losses}")
        return trainer, losses
    def same_network(folder, model, how):
        convert("import", folder, ROOM / "tuned.bin", "--force")
        difference = near(trainer_logits(ROOM / "tuned.bin", tokens), logits_of(model, tokens.ids), f"{what}, {how}: logits in the trainer", 5e-4)
        print(f"{what}, {how}: loss {losses[0]:.2f} to {losses[1]:.2f}, logits in the trainer differ by {difference:.1e}", flush=True)
    trainer, losses = tune(load(folder, trust_remote_code=True), 3e-3)
    trainer.save_model(ROOM / "tuned")
    same_network(ROOM / "tuned", trainer.model, "Trainer")
    lora = get_peft_model(load(folder, trust_remote_code=True), LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.05, **lora))
    trainer, losses = tune(lora, 3e-3)
    lora.save_pretrained(ROOM / "adapter")
    done = hf("import", ROOM / "adapter", ROOM / "adapter.bin")
    check(done.returncode == 1 and "merge_and_unload" in done.stderr and done.stderr.count("\n") == 1, f"{what}: an adapter is refused, {done.stderr!r}")
    again = AutoPeftModelForCausalLM.from_pretrained(ROOM / "adapter", trust_remote_code=True).eval()
    near(logits_of(again, tokens.ids), logits_of(lora, tokens.ids), f"{what}: an adapter saved and loaded", 1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(ROOM / "merged")
    same_network(ROOM / "merged", merged, "LoRA")
    generated(load(ROOM / "merged", trust_remote_code=True), tokens.ids[:1, :5])
    for name in ("tuned", "adapter", "merged"):
        shutil.rmtree(ROOM / name)

# ------------------------------------------------------------------------------------------------------------------------
# Stepping back

def gradients(model, ids, **kwargs):
    model.zero_grad()
    out = model(ids, labels=ids, **kwargs)
    torch.rand(7)  # random numbers may be drawn in between
    out.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def apart(a, b):
    """The largest relative distance between the tensors of two gradients."""
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-9)) for n in a) if a.keys() == b.keys() else np.inf

@contextlib.contextmanager
def reversing(model):
    """In training, with gradient checkpointing; and not a bit of a stream may come back wrong."""
    module = module_of(model)
    most, module.DRIFT = module.DRIFT, 0
    model.train()
    model.gradient_checkpointing_enable()
    yield
    model.gradient_checkpointing_disable()
    module.DRIFT = most

def kept(model, ids):
    """Bytes that autograd keeps between a forward pass and its backward pass, parameters apart."""
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.base_model(ids).last_hidden_state.sum()  # all are alive, so that no address comes twice
    return sum(size for at, size in storages.items() if at not in parameters) + 0 * loss.ndim

def test_reversing(model, ids, what, norm="ln_1", more=0):
    """norm: what the first one is called in a block; more: bytes an element that autograd keeps of the norm at the end."""
    layers, mlp = model.base_model.h, [layer.mlp for layer in model.base_model.h]
    into_stream = list(mlp[2].children())[-1].weight
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    want = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model, ids)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    padded = gradients(model, ids, attention_mask=mask)
    with reversing(model):
        difference = apart(want, gradients(model, ids))
        check(difference < 2e-5, f"{what}: gradients, stepping back, are autograd's but for {difference:.1e}")
        print(f"{what}: gradients by stepping back differ by {difference:.1e}", flush=True)
        planes = (33 + more + 8 * len(model.config.ordinary_steps)) * ids.numel() * model.config.hidden_size
        check(kept(model, ids) <= planes, f"{what}: little is kept, {kept(model, ids) / planes:.1f} of x, two streams, remainders, what ordinary steps forget, what ln_f reads")
        check(apart(padded, gradients(model, ids, attention_mask=mask)) < 2e-5, f"{what}: gradients with padding")
        with torch.autocast("cpu", torch.bfloat16):
            again = gradients(model, ids)
        near, coarse = apart(rough, again), apart(rough, want)  # rounded as autograd rounds, so neither float32 nor far from it
        check(near < 1.5 * coarse and apart(again, want) > 0.3 * coarse, f"{what}: mixed precision is the same, {near:.1e}, {coarse:.1e}")
        loss = model(ids, labels=ids).loss
        grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2)]
        check(all(torch.equal(a, b) for a, b in zip(*grads)), f"{what}: going back twice")
        check(apart(want, dict(zip(want, grads[0]))) < 2e-5, f"{what}: torch.autograd.grad")
        out = model(ids, labels=ids, use_cache=True)
        check(out.past_key_values is None, f"{what}: no cache when stepping back")
        check(len(model(ids, output_hidden_states=True).hidden_states) == 7, f"{what}: hidden states by autograd")
        noise = [mlp[3].register_forward_hook(lambda module, x, y: torch.nn.functional.dropout(y, 0.1))]
        check(all(g.isfinite().all() for g in gradients(model, ids).values()), f"{what}: dropout is the same twice")
        count = iter(range(1000))
        noise += [mlp[3].register_forward_hook(lambda module, x, y: y + 0.1 * next(count))]
        try:
            gradients(model, ids)
            check(False, f"{what}: another force the second time is noticed")
        except RuntimeError as e:
            check("the same bits twice" in str(e), f"{what}: {e}")
        for hook in noise:
            hook.remove()
        with torch.no_grad():
            was = into_stream[0, 0].item()
            into_stream[0, 0] = torch.nan
            check(model(ids).loss is None and model(ids).logits.isnan().all(), f"{what}: NaN is seen")
        check(model(ids).logits.isnan().all(), f"{what}: NaN is seen when stepping back")
        with torch.no_grad():
            into_stream[0, 0] = 1e12
        check(not model(ids).logits.isfinite().any(), f"{what}: so is a stream that leaves the range")
        with torch.no_grad():
            into_stream[0, 0] = was
        for name, p in model.named_parameters():  # as with an adapter
            p.requires_grad_(False)
        for p in [*mlp[2].parameters(), *getattr(layers[4], norm).parameters()]:
            p.requires_grad_(True)
        some = gradients(model, ids)
        check(len(some) == sum(p.requires_grad for p in model.parameters()), f"{what}: some parameters alone, {list(some)}")
    check(apart(gradients(model, ids), some) < 2e-5, f"{what}: gradients of some parameters")
    model.requires_grad_(True)
    model.load_state_dict(state)
    model.eval()

def test_depth():
    """What is kept does not grow with depth, but by what conversions shift out: half a byte an element a step for a = 1/16."""
    model = load(ROOM / "network 0", trust_remote_code=True)
    module, ids = sys.modules[type(model).__module__], torch.randint(0, 256, (2, 64))
    elements = ids.numel() * 64
    for mode, more in [("midpoint", {}), ("leapfrog", {}), ("hamiltonian", {}), ("midpoint-a", {}),
                       ("retrofit", dict(coefficients=[-0.0625], stem=1)), ("bdia", dict(coefficients=[0.0625]))]:
        stored, stepping = [], []
        for L in (6, 24, 48):
            a = dict(coefficients=[(1.25, -0.75, 0.8125, -1.1875)[k % 4] for k in range(L)]) if mode == "midpoint-a" else {}
            config = module.RevGPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=L, n_head=4, mode=mode, step_size=1 / L, **more, **a)
            model = module.RevGPT2LMHeadModel(config).train()
            stored.append(kept(model, ids))
            want = gradients(model, ids)
            with reversing(model):
                stepping.append(kept(model, ids))
                difference = apart(want, gradients(model, ids))
            check(difference < 1e-4, f"{mode}, L {L}: gradients differ by {difference:.1e}")
        growth = (stepping[2] - stepping[0]) / elements / 42
        print(f"{mode}, L 6, 24, 48: bytes kept an element, stepping back {[x // elements for x in stepping]}, by autograd "
              f"{[x // elements for x in stored]}; gradients at L 48 differ by {difference:.1e}", flush=True)
        check(growth <= (0.6 if mode in ("retrofit", "bdia") else 0), f"{mode}: {growth:.2f} bytes an element a step, {stepping}")
        check(stored[2] > 6 * stored[0] > 60 * elements, f"{mode}: by autograd it grows, {stored}")

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
        if not config.ordinary:
            moved(stem=config.stem + 1)
        for k in range(1, config.n_layer) if config.ordinary else []:
            moved(ordinary=sorted({k} ^ set(config.ordinary)))
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
        said = json.loads((folder / "config.json").read_text())
        check(("stem" in said) != ("ordinary" in said) == ("--ordinary" in flags), f"{what}: how config.json says the ordinary steps")
        check(logits.std() > 0.5, f"{what}: logits of order 1")
        difference = near(logits_of(model, tokens.ids), logits, f"{what}: logits")
        floating = trainer_logits(run / "model_00000000.bin", tokens, "--stream", "float")
        near(logits_of(model, tokens.ids), floating, f"{what}: logits of floating-point streams", TOLERANCE / 10)
        check(np.abs(logits - logits_of(ordinary, tokens.ids).numpy()).max() > 1e-2, f"{what}: another network than the ordinary one")
        print(f"{what}: logits differ by {difference:.1e} of {abs(logits).max():.1f}, "
              f"by {abs(logits_of(model, tokens.ids).numpy() - floating).max():.1e} with --stream float", flush=True)
        convert("import", folder, ROOM / "back.bin", "--force")
        check((ROOM / "back.bin").read_bytes() == (run / "model_00000000.bin").read_bytes(), f"{what}: exported and imported, the same file")
        test_knobs(model, tokens.ids, what)
        test_arguments(model, tokens.ids, folder, what)
        test_generation(model, what)
        test_generations(model, tokens.ids[:1, :12], what)
        test_reversing(model, tokens.ids, what)
        if whole(NETWORKS, i):
            test_forms(folder, tokens, what)
            test_tuning(folder, what)
        model._modules.pop("_cache", None)  # a cache of fixed size is part of the model in 4.48
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
    near(logits_of(load(ROOM / "version 1005", trust_remote_code=True, **{DTYPE: torch.float32}), tokens.ids), logits, "version 1005, float32")
    model = load(ROOM / "version 1005", trust_remote_code=True)
    check(model.dtype == torch.bfloat16, "version 1005: bf16")
    near(logits_of(model, tokens.ids).float(), logits, "version 1005, bf16", 0.1)
    # a new one
    config = AutoConfig.from_pretrained(ROOM / "network 0", trust_remote_code=True)
    new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    block = new.transformer.h[0]
    check(abs(new.transformer.wte.weight.std() - 0.02) < 1e-3 and abs(block.mlp.c_proj.weight.std() - 0.02 / 12 ** 0.5) < 1e-3
          and (block.ln_1.weight == 1).all() and not block.attn.c_attn.bias.any(), "from_config: GPT-2's initialization")
    for wrong in [dict(mode="retrofit", ordinary=[1]), dict(mode="retrofit"), dict(mode="bdia", ordinary=[4, 12]), dict(mode="bdia", stem=13),
                  dict(mode="bdia", stem=1, ordinary=[0, 2]), dict(ordinary=[0])]:
        try:
            type(config)(coefficients=[0.25] if "mode" in wrong else [], **wrong)
            check(False, f"a network that there is not is refused: {wrong}")
        except ValueError:
            check(True, "refused")

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
    ("another family", 'model_type is "mistral"', changed_config(model_type="mistral")),
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
    ("weights too many", "has, beyond a GPT-2 of these sizes, 'score.weight'", put("score.weight", torch.ones(2, 16))),
    ("a name of two lines", "'a\\nb'", put("a\nb", torch.ones(2))),
    ("a mask of no layer", "'h.2.attn.bias'", put("h.2.attn.bias", torch.ones(2))),
    ("a name twice", "a second 'wte.weight'", put("wte.weight", torch.ones(40, 16))),
    ("vocabulary of another size", "wte.weight is (40, 16); by its sizes it is (41, 16)", changed_config(vocab_size=41)),
    ("transposed", "h.1.attn.c_attn.weight is (48, 16); by its sizes it is (16, 48)", put(QKV, torch.ones(48, 16))),
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

NOT_MERGED = "transformer.h.0.attn.c_attn.lora_A.default.weight"
BAD_REVERSIBLE = [
    ("mode", "midpoint", 'mode is "midway"', changed_config(mode="midway")),
    ("mode baseline", "midpoint", 'mode is "baseline"', changed_config(mode="baseline")),
    ("step size missing", "midpoint", "step_size and coefficients are [null, []]", changed_config(step_size=None)),
    ("step size a text", "midpoint", 'step_size and coefficients are ["1", []]', changed_config(step_size="1")),
    ("step size NaN", "midpoint", "step_size and coefficients are [NaN", changed_config(step_size=float("nan"))),
    ("step size negative", "midpoint", "a step size of -1", changed_config(step_size=-1)),
    ("coefficients too many", "midpoint", "midpoint of 2 layers has 0", changed_config(coefficients=[1])),
    ("coefficients too few", "midpoint-a", "midpoint-a of 2 layers has 2", changed_config(coefficients=[1.25])),
    ("a coefficient between", "midpoint-a", "multiples of 1/16", changed_config(coefficients=[1.25, 0.8])),
    ("a coefficient of 0", "midpoint-a", "a_k are not those", changed_config(coefficients=[1.25, 0])),
    ("a coefficient too fine", "bdia", "multiples of 1/256", changed_config(coefficients=[0.1])),
    ("coefficients a number", "retrofit", "a number and a list of numbers", changed_config(coefficients=0.5)),
    ("stem", "retrofit", "a stem of 3", changed_config(stem=3)),
    ("stem of midpoint", "midpoint", "a stem of 1 and", changed_config(stem=1)),
    ("ordinary of midpoint", "midpoint-a", "ordinary steps [1]; one of them", changed_config(ordinary=[1])),
    ("ordinary beside stem", "bdia", "a stem of 1 and ordinary steps [0]", changed_config(ordinary=[0])),
    ("ordinary beyond", "bdia", "bdia of 2 layers has the ordinary steps [0, 2]", changed_config(stem="absent", ordinary=[0, 2])),
    ("ordinary without 0", "retrofit", "retrofit of 2 layers has the ordinary steps [1]", changed_config(stem="absent", ordinary=[1])),
    ("ordinary too far", "bdia", "ordinary is [256]; a list of steps from 0 to 255", changed_config(stem="absent", ordinary=[256])),
    ("ordinary a number", "bdia", "ordinary is 1; a list", changed_config(stem="absent", ordinary=1)),
    ("ordinary of texts", "bdia", 'ordinary is ["1"]', changed_config(stem="absent", ordinary=["1"])),
    ("iterations", "retrofit", "17 iterations", changed_config(fixed_point=17)),
    ("grid", "bdia", "grid at most 30", changed_config(grid=31)),
    ("grid true", "bdia", "whole numbers", changed_config(grid=True)),
    ("not merged", "midpoint", f"{NOT_MERGED[12:]!r} is of an adapter that is not merged", put(NOT_MERGED, torch.ones(2, 16))),
    ("an adapter", "midpoint", "an adapter, not a model; peft merges it", lambda f: (f / "adapter_config.json").write_text("{}")),
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
    ("denominator", "retrofit", "no retrofit has coefficient 1 / 2^30", slot(13, 30)),
    ("iterations", "retrofit", "17 iterations", slot(11, 17)),
    ("stem", "bdia", "a stem of 99", slot(12, 99)),
    ("stem below -1", "bdia", "a stem of -2", slot(12, -2)),
    ("stem of retrofit", "retrofit", "ordinary steps []", slot(12, 0)),
    ("an ordinary step beyond", "bdia", "bdia of 2 layers has the ordinary steps [1, 2]", lambda b: slot(12, -1)(slot(17, 6)(b))),
    ("the last ordinary step", "bdia", "ordinary steps [255]", lambda b: slot(12, -1)(slot(24, -1 << 31)(b))),
    ("ordinary of retrofit", "retrofit", "retrofit of 2 layers has the ordinary steps [1]", lambda b: slot(12, -1)(slot(17, 2)(b))),
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
        convert("export", files[mode], ROOM / f"tiny {mode} exported")
    for what, of, words, change in BAD_REVERSIBLE:
        shutil.copytree(ROOM / f"tiny {of} exported", ROOM / "bad")
        change(ROOM / "bad")
        refused(f"import, {of}, {what}", words, "import", ROOM / "bad", out / "model.bin")
        shutil.rmtree(ROOM / "bad")
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

    for package in ("numpy", "safetensors"):
        (ROOM / f"no {package}").mkdir()
        (ROOM / f"no {package}" / f"{package}.py").write_text(f"raise ImportError('no module {package}')")
        refused(f"without {package}", f"(no module {package}): pip install numpy safetensors", "import", good, out / "model.bin",
                PYTHONPATH=str(ROOM / f"no {package}"))
    code = "import runpy, sys, numpy; numpy.fromfile = lambda *a, **k: bytearray(1 << 62); del sys.argv[0]; " \
           "runpy.run_path(sys.argv[0], run_name='__main__')"
    for args in (["import", good, out / "model.bin"], ["export", files["midpoint"], out / "folder"]):
        done = subprocess.run([sys.executable, "-c", code, HERE / "hf.py", *args], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)})
        check(done.returncode == 3 and done.stderr.startswith("hf.py: out of memory") and done.stderr.count("\n") == 1 and not list(out.iterdir()),
              f"{args[0]} without memory: status {done.returncode}, {done.stderr!r}, {list(out.iterdir())}")

    (out / "folder").mkdir()
    shutil.copyfile(files["tiny"], out / "model.bin")
    refused("import onto a file", "exists already; --force", "import", good, out / "model.bin")
    refused("a disk too small, --force", "File too large", "import", good, out / "model.bin", "--force", limit=8192)
    refused("export onto a folder", "exists already", "export", files["tiny"], out / "folder")
    refused("export onto a file", "exists already", "export", files["tiny"], out / "model.bin")
    for what, *args in [("no command",), ("another command", "convert"), ("too little", "import", good),
                        ("unknown flag", "export", "a", "b", "--fast"), ("a flag of the other command", "export", "a", "b", "--force")]:
        done = hf(*args)
        check(done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "(see --help)" in done.stderr, f"usage, {what}: {done.returncode}, {done.stderr!r}")

def test_interrupted():
    """Stopped by a signal in the middle, it takes away what it has begun."""
    random_gpt2(n_layer=12, n_embd=768, n_head=12).save_pretrained(ROOM / "large")
    convert("import", ROOM / "large", ROOM / "large.bin")
    (ROOM / "stopped").mkdir()
    for sig in signal.SIGTERM, signal.SIGINT:
        for args in (["import", ROOM / "large", ROOM / "stopped" / "model.bin"], ["export", ROOM / "large.bin", ROOM / "stopped" / "folder"]):
            process = subprocess.Popen([sys.executable, HERE / "hf.py", *args], stderr=subprocess.PIPE, text=True,
                                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # ignored in the background
            end = time.time() + 30
            while not any(p.is_file() for p in (ROOM / "stopped").rglob("*")) and time.time() < end:
                time.sleep(0.005)
            process.send_signal(sig)
            error = process.communicate()[1]
            check(process.returncode == 130 and error == "hf.py: interrupted; no file was left half-written\n" and not list((ROOM / "stopped").iterdir()),
                  f"{args[0]} stopped by {sig.name}: status {process.returncode}, {error!r}, {list((ROOM / 'stopped').rglob('*'))}")

def main():
    global TRAINER, SAMPLER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", metavar="PATH", help="the trainer; without it, what make builds")
    parser.add_argument("--sampler", metavar="PATH", help="the program that writes logits; likewise")
    every = [test_shapes, test_checkpoints, test_networks, test_depth, test_tokenizer, test_vocabularies, test_versions, test_bad_input, test_interrupted]
    parser.add_argument("--few", action="store_true", help="of the networks only those that go back in ways of their own, of GPT-2's sizes two")
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"{', '.join(test.__name__ for test in every)}; some need those before")
    args = parser.parse_args()
    tests = [test for test in every if not args.tests or test.__name__ in args.tests]
    NETWORKS[:] = few(NETWORKS) if args.few else NETWORKS
    if not args.trainer or not args.sampler:
        subprocess.run(["make", "-s", "-C", ROOT, "train_rev_gpt2", "sample_rev_gpt2"], check=True)
    TRAINER = Path(args.trainer or ROOT / "train_rev_gpt2").resolve()
    SAMPLER = Path(args.sampler or ROOT / "sample_rev_gpt2").resolve()
    torch.manual_seed(1)
    for test in tests:
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
