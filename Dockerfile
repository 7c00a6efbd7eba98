# docker build -t mars .
# docker run --rm --gpus all -v "$PWD/runs:/mars/runs" mars
# On a machine without a GPU leave out --gpus all. The folder runs/ must be writable for user 1000.

# PyTorch's wheel brings CUDA 13.0 and cuDNN itself; the image only has to let the driver in.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# The distribution's own versions follow the image's tag.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 1000 -g 1000 /mars /mars/runs

USER 1000:1000
WORKDIR /mars
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# Requirements first: this layer is rebuilt only when they change.
COPY --chown=1000:1000 requirements.txt ./
COPY --chown=1000:1000 tools/setup.sh tools/
RUN bash tools/setup.sh

COPY --chown=1000:1000 . .
CMD ["bash", "tools/demo.sh"]
