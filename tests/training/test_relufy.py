"""The distillation of a model with zeros, on a tiny llama; needs torch (make test-training)."""

import json
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import make_checkpoint

from mlx_flash import load
from mlx_flash.conversion.convert import convert

torch = pytest.importorskip("torch", reason="needs the extra training: make test-training")

from training.relufy import adapter_file, distillation, regression, teacher, text  # noqa: E402
from training.relufy import student as students  # noqa: E402
from training.relufy.settings import Settings  # noqa: E402

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 48)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("base") / "llama", seed=3, tie_word_embeddings=True
    )


@pytest.fixture
def dense(tmp_path, checkpoint):
    torch.manual_seed(0)
    return teacher.load(checkpoint, tmp_path / "tokenizer")[0]


def student_of(dense, activation="fatrelu"):
    return students.make(dense, activation, 8, 4, seed=0, bypass=activation != "drelu")


def shaken(model):
    """Random deltas and a threshold of its own for each layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if students.ffns(model)[0].activation == "fatrelu":
            for i, ffn in enumerate(students.ffns(model)):
                ffn.threshold.fill_(0.02 * (i + 1))
    return model


def test_the_dense_model_is_mlx_lms(checkpoint, dense):
    from mlx_lm import utils

    model, _ = utils.load_model(checkpoint)
    found = dense(input_ids=TOKENS[:1]).logits.numpy()
    assert np.abs(found - np.array(model(mx.array(TOKENS[:1].numpy())))).max() < 1e-4


def test_before_training_only_the_activation_differs(dense):
    model = student_of(dense, "relu")
    for layer in dense.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    assert torch.allclose(model(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits, atol=1e-5)
    gates = [ffn.gate_proj(torch.randn(64, 64)) for ffn in students.ffns(model)]
    assert all(0.3 < (g <= 0).float().mean() < 0.7 for g in gates)


@pytest.mark.parametrize("activation", students.ACTIVATIONS)
def test_the_adapter_makes_the_student(tmp_path, checkpoint, dense, activation):
    """Thresholds of layers folded in, factors rounded to int8: the same logits in MLX."""
    model = shaken(student_of(dense, activation)).eval()
    file = tmp_path / "tiny.safetensors"
    adapter_file.write(file, dense, model, activation, "a test")
    out = convert(checkpoint, tmp_path / "out", adapter=file)
    found, _ = load(out, use_flash=False)
    with torch.no_grad():
        expected = model(input_ids=TOKENS[:1]).logits.numpy()
        missed = np.abs(np.array(found(mx.array(TOKENS[:1].numpy()))) - expected).max()
        dense_miss = np.abs(dense(input_ids=TOKENS[:1]).logits.numpy() - expected).max()
    assert missed < 0.02 * dense_miss


def test_regression_begins_closer_to_the_dense_model(dense):
    errors = []
    for fit in (False, True):
        model = student_of(dense)
        if fit:
            regression.begin(dense, model, TOKENS, 0.7)
            assert abs(regression.zeros_of(model) - 0.7) < 0.05
        streams = [students.Streams(m) for m in (dense, model)]
        with torch.no_grad():
            logits = [m(input_ids=TOKENS).logits.flatten(0, 1) for m in (dense, model)]
        wanted, mine = (s.take()[-1] for s in streams)
        errors.append((mine - wanted).pow(2).sum() / wanted.pow(2).sum())
        assert distillation.divergence(*logits) > 0
    assert errors[1] < 0.7 * errors[0]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with random windows in the place of sampled ones."""
    random = np.random.default_rng(0)
    for name, count in (("chat", 12), ("chat-held-out", 2)):
        np.save(tmp_path / f"{name}.npy", random.integers(0, 256, (count, 32), np.int32))
    novels = random.integers(0, 256, (32, 32)).astype(np.int32)
    monkeypatch.setattr(text, "WINDOW", 32)
    monkeypatch.setattr(
        text, "prose", lambda _tokenizer, held_out: novels[:16] if held_out else novels[16:]
    )
    return tmp_path


def run(work, checkpoint, name="main", **other):
    asked = {"tokens": 64 * 12, "regression_windows": 4, "ffn_rank": 8, "attention_rank": 4} | other
    return distillation.Run(work, checkpoint, Settings(**asked), name)


def test_a_training_goes_on_where_it_stopped(work, checkpoint):
    whole = run(work, checkpoint, "whole")
    whole.train(every=4, until=None)
    broken = run(work, checkpoint, "broken")
    one = broken.one

    def stop(*given):
        if broken.step == 6:
            raise KeyboardInterrupt
        return one(*given)

    broken.one = stop
    with pytest.raises(KeyboardInterrupt):
        broken.train(every=4, until=None)
    again = run(work, checkpoint, "broken")
    again.train(every=4, until=None)
    first, second = (students.trained(r.student) for r in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_falls(work, checkpoint):
    settings = {"tokens": 64 * 80, "first_zeros": 0.6, "zeros": 0.6, "rate": 5e-3}
    run(work, checkpoint, **settings).train(every=1000, until=None)
    lines = [json.loads(x) for x in (work / "main" / "log.jsonl").read_text().splitlines()]
    losses = [x["kl"] + 3 * x["hidden"] for x in lines if x["event"] == "step"]
    assert len(losses) == 80 and np.mean(losses[-16:]) < 0.8 * np.mean(losses[:16])


def test_other_settings_are_refused(work, checkpoint):
    run(work, checkpoint).train(every=100, until=0)
    with pytest.raises(SystemExit, match="was trained with other settings"):
        run(work, checkpoint, rate=1e-4).train(every=100, until=0)


@pytest.mark.parametrize("activation", students.ACTIVATIONS)
def test_zeros_come(work, checkpoint, activation):
    settings = {
        "activation": activation,
        "bypass": activation != "drelu",
        "tokens": 64 * 100,
        "first_zeros": 0.8,
        "zeros": 0.95,
        "penalty": 10.0,  # random weights give in slowly
        "rate": 3e-3,
    }
    made = run(work, checkpoint, **settings)
    made.train(every=1000, until=None)
    lines = [json.loads(x) for x in (work / "main" / "log.jsonl").read_text().splitlines()]
    zeros = [line["zeros"] for line in lines if line["event"] == "step"]
    assert asdict(made.settings)["activation"] == activation
    assert np.mean(zeros[-5:]) > zeros[0] + 0.04


def test_held_out_topics_are_none_of_the_others():
    assert not set(text.topics(True)) & set(text.topics(False))
    starts = [text.prompt(n, held_out) for n in range(200) for held_out in (False, True)]
    assert len({start for start, _ in starts}) > 150 and {chat for _, chat in starts} == {
        True,
        False,
    }
