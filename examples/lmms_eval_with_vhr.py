"""Our methods inside lmms-eval: one task, plain and with VHR, and which answers changed.

    pip install -e '.[lmms]'            # see "Running inside lmms-eval" in docs/evaluation.md
    python examples/lmms_eval_with_vhr.py --output lmms
    python examples/lmms_eval_with_vhr.py --model llava-hf/llava-1.5-7b-hf --device cuda \
        --method "VHR(alpha=2.0)" --method "VCD()" --output lmms

There are two ways in, and ``--wrapper`` chooses:

``ours``
    `wrapper_class` below: lmms-eval asks, `mmlm.runner` answers. Every family that mmlm knows, in
    batches, with the checkpoint's own sampling defaults neutralised.
``llava_hf`` (or another wrapper of lmms-eval that keeps a transformers model in ``.model``)
    lmms-eval's own code generates, and the methods are attached to its model from outside. This
    needs nothing but ``with mmlm.attach(lm.model, ...)``.

The task is local (``lmms_eval_task/``): yes/no questions about pictures of the embedded world, so
nothing is downloaded. Any task of lmms-eval can take its place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path

import mmlm
from mmlm.errors import InputError, MmlmError
from mmlm.runner import GenerateSettings, Request, generate_all

TASK = "world_pope"
TASK_FILES = Path(__file__).parent / "lmms_eval_task"


def request_of(name, messages):
    """Turns lmms-eval's chat messages into one of our requests.

    Args:
        name: Identifies the sample; part of the seed.
        messages: One user message; its content is a list of ``{"type": "image", "url": picture}``
            and ``{"type": "text", "text": ...}``.

    Raises:
        InputError: If there are several turns, a system prompt, or something else than pictures
            and text: leaving it out in silence would score another question.
    """
    if [message["role"] for message in messages] != ["user"]:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"Sample {name} has the turns {roles}; one user turn is understood.",
            advice="Use a wrapper of lmms-eval (--wrapper llava_hf) for this task.",
        )
    content = messages[0]["content"]
    other = {part["type"] for part in content} - {"image", "text"}
    if other:
        raise InputError(
            f"Sample {name} holds {', '.join(sorted(other))}; pictures and text are understood.",
            advice="Give videos as lists of frames, or use a wrapper of lmms-eval.",
        )
    pictures = tuple(part["url"] for part in content if part["type"] == "image")
    kinds = [part["type"] for part in content]
    if kinds == sorted(kinds):  # pictures first
        text = "".join(part["text"] for part in content if part["type"] == "text")
        return Request(name, pictures, text)
    numbers = iter(range(1, len(pictures) + 1))
    marked = [
        f"<image {next(numbers)}>" if part["type"] == "image" else part["text"] for part in content
    ]
    return Request(name, pictures, "".join(marked), marked=True)


def settings_of(options, batch_size):
    """Turns a task's ``generation_kwargs`` into our settings and the strings that end an answer.

    lmms-eval writes greedy decoding as temperature 0.

    Raises:
        InputError: For an option that we do not have.
    """
    known = dict(options)
    until = known.pop("until", None) or []
    temperature = float(known.pop("temperature", None) or 0.0)
    top_p = known.pop("top_p", None)
    sample = bool(known.pop("do_sample", temperature > 0)) and temperature > 0
    chosen = {
        "max_new_tokens": int(known.pop("max_new_tokens", 1024)),
        "num_beams": int(known.pop("num_beams", None) or 1),
    }
    known.pop("image_aspect_ratio", None)  # how LLaVA's own repository cuts pictures
    if known:
        raise InputError(
            f"The task sets {', '.join(sorted(known))}, which has no meaning here.",
            advice="Override the task's generation_kwargs.",
        )
    if sample:
        chosen |= {"do_sample": True, "temperature": temperature, "top_p": float(top_p or 1.0)}
    ends = [until] if isinstance(until, str) else list(until)
    return GenerateSettings(batch_size=batch_size, **chosen), ends


def cut(text, ends):
    """The answer up to the first of the strings that end it."""
    return text[: min([text.find(end) for end in ends if end in text], default=len(text))]


def wrapper_class():
    """A model class for lmms-eval whose answers come from `mmlm.runner`."""
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    class MmlmModel(lmms):
        """Any vision-language model of transformers with any methods of mmlm."""

        is_simple = False

        def __init__(self, model, processor, methods=(), batch_size=8):
            super().__init__()
            self.model, self.processor = model, processor
            self.methods, self.batch_size = tuple(methods), batch_size

        def generate_until(self, requests):
            """Answers everything that has the same generation options together, in order."""
            answers = [None] * len(requests)
            groups = {}
            for number, one in enumerate(requests):
                key = json.dumps(one.args[2], sort_keys=True, default=str)
                groups.setdefault(key, []).append(number)
            for numbers in groups.values():
                options = requests[numbers[0]].args[2]
                settings, ends = settings_of(options, self.batch_size)
                asked = [self._request(number, requests[number]) for number in numbers]
                results = generate_all(self.model, self.processor, asked, self.methods, settings)
                for number, result in zip(numbers, results, strict=True):
                    if result.error is not None:
                        raise InputError(f"Sample {result.id}: {result.error}")
                    answers[number] = GenerationResult(
                        cut(result.text, ends), TokenCounts(output_tokens=result.n_tokens)
                    )
            return answers

        def _request(self, number, one):
            _, to_messages, _, doc_id, task, split = one.args
            document = self.task_dict[task][split][doc_id]
            return request_of(f"{task}-{split}-{doc_id}-{number}", to_messages(document))

        def loglikelihood(self, requests):
            raise NotImplementedError("mmlm's methods act while text is generated")

        def generate_until_multi_round(self, requests):
            raise NotImplementedError("tasks of several rounds need a wrapper of lmms-eval")

    return MmlmModel


def prepare_task(folder, pictures):
    """Draws pictures and writes the task of lmms-eval about them.

    Returns:
        The folder for lmms-eval's ``include_path``.
    """
    from data_tools.world.export import write_split

    world = folder / "world"
    write_split(world, "natural", pictures, progress=False)
    task = folder / "task"
    task.mkdir(exist_ok=True)
    questions = []
    for line in (world / "pope_adversarial.jsonl").read_text().splitlines():
        asked = json.loads(line)
        asked["image"] = str((world / "images" / asked["image"]).resolve())
        questions.append(json.dumps(asked) + "\n")
    (task / "questions.jsonl").write_text("".join(questions))
    shutil.copy(TASK_FILES / "scoring.py", task)
    text = (TASK_FILES / "world_pope.yaml").read_text()
    path = json.dumps(str((task / "questions.jsonl").resolve()))
    (task / "world_pope.yaml").write_text(text.replace("QUESTIONS", path))
    return task


def runner(settings):
    """How a run's model is made.

    Returns:
        A function from methods to (model for lmms-eval, context in which the methods are on).
        lmms-eval takes the weights out of a wrapper when it has finished, so every run gets a
        wrapper of its own.
    """
    if settings.wrapper == "ours":
        model, processor = mmlm.load(settings.model, device=settings.device)
        wrapped = wrapper_class()
        return lambda methods: (
            wrapped(model, processor, methods, settings.batch_size),
            contextlib.nullcontext(),
        )
    return lambda methods: _theirs(settings, methods)


def _theirs(settings, methods):
    from lmms_eval.models import get_model

    from mmlm.model.checkpoint import EMBEDDED, embedded_folder

    source = embedded_folder() if settings.model == EMBEDDED else settings.model
    theirs = get_model(settings.wrapper).create_from_arg_string(
        f"pretrained={source},device={settings.device},device_map={settings.device},"
        "dtype=float32,batch_size=1"
    )
    processor = getattr(theirs, "processor", None) or theirs._image_processor
    return theirs, mmlm.attach(theirs.model, *methods, processor=processor)


def evaluate(model, task_folder):
    """Runs the task in lmms-eval.

    Returns:
        The metrics, and the answers in the order of the questions.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    metrics = {
        name.removesuffix(",none"): value
        for name, value in found["results"][TASK].items()
        if name.removesuffix(",none") in ("accuracy", "yes_ratio")
    }
    return metrics, [sample["filtered_resps"][0] for sample in samples]


def compare(settings):
    """Evaluates the plain model and every method; writes ``results.json``."""
    task = prepare_task(settings.output, settings.pictures)
    load = runner(settings)
    report, plain = {}, None
    for text in ("none", *settings.method):
        methods = [] if text == "none" else [mmlm.parse_method(text)]
        model, attached = load(methods)
        with attached:
            metrics, answers = evaluate(model, task)
        plain = plain or answers
        changed = sum(one != other for one, other in zip(answers, plain, strict=True))
        report[text] = {**metrics, "questions": len(answers), "changed": changed}
        report[text]["answers"] = answers
    (settings.output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'method':<20} {'accuracy':>9} {'yes ratio':>10} {'changed answers':>16}")
    for name, row in report.items():
        print(
            f"{name:<20} {row['accuracy']:>9.3f} {row['yes_ratio']:>10.3f} "
            f"{row['changed']:>9} of {row['questions']}"
        )


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded", help="id, folder, or embedded")
    parser.add_argument("--method", action="append", help='default: "VHR(alpha=2.0)"')
    parser.add_argument("--wrapper", default="ours", help="ours, llava_hf, ...")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    settings = parser.parse_args(arguments)
    settings.method = settings.method or ["VHR(alpha=2.0)"]
    settings.output.mkdir(parents=True, exist_ok=True)
    try:
        compare(settings)
    except MmlmError as error:
        print(f"error: {error}\nadvice: {error.advice}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
