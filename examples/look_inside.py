"""Where a model looks while it writes each word. A probe is a method that changes nothing.

python examples/look_inside.py
"""

from pathlib import Path

import mmlm
from mmlm.inputs import message, prepare
from mmlm.show import figures, looking, words
from mmlm.show.truth import draw_scene
from mmlm.streaming import AnswerStream

model, processor = mmlm.load("embedded")
picture = draw_scene(index=3).image
question = message("user", "describe the image .", n_images=1)
inputs = prepare(processor, [[question]], [[picture]])

with AnswerStream(model, processor, inputs, [mmlm.AttentionMap()]) as stream:
    for _ in stream:
        pass
look = looking.of_stream(stream, [picture])

folder = Path("runs/look_inside")
folder.mkdir(parents=True, exist_ok=True)
for start, end in words.words(look.text)[:14]:
    word, share = look.text[start:end], look.share_of_span(start, end)
    print(f"{word:<10} {share:4.0%} of the attention is on the picture")
    figures.overlay(picture, look.of_span(start, end)).save(folder / f"{start:03}-{word}.png")
print("maps of each word:", folder)
