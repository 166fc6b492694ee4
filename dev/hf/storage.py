"""
Checkpoints' files for hf.py: tensors out of safetensors and GGUF, and into them, one at a time.

In memory a tensor is float32, or '<u2' where it is bf16: the upper halves of float32. numpy has no bf16.
"""
import contextlib, errno, json, os, struct, sys, tempfile
from math import prod
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from safetensors import SafetensorError, safe_open

PROGRAM = os.path.basename(sys.argv[0])  # hf.py, or tokens.py

def die(message, status=1):
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    sys.exit(status)

def warn(message):
    print(f"{PROGRAM}: warning: {message}", file=sys.stderr)

def float32(x):
    return (x.astype("<u4") << 16).view("<f4") if x.dtype == "<u2" else x.astype("<f4", copy=False)

def fits_bf16(x):
    return x.dtype == "<u2" or not (x.view("<u4") & 0xffff).any()

def bf16(x):
    """Of a tensor that fits."""
    return x if x.dtype == "<u2" else (x.view("<u4") >> 16).astype("<u2")

def finite(x, where):
    if not np.isfinite(float32(x)).all():
        die(f"{where}: holds NaN or infinity, and a network with such a weight computes nothing else")
    return x

# ----------------------------------------------------------------------------------------------------------------
# Files

@contextlib.contextmanager
def written_aside(target):
    """Where to write a file or folder so that it becomes `target` when complete, and vanishes if anything goes wrong."""
    if not target.parent.is_dir():
        die(f"{target.parent}: no such folder")
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=target.parent) as beside:
        aside = Path(beside, target.name)
        yield aside
        for path in [*aside.glob("*"), aside]:
            sync(path)
        os.replace(aside, target)
    sync(target.parent)

def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:  # some file systems cannot sync a folder; a file must be
        if path.is_file() or e.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS):
            raise
    finally:
        os.close(fd)

def read_json(path):
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        die(f"{path}: not JSON: {e}")
    if not isinstance(data, dict):
        die(f"{path}: a JSON object is meant, not {type(data).__name__}")
    return data

# ----------------------------------------------------------------------------------------------------------------
# safetensors: eight bytes of length, a JSON object of that length, and the numbers

def checkpoint_files(folder):
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        die(f"{folder}: neither model.safetensors nor model.safetensors.index.json; "
            "transformers writes one by from_pretrained and save_pretrained")
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values()) else {""}
    if any(name != os.path.basename(name) or name in ("", ".", "..") for name in names):
        die(f"{index}: weight_map is meant to give the shard of each tensor, a file in this folder")
    return [folder / name for name in sorted(names)]

def checkpoint_tensors(files, prefix):
    """By name, without the prefix: file, type, shape and place of each tensor."""
    tensors = {}
    for path in files:
        if not path.is_file():
            die(f"{path}: No such file, though the index names it")
        try:
            safe_open(path, "numpy")  # it checks all that is read here by hand
        except SafetensorError as e:
            die(f"{path}: no whole safetensors file: {e}")
        with open(path, "rb") as file:
            length, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for full, t in header.items():
            name = full.removeprefix(prefix)
            if name in tensors:
                die(f"{path}: a second {name!r}, the first is in {tensors[name].path}")
            tensors[name] = SimpleNamespace(path=path, dtype=t["dtype"], shape=tuple(t["shape"]), read=read_safetensors,
                                            offset=8 + length + t["data_offsets"][0])
    return tensors

def read_safetensors(t):
    x = np.fromfile(t.path, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[t.dtype], prod(t.shape), offset=t.offset).reshape(t.shape)
    return x if t.dtype == "BF16" else float32(x)

def write_safetensors(path, shapes, dtype, numbers):
    """The numbers come one tensor at a time, in the order of the shapes, which are by name."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = prod(shape) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for x in numbers:
            out.write(np.ascontiguousarray(x))
