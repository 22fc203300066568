"""Safe picture loading and the way from conversations to model inputs."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import FAMILIES, build, picture, shared
from tokenizers.processors import TemplateProcessing

from mmlm.errors import ImageReadError, InputError
from mmlm.inputs import (
    SIMPLE_TEMPLATE,
    load_image,
    message,
    prepare,
    render,
    unknown_words,
    use_chat_template,
)
from mmlm.runner import GenerateSettings, generation_config


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def bomb(width=60_000, height=60_000):
    """A PNG of 100 bytes whose header promises 3.6 billion pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def corner(image):
    return image.getpixel((0, 0))


class TestBadPictures:
    def check(self, source, *words):
        with pytest.raises(ImageReadError) as caught:
            load_image(source)
        for word in words:
            assert word in str(caught.value)
        assert caught.value.advice

    def test_missing(self, tmp_path):
        self.check(tmp_path / "none.png", "none.png", "no such file")

    def test_empty(self, tmp_path):
        (tmp_path / "empty.png").touch()
        self.check(tmp_path / "empty.png", "empty.png", "0 bytes")

    def test_truncated(self, tmp_path):
        data = png(picture(size=(64, 64)))
        (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
        self.check(tmp_path / "cut.png", "cut.png", "cut off")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
    def test_cut_anywhere_gives_a_picture_or_this_error(self, kind):
        stream = io.BytesIO()
        picture(size=(24, 24)).save(stream, kind)
        data = stream.getvalue()
        for length in range(0, len(data), max(1, len(data) // 60)):
            try:
                assert load_image(data[:length]).mode == "RGB"
            except ImageReadError:
                continue

    @pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000)])
    def test_decompression_bomb(self, tmp_path, size):
        (tmp_path / "bomb.png").write_bytes(bomb(*size))
        self.check(tmp_path / "bomb.png", "bomb.png", "too large")

    def test_own_limit(self):
        assert load_image(picture(size=(10, 10)), max_pixels=100).size == (10, 10)
        with pytest.raises(ImageReadError, match="10 x 11 pixels; at most 100"):
            load_image(png(picture(size=(10, 11))), max_pixels=100)

    def test_text(self, tmp_path):
        (tmp_path / "text.png").write_text("this is no picture")
        self.check(tmp_path / "text.png", "text.png", "no picture in a known format")

    def test_folder_address_and_null_byte(self, tmp_path):
        self.check(tmp_path, "no regular file")
        self.check("https://example.org/a.png", "is an address")
        self.check("a\0b.png", "null byte")

    def test_no_bytes(self):
        self.check(b"", "no bytes")


class TestGoodPictures:
    @pytest.mark.parametrize(
        ("image", "expected"),
        [
            (Image.new("RGB", (5, 4), (10, 20, 30)), (10, 20, 30)),
            (Image.new("L", (5, 4), 77), (77, 77, 77)),
            (Image.new("1", (5, 4), 1), (255, 255, 255)),
            (Image.new("CMYK", (5, 4), (0, 255, 255, 0)), (255, 0, 0)),
            (Image.new("LA", (5, 4), (0, 128)), (127, 127, 127)),
            (Image.new("RGBA", (5, 4), (9, 9, 9, 0)), (255, 255, 255)),
            (Image.new("RGBA", (5, 4), (9, 8, 7, 255)), (9, 8, 7)),
            (Image.new("I;16", (5, 4), 0x8000), (128, 128, 128)),
            (Image.new("I", (5, 4), 65535), (255, 255, 255)),
            (Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)),
        ],
        ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
    )
    def test_modes(self, tmp_path, image, expected):
        kind = "TIFF" if image.mode in ("CMYK", "I") else "PNG"
        path = tmp_path / f"picture.{kind.lower()}"
        image.save(path)
        loaded = load_image(path)
        assert (loaded.mode, loaded.size, corner(loaded)) == ("RGB", image.size, expected)
        assert load_image(path.read_bytes()).tobytes() == loaded.tobytes()

    def test_palette_with_transparency(self):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([200, 0, 0, 0, 200, 0])
        image.putpixel((1, 1), 1)
        loaded = load_image(png(image, transparency=0))
        assert corner(loaded) == (255, 255, 255)
        assert loaded.getpixel((1, 1)) == (0, 200, 0)

    def test_cmyk_jpeg(self):
        stream = io.BytesIO()
        Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(stream, "JPEG")
        red, green, blue = corner(load_image(stream.getvalue()))
        assert red < 10
        assert min(green, blue) > 245

    def test_exif_rotation(self):
        image = Image.new("RGB", (6, 3), "white")
        image.putpixel((0, 0), (0, 0, 0))
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        loaded = load_image(png(image, exif=exif))
        assert loaded.size == (3, 6)
        assert loaded.getpixel((2, 0)) == (0, 0, 0)

    def test_deep_grey_keeps_its_shades(self):
        levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        loaded = np.asarray(load_image(Image.fromarray(levels)))[..., 0]
        assert len(np.unique(loaded)) == 64

    def test_float_grey_is_stretched(self):
        loaded = np.asarray(load_image(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32))))
        assert loaded[0, :, 0].tolist() == [0, 128, 255]

    def test_first_frame_of_an_animation(self):
        stream = io.BytesIO()
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
        assert corner(load_image(stream.getvalue()))[0] > 200

    def test_a_picture_is_not_changed(self):
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        load_image(image)
        assert image.mode == "RGBA"


class TestPrepare:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_batch_equals_single_rows(self, family):
        """Rows with one, no and two pictures of different shapes, padded on the left."""
        model, processor = shared(family)
        conversations = [
            [message("user", "what is in the image ?", 1)],
            [message("user", "describe")],
            [message("user", "which of the two is a dog ?", 2)],
        ]
        images = [[picture(1)], [], [picture(2, (100, 40)), picture(3)]]
        if family == "paligemma":  # which has no prompts without a picture
            conversations[1], images[1] = [message("user", "describe", 1)], [picture(4)]
        config = generation_config(model, GenerateSettings(max_new_tokens=6))
        batch = prepare(processor, conversations, images)
        assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1]
        length = batch["input_ids"].shape[1]
        together = model.generate(**batch, generation_config=config)[:, length:]
        for row, (conversation, pictures) in enumerate(zip(conversations, images, strict=True)):
            alone = prepare(processor, [conversation], [pictures])
            length = alone["input_ids"].shape[1]
            answer = model.generate(**alone, generation_config=config)[0, length:]
            assert together[row, : len(answer)].tolist() == answer.tolist()

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("size", [(1, 1), (3, 50), (2, 2)])
    def test_tiny_pictures(self, family, size):
        model, processor = shared(family)
        inputs = prepare(processor, [[message("user", "hi", 1)]], [[Image.new("RGB", size)]])
        config = generation_config(model, GenerateSettings(max_new_tokens=1))
        assert model.generate(**inputs, generation_config=config).shape[0] == 1

    def test_pictures_stay_in_order(self):
        _, processor = shared("llava")
        conversation = [
            message("user", "first", 1),
            message("assistant", "yes"),
            message("user", "second", 1),
        ]
        one, two = picture(1), picture(2)
        there = prepare(processor, [conversation], [[one, two]])["pixel_values"]
        back = prepare(processor, [conversation], [[two, one]])["pixel_values"]
        assert torch.equal(there, back.flip(0))
        assert not torch.equal(there[0], there[1])

    def test_dtype_concerns_pixels_only(self):
        _, processor = shared("llava")
        inputs = prepare(
            processor, [[message("user", "hi", 1)]], [[picture()]], dtype=torch.bfloat16
        )
        assert inputs["pixel_values"].dtype == torch.bfloat16
        assert inputs["input_ids"].dtype == torch.int64

    @pytest.mark.parametrize("n_pictures", [0, 2])
    def test_wrong_number_of_pictures(self, n_pictures):
        _, processor = shared("llava")
        with pytest.raises(InputError, match=f"1 image placeholders and {n_pictures} pictures"):
            prepare(processor, [[message("user", "hi", 1)]], [[picture()] * n_pictures])

    @pytest.mark.parametrize("conversations", [[], [[message("user", "hi")]] * 2])
    def test_wrong_number_of_rows(self, conversations):
        _, processor = shared("llava")
        with pytest.raises(InputError, match="conversations and 1 lists of pictures"):
            prepare(processor, conversations, [[]])


class TestPaliGemma:
    """Its type ids of zeros open the prompt to both directions; without them it is causal."""

    def test_type_ids_stay_and_labels_go(self):
        _, processor = shared("paligemma")
        inputs = prepare(processor, [[message("user", "hi", 1)]], [[picture()]])
        assert inputs["token_type_ids"].shape == inputs["input_ids"].shape
        assert not inputs["token_type_ids"].any()
        assert "labels" not in inputs

    def test_a_prompt_without_picture_is_refused(self):
        _, processor = shared("paligemma")
        rows = [[message("user", "hi", 1)], [message("user", "hi")]]
        with pytest.raises(InputError, match="about pictures only"):
            prepare(processor, rows, [[picture()], []])


class TestChatTemplate:
    @pytest.fixture
    def bare(self, monkeypatch):
        _, processor = shared("llava")
        monkeypatch.setattr(processor, "chat_template", None)
        return processor

    def test_none_is_an_error_with_advice(self, bare):
        with pytest.raises(InputError, match="LlavaProcessor has no chat template") as caught:
            render(bare, [message("user", "hi")])
        assert "simple" in caught.value.advice

    def test_simple(self, bare):
        use_chat_template(bare, "simple")
        conversation = [
            message("user", "What is this?", 1),
            message("assistant", "A dog."),
            message("user", "Sure?"),
        ]
        assert render(bare, conversation) == (
            "USER: <image>\nWhat is this? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT:"
        )
        assert "<image>" in SIMPLE_TEMPLATE

    def test_file(self, bare, tmp_path):
        (tmp_path / "t.jinja").write_text("[{{ messages[0]['content'][0]['text'] }}]")
        use_chat_template(bare, str(tmp_path / "t.jinja"))
        assert render(bare, [message("user", "hi")]) == "[hi]"

    def test_missing_file(self, bare):
        with pytest.raises(InputError, match="cannot be read"):
            use_chat_template(bare, "nowhere.jinja")

    def test_refusal_of_the_template(self, bare):
        bare.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(InputError, match="roles must alternate"):
            render(bare, [message("user", "hi")])

    @pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
    def test_one_start_token(self, written):
        """Whether the template writes it or the tokenizer adds it."""
        _, processor = build("llava")
        start = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
        processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start[0]} $A", special_tokens=[start]
        )
        processor.chat_template = written + processor.chat_template
        ids = prepare(processor, [[message("user", "hi")]], [[]])["input_ids"][0].tolist()
        assert ids[0] == start[1]
        assert ids.count(start[1]) == 1


def test_unknown_words_of_a_word_level_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "dog": 2, "?": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()

    class Processor:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    assert unknown_words(Processor, "a flamingo, a dog ? a flamingo !") == ["flamingo", ",", "!"]
    assert unknown_words(Processor, "a dog ?") == []


def test_no_word_is_unknown_to_a_byte_level_tokenizer():
    _, processor = shared("llava")
    assert unknown_words(processor, "ein Flämingo!") == []
