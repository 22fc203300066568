"""Judges: the cache, the client against a server that misbehaves, a model on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from misbehaving import (
    DRIPS,
    Clock,
    completion,
    drip,
    echo,
    half_body,
    hang_up,
    raw,
    replies,
    serving,
    stall,
    status,
)

from benchmarks.judges import (
    JudgePrompt,
    ScriptedJudge,
    Verdict,
    WatchedJudge,
    count_failures,
    judge_name,
    prompt_key,
    read_script,
)
from benchmarks.judges.cache import CachedJudge
from benchmarks.judges.http import ChatJudge, Patience
from mmlm.errors import InputError

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret"


def prompts(count):
    return [JudgePrompt(f"p{number}", f"question {number}") for number in range(count)]


# --- the client against a server that misbehaves -------------------------------------------------


@pytest.fixture
def server():
    with serving() as server:
        yield server


def client(server, clock=None, *, key=KEY, parameters=None, **patience):
    clock = clock or Clock()
    return ChatJudge(
        "judge-1",
        server.url,
        key=key,
        parameters={"temperature": 0} if parameters is None else parameters,
        patience=Patience(**{"concurrency": 1, "retries": 3, "timeout": 5, **patience}),
        sleep=clock.sleep,
        now=clock.now,
        jitter=lambda: 1.0,
    )


def test_a_request_is_what_the_interface_wants(server):
    judge = client(server)
    prompt = JudgePrompt("1", "hello", system="be brief")
    assert judge.ask([prompt]) == [Verdict("1", "re: hello")]
    assert server.bodies == [
        {
            "model": "judge-1",
            "temperature": 0,
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hello"},
            ],
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert judge.name == "judge-1(temperature=0)"


def test_without_a_key_none_is_sent(server):
    client(server, key=None).ask(prompts(1))
    assert "Authorization" not in server.headers[0]


def test_verdicts_come_in_the_order_of_the_prompts_whoever_is_first(server):
    def uneven(handler, body):
        time.sleep(0.05 if body["messages"][-1]["content"].endswith(("0", "3")) else 0)
        echo(handler, body)

    server.behaviours = [uneven]
    asked = prompts(8)
    verdicts = client(server, concurrency=3).ask(asked)
    assert [v.id for v in verdicts] == [p.id for p in asked]
    assert [v.reply for v in verdicts] == [f"re: {p.text}" for p in asked]
    assert server.most_under_way <= 3


PASSING = {
    "500": (status(500), "HTTP 500"),
    "503 with words": (status(503, {"error": {"message": "busy\nnow"}}), "HTTP 503 (busy now)"),
    "429": (status(429), "HTTP 429"),
    "broken JSON": (raw(b'{"choices": [{'), "an answer that is no JSON"),
    "no UTF-8": (raw(b"\xff\xfe"), "an answer that is no JSON"),
    "bottomless JSON": (raw(b"[" * 100_000), "an answer that is no JSON"),
    "empty body": (raw(b""), "an answer that is no JSON"),
    "a list": (raw(b"[1, 2]"), "an answer that is no chat completion"),
    "null": (raw(b"null"), "an answer that is no chat completion"),
    "no choices": (raw(b'{"choices": []}'), "an answer that is no chat completion"),
    "choices of a wrong type": (raw(b'{"choices": "x"}'), "an answer that is no chat completion"),
    "a message of a wrong type": (
        raw(b'{"choices": [{"message": "x"}]}'),
        "an answer that is no chat completion",
    ),
    "content of a wrong type": (replies(17), "an answer whose content is no text"),
    "content null": (replies(None), "an answer whose content is no text"),
    "empty reply": (replies("  \n"), "an empty reply"),
    "half a body": (half_body, "no connection, or a lost one (RemoteProtocolError)"),
    "hung up": (hang_up, "no connection, or a lost one (RemoteProtocolError)"),
}


@pytest.mark.parametrize(("behaviour", "reason"), PASSING.values(), ids=PASSING.keys())
def test_passing_trouble_is_tried_again_and_if_it_stays_counted(server, behaviour, reason):
    server.behaviours = [behaviour, behaviour, echo]
    clock = Clock()
    assert client(server, clock).ask(prompts(1)) == [Verdict("p0", "re: question 0")]
    assert clock.sleeps == [1, 2]
    server.behaviours, server.bodies = [behaviour], []
    verdicts = client(server).ask(prompts(1))
    assert verdicts == [Verdict.failed("p0", reason)]
    assert len(server.bodies) == 1 + 3
    assert count_failures(verdicts) == {reason: 1}


@pytest.mark.parametrize("behaviour", [stall, drip])
def test_a_server_that_takes_for_ever_is_left(server, behaviour):
    server.behaviours = [behaviour, echo]
    patience = Patience(timeout=0.3, retries=0, concurrency=1)
    judge = ChatJudge("judge-1", server.url, patience=patience)
    assert judge.ask(prompts(1)) == [Verdict.failed("p0", "no answer within 0.3 s")]
    assert server.drips < DRIPS  # the client left before the end
    assert judge.ask(prompts(1))[0].reply == "re: question 0"


def test_an_endless_answer_is_left(server, monkeypatch):
    monkeypatch.setattr("mmlm.chat_server.client.LARGEST_BODY", 1000)
    server.behaviours = [replies("x" * 2000), echo]
    assert client(server).ask(prompts(1))[0].reply == "re: question 0"
    assert client(server, retries=0).ask(prompts(1))[0].status == "ok"


def test_waits_double_up_to_the_longest(server):
    server.behaviours = [status(500)]
    clock = Clock()
    client(server, clock, retries=5, first_wait=2, longest_wait=10).ask(prompts(1))
    assert clock.sleeps == [2, 4, 8, 10, 10]


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_jitter_shortens_a_wait_by_at_most_half(server, jitter):
    server.behaviours = [status(500), echo]
    clock = Clock()
    judge = ChatJudge("m", server.url, sleep=clock.sleep, now=clock.now, jitter=lambda: jitter)
    judge.ask(prompts(1))
    assert clock.sleeps == [0.5 + jitter / 2]


def test_retry_after_in_seconds_holds_everybody(server):
    server.behaviours = [status(429, Retry_After="7"), echo]
    clock = Clock()
    verdicts = client(server, clock).ask(prompts(2))
    assert [v.status for v in verdicts] == ["ok", "ok"]
    assert clock.sleeps == [7]


def test_retry_after_as_a_date(server):
    server.behaviours = [status(503, Retry_After=formatdate(time.time() + 30, usegmt=True)), echo]
    clock = Clock()
    client(server, clock).ask(prompts(1))
    assert len(clock.sleeps) == 1
    assert 20 < clock.sleeps[0] <= 30


@pytest.mark.parametrize("value", ["soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_says_nothing_does_no_harm(server, value):
    server.behaviours = [status(429, Retry_After=value), echo]
    assert client(server).ask(prompts(1))[0].status == "ok"


def test_nobody_waits_an_hour(server):
    server.behaviours = [status(429, Retry_After="3600"), echo]
    clock = Clock()
    verdicts = client(server, clock).ask(prompts(2))
    assert verdicts[0].reason == "HTTP 429; it asks to wait 3600 s"
    assert verdicts[1].status == "ok"
    assert clock.sleeps == []


def test_the_rate_limit_counts_every_request(server):
    server.behaviours = [echo, status(500), echo]
    clock = Clock()
    client(server, clock, per_minute=10, first_wait=1).ask(prompts(3))
    assert len(server.bodies) == 4
    assert clock.time == pytest.approx(3 * 6)


REFUSED = {
    "too long": (
        status(400, {"error": {"message": "context length", "code": None}}),
        "HTTP 400 (context length)",
    ),
    "redirect": (status(302, Location="http://127.0.0.1:1/"), "HTTP 302"),
    "cut off": (replies("[", finish="length"), "the reply was cut off at the token limit"),
    "filtered": (replies("", finish="content_filter"), "the judge refused to reply"),
    "refusal": (replies(None, refusal="I cannot"), "the judge refused to reply"),
}


@pytest.mark.parametrize(("behaviour", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_prompt_is_not_tried_again_and_costs_only_itself(server, behaviour, reason):
    server.behaviours = [echo, behaviour, echo]
    verdicts = client(server).ask(prompts(3))
    assert [v.status for v in verdicts] == ["ok", "failed", "ok"]
    assert verdicts[1].reason == reason
    assert len(server.bodies) == 3


HOPELESS = {
    "wrong key": (
        status(401, {"error": {"message": f"Incorrect key {KEY}"}}),
        r"HTTP 401 \(Incorrect key \*\*\*\)",
        "Check the key",
    ),
    "forbidden": (status(403), "HTTP 403", "may not use this model"),
    "no such model": (status(404, b"<html>"), "HTTP 404", "Check the address"),
    "no credit": (
        status(429, {"error": {"message": "pay", "code": "insufficient_quota"}}),
        r"HTTP 429 \(pay\)",
        "no credit",
    ),
}


@pytest.mark.parametrize(("behaviour", "text", "advice"), HOPELESS.values(), ids=HOPELESS.keys())
def test_what_no_prompt_can_survive_fails_at_once_with_advice(server, behaviour, text, advice):
    server.behaviours = [behaviour]
    with pytest.raises(InputError, match=text) as caught:
        client(server).ask(prompts(20))
    assert advice in caught.value.advice
    assert KEY not in str(caught.value)
    assert len(server.bodies) == 1


def test_a_key_that_dies_on_the_way_loses_no_reply(server):
    server.behaviours = [echo, echo, status(401)]
    verdicts = client(server).ask(prompts(5))
    assert [v.reply is not None for v in verdicts] == [True, True, False, False, False]
    assert count_failures(verdicts) == {"not asked: HTTP 401": 2, "HTTP 401": 1}


def test_a_dead_server_is_given_up(server):
    server.behaviours = [echo, status(500)]
    verdicts = client(server, retries=1, give_up_after=3).ask(prompts(50))
    assert len(server.bodies) == 1 + 3 * 2
    assert count_failures(verdicts) == {
        "not asked: 3 requests in a row got no reply": 46,
        "HTTP 500": 3,
    }


def test_single_failures_do_not_give_the_server_up(server):
    server.behaviours = [status(400), echo] * 6
    verdicts = client(server, give_up_after=2).ask(prompts(12))
    assert [v.status for v in verdicts] == ["failed", "ok"] * 6


def test_no_server_at_all(server):
    nobody = SimpleNamespace(url="http://127.0.0.1:9/v1")  # the discard port
    verdicts = client(nobody, retries=1).ask(prompts(7))
    assert {v.status for v in verdicts} == {"failed"}
    assert verdicts[0].reason == "no connection, or a lost one (ConnectError)"


def test_whoever_stops_listening_stops_the_asking(server):
    steps = client(server).verdicts(prompts(200))
    next(steps)
    steps.close()
    assert len(server.bodies) < 200


def test_half_surrogates_are_neither_sent_nor_kept(server, tmp_path):
    server.behaviours = [raw(json.dumps(completion("bad \ud800 end")).encode())]
    judge = CachedJudge(client(server), tmp_path)
    assert judge.ask([JudgePrompt("1", "odd \udcff")])[0].reply == "bad ? end"
    assert server.bodies[0]["messages"][0]["content"] == "odd ?"


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://h:x/v1"])
def test_addresses_that_cannot_be_are_refused(url):
    with pytest.raises(InputError, match="no address"):
        ChatJudge("m", url)


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel"])
def test_keys_that_cannot_be_are_refused_without_showing_them(key):
    with pytest.raises(InputError) as caught:
        ChatJudge("m", key=key)
    assert key not in str(caught.value) + caught.value.advice


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": float("nan")},
        {"retries": -1},
        {"concurrency": 0},
        {"per_minute": 0},
        {"longest_wait": float("inf")},
    ],
)
def test_impossible_patience_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Patience(**wrong)


# --- the cache ----------------------------------------------------------------------------------


class Counting(ScriptedJudge):
    """Knows what it was asked."""

    def __init__(self, reply=lambda prompt: f"re: {prompt.text}", model="scripted"):
        super().__init__(reply, model)
        self.asked = []

    def verdicts(self, prompts):
        self.asked += [prompt.id for prompt in prompts]
        yield from super().verdicts(prompts)


def test_replies_are_paid_for_once(tmp_path):
    first, again = Counting(), Counting()
    assert CachedJudge(first, tmp_path).ask(prompts(2)) == [
        Verdict("p0", "re: question 0"),
        Verdict("p1", "re: question 1"),
    ]
    verdicts = CachedJudge(again, tmp_path).ask(prompts(3))
    assert again.asked == ["p2"]
    assert [v.cached for v in verdicts] == [True, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"judge": {"model": "other"}},
        {"judge": {"parameters": {"temperature": 1}}},
        {"prompt": {"text": "other"}},
        {"prompt": {"system": "other"}},
        {"prompt": {"attempt": 1}},
    ],
)
def test_whatever_determines_a_reply_is_in_its_key(tmp_path, change):
    judge = Counting()
    CachedJudge(judge, tmp_path).ask([JudgePrompt("1", "text")])
    for name, value in change.get("judge", {}).items():
        setattr(judge, name, value)
    prompt = JudgePrompt("1", **{"text": "text", **change.get("prompt", {})})
    assert not CachedJudge(judge, tmp_path).ask([prompt])[0].cached


def test_model_and_parameters_are_in_the_key_and_ids_are_not():
    judge = ScriptedJudge({})
    keys = {prompt_key(judge, JudgePrompt(name, "text")) for name in ("a", "b")}
    assert len(keys) == 1
    for name, value in (("model", "other"), ("parameters", {"temperature": 1})):
        setattr(judge, name, value)
        keys.add(prompt_key(judge, JudgePrompt("a", "text")))
    assert len(keys) == 3


def test_equal_prompts_are_asked_once(tmp_path):
    judge = Counting()
    same = [JudgePrompt("a", "yes"), JudgePrompt("b", "yes"), JudgePrompt("c", "no")]
    verdicts = CachedJudge(judge, tmp_path).ask(same)
    assert [v.reply for v in verdicts] == ["re: yes", "re: yes", "re: no"]
    assert judge.asked == ["a", "c"]


def test_failures_are_not_kept(tmp_path):
    silent = Counting(lambda prompt: None)
    assert CachedJudge(silent, tmp_path).ask(prompts(1))[0].status == "failed"
    assert CachedJudge(Counting(), tmp_path).ask(prompts(1))[0].status == "ok"


def test_offline_asks_nobody(tmp_path):
    with pytest.raises(InputError, match="no stored replies"):
        CachedJudge(Counting(), tmp_path / "none", offline=True).ask(prompts(1))
    assert not (tmp_path / "none").exists()
    CachedJudge(Counting(), tmp_path).ask(prompts(1))
    judge = Counting()
    verdicts = CachedJudge(judge, tmp_path, offline=True).ask(prompts(2))
    assert judge.asked == []
    assert [(v.status, v.reason) for v in verdicts] == [("ok", ""), ("failed", "no stored reply")]


def test_a_judge_that_breaks_in_the_middle_loses_nothing(tmp_path):
    def breaks(prompt):
        if prompt.id == "p3":
            raise RuntimeError("bug")
        return "paid"

    with pytest.raises(RuntimeError, match="bug"):
        CachedJudge(Counting(breaks), tmp_path).ask(prompts(5))
    judge = Counting()
    verdicts = CachedJudge(judge, tmp_path).ask(prompts(5))
    assert [v.reply for v in verdicts[:3]] == ["paid"] * 3
    assert judge.asked == ["p3", "p4"]


def test_a_half_last_line_is_dropped(tmp_path):
    cached = CachedJudge(Counting(), tmp_path)
    cached.ask(prompts(3))
    cached.path.write_bytes(cached.path.read_bytes()[:-20])
    judge = Counting()
    CachedJudge(judge, tmp_path).ask(prompts(3))
    assert judge.asked == ["p2"]
    assert len(cached.path.read_text().splitlines()) == 3


def test_a_damaged_file_is_refused_with_the_line(tmp_path):
    cached = CachedJudge(Counting(), tmp_path)
    cached.ask(prompts(2))
    good = cached.path.read_text()
    cached.path.write_text("{broken\n" + good)
    with pytest.raises(InputError, match="line 1 is no JSON"):
        cached.ask(prompts(2))
    cached.path.write_text(good.replace('"re: question 0"', "17"))
    with pytest.raises(InputError, match="is 17, not a text"):
        cached.ask(prompts(2))


def test_two_processes_do_not_write_one_file(tmp_path):
    inner = CachedJudge(Counting(), tmp_path)

    def meanwhile(prompt):
        return inner.ask(prompts(9))[0].reply

    with pytest.raises(InputError, match="Another process"):
        CachedJudge(Counting(meanwhile), tmp_path).ask(prompts(1))


def test_kill_nine_loses_nothing_that_was_paid_for(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.judges.cache import CachedJudge
from benchmarks.judges import JudgePrompt, ScriptedJudge
judge = CachedJudge(ScriptedJudge(lambda prompt: "paid " + prompt.id), Path({str(tmp_path)!r}))
for verdict in judge.verdicts([JudgePrompt(f"p{{n}}", f"question {{n}}") for n in range(50)]):
    print(verdict.id, flush=True)
    time.sleep(0.02)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    seen = [child.stdout.readline().strip() for _ in range(4)]
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    judge = Counting()
    verdicts = CachedJudge(judge, tmp_path).ask(prompts(50))
    assert not set(seen) & set(judge.asked)
    assert [v.reply for v in verdicts[:4]] == [f"paid {name}" for name in seen]
    assert {v.status for v in verdicts} == {"ok"}


def test_the_key_is_nowhere_on_the_disk(server, tmp_path):
    CachedJudge(client(server), tmp_path).ask(prompts(1))
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
    assert KEY not in repr(client(server))


def test_replies_of_an_earlier_run_survive_a_dead_key(server, tmp_path):
    CachedJudge(client(server), tmp_path).ask(prompts(2))
    server.behaviours = [status(401)]
    judge = CachedJudge(client(server), tmp_path)
    with pytest.raises(InputError, match="401"):
        judge.ask(prompts(3))
    assert [v.reply for v in judge.ask(prompts(2))] == ["re: question 0", "re: question 1"]


# --- names, scripts, doubles --------------------------------------------------------------------


def test_names():
    assert judge_name("gpt", {}) == "gpt"
    assert judge_name("gpt", {"b": 0.2, "a": "x"}) == "gpt(a=x,b=0.2)"


def test_double_ids_are_refused():
    with pytest.raises(ValueError, match="'a'"):
        ScriptedJudge({"a": "x"}).ask([JudgePrompt("a", "1"), JudgePrompt("a", "2")])
    assert ScriptedJudge({}).ask([]) == []


def test_a_judge_that_says_nothing_is_counted():
    class Silent(ScriptedJudge):
        def verdicts(self, prompts):
            return iter(())

    verdicts = Silent({}).ask(prompts(2))
    assert count_failures(verdicts) == {"no verdict": 2}


def test_a_watched_judge_is_the_same_judge(capsys):
    from mmlm.cli.judging import _show

    seen = []

    def watch(verdicts, total):
        for verdict in verdicts:
            seen.append((verdict.id, total))
            yield verdict

    judge = Counting()
    watched = WatchedJudge(judge, watch)
    assert watched.name == judge.name
    assert watched.ask(prompts(2)) == judge.ask(prompts(2))
    assert seen == [("p0", 2), ("p1", 2)]
    assert WatchedJudge(judge, _show("scripted")).ask(prompts(2)) == judge.ask(prompts(2))
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "asking scripted" in streams.err


def test_scripts(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"id": 1, "reply": "good"}\n{"id": "2", "reply": "bad"}\n')
    verdicts = ScriptedJudge(read_script(path)).ask([JudgePrompt(n, "?") for n in "123"])
    assert [v.reply for v in verdicts] == ["good", "bad", None]
    assert verdicts[2].reason == "no reply in the script"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "1"}', "'reply'"),
        ('{"id": "1", "reply": NaN}', "'reply'"),
        ('{"reply": "x"}', "'id'"),
        ('{"id": "0", "reply": "x"}', "occurs twice"),
        ("[]", "JSON object"),
    ],
)
def test_wrong_scripts_are_refused(tmp_path, line, reason):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"id": "0", "reply": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=reason):
        read_script(path)


# --- a model on this machine --------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny random language model, whose own configuration asks for sampling."""
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _, processor = tiny.build("llava")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    folder = tmp_path_factory.mktemp("judge") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def local(folder, **options):
    from benchmarks.judges.local import LocalJudge

    return LocalJudge(str(folder), **{"max_tokens": 8, "device": "cpu", **options})


def test_a_local_judge_is_greedy_whatever_its_checkpoint_says(language_model, monkeypatch):
    judge = local(language_model)
    model, tokenizer = judge._load()
    # Every random model rambles until the limit; a full stop of its own ends the reply.
    asked = [JudgePrompt("a", "what is this ?"), JudgePrompt("b", "a dog")]
    assert {v.reason for v in judge.ask(asked)} == {"the reply was cut off at the token limit"}
    inputs = judge._inputs(tokenizer, asked[0])
    tokens = model.generate(**inputs, do_sample=False, temperature=1.0, max_new_tokens=8)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = [3, int(new[4])]
    first = list(new).index(new[4])
    wanted = tokenizer.decode(new[: first + 1], skip_special_tokens=True).strip()
    assert judge.ask(asked)[0] == Verdict("a", wanted)
    assert judge.ask(asked) == judge.ask(asked)


def test_a_prompt_that_does_not_fit_fails_alone(language_model):
    judge = local(language_model)
    verdicts = judge.ask([JudgePrompt("long", "dog " * 100), JudgePrompt("short", "dog")])
    assert verdicts[0].reason == "the prompt is too long for the judge"
    assert verdicts[1].reason != verdicts[0].reason


def test_local_judges_that_cannot_judge_are_refused(language_model, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded"):
        local(tmp_path).ask(prompts(1))
    judge = local(language_model)
    judge._load()[1].chat_template = None
    with pytest.raises(InputError, match="chat template"):
        judge.ask(prompts(1))
    with pytest.raises(ValueError, match="max_tokens"):
        local(language_model, max_tokens=0)


def test_a_local_judge_with_stored_replies_loads_nothing(tmp_path):
    judge = local(tmp_path / "no-such-model")
    known = ScriptedJudge(lambda prompt: "known", judge.model)
    known.parameters = judge.parameters
    CachedJudge(known, tmp_path).ask(prompts(2))
    assert [v.reply for v in CachedJudge(judge, tmp_path).ask(prompts(2))] == ["known"] * 2
