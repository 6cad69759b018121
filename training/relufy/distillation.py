"""The training loop: losses, what makes zeros, state on disk.

Loss: KL of the teacher's next-token distribution to the student's, mean over a half of the tokens
picked at random, plus the relative squared error of the residual stream, mean over tokens and
layers. Zeros come by a threshold that grows (fatrelu) or by a steered penalty on the L1 norm of the
inner activations (relu, drelu), as in ProSparse (arXiv 2402.13516).

Knows: the loop, its files. Does not know: what a student is (``student``), where it begins
(``regression``), what is read (``text``), how an adapter is applied.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from . import regression, teacher, text
from . import student as students
from .settings import Settings, save

QUICK = 16  # windows of each held-out text that are measured while training


class Push:
    """What makes zeros: thresholds that grow, or a penalty whose weight is steered.

    Steered by the mean over layers, smoothed: layers differ in how sparse they like to be. Zeros
    follow a penalty only after tens of steps; one that rises faster or higher than this has broken
    the model by then (SmolLM2 with ReLU: KL 0.2 -> 5 within 15 steps, zeros from 63 to 94 %).
    """

    GROWTH, STEERING, SMOOTH = 0.5, 1.0, 0.9
    LEAST = 1e-5

    def __init__(self, settings: Settings, model: torch.nn.Module) -> None:
        self.settings, self.ffns = settings, students.ffns(model)
        self.weight, self.mean = 1e-3, None

    def target(self, step: int) -> float:
        s = self.settings
        share = min(1.0, step / max(1, s.grown * s.steps))
        return s.first_zeros + share * (s.zeros - s.first_zeros)

    def penalty(self) -> torch.Tensor:
        if self.settings.activation == "fatrelu":
            return torch.zeros(())
        means = [ffn.inner.abs().mean() for ffn in self.ffns]
        return self.weight * sum(m / m.detach().clamp(min=1e-9) for m in means)

    def steer(self, step: int) -> float:
        """After a step; the zeros of its batch."""
        now = torch.stack([ffn.zeros for ffn in self.ffns]).mean().item()
        self.mean = now if self.mean is None else self.SMOOTH * self.mean + (1 - self.SMOOTH) * now
        lacking = self.target(step) - self.mean
        if self.settings.activation == "fatrelu":
            # Slower where the weights are slower, else the last thresholds are ones untrained for.
            growth = self.GROWTH * schedule(self.settings, step)
            for ffn in self.ffns:
                ffn.threshold.mul_(math.exp(growth * lacking))
        else:
            weight = self.weight * math.exp(self.STEERING * lacking)
            self.weight = min(max(weight, self.LEAST), self.settings.penalty)
        return now


def schedule(settings: Settings, step: int) -> float:
    """Learning rate of a step as a share of the highest: rises, then falls on a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.last_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def divergence(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), mean over tokens; both [tokens, vocabulary]."""
    wanted = functional.log_softmax(teacher, -1)
    return functional.kl_div(
        functional.log_softmax(logits, -1), wanted, log_target=True, reduction="batchmean"
    )


@torch.inference_mode()
def perplexity(model: torch.nn.Module, windows: np.ndarray) -> tuple[float, float]:
    """Of every token but a window's first, and the zeros where the model has them."""
    losses, zeros = [], []
    for window in torch.from_numpy(windows).long().split(4):
        losses.append(model(input_ids=window, labels=window, use_cache=False).loss * len(window))
        if isinstance(model.model.layers[0].mlp, students.SparseMLP):
            zeros.append(regression.zeros_of(model) * len(window))
    return math.exp(sum(losses) / len(windows)), sum(zeros) / len(windows)


class Run:
    """One training in a directory: settings.json, log.jsonl, state.pt."""

    def __init__(self, work: Path, gguf: Path, settings: Settings, name: str) -> None:
        self.settings, self.path = settings, work / name
        self.path.mkdir(parents=True, exist_ok=True)
        self.dense, self.tokenizer = teacher.load(gguf, work / "tokenizer")
        # Before hooks are put on the dense model: the student is built from it.
        self.student = students.make(
            self.dense, settings.activation, settings.ffn_rank, settings.attention_rank,
            settings.seed, settings.bypass,
        )  # fmt: skip
        self.chat = np.load(work / "chat.npy")
        self.novels = text.prose(self.tokenizer, False)
        chat = np.load(work / "chat-held-out.npy")
        prose = text.prose(self.tokenizer, True)
        self.held_out = {"chat": chat[:QUICK], "prose": prose[:: len(prose) // QUICK][:QUICK]}
        self.push = Push(settings, self.student)
        trained = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in trained if n.endswith("bypass")], "of": settings.bypass_rate},
            {"params": [p for n, p in trained if not n.endswith("bypass")], "of": 1.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, settings.rate, (0.9, 0.95), weight_decay=0.0)
        self.step, self.seconds = 0, 0.0

    def batches(self, step: int) -> torch.Tensor:
        """The windows of a step: the same ones wherever the training was resumed."""
        s = self.settings
        random = np.random.default_rng([s.seed, step])
        texts = [self.novels if p else self.chat for p in random.random(s.batch) < s.prose_share]
        windows = [windows[random.integers(len(windows))] for windows in texts]
        return torch.from_numpy(np.stack(windows)).long()

    def begin(self) -> None:
        s = self.settings
        state = self.path / "state.pt"
        if state.exists():
            saved = torch.load(state, weights_only=True)
            if Settings(**saved["settings"]) != s:
                raise SystemExit(
                    f"{self.path} was trained with other settings: {saved['settings']}"
                )
            students.restore(self.student, saved["trained"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.push.weight, self.push.mean = saved["push"]
            return
        save(self.path, s)
        self.log({"event": "dense"} | self.measure(self.dense))
        if s.begin_from:
            other = self.path.with_name(s.begin_from) / "state.pt"
            if not other.exists():
                raise SystemExit(f"{other} is not there; train {s.begin_from} first")
            students.restore(self.student, torch.load(other, weights_only=True)["trained"])
            self.log({"event": "eval"} | self.measure(self.student))
            return
        random = np.random.default_rng(s.seed)
        half = s.regression_windows // 2
        picked = [p[random.permutation(len(p))[:half]] for p in (self.novels, self.chat)]
        windows = torch.from_numpy(np.concatenate(picked)).long()
        zeros = s.first_zeros if s.activation == "fatrelu" else None
        started = time.perf_counter()
        errors = regression.begin(self.dense, self.student, windows, zeros)
        self.seconds = time.perf_counter() - started
        self.log({"event": "regression", "errors": [round(e, 4) for e in errors]})
        self.log({"event": "eval"} | self.measure(self.student))

    def train(self, every: int, until: float | None, stop: int | None = None) -> None:
        """Go on to the end, for ``until`` seconds, or to step ``stop``."""
        self.begin()
        s = self.settings
        streams = [students.Streams(m) for m in (self.dense, self.student)]
        late = None if until is None else time.time() + until
        last = min(s.steps, stop or s.steps)
        while self.step < last and not (late and time.time() > late):
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = s.rate * group["of"] * schedule(s, self.step)
            line = self.one(self.batches(self.step), streams)
            line["zeros"] = self.push.steer(self.step)
            self.step += 1
            self.seconds += time.perf_counter() - started
            self.log({"event": "step", "step": self.step, "seconds": round(self.seconds, 1)} | line)
            if self.step % every == 0 or self.step == last:
                self.save()
                self.log({"event": "eval"} | self.measure(self.student))
                for each in streams:
                    each.take()
        self.save()

    def one(self, tokens: torch.Tensor, streams: list[students.Streams]) -> dict[str, float]:
        s = self.settings
        random = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        picked = torch.rand(tokens.numel(), generator=random) < s.kl_share
        with torch.no_grad():
            last = self.dense.model(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = self.dense.lm_head(last.flatten(0, 1)[picked])
            targets = streams[0].take()
        last = self.student.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = self.student.lm_head(last.flatten(0, 1)[picked])
        kl = divergence(wanted, logits)
        errors = [
            ((mine - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1)).mean()
            for mine, theirs in zip(streams[1].take(), targets, strict=True)
        ]
        error = sum(errors) / len(errors)
        loss = kl + s.hidden * error + self.push.penalty()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        found = {"kl": kl.item(), "hidden": error.item(), "norm": norm.item()}
        return {key: round(value, 5) for key, value in found.items()}

    def measure(self, model: torch.nn.Module) -> dict:
        model.eval()
        found = {}
        for name, windows in self.held_out.items():
            found[name], zeros = perplexity(model, windows)
            if zeros:
                found[f"{name}_zeros"] = zeros
        model.train()
        return {"step": self.step} | {key: round(value, 4) for key, value in found.items()}

    def save(self) -> None:
        state = {
            "settings": asdict(self.settings),
            "trained": students.trained(self.student),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "push": (self.push.weight, self.push.mean),
        }
        temporary = self.path / "state.partial"
        torch.save(state, temporary)
        temporary.replace(self.path / "state.pt")

    def log(self, line: dict) -> None:
        with (self.path / "log.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")
        if line["event"] != "step" or line["step"] % 10 == 0:
            print(json.dumps(line), flush=True)
