"""One frozen pass through the language model with image vectors put in."""

from vlm_probe.language.model import LanguageModel, Visitor

__all__ = ["LanguageModel", "Visitor"]
