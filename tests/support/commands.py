"""The command line run in this process, and what it is held against."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm import stream_generate, utils
from mlx_lm.sample_utils import make_sampler

from mlx_flash import cli
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.memory_plan import least_budget
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

PROMPT = "the brown fox and the other"


def run_command(
    capsys: pytest.CaptureFixture[str], command: str, *flags: object
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); never a traceback."""
    capsys.readouterr()
    try:
        code = cli.main([command, *map(str, flags)])
    except SystemExit as exit_:  # argparse
        code = exit_.code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def budget(model, tokens, prompt=PROMPT):
    """(least, dense) that the planner asks for, as the command line sees it."""
    directory = ModelDirectory(model)
    context = len(utils.load_tokenizer(model).encode(prompt)) + tokens
    options = PagingOptions(context=context)
    needs = memory_requirements(directory, RowReader(directory.rows), options)
    return least_budget(needs, options), needs.dense


def reference(source, tokens=16, prompt=PROMPT, seed=0, **sampling):
    """mlx-lm's own run of the checkpoint: token numbers and text."""
    model, tokenizer = utils.load(str(source))
    mx.random.seed(seed)
    sampler = make_sampler(**sampling)
    found = list(stream_generate(model, tokenizer, prompt, max_tokens=tokens, sampler=sampler))
    return [r.token for r in found], "".join(r.text for r in found)
