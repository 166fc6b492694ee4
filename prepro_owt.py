"""Turns text into the token files that train_rev_gpt2 reads.

    python3 prepro_owt.py --out DIR                   OpenWebText, from the Hugging Face hub
    python3 prepro_owt.py --dataset NAME --out DIR    another dataset of the hub, or a folder or glob of .parquet files
    python3 prepro_owt.py --jsonl FILES... --out DIR  one JSON object with a "text" on each line
    python3 prepro_owt.py --text FILES... --out DIR   plain text

It makes, little endian and as llm.c has them:

    DIR/train_000000.bin ...  256 int32 header: 20240520, version 1, number of tokens, vocabulary size V, --documents'
    DIR/val_000000.bin ...    N and the end-of-text token, then zeros; then the tokens as uint16
    DIR/gpt2_tokenizer.bin    256 uint32 header: 20240328, version 2, vocabulary size, end-of-text token, then zeros;
                              then for each token one byte of length and its bytes (for gpt2 only: a byte is itself)

Documents (all but plain text) are tokenized in parallel and written in order, --shard-size tokens a file; one may run
on into the next file. The end-of-text token comes before each document, as in llm.c; nanoGPT puts it after. The byte
tokenizer has none and takes a newline. --val docs:F, by default with F = 0.0005, is nanoGPT's split: it holds out the
same documents and shuffles both sides into the same order. last:P% holds out the last P per cent of the documents,
first:N the first N tokens. A run that was stopped, however that was, goes on after its last finished file when the same
command is given again, and ends with the same bytes; DIR/prepro_owt.json keeps account, and keeps DIR from other runs.

--documents N is for training on sequences of N tokens (-t N) that hold one document each, or a part of one. End-of-text
tokens go behind each document until its length, with the one before it, is a multiple of N, and sequences lie end to
end. A longer document, of 2.5 N tokens say, takes three sequences, each of which begins with the token after the last
one's; so the target of a sequence's last token is the next one's first: the document's own next token, or end-of-text.
The trainer knows such files by their header and leaves out of loss and gradient what is to be predicted after the end
of a document: end-of-text after end-of-text. Of all else every token is predicted once, and the end of each document
too. A file holds whole sequences and one token more; documents without any text are left out.

--tokenizer FOLDER takes the tokenizer of a model of Hugging Face's, by the package tokenizers (tokenizer.json) or
sentencepiece (tokenizer.model). V is what config.json there says, or how many tokens there are, 65536 at most. Where that
tokenizer itself begins a text with a token (by its post-processor, or add_bos_token in tokenizer_config.json), each
document begins with it, and each side of plain text; where it does not, a document begins with its eos_token, as
GPT-2's do. This token is also what --documents fills up with. "<s>" and the like in a text is text.

The FILES of --text are joined in the order given, without end-of-text tokens, and make one file a side. By default
--val last:10% holds out the last P per cent of the characters (bytes, for the byte tokenizer) and each side is
tokenized on its own, as nanoGPT prepares tinyshakespeare; first:N holds out the first N tokens, as llm.c does with
N = 32768. With --val docs:F each file is a document.

The byte tokenizer (V = 256) on plain text needs only Python. gpt2 (V = 50257) needs the package tiktoken, documents
tqdm, docs:F numpy, the hub and parquet datasets, whose cache takes some 65 GB for OpenWebText besides 18 GB of tokens.
Exit status: 0 done, 1 data and files, 2 usage, 3 out of memory, 130 Ctrl-C or SIGTERM.
"""
import argparse
import atexit
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import glob
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import stat
import struct
import sys
import threading
import types
from array import array

OPENWEBTEXT = "Skylion007/openwebtext"
RECORD = "prepro_owt.json"
CHUNK = 16  # documents that go to a worker at once


def plain(text):
    return re.sub(r"[\0-\x1f\x7f-\x9f]", "?", text)  # a file's name may hold what a terminal obeys


def fail(message, status=1):
    program = os.path.basename(sys.argv[0])  # this one, or dev/eval/choices.py, which uses these functions
    print(program + ":", plain(" ".join(message.split())), file=sys.stderr)  # one line, whatever a library put in
    sys.exit(status)


def need(package, what):
    try:
        return importlib.import_module(package)
    except ImportError as e:
        fail(f"{what} needs the {package} package ({e}): pip install {package}")


# ---------------------------------------------------------------------------------------------------------------------
# tokens

def load_gpt2():
    tiktoken = need("tiktoken", "--tokenizer gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # no network, a proxy's answer, an unwritable cache: all sorts of types
        fail(f"tiktoken cannot get its gpt2 vocabulary ({type(e).__name__}); run once with a network connection, "
             "or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it")


def tokenizer_files(folder):
    """What a Hugging Face folder has of a tokenizer: its file, then those that say how it is used."""
    paths = [os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer.model")]
    found = [path for path in paths if os.path.isfile(path)]
    if not found:
        fail(f"{folder} has neither tokenizer.json nor tokenizer.model; --tokenizer takes gpt2, byte or a folder with one")
    return [found[0], *beside(folder)]


def beside(folder):
    return [path for path in (os.path.join(folder, name) for name in ("tokenizer_config.json", "config.json")) if os.path.isfile(path)]


def read_object(path):
    try:
        with trying("read", path, "give files that exist"), open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        fail(f"{path} is not JSON ({e})")
    if not isinstance(value, dict):
        fail(f"{path} is not a JSON object")
    return value


def whole(text):
    """JSON can spell halves of surrogate pairs, which have no UTF-8: pairs are joined, what is left is replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def open_json(path):
    tokenizers = need("tokenizers", "a tokenizer.json")
    try:
        t = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # the package's own type for all that is wrong with it
        fail(f"{path} is no tokenizer that can be read ({e})")
    t.no_truncation()
    t.no_padding()
    try:
        probe = next((x for x in ("a", *t.get_vocab()) if t.encode(x, add_special_tokens=False).ids), "a")  # any text with a token
        text, framed = t.encode(probe, add_special_tokens=False).ids, t.encode(probe).ids
    except Exception as e:
        fail(f"{path} makes no tokens of a text ({e})")
    before = next((framed[:i] for i in range(len(framed)) if framed[i:i + len(text)] == text), [])

    def encode(text, special=False):
        t.encode_special_tokens = not special  # "</s>" in a text is text, as GPT-2's encode_ordinary has it
        return t.encode(whole(text), add_special_tokens=False).ids
    return types.SimpleNamespace(V=max(t.get_vocab().values(), default=-1) + 1, encode=encode, before=before, id_of=t.token_to_id,
                                 decode=lambda ids: t.decode(ids, skip_special_tokens=False), name_of=t.id_to_token)


def open_sentencepiece(path):
    sentencepiece = need("sentencepiece", "a tokenizer.model")
    try:
        t = sentencepiece.SentencePieceProcessor(model_file=path)
    except Exception as e:
        fail(f"{path} is no SentencePiece model that can be read ({e})")

    def id_of(piece):
        i = t.piece_to_id(piece)
        return i if t.id_to_piece(i) == piece else None

    def encode(text, special=False):  # such a model never makes tokens of "</s>" and the like
        return t.encode(whole(text))
    return types.SimpleNamespace(V=t.get_piece_size(), encode=encode, before=[t.bos_id()] if t.bos_id() >= 0 else [],
                                 id_of=id_of, decode=t.decode, name_of=t.id_to_piece)


@functools.cache
def load_folder(folder):
    return load_tokenizer(*tokenizer_files(folder))


def load_tokenizer(path, *more):
    """V; known, how many of these are tokens and not padding; encode, decode; begin, the token before each document, or None;
    before, what goes before plain text, too; bos and eos, those that begin and end a text, or None."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are what is parallel
    t = (open_sentencepiece if path.endswith(".model") else open_json)(path)
    if not t.V:
        fail(f"{path} has no tokens")
    files = {os.path.basename(other): read_object(other) for other in more}
    model = files.get("config.json", {})
    said = {**model, **files.get("tokenizer_config.json", {})}  # which counts, but for the size of the model's vocabulary

    def special(key):
        token = said.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        i = t.id_of(token) if isinstance(token, str) else said.get(key + "_id")
        i = i[0] if isinstance(i, list) and i else i
        return i if isinstance(i, int) and 0 <= i < t.V else None
    if isinstance(said.get("add_bos_token"), bool):
        t.before = [special("bos_token")] if said["add_bos_token"] else []
    if len(t.before) > 1 or None in t.before:
        fail(f"{path} puts {t.before} before a text; one begin-of-text token, or none, is meant")
    t.bos, t.eos = special("bos_token"), special("eos_token")
    t.begin = next((i for i in (*t.before, t.eos, t.bos) if i is not None), None)
    t.known, t.V = t.V, model.get("vocab_size", t.V)
    if not isinstance(t.V, int) or t.V < t.known:
        fail(f"{path}: config.json says vocab_size {t.V}, but its tokenizer has {t.known} tokens")
    if t.V > 65536:
        fail(f"{path} has a vocabulary of {t.V}; tokens are 16 bits in these files, so that 65536 is the most")
    return t


def vocabulary(tokenizer):
    return {"byte": 256, "gpt2": 50257}.get(tokenizer) or load_folder(tokenizer).V


def text_encoder(tokenizer):
    """A function from plain text to its tokens."""
    if tokenizer == "byte":
        return bytes
    if tokenizer == "gpt2":
        return load_gpt2().encode_ordinary
    t = load_folder(tokenizer)
    return lambda text: t.before + t.encode(text)


def begin_token(tokenizer):
    """The one before each document."""
    if tokenizer == "gpt2":
        return load_gpt2().eot_token
    begin = load_folder(tokenizer).begin
    if begin is None:
        fail(f"{tokenizer} names no token that begins or ends a text; documents need bos_token or eos_token in tokenizer_config.json")
    return begin


def uint16(tokens):
    ids = array("H", iter(tokens))  # iter, because array takes a bytes object for packed uint16
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def document_encoder(tokenizer, N=None):
    """A function from a document to its tokens. With N they fill whole sequences, none if there is no text."""
    if tokenizer == "byte":  # replace: JSON can spell a lone surrogate, which has no bytes
        return lambda text: uint16(b"\n" + (text if isinstance(text, bytes) else text.encode("utf-8", "replace")))
    begin, tokens = begin_token(tokenizer), load_gpt2().encode_ordinary if tokenizer == "gpt2" else load_folder(tokenizer).encode

    def encode(text):
        ids = [begin] + tokens(text)
        if N:
            ids = ids + [begin] * (-len(ids) % N) if len(ids) > 1 else []
        return uint16(ids)
    return encode


def header(*fields):
    return struct.pack("<256I", *fields, *[0] * (256 - len(fields)))


def token_file(tokens, V):
    if len(tokens) >= 2**31:
        fail(f"{len(tokens)} tokens are too many for one file, whose header counts to {2**31 - 1}; give less text")
    return lambda f: f.write(header(20240520, 1, len(tokens), V) + uint16(tokens).tobytes())


def tokenizer_file(enc):
    tokens = [enc.decode_bytes([i]) for i in range(enc.n_vocab)]  # <|endoftext|> comes as its own text
    table = b"".join(bytes([len(t)]) + t for t in tokens)
    return lambda f: f.write(header(20240328, 2, enc.n_vocab, enc.eot_token) + table)


# ---------------------------------------------------------------------------------------------------------------------
# files

# What some file systems answer where a folder is synced; files are, all the same.
CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EROFS}


@contextlib.contextmanager
def trying(to, path, hint):
    try:
        yield
    except OSError as e:
        fail(f"cannot {to} {path}: {e.strerror}; {hint}")


def writing(path):
    return trying("write", path, "--out needs a folder with room that you may write to")


def open_aside(path):
    """Opens PATH.tmp, empty and for this program alone until it is closed. One that was killed may have left it."""
    for _ in range(100):
        fd = os.open(path + ".tmp", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another program is writing {path}; let it end, or choose another name")
        except OSError:
            pass  # the file system has no locks
        with contextlib.suppress(FileNotFoundError):  # who had it a moment ago may have renamed or removed it
            if os.path.samestat(os.fstat(fd), os.stat(path + ".tmp")):
                os.truncate(fd, 0)
                return fd
        os.close(fd)
    fail(f"{path}.tmp is another file each time it is opened")


def write_files(out, files):
    """Writes {name: function that fills the file} to the folder: all aside, then all renamed. What can fail for want
    of space or rights does so before the first rename, so that no new file is left beside an old one."""
    paths, opened = {os.path.join(out, name): fill for name, fill in files.items()}, {}
    with contextlib.suppress(OSError, ValueError):  # all are open at once
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        for path, fill in paths.items():
            with writing(path):
                opened[path] = open_aside(path)
                with open(opened[path], "wb", buffering=2**20, closefd=False) as f:
                    fill(f)
                    f.flush()
                    os.fsync(f.fileno())
        for path in paths:
            with writing(path):
                os.replace(path + ".tmp", path)
            os.close(opened.pop(path))
        with writing(out):
            folder = os.open(out, os.O_RDONLY)
            try:
                os.fsync(folder)  # a rename is on the disk only once its folder is
            except OSError as e:
                if e.errno not in CANNOT_SYNC_FOLDERS:
                    raise
            os.close(folder)
    finally:
        for path, fd in opened.items():  # after a success there is none left
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.stat(path + ".tmp")):  # or it is another program's by now
                    os.remove(path + ".tmp")
            os.close(fd)


def save(out, record, files={}):
    write_files(out, {**files, RECORD: lambda f: f.write(json.dumps(record).encode())})


def identify(paths):
    files = []
    for path in paths:
        with trying("read", path, "give files that exist"):
            status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            fail(f"{path} is a directory, pipe or device; give regular files")
        files.append([path, status.st_size, status.st_mtime_ns])
    return files


def say(line):
    try:
        os.write(1, os.fsencode(plain(line) + "\n"))  # past Python's buffer, whose failure at exit would be a traceback
    except OSError as e:
        fail(f"the files are written, but standard output is not: {e.strerror}")


def open_record(args, source):
    """What of this run is done in the folder, which may not hold another's files and is kept from others to the end."""
    out, path, record = args.out, os.path.join(args.out, RECORD), {}
    tokenizer = args.tokenizer if args.tokenizer in ("gpt2", "byte") else identify(tokenizer_files(args.tokenizer))
    run = {"source": source, "tokenizer": tokenizer, "val": list(args.val[:2]), "shard-size": args.shard_size}
    run.update({"documents": args.documents} if args.documents else {})
    new = {"run": run, "finished": False, "files": [], "next": [0, 0]}  # next: a document and a token in it
    with writing(out):
        os.makedirs(out, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if isinstance(e, BlockingIOError):  # otherwise the file system has no locks
                fail(f"another run is using {out}; let it end or choose another --out")
        others = sorted(name for name in os.listdir(out) if re.fullmatch(r"(train|val)_[0-9]+\.bin", name))
    os.register_at_fork(after_in_child=functools.partial(os.close, folder))  # the lock ends with this process
    if os.path.lexists(path):
        try:
            with open(path, encoding="utf-8") as f:
                record = json.load(f)
            types = [[*map(type, part)] for part in ([record[key] for key in new], record["next"], *record["files"])]
            if types != [[dict, bool, list, list], [int, int]] + [[str, int]] * len(record["files"]):
                raise ValueError("not of the shape it is written in")
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as e:
            fail(f"cannot read {path} ({e}); remove that run's files or choose another --out")
    if record.get("run") != run:
        if others:
            before = record["run"] if record else run
            differ = [key for key in {**run, **before} if before.get(key) != run.get(key)]
            fail(f"{out} holds {others[0]} of another run{' with another ' + ', '.join(differ) if differ else ''}; "
                 f"repeat that command{' (files count by path, size and time)' if 'source' in differ else ''}, remove its files "
                 "or choose another --out")
        return new
    for name, count in record["files"]:
        if name not in others or os.path.getsize(os.path.join(out, name)) != 1024 + 2 * count:
            fail(f"{out}/{name} is not as this run left it; remove the run's files and {RECORD}, and start again")
    return record


def finish(out, record, files, paths):
    """Writes the last files, unless what was read has changed meanwhile."""
    if paths and identify(paths) != record["run"]["source"][1]:
        fail(f"{', '.join(paths)} changed while being read; remove the run's files from {out} and start again")
    record["finished"] = True
    save(out, record, files)


# ---------------------------------------------------------------------------------------------------------------------
# plain text

def read_text(paths, as_str):
    """The files as one str, or as one bytes. Line ends stay as they are, so that tokens decode to the same bytes."""
    parts = []
    for path in paths:
        with trying("read", path, "--text takes readable text files"), open(path, "rb") as f:
            data = f.read()
        if data.startswith((b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"PK\x03\x04")):  # gzip, bzip2, zstd, xz, zip
            fail(f"{path} is compressed; give the text in it")
        try:
            parts.append(data.decode("utf-8") if as_str else data)
        except UnicodeDecodeError as e:
            fail(f"{path}: byte 0x{data[e.start]:02x} at offset {e.start} is not valid UTF-8; "
                 "convert the file to UTF-8, or use --tokenizer byte")
    text = ("" if as_str else b"").join(parts)
    if not text:
        fail(f"no text in {', '.join(paths)}; --text needs files that are not empty")
    return text


def check_sides(option, n, unit, train, val):
    for side, part in ("training", train), ("validation", val):
        if not len(part):
            fail(f"--val {option} of {n} {unit} leaves no {side} text; give more text or another --val")


def prepare_text(args):
    out, gpt2, as_str, (kind, x, option) = args.out, args.tokenizer == "gpt2", args.tokenizer != "byte", args.val
    V, source = vocabulary(args.tokenizer), ["text", identify(args.text)]
    record = open_record(args, source) if os.path.lexists(out) else None
    if record and record["finished"]:
        say(f"{out} is finished already")
    else:
        text = read_text(args.text, as_str)
        encode = text_encoder(args.tokenizer)
        if kind == "first":
            tokens = encode(text)
            train, val = tokens[x:], tokens[:x]
            check_sides(option, len(tokens), "tokens", train, val)
        else:
            n = int(len(text) * (1 - x / 100))  # in this order: for 10 it is nanoGPT's int(n*0.9) to the last bit
            check_sides(option, len(text), "characters" if as_str else "bytes", text[:n], text[n:])
            train, val = encode(text[:n]), encode(text[n:])
        files = {"train_000000.bin": token_file(train, V), "val_000000.bin": token_file(val, V)}
        files.update({"gpt2_tokenizer.bin": tokenizer_file(load_gpt2())} if gpt2 else {})
        record = record or open_record(args, source)
        save(out, record)  # before the first token file, so that it is known whose that is
        record["files"] = [["train_000000.bin", len(train)], ["val_000000.bin", len(val)]]
        finish(out, record, files, args.text)
    for name, count in record["files"] + ([["gpt2_tokenizer.bin", V]] if gpt2 else []):
        say(f"{os.path.join(out, name)}  {count} tokens  V {V}")


# ---------------------------------------------------------------------------------------------------------------------
# documents: how many a source has, and a function that reads number i (at top level, so that it can go to a worker)

def parse(line, where):
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        fail(f"{where} is not JSON in UTF-8 ({e}); --jsonl takes one JSON object on each line")
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        fail(f'{where} has no "text" that is a string; --jsonl takes lines such as {{"text": "Once"}}')
    return value["text"]


def read_line(paths, begins, offsets, i):
    path = paths[bisect.bisect_right(begins, i) - 1]
    with open(path, "rb") as f:
        f.seek(offsets[i])
        return parse(f.readline(), f"{path}, the line at byte {offsets[i]},")


def open_jsonl(paths, bar):
    """Parses every line once, so that a bad one is found now and not after hours."""
    begins, offsets = [], array("Q")  # of each file the number of its first document; of each document its place there
    for path in paths:
        begins.append(len(offsets))
        at = 0
        with trying("read", path, "--jsonl takes readable files"), open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    parse(line, f"{path}, line {number},")
                    offsets.append(at)
                at += len(line)
                bar.update(len(line))
    return len(offsets), functools.partial(read_line, paths, begins, offsets)


def read_file(paths, as_str, i):
    return read_text([paths[i]], as_str)


def read_row(dataset, i):
    return dataset[i]["text"]


def cannot_load(name, e, hint):
    if "scripts are no longer supported" in str(e):
        hint = ("this one is made by a script, which the package datasets runs before its version 4 only: pip install 'datasets<4' "
                "and set HF_DATASETS_TRUST_REMOTE_CODE=1, or download its .parquet files, which the hub has of many on the branch "
                "refs/convert/parquet, of large ones a part")
    fail(f"cannot load {name} ({type(e).__name__}: {' '.join(str(e).split())[:300]}); {hint}")


def open_dataset(names, split):
    if not sys.stderr.isatty():
        os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(HF_HUB_VERBOSITY="error", DATASETS_VERBOSITY="critical")  # what goes wrong is told below, once
    datasets = need("datasets", "reading the hub or parquet")
    patterns = [os.path.join(glob.escape(name), "**", "*.parquet") if os.path.isdir(name) else
                glob.escape(name) if os.path.exists(name) else name for name in names]
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern, recursive=True))]
    name = " ".join(names)
    if not paths and (len(names) > 1 or patterns[0].endswith(".parquet") or glob.has_magic(name)):
        fail(f"no .parquet files in {name}; --dataset takes a folder or glob of them, or the name of a hub dataset")
    files = identify(paths)
    try:  # with a batch_size, because the default, the length of the first row group, may be 0
        local = {"data_files": [glob.escape(path) for path in paths], "batch_size": 1000} if paths else {}
        dataset = datasets.load_dataset("parquet" if paths else name, split=split, **local)
    except MemoryError:
        raise
    except Exception as e:  # network, names, splits, broken files, a full disk: all sorts of types
        e = e.__cause__ or e
        if "corresponds to no data" in str(e):
            fail(f"no documents in {name}; give something to train on")
        cannot_load(name, e, "--dataset takes the name of a hub dataset, which has to be downloaded at first, or a folder or "
                    "glob of .parquet files")
    if getattr(dataset.features.get("text"), "dtype", None) not in ("string", "large_string"):
        fail(f'{name} has no column "text" of strings; its columns are {", ".join(dataset.column_names)}')
    nulls = dataset.data.column("text").null_count
    if nulls:
        fail(f"{name} has {nulls} rows without a text; remove them")
    revision = [os.path.basename(os.path.dirname(f["filename"])) for f in dataset.cache_files[:1]]  # the hub's commit
    return dataset.select_columns("text"), [name, split, len(dataset), files or revision]


def split_documents(kind, x, n):
    """The numbers of the training and of the validation documents, in the order in which they are written."""
    if kind == "first":  # its border is a token, not a document
        return range(n), []
    if kind == "last":
        n_train = int(n * (1 - x / 100))
        return range(n_train), range(n_train, n)
    order = need("numpy", "--val docs:F").random.default_rng(2357).permutation(n)
    n_val = math.ceil(x * n)  # like the line above, what datasets does for nanoGPT's train_test_split(F, seed=2357)
    return order[n_val:], order[:n_val]


# ---------------------------------------------------------------------------------------------------------------------
# workers

def work(pipe, read, tokenizer, N):
    """A worker process: gets lists of documents' numbers, sends lists of their tokens."""
    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed
    threading.Thread(target=follow, daemon=True).start()
    try:
        encode = document_encoder(tokenizer, N)
        while True:
            pipe.send([encode(read(i)) for i in pipe.recv()])
    except (Exception, SystemExit) as e:  # with SystemExit, fail has said why
        with contextlib.suppress(OSError):
            pipe.send(e)


def start_workers(count, read, tokenizer, N):
    pipes = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # for this process alone
    with trying("start", f"{count} workers", "give fewer --workers"):
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=work, args=(theirs, read, tokenizer, N), daemon=True)
            worker.start()  # it inherits what is blocked
            atexit.register(worker.kill)
            theirs.close()
            pipes.append(ours)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pipes


def tokenize(pipes, chunks):
    """Yields the tokens of each document, in order. The workers take turns, each with up to two chunks to do."""
    turns = collections.deque()
    try:
        for pipe, chunk in zip(pipes * 2, chunks):
            pipe.send(chunk)
            turns.append(pipe)
        while turns:
            pipe = turns.popleft()
            result = pipe.recv()
            if isinstance(result, (MemoryError, SystemExit)):
                raise result
            if isinstance(result, Exception):
                fail(f"a worker stopped ({type(result).__name__}: {result}); the same command goes on from here")
            for chunk in itertools.islice(chunks, 1):
                pipe.send(chunk)
                turns.append(pipe)
            yield from result
    except (EOFError, OSError):
        fail("a worker was killed, perhaps for want of memory; the same command goes on, give it fewer --workers", 3)


# ---------------------------------------------------------------------------------------------------------------------
# the files of documents

def cut(documents, i, at, totals, n_val, first, size):
    """Yields the name of a file, tokens that belong there, where in the documents these end, and what comes then of the
    same document: its next token, or nothing."""
    for i, ids in enumerate(documents, i):
        while at < len(ids):
            side = "val" if i < n_val or totals["val"] < first else "train"
            number, used = divmod(totals[side], size)
            room = min(size - used, first - totals[side]) if first and side == "val" else size - used
            part = ids[at:at + room]
            at += len(part)
            totals[side] += len(part)
            yield f"{side}_{number:06d}.bin", part, [i, at], ids[at:at + 1]
        at = 0


def write_tokens(f, name, pieces, fields, record):
    count = 0
    f.write(header())
    for _, ids, end, after in pieces:
        f.write(ids)
        count += len(ids)
    if len(fields) > 1:  # of documents: the target of the last token
        f.write(after or uint16(fields[2:]))
        count += 1
    f.seek(0)
    f.write(header(20240520, 1, count, *fields))
    record["files"].append([name, count])
    record["next"] = end


def prepare_documents(args):
    out, gpt2, as_str, (kind, x, option) = args.out, args.tokenizer == "gpt2", args.tokenizer != "byte", args.val
    names, paths, V = args.dataset or [OPENWEBTEXT], args.jsonl or args.text, vocabulary(args.tokenizer)
    N, more = args.documents, 1 if args.documents else 0  # a file of documents has one more token than its sequences
    size = (args.shard_size - more) // N * N if N else args.shard_size
    tqdm = functools.partial(need("tqdm", "preparing documents").tqdm, disable=None, unit_scale=True)  # None: no tty
    if paths:
        source = ["jsonl" if args.jsonl else "text", identify(paths)]
    else:
        dataset, source = open_dataset(names, args.split or "train")
    record = open_record(args, source) if os.path.lexists(out) else None
    if record and record["finished"]:
        say(f"{out} is finished already")
    else:
        document_encoder(args.tokenizer)  # so that it fails here and not in every worker
        if args.jsonl:
            with tqdm(total=sum(length for _, length, _ in source[1]), unit="B", desc="checking") as bar:
                n, read = open_jsonl(paths, bar)
        elif args.text:
            for path in paths:
                read_text([path], as_str)
            n, read = len(paths), functools.partial(read_file, paths, as_str)
        else:
            n, read = len(dataset), functools.partial(read_row, dataset)
        if not n:
            fail(f"no documents in {', '.join(paths or names)}; give something to train on")
        train, val = split_documents(kind, x, n)
        first = x if kind == "first" else 0
        if not first:
            check_sides(option, n, "documents", train, val)

        record = record or open_record(args, source)
        save(out, record)  # before the first token file, so that it is known whose that is
        i, at = record["next"]
        totals = {side: sum(n - more for name, n in record["files"] if name.startswith(side))
                  for side in ("train", "val")}
        fields = [V, N, begin_token(args.tokenizer)] if N else [V]  # of the files' headers
        chunks = ([int(val[k] if k < len(val) else train[k - len(val)]) for k in range(k, min(k + CHUNK, n))]
                  for k in range(i, n, CHUNK))
        pipes = start_workers(min(args.workers, -(-(n - i) // CHUNK)), read, args.tokenizer, N)
        with tqdm(tokenize(pipes, chunks), total=n, initial=i, unit=" documents") as bar:
            stream = cut(bar, i, at, totals, len(val), first, size)
            for name, pieces in itertools.groupby(stream, lambda piece: piece[0]):
                bar.set_description(name)
                save(out, record, {name: lambda f: write_tokens(f, name, pieces, fields, record)})
        if not all(totals.values()):  # only now does one know, with first:N or where documents have no text
            for name in [name for name, _ in record["files"]] + [RECORD]:
                os.remove(os.path.join(out, name))
            check_sides(option, sum(totals.values()), "tokens", range(totals["train"]), range(totals["val"]))
        finish(out, record, {"gpt2_tokenizer.bin": tokenizer_file(load_gpt2())} if gpt2 else {}, paths)
    for side in "train", "val":
        files = [n for name, n in record["files"] if name.startswith(side)]
        say(f"{os.path.join(out, side)}_*.bin  {sum(files)} tokens  V {V}  files {len(files)}")


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def split_option(value):
    match = re.fullmatch(r"(first):([0-9]{1,18})|(last):([0-9]+(?:\.[0-9]+)?)%|(docs):([0-9]+(?:\.[0-9]+)?)", value)
    if match:
        kind, x = (group for group in match.groups() if group)
        x = int(x) if kind == "first" else float(x)
        if 0 < x < {"first": math.inf, "last": 100, "docs": 1}[kind]:
            return kind, x, f"{kind}:{x:g}%" if kind == "last" else value
    raise argparse.ArgumentTypeError(f"'{value}' should be first:N, or last:P% with P between 0 and 100, as in "
                                     "last:10%, or docs:F with F between 0 and 1")


def whole_number(value):
    if not re.fullmatch("[0-9]{1,10}", value) or not 0 < int(value) < 2**31:
        raise argparse.ArgumentTypeError(f"'{value}' should be a whole number from 1 to {2**31 - 1}")
    return int(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(message + " (see --help)", 2)  # argparse would print its usage lines too
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", nargs="+", metavar="NAME", help="of the hub, or folders or globs of .parquet "
                        "files, default " + OPENWEBTEXT)
    source.add_argument("--jsonl", nargs="+", action="extend", metavar="FILE", help="files of JSON lines")
    source.add_argument("--text", nargs="+", action="extend", metavar="FILE", help="text files")
    parser.add_argument("--split", help="of the dataset, default train")
    parser.add_argument("--tokenizer", default="gpt2", metavar="gpt2|byte|FOLDER", help="default gpt2; of a FOLDER of Hugging "
                        "Face's its tokenizer.json, or tokenizer.model")
    parser.add_argument("--val", type=split_option, metavar="SPLIT", help="what is held out for validation: first:N, "
                        "last:P%% or docs:F; default docs:0.0005, for --text last:10%%")
    parser.add_argument("--documents", type=whole_number, metavar="N", help="each document in sequences of N tokens of "
                        "its own, for -t N")
    parser.add_argument("--shard-size", type=whole_number, metavar="N", help="tokens a file, default 100000000")
    parser.add_argument("--workers", type=whole_number, default=os.cpu_count() or 1, metavar="N",
                        help="processes that tokenize documents, default one a core; the files do not depend on it")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the token files, made if missing")
    args = parser.parse_args()
    args.val = args.val or split_option("last:10%" if args.text else "docs:0.0005")
    if args.tokenizer not in ("gpt2", "byte") and not os.path.isdir(args.tokenizer):
        parser.error(f"--tokenizer {args.tokenizer}: gpt2, byte or a folder is meant")
    if args.split and (args.text or args.jsonl):
        parser.error("--split is for a dataset")
    if not args.text or args.val[0] == "docs":
        args.shard_size = args.shard_size or 100_000_000
        N = args.documents
        if N and args.tokenizer == "byte":
            parser.error("--documents needs --tokenizer gpt2 or a folder's: bytes have no end-of-text token")
        if N and N > min(args.shard_size - 1, 2**24):
            parser.error(f"--documents {N}: at most {2**24} is meant, and less than --shard-size {args.shard_size}")
        if N and args.val[0] == "first" and args.val[1] % N:
            parser.error(f"--val {args.val[2]}: a multiple of --documents {N} is meant")
        prepare_documents(args)
    elif args.shard_size or args.documents:
        option = "--documents" if args.documents else "--shard-size"
        parser.error(f"{option} is for documents; --text without --val docs:F makes one file a side")
    else:
        prepare_text(args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except MemoryError:
        fail("out of memory: plain text is held whole, and so is each document; give less text or fewer --workers", 3)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        fail("interrupted; no file was left half-written, and the same command goes on", 130)
