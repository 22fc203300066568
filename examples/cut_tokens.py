"""Fewer visual tokens: what leaves, and what it saves.

python examples/cut_tokens.py
"""

import mmlm
from mmlm.engine import flops
from mmlm.inputs import message, prepare
from mmlm.show.truth import draw_scene

model, processor = mmlm.load("embedded")
question = message("user", "describe the image .", n_images=1)
inputs = prepare(processor, [[question]], [[draw_scene(index=3).image]])
config, n_positions = model.config.text_config, inputs["input_ids"].shape[1]
n_image = int((inputs["input_ids"] == model.config.image_token_id).sum())
layers = config.num_hidden_layers

for target in (n_image, 50, 25):
    with mmlm.FlowCut(target=target)(model):
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        (record,) = mmlm.measured(model)  # which patches stayed, by tile
    kept = sum(map(len, record["flowcut"]["kept"]))
    left = n_positions - n_image + kept
    share = flops.prefill(config, [left] * layers) / flops.prefill(config, [n_positions] * layers)
    text = processor.decode(ids[0, n_positions:], skip_special_tokens=True)
    print(f"{kept} of {n_image} image tokens, {share:.0%} of the decoder's prefill | {text}")
