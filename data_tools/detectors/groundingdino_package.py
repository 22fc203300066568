"""groundingdino-py on today's transformers: its model built, filled, and read by an adapter.

groundingdino-py 0.4.0 wraps BERT in a class that copies methods which transformers 5 removed. The
wrapper is replaced while the model is built; no file of the package is touched.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIGS", "build", "fill", "quiet", "read_checkpoint"]

CONFIGS = {"SwinB": "GroundingDINO_SwinB_cfg.py", "SwinT_OGC": "GroundingDINO_SwinT_OGC.py"}
"""The released configurations, which lie in the installed package."""

# In both released files, and without a part in inference: labels of denoising training, and
# position numbers that transformers no longer stores.
_BENIGN = frozenset({"label_enc.weight", "bert.embeddings.position_ids"})


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a released file.

    Raises:
        InputError: If it is missing, damaged, or no such file. Nothing in it is executed.
    """
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content["model"]
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except OSError as error:
        raise InputError(
            f"The checkpoint {str(path)!r} cannot be read: {error.strerror or error}.",
            advice="Download it first; docs/data.md names the released files.",
        ) from error
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"The checkpoint {str(path)!r} is damaged: {_first_line(error)}",
            advice="Download it again.",
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is no checkpoint of Grounding DINO: it holds no tensors as 'model'.",
            advice="Give one of the released files; docs/data.md names them.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["it ends too early"])[0]


def build(config: str, text_encoder: str) -> Any:
    """The model of a configuration, its weights random, with BERT read by the adapter.

    Args:
        config: A key of `CONFIGS`, or the path of a configuration file.
        text_encoder: BERT's folder or hub identifier.

    Raises:
        InputError: If one of them cannot be read.
    """
    with quiet():
        import groundingdino.models.GroundingDINO.groundingdino as package
        from groundingdino import config as configurations
        from groundingdino.models import build_model
        from groundingdino.util import get_tokenlizer
        from groundingdino.util.slconfig import SLConfig

    path = Path(configurations.__file__).with_name(CONFIGS[config]) if config in CONFIGS else None
    try:
        settings = SLConfig.fromfile(str(path or config))
    except (OSError, SyntaxError) as error:
        raise InputError(
            f"The configuration {config!r} cannot be read: {error}.",
            advice=f"Give {' or '.join(CONFIGS)}, or the path of a configuration file.",
        ) from error
    settings.text_encoder_type = text_encoder
    # Both only save memory in training.
    settings.use_checkpoint = settings.use_transformer_ckpt = False
    with (
        quiet(),
        _replaced(package, "BertModelWarper", _bert_adapter()),
        _replaced(get_tokenlizer, "get_tokenlizer", _tokenizer),
        _replaced(get_tokenlizer, "get_pretrained_language_model", _empty_bert),
    ):
        return build_model(settings)


def _tokenizer(text_encoder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(text_encoder)
    except (OSError, ValueError) as error:
        raise _no_text_encoder(text_encoder, error) from error


def _empty_bert(text_encoder: str) -> Any:
    """BERT without its weights, which the checkpoint brings."""
    from transformers import BertConfig, BertModel

    try:
        return BertModel(BertConfig.from_pretrained(text_encoder))
    except (OSError, ValueError) as error:
        raise _no_text_encoder(text_encoder, error) from error


def _no_text_encoder(name: str, error: Exception) -> InputError:
    return InputError(
        f"The text encoder {name!r} cannot be read: {_first_line(error)}",
        advice="Give text_encoder the folder with BERT's config.json, tokenizer.json and "
        "tokenizer_config.json.",
    )


def _bert_adapter() -> type[torch.nn.Module]:
    """Replaces the package's wrapper of BERT, which calls what transformers 5 no longer has."""
    import torch

    class BertAdapter(torch.nn.Module):
        """BERT that keeps every name's tokens to themselves.

        The children have the names they have in checkpoints. The model stays outside of torch's
        registration, so that it has no second set of names there.
        """

        def __init__(self, bert_model: Any) -> None:
            super().__init__()
            self.config = bert_model.config
            self.embeddings = bert_model.embeddings
            self.encoder = bert_model.encoder
            self.pooler = bert_model.pooler
            self._whole: Any
            object.__setattr__(self, "_whole", bert_model)

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor,
            position_ids: torch.Tensor | None = None,
        ) -> Any:
            if attention_mask.ndim == 3:  # which token sees which
                # Additive: a boolean one of four dimensions is misread by eager attention.
                dtype = self.embeddings.word_embeddings.weight.dtype
                hidden = torch.zeros(attention_mask.shape, dtype=dtype, device=input_ids.device)
                hidden.masked_fill_(~attention_mask.bool(), torch.finfo(dtype).min)
                attention_mask = hidden[:, None]
            return self._whole(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
            )

    return BertAdapter


def fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copies a checkpoint into its model.

    Raises:
        MissingTensors: If it lacks tensors, has others, or some have another shape; names them.
    """
    from mmlm.errors import raise_for

    own = model.state_dict()
    raise_for(
        {
            "missing": sorted(own.keys() - state.keys()),
            "unexpected": sorted(state.keys() - own.keys() - _BENIGN),
            "of another shape": sorted(
                name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
            ),
        },
        f"the checkpoint {source!r} does not fit its configuration",
        "SwinT_OGC belongs to groundingdino_swint_ogc.pth, SwinB to "
        "groundingdino_swinb_cogcoor.pth.",
    )
    model.load_state_dict({name: state[name] for name in own})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch and timm say about the package's own lines; all else is heard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Importing from timm.models", FutureWarning)
        warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming", UserWarning)
        warnings.filterwarnings("ignore", r"`torch\.cuda\.amp\.autocast", FutureWarning)
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'", UserWarning)
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)
