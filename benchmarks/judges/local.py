"""A judge on this machine: a Hugging Face language model with a chat template, decoded greedily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.judges import Judge, JudgePrompt, Verdict
from mmlm.errors import InputError

__all__ = ["LocalJudge"]


class LocalJudge(Judge):
    """Replies of a causal language model, token by token the most likely one.

    The model is loaded with the first prompt, so a run whose replies are all stored needs neither
    its weights nor their memory. Prompts are answered one by one: a reply does not depend on its
    neighbours in a batch.

    Args:
        model: A Hugging Face id, or a folder.
        max_tokens: Longest reply; a reply that is cut off there fails.
        revision: Commit or branch on the hub.
        dtype: Number format of the weights.
        device: Where it runs; "auto" takes the first GPU if there is one.
    """

    def __init__(
        self,
        model: str,
        *,
        max_tokens: int = 1024,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens!r}.")
        self.model = model
        named = {} if revision is None else {"revision": revision}
        self.parameters: Mapping[str, Any] = {
            "decoding": "greedy",
            "max_tokens": max_tokens,
            "dtype": dtype,
            **named,
        }
        self._revision = revision
        self._device = device
        self._loaded: tuple[Any, Any] | None = None

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Answers one prompt after the other.

        Raises:
            InputError: If the model cannot be loaded, or has no chat template that takes the
                messages.
        """
        for prompt in prompts:
            yield self._one(prompt)

    def _one(self, prompt: JudgePrompt) -> Verdict:
        import torch

        model, tokenizer = self._load()
        inputs = self._inputs(tokenizer, prompt).to(model.device)
        length = inputs["input_ids"].shape[1]
        longest = self.parameters["max_tokens"]
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and length + longest > room:
            return Verdict.failed(prompt.id, "the prompt is too long for the judge")
        with torch.inference_mode():
            tokens = model.generate(**inputs, generation_config=self._greedy(model, tokenizer))
        new = tokens[0, length:]
        if len(new) == longest and int(new[-1]) not in _ends(model, tokenizer):
            return Verdict.failed(prompt.id, "the reply was cut off at the token limit")
        reply = tokenizer.decode(new, skip_special_tokens=True).strip()
        return Verdict(prompt.id, reply) if reply else Verdict.failed(prompt.id, "an empty reply")

    def _inputs(self, tokenizer: Any, prompt: JudgePrompt) -> Any:
        from jinja2 import TemplateError

        try:
            return tokenizer.apply_chat_template(
                prompt.messages,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        except (TemplateError, ValueError) as error:  # ValueError: there is no template
            raise InputError(
                f"The chat template of {self.model!r} does not take the prompt: {error}",
                advice="Use an instruction-tuned model, or one that takes a system message.",
            ) from error

    def _greedy(self, model: Any, tokenizer: Any) -> Any:
        # A fresh configuration: temperature, top_p or penalties of the checkpoint's own must not
        # make "greedy" differ between models.
        from transformers import GenerationConfig

        ends = sorted(_ends(model, tokenizer))
        padding = tokenizer.pad_token_id
        return GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.parameters["max_tokens"],
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else next(iter(ends), None),
        )

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            device = self._device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self._revision)
                model = AutoModelForCausalLM.from_pretrained(
                    self.model, revision=self._revision, dtype=self.parameters["dtype"]
                )
            except (OSError, ValueError) as error:
                raise InputError(
                    f"The judge {self.model!r} cannot be loaded: {' '.join(str(error).split())}",
                    advice="Give the id or folder of a causal language model with its tokenizer.",
                ) from error
            model = model.eval()
            model.to(device)
            self._loaded = model, tokenizer
        return self._loaded


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a reply: the checkpoint may name several, e.g. end of turn and of text."""
    listed = model.generation_config.eos_token_id
    ends = set(listed) if isinstance(listed, list) else {listed}
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}
