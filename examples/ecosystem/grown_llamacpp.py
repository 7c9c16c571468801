"""A Llama that was grown, in llama.cpp: through its own converter, as GGUF, with no code of ours.

Needs torch, transformers, sentencepiece, git, Node and npm: the package node-llama-cpp brings llama.cpp built for CPUs
and the source that it was built from, converter included. Here for Linux on x64. tokenformer must not be there, and the
folder is as grown_llama.py wants it. 130 MB are downloaded and, for SmolLM2-135M, 0.6 GB written, to a temporary place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import arguments, record
from reference import NEW, PROMPTS, agreement, continuations, growth

VERSION = "3.22.1"
PACKAGES = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]
# llama.cpp keeps keys and values in float16 unless told otherwise, which decides close races another way. Its threads
# wait for each other by spinning: on two busy cores the usual number took minutes for what one does in seconds.
PROGRAM = """
import {getLlama} from "node-llama-cpp";
const [file, prompts, count] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
  contextSize: 256, threads: 1, flashAttention: false,
  experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
});
const answers = [];
for (const text of JSON.parse(prompts)) {
  const sequence = context.getSequence(), prompt = model.tokenize(text), fresh = [];
  for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
    if (fresh.push(token) == count || token == model.tokens.eos) break;
  answers.push([prompt, fresh]);
  await sequence.dispose();
}
console.log(JSON.stringify(answers));
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it printed; if it fails, end with that."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return done.stdout


def install(folder: Path) -> tuple[Path, str]:
    """Put llama.cpp, as source and built for CPUs, into a folder; return the source's folder and its release."""
    options = ["--silent", "--ignore-scripts", "--omit=optional"]  # optional: other machines, 0.6 GB
    run("npm", "install", *options, "--prefix", folder, *PACKAGES, cwd=folder)
    source, package = folder / "llama.cpp", folder / "node_modules" / "node-llama-cpp" / "llama"
    run("git", "clone", "--quiet", package / "gitRelease.bundle", source, cwd=folder)
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=source).strip()
    return source, f"{json.loads((package / 'llama.cpp.info.json').read_text())['tag']} ({commit})"


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.monotonic()
    expected = continuations(args.checkpoint)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, release = install(folder)
        file, convert = folder / "grown.gguf", source / "convert_hf_to_gguf.py"
        run(sys.executable, convert, args.checkpoint.resolve(), "--outtype", "f32", "--outfile", file, cwd=source)
        converted = time.monotonic() - start
        (program := folder / "generate.mjs").write_text(PROGRAM)
        answers = json.loads(run("node", program, file, json.dumps(PROMPTS), str(NEW), cwd=folder))
        for text, (prompt, new), right in zip(PROMPTS, answers, expected, strict=True):
            assert prompt == right.prompt, f"{text!r} becomes {prompt}, in transformers {right.prompt}"
            assert new == right.new, f"{text!r}: llama.cpp {new}, transformers {right.new}"
        size = file.stat().st_size

    record(
        args.results,
        "llama.cpp, grown Llama",
        packages=["transformers", "torch", "sentencepiece"],
        ran=f"{growth(args.checkpoint)}: convert_hf_to_gguf.py of llama.cpp {release}, float32; then that "
        f"release, built for CPUs, in node-llama-cpp {VERSION}; without the package",
        result=f"the text tokens of each prompt, and {agreement(expected)}",
        limits="keys and values cached in float32: in float16, llama.cpp's default, close races may end another way; "
        "of a number of neurons that is no multiple of 32 the converter keeps the values in float16 when quantizing",
        gguf_bytes=size,
        seconds_to_gguf=round(converted),
        seconds=round(time.monotonic() - start),
    )


if __name__ == "__main__":
    main()
