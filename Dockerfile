# A peer of a swarm in a container:
#
#   docker build -t swarmtrain .
#   docker run -it -v swarmtrain:/data swarmtrain join INVITE
#
# A peer keeps everything in /data. Ctrl-C and `docker stop` let it leave cleanly; give it time: --stop-timeout 30.
# Stable layers come first: after a change of our code only the last layer is built again.

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS dependencies
# PyTorch's own index has builds without CUDA, which saves gigabytes. If that index cannot be reached, or has no build for
# this machine, pip's usual index is used. For a graphics card: --build-arg TORCH_INDEX_URL=https://pypi.org/simple, and
# `docker run --gpus all`.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/swarmtrain
ENV PATH=/opt/swarmtrain/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install --quiet --retries 0 --timeout 15 --index-url "$TORCH_INDEX_URL" 'torch>=2.4' \
    || { echo "$TORCH_INDEX_URL has no torch for this machine or cannot be reached: installing it from the default index"; pip install --quiet 'torch>=2.4'; }
COPY pyproject.toml /tmp/
RUN python -c 'import tomllib; print(*tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        >/tmp/requirements.txt \
    && pip install --quiet --requirement /tmp/requirements.txt

FROM dependencies AS package
RUN pip install --quiet 'hatchling>=1.25'
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY examples examples
COPY swarmtrain swarmtrain
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS peer
LABEL org.opencontainers.image.title="swarmtrain" \
      org.opencontainers.image.description="Decentralized low-communication training of one model by ordinary machines" \
      org.opencontainers.image.licenses="Apache-2.0"
# A volume created for one of these folders inherits its owner.
RUN useradd --create-home --uid 1000 swarmtrain && install -d -o swarmtrain -g swarmtrain /data /invite
COPY --from=dependencies /opt/swarmtrain /opt/swarmtrain
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    /opt/swarmtrain/bin/pip install --quiet --no-cache-dir --no-deps /wheels/*.whl
ENV PATH=/opt/swarmtrain/bin:$PATH PYTHONUNBUFFERED=1 XDG_DATA_HOME=/data XDG_CACHE_HOME=/data/cache
USER swarmtrain
WORKDIR /data
VOLUME /data
HEALTHCHECK --interval=10s --timeout=10s --start-period=2m --start-interval=2s CMD ["swarmtrain", "status", "--healthy"]
ENTRYPOINT ["swarmtrain"]
CMD ["--help"]

# For rehearsals: a peer behind an emulated link (peers/wan.yaml).
FROM peer AS wan
USER root
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends nftables && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home link
COPY peers/wan/start.py peers/wan/own_link.py /opt/swarmtrain/
ENTRYPOINT ["python", "/opt/swarmtrain/start.py"]

FROM peer
