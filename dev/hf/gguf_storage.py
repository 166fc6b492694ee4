"""
GGUF files for hf.py, by the package gguf: llama.cpp's names and its order of rows, for Llama's block alone.

Of each head llama.cpp has the elements that rotary embeddings turn together side by side in q and k, where checkpoints and
model files have them half a head apart.
"""
import functools, tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np

from blocks import Llama, make_header, shared_channels
from storage import bf16, die, float32, warn, written_aside

try:
    import gguf
except ImportError as e:
    die(f"GGUF files need the package gguf ({e}): pip install gguf")

OF_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj"}
OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
TO_LAYER, TO_OTHERS = {b: a for a, b in OF_LAYER.items()}, {b: a for a, b in OTHERS.items()}

def checkpoint_name(name):
    stem, _, kind = name.rpartition(".")
    layer, _, part = stem.removeprefix("blk.").partition(".")
    if kind == "weight" and stem.startswith("blk.") and part in OF_LAYER:
        return f"layers.{layer}.{OF_LAYER[part]}.weight"
    return f"{OTHERS[stem]}.weight" if kind == "weight" and stem in OTHERS else name

def gguf_name(name):
    stem = name.removesuffix(".weight")
    if stem in TO_OTHERS:
        return f"{TO_OTHERS[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{TO_LAYER[part]}.weight"

def heads_turned(m, name):
    """How many heads there are of which llama.cpp has the rows in another order, 0 in other tensors."""
    return m.NH * name.endswith("q_proj.weight") + m.KH * name.endswith("k_proj.weight")

def reordered(x, heads, back):
    if not heads:
        return x
    half = x.shape[0] // heads // 2
    pairs = (heads, half, 2) if back else (heads, 2, half)
    return x.reshape(*pairs, x.shape[1]).swapaxes(1, 2).reshape(x.shape)

# ----------------------------------------------------------------------------------------------------------------

def open_gguf(path):
    """Its reader, and a function from a key to what the file says."""
    if not path.is_file():
        die(f"{path}: no such file; one of llama.cpp's is meant")
    try:
        reader = gguf.GGUFReader(path)
    except (MemoryError, OSError):
        raise
    except Exception as e:  # of all sorts, where a file is none or is cut short
        why = " ".join(str(e).split())
        if "GGMLQuantizationType" in why:
            die(f"{path}: holds a tensor of a type that the package gguf does not know ({why}): llama.cpp has given that up, or it is newer than "
                "the package; another quantization of the model is meant")
        die(f"{path}: no whole GGUF file: {why}")
    return reader, lambda key: reader.fields[key].contents() if key in reader.fields else None

@functools.cache
def known_quantization(kind):
    """Can the package make numbers of this type? Of some it knows the size alone."""
    try:
        gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        return True
    except NotImplementedError:
        return False

def read_fields(path, field):
    name = field("general.architecture")
    if name != "llama":
        die(f"{path}: its architecture is {name!r}; only 'llama' can be imported")
    if (field("split.count") or 1) > 1:
        die(f"{path}: one of {field('split.count')} parts; llama.cpp's gguf-split --merge makes one file of them")
    for key in ("expert_count", "attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"):
        value = field(f"llama.{key}")
        if value not in (None, 0, 1.0, "none"):
            die(f"{path}: llama.{key} is {value!r}; a network with such a thing cannot be imported")

def read_gguf(path):
    """The network, and its tensors by a checkpoint's names."""
    reader, field = open_gguf(path)
    read_fields(path, field)
    m = SimpleNamespace(block=Llama, mode="baseline", tied=True)
    tensors = {}
    for t in reader.tensors:
        name, shape = checkpoint_name(t.name), tuple(map(int, reversed(t.shape)))
        if not known_quantization(t.tensor_type):
            die(f"{path}: {t.name} is {t.tensor_type.name}, of which the package gguf makes no numbers; another quantization of the model is meant")
        tensors[name] = SimpleNamespace(path=path, dtype=t.tensor_type.name, shape=shape, data=t, read=read_tensor)
    m.tied = "lm_head.weight" not in tensors
    embedding = tensors.get("embed_tokens.weight")
    sizes = {"context_length": "maxT", "block_count": "L", "attention.head_count": "NH", "embedding_length": "C", "feed_forward_length": "F"}
    for key, attribute in sizes.items():
        setattr(m, attribute, field(f"llama.{key}"))
    m.V = embedding.shape[0] if embedding else field("llama.vocab_size")
    m.KH = field("llama.attention.head_count_kv") or m.NH
    numbers = [m.maxT, m.V, m.L, m.NH, m.C, m.F, m.KH]
    if not all(type(n) is int and 1 <= n <= 1 << 24 for n in numbers) or m.C % m.NH or m.NH % m.KH or m.V > 65536:
        die(f"{path}: no Llama for 16-bit tokens has context {m.maxT}, vocabulary {m.V}, {m.L} layers, {m.NH} heads, {m.KH} of keys, "
            f"{m.C} channels, feed-forward {m.F}")
    m.HS = field("llama.attention.key_length") or m.C // m.NH
    for key in ("rope.dimension_count", "attention.value_length"):
        if field(f"llama.{key}") not in (None, m.HS):
            die(f"{path}: llama.{key} is {field(f'llama.{key}')}; the size of a head, {m.HS}, can be imported")
    shared_channels(path, m)
    m.base, m.eps = (float(str(np.float32(x))) for x in (field("llama.rope.freq_base") or 1e4, field("llama.attention.layer_norm_rms_epsilon") or 1e-5))
    make_header(m)
    for name, t in tensors.items():
        t.heads = heads_turned(m, name)
    return m, tensors

def read_tensor(t):
    """float32, whatever it is quantized to; or bf16."""
    x = t.data.data.view("<u2") if t.dtype == "BF16" else gguf.dequantize(t.data.data, t.data.tensor_type)
    x = reordered(x.reshape(t.shape), t.heads, True)
    return x if t.dtype == "BF16" else float32(x)

# ----------------------------------------------------------------------------------------------------------------

def write_gguf(path, m, tokenizer, numbers):
    """The numbers come one tensor at a time, in the order of layout(m); vectors are float32 in all such files."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    for key, value in [("context_length", m.maxT), ("embedding_length", m.C), ("block_count", m.L), ("feed_forward_length", m.F),
                       ("attention.head_count", m.NH), ("attention.head_count_kv", m.KH), ("attention.key_length", m.HS),
                       ("attention.value_length", m.HS), ("rope.dimension_count", m.HS), ("vocab_size", m.V)]:
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", m.base)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", m.eps)
    kinds = gguf.GGMLQuantizationType
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if m.dtype == "BF16" else gguf.LlamaFileType.ALL_F32)
    for field in tokenizer:
        kind, *of = field.types
        writer.add_key_value(field.name, field.contents(), kind, of[0] if of else None)
    as_bf16 = lambda shape: m.dtype == "BF16" and len(shape) == 2
    for name, shape in m.block.layout(m):
        if as_bf16(shape):
            writer.add_tensor_info(gguf_name(name), [shape[0], 2 * shape[1]], np.dtype(np.uint8), 2 * shape[0] * shape[1], raw_dtype=kinds.BF16)
        else:
            writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), int(4 * np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, shape), x in zip(m.block.layout(m), numbers, strict=True):
        x = np.ascontiguousarray(reordered(x, heads_turned(m, name), False))
        writer.write_tensor_data(bf16(x).view(np.uint8) if as_bf16(shape) else float32(x))
    writer.close()

def tokenizer_fields(path, V):
    """Those of another GGUF file, of whose tokens there must be V."""
    reader, field = open_gguf(path)
    tokens = field("tokenizer.ggml.tokens")
    if not tokens:
        die(f"{path}: no tokenizer in this file")
    if len(tokens) != V:
        die(f"{path}: a tokenizer of {len(tokens)} tokens, but the model has {V}")
    return [field for key, field in reader.fields.items() if key.startswith("tokenizer.")]

def write_tokenizer(path, folder):
    """A folder with the tokenizer of a GGUF file, as transformers makes it but for what the file says of how a text is cut into
    pieces, of which tokens are made: that transformers does not know of all models, and then cuts as for GPT-2's."""
    import tokenizers.pre_tokenizers as cut
    import transformers
    _, field = open_gguf(path)
    kind, pre = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if not field("tokenizer.ggml.tokens"):
        die(f"{path}: no tokenizer in this file")
    try:
        with tempfile.TemporaryDirectory() as alone:  # what lies beside the file would win over what is in it
            (Path(alone) / path.name).symlink_to(path.resolve())
            tokenizer = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    except MemoryError:
        raise
    except Exception as e:  # of all sorts
        die(f"{path}: transformers makes no tokenizer of it ({type(e).__name__}: {' '.join(str(e).split())[:300]})")
    if kind == "gpt2" and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, cut.ByteLevel):  # as for GPT-2's
        if pre == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
        elif pre != "gpt-2":
            warn(f"{path}: cut into pieces as for GPT-2's tokens, where tokenizer.ggml.pre is {pre!r}, a text may have other tokens than the model "
                 "knows it by; better take tokenizer.json from the original model's repository")
    with written_aside(folder) as aside:
        tokenizer.save_pretrained(aside)
    print(f"{folder}: {kind}, {pre or 'nothing'} said of how a text is cut, {len(tokenizer)} tokens")
