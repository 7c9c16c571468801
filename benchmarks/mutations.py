"""Changes that make of a file that this package wrote one that is damaged or wants to do harm, for hostile.py."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "x" * 3000, "../../outside", "/etc/passwd", "\x00", "\udcff", "__import__('os').system('touch ran')",
    [], {}, [[]], [None], {"": ""}, [0] * 100, ["a", 1], {"a": {"b": {}}},
]  # fmt: skip
ODD_YAML = ["&a [*a]", "!!python/object/apply:os.system [touch ran]", "2021-13-45", "!!int x", "!!float ''", "? [a]: b"]
ODD_YAML += ["[" * 3000, "a: &a [x, x]\nb: &b [*a, *a]\n", "<<: *nothing", "\t- x", "!!binary '%'", "0x_", "1:99:99"]


def change_bytes(draw: st.DataObject, content: bytes) -> bytes:
    """Flip, cut out, double and put in bytes; lengths and offsets are among those put in."""
    for _ in range(draw.draw(st.integers(1, 3))):
        begin = draw.draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw.draw(st.sampled_from([0, 1, 2, 8, 100, len(content)])))
        how = draw.draw(st.sampled_from(["cut", "double", "put in", "overwrite"]))
        number = draw.draw(st.sampled_from([0, 1, 255, 2**31 - 1, 2**32, 2**63, 2**64 - 1]))
        other = draw.draw(st.one_of(st.just(struct.pack("<Q", number)), st.binary(max_size=8)))
        if how == "double":
            other = content[begin:end] * 2
        elif how == "cut":
            other = b""
        elif how == "put in":
            end = begin
        content = content[:begin] + other + content[end:]
    return content


def change_fields(draw: st.DataObject, content: Any, *, times: int = 3) -> Any:
    """Exchange, take away, rename and move values anywhere in nested lists and dictionaries."""
    content = copy.deepcopy(content)
    for _ in range(draw.draw(st.integers(1, times))):
        places = list(_places(content))
        if not places:
            return draw.draw(st.sampled_from(ODD))
        holder, key = draw.draw(st.sampled_from(places))
        how = draw.draw(st.sampled_from(["odd", "odd", "odd", "like", "take away", "rename", "wrap", "move"]))
        value = holder[key]
        if how == "odd":
            holder[key] = copy.deepcopy(draw.draw(st.sampled_from(ODD)))
        elif how == "like" and isinstance(value, int | float):
            holder[key] = draw.draw(st.one_of(st.integers(-(2**40), 2**40), st.floats(), st.integers(-3, 300)))
        elif how == "like":
            holder[key] = draw.draw(st.text(max_size=20))
        elif how == "wrap":
            holder[key] = draw.draw(st.sampled_from([[value], {"x": value}, str(value)]))
        elif how == "move":
            other, there = draw.draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else value)
        elif isinstance(holder, dict):
            del holder[key]
            if how == "rename":
                holder[draw.draw(st.sampled_from(["", "x", "../x", "\x00", "__class__"]))] = value
    return content


def change_json(draw: st.DataObject, content: bytes) -> bytes:
    """Change the values of a JSON file, or its bytes."""
    if draw.draw(st.integers(0, 4)) == 0:
        nested = draw.draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b""]))
        return draw.draw(st.one_of(st.just(nested), st.just(change_bytes(draw, content))))
    return json.dumps(change_fields(draw, json.loads(content))).encode()


def change_yaml(draw: st.DataObject, content: bytes) -> bytes:
    """Change the values of a YAML file, or put in what YAML can say and nobody expects."""
    if draw.draw(st.integers(0, 2)) == 0:
        lines = content.decode().splitlines()
        odd = draw.draw(st.sampled_from([*ODD_YAML, laughs()]))
        place = draw.draw(st.integers(0, len(lines) - 1))
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {odd}" if draw.draw(st.booleans()) else odd
        return "\n".join(lines).encode()
    changed = change_fields(draw, yaml.safe_load(content))
    text = yaml.safe_dump(changed, allow_unicode=True)
    return text.encode(errors="replace")


def laughs() -> str:
    """Return ten lines that stand for a thousand million words."""
    lines = ["&l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "[" + ", ".join(lines) + "]"


def change_tensors(draw: st.DataObject, content: bytes) -> bytes:
    """Change the header of a safetensors file, or any of its bytes."""
    if draw.draw(st.booleans()):
        return change_bytes(draw, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for field in ("tokenformer_addon", "parent_sha256"):  # JSON within JSON
        if field in header.get("__metadata__", {}) and draw.draw(st.booleans()):
            inner = change_fields(draw, json.loads(header["__metadata__"][field]))
            header["__metadata__"][field] = json.dumps(inner)
            changed = json.dumps(header).encode()
            return struct.pack("<Q", len(changed)) + changed + content[8 + length :]
    changed = json.dumps(change_fields(draw, header)).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Say what unpickling calls."""
        return self.function, self.arguments


def odd_pickles() -> Iterator[Any]:
    """Yield what a pickle should not hold, or not at that size."""
    one = torch.zeros(1)
    yield Call(os.system, "touch ran")
    yield Call(eval, "open('ran', 'w')")
    yield {"w": Call(bytearray, 2**36)}
    yield {"w": one.expand(2**36)}
    yield {"w": one.as_strided((2**20, 2**20), (0, 0))}
    yield {"w": {"exp_avg": one.expand(2**36), "step": one}}
    yield {"w": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), one, (2**40,), check_invariants=False)}
    yield {"w": torch.empty(2**40, device="meta")}
    yield {f"w{i}": torch.ones(1000).expand(1000, 1000) for i in range(50)}
    yield [1, 2, 3]
    yield {"module": {"module": {}}}
    yield {1: one, None: one}
    yield {"w": {"exp_avg": "text"}}
    yield None


def change_pickle(draw: st.DataObject, content: bytes) -> bytes:
    """Change the bytes of a torch file, or those in its archive; or give one that holds something else."""
    how = draw.draw(st.sampled_from(["bytes", "archive", "archive", "another", "deflate"]))
    if how == "bytes":
        return change_bytes(draw, content)
    if how == "another":
        odd, stream = list(odd_pickles()), io.BytesIO()
        number = draw.draw(st.integers(0, len(odd) - 1))
        torch.save(odd[number], stream, _use_new_zipfile_serialization=draw.draw(st.booleans()))
        return stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
        chosen = draw.draw(st.sampled_from(sorted(entries)))
        for name, data in entries.items():
            if name == chosen:
                data = bytes(2**26) if how == "deflate" else change_bytes(draw, data)
                name = draw.draw(st.sampled_from([name, name, name, "../../outside", "/outside", f"{name}x"]))
            new.writestr(name, data, zipfile.ZIP_DEFLATED if how == "deflate" else zipfile.ZIP_STORED)
    return stream.getvalue()


def change_lines(draw: st.DataObject, content: bytes) -> bytes:
    """Change one line of JSON, or bytes anywhere."""
    if draw.draw(st.booleans()):
        return change_bytes(draw, content)
    lines = content.splitlines()
    place = draw.draw(st.integers(0, len(lines) - 1))
    lines[place] = change_json(draw, lines[place])
    return b"\n".join(lines)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)
