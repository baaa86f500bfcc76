#!/usr/bin/env bash
# The HTTP interface with curl alone. Start a server first (`make serve`), then:
#
#   examples/curl.sh [IMAGE…]
#
# URL=http://127.0.0.1:8080   address of the server
# TOKEN=…                     sent as bearer token, if the server wants one
# CURL_OPTIONS='--cacert ca.pem'   further options of curl, for TLS for example
set -euo pipefail
samples="$(dirname "${BASH_SOURCE[0]}")/../samples"
url="${URL:-http://127.0.0.1:8080}"
[[ $# -gt 0 ]] || set -- "$samples/cat.jpg" "$samples/ship.png"

# curl itself repeats a request that was refused with 429 or 503, after the time that Retry-After names.
request() {
  # shellcheck disable=SC2086 # CURL_OPTIONS holds several words
  curl --silent --show-error --fail-with-body --retry 5 --max-time 30 ${CURL_OPTIONS:-} \
    ${TOKEN:+--header "Authorization: Bearer $TOKEN"} "$@"
  echo
}

echo "# Is the server ready to answer?"
request "$url/readyz"

echo "# Which model does it serve, and with which limits?"
request "$url/v1/model"

echo "# One image file as the body of the request; the three most probable classes; a deadline of two seconds."
request --data-binary "@$1" --header 'Content-Type: application/octet-stream' \
  --header 'X-Request-Timeout: 2' "$url/v1/classify?top_k=3"

echo "# Several image files in one request."
forms=()
for image in "$@"; do
  forms+=(--form "image=@$image")
done
request "${forms[@]}" "$url/v1/classify?top_k=1"

echo "# The Open Inference Protocol, with raw pixels as JSON: one black image."
model="$(request "$url/v1/model" | sed 's/.*"name": *"\([^"]*\)".*/\1/')"
pixels="$(printf '0,%.0s' {1..3071})0"
printf '{"inputs": [{"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [%s]}]}' "$pixels" |
  request --data-binary @- --header 'Content-Type: application/json' "$url/v2/models/$model/infer"
