"""Distils a model with real zeros in its FFN from a dense SwiGLU one, as a small adapter.

    pip install -e ".[training]"
    python -m training.relufy sample --work out/relu      # text of the dense model, 15 minutes
    python -m training.relufy train  --work out/relu      # resumable: the same command goes on
    python -m training.relufy export --work out/relu -o relu-smollm2.safetensors
    python -m training.relufy curves --work out/relu -o curves.png

Read in this order: ``text`` (what is read), ``teacher`` (the dense model), ``student`` (what is
trained), ``regression`` (where it begins), ``settings`` and ``distillation`` (the loop),
``adapter_file`` (what comes out), ``curves``.

Knows: training in torch. Does not know: how an adapter is applied to a checkpoint
(``mlx_flash.conversion.adapter``).
"""
