"""One frozen pass through the language model with image vectors put in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from nnsight import NNsight
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlm_probe.tokens import Prompt

Visitor = Callable[[int, Float[Tensor, "row pos d_model"]], None]
"""Gets a layer's number and its residual stream, which it must not keep or change."""


class LanguageModel:
    """A frozen HookedTransformer that takes image vectors among its tokens."""

    def __init__(
        self,
        hooked: HookedTransformer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "language",
        default_prompt: str = "Describe the picture.",
    ) -> None:
        """Wraps a model.

        Args:
            hooked: The model, with the weight processing that its SAEs expect.
            tokenizer: Its tokenizer, with a chat template.
            name: Where it came from, for tables.
            default_prompt: What is asked of a picture that comes without a prompt.
        """
        self.hooked = hooked.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.default_prompt = default_prompt
        self.special = _special_ids(tokenizer)
        self._traced = NNsight(self.hooked)

    @classmethod
    def load(
        cls, folder: str | Path, *, default_prompt: str = "Describe the picture."
    ) -> LanguageModel:
        """Loads a folder with a HookedTransformer and its tokenizer.

        The files are `hooked_transformer.json`, `model.safetensors`, and what
        Hugging Face tokenizers save. The config is `HookedTransformerConfig.to_dict()`,
        the weights the state dict without the causal masks; they are computed with in
        float32.
        """
        folder = Path(folder)
        config = json.loads((folder / "hooked_transformer.json").read_text())
        config["dtype"] = getattr(torch, config["dtype"].removeprefix("torch."))
        config["device"] = "cpu"  # else TransformerLens takes a GPU if it sees one
        hooked = HookedTransformer(HookedTransformerConfig.from_dict(config))
        weights = load_file(folder / "model.safetensors")
        missing, unexpected = hooked.load_state_dict(weights, strict=False)
        missing = [m for m in missing if m.rsplit(".", 1)[-1] not in _MADE_ANEW]
        if missing or unexpected:
            raise ValueError(
                f"{folder / 'model.safetensors'} does not fit "
                f"hooked_transformer.json beside it: missing {missing or 'nothing'}, "
                f"unexpected {unexpected or 'nothing'}"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(hooked, tokenizer, name=folder.name, default_prompt=default_prompt)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.hooked.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.hooked.cfg.d_model

    def image_prompt(self, text: str | None, n_patches: int) -> Prompt:
        """The prompt of a picture: beginning of text, image vectors, the user's turn.

        Args:
            text: What the user asks; the default prompt if None.
            n_patches: How many positions the picture takes.
        """
        return self._with_picture(self._chat([(text, None)]), n_patches)

    def text_prompt(self, text: str | None, instead: str) -> Prompt:
        """The same prompt with words in the picture's place."""
        start, turn = self._split(self._chat([(text, None)]))
        words = self.tokenizer(instead, add_special_tokens=False).input_ids
        return Prompt(start + tuple(words) + turn, range(0), self.special)

    def conversation(
        self, turns: Sequence[tuple[str | None, str]], n_patches: int
    ) -> tuple[Prompt, list[int]]:
        """A picture and a whole conversation on it.

        Args:
            turns: Questions and answers.
            n_patches: How many positions the picture takes.

        Returns:
            The prompt, and the positions of what the assistant says, end-of-turn
            tokens included.

        Raises:
            ValueError: The chat template writes a conversation's beginning in another
                way once it goes on, so that answers cannot be told apart.
        """
        whole = self._chat(turns)
        said: list[int] = []
        for n in range(len(turns)):
            asked = self._chat([*turns[:n], (turns[n][0], None)])
            answered = self._chat(turns[: n + 1])
            if (asked, answered) != (whole[: len(asked)], whole[: len(answered)]):
                raise ValueError(
                    f"the chat template of {self.name!r} does not keep the beginning "
                    "of a conversation as it goes on; train with single turns"
                )
            said += range(len(asked) + n_patches, len(answered) + n_patches)
        return self._with_picture(whole, n_patches), said

    def read(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "row patch d_model"] | None,
        layers: Sequence[int],
        visit: Visitor,
    ) -> None:
        """Runs prompts as far as the last layer asked for; each layer is visited.

        Nothing is kept: a layer's residual stream is given to `visit` while the model
        runs, and the unembedding and later layers are not computed.

        Args:
            prompts: Prompts of any lengths.
            vectors: What goes to the prompts' image positions; None without pictures.
            layers: Numbers of layers, whose `hook_resid_post` is visited.
            visit: Called once for each layer, in rising order.
        """
        ordered = sorted(set(layers))
        if not ordered or not 0 <= ordered[0] <= ordered[-1] < self.n_layers:
            raise ValueError(
                f"layers {list(layers)}: expected some of 0 to {self.n_layers - 1}"
            )
        tokens, mask, (rows, positions, put) = self._inputs(prompts, vectors)
        with (
            torch.no_grad(),
            self._traced.trace(
                tokens,
                return_type=None,
                attention_mask=mask,
                stop_at_layer=ordered[-1] + 1,
            ),
        ):
            self._traced.hook_embed.output[rows, positions] = put
            for layer in ordered:
                visit(layer, self._traced.blocks[layer].hook_resid_post.output)

    def logits(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "row patch d_model"] | None,
    ) -> Float[Tensor, "row pos vocab"]:
        """Logits at every position; gradients reach `vectors` and nothing else.

        Rows are padded on the right; positions past a prompt's end mean nothing.
        """
        tokens, mask, (rows, positions, put) = self._inputs(prompts, vectors)
        with self._traced.trace(
            tokens, return_type="logits", attention_mask=mask
        ) as tracer:
            self._traced.hook_embed.output[rows, positions] = put
            logits = tracer.result.save()
        # Bound inside the trace, whose body runs elsewhere.
        return logits  # noqa: RET504 # pyright: ignore[reportPossiblyUnboundVariable]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "row patch d_model"] | None,
        *,
        max_new_tokens: int = 16,
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
            )
            for row, i in enumerate(open_rows):
                prompt = growing[i]
                token = int(logits[row, len(prompt.ids) - 1].argmax())
                said[i].append(token)
                growing[i] = Prompt((*prompt.ids, token), prompt.image, prompt.special)
        return [
            self.tokenizer.decode(words, skip_special_tokens=True) for words in said
        ]

    def _chat(self, turns: Sequence[tuple[str | None, str | None]]) -> tuple[int, ...]:
        """Ids of a conversation; an answer of None is still to be given."""
        messages = []
        for question, answer in turns:
            asked = question or self.default_prompt
            messages.append({"role": "user", "content": asked})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        ids = self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=turns[-1][1] is None,
            tokenize=True,
            return_dict=False,
        )
        return tuple(ids)

    def _split(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The beginning-of-text token, if there is one, and the rest."""
        begins = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        return ids[:begins], ids[begins:]

    def _with_picture(self, ids: tuple[int, ...], n_patches: int) -> Prompt:
        start, rest = self._split(ids)
        filler = (_placeholder(self.tokenizer),) * n_patches
        image = range(len(start), len(start) + n_patches)
        return Prompt(start + filler + rest, image, self.special)

    def _inputs(
        self,
        prompts: Sequence[Prompt],
        vectors: Float[Tensor, "row patch d_model"] | None,
    ) -> tuple[
        Int[Tensor, "row pos"],
        Bool[Tensor, "row pos"],
        tuple[Int[Tensor, " token"], Int[Tensor, " token"], Tensor],
    ]:
        """Right-padded tokens, their mask, and which vector goes where."""
        length = max(len(prompt.ids) for prompt in prompts)
        device, weight = self.hooked.cfg.device, self.hooked.W_E
        if length > self.hooked.cfg.n_ctx:
            raise ValueError(
                f"a prompt of {length} tokens is longer than the language model's "
                f"context of {self.hooked.cfg.n_ctx}; shorten the prompt or caption"
            )
        pad = self.tokenizer.pad_token_id or 0
        tokens = torch.full((len(prompts), length), pad, device=device)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.ids)] = torch.tensor(prompt.ids, device=device)
            mask[row, : len(prompt.ids)] = True
        places = [(r, p) for r, prompt in enumerate(prompts) for p in prompt.image]
        n_vectors = 0 if vectors is None else vectors.shape[0] * vectors.shape[1]
        if len(places) != n_vectors:
            raise ValueError(
                f"prompts have {len(places)} image positions, vectors are {n_vectors}"
            )
        rows, positions = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        put = (
            weight.new_zeros(0, self.d_model)
            if vectors is None
            else vectors.flatten(0, 1).to(device, weight.dtype)
        )
        return tokens, mask, (rows.to(device), positions.to(device), put)


_MADE_ANEW = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
"""Buffers that a HookedTransformer computes from its config."""


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that are no words; an unknown word is one, unless its id means more."""
    ids = set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ):
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)


def _placeholder(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to stand where vectors go; never the padding's, which could be masked."""
    candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, 0, 1)
    return next(i for i in candidates if i is not None and i != tokenizer.pad_token_id)
