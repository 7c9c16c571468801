"""Memory and time of converting official checkpoints at their released sizes, each in a process of its own.

The weights are random: what is measured does not depend on them. Appends a line a size to results/convert.jsonl.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from tokenformer import TokenformerConfig
from tokenformer.convert.official import fields_to_official, official_tensors

RESULTS = Path(__file__).parent / "results" / "convert.jsonl"
SIZES = {"150m": torch.float32, "450m": torch.float32, "900m": torch.float32, "1.5b": torch.float16}
ASKED = 1.3
# VmHWM, in KiB: getrusage's figure starts from that of the process which started this one.
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from tokenformer.convert.files import convert_official
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
imports, began = peak(), time.perf_counter()
convert_official(*sys.argv[1:])
print(json.dumps({"imports": imports, "peak": peak(), "seconds": time.perf_counter() - began}))
"""


def main() -> None:
    """Write a checkpoint of each size, convert it, and leave what it took."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for preset, dtype in SIZES.items():
        config = TokenformerConfig.from_preset(preset)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            state = {}
            for name, (_, shape, _) in official_tensors(config).items():
                n = math.prod(shape)
                state[name] = block.to(dtype).repeat(math.ceil(n / len(block)))[:n].clone().view(shape)
            torch.save(state, folder / "model.bin")
            del state
            (folder / "model.yml").write_text(yaml.safe_dump(fields_to_official(config)))
            command = [sys.executable, "-W", "ignore", "-c", PROGRAM, "model.bin", "model.yml", "ours"]
            done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            size = (folder / "model.bin").stat().st_size
        took = json.loads(done.stdout)
        line = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "file": size, **took, "asked": ASKED}
        line["ratio"] = took["peak"] / size
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
