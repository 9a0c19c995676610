"""The calls of a `transformers` text-generation pipeline, answered by a ternion server. Needs nothing but Python.

    generate = pipeline("text-generation", "http://127.0.0.1:8080")
    generate("Once upon a time", max_new_tokens=32)[0]["generated_text"]

Arguments have the names and meanings that they have there; texts come back with their prompts unless
`return_full_text=False`, and a list of messages comes back with the answer appended.
"""

import json
import os
from urllib.request import Request, urlopen

# Names of generation arguments there, and of fields here.
SETTINGS = {
    "max_new_tokens": "max_tokens",
    "min_p": "min_p",
    "num_return_sequences": "n",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}


class TextGeneration:
    def __init__(self, url: str, model: str | None = None, token: str | None = None):
        self.url, self.model, self.token = url.rstrip("/"), model, token

    def __call__(self, texts, *, return_full_text=True, do_sample=None, **settings):
        unknown = settings.keys() - SETTINGS.keys()
        if unknown:
            raise TypeError(f"not supported: {', '.join(sorted(unknown))}")
        if do_sample is False:
            settings["temperature"] = 0
        fields = {SETTINGS[name]: value for name, value in settings.items() if value is not None}
        is_chat = isinstance(texts, list) and texts and isinstance(texts[0], dict)
        if isinstance(texts, list) and not is_chat:
            return [self(text, return_full_text=return_full_text, **settings) for text in texts]
        if is_chat:
            choices = self.post("/v1/chat/completions", {**fields, "messages": texts})
            answers = [choice["message"]["content"] for choice in choices]
            whole = [[*texts, {"role": "assistant", "content": answer}] for answer in answers]
        else:
            choices = self.post("/v1/completions", {**fields, "prompt": texts})
            answers = [choice["text"] for choice in choices]
            whole = [texts + answer for answer in answers]
        return [{"generated_text": text} for text in (whole if return_full_text else answers)]

    def post(self, path, fields):
        if self.model:
            fields["model"] = self.model
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        with urlopen(Request(self.url + path, json.dumps(fields).encode(), headers)) as answer:
            return json.load(answer)["choices"]


def pipeline(task: str, url: str, **options) -> TextGeneration:
    if task != "text-generation":
        raise ValueError(f"{task}: only text-generation is served here")
    return TextGeneration(url, **options)


if __name__ == "__main__":
    generate = pipeline(
        "text-generation", os.environ.get("TERNION_URL", "http://127.0.0.1:8080"), token=os.environ.get("TERNION_KEY")
    )
    print(generate("Once upon a time", max_new_tokens=32, seed=7)[0]["generated_text"])
    chat = [{"role": "user", "content": "Tell me a story."}]
    print(generate(chat, max_new_tokens=32, do_sample=False)[0]["generated_text"][-1])
