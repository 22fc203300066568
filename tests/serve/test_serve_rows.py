"""`mmlm.serve.rows`: pieces that join to the answer, stop sequences, and where an answer ends."""

import itertools
from types import SimpleNamespace

import pytest

from mmlm.serve.jobs import Answer, Choosing
from mmlm.serve.rows import Row

END = 0


class FakeJob:
    def __init__(self, max_tokens=100, **choosing):
        self.prompt = SimpleNamespace(max_tokens=max_tokens)
        self.choosing = Choosing(streams=True, **choosing)
        self.cancelled = False
        self.sent = ""
        self.events = []

    def send(self, event):
        self.events.append(event)
        if isinstance(event, str):
            self.sent += event


def run(pieces, job=None, end=True):
    """Feeds tokens whose texts are given; returns the job and how many were taken."""
    job = job or FakeJob()
    words = dict(enumerate(pieces, start=1))

    def decode(tokens):
        raw = b"".join(words.get(t, b"") for t in tokens)
        return raw.decode("utf-8", "replace")

    words = {k: w if isinstance(w, bytes) else w.encode() for k, w in words.items()}
    row = Row(job, {END}, decode)
    for count, token in enumerate([*words, *([END] if end else [])], start=1):
        if row.take(token):
            return job, count
    row.close()
    return job, count


def answer_of(job):
    *pieces, answer = job.events
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert isinstance(answer, Answer)
    assert "".join(pieces) == answer.text
    return answer


def test_pieces_join_to_the_answer():
    job, _ = run([" a", " dog", " runs", " .", " "])
    assert answer_of(job) == Answer("a dog runs .", 6, "stop")
    assert len(job.events) > 3


def test_a_character_in_four_tokens_is_sent_when_it_is_whole():
    bird = "🐦".encode()
    job, _ = run([b"a ", *(bird[k : k + 1] for k in range(4)), b" b"])
    assert answer_of(job).text == "a 🐦 b"
    assert all("\ufffd" not in piece for piece in job.events[:-1])


def test_blanks_at_both_ends_are_not_sent():
    job, _ = run(["\n", " a", " ", "\n", " "])
    assert answer_of(job).text == "a"


@pytest.mark.parametrize(
    "pieces", [["a dog. A", " cat"], ["a dog", ".", " ", "A"], ["a dog.", " "]]
)
@pytest.mark.parametrize("keeps", [False, True])
def test_a_stop_sequence_ends_the_answer(pieces, keeps):
    job, taken = run(pieces, FakeJob(stops=(". ",), keeps_stop=keeps), end=False)
    answer = answer_of(job)
    assert answer.text == ("a dog. " if keeps else "a dog")
    assert (answer.finish, answer.stopped_by) == ("stop", ". ")
    assert answer.n_tokens == taken


def test_the_first_of_several_stop_sequences_counts():
    job, _ = run(["one two", " three"], FakeJob(stops=("three", "two", "wo")))
    assert answer_of(job).stopped_by == "two"


def test_nothing_of_a_stop_sequence_is_ever_sent():
    text = "ab abc abcd abcde."
    for cuts in itertools.combinations(range(1, len(text)), 3):
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        job, _ = run(pieces, FakeJob(stops=("abcd", "bcde")))
        assert answer_of(job).text == "ab abc"


def test_what_only_began_like_a_stop_sequence_is_sent_at_the_end():
    job, _ = run(["a", " END", " O"], FakeJob(stops=("END OF",)))
    assert answer_of(job).text == "a END O"


def test_the_limit_ends_the_answer():
    job, taken = run(["a", " b", " c", " d"], FakeJob(max_tokens=2))
    assert taken == 2
    assert answer_of(job) == Answer("a b", 2, "length")


def test_no_more_tokens_end_the_answer():
    job, _ = run(["a", " b"], end=False)
    assert answer_of(job) == Answer("a b", 2, "length")


def test_an_end_at_once_is_an_empty_answer():
    job, _ = run([])
    assert job.events == [Answer("", 1, "stop")]


def test_a_cancelled_job_gets_nothing_more():
    job = FakeJob()
    row = Row(job, {END}, lambda tokens: "x " * len(tokens))
    assert not row.take(5)
    job.cancelled = True
    before = list(job.events)
    assert row.take(5)
    row.close()
    assert job.events == before


def test_what_was_sent_is_not_sent_again():
    job = FakeJob()
    job.sent = "a dog"
    run([" a", " dog", " runs"], job)
    assert job.events[:-1] == [" runs"]
    assert job.events[-1].text == "a dog runs"


def test_a_token_that_changes_the_text_before_it():
    texts = ["do", "do n", "don't", "don't."]
    job = FakeJob()
    row = Row(job, {END}, lambda tokens: texts[min(len(tokens), 4) - 1])
    for token in (1, 2, 3, 4, END):
        row.take(token)
    assert answer_of(job).text == "don't."
