"""Words become prompts, a picture among them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from vlm_probe.tokens import Prompt

DEFAULT_PROMPT = "Describe the picture."
"""What is asked of a picture that comes without a prompt."""

_PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
)
"""Chat template of a base model, which has none."""


class Chat:
    """Writes conversations as a language model's tokenizer says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, default_prompt: str) -> None:
        """Finds out which tokens are special.

        Args:
            tokenizer: Without a chat template, as base models come, turns are plain
                lines of text behind the beginning-of-text token.
            default_prompt: What is asked of a picture that comes without a prompt.
        """
        self.tokenizer = tokenizer
        self.default_prompt = default_prompt
        self.special = _special_ids(tokenizer)
        self.pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Stands where vectors go; never the padding's id, which could be masked.
        candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, 0, 1)
        self.placeholder = next(i for i in candidates if i not in (None, self.pad))
        self.head = self._before_the_picture()

    def image_prompt(self, text: str | None, n_patches: int) -> Prompt:
        """The prompt of a picture: beginning of text, image vectors, the user's turn.

        Args:
            text: What the user asks; the default prompt if None.
            n_patches: How many positions the picture takes.
        """
        return self._with_picture(self._chat([(text, None)]), n_patches)

    def text_prompt(self, text: str | None, instead: str) -> Prompt:
        """The same prompt with words in the picture's place."""
        ids = self._chat([(text, None)])
        words = self.tokenizer(instead, add_special_tokens=False).input_ids
        return Prompt(
            ids[: self.head] + tuple(words) + ids[self.head :],
            range(self.head, self.head),
            self.special,
        )

    def conversation(
        self, turns: Sequence[tuple[str | None, str]], n_patches: int
    ) -> tuple[Prompt, list[range]]:
        """A picture and a whole conversation on it.

        Args:
            turns: Questions and answers.
            n_patches: How many positions the picture takes; 0 without picture.

        Returns:
            The prompt, and for each turn the positions of what the assistant says,
            end-of-turn tokens included.

        Raises:
            ValueError: The chat template writes a conversation's beginning in another
                way once it goes on, so that answers cannot be told apart.
        """
        whole = self._chat(turns)
        said: list[range] = []
        for n in range(len(turns)):
            asked = self._chat([*turns[:n], (turns[n][0], None)])
            answered = self._chat(turns[: n + 1])
            if (asked, answered) != (whole[: len(asked)], whole[: len(answered)]):
                raise ValueError(
                    "the tokenizer's chat template does not keep the beginning of a "
                    "conversation as it goes on; train with single turns"
                )
            said.append(range(len(asked) + n_patches, len(answered) + n_patches))
        return self._with_picture(whole, n_patches), said

    def _before_the_picture(self) -> int:
        """How many tokens come before the picture.

        The BOS token, as in the paper. Where prompts do not begin with one, what comes
        before the user's words: the first position draws attention whatever stands
        there, with norms that no other has, and is none for a picture.
        """
        ids = self._chat([("a", None)])
        bos = self.tokenizer.bos_token_id
        # Where every turn begins with it, it is a marker and no beginning.
        if ids[:1] == (bos,) and ids.count(bos) == 1:
            return 1
        pair = zip(ids, self._chat([("b", None)]), strict=False)
        return next((n for n, (a, b) in enumerate(pair) if a != b), 0)

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
            chat_template=self.tokenizer.chat_template or _PLAIN,
            add_generation_prompt=turns[-1][1] is None,
            tokenize=True,
            return_dict=False,
        )
        return tuple(ids)

    def _with_picture(self, ids: tuple[int, ...], n_patches: int) -> Prompt:
        filler = (self.placeholder,) * n_patches
        image = range(self.head, self.head + n_patches)
        return Prompt(ids[: self.head] + filler + ids[self.head :], image, self.special)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that are no words; an unknown word is one, unless its id means more."""
    ids = set(tokenizer.all_special_ids)
    # Chat markers are often declared as added tokens and nowhere else.
    ids |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if tokenizer.unk_token_id not in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ):
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)
