"""LangChain on ternion: its classes for OpenAI need nothing but the address."""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI
from pydantic import BaseModel, Field

url = os.environ.get("TERNION_URL", "http://127.0.0.1:8080") + "/v1"
key = os.environ.get("TERNION_KEY", "none")
name = OpenAI(base_url=url, api_key=key).models.list().data[0].id
model = ChatOpenAI(base_url=url, api_key=key, model=name, max_tokens=96, seed=7)

print("# A chain, streamed")
prompt = ChatPromptTemplate.from_messages([("system", "You tell short tales."), ("user", "A tale about a {animal}.")])
chain = prompt | model | StrOutputParser()
for piece in chain.stream({"animal": "fox"}):
    print(piece, end="", flush=True)
print()


class Animal(BaseModel):
    """An animal of a tale."""

    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)


print("\n# Structured output")
print(model.with_structured_output(Animal, method="json_schema").invoke("An animal."))

print("\n# Embeddings")
# The server counts tokens itself: texts go out as texts.
embeddings = OpenAIEmbeddings(base_url=url, api_key=key, model=name, check_embedding_ctx_length=False)
print(len(embeddings.embed_query("a fox")), "numbers")
