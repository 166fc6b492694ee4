"""Turns text into the token files that train_rev_gpt2 reads.

    python3 prepro_owt.py --text FILES... --tokenizer gpt2|byte --val last:10% --out DIR

The FILES are joined in the order given, and the last P per cent of their characters (bytes, for the byte tokenizer)
become the validation text, as nanoGPT prepares tinyshakespeare. Each side is tokenized on its own; no end-of-text
token is added. It makes, little endian and as llm.c has them:

    DIR/train_000000.bin    256 int32 header: 20240520, version 1, number of tokens, vocabulary size V, then zeros;
    DIR/val_000000.bin      then the tokens as uint16
    DIR/gpt2_tokenizer.bin  256 uint32 header: 20240328, version 2, vocabulary size, end-of-text token, then zeros;
                            then for each token one byte of length and its bytes (for gpt2 only: a byte is itself)

The byte tokenizer (V = 256) needs only Python; gpt2 (V = 50257) needs the tiktoken package.
Exit status: 0 done, 1 data and files, 2 usage, 3 out of memory, 130 Ctrl-C.
"""
import argparse
import contextlib
import os
import re
import struct
import sys
from array import array


def fail(message, status=1):
    print("prepro_owt.py:", " ".join(message.split()), file=sys.stderr)  # one line, whatever a path or library put in
    sys.exit(status)


def read_text(paths, as_str):
    """The files as one str, or as one bytes. Line ends stay as they are, so that tokens decode to the same bytes."""
    parts = []
    for path in paths:
        try:
            with open(path, "rb") as f:
                data = f.read()
            parts.append(data.decode("utf-8") if as_str else data)
        except OSError as e:
            fail(f"cannot read {path}: {e.strerror}; --text takes readable text files")
        except UnicodeDecodeError as e:
            fail(f"{path}: byte 0x{data[e.start]:02x} at offset {e.start} is not valid UTF-8; "
                 "convert the file to UTF-8, or use --tokenizer byte")
    text = ("" if as_str else b"").join(parts)
    if not text:
        fail(f"no text in {', '.join(paths)}; --text needs files that are not empty")
    return text


def split_last(text, percent):
    n = int(len(text) * (1 - percent / 100))  # in this order: for 10 it is nanoGPT's int(n*0.9) to the last bit
    for side, part in ("training", text[:n]), ("validation", text[n:]):
        if not part:
            fail(f"--val last:{percent:g}% of {len(text)} {'characters' if isinstance(text, str) else 'bytes'} "
                 f"leaves no {side} text; give more text or another percentage")
    return text[:n], text[n:]


def load_gpt2():
    try:
        import tiktoken
    except ImportError as e:
        fail(f"--tokenizer gpt2 needs the tiktoken package ({e}): pip install tiktoken, or use --tokenizer byte")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # no network, a proxy's answer, an unwritable cache: all sorts of types
        fail(f"tiktoken cannot get its gpt2 vocabulary ({type(e).__name__}); run once with a network connection, "
             "or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it")


def token_file(tokens, V):
    if len(tokens) >= 2**31:
        fail(f"{len(tokens)} tokens are too many for one file, whose header counts to {2**31 - 1}; give less text")
    ids = array("H", iter(tokens))  # iter, because array takes a bytes object for packed uint16
    if sys.byteorder == "big":
        ids.byteswap()
    return (20240520, 1, len(tokens), V), ids


def tokenizer_file(enc):
    tokens = [enc.decode_bytes([i]) for i in range(enc.n_vocab)]  # <|endoftext|> comes as its own text
    return (20240328, 2, enc.n_vocab, enc.eot_token), b"".join(bytes([len(t)]) + t for t in tokens)


def save(out, files):
    """Writes {name: (header, body)} to the folder: all aside, then all renamed. What can fail for want of space or
    rights does so before the first rename, so that no new training file is left beside an old validation file."""
    path = out
    try:
        os.makedirs(out, exist_ok=True)
        for name, (header, body) in files.items():
            path = os.path.join(out, name + ".tmp")
            with open(path, "wb") as f:
                f.write(struct.pack("<256I", *header, *[0] * (256 - len(header))))
                f.write(body)
                f.flush()
                os.fsync(f.fileno())
        for name in files:
            path = os.path.join(out, name)
            os.replace(path + ".tmp", path)
        path = out
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)  # a rename is on the disk only once its folder is
        os.close(folder)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}; --out needs a folder with room that you may write to")
    finally:
        for name in files:  # after a success there is none left
            with contextlib.suppress(OSError):
                os.remove(os.path.join(out, name + ".tmp"))


def last_percent(value):
    match = re.fullmatch(r"last:([0-9]+(\.[0-9]+)?)%", value)
    if not match or not 0 < float(match[1]) < 100:
        raise argparse.ArgumentTypeError(f"'{value}' should be last:P% with P between 0 and 100, as in last:10%")
    return float(match[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(message + " (see --help)", 2)  # argparse would print its usage lines too
    parser.add_argument("--text", nargs="+", action="extend", required=True, metavar="FILE", help="text files")
    parser.add_argument("--tokenizer", choices=["gpt2", "byte"], default="gpt2", help="default gpt2")
    parser.add_argument("--val", type=last_percent, default="last:10%", metavar="SPLIT",
                        help="the share held out for validation, default last:10%%")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the token files, made if missing")
    args = parser.parse_args()

    gpt2 = args.tokenizer == "gpt2"
    train, val = split_last(read_text(args.text, as_str=gpt2), args.val)
    enc = load_gpt2() if gpt2 else None
    encode, V = (enc.encode_ordinary, enc.n_vocab) if gpt2 else (bytes, 256)
    files = {"train_000000.bin": token_file(encode(train), V), "val_000000.bin": token_file(encode(val), V)}
    if gpt2:
        files["gpt2_tokenizer.bin"] = tokenizer_file(enc)
    save(args.out, files)
    lines = [f"{os.path.join(args.out, name)}  {header[2]} tokens  V {V}\n" for name, (header, _) in files.items()]
    try:
        os.write(1, os.fsencode("".join(lines)))  # past Python's buffer, whose failure at exit would be a traceback
    except OSError as e:
        fail(f"the files are written, but standard output is not: {e.strerror}")


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        fail("out of memory: the whole text is held at once; give less text", 3)
    except KeyboardInterrupt:
        fail("interrupted; no file was left half-written", 130)
