#!/usr/bin/env python3
"""
Texts to tokens and back, for models whose tokens only Hugging Face's packages know: prompts, and what was made of them.

    python3 dev/hf/tokens.py encode FOLDER TEXT                 the numbers of its tokens, on one line
    python3 dev/hf/tokens.py encode FOLDER TEXT -o prompt.bin   the same as a token file
    python3 dev/hf/tokens.py encode FOLDER - < TEXT             from standard input
    python3 dev/hf/tokens.py decode FOLDER < NUMBERS            the text of tokens: numbers with anything else between them
    python3 dev/hf/tokens.py gguf FILE.gguf FOLDER              the tokenizer that a file of llama.cpp's has, as such a folder

FOLDER has tokenizer.json or tokenizer.model, as for prepro_owt.py --tokenizer. A text begins as the model wants it, but for
--bare; "<s>" and the like is the token of that name, but for --plain. gguf needs the packages gguf, transformers and torch. Exit
status: 0 done, 1 data and files, 2 usage, 3 out of memory, 130 Ctrl-C or SIGTERM.
"""
import argparse, os, re, signal, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from prepro_owt import fail, load_folder, need, token_file, trying, write_files


def encode(args):
    tokenizer = load_folder(args.folder)
    try:
        text = sys.stdin.buffer.read().decode() if args.text == "-" else args.text
    except UnicodeDecodeError as e:
        fail(f"standard input is not UTF-8 ({e.reason} at byte {e.start})")
    ids = ([] if args.bare else tokenizer.before) + tokenizer.encode(text, special=not args.plain)
    if not args.output:
        with trying("write", "standard output", "give it room"):
            print(*ids, flush=True)
    else:
        path = Path(args.output)
        write_files(str(path.parent), {path.name: token_file(ids, tokenizer.V)})


def decode(args):
    tokenizer = load_folder(args.folder)
    numbers = [number.lstrip(b"0") or b"0" for number in re.findall(b"[0-9]+", sys.stdin.buffer.read())]
    beyond = [number for number in numbers if len(number) > 9 or int(number) >= tokenizer.V]
    if beyond:
        fail(f"{args.folder} has {tokenizer.V} tokens, none of the number {beyond[0].decode():.20}")
    known = [int(number) for number in numbers if int(number) < tokenizer.known]  # padding has no text
    sys.stdout.buffer.write(tokenizer.decode(known).encode() + b"\n")


def from_gguf(args):
    if os.path.exists(args.folder):
        fail(f"{args.folder}: exists already; another folder is meant")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    need("transformers", "the tokenizer of a GGUF file")
    from gguf_storage import write_tokenizer
    try:
        write_tokenizer(Path(args.file), Path(args.folder))
    except OSError as e:
        fail(f"{e.filename or args.folder}: {e.strerror or e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    e = commands.add_parser("encode", help="a text to the numbers of its tokens, or to a token file")
    e.add_argument("folder", metavar="FOLDER")
    e.add_argument("text", metavar="TEXT", help="or - for standard input")
    e.add_argument("-o", dest="output", metavar="FILE.bin", help="a token file, rather than numbers")
    e.add_argument("--bare", action="store_true", help="nothing before the text")
    e.add_argument("--plain", action="store_true", help="names of special tokens in it are text")
    d = commands.add_parser("decode", help="numbers of tokens, from standard input, to their text")
    d.add_argument("folder", metavar="FOLDER")
    g = commands.add_parser("gguf", help="a folder with the tokenizer of a GGUF file")
    g.add_argument("file", metavar="FILE.gguf")
    g.add_argument("folder", metavar="FOLDER")
    for one in (parser, e, d, g):  # argparse would print its usage lines too
        one.error = lambda message: fail(message + " (see --help)", 2)
    args = parser.parse_args()
    {"encode": encode, "decode": decode, "gguf": from_gguf}[args.command](args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except MemoryError:
        fail("out of memory: a text, or a tokenizer, is held whole", 3)
    except KeyboardInterrupt:
        fail("interrupted; no file was left half-written", 130)
