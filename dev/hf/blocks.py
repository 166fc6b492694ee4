"""
What hf.py knows of each block: the tensors of its model files, by a checkpoint's names, and where its sizes are written.

Of a model m: V the vocabulary, Vp its padded size in model files, C channels, L layers, NH heads, maxT the context, mode and what
else is of its recurrence; with Llama's block KH heads of keys and values, F the feed-forward width, HS the size of a head.
"""
import json
from math import prod
from types import SimpleNamespace
import numpy as np

from storage import die, read_json

MODES = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia"]  # slot 8 of the header counts these
GRIDS = [0, 20, 20, 20, 20, 14, 14]  # of each mode's integer streams, where a config.json says none
MODEL_MAGIC = 20240326
MOST_ORDINARY = 256  # steps that a model file has a bit for

def whole_numbers(path, config, sizes):
    """Of config.json, {key: (default, most)}."""
    for key, (default, most) in sizes.items():
        value = config.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            reason = ", as tokens are 16 bits in the trainer's files" if key == "vocab_size" else ""
            die(f"{path}: {key} is {json.dumps(value)}; a whole number from 1 to {most} is meant{reason}")
        yield value

def only(path, config, *meant):
    """(key, default, value): what else config.json may not say."""
    for key, default, value in meant:
        if config.get(key, default) != value:
            die(f"{path}: {key} is {json.dumps(config.get(key))}; only {json.dumps(value)} can be imported")

def shared_channels(path, m):
    if m.NH * m.HS != m.C:
        die(f"{path}: {m.NH} heads of {m.HS} channels have {m.NH * m.HS} of the network's {m.C}; the trainer has only heads that share them all")

def float_bits(x):
    return np.array([x], "<f4").view("<i4")

def float_of(bits):
    """The number that a person would have written."""
    return float(str(bits.view("<f4")[0]))

class GPT2:
    number, title, prefix, embedding, code = 0, "GPT-2", "transformer.", "wte.weight", "modeling_rev_gpt2.py"
    model_types, ordinary, classes = ("gpt2", "rev_gpt2"), "GPT2LMHeadModel", "RevGPT2"
    keeps_bf16 = False  # in model files of imported checkpoints
    most_a = 240  # of midpoint-a, after slot 16

    @staticmethod
    def layout(m):
        """The model file's tensors in order, as (name, shape) in the checkpoint; those of the blocks are stacked over the layers."""
        C = m.C
        stacked = [("ln_1.weight", (C,)), ("ln_1.bias", (C,)), ("attn.c_attn.weight", (C, 3*C)), ("attn.c_attn.bias", (3*C,)),
                   ("attn.c_proj.weight", (C, C)), ("attn.c_proj.bias", (C,)), ("ln_2.weight", (C,)), ("ln_2.bias", (C,)),
                   ("mlp.c_fc.weight", (C, 4*C)), ("mlp.c_fc.bias", (4*C,)), ("mlp.c_proj.weight", (4*C, C)), ("mlp.c_proj.bias", (C,))]
        return [("wte.weight", (m.V, C)), ("wpe.weight", (m.maxT, C)),
                *((f"h.{l}.{name}", shape) for name, shape in stacked for l in range(m.L)),
                ("ln_f.weight", (C,)), ("ln_f.bias", (C,))]

    @staticmethod
    def transposed(name, shape):
        """Matrices of the blocks are (in, out) in checkpoints, where they are called Conv1D, and (out, in) in model files."""
        return name.startswith("h.") and len(shape) == 2

    @staticmethod
    def constants(m):
        """What checkpoints may hold besides: masks, in the hub's files."""
        return {f"h.{l}.attn.{name}" for l in range(m.L) for name in ("bias", "masked_bias")}

    @staticmethod
    def read_config(path, config):
        only(path, config, ("activation_function", "gelu_new", "gelu_new"), ("layer_norm_epsilon", 1e-5, 1e-5),
             ("scale_attn_weights", True, True), ("scale_attn_by_inverse_layer_idx", False, False), ("add_cross_attention", False, False),
             ("tie_word_embeddings", True, True))
        most, m = 1 << 16, SimpleNamespace(tied=True)
        m.maxT, m.V, m.L, m.NH, m.C = whole_numbers(path, config, {  # defaults are GPT2Config's
            "n_positions": (1024, 1 << 24), "vocab_size": (50257, 1 << 16), "n_layer": (12, most), "n_head": (12, most), "n_embd": (768, most)})
        if m.C % m.NH:
            die(f"{path}: n_embd {m.C} cannot be shared by n_head {m.NH}; a multiple is meant")
        if config.get("n_inner") not in (None, 4*m.C):
            die(f"{path}: n_inner is {json.dumps(config['n_inner'])}; only 4 n_embd = {4*m.C} can be imported")
        return m

    @staticmethod
    def read_fields(path, header, m):
        m.tied = True
        return m.C % m.NH == 0

    @staticmethod
    def write_fields(m):
        pass

    @staticmethod
    def config(m):
        config = {"vocab_size": m.V, "n_positions": m.maxT, "n_embd": m.C, "n_layer": m.L, "n_head": m.NH,
                  "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
        if m.mode == "baseline":  # the trainer drops nothing out
            config |= {"activation_function": "gelu_new", "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        return config

class Llama:
    number, title, prefix, embedding, code = 1, "Llama", "model.", "embed_tokens.weight", "modeling_rev_llama.py"
    model_types, ordinary, classes = ("llama", "rev_llama"), "LlamaForCausalLM", "RevLlama"
    keeps_bf16 = True
    most_a = 224  # before the block's own fields, from slot 240 on

    @staticmethod
    def layout(m):
        C, queries, keys = m.C, m.NH * m.HS, m.KH * m.HS
        stacked = [[("input_layernorm", (C,))],
                   [("self_attn.q_proj", (queries, C)), ("self_attn.k_proj", (keys, C)), ("self_attn.v_proj", (keys, C))],
                   [("self_attn.o_proj", (C, queries))], [("post_attention_layernorm", (C,))],
                   [("mlp.gate_proj", (m.F, C)), ("mlp.up_proj", (m.F, C))], [("mlp.down_proj", (C, m.F))]]
        return [("embed_tokens.weight", (m.V, C)),
                *((f"layers.{l}.{name}.weight", shape) for one in stacked for l in range(m.L) for name, shape in one),
                ("norm.weight", (C,)), *([] if m.tied else [("lm_head.weight", (m.V, C))])]

    @staticmethod
    def transposed(name, shape):
        return False

    @staticmethod
    def constants(m):
        return {f"layers.{l}.self_attn.rotary_emb.inv_freq" for l in range(m.L)}  # in older files

    @staticmethod
    def read_config(path, config):
        only(path, config, ("hidden_act", "silu", "silu"), ("attention_bias", False, False), ("mlp_bias", False, False),
             ("sliding_window", None, None), ("quantization_config", None, None), ("num_local_experts", None, None))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default":
            die(f"{path}: a rotary scaling {json.dumps(kind)}; only \"default\", which is none, can be imported")
        only(path, config | rope, ("partial_rotary_factor", 1, 1))
        most, m = 1 << 16, SimpleNamespace()
        layers = "n_layer" if config["model_type"] == "rev_llama" else "num_hidden_layers"
        m.maxT, m.V, m.L, m.NH, m.C, m.F = whole_numbers(path, config, {  # defaults are LlamaConfig's
            "max_position_embeddings": (2048, 1 << 24), "vocab_size": (32000, 1 << 16), layers: (32, most),
            "num_attention_heads": (32, most), "hidden_size": (4096, most), "intermediate_size": (11008, 1 << 20)})
        given = {key: value for key, value in config.items() if value is not None}
        m.KH, m.HS = whole_numbers(path, given, {"num_key_value_heads": (m.NH, most), "head_dim": (m.C // m.NH, most)})
        if m.NH % m.KH or m.HS % 2 or (m.C % m.NH and "head_dim" not in given):
            die(f"{path}: no Llama has {m.C} channels, {m.NH} heads of {m.HS} and {m.KH} of keys; whole numbers of queries to a key, and "
                "even heads, are meant")
        shared_channels(path, m)
        m.base, m.eps = rope.get("rope_theta", config.get("rope_theta", 10000.0)), config.get("rms_norm_eps", 1e-6)
        if not all(type(x) in (int, float) and 0 < x < 1e30 for x in (m.base, m.eps)):
            die(f"{path}: rope_theta and rms_norm_eps are {json.dumps([m.base, m.eps])}; positive numbers are meant")
        m.tied = config.get("tie_word_embeddings", False)
        if type(m.tied) is not bool:
            die(f"{path}: tie_word_embeddings is {json.dumps(m.tied)}; true or false is meant")
        return m

    @staticmethod
    def read_fields(path, header, m):
        m.KH, m.F, tied, m.HS = int(header[240]), int(header[241]), int(header[244]), int(header[245])
        m.tied, m.base, m.eps = bool(tied), float_of(header[242:243]), float_of(header[243:244])
        fine = 1 <= m.KH <= m.NH and m.NH % m.KH == 0 and 1 <= m.F <= 1 << 20 and 2 <= m.HS <= 1 << 16 and m.HS % 2 == 0 and tied in (0, 1)
        if not fine or not (0 < m.base < 1e30 and 0 < m.eps < 1e30):
            die(f"{path}: no Llama has {m.NH} heads of {m.HS}, {m.KH} of keys, feed-forward {m.F}, rotary base {m.base}, epsilon {m.eps}, "
                f"and {tied} for whether its head is tied")
        shared_channels(path, m)
        return True

    @staticmethod
    def write_fields(m):
        m.header[[240, 241, 244, 245]] = m.KH, m.F, m.tied, m.HS
        m.header[242:243], m.header[243:244] = float_bits(m.base), float_bits(m.eps)

    @staticmethod
    def config(m):
        config = {"vocab_size": m.V, "max_position_embeddings": m.maxT, "hidden_size": m.C, "num_attention_heads": m.NH,
                  "intermediate_size": m.F, "num_key_value_heads": m.KH, "head_dim": m.HS, "rms_norm_eps": m.eps, "rope_theta": m.base,
                  "tie_word_embeddings": m.tied}
        if m.mode != "baseline":
            return config | {"n_layer": m.L}
        return config | {"num_hidden_layers": m.L, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}

BLOCKS = [GPT2, Llama]  # slot 14 of the header counts these

# ----------------------------------------------------------------------------------------------------------------
# config.json

def read_config(path):
    """The network in a checkpoint's config.json, which must be one that the trainer has."""
    config = read_json(path)
    kind = config.get("model_type")
    block = next((block for block in BLOCKS if kind in block.model_types), None)
    if not block:
        known = ", ".join(json.dumps(name) for block in BLOCKS for name in block.model_types)
        die(f"{path}: model_type is {json.dumps(kind)}; only {known} can be imported")
    m, reversible = block.read_config(path, config), kind == block.model_types[1]
    m.block, m.mode = block, "baseline"
    make_header(m)
    if reversible:
        read_reversible(path, m, config)
    return m

def make_header(m):
    """Of a baseline: a reversible network's has more."""
    m.Vp = (m.V + 127) // 128 * 128
    m.header = np.zeros(256, "<i4")
    m.header[:8] = MODEL_MAGIC, 1003 if m.block.number else 3, m.maxT, m.V, m.L, m.NH, m.C, m.Vp
    m.header[14] = m.block.number
    m.block.write_fields(m)

def read_reversible(path, m, config):
    """The rest of the header, of what an exported model's config.json says."""
    mode, h, a = config.get("mode"), config.get("step_size"), config.get("coefficients")
    if mode not in MODES[1:]:
        die(f"{path}: mode is {json.dumps(mode)}; one of {', '.join(MODES[1:])} is meant")
    number = MODES.index(mode)
    K, stem, grid = (config.get(*x) for x in [("fixed_point", 0), ("stem", 0), ("grid", GRIDS[number])])
    if not all(type(n) is int and 0 <= n < 1 << 16 for n in (K, stem, grid)) or grid > 30:
        die(f"{path}: fixed_point, stem and grid are {json.dumps([K, stem, grid])}; whole numbers are meant, grid at most 30")
    if not isinstance(a, list) or not all(type(x) in (int, float) and abs(x) <= 16 for x in [*a, h]):
        die(f"{path}: step_size and coefficients are {json.dumps([h, a])}; a number and a list of numbers are meant")
    denominator = 16 if mode == "midpoint-a" else max([16, *(float(x).as_integer_ratio()[1] for x in a)])
    wanted = {"midpoint-a": m.L, "retrofit": 1, "bdia": 1}.get(mode, 0)
    if len(a) != wanted or wanted > m.block.most_a or denominator > 256 or any(x * denominator % 1 for x in a):
        die(f"{path}: coefficients {json.dumps(a)}; {mode} of {m.L} layers has {wanted}, multiples of 1/{min(denominator, 256)}")
    if mode in ("retrofit", "bdia"):  # an odd numerator, as the trainer writes it; 0 stands for sixteenths
        denominator = float(a[0]).as_integer_ratio()[1]
        m.header[13] = denominator.bit_length() - 1
    m.header[1], m.header[8], m.header[9:10], m.header[10:13] = 1003, number, float_bits(h), (grid, K, stem)
    ordinary = config.get("ordinary") or []
    if not isinstance(ordinary, list) or not all(type(k) is int and 0 <= k < MOST_ORDINARY for k in ordinary):
        die(f"{path}: ordinary is {json.dumps(ordinary)}; a list of steps from 0 to {MOST_ORDINARY - 1} is meant")
    if (ordinary or stem) and mode not in ("retrofit", "bdia") or (ordinary and stem):
        die(f"{path}: a stem of {stem} and ordinary steps {ordinary}; one of them is meant, and a retrofit or bdia network")
    if ordinary:
        set_ordinary(m.header, ordinary)
    m.header[16:16 + wanted] = [int(x * (16 if denominator == 1 else denominator)) for x in a]
    read_recurrence(path, m, m.header, mode)

# ----------------------------------------------------------------------------------------------------------------
# A model file's header

def set_ordinary(header, steps):
    """Those of a conversion: slot 12 counts them if they are just the first ones, or else is -1 and slots 17 to 24 have a bit for each."""
    steps = sorted(set(steps))
    header[12] = len(steps)
    if steps != list(range(len(steps))):
        header[12] = -1
        header[17:25] = np.packbits([k in steps for k in range(MOST_ORDINARY)], bitorder="little").view("<i4")

def ordinary_of(path, header, m):
    stem, bits = int(header[12]), np.unpackbits(header[17:25].view("u1"), bitorder="little")
    if not -1 <= stem <= min(m.L, MOST_ORDINARY):
        die(f"{path}: no {m.mode} of {m.L} layers has a stem of {stem}")
    steps = list(range(stem)) if stem >= 0 else np.flatnonzero(bits).tolist()
    if (m.mode == "retrofit" and 0 not in steps) or (steps and steps[-1] >= m.L):
        die(f"{path}: no {m.mode} of {m.L} layers has the ordinary steps {steps}")
    return steps

def read_header(path):
    if not path.is_file():
        die(f"{path}: no such file")
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MODEL_MAGIC:
        die(f"{path}: not a model file (256 int32, the first {MODEL_MAGIC})")
    version, maxT, V, L, NH, C, Vp, mode = map(int, header[1:9])
    if version not in (3, 5, 1003, 1005):
        die(f"{path}: version {version}; 3, 5, 1003 and 1005 can be read")
    if version < 1000:  # llm.c's: of what follows it may say anything
        header[8:] = 0
    number = int(header[14])
    if not 0 <= number < len(BLOCKS):
        die(f"{path}: block {number}; {', '.join(f'{block.number} is {block.title}' for block in BLOCKS)}")
    m = SimpleNamespace(maxT=maxT, V=V, L=L, NH=NH, C=C, Vp=Vp, block=BLOCKS[number], dtype="BF16" if version % 1000 == 5 else "F32")
    possible = min(maxT, V, L, NH, C) >= 1 and V <= 65536 and V <= Vp <= 1 << 20 and max(C, L, NH) <= 1 << 16 and maxT <= 1 << 24
    if not possible or not m.block.read_fields(path, header, m):
        die(f"{path}: no network has context {maxT}, vocabulary {V} padded to {Vp}, {L} layers, {NH} heads, {C} channels")
    least = 1 if version > 1000 and m.block is GPT2 else 0  # other blocks' files are never of llm.c's versions
    if version > 1000 and not least <= mode < len(MODES):
        die(f"{path}: mode {mode}; {least} to {len(MODES) - 1} are known, {', '.join(MODES[least:])}")
    read_recurrence(path, m, header, MODES[header[8]])
    count = sum(prod(shape) for _, shape in m.block.layout(m)) + (2 - m.tied) * (Vp - V) * C
    size, meant = path.stat().st_size, 1024 + count * (2 if m.dtype == "BF16" else 4)
    if size != meant:
        die(f"{path}: {size} bytes, but what its header describes takes {meant}")
    return m

def read_recurrence(path, m, header, mode):
    """What a reversible network is besides its weights."""
    m.mode, m.h, m.grid, m.K, m.ordinary_steps, m.a = mode, float(header[9:10].view("<f4")[0]), int(header[10]), 0, [], []
    if not 0 <= m.h <= 16:
        die(f"{path}: a step size of {m.h:g}; 0 to 16 is meant")
    if mode == "midpoint-a":
        m.a = [int(n) / 16 for n in header[16:16 + m.L]]
        if m.L > m.block.most_a or header[13] or not all(0 < abs(a) < 16 for a in m.a):
            die(f"{path}: its a_k are not those of a midpoint-a of {m.L} layers")
    if mode in ("retrofit", "bdia"):
        m.K, m.ordinary_steps, shift = int(header[11]), ordinary_of(path, header, m), int(header[13]) or 4
        m.a = [int(header[16]) / 2**shift] if 1 <= shift <= 8 else [0]
        if not 0 < abs(m.a[0]) <= 1 or (mode == "bdia" and m.a[0] == -1) or not 0 <= m.K <= 16 * (mode == "retrofit"):
            die(f"{path}: no {mode} has coefficient {header[16]} / 2^{shift}, {m.K} iterations")
