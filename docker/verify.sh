#!/bin/bash
# Builds the image and checks what an operator relies on: it runs read-only, without capabilities and not as root, becomes
# ready with native kernels, generates tokens, passes its own HEALTHCHECK, and on SIGTERM under load completes its streams,
# refuses new requests with 503, and ends with exit code 0.
# Run it before a release; it takes minutes the first time, most of them for torch.
#
#   docker/verify.sh    build and check        docker/verify.sh build    build only        docker/verify.sh check    check only
#
# Uses docker where a daemon answers, else buildah and podman (no daemon needed), with docker/podman.conf unless
# CONTAINERS_CONF names another. What must be installed: docs/operations.md, "The image". Variables:
#   IMAGE          tag to build (xlora-service:latest)
#   BUILD_ARGS     more arguments for the build, such as --build-arg PIP_ARGS=...
#   PORT           loopback port for the check (8000)
#   BASE_ROOTFS    directory of a root file system that stands in for the Dockerfile's base where images cannot be pulled
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-xlora-service:latest}
port=${PORT:-8000}
base=$(sed -n 's/^ARG BASE=//p' Dockerfile)
name=xlora-verify-$$
work=$(mktemp -d)
engine=

say() { printf '%-28s %s\n' "$1" "$2"; }
fail() { echo "FAILED: $*" >&2; exit 1; }

cleanup() {
    [ -z "$engine" ] || "$engine" rm -f "$name" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT

# Everything that is missing in one message, before anything has begun.
check_needs() {
    local missing=() name
    local needed=(python3 pip cc)
    engine=docker
    if ! docker info >/dev/null 2>&1; then
        engine=podman
        needed+=(podman buildah runc catatonit)
        export CONTAINERS_CONF=${CONTAINERS_CONF:-$PWD/docker/podman.conf}
    fi
    for name in "${needed[@]}"; do
        command -v "$name" >/dev/null || [ -x "/usr/libexec/podman/$name" ] || missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return
    engine=
    fail "not installed: ${missing[*]} (docs/operations.md, \"The image\"; podman and buildah are for machines where no docker daemon answers)"
}

# This machine's pip configuration, certificates and local package folders, needed for the build and never in the image.
pip_mounts() {
    python3 - <<'PY'
import os, re, ssl, subprocess

def pip(*arguments):
    return subprocess.run(["pip", "config", *arguments], capture_output=True, text=True).stdout

paths = set(re.findall(r"^\s*(\S+), exists: True", pip("debug"), re.M))
paths |= {re.sub(r"/simple/?$", "", path) for path in re.findall(r"(?:file://)?(/[^\s']+)", pip("list"))}
paths.add(ssl.get_default_verify_paths().cafile or os.environ.get("SSL_CERT_FILE", ""))
print(*sorted(path for path in paths if path and os.path.exists(path)), sep="\n")
PY
}

import_base() {
    podman image exists "localhost/$base" && return
    echo "importing $BASE_ROOTFS as $base"
    tar -C "$BASE_ROOTFS" -c . | podman import -q --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' - "localhost/$base" >/dev/null
}

# The commit of what is built, with "-dirty" where its files differ from the commit's.
revision() {
    local commit changed
    commit=$(git rev-parse HEAD 2>/dev/null) || { echo unknown; return; }
    changed=$(git status --porcelain -- Dockerfile pyproject.toml constraints.txt service model_store/demo)
    echo "$commit${changed:+-dirty}"
}

build() {
    local more=() mounts=() path
    read -ra more <<<"${BUILD_ARGS:-}"
    more+=(--build-arg "REVISION=$(revision)")
    if [ "$engine" = docker ]; then
        docker build "${more[@]}" -t "$image" .
        return
    fi
    if [ -n "${BASE_ROOTFS:-}" ]; then
        import_base
        more+=(--pull-never)
    fi
    while read -r path; do mounts+=(-v "$path:$path:ro"); done < <(pip_mounts)
    # HEALTHCHECK exists only in the docker image format; chroot isolation needs no privileges of its own.
    buildah bud --isolation chroot --network host --format docker --layers "${mounts[@]}" "${more[@]}" -t "$image" .
}

fetch() { python3 -c 'import sys, urllib.request as u; sys.stdout.write(u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode() or None, {"Content-Type": "application/json"}), timeout=60).read().decode())' "$1" "${2:-}"; }

wait_ready() {
    local begin=$SECONDS
    until fetch "http://127.0.0.1:$port/readyz" >/dev/null 2>&1; do
        [ $((SECONDS - begin)) -lt 300 ] || { "$engine" logs "$name" 2>&1 | tail -n 40; fail "not ready after 300 s"; }
        [ "$("$engine" inspect "$name" --format '{{.State.Running}}')" = true ] || { "$engine" logs "$name" 2>&1 | tail -n 40; fail "the container stopped"; }
        sleep 0.5
    done
    say "answers /readyz" "after $((SECONDS - begin)) s"
}

check_generates() {
    local reply tokens
    reply=$(fetch "http://127.0.0.1:$port/generate" '{"prompt": "2 + 3 =", "max_tokens": 8, "ignore_eos": true}') || fail "/generate did not answer 200"
    tokens=$(python3 -c 'import json, sys; print(len(json.load(sys.stdin)["outputs"][0]["token_ids"]))' <<<"$reply")
    [ "$tokens" = 8 ] || fail "/generate gave $tokens tokens instead of 8: $reply"
    say "POST /generate" "$tokens tokens"
}

# A build that took a layer of older code for this one would pass everything else.
check_source() {
    local sum='import hashlib, importlib.util as u, pathlib
root = pathlib.Path(u.find_spec("service").origin).parent
files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".js", ".css", ".html"))
print(hashlib.sha256(b"".join(p.relative_to(root).as_posix().encode() + p.read_bytes() for p in files)).hexdigest())'
    [ "$("$engine" exec "$name" python -c "$sum")" = "$(python3 -c "$sum")" ] || fail "the image has other code than this folder"
    say "code" "that of this folder"
}

check_labels() {
    local found
    found=$("$engine" image inspect "$image" --format '{{index .Config.Labels "org.opencontainers.image.revision"}}')
    [ "$found" = "$(revision)" ] || fail "the image's label says revision $found, and this folder is $(revision)"
    say "revision" "$found"
}

# With a driver that has the names only: what Triton loads is in the image, and it asks for no compiler.
check_triton() {
    local names='import pathlib, re, triton.backends.nvidia.driver as d
text = pathlib.Path(d.__file__).with_name("driver.c").read_text()
print(*(f"int {n}(void) {{ return 1; }}" for n in sorted(set(re.findall(r"\bcu[A-Z]\w*(?=\()", text)))), sep="\n")'
    local load='from triton.backends.nvidia.driver import CudaUtils; print(CudaUtils())'
    if ! "$engine" exec "$name" python -c 'import triton' 2>/dev/null; then
        say "Triton" "not in this image"
        return
    fi
    mkdir "$work/driver"
    "$engine" exec "$name" python -c "$names" >"$work/driver.c"
    cc -shared -fPIC -nostdlib -w -Wl,-soname,libcuda.so.1 -o "$work/driver/libcuda.so.1" "$work/driver.c"
    chmod -R a+rX "$work"
    "$engine" run --rm --read-only --tmpfs /tmp --cap-drop ALL --network none -v "$work/driver:/driver:ro" --entrypoint python \
        -e TRITON_LIBCUDA_PATH=/driver -e LD_LIBRARY_PATH=/driver "$image" -c "$load" >"$work/triton.log" 2>&1 \
        || { tail -n 5 "$work/triton.log" >&2; fail "Triton cannot reach a driver in the image"; }
    say "Triton" "reaches a driver without a compiler"
}

# One line that says so, and no traceback.
check_no_gpu() {
    local code=0
    "$engine" run --rm --read-only --tmpfs /tmp --cap-drop ALL --network none "$image" serve --device cuda >"$work/cuda.log" 2>&1 || code=$?
    if [ "$code" = 0 ] || grep -q Traceback "$work/cuda.log" || ! grep -q 'this machine has 0 CUDA devices' "$work/cuda.log"; then
        tail -n 20 "$work/cuda.log" >&2
        fail "--device cuda without a GPU: exit code $code"
    fi
    say "--device cuda, no GPU" "exit code $code: $(grep -m 1 'CUDA devices' "$work/cuda.log")"
}

# Built with the image, for there is no compiler in it.
check_kernels() {
    "$engine" logs "$name" 2>&1 | grep -q 'native kernels are in use' || fail "no native kernels: $("$engine" logs "$name" 2>&1 | tail -n 5)"
    say "native kernels" "in use"
}

check_health() {
    local state begin=$SECONDS
    if [ "$engine" = podman ]; then
        podman healthcheck run "$name" >/dev/null || fail "HEALTHCHECK"
    else
        until state=$(docker inspect "$name" --format '{{.State.Health.Status}}'); [ "$state" = healthy ]; do
            [ $((SECONDS - begin)) -lt 60 ] || fail "HEALTHCHECK is $state after 60 s"
            sleep 1
        done
    fi
    say "HEALTHCHECK" ok
}

check_user() {
    local uid
    uid=$("$engine" exec "$name" python -c 'import os; print(os.getuid())')
    [ "$uid" != 0 ] || fail "runs as root"
    say "user id" "$uid"
}

# SIGTERM while four streams run: they must come to their end, and a newcomer must be told to go elsewhere.
check_drains() {
    local code begin=$SECONDS
    python3 docker/drain.py "$port" "$engine" kill --signal TERM "$name" || fail "draining under load"
    until [ "$("$engine" inspect "$name" --format '{{.State.Running}}')" = false ]; do
        [ $((SECONDS - begin)) -lt 150 ] || fail "still running 150 s after SIGTERM"
        sleep 0.2
    done
    code=$("$engine" inspect "$name" --format '{{.State.ExitCode}}')
    [ "$code" = 0 ] || { "$engine" logs "$name" 2>&1 | tail -n 20; fail "exit code $code after SIGTERM"; }
    say "exit code after SIGTERM" "$code ($((SECONDS - begin)) s)"
}

check_needs
[ "${1:-}" = check ] || build
say "image" "$image, $("$engine" image inspect "$image" --format '{{.Size}}' | awk '{printf "%.0f MB", $1 / 1e6}')"
[ "${1:-}" != build ] || exit 0

# Host networking also works where no bridge can be made; the service then listens on loopback only.
"$engine" run -d --name "$name" --network host --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    -e XLORA_HOST=127.0.0.1 -e "XLORA_PORT=$port" -e XLORA_DRAIN_SECONDS=120 "$image" >"$work/run.log" 2>&1 || { cat "$work/run.log" >&2; fail "the container does not start"; }
wait_ready
check_generates
check_source
check_labels
check_kernels
check_triton
[ -e /dev/nvidiactl ] || check_no_gpu
check_health
check_user
check_drains
echo "image verified"
