"""Publish a checkpoint on the Hugging Face Hub: weights, code, tokenizer, lineage and model card in one commit."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import HubError, first_line
from .card import model_card
from .checkpoint import read_config
from .verify import CARD_FILE, OPTIMIZER_FILE, verify_checkpoint, weight_files


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a verified checkpoint, without its optimizer, and return the commit's address.

    Args:
        checkpoint: folder of a checkpoint.
        repo_id: "user/name"; made if it does not exist.
        private: make it private if it is made now.
        license: the weights' licence for the model card, such as "apache-2.0".
        token: of the Hub; default: the one `hf auth login` keeps.

    Raises:
        CheckpointError: missing or damaged.
        HubError: another form of name, not logged in, no network, or refused by the Hub.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII):
        raise HubError(
            f"could not push {checkpoint} to {repo_id!r}: write USER/NAME, such as someone/small-tokenformer"
        )
    lineage = verify_checkpoint(checkpoint)
    card = model_card(read_config(checkpoint), lineage, license=license)
    weights = weight_files(checkpoint)
    files = [
        file
        for file in sorted(Path(checkpoint).iterdir())
        if file.is_file() and file.name not in (OPTIMIZER_FILE, CARD_FILE)
        if file.suffix != ".safetensors" or file in weights
    ]
    operations = [CommitOperationAdd(f.name, f) for f in files] + [CommitOperationAdd(CARD_FILE, card.encode())]
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repo_id, operations, commit_message="Upload a TokenFormer").commit_url)
    except Exception as error:  # the Hub can fail in as many ways as a network; none leaves anything half here
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "`hf auth login` logs in" if refused else "the same command tries again"
        raise HubError(
            f"could not push {checkpoint} to {repo_id!r}: {first_line(error)}; {remedy}, and nothing in the folder has "
            "changed"
        ) from error
