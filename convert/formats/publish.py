"""Repositories of the Hugging Face hub, made and filled through huggingface_hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from convert.errors import ConversionError, one_line, quiet
from convert.files import write_whole
from convert.formats.hf_folder import ANY, CARD


def check_publishable(repo: str) -> None:
    """Whether a folder could be published as `owner/repo`: before what takes long.

    Raises:
        ConversionError: it is no name of a repository, there is no token, the hub does not know that, or it cannot be
            reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConversionError(f"--push {repo}: {one_line(error)}") from None
    if "/" not in repo:
        raise ConversionError(f"--push {repo}: a repository is named OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConversionError(f"--push {repo}: HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise ConversionError(f"--push {repo} needs a token of the hub: set HF_TOKEN, or run hf auth login")
    with _told(repo):
        HfApi().whoami()


def publish(folder: Path, repo: str) -> str:
    """Uploads what `write_hf` has written into a repository, which is made where it is not there; returns its address.

    The model card, in the folder too, names the repository from then on.

    Raises:
        ConversionError: the hub refuses it, or cannot be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    card = folder / CARD
    write_whole(card, card.read_bytes().replace(ANY.encode(), repo.encode()))
    with _told(repo):
        address = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="CrossViT, written by crossvit-jax")
    return str(address)


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
    """What the hub answers inside the block becomes ConversionError."""
    try:
        with quiet("huggingface_hub"):
            yield
    except Exception as error:  # its own errors, those of the HTTP client and of the operating system
        raise ConversionError(f"--push {repo}: the hub did not take it: {one_line(error)}") from None
