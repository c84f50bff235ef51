# Prometheus of Debian, for tests where no registry of images can be reached.
FROM python:3.11-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends prometheus \
    && install -d -o prometheus /prometheus
USER prometheus
