"""How many tokens configs say that their models are for."""

import pytest

from mlx_flash.models.positions import LIMITS, positions_of

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("key", LIMITS)
def test_every_spelling(key):
    assert positions_of({key: 64}) == 64
    assert positions_of({"text_config": {key: 64}}) == 64
    assert positions_of({key: 64, "rope_scaling": {"type": "linear", "factor": 2}}) == 128


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "64", "n_positions": True}, None),
        ({"max_position_embeddings": 128, "rope_scaling": YARN}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": YARN}, 512),  # stretched already
        ({"max_position_embeddings": 128, "rope_parameters": YARN | {"rope_theta": 1e6}}, 512),
        ({"max_position_embeddings": 128, "rope_parameters": {"rope_type": "default"}}, 128),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": 4}}, 512),
        # llama 3.1: a low and a high frequency besides; the stated limit is the longer one.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        # phi3's longrope has no factor, and its original length at the top.
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
            },
            131072,
        ),
        # Kinds of layers with ropes of their own.
        (
            {
                "text_config": {
                    "max_position_embeddings": 128,
                    "rope_parameters": {
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                        "full_attention": {"rope_type": "linear", "factor": 8.0},
                    },
                }
            },
            1024,
        ),
        ({"n_positions": 64, "rope_scaling": {"factor": float("inf")}}, 64),
        ({"n_positions": 64, "rope_scaling": {"factor": -2}}, 64),
        ({"n_positions": 64, "rope_scaling": "yarn", "text_config": []}, 64),
    ],
)
def test_scaled_by_rope(config, limit):
    assert positions_of(config) == limit
