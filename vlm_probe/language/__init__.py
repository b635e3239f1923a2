"""One frozen pass through the language model with image vectors put in."""

from vlm_probe.language.chat import DEFAULT_PROMPT
from vlm_probe.language.model import LanguageModel, Visitor

__all__ = ["DEFAULT_PROMPT", "LanguageModel", "Visitor"]
