"""Files of data sets on the hub."""

from __future__ import annotations

import os
from pathlib import Path


def hub_file(data_set: str, name: str, revision: str) -> Path:
    """Return a file of a data set, downloaded once.

    Args:
        data_set: Its id on the hub, `owner/name`.
        name: Path of the file in it.
        revision: Branch, tag or commit.

    Raises:
        OSError: The hub cannot be reached or has no such file, or its client is not installed; one
            line says which.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError as error:
        raise OSError("the package huggingface_hub is not installed.") from error
    try:
        return Path(
            hf_hub_download(
                data_set,
                name,
                repo_type="dataset",
                revision=revision,
                # The library reads the variable when it is imported; a run sets it later.
                local_files_only=os.environ.get("HF_HUB_OFFLINE") == "1",
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        # Names of hosts and long lists of causes help nobody: the first line says it.
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
