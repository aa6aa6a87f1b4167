"""Starts workers fast: imports once, then forks one for every spec path on standard input.

Not a test. Torch is imported and has run nothing, so its threads do not exist yet at the fork.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch  # noqa: F401  # imported before the fork
import transformers  # noqa: F401  # imported before the fork
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # resolved lazily else

from runner.worker import main


def serve() -> None:
    """Answer each line, a spec's path, with the pid of the worker, and `.` after its end."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = main(Path(line.strip()))
            finally:
                os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(status, flush=True)


if __name__ == "__main__":
    serve()
