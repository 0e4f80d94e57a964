"""Weights on the Hugging Face hub, through huggingface_hub: its cache, its token and its offline mode."""

from pathlib import Path

from convert.errors import ConversionError, one_line, quiet

PREFIXES = ("hf-hub:", "hf_hub:")
_FILES = ("model.safetensors", "pytorch_model.bin")


def download(name: str) -> Path:
    """The cached file of the weights in a repository, `owner/repo` or `owner/repo@revision`.

    Raises:
        ConversionError: no such repository, revision or file, no permission, or no network and nothing in the cache.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    repo, _, revision = name.partition("@")
    unreachable = False
    for file in _FILES:
        try:
            # once the hub could not be reached, the other file is only looked for in the cache: no second wait
            with quiet("huggingface_hub"):
                return Path(hf_hub_download(repo, file, revision=revision or None, local_files_only=unreachable))
        except errors.LocalEntryNotFoundError:
            unreachable = True
        except errors.RemoteEntryNotFoundError:
            continue
        except errors.GatedRepoError:
            raise ConversionError(f"hf-hub:{name} is gated: accept its terms on the hub and set HF_TOKEN") from None
        except errors.RepositoryNotFoundError:
            raise ConversionError(f"hf-hub:{name}: no such repository (if it is private, set HF_TOKEN)") from None
        except errors.RevisionNotFoundError:
            raise ConversionError(f"hf-hub:{name}: the repository has no revision {revision!r}") from None
        except errors.HFValidationError as error:
            raise ConversionError(f"hf-hub:{name}: {one_line(error)}") from None
        except Exception as error:  # the HTTP client's own errors, a full disk in the cache, …
            where = " (HF_HOME names another place)" if "home directory" in str(error) else ""
            raise ConversionError(f"hf-hub:{name} could not be downloaded: {one_line(error)}{where}") from None
    if unreachable:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ConversionError(f"hf-hub:{name} is not in the cache, and {why}")
    raise ConversionError(f"hf-hub:{name} has neither {' nor '.join(_FILES)}")
