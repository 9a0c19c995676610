#!/usr/bin/env bash
# Every route of a server, with curl. An error status ends the script.
set -euo pipefail

url=${TERNION_URL:-http://127.0.0.1:8080}
key=${TERNION_KEY:-none}

get() {
    printf '\n# GET %s\n' "$1"
    curl --fail-with-body --silent --show-error --header "Authorization: Bearer $key" "$url$1"
    echo
}

post() {
    printf '\n# POST %s %s\n' "$1" "$2"
    curl --fail-with-body --silent --show-error --no-buffer --header "Authorization: Bearer $key" \
        --header 'Content-Type: application/json' --data "$2" "$url$1"
    echo
}

get /health
get /version
get /v1/models
post /v1/completions '{"prompt": "Once upon a time", "max_tokens": 32, "seed": 7}'
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 32}'

# Piece by piece, and at the end how many tokens it was.
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8, "stream": true,
    "stream_options": {"include_usage": true}}'

# JSON that conforms to a schema, whatever the model.
post /v1/completions '{"prompt": "A fox, as JSON: ", "max_tokens": 64, "response_format": {"type": "json_schema", "json_schema":
    {"name": "animal", "schema": {"type": "object", "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 8},
    "colour": {"enum": ["red", "grey"]}}, "required": ["legs", "colour"], "additionalProperties": false}}}}'
post /v1/embeddings '{"input": "a fox", "encoding_format": "base64"}'
post /tokenize '{"content": "Once upon a time"}'
post /detokenize '{"tokens": [1, 2, 3]}'
