"""Teaches a small model to read the pictures of `mmlm data micl` and their demonstrations.

    python tools/teach_dara_reader.py --output runs/dara/reader --minutes 25

The embedded model knows none of these tasks' words. What is taught here, from random weights, is
the one start of all arms of ``tools/measure_dara.py``: a LLaVA of about a million parameters that
sees five pictures of 40 x 40 pixels and answers in one word. Three stages: the tower learns what
stands where in a picture ("see"); the language model learns to say it when the rule is told
("told"); at last half of a batch are episodes, whose rule stands in the demonstrations only
("shown"). All of it comes from the support split. Resumable: the same command again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data_tools.micl import TASKS, drawing
from data_tools.micl.character import IDENTITIES, NAMES
from data_tools.micl.count import ATTRIBUTES
from data_tools.micl.outlier import COLOURS

READ = ("outlier", "count", "character")
SIDE, PATCH, SHOTS = 40, 10, 4
POOL = 3000
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
TEMPLATE = (
    "<bos>{% for m in messages %} {{ m['role'] }} :{% if m['role'] == 'assistant' %}"
    "{% generation %}{% for p in m['content'] %} {{ p['text'] }}{% endfor %} <eos>"
    "{% endgeneration %}{% else %}{% for p in m['content'] %}"
    "{{ ' <image>' if p['type'] == 'image' else ' ' ~ p['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}{{ ' assistant :' if add_generation_prompt else '' }}"
)


def words() -> list[str]:
    """Every word of prompts and answers."""
    text = " ".join(TASKS[name].question for name in READ).lower().replace("?", " ?")
    found = dict.fromkeys(
        [
            ":",
            "question",
            "answer",
            "user",
            "assistant",
            "rule",
            "left",
            "right",
            "most",
            *text.split(),
        ]
    )
    found |= dict.fromkeys(str(number) for number in range(100))
    found |= dict.fromkeys(["red", "blue", "black", "green", "yellow", "purple", "colour", "shape"])
    found |= dict.fromkeys(["triangle", "circle", "square", "star", "large", "small", "size"])
    found |= dict.fromkeys(name.lower() for name in NAMES)
    found |= dict.fromkeys(["+", "-", "x", "=", *(f"face{n}" for n in range(IDENTITIES))])
    return list(found)


def processor() -> LlavaProcessor:
    """Words to numbers, pictures to 40 x 40 pixels."""
    table = {word: n for n, word in enumerate([*SPECIAL, *words()])}
    core = Tokenizer(WordLevel(table, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated"),
         pre_tokenizers.Split("?", "isolated"), pre_tokenizers.Split("=", "isolated")]
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", padding_side="left", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pictures = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, resample=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def model(vocabulary: int, image_token: int) -> LlavaForConditionalGeneration:
    """Random weights."""
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=6,
        image_size=SIDE, patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token,
        vision_feature_layer=-1, image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LlavaForConditionalGeneration(config)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = 2, 0
    return made


def what(name: str, params: Any) -> list[int]:
    """What stands where: one label per question to the tower, 0 for nothing."""
    if name == "character":
        return [params["identity"]]
    if name == "count":
        labels = [0] * 48
        for one in params["objects"]:
            for k, (kind, values) in enumerate(ATTRIBUTES.items()):
                labels[3 * one["cell"] + k] = 1 + values.index(one[kind])
        return labels
    labels = [0] * 20
    for place in range(params["count"]):
        shape, colour = params["shape"], params["colour"]
        if place == params["place_of_odd_colour"]:
            colour = params["odd_colour"]
        if place == params["place_of_odd_shape"]:
            shape = params["odd_shape"]
        labels[2 * place] = 1 + drawing.SHAPES.index(shape)
        labels[2 * place + 1] = 1 + COLOURS.index(colour)
    return labels


QUESTIONS = {"outlier": (20, 6), "count": (48, 7), "character": (1, IDENTITIES)}


class Seer(torch.nn.Module):
    """Linear answers to `what` from all of a picture's states."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleDict(
            {n: torch.nn.Linear(width * states, a * b) for n, (a, b) in QUESTIONS.items()}
        )

    def forward(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Scores [rows, questions, answers]."""
        return self.heads[name](states.flatten(1)).unflatten(1, QUESTIONS[name])


class Pictures:
    """Support items, drawn once."""

    def __init__(self, folder: Path) -> None:
        self.items: dict[str, list[Any]] = {}
        self.pixels: dict[str, torch.Tensor] = {}
        for name in READ:
            self.items[name], self.pixels[name] = self._drawn(name, folder)
        self.features: dict[str, torch.Tensor] = {}  # what the taught tower makes of them
        self.labels = {
            name: torch.tensor([what(name, p) for p in self.items[name]]) for name in READ
        }
        self.faces = [
            [n for n, p in enumerate(self.items["character"]) if p["identity"] == identity]
            for identity in range(IDENTITIES)
        ]

    def _drawn(self, name: str, folder: Path) -> tuple[list[Any], torch.Tensor]:
        stored = folder / f"pool-{name}.pt"
        if stored.exists():
            kept = torch.load(stored, weights_only=True)
            return json.loads(kept["items"]), kept["pixels"]
        task, rng = TASKS[name], np.random.default_rng(17)
        items: list[Any] = []
        for _ in range(POOL):
            params = task.item(rng, "support")
            items.append(params)
        pixels = torch.stack(
            [
                torch.from_numpy(
                    np.array(task.draw(p).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
                ).permute(2, 0, 1)
                for p in items
            ]
        )
        torch.save({"items": json.dumps(items), "pixels": pixels}, stored)
        return items, pixels

    def batch_of(self, name: str, index: list[int]) -> torch.Tensor:
        """Pixels as the processor makes them (fp32, -1 to 1)."""
        return self.pixels[name][index].float() / 127.5 - 1

    def told(self, name: str, rng: np.random.Generator) -> tuple[list[tuple[str, str]], list[int]]:
        """A single picture and what is true of it: (rule in words, answer) in a random order."""
        task, items = TASKS[name], self.items[name]
        index = int(rng.integers(len(items)))
        params = items[index]
        if name == "character":
            facts = [("rule face", f"face{params['identity']}")]
        else:
            latents = [one for one in task.latents(rng) if task.allows(params, one)]
            facts = [(f"rule {one}", task.answer(params, one)) for one in latents]
        if name == "outlier":
            facts += [("rule most colour", params["colour"]), ("rule most shape", params["shape"])]
        return [facts[int(n)] for n in rng.permutation(len(facts))], [index]

    def episode(self, name: str, rng: np.random.Generator) -> tuple[str, list[str], list[int]]:
        """Demonstrations that tell the latent, and a query: prompt parts, answers, pictures."""
        task, items = TASKS[name], self.items[name]
        latents = task.latents(rng)
        latent = latents[int(rng.integers(len(latents)))]
        within: Any = range(len(items))
        if name == "character":
            within = [n for key in json.loads(latent) for n in self.faces[int(key)]]
        while True:
            index = [int(n) for n in rng.choice(within, SHOTS + 1, replace=False)]
            shown = [items[n] for n in index]
            demos = shown[:-1]
            if (
                all(task.allows(p, latent) for p in shown)
                and task.covers(demos, latents)
                and all(
                    any(task.answer(p, other) != task.answer(p, latent) for p in demos)
                    for other in latents
                    if other != latent
                )
            ):
                return task.question, [task.answer(p, latent) for p in shown], index


def rows(pictures: Pictures, rng: Any, told: list[bool]) -> tuple[list[Any], list[Any]]:
    """Rows of text with answers marked, and the states of their pictures."""
    texts, chosen = [], []
    for kind in told:
        name = READ[int(rng.integers(len(READ)))]
        if kind:
            facts, index = pictures.told(name, rng)
            parts = [("<bos> user : <image>", False)]
            for rule, answer in facts:
                parts += [(f"{rule} answer:", False), (answer, True)]
            parts.append(("<eos>", True))
        else:
            question, answers, index = pictures.episode(name, rng)
            parts = [("<bos> user :", False)]
            for place, answer in enumerate(answers):
                last = place == SHOTS
                parts.append((f"<image> question: {question} answer:", False))
                parts.append((" assistant :", False) if last else ("", False))
                parts.append((f"{answer} <eos>" if last else answer, True))
        texts.append(parts)
        chosen.append(pictures.features[name][index])
    return texts, chosen


def encode(tokenizer: Any, texts: list[Any], image: int, per: int) -> tuple[torch.Tensor, ...]:
    """Ids, labels (every answer) and mask, padded on the right."""
    encoded = []
    for parts in texts:
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in parts:
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                repeat = per if token == image else 1
                ids += [token] * repeat
                labels += [token if learned else -100] * repeat
        encoded.append((ids, labels))
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([a + [0] * (longest - len(a)) for a, _ in encoded])
    labels = torch.tensor([b + [-100] * (longest - len(b)) for _, b in encoded])
    mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a, _ in encoded])
    return ids, labels, mask


def see(reader: Any, seer: Seer, pictures: Pictures, rng: Any, size: int) -> dict[str, Any]:
    """Loss of the tower on single pictures, and how often it is right about something."""
    losses, right = [], {}
    for name in READ:
        index = rng.integers(POOL, size=size // len(READ)).tolist()
        z = seer(name, states(reader, pictures.batch_of(name, index)))
        labels = pictures.labels[name][index]
        losses.append(torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten()))
        there = labels > 0 if name != "character" else labels >= 0
        right[name] = float((z.argmax(-1) == labels)[there].float().mean())
    return {"loss": sum(losses), "right": right}


def states(reader: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's patch states as the projector gets them."""
    output = reader.model.vision_tower(pixels, output_hidden_states=True)
    return output.hidden_states[reader.config.vision_feature_layer][:, 1:]


def read(reader: Any, made: Any, batch: Any, told: list[bool], per: int) -> tuple[Any, ...]:
    """Losses and right last answers of a batch, the kinds apart: rows of one are equally long."""
    texts, chosen_states = batch
    losses, right = [], {}
    image, token = made.tokenizer.image_token_id, reader.get_input_embeddings()
    for kind in (True, False):
        chosen = [n for n, one in enumerate(told) if one is kind]
        if not chosen:
            continue
        ids, labels, mask = encode(made.tokenizer, [texts[n] for n in chosen], image, per)
        features = reader.model.multi_modal_projector(torch.cat([chosen_states[n] for n in chosen]))
        embeds = token(ids)
        embeds = embeds.masked_scatter((ids == image)[..., None], features.flatten(0, 1))
        z = reader.lm_head(
            reader.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False
            ).last_hidden_state
        )
        losses.append(
            torch.nn.functional.cross_entropy(
                z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        )
        at = [int((row != -100).nonzero()[-2]) for row in labels]
        hits = [int(z[r, p - 1].argmax()) == int(labels[r, p]) for r, p in enumerate(at)]
        right["told" if kind else "shown"] = sum(hits) / len(hits)
    return sum(losses), right


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25, help="of this sitting")
    parser.add_argument("--steps", type=int, nargs=3, default=(500, 300, 500), help="of each stage")
    parser.add_argument("--rate", type=float, default=1e-3)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    pictures, made = Pictures(given.output), processor()
    reader = model(len(made.tokenizer), made.tokenizer.image_token_id).train()
    per = (SIDE // PATCH) ** 2
    seer = Seer(reader.config.vision_config.hidden_size, per)
    both = torch.nn.ModuleList([reader, seer])
    optimiser = torch.optim.AdamW(both.parameters(), given.rate, weight_decay=0.01)
    stored, step, log = given.output / "state.pt", 0, []
    if stored.exists():
        state = torch.load(stored, weights_only=True)
        both.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, log = state["step"], state["log"]
    began, (first, second, third) = time.monotonic(), given.steps

    def keep() -> None:
        part = stored.with_suffix(".part")
        torch.save({"model": both.state_dict(), "optimiser": optimiser.state_dict(),
                    "step": step, "log": log}, part)  # fmt: skip
        part.replace(stored)
        reader.save_pretrained(given.output / "model")
        made.save_pretrained(given.output / "model")
        (given.output / "log.json").write_text(json.dumps(log))

    sums: dict[str, list[float]] = {}
    while step < first + second + third and time.monotonic() - began < 60 * given.minutes:
        rng = np.random.default_rng([5, step])
        seeing = step < first
        begun, length = (0, first) if seeing else (first, second + third)
        share = min(1, (step - begun + 1) / 50) * max(0.05, 1 - (step - begun) / length)
        for group in optimiser.param_groups:
            group["lr"] = given.rate * share
        optimiser.zero_grad()
        if seeing:
            found = see(reader, seer, pictures, rng, 96)
            loss, right = found["loss"], found["right"]
        else:
            if not pictures.features:
                reader.model.vision_tower.requires_grad_(False)
                with torch.no_grad():
                    for name in READ:
                        parts = [list(range(k, k + 100)) for k in range(0, POOL, 100)]
                        pictures.features[name] = torch.cat(
                            [states(reader, pictures.batch_of(name, part)) for part in parts]
                        )
            episodes = step >= first + second
            told = [n % 2 == 1 or not episodes for n in range(32)]
            loss, right = read(reader, made, rows(pictures, rng, told), told, per)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        step += 1
        for name, value in {"loss": float(loss.detach()), **right}.items():
            sums.setdefault(name, []).append(value)
        if step % 50 == 0:
            line = {"step": step, **{k: round(sum(v) / len(v), 4) for k, v in sums.items()}}
            log.append(line)
            sums = {}
            print(json.dumps(line), round(time.monotonic() - began), flush=True)
        if step % 200 == 0:
            keep()
    keep()


if __name__ == "__main__":
    main()
