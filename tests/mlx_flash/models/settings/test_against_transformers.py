"""One key of a config changed at a time: logits are transformers', or the config is refused.

Families are those whose tiny config, as transformers saves it, makes the model that transformers
makes. Needs torch.
"""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is needed to compare with transformers")

from support import against_transformers as them  # noqa: E402
from support import tiny, tiny_mixtures  # noqa: E402

from mlx_flash.errors import FlashError  # noqa: E402

TOLERANCE = 1e-4
# Families whose tiny config makes no model that both programs can be asked about.
APART = {
    "bailing_hybrid": "another model in mlx-lm under that name",
    "deepseek_v32": "the tokens that its indexer picks differ from 16 on",
    "glm_moe_dsa": "the same",
    "kimi_linear": "transformers' names of tensors are refused",
    "llama4_text": "the same",
    "mimo_v2_flash": "the same",
    "minicpm3": "transformers cannot make the tiny config",
    "minimax": "MiniMax-M2 in mlx-lm, another model in transformers",
    "nanochat": "transformers' names of tensors are refused",
    "nemotron_h": "transformers limits its time steps by another key",
    "olmo_hybrid": "transformers' names of tensors are refused",
    "recurrent_gemma": "the tiny config's keys are not transformers'",
    "solar_open": "the tiny config's first layer is dense",
    "longcat_flash": "transformers cannot make the tiny config",
    "step3p5": "is refused",
}
SENSES = {"kimi_k25", "llama4", "minimax_m3_vl", "mistral3", "mistral4", "muse_glimmer"}
SENSES |= {"muse_spark", "qwen3_5_moe", "qwen3_vl_moe", "gemma4"}  # no text model alone
FAMILIES = sorted(
    name
    for name in {*tiny.TINY, *tiny_mixtures.TINY_MIXTURES}
    if them.known(name) and name not in APART and name not in SENSES
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    from transformers import logging

    torch.set_num_threads(1)
    logging.set_verbosity(50)
    logging.disable_progress_bar()


def outcome(path, config):
    """ "equal", "refused", or "skipped" where transformers cannot make it; else what is wrong."""
    try:
        expected = them.save_model(path, config)
    except Exception:  # transformers', of a value that it cannot take
        return "skipped"
    if not np.isfinite(expected).all():
        return "skipped"
    try:
        found = them.our_logits(path)
    except FlashError:
        return "refused"
    finally:
        shutil.rmtree(path, ignore_errors=True)
    wrong = them.difference(found, expected)
    return "equal" if wrong < TOLERANCE else f"{wrong:.2g} off"


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_computed_or_refused(family, tmp_path):
    config = them.base_config(family)
    assert outcome(tmp_path / "base", config) == "equal"
    found = {}
    for number, (change, keys) in enumerate(them.changes(config)):
        try:
            changed = them.as_saved(config | keys)
        except Exception:  # transformers', of a value that it cannot take
            continue
        found[change] = outcome(tmp_path / str(number), changed)
    wrong = {k: v for k, v in found.items() if v not in ("equal", "refused", "skipped")}
    assert wrong == {}
    assert Counter(found.values())["equal"] >= 9  # the table refuses no more than it has to
