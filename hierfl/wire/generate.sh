#!/usr/bin/env bash
# Makes hierfl_pb2*.py from hierfl.proto, in an environment of its own: grpcio-tools 1.81.1 writes code that
# protobuf 6.33 and 7 both load. CI runs it and compares. Usage: hierfl/wire/generate.sh [OUTPUT_DIR]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root}
env=${HIERFL_PROTO_ENV:-$root/.venv-proto}
if [ ! -x "$env/bin/python" ]; then
  python3 -m venv "$env"
  "$env/bin/pip" install --quiet 'grpcio-tools==1.81.1' 'setuptools<81'
fi
cd "$root"
"$env/bin/python" -m grpc_tools.protoc -I . --python_out="$out" --pyi_out="$out" hierfl/wire/hierfl.proto
