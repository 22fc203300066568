"""Other families behind the server: their processors, their templates, their special tokens."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from served import asking, image_part, running
from tiny import build, picture

import mmlm
from mmlm.runner import GenerateSettings, Request, generate_all

ASKED = [("what is this ?", (0,)), ("and these ?", (1, 2)), ("hello", ()), ("what is that ?", (3,))]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "internvl", "gemma3"])
def test_requests_at_once_get_the_answers_of_single_runs(family):
    method = mmlm.VHR(alpha=4.0)
    expected = []
    for question, numbers in ASKED:
        request = Request("x", tuple(map(picture, numbers)), question)
        settings = GenerateSettings(max_new_tokens=6)
        [result] = generate_all(*build(family), [request], [method], settings)
        assert result.error is None
        expected.append(result.text)
    with running(*build(family)) as served, ThreadPoolExecutor(4) as pool:

        def ask(asked):
            question, numbers = asked
            parts = [*map(image_part, numbers), question]
            return served.text(*parts, max_tokens=6, mmlm_methods=[method.text])

        assert list(pool.map(ask, ASKED)) == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "paligemma"])
def test_placeholders_in_texts_are_refused(family):
    model, processor = build(family)
    with running(model, processor) as served:
        body = asking(image_part(0), f"what is {processor.image_token} ?")
        status, error = served.refusal(body)
        assert (status, error["code"]) == (400, "special_token")


def test_what_a_family_cannot_do_is_told():
    with running(*build("paligemma")) as served:
        status, error = served.refusal(asking("hello"))
        assert status == 400
        assert "PaliGemma answers questions about pictures only" in error["message"]
        body = asking(image_part(0), "hello", continue_final_message=True)
        body["messages"].append({"role": "assistant", "content": "this"})
        body["add_generation_prompt"] = False
        status, error = served.refusal(body)
        assert status == 400
        assert "cannot go on" in error["message"]
