"""Tests prepro_owt.py by running it on small texts in a temporary folder.

    python3 dev/test/test_prepro.py

Needs Python and tqdm; what needs another package (tokenizers, sentencepiece, numpy, datasets, tiktoken) or tiktoken's gpt2 vocabulary is skipped where it cannot be had.
"""
import bz2
import fcntl
import gzip
import json
import lzma
import os
import pty
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir, "prepro_owt.py")
TRAIN, VAL, TOKENIZER, RECORD = "train_000000.bin", "val_000000.bin", "gpt2_tokenizer.bin", "prepro_owt.json"


class Skip(Exception):
    pass


def check(value, what):
    if not value:
        raise AssertionError(what)


def check_equal(got, want, what):
    check(got == want, f"{what}: {got!r:.200} where {want!r:.200} was expected")


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)
    return path


def read(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def run(*args, modules=None, **kwargs):
    """Runs the program; a folder of modules goes before the installed ones."""
    env = dict(os.environ, **({"PYTHONPATH": modules} if modules else {}))
    return subprocess.run([sys.executable, PROGRAM, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env=env, **kwargs)


def good(*args, **kwargs):
    p = run(*args, **kwargs)
    check_equal((p.returncode, p.stderr), (0, ""), "exit status and stderr")
    return p.stdout


def bad(status, says, *args, **kwargs):
    """The program must exit with that status and one line on stderr that holds every string of `says`."""
    p = run(*args, **kwargs)
    check_equal(p.returncode, status, f"exit status (stderr {p.stderr!r})")
    check_equal(p.stdout, "", "stdout")
    check(p.stderr.startswith("prepro_owt.py: ") and p.stderr.endswith("\n") and p.stderr.count("\n") == 1,
          f"stderr should be one line that begins with the program's name: {p.stderr!r}")
    for s in says:
        check(s in p.stderr, f"stderr should say {s!r}: {p.stderr!r}")


def token_bytes(tokens, V, *more):
    header = [20240520, 1, len(tokens), V, *more]
    return struct.pack("<256i", *header, *[0] * (256 - len(header))) + struct.pack(f"<{len(tokens)}H", *tokens)


def blocked(tmp, *names):
    """A folder of modules that cannot be imported."""
    folder = os.path.join(tmp, "blocked " + " ".join(names))
    os.mkdir(folder)
    for name in names:
        write(os.path.join(folder, name + ".py"), f"raise ModuleNotFoundError('no module {name}')\n".encode())
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# the byte tokenizer

def test_byte_files(tmp):
    text = bytes(range(256)) + b"\r\nends without a newline"  # 281 bytes, not UTF-8
    out = os.path.join(tmp, "new", "out")
    printed = good("--text", write(os.path.join(tmp, "a.txt"), text), "--tokenizer", "byte", "--val", "last:10%",
                   "--out", out, modules=blocked(tmp, "tiktoken", "numpy"))
    n = int(len(text) * 0.9)
    check_equal(read(out, TRAIN), token_bytes(text[:n], 256), TRAIN)
    check_equal(read(out, VAL), token_bytes(text[n:], 256), VAL)
    check_equal(sorted(os.listdir(out)), [RECORD, TRAIN, VAL], "files")
    check_equal(printed, f"{out}/{TRAIN}  {n} tokens  V 256\n{out}/{VAL}  {len(text) - n} tokens  V 256\n", "stdout")


def test_split(tmp):
    for length in 2, 10, 11, 19, 999, 1000, 1001:
        text = bytes(i % 251 for i in range(length))
        path = write(os.path.join(tmp, "a.txt"), text)
        for option, n in (["--val", "last:10%"], int(length * 0.9)), ([], int(length * 0.9)), \
                         (["--val", "last:12.5%"], length * 7 // 8), (["--val", "last:50%"], length // 2):
            out = os.path.join(tmp, f"{length} {option}")
            good("--text", path, "--tokenizer", "byte", *option, "--out", out)
            check_equal((read(out, TRAIN), read(out, VAL)),
                        (token_bytes(text[:n], 256), token_bytes(text[n:], 256)), f"{length} bytes, {option}")


def test_several_files(tmp):
    b, a, c = (write(os.path.join(tmp, name), data) for name, data in
               (("b", b"first"), ("a", b"second"), ("c", b"")))
    for arguments in (b, c, a), (b, "--text", a):
        out = os.path.join(tmp, "out" + arguments[1][-1])
        good("--text", *arguments, "--tokenizer", "byte", "--val", "last:50%", "--out", out)
        check_equal(read(out, TRAIN), token_bytes(b"first", 256), TRAIN)
        check_equal(read(out, VAL), token_bytes(b"second", 256), VAL)


def test_overwrites_whole(tmp):
    """A run that was killed among its renames is made anew: its files are replaced, and its leftovers are gone."""
    out = os.path.join(tmp, "out")
    args = "--text", write(os.path.join(tmp, "a"), b"0123456789"), "--tokenizer", "byte", "--out", out
    good(*args)
    record = dict(json.loads(read(out, RECORD)), finished=False, files=[])
    write(os.path.join(out, RECORD), json.dumps(record).encode())
    write(os.path.join(out, TRAIN), bytes(9999))
    write(os.path.join(out, TRAIN + ".tmp"), bytes(9999))
    with open(os.path.join(out, TRAIN), "rb") as old:
        good(*args)
        check_equal(old.read(), bytes(9999), "the old file, to a reader that has it open")
    check_equal(read(out, TRAIN), token_bytes(b"012345678", 256), TRAIN)
    check_equal(sorted(os.listdir(out)), [RECORD, TRAIN, VAL], "files")


def test_on_the_disk(tmp):
    """Each file is complete and fsynced before any is renamed, and the folder is fsynced after."""
    code = """if True:
        import os, sys, prepro_owt
        name = lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        fsync, replace = os.fsync, os.replace
        os.fsync = lambda fd: (print("fsync", name(fd), os.fstat(fd).st_size if "bin" in name(fd) else ""), fsync(fd))
        os.replace = lambda a, b: (print("rename", os.path.basename(a), os.path.basename(b)), replace(a, b))
        prepro_owt.main()"""
    if not os.path.exists("/proc/self/fd"):
        raise Skip("no /proc here")
    a = write(os.path.join(tmp, "a"), b"0123456789")
    out = os.path.join(tmp, "out")
    p = subprocess.run([sys.executable, "-B", "-c", code, "--text", a, "--tokenizer", "byte", "--out", out],
                       cwd=os.path.dirname(PROGRAM), capture_output=True, text=True)
    check_equal((p.returncode, p.stderr), (0, ""), "exit status and stderr")
    events = [line.strip() for line in p.stdout.splitlines() if line.startswith(("fsync", "rename"))]
    check_equal(events, [f"fsync {RECORD}.tmp", f"rename {RECORD}.tmp {RECORD}", "fsync out",
                         f"fsync {TRAIN}.tmp {1024 + 18}", f"fsync {VAL}.tmp {1024 + 2}", f"fsync {RECORD}.tmp",
                         f"rename {TRAIN}.tmp {TRAIN}", f"rename {VAL}.tmp {VAL}", f"rename {RECORD}.tmp {RECORD}",
                         "fsync out"], "what was done")


def test_two_writers(tmp):
    """Of two programs that write the same file one is refused, and the other's becomes whole. What a killed one left is no hindrance."""
    code = """if True:
        import sys, prepro_owt
        def fill(f):
            f.write(b"first"), f.flush(), print("begun", flush=True), sys.stdin.read(), f.write(b"second")
        prepro_owt.write_files(sys.argv[1], {"file": fill})"""

    def begin():
        p = subprocess.Popen([sys.executable, "-B", "-c", code, tmp], cwd=os.path.dirname(PROGRAM), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
        return p, p.stdout.readline()
    killed, _ = begin()
    killed.kill()
    killed.communicate()
    write(os.path.join(tmp, "file.tmp"), b"what a killed program left, and more of it than there will be")
    one, said = begin()
    check_equal((said, os.listdir(tmp)), ("begun\n", ["file.tmp"]), "what the first says, and has written")
    other, said = begin()
    stderr = other.communicate()[1]
    check_equal((other.returncode, said, stderr.count("\n")), (1, "", 1), f"exit status of the other, what it says, lines of {stderr!r}")
    check(f"another program is writing {tmp}/file;" in stderr, stderr)
    check_equal((one.communicate()[1], one.returncode), ("", 0), "stderr and exit status of the first")
    check_equal((read(tmp, "file"), os.listdir(tmp)), (b"firstsecond", ["file"]), "the file, and what there is")


# ---------------------------------------------------------------------------------------------------------------------
# bad input

def test_usage(tmp):
    a = write(os.path.join(tmp, "a"), b"0123456789")
    out = os.path.join(tmp, "out")
    bad(2, ["--text"], "--text", "--out", out)
    bad(2, ["--jsonl", "--text"], "--text", a, "--jsonl", a, "--out", out)
    bad(2, ["--jsonl", "--dataset"], "--dataset", a, "--jsonl", a, "--out", out)
    bad(2, ["--split"], "--text", a, "--split", "train", "--out", out)
    bad(2, ["--shard-size", "docs:F"], "--text", a, "--shard-size", "10", "--out", out)
    for option in "--shard-size", "--workers":
        for value in "0", "1e6", "9" * 5000:
            bad(2, [option, "whole number"], "--jsonl", a, f"{option}={value}", "--out", out)
    bad(2, ["--out"], "--text", a)
    bad(2, ["--tokenizer", "gpt3", "byte"], "--text", a, "--out", out, "--tokenizer", "gpt3")
    bad(2, ["--nonsense"], "--text", a, "--out", out, "--nonsense")
    for value in "", "10", "10%", "last:10", "last:%", "last:ten%", "last:nan%", "last:-10%", "last:10%%", \
                 "first:10%", "last:10%\n", "last:0%", "last:0.0%", "last:100%", "last:100.5%", \
                 "last:" + "9" * 400 + "%", "first:0", "first:-1", "first:1.5", "first:" + "9" * 400, "docs:0", \
                 "docs:1", "docs:-0.1", "docs:", "docs:5%", "docs:nan":
        bad(2, ["--val", "between 0 and 100", "last:10%"], "--text", a, "--out", out, "--tokenizer", "byte",
            f"--val={value}")
    check(not os.path.exists(out), "nothing should be made")


def test_bad_text(tmp):
    out = os.path.join(tmp, "out")
    options = "--tokenizer", "byte", "--out", out
    a = write(os.path.join(tmp, "a"), b"0123456789")
    empty = write(os.path.join(tmp, "empty"), b"")
    missing = os.path.join(tmp, "missing")
    bad(1, [missing, "No such file"], "--text", a, missing, *options)
    bad(1, ["two lines", "No such file"], "--text", os.path.join(tmp, "two\nlines"), *options)
    bad(1, [tmp, "directory"], "--text", tmp, *options)
    bad(1, [empty, "no text"], "--text", empty, empty, *options)
    one = write(os.path.join(tmp, "one"), b"1")
    bad(1, ["last:10%", "1 bytes", "no training text"], "--text", one, *options)
    bad(1, ["last:1e-18%", "no validation text"], "--text", a, *options, "--val", "last:0.000000000000000001%")
    check(not os.path.exists(out), "nothing should be made")


def test_invalid_utf8(tmp):
    a = write(os.path.join(tmp, "a"), "nine: é\n".encode())
    b = write(os.path.join(tmp, "b"), b"abc\xc3\xa9\xffdef")
    cut = write(os.path.join(tmp, "cut"), b"abc\xc3")  # a character may not run on into the next file
    out = os.path.join(tmp, "out")
    bad(1, [b, "0xff", "offset 5", "UTF-8"], "--text", a, b, "--tokenizer", "gpt2", "--out", out)
    bad(1, [cut, "0xc3", "offset 3", "UTF-8"], "--text", cut, a, "--out", out)
    check(not os.path.exists(out), "nothing should be made")


def test_bad_out(tmp):
    a = write(os.path.join(tmp, "a"), b"0123456789")
    options = "--text", a, "--tokenizer", "byte", "--out"
    bad(1, [a, "--out"], *options, a)
    bad(1, [a, "--out"], *options, os.path.join(a, "below"))
    bad(1, ["--out"], *options, "")
    os.mkdir(os.path.join(tmp, RECORD + ".tmp"))
    bad(1, [os.path.join(tmp, RECORD), "directory"], *options, tmp)
    check_equal(sorted(os.listdir(tmp)), ["a", RECORD + ".tmp"], "files")


def test_no_permission(tmp):
    user = {}
    if os.geteuid() == 0:  # root may do anything, so be somebody else
        user = {"user": 65534}
        os.chmod(tmp, 0o755)
        try:
            good("--help", **user)
        except (AssertionError, OSError):
            raise Skip("another user than root cannot run the program here")
    a = write(os.path.join(tmp, "a"), b"0123456789")
    secret = write(os.path.join(tmp, "secret"), b"0123456789")
    os.chmod(secret, 0)
    out = os.path.join(tmp, "out")
    os.mkdir(out, 0o555)
    bad(1, [secret, "Permission denied"], "--text", secret, "--tokenizer", "byte", "--out", out, **user)
    bad(1, [out, "Permission denied"], "--text", a, "--tokenizer", "byte", "--out", out, **user)
    bad(1, [out, "Permission denied"], "--text", a, "--tokenizer", "byte", "--out", out + "/new", **user)


def test_disk_full(tmp):
    """A limit on the size of a file stands in for a full disk. The training file fits, the validation file does not:
    neither must stay. With more room the same command goes on."""
    a = write(os.path.join(tmp, "a"), b"0123456789" * 200)
    out = os.path.join(tmp, "out")
    args = "--text", a, "--tokenizer", "byte", "--val", "last:90%", "--out", out
    bad(1, [VAL, "too large", "--out"], *args,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    check_equal(os.listdir(out), [RECORD], "files")
    good(*args)
    check_equal(sorted(os.listdir(out)), [RECORD, TRAIN, VAL], "files with more room")


def test_full_stdout(tmp):
    if not os.path.exists("/dev/full"):
        raise Skip("no /dev/full here")
    a = write(os.path.join(tmp, "a"), b"0123456789")
    with open("/dev/full", "w") as full:
        p = subprocess.run([sys.executable, PROGRAM, "--text", a, "--tokenizer", "byte", "--out", tmp], stdout=full,
                           stderr=subprocess.PIPE, text=True)
    check_equal((p.returncode, p.stderr.count("\n")), (1, 1), f"exit status and lines of {p.stderr!r}")


def test_interrupt(tmp):
    a = write(os.path.join(tmp, "a"), b"0123456789")
    begun, out = os.path.join(tmp, "begun"), os.path.join(tmp, "out")
    write(os.path.join(tmp, "tiktoken.py"), f"import time; open({begun!r}, 'w'); time.sleep(60)".encode())
    for number in signal.SIGINT, signal.SIGTERM:
        p = start("--text", a, "--out", out, modules=tmp)
        wait_for(lambda: os.path.exists(begun), "the program to begin")
        p.send_signal(number)
        stderr = p.communicate(timeout=60)[1]
        check_equal((p.returncode, stderr.count("\n")), (130, 1), f"exit status and lines of {stderr!r}")
        os.remove(begun)


def test_out_of_memory(tmp):
    if not sys.platform.startswith("linux"):
        raise Skip("memory cannot be limited here")
    a = os.path.join(tmp, "a")
    with open(a, "wb") as f:
        f.truncate(2**30)  # takes no room
    bad(3, ["memory"], "--text", a, "--tokenizer", "byte", "--out", tmp,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)))


def test_too_many_tokens(tmp):
    code = "import prepro_owt as p; p.token_file(range(2**31), 256)"  # the one case too large to make for real
    p = subprocess.run([sys.executable, "-B", "-c", code], cwd=os.path.dirname(PROGRAM), capture_output=True, text=True)
    check_equal((p.returncode, p.stderr.count("\n")), (1, 1), f"exit status and lines of {p.stderr!r}")
    check("2147483648" in p.stderr, p.stderr)


def test_no_tiktoken(tmp):
    a = write(os.path.join(tmp, "a"), b"0123456789")
    out = os.path.join(tmp, "out")
    bad(1, ["pip install tiktoken"], "--text", a, "--out", out, modules=blocked(tmp, "tiktoken"))
    check(not os.path.exists(out), "nothing should be made")


def test_no_vocabulary(tmp):
    """A tiktoken that fails as the real one does without a network (its errors are OSErrors) and with a bad cache."""
    a = write(os.path.join(tmp, "a"), b"0123456789")
    out = os.path.join(tmp, "out")
    for error in "ConnectionError", "ValueError":
        write(os.path.join(tmp, "tiktoken.py"), f"def get_encoding(name): raise {error}('of\\nmany\\nlines')".encode())
        bad(1, ["TIKTOKEN_CACHE_DIR", error], "--text", a, "--out", out, modules=tmp)
    check(not os.path.exists(out), "nothing should be made")


# ---------------------------------------------------------------------------------------------------------------------
# the gpt2 tokenizer

def test_gpt2(tmp):
    try:
        import tiktoken
        enc = tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise Skip(f"no tiktoken or no vocabulary ({type(e).__name__})")
    first = "\ufeffFirst Citizen:\r\nBefore we proceed…\n" + "ñandú 日本語 🙂\n" * 20
    second = "  It ends <|endoftext|> not here, " + "and goes on: it's 1234567.\n" * 9
    a, b = (write(os.path.join(tmp, name), s.encode()) for name, s in (("a", first), ("b", second)))
    out = os.path.join(tmp, "out")
    printed = good("--text", a, b, "--tokenizer", "gpt2", "--val", "last:10%", "--out", out)

    text = first + second
    n = int(len(text) * 0.9)
    check(n != len(text.encode()[:int(len(text.encode()) * 0.9)].decode("utf-8", "ignore")),
          "the text must tell a split of characters from a split of bytes")
    train, val = enc.encode_ordinary(text[:n]), enc.encode_ordinary(text[n:])
    check_equal(read(out, TRAIN), token_bytes(train, 50257), TRAIN)
    check_equal(read(out, VAL), token_bytes(val, 50257), VAL)
    check_equal(printed, f"{out}/{TRAIN}  {len(train)} tokens  V 50257\n{out}/{VAL}  {len(val)} tokens  V 50257\n"
                         f"{out}/{TOKENIZER}  50257 tokens  V 50257\n", "stdout")
    check_equal(sorted(os.listdir(out)), [TOKENIZER, RECORD, TRAIN, VAL], "files")
    check_equal(good("--text", a, b, "--out", out), f"{out} is finished already\n" + printed, "stdout of a second run")

    data = read(out, TOKENIZER)
    check_equal(struct.unpack_from("<256I", data), (20240328, 2, 50257, 50256) + (0,) * 252, "tokenizer header")
    table, at = [], 1024
    for _ in range(50257):
        table.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    check_equal(at, len(data), "end of the tokenizer file")
    check_equal(table[50256], b"<|endoftext|>", "token 50256")
    for name, part in (TRAIN, text[:n]), (VAL, text[n:]):  # read from the files, without tiktoken
        tokens = struct.iter_unpack("<H", read(out, name)[1024:])
        check_equal(b"".join(table[i] for i, in tokens), part.encode(), f"{name} decoded")


# ---------------------------------------------------------------------------------------------------------------------
# documents

WORDS = "the fox law of nación 日本 🙂 and 1234 <|endoftext|>".split() + ["\n", "\t"]


def make_documents(n, words=30, seed=1):
    r = random.Random(seed)
    return [" ".join(r.choice(WORDS) for _ in range(r.randrange(words))) for _ in range(n)]


def write_jsonl(path, documents):
    lines = [json.dumps({"id": i, "text": d}, ensure_ascii=i % 2 == 0) + "\n" for i, d in enumerate(documents)]
    return write(path, "".join(lines).encode())


def need(*packages):
    try:
        return [__import__(package, fromlist=["x"]) for package in packages]
    except ImportError as e:
        raise Skip(e)


def shards(side, tokens, size, V=256):
    return {f"{side}_{k // size:06d}.bin": token_bytes(tokens[k:k + size], V) for k in range(0, len(tokens), size)}


def byte_files(train, val, size):
    """What should come of these documents with the byte tokenizer."""
    joined = [b"".join(b"\n" + d.encode() for d in side) for side in (train, val)]
    return {**shards("train", joined[0], size), **shards("val", joined[1], size)}


def made(out):
    names = sorted(os.listdir(out))
    check(RECORD in names, "there should be a record")
    return {name: read(out, name) for name in names if name != RECORD}


def check_files(got, want, what):
    check_equal(sorted(got), sorted(want), f"{what}: names of files")
    for name in want:
        check(got[name] == want[name], f"{what}: {name} differs")


def fake_tiktoken(tmp, seconds):
    """A tokenizer that takes its time and needs no download: a byte is a token, 256 the end of the text."""
    folder = os.path.join(tmp, "fake")
    os.mkdir(folder)
    write(os.path.join(folder, "tiktoken.py"), f"""if True:
        import time
        class Encoding:
            n_vocab, eot_token = 257, 256
            def encode_ordinary(self, text): time.sleep({seconds}); return list(text.encode())
            def decode_bytes(self, ids): return bytes([ids[0] % 256])
        get_encoding = lambda name: Encoding()""".encode())
    return folder


def start(*args, modules=None):
    """Starts the program as the first of a group of processes, with the shell's answer to Ctrl-C."""
    env = dict(os.environ, **({"PYTHONPATH": modules} if modules else {}))
    return subprocess.Popen([sys.executable, PROGRAM, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_for(condition, what, seconds=60):
    end = time.time() + seconds
    while not condition():
        check(time.time() < end, f"waited {seconds} s for {what}")
        time.sleep(0.01)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
        return False
    except ProcessLookupError:
        return True


def test_jsonl(tmp):
    """Needs no package but tqdm. Lines are as JSON allows them; a document may straddle any number of files."""
    documents = make_documents(100) + ["", "\r\n", "long " * 1000, "é" * 99]
    a = write(os.path.join(tmp, "a"), b"\xef\xbb\xbf" + b"".join(
        json.dumps({"text": d, "x": None}).encode() + b" \r\n\n" for d in documents[:60]))
    b = write(os.path.join(tmp, "b"), b" \n\n")
    c = write(os.path.join(tmp, "c"), b"\n" + b"\n".join(json.dumps({"text": d}, ensure_ascii=False).encode()
                                                       for d in documents[60:]))
    n = sum(len(d.encode()) + 1 for d in documents)
    modules = blocked(tmp, "tiktoken", "numpy", "datasets")
    for k, (option, size) in enumerate([("last:10%", 1000), ("last:1%", 10**6), ("last:60%", 777), ("first:1", 2000),
                                        ("first:2000", 1000), ("first:2500", 1000), (f"first:{n - 1}", 10**5)]):
        out = os.path.join(tmp, f"out{k}")
        printed = good("--jsonl", a, b, c, "--tokenizer", "byte", "--val", option, "--shard-size", str(size),
                       "--workers", "2", "--out", out, modules=modules)
        if option.startswith("last"):
            n_train = int(104 * (1 - int(option[5:-1]) / 100))
            want = byte_files(documents[:n_train], documents[n_train:], size)
        else:
            tokens, n_val = b"".join(b"\n" + d.encode() for d in documents), int(option[6:])
            want = {**shards("val", tokens[:n_val], size), **shards("train", tokens[n_val:], size)}
        check_files(made(out), want, option)
        for side in "train", "val":
            files = [len(data) for name, data in want.items() if name.startswith(side)]
            n_tokens = sum(files) // 2 - 512 * len(files)
            check(f"{out}/{side}_*.bin  {n_tokens} tokens  V 256  files {len(files)}\n" in printed, printed)
    out = os.path.join(tmp, "surrogate")
    d = write(os.path.join(tmp, "d"), b'{"text": "a"}\n{"text": "\\ud83d \\ud83d\\ude42"}')
    good("--jsonl", d, "--tokenizer", "byte", "--val", "last:50%", "--out", out)
    check_files(made(out), byte_files(["a"], ["? 🙂"], 100), "half of a character")


def test_docs_split(tmp):
    """--val docs:F holds out what datasets' train_test_split does, as nanoGPT calls it."""
    need("numpy")
    documents = [f"document {i}" for i in range(10)]
    a = write_jsonl(os.path.join(tmp, "a"), documents)
    good("--jsonl", a, "--tokenizer", "byte", "--val", "docs:0.25", "--out", os.path.join(tmp, "ten"))
    order = [8, 3, 0, 9, 5, 6, 2, 7, 4, 1]
    check_files(made(os.path.join(tmp, "ten")), byte_files([documents[i] for i in order[3:]],
                                                           [documents[i] for i in order[:3]], 10**6), "ten documents")
    datasets, = need("datasets")
    datasets.disable_progress_bars()
    for k, (n, F) in enumerate([(2, 0.0005), (2001, 0.0005), (333, 0.9)]):
        documents = [f"document {i}" for i in range(n)]
        a = write_jsonl(os.path.join(tmp, "a"), documents)
        out = os.path.join(tmp, f"out{k}")
        good("--jsonl", a, "--tokenizer", "byte", *(["--val", f"docs:{F}"] if F != 0.0005 else []), "--out", out)
        split = datasets.Dataset.from_dict({"text": documents}).train_test_split(test_size=F, seed=2357, shuffle=True)
        check_files(made(out), byte_files(split["train"]["text"], split["test"]["text"], 10**8), f"{n} documents, {F}")


def test_parquet(tmp):
    """A folder, a glob, a list: the same files as from JSON lines."""
    pa, pq, _, _ = need("pyarrow", "pyarrow.parquet", "datasets", "numpy")
    documents = make_documents(90)
    folder = os.path.join(tmp, "of [data]")
    os.makedirs(os.path.join(folder, "text"))
    paths = [os.path.join(folder, "text", f"train-{k:05d}-of-00003.parquet") for k in range(3)]
    for k, path in enumerate(paths):
        pq.write_table(pa.table({"url": ["u"] * 30, "text": documents[30 * k:30 * k + 30]}), path, row_group_size=7)
    options = "--tokenizer", "byte", "--val", "docs:0.1", "--shard-size", "1000", "--workers", "2", "--out"
    want = os.path.join(tmp, "want")
    good("--jsonl", write_jsonl(os.path.join(tmp, "a"), documents), *options, want)
    for k, names in enumerate([[folder], [os.path.join(tmp, "of*", "*", "*.parquet")], paths]):
        out = os.path.join(tmp, f"out{k}")
        good("--dataset", *names, *options, out)
        check_files(made(out), made(want), str(names))
    check("finished already" in good("--dataset", *paths, *options, out), "a second run should say that all is done")
    pq.write_table(pa.table({"text": documents[::-1]}), paths[1])
    bad(1, ["another source", "--out"], "--dataset", *paths, *options, out)


def test_text_documents(tmp):
    parts = [b"one\n", b"\xff\x00two", b"three" * 999, b"four", b"five"]
    paths = [write(os.path.join(tmp, str(i)), part) for i, part in enumerate(parts)]
    out = os.path.join(tmp, "out")
    need("numpy")
    good("--text", *paths, "--tokenizer", "byte", "--val", "docs:0.3", "--shard-size", "1000", "--out", out)
    order = __import__("numpy").random.default_rng(2357).permutation(5)
    val, train = (b"".join(b"\n" + parts[i] for i in side) for side in (order[:2], order[2:]))
    check_files(made(out), {**shards("train", train, 1000), **shards("val", val, 1000)}, "five texts")
    empty = write(os.path.join(tmp, "empty"), b"")
    options = "--val", "docs:0.3", "--out", os.path.join(tmp, "new")
    bad(1, [empty, "no text"], "--text", *paths, empty, "--tokenizer", "byte", *options)
    bad(1, [paths[1], "0xff"], "--text", *paths, *options, modules=fake_tiktoken(tmp, 0))
    check(not os.path.exists(os.path.join(tmp, "new")), "nothing should be made")


def test_text_first(tmp):
    text = bytes(range(250)) * 3
    a = write(os.path.join(tmp, "a"), text)
    good("--text", a, "--tokenizer", "byte", "--val", "first:300", "--out", tmp)
    check_equal((read(tmp, TRAIN), read(tmp, VAL)),
                (token_bytes(text[300:], 256), token_bytes(text[:300], 256)), "files")
    bad(1, ["first:750", "750 tokens", "no training text"], "--text", a, "--tokenizer", "byte", "--val", "first:750",
        "--out", os.path.join(tmp, "out"))
    check(not os.path.exists(os.path.join(tmp, "out")), "nothing should be made")


def test_workers(tmp):
    """Their number changes nothing, and the end-of-text token comes before each document."""
    documents = make_documents(200)
    a = write_jsonl(os.path.join(tmp, "a"), documents)
    modules = fake_tiktoken(tmp, 0)
    tokens = [list(d.encode()) for d in documents]
    want = {**shards("train", [i for d in tokens[:100] for i in [256] + d], 500, 50257),
            **shards("val", [i for d in tokens[100:] for i in [256] + d], 500, 50257)}
    for workers in "1", "3", "500":
        out = os.path.join(tmp, "out" + workers)
        good("--jsonl", a, "--val", "last:50%", "--shard-size", "500", "--workers", workers, "--out", out,
             modules=modules)
        got = made(out)
        got.pop(TOKENIZER)
        check_files(got, want, workers + " workers")


KILLING = """if True:
        import os, signal, sys, prepro_owt
        left = int(sys.argv.pop(1))
        def killing(function):
            def f(*args):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                function(*args)
            return f
        os.fsync, os.replace = killing(os.fsync), killing(os.replace)
        prepro_owt.main()"""


def test_killed(tmp):
    """Killed at every fsync and every rename, and started again: the same bytes in the end, and what the record says is
    finished is left alone."""
    documents = make_documents(30)
    a = write_jsonl(os.path.join(tmp, "a"), documents)
    want = byte_files(documents[:22], documents[22:], 1000)
    check_equal(len(want), 3, "files")
    for moment in range(1, 1000):
        out = os.path.join(tmp, f"out{moment}")
        args = "--jsonl", a, "--tokenizer", "byte", "--val", "last:25%", "--shard-size", "1000", "--out", out
        p = subprocess.run([sys.executable, "-B", "-c", KILLING, str(moment), *args, "--workers", "1"],
                           cwd=os.path.dirname(PROGRAM), capture_output=True, text=True)
        if p.returncode == 0:
            break
        check_equal((p.returncode, p.stderr), (-signal.SIGKILL, ""), "exit status and stderr")
        before = {name: os.stat(os.path.join(out, name)) for name in os.listdir(out)} if os.path.exists(out) else {}
        done = len(json.loads(read(out, RECORD))["files"]) if RECORD in before else 0
        good(*args, "--workers", "2")
        check_files(made(out), want, f"killed at moment {moment}")
        same = [name for name, stat in before.items() if name.endswith(".bin") and
                os.stat(os.path.join(out, name)).st_ino == stat.st_ino and
                os.stat(os.path.join(out, name)).st_mtime_ns == stat.st_mtime_ns]
        check(len(same) >= done, f"killed at moment {moment}: {done} files were done, only {same} were left alone")
    check(moment > 18, f"only {moment - 1} moments")
    check_files(made(out), want, "not killed")


END = 256  # fake_tiktoken's


def sequences_of(documents, N):
    """What the documents with text come to as sequences of N tokens, written down piece by piece."""
    sequences = []
    for d in documents:
        left = [END, *d.encode()] if d else []
        while left:
            piece, left = left[:N], left[N:]
            sequences.append(piece + [END] * (N - len(piece)))
    return sequences


def check_documents(out, side, documents, N):
    """A side's files, read as the trainer does: inputs, and for targets the same moved by one. Returns the sequences of
    each file."""
    sequences, counts, after = [], [], None
    for name in sorted(name for name in os.listdir(out) if name.startswith(side)):
        data = read(out, name)
        header, tokens = struct.unpack("<256i", data[:1024]), [i for i, in struct.iter_unpack("<H", data[1024:])]
        check_equal(header, (20240520, 1, len(tokens), 50257, N, END) + (0,) * 250, name + ": header")
        check(len(tokens) > N and len(tokens) % N == 1 % N, f"{name}: {len(tokens)} tokens")
        if after not in (None, END):
            check_equal(tokens[0], after, name + ": the target at the end of the file before")
        counts.append((len(tokens) - 1) // N)
        after = tokens[-1]
        sequences += [tokens[k:k + N + 1] for k in range(0, len(tokens) - 1, N)]
    check_equal([q[:-1] for q in sequences], sequences_of(documents, N), side + ": sequences")
    inputs = [i for q in sequences for i in q[:-1]]
    targets = [i for q in sequences for i in q[1:]]
    counted = [target for i, target in zip(inputs, targets) if not i == target == END]
    check_equal(counted, [i for d in documents if d for i in [*d.encode(), END]], side + ": targets that count")
    return counts


def test_sequences(tmp):
    """--documents: short ones are filled up, long ones cut, and every token of each is a target that counts once."""
    modules = fake_tiktoken(tmp, 0)
    options = "--documents", "4", "--val", "last:16%"
    small = write_jsonl(os.path.join(tmp, "small"), ["ab", "abc", "", "abcd", "abcdefghi", "val"])
    out = os.path.join(tmp, "small out")
    good("--jsonl", small, *options, "--shard-size", "12", "--workers", "2", "--out", out, modules=modules)
    a, b, c, d, e, f, g, h, i = b"abcdefghi"
    E, got = END, made(out)
    got.pop(TOKENIZER)
    files = [[E, a, b, E, E, a, b, c, E], [E, a, b, c, d, E, E, E, E], [E, a, b, c, d, e, f, g, h], [h, i, E, E, E]]
    check_files(got, {**{f"train_{k:06d}.bin": token_bytes(t, 50257, 4, E) for k, t in enumerate(files)},
                      VAL: token_bytes([E, *b"val", E], 50257, 4, E)}, "by hand")

    documents = make_documents(60) + ["", "x" * 7, "x" * 8, "x" * 9, "x" * 19, "x" * 300] + make_documents(4, seed=2)
    many = write_jsonl(os.path.join(tmp, "many"), documents)
    for N, size in (8, 200), (8, 201), (8, 9), (1, 300), (50, 10**6):
        out = os.path.join(tmp, f"out {N} {size}")
        good("--jsonl", many, "--documents", str(N), "--val", "last:10%", "--shard-size", str(size), "--out", out,
             modules=modules)
        for side, part in ("train", documents[:63]), ("val", documents[63:]):
            counts = check_documents(out, side, part, N)
            check(all(count == (size - 1) // N for count in counts[:-1]), f"{side}, size {size}: {counts}")
    out = os.path.join(tmp, "first")
    good("--jsonl", many, "--documents", "8", "--val", "first:240", "--shard-size", "99", "--out", out, modules=modules)
    tokens = [i for name in sorted(os.listdir(out), reverse=True) if name.startswith("val")
              for i, in struct.iter_unpack("<H", read(out, name)[1024:-2])]
    check_equal(len(tokens), 240, "first:240")

    args = "--jsonl", small, *options, "--shard-size", "9"
    for moment in range(1, 100):
        out = os.path.join(tmp, f"killed {moment}")
        p = subprocess.run([sys.executable, "-B", "-c", KILLING, str(moment), *args, "--out", out], capture_output=True,
                           cwd=os.path.dirname(PROGRAM), text=True, env=dict(os.environ, PYTHONPATH=modules))
        good(*args, "--out", out, modules=modules)
        check_files({name: data for name, data in made(out).items() if name != TOKENIZER}, got, f"moment {moment}")
        if p.returncode == 0:
            break
    check(moment > 18, f"only {moment - 1} moments")


def test_sequences_refused(tmp):
    modules = fake_tiktoken(tmp, 0)
    out = os.path.join(tmp, "out")
    some, none = (write_jsonl(os.path.join(tmp, name), texts) for name, texts in
                  (("some", ["abcdefghi"] * 4), ("none", ["abcdefghi", "", "", ""])))
    for says, args in (["end-of-text"], ["--tokenizer", "byte"]), (["--shard-size 4"], ["--shard-size", "4"]), \
                      (["first:10", "a multiple of --documents 4"], ["--val", "first:10"]), \
                      (["whole number"], ["--documents", "0"]), \
                      (["--documents 20000000", "16777216"], ["--documents", "20000000"]):
        bad(2, says, "--jsonl", some, "--documents", "4", *args, "--out", out, modules=modules)
    bad(2, ["--documents is for documents"], "--text", some, "--documents", "4", "--out", out, modules=modules)
    check(not os.path.exists(out), "nothing should be made")
    args = "--val", "last:50%", "--out", out
    bad(1, ["no validation text"], "--jsonl", none, "--documents", "4", *args, modules=modules)
    check_equal(os.listdir(out), [], "files")
    good("--jsonl", some, "--documents", "4", *args, modules=modules)
    check("finished already" in good("--jsonl", some, "--documents", "4", *args, modules=modules), "once more")
    for other in ["--documents", "5"], []:
        bad(1, ["another documents;"], "--jsonl", some, *other, *args, modules=modules)


def test_killed_at_any_time(tmp):
    """Killed from outside again and again, with workers; none of these stays behind."""
    documents = make_documents(300)
    a = write_jsonl(os.path.join(tmp, "a"), documents)
    out = os.path.join(tmp, "out")
    modules = fake_tiktoken(tmp, 0.003)
    args = "--jsonl", a, "--val", "first:3000", "--shard-size", "2000", "--out", out
    r = random.Random(1)
    for kills in range(100):
        p = start(*args, "--workers", str(r.randrange(1, 4)), modules=modules)
        try:
            p.wait(r.uniform(0.2, 0.7 + 0.1 * kills))  # longer each time, lest a busy machine never gets there
            break
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            wait_for(lambda: group_is_gone(p.pid), "the workers to end")
    check_equal((p.returncode, p.communicate()[1]), (0, ""), "exit status and stderr of the last run")
    check(kills > 0, "it should have been killed at least once")
    tokens = [i for d in documents for i in [256] + list(d.encode())]
    got = made(out)
    got.pop(TOKENIZER)
    check_files(got, {**shards("val", tokens[:3000], 2000, 50257), **shards("train", tokens[3000:], 2000, 50257)},
                f"killed {kills} times")


def test_other_run(tmp):
    """What would mix the files of two commands is refused, and changes nothing."""
    documents = make_documents(40)
    a, b = (write_jsonl(os.path.join(tmp, name), documents) for name in "ab")
    text = write(os.path.join(tmp, "text"), b"0123456789")
    out = os.path.join(tmp, "out")
    run = {"jsonl": a, "tokenizer": "byte", "val": "last:25%", "shard_size": "700"}

    def args(**changes):
        return [s for key, value in {**run, **changes}.items() for s in ("--" + key.replace("_", "-"), value)]
    good(*args(), "--out", out)
    files = made(out)
    for what, changes in ("source", {"jsonl": b}), ("val", {"val": "first:700"}), ("val", {"val": "last:25.5%"}), \
                         ("shard-size", {"shard_size": "701"}):
        bad(1, [f"another {what};", "--out"], *args(**changes), "--out", out)
    bad(1, [out, "another run"], "--text", text, "--tokenizer", "byte", "--out", out)
    os.utime(a, (1, 1))
    bad(1, ["another source;"], *args(), "--out", out)
    check_files(made(out), files, "after what was refused")

    good(*args(), "--out", os.path.join(tmp, "new"))
    out = os.path.join(tmp, "new")
    stats = [os.stat(os.path.join(out, name)).st_mtime_ns for name in sorted(os.listdir(out))]
    check("finished already" in good(*args(), "--out", out, "--workers", "1"), "it should say that all is done")
    check_equal([os.stat(os.path.join(out, name)).st_mtime_ns for name in sorted(os.listdir(out))], stats, "times")
    write(os.path.join(out, TRAIN), b"short")
    bad(1, [TRAIN, "start again"], *args(), "--out", out)
    write(os.path.join(out, RECORD), b"{")
    bad(1, [RECORD, "--out"], *args(), "--out", out)
    os.remove(os.path.join(out, RECORD))
    bad(1, ["another run", "--out"], *args(), "--out", out)
    bad(1, [TRAIN, "another run"], "--text", text, "--tokenizer", "byte", "--out", out)
    out = os.path.join(tmp, "text files")
    good("--text", text, "--tokenizer", "byte", "--out", out)
    bad(1, ["another run", "--out"], *args(), "--out", out)


def test_other_text(tmp):
    """Plain text, too, does not mix with the files of another command, and is made only once."""
    a, b = (write(os.path.join(tmp, name), data) for name, data in (("a", b"0123456789"), ("b", b"9876543210")))
    out = os.path.join(tmp, "out")
    args = "--tokenizer", "byte", "--out", out, "--text"
    printed = good(*args, a)
    files = made(out)
    for what, other in ("source", [b]), ("source", [a, b]), ("val", [a, "--val", "first:2"]):
        bad(1, [f"{out} holds {TRAIN} of another run with another {what};", "--out"], *args, *other)
    bad(1, ["another tokenizer;"], *args, a, "--tokenizer", "gpt2")
    for packed in gzip.compress(b"text"), bz2.compress(b"text"), lzma.compress(b"text"):
        bad(1, [a + ".gz is compressed"], *args, write(a + ".gz", packed), "--out", os.path.join(tmp, "packed"))
    check_equal(good(*args, a), f"{out} is finished already\n" + printed, "stdout of a second run")
    check_files(made(out), files, "after what was refused")
    write(os.path.join(out, VAL), b"short")
    bad(1, [VAL, "start again"], *args, a)
    os.remove(os.path.join(out, RECORD))
    bad(1, [TRAIN, "another run"], *args, a)


def test_two_at_a_time(tmp):
    """Only one run has the folder, whichever of them makes it."""
    a = write_jsonl(os.path.join(tmp, "a"), make_documents(500))
    text = write(os.path.join(tmp, "text"), b"0123456789")
    out = os.path.join(tmp, "out")
    args = "--jsonl", a, "--val", "last:10%", "--shard-size", "1000", "--workers", "2", "--out", out
    modules = fake_tiktoken(tmp, 0.05)
    p = start(*args, modules=modules)
    wait_for(lambda: os.path.exists(os.path.join(out, VAL)), VAL)
    bad(1, [f"another run is using {out}"], *args, modules=modules)
    bad(1, [f"another run is using {out}"], "--text", text, "--tokenizer", "byte", "--out", out)
    check_equal(p.poll(), None, "exit status of the first run, which should go on")
    os.killpg(p.pid, signal.SIGSTOP)
    p.kill()
    p.wait()
    bad(1, ["of another run"], "--text", text, "--tokenizer", "byte", "--out", out)  # workers do not keep it
    os.killpg(p.pid, signal.SIGKILL)

    late = os.path.join(tmp, "late")
    slow = os.path.join(tmp, "slow")
    os.mkdir(slow)
    write(os.path.join(slow, "tiktoken.py"), read(modules, "tiktoken.py") + f"""
any(__import__("os").path.exists({late + "/" + RECORD!r}) or time.sleep(0.01) for _ in range(3000))""".encode())
    p = start("--text", text, "--out", late, modules=slow)
    good("--text", text, "--tokenizer", "byte", "--out", late)
    files = made(late)
    stdout, stderr = p.communicate(timeout=60)
    check_equal((p.returncode, stdout, stderr.count("\n")), (1, "", 1), f"exit status, stdout, lines of {stderr!r}")
    check_files(made(late), files, "of the run that came first")


def test_changed_source(tmp):
    """A source that is rewritten in place, at the same length, while it is read."""
    need("numpy")
    a = write_jsonl(os.path.join(tmp, "a"), ["document"] * 100)
    texts = [write(os.path.join(tmp, f"{i}.txt"), b"text") for i in range(100)]
    modules = fake_tiktoken(tmp, 0.02)
    for k, (args, path) in enumerate([(["--jsonl", a], a), (["--text", *texts, "--val", "docs:0.5"], texts[0]),
                                      (["--text", a], a)]):
        if k == 2:
            write(os.path.join(modules, "tiktoken.py"), read(modules, "tiktoken.py") + f"""
open({path!r}, "r+b").write(open({path!r}, "rb").read())""".encode())
        out = os.path.join(tmp, f"out{k}")
        p = start(*args, "--workers", "1", "--out", out, modules=modules)
        if k < 2:
            wait_for(lambda: os.path.exists(os.path.join(out, RECORD)), RECORD)
            write(path, read(path))
        stdout, stderr = p.communicate(timeout=60)
        check_equal((p.returncode, stdout, stderr.count("\n")), (1, "", 1), f"exit status, stdout, lines of {stderr!r}")
        check(path in stderr and "changed" in stderr, stderr)
        check(not json.loads(read(out, RECORD))["finished"], "the run should not count as finished")


def test_bad_record(tmp):
    """JSON that is not a record, for documents and plain text."""
    out = os.path.join(tmp, "out")
    a = write_jsonl(os.path.join(tmp, "a"), ["a", "b"])
    good("--jsonl", a, "--tokenizer", "byte", "--val", "last:50%", "--out", out)
    record = json.loads(read(out, RECORD))
    without = [{key: value for key, value in record.items() if key != left_out} for left_out in record]
    for value in [], 5, None, "run", {}, {"run": 1}, *without, dict(record, run=[]), dict(record, finished=1), \
            dict(record, next=[]), dict(record, next=[0, "0"]), dict(record, files=[1]), dict(record, files=["ab"]), \
            dict(record, files=[[TRAIN]]), dict(record, files=[[1, TRAIN]]), dict(record, files={TRAIN: 1}):
        write(os.path.join(out, RECORD), json.dumps(value).encode())
        bad(1, [f"cannot read {out}/{RECORD}", "--out"], "--jsonl", a, "--tokenizer", "byte", "--val", "last:50%",
            "--out", out)
    bad(1, [f"cannot read {out}/{RECORD}", "--out"], "--text", a, "--tokenizer", "byte", "--out", out)


def test_not_regular(tmp):
    """A pipe would be waited for, a device has no end."""
    pipe = os.path.join(tmp, "pipe")
    os.mkfifo(pipe)
    for path in pipe, "/dev/null", "/dev/zero", tmp:
        for args in ["--text", path], ["--jsonl", path], ["--text", path, "--val", "docs:0.5"]:
            bad(1, [f"{path} is a directory, pipe or device"], *args, "--tokenizer", "byte",
                "--out", os.path.join(tmp, "out"), timeout=60)


def test_control_characters(tmp):
    """What a file's name says to a terminal does not reach it."""
    out = os.path.join(tmp, "\x1b[31m\x7f\x9bout\n")
    a = write(os.path.join(tmp, "a"), b"0123456789")
    shown = f"{tmp}/?[31m??out?"
    check_equal(good("--text", a, "--tokenizer", "byte", "--out", out),
                f"{shown}/{TRAIN}  9 tokens  V 256\n{shown}/{VAL}  1 tokens  V 256\n", "stdout")
    bad(1, [f"{tmp}/?[31m??out is a directory"], "--text", out, "--out", out)


def test_bad_jsonl(tmp):
    out = os.path.join(tmp, "out")
    options = "--tokenizer", "byte", "--val", "last:50%", "--out", out
    good_line = b'{"text": "a"}\n'
    a = write(os.path.join(tmp, "a"), good_line * 3)
    for line, says in (b"{", "JSON"), (b'{"text": "a"', "JSON"), (b'"text"', '"text"'), (b"[1]", '"text"'), \
                      (b'{"txt": "a"}', '"text"'), (b'{"text": null}', '"text"'), (b'{"text": ["a"]}', '"text"'), \
                      (b'{"text": "\xff"}', "UTF-8"), (b"[" * 100000, "JSON"), (b'{"text": "a"} {}', "JSON"):
        b = write(os.path.join(tmp, "b"), good_line + b"\n" + line + b"\n" + good_line)
        bad(1, [f"{b}, line 3", says], "--jsonl", a, b, *options)
    empty = write(os.path.join(tmp, "empty"), b"\n")
    bad(1, [empty, "no documents"], "--jsonl", empty, *options)
    bad(1, [os.path.join(tmp, "missing"), "No such file"], "--jsonl", a, os.path.join(tmp, "missing"), *options)
    bad(1, [tmp, "directory"], "--jsonl", tmp, *options)
    bad(1, ["No such file"], "--jsonl", "", *options)
    check(not os.path.exists(out), "nothing should be made")
    bad(1, [a, "--out"], "--jsonl", a, *options[:-1], a)
    bad(1, [a, "--out"], "--jsonl", a, *options[:-1], os.path.join(a, "below"))


def test_empty_sides(tmp):
    need("numpy")
    out = os.path.join(tmp, "out")
    one, two = (write_jsonl(os.path.join(tmp, str(n)), ["text"] * n) for n in (1, 2))
    options = "--tokenizer", "byte", "--shard-size", "4", "--out", out
    bad(1, ["docs:0.0005", "1 documents", "no training text"], "--jsonl", one, *options)
    bad(1, ["last:99%", "2 documents", "no training text"], "--jsonl", two, "--val", "last:99%", *options)
    check(not os.path.exists(out), "nothing should be made")
    bad(1, ["first:10", "10 tokens", "no training text"], "--jsonl", two, "--val", "first:10", *options)
    check_equal(os.listdir(out), [], "files")
    good("--jsonl", two, "--val", "first:9", *options)
    check_files(made(out), {**shards("val", b"\ntext\ntex", 4), **shards("train", b"t", 4)}, "first:9")


def test_bad_dataset(tmp):
    pa, pq, _ = need("pyarrow", "pyarrow.parquet", "datasets")
    out = os.path.join(tmp, "out")
    options = "--tokenizer", "byte", "--val", "last:50%", "--out", out

    def parquet(name, columns):
        pq.write_table(pa.table(columns), os.path.join(tmp, name))
        return os.path.join(tmp, name)
    bad(1, ["cannot load no/such-dataset", "--dataset"], "--dataset", "no/such-dataset", *options)
    bad(1, ["no .parquet files"], "--dataset", os.path.join(tmp, "*.parquet"), *options)
    bad(1, ["no column \"text\"", "content"], "--dataset", parquet("a.parquet", {"content": ["a", "b"]}), *options)
    bad(1, ["1 rows without a text"], "--dataset", parquet("c.parquet", {"text": ["a", None, "b"]}), *options)
    empty = parquet("d.parquet", {"text": pa.array([], pa.string())})
    bad(1, [f"no documents in {empty};"], "--dataset", empty, *options)
    bad(1, ["cannot load"], "--dataset", write(os.path.join(tmp, "e.parquet"), b"PAR1 not"), *options)
    bad(1, ["cannot load", "tset"], "--dataset", parquet("f.parquet", {"text": ["a"]}), "--split", "tset", *options)
    check(not os.path.exists(out), "nothing should be made")
    good("--dataset", empty, parquet("g.parquet", {"text": ["a", "b"]}), *options)
    check_files(made(out), byte_files(["a"], ["b"], 100), "an empty file and another")


def test_dataset_script(tmp):
    """A data set of the hub that is a script is not for version 4 of datasets: what is to be done is said."""
    folder = os.path.join(tmp, "fake")
    os.mkdir(folder)
    write(os.path.join(folder, "datasets.py"), b"def load_dataset(*a, **k): raise RuntimeError('Dataset scripts are no longer supported, but found x.py')")
    need("tqdm")
    bad(1, ["cannot load a/x", "found x.py", "datasets<4", "refs/convert/parquet"], "--dataset", "a/x", "--tokenizer", "byte",
        "--out", os.path.join(tmp, "out"), modules=folder)


def test_missing_packages(tmp):
    a = write_jsonl(os.path.join(tmp, "a"), ["a", "b"])
    out = os.path.join(tmp, "out")
    for package, args in ("datasets", []), ("datasets", ["--dataset", tmp]), ("tqdm", ["--jsonl", a]), \
                         ("tiktoken", ["--jsonl", a]), ("numpy", ["--jsonl", a, "--tokenizer", "byte"]):
        folder = os.path.join(tmp, package + str(len(args)))
        os.mkdir(folder)
        bad(1, [f"pip install {package}"], *args, "--out", out, modules=blocked(folder, package))
    check(not os.path.exists(out), "nothing should be made")


def test_documents_disk_full(tmp):
    """The first file of tokens fits, the second does not; with more room the run goes on."""
    documents = ["x" * 99] * 100
    a = write_jsonl(os.path.join(tmp, "a"), documents)
    out = os.path.join(tmp, "out")
    args = "--jsonl", a, "--tokenizer", "byte", "--val", "last:5%", "--shard-size", "5000", "--out", out
    bad(1, [TRAIN, "too large", "--out"], *args,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)))
    check_equal(sorted(os.listdir(out)), [RECORD, VAL], "files")
    good(*args)
    check_files(made(out), byte_files(documents[:95], documents[95:], 5000), "with more room")


def test_documents_interrupt(tmp):
    """Ctrl-C goes to the program and its workers alike; SIGTERM goes to it alone or to them all."""
    a = write_jsonl(os.path.join(tmp, "a"), make_documents(500))
    out = os.path.join(tmp, "out")
    args = "--jsonl", a, "--val", "last:10%", "--shard-size", "1000", "--workers", "3", "--out", out
    modules = fake_tiktoken(tmp, 0.02)
    for files, kill, number in (1, os.killpg, signal.SIGINT), (4, os.killpg, signal.SIGTERM), \
                               (7, os.kill, signal.SIGTERM), (10, os.killpg, signal.SIGINT):
        p = start(*args, modules=modules)
        wait_for(lambda: os.path.exists(out) and len(os.listdir(out)) > files, f"{files} files")
        kill(p.pid, number)
        stdout, stderr = p.communicate(timeout=60)
        check_equal((p.returncode, stdout, stderr.count("\n")), (130, "", 1), f"exit status, stdout, lines of {stderr}")
        wait_for(lambda: group_is_gone(p.pid), "the workers to end")
        check(not [name for name in os.listdir(out) if name.endswith(".tmp")], "no file should be half-written")


def test_killed_worker(tmp):
    """As by a system that is short of memory."""
    a = write_jsonl(os.path.join(tmp, "a"), make_documents(500))
    out = os.path.join(tmp, "out")
    p = start("--jsonl", a, "--val", "last:10%", "--shard-size", "1000", "--workers", "2", "--out", out,
              modules=fake_tiktoken(tmp, 0.02))
    children = f"/proc/{p.pid}/task/{p.pid}/children"
    wait_for(lambda: os.path.exists(os.path.join(out, VAL)), VAL)
    if not os.path.exists(children):
        p.kill()
        raise Skip("workers cannot be found here")
    os.kill(int(read(children).split()[0]), signal.SIGKILL)
    stdout, stderr = p.communicate(timeout=60)
    check_equal((p.returncode, stderr.count("\n")), (3, 1), f"exit status and lines of {stderr!r}")
    check("worker" in stderr and "memory" in stderr, stderr)
    wait_for(lambda: group_is_gone(p.pid), "the other worker to end")


def test_progress(tmp):
    """Only a terminal sees it; `good` checks that stderr is empty elsewhere."""
    a = write_jsonl(os.path.join(tmp, "a"), make_documents(50))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    p = subprocess.run([sys.executable, PROGRAM, "--jsonl", a, "--tokenizer", "byte", "--val", "last:10%", "--out",
                        os.path.join(tmp, "out")], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 100000).decode()
    os.close(ours)
    check_equal(p.returncode, 0, shown)
    check("checking" in shown and "50.0/50.0" in shown and TRAIN in shown, repr(shown))


def test_gpt2_documents(tmp):
    """The number of tokens is tiktoken's and one end-of-text for each document, at its beginning."""
    try:
        import tiktoken
        enc = tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise Skip(f"no tiktoken or no vocabulary ({type(e).__name__})")
    need("numpy")
    documents = make_documents(65, words=1000)
    out = os.path.join(tmp, "out")
    good("--jsonl", write_jsonl(os.path.join(tmp, "a"), documents), "--val", "docs:0.1", "--shard-size", "10000",
         "--workers", "2", "--out", out)
    tokens = [i for side in ("val", "train") for name in sorted(os.listdir(out)) if name.startswith(side)
              for i, in struct.iter_unpack("<H", read(out, name)[1024:])]
    check_equal(len(tokens), 65 + sum(len(enc.encode_ordinary(d)) for d in documents), "number of tokens")
    at = [k for k, i in enumerate(tokens) if i == 50256]
    check_equal((len(at), at[0]), (65, 0), "end-of-text tokens, place of the first")
    got = [enc.decode(tokens[b + 1:e]) for b, e in zip(at, at[1:] + [len(tokens)])]
    check_equal(sorted(got), sorted(documents), "documents")
    check(os.path.getsize(os.path.join(out, TOKENIZER)) > 1024 + 50257, "the tokenizer should be there")


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer of a folder

TEXT = "ñandú 日本語 🙂 say </s> or <s>, and it's 1234567.\n\n  The fox\ttook   the law of the nation.\n" * 9


def tokenizer_json(folder, before="<s>", config=None, model=None):
    """A small byte-level BPE with <s>, </s> and <pad>, that cuts and pads as one saved after use might."""
    tokenizers, = need("tokenizers")
    os.mkdir(folder)
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if before:
        t.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{before} $A </s>", special_tokens=[(name, t.token_to_id(name)) for name in (before, "</s>")])
    t.enable_truncation(5)
    t.enable_padding(length=7)
    t.save(os.path.join(folder, "tokenizer.json"))
    for name, content in ("tokenizer_config", config), ("config", model):
        if content is not None:
            write(os.path.join(folder, name + ".json"), json.dumps(content).encode())
    t.no_truncation()
    t.no_padding()
    t.encode_special_tokens = True
    return lambda text: t.encode(text, add_special_tokens=False).ids


def test_folder_text(tmp):
    """Plain text: each side begins as the tokenizer begins a text; what looks like a token in it is text."""
    a, n = write(os.path.join(tmp, "a"), TEXT.encode()), int(len(TEXT) * 0.9)
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    cases = [("template", "<s>", None, None, [1], 300), ("other template", "<pad>", None, None, [0], 300),
             ("none", None, names, {"vocab_size": 65536}, [], 65536),
             ("said", None, {**names, "add_bos_token": True}, {"vocab_size": 400}, [1], 400),
             ("not the model's size", None, {**names, "vocab_size": 310}, None, [], 300),
             ("taken back", "<s>", {**names, "add_bos_token": False}, None, [], 300)]
    for what, before, config, model, begin, V in cases:
        folder, out = os.path.join(tmp, what), os.path.join(tmp, what + " out")
        encode = tokenizer_json(folder, before, config, model)
        check(1 not in encode(TEXT) and len(encode(TEXT)) > 100, "no <s> in the text, but many tokens")
        printed = good("--text", a, "--tokenizer", folder, "--out", out)
        train, val = begin + encode(TEXT[:n]), begin + encode(TEXT[n:])
        check_files(made(out), {TRAIN: token_bytes(train, V), VAL: token_bytes(val, V)}, what)
        check_equal(printed, f"{out}/{TRAIN}  {len(train)} tokens  V {V}\n{out}/{VAL}  {len(val)} tokens  V {V}\n", what)
        check_equal(good("--text", a, "--tokenizer", folder, "--out", out), f"{out} is finished already\n" + printed, what)
    write(os.path.join(folder, "config.json"), b'{"vocab_size": 301}')
    bad(1, ["with another tokenizer"], "--text", a, "--tokenizer", folder, "--out", out)
    out = os.path.join(tmp, "first")
    good("--text", a, "--tokenizer", os.path.join(tmp, "template"), "--val", "first:20", "--out", out)
    check_files(made(out), {TRAIN: token_bytes(encode(TEXT)[19:], 300), VAL: token_bytes([1] + encode(TEXT)[:19], 300)}, "first:20")


def test_folder_documents(tmp):
    """Documents begin with what the tokenizer begins with, else end-of-text, which --documents fills up with, too."""
    need("tqdm")
    documents = make_documents(30) + ["\ud83d\ude42 and half of one: \ud83d"]
    a = os.path.join(tmp, "a")
    write(a, "".join(json.dumps({"text": d}) + "\n" for d in documents).encode())
    documents[-1] = "🙂 and half of one: \ufffd"
    for what, before, config, begin in ("template", "<s>", {"eos_token": "</s>"}, 1), ("none", None, {"eos_token": "</s>"}, 2), \
                                       ("by number", None, {"bos_token": "<s>"}, 1):
        folder, out, N = os.path.join(tmp, what), os.path.join(tmp, what + " out"), 16
        encode = tokenizer_json(folder, before, config)
        good("--jsonl", a, "--tokenizer", folder, "--val", "last:10%", "--out", out)
        n = int(len(documents) * 0.9)
        sides = [[i for d in side for i in [begin] + encode(d)] for side in (documents[:n], documents[n:])]
        check_files(made(out), {TRAIN: token_bytes(sides[0], 300), VAL: token_bytes(sides[1], 300)}, what)
        out += " N"
        good("--jsonl", a, "--tokenizer", folder, "--val", "last:10%", "--documents", str(N), "--out", out)
        for name, side in (TRAIN, documents[:n]), (VAL, documents[n:]):
            each = [[begin] + encode(d) for d in side if d]
            whole = [i for ids in each for i in ids + [begin] * (-len(ids) % N)] + [begin]
            check_equal(read(out, name), token_bytes(whole, 300, N, begin), f"{what}, {name}, --documents")
    encode = tokenizer_json(os.path.join(tmp, "nothing"), None, {})
    bad(1, ["bos_token or eos_token"], "--jsonl", a, "--tokenizer", os.path.join(tmp, "nothing"), "--out", os.path.join(tmp, "no"))


def test_folder_sentencepiece(tmp):
    sentencepiece, = need("sentencepiece")
    folder, out, a = os.path.join(tmp, "folder"), os.path.join(tmp, "out"), write(os.path.join(tmp, "a"), TEXT.encode())
    os.mkdir(folder)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.split("\n")), model_prefix=os.path.join(folder, "tokenizer"),
                                             vocab_size=300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    t = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model"))
    V, n = t.get_piece_size(), int(len(TEXT) * 0.9)
    for begin in [t.bos_id()], []:
        good("--text", a, "--tokenizer", folder, "--out", out + str(begin))
        want = [token_bytes(begin + t.encode(part), V) for part in (TEXT[:n], TEXT[n:])]
        check_files(made(out + str(begin)), {TRAIN: want[0], VAL: want[1]}, "SentencePiece")
        write(os.path.join(folder, "tokenizer_config.json"), b'{"add_bos_token": false}')
    bad(1, ["pip install sentencepiece"], "--text", a, "--tokenizer", folder, "--out", out, modules=blocked(tmp, "sentencepiece"))
    write(os.path.join(folder, "tokenizer.model"), b"no model")
    bad(1, ["tokenizer.model is no SentencePiece model"], "--text", a, "--tokenizer", folder, "--out", out)
    check(not os.path.exists(out), "nothing should be made")


def test_folder_refused(tmp):
    a, out, folder = write(os.path.join(tmp, "a"), TEXT.encode()), os.path.join(tmp, "out"), os.path.join(tmp, "folder")
    bad(2, [f"--tokenizer {folder}: gpt2, byte or a folder"], "--text", a, "--tokenizer", folder, "--out", out)
    tokenizer_json(folder)
    config = os.path.join(folder, "config.json")
    for text, says in ((b'{"vocab_size": 128256}', "a vocabulary of 128256; tokens are 16 bits"), (b'{"vocab_size": 65537}', "65536 is the most"),
                       (b'{"vocab_size": 299}', "vocab_size 299, but its tokenizer has 300"), (b"[1]", "is not a JSON object"), (b"{", "is not JSON")):
        write(config, text)
        bad(1, [says, folder], "--text", a, "--tokenizer", folder, "--out", out)
    os.remove(config)
    bad(1, ["pip install tokenizers"], "--text", a, "--tokenizer", folder, "--out", out, modules=blocked(tmp, "tokenizers"))
    write(os.path.join(folder, "tokenizer_config.json"), b'{"add_bos_token": true}')
    bad(1, ["puts [None] before a text"], "--text", a, "--tokenizer", folder, "--out", out)
    write(os.path.join(folder, "tokenizer.json"), b"{}")
    bad(1, ["tokenizer.json is no tokenizer"], "--text", a, "--tokenizer", folder, "--out", out)
    os.remove(os.path.join(folder, "tokenizer.json"))
    bad(1, ["neither tokenizer.json nor tokenizer.model"], "--text", a, "--tokenizer", folder, "--out", out)
    check(not os.path.exists(out), "nothing should be made")


def test_prompts(tmp):
    """dev/hf/tokens.py: a prompt to numbers and to a file, numbers to text."""
    folder, out = os.path.join(tmp, "folder"), os.path.join(tmp, "prompt.bin")
    encode, program = tokenizer_json(folder), os.path.join(os.path.dirname(PROGRAM), "dev", "hf", "tokens.py")

    def tokens(*args, **kwargs):
        return subprocess.run([sys.executable, program, *args], capture_output=True, **kwargs)
    text = "The fox 🙂 took</s>"
    numbers = [1] + encode(text[:-4]) + [2]
    p = tokens("encode", folder, text)
    check_equal(p.stdout.split(), [b"%d" % i for i in numbers], f"numbers ({p.stderr!r})")
    check_equal(tokens("encode", folder, "-", input=text.encode()).stdout, p.stdout, "from standard input")
    check_equal(tokens("decode", folder, input=b"tokens: " + p.stdout).stdout.decode(), "<s>" + text + "\n", "and back")
    p = tokens("encode", folder, text, "--bare", "--plain")
    check_equal(p.stdout.split(), [b"%d" % i for i in encode(text)], "nothing before, and </s> is text")
    check_equal(tokens("encode", folder, text, "-o", out).returncode, 0, "exit status")
    check_equal(read(out), token_bytes(numbers, 300), "a token file")
    p = tokens("decode", folder, input=b"1 2 300")
    check_equal((p.returncode, p.stderr), (1, f"tokens.py: {folder} has 300 tokens, none of the number 300\n".encode()), "a number too large")
    check_equal(tokens("encode", folder, "-", input=b"\xff").returncode, 1, "not UTF-8")
    p = tokens("encode", folder)
    check_equal((p.returncode, p.stderr.count(b"\n")), (2, 1), f"no text: {p.stderr!r}")
    check_equal(tokens("decode", folder, input=b"\xff 001 \xe2\x82").stdout, b"<s>\n", "numbers between what is not UTF-8")
    p = tokens("decode", folder, input=b"9" * 5000)
    check_equal((p.returncode, p.stderr), (1, f"tokens.py: {folder} has 300 tokens, none of the number {'9' * 20}\n".encode()), "a long number")
    for number in signal.SIGINT, signal.SIGTERM:
        p = subprocess.Popen([sys.executable, program, "decode", folder], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        wait_for(lambda: "tokenizers" in read("/proc", str(p.pid), "maps").decode(), "its packages")
        time.sleep(0.2)  # until it reads
        p.send_signal(number)
        stderr = p.communicate()[1]
        check_equal((p.returncode, stderr.count(b"\n"), b"interrupted" in stderr), (130, 1, True), f"exit status, lines of {stderr!r}")


def test_prompts_padded(tmp):
    """What a padded vocabulary has beyond the tokenizer's tokens has no text."""
    sentencepiece, = need("sentencepiece")
    folder, program = os.path.join(tmp, "folder"), os.path.join(os.path.dirname(PROGRAM), "dev", "hf", "tokens.py")
    os.mkdir(folder)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.split("\n")), model_prefix=os.path.join(folder, "tokenizer"),
                                             vocab_size=100, hard_vocab_limit=False, minloglevel=2)
    V = sentencepiece.SentencePieceProcessor(model_file=os.path.join(folder, "tokenizer.model")).get_piece_size()
    write(os.path.join(folder, "config.json"), b'{"vocab_size": 128}')
    for number, status in (V - 1, 0), (V, 0), (127, 0), (128, 1):
        p = subprocess.run([sys.executable, program, "decode", folder], input=b"%d" % number, capture_output=True)
        check_equal((p.returncode, p.stderr), (status, f"tokens.py: {folder} has 128 tokens, none of the number {number}\n".encode() * status), f"token {number}")


def main():
    os.environ["HF_HUB_OFFLINE"] = "1"
    passed = failed = skipped = 0
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            with tempfile.TemporaryDirectory() as tmp:
                os.environ["HF_HOME"] = os.path.join(tmp, "hf")
                try:
                    test(tmp)
                    passed += 1
                except Skip as e:
                    print(f"skipped {name}: {e}")
                    skipped += 1
                except Exception as e:
                    print(f"FAILED  {name}: {e}" if isinstance(e, AssertionError) else
                          f"FAILED  {name}: {traceback.format_exc()}")
                    failed += 1
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
