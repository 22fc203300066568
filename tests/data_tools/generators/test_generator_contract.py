"""One contract for every generator: in this process, or behind a server, the same model.

The server here is the embedded model behind a real HTTP server on loopback, so this also shows
that pictures, questions and captions arrive at the other end as they should.
"""

import pytest
from chat_fakes import EmbeddedServer
from misbehaving import serving
from PIL import Image

import mmlm
from data_tools.generators import GeneratorError, Sample, SentenceRequest
from data_tools.generators.huggingface import HFGenerator
from data_tools.generators.openai import OpenAIGenerator
from data_tools.pictures import Picture
from data_tools.world import SPLITS, render, scene
from mmlm.chat_server.client import ChatServer, Patience

QUESTION = "Describe this image in detail."
COLD = 1e-4  # as good as greedy: every difference of logits is 10,000 times as large
N = 4
LIMIT = 40


@pytest.fixture(scope="module")
def embedded():
    return mmlm.load("embedded")


@pytest.fixture(scope="module")
def server(embedded):
    with serving(EmbeddedServer(*embedded)) as server:
        yield server


@pytest.fixture(scope="module", params=["hf", "openai"])
def generator(request, embedded, server):
    return build(request.param, embedded, server)


def build(kind, embedded, server):
    if kind == "hf":
        return HFGenerator(*embedded, max_new_tokens=LIMIT)
    chat = ChatServer(server.url, patience=Patience(retries=0, concurrency=2))
    return OpenAIGenerator("embedded", chat, max_tokens=LIMIT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    made = []
    for number in range(3):
        path = folder / f"{number}.png"
        Image.fromarray(render(scene(SPLITS["natural"], 0, number, "natural")).image).save(path)
        made.append(Picture.read(f"scene-{number}", path))
    return made


def asked(picture, context="", seed=3):
    return SentenceRequest(picture, QUESTION, context, seed)


def test_results_are_as_many_and_in_the_order_of_the_requests(generator, pictures):
    requests = [asked(picture) for picture in pictures]
    results = generator.sample_sentences(requests, N, COLD)
    assert [len(samples) for samples in results] == [N] * 3
    backwards = generator.sample_sentences(requests[::-1], N, COLD)
    assert backwards == results[::-1]
    assert len({samples[0].text for samples in results}) > 1  # the pictures are told apart
    generator.forget(pictures)


def test_a_sample_is_one_sentence_without_blanks_around_it(generator, pictures):
    (samples,) = generator.sample_sentences([asked(pictures[0])], 8, 1.0)
    for sample in samples:
        assert sample.text == sample.text.strip()
        marks = [i for i, letter in enumerate(sample.text) if letter in ".!?"]
        assert marks in ([], [len(sample.text) - 1])
    generator.forget(pictures)


def test_samples_depend_on_the_seed_and_not_on_the_batch(generator, pictures):
    requests = [asked(picture, seed=number) for number, picture in enumerate(pictures)]
    together = generator.sample_sentences(requests, N, 1.5)
    alone = [generator.sample_sentences([one], N, 1.5)[0] for one in requests[::-1]]
    assert alone[::-1] == together
    (other,) = generator.sample_sentences([asked(pictures[0], seed=99)], N, 1.5)
    assert other != together[0]
    assert len({sample.text for sample in together[0]}) > 1  # samples of one request differ
    generator.forget(pictures)


def test_forgetting_changes_nothing(generator, pictures):
    first = generator.sample_sentences([asked(pictures[0])], N, 1.0)
    context = first[0][0].text
    further = generator.sample_sentences([asked(pictures[0], context)], N, 1.0)
    generator.forget(pictures)
    generator.forget(pictures)
    assert generator.sample_sentences([asked(pictures[0], context)], N, 1.0) == further
    assert generator.sample_sentences([asked(pictures[0])], N, 1.0) == first
    generator.forget(pictures)


def test_a_picture_that_cannot_be_taken_fails_its_own_request(
    generator, embedded, pictures, tmp_path, monkeypatch
):
    cls = type(embedded[1])
    taken = cls.__call__

    def fussy(self, images=None, **inputs):
        if any(image.width == 1 for row in images or () for image in row):
            raise ValueError("absolute aspect ratio must be smaller than 200")  # as Qwen's
        return taken(self, images=images, **inputs)

    monkeypatch.setattr(cls, "__call__", fussy)
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 1000)).save(path)
    thin = Picture.read("thin", path)
    requests = [asked(pictures[0]), asked(thin), asked(pictures[1])]
    good, bad, also_good = generator.sample_sentences(requests, N, COLD)
    assert isinstance(bad, GeneratorError)
    assert "aspect ratio" in str(bad)
    alone = generator.sample_sentences([requests[0], requests[2]], N, COLD)
    assert [good, also_good] == alone
    generator.forget([*pictures, thin])


def test_nothing_asked_is_nothing_answered(generator):
    assert generator.sample_sentences([], N, 1.0) == []


@pytest.mark.parametrize(("n", "temperature"), [(0, 1.0), (1, 0.0), (1, float("inf"))])
def test_impossible_sampling_is_refused(generator, pictures, n, temperature):
    with pytest.raises(ValueError, match="must be"):
        generator.sample_sentences([asked(pictures[0])], n, temperature)


def test_facts_are_json(generator):
    import json

    assert json.loads(json.dumps(generator.facts)) == generator.facts


def test_both_continue_captions_alike(embedded, server, pictures):
    """Sentence by sentence to the end, nearly greedy: same model, same prompt, same text."""
    both = [build(kind, embedded, server) for kind in ("hf", "openai")]
    captions = []
    for one in both:
        texts = []
        for picture in pictures:
            sentences = []
            for _ in range(6):
                request = asked(picture, " ".join(sentences))
                ((sample,),) = one.sample_sentences([request], 1, COLD)
                sentences += [sample.text] if sample.text else []
                if sample == Sample("", True) or sample.finished:
                    break
            texts.append(sentences)
        one.forget(pictures)
        captions.append(texts)
    assert captions[0] == captions[1]
    assert max(len(sentences) for sentences in captions[0]) > 1
