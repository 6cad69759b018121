"""Tokenizers of GGUF files: how names of rules cut text, templates, metadata of the wrong kind."""

import json

import pytest
from fixtures.gguf_files import vocabulary
from mlx_lm.utils import load_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from mlx_flash.conversion.gguf import tokenizer
from mlx_flash.conversion.gguf.pre_tokenizers import PRE_TOKENIZERS
from mlx_flash.errors import ModelError

TEXT = "HelloWorld's DON'T  12345!?\n\n/x 日本 cafe\u0301\r\n"
# As the tokenizer.json files that the names stand for cut it: what differs between them.
GPT2 = ["HelloWorld", "'s", " DON", "'", "T", " ", " 12345", "!?", "\n", "\n", "/", "x", " 日本"]
GPT2 += [" cafe", "\u0301", "\r\n"]
DIGITS = [*GPT2[:5], "  ", *"12345", *GPT2[7:]]
LINES = ["HelloWorld", "'s", " DON", "'T", " ", " ", "123", "45", "!?\n\n", "/x", " 日本", " cafe"]
LINES += ["\u0301\r\n"]
ONE_DIGIT = [*LINES[:6], *"12345", *LINES[8:]]
CASED = ["Hello", "World's", " DON'T", " ", " ", "123", "45", "!?\n\n/", "x", " 日本"]
CASED += [" cafe\u0301", "\r\n"]
TEKKEN = ["Hello", "World", "'s", " DON", "'T", " ", " ", *"12345", "!?\n\n/", *CASED[8:]]
SEED = [*ONE_DIGIT[:11], "!?", "\n\n", *ONE_DIGIT[12:-1], "\u0301", "\r\n"]
DEEPSEEK_CODER = ["HelloWorld", "'", "s", " DON", "'", "T", "  ", *"12345", "!?", "\n", "\n", "/"]
DEEPSEEK_CODER += ["x", " ", "日本", " cafe", "\u0301", "\r", "\n"]
DEEPSEEK_V3 = ["HelloWorld", "'s", " DON", "'T", "  ", "123", "45", "!?\n\n", "/x", " ", "日本"]
DEEPSEEK_V3 += [" cafe\u0301", "\r\n"]
WORDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), LINES),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), ONE_DIGIT),
    **dict.fromkeys(("gpt-4o", "llama4"), CASED),
    "tekken": TEKKEN,
    "seed-coder": SEED,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-v3": DEEPSEEK_V3,
}


@pytest.mark.parametrize("name", WORDS)
def test_names_cut_text(name):
    words = PRE_TOKENIZERS[name].make(False).pre_tokenize_str(TEXT)
    assert [TEXT[a:b] for _, (a, b) in words] == WORDS[name]


def test_every_name_is_tried():
    assert PRE_TOKENIZERS.keys() == WORDS.keys() | {"default"}


def whole_vocabulary(**changes):
    """A byte-level vocabulary of all bytes and no more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    meta = vocabulary(64)
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab"]
    meta["tokenizer.ggml.tokens"] = tokens
    meta["tokenizer.ggml.token_type"] = [3] * 3 + [1] * (len(tokens) - 3)
    return meta | {f"tokenizer.{key}": value for key, value in changes.items()}


def written(meta, out):
    """What transformers and mlx-lm load."""
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer.write(meta, out, 128)
    return AutoTokenizer.from_pretrained(out), load_tokenizer(out)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_text_comes_back(tmp_path, name):
    plain, wrapped = written(whole_vocabulary(**{"ggml.pre": name}), tmp_path)
    ids = plain.encode(TEXT)
    assert ids == wrapped.encode(TEXT) and (ids[0] == 1) == PRE_TOKENIZERS[name].begins
    expected = TEXT.replace("e\u0301", "é") if PRE_TOKENIZERS[name].nfc else TEXT
    assert plain.decode(ids, skip_special_tokens=True) == expected


def test_templates_with_names(tmp_path):
    meta = whole_vocabulary(chat_template="plain", **{"chat_template.tool_use": "tools"})
    plain, _ = written(meta, tmp_path)
    chat = [{"role": "user", "content": "x"}]
    assert plain.apply_chat_template(chat, tokenize=False) == "plain"
    found = plain.apply_chat_template(chat, tokenize=False, chat_template="tool_use")
    assert found == "tools"


BAD = {
    "tokens": ({"ggml.tokens": 5}, "tokens is 5; expected a list of texts"),
    "numbers": ({"ggml.tokens": [1, 2]}, r"tokens is \[1, 2\]; expected a list of texts"),
    "types": ({"ggml.token_type": "x"}, "token_type is 'x'; expected a list of numbers"),
    "type": ({"ggml.token_type": [9] * 260}, r"tokens of the types \[9\]; expected 1 to 6"),
    "no merges": ({"ggml.merges": []}, "lists of sizes .*'merges': 0"),
    "merges": ({"ggml.merges": 7}, "merges is 7; expected a list of texts"),
    "merge": ({"ggml.merges": ["a"]}, "merge 'a': both parts"),
    "id": ({"ggml.eos_token_id": "two"}, "eos_token_id is 'two'; expected the number of a token"),
    "flag": ({"ggml.bos_token_id": True}, "bos_token_id is True"),
    "below": ({"ggml.eos_token_id": -1}, r"special tokens \{'eos': -1\}"),
    "template": ({"chat_template": 3}, "chat_template is 3; expected a text"),
    "templates": ({"chat_template.x": [1]}, r"chat_template.x is \[1\]; expected a text"),
    "kind": ({"ggml.model": ["gpt2"]}, r"tokenizer kind \['gpt2'\]"),
    "rule": ({"ggml.pre": ["gpt-2"]}, r"tokenizer.ggml.pre is \['gpt-2'\]"),
    "scores": ({"ggml.model": "llama", "ggml.scores": [0.0] * 259 + [float("nan")]}, "not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_metadata_of_the_wrong_kind(name):
    changes, message = BAD[name]
    meta = whole_vocabulary(**changes)
    assert len(whole_vocabulary()["tokenizer.ggml.tokens"]) == 260
    with pytest.raises(ModelError, match=message):
        tokenizer.check(meta)


def test_a_token_of_a_million_characters():
    meta = whole_vocabulary()
    meta["tokenizer.ggml.tokens"][-1] = "a" * 1_000_000
    with pytest.raises(ModelError, match="a token of 1000000 characters; expected at most 1024"):
        tokenizer.check(meta)
