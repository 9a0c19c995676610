"""Everything that a client of OpenAI's package does, against the server at the address given."""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
name = client.models.list().data[0].id
assert client.models.retrieve(name).id == name

messages = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "A story about a dog"}]
chat = client.chat.completions.create(model=name, messages=messages, max_tokens=16, seed=3, temperature=0.7)
text = chat.choices[0].message.content
assert text and chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens

stream = client.chat.completions.create(
    model=name, messages=messages, max_tokens=16, seed=3, temperature=0.7, stream=True,
    stream_options={"include_usage": True},
)
pieces, usage = "", None
for chunk in stream:
    if chunk.choices:
        pieces += chunk.choices[0].delta.content or ""
    usage = chunk.usage or usage
assert pieces == text and usage.completion_tokens == chat.usage.completion_tokens

with_logprobs = client.chat.completions.create(
    model=name, messages=messages, max_tokens=4, logprobs=True, top_logprobs=2, n=2, temperature=1.0
)
assert len(with_logprobs.choices) == 2
assert all(len(choice.logprobs.content) <= 4 for choice in with_logprobs.choices)
assert with_logprobs.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0

completion = client.completions.create(model=name, prompt="Once upon a time", max_tokens=8, stop=["\n\n"])
assert completion.choices[0].text
assert "".join(
    chunk.choices[0].text
    for chunk in client.completions.create(model=name, prompt="Once upon a time", max_tokens=8, stop=["\n\n"], stream=True)
) == completion.choices[0].text

# The package asks for base 64 and decodes it.
vectors = client.embeddings.create(model=name, input=["a dog", "a cat"])
assert len(vectors.data) == 2 and abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-4
plain = client.embeddings.create(model=name, input="a dog", encoding_format="float")
assert max(abs(a - b) for a, b in zip(plain.data[0].embedding, vectors.data[0].embedding)) < 1e-6

schema = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"enum": ["Lily", "Tom"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
}
answer = client.chat.completions.create(
    model=name, messages=messages, max_tokens=100,
    response_format={"type": "json_schema", "json_schema": {"name": "child", "strict": True, "schema": schema}},
)
child = json.loads(answer.choices[0].message.content)
assert child["name"] in ("Lily", "Tom") and 1 <= child["age"] <= 99

for kind, call in [
    (openai.BadRequestError, lambda: client.chat.completions.create(model=name, messages=messages, n=-1)),
    (openai.NotFoundError, lambda: client.chat.completions.create(model="none", messages=messages)),
]:
    try:
        call()
    except kind as error:
        assert error.code in ("INVALID_INPUT", "MODEL_NOT_FOUND") and error.param in ("n", "model"), error
    else:
        raise AssertionError(kind)

print("ok", openai.__version__)
