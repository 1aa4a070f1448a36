#!/bin/sh
# Generates router/v1 from the proto files: messages, gRPC stubs and their types.
#
#   proto/generate.sh [FOLDER]    writes FOLDER/router/v1; without FOLDER, the repository's own.
#
# Lint generates into a temporary folder and compares, so that stale code cannot be committed.
# PYTHON chooses the interpreter (default: .venv/bin/python); it needs grpcio-tools, mypy-protobuf.
set -eu

repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "${1:-$repository}" && cd "${1:-$repository}" && pwd)
python=${PYTHON:-$repository/.venv/bin/python}

cd "$repository"
tools=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
"$python" -m grpc_tools.protoc -I proto \
    --plugin=protoc-gen-mypy="$tools/protoc-gen-mypy" \
    --python_out="$folder" --mypy_out=quiet:"$folder" proto/router/v1/*.proto
# Only the services need stubs.
"$python" -m grpc_tools.protoc -I proto \
    --plugin=protoc-gen-mypy_grpc="$tools/protoc-gen-mypy_grpc" \
    --grpc_python_out="$folder" --mypy_grpc_out=quiet:"$folder" proto/router/v1/*_service.proto
printf '%s\n' '"""Generated from proto/router/v1 by proto/generate.sh. Never edited by hand."""' \
    >"$folder/router/v1/__init__.py"
