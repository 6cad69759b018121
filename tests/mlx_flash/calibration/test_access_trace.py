"""Which rows a trace says are asked for: those that the running model asks for."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.calibration.probes import Seen
from mlx_flash.calibration.reorder import access_trace
from mlx_flash.conversion.turbosparse import THRESHOLD
from mlx_flash.models.families import find
from mlx_flash.predictors.predictor_file import LayerPredictor
from mlx_flash.predictors.selection import Selection

FFN = find({"model_type": "llama", "hidden_act": "relu"})


def asked_of(layer, scores):
    """(what the trace says, what the predictor of the running model names) for one token."""
    rows = scores.size
    selection = Selection(layer.kind, (layer,), (0,), (0.0,), exact=False, provides=None)
    extent = SimpleNamespace(rows=rows)
    directory = SimpleNamespace(ffn=FFN, rows=SimpleNamespace(layers=[extent]))
    x = mx.ones((1, 1, 1), mx.bfloat16)
    gate = mx.zeros((1, 1, rows), mx.bfloat16)
    mask = access_trace.asked(directory, selection)(Seen(0, x, gate, None, gate))
    return np.flatnonzero(np.array(mask)[0, 0]), layer.build(FFN, rows)(x).rows


@pytest.mark.parametrize("threshold", [THRESHOLD, 0.3, 0.9])
def test_scores_near_the_threshold_in_bfloat16(threshold):
    """A sigmoid in the model's type rounds what lies just below the threshold up to it."""
    near = np.log(threshold / (1 - threshold))
    scores = near + np.linspace(-0.01, 0.01, 201)
    tensors = {"first": mx.ones((1, 1)), "second": mx.array(scores[:, None])}
    tensors = {name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()}
    found, named = asked_of(LayerPredictor("low-rank", threshold, tensors=tensors), scores)
    assert found.tolist() == named.tolist()
    assert 0 < named.size < scores.size


def test_a_layer_that_is_read_whole_asks_for_all():
    found, named = asked_of(LayerPredictor("none"), np.zeros(7))
    assert found.tolist() == named.tolist() == list(range(7))
