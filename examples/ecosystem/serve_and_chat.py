"""A checkpoint behind `transformers serve`, asked by an OpenAI client and by `transformers chat`.

Needs `pip install 'transformers[serving]' openai`. The server gets a copy of the checkpoint with two changes:

- `transformers serve` 5.23 takes the class that config.json names under `architectures` from `transformers` itself,
  where nobody else's class is. The name of an Auto class, put there, leads it on to the code in the checkpoint.
- Chat needs a chat template. Models trained on plain text know no roles, so this one makes the messages lines of a
  text, which the model continues. A model trained on conversations comes with the template it was trained with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import OpenAI
from record import arguments, record
from server import running
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenformer  # noqa: F401  # registers the Auto classes here; the server runs the code in the checkpoint

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PROMPT = "ROMEO:"
# Without the penalty a model of little training says nothing but line breaks.
SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.5}
OPENAI_SETTINGS: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "frequency_penalty": 0.5}
COMMAND = Path(sysconfig.get_path("scripts")) / "transformers"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, `chat` refuses to reach even this machine


def letters(text: str) -> str:
    """What is left of a text however it is rendered as Markdown."""
    return "".join(re.findall(r"[^\W_]", text))


args = arguments(__doc__)
model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
messages: list[Any] = [{"role": "user", "content": PROMPT}]


def own_answer(text: str) -> str:
    """What `generate` itself says after `text`."""
    inputs = tokenizer(text, return_tensors="pt")
    written = model.generate(**inputs, **SETTINGS)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


answer = own_answer(tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False))
continuation = own_answer(PROMPT)
assert letters(answer) and letters(continuation), "silence would show nothing"

with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary) / "model"
    shutil.copytree(args.checkpoint, folder, ignore=shutil.ignore_patterns("optimizer.pt"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AutoModelForCausalLM"]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)

    began = time.monotonic()
    command: list[str | Path] = [COMMAND, "serve", folder, "--trust-remote-code", "--device", "cpu"]
    with running(command, log=Path(temporary) / "log", environment=ENVIRONMENT) as (server, _):
        address = f"{server}/v1"
        seconds = round(time.monotonic() - began, 1)
        client = OpenAI(base_url=address, api_key="none", timeout=120, max_retries=0)
        asked = {"model": str(folder), **OPENAI_SETTINGS}

        whole = client.chat.completions.create(messages=messages, **asked)
        assert whole.choices[0].message.content == answer
        stream = client.chat.completions.create(messages=messages, stream=True, **asked)
        pieces = [text for chunk in stream if (text := chunk.choices[0].delta.content)]
        assert "".join(pieces) == answer and len(pieces) > 1

        assert client.completions.create(prompt=PROMPT, **asked).choices[0].text == continuation
        stream = client.completions.create(prompt=PROMPT, stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in stream) == continuation

        chat = subprocess.run(
            [COMMAND, "chat", folder, address, *(f"{name}={value}" for name, value in SETTINGS.items())],
            input=f"{PROMPT}\nn\n!exit\n",  # n: do not go on where the limit of text tokens cut the answer
            capture_output=True,
            text=True,
            timeout=300,
            env=ENVIRONMENT,
        )
        assert chat.returncode == 0, chat.stderr
        assert letters(answer) in letters(chat.stdout), chat.stdout

record(
    args.results,
    "transformers serve",
    packages=["tokenformer", "transformers", "fastapi", "uvicorn", "openai"],
    ran="chat completion and completion by the OpenAI client, whole and streamed, without sampling, on the CPU",
    result=f"the four answers are those of model.generate; the streamed chat came in {len(pieces)} pieces",
    limits="needs --trust-remote-code and a copy of the checkpoint whose config.json names AutoModelForCausalLM as its "
    "architecture, for 5.23 looks classes up in transformers alone; chat needs a chat template, which models of plain "
    "text do not have",
    seconds_to_start=seconds,
)
record(
    args.results,
    "transformers chat",
    packages=["tokenformer", "transformers"],
    ran="one question to that server, on standard input",
    result="shows the answer of model.generate",
    limits="a model trained on plain text continues it rather than answers; chat itself refuses under HF_HUB_OFFLINE=1",
)
