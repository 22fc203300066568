"""An answer piece by piece, stopped in the middle.

python examples/stream.py
"""

import mmlm
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings
from mmlm.show.truth import draw_scene
from mmlm.streaming import AnswerStream

model, processor = mmlm.load("embedded")
question = message("user", "describe the image .", n_images=1)
inputs = prepare(processor, [[question]], [[draw_scene(index=3).image]])

settings = GenerateSettings(max_new_tokens=84)

with AnswerStream(model, processor, inputs, [mmlm.VCD()], settings) as stream:
    for piece in stream:
        print(piece, end="", flush=True)
        if stream.text.count(" .") == 1:
            stream.stop()  # one sentence is enough
print(f"\n{stream.n_tokens} tokens, stopped: {stream.stopped}")
