"""``mmlm data sentinel`` with a server that samples: the embedded model on loopback."""

import json

import pytest
from chat_fakes import EmbeddedServer
from misbehaving import hang_up, serving

import mmlm
from mmlm.cli import main


@pytest.fixture(scope="module")
def embedded():
    return EmbeddedServer(*mmlm.load("embedded"))


def sentinel(server, output, *more):
    return main(
        [
            *("data", "sentinel", "--output", str(output), "--world.count", "4"),
            *("--generator", "openai", "--server.base_url", server.url),
            *("--server.model", "embedded", "--server.max_tokens", "40", "--server.retries", "0"),
            *("--server.concurrency", "2", "--images_at_once", "2"),
            *(
                "--settings.n",
                "6",
                "--settings.max_sentences",
                "3",
                "--settings.temperature",
                "1.2",
            ),
            *more,
        ]
    )


def lines(output, kind):
    content = (output / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(content)


def test_a_server_that_dies_leaves_a_run_that_goes_on_to_the_same_end(embedded, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with serving(embedded) as server:
        assert sentinel(server, whole) == 0
        asked = len(server.bodies)
    with serving(*[embedded] * (asked * 2 // 3), hang_up) as server:
        capsys.readouterr()
        assert sentinel(server, broken) == 2
        error = capsys.readouterr().err
        assert "does not answer" in error
        assert "goes on where it stopped" in error
        done = [json.loads(line) for line in lines(broken, "done")]
        assert 0 < len(done) < 4
        assert all(line["status"] != "model_error" for line in done)
        server.behaviours = [embedded]
        assert sentinel(server, broken) == 0
    assert len(lines(whole, "done")) == len(lines(broken, "done")) == 4
    for kind in ("pairs", "images"):
        assert lines(whole, kind) == lines(broken, kind)
        assert lines(whole, kind)


def test_a_server_that_is_not_there_is_noticed_before_any_work(embedded, tmp_path, capsys):
    with serving(embedded) as server:
        pass
    assert sentinel(server, tmp_path / "out") == 2
    assert "does not answer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "done.jsonl").exists()
