"""Method and its sixteen sites: read this file first.

A method is one frozen dataclass of hyperparameters. It acts by overriding one to three *sites*,
places on the way from pixels to logits::

    image -> tower -> projector -> [image features | text embeddings] -> decoder layers -> logits
              |           |                                  |                              |
        vision_layer  visual_tokens   mask   (tokens layer_in keys scores weights heads   logits
          patches                             mlp layer_out, in this order, in each layer)
    around the whole: search

Site functions are pure: they get a state and tensors and return an edit (a gain, a delta, a
replacement). They neither install hooks nor keep anything on the method nor write into what they
are given; :mod:`mmlm.engine.attach` does the rest and :mod:`mmlm.engine.combine` holds the law by
which edits of several methods at one site are combined.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
)

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlm.engine.checked import Checked
from mmlm.engine.prompt import Prompt

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.branches.branch import Branch
    from mmlm.engine.layout import TokenLayout
    from mmlm.engine.search import Search
    from mmlm.engine.vision.patch_look import PatchLook

__all__ = ["IN_BRANCHES", "MODULES", "SITES", "Cost", "Method", "Paper", "Prompt", "Rows"]

#: Which query rows a method asks for.
Rows: TypeAlias = Literal["none", "last", "tail", "all"]

#: Every site, in the order in which a forward pass meets it.
SITES = (
    "vision_layer",
    "patches",
    "pool",
    "visual_tokens",
    "mask",
    "tokens",
    "layer_in",
    "keys",
    "scores",
    "weights",
    "heads",
    "attended",
    "mlp",
    "layer_out",
    "logits",
    "search",
)

#: Sites that stay on in auxiliary prompts.
IN_BRANCHES = frozenset({"mask", "patches", "pool", "visual_tokens"})

#: Where a model keeps the weights of the methods that are built into it.
MODULES = "mmlm_methods"


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Attributes:
        title: Title of the paper.
        arxiv: arXiv id, e.g. ``2412.13949``.
        year: Year of the version read.
        venue: Where it appeared.
    """

    title: str
    arxiv: str
    year: int
    venue: str


@dataclass(frozen=True)
class Cost:
    """What a method adds, counted in decoder rows per row of the batch.

    Attributes:
        prompt: Extra rows that run through (part of) the decoder during the prefill.
        token: Extra rows that run through the decoder for every generated token.
    """

    prompt: int = 0
    token: int = 0


@dataclass(frozen=True, kw_only=True)
class Method(Checked, abc.ABC):
    """A way to change, or only watch, what a vision-language model computes.

    Instances hold hyperparameters only: they are hashable, comparable and picklable, and
    :attr:`text` is a call that :func:`mmlm.parse_method` turns back into an equal object. Use one
    with ``with method(model): model.generate(...)``, several with ``mmlm.attach``.
    """

    paper: ClassVar[Paper]
    _sites: ClassVar[frozenset[str]] = frozenset()
    #: Sites of this class that look and never change anything.
    only_looks: ClassVar[frozenset[str]] = frozenset()
    #: Whether the method is meaningless once image positions are removed; it is then refused
    #: beside methods that remove some (``tokens``, ``visual_tokens``).
    needs_all_visual: ClassVar[bool] = False
    #: Whether the model's output stays the same bit for bit at the neutral setting.
    neutral_is_exact: ClassVar[bool] = True
    #: Whether what this class keeps depends on the prompt alone, not on generated tokens. Then a
    #: search may look at several next tokens at once, and take tokens back.
    rewinds: ClassVar[bool] = False
    #: Whether ``heads`` reaches prompts without an image, too: for what changes the model itself.
    edits_without_image: ClassVar[bool] = False
    #: Whether weights that nobody trained yet mean something (the identity, as a rule). Others are
    #: refused outside a training unless they come from a file.
    fresh_is_valid: ClassVar[bool] = False
    #: Name under which what this class measures about an answer is stored; "" if it measures
    #: nothing. Then :meth:`record` is never called.
    measures: ClassVar[str] = ""

    def __call__(
        self, model: nn.Module, *, processor: Any = None
    ) -> AbstractContextManager[nn.Module]:
        """Attaches this method alone; the same as ``attach(model, self, processor=processor)``."""
        from mmlm.engine.attach import attach

        return attach(model, self, processor=processor)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Once per class: the engine asks for it in every layer of every step.
        cls._sites = frozenset(s for s in SITES if getattr(cls, s) is not getattr(Method, s))

    @property
    def sites(self) -> frozenset[str]:
        """Names of the sites that this class overrides."""
        return self._sites

    @property
    def text(self) -> str:
        """The text form: the Python call that makes an equal object."""
        module = type(self).__module__
        known = module.split(".")[0] in ("mmlm", "decoding")
        return repr(self) if known else f"{module}.{self!r}"

    @property
    def label(self) -> str:
        """A short name for tables: the class and the parameters that differ from the defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return type(self).__name__ + (f"({', '.join(changed)})" if changed else "")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Auxiliary prompts that the ``logits`` site needs at every step."""
        return ()

    @property
    def riders(self) -> tuple[Branch, ...]:
        """Auxiliary prompts that ride in the main prefill, as rows below the main ones.

        The ``heads`` site then gets [(1 + riders) * B, L, H, d] during prefill, main rows first.
        """
        return ()

    @property
    def plausibility(self) -> float:
        """Tokens below this fraction of the largest main probability are cut (0: none)."""
        return 0.0

    @property
    def rows(self) -> Rows:
        """Which new queries the sites ``keys``, ``scores`` and ``weights`` are asked for.

        ``"last"``: the last position of each pass; ``"tail"``: all positions after the last image
        of their row; ``"all"``: every position. A decoding step has one position, which is the
        last and in the tail.
        """
        return "none"

    @property
    def edits_all_heads(self) -> bool:
        """Whether every head of every wanted row is changed wherever the row has an image.

        Then the model's own attention kernel is not run for the rows of a decoding step.
        """
        return False

    @property
    def alone_at(self) -> frozenset[str]:
        """Sites at which no other method may change anything beside this setting."""
        return frozenset()

    @property
    def mixes_rows(self) -> bool:
        """Whether a row's answer depends on the other rows of its batch.

        Only switches that restore what authors' code does make it so. Whoever batches requests of
        strangers answers such a setting row by row.
        """
        return False

    @property
    def turns(self) -> Literal["unread", "known", "needed"]:
        """Whether the layout must tell the turns of a conversation, and earlier answers, apart.

        ``"known"``: where a collator or the chat template tells them; a prompt that neither knows
        is one turn. ``"needed"``: headers of the assistant too, and not knowing them is an error.
        """
        return "unread"

    @property
    def needs_dynamic_cache(self) -> bool:
        """Whether the point of this setting is a shorter cache, so that a static one is refused."""
        return False

    @property
    def runs_apart(self) -> int | None:
        """From how many rows on, those that lost positions run apart from the others.

        For methods at ``tokens``: in a prompt's first pass a layer then runs twice, each time on
        rows of about one length. None: all rows run together, the shorter ones filled up.
        """
        return None

    @property
    def beams(self) -> int:
        """Number of beams of :meth:`search`."""
        return 1

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Whether this setting acts in a decoder layer; hooks go only where somebody acts.

        A setting that does nothing at all acts nowhere, so that the model runs its own kernels.
        """
        return True

    def acts_at(self, anatomy: Anatomy, site: str, layer: int) -> bool:
        """Whether it acts at one of its sites in a decoder layer (default: at all or at none)."""
        return self.acts_in(anatomy, layer)

    def acts_in_tower(self, anatomy: Anatomy, block: int) -> bool:
        """Whether ``patches`` is asked after a block of the vision tower."""
        return True

    def renumbers(self, anatomy: Anatomy) -> bool:
        """Whether positions are numbered afresh, without gaps, where this method removes some.

        Only where they have one axis and no window counts them (``anatomy.one_axis``). By default
        what stays keeps its position ids. If one of several methods renumbers, all gaps close.
        """
        return False

    @property
    def line_ends(self) -> Literal["line", "all", "none"]:
        """Which ends of lines stay in a picture of several tiles that loses features.

        ``"line"``: those of lines of which anything stays; ``"all"``; ``"none"``. Several methods:
        the one that keeps fewest.
        """
        return "line"

    @property
    def originals(self) -> Literal["", "tower", "projected"]:
        """Which unpooled image states ``prompt.originals`` gives to a method that pools.

        ``"tower"``: what enters the projector; ``"projected"``: what it makes of all of that.
        """
        return ""

    @property
    def source_grid(self) -> tuple[int, int] | None:
        """Height and width of a tile's states for ``pool``, where they form no square."""
        return None

    def acts_now(self, state: Any, layer: int) -> bool:
        """Whether rows of this layer are wanted in the running pass, as far as known before it."""
        return True

    @property
    def cost(self) -> Cost:
        """What this setting adds to a prompt with an image; the tests count it."""
        return Cost(prompt=len(self.branches) + len(self.riders), token=len(self.branches))

    @abc.abstractmethod
    def neutral(self) -> Self:
        """The setting under which the model must be unchanged."""

    def begin(self, prompt: Prompt) -> Any:
        """Called once per prompt; returns this method's own state (default: none)."""
        return None

    def begin_vision(self, anatomy: Anatomy) -> Any:
        """Called before pictures enter the tower, which is before ``begin``.

        Returns:
            The state that ``vision_layer`` gets; ``begin`` finds it by ``prompt.seen(self)``.
        """
        return None

    def check_supervised(self, layout: TokenLayout, supervised: Bool[Tensor, "B N"]) -> None:
        """Called once per training batch, before the decoder runs; raises what cannot be learned.

        Args:
            layout: Roles of the batch's positions.
            supervised: Positions whose tokens are learned (label other than -100).
        """

    def modules(self, anatomy: Anatomy) -> nn.Module | None:
        """Fresh weights of this setting (default: it has none).

        They become part of the model by ``build_in``; ``attach`` lends them for a block, read from
        the file that a field ``weights_file: str = ""`` names. Made under a fixed seed. A part with
        a true attribute ``keep_fp32`` keeps its precision. See :mod:`mmlm.engine.weights`.
        """
        return None

    def read_from(
        self, shapes: Mapping[str, tuple[int, ...]], module: nn.Module
    ) -> Collection[str]:
        """Names of the tensors of a weights file that this setting reads (default: all).

        Args:
            shapes: Every tensor of the file, by its name.
            module: What they are read into; names and shapes must agree with its own.

        Raises:
            ValueError: If the file is for other settings in a way that the method can name.
        """
        return shapes.keys()

    def check_weights(self, made_by: str) -> None:
        """Refuses the weights of a file, before their tensors are compared.

        Args:
            made_by: Text form of the method that they were made by; "" if the file does not say.
        """

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Reasons why this setting cannot run on this model, beyond missing parts."""
        return []

    # ---- the sites ---------------------------------------------------------------------------

    def vision_layer(
        self, state: Any, block: int, x: Float[Tensor, "T P D"]
    ) -> Float[Tensor, "T P D"] | None:
        """Before tower block ``block``: new tower states, or None if only looked; in list order.

        ``state`` is what ``begin_vision`` returned. Tiles of all pictures of the batch come
        together, a class token (if the tower has one) in front of the patches. A tower that packs
        all pictures into one row gives T = 1. Beams and videos never reach this site.
        """

    def patches(
        self, state: Any, block: int, x: Float[Tensor, "T S D"], look: PatchLook
    ) -> Int[Tensor, "tiles p"] | None:
        """Which patches go on after tower block ``block``; at most one method has this site.

        Patches that leave are gone from the rest of the tower, from the projector where that maps
        each feature by itself, and from the prompt, as with ``visual_tokens``. Blocks behind the
        one that makes the image features are not run once any patch has left. It is asked up to
        that block, without gradients, in pictures' own pass only (no videos, no auxiliary ones).

        Args:
            state: What ``begin_vision`` returned.
            block: The block that has run.
            x: Its output; a tower that packs all pictures into one row gives T = 1.
            look: What stands in the block, a row per tile.

        Returns:
            Columns of ``look.numbers``, -1 for none, or None to keep all. Where features are made
            of several patches, whole units must stay together, and in every tile at least one.
        """

    def pool(
        self, state: Any, x: Float[Tensor, "T h w D"], side: int
    ) -> Float[Tensor, "T a b D"] | None:
        """Pooled grids of image states; several methods: in list order.

        One feature per cell of the smaller grid enters the decoder, where the cell's centre was;
        the positions of all others leave the prompt, as with ``visual_tokens``. A method of that
        site then chooses among the originals (:meth:`Prompt.originals`), not among what enters.

        Args:
            state: What ``begin_vision`` returned.
            x: What enters the projector, all tiles of all pictures of the batch, or of one picture
                where pictures have different sizes; in families with
                ``pools="after"`` what leaves it.
            side: States along a side that the projector merges into one feature: a and b must be
                multiples of it.

        Returns:
            None to keep all.
        """

    def visual_tokens(
        self, state: Any, features: Float[Tensor, "T P D"]
    ) -> Int[Tensor, "T p"] | None:
        """Which image features enter the decoder; several methods: the intersection.

        Args:
            state: What ``begin_vision`` returned.
            features: The projector's output for all tiles of all pictures of the batch; a model
                that packs all pictures into one row gives T = 1, in the order of the sequence.

        Returns:
            Columns of ``features``, -1 for none, or None to keep all. The positions of the others
            are taken out of the prompt before it begins: every other site, ``begin`` and the
            layout know the shorter prompt only. Position ids stay as they were.
        """

    def mask(self, state: Any, layout: TokenLayout) -> Callable[..., Tensor] | None:
        """A rule (b, q, k) -> bool that opens attention beyond causal; several: the union.

        The rule gets integer tensors that broadcast against each other: rows of ``layout``, and
        positions of queries and keys in it. It is asked once per pass over several positions, also
        in auxiliary prompts, with the layout of that pass from position 0 on. Padding, other
        documents of a packed row and what lies before a sliding window stay closed.

        Returns:
            None if nothing is opened; then the model's own kernel and mask stay as they are.
        """

    def tokens(
        self, state: Any, layer: int, x: Float[Tensor, "B N D"]
    ) -> Int[Tensor, "B n"] | None:
        """Which positions go on from ``layer``; several methods: the intersection.

        Asked in a prompt's first pass only, once per layer that the method acts in.

        Args:
            state: What ``begin`` returned.
            layer: The layer that is about to run.
            x: Its input; the columns' positions are ``prompt.kept``.

        Returns:
            Columns of ``x``, -1 for none, or None to keep all. Rows may keep different numbers.
            The last column must stay. Padding never counts.
        """

    def layer_in(
        self, state: Any, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Input of a decoder layer: new input, or None if only looked; in list order."""

    def keys(self, state: Any, layer: int) -> Float[Tensor, "B H K"] | None:
        """Gains on attention keys per query head, ``q . (g k)``, for every query; the product.

        Columns are the positions 0 .. K - 1 of the sequence; later ones have the gain 1.
        """

    def scores(
        self, state: Any, layer: int, rows: Int[Tensor, "B R"], s: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Delta on scaled scores before the softmax, broadcastable to ``s``; several: the sum.

        Columns are the positions 0 .. K - 1 of the sequence, whatever the cache; ``rows`` are the
        queries' positions. fp32. The mask comes after the deltas: ``s`` at a masked key is an
        ordinary finite number, and a delta there has no effect.
        """

    def survey(
        self, state: Any, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> None:
        """Looks at all wanted rows of a layer, chunk after chunk, before ``weights`` gets any.

        Not a site of its own: overriding it asks for one more pass over the rows, for methods
        whose edit depends on all of them (column means).
        """

    def weights(
        self, state: Any, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """New attention weights whose rows sum to 1, or None if only looked; in list order.

        Rows come in chunks. Where a returned row of a head equals the given one, the output of the
        model's own kernel stays, bit for bit.
        """

    def heads(
        self, state: Any, layer: int, y: Float[Tensor, "B L H d"]
    ) -> Float[Tensor, "B L_or_1 H 1"] | None:
        """Gains on the outputs of the heads, before the output projection; the product.

        One gain for all positions of the pass, or one per column of ``y``: the product of both
        kinds is taken position by position.
        """

    def attended(
        self, state: Any, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Delta on the residual stream between a layer's attention and its MLP; several: the sum.

        ``x`` is the stream after the attention was added. Its columns are ``prompt.kept`` in a
        prompt's first pass, new positions in later ones. A delta of exact zeros leaves the layer's
        output as it is, bit for bit.
        """

    def mlp(self, state: Any, layer: int, y: Float[Tensor, "B L D"]) -> Tensor | None:
        """New output of a layer's MLP before the residual add; in list order."""

    def layer_out(
        self, state: Any, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Output of a decoder layer: new output, or None if only looked; in list order."""

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """Delta on the raw logits ``z["main"]`` of the last position; several: the sum."""

    def search(self, run: Search) -> Any:
        """A search procedure in the place of ``generate``'s loop; at most one method has it.

        Returns what ``generate`` shall return: :meth:`mmlm.engine.search.Search.result`.
        """

    def record(self, state: Any, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """What was measured about each row of the last prompt, as plain JSON.

        Not a site: it is asked by :func:`mmlm.measured`, once the answers are complete.

        Args:
            state: What ``begin`` returned.
            tokens: New tokens of each row, the end token included; None: as many as ran. Rows of a
                batch go on until the longest is done, which must not count.

        Raises:
            ValueError: If ``tokens`` are not one number per row.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing.")
