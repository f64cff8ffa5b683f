#!/bin/sh
# Runs the native kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer. Needs gcc and a checkout that is
# installed with its dev extra.     tools/check_memory.sh [arguments of pytest]
set -eu
cd "$(dirname "$0")/.."
CC=${CC:-gcc}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
$CC -shared -fPIC -g -O1 -ffp-contract=off -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
    -o "$built/libnative.so" spikedistill/neurons/kernels/native.c spikedistill/neurons/kernels/sparse.c -lm
# detect_leaks: Python and torch keep memory to the end on purpose
LD_PRELOAD="$($CC -print-file-name=libasan.so) $($CC -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    "${PYTHON:-python}" - "$built/libnative.so" "$@" <<'PYTHON'
import sys
from pathlib import Path

import pytest

from spikedistill.neurons.kernels import native

native.LIBRARY = Path(sys.argv[1])
tests = "(native or same_numbers or millions or bfloat16 or counter_example or threads or instruction or pools or sparse)"
tests += " and not compiles and not registered and not exports"
files = [f"tests/neurons/test_{name}.py" for name in ("kernels", "pools", "sparse")]
sys.exit(pytest.main(["-p", "no:cacheprovider", *files, "-k", tests, *sys.argv[2:]]))
PYTHON
