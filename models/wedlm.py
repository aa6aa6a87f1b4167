"""WeDLM's checkpoints, read as what they are: Qwen decoders under another name.

`model_type` "wedlm" comes with code of its own on the hub, which is not run here. The decoder is
Qwen2.5's or Qwen3's, weight for weight; what is WeDLM's own is how it was trained and how it is
decoded (`methods/diffusion_lm/wedlm.py`).

Source: Tencent/WeDLM (GitHub), configuration of WeDLM-7B (Qwen2.5: biases on queries, keys and
values) and WeDLM-8B (Qwen3: norms on queries and keys instead); arXiv 2512.22737, section 6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODEL_TYPE = "wedlm"
# The engine's default: an id that Qwen's tokenizers leave without a word of text.
MASK_TOKEN_ID = 151665

# Say how the hub's code is found and what it is called; a Qwen configuration has its own.
_NOT_OURS = ("model_type", "architectures", "auto_map", "qk_norm", "transformers_version")


def causal_config(folder: Path) -> Any | None:
    """Return transformers' configuration of a WeDLM checkpoint; None if the folder holds another.

    Its `mask_token_id` is the checkpoint's, or the engine's default where it names none.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") != MODEL_TYPE:
        return None
    from transformers import Qwen2Config, Qwen3Config

    kind = Qwen3Config if settings.get("qk_norm") else Qwen2Config
    own = {name: value for name, value in settings.items() if name not in _NOT_OURS}
    return kind(**{"mask_token_id": MASK_TOKEN_ID, **own})
