"""The generator behind HTTP, against servers that behave, misbehave, and die."""

import base64
import io
import json
import time

import pytest
from chat_fakes import FakeModel, caption_rest, picture_of
from misbehaving import (
    Clock,
    drip,
    half_body,
    hang_up,
    raw,
    replies,
    send,
    serving,
    stall,
    status,
)
from PIL import Image

from data_tools.generators import GeneratorError, Sample, SentenceRequest
from data_tools.generators.chat_prompts import STOPS, as_sample, data_url, first_sentence, seed_of
from data_tools.generators.openai import OpenAIGenerator
from data_tools.generators.probing import split_answer
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.generators.serving import OpenAIOptions, open_generator
from data_tools.pictures import Picture
from mmlm.chat_server.client import ChatServer, Patience
from mmlm.chat_server.wire import Choice
from mmlm.errors import InputError

KEY = "sk-very-secret"
QUESTION = "Describe the image."


@pytest.fixture
def pictures(tmp_path):
    made = []
    for number in range(4):
        path = tmp_path / f"p{number}.png"
        Image.new("RGB", (8, 8), (60 * number, 10, 90)).save(path)
        made.append(Picture.read(f"p{number}", path))
    return made


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def server(fake):
    with serving(fake) as server:
        yield server


def generator(server, clock=None, *, mode="auto", patience=None, **options):
    clock = clock or Clock()
    patience = {"concurrency": 1, "retries": 3, "timeout": 5} | (patience or {})
    chat = ChatServer(
        server.url,
        key=KEY,
        patience=Patience(**patience),
        sleep=clock.sleep,
        now=clock.now,
        jitter=lambda: 1.0,
    )
    return OpenAIGenerator("lvlm", chat, continue_mode=mode, **options)


def ready(server, fake, *behaviours, clock=None, **options):
    """A generator that has met the well-behaved server; what comes next misbehaves first."""
    made = generator(server, clock, **options)
    made.check()
    server.bodies.clear()
    server.behaviours = [*behaviours, fake]
    return made


def asked(picture, context="", seed=1):
    return SentenceRequest(picture, QUESTION, context, seed)


def expected(request, n=3, first=0):
    """What the fake model says, read by hand."""
    content = request.picture.path.read_bytes()
    samples = []
    for index in range(first, first + n):
        rest = caption_rest(content, request.context, seed_of(request, 0) + index).strip()
        ends = [rest.find(mark + " ") for mark in ".!?" if mark + " " in rest]
        text = rest[: min(ends) + 1] if ends else rest
        samples.append(Sample(text, text == rest))
    return samples


# --- what is sent -------------------------------------------------------------------------------


def test_a_request_is_what_the_interface_and_its_extensions_want(server, fake, pictures):
    made = ready(server, fake)
    context = "A dog runs through the grass."
    samples = made.sample_sentences([asked(pictures[0], context, seed=7)], 3, 0.7)
    url = "data:image/png;base64," + base64.b64encode(pictures[0].path.read_bytes()).decode()
    assert server.bodies == [
        {
            "model": "lvlm",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": QUESTION},
                    ],
                },
                {"role": "assistant", "content": context},
            ],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "n": 3,
            "seed": seed_of(asked(pictures[0], seed=7), 0),
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 512,
            "stop": [". ", ".\n", "! ", "!\n", "? ", "?\n"],
            "include_stop_str_in_output": True,
            "no_stop_trim": True,
        }
    ]
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert samples == [expected(asked(pictures[0], context, seed=7))]


def test_the_beginning_of_a_caption_has_no_open_turn(server, fake, pictures):
    made = ready(server, fake, limit_field="max_completion_tokens", parameters={"user": "me"})
    made.sample_sentences([asked(pictures[0])], 2, 0.7)
    (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert "continue_final_message" not in body
    assert body["max_completion_tokens"] == 512
    assert "max_tokens" not in body
    assert body["user"] == "me"


def test_a_server_that_only_answers_anew_is_sent_openai_fields_only(pictures):
    strict = FakeModel(continues=False, strict=True, says_why=False)
    with serving(strict) as server:
        made = generator(server, mode="ask")
        context = "A dog runs."
        (samples,) = made.sample_sentences([asked(pictures[0], context)], 2, 0.7)
    text = server.bodies[-1]["messages"][0]["content"][1]["text"]
    assert text.startswith(QUESTION)
    assert context in text
    assert set(server.bodies[-1]) <= FakeModel.KNOWN - {"stop"}
    assert len(samples) == 2


def test_seeds_are_what_every_server_takes_and_differ(pictures):
    seeds = {
        seed_of(asked(pictures[0], seed=seed), number)
        for seed in (0, 1, 2**64 - 1)
        for number in range(50)
    }
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


# --- pictures -----------------------------------------------------------------------------------


def save(path, image, **how):
    image.save(path, **how)
    return Picture.read("p", path)


def sent(picture):
    kind, _, data = data_url(picture).partition(";base64,")
    return kind, base64.b64decode(data)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "image/png"), ("a.jpg", "image/jpeg")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_that_everybody_reads_alike_are_sent_as_they_are(tmp_path, name, kind, mode):
    picture = save(tmp_path / name, Image.effect_noise((20, 10), 50).convert(mode))
    assert sent(picture) == (f"data:{kind}", picture.path.read_bytes())


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


OTHERS = {
    "transparent": (lambda: Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "a.png", {}),
    "one colour transparent": (
        lambda: Image.new("RGB", (4, 4), (9, 9, 9)),
        "a.png",
        {"transparency": (9, 9, 9)},
    ),
    "palette": (lambda: Image.new("P", (4, 4), 3), "a.png", {}),
    "16 bit": (lambda: Image.new("I;16", (4, 4), 40000), "a.png", {}),
    "cmyk": (lambda: Image.new("CMYK", (4, 4), (9, 99, 0, 0)), "a.jpg", {}),
    "turned": (lambda: Image.new("RGB", (4, 8)), "a.jpg", {"exif": turned()}),
    "webp": (lambda: Image.new("RGB", (4, 4), "teal"), "a.webp", {}),
    "gif": (lambda: Image.new("RGB", (4, 4), "teal"), "a.gif", {}),
}


@pytest.mark.parametrize(("make", "name", "how"), OTHERS.values(), ids=OTHERS.keys())
def test_other_files_are_sent_as_the_pixels_that_everything_else_sees(tmp_path, make, name, how):
    picture = save(tmp_path / name, make(), **how)
    kind, content = sent(picture)
    assert kind == "data:image/png"
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "RGB"
        assert image.tobytes() == picture.image.tobytes()


def test_a_file_that_changed_or_went_is_sent_as_it_was_read(tmp_path, pictures):
    wanted = pictures[1].image.tobytes()
    Image.new("RGB", (8, 8), "white").save(pictures[1].path)
    for _ in range(2):
        with Image.open(io.BytesIO(sent(pictures[1])[1])) as image:
            assert image.tobytes() == wanted
        pictures[1].path.unlink(missing_ok=True)


def test_pictures_are_encoded_once_until_they_are_forgotten(server, fake, pictures, monkeypatch):
    encoded = []

    def counted(picture):
        encoded.append(picture.id)
        return data_url(picture)

    monkeypatch.setattr("data_tools.generators.openai.data_url", counted)
    made = ready(server, fake)
    for _ in range(3):
        made.sample_sentences([asked(pictures[0])], 1, 1.0)
    made.forget([pictures[0], pictures[1]])
    made.sample_sentences([asked(pictures[0])], 1, 1.0)
    assert encoded == ["p0", "p0"]


# --- sentences ----------------------------------------------------------------------------------

SAMPLES = [
    (Choice(" A dog. ", "stop", stopped_by=". "), Sample("A dog.", False)),
    (Choice(" A dog. ", "stop"), Sample("A dog.", False)),  # a stop sequence, not said
    (Choice("A dog.\n", "stop"), Sample("A dog.", False)),
    (Choice(" A dog.", "stop"), Sample("A dog.", True)),
    (Choice(" A dog.", "stop", stopped_by="."), Sample("A dog.", False)),
    (Choice(" A dog. A cat.", "stop"), Sample("A dog.", False)),
    (Choice(" A dog. A ca", "length"), Sample("A dog.", False)),
    (Choice(" A dog.", "length"), Sample("A dog.", False)),
    (Choice(" A dog", "length"), Sample("", False)),  # no whole sentence
    (Choice(" A dog", "stop"), Sample("A dog", True)),  # ended without a mark
    (Choice(" A dog", ""), Sample("", False)),  # a server that does not say why it stopped
    (Choice("", "stop"), Sample("", True)),
    (Choice(None, "stop"), Sample("", True)),
    (Choice("  \n", "stop"), Sample("", True)),
    (Choice(" A dog. ", "stop_sequence"), Sample("A dog.", False)),  # TGI
    (Choice(" A dog.", "eos_token"), Sample("A dog.", True)),
    (Choice("I can", "content_filter", refused=True), Sample("", False)),
    (Choice(" It is 2.5 m high! Yes.", "stop"), Sample("It is 2.5 m high!", False)),
    (Choice(" A cat... and more?", "stop"), Sample("A cat...", False)),
    (Choice(" Ein Vögelchen 🐦. Ja.", "stop"), Sample("Ein Vögelchen 🐦.", False)),
]


@pytest.mark.parametrize(("choice", "sample"), SAMPLES, ids=[repr(c.text) for c, _ in SAMPLES])
def test_what_a_reply_is_as_a_sample(choice, sample):
    assert as_sample(choice) == sample


def test_a_repeated_context_is_left_out_if_the_server_is_known_for_it():
    choice = Choice("A dog. A cat sits. More.", "stop")
    assert as_sample(choice) == Sample("A dog.", False)
    assert as_sample(choice, "A dog.") == Sample("A cat sits.", False)
    assert as_sample(choice, "A dog. A cat sits. More.") == Sample("", True)


def test_the_first_sentence_ends_at_the_first_mark_before_white_space():
    for mark in ".!?":
        for blank in (" ", "\n", "\t", ""):
            assert first_sentence(f" One{mark}{blank}Two.") == (
                (f"One{mark}", f"{blank}Two.") if blank else (f"One{mark}Two.", "")
            )
            assert f"{mark} " in STOPS
    assert first_sentence("no mark") is None


# --- how many -----------------------------------------------------------------------------------

SERVERS = {
    "as vLLM": FakeModel(),
    "does not say why it stopped": FakeModel(says_why=False),
    "cuts stop sequences off": FakeModel(stops="cuts", says_why=False),
    "ignores stop sequences": FakeModel(stops="ignores", says_why=False),
    "repeats the open turn": FakeModel(echoes=True),
}


@pytest.mark.parametrize("fake", SERVERS.values(), ids=SERVERS.keys())
def test_every_kind_of_server_gives_the_same_samples(fake, pictures):
    requests = [
        asked(pictures[0]),
        asked(pictures[1], "There is a red car near the trees.", 5),
        asked(pictures[2], "A dog runs through the grass. Two people sit on a bench!", 6),
    ]
    with serving(fake) as server:
        made = generator(server, patience={"concurrency": 4})
        assert made.sample_sentences(requests, 4, 0.7) == [expected(one, 4) for one in requests]
    assert made.check().keeps_stops == (fake.stops == "keeps")


@pytest.mark.parametrize("knows_n", [False, "refuses", "repeats"])
def test_a_server_without_n_is_asked_one_by_one_with_seeds_of_their_own(knows_n, pictures):
    request = asked(pictures[0])
    content = pictures[0].path.read_bytes()
    with serving(FakeModel(knows_n=knows_n)) as server:
        made = generator(server)
        made.check()
        server.bodies.clear()
        (samples,) = made.sample_sentences([request], 5, 0.7)
    assert [body["n"] for body in server.bodies] == [1] * 5
    seeds = [body["seed"] for body in server.bodies]
    assert seeds == [seed_of(request, number) for number in range(5)]
    whole = [caption_rest(content, "", seed).strip() for seed in seeds]
    assert all(text.startswith(one.text) for text, one in zip(whole, samples, strict=True))


def test_a_server_that_gives_fewer_is_asked_for_the_rest(pictures):
    with serving(FakeModel(most=2)) as server:
        made = generator(server)
        made.check()
        server.bodies.clear()
        requests = [asked(pictures[0]), asked(pictures[1], seed=2)]
        results = made.sample_sentences(requests, 5, 0.7)
    assert [len(samples) for samples in results] == [5, 5]
    assert [body["n"] for body in server.bodies] == [5, 5, 3, 3, 1, 1]
    assert len({body["seed"] for body in server.bodies}) == 6
    assert results[0][:2] == expected(requests[0], 2)


def test_samples_per_request(server, fake, pictures):
    made = ready(server, fake, samples_per_request=2)
    (samples,) = made.sample_sentences([asked(pictures[0])], 5, 0.7)
    assert len(samples) == 5
    assert sorted(body["n"] for body in server.bodies) == [1, 2, 2]


def test_a_server_that_gives_too_many_is_cut_and_equal_choices_are_kept(server, fake, pictures):
    def same(handler, body):
        choice = {"message": {"content": " A dog."}, "finish_reason": "stop"}
        send(handler, 200, {"choices": [choice] * 7})

    made = ready(server, fake, same)
    assert made.sample_sentences([asked(pictures[0])], 3, 0.7) == [[Sample("A dog.", True)] * 3]
    assert len(server.bodies) == 1


def test_choices_too_many_do_not_take_the_place_of_others(server, fake, pictures):
    def generous(handler, body):
        texts = [f"{body['seed']} {number}." for number in range(5)]
        choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
        send(handler, 200, {"choices": choices})

    made = ready(server, fake, samples_per_request=2)
    server.behaviours = [generous]
    request = asked(pictures[0])
    (samples,) = made.sample_sentences([request], 3, 0.7)
    first, second = (seed_of(request, number) for number in range(2))
    assert [one.text for one in samples] == [f"{first} 0.", f"{first} 1.", f"{second} 0."]


# --- does it go on? -----------------------------------------------------------------------------


def test_a_server_that_starts_anew_is_refused_with_advice(pictures):
    with serving(FakeModel(continues=False)) as server:
        made = generator(server)
        for _ in range(2):
            with pytest.raises(InputError, match="starts a new answer") as caught:
                made.sample_sentences([asked(pictures[0])], 2, 0.7)
        assert "continue_final_message" in caught.value.advice
        assert "`ask`" in caught.value.advice
        assert not any(picture_of(b) == pictures[0].path.read_bytes() for b in server.bodies)
        trusting = generator(server, mode="prefill")
        assert len(trusting.sample_sentences([asked(pictures[0])], 2, 0.7)[0]) == 2


@pytest.mark.parametrize("text", ["Yes.", "", "word " * 20, "abc abc abc abc abc abc"])
def test_a_server_whose_answers_tell_nothing_is_refused(text):
    with serving(replies(text)) as server, pytest.raises(InputError, match="no clear sign"):
        generator(server).check()


def test_a_server_that_knows_no_extensions_is_told_about(pictures):
    with serving(FakeModel(strict=True)) as server:
        with pytest.raises(InputError, match="Unrecognized request argument") as caught:
            generator(server).check()
        assert "`ask`" in caught.value.advice


@pytest.mark.parametrize(
    ("answer", "split"),
    [
        ("one two three four five six", ("one two three", ["four", "five"])),
        ("a b a a a c", None),
        ("a a b c d", ("a a", ["b", "c"])),
        ("one two three", None),
        ("", None),
    ],
)
def test_answers_are_cut_before_a_new_word(answer, split):
    found = split_answer(answer)
    assert (found and (found.before, found.after)) == split


def test_the_server_is_asked_about_itself_once(server, fake, pictures):
    made = generator(server)
    made.check()
    count = len(server.bodies)
    assert count == 5
    made.sample_sentences([asked(pictures[0])], 2, 0.7)
    made.sample_sentences([asked(pictures[0])], 2, 0.7)
    assert len(server.bodies) == count + 2


# --- order, seeds, batches ----------------------------------------------------------------------


def test_results_are_in_the_order_of_the_requests_whoever_is_first(server, fake, pictures):
    first = pictures[0].path.read_bytes()

    def uneven(handler, body):
        time.sleep(0.05 if picture_of(body) == first else 0)
        fake(handler, body)

    made = ready(server, uneven, patience={"concurrency": 3})
    server.behaviours = [uneven]
    requests = [asked(picture, seed=number) for number, picture in enumerate(pictures)]
    assert made.sample_sentences(requests, 3, 0.7) == [expected(one) for one in requests]
    assert 1 < server.most_under_way <= 3


def test_samples_depend_on_the_request_alone(server, fake, pictures):
    made = ready(server, fake)
    requests = [asked(picture, seed=number) for number, picture in enumerate(pictures)]
    together = made.sample_sentences(requests, 3, 0.7)
    assert [made.sample_sentences([one], 3, 0.7)[0] for one in requests[::-1]] == together[::-1]
    assert made.sample_sentences([], 3, 0.7) == []


def grow(model, pictures, steps=4, n=4):
    """Captions as SENTINEL lets them grow: sample, note, append one, until they end."""
    contexts = {picture.id: "" for picture in pictures}
    seen = []
    for step in range(steps):
        growing = [picture for picture in pictures if contexts[picture.id] is not None]
        requests = [asked(p, contexts[p.id], seed=step) for p in growing]
        for request, samples in zip(
            requests, model.sample_sentences(requests, n, 0.7), strict=True
        ):
            seen.append((request.picture.id, request.context, samples))
            texts = sorted({one.text for one in samples if one.text})
            longer = f"{request.context} {texts[0]}".strip() if texts else None
            contexts[request.picture.id] = longer
    model.forget(pictures)
    return seen


def test_a_growing_caption_is_the_same_as_from_a_script(server, fake, pictures):
    by_id = {picture.id: picture for picture in pictures}

    def script(identifier, context, seed):
        return expected(asked(by_id[identifier], context, seed), 4)

    found = grow(generator(server, patience={"concurrency": 4}), pictures)
    assert found == grow(ScriptedGenerator(script), pictures)
    assert any("🐦" in one.text for _, _, samples in found for one in samples)
    assert any(one == Sample("", True) for _, _, samples in found for one in samples)


# --- servers in trouble -------------------------------------------------------------------------

PASSING = {
    "reset": hang_up,
    "half a body": half_body,
    "500": status(500),
    "503 with words": status(503, {"error": {"message": "busy"}}),
    "wrong JSON": raw(b'{"choices": ['),
    "no choices": raw(b'{"choices": []}'),
    "choices missing": raw(b'{"object": "chat.completion"}'),
    "a broken choice among good ones": raw(
        json.dumps({"choices": [{"message": {"content": "A."}}, {"message": None}]}).encode()
    ),
    "content of a wrong type": replies(17),
}


@pytest.mark.parametrize("behaviour", PASSING.values(), ids=PASSING.keys())
def test_passing_trouble_is_tried_again(server, fake, pictures, behaviour):
    clock = Clock()
    made = ready(server, fake, behaviour, behaviour, clock=clock)
    assert made.sample_sentences([asked(pictures[0])], 3, 0.7) == [expected(asked(pictures[0]))]
    assert clock.sleeps == [1, 2]


def test_retry_after_is_obeyed(server, fake, pictures):
    clock = Clock()
    made = ready(server, fake, status(429, Retry_After="7"), clock=clock)
    assert made.sample_sentences([asked(pictures[0])], 3, 0.7) == [expected(asked(pictures[0]))]
    assert clock.sleeps == [7]


@pytest.mark.parametrize("behaviour", [stall, drip])
def test_a_slow_answer_is_left_and_asked_for_again(server, fake, pictures, behaviour):
    patience = Patience(timeout=0.3, retries=1, concurrency=1, first_wait=0.01)
    made = OpenAIGenerator("lvlm", ChatServer(server.url, patience=patience))
    made.check()
    server.behaviours = [behaviour, fake]
    assert made.sample_sentences([asked(pictures[0])], 3, 0.7) == [expected(asked(pictures[0]))]


TOO_LONG = status(400, {"error": {"message": "maximum context length is 4096"}})
REFUSED = {
    "too long": (TOO_LONG, "maximum context length"),
    "refusal": (replies(None, refusal="I cannot"), "refused"),
    "filtered": (replies("", finish="content_filter"), "refused"),
}


@pytest.mark.parametrize(("behaviour", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_concerns_one_request_costs_that_one(server, fake, pictures, behaviour, reason):
    made = ready(server, fake, behaviour)
    requests = [asked(picture) for picture in pictures]
    failed, *others = made.sample_sentences(requests, 1, 0.7)
    assert isinstance(failed, GeneratorError)
    assert reason in str(failed)
    assert len(server.bodies) == 4  # the server answered: nobody asks whether it is there
    assert others == [expected(one, 1) for one in requests[1:]]


def test_a_picture_that_breaks_the_server_every_time_costs_its_request(server, fake, pictures):
    poison = pictures[1].path.read_bytes()

    def crash(handler, body):
        (status(500) if picture_of(body) == poison else fake)(handler, body)

    made = ready(server, fake, patience={"retries": 1})
    server.behaviours = [crash]
    requests = [asked(picture) for picture in pictures]
    results = made.sample_sentences(requests, 3, 0.7)
    assert [isinstance(one, GeneratorError) for one in results] == [False, True, False, False]
    assert "HTTP 500" in str(results[1])
    assert results[3] == expected(requests[3])


def test_many_refused_in_a_row_do_not_keep_others_from_being_asked(server, fake, pictures):
    made = ready(server, fake, TOO_LONG, TOO_LONG, patience={"give_up_after": 2})
    requests = [asked(picture) for picture in pictures]
    results = made.sample_sentences(requests, 3, 0.7)
    assert [isinstance(one, GeneratorError) for one in results] == [True, True, False, False]
    assert results[2:] == [expected(one) for one in requests[2:]]


def test_what_was_not_asked_is_asked_once(server, fake, pictures):
    patience = {"give_up_after": 1}
    made = ready(server, fake, TOO_LONG, patience=patience, samples_per_request=1)
    bad, good = made.sample_sentences([asked(pictures[0]), asked(pictures[1])], 2, 0.7)
    assert isinstance(bad, GeneratorError)
    assert len(good) == 2
    assert len(server.bodies) == 1 + 2


HOPELESS = {
    "wrong key": (status(401, {"error": {"message": f"bad {KEY}"}}), "HTTP 401", "Check the key"),
    "forbidden": (status(403), "HTTP 403", "may not use"),
    "no such model": (status(404), "HTTP 404", "name of the model"),
    "no credit": (
        status(429, {"error": {"message": "pay", "code": "insufficient_quota"}}),
        "HTTP 429",
        "no credit",
    ),
}


@pytest.mark.parametrize("before", [0, 1], ids=["at the start", "later"])
@pytest.mark.parametrize(("behaviour", "text", "advice"), HOPELESS.values(), ids=HOPELESS.keys())
def test_what_concerns_everything_ends_the_run(
    server, fake, pictures, behaviour, text, advice, before
):
    made = ready(server, fake) if before else generator(server)
    server.behaviours = [fake] * before + [behaviour]
    with pytest.raises(InputError, match=text) as caught:
        made.sample_sentences([asked(picture) for picture in pictures * 5], 3, 0.7)
    assert advice in caught.value.advice
    assert KEY not in str(caught.value) + caught.value.advice
    assert len(server.bodies) <= before + 2


@pytest.mark.parametrize("death", [hang_up, status(502)])
def test_a_server_that_dies_in_the_middle_ends_the_run_so_that_it_can_go_on(
    server, fake, pictures, death
):
    made = ready(server, fake, patience={"retries": 1, "give_up_after": 3})
    server.behaviours = [fake, fake, death]
    requests = [asked(picture) for picture in pictures * 10]
    with pytest.raises(InputError, match="does not answer") as caught:
        made.sample_sentences(requests, 3, 0.7)
    assert "goes on where it stopped" in caught.value.advice
    assert len(server.bodies) == 2 + 3 * 2 + 2  # good ones, given up after three, one last greeting
    server.behaviours = [fake]
    assert made.sample_sentences(requests[:1], 3, 0.7) == [expected(requests[0])]


def test_one_request_is_enough_to_notice_that_the_server_is_dead(server, fake, pictures):
    made = ready(server, fake, hang_up)
    server.behaviours = [hang_up]
    with pytest.raises(InputError, match="does not answer"):
        made.sample_sentences([asked(pictures[0])], 3, 0.7)


def test_no_server_at_all(pictures):
    chat = ChatServer("http://127.0.0.1:9/v1", patience=Patience(retries=0))  # the discard port
    with pytest.raises(InputError, match="ConnectError"):
        OpenAIGenerator("lvlm", chat).sample_sentences([asked(pictures[0])], 3, 0.7)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"samples_per_request": 0}, {"continue_mode": "always"}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OpenAIGenerator("m", ChatServer("http://localhost/v1"), **wrong)


@pytest.mark.parametrize(("n", "temperature"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_impossible_sampling_is_refused(server, pictures, n, temperature):
    with pytest.raises(ValueError, match=r"n must|temperature"):
        generator(server).sample_sentences([asked(pictures[0])], n, temperature)


def test_facts_say_what_determines_samples_and_not_where(server):
    made = generator(server, max_tokens=99, samples_per_request=1, parameters={"top_k": 5})
    assert made.facts == {
        "generator": "openai",
        "model": "lvlm",
        "continue_mode": "prefill",
        "max_tokens": 99,
        "samples_per_request": 1,
        "parameters": {"top_k": 5},
    }
    assert json.dumps(made.facts)
    assert generator(server, mode="ask").facts["continue_mode"] == "ask"
    assert server.bodies == []


def test_a_command_s_options_name_a_generator(server, pictures, monkeypatch):
    monkeypatch.setenv("OUR_KEY", KEY)
    options = OpenAIOptions(
        base_url=server.url, model="lvlm", key_variable="OUR_KEY", retries=0, max_tokens=40
    )
    request = asked(pictures[0])
    assert open_generator(options).sample_sentences([request], 3, 0.7) == [expected(request)]
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert server.bodies[-1]["max_tokens"] == 40


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"model": None}, r"--server\.model is missing"),
        ({"max_tokens": 0}, r"--server\.max_tokens"),
        ({"concurrency": 0}, r"--server\.concurrency"),
        ({"samples_per_request": -1}, r"--server\.samples_per_request"),
        ({"base_url": "localhost"}, "no address"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, text):
    with pytest.raises(InputError, match=text):
        open_generator(OpenAIOptions(**{"model": "m", **wrong}))
