"""Conversations: what the model is given, what is saved, and what is refused when read."""

import json

import pytest
from tiny import picture, shared

from mmlm.errors import ImageReadError, InputError
from mmlm.inputs import message, prepare
from mmlm.show import saved
from mmlm.show.conversation import Conversation, Picture, Turn
from mmlm.show.truth import Known

KNOWN = Known(frozenset({"cat", "dog"}), "by hand")


@pytest.fixture
def photo(tmp_path):
    """A picture on disk, below the folder that conversations are saved in."""
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a.png"
    picture(0).save(path)
    return path


def drawn(number=1, known=None):
    return Picture(f"drawn {number}", picture(number), known=known)


class TestTurns:
    def test_pictures_go_with_the_next_question(self):
        one, two = drawn(1), drawn(2)
        asked = Conversation().with_pictures(one).with_question("what ?")
        assert asked.is_open
        assert asked.turns == (Turn("what ?", (one,)),)
        assert asked.pending == ()
        later = (
            asked.with_answer("this .", ["VHR()"], "m").with_pictures(two).with_question("and ?")
        )
        assert later.messages() == [
            message("user", "what ?", 1),
            message("assistant", "this ."),
            message("user", "and ?", 1),
        ]
        assert later.pictures() == [one.image, two.image]
        assert later.turns[0] == Turn("what ?", (one,), "this .", ("VHR()",), "m")

    def test_nothing_changes_in_place(self):
        first = Conversation().with_pictures(drawn())
        first.with_turn("what ?", "this .")
        assert first == Conversation(pending=(drawn(),))

    def test_an_unanswered_question_is_replaced_and_its_pictures_stay(self):
        asked = Conversation().with_pictures(drawn(1)).with_question("what ?")
        again = asked.with_pictures(drawn(2)).with_question("where ?")
        assert again.turns == (Turn("where ?", (drawn(1), drawn(2))),)

    def test_asking_again(self):
        done = Conversation().with_turn("a", "1").with_turn("b", "2", ["VCD()"])
        assert done.without_answer().turns == (Turn("a", (), "1"), Turn("b"))
        with pytest.raises(InputError, match="no question yet"):
            Conversation().without_answer()
        with pytest.raises(InputError, match="no question yet"):
            Conversation().with_answer("x")

    def test_restarting_keeps_every_picture(self):
        done = Conversation().with_pictures(drawn(1)).with_turn("a", "1").with_pictures(drawn(2))
        assert done.restarted() == Conversation(pending=(drawn(1), drawn(2)))

    def test_inputs_are_those_of_the_messages(self):
        model, processor = shared("llava")
        talk = Conversation().with_pictures(drawn()).with_turn("what ?", "this .")
        asked = talk.with_question("and ?")
        expected = prepare(processor, [asked.messages()], [[picture(1)]])
        given = asked.inputs(model, processor)
        assert given.keys() == expected.keys()
        assert all((given[name] == expected[name]).all() for name in given)
        with pytest.raises(InputError, match="waits for an answer"):
            talk.inputs(model, processor)


class TestKnown:
    def told(self, *known):
        talk = Conversation().with_pictures(*(drawn(1, one) for one in known))
        assert talk.known is None  # not shown yet
        return talk.with_question("what ?").known

    def test_all_pictures_together(self):
        car = Known(frozenset({"car"}), "a file")
        together = self.told(KNOWN, car)
        assert together == Known(frozenset({"cat", "dog", "car"}), "by hand, a file")

    def test_nothing_known(self):
        assert self.told(None) is None
        assert self.told() is None

    def test_absent_is_what_is_absent_in_all(self):
        # A detector saw a car and no cup and was asked about nothing else; the other picture is
        # known completely: cars are there, cups are absent, cats are there, bananas are open.
        partly = Known(frozenset({"car"}), "a detector", frozenset({"car", "cup"}))
        together = self.told(KNOWN, partly)
        assert together.objects == {"cat", "dog", "car"}
        assert together.asked == {"cat", "dog", "car", "cup"}

    def test_beside_an_unknown_picture_nothing_is_absent(self):
        together = self.told(KNOWN, None)
        assert together.objects == together.asked == {"cat", "dog"}


class TestFile:
    def test_there_and_back(self, tmp_path, photo):
        talk = Conversation().with_pictures(Picture.read(photo, KNOWN), drawn(1))
        talk = talk.with_turn("what ?", "a “cat” .", ["VHR(alpha=2.0)"], "embedded")
        talk = talk.with_question("and ?").with_pictures(drawn(2))
        talk.save(tmp_path / "talk.json")
        assert Conversation.load(tmp_path / "talk.json") == talk

    def test_files_are_named_from_the_folder_so_that_it_may_move(self, tmp_path, photo):
        home = tmp_path / "home"
        home.mkdir()
        (tmp_path / "pictures").rename(home / "pictures")
        talk = Conversation().with_pictures(Picture.read(home / "pictures" / "a.png"))
        talk.save(home / "talk.json")
        stored = json.loads((home / "talk.json").read_text())["pending"][0]
        assert stored["path"] == "pictures/a.png"
        moved = home.rename(tmp_path / "moved")
        loaded = Conversation.load(moved / "talk.json").pending[0]
        assert loaded.image == picture(0)
        assert loaded.path == moved / "pictures" / "a.png"

    def test_files_elsewhere_are_named_by_their_whole_path(self, tmp_path, photo):
        (tmp_path / "other").mkdir()
        Conversation().with_pictures(Picture.read(photo)).save(tmp_path / "other" / "talk.json")
        stored = json.loads((tmp_path / "other" / "talk.json").read_text())["pending"][0]
        assert stored["path"] == str(photo.resolve())

    def test_embedded_pictures_need_no_file(self, tmp_path, photo):
        talk = Conversation().with_pictures(Picture.read(photo))
        talk.save(tmp_path / "talk.json", embed=True)
        photo.unlink()
        loaded = Conversation.load(tmp_path / "talk.json").pending[0]
        assert (loaded.image, loaded.path) == (picture(0), None)

    def test_a_changed_or_missing_picture_is_told(self, tmp_path, photo):
        path = tmp_path / "talk.json"
        Conversation().with_pictures(Picture.read(photo)).save(path)
        picture(3).save(photo)
        with pytest.raises(InputError, match="content has changed"):
            Conversation.load(path)
        photo.unlink()
        with pytest.raises(ImageReadError, match="no such file"):
            Conversation.load(path)

    def test_saving_replaces_conversations_only(self, tmp_path):
        path = tmp_path / "talk.json"
        Conversation().save(path)
        Conversation().with_turn("a", "1").save(path)
        assert Conversation.load(path).turns[0].answer == "1"
        path.write_text('{"mine": 1}')
        with pytest.raises(InputError, match="holds no conversation"):
            Conversation().save(path)
        assert path.read_text() == '{"mine": 1}'
        with pytest.raises(InputError, match="no folder"):
            Conversation().save(tmp_path / "none" / "talk.json")


def stored(**changes):
    """A good file's values with some replaced."""
    turn = {"question": "a", "pictures": [], "answer": "1", "methods": [], "model": ""}
    return {"format": saved.FORMAT, "turns": [turn], "pending": []} | changes


def turn(**changes):
    return stored(turns=[{**stored()["turns"][0], **changes}])


def shown(**changes):
    [value] = saved.as_json(Conversation().with_pictures(drawn(1, KNOWN)))["pending"]
    return stored(pending=[{**value, **changes}])


class TestRefusals:
    def test_the_good_ones_are_read(self):
        assert saved.from_json(stored(), None).turns == (Turn("a", (), "1"),)
        assert saved.from_json(shown(), None).pending == (drawn(1, KNOWN),)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ([], "the file must be an object"),
            ({}, "the file lacks 'format', lacks 'pending', lacks 'turns'"),
            (stored(more=1), "the file has the unknown key 'more'"),
            (stored(format="mmlm-conversation/2"), 'format must be .* not "mmlm-conversation/2"'),
            (stored(turns={}), "turns must be a list"),
            (turn(question=3), r"turns\[0\].question must be text, not 3"),
            (turn(question=" "), r"turns\[0\].question must be a question"),
            (turn(methods=["a", 1]), r"turns\[0\].methods\[1\] must be text"),
            (turn(answer=None), r"turns\[0\].answer must be text, not null"),
            (stored(turns=turn(answer="")["turns"] * 2), r"turns\[0\].answer must be an answer"),
            (shown(data="x"), r"pending\[0\].data must be a PNG"),
            (shown(data="data:image/png;base64,?"), r"pending\[0\].data must be a PNG"),
            (shown(extra=1), r"pending\[0\] has the unknown key 'extra'"),
            (shown(known={"objects": [1]}), r"pending\[0\].known lacks 'asked'"),
            (
                shown(known={"objects": [1], "source": "", "asked": None}),
                r"known.objects\[0\] must be text",
            ),
            (shown(known={"objects": [], "source": "", "asked": 1}), "known.asked must be a list"),
        ],
    )
    def test_broken_values(self, data, said):
        with pytest.raises(InputError, match=said) as error:
            saved.from_json(data, None)
        assert error.value.advice

    def test_a_broken_picture(self):
        with pytest.raises(ImageReadError, match="no picture"):
            saved.from_json(shown(data="data:image/png;base64,AAAA"), None)

    def test_strangers_read_no_files_of_this_machine(self, photo):
        value = saved.as_json(Conversation().with_pictures(Picture.read(photo)))
        with pytest.raises(InputError, match="not read here"):
            saved.from_json(value, None)

    def test_no_file_no_json_too_large(self, tmp_path, monkeypatch):
        with pytest.raises(InputError, match="no file"):
            Conversation.load(tmp_path / "none.json")
        for content in (b"{", b"\xff\xfe", b"[" * 100_000):
            (tmp_path / "bad.json").write_bytes(content)
            with pytest.raises(InputError, match="no JSON"):
                Conversation.load(tmp_path / "bad.json")
        monkeypatch.setattr(saved, "LARGEST", 10)
        with pytest.raises(InputError, match="larger than"):
            Conversation.load(tmp_path / "bad.json")


def test_reading_a_picture_remembers_the_file(photo):
    read = Picture.read(photo)
    assert (read.name, read.path, read.image) == (str(photo), photo.resolve(), picture(0))
    assert len(read.digest) == 64
