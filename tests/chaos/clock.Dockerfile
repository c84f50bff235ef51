# The image that is tested, with a clock that can be moved: what is in /tmp/clock, such as +600s, is added to it.
FROM swarmtrain-test
USER root
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libfaketime && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/*/faketime/libfaketimeMT.so.1 /usr/lib/libfaketime.so
USER swarmtrain
RUN echo +0 > /tmp/clock
ENV FAKETIME_TIMESTAMP_FILE=/tmp/clock FAKETIME_CACHE_DURATION=1 FAKETIME_DONT_FAKE_MONOTONIC=1
ENV LD_PRELOAD=/usr/lib/libfaketime.so
