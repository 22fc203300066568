"""What the inputs of a prompt's first pass say about the roles of its positions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmlm.engine.layout import TokenLayout
from mmlm.engine.masks.squares import apart, is_square, refuse_numbers
from mmlm.engine.masks.turns import Handed, of_template, wanted_turns
from mmlm.engine.vision.sizes import tell_images_apart
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Reader"]


class Reader:
    """Reads layouts, one per prompt.

    Args:
        session: The attachment.
        given: The roles, if the user said them.
        processor: The model's, if it is known.
    """

    def __init__(self, session: Session, given: TokenLayout | None, processor: Any) -> None:
        self._session, self._given, self.processor = session, given, processor
        self._strange = False  # a prompt was met whose turns could not be told apart

    def read(self, inputs: dict[str, Any], vision: dict[str, Any]) -> TokenLayout:
        """Roles of all positions of a prompt: pictures, turns and documents told apart.

        Args:
            inputs: Of the inner model.
            vision: Those that its image encoder takes.

        Raises:
            LayoutError: If ids, mask or a layout that was given do not say it, or what is learned
                from the batch could be seen by an image.
        """
        session, ids = self._session, inputs.get("input_ids")
        layout = self._roles(ids, inputs)
        layout = tell_images_apart(session.anatomy, layout, vision, session.copies)
        return self._tell_turns(layout, ids, inputs)

    def of_ids(self, ids: Tensor, mask: Tensor | None, right: bool = False) -> TokenLayout:
        """Roles that token ids alone tell."""
        anatomy = self._session.anatomy
        return TokenLayout.from_ids(
            ids,
            mask,
            image_ids=anatomy.image_ids,
            wrapper_ids=anatomy.wrapper_ids,
            framing=anatomy.family.framing,
            right=right,
        )

    def _roles(self, ids: Tensor | None, inputs: dict[str, Any]) -> TokenLayout:
        session, mask = self._session, inputs.get("attention_mask")
        if session.openings is not None and not session.generating:
            refuse_numbers(mask)
        if self._given is not None:
            given: Any = ids if ids is not None else inputs.get("inputs_embeds")
            rows, length = given.shape[:2]
            layout = self._given
            layout.check(rows, length)
            return layout.expand(rows // layout.rows) if rows != layout.rows else layout
        if ids is None:
            raise LayoutError(
                "The prompt came as inputs_embeds only, so the image's positions are unknown.",
                advice="Pass input_ids, or attach(model, ..., layout=TokenLayout(...)).",
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            # A static cache: generate() made a 4-D mask, or one per kind of layer.
            if session.mask is None and session.openings is not None and is_square(mask, ids):
                # A key that nobody sees is padding.
                real = mask[:, 0].any(1).expand(ids.shape[0], -1)
                return self.of_ids(ids, real, right=True)
            if session.mask is None:
                raise LayoutError(
                    "A prompt without a 2-D attention mask cannot be told from its padding.",
                    advice="Pass the processor's attention_mask to generate().",
                )
            mask = session.mask.repeat_interleave(session.copies, dim=0)
        return self.of_ids(ids, mask, self._trains(inputs))

    def _trains(self, inputs: dict[str, Any]) -> bool:
        """Whether a pass is one of a training: whole rows, no cache, nothing asked of a row's end.

        Its rows may be padded on the right; a method of the last position would get padding there.
        """
        session = self._session
        asks = any(m.rows == "last" or "logits" in m.sites for m in session.methods)
        return inputs.get("use_cache") is False and not session.generating and not asks

    def _tell_turns(
        self, layout: TokenLayout, ids: Tensor | None, inputs: dict[str, Any]
    ) -> TokenLayout:
        """The layout with documents, turns and answers told apart, for those who ask for them."""
        session, wish = self._session, wanted_turns(self._session)
        if self._given is None:
            layout = apart(layout, inputs, session.anatomy.text.config)
            if session.handed.roles is not None:
                layout = session.handed.told(layout)
            elif wish != "unread":
                needed = wish == "needed"
                layout = of_template(
                    layout, ids, self.processor, needed=needed, strange=self._one_turn
                )
        supervised, session.handed = session.handed.supervised(layout), Handed()
        if supervised is not None:
            for method in session.methods:
                method.check_supervised(layout, supervised)
        return layout

    def _one_turn(self, error: LayoutError) -> None:
        """Says once that a prompt's turns could not be told apart."""
        if not self._strange:
            names = " + ".join(m.label for m in self._session.methods if m.turns != "unread")
            warnings.warn(
                f"{names}: each prompt counts as one turn, since its turns cannot be told apart. "
                f"{error} {error.advice}",
                stacklevel=2,
            )
        self._strange = True
