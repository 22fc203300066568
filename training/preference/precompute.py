"""Computing the reference's log-probabilities ahead of a training, and training with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmlm.engine.build_in import built_in
from mmlm.progress import progress_bar
from mmlm.records import plain_json
from training.adapters import is_peft
from training.gather import all_gathered, wait_for_all
from training.preference.cache_settings import check_cache_settings
from training.preference.content import (
    collator_facts,
    identifier,
    processor_facts,
    row_contents,
    tokens_hash,
    weights_hash,
)
from training.preference.reference_cache import (
    CachedReference,
    ReferenceCache,
    collated,
    part_file,
)

if TYPE_CHECKING:
    from trl import DPOTrainer

__all__ = ["precompute_ref", "reference_key", "use_reference_cache"]


def precompute_ref(
    trainer: DPOTrainer,
    path: Path,
    rows: Sequence[Any] | None = None,
    *,
    extra_losses: Sequence[Any] = (),
    show: bool = False,
) -> ReferenceCache:
    """Computes the reference's values of all rows that are not stored yet.

    Every process takes its share and writes each batch as soon as it is done, into a file of its
    own: a killed run goes on where it was, also with another number of processes.

    Args:
        trainer: built, not yet training; with its own ``compute_ref_log_probs``, data collator and
            reference (adapter switched off, adapter "ref", reference model, or, if there is none of
            them, the model as it is now).
        path: folder of the cache, made if missing; on a file system that all processes see.
        rows: default: of the trainer's data sets for training and evaluation.
        extra_losses: of the trainer.
        show: whether the first process draws a progress bar.

    Returns:
        The cache, complete and checked against the rows.

    Raises:
        CacheSettingsError: see `check_cache_settings`.
        ReferenceCacheMismatch: the folder holds values of another model, processor, precision ...
        ImageReadError: a picture cannot be read.
    """
    check_cache_settings(trainer.args, trainer.model, extra_losses)
    path.mkdir(parents=True, exist_ok=True)
    key = reference_key(trainer)
    cache = ReferenceCache.open(path, key)
    rows = _all_rows(trainer) if rows is None else list(rows)
    rank, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    contents = _contents(rows, rank, count)
    todo = {
        name: (row, content)
        for row, content in zip(rows, contents, strict=True)
        if (name := _content_key(row, content)) not in cache.records
    }
    if todo:
        # Reading above and writing below are apart: the gathering in between is a meeting of all.
        _compute(trainer, path / f"part-{rank}-of-{count}.jsonl", key, todo, show and rank == 0)
        wait_for_all()
        cache = ReferenceCache.open(path, key)
    cache.check(rows, contents)
    return cache


def _all_rows(trainer: DPOTrainer) -> list[Any]:
    evaluation = trainer.eval_dataset
    sets = [trainer.train_dataset]
    sets += evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return [one[index] for one in sets if one is not None for index in range(len(one))]


def _contents(rows: Sequence[Any], rank: int, count: int) -> list[dict[str, str]]:
    """The contents of all rows, each process having hashed its share of the files."""
    shares = all_gathered(row_contents(rows[rank::count]))
    return [shares[index % count][index // count] for index in range(len(rows))]


def _content_key(row: Any, content: Mapping[str, str]) -> str:
    return f"{identifier(row)} {content['images'][:24]} {content['text'][:24]}"


def _compute(
    trainer: DPOTrainer,
    part: Path,
    key: Mapping[str, Any],
    todo: Mapping[str, tuple[Any, dict[str, str]]],
    show: bool,
) -> None:
    """Computes this process's share of the rows and writes it batch by batch."""
    rank, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
    names = list(todo)
    mine = names[rank::count]
    batches = [mine[start : start + size] for start in range(0, len(mine), size)]
    # Under ZeRO-3 a forward pass is a meeting of all processes: everyone makes as many.
    longest = -(-len(names[::count]) // size)
    extra = [names[:1]] * (longest - len(batches))
    loader = DataLoader(
        [[todo[name][0] for name in batch] for batch in batches + extra],
        batch_size=None,
        collate_fn=_Collated(trainer.data_collator),
        num_workers=trainer.args.dataloader_num_workers,
    )
    model = _engine(trainer)
    training = model.training
    model.eval()
    try:
        with (
            part_file(part, key) as file,
            progress_bar(len(mine), show, "reference values") as advance,
        ):
            for number, (batch, present) in enumerate(loader):
                values = _values(trainer, model, batch) if present else []
                if number < len(batches):
                    file.append(_records(batches[number], todo, present, values))
                    advance(len(batches[number]), "")
    finally:
        model.train(training)


def _engine(trainer: DPOTrainer) -> nn.Module:
    """The model that can run now: DeepSpeed must gather or place its parameters first."""
    if trainer.ref_model is not None or not trainer.is_deepspeed_enabled:
        return trainer.ref_model or trainer.model
    from trl.models import prepare_deepspeed

    if trainer._precompute_engine is None:
        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine


class _Collated:
    """Makes a batch and says which rows are in it and what tokens they have become."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Any]) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
        batch, names = collated(self.collator, rows)
        return batch, [(name, tokens_hash(batch, pair)) for pair, name in enumerate(names)]


def _values(
    trainer: DPOTrainer, model: nn.Module, batch: dict[str, Tensor]
) -> list[tuple[float, float]]:
    chosen, rejected = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch))
    return list(zip(chosen.double().tolist(), rejected.double().tolist(), strict=True))


def _records(
    names: Sequence[str],
    todo: Mapping[str, tuple[Any, dict[str, str]]],
    present: Sequence[tuple[str, str]],
    values: Sequence[tuple[float, float]],
) -> list[dict[str, Any]]:
    """The lines of one batch; rows that the collator left out are noted without values."""
    pending = [(*one, *sums) for one, sums in zip(present, values, strict=True)]
    records = []
    for name in names:
        row, content = todo[name]
        own, tokens, chosen, rejected = identifier(row), None, None, None
        if pending and pending[0][0] == own:
            _, tokens, chosen, rejected = pending.pop(0)
        sums = {"tokens": tokens, "chosen": chosen, "rejected": rejected}
        records.append({"key": name, "id": own, **content, **sums})
    return records


def use_reference_cache(
    trainer: DPOTrainer, cache: ReferenceCache, extra_losses: Sequence[Any] = ()
) -> None:
    """Makes a trainer take its reference values from a cache; its reference model is let go.

    Args:
        trainer: built, not yet training.
        cache: with values of the rows of its data sets.
        extra_losses: of the trainer.

    Raises:
        CacheSettingsError: see `check_cache_settings`.
    """
    check_cache_settings(trainer.args, trainer.model, extra_losses)
    trainer.data_collator = CachedReference(trainer.data_collator, cache)
    # Not TrainingArguments' flag: TRL's constructor refuses that one for pictures.
    trainer.precompute_ref_logps = True
    trainer.ref_model = None


def reference_key(trainer: DPOTrainer) -> dict[str, Any]:
    """Everything but the rows that the reference's values depend on; all processes must call it.

    Returns:
        Plain values by name; ``information`` is stored but not compared.
    """
    import transformers

    model, adapter = _reference(trainer)
    bare = trainer.accelerator.unwrap_model(model)
    if is_peft(bare) and adapter is None:
        description = "the model without its adapter"
    else:
        description = f"adapter {adapter!r}" if adapter else type(bare).__name__
    return plain_json(
        {
            "weights": weights_hash(bare, adapter),
            "dtype": str(bare.dtype),
            "autocast": trainer.accelerator.mixed_precision,
            "attention": bare.config._attn_implementation,
            "methods": [m.text for m in built_in(bare.get_base_model() if is_peft(bare) else bare)],
            "ld_alpha": trainer.ld_alpha,
            **processor_facts(trainer.processing_class),
            "collator": collator_facts(trainer.data_collator),
            "information": {"reference": description, "transformers": transformers.__version__},
        }
    )


def _reference(trainer: DPOTrainer) -> tuple[nn.Module, str | None]:
    """The model that plays the reference, and the adapter that is part of it."""
    if trainer.ref_model is not None:
        return trainer.ref_model, None
    model = trainer.model
    return model, "ref" if is_peft(model) and "ref" in model.peft_config else None
