"""How a method is attached to any Hugging Face LVLM. Start with method.py."""
