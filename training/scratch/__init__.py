"""A small LLaVA trained from nothing: vision, language, then the two together."""
