"""Several methods at once: the engine combines what they do by one law per place.

python examples/stack_methods.py
"""

import mmlm
from mmlm.errors import IncompatibleMethods
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show.truth import draw_scene

model, processor = mmlm.load("embedded")
requests = [Request("scene", (draw_scene(index=3).image,), "describe the image .")]
settings = GenerateSettings(max_new_tokens=84)

stacks = [(), (mmlm.VCD(),), (mmlm.VHR(), mmlm.VCD()), (mmlm.VCD(), mmlm.VHR())]
for methods in stacks:
    (answer,) = generate_all(model, processor, requests, methods, settings)
    print(" + ".join(method.label for method in methods) or "plain", "|", answer.text)

try:  # what cannot go together says so before anything runs
    with mmlm.attach(model, mmlm.OPERA(), mmlm.VCD()):
        pass
except IncompatibleMethods as error:
    print(error)
