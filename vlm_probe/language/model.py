"""A frozen language model: a pass that is visited layer by layer, and answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from nnsight import NNsight
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlm_probe.language.chat import DEFAULT_PROMPT, Chat
from vlm_probe.language.hooked import (
    Hooked,
    is_hooked_folder,
    load_checkpoint,
    load_hooked,
    save_hooked,
)
from vlm_probe.tokens import HOOK_POINTS, Prompt, check_names
from vlm_probe.weights import floating

Visitor = Callable[[int, Float[Tensor, "row pos d_model"]], None]
"""Gets a layer's number and its residual stream, which it must not keep or change."""


class LanguageModel:
    """A frozen language model that takes image vectors among its tokens."""

    def __init__(
        self,
        hooked: Hooked,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "language",
        default_prompt: str = DEFAULT_PROMPT,
        padding_side: str = "right",
    ) -> None:
        """Wraps a model.

        Args:
            hooked: A HookedTransformer or TransformerBridge, with the weight processing
                that its SAEs expect.
            tokenizer: Its tokenizer.
            name: Where it came from, for tables.
            default_prompt: What is asked of a picture that comes without a prompt.
            padding_side: Where shorter prompts of a batch are filled up, "right" or
                "left"; every pass carries its mask, so this changes no result.
        """
        check_names("padding side", [padding_side], ("right", "left"))
        self.hooked = hooked.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.padding_side = padding_side
        self.chat = Chat(tokenizer, default_prompt)
        self._traced = NNsight(self.hooked)

    @classmethod
    def load(
        cls,
        source: str | Path | PreTrainedModel | Hooked,
        *,
        backend: str = "auto",
        processing: Mapping[str, bool] | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_prompt: str = DEFAULT_PROMPT,
    ) -> LanguageModel:
        """Loads a model and its tokenizer.

        Args:
            source: A hub name, a folder written by Hugging Face's `save_pretrained` or
                by `save`, or a model in memory: Hugging Face's, a HookedTransformer or
                a TransformerBridge, which is taken as it is.
            backend: "hooked" (HookedTransformer), "bridge" (TransformerBridge), or
                "auto": the first where TransformerLens can convert the architecture.
            processing: TransformerLens' weight processing to be done, for instance
                `{"center_writing_weights": True}`, as the SAEs' metadata names it
                (`LayerSae.processing`). None by default.
            device: Where the model goes.
            dtype: Of its weights: "float32" or "bfloat16".
            tokenizer: The source's own if None.
            default_prompt: What is asked of a picture that comes without a prompt.

        Raises:
            FileNotFoundError: Nothing there, or the hub cannot be reached.
            ValueError: Files that are damaged or do not fit, an architecture or
                processing that cannot be had.
        """
        dtype = floating(dtype)
        if isinstance(source, Hooked):
            hooked, own = source, source.tokenizer
            name = source.cfg.model_name
            if (tokenizer or own) is None:
                raise ValueError(f"{name!r} has no tokenizer; give one as tokenizer=")
        elif not isinstance(source, PreTrainedModel) and is_hooked_folder(source):
            check_names(
                "backend of a HookedTransformer's folder", [backend], ("auto", "hooked")
            )
            hooked, own = load_hooked(source, device=device, dtype=dtype)
            name = str(source)
        else:
            hooked, own = load_checkpoint(
                source,
                backend=backend,
                processing=processing,
                device=device,
                dtype=dtype,
                tokenizer=tokenizer,
            )
            held = isinstance(source, PreTrainedModel)
            name = source.config.name_or_path if held else str(source)
        return cls(
            hooked,
            tokenizer or own,
            name=Path(name).name,
            default_prompt=default_prompt,
        )

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer to a folder that `load` reads."""
        save_hooked(self.hooked, self.tokenizer, folder)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.hooked.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.hooked.cfg.d_model

    @property
    def backend(self) -> str:
        """How it is run: "hooked" or "bridge"."""
        return "bridge" if isinstance(self.hooked, TransformerBridge) else "hooked"

    @property
    def architecture(self) -> str:
        """Of the checkpoint, such as "Gemma2ForCausalLM"; empty if not known."""
        cfg = self.hooked.cfg
        known = (
            getattr(cfg, n, None) for n in ("original_architecture", "architecture")
        )
        return next(filter(None, known), "")

    @property
    def soft_caps(self) -> tuple[float, float]:
        """Of attention scores and logits; none is -1 or 0."""
        if self.backend == "bridge":
            config = self.hooked.original_model.config
            names = ("attn_logit_softcapping", "final_logit_softcapping")
            found = [getattr(config, name, None) or -1.0 for name in names]
            return found[0], found[1]
        cfg = self.hooked.cfg
        return cfg.attn_scores_soft_cap, cfg.output_logits_soft_cap

    @property
    def n_words(self) -> int:
        """Ids that both the tokenizer and the embedding have."""
        return min(len(self.tokenizer), self.hooked.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.hooked.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.hooked.parameters()).dtype

    @cached_property
    def processing(self) -> dict[str, bool]:
        """Which weight processing shows in the model, by TransformerLens' names.

        Only what changes the residual stream of LayerNorm models is looked for, and
        folded norms; nothing of it shows in the residual stream of RMS models.
        """
        kind = self.hooked.cfg.normalization_type or ""
        if self.backend == "bridge" or not kind.startswith("LN"):
            return {"fold_ln": True} if kind == "RMSPre" else {}
        words = self.hooked.W_E.float()
        # Means of random words are about 1/sqrt(d_model) of their size; centered ones
        # are zero but for rounding, which bfloat16 makes some 0.002 of that.
        size = words.square().mean(-1).sqrt() / self.d_model**0.5
        centered = bool((words.mean(-1).abs() / size).nanmedian() < 0.05)
        found = {"fold_ln": kind == "LNPre", "center_writing_weights": centered}
        return {name: True for name, on in found.items() if on}

    def read(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "image patch d_model"] | None,
        layers: Sequence[int],
        visit: Visitor,
        *,
        hook_point: str = "resid_post",
        inject_layer: int = 0,
    ) -> None:
        """Runs prompts as far as the last layer asked for; each layer is visited.

        Nothing is kept: a layer's residual stream is given to `visit` while the model
        runs, and the unembedding and later layers are not computed.

        Args:
            prompts: Prompts of any lengths.
            vectors: What goes to the image positions of those prompts that have any, in
                order; None without pictures.
            layers: Numbers of layers, whose residual stream is visited.
            visit: Called once for each layer, in rising order; position p of a row is
                position p of its prompt, on whichever side it was padded.
            hook_point: Where in a block: one of `HOOK_POINTS`.
            inject_layer: Before which block the vectors are put in. Until then nothing
                stands at their positions: zeros enter the first block.
        """
        if not layers:
            raise ValueError(f"layers []: expected some of 0 to {self._last}")
        way = self._way(layers, visit, hook_point, inject_layer)
        batch = self._batch(prompts, vectors)
        with (
            torch.no_grad(),
            self._traced.trace(
                batch.tokens,
                return_type=None,
                attention_mask=batch.mask,
                stop_at_layer=max(layers) + 1,
            ) as tracer,
        ):
            self._go(way, batch, max(layers))
            tracer.stop()  # the rest of the last block, if it was read before its end

    def logits(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "image patch d_model"] | None,
        *,
        layers: Sequence[int] = (),
        visit: Visitor | None = None,
        hook_point: str = "resid_post",
        inject_layer: int = 0,
    ) -> Float[Tensor, "row pos vocab"]:
        """Logits at every position; gradients reach `vectors` and nothing else.

        They are the model's own, a final soft-cap included. Positions past a prompt's
        end mean nothing.

        Args:
            prompts: Prompts of any lengths.
            vectors: What goes to the image positions of those prompts that have any, in
                order; None without pictures.
            layers: Layers that are visited on the way, with their gradients.
            visit: As in `read`.
            hook_point: As in `read`.
            inject_layer: As in `read`.
        """
        way = self._way(layers, visit, hook_point, inject_layer)
        batch = self._batch(prompts, vectors)
        with self._traced.trace(
            batch.tokens, return_type="logits", attention_mask=batch.mask
        ) as tracer:
            self._go(way, batch, self._last)
            logits = tracer.result.save()
        # Bound inside the trace, whose body runs elsewhere.
        return batch.aligned(logits)  # pyright: ignore[reportPossiblyUnboundVariable]

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Float[Tensor, "token d_model"]:
        """Words as they enter the residual stream, Gemma's scale included.

        Positions that are learned and added, as GPT-2's are, come after this, to words
        and image vectors alike.
        """
        tokens = torch.tensor(list(ids), device=self.device)[:, None]
        with self._traced.trace(tokens, return_type=None, stop_at_layer=1):
            embedded = self._traced.hook_embed.output.save()
        return embedded[:, 0]  # pyright: ignore[reportPossiblyUnboundVariable]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "image patch d_model"] | None,
        *,
        max_new_tokens: int = 16,
        inject_layer: int = 0,
    ) -> list[str]:
        """Greedy answers, up to the end-of-text token, without special tokens."""
        growing = list(prompts)
        said: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            open_rows = [
                i
                for i, words in enumerate(said)
                if not words or words[-1] != self.tokenizer.eos_token_id
            ]
            if not open_rows:
                break
            logits = self.logits(
                [growing[i] for i in open_rows],
                None if vectors is None else vectors[open_rows],
                inject_layer=inject_layer,
            )
            for row, i in enumerate(open_rows):
                prompt = growing[i]
                token = int(logits[row, len(prompt.ids) - 1].argmax())
                said[i].append(token)
                growing[i] = Prompt((*prompt.ids, token), prompt.image, prompt.special)
        return [
            self.tokenizer.decode(words, skip_special_tokens=True) for words in said
        ]

    @property
    def _last(self) -> int:
        return self.n_layers - 1

    def _way(
        self,
        layers: Sequence[int],
        visit: Visitor | None,
        hook_point: str,
        inject_layer: int,
    ) -> _Way:
        """What is to be done on a pass, if it can be done.

        Raises:
            ValueError: It cannot; says what can.
        """
        check_names("hook point", [hook_point], HOOK_POINTS)
        if layers and not 0 <= min(layers) <= max(layers) <= self._last:
            raise ValueError(
                f"layers {list(layers)}: expected some of 0 to {self._last}"
            )
        if not 0 <= inject_layer <= self._last:
            raise ValueError(
                f"inject_layer {inject_layer}: image vectors enter before one of the "
                f"blocks 0 to {self._last}"
            )
        if hook_point == "resid_mid" and self.hooked.cfg.parallel_attn_mlp:
            raise ValueError(
                f"{self.name!r} has no resid_mid, for attention and MLP of its blocks "
                "stand side by side; take SAEs of resid_pre or resid_post"
            )
        return _Way(frozenset(layers), visit, hook_point, inject_layer)

    def _go(self, way: _Way, batch: _Batch, last: int) -> None:
        """Puts vectors in and visits layers, in a trace of a pass as far as `last`."""
        blocks, places = self._traced.blocks, (batch.rows, batch.positions)
        at = way.inject_layer
        self._traced.hook_embed.output[places] = 0 if at else batch.put
        # In the order in which the model comes by.
        for layer in sorted({*way.layers, at}):
            if layer and layer == at <= last:
                # A copy: what a visitor got of the block before is the same tensor.
                entering = blocks[layer].hook_resid_pre.output.clone()
                entering[places] = batch.put
                blocks[layer].hook_resid_pre.output = entering
            if way.visit is not None and layer in way.layers:
                point = getattr(blocks[layer], f"hook_{way.hook_point}")
                way.visit(layer, batch.aligned(point.output))

    def _batch(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "image patch d_model"] | None,
    ) -> _Batch:
        length = max(len(prompt.ids) for prompt in prompts)
        if length > self.hooked.cfg.n_ctx:
            raise ValueError(
                f"a prompt of {length} tokens is longer than the "
                f"{self.hooked.cfg.n_ctx} positions that the language model is run "
                "with; shorten the prompt or caption"
            )
        tokens = torch.full((len(prompts), length), self.chat.pad)
        mask = torch.zeros_like(tokens)
        left = self.padding_side == "left"
        starts = [left * (length - len(prompt.ids)) for prompt in prompts]
        for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True)):
            tokens[row, start : start + len(prompt.ids)] = torch.tensor(prompt.ids)
            mask[row, start : start + len(prompt.ids)] = 1
        places = [
            (row, start + position)
            for row, (start, prompt) in enumerate(zip(starts, prompts, strict=True))
            for position in prompt.image
        ]
        n_vectors = 0 if vectors is None else vectors.shape[0] * vectors.shape[1]
        if len(places) != n_vectors:
            raise ValueError(
                f"prompts have {len(places)} image positions, vectors are {n_vectors}"
            )
        put = torch.zeros(0, self.d_model)
        if vectors is not None:
            put = vectors.flatten(0, 1)
            if "center_writing_weights" in self.processing:
                # A LayerNorm model does not see the mean over d_model, and weights
                # written without it make words that have none. Image vectors that
                # kept theirs would differ from words by what the model never uses.
                put = put - put.mean(-1, keepdim=True)
        rows, positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        return _Batch(
            tokens.to(self.device),
            mask.to(self.device),
            torch.tensor(starts, device=self.device),
            rows.to(self.device),
            positions.to(self.device),
            put.to(self.device, self.dtype),
        )


@dataclass(frozen=True)
class _Way:
    """What is done on a pass: where vectors are put in, and what is visited."""

    layers: frozenset[int]
    visit: Visitor | None
    hook_point: str
    inject_layer: int


@dataclass(frozen=True)
class _Batch:
    """Padded tokens, their mask, and which vector goes where."""

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    start: Int[Tensor, " row"]
    """Position of each prompt's first token."""
    rows: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    put: Float[Tensor, "token d_model"]

    def aligned(self, x: Float[Tensor, "row pos d"]) -> Float[Tensor, "row pos d"]:
        """Each row from its prompt's first token on."""
        if not self.start.any():
            return x
        at = self.start[:, None] + torch.arange(x.shape[1], device=x.device)
        at = at.clamp(max=x.shape[1] - 1)
        return x[torch.arange(len(x), device=x.device)[:, None], at]
