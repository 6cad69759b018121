"""config.json of a model directory: reading, writing, where it says the FFN is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_lm import utils

from mlx_flash.common.files import atomic_write, sha256_of_json
from mlx_flash.common.json_reader import read_json
from mlx_flash.errors import FlashError, ModelError, naming
from mlx_flash.models import families, mixtures
from mlx_flash.models.families import Ffn
from mlx_flash.models.mixtures import Mixture
from mlx_flash.models.plausible import check_counts


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write config.json as transformers would, whole or not at all."""
    text = json.dumps(utils._encode_tagged_floats(config), indent=2)
    atomic_write(path, text + "\n")


FORMAT_VERSION = 2
ROW_FILE = "ffn_rows.safetensors"
MAX_CONFIG = 16 << 20  # bytes of config.json; quantisations that name every module have 1 MB
# How transformers writes floats that JSON has no word for: {"__float__": "Infinity"}.
TAGGED_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory as a dict; ModelError where it is missing or cannot be read."""
    file = path / "config.json"
    try:
        if not path.is_dir():
            raise ModelError(f"no such model directory: {path}")
        if not file.is_file():
            raise ModelError(f"{path} has no config.json; expected a Hugging Face model directory")
        config = read_json(file, MAX_CONFIG, object_hook=_untagged)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, expected a JSON object")
    with naming(path, ModelError):
        check_counts(config)
    return config


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() == {"__float__"} and isinstance(tag := value["__float__"], str):
        return TAGGED_FLOATS.get(tag, value)
    return value


def locate_ffn(config: dict[str, Any], path: Path) -> tuple[Ffn | None, Mixture | None]:
    """The entry of a config's model in the table of dense families or in that of mixtures.

    Returns:
        (dense, mixture), one of which is None.

    Raises:
        ModelError: neither table has the family, or the config contradicts it; names the file.
    """
    try:
        mixture = mixtures.find_mixture(config)
        return (None if mixture else families.find(config)), mixture
    except FlashError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path / 'config.json'} has a value of the wrong kind: {error}; expected the config "
            "that the model was published with"
        ) from error


def config_sha256(config: dict[str, Any]) -> str:
    """Hash of a config but for the place where the hash itself is kept."""
    flash = {key: value for key, value in config["flash"].items() if key != "config_sha256"}
    return sha256_of_json({**config, "flash": flash})
