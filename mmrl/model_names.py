"""Folders and hub names of models in a recipe, checked with its other options: before anything is loaded."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import AfterValidator

_HUB_NAME = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_TIMEOUT_S = 5.0


def model_name(*built_in: str) -> AfterValidator:
    """For the type of an option that names a model: `Annotated[str, model_name("shapes")]`.

    What is neither `built_in`, nor a folder, nor a model of the hub or of its cache, is refused.
    """

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in built_in:
            fault = _fault(value)
            if fault:
                raise ValueError(fault)
        return value

    return AfterValidator(check)


def _fault(name: str) -> str:
    """What is wrong with the name of a model; empty when nothing is."""
    path = Path(name)
    if path.is_dir():
        return ""
    where = "" if path.is_absolute() else f" in {os.getcwd()}"
    if path.exists():
        return "this is a file; give the folder of the model"
    if not _HUB_NAME.fullmatch(name):
        return f"there is no such folder{where}"
    fault = _fault_on_hub(name.partition("@")[0])
    return fault and f"there is no such folder{where}, and {fault}"


@cache
def _fault_on_hub(name: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    try:
        if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            return ""
        HfApi().model_info(name, timeout=_TIMEOUT_S)
    except GatedRepoError:  # the library's own words, at loading, say how to ask for access
        return ""
    except (RepositoryNotFoundError, HFValidationError):
        return "the hub has no model of that name"
    except HfHubHTTPError:  # the hub is there and troubled: loading tries again
        return ""
    except Exception as error:  # the client's network errors are of another class in every release
        return f"the hub cannot be asked ({type(error).__name__}: {error})"
    return ""
