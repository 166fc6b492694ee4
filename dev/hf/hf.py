#!/usr/bin/env python3
"""
Model files to and from Hugging Face's transformers, and Llama's to and from GGUF.

    python3 dev/hf/hf.py import HF_FOLDER model.bin      a checkpoint of GPT-2 or Llama: config.json with model.safetensors, or its
                                                      shards; or what was exported and trained there, in its own mode
    python3 dev/hf/hf.py import FILE.gguf model.bin      a Llama of llama.cpp's; what is quantized becomes float32
    python3 dev/hf/hf.py export model.bin FOLDER         for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    python3 dev/hf/hf.py export model.bin FILE.gguf      a baseline with Llama's block, for llama.cpp

Imported is float32, or bf16 where every tensor of a Llama is. An ordinary network trains as it is, or converted with --mode
retrofit or bdia. Exported, a baseline is GPT2LMHeadModel or LlamaForCausalLM and needs no trust_remote_code; every other mode
brings its code along, modeling_rev.py and the block's, which works with transformers 4.48 and newer. retrofit and bdia have the
weights of an ordinary network: --as-baseline exports them as one. A tokenizer goes along where it is known: that of bytes
(V = 256), GPT-2's (by tiktoken, from its cache or the network), or what --tokenizer gives, with the numbers of the tokens that
begin and end a text. A vocabulary of 50257 to 50304 is taken for GPT-2's 50257 tokens and some more, an added one or padding; where
a tokenizer beside a checkpoint has others, import says so; with Llama's block, which may have any, export warns.

What is refused, by its name: biases, scaled rotary embeddings, sliding windows, other activations, experts, other architectures,
and vocabularies beyond 65536. Nothing is overwritten but with --force, and nothing is left half-written; one tensor at a time is
in memory. Exit status: 0 done, 1 data and files, 2 usage, 3 out of memory, 130 Ctrl-C or SIGTERM.
"""
import argparse, errno, json, os, shutil, signal, sys
from math import prod
from pathlib import Path
try:
    import numpy as np
    from safetensors import SafetensorError
except ImportError as e:
    print(f"hf.py: it needs the packages numpy and safetensors ({e}): pip install numpy safetensors", file=sys.stderr)
    sys.exit(1)

from blocks import read_config, read_header
from storage import (bf16, checkpoint_files, checkpoint_tensors, die, finite, fits_bf16, float32, read_json, warn, write_safetensors,
                     written_aside)
from vocabularies import ENDOFTEXT, describe_vocabulary, given_tokenizer, gpt2_vocabulary, known_tokenizer

MODEL_CODE = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------
# import

def check_names(m, tensors, source):
    unmerged = [name for name in tensors if any(part in name for part in (".lora_", ".base_layer.", "modules_to_save"))]
    if unmerged:
        die(f"{source}: {min(unmerged)!r} is of an adapter that is not merged; save what peft's merge_and_unload() returns")
    wanted = dict(m.block.layout(m))
    if "lm_head.weight" in tensors:
        wanted["lm_head.weight"] = wanted[m.block.embedding]
    more = tensors.keys() - wanted.keys() - m.block.constants(m)
    for problem, names in [("lacks", wanted.keys() - tensors), (f"has, beyond a {m.block.title} of these sizes,", more)]:
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            die(f"{source}: the checkpoint {problem} {min(names)!r}{others}")
    for name, shape in wanted.items():
        t = tensors[name]
        if t.shape != shape:
            die(f"{t.path}: {name} is {t.shape}; by its sizes it is {shape}")
        if t.path.suffix != ".gguf" and t.dtype not in ("F32", "F16", "BF16"):
            die(f"{t.path}: {name} is {t.dtype}; F32, F16 or BF16 can be imported")
    if m.tied and "lm_head.weight" in tensors:
        a, b = (float32(tensors[name].read(tensors[name])) for name in ("lm_head.weight", m.block.embedding))
        if not np.array_equal(a, b):
            die(f"{source}: lm_head.weight differs from {m.block.embedding}; its embeddings are tied, and one of them can be imported")

def all_bf16(m, tensors):
    """Do all tensors fit? Vectors are float32 in some files of bf16."""
    parts = [tensors[name] for name, _ in m.block.layout(m)]
    vectors = [t for t in parts if len(t.shape) == 1 and t.dtype != "BF16"]
    return all(t.dtype == "BF16" or len(t.shape) == 1 for t in parts) and all(fits_bf16(t.read(t)) for t in vectors)

def open_checkpoint(source):
    """The network, and its tensors by name."""
    if source.suffix == ".gguf":
        from gguf_storage import read_gguf
        return read_gguf(source)
    if (source / "adapter_config.json").is_file():
        die(f"{source}: an adapter, not a model; peft merges it: AutoPeftModelForCausalLM.from_pretrained(FOLDER, "
            "trust_remote_code=True).merge_and_unload().save_pretrained(MERGED)")
    m = read_config(source / "config.json")
    return m, checkpoint_tensors(checkpoint_files(source), m.block.prefix)

def import_checkpoint(args):
    source, target = Path(args.folder), Path(args.model)
    if target.is_dir() or (target.exists() and not args.force):
        die(f"{target}: exists already{'' if target.is_dir() else '; --force overwrites it'}")
    m, tensors = open_checkpoint(source)
    check_names(m, tensors, source)
    as_saved, size = float32, 4
    if m.block.keeps_bf16 and all_bf16(m, tensors):
        m.header[1], as_saved, size = 1005, bf16, 2
    m.vocabulary = describe_vocabulary(source, m.V)
    with written_aside(target) as aside, open(aside, "wb") as out:
        out.write(m.header.tobytes())
        for name, shape in m.block.layout(m):
            x = finite(tensors[name].read(tensors[name]), f"{tensors[name].path}: {name}")
            out.write(np.ascontiguousarray(as_saved(x.T if m.block.transposed(name, shape) else x)))
            if name in (m.block.embedding, "lm_head.weight"):
                out.write(bytes(size * (m.Vp - m.V) * m.C))
    return m

# ----------------------------------------------------------------------------------------------------------------
# export

def special_tokens(m, folder):
    """Which tokens begin and end a text, as far as it is known."""
    said = dict.fromkeys(["bos_token_id", "eos_token_id"], ENDOFTEXT) if gpt2_vocabulary(m.V) else {}
    for path in [folder / "config.json", folder / "generation_config.json"] if folder else []:
        said |= read_json(path) if path.is_file() else {}
    return {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in said}

def write_config(m, folder, tokenizer):
    config = {"model_type": m.block.model_types[0], "architectures": [m.block.ordinary], **m.block.config(m),
              "dtype": "bfloat16" if m.dtype == "BF16" else "float32"}
    if tokenizer and m.block.title == "GPT-2":  # AutoTokenizer knows it by model_type, but only GPT-2's
        config["tokenizer_class"] = "GPT2Tokenizer"
    if m.mode != "baseline":
        stem = len(m.ordinary_steps)
        steps = {"stem": stem} if m.ordinary_steps == list(range(stem)) else {"ordinary": m.ordinary_steps}
        classes, module = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "LMHeadModel"}, m.block.code[:-3]
        config |= {"model_type": m.block.model_types[1], "architectures": [f"{m.block.classes}LMHeadModel"], "mode": m.mode,
                   "step_size": m.h, "coefficients": m.a, "fixed_point": m.K, **steps, "grid": m.grid, "transformers_needed": ">=4.48",
                   "auto_map": {auto: f"{module}.{m.block.classes}{name}" for auto, name in classes.items()}}
        for name in ("modeling_rev.py", m.block.code):
            shutil.copyfile(MODEL_CODE / name, folder / name)
    special = special_tokens(m, tokenizer)
    none = dict.fromkeys(["bos_token_id", "eos_token_id"])  # other vocabularies have no such tokens that are known here
    (folder / "config.json").write_text(json.dumps(config | none | special, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")

def read_tensors(path, m):
    """The numbers of a model file, one tensor at a time, as a checkpoint has them."""
    with open(path, "rb") as file:
        file.seek(1024)
        for name, shape in m.block.layout(m):
            x = np.fromfile(file, "<u2" if m.dtype == "BF16" else "<f4", prod(shape))
            finite(x, f"{path}: {name}")
            yield x.reshape(shape[::-1]).T if m.block.transposed(name, shape) else x.reshape(shape)
            if name in (m.block.embedding, "lm_head.weight"):
                file.seek((m.Vp - m.V) * m.C * x.itemsize, os.SEEK_CUR)

def export_gguf(args, m, path, target):
    from gguf_storage import tokenizer_fields, write_gguf
    if m.block.title != "Llama" or m.mode != "baseline":
        die(f"{path}: of a {m.mode} network with {m.block.title}'s block; a GGUF file can hold a baseline with Llama's", 2)
    tokenizer = tokenizer_fields(Path(args.tokenizer), m.V) if args.tokenizer else []
    with written_aside(target) as aside:
        write_gguf(aside, m, tokenizer, read_tensors(path, m))
    return None if tokenizer else "llama.cpp needs one to read and write text; --tokenizer FILE.gguf gives that of another file"

def export_folder(args, m, path, folder):
    given = Path(args.tokenizer) if args.tokenizer else None
    tokenizer, problem = (given_tokenizer(given, m.V), None) if given else known_tokenizer(m)
    shapes = {name if name == "lm_head.weight" else m.block.prefix + name: shape for name, shape in m.block.layout(m)}
    with written_aside(folder) as aside:
        aside.mkdir()
        write_config(m, aside, given)
        write_safetensors(aside / "model.safetensors", shapes, m.dtype, read_tensors(path, m))
        for name, content in tokenizer.items():
            (aside / name).write_bytes(content)
    return problem and f"transformers makes up an empty one: {problem}; --tokenizer FOLDER gives one"

def export_model(args):
    path, target = Path(args.model), Path(args.folder)
    if target.exists():
        die(f"{target}: exists already; another {'file' if target.suffix == '.gguf' else 'folder'} is meant")
    m = read_header(path)
    if args.as_baseline and m.mode not in ("baseline", "retrofit", "bdia"):
        die(f"--as-baseline: {path} is of a {m.mode} network; retrofit and bdia have the weights of an ordinary one", 2)
    m.mode = "baseline" if args.as_baseline else m.mode
    problem = (export_gguf if target.suffix == ".gguf" else export_folder)(args, m, path, target)
    if problem:
        warn(f"exported without a tokenizer, and {problem}")
    m.vocabulary = ""
    return m

# ----------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    i = commands.add_parser("import", help="a checkpoint to a model file")
    i.add_argument("folder", metavar="HF_FOLDER|FILE.gguf")
    i.add_argument("model", metavar="model.bin")
    i.add_argument("--force", action="store_true", help="overwrite model.bin")
    e = commands.add_parser("export", help="a model file to a folder that transformers loads, or to a GGUF file")
    e.add_argument("model", metavar="model.bin")
    e.add_argument("folder", metavar="FOLDER|FILE.gguf")
    e.add_argument("--as-baseline", action="store_true", help="the weights of retrofit or bdia as an ordinary network")
    e.add_argument("--tokenizer", metavar="FOLDER|FILE.gguf", help="copy a tokenizer from here; without it, what is known")
    for one in (parser, i, e):  # argparse would print its usage lines too
        one.error = lambda message: die(message + " (see --help)", 2)
    args = parser.parse_args()
    work, target = (import_checkpoint, args.model) if args.command == "import" else (export_model, args.folder)
    try:
        m = work(args)
    except OSError as e:
        die(f"{e.filename or target}: {e.strerror or e}", 3 if e.errno == errno.ENOMEM else 1)
    except SafetensorError as e:
        die(f"{target}: {e}")
    print(f"{target}: {m.mode}, L {m.L}, C {m.C}, NH {m.NH}, V {m.V}, context {m.maxT}{m.vocabulary}")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was written aside is removed
    try:
        main()
    except MemoryError:
        die("out of memory: one tensor at a time is held, as float32, the embedding being the largest", 3)
    except KeyboardInterrupt:
        die("interrupted; no file was left half-written", 130)
