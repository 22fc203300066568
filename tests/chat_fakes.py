"""Chat servers that know what they are doing: behaviours for `misbehaving.serving`.

`FakeModel` is a model of a few lines whose captions depend on the picture, the question, the
context and the seed alone; what the server around it knows of the interface can be chosen.
`EmbeddedServer` is the model that ships with mmlm.
"""

import base64
import hashlib
import io
import random
import threading
from dataclasses import dataclass, field

from misbehaving import send
from PIL import Image

GREEDY = "The picture shows a wide green field below the sky. A yellow sun stands high above it."
SENTENCES = (
    "A dog runs through the grass.",
    "Two people sit on a bench!",
    "Is that a kite of 2.5 metres?",
    "Über den Bäumen fliegt ein Vogel 🐦.",
    "There is a red car near the trees.",
)


def picture_of(body):
    """The bytes of the picture in a request, decoded to make sure that they are one; or None."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return None
    kind, _, data = content[0]["image_url"]["url"].partition(";base64,")
    raw = base64.b64decode(data)
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        assert kind == f"data:image/{image.format.lower()}"
    return raw


def caption_rest(picture, context, seed, sentences=3):
    """What the model says behind a context, up to the end of the caption."""
    rng = random.Random(f"{hashlib.sha256(picture).hexdigest()}|{context}|{seed}")
    begun = sum(context.count(mark + " ") for mark in ".!?") + bool(context)
    left = max(0, sentences - begun)
    return "".join(" " + rng.choice(SENTENCES) for _ in range(left))


@dataclass
class FakeModel:
    """A server around a fake model.

    Attributes:
        continues: Goes on with an open turn; otherwise answers anew.
        echoes: Repeats the open turn first.
        knows_n: Whether `n` counts; "refuses" for a 400 on more than one, "repeats" for one reply
            many times.
        stops: What it does with stop sequences: "keeps" or "cuts" the sequence, or "ignores" it.
        says_why: Names the stop sequence it met, as vLLM does.
        strict: Answers 400 to fields that OpenAI does not have.
        most: Gives at most so many replies.
    """

    continues: bool = True
    echoes: bool = False
    knows_n: bool | str = True
    stops: str = "keeps"
    says_why: bool = True
    strict: bool = False
    most: int = 1000
    asked: list = field(default_factory=list)

    KNOWN = frozenset(
        "model messages n seed temperature top_p max_tokens max_completion_tokens stop".split()
    )

    def __call__(self, handler, body):
        unknown = set(body) - self.KNOWN
        if self.strict and unknown:
            error = {"message": f"Unrecognized request argument supplied: {min(unknown)}"}
            return send(handler, 400, {"error": error})
        n = body.get("n", 1)
        if self.knows_n == "refuses" and n > 1:
            return send(handler, 400, {"error": {"message": "Only one choice is allowed"}})
        picture = picture_of(body)
        if picture is None:
            text = {"role": "assistant", "content": "Hello"}
            choice = {"index": 0, "message": text, "finish_reason": "length"}
            return send(handler, 200, {"choices": [choice]})
        count = min(n, self.most) if self.knows_n else 1
        self.asked.append(body)
        choices = [self.choice(body, picture, index) for index in range(count)]
        return send(handler, 200, {"object": "chat.completion", "choices": choices[::-1]})

    def choice(self, body, picture, index):
        last = body["messages"][-1]
        context = last["content"] if last["role"] == "assistant" and self.continues else ""
        if body["temperature"] == 0:
            known = GREEDY.startswith(context)
            rest = GREEDY[len(context) :] if known else " and so it goes on."
        else:
            own = 0 if self.knows_n == "repeats" else index
            rest = caption_rest(picture, context, body["seed"] + own)
        text, finish, met = self.cut(body, rest)
        text = (context if self.echoes else "") + text
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "finish_reason": finish,
        }
        return choice | ({"stop_reason": met} if self.says_why else {})

    def cut(self, body, text):
        words = text.split(" ")
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        short = " ".join(words[: limit + 1])
        finish = "length" if len(words) > limit + 1 else "stop"
        stops = [] if self.stops == "ignores" else body.get("stop", [])
        places = [(short.find(stop), stop) for stop in stops if stop in short]
        if not places:
            return short, finish, None
        place, stop = min(places)
        return short[: place + (len(stop) if self.stops == "keeps" else 0)], "stop", stop


class EmbeddedServer:
    """The embedded model behind the interface, with what vLLM adds to it."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.lock = threading.Lock()
        self.asked = []

    def __call__(self, handler, body):
        with self.lock:
            self.asked.append(body)
            try:
                choices = self.choices(body)
            except (ValueError, ZeroDivisionError) as error:
                return send(handler, 400, {"error": {"message": f"bad picture: {error}"}})
        return send(handler, 200, {"choices": choices})

    def choices(self, body):
        import torch

        from mmlm.inputs import message, prepare

        asked, *rest = body["messages"]
        raw = picture_of(body)
        question = asked["content"] if raw is None else asked["content"][1]["text"]
        images = [] if raw is None else [Image.open(io.BytesIO(raw)).convert("RGB")]
        begun = {"begun": [" " + rest[0]["content"]]} if rest else {}
        assert not rest or body["continue_final_message"] is True
        conversation = [message("user", question, len(images))]
        inputs = prepare(self.processor, [conversation], [images], "cpu", None, **begun)
        torch.manual_seed(body.get("seed", 0))
        greedy = body.get("temperature", 1.0) == 0
        how = {"do_sample": False} if greedy else {
            "do_sample": True, "temperature": body.get("temperature", 1.0),
            "top_k": 0, "num_return_sequences": body.get("n", 1),
        }  # fmt: skip
        tokenizer = self.processor.tokenizer
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=body["max_tokens"], **how)
        return [
            self.choice(index, tokens, tokenizer, body)
            for index, tokens in enumerate(out[:, inputs["input_ids"].shape[1] :].tolist())
        ]

    def choice(self, index, tokens, tokenizer, body):
        ended = tokenizer.eos_token_id in tokens
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found = [(text.find(stop), stop) for stop in body.get("stop", []) if stop in text]
        if found:
            place, stop = min(found)
            text = text[: place + len(stop)]
        return {
            "index": index,
            "message": {"role": "assistant", "content": " " + text},
            "finish_reason": "stop" if found or ended else "length",
            "stop_reason": min(found)[1] if found else None,
        }
