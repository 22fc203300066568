"""Ask a served model with the client of OpenAI; methods are part of the request.

mmlm serve &  python examples/ask_a_server.py http://127.0.0.1:8000/v1
"""

import base64
import io
import sys

from openai import OpenAI

from mmlm.show.truth import draw_scene

client = OpenAI(base_url=sys.argv[1], api_key="none")
print("served:", *(model.id for model in client.models.list()))

file = io.BytesIO()
draw_scene(index=3).image.save(file, "png")
picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
question = [
    {"type": "image_url", "image_url": {"url": picture}},
    {"type": "text", "text": "describe the image ."},
]
messages = [{"role": "user", "content": question}]

methods = {"mmlm_methods": ["VHR(alpha=2.0)", "VCD()"]}
for name, more in {"embedded": methods, "embedded+VHR(alpha=2.0)": {}}.items():
    answer = client.chat.completions.create(model=name, messages=messages, extra_body=more)
    print(name, more, "|", answer.choices[0].message.content)

stream = client.chat.completions.create(model="embedded", messages=messages, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
