"""Publish a checkpoint or add-on on the Hugging Face Hub: weights, code, tokenizer, lineage and card in one commit."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import HubError, first_line
from .beside import addon_card, is_local, read_addon
from .card import model_card
from .checkpoint import read_config
from .verify import (
    ADDON_CONFIG,
    ADDON_WEIGHTS,
    CARD_FILE,
    LINEAGE_FILE,
    OPTIMIZER_FILE,
    is_addon_folder,
    verify_checkpoint,
    weight_files,
)


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a verified checkpoint or add-on, without its optimizer, and return the commit's address.

    An add-on is published without the path of a parent that lies on this machine: who loads it loads that parent, and
    then `attach` compares the digests.

    Args:
        checkpoint: folder of a checkpoint or add-on.
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
    addon = is_addon_folder(checkpoint)
    operations = (_of_addon if addon else _of_checkpoint)(Path(checkpoint), license)
    message = f"Upload a {'token group' if addon else 'TokenFormer'}"
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repo_id, operations, commit_message=message).commit_url)
    except Exception as error:  # the Hub can fail in as many ways as a network; none leaves anything half here
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        remedy = "`hf auth login` logs in" if refused else "the same command tries again"
        raise HubError(
            f"could not push {checkpoint} to {repo_id!r}: {first_line(error)}; {remedy}, and nothing in the folder has "
            "changed"
        ) from error


def _of_checkpoint(folder: Path, license: str | None) -> list[CommitOperationAdd]:
    """Return what there is to upload of a checkpoint."""
    lineage = verify_checkpoint(folder)
    card = model_card(read_config(folder), lineage, license=license)
    weights = weight_files(folder)
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in (OPTIMIZER_FILE, CARD_FILE)
        if file.suffix != ".safetensors" or file in weights
    ]
    return [CommitOperationAdd(f.name, f) for f in files] + [CommitOperationAdd(CARD_FILE, card.encode())]


def _of_addon(folder: Path, license: str | None) -> list[CommitOperationAdd]:
    """Return what there is to upload of an add-on."""
    config, tensors, _ = read_addon(folder)
    if is_local(parent := config.base_model_name_or_path or "") or (folder / parent).is_dir():
        config = config.model_copy(update={"base_model_name_or_path": None})
    card = addon_card(config, sum(tensor.numel() for tensor in tensors.values()), license=license)
    written = {ADDON_CONFIG: config.model_dump_json(indent=2) + "\n", CARD_FILE: card}
    files = [folder / name for name in (ADDON_WEIGHTS, LINEAGE_FILE) if (folder / name).exists()]
    return [CommitOperationAdd(f.name, f) for f in files] + [
        CommitOperationAdd(name, text.encode()) for name, text in written.items()
    ]
