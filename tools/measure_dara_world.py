"""What DARA changes on the embedded model when a prompt has two pictures.

    python tools/measure_dara_world.py make           # episodes of new scenes
    mmlm train --config train/world/dara
    mmlm train --config train/world/dara_lora
    python tools/measure_dara_world.py measure        # docs/results/dara.json
    python tools/measure_dara_world.py picture        # docs/images/dara.svg

A prompt shows a scene with a question and its answer, and then asks the same kind of question about
a second scene: "is there a dog in the image ?". The object is in exactly one of the two, so whoever
answers about the first picture is always wrong. The embedded model saw one picture at a time in its
training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import numpy as np
import torch
from last_row import LastRow, shares
from measure_dara import counts, mean
from PIL import Image
from safetensors.torch import load_file

from benchmarks.stats import bootstrap_interval, paired_bootstrap
from data_tools.world import SPLITS, existence_answer, existence_question, render, scene
from mmlm import DARA, attach, measured
from mmlm.inputs import load_image, message, prepare
from mmlm.model.checkpoint import load

ARMS = ("plain", "DARA", "LoRA")
CONDITIONS = ("zero_shot", "no_image", "full")


def episode(folder: Path, split: str, number: int) -> dict[str, Any]:
    """Two scenes, a question about each; the second one's object is in one of them only."""
    rng = np.random.default_rng([41, split == "train", number])
    at, shown = 3 * number, []
    while True:
        shown = [scene(SPLITS[split], seed=29, index=at + k, split=split) for k in (0, 1)]
        apart = [sorted(shown[a].classes - shown[1 - a].classes) for a in (0, 1)]
        if all(apart):
            break
        at += 1_000_000
    present = number % 2 == 1  # in the second scene, else in the first
    demo_yes = bool(rng.integers(2))
    demo = str(rng.choice(apart[0 if demo_yes else 1]))
    asked = str(rng.choice([n for n in apart[1 if present else 0] if n != demo] or [demo]))
    names = []
    for k, one in enumerate(shown):
        names.append(f"pictures/{split}-{number:04d}-{k}.png")
        Image.fromarray(render(one).image).save(folder / names[-1])
    questions = [existence_question(name) for name in (demo, asked)]
    answers = [existence_answer(demo, demo_yes), existence_answer(asked, present)]
    return {
        "id": f"{split}-{number}",
        "task": "second_picture",
        "images": names,
        "prompt": f"<image 1>{questions[0]} {answers[0]} <image 2>{questions[1]}",
        "answer": answers[1],
        "demo_answers": answers[:1],
        "zero_shot": f"<image 1>{questions[1]}",
        "no_image": f"{questions[0]} {answers[0]} <image 1>{questions[1]}",
        "present": present,
    }


#: Number of the first query. Those before it were looked at while steps and rates were chosen.
FIRST = 200


def make(folder: Path, train: int, test: int) -> None:
    """Episodes to learn from (scenes of the training split) and to ask (natural)."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    wanted = (("train", 0, train, "support"), ("natural", FIRST, test, "query"))
    for split, first, count, name in wanted:
        numbers = range(first, first + count)
        lines = [json.dumps(episode(folder, split, number)) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def of_arm(folder: Path, arm: str) -> tuple[Any, Any, Any]:
    """The model of an arm, its processor, and the methods with which it answers."""
    model, processor = load("embedded")
    if arm == "LoRA":
        from peft import PeftModel

        about = json.loads((folder / "adapters" / "joint.json").read_text())
        path = folder / "adapters" / about["folder"] / "adapter"
        return PeftModel.from_pretrained(model, path).eval(), processor, ()
    if arm == "plain":
        return model, processor, ()
    file = str(folder / "factors" / "joint.safetensors")
    method = DARA(images=2, weights_file=file, align="query_last")
    return model, processor, (method,)


@torch.no_grad()
def answer(folder: Path, arm: str, condition: str) -> dict[str, Any]:
    """Whether each answer begins with the right word, and the attention on either picture.

    Attention is that of the last position of the prompt, the mean over heads, in layer 0 and over
    all layers; only measured where both pictures are shown.
    """
    model, processor, methods = of_arm(folder, arm)
    asked = [json.loads(line) for line in (folder / "query.jsonl").read_text().splitlines()]
    hits: list[int] = []
    records: list[dict[str, Any]] = []
    with attach(model, *methods, LastRow()):
        for first in range(0, len(asked), 20):
            part = asked[first : first + 20]
            shown = [one["images"] if condition == "full" else one["images"][1:] for one in part]
            texts = [one["prompt" if condition == "full" else condition] for one in part]
            inputs = prepare(
                processor,
                [
                    [message("user", text, len(own), marked=True)]
                    for text, own in zip(texts, shown, strict=True)
                ],
                [[load_image(folder / path) for path in own] for own in shown],
            )
            output = model(**inputs)
            said = output.logits[:, -1].argmax(-1)
            for one, token in zip(part, said.tolist(), strict=True):
                hits.append(
                    int(processor.tokenizer.decode(token).strip() == one["answer"].split()[0])
                )
            records += measured(model)
    return {"hits": hits, **({"attention": shares(records)} if condition == "full" else {})}


def measure(folder: Path, output: Path) -> None:
    """Answers under every arm and condition, with intervals."""
    present = [json.loads(x)["present"] for x in (folder / "query.jsonl").read_text().splitlines()]
    answered = {
        f"{arm}/{condition}": answer(folder, arm, condition)
        for arm in ARMS
        for condition in (CONDITIONS if arm == "plain" else ("zero_shot", "full"))
    }
    result: dict[str, Any] = {"queries": len(present), "arms": {}, "against_plain": {}}
    for key, found in answered.items():
        interval = bootstrap_interval(counts(found["hits"]), mean)
        assert interval is not None
        right = {
            name: [h for h, there in zip(found["hits"], present, strict=True) if there is wanted]
            for name, wanted in (("in_second", True), ("in_first", False))
        }
        result["arms"][key] = {
            "accuracy": sum(found["hits"]) / len(present),
            "interval": [interval.low, interval.high],
            **{name: sum(own) / len(own) for name, own in right.items()},
            **({"attention": found["attention"]} if "attention" in found else {}),
        }
    plain = counts(answered["plain/full"]["hits"])
    for arm in ARMS[1:]:
        change = paired_bootstrap(plain, counts(answered[f"{arm}/full"]["hits"]), mean)
        assert change.interval is not None
        result["against_plain"][arm] = {
            "change": change.value,
            "interval": [change.interval.low, change.interval.high],
        }
    for arm, name in (("DARA", "factors"), ("LoRA", "adapters")):
        about = json.loads((folder / name / "joint.json").read_text())
        kept = ("learning_rate", "held_out_loss_by_rate", "steps", "learning_parameters")
        result[arm] = {key: about[key] for key in kept}
    theta = load_file(folder / "factors" / "joint.safetensors")["offsets.0"]
    result["DARA"]["factors"] = (1 + theta).tolist()
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def picture(output: Path, file: Path) -> None:
    """Accuracies of the arms, and the factors that were learned."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dara"
    from matplotlib import pyplot

    result = json.loads(output.read_text())
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.0), width_ratios=(1.5, 1))
    shown = ("plain/zero_shot", "plain/no_image", "plain/full", "DARA/full", "LoRA/full")
    names = ("plain,\nno demo", "plain, demo\nwithout picture", "plain", "DARA", "LoRA")
    for place, key in enumerate(shown):
        one = result["arms"][key]
        low, high = (100 * x for x in one["interval"])
        value = 100 * one["accuracy"]
        colour = "#8899aa" if key.startswith("plain") else "#336699"
        left.bar(place, value, color=colour, yerr=[[value - low], [high - value]], capsize=3)
        left.text(place, 3, f"{value:.1f}", ha="center", color="white")
    left.set_xticks(range(len(names)), names, fontsize=8)
    left.set_ylabel("right about the second picture, %", fontsize=8)
    left.set_ylim(0, 100)
    factors = np.array(result["DARA"]["factors"])
    right.imshow(factors, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
    for (head, image), value in np.ndenumerate(factors):
        right.text(image, head, f"{value:.2f}", ha="center", va="center", fontsize=8)
    right.set_xticks((0, 1), ("demonstration", "query"), fontsize=8)
    right.set_yticks(range(len(factors)), [f"head {n}" for n in range(len(factors))], fontsize=8)
    right.set_title("factors of layer 0", fontsize=9)
    left.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "measure", "picture"))
    parser.add_argument("--folder", type=Path, default=Path("runs/dara_world"))
    parser.add_argument("--train", type=int, default=150)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("docs/results/dara.json"))
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.train, given.test)
    elif given.what == "measure":
        measure(given.folder, given.output)
    else:
        picture(given.output, Path("docs/images/dara.svg"))


if __name__ == "__main__":
    main()
