"""OpenAI's own Python client, talking to ternion."""

import json
import os

from openai import OpenAI

url = os.environ.get("TERNION_URL", "http://127.0.0.1:8080")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("TERNION_KEY", "none"))
model = client.models.list().data[0].id
print("model:", model)

print("\n# Chat")
messages = [{"role": "user", "content": "Tell me a story about a fox."}]
answer = client.chat.completions.create(model=model, messages=messages, max_tokens=48, seed=7)
print(answer.choices[0].message.content)
print(answer.usage)

print("\n# Chat, piece by piece")
stream = client.chat.completions.create(
    model=model, messages=messages, max_tokens=48, seed=7, stream=True, stream_options={"include_usage": True}
)
for piece in stream:
    if piece.choices:
        print(piece.choices[0].delta.content or "", end="", flush=True)
    elif piece.usage:
        print(f"\n{piece.usage.completion_tokens} tokens")

print("\n# JSON by schema")
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "An animal."}],
    response_format={"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}},
    max_tokens=128,
)
print(json.loads(answer.choices[0].message.content))

print("\n# Completion, two of them, with settings that only ternion has")
answer = client.completions.create(
    model=model, prompt="Once upon a time", n=2, max_tokens=16, temperature=0.8, extra_body={"top_k": 40, "min_p": 0.05}
)
for choice in answer.choices:
    print(repr(choice.text))

print("\n# Embeddings")
vectors = client.embeddings.create(model=model, input=["a fox", "a wolf", "a teapot"]).data
fox, wolf, teapot = (vector.embedding for vector in vectors)
near, far = (sum(a * b for a, b in zip(fox, other)) for other in (wolf, teapot))
print(f"{len(fox)} numbers; fox and wolf {near:.3f}, fox and teapot {far:.3f}")
