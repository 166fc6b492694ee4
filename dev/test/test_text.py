"""Tests that sample_rev_gpt2 cuts a prompt into the tokens that tiktoken finds.

    python3 dev/test/test_text.py

Needs a C compiler and tiktoken's gpt2 vocabulary; where that cannot be had, nothing is tested.
"""
import os
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, os.pardir)
PROGRAM = r'''
#define SAMPLE_NO_MAIN
#include "%s"
int main(int argc, char **argv) {
    static char text[1 << 20];
    static int tokens[1 << 20];
    Tokenizer z = tokenizer_open(argv[1], 50257);
    text[fread(text, 1, sizeof text - 1, stdin)] = 0;
    Index x = index_open(&z);
    for (int i = 0, n = encode(&x, text, argc == 3, tokens); i < n; i++) printf("%%d\n", tokens[i]);
    return 0;
}
''' % os.path.join(ROOT, "dev", "sample", "sample.c")
TEXTS = [
    "Hello, world!  It's 12,345 o'clock; we'll see they've I'd you're I'm DON'T it'S\n\n\n x\t\ty \n z   ",
    "Ça va? façade — “quoted” text… l’été\u00a0fin ½ x² €5 ±7 °C ™ © ¿Qué? « » ª º µ ŝŭ ʰ → ≤ ∞ ﬁ Ⅷ ①",
    "Привет, мир! Ελληνικά. 日本語のテキスト、これは。 한국어 עברית العربية １２３ 🎉🎊 emoji👍🏽!",
    " leading", "\n", " ", "a", "'", "''s", "<|endoftext|>", "1st 2nd 3.14e-10 0x7F foo_bar(baz)[i++] #!/bin/sh",
    " <|endoftext|><|endoftext|>!<|endoftext|> <|endoftext", "!?<|endoftext|>\n", "a" * 3000, " " * 3000 + "x",
    "antidisestablishmentarianism" * 200, "0123456789" * 300, "\U0001F389" * 500, "\n" * 2000,  # long words
]


def main():
    try:
        import tiktoken
        enc = tiktoken.get_encoding("gpt2")
    except Exception as e:  # no package, no network: all sorts of types
        print(f"skipped, no gpt2 vocabulary ({type(e).__name__})\n0 passed, 0 failed")
        return 0
    passed = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        source, program, table = (os.path.join(folder, name) for name in ("p.c", "p", "gpt2_tokenizer.bin"))
        text = os.path.join(folder, "x.txt")
        with open(source, "w") as f:
            f.write(PROGRAM)
        with open(text, "w") as f:
            f.write("some text")
        subprocess.run([os.environ.get("CC", "cc"), "-O2", "-w", "-o", program, source, "-lm"], check=True)
        subprocess.run([sys.executable, os.path.join(ROOT, "prepro_owt.py"), "--text", text, "--val", "last:50%",
                        "--out", folder], check=True, stdout=subprocess.DEVNULL)
        files = [os.path.join(ROOT, name) for name in ("README.md", "train_rev_gpt2.c", "prepro_owt.py")]
        for text in TEXTS + [open(name, encoding="utf-8").read()[:40000] for name in files]:
            # an end of text in the prompt is the token; with --plain it is text
            for special, wanted in ([], enc.encode_ordinary(text)), (["special"], enc.encode(text, allowed_special="all")):
                out = subprocess.run([program, table, *special], input=text.encode(), stdout=subprocess.PIPE, check=True).stdout
                same = [int(token) for token in out.split()] == wanted
                passed, failed = passed + same, failed + (not same)
                if not same:
                    print("FAILED:", *special, repr(text[:70]))
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
