"""Tests prepro_owt.py by running it on small texts in a temporary folder.

    python3 dev/test_prepro.py

Needs only Python; what needs tiktoken's gpt2 vocabulary is skipped where it cannot be had.
"""
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "prepro_owt.py")
TRAIN, VAL, TOKENIZER = "train_000000.bin", "val_000000.bin", "gpt2_tokenizer.bin"


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


def token_bytes(tokens, V):
    header = [20240520, 1, len(tokens), V] + [0] * 252
    return struct.pack("<256i", *header) + struct.pack(f"<{len(tokens)}H", *tokens)


def blocked(tmp, *names):
    """A folder of modules that cannot be imported."""
    folder = os.path.join(tmp, "blocked")
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
    check_equal(sorted(os.listdir(out)), [TRAIN, VAL], "files")
    check_equal(printed, f"{out}/{TRAIN}  {n} tokens  V 256\n{out}/{VAL}  {len(text) - n} tokens  V 256\n", "stdout")


def test_split(tmp):
    for length in 2, 10, 11, 19, 999, 1000, 1001:
        text = bytes(i % 251 for i in range(length))
        path = write(os.path.join(tmp, "a.txt"), text)
        for option, n in (["--val", "last:10%"], int(length * 0.9)), ([], int(length * 0.9)), \
                         (["--val", "last:12.5%"], length * 7 // 8), (["--val", "last:50%"], length // 2):
            good("--text", path, "--tokenizer", "byte", *option, "--out", tmp)
            check_equal((read(tmp, TRAIN), read(tmp, VAL)),
                        (token_bytes(text[:n], 256), token_bytes(text[n:], 256)), f"{length} bytes, {option}")


def test_several_files(tmp):
    b, a, c = (write(os.path.join(tmp, name), data) for name, data in
               (("b", b"first"), ("a", b"second"), ("c", b"")))
    for arguments in (b, c, a), (b, "--text", a):
        good("--text", *arguments, "--tokenizer", "byte", "--val", "last:50%", "--out", tmp)
        check_equal(read(tmp, TRAIN), token_bytes(b"first", 256), TRAIN)
        check_equal(read(tmp, VAL), token_bytes(b"second", 256), VAL)


def test_overwrites_whole(tmp):
    """An older, longer file is replaced and a leftover of an interrupted run is gone."""
    write(os.path.join(tmp, TRAIN), bytes(9999))
    write(os.path.join(tmp, TRAIN + ".tmp"), bytes(9999))
    with open(os.path.join(tmp, TRAIN), "rb") as old:
        good("--text", write(os.path.join(tmp, "a"), b"0123456789"), "--tokenizer", "byte", "--out", tmp)
        check_equal(old.read(), bytes(9999), "the old file, to a reader that has it open")
    check_equal(read(tmp, TRAIN), token_bytes(b"012345678", 256), TRAIN)
    check_equal(sorted(os.listdir(tmp)), ["a", TRAIN, VAL], "files")


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
    check_equal(events, [f"fsync {TRAIN}.tmp {1024 + 18}", f"fsync {VAL}.tmp {1024 + 2}",
                         f"rename {TRAIN}.tmp {TRAIN}", f"rename {VAL}.tmp {VAL}", "fsync out"], "what was done")


# ---------------------------------------------------------------------------------------------------------------------
# bad input

def test_usage(tmp):
    a = write(os.path.join(tmp, "a"), b"0123456789")
    out = os.path.join(tmp, "out")
    bad(2, ["--text"], "--out", out)
    bad(2, ["--text"], "--text", "--out", out)
    bad(2, ["--out"], "--text", a)
    bad(2, ["--tokenizer", "gpt3", "byte"], "--text", a, "--out", out, "--tokenizer", "gpt3")
    bad(2, ["--nonsense"], "--text", a, "--out", out, "--nonsense")
    for value in "", "10", "10%", "last:10", "last:%", "last:ten%", "last:nan%", "last:-10%", "last:10%%", \
                 "first:10%", "last:10%\n", "last:0%", "last:0.0%", "last:100%", "last:100.5%", \
                 "last:" + "9" * 400 + "%":
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
    os.mkdir(os.path.join(tmp, TRAIN))
    bad(1, [os.path.join(tmp, TRAIN), "directory"], *options, tmp)
    check_equal(sorted(os.listdir(tmp)), ["a", TRAIN], "files")


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
    both old files must stay, and nothing else."""
    a = write(os.path.join(tmp, "a"), b"0123456789" * 200)
    out = os.path.join(tmp, "out")
    os.mkdir(out)
    for name in TRAIN, VAL:
        write(os.path.join(out, name), b"old")
    bad(1, [VAL, "too large", "--out"], "--text", a, "--tokenizer", "byte", "--val", "last:90%", "--out", out,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    check_equal(sorted(os.listdir(out)), [TRAIN, VAL], "files")
    check_equal((read(out, TRAIN), read(out, VAL)), (b"old", b"old"), "the old files")


def test_full_stdout(tmp):
    if not os.path.exists("/dev/full"):
        raise Skip("no /dev/full here")
    a = write(os.path.join(tmp, "a"), b"0123456789")
    with open("/dev/full", "w") as full:
        p = subprocess.run([sys.executable, PROGRAM, "--text", a, "--tokenizer", "byte", "--out", tmp], stdout=full,
                           stderr=subprocess.PIPE, text=True)
    check_equal((p.returncode, p.stderr.count("\n")), (1, 1), f"exit status and lines of {p.stderr!r}")


def test_interrupt(tmp):
    pipe = os.path.join(tmp, "pipe")
    os.mkfifo(pipe)
    p = subprocess.Popen([sys.executable, PROGRAM, "--text", pipe, "--out", tmp], stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while p.poll() is None:
        try:
            fd = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # fails until the program has opened it to read
            p.send_signal(signal.SIGINT)
            os.close(fd)  # now, or a read begun just after the signal would wait for ever
            p.wait()
        except OSError:
            time.sleep(0.01)
    stderr = p.communicate()[1]
    check_equal((p.returncode, stderr.count("\n")), (130, 1), f"exit status and lines of {stderr!r}")


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
    check_equal(sorted(os.listdir(out)), [TOKENIZER, TRAIN, VAL], "files")

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


def main():
    passed = failed = skipped = 0
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            with tempfile.TemporaryDirectory() as tmp:
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
