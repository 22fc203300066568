"""`mmlm inspect` from end to end: the page, the numbers, the figures; what is refused, and when."""

from __future__ import annotations

import html.parser
import json

import pytest
import tiny
import torch
from PIL import Image

import mmlm
from mmlm.cli import main
from mmlm.cli.pictures import WORLD_PROMPT
from mmlm.probes.attention_sinks import agreement
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show.inspection import _together

SHORT = ("--generate.max_new_tokens", "40", "--quiet")


@pytest.fixture
def inspect(tmp_path, capsys):
    """Runs the command into ``tmp_path/out``; returns exit code, standard output and error."""

    def run(*argv, output=tmp_path / "out"):
        capsys.readouterr()
        code = main(["inspect", *map(str, argv), *SHORT, "--output", str(output)])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An inspection of scene 3 with VHR, in full."""
    folder = tmp_path_factory.mktemp("inspection") / "out"
    arguments = ["inspect", "--scene", "3", "--method", "VHR(alpha=2.0)", *SHORT]
    assert main([*arguments, "--output", str(folder)]) == 0
    return folder, json.loads((folder / "inspect.json").read_text())


class Page(html.parser.HTMLParser):
    """Links, targets, pictures and text of a page; an unclosed tag is an error."""

    void = frozenset({"meta", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.links, self.targets, self.images, self.open, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found["href"]] if tag == "a" else []
        self.targets += [found["id"]] if "id" in found else []
        self.images += [found["src"]] if tag == "img" else []
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_answers_are_those_of_a_run_without_probes(made):
    _, numbers = made
    model, processor = mmlm.load("embedded")
    from mmlm.show.truth import draw_scene

    request = Request("1", (draw_scene(index=3).image,), WORLD_PROMPT)
    for arm, methods in zip(numbers["arms"], ((), (mmlm.VHR(alpha=2.0),)), strict=True):
        settings = GenerateSettings(max_new_tokens=40)
        (result,) = generate_all(model, processor, [request], methods, settings)
        assert arm["text"] == result.text
        assert arm["n_tokens"] == result.n_tokens
    assert numbers["arms"][0]["text"] != numbers["arms"][1]["text"]
    assert [arm["name"] for arm in numbers["arms"]] == ["plain model", "VHR"]


def test_numbers_hold_everything_that_was_measured(made):
    _, numbers = made
    for arm in numbers["arms"]:
        look = arm["look"]
        assert look["text"] == arm["text"]
        assert len(look["maps"][0]) == arm["n_tokens"]
        assert len(look["maps"][0][0]) == len(look["maps"][0][0][0]) == 10
        assert len(look["layers"]) == 8
        assert set(arm["mdi"]) == {str(layer) for layer in range(8)}
        assert all(value > 0 for value in arm["mdi"].values())
        assert len(arm["records"]["head_divergence"]["relative"]) == 8
    # More weight on image-sensitive heads, more attention on the picture behind them.
    before, after = (arm["look"]["shares"] for arm in numbers["arms"])
    assert sum(x[0] for x in after) / len(after) > sum(x[0] for x in before) / len(before)
    assert "calibrate sink-dims" in numbers["left_out"]["VisualSinks"]


def test_the_page_is_one_file_whose_words_lead_to_their_maps(made):
    folder, _ = made
    text = (folder / "index.html").read_text()
    page = Page(text)
    assert "<script" not in text
    assert all(source.startswith("data:image/") for source in page.images)
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.targets for link in page.links)
    assert len(set(page.targets)) == len(page.targets)
    assert 'mark class="bad">dog' in text
    assert 'mark class="good">boats' in text
    assert "not said" in page.text  # VHR names no dog
    assert "Not measured" in page.text


def test_figures_are_pictures_and_the_same_every_time(made, tmp_path):
    folder, _ = made
    for name in ("words", "layers", "heads"):
        with Image.open(folder / f"{name}.png") as drawn:
            assert drawn.format == "PNG"
            assert min(drawn.size) > 200
    assert not (folder / "sinks.png").exists()
    arguments = ["inspect", "--scene", "3", "--method", "VHR(alpha=2.0)", *SHORT]
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    for name in ("words", "layers", "heads"):
        one, other = (folder / f"{name}.png", tmp_path / "again" / f"{name}.png")
        assert one.read_bytes() == other.read_bytes()


def test_chosen_probes_and_words_svg_and_json(inspect, tmp_path):
    code, out, _ = inspect(
        "--scene", 3, "--probe", "AttentionMap(layers=(5,6))", "--word", "beach scene",
        "--probe", "VisualSinks(sink_dims=(71,151),tau=6.0)", "--figures", "svg", "--json",
    )  # fmt: skip
    assert code == 0
    numbers = json.loads(out)
    (arm,) = numbers["arms"]
    assert arm["look"]["layers"] == [5, 6]
    assert arm["mdi"] == {}
    assert set(arm["records"]) == {"visual_sinks"}
    names = {path.rpartition("/")[2] for path in numbers["files"]}
    assert names == {"index.html", "inspect.json", "words.svg", "layers.svg", "sinks.svg"}
    assert (tmp_path / "out" / "words.svg").read_text().count("beach scene") == 1
    text = (tmp_path / "out" / "index.html").read_text()
    assert "beach scene</mark>" in text
    assert "Head by head" not in text


def test_probes_that_need_no_map_do_without(inspect, tmp_path):
    code, out, _ = inspect("--scene", 3, "--probe", "HeadDivergence()")
    assert code == 0
    assert "two boats" in out
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Where it looked" not in text
    assert "Head by head" in text
    assert not (tmp_path / "out" / "words.png").exists()


def test_a_method_that_searches_leaves_what_depends_on_the_prompt(inspect, tmp_path):
    code, out, err = inspect("--scene", 3, "--method", "OPERA()", "--json")
    assert code == 0
    numbers = json.loads(out)
    assert set(numbers["arms"][1]["records"]) == {"head_divergence"}
    assert set(numbers["left_out"]) == {"AttentionMap", "TextDominance", "VisualSinks"}
    assert err == ""


def test_several_pictures_of_a_folder_model(inspect, tiny_folder, tmp_path):
    for number in range(2):
        tiny.picture(number, (64, 48)).save(tmp_path / f"{number}.png")
    code, out, _ = inspect(
        tmp_path / "0.png", tmp_path / "1.png", "--model", tiny_folder, "--prompt", "a <b> & c",
        "--generate.max_new_tokens", 4, "--json",
    )  # fmt: skip
    assert code == 0
    (arm,) = json.loads(out)["arms"]
    assert len(arm["look"]["maps"]) == 2
    text = (tmp_path / "out" / "index.html").read_text()
    assert "a &lt;b&gt; &amp; c" in text
    assert "picture 2" in Page(text).text


def test_truth_beside_a_picture_is_found(inspect, tmp_path):
    assert main(["data", "world", "--count", "2", "--output", str(tmp_path / "w"), "--quiet"]) == 0
    picture = next((tmp_path / "w").rglob("*.png"))
    code, _, _ = inspect(picture)
    assert code == 0
    assert 'mark class="good"' in (tmp_path / "out" / "index.html").read_text()


def test_a_second_run_replaces_the_first(inspect):
    assert inspect("--scene", 1, "--probe", "AttentionMap()")[0] == 0
    assert inspect("--scene", 2, "--probe", "AttentionMap()")[0] == 0


# ---- refused ----


@pytest.mark.parametrize(
    ("arguments", "message", "advice"),
    [
        ((), "no picture", "--scene"),
        (("no.png", "--scene", 3), "both pictures and a scene", "--scene"),
        (("no.png",), "no.png", ""),
        (("--scene", -1), "index is -1", "0 or more"),
        (("--scene", 3, "--probe", "VHR()"), "is no probe", "AttentionMap"),
        (("--scene", 3, "--probe", "AttentionMaps()"), "AttentionMaps", ""),
        (("--scene", 3, "--method", "VHR(beta=2)"), "beta", ""),
        (("--scene", 3, "--probe", "VisualSinks()"), "no sink dimensions", ""),
        (("--scene", 3, "--truth", "no.json"), "no.json", "--truth"),
        (("--scene", 3, "--word", "unicorn"), "unicorn", "The answers are"),
        (("--scene", 3, "--generate.num_beams", 3), "beam search", "num_beams 1"),
        (
            ("--scene", 3, "--method", "OPERA()", "--probe", "AttentionMap()"),
            "takes tokens back",
            "",
        ),
    ],
)
def test_impossible_requests(inspect, tmp_path, arguments, message, advice):
    code, out, err = inspect(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "advice: " in err
    assert advice in err.partition("advice: ")[2]
    assert not (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize("name", ["index.html", "words.png", "inspect.json"])
def test_what_others_wrote_is_left_alone(inspect, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, _, err = inspect("--scene", 3)
    assert code == 2
    assert "Choose another --output" in err
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_probes_of_heads_have_a_figure_and_their_numbers(inspect, tmp_path):
    probes = ("VisualHeads()", "RetrievalHeads()", "QueryNorms()")
    code, out, _ = inspect("--scene", 3, *(w for p in probes for w in ("--probe", p)), "--json")
    assert code == 0
    numbers = json.loads(out)
    (arm,) = numbers["arms"]
    assert set(arm["records"]) == {"visual_heads", "retrieval_heads", "query_norms"}
    assert len(arm["records"]["visual_heads"]["looks"]) == 8
    assert len(arm["records"]["retrieval_heads"]["peaks"]) == arm["n_tokens"]
    copies = arm["records"]["retrieval_heads"]["copies"]
    assert (len(copies), len(copies[0])) == (8, 6)
    assert 0 <= min(map(min, copies)) < max(map(max, copies)) <= 1
    drawn = {path.rpartition("/")[2] for path in numbers["files"]}
    assert {"looks.png", "copies.png", "norms.png"} <= drawn
    text = (tmp_path / "out" / "index.html").read_text()
    for title in ("that look at the picture", "that copy from the prompt", "by the size of their"):
        assert f"Heads {title}" in text


def test_copies_are_peaks_on_the_token_that_is_written():
    prompt, answer = torch.tensor([7, 8, 9, 8]), (8, 9, 5)
    record = {"layers": [0], "peaks": [[[1, 0]], [[2, 2]], [[4, 3]]]}
    found = _together({"retrieval_heads": record}, prompt, answer)["retrieval_heads"]
    assert found["copies"] == [[pytest.approx(2 / 3), pytest.approx(1 / 3)]]
    assert "copies" not in record


def test_attention_sinks_have_figures_and_their_numbers(inspect, tmp_path):
    probe = "AttentionSinks(eps=0.05, factor=2.0)"
    code, out, _ = inspect("--scene", 3, "--probe", probe, "--json")
    assert code == 0
    numbers = json.loads(out)
    (arm,) = numbers["arms"]
    record = arm["records"]["attention_sinks"]
    assert len(record["map"]) == 8
    assert any(pairs for layer in record["sinks"] for pairs in layer)
    drawn = {path.rpartition("/")[2] for path in numbers["files"]}
    assert {"first.png", "magnets.png"} <= drawn
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Attention on the first token" in text
    assert "Attention sinks in the picture" in text
    assert "layers.png" in drawn  # the first token's share of heads, at three levels
    assert set(record["first_above"]) == {"0.1", "0.2", "0.3"}
    assert "agreement" not in record


def test_sinks_of_both_kinds_are_said_to_agree_or_not(inspect):
    both = ("AttentionSinks(eps=0.05, factor=2.0)", "VisualSinks(sink_dims=(71, 151), tau=6)")
    code, out, _ = inspect("--scene", 3, "--probe", both[0], "--probe", both[1], "--json")
    assert code == 0
    records = json.loads(out)["arms"][0]["records"]
    expected = agreement(records["attention_sinks"], records["visual_sinks"])
    assert records["attention_sinks"]["agreement"] == expected
    assert 0 <= expected <= 1
