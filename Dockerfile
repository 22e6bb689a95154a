# The image of worker and trainer, for CPU and GPU alike. From the root of the checkout:
#   docker build --tag nightshift:0.1.0 .
# The small CPU build:
#   docker build --tag nightshift:0.1.0-cpu --build-arg UV_TORCH_BACKEND=cpu .

# A newer base has another digest: docker buildx imagetools inspect python:3.11-slim-bookworm
FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS dependencies
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/app/.venv
WORKDIR /app

# Only what decides the dependencies, so that a change of the source leaves this layer, the large one, as it is.
# The lock as a constraint: the versions are its own, its development tools stay out, and so do the CUDA
# libraries where UV_TORCH_BACKEND chooses a build of torch that does not ask for them.
COPY pyproject.toml requirements.lock deployments/cpu-build.sed ./
RUN sed -n '/^uv==/,/[^\]$/p' requirements.lock > uv.lock \
    && pip install --no-cache-dir --require-hashes --requirement uv.lock \
    && uv venv --python /usr/local/bin/python .venv
ARG UV_TORCH_BACKEND
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ -z "$UV_TORCH_BACKEND" ]; then export UV_REQUIRE_HASHES=1; \
    else sed -E -i -f cpu-build.sed requirements.lock; fi \
    && uv pip install --requirements pyproject.toml --constraints requirements.lock


FROM python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
# Triton compiles its launchers with it: torch.compile (compile=auto, on) needs a C compiler on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# A fixed number, so that Kubernetes can check that it is not root and volumes keep their owner.
RUN useradd --no-log-init --create-home --uid 10001 nightshift \
    && install --directory --owner=nightshift --group=nightshift /var/lib/nightshift

ENV PATH=/app/.venv/bin:$PATH \
    VIRTUAL_ENV=/app/.venv \
    NIGHTSHIFT_HOME=/var/lib/nightshift \
    DO_NOT_TRACK=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app
COPY --from=dependencies /app/.venv .venv
COPY . .
# Editable, so that the source is there once and a change of it costs a small layer only.
RUN --mount=type=bind,from=dependencies,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    uv pip install --no-cache --no-deps --build-constraints requirements.lock --require-build-hashes --editable .

USER 10001:10001
# No entry point and no shell: what is given as a command is the main process and gets SIGTERM itself. The wrapper
# passes it on to the trainers and waits for their saves; `prefect worker start` would kill them.
STOPSIGNAL SIGTERM
CMD ["nightshift", "worker", "--pool", "gpu-process", "--limit", "1"]
