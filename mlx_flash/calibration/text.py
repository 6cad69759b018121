"""The text that a model is calibrated on: found, checked, tokenised, cut into sequences.

It has three parts that do not overlap, in the order of the text: training (predictors are fitted to
it), validation (their rank and threshold are chosen by it) and held-out (figures are reported of
it). The default is Jane Austen's Persuasion (1818, public domain), which ships with the package.
LLM in a flash (section 3.1) fits its predictors on 10,000 samples of C4.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.errors import CalibrationError

DEFAULT = Path(__file__).with_name("data") / "persuasion.txt"
SEQUENCE = 512
MIN_SEQUENCE = 32
MIN_TRAIN, MIN_VALIDATION, MIN_HELD_OUT = 1024, 512, 512
MIN_TOKENS = MIN_TRAIN + MIN_VALIDATION + MIN_HELD_OUT
CHARS_PER_TOKEN = 40  # characters read per token wanted, at most: training picks from them
SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")


@dataclass(frozen=True)
class CalibrationText:
    """Sequences of token ids, each behind the token that the model's texts begin with, if any.

    Args:
        source: file or hub name, for reports.
        sha256: of all token ids used.
        train, validation, held_out: int32 [sequences, length].
    """

    source: str
    sha256: str
    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray

    @property
    def length(self) -> int:
        """Number of tokens in a sequence."""
        return self.train.shape[1]

    def parts(self) -> dict[str, np.ndarray]:
        """Name -> sequences, in the order in which they are run."""
        return {
            "train": self.train,
            "validation": self.validation,
            "held_out": self.held_out,
        }

    def describe(self) -> dict[str, Any]:
        """For the report."""
        counts = {f"{name}_tokens": part.size for name, part in self.parts().items()}
        return {"source": self.source, "sha256": self.sha256, "sequence": self.length} | counts


def load(
    data: str | Path | None, tokenizer: Any, tokens: int, positions: int | None, seed: int
) -> CalibrationText:
    """Read, tokenise and cut the text to calibrate on.

    Args:
        data: file (text, JSON lines, JSON, parquet; may be gzipped), data set on the hub as
            "owner/name" or "owner/name:file", or None for the text that ships with the package.
        tokenizer: mlx-lm's or transformers'.
        tokens: number to train on; an eighth of it is for validation, a quarter held out. A shorter
            text gives fewer.
        positions: the longest sequence that the model was made for, if known.
        seed: picks the training sequences from a longer text.

    Raises:
        CalibrationError: the text is missing, not text, or too short.
    """
    if tokens < MIN_TRAIN:
        raise CalibrationError(f"{tokens} tokens to train on; expected at least {MIN_TRAIN}")
    wanted = (tokens, max(MIN_VALIDATION, tokens // 8), max(MIN_HELD_OUT, tokens // 4))
    text, source = read(data, sum(wanted) * CHARS_PER_TOKEN)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)
    if ids.size < MIN_TOKENS:
        raise CalibrationError(
            f"{source} has {ids.size} tokens for this model's tokenizer; calibration needs at "
            f"least {MIN_TOKENS}, {sum(wanted)} would be right; give a longer --data"
        )
    first = _first_token(tokenizer)
    length = min(SEQUENCE, positions or SEQUENCE, max(MIN_SEQUENCE, ids.size // 16))
    cut = _sequences(ids, length, first)
    train, validation, held_out = _parts(len(cut), [-(-n // length) for n in wanted], seed)
    used = np.concatenate([cut[train], cut[validation], cut[held_out]])
    digest = hashlib.sha256(used.tobytes()).hexdigest()
    return CalibrationText(source, digest, cut[train], cut[validation], cut[held_out])


def _first_token(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, as a list that may be empty."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


def _sequences(ids: np.ndarray, length: int, first: Sequence[int]) -> np.ndarray:
    step = length - len(first)
    count = ids.size // step
    cut = ids[: count * step].reshape(count, step)
    return np.concatenate([np.tile(np.int32(first), (count, 1)), cut], axis=1).astype(np.int32)


def _parts(count: int, wanted: Sequence[int], seed: int) -> tuple[np.ndarray, ...]:
    """Sequence numbers of each part; fewer of each where ``count`` is less than ``wanted``."""
    if count < sum(wanted):
        share = count / sum(wanted)
        validation, held_out = (max(1, int(n * share)) for n in wanted[1:])
        train = count - validation - held_out
    else:
        train, validation, held_out = wanted
    before = count - validation - held_out
    chosen = np.sort(np.random.default_rng(seed).permutation(before)[:train])
    rest = np.arange(before, count)
    return chosen, rest[:validation], rest[validation:]


def read(data: str | Path | None, limit: int) -> tuple[str, str]:
    """(text of about ``limit`` characters at most, its name)"""
    if data is None:
        return _read_file(DEFAULT, limit), "Persuasion (ships with mlx_flash)"
    path = Path(data)
    if path.is_dir():
        raise CalibrationError(f"{path} is a directory; --data is a text file or a hub data set")
    if path.exists():
        return _read_file(path, limit), str(data)
    if match := HUB_NAME.fullmatch(str(data)):
        return _read_file(_download(match[1], match[2]), limit), str(data)
    raise CalibrationError(
        f"there is no file {data}; --data is a text file, or a data set on the hub as "
        "owner/name or owner/name:file"
    )


def _read_file(path: Path, limit: int) -> str:
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            text = _joined(_parquet(path), limit)
        elif name.removesuffix(".gz").endswith((".jsonl", ".json")):
            text = _joined(_json_texts(path), limit)
        else:
            with _open(path) as f:
                text = f.read(limit)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not text in UTF-8 (byte {error.start} of a block is "
            f"0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if "\0" in text:
        raise CalibrationError(f"{path} is binary, it holds zero bytes; expected a text file")
    if not text.strip():
        raise CalibrationError(f"{path} holds no text; calibration needs {MIN_TOKENS} tokens")
    return text


def _open(path: Path) -> Any:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8")


def _joined(texts: Iterator[str], limit: int) -> str:
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text) + 2
        if size >= limit:
            break
    return "\n\n".join(parts)


def _json_texts(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines, or of one JSON list."""
    with _open(path) as f:
        head = f.readline()
        if head.lstrip().startswith("["):
            yield from _fields(path, _parsed(path, head + f.read(), "it"))
            return
        lines = (line for part in ([head], f) for line in part)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _fields(path, [_parsed(path, line, f"line {number}")])


def _parsed(path: Path, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: {what} is not JSON: {error}") from error


def _fields(path: Path, records: Any) -> Iterator[str]:
    for record in records:
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise CalibrationError(
                f"{path} holds a record without a text; expected objects with a field 'text'"
            )
        yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise CalibrationError(
            f"reading {path.name} needs pyarrow: pip install pyarrow, or give a .txt or .jsonl"
        ) from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)
    except (ArrowException, KeyError) as error:
        raise CalibrationError(
            f"{path} is not a parquet file with a column 'text': {error}"
        ) from error


def _download(repo: str, file: str | None) -> Path:
    """A text file of a data set, from the hub or its cache."""
    import huggingface_hub

    try:
        if file is None:
            files = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
            texts = sorted(
                (f for f in files if f.lower().endswith(SUFFIXES)),
                key=lambda f: (f.lower().endswith(".parquet"), "train" not in f.lower(), f),
            )
            if not texts:
                raise CalibrationError(
                    f"the data set {repo} has no text files ({', '.join(SUFFIXES)}); it has: "
                    f"{', '.join(sorted(files)[:8])}"
                )
            file = texts[0]
        return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))
    except CalibrationError:
        raise
    except Exception as error:  # the hub's own, its HTTP library's, the disk's: no text comes
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CalibrationError(
            f"there is no file {repo}, and the hub does not give a data set of that name "
            f"({lines[0]}); give a local text file, or leave --data out"
        ) from error
