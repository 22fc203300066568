"""Faults that are put into the engine on purpose; each must be noticed by a named check.

A check that passes with a fault in place proves nothing. ``test_mutants.py`` applies them one by
one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import checks
import torch

import mmlm.engine.attention.editor as attention
import mmlm.engine.attention.wanted as wanted
import mmlm.engine.branches.auxiliary as auxiliary
import mmlm.engine.branches.branch as branches
import mmlm.engine.branches.prefix as prefix
import mmlm.engine.branches.template as template
import mmlm.engine.hooks as hooks
import mmlm.engine.layout as layout
import mmlm.engine.session as session
import mmlm.engine.vision.pixels as pixels
from decoding.vcd import VCD
from decoding.vhr import VHR

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import test_attention
import test_families
import test_icd
import test_inter
import test_layout_families
import test_m3id
import test_vcd
import test_vhr


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is put, what replaces it, and which check must fail."""

    name: str
    target: object
    attribute: str
    fault: Callable
    check: Callable[[], None]


def _no_edit(z, delta, beta, active):
    return z


def _cut_after_delta(z, delta, beta, active):
    edited = z if delta is None else z + delta
    floor = edited.amax(-1, keepdim=True) + torch.tensor(beta).log()
    return edited.masked_fill(edited < floor, -torch.inf)


def _mask_dropped(self, n):
    return None


def _uncoupled(cache, rows):
    return lambda: None


def _half_coupled(cache, rows):
    """The main cache follows the beams, the branches do not."""
    rows.select = lambda index: None
    return _couple(cache, rows)


_couple = auxiliary.couple
_build = branches.NoImage.build
_next = auxiliary._Group.next_positions
_gain = hooks.head_gain


def _off_by_one(self, source):
    prompt = _build(self, source)
    return branches.BranchPrompt(prompt.embeds.roll(1, dims=1), prompt.mask, prompt.positions)


def _late_positions(self, main, n):
    positions = _next(self, main, n)
    return None if positions is None else positions * 2


def _loud_branches(self, **inputs):
    return self.model(**inputs, return_dict=True)


def _wrong_rows(session, i, layer, y):
    gain = _gain(session, i, layer, y)
    return None if gain is None else gain.roll(1, dims=0)


_visible = attention.AttentionRows._visible
_first_row = wanted.Wanted.first_row
_scores = attention.AttentionRows.scores
_attend = attention.AttentionRows.attend


def _causality_lost(self, start, end):
    return None


def _padding_seen(self, start, end):
    mask = _visible(self, start, end)
    return None if mask is None else mask[:1].expand_as(mask)


def _next_row(self, i, new):
    return min(_first_row(self, i, new) + 1, new - 1)


def _other_group(self, a):
    """Query heads read the values of the wrong key/value head."""
    return _attend(self, a.roll(self.groups, dims=1)).roll(-self.groups, dims=2)


def _unscaled(self, start, end):
    return _scores(self, start, end) / self.scaling


def _kernel_lost(output, new, changed, start, end):
    return _write(output, new, torch.ones_like(changed), start, end)


_write = attention._write


def _ragged_tails_ignored(self, i, new):
    return None


def _no_deep_features(deep):
    return {}


_stacked = session.stacked


def _deep_features_swapped(deep):
    return _stacked(deep[::-1])


def _noise_everywhere(anatomy, pixels, grid, seed):
    return torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))


def _blanks_stay(ids, layout, blank, tokenizer):
    return ids, torch.zeros_like(ids, dtype=torch.bool)


def _no_words(self, ids, readable):
    return torch.zeros_like(readable)


def _one_noise(picture, seed):
    return seed


def _main_whatever_changed_it(self):
    methods, self.methods = self.methods, ()
    try:
        return _main_beginning(self)
    finally:
        self.methods = methods


def _one_column_late(beginnings, length, config):
    moved = [replace(one, theirs=one.theirs + 1) for one in beginnings]
    return _copied(moved, length, config)


def _no_instruction(self, text, ids, readable):
    return [(start, stop, new[:-1]) for start, stop, new in _system(self, text, ids, readable)]


_main_beginning = session.Session._main_beginning
_copied = prefix.copied
_system = template.Template.system


def _tiles_are_images(ids, visual, starts):
    return _tiles(ids, visual, starts)[0], starts


_tiles = layout._tiles


def _other_heads(vhd):
    return vhd <= vhd.median(dim=-1, keepdim=True).values


def _another_image(family):
    branch = branches.Noised(kept=0.3, seed=7)
    test_families.test_another_image_is_the_prompt_with_other_pixels(family, branch)


MUTANTS = (
    Mutant(
        "heads are not scaled",
        hooks,
        "head_gain",
        lambda session, i, layer, y: None,
        lambda: checks.changes_logits(VHR(), "llava"),
    ),
    Mutant(
        "logits are not edited",
        session,
        "edit_logits",
        _no_edit,
        lambda: checks.changes_logits(VCD(), "llava"),
    ),
    Mutant(
        "the cut is taken after the delta",
        session,
        "edit_logits",
        _cut_after_delta,
        test_vcd.test_acceptance_6_two_methods_are_the_sum_of_their_deltas,
    ),
    Mutant(
        "hooks are not removed",
        torch.utils.hooks.RemovableHandle,
        "remove",
        lambda self: None,
        lambda: checks.leaves_no_trace(VHR(), "llava"),
    ),
    Mutant(
        "the text-only prompt is shifted by one",
        branches.NoImage,
        "build",
        _off_by_one,
        lambda: test_vhr.test_equals_the_naive_reference(False),
    ),
    Mutant(
        "the branches' padding mask is dropped",
        auxiliary._Group,
        "full_mask",
        _mask_dropped,
        lambda: checks.batch_equals_single_rows(VCD(), "llava"),
    ),
    Mutant(
        "the caches are not coupled",
        session,
        "couple",
        _uncoupled,
        lambda: test_vcd.beams_equal_recomputed(VCD.pope(), "llava"),
    ),
    Mutant(
        "the branches stay behind the beams",
        session,
        "couple",
        _half_coupled,
        lambda: checks.beams_equal_static_beams(VCD.pope(), "llava"),
    ),
    Mutant(
        "branch positions run ahead",
        auxiliary._Group,
        "next_positions",
        _late_positions,
        lambda: test_vcd.test_acceptance_3_cached_equals_uncached("llava", VCD.pope()),
    ),
    Mutant(
        "methods act in the branches too",
        session.Session,
        "call",
        _loud_branches,
        lambda: test_vhr.test_acceptance_09_one_extra_forward_without_the_image("llava"),
    ),
    Mutant(
        "gains go to the wrong row",
        hooks,
        "head_gain",
        _wrong_rows,
        lambda: checks.image_free_row_is_unchanged(VHR(), "llava"),
    ),
    Mutant(
        "the other half of the heads is chosen",
        sys.modules["decoding.vhr"],
        "select_heads",
        _other_heads,
        test_vhr.test_acceptance_02_a_head_that_ignores_the_image_is_never_chosen,
    ),
    Mutant(
        "recomputed rows see the future",
        attention.AttentionRows,
        "_visible",
        _causality_lost,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava", test_attention.Boost, "all"
        ),
    ),
    Mutant(
        "recomputed rows see another row's padding",
        attention.AttentionRows,
        "_visible",
        _padding_seen,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava", test_attention.Boost, "last"
        ),
    ),
    Mutant(
        "rows begin one too late",
        wanted.Wanted,
        "first_row",
        _next_row,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava", test_attention.Boost, "tail"
        ),
    ),
    Mutant(
        "values of another key/value head",
        attention.AttentionRows,
        "attend",
        _other_group,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava", test_attention.Move, "last"
        ),
    ),
    Mutant(
        "scores are not scaled",
        attention.AttentionRows,
        "scores",
        _unscaled,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava", test_attention.Boost, "last"
        ),
    ),
    Mutant(
        "unchanged heads are written over",
        attention,
        "_write",
        _kernel_lost,
        lambda: test_attention.test_unchanged_heads_and_rows_keep_the_kernels_bits(
            test_attention.Move
        ),
    ),
    Mutant(
        "the tail begins at the same place in every row",
        wanted.Wanted,
        "tail_begins",
        _ragged_tails_ignored,
        lambda: test_attention.test_rows_equal_the_whole_matrix(
            "llava_next", test_attention.Boost, "tail"
        ),
    ),
    Mutant(
        "an auxiliary prompt loses its deep-stacked features",
        session,
        "stacked",
        _no_deep_features,
        lambda: _another_image("qwen3_vl"),
    ),
    Mutant(
        "deep-stacked features enter the wrong layers",
        session,
        "stacked",
        _deep_features_swapped,
        lambda: _another_image("qwen3_vl"),
    ),
    Mutant(
        "noise turns padding tiles into pictures",
        branches,
        "draw_diffusion_noise",
        _noise_everywhere,
        lambda: test_families.test_noise_leaves_padding_tiles_alone("idefics3"),
    ),
    Mutant(
        "blank lines around an image stay when it goes",
        branches,
        "without_blanks",
        _blanks_stay,
        lambda: test_families.test_a_prompt_without_its_image_is_the_text_around_it("gemma3"),
    ),
    Mutant(
        "every tile counts as an image",
        layout,
        "_tiles",
        _tiles_are_images,
        lambda: test_layout_families.test_each_picture_is_one_image("idefics3"),
    ),
    Mutant(
        "the user's words stay in the prompt without them",
        template.Template,
        "words",
        _no_words,
        lambda: test_inter.test_masked_prompts_keep_the_chat_template_by_token_ids("llava"),
    ),
    Mutant(
        "the instruction loses its last word",
        template.Template,
        "system",
        _no_instruction,
        lambda: test_icd.test_the_disturbed_prompt_by_token_ids("llava", "system"),
    ),
    Mutant(
        "all pictures get the same noise",
        pixels,
        "_fingerprint",
        _one_noise,
        lambda: test_inter.test_acceptance_9_noise_repeats_with_its_seed_and_differs_between_rows(
            "llava"
        ),
    ),
    Mutant(
        "a branch continues the main cache although a method changed it",
        session.Session,
        "_main_beginning",
        _main_whatever_changed_it,
        lambda: test_inter.test_acceptance_10_branches_do_not_feel_other_methods(VHR()),
    ),
    Mutant(
        "a shared beginning is taken one column late",
        auxiliary,
        "copied",
        _one_column_late,
        lambda: test_inter.test_equals_four_uncached_passes("llava"),
    ),
    Mutant(
        "every token counts as the first",
        sys.modules["decoding.m3id"],
        "weight",
        lambda step, decay: math.expm1(decay),
        lambda: test_m3id.test_acceptance_3_cached_equals_uncached("llava", test_m3id.FAST),
    ),
)
