"""Checkpoints' files for hf.py: what is in which, and how one is written whole or not at all."""
import contextlib, errno, json, os, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from safetensors import SafetensorError, safe_open

def die(message, status=1):
    print(f"hf.py: {message}", file=sys.stderr)
    sys.exit(status)

def warn(message):
    print(f"hf.py: warning: {message}", file=sys.stderr)

def finite(x, where):
    if not np.isfinite(x).all():
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
# safetensors

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

def checkpoint_tensors(files):
    """By name, without `transformer.`: file, full name, type and shape of each tensor."""
    tensors = {}
    for path in files:
        if not path.is_file():
            die(f"{path}: No such file, though the index names it")
        try:
            file = safe_open(path, "numpy")
        except SafetensorError as e:
            die(f"{path}: no whole safetensors file: {e}")
        for full in file.keys():
            name, part = full.removeprefix("transformer."), file.get_slice(full)
            if name in tensors:
                die(f"{path}: a second {name!r}, the first is in {tensors[name].path}")
            tensors[name] = SimpleNamespace(path=path, full=full, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
    return tensors
