"""Weights on the Hugging Face hub, through huggingface_hub: its cache, its token and its offline mode."""

from pathlib import Path

from convert.errors import ConversionError, one_line, quiet
from convert.formats.timm_config import FILE as CONFIG
from convert.formats.timm_config import PROCESSOR, WEIGHTS

PREFIXES = ("hf-hub:", "hf_hub:")


def download(name: str) -> tuple[Path, list[str]]:
    """The cached file of the weights in a repository, `owner/repo` or `owner/repo@revision`; and notes for the user.

    Of weights in several files it is the index, beside which the others lie.

    timm's `config.json` and transformers' `preprocessor_config.json` are in the same folder then, where the repository
    has them.

    Raises:
        ConversionError: no such repository, revision or file, no permission, or no network and nothing in the cache.
    """
    from huggingface_hub import constants

    repository = _Repository(name)
    path = next(filter(None, map(repository.file, WEIGHTS)), None) or repository.shards()
    if path is not None:
        has_config = repository.file(CONFIG) is not None or not repository.is_unreachable
        repository.file(PROCESSOR)
        unknown = f"the repository's {CONFIG} is not in the cache: mean, std and names of classes in it are not known"
        return path, [] if has_config else [unknown]
    if repository.is_unreachable:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ConversionError(f"hf-hub:{name} is not in the cache, and {why}")
    raise ConversionError(f"hf-hub:{name} has neither {' nor '.join(WEIGHTS)}")


class _Repository:
    def __init__(self, name: str):
        self._name = name
        self.is_unreachable = False

    def file(self, file: str) -> Path | None:
        """The cached file of that name; None where there is none, or where there may be one that cannot be got."""
        from huggingface_hub import errors, hf_hub_download

        repo, _, revision = self._name.partition("@")
        source = f"hf-hub:{self._name}"
        try:
            # once the hub could not be reached, other files are only looked for in the cache: no second wait
            with quiet("huggingface_hub"):
                return Path(
                    hf_hub_download(repo, file, revision=revision or None, local_files_only=self.is_unreachable)
                )
        except errors.LocalEntryNotFoundError:
            self.is_unreachable = True
            return None
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.GatedRepoError:
            raise ConversionError(f"{source} is gated: accept its terms on the hub and set HF_TOKEN") from None
        except errors.RepositoryNotFoundError:
            raise ConversionError(f"{source}: no such repository (if it is private, set HF_TOKEN)") from None
        except errors.RevisionNotFoundError:
            raise ConversionError(f"{source}: the repository has no revision {revision!r}") from None
        except errors.HFValidationError as error:
            raise ConversionError(f"{source}: {one_line(error)}") from None
        except Exception as error:  # the HTTP client's own errors, a full disk in the cache, …
            where = " (HF_HOME names another place)" if "home directory" in str(error) else ""
            raise ConversionError(f"{source} could not be downloaded: {one_line(error)}{where}") from None

    def shards(self) -> Path | None:
        """The cached index of weights in several files, when these are in the cache too; None where there is none."""
        from convert.formats.hf_folder import INDEX, shard_names

        index = self.file(INDEX)
        for name in [] if index is None else shard_names(index):
            if self.file(name) is None:
                missing = "not in the cache" if self.is_unreachable else "not there"
                raise ConversionError(f"hf-hub:{self._name}: {name} is {missing}, and {INDEX} names it")
        return index
