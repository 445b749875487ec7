"""`lgp push`: an exported folder as a repository on Hugging Face's hub. Needs no torch."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils import httpx

from lgp_dist.errors import UserError, first_line

NEEDED = ("README.md", "model.safetensors", "verify.json")
"""Files that every exported folder has."""


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads all files of a folder in one commit, which the hub has whole or not at all; returns its address.

    Files of the repository that the folder does not have stay. UserError for a folder that is no export, without a
    token, and where the hub refuses.
    """
    missing = [file for file in NEEDED if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}: name a folder that `lgp export` wrote.")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"NAME is {name!r}: write USER/NAME, the repository's owner and its name.")
    if not get_token():
        raise UserError("There is no token of the hub: set HF_TOKEN, or log in with `hf auth login`.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    operations = [CommitOperationAdd(path.name, path) for path in files]
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.create_commit(name, operations, commit_message=f"lgp push {folder.name}")
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"The hub did not take {name} ({first_line(error)}): check name, token and connection."
        ) from None
    return f"{folder}: {len(files)} files in {done.commit_url}"
