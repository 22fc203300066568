"""The training program: `python -m training --config configs/train/world/seed0.yaml`.

It runs the same under `deepspeed --module training`, `accelerate launch -m training` and
`torchrun -m training`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import mmlm  # noqa: F401  (installs the torchvision guard before transformers asks for it)
from mmlm.errors import MmlmError
from training.config import parse
from training.launch import end, leave

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as the configuration says.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        0 when the training is finished, 2 when it cannot be carried out as asked.
    """
    # TRL asks peft by a name that transformers has replaced; once a step is too often to say so.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        recipe, run, only = parse(given)
        recipe.run(run, only)
    except MmlmError as error:
        print(f"error: {error}\nadvice: {error.advice}", file=sys.stderr)
        return 2
    finally:
        leave()
    return 0


if __name__ == "__main__":
    end(main())
