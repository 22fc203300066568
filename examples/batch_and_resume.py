"""A file of questions, answered in batches; a run that was killed goes on where it stopped.

python examples/batch_and_resume.py
"""

import json
from pathlib import Path

from mmlm.cli import main
from mmlm.show.truth import draw_scene

PROMPT = "is there a dog in the image ?"
folder = Path("runs/batch_and_resume")
folder.mkdir(parents=True, exist_ok=True)
questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
with questions.open("w") as file:
    for index in range(12):
        draw_scene(index=index).image.save(folder / f"{index}.png")
        question = {
            "id": f"scene-{index}",
            "image": f"{index}.png",
            "prompt": "is there a dog in the image ?",
        }
        print(json.dumps(question), file=file)

command = ["generate", "--input", str(questions), "--output", str(answers), "--quiet",
           "--method", "VHR(alpha=2.0)", "--generate.batch_size", "4"]  # fmt: skip
answers.unlink(missing_ok=True)
assert main(command) == 0
whole = answers.read_bytes()

cut = len(whole) // 2
answers.write_bytes(whole[:cut])  # what a kill in the middle of a line leaves behind
assert main(command) == 0
print("the same after a kill:", answers.read_bytes() == whole)
for line in answers.read_text().splitlines()[:3]:
    answer = json.loads(line)
    print(answer["id"], "|", answer["text"])
