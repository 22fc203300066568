"""Causal language models for a new LLaVA: loading, the check of the head, room for new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel
from mmlm.model.checkpoint import refuse_unfilled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["add_tokens", "check_head", "load_language", "untie_foreign_head"]


def load_language(
    language: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Takes or loads a causal language model and its tokenizer.

    Args:
        language: a folder, an id, a file `*.gguf` (llama.cpp's format, dequantized; needs the
            extra `gguf`), or a model object.
        tokenizer: needed with an object; a folder, an id or an object.
        dtype: precision, e.g. "bfloat16", or "auto" for the stored one. An object keeps its own.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        InputError: no such model, or no tokenizer.
        MissingTensors: the checkpoint does not fill the model.
        UnsupportedModel: not a causal language model.
    """
    from transformers import PreTrainedModel

    if isinstance(language, PreTrainedModel):
        if tokenizer is None:
            raise InputError(
                f"a {type(language).__name__} object was given without a tokenizer",
                advice="Give tokenizer too: an object, a folder or an id.",
            )
        model = language
    else:
        model = _loaded(str(language), dtype)
    if isinstance(tokenizer, str | Path) or tokenizer is None:
        tokenizer = _tokenizer(str(tokenizer or language))
    return model.eval(), tokenizer


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    source, more = _source(name)
    advice = "Give tokenizer: a folder or an id."
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **more)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source!r} has no tokenizer that can be read: {str(error).splitlines()[0]}",
            advice=advice,
        ) from error
    # Without any file, some classes of the library make a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise InputError(f"{source!r} has no tokenizer: its vocabulary is empty", advice=advice)
    return tokenizer


def _source(name: str) -> tuple[str, dict[str, str]]:
    """Arguments of from_pretrained: a GGUF file is named beside its folder."""
    if not name.endswith(".gguf"):
        return name, {}
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {name!r}", advice="Give the path of a GGUF file.")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"reading {path.name} needs the package gguf, which is not installed",
            advice="pip install 'mmlm[gguf]'",
        ) from error
    return str(path.parent), {"gguf_file": path.name}


def _loaded(name: str, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    source, more = _source(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **more
        )
    except OSError as error:
        raise InputError(
            f"there is no language model {name!r}: {str(error).splitlines()[0]}",
            advice="Give a folder with a checkpoint, an id of the hub, or a GGUF file.",
        ) from error
    except ValueError as error:  # a config without a causal language model, or an unknown one
        raise UnsupportedModel(
            f"{name!r} is no causal language model: {str(error).splitlines()[0]}",
            advice="Give a model that AutoModelForCausalLM loads: Llama, Qwen, Mistral, Gemma ...",
        ) from error
    advice = "The checkpoint is incomplete; download or copy it again."
    refuse_unfilled(name, model, info, advice)
    if more:
        # The weights are plain numbers now. The library still marks them as quantized, and then
        # refuses to save them.
        model.hf_quantizer = None
        model.is_quantized = False
        del model.quantization_method, model.config.quantization_config
    return model


def check_head(language: Any) -> None:
    """Raises unless the logits are one matrix times the decoder's last states.

    That is all the head of a stock LLaVA does: a bias, a scale or a soft cap would be lost without
    a word. The model is run on a few tokens, so this needs no list of families.

    Raises:
        UnsupportedModel: the head does more.
    """
    import torch

    head = language.get_output_embeddings()
    ids = torch.arange(1, 6, device=language.device)[None] % language.config.vocab_size
    with torch.no_grad():
        want = language(input_ids=ids).logits
        got = head(language.base_model(input_ids=ids).last_hidden_state)
    plain = getattr(head, "bias", None) is None and got.shape == want.shape
    if not plain or float((got - want).abs().max()) > 1e-5 * float(want.abs().max()):
        raise UnsupportedModel(
            f"the head of {type(language).__name__} does more than one matrix product (a bias, a "
            "scale or a soft cap), which LlavaForConditionalGeneration would leave out",
            advice="Take another language model: Llama, Qwen, Mistral, Gemma 1 or 3, Phi-3 ...",
        )


def untie_foreign_head(language: Any) -> None:
    """Gives the head weights of its own where stock LLaVA could not tie them.

    It ties its head to an embedding that is called `embed_tokens`; GPT-2's and others' are not.
    """
    import torch

    embedding = language.get_input_embeddings()
    named = getattr(language.base_model, "embed_tokens", None)
    if not language.config.tie_word_embeddings or named is embedding:
        return
    head = language.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    language.config.tie_word_embeddings = False


def add_tokens(
    language: Any,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    pad_to_multiple_of: int = 1,
) -> None:
    """Adds special tokens to a tokenizer and rows for them to a model.

    New rows, of the embedding and of the head, are the mean of the known tokens' rows: then no new
    token is likelier than an average one, and the old ones lose next to nothing (Hewitt, 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
        language: with as many rows as the tokenizer has tokens, or more (padding rows are used).
        tokenizer: tokens it knows already stay as they are.
        tokens: e.g. ["<image>", "<pad>"].
        pad_to_multiple_of: the number of rows becomes a multiple of it (64 suits tensor cores).

    Raises:
        InputError: the tokenizer has more tokens than the model has rows.
    """
    import torch

    n_known, n_rows = len(tokenizer), language.get_input_embeddings().weight.shape[0]
    if n_known > n_rows:
        raise InputError(
            f"the tokenizer has {n_known} tokens, the language model rows for {n_rows}",
            advice="Give the tokenizer that belongs to the language model.",
        )
    known = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in known]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )
    means = [(module, _mean(module.weight, n_known)) for module in _token_rows(language)]
    if len(tokenizer) > n_rows or n_rows % pad_to_multiple_of:
        language.resize_token_embeddings(
            max(len(tokenizer), n_rows),
            pad_to_multiple_of=pad_to_multiple_of,
            mean_resizing=False,
        )
    rows = [tokenizer.convert_tokens_to_ids(token) for token in missing]
    rows += range(n_rows, language.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        for module, (_, mean) in zip(_token_rows(language), means, strict=True):
            module.weight[rows] = mean.to(module.weight.dtype)


def _token_rows(language: Any) -> list[Any]:
    """The modules with one row per token: the embedding, and the head if it has its own weights."""
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    return [embedding] if head.weight is embedding.weight else [embedding, head]


def _mean(weight: torch.Tensor, n_known: int) -> torch.Tensor:
    return weight[:n_known].detach().float().mean(dim=0)
