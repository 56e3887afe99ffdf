# One file for CPU and CUDA: TORCH and PIP_ARGS choose the torch build, everything else is the same.
#   docker build -t xlora-service .
#   docker build -t xlora-service:cpu --build-arg PIP_ARGS="--extra-index-url <an index of CPU builds of torch>" .
# The default index's torch brings the CUDA libraries with it; the host then needs only the NVIDIA driver and container toolkit.
# BASE may be a digest (python@sha256:...) where builds must be the same to the byte.
ARG BASE=python:3.11-slim-bookworm

# torch first, the other dependencies next: the large layers change least often, and not with the source.
FROM ${BASE} AS dependencies
ARG TORCH="torch==2.13.0"
ARG PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# torch's own tests and their programs are 130 MB that nothing here runs.
# hadolint ignore=DL3042,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv && /opt/venv/bin/pip install -qq $PIP_ARGS "$TORCH" \
    && rm -rf /opt/venv/lib/python*/site-packages/torch/test \
    && find /opt/venv/lib/python*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete
COPY pyproject.toml constraints.txt ./
# hadolint ignore=DL3042,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["gpu"], sep="\n")' >requirements.txt \
    && grep -v '^torch==' constraints.txt >pins.txt && echo "$TORCH" >>pins.txt \
    && /opt/venv/bin/pip install -qq $PIP_ARGS -r requirements.txt -c pins.txt

FROM dependencies AS wheel
ARG PIP_ARGS=""
# The compiler of the native kernels stays here: what it makes is for every CPU with AVX2, and for those with AVX-512.
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -qq --no-install-recommends g++ >/dev/null && rm -rf /var/lib/apt/lists/*
COPY service ./service
RUN /opt/venv/bin/python -c 'from service.native import build_portable; print("native kernels:", build_portable())'
# hadolint ignore=DL3042,SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip wheel -qq $PIP_ARGS --no-deps --wheel-dir /wheel .
# Where there is Triton, the C module through which it reaches the driver: it would need a compiler at its first use.
RUN mkdir -p /opt/venv/share/triton && if /opt/venv/bin/pip show -qq triton; then \
        /opt/venv/bin/python -c 'from service.model.attention import triton_launcher; triton_launcher.build()'; fi
COPY model_store/demo /models/demo
RUN chmod -R a+rX /models

# Without what nothing here loads: headers, static libraries, Triton's profiler, two CUDA libraries that no other links to.
FROM dependencies AS environment
RUN site=$(echo /opt/venv/lib/python*/site-packages) \
    && rm -rf "$site"/torch/include "$site"/torch/share "$site"/triton/backends/nvidia/lib/cupti \
        "$site"/nvidia/cu*/lib/libcusolverMg.so.* "$site"/nvidia/cu*/lib/libnvrtc*.alt.so.* \
    && find "$site" -name '*.a' -delete

FROM ${BASE}
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin xlora
COPY --from=environment /opt/venv /opt/venv
COPY --from=wheel /opt/venv/share/triton /opt/venv/share/triton
COPY --from=wheel /models /models
# HOME is /tmp: with a read-only root (--read-only --tmpfs /tmp) nothing else is ever written.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XLORA_HOST=0.0.0.0 \
    XLORA_MODEL=/models/demo \
    TRITON_CACHE_MANAGER=service.model.attention.triton_launcher:ShippedCache
# Copied, not mounted: buildah would not see that the wheel has changed, and take the layer of an older one.
COPY --from=wheel /wheel /wheel
# hadolint ignore=DL3042
RUN pip install -qq --disable-pip-version-check --root-user-action=ignore --no-index --no-deps --compile /wheel/*.whl \
    && pip check
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
# Without site-packages (-S) Python starts at once; the timeout is for a machine that is busy.
HEALTHCHECK --interval=10s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-IS", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ.get('XLORA_PORT', '8000') + '/readyz', timeout=8)"]
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="xlora-service" \
      org.opencontainers.image.description="Inference service for X-LoRA bundles" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="$BASE"
ENTRYPOINT ["xlora-serve"]
CMD ["serve"]
