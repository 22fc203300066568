"""CHAIR of captions of your own, and whether a method changed it.

python examples/score_chair.py
"""

import mmlm
from benchmarks import chair
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show.truth import draw_scene

model, processor = mmlm.load("embedded")
scenes = {index: draw_scene(index=index) for index in range(24)}
truth = {index: scene.known.objects for index, scene in scenes.items()}
requests = [Request(str(i), (s.image,), "describe the image .") for i, s in scenes.items()]
settings = GenerateSettings(max_new_tokens=84, batch_size=8)


def score(*methods):
    answers = generate_all(model, processor, requests, methods, settings)
    captions = [{"image_id": int(answer.id), "caption": answer.text} for answer in answers]
    return chair.score(captions, truth)  # captions may come from anywhere


plain, vhr = score(), score(mmlm.VHR(alpha=2.0))
for name, result in {"plain": plain, "VHR": vhr}.items():
    measure = result.table.measure("chair_i", resamples=1000)
    low, high = measure.interval.low, measure.interval.high
    print(f"{name}: CHAIR_i {measure.value:.1%}, 95 % interval {low:.1%} to {high:.1%}")
change = plain.table.difference(vhr.table, "chair_i")
low, high = change.interval.low, change.interval.high
print(f"change, paired by picture: {change.value:+.1%}, {low:+.1%} to {high:+.1%}")
print("clear" if change.is_clear else "not clear: 24 pictures are too few to say")
