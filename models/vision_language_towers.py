"""Vision towers of transformers run layer by layer: features, projector, and attention summaries.

Two kinds: CLIP's transformer under Llava and LlavaNext, with [CLS] and one or several tiles, and
Qwen2.5-VL's with windowed attention, whose tokens stand in window order inside. Whatever the order
inside, what comes out is one row for each visual token in the order in which the decoder reads
them.

The layers behind the one that feeds the projector are not run, which transformers' own forward
does (for LLaVA the last of 24): nothing reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from models.base import Unsupported
from models.device import linear_parameters
from models.vision_language_attention import attention_sums, captured_output, sums_flops


class Grid(NamedTuple):
    """Rows and columns of a tile's visual tokens."""

    rows: int
    columns: int


@dataclass(frozen=True)
class VisualLayout:
    """Where an image's visual tokens stand, in the order in which the decoder reads them.

    A *patch* is a token that shows a part of the image; LLaVA-NeXT puts a separator behind each
    line of its mosaic of crops. Methods choose among patches and never see separators.

    Attributes:
        grid: Of each tile.
        num_tiles: Tiles of the image; the first one is the whole image, small, where there are
            several.
        tile: Tile of each token, -1 for a separator, (tokens,), int64.
        place: Place of each token in its tile's grid, row by row, -1 for a separator.
        line: Line of the picture that each token is in, (tokens,); a separator is in the line that
            it ends.
    """

    grid: Grid
    num_tiles: int
    tile: Tensor
    place: Tensor
    line: Tensor

    def __len__(self) -> int:
        return len(self.tile)

    @property
    def patches(self) -> Tensor:
        """Places of the patches among all tokens, ascending, (patches,)."""
        return (self.tile >= 0).nonzero().flatten()

    @property
    def patch_tile(self) -> Tensor:
        """Tile of each patch, (patches,)."""
        return self.tile[self.patches]

    @property
    def patch_place(self) -> Tensor:
        """Place of each patch in its tile's grid, (patches,)."""
        return self.place[self.patches]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is kept of the vision layers beside the features; layers are counted from 1.

    Attributes:
        received: Layers whose attention is summed up by key: mean over heads and all queries.
        cls: Layers whose [CLS] row is wanted.
        keys: Layers whose keys are wanted, averaged over heads.
    """

    received: tuple[int, ...] = ()
    cls: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    @property
    def layers(self) -> set[int]:
        """All of them."""
        return {*self.received, *self.cls, *self.keys}


class Matching(NamedTuple):
    """Which of a tile's tokens become one.

    Attributes:
        goes_to: Number of the token that each one becomes a part of, (tokens,), int64.
        stands_for: Token in whose place each of those stands, (fewer tokens,), int64.
    """

    goes_to: Tensor
    stands_for: Tensor


@dataclass(frozen=True)
class InnerMerging:
    """Tokens of a tile are merged between attention and feed-forward of the tower's layers.

    A merged token is the mean of the patches in it. From then on the logits of attention to it grow
    by the logarithm of their number, as if it were that many tokens with one key and value.

    Attributes:
        leaving: From the layout and the number of layers, how many tokens leave in each layer,
            by tile.
        match: From the keys of a tile, averaged over heads, (tokens, head_dim), [CLS] first, and
            how many leave, what becomes of the tokens; [CLS] stays the first and alone.
        match_flops: Operations of `match`, from the number of tokens and the width of keys.
    """

    leaving: Callable[[VisualLayout, int], list[list[int]]]
    match: Callable[[Tensor, int], Matching]
    match_flops: Callable[[int, int], float]


@dataclass
class Encoded:
    """What the tower made of an image, a row or number for each patch of `layout`.

    Attributes:
        features: What goes into the projector, (patches, width); for Qwen2.5-VL the four vectors
            of a group side by side.
        layout: Where the patches stand.
        full_patches: Patches at the tower's own resolution; more than `layout` has where the image
            was made smaller.
        received: By layer, (patches,), float32.
        cls: By layer and head, (heads, patches), float32.
        keys: By layer, (patches, head_dim), float32.
        cls_features: Of [CLS], (tiles, width); None where there is none.
        owner: Where patches were merged inside the tower: for each the patch in whose place its
            merged token stands, (patches,); all patches of a token have its features.
        flops: Of the tower.
        watch_flops: Of the summaries, and of the choice of what to merge.
    """

    features: Tensor
    layout: VisualLayout
    full_patches: int
    cls_features: Tensor | None = None
    received: dict[int, Tensor] = field(default_factory=dict)
    cls: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    owner: Tensor | None = None
    flops: float = 0.0
    watch_flops: float = 0.0


@dataclass(frozen=True)
class Pixels:
    """An image as the tower takes it.

    Attributes:
        values: Normalised pixels on the tower's device.
        size: (height, width) of the image before, for LlavaNext.
        full_patches: Patches before it was made smaller; None where it was not.
        grid_thw: Patches of the image in time, height and width, for Qwen2.5-VL, (1, 3).
    """

    values: Tensor
    size: tuple[int, int]
    full_patches: int | None = None
    grid_thw: Tensor | None = None


@dataclass(frozen=True)
class ProjectorParts:
    """A projector taken apart: `second(activation(first(inner(features))))`.

    Attributes:
        first, second: Its two matrices.
        activation: Between them.
        group: Vectors of the tower that one row of features holds side by side.
        norm_weight: Weights of the RMSNorm over each of these vectors; None without one, where the
            first matrix sees the features themselves.
        norm_epsilon: Added to the mean square.
    """

    first: nn.Linear
    second: nn.Linear
    activation: Callable[[Tensor], Tensor]
    group: int = 1
    norm_weight: Tensor | None = None
    norm_epsilon: float = 0.0

    def inner(self, features: Tensor) -> Tensor:
        """Return what the first matrix sees, in the features' dtype, (..., width)."""
        if self.norm_weight is None:
            return features
        vectors, factor = self._scaled(features)
        return (vectors * factor * self.norm_weight.to(features.dtype)).flatten(-2)

    def inner_change(self, features: Tensor, directions: Tensor) -> Tensor:
        """Return the derivative of `inner` along directions; shapes broadcast, (..., width)."""
        if self.norm_weight is None:
            return directions
        vectors, factor = self._scaled(features)
        along = directions.reshape(*directions.shape[:-1], self.group, -1)
        inward = (vectors * along).mean(-1, keepdim=True)
        change = factor * along - vectors * factor**3 * inward
        return (change * self.norm_weight.to(features.dtype)).flatten(-2)

    def _scaled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        vectors = features.reshape(*features.shape[:-1], self.group, -1)
        square = vectors.square().mean(-1, keepdim=True) + self.norm_epsilon
        return vectors, square.rsqrt()

    def hidden(self, inner: Tensor) -> Tensor:
        """Return the first matrix's output, in the dtype of `inner`."""
        bias = self.first.bias
        return nn.functional.linear(
            inner, self.first.weight.to(inner.dtype), None if bias is None else bias.to(inner.dtype)
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Run the projector in the dtype of the features."""
        hidden = self.activation(self.hidden(self.inner(features)))
        bias = self.second.bias
        return nn.functional.linear(
            hidden,
            self.second.weight.to(hidden.dtype),
            None if bias is None else bias.to(hidden.dtype),
        )


class Tower(Protocol):
    """A vision tower with the projector behind it.

    Attributes:
        num_layers: Its layers.
        feature_layer: Layer whose output feeds the projector, counted from 1.
        has_cls: Whether it has a [CLS] token.
        parameters, projector_parameters: Weights of the matrices.
        separator: Embedding of the separator, (width,); None where there are none.
    """

    num_layers: int
    feature_layer: int
    has_cls: bool
    parameters: int
    projector_parameters: int
    separator: Tensor | None

    def prepare(self, image: npt.NDArray[np.uint8], crops: int) -> Pixels:
        """Return an image as the tower takes it; see `models.base.VisualPrompt`."""
        ...

    def shrunk(self, pixels: Pixels, grid_of: Callable[[Grid, int], Grid]) -> Pixels:
        """Return an image of fewer pixels, so that there are fewer patches of the same size.

        Args:
            pixels: As prepared.
            grid_of: From the grid of a tile and the number of tiles, the grid that is wanted.

        Raises:
            models.base.Unsupported: The tower does not take it.
        """
        ...

    def encode(self, pixels: Pixels, watch: Watch, merging: InnerMerging | None = None) -> Encoded:
        """Run the tower.

        Raises:
            models.base.Unsupported: A layer is watched that is not run, tokens cannot be merged in
                this tower or for this image, or are to be merged and watched.
        """
        ...

    def project(self, features: Tensor) -> Tensor:
        """Map features to embeddings of the decoder, (tokens, width) to (tokens, hidden)."""
        ...

    def projector_parts(self) -> ProjectorParts:
        """Return the projector taken apart."""
        ...


def _check_watch(watch: Watch, deepest: int, *, has_cls: bool) -> None:
    if wrong := sorted(layer for layer in watch.layers if not 1 <= layer <= deepest):
        raise Unsupported(
            f"vision layer {wrong[0]} is asked for; layers 1 to {deepest} are run, the last of "
            f"them feeds the projector."
        )
    if watch.cls and not has_cls:
        raise Unsupported("this vision tower has no [CLS] token whose attention could be read.")


class ClipTower:
    """CLIP's vision transformer and LLaVA's projector; see `Tower`."""

    def __init__(self, module: Any, image_processor: Any) -> None:
        """Wrap the tower of a `LlavaForConditionalGeneration` or `LlavaNext…`.

        Raises:
            models.base.Unsupported: Another tower, or features of several layers.
        """
        self._model = module.model
        self._config = module.config
        self._tower = self._model.vision_tower
        self._processor = image_processor
        self._tiles_itself = type(module).__name__.startswith("LlavaNext")
        if type(self._tower).__name__ != "CLIPVisionModel":
            raise Unsupported(
                f"LLaVA's towers are run here where they are a CLIPVisionModel, not a "
                f"{type(self._tower).__name__}."
            )
        chosen = module.config.vision_feature_layer
        strategy = module.config.vision_feature_select_strategy
        if not isinstance(chosen, int) or strategy != "default":
            raise Unsupported(
                f"the projector must read the patches of one vision layer; this model's reads "
                f"layers {chosen} by strategy '{strategy}'."
            )
        layers = self._tower.encoder.layers
        self.num_layers: int = len(layers)
        # transformers counts hidden states: 0 is the embedding, -1 the output of the last layer.
        self.feature_layer = int(chosen + self.num_layers + 1 if chosen < 0 else chosen)
        self.has_cls = True
        self._layers = layers[: self.feature_layer]
        embedding = self._tower.embeddings.patch_embedding
        self._embedding_parameters = embedding.weight.numel()
        self.parameters = self._embedding_parameters + linear_parameters(self._layers)
        self.projector_parameters = linear_parameters(self._model.multi_modal_projector)
        side = self._config.vision_config.image_size // self._config.vision_config.patch_size
        self._side_pixels = self._config.vision_config.image_size
        self._grid = Grid(side, side)
        self.separator: Tensor | None = self._model.image_newline if self._tiles_itself else None

    def prepare(self, image: npt.NDArray[np.uint8], crops: int) -> Pixels:
        """Return the pixels of all tiles, (tiles, 3, side, side)."""
        if crops > 1 and self._tiles_itself:
            raise Unsupported("this model tiles images by itself: crops must be 1.")
        images = [image] if crops == 1 else cut_tiles(image, crops)
        values = self._processor(images=images, return_tensors="pt")["pixel_values"]
        if self._tiles_itself:
            values = values[0]
        parameter = self._tower.embeddings.patch_embedding.weight
        height, width = image.shape[:2]
        return Pixels(values.to(parameter.device, parameter.dtype), (height, width))

    def shrunk(self, pixels: Pixels, grid_of: Callable[[Grid, int], Grid]) -> Pixels:
        """Return smaller tiles; the tower interpolates its position embeddings for them."""
        if self._tiles_itself:
            raise Unsupported("this model tiles images by their size, so they cannot be shrunk.")
        grid = grid_of(self._grid, len(pixels.values))
        if grid == self._grid:
            return pixels
        side = self._side_pixels // self._grid.rows
        values = nn.functional.interpolate(
            pixels.values,
            size=(grid.rows * side, grid.columns * side),
            mode="bilinear",
            antialias=True,
        )
        full = len(values) * self._grid.rows * self._grid.columns
        return replace(pixels, values=values, full_patches=full)

    def encode(self, pixels: Pixels, watch: Watch, merging: InnerMerging | None = None) -> Encoded:
        """Run the layers up to the one that feeds the projector."""
        _check_watch(watch, self.feature_layer, has_cls=True)
        layout = self._layout(pixels)
        embedded = self._tower.embeddings(
            pixels.values, interpolate_pos_encoding=layout.grid != self._grid
        )
        states = self._tower.pre_layrnorm(embedded)
        encoded = Encoded(states, layout, pixels.full_patches or len(layout.patch_tile))
        if merging is not None:
            leaving = merging.leaving(layout, self.feature_layer)
            # Where no token leaves the layers are run as they are, to the bit.
            if any(map(any, leaving)):
                return self._encode_merging(encoded, watch, merging, leaving)
        tile, place = layout.patch_tile, layout.patch_place
        for number, layer in enumerate(self._layers, start=1):
            if number not in watch.layers:
                states = layer(states, None)
                continue
            attention = layer.self_attn
            with ExitStack() as stack:
                queries, keys = (
                    stack.enter_context(captured_output(part))
                    for part in (attention.q_proj, attention.k_proj)
                )
                states = layer(states, None)
            self._summarise(encoded, number, watch, queries[0], keys[0], attention)
        encoded.features = states[:, 1:][tile, place]
        encoded.cls_features = states[:, 0]
        encoded.flops = self._flops(pixels)
        return encoded

    def _encode_merging(
        self, encoded: Encoded, watch: Watch, merging: InnerMerging, leaving: list[list[int]]
    ) -> Encoded:
        """Run the layers on one tile after the other, with fewer tokens from each to the next."""
        layout, states = encoded.layout, encoded.features
        tile, place = layout.patch_tile, layout.patch_place
        if watch.layers:
            raise Unsupported("layers that merge tokens cannot be watched as well.")
        if len(tile) != len(states) * (states.shape[1] - 1):
            raise Unsupported(
                "tokens cannot be merged inside the tower where padding is cut off behind it: a "
                "merged token may be both."
            )
        features = states.new_empty(len(tile), states.shape[-1])
        owner = torch.empty_like(tile)
        cls_features = []
        for number, counts in enumerate(leaving):
            merged, part_of, stands = self._merge_tile(states[number], merging, counts, encoded)
            own = (tile == number).nonzero().flatten()
            part = part_of[place[own]]
            features[own] = merged[1 + part]
            # From a place of the tile's grid to the number of the patch that stands there.
            patch_at = torch.empty_like(own)
            patch_at[place[own]] = own
            owner[own] = patch_at[stands[part]]
            cls_features.append(merged[0])
        encoded.features, encoded.owner = features, owner
        encoded.cls_features = torch.stack(cls_features)
        encoded.flops += 2.0 * self._embedding_parameters * len(tile)
        return encoded

    def _merge_tile(
        self, states: Tensor, merging: InnerMerging, counts: Sequence[int], encoded: Encoded
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layers on a tile's tokens, (1 + places, width), [CLS] first.

        Returns:
            The tokens that are left, (1 + left, width), the one of them that each place has become
            a part of, (places,), and the place that each stands in, (left,), both without [CLS].
        """
        tokens = len(states)
        sizes = states.new_ones(tokens)
        part_of = torch.arange(tokens, device=states.device)
        stands = part_of
        for layer, count in zip(self._layers, counts, strict=True):
            attention = layer.self_attn
            # None where all are alike: kernels without a mask are the ones the full model runs.
            weight = sizes.log().expand(1, 1, len(states), -1) if len(states) < tokens else None
            with captured_output(attention.k_proj) as keys:
                attended, _ = attention(
                    hidden_states=layer.layer_norm1(states[None]), attention_mask=weight
                )
            states = states + attended[0]
            encoded.flops += self._layer_flops(attention, len(states))
            encoded.flops += 4.0 * len(states) ** 2 * states.shape[1]
            if count:
                heads = keys[0][0].view(len(states), -1, int(attention.head_dim))
                metric = heads.float().mean(1)
                goes_to, stands_for = merging.match(metric, count)
                encoded.watch_flops += merging.match_flops(*metric.shape) + heads.numel()
                shape = (len(stands_for), states.shape[1])
                total = states.new_zeros(shape).index_add_(0, goes_to, states * sizes[:, None])
                sizes = sizes.new_zeros(shape[0]).index_add_(0, goes_to, sizes)
                states = total / sizes[:, None]
                part_of, stands = goes_to[part_of], stands[stands_for]
            states = states + layer.mlp(layer.layer_norm2(states))
            encoded.flops += self._layer_flops(layer.mlp, len(states))
        return states, part_of[1:] - 1, stands[1:] - 1

    @staticmethod
    def _layer_flops(part: nn.Module, tokens: int) -> float:
        return 2.0 * linear_parameters(part) * tokens

    def _summarise(
        self, encoded: Encoded, number: int, watch: Watch, queries: Tensor, keys: Tensor, part: Any
    ) -> None:
        """Add the summaries of a layer, from (tiles, tokens, width) of queries and keys."""
        tile, place = encoded.layout.patch_tile, encoded.layout.patch_place
        heads, size = int(part.num_heads), int(part.head_dim)
        queries, keys = (
            each.view(*each.shape[:2], heads, size).transpose(1, 2) for each in (queries, keys)
        )
        tokens = queries.shape[2]
        scale = float(part.scale)
        if number in watch.received:
            sums = torch.stack(
                [attention_sums(q, k, scale=scale) for q, k in zip(queries, keys, strict=True)]
            )
            means = sums.mean(1) / tokens
            encoded.received[number] = means[:, 1:][tile, place]
            encoded.watch_flops += len(queries) * sums_flops(heads, tokens, tokens, size)
        if number in watch.cls:
            rows = torch.stack(
                [
                    attention_sums(q[:, :1], k, scale=scale)
                    for q, k in zip(queries, keys, strict=True)
                ]
            )
            encoded.cls[number] = rows[:, :, 1:].transpose(1, 2)[tile, place].T
            encoded.watch_flops += len(queries) * sums_flops(heads, 1, tokens, size)
        if number in watch.keys:
            encoded.keys[number] = keys.float().mean(1)[:, 1:][tile, place]
            encoded.watch_flops += float(keys.numel())

    def project(self, features: Tensor) -> Tensor:
        """Map features to embeddings of the decoder."""
        projected: Tensor = self._model.multi_modal_projector(features)
        return projected

    def projector_parts(self) -> ProjectorParts:
        """Return the projector taken apart."""
        projector = self._model.multi_modal_projector
        return ProjectorParts(projector.linear_1, projector.linear_2, projector.act)

    def _layout(self, pixels: Pixels) -> VisualLayout:
        grid = self._grid_of(pixels)
        tiles, places = len(pixels.values), grid.rows * grid.columns
        numbers = torch.arange(tiles * places)
        if self._tiles_itself:
            # The model packs numbers as it packs features, so its unpadding is never written twice.
            packed, _ = self._model.pack_image_features(
                [numbers.double().view(tiles, places, 1)],
                torch.tensor([pixels.size]),
                vision_feature_select_strategy="default",
                image_newline=torch.tensor([-1.0], dtype=torch.float64),
            )
            numbers = packed[0][:, 0].long()
        is_patch = numbers >= 0
        tile = torch.where(is_patch, numbers // places, -1)
        place = torch.where(is_patch, numbers % places, -1)
        if self._tiles_itself:
            # Lines of the thumbnail, which has no separators, then those of the mosaic.
            ended = torch.cat([torch.zeros(1, dtype=torch.int64), (~is_patch).cumsum(0)[:-1]])
            first = grid.rows if tiles > 1 else 0
            line = torch.where((tile == 0) & (tiles > 1), place // grid.columns, first + ended)
        else:
            line = tile * grid.rows + place // grid.columns
        device = pixels.values.device
        return VisualLayout(grid, tiles, tile.to(device), place.to(device), line.to(device))

    def _grid_of(self, pixels: Pixels) -> Grid:
        height, width = pixels.values.shape[-2:]
        side = self._side_pixels // self._grid.rows
        return Grid(height // side, width // side)

    def _flops(self, pixels: Pixels) -> float:
        grid = self._grid_of(pixels)
        tiles, places = len(pixels.values), grid.rows * grid.columns
        width = int(self._config.vision_config.hidden_size)
        tokens = places + 1
        matrices = self._embedding_parameters * places
        matrices += (self.parameters - self._embedding_parameters) * tokens
        attention = 2 * self.feature_layer * tokens * tokens * width
        return float(2 * tiles * (matrices + attention))


def cut_tiles(image: npt.NDArray[np.uint8], crops: int) -> list[npt.NDArray[np.uint8]]:
    """Return the whole image made small by averaging, then crops x crops crops row by row.

    Raises:
        ValueError: The sides are no multiples of `crops`.
    """
    height, width = image.shape[0] // crops, image.shape[1] // crops
    if image.shape[:2] != (height * crops, width * crops):
        raise ValueError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels cannot be cut into "
            f"{crops} x {crops} equal crops."
        )
    blocks = image.reshape(height, crops, width, crops, 3).astype(np.int64).sum((1, 3))
    # Rounded half up in whole numbers.
    thumbnail = ((2 * blocks + crops**2) // (2 * crops**2)).astype(np.uint8)
    rows = range(0, height * crops, height)
    columns = range(0, width * crops, width)
    return [thumbnail] + [image[y : y + height, x : x + width] for y in rows for x in columns]


class QwenTower:
    """Qwen2.5-VL's vision transformer and its merger of 2 x 2 patches; see `Tower`.

    A visual token is a group of four patches. Inside the tower groups stand in window order; what
    is summed up by patch is averaged over the group and put back into the order of the picture.
    """

    separator: Tensor | None = None

    def __init__(self, module: Any, image_processor: Any) -> None:
        """Wrap the tower of a `Qwen2_5_VLForConditionalGeneration`."""
        self._visual = module.model.visual
        self._processor = image_processor
        self._merge = int(self._visual.spatial_merge_size)
        self._group = self._merge**2
        self.num_layers = len(self._visual.blocks)
        self.feature_layer = self.num_layers
        self.has_cls = False
        embedding = self._visual.patch_embed.proj
        self._embedding_parameters = embedding.weight.numel()
        self.parameters = self._embedding_parameters + linear_parameters(self._visual.blocks)
        self.projector_parameters = linear_parameters(self._visual.merger)

    def prepare(self, image: npt.NDArray[np.uint8], crops: int) -> Pixels:
        """Return the patches, (patches, values of one)."""
        if crops > 1:
            raise Unsupported("this model takes images of any size whole: crops must be 1.")
        prepared = self._processor(images=[image], return_tensors="pt")
        parameter = self._visual.patch_embed.proj.weight
        values = prepared["pixel_values"].to(parameter.device, parameter.dtype)
        grid = prepared["image_grid_thw"].to(parameter.device)
        height, width = image.shape[:2]
        return Pixels(values, (height, width), grid_thw=grid)

    def shrunk(self, pixels: Pixels, grid_of: Callable[[Grid, int], Grid]) -> Pixels:
        """Refuse: the processor rounds sizes, so a number of tokens cannot be asked for."""
        raise Unsupported("Qwen2.5-VL's processor sets an image's size; `max_pixels` is its limit.")

    def encode(self, pixels: Pixels, watch: Watch, merging: InnerMerging | None = None) -> Encoded:
        """Run all blocks."""
        _check_watch(watch, self.num_layers, has_cls=False)
        if merging is not None:
            raise Unsupported(
                "tokens cannot be merged inside Qwen2.5-VL's tower: its layers attend in windows "
                "of a fixed number of tokens."
            )
        visual, grid = self._visual, pixels.grid_thw
        assert grid is not None
        whole = get_vision_cu_seqlens(grid)
        windows, window_ends = get_vision_window_index(
            grid,
            spatial_merge_size=self._merge,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
        )
        windows = windows.to(grid.device)
        back = windows.argsort()
        count = len(pixels.values)
        states = visual.patch_embed(pixels.values)
        states = visual.permute_input_for_window_attn(states, windows, seq_len=count)
        positions = visual.rotary_pos_emb(states, get_vision_position_ids(grid, self._merge))
        cos, sin = (
            visual.permute_input_for_window_attn(each, windows, seq_len=count) for each in positions
        )
        layout = self._layout(grid)
        encoded = Encoded(states, layout, len(layout.patch_tile))
        # As numbers too, read back from the device once and not for every block.
        spans = [(ends, ends.tolist()) for ends in (window_ends, whole)]
        for number, block in enumerate(visual.blocks, start=1):
            ends, bounds = spans[number - 1 in visual.fullatt_block_indexes]
            with captured_output(block.attn.qkv) as outputs:
                states = block(
                    states,
                    cu_seqlens=ends,
                    max_seqlen=None,
                    position_embeddings=(cos, sin),
                )
            if number in watch.layers:
                self._summarise(
                    encoded, number, watch, outputs[0], (cos, sin), bounds, back, block.attn
                )
            encoded.flops += self._block_flops(block, bounds)
        encoded.flops += 2.0 * self._embedding_parameters * count
        encoded.features = states.view(-1, self._group, states.shape[-1])[back].flatten(1)
        return encoded

    def _summarise(
        self,
        encoded: Encoded,
        number: int,
        watch: Watch,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        ends: Sequence[int],
        back: Tensor,
        part: Any,
    ) -> None:
        """Add the summaries of a block; queries outside a key's window give it nothing."""
        heads = int(part.num_heads)
        queries, keys, _ = qkv.view(len(qkv), 3, heads, -1).unbind(1)
        size = queries.shape[-1]
        if number in watch.keys:
            # Before the rotation: two keys are alike by what they say, not by where they stand.
            means = keys.float().mean(1)
            encoded.keys[number] = means.view(-1, self._group, size).mean(1)[back]
            encoded.watch_flops += float(keys.numel())
        if number in watch.received:
            queries, keys = apply_rotary_pos_emb_vision(queries, keys, *rotary)
            sums = []
            for start, end in itertools.pairwise(ends):
                part_queries, part_keys = (
                    each[start:end].transpose(0, 1) for each in (queries, keys)
                )
                sums.append(attention_sums(part_queries, part_keys, scale=float(part.scaling)))
                encoded.watch_flops += sums_flops(heads, end - start, end - start, size)
            received = torch.cat(sums, 1).mean(0) / len(qkv)
            encoded.received[number] = received.view(-1, self._group).mean(1)[back]

    def project(self, features: Tensor) -> Tensor:
        """Map groups of four patches to embeddings of the decoder."""
        width = features.shape[1] // self._group
        projected: Tensor = self._visual.merger(features.reshape(-1, width))
        return projected

    def projector_parts(self) -> ProjectorParts:
        """Return the projector taken apart."""
        merger = self._visual.merger
        first, activation, second = merger.mlp
        norm = merger.ln_q
        return ProjectorParts(
            first, second, activation, self._group, norm.weight, norm.variance_epsilon
        )

    def _layout(self, grid: Tensor) -> VisualLayout:
        frames, height, width = grid[0].tolist()
        shape = Grid(height // self._merge, width // self._merge)
        place = torch.arange(shape.rows * shape.columns, device=grid.device).repeat(frames)
        tile = torch.arange(frames, device=grid.device).repeat_interleave(
            shape.rows * shape.columns
        )
        line = tile * shape.rows + place // shape.columns
        return VisualLayout(shape, frames, tile, place, line)

    def _block_flops(self, block: Any, ends: Sequence[int]) -> float:
        width = int(block.attn.dim)
        lengths = [end - start for start, end in itertools.pairwise(ends)]
        attention = 2 * width * sum(length**2 for length in lengths)
        return 2.0 * (linear_parameters(block) * sum(lengths) + attention)
