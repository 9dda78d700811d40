# One image for driver and workers, with or without GPUs: torch's Linux wheels bring their own CUDA.
#   docker build -t curate .
#   docker run --rm curate curate --help
# A base of your own, --build-arg BASE=registry/python:3.12, needs glibc, useradd, and Python 3.11 to 3.13 with venv.
# `make image` builds on Debian's, without an engine.
ARG BASE=python:3.12-slim
FROM ${BASE}

WORKDIR /opt/curate
# Bytecode is compiled here: the user that runs this may not write it, and each worker would compile torch anew.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

# Dependencies first: they change less often than the code. Tests' packages are in the lock and stay out of use.
COPY requirements.lock ./
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv \
    && /opt/uv/bin/uv venv --python python3 "$VIRTUAL_ENV" && /opt/uv/bin/uv pip sync --no-cache requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY curate curate
COPY pipelines pipelines
COPY jobs jobs
# The version is a tag of git's, which is not copied.
ARG VERSION=0.1.0
RUN SETUPTOOLS_SCM_PRETEND_VERSION=$VERSION /opt/uv/bin/uv pip install --no-cache --no-deps .

# Nothing that runs here needs root; Ray and the model caches want a home that can be written.
RUN useradd --create-home curate
USER curate
WORKDIR /home/curate
CMD ["curate", "--help"]
