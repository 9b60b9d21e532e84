"""Records what llama.cpp makes of our texts, so that the tests can compare without it: data/tokenizer_reference.json.

Run with llama-cpp-python installed (`make oracles`): python tests/loading/record_tokenizer_reference.py [SMOLLM2.gguf GEMMA3.gguf]
The two small vocabularies are trained here on the texts themselves and stored in the record; the two real ones are only named.
"""

import json
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).parent / "data" / "tokenizer_reference.json"

TEXTS = [
    "Hello, world! It's a tradespace: you can't have all of it, they'll say. I'M SURE, WE'LL SEE.",
    "memory is a budget that you state, and not an accident that you discover",
    "  two leading spaces, a tab\there, trailing spaces   ",
    "line one\nline two\n\nline four\r\nwindows\r\n\r\n  indented\n\t\ttabs\n",
    "numbers 1 12 123 1234 12345678 3.14159 1e-5 0x7f 2026-11-22 1,000,000",
    "def kv_bytes(layer, num_tokens):\n    return 2 * layer.K * layer.H * num_tokens  # keys && values\n",
    "a+b==c<=d>=e^f~g|h`i`$j$ ((x)) [[y]] {{z}} <<<>>> !!! ??? ... --- ''' \"\"\"",
    "naïve café Zürich Øresund façade übergroß ŒUVRE ﬁne",
    "Привет, мир! 中文分词测试。日本語のテキスト、한국어 문장. مرحبا بالعالم नमस्ते",
    "emoji 🙂🚀👨‍👩‍👧 flags 🇨🇭 accents e\u0301 a\u0308",
    "½ ² Ⅷ ٣٤٥ ①②③ １２３ digits of other scripts",
    "non\u00a0breaking\u2003em\u200bzero\u3000wide\u2028line",
    "control \x00\x01\x1b\x7f characters \ufffd",
    "<|begin|>special tokens<|end|> in the text<|end|><|begin|> <|end|>",
    "almost special <|begin <|end| |> <0x0A> <0xZZ>",
    "<tag> user-defined </tag><tag>\n\n\n\n\n<tag>   <tag>",
    "don't DON'T you're YOU'RE 'tis 'sup 'Twas he'd HE'D",
    "CamelCaseWords mixedUPPERlower snake_case kebab-case x86_64 GPT4o",
    " ",
    "\n",
    "      ",
    "a",
    "▁literal▁marks ▁ Ġ Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbb abababababab",
    "https://example.org/a?b=c&d=e#f user@example.org C:\\path\\file",
    "\u0130stanbul \u017fharp \u212aelvin 'ſ'",
]
SPECIAL, USER_DEFINED = ["<unk>", "<|begin|>", "<|end|>"], ["<tag>", "</tag>", "\n\n", "\n\n\n", "  ", "   "]


def byte_level_vocabulary() -> dict:
    """GGUF metadata of a small byte-level BPE, trained on the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*tokens, *USER_DEFINED],
        "tokenizer.ggml.token_type": [*types, *[4] * len(USER_DEFINED)],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in state["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentence_piece_vocabulary() -> dict:
    """GGUF metadata of a small vocabulary of the SentencePiece kind: bytes, characters, and merged pieces with falling scores."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [part for text in TEXTS[:11] for part in text.replace(" ", " \0").split("\0")]
    tokenizer.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=500, limit_alphabet=120, show_progress=False))
    state = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in state["merges"]]
    alphabet = [token for token in sorted(state["vocab"], key=state["vocab"].__getitem__) if token not in set(merged)]
    pieces = [piece for piece in dict.fromkeys(merged + alphabet) if piece not in USER_DEFINED]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SPECIAL, *byte_tokens, *pieces, *USER_DEFINED]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), *[4] * len(USER_DEFINED)]
    scores = [0.0] * (len(SPECIAL) + 256) + [float(-rank) for rank in range(len(pieces))] + [-1000.0] * len(USER_DEFINED)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def ids_of_llama_cpp(path: Path) -> list[list[int]]:
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]


def main() -> None:
    import llama_cpp

    from tradespace.loading.gguf import write_gguf
    from tradespace.loading.gguf_tokenizer import PRE_TOKENIZERS

    vocabularies = {"byte_level": byte_level_vocabulary(), "sentence_piece": sentence_piece_vocabulary()}
    variants = [("byte_level", {"tokenizer.ggml.pre": name}) for name in PRE_TOKENIZERS]
    variants += [("byte_level", {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})]
    variants += [("sentence_piece", {}), ("sentence_piece", {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary, changes in variants:
            path = Path(folder) / "vocabulary.gguf"
            types = {"tokenizer.ggml.scores": "array[float32]", "tokenizer.ggml.token_type": "array[int32]"}
            write_gguf(path, vocabularies[vocabulary] | changes, [], types={key: kind for key, kind in types.items() if key in vocabularies[vocabulary]})
            cases.append({"vocabulary": vocabulary, "changes": changes, "ids": ids_of_llama_cpp(path)})
    real = {name: ids_of_llama_cpp(Path(path)) for name, path in zip(("smollm2-135m", "gemma3-270m"), sys.argv[1:], strict=False)}
    record = {"llama_cpp_python": llama_cpp.__version__, "texts": TEXTS, "vocabularies": vocabularies, "cases": cases, "real": real}
    lines = json.dumps(record, ensure_ascii=True, separators=(",", ":"))
    RECORD.write_text(lines.replace('{"vocabulary"', '\n{"vocabulary"').replace('"real"', '\n"real"') + "\n")


if __name__ == "__main__":
    main()
