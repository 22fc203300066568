"""Prompt: what a method may know and do once per prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.branches.branch import Branch, Captured
    from mmlm.engine.layout import TokenLayout
    from mmlm.engine.method import Method
    from mmlm.engine.vision.originals import Originals

__all__ = ["Prompt"]


@runtime_checkable  # for the shape and type checks that are on in tests
class Prompt(Protocol):
    """What a method may know and do once per prompt, before the first layer runs."""

    @property
    def anatomy(self) -> Anatomy:
        """The model's parts."""

    @property
    def layout(self) -> TokenLayout:
        """Roles of the prompt's positions; rows include beams and return sequences."""

    @property
    def rows(self) -> int:
        """Number of rows B."""

    @property
    def full_layout(self) -> TokenLayout:
        """Roles of all positions that were given, also of those that never enter the decoder."""

    def entered(self, values: Tensor) -> Tensor:
        """Values [B, N, ...] of all given positions, for those that enter the decoder."""

    def seen(self, method: Method) -> Any:
        """What ``begin_vision`` of this method returned for the prompt's pictures, or None."""

    @property
    def copies(self) -> int:
        """How often each of the caller's rows stands in the batch, side by side: beams."""

    @property
    def kept(self) -> Int[Tensor, "B n"]:
        """Positions of the columns of the states that ``tokens`` gets, -1 where a row has none.

        ``layout.gather(kept)`` are their roles. Once positions have left, the sites of a layer
        (``layer_in``, ``heads``, ``mlp``, ``layer_out``) get the columns that are left.
        """

    def beside(self, method: Method) -> tuple[str, ...]:
        """Text forms of the other attached methods that change anything."""

    def module(self, method: Method) -> nn.Module:
        """The weights of a method: part of the model, or lent for the length of a block."""

    def merge_patches(self, values: Float[Tensor, "T P"]) -> Float[Tensor, "T p"]:
        """Values of patches averaged over the patches that become one image feature."""

    def place(self, marks: Float[Tensor, "T p C"]) -> Float[Tensor, "B N C"]:
        """Marks on image features at their positions in the sequence, 0 elsewhere.

        They go through the model's own packing: positions without a patch (row ends) get 0, and a
        model that resizes its features resizes the marks alike.
        """

    def run(
        self, branch: Branch, *, heads: tuple[int, ...] = (), layers: tuple[int, ...] = ()
    ) -> Captured:
        """Runs one auxiliary prefill that keeps nothing but what is captured.

        Args:
            branch: The auxiliary prompt. Equal branches of several methods run once.
            heads: Layers whose head outputs at the last position are captured.
            layers: Layers whose outputs (residual stream) at the last position are captured. The
                pass ends after the last layer of both.
        """

    def attend(self, a: Float[Tensor, "B H R K"]) -> Float[Tensor, "B R H d"]:
        """Weights times the values of the attention call that is being edited.

        Works inside ``scores``, ``survey`` and ``weights`` only.
        """

    def values(self) -> Float[Tensor, "B H K d"]:
        """The values of the running attention call, a column per position of the sequence.

        Works where :meth:`attend` does. Heads that share values get the same ones.
        """

    @property
    def past(self) -> int:
        """Positions before the pass that is running: 0 in a prompt's first pass."""

    def originals(self, method: Method) -> Originals | None:
        """The unpooled image states that :attr:`Method.originals` asks for; None without pictures.

        Works in ``begin`` only.
        """

    def patches_kept(self) -> Callable[[], list[list[list[int]]]]:
        """Tells, when asked, the numbers of the patches that are left.

        For each row, for each of its tiles; empty lists where no method has a say in the tower or
        a row has no picture. Works in ``begin``; asking later costs nothing before.
        """
