#!/bin/sh
# Runs the native kernel under AddressSanitizer: every memory access of its tests is checked. Needs gcc and an installed
# checkout.     tools/check_memory.sh [arguments of pytest]
set -eu
cd "$(dirname "$0")/.."
kernels=spikedistill/neurons/kernels
checked=$(mktemp -d)
trap 'rm -rf "$checked"' EXIT
${CC:-gcc} -shared -fPIC -g -O1 -ffp-contract=off -fno-math-errno -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -fno-omit-frame-pointer -o "$checked/libnative.so" "$kernels/native.c" -lm
# Python and torch leak by design and are not built for it: only what the kernel touches is checked.
SPIKEDISTILL_NATIVE="$checked/libnative.so" LD_PRELOAD="$(${CC:-gcc} -print-file-name=libasan.so) $(${CC:-gcc} -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 "${PYTHON:-python}" -m pytest -p no:cacheprovider tests/neurons/test_kernels.py tests/neurons/test_native.py \
    -k "native or built or millions or counter or threads or instruction" "$@"
