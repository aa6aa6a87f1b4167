"""What the recipes of the embedded models share: schedule, averaged weights, curve, saving.

A recipe is a fixed number of steps. `Clock` may end it early on a machine that is rented by the
minute: progress is then the larger of the shares of steps and seconds used, so that the learning
rate still reaches zero; the curve records what really ran. A `Checkpoint` lets a training that was
stopped go on, step for step as if it had not been.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def recipe_parser(description: str | None, *, compiles: bool = True) -> argparse.ArgumentParser:
    """Return a command line with what every recipe takes; a recipe adds its own.

    Args:
        description: What it trains.
        compiles: Whether it can compile its forward passes.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the results.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="0.002 is a smoke test.")
    parser.add_argument("--max-seconds", type=float, default=None, help="End early.")
    parser.add_argument("--eval-only", action="store_true", help="Measure the weights in --out.")
    if compiles:
        parser.add_argument(
            "--compile", action="store_true", help="Compile the training's forward passes."
        )
    return parser


# Below this scale a recipe is only seen to run.
SMOKE_SCALE = 0.02


class Sized(Protocol):
    """A recipe's sizes on a device: a named tuple, the optimizer's steps among them."""

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        ...

    def _replace(self, *, steps: int) -> Self: ...


SizesT = TypeVar("SizesT", bound=Sized)


def scaled(
    sizes: Mapping[str, SizesT], smoke: SizesT, device: torch.device, scale: float
) -> SizesT:
    """Return a recipe's sizes on a device, the steps times `scale`.

    Args:
        sizes: By type of device.
        smoke: Sizes, but for the steps, below `SMOKE_SCALE`.
        device: Where it runs.
        scale: 1 for the recipe as it is.

    Raises:
        ValueError: Nobody has sized the recipe for such a device.
    """
    if device.type not in sizes:
        raise ValueError(f"device must be one of {', '.join(sizes)}, got {device.type!r}.")
    own = sizes[device.type]
    return (smoke if scale < SMOKE_SCALE else own)._replace(steps=max(3, round(own.steps * scale)))


def run_recipe(
    description: str,
    *,
    sizes: Mapping[str, SizesT],
    smoke: SizesT,
    train: Callable[[argparse.Namespace, torch.device, SizesT, float], dict[str, object]],
    evaluate: Callable[[Path, torch.device, SizesT], dict[str, float]],
    gate: Callable[[Mapping[str, float]], bool] | None = None,
    compiles: bool = True,
    options: Callable[[argparse.ArgumentParser], object] | None = None,
) -> None:
    """Run a recipe from the command line: train, save, measure, write `quality.json`.

    Args:
        description: What it trains.
        sizes, smoke: See `scaled`.
        train: Arguments, device, sizes and the time of the beginning (`time.monotonic`) to what is
            known about the run.
        evaluate: Folder, device and sizes to what the saved weights reach.
        gate: Whether that is enough, for the key `gate_passed`.
        compiles: Whether `train` heeds `--compile`.
        options: Adds the recipe's own options to its command line.
    """
    parser = recipe_parser(description, compiles=compiles)
    if options is not None:
        options(parser)
    arguments = parser.parse_args()
    begin = time.monotonic()
    out: Path = arguments.out
    device = torch.device(arguments.device)
    own = scaled(sizes, smoke, device, arguments.steps_scale)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.eval_only:
        facts = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    else:
        facts = train(arguments, device, own, begin)
        facts["seconds"] = round(time.monotonic() - begin, 1)
    quality = evaluate(out, device, own)
    if gate is not None:
        facts["gate_passed"] = gate(quality)
    text = json.dumps(facts | quality, indent=2) + "\n"
    (out / "quality.json").write_text(text, encoding="utf-8")
    print(f"done {text}", flush=True)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def cosine(progress: float, *, warmup: float = 0.02, floor: float = 0.0) -> float:
    """Return the learning rate's factor: linear warm-up, then half a cosine down to `floor`.

    Args:
        progress: Share of the training that is over, in [0, 1].
        warmup: Share of the training spent warming up, in [0, 1).
        floor: Factor at the end, in [0, 1].
    """
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup
    share = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


class Clock:
    """Steps and seconds of one training stage.

    Iterating yields `(step, progress)` from (0, 0.0) until the steps or the seconds are spent.

    Attributes:
        steps: Planned optimizer steps.
        max_seconds: Wall time after which the stage ends; None never ends it.
        done: Steps really taken.
    """

    def __init__(self, steps: int, max_seconds: float | None = None) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}.")
        self.steps = steps
        self.max_seconds = max_seconds
        self.done = 0
        self._before = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since the stage began, without its interruptions, seconds."""
        return self._before + time.monotonic() - self._start

    def go_on(self, done: int, seconds: float) -> None:
        """Continue a stage of which steps and seconds are over; call it before iterating."""
        self.done = done
        self._before = seconds

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self._start = time.monotonic()
        for step in range(self.done, self.steps):
            progress = step / self.steps
            if self.max_seconds is not None:
                progress = max(progress, self.seconds / self.max_seconds)
            if progress >= 1:
                return
            yield step, progress
            self.done = step + 1


class AveragedWeights:
    """Exponential moving average of a module's parameters and buffers.

    The decay grows as (1 + n) / (10 + n) up to `decay`, so that the first updates, which start
    from random weights, are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self._updates = 0
        self._average = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        floating, present = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                floating.append(self._average[name])
                present.append(value.detach())
            else:
                self._average[name].copy_(value)
        torch._foreach_lerp_(floating, present, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Load the average into a module of the same shape."""
        module.load_state_dict(self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, and how many updates they have seen."""
        return self._average | {"": torch.tensor(self._updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` of another one returned."""
        self._updates = int(state[""])
        for name, value in self._average.items():
            value.copy_(state[name])


class Curve:
    """Writes the loss curve of a recipe as CSV: stage, step, seconds, then the given values.

    Args:
        path: Of the file.
        columns: Names of the values.
        kept: Rows that are there already and stay: those before (stage, step). None begins anew.
    """

    def __init__(
        self, path: Path, columns: tuple[str, ...], kept: tuple[str, int] | None = None
    ) -> None:
        self._columns = columns
        rows: list[list[str]] = []
        if kept is not None and path.is_file():
            with path.open(newline="") as file:
                for row in list(csv.reader(file))[1:]:
                    if row[0] == kept[0] and int(row[1]) >= kept[1]:
                        break
                    rows.append(row)
        self._path = path
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("stage", "step", "seconds", *columns), *rows])

    def add(self, stage: str, step: int, seconds: float, **values: float) -> None:
        """Append one row; a column without a value stays empty.

        Raises:
            ValueError: A value has no column.
        """
        if unknown := set(values) - set(self._columns):
            raise ValueError(f"no column {sorted(unknown)}; there are {list(self._columns)}.")
        cells = (f"{values[name]:.6g}" if name in values else "" for name in self._columns)
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow((stage, step, f"{seconds:.1f}", *cells))


class Checkpoint:
    """Keeps what a training needs to go on after it was stopped, in one file beside its results.

    Attributes:
        path: The file, safetensors; its metadata hold the stage, its steps and seconds, what the
            recipe is, and facts of the stages before.
        recipe: What must be the same for a training to be continued: seed, steps, device.
        stage: The stage that was stopped; "" when there is no file.
        done: Steps of it that are over.
        facts: Known about earlier stages.

    Raises:
        ValueError: The file is of another recipe.
    """

    EVERY_SECONDS = 300.0

    def __init__(self, folder: Path, recipe: Mapping[str, object]) -> None:
        self.path = folder / "checkpoint.safetensors"
        self.recipe = json.loads(json.dumps(recipe))
        self.stage, self.done, self.facts = "", 0, dict[str, Any]()
        self._seconds = 0.0
        self._last = time.monotonic()
        if not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file:
            metadata = json.loads(file.metadata()["training"])
        if metadata["recipe"] != self.recipe:
            raise ValueError(
                f"{self.path} is of another recipe: {metadata['recipe']}, not {self.recipe}. "
                "Delete it to begin anew."
            )
        self.stage, self.done = metadata["stage"], metadata["done"]
        self._seconds, self.facts = metadata["seconds"], metadata["facts"]

    @property
    def kept(self) -> tuple[str, int] | None:
        """The place of the curve from which on it is written again; None without a file."""
        return (self.stage, self.done) if self.stage else None

    def restore(self, stage: str, clock: Clock, parts: Mapping[str, Any]) -> None:
        """Take over the file's state if it is of this stage.

        Args:
            stage: That begins now.
            clock: Of the stage.
            parts: By name: modules, optimizers, averages and generators, as given to `save`.
        """
        if stage != self.stage:
            return
        clock.go_on(self.done, self._seconds)
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, part in parts.items():
            state = {
                key.removeprefix(f"{name}/"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}/")
            }
            if isinstance(part, torch.Generator):
                part.set_state(state["state"])
            elif isinstance(part, torch.optim.Optimizer):
                present = part.state_dict()
                present["state"] = {}
                for key, value in state.items():
                    number, _, field = key.partition("/")
                    present["state"].setdefault(int(number), {})[field] = value
                part.load_state_dict(present)
            else:
                part.load_state_dict(state)

    def save(
        self, stage: str, done: int, clock: Clock, parts: Mapping[str, Any], *, now: bool = False
    ) -> None:
        """Write the state after `done` steps of a stage, if the last time is long ago or `now`."""
        if not now and time.monotonic() - self._last < self.EVERY_SECONDS:
            return
        tensors: dict[str, Tensor] = {}
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                state = {"state": part.get_state()}
            elif isinstance(part, torch.optim.Optimizer):
                state = {
                    f"{number}/{field}": value
                    for number, fields in part.state_dict()["state"].items()
                    for field, value in fields.items()
                }
            else:
                state = part.state_dict()
            tensors |= {f"{name}/{key}": value.detach().cpu() for key, value in state.items()}
        metadata = {
            "recipe": self.recipe,
            "stage": stage,
            "done": done,
            "seconds": clock.seconds,
            "facts": self.facts,
        }
        partial = self.path.with_suffix(".partial")
        save_file(
            {name: value.contiguous().clone() for name, value in tensors.items()},
            partial,
            metadata={"training": json.dumps(metadata)},
        )
        partial.replace(self.path)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Delete the file: the training is over."""
        self.path.unlink(missing_ok=True)


def save_half(state: Mapping[str, Tensor], path: Path) -> int:
    """Write tensors as safetensors, floating ones in float16, and return the file's bytes.

    Tensors that share memory (a tied head) must be left out by the caller but once.

    Raises:
        ValueError: A value is not finite in float16; it would not survive the file.
    """
    halves = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.to(torch.float16)
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} holds values that float16 cannot.")
        halves[name] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, path, metadata={"format": "pt"})
    return path.stat().st_size
