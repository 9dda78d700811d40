# One image for driver and workers, with or without GPUs: torch's Linux wheels bring their own CUDA.
#   docker build -t curate .
#   docker run --rm curate curate --help
FROM python:3.12-slim

RUN pip install --no-cache-dir uv
WORKDIR /opt/curate
# Bytecode is compiled here: the user that runs this may not write it, and each worker would compile torch anew.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1

# Dependencies first: they change less often than the code. Tests' packages are in the lock and stay out of use.
COPY requirements.lock ./
RUN uv venv "$VIRTUAL_ENV" && uv pip sync --no-cache requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY curate curate
COPY pipelines pipelines
COPY jobs jobs
RUN uv pip install --no-cache --no-deps .

# Nothing that runs here needs root; Ray and the model caches want a home that can be written.
RUN useradd --create-home curate
USER curate
WORKDIR /home/curate
CMD ["curate", "--help"]
