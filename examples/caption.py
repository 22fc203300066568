"""Describe a picture, plain and with a method that stops inventions.

python examples/caption.py
"""

import mmlm
from mmlm.inputs import message, prepare
from mmlm.show.truth import draw_scene

model, processor = mmlm.load("embedded")  # or "llava-hf/llava-1.5-7b-hf", or a folder
scene = draw_scene(index=3)  # a picture whose truth is known; mmlm.inputs.load_image reads yours
question = message("user", "describe the image .", n_images=1)
inputs = prepare(processor, [[question]], [[scene.image]])


def caption():
    ids = model.generate(**inputs, max_new_tokens=84, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("There is:", ", ".join(sorted(scene.known.objects)))
print("plain:   ", caption())
with mmlm.VHR(alpha=2.0)(model):
    print("VHR:     ", caption())
print("after:   ", caption() == caption(), "- nothing of the method is left on the model")
