"""llama.cpp, built for CPUs, as the npm package node-llama-cpp brings it: a process that decodes when it is told to."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "3.22.1"
PACKAGES = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]
# Greedy, and past the end of a text: so many text tokens after so many, then the seconds that llama.cpp took.
_PROGRAM = """
import {getLlama} from "node-llama-cpp";
import {createInterface} from "node:readline";
const [file, threads] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads: Number(threads)});
console.log("ready");
for await (const line of createInterface({input: process.stdin})) {
  const [prompt, count] = JSON.parse(line), sequence = context.getSequence();
  const start = process.hrtime.bigint();
  let written = 0;
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
    if (++written == count) break;
  console.log(JSON.stringify([written, Number(process.hrtime.bigint() - start) / 1e9]));
  await sequence.dispose();
}
"""


class LlamaCpp:
    """One model in llama.cpp.

    Args:
        file: GGUF.
        folder: where npm puts the package, which stays there.
        threads: to compute with.
    """

    def __init__(self, file: Path, folder: Path, *, threads: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "node_modules").exists():
            options = ["--silent", "--ignore-scripts", "--omit=optional"]  # optional: other machines, 0.6 GB
            subprocess.run(["npm", "install", *options, "--prefix", folder, *PACKAGES], check=True)
        (program := folder / "decode.mjs").write_text(_PROGRAM, encoding="utf-8")
        process: Any = subprocess.Popen(
            ["node", program.resolve(), file.resolve(), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        self._process = process
        assert self._process.stdout.readline() == "ready\n", "llama.cpp could not load the model"

    def decode(self, prompt: list[int], count: int) -> float:
        """Write `count` text tokens after `prompt` and return the seconds that took, reading the prompt included."""
        self._process.stdin.write(json.dumps([prompt, count]) + "\n")
        self._process.stdin.flush()
        written, seconds = json.loads(self._process.stdout.readline())
        assert written == count, f"llama.cpp ended after {written} of {count} text tokens"
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def requantise(source: Path, target: Path, kind: str = "Q8_0") -> None:
    """Write a GGUF file again with every matrix in another format of llama.cpp's, all else as it is."""
    import gguf

    reader = gguf.GGUFReader(source)
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
