"""Which questions are answered together."""

from PIL import Image
from tiny import shared

from mmlm.batching import WINDOW, batches
from mmlm.runner import Request


def ids(cut):
    return [[request.id for request in batch] for batch in cut]


def asked(lengths, images=()):
    return [Request(str(n), tuple(images), "what " * length) for n, length in enumerate(lengths)]


def test_like_lengths_together_longest_first():
    _, processor = shared("llava")
    assert ids(batches(processor, asked([1, 9, 2, 8, 3]), 2)) == [["1", "3"], ["4", "2"], ["0"]]


def test_equal_lengths_keep_their_order():
    _, processor = shared("llava")
    assert ids(batches(processor, asked([3] * 5), 2)) == [["0", "1"], ["2", "3"], ["4"]]


def test_batch_of_one_is_the_order_of_the_data():
    _, processor = shared("llava")
    assert ids(batches(processor, asked([1, 9, 2]), 1)) == [["0"], ["1"], ["2"]]


def test_sorted_within_a_window_only():
    _, processor = shared("llava")
    cut = ids(batches(processor, asked([1] * 2 * WINDOW + [9]), 2))
    assert cut[-1] == [str(2 * WINDOW)]
    assert cut[0] == ["0", "1"]


def test_large_pictures_count_where_they_become_more_tokens(tmp_path):
    _, processor = shared("qwen2_5_vl")
    requests = []
    for n, side in enumerate((28, 112, 56)):
        path = tmp_path / f"{n}.png"
        Image.new("RGB", (side, side)).save(path)
        requests.append(Request(str(n), (path,), "what"))
    order = [one for batch in ids(batches(processor, requests, 2)) for one in batch]
    assert order.index("1") < order.index("0")


def test_what_cannot_be_read_comes_first(tmp_path):
    _, processor = shared("llava")
    requests = [*asked([5, 5]), Request("broken", (tmp_path / "none.png",), "what")]
    assert ids(batches(processor, requests, 2))[0][0] == "broken"
