"""Rebuild the inputs of tests/golden (formula in its README) and read the official code's outputs."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())
_MODULUS = 1_000_003


def formula(name: str, shape: list[int], std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    h = zlib.crc32(f"{MANIFEST['seed']}:{name}".encode())
    a, b = 1 + h % 9973, 1 + (h // 9973) % 9967
    k = np.arange(min(math.prod(shape), _MODULUS), dtype=np.int64)
    c = (k * k % _MODULUS) * k % _MODULUS
    p = (a * c + b * k + h % _MODULUS) % _MODULUS
    w = mean + std * math.sqrt(2) * np.sin(2 * math.pi * p / _MODULUS)
    # p depends on k modulo _MODULUS alone: the rest of a large tensor repeats.
    return torch.from_numpy(np.resize(w.astype(np.float32), shape))


def inputs(case: str) -> dict[str, torch.Tensor]:
    """Return every input tensor of a case by its spec name, checked against the manifest."""
    out = {}
    for spec in MANIFEST["cases"][case]["specs"]:
        t = formula(spec["name"], spec["shape"], spec["std"], spec["mean"])
        torch.testing.assert_close(
            t.flatten()[:3].double(), torch.tensor(spec["check_first3"], dtype=torch.float64), rtol=0, atol=1e-6
        )
        out[spec["name"]] = t
    return out


def outputs(case: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / MANIFEST["cases"][case]["file"])
