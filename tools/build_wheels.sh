#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Build the distributions into dist/: the sdist and the pure wheel, for a package index; and for each interpreter on the
# command line a wheel with the extension for its torch, with torch's release in its version, for a private index or folder.
#
#   tools/build_wheels.sh [PYTHON...]      (make wheels PYTHONS="...")
#
# Each interpreter has torch, setuptools, wheel and ninja; auditwheel and patchelf are on PATH. FASTDIFF_BUILD is cpu or cuda
# (default: cpu), FASTDIFF_FILES_URL as in docs/packaging.md. A wheel runs on any Linux with a C library as new as that of the
# machine that builds it; auditwheel writes the oldest into its name. Build in a manylinux image for old ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${FASTDIFF_BUILD:-cpu}
[[ $mode == cpu || $mode == cuda ]] || { echo "build_wheels: FASTDIFF_BUILD is '$mode', expected cpu or cuda; set one of them" >&2; exit 1; }
if (($#)) && ! command -v auditwheel >/dev/null; then
    echo "build_wheels: auditwheel is missing, expected it on PATH; run: pip install auditwheel patchelf" >&2
    exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$PWD/dist
mkdir -p "$out"

hook() { # PYTHON HOOK FOLDER: one of setuptools' build hooks
    "$1" -c 'import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])' "$2" "$3" >&2
}

pythons=() # as absolute paths; a link into an environment stays one
for python in "${@:-python3}"; do
    found=$(command -v "$python") || { echo "build_wheels: $python is no interpreter, expected a name on PATH or a path; correct it" >&2; exit 1; }
    pythons+=("$(cd "$(dirname "$found")" && pwd)/$(basename "$found")")
done
first=${pythons[0]}
(($#)) || pythons=()
FASTDIFF_BUILD=none hook "$first" build_sdist "$work"
cp "$work"/*.tar.gz "$out"
# Build all wheels from the sdist: a checkout may contain files of earlier builds.
mkdir "$work/tree"
tar xf "$work"/*.tar.gz -C "$work/tree" --strip-components 1
cd "$work/tree"
FASTDIFF_BUILD=none hook "$first" build_wheel "$out"

for python in "${pythons[@]}"; do
    # "torch2.13.cpu", "torch2.13.cu130": a local version. An index such as PyPI accepts none; without it the wheel would
    # be chosen for any torch.
    label=$("$python" - "$mode" <<'PY'
import re, sys
import torch

release = re.match(r"\d+\.\d+", torch.__version__).group()
print(f"torch{release}.cpu" if sys.argv[1] == "cpu" else f"torch{release}.cu{torch.version.cuda.replace('.', '')}")
PY
    )
    printf '[egg_info]\ntag_build = +%s\n' "$label" >"$work/extra.cfg"
    rm -rf "$work/raw" build
    mkdir "$work/raw"
    DIST_EXTRA_CONFIG="$work/extra.cfg" FASTDIFF_BUILD=$mode hook "$python" build_wheel "$work/raw"
    # torch's and CUDA's libraries come with the installed torch; the wheel must not contain a second copy.
    auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' --wheel-dir "$out" "$work"/raw/*.whl
done
ls -l "$out"
