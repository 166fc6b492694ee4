"""Tokenizers for hf.py: which one a vocabulary has, and the files that go with an exported model."""
import hashlib, json

from storage import die, read_json, warn

GPT2_TOKENS, ENDOFTEXT = 50257, 50256
VOCABULARY_FILES = ["tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"]  # those that hold tokens
TOKENIZER_FILES = [*VOCABULARY_FILES, "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]

def gpt2_vocabulary(V):
    """Are these GPT-2's tokens, and a few more: added ones, or padding to 50304, as nanoGPT has it?"""
    return GPT2_TOKENS <= V <= 50304

GPT2_TEXTS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # SHA-256 of GPT-2's tokens, a line each
GPT2_FILES = [  # the name here, and OpenAI's address and SHA-256 of it
    ("vocab.json", "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
     "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    ("merges.txt", "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
     "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")]

def tokenizer_texts(folder):
    """The texts of a tokenizer's tokens by number, or none where there is no tokenizer that can be read here."""
    texts = {}
    try:
        if folder.suffix == ".gguf":
            from gguf_storage import open_gguf
            return open_gguf(folder)[1]("tokenizer.ggml.tokens")
        if (folder / "tokenizer.json").is_file():
            t = read_json(folder / "tokenizer.json")
            texts = {i: text for text, i in t["model"]["vocab"].items()} | {a["id"]: a["content"] for a in t.get("added_tokens", [])}
        elif (folder / "vocab.json").is_file():
            more = folder / "added_tokens.json"
            texts = {i: text for path in [folder / "vocab.json", *([more] if more.is_file() else [])] for text, i in read_json(path).items()}
        return [texts.get(i, "") for i in range(max(texts, default=-1) + 1)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None

def describe_vocabulary(folder, V):
    """What a vocabulary that could be GPT-2's by its size turns out to be; nothing where it is just that."""
    more = V - GPT2_TOKENS
    texts = tokenizer_texts(folder) if more >= 0 else None
    if more < 0 or not texts and (more == 0 or not gpt2_vocabulary(V)):
        return ""
    if not texts:
        return f"; taken for GPT-2's {GPT2_TOKENS} tokens and {more} of padding, as {folder} has no tokenizer"
    if hashlib.sha256("\n".join(map(str, texts[:GPT2_TOKENS])).encode("utf-8", "replace")).hexdigest() != GPT2_TEXTS:
        return f"; its tokens are not GPT-2's, by the tokenizer in {folder}: export with --tokenizer"
    if more == 0:
        return ""
    added = [repr(text) for text in texts[GPT2_TOKENS:V] if text]
    names = f", {', '.join(added[:3])}{', ...' if len(added) > 3 else ''}" if added else ""
    return f"; GPT-2's {GPT2_TOKENS} tokens, whose tokenizer suits it, and {more} more{names}"

def byte_tokenizer():
    """Token b is byte b. A tokenizer.json spells bytes as GPT-2 does: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    vocab = {chr(b if b in printable else 256 + others.index(b)): b for b in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": level,
            "post_processor": None, "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": []}}

def known_tokenizer(m):
    """The files, as bytes, of the tokenizer that a vocabulary of this size has; or none, and what the problem is."""
    config = {"model_max_length": m.maxT, "clean_up_tokenization_spaces": False}
    if m.V == 256:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {"tokenizer.json": json.dumps(byte_tokenizer()).encode(), "tokenizer_config.json": json.dumps(config, indent=2).encode()}, None
    problem = f"which tokenizer a vocabulary of {m.V} has is not known here"
    if gpt2_vocabulary(m.V):
        config |= {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")}
        try:
            from tiktoken.load import read_file_cached
            files = {name: read_file_cached(address, sha256) for name, address, sha256 in GPT2_FILES}
            if m.block.title != "GPT-2":  # of these import has said whose tokens are others
                warn(f"GPT-2's tokenizer goes along, by the size of the vocabulary, {m.V}; nothing says that these are its tokens, and "
                     "--tokenizer FOLDER gives another")
            return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}, None
        except ImportError:
            problem = "GPT-2's needs the package tiktoken"
        except Exception as e:  # no network, a proxy's answer, an unwritable cache: all sorts of types
            problem = f"GPT-2's is neither in tiktoken's cache nor on the network ({type(e).__name__})"
    return {}, problem

def given_tokenizer(folder, V):
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not files.keys() & set(VOCABULARY_FILES) or {"vocab.json"} == files.keys() & {*VOCABULARY_FILES, "merges.txt"}:
        die(f"{folder}: no tokenizer, that is none of {', '.join(VOCABULARY_FILES)}, the second with merges.txt")
    texts = tokenizer_texts(folder)
    if texts and len(texts) > V:
        die(f"{folder}: a tokenizer of {len(texts)} tokens, but the model has {V}")
    return files
