"""What a checkpoint is, told from its configuration and the headers of its weight files, without torch."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import CheckpointError
from ..growth.architectures import Architecture, GroupEntry, frozen_names, row_of, token_groups
from ..models.names import BESIDE, BOTH, IMAGE, TEXT
from .verify import Header, config_fields, is_old_buffer, read_headers

_TAKES_PART = {TEXT: "for text", IMAGE: "for images", BOTH: "for images and text after them"}
# Bytes of a number in safetensors' types.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 0.25}  # packed, four in a byte


def checkpoint_facts(path: str | Path) -> dict[str, Any]:
    """Say what a checkpoint is, in numbers: what `tokenformer inspect --json` prints.

    Counts are of parameters, so without buffers such as gates; of packed maps' rows up to a multiple of four. "bytes"
    are those of the files, "training_bytes" of float32 weights, gradients and AdamW's two moments.

    Raises:
        CheckpointError: missing, damaged or truncated files.
    """
    try:
        return _facts(path)
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, StopIteration) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit its own config.json: {type(error).__name__} {error}"
        ) from error


def _facts(path: str | Path) -> dict[str, Any]:
    fields = config_fields(path)
    config: Any = SimpleNamespace(**{"model_type": None, **fields})
    row = row_of(config)
    found = {n: h for n, h in read_headers(path).items() if h.dtype in _BYTES and not is_old_buffer(n)}
    if row is None:
        return _facts_of_sites(path, config, {name: h for name, h in found.items() if ".gates." not in name})
    headers = {name: found[stored] for stored, name in row.names_in_memory(found).items()}
    blocks = {number for name in headers if (number := row.block_number(name)) is not None}
    setattr(config, row.depth, len(blocks))
    if not fields.get("token_groups"):
        for projection, field in row.counts.items():  # configurations may leave them out
            setattr(config, field, _neurons(row, headers, projection))
    parameters = {n: header for n, header in headers.items() if ".gates." not in n and not n.endswith("_scale")}
    groups = [_group(config, row, group, parameters) for group in token_groups(config)]
    groups += _groups_of_sites(config, parameters)
    total, size = _sizes(parameters)
    norm = headers.get(f"{row.prefix}.{row.final_norm}.weight")
    return {
        "checkpoint": str(path),
        "kind": fields.get("norm_activation_type", fields["model_type"]),
        "parameters": total,
        "bytes": size,
        "training_bytes": 16 * total,
        "num_hidden_layers": len(blocks),
        "num_loops": fields.get("num_loops", 1),
        "hidden_size": norm.shape[0] if norm else fields.get("hidden_size"),
        "vocab_size": fields.get("vocab_size"),
        "labels": len(fields["id2label"]) if row.auto == "AutoModelForImageClassification" else None,
        "groups": groups,
        "everything_else": {
            "parameters": total - sum(group["parameters"] for group in groups),
            "bytes": size - sum(group["bytes"] for group in groups),
        },
    }


def _facts_of_sites(path: str | Path, config: Any, parameters: dict[str, Header]) -> dict[str, Any]:
    """Say the same of a model whose token groups lie at linear maps alone."""
    groups, (total, size) = _groups_of_sites(config, parameters), _sizes(parameters)
    return {
        "checkpoint": str(path),
        "kind": config.model_type,
        "parameters": total,
        "bytes": size,
        "training_bytes": 16 * total,
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "hidden_size": getattr(config, "hidden_size", None),
        "vocab_size": getattr(config, "vocab_size", None),
        "labels": None,
        "groups": groups,
        "everything_else": {
            "parameters": total - sum(group["parameters"] for group in groups),
            "bytes": size - sum(group["bytes"] for group in groups),
        },
    }


def _groups_of_sites(config: Any, headers: dict[str, Header]) -> list[dict[str, Any]]:
    listed: dict[str, list[dict[str, Any]]] = {}
    for site in (getattr(config, "token_sites", None) or {}).values():
        for name, group in site["groups"].items():
            listed.setdefault(name, []).append(group)
    found = []
    for name, groups in listed.items():
        inside = {n: h for n, h in headers.items() if f".{BESIDE}.groups.{name}." in n}
        numbers, size = _sizes(inside)
        counts = [group["tokens"] for group in groups]
        notes = ["routed"] if any(group.get("routed") for group in groups) else []
        found.append(
            {
                "name": name,
                "counts": {"linear maps": [min(counts), max(counts)]},
                "tokens": sum(counts),
                "parameters": numbers,
                "bytes": size,
                "notes": [*notes, *(["frozen"] if name in frozen_names(config) else [])],
            }
        )
    return found


def _group(config: Any, row: Architecture, group: GroupEntry, headers: dict[str, Header]) -> dict[str, Any]:
    parameters = tokens = 0
    size = 0.0
    for block in range(row.depth_of(config)):
        for token_map in row.maps:
            count = group.count(token_map.projection, block)
            together = sum(other.count(token_map.projection, block) for other in token_groups(config))
            tokens += count
            for part in token_map.parts:
                header = headers.get(row.block_name(block) + part.stored.format(group=group.name))
                if header is None:
                    continue
                numbers = _numbers(header) // part.piece[1]
                if "{group}" not in part.tensor:
                    numbers = numbers * count // together if count else 0
                parameters, size = parameters + numbers, size + numbers * _BYTES[header.dtype]
    notes = [f"with {group.brought}"] if group.brought else []
    notes += ["routed"] if group.routed else []
    notes += [_TAKES_PART[group.modality]] if group.modality else []
    notes += [] if group.weights == "float" else [group.weights]
    return {
        "name": group.name,
        "counts": {projection: [min(group.over(projection)), max(group.over(projection))] for projection in row.counts},
        "tokens": tokens,
        "parameters": parameters,
        "bytes": math.ceil(size),
        "notes": [*notes, *(["frozen"] if group.name in frozen_names(config) else [])],
    }


def _sizes(headers: dict[str, Header]) -> tuple[int, int]:
    numbers = [(_numbers(header), _BYTES[header.dtype]) for header in headers.values()]
    return sum(count for count, _ in numbers), math.ceil(sum(count * width for count, width in numbers))


def _numbers(header: Header) -> int:
    return math.prod(header.shape) * (4 if header.dtype == "U8" else 1)


def _neurons(row: Architecture, headers: dict[str, Header], projection: str) -> int:
    """Count the neurons of an ordinary model by what the values of its first block are."""
    part = next(p for m in row.maps if m.projection == projection for p in m.parts if p.axis == 1)
    shape = headers[row.block_name(0) + part.stored].shape
    return shape[0] if part.transposed else shape[1]
