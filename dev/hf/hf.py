#!/usr/bin/env python3
"""
Model files to and from Hugging Face's transformers.

    python3 dev/hf/hf.py import HF_FOLDER model.bin      a GPT-2 checkpoint: config.json with model.safetensors, or its shards;
                                                      or what was exported and trained there, in its own mode
    python3 dev/hf/hf.py export model.bin FOLDER         for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Imported is float32. An ordinary network trains as it is, or converted with --mode retrofit or bdia. Exported, a baseline is
GPT2LMHeadModel and needs no trust_remote_code; every other mode brings its code, modeling_rev_gpt2.py and modeling_rev.py, along, which works with
transformers 4.48 and newer. retrofit and bdia have the weights of an ordinary GPT-2: --as-baseline exports them as one. A
tokenizer goes along where it is known: that of bytes (V = 256), GPT-2's (by tiktoken, from its cache or the network), or
what --tokenizer gives. A vocabulary of up to 50304 is GPT-2's 50257 tokens and some more, an added one or padding.

Nothing is overwritten but with --force, and nothing is left half-written. Exit status: 0 done, 1 data and files, 2 usage.
Shapes: V the vocabulary, Vp its padded size in model files, C channels, L layers, NH heads, maxT the context.
"""
import argparse, json, os, shutil, signal, sys
from math import prod
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from safetensors import SafetensorError

from storage import (checkpoint_files, checkpoint_tensors, die, finite, float32, read_json, warn, write_safetensors,
                     written_aside)
from vocabularies import ENDOFTEXT, describe_vocabulary, given_tokenizer, gpt2_vocabulary, known_tokenizer

MODES = ["baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia"]  # slot 8 of the header counts these
GRIDS = [0, 20, 23, 20, 20, 18, 18]  # the trainer's, for the integer streams of each mode
MODEL_MAGIC = 20240326
MODEL_CODE = [Path(__file__).resolve().with_name(name) for name in ("modeling_rev.py", "modeling_rev_gpt2.py")]

# ----------------------------------------------------------------------------------------------------------------
# Tensors

def layout(m):
    """The model file's tensors in order, as (name, shape) in the checkpoint; those of the blocks are stacked over the layers."""
    C = m.C
    stacked = [("ln_1.weight", (C,)), ("ln_1.bias", (C,)), ("attn.c_attn.weight", (C, 3*C)), ("attn.c_attn.bias", (3*C,)),
               ("attn.c_proj.weight", (C, C)), ("attn.c_proj.bias", (C,)), ("ln_2.weight", (C,)), ("ln_2.bias", (C,)),
               ("mlp.c_fc.weight", (C, 4*C)), ("mlp.c_fc.bias", (4*C,)), ("mlp.c_proj.weight", (4*C, C)), ("mlp.c_proj.bias", (C,))]
    return [("wte.weight", (m.V, C)), ("wpe.weight", (m.maxT, C)),
            *((f"h.{l}.{name}", shape) for name, shape in stacked for l in range(m.L)),
            ("ln_f.weight", (C,)), ("ln_f.bias", (C,))]

def transposed(name, shape):
    """Matrices of the blocks are (in, out) in checkpoints, where they are called Conv1D, and (out, in) in model files."""
    return name.startswith("h.") and len(shape) == 2

# ----------------------------------------------------------------------------------------------------------------
# import

def read_config(path):
    """The network in a checkpoint's config.json, which must be one that the trainer has."""
    config = read_json(path)
    reversible = config.get("model_type") == "rev_gpt2"
    for key, default, meant in [("model_type", None, "rev_gpt2" if reversible else "gpt2"), ("activation_function", "gelu_new", "gelu_new"),
                                ("layer_norm_epsilon", 1e-5, 1e-5), ("scale_attn_weights", True, True),
                                ("scale_attn_by_inverse_layer_idx", False, False), ("add_cross_attention", False, False),
                                ("tie_word_embeddings", True, True)]:
        if config.get(key, default) != meant:
            die(f"{path}: {key} is {json.dumps(config.get(key))}; only {json.dumps(meant)} can be imported")
    sizes = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}  # GPT2Config's
    most = {"n_positions": 1 << 24, "vocab_size": 1 << 16}
    for key, default in sizes.items():
        value = sizes[key] = config.get(key, default)
        if type(value) is not int or not 1 <= value <= most.get(key, 1 << 16):
            die(f"{path}: {key} is {json.dumps(value)}; a whole number from 1 to {most.get(key, 1 << 16)} is meant")
    maxT, V, L, NH, C = sizes.values()
    if C % NH:
        die(f"{path}: n_embd {C} cannot be shared by n_head {NH}; a multiple is meant")
    if config.get("n_inner") not in (None, 4*C):
        die(f"{path}: n_inner is {json.dumps(config['n_inner'])}; only 4 n_embd = {4*C} can be imported")
    m = SimpleNamespace(maxT=maxT, V=V, L=L, NH=NH, C=C, Vp=(V + 127) // 128 * 128, mode="baseline")
    m.header = np.zeros(256, "<i4")
    m.header[:8] = MODEL_MAGIC, 1003 if reversible else 3, m.maxT, m.V, m.L, m.NH, m.C, m.Vp
    if reversible:
        read_reversible(path, m, config)
    return m

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
    if len(a) != wanted or wanted > 240 or denominator > 256 or any(x * denominator % 1 for x in a):
        die(f"{path}: coefficients {json.dumps(a)}; {mode} of {m.L} layers has {wanted}, multiples of 1/{min(denominator, 256)}")
    if mode in ("retrofit", "bdia"):  # an odd numerator, as the trainer writes it; 0 stands for sixteenths
        denominator = float(a[0]).as_integer_ratio()[1]
        m.header[13] = denominator.bit_length() - 1
    m.header[8], m.header[9:10], m.header[10:13] = number, np.array([h], "<f4").view("<i4"), (grid, K, stem)
    m.header[16:16 + wanted] = [int(x * (16 if denominator == 1 else denominator)) for x in a]
    read_recurrence(path, m, m.header, mode)

def check_names(m, tensors, folder):
    unmerged = [name for name in tensors if any(part in name for part in (".lora_", ".base_layer.", "modules_to_save"))]
    if unmerged:
        die(f"{folder}: {min(unmerged)!r} is of an adapter that is not merged; save what peft's merge_and_unload() returns")
    wanted = dict(layout(m))
    masks = {f"h.{l}.attn.{name}" for l in range(m.L) for name in ("bias", "masked_bias")}  # constants in the hub's files
    if "lm_head.weight" in tensors:
        wanted["lm_head.weight"] = wanted["wte.weight"]
    for problem, names in [("lacks", wanted.keys() - tensors), ("has, beyond a GPT-2 of this config.json,", tensors.keys() - wanted.keys() - masks)]:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            die(f"{folder}: the checkpoint {problem} {min(names)!r}{more}")
    for name, shape in wanted.items():
        t = tensors[name]
        if t.shape != shape:
            die(f"{t.path}: {name} is {t.shape}; by config.json it is {shape}")
        if t.dtype not in ("F32", "F16", "BF16"):
            die(f"{t.path}: {name} is {t.dtype}; F32, F16 or BF16 can be imported")

def read_tensor(tensors, name):
    t = tensors[name]
    return finite(float32(t.read(t)), f"{t.path}: {name}")

def import_checkpoint(args):
    folder, target = Path(args.folder), Path(args.model)
    if target.is_dir() or (target.exists() and not args.force):
        die(f"{target}: exists already{'' if target.is_dir() else '; --force overwrites it'}")
    if (folder / "adapter_config.json").is_file():
        die(f"{folder}: an adapter, not a model; peft merges it: AutoPeftModelForCausalLM.from_pretrained(FOLDER, "
            "trust_remote_code=True).merge_and_unload().save_pretrained(MERGED)")
    m = read_config(folder / "config.json")
    tensors = checkpoint_tensors(checkpoint_files(folder), "transformer.")
    check_names(m, tensors, folder)
    if "lm_head.weight" in tensors and not np.array_equal(read_tensor(tensors, "lm_head.weight"), read_tensor(tensors, "wte.weight")):
        die(f"{folder}: lm_head.weight differs from wte.weight; only tied embeddings can be imported")
    with written_aside(target) as aside:
        with open(aside, "wb") as out:
            out.write(m.header.tobytes())
            for name, shape in layout(m):
                x = read_tensor(tensors, name)
                out.write(np.ascontiguousarray(x.T if transposed(name, shape) else x))
                if name == "wte.weight":
                    out.write(bytes(4 * (m.Vp - m.V) * m.C))
    m.vocabulary = describe_vocabulary(folder, m.V)
    return m

# ----------------------------------------------------------------------------------------------------------------
# export

def read_header(path):
    if not path.is_file():
        die(f"{path}: no such file")
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != MODEL_MAGIC:
        die(f"{path}: not a model file (256 int32, the first {MODEL_MAGIC})")
    version, maxT, V, L, NH, C, Vp, mode = map(int, header[1:9])
    if version not in (3, 5, 1003, 1005):
        die(f"{path}: version {version}; 3, 5, 1003 and 1005 can be read")
    if min(maxT, V, L, NH, C) < 1 or V > 65536 or not V <= Vp <= 1 << 20 or max(C, L) > 1 << 16 or maxT > 1 << 24 or C % NH:
        die(f"{path}: no network has context {maxT}, vocabulary {V} padded to {Vp}, {L} layers, {NH} heads, {C} channels")
    m = SimpleNamespace(maxT=maxT, V=V, L=L, NH=NH, C=C, Vp=Vp, mode="baseline", dtype="BF16" if version % 1000 == 5 else "F32")
    if version > 1000:
        if not 1 <= mode < len(MODES):
            die(f"{path}: mode {mode}; 1 to {len(MODES) - 1} are known, {', '.join(MODES[1:])}")
        read_recurrence(path, m, header, MODES[mode])
    count = sum(prod(shape) for _, shape in layout(m)) + (Vp - V) * C
    size, meant = path.stat().st_size, 1024 + count * (2 if m.dtype == "BF16" else 4)
    if size != meant:
        die(f"{path}: {size} bytes, but what its header describes takes {meant}")
    return m

def read_recurrence(path, m, header, mode):
    """What a reversible network is besides its weights."""
    m.mode, m.h, m.grid, m.K, m.stem, m.a = mode, float(header[9:10].view("<f4")[0]), int(header[10]), 0, 0, []
    if not 0 <= m.h <= 16:
        die(f"{path}: a step size of {m.h:g}; 0 to 16 is meant")
    if mode == "midpoint-a":
        m.a = [int(n) / 16 for n in header[16:16 + m.L]]
        if m.L > 240 or header[13] or not all(0 < abs(a) < 16 for a in m.a):
            die(f"{path}: its a_k are not those of a midpoint-a of {m.L} layers")
    if mode in ("retrofit", "bdia"):
        m.K, m.stem, shift = int(header[11]), int(header[12]), int(header[13]) or 4
        m.a = [int(header[16]) / 2**shift] if 1 <= shift <= 8 else [0]
        if not 0 < abs(m.a[0]) <= 1 or (mode == "bdia" and m.a[0] == -1) or not 0 <= m.K <= 16 * (mode == "retrofit") or not (mode == "retrofit") <= m.stem <= m.L:
            die(f"{path}: no {mode} has coefficient {header[16]} / 2^{shift}, {m.K} iterations, a stem of {m.stem}")

def write_config(m, folder, tokenizer):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": m.V, "n_positions": m.maxT, "n_embd": m.C,
              "n_layer": m.L, "n_head": m.NH, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "dtype": "bfloat16" if m.dtype == "BF16" else "float32"}
    if tokenizer:  # AutoTokenizer knows it by model_type, but only GPT-2's
        config["tokenizer_class"] = "GPT2Tokenizer"
    if m.mode == "baseline":  # the trainer drops nothing out
        config |= {"activation_function": "gelu_new", "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "LMHeadModel"}
        config |= {"model_type": "rev_gpt2", "architectures": ["RevGPT2LMHeadModel"], "mode": m.mode, "step_size": m.h,
                   "coefficients": m.a, "fixed_point": m.K, "stem": m.stem, "grid": m.grid, "transformers_needed": ">=4.48",
                   "auto_map": {auto: f"modeling_rev_gpt2.RevGPT2{name}" for auto, name in classes.items()}}
        for path in MODEL_CODE:
            shutil.copyfile(path, folder / path.name)
    end = ENDOFTEXT if gpt2_vocabulary(m.V) else None  # other vocabularies have no such token that is known here
    special = {"bos_token_id": end, "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config | special, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special if end else {}, indent=2) + "\n")

def read_tensors(path, m):
    """The numbers of a model file, one tensor at a time, as a checkpoint has them."""
    with open(path, "rb") as file:
        file.seek(1024)
        for name, shape in layout(m):
            x = np.fromfile(file, "<u2" if m.dtype == "BF16" else "<f4", prod(shape))
            finite(x, f"{path}: {name}")
            yield x.reshape(shape[::-1]).T if transposed(name, shape) else x.reshape(shape)
            if name == "wte.weight":
                file.seek((m.Vp - m.V) * m.C * x.itemsize, os.SEEK_CUR)

def export_model(args):
    path, folder = Path(args.model), Path(args.folder)
    if folder.exists():
        die(f"{folder}: exists already; another folder is meant")
    m = read_header(path)
    if args.as_baseline and m.mode not in ("baseline", "retrofit", "bdia"):
        die(f"--as-baseline: {path} is of a {m.mode} network; retrofit and bdia have the weights of an ordinary one", 2)
    m.mode = "baseline" if args.as_baseline else m.mode
    tokenizer, problem = (given_tokenizer(Path(args.tokenizer), m.V), None) if args.tokenizer else known_tokenizer(m)
    with written_aside(folder) as aside:
        aside.mkdir()
        write_config(m, aside, args.tokenizer)
        shapes = {"transformer." + name: shape for name, shape in layout(m)}
        write_safetensors(aside / "model.safetensors", shapes, m.dtype, read_tensors(path, m))
        for name, content in tokenizer.items():
            (aside / name).write_bytes(content)
    if problem:
        warn(f"exported without a tokenizer, and transformers makes up an empty one: {problem}; --tokenizer FOLDER gives one")
    m.vocabulary = ""
    return m

# ----------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    i = commands.add_parser("import", help="a Hugging Face GPT-2 checkpoint to a model file")
    i.add_argument("folder", metavar="HF_FOLDER")
    i.add_argument("model", metavar="model.bin")
    i.add_argument("--force", action="store_true", help="overwrite model.bin")
    e = commands.add_parser("export", help="a model file to a folder that transformers loads")
    e.add_argument("model", metavar="model.bin")
    e.add_argument("folder", metavar="FOLDER")
    e.add_argument("--as-baseline", action="store_true", help="the weights of retrofit or bdia as an ordinary GPT-2")
    e.add_argument("--tokenizer", metavar="FOLDER", help="copy a tokenizer's files from here; without it, what is known")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was written aside is removed
    work, target = (import_checkpoint, args.model) if args.command == "import" else (export_model, args.folder)
    try:
        m = work(args)
    except OSError as e:
        die(f"{e.filename or target}: {e.strerror or e}")
    except SafetensorError as e:
        die(f"{target}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{target}: {m.mode}, L {m.L}, C {m.C}, NH {m.NH}, V {m.V}, context {m.maxT}{m.vocabulary}")

if __name__ == "__main__":
    main()
